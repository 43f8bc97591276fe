"""Block-sparse weights: the canonical and the packed layout. Users import from ``lissom.formats``.

This file and ``csrc/common/formats.h`` are the only owners of the layouts.

*Canonical* layout (:class:`BlockSparseWeights`), in the terms of ``torch.sparse_bsr``: the weight ``[N, K]``
is cut into blocks of ``(bh, bw)``, the last row and column of blocks filled up with zeros, and the stored
blocks are listed by rows of blocks, left to right::

    values        [B, bh, bw]           float32, bfloat16, float16 or int8
    crow_indices  int32 [ceil(N/bh)+1]  blocks of block row r: crow_indices[r] … crow_indices[r+1]-1
    col_indices   int32 [B]             their block columns, increasing inside a block row
    weight_scale  float32 [N]           int8 only: W = q * scale, symmetric per output channel

*Packed* layout (a cache that kernels read, int8 only; float values are used as they are): bytes, in regions
that begin at multiples of 64, the end filled up with zeros::

    A   int32 offsets[R*bh]             -128 * sum of the output's stored q (offset of u8 activations);
                                        R = ceil(N/bh)
    bw divisible by 4, "quads":
    D   int8  units[B*bw/4][bh][4]      unit u of a block holds its columns 4u … 4u+3, of all its bh outputs
    any other bw, "gathered": the columns of a block row's blocks, k = col*bw + c, are listed block by block
    and cut into groups of 4; the last group of a row repeats its last k, with zero weights
    B   int32 unit_offsets[R+1]         units of block row r: unit_offsets[r] … unit_offsets[r+1]-1
    C   int32 k[units][4]               at most ceil(K/bw)*bw - 1: k ≥ K meets zero weights only
    D   int8  units[units][bh][4]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = [
    "BLOCK_SPARSE_DTYPES",
    "BlockSparseWeights",
    "block_mask",
    "block_sparse_from_dense",
    "block_sparse_from_torch",
    "block_sparse_to_dense",
    "block_sparse_to_torch",
    "check_block_sparse",
    "check_block_sparse_indices",
    "check_block_sparse_shapes",
    "dequantize_block_sparse",
    "pack_block_sparse",
    "packed_block_sparse_bytes",
    "quantize_block_sparse",
]

BLOCK_SPARSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""What the stored values may be."""

MAX_BLOCKS = 2**31 - 1
"""Blocks that int32 indices can count."""

PACKED_ALIGNMENT = 64
"""Bytes: a cache line, at which every packed region begins."""

PACKED_QUAD = 4
"""Columns of one packed unit."""


