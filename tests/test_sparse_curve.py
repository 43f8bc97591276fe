"""``lissom bench sparse``: crossovers, table, plot, command. Nothing depends on how fast the machine is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

import lissom
from lissom import _noise, cli, sparse_curve

pytestmark = pytest.mark.filterwarnings("ignore:lissom. .* runs on the slow reference backend")

Run = Callable[..., tuple[int, str, str]]

FAST = ("--shape", "40x24", "--m", "3", "--sparsity", "0.5,0.9", "--block", "8x1", "--seconds", "0.01")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def points(*speedups: float, block_shape: tuple[int, int] = (8, 1)) -> list[dict[str, Any]]:
    """Results of one curve at 0.5, 0.6, …"""
    return [
        {
            "shape": [64, 32],
            "m": 8,
            "threads": 1,
            "dtype": "float32",
            "block_shape": list(block_shape),
            "sparsity": (5 + i) / 10,
            "fp32_us": 100.0,
            "lissom_us": 100.0 / speedup,
            "speedup_fp32": speedup,
        }
        for i, speedup in enumerate(speedups)
    ]


# ------------------------------------------------------------------------------------------------ the curve


def test_crossover_is_where_a_linear_time_passes_the_dense_one() -> None:
    time = {s: 0.1 + 1.8 * (1 - s) for s in (0.3, 0.5, 0.7, 0.9)}  # 1 at sparsity 0.5
    curve = [(s, 1 / t) for s, t in time.items()]
    assert sparse_curve.crossover(curve) == pytest.approx(0.5)
    coarse = [curve[0], curve[3]]
    assert sparse_curve.crossover(coarse) == pytest.approx(0.5)
    assert sparse_curve.crossover(curve[::-1]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([], None),
        ([(0.5, 0.9), (0.9, 0.99)], None),
        ([(0.3, 1.0), (0.9, 4.0)], 0.3),
        ([(0.9, 2.0)], 0.9),
        ([(0.3, 1.2), (0.5, 0.5), (0.9, 2.0)], 0.5 + 0.4 * (2 - 1) / (2 - 0.5)),  # from which on it stays
    ],
)
def test_crossover_of_curves_that_hardly_cross(
    curve: list[tuple[float, float]], expected: float | None
) -> None:
    found = sparse_curve.crossover(curve)
    assert found == (None if expected is None else pytest.approx(expected))


def test_crossovers_and_tables_of_several_curves() -> None:
    measured = [
        *points(0.5, 2.0),
        *points(1.5, 3.0, block_shape=(16, 16)),
        *points(0.1, 0.2, block_shape=(1, 1)),
    ]
    found = sparse_curve.crossovers(measured)
    assert [(c["block_shape"], c["always"]) for c in found] == [
        ([8, 1], False),
        ([16, 16], True),
        ([1, 1], False),
    ]
    assert found[0]["crossover"] == pytest.approx(0.5 + 0.1 * 2 / 3)
    ((title, columns, rows),) = sparse_curve.tables(measured, found)
    assert "K=64, N=32, M=8" in title
    assert columns == ["block", "50 %", "60 %", "faster from"]
    assert rows[0] == ["8×1", "0.50× 200 µs", "2.00× 50 µs", "57 %"]
    assert [row[-1] for row in rows] == ["57 %", "≤ 50 %", "nowhere"]


@pytest.mark.parametrize("dtype", sparse_curve.DTYPES)
@pytest.mark.parametrize("block_shape", [(1, 1), (8, 1), (4, 4), (16, 16)])
def test_random_blocks_are_exactly_as_many_as_asked_for(
    dtype: sparse_curve.Dtype, block_shape: tuple[int, int]
) -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    kept = sparse_curve.random_block_sparse(weight, block_shape, 0.8, dtype)
    total = -(-30 // block_shape[0]) * -(-50 // block_shape[1])
    assert len(kept.values) == round(0.2 * total)
    assert kept.values.dtype == sparse_curve.DTYPES[dtype]
    per_row = kept.crow_indices.diff()
    if total > 100:
        assert per_row.min() < per_row.max()  # unevenly filled
    if dtype == "float32":
        dense = lissom.formats.block_sparse_to_dense(kept)
        assert torch.equal(dense[dense != 0], weight[dense != 0])


def test_measure_gives_every_point_and_restores_the_threads() -> None:
    before = torch.get_num_threads()
    seen: list[str] = []
    found = list(
        sparse_curve.measure(
            [(40, 24), (33, 17)],
            [1, 5],
            [1],
            sparsities=[0.0, 0.9],
            block_shapes=[(8, 1), (4, 4)],
            budget_s=0.001,
            progress=lambda done, total, what: seen.append(f"{done}/{total} {what}"),
        )
    )
    assert torch.get_num_threads() == before
    assert len(found) == len(seen) == 16
    assert seen[0] == "0/16 40×24 M=1, 8×1 at 0 %"
    for p in found:
        assert p["sqnr_db"] > sparse_curve.MIN_SQNR_DB["float32"]
        assert min(p["fp32_us"], p["lissom_us"], p["speedup_fp32"]) > 0
    full = [p for p in found if p["sparsity"] == 0]
    assert all(p["density"] == 1 for p in full)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_measure_other_types(dtype: sparse_curve.Dtype) -> None:
    (p,) = sparse_curve.measure(
        [(40, 24)], [4], [1], sparsities=[0.5], block_shapes=[(8, 4)], dtype=dtype, budget_s=0.001
    )
    assert p["dtype"] == dtype
    assert p["sqnr_db"] > sparse_curve.MIN_SQNR_DB[dtype]


def test_nothing_that_is_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lissom.nn.SparseLinear, "forward", lambda self, x: x.new_zeros(len(x), 24))
    monkeypatch.setattr(sparse_curve, "time_pair", lambda *a, **k: pytest.fail("a wrong result was timed"))
    with pytest.raises(RuntimeError, match=r"wrong result with blocks \(8, 1\) .*not timed"):
        list(sparse_curve.measure([(40, 24)], [3], [1], sparsities=[0.5], block_shapes=[(8, 1)]))


# ------------------------------------------------------------------------------------------------- the plot


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_written(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curve{suffix}"
    measured = [*points(0.5, 2.0), *points(1.5, 3.0, block_shape=(16, 16))]
    other = [p | {"m": 64} for p in measured]
    sparse_curve.draw([*measured, *other], path, "a title")
    data = path.read_bytes()
    assert len(data) > 5000
    if suffix == ".svg":
        text = data.decode()
        for shown in ("8×1: 57 %", "16×16: ≤ 50 %", "M=64", "a title"):
            assert f"<!-- {shown}" in text or shown in text


def test_a_plot_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"x\.pdf: the plot is written as \.png or \.svg"):
        sparse_curve.check_plot(tmp_path / "x.pdf")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        sparse_curve.check_plot(tmp_path / "none" / "x.png")
    real = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lissom\[bench\]'"):
        sparse_curve.check_plot(tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table(run: Run) -> None:
    code, out, err = run("bench", "sparse", *FAST, "--threads", "1")
    assert code == 0, err
    for text in ("K=40, N=24, M=3", "8×1", "50 %", "90 %", "faster from"):
        assert text in out


@pytest.mark.parametrize(("cores", "noisy"), [(0.7, True), (0.02, False), (None, False)])
@pytest.mark.parametrize("command", [("bench",), ("bench", "sparse", "--sparsity", "0.5", "--block", "8x1")])
def test_noise_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], cores: float | None, noisy: bool
) -> None:
    monkeypatch.setattr(_noise.ForeignCores, "mean", lambda self: cores)
    tiny = (*command, "--shape", "16x8", "--m", "1", "--seconds", "0.01")
    code, out, err = run(*tiny)
    assert code == 0, err
    assert ("other processes kept 0.7 cores busy" in out) == noisy
    found = json.loads(run(*tiny, "--json")[1])
    assert (found["foreign_cores"], found["noisy"]) == (cores, noisy)


def test_foreign_cores() -> None:
    mean = _noise.ForeignCores().mean()
    assert mean is None or mean >= 0


def test_the_command_in_json_with_a_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.svg"
    code, out, err = run("bench", "sparse", *FAST, "--dtype", "int8", "--out", plot, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [p["sparsity"] for p in found["points"]] == [0.5, 0.9]
    assert {p["dtype"] for p in found["points"]} == {"int8"}
    assert found["crossovers"][0]["block_shape"] == [8, 1]
    assert found["plot"] == str(plot)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--block", "8"), "--block '8' is not outputs x inputs"),
        (("--block", "0x1"), "--block '0x1'"),
        (("--sparsity", "1"), "--sparsity '1' is not a list of sparsities, from 0 to below 1"),
        (("--sparsity", "-0.1"), "--sparsity '-0.1'"),
        (("--sparsity", "nan"), "--sparsity 'nan'"),
        (("--sparsity", "half"), "--sparsity 'half'"),
        (("--dtype", "fp16"), "--dtype 'fp16' is unknown; use one of float32, bfloat16, float16, int8"),
        (("--shape", "64"), "shape '64' is not KxN"),
        (("--m", "0"), "--m '0' is not a list"),
        (("--out", "x.pdf"), "the plot is written as .png or .svg"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: tuple[str, ...], text: str) -> None:
    code, out, err = run("bench", "sparse", *arguments)
    assert (code, out) == (1, "")
    assert text in err
    assert err.count("\n") == 1


def test_options_of_bench_before_sparse_are_an_error(run: Run) -> None:
    code, _, err = run("bench", "--m", "8", "sparse")
    assert code == 1
    assert "the options of sparse come after its name" in err


def test_an_unknown_word_after_bench_is_a_wrong_command_line(run: Run) -> None:
    assert run("bench", "dense")[0] == 2
