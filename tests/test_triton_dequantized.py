"""Products by dense weights that are made for a call, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from dense_checks import check_dense
from int4_checks import made
from test_triton_int4_linear import call_of
from test_triton_int8_linear import on
from torch import Tensor

from lissom import _triton, formats
from lissom.testing import (
    ACT_FNS,
    INT4_FORMS,
    Int4Form,
    Int4Inputs,
    LinearCase,
    LinearInputs,
    assert_same_bits,
    linear_inputs,
)

pytestmark = pytest.mark.triton

HALVES = (torch.bfloat16, torch.float16)
CASES = [LinearCase(5, 301, 37, "odd"), LinearCase(70, 128, 40, "whole"), LinearCase(1, 2, 1, "small")]


def module(name: str = "dequantized") -> ModuleType:
    return _triton.load(name)


def int4(inputs: Int4Inputs) -> Tensor:
    """By the dense plan, however many rows there are."""
    call, kernels = call_of(inputs), module("int4_linear")
    y: Tensor = kernels.int4_linear(
        call.rows, call.weights, call.bias, True, call.act_fn, call.rotated, kernels.DENSE
    )
    return y


def int8(inputs: LinearInputs) -> Tensor:
    kernels = module("int8_linear")
    terms = inputs.qweight, inputs.weight_scale, inputs.bias, None
    y: Tensor = kernels.int8_linear(inputs.x, *terms, True, inputs.act_fn, False, kernels.DENSE)
    return y


def check_int4(y: Tensor, inputs: Int4Inputs) -> None:
    check_dense(y, inputs.x, formats.dequantize_int4(inputs.weights), inputs.bias, inputs.act_fn)


def check_int8(y: Tensor, inputs: LinearInputs) -> None:
    weight = formats.dequantize_int8(inputs.qweight, inputs.weight_scale)
    check_dense(y, inputs.x, weight, inputs.bias, inputs.act_fn)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_dense_int4_weights_are_those_of_the_page(
    triton_device: str, form: Int4Form, dtype: torch.dtype
) -> None:
    """Bit for bit, in rows and columns that fill no program."""
    for n, k in ((37, 302), (9, 1030), (3, 32)):
        inputs = made(triton_device, LinearCase(1, k, n, "weights"), form, dtype, "weight_only")
        weights = inputs.weights
        if weights.group_index is not None:
            continue  # columns come in the order of groups: below
        call, dense = call_of(inputs), []

        def kept(first: int, last: int, w: Tensor, dense: list[Tensor] = dense) -> None:
            dense.append(w)

        kernels = module("int4_linear")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "product", lambda x, n, fill, *_: kept(0, n, filled(fill, x, n)))
            kernels._launch_dense(call)
        assert_same_bits(dense[0][:, :k], formats.dequantize_int4(weights, dtype))


def filled(fill: Any, x: Tensor, n: int) -> Tensor:
    w = torch.full((n, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    fill(0, n, w)
    return w


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4(triton_device: str, form: Int4Form, case: LinearCase) -> None:
    turn = INT4_FORMS.index(form) + CASES.index(case)
    inputs = made(
        triton_device,
        case,
        form,
        HALVES[turn % 2],
        "weight_only",
        ACT_FNS[turn % len(ACT_FNS)],
        bias=turn % 3 > 0,
    )
    y = int4(inputs)
    assert y.shape == (case.m, case.n)
    check_int4(y, inputs)


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8(triton_device: str, case: LinearCase, act_fn: str | None) -> None:
    turn = CASES.index(case) + ACT_FNS.index(act_fn)
    inputs = on(
        triton_device, linear_inputs(case, HALVES[turn % 2], "weight_only", act_fn, bias=turn % 3 > 0)
    )
    y = int8(inputs)
    assert y.shape == (case.m, case.n)
    check_int8(y, inputs)


def test_views_and_other_biases(triton_device: str) -> None:
    """Rows, weights and biases of other strides and types."""
    inputs = on(
        triton_device, linear_inputs(LinearCase(9, 96, 34, "views"), torch.bfloat16, "weight_only", "gelu")
    )
    wide = torch.zeros(9, 200, dtype=torch.bfloat16, device=triton_device)
    wide[:, 3:99] = inputs.x
    padded = torch.zeros(34, 130, dtype=torch.int8, device=triton_device)
    padded[:, 1:97] = inputs.qweight
    bias = torch.randn(34, 2, device=triton_device)[:, 0]
    some = replace(inputs, x=wide[:, 3:99], qweight=padded[:, 1:97], bias=bias)
    assert_same_bits(int8(some), int8(replace(inputs, bias=bias.contiguous())))
    check_int8(int8(some), replace(inputs, bias=bias))
    some = replace(inputs, x=inputs.x[:1].expand(9, 96), bias=bias)
    check_int8(int8(some), some)


def test_weights_beyond_the_bound_come_in_parts(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense copies are as small as they have to be."""
    case, filled = LinearCase(6, 64, 50, "parts"), []
    kernels = module("int4_linear")
    make = kernels.dense_int4
    monkeypatch.setattr(kernels, "dense_int4", lambda *args: (filled.append(len(args[-1])), make(*args)))
    for act_fn, bias in ((None, True), ("silu", False), (None, False)):
        four = made(triton_device, case, INT4_FORMS[8], torch.bfloat16, "weight_only", act_fn, bias=bias)
        eight = on(triton_device, linear_inputs(case, torch.float16, "weight_only", act_fn, bias=bias))
        for most, parts in ((1 << 20, [50]), (2 * 64 * 20, [17, 17, 16]), (1, [1] * 50)):
            monkeypatch.setattr(module(), "MOST_BYTES", most)
            check_int8(int8(eight), eight)
            filled.clear()
            check_int4(int4(four), four)
            assert filled == parts


