"""Ops on Triton's kernels up to the launch, as on a GPU: ``tests/triton_launch.py``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lissom import _triton

SCRIPT = Path(__file__).with_name("triton_launch.py")
KERNELS = SCRIPT.parents[1] / "kernels"
MOST = (2**31 - 1, 65535, 65535)
"""Programs of a grid."""


def entry_points() -> set[str]:
    """Every kernel of ``kernels/`` that a launch can name."""
    return {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }


def launched(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script tells of each call, which has been looked at."""
    if reason := _triton._triton_reason():
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        where = f"{row['op']} {row['call']}"
        assert not row["fault"], f"{where}: {row['fault']}"
        first, recorded, third = row["turns"]
        assert first, where
        for launch in first:
            assert all(0 < size <= most for size, most in zip(launch["grid"], MOST, strict=True)), launch
        assert recorded == first, where
        assert third == first, f"{where}, {'replayed' if row['replayed'] else 'run again'}"
    return rows


def test_launches(tmp_path: Path) -> None:
    rows = launched(tmp_path, "90")
    kernels = {launch["kernel"] for row in rows for launch in row["turns"][0]}
    assert kernels == entry_points()
    anew = [f"{row['op']} {row['call']}" for row in rows if not row["replayed"]]
    anew = [call for call in anew if "300x1024x2048" not in call or "weight_only" not in call]
    expected = ("gradient", "distill", "256x1000", "777")
    assert all(any(part in call for part in expected) for call in anew), anew


@pytest.mark.parametrize("capability", ["80", "100"])
def test_some_launches_elsewhere(tmp_path: Path, capability: str) -> None:
    rows = launched(tmp_path, capability, "12")
    assert len({row["op"] for row in rows}) == 7
    assert any(row["replayed"] for row in rows)
