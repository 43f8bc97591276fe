"""Drop-in layers: state and one op call."""

from .fused import FusedActivation
from .int4 import Int4Embedding, Int4Linear
from .int8 import Int8Embedding, Int8Linear
from .sparse import SparseLinear

__all__ = ["FusedActivation", "Int4Embedding", "Int4Linear", "Int8Embedding", "Int8Linear", "SparseLinear"]
