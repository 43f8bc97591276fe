"""``lissom::block_sparse_linear`` and its gradients on every implementation."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import _native, formats, registry, testing
from lissom.formats import BlockSparseWeights
from lissom.ops import block_sparse_grad_input, block_sparse_grad_values, block_sparse_linear
from lissom.reference import block_sparse_linear as page
from lissom.reference import int8_linear as int8_page
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
    block_sparse_weights,
    float_tolerance,
    sum_bound,
)

OP = torch.ops.lissom.block_sparse_linear.default
GRAD_INPUT = torch.ops.lissom.block_sparse_grad_input.default
GRAD_VALUES = torch.ops.lissom.block_sparse_grad_values.default

FEW_SHAPES = ((8, 1), (8, 4), (16, 16), (3, 5))
"""One column; quads; large; nothing divides."""

RunPython = Callable[..., subprocess.CompletedProcess[str]]

FLOAT_VALUES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def made(*key: Any, **options: Any) -> tuple[BlockSparseInputs, Tensor]:
    """Inputs and what the reference makes of them; shared by all implementations."""
    inputs = block_sparse_inputs(*key, **options)
    return inputs, page.block_sparse_linear(*inputs.page)


def check(y: Tensor, inputs: BlockSparseInputs, expected: Tensor) -> None:
    """Bit-identical for int8 values; within the proved bound for float ones."""
    w = inputs.weights
    if w.weight_scale is not None:
        assert_same_bits(y, expected)
        return
    assert y.dtype == inputs.x.dtype
    weight = formats.block_sparse_to_dense(w).double()
    offset = torch.zeros(w.out_features).double() if inputs.bias is None else inputs.bias.double()
    z = inputs.x.double() @ weight.t() + offset
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = sum_bound(inputs.x, weight.t(), inputs.terms) + offset.abs() * 2 * UNIT_ROUNDOFF[torch.float32]
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    # Where the result leaves its dtype's range, or a partial sum float32's, finite and infinite are right.
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ weight.abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def combinations(
    case: BlockSparseCase,
) -> Iterator[tuple[tuple[int, int], torch.dtype, torch.dtype, str | None]]:
    """Every third block shape with every dtype of values; dtypes of x and activations in turn."""
    start = BLOCK_SPARSE_CASES.index(case)
    for i, block_shape in enumerate(BLOCK_SHAPES):
        if (i + start) % 3 == 0:
            for j, value_dtype in enumerate(BLOCK_SPARSE_DTYPES):
                turn = i // 3 + j + start
                yield block_shape, value_dtype, DTYPES[turn % 3], ACT_FNS[turn % len(ACT_FNS)]


def indices(w: BlockSparseWeights) -> tuple[Tensor, Tensor]:
    return w.crow_indices, w.col_indices


def weight_args(w: BlockSparseWeights) -> tuple[Any, ...]:
    """Arguments of the gradient with respect to the input, after ``grad``."""
    return w.values, *indices(w), w.out_features, w.in_features, w.weight_scale


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", BLOCK_SPARSE_CASES, ids=str)
def test_every_case(implementation: str, case: BlockSparseCase) -> None:
    for i, (block_shape, value_dtype, dtype, act_fn) in enumerate(combinations(case)):
        torch.set_num_threads(1 + i % 2)
        inputs, expected = made(case, block_shape, value_dtype, dtype, act_fn)
        w = inputs.weights
        packed = formats.pack_block_sparse(w) if w.weight_scale is not None and i % 2 else None
        y = OP(*inputs.args(packed=packed, validated=bool(i % 3)))
        assert y.shape == (case.m, case.n)
        try:
            check(y, inputs, expected)
        except AssertionError as error:
            raise AssertionError(f"{block_shape} {value_dtype} {dtype} {act_fn}: {error}") from error


@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_every_block_shape(
    implementation: str, block_shape: tuple[int, int], value_dtype: torch.dtype
) -> None:
    for m, dtype in ((1, DTYPES[0]), (5, DTYPES[1]), (19, DTYPES[2]), (19, DTYPES[0])):
        case = BlockSparseCase(m, 150, 141, 0.3, "block shapes")
        inputs, expected = made(case, block_shape, value_dtype, dtype, bias=False, seed=3)
        check(OP(*inputs.args()), inputs, expected)


@pytest.mark.parametrize("block_shape", [(8, 1), (8, 4), (3, 5)], ids=str)
def test_every_number_of_rows(implementation: str, block_shape: tuple[int, int]) -> None:
    """Every number of rows in a tile and of its remainder."""
    for m in range(1, 50):
        value_dtype = BLOCK_SPARSE_DTYPES[m % 4]
        case = BlockSparseCase(m, 45, 37, 0.4, "rows")
        inputs, expected = made(case, block_shape, value_dtype, DTYPES[m // 4 % 3], bias=bool(m % 2), seed=m)
        check(OP(*inputs.args()), inputs, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_every_option(implementation: str, value_dtype: torch.dtype, act_fn: str | None, bias: bool) -> None:
    for block_shape, dtype in zip(FEW_SHAPES, (*DTYPES, torch.float32), strict=True):
        case = BlockSparseCase(19, 145, 37, 0.4, "options")
        inputs, expected = made(case, block_shape, value_dtype, dtype, act_fn, bias=bias, seed=3)
        check(OP(*inputs.args()), inputs, expected)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_every_kind_of_row(implementation: str, value_dtype: torch.dtype, kind: str) -> None:
    for block_shape, dtype in zip(FEW_SHAPES, (*DTYPES, torch.float32), strict=True):
        case = BlockSparseCase(7, 70, 40, 0.5, "row kinds")
        inputs, expected = made(case, block_shape, value_dtype, dtype, None, kind=kind)
        check(OP(*inputs.args()), inputs, expected)


def test_randomized(implementation: str) -> None:
    """A seeded walk over shapes, blocks and options; the seed that fails is in the assertion."""
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)

        def pick(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        keep = (None, 0.05, 0.3, 0.8)[pick(0, 3)]
        case = BlockSparseCase(
            pick(0, 40), pick(0, 90) if seed % 5 else pick(0, 700), pick(0, 90), keep, "random"
        )
        block_shape = BLOCK_SHAPES[pick(0, len(BLOCK_SHAPES) - 1)] if seed % 3 else (pick(1, 20), pick(1, 20))
        value_dtype, dtype, act_fn = BLOCK_SPARSE_DTYPES[pick(0, 3)], DTYPES[pick(0, 2)], ACT_FNS[pick(0, 4)]
        options = {"bias": bool(pick(0, 1)), "seed": seed}
        inputs, expected = made(case, block_shape, value_dtype, dtype, act_fn, **options)
        try:
            check(OP(*inputs.args()), inputs, expected)
        except AssertionError as error:
            raise AssertionError(
                f"seed={seed} {case} {block_shape} {value_dtype} {dtype}: {error}"
            ) from error


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_bias_of_any_float_dtype(
    implementation: str, value_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    for dtype in DTYPES:
        inputs, _ = made(BlockSparseCase(4, 33, 21, 0.5, "bias dtype"), (8, 4), value_dtype, dtype)
        assert inputs.bias is not None
        inputs = replace(inputs, bias=inputs.bias.to(bias_dtype))
        check(OP(*inputs.args()), inputs, page.block_sparse_linear(*inputs.page))


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_int8_has_the_bits_of_int8_linear(implementation: str, block_shape: tuple[int, int]) -> None:
    inputs, _ = made(BlockSparseCase(9, 77, 70, 0.4, "dense"), block_shape, torch.int8, torch.float32, "gelu")
    w = inputs.weights
    ones = replace(w, weight_scale=torch.ones(70))
    qweight = formats.block_sparse_to_dense(ones).to(torch.int8)
    expected = torch.ops.lissom.int8_linear.default(
        inputs.x, qweight, w.weight_scale, inputs.bias, None, False, "gelu"
    )
    assert_same_bits(OP(*inputs.args()), expected)


@pytest.mark.parametrize("block_shape", [(8, 4), (4, 3), (1, 1), (64, 64)], ids=str)
def test_extreme_sums_do_not_saturate(implementation: str, block_shape: tuple[int, int]) -> None:
    """All |q| = 127 with every combination of signs: pairs of products that saturate 16 bits."""
    k = 1030
    signs = torch.tensor([[1.0], [-1.0]]).repeat(2, k)
    signs[2:, ::2] *= -1
    mask = torch.ones(-(-4 // block_shape[0]), -(-k // block_shape[1]), dtype=torch.bool)
    w = formats.block_sparse_from_dense(signs, mask, block_shape, torch.int8)
    for dtype in DTYPES:
        inputs = BlockSparseInputs((signs * 3).to(dtype), w, None, None)
        y = OP(*inputs.args())
        assert_same_bits(y, page.block_sparse_linear(*inputs.page))
        assert_same_bits(y, int8_page.int8_linear(inputs.x, (signs * 127).to(torch.int8), w.weight_scale))


def test_negative_zero(implementation: str) -> None:
    """Zero sums: fma(0, s, bias) keeps the sign of a zero bias as the reference does."""
    x = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0], [1.0, -1.0, 0.0]])
    for block_shape in ((1, 1), (2, 4)):
        mask = torch.ones(-(-3 // block_shape[0]), -(-3 // block_shape[1]), dtype=torch.bool)
        mask[-1] = False
        w = formats.block_sparse_from_dense(torch.ones(3, 3), mask, block_shape, torch.int8)
        for act_fn in ACT_FNS:
            for bias in (None, torch.tensor([-0.0, 0.0, -0.0])):
                inputs = BlockSparseInputs(x, w, bias, act_fn)
                assert_same_bits(OP(*inputs.args()), page.block_sparse_linear(*inputs.page))


def test_float_bits_do_not_depend_on_the_isa_much() -> None:
    """Each ISA is within the bound of the exact result: any two are within twice the bound of each other."""
    if len(testing.isas()) < 2:
        pytest.skip("fewer than two instruction sets run here")
    inputs, _ = made(BlockSparseCase(23, 301, 70, 0.3, ""), (8, 1), torch.float32, kind="normal")
    weight = formats.block_sparse_to_dense(inputs.weights)
    results = []
    for isa in testing.isas():
        with testing.use(f"native-{isa}"):
            results.append(OP(*inputs.args()))
    bound = 2 * (sum_bound(inputs.x, weight.t(), inputs.terms) + 1e-6)
    for y in results[1:]:
        assert_within(y, results[0], bound)


def test_number_of_threads_does_not_change_bits(native: str) -> None:
    for block_shape in FEW_SHAPES:
        for value_dtype in BLOCK_SPARSE_DTYPES:
            for case in (BLOCK_SPARSE_CASES[-1], BLOCK_SPARSE_CASES[-2]):
                inputs, _ = made(case, block_shape, value_dtype)
                grad = torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(1))
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(
                        (
                            OP(*inputs.args()),
                            GRAD_INPUT(grad, *weight_args(inputs.weights)),
                            GRAD_VALUES(grad, inputs.x, *indices(inputs.weights), *block_shape),
                        )
                    )
                for several in results[1:]:
                    for y, single in zip(several, results[0], strict=True):
                        assert_same_bits(y, single)


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_int8_rows_with_nan_or_infinity_are_nan(
    implementation: str, block_shape: tuple[int, int], bad: float
) -> None:
    """Wherever they lie, met by a block or not."""
    case = BlockSparseCase(14, 70, 18, 0.3, "bad rows")
    for dtype, position in zip(DTYPES, (0, 37, 69), strict=True):
        inputs, clean = made(case, block_shape, torch.int8, dtype, "relu", kind="normal")
        x = inputs.x.clone()
        x[[2, 13], position] = bad
        y = OP(*inputs.args(x))
        good = [i for i in range(14) if i not in (2, 13)]
        assert bool(y[[2, 13]].isnan().all())
        assert_same_bits(y[good], clean[good])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("value_dtype", FLOAT_VALUES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_float_x_that_meets_no_block_has_no_influence(
    implementation: str, block_shape: tuple[int, int], value_dtype: torch.dtype, bad: float
) -> None:
    """And x that meets one spoils that block's outputs of that row only."""
    case = BlockSparseCase(7, 70, 150, 0.3, "bad rows")
    inputs, _ = made(case, block_shape, value_dtype, kind="normal")
    w = inputs.weights
    height, width = block_shape
    clean = OP(*inputs.args())
    stored = formats.block_mask(
        formats.block_sparse_to_dense(replace(w, values=torch.ones_like(w.values))), block_shape
    )
    for position in (0, 37, 69):
        x = inputs.x.clone()
        x[4, position] = bad
        y = OP(*inputs.args(x))
        met = torch.zeros(7, 150, dtype=torch.bool)
        met[4] = stored[:, position // width].repeat_interleave(height)[:150]
        assert not bool(y[met].isfinite().any())
        assert_same_bits(y[~met], clean[~met])


@pytest.mark.parametrize("block_shape", [(8, 1), (8, 4), (16, 16), (3, 5), (64, 64)], ids=str)
def test_neighbours_in_memory_have_no_influence(implementation: str, block_shape: tuple[int, int]) -> None:
    """Padding of blocks reads nothing past K; rows read nothing of the next."""
    for value_dtype in BLOCK_SPARSE_DTYPES:
        inputs, _ = made(BlockSparseCase(5, 70, 37, 0.8, "neighbours"), block_shape, value_dtype)
        wide = torch.full((9, 210), math.nan)
        wide[2:7, 70:140] = inputs.x
        assert_same_bits(OP(*inputs.args(wide[2:7, 70:140])), OP(*inputs.args()))
        grad = torch.randn(5, 37, generator=torch.Generator().manual_seed(2))
        wide_grad = torch.full((9, 111), math.nan)
        wide_grad[2:7, 37:74] = grad
        args = weight_args(inputs.weights)
        assert_same_bits(GRAD_INPUT(wide_grad[2:7, 37:74], *args), GRAD_INPUT(grad, *args))
        args = (*indices(inputs.weights), *block_shape)
        assert_same_bits(
            GRAD_VALUES(wide_grad[2:7, 37:74], wide[2:7, 70:140], *args), GRAD_VALUES(grad, inputs.x, *args)
        )


GUARDED = """
import ctypes, itertools
import torch
from lissom import formats, testing
from lissom.ops import block_sparse_linear as op
from lissom.ops import block_sparse_grad_input, block_sparse_grad_values
from lissom.testing import BLOCK_SHAPES, BLOCK_SPARSE_DTYPES, DTYPES, BlockSparseCase

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
maps = []

def guarded(t):
    # A copy between two pages that must not be touched; it ends, or begins, at one of them.
    page, size = 4096, t.numel() * t.element_size()
    inner = -(-max(size, 1) // page) * page
    base = libc.mmap(None, inner + 2 * page, 3, 0x22, -1, 0)
    maps.append((base, inner + 2 * page))
    assert not libc.mprotect(base, page, 0) and not libc.mprotect(base + page + inner, page, 0)
    if not size:
        return t
    start = base + page + (inner - size if len(maps) % 8 else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)

sizes = [(1, 40, 37), (3, 64, 205), (16, 33, 205), (17, 128, 24), (50, 70, 100), (2, 4, 1)]
combinations = itertools.product(BLOCK_SHAPES, (0.0, 0.5), BLOCK_SPARSE_DTYPES, sizes)
for i, (block_shape, keep, value_dtype, (m, k, n)) in enumerate(combinations):
    case = BlockSparseCase(m, k, n, keep, "")
    inputs = testing.block_sparse_inputs(case, block_shape, value_dtype, DTYPES[i // 2 % 3])
    w = inputs.weights
    packed = None if w.weight_scale is None else guarded(formats.pack_block_sparse(w))
    scale = None if w.weight_scale is None else guarded(w.weight_scale)
    values, crow, col = map(guarded, (w.values, w.crow_indices, w.col_indices))
    x, grad, bias = guarded(inputs.x), guarded(torch.randn(m, n)), guarded(inputs.bias.float())
    for isa in testing.isas():
        print(isa, block_shape, keep, value_dtype, (m, k, n), flush=True)
        with testing.force_isa(isa):
            args = (values, crow, col, n, k)
            op(x, *args, weight_scale=scale, bias=bias, packed=packed, validated=True)
            block_sparse_grad_input(grad, *args, weight_scale=scale)
            block_sparse_grad_values(grad, x, crow, col, *block_shape)
    del values, crow, col, x, grad, bias, packed, scale
    while maps:
        libc.munmap(*maps.pop(), 0)
print("all")
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.skipif(sys.platform != "linux", reason="mmap and mprotect are called as on Linux")
def test_kernels_read_nothing_outside_their_tensors(run_python: RunPython) -> None:
    """Every tensor lies against an unreadable page. The last line printed tells what crashed."""
    done = run_python(GUARDED)
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("all\n")


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(37,), (1, 37), (2, 3, 37), (2, 1, 4, 37), (0, 37), (3, 0, 37), (0, 2, 37)]
)
def test_leading_dimensions(implementation: str, shape: tuple[int, ...], value_dtype: torch.dtype) -> None:
    inputs, _ = made(BlockSparseCase(40, 37, 18, 0.5, "leading"), (8, 4), value_dtype)
    count = math.prod(shape[:-1])
    flat = inputs.x[:count]
    x = flat.reshape(shape)
    y = OP(*inputs.args(x))
    assert y.shape == (*shape[:-1], 18)
    assert y.is_contiguous()
    assert_same_bits(y.reshape(count, 18), OP(*inputs.args(flat)))
    args = weight_args(inputs.weights)
    grad_x = GRAD_INPUT(y, *args)
    assert grad_x.shape == shape
    assert grad_x.is_contiguous()
    assert_same_bits(grad_x.reshape(count, 37), GRAD_INPUT(y.reshape(count, 18), *args))
    args = (*indices(inputs.weights), 8, 4)
    assert_same_bits(GRAD_VALUES(y, x, *args), GRAD_VALUES(y.reshape(count, 18), flat, *args))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_any_strides(implementation: str, value_dtype: torch.dtype, view: str) -> None:
    for dtype in DTYPES:
        inputs, _ = made(BlockSparseCase(20, 37, 18, 0.5, "strides"), (8, 4), value_dtype, dtype)
        x = VIEWS[view](inputs.x)
        before = x.clone()
        y = OP(*inputs.args(x))
        assert_same_bits(y, OP(*inputs.args(x.contiguous())))
        assert_same_bits(x, before)
        grad = VIEWS[view](torch.randn(20, 18, generator=torch.Generator().manual_seed(3)).to(dtype))
        args = weight_args(inputs.weights)
        assert_same_bits(GRAD_INPUT(grad, *args), GRAD_INPUT(grad.contiguous(), *args))
        args = (*indices(inputs.weights), 8, 4)
        assert_same_bits(GRAD_VALUES(grad, x, *args), GRAD_VALUES(grad.contiguous(), x.contiguous(), *args))


def test_expanded_input(implementation: str) -> None:
    for value_dtype in BLOCK_SPARSE_DTYPES:
        inputs, _ = made(BlockSparseCase(20, 37, 18, 0.5, "strides"), (8, 1), value_dtype)
        for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
            assert_same_bits(OP(*inputs.args(x)), OP(*inputs.args(x.contiguous())))


def test_other_arguments_of_any_strides(implementation: str) -> None:
    for value_dtype in BLOCK_SPARSE_DTYPES:
        inputs, _ = made(BlockSparseCase(6, 37, 18, 0.5, "strides"), (8, 4), value_dtype)
        w, expected = inputs.weights, OP(*inputs.args())

        def every_second(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.stack([t, t * 0], -1)[..., 0]

        strided = {
            "values": every_second(w.values),
            "crow_indices": every_second(w.crow_indices),
            "col_indices": every_second(w.col_indices),
            "weight_scale": every_second(w.weight_scale),
            "bias": every_second(inputs.bias),
        }
        if value_dtype == torch.int8:
            strided["packed"] = every_second(formats.pack_block_sparse(w))
        for validated in (False, True):
            assert_same_bits(OP(*inputs.args(**strided, validated=validated)), expected)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_given_packed_weights(implementation: str, block_shape: tuple[int, int]) -> None:
    inputs, expected = made(BlockSparseCase(5, 90, 75, 0.4, "packed"), block_shape, torch.int8)
    packed = formats.pack_block_sparse(inputs.weights)
    for validated in (False, True):
        assert_same_bits(OP(*inputs.args(packed=packed, validated=validated)), expected)


# ------------------------------------------------------------------------------------------- the plain call


def test_plain_calls(automatic: list[bool]) -> None:
    for case in BLOCK_SPARSE_CASES[:15]:
        for block_shape, value_dtype, dtype, act_fn in combinations(case):
            inputs, expected = made(case, block_shape, value_dtype, dtype, act_fn)
            assert inputs.bias is not None
            w = inputs.weights
            packed = formats.pack_block_sparse(w) if w.weight_scale is not None else None
            options = {"bias": inputs.bias.float(), "packed": packed, "validated": True}
            check(OP(*inputs.args(**options)), inputs, expected)
            leading = OP(*inputs.args(inputs.x[:, None], **options))
            assert leading.shape == (case.m, 1, case.n)
            check(leading[:, 0], inputs, expected)
    assert automatic
    assert all(automatic)


@pytest.mark.parametrize("name", ["strided", "expanded", "bfloat16 bias", "no packed"])
def test_calls_that_are_not_plain_give_the_same(automatic: list[bool], name: str) -> None:
    inputs, _ = made(BlockSparseCase(6, 37, 18, 0.5, "not plain"), (8, 4), torch.int8)
    assert inputs.bias is not None
    options: dict[str, Any] = {"packed": formats.pack_block_sparse(inputs.weights), "validated": True}
    x = inputs.x
    if name == "strided":
        x = x.t().contiguous().t()
    elif name == "expanded":
        x = x[:1].expand(6, 37)
    elif name == "bfloat16 bias":
        options["bias"] = inputs.bias.bfloat16()
    else:
        options["packed"] = None
    y = OP(*inputs.args(x, **options))
    assert automatic == [False]
    bias = options.get("bias", inputs.bias)
    assert_same_bits(y, page.block_sparse_linear(x.clone(), inputs.weights, bias))


# ------------------------------------------------------------------------------------------- bad input

GOOD, _ = made(BlockSparseCase(2, 23, 17, 1.0, "bad input"), (4, 3), torch.float32)
GOOD8, _ = made(BlockSparseCase(2, 23, 17, 1.0, "bad input"), (4, 3), torch.int8)
QUADS8, _ = made(BlockSparseCase(2, 23, 17, 1.0, "bad input"), (4, 4), torch.int8)
CROW, COL = indices(GOOD.weights)


def changed(tensor: Tensor, place: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD: dict[str, tuple[BlockSparseInputs, dict[str, Any], type[Exception], str]] = {
    "x int": (
        GOOD,
        {"x": GOOD.x.int()},
        TypeError,
        r"x has dtype torch\.int32; use .*float16 .*x\.float\(\)",
    ),
    "x double": (GOOD, {"x": GOOD.x.double()}, TypeError, r"x has dtype torch\.float64; use torch\.float32"),
    "K": (
        GOOD,
        {"x": torch.ones(2, 24)},
        ValueError,
        r"x has shape \(2, 24\) but the weight has K=23; the last dimension of x must be 23",
    ),
    "x 0-d": (GOOD, {"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\) but the weight has K=23"),
    "values dtype": (
        GOOD,
        {"values": GOOD.weights.values.double()},
        TypeError,
        r"values must be float32, bfloat16, float16 or int8, got torch\.float64 \(40, 4, 3\)",
    ),
    "values shape": (
        GOOD,
        {"values": torch.ones(40, 12)},
        ValueError,
        r"values must have shape \[B, bh, bw\]",
    ),
    "crow": (
        GOOD,
        {"crow_indices": CROW.long()},
        ValueError,
        r"crow_indices must be int32 \[6\] for N=17 in blocks of 4 outputs, got torch\.int64",
    ),
    "col": (
        GOOD,
        {"col_indices": COL[1:]},
        ValueError,
        r"col_indices must be int32 \[40\], one per stored block",
    ),
    "out_features": (GOOD, {"out_features": 33}, ValueError, r"crow_indices must be int32 \[10\] for N=33"),
    "no scale": (
        GOOD8,
        {"weight_scale": None},
        ValueError,
        r"int8 values need a weight_scale, float32 \[17\]",
    ),
    "scale dtype": (
        GOOD8,
        {"weight_scale": torch.ones(17).half()},
        ValueError,
        r"weight_scale must be float32 \[17\], got torch\.float16",
    ),
    "scale of floats": (
        GOOD,
        {"weight_scale": torch.ones(17)},
        ValueError,
        r"weight_scale has no meaning with",
    ),
    "bias shape": (GOOD, {"bias": torch.ones(4)}, ValueError, r"bias must have shape \[17\], got \(4,\)"),
    "bias dtype": (GOOD, {"bias": torch.ones(17).int()}, TypeError, r"bias has dtype torch\.int32; use"),
    "act_fn": (GOOD, {"act_fn": "tanh"}, ValueError, r"act_fn='tanh' is unknown; use one of \('relu'"),
    "packed of floats": (
        GOOD,
        {"packed": torch.zeros(64, dtype=torch.uint8)},
        ValueError,
        r"packed has no meaning with torch\.float32 values; leave it out",
    ),
    "packed dtype": (
        GOOD8,
        {"packed": torch.zeros(64)},
        ValueError,
        r"packed must be uint8 with one dimension, got torch\.float32 \(64,\); make it with .*pack_block",
    ),
    "packed size": (
        GOOD8,
        {"packed": torch.zeros(1024, dtype=torch.uint8)},
        ValueError,
        r"packed must have 1216 bytes for this weight, got 1024; make it with .*pack_block_sparse",
    ),
    "packed size of quads": (
        QUADS8,
        {"packed": torch.zeros(64, dtype=torch.uint8)},
        ValueError,
        r"packed must have 640 bytes for this weight, got 64; make it with .*pack_block_sparse",
    ),
    "device of values": (
        GOOD,
        {"values": GOOD.weights.values.to("meta")},
        ValueError,
        r"values is on meta but the input is on cpu; move",
    ),
    "device of x": (GOOD, {"x": GOOD.x.to("meta")}, ValueError, r"values is on cpu but the input is on meta"),
    "device of bias": (
        GOOD,
        {"bias": torch.ones(17, device="meta")},
        ValueError,
        r"bias is on meta but the input is on cpu",
    ),
}

BAD_INDICES: dict[str, tuple[dict[str, Tensor], str]] = {
    "crow begins": ({"crow_indices": changed(CROW, 0, -1)}, r"crow_indices\[0\] is -1; it must be 0"),
    "crow falls": (
        {"crow_indices": changed(CROW, 2, 7)},
        r"crow_indices\[2\] is 7, below crow_indices\[1\] = 8",
    ),
    "crow past the end": (
        {"crow_indices": changed(CROW, 4, 10**6)},
        r"crow_indices\[5\] is 40, below crow_indices\[4\] = 1000000; they must not fall",
    ),
    "crow ends": (
        {"crow_indices": changed(CROW, 5, 2**31 - 1)},
        r"crow_indices\[5\] is 2147483647; the last",
    ),
    "col too large": ({"col_indices": changed(COL, 15, 8)}, r"col_indices\[15\] is 8; use 0 to 7, the block"),
    "col negative": ({"col_indices": changed(COL, 39, -1)}, r"col_indices\[39\] is -1; use 0 to 7"),
    "col twice": (
        {"col_indices": changed(COL, 10, 1)},
        r"col_indices\[10\] is 1, after 1 in the same block row",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    inputs, changes, error, text = BAD[name]
    for validated in (False, True):
        with pytest.raises(error, match=f"block_sparse_linear: {text}"):
            OP(*inputs.args(**{"validated": validated, **changes}))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_otherwise_plain_calls(automatic: list[bool], name: str) -> None:
    inputs, changes, error, text = BAD[name]
    w = inputs.weights
    packed = formats.pack_block_sparse(w) if w.weight_scale is not None else None
    for validated in (False, True):
        with pytest.raises(error, match=f"block_sparse_linear: {text}"):
            OP(*inputs.args(**{"packed": packed, "validated": validated, **changes}))
    assert not any(automatic)


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_indices_are_found(implementation: str, name: str) -> None:
    changes, text = BAD_INDICES[name]
    for inputs in (GOOD, GOOD8):
        with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
            OP(*inputs.args(**changes))
        w = replace(inputs.weights, **changes)
        with pytest.raises(ValueError, match=f"block_sparse_grad_input: {text}"):
            GRAD_INPUT(torch.ones(2, 17), *weight_args(w))
    with pytest.raises(ValueError, match=f"block_sparse_grad_values: {text}"):
        GRAD_VALUES(torch.ones(2, 17), GOOD.x, *indices(w), 4, 3)


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_indices_are_found_in_otherwise_plain_calls(automatic: list[bool], name: str) -> None:
    changes, text = BAD_INDICES[name]
    for inputs in (GOOD, GOOD8):
        packed = formats.pack_block_sparse(inputs.weights) if inputs is GOOD8 else None
        with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
            OP(*inputs.args(**changes, packed=packed))
    assert not any(automatic)


def test_unchecked_packed_indices_are_not_used(automatic: list[bool]) -> None:
    """The gathered form holds column numbers of its own: without validated=True it is not believed."""
    expected = OP(*GOOD8.args())
    packed = formats.pack_block_sparse(GOOD8.weights)
    packed[128 : 128 + 64] = 127  # where units begin
    assert_same_bits(OP(*GOOD8.args(packed=packed)), expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: GRAD_INPUT(torch.ones(2, 16), *weight_args(GOOD.weights)),
            ValueError,
            r"grad_input: grad has shape \(2, 16\) but the weight has N=17; the last dimension of grad must",
        ),
        (
            lambda: GRAD_INPUT(torch.ones(2, 17).double(), *weight_args(GOOD.weights)),
            TypeError,
            r"grad_input: grad has dtype torch\.float64; use torch\.float32",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(3, 23), CROW, COL, 4, 3),
            ValueError,
            r"grad_values: grad \(2, 17\) and x \(3, 23\) must be \[\.\.\., N\] and \[\.\.\., K\] with the",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(2, 23).int(), CROW, COL, 4, 3),
            TypeError,
            r"grad_values: x has dtype torch\.int32",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(2, 23), CROW, COL, 0, 3),
            ValueError,
            r"grad_values: block_shape=\(0, 3\) cannot be; both sizes must be at least 1",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(2, 23), CROW, COL, 8, 3),
            ValueError,
            r"grad_values: crow_indices must be int32 \[4\] for N=17 in blocks of 8 outputs",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(2, 23), CROW, COL[0], 4, 3),
            ValueError,
            r"grad_values: col_indices must be int32 \[0\], one per stored block, got torch.int32 \(\)",
        ),
        (
            lambda: GRAD_VALUES(torch.ones(2, 17), torch.ones(2, 23), CROW.to("meta"), COL, 4, 3),
            ValueError,
            r"grad_values: crow_indices is on meta but the input is on cpu",
        ),
    ],
)
def test_bad_input_of_gradients(implementation: str, call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"block_sparse_{text}"):
        call()


def test_k_that_could_overflow(implementation: str) -> None:
    k = formats.INT8_MAX_IN_FEATURES + 1
    case = BlockSparseCase(1, k, 1, 1.0, "")
    inputs = block_sparse_inputs(case, (1, 64), torch.int8, bias=False)
    text = rf"K={k} could overflow the int32 sum; at most {k - 1} is exact; split the layer or use float"
    for validated in (False, True):
        with pytest.raises(ValueError, match=text):
            OP(*inputs.args(packed=formats.pack_block_sparse(inputs.weights), validated=validated))
    ones = BlockSparseInputs(torch.ones(1, k), block_sparse_weights(case, (1, 64)), None, None)
    assert OP(*ones.args()).shape == (1, 1)


def test_unknown_backend() -> None:
    text = r"backend='cuda' does not exist for device 'cpu'; use one of: 'native', 'reference'"
    w = GOOD.weights
    with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
        block_sparse_linear(GOOD.x, w.values, CROW, COL, 17, 23, backend="cuda")
    with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
        block_sparse_grad_input(torch.ones(2, 17), w.values, CROW, COL, 17, 23, backend="cuda")
    with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
        block_sparse_grad_values(torch.ones(2, 17), GOOD.x, CROW, COL, 4, 3, backend="cuda")


# ------------------------------------------------------------------------------------------- the backend


@pytest.mark.usefixtures("needs_native")
def test_the_native_kernels_are_the_choice() -> None:
    assert testing.backends("block_sparse_linear")[:2] == ["native", "reference"]
    assert testing.backends("block_sparse_linear", "cuda")[-1] == "reference"


def test_backend_argument_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    spied = [
        replace(b, run=lambda *args, _b=b: (ran.append(_b.name), _b.run(*args))[1])
        for b in registry._candidates["block_sparse_linear", "cpu"]
    ]
    monkeypatch.setitem(registry._candidates, ("block_sparse_linear", "cpu"), spied)
    monkeypatch.setattr(registry, "_automatic", {})
    usable = [b.name for b in spied if not b.unavailable()]
    args = (GOOD.x, GOOD.weights.values, CROW, COL, 17, 23)
    for name in usable:
        block_sparse_linear(*args, backend=name)
        monkeypatch.setenv("LISSOM_BACKEND", name)
        block_sparse_linear(*args)
        block_sparse_linear(*args, backend="reference")  # the argument wins
        monkeypatch.delenv("LISSOM_BACKEND")
        assert ran == [name, name, "reference"]
        ran.clear()
    if "LISSOM_BACKEND" not in os.environ:
        strided = GOOD.x.t().contiguous().t()  # not a plain call, which goes past the registry
        block_sparse_linear(strided, *args[1:])
        assert ran == usable[:1]


@pytest.mark.usefixtures("needs_native")
def test_the_gradients_run_where_the_op_does(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    module = _native.load()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(module, name)

    monkeypatch.setattr(_native, "load", Spy)
    for backend, expected in (("native", 1), ("reference", 0)):
        called.clear()
        args = (torch.ones(2, 17), *weight_args(GOOD.weights)[:-1])
        block_sparse_grad_input(*args, backend=backend)
        block_sparse_grad_values(torch.ones(2, 17), GOOD.x, CROW, COL, 4, 3, backend=backend)
        assert called.count("block_sparse_grad_input") == expected
        assert called.count("block_sparse_grad_values") == expected


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("case", BLOCK_SPARSE_CASES, ids=str)
def test_gradient_ops(implementation: str, case: BlockSparseCase) -> None:
    """grad · W and gradᵀ · x at the stored blocks, within the bound of float32 sums."""
    for i, (block_shape, value_dtype, dtype, _) in enumerate(combinations(case)):
        torch.set_num_threads(1 + i % 2)
        inputs, _ = made(case, block_shape, value_dtype, dtype, kind="normal")
        w, x = inputs.weights, inputs.x
        generator = torch.Generator().manual_seed(case.m)
        grad = torch.randn(case.m, case.n, generator=generator).to(DTYPES[i % 3])
        where = f"{block_shape} {value_dtype} {dtype} {grad.dtype}"

        weight = formats.block_sparse_to_dense(w).double()
        grad_x = GRAD_INPUT(grad, *weight_args(w))
        assert grad_x.dtype == grad.dtype
        exact = grad.double() @ weight
        met = int((weight != 0).sum(0).max()) if weight.numel() else 0
        bound = sum_bound(grad, weight, met)
        try:
            assert_within(grad_x, exact, bound + float_tolerance(exact.abs() + bound, grad.dtype))
        except AssertionError as error:
            raise AssertionError(f"grad_input {where}: {error}") from error

        grad_values = GRAD_VALUES(grad, x, *indices(w), *block_shape)
        assert grad_values.dtype == torch.float32
        assert grad_values.shape == w.values.shape
        # The same blocks of the exact product; the record's own check says that padding is zero.
        places = replace(w, values=grad_values, weight_scale=None)
        formats.check_block_sparse(places)
        stored = formats.block_sparse_to_dense(replace(places, values=torch.ones_like(grad_values))).bool()
        exact = torch.where(stored, grad.double().t() @ x.double(), 0.0)
        bound = torch.where(stored, sum_bound(grad.t(), x, case.m), 0.0)
        try:
            assert_within(formats.block_sparse_to_dense(places), exact, bound)
        except AssertionError as error:
            raise AssertionError(f"grad_values {where}: {error}") from error


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_gradients_of_nan_stay_in_their_blocks(implementation: str, block_shape: tuple[int, int]) -> None:
    inputs, _ = made(BlockSparseCase(20, 70, 75, 0.3, "nan"), block_shape, kind="normal")
    w, x = inputs.weights, inputs.x.clone()
    grad = torch.randn(20, 75)
    ones = replace(w, values=torch.ones_like(w.values))
    stored = formats.block_mask(formats.block_sparse_to_dense(ones), block_shape)
    clean_x = GRAD_INPUT(grad, *weight_args(w))
    clean_values = GRAD_VALUES(grad, x, *indices(w), *block_shape)
    grad[3, 74], x[11, 69] = math.nan, math.nan
    grad_x = GRAD_INPUT(grad, *weight_args(w))
    met = torch.zeros(20, 70, dtype=torch.bool)
    met[3] = stored[74 // block_shape[0]].repeat_interleave(block_shape[1])[:70]
    assert bool(grad_x[met].isnan().all())
    assert_same_bits(grad_x[~met], clean_x[~met])
    grad_values = GRAD_VALUES(grad, x, *indices(w), *block_shape)
    formats.check_block_sparse(replace(w, values=grad_values))
    touched = torch.zeros(75, 70, dtype=torch.bool)
    touched[74], touched[:, 69] = True, True
    dense, clean = (formats.block_sparse_to_dense(replace(w, values=v)) for v in (grad_values, clean_values))
    assert bool(dense[touched & formats.block_sparse_to_dense(ones).bool()].isnan().all())
    assert_same_bits(dense[~touched], clean[~touched])


@pytest.mark.parametrize("leading", [(7,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_gradients(
    implementation: str, value_dtype: torch.dtype, act_fn: str | None, leading: tuple[int, ...]
) -> None:
    """With g = dL/dy · act'(z): dL/dx = g W, dL/dW = gᵀ x at the stored blocks, dL/db = Σ g."""
    m = math.prod(leading)
    for dtype, block_shape in zip(DTYPES, FEW_SHAPES[1:], strict=True):
        inputs, _ = made(
            BlockSparseCase(7, 29, 18, 0.6, "gradients"), block_shape, value_dtype, dtype, kind="normal"
        )
        assert inputs.bias is not None
        w = inputs.weights
        x = inputs.x[:m].reshape(*leading, 29).clone().requires_grad_()
        bias = inputs.bias.clone().requires_grad_()
        values = w.values.clone()
        wanted = [x, bias]
        if value_dtype != torch.int8:
            wanted.append(values.requires_grad_())
        y = OP(*inputs.args(x, bias=bias, values=values, act_fn=act_fn))
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        grad_x, grad_bias, *grad_values = torch.autograd.grad(y, wanted, grad)
        assert (grad_x.dtype, grad_bias.dtype) == (dtype, dtype)

        z = OP(*inputs.args(x.detach())).double().requires_grad_()
        (grad_z,) = torch.autograd.grad(EXACT_ACT_FNS[act_fn](z), z, grad.double())
        grad_z, rows = grad_z.reshape(m, 18), x.detach().double().reshape(m, 29)
        weight = formats.block_sparse_to_dense(w).double()
        tolerance = 4 * GRAD_TOLERANCE[dtype]
        largest = grad_z.abs().max() if m else torch.tensor(0.0)
        assert_within(
            grad_x.reshape(m, 29), grad_z @ weight, (tolerance * largest * weight.abs().sum(0)).expand(m, 29)
        )
        assert_within(grad_bias, grad_z.sum(0), (tolerance * max(m, 1) * largest).expand(18))
        if grad_values:
            assert grad_values[0].dtype == value_dtype
            places = replace(w, values=grad_values[0])
            formats.check_block_sparse(places)
            ones = replace(w, values=torch.ones_like(w.values))
            exact = grad_z.t() @ rows * formats.block_sparse_to_dense(ones)
            bound = tolerance * largest * rows.abs().sum(0) + float_tolerance(exact, value_dtype) * 2
            assert_within(formats.block_sparse_to_dense(places), exact, bound)


def test_gradient_only_where_asked(implementation: str) -> None:
    inputs, _ = made(BlockSparseCase(5, 29, 18, 0.6, "asked"), (8, 1), act_fn="gelu")
    assert not OP(*inputs.args()).requires_grad
    given = {"x": inputs.x, "bias": inputs.bias, "values": inputs.weights.values}
    for name, tensor in given.items():
        assert tensor is not None
        leaf = tensor.clone().requires_grad_()
        OP(*inputs.args(**{name: leaf})).square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert bool(leaf.grad.any())


def test_gradient_of_an_expanded_gradient(implementation: str) -> None:
    """``sum().backward()`` hands down a gradient of stride 0."""
    inputs, _ = made(BlockSparseCase(5, 29, 18, 0.6, "expanded"), (8, 4), kind="normal")
    grads = []
    for reduce in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        x, values = inputs.x.clone().requires_grad_(), inputs.weights.values.clone().requires_grad_()
        reduce(OP(*inputs.args(x, values=values))).backward()
        grads.append((x.grad, values.grad))
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        assert_same_bits(one, other)


@pytest.mark.parametrize("block_shape", [(8, 1), (3, 5)], ids=str)
def test_second_derivatives(implementation: str, block_shape: tuple[int, int]) -> None:
    """The gradients' own gradients, against those of the dense product in float64."""
    inputs, _ = made(BlockSparseCase(6, 29, 18, 0.6, "second"), block_shape, kind="normal")
    w = inputs.weights

    def penalty(y: Tensor, x: Tensor, values: Tensor) -> Tensor:
        grads = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sum()

    x, values = inputs.x.clone().requires_grad_(), w.values.clone().requires_grad_()
    actual = torch.autograd.grad(penalty(OP(*inputs.args(x, values=values)), x, values), (x, values))
    x, values = inputs.x.double().requires_grad_(), w.values.double().requires_grad_()
    assert inputs.bias is not None
    dense = formats.block_sparse_to_dense(replace(w, values=values))
    y = x @ dense.t() + inputs.bias.double()
    expected = torch.autograd.grad(penalty(y, x, values), (x, values))
    for a, e in zip(actual, expected, strict=True):
        assert_within(a, e, (100 * GRAD_TOLERANCE[torch.float32] * e.abs().max()).expand(e.shape))


def test_second_derivative_with_int8_values(implementation: str) -> None:
    inputs, _ = made(BlockSparseCase(6, 29, 18, 0.6, "second"), (8, 4), torch.int8, kind="normal")
    grad = torch.randn(6, 18, requires_grad=True)
    h = torch.randn(6, 29)
    (actual,) = torch.autograd.grad(GRAD_INPUT(grad, *weight_args(inputs.weights)), grad, h)
    weight = formats.block_sparse_to_dense(inputs.weights)
    bound = sum_bound(h, weight.t(), 29)
    assert_within(actual, h.double() @ weight.double().t(), bound + 1e-6)


# ------------------------------------------------------------------------------------------- torch's modes


def test_inference_mode_and_autocast(implementation: str) -> None:
    inputs, expected = made(BlockSparseCase(5, 29, 18, 0.6, "modes"), (8, 4), torch.int8)
    with torch.inference_mode():
        y = OP(*inputs.args())
        assert y.is_inference()
        assert_same_bits(y, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(OP(*inputs.args()), expected)


def test_functional_forms_are_the_ops(implementation: str) -> None:
    inputs, expected = made(
        BlockSparseCase(5, 29, 18, 0.6, "modes"), (8, 4), torch.int8, torch.float32, "relu"
    )
    w = inputs.weights
    args = (w.values, *indices(w), 18, 29)
    y = block_sparse_linear(
        inputs.x,
        *args,
        weight_scale=w.weight_scale,
        bias=inputs.bias,
        act_fn="relu",
        packed=formats.pack_block_sparse(w),
        validated=True,
    )
    assert_same_bits(y, expected)
    grad_x = block_sparse_grad_input(y, *args, weight_scale=w.weight_scale, validated=True)
    assert_same_bits(grad_x, GRAD_INPUT(y, *args, w.weight_scale))
    grad_values = block_sparse_grad_values(y, inputs.x, *indices(w), 8, 4, validated=True)
    assert_same_bits(grad_values, GRAD_VALUES(y, inputs.x, *indices(w), 8, 4))
