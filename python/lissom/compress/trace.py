"""One run of the model that shows who calls which layer, reads which weight and consumes a norm's output.

Modules are followed by hooks; what happens between them by a ``TorchDispatchMode``, which sees every
operation on tensors. Tensors are told apart by their storage: views (reshape, slice, transpose) of a norm's
output are still that output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .inputs import Call, run, tensors_in
from .select import Layer

__all__ = ["NormUse", "Trace", "first_argument", "is_view", "storage_of", "trace"]


@dataclass
class NormUse:
    """What happened to the outputs of one norm module.

    Attributes:
        layers: linears that were called on it.
        others: everything else that consumed it, in words.
        scalable: its output is proportional to its ``weight`` and ``bias``, as tried on its real input.
    """

    layers: dict[Layer, None] = field(default_factory=dict)
    others: dict[str, None] = field(default_factory=dict)
    scalable: bool = False


@dataclass
class Trace:
    """Result of :func:`trace`.

    Attributes:
        calls: how often each layer was called.
        rows: rows of each layer's first input.
        parents_ran: layers whose parent module ran.
        read_directly: layers whose weight was read outside their own forward, and by what operation.
        norms: by norm module, what consumed its output.
        sources: by linear, the norms whose output it was called on; None stands for anything else.
    """

    calls: dict[Layer, int] = field(default_factory=dict)
    rows: dict[Layer, int] = field(default_factory=dict)
    parents_ran: set[Layer] = field(default_factory=set)
    read_directly: dict[Layer, str] = field(default_factory=dict)
    norms: dict[nn.Module, NormUse] = field(default_factory=dict)
    sources: dict[Layer, set[nn.Module | None]] = field(default_factory=dict)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a linear or embedding layer was called on, positional or by keyword."""
    values = (*args, *kwargs.values())
    return values[0] if values and isinstance(values[0], Tensor) else None


def trace(
    model: nn.Module, call: Call, layers: Iterable[Layer], norms: Iterable[nn.Module], what: str
) -> Trace:
    """Run ``call`` once and watch ``layers`` and ``norms``.

    The outputs of ``norms`` are held until the run is over, so that no other tensor can take their place in
    memory and be mistaken for them.
    """
    result = Trace()
    watch = _Watch(result, list(layers))
    with ExitStack() as stack:
        for handle in watch.hooks(model, norms):
            stack.callback(handle.remove)
        with watch:
            output = run(model, call, what)
    for tensor in tensors_in(output):
        norm = watch.norm_of(tensor)
        if norm is not None:
            result.norms[norm].others["the model returns it"] = None
    return result


