"""all-MiniLM-L6-v2 in int4: how weights are chosen × group size × codebook, with size, speed and cosine.

    python bench/bench_minilm_int4.py [--quick] [--threads 2] [--isa avx2] [--data DIR] [--out DIR]

Every form is timed in the same rounds at 8×128 against torch float32. Cosine similarity is as in
``bench_minilm.py`` (``--data DIR``), the size that of the saved folder. All layers are converted
(``prefer="size"``), faster or not, so that the rows differ in nothing else. Beside the JSON goes the table in
Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import lissom
from bench import bench_minilm, machine, report
from bench.bench_minilm import FP32
from bench.linear_grid import THREADS, force_isa
from bench.runner import Budget, spread

BENCH = "minilm_int4"
BATCH, LENGTH = 8, 128

CONFIGS: tuple[lissom.config.Config, ...] = (
    lissom.Int8(prefer="size"),
    *(
        lissom.Int4(method=method, group_size=size, prefer="size")
        for method in ("rtn", "mse", "hqq")
        for size in (32, 64, 128, -1)
    ),
    lissom.Int4(symmetric=True, prefer="size"),
    lissom.Int4(embeddings="int4", prefer="size"),
    lissom.Int4(activation=None, prefer="size"),
    *(lissom.Int4(codebook="nf4", group_size=size, prefer="size") for size in (32, 64, 128, -1)),
    *(lissom.Int4(codebook="kmeans", group_size=size, prefer="size") for size in (32, 64, 128, -1)),
    lissom.Int4(codebook="kmeans", codebook_scope="tensor", prefer="size"),
    lissom.Int4(codebook="kmeans", codebook_scope="group", prefer="size"),
)
"""The rows of the table; int8 for comparison."""

QUICK_CONFIGS = (
    lissom.Int4(method="rtn", prefer="size"),
    lissom.Int4(codebook="nf4", prefer="size"),
)

_METHODS = {"rtn": "round to nearest", "mse": "MSE clip search", "hqq": "HQQ"}
_CODEBOOKS = {"nf4": "NF4", "kmeans": "k-means"}


def columns(config: lissom.config.Config) -> dict[str, str]:
    """What the table says of a config: ``weights``, ``group``, ``codebook`` and ``besides``."""
    if isinstance(config, lissom.Int8):
        return {"weights": "int8", "group": "row", "codebook": "–", "besides": ""}
    if config.codebook is None:
        weights, codebook = f"int4, {_METHODS[config.method]}", "–"
    else:
        weights, codebook = "int4", f"{_CODEBOOKS[config.codebook]} per {config.codebook_scope}"
    besides = {
        "symmetric": config.codebook is None and config.symmetric,
        "float activations": config.activation is None,
        "int4 embeddings": config.embeddings == "int4",
    }
    return {
        "weights": weights,
        "group": "row" if config.group_size == -1 else str(config.group_size),
        "codebook": codebook,
        "besides": ", ".join(text for text, holds in besides.items() if holds),
    }


def markdown(data: dict[str, Any]) -> str:
    """The table of a result, as Markdown."""
    threads = data["threads"]
    speed = f"speed at {BATCH}×{LENGTH}, {threads} thread{'s' if threads > 1 else ''}, of torch fp32's"
    head = ["weights", "group size", "codebook", "", "file, of fp32's", speed, "cosine to fp32", "conversion"]
    lines = [head, ["---"] * len(head)]
    for row in data["rows"]:
        cosine = row["cosine"]
        lines.append(
            [
                row["weights"],
                row["group"],
                row["codebook"],
                row["besides"],
                f"{100 * row['file']['ratio']:.1f} %",
                f"{row['speedup_over_torch_fp32']['median']:.2f}×",
                f"{cosine['mean']:.4f}" if cosine else "not measured",
                f"{row['conversion_seconds']:.1f} s",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run(
    *,
    configs: Sequence[lissom.config.Config] | None = None,
    threads: int = max(THREADS),
    data_folder: Path | None = None,
    out: Path = report.RESULTS,
    quick: bool = False,
    budget: Budget | None = None,
) -> Path:
    """Convert, compare and time every form; prints the table, writes JSON and Markdown; the JSON's path."""
    configs = configs or (QUICK_CONFIGS if quick else CONFIGS)
    about = machine.describe()
    print(report.headline(about))
    budget = budget or (Budget(2.0, 3, 5) if quick else Budget(90.0, 7, 15))
    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(threads)
    try:
        models: dict[str, nn.Module] = {FP32: bench_minilm.load_model()}
        rows: dict[str, dict[str, Any]] = {}
        for config in configs:
            name = bench_minilm.describe(config)
            model, start = bench_minilm.load_model(), time.perf_counter()
            models[name], _ = bench_minilm.convert(model, config)
            seconds = time.perf_counter() - start
            size = bench_minilm.measure_file(model)
            rows[name] = {
                "config": lissom.config.to_dict(config),
                **columns(config),
                "conversion_seconds": seconds,
                "file": size,
            }
            print(f"{name}: converted in {seconds:.1f} s, {100 * size['ratio']:.1f} % of fp32's size")
        cosines: dict[str, Any] = {
            "left_out": "no --data DIR given (a folder that holds banking77/test.csv.gz)"
        }
        if data_folder is not None:
            sentences = bench_minilm.read_sentences(data_folder)
            cosines = bench_minilm.measure_cosine(models, sentences[:128] if quick else sentences)
        random_cosines = bench_minilm.random_token_cosines(models, BATCH, LENGTH)
        rounds = bench_minilm.time_models(models, BATCH, LENGTH, budget)
    finally:
        torch.set_num_threads(before)
    for name, row in rows.items():
        row |= {
            "seconds": spread(rounds.seconds[name]) | {"best": min(rounds.seconds[name])},
            "speedup_over_torch_fp32": spread(rounds.ratio(FP32, name)),
            "cosine": cosines.get(name),
            "cosine_random_tokens": random_cosines[name],
        }
    data = {
        "bench": BENCH,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "threads": threads,
        "rounds": len(rounds.seconds[FP32]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "cosine_left_out": cosines.get("left_out", ""),
        "rows": list(rows.values()),
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
    table = path.with_suffix(".md")
    table.write_text(markdown(data))
    print(f"\n{table.read_text()}")
    if data["noise"]:
        print(data["noise"])
    print(f"wrote {path}\nwrote {table}")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two forms, a few rounds, few sentences")
    parser.add_argument("--threads", type=int, default=max(THREADS))
    parser.add_argument("--isa", help="instruction set for lissom; torch is not limited")
    bench_minilm.data_folder_argument(parser)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    run(threads=options.threads, data_folder=options.data, out=options.out, quick=options.quick)


if __name__ == "__main__":
    main()
