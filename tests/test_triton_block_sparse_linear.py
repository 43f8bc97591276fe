"""The Triton kernels of ``block_sparse_linear`` and its gradients, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import BlockSparse, _triton, formats, registry
from lissom.formats import BlockSparseWeights
from lissom.nn import SparseLinear
from lissom.ops import block_sparse_grad_input, block_sparse_grad_values, block_sparse_linear
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    BLOCK_SHAPES,
    BLOCK_SPARSE_CASES,
    BLOCK_SPARSE_DTYPES,
    DTYPES,
    EXACT_ACT_FNS,
    GRAD_TOLERANCE,
    ROW_KINDS,
    UNIT_ROUNDOFF,
    VIEWS,
    BlockSparseCase,
    BlockSparseInputs,
    assert_same_bits,
    assert_within,
    block_sparse_inputs,
    float_tolerance,
    sum_bound,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities that are meant
]

OP = torch.ops.lissom.block_sparse_linear.default
GRAD_INPUT = torch.ops.lissom.block_sparse_grad_input.default
GRAD_VALUES = torch.ops.lissom.block_sparse_grad_values.default

SHAPES = (*BLOCK_SHAPES, (128, 128), (32, 64), (128, 16), (20, 100))
"""Blocks of all forms: whole steps, gathered, one longer than a tile, one that divides by nothing."""

FEW_SHAPES = ((8, 1), (8, 4), (16, 16), (3, 5), (64, 64))

SERVED = tuple(zip(BLOCK_SPARSE_DTYPES, (*DTYPES, torch.float16), strict=True))
"""Values of every type, with x of the same or, int8, another."""


def kernels() -> ModuleType:
    return _triton.load("block_sparse_linear")


def op_module() -> ModuleType:
    return sys.modules["lissom.ops.block_sparse_linear"]


def on(device: str, inputs: BlockSparseInputs) -> BlockSparseInputs:
    def moved(record: Any) -> dict[str, Any]:
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in fields.items()}

    weights = BlockSparseWeights(**moved(inputs.weights))
    return BlockSparseInputs(**{**moved(inputs), "weights": weights})


def made(device: str, *key: Any, **options: Any) -> BlockSparseInputs:
    return on(device, block_sparse_inputs(*key, **options))


def run(inputs: BlockSparseInputs, backend: str = "triton", **others: Any) -> Tensor:
    y: Tensor = OP(*inputs.args(**others, backend=backend))
    return y


def indices(w: BlockSparseWeights) -> tuple[Tensor, Tensor]:
    return w.crow_indices, w.col_indices


def weight_args(w: BlockSparseWeights) -> tuple[Any, ...]:
    return w.values, *indices(w), w.out_features, w.in_features, w.weight_scale, True, "triton"


def values_args(w: BlockSparseWeights) -> tuple[Any, ...]:
    return *indices(w), *w.block_shape, True, "triton"


def check(y: Tensor, inputs: BlockSparseInputs) -> None:
    """The reference's bits for int8 values; within the bound of float32 sums for float ones."""
    w = inputs.weights
    if w.weight_scale is not None:
        assert_same_bits(y, run(inputs, "reference"))
        return
    assert y.dtype == inputs.x.dtype
    weight = formats.block_sparse_to_dense(w).double()
    offset = 0.0 * weight.sum(1) if inputs.bias is None else inputs.bias.double()
    z = inputs.x.double() @ weight.t() + offset
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = sum_bound(inputs.x, weight.t(), inputs.terms) + offset.abs() * 2 * UNIT_ROUNDOFF[torch.float32]
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ weight.abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def check_grad_input(grad_x: Tensor, grad: Tensor, w: BlockSparseWeights) -> None:
    assert grad_x.dtype == grad.dtype
    weight = formats.block_sparse_to_dense(w).double()
    exact = grad.double() @ weight
    met = int((weight != 0).sum(0).max()) if weight.numel() else 0
    bound = sum_bound(grad, weight, met)
    assert_within(grad_x, exact, bound + float_tolerance(exact.abs() + bound, grad.dtype))


def check_grad_values(values: Tensor, grad: Tensor, x: Tensor, w: BlockSparseWeights) -> None:
    assert values.dtype == torch.float32
    assert values.shape == w.values.shape
    places = replace(w, values=values, weight_scale=None)
    formats.check_block_sparse(places)  # says that padding is zero
    stored = formats.block_sparse_to_dense(replace(places, values=torch.ones_like(values))).bool()
    exact = torch.where(stored, grad.double().t() @ x.double(), 0.0)
    bound = torch.where(stored, sum_bound(grad.t(), x, grad.shape[0]), 0.0)
    assert_within(formats.block_sparse_to_dense(places), exact, bound)