class _Watch(TorchDispatchMode):
    """Sees every operation on tensors and knows which watched layer is running."""

    def __init__(self, result: Trace, layers: list[Layer]) -> None:
        super().__init__()
        self.result = result
        self.layers = layers
        self.running: list[Layer] = []
        self.owners: dict[int, list[Layer]] = {}
        self.held: list[Tensor] = []
        self.storages: dict[int, nn.Module] = {}
        for layer in layers:
            weight = layer.module._parameters.get("weight")
            if weight is not None and weight.numel() and not weight.is_meta:
                self.owners.setdefault(weight.data_ptr(), []).append(layer)

    def norm_of(self, tensor: Tensor) -> nn.Module | None:
        """The norm whose output ``tensor`` is, or is a view of."""
        pointer = storage_of(tensor)
        return None if pointer is None else self.storages.get(pointer)

    def hooks(self, model: nn.Module, norms: Iterable[nn.Module]) -> Iterable[Any]:
        """Install the hooks; yields their handles."""
        children: dict[nn.Module, list[Layer]] = {}
        by_module = {layer.module: layer for layer in self.layers}
        for module in model.modules():
            for child in module._modules.values():
                if child is not None and child in by_module:
                    children.setdefault(module, []).append(by_module[child])
        for parent, inside in children.items():

            def parent_ran(_: nn.Module, __: Any, inside: list[Layer] = inside) -> None:
                self.result.parents_ran.update(inside)

            if not isinstance(parent, torch.jit.ScriptModule):
                yield parent.register_forward_pre_hook(parent_ran)
        for layer in self.layers:

            def enter(_: nn.Module, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                self.enter(layer, first_argument(args, kwargs))

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self.running.pop()

            if not isinstance(layer.module, torch.jit.ScriptModule):
                yield layer.module.register_forward_pre_hook(enter, with_kwargs=True)
                yield layer.module.register_forward_hook(leave)
        for norm in norms:
            yield norm.register_forward_hook(self.norm_ran)

    def enter(self, layer: Layer, x: Tensor | None) -> None:
        self.running.append(layer)
        calls = self.result.calls
        calls[layer] = calls.get(layer, 0) + 1
        if x is not None and x.dim():
            self.result.rows.setdefault(layer, x.numel() // max(x.shape[-1], 1))
        norm = None if x is None else self.norm_of(x)
        self.result.sources.setdefault(layer, set()).add(norm)
        if norm is None or x is None:
            return
        use = self.result.norms[norm]
        if _channels_last(x, norm):
            use.layers[layer] = None
        else:
            use.others[f"{layer.name} reads it in another shape"] = None

    def norm_ran(self, norm: nn.Module, args: Any, output: Any) -> None:
        use = self.result.norms.setdefault(norm, NormUse())
        pointer = storage_of(output) if isinstance(output, Tensor) else None
        if pointer is None or len(args) != 1 or not isinstance(args[0], Tensor):
            use.others["it is not called with one tensor, or gives back something else"] = None
            return
        use.scalable = _is_scalable(norm, args[0], output)
        self.held.append(output)
        self.storages[pointer] = norm

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = list(tensors_in((args, kwargs)))
        for tensor in inputs:
            if self.owners and not tensor.is_meta and tensor.numel():
                for layer in self.owners.get(_pointer(tensor), []):
                    if not any(running in self.owners[_pointer(tensor)] for running in self.running):
                        self.result.read_directly.setdefault(layer, str(func))
            if self.running or not self.storages:
                continue
            norm = self.norm_of(tensor)
            if norm is not None and (func._schema.is_mutable or not is_view(result, tensor)):
                self.result.norms[norm].others[f"{func} reads it"] = None
        return result


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # tensors without storage of their own (sparse, wrapper subclasses)
        return 0


def storage_of(tensor: Tensor) -> int | None:
    """Address of the memory that ``tensor`` lies in, None where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def is_view(result: Any, tensor: Tensor) -> bool:
    """Whether all tensors in ``result`` lie in the memory of ``tensor``."""
    outputs = list(tensors_in(result))
    return bool(outputs) and all(storage_of(out) == storage_of(tensor) for out in outputs)


def _channels_last(x: Tensor, norm: nn.Module) -> bool:
    """Whether the last dimension of ``x``, a view of ``norm``'s output, still holds its channels in order."""
    channels = norm._parameters["weight"].numel()  # type: ignore[union-attr]
    if x.dim() == 0 or x.shape[-1] != channels or (channels > 1 and x.stride(-1) != 1):
        return False
    steps = [
        x.storage_offset(),
        *(stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1),
    ]
    return all(step % channels == 0 for step in steps)


def _is_scalable(norm: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether halving ``weight`` and ``bias`` of some channels halves those channels of the output, no other.

    Tells a norm that multiplies by ``weight`` from one that multiplies by ``1 + weight`` (Gemma). Powers of
    two make the comparison exact up to the rounding of the bias's addition.
    """
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None or weight.dim() != 1 or output.shape[-1:] != weight.shape:
        return False
    factors = torch.ones_like(weight)
    factors[::2] = 0.5
    saved = [(p, p.data) for p in (weight, bias) if p is not None]
    try:
        for parameter, data in saved:
            parameter.data = data * factors
        scaled = norm.forward(x)
    finally:
        for parameter, data in saved:
            parameter.data = data
    tolerance = (
        4 * torch.finfo(output.dtype).eps * max(1.0, float(output.abs().amax()) if output.numel() else 1.0)
    )
    return torch.allclose(scaled, output * factors, rtol=1e-5, atol=tolerance, equal_nan=True)
