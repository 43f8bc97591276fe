"""``Int4Linear`` and ``Int4Embedding``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import formats
from .. import ops as _ops  # noqa: F401 (registers them)
from ..config import GROUP_SIZES, CodebookScope, Int4, Int4Activation
from ..formats import Int4Weights
from ..ops.int4_linear import direct, int4_pack
from ._compressed import (
    CompressedModule,
    check_linear_options,
    check_plain_embedding,
    check_present,
    unobserved,
)

__all__ = ["Int4Embedding", "Int4Linear"]

_int4_linear = torch.ops.lissom.int4_linear.default
_int4_embedding = torch.ops.lissom.int4_embedding.default

_SCOPES: tuple[CodebookScope, ...] = ("tensor", "channel", "group")
"""What shares a table, in the order of the dimensions (1, 2, 3) of ``codebook``."""


class _Int4Module(CompressedModule):
    """A layer whose state is an :class:`Int4Weights` ``[rows, columns]``, or the uniform part of one."""

    qweight: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        rows: int,
        columns: int,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype,
        zero_dtype: torch.dtype,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(device, dtype)
        self._check_option("group_size", group_size, GROUP_SIZES)
        self._check_option("scale_dtype", scale_dtype, formats.INT4_SCALE_DTYPES)
        self._check_option("zero_dtype", zero_dtype, formats.INT4_ZERO_DTYPES)
        self._columns = columns
        self.group_size = group_size
        shape = (rows, formats.int4_groups(columns, group_size))
        codes = torch.zeros(rows, (columns + 1) // 2, dtype=torch.uint8, device=device)
        scale = torch.zeros(shape, dtype=scale_dtype, device=device)
        zero = None if symmetric else torch.full(shape, formats.INT4_ZERO, dtype=zero_dtype, device=device)
        self._register_format("qweight", codes)
        self._register_format("weight_scale", scale, formats.INT4_SCALE_DTYPES)
        self._register_format("zero_point", zero, formats.INT4_ZERO_DTYPES)

    def _check_option(self, option: str, value: object, legal: tuple[object, ...]) -> None:
        if value not in legal:
            choices = ", ".join(map(repr, legal))
            raise ValueError(f"{type(self).__name__}: {option}={value!r} cannot be; use one of {choices}")

    def _record(self, tensors: Mapping[str, Any]) -> Int4Weights:
        fields = {name: tensors[name] for name in self._dtypes}
        return Int4Weights(in_features=self._columns, group_size=self.group_size, **fields)

    @property
    def quantized(self) -> Int4Weights:
        """The quantized weight as one record; its tensors are the layer's own."""
        return self._record(self._buffers)

    def _take(self, weights: Int4Weights) -> None:
        """Make the tensors of ``weights``, which have the layer's form, its own."""
        for name in self._dtypes:
            self._buffers[name] = getattr(weights, name)

    def _fault(self, name: str, loaded: Mapping[str, Tensor]) -> str:
        tensors: dict[str, Any] = {**self._buffers, **loaded}
        own = self._buffers
        wrong_size = any(tensor.shape != own[key].shape for key, tensor in loaded.items())  # type: ignore[union-attr]
        if wrong_size or any(tensors[key].is_meta for key in self._dtypes):
            return ""  # torch reports a wrong size; a meta tensor has no values
        try:
            formats.check_int4(self._record(tensors), name)
        except ValueError as error:
            return str(error)
        return ""


