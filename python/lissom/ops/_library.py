"""What every op file shares: the library handle and the checks that more than one op makes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _cuda, _triton, registry

__all__ = ["FLOAT_DTYPES", "LIBRARY", "check_float", "check_same_device", "left_to_triton", "register_gpu"]

LIBRARY = torch.library.Library("lissom", "DEF")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """TypeError unless ``dtype`` is one that every op accepts."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {dtype}; use torch.float32, torch.bfloat16 or torch.float16 "
            f"(for example {name}.float())"
        )


def check_same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """ValueError unless all tensors lie on the device of ``first``."""
    on_cpu = first.is_cpu  # far cheaper than comparing devices, and this runs on every call
    for name, tensor in others.items():
        if tensor is None or (on_cpu and tensor.is_cpu):
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but the input is on {first.device}; "
                f"move the layer with .to({str(first.device)!r})"
            )


def register_gpu(
    op: str,
    run_triton: Callable[..., Any],
    run_reference: Callable[..., Any],
    run_cuda: Callable[..., Any] | None = None,
    cuda_is_faster: Callable[..., bool] | None = None,
) -> None:
    """Register what serves ``op`` on CUDA tensors; in Triton's interpreter, its kernels on CPU tensors too.

    Call it after the CPU's backends are registered: there the interpreter comes last, for whoever names it.
    CUDA C++ kernels come after Triton's, but for calls of which ``cuda_is_faster(*args)`` says that they were
    measured on a GPU to be faster; it is asked on Hopper GPUs only, the only ones that were measured. Where
    tuning is on (``kernels/tiles.py``) both are timed instead, on any GPU.
    """
    triton = registry.Backend("triton", run_triton, _triton.unavailable_reason, _triton.detail)
    backends = [registry.Backend(registry.REFERENCE, run_reference)]
    if run_cuda is not None:
        backends.insert(0, registry.Backend("cuda", run_cuda, _cuda.unavailable_reason, _cuda.detail))
        triton = replace(
            triton,
            automatic=_faster(op, run_triton, run_cuda, cuda_is_faster),
            detail=lambda: _triton.detail() + _beside(cuda_is_faster is not None),
        )
    registry.register(op, "cuda", triton, *backends)
    if _triton.interpreted():
        registry.register(
            op,
            "cpu",
            registry.Backend("triton", run_triton, _triton.interpreter_reason, _triton.interpreter_detail),
        )


def left_to_triton(
    op: str, run_triton: Callable[..., Any], run_reference: Callable[..., Any]
) -> Callable[..., Any]:
    """What serves the calls that CUDA C++ has no kernel for: Triton, or where it cannot run the reference,
    which a warning says once."""

    def run(first: Tensor, *args: Any) -> Any:
        reason = _triton.interpreter_reason() if first.is_cpu else _triton.unavailable_reason()
        if not reason:
            return run_triton(first, *args)
        _warn_once(
            f"lissom: some calls of {op} have no CUDA C++ kernel and run on the slow reference backend "
            f"(triton: {reason})"
        )
        return run_reference(first, *args)

    return run


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _beside(ruled: bool) -> str:
    """What else serves calls on the current GPU; ``ruled``: where nothing was tuned, too."""
    if _cuda.unavailable_reason():
        return ""
    device = torch.device("cuda", torch.cuda.current_device())
    may = (ruled and _cuda.is_hopper(device)) or _triton.load("tiles").tunes(device)
    return "; CUDA C++ where that was faster" if may else ""


def _faster(
    op: str,
    run_triton: Callable[..., Any],
    run_cuda: Callable[..., Any],
    cuda_is_faster: Callable[..., bool] | None,
) -> Callable[..., Any]:
    runs = {"triton": run_triton, "cuda": run_cuda}

    def run(first: Tensor, *args: Any) -> Any:
        device = first.device
        guess = cuda_is_faster is not None and _cuda.is_hopper(device) and cuda_is_faster(first, *args)
        names = ("cuda", "triton") if guess else ("triton", "cuda")
        chosen, tiles = names[0], _triton.load("tiles")
        if tiles.tunes(device) and not _cuda.unavailable_reason() and _may_be_repeated(first, args):
            key = _kind_of_call(first, args, tiles.power_of_two)
            chosen = tiles.pick(f"backend {op}", key, names, device, lambda name: runs[name](first, *args))
        return runs[chosen](first, *args)

    return run


def _may_be_repeated(first: Tensor, args: Sequence[Any]) -> bool:
    """Not where there is nothing to compute, or ``first`` is overwritten, as a chunk's logits by their
    gradient."""
    others = (argument for argument in args if isinstance(argument, Tensor))
    return first.numel() > 0 and all(tensor.data_ptr() != first.data_ptr() for tensor in others)


def _kind_of_call(first: Tensor, args: Sequence[Any], rounded: Callable[[int], int]) -> list[str]:
    """What decides which kernels are faster: sizes, the number of rows rounded, dtypes and options; of a
    factor only whether it is 0, since it may change from step to step."""
    width = first.shape[-1:] if first.is_floating_point() else ()
    rows = math.prod(first.shape[: first.dim() - len(width)])

    def said(argument: Any) -> Iterator[str]:
        if isinstance(argument, Tensor):
            shape = (rows, *width) if argument is first else argument.shape
            sizes = ",".join(str(rounded(size) if size == rows else size) for size in shape)
            yield f"{str(argument.dtype).removeprefix('torch.')}[{sizes}]"
        elif is_dataclass(argument):
            for one in fields(argument):
                yield from said(getattr(argument, one.name))
        else:
            yield str(argument != 0 if isinstance(argument, float) else argument)

    return [text for argument in (first, *args) for text in said(argument)]
