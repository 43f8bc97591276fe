"""What a swap costs and gains: paired timing, output error, bytes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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

SAMPLE_SECONDS = {"cpu": 50e-6, "cuda": 1e-3}
"""What is timed in one piece takes at least about this long. On a GPU the clock is stopped by waiting for it,
which takes some microseconds itself."""

CHUNK = 1 << 24
"""Elements that are compared in float64 at once."""

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
    devices: Sequence[torch.device] = (),
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

    On a GPU a sample is many calls after one another, launched as eager code launches them, up to the moment
    at which all of ``devices`` are done: the longer of launching and computing.
    """
    sides = ((prepare_before, before), (prepare_after, after))
    repeats = [1, 1]
    for _ in range(warmup):
        estimates = [
            _time_once(prepare, fn, n, devices) for (prepare, fn), n in zip(sides, repeats, strict=True)
        ]
        repeats = [_repeats(t, SAMPLE_SECONDS, devices) for t in estimates]
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < max_rounds:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for side in order:
            prepare, fn = sides[side]
            times[side].append(_time_once(prepare, fn, repeats[side], devices))
        if len(times[0]) >= min_rounds and time.perf_counter() - start > budget_s:
            break
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return PairedTiming(
        statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6, ratio, len(times[0])
    )


def time_each(
    functions: Sequence[Callable[[], Any]], devices: Sequence[torch.device] = (), rounds: int = 5
) -> list[float]:
    """Microseconds of each of several functions, timed in turn: the median over the rounds."""
    repeats = [1] * len(functions)
    for _ in range(2):
        estimates = [
            min(_time_once(_nothing, fn, n, devices) for _ in range(2))
            for fn, n in zip(functions, repeats, strict=True)
        ]
        repeats = [_repeats(t, {"cpu": 200e-6, "cuda": 2e-3}, devices) for t in estimates]
    times = [
        [_time_once(_nothing, fn, n, devices) for fn, n in zip(functions, repeats, strict=True)]
        for _ in range(rounds)
    ]
    return [statistics.median(column) * 1e6 for column in zip(*times, strict=True)]


def _repeats(seconds: float, least: Mapping[str, float], devices: Sequence[torch.device]) -> int:
    """How many calls that take ``seconds`` make a sample."""
    gpu = any(device.type == "cuda" for device in devices)
    return max(1, math.ceil(least["cuda" if gpu else "cpu"] / seconds))


def _time_once(
    prepare: Callable[[], None], fn: Callable[[], Any], repeats: int, devices: Sequence[torch.device]
) -> float:
    """Seconds of a call, of ``repeats`` in a row; GPUs have finished before and after."""
    prepare()
    _wait(devices)
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    _wait(devices)
    return max((time.perf_counter() - start) / repeats, 1e-9)


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


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
        seen = seen or a.numel() > 0
        parts = (t.detach().flatten().split(CHUNK) for t in (a, b))
        for x, y in zip(*parts, strict=True):
            x, y = x.double(), y.to(x.device, torch.float64)
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
