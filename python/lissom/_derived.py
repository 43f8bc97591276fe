"""Tensors derived from others on their device, kept for later calls; nothing waits for a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ._replay import recording

__all__ = ["Derived", "outside_pools"]

T = TypeVar("T")


def outside_pools(device: torch.device, compute: Callable[[], T]) -> T:
    """What ``compute`` returns, in ordinary memory of ``device``, on the caller's stream.

    Before torch.compile captures a CUDA graph, it runs what will be captured once, with allocations from the
    graph's pool, in which nothing but outputs may stay alive. No capture is under way then, and no query says
    so. But such pools, like those of ``torch.cuda.use_mem_pool``, serve only the thread that asked for them
    (since PyTorch 2.8), so tensors on a GPU are computed by a thread of their own. Not during a capture.
    """
    if device.type != "cuda":
        return compute()
    stream = torch.cuda.current_stream(device)
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            torch.cuda.set_stream(stream)  # and its device
            results.append(compute())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="lissom-outside-pools")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Derived:
    """Computes parts when they are first asked for.

    Other streams than the one that computed a part are made to wait for it. What is kept lies outside of
    memory pools (:func:`outside_pools`): torch.compile's first run before a CUDA graph may be the first to
    ask. While a graph is captured nothing new is kept: its memory would be the graph's.
    """

    def __init__(self) -> None:
        self._parts: dict[object, tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}

    def part(
        self, key: object, like: Tensor, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``compute`` returns, on the device and the current stream of ``like``, or returned before."""
        tensors, done = self._parts.get(key, (None, None))
        settled = tensors is not None and done is None
        if not settled:
            tensors = self._unsettled(key, like, compute)
        assert tensors is not None
        if (seen := recording()) is not None:
            seen.keep(tensors, settled)
        return tensors

    def _unsettled(
        self, key: object, like: Tensor, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        tensors, done = self._parts.get(key, (None, None))
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if tensors is None:
            tensors = compute() if capturing else outside_pools(like.device, compute)
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
