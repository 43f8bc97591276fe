"""Static activation ranges, and norms of inputs, from sample data, in one pass.

A static scale quantizes every row of a layer's input by ``scale = clip / 127``; values beyond ±clip
saturate. The clip is chosen from a :class:`Histogram` of absolute values that is filled batch by batch in
bounded memory.

- ``absmax``: the largest magnitude seen; nothing saturates.
- ``percentile``: the given percentile of the magnitudes.
- ``mse``: least expected squared error, rounding and saturation together.
- ``entropy``: least Kullback-Leibler divergence between the histogram and its 128-level version.

Wanda's norms are those of each input over all rows that the batches hold (:class:`SquareSum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Int8
from .inputs import Call, InputError, run
from .select import Layer
from .trace import first_argument

__all__ = [
    "Histogram",
    "SquareSum",
    "absmax_clip",
    "calibrate",
    "clip_for",
    "entropy_clip",
    "mse_clip",
    "percentile_clip",
]

BINS = 2048
LEVELS = 127
"""Magnitudes that int8 values in [-127, 127] can have, zero aside."""


class Histogram:
    """Histogram of absolute values in ``BINS`` equal bins over [0, 2^e], with running maximum.

    The range is a power of two and doubles as larger values come (pairs of bins are merged, which is exact),
    so at least half of the bins are in use whatever comes first. Exact zeros are counted apart: any scale
    represents them exactly. Magnitudes below ``absmax / BINS`` are not told apart.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponent: int | None = None
        self.absmax = 0.0
        self.zeros = 0
        self.total = 0

    @property
    def width(self) -> float:
        """Width of one bin."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent) / BINS

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``, any shape and float dtype; ValueError where they are not finite."""
        values = x.detach().float().abs().flatten()
        if values.numel() == 0:
            return
        largest = float(values.amax())
        if not math.isfinite(largest):
            raise ValueError(
                f"{int((~torch.isfinite(values)).sum())} of {values.numel()} values are NaN or infinite"
            )
        zeros = int((values == 0).sum())
        self.total += values.numel()
        self.zeros += zeros
        if largest == 0.0:
            return
        self.absmax = max(self.absmax, largest)
        self._widen(math.frexp(largest)[1])
        counts = torch.histc(values, BINS, 0.0, self.width * BINS).double().cpu()
        counts[0] -= zeros
        self.counts += counts

    def _widen(self, exponent: int) -> None:
        """Make [0, 2^exponent] part of the range."""
        if self.exponent is None:
            self.exponent = exponent
        merge = exponent - self.exponent
        if merge <= 0:
            return
        factor = min(2**merge, BINS)
        merged = self.counts.view(-1, factor).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[: merged.numel()] = merged
        self.exponent = exponent


class SquareSum:
    """Sums of the squares of every input of a layer, and how many rows were seen."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.rows = 0

    def update(self, x: Tensor) -> None:
        """Add ``x`` ``[..., K]``, any float dtype; ValueError where it is not finite."""
        rows = x.detach().reshape(-1, x.shape[-1])
        sums = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square_()
        if not bool(torch.isfinite(sums).all()):
            bad = int((~torch.isfinite(rows)).sum())
            raise ValueError(f"{bad} of {rows.numel()} values are NaN or infinite")
        self.sums = sums if self.sums is None else self.sums.add_(sums)
        self.rows += rows.shape[0]

    def norm(self) -> Tensor:
        """Root mean square of every input, float64 ``[K]``: norms that do not depend on how many rows
        a layer got, so that layers can be compared."""
        if self.sums is None:
            raise RuntimeError("no rows were seen")
        return (self.sums / max(self.rows, 1)).sqrt_()


def absmax_clip(histogram: Histogram) -> float:
    """The largest magnitude seen; 0 where there were only zeros."""
    return histogram.absmax


def percentile_clip(histogram: Histogram, percentile: float) -> float:
    """Smallest bin edge that at least ``percentile`` % of all values (zeros included) do not exceed."""
    if histogram.absmax == 0.0:
        return 0.0
    below = histogram.zeros + histogram.counts.cumsum(0)
    index = int(torch.searchsorted(below, percentile / 100 * histogram.total))
    return min((index + 1) * histogram.width, histogram.absmax)


_MSE_CANDIDATES = 200
_POINTS_PER_BIN = 4


def mse_clip(histogram: Histogram) -> float:
    """Clip with the least expected squared error of int8 rounding and saturation.

    Each bin stands for four values spread evenly over it; every candidate clip (200 of them, from 1/200 of
    the range up to the largest magnitude) quantizes all of them. Source: the exhaustive search of Sung et
    al., "Resiliency of Deep Neural Networks under Quantization", 2015, on a histogram instead of raw data.
    """
    if histogram.absmax == 0.0:
        return 0.0
    used = int(histogram.counts.nonzero().max()) + 1
    offsets = (torch.arange(_POINTS_PER_BIN, dtype=torch.float64) + 0.5) / _POINTS_PER_BIN
    points = ((torch.arange(used)[:, None] + offsets) * histogram.width).clamp(max=histogram.absmax).flatten()
    weights = histogram.counts[:used].repeat_interleave(_POINTS_PER_BIN) / _POINTS_PER_BIN
    filled = weights > 0
    points, weights = points[filled].float(), weights[filled].float()
    clips = histogram.absmax * torch.arange(1, _MSE_CANDIDATES + 1, dtype=torch.float32) / _MSE_CANDIDATES
    best, best_error = histogram.absmax, math.inf
    for block in clips.split(50):
        scale = block[:, None] / LEVELS
        quantized = torch.round(points / scale).clamp_(max=LEVELS) * scale
        errors = ((points - quantized).square() @ weights).double()
        index = int(errors.argmin())
        if float(errors[index]) <= best_error:
            best, best_error = float(block[index]), float(errors[index])
    return best


_ENTROPY_LEVELS = 128
_ENTROPY_STEP = 8


def entropy_clip(histogram: Histogram) -> float:
    """Clip with the least Kullback-Leibler divergence.

    For each candidate range of i bins: P is the histogram up to bin i with everything beyond it added to the
    last bin; Q is the same bins (without what lies beyond) merged into 128 levels and spread back evenly over
    the bins that are not empty. The i with the least KL(P ‖ Q) wins. Every eighth i is tried. Exact zeros do
    not take part. Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """
    if histogram.absmax == 0.0:
        return 0.0
    counts = histogram.counts
    used = int(counts.nonzero().max()) + 1
    tail = counts.sum() - counts.cumsum(0)
    best, best_divergence = used, math.inf
    candidates = sorted({*range(_ENTROPY_LEVELS, used, _ENTROPY_STEP), used})
    for bins in candidates:
        kept = counts[:bins]
        p = kept.clone()
        p[-1] += tail[bins - 1]
        filled = (kept > 0).double()
        level = torch.arange(bins) * _ENTROPY_LEVELS // bins if bins > _ENTROPY_LEVELS else torch.arange(bins)
        mass = torch.bincount(level, weights=kept, minlength=_ENTROPY_LEVELS)
        spread = torch.bincount(level, weights=filled, minlength=_ENTROPY_LEVELS)
        q = (mass / spread.clamp(min=1.0))[level] * filled
        divergence = _divergence(p, q)
        if divergence < best_divergence:
            best, best_divergence = bins, divergence
    return min(best * histogram.width, histogram.absmax)


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(P ‖ Q) of two unnormalized histograms; infinite where Q is empty and P is not."""
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    held = p > 0
    p, q = p[held], q[held]
    return float((p * (p / q).log()).sum()) if bool((q > 0).all()) else math.inf


