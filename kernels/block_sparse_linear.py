"""``block_sparse_linear`` and its two gradients on stored blocks. Page: ``reference/block_sparse_linear.py``.

One product serves the forward pass and the gradient of the input. A *line* is what shares outputs: a row of
blocks for ``x · Wᵀ``, a column of blocks for ``grad · W``; along a line lie its stored blocks, each of OUT
outputs and IN inputs, in the order of the index or of its transpose (:class:`Places`). A program has some
rows of x and the outputs of one line, or a part of them, and goes over the line's blocks::

    blocks    IN a multiple of 64: a step is BLOCK_K inputs of one block; x's tile lies at the block's column
    tma       the same, tiles copied by the tensor memory accelerator (sm_90 and up)
    gathered  any other IN: the inputs of a line's blocks side by side, BLOCK_K of them a step, of several
              blocks; x is gathered column by column

``grad_values_kernel`` has as many consecutive blocks of a line as fill its tile and sums over rows of x.

Nothing is added up by atomics, so results do not change from run to run. Lines are taken longest first: the
last programs to start are short ones. Operands of one 16-bit type, or int8, go to tensor cores. So do
float32 values with bfloat16 rows, as a sum of three bfloat16 (``split_kernel``). Other mixtures, float32
rows, and int8 values in the gradient of the input are multiplied as float32 on the ordinary cores.

Limits. Every byte of x that a program loads serves OUT outputs, so a product is bound by what the L2 cache
can deliver where OUT is small: 64 multiply-adds per element of x need blocks of 64 outputs. (8, 1), (16, 1)
and the like are served for what they save in memory and, at a few rows, bandwidth; at many rows dense
bfloat16 weights are faster until very few blocks are left. Blocks narrower than 32 bytes have x copied to
columns first (``_columns``), since a row of it would be read in pieces smaller than memory's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lissom._derived import Derived

from .int8_linear import _row_tile, halves, quantize_kernel
from .numerics import activate
from .tiles import Compilation, Tile, architecture, ceil_div, launch, on_device, pick, power_of_two

__all__ = [
    "Places",
    "Plan",
    "block_sparse_grad_input",
    "block_sparse_grad_values",
    "block_sparse_linear",
    "compilations",
]

FEW = 64
"""Rows up to which the bytes of the values matter more than those of x."""

NARROWEST = 8 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6) else 16
"""Columns of a product's second side; tensor cores take 8, Triton since 3.6."""

GROUP = tl.constexpr(8)  # tile rows whose tiles follow each other: values and x meet again in L2
MASKED_ROWS = tl.constexpr(16)  # tiles of so few rows are rarely full
PIECE = tl.constexpr(64)  # columns of sums that are finished at once


# ------------------------------------------------------------------------------------------- products


@triton.jit
def without_tail(x):
    """The first 8 bits of a float32: a bfloat16, rounded toward zero."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["size"])
def split_kernel(values, parts, size, BLOCK: tl.constexpr):
    """float32 as an exact sum of three bfloat16, [3, size], whose products with a bfloat16 are exact.

    An infinity stays one, and NaN NaN.
    """
    size = size.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(values + at, mask=inside, other=0.0)
    high = without_tail(value)
    rest = tl.where(tl.abs(value) == float("inf"), 0.0, value - high)
    middle = without_tail(rest)
    tl.store(parts + at, high.to(tl.bfloat16), mask=inside)
    tl.store(parts + size + at, middle.to(tl.bfloat16), mask=inside)
    tl.store(parts + 2 * size + at, (rest - middle).to(tl.bfloat16), mask=inside)


@triton.jit
def place(M, lines, SUBS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile row, and the part of which line: GROUP tile rows at a time, line by line."""
    tile = tl.program_id(0)
    parts = lines * SUBS
    first = tile // (GROUP * parts) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    rest = tile % (GROUP * parts)
    return first + rest % height, rest // height


@triton.jit
def multiply_add(a, w, total, SWAP: tl.constexpr, FLOAT: tl.constexpr):
    """``total`` plus a [rows, inputs] times w [outputs, inputs]; SWAP: outputs come first in ``total``."""
    if FLOAT:
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, a.T, total, input_precision="ieee", out_dtype=total.dtype)
    else:
        return tl.dot(a, w.T, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def begin_total(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr, dtype: tl.constexpr):
    if SWAP:
        return tl.zeros((BLOCK_N, BLOCK_M), dtype)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), dtype)


@triton.jit
def finish_piece(
    total,
    row,
    output,
    a_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    last,
    SWAP: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
):
    used = output < tl.minimum(last, N)
    offset = tl.zeros(output.shape, tl.float32)
    if BIAS:
        offset += tl.load(bias + output, mask=used, other=0.0).to(tl.float32)
    if SWAP:
        offset = tl.broadcast_to(offset[:, None], total.shape)
    else:
        offset = tl.broadcast_to(offset[None, :], total.shape)
    if INT8:
        rows = tl.load(a_scale + row, mask=row < M, other=0.0)
        outputs = tl.load(weight_scale + output, mask=used, other=0.0)
        if SWAP:
            scale = outputs[:, None] * rows[None, :]
        else:
            scale = rows[:, None] * outputs[None, :]
        y = tl.fma(total.to(tl.float32), scale, offset)
    else:
        y = total + offset
    y = activate(y, ACT_FN).to(out.dtype.element_ty)
    if SWAP:
        y = y.T
    at = out + row.to(tl.int64)[:, None] * N + output[None, :]
    tl.store(at, y, mask=(row < M)[:, None] & used[None, :])


