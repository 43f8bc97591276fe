"""Float32 building blocks of the Triton kernels: ``reference/numerics.py``, operation by operation.

Bits agree only where the compiler fuses nothing by itself: kernels that promise bits are launched with
``enable_fp_fusion=False`` and say ``tl.fma`` where one is meant. ``a / b`` is an approximation on the GPU;
``tl.div_rn`` rounds correctly, and :func:`divide` subnormals too.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "constant", "divide", "exp", "round_half_even"]

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction, rounded half to even


@triton.jit
def constant(x, value: tl.constexpr):
    """``value`` in the shape of ``x``; ``tl.fma`` does not broadcast."""
    return tl.full(x.shape, value, tl.float32)


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest even, subnormals too: ``tl.div_rn`` flushes those in Triton 3.4 and 3.5.

    For scales of rows; in what finishes a tile (silu and gelu of |x| below 1e-38) it would cost registers,
    and a plan of ``int4_linear`` would spill.
    """
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)


@triton.jit
def round_half_even(x):
    """The nearest integer, as a float; |x| below 2^22. The sign of a zero is not kept."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def exp(x):
    """As the reference: x clamped to [-87, 88], relative error below 2e-7, NaN stays NaN."""
    clamped = tl.where(x < -87.0, -87.0, x)
    clamped = tl.where(clamped > 88.0, 88.0, clamped)
    n = round_half_even(clamped * 1.4426950408889634)
    r = tl.fma(n, constant(x, -0.693145751953125), clamped)
    r = tl.fma(n, constant(x, -1.428606765330187e-06), r)
    p = constant(x, 1 / 5040)
    p = tl.fma(p, r, constant(x, 1 / 720))
    p = tl.fma(p, r, constant(x, 1 / 120))
    p = tl.fma(p, r, constant(x, 1 / 24))
    p = tl.fma(p, r, constant(x, 1 / 6))
    p = tl.fma(p, r, constant(x, 0.5))
    p = tl.fma(p, r, constant(x, 1.0))
    p = tl.fma(p, r, constant(x, 1.0))
    n = tl.where(n == n, n, 0.0)
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid_times(x, u):
    return tl.div_rn(x, 1.0 + exp(-u))


@triton.jit
def _gelu(x):
    one = constant(x, 1.0)
    z = tl.abs(x) * 0.7071067811865476
    t = tl.div_rn(one, tl.fma(constant(x, 0.5), z, one))
    p = constant(x, 0.17087277)
    p = tl.fma(p, t, constant(x, -0.82215223))
    p = tl.fma(p, t, constant(x, 1.48851587))
    p = tl.fma(p, t, constant(x, -1.13520398))
    p = tl.fma(p, t, constant(x, 0.27886807))
    p = tl.fma(p, t, constant(x, -0.18628806))
    p = tl.fma(p, t, constant(x, 0.09678418))
    p = tl.fma(p, t, constant(x, 0.37409196))
    p = tl.fma(p, t, constant(x, 1.00002368))
    p = tl.fma(p, t, constant(x, -1.26551223))
    half_erfc = (t * exp(tl.fma(-z, z, p))) * 0.5
    return x * tl.where(x < 0, half_erfc, 1.0 - half_erfc)


@triton.jit
def _gelu_tanh(x):
    inner = tl.fma((x * x) * 0.044715, x, x)
    return _sigmoid_times(x, inner * 1.5957691216057308)


@triton.jit
def activate(x, ACT_FN: tl.constexpr):
    """A fused activation function of a float32 tile; ACT_FN None returns it."""
    if ACT_FN == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN
    elif ACT_FN == "gelu":
        return _gelu(x)
    elif ACT_FN == "gelu_tanh":
        return _gelu_tanh(x)
    elif ACT_FN == "silu":
        return _sigmoid_times(x, x)
    else:
        return x
