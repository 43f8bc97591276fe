"""One ``torch.library`` op per file: schema, checks, fake, autograd, one implementation per backend."""

from .int8_embedding import int8_embedding
from .int8_linear import int8_linear

__all__ = ["int8_embedding", "int8_linear"]
