"""Drop-in layers: state and one op call."""

from .int8 import Int8Embedding, Int8Linear

__all__ = ["Int8Embedding", "Int8Linear"]
