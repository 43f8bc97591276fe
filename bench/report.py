"""Results as JSON and as terminal tables (rich where installed, plain text elsewhere)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .machine import ROOT

__all__ = [
    "RESULTS",
    "Target",
    "headline",
    "judge",
    "load",
    "print_figures",
    "print_noise",
    "print_table",
    "result_path",
    "save",
    "si_time",
]

Target = tuple[str, Literal[">=", "<="], float | None, str]
"""A figure to reach: unit, direction, bound (None: only stated), meaning. The unit ``%`` is printed from a
fraction."""

RESULTS = ROOT / "bench" / "results"


def result_path(folder: Path, bench: str, machine: dict[str, Any], *, quick: bool = False) -> Path:
    """``<folder>/<bench>-<cpu-slug>-<isa>.json``; quick runs end in ``-quick`` and replace nothing."""
    tail = "-quick" if quick else ""
    return folder / f"{bench}-{machine['cpu_slug']}-{machine['isa']}{tail}.json"


def _clean(value: Any) -> Any:
    """Strict JSON: floats to 6 significant digits, NaN and infinities to None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return value


def save(path: Path, data: dict[str, Any]) -> Path:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(_clean(data), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def si_time(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``: three significant digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table; the first column is left-aligned, the others right-aligned."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(_plain(title, columns, rows))
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # Not a terminal (a log file): rich would cut the table at 80 columns.
    (console if console.is_terminal else Console(width=200)).print(table)


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [columns, ["-" * w for w in widths], *rows]
    ]
    return "\n".join([title, *lines, ""])


def headline(machine: dict[str, Any]) -> str:
    """One line: CPU, lissom's instruction set, commit."""
    dirty = " (dirty)" if machine["dirty"] else ""
    commit = machine["commit"][:10] + dirty
    return f"{machine['cpu']}, {machine['cores']} cores, lissom {machine['isa']}, {commit}"


def print_noise(points: Sequence[dict[str, Any]]) -> None:
    """Say how many points other processes disturbed."""
    noisy = sum(1 for point in points if point["noise"])
    if noisy:
        print(
            f"NOISY: other processes ran during {noisy} of {len(points)} points; do not quote these figures"
        )


def judge(targets: dict[str, Target], values: dict[str, float | None]) -> dict[str, Any]:
    """Each figure with its bound and whether it was met (None: not measured, or no bound), ready for JSON."""
    result = {}
    for name, (unit, direction, bound, meaning) in targets.items():
        value = values.get(name)
        met = None
        if value is not None and bound is not None:
            met = value >= bound if direction == ">=" else value <= bound
        result[name] = {
            "value": value,
            "bound": bound,
            "direction": direction,
            "unit": unit,
            "meaning": meaning,
            "met": met,
        }
    return result


def print_figures(found: dict[str, Any]) -> None:
    """The figures to reach, reached or not; ``at`` says where the worst was, if a bench tells."""
    rows = []
    located = any(figure.get("at") for figure in found.values())
    for figure in found.values():
        scale = 100 if figure["unit"] == "%" else 1
        value = (
            "not measured" if figure["value"] is None else f"{figure['value'] * scale:.4g} {figure['unit']}"
        )
        sign = "≥" if figure["direction"] == ">=" else "≤"
        bound = (
            "stated" if figure["bound"] is None else f"{sign} {figure['bound'] * scale:g} {figure['unit']}"
        )
        verdict = {True: "met", False: "MISSED", None: ""}[figure["met"]]
        rows.append([figure["meaning"], value, bound, verdict] + [figure.get("at", "")] * located)
    print_table("Figures to reach", ["figure", "measured", "bound", ""] + ["at"] * located, rows)
