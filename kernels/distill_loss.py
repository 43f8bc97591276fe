"""``distill_loss``: from two sets of logits to loss and gradient of each row, no softmax in memory. Page:
``reference/``.

A program has some rows, or a part of one, and goes over them in tiles ``[rows, times, places, group]``: a
group is the 16 bytes that a thread loads at once, and a place has ``times`` of them. The first stage keeps
per place a running maximum and sums relative to it: threads share nothing until the row ends. The second goes
back over the row, the last tile still in registers and the others, last ones first, in the L2 cache as far
as it reaches; it makes the loss's terms, and writes forward KL's gradient where it belongs. Reverse KL's
gradient needs the row's mean, one stage more; that of JS the mean to its last bits, two. ::

    rows enough    distill_kernel, all stages of a row in one program
    few, long      distill_kernel once a stage, parts of rows side by side; their sums in ``partials``
    top-k teacher  likewise, topk_kernel before the second stage and topk_scatter_kernel after it

Precision. Exponents are base 2: x = fma(z, rate, -base), rounded once, where rate = log2(e) / T times what
scales the logits; that its rounding is a temperature's, 6e-8. With d = ln p - ln q, of student and teacher, a
term q ln(q / p) is given p - q in addition, which sums to zero over the row: what is left is of second order
in d, as the loss is. Where |d| < 1 it comes, and p - q too, from a series in d, so that nothing cancels;
elsewhere from p and q as they are. Sums are float32 within a place (64 elements of 32000), float64 beyond,
and so is whatever a row has once.

``tl.exp2`` is the GPU's ex2.approx.ftz: CUDA's programming guide gives 2 units in the last place for the
exp2f that is made of it, 2^-22 of the result at most. Of p - q where |d| >= 1 that is at most 5.2e-7; where
|d| < 1 it is a factor of the series. In the normalizers, which d contains, errors average; where one element
is nearly all of a row, its exponent is about 0. A test adds errors of that size to the interpreter's exact
exp2. Exponents beyond float32, of logits such as torch.finfo(torch.float32).min, count as infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import constant, round_half_even
from .tiles import Compilation, Tile, architecture, ceil_div, on_device, pick, power_of_two

__all__ = ["compilations", "distill_loss", "scale_rows"]

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(float("-inf"))
FIELDS = tl.constexpr(16)
"""Of a part of a row in ``partials``: bases, sums, …, in the order of `_store_sums`."""


# ---- what goes together ---------------------------------------------------------------------------------


class Form(NamedTuple):
    """What a loss is made of; a kernel is compiled for each."""

    divergence: str  # "none", "forward", "reverse", "js"
    entropy: bool
    ce: bool
    plain: bool  # CE's temperature is another than the divergence's
    smooth: bool
    topk: bool
    labels: bool
    cap: bool
    student_scaled: bool  # logits must be scaled before they are compared: the factor is not positive
    teacher_scaled: bool
    scales: bool  # factors of the terms and of CE are on the device
    grad: bool


class Rates(NamedTuple):
    """Factors from logits to exponents, and of logits before that where there is a cap, or the factor is no
    positive one."""

    student: tl.tensor
    teacher: tl.tensor
    plain: tl.tensor
    student_factor: tl.tensor
    teacher_factor: tl.tensor
    beta: tl.tensor


class Sums(NamedTuple):
    """Of places, parts or rows, relative to their bases: with e = 2^x, x = z * rate - base.

    e of student, teacher, and of the student at temperature 1; e x; e times the difference of exponents of
    student and teacher without their bases; z.
    """

    student_base: tl.tensor
    teacher_base: tl.tensor
    plain_base: tl.tensor
    student: tl.tensor
    teacher: tl.tensor
    plain: tl.tensor
    mean: tl.tensor
    cross: tl.tensor
    total: tl.tensor


class Row(NamedTuple):
    """[rows], float32. q S = lift 2^y for y = t * rate - teacher_base, S the student's sum of 2^x, so that
    ln p - ln q = (x - y) ln 2 + shift."""

    student_base: tl.tensor
    teacher_base: tl.tensor
    plain_base: tl.tensor
    lift: tl.tensor
    shift: tl.tensor
    per_student: tl.tensor
    per_plain: tl.tensor


class Factors(NamedTuple):
    """[rows], float32: of the gradients of terms, and of what is subtracted from CE's."""

    kl: tl.tensor
    mass: tl.tensor
    entropy: tl.tensor
    entropy_shift: tl.tensor  # ln p + H is (x + that) ln 2
    ce: tl.tensor
    smooth: tl.tensor
    label: tl.tensor


class Means(NamedTuple):
    """[rows], float64: of terms per row, and of what makes means."""

    term: tl.tensor
    first: tl.tensor
    second: tl.tensor


# ---- functions of tiles ---------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    """2^x for x <= 0, off by little more than its rounding: for what tl.exp2 is too coarse."""
    y = tl.where(x > -126.0, x, -126.0)
    n = round_half_even(y)
    f = y - n
    p = constant(f, 1.5403512e-4)
    p = tl.fma(p, f, constant(f, 1.3390736e-3))
    p = tl.fma(p, f, constant(f, 9.6182376e-3))
    p = tl.fma(p, f, constant(f, 5.5503573e-2))
    p = tl.fma(p, f, constant(f, 0.24022649))
    p = tl.fma(p, f, constant(f, 0.69314718))
    p = tl.fma(p, f, constant(f, 1.0))
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _second_order(d):
    """e^d - 1 - d for |d| <= 1; relative error below 2e-7. Minimax."""
    p = constant(d, 2.4960824e-5)
    p = tl.fma(p, d, constant(d, 2.0325484e-4))
    p = tl.fma(p, d, constant(d, 1.3891335e-3))
    p = tl.fma(p, d, constant(d, 8.3309300e-3))
    p = tl.fma(p, d, constant(d, 4.1666515e-2))
    p = tl.fma(p, d, constant(d, 0.16666695))
    p = tl.fma(p, d, constant(d, 0.5))
    return (d * d) * p


@triton.jit
def _tanh(x):
    """Source: Cephes, tanhf."""
    size = tl.abs(x)
    z = x * x
    p = constant(x, -5.70498872745e-3)
    p = tl.fma(p, z, constant(x, 2.06390887954e-2))
    p = tl.fma(p, z, constant(x, -5.37397155531e-2))
    p = tl.fma(p, z, constant(x, 1.33314422036e-1))
    p = tl.fma(p, z, constant(x, -3.33332819422e-1))
    small = tl.fma(p * z, x, x)
    e = tl.exp2(size * -2.8853900817779268)
    large = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def _tanh_slope(x, t):
    """1 - t^2 for t = tanh(x): 4 e / (1 + e)^2, in which nothing cancels, where that would."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    large = tl.div_rn(4.0 * e, (1.0 + e) * (1.0 + e))
    return tl.where(tl.abs(x) < 1.25, tl.fma(-t, t, constant(x, 1.0)), large)


@triton.jit
def _log_series(r):
    """(ln(1 + r) - r + r^2 / 2) / r^3. Source: Cephes, logf."""
    p = constant(r, 7.0376836292e-2)
    p = tl.fma(p, r, constant(r, -1.1514610310e-1))
    p = tl.fma(p, r, constant(r, 1.1676998740e-1))
    p = tl.fma(p, r, constant(r, -1.2420140846e-1))
    p = tl.fma(p, r, constant(r, 1.4249322787e-1))
    p = tl.fma(p, r, constant(r, -1.6668057665e-1))
    p = tl.fma(p, r, constant(r, 2.0000714765e-1))
    p = tl.fma(p, r, constant(r, -2.4999993993e-1))
    return tl.fma(p, r, constant(r, 3.3333331174e-1))


@triton.jit
def _log(x):
    """ln x for positive normal x. Source: Cephes, logf; the GPU's logarithm is off by 1.7e-7 near 1."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    low = mantissa < 0.70710678
    exponent = tl.where(low, exponent - 1.0, exponent)
    r = tl.where(low, mantissa + mantissa, mantissa) - 1.0
    z = r * r
    y = (r * z) * _log_series(r)
    y = tl.fma(exponent, constant(x, -2.12194440e-4), y)
    y = tl.fma(constant(x, -0.5), z, y)
    return tl.fma(exponent, constant(x, 0.693359375), r + y)


