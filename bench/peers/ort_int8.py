"""ONNX Runtime ``DynamicQuantizeMatMul`` (com.microsoft).

Weights int8 per output channel, symmetric; activations per tensor, unsigned 8 bits, quantized in the same
call; bias fused. On AVX2 without VNNI the kernel's 16-bit pair sums saturate: look at its SQNR there.
"""

from __future__ import annotations

from torch import Tensor

from . import _ort
from ._base import Precision, Prepared

__all__ = ["OrtInt8"]


class OrtInt8:
    name = "ONNX Runtime int8"
    precision: Precision = "int8"

    def available(self) -> str:
        return _ort.unavailable_reason()

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        import numpy as np
        from onnx import helper

        n, k = weight.shape
        w = weight.numpy()
        scale = np.abs(w).max(axis=1) / 127.0
        quantized = np.rint(w / np.where(scale > 0, scale, 1.0)[:, None]).astype(np.int8)
        inputs = ["x", "w", "w_scale", "", "b"]  # no zero point: symmetric
        node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
        initializers = {"w": quantized.T, "w_scale": scale.astype(np.float32), "b": bias.numpy()}
        return _ort.prepare([node], initializers, k, n, threads, weight.numel())
