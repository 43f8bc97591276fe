"""int8 linear, the textbook page.

    x ≈ x_scale[m] * qx[m, k]        per row (token): x_scale = absmax / 127, or one static scale
    w ≈ w_scale[n] * qw[n, k]        per output channel
    y[m, n] = act( fma( float(Σ_k qx[m, k] qw[n, k]), x_scale[m] * w_scale[n], bias[n] ) )

With ``rotated``, qw holds the weights times H and x is multiplied by H/16 first (``formats.rotate``).
The sum is an exact int32; ``y`` is rounded once to the output dtype. A row that holds NaN or infinity
comes out as NaN. Per-row scales: Yao et al., "ZeroQuant", 2022; per-channel weights: Krishnamoorthi,
"Quantizing deep convolutional networks", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import ROTATION_BLOCK, rotate
from .numerics import apply_activation, fma

__all__ = ["int8_linear", "quantize_rows"]


def quantize_rows(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize the rows of ``x`` [M, K] to int8.

    Returns:
        ``(qx, x_scale)``: int8 ``[M, K]`` and float32 ``[M]``. Dynamic (``input_scale`` None):
        ``scale = absmax / 127``, ``q = round_half_even(x * (127 / absmax))``; all-zero rows have scale 0.
        Static: ``q = round_half_even(clamp(x * (1 / input_scale), -127, 127))``. Rows with NaN or
        infinity get scale NaN and q = 0.
    """
    x = x.float()
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = torch.isfinite(absmax)
    if input_scale is None:
        limit = torch.full_like(absmax, 127.0)  # a tensor: torch turns `127.0 / t` into a rounded reciprocal
        inverse = limit / absmax
        usable = finite & torch.isfinite(inverse)
        scale = torch.where(usable, absmax / limit, torch.zeros_like(absmax))
        inverse = torch.where(usable, inverse, torch.zeros_like(absmax))
        scaled = x * inverse[:, None]
    else:
        scale = input_scale.float().reshape(()).expand(x.shape[0])
        scaled = (x * (1.0 / input_scale.float())).clamp(-127.0, 127.0)
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    q = torch.where(finite[:, None], torch.round(scaled), torch.zeros_like(x)).to(torch.int8)
    return q, scale


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    rotated: bool = False,
) -> Tensor:
    """``x`` [M, K], ``qweight`` int8 [N, K], ``weight_scale`` [N], ``bias`` [N] or None → [M, N] like x."""
    offset = torch.zeros_like(weight_scale, dtype=torch.float32) if bias is None else bias.float()
    dtype = x.dtype
    if rotated:
        x = rotate(x.float(), 1 / ROTATION_BLOCK)
    if weight_only:
        total = x.float() @ qweight.float().t()
        y = fma(total, weight_scale.float().expand_as(total), offset.expand_as(total))
    else:
        qx, x_scale = quantize_rows(x, input_scale)
        # float64 holds every int32 sum exactly and, unlike an integer matmul, is fast everywhere.
        total = (qx.double() @ qweight.double().t()).float()
        y = fma(total, x_scale[:, None] * weight_scale.float()[None, :], offset.expand_as(total))
    return apply_activation(y, act_fn).to(dtype)
