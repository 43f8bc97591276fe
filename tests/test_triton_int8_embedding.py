"""The Triton kernel of ``int8_embedding``: the reference's bits, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lissom.ops import int8_embedding
from lissom.testing import DTYPES, EMBEDDING_CASES, assert_same_bits

pytestmark = pytest.mark.triton


def table(rows: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randint(-127, 128, (rows, width), dtype=torch.int8).to(device),
        torch.rand(rows).add(0.5).to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_same_bits(triton_device: str, case: tuple, dtype: torch.dtype, index_dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    shape, rows, width = case
    qweight, scale = table(rows, width, triton_device)
    indices = torch.randint(0, rows, shape).to(triton_device, index_dtype)
    y = int8_embedding(indices, qweight, scale, dtype=dtype, backend="triton")
    assert_same_bits(y, int8_embedding(indices, qweight, scale, dtype=dtype, backend="reference"))


def test_strides(triton_device: str) -> None:
    qweight, scale = table(20, 64, triton_device)
    indices = torch.arange(12, device=triton_device).reshape(3, 4).t()
    for q in (qweight[:, ::2], qweight[::2].t().contiguous().t(), qweight[:10, 3:40]):
        y = int8_embedding(indices % q.shape[0], q, scale[: q.shape[0]], backend="triton")
        expected = int8_embedding(indices % q.shape[0], q, scale[: q.shape[0]], backend="reference")
        assert_same_bits(y, expected)


def test_out_of_range(triton_device: str) -> None:
    qweight, scale = table(7, 5, triton_device)
    indices = torch.tensor([0, 7, -1, 6], device=triton_device)
    if triton_device == "cpu":
        with pytest.raises(
            IndexError, match=r"int8_embedding: index 7 is out of range for a table of 7 rows"
        ):
            int8_embedding(indices, qweight, scale, backend="triton")
        return
    y = int8_embedding(indices, qweight, scale, backend="triton")
    assert y.isnan().all(1).tolist() == [False, True, True, False]