@triton.jit
def _log1p_rest(y):
    """y - ln(1 + y) for y in [-0.29, 0.41]."""
    z = y * y
    return tl.fma(constant(y, 0.5), z, -((y * z) * _log_series(y)))


@triton.jit
def _per_row(x):
    """[rows] to go with tiles."""
    return x[:, None, None, None]


@triton.jit
def _group_sum(x):
    """Of a tile, per place: [rows, places]."""
    return tl.sum(tl.sum(x, 3), 2)


@triton.jit
def _exponent(z, rate, base):
    """z * rate - base; ``base``: [rows]."""
    return tl.fma(z, tl.full(z.shape, rate, tl.float32), tl.broadcast_to(_per_row(-base), z.shape))


@triton.jit
def _logits(raw, inside, factor, CAP: tl.constexpr, SCALED: tl.constexpr):
    """As float32; times ``factor`` where that must come first, and of capped ones the tanh; outside -inf."""
    z = raw.to(tl.float32)
    if CAP:
        z = _tanh(z * factor)
    elif SCALED:
        z = z * factor
    if (CAP or SCALED) and inside is not None:
        z = tl.where(inside, z, LOWEST)
    return z


# ---- first stage ----------------------------------------------------------------------------------------


@triton.jit
def _raise(base, z, rate):
    """Per place [rows, places]: the largest exponent so far; exponents relative to it, 2^them and their sum;
    what sums so far are multiplied by, and by how much the base was raised, negated."""
    raised = tl.maximum(base, tl.max(tl.max(z, 3), 2) * rate)
    at = tl.where(raised > LOWEST, raised, 0.0)
    x = tl.fma(z, tl.full(z.shape, rate, tl.float32), tl.broadcast_to(-at[:, :, None, None], z.shape))
    e = tl.exp2(x)
    return raised, x, e, _group_sum(e), tl.exp2(base - at), base - at


@triton.jit
def _no_sums(ROWS: tl.constexpr, PLACES: tl.constexpr):
    zero = tl.zeros((ROWS, PLACES), tl.float32)
    lowest = zero + LOWEST
    return Sums(lowest, lowest, lowest, zero, zero, zero, zero, zero, zero)


@triton.jit
def _add_tile(sums, z, t, inside, rates, FORM: tl.constexpr):
    """Sums of places with a tile more."""
    base, x, e, added, lower, by = _raise(sums.student_base, z, rates.student)
    student = sums.student * lower + added
    mean = sums.mean
    if FORM.entropy:
        by = tl.where(sums.student_base > LOWEST, by, 0.0)
        mean = (mean + by * sums.student) * lower + _group_sum(e * tl.maximum(x, -200.0))
    cross = sums.cross
    if FORM.divergence == "reverse":
        difference = tl.fma(z, tl.full(z.shape, rates.student, tl.float32), -(t * rates.teacher))
        cross = tl.where(lower > 0.0, cross * lower, 0.0)
        cross += _group_sum(tl.where(e > 0.0, e * difference, 0.0))
    teacher_base = sums.teacher_base
    teacher = sums.teacher
    if FORM.divergence != "none":
        teacher_base, x, e, added, lower, by = _raise(teacher_base, t, rates.teacher)
        teacher = teacher * lower + added
    plain_base = sums.plain_base
    plain = sums.plain
    if FORM.plain:
        plain_base, x, e, added, lower, by = _raise(plain_base, z, rates.plain)
        plain = plain * lower + added
    total = sums.total
    if FORM.smooth:
        total += _group_sum(z if inside is None else tl.where(inside, z, 0.0))
    return Sums(base, teacher_base, plain_base, student, teacher, plain, mean, cross, total)


@triton.jit
def _row_sum(x):
    return tl.sum(x.to(tl.float64), 1)


@triton.jit
def _of_row(base, sums):
    """Of places or parts [rows, places] of a row: its base, and the sum relative to it."""
    top = tl.max(base, 1)
    weight = tl.where(base > LOWEST, _exp2(base - top[:, None]), 1.0)
    return top, _row_sum(sums.to(tl.float64) * weight)


@triton.jit
def _row_sums(sums, FORM: tl.constexpr):
    """Sums [rows, places] as [rows]: bases float32, all else float64."""
    base, student = _of_row(sums.student_base, sums.student)
    teacher_base = base
    teacher = student
    if FORM.divergence != "none":
        teacher_base, teacher = _of_row(sums.teacher_base, sums.teacher)
    plain_base = base
    plain = student
    if FORM.plain:
        plain_base, plain = _of_row(sums.plain_base, sums.plain)
    mean = student
    if FORM.entropy:
        below = tl.where(sums.student_base > LOWEST, sums.student_base - base[:, None], 0.0)
        raised = sums.mean.to(tl.float64) + below.to(tl.float64) * sums.student
        _, mean = _of_row(sums.student_base, raised)
    cross = student
    if FORM.divergence == "reverse":
        # Nothing of a place whose largest probability is 0 in float32, and whose sum may be infinite.
        counts = sums.student_base - base[:, None] >= -126.0
        _, cross = _of_row(sums.student_base, tl.where(counts, sums.cross, 0.0))
    total = student
    if FORM.smooth:
        total = _row_sum(sums.total)
    return Sums(base, teacher_base, plain_base, student, teacher, plain, mean, cross, total)


@triton.jit
def _put(record, field: tl.constexpr, x):
    """A number [1] of a part into its record."""
    tl.store(record + field, tl.sum(x, 0).to(tl.float64))


@triton.jit
def _store_sums(record, sums, FORM: tl.constexpr):
    _put(record, 0, sums.student_base)
    _put(record, 1, sums.student)
    if FORM.divergence != "none":
        _put(record, 2, sums.teacher_base)
        _put(record, 3, sums.teacher)
    if FORM.plain:
        _put(record, 4, sums.plain_base)
        _put(record, 5, sums.plain)
    if FORM.entropy:
        _put(record, 6, sums.mean)
    if FORM.divergence == "reverse":
        _put(record, 7, sums.cross)
    if FORM.smooth:
        _put(record, 8, sums.total)


@triton.jit
def _alike(x):
    """[1] with every thread, as scalars are: a layout of its own would be that of tiles, at their cost."""
    return tl.full((1,), tl.sum(x, 0), x.dtype)


@triton.jit
def _load_parts(record, field: tl.constexpr, parts, PARTS: tl.constexpr, other: tl.constexpr):
    """A field of all parts of a row, float64 [1, PARTS]."""
    part = tl.arange(0, PARTS)[None, :]
    return tl.load(record + part * FIELDS + field, mask=part < parts, other=other)


@triton.jit
def _part_sum(record, field: tl.constexpr, parts, PARTS: tl.constexpr):
    return _alike(tl.sum(_load_parts(record, field, parts, PARTS, 0.0), 1))


@triton.jit
def _load_sums(record, parts, PARTS: tl.constexpr, FORM: tl.constexpr):
    """Sums of a row [1] from those of its parts."""
    base = _load_parts(record, 0, parts, PARTS, LOWEST).to(tl.float32)
    student = _load_parts(record, 1, parts, PARTS, 0.0)
    teacher_base = base
    teacher = student
    if FORM.divergence != "none":
        teacher_base = _load_parts(record, 2, parts, PARTS, LOWEST).to(tl.float32)
        teacher = _load_parts(record, 3, parts, PARTS, 0.0)
    plain_base = base
    plain = student
    if FORM.plain:
        plain_base = _load_parts(record, 4, parts, PARTS, LOWEST).to(tl.float32)
        plain = _load_parts(record, 5, parts, PARTS, 0.0)
    mean = student
    if FORM.entropy:
        mean = _load_parts(record, 6, parts, PARTS, 0.0)
    cross = student
    if FORM.divergence == "reverse":
        cross = _load_parts(record, 7, parts, PARTS, 0.0)
    total = student
    if FORM.smooth:
        total = _load_parts(record, 8, parts, PARTS, 0.0)
    every = Sums(base, teacher_base, plain_base, student, teacher, plain, mean, cross, total)
    every = _row_sums(every, FORM)
    return Sums(
        _alike(every.student_base),
        _alike(every.teacher_base),
        _alike(every.plain_base),
        _alike(every.student),
        _alike(every.teacher),
        _alike(every.plain),
        _alike(every.mean),
        _alike(every.cross),
        _alike(every.total),
    )


