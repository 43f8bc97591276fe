"""One ``torch.library`` op per file: schema, checks, fake, autograd, one implementation per backend."""

from .int4_embedding import int4_embedding
from .int4_linear import int4_linear
from .int8_embedding import int8_embedding
from .int8_linear import int8_linear

__all__ = ["int4_embedding", "int4_linear", "int8_embedding", "int8_linear"]
