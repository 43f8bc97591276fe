"""``lissom::int8_linear``: y = act(x · Wᵀ + b) with int8 weights. Numbers: ``reference/int8_linear.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _cuda, _native, _replay, _triton, formats, registry
from ..reference import int8_linear as _reference
from ._library import FLOAT_DTYPES, LIBRARY, check_float, check_same_device, register_gpu
from ._linear import (
    activation_gradient,
    bias_gradient,
    check_options,
    dense_bias,
    flat_rows,
    input_gradient,
    kernel_rows,
)

__all__ = ["int8_linear", "int8_pack"]

_OP = "int8_linear"

LIBRARY.define(
    "int8_linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None, "
    "bool weight_only=False, str? act_fn=None, Tensor? packed=None, str? backend=None, "
    "bool rotated=False) -> Tensor"
)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor:
    """Linear layer with int8 weights.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; any strides; any leading dimensions, empty ones too.
        qweight: int8 ``[N, K]`` in the canonical layout, values in [-127, 127].
        weight_scale: float32 ``[N]``.
        bias: ``[N]``, any of the float dtypes, or None.
        input_scale: None quantizes each row of ``x`` by its own absmax; a float32 tensor of one element
            is a static scale (calibrated beforehand) for all rows.
        weight_only: keep ``x`` in floating point and accumulate in float32. On CUDA, products of many rows
            of 16 bits round each weight once to ``x.dtype``.
        act_fn: None, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``, fused.
        packed: ``int8_pack(qweight)``, if already at hand, which ``"native"`` reads; otherwise it packs them
            in the call. The other backends read ``qweight``.
        backend: ``"native"`` (CPU), ``"triton"`` (CUDA) or ``"reference"``; None chooses.
        rotated: ``qweight`` holds ``formats.rotate(weight)``, and ``x`` is rotated likewise before it is
            quantized, which spreads its outliers over blocks of 16.

    Returns:
        ``[..., N]`` of ``x.dtype``. Quantized forms are bit-identical on all backends; rows with NaN or
        infinity come out as NaN. Differentiable with respect to ``x`` and ``bias`` (straight through the
        rounding of ``x``).

    Raises:
        TypeError, ValueError: a dtype, shape or option that cannot be served, with the value and the fix.
    """
    y: Tensor = torch.ops.lissom.int8_linear.default(
        x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, backend, rotated
    )
    return y


def int8_pack(qweight: Tensor) -> Tensor:
    """Packed form of canonical int8 ``[N, K]`` (drawn in ``lissom/formats.py``), on the same device."""
    if qweight.device.type != "cpu" or _native.unavailable_reason():
        return formats.pack_int8(qweight)
    qweight = qweight.contiguous()
    n, k = qweight.shape
    packed = torch.empty(
        formats.packed_int8_shape(n, k), dtype=torch.int8, device="cpu"
    )  # whatever the default
    _native.load().int8_pack(qweight.data_ptr(), n, k, packed.data_ptr())
    return packed


def _check(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    rotated: bool,
) -> None:
    if x.dtype not in FLOAT_DTYPES:
        check_float(_OP, "x", x.dtype)
    if qweight.dim() != 2 or qweight.dtype != torch.int8:
        raise TypeError(
            f"{_OP}: qweight must be int8 with shape [N, K], got {qweight.dtype} {tuple(qweight.shape)}; "
            "make it with lissom.formats.quantize_int8(weight)"
        )
    n, k = qweight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"{_OP}: x has shape {tuple(x.shape)} but qweight is [N={n}, K={k}]; "
            f"the last dimension of x must be {k}"
        )
    if k > formats.INT8_MAX_IN_FEATURES and not weight_only:
        raise ValueError(
            f"{_OP}: K={k} could overflow the int32 sum; at most {formats.INT8_MAX_IN_FEATURES} is exact; "
            "split the layer or use weight_only=True"
        )
    if weight_scale.dtype != torch.float32 or weight_scale.shape != (n,):
        raise ValueError(
            f"{_OP}: weight_scale must be float32 [{n}], got {weight_scale.dtype} {tuple(weight_scale.shape)}"
        )
    check_options(_OP, n, bias, act_fn, weight_only, rotated)
    if input_scale is not None:
        if weight_only:
            raise ValueError(f"{_OP}: input_scale has no meaning with weight_only=True; give one of the two")
        if input_scale.numel() != 1 or input_scale.dtype != torch.float32:
            raise ValueError(
                f"{_OP}: input_scale must be float32 with one element, got {input_scale.dtype} "
                f"{tuple(input_scale.shape)}"
            )
    if packed is not None and (packed.dtype != torch.int8 or packed.shape != formats.packed_int8_shape(n, k)):
        raise ValueError(
            f"{_OP}: packed must be int8 {formats.packed_int8_shape(n, k)} for N={n}, K={k}, got "
            f"{packed.dtype} {tuple(packed.shape)}; make it with lissom.ops.int8_linear.int8_pack(qweight)"
        )


_calls = _replay.Calls()


def direct(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor | None:
    """The op below torch's dispatcher, in the usual cases: on dense CPU tensors of the right types
    (``csrc/plain_call.h``) and on those of a GPU (``_replay.py``). Otherwise None, as for wrapped tensors."""
    if backend is None and x.is_cpu and (native := _native.module()) is not None:
        plain: Tensor | None = native.int8_linear_plain(
            x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, rotated
        )
        if plain is not None:
            return plain
    return _calls(
        _run, x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, backend, rotated
    )


def _int8_linear(*arguments: Any) -> Tensor:
    found = direct(*arguments)
    return _run(*arguments) if found is None else found


def _run(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor:
    _check(x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, rotated)
    check_same_device(
        _OP, x, qweight=qweight, weight_scale=weight_scale, bias=bias, input_scale=input_scale, packed=packed
    )
    run = registry.select(_OP, "cpu" if x.is_cpu else x.device.type, backend).run
    result: Tensor = run(x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, rotated)
    return result


def _run_native(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    rotated: bool,
) -> Tensor:
    n, k = qweight.shape
    if packed is None:
        packed = int8_pack(qweight)
    # Names, not temporaries: an address outlives no tensor.
    packed, weight_scale = packed.contiguous(), weight_scale.contiguous()
    bias = dense_bias(bias)
    rows, row_stride = kernel_rows(x)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    dtype = _native.DTYPES[x.dtype]
    _native.load().int8_linear(
        rows.data_ptr(),
        dtype,
        row_stride,
        rows.shape[0],
        k,
        packed.data_ptr(),
        n,
        weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        2 if weight_only else (0 if input_scale is None else 1),
        0.0 if input_scale is None else input_scale.item(),
        rotated,
        _native.ACTIVATIONS[act_fn],
        out.data_ptr(),
        dtype,
        torch.get_num_threads(),
    )
    return out


def _run_triton(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    rotated: bool,
) -> Tensor:
    rows, _ = kernel_rows(x)
    y: Tensor = _triton.load(_OP).int8_linear(
        rows, qweight, weight_scale, bias, input_scale, weight_only, act_fn, rotated
    )
    return y.view(*x.shape[:-1], qweight.shape[0])


def _run_cuda(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    rotated: bool,
    form: int = -1,
    splits: int = 0,
) -> Tensor:
    """``csrc/cuda/int8_linear.cu``, which serves every form of every argument.

    Args:
        form: one of ``Int8Form`` in ``csrc/cuda/int8_linear.h``; -1 chooses.
        splits: parts of K that tiles are computed in; 0 chooses.
    """
    n, k = qweight.shape
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # Names, not temporaries: an address outlives no tensor.
    rows, row_stride = kernel_rows(x)
    if row_stride < k and rows.shape[0] > 1:  # expanded
        rows, row_stride = rows.contiguous(), k
    if (qweight.stride(1) != 1 and k > 1) or qweight.stride(0) < k:
        qweight = qweight.contiguous()
    weight_scale = weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    args = (
        *(rows.data_ptr(), _native.DTYPES[x.dtype], row_stride, rows.shape[0], k),
        *(qweight.data_ptr(), qweight.stride(0), n, weight_scale.data_ptr()),
        *((0, 0) if bias is None else (bias.data_ptr(), _native.DTYPES[bias.dtype])),
        2 if weight_only else (0 if input_scale is None else 1),
        0 if input_scale is None else input_scale.data_ptr(),
        *(rotated, _native.ACTIVATIONS[act_fn], form, splits),
    )
    if needed := _cuda.call(_OP, x, *args, out.data_ptr(), 0):  # few rows need none, and are done
        workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
        _cuda.call(_OP, x, *args, out.data_ptr(), workspace.data_ptr())
    return out


def _run_reference(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    act_fn: str | None,
    packed: Tensor | None,
    rotated: bool,
) -> Tensor:
    y = _reference.int8_linear(
        flat_rows(x), qweight, weight_scale, bias, input_scale, weight_only, act_fn, rotated
    )
    return y.reshape(*x.shape[:-1], qweight.shape[0])


def _fake(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
    act_fn: str | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
    rotated: bool = False,
) -> Tensor:
    _check(x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, rotated)
    # A CPU x with a layer on the meta device is dispatched here too; x.new_empty would answer with garbage.
    check_same_device(
        _OP, x, qweight=qweight, weight_scale=weight_scale, bias=bias, input_scale=input_scale, packed=packed
    )
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, weight_scale, bias, input_scale, weight_only, act_fn, packed, backend, rotated = inputs
    ctx.options = (input_scale, weight_only, backend)
    ctx.rotated = rotated
    ctx.act_fn = act_fn
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The activation's derivative needs the pre-activation, which is recomputed from x.
    ctx.save_for_backward(qweight, weight_scale, *((x, bias, packed) if act_fn else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, weight_scale, *rest = ctx.saved_tensors
    if ctx.act_fn:
        x, bias, packed = rest
        input_scale, weight_only, backend = ctx.options
        z = torch.ops.lissom.int8_linear.default(
            x, qweight, weight_scale, bias, input_scale, weight_only, None, packed, backend, ctx.rotated
        )
        grad = activation_gradient(grad, z, ctx.act_fn)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = formats.dequantize_int8(qweight, weight_scale, grad.dtype)
        grad_x = input_gradient(grad, weight, ctx.rotated)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None, None, None


LIBRARY.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lissom::int8_linear", _fake, lib=LIBRARY)
torch.library.register_autograd("lissom::int8_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _run_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _run_reference),
)


TILES_THAT_FILL = 105
"""Four fifths of a Hopper GPU's 132 multiprocessors."""


def _cuda_is_faster(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_only: bool,
    *_: Any,
) -> bool:
    """Where its tiles of 256 x 256 of the output, on two multiprocessors each, fill the GPU: on an H200 1.10
    to 1.5 times Triton's speed (bench/results/gpu-nvidia-h200.md); with half as many, or of 128 rows, 0.75 to
    0.85.
    """
    n, k = qweight.shape
    m = x.numel() // k if k else 0
    many = m > 192 and 2 * -(-m // 256) * -(-n // 256) >= TILES_THAT_FILL
    aligned = (k | qweight.stride(0) | qweight.data_ptr()) % 16 == 0 and qweight.stride(1) == 1
    return many and aligned and not weight_only


register_gpu(_OP, _run_triton, _run_reference, _run_cuda, _cuda_is_faster)
