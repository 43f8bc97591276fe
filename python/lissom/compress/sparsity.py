"""What is measured for block-sparse linears: the fastest block shape, and the density from which one wins.

Both are timed on layers of random blocks: where blocks are matters little to a kernel, and their values not
at all. What was measured is remembered as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .. import formats
from ..config import BlockSparse
from ..nn import SparseLinear
from ..prune import block_scores, block_sizes, default_block_shape, keep_best, keep_globally
from . import measure
from .convert import plain_linear, weight_shape
from .select import Layer

__all__ = [
    "FAST_BLOCK_SHAPES",
    "GPU_BLOCK_SHAPES",
    "decide_block_shapes",
    "fast_block_shapes",
    "keep_together",
    "winning_density",
]

FAST_BLOCK_SHAPES = ((8, 1), (16, 1), (4, 4), (8, 4), (16, 4), (16, 16), (32, 32), (64, 64))
"""Shapes with kernels of their own on a CPU, the smaller (more accurate) ones first."""

GPU_BLOCK_SHAPES = ((16, 16), (32, 32), (64, 64), (128, 128))
"""Shapes that tensor cores multiply, the smaller ones first."""

AS_FAST = 1.05
"""A smaller block that takes at most this many times as long as the fastest is preferred to it."""

MOST_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows that are timed at most: beyond, every row costs the same. A GPU wants more of them to be busy."""

MOST_WEIGHTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Weights of the layers that block shapes are timed on: larger ones are cut, so that all fit in memory."""

LEAST_DENSITY = 0.01
STEPS = 5
"""Halvings of the interval that the density is looked for in."""

_shapes: dict[object, tuple[int, int]] = {}
_densities: dict[object, float | None] = {}


def fast_block_shapes(device: torch.device) -> tuple[tuple[int, int], ...]:
    """The shapes that ``"auto"`` chooses among."""
    return GPU_BLOCK_SHAPES if device.type == "cuda" else FAST_BLOCK_SHAPES


def decide_block_shapes(layers: Sequence[Layer]) -> None:
    """Set ``block_shape`` where the configs leave it open; layers tied to one weight get the same."""
    for layer in layers:
        config = layer.sparse
        if config is None or config.block_shape != "auto":
            continue
        rows = next((one.rows for one in (layer, *layer.tied) if one.rows), None)
        weight: Tensor = layer.module.weight  # type: ignore[assignment]
        shape = default_block_shape(config, weight.device)
        if rows is not None:
            shape = _fastest_block_shape(layer.module, config, rows)
        for one in (layer, *layer.tied):
            if one.sparse is not None and one.sparse.block_shape == "auto":
                one.config = replace(one.sparse, block_shape=shape)


def _fastest_block_shape(module: nn.Module, config: BlockSparse, rows: int) -> tuple[int, int]:
    n, k = weight_shape(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    dtype, device = weight.dtype, weight.device
    n, rows = min(n, max(64, _limit(MOST_WEIGHTS, device) // k)), min(rows, _limit(MOST_ROWS, device))
    shapes = fast_block_shapes(device)
    key = (n, k, rows, config.sparsity, config.dtype, dtype, device, torch.get_num_threads())
    if key not in _shapes:
        x = torch.randn(rows, k, dtype=torch.float32, device=device).to(dtype)
        layers = [_random_layer(n, k, shape, 1 - config.sparsity, config, x) for shape in shapes]
        times = measure.time_each([partial(layer.forward, x) for layer in layers], (device,))
        limit = AS_FAST * min(times)
        _shapes[key] = next(shape for shape, time in zip(shapes, times, strict=True) if time <= limit)
    return _shapes[key]


def _limit(of: Mapping[str, int], device: torch.device) -> int:
    return of.get(device.type, of["cpu"])


def _random_layer(
    n: int, k: int, shape: tuple[int, int], density: float, config: BlockSparse, x: Tensor
) -> SparseLinear:
    generator = torch.Generator(x.device).manual_seed(0)
    scores = torch.rand(-(-n // shape[0]), -(-k // shape[1]), generator=generator, device=x.device)
    mask = keep_best(scores, 1 - density)
    weight = torch.randn(n, k, generator=generator, device=x.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    stored = formats.block_sparse_from_dense(weight, mask, shape, dtype)
    bias = torch.zeros(n, dtype=x.dtype, device=x.device)
    return SparseLinear.from_weights(stored, bias).requires_grad_(False).eval()


def winning_density(layer: Layer, density: float) -> float | None:
    """About the density below which blocks of the layer's shape would be faster than the dense layer.

    Looked for below ``density``, which was measured not to win, by bisection.

    Returns:
        None where even ``LEAST_DENSITY`` does not win.
    """
    config, rows = layer.sparse, layer.m
    if config is None or rows is None:
        return None
    n, k = weight_shape(layer.module)
    dense = plain_linear(layer.module)
    dtype, device = dense.weight.dtype, dense.weight.device
    rows, shape = min(rows, _limit(MOST_ROWS, device)), default_block_shape(config, device)
    key = (n, k, rows, shape, density, config.dtype, dtype, device, torch.get_num_threads())
    if key not in _densities:
        x = torch.randn(rows, k, device=device).to(dtype)

        def wins(candidate: float) -> bool:
            sparse = _random_layer(n, k, shape, candidate, config, x)
            timing = measure.time_pair(
                lambda: dense.forward(x),
                lambda: sparse.forward(x),
                devices=(device,),
                budget_s=0.03,
                max_rounds=15,
            )
            return timing.ratio < 1

        low, high = LEAST_DENSITY, max(density, LEAST_DENSITY)
        found = low if wins(low) else None
        for _ in range(STEPS if found else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if wins(middle) else (low, middle)
            found = low
        _densities[key] = found
    return _densities[key]


def keep_together(layers: Sequence[Layer]) -> None:
    """Set ``mask`` of layers that compete with one another; block shapes are decided.

    Layers tied to one weight count once, and share their mask.
    """
    first: dict[Layer, Layer] = {}
    for layer in layers:
        first[layer] = next((first[other] for other in layer.tied if other in first), layer)
    owners = list(dict.fromkeys(first.values()))
    scores, sizes = [], []
    sparsity = 0.0
    for layer in owners:
        config = layer.sparse
        if config is None:
            raise RuntimeError(f"{layer.name}: has no BlockSparse config")
        weight = plain_linear(layer.module).weight.detach()
        shape = default_block_shape(config, weight.device)
        sparsity = config.sparsity
        scores.append(block_scores(weight, shape, config.method, layer.activation_norm).cpu())
        sizes.append(block_sizes((weight.shape[0], weight.shape[1]), shape))
    for layer, mask in zip(owners, keep_globally(scores, sizes, sparsity), strict=True):
        layer.mask = mask.to(layer.module.weight.device)  # type: ignore[arg-type]
    for layer, owner in first.items():
        layer.mask = owner.mask
