"""Rows of stored blocks cut into pieces of bounded length, which the CUDA kernels go over.

``csrc/cuda/block_sparse_linear.h`` (``BlockSparsePiece``) is the other owner of the records.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._derived import Derived

__all__ = ["PIECE", "Pieces", "cut", "slots"]

PIECE = ("line", "begin", "end", "part", "parts", "slot", "unused", "unused")
"""Fields of a record, int32."""


class Pieces(Derived):
    """The pieces of one row index, by their greatest length."""

    def cut(self, crow: Tensor, blocks: int, most: int) -> Tensor:
        """:func:`cut`, kept."""
        (pieces,) = self.part(most, lambda crow: (cut(crow, blocks, most),), crow)
        return pieces


def slots(blocks: int, most: int) -> int:
    """Partial sums that pieces of at most ``most`` blocks can need: those of rows that are cut."""
    return 2 * (blocks // most)


def cut(crow: Tensor, blocks: int, most: int) -> Tensor:
    """Every row of blocks in equal pieces of at most ``most``, longest first; one for a row without blocks.

    Args:
        crow: int32 ``[lines + 1]``, at least one line.
        blocks: how many there are: ``crow[-1]``, which would have to be waited for.
        most: at least 1.

    Returns:
        int32 ``[pieces, 8]``, see :data:`PIECE`. There are as many pieces as there can be; the line of those
        that are not is -1.
    """
    lines = len(crow) - 1
    counts = crow.diff().long()
    parts = ((counts + (most - 1)) // most).clamp(min=1)
    ends = parts.cumsum(0)
    begins = ends - parts
    saved = torch.where(parts > 1, parts, 0)
    first_slots = saved.cumsum(0) - saved
    numbers = torch.arange(lines + blocks // most, device=crow.device)
    line = torch.searchsorted(ends, numbers, right=True)
    there = line < lines
    line = line.clamp(max=lines - 1)
    part, of = numbers - begins[line], parts[line]
    begin = crow[line] + part * counts[line] // of
    end = crow[line] + (part + 1) * counts[line] // of
    unused = torch.zeros_like(line)
    fields = (torch.where(there, line, -1), begin, end, part, of, first_slots[line], unused, unused)
    order = torch.argsort(torch.where(there, end - begin, -1), descending=True, stable=True)
    return torch.stack(fields, 1)[order].to(torch.int32)
