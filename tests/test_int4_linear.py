"""``lissom::int4_linear`` on every implementation: numbers, shapes, bad input, gradients, choices."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import _native, formats, registry, testing
from lissom.ops import int4_linear
from lissom.reference import int4_linear as page
from lissom.reference.int8_linear import quantize_rows
from lissom.reference.numerics import fma
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    DTYPES,
    EXACT_ACT_FNS,
    GRAD_TOLERANCE,
    INT4_CASES,
    INT4_FORMS,
    INT4_MODES,
    ROW_KINDS,
    UNIT_ROUNDOFF,
    VIEWS,
    Int4Form,
    Int4Inputs,
    LinearCase,
    assert_same_bits,
    assert_within,
    float_tolerance,
    int4_inputs,
    weight_only_bound,
)

OP = torch.ops.lissom.int4_linear.default

FORMS_AND_MODES = [
    pytest.param(form, mode, id=f"{form}-{mode}")
    for form in INT4_FORMS
    for mode in INT4_MODES
    if not (form.group_index and mode == "rotated")
]
FEW_FORMS = [INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[8], INT4_FORMS[9], INT4_FORMS[13]]
"""Zero-points; a table per output; a table per group; whole rows; a group index."""

FEW_FORMS_AND_MODES = [param for param in FORMS_AND_MODES if param.values[0] in FEW_FORMS]


@functools.cache
def made(*key: Any, **options: Any) -> tuple[Int4Inputs, Tensor]:
    """Inputs and what the reference makes of them; shared by all implementations."""
    inputs = int4_inputs(*key, **options)
    return inputs, page.int4_linear(*inputs.page)


def check(y: Tensor, inputs: Int4Inputs, expected: Tensor) -> None:
    """Bit-identical where quantized; within the proved bound where weight-only."""
    if not inputs.weight_only:
        assert_same_bits(y, expected)
        return
    assert y.dtype == inputs.x.dtype
    weight, ones = formats.dequantize_int4(inputs.weights), torch.ones(inputs.weights.out_features)
    z = inputs.x.double() @ weight.double().t()
    z = z if inputs.bias is None else z + inputs.bias.double()
    bound = weight_only_bound(inputs.x, weight, ones, inputs.bias)
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    # Where the result leaves its dtype's range, or a partial sum float32's, finite and infinite are right.
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ weight.double().abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def act_fn_for(case: LinearCase, *others: object) -> str | None:
    """A fixed but varied choice, so that shapes meet all activation functions without the full product."""
    return ACT_FNS[(sum(case[:3]) + sum(map(len, map(str, others)))) % len(ACT_FNS)]


def some_forms(case: LinearCase) -> list[tuple[Int4Form, torch.dtype]]:
    """Every third form, of large cases two of them, with the dtypes in turn; each case begins elsewhere."""
    start, step = INT4_CASES.index(case), 8 if case.m * case.k * case.n > 10**6 else 3
    return [
        (form, DTYPES[(i + start // step) % 3])
        for i, form in enumerate(INT4_FORMS)
        if (i + start) % step == 0
    ]


def with_values(form: Int4Form, k: int, n: int, **fields: Tensor | None) -> formats.Int4Weights:
    return replace(testing.int4_weights(n, k, form), **fields)


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", INT4_MODES)
@pytest.mark.parametrize("case", INT4_CASES, ids=str)
def test_every_shape(implementation: str, case: LinearCase, mode: str) -> None:
    for form, dtype in some_forms(case):
        if form.group_index and mode == "rotated":
            continue
        inputs, expected = made(case, form, dtype, mode, act_fn_for(case, mode, dtype))
        y = OP(*inputs.args())
        assert y.shape == (case.m, case.n)
        try:
            check(y, inputs, expected)
        except AssertionError as error:
            raise AssertionError(f"{form} {dtype} {inputs.act_fn}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "mode"), FORMS_AND_MODES)
def test_every_form(implementation: str, form: Int4Form, mode: str, dtype: torch.dtype) -> None:
    inputs, expected = made(LinearCase(19, 301, 37, "forms"), form, dtype, mode, seed=3, bias=False)
    check(OP(*inputs.args()), inputs, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_every_option(implementation: str, form: Int4Form, mode: str, act_fn: str | None, bias: bool) -> None:
    dtype = DTYPES[ACT_FNS.index(act_fn) % 3]
    inputs, expected = made(LinearCase(19, 145, 37, "options"), form, dtype, mode, act_fn, bias=bias, seed=3)
    check(OP(*inputs.args()), inputs, expected)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", INT4_MODES)
def test_every_kind_of_row(implementation: str, mode: str, dtype: torch.dtype, kind: str) -> None:
    for form in (INT4_FORMS[7], INT4_FORMS[2]):
        inputs, expected = made(LinearCase(7, 70, 20, "row kinds"), form, dtype, mode, None, kind=kind)
        check(OP(*inputs.args()), inputs, expected)


def test_randomized(implementation: str) -> None:
    """A seeded walk over shapes, forms and options; the seed that fails is in the assertion."""
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)

        def pick(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        case = LinearCase(pick(0, 40), pick(0, 300) if seed % 5 else pick(0, 900), pick(0, 90), "random")
        form, dtype, act_fn = (
            INT4_FORMS[pick(0, len(INT4_FORMS) - 1)],
            DTYPES[pick(0, 2)],
            ACT_FNS[pick(0, 4)],
        )
        mode = INT4_MODES[2 * pick(0, 1) if form.group_index else pick(0, 2)]
        inputs, expected = made(case, form, dtype, mode, act_fn, bias=bool(pick(0, 1)), seed=seed)
        try:
            check(OP(*inputs.args()), inputs, expected)
        except AssertionError as error:
            raise AssertionError(f"seed={seed} {case} {form} {dtype} {mode} {act_fn}: {error}") from error


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_extreme_sums_do_not_saturate(implementation: str, form: Int4Form) -> None:
    """All |qx| = 127 against the codes and table entries furthest from zero, with every pattern of signs."""
    k, n = 4099, 5
    signs = torch.tensor([[1.0], [-1.0]]).repeat(2, k)
    signs[2:, ::2] *= -1
    codes = torch.where(torch.cat([signs, signs[:1]]) > 0, 15, 0)
    codes[4] = 0
    fields: dict[str, Tensor | None] = {"qweight": formats.pack_nibbles(codes)}
    if form.codebook is not None:
        book = torch.zeros_like(testing.int4_weights(n, k, form).codebook)  # type: ignore[arg-type]
        book[..., 0], book[..., 15] = -1.0, 1.0
        fields["codebook"] = book
    if form.zero is not None:
        fields["zero_point"] = torch.full((n, formats.int4_groups(k, form.group_size)), 255.0).to(form.zero)
    weights = with_values(form, k, n, **fields)
    for dtype in DTYPES:
        inputs = Int4Inputs((signs * 3).to(dtype), weights, None, False, None, False)
        assert_same_bits(OP(*inputs.args()), page.int4_linear(*inputs.page))


def test_negative_zero(implementation: str) -> None:
    """Zero sums: fma(0, x_scale, bias) keeps the sign of a zero bias as the reference does."""
    x = torch.zeros(3, 40)
    x[0, 1], x[1] = -0.0, -0.0
    x[2, :2] = torch.tensor([1.0, -1.0])
    for form in FEW_FORMS:
        weights = with_values(form, 40, 2, qweight=torch.full((2, 20), 0x33, dtype=torch.uint8))
        for act_fn in ACT_FNS:
            for bias in (None, torch.tensor([-0.0, 0.0])):
                inputs = Int4Inputs(x, weights, bias, False, act_fn, False)
                assert_same_bits(OP(*inputs.args()), page.int4_linear(*inputs.page))


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_any_float_dtype(implementation: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    inputs, _ = made(LinearCase(4, 33, 21, "bias dtype"), INT4_FORMS[1], dtype)
    assert inputs.bias is not None
    inputs = replace(inputs, bias=inputs.bias.to(bias_dtype))
    y = OP(*inputs.args())
    assert y.dtype == dtype
    assert_same_bits(y, page.int4_linear(*inputs.page))


@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_weight_only_is_a_chain_of_multiply_adds(native: str, form: Int4Form) -> None:
    """Σ_k x w in the order of k (of the groups, with an index), one rounding per term, on every ISA."""
    inputs, _ = made(
        LinearCase(9, 170, 21, "chain"), form, torch.float32, "weight_only", "silu", kind="normal"
    )
    x, weight, index = inputs.x, formats.dequantize_int4(inputs.weights), inputs.weights.group_index
    if index is not None:
        order = formats.group_order(index)
        x, weight = x[:, order], weight[:, order]
    acc = torch.zeros(9, 21)
    for k in range(170):
        acc = fma(x[:, k, None].expand(9, 21), weight[None, :, k].expand(9, 21), acc)
    assert inputs.bias is not None
    assert_same_bits(OP(*inputs.args()), page.apply_activation(acc + inputs.bias, "silu"))


def test_weight_only_bits_do_not_depend_on_the_isa() -> None:
    if len(testing.isas()) < 2:
        pytest.skip("fewer than two instruction sets run here")
    for form in INT4_FORMS:
        for case in (LinearCase(23, 301, 37, ""), LinearCase(1, 301, 37, ""), LinearCase(5, 64, 16, "")):
            inputs, _ = made(case, form, torch.float32, "weight_only", "gelu")
            results = []
            for isa in testing.isas():
                with testing.use(f"native-{isa}"):
                    results.append(OP(*inputs.args()))
            for y in results[1:]:
                assert_same_bits(y, results[0])


# ------------------------------------------------------------------------------------------- independently


@pytest.mark.parametrize(("form", "mode"), [p for p in FORMS_AND_MODES if p.values[1] != "weight_only"])
def test_reference_is_the_dequantized_product(form: Int4Form, mode: str) -> None:
    """Against float64: off by no more than the rounding of activations (and table entries) to int8."""
    inputs, y = made(LinearCase(40, 300, 24, "exact"), form, torch.float32, mode, bias=False, kind="normal")
    x, weights = inputs.x, inputs.weights
    if mode == "rotated":
        x = formats.rotate(x, 1 / formats.ROTATION_BLOCK)
    weight = formats.dequantize_int4(weights).double()
    exact = x.double() @ weight.t()
    _, x_scale = quantize_rows(x)
    sizes = weight.abs().sum(dim=1)
    # Half a step per activation, and a few float32 roundings (127 * 4 * 2^-24 steps) of scale and product.
    bound = x_scale[:, None].double() * (0.5 + 127 * 4 * 2.0**-24) * sizes
    # c = s (8 - zero_point) and (q - 8) s may cancel: their own sizes are what float32 sums round.
    s, c, _ = formats.segment_terms(weights, False)
    terms = (s.abs().double() * 127).sum(1) + (0 if c is None else c.abs().double().sum(1))
    rounding = 4 * weights.segments * UNIT_ROUNDOFF[torch.float32]
    bound = bound + x.abs().amax(1, keepdim=True) * 128 * terms * rounding
    if weights.codebook is not None:
        table_scale = weights.codebook.abs().amax(-1) / 127
        step = weights.weight_scale.abs().double() * (
            table_scale[:, None] if table_scale.dim() == 1 else table_scale
        )
        members = min(weights.in_features, 300 if form.group_size == -1 else form.group_size)
        bound = bound + x.abs().double().amax(1, keepdim=True) * members * 0.51 * step.sum(1)
    assert_within(y, exact, bound)
    # The bound is a worst case; on the whole the error is about that of 8-bit activations.
    noise = 0.02 if weights.codebook is None or form.codebook == "channel" else 0.03
    assert float((y - exact).norm() / exact.norm()) < noise


@pytest.mark.parametrize("form", [f for f in INT4_FORMS if f.group_index], ids=str)
def test_a_group_index_is_a_permutation_of_columns(implementation: str, form: Int4Form) -> None:
    inputs, _ = made(LinearCase(6, 200, 20, "index"), form)
    w = inputs.weights
    assert w.group_index is not None
    order = formats.group_order(w.group_index)
    codes = formats.unpack_nibbles(w.qweight, 200)[:, order]
    plain = replace(w, qweight=formats.pack_nibbles(codes), group_index=None)
    moved = replace(inputs, weights=plain, x=inputs.x[:, order])
    assert_same_bits(OP(*inputs.args()), OP(*moved.args()))
    trivial = replace(plain, group_index=(torch.arange(200) // form.group_size).int())
    assert_same_bits(OP(*replace(moved, weights=trivial).args()), OP(*moved.args()))


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("position", [0, 3, 16, 36, 69])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_a_row_with_nan_or_infinity_is_nan(
    implementation: str, form: Int4Form, bad: float, position: int
) -> None:
    dtype = DTYPES[position % 3]
    for mode in ("int8", "rotated"):
        if form.group_index and mode == "rotated":
            continue
        inputs, clean = made(LinearCase(14, 70, 18, "bad rows"), form, dtype, mode, "relu", kind="normal")
        x = inputs.x.clone()
        x[[2, 13], position] = bad
        y = OP(*inputs.args(x))
        good = [i for i in range(14) if i not in (2, 13)]
        assert bool(y[[2, 13]].isnan().all())
        assert_same_bits(y[good], clean[good])
        assert_same_bits(y, page.int4_linear(x, *inputs.page[1:]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_weight_only_carries_nan_and_infinity(implementation: str, form: Int4Form, bad: float) -> None:
    """Float arithmetic: such a row has no finite output (0 · ∞ is NaN), others are untouched."""
    inputs, _ = made(LinearCase(14, 70, 18, "bad rows"), form, torch.float32, "weight_only", kind="normal")
    clean = OP(*inputs.args())
    x = inputs.x.clone()
    x[[2, 13], 69] = bad
    y = OP(*inputs.args(x))
    good = [i for i in range(14) if i not in (2, 13)]
    assert not bool(y[[2, 13]].isfinite().any())
    assert_same_bits(y[good], clean[good])


def test_nan_scale_bias_and_table_reach_the_output(implementation: str) -> None:
    for mode in INT4_MODES:
        inputs, _ = made(LinearCase(3, 40, 8, "bad scale"), INT4_FORMS[2], torch.float32, mode)
        w = inputs.weights
        assert w.codebook is not None
        scale, table, bias = w.weight_scale.clone(), w.codebook.clone(), torch.zeros(8)
        scale[1], table[4], bias[7] = math.nan, math.nan, math.nan
        bad = replace(inputs, weights=replace(w, weight_scale=scale, codebook=table), bias=bias)
        y = OP(*bad.args(torch.ones(3, 40)))
        assert y.isnan().any(dim=0).tolist() == [i in (1, 4, 7) for i in range(8)]


def test_overflow_of_float16_output_is_infinite(implementation: str) -> None:
    weights = with_values(
        INT4_FORMS[0],
        64,
        2,
        qweight=torch.full((2, 32), 0xFF, dtype=torch.uint8),
        weight_scale=torch.tensor([[1.0], [-1.0]]),
    )
    for weight_only in (False, True):
        x = torch.full((1, 64), 60000.0, dtype=torch.float16)
        y = OP(*Int4Inputs(x, weights, None, weight_only, None, False).args())
        assert y.tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
@pytest.mark.parametrize(
    "shape", [(37,), (1, 37), (2, 3, 37), (2, 1, 4, 37), (0, 37), (3, 0, 37), (0, 2, 37)]
)
def test_leading_dimensions(implementation: str, shape: tuple[int, ...], form: Int4Form, mode: str) -> None:
    inputs, _ = made(LinearCase(40, 37, 18, "leading"), form, torch.float32, mode)
    count = math.prod(shape[:-1])
    y = OP(*inputs.args(inputs.x[:count].reshape(shape)))
    assert y.shape == (*shape[:-1], 18)
    assert y.is_contiguous()
    assert_same_bits(y.reshape(count, 18), OP(*inputs.args(inputs.x[:count])))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_any_strides(implementation: str, form: Int4Form, mode: str, view: str) -> None:
    dtype = DTYPES[len(view) % 3]
    inputs, _ = made(LinearCase(20, 37, 18, "strides"), form, dtype, mode)
    x = VIEWS[view](inputs.x)
    before = x.clone()
    y = OP(*inputs.args(x))
    assert_same_bits(y, OP(*inputs.args(x.contiguous())))
    assert_same_bits(x, before)


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_expanded_input(implementation: str, form: Int4Form, mode: str) -> None:
    inputs, _ = made(LinearCase(20, 37, 18, "strides"), form, torch.float32, mode)
    for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
        assert_same_bits(OP(*inputs.args(x)), OP(*inputs.args(x.contiguous())))


def strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_other_arguments_of_any_strides(implementation: str, form: Int4Form, mode: str) -> None:
    for m, k, n in ((6, 70, 18), (6, 70, 0), (6, 0, 18)):
        inputs, _ = made(LinearCase(m, k, n, "strides"), form, torch.float32, mode)
        values = inputs.args(cached=True)
        expected = OP(*inputs.args())
        assert_same_bits(OP(*values), expected)
        others = [strided(v) if isinstance(v, Tensor) else v for v in values[1:]]
        assert_same_bits(OP(values[0], *others), expected)
        without_cache = [strided(v) if isinstance(v, Tensor) else v for v in inputs.args()[1:]]
        assert_same_bits(OP(values[0], *without_cache), expected)


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_no_terms_after_a_call_that_left_nan(implementation: str, form: Int4Form, mode: str) -> None:
    """Where K is 0 the sums are 0, not what another call left on the stack."""
    torch.set_num_threads(1)
    for m in (1, 2, 40):
        before, _ = made(LinearCase(m, 70, 300, "stack"), form, torch.float32, mode, None)
        nan = torch.full_like(before.weights.weight_scale, torch.nan)
        assert OP(*before.args(weight_scale=nan)).isnan().all()
        inputs, expected = made(LinearCase(m, 0, 300, "stack"), form, torch.float32, mode, None)
        assert_same_bits(OP(*inputs.args()), expected)


@pytest.mark.parametrize(("form", "mode"), FORMS_AND_MODES)
def test_given_packed_weights(implementation: str, form: Int4Form, mode: str) -> None:
    for case in (LinearCase(5, 133, 43, ""), LinearCase(3, 5, 0, ""), LinearCase(2, 0, 20, "")):
        inputs, _ = made(case, form, torch.float32, mode)
        assert_same_bits(OP(*inputs.args(cached=True)), OP(*inputs.args()))


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_rows_do_not_depend_on_each_other(implementation: str, form: Int4Form, mode: str) -> None:
    """The same row gives the same bits whatever its place in whatever batch (tiles, rests, one row alone)."""
    if (implementation, mode) == ("reference", "weight_only"):
        pytest.skip("torch's float matmul makes no such promise")
    inputs, _ = made(LinearCase(31, 165, 40, "batch"), form, torch.float32, mode)
    together = OP(*inputs.args())
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 30):
        assert_same_bits(OP(*inputs.args(inputs.x[-m:])), together[-m:])


@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_number_of_threads_does_not_change_bits(implementation: str, form: Int4Form, mode: str) -> None:
    for m in (1, 140):
        inputs, _ = made(LinearCase(m, 196, 530, "threads"), form, torch.float32, mode)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OP(*inputs.args(cached=True)))
        for y in results[1:]:
            assert_same_bits(y, results[0])


# ------------------------------------------------------------------------------------------- the plain call


@pytest.mark.parametrize("mode", INT4_MODES)
@pytest.mark.parametrize("case", [case for case in INT4_CASES if case.m < 1000], ids=str)
def test_plain_calls(automatic: list[bool], case: LinearCase, mode: str) -> None:
    for form, dtype in some_forms(case):
        if form.group_index:
            continue
        inputs, expected = made(case, form, dtype, mode, act_fn_for(case, mode, dtype))
        assert inputs.bias is not None
        bias, x = inputs.bias.float(), inputs.x
        check(OP(*inputs.args(cached=True, bias=bias)), inputs, expected)
        leading = OP(*inputs.args(x[:, None], cached=True, bias=bias))
        assert leading.shape == (case.m, 1, case.n)
        check(leading[:, 0], inputs, expected)
        if case.m:
            assert OP(*inputs.args(x[0], cached=True, bias=bias)).shape == (case.n,)
        assert all(automatic), f"{form} {dtype}"
    assert automatic


@pytest.mark.parametrize("name", ["strided", "expanded", "neg bit", "bfloat16 bias", "no packed", "index"])
def test_calls_that_are_not_plain_give_the_same(automatic: list[bool], name: str) -> None:
    inputs, _ = made(LinearCase(6, 37, 18, "not plain"), INT4_FORMS[15 if name == "index" else 1])
    x, bias, cached = inputs.x, inputs.bias, name != "no packed"
    assert bias is not None
    if name == "strided":
        x = x.t().contiguous().t()
    elif name == "expanded":
        x = x[:1].expand(6, 37)
    elif name == "neg bit":
        x = torch._neg_view(x)
    elif name == "bfloat16 bias":
        bias = bias.bfloat16()
    y = OP(*inputs.args(x, cached=cached, bias=bias))
    # torch resolves a lazy negation before any kernel; the rest takes the full path.
    assert automatic == [name == "neg bit"]
    assert_same_bits(y, page.int4_linear(x.clone(), inputs.weights, bias))


def test_plain_calls_with_a_graph(automatic: list[bool]) -> None:
    inputs, expected = made(
        LinearCase(6, 37, 18, "graph"), INT4_FORMS[1], torch.float32, "int8", "gelu", kind="normal"
    )
    x = inputs.x.clone().requires_grad_()
    y = OP(*inputs.args(x, cached=True))
    assert_same_bits(y, expected)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert all(automatic)


# ------------------------------------------------------------------------------------------- bad input

GOOD = Int4Inputs(torch.ones(2, 70), testing.int4_weights(3, 70, INT4_FORMS[7]), None, False, None, False)
INDEXED = Int4Inputs(torch.ones(2, 70), testing.int4_weights(3, 70, INT4_FORMS[15]), None, False, None, False)
BOOK = torch.zeros(16)
META = torch.ones(3, device="meta")

BAD: dict[str, tuple[Int4Inputs, dict[str, Any], type[Exception], str]] = {
    "x int": (GOOD, {"x": GOOD.x.int()}, TypeError, r"x has dtype torch\.int32; use .*x\.float\(\)"),
    "x double": (GOOD, {"x": GOOD.x.double()}, TypeError, r"x has dtype torch\.float64; use torch\.float32"),
    "x 0-d": (
        GOOD,
        {"x": torch.tensor(1.0)},
        ValueError,
        r"x has shape \(\) but qweight is \(3, 35\), two codes a byte; .* must be 70, or 69 for an odd K",
    ),
    "K": (
        GOOD,
        {"x": torch.ones(2, 71)},
        ValueError,
        r"x has shape \(2, 71\) but qweight is \(3, 35\), two codes a byte; .* 70, or 69 for an odd K",
    ),
    "qweight float": (
        GOOD,
        {"qweight": torch.ones(3, 35)},
        TypeError,
        r"qweight must be uint8 \[N, 35\] .*K=70, got torch\.float32 \(3, 35\); make it with .*pack_nibbles",
    ),
    "qweight int8": (
        GOOD,
        {"qweight": GOOD.weights.qweight.char()},
        TypeError,
        r"qweight must be uint8 .*int8",
    ),
    "qweight 1-d": (
        GOOD,
        {"qweight": GOOD.weights.qweight[0]},
        ValueError,
        r"qweight must be uint8 \[N, 35\] .*got torch\.uint8 \(35,\)",
    ),
    "scale dtype": (
        GOOD,
        {"weight_scale": GOOD.weights.weight_scale.double()},
        ValueError,
        r"weight_scale must be float16, bfloat16 or float32 \[3, 3\] for K=70, group_size=32, got .*64",
    ),
    "scale shape": (
        GOOD,
        {"weight_scale": torch.ones(3, 2)},
        ValueError,
        r"weight_scale must be .* \[3, 3\] for K=70, group_size=32, got torch\.float32 \(3, 2\)",
    ),
    "zero_point dtype": (
        GOOD,
        {"zero_point": torch.ones(3, 3, dtype=torch.int8)},
        ValueError,
        r"zero_point must be uint8, float16, bfloat16 or float32 \[3, 3\] .*got torch\.int8",
    ),
    "zero_point shape": (
        GOOD,
        {"zero_point": torch.ones(3)},
        ValueError,
        r"zero_point must be .*\[3, 3\] .*got torch\.float32 \(3,\)",
    ),
    "both": (
        GOOD,
        {"codebook": BOOK},
        ValueError,
        r"zero_point has no meaning with a codebook; give one of the two",
    ),
    "codebook size": (
        GOOD,
        {"zero_point": None, "codebook": BOOK[:15]},
        ValueError,
        r"codebook must be float32 \[16\], \[3, 16\] or \[3, 3, 16\] .*got torch\.float32 \(15,\)",
    ),
    "codebook rows": (
        GOOD,
        {"zero_point": None, "codebook": BOOK.expand(2, 16)},
        ValueError,
        r"codebook must be float32 .*got torch\.float32 \(2, 16\)",
    ),
    "codebook dtype": (
        GOOD,
        {"zero_point": None, "codebook": BOOK.half()},
        ValueError,
        r"codebook must be float32 .*got torch\.float16 \(16,\)",
    ),
    "group_size": (
        GOOD,
        {"group_size": 100},
        ValueError,
        r"group_size=100 cannot be; use 32, 64, 128, or -1 for one group per row",
    ),
    "group_size 0": (GOOD, {"group_size": 0}, ValueError, r"group_size=0 cannot be; use 32"),
    "group_index dtype": (
        INDEXED,
        {"group_index": torch.zeros(70, dtype=torch.int64)},
        ValueError,
        r"group_index must be int32 \[70\], got torch\.int64 \(70,\)",
    ),
    "group_index shape": (
        INDEXED,
        {"group_index": torch.zeros(69, dtype=torch.int32)},
        ValueError,
        r"group_index must be int32 \[70\], got torch\.int32 \(69,\)",
    ),
    "group_index row": (
        INDEXED,
        {"group_size": -1, "weight_scale": torch.ones(3, 1)},
        ValueError,
        r"group_index has no meaning with group_size=-1 \(one group per row\); leave it out",
    ),
    "group_index rotated": (
        INDEXED,
        {"rotated": True},
        ValueError,
        r"rotated has no meaning with group_index; give one of the two",
    ),
    "rotated": (
        GOOD,
        {"rotated": True, "weight_only": True},
        ValueError,
        r"rotated has no meaning with weight_only=True; give one of the two",
    ),
    "bias shape": (GOOD, {"bias": torch.ones(4)}, ValueError, r"bias must have shape \[3\], got \(4,\)"),
    "bias dtype": (GOOD, {"bias": torch.ones(3).int()}, TypeError, r"bias has dtype torch\.int32; use"),
    "act_fn": (GOOD, {"act_fn": "tanh"}, ValueError, r"act_fn='tanh' is unknown; use one of \('relu'"),
    "packed shape": (
        GOOD,
        {"packed": torch.zeros(1, 64, dtype=torch.uint8)},
        ValueError,
        r"packed must be uint8 \(1, 1152\) for N=3, K=70 in this form, got .* \(1, 64\); .*pack_int4",
    ),
    "packed form": (
        GOOD,
        {"packed": formats.pack_int4(replace(GOOD.weights, zero_point=None))},
        ValueError,
        r"packed must be uint8 \(1, 1152\) .*got torch\.uint8 \(1, 960\)",
    ),
    "packed dtype": (
        GOOD,
        {"packed": torch.zeros(1, 1152)},
        ValueError,
        r"packed must be uint8 \(1, 1152\) .*got torch\.float32",
    ),
    "packed alone": (
        INDEXED,
        {"packed": formats.pack_int4(INDEXED.weights)},
        ValueError,
        r"packed is given without permutation; give both or neither",
    ),
    "permutation alone": (
        INDEXED,
        {"permutation": torch.arange(70)},
        ValueError,
        r"permutation is given without packed; give both or neither",
    ),
    "permutation dtype": (
        INDEXED,
        {"permutation": torch.arange(70).int()},
        ValueError,
        r"permutation must be int64 \[70\], got torch\.int32 \(70,\); make it with .*group_order",
    ),
    "permutation without index": (
        GOOD,
        {"permutation": torch.arange(70)},
        ValueError,
        r"permutation has no meaning without group_index; leave it out",
    ),
    "device of qweight": (
        GOOD,
        {"qweight": GOOD.weights.qweight.to("meta")},
        ValueError,
        r"qweight is on meta but the input is on cpu; move",
    ),
    "device of scale": (
        GOOD,
        {"weight_scale": GOOD.weights.weight_scale.to("meta")},
        ValueError,
        r"weight_scale is on meta but the input is on cpu",
    ),
    "device of x": (
        GOOD,
        {"x": GOOD.x.to("meta")},
        ValueError,
        r"qweight is on cpu but the input is on meta",
    ),
    "device of bias": (GOOD, {"bias": META}, ValueError, r"bias is on meta but the input is on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    inputs, changes, error, text = BAD[name]
    with pytest.raises(error, match=f"int4_linear: {text}"):
        OP(*inputs.args(**changes))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_otherwise_plain_calls(automatic: list[bool], name: str) -> None:
    inputs, changes, error, text = BAD[name]
    cached = not changes.keys() & {"packed", "permutation"}
    with pytest.raises(error, match=f"int4_linear: {text}"):
        OP(*inputs.args(cached=cached, **changes))
    assert not any(automatic)


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match=r"int4_linear: backend='cuda' does not exist for device 'cpu'; use one of: 'nat"
    ):
        OP(*GOOD.args(backend="cuda"))


# ------------------------------------------------------------------------------------------- the backend


def test_backend_argument_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(registry, "_candidates", dict(registry._candidates))
    monkeypatch.setattr(registry, "_automatic", {})
    registry._candidates["int4_linear", "cpu"] = [
        replace(b, run=lambda *args, _run=b.run, _name=b.name: (ran.append(_name), _run(*args))[1])
        for b in registry._candidates["int4_linear", "cpu"]
    ]
    usable = [b.name for b in registry._candidates["int4_linear", "cpu"] if not b.unavailable()]
    on_cpu = [name for name in usable if name != "triton"]  # which only its interpreter offers here, last
    assert on_cpu == (["reference"] if _native.unavailable_reason() else ["native", "reference"])
    for name in usable:
        OP(*GOOD.args(backend=name))
        monkeypatch.setenv("LISSOM_BACKEND", name)
        OP(*GOOD.args())
        OP(*GOOD.args(backend="reference"))  # the argument wins
        monkeypatch.delenv("LISSOM_BACKEND")
        assert ran == [name, name, "reference"]
        ran.clear()


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("leading", [(7,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize(("form", "mode"), FEW_FORMS_AND_MODES)
def test_gradients(
    implementation: str, form: Int4Form, mode: str, act_fn: str | None, leading: tuple[int, ...]
) -> None:
    """dL/dx = (g · act'(z)) W and dL/db = Σ g · act'(z), with W dequantized and z the pre-activation."""
    dtype = DTYPES[ACT_FNS.index(act_fn) % 3]
    m = math.prod(leading)
    inputs, _ = made(LinearCase(7, 49, 18, "gradients"), form, dtype, mode, act_fn, kind="normal")
    assert inputs.bias is not None
    x = inputs.x[:m].reshape(*leading, 49).clone().requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    y = OP(*inputs.args(x, bias=bias))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)

    z = OP(*inputs.args(x.detach(), act_fn=None)).double().requires_grad_()
    (grad_z,) = torch.autograd.grad(EXACT_ACT_FNS[act_fn](z), z, grad.double())
    weight = formats.dequantize_int4(inputs.weights).double()
    if mode == "rotated":
        weight = formats.rotate(weight, 1 / formats.ROTATION_BLOCK)
    expected_x = grad_z @ weight
    assert grad_x.dtype == grad_bias.dtype == dtype
    # A rotation adds up 16 values, each rounded, before the last rounding.
    tolerance = GRAD_TOLERANCE[dtype] * (4 if mode == "rotated" else 1)
    largest = grad_z.abs().max() if m else torch.tensor(0.0)
    most = formats.dequantize_int4(inputs.weights).abs().max()
    assert_within(grad_x, expected_x, (tolerance * 4 * largest * most).expand(expected_x.shape))
    bound = (GRAD_TOLERANCE[dtype] * max(m, 1) * largest).expand(18)
    assert_within(grad_bias, grad_z.reshape(m, 18).sum(0), bound)


def test_gradient_only_where_asked(implementation: str) -> None:
    inputs, _ = made(LinearCase(5, 29, 18, "gradients"), INT4_FORMS[13], torch.float32, "int8", "gelu")
    assert inputs.bias is not None
    assert not OP(*inputs.args()).requires_grad
    bias = inputs.bias.clone().requires_grad_()
    OP(*inputs.args(cached=True, bias=bias)).sum().backward()
    assert bias.grad is not None
    x = inputs.x.clone().requires_grad_()
    OP(*inputs.args(x, cached=True)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


# ------------------------------------------------------------------------------------------- torch's modes


def test_inference_mode_and_no_grad(implementation: str) -> None:
    inputs, expected = made(LinearCase(5, 29, 18, "modes"), INT4_FORMS[1])
    x = inputs.x.clone().requires_grad_()
    with torch.inference_mode():
        y = OP(*inputs.args(x))
        assert y.is_inference()
        assert_same_bits(y, expected)
    with torch.no_grad():
        assert not OP(*inputs.args(x)).requires_grad


def test_autocast_leaves_the_op_alone(implementation: str) -> None:
    inputs, expected = made(LinearCase(5, 29, 18, "modes"), INT4_FORMS[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(OP(*inputs.args()), expected)


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_functional_form_is_the_op(implementation: str, form: Int4Form) -> None:
    inputs, expected = made(LinearCase(5, 129, 18, "modes"), form, torch.float32, "int8", "relu")
    names = [argument.name for argument in OP._schema.arguments]
    values = dict(zip(names, inputs.args(cached=True), strict=True))
    first = [values.pop(name) for name in ("x", "qweight", "weight_scale")]
    y = int4_linear(*first, **values)
    assert_same_bits(y, expected)
