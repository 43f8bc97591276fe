"""``SparseLinear``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import formats
from .. import ops as _ops  # noqa: F401 (registers them)
from .._block_sparse_formats import float16_fault
from ..config import BlockSparse
from ..formats import BlockSparseWeights
from ..ops.block_sparse_linear import direct, renew_indices
from ._compressed import CompressedModule, check_linear_options, check_present, unobserved, version

__all__ = ["SparseLinear"]

_block_sparse_linear = torch.ops.lissom.block_sparse_linear.default

CHUNK = 1 << 20
"""Weights that are sorted into blocks at once."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What float values can be."""


class SparseLinear(CompressedModule):
    """``nn.Linear`` of which only some blocks of the weight are stored: y = act(x · Wᵀ + b).

    Args:
        in_features, out_features, bias, device: as for ``nn.Linear``.
        block_shape: ``(outputs, inputs)`` of a block, which need not divide the layer's sizes.
        blocks: how many are stored. They are zero, and the first ones; with none the output is the bias.
        dtype: of the stored values: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or
            ``torch.int8``. None is torch's default.
        floating_dtype: of ``bias`` and ``weight``. None is that of the values, or torch's default.
        act_fn: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, fused into the kernel.

    State (see :class:`lissom.formats.BlockSparseWeights`): ``values`` ``[blocks, *block_shape]``, a parameter
    that any optimiser can train, or int8 and a buffer; ``crow_indices`` int32 and ``col_indices`` int32
    ``[blocks]``, which say where the blocks are, as in ``torch.sparse_bsr``; ``weight_scale`` float32
    ``[out_features]`` with int8 values; ``bias`` or None. A state with another number of blocks can be
    loaded. Indices and values are checked when they are loaded, before anything is changed; indices that were
    changed in another way are checked in the next call.

    Float values follow ``.bfloat16()``, ``.half()`` and ``.float()``; any other dtype leaves them as they
    are. Values that would not be finite in float16 are a ValueError of ``.half()``, and of loading them into
    float16 values, before anything of the layer is changed. Inputs may be float32, bfloat16 or float16,
    whatever the values are. For training, leave values float32 or bfloat16: small updates are lost in
    float16, and ``torch.amp.GradScaler`` refuses float16 parameters.

    ``weight`` is a dense copy, made anew on every access, for code that reads it; ``sparse`` is the state as
    one record.

    Source: see :func:`lissom.ops.block_sparse_linear`.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    weight_scale: Tensor | None
    bias: nn.Parameter | None
    _packed: Tensor | None
    _sources: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_shape: tuple[int, int] = (8, 1),
        blocks: int = 0,
        dtype: torch.dtype | None = None,
        floating_dtype: torch.dtype | None = None,
        act_fn: str | None = None,
        device: Any = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        floating = floating_dtype or (dtype if dtype.is_floating_point else torch.get_default_dtype())
        super().__init__(device, floating)
        check_linear_options("SparseLinear", None, act_fn, False)
        if dtype not in (*_FLOATS, torch.int8):
            raise ValueError(
                f"SparseLinear: dtype={dtype} cannot be; use torch.float32, torch.bfloat16, torch.float16 or "
                "torch.int8"
            )
        if dtype == torch.int8 and in_features > formats.INT8_MAX_IN_FEATURES:
            raise ValueError(
                f"SparseLinear: in_features={in_features} could overflow the int32 sum; at most "
                f"{formats.INT8_MAX_IN_FEATURES} is exact; use dtype=torch.float32, torch.bfloat16 or "
                "torch.float16"
            )
        sides = _checked_shape(block_shape)
        rows, columns = -(-out_features // sides[0]), -(-in_features // sides[1])
        if not 0 <= blocks <= rows * columns:
            raise ValueError(
                f"SparseLinear: blocks={blocks} cannot be; the weight has {rows * columns} blocks of {sides}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.block_shape = sides
        self.act_fn = act_fn
        self._checked: tuple[Any, ...] | None = None  # what _stamp() said when they were sound
        values = torch.zeros(blocks, *sides, dtype=dtype, device=device)
        if dtype == torch.int8:
            self._register_format("values", values)
        else:
            self._register_values(values)
        first = torch.arange(blocks, device=device)
        crow = (torch.arange(rows + 1, device=device) * columns).clamp(max=blocks)
        self._register_format("crow_indices", crow.to(torch.int32))
        self._register_format("col_indices", (first % max(columns, 1)).to(torch.int32))
        scale = torch.zeros(out_features, device=device, dtype=torch.float32) if dtype == torch.int8 else None
        self._register_format("weight_scale", scale)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=floating)) if bias else None
        )
        self.register_buffer("_packed", None, persistent=False)
        self._repack()

    def _register_values(self, values: Tensor) -> None:
        self.register_parameter("values", nn.Parameter(values))
        self._dtypes["values"] = values.dtype
        self._alternatives["values"] = _FLOATS

    # ---- making one --------------------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: BlockSparse | None = None,
        *,
        activation_norm: Tensor | None = None,
        act_fn: str | None = None,
    ) -> SparseLinear:
        """Keep the best blocks of ``linear``; its bias parameter is taken over, and it is left unchanged.

        Args:
            linear: an ``nn.Linear`` with finite weights, on any device but meta.
            config: ``BlockSparse(...)``; None is the default. ``block_shape="auto"`` is (8, 1), (8, 4) with
                int8 values, or (32, 32) on a GPU; ``scope`` and ``prefer`` are not read here.
            activation_norm: the L2 norm of each input over sample data, ``[in_features]``; with
                ``method="wanda"``, and only then.
            act_fn: fuse an activation function.

        Raises:
            ValueError: NaN or infinite weights, weights that float16 cannot hold if values are that, a meta
                tensor, a missing or useless ``activation_norm``.
        """
        from ..prune import choose_blocks, default_block_shape

        config = config or BlockSparse()
        check_present("SparseLinear.from_linear", linear.weight)
        shape = default_block_shape(config, linear.weight.device)
        mask = choose_blocks(linear.weight.detach(), config, shape, activation_norm)
        return cls.from_mask(linear, mask, shape, getattr(torch, config.dtype), act_fn=act_fn)

    @classmethod
    def from_mask(
        cls,
        linear: nn.Linear,
        mask: Tensor,
        block_shape: tuple[int, int] = (8, 1),
        dtype: torch.dtype = torch.float32,
        *,
        act_fn: str | None = None,
    ) -> SparseLinear:
        """Keep the blocks of ``linear`` that ``mask`` names; otherwise as :meth:`from_linear`.

        Args:
            linear: an ``nn.Linear``, on any device but meta.
            mask: bool ``[ceil(N / block height), ceil(K / block width)]``, one per block.
            block_shape, dtype, act_fn: as for the constructor.

        Raises:
            TypeError, ValueError: a mask or dtype that does not fit, or a meta tensor; kept weights that
                float16 cannot hold if values are that.
        """
        check_present("SparseLinear.from_mask", linear.weight)
        weight = linear.weight.detach()
        layer = cls._of(_kept(weight, mask, block_shape, dtype), linear.bias, act_fn)
        layer._follow(weight)
        return layer.train(linear.training)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        block_shape: tuple[int, int] = (8, 1),
        dtype: torch.dtype | None = None,
        act_fn: str | None = None,
    ) -> SparseLinear:
        """Keep what ``mask`` names of a dense weight.

        Args:
            weight: ``[N, K]``, floating point and finite; copied.
            mask: bool, ``[N, K]`` (a block is stored where it keeps any element; the others in it become 0)
                or one per block, ``[ceil(N / block height), ceil(K / block width)]``.
            bias: ``[N]`` or None; a parameter is taken over.
            block_shape: as for the constructor.
            dtype: of the values; None is the weight's, or float32 where the layer cannot have that.
            act_fn: fuse an activation function.

        Raises:
            ValueError: a shape or dtype that does not fit, NaN or infinity, a meta tensor; kept weights that
                float16 cannot hold if values are that.
        """
        name = "SparseLinear.from_dense"
        check_present(name, weight)
        height, width = _checked_shape(block_shape)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{name}: weight must be floating point [N, K], got {weight.dtype} {tuple(weight.shape)}"
            )
        blocks = (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
        if mask.dtype != torch.bool or mask.shape not in (weight.shape, blocks):
            raise ValueError(
                f"{name}: mask must be bool {tuple(weight.shape)}, as the weight, or {blocks}, one per block "
                f"of {(height, width)}; got {mask.dtype} {tuple(mask.shape)}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: weight holds NaN or infinity; repair it first")
        if mask.shape == weight.shape:
            weight = weight.detach().masked_fill(~mask, 0)
            mask = formats.block_mask(mask, (height, width))
        dtype = dtype or (weight.dtype if weight.dtype in _FLOATS else torch.float32)
        stored = _kept(weight, mask, (height, width), dtype)
        return cls.from_weights(stored, bias, act_fn=act_fn, dtype=weight.dtype)

    @classmethod
    def from_weights(
        cls,
        weights: BlockSparseWeights,
        bias: Tensor | None = None,
        *,
        act_fn: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseLinear:
        """A layer of blocks that were chosen elsewhere; nothing is copied.

        Args:
            weights: checked in full; their tensors become the layer's.
            bias: ``[out_features]`` or None; a parameter is taken over.
            act_fn: as for the constructor.
            dtype: floating dtype that the layer stands for (that of ``weight``); None is that of the values,
                or, where they are int8, of the bias or torch's default.

        Raises:
            TypeError, ValueError: weights that are not sound, a bias of the wrong shape, a meta tensor.
        """
        name = "SparseLinear.from_weights"
        check_present(name, weights.values)
        formats.check_block_sparse(weights, name)
        if bias is not None and (bias.shape != (weights.out_features,) or not bias.is_floating_point()):
            raise ValueError(
                f"{name}: bias must be floating point [{weights.out_features}], got {bias.dtype} "
                f"{tuple(bias.shape)}"
            )
        layer = cls._of(weights, bias, act_fn)
        if dtype is None:
            dtype = torch.get_default_dtype() if bias is None else bias.dtype
            dtype = weights.values.dtype if weights.values.is_floating_point() else dtype
        layer._follow(torch.empty(0, dtype=dtype, device=weights.values.device))
        return layer

    @classmethod
    def from_torch(
        cls,
        tensor: Tensor,
        bias: Tensor | None = None,
        block_shape: tuple[int, int] | None = None,
        *,
        act_fn: str | None = None,
    ) -> SparseLinear:
        """From a ``torch.sparse_bsr`` or ``torch.sparse_csr`` tensor ``[out_features, in_features]``.

        Args:
            tensor: float32, bfloat16 or float16; checked in full.
            bias: ``[out_features]`` or None; a parameter is taken over.
            block_shape: None keeps the blocks of a BSR tensor, and takes those of a CSR tensor as (1, 1).
            act_fn: as for the constructor.

        Raises:
            TypeError, ValueError: another layout or dtype, or indices that are not sound.
        """
        weights = formats.block_sparse_from_torch(tensor, block_shape)
        return cls.from_weights(weights, bias, act_fn=act_fn)

    @classmethod
    def _of(cls, weights: BlockSparseWeights, bias: Tensor | None, act_fn: str | None) -> SparseLinear:
        """A layer that holds ``weights``, which are sound. Its ``_like`` is still to be set."""
        layer = cls(
            weights.in_features,
            weights.out_features,
            bias=False,
            block_shape=weights.block_shape,
            blocks=weights.values.shape[0],
            dtype=weights.values.dtype,
            act_fn=act_fn,
            device="meta",
        )
        for name in layer._dtypes:
            tensor = getattr(weights, name)
            if name in layer._parameters:
                layer._parameters[name] = nn.Parameter(tensor)
            else:
                layer._buffers[name] = tensor
        own = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.register_parameter("bias", own)
        layer._checked = layer._stamp()  # by whoever made the weights
        layer._repack()
        return layer

    # ---- what it holds -----------------------------------------------------------------------------------

    def _record(self, tensors: Mapping[str, Any]) -> BlockSparseWeights:
        """``tensors``, and the layer's own where there are none, as one record."""
        fields = {name: tensors.get(name, getattr(self, name)) for name in self._dtypes}
        return BlockSparseWeights(out_features=self.out_features, in_features=self.in_features, **fields)

    @property
    def sparse(self) -> BlockSparseWeights:
        """The stored blocks as one record; its tensors are the layer's own, without their history."""
        return self._record({"values": self.values.detach()})

    @property
    def density(self) -> float:
        """Share of the weights that is stored."""
        return self.sparse.density

    @property
    def weight(self) -> Tensor:
        """Dense ``[out_features, in_features]`` in the layer's floating dtype; a new tensor."""
        return self.to_dense(self._like.dtype)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out_features, in_features]``, zero where nothing is stored; a new tensor.

        ``dtype`` None is that of the values, or float32 where they are int8.
        """
        return formats.block_sparse_to_dense(self.sparse, dtype)

    def to_torch(self, layout: torch.layout = torch.sparse_bsr) -> Tensor:
        """The weight as a ``torch.sparse_bsr`` or ``torch.sparse_csr`` tensor; int8 becomes float32.

        ValueError for BSR where the blocks do not divide the layer's sizes, and for another layout.
        """
        return formats.block_sparse_to_torch(self.sparse, layout)

    # ---- state -------------------------------------------------------------------------------------------

    def _stamp(self) -> tuple[Any, ...]:
        """What tells whether somebody touched the indices."""
        crow, col = self._buffers["crow_indices"], self._buffers["col_indices"]
        return crow, version(crow), col, version(col)

    def _untouched(self) -> bool:
        """Whether the indices are the ones that were checked."""
        if self._checked is None:
            return False
        state, (crow, crow_version, col, col_version) = self._buffers, self._checked
        return (
            crow is state["crow_indices"]
            and col is state["col_indices"]
            and crow_version == version(crow)
            and col_version == version(col)
        )

    def _repack(self) -> None:
        if not self._untouched():
            self._checked = None
            if not self.values.is_meta:
                # After to_empty() they are nonsense: the op says so, should it be called like this.
                with contextlib.suppress(ValueError):
                    formats.check_block_sparse_indices(self.sparse)
                    self._checked = self._stamp()
                    renew_indices(self.crow_indices, self.col_indices)
        packed = None  # a GPU reads the values as they are
        if self._checked is not None and self.values.dtype == torch.int8 and self.values.is_cpu:
            packed = formats.pack_block_sparse(self.sparse)
        self._keep(_packed=packed)

    def _fault(self, name: str, loaded: Mapping[str, Tensor]) -> str:
        if not loaded:
            return ""
        record = self._record(loaded)
        try:
            if record.values.dim() == 3 and tuple(record.values.shape[1:]) != self.block_shape:
                raise ValueError(
                    f"{name}: values {tuple(record.values.shape)} are blocks of "
                    f"{tuple(record.values.shape[1:])}, but the layer was made for block_shape="
                    f"{self.block_shape}; make one with the other shape"
                )
            formats.check_block_sparse_shapes(record, name)
            if not any(getattr(record, key).is_meta for key in self._dtypes):
                formats.check_block_sparse(record, name)
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

    def _make_room(self, loaded: Mapping[str, Tensor]) -> None:
        for name, tensor in loaded.items():
            old = getattr(self, name)
            if old.shape == tensor.shape:
                continue
            empty = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
            if name in self._parameters:
                old.grad, old.data = None, empty
            else:
                self._buffers[name] = empty

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bias, error_msgs = state_dict.get(prefix + "bias"), args[-1]
        if self.bias is not None and isinstance(bias, Tensor) and bias.shape != self.bias.shape:
            error_msgs.append(
                f"{prefix}bias has shape {tuple(bias.shape)} but must be {tuple(self.bias.shape)}; nothing "
                "of this layer was loaded"
            )
            return
        values, assigned = state_dict.get(prefix + "values"), args[0].get("assign_to_params_buffers", False)
        if self.values.dtype == torch.float16 and isinstance(values, Tensor) and not assigned:
            rounded = values.dtype in _FLOATS and values.dtype != torch.float16
            if rounded and (fault := float16_fault(values)):
                error_msgs.append(f"{prefix}values {fault}; nothing of this layer was loaded")
                return
        self._checked = None  # changes of tensors made in inference mode do not show
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._dtypes["values"] = self.values.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        values = self._parameters.get("values")
        grad = None if values is None else values.grad

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            own = tensor is values or tensor is grad
            if own and new.dtype not in _FLOATS:
                return tensor.to(new.device)
            # The values are the first tensor of the layer: nothing has changed yet.
            rounded = tensor is values and new.dtype == torch.float16 != tensor.dtype
            if rounded and (fault := float16_fault(tensor)):
                raise ValueError(f"SparseLinear: values {fault}")
            return new

        super()._apply(moved, recurse)
        self._dtypes["values"] = self.values.dtype
        if not self._untouched():
            self._repack()
        return self

    # ---- call --------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        state, parameters = self._buffers, self._parameters
        holds = True
        if torch.compiler.is_compiling():  # what is exported goes its own ways, so there the op checks
            checked = self._checked is not None and not torch.compiler.is_exporting()
        else:
            checked = self._untouched()
            holds = state["_packed"] is None or self._derived_holds()
        arguments: Any = (
            input,
            parameters["values"] if "values" in parameters else state["values"],
            state["crow_indices"],
            state["col_indices"],
            self.out_features,
            self.in_features,
            state["weight_scale"],
            parameters["bias"],
            self.act_fn,
            state["_packed"] if holds else None,
            checked,
        )
        if checked and unobserved(input) and (found := direct(*arguments)) is not None:
            return found
        result: Tensor = _block_sparse_linear(*arguments)
        if not checked and not torch.compiler.is_compiling():
            self._repack()
        return result

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", block_shape={self.block_shape}"
        blocks = self.values.shape[0]
        text += f", blocks={blocks}" if self.values.is_meta else f", density={self.density:.4g}"
        text += "" if self.values.dtype == torch.float32 else f", dtype={self.values.dtype}"
        return text if self.act_fn is None else f"{text}, act_fn={self.act_fn!r}"


def _checked_shape(block_shape: tuple[int, int]) -> tuple[int, int]:
    shape = BlockSparse(block_shape=block_shape).block_shape
    if shape == "auto":
        raise ValueError(
            "SparseLinear: block_shape='auto' is for compress_, which measures; name one, as (8, 1)"
        )
    return shape


def _kept(
    weight: Tensor, mask: Tensor, block_shape: tuple[int, int], dtype: torch.dtype
) -> BlockSparseWeights:
    """``formats.block_sparse_from_dense``, some rows of blocks at a time, because that needs several copies
    of what is kept."""
    height, width = block_shape
    step = max(1, CHUNK // max(1, height * weight.shape[1]))
    fits = mask.shape == (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    if not fits or len(mask) <= step:
        return formats.block_sparse_from_dense(weight, mask, block_shape, dtype)
    values = torch.empty(int(mask.sum()), height, width, dtype=dtype, device=weight.device)
    col = torch.empty(len(values), dtype=torch.int32, device=weight.device)
    crow = torch.zeros(len(mask) + 1, dtype=torch.int32, device=weight.device)
    scales = []
    done = 0
    for start in range(0, len(mask), step):
        rows = weight[start * height : (start + step) * height]
        part = formats.block_sparse_from_dense(rows, mask[start : start + step], block_shape, dtype)
        count = len(part.values)
        values[done : done + count] = part.values
        col[done : done + count] = part.col_indices
        crow[start + 1 : start + step + 1] = part.crow_indices[1:] + done
        scales += [] if part.weight_scale is None else [part.weight_scale]
        done += count
    scale = torch.cat(scales) if scales else None
    n, k = weight.shape
    return BlockSparseWeights(values, crow, col, scale, out_features=n, in_features=k)
