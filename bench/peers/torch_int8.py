"""torch dynamic int8 (``torch.ao.quantization.quantize_dynamic``, ``x86`` engine).

Weights per tensor, activations per tensor in 7 bits (``reduce_range``): torch's own default.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Precision, Prepared
from .torch_fp32 import linear

__all__ = ["TorchInt8", "quantize_dynamic"]


def quantize_dynamic(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every ``nn.Linear`` turned into torch's dynamic int8 layer."""
    torch.backends.quantized.engine = "x86"
    with (
        warnings.catch_warnings()
    ):  # torch.ao is deprecated in favour of torchao; it is still what users have
        warnings.simplefilter("ignore")
        convert: Any = torch.ao.quantization.quantize_dynamic
        converted: nn.Module = convert(model, {nn.Linear}, dtype=torch.qint8)
    return converted


class TorchInt8:
    name = "torch dynamic int8"
    precision: Precision = "int8"

    def available(self) -> str:
        engines = torch.backends.quantized.supported_engines
        return (
            ""
            if "x86" in engines
            else f"torch was built without the x86 engine (it has {', '.join(engines)})"
        )

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        layer = quantize_dynamic(nn.Sequential(linear(weight, bias)))[0]  # type: ignore[index]
        return Prepared(layer, weight_bytes=weight.numel())
