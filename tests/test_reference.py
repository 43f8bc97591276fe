"""The reference against exact arithmetic (float64, rationals) and torch's own functions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from lissom import formats
from lissom.reference import int4_linear as int4_page
from lissom.reference import int8_embedding as embedding_page
from lissom.reference import int8_linear as linear_page
from lissom.reference import numerics
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FNS,
    DTYPES,
    INT4_FORMS,
    Int4Form,
    LinearCase,
    assert_same_bits,
    assert_within,
    float_tolerance,
    int4_inputs,
    linear_inputs,
    rows,
    weight_only_bound,
)

EXP_ERROR = 2e-7
"""Promised by ``numerics.exp``: relative, on [-87, 88]."""

EXACT = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def _rounded(exact: Fraction) -> float:
    """``exact`` rounded once to float32 (half to even), by integer arithmetic."""
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1] - 24, -149)  # of the last place
    step = Fraction(2) ** exponent
    value = float(round(exact / step) * step)
    return value if abs(value) < 2.0**128 else math.copysign(math.inf, value)


def test_fma_rounds_once() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(3000, generator=generator) for _ in range(3))
    # Near-cancellation, far apart magnitudes, results below the normal range: where two roundings would show.
    c[:1000] = -(a[:1000] * b[:1000])
    c[1000:1500] *= 2.0**-40
    a[1500:2000] *= 2.0**-70
    b[1500:2000] *= 2.0**-70
    c[1500:2000] *= 2.0**-140
    result = numerics.fma(a, b, c)
    for i in range(len(a)):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        assert result[i].item() == _rounded(exact), (a[i].item(), b[i].item(), c[i].item())


def test_fma_where_double_rounding_would_fail() -> None:
    # a * b = 1 + 2^-24 exactly half way between two floats; c tips it, below float64's last place.
    a, b = torch.tensor([1.0 + 2.0**-12]), torch.tensor([1.0 - 2.0**-12])  # 1 - 2^-24
    c = torch.tensor([2.0**-90])
    assert numerics.fma(a, b, c).item() == _rounded(
        Fraction(a.item()) * Fraction(b.item()) + Fraction(2) ** -90
    )
    half = torch.tensor([2.0**-24])
    one = torch.tensor([1.0])
    assert numerics.fma(half, one, one).item() == 1.0  # tie to even
    a = torch.tensor([2.0**-12 + 2.0**-35])
    b = torch.tensor([2.0**-12])  # 2^-24 + 2^-47: just over the tie
    assert numerics.fma(a, b, one).item() == 1.0 + 2.0**-23


def test_fma_special_values() -> None:
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, inf, nan, 3e38, -3e38, 0.0, -0.0, 1.0])
    b = torch.tensor([1.0, 0.0, 1.0, 2.0, 2.0, 5.0, 5.0, 0.0])
    c = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, -0.0, -0.0, -0.0])
    assert_same_bits(numerics.fma(a, b, c), torch.tensor([inf, nan, nan, inf, -inf, 0.0, -0.0, 0.0]))


def test_exp_error_bound() -> None:
    x = torch.cat([torch.linspace(-87, 88, 200_001), torch.randn(50_000) * 1e-3])
    exact = x.double().exp()
    assert_within(numerics.exp(x), exact, exact * EXP_ERROR)


def test_exp_clamps_and_keeps_nan() -> None:
    x = torch.tensor([-1e30, -math.inf, 1e30, math.inf, math.nan, 0.0])
    y = numerics.exp(x)
    low, high = numerics.exp(torch.tensor([-87.0, 88.0])).tolist()
    assert y[:4].tolist() == [low, low, high, high]
    assert math.isnan(y[4])
    assert y[5].item() == 1.0


@pytest.mark.parametrize("act_fn", list(EXACT))
def test_activation_functions_against_float64(act_fn: str) -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.randn(20_000) * 1e-4, torch.tensor([0.0, 50.0, 1e4])]
    )
    exact = EXACT[act_fn](x.double())
    # Relative to |x|: the output is x times a factor in [0, 1] whose absolute error is small.
    assert_within(numerics.apply_activation(x, act_fn), exact, x.double().abs() * ACT_FN_ERROR + 1e-37)


@pytest.mark.parametrize("act_fn", list(EXACT))
def test_activation_functions_far_out(act_fn: str) -> None:
    y = numerics.apply_activation(torch.tensor([-1e4, 1e4, math.nan]), act_fn)
    assert abs(y[0].item()) < 1e-30
    assert y[1].item() == 1e4
    assert math.isnan(y[2])


def test_unknown_activation_function() -> None:
    with pytest.raises(ValueError, match=r"act_fn='tanh' is unknown; use one of \('relu', 'gelu'"):
        numerics.apply_activation(torch.zeros(1), "tanh")


def test_quantize_rows_known_values() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, -0.0, 0.0, 0.0], [1.0, -4.0, 2.0, 3.0]])
    q, scale = linear_page.quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [32, -127, 64, 95]]
    assert scale.tolist() == [1.0, 0.0, torch.tensor(4 / 127).item()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_rows_with_non_finite_rows(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(3, 4, dtype=dtype)
    x[1, 2] = bad
    for input_scale in (None, torch.tensor(0.5)):
        q, scale = linear_page.quantize_rows(x, input_scale)
        assert scale.isnan().tolist() == [False, True, False]
        assert int(q[1].abs().max()) == 0


def test_static_scale_clamps() -> None:
    q, scale = linear_page.quantize_rows(torch.tensor([[1e30, -1e30, 0.25, 0.75]]), torch.tensor(0.5))
    assert q.tolist() == [[127, -127, 0, 2]]
    assert scale.tolist() == [0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_linear_follows_its_formula(dtype: torch.dtype, act_fn: str | None) -> None:
    """Element by element in exact arithmetic, without matmul."""
    inputs = linear_inputs(LinearCase(9, 21, 6, ""), dtype, "dynamic", act_fn)
    assert inputs.bias is not None
    y = linear_page.int8_linear(*inputs.args)
    qx, x_scale = linear_page.quantize_rows(inputs.x)
    z = torch.empty(9, 6)
    for m in range(9):
        for n in range(6):
            total = sum(int(a) * int(b) for a, b in zip(qx[m], inputs.qweight[n], strict=True))
            scale = (x_scale[m] * inputs.weight_scale[n]).item()
            z[m, n] = _rounded(
                Fraction(float(torch.tensor(float(total)))) * Fraction(scale)
                + Fraction(inputs.bias[n].item())
            )
    assert_same_bits(y, numerics.apply_activation(z, act_fn).to(dtype))


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_linear_follows_its_formula(form: Int4Form, act_fn: str | None) -> None:
    """Element by element and group by group in exact arithmetic, from the canonical tensors."""
    m, k, n = 4, 133, 7
    inputs = int4_inputs(LinearCase(m, k, n, ""), form, act_fn=act_fn)
    w = inputs.weights
    assert inputs.bias is not None
    qx, x_scale = linear_page.quantize_rows(inputs.x)
    codes = formats.unpack_nibbles(w.qweight, k)
    size = 128 if form.group_size == -1 else form.group_size  # of a segment
    segment = torch.arange(k) // size if w.group_index is None else w.group_index
    z = torch.empty(m, n)
    for i in range(m):
        for j in range(n):
            acc = 0.0
            for g in range(-(-k // size)):
                group = 0 if form.group_size == -1 else g
                columns = (segment == g).nonzero().flatten().tolist()
                s = w.weight_scale[j, group].float()
                table = torch.arange(-8, 8)
                if w.codebook is not None:
                    book = w.codebook.expand(n, 16) if form.codebook == "tensor" else w.codebook
                    book = book[j, group] if form.codebook == "group" else book[j]
                    t8, t_scale = formats.quantize_int8(book[None])
                    table, s = t8[0], s * t_scale[0]
                total = sum(int(qx[i, c]) * int(table[int(codes[j, c])]) for c in columns)
                acc = _rounded(Fraction(total) * Fraction(s.item()) + Fraction(acc))
                if w.zero_point is not None:
                    offset = (s * (8 - w.zero_point[j, group].float())).item()
                    total = sum(int(qx[i, c]) for c in columns)
                    acc = _rounded(Fraction(total) * Fraction(offset) + Fraction(acc))
            exact = Fraction(acc) * Fraction(x_scale[i].item()) + Fraction(inputs.bias[j].item())
            z[i, j] = _rounded(exact)
    assert_same_bits(int4_page.int4_linear(*inputs.page), numerics.apply_activation(z, act_fn))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_is_within_its_bound_of_exact(dtype: torch.dtype) -> None:
    inputs = linear_inputs(LinearCase(9, 300, 20, ""), dtype, "weight_only", kind="normal")
    assert inputs.bias is not None
    exact = (
        inputs.x.double() @ inputs.qweight.double().t()
    ) * inputs.weight_scale.double() + inputs.bias.double()
    bound = weight_only_bound(inputs.x, inputs.qweight, inputs.weight_scale, inputs.bias)
    assert_within(
        linear_page.int8_linear(*inputs.args), exact, bound + float_tolerance(exact.abs() + bound, dtype)
    )


def test_quantized_linear_approximates_the_float_one() -> None:
    """What the whole scheme is for: on ordinary inputs a relative error of about one percent."""
    inputs = linear_inputs(LinearCase(64, 512, 64, ""), kind="normal")
    weight = torch.randn(64, 512)
    from lissom.formats import quantize_int8

    y = linear_page.int8_linear(inputs.x, *quantize_int8(weight))
    expected = F.linear(inputs.x, weight)
    assert float((y - expected).norm() / expected.norm()) < 0.015


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_follows_its_formula(dtype: torch.dtype) -> None:
    table = rows(5, 7, kind="normal").mul(40).clamp(-127, 127).to(torch.int8)
    scale = torch.rand(5)
    index = torch.tensor([4, 0, 4, 2])
    y = embedding_page.int8_embedding(index, table, scale, dtype)
    expected = torch.stack([table[i].float() * scale[i] for i in index.tolist()]).to(dtype)
    assert_same_bits(y, expected)
