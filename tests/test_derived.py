"""What is kept of other tensors, and where in a GPU's memory it lies."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lissom._derived import Derived, outside_pools
from lissom.formats import BlockSparseWeights
from lissom.ops import block_sparse_linear
from lissom.testing import BlockSparseCase, block_sparse_inputs

LIKE: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))


class FakeCuda:
    """Streams belong to threads, as they do in torch, and events are over at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = threading.local()
        self.capturing = False
        event = SimpleNamespace(query=lambda: True)
        self.streams.now = self.stream = SimpleNamespace(record_event=lambda: event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.streams.now)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self.streams, "now", stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_what_is_kept_is_computed_on_another_thread(cuda: FakeCuda) -> None:
    """Pools serve the thread that asked for them; the stream is the caller's all the same."""
    places: list[tuple[int, Any]] = []

    def compute() -> tuple[Tensor, ...]:
        places.append((threading.get_ident(), torch.cuda.current_stream(LIKE.device)))
        return (torch.tensor([len(places)]),)

    here, derived = threading.get_ident(), Derived()
    cuda.capturing = True
    for count in (1, 2):  # the graph's own, and not kept
        assert derived.part("a", LIKE, compute)[0].item() == count
    assert [thread for thread, _ in places] == [here, here]
    cuda.capturing = False
    for _repeat in range(3):
        assert derived.part("a", LIKE, compute)[0].item() == 3
    cuda.capturing = True
    assert derived.part("a", LIKE, compute)[0].item() == 3
    assert len(places) == 3
    assert places[2][0] != here
    assert places[2][1] is cuda.stream


def test_errors_arrive(cuda: FakeCuda) -> None:
    derived = Derived()
    with pytest.raises(ZeroDivisionError):
        derived.part("a", LIKE, lambda: (torch.tensor(1 // 0),))
    assert derived.part("a", LIKE, lambda: (torch.tensor(7),))[0].item() == 7


def test_the_cpu_needs_no_thread() -> None:
    assert outside_pools(torch.device("cpu"), threading.get_ident) == threading.get_ident()


class Elsewhere(Tensor):
    """Not on the CPU, for those who ask."""

    is_cpu = False


def test_a_check_keeps_what_is_derived() -> None:
    """A captured CUDA graph may read it; but nobody sees changes of tensors made in inference mode."""
    module = sys.modules["lissom.ops.block_sparse_linear"]
    for inference in (False, True):
        with torch.inference_mode(inference):
            w = block_sparse_inputs(BlockSparseCase(6, 64, 64, 0.5, "kept"), (16, 16)).weights
            indices = {name: getattr(w, name).clone() for name in ("crow_indices", "col_indices")}
            w = replace(w, **{name: t.as_subclass(Elsewhere) for name, t in indices.items()})
            known = module._known_of(w.crow_indices, w.col_indices)
            known.places, pieces = object(), known.pieces
            before = known.places
            module._check_indices("op", w)
            assert known.sound == (64, 64, 16, 16)
            assert (known.places is before, known.pieces is pieces) == (not inference, not inference)


class Layer(nn.Module):
    """A weight whose indices nobody has looked at before the first call."""

    def __init__(self, weights: BlockSparseWeights) -> None:
        super().__init__()
        for name in ("values", "crow_indices", "col_indices"):
            self.register_buffer(name, getattr(weights, name).clone())
        self.sizes = weights.out_features, weights.in_features

    def forward(self, x: Tensor) -> Tensor:
        return block_sparse_linear(
            x, self.values, self.crow_indices, self.col_indices, *self.sizes, validated=True
        )


@pytest.mark.gpu
def test_the_first_run_may_be_in_a_pool() -> None:
    """As before torch.compile captures a CUDA graph; then with it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    like = torch.zeros(1, device="cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = torch.ones(100, device="cuda")
        (outside,) = Derived().part("a", like, lambda: (torch.ones(100, device="cuda"),))
    segments = [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]
    assert any(begin <= inside.data_ptr() < end for begin, end in segments)
    assert not any(begin <= outside.data_ptr() < end for begin, end in segments)

    inputs = block_sparse_inputs(BlockSparseCase(6, 64, 64, 0.5, "pool"), (16, 16), kind="normal")
    layer, x = Layer(inputs.weights).cuda(), inputs.x.cuda()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        found = []
        for _repeat in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found.append(compiled(x).clone())
        expected = Layer(inputs.weights)(inputs.x)
    for y in found:
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
