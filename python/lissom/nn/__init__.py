"""Drop-in layers: state and one op call."""

from .fused import FusedActivation
from .int8 import Int8Embedding, Int8Linear

__all__ = ["FusedActivation", "Int8Embedding", "Int8Linear"]
