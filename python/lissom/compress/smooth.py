"""SmoothQuant: outlier channels moved from activations into weights before quantization.

A norm multiplies its channel j by ``weight[j]``. With ``norm / s`` and ``W · diag(s)`` the layers that follow
compute the same function, but activation outliers are divided by s and the weights, which are easier to
quantize, take them over:

    s[j] = max|X[:, j]|^α / max|W[:, j]|^(1 - α)

over all linears fed by that norm. Source: Xiao et al., "SmoothQuant", 2022, equation 4.

Folding 1/s into a norm changes all that read its output. A norm is therefore eligible only where the tracing
run saw nothing but such linears read it, and where these linears are fed by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .convert import plain_linear
from .inputs import Call, InputError, run
from .patch import Patch
from .select import Layer
from .trace import Trace

__all__ = ["Group", "find_groups", "fit", "fold", "is_norm", "smoothing_factors"]


@dataclass(eq=False)
class Group:
    """One norm and all the linears that read its output, with the migration strength α."""

    name: str
    norm: nn.Module
    layers: list[Layer]
    alpha: float


def is_norm(module: nn.Module) -> bool:
    """LayerNorm- and RMSNorm-like modules with a 1-d ``weight``; the tracing run tries them out."""
    weight = module._parameters.get("weight")
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return named and weight is not None and weight.dim() == 1


def find_groups(model: nn.Module, layers: list[Layer], traced: Trace) -> tuple[list[Group], list[str]]:
    """The groups to smooth, and notes on norms that must not be touched.

    Raises:
        ValueError: a pair named by ``smooth_pairs`` does not exist, does not fit, or is not eligible.
    """
    names = {module: name for name, module in model.named_modules()}
    users = _parameter_users(model)
    groups, notes = [], []
    named = _named_pairs(layers)
    for norm_name, linear_names in named.items():
        groups.append(_named_group(model, layers, traced, users, norm_name, linear_names))
    for norm, use in traced.norms.items():
        wanted = [e for e in use.layers if e.active and e.smooth is not None and e.smooth_pairs is None]
        if not wanted or names[norm] in named:
            continue
        problem = _ineligible(norm, list(use.layers), traced, users)
        if problem:
            notes.append(f"smooth: {names[norm]} was not folded: {problem}")
            continue
        groups.append(Group(names[norm], norm, list(use.layers), float(wanted[0].smooth or 0.0)))
    if not groups:
        notes.append("smooth: no norm could be folded into the linears after it; nothing was smoothed")
    return groups, notes


def _named_pairs(layers: Iterable[Layer]) -> dict[str, tuple[str, ...]]:
    pairs: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        pairs.update(layer.smooth_pairs or {})
    return pairs


def _named_group(
    model: nn.Module,
    layers: list[Layer],
    traced: Trace,
    users: dict[int, int],
    norm_name: str,
    linear_names: tuple[str, ...],
) -> Group:
    modules = dict(model.named_modules(remove_duplicate=False))
    by_module = {layer.module: layer for layer in layers}
    norm = modules.get(norm_name)
    if norm is None or not is_norm(norm):
        found = "there is no such module" if norm is None else f"it is a {type(norm).__name__}"
        raise ValueError(
            f"smooth_pairs: {norm_name!r} must be a LayerNorm or RMSNorm with a weight, but {found}"
        )
    chosen = []
    for name in linear_names:
        layer = by_module.get(modules[name]) if name in modules else None
        if layer is None or layer.kind != "linear":
            found = (
                f"it is a {type(modules[name]).__name__}" if name in modules else "there is no such module"
            )
            raise ValueError(f"smooth_pairs[{norm_name!r}]: {name!r} must be a linear layer, but {found}")
        chosen.append(layer)
    if not chosen:
        raise ValueError(
            f"smooth_pairs[{norm_name!r}] names no linear; name all linears that read its output"
        )
    channels = norm._parameters["weight"].numel()
    for layer in chosen:
        k = plain_linear(layer.module).in_features if layer.active else channels
        if k != channels:
            raise ValueError(
                f"smooth_pairs[{norm_name!r}]: {layer.name!r} has in_features={k} but the norm has "
                f"{channels} channels"
            )
    problem = _ineligible(norm, chosen, traced, users)
    unnamed = [e.name for e in traced.norms[norm].layers if e not in chosen] if norm in traced.norms else []
    if not problem and unnamed:
        problem = f"it also feeds {', '.join(unnamed)}; name them too"
    if problem:
        raise ValueError(
            f"smooth_pairs: {norm_name!r} cannot be folded into {', '.join(linear_names)}: {problem}"
        )
    return Group(norm_name, norm, chosen, float(chosen[0].smooth or 0.0))


def _parameter_users(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by id."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _ineligible(norm: nn.Module, layers: list[Layer], traced: Trace, users: dict[int, int]) -> str:
    """Why 1/s must not be folded into ``norm`` and s into ``layers``, or ``""``."""
    use = traced.norms.get(norm)
    if use is None:
        return "the tracing run did not reach it"
    if not use.scalable:
        return "its output is not proportional to its weight and bias"
    if use.others:
        return f"its output is not read by linears only ({', '.join(list(use.others)[:3])})"
    if any(users[id(p)] > 1 for p in norm._parameters.values() if p is not None):
        return "its parameters are shared with another module"
    for layer in layers:
        if not layer.active:
            return f"{layer.name}, which reads its output, is left alone ({layer.reason})"
        if traced.sources.get(layer) != {norm}:
            return f"{layer.name} is not fed by it alone"
        if layer.tied or users[id(layer.module.weight)] > 1:
            return f"the weight of {layer.name} is tied to another layer's"
    if len({layer.smooth for layer in layers}) > 1:
        return f"the configs of {', '.join(e.name for e in layers)} differ in smooth"
    return ""


def smoothing_factors(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = activation_absmax^α / weight_absmax^(1 - α), per channel, float32 ``[K]``.

    1 where either is zero (an unused channel has nothing to move); bounded to [1e-4, 1e4] so that folding
    neither overflows float16 nor flushes a norm's weight to zero.
    """
    factors = activation_absmax.double().pow(alpha) / weight_absmax.double().pow(1 - alpha)
    usable = torch.isfinite(factors) & (activation_absmax > 0) & (weight_absmax > 0)
    return torch.where(usable, factors.clamp(1e-4, 1e4), torch.ones_like(factors)).float()


