"""torch ``nn.Linear`` in float32 (MKL or oneDNN): what everyone starts from."""

from __future__ import annotations

from torch import Tensor, nn

from ._base import Precision, Prepared

__all__ = ["TorchFp32", "linear"]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """An ``nn.Linear`` around the given tensors (not copied)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()


class TorchFp32:
    name = "torch fp32"
    precision: Precision = "fp32"

    def available(self) -> str:
        return ""

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        return Prepared(linear(weight, bias), weight_bytes=weight.nbytes)
