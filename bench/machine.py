"""Where and with what a benchmark ran: CPU, instruction sets, caches, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "cache_bytes", "commit", "cpu_flags", "cpu_slug", "describe", "lissom_isa"]

ROOT = Path(__file__).resolve().parents[1]
"""Root of the repository."""

_ISA_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)

_PACKAGES = ("lissom", "torch", "torchao", "onnx", "onnxruntime", "numpy", "transformers")

_ENVIRONMENT = (
    "LISSOM_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "ATEN_CPU_",
    "ORT_",
    "FBGEMM_",
)
"""Prefixes of the environment variables that change what is measured; they go into the results."""


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_flags() -> set[str]:
    """Feature flags as Linux names them; empty where there is no ``/proc/cpuinfo``."""
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def _microarchitecture() -> str:
    """Name of the microarchitecture where model names do not tell it (virtual "AMD EPYC"), or ``""``."""
    info = _cpuinfo()
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if info.get("vendor_id") == "AuthenticAMD":
        if family == 0x1A:
            return "Zen 5"
        if family == 0x19:
            return "Zen 4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or model >= 0xA0 else "Zen 3"
        if family == 0x17:
            return "Zen 2" if model >= 0x30 else "Zen"
    if info.get("vendor_id") == "GenuineIntel" and family == 6:
        names = {85: "Skylake-SP", 106: "Ice Lake-SP", 143: "Sapphire Rapids", 207: "Emerald Rapids"}
        return names.get(model, "")
    return ""


def cpu_name() -> str:
    """Model name and microarchitecture, such as ``AMD EPYC (Zen 5)``."""
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\s+", " ", re.sub(r"\((R|TM|tm)\)", "", name)).strip()
    micro = _microarchitecture()
    return f"{name} ({micro})" if micro else name


def cpu_slug() -> str:
    """:func:`cpu_name` and the core count as part of a file name: ``amd-epyc-zen5-2c``."""
    name = cpu_name().replace("Zen ", "Zen")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{os.cpu_count()}c"


@cache
def cache_bytes(level: int) -> int:
    """Size of the data or unified cache of ``level`` that CPU 0 sees, in bytes; 0 where unknown."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (
                int((index / "level").read_text()) == level
                and (index / "type").read_text().strip() != "Instruction"
            ):
                size = (index / "size").read_text().strip()
                return int(size[:-1]) * {"K": 1024, "M": 1024**2}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return 0


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """``{"commit": hash, "dirty": bool}`` of the working tree; new result files do not make it dirty."""
    changed = [line[3:] for line in _git("status", "--porcelain").splitlines()]
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": any(not path.startswith("bench/results") for path in changed),
    }


def lissom_isa() -> str:
    """Instruction set that lissom uses, or ``"reference"`` where the extension is missing."""
    from lissom import _native

    return "reference" if _native.unavailable_reason() else _native.isa()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "lissom":
            import lissom

            return lissom.__version__
        return ""


def describe() -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement, ready for JSON."""
    flags = cpu_flags()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "cpu": cpu_name(),
        "cpu_slug": cpu_slug(),
        "isa_flags": [flag for flag in _ISA_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "caches_bytes": {f"L{level}": cache_bytes(level) for level in (1, 2, 3)},
        "load_average": list(os.getloadavg()),
        "isa": lissom_isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
        **commit(),
    }
