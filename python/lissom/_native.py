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

__all__ = ["extension", "isa", "isas", "load", "module", "unavailable_reason"]

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``lissom::DType`` in ``csrc/common/formats.h``."""

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Codes of ``lissom::Activation`` in ``csrc/common/formats.h``."""


@cache
def _extension() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("lissom._C")
    except ImportError as error:
        fix = "reinstall with 'pip install .'"
        return None, f"the extension lissom._C could not be imported ({error}); {fix}"
    module.bind_torch(torch)
    return module, ""


@cache
def _load() -> tuple[ModuleType | None, str]:
    module, reason = _extension()
    if module is None:
        return None, reason
    try:
        module.select_isa(os.environ.get("LISSOM_FORCE_ISA", ""))
    except ValueError as error:
        raise RuntimeError(f"LISSOM_FORCE_ISA: {error}") from None
    return module, ""


def extension() -> ModuleType | None:
    """The extension module for what is no kernel, or None."""
    return _extension()[0]


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it cannot be used, or ``LISSOM_FORCE_ISA`` names what this CPU lacks.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"lissom: native kernels are unavailable: {reason}")
    return module


def module() -> ModuleType | None:
    """As :func:`load`, but None where there are no native kernels."""
    return _load()[0]


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


# Loading takes a millisecond and starts nothing; it is done now so that the extension sees every fork from
# here on and knows in a child that torch's OpenMP threads are gone.
_extension()
