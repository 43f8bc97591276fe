"""``int8_linear``: rows quantized, int8 tensor cores, one fused epilogue. Page: ``reference/int8_linear.py``.

Four forms; the first three sum exact integers, and so give the reference's bits:

- *fused* (a few rows): every program finds the scales of the rows anew, which is cheaper than another
  launch, and streams its share of the weight once.
- *tiles*: ``quantize_kernel`` writes the rows as int8, ``tile_kernel`` multiplies them. Where tiles are too
  few for the GPU, K is split: programs leave int32 partial sums, and the last to arrive at a tile adds them
  up and finishes it. ``quantize_kernel`` zeroes the counters of arrivals, so that this costs no launch.
- *persistent* (many rows, sm_90 and up): one program per multiprocessor takes tile after tile, fed by TMA.
- *weight-only*: float activations times int8 converted on the way; long dot products split as above, partial
  sums added in the order of K, so that bits do not depend on who comes last. Many rows of 16 bits are
  multiplied by dense weights that are made for the call (``dequantized.py``): there each weight is rounded
  once to x's type.

The canonical weight ``[N, K]`` is read as it is: K runs along memory, as int8 tensor cores want both of their
operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lissom._counters import counters as arrival_counters

from .dequantized import dense_int8, product
from .numerics import activate, constant, divide, round_half_even
from .tiles import Compilation, Tile, architecture, ceil_div, launch, on_device, pick, power_of_two

__all__ = ["Plan", "candidates", "compilations", "int8_linear"]

INFINITY_BITS = tl.constexpr(0x7F800000)
GROUP = tl.constexpr(8)  # tile rows whose tiles follow each other: weights and activations meet again in L2
ROTATION = tl.constexpr(16)
LEAST_ROWS = tl.constexpr(16)  # of a tensor core's tile


# ------------------------------------------------------------------------------------------- activations


@triton.jit
def rotate(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``formats.rotate(x, 1/16)``: butterflies over distance 1, 2, 4, 8 in every 16 columns.

    Each pass takes pairs off the last axis and puts their sums and differences at the front of the 16, so
    that the next distance comes last; after four passes all are back in place.
    """
    x = x * 0.0625
    for _ in tl.static_range(4):
        a, b = tl.split(tl.reshape(x, (ROWS * COLUMNS // ROTATION, ROTATION // 2, 2)))
        x = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def load_rows(x, row, column, M, K, row_stride, ROTATED: tl.constexpr):
    """x[row, column] as float32, rotated; 0 outside. ``column`` starts at a multiple of 16."""
    inside = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if ROTATED:
        whole = K // ROTATION * ROTATION  # a shorter last block stays as it is
        value = tl.where((column < whole)[None, :], rotate(value, value.shape[0], value.shape[1]), value)
    return value


@triton.jit
def magnitude(x):
    """|x| as integers in the same order, NaN above infinity: no maximum lets NaN slip through."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def rates(top, input_scale, STATIC: tl.constexpr):
    """From the largest magnitude of each row: (what rows are multiplied with, scale, all finite)."""
    finite = top < INFINITY_BITS
    absmax = top.to(tl.float32, bitcast=True)
    if STATIC:
        scale = constant(absmax, 0.0) + tl.load(input_scale)
        inverse = divide(constant(absmax, 1.0), scale)
    else:
        inverse = divide(constant(absmax, 127.0), absmax)
        usable = finite & (magnitude(inverse) < INFINITY_BITS)
        scale = tl.where(usable, divide(absmax, constant(absmax, 127.0)), 0.0)
        inverse = tl.where(usable, inverse, 0.0)
    return inverse, tl.where(finite, scale, float("nan")), finite


@triton.jit
def quantize(value, inverse, finite, STATIC: tl.constexpr):
    scaled = value * inverse[:, None]
    if STATIC:
        scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
    return tl.where(finite[:, None], round_half_even(scaled), 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["M", "count"])
def quantize_kernel(
    x,
    input_scale,
    q,
    scale,
    counters,
    M,
    K,
    row_stride,
    width,
    count,
    STATIC: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows of x to int8 [M, width], zero past K, and their scales; ``count`` counters to 0.

    WHOLE: a row fits BLOCK_COLUMNS and stays in registers; otherwise it is read twice.
    """
    program = tl.program_id(0)
    for start in range(program * 128, count, tl.num_programs(0) * 128):
        place = start + tl.arange(0, 128)
        tl.store(counters + place, tl.zeros((128,), tl.int32), mask=place < count)

    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    at = q + row.to(tl.int64)[:, None] * width + column[None, :]
    if WHOLE:
        value = load_rows(x, row, column, M, K, row_stride, ROTATED)
        inverse, row_scale, finite = rates(tl.max(magnitude(value), 1), input_scale, STATIC)
        inside = (row < M)[:, None] & (column < width)[None, :]
        tl.store(at, quantize(value, inverse, finite, STATIC), mask=inside)
    else:
        top = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        for start in range(0, K, BLOCK_COLUMNS):
            value = load_rows(x, row, start + column, M, K, row_stride, ROTATED)
            top = tl.maximum(top, magnitude(value))
        inverse, row_scale, finite = rates(tl.max(top, 1), input_scale, STATIC)
        for start in range(0, width, BLOCK_COLUMNS):
            value = load_rows(x, row, start + column, M, K, row_stride, ROTATED)
            inside = (row < M)[:, None] & (start + column < width)[None, :]
            tl.store(at + start, quantize(value, inverse, finite, STATIC), mask=inside)
    tl.store(scale + row, row_scale, mask=row < M)


# ------------------------------------------------------------------------------------------- products


@triton.jit
def finish_piece(
    total,
    row,
    start,
    x_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
):
    column = start + tl.arange(0, total.shape[1])
    w = tl.load(weight_scale + column, mask=column < N, other=0.0)
    scale = x_scale[:, None] * w[None, :]
    offset = tl.zeros(total.shape, tl.float32)
    if BIAS:
        offset += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y = activate(tl.fma(total.to(tl.float32), scale, offset), ACT_FN)
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def halves(total):
    """Left and right half of the columns."""
    half: tl.constexpr = total.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def finish_2(
    total,
    row,
    start,
    x_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    PIECE: tl.constexpr,
):
    """``finish`` for up to 2 pieces; Triton 3.4 has no recursion."""
    if total.shape[1] > PIECE:
        left, right = halves(total)
        middle = start + left.shape[1]
        finish_piece(left, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN)
        finish_piece(right, row, middle, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN)
    else:
        finish_piece(total, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit
def finish_4(
    total,
    row,
    start,
    x_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    PIECE: tl.constexpr,
):
    """``finish`` for up to 4 pieces."""
    if total.shape[1] > PIECE:
        left, right = halves(total)
        middle = start + left.shape[1]
        finish_2(left, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)
        finish_2(right, row, middle, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)
    else:
        finish_piece(total, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit
def finish(
    total,
    row,
    start,
    x_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Epilogue of int32 sums [rows, columns from ``start``], where ``x_scale`` is a value per row.

    Up to 8 pieces of PIECE columns, one at a time: registers hold the sums of a large tile, and little else.
    """
    if total.shape[1] > PIECE:
        left, right = halves(total)
        middle = start + left.shape[1]
        finish_4(left, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)
        finish_4(right, row, middle, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)
    else:
        finish_piece(total, row, start, x_scale, weight_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit
def finish_transposed(
    total,
    first,
    start,
    weight_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Epilogue of float32 sums [columns from ``start``, rows from ``first``]; PIECE rows at a time, twice."""
    if total.shape[1] > PIECE:
        one, other = halves(total)
        row = first + tl.arange(0, one.shape[1])
        ones = tl.full((one.shape[1],), 1.0, tl.float32)
        finish_piece(one.T, row, start, ones, weight_scale, bias, out, M, N, BIAS, ACT_FN)
        row += one.shape[1]
        finish_piece(other.T, row, start, ones, weight_scale, bias, out, M, N, BIAS, ACT_FN)
    else:
        row = first + tl.arange(0, total.shape[1])
        ones = tl.full((total.shape[1],), 1.0, tl.float32)
        finish_piece(total.T, row, start, ones, weight_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of a tile: GROUP tile rows at a time, column by column."""
    across = tl.cdiv(N, BLOCK_N)
    down = tl.cdiv(M, BLOCK_M)
    first = tile // (across * GROUP) * GROUP
    height = tl.minimum(down - first, GROUP)
    rest = tile % (across * GROUP)
    return first + rest % height, rest // height


@triton.jit
def arrive(counter, splits):
    """Whether this program is the last of ``splits``; what all others stored before is then visible to it."""
    tl.debug_barrier()  # all threads have stored before one of them counts
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(counter, 0)  # ready for another launch
    return last


@triton.jit(do_not_specialize=["M", "splits", "steps"])
def tile_kernel(
    q,
    x_scale,
    qweight,
    weight_scale,
    bias,
    out,
    partial,
    counters,
    M,
    N,
    K,
    width,
    weight_stride,
    splits,
    steps,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One tile of the output, or with SPLIT the share of it that ``steps`` blocks of K give.

    EVEN: K is a multiple of BLOCK_K.
    """
    tile = tl.program_id(0)
    tile_row, tile_column = place(tile, M, N, BLOCK_M, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # Past the edge the last row is read again: no mask, and nothing of it is stored.
    a_at = q + tl.minimum(row, M - 1).to(tl.int64)[:, None] * width + k[None, :]
    b_at = qweight + tl.minimum(column, N - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        if EVEN:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            inside = (step * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            a = tl.load(a_at, mask=inside, other=0)
            b = tl.load(b_at, mask=inside, other=0)
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if SPLIT:
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine = partial + tile * splits * (BLOCK_M * BLOCK_N) + inner
        used = (row < M)[:, None] & (column < N)[None, :]
        tl.store(mine + tl.program_id(1) * (BLOCK_M * BLOCK_N), total, mask=used)
        if arrive(counters + tile, splits):
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            for part in range(splits):
                at = mine + part * (BLOCK_M * BLOCK_N)
                total += tl.load(at, mask=used, other=0, cache_modifier=".cg")
            scale = tl.load(x_scale + row, mask=row < M, other=0.0)
            finish(
                total, row, tile_column * BLOCK_N, scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE
            )
    else:
        scale = tl.load(x_scale + row, mask=row < M, other=0.0)
        finish(total, row, tile_column * BLOCK_N, scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
    q,
    x_scale,
    qweight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Tiles program_id, program_id + programs, …; ``q`` and ``qweight`` are tensor descriptors, zero outside.

    FLAT: loads of the next tile are under way during the epilogue; the price is a wait in every step.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        tile_row, tile_column = place(tile, M, N, BLOCK_M, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            a = q.load([tile_row * BLOCK_M, step * BLOCK_K])
            b = qweight.load([tile_column * BLOCK_N, step * BLOCK_K])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
        scale = tl.load(x_scale + row, mask=row < M, other=0.0)
        finish(total, row, tile_column * BLOCK_N, scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, PIECE)


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
    x,
    input_scale,
    qweight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    row_stride,
    weight_stride,
    STATIC: tl.constexpr,
    ROTATED: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of x, at most ROWS (a power of two up to 16) rows, times BLOCK_N rows of the weight.

    WIDE columns at a time for the rows' maxima, in one go where they fit: what is waited for is one load.
    Each row fills 16 / ROWS rows of the tensor core's tile, so that no row is quantized sixteen times.
    """
    row = tl.arange(0, ROWS)
    top = tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, WIDE):
        value = load_rows(x, row, start + tl.arange(0, WIDE), M, K, row_stride, ROTATED)
        top = tl.maximum(top, tl.max(magnitude(value), 1))
    inverse, scale, finite = rates(top, input_scale, STATIC)

    copies: tl.constexpr = LEAST_ROWS // ROWS
    first = tl.program_id(0) * BLOCK_N
    column = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    b_at = qweight + column.to(tl.int64)[:, None] * weight_stride + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((LEAST_ROWS, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = quantize(load_rows(x, row, k, M, K, row_stride, ROTATED), inverse, finite, STATIC)
        a = tl.reshape(tl.broadcast_to(a[:, None, :], (ROWS, copies, BLOCK_K)), (LEAST_ROWS, BLOCK_K))
        b = tl.load(b_at) if EVEN else tl.load(b_at, mask=(k < K)[None, :], other=0)
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        b_at += BLOCK_K
    place = tl.arange(0, LEAST_ROWS)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (ROWS, copies)), (LEAST_ROWS,))
    out_row = tl.where(place % copies == 0, place // copies, M)  # of the copies, the first is stored
    finish(total, out_row, first, scale, weight_scale, bias, out, M, N, BIAS, ACT_FN, BLOCK_N)


# ------------------------------------------------------------------------------------------- weight-only


@triton.jit(do_not_specialize=["M", "splits", "steps"])
def weight_only_kernel(
    x,
    qweight,
    weight_scale,
    bias,
    out,
    partial,
    counters,
    M,
    N,
    K,
    row_stride,
    weight_stride,
    splits,
    steps,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the output as ``tile_kernel`` has it; every int8 is a number of x's type.

    Computed as W · xᵀ: wgmma takes its first operand from registers, where the converted weights are.
    """
    tile = tl.program_id(0)
    tile_row, tile_column = place(tile, M, N, BLOCK_M, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    a_at = qweight + tl.minimum(column, N - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
    b_at = x + tl.minimum(row, M - 1).to(tl.int64)[:, None] * row_stride + k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        if EVEN:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            inside = (step * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            a = tl.load(a_at, mask=inside, other=0)
            b = tl.load(b_at, mask=inside, other=0.0)
        a = a.to(tl.float32).to(x.dtype.element_ty)
        total = tl.dot(a, b.T, total, input_precision="ieee")
        a_at += BLOCK_K
        b_at += BLOCK_K
    if SPLIT:
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = partial + tile * splits * (BLOCK_M * BLOCK_N) + inner
        used = (column < N)[:, None] & (row < M)[None, :]
        tl.store(mine + tl.program_id(1) * (BLOCK_M * BLOCK_N), total, mask=used)
        if arrive(counters + tile, splits):
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in range(splits):  # in the order of K, whoever comes last
                at = mine + part * (BLOCK_M * BLOCK_N)
                total += tl.load(at, mask=used, other=0.0, cache_modifier=".cg")
            finish_transposed(
                total,
                tile_row * BLOCK_M,
                tile_column * BLOCK_N,
                weight_scale,
                bias,
                out,
                M,
                N,
                BIAS,
                ACT_FN,
                64,
            )
    else:
        finish_transposed(
            total, tile_row * BLOCK_M, tile_column * BLOCK_N, weight_scale, bias, out, M, N, BIAS, ACT_FN, 64
        )


@triton.jit(do_not_specialize=["M"])
def weight_only_rows_kernel(
    x,
    qweight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    row_stride,
    weight_stride,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A few rows: no tile to fill, every weight is multiplied where its load leaves it."""
    row = tl.arange(0, ROWS)
    first = tl.program_id(0) * BLOCK_N
    column = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    w_at = qweight + column.to(tl.int64)[:, None] * weight_stride + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_at) if EVEN else tl.load(w_at, mask=(k < K)[None, :], other=0)
        value = load_rows(x, row, k, M, K, row_stride, False)
        total += w.to(tl.float32)[None, :, :] * value[:, None, :]
        w_at += BLOCK_K
    ones = tl.full((ROWS,), 1.0, tl.float32)
    finish(tl.sum(total, 2), row, first, ones, weight_scale, bias, out, M, N, BIAS, ACT_FN, BLOCK_N)


# ------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Plan(Tile):
    """How one call is computed: a form, its tile, and how many programs a multiprocessor is to be given."""

    form: str = "tiles"
    programs: int = 1

    def __str__(self) -> str:
        return f"{self.form} {super().__str__()}"


def _tiles(m: int, n: int, k: int, warps: int, stages: int, programs: int = 1, form: str = "tiles") -> Plan:
    return Plan({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages, form, programs)


def _persistent(m: int, n: int, k: int, warps: int, stages: int, flat: bool) -> Plan:
    return Plan(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "FLAT": flat}, warps, stages, form="persistent", programs=1
    )


def _rows(n: int, k: int, warps: int, stages: int, form: str) -> Plan:
    sizes = {"BLOCK_N": n, "BLOCK_K": k}
    if form == "weight_only_rows":  # a loop without a dot takes its stages from the source
        return Plan({**sizes, "STAGES": stages}, warps, 1, form)
    return Plan(sizes, warps, stages, form)


# Rows up to which a list of plans serves (0: any number), and the plans, best guess first. By count, not yet
# measured: 1 to 64 rows are bound by the weight's bytes, so a stage holds 16 KB of it, of which four are
# under way in each of two programs a multiprocessor; from then on by products: the larger the tile, the fewer
# bytes from L2 a product takes (128 x 256 feeds int8 wgmma at its peak with 48 bytes a cycle and
# multiprocessor, 128 x 128 with 64), as far as there are tiles enough (`_by_waves`). sm_100 multiplies int8
# by mma.sync in Triton 3.6. "compact" GPUs (sm_86, sm_89, sm_120) have 99 KB of shared memory.
_FUSED = [_rows(32, 512, 4, 4, "fused"), _rows(16, 512, 2, 4, "fused")]
_FUSED_4 = [_rows(32, 256, 4, 4, "fused"), _rows(16, 256, 2, 4, "fused")]
_SMALL = [_tiles(16, 64, 256, 4, 4, 2), _tiles(16, 128, 128, 4, 4, 2), _tiles(16, 32, 512, 4, 4, 2)]
_INT8: dict[str, dict[int, list[Plan]]] = {
    "ampere": {
        2: [*_FUSED, _SMALL[0]],
        4: [_SMALL[0], *_FUSED_4],
        16: _SMALL,
        64: [_tiles(64, 64, 128, 4, 4, 2), _tiles(32, 128, 128, 4, 4, 2)],
        256: [_tiles(128, 128, 128, 8, 3), _tiles(64, 128, 128, 4, 4), _tiles(64, 64, 128, 4, 4)],
        0: [_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 128, 8, 3), _tiles(64, 128, 128, 4, 4)],
    },
    "compact": {
        2: [*_FUSED, _SMALL[0]],
        4: [_SMALL[0], *_FUSED_4],
        16: _SMALL,
        64: [_tiles(64, 64, 128, 4, 4), _tiles(32, 64, 128, 4, 4, 2)],
        256: [_tiles(128, 128, 64, 8, 4), _tiles(64, 64, 128, 4, 4)],
        0: [_tiles(128, 128, 64, 8, 4), _tiles(64, 128, 64, 4, 4)],
    },
    "hopper": {
        2: [*_FUSED, _SMALL[0]],
        4: [_SMALL[0], *_FUSED_4],
        16: _SMALL,
        64: [_tiles(64, 128, 128, 4, 4, 2), _tiles(64, 64, 256, 4, 3, 2)],
        256: [_tiles(128, 128, 128, 8, 4), _tiles(64, 128, 128, 4, 4), _tiles(64, 256, 128, 8, 4)],
        0: [
            _persistent(128, 256, 128, 8, 4, True),
            _persistent(128, 256, 128, 8, 4, False),
            _persistent(128, 128, 128, 8, 4, True),
            _tiles(128, 256, 128, 8, 3),
            _tiles(128, 128, 128, 8, 4),
            _tiles(64, 128, 128, 4, 4),
        ],
    },
    "blackwell": {
        2: [*_FUSED, _SMALL[0]],
        4: [_SMALL[0], *_FUSED_4],
        16: _SMALL,
        64: [_tiles(64, 64, 128, 4, 4, 2), _tiles(32, 128, 128, 4, 4, 2)],
        256: [_tiles(128, 128, 128, 8, 4), _tiles(64, 128, 128, 4, 4), _tiles(64, 64, 128, 4, 4)],
        0: [
            _persistent(128, 128, 128, 8, 4, True),
            _tiles(128, 256, 64, 8, 4),
            _tiles(128, 128, 128, 8, 4),
            _tiles(64, 128, 128, 4, 4),
        ],
    },
}
_INT8_UNALIGNED: dict[int, list[Plan]] = {  # bytes are loaded one by one
    2: _FUSED,
    4: _FUSED_4,
    64: [_tiles(16, 64, 64, 4, 2, 2)],
    0: [_tiles(64, 64, 64, 8, 2)],
}


def _float(m: int, n: int, k: int, warps: int, stages: int, programs: int = 1) -> Plan:
    return _tiles(m, n, k, warps, stages, programs, "weight_only")


_WEIGHT_ONLY_ROWS = [_rows(16, 512, 4, 4, "weight_only_rows"), _rows(8, 1024, 4, 4, "weight_only_rows")]
_WEIGHT_ONLY_ROWS_4 = [_rows(8, 512, 8, 4, "weight_only_rows"), _rows(4, 512, 4, 4, "weight_only_rows")]
_WEIGHT_ONLY: dict[str, dict[int, list[Plan]]] = {
    "half": {
        1: _WEIGHT_ONLY_ROWS,
        4: [_float(16, 64, 128, 4, 4, 2), *_WEIGHT_ONLY_ROWS_4],
        16: [_float(16, 64, 128, 4, 4, 2), _float(16, 128, 64, 4, 4, 2)],
        64: [_float(64, 64, 64, 4, 4, 2), _float(64, 128, 64, 8, 4, 2)],
        256: [_float(128, 128, 64, 8, 4), _float(64, 128, 64, 8, 4), _float(64, 64, 64, 4, 4)],
        0: [_float(128, 128, 64, 8, 4), _float(64, 128, 64, 8, 4)],
    },
    # 99 KB of shared memory: Triton 3.4 takes 128 KB for 128 x 128 where K is split.
    "half compact": {
        1: _WEIGHT_ONLY_ROWS,
        4: [_float(16, 64, 128, 4, 4, 2), *_WEIGHT_ONLY_ROWS_4],
        16: [_float(16, 64, 128, 4, 4, 2), _float(16, 128, 64, 4, 4, 2)],
        64: [_float(64, 64, 64, 4, 4, 2), _float(64, 128, 64, 8, 3, 2)],
        256: [_float(64, 128, 64, 8, 3), _float(64, 64, 64, 4, 4)],
        0: [_float(128, 128, 64, 8, 3), _float(64, 128, 64, 8, 3)],
    },
    # float32 products on the ordinary cores: tensor cores would round x to TF32.
    "float": {
        4: _WEIGHT_ONLY_ROWS_4,
        16: [_float(16, 64, 64, 4, 4, 2), _float(16, 32, 64, 4, 4, 4)],
        64: [_float(64, 64, 32, 8, 4, 2), _float(32, 64, 32, 8, 4, 2)],
        0: [_float(128, 64, 32, 8, 3, 2), _float(64, 64, 32, 4, 3, 2)],
    },
    # Triton 3.6 compiles a float32 product of 64 or more rows for sm_100 as TF32, whatever precision is asked
    # for (triton-lang/triton#10176); 32 rows are too few for tcgen05.
    "float blackwell": {
        4: _WEIGHT_ONLY_ROWS_4,
        16: [_float(16, 32, 64, 4, 4, 4)],
        0: [_float(128, 32, 32, 8, 3, 2), _float(64, 32, 32, 4, 3, 2)],
    },
    "unaligned": {  # bytes of the weight are loaded one by one
        4: _WEIGHT_ONLY_ROWS_4,
        64: [_float(16, 32, 64, 4, 2, 2)],
        0: [_float(64, 32, 32, 8, 2)],
    },
}


DENSE = Plan({}, form="weight_only_dense")

LEAST_DENSE_ROWS = 257
"""From which weight-only products of 16 bits are by dense weights. On an H200 (bench/results/gpu-
nvidia-h200-int4.md) they take 0.7 to 0.8 of the converting kernels' time at 1024 rows, 0.6 to 0.7 at
4096; at 257 rows about what those take at 256."""


def _family(architecture: int) -> str:
    if architecture in (86, 89) or architecture >= 120:
        return "compact"
    return "blackwell" if architecture >= 100 else "hopper" if architecture >= 90 else "ampere"


def _at_rows(table: dict[int, list[Plan]], m: int) -> list[Plan]:
    return next(plans for most, plans in table.items() if m <= most or most == 0)


@lru_cache(maxsize=1024)
def candidates(
    architecture: int,
    multiprocessors: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    weight_only: bool,
    aligned: bool,
) -> tuple[Plan, ...]:
    """Plans for x [m, k] of ``dtype`` and n outputs, best guess first.

    Args:
        aligned: whether rows of the weight start at multiples of 16 bytes: for TMA, and for loads of 16.
    """
    family = _family(architecture)
    if weight_only and aligned:
        plans = _at_rows(_WEIGHT_ONLY[_weight_only_list(dtype, family)], m)
    elif weight_only:
        plans = _at_rows(_WEIGHT_ONLY["unaligned"], m)
    else:
        plans = _at_rows(_INT8[family] if aligned else _INT8_UNALIGNED, m)
    dense = weight_only and dtype != torch.float32 and m >= LEAST_DENSE_ROWS
    first = [DENSE] if dense else []
    return *first, *(_by_waves(plans, multiprocessors, m, n, k) if m > 64 else plans)


def _weight_only_list(dtype: torch.dtype, family: str) -> str:
    if dtype == torch.float32:
        return "float blackwell" if family == "blackwell" else "float"
    return "half compact" if family == "compact" else "half"


def _by_waves(plans: Sequence[Plan], multiprocessors: int, m: int, n: int, k: int) -> list[Plan]:
    """Cheapest first: rounds that the tiles take over all multiprocessors, times the work of one.

    A tile's work is its products and, weighed as 64 of them, what it loads in every column of K.
    """

    def cost(plan: Plan) -> int:
        down, across = plan.sizes["BLOCK_M"], plan.sizes["BLOCK_N"]
        splits, steps = _splits(plan, multiprocessors, m, n, k)
        tiles = ceil_div(m, down) * ceil_div(n, across)
        return (
            ceil_div(tiles * splits, multiprocessors)
            * steps
            * plan.sizes["BLOCK_K"]
            * (down * across + 64 * (down + across))
        )

    return sorted(plans, key=cost)


LEAST_STEPS = 4
"""Blocks of K that are worth a program of its own: as many as its loads run ahead."""


def _splits(plan: Plan, multiprocessors: int, m: int, n: int, k: int) -> tuple[int, int]:
    """In how many parts K is cut, and how many blocks of it a part has."""
    steps = ceil_div(k, plan.sizes["BLOCK_K"])
    if plan.form == "persistent" or m > 256:
        return 1, steps
    tiles = ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(n, plan.sizes["BLOCK_N"])
    splits = max(1, min(plan.programs * multiprocessors // tiles, steps // LEAST_STEPS))
    part = max(1, ceil_div(steps, splits))
    return max(1, ceil_div(steps, part)), part


def _piece(dtype: torch.dtype, plan: Plan) -> int:
    """Columns of the epilogue's pieces: 128 bytes, a cache line of the output."""
    return min(128 // dtype.itemsize, plan.sizes["BLOCK_N"])


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True)
class _Call:
    rows: Tensor
    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    act_fn: str | None
    rotated: bool
    out: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return *self.out.shape, self.rows.shape[1]

    @property
    def epilogue(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight_scale, self.weight_scale if self.bias is None else self.bias, self.out

    def options(self, plan: Plan, **others: object) -> dict[str, object]:
        """Fusing a product and a sum that the reference rounds apart would change bits."""
        return {
            "BIAS": self.bias is not None,
            "ACT_FN": self.act_fn,
            "enable_fp_fusion": False,
            **others,
            **plan.options(),
        }


def _row_tile(k: int) -> Tile:
    columns = min(8192, max(16, power_of_two(k)))
    rows = max(1, min(16, 4096 // columns))
    sizes = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "WHOLE": k <= columns}
    return Tile(sizes, num_warps=4 if columns <= 4096 else 8, num_stages=1)


def _quantize(call: _Call, counters: Tensor | None) -> tuple[Tensor, Tensor]:
    m, _, k = call.sizes
    device = call.rows.device
    q = torch.empty((m, max(16, ceil_div(k, 16) * 16)), dtype=torch.int8, device=device)
    scale = torch.empty(m, dtype=torch.float32, device=device)
    tile = _row_tile(k)
    launch(
        quantize_kernel,
        (ceil_div(m, tile.sizes["BLOCK_ROWS"]),),
        call.rows,
        scale if call.input_scale is None else call.input_scale,
        q,
        scale,
        scale if counters is None else counters,
        m,
        k,
        call.rows.stride(0),
        q.stride(0),
        0 if counters is None else counters.numel(),
        STATIC=call.input_scale is not None,
        ROTATED=call.rotated,
        enable_fp_fusion=False,
        **tile.options(),
    )
    return q, scale


def _workspace(call: _Call, plan: Plan, splits: int, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """Partial sums, where K is split, and how many counters of arrivals there are to be."""
    if splits == 1:
        return None, 0
    m, n, _ = call.sizes
    tiles = ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(n, plan.sizes["BLOCK_N"])
    size = plan.sizes["BLOCK_M"] * plan.sizes["BLOCK_N"]
    return torch.empty(tiles * splits * size, dtype=dtype, device=call.rows.device), tiles


def _launch_tiles(call: _Call, plan: Plan) -> None:
    m, n, k = call.sizes
    splits, steps = _splits(plan, _multiprocessors(call.rows.device), m, n, k)
    partial, tiles = _workspace(call, plan, splits, torch.int32)
    counters = torch.empty(tiles, dtype=torch.int32, device=call.rows.device) if tiles else None
    q, scale = _quantize(call, counters)
    grid = (ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(n, plan.sizes["BLOCK_N"]), splits)
    launch(
        tile_kernel,
        grid,
        q,
        scale,
        call.qweight,
        *call.epilogue,
        partial if partial is not None else scale,
        counters if counters is not None else scale,
        m,
        n,
        k,
        q.stride(0),
        call.qweight.stride(0),
        splits,
        steps,
        SPLIT=splits > 1,
        EVEN=k % plan.sizes["BLOCK_K"] == 0,
        PIECE=_piece(call.out.dtype, plan),
        **call.options(plan),
    )


def _launch_persistent(call: _Call, plan: Plan) -> None:
    m, n, k = call.sizes
    q, scale = _quantize(call, None)
    down, across, block = (plan.sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = ceil_div(m, down) * ceil_div(n, across)
    launch(
        persistent_kernel,
        (min(tiles, plan.programs * _multiprocessors(call.rows.device)),),
        TensorDescriptor(q, [m, k], [q.stride(0), 1], [down, block]),
        scale,
        TensorDescriptor(call.qweight, [n, k], [call.qweight.stride(0), 1], [across, block]),
        *call.epilogue,
        m,
        n,
        k,
        PIECE=_piece(call.out.dtype, plan),
        **call.options(plan),
    )


def _launch_fused(call: _Call, plan: Plan) -> None:
    m, n, k = call.sizes
    rows = power_of_two(m)
    launch(
        fused_kernel,
        (ceil_div(n, plan.sizes["BLOCK_N"]),),
        call.rows,
        call.weight_scale if call.input_scale is None else call.input_scale,
        call.qweight,
        *call.epilogue,
        m,
        n,
        k,
        call.rows.stride(0),
        call.qweight.stride(0),
        STATIC=call.input_scale is not None,
        ROTATED=call.rotated,
        EVEN=k % plan.sizes["BLOCK_K"] == 0,
        ROWS=rows,
        WIDE=_wide(k, rows, plan),
        **call.options(plan),
    )


def _wide(k: int, rows: int, plan: Plan) -> int:
    """Columns of the maxima: a whole row, as far as 64 values a thread hold it (32 where rows are many)."""
    most = (2048 if rows <= 2 else 1024) * plan.num_warps // rows
    return min(most, max(16, power_of_two(k)))


def _launch_weight_only(call: _Call, plan: Plan) -> None:
    m, n, k = call.sizes
    splits, steps = _splits(plan, _multiprocessors(call.rows.device), m, n, k)
    partial, tiles = _workspace(call, plan, splits, torch.float32)
    counters = arrival_counters(call.rows, tiles) if tiles else None
    grid = (ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(n, plan.sizes["BLOCK_N"]), splits)
    launch(
        weight_only_kernel,
        grid,
        call.rows,
        call.qweight,
        *call.epilogue,
        partial if partial is not None else call.weight_scale,
        counters if counters is not None else call.weight_scale,
        m,
        n,
        k,
        call.rows.stride(0),
        call.qweight.stride(0),
        splits,
        steps,
        SPLIT=splits > 1,
        EVEN=k % plan.sizes["BLOCK_K"] == 0,
        **call.options(plan),
    )


def _launch_weight_only_rows(call: _Call, plan: Plan) -> None:
    m, n, k = call.sizes
    launch(
        weight_only_rows_kernel,
        (ceil_div(n, plan.sizes["BLOCK_N"]),),
        call.rows,
        call.qweight,
        *call.epilogue,
        m,
        n,
        k,
        call.rows.stride(0),
        call.qweight.stride(0),
        EVEN=k % plan.sizes["BLOCK_K"] == 0,
        ROWS=power_of_two(m),
        **call.options(plan),
    )


def _launch_dense(call: _Call, _: Plan) -> None:
    def dense(first: int, last: int, w: Tensor) -> None:
        dense_int8(call.qweight[first:last], call.weight_scale[first:last], w)

    product(call.rows, call.qweight.shape[0], dense, call.bias, call.act_fn, call.out)


_FORMS: dict[str, Callable[[_Call, Plan], None]] = {
    "weight_only_dense": _launch_dense,
    "fused": _launch_fused,
    "tiles": _launch_tiles,
    "persistent": _launch_persistent,
    "weight_only": _launch_weight_only,
    "weight_only_rows": _launch_weight_only_rows,
}


def int8_linear(
    rows: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    rotated: bool,
    plan: Plan | None = None,
) -> Tensor:
    """``rows`` [M, K] with dense rows, ``qweight`` int8 [N, K] of any strides, … → [M, N].

    Args:
        plan: one of :func:`candidates`; None chooses.
    """
    (m, k), n, device = rows.shape, qweight.shape[0], rows.device
    out = torch.empty((m, n), dtype=rows.dtype, device=device)
    if out.numel() == 0:
        return out
    if (qweight.stride(1) != 1 and k > 1) or qweight.stride(
        0
    ) < k:  # transposed; expanded, which TMA cannot read
        qweight = qweight.contiguous()
    bias = None if bias is None else bias.contiguous()
    call = _Call(rows, qweight, weight_scale.contiguous(), bias, input_scale, act_fn, rotated, out)
    with on_device(rows):
        if plan is None:
            stride = qweight.stride(0)
            aligned = k > 0 and stride >= k and stride % 16 == 0 and qweight.data_ptr() % 16 == 0
            plans = candidates(
                architecture(device), _multiprocessors(device), m, n, k, rows.dtype, weight_only, aligned
            )
            mode = "weight_only" if weight_only else "dynamic" if input_scale is None else "static"
            key = (power_of_two(m), n, k, rows.dtype, mode, act_fn, rotated, aligned)
            plan = pick("int8_linear", key, plans, device, lambda tile: _FORMS[tile.form](call, tile))
        _FORMS[plan.form](call, plan)
    return out


# ------------------------------------------------------------------------------------------- compiling

_TYPES = {
    "input_scale": "*fp32",
    "q": "*i8",
    "scale": "*fp32",
    "x_scale": "*fp32",
    "qweight": "*i8",
    "weight_scale": "*fp32",
    "bias": "*fp32",
    "counters": "*i32",
    **dict.fromkeys(
        ("M", "N", "K", "row_stride", "weight_stride", "width", "count", "splits", "steps"), "i32"
    ),
}
_UNALIGNED = {"M", "count", "splits", "steps"}
_KERNELS = {
    "fused": fused_kernel,
    "tiles": tile_kernel,
    "persistent": persistent_kernel,
    "weight_only": weight_only_kernel,
    "weight_only_rows": weight_only_rows_kernel,
}
_ARCHITECTURES = {"ampere": (80,), "compact": (80,), "hopper": (90,), "blackwell": (100,)}


def _compilation(
    name: str,
    kernel: object,
    tile: Tile,
    architectures: Sequence[int],
    types: dict[str, str],
    **others: object,
) -> Compilation:
    """``odd``: nothing is aligned, sizes are 1, which Triton makes constants of. Drops what has no use."""
    odd, roomy = others.pop("odd", False), others.pop("roomy", False)
    cores = others.pop("tensor_cores", True)
    constants = {**others, **({"N": 1, "K": 1, "row_stride": 1} if odd else {})}
    arguments = [argument for argument in kernel.arg_names if argument not in {**constants, **tile.sizes}]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    given = {**_TYPES, **types}
    return Compilation(
        f"int8_linear {name}",
        kernel,
        {argument: given[argument] for argument in arguments},
        constants,
        tile,
        aligned=[] if odd else [a for a in arguments if a not in _UNALIGNED and given[a][0] in "*i"],
        tensor_cores=bool(cores),
        fp_fusion=False,
        architectures=architectures,
        roomy=bool(roomy),
    )


def _forms(
    plan: Plan,
    most: int,
    dtype: torch.dtype,
    architectures: Sequence[int],
    odd: bool = False,
    roomy: bool = False,
) -> list[Compilation]:
    """What :func:`int8_linear` may launch for a plan in a list for up to ``most`` rows."""
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {"x": kind, "out": kind, "partial": "*i32"}
    options = {
        "BIAS": not odd,
        "ACT_FN": None if odd else "gelu",
        "EVEN": not odd,
        "ROTATED": True,
        "odd": odd,
        "roomy": roomy,
    }
    options |= {"STATIC": odd, "PIECE": _piece(dtype, plan)}
    if plan.form == "persistent":
        for name, block in (("q", "BLOCK_M"), ("qweight", "BLOCK_N")):
            types[name] = f"tensordesc<i8[{plan.sizes[block]}, {plan.sizes['BLOCK_K']}]>"
    if plan.form.startswith("weight_only"):
        types["partial"] = "*fp32"
        options["tensor_cores"] = plan.form == "weight_only" and dtype != torch.float32
    if "BLOCK_M" in plan.sizes:
        variants = [{"SPLIT": True}, {"SPLIT": False}] if most else [{"SPLIT": False}]
    else:
        variants = [
            {"ROWS": rows, "WIDE": _wide(1 << 20, rows, plan)} for rows in {1: [1], 2: [1, 2]}.get(most, [4])
        ]
    return [
        _compilation(
            f"{plan.form} {kind[1:]} {' odd' * odd} {variant}",
            _KERNELS[plan.form],
            plan,
            architectures,
            types,
            **options,
            **variant,
        )
        for variant in variants
    ]


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles: every plan of every table."""
    found: dict[tuple[object, ...], Compilation] = {}

    def add(*compilations: Compilation) -> None:
        for c in compilations:
            key = (c.kernel, str(c.tile), tuple(c.constants.items()), tuple(c.types.items()))
            if key in found:  # the same plan in another list
                other = found[key]
                architectures = tuple(dict.fromkeys((*other.architectures, *c.architectures)))
                roomy = c.roomy and other.roomy if 80 in other.architectures else c.roomy
                c = replace(c, architectures=architectures, roomy=roomy)
            found[key] = c

    half, single = torch.bfloat16, torch.float32
    for family, table in _INT8.items():
        for most, plans in table.items():
            for plan in plans:
                for dtype in (half, single) if family == "hopper" and most in (0, 256) else (half,):
                    add(*_forms(plan, most, dtype, _ARCHITECTURES[family], roomy=family == "ampere"))
    for most, plans in _INT8_UNALIGNED.items():
        for plan in plans:
            add(*_forms(plan, most, torch.float16, (80, 90), odd=True))
    for name, dtype, architectures in (
        ("half", half, (80, 90, 100)),
        ("half compact", half, (80,)),
        ("float", single, (80, 90)),
        ("float blackwell", single, (100,)),
        ("unaligned", torch.float16, (90,)),
        ("unaligned", single, (90, 100)),
    ):
        for most, plans in _WEIGHT_ONLY[name].items():
            for plan in plans:
                add(*_forms(plan, most, dtype, architectures, odd=name == "unaligned"))
    for k in (1, 512, 4096, 8192, 16384):
        for dtype in ("*bf16", "*fp32"):
            options = {"STATIC": k == 512, "ROTATED": True, "tensor_cores": False, "odd": k == 1}
            add(
                _compilation(f"quantize K={k}", quantize_kernel, _row_tile(k), (90,), {"x": dtype}, **options)
            )
    return list(found.values())
