"""The Triton kernels of ``int4_linear``, on a GPU or in Triton's interpreter.

Quantized, they give the reference's bits where K is whole; where it is split, groups' exact sums meet in
another order, within a bound. Weight-only, they are held to the bound of float32 sums that holds for the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dense_checks import check_dense
from int4_checks import check_other_order, check_weight_only, made, moved, strided
from torch import Tensor

from lissom import _triton, formats, registry, testing
from lissom.nn import Int4Linear
from lissom.ops import int4_linear
from lissom.ops.int4_linear import int4_pack
from lissom.reference import int4_linear as page
from lissom.testing import (
    ACT_FNS,
    DTYPES,
    GRAD_TOLERANCE,
    INT4_CASES,
    INT4_FORMS,
    INT4_MODES,
    ROW_KINDS,
    VIEWS,
    Int4Form,
    Int4Inputs,
    LinearCase,
    assert_same_bits,
    assert_within,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities that are meant
]

OP = torch.ops.lissom.int4_linear.default

FORMS_AND_MODES = [
    pytest.param(form, mode, id=f"{form}-{mode}")
    for form in INT4_FORMS
    for mode in INT4_MODES
    if not (form.group_index and mode == "rotated")
]
FEW_FORMS = [INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[8], INT4_FORMS[9], INT4_FORMS[13]]
"""Zero-points; a table per output; a table per group; whole rows; a group index and float zero-points."""

FEW_FORMS_AND_MODES = [param for param in FORMS_AND_MODES if param.values[0] in FEW_FORMS]


def kernels() -> ModuleType:
    return _triton.load("int4_linear")


def run(inputs: Int4Inputs, x: Tensor | None = None, backend: str = "triton", **others: Any) -> Tensor:
    y: Tensor = OP(*inputs.args(x, backend=backend, **others))
    return y


def call_of(inputs: Int4Inputs) -> Any:
    """What the launcher makes of the inputs, their columns in the order of groups."""
    x, weights = inputs.x, inputs.weights
    if weights.group_index is not None:
        order = formats.group_order(weights.group_index)
        codes = formats.unpack_nibbles(weights.qweight, weights.in_features)[:, order]
        x, weights = x[:, order], replace(weights, qweight=formats.pack_nibbles(codes), group_index=None)
    out = x.new_empty(x.shape[0], weights.out_features)
    options = inputs.weight_only, inputs.act_fn, inputs.rotated
    return kernels()._prepare(x.contiguous(), weights, inputs.bias, *options, out)


def forced(inputs: Int4Inputs, plan: Any) -> Tensor:
    """The result of a plan of the caller's choice."""
    call = call_of(inputs)
    y: Tensor = kernels().int4_linear(
        call.rows, call.weights, call.bias, call.weight_only, call.act_fn, call.rotated, plan
    )
    return y


def splits(inputs: Int4Inputs, plan: Any = None) -> int:
    """In how many parts K is cut."""
    call = call_of(inputs)
    if call.out.numel() == 0:
        return 1
    parts: int = kernels()._parts(call, kernels()._plan(call) if plan is None else plan)[1]
    return parts


def check(y: Tensor, inputs: Int4Inputs, parts: int | None = None) -> None:
    """Against the reference's bits, or within the bound; ``parts`` of K, None for the plan's own choice."""
    if inputs.weight_only:
        if parts is None and y.numel() and kernels()._plan(call_of(inputs)).dense:
            check_dense(y, inputs.x, formats.dequantize_int4(inputs.weights), inputs.bias, inputs.act_fn)
        else:
            check_weight_only(y, inputs)
        return
    expected = page.int4_linear(*inputs.page)
    if (splits(inputs) if parts is None else parts) == 1:
        assert_same_bits(y, expected)
    else:
        check_other_order(y, expected, inputs)


def in_turn(device: str, items: list[Any], start: int, step: int) -> list[Any]:
    """All of them on a GPU; in the interpreter every ``step``-th, each caller beginning elsewhere."""
    return items if device == "cuda" else items[start % step :: step]


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", INT4_MODES)
@pytest.mark.parametrize("case", INT4_CASES, ids=str)
def test_every_shape(triton_device: str, case: LinearCase, mode: str) -> None:
    if triton_device == "cpu" and case.m > 1000:
        pytest.skip("too large for Triton's interpreter")
    turn = INT4_CASES.index(case) + INT4_MODES.index(mode)
    forms = [form for form in INT4_FORMS if not (form.group_index and mode == "rotated")]
    for i, form in enumerate(in_turn(triton_device, forms, turn, len(forms))):
        dtype, act_fn = DTYPES[(turn + i) % 3], ACT_FNS[(turn + i) % len(ACT_FNS)]
        inputs = made(triton_device, case, form, dtype, mode, act_fn)
        y = run(inputs)
        assert y.shape == (case.m, case.n)
        check(y, inputs)


