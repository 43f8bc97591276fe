"""Block-sparse layers against the dense one and torch's Triton kernel for BSR weights.

bfloat16 in and out, with a bias; square blocks, chosen at random over the layer, as many as the sparsity
says. A point is one (K, N), M and block size; all sparsities take their turns in the same rounds. Sides, per
sparsity: ``lissom bf16`` and ``lissom int8`` values, the same as ``lissom cuda …`` by the CUDA C++ kernels
where they can run (blocks of 64 and 128), ``torch BSR`` (``bsr_dense_addmm`` of
``torch.sparse._triton_ops``, with the weight on the left, as it wants it), and ``torch bf16``, the dense
layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lissom
from bench.runner import sqnr_db
from lissom.formats import BlockSparseWeights, block_sparse_from_dense, quantize_block_sparse
from lissom.prune import keep_best
from lissom.testing import use

from .linear import BASELINE, check_rows, held_bytes, make_dense, on_gpu, rotated, rounds_done, timing
from .timing import CUDA, Faults, Side, cuda_missing, first_line, on, paired, rotations

__all__ = ["BSR", "Grid", "Layer", "measure", "side_name"]

OURS = {"bf16": torch.bfloat16, "int8": torch.int8}
BSR = "torch BSR"
CUDA_BLOCKS = (64, 128)

MIN_DB = {"bf16": 45.0, "int8": 25.0}
"""SQNR against float32 arithmetic with the same stored weights. bfloat16 rounds once; int8 activations of
Gaussian data give about 40 dB, whose bits are held to the reference where a shape is first met."""


@dataclass(frozen=True)
class Grid:
    """(K, N) × M × block × sparsity."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    blocks: Sequence[int]
    sparsities: Sequence[float]


FULL = Grid(
    shapes=((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672)),
    rows=(1, 16, 64, 256, 1024, 4096),
    blocks=(32, 64, 128),
    sparsities=(0.5, 0.7, 0.8, 0.9, 0.95),
)
SHORT = Grid(
    shapes=((8192, 8192), (4096, 14336)), rows=(4096, 16, 256), blocks=(128, 64), sparsities=(0.5, 0.8, 0.9)
)
QUICK_GPU = Grid(shapes=((4096, 4096),), rows=(16, 1024), blocks=(64, 128), sparsities=(0.5, 0.9))
QUICK_CPU = Grid(shapes=((64, 96),), rows=(5,), blocks=(32,), sparsities=(0.5,))


def side_name(what: str, sparsity: float) -> str:
    """``lissom bf16 50 %``."""
    return f"{what} {100 * sparsity:g} %"


@dataclass
class _Contender:
    name: str
    build: Callable[[], Callable[[Tensor], Tensor]]
    weights: BlockSparseWeights
    weight_bytes: int
    density: float
    peak: str
    functions: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def copies(self, device: torch.device) -> list[Callable[[Tensor], Tensor]]:
        """As many functions as rotation needs, made once."""
        if not self.functions:
            self.functions = [self.build() for _ in range(rotations(self.weight_bytes, device))]
        return self.functions


