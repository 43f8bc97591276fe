"""One table of cases, inputs and tolerances for correctness tests and benchmarks. No pytest in here.

Each op is described once: ``LINEAR_CASES``, ``INT4_CASES``, ``BLOCK_SPARSE_CASES``, ``EMBEDDING_CASES`` and
``DISTILL_CASES`` (odd and degenerate shapes, with the reason each is there), ``DISTILL_KINDS``,
``LINEAR_GRID`` (what benchmarks time), ``DTYPES``, ``MODES``, ``INT4_FORMS``, ``INT4_MODES``,
``BLOCK_SHAPES``. ``implementations()`` lists what can answer an op here, ``use(name)`` makes one of them
answer, ``linear_inputs(...)``, ``int4_inputs(...)``, ``block_sparse_inputs(...)`` and
``distill_inputs(...)`` make the seeded tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, formats, registry
from .formats import BlockSparseWeights, Int4Weights
from .reference.numerics import ACTIVATION_FUNCTIONS

__all__ = [
    "ACT_FNS",
    "ALL_ISAS",
    "BLOCK_SHAPES",
    "BLOCK_SPARSE_CASES",
    "BLOCK_SPARSE_DTYPES",
    "DISTILL_CASES",
    "DISTILL_KINDS",
    "DISTILL_TOLERANCE",
    "DTYPES",
    "EMBEDDING_CASES",
    "EXACT_ACT_FNS",
    "FAST_BLOCK_SHAPES",
    "GRAD_TOLERANCE",
    "IMPLEMENTATIONS",
    "INT4_CASES",
    "INT4_FORMS",
    "INT4_MODES",
    "LINEAR_CASES",
    "LINEAR_GRID",
    "MODES",
    "ROW_KINDS",
    "VIEWS",
    "BlockSparseCase",
    "BlockSparseInputs",
    "DistillCase",
    "DistillInputs",
    "Int4Form",
    "Int4Inputs",
    "LinearCase",
    "LinearInputs",
    "assert_same_bits",
    "assert_within",
    "backends",
    "block_sparse_inputs",
    "block_sparse_weights",
    "distill_inputs",
    "float_tolerance",
    "force_isa",
    "implementations",
    "int4_inputs",
    "int4_weights",
    "isas",
    "linear_inputs",
    "rows",
    "sum_bound",
    "use",
    "weight_only_bound",
    "why_not",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What every op takes and gives."""

MODES = ("dynamic", "static", "weight_only")
"""The three forms of ``int8_linear``. The first two are bit-identical everywhere."""

INT4_MODES = ("int8", "rotated", "weight_only")
"""The three forms of ``int4_linear``'s activations. The first two are bit-identical everywhere."""

ACT_FNS = (None, *ACTIVATION_FUNCTIONS)

EXACT_ACT_FNS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
"""torch's own functions, for float64."""


class LinearCase(NamedTuple):
    """x ``[m, k]`` times a weight ``[n, k]``, and why this shape is in the table."""

    m: int
    k: int
    n: int
    why: str

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


