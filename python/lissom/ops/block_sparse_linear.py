"""``lissom::block_sparse_linear``: y = act(x · Wᵀ + b), W stored in blocks, and its two gradients.

Numbers: ``reference/block_sparse_linear.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _cuda, _native, _replay, _triton, registry
from .._block_sparse_formats import check_block_shape, without_block_padding
from .._block_sparse_pieces import Pieces, slots
from ..formats import (
    INT8_MAX_IN_FEATURES,
    BlockSparseWeights,
    check_block_sparse_indices,
    check_block_sparse_shapes,
    dequantize_block_sparse,
    pack_block_sparse,
    packed_block_sparse_bytes,
)
from ..reference import block_sparse_linear as _reference
from ._library import FLOAT_DTYPES, LIBRARY, check_float, check_same_device, left_to_triton, register_gpu
from ._linear import activation_gradient, bias_gradient, check_options, dense_bias, flat_rows, kernel_rows

__all__ = ["block_sparse_grad_input", "block_sparse_grad_values", "block_sparse_linear"]

_OP = "block_sparse_linear"
_GRAD_INPUT = "block_sparse_grad_input"
_GRAD_VALUES = "block_sparse_grad_values"

_VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""Codes of ``lissom::ValueType`` in ``csrc/common/formats.h``."""

LIBRARY.define(
    f"{_OP}(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, int out_features, "
    "int in_features, Tensor? weight_scale=None, Tensor? bias=None, str? act_fn=None, Tensor? packed=None, "
    "bool validated=False, str? backend=None) -> Tensor"
)
LIBRARY.define(
    f"{_GRAD_INPUT}(Tensor grad, Tensor values, Tensor crow_indices, Tensor col_indices, int out_features, "
    "int in_features, Tensor? weight_scale=None, bool validated=False, str? backend=None) -> Tensor"
)
LIBRARY.define(
    f"{_GRAD_VALUES}(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int block_height, "
    "int block_width, bool validated=False, str? backend=None) -> Tensor"
)


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    *,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a block-sparse weight.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; any strides; any leading dimensions, empty ones too.
        values, crow_indices, col_indices, weight_scale, out_features, in_features: the weight ``[N, K]``
            as :class:`lissom.formats.BlockSparseWeights` describes it. With int8 values, each row of ``x`` is
            quantized by its own absmax.
        bias: ``[N]``, any of the float dtypes, or None.
        act_fn: None, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``, fused.
        packed: ``lissom.formats.pack_block_sparse(weights)``, if already at hand, which ``"native"`` reads;
            otherwise it packs them in the call. The other backends read ``values``; int8 only.
        validated: the indices (and those in ``packed``) were checked before, with
            ``lissom.formats.check_block_sparse``; False checks the indices in every call, on CUDA in the
            first one and whenever they have changed. Wrong indices with True read memory out of bounds.
        backend: ``"native"`` (CPU), ``"triton"``, ``"cuda"`` (both CUDA) or ``"reference"``; None chooses.

    Returns:
        ``[..., N]`` of ``x.dtype``. Elements of ``x`` that meet no stored block have no influence, but
        with int8 values a row with NaN or infinity comes out as NaN, and so may an infinity that Triton
        multiplies with float32 values in bfloat16's rows. int8 results are bit-identical on all backends, and
        equal to ``int8_linear`` on the dense weight. Differentiable with respect to ``x``, ``bias`` and float
        ``values``.

    Raises:
        TypeError, ValueError: a dtype, shape, index or option that cannot be served, with the value and the
            fix.
    """
    y: Tensor = torch.ops.lissom.block_sparse_linear.default(
        x,
        values,
        crow_indices,
        col_indices,
        out_features,
        in_features,
        weight_scale,
        bias,
        act_fn,
        packed,
        validated,
        backend,
    )
    return y


def block_sparse_grad_input(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    *,
    weight_scale: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``grad · W``: the gradient of :func:`block_sparse_linear` (without activation) with respect to ``x``.

    Args:
        grad: ``[..., N]``, float32, bfloat16 or float16.
        values, crow_indices, col_indices, out_features, in_features, weight_scale, validated, backend: as in
            :func:`block_sparse_linear`; int8 values are dequantized.

    Returns:
        ``[..., K]`` of ``grad.dtype``, accumulated in float32. Differentiable with respect to ``grad`` and
        float ``values``.
    """
    grad_x: Tensor = torch.ops.lissom.block_sparse_grad_input.default(
        grad, values, crow_indices, col_indices, out_features, in_features, weight_scale, validated, backend
    )
    return grad_x


