"""How numbers are quantized and packed. Device-free, in plain torch.

This file and ``csrc/common/formats.h`` are the only owners of the packed layouts; a test compares the
two byte for byte.

int8 weights
------------
Symmetric per output channel (row of the weight): ``scale = absmax / 127``,
``q = round_half_even(w * (127 / absmax))`` in [-127, 127]; an all-zero row has scale 0.

*Canonical* layout (what ``state_dict`` and files hold): ``qweight`` int8 ``[N, K]``, ``weight_scale``
float32 ``[N]``.

*Packed* layout (a cache that kernels read): panels of 16 outputs, interleaved by 4 along K, so that one
64-byte line holds what one AVX-512 register multiplies::

    panel p = outputs 16p … 16p+15, (1 + ceil(K/4)) lines of 64 bytes:

    line 0      c0       c1       …   c15          int32: -128 * sum_k q[n, k]  (offset of u8 activations)
    line 1      n0k0..3  n1k0..3  …   n15k0..3     int8:  4 k-values of each of the 16 outputs
    line 2      n0k4..7  n1k4..7  …   n15k4..7
    …

Rows and columns past N and K are zero.

Rotation
--------
An optional change of basis that spreads outliers: every full block of 16 along K is multiplied by a Hadamard
matrix H (H·H = 16·I), weights by H and activations by H/16, which leaves the product as it was. Sizes that no
longer hang on one large element quantize better: MiniLM's activations gain about 9 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "INT8_MAX_IN_FEATURES",
    "INT8_PANEL",
    "INT8_QUAD",
    "ROTATION_BLOCK",
    "dequantize_int8",
    "pack_int8",
    "packed_int8_shape",
    "quantize_int8",
    "rotate",
    "unpack_int8",
]

INT8_PANEL = 16
"""Outputs in one packed panel."""

INT8_QUAD = 4
"""Consecutive k-values of one output that lie side by side."""

INT8_LINE = INT8_PANEL * INT8_QUAD

ROTATION_BLOCK = 16
"""Elements along K that a rotation mixes."""

INT8_MAX_IN_FEATURES = (2**31 - 1) // (127 * 127)
"""Largest K for which an int32 sum of K products of values within ±127 cannot overflow (133152)."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows symmetrically to int8.

    Args:
        weight: ``[N, K]``, any floating dtype, finite.

    Returns:
        ``(qweight, scale)``: int8 ``[N, K]`` in [-127, 127] and float32 ``[N]``, with
        ``weight ≈ qweight * scale[:, None]``. All-zero rows (and rows whose largest magnitude is below
        about 4e-37, where ``127 / absmax`` overflows) become zeros with scale 0.

    Raises:
        ValueError: NaN or infinity in ``weight``, or not two-dimensional.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_int8: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    w = weight.detach().float()
    absmax = w.abs().amax(dim=1) if w.shape[1] else w.new_zeros(w.shape[0])
    bad = ~torch.isfinite(absmax)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"quantize_int8: weight row {row} holds NaN or infinity ({int(bad.sum())} such rows); "
            "repair the checkpoint before compressing it"
        )
    limit = torch.full_like(absmax, 127.0)  # a tensor: torch turns `127.0 / t` into a rounded reciprocal
    inverse = limit / absmax
    usable = torch.isfinite(inverse)
    inverse = torch.where(usable, inverse, torch.zeros_like(inverse))
    q = (w * inverse[:, None]).round_().to(torch.int8)
    scale = torch.where(usable, absmax / limit, torch.zeros_like(absmax))
    return q, scale


def rotate(x: Tensor, factor: float = 1.0) -> Tensor:
    """Multiply every full block of 16 along the last dimension by ``factor`` · H, H the Hadamard matrix.

    H is its own inverse up to 16: ``rotate(rotate(x), 1 / 16) == x`` up to rounding. A shorter last block is
    left alone. Additions are made in the order of the kernels (Sylvester's butterflies, distance 1, 2, 4, 8),
    after the multiplication, so that float32 results agree bit for bit.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` of the same dtype.
    """
    whole = x.shape[-1] // ROTATION_BLOCK * ROTATION_BLOCK
    blocks = (x[..., :whole] * factor).unflatten(-1, (whole // ROTATION_BLOCK, ROTATION_BLOCK))
    for distance in (1, 2, 4, 8):
        pairs = blocks.unflatten(-1, (ROTATION_BLOCK // (2 * distance), 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    return torch.cat((blocks.flatten(-2), x[..., whole:]), dim=-1)


def dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``qweight * scale`` per row: int8 ``[N, K]`` and float32 ``[N]`` to ``[N, K]`` of ``dtype``."""
    return (qweight.float() * scale.float()[:, None]).to(dtype)


def packed_int8_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of the packed form: (panels, bytes per panel)."""
    panels = -(-out_features // INT8_PANEL)
    quads = -(-in_features // INT8_QUAD)
    return panels, (1 + quads) * INT8_LINE


def pack_int8(qweight: Tensor) -> Tensor:
    """Pack canonical int8 ``[N, K]`` into the layout drawn above; int8 ``[panels, bytes]``."""
    n, k = qweight.shape
    panels, width = packed_int8_shape(n, k)
    quads = width // INT8_LINE - 1
    padded = qweight.new_zeros(panels * INT8_PANEL, quads * INT8_QUAD)
    padded[:n, :k] = qweight
    sums = (padded.sum(dim=1, dtype=torch.int32) * -128).view(panels, INT8_PANEL)
    lines = padded.view(panels, INT8_PANEL, quads, INT8_QUAD).permute(0, 2, 1, 3)
    packed = qweight.new_empty(panels, width)
    packed[:, :INT8_LINE] = sums.view(torch.int8)
    packed[:, INT8_LINE:] = lines.reshape(panels, quads * INT8_LINE)
    return packed


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack_int8`: int8 ``[N, K]``."""
    panels, width = packed_int8_shape(out_features, in_features)
    quads = width // INT8_LINE - 1
    lines = packed[:, INT8_LINE:].view(panels, quads, INT8_PANEL, INT8_QUAD).permute(0, 2, 1, 3)
    return lines.reshape(panels * INT8_PANEL, quads * INT8_QUAD)[:out_features, :in_features].contiguous()
