"""What a swap costs and gains: paired timing, output error, bytes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import tensors_in

__all__ = [
    "Agreement",
    "PairedTiming",
    "SignalToNoise",
    "compare_outputs",
    "module_bytes",
    "state_bytes",
    "time_each",
    "time_pair",
]

SQNR_LIMIT_DB = 200.0
"""Reported for an exact result (and, negative, for noise on a zero signal), so that reports stay finite."""


@dataclass(frozen=True)
class PairedTiming:
    """Two sides timed in turn. ``ratio`` is the median over rounds of after / before."""

    before_us: float
    after_us: float
    ratio: float
    rounds: int


def _nothing() -> None:
    pass


def time_pair(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    prepare_before: Callable[[], None] = _nothing,
    prepare_after: Callable[[], None] = _nothing,
    device: str = "cpu",
    warmup: int = 2,
    budget_s: float = 0.06,
    min_rounds: int = 5,
    max_rounds: int = 41,
) -> PairedTiming:
    """Time two functions interleaved in this process.

    A round times one side, then the other, in alternating order; the decision rests on the median of the
    per-round ratios, so that a slow spell of the machine, which hits both sides, cancels. ``prepare_*`` run
    untimed before each side. Rounds are added until ``budget_s`` is spent, between the two limits. Without
    ``warmup`` (runs of each side beforehand, which also say how many calls make a sample that the clock can
    resolve) a sample is one call.
    """
    sides = ((prepare_before, before), (prepare_after, after))
    repeats = [1, 1]
    for _ in range(warmup):
        estimates = [_time_once(prepare, fn, 1, device) for prepare, fn in sides]
        repeats = [max(1, math.ceil(50e-6 / t)) for t in estimates]  # at least about 50 µs a sample
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < max_rounds:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for side in order:
            prepare, fn = sides[side]
            times[side].append(_time_once(prepare, fn, repeats[side], device))
        if len(times[0]) >= min_rounds and time.perf_counter() - start > budget_s:
            break
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return PairedTiming(
        statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6, ratio, len(times[0])
    )


def time_each(functions: Sequence[Callable[[], Any]], device: str = "cpu", rounds: int = 5) -> list[float]:
    """Microseconds of each of several functions, timed in turn: the median over the rounds."""
    estimates = [min(_time_once(_nothing, fn, 1, device) for _ in range(2)) for fn in functions]
    repeats = [max(1, math.ceil(200e-6 / t)) for t in estimates]
    times = [
        [_time_once(_nothing, fn, n, device) for fn, n in zip(functions, repeats, strict=True)]
        for _ in range(rounds)
    ]
    return [statistics.median(column) * 1e6 for column in zip(*times, strict=True)]


def _time_once(prepare: Callable[[], None], fn: Callable[[], Any], repeats: int, device: str) -> float:
    prepare()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return max((time.perf_counter() - start) / repeats, 1e-9)


class SignalToNoise:
    """Signal-to-quantization-noise ratio, 10 log10(Σ y² / Σ (y - ŷ)²) in dB, over any number of tensors."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        reference = reference.float()
        self.signal += float(reference.square().sum(dtype=torch.float64))
        self.noise += float((reference - approximation.float()).square().sum(dtype=torch.float64))

    @property
    def db(self) -> float | None:
        """dB, limited to ±200; None where nothing finite was seen."""
        if not (math.isfinite(self.signal) and math.isfinite(self.noise)):
            return None
        if self.noise == 0:
            return SQNR_LIMIT_DB
        if self.signal == 0:
            return -SQNR_LIMIT_DB
        return max(-SQNR_LIMIT_DB, min(SQNR_LIMIT_DB, 10 * math.log10(self.signal / self.noise)))


@dataclass(frozen=True)
class Agreement:
    """How close two outputs of a model are, over all their floating-point tensors."""

    cosine: float | None
    max_abs_error: float | None


def compare_outputs(before: object, after: object) -> Agreement:
    """Cosine similarity and largest absolute difference of two outputs of one model.

    All floating-point tensors are taken together as one long vector. None where there are none, where
    their shapes differ, or where a value is not finite.
    """
    pairs = list(zip(tensors_in(before), tensors_in(after), strict=False))
    dot = norm_a = norm_b = worst = 0.0
    seen = False
    for a, b in pairs:
        if not a.is_floating_point() or a.shape != b.shape:
            if a.shape != b.shape:
                return Agreement(None, None)
            continue
        x, y = a.detach().double().flatten(), b.detach().double().flatten()
        seen = seen or x.numel() > 0
        dot += float(x @ y)
        norm_a += float(x @ x)
        norm_b += float(y @ y)
        if x.numel():
            error = float((x - y).abs().max())
            worst = max(worst, error) if math.isfinite(error) else math.nan
    if not seen or not all(map(math.isfinite, (dot, norm_a, norm_b, worst))):
        return Agreement(None, None)
    if norm_a == 0 or norm_b == 0:
        return Agreement(1.0 if norm_a == norm_b else 0.0, worst)
    return Agreement(min(1.0, dot / math.sqrt(norm_a * norm_b)), worst)


def _persistent_tensors(module: nn.Module) -> list[Tensor]:
    tensors: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    tensors += [
        b
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    ]
    return [t for t in tensors if not nn.parameter.is_lazy(t)]


def _bytes(tensors: list[Tensor], seen: set[object]) -> int:
    total = 0
    for t in tensors:
        key: object = id(t) if t.is_meta else (t.device, t.data_ptr(), t.numel() * t.element_size())
        if t.numel() and key not in seen:
            seen.add(key)
            total += t.numel() * t.element_size()
    return total


def module_bytes(module: nn.Module, seen: set[object]) -> int:
    """Bytes of what ``module`` itself would write to a file; what is in ``seen`` already counts as 0."""
    return _bytes(_persistent_tensors(module), seen)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers of a model; shared tensors count once.

    Packed copies that kernels read (not saved, made anew on load) do not count.
    """
    seen: set[object] = set()
    return sum(module_bytes(module, seen) for module in model.modules())
