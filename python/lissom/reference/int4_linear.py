"""int4 linear, the textbook page.

    w ≈ s[n, g] * (q[n, k] - zero_point[n, g])      uniform; symmetric: zero_point = 8
    w ≈ s[n, g] * table[q[n, k]]                    codebook, its 16 values quantized to int8 like a row
    x ≈ x_scale[m] * qx[m, k]                       per row (token), as for int8

Every segment (a group, or 128 columns of a row that is one group) has an exact integer sum. The sums meet in
float32, in the order of the segments; that of the zero-points goes beside, with c = s * (8 - zero_point)::

    acc = fma( float(Σ_k qx (q - 8)), s, acc )      codebook: Σ_k qx t8[q], with the table's scale in s
    acc = fma( float(Σ_k qx), c, acc )              only with zero-points
    y[m, n] = act( fma( acc, x_scale[m], bias[n] ) )

``y`` is rounded once to the output dtype; a row that holds NaN or infinity comes out as NaN. With
``weight_only``, x stays in floating point: y = act( Σ_k x w + bias ), w in float32 (``dequantize_int4``), the
order of the sum left open. With ``rotated``, q holds the weights times H and x is multiplied by H/16 first
(``formats.rotate``). With a ``group_index``, columns are taken in the order of their groups.

Groups: Shen et al., "Q-BERT", 2020; Frantar et al., "GPTQ", 2023 (``group_index`` is its ``g_idx``). Tables:
Han et al., "Deep Compression", 2016; Dettmers et al., "QLoRA", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import (
    INT4_ZERO,
    ROTATION_BLOCK,
    Int4Weights,
    dequantize_int4,
    group_order,
    rotate,
    segment_terms,
    unpack_nibbles,
)
from .int8_linear import quantize_rows
from .numerics import apply_activation, fma

__all__ = ["int4_linear"]


def int4_linear(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    rotated: bool = False,
) -> Tensor:
    """``x`` [M, K], ``weights`` [N, K], ``bias`` [N] or None → [M, N] like x."""
    m, n, k = x.shape[0], weights.out_features, weights.in_features
    dtype = x.dtype
    offset = x.new_zeros(n, dtype=torch.float32) if bias is None else bias.float()
    if weight_only:
        total = x.float() @ dequantize_int4(weights).t()
        return apply_activation(total + offset, act_fn).to(dtype)

    codes = unpack_nibbles(weights.qweight, k).long()
    if weights.group_index is not None:
        order = group_order(weights.group_index)
        x, codes = x[:, order], codes[:, order]
    if rotated:
        x = rotate(x.float(), 1 / ROTATION_BLOCK)
    qx, x_scale = quantize_rows(x)
    s, c, tables = segment_terms(weights, weight_only)

    acc = x.new_zeros(m, n, dtype=torch.float32)
    for g in range(weights.segments):
        columns = slice(g * weights.segment_size, (g + 1) * weights.segment_size)
        if tables is None:
            q = codes[:, columns] - INT4_ZERO
        else:
            q = (tables if tables.dim() == 2 else tables[:, g]).gather(1, codes[:, columns])
        # float64 holds every sum exactly and, unlike an integer matmul, is fast everywhere.
        total = qx[:, columns].double() @ q.double().t()
        acc = fma(total.float(), s[:, g].expand(m, n), acc)
        if c is not None:
            sums = qx[:, columns].sum(dim=1, dtype=torch.int32).float()
            acc = fma(sums[:, None].expand(m, n), c[:, g].expand(m, n), acc)
    return apply_activation(fma(acc, x_scale[:, None].expand(m, n), offset.expand(m, n)), act_fn).to(dtype)
