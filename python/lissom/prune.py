"""Choosing which blocks of a weight are kept.

Every block gets a score (:func:`block_scores`), the best are kept: as many of each layer
(:func:`choose_blocks`), or with one threshold for several layers (:func:`keep_globally`). How many are kept
does not depend on the values; of blocks with the same score the earlier ones, row by row, are kept.

Pruning by magnitude: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015;
of whole blocks: Narang et al., "Block-Sparse Recurrent Neural Networks", 2017. With the norms of the inputs:
Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import BlockScore, BlockSparse

__all__ = [
    "block_scores",
    "block_sizes",
    "choose_blocks",
    "default_block_shape",
    "keep_best",
    "keep_globally",
]

CHUNK = 1 << 20
"""Weights that are worked on at once: 8 MiB of float64."""


def default_block_shape(config: BlockSparse, device: torch.device | None = None) -> tuple[int, int]:
    """The config's block shape; for ``"auto"`` the smallest one that is fast everywhere: (8, 1), int8 (8, 4).

    int8 kernels multiply four neighbouring inputs at once. Where ``device`` is a GPU it is (32, 32): tensor
    cores multiply tiles.
    """
    if config.block_shape != "auto":
        return config.block_shape
    if device is not None and device.type == "cuda":
        return (32, 32)
    return (8, 4) if config.dtype == "int8" else (8, 1)


def block_scores(
    weight: Tensor,
    block_shape: tuple[int, int],
    method: BlockScore = "l2",
    activation_norm: Tensor | None = None,
) -> Tensor:
    """What each block is worth, per weight in it: blocks of any shape, and those cut off by an edge, compare.

    - ``"l1"``: the mean of |w|.
    - ``"l2"``: the root of the mean of w².
    - ``"wanda"``: the root of the mean of (w[n, k] · norm[k])². That is Wanda's score where a block is one
      weight; of more, the squared error of the outputs that dropping the block costs, if inputs do not
      correlate.

    Args:
        weight: ``[N, K]``, any floating dtype.
        block_shape: ``(bh, bw)``; N and K need not divide.
        method: see above.
        activation_norm: ``[K]``, the L2 norm of every input over sample data, for ``"wanda"`` only. A common
            factor matters only where layers compete (:func:`keep_globally`).

    Returns:
        float32 ``[ceil(N / bh), ceil(K / bw)]``.

    Raises:
        ValueError: NaN or infinity in the weight; a norm that is missing, of the wrong shape, negative or not
            finite.
    """
    norm = _checked_norm(weight, method, activation_norm)
    (n, k), (height, width) = weight.shape, block_shape
    rows, columns = -(-n // height), -(-k // width)
    sizes = block_sizes((n, k), block_shape, weight.device)
    scores = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    step = max(1, CHUNK // max(1, height * k))
    for start in range(0, rows, step):
        part = weight[start * height : (start + step) * height].detach().double().abs()
        if norm is not None:
            part *= norm
        part = part if method == "l1" else part.square_()
        count = -(-part.shape[0] // height)
        part = F.pad(part, (0, columns * width - k, 0, count * height - part.shape[0]))
        means = part.view(count, height, columns, width).sum((1, 3)) / sizes[start : start + count]
        scores[start : start + count] = means if method == "l1" else means.sqrt_()
    if not bool(torch.isfinite(scores).all()):
        bad = (~torch.isfinite(weight)).any(dim=1).nonzero()
        where = f"weight row {int(bad[0])}" if len(bad) else "weight · activation_norm"
        raise ValueError(f"{where} holds NaN or infinity; repair the checkpoint before compressing it")
    return scores


def _checked_norm(weight: Tensor, method: BlockScore, norm: Tensor | None) -> Tensor | None:
    if (norm is not None) != (method == "wanda"):
        given = "none was given" if norm is None else "one was given"
        raise ValueError(
            f"method={method!r} and activation_norm do not fit: {given}; give it with method='wanda', and "
            "only then (compress_ measures it on calibration data)"
        )
    if norm is None:
        return None
    k = weight.shape[1]
    if norm.shape != (k,) or not norm.is_floating_point():
        raise ValueError(
            f"activation_norm must be floating point [{k}], one per input; got {norm.dtype} "
            f"{tuple(norm.shape)}"
        )
    norm = norm.detach().to(device=weight.device, dtype=torch.float64)
    bad = ~(torch.isfinite(norm) & (norm >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"activation_norm[{i}] is {float(norm[i])}; norms must be finite and not negative")
    return norm


def block_sizes(
    shape: tuple[int, int], block_shape: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """How many weights of ``[N, K]`` each block holds: int32 ``[ceil(N / bh), ceil(K / bw)]``."""
    heights, widths = (
        (size - torch.arange(0, size, side, dtype=torch.int32, device=device)).clamp(max=side)
        for size, side in zip(shape, block_shape, strict=True)
    )
    return heights[:, None] * widths


def choose_blocks(
    weight: Tensor,
    config: BlockSparse,
    block_shape: tuple[int, int] | None = None,
    activation_norm: Tensor | None = None,
) -> Tensor:
    """Which blocks of one weight to keep, by the config's method and sparsity.

    Magnitudes compete within the layer; with ``"wanda"``, as in the paper, only what belongs to the same
    outputs does: a row of blocks.

    Args:
        weight: ``[N, K]``, any floating dtype, finite.
        config: ``scope`` is not read.
        block_shape: in place of the config's.
        activation_norm: see :func:`block_scores`.

    Returns:
        bool ``[ceil(N / bh), ceil(K / bw)]``.

    Raises:
        ValueError: as :func:`block_scores`.
    """
    shape = block_shape or default_block_shape(config, weight.device)
    scores = block_scores(weight, shape, config.method, activation_norm)
    return keep_best(scores, config.sparsity, by_row=config.method == "wanda")


def keep_best(scores: Tensor, sparsity: float, by_row: bool = False) -> Tensor:
    """The best blocks of ``[R, C]``: all but ``floor(sparsity · count)`` of them, in all or in every row.

    At least one is kept. Source: see the top of this file.
    """
    rows = scores if by_row else scores.reshape(1, -1)
    count = rows.shape[1]
    dropped = _dropped(count, sparsity)
    if dropped <= 0 or not rows.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    least = rows.kthvalue(dropped + 1, dim=1, keepdim=True).values
    kept = rows > least
    ties = rows == least
    wanted = count - dropped - kept.sum(1, keepdim=True)
    kept |= ties & (ties.cumsum(1) <= wanted)
    return kept.view(scores.shape)


def keep_globally(scores: Sequence[Tensor], sizes: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """One threshold for several layers: as many of the worst blocks are dropped as hold the share
    ``sparsity`` of all weights, whichever layer they are in.

    What competes is, per weight, the share that the square of a block's score has in those of its layer that
    are at least as good. Layers of small weights therefore do not simply lose theirs, and none loses its
    best block before all others have only theirs. Half of MiniLM dropped in 8×1 blocks leaves its embeddings
    a cosine of 0.40 (l2) and 0.57 (wanda); with the scores as they are it is 0.35 and 0.34, and whole layers
    vanish.

    Source: LAMP; Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", 2021; for blocks.

    Args:
        scores: of every layer, per weight (:func:`block_scores`).
        sizes: weights in every block (:func:`block_sizes`).
        sparsity: in [0, 1).

    Returns:
        bool like each of ``scores``.
    """
    flat = torch.cat([_shares(*layer) for layer in zip(scores, sizes, strict=True)])
    weights = torch.cat([layer.flatten() for layer in sizes])
    order = flat.argsort(descending=True, stable=True).flip(0)  # the worst first, of ties the last
    budget = _dropped(int(weights.sum(dtype=torch.int64)), sparsity)
    dropped = order[weights[order].cumsum(0, dtype=torch.int64) <= budget]
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[dropped] = False
    parts = kept.split([layer.numel() for layer in scores])
    return [part.view(layer.shape) for part, layer in zip(parts, scores, strict=True)]


def _shares(scores: Tensor, sizes: Tensor) -> Tensor:
    """LAMP's scores per weight, float64 ``[blocks]``; of ties the first has the larger share."""
    sizes = sizes.flatten()
    scores = scores.flatten().double()
    squares = (scores / scores.max().clamp(min=1e-300) if len(scores) else scores).square() * sizes
    best_first = scores.argsort(descending=True, stable=True)
    shares = torch.empty_like(squares)
    shares[best_first] = squares[best_first] / squares[best_first].cumsum(0).clamp(min=1e-300)
    return shares / sizes


def _dropped(count: int, sparsity: float) -> int:
    """floor(sparsity · count) for a sparsity that is meant in decimals (0.29 · 100 is 29), not all."""
    return max(0, min(count - 1, math.floor(sparsity * count + 1e-6)))
