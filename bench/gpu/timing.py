"""Sides timed in turn, in one process: CUDA graphs and events on a GPU, the wall clock on a CPU (smoke runs).

* *Rotation.* What a side's call reads it has several copies of, more bytes together than four times the L2
  cache, and a turn goes over all of them: weights come from HBM, as those of a model with many layers do.
* *Graphs.* A turn replays a CUDA graph of all these calls, at least ``TURN_SECONDS`` long, between two
  events: launching from Python, which eager code pays for and engines do not, is not part of it. What calls
  take when launched eagerly is measured beside it. Losses are launched one by one, with autograd; the GPU is
  kept busy with something else until the first of them is in the queue.
* *Rounds.* Every side and every floor takes one turn in each round, in an order shuffled anew. Ratios are
  taken within a round, so that the clock rate of the GPU, which its temperature moves, hits both sides.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bench.runner import Rounds
from lissom import registry
from lissom.testing import use

__all__ = [
    "CUDA",
    "TRITON",
    "Deadline",
    "Faults",
    "Rounds",
    "Side",
    "Timed",
    "cuda_missing",
    "first_line",
    "on",
    "paired",
    "rotations",
    "synchronize",
    "timed_eagerly",
]

Result = TypeVar("Result")

TURN_SECONDS = {"cuda": 1e-3, "cpu": 0.0}
"""A turn lasts at least about this long."""

ROTATED_BYTES = {"cuda": 4, "cpu": 0}
"""Copies of what a call reads take at least this many times the L2 cache."""

MOST_COPIES = 32

LEAD_CYCLES = 1_000_000
"""The GPU spins for so long before a turn, half a millisecond, so that the first launch is not waited for."""

ROUNDS = (3, 20)
"""Bounds on the rounds of a point; the least is kept even where the time is over."""


CUDA, TRITON = "cuda", "triton"
"""Backends whose sides stand, where CUDA C++ kernels can run, beside those of the automatic choice."""


def cuda_missing(op: str, device: torch.device) -> str:
    """Why ``op`` has no CUDA C++ kernels here, or ``""``."""
    try:
        registry.select(op, device.type, CUDA)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def on(backend: str, function: Callable[..., Result]) -> Callable[..., Result]:
    """``function`` with every op in it on ``backend``."""

    def run(*args: Any) -> Result:
        with use(backend):
            return function(*args)

    return run


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a table."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def rotations(bytes_read: int, device: torch.device) -> int:
    """How many copies of ``bytes_read`` bytes a side needs so that none is in L2 when its turn comes."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    wanted = ROTATED_BYTES[device.type] * l2
    return max(1, min(MOST_COPIES, math.ceil(wanted / max(bytes_read, 1))))


@dataclass(frozen=True)
class Side:
    """One contender at one point.

    Attributes:
        calls: the same work on different copies of its inputs and weights.
        graph: whether a GPU replays the calls from a CUDA graph.
        grad: whether they need autograd.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    graph: bool = True
    grad: bool = False


@dataclass
class Faults:
    """What was not timed, and why: ``peers`` that failed; sides of lissom that failed or were wrong."""

    peers: dict[str, str] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)

    def add(self, side: str, where: str, reason: str) -> None:
        """One side at one place."""
        held = self.ours if side.startswith("lissom") else self.peers
        held[f"{side} at {where}" if where else side] = reason
        if held is self.ours:
            print(f"FAULT: {side} at {where}: {reason}", flush=True)

    def leave_out(self, side: str, reason: str) -> None:
        """A side, of lissom even, that this machine cannot run: no fault."""
        self.peers[side] = reason


class Deadline:
    """Shares the time of a run out among its points; what one does not need is left to the others."""

    def __init__(self, seconds: float, points: int) -> None:
        self.end = time.perf_counter() + seconds
        self.left = points

    def next(self) -> float:
        """Clock reading until which the next point may add rounds; what it prepares counts."""
        now = time.perf_counter()
        until = now + max(0.0, self.end - now) / max(1, self.left)
        self.left -= 1
        return until


def _mode(side: Side) -> AbstractContextManager[object]:
    return torch.enable_grad() if side.grad else torch.inference_mode()


class Timed:
    """A side that is ready: each call of it is one turn, and gives the seconds of one of its calls.

    ``launched``: launching counts, as it does for eager code.
    """

    def __init__(self, side: Side, device: torch.device, launched: bool = False) -> None:
        self.side, self.device, self.launched = side, device, launched
        self.note = ""
        self._graph: Any = None
        with _mode(side):
            self._all()
            synchronize(device)
            if device.type == "cuda" and side.graph and not launched:
                try:
                    self._graph = self._capture()
                except RuntimeError as error:
                    self.note = f"not in a CUDA graph: {first_line(error)}"
                    synchronize(device)
            for _ in range(2 if device.type == "cuda" else 1):
                seconds = self._seconds(1)
        self.runs = max(1, math.ceil(TURN_SECONDS[device.type] / seconds))

    def _all(self) -> None:
        for call in self.side.calls:
            call()

    def _capture(self) -> Any:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # workspaces, autotuning of peers
                self._all()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._all()
        return graph

    def _run(self) -> None:
        if self._graph is None:
            self._all()
        else:
            self._graph.replay()

    def _seconds(self, runs: int) -> float:
        """Of one run of all calls."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(runs):
                self._run()
            return max(1e-9, (time.perf_counter() - begin) / runs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not self.launched:
            torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        for _ in range(runs):
            self._run()
        end.record()
        end.synchronize()
        return max(1e-9, float(start.elapsed_time(end)) / 1e3 / runs)

    def __call__(self) -> float:
        with _mode(self.side):
            if self.runs > 1:  # short: what the side before left in the caches would count
                self._run()
            return self._seconds(self.runs) / len(self.side.calls)


def timed_eagerly(side: Side, device: torch.device, turns: int = 3) -> float:
    """Seconds of a call that Python launches, as eager code does; the median of a few turns."""
    eager = Timed(side, device, launched=True)
    return statistics.median(eager() for _ in range(turns if device.type == "cuda" else 1))


def paired(
    sides: Iterable[Side],
    device: torch.device,
    where: str,
    faults: Faults,
    *,
    probes: Mapping[str, Callable[[], float]] | None = None,
    until: float,
    rounds: tuple[int, int] = ROUNDS,
    seed: int = 0,
) -> tuple[Rounds, dict[str, str]]:
    """Time ``sides`` in turn until ``until``, within the bounds on ``rounds``.

    A side that raises is left out, and ``faults`` says so. Returns the rounds, and by side what is to be
    said of it.
    """
    turns: dict[str, Callable[[], float]] = {}
    notes = {}
    for side in sides:
        try:
            timed = Timed(side, device)
        except Exception as error:  # a peer may raise whatever it likes
            faults.add(side.name, where, first_line(error))
            continue
        turns[side.name] = timed
        if timed.note:
            notes[side.name] = timed.note
    result = Rounds({name: [] for name in turns}, {name: [] for name in probes or {}})
    order = random.Random(seed)
    names = [*turns, *result.rates]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() > until:
                break
            order.shuffle(names)
            for name in names:
                if name in turns:
                    result.seconds[name].append(turns[name]())
                elif probes:
                    result.rates[name].append(probes[name]())
    finally:
        if collecting:
            gc.enable()
    return result, notes
