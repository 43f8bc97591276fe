"""Quantization and packed layouts: ``lissom/formats.py`` against their definitions and the native packer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom import _native, formats
from lissom.ops.int8_linear import int8_pack
from lissom.testing import DTYPES, LINEAR_CASES, assert_same_bits, linear_inputs


def test_quantize_known_values() -> None:
    w = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 7, [2.0, 1.0, -2.0, 0, 0, 0, 0]])
    q, scale = formats.quantize_int8(w)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    # Halves go to the even neighbour.
    assert q.tolist() == [[127, -127, 0, 2, 2, 0, -2], [0] * 7, [127, 64, -127, 0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0, torch.tensor(2 / 127).item()]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantization_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    w = torch.randn(40, 65).to(dtype)
    q, scale = formats.quantize_int8(w)
    assert int(q.abs().max()) == 127
    assert int(q.min()) >= -127
    error = (q.double() * scale.double()[:, None] - w.double()).abs()
    # Half a step, and the float32 roundings of 127 / absmax, product and scale: 127 * 4 * 2^-24 steps.
    assert bool((error <= scale.double()[:, None] * (0.5 + 127 * 4 * 2.0**-24)).all())
    assert_same_bits(formats.dequantize_int8(q, scale), q.float() * scale[:, None])
    assert formats.dequantize_int8(q, scale, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("magnitude", [1e-37, 1e-40, 1e-45, 0.0, -0.0])
def test_rows_too_small_for_a_scale_become_zero(magnitude: float) -> None:
    q, scale = formats.quantize_int8(torch.full((2, 3), magnitude))
    assert int(q.abs().max()) == 0
    assert scale.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("magnitude", [3e38, 1e-36])
def test_rows_at_the_ends_of_the_range(magnitude: float) -> None:
    q, scale = formats.quantize_int8(torch.tensor([[magnitude, -magnitude, magnitude / 4]]))
    assert q.tolist() == [[127, -127, 32]]
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (0, 0)])
def test_empty_weights(n: int, k: int) -> None:
    q, scale = formats.quantize_int8(torch.empty(n, k))
    assert q.shape == (n, k)
    assert scale.tolist() == [0.0] * n


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_row(value: float) -> None:
    w = torch.ones(5, 3)
    w[3, 1] = value
    w[4, 0] = value
    with pytest.raises(ValueError, match=r"weight row 3 holds NaN or infinity \(2 such rows\); repair"):
        formats.quantize_int8(w)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \(2, 3, 4\)"):
        formats.quantize_int8(torch.ones(2, 3, 4))


def test_quantize_keeps_no_graph_and_does_not_change_the_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    before = weight.detach().clone()
    q, scale = formats.quantize_int8(weight)
    assert not q.requires_grad
    assert not scale.requires_grad
    assert_same_bits(weight, before)


def test_packed_layout_is_the_one_drawn() -> None:
    n, k = 18, 6
    q = torch.arange(n * k, dtype=torch.int32).sub(54).to(torch.int8).view(n, k)
    packed = formats.pack_int8(q)
    assert packed.shape == formats.packed_int8_shape(n, k) == (2, 3 * 64)
    for panel in range(2):
        offsets = packed[panel, :64].view(torch.int32)
        lines = packed[panel, 64:].view(2, 16, 4)
        for i in range(16):
            row = panel * 16 + i
            expected = q[row] if row < n else torch.zeros(k, dtype=torch.int8)
            assert offsets[i].item() == -128 * int(expected.int().sum())
            assert lines[0, i].tolist() == expected[:4].tolist()
            assert lines[1, i].tolist() == [*expected[4:].tolist(), 0, 0]


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_unpack_inverts_pack(case: object) -> None:
    q = linear_inputs(case).qweight
    assert_same_bits(formats.unpack_int8(formats.pack_int8(q), *q.shape), q)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_native_packer_gives_the_same_bytes(case: object) -> None:
    q = linear_inputs(case).qweight
    assert_same_bits(int8_pack(q), formats.pack_int8(q))
    assert_same_bits(int8_pack(q.t().contiguous().t()), formats.pack_int8(q))


@pytest.mark.usefixtures("needs_native")
def test_native_constants_are_the_same() -> None:
    module = _native.load()
    assert formats.INT8_PANEL == module.INT8_PANEL
    assert formats.INT8_QUAD == module.INT8_QUAD


def test_largest_k_cannot_overflow() -> None:
    assert formats.INT8_MAX_IN_FEATURES * 127 * 127 <= 2**31 - 1
    assert (formats.INT8_MAX_IN_FEATURES + 1) * 127 * 127 > 2**31 - 1


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("sign", [1, -1])
def test_offsets_of_extreme_weights_at_the_largest_k(sign: int) -> None:
    """-128 * sum passes int32 there and must wrap as the accumulator does, not saturate."""
    q = torch.full((1, formats.INT8_MAX_IN_FEATURES), 127 * sign, dtype=torch.int8)
    assert_same_bits(int8_pack(q), formats.pack_int8(q))