class Layer:
    """One (K, N) and block size: the sparse layers of all sparsities."""

    def __init__(
        self,
        k: int,
        n: int,
        block: int,
        sparsities: Sequence[float],
        device: torch.device,
        faults: Faults,
    ) -> None:
        self.k, self.n, self.block, self.device = k, n, block, device
        self.dense = make_dense(k, n, device)
        self.contenders: list[_Contender] = []
        self.bits_checked = False
        weights = [self.dense.weight.clone() for _ in range(rotations(self.dense.weight.nbytes, device))]
        self.baseline = [partial(F.linear, weight=weight, bias=self.dense.bias) for weight in weights]
        makers = {"lissom bf16": _lissom, "lissom int8": _lissom, BSR: _bsr}
        if reason := cuda_missing("block_sparse_linear", device):
            faults.leave_out(f"lissom {CUDA}", reason)
        elif block in CUDA_BLOCKS:
            makers |= {f"lissom {CUDA} {kind}": _by_cuda for kind in OURS}
        for sparsity in sparsities:
            generator = torch.Generator(device).manual_seed(round(1000 * sparsity))
            rows, columns = -(-n // block), -(-k // block)
            mask = keep_best(torch.rand(rows, columns, generator=generator, device=device), sparsity)
            floats = block_sparse_from_dense(self.dense.weight, mask, (block, block), torch.bfloat16)
            for what, make in makers.items():
                name = side_name(what, sparsity)
                try:
                    kept = quantize_block_sparse(floats) if what.endswith("int8") else floats
                    self.contenders.append(make(name, kept, self.dense.bias))
                except Exception as error:
                    faults.add(name, f"{k}x{n} blocks {block}", first_line(error))


def _lissom(name: str, weights: BlockSparseWeights, bias: Tensor) -> _Contender:
    layer = lissom.nn.SparseLinear.from_weights(weights, bias).requires_grad_(False).eval()
    peak = "int8" if weights.values.dtype == torch.int8 else "bf16"
    return _Contender(
        name, lambda: copy.deepcopy(layer).forward, weights, held_bytes(layer), weights.density, peak
    )


def _by_cuda(name: str, weights: BlockSparseWeights, bias: Tensor) -> _Contender:
    one = on(CUDA, _lissom)(name, weights, bias)
    return replace(one, build=on(CUDA, lambda: on(CUDA, one.build())))


def _bsr(name: str, weights: BlockSparseWeights, bias: Tensor) -> _Contender:
    if not on_gpu(bias):
        raise NotImplementedError("torch's kernel runs on a GPU only")
    from torch.sparse._triton_ops import bsr_dense_addmm

    source = lissom.formats.block_sparse_to_torch(weights)
    column = bias[:, None]

    def build() -> Callable[[Tensor], Tensor]:
        with torch.inference_mode(False):  # which sparse tensors do not know everywhere
            own = source.clone()

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                y: Tensor = bsr_dense_addmm(column.expand(-1, x.shape[0]), own, x.t())
            return y.t()

        return run

    held = sum(t.nbytes for t in (source.values(), source.crow_indices(), source.col_indices()))
    return _Contender(name, build, weights, held, weights.density, "bf16")


def _checked(layer: Layer, one: _Contender, function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """SQNR in dB on some rows.

    Raises:
        AssertionError: a side of lissom is below its bar, or int8 has not the reference's bits.
    """
    y = function(x)
    rows = check_rows(x.shape[0]).to(x.device)
    if y.shape != (x.shape[0], layer.n):
        raise AssertionError(f"result has shape {tuple(y.shape)}")
    weight = lissom.formats.block_sparse_to_dense(one.weights, torch.float32)
    found = sqnr_db(F.linear(x[rows].float(), weight, layer.dense.bias.float()), y[rows])
    if not one.name.startswith("lissom"):
        return found
    bar = MIN_DB["int8" if one.peak == "int8" else "bf16"]
    if not found >= bar:
        raise AssertionError(f"wrong: SQNR {found:.1f} dB with its own weights, below {bar:g}")
    if one.peak == "int8" and not layer.bits_checked:
        with use("reference"):
            expected = function(x[rows[:16]])
        if not torch.equal(expected, y[rows[:16]]):
            raise AssertionError("wrong: its bits are not the reference's")
        layer.bits_checked = True
    return found


def measure(
    layer: Layer,
    m: int,
    faults: Faults,
    probes: dict[str, Callable[[], float]],
    until: float,
    rounds: tuple[int, int],
) -> dict[str, Any]:
    """One point: check, time, figures."""
    k, n, block, device = layer.k, layer.n, layer.block, layer.device
    where = f"M={m} {k}x{n} blocks {block}"
    generator = torch.Generator(device).manual_seed(m)
    count = rotations(2 * m * k, device) if m > min(k, n) // 4 else 1
    xs = [torch.randn(m, k, generator=generator, device=device).bfloat16() for _ in range(count)]
    sides, found = [], {}
    with torch.inference_mode():
        for one in layer.contenders:
            try:
                functions = one.copies(device)
                sqnr = _checked(layer, one, functions[0], xs[0])
            except Exception as error:
                faults.add(one.name, where, first_line(error))
                continue
            found[one.name] = (one, sqnr)
            sides.append(Side(one.name, rotated(functions, xs, max(len(functions), count))))
    sides.append(Side(BASELINE, rotated(layer.baseline, xs, max(len(layer.baseline), count))))
    result, notes = paired(sides, device, where, faults, probes=probes, until=until, rounds=rounds, seed=m)
    entries = {}
    for name in result.seconds:
        if name == BASELINE:
            moved = layer.dense.weight.nbytes + 2 * (m * k + m * n + n)
            entries[name] = timing(result, name, moved, 2 * m * k * n, "bf16")
            continue
        one, sqnr = found[name]
        moved = one.weight_bytes + 2 * (m * k + m * n + n)
        operations = round(2 * m * k * n * one.density)
        entries[name] = {
            **timing(result, name, moved, operations, one.peak),
            "density": one.density,
            "sqnr_db": sqnr,
            "note": notes.get(name, ""),
        }
    return {"k": k, "n": n, "m": m, "block": block, "rounds": rounds_done(result), "sides": entries}
