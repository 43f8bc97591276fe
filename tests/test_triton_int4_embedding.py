"""The Triton kernel of ``int4_embedding``: the reference's bits, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_int4_embedding as cpu
import torch
from torch import Tensor

from lissom import formats, testing
from lissom.formats import Int4Weights
from lissom.reference import int4_embedding as page
from lissom.testing import DTYPES, EMBEDDING_CASES, Int4Form, assert_same_bits, int4_weights

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def on_triton(triton_device: str) -> Iterator[str]:
    with testing.use("triton"):
        yield triton_device


def to(table: Int4Weights, device: str) -> Int4Weights:
    moved = {
        name: value.to(device)
        for name, value in vars(table).items()
        if isinstance(value, Tensor) and name != "codebook"
    }
    return replace(table, **moved)


def look_up(indices: Tensor, table: Int4Weights, dtype: torch.dtype, device: str, **others: Any) -> Tensor:
    y: Tensor = cpu.OP(*cpu.args(indices.to(device), to(table, device), dtype, **others))
    return y.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", cpu.FORMS, ids=str)
@pytest.mark.parametrize(("shape", "v", "d"), EMBEDDING_CASES)
def test_every_shape(
    on_triton: str, shape: tuple[int, ...], v: int, d: int, form: Int4Form, dtype: torch.dtype
) -> None:
    table = int4_weights(v, d, form)
    for index_dtype in (torch.int64, torch.int32):
        indices = torch.randint(0, v, shape, dtype=index_dtype)
        y = look_up(indices, table, dtype, on_triton)
        assert_same_bits(y, page.int4_embedding(indices.reshape(-1), table, dtype).reshape(*shape, d))


@pytest.mark.parametrize("form", cpu.FORMS, ids=str)
def test_every_width(on_triton: str, form: Int4Form) -> None:
    for d in (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 300):
        table = int4_weights(9, d, form, seed=d)
        indices, dtype = torch.arange(9).flip(0), DTYPES[d % 3]
        y = look_up(indices, table, dtype, on_triton)
        assert_same_bits(y, page.int4_embedding(indices, table, dtype))


@pytest.mark.parametrize("zero_dtype", [None, *formats.INT4_ZERO_DTYPES], ids=str)
@pytest.mark.parametrize("scale_dtype", formats.INT4_SCALE_DTYPES, ids=str)
def test_every_dtype(on_triton: str, scale_dtype: torch.dtype, zero_dtype: torch.dtype | None) -> None:
    table = int4_weights(9, 101, Int4Form(32, zero_dtype, scale=scale_dtype))
    indices = torch.tensor([8, 0, 1, 2, 3, 4, 5])
    for dtype in DTYPES:
        y = look_up(indices, table, dtype, on_triton)
        assert_same_bits(y, page.int4_embedding(indices, table, dtype))


def test_strides(on_triton: str) -> None:
    table = int4_weights(20, 64, Int4Form(32))
    indices = torch.arange(12).reshape(3, 4).t()
    expected = page.int4_embedding(indices.reshape(-1), table, torch.float32).reshape(4, 3, 64)
    for qweight in (table.qweight.t().contiguous().t(), table.qweight.repeat_interleave(2, 0)[::2]):
        y = look_up(indices, replace(table, qweight=qweight), torch.float32, on_triton)
        assert_same_bits(y, expected)


def test_out_of_range(on_triton: str) -> None:
    table = int4_weights(7, 33, Int4Form(32))
    indices = torch.tensor([0, 7, -1, 6])
    if on_triton == "cpu":
        with pytest.raises(
            IndexError, match=r"int4_embedding: index 7 is out of range for a table of 7 rows"
        ):
            look_up(indices, table, torch.float32, on_triton)
        return
    y = look_up(indices, table, torch.float32, on_triton)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
