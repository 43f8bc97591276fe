"""lissom ``Int8Linear``: the whole layer call, float in, float out, as for ``nn.Linear``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import lissom

from ._base import Precision, Prepared
from .torch_fp32 import linear

__all__ = ["LissomInt8"]

_NAMES = {"dynamic": "lissom int8", "static": "lissom int8 static", None: "lissom int8 weight-only"}


class LissomInt8:
    """``activation`` as in :class:`lissom.Int8`; the static scale comes from standard-normal data."""

    precision: Precision

    def __init__(self, activation: Literal["dynamic", "static"] | None = "dynamic") -> None:
        self.activation: Literal["dynamic", "static"] | None = activation
        self.name = _NAMES[activation]
        self.precision = "weight-only int8" if activation is None else "int8"

    def available(self) -> str:
        return ""

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        scale = None
        if self.activation == "static":
            sample = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
            scale = float(sample.abs().max()) / 127
        config = lissom.Int8(activation=self.activation)
        layer = lissom.nn.Int8Linear.from_linear(linear(weight, bias), config, input_scale=scale)
        return Prepared(layer, weight_bytes=weight.numel())
