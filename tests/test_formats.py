"""Quantization and packed layouts: ``lissom/formats.py`` against their definitions and the native packer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lissom import _native, formats
from lissom.formats import Int4Weights
from lissom.ops.int8_linear import int8_pack
from lissom.reference.numerics import fma
from lissom.testing import (
    DTYPES,
    INT4_CASES,
    INT4_FORMS,
    LINEAR_CASES,
    Int4Form,
    LinearCase,
    assert_same_bits,
    int4_weights,
    linear_inputs,
)


def test_quantize_known_values() -> None:
    w = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 7, [2.0, 1.0, -2.0, 0, 0, 0, 0]])
    q, scale = formats.quantize_int8(w)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    # Halves go to the even neighbour.
    assert q.tolist() == [[127, -127, 0, 2, 2, 0, -2], [0] * 7, [127, 64, -127, 0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0, torch.tensor(2 / 127).item()]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantization_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    w = torch.randn(40, 65).to(dtype)
    q, scale = formats.quantize_int8(w)
    assert int(q.abs().max()) == 127
    assert int(q.min()) >= -127
    error = (q.double() * scale.double()[:, None] - w.double()).abs()
    # Half a step, and the float32 roundings of 127 / absmax, product and scale: 127 * 4 * 2^-24 steps.
    assert bool((error <= scale.double()[:, None] * (0.5 + 127 * 4 * 2.0**-24)).all())
    assert_same_bits(formats.dequantize_int8(q, scale), q.float() * scale[:, None])
    assert formats.dequantize_int8(q, scale, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("magnitude", [1e-37, 1e-40, 1e-45, 0.0, -0.0])
def test_rows_too_small_for_a_scale_become_zero(magnitude: float) -> None:
    q, scale = formats.quantize_int8(torch.full((2, 3), magnitude))
    assert int(q.abs().max()) == 0
    assert scale.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("magnitude", [3e38, 1e-36])
def test_rows_at_the_ends_of_the_range(magnitude: float) -> None:
    q, scale = formats.quantize_int8(torch.tensor([[magnitude, -magnitude, magnitude / 4]]))
    assert q.tolist() == [[127, -127, 32]]
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (0, 0)])
def test_empty_weights(n: int, k: int) -> None:
    q, scale = formats.quantize_int8(torch.empty(n, k))
    assert q.shape == (n, k)
    assert scale.tolist() == [0.0] * n


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_row(value: float) -> None:
    w = torch.ones(5, 3)
    w[3, 1] = value
    w[4, 0] = value
    with pytest.raises(ValueError, match=r"weight row 3 holds NaN or infinity \(2 such rows\); repair"):
        formats.quantize_int8(w)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \(2, 3, 4\)"):
        formats.quantize_int8(torch.ones(2, 3, 4))


def test_quantize_keeps_no_graph_and_does_not_change_the_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    before = weight.detach().clone()
    q, scale = formats.quantize_int8(weight)
    assert not q.requires_grad
    assert not scale.requires_grad
    assert_same_bits(weight, before)


def test_packed_layout_is_the_one_drawn() -> None:
    n, k = 18, 6
    q = torch.arange(n * k, dtype=torch.int32).sub(54).to(torch.int8).view(n, k)
    packed = formats.pack_int8(q)
    assert packed.shape == formats.packed_int8_shape(n, k) == (2, 3 * 64)
    for panel in range(2):
        offsets = packed[panel, :64].view(torch.int32)
        lines = packed[panel, 64:].view(2, 16, 4)
        for i in range(16):
            row = panel * 16 + i
            expected = q[row] if row < n else torch.zeros(k, dtype=torch.int8)
            assert offsets[i].item() == -128 * int(expected.int().sum())
            assert lines[0, i].tolist() == expected[:4].tolist()
            assert lines[1, i].tolist() == [*expected[4:].tolist(), 0, 0]


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_unpack_inverts_pack(case: object) -> None:
    q = linear_inputs(case).qweight
    assert_same_bits(formats.unpack_int8(formats.pack_int8(q), *q.shape), q)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_native_packer_gives_the_same_bytes(case: object) -> None:
    q = linear_inputs(case).qweight
    assert_same_bits(int8_pack(q), formats.pack_int8(q))
    assert_same_bits(int8_pack(q.t().contiguous().t()), formats.pack_int8(q))


@pytest.mark.usefixtures("needs_native")
def test_native_constants_are_the_same() -> None:
    module = _native.load()
    assert formats.INT8_PANEL == module.INT8_PANEL
    assert formats.INT8_QUAD == module.INT8_QUAD


def test_largest_k_cannot_overflow() -> None:
    assert formats.INT8_MAX_IN_FEATURES * 127 * 127 <= 2**31 - 1
    assert (formats.INT8_MAX_IN_FEATURES + 1) * 127 * 127 > 2**31 - 1


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("sign", [1, -1])
def test_offsets_of_extreme_weights_at_the_largest_k(sign: int) -> None:
    """-128 * sum passes int32 there and must wrap as the accumulator does, not saturate."""
    q = torch.full((1, formats.INT8_MAX_IN_FEATURES), 127 * sign, dtype=torch.int8)
    assert_same_bits(int8_pack(q), formats.pack_int8(q))


# ------------------------------------------------------------------------------------------- int4


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (2,), (7,), (3, 0), (0, 3), (5, 1), (4, 33), (2, 3, 5)], ids=str
)
def test_nibbles(shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = formats.pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert_same_bits(formats.unpack_nibbles(packed, shape[-1]), codes)
    assert_same_bits(formats.pack_nibbles(codes.long()), packed)


def test_nibbles_known_values() -> None:
    assert formats.pack_nibbles(torch.tensor([[1, 2, 15], [0, 8, 3]])).tolist() == [
        [0x21, 0x0F],
        [0x80, 0x03],
    ]


def groups_of(w: Int4Weights) -> Tensor:
    if w.group_index is not None:
        return w.group_index.long()
    return torch.arange(w.in_features) // (max(w.in_features, 1) if w.group_size == -1 else w.group_size)


@pytest.mark.parametrize("case", [c for c in INT4_CASES if c.k < 2000], ids=str)
def test_dequantize_int4_follows_its_formula(case: LinearCase) -> None:
    for form in INT4_FORMS:
        w = int4_weights(case.n, case.k, form)
        group, codes = groups_of(w), formats.unpack_nibbles(w.qweight, case.k)
        s = w.weight_scale.float()[:, group]
        if w.codebook is not None:
            book = w.codebook if w.codebook.dim() > 1 else w.codebook.expand(case.n, 16)
            entry = codes.long() if book.dim() == 2 else group * 16 + codes
            expected = book.flatten(1).gather(1, entry) * s
        else:
            c = torch.zeros_like(s) if w.zero_point is None else s * (8 - w.zero_point.float()[:, group])
            expected = fma(codes.float() - 8, s, c)
        assert_same_bits(formats.dequantize_int4(w), expected)
        for dtype in DTYPES:
            assert_same_bits(formats.dequantize_int4(w, dtype), expected.to(dtype))


def drawn(w: Int4Weights, weight_only: bool) -> list[list[int]]:
    """The packed bytes, one by one, as the drawing in ``formats.py`` says."""
    n, k = w.out_features, w.in_features
    codes = formats.unpack_nibbles(w.qweight, k)
    if w.group_index is not None:
        codes = codes[:, formats.group_order(w.group_index)]
    s, c, tables = formats.segment_terms(w, weight_only)

    def code(row: int, column: int) -> int:
        return int(codes[row, column]) if row < n and column < k else 0

    def line(values: Tensor, p: int, g: int) -> list[int]:
        column = [float(values[i, g]) if i < n else 0.0 for i in range(16 * p, 16 * p + 16)]
        return torch.tensor(column).view(torch.uint8).tolist()

    def table_byte(output: int, g: int, entry: int, plane: int) -> int:
        if output >= n:
            return 0
        value = tables[output, entry] if tables.dim() == 2 else tables[output, g, entry]  # type: ignore[union-attr]
        return int(value.reshape(1).view(torch.uint8)[plane]) if weight_only else int(value) + 128

    def table_lines(p: int, g: int) -> list[int]:
        return [
            table_byte(16 * p + 4 * l + i, g, e, plane)
            for plane in range(4 if weight_only else 1)
            for i in range(4)
            for l in range(4)  # noqa: E741 (the drawing's name)
            for e in range(16)
        ]

    packed = []
    for p in range(-(-n // 16)):
        panel = table_lines(p, 0) if w.table_scope == 1 else []
        for g in range(w.segments):
            panel += line(s, p, g) + ([] if c is None else line(c, p, g))
            panel += table_lines(p, g) if w.table_scope == 2 else []
            columns = min(w.segment_size, k - g * w.segment_size)
            for b in range(-(-columns // 32)):
                at = g * w.segment_size + 32 * b
                for i in range(4):
                    if w.codebook is None:
                        pairs = [(m, 8 * i + j, 8 * i + 4 + j) for m in range(16) for j in range(4)]
                    else:
                        pairs = [(4 * m + i, j, 16 + j) for m in range(4) for j in range(16)]
                    panel += [
                        code(16 * p + row, at + low) | code(16 * p + row, at + high) << 4
                        for row, low, high in pairs
                    ]
        packed.append(panel)
    return packed


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_packed_int4_layout_is_the_one_drawn(form: Int4Form, weight_only: bool) -> None:
    for n, k in ((18, 165), (5, 33)):
        w = int4_weights(n, k, form)
        packed = formats.pack_int4(w, weight_only)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == drawn(w, weight_only)


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("case", INT4_CASES, ids=str)
def test_unpack_inverts_pack_int4(case: LinearCase, weight_only: bool) -> None:
    for form in INT4_FORMS:
        w = int4_weights(case.n, case.k, form)
        packed = formats.pack_int4(w, weight_only)
        assert packed.shape == formats.packed_int4_shape(w, weight_only)
        expected = w.qweight
        if w.group_index is not None:
            order = formats.group_order(w.group_index)
            expected = formats.pack_nibbles(formats.unpack_nibbles(expected, case.k)[:, order])
        assert_same_bits(formats.unpack_int4(packed, w, weight_only), expected)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("case", INT4_CASES, ids=str)
def test_native_int4_panels_have_the_same_size(case: LinearCase, weight_only: bool) -> None:
    for form in INT4_FORMS:
        w = int4_weights(case.n, case.k, form)
        size = _native.load().int4_panel_bytes(
            case.k, w.segment_size, w.zero_point is not None, w.table_scope, weight_only
        )
        assert formats.packed_int4_shape(w, weight_only) == (-(-case.n // 16), size)


def test_int4_tables_are_quantized_as_int8_rows() -> None:
    for form in INT4_FORMS:
        if form.codebook is None:
            continue
        w = int4_weights(20, 200, form)
        assert w.codebook is not None
        s, c, tables = formats.segment_terms(w, weight_only=False)
        assert c is None
        assert tables is not None
        t8, scale = formats.quantize_int8(w.codebook.reshape(-1, 16))
        scale = scale.view(w.codebook.shape[:-1])
        column = scale[:, None] if scale.dim() == 1 else scale
        assert_same_bits(s, (w.weight_scale.float() * column).expand(20, w.segments).contiguous())
        expected = t8.view(w.codebook.shape)
        expected = expected.expand(20, w.segments, 16) if expected.dim() == 3 else expected.expand(20, 16)
        assert_same_bits(tables, expected.contiguous())


def test_a_bad_int4_table_only_spoils_its_own() -> None:
    """Packing must not raise: a layer that is still to be loaded holds whatever the memory held."""
    w = int4_weights(20, 200, INT4_FORMS[8])
    assert w.codebook is not None
    w.codebook[3, 1, 5], w.codebook[7, 0, 0] = torch.nan, torch.inf
    s, _, _ = formats.segment_terms(w, weight_only=False)
    assert s.isnan().nonzero().tolist() == [[3, 1], [7, 0]]


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_sound_int4_weights_pass(form: Int4Form) -> None:
    for case in INT4_CASES:
        formats.check_int4(int4_weights(case.n, case.k, form))


ZEROS, BOOK, INDEX = (int4_weights(5, 71, INT4_FORMS[i]) for i in (4, 8, 15))


def changed(tensor: Tensor | None, place: tuple[int, ...], value: float) -> Tensor:
    assert tensor is not None
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD_INT4: dict[str, tuple[Int4Weights, dict[str, Any], type[Exception], str]] = {
    "qweight dtype": (
        ZEROS,
        {"qweight": ZEROS.qweight.char()},
        TypeError,
        r"qweight must be uint8 \[N, 36\]",
    ),
    "qweight width": (
        ZEROS,
        {"in_features": 73},
        ValueError,
        r"qweight must be uint8 \[N, 37\] \(two codes a byte\) for K=73, got torch.uint8 \(5, 36\); make it",
    ),
    "padding": (
        ZEROS,
        {"qweight": changed(ZEROS.qweight, (2, 35), 0x10)},
        ValueError,
        r"qweight has a code in the last high nibble, past K=71; it must be 0: was the weight made for",
    ),
    "group_size": (ZEROS, {"group_size": 48}, ValueError, r"group_size=48 cannot be; use 32, 64, 128, or -1"),
    "scale shape": (
        ZEROS,
        {"weight_scale": ZEROS.weight_scale.t()},
        ValueError,
        r"weight_scale must be float16, bfloat16 or float32 \[5, 2\] for K=71, group_size=64, got .*\(2, 5\)",
    ),
    "scale nan": (
        ZEROS,
        {"weight_scale": changed(ZEROS.weight_scale, (3, 1), torch.nan)},
        ValueError,
        r"weight_scale holds nan at \[3, 1\]; all must be finite: repair the checkpoint",
    ),
    "zero_point inf": (
        ZEROS,
        {"zero_point": changed(ZEROS.zero_point, (4, 0), -torch.inf)},
        ValueError,
        r"zero_point holds -inf at \[4, 0\]; all must be finite",
    ),
    "zero_point with a codebook": (
        BOOK,
        {"zero_point": torch.zeros(5, 3, dtype=torch.uint8)},
        ValueError,
        r"zero_point has no meaning with a codebook; give one of the two",
    ),
    "codebook size": (
        BOOK,
        {"codebook": torch.zeros(8)},
        ValueError,
        r"codebook must be float32 \[16\], \[5, 16\] or \[5, 3, 16\] \(per tensor, .*\), got .*8",
    ),
    "codebook nan": (
        BOOK,
        {"codebook": changed(BOOK.codebook, (1, 2, 15), torch.nan)},
        ValueError,
        r"codebook holds nan at \[1, 2, 15\]; all must be finite",
    ),
    "index dtype": (
        INDEX,
        {"group_index": torch.zeros(71)},
        ValueError,
        r"group_index must be int32 \[71\], got torch.float32 \(71,\)",
    ),
    "index of a row": (
        INDEX,
        {"group_size": -1, "weight_scale": INDEX.weight_scale[:, :1]},
        ValueError,
        r"group_index has no meaning with group_size=-1",
    ),
    "index too large": (
        INDEX,
        {"group_index": changed(INDEX.group_index, (7,), 3)},
        ValueError,
        r"group_index holds 3; use 0 to 2, the groups of K=71, group_size=32",
    ),
    "index negative": (
        INDEX,
        {"group_index": changed(INDEX.group_index, (7,), -1)},
        ValueError,
        r"group_index holds -1; use 0 to 2",
    ),
    "index uneven": (
        INDEX,
        {"group_index": torch.zeros(71, dtype=torch.int32)},
        ValueError,
        r"group_index puts 71 columns into group 0, which must have 32 \(group_size=32, the last",
    ),
    "index with a long last group": (
        INDEX,
        {"group_index": (torch.arange(71) // 24).int()},
        ValueError,
        r"group_index puts 24 columns into group 0, which must have 32",
    ),
}


@pytest.mark.parametrize("name", BAD_INT4)
def test_unsound_int4_weights_are_refused(name: str) -> None:
    weights, changes, error, text = BAD_INT4[name]
    with pytest.raises(error, match=f"^Here: {text}"):
        formats.check_int4(replace(weights, **changes), "Here")
