"""lissom ``Int4Linear``: the whole layer call, float in, float out, as for ``nn.Linear``."""

from __future__ import annotations

from torch import Tensor

import lissom

from ._base import Precision, Prepared, exact_linear
from .torch_fp32 import linear

__all__ = ["LissomInt4"]


class LissomInt4:
    """One form of the layer; ``suffix`` names it behind ``lissom int4``.

    The weights are chosen once per weight tensor and kept until the next, because that takes longer than
    timing them.
    """

    precision: Precision

    def __init__(self, suffix: str, config: lissom.Int4) -> None:
        self.name = f"lissom int4 {suffix}".strip()
        self.config = config
        self.precision = "weight-only int4" if config.activation is None else "int4"
        self._made: tuple[Tensor, Tensor, lissom.nn.Int4Linear] | None = None

    def available(self) -> str:
        return ""

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        if self._made is None or self._made[0] is not weight or self._made[1] is not bias:
            layer = lissom.nn.Int4Linear.from_linear(linear(weight, bias), self.config)
            self._made = weight, bias, layer
        layer = self._made[2]
        return Prepared(
            layer, weight_bytes=layer._packed.nbytes, exact=exact_linear(lambda: layer.weight, bias)
        )
