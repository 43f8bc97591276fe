"""Float32 building blocks that every backend repeats operation by operation, so that bits agree.

The native kernels (``csrc/cpu/activation.h``) run the same sequence with hardware fused multiply-adds;
here a fused multiply-add is emulated exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ACTIVATION_FUNCTIONS", "apply_activation", "exp", "fma"]

ACTIVATION_FUNCTIONS = ("relu", "gelu", "gelu_tanh", "silu")
"""Fused activation functions. ``gelu`` is the exact (erf) form, ``gelu_tanh`` the tanh approximation."""


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors with a single rounding.

    The product of two float32 numbers is exact in float64. Its sum with ``c`` is rounded *to odd* in
    float64 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008), after which
    rounding to float32 gives the correctly rounded result.
    """
    product = a.double() * b.double()
    addend = c.double().expand_as(product)
    total = product + addend
    # Knuth's TwoSum: what the addition lost.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    inexact = torch.isfinite(total) & torch.isfinite(error) & (error != 0) & even
    toward = torch.where(error > 0, torch.full_like(total, math.inf), torch.full_like(total, -math.inf))
    odd = torch.where(inexact, torch.nextafter(total, toward), total)
    return odd.float()


def _const(x: Tensor, value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=x.device).expand_as(x)


# exp(r) on |r| <= ln2 / 2: Taylor coefficients 1/7! … 1/2!; truncation error below 6e-9 relative.
_EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.428606765330187e-06
_EXP_LOW, _EXP_HIGH = -87.0, 88.0


def exp(x: Tensor) -> Tensor:
    """float32 exp with ``x`` clamped to [-87, 88]; relative error below 2e-7. NaN stays NaN."""
    clamped = torch.where(x < _EXP_LOW, _const(x, _EXP_LOW), x)
    clamped = torch.where(clamped > _EXP_HIGH, _const(x, _EXP_HIGH), clamped)
    n = torch.round(clamped * _const(x, 1.4426950408889634))
    r = fma(n, _const(x, -_LN2_HIGH), clamped)
    r = fma(n, _const(x, -_LN2_LOW), r)
    p = _const(x, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = fma(p, r, _const(x, coefficient))
    # Scale by 2^n in two steps, so that 2^128 is never formed; NaN carries through p.
    exponent = torch.nan_to_num(n).to(torch.int32)
    power = ((exponent + 127) << 23).view(torch.float32)
    return p * power


def _sigmoid_times(x: Tensor, u: Tensor) -> Tensor:
    """``x * sigmoid(u)`` as ``x / (1 + exp(-u))``."""
    return x / (_const(x, 1.0) + exp(-u))


# erfc(z) = t * exp(-z^2 + P(t)), t = 1 / (1 + z / 2): W. H. Press et al., "Numerical Recipes in C",
# 2nd ed., section 6.2 (erfcc), fractional error below 1.2e-7.
_ERFC_COEFFICIENTS = (
    0.17087277,
    -0.82215223,
    1.48851587,
    -1.13520398,
    0.27886807,
    -0.18628806,
    0.09678418,
    0.37409196,
    1.00002368,
    -1.26551223,
)


def _gelu(x: Tensor) -> Tensor:
    z = x.abs() * _const(x, 0.7071067811865476)
    t = _const(x, 1.0) / fma(_const(x, 0.5), z, _const(x, 1.0))
    p = _const(x, _ERFC_COEFFICIENTS[0])
    for coefficient in _ERFC_COEFFICIENTS[1:]:
        p = fma(p, t, _const(x, coefficient))
    half_erfc = (t * exp(fma(-z, z, p))) * _const(x, 0.5)
    # Phi(x) = 1 - erfc(z)/2 right of zero, erfc(z)/2 left of it.
    phi = torch.where(x < 0, half_erfc, _const(x, 1.0) - half_erfc)
    return x * phi


def _gelu_tanh(x: Tensor) -> Tensor:
    # 0.5 x (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    square = x * x
    inner = fma(square * _const(x, 0.044715), x, x)
    return _sigmoid_times(x, inner * _const(x, 1.5957691216057308))


def apply_activation(x: Tensor, act_fn: str | None) -> Tensor:
    """Apply a fused activation function to float32 ``x``; ``None`` returns ``x``."""
    if act_fn is None:
        return x
    if act_fn == "relu":
        return torch.where(x < 0, torch.zeros_like(x), x)  # keeps NaN
    if act_fn == "gelu":
        return _gelu(x)
    if act_fn == "gelu_tanh":
        return _gelu_tanh(x)
    if act_fn == "silu":
        return _sigmoid_times(x, x)
    raise ValueError(f"act_fn={act_fn!r} is unknown; use one of {ACTIVATION_FUNCTIONS} or None")
