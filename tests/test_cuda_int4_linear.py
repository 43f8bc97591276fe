"""The CUDA kernels of ``int4_linear``, on a GPU or in the emulator.

Quantized, they give the reference's bits where K is whole; where it is split, over warps or blocks, groups'
exact sums meet in another order, within a bound. Weight-only, they are held to the bound of float32 sums that
holds for the CPU and for Triton.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import cuda_emulator.build as cuda_emulator
import pytest
import torch
from dense_checks import check_dense
from int4_checks import check_other_order, check_weight_only, made, moved, strided
from torch import Tensor

from lissom import _cuda, _native, formats, registry, testing
from lissom.nn import Int4Linear
from lissom.ops import int4_linear
from lissom.ops.int4_linear import int4_pack
from lissom.reference import int4_linear as page
from lissom.testing import (
    ACT_FNS,
    DTYPES,
    INT4_CASES,
    INT4_FORMS,
    INT4_MODES,
    ROW_KINDS,
    VIEWS,
    Int4Form,
    Int4Inputs,
    LinearCase,
    assert_same_bits,
)

pytestmark = pytest.mark.cuda

OP = torch.ops.lissom.int4_linear.default

HALF = (torch.bfloat16, torch.float16)

FORMS = [form for form in INT4_FORMS if form.codebook != "group"]
"""What these kernels serve; a table per group is Triton's."""

FORMS_AND_MODES = [
    pytest.param(form, mode, id=f"{form}-{mode}")
    for form in FORMS
    for mode in INT4_MODES
    if not (form.group_index and mode == "rotated")
]
FEW_FORMS = [INT4_FORMS[0], INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[4], INT4_FORMS[7], INT4_FORMS[13]]
"""Symmetric; integer zero-points; a table per output; float zero-points; groups of 32; a group index."""


SANITIZED = {
    "test_every_shape",
    "test_wgmma",
    "test_every_form",
    "test_every_tile",
    "test_any_strides",
    "test_no_terms",
}
"""What runs in the emulator under sanitizers, which take three times as long: it reaches all of the code."""


@pytest.fixture(autouse=True)
def _few_under_sanitizers(request: pytest.FixtureRequest) -> None:
    name = request.function.__name__
    chosen = (name in SANITIZED or "split_sums" in name) and "in_order" not in request.node.name
    if os.environ.get(cuda_emulator.SANITIZE) and not chosen:
        pytest.skip("others reach the same code under sanitizers")


def run(inputs: Int4Inputs, x: Tensor | None = None, backend: str = "cuda", **others: Any) -> Tensor:
    y: Tensor = OP(*inputs.args(x, backend=backend, **others))
    return y


def workspace(inputs: Int4Inputs) -> tuple[int, int]:
    """Floats and counters: none where no two blocks share a tile."""
    w, (m, n) = inputs.weights, (inputs.x.shape[0], inputs.weights.out_features)
    zeros = 0 if w.zero_point is None else 1 if w.zero_point.dtype == torch.uint8 else 2
    form = (_native.DTYPES[inputs.x.dtype], m, n, w.in_features, w.segment_size, w.group_size == -1)
    entry = 0 if w.codebook is None else 4 if inputs.weight_only else 1
    sizes: tuple[int, int] = _cuda.call(
        "int4_linear_workspace", inputs.x, *form, zeros, entry, inputs.weight_only
    )
    return sizes


def whole(inputs: Int4Inputs) -> bool:
    """Whether one warp sums all of K: one chunk of it, or more rows than are worth a deep tile."""
    heavy = inputs.weights.codebook is not None or inputs.weights.zero_point is not None
    flat = inputs.x.shape[0] > (16 if heavy else 64)
    return inputs.x.shape[-1] <= 128 or (flat and workspace(inputs) == (0, 0))


def check(y: Tensor, inputs: Int4Inputs) -> None:
    if inputs.weight_only:
        if inputs.weights.table_scope == 2 and y.is_cuda and len(y) > 64 and y.dtype != torch.float32:
            weight = formats.dequantize_int4(inputs.weights)  # Triton's, by dense weights
            check_dense(y, inputs.x, weight, inputs.bias, inputs.act_fn)
            return
        check_weight_only(y, inputs)
        return
    expected = page.int4_linear(*inputs.page)
    if whole(inputs):
        assert_same_bits(y, expected)
    else:
        check_other_order(y, expected, inputs)


def dtype_of(mode: str, turn: int) -> torch.dtype:
    return HALF[turn % 2] if mode == "weight_only" else DTYPES[turn % 3]


def in_turn(device: str, items: list[Any], start: int, step: int) -> list[Any]:
    """All of them on a GPU; in the emulator every ``step``-th, each caller beginning elsewhere."""
    return items if device == "cuda" else items[start % step :: step]