def fit(
    model: nn.Module, groups: Iterable[Group], batches: Iterable[Call], tick: Callable[[int], None]
) -> int:
    """Run ``batches``, set ``smoothing`` of every layer in ``groups``; returns how many batches there were.

    Raises:
        InputError: a norm's output is not finite.
        RuntimeError: the model raised.
    """
    absmax: dict[Group, Tensor] = {}
    count = 0
    with ExitStack() as stack:
        for group in groups:

            def observe(_: nn.Module, __: Any, output: Any, group: Group = group) -> None:
                if output.numel() == 0:
                    return
                seen = output.detach().float().abs().flatten(0, -2).amax(dim=0)
                if not bool(torch.isfinite(seen).all()):
                    raise InputError(
                        f"calibration: the output of {group.name!r} holds NaN or infinity (batch {count}); "
                        "remove that batch or repair the model"
                    )
                absmax[group] = torch.maximum(absmax[group], seen) if group in absmax else seen

            stack.callback(group.norm.register_forward_hook(observe).remove)
        for call in batches:
            run(model, call, f"calibration batch {count}")
            count += 1
            tick(count)
    for group, activation in absmax.items():
        weights = [
            plain_linear(layer.module).weight.detach().float().abs().amax(dim=0) for layer in group.layers
        ]
        factors = smoothing_factors(activation, torch.stack(weights).amax(dim=0), group.alpha)
        for layer in group.layers:
            layer.smoothing, layer.smoothed_by = factors, group.name
    return count


def fold(patch: Patch, norm: nn.Module, factors: Tensor) -> None:
    """Add to ``patch``: weight and bias of ``norm`` divided by ``factors``."""
    for parameter in norm._parameters.values():
        if parameter is not None:
            patch.replace_data(parameter, (parameter.detach().float() / factors).to(parameter.dtype))
