"""``int4_linear``: codes unpacked on their way into tensor cores. Page: ``reference/int4_linear.py``.

A program multiplies BLOCK_N outputs by BLOCK_M rows of x, as W · xᵀ: tensor cores take their first operand
from registers, where the unpacked weights are. The type of x makes the form:

- *float16, bfloat16*: codes are small integers in x's type, exact, and so is every product. A group's sum is
  multiplied by its scale in float32: no weight is rounded to 16 bits. A table's value is two numbers of x's
  type, which hold 16 (in float16 22) of its bits.
- *int8* (rows quantized by ``int8_linear``'s kernel): exact integer sums per segment, then the page's
  multiply-adds in their order. The reference's bits, unless K is split.
- *float32*: weights in float32, products on the ordinary cores.

Many rows of 16 bits are multiplied by dense weights that are made for the call (``dequantized.py``): there
each weight is rounded once to x's type. Many rows of int8 are multiplied by codes that are spread to int8 for
the call, segment by segment, with the same multiply-adds and bits: unpacking is done once, not by every tile
of rows, and both operands come from shared memory.

The canonical codes are read as they are: byte i of a row holds columns 2i (low nibble) and 2i + 1. x is
taken apart into even and odd columns, each multiplied by its nibbles; or, where many rows of 16 bits are
better left in shared memory, nibbles are put in order (NATURAL). Where tiles are too few for the GPU, K is
split: programs leave float32 partial sums, and the last to arrive at a tile adds them in the order of K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lissom._counters import counters as arrival_counters
from lissom.formats import Int4Weights

from .dequantized import dense_int4, outputs_at_a_time, product
from .int8_linear import _row_tile, arrive, halves, magnitude, place, quantize, quantize_kernel, rates
from .numerics import activate, constant
from .tiles import Compilation, Tile, architecture, ceil_div, launch, on_device, pick, power_of_two

__all__ = ["Plan", "candidates", "compilations", "int4_linear"]

NONE, FOLDED, SUMMED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Zero-points: none; taken off the codes (8-bit integers; float32 x); any number, times the sum of x."""

PER_OUTPUT, PER_GROUP = tl.constexpr(1), tl.constexpr(2)
"""Tables; 0: none."""

PIECE = tl.constexpr(32)
"""Rows of x that an epilogue finishes at once, where a tile has many."""

SMALLEST, LARGEST = tl.constexpr(0x00800000), tl.constexpr(0x71800000)
"""2^-126 and 2^100 as bits: what a power of two is kept within, so that a few bits more do not overflow."""

SHRUNK = tl.constexpr(2.0**-7)
"""Sums of x are sums of x/128, which are finite where x is."""


# ------------------------------------------------------------------------------------------- unpacking
#
# PTX takes four bytes of codes at a time ($n of four neighbours lie in one register) and gives the low and
# the high nibbles as numbers of x's type. A nibble is one where it is the end of a significand: 128 + q in
# bfloat16 (0x4300 | q), 1024 + q in float16 (0x6400 | q), or 64 + q with the nibble 4 bits up, times 1/16.
# What is fused below is exact: it makes no rounding.


def _sixteen_bits(convert: Callable[[str, bool, int], str]) -> tl.constexpr:
    """Nibbles in halves of registers t and u, then ``convert(register, high, place)`` into $0 to $3."""
    spread = "prmt.b32 {0}, $4, 0, {1};"
    low = [spread.format("t", "0x4140"), convert("t", False, 0), spread.format("u", "0x4342")]
    low += [convert("u", False, 1), convert("t", True, 0), convert("u", True, 1)]
    return tl.constexpr("{ .reg .b32 t, u, v, f;" + "".join(low) + "}")


def _bfloat16(zero: bool) -> tl.constexpr:
    """``(128 + q) e - 136 e`` with e a power of two: $5, $6 hold 128 e, $7, $8 the other term.

    With sums of numbers as large as the weights, nothing overflows or vanishes that would not in x · w, and e
    costs nothing. With a zero-point ``(8 - z) e`` comes on top ($9, $10); 128 + z would not fit into 8 bits.
    """

    def convert(register: str, high: bool, place: int) -> str:
        shift = f"shr.b32 v, {register}, 4;" if high else ""
        out = f"${place + 2 * high}"
        text = f"{shift} lop3.b32 v, {'v' if high else register}, 0x000F000F, ${5 + place}, 0xEA;"
        text += "mov.b32 f, 0x3F803F80;"  # 1, 1
        if zero:
            text += f"fma.rn.bf16x2 v, v, f, ${7 + place}; fma.rn.bf16x2 {out}, v, f, ${9 + place};"
        else:
            text += f"fma.rn.bf16x2 {out}, v, f, ${7 + place};"
        return text

    return _sixteen_bits(convert)


def _float16(register: str, high: bool, place: int) -> str:
    """``q - z``: $5, $6 hold -(1024 + z), and $7, $8 -(64 + z) for high nibbles."""
    mask, factor, term = ("0x00F000F0", "0x2C002C00", 7) if high else ("0x000F000F", "0x3C003C00", 5)
    text = f"lop3.b32 v, {register}, {mask}, 0x64006400, 0xEA; mov.b32 f, {factor};"
    return text + f"fma.rn.f16x2 ${place + 2 * high}, v, f, ${term + place};"


BFLOAT16, BFLOAT16_ZERO, FLOAT16 = _bfloat16(False), _bfloat16(True), _sixteen_bits(_float16)

# 16 (q - 8) as int8: the nibble with its first bit flipped, in the upper half of the byte. 0x6A: (a & b) ^ c.
INT8 = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;"
    "lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }"
)


def _look_up(planes: int) -> tl.constexpr:
    """Entries of a table of 16 by ``prmt``, which picks four bytes out of eight by four nibbles.

    A plane is one byte of each entry, in 4 registers: two picks with the nibbles' last three bits and one
    that chooses between them by the first. Outputs are bytes (1 plane) or pairs of them (2).

    Operands: outputs, codes, row, 4 registers a plane, all but codes once for each of the 4 elements. The
    table of the first serves all four: should a compiler ever put elements of different rows together, the
    kernel stops ("trap") rather than mixing tables. Where it does not, ptxas finds nothing to compare.
    """
    code, row = 2 * planes, 2 * planes + 1
    entry = [f"${row + 4 + 4 * i}" for i in range(4 * planes)]
    text = "{ .reg .pred p; .reg .b32 s, c, a, b;"
    text += "".join(f".reg .b32 l{plane}, h{plane};" for plane in range(planes))
    text += "".join(f"setp.ne.b32 p, ${row}, ${row + i}; @p trap;" for i in (1, 2, 3))
    for half, name in enumerate("lh"):  # bytes 0, 1 and 2, 3: columns 0 to 3 and 4 to 7
        text += f"shr.b32 s, ${code}, {16 * half};"
        text += "shr.b32 c, s, 1; and.b32 s, s, 0x77777777;"
        text += "lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;"
        for plane in range(planes):
            first, second, third, fourth = entry[4 * plane : 4 * plane + 4]
            text += f"prmt.b32 a, {first}, {second}, s; prmt.b32 b, {third}, {fourth}, s;"
            text += f"prmt.b32 {name}{plane}, a, b, c;"
    if planes == 1:
        text += "prmt.b32 $0, l0, h0, 0x6420; prmt.b32 $1, l0, h0, 0x7531;"
    else:
        text += "prmt.b32 $0, l0, l1, 0x6240; prmt.b32 $1, h0, h1, 0x6240;"
        text += "prmt.b32 $2, l0, l1, 0x7351; prmt.b32 $3, h0, h1, 0x7351;"
    return tl.constexpr(text + "}")


