"""Which launches share counters of arrivals, with a GPU that is made up."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lissom import _counters

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(capturing=False, stream=1)
    monkeypatch.setattr(_counters, "_of_streams", {})
    monkeypatch.setattr(_counters, "_of_graphs", {})
    monkeypatch.setattr(_counters, "_zeros", lambda device, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(_counters, "outside_pools", lambda device, compute: compute())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_counters, "current_stream", lambda index: state.stream)
    return state


def counters(count: int) -> Tensor:
    return _counters.counters(cast(Any, SimpleNamespace(device=GPU, is_cuda=True)), count)


def test_a_streams_launches_share_theirs(gpu: SimpleNamespace) -> None:
    first = counters(3)
    assert counters(100).data_ptr() == first.data_ptr()
    gpu.stream = 2
    assert counters(3).data_ptr() != first.data_ptr()


def test_many_are_a_launchs_own(gpu: SimpleNamespace) -> None:
    assert counters(5000).data_ptr() != counters(5000).data_ptr()
    assert counters(5000).numel() == 5000


def test_captured_launches_share_nothing(gpu: SimpleNamespace) -> None:
    counters(1)
    gpu.capturing = True
    first, second = counters(3), counters(70)
    assert second.data_ptr() - first.data_ptr() == 256, "aligned alike"
    assert (first.numel(), second.numel()) == (3, 70)
    assert counters(1 << 21).numel() == 1 << 21


def test_a_capture_that_is_first(gpu: SimpleNamespace) -> None:
    gpu.capturing = True
    assert not counters(5).any()
    assert not _counters._of_graphs


def test_on_a_cpu() -> None:
    assert not _counters.counters(torch.zeros(1), 7).any()


def test_threads_that_capture_at_once_share_none(gpu: SimpleNamespace) -> None:
    counters(1)
    gpu.capturing = True
    got: list[list[int]] = [[], []]

    def work(mine: list[int]) -> None:
        mine += [counters(3).data_ptr() for _ in range(2000)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in got]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len({*got[0], *got[1]}) == 4000
