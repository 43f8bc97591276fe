"""``explain``: what the linear and embedding layers of a model are now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn import SparseLinear
from ..nn._compressed import CompressedModule
from .convert import COMPRESSED_TYPES, kind_of, weight_shape
from .measure import module_bytes
from .pipeline import describe_blocks, serving_backend
from .report import Report, format_bytes, format_table, get_record

__all__ = ["Explanation", "LayerExplanation", "explain"]


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: what it is now, what serves it, its size now and in its original floating dtype, and why."""

    name: str
    type: str
    shape: tuple[int, ...]
    kernel: str
    bytes_now: int
    bytes_dense: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every linear and embedding layer of a model; ``print`` shows a table."""

    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.type,
                "×".join(map(str, layer.shape)),
                layer.kernel,
                f"{layer.bytes_now / 1024:.0f}",
                f"{layer.bytes_dense / 1024:.0f}",
                layer.reason,
            )
            for layer in self.layers
        ]
        now, dense = (sum(getattr(e, key) for e in self.layers) for key in ("bytes_now", "bytes_dense"))
        table = format_table(("layer", "is now", "shape", "kernel", "KiB", "KiB dense", "why"), rows)
        share = f" ({100 * now / dense:.1f} %)" if dense else ""
        return f"{table}\n\nthese layers: {format_bytes(now)} instead of {format_bytes(dense)}{share}"


def explain(model: nn.Module) -> Explanation:
    """Describe the linear and embedding layers of ``model``, compressed or not.

    The reasons come from the report that :func:`lissom.compress_` left on the model, if there is one.
    TypeError where ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; use a torch.nn.Module")
    record = get_record(model)
    report = Report.from_dict(record["report"]) if record else Report()
    reasons = {layer.name: layer.reason for layer in report.layers}
    seen_now: set[object] = set()
    seen_dense: set[object] = set()
    layers = []
    for name, module in model.named_modules():
        if kind_of(module) is None:
            continue
        shape = weight_shape(module)
        kernel = "dense"
        if type(module) in COMPRESSED_TYPES:
            kernel = " ".join(serving_backend(module)).strip()
        layers.append(
            LayerExplanation(
                name=name,
                type=type(module).__name__,
                shape=shape,
                kernel=kernel,
                bytes_now=module_bytes(module, seen_now),
                bytes_dense=_dense_bytes(module, shape, seen_dense),
                reason=reasons.get(name) or _description(module),
            )
        )
    return Explanation(tuple(layers))


def _description(module: nn.Module) -> str:
    """What there is to say of a layer that no report speaks of."""
    return describe_blocks(module) if isinstance(module, SparseLinear) and not module.values.is_meta else ""


def _dense_bytes(module: nn.Module, shape: tuple[int, ...], seen: set[object]) -> int:
    """Bytes of the layer with a weight in its floating dtype; tied weights count once."""
    if not isinstance(module, CompressedModule):
        return module_bytes(module, seen)
    stored, like = module._stored_weight, module._like
    bias = getattr(module, "bias", None)
    total = 0 if bias is None else bias.numel() * bias.element_size()
    key = (stored.device, stored.data_ptr())
    if key not in seen:
        seen.add(key)
        total += torch.Size(shape).numel() * like.element_size()
    return int(total)
