"""int4 embedding, the textbook page: ``y[i, :] = fma(q - 8, s, c)`` of row index[i], groups along the row.

``s = scale`` and ``c = scale * (8 - zero_point)``, in float32; one rounding to the output dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Int4Weights, dequantize_int4

__all__ = ["int4_embedding"]


def int4_embedding(indices: Tensor, weights: Int4Weights, dtype: torch.dtype) -> Tensor:
    """``indices`` [I], ``weights`` [V, D] without codebook → [I, D] of ``dtype``."""
    zero_point = weights.zero_point
    rows = Int4Weights(
        weights.qweight.index_select(0, indices),
        weights.weight_scale.index_select(0, indices),
        None if zero_point is None else zero_point.index_select(0, indices),
        in_features=weights.in_features,
        group_size=weights.group_size,
    )
    return dequantize_int4(rows, dtype)
