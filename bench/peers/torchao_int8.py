"""torchao int8 dynamic activations, int8 weights (``quantize_``), eager on CPU. Optional."""

from __future__ import annotations

import logging
import warnings
from importlib import util

from torch import Tensor, nn

from ._base import Precision, Prepared
from .torch_fp32 import linear

__all__ = ["TorchaoInt8"]


class TorchaoInt8:
    name = "torchao int8"
    precision: Precision = "int8"

    def available(self) -> str:
        return "" if util.find_spec("torchao") else "torchao is not installed (pip install torchao)"

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torchao").setLevel(logging.ERROR)
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            model = nn.Sequential(linear(weight, bias))
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return Prepared(model[0], weight_bytes=weight.numel())
