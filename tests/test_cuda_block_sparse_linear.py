"""The CUDA kernels of ``block_sparse_linear``, on a GPU or in the emulator.

int8 values: the reference's bits. 16-bit floats: within the bound of float32 sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cuda_emulator.build as cuda_emulator
import pytest
import torch
from torch import Tensor

from lissom import _cuda, _triton, formats
from lissom._block_sparse_pieces import PIECE, cut, slots
from lissom.formats import BlockSparseWeights
from lissom.ops import block_sparse_linear
from lissom.ops.block_sparse_linear import LEAST_HEIGHT
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    BLOCK_SPARSE_CASES,
    DTYPES,
    EXACT_ACT_FNS,
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

pytestmark = pytest.mark.cuda

FEW_ROWS, SMALL, TALL, SQUARE, HOPPER_TALL, HOPPER_SQUARE = range(6)
"""``lissom::cuda::BlockSparseForm``."""

TILES = {FEW_ROWS: (16, 64), SMALL: (64, 64), TALL: (256, 64), SQUARE: (128, 128)}
"""Rows and outputs of a tile."""

HOPPER_TILES = {HOPPER_TALL: (256, 64), HOPPER_SQUARE: (128, 128)}
"""… of each of a cluster's tiles, 1, 2 or 4."""

HALVES = (torch.bfloat16, torch.float16)
TYPES = (*((dtype, dtype) for dtype in HALVES), *((torch.int8, dtype) for dtype in DTYPES))
"""Of values and x."""

SHAPES = ((64, 64), (128, 128), (64, 128), (128, 64), (64, 16), (100, 48), (200, 32), (48, 80))
"""Blocks: those that tiles are made for, narrow ones, of which a stage holds several, and odd heights."""

BF16, FP16, INT8 = *TYPES[:2], (torch.int8, torch.float16)


def made(
    device: str, case: Any, block_shape: tuple[int, int], *args: Any, **options: Any
) -> BlockSparseInputs:
    inputs = block_sparse_inputs(BlockSparseCase(*case[:4], ""), block_shape, *args, **options)

    def moved(record: Any) -> dict[str, Any]:
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in fields.items()}

    weights = BlockSparseWeights(**moved(inputs.weights))
    return BlockSparseInputs(**{**moved(inputs), "weights": weights})


def run(inputs: BlockSparseInputs, backend: str = "cuda", **others: Any) -> Tensor:
    y: Tensor = torch.ops.lissom.block_sparse_linear.default(*inputs.args(**others, backend=backend))
    return y


