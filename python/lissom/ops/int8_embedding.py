"""``lissom::int8_embedding``: gather rows of an int8 table and dequantize them in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda, _native, _replay, _triton, registry
from ..reference import int8_embedding as _reference
from ._embedding import check_in_range, check_lookup, out_of_range
from ._library import LIBRARY, check_same_device, register_gpu

__all__ = ["int8_embedding"]

_OP = "int8_embedding"

LIBRARY.define(
    "int8_embedding(Tensor indices, Tensor qweight, Tensor weight_scale, ScalarType dtype, "
    "str? backend=None) -> Tensor"
)


def int8_embedding(
    indices: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Look rows up in an int8 table: ``y = weight_scale[i] * qweight[i]``.

    Args:
        indices: int64 or int32, any shape; values in [0, V).
        qweight: int8 ``[V, D]``.
        weight_scale: float32 ``[V]``.
        dtype: float32, bfloat16 or float16 of the result.
        backend: ``"native"`` (CPU), ``"triton"``, ``"cuda"`` (CUDA) or ``"reference"``; None chooses.

    Returns:
        ``[*indices.shape, D]`` of ``dtype``; bit-identical on all backends.

    Raises:
        IndexError: an index out of range (the value is named). On a GPU, which nobody waits for, kernels give
            a row of NaN instead; ``"reference"`` leaves the index to torch there, whose assertion on the
            device makes the GPU unusable for the process.
        TypeError, ValueError: a dtype or shape that cannot be served.
    """
    y: Tensor = torch.ops.lissom.int8_embedding.default(indices, qweight, weight_scale, dtype, backend)
    return y


def _check(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> None:
    check_lookup(_OP, indices, dtype)
    if qweight.dim() != 2 or qweight.dtype != torch.int8:
        raise TypeError(f"{_OP}: qweight must be int8 [V, D], got {qweight.dtype} {tuple(qweight.shape)}")
    if weight_scale.dtype != torch.float32 or weight_scale.shape != qweight.shape[:1]:
        raise ValueError(
            f"{_OP}: weight_scale must be float32 [{qweight.shape[0]}], got {weight_scale.dtype} "
            f"{tuple(weight_scale.shape)}"
        )


_calls = _replay.Calls()


def _int8_embedding(
    indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype, backend: str | None = None
) -> Tensor:
    if backend is None and (native := _native.module()) is not None:
        plain: Tensor | None = native.int8_embedding_plain(indices, qweight, weight_scale, dtype)
        if plain is not None:  # dense CPU tensors of the right types, as nearly always; see csrc/plain_call.h
            return plain
    repeated = _calls(_run, indices, qweight, weight_scale, dtype, backend)
    return _run(indices, qweight, weight_scale, dtype, backend) if repeated is None else repeated


def _run(
    indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype, backend: str | None
) -> Tensor:
    _check(indices, qweight, weight_scale, dtype)
    check_same_device(_OP, indices, qweight=qweight, weight_scale=weight_scale)
    result: Tensor = registry.select(_OP, indices.device.type, backend).run(
        indices, qweight, weight_scale, dtype
    )
    return result


def _run_native(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = qweight.shape
    flat = indices.contiguous()
    # Names, not temporaries: an address outlives no tensor.
    qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
    out = torch.empty((*indices.shape, width), dtype=dtype)
    bad = _native.load().int8_embedding(
        flat.data_ptr(),
        flat.dtype == torch.int64,
        flat.numel(),
        qweight.data_ptr(),
        rows,
        width,
        weight_scale.data_ptr(),
        out.data_ptr(),
        _native.DTYPES[dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise out_of_range(_OP, int(flat.view(-1)[bad]), rows)
    return out


def _run_reference(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    flat = indices.reshape(-1)
    check_in_range(_OP, flat, qweight.shape[0])
    y = _reference.int8_embedding(flat, qweight, weight_scale, dtype)
    return y.reshape(*indices.shape, qweight.shape[1])


def _run_triton(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    flat = indices.reshape(-1)
    check_in_range(_OP, flat, qweight.shape[0])
    y: Tensor = _triton.load(_OP).int8_embedding(flat, qweight, weight_scale, dtype)
    return y.reshape(*indices.shape, qweight.shape[1])


def _run_cuda(indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = qweight.shape
    flat = indices.contiguous()
    check_in_range(_OP, flat.view(-1), rows)
    if qweight.stride(1) != 1 or qweight.stride(0) < width:
        qweight = qweight.contiguous()
    weight_scale = weight_scale.contiguous()
    out = torch.empty((*indices.shape, width), dtype=dtype, device=qweight.device)
    _cuda.call(
        _OP,
        qweight,
        flat.data_ptr(),
        flat.dtype == torch.int64,
        flat.numel(),
        qweight.data_ptr(),
        qweight.stride(0),
        rows,
        width,
        weight_scale.data_ptr(),
        out.data_ptr(),
        _native.DTYPES[dtype],
    )
    return out


def _fake(
    indices: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype, backend: str | None = None
) -> Tensor:
    _check(indices, qweight, weight_scale, dtype)
    check_same_device(_OP, indices, qweight=qweight, weight_scale=weight_scale)
    return qweight.new_empty((*indices.shape, qweight.shape[1]), dtype=dtype)


LIBRARY.impl("int8_embedding", _int8_embedding, "CompositeExplicitAutograd")
torch.library.register_fake("lissom::int8_embedding", _fake, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _run_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _run_reference),
)
register_gpu(_OP, _run_triton, _run_reference, _run_cuda)
