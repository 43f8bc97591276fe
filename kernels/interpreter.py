"""Triton's interpreter, mended where it computes other bits than a GPU. For tests only.

In Triton 3.6 its fused multiply-add rounds twice, float32 to bfloat16 is cut off, or rounded half up without
a carry into the exponent, and a product of bfloat16 tiles multiplies their bits as integers. With NumPy 2.4 a
loop over a range that is only known at run time fails.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend"]


def _fma(x: Any, y: Any, z: Any) -> Any:
    """float32 with one rounding: see ``reference/numerics.fma``."""
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)
        addend = z.astype(np.float64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = np.atleast_1d(total).view(np.int64)
        inexact = (
            np.isfinite(total) & np.isfinite(error) & (error != 0) & ((bits & 1) == 0).reshape(total.shape)
        )
        toward = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def _to_bfloat16(x: Any) -> Any:
    bits = np.atleast_1d(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    nan = (bits >> 16) | 0x40
    return np.where(np.isnan(np.atleast_1d(x)), nan, rounded).astype(np.uint16).reshape(x.shape)


def _from_bfloat16(x: Any) -> Any:
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.uint32)


@functools.cache
def mend() -> None:
    """Patch Triton's interpreter in this process."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot = builder.create_dot

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        assert x.data.dtype == y.data.dtype == z.data.dtype == np.float32, (
            "only float32 is fused in our kernels"
        )
        return interpreter.TensorHandle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _from_bfloat16(data)
        return convert(data, source, target, rounding)

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return interpreter.TensorHandle(_from_bfloat16(tile.data).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # the scope, if any, restores it

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_fma = create_fma
    builder.create_dot = create_dot
    interpreter._convert_float = convert_float
