"""Rotation: ``formats.rotate``, ``int8_linear(rotated=True)`` on every implementation, its layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lissom import formats
from lissom.nn import Int8Linear
from lissom.ops.int8_linear import int8_pack
from lissom.reference import int8_linear as page
from lissom.testing import (
    ACT_FNS,
    DTYPES,
    LINEAR_CASES,
    ROW_KINDS,
    LinearCase,
    assert_same_bits,
    assert_within,
    linear_inputs,
    rows,
)

OP = torch.ops.lissom.int8_linear.default
B = formats.ROTATION_BLOCK

ROTATION_ERROR = 4 * 2.0**-24
"""Four additions one after the other, each rounded once, relative to the block's sum of magnitudes."""


def hadamard() -> torch.Tensor:
    """Sylvester's construction, the definition itself."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < B:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 32, 47, 128])
def test_rotate_is_the_hadamard_matrix_on_full_blocks(k: int) -> None:
    x = rows(5, k, kind="normal")
    y = formats.rotate(x)
    assert y.shape == x.shape
    whole = k // B * B
    blocks = x[:, :whole].double().view(5, -1, B)
    exact = blocks @ hadamard()
    bound = (blocks.abs().sum(-1, keepdim=True) * ROTATION_ERROR).expand_as(exact)
    assert_within(y[:, :whole].view(5, -1, B), exact, bound)
    assert_same_bits(y[:, whole:], x[:, whole:])


def test_rotate_is_its_own_inverse_up_to_the_block() -> None:
    assert torch.equal(hadamard() @ hadamard(), B * torch.eye(B, dtype=torch.float64))
    x = torch.randint(-9, 10, (3, 4, 50)).float()  # small integers: no rounding
    assert_same_bits(formats.rotate(formats.rotate(x), 1 / B), x)


def test_rotation_keeps_the_product_and_spreads_an_outlier() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(32, 256), torch.randn(64, 256)
    x[:, 7] *= 60  # one column far above the rest, as in transformers' activations
    exact = x.double() @ w.double().t()
    plain = page.int8_linear(x, *formats.quantize_int8(w)).double()
    rotated = page.int8_linear(x, *formats.quantize_int8(formats.rotate(w)), rotated=True).double()
    errors = [float((y - exact).norm() / exact.norm()) for y in (plain, rotated)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_every_shape(implementation: str, case: LinearCase, mode: str, dtype: torch.dtype) -> None:
    inputs = linear_inputs(case, dtype, mode, ACT_FNS[sum(case[:3]) % len(ACT_FNS)])
    expected = page.int8_linear(*inputs.args, rotated=True)
    assert_same_bits(OP(*inputs.args, rotated=True), expected)
    packed = int8_pack(inputs.qweight)
    assert_same_bits(OP(*inputs.args, packed=packed, rotated=True), expected)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_every_kind_of_row(implementation: str, mode: str, dtype: torch.dtype, kind: str) -> None:
    for k in (16, 70, 96):
        inputs = linear_inputs(LinearCase(7, k, 20, ""), dtype, mode, kind=kind)
        assert_same_bits(OP(*inputs.args, rotated=True), page.int8_linear(*inputs.args, rotated=True))


@pytest.mark.parametrize("position", [0, 5, 31, 36])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_row_with_nan_or_infinity_is_nan(implementation: str, mode: str, bad: float, position: int) -> None:
    inputs = linear_inputs(LinearCase(14, 37, 18, ""), torch.float32, mode, "relu", kind="normal")
    x = inputs.x.clone()
    x[[2, 13], position] = bad
    y = OP(x, *inputs.args[1:], rotated=True)
    assert bool(y[[2, 13]].isnan().all())
    assert_same_bits(y, page.int8_linear(x, *inputs.args[1:], rotated=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_leading_dimensions_and_threads(implementation: str, dtype: torch.dtype) -> None:
    inputs = linear_inputs(LinearCase(140, 100, 130, ""), dtype)
    expected = page.int8_linear(*inputs.args, rotated=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(OP(*inputs.args, rotated=True), expected)
    for x in (
        inputs.x.t().contiguous().t(),
        torch.cat([inputs.x.new_zeros(1), inputs.x.flatten()])[1:].view(140, 100),
    ):
        assert_same_bits(OP(x, *inputs.args[1:], rotated=True), expected)
    y = OP(inputs.x.view(7, 20, 100), *inputs.args[1:], rotated=True)
    assert_same_bits(y.view(140, 130), expected)


def test_has_no_meaning_with_weight_only(implementation: str) -> None:
    inputs = linear_inputs(LinearCase(2, 32, 3, ""), torch.float32, "weight_only")
    for packed in (None, int8_pack(inputs.qweight)):
        with pytest.raises(
            ValueError, match=r"int8_linear: rotated has no meaning with weight_only=True; give one of"
        ):
            OP(*inputs.args, packed=packed, rotated=True)
    with pytest.raises(ValueError, match=r"Int8Linear: rotated=True has no use with activation=None"):
        Int8Linear(32, 3, activation=None, rotated=True)


@pytest.mark.parametrize("leading", [(7,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_gradients(implementation: str, leading: tuple[int, ...], act_fn: str | None) -> None:
    """dL/dx goes through the dequantized weight in the *original* basis: rotate(W) / 16."""
    m = math.prod(leading)
    inputs = linear_inputs(LinearCase(7, 40, 18, ""), torch.float32, "dynamic", act_fn, kind="normal")
    x = inputs.x[:m].reshape(*leading, 40).clone().requires_grad_()
    y = OP(x, *inputs.args[1:], rotated=True)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (grad_x,) = torch.autograd.grad(y, x, grad)
    z = OP(x.detach(), *inputs.args[1:6], None, rotated=True).double().requires_grad_()
    activated = nn.functional.gelu(z) if act_fn else z
    (grad_z,) = torch.autograd.grad(activated, z, grad.double())
    weight = formats.rotate(inputs.qweight.double() * inputs.weight_scale.double()[:, None], 1 / B)
    # A few float32 roundings of 18 terms, and of the 16 that a rotation adds up.
    torch.testing.assert_close(grad_x.double(), grad_z @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_opcheck(implementation: str, mode: str) -> None:
    inputs = linear_inputs(LinearCase(5, 40, 18, ""), torch.float32, mode, "silu", kind="normal")
    x = inputs.x.clone().requires_grad_()
    result = torch.library.opcheck(OP, (x, *inputs.args[1:]), {"rotated": True})
    assert set(result.values()) == {"SUCCESS"}


def test_layer() -> None:
    from lissom import Int8

    torch.manual_seed(0)
    original = nn.Linear(50, 18)
    before = original.weight.detach().clone()
    layer = Int8Linear.from_linear(original, Int8(rotation=True))
    assert layer.rotated
    assert_same_bits(original.weight, before)
    q, s = formats.quantize_int8(formats.rotate(before))
    assert_same_bits(layer.qweight, q)
    x = torch.randn(5, 50)
    assert_same_bits(layer(x), page.int8_linear(x, q, s, original.bias, rotated=True))
    # `weight` is in the basis of nn.Linear: off by the quantization only, half a step.
    error = (layer.weight - before).abs().amax(dim=1)
    assert bool((error <= s * 0.51).all())
    twin = Int8Linear(50, 18, rotated=True)
    twin.load_state_dict(layer.state_dict())
    assert_same_bits(twin(x), layer(x))
    assert repr(layer) == repr(twin)
    assert "rotated" in repr(layer)
