"""Stage 1: which layers the recipe means, and which of them must be left alone.

Nothing is run here. Each distinct linear or embedding module becomes one :class:`Layer`, whatever number of
names it has; layers tied to one weight form a group that is converted as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import config as configs
from ..config import BlockSparse, Int8
from ..nn._compressed import CompressedModule
from .convert import COMPRESSED_TYPES, CONVERTERS, Converter, Kind, kind_of, weight_shape
from .measure import PairedTiming, SignalToNoise
from .recipe import Config, match
from .report import Status
from .scan import read_directly

__all__ = ["FilterFn", "Layer", "check_model", "check_weights", "find_layers", "settle_ties"]

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(eq=False)
class Layer:
    """One distinct linear or embedding module on its way through the stages.

    ``status`` is None as long as it is to be converted. ``wanted`` is False where the user chose to leave it
    alone, which ``strict`` accepts. ``mask`` says which blocks are kept, where layers compete for them;
    ``rows`` is the number of rows of its first input in the tracing run. ``activation`` is the module after
    it that computes ``act_fn``, where the compressed layer can do that itself.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: Kind
    config: Config | None = None
    wanted: bool = True
    status: Status | None = None
    reason: str = ""
    tied: list[Layer] = field(default_factory=list)
    smoothed_by: str | None = None
    smoothing: Tensor | None = None
    input_scale: float | None = None
    activation_norm: Tensor | None = None
    mask: Tensor | None = None
    rows: int | None = None
    activation: nn.Module | None = None
    act_fn: str | None = None
    m: int | None = None
    timings: list[PairedTiming] = field(default_factory=list)
    signatures: set[object] = field(default_factory=set)
    quality: SignalToNoise | None = None
    candidate: CompressedModule | None = None

    @property
    def active(self) -> bool:
        return self.status is None

    @property
    def converter(self) -> Converter:
        if self.config is None:
            raise RuntimeError(f"{self.name}: no config was chosen for this layer")
        return CONVERTERS[type(self.config), self.kind]

    @property
    def static(self) -> bool:
        """Whether its activation range is to be calibrated."""
        return isinstance(self.config, Int8) and self.config.activation == "static"

    @property
    def sparse(self) -> BlockSparse | None:
        """Its config, where that is a :class:`BlockSparse`."""
        return self.config if isinstance(self.config, BlockSparse) else None

    @property
    def wanda(self) -> bool:
        """Whether the norms of its inputs are to be calibrated."""
        return self.sparse is not None and self.sparse.method == "wanda"

    @property
    def smooth(self) -> float | None:
        """Migration strength of SmoothQuant, None where it was not asked for."""
        return self.config.smooth if isinstance(self.config, Int8) else None

    @property
    def smooth_pairs(self) -> Mapping[str, tuple[str, ...]] | None:
        """The (norm, linears) pairs that its config names."""
        return self.config.smooth_pairs if isinstance(self.config, Int8) else None

    @property
    def before_us(self) -> float:
        return sum(t.before_us for t in self.timings)

    @property
    def ratio(self) -> float:
        """After / before over all calls: the paired ratios, weighted by what each call took before."""
        return sum(t.ratio * t.before_us for t in self.timings) / max(self.before_us, 1e-12)

    def leave(self, status: Status, reason: str) -> None:
        """Take the layer out of the conversion; the first reason stays."""
        if self.active:
            self.status, self.reason = status, reason
            self.candidate = None

    def leave_if(self, reason: str) -> None:
        """Skip the layer where there is a reason."""
        if reason:
            self.leave("skipped", reason)

    def refuse(self, reason: str) -> None:
        """Skip the layer because the user wants it so (or it is done already)."""
        if self.active:
            self.wanted = False
        self.leave("skipped", reason)


