"""One ``torch.library`` op per file: schema, checks, fake, autograd, one implementation per backend."""

from .block_sparse_linear import block_sparse_grad_input, block_sparse_grad_values, block_sparse_linear
from .distill_loss import distill_loss
from .int4_embedding import int4_embedding
from .int4_linear import int4_linear
from .int8_embedding import int8_embedding
from .int8_linear import int8_linear
from .linear_distill_loss import linear_distill_loss

__all__ = [
    "block_sparse_grad_input",
    "block_sparse_grad_values",
    "block_sparse_linear",
    "distill_loss",
    "int4_embedding",
    "int4_linear",
    "int8_embedding",
    "int8_linear",
    "linear_distill_loss",
]
