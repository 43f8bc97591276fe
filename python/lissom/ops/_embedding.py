"""What the embedding ops share: checks of indices."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import FLOAT_DTYPES

__all__ = ["check_in_range", "check_lookup", "out_of_range"]


def check_lookup(op: str, indices: Tensor, dtype: torch.dtype) -> None:
    """TypeError unless ``indices`` are integers that index and ``dtype`` is one that every op gives."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices have dtype {indices.dtype}; use torch.int64 or torch.int32")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype={dtype}; use torch.float32, torch.bfloat16 or torch.float16")


def out_of_range(op: str, index: int, rows: int) -> IndexError:
    """The error for an index that is no row of a table of ``rows`` rows."""
    fix = f"use 0 to {rows - 1}" if rows else "the table is empty"
    return IndexError(f"{op}: index {index} is out of range for a table of {rows} rows; {fix}")


def check_in_range(op: str, flat: Tensor, rows: int) -> None:
    """Raise :func:`out_of_range` for the first index that is; elsewhere than on the CPU torch finds out."""
    if flat.device.type == "cpu":
        bad = (flat < 0) | (flat >= rows)
        if bool(bad.any()):
            raise out_of_range(op, int(flat[bad][0]), rows)