@pytest.mark.parametrize(("form", "mode"), FORMS_AND_MODES)
def test_every_form(triton_device: str, form: Int4Form, mode: str) -> None:
    """Of few rows, whose K is split, and of more."""
    turn = INT4_FORMS.index(form) + INT4_MODES.index(mode)
    for dtype in in_turn(triton_device, list(DTYPES), turn, 3):
        for m, k in in_turn(triton_device, [(3, 301), (19, 256)], INT4_FORMS.index(form) // 2, 2):
            inputs = made(triton_device, LinearCase(m, k, 37, "forms"), form, dtype, mode, seed=3)
            check(run(inputs), inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("mode", INT4_MODES)
def test_every_option(triton_device: str, mode: str, act_fn: str | None, bias: bool) -> None:
    turn = ACT_FNS.index(act_fn) + INT4_MODES.index(mode)
    for form in in_turn(triton_device, FEW_FORMS[:4], turn, 4):
        dtype = DTYPES[(turn + bias) % 3]
        inputs = made(
            triton_device, LinearCase(18, 65, 37, "options"), form, dtype, mode, act_fn, bias=bias, seed=3
        )
        check(run(inputs), inputs)


@pytest.mark.parametrize("m", [7, 40])
@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_every_kind_of_row(triton_device: str, mode: str, kind: str, m: int) -> None:
    forms = [INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[4], INT4_FORMS[6]]
    pairs = [(form, dtype) for form in forms for dtype in DTYPES]
    turn = ROW_KINDS.index(kind) + 5 * INT4_MODES.index(mode) + m
    for form, dtype in in_turn(triton_device, pairs, turn, 11):
        inputs = made(triton_device, LinearCase(m, 70, 20, "row kinds"), form, dtype, mode, None, kind=kind)
        check(run(inputs), inputs)


def extreme_sums(form: Int4Form, weight_only: bool, dtype: torch.dtype) -> Int4Inputs:
    """All |qx| = 127 against the codes and table entries furthest from zero, with every pattern of signs."""
    k, n = 259, 5
    signs = torch.tensor([[1.0], [-1.0]]).repeat(2, k)
    signs[2:, ::2] *= -1
    codes = torch.where(torch.cat([signs, signs[:1]]) > 0, 15, 0)
    codes[4] = 0
    weights = testing.int4_weights(n, k, form)
    zero, book = weights.zero_point, weights.codebook
    if book is not None:
        book = torch.zeros_like(book)
        book[..., 0], book[..., 15] = -1.0, 1.0
    zero = None if zero is None else torch.full_like(zero, 255)
    weights = replace(weights, qweight=formats.pack_nibbles(codes), zero_point=zero, codebook=book)
    return Int4Inputs((signs * 3).to(dtype), weights, None, weight_only, None, False)


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_extreme_sums(triton_device: str, form: Int4Form) -> None:
    for dtype in in_turn(triton_device, list(DTYPES), INT4_FORMS.index(form), 3):
        for weight_only in (False, True):
            inputs = moved(triton_device, extreme_sums(form, weight_only, dtype))
            check(run(inputs), inputs)


def test_negative_zero(triton_device: str) -> None:
    x = torch.zeros(3, 40)
    x[0, 1], x[1] = -0.0, -0.0
    x[2, :2] = torch.tensor([1.0, -1.0])
    for form in FEW_FORMS:
        weights = replace(
            testing.int4_weights(2, 40, form), qweight=torch.full((2, 20), 0x33, dtype=torch.uint8)
        )
        for bias in (None, torch.tensor([-0.0, 0.0])):
            inputs = moved(triton_device, Int4Inputs(x, weights, bias, False, "gelu", False))
            assert_same_bits(run(inputs), page.int4_linear(*inputs.page))


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [None, *formats.INT4_ZERO_DTYPES], ids=str)
@pytest.mark.parametrize("scale", formats.INT4_SCALE_DTYPES, ids=str)
def test_terms_of_any_dtype(
    triton_device: str, scale: torch.dtype, zero: torch.dtype | None, bias_dtype: torch.dtype
) -> None:
    form = Int4Form(32, zero, scale=scale)
    turn = DTYPES.index(bias_dtype) + DTYPES.index(scale)
    for dtype in in_turn(triton_device, list(DTYPES), turn, 3):
        for mode in in_turn(triton_device, ["int8", "weight_only"], turn, 2):
            inputs = made(triton_device, LinearCase(4, 70, 21, "dtypes"), form, dtype, mode)
            assert inputs.bias is not None
            inputs = replace(inputs, bias=inputs.bias.to(bias_dtype))
            check(run(inputs), inputs)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_scales_of_any_magnitude(triton_device: str, magnitude: float) -> None:
    """x is such that products are of middling size: nothing overflows or vanishes on the way."""
    for form in (INT4_FORMS[6], Int4Form(64, torch.float16, scale=torch.float32), Int4Form(32, torch.uint8)):
        inputs = made(triton_device, LinearCase(5, 65, 20, "scales"), form, torch.bfloat16, "weight_only")
        scale = torch.full_like(inputs.weights.weight_scale, magnitude, dtype=torch.float32)
        x = torch.linspace(-1, 1, 5 * 65, device=triton_device).view(5, 65) / magnitude / 256
        x = x.clamp(-1e38, 1e38).bfloat16()
        weights = replace(inputs.weights, weight_scale=scale)
        check(run(changed := replace(inputs, x=x, weights=weights)), changed)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_any_magnitude(triton_device: str, dtype: torch.dtype, magnitude: float) -> None:
    for form, mode in (
        (INT4_FORMS[5], "weight_only"),
        (INT4_FORMS[8], "weight_only"),
        (INT4_FORMS[2], "int8"),
    ):
        inputs = made(triton_device, LinearCase(4, 65, 20, "tables"), form, dtype, mode, kind="normal")
        w = inputs.weights
        assert w.codebook is not None
        scale = (w.weight_scale.float() / magnitude).to(torch.float32)
        weights = replace(w, codebook=w.codebook * magnitude, weight_scale=scale)
        check(run(changed := replace(inputs, weights=weights)), changed)


def test_tables_with_nan(triton_device: str) -> None:
    for mode in INT4_MODES:
        inputs = made(triton_device, LinearCase(3, 40, 8, "bad scale"), INT4_FORMS[2], torch.float32, mode)
        w = inputs.weights
        assert w.codebook is not None
        scale, table = w.weight_scale.clone(), w.codebook.clone()
        bias = torch.zeros(8, device=triton_device)
        scale[1], table[4], bias[7] = math.nan, math.nan, math.nan
        for dtype in DTYPES:
            x = torch.ones(3, 40, dtype=dtype, device=triton_device)
            weights = replace(w, weight_scale=scale, codebook=table)
            y = run(replace(inputs, weights=weights, bias=bias), x)
            assert y.isnan().any(dim=0).tolist() == [i in (1, 4, 7) for i in range(8)]


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_a_row_with_nan_or_infinity_is_nan(triton_device: str, form: Int4Form, bad: float) -> None:
    for mode, m in (("int8", 3), ("int8", 20), ("rotated", 3)):
        if form.group_index and mode == "rotated":
            continue
        dtype = DTYPES[m % 3]
        case = LinearCase(m, 70, 18, "bad rows")
        inputs = made(triton_device, case, form, dtype, mode, "relu", kind="normal")
        inputs.x[1, 36] = bad
        y = run(inputs)
        assert bool(y[1].isnan().all())
        check(y, inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_weight_only_carries_nan_and_infinity(triton_device: str, form: Int4Form, bad: float) -> None:
    dtypes = in_turn(triton_device, list(DTYPES), FEW_FORMS.index(form) + math.isnan(bad), 3)
    for dtype in dtypes:
        for m in (3, 20):
            case = LinearCase(m, 70, 18, "bad rows")
            inputs = made(triton_device, case, form, dtype, "weight_only", kind="normal")
            clean = run(inputs)
            inputs.x[1, 69] = bad
            y = run(inputs)
            good = [i for i in range(m) if i != 1]
            # A scale of 0, and a weight of 0, make NaN of it as they do in the reference; others as well.
            assert not bool(y[1].isfinite().any())
            assert_same_bits(y[good], clean[good])


def test_overflow_of_float16_output_is_infinite(triton_device: str) -> None:
    weights = replace(
        testing.int4_weights(2, 64, INT4_FORMS[0]),
        qweight=torch.full((2, 32), 0xFF, dtype=torch.uint8),
        weight_scale=torch.tensor([[1.0], [-1.0]]),
    )
    for weight_only in (False, True):
        x = torch.full((1, 64), 60000.0, dtype=torch.float16)
        inputs = moved(triton_device, Int4Inputs(x, weights, None, weight_only, None, False))
        assert run(inputs).tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (0, 37), (3, 0, 37), (0, 2, 37)])
