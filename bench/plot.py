"""Plots from result files; nothing is measured here.

    python bench/plot.py [RESULT.json …]      (default: every result in bench/results)
    python bench/plot.py --hero LINEAR.json MINILM.json

SVG and PNG next to the JSON. White background, so that they read on light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import report
from bench.runner import geometric_mean

__all__ = ["draw", "draw_block_sparse", "draw_hero", "draw_linear", "draw_minilm"]

OURS, OURS_INT4 = "lissom int8", "lissom int4"

STYLES: dict[str, dict[str, Any]] = {
    OURS_INT4: {"color": "#be185d", "linewidth": 2.6, "marker": "o", "zorder": 6},
    "lissom int4 g32": {"color": "#be185d", "linewidth": 1.2, "marker": ".", "linestyle": "--"},
    "lissom int4 k-means": {"color": "#db2777", "linewidth": 1.2, "marker": "x", "linestyle": "-."},
    "lissom int4 float": {"color": "#f472b6", "linewidth": 1.2, "marker": "d", "linestyle": "--"},
    OURS: {"color": "#c2410c", "linewidth": 2.6, "marker": "o", "zorder": 5},
    "ONNX Runtime int4 g128": {"color": "#0891b2", "linewidth": 1.6, "marker": "s"},
    "ONNX Runtime int4 g32": {"color": "#0891b2", "linewidth": 1.2, "marker": "s", "linestyle": "--"},
    "torch int4 bf16 g128": {"color": "#65a30d", "linewidth": 1.6, "marker": "^"},
    "ONNX Runtime int8": {"color": "#1d4ed8", "linewidth": 1.6, "marker": "s"},
    "torch dynamic int8": {"color": "#0e9f6e", "linewidth": 1.6, "marker": "^"},
    "torchao int8": {"color": "#9333ea", "linewidth": 1.6, "marker": "v"},
    "ONNX Runtime fp32": {"color": "#6b7280", "linewidth": 1.4, "marker": "s", "linestyle": "--"},
    "torch fp32": {"color": "#9ca3af", "linewidth": 1.4, "marker": "^", "linestyle": "--"},
}
"""Sides that are drawn, in the order of the legend; the same colour in every plot."""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e7eb",
            "axes.axisbelow": True,
            "svg.hashsalt": "lissom",  # the same data gives the same file
        }
    )
    return plt


def _save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=144, bbox_inches="tight", metadata=metadata)
    _pyplot().close(figure)
    return paths


def _where(data: dict[str, Any]) -> str:
    machine = data["machine"]
    dirty = " + changes" if machine["dirty"] else ""
    noisy = ", NOISY MACHINE" if any(p["noise"] for p in data["points"]) else ""
    return (
        f"{machine['cpu']}, lissom kernels: {machine['isa']}, commit {machine['commit'][:10]}{dirty}{noisy}"
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _floors(data: dict[str, Any], threads: int) -> dict[str, float]:
    return {f["kind"]: f["median"] for f in data["floors"] if f["threads"] == threads}


def _roofline(
    data: dict[str, Any], k: int, n: int, threads: int, rows: list[int]
) -> tuple[list[float], list[float]]:
    """Attainable GOP/s against M: the peak, or the call's traffic at the bandwidth of its weights."""
    from bench.floors import bandwidth_kind

    found = _floors(data, threads)
    peaks = [found[kind] for kind in sorted(found) if kind.startswith("int")]  # int4's own before int8's
    # The points' own records say how fast their weights can be read (caches of the machine that measured).
    reads = [
        p["floor"]
        for p in data["points"]
        if (p["k"], p["n"], p["threads"]) == (k, n, threads)
        and p["floor"]
        and p["floor"]["kind"].startswith("read_")
    ]
    weights = k * n // 2 if data["bench"] == "int4_linear" else k * n
    bandwidth: float | None
    if reads and "weight_bytes" in reads[0]:
        weights, bandwidth = reads[0]["weight_bytes"], reads[0]["rate"]["median"]
    else:
        bandwidth = found.get(reads[0]["kind"] if reads else bandwidth_kind(weights, threads))
    if not peaks or bandwidth is None or not rows:
        return [], []
    ms = (
        [rows[0] * (rows[-1] / rows[0]) ** (i / 60) for i in range(61)] if len(rows) > 1 else [float(rows[0])]
    )
    attainable = [min(peaks[0], 2 * m * k * n / (weights + 4 * m * (k + n) + 4 * n) * bandwidth) for m in ms]
    return ms, attainable


