"""Many rows, weight-only: weights are made dense for the call, and multiplied by torch's product (cuBLAS).

A dense copy is written once for all rows, and read back; after that every product has the tensor cores' full
rate, which kernels that unpack on the way do not reach. Each weight is rounded once to x's type, as
``formats.dequantize_int4(weights, x.dtype)`` does; an activation function is applied to outputs in that type.
The copy has a bound, beyond which outputs are computed in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import activate
from .tiles import Compilation, Tile, ceil_div, launch, power_of_two

__all__ = [
    "MOST_BYTES",
    "activate_",
    "compilations",
    "dense_int4",
    "dense_int8",
    "outputs_at_a_time",
    "product",
]

MOST_BYTES = 512 << 20
"""Of dense weights at a time: the outputs are cut where there are more."""


def outputs_at_a_time(n: int, row_bytes: int) -> int:
    """Of ``n`` outputs, with as much of dense weights each: even parts, as few as MOST_BYTES allows."""
    return ceil_div(n, ceil_div(n, max(1, MOST_BYTES // row_bytes)))


def product(
    x: Tensor,
    n: int,
    dense: Callable[[int, int, Tensor], None],
    bias: Tensor | None,
    act_fn: str | None,
    out: Tensor,
) -> None:
    """``out`` [M, N] = act(x · Wᵀ + bias).

    Args:
        x: [M, K], rows dense.
        dense: ``dense(first, last, w)`` writes weights of outputs ``first`` … ``last - 1`` to ``w``.
        out: dense, of x's type.
    """
    k = x.shape[1]
    width = ceil_div(max(k, 1), 8) * 8  # rows of weights start at multiples of 16 bytes
    part = outputs_at_a_time(n, width * x.element_size())
    buffer = torch.empty((min(part, n), width), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, n, part):
        last = min(first + part, n)
        w = buffer[: last - first, :k]
        dense(first, last, w)
        if bias is None:
            torch.mm(x, w.t(), out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], x, w.t(), out=out[:, first:last])
    if act_fn is not None:
        activate_(out, act_fn)


# ------------------------------------------------------------------------------------------- kernels


@triton.jit
def activate_kernel(y, count, ACT_FN: tl.constexpr, BLOCK: tl.constexpr):
    """An activation function of ``count`` neighbours, in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, activate(value, ACT_FN).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def dense_int8_kernel(
    qweight, weight_scale, w, N, K, weight_stride, w_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """w[n, k] = qweight[n, k] * weight_scale[n], rounded once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < K)[None, :]
    q = tl.load(qweight + row.to(tl.int64)[:, None] * weight_stride + column[None, :], mask=inside, other=0)
    scale = tl.load(weight_scale + row, mask=row < N, other=0.0)
    value = q.to(tl.float32) * scale[:, None]
    tl.store(
        w + row.to(tl.int64)[:, None] * w_stride + column[None, :], value.to(w.dtype.element_ty), mask=inside
    )


@triton.jit
def dense_int4_kernel(
    qweight,
    weight_scale,
    zero_point,
    codebook,
    w,
    N,
    K,
    code_stride,
    groups,
    table_row,
    table_group,
    w_stride,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """w[n, k] = fma(q - 8, s, s * (8 - zero_point)), or table[q] * s, rounded once; K is even.

    A program has SEGMENTS segments of ROWS outputs: codes [ROWS, SEGMENTS, SEGMENT / 2], terms one for each.
    """
    BYTES: tl.constexpr = SEGMENT // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)
    byte = segment[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    output = tl.minimum(row, N - 1).to(tl.int64)
    codes = tl.load(
        qweight + output[:, None, None] * code_stride + byte[None, :, :],
        mask=(byte < K // 2)[None, :, :],
        other=0,
    )
    group = segment * 0 if ONE_GROUP else segment
    at = output[:, None] * groups + group[None, :]
    scale = tl.load(weight_scale + at, mask=(group < groups)[None, :], other=0.0).to(tl.float32)
    if TABLE:
        table = codebook + output[:, None] * table_row + group[None, :] * table_group
        table = tl.where((group < groups)[None, :], table, codebook)[:, :, None]
        low = tl.load(table + (codes & 15).to(tl.int32)) * scale[:, :, None]
        high = tl.load(table + (codes >> 4).to(tl.int32)) * scale[:, :, None]
    else:
        offset = tl.zeros(scale.shape, tl.float32)
        if ZERO:
            zero = tl.load(zero_point + at, mask=(group < groups)[None, :], other=0).to(tl.float32)
            offset = scale * (8.0 - zero)
        scales = tl.broadcast_to(scale[:, :, None], codes.shape)
        offsets = tl.broadcast_to(offset[:, :, None], codes.shape)
        low = tl.fma((codes & 15).to(tl.float32) - 8.0, scales, offsets)
        high = tl.fma((codes >> 4).to(tl.float32) - 8.0, scales, offsets)
    kind: tl.constexpr = w.dtype.element_ty
    values = tl.reshape(tl.join(low.to(kind), high.to(kind)), (ROWS, SEGMENTS * SEGMENT))
    column = tl.program_id(1) * (SEGMENTS * SEGMENT) + tl.arange(0, SEGMENTS * SEGMENT)
    inside = (row < N)[:, None] & (column < K)[None, :]
    tl.store(w + row.to(tl.int64)[:, None] * w_stride + column[None, :], values, mask=inside)


# ------------------------------------------------------------------------------------------- launching

ELEMENTS = 4096
"""Of a program of 4 warps: 16 bytes of codes a thread, or two times as much of int8."""


def activate_(y: Tensor, act_fn: str) -> None:
    """``y`` = act_fn(y), in place; dense, on the current GPU."""
    if y.numel():
        launch(
            activate_kernel,
            (ceil_div(y.numel(), ELEMENTS),),
            y,
            y.numel(),
            ACT_FN=act_fn,
            BLOCK=ELEMENTS,
            enable_fp_fusion=False,
            num_warps=4,
        )


def _int8_tile(k: int) -> Tile:
    columns = min(1024, max(16, power_of_two(k)))
    return Tile({"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns}, num_warps=4, num_stages=1)


def dense_int8(qweight: Tensor, weight_scale: Tensor, w: Tensor) -> None:
    """``qweight`` int8 [N, K] with dense rows, ``weight_scale`` float32 [N], dense → ``w`` [N, K]."""
    n, k = w.shape
    tile = _int8_tile(k)
    if w.numel():
        launch(
            dense_int8_kernel,
            (ceil_div(n, tile.sizes["ROWS"]), ceil_div(k, tile.sizes["COLUMNS"])),
            qweight,
            weight_scale,
            w,
            n,
            k,
            qweight.stride(0),
            w.stride(0),
            **tile.options(),
        )


def _int4_tile(k: int, segment: int) -> Tile:
    segments = power_of_two(ceil_div(min(1024, max(k, 1)), segment))
    rows = max(1, ELEMENTS // (segments * segment))
    return Tile({"ROWS": rows, "SEGMENTS": segments}, num_warps=4, num_stages=1)


def dense_int4(
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    codebook: Tensor | None,
    table_strides: tuple[int, int],
    segment: int,
    one_group: bool,
    w: Tensor,
) -> None:
    """Canonical codes [N, K/2] with dense rows, and terms, dense → ``w`` [N, K]; K is even.

    Args:
        table_strides: from an output's table to the next, and from a group's.
        segment: columns that share terms: 32, 64 or 128.
        one_group: all of a row's columns share them.
    """
    n, k = w.shape
    tile = _int4_tile(k, segment)
    if w.numel():
        columns = tile.sizes["SEGMENTS"] * segment
        launch(
            dense_int4_kernel,
            (ceil_div(n, tile.sizes["ROWS"]), ceil_div(k, columns)),
            qweight,
            weight_scale,
            weight_scale if zero_point is None else zero_point,
            weight_scale if codebook is None else codebook,
            w,
            n,
            k,
            qweight.stride(0),
            weight_scale.shape[1],
            *table_strides,
            w.stride(0),
            ZERO=zero_point is not None,
            TABLE=codebook is not None,
            ONE_GROUP=one_group,
            SEGMENT=segment,
            enable_fp_fusion=False,  # the page rounds s * (8 - zero_point)
            **tile.options(),
        )


# ------------------------------------------------------------------------------------------- compiling


def compilations() -> Iterable[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles."""
    sizes = ("N", "K", "weight_stride", "code_stride", "w_stride", "groups", "table_row", "table_group")
    types = {"qweight": "*u8", "weight_scale": "*fp16", "codebook": "*fp32", **dict.fromkeys(sizes, "i32")}

    def one(
        name: str, kernel: Any, given: dict[str, str], constants: dict[str, object], tile: Tile
    ) -> Compilation:
        all_types = {**types, **given}
        arguments = [a for a in kernel.arg_names if a not in {**constants, **tile.sizes}]
        aligned = [a for a in arguments if a not in ("N", "groups")]
        return Compilation(
            f"dequantized {name}",
            kernel,
            {a: all_types[a] for a in arguments},
            constants,
            tile,
            aligned=aligned,
            fp_fusion=False,
        )

    for kind, zero, table, segment, one_group in (
        ("*bf16", "*fp16", False, 128, False),
        ("*fp16", "*u8", False, 32, False),
        ("*bf16", None, False, 128, True),
        ("*bf16", None, True, 64, False),
    ):
        yield one(
            f"int4 {kind[1:]} zero={zero} table={table} segment={segment}",
            dense_int4_kernel,
            {"zero_point": zero or "*fp16", "w": kind},
            {"ZERO": zero is not None, "TABLE": table, "ONE_GROUP": one_group, "SEGMENT": segment},
            _int4_tile(4096, segment),
        )
    int8 = {"qweight": "*i8", "weight_scale": "*fp32", "w": "*bf16"}
    yield one("int8 bf16", dense_int8_kernel, int8, {}, _int8_tile(4096))
    yield one(
        "activate bf16",
        activate_kernel,
        {"y": "*bf16", "count": "i64"},
        {"ACT_FN": "gelu", "BLOCK": ELEMENTS},
        Tile({}, num_warps=4),
    )
