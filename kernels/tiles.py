"""Tile sizes: what a launch is made of, how one is picked, and what is compiled without a GPU.

Each op's file has a table of tiles per case and architecture, the first of which is used. With autotuning on
(``LISSOM_AUTOTUNE=1`` or :func:`autotune`) the candidates are timed at the first use of a shape, a line on
stderr shows it, and the winner is kept on disk, in a file per kind of GPU and version of Triton. Later
processes use the winners that are there without being asked to; with ``LISSOM_AUTOTUNE=0`` they do not.
Whether Triton's kernels or the CUDA C++ ones serve a call is chosen in the same way (``ops/_library.py``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from lissom._replay import forget, recording

__all__ = [
    "Compilation",
    "Tile",
    "architecture",
    "autotune",
    "cache_file",
    "ceil_div",
    "launch",
    "on_device",
    "pick",
    "power_of_two",
    "tunes",
]


@dataclass(frozen=True)
class Tile:
    """Block sizes by the names that the kernel gives them, and how its program is run."""

    sizes: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = field(default=None, kw_only=True)
    """Most registers a thread may have; None leaves it to ptxas, which may spill a few to save many."""

    def options(self) -> dict[str, int]:
        """Everything a launch passes on."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        registers = "" if self.maxnreg is None else f" registers={self.maxnreg}"
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}{registers}"


Candidate = TypeVar("Candidate")


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
        roomy: for sm_80, not for sm_86, sm_89 and sm_120, whose blocks have 99 KB of shared memory.
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
    roomy: bool = False


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and 1)."""
    return 1 << max(0, n - 1).bit_length()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the tensor's GPU, whichever is current (in the interpreter: nothing changes)."""
    return torch.cuda.device(tensor.get_device()) if tensor.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, of which a recording takes note. Constants go by name.
    Products and sums are fused unless ``enable_fp_fusion`` is False."""
    options = {"enable_fp_fusion": True, **options}
    compiled = kernel[grid](*arguments, **options)
    if (seen := recording()) is None:
        return
    if compiled is None:  # in the interpreter
        seen.unfit = "nothing was compiled"
        return
    # No launch reads constants, but their places are there.
    named = [None if one.is_constexpr else options[one.name] for one in kernel.params[len(arguments) :]]
    seen.launched(compiled[(*grid, 1, 1)[:3]], (*arguments, *named), by_name=True)


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for Hopper); 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# ------------------------------------------------------------------------------------------- choosing

_tuning: bool | None = None
"""What :func:`autotune` says; None leaves it to LISSOM_AUTOTUNE."""

_one_at_a_time = threading.RLock()
"""Candidates of two shapes timed at once would disturb each other. What is timed may have tiles of its own to
tune."""


@contextlib.contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Time the candidates of each shape first used inside the block, whatever LISSOM_AUTOTUNE says.

    With False, winners kept on disk are not used either.
    """
    global _tuning
    before, _tuning = _tuning, enabled
    forget()
    try:
        yield
    finally:
        _tuning = before
        forget()


def _mode() -> bool | None:
    """True: tune. False: heuristics only. None: heuristics, and winners that an earlier process kept."""
    if _tuning is not None:
        return _tuning
    wanted = os.environ.get("LISSOM_AUTOTUNE", "")
    return None if wanted == "" else wanted != "0"


def tunes(device: torch.device) -> bool:
    """Whether :func:`pick` may choose anything but the first candidate."""
    mode = _mode()
    return bool(mode or (mode is None and _winners(device)))


def cache_file(device: torch.device) -> Path:
    """Where winners of this kind of GPU are kept: in ``$LISSOM_CACHE``, else ``~/.cache/lissom``."""
    root = os.environ.get("LISSOM_CACHE")
    folder = (
        Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lissom"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"tiles-{slug}-triton{triton.__version__}.json"


def _read(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
        return {str(entry): str(tile) for entry, tile in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: tuned anew


@cache
def _winners(device: torch.device) -> dict[str, str]:
    """By entry the name of the tile that won; the file is read once a process."""
    return _read(cache_file(device))


def _keep(path: Path, entry: str, name: str) -> None:
    """Add one winner to the file, which other processes may have added to meanwhile."""
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**_read(path), entry: name}, file, indent=1, sort_keys=True)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def pick(
    op: str,
    key: Sequence[object],
    candidates: Sequence[Candidate],
    device: torch.device,
    run: Callable[[Candidate], object],
) -> Candidate:
    """What to launch: the first candidate, a tile mostly, or the fastest where that was tuned.

    Args:
        key: what the choice depends on: sizes (rows rounded up to a power of two), dtypes, form. The same key
            must come with the same candidates.
        candidates: best guess first; their texts must differ.
        run: launches with a candidate; may be called many times, and must not spoil the launch that follows.
    """
    if len(candidates) == 1 or not tunes(device):
        return candidates[0]
    winners = _winners(device)
    entry = " ".join(str(part) for part in (op, *key))
    if found := _named(winners.get(entry), candidates):
        return found
    if _mode() is None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return candidates[0]
    with _one_at_a_time:
        return _named(winners.get(entry), candidates) or _fastest(entry, candidates, device, run, winners)


def _named(name: str | None, candidates: Sequence[Candidate]) -> Candidate | None:
    return None if name is None else next((tile for tile in candidates if str(tile) == name), None)


def _fastest(
    entry: str,
    candidates: Sequence[Candidate],
    device: torch.device,
    run: Callable[[Candidate], object],
    winners: dict[str, str],
) -> Candidate:
    if (seen := recording()) is not None:  # it would hold the launches of all candidates
        seen.again = True
    best, best_seconds, fault = candidates[0], float("inf"), ""
    for number, tile in enumerate(candidates, 1):
        _tell(f"tuning {entry}: {number}/{len(candidates)}", done=False)
        try:
            seconds = _seconds(functools.partial(run, tile), device)
        except Exception as error:  # too large for this GPU, or one of the compiler's many types
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if seconds < best_seconds:
            best, best_seconds = tile, seconds
    if best_seconds == float("inf"):  # the launch that follows raises; nothing is learnt
        _tell(f"tuning {entry}: no candidate runs ({fault})", done=True)
        return best
    _tell(f"tuned {entry}: {best}, {best_seconds * 1e6:.1f} µs", done=True)
    winners[entry] = str(best)
    _keep(cache_file(device), entry, str(best))
    return best


def _tell(text: str, done: bool) -> None:
    """One line on stderr that is written over; in a file, or a pipe, a line at the beginning and the end."""
    if sys.stderr.isatty():
        print(f"\r\x1b[Klissom: {text}", end="\n" if done else "", file=sys.stderr, flush=True)
    elif done or ": 1/" in text:
        print(f"lissom: {text}", file=sys.stderr, flush=True)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":  # the interpreter
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        run()  # compiles
        cold = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)
        first = _times(run, cold, 1)[0]
        return statistics.median(_times(run, cold, max(5, min(50, int(_LONGEST / max(first, 1e-6))))))


_L2_BYTES = 1 << 28
"""More than any GPU's second-level cache holds."""

_AHEAD = 1 << 20
"""Cycles, half a millisecond, for which a GPU waits while Python launches: not Python is what is timed."""

_LONGEST = 20e-3
"""Seconds that a candidate is run for, five runs at least."""


def _times(run: Callable[[], object], cold: torch.Tensor, count: int) -> list[float]:
    """Seconds that the GPU takes for each of ``count`` runs, which find nothing in its cache."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        cold.zero_()
        torch.cuda._sleep(_AHEAD)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
