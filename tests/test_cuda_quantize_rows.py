"""The CUDA kernel that quantizes rows of activations: the reference's bits, on a GPU or in the emulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lissom import _cuda, _native
from lissom.formats import ROTATION_BLOCK, rotate
from lissom.reference.int8_linear import quantize_rows as reference
from lissom.testing import DTYPES, assert_same_bits, rows

pytestmark = pytest.mark.cuda


def quantize_rows(
    x: Tensor, input_scale: Tensor | None = None, rotated: bool = False, padding: int = 0
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    stride = -(-k // 16) * 16 + padding
    q = torch.full((m, stride), 99, dtype=torch.int8, device=x.device)
    scale = torch.full((m,), 99.0, device=x.device)
    _cuda.call(
        "quantize_rows",
        *(x, x.data_ptr(), _native.DTYPES[x.dtype], x.stride(0), m, k),
        0 if input_scale is None else input_scale.data_ptr(),
        *(rotated, q.data_ptr(), stride, scale.data_ptr()),
    )
    assert not q[:, k:].any()
    return q[:, :k], scale


def check(x: Tensor, input_scale: Tensor | None = None, rotated: bool = False, padding: int = 0) -> None:
    q, scale = quantize_rows(x, input_scale, rotated, padding)
    seen = rotate(x.float(), 1 / ROTATION_BLOCK) if rotated else x
    expected = reference(seen, input_scale)
    assert_same_bits(q, expected[0])
    assert_same_bits(scale, expected[1])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_same_bits(cuda_device: str, static: bool, dtype: torch.dtype, rotated: bool) -> None:
    scale = torch.tensor(0.03, device=cuda_device) if static else None
    for m, k, padding in (
        (0, 5, 0),
        (1, 0, 0),
        (9, 1, 16),
        (10, 16, 0),
        (9, 45, 32),
        (5, 384, 0),
        (9, 700, 0),
    ):
        check(rows(m, k, dtype).to(cuda_device), scale, rotated, padding)


@pytest.mark.parametrize("rotated", [False, True])
def test_rows_longer_than_the_threads_hold(cuda_device: str, rotated: bool) -> None:
    check(rows(2, 16 * 1024 + 40, torch.bfloat16).to(cuda_device), rotated=rotated)


def test_strides_and_addresses(cuda_device: str) -> None:
    x = rows(18, 131).to(cuda_device)
    for view in (x[:, :64], x[:, 3:67], x[::2, 4:], x[1:]):
        check(view)
        check(view.half(), rotated=True)


def test_rows_with_nan_or_infinity(cuda_device: str) -> None:
    for dtype in DTYPES:
        x = rows(9, 45, dtype, kind="normal")
        x[2, 44], x[5, 0], x[7, 17] = float("nan"), float("inf"), -float("inf")
        for rotated in (False, True):
            check(x.to(cuda_device), None, rotated)
            check(x.to(cuda_device), torch.tensor(0.1, device=cuda_device), rotated)


def test_bad_arguments(cuda_device: str) -> None:
    x = torch.zeros(2, 20, device=cuda_device)
    with pytest.raises(ValueError, match=r"quantize_rows: q_stride=20 must be a multiple of 16"):
        _cuda.call("quantize_rows", x, x.data_ptr(), 0, 20, 2, 20, 0, False, 0, 20, 0)
    with pytest.raises(ValueError, match=r"quantize_rows: q must lie on a multiple of 16 bytes"):
        _cuda.call("quantize_rows", x, x.data_ptr(), 0, 20, 2, 20, 0, False, 8, 32, 0)
    with pytest.raises(ValueError, match=r"quantize_rows: x_stride=10 is less than k=20"):
        _cuda.call("quantize_rows", x, x.data_ptr(), 0, 10, 2, 20, 0, False, 0, 32, 0)
