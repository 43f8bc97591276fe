"""Tensors derived from others on their device, kept for later calls; nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Derived"]


class Derived:
    """Computes parts when they are first asked for.

    Other streams than the one that computed a part are made to wait for it. While a CUDA graph is captured
    nothing new is kept: its memory would be the graph's.
    """

    def __init__(self) -> None:
        self._parts: dict[object, tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}

    def part(
        self, key: object, like: Tensor, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``compute`` returns, on the device and the current stream of ``like``, or returned before."""
        tensors, done = self._parts.get(key, (None, None))
        if tensors is not None and done is None:
            return tensors
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if tensors is None:
            tensors = compute()
            if not capturing:
                done = torch.cuda.current_stream(like.device).record_event() if like.is_cuda else None
                self._parts[key] = tensors, done
        elif not capturing:  # a capture begins with a wait for everything
            assert done is not None
            if done.query():
                self._parts[key] = tensors, None
            else:
                torch.cuda.current_stream(like.device).wait_event(done)
        return tensors
