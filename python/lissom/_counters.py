"""Counters of arrivals, for kernels whose last program or block at a tile finishes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derived import outside_pools

__all__ = ["counters"]

_STREAM, _GRAPHS = 1 << 12, 1 << 20
"""Of a stream's launches, and of all captured ones: 4 MiB a GPU."""

_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_of_graphs: dict[torch.device, Tensor] = {}


def counters(on: Tensor, count: int) -> Tensor:
    """``count`` int32 zeros, or more, on the device of ``on``.

    Kernels leave them zero, so that no launch has to clear them: launches on a stream follow each other and
    share theirs. A captured launch has its own, since graphs may be replayed beside each other.
    """
    device = on.device
    if not on.is_cuda:
        return _zeros(device, count)
    with torch.cuda.device(device.index):
        if torch.cuda.is_current_stream_capturing():
            rest = _of_graphs.get(device)
            if rest is None or rest.numel() < count:
                return _zeros(device, count)
            # Pieces start at multiples of 256 bytes: for Triton another alignment is another kernel.
            _of_graphs[device] = rest[(count + 63) // 64 * 64 :]
            return rest[:count]
        key = device, torch.cuda.current_stream(device).cuda_stream
        if key not in _of_streams:
            _of_streams[key] = outside_pools(device, lambda: _zeros(device, _STREAM))
        if device not in _of_graphs:  # here, since a graph that is captured may not be the first to run
            _of_graphs[device] = outside_pools(device, lambda: _zeros(device, _GRAPHS))
        return _zeros(device, count) if count > _STREAM else _of_streams[key]


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
