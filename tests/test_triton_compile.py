"""Every Triton kernel compiles for GPUs that are not here, with tensor cores where due, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lissom import _triton

SCRIPT = Path(__file__).with_name("triton_compile.py")
KERNELS = SCRIPT.parents[1] / "kernels"
OPS = sorted(
    p.stem for p in KERNELS.glob("*.py") if p.stem != "tiles" and "def compilations(" in p.read_text()
)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
SHARED_KILOBYTES = {80: 163, 90: 227, 100: 227}
"""That a block can have; on sm_86, sm_89 and sm_120, which launch what is compiled for sm_80, 99."""


def check(row: dict[str, Any]) -> None:
    where = f"{row['name']} ({row['tile']}) for sm_{row['architecture']}"
    assert row["local_bytes"] == 0, f"{where}: {row['local_bytes']} bytes of local memory a thread: spills"
    # Triton 3.6 takes TF32 for sm_100 whatever precision is asked for, unless the tile has less than 64
    # rows: triton-lang/triton#10176.
    assert not row["tf32"], f"{where}: float32 is rounded to TF32"
    most = SHARED_KILOBYTES[row["architecture"]]
    if row["architecture"] == 80 and not row["roomy"]:
        most = 99
    assert row["shared"] <= most << 10, f"{where}: {row['shared']} bytes of shared memory"
    if row["wants_tensor_cores"]:
        rows_of_dot, columns = row["dot"]
        assert rows_of_dot, f"{where}: no product of tiles"
        # Small tiles stay on mma.sync, which every architecture has. wgmma has 64 rows and four warps; for 8
        # columns Triton 3.6 does not take it.
        whole = rows_of_dot >= 64 and columns >= 16 and row["warps"] % 4 == 0
        needed = {TENSOR_CORES[row["architecture"]]}
        if not (row["architecture"] == 90 and whole):
            needed.add("mma.sync")
        assert needed & set(row["tensor_cores"]), f"{where}: {row['tensor_cores']}, not {needed}"


@pytest.mark.parametrize("op", OPS)
def test_compiles(op: str, tmp_path: Path) -> None:
    if reason := _triton._triton_reason():
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, op], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        check(row)
