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

from lissom._block_sparse_pieces import cut
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

    def compute(like: Tensor) -> tuple[Tensor, ...]:
        places.append((threading.get_ident(), torch.cuda.current_stream(LIKE.device)))
        return (torch.tensor([len(places)]),)

    here, derived = threading.get_ident(), Derived()
    cuda.capturing = True
    for count in (1, 2):  # the graph's own, and not kept
        assert derived.part("a", compute, LIKE)[0].item() == count
    assert [thread for thread, _ in places] == [here, here]
    cuda.capturing = False
    for _repeat in range(3):
        assert derived.part("a", compute, LIKE)[0].item() == 3
    cuda.capturing = True
    assert derived.part("a", compute, LIKE)[0].item() == 3
    assert len(places) == 3
    assert places[2][0] != here
    assert places[2][1] is cuda.stream


def test_errors_arrive(cuda: FakeCuda) -> None:
    derived = Derived()
    with pytest.raises(ZeroDivisionError):
        derived.part("a", lambda like: (torch.tensor(1 // 0),), LIKE)
    assert derived.part("a", lambda like: (torch.tensor(7),), LIKE)[0].item() == 7


def test_the_cpu_needs_no_thread() -> None:
    assert outside_pools(torch.device("cpu"), threading.get_ident) == threading.get_ident()


class Elsewhere(Tensor):
    """Not on the CPU, for those who ask."""

    is_cpu = False


class OnGpu(Tensor):
    """On a GPU, for those who ask."""

    is_cuda = True


def test_a_check_keeps_what_is_derived() -> None:
    """A captured CUDA graph may read it; but nobody sees changes of tensors made in inference mode."""
    module = sys.modules["lissom.ops.block_sparse_linear"]
    for inference in (False, True):
        with torch.inference_mode(inference):
            w = block_sparse_inputs(BlockSparseCase(6, 64, 64, 0.5, "kept"), (16, 16)).weights
            indices = {name: getattr(w, name).clone() for name in ("crow_indices", "col_indices")}
            w = replace(w, **{name: t.as_subclass(Elsewhere) for name, t in indices.items()})
            known = module._known_of(w.crow_indices, w.col_indices)
            renewed: list[Any] = []
            known.places = before = SimpleNamespace(renew=lambda *indices, to=renewed: to.append(indices))
            pieces = known.pieces
            module._check_indices("op", w)
            assert known.sound == (64, 64, 16, 16)
            assert known.places is before
            assert known.pieces is pieces
            assert bool(renewed) == inference


@pytest.mark.parametrize("inference", [False, True])
def test_parts_are_renewed_where_they_are(inference: bool) -> None:
    derived = Derived()
    with torch.inference_mode(inference):
        source = torch.arange(4)
        (part,) = derived.part("double", lambda source: (source * 2,), source)
        derived.part("negative", lambda source: (-source,), source)
    assert part.is_inference() == inference
    address = part.data_ptr()
    source = torch.arange(4, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            derived.renew(source)
        (again,) = derived.part("double", lambda source: (source * 2,), source)
        assert again is part
        assert part.data_ptr() == address
        assert part.tolist() == [8, 10, 12, 14]
        assert derived.part("negative", lambda source: (-source,), source)[0].tolist() == [-4, -5, -6, -7]
        source = source.clone()


def test_what_was_derived_of_changed_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed in place: in the same memory. Not while a graph is captured; and other memory is another's."""
    module = sys.modules["lissom.ops.block_sparse_linear"]
    crow, col = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    known = module._known_of(crow, col)
    pieces = known.pieces.cut(crow, 3, 1)
    known.sound, known.calls._known[b"a kind"] = (1, 2, 3, 4), None
    assert module._known_of(crow, col) is known
    assert known.sound
    crow.copy_(torch.tensor([0, 2, 3]))
    on_gpu = col.as_subclass(OnGpu)
    module._known[on_gpu] = known
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert module._known_of(crow, on_gpu) is not known
    assert module._known_of(crow, col) is known
    assert not known.sound
    assert not known.calls._known
    assert known.pieces.cut(crow, 3, 1) is pieces
    torch.testing.assert_close(pieces, cut(crow, 3, 1))
    assert module._known_of(crow.clone(), col) is not known


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
        (outside,) = Derived().part("a", lambda like: (torch.ones(100, device="cuda"),), like)
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
