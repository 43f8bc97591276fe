"""Loads the CUDA kernels: ``csrc/cuda``, the extension ``lissom._C_cuda``.

It is built only where asked for, so that a missing one is nothing unusual. One that is there but cannot run
says so once.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._counters import counters
from ._replay import recording

__all__ = ["call", "counters", "detail", "is_hopper", "load", "unavailable_reason"]

BUILD = "build them where nvcc is, with: pip install . -C cmake.define.LISSOM_CUDA=ON"


@cache
def _extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("lissom._C_cuda"), ""
    except ModuleNotFoundError:
        return None, f"the CUDA kernels were not built; {BUILD}"
    except ImportError as error:
        return None, f"the extension lissom._C_cuda could not be imported ({error}); {BUILD}"


@cache
def unavailable_reason() -> str:
    """Why the CUDA kernels cannot run, or ``""``; where they were built, a warning says so once."""
    module, reason = _extension()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return f"torch finds no CUDA GPU (torch {torch.__version__}); install a CUDA build of torch"
    # One device of each kind, the current one first: asking a device makes it hold a context.
    current = torch.cuda.current_device()
    kinds: dict[tuple[int, int], int] = {}
    for i in (current, *range(torch.cuda.device_count())):
        kinds.setdefault(torch.cuda.get_device_capability(i), i)
    for i in kinds.values():
        with torch.cuda.device(i):
            reason = module.why_not()
        if reason:
            reason = f"cuda:{i} ({torch.cuda.get_device_name(i)}): {reason}; or {BUILD}"
            warnings.warn(f"lissom: the CUDA kernels are passed over: {reason}", stacklevel=2)
            return reason
    return ""


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels can run on ``device``, with those of Hopper's own instructions."""
    if device.type != "cuda" or unavailable_reason():
        return False
    with torch.cuda.device(device):
        return bool(load().hopper_forms())


def detail() -> str:
    """What runs: the architectures that were compiled for, and the GPU's name."""
    return f"{load().ARCHITECTURES}, {torch.cuda.get_device_name()}"


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: there is none.
    """
    module, reason = _extension()
    if module is None:
        raise RuntimeError(f"lissom: CUDA kernels are unavailable: {reason}")
    return module


def call(name: str, on: Tensor, *args: Any) -> Any:
    """Function ``name`` of the extension, on the GPU and the current stream of ``on``.

    Every function takes the stream as its last argument; one that answers with a size has launched nothing.
    Tensors whose addresses are among ``args`` must be held by a name until the call returns; torch's
    allocator then keeps the order of the stream.
    """
    function = getattr(load(), name)
    if not on.is_cuda:  # the emulator of the tests
        result = function(*args, 0)
    else:
        index = on.device.index
        with torch.cuda.device(index):
            result = function(*args, torch.cuda.current_stream(index).cuda_stream)
    if not result and (seen := recording()) is not None:
        seen.launched(function, args, by_name=False)
    return result