# ---- second stage: terms, and the gradient where it needs no mean ----------------------------------------


@triton.jit
def _difference(x, y, row):
    """d = ln p - ln q."""
    return tl.fma(x - y, constant(x, LN2), tl.broadcast_to(_per_row(row.shift), x.shape))


@triton.jit
def _compare(x, y, row, REVERSE: tl.constexpr, COARSE: tl.constexpr):
    """From exponents, times S: p - q, and forward KL's term q ln(q / p) + p - q or reverse KL's
    p ln(p / q) + q - p.

    Where the one that d is to be multiplied by is 0, the product is too, though d may be infinite or NaN.
    Reverse KL compares p with 0 anyway. In forward KL bounds cost less: where q is 0 and d is -inf, so that
    there is NaN, p is 0 too, and so is the term; no other is negative.

    COARSE: for a gradient of 16 bits, whose own rounding (2^-12, 2^-9) hides more. From |d| = 2^-8 on, p - q
    by itself is off by 2^-13; below, two terms of the series leave out 2^-19 of the second order.
    """
    p = tl.exp2(x)
    q = tl.exp2(y) * _per_row(row.lift)
    d = _difference(x, y, row)
    if REVERSE:
        d = tl.where(p > 0.0, d, -1e30)
        rest = _second_order(-d)
        near = tl.abs(d) < 1.0
        difference = tl.where(near, p * (d - rest), p - q)
        term = tl.where(near, p * rest, p * d - difference)
    else:
        d = tl.where(d < 1e30, d, 1e30)
        if COARSE:
            rest = (d * d) * tl.fma(d, constant(d, 1 / 6), constant(d, 0.5))
            near = tl.abs(d) < 0.00390625
        else:
            rest = _second_order(d)
            near = tl.abs(d) < 1.0
        difference = tl.where(near, q * (d + rest), p - q)
        far = difference - q * d
        term = tl.where(near, q * rest, tl.where(far > 0.0, far, 0.0))
    return difference, term


@triton.jit
def _log_mixture(p, mixture):
    """ln(m / p); finite for p = 0."""
    return _log(tl.div_rn(mixture, tl.maximum(p, 1.2e-38)))


@triton.jit
def _js_terms(p, q, d, beta):
    """p ln(p / m) + m - p, and q ln(q / m) + m - q; d = ln q - ln p."""
    mixture = beta * q + (1.0 - beta) * p
    far_student = (mixture - p) - tl.where(p > 0.0, p * _log_mixture(p, mixture), 0.0)
    far_teacher = (mixture - q) - tl.where(q > 0.0, q * _log_mixture(q, mixture), 0.0)
    # Near: m = p (1 + y), q = p (1 + e); e^d d - e is the second-order part of -d, times e^d.
    near = tl.abs(d) < 0.3
    d = tl.where(near, d, 0.0)
    e = d + _second_order(d)
    y = beta * e
    rest = _log1p_rest(y)
    near_teacher = (1.0 + e) * rest - e * y + (1.0 + e) * _second_order(-d)
    return tl.where(near, p * rest, far_student), tl.where(near, p * near_teacher, far_teacher)


@triton.jit
def _js_deviation(p, q, d, beta, mean_high, mean_low):
    """p (ln(p / m) - mean)."""
    near = tl.abs(d) < 0.3
    close = tl.where(near, d, 0.0)
    y = beta * (close + _second_order(close))
    of_p = tl.where(near, y - _log1p_rest(y), _log_mixture(p, beta * q + (1.0 - beta) * p))
    return tl.where(p > 0.0, p * ((-of_p - _per_row(mean_high)) - _per_row(mean_low)), 0.0)


@triton.jit
def _terms(z, t, row, about, rates, FORM: tl.constexpr, COARSE: tl.constexpr):
    """Times S, the student's sum: p - q, the divergence's terms, and what its mean is made of.

    That is for reverse KL p (d - about) / ln 2 and p, where ``about`` (see `_about`) is near the mean; for
    JS, all as it is, p ln(p / m) + m - p.
    """
    x = _exponent(z, rates.student, row.student_base)
    y = _exponent(t, rates.teacher, row.teacher_base)
    if FORM.divergence == "js":
        p = tl.exp2(x) * _per_row(row.per_student)
        q = tl.exp2(y) * _per_row(row.lift * row.per_student)
        student, teacher = _js_terms(p, q, -_difference(x, y, row), rates.beta)
        return x, rates.beta * teacher + (1.0 - rates.beta) * student, student, student
    difference, term = _compare(x, y, row, FORM.divergence == "reverse", COARSE)
    if FORM.divergence == "reverse":
        p = tl.exp2(x)
        above = x - (y + _per_row(about))
        return difference, term, tl.where(p > 0.0, p * above, 0.0), p
    return difference, term, term, term


@triton.jit
def _add_terms(sums, term, first, second, FORM: tl.constexpr):
    """Sums of places with a tile more, float32."""
    a = sums.term + _group_sum(term)
    b = sums.first
    c = sums.second
    if FORM.grad and (FORM.divergence == "reverse" or FORM.divergence == "js"):
        b += _group_sum(first)
        c += _group_sum(second)
    return Means(a, b, c)


@triton.jit
def _about_mean(z, t, row, high, low, rates, FORM: tl.constexpr):
    """p, and of reverse KL p (d - mean) / ln 2, of JS p (ln(p / m) - mean); high + low: see `_about`, the
    mean.

    Of the two exponents that make d, the mean is added to that of q, which is as large where it is large.
    """
    x = _exponent(z, rates.student, row.student_base)
    y = _exponent(t, rates.teacher, row.teacher_base)
    p = tl.exp2(x) * _per_row(row.per_student)
    if FORM.divergence == "reverse":
        above = x - ((y + _per_row(high)) + _per_row(low))
        return p, tl.where(p > 0.0, p * above, 0.0)
    q = tl.exp2(y) * _per_row(row.lift * row.per_student)
    return p, _js_deviation(p, q, -_difference(x, y, row), rates.beta, high, low)


@triton.jit
def _finish(g, z, raw, column, label, row, factors, rates, FORM: tl.constexpr):
    """The divergence's gradient with those of the other terms, and back through the cap."""
    x = _exponent(z, rates.student, row.student_base)
    p = tl.exp2(x) * _per_row(row.per_student)
    if FORM.topk:
        g += p * _per_row(factors.mass)
    if FORM.entropy:
        g += p * _per_row(factors.entropy) * (tl.maximum(x, -200.0) + _per_row(factors.entropy_shift))
    if FORM.ce:
        if FORM.plain:
            p = tl.exp2(_exponent(z, rates.plain, row.plain_base)) * _per_row(row.per_plain)
        g += p * _per_row(factors.ce) - _per_row(factors.smooth)
        g -= tl.where(column == _per_row(label), _per_row(factors.label), 0.0)
    if FORM.cap:
        g *= _tanh_slope(raw.to(tl.float32) * rates.student_factor, z)
    return g


@triton.jit
def _logit64(z, factor, CAP: tl.constexpr, SCALED: tl.constexpr):
    """As `_logits`, in float64."""
    z = z.to(tl.float64)
    if CAP:
        e = tl.exp(-2.0 * tl.abs(z * factor))
        t = (1.0 - e) / (1.0 + e)
        z = tl.where(z * factor < 0.0, -t, t)
    elif SCALED:
        z = z * factor
    return z


@triton.jit
def _high(x):
    """The first of two floats that float64 x is."""
    return x.to(tl.float32)


