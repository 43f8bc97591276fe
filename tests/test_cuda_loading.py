"""Loading the CUDA extension: absent, broken or unfit for this machine, each with its reason and its fix."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from lissom import _cuda, registry
from lissom.ops import int8_embedding


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    extension, reason = _cuda._extension, _cuda.unavailable_reason
    extension.cache_clear()
    reason.cache_clear()
    yield
    extension.cache_clear()
    reason.cache_clear()


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lissom._C_cuda", None)
    assert _cuda.unavailable_reason() == (
        "the CUDA kernels were not built; build them where nvcc is, with: "
        "pip install . -C cmake.define.LISSOM_CUDA=ON"
    )
    with pytest.raises(RuntimeError, match=r"lissom: CUDA kernels are unavailable: .* not built"):
        _cuda.load()


def test_cannot_run_here_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(why_not=lambda: "no kernel was compiled for compute capability 7.5")
    monkeypatch.setitem(sys.modules, "lissom._C_cuda", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "T4")
    monkeypatch.setattr(torch.cuda, "device", lambda i: warnings.catch_warnings())
    with pytest.warns(
        UserWarning, match=r"lissom: the CUDA kernels are passed over: cuda:0 \(T4\): no kernel"
    ):
        reason = _cuda.unavailable_reason()
    assert reason.startswith("cuda:0 (T4): no kernel was compiled for compute capability 7.5; or build them")
    assert _cuda.unavailable_reason() == reason  # without a second warning, which would be an error


def test_order_on_cuda_tensors() -> None:
    names = [b.name for b in registry._candidates["int8_embedding", "cuda"]]
    assert names == ["triton", "cuda", "reference"]


def test_named_but_not_there() -> None:
    table, scale = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)
    with pytest.raises(ValueError, match=r"backend='cuda' does not exist for device 'cpu'"):
        int8_embedding(torch.tensor([1]), table, scale, backend="cuda")
