"""``python -m bench``: every benchmark and every plot (what ``make bench`` runs)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import (
    bench_block_sparse_linear,
    bench_distill_loss,
    bench_int4_linear,
    bench_int8_embedding,
    bench_int8_linear,
    bench_minilm,
    bench_minilm_int4,
    linear_grid,
    plot,
    report,
)
from bench.linear_grid import THREADS, force_isa


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few points, short budgets; files end in -quick"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument(
        "--isa", help="instruction set for lissom (scalar, avx2, avx512vnni); peers are not limited"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="per point of the linear grids (default 5)"
    )
    bench_minilm.data_folder_argument(parser)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for JSON and plots")
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    threads, out, quick = tuple(options.threads), options.out, options.quick

    budget = linear_grid.grid_budget(options.budget, quick)
    grid: dict[str, Any] = {}
    if quick:
        grid = {"shapes": linear_grid.QUICK_SHAPES, "rows": linear_grid.QUICK_ROWS}
    linear, int4 = (
        linear_grid.run(bench.BENCH, threads=threads, budget=budget, out=out, quick=quick, **grid)
        for bench in (bench_int8_linear, bench_int4_linear)
    )
    sizes = bench_block_sparse_linear.QUICK if quick else {}
    sparse = bench_block_sparse_linear.run(threads=threads, out=out, quick=quick, **sizes)
    losses = bench_distill_loss
    small = {"shapes": losses.QUICK_SHAPES, "linear": losses.QUICK_LINEAR} if quick else {}
    losses.run(threads=threads, out=out, quick=quick, **small)
    bench_int8_embedding.run(threads=threads, out=out, quick=quick)
    minilm = None
    try:
        minilm = bench_minilm.run(threads=threads, data_folder=options.data, out=out, quick=quick)
        bench_minilm_int4.run(threads=max(threads), data_folder=options.data, out=out, quick=quick)
    except ModuleNotFoundError as error:
        print(f"left out: MiniLM end to end: {error} (pip install 'lissom[demo]')")
    for path in filter(None, (linear, int4, sparse, minilm)):
        plot.draw(path)
    hero = out / linear.stem.replace("int8_linear", "hero", 1)
    for path in plot.draw_hero(report.load(linear), report.load(minilm) if minilm else None, hero):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
