"""``lissom::int8_embedding`` on every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lissom.ops import int8_embedding
from lissom.reference import int8_embedding as page
from lissom.testing import DTYPES, EMBEDDING_CASES, assert_same_bits

OP = torch.ops.lissom.int8_embedding.default


def table(v: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qweight = torch.randint(-127, 128, (v, d), generator=generator).to(torch.int8)
    scale = torch.rand(v, generator=generator) * 0.01
    if v > 3:
        scale[1], scale[2] = 0.0, 1e-42  # an all-zero row; a denormal scale
    return qweight, scale


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "v", "d"), EMBEDDING_CASES)
def test_every_shape(
    implementation: str, shape: tuple[int, ...], v: int, d: int, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    qweight, scale = table(v, d)
    indices = torch.randint(0, v, shape, dtype=index_dtype)
    y = OP(indices, qweight, scale, dtype)
    assert y.shape == (*shape, d)
    assert y.is_contiguous()
    assert_same_bits(y, page.int8_embedding(indices.reshape(-1), qweight, scale, dtype).reshape(y.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_and_every_width(implementation: str, dtype: torch.dtype) -> None:
    """Widths through all remainders of the vector widths; each row once, first and last included."""
    for d in range(1, 70):
        qweight, scale = table(9, d, seed=d)
        indices = torch.arange(9).flip(0)
        assert_same_bits(
            OP(indices, qweight, scale, dtype), page.int8_embedding(indices, qweight, scale, dtype)
        )


def test_values_overflow_and_underflow_as_one_rounding_does(implementation: str) -> None:
    qweight = torch.tensor([[127, -127, 1, 0, -1]], dtype=torch.int8)
    for magnitude in (6e2, 516.0, 1e-8, 2e-8, 1e38, 1e-45):
        scale = torch.tensor([magnitude])
        for dtype in DTYPES:
            expected = (qweight.float() * scale[:, None]).to(dtype)
            assert_same_bits(OP(torch.tensor([0]), qweight, scale, dtype), expected)


def test_nan_scale_reaches_only_its_row(implementation: str) -> None:
    qweight, scale = table(6, 20)
    scale[4] = math.nan
    y = OP(torch.tensor([3, 4, 5]), qweight, scale, torch.float32)
    assert y.isnan().all(dim=1).tolist() == [False, True, False]
    assert not bool(y[[0, 2]].isnan().any())


def test_many_indices_use_threads_and_give_the_same(implementation: str) -> None:
    qweight, scale = table(1000, 129)
    indices = torch.randint(0, 1000, (8, 700))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OP(indices, qweight, scale, torch.float32))
    assert_same_bits(
        results[0], page.int8_embedding(indices.view(-1), qweight, scale, torch.float32).view(8, 700, 129)
    )
    for y in results[1:]:
        assert_same_bits(y, results[0])


def test_any_strides(implementation: str) -> None:
    qweight, scale = table(10, 21)
    indices = torch.randint(0, 10, (4, 6))
    expected = OP(indices, qweight, scale, torch.float32)
    assert_same_bits(OP(indices.t().contiguous().t(), qweight, scale, torch.float32), expected)
    assert_same_bits(OP(indices, qweight.t().contiguous().t(), scale, torch.float32), expected)
    wide = torch.stack([scale, scale * 0], 1)[:, 0]
    assert_same_bits(OP(indices, qweight, wide, torch.float32), expected)
    assert_same_bits(OP(indices[:, :1].expand(4, 6), qweight, scale, torch.float32)[:, 5], expected[:, 0])
    offset = torch.cat([torch.zeros(1, dtype=torch.int8), qweight.flatten()])[1:].view(10, 21)
    assert_same_bits(OP(indices, offset, scale, torch.float32), expected)


@pytest.mark.parametrize("bad", [10, 11, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("place", [0, 5, 2999])
def test_index_out_of_range(implementation: str, place: int, index_dtype: torch.dtype, bad: int) -> None:
    qweight, scale = table(10, 21)
    indices = torch.zeros(3000, dtype=index_dtype)
    indices[place] = bad
    with pytest.raises(
        IndexError, match=f"int8_embedding: index {bad} is out of range .* 10 rows; use 0 to 9"
    ):
        OP(indices, qweight, scale, torch.float32)


@pytest.mark.parametrize("bad", [2**32, 2**32 + 3, -(2**63), 2**63 - 1])
def test_index_beyond_32_bits_is_not_wrapped(implementation: str, bad: int) -> None:
    qweight, scale = table(10, 21)
    with pytest.raises(IndexError, match=f"index {bad} is out of range for a table of 10 rows"):
        OP(torch.tensor([[1, bad]]), qweight, scale, torch.float32)


def test_empty_table(implementation: str) -> None:
    qweight, scale = table(0, 4)
    assert OP(torch.empty(0, dtype=torch.int64), qweight, scale, torch.float32).shape == (0, 4)
    with pytest.raises(IndexError, match="index 0 is out of range for a table of 0 rows; the table is empty"):
        OP(torch.tensor([0]), qweight, scale, torch.float32)


INDEX, Q, S = torch.tensor([0, 1]), torch.ones(3, 4, dtype=torch.int8), torch.ones(3)

BAD = {
    "indices float": (
        (INDEX.float(), Q, S, torch.float32),
        TypeError,
        r"indices have dtype torch\.float32; use torch\.int64",
    ),
    "indices bool": (
        (INDEX.bool(), Q, S, torch.float32),
        TypeError,
        r"indices have dtype torch\.bool; use torch\.int64",
    ),
    "qweight float": (
        (INDEX, Q.float(), S, torch.float32),
        TypeError,
        r"qweight must be int8 \[V, D\], got torch\.float32",
    ),
    "qweight 1-d": (
        (INDEX, Q[0], S, torch.float32),
        TypeError,
        r"qweight must be int8 \[V, D\], got torch\.int8 \(4,\)",
    ),
    "scale dtype": (
        (INDEX, Q, S.double(), torch.float32),
        ValueError,
        r"weight_scale must be float32 \[3\], got torch\.float64",
    ),
    "scale shape": (
        (INDEX, Q, S[:2], torch.float32),
        ValueError,
        r"weight_scale must be float32 \[3\], got .* \(2,\)",
    ),
    "dtype": (
        (INDEX, Q, S, torch.int8),
        TypeError,
        r"dtype=torch\.int8; use torch\.float32, torch\.bfloat16 or",
    ),
    "dtype float64": ((INDEX, Q, S, torch.float64), TypeError, r"dtype=torch\.float64; use torch\.float32"),
    "device": (
        (INDEX, Q.to("meta"), S, torch.float32),
        ValueError,
        r"qweight is on meta but the input is on cpu; move",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    args, error, text = BAD[name]
    with pytest.raises(error, match=f"int8_embedding: {text}"):
        OP(*args)


def test_functional_form_and_backend_argument() -> None:
    qweight, scale = table(10, 21)
    indices = torch.tensor([3, 9])
    y = int8_embedding(indices, qweight, scale, dtype=torch.float16, backend="reference")
    assert_same_bits(y, page.int8_embedding(indices, qweight, scale, torch.float16))
    with pytest.raises(ValueError, match=r"int8_embedding: backend='cuda' does not exist for device 'cpu'"):
        int8_embedding(indices, qweight, scale, backend="cuda")


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "v", "d"), EMBEDDING_CASES)
def test_plain_calls(
    automatic: list[bool],
    shape: tuple[int, ...],
    v: int,
    d: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
) -> None:
    qweight, scale = table(v, d)
    indices = torch.randint(0, v, shape, dtype=index_dtype)
    y = OP(indices, qweight, scale, dtype)
    assert automatic == [True]
    assert_same_bits(y, page.int8_embedding(indices.reshape(-1), qweight, scale, dtype).reshape(*shape, d))


def test_calls_that_are_not_plain_give_the_same(automatic: list[bool]) -> None:
    qweight, scale = table(10, 21)
    indices = torch.randint(0, 10, (4, 6))
    expected = OP(indices, qweight, scale, torch.float32)
    assert automatic == [True]
    for args in (
        (indices.t().contiguous().t(), qweight, scale),
        (indices, qweight.t().contiguous().t(), scale),
        (indices, qweight, torch.stack([scale, scale * 0], 1)[:, 0]),
    ):
        assert_same_bits(OP(*args, torch.float32), expected)
    assert automatic == [True, False, False, False]


@pytest.mark.parametrize("bad", [10, -1, 2**32 + 3, -(2**63)])
def test_index_out_of_range_of_otherwise_plain_calls(automatic: list[bool], bad: int) -> None:
    qweight, scale = table(10, 21)
    indices = torch.zeros(3000, dtype=torch.int64)
    indices[2999] = bad
    with pytest.raises(
        IndexError, match=f"int8_embedding: index {bad} is out of range for a table of 10 rows"
    ):
        OP(indices, qweight, scale, torch.float32)
    assert automatic == [False]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_otherwise_plain_calls(automatic: list[bool], name: str) -> None:
    args, error, text = BAD[name]
    with pytest.raises(error, match=f"int8_embedding: {text}"):
        OP(*args)
    assert not any(automatic)


def test_inference_mode(implementation: str) -> None:
    qweight, scale = table(10, 21)
    with torch.inference_mode():
        assert OP(torch.tensor([1]), qweight, scale, torch.float32).is_inference()