def test_leading_dimensions(triton_device: str, shape: tuple[int, ...], mode: str) -> None:
    for form in (FEW_FORMS[0], FEW_FORMS[4]):
        inputs = made(triton_device, LinearCase(6, 37, 18, "leading"), form, torch.float32, mode)
        count = math.prod(shape[:-1])
        y = run(inputs, inputs.x[:count].reshape(shape))
        assert y.shape == (*shape[:-1], 18)
        assert y.is_contiguous()
        assert_same_bits(y.reshape(count, 18), run(inputs, inputs.x[:count]))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 3, 0), (0, 0)])
@pytest.mark.parametrize("form", FEW_FORMS[:4], ids=str)
def test_no_terms(triton_device: str, form: Int4Form, shape: tuple[int, ...]) -> None:
    bias = torch.tensor([-1.0, 2.0, -0.5])
    for weight_only in (False, True):
        inputs = Int4Inputs(
            torch.empty(shape), testing.int4_weights(3, 0, form), bias, weight_only, "relu", False
        )
        y = run(moved(triton_device, inputs))
        assert_same_bits(y.cpu(), bias.relu().expand(*shape[:-1], 3).contiguous())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_any_strides(triton_device: str, mode: str, view: str) -> None:
    turn = list(VIEWS).index(view)
    for form in in_turn(triton_device, [FEW_FORMS[0], FEW_FORMS[4]], turn, 2):
        for dtype in in_turn(triton_device, list(DTYPES), turn, 3):
            inputs = made(triton_device, LinearCase(20, 37, 18, "strides"), form, dtype, mode)
            x = VIEWS[view](inputs.x)
            before = x.clone()
            assert_same_bits(run(inputs, x), run(inputs, x.contiguous()))
            assert_same_bits(x, before)


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_expanded_input(triton_device: str, mode: str) -> None:
    inputs = made(triton_device, LinearCase(20, 37, 18, "strides"), FEW_FORMS[0], torch.float32, mode)
    for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
        assert_same_bits(run(inputs, x), run(inputs, x.contiguous()))


