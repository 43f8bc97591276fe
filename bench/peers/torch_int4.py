"""torch ``_weight_int4pack_mm_for_cpu``: what torchao's 4-bit weight-only layers call on a CPU.

bfloat16 in and out, which is its natural form: the input is handed over in bfloat16 and the result stays so
(with float32 it falls back to a scalar loop). It has no bias, so the call adds it, as a layer would.
Weights with a scale and an offset per group, both bfloat16, rounded to nearest between the group's extremes.
K must be a multiple of the group size and N of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import Precision, Prepared, Unfit, exact_linear

__all__ = ["TorchInt4"]


class TorchInt4:
    precision: Precision = "weight-only int4"

    def __init__(self, group_size: int = 128) -> None:
        self.group_size = group_size
        self.name = f"torch int4 bf16 g{group_size}"

    def available(self) -> str:
        needed = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
        missing = [name for name in needed if not hasattr(torch, name)]
        return f"this torch has no {missing[0]}" if missing else ""

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        n, k = weight.shape
        if k % self.group_size or n % 16:
            raise Unfit(f"K={k} must be a multiple of {self.group_size} and N={n} of 16")
        codes, scale, offset = self._quantize(weight)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 1)
        scale_and_offset = torch.stack([scale.t(), offset.t()], -1).contiguous()  # [groups, n, 2]
        low_bias = bias.bfloat16()

        def run(x: Tensor) -> Tensor:
            y: Tensor = torch._weight_int4pack_mm_for_cpu(x, packed, self.group_size, scale_and_offset)
            return y.add_(low_bias)

        def dequantized() -> Tensor:
            return torch.addcmul(offset.float()[..., None], codes - 8.0, scale.float()[..., None]).flatten(1)

        return Prepared(
            run,
            packed.nbytes + scale_and_offset.nbytes,
            feed=Tensor.bfloat16,
            result=Tensor.float,
            exact=exact_linear(dequantized, bias),
            element_bytes=2,
        )

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int32 ``[n, groups, group_size]``; scale and offset bfloat16 ``[n, groups]``.

        The value of a code is ``(code - 8) * scale + offset``.
        """
        groups = weight.unflatten(1, (-1, self.group_size))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp_min(1e-12).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        codes = (groups - offset.float()[..., None]) / scale.float()[..., None] + 8
        return codes.round().clamp(0, 15).int(), scale, offset
