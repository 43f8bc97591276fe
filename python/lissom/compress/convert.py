"""What can be converted into what: one table from (config type, kind of layer) to a :class:`Converter`.

A new method adds a config class to ``lissom.config`` and its rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import formats
from .._block_sparse_formats import float16_fault
from ..config import ActivationMode, BlockSparse, Int4, Int8
from ..nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, SparseLinear
from ..nn._compressed import CompressedModule
from ..prune import default_block_shape
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
    Int4Linear: ("linear", "int4_linear"),
    Int4Embedding: ("embedding", "int4_embedding"),
    SparseLinear: ("linear", "block_sparse_linear"),
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
        activation_norm: norms of the inputs ``[in_features]`` for Wanda (calibration).
        mask: which blocks are kept, one bool per block; None leaves that to the layer.
    """

    input_scale: float | None = None
    smoothing: Tensor | None = None
    act_fn: str | None = None
    activation_norm: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Converter:
    """How one kind of layer becomes compressed.

    Attributes:
        op: name of the op that will serve it.
        obstacle: why this module cannot be converted under this config, or ``""``.
        resolve: the config with what it leaves open decided, given the (kind, config) of the layers that are
            tied to this one: tied layers must store their common weight in one form. It may be of another
            type, whose converter then builds the layer.
        form: what of a resolved config decides how the weight is stored; tied layers must agree in it.
        observed: what the kernel quantizes, given a layer's input (after smoothing): calibration looks at it.
        build: the new module; the old one is left unchanged.
        share: ties the weights of a new module to those of another one built from the same parameter.
        keep: whether a module built to be measured is kept, because choosing its weights takes long.
    """

    op: str
    obstacle: Callable[[nn.Module, Any], str]
    resolve: Callable[[Any, Sequence[tuple[Kind, Config]]], Config]
    form: Callable[[Any], object]
    observed: Callable[[Tensor, Any], Tensor]
    build: Callable[[nn.Module, Any, Extras], CompressedModule]
    share: Callable[[nn.Module, nn.Module], None]
    keep: bool = False


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
        sizes = ("out_features", "in_features")
        if kind_of(module) == "embedding":
            sizes = ("num_embeddings", "embedding_dim")
        return tuple(int(getattr(module, size)) for size in sizes)
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


def _linear_obstacle(module: nn.Module, config: Config) -> str:
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear that may compute something else"
    obstacle = _common_obstacle(module)
    if not obstacle and module.bias is not None and not isinstance(module.bias, nn.Parameter):
        return "its bias is not a plain parameter"
    return obstacle


def _int8_linear_obstacle(module: nn.Module, config: Int8) -> str:
    obstacle = _linear_obstacle(module, config)
    if obstacle:
        return obstacle
    return "" if config.activation is None else _int32_obstacle(module, "activation=None, weight-only,")


def _block_sparse_linear_obstacle(module: nn.Module, config: BlockSparse) -> str:
    obstacle = _linear_obstacle(module, config)
    if obstacle or config.dtype not in ("int8", "float16"):
        return obstacle
    if config.dtype == "float16":
        return _float16_obstacle(module)
    return _int32_obstacle(module, "dtype='float32', 'bfloat16' or 'float16'")


def _float16_obstacle(module: nn.Module) -> str:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta or weight.dtype == torch.float16:
        return ""
    peaks = torch.stack(torch.aminmax(weight.detach()))
    if not bool(torch.isfinite(peaks).all()):  # of the checkpoint, whatever the config is
        return ""
    fault = float16_fault(peaks)
    return f"its weight {fault}" if fault else ""


def _int32_obstacle(module: nn.Module, otherwise: str) -> str:
    _, k = weight_shape(module)
    if k > formats.INT8_MAX_IN_FEATURES:
        return (
            f"in_features={k} could overflow the int32 sum; at most {formats.INT8_MAX_IN_FEATURES} is exact "
            f"({otherwise} has no limit)"
        )
    return ""


def _embedding_obstacle(module: nn.Module, config: Config) -> str:
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is a subclass of nn.Embedding that may compute something else"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} changes the table on look-up; set it to None if training is over"
    return _common_obstacle(module)


def _wants_rotation(config: Config) -> bool:
    return (
        not isinstance(config, BlockSparse) and config.activation is not None and config.rotation is not False
    )


def _rotates(config: Config, tied: Sequence[tuple[Kind, Config]]) -> bool:
    return _wants_rotation(config) and all(kind == "linear" and _wants_rotation(c) for kind, c in tied)


def _resolve_int8_linear(config: Int8, tied: Sequence[tuple[Kind, Config]]) -> Config:
    return replace(config, rotation=_rotates(config, tied))


def _resolve_int8_embedding(config: Int8, tied: Sequence[tuple[Kind, Config]]) -> Config:
    return config


def _resolve_int4_linear(config: Int4, tied: Sequence[tuple[Kind, Config]]) -> Config:
    """A linear whose weight is an embedding's table is stored as that table is."""
    tables = [c for kind, c in tied if kind == "embedding"]
    if any(isinstance(c, Int8) or (isinstance(c, Int4) and c.embeddings == "int8") for c in tables):
        activation: ActivationMode | None = None if config.activation is None else "dynamic"
        return Int8(activation=activation, rotation=False, prefer=config.prefer)
    if tables:
        config = _uniform(config)
    return replace(config, rotation=_rotates(config, tied))