def block_sparse_grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_height: int,
    block_width: int,
    *,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``gradᵀ · x`` at the stored blocks: the gradient of :func:`block_sparse_linear` for its values.

    Args:
        grad: ``[..., N]``, float32, bfloat16 or float16.
        x: ``[..., K]`` with the same leading dimensions, any of these dtypes.
        crow_indices, col_indices, validated, backend: as in :func:`block_sparse_linear`.
        block_height, block_width: the block shape.

    Returns:
        float32 ``[B, block_height, block_width]``, zero past N and K. Differentiable with respect to ``grad``
        and ``x``.
    """
    grad_values: Tensor = torch.ops.lissom.block_sparse_grad_values.default(
        grad, x, crow_indices, col_indices, block_height, block_width, validated, backend
    )
    return grad_values


# ------------------------------------------------------------------------------------------- checks


def _check_rows(op: str, name: str, rows: Tensor, size: int, letter: str) -> None:
    if rows.dtype not in FLOAT_DTYPES:
        check_float(op, name, rows.dtype)
    if rows.dim() == 0 or rows.shape[-1] != size:
        raise ValueError(
            f"{op}: {name} has shape {tuple(rows.shape)} but the weight has {letter}={size}; the last "
            f"dimension of {name} must be {size}"
        )


def _check_weights(op: str, first: Tensor, w: BlockSparseWeights, **others: Tensor | None) -> None:
    check_block_sparse_shapes(w, op)
    check_same_device(
        op,
        first,
        values=w.values,
        crow_indices=w.crow_indices,
        col_indices=w.col_indices,
        weight_scale=w.weight_scale,
        **others,
    )


def _check(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> BlockSparseWeights:
    """The weight among the arguments as one record; raises unless all fits, but looks at no index."""
    w = BlockSparseWeights(
        values,
        crow_indices,
        col_indices,
        weight_scale,
        out_features=out_features,
        in_features=in_features,
    )
    _check_rows(_OP, "x", x, in_features, "K")
    _check_weights(_OP, x, w, bias=bias, packed=packed)
    check_options(_OP, out_features, bias, act_fn, weight_only=False, rotated=False)
    if values.dtype == torch.int8 and in_features > INT8_MAX_IN_FEATURES:
        raise ValueError(
            f"{_OP}: K={in_features} could overflow the int32 sum; at most {INT8_MAX_IN_FEATURES} is exact; "
            "split the layer or use float values"
        )
    if packed is not None:
        if values.dtype != torch.int8:
            raise ValueError(f"{_OP}: packed has no meaning with {values.dtype} values; leave it out")
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            raise ValueError(
                f"{_OP}: packed must be uint8 with one dimension, got {packed.dtype} {tuple(packed.shape)}; "
                "make it with lissom.formats.pack_block_sparse(weights)"
            )
    return w


# ------------------------------------------------------------------------------------------- what is known


_MOST_CALLS = 128
"""Kinds of calls that are remembered of two index tensors: every layer has its own."""


@dataclass
class _Known:
    """What was found out about two index tensors.

    Attributes:
        stamp: the row index, where both are, and their versions then.
        sound: (N, K, height, width) with which they were checked.
        places: ``lissom.kernels.block_sparse_linear.Places``, or None.
        pieces: what the CUDA kernels go over.
        calls: those that need no check of the indices, to be repeated.
    """

    stamp: tuple[Any, ...]
    sound: tuple[int, ...] | None = None
    places: Any = None
    pieces: Pieces = field(default_factory=Pieces)
    calls: _replay.Calls = field(default_factory=lambda: _replay.Calls(_MOST_CALLS))

    def renew(self, crow: Tensor, col: Tensor) -> None:
        """They have changed in place: so does what was derived, which captured graphs read."""
        crow, col = crow.contiguous(), col.contiguous()
        self.sound = None
        self.pieces.renew(crow)
        if self.places is not None:
            self.places.renew(crow, col)
        self.calls.forget()  # they would not wait for it


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the column index, and forgotten with it."""


