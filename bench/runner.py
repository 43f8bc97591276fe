"""The paired runner: check first, then time all sides interleaved in one process.

How a grid point is timed (the reasons are in ``bench/README.md``):

* *Rounds.* In each round every side is timed once, in an order shuffled anew, on the same fresh random
  inputs. Ratios are taken within a round and their median is quoted, so that what the machine does
  meanwhile (other users, clock changes) hits both sides.
* *Chunks.* A side's turn is a chunk of consecutive calls long enough to time (at least 200 µs). Long
  calls are a chunk of their own.
* *Settling.* Thread pools spin after their last call (libgomp about 8 ms, ONNX Runtime about 35 ms) and
  would steal a core from the next side. Before each turn the runner waits until no other thread of the
  process runs.
* *Warming up.* Then untimed calls wake the side's own pool and bring its weights into the cache as far as
  they fit, until the calls are as quick as they were before (a woken worker often shares the main thread's
  core for some milliseconds). The same rule for all sides.
* *Floor.* Where a floor applies, its loop takes a turn in each round as well.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lissom._noise import NOISY_CORES, ForeignCores

from .peers import Prepared

__all__ = ["Budget", "Rounds", "Side", "check", "geometric_mean", "paired", "settle", "spread", "sqnr_db"]

CHUNK_SECONDS = 200e-6
"""Shortest time that is measured in one piece."""

WARMUP_SECONDS = 300e-6
"""Untimed calls before a chunk last at least this long."""

STEADY_FACTOR = 1.5
"""A side is warm when a call takes less than this many times its quickest call so far …"""

STEADY_CALLS = 3
"""… this often in a row …"""

STEADY_LIMIT_SECONDS = 25e-3
"""… or when it has warmed up for this long."""

SETTLE_LIMIT_SECONDS = 0.15
"""Longest wait for spinning threads; above what any pool here spins (35 ms)."""

MIN_SQNR_DB = 25.0
"""lissom below this signal-to-noise ratio is a fault, and nothing is timed. int8 of Gaussian data gives
about 40 dB at K=384."""

SUSPECT_SQNR_DB = 15.0
"""Peers below this are timed and marked."""


@dataclass(frozen=True)
class Side:
    """One contender: a name and its prepared call."""

    name: str
    call: Prepared


@dataclass(frozen=True)
class Budget:
    """How long one grid point may take: wall-clock ``seconds``, and bounds on the rounds."""

    seconds: float = 5.0
    min_rounds: int = 5
    max_rounds: int = 40


@dataclass
class Rounds:
    """What was measured: per side the seconds of one call, per probe its rate, one value per round."""

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]] = field(default_factory=dict)
    calls_per_chunk: dict[str, int] = field(default_factory=dict)
    foreign_cores: float | None = None
    """Cores that other processes (and, in a virtual machine, its host) kept busy meanwhile, on average."""

    def ratio(self, numerator: str, denominator: str) -> list[float]:
        """Paired ratios of times: above 1 where ``denominator`` is faster."""
        return [a / b for a, b in zip(self.seconds[numerator], self.seconds[denominator], strict=True)]

    def noise(self) -> str:
        """A warning where other processes took part of the machine, else ``""``."""
        if self.foreign_cores is None or self.foreign_cores < NOISY_CORES:
            return ""
        return f"NOISY: other processes kept {self.foreign_cores:.2f} cores busy; do not quote these figures"

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def spread(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``p25`` and ``p75`` of at least one value."""
    if len(values) == 1:
        return {"median": values[0], "p25": values[0], "p75": values[0]}
    p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "p25": p25, "p75": p75}


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean log; NaN of nothing."""
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else math.nan


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization-noise ratio 10·log10(‖expected‖² / ‖expected − actual‖²) in decibel.

    Infinite where equal; NaN where ``actual`` is not finite.
    """
    signal = expected.double()
    noise = float((signal - actual.double()).square().sum())
    power = float(signal.square().sum())
    if math.isnan(noise) or math.isinf(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def check(
    sides: Sequence[Side],
    x: Tensor,
    expected: Tensor,
    must_pass: Sequence[str],
    *,
    bar: float = MIN_SQNR_DB,
    own_weights: bool = True,
) -> dict[str, float]:
    """SQNR in dB of every side against ``expected`` (the layer computed in float64).

    ``own_weights``: sides that know their dequantized weights are compared with float64 arithmetic on those
    instead.

    Raises:
        AssertionError: a side of ``must_pass`` (lissom's own) has a wrong shape or lies below ``bar``; what
            is wrong is not timed.
    """
    found = {}
    for side in sides:
        y = side.call(x)
        if y.shape != expected.shape:
            raise AssertionError(
                f"{side.name}: result has shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
            )
        exact = side.call.exact if own_weights else None
        found[side.name] = sqnr_db(exact(x) if exact else expected, y)
        if side.name in must_pass and not found[side.name] >= bar:
            against = "its own weights in float64" if exact else "fp32"
            raise AssertionError(
                f"{side.name}: SQNR {found[side.name]:.1f} dB against {against} is below {bar} dB at "
                f"x {tuple(x.shape)}, y {tuple(expected.shape)}; not timed"
            )
    return found


def _others_running() -> bool | None:
    """Whether any other thread of this process is running or ready to run; None where it cannot be told."""
    own = str(threading.get_native_id())
    try:
        for task in os.listdir("/proc/self/task"):
            if task == own:
                continue
            try:
                state = Path(f"/proc/self/task/{task}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread has ended
            if state == "R":
                return True
    except OSError:
        return None
    return False


def settle(limit: float = SETTLE_LIMIT_SECONDS) -> float:
    """Sleep until no other thread of this process runs, at most ``limit`` seconds; the time waited."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < limit:
        running = _others_running()
        if running is None:  # no /proc: wait for as long as pools usually spin
            time.sleep(0.05)
            break
        if not running:
            break
        time.sleep(0.0005)
    return time.perf_counter() - begin


def _warm(run: Callable[[Any], Any], feeds: Sequence[Any], quickest: float = math.inf) -> float:
    """Untimed calls until the side is warm; seconds of the quickest call, ``quickest`` included."""
    begin, calls, steady = time.perf_counter(), 0, 0
    while True:
        start = time.perf_counter()
        run(feeds[calls % len(feeds)])
        end = time.perf_counter()
        calls += 1
        steady = steady + 1 if end - start <= STEADY_FACTOR * quickest else 0
        quickest = min(quickest, end - start)
        if end - begin >= STEADY_LIMIT_SECONDS or (steady >= STEADY_CALLS and end - begin >= WARMUP_SECONDS):
            return quickest


def _time_chunk(run: Callable[[Any], Any], feeds: Sequence[Any], calls: int) -> float:
    """Seconds per call of ``calls`` consecutive calls, going round the feeds."""
    queue = [feeds[i % len(feeds)] for i in range(calls)]
    begin = time.perf_counter()
    for item in queue:
        run(item)
    return (time.perf_counter() - begin) / calls


def paired(
    sides: Sequence[Side],
    inputs: Callable[[torch.Generator], list[Any]],
    *,
    probes: Mapping[str, Callable[[], float]] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
) -> Rounds:
    """Time ``sides`` interleaved. ``inputs`` makes one round's inputs; each round measures ``probes`` too.

    Stops at ``budget.max_rounds``, or when the next round would go over ``budget.seconds`` and
    ``budget.min_rounds`` are done.
    """
    budget = budget or Budget()
    probes = probes or {}
    order = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    result = Rounds({s.name: [] for s in sides}, {name: [] for name in probes})
    turns: list[Side | str] = [*sides, *probes]
    quickest: dict[str, float] = {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode():
            xs = inputs(generator)
            for side in sides:
                settle()
                feeds = [side.call.feed(x) for x in xs]
                quickest[side.name] = _warm(side.call.run, feeds, _warm(side.call.run, feeds))
                result.calls_per_chunk[side.name] = max(1, math.ceil(CHUNK_SECONDS / quickest[side.name]))
            begin, rounds, longest = time.perf_counter(), 0, 0.0
            foreign = ForeignCores()
            while rounds < budget.max_rounds:
                start = time.perf_counter()
                if rounds >= budget.min_rounds and start - begin + longest > budget.seconds:
                    break
                xs = inputs(generator)
                order.shuffle(turns)
                for turn in turns:
                    settle()
                    if isinstance(turn, str):
                        result.rates[turn].append(probes[turn]())
                        continue
                    feeds = [turn.call.feed(x) for x in xs]
                    quickest[turn.name] = _warm(turn.call.run, feeds, quickest[turn.name])
                    calls = result.calls_per_chunk[turn.name]
                    result.seconds[turn.name].append(_time_chunk(turn.call.run, feeds, calls))
                rounds += 1
                longest = max(longest, time.perf_counter() - start)
                gc.collect(0)
            result.foreign_cores = foreign.mean()
    finally:
        if collecting:
            gc.enable()
    return result
