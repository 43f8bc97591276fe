"""Drop-in layers: state and one op call; and the losses that a student is trained with."""

from .distill import DistillationLoss, HiddenStateLoss, LinearDistillationLoss
from .fused import FusedActivation
from .int4 import Int4Embedding, Int4Linear
from .int8 import Int8Embedding, Int8Linear
from .sparse import SparseLinear

__all__ = [
    "DistillationLoss",
    "FusedActivation",
    "HiddenStateLoss",
    "Int4Embedding",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "LinearDistillationLoss",
    "SparseLinear",
]
