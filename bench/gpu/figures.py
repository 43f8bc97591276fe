"""The figures to reach on an H200, worked out from the points, and the tables as Markdown.

A figure over several points is the worst of them; ``at`` says where that is. What was not measured, and all
of a smoke run, stays empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import report
from bench.runner import geometric_mean

from . import losses, sparse
from .linear import BASELINE, INT4, INT4_CUDA, INT4_TRITON, INT8, INT8_CUDA, INT8_TRITON, INT_MM

__all__ = ["TARGETS", "figures", "markdown"]

TARGETS: dict[str, report.Target] = {
    "int4_over_cublas": ("×", ">=", 3.0, "int4, M ≤ 16: against cuBLAS bf16"),
    "int4_hbm": ("%", ">=", 0.75, "int4, M ≤ 16: share of HBM's read bandwidth"),
    "int8_over_cublas": ("×", ">=", 1.5, "int8, M ≥ 1024, quantization included: against cuBLAS bf16"),
    "int8_over_int_mm": ("×", ">=", 1.3, "int8, M ≥ 1024: against torch._int_mm with eager quantization"),
    "sparse_over_cublas": ("×", ">=", 0.8, "blocks of 64, 128: (1 − s) × speed-up over cuBLAS bf16"),
    "sparse_over_cublas_large": ("×", ">=", 0.8, "… of these M ≥ 1024"),
    "sparse_over_bsr": ("×", ">=", 1.0, "blocks of 64, 128: against torch's BSR kernel"),
    "distill_floor": ("%", ">=", 0.80, "distill_loss: share of the HBM floor"),
    "distill_over_eager": ("×", ">=", 3.0, "distill_loss: against the eager composite"),
    "distill_over_liger": ("×", ">=", 1.0, "distill_loss: against the faster of Liger's"),
    "linear_tflops": ("TFLOP/s", ">=", 450.0, "linear_distill_loss: effective"),
    "linear_memory": ("%", "<=", 0.10, "linear_distill_loss: extra memory, of the eager composite's"),
    "linear_over_liger": ("×", ">=", None, "linear_distill_loss: against Liger's"),
    "cuda_int4_over_cublas": ("×", ">=", 3.5, "CUDA C++ int4, M ≤ 16: against cuBLAS bf16"),
    "cuda_int4_hbm": ("%", ">=", 0.85, "CUDA C++ int4, M ≤ 16: share of HBM's read bandwidth"),
    "cuda_int4_over_triton": ("×", ">=", 1.0, "CUDA C++ int4, M ≤ 64: against Triton"),
    "cuda_int8_tops": ("TOP/s", ">=", 1300.0, "CUDA C++ int8, 8192³, quantization included"),
    "cuda_int8_over_cublas": ("×", ">=", 1.7, "CUDA C++ int8, 8192³: against cuBLAS bf16"),
    "cuda_int8_hbm": ("%", ">=", 0.80, "CUDA C++ int8, M = 1: share of HBM's read bandwidth"),
    "cuda_int8_over_triton": ("×", ">=", 1.0, "CUDA C++ int8: against Triton"),
    "cuda_sparse_over_cublas": (
        "×",
        ">=",
        0.93,
        "CUDA C++ block-sparse, M ≥ 1024: (1 − s) × over cuBLAS",
    ),
    "cuda_sparse_over_triton": ("×", ">=", 1.0, "CUDA C++ block-sparse: against Triton"),
    "cuda_distill_ms": ("ms", "<=", 1.55, "CUDA C++ distill_loss, 8192 × 128256"),
    "cuda_distill_over_triton": ("×", ">=", 1.0, "CUDA C++ distill_loss: against Triton"),
}
"""The issues' figures: first of what lissom chooses by itself, then of the CUDA C++ kernels."""