def test_not_a_number_stays_where_it_is(triton_device: str) -> None:
    inputs = on(
        triton_device, linear_inputs(LinearCase(7, 40, 12, "nan"), torch.bfloat16, "weight_only", "relu")
    )
    inputs.x[3, 5] = torch.nan
    y = int8(inputs)
    assert y.isnan().all(1).tolist() == [i == 3 for i in range(7)]
    inputs.weight_scale[4] = torch.nan
    assert int8(inputs).isnan().all(0).tolist() == [i == 4 for i in range(12)]


def test_no_terms(triton_device: str) -> None:
    inputs = on(
        triton_device, linear_inputs(LinearCase(3, 0, 5, "no terms"), torch.bfloat16, "weight_only", "gelu")
    )
    check_int8(int8(inputs), inputs)


def test_which_products_are_dense() -> None:
    """Weight-only ones of 16 bits and many rows: measured on Hopper, by count elsewhere."""
    if reason := _triton._triton_reason():
        pytest.skip(f"triton: {reason}")
    int4_kernels, int8_kernels = module("int4_linear"), module("int8_linear")
    for architecture, first in ((80, 257), (89, 257), (90, 65), (100, 65), (120, 257)):
        for m in (1, 64, 65, 256, 257, 5000):
            for dtype, weight_only in (
                (torch.bfloat16, True),
                (torch.float16, True),
                (torch.float32, True),
                (HALVES[0], False),
            ):
                few = weight_only and dtype != torch.float32
                plans = int4_kernels.candidates(architecture, m, dtype, weight_only, False)
                assert [plan.dense for plan in plans].count(True) == (few and m >= first)
                assert plans[0].dense == (few and m >= first)
                plans = int8_kernels.candidates(architecture, 132, m, 4096, 4096, dtype, weight_only, True)
                assert (plans[0] == int8_kernels.DENSE) == (few and m >= 257)


@pytest.mark.gpu
def test_many_rows_are_multiplied_by_dense_weights(triton_device: str) -> None:
    """As the ops are called: eagerly, and in a CUDA graph the same bits."""
    if triton_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    case = LinearCase(300, 520, 264, "many")
    four = made("cuda", case, INT4_FORMS[8], torch.bfloat16, "weight_only", "gelu")
    eight = on("cuda", linear_inputs(case, torch.bfloat16, "weight_only", "gelu"))
    four_op, eight_op = torch.ops.lissom.int4_linear.default, torch.ops.lissom.int8_linear.default
    check_int4(y4 := four_op(*four.args(backend="triton")), four)
    check_int8(y8 := eight_op(*eight.args, None, "triton", False), eight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = four_op(*four.args(backend="triton")), eight_op(*eight.args, None, "triton", False)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(again[0], y4)
    assert_same_bits(again[1], y8)
