"""``rotated=True``: weights times H, activations times H/16 on the way (``lissom.formats.rotate``)."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom import _native, formats, nn, ops, testing


@pytest.mark.parametrize("k", [1, 15, 16, 17, 40, 128, 500])
def test_rotation_is_its_own_inverse_up_to_16(k):
    x = torch.randn(7, k, dtype=torch.float64)
    rotated = formats.rotate(x)
    torch.testing.assert_close(formats.rotate(rotated, 1 / 16), x)
    whole = k // 16 * 16
    assert torch.equal(rotated[:, whole:], x[:, whole:])
    if whole:
        assert not torch.allclose(rotated[:, :whole], x[:, :whole])


def test_it_is_the_hadamard_matrix():
    sign = [[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    assert torch.equal(formats.rotate(torch.eye(16)), torch.tensor(sign, dtype=torch.float32))


@pytest.mark.parametrize("isa", [i for i, runs in _native.isas().items() if runs] if _native.module() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 16), (5, 123, 123), (13, 40, 2100), (31, 17, 96)])
@pytest.mark.parametrize("static", [False, True])
def test_bits_are_those_of_the_reference(isa, dtype, shape, static):
    m, n, k = shape
    x = torch.randn(m, k).to(dtype)
    if m > 4:
        x[1], x[2, k // 2], x[3] = 0, torch.nan, x[3] * 1000
    qweight, scale = formats.quantize_int8(formats.rotate(torch.randn(n, k)))
    options = {"input_scale": torch.tensor(0.01) if static else None, "act_fn": "gelu", "rotated": True}
    expected = ops.int8_linear(x, qweight, scale, torch.randn(n) * 0 + 0.5, backend="reference", **options)
    with testing.force_isa(isa):
        actual = ops.int8_linear(x, qweight, scale, torch.full((n,), 0.5), backend="native", **options)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_outliers_cost_less():
    x = torch.randn(64, 256)
    x[:, 3] *= 60
    weight = torch.randn(32, 256)
    exact = x @ weight.t()

    def error(rotated):
        qweight, scale = formats.quantize_int8(formats.rotate(weight) if rotated else weight)
        return (ops.int8_linear(x, qweight, scale, rotated=rotated) - exact).square().mean()

    assert error(True) < error(False) / 4


def test_gradient_with_respect_to_x_is_that_of_the_plain_layer():
    linear = torch.nn.Linear(48, 20)
    layer = nn.Int8Linear.from_linear(linear, lissom.Int8(rotation=True))
    x = torch.randn(6, 48, requires_grad=True)
    g = torch.randn(6, 20)
    (actual,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(actual, g @ layer.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight, linear.weight.detach(), rtol=0, atol=0.01)


def test_weight_only_refuses_it():
    q, s = formats.quantize_int8(torch.randn(3, 16))
    with pytest.raises(ValueError, match="rotated has no meaning with weight_only=True"):
        ops.int8_linear(torch.randn(2, 16), q, s, weight_only=True, rotated=True)
    with pytest.raises(ValueError, match="rotation=True has no use with activation=None"):
        lissom.Int8(activation=None, rotation=True)
