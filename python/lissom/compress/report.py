"""What was done to a model, layer by layer, as data and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

__all__ = ["LayerReport", "Report", "format_bytes", "format_table", "get_record", "kernel_name", "set_record"]

Status = Literal["converted", "kept dense", "skipped"]


@dataclass
class LayerReport:
    """One distinct layer.

    Attributes:
        name: dotted name in the model (the first one, where it has several).
        kind: ``"linear"`` or ``"embedding"``.
        shape: of the weight: (out_features, in_features) or (num_embeddings, embedding_dim).
        status: ``"converted"``; ``"kept dense"`` (it could be converted, but measuring spoke against it);
            ``"skipped"`` (it cannot be converted, or the recipe leaves it alone).
        reason: why.
        config: the config's plain dict, or None where the recipe chose none.
        backend, isa: what serves the converted layer (``native`` and ``avx2``, ``triton`` and ``3.6.0, NVIDIA
            H200``); ``""`` where it was not converted.
        m: rows of the layer's input (linear) or number of indices (embedding) in its first call in a run
            of ``example_inputs``; None where not measured.
        calls: how often one run of ``example_inputs`` calls it; None where not measured.
        time_before_us, time_after_us: medians in microseconds, summed over the calls of one run.
        ratio: after / before, the median of paired rounds (weighted by time over several calls).
        bytes_before, bytes_after: of its saved state. A tied weight counts at the first layer that has it.
        sqnr_db: signal-to-quantization-noise ratio of its output on its real input.
        aliases: other names of the same module object.
        shared_with: names of other layers that are tied to the same weight.
        smoothed_by: name of the norm that SmoothQuant's factors were folded into, or None.
        input_scale: static activation scale, or None.
        act_fn: activation function that the layer computes in place of the module after it, or None. Times
            before are then those of both.
    """

    name: str
    kind: Literal["linear", "embedding"]
    shape: tuple[int, ...]
    status: Status
    reason: str
    config: dict[str, Any] | None = None
    backend: str = ""
    isa: str = ""
    m: int | None = None
    calls: int | None = None
    time_before_us: float | None = None
    time_after_us: float | None = None
    ratio: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float | None = None
    aliases: tuple[str, ...] = ()
    shared_with: tuple[str, ...] = ()
    smoothed_by: str | None = None
    input_scale: float | None = None
    act_fn: str | None = None


@dataclass
class Report:
    """Result of :func:`lissom.compress_`; ``print(report)`` shows it as a table.

    Attributes:
        layers: every linear and embedding layer of the model.
        bytes_before, bytes_after: parameters and persistent buffers of the whole model, shared ones once.
        latency_before_ms, latency_after_ms: medians of whole-model runs on ``example_inputs``, interleaved.
        latency_ratio: median of paired after / before.
        cosine: cosine similarity of the model's outputs before and after.
        max_abs_error: largest absolute difference of the outputs.
        threads: ``torch.get_num_threads()`` during measuring.
        device: names of the GPUs that the model is on; ``""`` on the CPU.
        seconds: what the conversion took.
        notes: remarks on the model as a whole, such as norms that could not be smoothed.
    """

    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None
    latency_ratio: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    threads: int = 0
    device: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def with_status(self, status: Status) -> list[LayerReport]:
        """The layers with this status."""
        return [layer for layer in self.layers if layer.status == status]

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that were converted."""
        return self.with_status("converted")

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready dict; inverse of :meth:`from_dict`."""
        data = dataclasses.asdict(self)
        for layer in data["layers"]:
            for key in ("shape", "aliases", "shared_with"):
                layer[key] = list(layer[key])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Report from its plain form; ValueError names an unknown key."""
        fields = dict(data)
        _check_keys(cls, fields)
        layers = []
        for entry in fields.pop("layers", []):
            _check_keys(LayerReport, entry)
            layer = dict(entry)
            for key in ("shape", "aliases", "shared_with"):
                if key in layer:
                    layer[key] = tuple(layer[key])
            layers.append(LayerReport(**layer))
        return cls(layers=layers, **fields)

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "M", "kernel", "µs", "ratio", "KiB", "SQNR", "outcome")
        table = format_table(header, [_row(layer) for layer in self.layers])
        lines = [table, "", *self._totals()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _totals(self) -> list[str]:
        count = {s: len(self.with_status(s)) for s in ("converted", "kept dense", "skipped")}
        lines = [", ".join(f"{n} {status}" for status, n in count.items())]
        if self.bytes_before:
            share = 100 * self.bytes_after / self.bytes_before
            lines.append(
                f"size     {format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)} "
                f"({share:.1f} %)"
            )
        if self.latency_before_ms is None or self.latency_after_ms is None:
            lines.append(
                "latency  not measured (no example_inputs)" if self.converted else "latency  unchanged"
            )
        else:
            speed = f", {1 / self.latency_ratio:.2f}× as fast" if self.latency_ratio else ""
            lines.append(
                f"latency  {self.latency_before_ms:.3g} → {self.latency_after_ms:.3g} ms{speed} "
                f"on {self.device or f'{self.threads} threads'}"
            )
        if self.cosine is not None:
            lines.append(f"output   cosine {self.cosine:.6f}, largest error {self.max_abs_error:.3g}")
        return lines


def _check_keys(cls: type, data: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")


def _row(layer: LayerReport) -> tuple[str, ...]:
    names = layer.name + "".join(f" = {alias}" for alias in layer.aliases)
    times = "" if layer.time_before_us is None else f"{layer.time_before_us:.3g} → {layer.time_after_us:.3g}"
    outcome = layer.status if not layer.reason else f"{layer.status}: {layer.reason}"
    return (
        names,
        layer.kind,
        "×".join(map(str, layer.shape)),
        "" if layer.m is None else str(layer.m),
        kernel_name(layer.config, layer.backend, layer.isa),
        times,
        "" if layer.ratio is None else f"{layer.ratio:.2f}",
        f"{layer.bytes_before / 1024:.0f} → {layer.bytes_after / 1024:.0f}",
        "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
        outcome,
    )


def kernel_name(config: object, backend: str, isa: str) -> str:
    """``int4 native avx2`` of a layer that was converted under ``config`` (a plain dict); else ``""``."""
    kind = config.get("kind", "") if isinstance(config, Mapping) and backend else ""
    return f"{kind} {backend} {isa}".strip()


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text table with aligned columns; columns that are empty everywhere are left out."""
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in keep] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keep))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """``count`` bytes with a binary unit: ``86.4 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


_ATTRIBUTE = "_lissom"


def set_record(model: nn.Module, record: dict[str, Any]) -> None:
    """Attach what files and ``explain`` need to know; a plain attribute, so it survives ``copy.deepcopy``."""
    setattr(model, _ATTRIBUTE, record)


def get_record(model: nn.Module) -> dict[str, Any] | None:
    """What :func:`lissom.compress_` left on ``model``, or None.

    Keys: ``recipe`` (plain dict), ``report`` (plain dict), ``example_inputs`` (a tensor, tuple or dict,
    detached and cut to at most two batch rows where the model still runs on that; None if none were given).
    """
    record = getattr(model, _ATTRIBUTE, None)
    return record if isinstance(record, dict) else None
