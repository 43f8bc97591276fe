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


Compute = Callable[..., tuple[Tensor, ...]]


class Derived:
    """Computes parts of the same source tensors, each when it is first asked for.

    Other streams than the one that computed a part are made to wait for it. What is kept lies outside of
    memory pools (:func:`outside_pools`): torch.compile's first run before a CUDA graph may be the first to
    ask. While a graph is captured nothing new is kept: its memory would be the graph's.
    """

    def __init__(self) -> None:
        self._parts: dict[object, tuple[tuple[Tensor, ...], torch.cuda.Event | None, Compute]] = {}

    def part(self, key: object, compute: Compute, *sources: Tensor) -> tuple[Tensor, ...]:
        """What ``compute(*sources)`` returns, on the device and the current stream of the first, or returned
        before; sizes depend on the sources' shapes alone. ``compute`` holds no tensor."""
        found = self._parts.get(key)
        settled = found is not None and found[1] is None
        tensors = found[0] if found is not None and settled else self._unsettled(key, compute, sources)
        if (seen := recording()) is not None:
            seen.keep(tensors, settled)
        return tensors

    def _unsettled(self, key: object, compute: Compute, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found, like = self._parts.get(key), sources[0]
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if found is None:
            if capturing:
                return compute(*sources)
            tensors = outside_pools(like.device, lambda: compute(*sources))
            self._parts[key] = tensors, _event(like), compute
            return tensors
        tensors, done, _ = found
        if not capturing and done is not None:  # a capture begins with a wait for everything
            if done.query():
                self._parts[key] = tensors, None, compute
            else:
                torch.cuda.current_stream(like.device).wait_event(done)
        return tensors

    def renew(self, *sources: Tensor) -> None:
        """The sources have changed: every part is computed anew, into the memory that it has, which captured
        graphs read. Not during a capture."""
        for key, (tensors, _, compute) in list(self._parts.items()):
            for old, new in zip(tensors, compute(*sources), strict=True):
                with torch.inference_mode(old.is_inference()):
                    old.copy_(new)
            self._parts[key] = tensors, _event(sources[0]), compute


def _event(like: Tensor) -> torch.cuda.Event | None:
    """When what was launched on the current stream of ``like`` is over; None on the CPU: it is."""
    return torch.cuda.current_stream(like.device).record_event() if like.is_cuda else None