def check_model(model: object) -> nn.Module:
    """The model, if it is one that can be changed in place.

    Raises:
        TypeError: not a module, or itself a layer, or compiled by ``torch.compile``.
        ValueError: no linear and no embedding layer in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; use a torch.nn.Module")
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise TypeError(
            "model was compiled by torch.compile; compress the original model first, then compile it"
        )
    if kind_of(model) is not None:
        raise TypeError(
            f"model is itself a {type(model).__name__}, which cannot be exchanged in place; wrap it: "
            "lissom.compress_(torch.nn.Sequential(layer), ...), or lissom.nn.Int8Linear.from_linear(layer)"
        )
    if not any(kind_of(module) for module in model.modules()):
        empty = next(model.parameters(), None) is None
        what = "has no parameters" if empty else "has no linear and no embedding layers"
        raise ValueError(f"model {type(model).__name__} {what}; there is nothing to compress")
    return model


def find_layers(
    model: nn.Module, recipe: dict[str, Config | None], filter_fn: FilterFn | None
) -> list[Layer]:
    """Every linear and embedding layer, with its config or the reason why it is left alone.

    Raises:
        ValueError: a pattern matches no layer; two names of one module get different configs; a layer to be
            converted is on the meta device.
        TypeError: ``filter_fn`` is not callable.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn={filter_fn!r} is not callable; use a function (module, name) -> bool")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if kind_of(module) is not None:
            names.setdefault(module, []).append(name)
    _check_patterns(recipe, [name for group in names.values() for name in group])

    direct = read_directly(model)
    layers = []
    for module, group in names.items():
        kind = kind_of(module)
        if kind is None:  # kind_of chose these modules above
            continue
        layer = Layer(group[0], tuple(group[1:]), module, kind)
        _choose(layer, recipe, filter_fn)
        if layer.active:
            layer.leave_if(_obstacle(layer, direct.get(module, "")))
        layers.append(layer)
    _find_ties(model, layers)
    settle_ties(layers)
    _resolve(layers)
    return layers


def _check_patterns(recipe: dict[str, Config | None], names: list[str]) -> None:
    for pattern in recipe:
        if not any(match({pattern: None}, name)[0] for name in names):
            some = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            raise ValueError(
                f"recipe: the pattern {pattern!r} matches no linear or embedding layer; there are: {some}"
            )


def _choose(layer: Layer, recipe: dict[str, Config | None], filter_fn: FilterFn | None) -> None:
    """Set the config, or leave the layer alone because the user said so."""
    choices = {name: match(recipe, name) for name in (layer.name, *layer.aliases)}
    pattern, layer.config = choices[layer.name]
    for name, (_, config) in choices.items():
        if config != layer.config:
            raise ValueError(
                f"recipe: {layer.name!r} and {name!r} are one module but get different configs "
                f"({layer.config!r} and {config!r}); give them the same"
            )
    if pattern is None:
        layer.refuse("no pattern of the recipe matches it")
    elif layer.config is None:
        layer.refuse(f"the recipe leaves {pattern!r} alone")
    elif layer.kind == "embedding" and (reason := _leaves_embeddings(layer.config)):
        layer.refuse(reason)
    elif filter_fn is not None and not filter_fn(layer.module, layer.name):
        layer.refuse("filter_fn left it out")
    elif type(layer.module) in COMPRESSED_TYPES:
        layer.refuse(f"already compressed ({type(layer.module).__name__})")


def _leaves_embeddings(config: Config) -> str:
    """Why ``config`` leaves embeddings alone, or ``""``."""
    if isinstance(config, BlockSparse):
        return "BlockSparse is for linear layers"
    return "" if config.embeddings else f"the recipe says embeddings={config.embeddings}"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _obstacle(layer: Layer, read_by: str) -> str:
    """Why the module must not be exchanged, or ``""``."""
    module = layer.module
    if isinstance(module, torch.jit.ScriptModule):
        return "it is part of a TorchScript module, which cannot be changed; compress before scripting"
    if parametrize.is_parametrized(module):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter):
        return "it is lazy and has no weights yet; run the model once first"
    if read_by:
        return read_by
    hooked = [name for name in _HOOKS if getattr(module, name, None)]
    obstacle = layer.converter.obstacle(module, layer.config)
    if obstacle:
        return obstacle
    if hooked:
        what = hooked[0].strip("_").replace("_", " ")
        return f"it carries {what}, which a new layer would lose; remove them first"
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance (accelerate or the like), which a new layer would lose"
        )
    return ""


