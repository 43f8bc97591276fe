"""torch's own sparse layouts on a CPU (MKL): CSR and BSR weights, float32.

``torch.addmm`` with the sparse weight on the left and int32 indices, which is the quickest of the ways (at
1024×4096, 90 %, M=32: 0.45 ms; ``F.linear`` with the same weight 3.2 ms, and it refuses to run in
``inference_mode``). The result is the transpose of a contiguous tensor and stays so. Only square blocks:
"MKL Sparse doesn't support matrices with non-square blocks".
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import lissom
from lissom.sparse_curve import random_block_sparse

from ._base import Precision, Prepared, Unfit, exact_linear

__all__ = ["TorchSparse"]


class TorchSparse:
    """CSR, or BSR where ``block_shape`` is given; the weights of lissom's side with the same blocks.

    ``blocks_of_csr`` are the blocks in which the weights of CSR were pruned.
    """

    precision: Precision = "fp32"

    def __init__(
        self,
        sparsity: float,
        block_shape: tuple[int, int] | None = None,
        *,
        blocks_of_csr: tuple[int, int] = (8, 1),
    ) -> None:
        self.name = "torch CSR" if block_shape is None else f"torch BSR {block_shape[0]}x{block_shape[1]}"
        self.sparsity, self.bsr = sparsity, block_shape is not None
        self.block_shape = block_shape or blocks_of_csr

    def available(self) -> str:
        if not torch.backends.mkl.is_available():
            return "torch was built without MKL, which its sparse products on a CPU need"
        height, width = self.block_shape
        if self.bsr and height != width:
            return "MKL Sparse takes square blocks only"
        return ""

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        n, k = weight.shape
        height, width = self.block_shape
        if self.bsr and (n % height or k % width):
            raise Unfit(f"N={n} must be a multiple of {height} and K={k} of {width}")
        kept = random_block_sparse(weight, self.block_shape, self.sparsity)
        dense = lissom.formats.block_sparse_to_dense(kept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
            w = dense.to_sparse_bsr(self.block_shape) if self.bsr else dense.to_sparse_csr()
            make = torch.sparse_bsr_tensor if self.bsr else torch.sparse_csr_tensor
            w = make(w.crow_indices().int(), w.col_indices().int(), w.values(), w.shape)
        column = bias[:, None]

        def run(x: Tensor) -> Tensor:
            return torch.addmm(column, w, x.t()).t()

        held = w.values().nbytes + w.crow_indices().nbytes + w.col_indices().nbytes
        exact = exact_linear(lambda: lissom.formats.block_sparse_to_dense(kept), bias)
        return Prepared(run, weight_bytes=held, exact=exact)