@pytest.mark.parametrize(("form", "mode"), [p for p in FEW_FORMS_AND_MODES if p.values[1] != "rotated"])
def test_other_arguments_of_any_strides(triton_device: str, form: Int4Form, mode: str) -> None:
    inputs = made(triton_device, LinearCase(6, 64, 18, "strides"), form, torch.float32, mode)
    w = inputs.weights
    assert inputs.bias is not None
    tensors = {
        field.name: value for field in fields(w) if isinstance(value := getattr(w, field.name), Tensor)
    }
    some = replace(w, **{name: strided(tensor) for name, tensor in tensors.items()})
    odd = torch.cat([w.qweight.flatten()[:1], w.qweight.flatten()])[1:].view(w.qweight.shape)
    wide = torch.cat([w.qweight, w.qweight[:, :5]], dim=1)[:, :32]
    for weights in (some, replace(w, qweight=w.qweight.t().contiguous().t()), replace(w, qweight=odd)):
        changed = replace(inputs, weights=weights, bias=strided(inputs.bias))
        check(run(changed), changed)
    check(run(changed := replace(inputs, weights=replace(w, qweight=wide))), changed)


def test_given_packed_weights(triton_device: str) -> None:
    """What a layer on the device keeps gives the same; on the CPU it is for other kernels, and not read."""
    for form in (INT4_FORMS[0], INT4_FORMS[13], INT4_FORMS[15]):
        for mode in ("int8", "weight_only"):
            inputs = made(triton_device, LinearCase(5, 133, 43, "packed"), form, torch.float32, mode)
            w = inputs.weights
            order = None if w.group_index is None else formats.group_order(w.group_index)
            packed = int4_pack(w, inputs.weight_only)
            assert (packed is None) == (triton_device == "cuda" and w.group_index is None)
            assert_same_bits(run(inputs, packed=packed, permutation=order), run(inputs))


