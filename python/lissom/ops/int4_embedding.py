"""``lissom::int4_embedding``: gather rows of a 4-bit table and dequantize them in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, _replay, _triton, registry
from ..formats import Int4Weights, check_int4_shapes
from ..reference import int4_embedding as _reference
from ._embedding import check_in_range, check_lookup, out_of_range
from ._library import LIBRARY, check_same_device, register_gpu

__all__ = ["int4_embedding"]

_OP = "int4_embedding"

LIBRARY.define(
    "int4_embedding(Tensor indices, Tensor qweight, Tensor weight_scale, Tensor? zero_point, "
    "int embedding_dim, int group_size, ScalarType dtype, str? backend=None) -> Tensor"
)


def int4_embedding(
    indices: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    *,
    embedding_dim: int,
    zero_point: Tensor | None = None,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Look rows up in a 4-bit table: ``y = (q - zero_point) * weight_scale`` of row ``i``, group by group.

    Args:
        indices: int64 or int32, any shape; values in [0, V).
        qweight, weight_scale, zero_point, group_size: the table ``[V, D]`` as
            :class:`lissom.formats.Int4Weights` describes it; uniform, groups along D.
        embedding_dim: D.
        dtype: float32, bfloat16 or float16 of the result.
        backend: ``"native"`` (CPU), ``"triton"`` (CUDA) or ``"reference"``; None chooses.

    Returns:
        ``[*indices.shape, D]`` of ``dtype``; bit-identical on all backends.

    Raises:
        IndexError: an index out of range (the value is named). On a GPU, which nobody waits for, kernels give
            a row of NaN instead; ``"reference"`` leaves the index to torch there, whose assertion on the
            device makes the GPU unusable for the process.
        TypeError, ValueError: a dtype or shape that cannot be served.
    """
    y: Tensor = torch.ops.lissom.int4_embedding.default(
        indices, qweight, weight_scale, zero_point, embedding_dim, group_size, dtype, backend
    )
    return y


def _check(
    indices: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
) -> Int4Weights:
    """The table as one record; raises unless everything fits together."""
    check_lookup(_OP, indices, dtype)
    table = Int4Weights(qweight, weight_scale, zero_point, in_features=embedding_dim, group_size=group_size)
    check_int4_shapes(table, _OP)
    check_same_device(_OP, indices, qweight=qweight, weight_scale=weight_scale, zero_point=zero_point)
    return table


_calls = _replay.Calls()


def _int4_embedding(*arguments: Any) -> Tensor:
    repeated = _calls(_run, *arguments)
    return _run(*arguments) if repeated is None else repeated


def _run(
    indices: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    table = _check(indices, qweight, weight_scale, zero_point, embedding_dim, group_size, dtype)
    result: Tensor = registry.select(_OP, indices.device.type, backend).run(indices, table, dtype)
    return result


def _run_native(indices: Tensor, table: Int4Weights, dtype: torch.dtype) -> Tensor:
    rows, width = table.out_features, table.in_features
    # Names, not temporaries: an address outlives no tensor.
    flat, qweight, scale = indices.contiguous(), table.qweight.contiguous(), table.weight_scale.contiguous()
    zero_point = None if table.zero_point is None else table.zero_point.contiguous()
    out = torch.empty((*indices.shape, width), dtype=dtype, device="cpu")
    bad = _native.load().int4_embedding(
        flat.data_ptr(),
        flat.dtype == torch.int64,
        flat.numel(),
        qweight.data_ptr(),
        rows,
        width,
        table.group_size,
        scale.data_ptr(),
        _native.DTYPES[scale.dtype],
        0 if zero_point is None else zero_point.data_ptr(),
        -1 if zero_point is None else _ZERO_TYPES[zero_point.dtype],
        out.data_ptr(),
        _native.DTYPES[dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise out_of_range(_OP, int(flat.view(-1)[bad]), rows)
    return out


_ZERO_TYPES = {**_native.DTYPES, torch.uint8: 3}
"""How the kernel is told the type of zero-points."""


def _run_reference(indices: Tensor, table: Int4Weights, dtype: torch.dtype) -> Tensor:
    flat = indices.reshape(-1)
    check_in_range(_OP, flat, table.out_features)
    return _reference.int4_embedding(flat, table, dtype).reshape(*indices.shape, table.in_features)


def _run_triton(indices: Tensor, table: Int4Weights, dtype: torch.dtype) -> Tensor:
    flat = indices.reshape(-1)
    check_in_range(_OP, flat, table.out_features)
    y: Tensor = _triton.load(_OP).int4_embedding(flat, table, dtype)
    return y.view(*indices.shape, table.in_features)


def _fake(
    indices: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    _check(indices, qweight, weight_scale, zero_point, embedding_dim, group_size, dtype)
    return qweight.new_empty((*indices.shape, embedding_dim), dtype=dtype)


LIBRARY.impl("int4_embedding", _int4_embedding, "CompositeExplicitAutograd")
torch.library.register_fake("lissom::int4_embedding", _fake, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _run_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _run_reference),
)
register_gpu(_OP, _run_triton, _run_reference)
