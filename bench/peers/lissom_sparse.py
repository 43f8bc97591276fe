"""lissom ``SparseLinear`` with random blocks: the whole layer call, float in, float out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import lissom
from lissom.sparse_curve import random_block_sparse

from ._base import Precision, Prepared, exact_linear

__all__ = ["LissomSparse"]

Values = Literal["float32", "bfloat16", "int8"]
_PRECISIONS: dict[Values, Precision] = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}


class LissomSparse:
    """``block_shape`` (outputs, inputs) and type of the stored values.

    The blocks are chosen at random from a dense weight and kept until another weight comes.
    """

    def __init__(self, block_shape: tuple[int, int], sparsity: float, dtype: Values = "float32") -> None:
        self.block_shape, self.sparsity, self.dtype = block_shape, sparsity, dtype
        self.precision = _PRECISIONS[dtype]
        self.name = f"lissom {self.precision} {block_shape[0]}x{block_shape[1]}"
        self._made: tuple[Tensor, Tensor, lissom.nn.SparseLinear] | None = None

    def available(self) -> str:
        return ""

    def layer(self, weight: Tensor, bias: Tensor) -> lissom.nn.SparseLinear:
        """The pruned layer of a dense one."""
        if self._made is None or self._made[0] is not weight or self._made[1] is not bias:
            kept = random_block_sparse(weight, self.block_shape, self.sparsity, self.dtype)
            layer = lissom.nn.SparseLinear.from_weights(kept, bias).requires_grad_(False).eval()
            self._made = weight, bias, layer
        return self._made[2]

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        layer = self.layer(weight, bias)
        exact = exact_linear(lambda: layer.to_dense().float(), bias)
        return Prepared(layer, weight_bytes=held_bytes(layer), exact=exact)


def held_bytes(layer: lissom.nn.SparseLinear) -> int:
    """Bytes of everything that the layer holds but its bias: values, indices, scales, packed copies."""
    tensors = [*layer.parameters(), *layer.buffers()]
    tensors += [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    different = {(t.data_ptr(), t.nbytes) for t in tensors if t is not layer.bias and t.nbytes}
    return sum(size for _, size in different)
