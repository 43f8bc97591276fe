"""The examples run. What they find is not tested, but that a distilled student does learn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def digits() -> Any:
    return load("distill_digits")


def test_distill_digits_prints_a_table_and_draws(
    digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "curves.png"
    digits.main(["--quick", "--out", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "student 6,418 parameters, teacher 71,754; 300 images; 1 seed"
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "test accuracy, %",
        "labels only",
        "distilled",
        "teacher",
    ]
    if importlib.util.find_spec("matplotlib"):
        assert f"wrote {plot}" in lines
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_distill_digits_says_what_a_plot_needs(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = {"labels only": torch.rand(1, 3), "distilled": torch.rand(1, 3), "teacher": torch.rand(1)}
    assert not digits.draw(found, tmp_path / "x.png", "")


def test_drawn_digits_are_seeded_and_of_every_class(digits: Any) -> None:
    one, same, other = (digits.draw_digits(200, seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)
    assert one.images.shape == (200, 1, 16, 16)
    assert set(one.labels.tolist()) == set(range(10))
    ink = (one.images > 0.5).float().mean((1, 2, 3))
    assert ink.min() > 0.05
    assert ink.max() < 0.6
