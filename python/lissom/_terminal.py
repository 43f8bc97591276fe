"""What the commands draw: tables, progress bars, numbers. Needs rich; imported by the commands only."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .compress.report import kernel_name

__all__ = ["bar", "console", "layer_table", "microseconds", "progress", "size", "table"]

MAX_ROWS = 60
"""More layers than this are shown in groups of like ones."""

_PIPE_WIDTH = 180


def console(*, stderr: bool = False) -> Console:
    """A console that does not squeeze tables into 80 columns where the output is a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def size(count: float) -> str:
    """Bytes as ``21.9 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def microseconds(value: float) -> str:
    """Microseconds as ``15.2 µs``, ``3.41 ms`` or ``1.20 s``."""
    for unit in ("µs", "ms"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)
) -> Table:
    """A plain table; columns are right-aligned but for those in ``left``."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for i, name in enumerate(columns):
        first = i == left[0]
        justify: Any = "left" if i in left else "right"
        result.add_column(
            name, justify=justify, no_wrap=i not in left, overflow="fold", min_width=20 if first else 0
        )
    for row in rows:
        result.add_row(*row)
    return result


def layer_table(title: str, layers: Sequence[Mapping[str, Any]]) -> Table:
    """The layers of a report (as plain dicts); like ones in one row where there are many."""
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = [(layer["name"], [layer]) for layer in layers]
    if len(layers) > MAX_ROWS:
        rows = _grouped(layers)
    columns = (
        "layer",
        "shape",
        "kernel",
        "M",
        "time before → after",
        "speed",
        "size before → after",
        "SQNR",
        "outcome",
    )
    return table(title, columns, (_row(name, group) for name, group in rows), left=(0, 2, 8))


def _grouped(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Layers whose names differ in numbers only and that had the same shape and fate."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer["name"])
        fate = (layer["status"], layer["backend"], layer["isa"], repr(layer["config"]), layer["m"])
        key = (pattern, tuple(layer["shape"]), *fate)
        groups.setdefault(key, []).append(layer)
    return [
        (f"{key[0]} ({len(group)})" if len(group) > 1 else group[0]["name"], group)
        for key, group in groups.items()
    ]


def _row(name: str, group: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    first = group[0]

    def middle(key: str) -> float | None:
        values = [layer[key] for layer in group if layer[key] is not None]
        return statistics.median(values) if values else None

    before, after, ratio, sqnr = (middle(k) for k in ("time_before_us", "time_after_us", "ratio", "sqnr_db"))
    times = "" if before is None or after is None else f"{microseconds(before)} → {microseconds(after)}"
    sizes = f"{size(sum(layer['bytes_before'] for layer in group))} → "
    sizes += size(sum(layer["bytes_after"] for layer in group))
    color = {"converted": "green", "kept dense": "yellow"}.get(first["status"], "dim")
    reason = first["reason"] if len({layer["reason"] for layer in group}) == 1 else ""
    if reason.endswith("as fast"):  # the speed has a column of its own
        reason = ""
    return (
        " = ".join([name, *(first["aliases"] if len(group) == 1 else ())]),
        "×".join(map(str, first["shape"])),
        kernel_name(first["config"], first["backend"], first["isa"]) or "torch",
        "" if first["m"] is None else str(first["m"]),
        times,
        "" if not ratio else f"{1 / ratio:.2f}×",
        sizes,
        "" if sqnr is None else f"{sqnr:.1f} dB",
        f"[{color}]{first['status']}[/]" + (f": {reason}" if reason else ""),
    )


@contextmanager
def bar(title: str, enabled: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, if that is a terminal; yields ``update(done, total, what)``."""
    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=screen, transient=True, disable=not (enabled and screen.is_terminal)
    ) as drawn:
        task = drawn.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str) -> None:
            drawn.update(task, completed=done, total=total or None, what=what)

        yield update


@contextmanager
def progress(title: str, enabled: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """The same for the ``progress=`` argument of ``compress_``: ``(stage, done, total, name)``."""
    with bar(title, enabled) as update:
        yield lambda stage, done, total, name: update(done, total, f"{stage} {name}")
