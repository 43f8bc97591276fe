"""What the linear ops share: checks, how rows of ``x`` reach a kernel, and the backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..reference.numerics import ACTIVATION_FUNCTIONS
from ._library import FLOAT_DTYPES, check_float

__all__ = [
    "activation_gradient",
    "bias_gradient",
    "check_options",
    "dense_bias",
    "flat_rows",
    "input_gradient",
    "kernel_rows",
]


def check_options(
    op: str, n: int, bias: Tensor | None, act_fn: str | None, weight_only: bool, rotated: bool
) -> None:
    """Raise unless the arguments that all linear ops have fit to ``n`` outputs and to each other."""
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"{op}: bias must have shape [{n}], got {tuple(bias.shape)}")
        if bias.dtype not in FLOAT_DTYPES:
            check_float(op, "bias", bias.dtype)
    if rotated and weight_only:
        raise ValueError(f"{op}: rotated has no meaning with weight_only=True; give one of the two")
    if act_fn is not None and act_fn not in ACTIVATION_FUNCTIONS:
        raise ValueError(f"{op}: act_fn={act_fn!r} is unknown; use one of {ACTIVATION_FUNCTIONS} or None")


def flat_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is ambiguous where K = 0


def kernel_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as ``[M, K]`` with dense rows, and how many elements they lie apart."""
    rows = x if x.dim() == 2 else flat_rows(x)
    row_stride, column_stride = rows.stride()
    k = rows.shape[1]
    if column_stride != 1 and k > 1:
        return rows.contiguous(), k
    return rows, row_stride


def dense_bias(bias: Tensor | None) -> Tensor | None:
    """``bias`` as the kernels read it: contiguous float32."""
    if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
        return bias.float().contiguous()
    return bias


def input_gradient(grad: Tensor, weight: Tensor, rotated: bool) -> Tensor:
    """dL/dx from dL/dz ``[..., N]`` and the dequantized weight, straight through the rounding of x."""
    grad_x = grad @ weight
    return formats.rotate(grad_x, 1 / formats.ROTATION_BLOCK) if rotated else grad_x


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """dL/db from dL/dz ``[..., N]``, summed in float32."""
    return flat_rows(grad).sum(0, dtype=torch.float32).to(dtype)


def activation_gradient(grad: Tensor, z: Tensor, act_fn: str) -> Tensor:
    """dL/dz from dL/dy and the pre-activation."""
    aten: Any = torch.ops.aten
    if act_fn == "relu":
        result = aten.threshold_backward(grad, z, 0)
    elif act_fn == "silu":
        result = aten.silu_backward(grad, z)
    else:
        result = aten.gelu_backward(grad, z, approximate="tanh" if act_fn == "gelu_tanh" else "none")
    return torch.as_tensor(result)
