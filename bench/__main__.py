"""``python -m bench``: every benchmark and every plot (what ``make bench`` runs)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import bench_int8_embedding, bench_int8_linear, bench_minilm, plot, report
from bench.bench_int8_linear import THREADS, force_isa
from bench.runner import Budget


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
        "--budget", type=float, metavar="SECONDS", help="per point of int8_linear (default 5)"
    )
    bench_minilm.data_folder_argument(parser)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for JSON and plots")
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    threads, out, quick = tuple(options.threads), options.out, options.quick

    budget = Budget(options.budget or (1.0 if quick else 5.0), 3 if quick else 5)
    grid: dict[str, Any] = {}
    if quick:
        grid = {"shapes": bench_int8_linear.QUICK_SHAPES, "rows": bench_int8_linear.QUICK_ROWS}
    linear = bench_int8_linear.run(threads=threads, budget=budget, out=out, quick=quick, **grid)
    bench_int8_embedding.run(threads=threads, out=out, quick=quick)
    results = [linear]
    try:
        results.append(bench_minilm.run(threads=threads, data_folder=options.data, out=out, quick=quick))
    except ModuleNotFoundError as error:
        print(f"left out: MiniLM end to end: {error} (pip install 'lissom[demo]')")
    for path in results:
        plot.draw(path)
    hero = out / linear.stem.replace("int8_linear", "hero", 1)
    for path in plot.draw_hero(
        report.load(linear), report.load(results[1]) if len(results) > 1 else None, hero
    ):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
