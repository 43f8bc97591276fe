"""ONNX Runtime in float32 (``Gemm``, MLAS): the honest dense baseline."""

from __future__ import annotations

from torch import Tensor

from . import _ort
from ._base import Precision, Prepared

__all__ = ["OrtFp32"]


class OrtFp32:
    name = "ONNX Runtime fp32"
    precision: Precision = "fp32"

    def available(self) -> str:
        return _ort.unavailable_reason()

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        from onnx import helper

        n, k = weight.shape
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])  # W as [K, N]: MLAS packs it once
        initializers = {"w": weight.t().numpy(), "b": bias.numpy()}
        return _ort.prepare([node], initializers, k, n, threads, weight.nbytes)
