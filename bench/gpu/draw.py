"""Plots of a result, next to its JSON: SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.plot import _pyplot, _save
from bench.runner import geometric_mean

from . import losses, sparse
from .linear import BASELINE, INT4, INT4_CUDA, INT4PACK, INT8, INT8_CUDA, INT_MM

__all__ = ["draw"]

STYLES: dict[str, dict[str, Any]] = {
    INT4: {"color": "#be185d", "linewidth": 2.6, "marker": "o", "zorder": 6},
    f"{INT4} int8": {"color": "#db2777", "linewidth": 1.4, "marker": "x", "linestyle": "-."},
    INT8: {"color": "#c2410c", "linewidth": 2.6, "marker": "o", "zorder": 5},
    INT8_CUDA: {"color": "#0f766e", "linewidth": 2.0, "marker": "P", "linestyle": "--"},
    INT4_CUDA: {"color": "#6d28d9", "linewidth": 2.0, "marker": "X", "linestyle": "--"},
    f"{INT8} weight-only": {"color": "#ea580c", "linewidth": 1.4, "marker": "d", "linestyle": "--"},
    INT4PACK: {"color": "#65a30d", "linewidth": 1.6, "marker": "^"},
    INT_MM: {"color": "#1d4ed8", "linewidth": 1.6, "marker": "s"},
    f"{INT_MM} compiled": {"color": "#1d4ed8", "linewidth": 0, "marker": "*", "markersize": 9},
}
"""Sides that are drawn, in the order of the legend."""

BLOCK_COLORS = {32: "#f59e0b", 64: "#c2410c", 128: "#7c2d12"}


def _title(data: dict[str, Any]) -> str:
    about = data["machine"]
    dirty = " + changes" if about["dirty"] else ""
    smoke = "" if data["timing"] == "cuda" else " — SMOKE RUN, NOT A MEASUREMENT"
    return f"{about['gpu']['name']}, commit {about['commit'][:10]}{dirty}{smoke}"


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """Every plot that the result has points for; the files written."""
    drawers: dict[str, Callable[[dict[str, Any], Path], list[Path]]] = {
        "linear": _linear,
        "sparse": _sparse,
        "losses": _losses,
    }
    written = []
    for key, drawer in drawers.items():
        if data[key]:
            written += drawer(data, stem.with_name(f"{stem.name}-{key}"))
    return written


def _panels(count: int, width: float = 3.4) -> tuple[Any, Any, Sequence[Any]]:
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, count, figsize=(width * count + 0.6, 3.6), squeeze=False, layout="constrained"
    )
    return plt, figure, axes[0]


def _linear(data: dict[str, Any], stem: Path) -> list[Path]:
    """Speed-up over cuBLAS bf16 against M, one panel per (K, N)."""
    points = data["linear"]
    shapes = list(dict.fromkeys((p["k"], p["n"]) for p in points))
    _, figure, axes = _panels(len(shapes))
    handles: dict[str, Any] = {}
    for axis, (k, n) in zip(axes, shapes, strict=True):
        here = sorted((p for p in points if (p["k"], p["n"]) == (k, n)), key=lambda p: p["m"])
        for name, style in STYLES.items():
            pairs = [
                (p["m"], p["sides"][name]["speedup_over"][BASELINE]["median"])
                for p in here
                if name in p["sides"] and BASELINE in p["sides"][name]["speedup_over"]
            ]
            if pairs:
                (handles[name],) = axis.plot(*zip(*pairs, strict=True), **style)
        axis.axhline(1.0, color="#6b7280", linewidth=1.2, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_title(f"K={k}, N={n}")
        axis.set_xlabel("M, rows of the input")
    axes[0].set_ylabel("speed-up over cuBLAS bf16, ×")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(data), fontsize=9, color="#4b5563")
    return _save(figure, stem)


def _sparse(data: dict[str, Any], stem: Path) -> list[Path]:
    """Speed-up over cuBLAS bf16 against sparsity, one panel per M; geometric means over (K, N)."""
    points = data["sparse"]
    ms = sorted({p["m"] for p in points})
    _, figure, axes = _panels(len(ms), 2.9)
    handles: dict[str, Any] = {}
    for axis, m in zip(axes, ms, strict=True):
        for block in sorted({p["block"] for p in points}):
            here = [p for p in points if (p["m"], p["block"]) == (m, block)]
            for what, line in (("lissom bf16", "-"), ("lissom int8", "-."), (sparse.BSR, ":")):
                curve = _curve(here, what)
                if curve:
                    (handles[f"{what}, {block}×{block}"],) = axis.plot(
                        *zip(*curve, strict=True),
                        color=BLOCK_COLORS.get(block, "#6b7280"),
                        linestyle=line,
                        marker=".",
                    )
        sparsities = sorted({s for p in points for name in p["sides"] if (s := _sparsity(name)) is not None})
        ideal = [1 / (1 - s) for s in sparsities]
        (handles["1 / (1 − sparsity)"],) = axis.plot(sparsities, ideal, color="#9ca3af", linewidth=1.2)
        axis.axhline(1.0, color="#6b7280", linewidth=1.2, linestyle="--")
        axis.set_yscale("log", base=2)
        axis.set_title(f"M={m}")
        axis.set_xlabel("sparsity")
    axes[0].set_ylabel("speed-up over cuBLAS bf16, ×")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(_title(data), fontsize=9, color="#4b5563")
    return _save(figure, stem)


def _sparsity(name: str) -> float | None:
    return float(name.split()[-2]) / 100 if name.endswith(" %") else None


def _curve(points: Sequence[dict[str, Any]], what: str) -> list[tuple[float, float]]:
    ratios: dict[float, list[float]] = {}
    for point in points:
        for name, side in point["sides"].items():
            sparsity = _sparsity(name)
            if name.startswith(what) and sparsity is not None and BASELINE in side["speedup_over"]:
                ratios.setdefault(sparsity, []).append(side["speedup_over"][BASELINE]["median"])
    return [(sparsity, geometric_mean(found)) for sparsity, found in sorted(ratios.items())]


def _losses(data: dict[str, Any], stem: Path) -> list[Path]:
    """Time of forward + backward, a panel per point; extra memory beside the bars."""
    points = [*data["losses"], *data["linear_losses"]]
    _, figure, axes = _panels(len(points), 4.2)
    for axis, point in zip(axes, points, strict=True):
        sides = sorted(point["sides"].items(), key=lambda item: -item[1]["seconds"]["median"])
        names = [name for name, _ in sides]
        times = [side["seconds"]["median"] * 1e3 for _, side in sides]
        colors = ["#c2410c" if name == losses.OURS else "#9ca3af" for name in names]
        bars = axis.barh(names, times, color=colors)
        labels = [
            f"{time:.3g} ms, +{side['extra_bytes'] / 2**30:.2g} GiB"
            for time, (_, side) in zip(times, sides, strict=True)
        ]
        axis.bar_label(bars, labels, fontsize=8, padding=3)
        axis.margins(x=0.45)
        axis.grid(axis="y", visible=False)
        what = "distill_loss" if "rows" in point else "linear_distill_loss"
        numbers = [point[key] for key in ("rows", "tokens", "hidden", "vocab") if key in point]
        axis.set_title(f"{what}, {'×'.join(map(str, numbers))}")
        axis.set_xlabel("forward + backward, ms")
    figure.suptitle(_title(data), fontsize=9, color="#4b5563")
    return _save(figure, stem)