Found = Iterable[tuple[float, str]]


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """Every figure with its bound, whether it was met, and ``at``, where the worst point was."""
    linear, blocks = data["linear"], data["sparse"]
    logits, hidden = data["losses"], data["linear_losses"]
    large = [p for p in linear if p["m"] >= 1024]
    small = [p for p in linear if p["m"] <= 16]
    wide = [p for p in blocks if p["block"] >= 64]
    cubes = [p for p in linear if p["k"] == p["n"] == p["m"] == 8192]
    single = [p for p in linear if p["m"] == 1]
    found: dict[str, list[tuple[float, str]]] = {
        "int4_over_cublas": list(_over(small, INT4, BASELINE)),
        "int4_hbm": list(_each(small, INT4, lambda side: _median(side.get("share_of_hbm")))),
        "int8_over_cublas": list(_over(large, INT8, BASELINE)),
        "int8_over_int_mm": list(_over(large, INT8, INT_MM)),
        "sparse_over_cublas": list(_sparse_over(wide, BASELINE)),
        "sparse_over_cublas_large": list(_sparse_over([p for p in wide if p["m"] >= 1024], BASELINE)),
        "sparse_over_bsr": list(_sparse_over(wide, sparse.BSR)),
        "distill_floor": list(_each(logits, losses.OURS, lambda s: _median(s.get("share_of_floor")))),
        "distill_over_eager": list(_over(logits, losses.OURS, losses.EAGER)),
        "distill_over_liger": list(_over_liger(logits)),
        "linear_tflops": list(_each(hidden, losses.OURS, lambda side: side["tflop_per_s"])),
        "linear_memory": list(_memory(hidden)),
        "linear_over_liger": list(_over_liger(hidden)),
        "cuda_int4_over_cublas": list(_over(small, INT4_CUDA, BASELINE)),
        "cuda_int4_hbm": list(_each(small, INT4_CUDA, lambda side: _median(side.get("share_of_hbm")))),
        "cuda_int4_over_triton": list(_over([p for p in linear if p["m"] <= 64], INT4_CUDA, INT4_TRITON)),
        "cuda_int8_tops": list(_each(cubes, INT8_CUDA, lambda side: side["top_per_s"])),
        "cuda_int8_over_cublas": list(_over(cubes, INT8_CUDA, BASELINE)),
        "cuda_int8_hbm": list(_each(single, INT8_CUDA, lambda side: _median(side.get("share_of_hbm")))),
        "cuda_int8_over_triton": list(_over(linear, INT8_CUDA, INT8_TRITON)),
        "cuda_sparse_over_cublas": list(
            _sparse_over([p for p in wide if p["m"] >= 1024], BASELINE, "lissom cuda bf16")
        ),
        "cuda_sparse_over_triton": list(_sparse_over(wide, "lissom bf16", "lissom cuda bf16")),
        "cuda_distill_ms": list(
            _each(
                [p for p in logits if (p["rows"], p["vocab"]) == (8192, 128256)],
                losses.OURS_CUDA,
                lambda side: 1e3 * side["seconds"]["median"],
            )
        ),
        "cuda_distill_over_triton": list(_over(logits, losses.OURS_CUDA, losses.OURS_TRITON)),
    }
    values: dict[str, float | None] = {}
    places = {}
    for name, pairs in found.items():
        if pairs:
            worst = max(pairs) if TARGETS[name][1] == "<=" else min(pairs)
            values[name], places[name] = worst
    judged = report.judge(TARGETS, values if data["timing"] == "cuda" else {})
    return {
        name: figure | {"at": places.get(name, ""), "points": len(found[name])}
        for name, figure in judged.items()
    }


def _median(spread: dict[str, float] | None) -> float | None:
    return None if spread is None else spread["median"]


def _each(
    points: Sequence[dict[str, Any]], name: str, value: Callable[[dict[str, Any]], float | None]
) -> Found:
    for point in points:
        if name in point["sides"]:
            found = value(point["sides"][name])
            if found is not None:
                yield found, place(point)