LINEAR_CASES = (
    LinearCase(0, 8, 8, "no rows"),
    LinearCase(3, 0, 5, "no terms: the result is act(bias)"),
    LinearCase(3, 5, 0, "no outputs"),
    LinearCase(0, 0, 0, "nothing at all"),
    LinearCase(1, 1, 1, "the smallest"),
    LinearCase(5, 123, 123, "no dimension is a multiple of anything"),
    LinearCase(7, 17, 33, "one past each of 16 and 32"),
    LinearCase(1, 3, 16, "K one below a quad"),
    LinearCase(2, 4, 15, "K is one quad, N one below a panel"),
    LinearCase(2, 5, 17, "K one past a quad, N one past a panel"),
    LinearCase(3, 15, 31, "K one below a 16-wide step"),
    LinearCase(3, 16, 32, "K is one 16-wide step"),
    LinearCase(4, 63, 16, "K one below a 64-byte line"),
    LinearCase(4, 64, 47, "K is one 64-byte line"),
    LinearCase(4, 65, 48, "K one past a 64-byte line"),
    LinearCase(6, 40, 64, "a row tile of 6 (AVX2)"),
    LinearCase(12, 36, 20, "a row tile of 12 (AVX-512)"),
    LinearCase(13, 36, 20, "one row past a tile of 12"),
    LinearCase(14, 20, 50, "a row tile of 14"),
    LinearCase(15, 20, 18, "one row past a tile of 14"),
    LinearCase(50, 72, 80, "several row tiles and a rest"),
    LinearCase(3, 5000, 20, "K is blocked in the kernels"),
    LinearCase(2, 2049, 16, "K one past 2048"),
    LinearCase(1, 1024, 500, "one row, many panels: threads share the outputs"),
    LinearCase(140, 96, 130, "several slabs of rows: threads share the rows"),
    LinearCase(1100, 4096, 17, "activations beyond one chunk of the native kernels' scratch memory"),
)
"""Shapes for correctness: (M, K, N), odd and degenerate ones first."""

INT4_CASES = (
    *LINEAR_CASES,
    LinearCase(3, 2, 3, "one byte of codes"),
    LinearCase(3, 31, 17, "K one below a block of 32"),
    LinearCase(3, 32, 16, "K is one block"),
    LinearCase(5, 33, 40, "K one past a block: a short last group of one column"),
    LinearCase(4, 127, 33, "K one below the longest segment"),
    LinearCase(4, 128, 32, "K is one segment of 128"),
    LinearCase(6, 129, 18, "K one past a segment of 128"),
    LinearCase(3, 193, 20, "several groups of each size, odd rest"),
    LinearCase(24, 416, 40, "a last segment of some blocks"),
)
"""Shapes for int4: those of every linear, and what is odd for groups, blocks and bytes of two codes."""

LINEAR_GRID = tuple(
    LinearCase(m, k, n, "benchmark grid")
    for (k, n), m in itertools.product(
        ((384, 384), (384, 1536), (768, 3072), (1024, 4096), (4096, 4096)), (1, 8, 32, 128, 512)
    )
)
"""Shapes for benchmarks: MiniLM, BERT and LLM-sized linears at five numbers of rows."""


class Int4Form(NamedTuple):
    """A form of int4 weights."""

    group_size: int
    zero: torch.dtype | None = None
    codebook: str | None = None
    group_index: bool = False
    scale: torch.dtype = torch.float16

    def __str__(self) -> str:
        size = "row" if self.group_size == -1 else f"g{self.group_size}"
        what = self.codebook or str(self.zero or "symmetric").removeprefix("torch.")
        return f"{size}-{what}{'-index' if self.group_index else ''}"


INT4_FORMS = (
    Int4Form(128),
    Int4Form(128, torch.uint8),
    Int4Form(128, codebook="channel", scale=torch.float32),
    Int4Form(64, scale=torch.bfloat16),
    Int4Form(64, torch.float16, scale=torch.float32),
    Int4Form(64, codebook="tensor"),
    Int4Form(32, scale=torch.float32),
    Int4Form(32, torch.uint8, scale=torch.bfloat16),
    Int4Form(32, codebook="group"),
    Int4Form(-1, scale=torch.float32),
    Int4Form(-1, torch.float32),
    Int4Form(-1, codebook="tensor", scale=torch.bfloat16),
    Int4Form(-1, codebook="group", scale=torch.float32),
    Int4Form(128, torch.bfloat16, group_index=True),
    Int4Form(64, codebook="channel", group_index=True),
    Int4Form(32, group_index=True),
)
"""Group sizes, zero-points and their types, tables and their scopes, types of scales: each somewhere."""

BLOCK_SPARSE_DTYPES = formats.BLOCK_SPARSE_DTYPES
"""What the stored values of block-sparse weights may be."""

FAST_BLOCK_SHAPES = ((8, 1), (16, 1), (4, 4), (8, 4), (16, 4), (16, 16), (32, 32), (64, 64))
"""Blocks with kernels of their own."""