def draw_linear(data: dict[str, Any], stem: Path) -> list[Path]:
    """Throughput against M, one panel per (K, N) and thread count, with the floor."""
    plt = _pyplot()
    points, bits = data["points"], data["bench"].removesuffix("_linear")
    threads = sorted({p["threads"] for p in points})
    shapes = list(dict.fromkeys((p["k"], p["n"]) for p in points))
    size = (3.1 * len(shapes) + 0.6, 2.9 * len(threads) + 1.3)
    figure, axes = plt.subplots(len(threads), len(shapes), figsize=size, squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for row, t in enumerate(threads):
        for column, (k, n) in enumerate(shapes):
            axis = axes[row][column]
            here = sorted(
                (p for p in points if (p["k"], p["n"], p["threads"]) == (k, n, t)), key=lambda p: p["m"]
            )
            ms = [p["m"] for p in here]
            for name, style in STYLES.items():
                measured = [(p["m"], p["sides"][name]["gops"]) for p in here if name in p["sides"]]
                if measured:
                    handles[name] = axis.plot(*zip(*measured, strict=True), markersize=4.5, **style)[0]
            curve = _roofline(data, k, n, t, ms)
            if curve[0]:
                handles[f"floor: {bits} peak or read bandwidth"] = axis.plot(
                    *curve, color="black", linestyle=":"
                )[0]
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ms, [str(m) for m in ms])
            axis.minorticks_off()
            axis.set_title(f"K={k}, N={n}, {_threads(t)}")
            if row == len(threads) - 1:
                axis.set_xlabel("M (rows of x)")
            if column == 0:
                axis.set_ylabel("throughput, GOP/s")
    figure.suptitle(
        f"{bits} linear layer, whole call from float to float, against what users would pick instead\n"
        f"{_where(data)}",
        fontsize=12,
    )
    figure.tight_layout()
    # Room for the legend below the panels, whatever their number.
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4,
        frameon=False,
    )
    return _save(figure, stem)


def draw_block_sparse(data: dict[str, Any], stem: Path) -> list[Path]:
    """Speed-up over the best dense float32 layer against sparsity, one panel per (K, N) and M.

    A line per block shape, int8 dashed; where a line crosses 1× the sparsity is written. The most threads.
    """
    from lissom.sparse_curve import COLORS, draw_curve, finish_panel

    plt = _pyplot()
    threads = max(p["threads"] for p in data["points"])
    points = [p for p in data["points"] if p["threads"] == threads]
    shapes = list(dict.fromkeys((p["k"], p["n"]) for p in points))
    rows = sorted({p["m"] for p in points})
    sparsities = sorted({p["sparsity"] for p in points})
    blocks = list(
        dict.fromkeys(
            tuple(s["block_shape"]) for p in points for s in p["sides"].values() if "block_shape" in s
        )
    )
    size = (3.6 * len(shapes) + 0.6, 3.0 * len(rows) + 1.3)
    figure, axes = plt.subplots(len(rows), len(shapes), figsize=size, squeeze=False, layout="constrained")
    lines = {"fp32": "-", "bf16": ":", "int8": "--"}
    handles: dict[str, Any] = {}
    for row, m in enumerate(rows):
        for column, (k, n) in enumerate(shapes):
            axis = axes[row][column]
            curves: dict[str, list[tuple[float, float]]] = {}
            styles: dict[str, dict[str, Any]] = {}
            for p in points:
                if (p["k"], p["n"], p["m"]) != (k, n, m):
                    continue
                for name, side in p["sides"].items():
                    if "block_shape" in side:
                        color = COLORS[blocks.index(tuple(side["block_shape"])) % len(COLORS)]
                        styles[name] = {"color": color, "linestyle": lines[side["precision"]]}
                    elif name.startswith(("torch CSR", "torch BSR")):
                        styles[name] = {"color": "#6b7280", "linestyle": "-." if "CSR" in name else ":"}
                    else:
                        continue
                    curve = curves.setdefault(name, [])
                    curve.append((p["sparsity"], side["speedup_over_best_dense"]["median"]))
            for name, curve in curves.items():
                handles[name] = draw_curve(axis, curve, **styles[name])
            finish_panel(axis, f"K={k}, N={n}, M={m}", sparsities)
            if column == 0:
                axis.set_ylabel("speed-up over best dense fp32")
    figure.suptitle(
        f"block-sparse linear layer against the faster of torch and ONNX Runtime fp32, {_threads(threads)}\n"
        f"{_where(data)}",
        fontsize=12,
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False)
    return _save(figure, stem)


