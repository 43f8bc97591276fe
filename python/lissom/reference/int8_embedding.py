"""int8 embedding, the textbook page: ``y[i, :] = scale[index[i]] * qweight[index[i], :]``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_embedding"]


def int8_embedding(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``indices`` [I], ``qweight`` int8 [V, D], ``weight_scale`` float32 [V] → [I, D] of ``dtype``."""
    rows = qweight.index_select(0, indices).float()
    return (rows * weight_scale.index_select(0, indices)[:, None]).to(dtype)