BLOCK_SHAPES = (*FAST_BLOCK_SHAPES, (1, 1), (3, 5), (2, 1), (1, 8), (7, 3), (5, 4), (12, 8))
"""Blocks for correctness: the fast ones, single weights, and what divides by nothing."""


class BlockSparseCase(NamedTuple):
    """x ``[m, k]`` times a weight ``[n, k]``, the share of its blocks that is stored, and why this is here.

    ``keep`` None: one full block row among empty ones.
    """

    m: int
    k: int
    n: int
    keep: float | None
    why: str

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}-{'row' if self.keep is None else self.keep}"


BLOCK_SPARSE_CASES = (
    BlockSparseCase(0, 40, 24, 0.5, "no rows"),
    BlockSparseCase(3, 0, 5, 1.0, "no terms: the result is act(bias)"),
    BlockSparseCase(3, 5, 0, 1.0, "no outputs"),
    BlockSparseCase(0, 0, 0, 1.0, "nothing at all"),
    BlockSparseCase(1, 1, 1, 1.0, "the smallest"),
    BlockSparseCase(2, 3, 7, 1.0, "smaller than most blocks: all padding"),
    BlockSparseCase(3, 15, 31, 0.5, "one below a 16-wide step and two of them"),
    BlockSparseCase(33, 130, 70, 0.0, "no blocks: the result is act(bias)"),
    BlockSparseCase(50, 72, 80, 1.0, "every block is stored"),
    BlockSparseCase(5, 123, 123, 0.4, "no dimension is a multiple of anything"),
    BlockSparseCase(1, 128, 192, 0.3, "one row; whole blocks of all fast shapes"),
    BlockSparseCase(2, 65, 129, 0.2, "one past each of 64 and 128"),
    BlockSparseCase(8, 63, 127, 0.5, "one below each of 64 and 128"),
    BlockSparseCase(17, 96, 80, 0.25, "one row past a tile of 16"),
    BlockSparseCase(33, 100, 64, 0.3, "one row past two tiles of 16"),
    BlockSparseCase(97, 200, 150, 0.1, "many row tiles and a rest; empty block rows"),
    BlockSparseCase(5, 150, 400, None, "one full block row among empty ones: threads share unevenly"),
    BlockSparseCase(3, 2049, 40, 0.1, "long sums"),
    BlockSparseCase(1, 512, 500, 0.15, "one row, many outputs: threads share the outputs"),
    BlockSparseCase(140, 256, 260, 0.15, "several slabs of rows"),
)
"""Shapes and densities for block-sparse linears, odd and degenerate ones first."""

EMBEDDING_CASES = (
    ((), 7, 5),
    ((0,), 7, 5),
    ((3,), 1, 1),
    ((4, 5), 33, 17),
    ((2, 3, 4), 10, 0),
    ((6,), 50, 16),
    ((9,), 50, 15),
    ((9,), 50, 384),
    ((300,), 100, 131),
)
"""(shape of the indices, rows of the table V, width D)."""


class DistillCase(NamedTuple):
    """Logits ``[rows, vocab]`` of student and teacher, and why this shape is in the table."""

    rows: int
    vocab: int
    why: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}"


DISTILL_CASES = (
    DistillCase(0, 7, "no rows"),
    DistillCase(1, 1, "one word: KL, entropy and CE are 0"),
    DistillCase(1, 2, "the smallest distribution"),
    DistillCase(3, 5, "shorter than a step"),
    DistillCase(2, 15, "one below a step of 16"),
    DistillCase(2, 16, "one step"),
    DistillCase(2, 17, "one past a step"),
    DistillCase(5, 31, "one below two steps"),
    DistillCase(5, 48, "three steps: an odd one in loops of two"),
    DistillCase(5, 123, "a multiple of nothing"),
    DistillCase(300, 10, "many short rows: threads share the rows"),
    DistillCase(3, 1023, "one below a chunk of the native kernels"),
    DistillCase(3, 1024, "one chunk"),
    DistillCase(3, 1025, "one past a chunk"),
    DistillCase(2, 16384, "one task of the native kernels"),
    DistillCase(2, 16385, "one past a task: an unaligned last element"),
    DistillCase(1, 40003, "one huge row: threads share it"),
    DistillCase(70, 333, "rows of threads, and a rest"),
)
"""Shapes for distillation losses, odd and degenerate ones first."""

