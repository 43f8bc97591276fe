"""The machine's floors: how fast the operation alone can go. The loops are in ``native/floors.cpp``.

Kinds: ``int8``, ``int4`` (int8 activations × 4-bit weights) and ``fp32`` (operations per second, a
multiply-add counts two) for an instruction set, and ``read_l2``, ``read_l3``, ``read_dram`` (bytes per
second). Compiled with g++ on first use into ``build/bench``.
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
    "footprint",
    "measure",
    "measure_all",
    "probe",
    "unavailable_reason",
]

_SOURCE = Path(__file__).parent / "native" / "floors.cpp"
_MIB = 1024**2

READ_BYTES = {"read_l3": 24 * _MIB, "read_dram": 256 * _MIB}
"""Buffer of a bandwidth floor where no size is asked for; the L3 one shrinks to three quarters of a smaller
L3, and ``read_l2`` reads half of one L2 per thread."""

PROBE_SECONDS = 4e-3
"""About what one reading takes: its repetitions together."""

REPETITION_SECONDS = {"compute": 250e-6, "read": 50e-6}
"""About what one repetition takes at least; the quickest is the reading."""

REPETITIONS = (3, 40)
"""Bounds on the repetitions of one reading; the least is for DRAM, whose buffer takes milliseconds."""

_FLAGS = {
    "int8_avx2": {"avx2", "fma"},
    "int8_avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
    "int4_avx2": {"avx2", "fma"},
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
    library.floors_compute.argtypes = [c_int, c_int, ctypes.c_int64, c_int]
    library.floors_allocate.restype = ctypes.c_void_p
    library.floors_allocate.argtypes = [c_size]
    library.floors_free.argtypes = [ctypes.c_void_p]
    library.floors_read.restype = ctypes.c_double
    library.floors_read.argtypes = [c_int, c_int, ctypes.c_void_p, c_size, c_int, c_int]
    if not library.floors_compute_count():
        return None, "the floors are written for x86-64 only"
    return library, ""


def unavailable_reason() -> str:
    """Why no floor can be measured here, or ``""``."""
    return _library()[1]


def compute_kind(isa: str, bits: int = 8) -> str:
    """Kind of the compute floor of int8 activations × ``bits``-bit weights for a lissom instruction set.

    On AVX2 4-bit weights have a floor of their own (16-bit sums); with VNNI it is int8's. Without the
    extension (``reference``) it is the best that the CPU has; ``scalar`` has none (``""``).
    """
    if isa == "scalar":
        return ""
    order = ["avx512vnni", "avx2"] if isa in ("reference", "avx512vnni") else [isa]
    for kind in (f"int{width}_{name}" for name in order for width in (bits, 8)):
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


def footprint(kind: str, threads: int, weight_bytes: int | None = None) -> int:
    """Bytes that a bandwidth floor reads: as many as the weights that it is compared with.

    At least twice the L1 caches, so that it is not their bandwidth. Without ``weight_bytes`` a size typical
    of the level.
    """
    if weight_bytes is not None:
        size = max(weight_bytes, 2 * threads * (cache_bytes(1) or 32 * 1024))
    elif kind == "read_l2":
        size = threads * max(cache_bytes(2), 512 * 1024) // 2
    else:
        size = READ_BYTES[kind]
        size = min(size, cache_bytes(3) * 3 // 4) if kind == "read_l3" and cache_bytes(3) else size
    pages = 4096 * threads
    return -(-size // pages) * pages


class Probe:
    """One floor as a callable: each call is one reading, in GOP/s or GB/s, and takes about ``PROBE_SECONDS``.

    A reading is the quickest of many short repetitions. For reads the fastest of several patterns (streams,
    prefetches, vector widths) is found first; ``weight_bytes`` is how much is read (see :func:`footprint`).
    """

    def __init__(self, kind: str, threads: int, weight_bytes: int | None = None) -> None:
        library, reason = _library()
        if library is None:
            raise RuntimeError(f"floors: {reason}")
        self.kind, self.threads = kind, threads
        self.unit = "GB/s" if kind.startswith("read_") else "GOP/s"
        self.bytes: int | None = None
        self.detail = ""
        self._run: Callable[[], float]
        self._buffer: int | None = None
        self._library = library
        if kind.startswith("read_"):
            self._prepare_read(footprint(kind, threads, weight_bytes))
        else:
            self._prepare_compute()

    def _prepare_compute(self) -> None:
        library, threads = self._library, self.threads
        names = [library.floors_compute_name(i).decode() for i in range(library.floors_compute_count())]
        if self.kind not in names or not _FLAGS[self.kind] <= cpu_flags():
            raise ValueError(
                f"floors: kind={self.kind!r} is unknown or this CPU lacks it; known: {', '.join(names)}"
            )
        index = names.index(self.kind)
        rate = library.floors_compute(index, threads, 5_000, 12) / threads
        seconds = REPETITION_SECONDS["compute"]
        iterations = max(1, int(seconds * rate / library.floors_compute_ops(index)))
        repetitions = _repetitions(seconds)
        self._run = lambda: library.floors_compute(index, threads, iterations, repetitions) / 1e9

    def _prepare_read(self, size: int) -> None:
        library, threads = self._library, self.threads
        buffer = library.floors_allocate(size)
        if not buffer:
            raise MemoryError(f"floors: no {size / _MIB:.0f} MiB for the {self.kind} buffer")
        self._buffer, self.bytes = buffer, size
        flags = cpu_flags()
        variants = [
            v
            for v in range(library.floors_read_count())
            if "avx2" in flags and ("avx512f" in flags or not library.floors_read_needs_avx512(v))
        ]
        if not variants:
            raise RuntimeError("floors: reading needs AVX2")

        def read(variant: int, passes: int, repetitions: int) -> float:
            rate: float = library.floors_read(variant, threads, buffer, size, passes, repetitions)
            return rate

        seconds = size / read(variants[0], 1, REPETITIONS[0])
        passes = max(1, int(REPETITION_SECONDS["read"] / seconds))
        repetitions = _repetitions(passes * seconds)
        best = max(variants, key=lambda v: read(v, passes, repetitions))
        self.detail = f"{size / _MIB:.1f} MiB, {library.floors_read_name(best).decode()}"
        self._run = lambda: read(best, passes, repetitions) / 1e9

    def __call__(self) -> float:
        return self._run()

    def __del__(self) -> None:
        if getattr(self, "_buffer", None):
            self._library.floors_free(self._buffer)


def _repetitions(seconds: float) -> int:
    """How many repetitions of ``seconds`` make a reading."""
    least, most = REPETITIONS
    return min(most, max(least, int(PROBE_SECONDS / seconds)))


@cache
def probe(kind: str, threads: int, weight_bytes: int | None = None) -> Probe:
    """The :class:`Probe`, made once per process (the DRAM buffer takes 256 MiB)."""
    return Probe(kind, threads, weight_bytes)


def measure(kind: str, threads: int, repetitions: int = 40) -> Floor:
    """Measure one floor: median and best over many readings."""
    run = probe(kind, threads)
    rates = [run() for _ in range(repetitions)]
    return Floor(kind, threads, run.unit, max(rates), statistics.median(rates), repetitions, run.detail)


def measure_all(isa: str, threads: list[int], repetitions: int = 40, bits: int = 8) -> list[Floor]:
    """Every floor that concerns a run with lissom's ``isa``; an empty list where none can be measured."""
    if unavailable_reason():
        return []
    compute = dict.fromkeys((compute_kind(isa, bits), compute_kind(isa), fp32_kind()))
    kinds = [k for k in (*compute, "read_l2", "read_l3", "read_dram") if k]
    return [measure(kind, t, repetitions) for t in threads for kind in kinds]
