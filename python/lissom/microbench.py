"""``lissom bench``: one op against torch on the user's own machine.

The repository's ``bench/`` has the full grid, more peers and plots; this needs nothing but the package.
Results are checked before anything is timed; both sides of a ratio run in turn in this process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compress.measure import SignalToNoise, time_pair
from .config import BlockSparse
from .demo import torch_dynamic_int8
from .nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, SparseLinear

__all__ = ["OPS", "Op", "parse_numbers", "parse_shape", "run"]


@dataclass(frozen=True)
class Op:
    """One op as it is timed.

    Attributes:
        convert: the compressed layer of a dense one.
        linear: a linear layer, or else an embedding.
        min_sqnr_db: a layer below this is wrong, and nothing is timed.
        shapes: timed where none are given.
        exact: what the compressed layer has to give for an input; None: what the dense one gives.
    """

    convert: Callable[[Any], nn.Module]
    linear: bool
    min_sqnr_db: float
    shapes: tuple[str, ...]
    exact: Callable[[Any, Tensor], Tensor] | None = None


def _prune(linear: nn.Linear) -> SparseLinear:
    return SparseLinear.from_linear(linear, BlockSparse(sparsity=0.8, block_shape=(8, 1)))


def _exact(layer: SparseLinear, x: Tensor) -> Tensor:
    """The dense layer with the same weights: pruning changed them, the kernel must not."""
    return nn.functional.linear(x, layer.to_dense(), layer.bias)


_INT8_DB, _INT4_DB = 25.0, 12.0  # Gaussian data gives about 40 and 20 dB
_FP32_DB = 80.0  # … and about 130
_LINEARS = ("384x384", "384x1536", "1024x4096")
_TABLES = ("30522x384",)

OPS: dict[str, Op] = {
    "int8_linear": Op(Int8Linear.from_linear, True, _INT8_DB, _LINEARS),
    "int8_embedding": Op(Int8Embedding.from_embedding, False, _INT8_DB, _TABLES),
    "int4_linear": Op(Int4Linear.from_linear, True, _INT4_DB, _LINEARS),
    "int4_embedding": Op(Int4Embedding.from_embedding, False, _INT4_DB, _TABLES),
    "block_sparse_linear": Op(_prune, True, _FP32_DB, _LINEARS, _exact),
}
"""What can be timed, by name."""

Progress = Callable[[int, int, str], None]


def parse_shape(text: str) -> tuple[int, int]:
    """``384x1536`` as (384, 1536); ValueError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,6})[x×]([1-9]\d{0,6})", text)
    if found is None:
        raise ValueError(f"shape {text!r} is not KxN, such as 384x1536")
    return int(found[1]), int(found[2])


def parse_numbers(text: str, what: str) -> list[int]:
    """``1,8,32`` as a list of positive numbers; ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise ValueError(f"{what} {text!r} is not a list of positive numbers, such as 1,8,32")
    return [int(number) for number in text.split(",")]


def run(
    name: str,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    threads: Sequence[int],
    *,
    budget_s: float = 0.3,
    progress: Progress = lambda done, total, what: None,
) -> Iterator[dict[str, Any]]:
    """One result per grid point.

    Args:
        name: what to time, of ``OPS``.
        shapes: (K, N) of a linear layer, (rows, width) of an embedding.
        rows: M, rows of the input or number of indices.
        threads: numbers of torch threads; the setting is restored at the end.
        budget_s: seconds for each of the two comparisons at each point.

    Raises:
        RuntimeError: a result is wrong; it is not timed.
    """
    before = torch.get_num_threads()
    points = [(t, shape, m) for t in threads for shape in shapes for m in rows]
    try:
        for i, (t, shape, m) in enumerate(points):
            progress(i, len(points), f"{shape[0]}×{shape[1]} M={m}, {t} threads")
            torch.set_num_threads(t)
            yield _point(name, shape, m, t, budget_s)
    finally:
        torch.set_num_threads(before)


def _point(name: str, shape: tuple[int, int], m: int, threads: int, budget_s: float) -> dict[str, Any]:
    op = OPS[name]
    k, n = shape
    generator = torch.Generator().manual_seed(0)
    dense: nn.Module
    peer: nn.Module | None = None
    if op.linear:
        dense = nn.Linear(k, n)
        nn.init.normal_(dense.weight, generator=generator)
        peer = torch_dynamic_int8(nn.Sequential(dense))
        x = torch.randn(m, k, generator=generator)
    else:
        dense = nn.Embedding(k, n)
        x = torch.randint(k, (m,), generator=generator)
    ours = op.convert(dense)
    with torch.no_grad():
        quality = _check(name, dense, ours, x)
        to_dense = time_pair(lambda: dense(x), lambda: ours(x), budget_s=budget_s)
        to_peer = None if peer is None else time_pair(lambda: peer(x), lambda: ours(x), budget_s=budget_s)
    operations = 2 * m * k * n if op.linear else m * n
    return {
        "op": name,
        "shape": [k, n],
        "m": m,
        "threads": threads,
        "sqnr_db": quality,
        "fp32_us": to_dense.before_us,
        "torch_int8_us": None if to_peer is None else to_peer.before_us,
        "lissom_us": to_dense.after_us,
        "speedup_fp32": 1 / to_dense.ratio,
        "speedup_torch_int8": None if to_peer is None else 1 / to_peer.ratio,
        "gops": operations / to_dense.after_us / 1e3,
        "rounds": to_dense.rounds,
    }


def _check(name: str, dense: nn.Module, ours: nn.Module, x: Tensor) -> float:
    exact, least = OPS[name].exact, OPS[name].min_sqnr_db
    expected, found = exact(ours, x) if exact else dense(x), ours(x)
    quality = SignalToNoise()
    quality.add(expected, found)
    if quality.db is None or quality.db < least or found.shape != expected.shape:
        raise RuntimeError(f"{name}: wrong result (SQNR {quality.db} dB, below {least}); not timed")
    return quality.db
