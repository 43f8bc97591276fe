"""What the GPU can do at best, measured on the spot: HBM bandwidths and dense peaks.

* ``read``: a kernel that reads 1 GiB and writes next to nothing; ``copy``: ``Tensor.copy_`` of 1 GiB, reads
  and writes counted; ``add``: two reads and a write, as a distillation loss has them. GB/s.
* ``bf16``, ``int8``: ``torch.mm`` and ``torch._int_mm`` (cuBLAS) of 8192 × 8192 × 8192. TOP/s, a
  multiply-add counts two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .timing import Faults, Side, Timed, first_line

__all__ = ["UNITS", "make_probes", "read"]

UNITS = {"read": "GB/s", "copy": "GB/s", "add": "GB/s", "bf16": "TOP/s", "int8": "TOP/s"}

BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 16}
PEAK_SIZE = {"cuda": 8192, "cpu": 64}
BLOCK = 4096


@triton.jit
def read_kernel(source, out, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program reads STEPS blocks, 16 bytes a thread and load, and writes the sum of its lanes."""
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):
        at = begin + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < count, other=0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read(source: torch.Tensor, out: torch.Tensor, steps: int = 4) -> None:
    """Read int32 ``source``; ``out`` int32 has one element per ``steps * BLOCK`` of them."""
    read_kernel[(out.numel(),)](source, out, source.numel(), BLOCK=BLOCK, STEPS=steps, num_warps=8)


def make_probes(device: torch.device, faults: Faults) -> dict[str, Callable[[], float]]:
    """The floors by name: each call is one reading, in ``UNITS``."""
    size, n = BUFFER_BYTES[device.type], PEAK_SIZE[device.type]
    a, b, c = (torch.ones(size // 4, dtype=torch.int32, device=device) for _ in range(3))
    out = torch.empty(-(-a.numel() // (4 * BLOCK)), dtype=torch.int32, device=device)
    x, y = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    qx, qy = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    jobs: dict[str, tuple[Callable[[], Any], float]] = {
        "read": (lambda: read(a, out), size),
        "copy": (lambda: b.copy_(a), 2 * size),
        "add": (lambda: torch.add(a, b, out=c), 3 * size),
        "bf16": (lambda: torch.mm(x, y.t()), 2 * n**3 / 1e3),
        "int8": (lambda: torch._int_mm(qx, qy.t()), 2 * n**3 / 1e3),
    }
    probes: dict[str, Callable[[], float]] = {}
    for name, (call, work) in jobs.items():
        try:
            timed = Timed(Side(name, [call], graph=False), device)
        except Exception as error:  # an old cuBLAS, or no compiler for Triton
            faults.add(f"floor {name}", "", first_line(error))
            continue
        probes[name] = lambda timed=timed, work=work: work / timed() / 1e9  # type: ignore[misc]
    return probes