LOOK_UP_BYTES, LOOK_UP_PAIRS = _look_up(1), _look_up(2)
BYTES_OPERANDS = tl.constexpr("=r,=r," + ",".join(["r"] * (1 + 4 + 16)))
PAIRS_OPERANDS = tl.constexpr("=r,=r,=r,=r," + ",".join(["r"] * (1 + 4 + 32)))


@triton.jit
def unpack_bfloat16(codes, unit, zero, ZERO: tl.constexpr):
    """(q - 8) · unit of the low and of the high nibbles, or (q - zero) · unit; unit is a power of two."""
    magic = (unit * 128.0).to(tl.bfloat16)[:, None]
    offset = (unit * -136.0).to(tl.bfloat16)[:, None]
    if ZERO == FOLDED:
        more = (unit * (8.0 - zero)).to(tl.bfloat16)[:, None]
        low, high = tl.inline_asm_elementwise(
            BFLOAT16_ZERO,
            "=r,=r,=r,=r,r,r,r,r,r,r,r",
            [codes, magic, offset, more],
            (tl.bfloat16, tl.bfloat16),  # written out in each call: Triton 3.8 takes no constant for it
            True,
            4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            BFLOAT16,
            "=r,=r,=r,=r,r,r,r,r,r",
            [codes, magic, offset],
            (tl.bfloat16, tl.bfloat16),
            True,
            4,
        )
    return low, high


@triton.jit
def unpack_float16(codes, zero, ZERO: tl.constexpr):
    """q - 8 of the low and of the high nibbles, or q - zero."""
    base = zero if ZERO == FOLDED else constant(zero, 8.0)
    low_offset, high_offset = (-1024.0 - base).to(tl.float16)[:, None], (-64.0 - base).to(tl.float16)[:, None]
    return tl.inline_asm_elementwise(
        FLOAT16,
        "=r,=r,=r,=r,r,r,r,r,r",
        [codes, low_offset, high_offset],
        (tl.float16, tl.float16),
        True,
        4,
    )


@triton.jit
def unpack_int8(codes):
    """16 (q - 8) of the low and of the high nibbles."""
    return tl.inline_asm_elementwise(INT8, "=r,=r,r", [codes], (tl.int8, tl.int8), True, 4)


# ------------------------------------------------------------------------------------------- tables


@triton.jit
def plane(values):
    """Bytes [outputs, 16] in four registers an output."""
    shifted = (values & 255) << ((tl.arange(0, 16) % 4) * 8)[None, :]
    words = tl.sum(tl.reshape(shifted, (values.shape[0], 4, 4)), 2)
    left, right = halves(words)
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def look_up_bytes(codes, table):
    """int8 entries of the low and of the high nibbles; ``table`` as ``plane`` gives it."""
    row = tl.arange(0, codes.shape[0])[:, None]
    a, b, c, d = table
    return tl.inline_asm_elementwise(
        LOOK_UP_BYTES,
        BYTES_OPERANDS,
        [codes, row, a[:, None], b[:, None], c[:, None], d[:, None]],
        (tl.int8, tl.int8),
        True,
        4,
    )


@triton.jit
def look_up_pairs(codes, first, last, KIND: tl.constexpr):
    """Entries of 16 bits; ``first`` and ``last`` are planes of their two bytes."""
    row = tl.arange(0, codes.shape[0])[:, None]
    a, b, c, d = first
    e, f, g, h = last
    operands = [codes, row, a[:, None], b[:, None], c[:, None], d[:, None]]
    operands += [e[:, None], f[:, None], g[:, None], h[:, None]]
    if KIND == tl.float16:  # noqa: SIM300
        low, high = tl.inline_asm_elementwise(
            LOOK_UP_PAIRS, PAIRS_OPERANDS, operands, (tl.float16, tl.float16), True, 4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            LOOK_UP_PAIRS, PAIRS_OPERANDS, operands, (tl.bfloat16, tl.bfloat16), True, 4
        )
    return low, high


@triton.jit
def prepare(table, KIND: tl.constexpr):
    """What is looked up, for x of type KIND, and the scale of it: from a pointer per output.

    int8: the page's entries. 16 bits: two numbers whose sum an entry is, but for its last 8 bits (2 in
    float16), after a power of two has brought the table's largest to 2^-8, so that no group's sum overflows
    where x · w do not; in float16 to 2^13, so that the second number is precise.
    """
    values = tl.load(table[:, None] + tl.arange(0, 16)[None, :])
    top = tl.max(magnitude(values), 1)
    if KIND == tl.int8:  # noqa: SIM300
        inverse, scale, finite = rates(top, table, False)
        entries = plane(quantize(values, inverse, finite, False).to(tl.int32))
        return entries, entries, entries, entries, scale
    else:
        target: tl.constexpr = 13 << 23 if KIND == tl.float16 else -8 << 23  # noqa: SIM300
        exponent = tl.minimum(tl.maximum(top & 0x7F800000, 14 << 23), 245 << 23)
        unit = (0x7F000000 - exponent + target).to(tl.float32, bitcast=True)
        values = values * unit[:, None]
        first = values.to(KIND)
        second = (values - first.to(tl.float32)).to(KIND)
        first_bits = first.to(tl.int16, bitcast=True).to(tl.int32)
        second_bits = second.to(tl.int16, bitcast=True).to(tl.int32)
        scale = (exponent - target).to(tl.float32, bitcast=True)
        return plane(first_bits), plane(first_bits >> 8), plane(second_bits), plane(second_bits >> 8), scale


# ------------------------------------------------------------------------------------------- products


@triton.jit
def multiply(low, high, x, total, NATURAL: tl.constexpr):
    """Weights [BLOCK_N, 2 C] times xᵀ, x [BLOCK_M, 2 C]; low and high nibbles are even and odd columns."""
    kind: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    if NATURAL:
        w = tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))
        total = tl.dot(w, x.T, total, input_precision="ieee", out_dtype=kind)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], low.shape[1], 2)))
        total = tl.dot(low, even.T, total, input_precision="ieee", out_dtype=kind)
        total = tl.dot(high, odd.T, total, input_precision="ieee", out_dtype=kind)
    return total


@triton.jit
def scaled(group, scale, total):
    """total + group · scale, a scale per output."""
    return tl.fma(group, tl.broadcast_to(scale[:, None], group.shape), total)


@triton.jit
def sum_rows(codes, x, sums, total, GIVEN: tl.constexpr, NATURAL: tl.constexpr):
    """Sums of x over a group's columns, for every output: multiplied out, or spread where they are GIVEN."""
    if GIVEN:
        result = tl.broadcast_to(sums[None, :], total.shape)
    elif x.dtype == tl.int8:
        ones = tl.full(codes.shape, 1, tl.int8)
        result = multiply(ones, ones, x, tl.zeros(total.shape, tl.int32), NATURAL).to(tl.float32)
    else:
        ones = tl.full(codes.shape, SHRUNK, tl.float32).to(x.dtype)
        result = multiply(ones, ones, x, tl.zeros(total.shape, tl.float32), NATURAL)
    return result


