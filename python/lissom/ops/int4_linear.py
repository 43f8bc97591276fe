"""``lissom::int4_linear``: y = act(x · Wᵀ + b) with 4-bit weights. Numbers: ``reference/int4_linear.py``."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _cuda, _native, _replay, _triton, registry
from ..formats import (
    Int4Weights,
    check_int4_shapes,
    dequantize_int4,
    group_order,
    int4_fragments_shape,
    pack_int4,
    pack_int4_fragments,
    pack_nibbles,
    packed_int4_shape,
    unpack_nibbles,
)
from ..reference import int4_linear as _reference
from ._library import FLOAT_DTYPES, LIBRARY, check_float, check_same_device, left_to_triton, register_gpu
from ._linear import (
    activation_gradient,
    bias_gradient,
    check_options,
    dense_bias,
    flat_rows,
    input_gradient,
    kernel_rows,
)

__all__ = ["int4_linear"]

_OP = "int4_linear"

LIBRARY.define(
    "int4_linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? zero_point=None, "
    "Tensor? codebook=None, Tensor? group_index=None, Tensor? bias=None, int group_size=128, "
    "bool weight_only=False, str? act_fn=None, Tensor? packed=None, Tensor? permutation=None, "
    "str? backend=None, bool rotated=False) -> Tensor"
)


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    group_index: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor:
    """Linear layer with 4-bit weights in groups along K: uniform, or through a table of 16 values.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; any strides; any leading dimensions, empty ones too.
        qweight, weight_scale, zero_point, codebook, group_index, group_size: the weight ``[N, K]`` as
            :class:`lissom.formats.Int4Weights` describes it. Values are not checked here
            (``lissom.formats.check_int4`` does it).
        bias: ``[N]``, any of the float dtypes, or None.
        weight_only: keep ``x`` in floating point and accumulate in float32, instead of quantizing each
            row of ``x`` to int8. On CUDA, products of many rows of 16 bits round each weight once to
            ``x.dtype``.
        act_fn: None, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``, fused.
        packed: ``int4_pack(weights, weight_only)``, if already at hand; otherwise weights that need it are
            packed in the call, as they are where ``packed`` was made for another backend.
        permutation: ``lissom.formats.group_order(group_index)``; goes with ``packed`` and ``group_index``.
        backend: ``"native"`` (CPU), ``"triton"``, ``"cuda"`` (GPU) or ``"reference"``; None chooses.
        rotated: the weight was multiplied by a Hadamard matrix before it was quantized
            (``lissom.formats.rotate``), and ``x`` is rotated likewise before it is quantized. Neither with
            ``weight_only`` nor with ``group_index``.

    Returns:
        ``[..., N]`` of ``x.dtype``. The int8 form is bit-identical on all backends, but for few rows on a
        GPU, where K is split and the groups' exact sums meet in another order. Its rows with NaN or infinity
        come out as NaN. Differentiable with respect to ``x`` and ``bias`` (straight through the rounding of
        ``x``).

    Raises:
        TypeError, ValueError: a dtype, shape or option that cannot be served, with the value and the fix.
    """
    y: Tensor = torch.ops.lissom.int4_linear.default(
        x,
        qweight,
        weight_scale,
        zero_point,
        codebook,
        group_index,
        bias,
        group_size,
        weight_only,
        act_fn,
        packed,
        permutation,
        backend,
        rotated,
    )
    return y


def int4_pack(weights: Int4Weights, weight_only: bool = False) -> Tensor | None:
    """What a layer keeps beside its weights, on their device, so that no call has to make it.

    It is for the backend that serves them there now. On the CPU ``lissom.formats.pack_int4``; for the CUDA
    kernels ``lissom.formats.pack_int4_fragments``. Triton's read the canonical weights: they need codes of
    their own only with a group index, the canonical ones with their columns in the order of their groups.
    """
    if _fragments_serve(weights, weight_only):
        return pack_int4_fragments(weights, weight_only)
    if weights.qweight.is_cpu:
        return pack_int4(weights, weight_only)
    return None if weights.group_index is None else _codes_by_group(weights)


def _fragments_serve(weights: Int4Weights, weight_only: bool) -> bool:
    """Whether what serves the weights on their device reads fragments, if only for few rows."""
    device = weights.qweight.device
    if weights.table_scope == 2:
        return False
    try:
        chosen = registry.select(_OP, device.type)
    except (NotImplementedError, RuntimeError, ValueError):
        return False  # a call says so
    if chosen.name == "cuda":
        return True
    if chosen.run is not chosen.automatic or weights.group_index is not None or _cuda.unavailable_reason():
        return False
    few_rows = weight_only and weights.codebook is None
    return (few_rows and _cuda.is_hopper(device)) or bool(_triton.load("tiles").tunes(device))


def _codes_by_group(weights: Int4Weights, order: Tensor | None = None) -> Tensor:
    """``qweight`` with its columns in the order of their groups."""
    assert weights.group_index is not None
    order = group_order(weights.group_index) if order is None else order
    return pack_nibbles(unpack_nibbles(weights.qweight, weights.in_features).index_select(1, order))


def packed_shape(weights: Int4Weights, weight_only: bool) -> tuple[int, ...] | None:
    """Shape of what :func:`int4_pack` makes as bytes; fragments are words."""
    if not weights.qweight.is_cuda:
        return packed_int4_shape(weights, weight_only)
    return None if weights.group_index is None else tuple(weights.qweight.shape)


def _check(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    group_index: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Int4Weights:
    """The weights among the op's arguments as one record; raises unless everything fits together."""
    if x.dtype not in FLOAT_DTYPES:
        check_float(_OP, "x", x.dtype)
    if x.dim() == 0 or (qweight.dim() == 2 and qweight.shape[1] != (x.shape[-1] + 1) // 2):
        width = qweight.shape[-1] if qweight.dim() else 0
        raise ValueError(
            f"{_OP}: x has shape {tuple(x.shape)} but qweight is {tuple(qweight.shape)}, two codes a byte; "
            f"the last dimension of x must be {2 * width}, or {2 * width - 1} for an odd K"
        )
    weights = Int4Weights(
        qweight,
        weight_scale,
        zero_point,
        codebook,
        group_index,
        in_features=x.shape[-1],
        group_size=group_size,
    )
    check_int4_shapes(weights, _OP)
    n, k = weights.out_features, weights.in_features
    check_options(_OP, n, bias, act_fn, weight_only, rotated)
    if rotated and group_index is not None:
        raise ValueError(f"{_OP}: rotated has no meaning with group_index; give one of the two")
    if permutation is not None:
        if group_index is None:
            raise ValueError(f"{_OP}: permutation has no meaning without group_index; leave it out")
        if permutation.dtype != torch.int64 or permutation.shape != (k,):
            raise ValueError(
                f"{_OP}: permutation must be int64 [{k}], got {permutation.dtype} "
                f"{tuple(permutation.shape)}; make it with lissom.formats.group_order(group_index)"
            )
    if group_index is not None and (packed is None) != (permutation is None):
        given, missing = ("packed", "permutation") if permutation is None else ("permutation", "packed")
        raise ValueError(f"{_OP}: {given} is given without {missing}; give both or neither")
    if packed is not None and packed.dtype == torch.int32:
        fragments = int4_fragments_shape(weights, weight_only)
        if weights.table_scope == 2 or packed.shape != fragments:
            raise ValueError(
                f"{_OP}: packed as int32 must be {fragments} for N={n}, K={k} in this form, got "
                f"{tuple(packed.shape)}; make it with lissom.formats.pack_int4_fragments(weights, "
                "weight_only)"
            )
    elif packed is not None:
        shape = packed_shape(weights, weight_only)
        if shape is None:
            raise ValueError(
                f"{_OP}: packed has no meaning on {x.device} without group_index; leave it out (a layer does "
                "so when it is moved)"
            )
        if packed.dtype != torch.uint8 or packed.shape != shape:
            maker = "lissom.ops.int4_linear.int4_pack" if x.is_cuda else "lissom.formats.pack_int4"
            raise ValueError(
                f"{_OP}: packed must be uint8 {shape} for N={n}, K={k} in this form, got {packed.dtype} "
                f"{tuple(packed.shape)}; make it with {maker}(weights, weight_only)"
            )
    check_same_device(
        _OP,
        x,
        qweight=qweight,
        weight_scale=weight_scale,
        zero_point=zero_point,
        codebook=codebook,
        group_index=group_index,
        bias=bias,
        packed=packed,
        permutation=permutation,
    )
    return weights


_calls = _replay.Calls()


def direct(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    group_index: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor | None:
    """The op below torch's dispatcher, in the usual cases: on dense CPU tensors of the right types
    (``csrc/plain_call.h``) and on those of a GPU (``_replay.py``). Otherwise None, as for wrapped tensors."""
    if backend is None and x.is_cpu and (native := _native.module()) is not None:
        plain: Tensor | None = native.int4_linear_plain(
            x,
            qweight,
            weight_scale,
            zero_point,
            codebook,
            group_index,
            bias,
            group_size,
            weight_only,
            act_fn,
            packed,
            rotated,
        )
        if plain is not None:
            return plain
    return _calls(
        _run,
        x,
        qweight,
        weight_scale,
        zero_point,
        codebook,
        group_index,
        bias,
        group_size,
        weight_only,
        act_fn,
        packed,
        permutation,
        backend,
        rotated,
    )


def _int4_linear(*arguments: Any) -> Tensor:
    found = direct(*arguments)
    return _run(*arguments) if found is None else found


def _run(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    group_index: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor:
    weights = _check(
        x,
        qweight,
        weight_scale,
        zero_point,
        codebook,
        group_index,
        bias,
        group_size,
        weight_only,
        act_fn,
        packed,
        permutation,
        backend,
        rotated,
    )
    run = registry.select(_OP, x.device.type, backend).run
    result: Tensor = run(x, weights, bias, weight_only, act_fn, packed, permutation, rotated)
    return result


def _run_native(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    permutation: Tensor | None,
    rotated: bool,
) -> Tensor:
    n, k = weights.out_features, weights.in_features
    if packed is None or packed.dtype != torch.uint8:
        packed = pack_int4(weights, weight_only)
    if weights.group_index is not None:
        x = x.index_select(-1, group_order(weights.group_index) if permutation is None else permutation)
    # Names, not temporaries: an address outlives no tensor.
    packed, bias = packed.contiguous(), dense_bias(bias)
    rows, row_stride = kernel_rows(x)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device="cpu")
    dtype = _native.DTYPES[x.dtype]
    _native.load().int4_linear(
        rows.data_ptr(),
        dtype,
        row_stride,
        rows.shape[0],
        k,
        packed.data_ptr(),
        n,
        weights.segment_size,
        weights.zero_point is not None,
        weights.table_scope,
        0 if bias is None else bias.data_ptr(),
        weight_only,
        rotated,
        _native.ACTIVATIONS[act_fn],
        out.data_ptr(),
        dtype,
        torch.get_num_threads(),
    )
    return out


def _run_triton(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    permutation: Tensor | None,
    rotated: bool,
) -> Tensor:
    if weights.group_index is not None:
        order = group_order(weights.group_index) if permutation is None else permutation
        x = x.index_select(-1, order)
        # On CPU tensors, in Triton's interpreter, ``packed`` is for the CPU.
        given = packed is not None and packed.dtype == torch.uint8 and x.is_cuda
        codes = packed if given else _codes_by_group(weights, order)
        assert codes is not None
        weights = replace(weights, qweight=codes, group_index=None)
    rows, _ = kernel_rows(x)
    y: Tensor = _triton.load(_OP).int4_linear(rows, weights, bias, weight_only, act_fn, rotated)
    return y.view(*x.shape[:-1], weights.out_features)


def _run_cuda(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    permutation: Tensor | None,
    rotated: bool,
) -> Tensor:
    """float32 rows that are not quantized, and tables per group, are Triton's: neither is worth a kernel."""
    if weights.table_scope == 2 or (weight_only and x.dtype == torch.float32):
        left: Tensor = _run_left(x, weights, bias, weight_only, act_fn, packed, permutation, rotated)
        return left
    n, k = weights.out_features, weights.in_features
    if weights.group_index is not None:
        x = x.index_select(-1, group_order(weights.group_index) if permutation is None else permutation)
    if packed is None or packed.dtype != torch.int32:
        packed = pack_int4_fragments(weights, weight_only)
    # Names, not temporaries: an address outlives no tensor.
    packed, bias = packed.contiguous(), None if bias is None else bias.contiguous()
    if packed.data_ptr() % 16:
        packed = packed.clone()
    rows, row_stride = kernel_rows(x)
    if row_stride < k:  # rows that lie on each other
        rows, row_stride = rows.contiguous(), k
    m, device = rows.shape[0], x.device
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    zero = weights.zero_point
    form = (
        *(_native.DTYPES[x.dtype], m, n, k, weights.segment_size, weights.group_size == -1),
        0 if zero is None else 1 if zero.dtype == torch.uint8 else 2,
        0 if weights.codebook is None else 4 if weight_only else 1,
        weight_only,
    )
    floats, count = _workspace(x.device, form) if x.is_cuda else _cuda.call(_WORKSPACE, x, *form)
    partial = torch.empty(floats, dtype=torch.float32, device=device) if count else None
    counters = _cuda.counters(x, count) if count else None
    q = x_scale = None
    width = (k + 15) // 16 * 16
    if not weight_only:
        q = torch.empty((m, width), dtype=torch.int8, device=device)
        x_scale = torch.empty(m, dtype=torch.float32, device=device)
    _cuda.call(
        _OP,
        x,
        *form,
        rows.data_ptr(),
        row_stride,
        packed.data_ptr(),
        *((0, 0) if bias is None else (bias.data_ptr(), _native.DTYPES[bias.dtype])),
        rotated,
        _native.ACTIVATIONS[act_fn],
        _address(q),
        width,
        _address(x_scale),
        _address(partial),
        _address(counters),
        out.data_ptr(),
    )
    return out


_WORKSPACE = "int4_linear_workspace"


@lru_cache(maxsize=1024)
def _workspace(device: torch.device, form: tuple[Any, ...]) -> tuple[int, int]:
    """Floats and counters that a launch needs; the same for the same sizes on the same GPU."""
    sizes: tuple[int, int] = _cuda.call(_WORKSPACE, torch.empty(0, device=device), *form)
    return sizes


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run_reference(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    permutation: Tensor | None,
    rotated: bool,
) -> Tensor:
    y = _reference.int4_linear(flat_rows(x), weights, bias, weight_only, act_fn, rotated)
    return y.reshape(*x.shape[:-1], weights.out_features)


_run_left = left_to_triton(_OP, _run_triton, _run_reference)


def _fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weights = _check(x, *args, **kwargs)
    return x.new_empty((*x.shape[:-1], weights.out_features))


_BIAS = 6
"""Place of ``bias`` among the arguments."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weights, bias, group_size, weight_only, act_fn, packed, permutation, backend, rotated = inputs
    ctx.in_features = x.shape[-1]
    ctx.options = (group_size, weight_only)
    ctx.act_fn = act_fn
    ctx.backend = backend
    ctx.rotated = rotated
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The activation's derivative needs the pre-activation, which is recomputed from x.
    ctx.save_for_backward(*weights, *((x, bias, packed, permutation) if act_fn else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, rest = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    if ctx.act_fn:
        x, bias, packed, permutation = rest
        z = torch.ops.lissom.int4_linear.default(
            x, *weights, bias, *ctx.options, None, packed, permutation, ctx.backend, ctx.rotated
        )
        grad = activation_gradient(grad, z, ctx.act_fn)
    gradients: list[Tensor | None] = [None] * 14
    if ctx.needs_input_grad[0]:
        qweight, weight_scale, zero_point, codebook, group_index = weights
        record = Int4Weights(
            qweight,
            weight_scale,
            zero_point,
            codebook,
            group_index,
            in_features=ctx.in_features,
            group_size=ctx.options[0],
        )
        gradients[0] = input_gradient(grad, dequantize_int4(record, grad.dtype), ctx.rotated)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[_BIAS]:
        gradients[_BIAS] = bias_gradient(grad, ctx.bias_dtype)
    return tuple(gradients)


LIBRARY.impl("int4_linear", _int4_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lissom::int4_linear", _fake, lib=LIBRARY)
torch.library.register_autograd("lissom::int4_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _run_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _run_reference),
)


def _cuda_is_faster(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    *_: Any,
) -> bool:
    """On an H200 (bench/results/gpu-nvidia-h200.md): up to 16 rows that stay in 16 bits, 1.01 to 2.0 times
    Triton's speed, where the layer keeps fragments."""
    fragments = packed is not None and packed.dtype == torch.int32
    few = x.numel() <= 16 * weights.in_features
    return weight_only and fragments and few and x.dtype != torch.float32 and weights.group_index is None


register_gpu(_OP, _run_triton, _run_reference, _run_cuda, _cuda_is_faster)