@pytest.fixture
def few_multiprocessors(cuda_device: str) -> Iterator[str]:
    """The emulated GPU has so many that K is split, or so few that it is not; a GPU is what it is."""
    yield cuda_device
    if cuda_device == "cpu":
        cuda_emulator.load().device(80, 4)


# ------------------------------------------------------------------------------------------- the layout


@pytest.fixture(scope="module")
def emulator() -> ModuleType:
    return cuda_emulator.load()


@pytest.mark.parametrize("weight_only", [False, True], ids=["int8", "weight_only"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fragments_byte_for_byte(emulator: ModuleType, form: Int4Form, weight_only: bool) -> None:
    """Every code is where csrc/common/formats.h says, and nothing else lies there; so are all terms."""
    n, k = 37, 301
    w = testing.int4_weights(n, k, form)
    packed = formats.pack_int4_fragments(w, weight_only)
    assert packed.dtype == torch.int32
    assert packed.shape == formats.int4_fragments_shape(w, weight_only)
    entry = formats._entry_bytes(w, weight_only)
    order = 0 if weight_only else 1 if w.codebook is None else 2
    one_group = form.group_size == -1
    layout = (k, w.segment_size, one_group, entry, order)
    data = packed.contiguous().view(torch.uint8)
    codes = formats.unpack_nibbles(w.qweight, k)
    if w.group_index is not None:
        codes = codes[:, formats.group_order(w.group_index)]
    rest = data.clone()
    for row in range(0, n, 5):
        for column in (*range(0, k, 7), 127, 128, k - 1):
            panel_bytes, byte, shift = emulator.int4_code_at(*layout, row % 16, column)
            assert data.shape[1] == panel_bytes
            word = packed[row // 16, byte // 4].item() & 0xFFFFFFFF
            assert word >> shift & 15 == codes[row, column], (row, column)
    # What is no code: units, tables and terms, by the drawing.
    places = {emulator.int4_code_at(*layout, row, column)[1:] for row in range(16) for column in range(384)}
    assert len(places) == 16 * 384
    for byte, shift in places:
        rest[:, byte + shift // 8] = 0
    segments = -(-384 // w.segment_size)
    s, _, tables = formats.segment_terms(w, weight_only)
    per_chunk = 1 if one_group else 128 // w.segment_size
    chunk_bytes = 1024 + (0 if one_group else per_chunk * 16 * 8)
    header = data.shape[1] - 3 * chunk_bytes
    for g in range(1 if one_group else w.segments):
        start = 64 + 256 * entry if one_group else header + g // per_chunk * chunk_bytes + 1024
        at = start + g % per_chunk * 16 * 8
        pairs = rest[:, at : at + 16 * 8].contiguous().view(torch.float32).view(-1, 2)
        stored, zeros = pairs.unbind(1)
        expected = s[:, g]
        if weight_only and w.codebook is not None:
            largest = w.codebook.abs().amax(-1).clamp(min=1e-30)
            expected = expected * 2.0 ** torch.floor(torch.log2(largest))
        live = torch.ones(n, dtype=torch.bool)
        if weight_only and form.codebook == "channel":
            live[6] = False  # a table of zeros has no largest
        assert_same_bits(stored[:n][live], expected.float()[live])
        assert not pairs[n:].any()
        zero = w.zero_point[:, g].float() if w.zero_point is not None else torch.full((n,), 8.0)
        assert_same_bits(zeros[:n].contiguous(), zero)
    if tables is not None:
        kind = torch.float32 if weight_only else torch.int8
        stored = rest[:, 64 : 64 + 256 * entry].contiguous().view(kind).view(-1, 16)
        if weight_only:
            top = stored[:n].abs().amax(1)
            assert bool(((top >= 1) & (top < 2) | (top == 0)).all())
        else:
            assert stored[:n].tolist() == tables.expand(n, 16).tolist()
        assert not stored[n:].any()
    units = rest[:, :64].contiguous().view(torch.float32).flatten()[:n]
    if weight_only and w.codebook is None:
        largest = w.weight_scale.float().abs().amax(1)
        assert bool((units <= largest.clamp(min=2.0**-126)).all())
        assert bool((units > largest / 2).all())
    else:
        assert units.tolist() == [1.0] * n
    assert segments >= w.segments


def test_no_fragments_of_tables_per_group() -> None:
    with pytest.raises(ValueError, match="a codebook per group has no fragments"):
        formats.pack_int4_fragments(testing.int4_weights(4, 70, INT4_FORMS[8]))


def test_where_wgmma_finds_x(emulator: ModuleType) -> None:
    """The canonical layout of a K-major operand with 128-byte swizzle (PTX ISA, "Asynchronous Warpgroup Level
    Matrix Shared Memory Layout"): bits 4 to 6 of an address are exclusive-ored with bits 7 to 9."""
    places = set()
    for row in range(128):
        for piece in range(16):
            plain = (piece // 8 * 128 + row) * 128 + piece % 8 * 16
            place = emulator.int4_hopper_place(row, piece)
            assert place == plain ^ (plain >> 7 & 7) << 4
            places.add(place)
    assert len(places) == 128 * 16
    assert max(places) == 2 * 128 * 128 - 16


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", INT4_MODES)
@pytest.mark.parametrize("case", INT4_CASES, ids=str)
def test_every_shape(cuda_device: str, case: LinearCase, mode: str) -> None:
    if cuda_device == "cpu" and case.m * case.k > 15000:
        pytest.skip("too large for the emulator")
    turn = INT4_CASES.index(case) + INT4_MODES.index(mode)
    forms = [form for form in FORMS if not (form.group_index and mode == "rotated")]
    for i, form in enumerate(in_turn(cuda_device, forms, turn, len(forms))):
        act_fn = ACT_FNS[(turn + i) % len(ACT_FNS)]
        inputs = made(cuda_device, case, form, dtype_of(mode, turn + i), mode, act_fn)
        y = run(inputs)
        assert y.shape == (case.m, case.n)
        check(y, inputs)


@pytest.mark.parametrize(("form", "mode"), FORMS_AND_MODES)
def test_every_form(cuda_device: str, form: Int4Form, mode: str) -> None:
    turn = FORMS.index(form) + INT4_MODES.index(mode)
    for dtype in in_turn(cuda_device, list(HALF if mode == "weight_only" else DTYPES), turn, 2):
        for m, k in in_turn(cuda_device, [(3, 301), (19, 256)], FORMS.index(form) // 2, 2):
            inputs = made(cuda_device, LinearCase(m, k, 37, "forms"), form, dtype, mode, seed=3)
            check(run(inputs), inputs)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_every_tile(cuda_device: str, mode: str, m: int) -> None:
    """Whole tiles and rests of rows and outputs, in the plain form and in the others."""
    for i, form in enumerate((INT4_FORMS[0], INT4_FORMS[4], INT4_FORMS[2])):
        dtype = dtype_of(mode, m + i)
        inputs = made(
            cuda_device, LinearCase(m, 290, 40 if m > 8 else 150, "tiles"), form, dtype, mode, "silu"
        )
        check(run(inputs), inputs)


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("form", [INT4_FORMS[0], INT4_FORMS[2], INT4_FORMS[4], INT4_FORMS[9]], ids=str)
def test_split_sums_have_the_same_bits_every_time(
    few_multiprocessors: str, form: Int4Form, mode: str
) -> None:
    """Whichever block comes last. A launch leaves its counters as it found them."""
    device, seed = few_multiprocessors, 0
    for m in (1, 66) if (form, mode) == (INT4_FORMS[0], "int8") else (12,):
        case = LinearCase(m, 16500, 40, "split") if m < 66 else LinearCase(m, 1100, 17, "split")
        inputs = made(device, case, form, torch.bfloat16, mode, "gelu")
        results = []
        for multiprocessors in (4, 40, 40):
            if device == "cpu":
                cuda_emulator.load().device(80, multiprocessors)
                cuda_emulator.load().seed(seed := seed + 1)
            results.append(run(inputs))
            check(results[-1], inputs)
        assert device != "cpu" or workspace(inputs)[1] > 0
        assert_same_bits(results[1], results[2])


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("form", [INT4_FORMS[i] for i in (0, 1, 3, 6, 7, 9, 15)], ids=str)
def test_wgmma(cuda_device: str, form: Int4Form, mode: str) -> None:
    """Many rows on Hopper, with K whole and split."""
    if cuda_device != "cpu":
        pytest.skip("cuda: on a Hopper GPU all tests with more than 64 rows use wgmma")
    if mode == "int8" and form.zero:
        pytest.skip("int8 with zero-points has no such form")
    emulated = cuda_emulator.load()
    try:
        for multiprocessors, (m, k, n) in ((1, (130, 580, 150)), (40, (66, 1100, 40))):
            emulated.device(90, multiprocessors)
            dtype = dtype_of(mode, multiprocessors + INT4_FORMS.index(form))
            inputs = made("cpu", LinearCase(m, k, n, "wgmma"), form, dtype, mode, "gelu")
            y = run(inputs)
            assert (workspace(inputs)[0] > 0) == (multiprocessors > 1)
            check(y, inputs)
    finally:
        emulated.device(80, 4)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_every_kind_of_row(cuda_device: str, mode: str, kind: str) -> None:
    for i, form in enumerate((INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[4], INT4_FORMS[6])):
        dtype = dtype_of(mode, ROW_KINDS.index(kind) + i)
        inputs = made(cuda_device, LinearCase(7, 70, 20, "row kinds"), form, dtype, mode, None, kind=kind)
        check(run(inputs), inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_extreme_sums(cuda_device: str, form: Int4Form) -> None:
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
    for weight_only in (False, True):
        x = (signs * 3).to(HALF[FORMS.index(form) % 2])
        inputs = moved(cuda_device, Int4Inputs(x, weights, None, weight_only, None, False))
        check(run(inputs), inputs)


@pytest.mark.parametrize("zero", [None, *formats.INT4_ZERO_DTYPES], ids=str)
@pytest.mark.parametrize("scale", formats.INT4_SCALE_DTYPES, ids=str)
def test_terms_of_any_dtype(cuda_device: str, scale: torch.dtype, zero: torch.dtype | None) -> None:
    form = Int4Form(32, zero, scale=scale)
    for i, bias_dtype in enumerate(DTYPES):
        mode = ("int8", "weight_only")[i % 2]
        inputs = made(cuda_device, LinearCase(4, 70, 21, "dtypes"), form, HALF[i // 2], mode)
        assert inputs.bias is not None
        inputs = replace(inputs, bias=inputs.bias.to(bias_dtype))
        check(run(inputs), inputs)


@pytest.mark.parametrize("zero", [0, 8, 127, 128, 200, 255])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_integer_zero_points_far_from_the_codes(cuda_device: str, dtype: torch.dtype, zero: int) -> None:
    for form in (INT4_FORMS[1], INT4_FORMS[7]):
        inputs = made(cuda_device, LinearCase(4, 140, 21, "zeros"), form, dtype, "weight_only")
        assert inputs.weights.zero_point is not None
        zeros = torch.full_like(inputs.weights.zero_point, 8)
        zeros[3:] = zero
        changed = replace(inputs, weights=replace(inputs.weights, zero_point=zeros))
        check(run(changed), changed)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_scales_of_any_magnitude(cuda_device: str, magnitude: float) -> None:
    """x is such that products are of middling size: nothing overflows or vanishes on the way."""
    for form in (INT4_FORMS[6], Int4Form(64, torch.float16, scale=torch.float32), Int4Form(32, torch.uint8)):
        inputs = made(cuda_device, LinearCase(5, 65, 20, "scales"), form, torch.bfloat16, "weight_only")
        scale = torch.full_like(inputs.weights.weight_scale, magnitude, dtype=torch.float32)
        x = torch.linspace(-1, 1, 5 * 65, device=cuda_device).view(5, 65) / magnitude / 256
        x = x.clamp(-1e38, 1e38).bfloat16()
        changed = replace(inputs, x=x, weights=replace(inputs.weights, weight_scale=scale))
        check(run(changed), changed)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_any_magnitude(cuda_device: str, dtype: torch.dtype, magnitude: float) -> None:
    for form, mode in (
        (INT4_FORMS[5], "weight_only"),
        (INT4_FORMS[2], "weight_only"),
        (INT4_FORMS[2], "int8"),
    ):
        if mode == "weight_only" and dtype == torch.float32:
            continue
        inputs = made(cuda_device, LinearCase(4, 65, 20, "tables"), form, dtype, mode, kind="normal")
        w = inputs.weights
        assert w.codebook is not None
        scale = (w.weight_scale.float() / magnitude).to(torch.float32)
        changed = replace(inputs, weights=replace(w, codebook=w.codebook * magnitude, weight_scale=scale))
        check(run(changed), changed)


def test_tables_with_nan(cuda_device: str) -> None:
    for mode in INT4_MODES:
        inputs = made(cuda_device, LinearCase(3, 40, 8, "bad scale"), INT4_FORMS[2], torch.bfloat16, mode)
        w = inputs.weights
        assert w.codebook is not None
        scale, table = w.weight_scale.clone(), w.codebook.clone()
        bias = torch.zeros(8, device=cuda_device)
        scale[1], table[4], bias[7] = math.nan, math.nan, math.nan
        for dtype in HALF:
            x = torch.ones(3, 40, dtype=dtype, device=cuda_device)
            weights = replace(w, weight_scale=scale, codebook=table)
            y = run(replace(inputs, weights=weights, bias=bias), x)
            assert y.isnan().any(dim=0).tolist() == [i in (1, 4, 7) for i in range(8)]


def test_a_scale_that_is_nan_spoils_its_output_only(cuda_device: str) -> None:
    for mode in ("int8", "weight_only"):
        inputs = made(cuda_device, LinearCase(3, 40, 20, "bad scale"), INT4_FORMS[6], torch.bfloat16, mode)
        scale = inputs.weights.weight_scale.clone()
        scale[5, 1] = math.nan
        y = run(replace(inputs, weights=replace(inputs.weights, weight_scale=scale)))
        assert y.isnan().any(dim=0).tolist() == [i == 5 for i in range(20)]


def test_negative_zero(cuda_device: str) -> None:
    x = torch.zeros(3, 40)
    x[0, 1], x[1] = -0.0, -0.0
    x[2, :2] = torch.tensor([1.0, -1.0])
    for form in FEW_FORMS:
        weights = testing.int4_weights(2, 40, form)
        weights = replace(weights, qweight=torch.full((2, 20), 0x33, dtype=torch.uint8))
        for bias in (None, torch.tensor([-0.0, 0.0])):
            inputs = moved(cuda_device, Int4Inputs(x, weights, bias, False, "gelu", False))
            assert_same_bits(run(inputs), page.int4_linear(*inputs.page))


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_a_row_with_nan_or_infinity(cuda_device: str, form: Int4Form, bad: float) -> None:
    """Quantized, it is NaN; weight-only it is what float products make of it. Others do not see it."""
    for mode, m in (("int8", 3), ("weight_only", 20)):
        dtype = dtype_of(mode, m + math.isnan(bad))
        inputs = made(cuda_device, LinearCase(m, 70, 18, "bad rows"), form, dtype, mode, None, kind="normal")
        clean = run(inputs)
        inputs.x[1, 36] = bad
        y = run(inputs)
        assert not bool(y[1].isfinite().any())
        if mode == "int8":
            assert bool(y[1].isnan().all())
            check(y, inputs)
        good = [i for i in range(m) if i != 1]
        assert_same_bits(y[good], clean[good])


def test_overflow_of_float16_output_is_infinite(cuda_device: str) -> None:
    weights = replace(
        testing.int4_weights(2, 64, INT4_FORMS[0]),
        qweight=torch.full((2, 32), 0xFF, dtype=torch.uint8),
        weight_scale=torch.tensor([[1.0], [-1.0]]),
    )
    for weight_only in (False, True):
        x = torch.full((1, 64), 60000.0, dtype=torch.float16)
        inputs = moved(cuda_device, Int4Inputs(x, weights, None, weight_only, None, False))
        assert run(inputs).tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (0, 37), (3, 0, 37), (0, 2, 37)])
def test_leading_dimensions(cuda_device: str, shape: tuple[int, ...], mode: str) -> None:
    for form in (INT4_FORMS[1], INT4_FORMS[13]):
        inputs = made(cuda_device, LinearCase(6, 37, 18, "leading"), form, torch.bfloat16, mode)
        count = math.prod(shape[:-1])
        y = run(inputs, inputs.x[:count].reshape(shape))
        assert y.shape == (*shape[:-1], 18)
        assert y.is_contiguous()
        assert_same_bits(y.reshape(count, 18), run(inputs, inputs.x[:count]))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 3, 0), (0, 0)])
@pytest.mark.parametrize("form", [*FEW_FORMS[:4], INT4_FORMS[9], INT4_FORMS[11]], ids=str)
def test_no_terms(cuda_device: str, form: Int4Form, shape: tuple[int, ...]) -> None:
    bias = torch.tensor([-1.0, 2.0, -0.5])
    for weight_only in (False, True):
        x, weights = torch.empty(shape, dtype=torch.float16), testing.int4_weights(3, 0, form)
        y = run(moved(cuda_device, Int4Inputs(x, weights, bias, weight_only, "relu", False)))
        assert_same_bits(y.cpu(), bias.relu().half().expand(*shape[:-1], 3).contiguous())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_any_strides(cuda_device: str, mode: str, view: str) -> None:
    turn = list(VIEWS).index(view)
    for k in (37, 64):
        inputs = made(
            cuda_device, LinearCase(20, k, 18, "strides"), INT4_FORMS[1], dtype_of(mode, turn), mode
        )
        x = VIEWS[view](inputs.x)
        before = x.clone()
        assert_same_bits(run(inputs, x), run(inputs, x.contiguous()))
        assert_same_bits(x, before)


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_expanded_input(cuda_device: str, mode: str) -> None:
    inputs = made(cuda_device, LinearCase(20, 37, 18, "strides"), INT4_FORMS[0], torch.bfloat16, mode)
    for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
        assert_same_bits(run(inputs, x), run(inputs, x.contiguous()))


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_other_arguments_of_any_strides(cuda_device: str, form: Int4Form, mode: str) -> None:
    inputs = made(cuda_device, LinearCase(6, 64, 18, "strides"), form, torch.bfloat16, mode)
    w = inputs.weights
    assert inputs.bias is not None
    tensors = {
        field.name: value for field in fields(w) if isinstance(value := getattr(w, field.name), Tensor)
    }
    some = replace(w, **{name: strided(tensor) for name, tensor in tensors.items()})
    changed = replace(inputs, weights=some, bias=strided(inputs.bias))
    check(run(changed), changed)
    packed = int4_fragments(w, inputs.weight_only)
    order = None if w.group_index is None else formats.group_order(w.group_index)
    shifted = torch.cat([packed.flatten()[:1], packed.flatten()])[1:].view(packed.shape)
    for other in (packed, strided(packed), shifted):
        assert_same_bits(run(inputs, packed=other, permutation=order), run(inputs))


def int4_fragments(weights: formats.Int4Weights, weight_only: bool) -> Tensor:
    return formats.pack_int4_fragments(weights, weight_only)


# ------------------------------------------------------------------------------------------- the op


def test_which_backend_runs(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = _cuda.call
    monkeypatch.setattr(_cuda, "call", lambda name, *args: (called.append(name), call(name, *args))[1])
    inputs = made(cuda_device, LinearCase(2, 40, 8, "which"), INT4_FORMS[0], torch.bfloat16)
    run(inputs)
    assert called[-1] == "int4_linear"
    assert registry.select("int4_linear", cuda_device, "cuda").name == "cuda"


def test_what_is_left_to_triton(
    triton_device: str, cuda_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(_cuda, "call", lambda name, *args: called.append(name))
    for form, mode, dtype in (
        (INT4_FORMS[8], "weight_only", torch.bfloat16),
        (INT4_FORMS[8], "int8", torch.float16),
        (INT4_FORMS[0], "weight_only", torch.float32),
        (INT4_FORMS[15], "weight_only", torch.float32),
    ):
        inputs = made(cuda_device, LinearCase(3, 70, 20, "triton"), form, dtype, mode)
        assert_same_bits(run(inputs), run(inputs, backend="triton"))
    packed = formats.pack_int4_fragments(inputs.weights, True)
    order = formats.group_order(inputs.weights.group_index)  # type: ignore[arg-type]
    assert_same_bits(run(inputs, packed=packed, permutation=order), run(inputs))
    assert not called


def test_packed_for_another_backend_is_not_used(cuda_device: str) -> None:
    for form in (INT4_FORMS[0], INT4_FORMS[13]):
        for mode in ("int8", "weight_only"):
            inputs = made(cuda_device, LinearCase(5, 133, 43, "packed"), form, torch.bfloat16, mode)
            w = inputs.weights
            order = None if w.group_index is None else formats.group_order(w.group_index)
            theirs = int4_pack(w, inputs.weight_only)
            assert_same_bits(run(inputs, packed=theirs, permutation=order), run(inputs))
            ours = formats.pack_int4_fragments(w, inputs.weight_only)
            for backend in ("reference", "native" if cuda_device == "cpu" else "triton"):
                if registry.select("int4_linear", cuda_device, backend).unavailable():
                    continue
                y = run(inputs, backend=backend, packed=ours, permutation=order)
                assert_same_bits(y, run(inputs, backend=backend))


def test_packed_of_the_wrong_form_is_named(cuda_device: str) -> None:
    inputs = made(cuda_device, LinearCase(3, 64, 20, "packed"), INT4_FORMS[0], torch.bfloat16)
    packed = formats.pack_int4_fragments(inputs.weights)
    for wrong in (packed[:1], packed[:, :-4], packed.flatten()):
        with pytest.raises(
            ValueError, match=r"packed as int32 must be \(2, 304\) for N=20, K=64 in this form, "
        ):
            run(inputs, packed=wrong)
    table = made(cuda_device, LinearCase(3, 64, 20, "packed"), INT4_FORMS[8], torch.bfloat16)
    with pytest.raises(ValueError, match=r"packed as int32 must be"):
        run(table, packed=packed)


def test_bad_arguments(cuda_device: str) -> None:
    x = torch.zeros(2, 32, device=cuda_device, dtype=torch.bfloat16)

    def call(*, k: int = 20, segment: int = 32, one_group: bool = False, zeros: int = 0, entry: int = 0,
             stride: int = 32, packed: int = 0, dtype: int = 1) -> None:  # fmt: skip
        form = (dtype, 2, 16, k, segment, one_group, zeros, entry, True)
        _cuda.call("int4_linear", x, *form, x.data_ptr(), stride, packed, 0, 0, False, *[0] * 7)

    with pytest.raises(ValueError, match=r"int4_linear: segment=48 must be 32, 64 or 128"):
        call(segment=48)
    with pytest.raises(ValueError, match=r"int4_linear: segments of one group have 128 columns, not 32"):
        call(one_group=True)
    with pytest.raises(ValueError, match=r"int4_linear: zeros=3 must be 0, 1 or 2, and 0 with tables"):
        call(zeros=3)
    with pytest.raises(ValueError, match=r"int4_linear: zeros=1 must be 0, 1 or 2, and 0 with tables"):
        call(zeros=1, entry=4)
    with pytest.raises(ValueError, match=r"int4_linear: x_stride=10 is less than k=20"):
        call(stride=10)
    with pytest.raises(ValueError, match=r"int4_linear: weight-only x must be bfloat16 or float16"):
        call(dtype=0)
    with pytest.raises(ValueError, match=r"int4_linear: packed must lie on a multiple of 16 bytes"):
        call(packed=8)
    with pytest.raises(ValueError, match=r"int4_linear: negative size"):
        call(k=-1)


@pytest.mark.parametrize("mode", INT4_MODES)
def test_opcheck(cuda_device: str, mode: str) -> None:
    form = INT4_FORMS[1] if mode == "rotated" else INT4_FORMS[13]
    inputs = made(cuda_device, LinearCase(5, 32, 18, "opcheck"), form, torch.bfloat16, mode, "gelu")
    torch.library.opcheck(OP, inputs.args(backend="cuda"), test_utils=("test_schema", "test_faketensor"))
    w = inputs.weights
    order = None if w.group_index is None else formats.group_order(w.group_index)
    packed = formats.pack_int4_fragments(w, inputs.weight_only)
    args = inputs.args(backend="cuda", packed=packed, permutation=order)
    torch.library.opcheck(OP, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
def test_gradients(cuda_device: str, mode: str) -> None:
    """Backward is built on the op, which runs on the same backend."""
    case = LinearCase(7, 48, 18, "gradients")
    inputs = made(cuda_device, case, INT4_FORMS[1], torch.bfloat16, mode, "gelu", kind="normal")
    grads = []
    for backend in ("cuda", "reference"):
        x = inputs.x.clone().requires_grad_()
        y = run(inputs, x, backend)
        grads.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    bound = testing.GRAD_TOLERANCE[torch.bfloat16] * grads[1].double().abs().max()
    testing.assert_within(grads[0], grads[1].double(), bound.expand(grads[0].shape))


def test_more_columns_than_blocks_hold_in_64_splits(emulator: ModuleType) -> None:
    """Few rows keep all their x of a block in shared memory: K is split as often as that takes."""
    form = (1, 16, 32, 2**20, 128, False, 0, 0, True)  # bfloat16, M, N, K, one segment a chunk
    floats, counters = emulator.int4_linear_workspace(*form, 0)
    splits = floats // (16 * 32)  # rows and outputs of a tile
    room = 163 * 1024 // 2
    assert counters == 1
    assert 2**20 // 128 / splits * (16 * 128 * 2) <= room


def test_more_rows_than_the_emulator_can_count(cuda_device: str) -> None:
    x = torch.zeros(1, 32, device=cuda_device, dtype=torch.bfloat16)
    form = (1, 2**40, 2**14, 32, 32, False, 0, 0, True)
    with pytest.raises(ValueError, match=r"int4_linear: \d+ blocks are more than a launch can have"):
        _cuda.call("int4_linear", x, *form, x.data_ptr(), 32, 0, 0, 0, False, *[0] * 7)


# ------------------------------------------------------------------------------------------- the layer


def layers() -> list[Int4Linear]:
    """Of every kind of state that fragments serve."""
    made = []
    for form in (INT4_FORMS[1], INT4_FORMS[2], INT4_FORMS[9], INT4_FORMS[13]):
        for activation in ("int8", None):
            weights = testing.int4_weights(20, 140, form)
            bias = torch.nn.Parameter(torch.linspace(-1, 1, 20))
            made.append(Int4Linear.from_weights(weights, bias, activation=activation))
    return made


def check_layer(layer: Int4Linear, x: Tensor) -> None:
    inputs = Int4Inputs(x, layer.quantized, layer.bias, layer.activation is None, layer.act_fn, layer.rotated)
    with torch.no_grad():
        check(layer(x), inputs)


def test_a_layer_keeps_fragments_where_they_are_what_runs(
    cuda_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made when the layer comes to be, moves or loads; what the state holds stays as it was."""
    for before in layers():
        state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
        assert before._packed is not None
        assert before._packed.dtype == torch.uint8
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    packed_in_a_call: list[bool] = []
    pack = formats.pack_int4_fragments
    monkeypatch.setattr(
        importlib.import_module("lissom.ops.int4_linear"),
        "pack_int4_fragments",
        lambda *args: (packed_in_a_call.append(True), pack(*args))[1],
    )
    for layer in layers():
        layer.to(cuda_device)
        expected = pack(layer.quantized, layer.activation is None)
        assert layer._packed is not None
        assert_same_bits(layer._packed, expected)
        packed_in_a_call.clear()
        x = torch.randn(3, 140, device=cuda_device).bfloat16()
        check_layer(layer, x)
        assert not packed_in_a_call
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert "_packed" not in state
        with torch.no_grad():
            layer.qweight.zero_()
        layer.load_state_dict(state)
        assert_same_bits(layer._packed, expected)
        layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
        assert_same_bits(layer._packed, expected)
        check_layer(layer.bfloat16(), x)
    monkeypatch.delenv("LISSOM_BACKEND")
    if cuda_device == "cpu":  # a cache for another backend is right all the same
        check_native = layer(x)
        assert check_native.shape == (3, 20)
        layer._repack()
        assert layer._packed.dtype == torch.uint8


def test_a_layer_with_tables_per_group_keeps_none(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    layer = Int4Linear.from_weights(testing.int4_weights(20, 140, INT4_FORMS[8])).to(cuda_device)
    assert layer._packed is None or layer._packed.dtype == torch.uint8


@pytest.fixture
def gpu(cuda_device: str) -> torch.device:
    if cuda_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_layer_to_a_gpu_and_back(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in layers():
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        x = torch.randn(9, 140).bfloat16()
        with torch.no_grad():
            expected = layer(x)
            monkeypatch.setenv("LISSOM_BACKEND", "cuda")
            layer.to(gpu)
            assert layer._packed is not None
            assert layer._packed.dtype == torch.int32
            check_layer(layer, x.to(gpu))
            monkeypatch.delenv("LISSOM_BACKEND")
            layer.to("cpu")
            for name, tensor in layer.state_dict().items():
                assert_same_bits(tensor, before[name])
            assert_same_bits(layer(x), expected)


@pytest.mark.gpu
def test_cuda_graphs_and_streams(gpu: torch.device) -> None:
    """Captured launches count arrivals in zeros of their own; nothing waits for the GPU."""
    for form in (INT4_FORMS[1], INT4_FORMS[4], INT4_FORMS[2]):
        for mode in ("int8", "weight_only"):
            for m in (1, 16, 64, 700):
                case = LinearCase(m, 2048, 512, "graphs")
                inputs = made(str(gpu), case, form, torch.bfloat16, mode, "gelu")
                packed = formats.pack_int4_fragments(inputs.weights, inputs.weight_only)
                expected = run(inputs, packed=packed)
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        other = run(inputs, packed=packed)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                assert_same_bits(other, expected)
                graphs, results = [], []
                for _ in range(2):
                    graphs.append(torch.cuda.CUDAGraph())
                    with torch.cuda.graph(graphs[-1]):
                        results.append(run(inputs, packed=packed))
                streams = [torch.cuda.Stream() for _ in graphs]
                torch.cuda.synchronize()
                for _ in range(5):
                    for graph, stream in zip(graphs, streams, strict=True):
                        with torch.cuda.stream(stream):
                            graph.replay()
                torch.cuda.synchronize()
                for y in results:
                    assert_same_bits(y, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(gpu: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 30 << 30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free >> 30} are free")
    m, k, n = 70000, 32, 33000  # the output
    inputs = moved(
        str(gpu), made("cpu", LinearCase(3, k, n, "large"), INT4_FORMS[1], torch.bfloat16, "weight_only")
    )
    x = torch.randn(m, k, device=gpu, dtype=torch.bfloat16)
    for weight_only in (False, True):
        some = replace(inputs, x=x, weight_only=weight_only)
        y = run(some)
        check(y[-40:].clone(), replace(some, x=x[-40:]))
        del y
    n, k = 70000, 65536  # the codes
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=gpu)
    scale = torch.rand(n, k // 128, device=gpu).half()
    x = torch.randn(2, k, device=gpu).bfloat16()
    y = OP(x, codes, scale, backend="cuda", weight_only=True)
    last = replace(inputs.weights, qweight=codes[-50:], weight_scale=scale[-50:], zero_point=None)
    last = replace(last, in_features=k, group_size=128)
    check(y[:, -50:].contiguous(), Int4Inputs(x, last, None, True, None, False))


def test_op_names_the_backend_in_errors(cuda_device: str) -> None:
    x = torch.ones(2, 7, device=cuda_device)
    q = torch.ones(3, 2, dtype=torch.uint8, device=cuda_device)
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\) but qweight is \(3, 2\), two codes a byte"):
        int4_linear(x, q, torch.ones(3, 1, device=cuda_device), backend="cuda")
