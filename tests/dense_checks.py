"""What products by dense weights that are made for a call are held to (``kernels/dequantized.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    EXACT_ACT_FNS,
    UNIT_ROUNDOFF,
    assert_within,
    float_tolerance,
    weight_only_bound,
)


def check_dense(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_fn: str | None) -> None:
    """act(x · Wᵀ + bias), W (float32 ``[N, K]``) and bias rounded once to x's type.

    The product may be rounded before the bias is added and before the activation function, and cuBLAS may add
    up parts of K that it has rounded.
    """
    assert y.dtype == x.dtype
    w = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    z = x.double() @ w.double().t()
    z = z if bias is None else z + bias.double()
    magnitude = x.double().abs() @ w.double().abs().t()
    bound = weight_only_bound(x, w, torch.ones(len(w), device=y.device), bias)
    bound = bound + 2 * float_tolerance(z.abs() + bound, y.dtype)
    if y.is_cuda:
        bound = bound + magnitude * UNIT_ROUNDOFF[y.dtype]
    else:  # bfloat16 instructions of CPUs take subnormal numbers for 0
        sizes = x.double().abs().sum(1, keepdim=True) + w.double().abs().sum(1) + x.shape[1]
        bound = bound + sizes * 2.0**-126
    exact = EXACT_ACT_FNS[act_fn](z)
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    largest = torch.finfo(y.dtype).max
    inside = (exact.abs() + bound < largest) & (magnitude < torch.finfo(torch.float32).max)
    inside &= (z.abs() + bound < largest) & w.isfinite().all(1)
    assert_within(y[inside], exact[inside], bound[inside])