def _resolve_int4_embedding(config: Int4, tied: Sequence[tuple[Kind, Config]]) -> Config:
    return Int8(prefer=config.prefer) if config.embeddings == "int8" else _uniform(config)


def _uniform(config: Int4) -> Int4:
    """``config`` as an embedding's table is stored: evenly spaced values."""
    return replace(config, codebook=None, codebook_scope=None)


def _int8_form(config: Int8) -> object:
    return Int8


def _int4_form(config: Int4) -> object:
    scope = config.codebook_scope
    return Int4, config.group_size, config.symmetric, config.method, config.codebook, scope


def _resolve_block_sparse(config: BlockSparse, tied: Sequence[tuple[Kind, Config]]) -> Config:
    return config


def _block_sparse_form(config: BlockSparse) -> object:
    return replace(config, prefer="speed")


def _observed_linear(x: Tensor, config: Int8 | Int4) -> Tensor:
    return formats.rotate(x.float(), 1 / formats.ROTATION_BLOCK) if config.rotation else x


def _observed_plain(x: Tensor, config: Config) -> Tensor:
    return x


def _build_int8_linear(module: nn.Module, config: Int8, extras: Extras) -> CompressedModule:
    return Int8Linear.from_linear(
        plain_linear(module, extras.smoothing), config, input_scale=extras.input_scale, act_fn=extras.act_fn
    )


def _build_int4_linear(module: nn.Module, config: Int4, extras: Extras) -> CompressedModule:
    return Int4Linear.from_linear(plain_linear(module, extras.smoothing), config, act_fn=extras.act_fn)


def _build_block_sparse_linear(module: nn.Module, config: BlockSparse, extras: Extras) -> CompressedModule:
    linear, act_fn = plain_linear(module, extras.smoothing), extras.act_fn
    if extras.mask is None:
        return SparseLinear.from_linear(linear, config, activation_norm=extras.activation_norm, act_fn=act_fn)
    dtype: torch.dtype = getattr(torch, config.dtype)
    shape = default_block_shape(config, linear.weight.device)
    return SparseLinear.from_mask(linear, extras.mask, shape, dtype, act_fn=act_fn)


def _build_int8_embedding(module: nn.Module, config: Int8, extras: Extras) -> CompressedModule:
    return Int8Embedding.from_embedding(_embedding(module), config)


def _build_int4_embedding(module: nn.Module, config: Int4, extras: Extras) -> CompressedModule:
    return Int4Embedding.from_embedding(_embedding(module), config)


def _embedding(module: nn.Module) -> nn.Embedding:
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"expected an nn.Embedding, got {type(module).__name__}")
    return module


_BLOCK_STATE = ("values", "crow_indices", "col_indices", "weight_scale")
_WEIGHT_STATE = ("qweight", "weight_scale", "zero_point", "codebook")


def _share(new: nn.Module, owner: nn.Module) -> None:
    for name in _WEIGHT_STATE:
        if name in new._buffers:
            new._buffers[name] = owner._buffers.get(name)
    packed, other = new._buffers.get("_packed"), owner._buffers.get("_packed")
    # Weight-only linears may pack the same weight in another way, which then has another size.
    if not isinstance(new, CompressedModule):
        return
    if packed is not None and other is not None and packed.shape == other.shape:
        new._buffers["_packed"] = other
        new._seal()
    else:
        new._repack()  # an embedding's codes are chosen otherwise than a linear's


def _share_blocks(new: nn.Module, owner: nn.Module) -> None:
    slots: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (new._parameters, owner._parameters),
        (new._buffers, owner._buffers),
    )
    for own, others in slots:
        own |= {name: others[name] for name in (*_BLOCK_STATE, "_packed") if name in own}
    if isinstance(new, CompressedModule):
        new._seal()


CONVERTERS: dict[tuple[type[Config], Kind], Converter] = {
    (Int8, "linear"): Converter(
        op="int8_linear",
        obstacle=_int8_linear_obstacle,
        resolve=_resolve_int8_linear,
        form=_int8_form,
        observed=_observed_linear,
        build=_build_int8_linear,
        share=_share,
    ),
    (Int8, "embedding"): Converter(
        op="int8_embedding",
        obstacle=_embedding_obstacle,
        resolve=_resolve_int8_embedding,
        form=_int8_form,
        observed=_observed_plain,
        build=_build_int8_embedding,
        share=_share,
    ),
    (Int4, "linear"): Converter(
        op="int4_linear",
        obstacle=_linear_obstacle,
        resolve=_resolve_int4_linear,
        form=_int4_form,
        observed=_observed_linear,
        build=_build_int4_linear,
        share=_share,
        keep=True,
    ),
    (Int4, "embedding"): Converter(
        op="int4_embedding",
        obstacle=_embedding_obstacle,
        resolve=_resolve_int4_embedding,
        form=_int4_form,
        observed=_observed_plain,
        build=_build_int4_embedding,
        share=_share,
        keep=True,
    ),
    (BlockSparse, "linear"): Converter(
        op="block_sparse_linear",
        obstacle=_block_sparse_linear_obstacle,
        resolve=_resolve_block_sparse,
        form=_block_sparse_form,
        observed=_observed_plain,
        build=_build_block_sparse_linear,
        share=_share_blocks,
        keep=True,
    ),
}
