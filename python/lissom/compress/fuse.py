"""Activation functions that a compressed linear can compute itself, before its output leaves the registers.

A pair (linear, activation module) is fused where one run of the model showed that the linear's whole
output goes into that module and nowhere else, and that the module is fed by such linears only. What a module
computes is tried out, not read off its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .inputs import Call, run, tensors_in
from .select import Layer
from .trace import first_argument, is_view, storage_of

__all__ = ["Fusion", "find_fusions", "recognise"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

PROBE_TOLERANCE = 2e-6
"""Formulas of one function differ by a few float32 roundings of values up to 8, the two gelus by 4e-4."""


@dataclass(eq=False)
class Fusion:
    """An activation module and the linears that feed it."""

    module: nn.Module
    act_fn: str
    layers: list[Layer] = field(default_factory=list)

    @property
    def active(self) -> bool:
        """Whether all its linears are to be converted, so that nobody needs the module any more."""
        return all(layer.active for layer in self.layers)


def recognise(module: nn.Module) -> str | None:
    """Name of the fusable function that ``module`` computes, or None.

    Only the activation modules of torch and transformers are tried, on a grid of inputs.
    """
    origin = type(module).__module__
    if not (origin == "torch.nn.modules.activation" or origin == "transformers.activations"):
        return None
    if next(module.parameters(), None) is not None or _hooked(module):
        return None
    probe = torch.linspace(-8, 8, 1601)
    try:
        with torch.no_grad():
            result = module(probe.clone())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None  # it takes something else than one tensor
    if not isinstance(result, Tensor) or result.shape != probe.shape or result.dtype != probe.dtype:
        return None
    for name, function in _FUNCTIONS.items():
        if torch.allclose(result, function(probe), rtol=0, atol=PROBE_TOLERANCE):
            return name
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def find_fusions(model: nn.Module, call: Call, layers: Iterable[Layer], what: str) -> list[Fusion]:
    """Run ``call`` once; the fusions among ``layers`` (linears to be converted) that it shows to be safe."""
    fusions = {module: Fusion(module, act_fn) for module in model.modules() if (act_fn := recognise(module))}
    linears = [layer for layer in layers if layer.kind == "linear" and layer.active and not layer.tied]
    if not fusions or not linears:
        return []
    watch = _Watch(linears, fusions)
    with ExitStack() as stack:
        for handle in watch.hooks():
            stack.callback(handle.remove)
        with watch:
            output = run(model, call, what)
    for tensor in tensors_in(output):
        watch.spoil(tensor)
    return watch.sound()


class _Watch(TorchDispatchMode):
    """Follows the outputs of linears, told apart by their storage, to whatever reads them."""

    def __init__(self, linears: list[Layer], fusions: dict[nn.Module, Fusion]) -> None:
        super().__init__()
        self.linears = linears
        self.fusions = fusions
        # By storage: who made it, and the tensor itself, so that no other takes its place in memory.
        self.producers: dict[int, tuple[Layer, Tensor]] = {}
        self.consumers: dict[Layer, set[nn.Module | None]] = {layer: set() for layer in linears}
        self.calls: dict[Layer, list[int]] = {layer: [0, 0] for layer in linears}  # made, read by a module
        self.feeders: dict[nn.Module, set[Layer | None]] = {module: set() for module in fusions}
        self.inside = 0

    def hooks(self) -> Iterable[Any]:
        """Install the hooks; yields their handles."""
        for layer in self.linears:

            def made(_: nn.Module, __: Any, output: Any, layer: Layer = layer) -> None:
                pointer = storage_of(output) if isinstance(output, Tensor) else None
                self.calls[layer][0] += 1
                if pointer is not None:
                    self.producers[pointer] = (layer, output)

            yield layer.module.register_forward_hook(made)
        for module in self.fusions:

            def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
                self.inside += 1
                x = first_argument(args, kwargs)
                pointer = None if x is None else storage_of(x)
                layer, _ = self.producers.get(pointer or 0, (None, None))
                self.feeders[module].add(layer)
                if layer is not None and x is not None:
                    whole = x.numel() * x.element_size() == x.untyped_storage().nbytes()
                    self.consumers[layer].add(module if whole else None)
                    self.calls[layer][1] += 1

            def leave(_: nn.Module, __: Any, output: Any) -> None:
                self.inside -= 1
                pointer = storage_of(output) if isinstance(output, Tensor) else None
                if pointer is not None:
                    self.producers.pop(
                        pointer, None
                    )  # computed in place: from here on the storage is the result

            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(leave)

    def spoil(self, tensor: Tensor) -> None:
        """``tensor`` is read by something that is no activation module."""
        layer, _ = self.producers.pop(storage_of(tensor) or 0, (None, None))
        if layer is not None:
            self.consumers[layer].add(None)

    def sound(self) -> list[Fusion]:
        """The fusions all of whose conditions held."""
        for layer in self.linears:
            made, read = self.calls[layer]
            (module,) = self.consumers[layer] if len(self.consumers[layer]) == 1 else (None,)
            if module is not None and made == read:
                self.fusions[module].layers.append(layer)
        return [
            fusion
            for module, fusion in self.fusions.items()
            if fusion.layers and self.feeders[module] == set(fusion.layers)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and self.producers:
            for tensor in tensors_in((args, kwargs)):
                if func._schema.is_mutable or not is_view(result, tensor):
                    self.spoil(tensor)
        return result
