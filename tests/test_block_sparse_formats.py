"""Block-sparse weights: dense and torch's layouts to ours and back, checks, int8, the packed bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import formats
from lissom.formats import BlockSparseWeights
from lissom.testing import (
    BLOCK_SHAPES,
    BLOCK_SPARSE_CASES,
    BLOCK_SPARSE_DTYPES,
    BlockSparseCase,
    assert_same_bits,
    block_sparse_weights,
)

CASES = [case for case in BLOCK_SPARSE_CASES if case.n * case.k < 30000]
CASE = BlockSparseCase(0, 23, 17, 0.5, "divides by nothing")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")


def same(actual: BlockSparseWeights, expected: BlockSparseWeights) -> None:
    assert_same_bits(actual.values, expected.values)
    assert_same_bits(actual.crow_indices, expected.crow_indices)
    assert_same_bits(actual.col_indices, expected.col_indices)
    assert (actual.weight_scale is None) == (expected.weight_scale is None)
    if actual.weight_scale is not None and expected.weight_scale is not None:
        assert_same_bits(actual.weight_scale, expected.weight_scale)
    assert (actual.out_features, actual.in_features) == (expected.out_features, expected.in_features)


def elements(mask: Tensor, n: int, k: int, block_shape: tuple[int, int]) -> Tensor:
    """A mask of blocks as one of elements."""
    height, width = block_shape
    return mask.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]


def random_mask(n: int, k: int, block_shape: tuple[int, int], keep: float = 0.4) -> Tensor:
    return torch.rand(-(-n // block_shape[0]), -(-k // block_shape[1])) < keep


# ------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("dtype", BLOCK_SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_dense_and_back(block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    height, width = block_shape
    for case in CASES:
        n, k = case.n, case.k
        weight = torch.randn(n, k, dtype=dtype if dtype.is_floating_point else torch.float32)
        mask = random_mask(n, k, block_shape)
        w = formats.block_sparse_from_dense(weight, mask, block_shape, dtype)
        formats.check_block_sparse(w)
        assert (w.block_shape, w.block_rows, w.block_columns) == (block_shape, *mask.shape)
        assert w.values.dtype == dtype
        assert w.values.is_contiguous()
        assert len(w.values) == int(mask.sum())
        kept = elements(mask, n, k, block_shape)
        if dtype == torch.int8:
            q, scale = formats.quantize_int8(weight * kept)
            assert w.weight_scale is not None
            assert_same_bits(w.weight_scale, scale)
            expected = formats.dequantize_int8(q, scale)
        else:
            expected = torch.where(kept, weight, 0.0)
        assert_same_bits(formats.block_sparse_to_dense(w), expected)
        assert_same_bits(formats.block_sparse_to_dense(w, torch.float16), expected.to(torch.float16))
        assert w.density == pytest.approx(float(kept.float().mean()) if n * k else 0.0)
        for i, (r, c) in enumerate(mask.nonzero().tolist()[:3]):
            assert int(w.crow_indices[r]) <= i < int(w.crow_indices[r + 1])
            assert int(w.col_indices[i]) == c
            assert w.values[i].shape == (height, width)


def test_dense_weights_of_any_strides_and_dtype() -> None:
    weight, mask = torch.randn(17, 23), random_mask(17, 23, (4, 3))
    expected = formats.block_sparse_from_dense(weight, mask, (4, 3))
    same(formats.block_sparse_from_dense(weight.t().contiguous().t(), mask, (4, 3)), expected)
    same(formats.block_sparse_from_dense(weight.double(), mask, (4, 3)), expected)
    same(formats.block_sparse_from_dense(weight.requires_grad_(), mask, (4, 3)), expected)
    half = formats.block_sparse_from_dense(weight.half(), mask, (4, 3))
    assert half.values.dtype == torch.float32
    assert not expected.values.requires_grad


def test_float16_holds_what_rounds_to_65504_and_looks_at_kept_blocks_only() -> None:
    weight, mask = torch.full((4, 6), 65519.0), torch.ones(2, 2, dtype=torch.bool)
    w = formats.block_sparse_from_dense(weight, mask, (2, 3), torch.float16)
    assert bool((w.values == 65504).all())
    weight[3, 4], mask[1, 1] = 65520.0, False
    formats.block_sparse_from_dense(weight, mask, (2, 3), torch.float16)
    with pytest.raises(ValueError, match="weight holds 65520, and float16 values"):
        formats.block_sparse_from_dense(weight, ~mask, (2, 3), torch.float16)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_block_mask_keeps_a_block_that_holds_anything(block_shape: tuple[int, int]) -> None:
    for case in CASES:
        mask = random_mask(case.n, case.k, block_shape)
        kept = elements(mask, case.n, case.k, block_shape)
        assert_same_bits(formats.block_mask(kept, block_shape), mask)
    weight = torch.zeros(17, 23)
    weight[16, 22], weight[0, 5] = math.nan, -1e-30
    height, width = block_shape
    found = formats.block_mask(weight, block_shape).nonzero().tolist()
    assert found == sorted([r, c] for r, c in {(16 // height, 22 // width), (0, 5 // width)})


@pytest.mark.parametrize("block_shape", [(8, 1), (7, 3), (16, 16)], ids=str)
def test_nothing_but_values_is_as_large_as_the_weight(block_shape: tuple[int, int]) -> None:
    """To dense: one dense tensor beside what is stored; from dense: none at all."""
    n, k = 1030, 1031
    weight, mask = torch.randn(n, k), random_mask(n, k, block_shape, keep=0.05)

    def peak(function: Callable[[], object]) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        live = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        return highest

    dense = 4 * n * k
    assert peak(weight.clone) >= dense
    w = formats.block_sparse_from_dense(weight, mask, block_shape)
    assert peak(lambda: formats.block_sparse_from_dense(weight, mask, block_shape)) < 0.5 * dense
    assert peak(lambda: formats.block_sparse_to_dense(w)) < 1.5 * dense


# ------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_torch_and_back(block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    height, width = block_shape
    for case in (*CASES, BlockSparseCase(0, 4 * width, 3 * height, 0.5, "whole blocks")):
        w = block_sparse_weights(case, block_shape, dtype)
        dense = formats.block_sparse_to_dense(w)
        csr = formats.block_sparse_to_torch(w, torch.sparse_csr)
        torch._validate_sparse_csr_tensor_args(csr.crow_indices(), csr.col_indices(), csr.values(), csr.shape)
        assert csr.values().numel() == round(w.density * case.n * case.k)
        assert_same_bits(csr.to_dense(), dense)
        same(formats.block_sparse_from_torch(csr, block_shape), w)
        single = formats.block_sparse_from_torch(csr)
        assert single.block_shape == (1, 1)
        assert_same_bits(formats.block_sparse_to_dense(single), dense)
        if case.n % height or case.k % width:
            text = rf"block_sparse_to_torch: torch.sparse_bsr needs .*\({height}, {width}\) does not divide "
            with pytest.raises(
                ValueError, match=text + rf"\({case.n}, {case.k}\); use layout=torch.sparse_csr"
            ):
                formats.block_sparse_to_torch(w)
        elif case.n * case.k:
            bsr = formats.block_sparse_to_torch(w)
            assert bsr.layout == torch.sparse_bsr
            assert_same_bits(bsr.to_dense(), dense)
            same(formats.block_sparse_from_torch(bsr), w)
            same(formats.block_sparse_from_torch(bsr, block_shape), w)
            other = formats.block_sparse_from_torch(bsr, (5, 2))
            assert other.block_shape == (5, 2)
            assert_same_bits(formats.block_sparse_to_dense(other), dense)


def test_torchs_own_tensors() -> None:
    """What ``to_sparse_*`` makes: int64 indices, values of any strides, float16."""
    dense = torch.where(torch.rand(24, 12) < 0.2, torch.randn(24, 12), 0.0)
    for tensor in (dense.to_sparse_bsr((8, 4)), dense.to_sparse_csr()):
        assert_same_bits(formats.block_sparse_to_dense(formats.block_sparse_from_torch(tensor)), dense)
    half = formats.block_sparse_from_torch(dense.half().to_sparse_bsr((2, 3)))
    assert_same_bits(formats.block_sparse_to_dense(half), dense.half())


def test_int8_goes_to_torch_dequantized() -> None:
    w = block_sparse_weights(BlockSparseCase(0, 24, 16, 0.5, ""), (8, 4), torch.int8)
    for layout in (torch.sparse_bsr, torch.sparse_csr):
        tensor = formats.block_sparse_to_torch(w, layout)
        assert tensor.dtype == torch.float32
        assert_same_bits(tensor.to_dense(), formats.block_sparse_to_dense(w))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: formats.block_sparse_from_torch(torch.eye(4)), TypeError, r"layout torch.strided cannot be"),
        (
            lambda: formats.block_sparse_from_torch(torch.eye(4).to_sparse()),
            TypeError,
            r"layout torch.sparse_coo cannot be read; use tensor.to_sparse_bsr\(block_shape\) or",
        ),
        (
            lambda: formats.block_sparse_from_torch(torch.eye(4).double().to_sparse_csr()),
            TypeError,
            r"dtype torch.float64 cannot be read; use torch.float32, .* \(for example tensor.float\(\)\)",
        ),
        (
            lambda: formats.block_sparse_from_torch(torch.ones(2, 4, 4).to_sparse_bsr((2, 2))),
            ValueError,
            r"needs a single matrix \[N, K\], got shape \(2, 4, 4\)",
        ),
        (
            lambda: formats.block_sparse_from_torch(torch.eye(4).to_sparse_csr(), (0, 2)),
            ValueError,
            r"block_shape=\(0, 2\) cannot be; both sizes must be at least 1",
        ),
        (
            lambda: formats.block_sparse_to_torch(block_sparse_weights(CASE, (8, 1)), torch.sparse_coo),
            ValueError,
            r"layout=torch.sparse_coo cannot be made; use torch.sparse_bsr or torch.sparse_csr",
        ),
    ],
)
def test_what_torch_tensors_cannot_be(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"block_sparse_(from|to)_torch: {text}"):
        call()


# ------------------------------------------------------------------------------------------- int8


def test_quantize_uses_stored_values_only_and_says_what_is_bad() -> None:
    weight = torch.randn(16, 12)
    weight[3, 0] = 1000.0  # in a block that is not stored
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = False
    w = formats.block_sparse_from_dense(weight, mask, (8, 4), torch.int8)
    assert w.weight_scale is not None
    assert_same_bits(w.weight_scale[3], formats.quantize_int8(weight[3:4, 4:])[1][0])
    q = formats.quantize_block_sparse(formats.block_sparse_from_dense(weight, mask, (8, 4)))
    same(q, w)
    weight[9, 5] = math.nan
    with pytest.raises(
        ValueError, match=r"quantize_block_sparse: weight row 9 holds NaN or infinity; repair"
    ):
        formats.block_sparse_from_dense(weight, mask, (8, 4), torch.int8)
    with pytest.raises(ValueError, match="quantize_block_sparse: the values are int8 already"):
        formats.quantize_block_sparse(w)
    with pytest.raises(ValueError, match=r"dequantize_block_sparse: the values are torch.float32; only int8"):
        formats.dequantize_block_sparse(formats.block_sparse_from_dense(weight, mask, (8, 4)))


def drawn(w: BlockSparseWeights) -> list[int]:
    """The packed bytes, one by one, as the drawing in ``_block_sparse_formats.py`` says."""
    _, height, width = w.values.shape
    values, crow, col = w.values.tolist(), w.crow_indices.tolist(), w.col_indices.tolist()
    packed: list[int] = []

    def region(parts: list[bytes]) -> None:
        packed.extend(b"".join(parts))
        packed.extend([0] * (-len(packed) % 64))

    def int32(value: int) -> bytes:
        return value.to_bytes(4, "little", signed=True)

    def int8(value: int) -> bytes:
        return value.to_bytes(1, "little", signed=True)

    assert sys.byteorder == "little"
    rows = range(len(crow) - 1)
    region(
        [
            int32(-128 * sum(sum(values[b][i]) for b in range(crow[r], crow[r + 1])))
            for r in rows
            for i in range(height)
        ]
    )
    if width % 4 == 0:
        region(
            [
                int8(block[i][4 * u + j])
                for block in values
                for u in range(width // 4)
                for i in range(height)
                for j in range(4)
            ]
        )
        return packed
    offsets, ks, units = [0], [], []
    for r in rows:
        columns = [(col[b] * width + c, b, c) for b in range(crow[r], crow[r + 1]) for c in range(width)]
        for first in range(0, len(columns), 4):
            unit = columns[first : first + 4]
            ks += [k for k, _, _ in unit] + [columns[-1][0]] * (4 - len(unit))
            for i in range(height):
                units += [values[b][i][c] for _, b, c in unit] + [0] * (4 - len(unit))
        offsets.append(len(ks) // 4)
    region([int32(o) for o in offsets])
    region([int32(k) for k in ks])
    region([int8(q) for q in units])
    return packed


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_packed_layout_is_the_one_drawn(block_shape: tuple[int, int]) -> None:
    shapes = (
        (17, 23, 0.5),
        (64, 64, 0.3),
        (8, 130, 1.0),
        (70, 9, 0.0),
        (130, 66, None),
        (0, 5, 1.0),
        (5, 0, 1.0),
    )
    for n, k, keep in shapes:
        w = block_sparse_weights(BlockSparseCase(0, k, n, keep, ""), block_shape, torch.int8)
        packed = formats.pack_block_sparse(w)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == drawn(w)
        assert formats.packed_block_sparse_bytes(w) == len(packed)


def test_only_int8_is_packed() -> None:
    with pytest.raises(ValueError, match=r"pack_block_sparse: values must be int8, got torch.float32; float"):
        formats.pack_block_sparse(block_sparse_weights(CASE, (8, 1)))


# ------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_sound_weights_pass(block_shape: tuple[int, int]) -> None:
    for case in BLOCK_SPARSE_CASES:
        for dtype in BLOCK_SPARSE_DTYPES:
            formats.check_block_sparse(block_sparse_weights(case, block_shape, dtype))


FULL = block_sparse_weights(BlockSparseCase(0, 23, 17, 1.0, ""), (4, 3))
"""5 × 8 blocks, all stored; the last row of blocks has one output, the last column two inputs."""

FULL8 = block_sparse_weights(BlockSparseCase(0, 23, 17, 1.0, ""), (4, 3), torch.int8)


def changed(tensor: Tensor | None, place: tuple[int, ...] | int, value: float) -> Tensor:
    assert tensor is not None
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def swapped(tensor: Tensor, i: int, j: int) -> Tensor:
    tensor = tensor.clone()
    tensor[[i, j]] = tensor[[j, i]]
    return tensor


BAD: dict[str, tuple[BlockSparseWeights, dict[str, Any], type[Exception], str]] = {
    "sizes": (FULL, {"in_features": -1}, ValueError, r"out_features=17, in_features=-1 cannot be"),
    "values dtype": (
        FULL,
        {"values": FULL.values.double()},
        TypeError,
        r"values must be float32, bfloat16, float16 or int8, got torch.float64 \(40, 4, 3\); convert",
    ),
    "values shape": (
        FULL,
        {"values": FULL.values.flatten(1)},
        ValueError,
        r"values must have shape \[B, bh, bw\] .*got torch.float32 \(40, 12\)",
    ),
    "no block": (
        FULL,
        {"values": torch.zeros(40, 4, 0)},
        ValueError,
        r"block_shape=\(4, 0\) cannot be; both sizes must be at least 1, as in \(8, 1\)",
    ),
    "crow dtype": (
        FULL,
        {"crow_indices": FULL.crow_indices.long()},
        ValueError,
        r"crow_indices must be int32 \[6\] for N=17 in blocks of 4 outputs, got torch.int64 \(6,\)",
    ),
    "crow length": (FULL, {"out_features": 21}, ValueError, r"crow_indices must be int32 \[7\] for N=21"),
    "col length": (
        FULL,
        {"col_indices": FULL.col_indices[1:]},
        ValueError,
        r"col_indices must be int32 \[40\], one per stored block, got torch.int32 \(39,\)",
    ),
    "no scale": (
        FULL8,
        {"weight_scale": None},
        ValueError,
        r"int8 values need a weight_scale, float32 \[17\]",
    ),
    "scale shape": (
        FULL8,
        {"weight_scale": torch.ones(20)},
        ValueError,
        r"weight_scale must be float32 \[17\], got torch.float32 \(20,\)",
    ),
    "scale of floats": (
        FULL,
        {"weight_scale": torch.ones(17)},
        ValueError,
        r"weight_scale has no meaning with torch.float32 values, only with int8; leave it out",
    ),
    "crow begins": (
        FULL,
        {"crow_indices": changed(FULL.crow_indices, 0, 1)},
        ValueError,
        r"crow_indices\[0\] is 1; it must be 0",
    ),
    "crow falls": (
        FULL,
        {"crow_indices": changed(FULL.crow_indices, 2, 7)},
        ValueError,
        r"crow_indices\[2\] is 7, below crow_indices\[1\] = 8; they must not fall",
    ),
    "crow ends": (
        FULL,
        {"crow_indices": changed(FULL.crow_indices, 5, 41)},
        ValueError,
        r"crow_indices\[5\] is 41; the last one must be the number of stored blocks, 40",
    ),
    "col too large": (
        FULL,
        {"col_indices": changed(FULL.col_indices, 15, 8)},
        ValueError,
        r"col_indices\[15\] is 8; use 0 to 7, the block columns of K=23 in blocks of 3 inputs",
    ),
    "col negative": (
        FULL,
        {"col_indices": changed(FULL.col_indices, 39, -1)},
        ValueError,
        r"col_indices\[39\] is -1;",
    ),
    "col twice": (
        FULL,
        {"col_indices": changed(FULL.col_indices, 10, 1)},
        ValueError,
        r"col_indices\[10\] is 1, after 1 in the same block row; they must increase: sort",
    ),
    "col order": (
        FULL,
        {"col_indices": swapped(FULL.col_indices, 38, 39)},
        ValueError,
        r"col_indices\[39\] is 6, after 7 in the same block row",
    ),
    "padding below": (
        FULL,
        {"values": changed(FULL.values, (35, 2, 1), 0.5)},
        ValueError,
        r"values\[35, 2, 1\] is 0.5, past N=17; values outside the weight must be 0: was it made for another",
    ),
    "padding at the right": (
        FULL,
        {"values": changed(FULL.values, (15, 3, 2), math.nan)},
        ValueError,
        r"values\[15, 3, 2\] is nan, past K=23",
    ),
    "scale nan": (
        FULL8,
        {"weight_scale": changed(FULL8.weight_scale, 16, math.nan)},
        ValueError,
        r"weight_scale\[16\] is nan; scales must be finite and not negative: repair the checkpoint",
    ),
    "scale negative": (
        FULL8,
        {"weight_scale": changed(FULL8.weight_scale, 2, -1.0)},
        ValueError,
        r"weight_scale\[2\] is -1.0; scales must be finite",
    ),
    "-128": (
        FULL8,
        {"values": changed(FULL8.values, (7, 0, 1), -128)},
        ValueError,
        r"values\[7, 0, 1\] is -128; int8 values must lie in \[-127, 127\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unsound_weights_are_refused(name: str) -> None:
    weights, changes, error, text = BAD[name]
    formats.check_block_sparse(weights)
    with pytest.raises(error, match=f"^Here: {text}"):
        formats.check_block_sparse(replace(weights, **changes), "Here")


def test_a_weight_without_inputs_or_outputs_has_no_blocks() -> None:
    stored = replace(FULL, in_features=0)
    with pytest.raises(ValueError, match=r"col_indices\[0\] is 0; K=0 has no block columns"):
        formats.check_block_sparse(stored)
    with pytest.raises(ValueError, match=r"crow_indices\[0\] is 3; it must be 0"):
        formats.check_block_sparse(replace(FULL, out_features=0, crow_indices=torch.tensor([3]).int()))


def test_more_blocks_than_indices_can_count() -> None:
    many = torch.zeros(1, 1, 1).expand(2**31, 1, 1)
    w = BlockSparseWeights(
        many, torch.zeros(2).int(), torch.zeros(1).int(), out_features=1, in_features=2**31
    )
    text = f"{2**31} blocks are more than int32 indices can count .*; use larger blocks"
    with pytest.raises(ValueError, match=text):
        formats.check_block_sparse_shapes(w)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": torch.float64}, TypeError, r"dtype=torch.float64 cannot be; use torch.float32, torch.bf"),
        (
            {"dtype": torch.float16, "weight": torch.full((17, 23), -7e4)},
            ValueError,
            "weight holds -70000, and float16 values must be finite and at most 65504; use bfloat16 or float",
        ),
        (
            {"dtype": torch.float16, "weight": torch.full((17, 23), math.nan).half()},
            ValueError,
            r"weight holds nan, and float16 values must be finite",
        ),
        (
            {"weight": torch.ones(17, 23).int()},
            ValueError,
            r"weight must be floating point \[N, K\], got torch.int32",
        ),
        ({"weight": torch.ones(17)}, ValueError, r"weight must be floating point \[N, K\], got .*\(17,\)"),
        (
            {"mask": torch.ones(17, 23, dtype=torch.bool)},
            ValueError,
            r"mask must be bool \(5, 8\), one per block of \(4, 3\) of the weight \(17, 23\), got torch.bool "
            r"\(17, 23\); make it from a mask of elements with lissom.formats.block_mask",
        ),
        ({"mask": torch.ones(5, 8)}, ValueError, r"mask must be bool \(5, 8\).*got torch.float32"),
        ({"block_shape": (4, 0)}, ValueError, r"block_shape=\(4, 0\) cannot be"),
    ],
    ids=str,
)
def test_bad_input_from_dense(options: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {
        "weight": torch.ones(17, 23),
        "mask": torch.ones(5, 8, dtype=torch.bool),
        "block_shape": (4, 3),
        **options,
    }
    with pytest.raises(error, match=f"^block_sparse_from_dense: {text}"):
        formats.block_sparse_from_dense(**given)
