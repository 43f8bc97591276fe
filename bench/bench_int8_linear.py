"""int8 linear against its peers and the machine's floors, over the grid of shapes, rows and threads.

    python bench/bench_int8_linear.py [--quick] [--threads 1 2] [--isa avx2] [--out DIR]
    pytest bench/bench_int8_linear.py --benchmark-only

The first is the paired runner, whose figures are quoted; the second gives pytest-benchmark's own statistics
(sides one after the other) for tracking.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import linear_grid, report
from bench.linear_grid import LinearBench, make_inputs, make_layer
from bench.peers import Peer, Prepared, linear_peers, lissom_forms
from bench.peers.torch_fp32 import linear
from bench.runner import Budget, Side, geometric_mean, paired, spread

OURS = "lissom int8"

TARGETS: dict[str, report.Target] = {
    "worst_vs_best_int8_peer": ("×", ">=", 1.0, "slowest grid point against the best int8 peer"),
    "geomean_vs_best_int8_peer": ("×", ">=", 1.25, "geometric mean over the grid against the best int8 peer"),
    "min_share_of_int8_floor": ("%", ">=", 0.85, "least share of the int8 floor at M ≥ 128"),
    "share_of_bandwidth_floor_4096_m1": ("%", ">=", 0.80, "share of the bandwidth floor at 4096×4096, M=1"),
    "layer_call_384_m1_us": ("µs", "<=", 15.0, "whole layer call at 384×384, M=1"),
}
"""Figures to reach (issue 2)."""


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


BENCH = LinearBench(
    name="int8_linear",
    ours=OURS,
    bits=8,
    rivals=("int8",),
    forms=lissom_forms,
    peers=linear_peers,
    figures=figures,
    per_threads={"layer_call_384_m1": measure_layer_call},
)


@linear_grid.each_point([*lissom_forms(), *linear_peers()])
def test_int8_linear(benchmark: Any, threads: int, shape: tuple[int, int], m: int, peer: Peer) -> None:
    """pytest-benchmark: one side at one grid point."""
    linear_grid.benchmark_side(BENCH.name, benchmark, threads, shape, m, peer)


if __name__ == "__main__":
    linear_grid.main(BENCH, __doc__, "dynamic only; leave out static and weight-only")
