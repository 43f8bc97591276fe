"""What layers keep of their weights, packed for a kernel, follows the weights, however these change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lissom import Int4, _cuda
from lissom.compress.convert import _share
from lissom.formats import Int4Weights
from lissom.nn import Int4Linear, Int8Linear, SparseLinear
from lissom.nn._compressed import CompressedModule
from lissom.testing import assert_same_bits

K, N = 64, 32


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N)


def by_index(seed: int) -> Int4Linear:
    torch.manual_seed(seed)
    weights = Int4Weights(
        torch.randint(0, 256, (N, K // 2), dtype=torch.uint8),
        torch.rand(N, K // 32),
        group_index=(torch.randperm(K) % (K // 32)).int(),
        in_features=K,
        group_size=32,
    )
    return Int4Linear.from_weights(weights)


def sparse(seed: int, dtype: torch.dtype = torch.int8, block_shape: tuple[int, int] = (8, 4)) -> SparseLinear:
    """As many blocks in other places."""
    torch.manual_seed(seed)
    height, width = block_shape
    mask = torch.randperm(N * K // (height * width)).view(N // height, K // width) % 2 == 0
    return SparseLinear.from_mask(linear(seed), mask, block_shape, dtype)


MAKERS: dict[str, Callable[[int], Any]] = {
    "int8": lambda seed: Int8Linear.from_linear(linear(seed)),
    "int4": lambda seed: Int4Linear.from_linear(linear(seed), Int4(group_size=32)),
    "int4 nf4": lambda seed: Int4Linear.from_linear(linear(seed), Int4(codebook="nf4")),
    "int4 group_index": by_index,
    "sparse int8": sparse,
}


@pytest.fixture(params=MAKERS)
def pair(request: pytest.FixtureRequest, needs_native: None) -> tuple[CompressedModule, CompressedModule]:
    """Two layers of a form, with other weights; the first has been called."""
    a, b = MAKERS[request.param](1), MAKERS[request.param](2)
    with torch.no_grad():
        assert not torch.equal(a(x()), b(x()))
    assert a._packed is not None
    return a, b


def x() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(3, K)


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def answers(a: CompressedModule, b: CompressedModule) -> None:
    """As ``b``, with autograd and without."""
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_same_bits(a(x()).detach(), b(x()).detach())


def repacks(monkeypatch: pytest.MonkeyPatch) -> list[CompressedModule]:
    """Layers that packed anew since."""
    seen: list[CompressedModule] = []
    for kind in (Int8Linear, Int4Linear, SparseLinear):

        def repack(self: CompressedModule, real: Any = kind._repack) -> None:
            seen.append(self)
            real(self)

        monkeypatch.setattr(kind, "_repack", repack)
    return seen


Pair = tuple[CompressedModule, CompressedModule]


def test_changes_in_place(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    packed = a._packed
    seen = repacks(monkeypatch)
    with torch.no_grad():
        for name, tensor in state(b).items():
            getattr(a, name).copy_(tensor)
    answers(a, b)
    answers(a, b)
    assert a._packed is packed, "in the memory that it had"
    assert len(seen) <= 2, "once, or twice where indices had to be checked"


def test_assignment(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    with torch.no_grad():
        expected = b(x())
    seen = repacks(monkeypatch)
    for name, tensor in state(b).items():
        setattr(a, name, nn.Parameter(tensor) if name in a._parameters else tensor)
    with torch.no_grad():
        assert_same_bits(a(x()), expected)
        assert seen
        seen.clear()
        assert_same_bits(a(x()), expected)
    assert not seen
    a.bias = None
    with torch.no_grad():
        a(x())
    assert not seen, "nothing is made of the bias"


def test_functional_call(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    with torch.no_grad():
        before = a(x())
        seen = repacks(monkeypatch)
        assert_same_bits(torch.func.functional_call(a, state(b), (x(),)), b(x()))
        assert_same_bits(a(x()), before)
    assert all(isinstance(layer, SparseLinear) for layer in seen), "indices that are new are checked"


def test_tensors_that_stay_in_the_place_of_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As loaders of large models put them there; or the same stand-ins in many calls, and none between."""
    a, b = pair
    state_a, state_b = state(a), state(b)
    with torch.no_grad():
        before, expected = a(x()), b(x())
        a._buffers |= {name: tensor for name, tensor in state_b.items() if name in a._buffers}
        a._parameters |= {name: nn.Parameter(state_b[name]) for name in a._parameters if name in state_b}
        for _ in range(2):
            assert_same_bits(a(x()), expected)
        seen = repacks(monkeypatch)
        assert_same_bits(a(x()), expected)
        assert not seen
        for tensors, right in (*[(state_a, before)] * 3, *[(state_b, expected)] * 3):
            assert_same_bits(torch.func.functional_call(a, tensors, (x(),)), right)
            assert_same_bits(a(x()), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loading(pair: Pair, assign: bool) -> None:
    """Into the same memory, which a captured CUDA graph may read; not into that of replaced tensors."""
    a, b = pair
    kept = {name: a._buffers[name] for name in ("_packed", "_permutation") if name in a._buffers}
    a.load_state_dict(state(b), assign=assign)
    answers(a, b)
    if not assign:
        assert all(a._buffers[name] is tensor for name, tensor in kept.items())


@pytest.mark.parametrize("name", MAKERS)
def test_made_in_inference_mode(needs_native: None, name: str) -> None:
    """Such tensors have no versions: only loading is seen."""
    with torch.inference_mode():
        a, b = MAKERS[name](1), MAKERS[name](2)
        a(x())
        a.load_state_dict(b.state_dict())
        assert_same_bits(a(x()), b(x()))


def test_tied_layers_go_apart(needs_native: None) -> None:
    """What two layers share is not overwritten with what one of them is given."""
    a, b, other = (Int8Linear.from_linear(linear(seed)) for seed in (1, 1, 2))
    _share(b, a)
    assert b._packed is a._packed
    with torch.no_grad():
        before = a(x())
        assert_same_bits(b(x()), before)
        b.qweight, b.weight_scale, b.bias = other.qweight, other.weight_scale, other.bias
        assert_same_bits(b(x()), other(x()))
        assert_same_bits(a(x()), before)
    a, b = (Int8Linear.from_linear(linear(1)) for _ in range(2))
    _share(b, a)
    with torch.no_grad():
        a.qweight.copy_(other.qweight)
        assert_same_bits(a(x()), b(x()))


def test_copies_and_moves(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold, without packing anew in every call."""
    a, _ = pair
    with torch.no_grad():
        expected = a(x())
    buffer = io.BytesIO()
    torch.save(a, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(a), torch.load(buffer, weights_only=False), copy.deepcopy(a)]
    others[2]._apply(lambda tensor: tensor.clone())
    with torch.inference_mode():
        unversioned = copy.deepcopy(a)
        for _ in range(2):
            assert_same_bits(unversioned(x()), expected)
    for layer in others:
        with torch.no_grad():
            assert_same_bits(layer(x()), expected)
            with monkeypatch.context() as patch:
                seen = repacks(patch)
                assert_same_bits(layer(x()), expected)
                assert not seen
                layer.qweight.add_(1) if hasattr(layer, "qweight") else layer.values.add_(1)
                assert not torch.equal(layer(x()), expected)


def test_old_pickles(pair: Pair) -> None:
    """Of before layers looked at what they had packed."""
    layer = pair[0]
    with torch.no_grad():
        expected = layer(x())
        layer.__dict__.pop("_made_of")
        assert_same_bits(layer(x()), expected)


def test_compiled_and_exported(pair: Pair) -> None:
    a, b = pair
    with torch.no_grad():
        a.load_state_dict(state(b))
        assert_same_bits(torch.compile(a, fullgraph=True, backend="aot_eager")(x()), b(x()))
        assert_same_bits(torch.export.export(nn.Sequential(a), (x(),)).module()(x()), b(x()))


@pytest.mark.parametrize("name", ["int8", "sparse int8"])
def test_traced_symbolically(needs_native: None, name: str) -> None:
    layer = MAKERS[name](1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            traced = torch.fx.symbolic_trace(nn.Sequential(layer))
            assert_same_bits(traced(x()).detach(), layer(x()).detach())


# ------------------------------------------------------------------------------------------- graphs


@pytest.mark.cuda
@pytest.mark.parametrize("inference", [False, True])
def test_what_a_captured_graph_reads_follows_a_load(
    cuda_device: str, monkeypatch: pytest.MonkeyPatch, inference: bool
) -> None:
    """Launches are repeated with the addresses that they had, as a graph does, right after a load."""
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    real, launches = _cuda.call, []

    def call(name: str, on: Tensor, *args: Any) -> Any:
        found = real(name, on, *args)
        if not found:
            launches.append((name, on, args))
        return found

    monkeypatch.setattr(_cuda, "call", call)
    blocks = ((1, 0), (1, 1)), ((0, 1), (1, 1))
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in blocks]
    rows = torch.randn(3, 128).bfloat16().to(cuda_device)
    for make in (
        lambda i: Int4Linear.from_linear(nn.Linear(128, 128).bfloat16(), Int4(activation=None)),
        lambda i: SparseLinear.from_mask(nn.Linear(128, 128).bfloat16(), masks[i], (64, 64), torch.bfloat16),
    ):
        with torch.no_grad(), torch.inference_mode(inference):
            a, b = (make(i).to(cuda_device) for i in (0, 1))
            a(rows)
            launches.clear()
            y = a(rows)
            captured = list(launches)
            assert captured
            a.load_state_dict(b.state_dict())
            expected = b(rows)
            y.zero_()
            for name, on, args in captured:
                real(name, on, *args)
            assert_same_bits(y, expected)
