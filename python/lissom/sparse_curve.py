"""``lissom bench sparse``: how much faster block-sparse layers are than a dense one, against the sparsity.

Blocks are chosen at random, so rows are unevenly filled, as in a pruned layer. Each result is checked
against the dense product with the same stored weights before it is timed. The plot needs matplotlib.
"""

from __future__ import annotations

import importlib
import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .compress.measure import SignalToNoise, time_pair
from .compress.sparsity import FAST_BLOCK_SHAPES
from .formats import BlockSparseWeights, block_sparse_from_dense
from .microbench import Progress
from .nn import SparseLinear

__all__ = [
    "DTYPES",
    "SPARSITIES",
    "check_plot",
    "crossover",
    "crossovers",
    "draw",
    "measure",
    "parse_block",
    "parse_sparsities",
    "random_block_sparse",
    "tables",
]

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
DTYPES: dict[Dtype, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
"""Types of the stored values."""

MIN_SQNR_DB: dict[Dtype, float] = {"float32": 80.0, "bfloat16": 40.0, "float16": 55.0, "int8": 25.0}
"""A layer below this, against the product with its own weights, is wrong. Gaussian data gives about 130 dB in
float32 and, for the int8 activations, 40."""

CURVE_STEPS = 16
"""Pieces in which a curve is drawn between two points."""

COLORS = ("#c2410c", "#be185d", "#7c3aed", "#1d4ed8", "#0891b2", "#0e9f6e", "#65a30d", "#a16207")


Curve = list[tuple[float, float]]
"""(sparsity, speed-up) pairs."""

Panel = tuple[tuple[int, int], int, int]
"""Shape (K, N), M, threads."""


def parse_block(text: str) -> tuple[int, int]:
    """``8x1`` as (8, 1), that is (outputs, inputs); ValueError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text)
    if found is None:
        raise ValueError(f"--block {text!r} is not outputs x inputs of a block, such as 8x1")
    return int(found[1]), int(found[2])


def parse_sparsities(text: str) -> list[float]:
    """``0.5,0.9`` as [0.5, 0.9], ascending and each once; ValueError for what is not in [0, 1)."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < 1 for value in values):
        raise ValueError(
            f"--sparsity {text!r} is not a list of sparsities, from 0 to below 1, such as 0.5,0.9"
        )
    return values


def random_block_sparse(
    weight: Tensor, block_shape: tuple[int, int], sparsity: float, dtype: Dtype = "float32", seed: int = 0
) -> BlockSparseWeights:
    """``weight`` ``[N, K]`` with all blocks left out but a random choice of them.

    ``round((1 - sparsity) * blocks)`` blocks are kept, each set of them equally likely, so block rows are
    unevenly filled.
    """
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, block_shape, strict=True))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(rows * columns, generator=generator)[: round((1 - sparsity) * rows * columns)]
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[kept] = True
    return block_sparse_from_dense(weight, mask.view(rows, columns), block_shape, DTYPES[dtype])


def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    threads: Sequence[int],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    block_shapes: Sequence[tuple[int, int]] = FAST_BLOCK_SHAPES,
    dtype: Dtype = "float32",
    budget_s: float = 0.15,
    progress: Progress = lambda done, total, what: None,
) -> Iterator[dict[str, Any]]:
    """One result per shape, M, number of threads, block shape and sparsity.

    Args:
        shapes: (K, N) of the layer.
        rows: M, rows of the input.
        threads: numbers of torch threads; the setting is restored at the end.
        sparsities: shares of the weights that are left out.
        block_shapes: (outputs, inputs) of a block.
        dtype: of the stored values.
        budget_s: seconds for each comparison with ``nn.Linear`` in float32, interleaved.

    Raises:
        RuntimeError: a result is wrong; it is not timed.
    """
    before = torch.get_num_threads()
    total = len(shapes) * len(sparsities) * len(block_shapes) * len(threads) * len(rows)
    done = 0
    try:
        for k, n in shapes:
            dense = nn.Linear(k, n).requires_grad_(False)
            nn.init.normal_(dense.weight, generator=torch.Generator().manual_seed(0))
            for block_shape in block_shapes:
                for sparsity in sparsities:
                    kept = random_block_sparse(dense.weight, block_shape, sparsity, dtype)
                    layer = SparseLinear.from_weights(kept, dense.bias).requires_grad_(False).eval()
                    for t in threads:
                        torch.set_num_threads(t)
                        for m in rows:
                            where = (
                                f"{k}×{n} M={m}, {block_shape[0]}×{block_shape[1]} at {100 * sparsity:g} %"
                            )
                            progress(done, total, where)
                            yield {
                                "shape": [k, n],
                                "m": m,
                                "threads": t,
                                "dtype": dtype,
                                "block_shape": list(block_shape),
                                "sparsity": sparsity,
                                **_point(dense, layer, m, dtype, budget_s),
                            }
                            done += 1
    finally:
        torch.set_num_threads(before)


