"""int4 linear against its peers and the machine's floors, over the grid of shapes, rows and threads.

    python bench/bench_int4_linear.py [--quick] [--threads 1 2] [--isa avx2] [--out DIR]
    pytest bench/bench_int4_linear.py --benchmark-only

The first is the paired runner, whose figures are quoted; the second gives pytest-benchmark's own statistics
(sides one after the other) for tracking.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import linear_grid, report
from bench.linear_grid import LinearBench
from bench.peers import Peer, linear_peers_int4, lissom_forms_int4
from bench.runner import geometric_mean

OURS = "lissom int4"
INT8, G32, FLOAT = "lissom int8", "lissom int4 g32", "lissom int4 float"
CODEBOOKS = ("lissom int4 nf4", "lissom int4 k-means")

TARGETS: dict[str, report.Target] = {
    "worst_vs_best_int4_peer_m32": ("×", ">=", 2.0, "M ≥ 32: slowest point against the best int4 peer"),
    "geomean_vs_best_int4_peer_m32": ("×", ">=", None, "M ≥ 32: geometric mean of the same"),
    "worst_vs_int8_m32": ("×", ">=", 1.25, "M ≥ 32: slowest point against our own int8"),
    "geomean_vs_int8_m32": ("×", ">=", None, "M ≥ 32: geometric mean of the same"),
    "min_gops_m32_2_threads": ("GOP/s", ">=", 380.0, "M ≥ 32, 2 threads: least throughput"),
    "min_share_of_floor_m128": ("%", ">=", None, "M ≥ 128: least share of the int8×int4 floor"),
    "m1_4096_vs_best_int4_peer": ("×", ">=", 2.0, "4096×4096, M=1: against the best int4 peer"),
    "share_of_bandwidth_floor_4096_m1": ("%", ">=", None, "4096×4096, M=1: share of the bandwidth floor"),
    "g32_vs_g128": ("%", ">=", 0.75, "M ≥ 32: least speed of g32, of g128's"),
    "codebook_vs_uniform_m32": ("%", ">=", 0.70, "M ≥ 32: least speed of a codebook, of uniform's"),
    "codebook_vs_uniform": ("%", ">=", 0.70, "whole grid: least speed of a codebook, of uniform's"),
    "float_vs_torch_fp32": ("×", ">=", 1.0, "float activations: slowest point against torch fp32"),
    "float_vs_torch_fp32_4096_m1": ("×", ">=", 4.0, "float activations, 4096×4096, M=1: against torch fp32"),
}
"""Figures to reach (issue 3); those without a bound are stated only."""

Point = dict[str, Any]
"""A grid point as :func:`bench.linear_grid.measure_point` returns it."""


def figures(points: list[Point]) -> dict[str, Any]:
    """The issue's figures from the measured points; each with its bound and whether it was met.

    All are medians of paired ratios, the worst over the points and thread counts that they speak of. They
    refer to groups of 128 with zero-points, lissom's default, where nothing else is said.
    """

    def medians(key: str, name: Callable[[Point], str | None], at: list[Point]) -> list[float]:
        sides = (p["sides"].get(name(p)) for p in at)
        return [s[key]["median"] for s in sides if s and key in s]

    def side(name: str) -> Callable[[Point], str]:
        return lambda _: name

    def speed(name: str, at: list[Point]) -> list[float]:
        return [1 / over for over in medians("time_over_lissom", side(name), at)]

    def worst(values: list[float]) -> float | None:
        return min(values, default=None)

    def mean(values: list[float]) -> float | None:
        return geometric_mean(values) if values else None

    many = [p for p in points if p["m"] >= linear_grid.COMPUTE_ROWS]
    one = [p for p in points if (p["k"], p["n"], p["m"]) == (4096, 4096, 1)]
    best = medians("time_over_lissom", lambda p: p["best_int4_peer"], many)
    int8 = medians("time_over_lissom", side(INT8), many)
    values = {
        "worst_vs_best_int4_peer_m32": worst(best),
        "geomean_vs_best_int4_peer_m32": mean(best),
        "worst_vs_int8_m32": worst(int8),
        "geomean_vs_int8_m32": mean(int8),
        "min_gops_m32_2_threads": worst([p["sides"][OURS]["gops"] for p in many if p["threads"] == 2]),
        "min_share_of_floor_m128": worst(
            medians("share_of_floor", side(OURS), [p for p in many if p["m"] >= 128])
        ),
        "m1_4096_vs_best_int4_peer": worst(medians("time_over_lissom", lambda p: p["best_int4_peer"], one)),
        "share_of_bandwidth_floor_4096_m1": worst(medians("share_of_floor", side(OURS), one)),
        "g32_vs_g128": worst(speed(G32, many)),
        "codebook_vs_uniform_m32": worst([s for name in CODEBOOKS for s in speed(name, many)]),
        "codebook_vs_uniform": worst([s for name in CODEBOOKS for s in speed(name, points)]),
        "float_vs_torch_fp32": worst(medians("speedup_over_torch_fp32", side(FLOAT), points)),
        "float_vs_torch_fp32_4096_m1": worst(medians("speedup_over_torch_fp32", side(FLOAT), one)),
    }
    return report.judge(TARGETS, values)


BENCH = LinearBench(
    name="int4_linear",
    ours=OURS,
    bits=4,
    rivals=("int4", "weight-only int4"),
    forms=lissom_forms_int4,
    peers=linear_peers_int4,
    figures=figures,
)


@linear_grid.each_point([*lissom_forms_int4(), *linear_peers_int4()])
def test_int4_linear(benchmark: Any, threads: int, shape: tuple[int, int], m: int, peer: Peer) -> None:
    """pytest-benchmark: one side at one grid point."""
    linear_grid.benchmark_side(BENCH.name, benchmark, threads, shape, m, peer)


if __name__ == "__main__":
    linear_grid.main(BENCH, __doc__, "groups of 128 with zero-points only; leave out every other form")