def gradient(m: int, n: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def where(*what: Any) -> Callable[[Callable[[], None]], None]:
    """Runs a check; what fails says where."""

    def checked(run: Callable[[], None]) -> None:
        try:
            run()
        except AssertionError as error:
            raise AssertionError(f"{' '.join(map(str, what))}: {error}") from error

    return checked


# ------------------------------------------------------------------------------------------- numbers


def combinations(case: BlockSparseCase, device: str) -> list[tuple[Any, ...]]:
    """Block shapes, dtypes of values and x, activations in turn; in the interpreter few, and of few
    programs."""
    start = BLOCK_SPARSE_CASES.index(case)
    found = []
    for i, block_shape in enumerate(SHAPES):
        for j, value_dtype in enumerate(BLOCK_SPARSE_DTYPES):
            turn = i + j + start
            found.append((block_shape, value_dtype, DTYPES[turn % 3], ACT_FNS[turn % len(ACT_FNS)]))
    if device == "cuda":
        return found

    def cheap(combination: tuple[Any, ...]) -> bool:
        (height, width), *_ = combination
        programs = -(-case.n // height) + -(-case.k // width)
        return programs * (1 + case.m // 64) < 30

    return [c for c in found if cheap(c)][start % 7 :: 35]


@pytest.mark.parametrize("case", BLOCK_SPARSE_CASES, ids=str)
def test_every_case(triton_device: str, case: BlockSparseCase) -> None:
    """Forward and both gradients."""
    for i, (block_shape, value_dtype, dtype, act_fn) in enumerate(combinations(case, triton_device)):
        named = where(block_shape, value_dtype, dtype, act_fn)
        inputs = made(triton_device, case, block_shape, value_dtype, dtype, act_fn)
        y = run(inputs, validated=bool(i % 2))
        assert y.shape == (case.m, case.n)
        named(lambda y=y, inputs=inputs: check(y, inputs))
        inputs = made(triton_device, case, block_shape, value_dtype, dtype, kind="normal")
        w, x = inputs.weights, inputs.x
        grad = gradient(case.m, case.n, DTYPES[i % 3], triton_device)
        grad_x = GRAD_INPUT(grad, *weight_args(w))
        named(lambda y=grad_x, grad=grad, w=w: check_grad_input(y, grad, w))
        grad_values = GRAD_VALUES(grad, x, *values_args(w))
        named(lambda y=grad_values, grad=grad, x=x, w=w: check_grad_values(y, grad, x, w))


@pytest.mark.parametrize("block_shape", SHAPES, ids=str)
def test_every_block_shape(triton_device: str, block_shape: tuple[int, int]) -> None:
    """At a few rows and at many, where tiles differ; values and x of one 16-bit type, of others, and int8."""
    height, width = block_shape
    sizes, types = (2 * width + 1, 2 * height + 1), [(20, torch.float32, torch.bfloat16)]
    half = (torch.bfloat16, torch.float16)[SHAPES.index(block_shape) % 2]
    if triton_device == "cuda":
        sizes = (6 * width + 1, 5 * height + 1)
        types += [(1, torch.bfloat16, torch.bfloat16), (33, torch.float32, torch.float16)]
        types += [(20, torch.float16, torch.bfloat16), (70, torch.float16, torch.float16)]
        half = torch.bfloat16
    for m, value_dtype, dtype in (
        *types,
        (70, half, half),
        (9, torch.int8, torch.bfloat16),
    ):
        case = BlockSparseCase(m, *sizes, 0.5, "block shapes")
        inputs = made(triton_device, case, block_shape, value_dtype, dtype, kind="normal", seed=3)
        w, grad = inputs.weights, gradient(m, case.n, dtype, triton_device)
        check(run(inputs), inputs)
        check_grad_input(GRAD_INPUT(grad, *weight_args(w)), grad, w)
        check_grad_values(GRAD_VALUES(grad, inputs.x, *values_args(w)), grad, inputs.x, w)


def every_plan(kind: str, block_shape: tuple[int, int], device: str) -> list[Any]:
    """Of the GPU; in the interpreter of all architectures, but once where only warps and stages differ."""
    gpus = (80, 90, 100) if device == "cpu" else (kernels().architecture(torch.device(device)),)
    plans = {}
    for gpu in gpus:
        for m in (8, 64, 4096):
            for features in ((True, True, True), (True, False, False), (False, False, False)):
                for plan in kernels().candidates(gpu, 100, kind, m, 32, *block_shape, 1024, *features):
                    plans[(plan.form, *plan.sizes.values()) if device == "cpu" else str(plan)] = plan
    return list(plans.values())


@pytest.mark.parametrize("block_shape", [(128, 128), (64, 64), (32, 32), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("kind", "transposed"),
    [(k, t) for k in ("half", "int8", "split", "float") for t in (False, True) if (k, t) != ("int8", True)],
    ids=lambda value: value if isinstance(value, str) else "grad_input" if value else "forward",
)
def test_every_plan(triton_device: str, kind: str, block_shape: tuple[int, int], transposed: bool) -> None:
    """Whatever may be chosen on some GPU or by tuning is right, TMA included."""
    value_dtype = {"half": torch.bfloat16, "int8": torch.int8}.get(kind, torch.float32)
    dtype = torch.bfloat16 if kind in ("half", "split") else torch.float32
    height, width = block_shape
    k, n = 2 * max(16, width), max(32, height) - 16  # two blocks a line; N is no multiple of their height
    if transposed:
        k, n = max(32, width) - 16, 2 * max(16, height)
    for m in (5 if kind != "split" else 20, 80):
        case = BlockSparseCase(m, k, n, 0.8, "plans")
        inputs = made(triton_device, case, block_shape, value_dtype, dtype, "relu", kind="normal")
        w, grad = inputs.weights, gradient(m, case.n, dtype, triton_device)
        for plan in every_plan(kind, block_shape[::-1] if transposed else block_shape, triton_device):
            if (plan.sizes["BLOCK_M"] > 64) != (m > 64):
                continue
            if transposed:
                args = (w.values, *indices(w), w.in_features, None, kernels().Places(), plan)
                y = kernels().block_sparse_grad_input(grad, *args)
                where(plan)(lambda y=y, w=w, grad=grad: check_grad_input(y, grad, w))
            else:
                options = (w.weight_scale, inputs.bias, "relu", kernels().Places(), plan)
                y = kernels().block_sparse_linear(inputs.x, w.values, *indices(w), w.out_features, *options)
                where(plan)(lambda y=y, inputs=inputs: check(y, inputs))


@pytest.mark.parametrize("kind", ["half", "float"])
@pytest.mark.parametrize("block_shape", [(128, 128), (64, 64), (32, 32), (8, 1), (1, 8), (100, 3)], ids=str)
def test_every_tile_of_the_values(
    triton_device: str, kind: str, block_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the sum over rows in several parts."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    case = BlockSparseCase(140, 3 * block_shape[1] - 1, block_shape[0] + 1, 0.8, "values")
    inputs = made(triton_device, case, block_shape, dtype, dtype, kind="normal")
    w, x, grad = inputs.weights, inputs.x, gradient(140, case.n, dtype, triton_device)
    gpus = (80, 90, 100) if triton_device == "cpu" else (kernels().architecture(x.device),)
    tiles = {str(t): t for gpu in gpus for t in kernels().values_candidates(gpu, kind, *block_shape, 99)}
    for multiprocessors in (1, 100):
        monkeypatch.setattr(kernels(), "_multiprocessors", lambda device, count=multiprocessors: count)
        for tile in list(tiles.values())[: None if multiprocessors == 1 else 1]:
            values = kernels().block_sparse_grad_values(
                grad, x, *indices(w), *block_shape, kernels().Places(), tile
            )
            where(tile)(lambda values=values: check_grad_values(values, grad, x, w))


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_every_option(triton_device: str, act_fn: str | None) -> None:
    for i, block_shape in enumerate(((8, 4), (64, 64))):
        for value_dtype in BLOCK_SPARSE_DTYPES:
            for bias in (True, False):
                case = BlockSparseCase(19, 70, 37, 0.6, "options")
                dtype = DTYPES[(i + bias) % 3]
                inputs = made(triton_device, case, block_shape, value_dtype, dtype, act_fn, bias=bias)
                check(run(inputs), inputs)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_every_kind_of_row(triton_device: str, kind: str) -> None:
    for block_shape, dtype in zip(((8, 4), (3, 5), (64, 64)), DTYPES, strict=True):
        for value_dtype in BLOCK_SPARSE_DTYPES if triton_device == "cuda" else (torch.int8, dtype):
            case = BlockSparseCase(7, 70, 16, 0.5, "row kinds")
            inputs = made(triton_device, case, block_shape, value_dtype, dtype, None, kind=kind)
            check(run(inputs), inputs)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_of_any_float_dtype(triton_device: str, bias_dtype: torch.dtype) -> None:
    for value_dtype, dtype in SERVED:
        inputs = made(triton_device, BlockSparseCase(4, 33, 21, 0.5, "bias"), (8, 4), value_dtype, dtype)
        assert inputs.bias is not None
        inputs = replace(inputs, bias=torch.stack([inputs.bias.to(bias_dtype)] * 2, 1)[:, 0])
        check(run(inputs), inputs)


def test_negative_zero(triton_device: str) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0], [1.0, -1.0, 0.0]])
    for block_shape in ((1, 1), (2, 4)):
        mask = torch.ones(-(-3 // block_shape[0]), -(-3 // block_shape[1]), dtype=torch.bool)
        mask[-1] = False
        w = formats.block_sparse_from_dense(torch.ones(3, 3), mask, block_shape, torch.int8)
        for act_fn in ACT_FNS:
            for bias in (None, torch.tensor([-0.0, 0.0, -0.0])):
                check(run(inputs := on(triton_device, BlockSparseInputs(x, w, bias, act_fn))), inputs)


def test_the_same_bits_every_time(triton_device: str) -> None:
    for block_shape in FEW_SHAPES:
        case = BlockSparseCase(70, 3 * block_shape[1], 2 * block_shape[0], 0.6, "again")
        inputs = made(triton_device, case, block_shape, torch.bfloat16, torch.bfloat16)
        w, grad = inputs.weights, gradient(70, case.n, torch.bfloat16, triton_device)
        calls = (
            lambda inputs=inputs: run(inputs),
            lambda grad=grad, w=w: GRAD_INPUT(grad, *weight_args(w)),
            lambda grad=grad, inputs=inputs: GRAD_VALUES(grad, inputs.x, *values_args(inputs.weights)),
        )
        for call in calls:
            first = call()
            for _repeat in range(3 if triton_device == "cuda" else 1):
                assert_same_bits(call(), first)


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_shape", [(8, 1), (16, 16), (3, 5), (64, 64)], ids=str)
def test_int8_rows_with_nan_or_infinity_are_nan(
    triton_device: str, block_shape: tuple[int, int], bad: float
) -> None:
    case = BlockSparseCase(14, 70, 18, 0.3, "bad rows")
    inputs = made(triton_device, case, block_shape, torch.int8, torch.bfloat16, "relu", kind="normal")
    clean = run(inputs)
    x = inputs.x.clone()
    x[2, 0], x[13, 69] = bad, bad
    y = run(inputs, x=x)
    good = [i for i in range(14) if i not in (2, 13)]
    assert bool(y[[2, 13]].isnan().all())
    assert_same_bits(y[good], clean[good])


@pytest.mark.parametrize("m", [7, 70])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_shape", [(8, 1), (8, 4), (16, 16), (3, 5), (32, 64)], ids=str)
def test_nan_stays_where_it_is_met(
    triton_device: str, block_shape: tuple[int, int], value_dtype: torch.dtype, m: int
) -> None:
    """In x, in grad, at the edges that padding touches; what meets no block has no influence."""
    height, width = block_shape
    k, n = (70, 61) if min(block_shape) >= 16 or triton_device == "cuda" else (4 * width + 1, 3 * height + 2)
    inputs = made(
        triton_device, BlockSparseCase(m, k, n, 0.4, "nan"), block_shape, value_dtype, kind="normal"
    )
    w, x = inputs.weights, inputs.x.to(value_dtype)
    grad = gradient(m, n, value_dtype, triton_device)
    ones = replace(w, values=torch.ones_like(w.values))
    stored = formats.block_sparse_to_dense(ones).bool()
    clean = run(inputs, x=x), GRAD_INPUT(grad, *weight_args(w)), GRAD_VALUES(grad, x, *values_args(w))
    row, column = m - 3, 2
    x[row, k - 1], x[row, column], grad[row, n - 1] = math.nan, math.inf, math.nan

    y = run(inputs, x=x)
    met = torch.zeros_like(y, dtype=torch.bool)
    met[row] = stored[:, k - 1] | stored[:, column]
    assert not bool(y[met].isfinite().any())
    assert_same_bits(y[~met], clean[0][~met])
    grad_x = GRAD_INPUT(grad, *weight_args(w))
    met = torch.zeros_like(grad_x, dtype=torch.bool)
    met[row] = stored[n - 1]
    assert bool(grad_x[met].isnan().all())
    assert_same_bits(grad_x[~met], clean[1][~met])
    values = GRAD_VALUES(grad, x, *values_args(w))
    formats.check_block_sparse(replace(w, values=values))
    touched = torch.zeros_like(stored)
    touched[n - 1], touched[:, k - 1], touched[:, column] = True, True, True
    dense, before = (formats.block_sparse_to_dense(replace(w, values=v)) for v in (values, clean[2]))
    assert not bool(dense[touched & stored].isfinite().any())
    assert_same_bits(dense[~touched], before[~touched])


@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("block_shape", FEW_SHAPES, ids=str)
def test_neighbours_in_memory_have_no_influence(
    triton_device: str, block_shape: tuple[int, int], m: int
) -> None:
    """NaN on all sides of every argument."""

    def surrounded(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        wide = torch.full((tensor.shape[0] + 200, *tensor.shape[1:]), math.nan, device=tensor.device)
        wide = (
            wide.to(tensor.dtype)
            if tensor.is_floating_point()
            else torch.full_like(wide, 99).to(tensor.dtype)
        )
        wide[100:-100] = tensor
        return wide[100:-100]

    height, width = block_shape
    k, n = 3 * width + width // 2, 2 * height + height // 2
    for value_dtype in BLOCK_SPARSE_DTYPES:
        inputs = made(triton_device, BlockSparseCase(m, k, n, 0.8, "neighbours"), block_shape, value_dtype)
        w, wide = inputs.weights, inputs.x.new_full((m + 4, 3 * k), math.nan)
        wide[2 : m + 2, k : 2 * k] = inputs.x
        x = wide[2 : m + 2, k : 2 * k]
        near = {name: surrounded(getattr(w, name)) for name in ("values", "weight_scale")}
        assert_same_bits(run(inputs, x=x, bias=surrounded(inputs.bias), **near), run(inputs))
        grad = gradient(m, n, torch.float32, triton_device)
        wide_grad = grad.new_full((m + 4, 3 * n), math.nan)
        wide_grad[2 : m + 2, n : 2 * n] = grad
        middle = wide_grad[2 : m + 2, n : 2 * n]
        assert_same_bits(
            GRAD_INPUT(middle, *weight_args(replace(w, **near))), GRAD_INPUT(grad, *weight_args(w))
        )
        if value_dtype == torch.float32:
            args = values_args(w)
            assert_same_bits(GRAD_VALUES(middle, x, *args), GRAD_VALUES(grad, inputs.x, *args))


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (0, 37), (3, 0, 37)], ids=str)
def test_leading_dimensions(triton_device: str, shape: tuple[int, ...], value_dtype: torch.dtype) -> None:
    inputs = made(triton_device, BlockSparseCase(40, 37, 18, 0.5, "leading"), (8, 4), value_dtype)
    count = math.prod(shape[:-1])
    flat = inputs.x[:count]
    x = flat.reshape(shape)
    y = run(inputs, x=x)
    assert y.shape == (*shape[:-1], 18)
    assert y.is_contiguous()
    assert_same_bits(y.reshape(count, 18), run(inputs, x=flat))
    args = weight_args(inputs.weights)
    grad_x = GRAD_INPUT(y, *args)
    assert grad_x.shape == shape
    assert grad_x.is_contiguous()
    assert_same_bits(grad_x.reshape(count, 37), GRAD_INPUT(y.reshape(count, 18), *args))
    args = values_args(inputs.weights)
    assert_same_bits(GRAD_VALUES(y, x, *args), GRAD_VALUES(y.reshape(count, 18), flat, *args))


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(triton_device: str, view: str) -> None:
    for value_dtype, dtype in SERVED:
        inputs = made(triton_device, BlockSparseCase(20, 37, 18, 0.5, "strides"), (8, 4), value_dtype, dtype)
        x = VIEWS[view](inputs.x)
        before = x.clone()
        assert_same_bits(run(inputs, x=x), run(inputs, x=x.contiguous()))
        assert_same_bits(x, before)
        grad = VIEWS[view](gradient(20, 18, dtype, triton_device))
        args = weight_args(inputs.weights)
        assert_same_bits(GRAD_INPUT(grad, *args), GRAD_INPUT(grad.contiguous(), *args))
        args = values_args(inputs.weights)
        assert_same_bits(GRAD_VALUES(grad, x, *args), GRAD_VALUES(grad.contiguous(), x.contiguous(), *args))


@pytest.mark.parametrize("block_shape", [(8, 4), (64, 64)], ids=str)
def test_expanded_input(triton_device: str, block_shape: tuple[int, int]) -> None:
    for value_dtype in BLOCK_SPARSE_DTYPES:
        case = BlockSparseCase(80, 64, 64, 0.9, "expanded")
        inputs = made(triton_device, case, block_shape, value_dtype, torch.bfloat16)
        for x in (inputs.x[:1].expand(13, 64), inputs.x[:1].expand(80, 64), inputs.x[:, :1].expand(80, 64)):
            assert_same_bits(run(inputs, x=x), run(inputs, x=x.contiguous()))


def test_other_arguments_of_any_strides(triton_device: str) -> None:
    def every_second(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack([t, t * 0], -1)[..., 0]

    for value_dtype in BLOCK_SPARSE_DTYPES:
        inputs = made(triton_device, BlockSparseCase(6, 37, 18, 0.5, "strides"), (8, 4), value_dtype)
        w = inputs.weights
        strided = {name: every_second(getattr(w, name)) for name in ("values", "weight_scale")}
        strided |= {name: every_second(getattr(w, name)) for name in ("crow_indices", "col_indices")}
        for validated in (False, True):
            assert_same_bits(run(inputs, **strided, validated=validated), run(inputs))
    packed = formats.pack_block_sparse(inputs.weights)
    assert_same_bits(run(inputs, packed=packed, validated=True), run(inputs))


def test_odd_places_of_values(triton_device: str) -> None:
    """Values that begin at no multiple of 16 bytes: neither TMA nor copies by 16 bytes take them."""
    for block_shape, value_dtype in (
        ((64, 64), torch.bfloat16),
        ((8, 1), torch.bfloat16),
        ((4, 4), torch.int8),
    ):
        case = BlockSparseCase(70, 4 * block_shape[1], 2 * block_shape[0], 0.9, "offset")
        inputs = made(triton_device, case, block_shape, value_dtype, torch.bfloat16, kind="normal")
        values = inputs.weights.values
        moved = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
        assert_same_bits(run(inputs, values=moved), run(inputs))


# ------------------------------------------------------------------------------------------- indices


def brute_force_columns(w: BlockSparseWeights) -> list[list[tuple[int, int]]]:
    """By block column, (block row, block) from top to bottom."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(w.block_columns)]
    crow, col = w.crow_indices.tolist(), w.col_indices.tolist()
    for row in range(w.block_rows):
        for block in range(crow[row], crow[row + 1]):
            found[col[block]].append((row, block))
    return found


@pytest.mark.parametrize("keep", [None, 0.0, 0.1, 0.5, 1.0])
def test_what_is_derived_from_indices(triton_device: str, keep: float | None) -> None:
    for block_shape in ((4, 4), (16, 1), (3, 5)):
        w = made(triton_device, BlockSparseCase(1, 90, 70, keep, "places"), block_shape).weights
        places, counts = kernels().Places(), w.crow_indices.diff()
        lines = places.rows(*indices(w))
        assert sorted(lines.order.tolist()) == list(range(w.block_rows))
        assert counts[lines.order.long()].tolist() == sorted(counts.tolist(), reverse=True)
        assert_same_bits(lines.ends - lines.begins, counts[lines.order.long()])
        columns = places.columns(*indices(w), w.block_columns)
        found: list[Any] = [[] for _column in range(w.block_columns)]
        for column, begin, end in zip(
            *(t.tolist() for t in (columns.order, columns.begins, columns.ends)), strict=True
        ):
            found[column] = list(
                zip(columns.across[begin:end].tolist(), columns.blocks[begin:end].tolist(), strict=True)
            )
        assert found == brute_force_columns(w)
        for unit in (1, 3, 100):
            line, first = (t.tolist() for t in places.units(*indices(w), unit))
            expected = [
                (row, block)
                for row, (begin, end) in enumerate(
                    zip(w.crow_indices.tolist(), w.crow_indices.tolist()[1:], strict=False)
                )
                for block in range(begin, end, unit)
            ]
            used = [(a, b) for a, b in zip(line, first, strict=True) if a < w.block_rows]
            assert used == expected
            assert set(line[len(used) :]) <= {w.block_rows}


@pytest.mark.parametrize("k", [10, 100])
def test_values_past_the_last_column_meet_zeros(triton_device: str, k: int) -> None:
    """Blocks at the edge hold more columns than there are: whatever stands there."""
    case = BlockSparseCase(6, k, 128, 1.0, "past the edge")
    inputs = made(triton_device, case, (32, 96), torch.int8, torch.bfloat16, kind="normal")
    expected = run(inputs, "reference")
    edge = inputs.weights.col_indices == (k - 1) // 96
    inputs.weights.values[edge, :, (k - 1) % 96 + 1 :] = 99
    assert_same_bits(run(inputs, validated=True), expected)


def test_indices_are_looked_at_once(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is derived from them serves later calls, until they are changed."""
    inputs = made(triton_device, BlockSparseCase(5, 40, 40, 0.5, "once"), (8, 8), kind="normal")
    w, grad = inputs.weights, gradient(5, 40, torch.float32, triton_device)
    computed = []
    part = kernels().Places.part

    def spied(self: Any, key: Any, compute: Callable[..., Any], *indices: Tensor) -> Any:
        return part(self, key, lambda *changed: (computed.append(key), compute(*changed))[1], *indices)

    monkeypatch.setattr(kernels().Places, "part", spied)

    def all_calls() -> None:
        check(run(inputs, validated=True), inputs)
        check_grad_input(GRAD_INPUT(grad, *weight_args(w)), grad, w)
        check_grad_values(GRAD_VALUES(grad, inputs.x, *values_args(w)), grad, inputs.x, w)

    all_calls()
    assert sorted(key if isinstance(key, str) else key[0] for key in computed) == ["columns", "rows", "units"]
    computed.clear()
    all_calls()
    assert computed == []
    w.col_indices.copy_(4 - w.col_indices)  # mirrored, and put in order again
    for begin, end in zip(w.crow_indices.tolist(), w.crow_indices.tolist()[1:], strict=False):
        w.col_indices[begin:end] = w.col_indices[begin:end].sort().values
    all_calls()
    assert len(computed) == 3


def test_a_later_check_keeps_what_is_derived(triton_device: str) -> None:
    """A captured CUDA graph may read it. Other sizes of the same indices have columns of their own."""
    w = made(triton_device, BlockSparseCase(5, 40, 40, 0.5, "kept"), (8, 8), kind="normal").weights
    grad = gradient(5, 40, torch.float32, triton_device)
    check_grad_input(GRAD_INPUT(grad, *weight_args(w)), grad, w)
    places = op_module()._known_of(w.crow_indices, w.col_indices).places
    wider = replace(w, in_features=56)
    for weights in (w, wider, w):
        args = (w.values, *indices(w), 40, weights.in_features, None, False, "triton")
        check_grad_input(GRAD_INPUT(grad, *args), grad, weights)
        assert op_module()._known_of(w.crow_indices, w.col_indices).places is places


def test_inference_tensors_are_not_trusted(triton_device: str) -> None:
    """They have no versions: indices that were not declared to be valid are looked at in every call."""
    with torch.inference_mode():
        inputs = made(triton_device, BlockSparseCase(5, 40, 40, 0.4, "inference"), (8, 8), kind="normal")
        w, grad = inputs.weights, gradient(5, 40, torch.float32, triton_device)
        for _repeat in range(2):
            args = (w.values, *indices(w), 40, 40, None, triton_device == "cpu", "triton")
            check_grad_input(GRAD_INPUT(grad, *args), grad, w)
        if triton_device == "cuda":
            w.col_indices[-1] = 5
            with pytest.raises(ValueError, match="use 0 to 4"):
                GRAD_INPUT(grad, *args)


def test_nothing_stored_and_everything(triton_device: str) -> None:
    for i, block_shape in enumerate(FEW_SHAPES):
        for j, keep in enumerate((0.0, 1.0, None)):
            for value_dtype in (
                BLOCK_SPARSE_DTYPES if triton_device == "cuda" else BLOCK_SPARSE_DTYPES[(i + 2 * j) % 4 :][:1]
            ):
                case = BlockSparseCase(3, 2 * block_shape[1], 3 * block_shape[0], keep, "extremes")
                inputs = made(triton_device, case, block_shape, value_dtype, act_fn="silu", kind="normal")
                w, grad = inputs.weights, gradient(3, case.n, torch.float32, triton_device)
                check(run(inputs), inputs)
                check_grad_input(GRAD_INPUT(grad, *weight_args(w)), grad, w)
                check_grad_values(GRAD_VALUES(grad, inputs.x, *values_args(w)), grad, inputs.x, w)


# ------------------------------------------------------------------------------------------- choosing


def test_plans_fit_and_use_tensor_cores() -> None:
    """By count: shared memory, first sides of wgmma, TMA only where it may be."""
    shared = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
    for gpu, kilobytes in shared.items():
        for kind, item in (("half", 2), ("int8", 1), ("split", 2), ("float", 4)):
            for block_shape in SHAPES:
                for m in (1, 17, 64, 65, 4096):
                    for features in ((True, True, True), (True, False, True), (False, False, False)):
                        plans = kernels().candidates(gpu, 132, kind, m, 32, *block_shape, 1024, *features)
                        assert plans
                        for plan in plans:
                            sizes = plan.sizes
                            sides = sizes["BLOCK_M"], sizes["BLOCK_N"]
                            elements = sides[0] + sides[1] * (3 if kind == "split" else 1)
                            bytes_held = elements * sizes["BLOCK_K"] * item * plan.num_stages
                            assert bytes_held <= kilobytes * 1024
                            if plan.form != "gathered":
                                assert block_shape[1] % sizes["BLOCK_K"] == 0
                            assert plan.form != "tma" or (gpu >= 90 and features[1] and m > 64)
                            first = sides[1] if sizes["SWAP"] else sides[0]
                            if kind == "float":
                                assert first <= 32
                            elif min(block_shape) >= 64 and m > 64 and features[0]:
                                assert first >= 64


def test_plans_follow_the_work() -> None:
    def first(m: int, lines: int, depth: int, outputs: int = 128) -> tuple[int, int]:
        plan = kernels().candidates(90, 132, "half", m, lines, outputs, outputs, depth, True, True, True)[0]
        return plan.sizes["BLOCK_M"], plan.sizes["BLOCK_N"]

    assert first(4096, 112, 4096) == (256, 128)  # long lines: few bytes from L2
    assert first(4096, 112, 400) == (128, 128)  # short ones: two programs hide each other's start
    assert first(256, 32, 2048)[0] * first(256, 32, 2048)[1] <= 128 * 64  # tiles enough for the GPU
    assert first(1, 32, 2048)[0] == 16


# ------------------------------------------------------------------------------------------- the op


def test_which_backend_runs(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    assert registry.select("block_sparse_linear", triton_device, "triton").name == "triton"
    if triton_device == "cuda":
        assert registry.select("block_sparse_linear", "cuda").name == "triton"
    ran: list[str] = []
    for name in ("block_sparse_linear", "block_sparse_grad_input", "block_sparse_grad_values"):
        launch = getattr(kernels(), name)
        monkeypatch.setattr(kernels(), name, lambda *args, _n=name, _l=launch: (ran.append(_n), _l(*args))[1])
    inputs = made(triton_device, BlockSparseCase(2, 23, 17, 1.0, "backend"), (4, 3))
    w, grad = inputs.weights, torch.ones(2, 17, device=triton_device)
    block_sparse_linear(inputs.x, w.values, *indices(w), 17, 23, backend="triton")
    block_sparse_grad_input(grad, w.values, *indices(w), 17, 23, backend="triton")
    block_sparse_grad_values(grad, inputs.x, *indices(w), 4, 3, backend="triton")
    assert ran == ["block_sparse_linear", "block_sparse_grad_input", "block_sparse_grad_values"]
    ran.clear()
    block_sparse_grad_input(grad, w.values, *indices(w), 17, 23, backend="reference")
    assert ran == []


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_gradients(triton_device: str, value_dtype: torch.dtype, act_fn: str | None) -> None:
    """Of x, bias and float values, as the reference's: backward runs where the op ran."""
    for dtype, block_shape in zip(DTYPES, ((8, 4), (16, 16), (3, 5)), strict=True):
        if triton_device == "cpu" and DTYPES.index(dtype) != ACT_FNS.index(act_fn) % 3:
            continue
        case = BlockSparseCase(7, 29, 18, 0.6, "gradients")
        inputs = made(triton_device, case, block_shape, value_dtype, dtype, act_fn, kind="normal")
        assert inputs.bias is not None
        found = []
        for backend in ("triton", "reference"):
            wanted = [inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()]
            values = inputs.weights.values.clone()
            if value_dtype != torch.int8:
                wanted.append(values.requires_grad_())
            y = OP(*inputs.args(wanted[0], bias=wanted[1], values=values, backend=backend))
            grad = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(dtype)
            found.append(torch.autograd.grad(y, wanted, grad))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            tolerance = max(GRAD_TOLERANCE[dtype], GRAD_TOLERANCE[theirs.dtype])
            bound = (tolerance * theirs.double().abs().max()).expand(theirs.shape)
            assert_within(ours, theirs.double(), bound)


def test_second_derivatives(triton_device: str) -> None:
    inputs = made(triton_device, BlockSparseCase(6, 29, 18, 0.6, "second"), (8, 4), kind="normal")
    found = []
    for backend in ("triton", "reference"):
        x, values = inputs.x.clone().requires_grad_(), inputs.weights.values.clone().requires_grad_()
        y = OP(*inputs.args(x, values=values, backend=backend))
        grads = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, values)))
    for ours, theirs in zip(*found, strict=True):
        assert_within(ours, theirs, (1e-5 * theirs.abs().max()).expand(theirs.shape))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.int8], ids=str)