@dataclass(frozen=True, eq=False)
class BlockSparseWeights:
    """A weight ``[N, K]`` of which only some blocks are stored. :func:`check_block_sparse` judges it.

    Attributes:
        values: ``[B, bh, bw]``, float32, bfloat16, float16 or int8 (in [-127, 127]); zero past N and K.
        crow_indices: int32 ``[ceil(N/bh) + 1]``, as ``torch.sparse_bsr`` has them.
        col_indices: int32 ``[B]``, below ``ceil(K/bw)``, strictly increasing inside a block row.
        weight_scale: float32 ``[N]`` with int8 values, otherwise None.
        out_features: N.
        in_features: K.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    weight_scale: Tensor | None = None
    out_features: int = field(kw_only=True)
    in_features: int = field(kw_only=True)

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(bh, bw)``: outputs and inputs of a block."""
        _, height, width = self.values.shape
        return height, width

    @property
    def block_rows(self) -> int:
        """``ceil(N / bh)``."""
        return -(-self.out_features // self.values.shape[1])

    @property
    def block_columns(self) -> int:
        """``ceil(K / bw)``."""
        return -(-self.in_features // self.values.shape[2])

    @property
    def density(self) -> float:
        """Stored values inside ``[N, K]`` as a share of N·K; 0 where there is no weight at all."""
        total = self.out_features * self.in_features
        if not total:
            return 0.0
        blocks, height, width = self.values.shape
        stored = blocks * height * width
        low = self.block_rows * height - self.out_features
        right = self.block_columns * width - self.in_features
        if low:
            stored -= low * width * (blocks - int(self.crow_indices[-2]))
        if right:
            stored -= right * height * int((self.col_indices == self.block_columns - 1).sum())
        if low and right:
            last = self.col_indices[int(self.crow_indices[-2]) :]
            stored += low * right * int((last == self.block_columns - 1).sum())
        return stored / total


def _seen(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def check_block_shape(block_shape: tuple[int, int], who: str) -> tuple[int, int]:
    height, width = block_shape
    if height < 1 or width < 1:
        raise ValueError(
            f"{who}: block_shape={tuple(block_shape)} cannot be; both sizes must be at least 1, as in (8, 1)"
        )
    return height, width


def _check_count(blocks: int, who: str) -> None:
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"{who}: {blocks} blocks are more than int32 indices can count ({MAX_BLOCKS}); use larger blocks"
        )


# ------------------------------------------------------------------------------------------- checks


def check_block_sparse_shapes(weights: BlockSparseWeights, who: str = "BlockSparseWeights") -> None:
    """Raise unless sizes, shapes and dtypes fit together; looks at no value, so it is cheap.

    Raises:
        TypeError, ValueError: names (after ``who``) the field, what it is and what it must be.
    """
    w = weights
    n, k = w.out_features, w.in_features
    if n < 0 or k < 0:
        raise ValueError(f"{who}: out_features={n}, in_features={k} cannot be; both must be at least 0")
    if w.values.dtype not in BLOCK_SPARSE_DTYPES:
        raise TypeError(
            f"{who}: values must be float32, bfloat16, float16 or int8, got {_seen(w.values)}; "
            "convert them (for example values.float())"
        )
    if w.values.dim() != 3:
        raise ValueError(
            f"{who}: values must have shape [B, bh, bw] (stored blocks, and outputs and inputs of a block), "
            f"got {_seen(w.values)}"
        )
    blocks, height, width = w.values.shape
    check_block_shape((height, width), who)
    _check_count(blocks, who)
    rows = w.block_rows
    if w.crow_indices.dtype != torch.int32 or w.crow_indices.shape != (rows + 1,):
        raise ValueError(
            f"{who}: crow_indices must be int32 [{rows + 1}] for N={n} in blocks of {height} outputs, got "
            f"{_seen(w.crow_indices)}"
        )
    if w.col_indices.dtype != torch.int32 or w.col_indices.shape != (blocks,):
        raise ValueError(
            f"{who}: col_indices must be int32 [{blocks}], one per stored block, got {_seen(w.col_indices)}"
        )
    if w.values.dtype == torch.int8:
        if w.weight_scale is None:
            raise ValueError(f"{who}: int8 values need a weight_scale, float32 [{n}]; got None")
        if w.weight_scale.dtype != torch.float32 or w.weight_scale.shape != (n,):
            raise ValueError(f"{who}: weight_scale must be float32 [{n}], got {_seen(w.weight_scale)}")
    elif w.weight_scale is not None:
        raise ValueError(
            f"{who}: weight_scale has no meaning with {w.values.dtype} values, only with int8; leave it out"
        )


def check_block_sparse_indices(weights: BlockSparseWeights, who: str = "BlockSparseWeights") -> None:
    """Raise unless the indices name blocks inside the weight, each once and in order. Shapes must fit.

    Raises:
        ValueError: names (after ``who``) the first index that is wrong, and what it must be.
    """
    crow, col = weights.crow_indices, weights.col_indices
    blocks, columns = weights.values.shape[0], weights.block_columns

    def first(wrong: Tensor) -> int:
        return int(wrong.to(torch.uint8).argmax())

    if int(crow[0]) != 0:
        raise ValueError(f"{who}: crow_indices[0] is {int(crow[0])}; it must be 0")
    falls = crow[1:] < crow[:-1]
    if bool(falls.any()):
        i = first(falls) + 1
        raise ValueError(
            f"{who}: crow_indices[{i}] is {int(crow[i])}, below crow_indices[{i - 1}] = {int(crow[i - 1])}; "
            "they must not fall"
        )
    if int(crow[-1]) != blocks:
        raise ValueError(
            f"{who}: crow_indices[{len(crow) - 1}] is {int(crow[-1])}; the last one must be the number of "
            f"stored blocks, {blocks}"
        )
    outside = (col < 0) | (col >= columns)
    if bool(outside.any()):
        i = first(outside)
        fix = f"K={weights.in_features} has no block columns"
        if columns:
            fix = (
                f"use 0 to {columns - 1}, the block columns of K={weights.in_features} in blocks of "
                f"{weights.block_shape[1]} inputs"
            )
        raise ValueError(f"{who}: col_indices[{i}] is {int(col[i])}; {fix}")
    if blocks:
        stays = col[1:] <= col[:-1]
        begins = crow[1:-1]  # the first block of a row may lie left of the one before it
        stays[(begins[(begins > 0) & (begins < blocks)] - 1).long()] = False
        if bool(stays.any()):
            i = first(stays) + 1
            raise ValueError(
                f"{who}: col_indices[{i}] is {int(col[i])}, after {int(col[i - 1])} in the same block row; "
                "they must increase: sort the blocks of a row, and add up those stored twice"
            )


def float16_fault(values: Tensor) -> str:
    """What of floats ``values`` is not finite in float16, and the fix; ``""`` where all are, or on meta."""
    if values.is_meta:
        return ""
    wrong = ~torch.isfinite(values.detach().to(torch.float16))
    if not bool(wrong.any()):
        return ""
    value = values[wrong][0].item()
    return f"holds {value:g}, and float16 values must be finite and at most 65504; use bfloat16 or float32"


def check_block_sparse(weights: BlockSparseWeights, who: str = "BlockSparseWeights") -> None:
    """Raise unless ``weights`` are sound, values included: what comes from outside goes through this.

    Raises:
        TypeError, ValueError: names (after ``who``) the field, the place, the value and the fix.
    """
    check_block_sparse_shapes(weights, who)
    check_block_sparse_indices(weights, who)
    w = weights
    for axis, size, edge, inside in _padding(w):
        padding = w.values[edge].narrow(axis + 1, inside, w.block_shape[axis] - inside)
        wrong = padding != 0
        if bool(wrong.any()):
            b, i, j = (int(p) for p in wrong.nonzero()[0])
            place = [int(edge[b]), i + inside * (axis == 0), j + inside * (axis == 1)]
            raise ValueError(
                f"{who}: values{place} is {padding[b, i, j].item()}, past {'NK'[axis]}={size}; values "
                "outside the weight must be 0: was it made for another size?"
            )
    if w.weight_scale is None:
        return
    wrong = ~((w.weight_scale >= 0) & w.weight_scale.isfinite())
    if bool(wrong.any()):
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"{who}: weight_scale[{n}] is {float(w.weight_scale[n])}; scales must be finite and not "
            "negative: repair the checkpoint"
        )
    low = w.values == -128
    if bool(low.any()):
        place = [int(p) for p in low.nonzero()[0]]
        raise ValueError(f"{who}: values{place} is -128; int8 values must lie in [-127, 127]")


def _padding(w: BlockSparseWeights) -> Iterator[tuple[int, int, Tensor, int]]:
    """Blocks that the weight's lower (axis 0) or right edge (axis 1) cuts.

    Per edge: the axis, N or K, int64 indices of those blocks, and how much of them lies inside.
    """
    height, width = w.block_shape
    blocks = w.values.shape[0]
    if w.out_features % height:
        begin = int(w.crow_indices[-2])
        yield 0, w.out_features, torch.arange(begin, blocks, device=w.values.device), w.out_features % height
    if w.in_features % width:
        edge = (w.col_indices == w.block_columns - 1).nonzero().squeeze(1)
        yield 1, w.in_features, edge, w.in_features % width


def without_block_padding(w: BlockSparseWeights) -> Tensor:
    """The values with zeros past N and K. Looks at no index, so that it can be traced."""
    values, device = w.values, w.values.device
    blocks, height, width = values.shape
    if inside := w.out_features % height:
        edge = torch.arange(blocks, device=device) >= w.crow_indices[-2]
        past = torch.arange(height, device=device) >= inside
        values = values.masked_fill((edge[:, None] & past)[:, :, None], 0)
    if inside := w.in_features % width:
        edge = w.col_indices == w.block_columns - 1
        past = torch.arange(width, device=device) >= inside
        values = values.masked_fill((edge[:, None] & past)[:, None, :], 0)
    return values


# ------------------------------------------------------------------------------------------- dense


def block_mask(mask_or_weight: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """bool ``[ceil(N/bh), ceil(K/bw)]``: which blocks of ``[N, K]`` hold an element other than 0 or False."""
    height, width = check_block_shape(block_shape, "block_mask")
    if mask_or_weight.dim() != 2:
        raise ValueError(f"block_mask: needs two dimensions, [N, K], got shape {tuple(mask_or_weight.shape)}")
    kept = mask_or_weight if mask_or_weight.dtype == torch.bool else mask_or_weight != 0
    n, k = kept.shape
    mask = kept.new_zeros(-(-n // height), -(-k // width))
    for blocks, row, column in _regions(kept, (height, width)):
        mask[row : row + blocks.shape[0], column : column + blocks.shape[2]] = blocks.any(dim=3).any(dim=1)
    return mask


def _regions(matrix: Tensor, block_shape: tuple[int, int]) -> Iterator[tuple[Tensor, int, int]]:
    """Views ``[block rows, h, block columns, w]``: of whole blocks, of those an edge cuts, of the corner.

    Each with its first block row and column; none is empty. So the matrix needs no padded copy.
    """
    (n, k), (height, width) = matrix.shape, block_shape
    for row, h, rows in ((0, height, n // height), (n // height, n % height, 1)):
        for column, w, columns in ((0, width, k // width), (k // width, k % width, 1)):
            if rows * h and columns * w:
                part = matrix[row * height :, column * width :][: rows * h, : columns * w]
                yield part.unflatten(1, (columns, w)).unflatten(0, (rows, h)), row, column


def _places(
    matrix: Tensor, block_shape: tuple[int, int], rows: Tensor, columns: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per region: its view, which of the blocks at ``(rows, columns)`` lie there, and where in the view."""
    for view, row, column in _regions(matrix, block_shape):
        here = (rows >= row) & (rows < row + view.shape[0])
        here &= (columns >= column) & (columns < column + view.shape[2])
        which = here.nonzero().squeeze(1)
        yield view, which, rows[which] - row, columns[which] - column


def block_sparse_from_dense(
    weight: Tensor, mask: Tensor, block_shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> BlockSparseWeights:
    """Keep the blocks of ``weight`` that ``mask`` names.

    Args:
        weight: ``[N, K]``, any floating dtype.
        mask: bool ``[ceil(N/bh), ceil(K/bw)]``; :func:`block_mask` makes one from elements.
        block_shape: ``(bh, bw)``; N and K need not divide.
        dtype: of the values: float32, bfloat16, float16, or int8 (see :func:`quantize_block_sparse`).

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; NaN or infinity with int8; with float16 a
            kept weight that it cannot hold.
    """
    who = "block_sparse_from_dense"
    height, width = check_block_shape(block_shape, who)
    if dtype not in BLOCK_SPARSE_DTYPES:
        raise TypeError(
            f"{who}: dtype={dtype} cannot be; use torch.float32, torch.bfloat16, torch.float16 or torch.int8"
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{who}: weight must be floating point [N, K], got {_seen(weight)}")
    n, k = weight.shape
    shape = (-(-n // height), -(-k // width))
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{who}: mask must be bool {shape}, one per block of {(height, width)} of the weight {(n, k)}, "
            f"got {_seen(mask)}; make it from a mask of elements with lissom.formats.block_mask"
        )
    weight = weight.detach()
    _check_count(int(mask.sum()), who)
    rows, columns = mask.to(weight.device).nonzero(as_tuple=True)
    kept = dtype if dtype.is_floating_point else torch.float32
    values = torch.zeros(len(rows), height, width, dtype=kept, device=weight.device)
    for view, which, row, column in _places(weight, (height, width), rows, columns):
        part = view[row, :, column, :]
        if kept == torch.float16 and (fault := float16_fault(part)):
            raise ValueError(f"{who}: weight {fault}")
        values[which, : view.shape[1], : view.shape[3]] = part.to(kept)
    w = _assembled(values, rows, columns, n, k)
    return quantize_block_sparse(w) if dtype == torch.int8 else w


def _assembled(values: Tensor, rows: Tensor, columns: Tensor, n: int, k: int) -> BlockSparseWeights:
    """Blocks, in order, with the block row and column of each."""
    count = -(-n // values.shape[1])
    crow = torch.zeros(count + 1, dtype=torch.int32, device=values.device)
    crow[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return BlockSparseWeights(values, crow, columns.to(torch.int32), out_features=n, in_features=k)


def _rows_of_blocks(w: BlockSparseWeights) -> Tensor:
    """int64 ``[B]``: the block row of every block."""
    counts = w.crow_indices.diff()
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=len(w.col_indices))


def _per_block(per_output: Tensor, w: BlockSparseWeights) -> Tensor:
    """``[N]`` as ``[B, bh]``: what belongs to the outputs of every block; zeros past N."""
    height = w.block_shape[0]
    padded = per_output.new_zeros(w.block_rows * height)
    padded[: w.out_features] = per_output
    return padded.view(w.block_rows, height)[_rows_of_blocks(w)]


def block_sparse_to_dense(weights: BlockSparseWeights, dtype: torch.dtype | None = None) -> Tensor:
    """``[N, K]`` with zeros where nothing is stored. ``dtype`` None: that of the values, float32 for int8."""
    w = dequantize_block_sparse(weights) if weights.values.dtype == torch.int8 else weights
    dense = torch.zeros(w.out_features, w.in_features, dtype=dtype or w.values.dtype, device=w.values.device)
    for view, which, row, column in _places(dense, w.block_shape, _rows_of_blocks(w), w.col_indices.long()):
        view[row, :, column, :] = w.values[which, : view.shape[1], : view.shape[3]].to(dense.dtype)
    return dense


# ------------------------------------------------------------------------------------------- torch


def block_sparse_from_torch(tensor: Tensor, block_shape: tuple[int, int] | None = None) -> BlockSparseWeights:
    """From a ``torch.sparse_bsr`` or ``torch.sparse_csr`` tensor ``[N, K]``.

    Args:
        tensor: float32, bfloat16 or float16.
        block_shape: None keeps the blocks of a BSR tensor, and takes a CSR tensor's as (1, 1). Otherwise
            every block in which the tensor stores an element is stored.

    Raises:
        TypeError, ValueError: another layout or dtype, batches, or indices that break the layout's rules.
    """
    who = "block_sparse_from_torch"
    if tensor.layout not in (torch.sparse_bsr, torch.sparse_csr):
        raise TypeError(
            f"{who}: layout {tensor.layout} cannot be read; use tensor.to_sparse_bsr(block_shape) or "
            "tensor.to_sparse_csr()"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{who}: dtype {tensor.dtype} cannot be read; use torch.float32, torch.bfloat16 or torch.float16 "
            "(for example tensor.float())"
        )
    if tensor.dim() != 2:
        raise ValueError(f"{who}: needs a single matrix [N, K], got shape {tuple(tensor.shape)}")
    tensor = tensor.detach()
    n, k = tensor.shape
    values = tensor.values()
    if tensor.layout == torch.sparse_csr:
        values = values[:, None, None]
    if values.dim() != 3:
        raise ValueError(
            f"{who}: values of shape {tuple(values.shape)} have dense dimensions; use a plain matrix"
        )
    _check_count(len(values), who)
    stored = BlockSparseWeights(
        values.contiguous(),
        tensor.crow_indices().to(torch.int32),
        tensor.col_indices().to(torch.int32),
        out_features=n,
        in_features=k,
    )
    check_block_sparse(stored, who)
    if block_shape is None or tuple(block_shape) == stored.block_shape:
        return stored
    height, width = check_block_shape(block_shape, who)
    row, column, values = _elements(stored)
    keys, block = torch.unique(row // height * -(-k // width) + column // width, return_inverse=True)
    _check_count(len(keys), who)
    blocks = values.new_zeros(len(keys), height, width)
    blocks[block, row % height, column % width] = values
    columns = max(-(-k // width), 1)
    return _assembled(blocks, keys // columns, keys % columns, n, k)


def _elements(w: BlockSparseWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of all stored elements inside ``[N, K]``, block by block."""
    height, width = w.block_shape
    device = w.values.device
    row = _rows_of_blocks(w)[:, None] * height + torch.arange(height, device=device)
    column = w.col_indices.long()[:, None] * width + torch.arange(width, device=device)
    rows, columns = (t.expand_as(w.values) for t in (row[:, :, None], column[:, None, :]))
    inside = (rows < w.out_features) & (columns < w.in_features)
    return rows[inside], columns[inside], w.values[inside]


def block_sparse_to_torch(weights: BlockSparseWeights, layout: torch.layout = torch.sparse_bsr) -> Tensor:
    """As a ``torch.sparse_bsr`` or ``torch.sparse_csr`` tensor ``[N, K]``; int8 is dequantized to float32.

    Raises:
        ValueError: another layout, or BSR where the blocks do not divide N and K.
    """
    who = "block_sparse_to_torch"
    w = dequantize_block_sparse(weights) if weights.values.dtype == torch.int8 else weights
    size = (w.out_features, w.in_features)
    height, width = w.block_shape
    if layout == torch.sparse_bsr:
        if size[0] % height or size[1] % width:
            raise ValueError(
                f"{who}: torch.sparse_bsr needs blocks that divide the weight, and {(height, width)} does "
                f"not divide {size}; use layout=torch.sparse_csr"
            )
        return torch.sparse_bsr_tensor(w.crow_indices, w.col_indices, w.values, size, check_invariants=False)
    if layout != torch.sparse_csr:
        raise ValueError(f"{who}: layout={layout} cannot be made; use torch.sparse_bsr or torch.sparse_csr")
    row, column, values = _elements(w)
    order = torch.argsort(row, stable=True)  # inside a row of elements, blocks lie left to right already
    index = torch.int32 if len(values) <= MAX_BLOCKS else torch.int64
    crow = torch.zeros(size[0] + 1, dtype=index, device=values.device)
    crow[1:] = torch.bincount(row, minlength=size[0]).cumsum(0)
    return torch.sparse_csr_tensor(crow, column[order].to(index), values[order], size, check_invariants=False)


# ------------------------------------------------------------------------------------------- int8


def quantize_block_sparse(weights: BlockSparseWeights) -> BlockSparseWeights:
    """Quantize float values to int8, symmetrically per output channel, as ``quantize_int8`` does rows.

    ``scale = absmax / 127`` over an output's stored values, ``q = round_half_even(w * (127 / absmax))``.

    Raises:
        ValueError: NaN or infinity among the values, or values that are int8 already.
    """
    who = "quantize_block_sparse"
    if weights.values.dtype == torch.int8:
        raise ValueError(f"{who}: the values are int8 already; give floating-point ones")
    height = weights.block_shape[0]
    values = weights.values.detach().float()
    rows = _rows_of_blocks(weights)
    peaks = values.abs().amax(dim=2)
    bad = ~torch.isfinite(peaks)
    if bool(bad.any()):
        b, i = (int(p) for p in bad.nonzero()[0])
        raise ValueError(
            f"{who}: weight row {int(rows[b]) * height + i} holds NaN or infinity; repair the checkpoint "
            "before compressing it"
        )
    absmax = values.new_zeros(weights.block_rows, height)
    absmax.scatter_reduce_(0, rows[:, None].expand_as(peaks), peaks, "amax")
    absmax = absmax.view(-1)[: weights.out_features]
    limit = torch.full_like(absmax, 127.0)  # a tensor: torch turns `127.0 / t` into a rounded reciprocal
    inverse = limit / absmax
    usable = torch.isfinite(inverse)
    inverse = torch.where(usable, inverse, torch.zeros_like(inverse))
    scale = torch.where(usable, absmax / limit, torch.zeros_like(absmax))
    q = (values * _per_block(inverse, weights)[:, :, None]).round_().to(torch.int8)
    return replace(weights, values=q, weight_scale=scale)


def dequantize_block_sparse(
    weights: BlockSparseWeights, dtype: torch.dtype = torch.float32
) -> BlockSparseWeights:
    """int8 values and their scales as values of ``dtype``: ``q * scale`` in float32, then rounded once."""
    if weights.weight_scale is None:
        raise ValueError(
            f"dequantize_block_sparse: the values are {weights.values.dtype}; only int8 ones have scales"
        )
    scale = _per_block(weights.weight_scale, weights)[:, :, None]
    return replace(weights, values=(weights.values.float() * scale).to(dtype), weight_scale=None)


def _aligned(size: int) -> int:
    return -(-size // PACKED_ALIGNMENT) * PACKED_ALIGNMENT


def _unit_offsets(w: BlockSparseWeights) -> Tensor:
    """int64 ``[block_rows + 1]``: where a block row's units begin in the gathered form."""
    units = -(-w.crow_indices.diff().long() * w.block_shape[1] // PACKED_QUAD)
    return torch.cat((units.new_zeros(1), units.cumsum(0)))


def packed_block_sparse_bytes(weights: BlockSparseWeights) -> int:
    """Size of the packed form; the indices must be sound."""
    blocks, height, width = weights.values.shape
    offsets = _aligned(4 * weights.block_rows * height)
    if width % PACKED_QUAD == 0:
        return offsets + _aligned(blocks * height * width)
    units = int(_unit_offsets(weights)[-1])
    return sum(
        (
            offsets,
            _aligned(4 * (weights.block_rows + 1)),
            _aligned(4 * PACKED_QUAD * units),
            _aligned(units * height * PACKED_QUAD),
        )
    )


def pack_block_sparse(weights: BlockSparseWeights) -> Tensor:
    """Pack int8 weights into the layout drawn above; uint8, one-dimensional, on their device.

    Raises:
        ValueError: values that are not int8.
    """
    w = weights
    if w.values.dtype != torch.int8:
        raise ValueError(
            f"pack_block_sparse: values must be int8, got {w.values.dtype}; float values are read as they are"
        )
    blocks, height, width = w.values.shape
    device = w.values.device
    sums = torch.zeros(w.block_rows, height, dtype=torch.int32, device=device)
    sums.index_add_(0, _rows_of_blocks(w), w.values.sum(dim=2, dtype=torch.int32))
    regions = [sums * -128]
    if width % PACKED_QUAD == 0:
        quads = w.values.unflatten(2, (width // PACKED_QUAD, PACKED_QUAD))
        regions.append(quads.transpose(1, 2))
    else:
        offsets = _unit_offsets(w)
        units = int(offsets[-1])
        _check_count(units, "pack_block_sparse")
        # The slot of every column of every block: where its row begins, and how many of the row precede it.
        rows = _rows_of_blocks(w)
        before = torch.arange(blocks, device=device) - w.crow_indices.long()[rows]
        c = torch.arange(width, device=device)
        slots = ((offsets[rows] * PACKED_QUAD + before * width)[:, None] + c).flatten()
        last = w.crow_indices[1:].long() - 1  # of an empty row: any, it has no units
        fill = (w.col_indices.long() + 1)[last] * width - 1 if blocks else last
        k = torch.repeat_interleave(fill, offsets.diff() * PACKED_QUAD)
        k[slots] = (w.col_indices.long()[:, None] * width + c).flatten()
        columns = torch.zeros(units * PACKED_QUAD, height, dtype=torch.int8, device=device)
        columns[slots] = w.values.transpose(1, 2).reshape(-1, height)
        regions += [
            offsets.to(torch.int32),
            k.to(torch.int32),
            columns.unflatten(0, (units, PACKED_QUAD)).transpose(1, 2),
        ]
    packed = torch.zeros(packed_block_sparse_bytes(w), dtype=torch.uint8, device=device)
    start = 0
    for region in regions:
        size = region.numel() * region.element_size()
        packed[start : start + size].view(region.dtype).view(region.shape).copy_(region)
        start += _aligned(size)
    return packed
