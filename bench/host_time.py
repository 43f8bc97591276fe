"""What a call of a layer on a GPU costs before the GPU works: ``python -m bench.host_time``.

Microseconds of Python between a call and the return of its last launch, in inference mode, for calls that
are repeated (``lissom._replay``) and for those that are chosen anew (``LISSOM_REPLAY=0``), taken in turn.
Where no GPU is found the driver of ``tests/triton_launch.py`` stands in for one, for Triton's kernels: all is
real, Triton's launcher in C too, but what the driver does in a launch (2 µs or so), allocations on the GPU,
and asking for the current device and stream.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SIZE = 1024
CALLS, ROUNDS = 200, 15


def pretend() -> None:
    """Take CPU tensors for those of a Hopper GPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import triton_launch

    from lissom import _native

    triton_launch.under_a_driver()
    os.environ["LISSOM_BACKEND"] = "triton"
    triton_launch.Driver.launcher_cls = triton_launch.nvidia.CudaLauncher
    triton_launch.stand_in(90)
    _native.load().call_key_on_cpu(True)


def layers(device: torch.device) -> dict[str, nn.Module]:
    import lissom
    from lissom.nn import Int4Linear, Int8Linear, SparseLinear

    dense = nn.Linear(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    sparse = lissom.BlockSparse(sparsity=0.8, block_shape=(64, 64), dtype="bfloat16")
    return {
        "Int8Linear": Int8Linear.from_linear(dense),
        "Int4Linear": Int4Linear.from_linear(dense),
        "Int4Linear weight-only": Int4Linear.from_linear(dense, lissom.Int4(activation=None)),
        "SparseLinear 64x64": SparseLinear.from_linear(dense, sparse),
    }


def microseconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds / CALLS * 1e6


def measure(layer: nn.Module, x: torch.Tensor, synchronize: Callable[[], None]) -> tuple[float, float]:
    """Medians, repeated and chosen anew, of a call."""
    from lissom._replay import repeating

    def call() -> object:
        return layer(x)

    for _ in range(3):
        call()
    with repeating(False):
        call()
    pairs = []
    for _ in range(ROUNDS):
        repeated = microseconds(call, synchronize)
        with repeating(False):
            pairs.append((repeated, microseconds(call, synchronize)))
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        pretend()
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    where = torch.cuda.get_device_name() if gpu else "no GPU: the driver is a stand-in"
    print(f"{where}; torch {torch.__version__}; {SIZE} x {SIZE}; µs of Python a call, repeated (anew)")
    with torch.inference_mode():
        for name, layer in layers(device).items():
            cells = []
            for m in (1, 16, 64):
                x = torch.randn(m, SIZE, device=device, dtype=torch.bfloat16)
                repeated, chosen = measure(layer, x, synchronize)
                cells.append(f"M={m} {repeated:.1f} ({chosen:.1f})")
            print(f"{name:24}" + "   ".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
