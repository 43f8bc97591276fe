"""What users would pick instead, one file per peer, and lissom itself behind the same small interface.

A peer has a ``name``, a ``precision``, ``available()`` (a reason, or ``""``) and
``prepare(weight, bias, m, threads)``, which returns a :class:`Prepared` call. To add one: write the file
and name its class in :func:`linear_peers`.
"""

from __future__ import annotations

from ._base import Peer, Prepared
from .lissom_int8 import LissomInt8
from .ort_fp32 import OrtFp32
from .ort_int8 import OrtInt8
from .torch_fp32 import TorchFp32
from .torch_int8 import TorchInt8
from .torchao_int8 import TorchaoInt8

__all__ = ["Peer", "Prepared", "linear_peers", "lissom_forms"]


def lissom_forms() -> list[Peer]:
    """lissom's own sides: the headline form (dynamic) first."""
    return [LissomInt8("dynamic"), LissomInt8("static"), LissomInt8(None)]


def linear_peers() -> list[Peer]:
    """Every peer of the linear layers, available here or not; dense fp32 baselines first."""
    return [TorchFp32(), OrtFp32(), TorchInt8(), OrtInt8(), TorchaoInt8()]
