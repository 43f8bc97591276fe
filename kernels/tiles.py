"""Tile sizes: what a launch is made of, how one is picked, and what is compiled without a GPU.

Each op's file has a table of tiles per case and architecture (``tile_candidates``), the first of which is used.
With autotuning on (``LISSOM_AUTOTUNE=1`` or :func:`autotune`), the candidates are timed at the first use of a
shape, a line on stderr shows it, and the winner is kept on disk per GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

__all__ = [
    "Compilation",
    "Tile",
    "architecture",
    "autotune",
    "cache_file",
    "ceil_div",
    "on_device",
    "pick",
    "power_of_two",
]


@dataclass(frozen=True)
class Tile:
    """Block sizes by the names that the kernel gives them, and how its program is run."""

    sizes: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, int]:
        """Everything a launch passes on."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Compilation:
    """One way in which a kernel is launched, for ``triton.compile`` on a machine without a GPU.

    Attributes:
        kernel: the ``triton.jit`` function.
        types: of its arguments that are no constants, as ``triton`` spells them: ``*bf16``, ``i32``, …
        constants: its ``tl.constexpr`` arguments, tile sizes among them.
        aligned: arguments that are multiples of 16 (pointers, sizes, strides), as launches usually find.
        tensor_cores: whether its instructions must be among the code.
        fp_fusion: as at the launch.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    tile: Tile
    aligned: Sequence[str] = ()
    tensor_cores: bool = False
    fp_fusion: bool = True
    architectures: Sequence[int] = field(default=(80, 90, 100))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and 1)."""
    return 1 << max(0, n - 1).bit_length()


@contextlib.contextmanager
def on_device(tensor: torch.Tensor) -> Iterator[None]:
    """Launches inside go to the tensor's GPU, whichever is current."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:  # the interpreter
        yield


def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for Hopper); 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_tuning: bool | None = None


@contextlib.contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Time the candidates of each shape first used inside the block, whatever LISSOM_AUTOTUNE says."""
    global _tuning
    before, _tuning = _tuning, enabled
    try:
        yield
    finally:
        _tuning = before


def _tunes() -> bool:
    return os.environ.get("LISSOM_AUTOTUNE", "") not in ("", "0") if _tuning is None else _tuning


def cache_file(device: torch.device) -> Path:
    """Where winners of this GPU are kept: ``$LISSOM_CACHE`` or ``~/.cache/lissom``."""
    root = os.environ.get("LISSOM_CACHE") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lissom"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(root) / f"tiles-{slug}-triton{triton.__version__}.json"


@cache
def _winners(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
        return {str(key): str(value) for key, value in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: tuned anew


def _keep(path: Path, winners: Mapping[str, str]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(dict(winners), file, indent=1, sort_keys=True)
        os.replace(temporary, path)


def pick(
    op: str,
    key: Sequence[object],
    candidates: Sequence[Tile],
    device: torch.device,
    run: Callable[[Tile], object],
) -> Tile:
    """The tile to launch with: the first candidate, or with autotuning the fastest.

    Args:
        key: what the choice depends on: sizes (rows rounded up to a power of two), dtypes, form.
        candidates: best guess first.
        run: launches with a tile; may be called many times, so it must not spoil the launch that follows.
    """
    if len(candidates) == 1:
        return candidates[0]
    path = cache_file(device) if _tunes() or _cached_any() else None
    if path is None:
        return candidates[0]
    winners = _winners(path)
    entry = f"{op} {' '.join(str(part) for part in key)}"
    by_name = {str(tile): tile for tile in candidates}
    if winners.get(entry) in by_name:
        return by_name[winners[entry]]
    if not _tunes() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return candidates[0]
    return _fastest(entry, by_name, device, run, path, winners)


def _cached_any() -> bool:
    """Winners of an earlier, tuned process are used without being asked for."""
    return os.environ.get("LISSOM_AUTOTUNE") != "0" and _tuning is not False


def _fastest(
    entry: str,
    by_name: Mapping[str, Tile],
    device: torch.device,
    run: Callable[[Tile], object],
    path: Path,
    winners: dict[str, str],
) -> Tile:
    best, best_seconds = next(iter(by_name)), float("inf")
    for number, (name, tile) in enumerate(by_name.items(), 1):
        print(f"\rlissom: tuning {entry}: {number}/{len(by_name)} ", end="", file=sys.stderr, flush=True)
        try:
            seconds = _seconds(lambda tile=tile: run(tile), device)  # type: ignore[misc]
        except (RuntimeError, triton.runtime.errors.OutOfResources):  # does not fit this GPU
            continue
        if seconds < best_seconds:
            best, best_seconds = name, seconds
    print(f"\rlissom: tuned {entry}: {best}, {best_seconds * 1e6:.1f} µs", file=sys.stderr, flush=True)
    winners[entry] = best
    _keep(path, winners)
    return by_name[best]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        run()  # compiles
        return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
