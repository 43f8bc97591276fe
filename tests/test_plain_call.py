"""The usual call, read in C: both ways of reading a tensor, what is not plain, who must still see the op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lissom
from lissom import _native
from lissom.nn import Int4Linear, Int8Embedding, Int8Linear, SparseLinear

K, N = 48, 40


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    return {
        "int8": Int8Linear.from_linear(linear),
        "int4": Int4Linear.from_linear(linear),
        "sparse": SparseLinear.from_linear(linear, lissom.BlockSparse(sparsity=0.5, block_shape=(8, 1))),
        "sparse int8": SparseLinear.from_linear(
            linear, lissom.BlockSparse(sparsity=0.5, block_shape=(8, 4), dtype="int8")
        ),
    }


@pytest.fixture(params=[True, False], ids=["dlpack", "attributes"])
def reader(request: pytest.FixtureRequest) -> Iterator[bool]:
    native = _native.load()
    try:
        active = native.read_by_dlpack(request.param)
        if request.param and not active:
            pytest.skip(f"torch {torch.__version__} has no DLPack exchange API")
        yield request.param
    finally:
        native.read_by_dlpack(True)


class Seen(TorchDispatchMode):
    """Names of lissom's ops that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "lissom":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "int4", "sparse", "sparse int8"])
def test_direct_calls_give_what_the_op_gives(name: str, dtype: torch.dtype, reader: bool) -> None:
    layer = _layers()[name]
    for shape in [(3, K), (K,), (2, 0, K), (2, 3, 1, K)]:
        x = torch.randn(shape).to(dtype)
        with torch.inference_mode():
            direct = layer(x)
            with Seen() as seen:
                through_op = layer(x)
        assert seen.names, "a dispatch mode must see the op"
        assert direct.dtype == dtype
        assert torch.equal(direct, through_op)


def test_int8_embedding_is_read_both_ways(reader: bool) -> None:
    layer = Int8Embedding.from_embedding(nn.Embedding(20, 8))
    indices = torch.tensor([[0, 19], [3, 3]])
    native = _native.load()
    plain = native.int8_embedding_plain(indices, layer.qweight, layer.weight_scale, torch.float32)
    assert plain is not None
    assert torch.equal(plain, layer(indices))


def _call(layer: nn.Module) -> Callable[[Tensor], Tensor | None]:
    return lambda x: _native.load().int8_linear_plain(
        x, layer.qweight, layer.weight_scale, layer.bias, None, False, None, layer._packed, layer.rotated
    )


@torch.no_grad()
def test_what_is_not_plain_is_refused(reader: bool) -> None:
    layer = _layers()["int8"]
    plain = _call(layer)
    assert plain(torch.randn(3, K)) is not None
    strided = torch.randn(3, 2 * K)[:, ::2]
    refused = [strided, torch.randn(K, 3).T, torch.randn(3, K).double(), torch.randn(3, K, device="meta")]
    for x in refused:
        assert plain(x) is None

    class Wrapper(torch.Tensor):
        pass

    assert plain(torch.randn(3, K).as_subclass(Wrapper)) is None
    assert torch.equal(layer(strided), layer(strided.contiguous()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8", "int4", "sparse", "sparse int8"])
def test_a_negated_view(name: str) -> None:
    """Its memory holds the numbers with the other sign."""
    layer, x = _layers()[name], torch.randn(3, K)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


def test_autograd_transforms_and_profilers_see_the_op() -> None:
    layer = _layers()["sparse"]
    x = torch.randn(5, 3, K)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert layer.values.grad is not None
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            layer(x)
        assert any("block_sparse_linear" in event.key for event in profile.key_averages())
        traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        assert "block_sparse_linear" in traced.code
