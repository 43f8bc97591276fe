"""What the linear benches share: the grid of shapes, rows and threads, its tables and JSON, the command line.

A bench is a :class:`LinearBench`: its sides, its figures, and which floor and which peers it is judged by.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import floors, machine, report
from bench.peers import Peer, Precision, Unfit
from bench.runner import SUSPECT_SQNR_DB, Budget, Rounds, Side, check, paired, settle, spread

__all__ = [
    "FP32",
    "QUICK_ROWS",
    "QUICK_SHAPES",
    "ROWS",
    "SHAPES",
    "THREADS",
    "LinearBench",
    "benchmark_side",
    "each_point",
    "floor_kind",
    "force_isa",
    "main",
    "make_inputs",
    "make_layer",
    "parse_shape",
    "run",
]

SHAPES = ((384, 384), (384, 1536), (768, 3072), (1024, 4096), (4096, 4096))
"""(K, N) = (in_features, out_features)."""
ROWS = (1, 8, 32, 128, 512)
THREADS = (1, 2)

QUICK_SHAPES = ((384, 384), (1024, 4096))
QUICK_ROWS = (1, 32, 128)

COMPUTE_ROWS = 32
"""From this M on the floor is arithmetic."""
BANDWIDTH_ROWS = 8
"""Up to this M the floor is reading the weights."""

MIN_SQNR_TO_FP32_DB = 12.0
"""Sides that are checked against their own dequantized weights must also stay this close to the float32 layer
(lissom's stop the run, peers are marked). 4 evenly spaced bits of uniformly distributed weights give
20·log10(15) = 23.5 dB, NF4 about 19, a wrong scale or swapped nibbles nothing."""

FP32 = "torch fp32"


@dataclass(frozen=True)
class LinearBench:
    """One bench over the grid.

    Attributes:
        name: stem of the result files.
        ours: name of lissom's headline form; ``time / lissom's`` refers to it.
        bits: of the weights. Decides which floor holds, and that lissom's forms of precision ``int<bits>``
            get a share of it.
        rivals: precisions among which a point's best peer is looked for.
        forms: lissom's own sides, the headline first.
        peers: everyone else, available here or not.
        figures: the issue's figures from the points.
        per_threads: key in the JSON and what to measure once for each thread count.
    """

    name: str
    ours: str
    bits: int
    rivals: tuple[Precision, ...]
    forms: Callable[[], list[Peer]]
    peers: Callable[[], list[Peer]]
    figures: Callable[[list[dict[str, Any]]], dict[str, Any]]
    per_threads: dict[str, Callable[[int], dict[str, Any]]] = field(default_factory=dict)


@lru_cache(maxsize=1)
def make_layer(k: int, n: int) -> tuple[Tensor, Tensor]:
    """Weight ``[n, k]`` and bias ``[n]`` distributed as ``nn.Linear`` initialises them; fixed seed.

    The same tensors until another shape is asked for, so that sides can keep what they made of them.
    """
    generator = torch.Generator().manual_seed(1000 * k + n)
    bound = k**-0.5
    weight = (torch.rand(n, k, generator=generator) * 2 - 1) * bound
    bias = (torch.rand(n, generator=generator) * 2 - 1) * bound
    return weight, bias


def make_inputs(m: int, k: int, generator: torch.Generator) -> list[Tensor]:
    """A round's inputs: standard-normal ``[m, k]``, several different ones where they are small."""
    count = max(1, min(4, (1 << 18) // (m * k)))
    return [torch.randn(m, k, generator=generator) for _ in range(count)]


def available(peers: Iterable[Peer]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, and the reasons of the others by name."""
    reasons = {p: p.available() for p in peers}
    return [p for p, r in reasons.items() if not r], {p.name: r for p, r in reasons.items() if r}


def floor_kind(weight_bytes: int, m: int, threads: int, isa: str, bits: int = 8) -> str:
    """Which floor holds at ``m`` rows: arithmetic, a read bandwidth, or none (``""``)."""
    if floors.unavailable_reason():
        return ""
    if m >= COMPUTE_ROWS:
        return floors.compute_kind(isa, bits)
    return floors.bandwidth_kind(weight_bytes, threads) if m <= BANDWIDTH_ROWS else ""


def prepare_sides(
    peers: Sequence[Peer], k: int, n: int, m: int, threads: int
) -> tuple[list[Peer], list[Side], dict[str, str]]:
    """The peers that can take the shape, their sides, and why the others cannot."""
    weight, bias = make_layer(k, n)
    fitting, sides, unfit = [], [], {}
    for peer in peers:
        try:
            sides.append(Side(peer.name, peer.prepare(weight, bias, m, threads)))
            fitting.append(peer)
        except Unfit as reason:
            unfit[f"{peer.name} at {k}x{n}"] = str(reason)
    return fitting, sides, unfit


def measure_point(
    bench: LinearBench,
    k: int,
    n: int,
    m: int,
    threads: int,
    peers: Sequence[Peer],
    sides: Sequence[Side],
    isa: str,
    budget: Budget,
) -> dict[str, Any]:
    """One grid point of sides that :func:`prepare_sides` made: check, time, and work out the figures."""
    weight, bias = make_layer(k, n)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    expected = (x.double() @ weight.double().t() + bias.double()).float()
    ours = [s.name for s in sides if s.name.startswith("lissom")]
    sqnr = {"sqnr_db": check(sides, x, expected, must_pass=ours)}
    coarse = [s for s in sides if s.call.exact is not None]
    sqnr["sqnr_to_fp32_db"] = check(
        coarse, x, expected, must_pass=ours, bar=MIN_SQNR_TO_FP32_DB, own_weights=False
    )
    (weight_bytes,) = (s.call.weight_bytes for s in sides if s.name == bench.ours)
    kind = floor_kind(weight_bytes, m, threads, isa, bench.bits)
    probe = floors.probe(kind, threads, weight_bytes if kind.startswith("read_") else None) if kind else None
    rounds = paired(
        sides,
        lambda g: make_inputs(m, k, g),
        probes={kind: probe} if probe else {},
        budget=budget,
        seed=m + 7 * threads,
    )
    floor = None
    if probe:
        floor = {"kind": kind, "rate": spread(rounds.rates[kind]), "unit": probe.unit}
        if kind.startswith("read_"):
            floor["weight_bytes"] = weight_bytes
    rivals = [p.name for p in peers if p.precision in bench.rivals and not p.name.startswith("lissom")]
    return {
        "k": k,
        "n": n,
        "m": m,
        "threads": threads,
        "rounds": len(rounds.seconds[bench.ours]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "floor": floor,
        f"best_int{bench.bits}_peer": min(rivals, key=rounds.median, default=None),
        "sides": {
            side.name: _summarise(bench, (k, n, m), peer.precision, side, sqnr, rounds, kind)
            for peer, side in zip(peers, sides, strict=True)
        },
    }


def _summarise(
    bench: LinearBench,
    shape: tuple[int, int, int],
    precision: Precision,
    side: Side,
    sqnr: dict[str, dict[str, float]],
    rounds: Rounds,
    kind: str,
) -> dict[str, Any]:
    """Medians, rates, paired ratios and the share of the floor of one side, ready for JSON."""
    k, n, m = shape
    name, seconds = side.name, rounds.seconds[side.name]
    operations = 2 * m * k * n
    moved = side.call.weight_bytes + side.call.element_bytes * m * (k + n) + 4 * n
    found = {key: values[name] for key, values in sqnr.items() if name in values}
    bars = {"sqnr_db": SUSPECT_SQNR_DB, "sqnr_to_fp32_db": MIN_SQNR_TO_FP32_DB}
    entry: dict[str, Any] = {
        "precision": precision,
        "seconds": spread(seconds) | {"best": min(seconds)},
        "gops": operations / rounds.median(name) / 1e9,
        "gb_per_s": moved / rounds.median(name) / 1e9,
        **found,
        "suspect": not all(value >= bars[key] for key, value in found.items()),
        "calls_per_chunk": rounds.calls_per_chunk[name],
    }
    if name != bench.ours:
        entry["time_over_lissom"] = spread(rounds.ratio(name, bench.ours))
    if name != FP32 and FP32 in rounds.seconds:
        entry["speedup_over_torch_fp32"] = spread(rounds.ratio(FP32, name))
    if kind and name.startswith("lissom") and precision == f"int{bench.bits}":
        work = moved if kind.startswith("read_") else operations
        shares = [work / s / 1e9 / r for s, r in zip(seconds, rounds.rates[kind], strict=True)]
        entry["share_of_floor"] = spread(shares)
    return entry


def print_point(point: dict[str, Any]) -> None:
    """The table of one grid point."""
    rows = []
    coarse = any("sqnr_to_fp32_db" in side for side in point["sides"].values())
    for name, side in point["sides"].items():
        seconds, over = side["seconds"], side.get("time_over_lissom")
        share = side.get("share_of_floor")
        row = [
            name + (" (!)" if side["suspect"] else ""),
            report.si_time(seconds["median"]),
            f"{report.si_time(seconds['p25'])} – {report.si_time(seconds['p75'])}",
            f"{side['gops']:.1f}",
            f"{side['gb_per_s']:.1f}",
            f"{100 * share['median']:.0f} %" if share else "",
            f"{over['median']:.2f} ({over['p25']:.2f}–{over['p75']:.2f})" if over else "1",
            f"{side['sqnr_db']:.1f}",
        ]
        if coarse:
            row.append(f"{side['sqnr_to_fp32_db']:.1f}" if "sqnr_to_fp32_db" in side else "")
        rows.append(row)
    floor = point["floor"]
    text = f"; floor {floor['kind']} {floor['rate']['median']:.0f} {floor['unit']}" if floor else ""
    where = f"K={point['k']} N={point['n']} M={point['m']}, {point['threads']} thread(s)"
    columns = ["side", "median", "25–75 %", "GOP/s", "GB/s", "of floor", "time / lissom's", "SQNR dB"]
    report.print_table(f"{where}, {point['rounds']} rounds{text}", columns + ["… to fp32"] * coarse, rows)
    if point["noise"]:
        print(point["noise"])


def print_floors(found: list[dict[str, Any]]) -> None:
    """The table of the floors, or why there is none."""
    report.print_table(
        floors.unavailable_reason() or "Floors of this machine, measured in this run",
        ["floor", "threads", "median", "best", "unit", "how"],
        [
            [f["kind"], str(f["threads"]), f"{f['median']:.1f}", f"{f['best']:.1f}", f["unit"], f["detail"]]
            for f in found
        ],
    )


def run(
    bench: LinearBench,
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    threads: tuple[int, ...] = THREADS,
    budget: Budget | None = None,
    out: Path = report.RESULTS,
    quick: bool = False,
    forms: bool = True,
) -> Path:
    """The whole grid; prints tables, writes the JSON and returns its path.

    ``forms=False`` leaves out all of lissom's forms but the headline.
    """
    budget = budget or Budget()
    about = machine.describe()
    isa = about["isa"]
    print(report.headline(about))
    if isa == "reference":
        print("WARNING: lissom._C is missing; these are times of the slow reference backend, not the kernels")
    peers, left_out = available(bench.peers())
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    ours = bench.forms() if forms else bench.forms()[:1]
    before = torch.get_num_threads()
    points: list[dict[str, Any]] = []
    extra: dict[str, list[Any]] = {key: [] for key in bench.per_threads}
    began = time.perf_counter()
    try:
        settle()
        repetitions = 10 if quick else 40
        machine_floors = [
            f.as_dict() for f in floors.measure_all(isa, list(threads), repetitions, bench.bits)
        ]
        print_floors(machine_floors)
        total = len(threads) * len(shapes) * len(rows)
        for t in threads:
            torch.set_num_threads(t)
            for k, n in shapes:
                for m in rows:
                    fitting, sides, unfit = prepare_sides([*ours, *peers], k, n, m, t)
                    for name, reason in unfit.items():
                        if name not in left_out:
                            print(f"left out: {name}: {reason}")
                    left_out |= unfit
                    point = measure_point(bench, k, n, m, t, fitting, sides, isa, budget)
                    points.append(point)
                    print_point(point)
                    done, spent = len(points), time.perf_counter() - began
                    print(
                        f"[{done}/{total}] {spent:.0f} s, about {spent / done * (total - done):.0f} s left\n"
                    )
            for key, measure in bench.per_threads.items():
                extra[key].append(measure(t))
    finally:
        torch.set_num_threads(before)
    found = bench.figures(points)
    report.print_noise(points)
    report.print_figures(found)
    data = {
        "bench": bench.name,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "left_out": left_out,
        "floors": machine_floors,
        "points": points,
        **extra,
        "figures": found,
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, bench.name, about, quick=quick), data)
    print(f"wrote {path}")
    return path


def parse_shape(text: str) -> tuple[int, int]:
    """``384x1536`` → (384, 1536), that is (K, N)."""
    try:
        k, n = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write KxN, such as 384x1536") from None
    return k, n


def force_isa(isa: str | None) -> None:
    """Make lissom use ``isa``; SystemExit with the reason where it cannot."""
    if not isa:
        return
    os.environ["LISSOM_FORCE_ISA"] = isa
    try:
        used = machine.lissom_isa()
    except RuntimeError as error:
        raise SystemExit(f"--isa {isa}: {error}") from None
    if used != isa:
        raise SystemExit(f"--isa {isa}: lissom already runs {used}, or its extension is missing")


def grid_budget(seconds: float | None, quick: bool) -> Budget:
    """Of one grid point: ``seconds`` (default 5, quick 1) and at least 5 rounds (quick 3)."""
    return Budget(seconds or (1.0 if quick else 5.0), 3 if quick else 5)


def main(
    bench: LinearBench, description: str | None, no_forms: str, arguments: Sequence[str] | None = None
) -> None:
    """The command line of a bench; ``no_forms`` explains that option."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few points, a second each")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", metavar="KxN", help="in_features x out_features"
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", help="rows of x")
    parser.add_argument(
        "--isa", help="instruction set for lissom (scalar, avx2, avx512vnni); peers are not limited"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="wall-clock time per grid point (default 5)"
    )
    parser.add_argument("--no-forms", action="store_true", help=no_forms)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for JSON and plots")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    path = run(
        bench,
        shapes=tuple(options.shapes or (QUICK_SHAPES if options.quick else SHAPES)),
        rows=tuple(options.rows or (QUICK_ROWS if options.quick else ROWS)),
        threads=tuple(options.threads),
        budget=grid_budget(options.budget, options.quick),
        out=options.out,
        quick=options.quick,
        forms=not options.no_forms,
    )
    if not options.no_plot:
        from bench import plot

        plot.draw(path)


def each_point(peers: Sequence[Peer]) -> Callable[[Any], Any]:
    """pytest-benchmark: parametrizes a test with ``threads``, ``shape``, ``m`` and ``peer``."""
    marks = [
        pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=5),
        pytest.mark.parametrize("peer", peers, ids=lambda p: p.name.replace(" ", "-")),
        pytest.mark.parametrize("m", ROWS, ids="M{}".format),
        pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}"),
        pytest.mark.parametrize("threads", THREADS, ids="threads{}".format),
    ]

    def mark(test: Any) -> Any:
        for decorate in marks:
            test = decorate(test)
        return test

    return mark


def benchmark_side(
    name: str, benchmark: Any, threads: int, shape: tuple[int, int], m: int, peer: Peer
) -> None:
    """pytest-benchmark: one side of the bench ``name`` at one grid point."""
    if peer.available():
        pytest.skip(peer.available())
    k, n = shape
    benchmark.group = f"{name} K={k} N={n} M={m} threads={threads}"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = peer.prepare(*make_layer(k, n), m, threads)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        feed = call.feed(x)
        settle()
        with torch.inference_mode():
            y = benchmark(call.run, feed)
        assert call.result(y).shape == (m, n)
        if benchmark.stats:
            benchmark.extra_info["gops"] = 2 * m * k * n / statistics.median(benchmark.stats.stats.data) / 1e9
    finally:
        torch.set_num_threads(before)
