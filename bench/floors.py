"""The machine's floors: how fast the operation alone can go. The loops are in ``native/floors.cpp``.

Kinds: ``int8`` and ``fp32`` (operations per second, a multiply-add counts two) for an instruction set, and
``read_l2``, ``read_l3``, ``read_dram`` (bytes per second). Compiled with g++ on first use into
``build/bench``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .machine import ROOT, cache_bytes, cpu_flags

__all__ = [
    "Floor",
    "Probe",
    "bandwidth_kind",
    "compute_kind",
    "measure",
    "measure_all",
    "probe",
    "unavailable_reason",
]

_SOURCE = Path(__file__).parent / "native" / "floors.cpp"
_MIB = 1024**2

READ_BYTES = {"read_l3": 24 * _MIB, "read_dram": 256 * _MIB}
"""Buffer of each bandwidth floor; the L3 one shrinks to three quarters of a smaller L3, and ``read_l2`` reads
half of one L2."""

_FLAGS = {
    "int8_avx2": {"avx2", "fma"},
    "int8_avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
    "fp32_avx2": {"avx2", "fma"},
    "fp32_avx512": {"avx512f"},
}


@dataclass(frozen=True)
class Floor:
    """One measured floor: ``best`` and ``median`` over ``repetitions``, in ``unit`` (GOP/s or GB/s)."""

    kind: str
    threads: int
    unit: str
    best: float
    median: float
    repetitions: int
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler found (g++ is needed to build bench/native/floors.cpp)"
    digest = hashlib.sha256(_SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    target = ROOT / "build" / "bench" / f"floors-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        command = [*compiler.split(), "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"]
        done = subprocess.run([*command, str(_SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            return (
                None,
                f"bench/native/floors.cpp does not compile with {compiler}: {done.stderr.strip()[-400:]}",
            )
        os.replace(partial, target)  # whole or not at all, should two benchmarks build at once
    library = ctypes.CDLL(str(target))
    c_int, c_size = ctypes.c_int, ctypes.c_size_t
    library.floors_compute_name.restype = ctypes.c_char_p
    library.floors_compute_ops.restype = ctypes.c_double
    library.floors_read_name.restype = ctypes.c_char_p
    library.floors_compute.restype = ctypes.c_double
    library.floors_compute.argtypes = [c_int, c_int, ctypes.c_int64]
    library.floors_allocate.restype = ctypes.c_void_p
    library.floors_allocate.argtypes = [c_size]
    library.floors_free.argtypes = [ctypes.c_void_p]
    library.floors_read.restype = ctypes.c_double
    library.floors_read.argtypes = [c_int, c_int, ctypes.c_void_p, c_size, c_int]
    if not library.floors_compute_count():
        return None, "the floors are written for x86-64 only"
    return library, ""


def unavailable_reason() -> str:
    """Why no floor can be measured here, or ``""``."""
    return _library()[1]


def compute_kind(isa: str) -> str:
    """Kind of the int8 compute floor that holds for a lissom instruction set.

    Without the extension (``reference``) it is the best that the CPU has; ``scalar`` has none (``""``).
    """
    if isa == "scalar":
        return ""
    order = ["avx512vnni", "avx2"] if isa in ("reference", "avx512vnni") else [isa]
    for name in order:
        kind = f"int8_{name}"
        if kind in _FLAGS and _FLAGS[kind] <= cpu_flags():
            return kind
    return ""


def fp32_kind() -> str:
    """Kind of the best fp32 floor of this CPU, or ``""``."""
    return next((k for k in ("fp32_avx512", "fp32_avx2") if _FLAGS[k] <= cpu_flags()), "")


def bandwidth_kind(weight_bytes: int, threads: int) -> str:
    """Where hot weights of this size are read from: ``read_l2``, ``read_l3`` or ``read_dram``."""
    if weight_bytes <= threads * cache_bytes(2) // 2:
        return "read_l2"
    return "read_l3" if weight_bytes <= cache_bytes(3) * 3 // 4 else "read_dram"


def _read_bytes(kind: str, threads: int) -> int:
    if kind == "read_l2":
        return threads * max(cache_bytes(2), 512 * 1024) // 2
    size = READ_BYTES[kind]
    return min(size, cache_bytes(3) * 3 // 4) if kind == "read_l3" and cache_bytes(3) else size


class Probe:
    """One floor as a callable: each call is one short repetition and returns GOP/s or GB/s.

    Compute repetitions last about ``seconds``; reads go over their buffer as often as fits into it, at
    least once. For reads the fastest of several load and prefetch patterns is found first.
    """

    def __init__(self, kind: str, threads: int, seconds: float = 2e-3) -> None:
        library, reason = _library()
        if library is None:
            raise RuntimeError(f"floors: {reason}")
        self.kind, self.threads = kind, threads
        self.unit = "GB/s" if kind.startswith("read_") else "GOP/s"
        self.detail = ""
        self._run: Callable[[], float]
        self._buffer: int | None = None
        self._library = library
        if kind.startswith("read_"):
            self._prepare_read(seconds)
        else:
            self._prepare_compute(seconds)

    def _prepare_compute(self, seconds: float) -> None:
        library, threads = self._library, self.threads
        names = [library.floors_compute_name(i).decode() for i in range(library.floors_compute_count())]
        if self.kind not in names or not _FLAGS[self.kind] <= cpu_flags():
            raise ValueError(
                f"floors: kind={self.kind!r} is unknown or this CPU lacks it; known: {', '.join(names)}"
            )
        index = names.index(self.kind)
        trial = 20_000
        rate = max(library.floors_compute(index, threads, trial) for _ in range(3)) / threads
        iterations = max(trial, int(seconds * rate / library.floors_compute_ops(index)))
        self._run = lambda: library.floors_compute(index, threads, iterations) / 1e9

    def _prepare_read(self, seconds: float) -> None:
        library, threads = self._library, self.threads
        size = _read_bytes(self.kind, threads)
        buffer = library.floors_allocate(size)
        if not buffer:
            raise MemoryError(f"floors: no {size / _MIB:.0f} MiB for the {self.kind} buffer")
        self._buffer = buffer
        flags = cpu_flags()
        variants = [
            v
            for v in range(library.floors_read_count())
            if "avx2" in flags and ("avx512f" in flags or not library.floors_read_needs_avx512(v))
        ]
        if not variants:
            raise RuntimeError("floors: reading needs AVX2")
        trials = {v: [library.floors_read(v, threads, buffer, size, 1) for _ in range(4)] for v in variants}
        best = max(variants, key=lambda v: max(trials[v]))
        passes = max(1, int(seconds * max(trials[best]) / size))
        self.detail = f"{size / _MIB:.1f} MiB, {library.floors_read_name(best).decode()}"
        self._run = lambda: library.floors_read(best, threads, buffer, size, passes) / 1e9

    def __call__(self) -> float:
        self._run()  # untimed: brings the buffer into its cache again, as warm-up calls do for every side
        return self._run()

    def __del__(self) -> None:
        if getattr(self, "_buffer", None):
            self._library.floors_free(self._buffer)


@cache
def probe(kind: str, threads: int) -> Probe:
    """The :class:`Probe` of ``kind``, made once per process (the DRAM buffer takes 256 MiB)."""
    return Probe(kind, threads)


def measure(kind: str, threads: int, repetitions: int = 40) -> Floor:
    """Measure one floor: median and best over many short repetitions."""
    run = probe(kind, threads)
    rates = [run() for _ in range(repetitions)]
    return Floor(kind, threads, run.unit, max(rates), statistics.median(rates), repetitions, run.detail)


def measure_all(isa: str, threads: list[int], repetitions: int = 40) -> list[Floor]:
    """Every floor that concerns a run with lissom's ``isa``; an empty list where none can be measured."""
    if unavailable_reason():
        return []
    kinds = [k for k in (compute_kind(isa), fp32_kind(), "read_l2", "read_l3", "read_dram") if k]
    return [measure(kind, t, repetitions) for t in threads for kind in kinds]