def _find_ties(model: nn.Module, layers: list[Layer]) -> None:
    """Fill ``Layer.tied``; leave layers alone whose weight is also held by something else."""
    by_module = {layer.module: layer for layer in layers}
    holders: dict[object, dict[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.numel():
                key: object = id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr())
                holders.setdefault(key, {})[module] = f"{prefix}.{attribute}".lstrip(".")
    for sharing in holders.values():
        if len(sharing) == 1:
            continue
        tied = [by_module[module] for module in sharing if module in by_module]
        foreign = [path for module, path in sharing.items() if module not in by_module]
        if any(not path.endswith(".weight") for path in sharing.values()):
            foreign += [path for path in sharing.values() if not path.endswith(".weight")]
        if all(path.endswith(".bias") for path in sharing.values()):
            continue  # a layer takes its bias over as it is
        shapes = {weight_shape(layer.module) for layer in tied}
        for layer in tied:
            layer.tied = [other for other in tied if other is not layer]
            if foreign:
                layer.leave(
                    "skipped", f"its weight is also {foreign[0]}, which is not converted; both stay tied"
                )
            elif len(shapes) > 1:
                layer.leave("skipped", _tied_otherwise(layer, "layout"))


def _tied_otherwise(layer: Layer, what: str) -> str:
    names = ", ".join(other.name for other in layer.tied)
    return f"its weight is tied to {names} in another {what}; they stay tied"


def _resolve(layers: list[Layer]) -> None:
    """Decide what the configs leave open; leave tied layers alone that cannot store their weight in one form.

    Every layer sees the configs of those it is tied to as the recipe gave them.
    """
    active = [layer for layer in layers if layer.active]
    resolved = {}
    for layer in active:
        tied = [(other.kind, other.config) for other in layer.tied if other.config is not None]
        resolved[layer] = layer.converter.resolve(layer.config, tied)
    for layer in active:
        layer.config = resolved[layer]
    for layer in active:
        forms = {other.converter.form(other.config) for other in (layer, *layer.tied) if other.config}
        if len(forms) > 1:
            layer.leave("skipped", _tied_otherwise(layer, "form"))


def settle_ties(layers: Iterable[Layer]) -> None:
    """Leave every layer alone that is tied to one which is left alone, so that tied weights stay tied."""
    for layer in layers:
        if layer.active or type(layer.module) in COMPRESSED_TYPES:
            continue
        for other in layer.tied:
            if other.active:
                status: Status = layer.status or "skipped"
                other.leave(
                    status, f"its weight is tied to {layer.name}, which is left alone ({layer.reason})"
                )


def check_weights(layers: Iterable[Layer]) -> None:
    """ValueError, naming the layers, where weights to be converted are on the meta device or not finite."""
    meta = [layer.name for layer in layers if layer.active and layer.module.weight.is_meta]
    if meta:
        raise ValueError(f"{_some(meta)} on the meta device, without weights; load the weights first")
    bad = []
    for layer in layers:
        if layer.active:
            low, high = torch.aminmax(layer.module.weight.detach())  # type: ignore[operator]
            if not bool(torch.isfinite(low) and torch.isfinite(high)):
                bad.append(layer.name)
    if bad:
        raise ValueError(
            f"{_some(bad)} NaN or infinity in the weights; repair the checkpoint, or leave them alone with a "
            "recipe such as {name: None, '*': lissom.Int8()}"
        )


def _some(names: list[str]) -> str:
    text = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{'layer' if len(names) == 1 else 'layers'} {text}:"


def plain_config(layer: Layer) -> dict[str, object] | None:
    """The layer's config as a plain dict, for its report."""
    return None if layer.config is None else configs.to_dict(layer.config)
