"""``Int8Linear`` and ``Int8Embedding``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import formats
from ..config import ActivationMode, Int8
from ..ops.int8_linear import direct, int8_pack
from ._compressed import (
    CompressedModule,
    check_linear_options,
    check_plain_embedding,
    check_present,
    unobserved,
)

__all__ = ["Int8Embedding", "Int8Linear"]

_int8_linear = torch.ops.lissom.int8_linear.default
_int8_embedding = torch.ops.lissom.int8_embedding.default


class Int8Linear(CompressedModule):
    """``nn.Linear`` with int8 weights: y = act(x · Wᵀ + b).

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; ``dtype`` is the bias's.
        activation: ``"dynamic"`` (per-row scales), ``"static"`` (``input_scale``, to be loaded or set) or
            None (weight-only, float activations).
        act_fn: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, fused into the kernel.
        rotated: ``qweight`` is in the rotated basis (see ``lissom.formats``); activations are rotated
            on the way.

    State (canonical layout): ``qweight`` int8 ``[out_features, in_features]``, ``weight_scale`` float32
    ``[out_features]``, ``bias`` or None, and ``input_scale`` float32 ``[]`` where ``activation="static"``.

    ``weight`` is a dequantized copy, made anew on every access, for code that reads it.

    Source: see :func:`lissom.ops.int8_linear`.
    """

    qweight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    _packed: Tensor | None
    _sources: ClassVar[tuple[str, ...]] = ("qweight",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: ActivationMode | None = "dynamic",
        act_fn: str | None = None,
        rotated: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, dtype)
        if activation not in ("dynamic", "static", None):
            raise ValueError(f"Int8Linear: activation={activation!r}; use 'dynamic', 'static' or None")
        check_linear_options("Int8Linear", activation, act_fn, rotated)
        if activation is not None and in_features > formats.INT8_MAX_IN_FEATURES:
            raise ValueError(
                f"Int8Linear: in_features={in_features} could overflow the int32 sum; at most "
                f"{formats.INT8_MAX_IN_FEATURES} is exact; use activation=None (weight-only)"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.act_fn = act_fn
        self.rotated = rotated
        self._register_format(
            "qweight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        )
        self._register_format("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        static = torch.ones((), dtype=torch.float32, device=device) if activation == "static" else None
        self._register_format("input_scale", static)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("_packed", None, persistent=False)
        self._repack()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: Int8 | None = None,
        *,
        input_scale: Tensor | float | None = None,
        act_fn: str | None = None,
    ) -> Int8Linear:
        """Quantize ``linear``; its bias parameter is taken over, not copied, and it is left unchanged.

        Args:
            linear: an ``nn.Linear`` with finite weights, on any device but meta.
            config: ``Int8(...)``; None is the default. Only ``activation`` and ``rotation`` are read here;
                ``rotation=None`` means no rotation.
            input_scale: the calibrated scale, needed with ``activation="static"``.
            act_fn: fuse an activation function.

        Raises:
            ValueError: NaN or infinite weights, a meta tensor, a missing or useless ``input_scale``.
        """
        config = config or Int8()
        weight = linear.weight
        check_present("Int8Linear.from_linear", weight)
        if (config.activation == "static") != (input_scale is not None):
            raise ValueError(
                f"Int8Linear.from_linear: activation={config.activation!r} with input_scale={input_scale!r}; "
                "give input_scale with activation='static', and only then"
            )
        rotated = bool(config.rotation)
        qweight, scale = formats.quantize_int8(formats.rotate(weight.detach().float()) if rotated else weight)
        layer = cls._shell(linear, config.activation, act_fn, rotated)
        layer.qweight, layer.weight_scale = qweight, scale
        if input_scale is not None:
            layer.input_scale = torch.as_tensor(
                input_scale, dtype=torch.float32, device=weight.device
            ).reshape(())
            if not (torch.isfinite(layer.input_scale) and layer.input_scale > 0):
                raise ValueError(
                    f"Int8Linear.from_linear: input_scale={input_scale} must be positive and finite"
                )
        layer._repack()
        return layer.train(linear.training)

    @classmethod
    def _shell(
        cls, linear: nn.Linear, activation: ActivationMode | None, act_fn: str | None, rotated: bool
    ) -> Int8Linear:
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            activation=activation,
            act_fn=act_fn,
            rotated=rotated,
            device="meta",
        )
        layer.bias = linear.bias
        layer._follow(linear.weight)
        return layer

    @property
    def weight(self) -> Tensor:
        """Dequantized ``[out_features, in_features]`` in the layer's floating dtype; a new tensor."""
        weight = formats.dequantize_int8(self.qweight, self.weight_scale)
        if self.rotated:
            weight = formats.rotate(weight, 1 / formats.ROTATION_BLOCK)
        return weight.to(self._like.dtype)

    def _repack(self) -> None:
        packed = None  # a GPU reads the canonical weight
        if self.qweight.is_meta:
            packed = self.qweight.new_empty(formats.packed_int8_shape(self.out_features, self.in_features))
        elif self.qweight.is_cpu:
            packed = int8_pack(self.qweight)
        self._keep(_packed=packed)

    def forward(self, input: Tensor) -> Tensor:
        state = self._buffers  # attribute look-up on a module costs 0.3 µs apiece; a small layer takes 6
        alone = unobserved(input)
        compiled = not alone and torch.compiler.is_compiling()
        holds = state["_packed"] is None or compiled or self._derived_holds()
        arguments: Any = (
            input,
            state["qweight"],
            state["weight_scale"],
            self._parameters["bias"],
            state["input_scale"],
            self.activation is None,
            self.act_fn,
            state["_packed"] if holds else None,
            None,
            self.rotated,
        )
        if alone and (found := direct(*arguments)) is not None:
            return found
        result: Tensor = _int8_linear(*arguments)
        return result

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", activation={self.activation!r}"
        text += ", rotated=True" if self.rotated else ""
        return text if self.act_fn is None else f"{text}, act_fn={self.act_fn!r}"


class Int8Embedding(CompressedModule):
    """``nn.Embedding`` with an int8 table and one scale per row.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for ``nn.Embedding``; ``dtype`` is the
            output's and follows ``.half()`` and the like.

    State: ``qweight`` int8 ``[num_embeddings, embedding_dim]``, ``weight_scale`` float32
    ``[num_embeddings]``.
    ``weight`` is a dequantized copy, made anew on every access.
    """

    qweight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        table = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self._register_format("qweight", table)
        self._register_format("weight_scale", torch.zeros(num_embeddings, dtype=torch.float32, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: Int8 | None = None) -> Int8Embedding:
        """Quantize ``embedding``, which is left unchanged.

        Raises:
            ValueError: NaN or infinite weights, a meta tensor, or ``max_norm`` (it renormalizes the table in
                place on every look-up).
        """
        weight = embedding.weight
        check_plain_embedding("Int8Embedding.from_embedding", embedding)
        qweight, scale = formats.quantize_int8(weight)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device="meta",
            dtype=weight.dtype,
        )
        layer.qweight, layer.weight_scale = qweight, scale
        layer._follow(weight)
        return layer.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """Dequantized ``[num_embeddings, embedding_dim]``; a new tensor each time."""
        return formats.dequantize_int8(self.qweight, self.weight_scale, self._like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _int8_embedding(  # type: ignore[no-any-return]
            input, self.qweight, self.weight_scale, self._like.dtype
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"
