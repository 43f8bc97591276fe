"""``lissom::int8_linear`` on every implementation: numbers, shapes, bad input, gradients, choices."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import formats, registry
from lissom.ops import int8_linear
from lissom.ops.int8_linear import int8_pack
from lissom.reference import int8_linear as page
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    DTYPES,
    EXACT_ACT_FNS,
    GRAD_TOLERANCE,
    LINEAR_CASES,
    MODES,
    ROW_KINDS,
    UNIT_ROUNDOFF,
    VIEWS,
    LinearCase,
    LinearInputs,
    assert_same_bits,
    assert_within,
    float_tolerance,
    linear_inputs,
    weight_only_bound,
)

OP = torch.ops.lissom.int8_linear.default


@functools.cache
def made(*key: Any, **options: Any) -> tuple[LinearInputs, Tensor]:
    """Inputs and what the reference makes of them; shared by all implementations."""
    inputs = linear_inputs(*key, **options)
    return inputs, page.int8_linear(*inputs.args)


def check(y: Tensor, inputs: LinearInputs, expected: Tensor) -> None:
    """Bit-identical where quantized; within the proved bound where weight-only."""
    if not inputs.weight_only:
        assert_same_bits(y, expected)
        return
    assert y.dtype == inputs.x.dtype
    z = (inputs.x.double() @ inputs.qweight.double().t()) * inputs.weight_scale.double()
    z = z if inputs.bias is None else z + inputs.bias.double()
    bound = weight_only_bound(inputs.x, inputs.qweight, inputs.weight_scale, inputs.bias)
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    # Where the result leaves its dtype's range, or a partial sum float32's, finite and infinite are right.
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ inputs.qweight.double().abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def act_fn_for(case: LinearCase, *others: object) -> str | None:
    """A fixed but varied choice, so that shapes meet all activation functions without the full product."""
    return ACT_FNS[(sum(case[:3]) + sum(map(len, map(str, others)))) % len(ACT_FNS)]


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_every_shape(implementation: str, case: LinearCase, mode: str, dtype: torch.dtype) -> None:
    inputs, expected = made(case, dtype, mode, act_fn_for(case, mode, dtype))
    y = OP(*inputs.args)
    assert y.shape == (case.m, case.n)
    check(y, inputs, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_option(
    implementation: str, mode: str, dtype: torch.dtype, act_fn: str | None, bias: bool
) -> None:
    inputs, expected = made(LinearCase(19, 45, 37, "options"), dtype, mode, act_fn, bias=bias, seed=3)
    check(OP(*inputs.args), inputs, expected)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_row(implementation: str, mode: str, dtype: torch.dtype, kind: str) -> None:
    inputs, expected = made(LinearCase(7, 70, 20, "row kinds"), dtype, mode, None, kind=kind)
    check(OP(*inputs.args), inputs, expected)


def test_randomized(implementation: str) -> None:
    """A seeded walk over shapes and options; the seed that fails is in the assertion."""
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)

        def pick(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        case = LinearCase(pick(0, 40), pick(0, 90) if seed % 5 else pick(0, 700), pick(0, 90), "random")
        dtype, mode, act_fn = DTYPES[pick(0, 2)], MODES[pick(0, 2)], ACT_FNS[pick(0, 4)]
        inputs, expected = made(case, dtype, mode, act_fn, bias=bool(pick(0, 1)), seed=seed)
        try:
            check(OP(*inputs.args), inputs, expected)
        except AssertionError as error:
            raise AssertionError(f"seed={seed} {case} {dtype} {mode} {act_fn}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_sums_do_not_saturate(implementation: str, dtype: torch.dtype) -> None:
    """All |q| = 127 with every combination of signs: pairs of products that saturate 16 bits."""
    k = 4099
    signs = torch.tensor([[1.0], [-1.0]]).repeat(2, k)
    signs[2:, ::2] *= -1
    qweight = (signs * 127).to(torch.int8)
    x = (signs * 3).to(dtype)
    y = OP(x, qweight, torch.ones(4))
    assert_same_bits(y, page.int8_linear(x, qweight, torch.ones(4)))
    if dtype == torch.float32:
        # fma(float(acc), scale, 0): float(acc) rounds 127 * 127 * k to 24 bits, the rest is one rounding.
        assert y[0, 0].item() == torch.tensor(float(127 * 127 * k)).mul(torch.tensor(3 / 127.0)).item()
        assert y[0, 1].item() == -y[0, 0].item()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_k(implementation: str, sign: float) -> None:
    k = formats.INT8_MAX_IN_FEATURES
    x = torch.ones(1, k)
    qweight = torch.full((3, k), 127, dtype=torch.int8)
    qweight[1] = -127
    y = OP(x * sign, qweight, torch.ones(3))
    assert_same_bits(y, page.int8_linear(x * sign, qweight, torch.ones(3)))
    assert y[0, 0].item() == -y[0, 1].item() == pytest.approx(sign * 127 * k, rel=1e-6)


def test_sums_beyond_24_bits_are_rounded_to_nearest_even(implementation: str) -> None:
    """float(acc) where acc is no float32: 2^24 + 1 goes down, 2^24 + 3 up."""
    # acc = 127 * sum(w) for x = const; choose weights so that acc has low bits beyond 24.
    k = 2000
    qweight = torch.full((40, k), 127, dtype=torch.int8)
    for n in range(40):
        qweight[n, : n + 1] = 126 - n
    x = torch.full((1, k), 127.0)
    x[0, 1::3] = 126.0
    y = OP(x, qweight, torch.ones(40))
    assert_same_bits(y, page.int8_linear(x, qweight, torch.ones(40)))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_negative_zero(implementation: str, mode: str) -> None:
    """Zero sums: fma(0, s, bias) keeps the sign of a zero bias as the reference does."""
    x = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0], [1.0, -1.0, 0.0]])
    qweight = torch.tensor([[5, 5, 5], [-5, -5, 3]], dtype=torch.int8)
    scale = torch.tensor(0.5) if mode == "static" else None
    for act_fn in ACT_FNS:
        for bias in (None, torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])):
            args = (x, qweight, torch.tensor([0.5, 0.25]), bias, scale, False, act_fn)
            assert_same_bits(OP(*args), page.int8_linear(*args))


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 3e-39, 0.25, 7.3e5, 1e30])
def test_static_scales_of_any_magnitude(implementation: str, scale: float) -> None:
    inputs, _ = made(LinearCase(18, 37, 19, "static scales"), torch.float32, "static")
    args = (*inputs.args[:4], torch.tensor(scale), False, None)
    assert_same_bits(OP(*args), page.int8_linear(*args))


def test_static_scale_may_have_any_shape_of_one_element(implementation: str) -> None:
    inputs, expected = made(LinearCase(2, 8, 3, "scale shape"), torch.float32, "static")
    assert inputs.input_scale is not None
    for shape in ((), (1,), (1, 1)):
        args = (*inputs.args[:4], inputs.input_scale.reshape(shape), False, None)
        assert_same_bits(OP(*args), expected)


@pytest.mark.parametrize("bias_dtype", [*DTYPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_any_float_dtype(implementation: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    inputs, _ = made(LinearCase(4, 33, 21, "bias dtype"), dtype)
    assert inputs.bias is not None
    args = (*inputs.args[:3], inputs.bias.to(bias_dtype))
    y = OP(*args)
    assert y.dtype == dtype
    assert_same_bits(y, page.int8_linear(*args))


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("position", [0, 3, 16, 36])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_row_with_nan_or_infinity_is_nan(
    implementation: str, mode: str, dtype: torch.dtype, bad: float, position: int
) -> None:
    inputs, clean = made(LinearCase(14, 37, 18, "bad rows"), dtype, mode, "relu", kind="normal")
    x = inputs.x.clone()
    x[[2, 13], position] = bad
    y = OP(x, *inputs.args[1:])
    good = [i for i in range(14) if i not in (2, 13)]
    assert bool(y[[2, 13]].isnan().all())
    assert_same_bits(y[good], clean[good])
    assert_same_bits(y, page.int8_linear(x, *inputs.args[1:]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_carries_nan_and_infinity(implementation: str, dtype: torch.dtype, bad: float) -> None:
    """Float arithmetic: such a row has no finite output (0 · ∞ is NaN), others are untouched."""
    inputs, _ = made(LinearCase(14, 37, 18, "bad rows"), dtype, "weight_only", None, kind="normal")
    clean = OP(*inputs.args)
    x = inputs.x.clone()
    x[[2, 13], 36] = bad
    y = OP(x, *inputs.args[1:])
    good = [i for i in range(14) if i not in (2, 13)]
    assert not bool(y[[2, 13]].isfinite().any())
    assert_same_bits(y[good], clean[good])


def test_nan_scale_and_bias_reach_the_output(implementation: str) -> None:
    inputs, _ = made(LinearCase(3, 8, 4, "bad scale"))
    scale, bias = inputs.weight_scale.clone(), torch.zeros(4)
    scale[1], bias[2] = math.nan, math.nan
    y = OP(inputs.x.clone().fill_(1.0), inputs.qweight, scale, bias)
    assert y.isnan().any(dim=0).tolist() == [False, True, True, False]


def test_overflow_of_float16_output_is_infinite(implementation: str) -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    y = OP(x, torch.full((2, 64), 127, dtype=torch.int8), torch.tensor([1.0, -1.0]))
    assert y.tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(37,), (1, 37), (2, 3, 37), (2, 1, 4, 37), (0, 37), (3, 0, 37), (0, 2, 37)]
)
def test_leading_dimensions(implementation: str, shape: tuple[int, ...], mode: str) -> None:
    inputs, _ = made(LinearCase(40, 37, 18, "leading"), torch.float32, mode)
    count = math.prod(shape[:-1])
    x = inputs.x[:count].reshape(shape)
    y = OP(x, *inputs.args[1:])
    assert y.shape == (*shape[:-1], 18)
    assert y.is_contiguous()
    assert_same_bits(y.reshape(count, 18), OP(inputs.x[:count], *inputs.args[1:]))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 3, 0), (0, 0), (0, 3, 0)])
def test_no_terms_with_leading_dimensions(implementation: str, shape: tuple[int, ...]) -> None:
    bias = torch.tensor([-1.0, 2.0, -0.5])
    y = OP(torch.empty(shape), torch.empty(3, 0, dtype=torch.int8), torch.zeros(3), bias, None, False, "relu")
    assert_same_bits(y, bias.relu().expand(*shape[:-1], 3).contiguous())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides(implementation: str, mode: str, dtype: torch.dtype, view: str) -> None:
    inputs, _ = made(LinearCase(20, 37, 18, "strides"), dtype, mode)
    x = VIEWS[view](inputs.x)
    before = x.clone()
    y = OP(x, *inputs.args[1:])
    assert_same_bits(y, OP(x.contiguous(), *inputs.args[1:]))
    assert_same_bits(x, before)


@pytest.mark.parametrize("mode", MODES)
def test_expanded_input(implementation: str, mode: str) -> None:
    inputs, _ = made(LinearCase(20, 37, 18, "strides"), torch.float32, mode)
    for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
        assert_same_bits(OP(x, *inputs.args[1:]), OP(x.contiguous(), *inputs.args[1:]))


@pytest.mark.parametrize("mode", MODES)
def test_other_arguments_of_any_strides(implementation: str, mode: str) -> None:
    inputs, _ = made(LinearCase(6, 37, 18, "strides"), torch.float32, mode)
    x, qweight, scale, bias, input_scale, weight_only, act_fn = inputs.args
    assert bias is not None
    y = OP(
        x,
        qweight.t().contiguous().t(),
        torch.stack([scale, scale * 0], 1)[:, 0],
        torch.stack([bias, bias * 0], 1)[:, 0],
        input_scale,
        weight_only,
        act_fn,
    )
    assert_same_bits(y, OP(*inputs.args))
    zero_stride = OP(x, qweight, scale[:1].expand(18), bias[:1].expand(18), input_scale, weight_only, act_fn)
    assert_same_bits(
        zero_stride,
        OP(x, qweight, scale[:1].repeat(18), bias[:1].repeat(18), input_scale, weight_only, act_fn),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [LINEAR_CASES[5], LINEAR_CASES[6], LINEAR_CASES[2]], ids=str)
def test_given_packed_weights(implementation: str, case: LinearCase, mode: str) -> None:
    inputs, _ = made(case, torch.float32, mode)
    packed = int8_pack(inputs.qweight)
    y = OP(*inputs.args)
    assert_same_bits(OP(*inputs.args, packed), y)
    assert_same_bits(OP(*inputs.args, packed.t().contiguous().t()), y)


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_each_other(implementation: str, mode: str) -> None:
    """The same row gives the same bits whatever its place in whatever batch (tiles, rests, one row alone)."""
    if (implementation, mode) == ("reference", "weight_only"):
        pytest.skip("torch's float matmul makes no such promise")
    inputs, _ = made(LinearCase(31, 65, 40, "batch"), torch.float32, mode)
    together = OP(*inputs.args)
    for m in (1, 2, 5, 6, 7, 12, 13, 30):
        assert_same_bits(OP(inputs.x[-m:], *inputs.args[1:]), together[-m:])


@pytest.mark.parametrize("mode", MODES)
def test_number_of_threads_does_not_change_bits(implementation: str, mode: str) -> None:
    inputs, _ = made(LinearCase(140, 96, 130, "threads"), torch.float32, mode)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(OP(*inputs.args))
    for y in results[1:]:
        assert_same_bits(y, results[0])


# ------------------------------------------------------------------------------------------- the plain call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LINEAR_CASES[:-1], ids=str)
def test_plain_calls(automatic: list[bool], case: LinearCase, mode: str, dtype: torch.dtype) -> None:
    inputs, expected = made(case, dtype, mode, act_fn_for(case, mode, dtype))
    x, qweight, scale, bias, *rest = inputs.args
    assert bias is not None
    args = (x, qweight, scale, bias.float(), *rest, int8_pack(qweight))
    check(OP(*args), inputs, expected)
    assert automatic == [True]
    leading = OP(x[:, None], *args[1:])
    assert leading.shape == (case.m, 1, case.n)
    check(leading[:, 0], inputs, expected)
    if case.m:
        assert OP(x[0], *args[1:]).shape == (case.n,)
    assert all(automatic)


@pytest.mark.parametrize(
    "name", ["strided", "expanded", "neg bit", "bfloat16 bias", "no packed", "strided scale"]
)
def test_calls_that_are_not_plain_give_the_same(automatic: list[bool], name: str) -> None:
    inputs, _ = made(LinearCase(6, 37, 18, "not plain"))
    x, qweight, scale, bias, *rest = inputs.args
    assert bias is not None
    packed: Tensor | None = int8_pack(qweight)
    same = OP
    if name == "strided":
        x = x.t().contiguous().t()
    elif name == "expanded":
        x = x[:1].expand(6, 37)
    elif name == "neg bit":
        x = torch._neg_view(x)
    elif name == "bfloat16 bias":
        bias = bias.bfloat16()
    elif name == "no packed":
        packed = None
    else:
        scale = torch.stack([scale, scale * 0], 1)[:, 0]
    y = same(x, qweight, scale, bias, *rest, packed)
    # torch resolves a lazy negation before any kernel; the rest takes the full path.
    assert automatic == [name == "neg bit"]
    assert_same_bits(y, page.int8_linear(x.clone(), qweight, scale, bias))


def test_plain_calls_with_a_graph(automatic: list[bool]) -> None:
    inputs, expected = made(LinearCase(6, 37, 18, "graph"), torch.float32, "dynamic", "gelu", kind="normal")
    x = inputs.x.clone().requires_grad_()
    y = OP(x, *inputs.args[1:], int8_pack(inputs.qweight))
    assert_same_bits(y, expected)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert all(automatic)


# ------------------------------------------------------------------------------------------- bad input

X, Q, S = torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3)

BAD = {
    "x int": ((X.int(), Q, S), TypeError, r"x has dtype torch\.int32; use .*float16 .*x\.float\(\)"),
    "x double": ((X.double(), Q, S), TypeError, r"x has dtype torch\.float64; use torch\.float32"),
    "x complex": ((X.cfloat(), Q, S), TypeError, r"x has dtype torch\.complex64"),
    "qweight float": ((X, Q.float(), S), TypeError, r"qweight must be int8 .*float32 \(3, 4\); make it with"),
    "qweight uint8": ((X, Q.byte(), S), TypeError, r"qweight must be int8 .*uint8"),
    "qweight 1-d": (
        (X, Q[0], S),
        TypeError,
        r"qweight must be int8 with shape \[N, K\], got torch\.int8 \(4,\)",
    ),
    "K": (
        (torch.ones(2, 5), Q, S),
        ValueError,
        r"x has shape \(2, 5\) but qweight is \[N=3, K=4\]; .* must be 4",
    ),
    "x 0-d": ((torch.tensor(1.0), Q, S), ValueError, r"x has shape \(\) but qweight is \[N=3, K=4\]"),
    "scale dtype": (
        (X, Q, S.half()),
        ValueError,
        r"weight_scale must be float32 \[3\], got torch\.float16 \(3,\)",
    ),
    "scale shape": (
        (X, Q, torch.ones(3, 1)),
        ValueError,
        r"weight_scale must be float32 \[3\], got .* \(3, 1\)",
    ),
    "bias shape": ((X, Q, S, torch.ones(4)), ValueError, r"bias must have shape \[3\], got \(4,\)"),
    "bias dtype": ((X, Q, S, torch.ones(3).int()), TypeError, r"bias has dtype torch\.int32; use"),
    "input_scale shape": (
        (X, Q, S, None, torch.ones(2)),
        ValueError,
        r"input_scale must be float32 with one element, got torch\.float32 \(2,\)",
    ),
    "input_scale dtype": (
        (X, Q, S, None, torch.ones(()).double()),
        ValueError,
        r"input_scale must be float32 with one element, got torch\.float64",
    ),
    "input_scale weight_only": (
        (X, Q, S, None, torch.ones(()), True),
        ValueError,
        r"input_scale has no meaning with weight_only=True; give one of the two",
    ),
    "act_fn": (
        (X, Q, S, None, None, False, "tanh"),
        ValueError,
        r"act_fn='tanh' is unknown; use one of \('relu'",
    ),
    "packed shape": (
        (X, Q, S, None, None, False, None, torch.zeros(1, 64, dtype=torch.int8)),
        ValueError,
        r"packed must be int8 \(1, 128\) for N=3, K=4, got torch\.int8 \(1, 64\); make it with .*int8_pack",
    ),
    "packed dtype": (
        (X, Q, S, None, None, False, None, torch.zeros(1, 128)),
        ValueError,
        r"packed must be int8 \(1, 128\) .*got torch\.float32",
    ),
    "device of qweight": (
        (X, Q.to("meta"), S),
        ValueError,
        r"qweight is on meta but the input is on cpu; move",
    ),
    "device of scale": ((X, Q, S.to("meta")), ValueError, r"weight_scale is on meta but the input is on cpu"),
    "device of x": ((X.to("meta"), Q, S), ValueError, r"qweight is on cpu but the input is on meta"),
    "device of bias": ((X, Q, S, S.to("meta")), ValueError, r"bias is on meta but the input is on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    args, error, text = BAD[name]
    with pytest.raises(error, match=f"int8_linear: {text}"):
        OP(*args)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_otherwise_plain_calls(automatic: list[bool], name: str) -> None:
    args, error, text = BAD[name]
    given = (*args, *(None, None, False, None)[len(args) - 3 :]) if len(args) < 7 else args
    with pytest.raises(error, match=f"int8_linear: {text}"):
        OP(*given, *([int8_pack(Q)] if len(given) < 8 else []))
    assert not any(automatic)


def test_k_that_could_overflow(implementation: str) -> None:
    k = formats.INT8_MAX_IN_FEATURES + 1
    x, qweight = torch.ones(1, k), torch.ones(1, k, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=rf"K={k} could overflow the int32 sum; at most {k - 1} is exact; split"
    ):
        OP(x, qweight, torch.ones(1))
    assert OP(x, qweight, torch.ones(1), None, None, True).item() == k


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        (
            "cuda",
            ValueError,
            r"backend='cuda' does not exist for device 'cpu'; use one of: 'native', 'reference'",
        ),
        ("", ValueError, r"backend='' does not exist"),
    ],
)
def test_unknown_backend(backend: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"int8_linear: {text}"):
        int8_linear(X, Q, S, backend=backend)


# ------------------------------------------------------------------------------------------- the backend


def test_backend_argument_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for backend in registry._candidates["int8_linear", "cpu"]:
        monkeypatch.setattr(registry, "_candidates", dict(registry._candidates))
        spied = registry.Backend(
            backend.name,
            lambda *args, _run=backend.run, _name=backend.name: (ran.append(_name), _run(*args))[1],
            backend.unavailable,
        )
        candidates = [
            spied if b.name == spied.name else b for b in registry._candidates["int8_linear", "cpu"]
        ]
        registry._candidates["int8_linear", "cpu"] = candidates
    monkeypatch.setattr(registry, "_automatic", {})
    usable = [b.name for b in registry._candidates["int8_linear", "cpu"] if not b.unavailable()]
    for name in usable:
        int8_linear(X, Q, S, backend=name)
        monkeypatch.setenv("LISSOM_BACKEND", name)
        int8_linear(X, Q, S)
        int8_linear(X, Q, S, backend="reference")  # the argument wins
        monkeypatch.delenv("LISSOM_BACKEND")
        assert ran == [name, name, "reference"]
        ran.clear()
    if "LISSOM_BACKEND" not in os.environ:
        int8_linear(X, Q, S)
        assert ran == usable[:1]


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("leading", [(7,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients(
    implementation: str, mode: str, dtype: torch.dtype, act_fn: str | None, leading: tuple[int, ...]
) -> None:
    """dL/dx = (g · act'(z)) W and dL/db = Σ g · act'(z), with W dequantized and z the pre-activation."""
    m = math.prod(leading)
    inputs, _ = made(LinearCase(7, 29, 18, "gradients"), dtype, mode, act_fn, kind="normal")
    assert inputs.bias is not None
    x = inputs.x[:m].reshape(*leading, 29).clone().requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    y = OP(x, inputs.qweight, inputs.weight_scale, bias, *inputs.args[4:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)

    z = OP(x.detach(), *inputs.args[1:6], None).double().requires_grad_()
    (grad_z,) = torch.autograd.grad(EXACT_ACT_FNS[act_fn](z), z, grad.double())
    weight = inputs.qweight.double() * inputs.weight_scale.double()[:, None]
    expected_x = grad_z @ weight
    expected_bias = grad_z.reshape(m, 18).sum(0)
    assert grad_x.dtype == grad_bias.dtype == dtype
    tolerance = GRAD_TOLERANCE[dtype]
    largest = grad_z.abs().max() if m else torch.tensor(0.0)
    assert_within(grad_x, expected_x, (tolerance * 4 * largest * weight.abs().max()).expand(expected_x.shape))
    assert_within(grad_bias, expected_bias, (tolerance * max(m, 1) * largest).expand(18))


def test_gradient_only_where_asked(implementation: str) -> None:
    inputs, _ = made(LinearCase(5, 29, 18, "gradients"), torch.float32, "dynamic", "gelu")
    assert inputs.bias is not None
    assert not OP(*inputs.args).requires_grad
    bias = inputs.bias.clone().requires_grad_()
    y = OP(*inputs.args[:3], bias, *inputs.args[4:])
    y.sum().backward()
    assert bias.grad is not None
    x = inputs.x.clone().requires_grad_()
    OP(x, *inputs.args[1:]).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_gradient_of_a_mixed_bias_dtype(implementation: str) -> None:
    inputs, _ = made(LinearCase(5, 29, 18, "gradients"), torch.bfloat16)
    bias = torch.zeros(18, requires_grad=True)
    OP(*inputs.args[:3], bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32
    assert bias.grad.tolist() == [5.0] * 18


def test_gradient_through_non_contiguous_input(implementation: str) -> None:
    inputs, _ = made(LinearCase(20, 37, 18, "gradients"), torch.float32, "dynamic", "silu", kind="normal")
    plain = inputs.x.clone().requires_grad_()
    OP(plain, *inputs.args[1:]).square().sum().backward()
    source = inputs.x.t().contiguous().requires_grad_()
    OP(source.t(), *inputs.args[1:]).square().sum().backward()
    assert plain.grad is not None
    assert source.grad is not None
    assert_same_bits(source.grad.t(), plain.grad)


# ------------------------------------------------------------------------------------------- torch's modes


def test_inference_mode_and_no_grad(implementation: str) -> None:
    inputs, expected = made(LinearCase(5, 29, 18, "modes"))
    x = inputs.x.clone().requires_grad_()
    with torch.inference_mode():
        y = OP(x, *inputs.args[1:])
        assert y.is_inference()
        assert_same_bits(y, expected)
    with torch.no_grad():
        assert not OP(x, *inputs.args[1:]).requires_grad


def test_autocast_leaves_the_op_alone(implementation: str) -> None:
    """The kernel accumulates exactly whatever the input dtype; autocast changes nothing."""
    inputs, expected = made(LinearCase(5, 29, 18, "modes"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = OP(*inputs.args)
        assert_same_bits(y, expected)
        low = torch.nn.functional.linear(y, torch.ones(29, 18))
        assert low.dtype == torch.bfloat16
        assert OP(low, *inputs.args[1:]).dtype == torch.bfloat16


def test_functional_form_is_the_op(implementation: str) -> None:
    inputs, expected = made(LinearCase(5, 29, 18, "modes"), torch.float32, "static", "relu")
    y = int8_linear(
        inputs.x,
        inputs.qweight,
        inputs.weight_scale,
        inputs.bias,
        input_scale=inputs.input_scale,
        act_fn="relu",
        packed=int8_pack(inputs.qweight),
    )
    assert_same_bits(y, expected)


def test_unit_roundoffs_are_those_of_torch() -> None:
    for dtype, u in UNIT_ROUNDOFF.items():
        assert torch.finfo(dtype).eps / 2 == u
