"""What users would pick instead, one file per peer, and lissom itself behind the same small interface.

A peer has a ``name``, a ``precision``, ``available()`` (a reason, or ``""``) and
``prepare(weight, bias, m, threads)``, which returns a :class:`Prepared` call. To add one: write the file
and name its class in :func:`linear_peers`, :func:`linear_peers_int4` or :func:`block_sparse_peers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import lissom

from ._base import Peer, Precision, Prepared, Unfit
from .lissom_int4 import LissomInt4
from .lissom_int8 import LissomInt8
from .lissom_sparse import LissomSparse
from .ort_fp32 import OrtFp32
from .ort_int4 import OrtInt4
from .ort_int8 import OrtInt8
from .torch_fp32 import TorchFp32
from .torch_int4 import TorchInt4
from .torch_int8 import TorchInt8
from .torch_sparse import TorchSparse
from .torchao_int8 import TorchaoInt8

__all__ = [
    "Peer",
    "Precision",
    "Prepared",
    "Unfit",
    "block_sparse_forms",
    "block_sparse_peers",
    "dense_peers",
    "linear_peers",
    "linear_peers_int4",
    "lissom_forms",
    "lissom_forms_int4",
]


def lissom_forms() -> list[Peer]:
    """lissom's own sides in int8: the headline form (dynamic) first."""
    return [LissomInt8("dynamic"), LissomInt8("static"), LissomInt8(None)]


def linear_peers() -> list[Peer]:
    """Every peer of the int8 linear layer, available here or not; dense fp32 baselines first."""
    return [TorchFp32(), OrtFp32(), TorchInt8(), OrtInt8(), TorchaoInt8()]


def lissom_forms_int4() -> list[Peer]:
    """lissom's own sides in int4: the headline form (groups of 128, zero-points) first.

    Rounded to nearest: how weights are chosen does not change what a call costs.
    """
    forms = {
        "": lissom.Int4(method="rtn"),
        "g32": lissom.Int4(group_size=32, method="rtn"),
        "symmetric": lissom.Int4(symmetric=True, method="rtn"),
        "nf4": lissom.Int4(codebook="nf4"),
        "k-means": lissom.Int4(codebook="kmeans"),
        "float": lissom.Int4(activation=None, method="rtn"),
    }
    return [LissomInt4(suffix, config) for suffix, config in forms.items()]


def linear_peers_int4() -> list[Peer]:
    """Every peer of the int4 linear layer, with lissom's own int8; dense fp32 baselines first."""
    int4 = [OrtInt4(128), OrtInt4(32), TorchInt4(128), TorchInt4(32)]
    return [TorchFp32(), OrtFp32(), LissomInt8("dynamic"), OrtInt8(), *int4]


def block_sparse_forms(
    sparsity: float, blocks: Sequence[tuple[int, int]], int8_blocks: Sequence[tuple[int, int]]
) -> list[Peer]:
    """lissom's own block-sparse sides: float32 and int8 in several blocks, bfloat16 in the first."""
    return [
        *(LissomSparse(block, sparsity) for block in blocks),
        *(LissomSparse(block, sparsity, "bfloat16") for block in blocks[:1]),
        *(LissomSparse(block, sparsity, "int8") for block in int8_blocks),
    ]


def block_sparse_peers(sparsity: float) -> list[Peer]:
    """torch's sparse layouts; of the square blocks that BSR can take the quickest here."""
    return [TorchSparse(sparsity), TorchSparse(sparsity, (4, 4))]


def dense_peers() -> list[Peer]:
    """What a sparse layer has to beat: dense float32, and lissom's own int8."""
    return [TorchFp32(), OrtFp32(), LissomInt8("dynamic")]