def draw_minilm(data: dict[str, Any], stem: Path) -> list[Path]:
    """Speed-up over torch fp32 by batch×length, one panel per thread count."""
    plt = _pyplot()
    threads = sorted({p["threads"] for p in data["points"]})
    figure, axes = plt.subplots(
        1, len(threads), figsize=(4.6 * len(threads), 3.2), squeeze=False, sharey=True
    )
    for axis, t in zip(axes[0], threads, strict=True):
        _minilm_bars(axis, [p for p in data["points"] if p["threads"] == t])
        axis.set_title(_threads(t))
    axes[0][0].set_ylabel("speed-up over torch fp32, ×")
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"all-MiniLM-L6-v2 end to end\n{_where(data)}", fontsize=11)
    figure.tight_layout()
    return _save(figure, stem)


def _minilm_bars(axis: Any, points: list[dict[str, Any]]) -> None:
    names = [name for name in (OURS_INT4, OURS, "torch dynamic int8") if name in points[0]["sides"]]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        stats = [p["sides"][name]["speedup_over_torch_fp32"] for p in points]
        medians = [s["median"] for s in stats]
        errors = [[s["median"] - s["p25"] for s in stats], [s["p75"] - s["median"] for s in stats]]
        xs = [j + (i - (len(names) - 1) / 2) * width for j in range(len(points))]
        bars = axis.bar(
            xs, medians, width * 0.94, yerr=errors, color=STYLES[name]["color"], label=name, ecolor="#374151"
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.axhline(1, color="#6b7280", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(points)), [f"{p['batch']}×{p['length']}" for p in points])
    axis.set_xlabel("batch × length, tokens")
    axis.grid(axis="x", visible=False)


def draw_hero(linear: dict[str, Any], minilm: dict[str, Any] | None, stem: Path) -> list[Path]:
    """The README's plot: speed-up over torch fp32, the grid's geometric mean and MiniLM end to end."""
    plt = _pyplot()
    threads = max(p["threads"] for p in linear["points"])
    points = [p for p in linear["points"] if p["threads"] == threads]
    names = [name for name in STYLES if all(name in p["sides"] for p in points) and name != "torch fp32"]
    speedups = {
        name: geometric_mean([p["sides"][name]["speedup_over_torch_fp32"]["median"] for p in points])
        for name in names
    }
    panels = 1 if minilm is None else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 3.3), squeeze=False, layout="constrained")
    axis = axes[0][0]
    speedups["torch fp32"] = 1.0
    order = sorted(speedups, key=lambda name: speedups[name])
    bars = axis.barh(order, [speedups[n] for n in order], color=[STYLES[n]["color"] for n in order])
    axis.bar_label(bars, fmt="%.2f×", fontsize=9, padding=3)
    axis.margins(x=0.14)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("speed-up over torch fp32, ×")
    axis.set_title(f"linear layer, geometric mean of {len(points)} (K, N, M), {_threads(threads)}")
    if minilm is not None:
        t = max(p["threads"] for p in minilm["points"])
        _minilm_bars(axes[0][1], [p for p in minilm["points"] if p["threads"] == t])
        axes[0][1].set_ylabel("speed-up over torch fp32, ×")
        axes[0][1].set_title(f"all-MiniLM-L6-v2 end to end, {_threads(t)}")
        axes[0][1].margins(y=0.25)
        axes[0][1].legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    figure.suptitle(_where(linear), fontsize=9, color="#4b5563")
    return _save(figure, stem)


def draw(path: Path) -> list[Path]:
    """The plot of one result file, next to it; nothing for a bench without a plot."""
    data = report.load(path)
    drawers = {
        "int8_linear": draw_linear,
        "int4_linear": draw_linear,
        "block_sparse_linear": draw_block_sparse,
        "minilm": draw_minilm,
    }
    drawer = drawers.get(data["bench"])
    paths = drawer(data, path.with_suffix("")) if drawer else []
    for written in paths:
        print(f"wrote {written}")
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument(
        "--hero", type=Path, nargs="+", metavar="JSON", help="int8_linear result, then minilm result"
    )
    options = parser.parse_args(arguments)
    if options.hero:
        linear, *rest = [report.load(p) for p in options.hero]
        stem = options.hero[0].with_name(f"hero-{linear['machine']['cpu_slug']}-{linear['machine']['isa']}")
        print(*draw_hero(linear, rest[0] if rest else None, stem), sep="\n")
        return
    for path in options.results or sorted(report.RESULTS.glob("*.json")):
        draw(path)


if __name__ == "__main__":
    main()