def _point(dense: nn.Linear, layer: SparseLinear, m: int, dtype: Dtype, budget_s: float) -> dict[str, Any]:
    x = torch.randn(m, dense.in_features, generator=torch.Generator().manual_seed(m))
    with torch.no_grad():
        quality = SignalToNoise()
        expected = nn.functional.linear(x, layer.to_dense().float(), dense.bias)
        found = layer(x)
        quality.add(expected, found)
        if found.shape != expected.shape or quality.db is None or quality.db < MIN_SQNR_DB[dtype]:
            raise RuntimeError(
                f"block_sparse_linear: wrong result with blocks {layer.block_shape} (SQNR {quality.db} dB, "
                f"below {MIN_SQNR_DB[dtype]:g}); not timed"
            )
        timing = time_pair(lambda: dense(x), lambda: layer(x), budget_s=budget_s)
    return {
        "density": layer.density,
        "sqnr_db": quality.db,
        "fp32_us": timing.before_us,
        "lissom_us": timing.after_us,
        "speedup_fp32": 1 / timing.ratio,
        "rounds": timing.rounds,
    }


def crossover(curve: Curve) -> float | None:
    """Least sparsity from which on the speed-up stays at 1 or above, of (sparsity, speed-up) pairs.

    Between two points time is taken as linear in the sparsity. Where every point wins, the least sparsity
    of them; None where the highest does not.
    """
    points = sorted(curve)
    if not points or points[-1][1] < 1:
        return None
    for (low, slow), (high, fast) in zip(reversed(points[:-1]), reversed(points[1:]), strict=True):
        if slow < 1:
            return low + (high - low) * (1 / slow - 1) / (1 / slow - 1 / fast)
    return points[0][0]


def always(curve: Curve) -> bool:
    """Whether every point wins, so that the crossover lies at the least sparsity measured or below."""
    return all(speedup >= 1 for _, speedup in curve)


def _from(at: float | None, wins: bool) -> str:
    return "nowhere" if at is None else f"≤ {100 * at:.0f} %" if wins else f"{100 * at:.0f} %"