def test_opcheck(triton_device: str, value_dtype: torch.dtype) -> None:
    inputs = made(
        triton_device,
        BlockSparseCase(2, 9, 6, 0.9, "opcheck"),
        (4, 4),
        value_dtype,
        act_fn="gelu",
        kind="normal",
    )
    torch.library.opcheck(OP, inputs.args(backend="triton"))
    x, w = inputs.x.clone().requires_grad_(), inputs.weights
    torch.library.opcheck(OP, inputs.args(x, backend="triton"))
    grad = gradient(2, 6, torch.float32, triton_device).requires_grad_()
    torch.library.opcheck(GRAD_INPUT, (grad, *weight_args(w)))
    torch.library.opcheck(GRAD_VALUES, (grad, x, *values_args(w)))


def test_bad_input_is_named_before_any_launch(triton_device: str) -> None:
    inputs = made(triton_device, BlockSparseCase(2, 23, 17, 1.0, "bad"), (4, 3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\) but the weight has K=23"):
        run(inputs, x=torch.ones(2, 5, device=triton_device))
    col = inputs.weights.col_indices.clone()
    col[3] = 8
    for _repeat in range(2):
        with pytest.raises(ValueError, match=r"block_sparse_linear: col_indices\[3\] is 8; use 0 to 7"):
            run(inputs, col_indices=col)
    other = "meta" if triton_device == "cpu" else "cpu"
    with pytest.raises(ValueError, match=rf"values is on {other} but the input is on {triton_device}"):
        run(inputs, values=inputs.weights.values.to(other))


# ------------------------------------------------------------------------------------------- the layer


def layer_of(values: str, block_shape: tuple[int, int] = (16, 16)) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.from_linear(torch.nn.Linear(64, 48), BlockSparse(0.5, block_shape, dtype=values))


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_layer(triton_device: str, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_BACKEND", "triton")
    layer = layer_of(values).to(triton_device)
    layer._packed = None  # so on a GPU
    x = torch.randn(3, 64, device=triton_device)
    with torch.no_grad():
        y = layer(x)
    check(y, BlockSparseInputs(x, layer.sparse, layer.bias.detach(), None))
    for other in (copy.deepcopy(layer), layer.requires_grad_(True)):
        assert_same_bits(other(x).detach(), y)


def test_layer_is_trained(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("float32")
    twin, x = copy.deepcopy(layer), torch.randn(9, 64)
    layer.to(triton_device)
    for one, rows, backend in ((layer, x.to(triton_device), "triton"), (twin, x, "reference")):
        monkeypatch.setenv("LISSOM_BACKEND", backend)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _step in range(2):
            optimizer.zero_grad()
            one(rows).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_a_packed_copy_is_not_moved_nor_made() -> None:
    layer = layer_of("int8", (8, 3))
    shape, moved = layer._packed.shape, []

    def to_meta(tensor: Tensor) -> Tensor:
        moved.append(tensor.shape)
        return tensor.to("meta")

    layer._apply(to_meta)
    assert shape not in moved
    assert layer._packed is None


@pytest.fixture
def gpu(triton_device: str) -> torch.device:
    if triton_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_layer_to_a_gpu_and_back(gpu: torch.device, values: str) -> None:
    layer = layer_of(values)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(9, 64)
    with torch.no_grad():
        expected = layer(x)
        layer.to(gpu)
        assert layer._packed is None
        y = layer(x.to(gpu))
        torch.cuda.set_sync_debug_mode("error")  # indices were checked when they were moved
        try:
            assert layer(x.to(gpu, non_blocking=True)).shape == (9, 48)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(y, BlockSparseInputs(x.to(gpu), layer.sparse, layer.bias, None))
        layer.to("cpu")
        for name, tensor in layer.state_dict().items():
            assert_same_bits(tensor, before[name])
        assert (layer._packed is not None) == (values == "int8")
        assert_same_bits(layer(x), expected)


def _calls(gpu: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """All forms, at few rows and many."""
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    for block_shape in ((128, 128), (64, 64), (32, 32), (8, 1)):
        for value_dtype in (torch.bfloat16, torch.int8):
            for m in (1, 64, 300):
                case = BlockSparseCase(m, 512, 512, 0.4, "calls")
                inputs = made(str(gpu), case, block_shape, value_dtype, torch.bfloat16, "gelu")
                w, name = inputs.weights, f"{block_shape} {value_dtype} {m}"
                args = inputs.args(backend="triton", validated=True)[1:]
                calls[name] = (lambda x, args=args: OP(x, *args), inputs.x)
                calls[f"{name} grad_input"] = (lambda x, w=w: GRAD_INPUT(x, *weight_args(w)), inputs.x)
                calls[f"{name} grad_values"] = (lambda x, w=w: GRAD_VALUES(x, x, *values_args(w)), inputs.x)
    return calls


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graphs(gpu: torch.device, warm: bool) -> None:
    """Indices that were seen before the capture, and new ones, of which nothing may be kept."""
    compiled = {name: call(x) for name, (call, x) in _calls(gpu).items()}
    for name, (call, x) in _calls(gpu).items():
        if warm:
            call(x)
        torch.cuda.synchronize()
        graph, held = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            y = call(held)
        for _replay in range(2):
            held.zero_()
            graph.replay()
            held.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(y, compiled[name])
        del graph, y
        assert_same_bits(call(x), compiled[name])


@pytest.mark.gpu
def test_other_streams_and_no_synchronisation(gpu: torch.device) -> None:
    """What is derived from indices is made on one stream and used on others."""
    expected = {name: call(x) for name, (call, x) in _calls(gpu).items()}
    calls = _calls(gpu)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream())
        for name, (call, x) in calls.items():
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append((name, call(x)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for name, y in results:
        assert_same_bits(y, expected[name])


@pytest.mark.gpu
def test_indices_are_checked_once_on_a_gpu(gpu: torch.device) -> None:
    inputs = made(str(gpu), BlockSparseCase(5, 40, 40, 0.5, "once"), (8, 8))
    expected = run(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(y, expected)
    inputs.weights.col_indices[0] = 5
    with pytest.raises(ValueError, match=r"col_indices\[0\] is 5; use 0 to 4"):
        run(inputs)


@pytest.mark.gpu
def test_every_gpu(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for block_shape in FEW_SHAPES:
        inputs = made("cuda:1", BlockSparseCase(80, 128, 96, 0.5, "second GPU"), block_shape)
        y = run(inputs)
        assert y.device == torch.device("cuda:1")
        check(y, inputs)
    assert torch.cuda.current_device() == gpu.index


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_compiles_without_breaks(gpu: torch.device, values: str) -> None:
    layer = layer_of(values).to(gpu)
    x = torch.randn(70, 64, device=gpu)
    with torch.no_grad():
        assert_same_bits(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(gpu: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free >> 30} are free")
    m, k, n = 70000, 64, 33024  # the output, then x
    for block_shape in ((64, 64), (8, 4)):
        w = made(str(gpu), BlockSparseCase(1, k, n, 0.5, "large"), block_shape, torch.bfloat16).weights
        x = torch.randn(m, k, device=gpu, dtype=torch.bfloat16)
        y = OP(x, w.values, *indices(w), n, k, None, None, None, None, True, "triton")
        part = OP(x[-40:], w.values, *indices(w), n, k, None, None, None, None, True, "reference")
        torch.testing.assert_close(y[-40:], part, rtol=2 * UNIT_ROUNDOFF[torch.bfloat16], atol=1e-3)
        grad_x = GRAD_INPUT(y, *weight_args(w))
        part = GRAD_INPUT(y[-40:], *weight_args(w)[:-1], "reference")
        torch.testing.assert_close(grad_x[-40:], part, rtol=2 * UNIT_ROUNDOFF[torch.bfloat16], atol=1e-2)
        del y, grad_x


def test_every_kernel_is_compiled() -> None:
    """The compile tests know every kernel of the file."""
    text = Path(kernels().__file__).read_text()
    compiled = {one.kernel.__name__ for one in kernels().compilations()}
    for kernel in ("blocks_kernel", "gathered_kernel", "grad_values_kernel", "split_kernel"):
        assert f"def {kernel}(" in text
        assert kernel in compiled