DISTILL_KINDS = (
    "normal",
    "close",
    "equal",
    "one_hot",
    "extreme",
    "peaked",
    "masked_both",
    "masked_teacher",
    "offset",
)
"""Kinds of logits that :func:`distill_inputs` makes; the loss of each is finite."""

# ------------------------------------------------------------------------------------------- tolerances

UNIT_ROUNDOFF: dict[torch.dtype, float] = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Largest relative error of one rounding (half a unit in the last place; bfloat16 has 8 significant bits)."""

SMALLEST_SUBNORMAL: dict[torch.dtype, float] = {
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
}

ACT_FN_ERROR = 4e-7
"""Error of the fused activation functions, relative to max(|x|, tiny): erfc by Numerical Recipes' form
(1.2e-7), exp (2e-7) and a few float32 roundings on top."""

ACT_FN_LIPSCHITZ = 1.13
"""Largest slope of relu (1), silu (1.10) and gelu (1.129): how much an error before it can grow."""


def weight_only_bound(x: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Error bound ``[M, N]`` of the weight-only form against exact arithmetic, before activation and output.

    A float32 sum of K products in any order is off by at most K·u/(1 − K·u) times the sum of their magnitudes
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1; u = 2^-24); then one multiply-add.
    """
    k = x.shape[-1]
    u = UNIT_ROUNDOFF[torch.float32]
    magnitude = (x.double().abs() @ qweight.double().abs().t()) * weight_scale.double()
    offset = 0.0 if bias is None else bias.double().abs()
    bound: Tensor = magnitude * (k * u / (1 - k * u)) + (magnitude + offset) * 2 * u
    return bound + SMALLEST_SUBNORMAL[torch.float32] * (k + 1)


def sum_bound(left: Tensor, right: Tensor, terms: int) -> Tensor:
    """Error bound of the product ``[A, T] · [T, B]`` in float32 against exact arithmetic.

    As for :func:`weight_only_bound`, with ``terms`` summands that are not zero by construction; one addition
    more for a bias, one rounding more for a scale, each at most u times the sum of magnitudes.
    """
    u = UNIT_ROUNDOFF[torch.float32]
    magnitude = left.double().abs() @ right.double().abs()
    bound: Tensor = magnitude * (terms * u / (1 - terms * u) + 3 * u)
    return bound + SMALLEST_SUBNORMAL[torch.float32] * (terms + 1)


GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest gradient. The formula is evaluated in the gradient's dtype: a few roundings of it
(UNIT_ROUNDOFF 6e-8, 4e-3, 5e-4) in the weight, the activation's derivative and the product."""


DISTILL_TOLERANCE = 1e-6
"""Relative error of a distillation loss, of a row's gradient as a whole (2-norm), and of an element relative
to the row's largest, against float64 on the same logits: exp and log-sum-exp within 2e-7, some float32
roundings, float64 sums. The gradient's dtype adds its own rounding."""


def float_tolerance(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding ``expected`` (float64) once to ``dtype`` may change."""
    return expected.abs() * UNIT_ROUNDOFF[dtype] + SMALLEST_SUBNORMAL[dtype]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits; -0.0 differs from 0.0, and every NaN equals every NaN.

    The sign and payload of a NaN are no part of the contract: x86 and IEEE leave them to the operand order.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, e = actual.detach().contiguous(), expected.detach().contiguous()
    wrong = (
        (a.view(bits) != e.view(bits)) if a.dim() else (a.view(1).view(bits) != e.view(1).view(bits)).view(())
    )
    if a.is_floating_point():
        wrong = wrong & ~(a.isnan() & e.isnan())
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ; first at {first}: "
            f"{a[first].item()!r} ({_hex(a[first], bits)}), "
            f"expected {e[first].item()!r} ({_hex(e[first], bits)})"
        )


def _hex(value: Tensor, bits: torch.dtype) -> str:
    mask = (1 << (8 * value.element_size())) - 1
    return hex(int(value.reshape(1).view(bits).item()) & mask)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """``|actual - expected| <= bound`` element by element, in float64; ``expected`` is finite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    wrong = ~(error <= bound)  # NaN is wrong
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off; first at {first}: "
            f"{actual[first].item()!r}, expected {expected[first].item()!r} "
            f"within {bound.expand_as(error)[first].item():.3g}"
        )