@triton.jit
def finish_half(
    total,
    first_row,
    first_output,
    a_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    last,
    SWAP: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
):
    """``finish`` for up to 2 pieces; Triton 3.4 has no recursion."""
    if total.shape[1] > PIECE:
        one, other = halves(total)
        row = first_row + tl.arange(0, one.shape[1 if SWAP else 0])
        output = first_output + tl.arange(0, one.shape[0 if SWAP else 1])
        finish_piece(one, row, output, a_scale, weight_scale, bias, out, M, N, last, SWAP, INT8, BIAS, ACT_FN)
        row += one.shape[1] if SWAP else 0
        output += 0 if SWAP else one.shape[1]
        finish_piece(
            other, row, output, a_scale, weight_scale, bias, out, M, N, last, SWAP, INT8, BIAS, ACT_FN
        )
    else:
        row = first_row + tl.arange(0, total.shape[1 if SWAP else 0])
        output = first_output + tl.arange(0, total.shape[0 if SWAP else 1])
        finish_piece(
            total, row, output, a_scale, weight_scale, bias, out, M, N, last, SWAP, INT8, BIAS, ACT_FN
        )


@triton.jit
def finish(
    total,
    first_row,
    first_output,
    a_scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    last,
    SWAP: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
):
    """From sums to ``out`` [M, N], from a row and an output on; outputs below ``last`` are this line's.

    Up to 4 pieces of PIECE columns, one at a time: registers hold the sums of a large tile, and little else.
    """
    if total.shape[1] > 2 * PIECE:
        one, other = halves(total)
        row = first_row + (one.shape[1] if SWAP else 0)
        output = first_output + (0 if SWAP else one.shape[1])
        finish_half(
            one,
            first_row,
            first_output,
            a_scale,
            weight_scale,
            bias,
            out,
            M,
            N,
            last,
            SWAP,
            INT8,
            BIAS,
            ACT_FN,
        )
        finish_half(
            other, row, output, a_scale, weight_scale, bias, out, M, N, last, SWAP, INT8, BIAS, ACT_FN
        )
    else:
        finish_half(
            total,
            first_row,
            first_output,
            a_scale,
            weight_scale,
            bias,
            out,
            M,
            N,
            last,
            SWAP,
            INT8,
            BIAS,
            ACT_FN,
        )