def _tracked(crow: Tensor, col: Tensor) -> bool:
    """Whether a change of the indices can be seen: tensors made in inference mode have no versions."""
    return not (crow.is_inference() or col.is_inference())


def _known_of(crow: Tensor, col: Tensor) -> _Known:
    versions = (crow._version, col._version) if _tracked(crow, col) else ()
    stamp = (crow, (crow.data_ptr(), col.data_ptr()), versions)
    found: _Known | None = _known.get(col)
    if found is None or found.stamp[0] is not crow or found.stamp[1] != stamp[1]:
        found = _Known(stamp)
        _known[col] = found
    elif found.stamp[2] != versions:
        if col.is_cuda and torch.cuda.is_current_stream_capturing():
            return _Known(stamp)  # for this graph
        found.renew(crow, col)
        found.stamp = stamp
    return found


def renew_indices(crow: Tensor, col: Tensor) -> None:
    """The indices of a layer were changed, perhaps unseen. A captured graph whose calls read what was derived
    from them reads that of the new ones from now on."""
    if col not in _known:
        return
    known = _known_of(crow, col)
    if not _tracked(crow, col):
        known.renew(crow, col)


def _check_indices(op: str, w: BlockSparseWeights) -> None:
    if w.col_indices.is_cpu:
        if (native := _native.module()) is not None:
            crow, col = w.crow_indices.contiguous(), w.col_indices.contiguous()
            fault = native.block_sparse_check(
                crow.data_ptr(), col.data_ptr(), w.block_rows, w.block_columns, w.values.shape[0]
            )
            if fault < 0:
                return
        check_block_sparse_indices(w, op)  # says what is wrong
        return
    known, sizes = _known_of(w.crow_indices, w.col_indices), (w.out_features, w.in_features, *w.block_shape)
    if known.sound == sizes and _tracked(w.crow_indices, w.col_indices):
        return
    check_block_sparse_indices(w, op)  # waits for the GPU
    if not _tracked(w.crow_indices, w.col_indices):
        known.renew(w.crow_indices, w.col_indices)
    known.sound = sizes


# ------------------------------------------------------------------------------------------- backends


def _dense(w: BlockSparseWeights) -> tuple[Tensor, Tensor, Tensor]:
    return w.values.contiguous(), w.crow_indices.contiguous(), w.col_indices.contiguous()


def _linear_native(
    x: Tensor, w: BlockSparseWeights, bias: Tensor | None, act_fn: str | None, packed: Tensor | None
) -> Tensor:
    if w.values.dtype == torch.int8 and packed is None:
        packed = pack_block_sparse(w)
    # Names, not temporaries: an address outlives no tensor.
    values, crow, col = _dense(w)
    scale = None if w.weight_scale is None else w.weight_scale.contiguous()
    packed = None if packed is None else packed.contiguous()
    bias = dense_bias(bias)
    rows, row_stride = kernel_rows(x)
    y = torch.empty((*x.shape[:-1], w.out_features), dtype=x.dtype, device="cpu")
    dtype = _native.DTYPES[x.dtype]
    _native.load().block_sparse_linear(
        rows.data_ptr(),
        dtype,
        row_stride,
        rows.shape[0],
        w.in_features,
        values.data_ptr(),
        _VALUE_TYPES[values.dtype],
        crow.data_ptr(),
        col.data_ptr(),
        w.out_features,
        *w.block_shape,
        values.shape[0],
        0 if scale is None else scale.data_ptr(),
        0 if packed is None else packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _native.ACTIVATIONS[act_fn],
        y.data_ptr(),
        dtype,
        torch.get_num_threads(),
    )
    return y


def _places(w: BlockSparseWeights) -> Any:
    """What the kernels derived from the same indices before, or what they may fill."""
    known = _known_of(w.crow_indices, w.col_indices)
    if known.places is None:
        known.places = _triton.load(_OP).Places()
    return known.places


def _linear_triton(
    x: Tensor, w: BlockSparseWeights, bias: Tensor | None, act_fn: str | None, packed: Tensor | None
) -> Tensor:
    rows, _ = kernel_rows(x)
    scale = None if w.weight_scale is None else w.weight_scale.contiguous()
    y: Tensor = _triton.load(_OP).block_sparse_linear(
        rows, *_dense(w), w.out_features, scale, bias, act_fn, _places(w)
    )
    return y.view(*x.shape[:-1], w.out_features)