class Int4Linear(_Int4Module):
    """``nn.Linear`` with 4-bit weights in groups along the inputs: y = act(x · Wᵀ + b).

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; ``dtype`` is the bias's.
        group_size: 32, 64, 128, or -1 (one group per output).
        symmetric: without zero-points; a codebook has none either.
        codebook: None (evenly spaced values), or what shares a table of 16: ``"tensor"``, ``"channel"`` (an
            output) or ``"group"``.
        group_index: groups are not runs of neighbours: the state says which group each input belongs to.
        activation: ``"int8"`` (per-row scales) or None (weight-only, float activations).
        act_fn: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, fused into the kernel.
        rotated: the weight is in the rotated basis (see ``lissom.formats``); activations are rotated on the
            way. Neither with ``activation=None`` nor with ``group_index``.
        scale_dtype, zero_dtype: of ``weight_scale`` and ``zero_point``. Loading a state with another legal
            dtype changes them.

    State (canonical layout, see :class:`lissom.formats.Int4Weights`; G groups): ``qweight`` uint8
    ``[out_features, ceil(in_features / 2)]``, ``weight_scale`` ``[out_features, G]``, ``bias`` or None, and,
    as asked, ``zero_point`` ``[out_features, G]``, ``codebook`` float32 ``[16]``, ``[out_features, 16]`` or
    ``[out_features, G, 16]``, ``group_index`` int32 ``[in_features]``. Values are checked when they are
    loaded.

    ``weight`` is a dequantized copy, made anew on every access, for code that reads it; ``quantized`` is the
    state as one record.

    Source: see :func:`lissom.ops.int4_linear`.
    """

    codebook: Tensor | None
    group_index: Tensor | None
    _packed: Tensor | None
    _permutation: Tensor | None
    _sources: ClassVar[tuple[str, ...]] = (
        "qweight",
        "weight_scale",
        "zero_point",
        "codebook",
        "group_index",
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        codebook: CodebookScope | None = None,
        group_index: bool = False,
        activation: Int4Activation | None = "int8",
        act_fn: str | None = None,
        rotated: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        zero_dtype: torch.dtype = torch.uint8,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, group_size, symmetric, scale_dtype, zero_dtype, device, dtype
        )
        self._check_option("codebook", codebook, (None, *_SCOPES))
        self._check_option("activation", activation, ("int8", None))
        check_linear_options("Int4Linear", activation, act_fn, rotated)
        for clash, reason in (
            (codebook is not None and not symmetric, "symmetric=False has no meaning with a codebook"),
            (group_index and group_size == -1, "group_index=True has no meaning with group_size=-1"),
            (group_index and rotated, "group_index=True cannot go with rotated=True"),
        ):
            if clash:
                raise ValueError(f"Int4Linear: {reason}; give one of the two")
        self.in_features = in_features
        self.out_features = out_features
        self.codebook_scope = codebook
        self.activation = activation
        self.act_fn = act_fn
        self.rotated = rotated
        table = index = None
        if codebook is not None:
            outer = (out_features, formats.int4_groups(in_features, group_size))[: _SCOPES.index(codebook)]
            table = torch.zeros(*outer, formats.INT4_LEVELS, dtype=torch.float32, device=device)
        if group_index:
            index = torch.arange(in_features, dtype=torch.int32, device=device) // group_size
        self._register_format("codebook", table)
        self._register_format("group_index", index)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("_packed", None, persistent=False)
        self.register_buffer("_permutation", None, persistent=False)
        self._repack()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: Int4 | None = None, *, act_fn: str | None = None
    ) -> Int4Linear:
        """Quantize ``linear``; its bias parameter is taken over, not copied, and it is left unchanged.

        Args:
            linear: an ``nn.Linear`` with finite weights, on any device but meta.
            config: ``Int4(...)``; None is the default. ``rotation=None`` means no rotation;
                ``embeddings`` and ``prefer`` are not read here.
            act_fn: fuse an activation function.

        Raises:
            ValueError: NaN or infinite weights, or a meta tensor.
        """
        from ..choose import choose_int4

        config = config or Int4()
        weight = linear.weight
        check_present("Int4Linear.from_linear", weight)
        check_linear_options("Int4Linear", config.activation, act_fn, bool(config.rotation))
        source = formats.rotate(weight.detach().float()) if config.rotation else weight.detach()
        layer = cls._of(
            choose_int4(source, config), linear.bias, config.activation, act_fn, bool(config.rotation)
        )
        layer._follow(weight)
        return layer.train(linear.training)

    @classmethod
    def from_weights(
        cls,
        weights: Int4Weights,
        bias: Tensor | None = None,
        *,
        activation: Int4Activation | None = "int8",
        act_fn: str | None = None,
        rotated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Int4Linear:
        """A layer of weights that were quantized elsewhere: nothing is requantized or copied.

        Args:
            weights: checked in full; their tensors become the layer's.
            bias: ``[out_features]`` or None; a parameter is taken over.
            activation, act_fn, rotated: as for the constructor.
            dtype: floating dtype that the layer stands for (that of ``weight``); None is the bias's, or
                torch's default.

        Raises:
            TypeError, ValueError: weights that are not sound, a bias of the wrong shape, a meta tensor.
        """
        name = "Int4Linear.from_weights"
        check_present(name, weights.qweight)
        formats.check_int4(weights, name)
        if bias is not None and (bias.shape != (weights.out_features,) or not bias.is_floating_point()):
            raise ValueError(
                f"{name}: bias must be floating point [{weights.out_features}], got {bias.dtype} "
                f"{tuple(bias.shape)}"
            )
        layer = cls._of(weights, bias, activation, act_fn, rotated)
        dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        layer._follow(torch.empty(0, dtype=dtype, device=weights.qweight.device))
        return layer

    @classmethod
    def _of(
        cls,
        weights: Int4Weights,
        bias: Tensor | None,
        activation: Int4Activation | None,
        act_fn: str | None,
        rotated: bool,
    ) -> Int4Linear:
        """A layer of the form of ``weights`` that holds them. Its ``_like`` is still to be set."""
        zero_point, codebook = weights.zero_point, weights.codebook
        layer = cls(
            weights.in_features,
            weights.out_features,
            bias=False,
            group_size=weights.group_size,
            symmetric=zero_point is None,
            codebook=None if codebook is None else _SCOPES[codebook.dim() - 1],
            group_index=weights.group_index is not None,
            activation=activation,
            act_fn=act_fn,
            rotated=rotated,
            scale_dtype=weights.weight_scale.dtype,
            zero_dtype=torch.uint8 if zero_point is None else zero_point.dtype,
            device="meta",
        )
        layer._take(weights)
        own = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.register_parameter("bias", own)
        layer._repack()
        return layer

    @property
    def weight(self) -> Tensor:
        """Dequantized ``[out_features, in_features]`` in the layer's floating dtype; a new tensor."""
        weight = formats.dequantize_int4(self.quantized)
        if self.rotated:
            weight = formats.rotate(weight, 1 / formats.ROTATION_BLOCK)
        return weight.to(self._like.dtype)

    def _repack(self) -> None:
        weights, weight_only = self.quantized, self.activation is None
        if any(held.is_meta for name in self._dtypes if (held := self._buffers[name]) is not None):
            packed: Tensor | None = weights.qweight.new_empty(formats.packed_int4_shape(weights, weight_only))
        else:
            packed = int4_pack(weights, weight_only)
        index = weights.group_index
        self._keep(_packed=packed, _permutation=None if index is None else formats.group_order(index))

    def forward(self, input: Tensor) -> Tensor:
        # The op cannot tell an odd K from the even one that fills the same bytes.
        if input.dim() and input.shape[-1] != self.in_features:
            raise ValueError(
                f"Int4Linear: the input has shape {tuple(input.shape)}; its last dimension must be "
                f"{self.in_features}"
            )
        state = self._buffers  # attribute look-up on a module costs 0.3 µs apiece; a small layer takes 6
        alone = unobserved(input)
        compiled = not alone and torch.compiler.is_compiling()
        holds = state["_packed"] is None or compiled or self._derived_holds()
        arguments: Any = (
            input,
            state["qweight"],
            state["weight_scale"],
            state["zero_point"],
            state["codebook"],
            state["group_index"],
            self._parameters["bias"],
            self.group_size,
            self.activation is None,
            self.act_fn,
            state["_packed"] if holds else None,
            state["_permutation"] if holds else None,
            None,
            self.rotated,
        )
        if alone and (found := direct(*arguments)) is not None:
            return found
        result: Tensor = _int4_linear(*arguments)
        return result

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", group_size={self.group_size}"
        if self.codebook_scope is None:
            text += f", symmetric={self.zero_point is None}"
        else:
            text += f", codebook={self.codebook_scope!r}"
        text += "" if self.group_index is None else ", group_index=True"
        text += f", activation={self.activation!r}"
        text += ", rotated=True" if self.rotated else ""
        return text if self.act_fn is None else f"{text}, act_fn={self.act_fn!r}"


class Int4Embedding(_Int4Module):
    """``nn.Embedding`` with a 4-bit table in groups along its rows.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for ``nn.Embedding``; ``dtype`` is the
            output's and follows ``.half()`` and the like.
        group_size, symmetric, scale_dtype, zero_dtype: as for :class:`Int4Linear`.

    State: ``qweight`` uint8 ``[num_embeddings, ceil(embedding_dim / 2)]``, ``weight_scale`` and, unless
    ``symmetric``, ``zero_point`` ``[num_embeddings, G]``. ``weight`` is a dequantized copy, made anew on
    every access.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float16,
        zero_dtype: torch.dtype = torch.uint8,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, group_size, symmetric, scale_dtype, zero_dtype, device, dtype
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: Int4 | None = None) -> Int4Embedding:
        """Quantize ``embedding``, which is left unchanged. Tables are uniform: a codebook is not read.

        Raises:
            ValueError: NaN or infinite weights, a meta tensor, or ``max_norm`` (it renormalizes the table in
                place on every look-up).
        """
        from ..choose import choose_int4

        check_plain_embedding("Int4Embedding.from_embedding", embedding)
        uniform = replace(config or Int4(), codebook=None, codebook_scope=None)
        weight = embedding.weight
        weights = choose_int4(weight.detach(), uniform, embedding=True)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group_size=weights.group_size,
            symmetric=weights.zero_point is None,
            scale_dtype=weights.weight_scale.dtype,
            zero_dtype=torch.uint8 if weights.zero_point is None else weights.zero_point.dtype,
            device="meta",
        )
        layer._take(weights)
        layer._follow(weight)
        return layer.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """Dequantized ``[num_embeddings, embedding_dim]``; a new tensor each time."""
        return formats.dequantize_int4(self.quantized, self._like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _int4_embedding(  # type: ignore[no-any-return]
            input,
            self.qweight,
            self.weight_scale,
            self.zero_point,
            self.embedding_dim,
            self.group_size,
            self._like.dtype,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        text += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{text}, group_size={self.group_size}, symmetric={self.zero_point is None}"