@triton.jit(do_not_specialize=["M", "lines", "stored"])
def blocks_kernel(
    a,
    a_scale,
    values,
    order,
    begins,
    ends,
    across,
    blocks,
    weight_scale,
    bias,
    out,
    M,
    N,
    inputs,
    lines,
    stored,
    a_stride,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INT8: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """IN is a multiple of BLOCK_K.

    Args:
        a: rows [M, inputs] of x or grad; with TMA a descriptor, like ``values`` [blocks * height, width].
        order, begins, ends, across, blocks: as :class:`Lines` has them; ``blocks`` only if TRANSPOSED.
        stored: number of blocks.
        PARTS: values are a sum of as many, one after the other; see ``split_kernel``.
        EVEN: ``inputs`` is a multiple of IN.
        SCALED: int8 values times ``weight_scale`` of their inputs (which are outputs of the layer).
    """
    SUBS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = IN // BLOCK_K
    tile_row, part = place(M, lines, SUBS, BLOCK_M)
    line = tl.load(order + part // SUBS)
    begin = tl.load(begins + part // SUBS)
    end = tl.load(ends + part // SUBS)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o = part % SUBS * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K)
    if not TMA:
        # Past the edge the last row is read again, without a mask, and not stored; of few rows none is read.
        a_at = a + tl.minimum(row, M - 1).to(tl.int64)[:, None] * a_stride + i[None, :]
        if TRANSPOSED:
            w_at = values + o[:, None] + i[None, :] * OUT
        else:
            w_at = values + o[:, None] * IN + i[None, :]
    total = begin_total(BLOCK_M, BLOCK_N, SWAP, tl.int32 if INT8 else tl.float32)
    # Places of blocks are loaded a step ahead: no load of a tile waits for them.
    next_column = tl.load(across + begin, mask=begin < end, other=0)
    next_block = begin
    if TRANSPOSED:
        next_block = tl.load(blocks + begin, mask=begin < end, other=0)
    for step in range((end - begin) * STEPS):
        column = next_column * IN
        block = next_block
        inner = step % STEPS * BLOCK_K
        following = begin + (step + 1) // STEPS
        next_column = tl.load(across + following, mask=following < end, other=0)
        if TRANSPOSED:
            next_block = tl.load(blocks + following, mask=following < end, other=0)
        else:
            next_block = following
        if TMA:
            x = a.load([tile_row * BLOCK_M, column + inner])
        else:
            if EVEN and BLOCK_M > MASKED_ROWS:
                x = tl.load(a_at + (column + inner))
            elif EVEN:
                x = tl.load(a_at + (column + inner), mask=(row < M)[:, None], other=0)
            else:
                x_in = (row < M)[:, None] & (column + inner + i < inputs)[None, :]
                x = tl.load(a_at + (column + inner), mask=x_in, other=0)
        for copy in tl.static_range(PARTS):
            if TMA and TRANSPOSED:
                w = values.load([(copy * stored + block) * IN + inner, part % SUBS * BLOCK_N]).T
            elif TMA:
                w = values.load([(copy * stored + block) * OUT + part % SUBS * BLOCK_N, inner])
            else:
                offset = (copy * stored + block).to(tl.int64) * (OUT * IN)
                w_from = w_at + (offset + inner * (OUT if TRANSPOSED else 1))
                if OUT % BLOCK_N == 0:
                    w = tl.load(w_from)
                else:
                    w = tl.load(w_from, mask=(o < OUT)[:, None], other=0)
            if SCALED:
                k = column + inner + i
                scale = tl.load(weight_scale + k, mask=k < inputs, other=0.0)
                w = w.to(tl.float32) * scale[None, :]
            total = multiply_add(x, w, total, SWAP, FLOAT)
    first = line * OUT + part % SUBS * BLOCK_N
    last = (line + 1) * OUT
    finish(
        total,
        tile_row * BLOCK_M,
        first,
        a_scale,
        weight_scale,
        bias,
        out,
        M,
        N,
        last,
        SWAP,
        INT8,
        BIAS,
        ACT_FN,
    )


@triton.jit(do_not_specialize=["M", "lines", "stored"])
def gathered_kernel(
    a,
    a_scale,
    values,
    order,
    begins,
    ends,
    across,
    blocks,
    weight_scale,
    bias,
    out,
    M,
    N,
    inputs,
    lines,
    stored,
    a_stride,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INT8: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The inputs of a line's blocks side by side, BLOCK_K a step; as ``blocks_kernel`` otherwise.

    COLUMNS: ``a`` is [inputs, rows], its rows filled up to a multiple of BLOCK_M.
    """
    SUBS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile_row, part = place(M, lines, SUBS, BLOCK_M)
    line = tl.load(order + part // SUBS)
    begin = tl.load(begins + part // SUBS)
    count = (tl.load(ends + part // SUBS) - begin) * IN
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o = part % SUBS * BLOCK_N + tl.arange(0, BLOCK_N)
    if COLUMNS:
        a_at = a + row[:, None]
    else:
        a_at = a + tl.minimum(row, M - 1).to(tl.int64)[:, None] * a_stride
    if TRANSPOSED:
        w_at = values + o[:, None]
    else:
        w_at = values + o[:, None] * IN
    total = begin_total(BLOCK_M, BLOCK_N, SWAP, tl.int32 if INT8 else tl.float32)
    slot = tl.arange(0, BLOCK_K)
    # Places of blocks are loaded a step ahead: no load of a tile waits for them.
    next_column = tl.load(across + begin + slot // IN, mask=slot < count, other=0)
    next_block = begin + slot // IN
    if TRANSPOSED:
        next_block = tl.load(blocks + next_block, mask=slot < count, other=0)
    for start in range(0, count, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        inside = slot < count
        i = slot % IN
        k = next_column * IN + i
        if TRANSPOSED:
            w_in = next_block.to(tl.int64) * (OUT * IN) + i * OUT
        else:
            w_in = next_block.to(tl.int64) * (OUT * IN) + i
        ahead = slot + BLOCK_K
        next_block = begin + ahead // IN
        next_column = tl.load(across + next_block, mask=ahead < count, other=0)
        if TRANSPOSED:
            next_block = tl.load(blocks + next_block, mask=ahead < count, other=0)
        if EVEN:
            met = inside
        else:
            met = inside & (k < inputs)
        if COLUMNS:
            x = tl.load(a_at + k.to(tl.int64)[None, :] * a_stride, mask=met[None, :], other=0)
        elif BLOCK_M > MASKED_ROWS:
            x = tl.load(a_at + k[None, :], mask=met[None, :], other=0)
        else:
            x = tl.load(a_at + k[None, :], mask=(row < M)[:, None] & met[None, :], other=0)
        for copy in tl.static_range(PARTS):
            w_from = w_at + (w_in + copy * stored.to(tl.int64) * (OUT * IN))[None, :]
            if OUT % BLOCK_N == 0:
                w = tl.load(w_from, mask=inside[None, :], other=0)
            else:
                w = tl.load(w_from, mask=(o < OUT)[:, None] & inside[None, :], other=0)
            if SCALED:
                scale = tl.load(weight_scale + k, mask=inside & (k < inputs), other=0.0)
                w = w.to(tl.float32) * scale[None, :]
            total = multiply_add(x, w, total, SWAP, FLOAT)
    first = line * OUT + part % SUBS * BLOCK_N
    last = (line + 1) * OUT
    finish(
        total,
        tile_row * BLOCK_M,
        first,
        a_scale,
        weight_scale,
        bias,
        out,
        M,
        N,
        last,
        SWAP,
        INT8,
        BIAS,
        ACT_FN,
    )


@triton.jit(do_not_specialize=["M", "lines", "size", "part_steps"])
def grad_values_kernel(
    grad,
    x,
    starts,
    across,
    unit_line,
    unit_first,
    out,
    M,
    N,
    K,
    lines,
    size,
    part_steps,
    grad_stride,
    x_stride,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    FLOAT: tl.constexpr,
    GRAD_COLUMNS: tl.constexpr,
    X_COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """gradᵀ · x at up to ``unit`` consecutive blocks of a line, over ``part_steps`` steps: out [parts, B,
    OUT, IN].

    Rows of grad and x have zeros to whole multiples of OUT and IN. Units past the last have ``lines`` as
    their line.
    """
    UNIT: tl.constexpr = BLOCK_J // IN if BLOCK_J > IN else 1
    SUBS: tl.constexpr = (IN + BLOCK_J - 1) // BLOCK_J
    line = tl.load(unit_line + tl.program_id(0))
    if line < lines:
        first = tl.load(unit_first + tl.program_id(0))
        count = tl.minimum(tl.load(starts + line + 1) - first, UNIT)
        slot = tl.program_id(1) % SUBS * BLOCK_J + tl.arange(0, BLOCK_J)
        inside = slot < count * IN
        b = first + slot // IN
        i = slot % IN
        k = tl.load(across + b, mask=inside, other=0) * IN + i
        o = tl.program_id(1) // SUBS * BLOCK_O + tl.arange(0, BLOCK_O)
        n = line * OUT + o
        n_in = (o < OUT) & (n < N)
        k_in = inside & (k < K)
        begin = tl.program_id(2) * part_steps * BLOCK_M
        end = tl.minimum(begin + part_steps * BLOCK_M, M)
        if SWAP:
            total = tl.zeros((BLOCK_J, BLOCK_O), tl.float32)
        else:
            total = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
        for start in range(begin, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            if GRAD_COLUMNS:
                g = tl.load(
                    grad + m[:, None] + n.to(tl.int64)[None, :] * grad_stride,
                    mask=(o < OUT)[None, :],
                    other=0,
                )
            else:
                g_in = (m < M)[:, None] & (o < OUT)[None, :]
                g = tl.load(grad + m.to(tl.int64)[:, None] * grad_stride + n[None, :], mask=g_in, other=0)
            if X_COLUMNS:
                v = tl.load(
                    x + m[:, None] + k.to(tl.int64)[None, :] * x_stride, mask=inside[None, :], other=0
                )
            else:
                v_in = (m < M)[:, None] & inside[None, :]
                v = tl.load(x + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=v_in, other=0)
            total = multiply_add(g.T, v.T, total, SWAP, FLOAT)
        to = out + (tl.program_id(2) * size.to(tl.int64) + b.to(tl.int64) * (OUT * IN) + i)
        if SWAP:
            total = tl.where(k_in[:, None] & n_in[None, :], total, 0.0)  # past N and K, not even NaN
            tl.store(to[:, None] + o[None, :] * IN, total, mask=inside[:, None] & (o < OUT)[None, :])
        else:
            total = tl.where(n_in[:, None] & k_in[None, :], total, 0.0)
            tl.store(to[None, :] + o[:, None] * IN, total, mask=(o < OUT)[:, None] & inside[None, :])


# ------------------------------------------------------------------------------------------- indices


@dataclass(frozen=True)
class Lines:
    """Lines of stored blocks, longest first; all int32.

    The r-th is line ``order[r]``. Its blocks begins[r] … ends[r]-1 lie at ``across`` [B], in blocks, and are
    ``blocks`` [B] of the values; None: they are stored in this order.
    """

    order: Tensor
    begins: Tensor
    ends: Tensor
    across: Tensor
    blocks: Tensor | None


class Places(Derived):
    """What is derived from a weight's indices."""

    def rows(self, crow: Tensor, col: Tensor) -> Lines:
        """Rows of blocks, as the index has them."""
        return Lines(*self.part("rows", lambda crow, col: _longest_first(crow), crow, col), col, None)

    def columns(self, crow: Tensor, col: Tensor, columns: int) -> Lines:
        """Columns of blocks, each from top to bottom."""

        def compute(crow: Tensor, col: Tensor) -> tuple[Tensor, ...]:
            numbers = torch.arange(max(len(col), columns + 1), dtype=torch.int32, device=col.device)
            row = torch.searchsorted(crow[1:], numbers[: len(col)], right=True, out_int32=True)
            sorted_columns, blocks = torch.sort(col, stable=True)
            starts = torch.searchsorted(sorted_columns, numbers[: columns + 1], out_int32=True)
            return *_longest_first(starts), row[blocks], blocks.to(torch.int32)

        return Lines(*self.part(("columns", columns), compute, crow, col))

    def units(self, crow: Tensor, col: Tensor, unit: int) -> tuple[Tensor, Tensor]:
        """Lines in pieces of up to ``unit`` blocks: line and first block of each, int32.

        There are as many as there can be; the line of those that are not is the number of lines.
        """

        def compute(crow: Tensor, col: Tensor) -> tuple[Tensor, ...]:
            lines, blocks = len(crow) - 1, len(col)
            pieces = (crow.diff() + (unit - 1)) // unit
            ends = pieces.cumsum(0)
            numbers = torch.arange(min(blocks, lines) + blocks // unit, device=crow.device)
            line = torch.searchsorted(ends, numbers, right=True)
            at = line.clamp(max=max(lines - 1, 0))
            first = crow[at] + (numbers - (ends - pieces)[at]) * unit
            return line.to(torch.int32), first.to(torch.int32)

        line, first = self.part(("units", unit), compute, crow, col)
        return line, first


def _longest_first(starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines in order of length, and where each begins and ends."""
    order = torch.argsort(starts.diff(), descending=True, stable=True)
    return order.to(torch.int32), starts[:-1][order], starts[1:][order]


# ------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Plan(Tile):
    """How a product is computed: a form (see above), its tile, and which operand comes first."""

    form: str = "gathered"

    def __str__(self) -> str:
        return f"{self.form} {super().__str__()}"


def kind_of(x: torch.dtype, values: torch.dtype, m: int) -> str:
    """How ``m`` rows of x are multiplied with values.

    ``int8``, ``half``: both as they are, of one type. ``split``: bfloat16 x and float32 values, each a sum of
    three bfloat16, which takes another pass over the values. ``float``: as float32, whatever they are.
    """
    if values == torch.int8:
        return "int8"
    if x == values != torch.float32:
        return "half"
    return "split" if x == torch.bfloat16 and values == torch.float32 and m > 16 else "float"


_SHARED_KILOBYTES = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""What a program may have; 99 (sm_86, sm_89, sm_120) where nothing is listed."""

# Rows up to which a list serves (0: any number), least OUT, and tiles: BLOCK_M, BLOCK_N, BLOCK_K (of 16-bit
# elements), warps, stages, programs on a multiprocessor. By count, not yet measured. Up to 64 rows a product
# is bound by the bytes of the values: narrow tiles, so that there are programs enough, and many stages. From
# then on by what the L2 cache delivers: multiply-adds per element loaded, 85 for 256 x 128, 64 for 128 x 128,
# 51 for 256 x 64 (outputs first: wgmma then reads 80 bytes of shared memory a cycle, the other way round 128,
# which is all there is). Several programs on a multiprocessor hide each other's beginning and end.
_FEW_ROWS = (
    (16, 64, ((16, 32, 128, 4, 8, 2), (16, 16, 128, 4, 8, 3), (16, 64, 128, 4, 5, 2))),
    (16, 0, ((16, 32, 64, 4, 8, 2), (16, 16, 64, 4, 8, 4))),
    (64, 64, ((64, 32, 64, 4, 5, 2), (64, 64, 64, 4, 5, 2))),
    (64, 0, ((64, 32, 64, 4, 5, 2),)),
)
_NARROW_BLOCKS = ((0, 0, ((128, 32, 64, 4, 4, 2), (64, 32, 64, 4, 4, 3))),)
_SMALL_TILES = ((128, 64, 64, 4, 4, 2), (64, 64, 64, 4, 4, 3))
_TENSOR_CORES = {
    "ampere": (
        *_FEW_ROWS,
        (0, 128, ((128, 128, 64, 8, 3, 1), *_SMALL_TILES)),
        (0, 64, _SMALL_TILES),
        *_NARROW_BLOCKS,
    ),
    "hopper": (
        *_FEW_ROWS,
        (0, 128, ((256, 128, 64, 8, 4, 1), (128, 128, 64, 4, 3, 2), *_SMALL_TILES)),
        (0, 64, ((256, 64, 32, 4, 5, 2), (256, 64, 64, 4, 4, 1), *_SMALL_TILES)),
        *_NARROW_BLOCKS,
    ),
    "blackwell": (
        *_FEW_ROWS,
        (0, 128, ((128, 128, 64, 8, 3, 2), *_SMALL_TILES)),
        (0, 64, ((256, 64, 64, 8, 4, 1), *_SMALL_TILES)),
        *_NARROW_BLOCKS,
    ),
}
# float32 on the ordinary cores. Outputs come first and are 32: Triton 3.6 compiles a float32 product whose
# first side is 64 or more for sm_100 as TF32, whatever precision is asked for (triton-lang/triton#10176).
_FLOAT = (
    (16, 0, ((16, 32, 32, 4, 3, 4),)),
    (64, 0, ((64, 32, 32, 4, 3, 4),)),
    (0, 32, ((256, 32, 16, 8, 4, 2), (128, 32, 32, 8, 3, 2))),
    (0, 0, ((128, 16, 16, 8, 4, 2), (64, 16, 32, 8, 3, 3))),
)

_ODD = ((64, 32, 32, 4, 4, 3),)
"""Where values are loaded in pieces of less than 4 bytes, through registers."""

_ITEMS = {"int8": 1, "half": 2, "split": 2, "float": 4}
"""Bytes of an element in shared memory."""

START = 12e6
"""What a program waits for at its beginning and end, about 2 µs, as multiply-adds of a multiprocessor."""


def _family(architecture: int) -> str:
    """sm_120 has Ampere's instructions for tensor cores."""
    return "blackwell" if 100 <= architecture < 120 else "hopper" if 90 <= architecture < 100 else "ampere"


@lru_cache(maxsize=1024)
def candidates(
    architecture: int,
    multiprocessors: int,
    kind: str,
    m: int,
    lines: int,
    outputs: int,
    inputs: int,
    depth: int,
    copied: bool,
    tma: bool,
    tidy: bool,
) -> tuple[Plan, ...]:
    """Plans for ``m`` rows and lines of blocks of ``outputs`` x ``inputs``, cheapest first by count.

    Args:
        kind: of :func:`kind_of`.
        depth: stored inputs of a line, on average.
        copied: values are loaded by 4 bytes and more, as copies to shared memory must be.
        tma: x and the values are as TMA wants them.
        tidy: rows of the output begin at multiples of 16 elements. Otherwise elements are stored one by one,
            for which large tiles lack registers.
    """
    family = _family(architecture)
    table = _FLOAT if kind == "float" else _TENSOR_CORES[family]
    tiles = next(found for most, least, found in table if (m <= most or not most) and outputs >= least)
    item, parts = _ITEMS[kind], 3 if kind == "split" else 1
    whole = inputs % 64 == 0
    form = "blocks" if whole else "gathered"
    if whole and tma and family != "ampere" and m > FEW and kind != "float":
        form = "tma"
    if m > 16 and not copied:
        tiles = _ODD
    elif kind == "split" and m > FEW and outputs < 64:
        tiles = tiles[:1]
    elif not tidy:
        tiles = tuple(tile for tile in tiles if tile[1] < 128)
    costs: dict[str, float] = {}
    plans: dict[str, Plan] = {}
    for down, across, step, warps, stages, programs in tiles:
        swap = kind == "float" or down < 64 or across == 64
        across = min(across, max(power_of_two(outputs), 16 if swap and kind != "float" else NARROWEST))
        if kind == "int8":
            step *= 2  # as many bytes
        step = min(step, 128 if inputs % 128 == 0 else 64)
        room = _SHARED_KILOBYTES.get(architecture, 99) - 1
        fit = room * 1024 // ((down + parts * across) * step * item)
        if fit < 2:
            continue
        programs = min(programs, max(1, fit // 3))
        stages = min(stages, fit // programs)
        if kind == "split" and family == "blackwell":
            stages = 2  # Triton 3.6 takes more shared memory there than is counted here
        plan = Plan({"BLOCK_M": down, "BLOCK_N": across, "BLOCK_K": step, "SWAP": swap}, warps, stages, form)
        # Of a multiprocessor: its share, and the last tile that it waits for; loading an element counts as 64
        # multiply-adds.
        share = ceil_div(m, down) * lines * ceil_div(outputs, across) / multiprocessors + 1
        work = depth * (parts * down * across + 64 * (down + parts * across))
        plans[str(plan)] = plan
        costs[str(plan)] = share * work + START * share / programs**3
    return tuple(plans[name] for name in sorted(plans, key=lambda name: costs[name]))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True)
class _Product:
    """``a`` [M, inputs], which may have zeros past ``inputs``, times stored blocks.

    ``shape``: outputs and inputs of a block. ``values`` are three times as many where they are split.
    """

    a: Tensor
    a_scale: Tensor | None
    values: Tensor
    lines: Lines
    shape: tuple[int, int]
    inputs: int
    weight_scale: Tensor | None
    bias: Tensor | None
    act_fn: str | None
    kind: str
    out: Tensor

    @property
    def features(self) -> tuple[bool, bool, bool]:
        """``copied``, ``tma`` and ``tidy`` of :func:`candidates`."""
        a, values, n = self.a, self.values, self.out.shape[1]
        _, height, width = values.shape
        piece = (width if width > 1 else height) * values.element_size()
        copied = (piece | values.data_ptr()) % 4 == 0
        sizes = a.data_ptr() | a.stride(0) * a.element_size()
        sizes |= values.data_ptr() | width * values.element_size()
        # TMA cannot describe tensors without elements, nor rows that overlap.
        tma = sizes % 16 == 0 and values.numel() > 0 and a.stride(0) >= a.shape[1]
        return copied, tma, n % 16 == 0

    def plans(self) -> tuple[Plan, ...]:
        lines, (outputs, inputs) = len(self.lines.order), self.shape
        return candidates(
            architecture(self.a.device),
            _multiprocessors(self.a.device),
            self.kind,
            self.out.shape[0],
            lines,
            outputs,
            inputs,
            ceil_div(len(self.lines.across) * inputs, lines),
            *self.features,
        )

    def key(self) -> tuple[object, ...]:
        m, n = self.out.shape
        sizes = (power_of_two(m), n, self.inputs, *self.shape, power_of_two(len(self.lines.across)))
        dtypes = (self.a.dtype, self.values.dtype, self.out.dtype)
        return *sizes, *dtypes, self.lines.blocks is not None, self.act_fn, *self.features

    def launch(self, plan: Plan) -> None:
        a, values, lines, out = self.a, self.values, self.lines, self.out
        (m, n), (outputs, inputs) = out.shape, self.shape
        down, across, step = (plan.sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        options: dict[str, object] = {"EVEN": a.shape[1] % inputs == 0, **plan.options()}
        stride = a.stride(0)
        if plan.form == "gathered":
            options["COLUMNS"] = columns = _narrow(a.dtype, inputs, m)
            if columns:
                a = _columns(a, inputs, down)
                options["EVEN"], stride = True, a.stride(0)
        else:
            options["TMA"] = tma = plan.form == "tma"
            if tma:
                box = [across, step] if lines.blocks is None else [step, across]
                a = TensorDescriptor(a, list(a.shape), [stride, 1], [down, step])
                table = values.view(-1, values.shape[2])
                values = TensorDescriptor(table, list(table.shape), [table.shape[1], 1], box)
        kernel = gathered_kernel if plan.form == "gathered" else blocks_kernel
        launch(
            kernel,
            (ceil_div(m, down) * len(lines.order) * ceil_div(outputs, across),),
            a,
            out if self.a_scale is None else self.a_scale,
            values,
            lines.order,
            lines.begins,
            lines.ends,
            lines.across,
            lines.across if lines.blocks is None else lines.blocks,
            out if self.weight_scale is None else self.weight_scale,
            out if self.bias is None else self.bias,
            out,
            m,
            n,
            self.inputs,
            len(lines.order),
            len(lines.across),
            stride,
            OUT=outputs,
            IN=inputs,
            TRANSPOSED=lines.blocks is not None,
            INT8=self.kind == "int8",
            FLOAT=self.kind == "float",
            SCALED=self.kind == "float" and self.weight_scale is not None,
            PARTS=3 if self.kind == "split" else 1,
            BIAS=self.bias is not None,
            ACT_FN=self.act_fn,
            enable_fp_fusion=self.kind != "int8",
            **options,
        )

    def run(self, plan: Plan | None) -> Tensor:
        if plan is None:
            plan = pick("block_sparse_linear", self.key(), self.plans(), self.a.device, self.launch)
        self.launch(plan)
        return self.out


def _narrow(dtype: torch.dtype, width: int, m: int) -> bool:
    """Whether pieces of ``width`` columns of ``m`` rows are worth a copy of them as columns.

    Memory is read by 32 bytes. Tensor cores take int8 only along K: columns cost them a transposition.
    """
    return m > 16 and width * dtype.itemsize < (16 if dtype == torch.int8 else 32)


def _columns(rows: Tensor, width: int, multiple: int) -> Tensor:
    """[M, K] as [K, M]: K filled up with zeros to whole pieces of ``width``, M to a multiple."""
    m, k = rows.shape
    shape = (ceil_div(k, width) * width, ceil_div(m, multiple) * multiple)
    columns = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    columns[:k, :m].copy_(rows.t())
    columns[:k, m:].zero_()
    columns[k:].zero_()
    return columns


def _whole_rows(rows: Tensor, width: int) -> Tensor:
    """[M, K] with K filled up with zeros to whole pieces of ``width``, rows at multiples of 16 elements.

    Such rows are copied to shared memory without a mask.
    """
    m, k = rows.shape
    full, stride = ceil_div(k, width) * width, rows.stride(0)
    if full == k <= stride and stride % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    whole = torch.empty((m, ceil_div(full, 16) * 16), dtype=rows.dtype, device=rows.device)
    whole[:, :k].copy_(rows)
    whole[:, k:].zero_()
    return whole[:, :full]


def _split(values: Tensor) -> Tensor:
    """float32 [B, bh, bw] as bfloat16 [3 B, bh, bw]."""
    blocks, height, width = values.shape
    parts = torch.empty((3 * blocks, height, width), dtype=torch.bfloat16, device=values.device)
    size = values.numel()
    if size:
        launch(split_kernel, (ceil_div(size, 2048),), values, parts, size, BLOCK=2048)
    return parts


def _quantize(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows as int8, whole as above, and their scales: ``reference/int8_linear.quantize_rows``."""
    m, k = rows.shape
    full = ceil_div(k, width) * width
    q = torch.empty((m, max(16, ceil_div(full, 16) * 16)), dtype=torch.int8, device=rows.device)
    scale = torch.empty(m, dtype=torch.float32, device=rows.device)
    tile = _row_tile(q.shape[1])  # the columns of zeros are written too
    launch(
        quantize_kernel,
        (ceil_div(m, tile.sizes["BLOCK_ROWS"]),),
        rows,
        scale,
        q,
        scale,
        scale,
        m,
        k,
        rows.stride(0),
        q.stride(0),
        0,
        STATIC=False,
        ROTATED=False,
        enable_fp_fusion=False,
        **tile.options(),
    )
    return q[:, :full], scale


def block_sparse_linear(
    rows: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    out_features: int,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    act_fn: str | None,
    places: Places,
    plan: Plan | None = None,
) -> Tensor:
    """``rows`` [M, K] with dense rows and contiguous block-sparse weights [N, K] → [M, N].

    Args:
        places: of these indices; may be new.
        plan: one of :func:`candidates`; None chooses.
    """
    out = torch.empty((rows.shape[0], out_features), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    with on_device(rows):
        kind, scale = kind_of(rows.dtype, values.dtype, len(rows)), None
        width, inputs = values.shape[2], rows.shape[1]
        if kind == "int8":
            rows, scale = _quantize(rows, width)
        elif len(rows) > FEW and not _narrow(rows.dtype, width, len(rows)):
            rows = _whole_rows(rows, width)
        product = _Product(
            rows,
            scale,
            _split(values) if kind == "split" else values,
            places.rows(crow, col),
            (values.shape[1], width),
            inputs,
            weight_scale,
            None if bias is None else bias.contiguous(),
            act_fn,
            kind,
            out,
        )
        return product.run(plan)


def block_sparse_grad_input(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    in_features: int,
    weight_scale: Tensor | None,
    places: Places,
    plan: Plan | None = None,
) -> Tensor:
    """``grad`` [M, N] with dense rows times the weight [N, K] → [M, K]; the rest as above."""
    out = torch.empty((grad.shape[0], in_features), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    with on_device(grad):
        (height, width), inputs = values.shape[1:], grad.shape[1]
        kind = "float" if weight_scale is not None else kind_of(grad.dtype, values.dtype, len(grad))
        if len(grad) > FEW and not _narrow(grad.dtype, height, len(grad)):
            grad = _whole_rows(grad, height)
        product = _Product(
            grad,
            None,
            _split(values) if kind == "split" else values,
            places.columns(crow, col, ceil_div(in_features, width)),
            (width, height),
            inputs,
            weight_scale,
            None,
            None,
            kind,
            out,
        )
        return product.run(plan)


# Height of blocks from which a list serves, and tiles of the gradient of values (BLOCK_O, BLOCK_J, rows of x
# a step, warps, stages): 85 multiply-adds per element loaded for 128 x 256, 64 for 128 x 128, 51 for 64 x
# 256.
_VALUES = {
    128: ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3)),
    64: ((64, 256, 64, 4, 3), (64, 128, 64, 4, 3)),
    0: ((32, 128, 64, 4, 3),),
}
_VALUES_AMPERE = {128: ((128, 128, 32, 8, 4),), 64: ((64, 128, 32, 4, 4),), 0: ((32, 128, 64, 4, 3),)}
_VALUES_FLOAT = {0: ((32, 128, 32, 4, 3),)}


def values_candidates(architecture: int, kind: str, height: int, width: int, depth: int) -> tuple[Tile, ...]:
    """Tiles for blocks of ``height`` x ``width``, of which lines have ``depth`` inputs on average."""
    table = (
        _VALUES_FLOAT if kind == "float" else _VALUES_AMPERE if _family(architecture) == "ampere" else _VALUES
    )
    tiles = next(found for least, found in table.items() if height >= least)
    room = _SHARED_KILOBYTES.get(architecture, 99) * 1024
    found = []
    for tall, wide, step, warps, stages in tiles:
        stages = min(stages, room // ((tall + wide) * step * (4 if kind == "float" else 2)))
        swap = kind != "float" and tall < 64  # wgmma wants 64 on its first side
        sizes = {
            "BLOCK_O": min(tall, max(NARROWEST, power_of_two(height))),
            "BLOCK_J": wide,
            "BLOCK_M": step,
            "SWAP": swap,
        }
        if stages >= 2:
            found.append(Tile(sizes, warps, stages))
    # The last tile of a line is half empty on average.
    return tuple(
        sorted(found, key=lambda t: (depth + t.sizes["BLOCK_J"] / 2) * (1 + 64 / t.sizes["BLOCK_J"]))
    )


def block_sparse_grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    height: int,
    width: int,
    places: Places,
    tile: Tile | None = None,
) -> Tensor:
    """``grad`` [M, N] and ``x`` [M, K] with dense rows → float32 [B, height, width], zero past N and K."""
    (m, n), k, blocks, device = grad.shape, x.shape[1], len(col), grad.device
    shape = (blocks, height, width)
    if m == 0 or blocks == 0:
        return torch.zeros(shape, dtype=torch.float32, device=device)
    kind = "half" if grad.dtype == x.dtype != torch.float32 else "float"
    lines = len(crow) - 1
    narrow = _narrow(grad.dtype, height, m), _narrow(x.dtype, width, m)

    def run(tile: Tile) -> Tensor:
        tall, wide, step = (tile.sizes[name] for name in ("BLOCK_O", "BLOCK_J", "BLOCK_M"))
        line, first = places.units(crow, col, max(1, wide // width))
        parts = ceil_div(height, tall) * ceil_div(width, wide)
        # Few blocks: the sum over rows in parts, added up in their order.
        splits = min(2 * _multiprocessors(device) // (len(line) * parts), ceil_div(m, 4 * step))
        part_steps = ceil_div(ceil_div(m, step), max(1, splits))
        splits = ceil_div(m, part_steps * step)
        out = torch.empty((splits, *shape), dtype=torch.float32, device=device)
        g, v = (
            _columns(t, size, step) if columns else _whole_rows(t, size)
            for t, size, columns in ((grad, height, narrow[0]), (x, width, narrow[1]))
        )
        launch(
            grad_values_kernel,
            (len(line), parts, splits),
            g,
            v,
            crow,
            col,
            line,
            first,
            out,
            m,
            n,
            k,
            lines,
            blocks * height * width,
            part_steps,
            g.stride(0),
            v.stride(0),
            OUT=height,
            IN=width,
            FLOAT=kind == "float",
            GRAD_COLUMNS=narrow[0],
            X_COLUMNS=narrow[1],
            **tile.options(),
        )
        return out[0] if splits == 1 else out.sum(0)

    with on_device(grad):
        if tile is None:
            depth = ceil_div(blocks * width, lines)
            tiles = values_candidates(architecture(device), kind, height, width, depth)
            key = (power_of_two(m), n, k, height, width, power_of_two(blocks), grad.dtype, x.dtype)
            tile = pick("block_sparse_grad_values", key, tiles, device, run)
        return run(tile)


# ------------------------------------------------------------------------------------------- compiling

_TYPES = {
    "a_scale": "*fp32",
    "bias": "*fp32",
    "weight_scale": "*fp32",
    **dict.fromkeys(("order", "begins", "ends", "across", "blocks"), "*i32"),
    **dict.fromkeys(("starts", "unit_line", "unit_first"), "*i32"),
    **dict.fromkeys(("M", "N", "K", "inputs", "lines", "stored", "a_stride"), "i32"),
    **dict.fromkeys(("size", "part_steps", "grad_stride", "x_stride"), "i32"),
}
_UNALIGNED = ("M", "lines", "stored", "size", "part_steps")
_ELEMENTS = {
    "int8": ("*i8", "*i8", "*bf16"),
    "half": ("*bf16",) * 3,
    "split": ("*bf16",) * 3,
    "float": ("*fp32",) * 3,
}
"""Of x, the values and the output."""
_DTYPES = {"int8": torch.int8, "half": torch.bfloat16, "split": torch.bfloat16, "float": torch.float32}


def _compilation(
    name: str,
    kernel: Any,
    tile: Tile,
    architecture: int,
    types: dict[str, str],
    cores: bool,
    **constants: object,
) -> Compilation:
    given = {**_TYPES, **types}
    arguments = [a for a in kernel.arg_names if a not in constants and a not in tile.sizes]
    return Compilation(
        f"block_sparse_linear {name}",
        kernel,
        {a: given[a] for a in arguments},
        constants,
        tile,
        aligned=[a for a in arguments if a not in _UNALIGNED and given[a][0] in "*i"],
        tensor_cores=cores,
        fp_fusion=not constants.get("INT8", False),
        architectures=(80 if architecture == 86 else architecture,),
        roomy=architecture == 80,
    )


def _product_compilation(
    kind: str,
    plan: Plan,
    architecture: int,
    shape: tuple[int, int],
    transposed: bool,
    elements: tuple[str, str, str] | None = None,
) -> Compilation:
    x, values, out = elements or _ELEMENTS[kind]
    scaled = kind == "float" and transposed  # int8 values with their scales
    types = {"a": x, "values": "*i8" if scaled else values, "out": out}
    (outputs, inputs), sizes = shape, plan.sizes
    constants: dict[str, object] = {"EVEN": True}
    if plan.form == "gathered":
        constants["COLUMNS"] = _narrow(_DTYPES[kind], inputs, sizes["BLOCK_M"])
    else:
        constants["TMA"] = plan.form == "tma"
    if plan.form == "tma":
        box = (sizes["BLOCK_K"], sizes["BLOCK_N"]) if transposed else (sizes["BLOCK_N"], sizes["BLOCK_K"])
        types["a"] = f"tensordesc<{x[1:]}[{sizes['BLOCK_M']}, {sizes['BLOCK_K']}]>"
        types["values"] = f"tensordesc<{values[1:]}[{box[0]}, {box[1]}]>"
    return _compilation(
        f"{plan.form} {kind} {x} {shape} {'transposed' * transposed}",
        gathered_kernel if plan.form == "gathered" else blocks_kernel,
        plan,
        architecture,
        types,
        kind != "float",
        OUT=outputs,
        IN=inputs,
        TRANSPOSED=transposed,
        INT8=kind == "int8",
        FLOAT=kind == "float",
        SCALED=scaled,
        PARTS=3 if kind == "split" else 1,
        BIAS=not transposed,
        ACT_FN=None if transposed else "gelu",
        **constants,
    )


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles: every tile of the tables, at shapes that use it."""
    found: dict[tuple[object, ...], Compilation] = {}

    def add(one: Compilation) -> None:
        key = (one.kernel, str(one.tile), *one.constants.items(), *one.types.items(), one.architectures)
        found.setdefault(key, one)

    split = Tile({"BLOCK": 2048}, num_warps=4, num_stages=1)
    types = {"values": "*fp32", "parts": "*bf16"}
    add(_compilation("split", split_kernel, split, 90, types, False))
    for gpu in (86, 80, 90, 100):  # what sm_86 has in common with sm_80 is held to sm_86's shared memory
        for kind in ("half", "int8", "split", "float"):
            square = ((128, 128), (64, 64), (32, 32))
            for outputs, inputs in (*square, *(() if kind == "split" else ((16, 16), (8, 1), (8, 4)))):
                few = () if outputs == 64 else (64,) if kind == "split" else (8, 64)
                for m in (*few, 4096):
                    for plan in candidates(gpu, 100, kind, m, 64, outputs, inputs, 1024, True, True, True):
                        add(_product_compilation(kind, plan, gpu, (outputs, inputs), False))
            for outputs, inputs in () if kind == "int8" else (*square, (1, 8)):
                for plan in candidates(gpu, 100, kind, 4096, 64, outputs, inputs, 1024, True, True, True):
                    add(_product_compilation(kind, plan, gpu, (outputs, inputs), True))
            if kind == "half":  # all but the type is as for bfloat16
                forward = itertools.product(((128, 128), (8, 1)), (8, 4096), (False,))
                for shape, m, transposed in (*forward, ((128, 128), 4096, True), ((1, 8), 4096, True)):
                    for plan in candidates(gpu, 100, kind, m, 64, *shape, 1024, True, True, True):
                        add(_product_compilation(kind, plan, gpu, shape, transposed, ("*fp16",) * 3))
            for height, width in (*square, (8, 1)) if kind in ("half", "float") else ():
                fp16 = ("*fp16",) if kind == "half" and width == 128 else ()
                tiles = values_candidates(gpu, kind, height, width, 1024)
                for x, tile in itertools.product((_ELEMENTS[kind][0], *fp16), tiles):
                    add(
                        _compilation(
                            f"values {kind} {x} {(height, width)}",
                            grad_values_kernel,
                            tile,
                            gpu,
                            {"grad": x, "x": x, "out": "*fp32"},
                            kind == "half",
                            OUT=height,
                            IN=width,
                            FLOAT=kind == "float",
                            GRAD_COLUMNS=_narrow(_DTYPES[kind], height, 64),
                            X_COLUMNS=_narrow(_DTYPES[kind], width, 64),
                        )
                    )
    return list(found.values())
