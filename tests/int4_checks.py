"""What tests of ``int4_linear`` on a GPU share: inputs on a device, and what results are held to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lissom import formats
from lissom.reference import int4_linear as page
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    EXACT_ACT_FNS,
    UNIT_ROUNDOFF,
    Int4Inputs,
    assert_same_bits,
    assert_within,
    float_tolerance,
    int4_inputs,
    weight_only_bound,
)

TABLE_ERROR = {torch.float32: 0.0, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-21}
"""Relative, of a table's value as two numbers of x's type: 8 and 8 bits (11 and 11), rounded."""


def moved(device: str, record: Any) -> Any:
    """A record with its tensors, and those of records in it, on the device."""
    values = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, formats.Int4Weights):
            value = moved(device, value)
        values[field.name] = value.to(device) if isinstance(value, Tensor) else value
    return type(record)(**values)


def made(device: str, *key: Any, **options: Any) -> Int4Inputs:
    """``int4_inputs`` on the device."""
    inputs: Int4Inputs = moved(device, int4_inputs(*key, **options))
    return inputs


def strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def check_other_order(y: Tensor, expected: Tensor, inputs: Int4Inputs) -> None:
    """float32 sums of the same terms in two orders, each off by at most (terms + 1) u times their size."""
    x, w = inputs.x, inputs.weights
    codes = formats.unpack_nibbles(w.qweight, w.in_features).long()
    if w.group_index is not None:
        order = formats.group_order(w.group_index)
        x, codes = x[:, order], codes[:, order]
    if inputs.rotated:
        x = formats.rotate(x.float(), 1 / formats.ROTATION_BLOCK)
    q, x_scale = page.quantize_rows(x)
    s, c, tables = formats.segment_terms(w, False)
    magnitude = torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    for g in range(w.segments):
        columns = slice(g * w.segment_size, (g + 1) * w.segment_size)
        levels = codes[:, columns] - 8
        if tables is not None:
            levels = (tables if tables.dim() == 2 else tables[:, g]).gather(1, codes[:, columns])
        total = q[:, columns].double() @ levels.double().t()
        magnitude += (total * s[:, g].double()).abs()
        if c is not None:
            magnitude += (q[:, columns].double().sum(1, keepdim=True) * c[:, g].double()).abs()
    u = UNIT_ROUNDOFF[torch.float32]
    bound = magnitude * x_scale[:, None].double().abs() * (4 * w.segments + 4) * u
    bound = bound * ACT_FN_LIPSCHITZ + (2 * u + ACT_FN_ERROR) * expected.double().abs() + 1e-37
    bound = bound + 2 * float_tolerance(expected.double().abs() + bound, y.dtype)
    assert y.dtype == expected.dtype
    finite = expected.isfinite()
    assert_same_bits(y[~finite], expected[~finite])
    assert_within(y[finite], expected[finite].double(), bound[finite])


def check_weight_only(y: Tensor, inputs: Int4Inputs) -> None:
    """The bound of float32 sums that holds for the CPU, and what tables and zero-points add to it."""
    assert y.dtype == inputs.x.dtype
    w, x = inputs.weights, inputs.x
    weight = formats.dequantize_int4(w)
    ones = torch.ones(w.out_features, device=y.device)
    z = x.double() @ weight.double().t()
    z = z if inputs.bias is None else z + inputs.bias.double()
    magnitude = x.double().abs() @ weight.double().abs().t()
    bound = weight_only_bound(x, weight, ones, inputs.bias)
    if w.codebook is not None:
        bound = bound + TABLE_ERROR[x.dtype] * magnitude
    if w.zero_point is not None:
        # (q - 8) s and c cancel in a weight; apart, each is rounded by itself, and c is s (8 - z) rounded.
        plain = formats.dequantize_int4(replace(w, zero_point=None)).double().abs()
        apart = x.double().abs() @ (plain + (plain + weight.double().abs())).t()
        bound = bound + apart * (x.shape[-1] + 4) * UNIT_ROUNDOFF[torch.float32]
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    # Where the result leaves its dtype's range, or a partial sum float32's, finite and infinite are right.
    inside = (exact.abs() + bound < torch.finfo(y.dtype).max) & (magnitude < torch.finfo(torch.float32).max)
    assert_within(y[inside], exact[inside], bound[inside])
