"""The CUDA kernel of ``int8_embedding``: the reference's bits, on a GPU or in the emulator."""

from __future__ import annotations

import pytest
import torch

from lissom import _cuda, _native
from lissom.ops import int8_embedding
from lissom.testing import DTYPES, EMBEDDING_CASES, assert_same_bits

pytestmark = pytest.mark.cuda


def table(rows: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    qweight = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    return qweight.to(device), torch.rand(rows).add(0.5).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
def test_same_bits(cuda_device: str, case: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    shape, rows, width = case
    qweight, scale = table(rows, width, cuda_device)
    for index_dtype in (torch.int64, torch.int32):
        indices = torch.randint(0, rows, shape).to(cuda_device, index_dtype)
        y = int8_embedding(indices, qweight, scale, dtype=dtype, backend="cuda")
        assert_same_bits(y, int8_embedding(indices, qweight, scale, dtype=dtype, backend="reference"))


def test_strides(cuda_device: str) -> None:
    qweight, scale = table(20, 64, cuda_device)
    indices = torch.arange(12, device=cuda_device).reshape(3, 4).t()
    for q in (
        qweight[:, ::2],
        qweight[::2],
        qweight[::2].t().contiguous().t(),
        qweight[:10, 3:40],
        qweight[:, 4:36],
    ):
        at = indices % q.shape[0]
        y = int8_embedding(at, q, scale[: q.shape[0]], backend="cuda")
        assert_same_bits(y, int8_embedding(at, q, scale[: q.shape[0]], backend="reference"))


def test_a_row_that_is_not_there_is_nan(cuda_device: str) -> None:
    qweight, scale = table(7, 5, cuda_device)
    indices = torch.tensor([0, 7, -1, 6], device=cuda_device)
    y = torch.zeros(4, 5, device=cuda_device)
    args = (indices.data_ptr(), True, 4, qweight.data_ptr(), 5, 7, 5, scale.data_ptr(), y.data_ptr())
    _cuda.call("int8_embedding", qweight, *args, _native.DTYPES[torch.float32])
    assert y.isnan().all(1).tolist() == [False, True, True, False]


def test_bad_sizes(cuda_device: str) -> None:
    q, _ = table(7, 5, cuda_device)
    with pytest.raises(ValueError, match=r"int8_embedding: row_stride=4 is less than a row of 5"):
        _cuda.call("int8_embedding", q, 0, True, 4, q.data_ptr(), 4, 7, 5, 0, 0, 0)
    with pytest.raises(ValueError, match=r"int8_embedding: \d+ blocks are more than a launch can have"):
        _cuda.call("int8_embedding", q, 0, True, 2**44, q.data_ptr(), 5, 7, 5, 0, 0, 0)
