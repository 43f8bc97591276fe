"""Counters of arrivals, for kernels whose last program or block at a tile finishes it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ._derived import outside_pools
from ._replay import current_stream, recording

__all__ = ["counters"]

_STREAM, _GRAPHS = 1 << 12, 1 << 20
"""Of a stream's launches, and of all captured ones: 4 MiB a GPU."""

_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_of_graphs: dict[torch.device, Tensor] = {}
_lock = threading.Lock()
"""Threads that capture graphs at once take pieces of the same tensor."""


def counters(on: Tensor, count: int) -> Tensor:
    """``count`` int32 zeros, or more, on the device of ``on``.

    Kernels leave them zero, so that no launch has to clear them: launches on a stream follow each other and
    share theirs. A captured launch has its own, since graphs may be replayed beside each other.
    """
    if (seen := recording()) is not None:
        return seen.asked(lambda like: _counters(like, count), on)
    return _counters(on, count)


def _counters(on: Tensor, count: int) -> Tensor:
    device = on.device
    if not on.is_cuda:
        return _zeros(device, count)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device.index):
            return _counters(on, count)
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            rest = _of_graphs.get(device)
            if rest is not None and rest.numel() >= count:
                # Pieces start at multiples of 256 bytes: for Triton another alignment is another kernel.
                _of_graphs[device] = rest[(count + 63) // 64 * 64 :]
                return rest[:count]
        return _zeros(device, count)
    if count > _STREAM:
        return _zeros(device, count)
    key = device, current_stream(device.index)
    if (known := _of_streams.get(key)) is not None:
        return known
    if device not in _of_graphs:  # here, since a graph that is captured may not be the first to run
        zeros = outside_pools(device, lambda: _zeros(device, _GRAPHS))
        with _lock:
            _of_graphs.setdefault(device, zeros)
    _of_streams[key] = outside_pools(device, lambda: _zeros(device, _STREAM))
    return _of_streams[key]


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