def crossovers(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The :func:`crossover` of every curve in the results of :func:`measure`.

    ``always``: the layer wins at the least sparsity measured, so the crossover lies there or below.
    """
    found = []
    for panel, curves in _panels(points).items():
        (k, n), m, threads = panel
        for block_shape, curve in curves.items():
            found.append(
                {
                    "shape": [k, n],
                    "m": m,
                    "threads": threads,
                    "block_shape": list(block_shape),
                    "crossover": crossover(curve),
                    "always": always(curve),
                }
            )
    return found


def _label(panel: Panel) -> str:
    (k, n), m, threads = panel
    return f"K={k}, N={n}, M={m}, {threads} thread{'s' if threads > 1 else ''}"


def _panels(points: Sequence[dict[str, Any]]) -> dict[Panel, dict[tuple[int, int], Curve]]:
    """(shape, M, threads) → block shape → (sparsity, speed-up), in the order of measurement."""
    found: dict[Panel, dict[tuple[int, int], Curve]] = {}
    for p in points:
        curves = found.setdefault((tuple(p["shape"]), p["m"], p["threads"]), {})
        curves.setdefault(tuple(p["block_shape"]), []).append((p["sparsity"], p["speedup_fp32"]))
    return found


def tables(
    points: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of a table per shape, M and threads; ``found`` as :func:`crossovers` has it.

    Needs rich.
    """
    from ._terminal import microseconds

    for (k, n), m, threads in _panels(points):
        here = [p for p in points if (p["shape"], p["m"], p["threads"]) == ([k, n], m, threads)]
        sparsities = sorted({p["sparsity"] for p in here})
        fp32_us = statistics.median(p["fp32_us"] for p in here)
        rows = []
        for crossing in found:
            if (crossing["shape"], crossing["m"], crossing["threads"]) != ([k, n], m, threads):
                continue
            block_shape = crossing["block_shape"]
            cells = {p["sparsity"]: p for p in here if p["block_shape"] == block_shape}
            rows.append(
                [
                    "{}×{}".format(*block_shape),
                    *(
                        f"{cells[s]['speedup_fp32']:.2f}× {microseconds(cells[s]['lissom_us'])}"
                        for s in sparsities
                    ),
                    _from(crossing["crossover"], crossing["always"]),
                ]
            )
        title = (
            f"{_label(((k, n), m, threads))}, {here[0]['dtype']}: speed-up "
            f"over nn.Linear float32 ({microseconds(fp32_us)}), and time"
        )
        yield title, ["block", *(f"{100 * s:g} %" for s in sparsities), "faster from"], rows


def check_plot(path: Path) -> None:
    """Raise before anything is measured where :func:`draw` could not write ``path``.

    Raises:
        ValueError: the ending is neither ``.png`` nor ``.svg``.
        FileNotFoundError: the folder does not exist.
        ModuleNotFoundError: matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {path}: the plot is written as .png or .svg")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {path}: the folder {path.absolute().parent} does not exist")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ModuleNotFoundError("--out: the plot needs matplotlib: pip install 'lissom[bench]'") from None


def draw(points: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Speed-up against sparsity, a panel per shape, M and threads, a line per block shape.

    The dashed line is the dense layer; a diamond is where a curve passes it, and the legend says where.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    panels = _panels(points)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, 3.6 * lines + 0.4), layout="constrained", facecolor="white")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (panel, curves) in zip(axes, panels.items(), strict=False):
        for i, ((height, width), curve) in enumerate(curves.items()):
            line = draw_curve(axis, curve, color=COLORS[i % len(COLORS)])
            line.set_label(f"{height}×{width}: {_from(crossover(curve), always(curve))}")
        finish_panel(axis, _label(panel), [s for curve in curves.values() for s, _ in curve])
        axis.legend(title="block: faster from", fontsize=7, title_fontsize=7, frameon=False, loc="upper left")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("speed-up over dense fp32")
    figure.suptitle(title, fontsize=10)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=144, metadata=metadata)


def draw_curve(axis: Any, curve: Curve, **style: Any) -> Any:
    """One curve with its crossover, time linear between the points; the line, for a legend."""
    curve = sorted(curve)
    drawn, marked = [curve[0]], [0]
    for (low, slow), (high, fast) in itertools.pairwise(curve):
        for step in range(1, CURVE_STEPS + 1):
            share = step / CURVE_STEPS
            drawn.append((low + share * (high - low), 1 / (1 / slow + share * (1 / fast - 1 / slow))))
        marked.append(len(drawn) - 1)
    (line,) = axis.plot(
        *zip(*drawn, strict=True), **{"marker": "o", "markersize": 4, "markevery": marked, **style}
    )
    at = crossover(curve)
    if at is not None and not always(curve):
        axis.plot(
            [at], [1], marker="D", markersize=6, color=line.get_color(), markeredgecolor="white", zorder=9
        )
    return line


def finish_panel(axis: Any, title: str, sparsities: Sequence[float]) -> None:
    """Axes, grid, the dense layer's line at 1×."""
    axis.axhline(1, color="#6b7280", linestyle="--", linewidth=1, zorder=1)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ticks = sorted(set(sparsities))
    axis.set_xticks(ticks, [f"{100 * s:g}" for s in ticks], fontsize=8)
    axis.set_xlabel("sparsity, %")
    axis.set_title(title, fontsize=10)
    axis.grid(color="#e5e7eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