@triton.jit
def add_half(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    sums,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """total + a group's part, float16 or bfloat16."""
    group = tl.zeros(total.shape, tl.float32)
    if TABLE:
        first_low, first_high, second_low, second_high, table_scale = table
        low, high = look_up_pairs(codes, first_low, first_high, x.dtype)
        group = multiply(low, high, x, group, NATURAL)
        low, high = look_up_pairs(codes, second_low, second_high, x.dtype)
        group = multiply(low, high, x, group, NATURAL)
        total = scaled(group, scale * table_scale, total)
    else:
        if x.dtype == tl.float16:
            unit, rest = constant(scale, 1.0), scale
            low, high = unpack_float16(codes, zero, ZERO)
        else:
            exponent = tl.minimum(tl.maximum(magnitude(scale) & 0x7F800000, SMALLEST), LARGEST)
            unit = exponent.to(tl.float32, bitcast=True)
            rest = scale * (0x7F000000 - exponent).to(tl.float32, bitcast=True)
            low, high = unpack_bfloat16(codes, unit, zero, ZERO)
        group = multiply(low, high, x, group, NATURAL)
        if ZERO == SUMMED:
            offset = (8.0 - zero) * unit * (1 / SHRUNK)
            group = scaled(sum_rows(codes, x, sums, total, GIVEN, NATURAL), offset, group)
        total = scaled(group, rest, total)
    return total


@triton.jit
def add_int8(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    sums,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """total + a segment's part, int8: the page's multiply-adds, without a table those of 16 times the sums.

    A power of two changes no rounding; ``finish`` takes it away.
    """
    group = tl.zeros(total.shape, tl.int32)
    if TABLE:
        entries, _, _, _, table_scale = table
        low, high = look_up_bytes(codes, entries)
        scale = scale * table_scale
    else:
        low, high = unpack_int8(codes)
    total = scaled(multiply(low, high, x, group, NATURAL).to(tl.float32), scale, total)
    if ZERO == SUMMED:
        offset = (scale * (8.0 - zero)) * 16.0
        total = scaled(sum_rows(codes, x, sums, total, GIVEN, NATURAL), offset, total)
    return total


@triton.jit
def add_single(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """total + a group's part, float32: the page's weights. ``table`` is a pointer per output."""
    scale = tl.broadcast_to(scale[:, None], codes.shape)
    if TABLE:
        low = tl.load(table[:, None] + (codes & 15).to(tl.int32)) * scale
        high = tl.load(table[:, None] + (codes >> 4).to(tl.int32)) * scale
    else:
        offset = tl.zeros(codes.shape, tl.float32)
        if ZERO != NONE:
            offset = scale * tl.broadcast_to((8.0 - zero)[:, None], codes.shape)
        low = tl.fma((codes & 15).to(tl.float32) - 8.0, scale, offset)
        high = tl.fma((codes >> 4).to(tl.float32) - 8.0, scale, offset)
    return multiply(low, high, x, total, NATURAL)


@triton.jit
def add(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    sums,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """total + what a group of columns gives; scale, zero, table: per output; sums: of x, per row."""
    if x.dtype == tl.int8:
        total = add_int8(total, codes, x, scale, zero, table, sums, ZERO, TABLE, GIVEN, NATURAL)
    elif x.dtype == tl.float32:
        total = add_single(total, codes, x, scale, zero, table, ZERO, TABLE, GIVEN, NATURAL)
    else:
        total = add_half(total, codes, x, scale, zero, table, sums, ZERO, TABLE, GIVEN, NATURAL)
    return total


@triton.jit
def add_2(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    sums,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Two groups: scale, zero [BLOCK_N, 2]."""
    codes_0, codes_1 = halves(codes)
    x_0, x_1 = halves(x)
    scale_0, scale_1 = tl.split(scale)
    zero_0, zero_1 = tl.split(zero)
    total = add(total, codes_0, x_0, scale_0, zero_0, table, sums, ZERO, TABLE, GIVEN, NATURAL)
    return add(total, codes_1, x_1, scale_1, zero_1, table, sums, ZERO, TABLE, GIVEN, NATURAL)


@triton.jit
def add_4(
    total,
    codes,
    x,
    scale,
    zero,
    table,
    sums,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Four groups: scale, zero [BLOCK_N, 4]."""
    codes_0, codes_1 = halves(codes)
    x_0, x_1 = halves(x)
    scale_0, scale_1 = halves(scale)
    zero_0, zero_1 = halves(zero)
    total = add_2(total, codes_0, x_0, scale_0, zero_0, table, sums, ZERO, TABLE, GIVEN, NATURAL)
    return add_2(total, codes_1, x_1, scale_1, zero_1, table, sums, ZERO, TABLE, GIVEN, NATURAL)


@triton.jit
def load_terms(weight_scale, zero_point, row, group, groups, ZERO: tl.constexpr, PER: tl.constexpr):
    """Scales and zero-points of PER groups from ``group`` on, 0 past the last, as float32."""
    at = row.to(tl.int64) * groups
    if PER == 1:
        at += group
        inside = row * 0 + group < groups
    else:
        inside = group + tl.arange(0, PER)[None, :] < groups
        at = at[:, None] + group + tl.arange(0, PER)[None, :]
    scale = tl.load(weight_scale + at, mask=inside, other=0.0).to(tl.float32)
    zero = scale
    if ZERO != NONE:
        zero = tl.load(zero_point + at, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def finish(
    total,
    row,
    column,
    x_scale,
    bias,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    INT8: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Epilogue of sums [rows, columns]."""
    offset = tl.zeros(total.shape, tl.float32)
    if BIAS:
        offset += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if INT8:
        scale = tl.load(x_scale + row, mask=row < M, other=0.0)
        total = total if TABLE else total * 0.0625
        y = tl.fma(total, tl.broadcast_to(scale[:, None], total.shape), offset)
    else:
        y = total + offset
    y = activate(y, ACT_FN)
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["M", "splits", "steps"])
def linear_kernel(
    x,
    x_scale,
    sums,
    qweight,
    weight_scale,
    zero_point,
    codebook,
    bias,
    out,
    partial,
    counters,
    M,
    N,
    K,
    row_stride,
    code_stride,
    groups,
    table_row,
    table_group,
    splits,
    steps,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    PER: tl.constexpr,
    GIVEN: tl.constexpr,
    NATURAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the output, or with SPLIT the share of it that ``steps`` blocks of K give.

    K is rounded up to a multiple of 32. PER segments make a block of it; EVEN: it is a multiple of that.
    ONE_GROUP: every segment has the first's terms. GIVEN: ``sums`` are read.
    """
    BLOCK_K: tl.constexpr = SEGMENT * PER
    tile = tl.program_id(0)
    tile_row, tile_column = place(tile, M, N, BLOCK_M, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.minimum(column, N - 1)  # past the edge the last is read again: no mask, and nothing is stored
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))

    k, byte = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    x_at = x + row.to(tl.int64)[:, None] * row_stride + (first * BLOCK_K + k)[None, :]
    code_at = qweight + output.to(tl.int64)[:, None] * code_stride + (first * (BLOCK_K // 2) + byte)[None, :]
    sums_at = sums + first.to(tl.int64) * M + row
    used = (row < M)[:, None]
    table_at = codebook + output.to(tl.int64) * table_row
    table = table_at
    if TABLE == PER_OUTPUT and x.dtype.element_ty != tl.float32:
        table = prepare(table_at, x.dtype.element_ty)
    segment = 0 if ONE_GROUP else first * PER
    scale, zero = load_terms(weight_scale, zero_point, output, segment, groups, ZERO, PER)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        if EVEN:
            codes = tl.load(code_at)
            rows = tl.load(x_at, mask=used, other=0)
        else:
            codes = tl.load(code_at, mask=(step * (BLOCK_K // 2) + byte < K // 2)[None, :], other=0)
            rows = tl.load(x_at, mask=used & (step * BLOCK_K + k < K)[None, :], other=0)
        # The next block's terms are on their way while this one's are used.
        segment = 0 if ONE_GROUP else (step + 1) * PER
        next_scale, next_zero = load_terms(weight_scale, zero_point, output, segment, groups, ZERO, PER)
        row_sums = scale
        if GIVEN:
            row_sums = tl.load(sums_at, mask=row < M, other=0.0)
        if TABLE == PER_GROUP:
            group_at = table_at + (0 if ONE_GROUP else step) * table_group
            group_table = (
                group_at if x.dtype.element_ty == tl.float32 else prepare(group_at, x.dtype.element_ty)
            )
        else:
            group_table = table
        if PER == 1:
            total = add(total, codes, rows, scale, zero, group_table, row_sums, ZERO, TABLE, GIVEN, NATURAL)
        elif PER == 2:
            total = add_2(total, codes, rows, scale, zero, group_table, row_sums, ZERO, TABLE, GIVEN, NATURAL)
        else:
            total = add_4(total, codes, rows, scale, zero, group_table, row_sums, ZERO, TABLE, GIVEN, NATURAL)
        scale, zero = next_scale, next_zero
        x_at += BLOCK_K
        sums_at += M
        code_at += BLOCK_K // 2
    INT8: tl.constexpr = x.dtype.element_ty == tl.int8
    if SPLIT:
        inner = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
        mine = partial + tile.to(tl.int64) * splits * (BLOCK_M * BLOCK_N) + inner
        inside = (column < N)[:, None] & (row < M)[None, :]
        tl.store(mine + tl.program_id(1) * (BLOCK_M * BLOCK_N), total, mask=inside)
        if arrive(counters + tile, splits):
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in range(splits):  # in the order of K, whoever comes last
                at = mine + part * (BLOCK_M * BLOCK_N)
                total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
            finish(total.T, row, column, x_scale, bias, out, M, N, BIAS, ACT_FN, INT8, TABLE)
    else:
        finish(total.T, row, column, x_scale, bias, out, M, N, BIAS, ACT_FN, INT8, TABLE)


@triton.jit(do_not_specialize=["M"])
def sums_kernel(
    x,
    sums,
    M,
    K,
    row_stride,
    sums_stride,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of each row's segment: of int8 as it is, of floating point divided by 128; float32 [S, M]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    segment = tl.program_id(1)
    k = segment * SEGMENT + tl.arange(0, SEGMENT)
    inside = (row < M)[:, None] & (k < K)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * row_stride + k[None, :], mask=inside, other=0)
    if x.dtype.element_ty == tl.int8:
        total = tl.sum(value.to(tl.int32), 1).to(tl.float32)
    else:
        total = tl.sum(value.to(tl.float32) * SHRUNK, 1)
    tl.store(sums + segment.to(tl.int64) * sums_stride + row, total, mask=row < M)


@triton.jit(do_not_specialize=["count"])
def spread_kernel(
    qweight,
    weight_scale,
    zero_point,
    codebook,
    spread,
    scales,
    offsets,
    K,
    first,
    count,
    code_stride,
    groups,
    table_row,
    table_group,
    spread_stride,
    terms_stride,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What int8 is multiplied by, for ``count`` outputs from ``first`` on.

    Args:
        spread: int8 [count, segments · SEGMENT]: q - 8, or entries of tables.
        scales: float32 [segments, count and more], with those of tables in them.
        offsets: likewise, what sums of x are multiplied by; only with SUMMED zero-points.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    output = first + tl.minimum(row, count - 1)
    byte = segment * (SEGMENT // 2) + tl.arange(0, SEGMENT // 2)
    at = qweight + output.to(tl.int64)[:, None] * code_stride + byte[None, :]
    codes = tl.load(at, mask=(byte < K // 2)[None, :], other=0)  # where x is 0, past K
    group = segment * 0 if ONE_GROUP else segment
    scale, zero = load_terms(weight_scale, zero_point, output, group, groups, ZERO, 1)
    if TABLE:
        table = codebook + output.to(tl.int64) * table_row + group * table_group
        entries, _, _, _, table_scale = prepare(table, tl.int8)
        low, high = look_up_bytes(codes, entries)
        scale = scale * table_scale
    else:
        low, high = (codes & 15).to(tl.int8) - 8, (codes >> 4).to(tl.int8) - 8
    values = tl.reshape(tl.join(low, high), (ROWS, SEGMENT))
    inside = row < count
    k = segment * SEGMENT + tl.arange(0, SEGMENT)
    to = spread + row.to(tl.int64)[:, None] * spread_stride + k[None, :]
    tl.store(to, values, mask=inside[:, None])
    tl.store(scales + segment.to(tl.int64) * terms_stride + row, scale, mask=inside)
    if ZERO == SUMMED:
        tl.store(offsets + segment.to(tl.int64) * terms_stride + row, scale * (8.0 - zero), mask=inside)


@triton.jit
def finish_piece(total, first, column, x_scale, bias, out, M, N, BIAS: tl.constexpr, ACT_FN: tl.constexpr):
    row = first + tl.arange(0, total.shape[1])
    finish(total.T, row, column, x_scale, bias, out, M, N, BIAS, ACT_FN, True, True)


@triton.jit
def finish_1(total, first, column, x_scale, bias, out, M, N, BIAS: tl.constexpr, ACT_FN: tl.constexpr):
    """``finish_2`` for up to 2 pieces; Triton 3.4 has no recursion."""
    if total.shape[1] > PIECE:
        one, other = halves(total)
        finish_piece(one, first, column, x_scale, bias, out, M, N, BIAS, ACT_FN)
        finish_piece(other, first + one.shape[1], column, x_scale, bias, out, M, N, BIAS, ACT_FN)
    else:
        finish_piece(total, first, column, x_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit
def finish_2(total, first, column, x_scale, bias, out, M, N, BIAS: tl.constexpr, ACT_FN: tl.constexpr):
    """Epilogue of sums [columns, rows] from row ``first`` on, in up to 4 pieces of rows.

    One at a time: registers hold the sums of a large tile, and little else.
    """
    if total.shape[1] > 2 * PIECE:
        one, other = halves(total)
        finish_1(one, first, column, x_scale, bias, out, M, N, BIAS, ACT_FN)
        finish_1(other, first + one.shape[1], column, x_scale, bias, out, M, N, BIAS, ACT_FN)
    else:
        finish_1(total, first, column, x_scale, bias, out, M, N, BIAS, ACT_FN)


@triton.jit(do_not_specialize=["M", "count", "segments"])
def segments_kernel(
    x,
    x_scale,
    sums,
    spread,
    scales,
    offsets,
    bias,
    out,
    M,
    N,
    first,
    count,
    row_stride,
    spread_stride,
    sums_stride,
    terms_stride,
    segments,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    ACT_FN: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of what ``spread_kernel`` made times x: a product and its multiply-adds for each segment.

    Rows of both have ``segments`` · SEGMENT columns. Past an edge the last row is read again, without a mask;
    terms and sums are there for whole tiles.
    """
    tile_row, tile_column = place(tl.program_id(0), M, count, BLOCK_M, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    part_column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    there, output = tl.minimum(row, M - 1), tl.minimum(part_column, count - 1)
    k = tl.arange(0, SEGMENT)
    # Where the tile begins moves on, in 64 bits; where its rows lie from there on stays, in 32.
    first_row, first_output = tile_row * BLOCK_M, tile_column * BLOCK_N
    x_at = x + first_row.to(tl.int64) * row_stride
    w_at = spread + first_output.to(tl.int64) * spread_stride
    x_in = (there - first_row)[:, None] * row_stride + k[None, :]
    w_in = (output - first_output)[:, None] * spread_stride + k[None, :]
    scale_at, offset_at, sum_at = scales + part_column, offsets + part_column, sums + row
    # Outputs come first in sums: a thread has few of them, and many rows of x.
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scale = tl.load(scale_at)
    offset = scale
    if ZERO == SUMMED:
        offset = tl.load(offset_at)
    for segment in range(segments):
        if ZERO == SUMMED:
            row_sums = tl.load(sum_at)
            sum_at += sums_stride
        group = tl.dot(tl.load(w_at + w_in), tl.load(x_at + x_in).T, out_dtype=tl.int32)
        # The next segment's terms are on their way while this one's are used.
        step = tl.where(segment + 1 < segments, terms_stride, 0)
        scale_at += step
        next_scale = tl.load(scale_at)
        total = scaled(group.to(tl.float32), scale, total)
        if ZERO == SUMMED:
            total = scaled(tl.broadcast_to(row_sums[None, :], total.shape), offset, total)
            offset_at += step
            offset = tl.load(offset_at)
        scale = next_scale
        x_at += SEGMENT
        w_at += SEGMENT
    column = tl.where(part_column < count, first + part_column, N)
    finish_2(total, first_row, column, x_scale, bias, out, M, N, BIAS, ACT_FN)


# ------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Plan(Tile):
    """How one call is computed.

    Attributes:
        natural: nibbles are put in order, rather than x taken apart.
        programs: how many a multiprocessor is to be given, where K is split.
        dense: ``dequantized.py``'s, whose product is torch's.
        spread: int8 only: by ``segments_kernel``.
    """

    natural: bool = False
    programs: int = 1
    dense: bool = False
    spread: bool = False

    def __str__(self) -> str:
        if self.dense:
            return "dense"
        if self.spread:
            return f"spread {super().__str__()}"
        order = "natural" if self.natural else "apart"
        return f"{order} {super().__str__()} programs={self.programs}"


def _apart(m: int, n: int, warps: int, stages: int, programs: int = 1) -> Plan:
    return Plan({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, False, programs)


def _natural(m: int, n: int, warps: int, stages: int, programs: int = 1) -> Plan:
    return Plan({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, True, programs)


def _spread(m: int, n: int, warps: int, stages: int) -> Plan:
    return Plan({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, spread=True)


DENSE = Plan({}, dense=True)

LEAST_DENSE_ROWS = {"ampere": 257, "hopper": 65, "blackwell": 65}
"""From which weight-only products are by dense weights. On an H200 (bench/results/gpu-nvidia-h200-int4.md)
they take 0.50 to 0.57 of the unpacking kernels' time at 256 rows, 0.3 at 4096. At 65 rows they take 0.96
(4096 x 4096) to 1.36 times (8192 x 28672) what those take at 64, where those begin a second tile of rows.
By count elsewhere: an A100 has a third of the bandwidth, and two fifths of the products a second."""

LEAST_SPREAD_ROWS = {"ampere": 257, "hopper": 129, "blackwell": 129}
"""From which int8 products are by spread codes, by count, not yet measured. 8192 x 8192 codes are spread in
the time of 100 MB of memory traffic, 24 us on an H200. Then a segment of 128 of a 128 x 128 tile is 512
cycles of tensor cores and 430 of other instructions, 1000 together, or half of int8's peak, which is
bfloat16's; kernels that unpack on the way reached 0.37 to 0.44 of cuBLAS's speed
(bench/results/gpu-nvidia-h200.md)."""

_SPREAD_LIGHT = {
    512: [_spread(64, 128, 4, 4), _spread(128, 128, 8, 4)],
    0: [_spread(128, 128, 8, 4), _spread(64, 128, 4, 4)],
}
_SPREAD = {
    "ampere": {0: [_spread(128, 128, 8, 3), _spread(64, 128, 4, 3)]},
    "ampere heavy": {0: [_spread(64, 128, 4, 3)]},
    "hopper": _SPREAD_LIGHT,
    "hopper heavy": {
        512: [_spread(64, 128, 4, 4), _spread(64, 256, 8, 4)],
        0: [_spread(64, 256, 8, 4), _spread(64, 128, 4, 4)],
    },
    "blackwell": _SPREAD_LIGHT,
    "blackwell heavy": {0: [_spread(64, 128, 4, 4)]},
}
"""By rows, as below. A 128 x 128 tile takes 32 bytes of the L2 cache a cycle; smaller ones more, but few rows
have more of them. Sums of x ("heavy") beside a tile of 128 x 128 are more than registers hold."""

LEAST_ROWS = 8 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6) else 16
"""Of a tile; Triton 3.4 pads none."""

# Rows up to which a list of plans serves (0: any number), and the plans, best guess first. By count, not yet
# measured. Few rows are bound by the weight's bytes: an H200 reads 38 codes a cycle and multiprocessor, which
# leaves 3.4 instructions a code. 64 outputs for 2 warps (mma.sync) take 2.6 of them for 8 rows and 3.1 for 16
# (int8: 1.3 and 1.5); the four blocks of six programs hold 96 KB under way. With four warps Triton takes
# wgmma, whose operand it loads byte by byte. From 17 rows on, tiles are as large as leave no register in
# memory; a group's sums stand beside the total. "Heavy": a table, or sums of x for zero-points that are no
# integers.
_FEW = {
    8: [_apart(LEAST_ROWS, 64, 2, 4, 6), _apart(LEAST_ROWS, 64, 2, 6, 4), _apart(LEAST_ROWS, 32, 2, 3, 8)],
    16: [_apart(16, 64, 2, 4, 6), _apart(16, 64, 2, 6, 4)],
}
_HALF = {
    **_FEW,
    32: [_natural(32, 64, 4, 4, 3)],
    64: [_natural(64, 64, 4, 3, 2)],
    256: [_natural(64, 128, 8, 3), _natural(64, 64, 4, 3, 2)],
    0: [_natural(64, 128, 8, 3)],
}
_HALF_HEAVY = {
    16: [_apart(16, 64, 4, 4, 3)],
    64: [_natural(32, 64, 4, 3, 2)],
    0: [_natural(64, 128, 8, 3), _natural(64, 64, 4, 3)],
}
_INT8 = {
    **_FEW,
    32: [_apart(32, 64, 4, 4, 3)],
    64: [_apart(64, 64, 4, 3, 2)],
    256: [_apart(64, 128, 8, 3), _apart(64, 64, 4, 3, 2)],
    0: [_apart(128, 128, 8, 3), _apart(64, 128, 8, 3)],
}
_INT8_HEAVY = {
    8: _FEW[8][:2],
    16: _FEW[16],
    32: [_apart(32, 64, 4, 4, 3)],
    64: [_apart(64, 64, 4, 3, 2)],
    0: [_apart(64, 128, 8, 3)],
}
_LARGE = [_natural(128, 128, 8, 3), _natural(64, 128, 8, 3)]
_PLANS: dict[tuple[str, str], dict[int, list[Plan]]] = {
    ("half", "ampere"): _HALF,
    ("half", "hopper"): {**_HALF, 0: _LARGE},
    ("half", "blackwell"): {**_HALF, 8: _FEW[8][:1], 16: [_apart(16, 32, 1, 4, 12)], 0: _LARGE},
    ("half heavy", "ampere"): {16: [_apart(16, 32, 2, 4, 4)], 0: [_natural(32, 64, 4, 3, 2)]},
    ("half heavy", "hopper"): _HALF_HEAVY,
    ("half heavy", "blackwell"): _HALF_HEAVY,
    ("int8", "ampere"): _INT8,
    ("int8", "hopper"): _INT8,
    ("int8", "blackwell"): _INT8,
    ("int8 heavy", "ampere"): _INT8_HEAVY,
    ("int8 heavy", "hopper"): _INT8_HEAVY,
    ("int8 heavy", "blackwell"): {**_INT8_HEAVY, 64: [_apart(64, 128, 8, 3, 2)]},
}
# float32 products on the ordinary cores: tensor cores would round x to TF32. 32 outputs a tile, since Triton
# 3.6 compiles 64 or more for sm_100 as TF32, whatever precision is asked for (triton-lang/triton#10176).
_SINGLE = {16: [_natural(16, 32, 4, 3, 4)], 64: [_natural(64, 32, 4, 3, 2)], 0: [_natural(128, 32, 8, 2)]}


def _family(architecture: int) -> str:
    """Plans of "ampere" fit into 99 KB of shared memory, which is what sm_86, sm_89 and sm_120 have."""
    if architecture < 90 or architecture >= 120:
        return "ampere"
    return "blackwell" if architecture >= 100 else "hopper"


@lru_cache(maxsize=1024)
def candidates(
    architecture: int, m: int, dtype: torch.dtype, weight_only: bool, heavy: bool
) -> tuple[Plan, ...]:
    """Plans for ``m`` rows, best guess first; ``heavy``: a table, or sums of x for zero-points."""
    family, first = _family(architecture), []
    if weight_only and dtype == torch.float32:
        table = _SINGLE
    else:
        kind = ("half" if weight_only else "int8") + (" heavy" if heavy else "")
        table = _PLANS[kind, family]
        if weight_only and m >= LEAST_DENSE_ROWS[family]:
            first = [DENSE]
        elif not weight_only and m >= LEAST_SPREAD_ROWS[family]:
            first = _of_rows(_SPREAD[family + " heavy" * heavy], m)
    return *first, *_of_rows(table, m)


def _of_rows(table: dict[int, list[Plan]], m: int) -> list[Plan]:
    return next(plans for most, plans in table.items() if m <= most or most == 0)


SPREAD = 8192
"""Codes that a program of ``spread_kernel`` has, 32 bytes of each thread."""

LEAST_STEPS = 4
"""Blocks of K that are worth a program of its own: as many as its loads run ahead."""


def _splits(plan: Plan, multiprocessors: int, m: int, n: int, steps: int) -> tuple[int, int]:
    """In how many parts ``steps`` blocks of K are cut, and how many a part has."""
    tiles = ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(n, plan.sizes["BLOCK_N"])
    splits = max(1, min(plan.programs * multiprocessors // tiles, steps // LEAST_STEPS))
    part = max(1, ceil_div(steps, splits))
    return max(1, ceil_div(steps, part)), part


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True)
class _Call:
    """Arguments, dense where a kernel wants them so."""

    rows: Tensor
    weights: Int4Weights
    bias: Tensor | None
    weight_only: bool
    act_fn: str | None
    rotated: bool
    out: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, and K rounded up."""
        return *self.out.shape, 2 * self.weights.qweight.shape[1]

    @property
    def zero(self) -> int:
        zero_point = self.weights.zero_point
        if zero_point is None:
            return NONE.value
        integers = self.weight_only and zero_point.dtype == torch.uint8
        return (
            FOLDED.value
            if integers or (self.weight_only and self.rows.dtype == torch.float32)
            else SUMMED.value
        )


def _shape(plan: Plan, segment: int, int8: bool, zero: int, table: bool) -> dict[str, int]:
    """How a plan's programs go through K: PER segments at a time, whether NATURAL, sums of x GIVEN or not.

    Few rows are summed by tensor cores, which have nothing else to do; many by a kernel of its own.
    """
    few = plan.sizes["BLOCK_M"] <= 16 and not plan.natural
    given = zero == SUMMED.value and not few
    several = few and not table and not (int8 and zero == SUMMED.value)
    return {
        "SEGMENT": segment,
        "PER": max(1, 128 // segment) if several else 1,
        "NATURAL": plan.natural or (int8 and segment < 64),  # int8 tensor cores multiply 32 columns at a time
        "GIVEN": given,
    }


def _quantize(call: _Call, step: int = 32) -> tuple[Tensor, Tensor]:
    """The rows as int8, zero past K up to a multiple of ``step``, and their scales."""
    m, k, device = call.out.shape[0], call.rows.shape[1], call.rows.device
    q = torch.empty((m, max(1, ceil_div(k, step)) * step), dtype=torch.int8, device=device)
    scale = torch.empty(m, dtype=torch.float32, device=device)
    tile = _row_tile(q.shape[1])  # the columns of zeros are written too
    launch(
        quantize_kernel,
        (ceil_div(m, tile.sizes["BLOCK_ROWS"]),),
        call.rows,
        scale,
        q,
        scale,
        scale,
        m,
        k,
        call.rows.stride(0),
        q.stride(0),
        0,
        STATIC=False,
        ROTATED=call.rotated,
        enable_fp_fusion=False,
        **tile.options(),
    )
    return q, scale


def _sum(x: Tensor, m: int, k: int, segment: int, step: int = 1) -> Tensor:
    """Sums of rows' segments, [segments, m up to a multiple of ``step``]; those of no row are not written."""
    sums = torch.empty((ceil_div(k, segment), ceil_div(m, step) * step), dtype=torch.float32, device=x.device)
    block = 4096 // segment
    if sums.numel():
        launch(
            sums_kernel,
            (ceil_div(m, block), sums.shape[0]),
            x,
            sums,
            m,
            k,
            x.stride(0),
            sums.stride(0),
            SEGMENT=segment,
            BLOCK_M=block,
            num_warps=4,
        )
    return sums


def _parts(call: _Call, plan: Plan) -> tuple[dict[str, int], int, int]:
    """How programs go through K, in how many parts it is cut, and how many blocks a part has."""
    (m, n, k), weights = call.sizes, call.weights
    shape = _shape(plan, weights.segment_size, not call.weight_only, call.zero, weights.codebook is not None)
    blocks = ceil_div(k, shape["SEGMENT"] * shape["PER"])
    if plan.spread:
        return shape, 1, blocks
    return shape, *_splits(plan, _multiprocessors(call.rows.device), m, n, blocks)


def _launch_dense(call: _Call) -> None:
    weights, book = call.weights, call.weights.codebook
    strides = (0, 0) if book is None else _table_strides(book)

    def dense(first: int, last: int, w: Tensor) -> None:
        scale, zero_point = weights.weight_scale[first:last], weights.zero_point
        zero_point = None if zero_point is None else zero_point[first:last]
        table = book if book is None or book.dim() == 1 else book[first:last]
        codes, segment = weights.qweight[first:last], weights.segment_size
        dense_int4(codes, scale, zero_point, table, strides, segment, weights.group_size == -1, w)

    product(call.rows, weights.out_features, dense, call.bias, call.act_fn, call.out)


def _launch_spread(call: _Call, plan: Plan) -> None:
    (m, n, k), weights, book = call.sizes, call.weights, call.weights.codebook
    segment, scale = weights.segment_size, weights.weight_scale
    x, x_scale = _quantize(call, segment)
    width = x.shape[1]
    segments = width // segment
    part = outputs_at_a_time(n, width)
    spread = torch.empty((part, width), dtype=torch.int8, device=x.device)
    across = ceil_div(part, plan.sizes["BLOCK_N"]) * plan.sizes["BLOCK_N"]
    terms = {"size": (segments, across), "dtype": torch.float32, "device": x.device}
    scales = offsets = sums = torch.empty(**terms)
    if call.zero == SUMMED.value:
        offsets, sums = torch.empty(**terms), _sum(x, m, width, segment, plan.sizes["BLOCK_M"])
    per_row, per_group = (0, 0) if book is None else _table_strides(book)
    rows = SPREAD // segment
    for first in range(0, n, part):
        count = min(part, n - first)
        launch(
            spread_kernel,
            (ceil_div(count, rows), segments),
            weights.qweight,
            scale,
            scale if weights.zero_point is None else weights.zero_point,
            scale if book is None else book,
            spread,
            scales,
            offsets,
            k,
            first,
            count,
            weights.qweight.stride(0),
            scale.shape[1],
            per_row,
            per_group,
            width,
            across,
            ZERO=call.zero,
            TABLE=book is not None,
            ONE_GROUP=weights.group_size == -1,
            SEGMENT=segment,
            ROWS=rows,
            enable_fp_fusion=False,
            num_warps=4,
        )
        launch(
            segments_kernel,
            (ceil_div(m, plan.sizes["BLOCK_M"]) * ceil_div(count, plan.sizes["BLOCK_N"]),),
            x,
            x_scale,
            sums,
            spread,
            scales,
            offsets,
            scale if call.bias is None else call.bias,
            call.out,
            m,
            n,
            first,
            count,
            width,
            width,
            sums.stride(0),
            across,
            segments,
            ZERO=call.zero,
            BIAS=call.bias is not None,
            ACT_FN=call.act_fn,
            SEGMENT=segment,
            enable_fp_fusion=False,  # the page rounds where it says so
            **plan.options(),
        )


def _launch(call: _Call, plan: Plan) -> None:
    if plan.dense:
        return _launch_dense(call)
    if plan.spread and call.sizes[2]:  # without columns there is nothing to spread
        return _launch_spread(call, plan)
    (m, n, k), weights = call.sizes, call.weights
    shape, splits, steps = _parts(call, plan)
    x, x_scale = (call.rows, call.out) if call.weight_only else _quantize(call)
    block_m, block_n = plan.sizes["BLOCK_M"], plan.sizes["BLOCK_N"]
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    partial = counters = call.out  # never read where K is whole
    if splits > 1:
        partial = torch.empty(tiles * splits * block_m * block_n, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x, tiles)
    scale, codebook = weights.weight_scale, weights.codebook
    per_row, per_group = (0, 0) if codebook is None else _table_strides(codebook)
    launch(
        linear_kernel,
        (tiles, splits),
        x,
        x_scale,
        _sum(x, m, k, shape["SEGMENT"]) if shape["GIVEN"] else scale,
        weights.qweight,
        scale,
        scale if weights.zero_point is None else weights.zero_point,
        scale if codebook is None else codebook,
        scale if call.bias is None else call.bias,
        call.out,
        partial,
        counters,
        m,
        n,
        k,
        x.stride(0),
        weights.qweight.stride(0),
        scale.shape[1],
        per_row,
        per_group,
        splits,
        steps,
        ZERO=call.zero,
        TABLE=weights.table_scope,
        BIAS=call.bias is not None,
        ACT_FN=call.act_fn,
        SPLIT=splits > 1,
        EVEN=k % (shape["SEGMENT"] * shape["PER"]) == 0,
        ONE_GROUP=weights.group_size == -1,
        **shape,
        enable_fp_fusion=False,  # the page rounds where it says so
        **plan.options(),
    )


def _table_strides(codebook: Tensor) -> tuple[int, int]:
    """From an output's table to the next, and from a group's."""
    if codebook.dim() == 3:
        return codebook.shape[1] * 16, 16
    return 16 * (codebook.dim() - 1), 0


def int4_linear(
    rows: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    rotated: bool,
    plan: Plan | None = None,
) -> Tensor:
    """``rows`` [M, K] with dense rows, ``weights`` [N, K] without a group index → [M, N].

    Args:
        plan: one of :func:`candidates`; None chooses.
    """
    out = torch.empty((rows.shape[0], weights.out_features), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    call = _prepare(rows, weights, bias, weight_only, act_fn, rotated, out)
    with on_device(rows):
        _launch(call, _plan(call) if plan is None else plan)
    return out


def _width(k: int) -> int:
    """K, rounded up so that rows of codes can start at multiples of 16 bytes."""
    return ceil_div(k, 32) * 32


def _padded(rows: Tensor, width: int) -> Tensor:
    """Dense rows of ``width`` columns that start at multiples of 16 bytes, zero past the given ones.

    Nearly always those given. Otherwise a copy costs less than loads of single bytes.
    """
    dense = rows.shape[1] == width and rows.stride(1) == 1
    if dense and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    padded = rows.new_zeros(rows.shape[0], width)
    padded[:, : rows.shape[1]] = rows
    return padded


def _prepare(
    rows: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    rotated: bool,
    out: Tensor,
) -> _Call:
    width = _width(rows.shape[1])
    rows = _padded(rows, width) if weight_only else rows
    qweight = _padded(weights.qweight, width // 2)
    others = {
        name: None if (tensor := getattr(weights, name)) is None else tensor.contiguous()
        for name in ("weight_scale", "zero_point", "codebook")
    }
    weights = replace(weights, qweight=qweight, **others)
    bias = None if bias is None else bias.contiguous()
    return _Call(rows, weights, bias, weight_only, act_fn, rotated, out)


def _plan(call: _Call) -> Plan:
    """What :func:`candidates` has for the call; tuned, where that was asked for."""
    (m, n, k), weights, device = call.sizes, call.weights, call.rows.device
    heavy = weights.codebook is not None or call.zero == SUMMED.value
    dtype, form = call.rows.dtype, "weight_only" if call.weight_only else "int8"
    plans = candidates(architecture(device), m, dtype, call.weight_only, heavy)
    key = (power_of_two(m), n, k, dtype, form, weights.group_size, call.zero, weights.table_scope)
    return pick("int4_linear", key, plans, device, lambda plan: _launch(call, plan))


# ------------------------------------------------------------------------------------------- compiling

_KINDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTERS = {
    "x_scale": "*fp32",
    "sums": "*fp32",
    "qweight": "*u8",
    "weight_scale": "*fp16",
    "zero_point": "*u8",
    "codebook": "*fp32",
    "bias": "*fp32",
    "partial": "*fp32",
    "counters": "*i32",
}
_UNALIGNED_SIZES = ("M", "splits", "steps", "groups")
_SIZES = ("N", "K", "row_stride", "code_stride", "table_row", "table_group", *_UNALIGNED_SIZES)


def _compilation(
    plan: Plan,
    dtype: torch.dtype,
    architectures: tuple[int, ...],
    *,
    int8: bool = False,
    zero: int = 0,
    table: int = 0,
    segment: int = 128,
    split: bool = False,
    odd: bool = False,
) -> Compilation:
    """``odd``: N is a multiple of nothing, K not of a block."""
    kind = _KINDS[dtype]
    zero_point = "*u8" if zero == FOLDED.value else "*fp16"
    types = {**_POINTERS, **dict.fromkeys(_SIZES, "i32"), "x": "*i8" if int8 else kind, "out": kind}
    types["zero_point"] = zero_point
    constants = {
        "ZERO": zero,
        "TABLE": table,
        "BIAS": True,
        "ACT_FN": None if odd else "gelu",
        "SPLIT": split,
        "EVEN": not odd,
        "ONE_GROUP": odd,
        **_shape(plan, segment, int8, zero, table > 0),
    }
    aligned = [name for name in types if name not in _UNALIGNED_SIZES and (name, odd) != ("N", True)]
    form = f"{'int8' if int8 else kind[1:]} group={segment} zero={zero} table={table}"
    return Compilation(
        f"int4_linear {form}{' split' * split}{' odd' * odd}",
        linear_kernel,
        types,
        constants,
        plan,
        aligned=aligned,
        tensor_cores=int8 or dtype != torch.float32,
        fp_fusion=False,
        architectures=architectures,
    )


_OF_FAMILY = {"ampere": (80,), "hopper": (90,), "blackwell": (100,)}


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles: every plan, with forms and groups in turn."""
    none, folded, summed = NONE.value, FOLDED.value, SUMMED.value
    found: dict[tuple[str, str], Compilation] = {}

    def add(plan: Plan, dtype: torch.dtype, architectures: tuple[int, ...], **options: Any) -> None:
        one = _compilation(plan, dtype, architectures, **options)
        key = one.name, str(plan)
        if key in found:
            known = found[key].architectures
            one = replace(one, architectures=tuple(dict.fromkeys((*known, *architectures))))
        found[key] = one

    turn = 0
    for (kind, family), table in _PLANS.items():
        int8, on = kind.startswith("int8"), _OF_FAMILY[family]
        for most, plans in table.items():
            split = 0 < most <= 64
            for plan in plans:
                turn += 1
                segment = (64, 32)[turn % 2]
                if "heavy" in kind:
                    add(plan, torch.bfloat16, on, int8=int8, table=2, split=split)
                    add(plan, torch.float16, on, int8=int8, zero=summed, split=split)
                    other = {"zero": summed} if segment == 64 else {"table": 1}
                    add(plan, torch.bfloat16, on, int8=int8, split=split, segment=segment, **other)
                elif int8:
                    add(plan, torch.bfloat16, on, int8=True, split=split)
                    add(plan, torch.float16, on, int8=True, split=split, segment=segment)
                else:
                    add(plan, torch.bfloat16, on, split=split)
                    add(plan, torch.float16, on, zero=folded, split=split)
                    zero = (none, folded)[turn // 2 % 2]
                    add(plan, torch.bfloat16, on, zero=zero, split=split, segment=segment)
    for most, plans in _SINGLE.items():
        for plan in plans:
            add(plan, torch.float32, (80, 90, 100), split=most > 0, zero=folded)
            add(plan, torch.float32, (90, 100), split=most > 0, odd=True, table=1, segment=32)
    for m in (1, 16, 64, 1000):
        plan = next(p for p in candidates(90, m, torch.bfloat16, True, False) if not p.dense)
        add(plan, torch.bfloat16, (90,), split=m <= 64, odd=True)
        plan = candidates(90, m, torch.bfloat16, False, True)[0]
        add(plan, torch.float16, (90,), int8=True, table=1, split=m <= 64, odd=True)
    sums = [
        Compilation(
            f"int4_linear sums {kind[1:]}",
            sums_kernel,
            {"x": kind, "sums": "*fp32", **dict.fromkeys(("M", "K", "row_stride", "sums_stride"), "i32")},
            {"SEGMENT": segment},
            Tile({"BLOCK_M": 4096 // segment}, num_warps=4),
            aligned=("x", "sums", "K", "row_stride"),
        )
        for kind, segment in (("*i8", 128), ("*bf16", 32))
    ]
    return [*found.values(), *sums, *_spread_compilations()]


def _spread_compilations() -> list[Compilation]:
    found: dict[str, Compilation] = {}

    def add(name: str, kernel: Any, constants: dict[str, object], tile: Tile, **types: str) -> None:
        types = {**_POINTERS, **dict.fromkeys(_SIZES, "i32"), **types}
        arguments = [a for a in kernel.arg_names if a not in constants and a not in tile.sizes]
        unaligned = ("M", "count", "segments", "groups", "first")
        one = Compilation(
            f"int4_linear {name}",
            kernel,
            {a: types[a] for a in arguments},
            constants,
            tile,
            aligned=[a for a in arguments if a not in unaligned],
            tensor_cores=kernel is segments_kernel,
            fp_fusion=False,
            architectures=architectures,
        )
        key = f"{one.name} {tile}"
        if key in found:
            one = replace(one, architectures=(*found[key].architectures, *architectures))
        found[key] = one

    strides = ("spread_stride", "sums_stride", "terms_stride")
    sizes = dict.fromkeys(("first", "count", "segments", *strides), "i32")
    terms = {"spread": "*i8", "scales": "*fp32", "offsets": "*fp32", **sizes}
    for family, table in _SPREAD.items():
        architectures = _OF_FAMILY[family.split()[0]]
        for plan in {str(plan): plan for plans in table.values() for plan in plans}.values():
            zero = SUMMED.value if "heavy" in family else NONE.value
            for segment in (128, 32) if plan.num_warps == 4 else (128,):
                constants = {"ZERO": zero, "BIAS": True, "ACT_FN": "gelu", "SEGMENT": segment}
                types = {"x": "*i8", "out": "*bf16", **terms}
                add(f"spread group={segment} zero={zero}", segments_kernel, constants, plan, **types)
    architectures = (80, 90, 100)
    for segment, zero, table_scope in ((128, SUMMED.value, 0), (64, NONE.value, PER_GROUP.value)):
        constants = {"ZERO": zero, "TABLE": table_scope > 0, "ONE_GROUP": False, "SEGMENT": segment}
        tile = Tile({"ROWS": SPREAD // segment}, num_warps=4)
        add(f"spreading group={segment} table={table_scope}", spread_kernel, constants, tile, **terms)
    return list(found.values())