LEAST_HEIGHT = 48
"""Outputs of a block from which on it nearly fills a tile of the CUDA kernels, 64 wide."""


def _serves_cuda(x: Tensor, w: BlockSparseWeights) -> bool:
    values, (height, width) = w.values, w.block_shape
    served = values.dtype == torch.int8 or values.dtype == x.dtype != torch.float32
    return served and height >= LEAST_HEIGHT and width * values.element_size() % 16 == 0


def _aligned_rows(rows: Tensor) -> Tensor:
    """``rows`` as the CUDA kernels copy them: 16 bytes at a time, from multiples of 16, zeros past K."""
    (m, k), step = rows.shape, 16 // rows.element_size()
    whole = -(-k // step) * step
    apart = rows.stride(0)
    if whole == k > 0 and rows.data_ptr() % 16 == 0 and (m == 1 or (apart >= k and apart % step == 0)):
        return rows
    copy = rows.new_empty((m, max(whole, step)))
    copy[:, :k] = rows
    copy[:, k:].zero_()
    return copy


def _linear_cuda(
    x: Tensor, w: BlockSparseWeights, bias: Tensor | None, act_fn: str | None, packed: Tensor | None
) -> Tensor:
    """int8 values, and 16-bit ones with rows of the same type, in blocks of at least LEAST_HEIGHT outputs,
    rows of which are multiples of 16 bytes. The rest, and the gradients, are Triton's: it has tiles for lower
    blocks, and float32 values are no tensor core's."""
    if not _serves_cuda(x, w):
        left: Tensor = _linear_left(x, w, bias, act_fn, packed)
        return left
    y = torch.empty((*x.shape[:-1], w.out_features), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # Names, not temporaries: an address outlives no tensor.
    values, crow, col = _dense(w)
    if values.data_ptr() % 16:
        values = values.clone()
    rows, _ = kernel_rows(x)
    m, k = rows.shape
    x_scale = weight_scale = None
    if w.weight_scale is not None:
        weight_scale = w.weight_scale.contiguous()
        if m > 1 and rows.stride(0) < k:  # expanded
            rows = rows.contiguous()
        x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        codes = torch.empty((m, max(16, -(-k // 16) * 16)), dtype=torch.int8, device=x.device)
        _cuda.call(
            "quantize_rows",
            rows,
            rows.data_ptr(),
            _native.DTYPES[rows.dtype],
            rows.stride(0),
            m,
            k,
            0,
            False,
            codes.data_ptr(),
            codes.stride(0),
            x_scale.data_ptr(),
        )
        rows = codes
    else:
        rows = _aligned_rows(rows)
    bias = None if bias is None else bias.contiguous()
    blocks, height, width = values.shape
    value_type = _VALUE_TYPES[values.dtype]
    form, most, tiles, elements = _cuda.call(
        "block_sparse_plan", rows, value_type, m, w.block_rows, blocks, height, width
    )
    pieces = _known_of(w.crow_indices, w.col_indices).pieces.cut(crow, blocks, most)
    partial = arrived = None
    if sums := slots(blocks, most) * tiles:
        partial = torch.empty((sums, elements), dtype=torch.int32, device=x.device)
        arrived = _cuda.counters(rows, sums)
    _cuda.call(
        _OP,
        rows,
        form,
        rows.data_ptr(),
        m,
        rows.shape[1],
        rows.stride(0) if m > 1 else rows.shape[1],
        0 if x_scale is None else x_scale.data_ptr(),
        values.data_ptr(),
        value_type,
        blocks,
        height,
        width,
        col.data_ptr(),
        pieces.data_ptr(),
        len(pieces),
        0 if weight_scale is None else weight_scale.data_ptr(),
        *((0, 0) if bias is None else (bias.data_ptr(), _native.DTYPES[bias.dtype])),
        _native.ACTIVATIONS[act_fn],
        w.out_features,
        y.data_ptr(),
        _native.DTYPES[y.dtype],
        0 if partial is None else partial.data_ptr(),
        0 if arrived is None else arrived.data_ptr(),
    )
    return y


def _linear_reference(
    x: Tensor, w: BlockSparseWeights, bias: Tensor | None, act_fn: str | None, packed: Tensor | None
) -> Tensor:
    y = _reference.block_sparse_linear(flat_rows(x), w, bias, act_fn)
    return y.reshape(*x.shape[:-1], w.out_features).contiguous()


_linear_left = left_to_triton(_OP, _linear_triton, _linear_reference)


def _grad_input_native(grad: Tensor, w: BlockSparseWeights) -> Tensor:
    values, crow, col = _dense(w)
    scale = None if w.weight_scale is None else w.weight_scale.contiguous()
    rows, row_stride = kernel_rows(grad)
    grad_x = torch.empty((*grad.shape[:-1], w.in_features), dtype=grad.dtype, device="cpu")
    dtype = _native.DTYPES[grad.dtype]
    _native.load().block_sparse_grad_input(
        rows.data_ptr(),
        dtype,
        row_stride,
        rows.shape[0],
        w.out_features,
        values.data_ptr(),
        _VALUE_TYPES[values.dtype],
        0 if scale is None else scale.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        w.in_features,
        *w.block_shape,
        values.shape[0],
        grad_x.data_ptr(),
        dtype,
        torch.get_num_threads(),
    )
    return grad_x


def _grad_input_triton(grad: Tensor, w: BlockSparseWeights) -> Tensor:
    rows, _ = kernel_rows(grad)
    scale = None if w.weight_scale is None else w.weight_scale.contiguous()
    grad_x: Tensor = _triton.load(_OP).block_sparse_grad_input(
        rows, *_dense(w), w.in_features, scale, _places(w)
    )
    return grad_x.view(*grad.shape[:-1], w.in_features)


def _grad_input_reference(grad: Tensor, w: BlockSparseWeights) -> Tensor:
    grad_x = _reference.block_sparse_grad_input(flat_rows(grad), w)
    return grad_x.reshape(*grad.shape[:-1], w.in_features).contiguous()


def _grad_values_native(grad: Tensor, x: Tensor, w: BlockSparseWeights) -> Tensor:
    values, crow, col = _dense(w)
    grad_rows, grad_stride = kernel_rows(grad)
    x_rows, x_stride = kernel_rows(x)
    _native.load().block_sparse_grad_values(
        grad_rows.data_ptr(),
        _native.DTYPES[grad.dtype],
        grad_stride,
        x_rows.data_ptr(),
        _native.DTYPES[x.dtype],
        x_stride,
        grad_rows.shape[0],
        w.out_features,
        w.in_features,
        crow.data_ptr(),
        col.data_ptr(),
        *w.block_shape,
        values.shape[0],
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values


def _grad_values_triton(grad: Tensor, x: Tensor, w: BlockSparseWeights) -> Tensor:
    _, crow, col = _dense(w)
    grad_rows, x_rows = kernel_rows(grad)[0], kernel_rows(x)[0]
    grad_values: Tensor = _triton.load(_OP).block_sparse_grad_values(
        grad_rows, x_rows, crow, col, *w.block_shape, _places(w)
    )
    return grad_values


def _grad_values_reference(grad: Tensor, x: Tensor, w: BlockSparseWeights) -> Tensor:
    return _reference.block_sparse_grad_values(flat_rows(grad), flat_rows(x), w)


_GRADIENTS = {
    "native": (_grad_input_native, _grad_values_native),
    "triton": (_grad_input_triton, _grad_values_triton),
    "cuda": (
        left_to_triton(_GRAD_INPUT, _grad_input_triton, _grad_input_reference),
        left_to_triton(_GRAD_VALUES, _grad_values_triton, _grad_values_reference),
    ),
    registry.REFERENCE: (_grad_input_reference, _grad_values_reference),
}
"""The gradients have no entry in the registry of their own: they run where the op itself does."""


# ------------------------------------------------------------------------------------------- the ops


def direct(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """The op below torch's dispatcher, in the usual cases: on dense CPU tensors of the right types
    (``csrc/plain_call.h``) and on those of a GPU (``_replay.py``), if their indices need no check. Otherwise
    None, as for wrapped tensors."""
    if backend is None and x.is_cpu and (native := _native.module()) is not None:
        plain: Tensor | None = native.block_sparse_linear_plain(
            x,
            values,
            crow_indices,
            col_indices,
            out_features,
            in_features,
            weight_scale,
            bias,
            act_fn,
            packed,
            validated,
        )
        if plain is not None:
            return plain
    real = type(crow_indices) is type(col_indices) is Tensor and not col_indices.is_meta
    if not validated or not real:
        return None
    return _known_of(crow_indices, col_indices).calls(
        _run,
        x,
        values,
        crow_indices,
        col_indices,
        out_features,
        in_features,
        weight_scale,
        bias,
        act_fn,
        packed,
        validated,
        backend,
    )


def _block_sparse_linear(*arguments: Any) -> Tensor:
    found = direct(*arguments)
    return _run(*arguments) if found is None else found


def _run(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    w = _check(
        x,
        values,
        crow_indices,
        col_indices,
        out_features,
        in_features,
        weight_scale,
        bias,
        act_fn,
        packed,
    )
    if not validated:
        _check_indices(_OP, w)
    if packed is not None:
        size = packed_block_sparse_bytes(w)
        if packed.shape != (size,):
            raise ValueError(
                f"{_OP}: packed must have {size} bytes for this weight, got {packed.shape[0]}; make it with "
                "lissom.formats.pack_block_sparse(weights)"
            )
        if not validated and w.block_shape[1] % 4:
            packed = None  # it holds indices of its own, which nobody has checked
    run = registry.select(_OP, x.device.type, backend).run
    y: Tensor = run(x, w, bias, act_fn, packed)
    return y


def _block_sparse_grad_input(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    weight_scale: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    w = BlockSparseWeights(
        values,
        crow_indices,
        col_indices,
        weight_scale,
        out_features=out_features,
        in_features=in_features,
    )
    _check_rows(_GRAD_INPUT, "grad", grad, out_features, "N")
    _check_weights(_GRAD_INPUT, grad, w)
    if not validated:
        _check_indices(_GRAD_INPUT, w)
    run, _ = _GRADIENTS[registry.select(_OP, grad.device.type, backend).name]
    return run(grad, w)


def _new_grad_values(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_height: int, block_width: int
) -> BlockSparseWeights:
    """A record with the values still to be computed; raises unless all fits, but looks at no index."""
    check_block_shape((block_height, block_width), _GRAD_VALUES)
    for name, rows in (("grad", grad), ("x", x)):
        if rows.dtype not in FLOAT_DTYPES:
            check_float(_GRAD_VALUES, name, rows.dtype)
    if grad.dim() == 0 or x.dim() == 0 or grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{_GRAD_VALUES}: grad {tuple(grad.shape)} and x {tuple(x.shape)} must be [..., N] and [..., K] "
            "with the same leading dimensions"
        )
    blocks = col_indices.shape[0] if col_indices.dim() else 0
    w = BlockSparseWeights(
        grad.new_empty((blocks, block_height, block_width), dtype=torch.float32),
        crow_indices,
        col_indices,
        out_features=grad.shape[-1],
        in_features=x.shape[-1],
    )
    _check_weights(_GRAD_VALUES, grad, w, x=x)
    return w


def _block_sparse_grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_height: int,
    block_width: int,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    w = _new_grad_values(grad, x, crow_indices, col_indices, block_height, block_width)
    if not validated:
        _check_indices(_GRAD_VALUES, w)
    _, run = _GRADIENTS[registry.select(_OP, grad.device.type, backend).name]
    return run(grad, x, w)


# ------------------------------------------------------------------------------------------- fakes


def _fake_linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    w = _check(x, *args, **kwargs)
    return x.new_empty((*x.shape[:-1], w.out_features))


def _fake_grad_input(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    weight_scale: Tensor | None = None,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    w = BlockSparseWeights(
        values,
        crow_indices,
        col_indices,
        weight_scale,
        out_features=out_features,
        in_features=in_features,
    )
    _check_rows(_GRAD_INPUT, "grad", grad, out_features, "N")
    _check_weights(_GRAD_INPUT, grad, w)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_height: int,
    block_width: int,
    validated: bool = False,
    backend: str | None = None,
) -> Tensor:
    return _new_grad_values(grad, x, crow_indices, col_indices, block_height, block_width).values


# ------------------------------------------------------------------------------------------- autograd


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, n, k, scale, bias, act_fn, packed, validated, backend = inputs
    ctx.sizes = (n, k)
    ctx.act_fn = act_fn
    ctx.options = (validated, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The activation's derivative needs the pre-activation, which is recomputed from x.
    needs_x = act_fn is not None or ctx.needs_input_grad[1]
    recomputing = (bias, packed) if act_fn is not None else (None, None)
    ctx.save_for_backward(values, crow, col, scale, x if needs_x else None, *recomputing)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, crow, col, scale, x, bias, packed = ctx.saved_tensors
    ops: Any = torch.ops.lissom
    if ctx.act_fn is not None:
        z = ops.block_sparse_linear.default(
            x, values, crow, col, *ctx.sizes, scale, bias, None, packed, *ctx.options
        )
        grad = activation_gradient(grad, z, ctx.act_fn)
    gradients: list[Tensor | None] = [None] * 12
    if ctx.needs_input_grad[0]:
        gradients[0] = ops.block_sparse_grad_input.default(
            grad, values, crow, col, *ctx.sizes, scale, *ctx.options
        )
    if ctx.needs_input_grad[1]:
        grad_values = ops.block_sparse_grad_values.default(
            grad, x, crow, col, *values.shape[1:], *ctx.options
        )
        gradients[1] = grad_values.to(values.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[7]:
        gradients[7] = bias_gradient(grad, ctx.bias_dtype)
    return tuple(gradients)


def _grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, values, crow, col, n, k, scale, validated, backend = inputs
    ctx.sizes = (n, k)
    ctx.options = (validated, backend)
    ctx.save_for_backward(grad if ctx.needs_input_grad[1] else None, values, crow, col, scale)


def _grad_input_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Of grad · W: h · Wᵀ, and gradᵀ · h at the stored blocks."""
    grad, values, crow, col, scale = ctx.saved_tensors
    ops: Any = torch.ops.lissom
    gradients: list[Tensor | None] = [None] * 9
    validated, backend = ctx.options
    if ctx.needs_input_grad[0]:
        n, k = ctx.sizes
        w = BlockSparseWeights(values, crow, col, scale, out_features=n, in_features=k)
        dense = values if scale is None else dequantize_block_sparse(w).values
        gradients[0] = ops.block_sparse_linear.default(
            h, dense, crow, col, n, k, None, None, None, None, validated, backend
        )
    if ctx.needs_input_grad[1]:
        grad_values = ops.block_sparse_grad_values.default(
            grad, h, crow, col, *values.shape[1:], validated, backend
        )
        gradients[1] = grad_values.to(values.dtype)
    return tuple(gradients)


def _grad_values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, crow, col, _, _, validated, backend = inputs
    ctx.options = (validated, backend)
    ctx.save_for_backward(grad, x, crow, col)


def _grad_values_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Of gradᵀ · x at the stored blocks: x · Hᵀ and grad · H, H the block-sparse matrix of h."""
    grad, x, crow, col = ctx.saved_tensors
    n, k = grad.shape[-1], x.shape[-1]
    validated, backend = ctx.options
    ops: Any = torch.ops.lissom
    values = without_block_padding(BlockSparseWeights(h, crow, col, out_features=n, in_features=k))
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_grad = ops.block_sparse_linear.default(
            x, values, crow, col, n, k, None, None, None, None, validated, backend
        ).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_x = ops.block_sparse_grad_input.default(
            grad, values, crow, col, n, k, None, validated, backend
        ).to(x.dtype)
    return grad_grad, grad_x, *([None] * 6)


for _name, _impl, _fake, _setup, _backward in (
    (_OP, _block_sparse_linear, _fake_linear, _linear_context, _linear_backward),
    (_GRAD_INPUT, _block_sparse_grad_input, _fake_grad_input, _grad_input_context, _grad_input_backward),
    (_GRAD_VALUES, _block_sparse_grad_values, _fake_grad_values, _grad_values_context, _grad_values_backward),
):
    LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lissom::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"lissom::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _linear_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _linear_reference),
)
register_gpu(_OP, _linear_triton, _linear_reference, _linear_cuda)
