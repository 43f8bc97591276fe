"""Loads the Triton kernels (``kernels/``, installed as ``lissom.kernels``) on their first use.

With ``TRITON_INTERPRET=1`` they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib
import os
import re
from functools import cache
from types import ModuleType

import torch

__all__ = ["LEAST_CAPABILITY", "detail", "interpreted", "load", "unavailable_reason"]

LEAST_VERSION = (3, 4)
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 and int8 tensor cores that Triton uses."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def _triton_reason() -> str:
    fix = "pip install 'triton>=3.4'"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton could not be imported ({error}); {fix}"
    except Exception as error:  # a broken driver or a half-installed package raises anything
        return f"triton is broken: {type(error).__name__}: {error}; {fix}"
    version = str(getattr(triton, "__version__", "0"))
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return f"triton {version} is too old; {fix}" if found < LEAST_VERSION else ""


@cache
def _gpu_reason() -> str:
    if not torch.cuda.is_available():
        return f"torch finds no CUDA GPU (torch {torch.__version__}); install a CUDA build of torch"
    weak = [
        f"cuda:{i} ({torch.cuda.get_device_name(i)}, compute capability {major}.{minor})"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
        if (major, minor) < LEAST_CAPABILITY
    ]
    least = ".".join(str(part) for part in LEAST_CAPABILITY)
    hide = "hide it with CUDA_VISIBLE_DEVICES"
    return f"{', '.join(weak)} is older than compute capability {least}; {hide}" if weak else ""


@cache
def _driver_reason() -> str:
    """Triton builds its driver, and a launcher per kernel, with a C compiler: let that fail here."""
    if interpreted():
        return ""
    try:
        _ = importlib.import_module("triton.runtime").driver.active
    except Exception as error:  # no compiler, no headers, no libcuda, a folder that cannot be written, …
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return (
            f"triton cannot reach the GPU: {said}; it needs a C compiler (gcc, or what CC names), Python's "
            "headers and a cache folder that can be written (TRITON_CACHE_DIR)"
        )
    return ""


def unavailable_reason() -> str:
    """Why Triton kernels cannot run on CUDA tensors, or ``""``."""
    return _triton_reason() or _gpu_reason() or _driver_reason()


def interpreter_reason() -> str:
    """Why they cannot run on CPU tensors, or ``""``."""
    if not interpreted():
        return "Triton kernels run on CPU tensors only in its interpreter (TRITON_INTERPRET=1, for tests)"
    return _triton_reason()


def detail() -> str:
    """What runs: Triton's version and the GPU's name."""
    version = importlib.import_module("triton").__version__
    return f"triton {version}, {torch.cuda.get_device_name()}"


def interpreter_detail() -> str:
    return f"triton {importlib.import_module('triton').__version__}, interpreter"


@cache
def load(op: str) -> ModuleType:
    """The module ``lissom.kernels.<op>``."""
    if interpreted():
        importlib.import_module("lissom.kernels.interpreter").mend()
    return importlib.import_module(f"lissom.kernels.{op}")