def _over(points: Sequence[dict[str, Any]], name: str, other: str) -> Found:
    return _each(points, name, lambda side: _median(side["speedup_over"].get(other)))


def _over_liger(points: Sequence[dict[str, Any]]) -> Found:
    def worst(side: dict[str, Any]) -> float | None:
        ratios = [r["median"] for other, r in side["speedup_over"].items() if other.startswith("Liger")]
        return min(ratios, default=None)

    return _each(points, losses.OURS, worst)


def _sparse_over(points: Sequence[dict[str, Any]], other: str, ours: str = "lissom bf16") -> Found:
    """bfloat16 values: against the dense layer, times the density; against a side of the same sparsity."""
    for point in points:
        for name, side in point["sides"].items():
            if not name.startswith(ours):
                continue
            sparsity = name.removeprefix(f"{ours} ")
            rival = other if other == BASELINE else f"{other} {sparsity}"
            ratio = _median(side["speedup_over"].get(rival))
            if ratio is not None:
                factor = side["density"] if other == BASELINE else 1.0
                yield ratio * factor, f"{place(point)}, {sparsity}"


def _memory(points: Sequence[dict[str, Any]]) -> Found:
    for point in points:
        sides = point["sides"]
        if losses.OURS in sides and sides.get(losses.EAGER, {}).get("extra_bytes"):
            yield sides[losses.OURS]["extra_bytes"] / sides[losses.EAGER]["extra_bytes"], place(point)


def place(point: dict[str, Any]) -> str:
    """Where a point is, in words."""
    if "block" in point:
        return f"{point['k']}×{point['n']}, M={point['m']}, blocks {point['block']}"
    if "m" in point:
        return f"{point['k']}×{point['n']}, M={point['m']}"
    if "tokens" in point:
        return f"{point['tokens']}×{point['hidden']}×{point['vocab']}"
    return f"{point['rows']}×{point['vocab']}"


# ------------------------------------------------------------------------------------------- Markdown