def clip_for(histogram: Histogram, config: Int8) -> float:
    """The clip that ``config`` asks for; 0 where nothing but zeros was seen."""
    methods: dict[str, Callable[[], float]] = {
        "absmax": lambda: absmax_clip(histogram),
        "percentile": lambda: percentile_clip(histogram, config.percentile),
        "mse": lambda: mse_clip(histogram),
        "entropy": lambda: entropy_clip(histogram),
    }
    return methods[config.calibration]()


def calibrate(
    model: nn.Module, layers: Iterable[Layer], batches: Iterable[Call], tick: Callable[[int], None]
) -> int:
    """Run ``batches``; set ``input_scale`` of every static layer, ``activation_norm`` of every one for Wanda.

    Returns how many batches there were. Layers that no batch reaches, or whose input is nothing but zeros,
    are kept dense: there is nothing to learn. ``tick(i)`` is called after batch i. Inputs are seen as the
    kernel will quantize them: smoothed and rotated where the layer will be.

    Raises:
        InputError: a layer's input is not finite.
        RuntimeError: the model raised.
    """
    active = [layer for layer in layers if layer.active]
    histograms = {layer: Histogram() for layer in active if layer.static}
    squares = {layer: SquareSum() for layer in active if layer.wanda}
    observers: dict[Layer, Histogram | SquareSum] = {**histograms, **squares}
    count = 0
    with ExitStack() as stack:
        for layer in observers:

            def observe(_: nn.Module, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                x = first_argument(args, kwargs)
                if x is None:
                    return
                try:
                    x = x if layer.smoothing is None else x / layer.smoothing
                    observers[layer].update(layer.converter.observed(x, layer.config))
                except ValueError as error:
                    raise InputError(
                        f"calibration: the input of layer {layer.name!r} is unusable: {error} (batch {count})"
                        "; remove that batch or repair the model"
                    ) from error

            stack.callback(layer.module.register_forward_pre_hook(observe, with_kwargs=True).remove)
        for call in batches:
            run(model, call, f"calibration batch {count}")
            count += 1
            tick(count)
    for layer, histogram in histograms.items():
        if histogram.total == 0:
            layer.leave("kept dense", "no calibration batch reached it, so its activation range is unknown")
            continue
        clip = clip_for(histogram, layer.config) if isinstance(layer.config, Int8) else 0.0
        scale = float(torch.tensor(clip / LEVELS, dtype=torch.float32))
        if scale <= 0.0:
            layer.leave(
                "kept dense", "its input was all zeros in calibration, so its activation range is unknown"
            )
            continue
        layer.input_scale = scale
    _set_norms(squares)
    return count


def _set_norms(squares: dict[Layer, SquareSum]) -> None:
    """Layers that are tied to one weight get one norm, of all their inputs."""
    for layer in squares:
        seen = [squares[other] for other in (layer, *layer.tied) if other in squares]
        seen = [one for one in seen if one.sums is not None]
        if not seen:
            layer.leave(
                "kept dense", "no calibration batch reached it, so the norms of its inputs are unknown"
            )
            continue
        norm = torch.stack([one.norm().square() for one in seen]).sum(0).sqrt()
        if not bool(norm.any()):
            layer.leave(
                "kept dense", "its input was all zeros in calibration, so its weights cannot be compared"
            )
            continue
        layer.activation_norm = norm