# ------------------------------------------------------------------------------------------- inputs

ROW_KINDS = ("normal", "outlier", "zero", "huge", "tiny", "denormal", "ties", "constant", "signed_zero")
"""Kinds of activation rows that :func:`rows` makes in turn."""


def rows(
    m: int, k: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, kind: str | None = None
) -> Tensor:
    """Random finite ``[m, k]``; row i is of kind ``ROW_KINDS[i % len]``, or all of ``kind``.

    ``outlier`` has one element 100 times the rest, ``huge`` and ``tiny`` lie near the ends of the dtype's
    normal range, ``denormal`` below it, ``ties`` quantizes to halves (round half to even), ``signed_zero`` is
    all ±0.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + m * 31 + k)
    x = torch.randn(m, k, generator=generator)
    info = torch.finfo(dtype)
    for i in range(m if k else 0):
        name = kind or ROW_KINDS[i % len(ROW_KINDS)]
        row = x[i]
        if name == "outlier":
            row[int(torch.randint(k, (1,), generator=generator))] = 100.0
        elif name == "zero":
            row.zero_()
        elif name == "huge":
            row.clamp_(-3, 3).mul_(info.max / 4)
        elif name == "tiny":
            row.mul_(info.tiny * 4)
        elif name == "denormal":
            row.clamp_(-3, 3).mul_(info.tiny / 8)
        elif name == "ties":
            row.copy_(torch.randint(-63, 64, (k,), generator=generator) + 0.5)
            row[0] = 127.0 if i % 2 else -127.0
        elif name == "constant":
            row.fill_(-0.75)
        elif name == "signed_zero":
            row.copy_(torch.where(row < 0, -0.0, 0.0))
        elif name != "normal":
            raise ValueError(f"rows: kind={name!r} is unknown; use one of {ROW_KINDS}")
    return x.to(dtype)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every_second_column": lambda x: torch.stack([x, x * 0 + 9], dim=2).flatten(1)[:, ::2],
    "every_second_row": lambda x: torch.stack([x, x * 0 + 9], dim=1).flatten(0, 1)[::2],
    "columns_of_a_wider_one": lambda x: torch.cat([x * 0 + 9, x, x * 0 + 9], dim=1)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
    "odd_storage_offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "middle_of_three_dimensions": lambda x: x.view(4, 5, -1).transpose(0, 1),
    "permuted": lambda x: x.view(4, 5, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
}
"""Ways to see an ``x`` [20, K] that are not dense, or not aligned."""


@dataclass(frozen=True)
class LinearInputs:
    """Seeded arguments of ``int8_linear``."""

    x: Tensor
    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    weight_only: bool
    act_fn: str | None

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, str | None]:
        """Positional arguments of ``torch.ops.lissom.int8_linear`` and of the reference."""
        return (
            self.x,
            self.qweight,
            self.weight_scale,
            self.bias,
            self.input_scale,
            self.weight_only,
            self.act_fn,
        )


def linear_inputs(
    case: LinearCase,
    dtype: torch.dtype = torch.float32,
    mode: str = "dynamic",
    act_fn: str | None = None,
    *,
    bias: bool = True,
    seed: int = 0,
    kind: str | None = None,
) -> LinearInputs:
    """Tensors for one case: weights with a zero row and an extreme row where there is room."""
    m, k, n = case[:3]
    x = rows(m, k, dtype, seed=seed, kind=kind)
    weight = rows(n, k, seed=seed + 1, kind="normal") / max(k, 1) ** 0.5
    if n > 2 and k:
        weight[1] = 0.0
        weight[n - 1] = torch.where(weight[n - 1] < 0, -2.0, 2.0)  # every |q| is 127
    qweight, weight_scale = formats.quantize_int8(weight)
    generator = torch.Generator().manual_seed(seed + 2)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    scale = torch.tensor(0.013) if mode == "static" else None
    return LinearInputs(x, qweight, weight_scale, offset, scale, mode == "weight_only", act_fn)


@dataclass(frozen=True)
class Int4Inputs:
    """Seeded arguments of ``int4_linear``."""

    x: Tensor
    weights: Int4Weights
    bias: Tensor | None
    weight_only: bool
    act_fn: str | None
    rotated: bool

    def args(self, x: Tensor | None = None, cached: bool = False, **others: Any) -> tuple[Any, ...]:
        """Arguments of ``torch.ops.lissom.int4_linear``, ``cached`` with what a layer keeps packed.

        ``others`` replace some by name.
        """
        w, index = self.weights, self.weights.group_index
        values: dict[str, Any] = {
            "x": self.x if x is None else x,
            "qweight": w.qweight,
            "weight_scale": w.weight_scale,
            "zero_point": w.zero_point,
            "codebook": w.codebook,
            "group_index": index,
            "bias": self.bias,
            "group_size": w.group_size,
            "weight_only": self.weight_only,
            "act_fn": self.act_fn,
            "packed": formats.pack_int4(w, self.weight_only) if cached else None,
            "permutation": formats.group_order(index) if cached and index is not None else None,
            "backend": None,
            "rotated": self.rotated,
        }
        assert others.keys() <= values.keys()
        return tuple({**values, **others}.values())

    @property
    def page(self) -> tuple[Tensor, Int4Weights, Tensor | None, bool, str | None, bool]:
        """Arguments of the reference."""
        return self.x, self.weights, self.bias, self.weight_only, self.act_fn, self.rotated


def int4_weights(n: int, k: int, form: Int4Form, *, seed: int = 0) -> Int4Weights:
    """Sound weights of a form. Where there is room: a zero scale, the largest and the smallest codes with a
    negative scale, zero-points far outside the codes, a scale below the normal range of its type."""
    generator = torch.Generator().manual_seed(seed * 7919 + n * 31 + k)
    groups = formats.int4_groups(k, form.group_size)
    codes = torch.randint(16, (n, k), generator=generator)
    scale = torch.rand(n, groups, generator=generator) / (4 * max(k, 1) ** 0.5)
    if n > 3:
        codes[0], codes[1], scale[1] = 15, 0, -scale[1]
        scale[2] = 0.0
        scale[3] = torch.finfo(form.scale).tiny / 4
    zero = None
    if form.zero is not None:
        zero = torch.rand(n, groups, generator=generator) * 15
        if n > 5:
            zero[4], zero[5] = 255, 0
        zero = zero.round().to(form.zero) if form.zero == torch.uint8 else zero.to(form.zero)
    codebook = None
    if form.codebook is not None:
        leading = {"tensor": (), "channel": (n,), "group": (n, groups)}[form.codebook]
        codebook = torch.randn(*leading, 16, generator=generator) * 4
        if n > 6 and form.codebook != "tensor":
            codebook[6] = 0.0
    index = None
    if form.group_index:
        index = (torch.randperm(k, generator=generator) // form.group_size).to(torch.int32)
    return Int4Weights(
        formats.pack_nibbles(codes),
        scale.to(form.scale),
        zero,
        codebook,
        index,
        in_features=k,
        group_size=form.group_size,
    )


def int4_inputs(
    case: LinearCase,
    form: Int4Form = INT4_FORMS[0],
    dtype: torch.dtype = torch.float32,
    mode: str = "int8",
    act_fn: str | None = None,
    *,
    bias: bool = True,
    seed: int = 0,
    kind: str | None = None,
) -> Int4Inputs:
    """Tensors for one case. A form with a group index has no rotated mode."""
    if form.group_index and mode == "rotated":
        raise ValueError("int4_inputs: mode='rotated' does not go with a group_index; use mode='int8'")
    m, k, n = case[:3]
    generator = torch.Generator().manual_seed(seed + 2)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    weights = int4_weights(n, k, form, seed=seed + 1)
    x = rows(m, k, dtype, seed=seed, kind=kind)
    return Int4Inputs(x, weights, offset, mode == "weight_only", act_fn, mode == "rotated")


@dataclass(frozen=True)
class BlockSparseInputs:
    """Seeded arguments of ``block_sparse_linear``."""

    x: Tensor
    weights: BlockSparseWeights
    bias: Tensor | None
    act_fn: str | None

    def args(self, x: Tensor | None = None, **others: Any) -> tuple[Any, ...]:
        """Arguments of ``torch.ops.lissom.block_sparse_linear``; ``others`` replace some by name."""
        w = self.weights
        values: dict[str, Any] = {
            "x": self.x if x is None else x,
            "values": w.values,
            "crow_indices": w.crow_indices,
            "col_indices": w.col_indices,
            "out_features": w.out_features,
            "in_features": w.in_features,
            "weight_scale": w.weight_scale,
            "bias": self.bias,
            "act_fn": self.act_fn,
            "packed": None,
            "validated": False,
            "backend": None,
        }
        assert others.keys() <= values.keys()
        return tuple({**values, **others}.values())

    @property
    def page(self) -> tuple[Tensor, BlockSparseWeights, Tensor | None, str | None]:
        """Arguments of the reference."""
        return self.x, self.weights, self.bias, self.act_fn

    @property
    def terms(self) -> int:
        """Summands of the output that has most."""
        counts = self.weights.crow_indices.diff()
        return int(counts.max()) * self.weights.block_shape[1] if len(counts) else 0


def block_sparse_weights(
    case: BlockSparseCase,
    block_shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> BlockSparseWeights:
    """Sound weights: random blocks; where there is room, a row of zeros and one whose every |q| is 127."""
    n, k = case.n, case.k
    height, width = block_shape
    generator = torch.Generator().manual_seed(seed * 7919 + n * 31 + k)
    weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.5
    if n > 2 and k:
        weight[1] = 0.0
        weight[n - 1] = torch.where(weight[n - 1] < 0, -2.0, 2.0)
    mask = torch.rand(-(-n // height), -(-k // width), generator=generator) < (case.keep or 0.0)
    if case.keep is None:
        mask[len(mask) // 2 :][:1] = True
    return formats.block_sparse_from_dense(weight, mask, block_shape, dtype)


def block_sparse_inputs(
    case: BlockSparseCase,
    block_shape: tuple[int, int],
    value_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    act_fn: str | None = None,
    *,
    bias: bool = True,
    seed: int = 0,
    kind: str | None = None,
) -> BlockSparseInputs:
    """Tensors for one case, block shape and dtypes of values and ``x``."""
    generator = torch.Generator().manual_seed(seed + 2)
    offset = torch.randn(case.n, generator=generator).to(dtype) if bias else None
    x = rows(case.m, case.k, dtype, seed=seed, kind=kind)
    weights = block_sparse_weights(case, block_shape, value_dtype, seed=seed + 1)
    return BlockSparseInputs(x, weights, offset, act_fn)


@dataclass(frozen=True)
class DistillInputs:
    """Seeded arguments of ``distill_loss``."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def distill_inputs(
    case: DistillCase,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    *,
    kind: str = "normal",
    ignored: bool = True,
    seed: int = 0,
) -> DistillInputs:
    """Logits of one of ``DISTILL_KINDS``; every fourth label is -100 where ``ignored``.

    ``close``: teacher and student differ by a tenth; ``one_hot``: the teacher's logits are 0 but for one of
    1e4; ``extreme``: every logit is near 1e4, 0 or -1e4; ``peaked``: a few large logits, as trained models
    have it; ``masked_both``: a third of both is -inf; ``masked_teacher``: of the teacher's only;
    ``offset``: a large constant in each row. Labels are never masked.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + case.rows * 31 + case.vocab)
    shape = (case.rows, case.vocab)
    student = torch.randn(shape, generator=generator) * 2
    teacher = torch.randn(shape, generator=generator) * 2
    labels = torch.randint(case.vocab, (case.rows,), generator=generator)
    if kind == "close":
        teacher = student + teacher / 20
    elif kind == "equal":
        teacher = student.clone()
    elif kind == "one_hot":
        teacher = torch.zeros(shape).scatter_(1, labels[:, None], 1e4)
    elif kind == "extreme":
        student += torch.randint(-1, 2, shape, generator=generator) * 1e4
        teacher += torch.randint(-1, 2, shape, generator=generator) * 1e4
    elif kind == "peaked":
        peaks = (torch.rand(shape, generator=generator) < 5 / case.vocab) * 10.0
        student, teacher = student + peaks, teacher + peaks
    elif kind in ("masked_both", "masked_teacher"):
        masked = torch.rand(shape, generator=generator) < 1 / 3
        masked.scatter_(1, labels[:, None], False)
        teacher = teacher.masked_fill(masked, -torch.inf)
        if kind == "masked_both":
            student = student.masked_fill(masked, -torch.inf)
    elif kind == "offset":
        student, teacher = student + 100, teacher - 300
    elif kind != "normal":
        raise ValueError(f"distill_inputs: kind={kind!r} is unknown; use one of {DISTILL_KINDS}")
    if ignored:
        labels[3::4] = -100
    return DistillInputs(student.to(dtype), teacher.to(teacher_dtype or dtype), labels)


# ------------------------------------------------------------------------------------------- implementations

ALL_ISAS = ("scalar", "avx2", "avx512vnni")
"""Instruction sets with CPU kernels, worst first."""

IMPLEMENTATIONS = ("reference", *(f"native-{isa}" for isa in ALL_ISAS))
"""Everything that can answer an op on CPU tensors."""


def backends(op: str, device: str = "cpu") -> list[str]:
    """Backends of ``op`` that this machine can run, best first."""
    return [
        row["backend"]
        for row in registry.backend_info()
        if (row["op"], row["device"]) == (op, device) and row["status"] != "unavailable"
    ]


def isas() -> list[str]:
    """Instruction sets that were built and that this CPU runs, worst first; empty without the extension."""
    if _native.unavailable_reason():
        return []
    runs = _native.isas()
    return [isa for isa in ALL_ISAS if runs.get(isa)]


def why_not(implementation: str) -> str:
    """Why ``implementation`` (one of ``IMPLEMENTATIONS``) cannot run here, or ``""``."""
    if implementation == registry.REFERENCE:
        return ""
    if reason := _native.unavailable_reason():
        return reason
    isa = implementation.removeprefix("native-")
    built = _native.isas()
    if isa not in built:
        return f"the extension was built without {isa}"
    return "" if built[isa] else f"this CPU does not run {isa}"


def implementations() -> list[str]:
    """Those of ``IMPLEMENTATIONS`` that can run here."""
    return [name for name in IMPLEMENTATIONS if not why_not(name)]


@contextlib.contextmanager
def force_isa(isa: str) -> Iterator[None]:
    """Let the native kernels use ``isa`` inside the block; ValueError where this CPU lacks it."""
    module = _native.load()
    before = module.active_isa()
    module.select_isa(isa)
    try:
        assert module.active_isa() == isa
        yield
    finally:
        module.select_isa(before)


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Let ``implementation`` answer every op in the block, by ``LISSOM_BACKEND`` and ``force_isa``."""
    before = os.environ.get("LISSOM_BACKEND")
    backend, _, isa = implementation.partition("-")
    os.environ["LISSOM_BACKEND"] = backend
    try:
        with force_isa(isa) if isa else contextlib.nullcontext():
            yield
    finally:
        if before is None:
            del os.environ["LISSOM_BACKEND"]
        else:
            os.environ["LISSOM_BACKEND"] = before