@triton.jit
def _low(x):
    return (x - x.to(tl.float32).to(tl.float64)).to(tl.float32)


@triton.jit
def _reciprocal(x):
    """Of float64, by a step of Newton's from float32's: relative error below 1e-13."""
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    return r * (2.0 - x * r)


@triton.jit
def _log2(x):
    """Of float64, normal and positive, within 1e-10: what a row's sums need of it, in a quarter of the
    instructions; the row waits for each."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1023).to(tl.float64)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    # About the root of 2: log2 m = 1/2 + 2 artanh(s) / ln 2, |s| < 0.172
    s = (mantissa - 1.4142135623730951) * _reciprocal(mantissa + 1.4142135623730951)
    z = s * s
    p = 0.262308189253 * z + 0.320598897975
    p = p * z + 0.412198583111
    p = p * z + 0.577078016356
    p = p * z + 0.961796693926
    p = p * z + 2.885390081778
    return p * s + (exponent + 0.5)


@triton.jit
def _row(sums, valid, FORM: tl.constexpr):
    """What tiles need to know of a row, NaN for one with NaN, or masked all over; whether it is none of
    those; 1 / S."""
    valid = valid & (sums.student > 0.0)
    inverse = _reciprocal(sums.student)
    shifted = sums.teacher_base.to(tl.float64)
    if FORM.divergence != "none":
        valid = valid & (sums.teacher > 0.0)
        shifted += _log2(sums.teacher * inverse)
    inverse = tl.where(valid, inverse, float("nan"))
    base = shifted.to(tl.float32)
    rest = base.to(tl.float64) - shifted
    plain = inverse
    if FORM.plain:
        plain = tl.where(valid, _reciprocal(sums.plain), float("nan"))
    row = Row(
        sums.student_base,
        base,
        sums.plain_base,
        _exp2(rest.to(tl.float32)),
        (rest * -LN2).to(tl.float32),
        inverse.to(tl.float32),
        plain.to(tl.float32),
    )
    return row, valid, inverse


@triton.jit
def _factors(sums, inverse, row, valid, mass, vocab, smoothing, kl, entropy, ce, FORM: tl.constexpr):
    """``kl``, ``entropy``, ``ce``: factors of these gradients for every row."""
    times_kl = tl.where(valid, kl, float("nan")).to(tl.float32)
    each = times_kl * row.per_student if FORM.divergence == "forward" else times_kl
    times_ce = tl.where(valid, ce, float("nan")).to(tl.float32)
    return Factors(
        each,
        (times_kl * mass).to(tl.float32),
        tl.where(valid, entropy, float("nan")).to(tl.float32),
        (-sums.mean * inverse).to(tl.float32),
        times_ce,
        times_ce * smoothing / vocab,
        times_ce * (1.0 - smoothing),
    )


@triton.jit
def _cross_entropy(sums, label_logit, vocab, smoothing, rates, FORM: tl.constexpr):
    """float64 [rows]."""
    target = label_logit
    if FORM.smooth:
        target = (1.0 - smoothing) * target + smoothing * (sums.total / vocab)
    return (sums.plain_base.to(tl.float64) + _log2(sums.plain) - target * rates.plain) * LN2


@triton.jit
def _second_tile(
    means, z, t, raw, column, label, row, about, factors, rates, FORM: tl.constexpr, COARSE: tl.constexpr
):
    """Sums of places with a tile more, and the tile's gradient where that needs no mean."""
    g = tl.zeros(z.shape, tl.float32)
    if FORM.divergence != "none":
        difference, term, first, second = _terms(z, t, row, about, rates, FORM, COARSE)
        means = _add_terms(means, term, first, second, FORM)
        g = difference * _per_row(factors.kl)
    if FORM.grad and (FORM.divergence == "none" or FORM.divergence == "forward"):
        g = _finish(g, z, raw, column, label, row, factors, rates, FORM)
    return means, g


@triton.jit
def _no_means(ROWS: tl.constexpr, PLACES: tl.constexpr):
    zero = tl.zeros((ROWS, PLACES), tl.float32)
    return Means(zero, zero, zero)


@triton.jit
def _about(sums, inverse, row):
    """float32 [rows]: about (mean - shift) / ln 2 of reverse KL, as the first stage knows it: what y is
    off x."""
    about = sums.cross * inverse - sums.student_base.to(tl.float64) + row.teacher_base.to(tl.float64)
    return about.to(tl.float32)


@triton.jit
def _starts(index, stride, ALIGNED: tl.constexpr, GROUP: tl.constexpr):
    """Where rows begin. ALIGNED: all on 16 bytes; by itself Triton sees multiples of 16 elements only."""
    at = index * stride
    if ALIGNED:
        at = tl.multiple_of(at, GROUP)
    return _per_row(at)


