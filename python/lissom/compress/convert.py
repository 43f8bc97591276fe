"""What can be converted into what: one table from (config type, kind of layer) to a :class:`Converter`.

A new method (int4, block sparsity) adds a config class to ``lissom.config`` and its rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import formats
from ..config import Int8
from ..nn import Int8Embedding, Int8Linear
from .recipe import Config

__all__ = [
    "COMPRESSED_TYPES",
    "CONVERTERS",
    "Converter",
    "Extras",
    "Kind",
    "kind_of",
    "plain_linear",
    "smoothed_data",
]

Kind = Literal["linear", "embedding"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

COMPRESSED_TYPES: dict[type[nn.Module], tuple[Kind, str]] = {
    Int8Linear: ("linear", "int8_linear"),
    Int8Embedding: ("embedding", "int8_embedding"),
}
"""Layers that are compressed already: their kind and op."""


@dataclass(frozen=True)
class Extras:
    """What earlier stages found out about one layer.

    Attributes:
        input_scale: static activation scale (calibration).
        smoothing: SmoothQuant's factors ``[in_features]``, float32, that the weight's columns are multiplied
            by.
        act_fn: activation function to be computed by the layer itself.
    """

    input_scale: float | None = None
    smoothing: Tensor | None = None
    act_fn: str | None = None


@dataclass(frozen=True)
class Converter:
    """How one kind of layer becomes compressed.

    Attributes:
        op: name of the op that will serve it.
        obstacle: why this module cannot be converted under this config, or ``""``.
        resolve: the config with what it leaves open decided, given the (kind, config) of the layers that are
            tied to this one: tied layers must store their common weight in one form.
        observed: what the kernel quantizes, given a layer's input (after smoothing): calibration looks at it.
        build: the new module; the old one is left unchanged.
        share: ties the weights of a new module to those of another one built from the same parameter.
    """

    op: str
    obstacle: Callable[[nn.Module, Any], str]
    resolve: Callable[[Any, Sequence[tuple[Kind, Any]]], Any]
    observed: Callable[[Tensor, Any], Tensor]
    build: Callable[[nn.Module, Any, Extras], nn.Module]
    share: Callable[[nn.Module, nn.Module], None]


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored as ``[in, out]``."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def kind_of(module: nn.Module) -> Kind | None:
    """``"linear"``, ``"embedding"`` or None, subclasses, compressed and scripted ones included."""
    compressed = COMPRESSED_TYPES.get(type(module))
    if compressed is not None:
        return compressed[0]
    if isinstance(module, torch.jit.ScriptModule):
        scripted: dict[str, Kind] = {"Linear": "linear", "Embedding": "embedding"}
        return scripted.get(str(getattr(module, "original_name", "")))
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else None


def plain_linear(module: nn.Module, smoothing: Tensor | None = None) -> nn.Linear:
    """``module`` as an ``nn.Linear`` that shares its parameters (the weight is new where it is smoothed)."""
    weight: Tensor = module.weight.t() if _is_conv1d(module) else module.weight  # type: ignore[assignment,operator]
    if smoothing is not None:
        weight = (weight.detach().float() * smoothing).to(weight.dtype)
    elif type(module) is nn.Linear:
        return module
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def smoothed_data(module: nn.Module, smoothing: Tensor) -> Tensor:
    """New contents of ``module.weight``, in its own layout, input columns multiplied by ``smoothing``."""
    data = plain_linear(module, smoothing).weight.data
    return data.t().contiguous() if _is_conv1d(module) else data


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(out_features, in_features) or (num_embeddings, embedding_dim), without touching the data."""
    if type(module) in COMPRESSED_TYPES:
        return tuple(module.qweight.shape)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.parameter.UninitializedParameter):
        return ()
    return tuple(weight.t().shape if _is_conv1d(module) else weight.shape)


def _common_obstacle(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is not a plain parameter (weight_norm, pruning or the like): remove the wrapper first"
        )
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight has dtype {weight.dtype}; float32, bfloat16 and float16 can be converted"
    if weight.numel() == 0:
        return f"its weight is empty (shape {tuple(weight.shape)})"
    return ""


def _int8_linear_obstacle(module: nn.Module, config: Int8) -> str:
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear that may compute something else"
    obstacle = _common_obstacle(module)
    if obstacle:
        return obstacle
    _, k = weight_shape(module)
    if config.activation is not None and k > formats.INT8_MAX_IN_FEATURES:
        return (
            f"in_features={k} could overflow the int32 sum; at most {formats.INT8_MAX_IN_FEATURES} is exact "
            "(activation=None, weight-only, has no limit)"
        )
    if module.bias is not None and not isinstance(module.bias, nn.Parameter):
        return "its bias is not a plain parameter"
    return ""


def _int8_embedding_obstacle(module: nn.Module, config: Int8) -> str:
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is a subclass of nn.Embedding that may compute something else"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} changes the table on look-up; set it to None if training is over"
    return _common_obstacle(module)


def _wants_rotation(config: Int8) -> bool:
    return config.activation is not None and config.rotation is not False


def _resolve_int8_linear(config: Int8, tied: Sequence[tuple[Kind, Int8]]) -> Int8:
    rotation = _wants_rotation(config) and all(kind == "linear" and _wants_rotation(c) for kind, c in tied)
    return replace(config, rotation=rotation)


def _resolve_nothing(config: Int8, tied: Sequence[tuple[Kind, Int8]]) -> Int8:
    return config


def _observed_int8_linear(x: Tensor, config: Int8) -> Tensor:
    return formats.rotate(x.float(), 1 / formats.ROTATION_BLOCK) if config.rotation else x


def _observed_plain(x: Tensor, config: Int8) -> Tensor:
    return x


def _build_int8_linear(module: nn.Module, config: Int8, extras: Extras) -> nn.Module:
    return Int8Linear.from_linear(
        plain_linear(module, extras.smoothing), config, input_scale=extras.input_scale, act_fn=extras.act_fn
    )


def _build_int8_embedding(module: nn.Module, config: Int8, extras: Extras) -> nn.Module:
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"expected an nn.Embedding, got {type(module).__name__}")
    return Int8Embedding.from_embedding(module, config)


def _share_int8(new: nn.Module, owner: nn.Module) -> None:
    new.qweight, new.weight_scale = owner.qweight, owner.weight_scale
    if isinstance(new, Int8Linear) and isinstance(owner, Int8Linear):
        new._packed = owner._packed


CONVERTERS: dict[tuple[type[Config], Kind], Converter] = {
    (Int8, "linear"): Converter(
        op="int8_linear",
        obstacle=_int8_linear_obstacle,
        resolve=_resolve_int8_linear,
        observed=_observed_int8_linear,
        build=_build_int8_linear,
        share=_share_int8,
    ),
    (Int8, "embedding"): Converter(
        op="int8_embedding",
        obstacle=_int8_embedding_obstacle,
        resolve=_resolve_nothing,
        observed=_observed_plain,
        build=_build_int8_embedding,
        share=_share_int8,
    ),
}
