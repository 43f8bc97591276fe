"""Block-sparse linear, the textbook page.

The weight ``[N, K]`` is cut into blocks of ``(bh, bw)``, some of which are stored, listed by block rows::

    y[m, n] = act( Σ_k x[m, k] w[n, k] + bias[n] )     over the stored k of n's block row
    dL/dx   = dL/dy · W                                over the stored blocks
    dL/dW   = (dL/dy)ᵀ · x                             at the stored blocks

An x that meets no stored block has no influence, not even NaN. Sums are float32, in an order left open, and
rounded once to the output dtype. With int8 values, x is quantized as for ``int8_linear``, and the result has
its bits: the sum is an exact integer, a row with NaN or infinity anywhere comes out as NaN::

    y[m, n] = act( fma( float(Σ_k qx[m, k] q[n, k]), x_scale[m] * w_scale[n], bias[n] ) )

Blocks: Narang et al., "Block-Sparse Recurrent Neural Networks", 2017; the layout is ``torch.sparse_bsr``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .._block_sparse_formats import without_block_padding
from ..formats import BlockSparseWeights, dequantize_block_sparse
from .int8_linear import quantize_rows
from .numerics import apply_activation, fma

__all__ = ["block_sparse_grad_input", "block_sparse_grad_values", "block_sparse_linear"]


def block_sparse_linear(
    x: Tensor, weights: BlockSparseWeights, bias: Tensor | None = None, act_fn: str | None = None
) -> Tensor:
    """``x`` [M, K], ``weights`` [N, K], ``bias`` [N] or None → [M, N] like x."""
    n = weights.out_features
    offset = x.new_zeros(n, dtype=torch.float32) if bias is None else bias.float()
    if weights.weight_scale is None:
        y = _product(x.float(), weights) + offset
    else:
        qx, x_scale = quantize_rows(x)
        # float64 holds every int32 sum exactly and, unlike an integer matmul, is fast everywhere.
        total = _product(qx.double(), weights).float()
        y = fma(total, x_scale[:, None] * weights.weight_scale[None, :], offset.expand_as(total))
    return apply_activation(y, act_fn).to(x.dtype)


def block_sparse_grad_input(grad: Tensor, weights: BlockSparseWeights) -> Tensor:
    """``grad`` [M, N], ``weights`` [N, K] → grad · W, [M, K] like grad. int8 values are dequantized."""
    w = weights if weights.weight_scale is None else dequantize_block_sparse(weights)
    rows = _padded(grad.float(), w.block_rows * w.block_shape[0])
    total = rows.new_zeros(grad.shape[0], w.block_columns * w.block_shape[1])
    for outputs, inputs, stored in _block_rows(w):
        total[:, inputs] += rows[:, outputs] @ _matrix(w.values[stored].float())
    return total[:, : w.in_features].to(grad.dtype)


def block_sparse_grad_values(grad: Tensor, x: Tensor, weights: BlockSparseWeights) -> Tensor:
    """``grad`` [M, N], ``x`` [M, K], the places of ``weights`` → gradᵀ · x there, float32 [B, bh, bw]."""
    height, width = weights.block_shape
    rows = _padded(grad.float(), weights.block_rows * height)
    columns = _padded(x.float(), weights.block_columns * width)
    values = torch.zeros_like(weights.values, dtype=torch.float32)
    for outputs, inputs, stored in _block_rows(weights):
        product = rows[:, outputs].t() @ columns[:, inputs]
        values[stored] = product.view(height, -1, width).transpose(0, 1)
    return without_block_padding(replace(weights, values=values, weight_scale=None))


def _product(x: Tensor, w: BlockSparseWeights) -> Tensor:
    """``x`` [M, K] times the stored values (without scales), [M, N], in x's dtype."""
    height, width = w.block_shape
    x = _padded(x, w.block_columns * width)
    total = x.new_zeros(x.shape[0], w.block_rows * height)
    for outputs, inputs, stored in _block_rows(w):
        total[:, outputs] = x[:, inputs] @ _matrix(w.values[stored].to(x.dtype)).t()
    return total[:, : w.out_features]


def _block_rows(w: BlockSparseWeights) -> Iterator[tuple[slice, Tensor, slice]]:
    """Per block row that stores anything: its outputs, the inputs it meets, and its blocks."""
    height, width = w.block_shape
    bounds = w.crow_indices.tolist()
    offsets = torch.arange(width, device=w.values.device)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            inputs = (w.col_indices[begin:end, None].long() * width + offsets).flatten()
            yield slice(row * height, (row + 1) * height), inputs, slice(begin, end)


def _matrix(blocks: Tensor) -> Tensor:
    """Blocks of one row ``[c, bh, bw]`` side by side: ``[bh, c*bw]``."""
    return blocks.transpose(0, 1).flatten(1)


def _padded(x: Tensor, width: int) -> Tensor:
    """``x`` with zero columns up to ``width``: what the padding of blocks meets."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
