"""int8 linear against its peers and the machine's floors, over the grid of shapes, rows and threads.

    python bench/bench_int8_linear.py [--quick] [--threads 1 2] [--isa avx2] [--out DIR]
    pytest bench/bench_int8_linear.py --benchmark-only

The first is the paired runner, whose figures are quoted; the second gives pytest-benchmark's own statistics
(sides one after the other) for tracking.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import Tensor

from bench import floors, machine, report
from bench.peers import Peer, linear_peers, lissom_forms
from bench.runner import SUSPECT_SQNR_DB, Budget, Rounds, Side, check, geometric_mean, paired, settle, spread

BENCH = "int8_linear"
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

OURS = "lissom int8"
FP32 = "torch fp32"

TARGETS: dict[str, report.Target] = {
    "worst_vs_best_int8_peer": ("×", ">=", 1.0, "slowest grid point against the best int8 peer"),
    "geomean_vs_best_int8_peer": ("×", ">=", 1.25, "geometric mean over the grid against the best int8 peer"),
    "min_share_of_int8_floor": ("%", ">=", 0.85, "least share of the int8 floor at M ≥ 128"),
    "share_of_bandwidth_floor_4096_m1": ("%", ">=", 0.80, "share of the bandwidth floor at 4096×4096, M=1"),
    "layer_call_384_m1_us": ("µs", "<=", 15.0, "whole layer call at 384×384, M=1"),
}
"""Figures to reach (issue 2)."""


def make_layer(k: int, n: int) -> tuple[Tensor, Tensor]:
    """Weight ``[n, k]`` and bias ``[n]`` distributed as ``nn.Linear`` initialises them; fixed seed."""
    generator = torch.Generator().manual_seed(1000 * k + n)
    bound = k**-0.5
    weight = (torch.rand(n, k, generator=generator) * 2 - 1) * bound
    bias = (torch.rand(n, generator=generator) * 2 - 1) * bound
    return weight, bias


def make_inputs(m: int, k: int, generator: torch.Generator) -> list[Tensor]:
    """A round's inputs: standard-normal ``[m, k]``, several different ones where they are small."""
    count = max(1, min(4, (1 << 18) // (m * k)))
    return [torch.randn(m, k, generator=generator) for _ in range(count)]


def _available(peers: list[Peer]) -> tuple[list[Peer], dict[str, str]]:
    reasons = {p.name: p.available() for p in peers}
    return [p for p in peers if not reasons[p.name]], {name: r for name, r in reasons.items() if r}


def measure_point(
    k: int,
    n: int,
    m: int,
    threads: int,
    peers: list[Peer],
    isa: str,
    budget: Budget,
    *,
    with_floor: bool = True,
) -> dict[str, Any]:
    """One grid point: prepare, check, time, and work out the figures."""
    weight, bias = make_layer(k, n)
    sides = [Side(p.name, p.prepare(weight, bias, m, threads)) for p in peers]
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator)
    expected = (x.double() @ weight.double().t() + bias.double()).float()
    ours = [p.name for p in peers if p.name.startswith("lissom")]
    sqnr = check(sides, x, expected, must_pass=ours)
    kind = floor_kind(k * n, m, threads, isa) if with_floor else ""
    probes = {kind: floors.probe(kind, threads)} if kind else {}
    rounds = paired(sides, lambda g: make_inputs(m, k, g), probes=probes, budget=budget, seed=m + 7 * threads)
    return summarise(k, n, m, threads, peers, sides, sqnr, rounds, kind)


def floor_kind(weight_bytes: int, m: int, threads: int, isa: str) -> str:
    """Which floor holds at ``m`` rows: int8 arithmetic, a read bandwidth, or none (``""``)."""
    if floors.unavailable_reason():
        return ""
    if m >= COMPUTE_ROWS:
        return floors.compute_kind(isa)
    return floors.bandwidth_kind(weight_bytes, threads) if m <= BANDWIDTH_ROWS else ""


def summarise(
    k: int,
    n: int,
    m: int,
    threads: int,
    peers: list[Peer],
    sides: list[Side],
    sqnr: dict[str, float],
    rounds: Rounds,
    kind: str,
) -> dict[str, Any]:
    """Medians, rates, paired ratios and the share of the floor of one grid point, ready for JSON."""
    operations = 2 * m * k * n
    results = {}
    for peer, side in zip(peers, sides, strict=True):
        name = side.name
        seconds = rounds.seconds[name]
        moved = side.call.weight_bytes + 4 * m * (k + n) + 4 * n
        entry: dict[str, Any] = {
            "precision": peer.precision,
            "seconds": spread(seconds) | {"best": min(seconds)},
            "gops": operations / rounds.median(name) / 1e9,
            "gb_per_s": moved / rounds.median(name) / 1e9,
            "sqnr_db": sqnr[name],
            "suspect": not sqnr[name] >= SUSPECT_SQNR_DB,
            "calls_per_chunk": rounds.calls_per_chunk[name],
        }
        if name != OURS:
            entry["time_over_lissom"] = spread(rounds.ratio(name, OURS))
        if name != FP32 and FP32 in rounds.seconds:
            entry["speedup_over_torch_fp32"] = spread(rounds.ratio(FP32, name))
        if kind and peer.name.startswith("lissom") and peer.precision == "int8":
            work = moved if kind.startswith("read_") else operations
            rates = rounds.rates[kind]
            entry["share_of_floor"] = spread(
                [work / s / 1e9 / r for s, r in zip(seconds, rates, strict=True)]
            )
        results[name] = entry
    int8_peers = [p.name for p in peers if p.precision == "int8" and not p.name.startswith("lissom")]
    best = min(int8_peers, key=rounds.median, default=None)
    floor = {"kind": kind, "rate": spread(rounds.rates[kind]), "unit": "GB/s" if "read" in kind else "GOP/s"}
    return {
        "k": k,
        "n": n,
        "m": m,
        "threads": threads,
        "rounds": len(rounds.seconds[OURS]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "floor": floor if kind else None,
        "best_int8_peer": best,
        "sides": results,
    }


def figures(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The issue's figures from the measured points; each with its bound and whether it was met.

    Shares and the layer call quote the worst over the measured thread counts.
    """
    against = [
        p["sides"][p["best_int8_peer"]]["time_over_lissom"]["median"]
        for p in points
        if p["best_int8_peer"] is not None
    ]

    def shares(wanted: Any) -> list[float]:
        found = [p["sides"][OURS].get("share_of_floor") for p in points if wanted(p)]
        return [f["median"] for f in found if f]

    compute = shares(lambda p: p["m"] >= 128)
    bandwidth = shares(lambda p: (p["k"], p["n"], p["m"]) == (4096, 4096, 1))
    call = [
        p["sides"][OURS]["seconds"]["median"] * 1e6
        for p in points
        if (p["k"], p["n"], p["m"]) == (384, 384, 1)
    ]
    values = {
        "worst_vs_best_int8_peer": min(against, default=None),
        "geomean_vs_best_int8_peer": geometric_mean(against) if against else None,
        "min_share_of_int8_floor": min(compute, default=None),
        "share_of_bandwidth_floor_4096_m1": min(bandwidth, default=None),
        "layer_call_384_m1_us": max(call, default=None),
    }
    return report.judge(TARGETS, values)


def measure_layer_call(threads: int, seconds: float = 0.5) -> dict[str, Any]:
    """Median time of one ``Int8Linear`` call and of the bare op at 384×384, M=1, next to ``nn.Linear``'s."""
    from bench.peers import Prepared
    from bench.peers.torch_fp32 import linear

    weight, bias = make_layer(384, 384)
    dense = linear(weight, bias)
    from lissom.nn import Int8Linear

    layer = Int8Linear.from_linear(dense)
    op = torch.ops.lissom.int8_linear.default
    arguments = (layer.qweight, layer.weight_scale, layer.bias, None, False, None, layer._packed)
    sides = [
        Side("Int8Linear", Prepared(layer, weight.numel())),
        Side("int8_linear op", Prepared(lambda x: op(x, *arguments), weight.numel())),
        Side("nn.Linear", Prepared(dense, weight.nbytes)),
    ]
    rounds = paired(sides, lambda g: make_inputs(1, 384, g), budget=Budget(seconds, 5, 100), seed=threads)
    return {
        "threads": threads,
        "microseconds": {name: spread([s * 1e6 for s in values]) for name, values in rounds.seconds.items()},
        "nn.Linear over Int8Linear": spread(rounds.ratio("nn.Linear", "Int8Linear")),
    }


def print_point(point: dict[str, Any]) -> None:
    """The table of one grid point."""
    rows = []
    for name, side in point["sides"].items():
        seconds, over = side["seconds"], side.get("time_over_lissom")
        share = side.get("share_of_floor")
        rows.append(
            [
                name + (" (!)" if side["suspect"] else ""),
                report.si_time(seconds["median"]),
                f"{report.si_time(seconds['p25'])} – {report.si_time(seconds['p75'])}",
                f"{side['gops']:.1f}",
                f"{side['gb_per_s']:.1f}",
                f"{100 * share['median']:.0f} %" if share else "",
                f"{over['median']:.2f} ({over['p25']:.2f}–{over['p75']:.2f})" if over else "1",
                f"{side['sqnr_db']:.1f}",
            ]
        )
    floor = point["floor"]
    text = f"; floor {floor['kind']} {floor['rate']['median']:.0f} {floor['unit']}" if floor else ""
    where = f"K={point['k']} N={point['n']} M={point['m']}, {point['threads']} thread(s)"
    report.print_table(
        f"{where}, {point['rounds']} rounds{text}",
        ["side", "median", "25–75 %", "GOP/s", "GB/s", "of floor", "time / lissom's", "SQNR dB"],
        rows,
    )
    if point["noise"]:
        print(point["noise"])


def run(
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

    ``forms=False`` leaves out the static and weight-only forms.
    """
    budget = budget or Budget()
    about = machine.describe()
    isa = about["isa"]
    print(report.headline(about))
    if isa == "reference":
        print("WARNING: lissom._C is missing; these are times of the slow reference backend, not the kernels")
    peers, missing = _available(linear_peers())
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    ours = lissom_forms() if forms else lissom_forms()[:1]
    before = torch.get_num_threads()
    points, layer_calls, began = [], [], time.perf_counter()
    try:
        settle()
        machine_floors = [f.as_dict() for f in floors.measure_all(isa, list(threads), 10 if quick else 40)]
        report.print_table(
            floors.unavailable_reason() or "Floors of this machine, measured in this run",
            ["floor", "threads", "median", "best", "unit", "how"],
            [
                [
                    f["kind"],
                    str(f["threads"]),
                    f"{f['median']:.1f}",
                    f"{f['best']:.1f}",
                    f["unit"],
                    f["detail"],
                ]
                for f in machine_floors
            ],
        )
        total = len(threads) * len(shapes) * len(rows)
        for t in threads:
            torch.set_num_threads(t)
            for k, n in shapes:
                for m in rows:
                    point = measure_point(k, n, m, t, [*ours, *peers], isa, budget)
                    points.append(point)
                    print_point(point)
                    done, spent = len(points), time.perf_counter() - began
                    print(
                        f"[{done}/{total}] {spent:.0f} s, about {spent / done * (total - done):.0f} s left\n"
                    )
            layer_calls.append(measure_layer_call(t))
    finally:
        torch.set_num_threads(before)
    found = figures(points)
    report.print_noise(points)
    report.print_figures(found)
    data = {
        "bench": BENCH,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "left_out": missing,
        "floors": machine_floors,
        "points": points,
        "layer_call_384_m1": layer_calls,
        "figures": found,
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument(
        "--no-forms", action="store_true", help="dynamic only; leave out static and weight-only"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for JSON and plots")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    budget = Budget(options.budget or (1.0 if options.quick else 5.0), 3 if options.quick else 5)
    path = run(
        shapes=tuple(options.shapes or (QUICK_SHAPES if options.quick else SHAPES)),
        rows=tuple(options.rows or (QUICK_ROWS if options.quick else ROWS)),
        threads=tuple(options.threads),
        budget=budget,
        out=options.out,
        quick=options.quick,
        forms=not options.no_forms,
    )
    if not options.no_plot:
        from bench import plot

        plot.draw(path)


_SIDES = [*lissom_forms(), *linear_peers()]


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=5)
@pytest.mark.parametrize("peer", _SIDES, ids=lambda p: p.name.replace(" ", "-"))
@pytest.mark.parametrize("m", ROWS, ids="M{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("threads", THREADS, ids="threads{}".format)
def test_int8_linear(benchmark: Any, threads: int, shape: tuple[int, int], m: int, peer: Peer) -> None:
    """pytest-benchmark: one side at one grid point."""
    if peer.available():
        pytest.skip(peer.available())
    k, n = shape
    benchmark.group = f"int8_linear K={k} N={n} M={m} threads={threads}"
    weight, bias = make_layer(k, n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = peer.prepare(weight, bias, m, threads)
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


if __name__ == "__main__":
    main()
