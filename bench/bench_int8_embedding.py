"""int8 embedding (gather + dequantize in one pass) against ``nn.Embedding`` and ``F.embedding``.

    python bench/bench_int8_embedding.py [--quick] [--threads 1 2] [--isa avx2] [--out DIR]
    pytest bench/bench_int8_embedding.py --benchmark-only

Indices are uniformly random, so rows of a table larger than the cache come from memory. No floor is quoted:
a gather mixes scattered reads with a streaming write.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import nn

from bench import machine, report
from bench.linear_grid import THREADS, force_isa
from bench.peers import Prepared
from bench.runner import Budget, Side, check, paired, spread

BENCH = "int8_embedding"
TABLES = ((512, 384), (30522, 384), (50257, 768))
"""(rows, width): MiniLM's positions and words, GPT-2's words."""
TOKENS = (16, 128, 1024, 4096)
QUICK_TABLES = ((30522, 384),)
QUICK_TOKENS = (16, 1024)

OURS = "lissom Int8Embedding"
DENSE = "torch nn.Embedding"


def make_sides(rows: int, width: int) -> tuple[nn.Embedding, list[Side]]:
    """The float32 layer and the three sides; ``weight_bytes`` is of one row."""
    from lissom.nn import Int8Embedding

    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))
    dense = nn.Embedding(rows, width, _weight=weight).requires_grad_(False)
    ours = Int8Embedding.from_embedding(dense)
    return dense, [
        Side(OURS, Prepared(ours, width + 4)),
        Side(DENSE, Prepared(dense, 4 * width)),
        Side("torch F.embedding", Prepared(lambda i: nn.functional.embedding(i, weight), 4 * width)),
    ]


def make_indices(tokens: int, rows: int, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randint(rows, (tokens,), generator=generator) for _ in range(4)]


def measure_point(rows: int, width: int, tokens: int, threads: int, budget: Budget) -> dict[str, Any]:
    """One grid point: check, time, figures."""
    dense, sides = make_sides(rows, width)
    (indices, *_) = make_indices(tokens, rows, torch.Generator().manual_seed(0))
    sqnr = check(sides, indices, dense(indices), must_pass=[OURS])
    rounds = paired(sides, lambda g: make_indices(tokens, rows, g), budget=budget, seed=tokens)
    results = {}
    for side in sides:
        seconds = rounds.seconds[side.name]
        moved = tokens * (side.call.weight_bytes + 4 * width + 8)  # row read, row written, index read
        results[side.name] = {
            "seconds": spread(seconds) | {"best": min(seconds)},
            "gb_per_s": moved / rounds.median(side.name) / 1e9,
            "sqnr_db": sqnr[side.name],
            "time_over_lissom": spread(rounds.ratio(side.name, OURS)),
        }
    return {
        "rows": rows,
        "width": width,
        "tokens": tokens,
        "threads": threads,
        "rounds": len(rounds.seconds[OURS]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "sides": results,
    }


def run(*, threads: tuple[int, ...] = THREADS, out: Path = report.RESULTS, quick: bool = False) -> Path:
    """The whole grid; prints a table, writes the JSON and returns its path."""
    about = machine.describe()
    print(report.headline(about))
    budget = Budget(0.5, 3, 20) if quick else Budget(2.0, 5, 40)
    before, points, began = torch.get_num_threads(), [], time.perf_counter()
    try:
        for t in threads:
            torch.set_num_threads(t)
            for rows, width in QUICK_TABLES if quick else TABLES:
                points += [
                    measure_point(rows, width, tokens, t, budget)
                    for tokens in (QUICK_TOKENS if quick else TOKENS)
                ]
    finally:
        torch.set_num_threads(before)
    lines = []
    for p in points:
        ours, dense = p["sides"][OURS], p["sides"][DENSE]
        over = dense["time_over_lissom"]
        lines.append(
            [
                f"{p['rows']}×{p['width']}",
                str(p["tokens"]),
                str(p["threads"]),
                report.si_time(ours["seconds"]["median"]),
                report.si_time(dense["seconds"]["median"]),
                f"{over['median']:.2f} ({over['p25']:.2f}–{over['p75']:.2f})",
                f"{ours['gb_per_s']:.1f}",
                f"{dense['gb_per_s']:.1f}",
                f"{ours['sqnr_db']:.1f}",
            ]
        )
    report.print_table(
        "int8 embedding against nn.Embedding float32",
        [
            "table",
            "tokens",
            "threads",
            "lissom",
            "torch",
            "torch / lissom",
            "lissom GB/s",
            "torch GB/s",
            "SQNR dB",
        ],
        lines,
    )
    report.print_noise(points)
    data = {
        "bench": BENCH,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "points": points,
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
    print(f"wrote {path}")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--isa", help="instruction set for lissom")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    run(threads=tuple(options.threads), out=options.out, quick=options.quick)


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=5)
@pytest.mark.parametrize("side", range(3), ids=["lissom", "nn.Embedding", "F.embedding"])
@pytest.mark.parametrize("tokens", TOKENS, ids="tokens{}".format)
@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t[0]}x{t[1]}")
def test_int8_embedding(benchmark: Any, table: tuple[int, int], tokens: int, side: int) -> None:
    """pytest-benchmark: one side at one grid point, with torch's current thread count."""
    rows, width = table
    benchmark.group = f"int8_embedding {rows}x{width} tokens={tokens}"
    _, sides = make_sides(rows, width)
    (indices, *_) = make_indices(tokens, rows, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = benchmark(sides[side].call.run, indices)
    assert y.shape == (tokens, width)


if __name__ == "__main__":
    main()