def test_rows_do_not_depend_on_each_other(triton_device: str) -> None:
    """Not on their number either where K is whole and the form quantized."""
    inputs = made(triton_device, LinearCase(70, 100, 40, "batch"), INT4_FORMS[1])
    together = run(inputs)
    for m in (1, 3, 9, 16, 17, 33, 65):
        some = replace(inputs, x=inputs.x[-m:])
        assert splits(some) == 1
        assert_same_bits(run(some), together[-m:])


# ------------------------------------------------------------------------------------------- plans


def every_plan() -> list[Any]:
    """Each plan of the tables, with the kinds and families it is for; empty where Triton is absent."""
    if _triton._triton_reason():
        return []
    module = kernels()
    found: dict[tuple[str, str], tuple[Any, str, list[str]]] = {}
    tables = {
        **module._PLANS,
        ("single", "any"): module._SINGLE,
        **{("int8 spread", family): table for family, table in module._SPREAD.items()},
    }
    for (kind, family), table in tables.items():
        for plan in (plan for plans in table.values() for plan in plans):
            found.setdefault((kind, str(plan)), (plan, kind, []))[2].append(family)
    return [pytest.param(*value, id=f"{value[1]}-{value[0]}".replace(" ", "-")) for value in found.values()]


FORMS_OF_KIND = {
    "half": [INT4_FORMS[0], INT4_FORMS[7], INT4_FORMS[3]],
    "half heavy": [INT4_FORMS[4], INT4_FORMS[8], INT4_FORMS[2]],
    "int8": [INT4_FORMS[6], INT4_FORMS[0], INT4_FORMS[3]],
    "int8 heavy": [INT4_FORMS[8], INT4_FORMS[1], INT4_FORMS[7]],
    "int8 spread": [INT4_FORMS[1], INT4_FORMS[0], INT4_FORMS[2]],
    "single": [INT4_FORMS[7], INT4_FORMS[5]],
}


@pytest.mark.parametrize(("plan", "kind", "families"), every_plan())
def test_every_plan(triton_device: str, plan: Any, kind: str, families: list[str]) -> None:
    """Tiles with and without a rest in each dimension, K in one part and in several."""
    module = kernels()
    if triton_device == "cuda":
        family = module._family(module.architecture(torch.device("cuda")))
        if not {family, "any"} & set(families):
            pytest.skip(f"this GPU is {family}, the plan is for {', '.join(families)}")
    mode = "int8" if "int8" in kind else "weight_only"
    dtypes = [torch.float32] if kind == "single" else [torch.bfloat16, torch.float16]
    turn = len(str(plan)) + plan.sizes["BLOCK_M"] // 8
    for i, form in enumerate(in_turn(triton_device, FORMS_OF_KIND[kind], turn, 2)):
        dtype = dtypes[(turn + i) % len(dtypes)]
        cases = [(5, 9 * 128 + 16, 20), (plan.sizes["BLOCK_M"] + 3, 129, 70)]
        for m, k, n in cases:
            inputs = made(triton_device, LinearCase(m, k, n, "plans"), form, dtype, mode, "silu")
            parts = splits(inputs, plan)
            assert parts == 1 or k > 1000
            check(forced(inputs, plan), inputs, parts)


def spread(inputs: Int4Inputs) -> Tensor:
    """By codes that are spread for the call, however few rows there are."""
    return forced(inputs, kernels()._spread(64, 128, 4, 3))


@pytest.mark.parametrize(
    ("form", "mode"), [param for param in FORMS_AND_MODES if param.values[1] != "weight_only"]
)
def test_spread_codes_give_the_same_bits(triton_device: str, form: Int4Form, mode: str) -> None:
    """In rows, columns and outputs that fill no tile; without any columns; at the ends of the int8 range."""
    turn = INT4_FORMS.index(form)
    for i, (m, k, n) in enumerate(((70, 272, 150), (3, 0, 5), (2, 96, 1))):
        dtype, act_fn = DTYPES[(turn + i) % 3], ACT_FNS[(turn + i) % len(ACT_FNS)]
        case = LinearCase(m, k, n, "spread")
        inputs = made(triton_device, case, form, dtype, mode, act_fn, bias=(turn + i) % 3 > 0)
        check(spread(inputs), inputs, 1)
    extreme = extreme_sums(form, False, DTYPES[turn % 3])
    inputs = moved(triton_device, extreme)
    check(spread(inputs), inputs, 1)


