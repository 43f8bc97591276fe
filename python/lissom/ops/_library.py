"""What every op file shares: the library handle and the checks that more than one op makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _cuda, _triton, registry

__all__ = ["FLOAT_DTYPES", "LIBRARY", "check_float", "check_same_device", "register_gpu"]

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
    measured on a GPU to be faster; it is asked on Hopper GPUs only, the only ones that were measured.
    """
    triton = registry.Backend("triton", run_triton, _triton.unavailable_reason, _triton.detail)
    backends = [registry.Backend(registry.REFERENCE, run_reference)]
    if run_cuda is not None:
        backends.insert(0, registry.Backend("cuda", run_cuda, _cuda.unavailable_reason, _cuda.detail))
        if cuda_is_faster is not None:
            triton = replace(triton, automatic=_faster(run_triton, run_cuda, cuda_is_faster))
    registry.register(op, "cuda", triton, *backends)
    if _triton.interpreted():
        registry.register(
            op,
            "cpu",
            registry.Backend("triton", run_triton, _triton.interpreter_reason, _triton.interpreter_detail),
        )


def _faster(
    run_triton: Callable[..., Any], run_cuda: Callable[..., Any], cuda_is_faster: Callable[..., bool]
) -> Callable[..., Any]:
    def run(first: Tensor, *args: Any) -> Any:
        cuda = _cuda.is_hopper(first.device) and cuda_is_faster(first, *args)
        return (run_cuda if cuda else run_triton)(first, *args)

    return run
