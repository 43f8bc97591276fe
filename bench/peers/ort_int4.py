"""ONNX Runtime ``MatMulNBits`` (com.microsoft): 4-bit weights in blocks along K, ``accuracy_level`` 4.

Level 4 quantizes the activations to int8 (per block) inside the call; float32 in and out. Weights symmetric,
rounded to nearest with the scale that puts a block's largest value on the code 0, as ONNX Runtime's own
quantizer does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _ort
from ._base import Precision, Prepared, exact_linear

__all__ = ["OrtInt4"]


class OrtInt4:
    precision: Precision = "int4"

    def __init__(self, block_size: int = 128) -> None:
        self.block_size = block_size
        self.name = f"ONNX Runtime int4 g{block_size}"

    def available(self) -> str:
        return _ort.unavailable_reason()

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        from onnx import helper

        n, k = weight.shape
        codes, scale = self._quantize(weight)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4  # [n, blocks, block_size / 2]
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "w_scale", "", "", "b"],  # no zero-points (8), no group index
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=self.block_size,
            accuracy_level=4,
        )
        initializers = {"w": packed.numpy(), "w_scale": scale.flatten().numpy(), "b": bias.numpy()}
        prepared = _ort.prepare([node], initializers, k, n, threads, packed.nbytes + scale.nbytes)
        prepared.exact = exact_linear(
            lambda: ((codes.float() - 8) * scale[..., None]).flatten(1)[:, :k], bias
        )
        return prepared

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 ``[n, blocks, block_size]`` (K padded with zeros) and scales ``[n, blocks]``."""
        n, k = weight.shape
        blocks = pad(weight, (0, -k % self.block_size)).view(n, -1, self.block_size)
        largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
        scale = largest / -8
        codes = torch.where(scale == 0, 8.0, blocks / scale + 8).round().clamp(0, 15)
        return codes.to(torch.uint8), scale[..., 0].contiguous()