def check(y: Tensor, inputs: BlockSparseInputs) -> None:
    w = inputs.weights
    if w.weight_scale is not None:
        assert_same_bits(y, run(inputs, "reference"))
        return
    assert y.dtype == inputs.x.dtype
    weight = formats.block_sparse_to_dense(w).double()
    offset = 0.0 * weight.sum(1) if inputs.bias is None else inputs.bias.double()
    exact = EXACT_ACT_FNS[inputs.act_fn](z := inputs.x.double() @ weight.t() + offset)
    bound = sum_bound(inputs.x, weight.t(), inputs.terms) + offset.abs() * 2 * UNIT_ROUNDOFF[torch.float32]
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ weight.abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def cluster_of(form: int, m: int) -> int:
    """Blocks of a cluster: as many as at most an eighth of the tiles is added for."""
    if form in TILES:
        return 1
    tile_rows = -(-m // HOPPER_TILES[form][0])
    return next(c for c in (4, 2, 1) if 8 * (-tile_rows % c) <= tile_rows)


def planned(monkeypatch: pytest.MonkeyPatch, form: int, most: int) -> None:
    """From now on this form, and pieces of at most so many blocks."""
    call = _cuda.call

    def forced(name: str, on: Tensor, *args: Any) -> Any:
        if name != "block_sparse_plan":
            return call(name, on, *args)
        _, m, _, _, height, _ = args
        rows, outputs = {**TILES, **HOPPER_TILES}[form]
        together = cluster_of(form, m)
        tile_rows = -(-m // (together * rows)) * together
        return form, most, tile_rows * -(-height // outputs), rows * outputs

    monkeypatch.setattr(_cuda, "call", forced)


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", BLOCK_SPARSE_CASES, ids=str)
def test_every_case(cuda_device: str, case: BlockSparseCase) -> None:
    turn = BLOCK_SPARSE_CASES.index(case)
    for i in range(len(SHAPES) if cuda_device == "cuda" else 2):
        values, dtype = TYPES[(turn + i) % len(TYPES) if i else turn % len(HALVES)]
        shape, act_fn = SHAPES[(turn + 3 * i) % len(SHAPES)], ACT_FNS[(turn + i) % len(ACT_FNS)]
        inputs = made(cuda_device, case, shape, values, dtype, act_fn)
        y = run(inputs, validated=bool(i % 2))
        assert y.shape == (case.m, case.n)
        check(y, inputs)


@pytest.mark.parametrize("types", [BF16, INT8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("form", TILES)
def test_every_form(
    cuda_device: str, form: int, types: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of rows, the second one with a single row; lines whole and in pieces; masked outputs."""
    rows, _ = TILES[form]
    for height, width, most in ((128, 64, 1), (100, 16, 3), (64, 48, 100))[
        : 3 if cuda_device == "cuda" else 2
    ]:
        with monkeypatch.context() as patch:
            planned(patch, form, most)
            case = (rows + 1, 5 * width - 16, 2 * height - 7, 0.6)
            inputs = made(cuda_device, case, (height, width), *types, "relu", kind="normal")
            check(run(inputs), inputs)


@pytest.mark.parametrize("form", TILES)
def test_every_form_in_float16(cuda_device: str, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the instruction that multiplies is as for bfloat16."""
    rows, _ = TILES[form]
    planned(monkeypatch, form, 2)
    inputs = made(cuda_device, (rows // 2 + 1, 80, 121, 0.6), (64, 16), *FP16, "gelu", kind="normal")
    check(run(inputs), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_shape(cuda_device: str, shape: tuple[int, int]) -> None:
    height, width = shape
    for m, (values, dtype) in ((3, (BF16, FP16)[SHAPES.index(shape) % 2]), (30, INT8)):
        for more in (-3, 1):
            case = (m, 3 * width + more, 2 * height + more, 0.5)
            inputs = made(cuda_device, case, shape, values, dtype, kind="normal", seed=m)
            check(run(inputs), inputs)


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_every_option(cuda_device: str, act_fn: str | None) -> None:
    for i, (values, dtype) in enumerate(TYPES):
        for bias in (True, False) if cuda_device == "cuda" else (bool((i + ACT_FNS.index(act_fn)) % 2),):
            inputs = made(cuda_device, (5, 70, 66, 0.8), (64, 32), values, dtype, act_fn, bias=bias)
            check(run(inputs), inputs)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_of_any_float_dtype(cuda_device: str, bias_dtype: torch.dtype) -> None:
    inputs = made(cuda_device, (3, 32, 66, 1.0), (64, 32), *BF16)
    bias = torch.randn(132).to(cuda_device, bias_dtype)[::2]
    check(run(replace(inputs, bias=bias)), replace(inputs, bias=bias))


def test_many_rows_of_tiles(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are taken together, and a rest of them."""
    planned(monkeypatch, FEW_ROWS, 1)
    inputs = made(cuda_device, (16 * 10 + 3, 48, 140, 0.8), (64, 16), *BF16, kind="normal")
    check(run(inputs), inputs)


def test_one_long_line(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its pieces are: int8 sums are the same bits, float ones those of the same pieces."""
    crow = torch.tensor([0, 0, 17, 18, 18], dtype=torch.int32)
    col = torch.tensor([*range(3, 20), 7], dtype=torch.int32)
    places = (crow.to(cuda_device), col.to(cuda_device))
    q = torch.randint(-127, 128, (18, 64, 16), dtype=torch.int8, device=cuda_device)
    sizes = {"out_features": 256, "in_features": 320}
    scale = torch.rand(256, device=cuda_device) + 0.1
    x = torch.randn(20, 320, device=cuda_device).bfloat16()
    exact = BlockSparseInputs(x, BlockSparseWeights(q, *places, scale, **sizes), None, "gelu")
    rounded = BlockSparseInputs(x, BlockSparseWeights(q.bfloat16(), *places, **sizes), None, "gelu")
    counters = torch.zeros(100, dtype=torch.int32, device=cuda_device)
    monkeypatch.setattr(_cuda, "counters", lambda on, count: counters[:count])
    for most in (1, 4, 16, 32):
        with monkeypatch.context() as patch:
            planned(patch, SMALL, most)
            check(run(exact), exact)
            first = run(rounded)
            check(first, rounded)
            if cuda_device == "cpu":
                _cuda.load().seed(7 + most)  # another order of blocks
            assert_same_bits(run(rounded), first)
            assert not counters.any()  # as they were, for the next launch


def test_rows_with_nan_or_infinity(cuda_device: str) -> None:
    for values, dtype in TYPES:
        inputs = made(
            cuda_device, (6, 70, 130, 0.4), (64, 16), values, dtype, None, bias=False, kind="normal"
        )
        x = inputs.x
        x[2, 69], x[4, 0], x[5, 33] = float("nan"), float("inf"), -float("inf")
        y = run(inputs)
        expected = run(inputs, "reference")
        assert torch.equal(y.isnan(), expected.isnan())
        check(y[:2], replace(inputs, x=x[:2]))
        if values == torch.int8:
            assert y[[2, 4, 5]].isnan().all()
        else:  # what meets no stored block has no influence
            assert not y.isnan().all(1).any()


def test_every_kind_of_row(cuda_device: str) -> None:
    for values, dtype in TYPES:
        inputs = made(cuda_device, (18, 70, 70, 0.7), (64, 32), values, dtype)
        check(run(inputs), inputs)


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(cuda_device: str, view: str) -> None:
    for i, (values, dtype) in enumerate(TYPES):
        k = (64, 40, 37, 64, 40)[i]
        inputs = made(cuda_device, (20, k, 66, 0.9), (64, 16), values, dtype)
        x = VIEWS[view](inputs.x)
        before = x.clone()
        assert_same_bits(run(inputs, x=x), run(inputs, x=x.contiguous()))
        assert_same_bits(x, before)


def test_values_at_any_address(cuda_device: str) -> None:
    for values, dtype in (BF16, INT8):
        inputs = made(cuda_device, (5, 64, 64, 1.0), (64, 32), values, dtype)
        stored = inputs.weights.values
        shifted = torch.cat([stored.flatten()[:1], stored.flatten()])[1:].view(stored.shape)
        strided = stored.transpose(1, 2).contiguous().transpose(1, 2)
        for v in (shifted, strided):
            assert_same_bits(run(inputs, values=v), run(inputs))


def test_shapes_of_x(cuda_device: str) -> None:
    for values, dtype in (BF16, INT8):
        inputs = made(cuda_device, (6, 64, 64, 1.0), (64, 32), values, dtype)
        y = run(inputs)
        assert_same_bits(run(inputs, x=inputs.x.view(2, 1, 3, 64)), y.view(2, 1, 3, 64))
        assert_same_bits(run(inputs, x=inputs.x[0]), y[0])
        assert run(inputs, x=inputs.x.new_empty(3, 0, 64)).shape == (3, 0, 64)
        for x in (inputs.x[:1].expand(7, 64), inputs.x[:, :1].expand(6, 64)):
            assert_same_bits(run(inputs, x=x), run(inputs, x=x.contiguous()))


def test_indices_that_change(cuda_device: str) -> None:
    """Pieces are forgotten with them."""
    inputs = made(cuda_device, (3, 64, 128, 1.0), (64, 32), *INT8)
    check(run(inputs), inputs)
    w = inputs.weights
    w.crow_indices.copy_(torch.tensor([0, 1, 4]))
    w.values[:, :, 8:] = 0
    w.col_indices.copy_(torch.tensor([1, 0, 1, 2]))
    inputs = replace(inputs, weights=replace(w, in_features=96), x=torch.cat([inputs.x, inputs.x[:, :32]], 1))
    check(run(inputs), inputs)


# ------------------------------------------------------------------------------------------- Hopper


@pytest.fixture
def hopper(cuda_device: str) -> str:
    if cuda_device == "cuda" and not _cuda.load().hopper_forms():
        pytest.skip("cuda: wgmma needs a Hopper GPU, and LISSOM_CUDA_HOPPER not 0")
    return cuda_device


HOPPER_SHAPES = (
    *(((128, 64), types) for types in (BF16, INT8)),
    *(((64, 128), types) for types in (BF16, INT8)),
    *(((100, 64), types) for types in (BF16, INT8)),
    ((192, 128), BF16),
    ((128, 192), INT8),
    ((128, 256), BF16),
    ((128, 64), FP16),
)


@pytest.mark.parametrize("form", HOPPER_TILES)
@pytest.mark.parametrize(("shape", "types"), HOPPER_SHAPES, ids=str)
def test_hopper_forms(
    hopper: str,
    shape: tuple[int, int],
    types: tuple[torch.dtype, torch.dtype],
    form: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile and a half, clusters and a rest, more tiles than multiprocessors; lines whole and in parts."""
    height, width = shape
    cases: tuple[tuple[Any, ...], ...] = (
        (300, width, height, 1.0),
        (1, 3 * width - 16, 2 * height - 7, 0.6),
        (513, 9 * width - 8, 3 * height + 1, 0.5),
        (1100, 2 * width, 40 * height, 0.3),
        (2500, 7 * width, 20 * height, None),
    )
    mosts: tuple[int, ...] = (1, 3, 100)
    if hopper == "cpu":
        turn = HOPPER_SHAPES.index((shape, types))
        cases = (((260, 130, 390)[turn % 3], 3 * width - 16, 2 * height - 7, 0.7),)
        mosts = (turn // 3 + 1,)
    for case in cases:
        for most in mosts:
            with monkeypatch.context() as patch:
                planned(patch, form, most)
                inputs = made(hopper, case, shape, *types, "silu" if most == 3 else None, kind="normal")
                check(run(inputs), inputs)


@pytest.mark.parametrize(("form", "m"), [(HOPPER_SQUARE, 129), (HOPPER_SQUARE, 500), (HOPPER_TALL, 900)])
def test_hopper_goes_on_from_tile_to_tile(
    hopper: str, form: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages and barriers go round while tiles of other lengths, none at all among them, come and go."""
    planned(monkeypatch, form, 2)
    lines = 12 if m < 200 or hopper == "cuda" else 5
    inputs = made(hopper, (m, 7 * 64, lines * 64, 0.3), (64, 64), *BF16, kind="normal")
    y = run(inputs)
    check(y, inputs)
    if hopper == "cpu":
        _cuda.load().seed(m)  # another order of threads
    assert_same_bits(run(inputs), y)


def test_hopper_is_chosen(hopper: str) -> None:
    if hopper == "cpu":
        pytest.skip("cuda: the emulator chooses no form of Hopper")
    for types in (BF16, FP16, INT8):
        inputs = made(hopper, (8192, 1024, 2048, 0.3), (128, 128), *types, kind="normal")
        w, x = inputs.weights, inputs.x
        value_type = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}[w.values.dtype]
        sizes = (w.block_rows, len(w.values), *w.block_shape)
        assert _cuda.call("block_sparse_plan", x, value_type, 8192, *sizes)[0] == HOPPER_SQUARE
        check(run(inputs), inputs)
        x[4000, 77] = float("nan")
        assert torch.equal(run(inputs).isnan(), run(inputs, "reference").isnan())


# ------------------------------------------------------------------------------------------- who serves


def test_other_blocks_are_tritons(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda_device == "cpu":
        monkeypatch.setattr(
            _triton.load("block_sparse_linear"), "block_sparse_linear", lambda rows, *_: rows.new_zeros(3, 64)
        )
        zeros = True
    else:
        zeros = False
    for shape, values, dtype in (
        ((64, 32), torch.float32, torch.bfloat16),
        ((64, 32), torch.bfloat16, torch.float16),
        ((64, 32), torch.float16, torch.bfloat16),
        ((64, 4), *BF16),
        ((LEAST_HEIGHT - 16, 32), *INT8),
    ):
        inputs = made(cuda_device, (3, 64, 64, 1.0), shape, values, dtype)
        assert run(inputs).count_nonzero() == 0 if zeros else run(inputs).isfinite().all()


def test_the_public_function(cuda_device: str) -> None:
    inputs = made(cuda_device, (3, 64, 64, 1.0), (64, 32), *BF16)
    w = inputs.weights
    args = (inputs.x, w.values, w.crow_indices, w.col_indices, 64, 64)
    assert_same_bits(block_sparse_linear(*args, bias=inputs.bias, backend="cuda"), run(inputs))


# ------------------------------------------------------------------------------------------- pieces, plans


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100])
def test_pieces(most: int) -> None:
    """Each block in one piece; a line's parts in order, even, in slots of their own; longest first."""
    for counts in ([0, 7, 1, 0, 23, 2, 2], [0], [0, 0, 0], [5], [1] * 9, [16, 15, 17]):
        crow = torch.tensor([0, *counts]).cumsum(0).int()
        blocks = sum(counts)
        pieces = cut(crow, blocks, most)
        assert pieces.shape == (len(counts) + blocks // most, len(PIECE))
        assert pieces.dtype == torch.int32
        assert pieces.is_contiguous()
        there = pieces[pieces[:, 0] >= 0]
        lengths = (there[:, 2] - there[:, 1]).tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert (pieces[len(there) :, 0] == -1).all()
        taken = []
        for line, count in enumerate(counts):
            found = sorted(there[there[:, 0] == line].tolist(), key=lambda piece: piece[3])
            assert len(found) == max(1, -(-count // most))
            ends = [crow[line].item(), *(piece[2] for piece in found)]
            assert [piece[1] for piece in found] == ends[:-1]
            assert ends[-1] == crow[line + 1]
            assert [piece[3:5] for piece in found] == [[i, len(found)] for i in range(len(found))]
            sizes = [piece[2] - piece[1] for piece in found]
            assert max(sizes) <= most
            assert max(sizes) - min(sizes) <= 1
            assert len({piece[5] for piece in found}) == 1
            if len(found) > 1:
                taken += range(found[0][5], found[0][5] + len(found))
        assert sorted(taken) == list(range(len(taken)))
        assert len(taken) <= slots(blocks, most)


def test_places() -> None:
    """Each tile once: some rows of tiles piece by piece, then the next ones."""
    emulator = cuda_emulator.load()
    for pieces, subs, rows in ((1, 1, 1), (5, 2, 3), (3, 1, 8), (4, 2, 21), (1, 1, 16)):
        for together in (2, 8):
            args = (pieces, subs, rows, together)
            found = [emulator.block_sparse_place(tile, *args) for tile in range(pieces * subs * rows)]
            assert found == [
                (row, piece, sub)
                for first in range(0, rows, together)
                for piece in range(pieces)
                for sub in range(subs)
                for row in range(first, min(first + together, rows))
            ]


def test_turns() -> None:
    """Each tile in one turn; of lengths that fall, everybody gets about as much."""
    emulator = cuda_emulator.load()
    for tiles, clusters in ((1, 1), (7, 3), (6, 3), (2048, 66), (500, 64)):
        rounds = -(-tiles // clusters)
        turns = [
            [emulator.block_sparse_turn(r, which, clusters) for r in range(rounds)]
            for which in range(clusters)
        ]
        taken = sorted(tile for mine in turns for tile in mine)
        assert taken == list(range(rounds * clusters))
        lengths = [max(0, tiles - tile) for tile in range(rounds * clusters)]
        loads = [sum(lengths[tile] for tile in mine) for mine in turns]
        assert max(loads) - min(loads) <= 2 * clusters


@pytest.mark.parametrize("row_bytes", [64, 128])
def test_descriptors(row_bytes: int) -> None:
    """wgmma finds every 16 bytes of a matrix where TMA puts them: PTX ISA, "Matrix descriptor", "Swizzling".

    Both swizzle addresses: bits 4 and up are exclusive-ored with the bits from 7 on, two or three of them.
    """
    emulator = cuda_emulator.load()
    mask = row_bytes - 16

    def swizzled(address: int) -> int:
        return address ^ (address >> 3 & mask)

    for base in (0, 40960, 81920 + 256 * row_bytes):
        for step in range(row_bytes // 32):
            descriptor = emulator.block_sparse_descriptor(base + 32 * step, row_bytes)
            start, apart = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
            assert start == base + 32 * step
            assert descriptor >> 62 == {128: 1, 64: 2}[row_bytes]
            assert descriptor >> 46 & 0xFFFF == 0  # reserved, base offset
            for row in range(128):
                for half in range(2):
                    read = swizzled(start + row // 8 * apart + row % 8 * row_bytes + 16 * half)
                    assert read == swizzled(base + row * row_bytes + 16 * (2 * step + half))


@pytest.mark.parametrize("row_bytes", [64, 128, 256])
def test_stages(row_bytes: int) -> None:
    """Chunks of a stage lie in different banks where they are read or written together."""
    emulator, chunks = cuda_emulator.load(), row_bytes // 16

    def at(row: int, chunk: int) -> int:
        return int(emulator.block_sparse_stage_offset(row_bytes, row, chunk))

    places = sorted(at(row, chunk) for row in range(64) for chunk in range(chunks))
    assert places == list(range(0, 64 * row_bytes, 16))
    for first in range(0, 64, 8):
        for chunk in range(chunks):  # ldmatrix
            assert len({at(row, chunk) % 128 for row in range(first, first + 8)}) == 8
    written = [at(row, chunk) % 128 for row in range(64) for chunk in range(chunks)]
    for first in range(0, len(written), 8):  # cp.async of 8 threads
        assert len(set(written[first : first + 8])) == 8
    for row in range(64):  # 32 bytes further on: an exclusive or
        for chunk in range(chunks):
            assert at(row, chunk) == at(row, chunk % 2) ^ (chunk // 2 * 32)


@pytest.mark.parametrize("stages", [5, 6, 10, 12])
def test_rings(stages: int) -> None:
    """A skip is as many steps."""
    ring = cuda_emulator.load().block_sparse_ring
    places = [ring(stages, [1] * steps) for steps in range(5 * stages)]
    assert places == [(steps % stages, steps // stages % 2) for steps in range(5 * stages)]
    for steps in range(2 * stages):
        for more in (0, 1, 2, stages - 1, stages, 3 * stages - 1):
            assert ring(stages, [1] * steps + [more]) == places[steps + more]


def test_plans(cuda_device: str) -> None:
    if cuda_device == "cuda":
        pytest.skip("cuda: the emulator says what GPU is planned for")
    module = _cuda.load()

    def plan(m: int, lines: int, blocks: int, height: int, width: int) -> tuple[int, int]:
        on = torch.empty(0)
        form, most, tiles, elements = _cuda.call("block_sparse_plan", on, 3, m, lines, blocks, height, width)
        rows, outputs = {**TILES, **HOPPER_TILES}[form]
        assert elements == rows * outputs
        cluster = cluster_of(form, m)
        assert tiles == -(-m // (rows * cluster)) * cluster * -(-height // outputs)
        # Partial sums: never more than four for every tile that is at work at a time.
        assert slots(blocks, most) * tiles * elements <= 4 * 132 * 4 * 2**14
        return form, most

    try:
        module.device(80, 132)
        # 264 at a time: 4 or 2 pieces of a line's 2 tiles, with room for a quarter more than the average
        assert plan(1, 32, 320, 128, 128) == (FEW_ROWS, 4)
        assert plan(16, 32, 320, 128, 128) == (FEW_ROWS, 4)
        assert plan(16, 64, 2048, 128, 128) == (FEW_ROWS, 20)
        assert plan(16, 1000, 32000, 128, 128) == (FEW_ROWS, 128)  # more tiles than that
        assert plan(17, 32, 320, 128, 128) == (SMALL, 4)
        assert plan(256, 32, 320, 128, 128) == (SMALL, 13)
        assert plan(8192, 64, 410, 128, 128) == (SQUARE, 64)
        assert plan(8192, 128, 1640, 64, 64) == (TALL, 128)
        assert plan(8192, 128, 1640, 200, 64)[0] == SQUARE
        assert plan(8192, 128, 1640, 192, 64)[0] == TALL
        assert plan(2048, 32, 32 * 32, 128, 128) == (SQUARE, 32)
        assert plan(8192, 64, 0, 128, 128)[1] >= 1
        module.device(90, 132)
        assert plan(64, 64, 2048, 128, 128)[0] == SMALL
        assert plan(256, 64, 410, 128, 128) == (HOPPER_SQUARE, 9)
        assert plan(256, 64, 200, 128, 128)[0] == SMALL
        assert plan(4096, 64, 410, 128, 128) == (HOPPER_SQUARE, 64)
        assert plan(4096, 128, 1640, 64, 64) == (HOPPER_TALL, 128)
        assert plan(8192, 64, 410, 128, 48)[0] == SQUARE  # no multiple of 64 bytes
    finally:
        module.device(80, 4)


def test_bad_arguments(cuda_device: str) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16, device=cuda_device)
    at = x.data_ptr()

    def call(**changes: int) -> None:
        named = {
            "form": SMALL,
            "x": at,
            "m": 2,
            "columns": 64,
            "x_stride": 64,
            "x_scale": 0,
            "values": at,
            "value_type": 1,
            "blocks": 1,
            "height": 64,
            "width": 64,
            "block_columns": at,
            "pieces": at,
            "piece_count": 1,
            "weight_scale": 0,
            "bias": 0,
            "bias_type": 0,
            "activation": 0,
            "n": 64,
            "y": at,
            "y_type": 1,
            "partial": 0,
            "arrived": 0,
        }
        assert set(changes) <= set(named)
        _cuda.call("block_sparse_linear", x, *{**named, **changes}.values())

    errors: dict[str, Callable[[], None]] = {
        r"form=4 does not serve blocks of 64 x 24 here": lambda: call(form=HOPPER_TALL, width=24),
        r"form=5 does not serve blocks of 200 x 8 here": lambda: call(
            form=HOPPER_SQUARE, height=200, width=8
        ),
        r"form=6 is none": lambda: call(form=6),
        r"value_type=0 is not bfloat16, float16 or int8": lambda: call(value_type=0),
        r"blocks of 64 x 4: rows must be multiples of 16 bytes": lambda: call(width=4),
        r"columns=60 must be a multiple of 16 bytes": lambda: call(columns=60),
        r"x_stride=32 is less than a row of 64": lambda: call(x_stride=32),
        r"rows of x must lie on multiples of 16 bytes \(x_stride=68\)": lambda: call(x_stride=68),
        r"values must lie on a multiple of 16 bytes": lambda: call(values=at + 2),
        r"int8 values need the scales": lambda: call(value_type=3),
        r"negative size": lambda: call(m=-1),
        r"\d+ tiles across are more than a launch can have": lambda: call(piece_count=2**29),
        r"\d+ blocks are more than a launch can have": lambda: call(piece_count=2**20, m=2**40),
    }
    for text, wrong in errors.items():
        with pytest.raises(ValueError, match=f"block_sparse_linear: {text}"):
            wrong()
    with pytest.raises(ValueError, match=r"block_sparse_linear: no plan for m=0"):
        _cuda.call("block_sparse_plan", x, 1, 0, 1, 1, 64, 64)