def markdown(data: dict[str, Any]) -> str:
    """The whole result as a page."""
    about, gpu = data["machine"], data["machine"]["gpu"]
    dirty = " + changes" if about["dirty"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k in ("torch", "triton"))
    parts = [
        f"# {gpu['name']}",
        f"Commit {about['commit'][:10]}{dirty}, {about['date']}. {versions}, CUDA {gpu['cuda']}, driver "
        f"{gpu['driver']}. `{about['command']}`",
        "" if data["timing"] == "cuda" else "SMOKE RUN on a CPU: the numbers mean nothing.",
        "## Figures to reach",
        table(["figure", "measured", "bound", "", "worst at"], _figure_rows(data["figures"])),
        "## What the GPU can do",
        table(
            ["floor", "median", "unit"],
            [[name, f"{f['median']:.4g}", f["unit"]] for name, f in data["floors"].items()],
        ),
        "## int8 and int4 linear layers",
        "Time of a call in a CUDA graph; in brackets as Python launches it. Speed-up over `torch bf16` "
        "(cuBLAS) is the median of paired rounds.",
        *_linear_tables(data["linear"]),
        "## Block-sparse linear layers",
        "Speed-up over `torch bf16` (cuBLAS); in brackets that times the density, which at best is 1.",
        *_sparse_tables(data["sparse"]),
        "## Distillation losses",
        table(*_loss_rows(data["losses"], "share_of_floor", "of the HBM floor")),
        table(*_loss_rows(data["linear_losses"], "share_of_peak", "of the bf16 peak")),
    ]
    for title, key in (("Faults of lissom", "faults"), ("Peers that did not run", "peers_left_out")):
        if data[key]:
            rows = [[name, reason.replace("|", "\\|")] for name, reason in data[key].items()]
            parts += [f"## {title}", table(["side", "reason"], rows)]
    if left_out := data.get("points_left_out"):
        parts += ["## Not measured: the time was over", ", ".join(left_out)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One Markdown table; nothing without rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for figure in found.values():
        scale, unit = (100, " %") if figure["unit"] == "%" else (1, f" {figure['unit']}")
        value = "not measured" if figure["value"] is None else f"{figure['value'] * scale:.3g}{unit}"
        sign = "≥" if figure["direction"] == ">=" else "≤"
        bound = "" if figure["bound"] is None else f"{sign} {figure['bound'] * scale:g}{unit}"
        verdict = {True: "met", False: "missed", None: ""}[figure["met"]]
        rows.append([figure["meaning"], value, bound, verdict, figure["at"]])
    return rows


def _linear_tables(points: Sequence[dict[str, Any]]) -> list[str]:
    """One table per shape: a row per side, a column per M."""
    parts = []
    for k, n in dict.fromkeys((p["k"], p["n"]) for p in points):
        here = [p for p in points if (p["k"], p["n"]) == (k, n)]
        names = list(dict.fromkeys(name for p in here for name in p["sides"]))
        rows = [[name, *(_linear_cell(p["sides"].get(name)) for p in here)] for name in names]
        parts += [f"### K={k}, N={n}", table(["side", *(f"M={p['m']}" for p in here)], rows)]
    return parts


def _linear_cell(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    text = report.si_time(side["seconds"]["median"])
    if side.get("eager_seconds"):
        text += f" ({report.si_time(side['eager_seconds'])})"
    ratio = _median(side["speedup_over"].get(BASELINE))
    text += "" if ratio is None else f", {ratio:.2f}×"
    share = _median(side.get("share_of_floor"))
    text += "" if share is None else f", {100 * share:.0f} % of floor"
    return text + (" (!)" if side["suspect"] else "")


def _sparse_tables(points: Sequence[dict[str, Any]]) -> list[str]:
    """One table per block size: a row per side and sparsity, a column per M; geometric means over shapes."""
    parts = []
    for block in dict.fromkeys(p["block"] for p in points):
        here = [p for p in points if p["block"] == block]
        ms = list(dict.fromkeys(p["m"] for p in here))
        names = dict.fromkeys(name for p in here for name in p["sides"] if name != BASELINE)
        rows = []
        for name in sorted(names):
            cells = []
            for m in ms:
                pairs = [
                    (ratio, p["sides"][name]["density"])
                    for p in here
                    if p["m"] == m and name in p["sides"]
                    for ratio in [_median(p["sides"][name]["speedup_over"].get(BASELINE))]
                    if ratio
                ]
                mean, share = geometric_mean([r for r, _ in pairs]), geometric_mean([r * d for r, d in pairs])
                cells.append(f"{mean:.2f}× ({share:.2f})" if pairs else "")
            rows.append([name, *cells])
        shapes = ", ".join(dict.fromkeys(f"{p['k']}×{p['n']}" for p in here))
        parts += [
            f"### Blocks of {block} × {block}; geometric mean over {shapes}",
            table(["side", *(f"M={m}" for m in ms)], rows),
        ]
    return parts


def _loss_rows(
    points: Sequence[dict[str, Any]], share: str, share_title: str
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for point in points:
        for name, side in point["sides"].items():
            ratio, of = _median(side["speedup_over"].get(losses.EAGER)), _median(side.get(share))
            rate = f"{side['tflop_per_s']:.0f} TFLOP/s" if "tflop_per_s" in side else ""
            rows.append(
                [
                    name,
                    place(point),
                    report.si_time(side["seconds"]["median"]),
                    rate or f"{side['gb_per_s']:.0f} GB/s",
                    "" if of is None else f"{100 * of:.0f} %",
                    "" if ratio is None else f"{ratio:.2f}×",
                    f"{side['extra_bytes'] / 2**20:.0f}",
                    f"{side['sqnr_db']:.1f}",
                ]
            )
    columns = ["side", "point", "time", "rate", share_title, "over eager", "extra MiB", "SQNR dB"]
    return columns, rows