@triton.jit(do_not_specialize=["ignore_index", "part_tiles", "parts"])
def distill_kernel(
    student,
    teacher,
    labels,
    topk_loss,
    topk_mass,
    scales,
    partials,
    loss,
    grad,
    rows,
    vocab,
    parts,
    part_tiles,
    student_stride,
    teacher_stride,
    grad_stride,
    ignore_index,
    student_rate,
    teacher_rate,
    plain_rate,
    student_factor,
    teacher_factor,
    beta,
    smoothing,
    kl_loss,
    entropy_loss,
    ce_loss,
    kl_grad,
    entropy_grad,
    ce_grad,
    FORM: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    TIMES: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stages FIRST to LAST of some rows; one stage, where FIRST is LAST, of a part of one row.

    ALIGNED: rows begin on 16 bytes, GROUP elements, and are as many groups.

    Stages: 1 sums; 2 terms, loss, and a gradient that needs no mean; 3 the last bits of JS's mean; 4 a
    gradient that needs a mean. ``grad`` may be ``student``: each tile is read before it is written, and
    labels' logits before that.
    """
    TEACHER: tl.constexpr = FORM.divergence != "none"
    MEAN: tl.constexpr = FORM.divergence == "reverse" or FORM.divergence == "js"
    COARSE: tl.constexpr = student.dtype.element_ty != tl.float32
    SPLIT: tl.constexpr = FIRST == LAST
    WRITES: tl.constexpr = FORM.grad and ((LAST == 4) if MEAN else (LAST >= 2))
    BLOCK: tl.constexpr = TIMES * PLACES * GROUP
    rates = Rates(student_rate, teacher_rate, plain_rate, student_factor, teacher_factor, beta)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    there = index < rows
    begin = part * part_tiles * BLOCK
    end = tl.minimum(begin + part_tiles * BLOCK, vocab)
    if ALIGNED:
        end = tl.multiple_of(end, GROUP)
    tiles = 0 if ONE_TILE else (end - begin - 1) // BLOCK  # and a last one, of at least one element
    full = tiles
    label = tl.zeros((ROWS,), tl.int64)
    ignored = label != 0
    if FORM.labels:
        label = tl.load(labels + index, mask=there, other=0).to(tl.int64)
        ignored = label == ignore_index
        if not ONE_TILE:  # a row that is ignored is not read
            full = tl.where(tl.max(ignored.to(tl.int32), 0) > 0, 0, tiles)
    valid = (label >= 0) & (label < vocab)
    label_logit = tl.zeros((ROWS,), tl.float64)
    if FORM.ce and FIRST == 1:
        read = tl.load(student + index * student_stride + label, mask=there & valid, other=0.0)
        label_logit = _logit64(read.to(tl.float32), student_factor, FORM.cap, FORM.student_scaled)

    lane = tl.arange(0, TIMES)[None, :, None] * (PLACES * GROUP)
    lane += tl.arange(0, PLACES)[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    lane = begin + lane[None, :, :, :]
    students = student + _starts(index, student_stride, ALIGNED, GROUP)
    teachers = students
    if TEACHER:
        teachers = teacher + _starts(index, teacher_stride, ALIGNED, GROUP)
    last = lane + tiles * BLOCK
    inside = (last < end) & _per_row(there)
    counted = inside & _per_row(ignored == 0)
    last_student = tl.load(students + last, mask=counted, other=LOWEST)
    z = _logits(last_student, counted, student_factor, FORM.cap, FORM.student_scaled)
    t = z
    if TEACHER:
        last_teacher = tl.load(teachers + last, mask=counted, other=LOWEST)
        t = _logits(last_teacher, counted, teacher_factor, FORM.cap, FORM.teacher_scaled)
    record = partials
    if SPLIT:
        record = partials + tl.program_id(0).to(tl.int64) * parts * FIELDS

    # ---- sums -------------------------------------------------------------------------------------------
    if FIRST == 1:
        places = _no_sums(ROWS, PLACES)
        for i in tl.range(0, full, num_stages=STAGES):
            column = lane + i * BLOCK
            raw = tl.load(students + column)
            z_at = _logits(raw, None, student_factor, FORM.cap, FORM.student_scaled)
            t_at = z_at
            if TEACHER:
                t_at = tl.load(teachers + column)
                t_at = _logits(t_at, None, teacher_factor, FORM.cap, FORM.teacher_scaled)
            places = _add_tile(places, z_at, t_at, None, rates, FORM)
        sums = _row_sums(_add_tile(places, z, t, counted, rates, FORM), FORM)
    else:
        sums = _load_sums(record, parts, PARTS, FORM)
        if FORM.ce:
            label_logit = label_logit + tl.load(record + 9)

    if LAST == 1:
        _store_sums(record + part * FIELDS, sums, FORM)
        _put(record + part * FIELDS, 9, label_logit)
    else:
        row, valid, inverse = _row(sums, valid, FORM)
        term_scale = 1.0
        ce_scale = 1.0
        mass = 0.0
        if FORM.scales:
            term_scale = tl.load(scales)
            ce_scale = tl.load(scales + 1)
        if FORM.topk:
            mass = tl.load(topk_mass + index, mask=there, other=0.0)
        factors = _factors(
            sums,
            inverse,
            row,
            valid,
            mass,
            vocab,
            smoothing,
            kl_grad * term_scale,
            entropy_grad * term_scale,
            ce_grad * ce_scale,
            FORM,
        )
        grads = students
        if WRITES:
            grads = grad + _starts(index, grad_stride, ALIGNED, GROUP)
            if FORM.ce and FIRST == 1:
                tl.debug_barrier()  # all labels' logits are read
        first = tl.zeros((ROWS,), tl.float64)
        second = first
        about = row.shift
        if FORM.divergence == "reverse":
            about = _about(sums, inverse, row)

        # ---- terms --------------------------------------------------------------------------------------
        if FIRST <= 2:
            means = _no_means(ROWS, PLACES)
            if TEACHER or FORM.grad:
                means, g = _second_tile(
                    means, z, t, last_student, last, label, row, about, factors, rates, FORM, COARSE
                )
                if WRITES and not MEAN:
                    g = tl.where(_per_row(ignored), 0.0, g)
                    tl.store(grads + last, g.to(grad.dtype.element_ty), mask=inside)
                for i in tl.range(0, full, num_stages=STAGES):
                    column = lane + (full - 1 - i) * BLOCK
                    raw = tl.load(students + column, eviction_policy="" if MEAN else "evict_first")
                    z_at = _logits(raw, None, student_factor, FORM.cap, FORM.student_scaled)
                    t_at = z_at
                    if TEACHER:
                        t_at = tl.load(teachers + column, eviction_policy="" if MEAN else "evict_first")
                        t_at = _logits(t_at, None, teacher_factor, FORM.cap, FORM.teacher_scaled)
                    means, g = _second_tile(
                        means, z_at, t_at, raw, column, label, row, about, factors, rates, FORM, COARSE
                    )
                    if WRITES and not MEAN:
                        tl.store(grads + column, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
            total = _row_sum(means.term)
            first = _row_sum(means.first)
            second = _row_sum(means.second)
            if FORM.divergence != "js":
                total = total * inverse
            rest = tl.zeros((ROWS,), tl.float64)
            total = kl_loss * total if TEACHER else rest
            if FORM.topk:
                rest += kl_loss * tl.load(topk_loss + index, mask=there, other=0.0)
            if FORM.entropy:
                rest += entropy_loss * (_log2(sums.student) - sums.mean * inverse) * LN2
            total = (total + tl.where(part == 0, rest, 0.0)) * term_scale
            if FORM.ce:
                ce = _cross_entropy(sums, label_logit, vocab, smoothing, rates, FORM)
                total += tl.where(part == 0, ce_loss * ce, 0.0) * ce_scale
            total = tl.where(ignored, 0.0, tl.where(valid, total, float("nan")))
            tl.store(loss + index * parts + part, total, mask=there)
            if SPLIT and MEAN and FORM.grad:
                _put(record + part * FIELDS, 10, first)
                _put(record + part * FIELDS, 11, second)
        elif MEAN:
            first = _part_sum(record, 10, parts, PARTS)
            second = _part_sum(record, 11, parts, PARTS)

        # ---- gradients that need a mean -----------------------------------------------------------------
        if MEAN and LAST >= 3:
            mean = first
            if FORM.divergence == "reverse":
                mean = about.to(tl.float64) + first / second
            if FORM.divergence == "js":
                if FIRST <= 3:
                    means = _no_means(ROWS, PLACES)
                    p, g = _about_mean(z, t, row, _high(mean), _low(mean), rates, FORM)
                    means = _add_terms(means, g, g, p, FORM)
                    for i in tl.range(0, full, num_stages=STAGES):
                        column = lane + i * BLOCK
                        z_at = tl.load(students + column)
                        z_at = _logits(z_at, None, student_factor, FORM.cap, FORM.student_scaled)
                        t_at = tl.load(teachers + column)
                        t_at = _logits(t_at, None, teacher_factor, FORM.cap, FORM.teacher_scaled)
                        p, g = _about_mean(z_at, t_at, row, _high(mean), _low(mean), rates, FORM)
                        means = _add_terms(means, g, g, p, FORM)
                    first = _row_sum(means.first)
                    second = _row_sum(means.second)
                    if SPLIT:
                        _put(record + part * FIELDS, 12, first)
                        _put(record + part * FIELDS, 13, second)
                else:
                    first = _part_sum(record, 12, parts, PARTS)
                    second = _part_sum(record, 13, parts, PARTS)
                mean += first / second
            if LAST == 4:
                p, g = _about_mean(z, t, row, _high(mean), _low(mean), rates, FORM)
                g = _finish(g * _per_row(factors.kl), z, last_student, last, label, row, factors, rates, FORM)
                g = tl.where(_per_row(ignored), 0.0, g)
                tl.store(grads + last, g.to(grad.dtype.element_ty), mask=inside)
                for i in tl.range(0, full, num_stages=STAGES):
                    column = lane + (full - 1 - i) * BLOCK
                    raw = tl.load(students + column, eviction_policy="evict_first")
                    z_at = _logits(raw, None, student_factor, FORM.cap, FORM.student_scaled)
                    t_at = tl.load(teachers + column, eviction_policy="evict_first")
                    t_at = _logits(t_at, None, teacher_factor, FORM.cap, FORM.teacher_scaled)
                    p, g = _about_mean(z_at, t_at, row, _high(mean), _low(mean), rates, FORM)
                    g = _finish(g * _per_row(factors.kl), z_at, raw, column, label, row, factors, rates, FORM)
                    tl.store(grads + column, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
        if WRITES and FORM.labels:
            for i in range(0, tiles - full):
                tl.store(grads + lane + i * BLOCK, tl.full(lane.shape, 0.0, grad.dtype.element_ty))


# ---- a teacher known by its k best -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index", "k", "parts"])
def topk_kernel(
    student,
    labels,
    log_probs,
    indices,
    partials,
    topk_loss,
    topk_mass,
    scales,
    at_indices,
    vocab,
    k,
    parts,
    student_stride,
    ignore_index,
    student_rate,
    plain_rate,
    student_factor,
    smoothing,
    kl_grad,
    entropy_grad,
    ce_grad,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a row: the divergence, the mass that was kept, and the gradient at the indices, float32 [rows, k].

    An index that comes twice counts twice, wherever it is looked at: k^2 comparisons. One that is out of
    range makes the row NaN: nobody waits for a GPU to raise an error.
    """
    rates = Rates(student_rate, student_rate, plain_rate, student_factor, student_factor, 0.5)
    index = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    label = tl.zeros((1,), tl.int64)
    if FORM.labels:
        label = tl.load(labels + index).to(tl.int64)
    sums = _load_sums(partials + tl.program_id(0).to(tl.int64) * parts * FIELDS, parts, PARTS, FORM)
    row, valid, inverse = _row(sums, (label >= 0) & (label < vocab), FORM)
    students = student + _per_row(index * student_stride)
    log_probs += tl.program_id(0).to(tl.int64) * k
    indices += tl.program_id(0).to(tl.int64) * k
    lane = tl.arange(0, BLOCK)[None, None, None, :]
    divergence = tl.zeros((1,), tl.float64)
    mass = divergence
    for i in range(0, tl.cdiv(k, BLOCK)):
        inside = lane + i * BLOCK < k
        log_q = tl.load(log_probs + lane + i * BLOCK, mask=inside, other=LOWEST).to(tl.float64)
        at = tl.load(indices + lane + i * BLOCK, mask=inside, other=0).to(tl.int64)
        known = (at >= 0) & (at < vocab)
        read = tl.load(students + at, mask=inside & known, other=0.0)
        exponent = _logit64(read.to(tl.float32), student_factor, FORM.cap, FORM.student_scaled) * student_rate
        log_p = (exponent - _per_row(row.student_base.to(tl.float64) + _log2(sums.student))) * LN2
        q = tl.where(known, tl.exp(log_q), float("nan"))
        term = tl.where(q == 0.0, 0.0, q * (log_q - log_p))
        divergence += tl.sum(tl.sum(tl.sum(term, 3), 2), 1)
        mass += tl.sum(tl.sum(tl.sum(q, 3), 2), 1)
    tl.store(topk_loss + index, divergence)
    tl.store(topk_mass + index, mass)
    if FORM.grad:
        term_scale = 1.0
        ce_scale = 1.0
        if FORM.scales:
            term_scale = tl.load(scales)
            ce_scale = tl.load(scales + 1)
        factors = _factors(
            sums,
            inverse,
            row,
            valid,
            mass,
            vocab,
            smoothing,
            kl_grad * term_scale,
            entropy_grad * term_scale,
            ce_grad * ce_scale,
            FORM,
        )
        for i in range(0, tl.cdiv(k, BLOCK)):
            inside = lane + i * BLOCK < k
            at = tl.load(indices + lane + i * BLOCK, mask=inside, other=0).to(tl.int64)
            known = (at >= 0) & (at < vocab)
            raw = tl.load(students + at, mask=inside & known, other=0.0)
            z = _logits(raw, None, student_factor, FORM.cap, FORM.student_scaled)
            kept = tl.zeros(z.shape, tl.float64)
            for j in range(0, k):
                q = tl.exp(tl.load(log_probs + j).to(tl.float64))
                kept += tl.where(at == tl.load(indices + j).to(tl.int64), q, 0.0)
            g = kept.to(tl.float32) * _per_row(-factors.kl)
            g = _finish(g, z, raw, at, label, row, factors, rates, FORM)
            to = at_indices + _per_row(index * k) + lane + i * BLOCK
            tl.store(to, g, mask=inside)


@triton.jit(do_not_specialize=["ignore_index", "k", "count"])
def topk_scatter_kernel(
    at_indices,
    indices,
    labels,
    grad,
    count,
    vocab,
    k,
    grad_stride,
    ignore_index,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts those where they belong, but for rows that are ignored."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    index = at // k
    column = tl.load(indices + at, mask=inside, other=-1).to(tl.int64)
    inside = inside & (column >= 0) & (column < vocab)
    if LABELS:
        inside = inside & (tl.load(labels + index, mask=inside, other=0).to(tl.int64) != ignore_index)
    g = tl.load(at_indices + at, mask=inside, other=0.0)
    tl.store(grad + index * grad_stride + column, g.to(grad.dtype.element_ty), mask=inside)


# ---- scaling --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles", "rows", "row_tiles"])
def scale_rows_kernel(grad, factor, tiles, row_tiles, vocab, grad_stride, factor_stride, BLOCK: tl.constexpr):
    """Rows times their factors, in place. Where that is 1 nothing is read: the factor is known to the GPU
    only. One for all rows is looked at once: 53 µs on an H200 were spent on asking for every tile."""
    if (factor_stride == 0) & (tl.load(factor).to(tl.float32) == 1.0):
        tiles = 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // row_tiles).to(tl.int64)
        by = tl.load(factor + row * factor_stride).to(tl.float32)
        if by != 1.0:
            column = (tile % row_tiles) * BLOCK + tl.arange(0, BLOCK)
            at = grad + row * grad_stride + column
            g = tl.load(at, mask=column < vocab, other=0.0).to(tl.float32) * by
            tl.store(at, g.to(grad.dtype.element_ty), mask=column < vocab)


# ---- launches -------------------------------------------------------------------------------------------


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; of the interpreter, so few that all forms are tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


ONE_TILE = 2048
"""Longest rows that are a tile, alone or with others."""

LONG_ROW = 16384
"""Rows from this length on are split where there are fewer than two a multiprocessor."""

MOST_PARTS = 64

TWICE_READ = 160 << 10
"""Bytes of a row's logits: with two such rows on each of 132 multiprocessors, 42 MB of an L2 cache of 50 are
read once from memory and then once more."""

TOPK_BLOCK = 64
"""Indices that a step of a row's warp takes."""


def _tiles(form: Form, vocab: int, group: int, arch: int, aligned: bool = True) -> list[Tile]:
    """By count. An H200 took what these choose at 45 % of its bandwidth (8192 x 128256), bound by
    instructions; no other choice was timed.

    Of a row of 32000 in bfloat16, forward KL takes 37 instructions an element with 4 groups a place, 39 with
    2, 41 with 1; what a row has once takes some 370 of each warp, which is why there are no more than 8 of
    them where rows are short. 128 registers leave two programs of 8 warps on a multiprocessor, or one of 16.
    Forms that keep more at once have smaller tiles, and so do rows that are not ``aligned``, whose elements
    are read one by one: none spills. ``arch`` makes no difference so far: sm_80, sm_90 and sm_100 have the
    same registers.
    """
    heavy = form.cap or form.divergence == "js"
    several = form.entropy or form.ce or form.divergence == "reverse"
    if vocab <= ONE_TILE:
        padded = max(group, power_of_two(vocab))
        rows = 1 if form.topk else max(1, (512 if heavy or several else 1024) // padded)
        sizes = {"ROWS": rows, "TIMES": 1, "PLACES": padded // group, "GROUP": group, "STAGES": 1}
        warps = 4 if padded <= 1024 else 8
        return [Tile(sizes, num_warps=warps, num_stages=1, maxnreg=255 if heavy or several else 128)]

    def tile(times: int, warps: int, registers: int, stages: int = 1) -> Tile:
        sizes = {"ROWS": 1, "TIMES": times, "PLACES": 32 * warps, "GROUP": group, "STAGES": stages}
        return Tile(sizes, num_warps=warps, num_stages=stages, maxnreg=registers)

    if heavy:
        return [tile(1, 8, 255), tile(1, 4, 255)]
    if vocab <= 4 * ONE_TILE or not aligned or (form.divergence == "reverse" and form.entropy and form.ce):
        return [tile(1, 8, 128), tile(1, 4, 128)]
    if several:
        return [tile(2, 8, 128), tile(1, 8, 128), tile(1, 8, 80), tile(1, 4, 80)]
    two, one = tile(4, 8, 128), tile(4, 16, 128)
    first = [two, one] if vocab * 32 // group <= TWICE_READ else [one, two]
    return [*first, tile(2, 8, 96), tile(1, 16, 64), tile(2, 8, 80, 3), tile(1, 8, 64, 3)]


class _Launch(NamedTuple):
    """What all launches for one loss have in common."""

    form: Form
    tensors: dict[str, Any]
    sizes: dict[str, Any]
    factors: dict[str, float]


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _launch(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    term_scale: float | Tensor,
    ce_scale: float | Tensor,
    grad: Tensor | None,
    *,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    entropy_weight: float,
    divergence: str,
    js_beta: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    student_scale: float,
    teacher_scale: float,
) -> _Launch:
    ce = bool(ce_weight) and labels is not None
    divergence = divergence if kl_weight and teacher is not None else "none"
    scales = None
    if isinstance(term_scale, Tensor) and isinstance(ce_scale, Tensor):
        scales = torch.stack([term_scale, ce_scale])
    form = Form(
        divergence=divergence,
        entropy=bool(entropy_weight),
        ce=ce,
        plain=ce and temperature != 1.0,
        smooth=ce and bool(label_smoothing),
        topk=bool(kl_weight) and topk is not None,
        labels=labels is not None,
        cap=softcap is not None,
        student_scaled=softcap is None and student_scale <= 0,
        teacher_scaled=softcap is None and teacher_scale <= 0,
        scales=scales is not None,
        grad=grad is not None,
    )

    def unit(scale: float) -> float:
        """What exponents are made of is logits times that, or tanh or scaled logits times that."""
        return softcap if softcap is not None else scale if scale > 0 else 1.0

    term, of_ce = (term_scale, ce_scale) if scales is None else (1.0, 1.0)
    log2e = 1 / math.log(2)
    of_mean = {"reverse": math.log(2), "js": 1 - js_beta}.get(divergence, 1.0)
    factors = {
        "student_rate": unit(student_scale) * log2e / temperature,
        "teacher_rate": unit(teacher_scale) * log2e / temperature,
        "plain_rate": unit(student_scale) * log2e,
        "student_factor": student_scale / (softcap or 1.0),
        "teacher_factor": teacher_scale / (softcap or 1.0),
        "beta": js_beta,
        "smoothing": label_smoothing,
        "kl_loss": term * temperature**2 * kl_weight,
        "entropy_loss": term * temperature**2 * entropy_weight,
        "ce_loss": of_ce * ce_weight,
        "kl_grad": term * temperature * kl_weight * student_scale * of_mean,
        "entropy_grad": -term * temperature * entropy_weight * student_scale * math.log(2),
        "ce_grad": of_ce * ce_weight * student_scale,
    }
    return _Launch(
        form,
        {
            "student": _dense(student),
            "teacher": None if divergence == "none" or teacher is None else _dense(teacher),
            "labels": None if labels is None else labels.contiguous(),
            "scales": scales,
            "grad": grad,
        },
        {"rows": student.shape[0], "vocab": student.shape[1], "ignore_index": ignore_index},
        # Float32 as a GPU gets them: the interpreter would go on with more, where a row's numbers are
        # float64.
        {name: c_float(value).value for name, value in factors.items()},
    )


def _names(form: Form) -> list[str]:
    return [form.divergence, *(name for name, value in form._asdict().items() if value is True)]


def _stages(form: Form) -> list[int]:
    if not form.grad or form.divergence in ("none", "forward"):
        return [1, 2]
    return [1, 2, 4] if form.divergence == "reverse" else [1, 2, 3, 4]


def _group(tensors: dict[str, Any]) -> int:
    """Elements of 16 bytes."""
    widest = max(x.element_size() for x in (tensors["student"], tensors["teacher"]) if x is not None)
    return 16 // widest


def _aligned(tensors: dict[str, Any], group: int) -> bool:
    """Whether all rows begin on 16 bytes (where a group does, which may be less), and are whole groups."""
    return tensors["student"].shape[1] % group == 0 and all(
        x is None or (x.stride(0) % group == 0 and x.data_ptr() % 16 == 0)
        for x in (tensors["student"], tensors["teacher"], tensors["grad"])
    )


def _parts(rows: int, vocab: int, block: int, device: torch.device) -> int:
    """Into how many parts rows are split; 1 does not."""
    wanted = 2 * _processors(device)
    if rows >= wanted or vocab < LONG_ROW:
        return 1
    return min(MOST_PARTS, ceil_div(wanted, rows), ceil_div(vocab, 2 * block))


def distill_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    term_scale: float | Tensor,
    ce_scale: float | Tensor,
    grad: Tensor | None,
    *,
    topk: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Losses of ``student`` [R, V], float64 [R]; the gradient is written into ``grad``, dense rows, which may
    be ``student``.

    Args:
        term_scale, ce_scale: numbers, or float64 scalars on the device.
        topk: log-probabilities and indices ``[R, k]`` in place of ``teacher``.
        options: the fields of ``DistillOptions``.
    """
    launch = _launch(student, teacher, labels, topk, term_scale, ce_scale, grad, **options)
    rows, vocab = student.shape
    if rows == 0:
        return torch.empty(0, dtype=torch.float64, device=student.device)
    device = student.device
    group = _group(launch.tensors)
    aligned = _aligned(launch.tensors, group)
    candidates = _tiles(launch.form, vocab, group, architecture(device), aligned)
    dtypes = (student.dtype, None if launch.tensors["teacher"] is None else launch.tensors["teacher"].dtype)
    key = (power_of_two(rows), vocab, *dtypes, aligned, "+".join(_names(launch.form)))
    in_place = grad is not None and grad.data_ptr() == student.data_ptr()

    def run(tile: Tile) -> Tensor:
        return _run(launch, tile, topk)

    with on_device(student):
        tile = candidates[0] if in_place else pick("distill_loss", key, candidates, device, run)
        return run(tile)


def _run(launch: _Launch, tile: Tile, topk: tuple[Tensor, Tensor] | None) -> Tensor:
    form, tensors, sizes = launch.form, launch.tensors, launch.sizes
    student, grad = tensors["student"], tensors["grad"]
    rows, vocab, device = sizes["rows"], sizes["vocab"], student.device
    block = tile.sizes["TIMES"] * tile.sizes["PLACES"] * tile.sizes["GROUP"]
    parts = _parts(rows, vocab, block, device)
    tiles = ceil_div(ceil_div(vocab, block), parts)
    parts = ceil_div(vocab, tiles * block)
    split = parts > 1 or form.topk
    loss = torch.empty((rows, parts), dtype=torch.float64, device=device)
    scratch = {"partials": None, "topk_loss": None, "topk_mass": None}
    if split:
        scratch["partials"] = loss.new_empty(rows * parts * FIELDS.value)
    if form.topk:
        scratch.update(topk_loss=loss.new_empty(rows), topk_mass=loss.new_empty(rows))

    def launch_stages(first: int, last: int) -> None:
        distill_kernel[(ceil_div(rows, tile.sizes["ROWS"]), parts)](
            **tensors,
            **scratch,
            **sizes,
            **launch.factors,
            loss=loss,
            parts=parts,
            part_tiles=tiles,
            student_stride=student.stride(0),
            teacher_stride=0 if tensors["teacher"] is None else tensors["teacher"].stride(0),
            grad_stride=0 if grad is None else grad.stride(0),
            FORM=form,
            FIRST=first,
            LAST=last,
            PARTS=power_of_two(parts) if first > 1 else 1,
            ONE_TILE=vocab <= block,
            ALIGNED=_aligned(tensors, tile.sizes["GROUP"]),
            **tile.options(),
            enable_fp_fusion=True,
        )

    stages = _stages(form)
    if not split:
        launch_stages(stages[0], stages[-1])
        return loss.view(rows)
    launch_stages(1, 1)
    scatter = _run_topk(launch, topk, scratch, parts) if form.topk and topk is not None else None
    for stage in stages[1:]:
        launch_stages(stage, stage)
    if scatter is not None:
        scatter()
    return loss.sum(1)


def _run_topk(
    launch: _Launch, topk: tuple[Tensor, Tensor], scratch: dict[str, Any], parts: int
) -> Callable[[], None] | None:
    """Fills in loss and mass of the k kept. What is returned puts the gradient at their places."""
    tensors, sizes, factors = launch.tensors, launch.sizes, launch.factors
    student, grad = tensors["student"], tensors["grad"]
    rows, vocab = sizes["rows"], sizes["vocab"]
    log_probs, indices = (x.contiguous() for x in topk)
    k = log_probs.shape[1]
    at_indices = None
    if grad is not None:
        at_indices = torch.empty((rows, k), dtype=torch.float32, device=student.device)
    names = (
        "student_rate",
        "plain_rate",
        "student_factor",
        "smoothing",
        "kl_grad",
        "entropy_grad",
        "ce_grad",
    )
    topk_kernel[(rows,)](
        student,
        tensors["labels"],
        log_probs,
        indices,
        *scratch.values(),
        tensors["scales"],
        at_indices,
        vocab,
        k,
        parts,
        student.stride(0),
        sizes["ignore_index"],
        **{name: factors[name] for name in names},
        FORM=launch.form,
        PARTS=power_of_two(parts),
        BLOCK=min(TOPK_BLOCK, max(16, power_of_two(k))),
        num_warps=1,
        enable_fp_fusion=True,
    )
    if grad is None or k == 0:
        return None

    def scatter() -> None:
        topk_scatter_kernel[(ceil_div(rows * k, 1024),)](
            at_indices,
            indices,
            tensors["labels"],
            grad,
            rows * k,
            vocab,
            k,
            grad.stride(0),
            sizes["ignore_index"],
            LABELS=launch.form.labels,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )

    return scatter


def scale_rows(grad: Tensor, factor: Tensor) -> None:
    """``grad`` [R, V], dense rows, times ``factor``, [R] or a scalar, in place; no host waits to see it."""
    rows, vocab = grad.shape
    if grad.numel() == 0:
        return
    block = min(8192, max(128, power_of_two(vocab)))
    row_tiles = ceil_div(vocab, block)
    factor = factor.contiguous()
    with on_device(grad):
        scale_rows_kernel[(min(rows * row_tiles, 4 * _processors(grad.device)),)](
            grad,
            factor,
            rows * row_tiles,
            row_tiles,
            vocab,
            grad.stride(0),
            factor.dim(),
            BLOCK=block,
            num_warps=8 if block == 8192 else 4,
            enable_fp_fusion=True,
        )


# ---- compiled without a GPU -----------------------------------------------------------------------------

_POINTERS = ("student", "teacher", "labels", "topk_loss", "topk_mass", "scales", "partials", "loss", "grad")
_FLOATS = (
    *("student_rate", "teacher_rate", "plain_rate", "student_factor", "teacher_factor", "beta", "smoothing"),
    *("kl_loss", "entropy_loss", "ce_loss", "kl_grad", "entropy_grad", "ce_grad"),
)


def _compilation(
    form: Form, vocab: int, dtype: str, tile: Tile, first: int, last: int, parts: int = 1
) -> Compilation:
    doubles = ("topk_loss", "topk_mass", "scales", "partials", "loss")
    given = {
        "teacher": form.divergence != "none",
        "labels": form.labels,
        "topk_loss": form.topk,
        "topk_mass": form.topk,
        "scales": form.scales,
        "partials": first == last,
        "grad": form.grad,
    }
    types = {name: "*fp64" if name in doubles else f"*{dtype}" for name in _POINTERS}
    types["labels"] = "*i64"
    sizes = ("rows", "vocab", "parts", "part_tiles", "student_stride", "teacher_stride", "grad_stride")
    types.update(dict.fromkeys((*sizes, "ignore_index"), "i32"), **dict.fromkeys(_FLOATS, "fp32"))
    absent = {name: None for name in _POINTERS if not given.get(name, True)}
    block = tile.sizes["TIMES"] * tile.sizes["PLACES"] * tile.sizes["GROUP"]
    strides = (
        [name for name in sizes if name.endswith("stride") or name == "vocab"] if vocab % 16 == 0 else []
    )
    return Compilation(
        f"distill_loss {dtype} vocab={vocab} stages={first}-{last} {' '.join(_names(form))}",
        distill_kernel,
        types,
        {
            **absent,
            "FORM": form,
            "FIRST": first,
            "LAST": last,
            "PARTS": parts,
            "ONE_TILE": vocab <= block,
            "ALIGNED": vocab % tile.sizes["GROUP"] == 0,
        },
        tile,
        aligned=[name for name in (*_POINTERS, *strides) if name not in absent],
    )


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles."""
    forward = Form("forward", *[False] * 10, grad=True)
    loss = forward._replace(grad=False)
    spoken = forward._replace(entropy=True, ce=True, plain=True, smooth=True, labels=True, scales=True)
    forms = [
        forward,
        forward._replace(ce=True, labels=True),
        *(spoken._replace(divergence=divergence) for divergence in ("none", "forward", "reverse", "js")),
        *(spoken._replace(divergence=divergence, cap=True) for divergence in ("forward", "reverse", "js")),
    ]
    found = []
    for dtype, group in (("bf16", 8), ("fp32", 4)):
        for vocab, several in ((10, forms), (1000, forms[:1]), (32000, forms), (128256, forms[:1])):
            for form in several:
                tiles = _tiles(form, vocab, group, 90)
                kept = tiles if dtype == "bf16" else tiles[:1]
                last = _stages(form)[-1]
                found += [_compilation(form, vocab, dtype, tile, 1, last) for tile in kept]
    # Odd rows, which are read an element at a time; rows on multiples of 16 bytes, but not of 16 elements;
    # loss alone; a huge row in parts; a top-k teacher.
    for form, vocab in ((forward, 50257), (forward, 32008), (loss, 32000)):
        found.append(_compilation(form, vocab, "fp16", _tiles(form, vocab, 8, 90, vocab % 8 == 0)[0], 1, 2))
    topk = spoken._replace(divergence="none", topk=True)
    bare = forward._replace(divergence="none", topk=True)
    for form in (forward, spoken._replace(divergence="js", cap=True), topk, bare):
        tile = _tiles(form, 128256, 8, 90)[0]
        found += [
            _compilation(form, 128256, "bf16", tile, stage, stage, 1 if stage == 1 else 16)
            for stage in _stages(form)
        ]
    return [*found, *_other_compilations(topk), *_other_compilations(bare._replace(cap=True))[:1]]


def _other_compilations(topk: Form) -> list[Compilation]:
    floats = dict.fromkeys(
        (*_FLOATS[:1], "plain_rate", "student_factor", "smoothing", "kl_grad", "entropy_grad", "ce_grad"),
        "fp32",
    )
    doubles = dict.fromkeys(("partials", "topk_loss", "topk_mass", "scales"), "*fp64")
    sizes = dict.fromkeys(
        ("vocab", "k", "parts", "count", "student_stride", "grad_stride", "ignore_index"), "i32"
    )
    pointers = {
        "student": "*bf16",
        "labels": "*i64",
        "log_probs": "*fp32",
        "indices": "*i64",
        "grad": "*bf16",
    }
    types = {**pointers, "at_indices": "*fp32", "factor": "*fp32", **doubles, **sizes, **floats}
    types.update(dict.fromkeys(("tiles", "row_tiles", "factor_stride"), "i32"))
    absent = {name: None for name in ("labels", "scales") if not getattr(topk, name)}
    one = Tile({}, num_warps=4, num_stages=1)
    one_warp = Tile({}, num_warps=1, num_stages=1)
    return [
        Compilation(
            f"distill_loss topk {' '.join(_names(topk))}",
            topk_kernel,
            types,
            {**absent, "FORM": topk, "PARTS": 16, "BLOCK": 64},
            one_warp,
            [name for name in tuple(pointers)[:4] if name not in absent],
        ),
        Compilation(
            "distill_loss topk_scatter", topk_scatter_kernel, types, {"LABELS": True, "BLOCK": 1024}, one
        ),
        Compilation(
            "distill_loss scale_rows", scale_rows_kernel, types, {"BLOCK": 4096}, one, ("grad", "vocab")
        ),
    ]
