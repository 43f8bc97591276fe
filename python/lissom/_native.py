"""Loads the native CPU extension; a missing or broken one raises on use, never on import.

The extension links no torch. It shares torch's OpenMP runtime (``libgomp.so.1``), which is why torch is
imported first.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

__all__ = ["isa", "isas", "load", "unavailable_reason"]

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``lissom::DType`` in ``csrc/common/formats.h``."""

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Codes of ``lissom::Activation`` in ``csrc/common/formats.h``."""


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("lissom._C")
    except ImportError as error:
        return None, f"the extension lissom._C could not be imported ({error}); reinstall with 'pip install .'"
    try:
        module.select_isa(os.environ.get("LISSOM_FORCE_ISA", ""))
    except ValueError as error:
        raise RuntimeError(f"LISSOM_FORCE_ISA: {error}") from None
    return module, ""


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it cannot be used, or ``LISSOM_FORCE_ISA`` names what this CPU lacks.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"lissom: native kernels are unavailable: {reason}")
    return module


def unavailable_reason() -> str:
    """Why there are no native kernels, or ``""``.

    Raises:
        RuntimeError: ``LISSOM_FORCE_ISA`` names what this CPU lacks: what the user forced must run or fail,
            never give way to another backend.
    """
    return _load()[1]


def isa() -> str:
    """Name of the instruction set in use: ``scalar``, ``avx2`` or ``avx512vnni``."""
    return str(load().active_isa())


def isas() -> dict[str, bool]:
    """Every instruction set that was built, best first, and whether this CPU runs it."""
    return dict(load().isas())
