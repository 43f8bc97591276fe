"""``lissom::int4_embedding`` on every implementation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import formats
from lissom.formats import Int4Weights
from lissom.ops import int4_embedding
from lissom.reference import int4_embedding as page
from lissom.testing import DTYPES, EMBEDDING_CASES, INT4_FORMS, Int4Form, assert_same_bits, int4_weights

OP = torch.ops.lissom.int4_embedding.default

FORMS = [form for form in INT4_FORMS if form.codebook is None and not form.group_index]


def args(
    indices: Tensor, table: Int4Weights, dtype: torch.dtype = torch.float32, /, **others: Any
) -> tuple[Any, ...]:
    """Arguments of the op; ``others`` replace some by name."""
    values: dict[str, Any] = {
        "indices": indices,
        "qweight": table.qweight,
        "weight_scale": table.weight_scale,
        "zero_point": table.zero_point,
        "embedding_dim": table.in_features,
        "group_size": table.group_size,
        "dtype": dtype,
    }
    assert others.keys() <= values.keys()
    return tuple({**values, **others}.values())


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "v", "d"), EMBEDDING_CASES)
def test_every_shape(
    implementation: str,
    shape: tuple[int, ...],
    v: int,
    d: int,
    form: Int4Form,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
) -> None:
    table = int4_weights(v, d, form)
    indices = torch.randint(0, v, shape, dtype=index_dtype)
    y = OP(*args(indices, table, dtype))
    assert y.shape == (*shape, d)
    assert y.is_contiguous()
    assert_same_bits(y, page.int4_embedding(indices.reshape(-1), table, dtype).reshape(y.shape))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_row_and_every_width(implementation: str, form: Int4Form) -> None:
    """Widths through all remainders of vectors, bytes and groups; each row once, first and last included."""
    for d in (*range(1, 70), 127, 128, 129, 255, 257, 300):
        table = int4_weights(9, d, form, seed=d)
        indices = torch.arange(9).flip(0)
        dtype = DTYPES[d % 3]
        assert_same_bits(OP(*args(indices, table, dtype)), page.int4_embedding(indices, table, dtype))


@pytest.mark.parametrize("zero_dtype", [None, *formats.INT4_ZERO_DTYPES], ids=str)
@pytest.mark.parametrize("scale_dtype", formats.INT4_SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(
    implementation: str, dtype: torch.dtype, scale_dtype: torch.dtype, zero_dtype: torch.dtype | None
) -> None:
    table = int4_weights(9, 101, Int4Form(32, zero_dtype, scale=scale_dtype))
    indices = torch.tensor([8, 0, 1, 2, 3, 4, 5])
    assert_same_bits(OP(*args(indices, table, dtype)), page.int4_embedding(indices, table, dtype))


def test_follows_its_formula() -> None:
    """Integer zero-points and scales that are powers of two: every operation is exact."""
    for form in FORMS:
        table = int4_weights(12, 75, form)
        scale = torch.randint(-3, 4, table.weight_scale.shape).float().exp2()
        zero = None
        if table.zero_point is not None:
            zero = torch.randint(0, 16, scale.shape).to(table.zero_point.dtype)
        table = replace(table, weight_scale=scale, zero_point=zero)
        codes = formats.unpack_nibbles(table.qweight, 75).float()
        group = (
            torch.zeros(75, dtype=torch.long)
            if form.group_size == -1
            else torch.arange(75) // form.group_size
        )
        offset = 8.0 if zero is None else zero.float()[:, group]
        exact = (codes - offset) * scale[:, group]
        index = torch.tensor([3, 11, 0, 3])
        assert_same_bits(page.int4_embedding(index, table, torch.float32), exact[index] + 0.0)


@pytest.mark.parametrize("magnitude", [6e3, 8200.0, 1e-8, 2e-8, 3e37, 1e-45])
def test_values_overflow_and_underflow_as_one_rounding_does(implementation: str, magnitude: float) -> None:
    table = Int4Weights(
        formats.pack_nibbles(torch.arange(16)[None]),
        torch.tensor([[magnitude]]),
        in_features=16,
        group_size=32,
    )
    for dtype in DTYPES:
        expected = ((torch.arange(16.0) - 8) * torch.tensor(magnitude))[None].to(dtype)
        assert_same_bits(OP(*args(torch.tensor([0]), table, dtype)), expected)


def test_nan_scale_reaches_only_its_group(implementation: str) -> None:
    form = FORMS[5]
    table = int4_weights(6, 70, form)
    scale = table.weight_scale.clone()
    scale[4, 1] = math.nan
    y = OP(*args(torch.tensor([3, 4, 5]), replace(table, weight_scale=scale)))
    bad = torch.zeros(3, 70, dtype=torch.bool)
    bad[1, form.group_size : 2 * form.group_size] = True
    assert torch.equal(y.isnan(), bad)


def test_many_indices_use_threads_and_give_the_same(implementation: str) -> None:
    table = int4_weights(1000, 129, FORMS[1])
    indices = torch.randint(0, 1000, (8, 700))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OP(*args(indices, table)))
    expected = page.int4_embedding(indices.view(-1), table, torch.float32)
    assert_same_bits(results[0], expected.view(8, 700, 129))
    for y in results[1:]:
        assert_same_bits(y, results[0])


def test_any_strides(implementation: str) -> None:
    table = int4_weights(10, 71, FORMS[1])
    indices = torch.randint(0, 10, (4, 6))
    expected = OP(*args(indices, table))
    assert_same_bits(OP(*args(indices.t().contiguous().t(), table)), expected)
    assert_same_bits(OP(*args(indices[:, :1].expand(4, 6), table))[:, 5], expected[:, 0])
    for name in ("qweight", "weight_scale", "zero_point"):
        tensor = getattr(table, name)
        wide = torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
        offset = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        for view in (wide, offset):
            assert_same_bits(OP(*args(indices, table, **{name: view})), expected)


@pytest.mark.parametrize("bad", [10, 11, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("place", [0, 5, 2999])
def test_index_out_of_range(implementation: str, place: int, index_dtype: torch.dtype, bad: int) -> None:
    indices = torch.zeros(3000, dtype=index_dtype)
    indices[place] = bad
    with pytest.raises(
        IndexError, match=f"int4_embedding: index {bad} is out of range .* 10 rows; use 0 to 9"
    ):
        OP(*args(indices, int4_weights(10, 21, FORMS[0])))


@pytest.mark.parametrize("bad", [2**32, 2**32 + 3, -(2**63), 2**63 - 1])
def test_index_beyond_32_bits_is_not_wrapped(implementation: str, bad: int) -> None:
    with pytest.raises(IndexError, match=f"index {bad} is out of range for a table of 10 rows"):
        OP(*args(torch.tensor([[1, bad]]), int4_weights(10, 21, FORMS[0])))


def test_empty_table(implementation: str) -> None:
    table = int4_weights(0, 4, FORMS[0])
    assert OP(*args(torch.empty(0, dtype=torch.int64), table)).shape == (0, 4)
    with pytest.raises(IndexError, match="index 0 is out of range for a table of 0 rows; the table is empty"):
        OP(*args(torch.tensor([0]), table))


INDEX, TABLE = torch.tensor([0, 1]), int4_weights(3, 70, FORMS[5])

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "indices float": (
        {"indices": INDEX.float()},
        TypeError,
        r"indices have dtype torch\.float32; use torch\.int64",
    ),
    "indices bool": (
        {"indices": INDEX.bool()},
        TypeError,
        r"indices have dtype torch\.bool; use torch\.int64",
    ),
    "qweight float": (
        {"qweight": TABLE.qweight.float()},
        TypeError,
        r"qweight must be uint8 \[N, 35\] .*K=70, got torch\.float32 \(3, 35\)",
    ),
    "qweight 1-d": (
        {"qweight": TABLE.qweight[0]},
        ValueError,
        r"qweight must be uint8 \[N, 35\] .*got torch\.uint8 \(35,\)",
    ),
    "width": (
        {"embedding_dim": 71},
        ValueError,
        r"qweight must be uint8 \[N, 36\] .*K=71, got torch\.uint8 \(3, 35\)",
    ),
    "group_size": ({"group_size": 16}, ValueError, r"group_size=16 cannot be; use 32, 64, 128, or -1"),
    "scale dtype": (
        {"weight_scale": TABLE.weight_scale.double()},
        ValueError,
        r"weight_scale must be float16, bfloat16 or float32 \[3, 3\] .*got torch\.float64",
    ),
    "scale shape": (
        {"weight_scale": TABLE.weight_scale[:2]},
        ValueError,
        r"weight_scale must be .*\[3, 3\] .*got .* \(2, 3\)",
    ),
    "zero_point shape": (
        {"zero_point": torch.zeros(3, 2, dtype=torch.uint8)},
        ValueError,
        r"zero_point must be uint8, float16, bfloat16 or float32 \[3, 3\] .*got torch\.uint8 \(3, 2\)",
    ),
    "dtype": ({"dtype": torch.int8}, TypeError, r"dtype=torch\.int8; use torch\.float32, torch\.bfloat16 or"),
    "dtype float64": ({"dtype": torch.float64}, TypeError, r"dtype=torch\.float64; use torch\.float32"),
    "device": (
        {"qweight": TABLE.qweight.to("meta")},
        ValueError,
        r"qweight is on meta but the input is on cpu; move",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=f"int4_embedding: {text}"):
        OP(*args(INDEX, TABLE, **changes))


def test_functional_form_and_backend_argument() -> None:
    y = int4_embedding(
        INDEX,
        TABLE.qweight,
        TABLE.weight_scale,
        zero_point=TABLE.zero_point,
        embedding_dim=70,
        group_size=32,
        dtype=torch.float16,
        backend="reference",
    )
    assert_same_bits(y, page.int4_embedding(INDEX, TABLE, torch.float16))
    with pytest.raises(ValueError, match=r"int4_embedding: backend='cuda' does not exist for device 'cpu'"):
        OP(*args(INDEX, TABLE), "cuda")


def test_inference_mode(implementation: str) -> None:
    with torch.inference_mode():
        assert OP(*args(INDEX, TABLE)).is_inference()