def test_spread_codes_beyond_the_bound_come_in_parts(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in FEW_FORMS:
        inputs = made(triton_device, LinearCase(9, 130, 50, "parts"), form, torch.bfloat16, "int8", "silu")
        whole = spread(inputs)
        check(whole, inputs, 1)
        for most in (20 * 256, 1):
            monkeypatch.setattr(_triton.load("dequantized"), "MOST_BYTES", most)
            assert_same_bits(spread(inputs), whole)
        monkeypatch.undo()


def test_many_rows_are_multiplied_by_spread_codes() -> None:
    if reason := _triton._triton_reason():
        pytest.skip(f"triton: {reason}")
    module = kernels()
    for architecture, least in ((80, 257), (86, 257), (90, 129), (100, 129)):
        for m in (1, 64, least - 1, least, 100000):
            for heavy in (False, True):
                plans = module.candidates(architecture, m, torch.bfloat16, False, heavy)
                assert plans[0].spread == (m >= least)
                assert not plans[-1].spread
                assert not any(
                    p.spread for p in module.candidates(architecture, m, torch.bfloat16, True, heavy)
                )


@pytest.mark.parametrize("mode", INT4_MODES)
def test_split_sums_have_the_same_bits_every_time(triton_device: str, mode: str) -> None:
    """Whichever program comes last. A launch leaves its counters as it found them."""
    inputs = made(
        triton_device, LinearCase(5, 1664, 40, "split"), INT4_FORMS[1], torch.bfloat16, mode, "gelu"
    )
    assert splits(inputs) > 2
    y = run(inputs)
    check(y, inputs)
    for _ in range(2):
        assert_same_bits(run(inputs), y)


def test_plans_cover_every_shape() -> None:
    """Every architecture has a plan for any number of rows; splits cover K."""
    if reason := _triton._triton_reason():
        pytest.skip(f"triton: {reason}")
    module = kernels()
    for architecture in (80, 86, 87, 89, 90, 100, 103, 120):
        for m in (1, 2, 8, 9, 16, 17, 64, 65, 256, 257, 1024, 100000):
            for dtype in DTYPES:
                for weight_only, heavy in ((True, False), (False, True), (True, True)):
                    plans = module.candidates(architecture, m, dtype, weight_only, heavy)
                    assert len({str(plan) for plan in plans}) == len(plans) > 0
                    for plan in (plan for plan in plans if not (plan.dense or plan.spread)):
                        for n, blocks in ((1, 1), (4096, 32), (28672, 64), (128256, 32), (17, 1000)):
                            splits, steps = module._splits(plan, 132, m, n, blocks)
                            assert (splits - 1) * steps < blocks <= splits * steps


def test_autotuning_keeps_the_bits_and_a_winner(
    triton_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    tiles = __import__("lissom.kernels.tiles", fromlist=["tiles"])
    tiles._winners.cache_clear()
    for mode in ("int8", "weight_only"):
        inputs = made(triton_device, LinearCase(9, 64, 40, "tuned"), INT4_FORMS[0], torch.bfloat16, mode)
        with tiles.autotune():
            check(run(inputs), inputs)
        check(run(inputs), inputs)
    tiles._winners.cache_clear()
    assert "lissom: tuned int4_linear 16 40 64" in capsys.readouterr().err
    assert "int4_linear 16 40 64" in next(tmp_path.iterdir()).read_text()


# ------------------------------------------------------------------------------------------- the op


def test_which_backend_runs(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    named = registry.select("int4_linear", triton_device, "triton")
    assert named.name == "triton"
    assert "triton" in named.detail()
    if triton_device == "cuda":
        assert registry.select("int4_linear", "cuda").name == "triton"
    ran: list[str] = []
    launch = kernels().int4_linear
    monkeypatch.setattr(kernels(), "int4_linear", lambda *args: (ran.append("triton"), launch(*args))[1])
    x = torch.ones(2, 4, device=triton_device)
    q = torch.ones(3, 2, dtype=torch.uint8, device=triton_device)
    int4_linear(x, q, torch.ones(3, 1, device=triton_device), backend="triton")
    assert ran == ["triton"]


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("mode", INT4_MODES)
def test_gradients(triton_device: str, mode: str, act_fn: str | None) -> None:
    """As the reference's: backward is built on the op, which runs on the same backend."""
    for dtype in DTYPES:
        for form in (FEW_FORMS[0], FEW_FORMS[4]):
            if form.group_index and mode == "rotated":
                continue
            case = LinearCase(7, 48, 18, "gradients")
            inputs = made(triton_device, case, form, dtype, mode, act_fn, kind="normal")
            assert inputs.bias is not None
            grads = []
            for backend in ("triton", "reference"):
                x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
                y = run(replace(inputs, bias=bias), x, backend)
                grad = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(dtype)
                grads.append(torch.autograd.grad(y, (x, bias), grad))
            for ours, theirs in zip(*grads, strict=True):
                assert ours.dtype == dtype
                bound = (GRAD_TOLERANCE[dtype] * theirs.double().abs().max()).expand(theirs.shape)
                assert_within(ours, theirs.double(), bound)


@pytest.mark.parametrize("mode", INT4_MODES)
def test_opcheck(triton_device: str, mode: str) -> None:
    form = INT4_FORMS[1] if mode == "rotated" else INT4_FORMS[13]
    case = LinearCase(5, 32, 18, "opcheck")
    inputs = made(triton_device, case, form, torch.float32, mode, "gelu", kind="normal")
    torch.library.opcheck(OP, inputs.args(backend="triton"))
    assert inputs.bias is not None
    x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    torch.library.opcheck(OP, inputs.args(x, bias=bias, backend="triton"))


def test_bad_input_is_named_before_any_launch(triton_device: str) -> None:
    x = torch.ones(2, 7, device=triton_device)
    q = torch.ones(3, 2, dtype=torch.uint8, device=triton_device)
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\) but qweight is \(3, 2\), two codes a byte"):
        int4_linear(x, q, torch.ones(3, 1, device=triton_device), backend="triton")


def test_mixed_devices_are_named(triton_device: str) -> None:
    other = "meta" if triton_device == "cpu" else "cpu"
    x, q = torch.ones(2, 4, device=triton_device), torch.ones(3, 2, dtype=torch.uint8, device=other)
    with pytest.raises(ValueError, match=rf"qweight is on {other} but the input is on {triton_device}"):
        int4_linear(x, q, torch.ones(3, 1, device=triton_device), backend="triton")


# ------------------------------------------------------------------------------------------- the layer


def layers(device: str) -> list[Int4Linear]:
    """Of every kind of state."""
    made = []
    for form in (INT4_FORMS[1], INT4_FORMS[8], INT4_FORMS[9], INT4_FORMS[13]):
        for activation in ("int8", None):
            weights = testing.int4_weights(20, 140, form)
            bias = torch.nn.Parameter(torch.linspace(-1, 1, 20))
            made.append(Int4Linear.from_weights(weights, bias, activation=activation).to(device))
    return made


def test_layer_without_a_packed_copy(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer on a GPU is: canonical tensors, and with a group index codes in the groups' order."""
    monkeypatch.setenv("LISSOM_BACKEND", "triton")
    for layer in layers(triton_device):
        if layer.group_index is None:
            layer._packed = None
        x = torch.randn(3, 140, device=triton_device)
        with torch.no_grad():
            y = layer(x)
        weight_only = layer.activation is None
        inputs = Int4Inputs(x, layer.quantized, layer.bias, weight_only, None, layer.rotated)
        with torch.no_grad():
            check(y, inputs)


@pytest.fixture
def gpu(triton_device: str) -> torch.device:
    if triton_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_layer_to_a_gpu_and_back(gpu: torch.device) -> None:
    for layer in layers("cpu"):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        x = torch.randn(9, 140)
        with torch.no_grad():
            expected = layer(x)
            layer.to(gpu)
            assert (layer._packed is None) == (layer.group_index is None)
            if layer._packed is not None:
                assert layer._packed.shape == layer.qweight.shape
            y = layer(x.to(gpu))
            inputs = Int4Inputs(
                x.to(gpu), layer.quantized, layer.bias, layer.activation is None, None, layer.rotated
            )
            check(y, inputs)
            layer.to("cpu")
            assert layer._packed is not None
            for name, tensor in layer.state_dict().items():
                assert_same_bits(tensor, before[name])
            assert_same_bits(layer(x), expected)


@pytest.mark.gpu
def test_packed_weights_of_the_cpu_are_refused(gpu: torch.device) -> None:
    inputs = made("cpu", LinearCase(3, 64, 20, "packed"), INT4_FORMS[0])
    packed = formats.pack_int4(inputs.weights).to(gpu)
    with pytest.raises(ValueError, match=r"packed has no meaning on cuda:\d+ without group_index"):
        run(moved(str(gpu), inputs), packed=packed)


def _calls(gpu: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every form on the GPU: few rows with K split, many rows; quantized and weight-only."""
    calls = {}
    for form in (INT4_FORMS[1], INT4_FORMS[4], INT4_FORMS[8], INT4_FORMS[13]):
        for mode in ("int8", "weight_only"):
            for m in (1, 16, 64, 700):
                case = LinearCase(m, 2048, 512, "calls")
                inputs = made(str(gpu), case, form, torch.bfloat16, mode, "gelu")
                args = inputs.args(backend="triton")[1:]
                calls[f"{form} {mode} {m}"] = (lambda x, args=args: OP(x, *args), inputs.x)
    return calls


@pytest.mark.gpu
def test_cuda_graphs(gpu: torch.device) -> None:
    """Captured launches count arrivals in zeros of their own: two graphs run beside each other."""
    for name, (call, x) in _calls(gpu).items():
        expected = call(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(x)
        torch.cuda.current_stream().wait_stream(stream)
        graphs, results, held = [], [], x.clone()
        for _ in range(2):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                results.append(call(held))
        streams = [torch.cuda.Stream() for _ in graphs]
        torch.cuda.synchronize()
        for _ in range(5):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for y in results:
            assert_same_bits(y, expected), name


@pytest.mark.gpu
def test_other_streams_and_no_synchronisation(gpu: torch.device) -> None:
    expected = {name: call(x) for name, (call, x) in _calls(gpu).items()}
    calls = _calls(gpu)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for i, (name, (call, x)) in enumerate(calls.items()):
            with torch.cuda.stream(streams[i % 4]):
                results.append((name, call(x)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for name, y in results:
        assert_same_bits(y, expected[name])


@pytest.mark.gpu
def test_every_gpu(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = made("cuda:1", LinearCase(4, 2048, 96, "second GPU"), INT4_FORMS[1], torch.bfloat16)
    y = run(inputs)
    assert y.device == torch.device("cuda:1")
    check(y, inputs)
    assert torch.cuda.current_device() == gpu.index


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 64])
def test_compiles_without_breaks(gpu: torch.device, m: int) -> None:
    for layer in layers(str(gpu)):
        x = torch.randn(m, 140, device=gpu)
        with torch.no_grad():
            assert_same_bits(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(gpu: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of GPU memory, {free >> 30} are free")
    m, k, n = 70000, 32, 33000  # the output
    inputs = made(
        "cpu", LinearCase(3, k, n, "large"), INT4_FORMS[1], torch.bfloat16, "weight_only", bias=False
    )
    inputs = moved(str(gpu), inputs)
    x = torch.randn(m, k, device=gpu, dtype=torch.bfloat16)
    for weight_only in (False, True):
        y = run(some := replace(inputs, x=x, weight_only=weight_only))
        last = replace(some, x=x[-40:])
        if weight_only:
            dense = formats.dequantize_int4(last.weights)
            check_dense(y[-40:].clone(), last.x, dense, last.bias, last.act_fn)
        else:
            check(y[-40:].clone(), last, parts=1)
        del y
    n, k = 70000, 65536  # the codes
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=gpu)
    scale = torch.rand(n, k // 128, device=gpu).half()
    x = torch.randn(2, k, device=gpu)
    y = OP(x, codes, scale, backend="triton")
    last = replace(inputs.weights, qweight=codes[-50:], weight_scale=scale[-50:], zero_point=None)
    last = replace(last, in_features=k, group_size=128)
    some = Int4Inputs(x, last, None, False, None, False)
    check(y[:, -50:].contiguous(), some, parts=2)
