"""``int8_embedding``: a program gathers some columns of some rows and scales them. Page: ``reference/``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Compilation, Tile, ceil_div, launch, on_device, power_of_two

__all__ = ["compilations", "int8_embedding"]


@triton.jit
def int8_embedding_kernel(
    indices,
    qweight,
    weight_scale,
    out,
    count,
    rows,
    width,
    row_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[i, :] = weight_scale[indices[i]] * qweight[indices[i], :]; one rounding to out's type.

    The row of an index out of range is NaN: nobody waits for the GPU to raise an error, and nothing outside
    the table is read.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    index = tl.load(indices + row, mask=row < count, other=0).to(tl.int64)
    valid = (index >= 0) & (index < rows)
    index = tl.where(valid, index, 0)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = index[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
    q = tl.load(qweight + at, mask=inside & valid[:, None], other=0).to(tl.float32)
    scale = tl.load(weight_scale + index, mask=(row < count) & valid, other=0.0)
    scale = tl.where(valid, scale, float("nan"))
    y = q * scale[:, None]
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=inside)


def _tile(width: int) -> Tile:
    """About 2048 elements a program: 16 bytes of output a thread, several loads in flight."""
    columns = min(1024, max(16, power_of_two(width)))
    return Tile({"BLOCK_ROWS": max(1, 2048 // columns), "BLOCK_COLUMNS": columns}, num_warps=4, num_stages=1)


def int8_embedding(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``indices`` [I], ``qweight`` int8 [V, D] of any strides, ``weight_scale`` float32 [V] → [I, D]."""
    count, width = indices.numel(), qweight.shape[1]
    out = torch.empty((count, width), dtype=dtype, device=qweight.device)
    if out.numel() == 0:
        return out
    tile = _tile(width)
    grid = (ceil_div(count, tile.sizes["BLOCK_ROWS"]), ceil_div(width, tile.sizes["BLOCK_COLUMNS"]))
    with on_device(qweight):
        launch(
            int8_embedding_kernel,
            grid,
            indices.contiguous(),
            qweight,
            weight_scale.contiguous(),
            out,
            count,
            *qweight.shape,
            *qweight.stride(),
            **tile.options(),
        )
    return out


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles."""
    types = {
        "indices": "*i64",
        "qweight": "*i8",
        "weight_scale": "*fp32",
        "count": "i32",
        "rows": "i32",
        "width": "i32",
        "row_stride": "i32",
        "column_stride": "i32",
    }
    return [
        Compilation(
            f"int8_embedding {out[1:]} width={width}",
            int8_embedding_kernel,
            {**types, "out": out},
            {},
            _tile(width),
            aligned=("indices", "qweight", "weight_scale", "out", "width", "row_stride"),
        )
        for out, width in (("*fp32", 384), ("*bf16", 4096), ("*fp16", 100))
    ]
