"""``int4_embedding``: a program gathers bytes of some rows, two columns each. Page: ``reference/``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lissom.formats import Int4Weights

from .tiles import Compilation, Tile, ceil_div, launch, on_device, power_of_two

__all__ = ["compilations", "int4_embedding"]


@triton.jit
def int4_embedding_kernel(
    indices,
    qweight,
    weight_scale,
    zero_point,
    out,
    count,
    rows,
    width,
    row_stride,
    column_stride,
    groups,
    group_bytes,
    ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """out[i, k] = fma(q - 8, s, s * (8 - zero_point)) of row indices[i]; one rounding to out's type.

    The row of an index out of range is NaN: nobody waits for the GPU to raise an error, and nothing outside
    the table is read.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    index = tl.load(indices + row, mask=row < count, other=0).to(tl.int64)
    valid = (index >= 0) & (index < rows)
    index = tl.where(valid, index, 0)
    inside = ((row < count) & valid)[:, None] & (byte < (width + 1) // 2)[None, :]
    at = index[:, None] * row_stride + byte[None, :].to(tl.int64) * column_stride
    codes = tl.load(qweight + at, mask=inside, other=0)
    # Groups have an even number of columns: both of a byte are in one.
    group_at = index[:, None] * groups + (byte // group_bytes)[None, :]
    scale = tl.load(weight_scale + group_at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(valid[:, None], scale, float("nan"))
    offset = tl.zeros(scale.shape, tl.float32)
    if ZERO:
        offset = scale * (8.0 - tl.load(zero_point + group_at, mask=inside, other=0).to(tl.float32))
    low = tl.fma((codes & 15).to(tl.float32) - 8.0, scale, offset)
    high = tl.fma((codes >> 4).to(tl.float32) - 8.0, scale, offset)
    y = tl.reshape(tl.join(low, high), (BLOCK_ROWS, 2 * BLOCK_BYTES))
    column = tl.program_id(1) * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)
    stored = (row < count)[:, None] & (column < width)[None, :]
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=stored)


def _tile(width: int) -> Tile:
    """About 2048 elements a program: 16 bytes of output a thread, several loads in flight."""
    columns = min(1024, max(16, power_of_two(width)))
    sizes = {"BLOCK_ROWS": max(1, 2048 // columns), "BLOCK_BYTES": columns // 2}
    return Tile(sizes, num_warps=4, num_stages=1)


def int4_embedding(indices: Tensor, weights: Int4Weights, dtype: torch.dtype) -> Tensor:
    """``indices`` [I], ``weights`` [V, D], uniform, of any strides → [I, D]."""
    count, width, qweight = indices.numel(), weights.in_features, weights.qweight
    out = torch.empty((count, width), dtype=dtype, device=qweight.device)
    if out.numel() == 0:
        return out
    tile, zero_point = _tile(width), weights.zero_point
    scale = weights.weight_scale.contiguous()
    group = width if weights.group_size == -1 else weights.group_size
    grid = (ceil_div(count, tile.sizes["BLOCK_ROWS"]), ceil_div(width, 2 * tile.sizes["BLOCK_BYTES"]))
    with on_device(qweight):
        launch(
            int4_embedding_kernel,
            grid,
            indices.contiguous(),
            qweight,
            scale,
            scale if zero_point is None else zero_point.contiguous(),
            out,
            count,
            weights.out_features,
            width,
            *qweight.stride(),
            scale.shape[1],
            ceil_div(group, 2),
            ZERO=zero_point is not None,
            enable_fp_fusion=False,  # the page rounds s * (8 - zero_point)
            **tile.options(),
        )
    return out


def compilations() -> list[Compilation]:
    """What ``tests/test_triton_compile.py`` compiles."""
    sizes = ("count", "rows", "width", "row_stride", "column_stride", "groups", "group_bytes")
    pointers = {"indices": "*i64", "qweight": "*u8"}
    return [
        Compilation(
            f"int4_embedding {out[1:]} {scale[1:]} zero={zero} width={width}",
            int4_embedding_kernel,
            {
                **pointers,
                "weight_scale": scale,
                "zero_point": zero or scale,
                "out": out,
                **dict.fromkeys(sizes, "i32"),
            },
            {"ZERO": zero is not None, "column_stride": 1},
            _tile(width),
            aligned=("indices", "qweight", "weight_scale", "zero_point", "out", "width", "row_stride"),
            fp_fusion=False,
        )
        for out, scale, zero, width in (
            ("*fp32", "*fp32", None, 384),
            ("*bf16", "*fp16", "*u8", 4096),
            ("*fp16", "*bf16", "*fp16", 100),
        )
    ]
