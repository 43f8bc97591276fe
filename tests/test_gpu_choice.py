"""What serves CUDA tensors where nobody names a backend: Triton, or CUDA C++ where that was faster."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lissom import _cuda, registry
from lissom.formats import Int4Weights, pack_int4_fragments
from lissom.reference.distill_loss import DistillOptions
from lissom.registry import Backend

int8_module = importlib.import_module("lissom.ops.int8_linear")

pytestmark = [pytest.mark.cuda, pytest.mark.triton]


@pytest.fixture
def calls(cuda_device: str, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions of the extension that were called, on a GPU that passes for a Hopper."""
    seen: list[str] = []
    real = _cuda.call

    def call(name: str, *args: Any) -> Any:
        seen.append(name)
        return real(name, *args)

    monkeypatch.setattr(_cuda, "call", call)
    monkeypatch.setattr(_cuda, "is_hopper", lambda device: True)
    return seen


def automatic(op: str) -> Callable[..., Any]:
    first = registry._candidates[op, "cuda"][0]
    assert first.name == "triton"
    assert first.automatic is not None
    return first.automatic


def reference(op: str) -> Callable[..., Any]:
    return registry._candidates[op, "cuda"][-1].run


@pytest.mark.parametrize(
    ("rows", "k", "weight_only", "cuda"),
    [
        (1024, 32, False, True),
        (768, 32, False, False),
        (192, 32, False, False),
        (1024, 31, False, False),
        (1024, 32, True, False),
    ],
)
def test_int8_linear(
    cuda_device: str,
    calls: list[str],
    rows: int,
    k: int,
    weight_only: bool,
    cuda: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8_module, "TILES_THAT_FILL", 2 if rows == 192 else 8)
    x = torch.randn(2, rows // 2, k) if rows % 2 == 0 else torch.randn(rows, k)
    q = torch.randint(-127, 128, (8, k), dtype=torch.int8)
    args = (
        x.to(cuda_device),
        q.to(cuda_device),
        torch.rand(8).to(cuda_device),
        None,
        None,
        weight_only,
        None,
    )
    y = automatic("int8_linear")(*args, None, False)
    assert ("int8_linear" in calls) == cuda
    torch.testing.assert_close(y, reference("int8_linear")(*args, None, False), rtol=1e-3, atol=1e-3)


def test_int8_layers_whose_tiles_fill_a_gpu() -> None:
    """As measured on an H200."""
    for m, k, n, faster in (
        (1024, 4096, 4096, True),
        (512, 4096, 4096, False),
        (256, 4096, 14336, True),
        (128, 8192, 28672, False),
        (512, 8192, 8192, True),
        (256, 8192, 8192, False),
    ):
        x, q = torch.empty(m, k, device="meta"), torch.empty(n, k, dtype=torch.int8, device="meta")
        assert int8_module._cuda_is_faster(x, q, x[0], None, None, False) == faster


@pytest.mark.parametrize(
    ("rows", "fragments", "weight_only", "cuda"),
    [
        (16, True, True, True),
        (17, True, True, False),
        (16, False, True, False),
        (16, False, False, False),
    ],
)
def test_int4_linear(
    cuda_device: str, calls: list[str], rows: int, fragments: bool, weight_only: bool, cuda: bool
) -> None:
    weights = Int4Weights(
        torch.randint(0, 256, (8, 32), dtype=torch.uint8).to(cuda_device),
        torch.rand(8, 1).to(cuda_device),
        in_features=64,
        group_size=64,
    )
    x = torch.randn(rows, 64).bfloat16().to(cuda_device)
    packed = pack_int4_fragments(weights, weight_only) if fragments else None
    y = automatic("int4_linear")(x, weights, None, weight_only, None, packed, None, False)
    assert ("int4_linear" in calls) == cuda
    expected = reference("int4_linear")(x, weights, None, weight_only, None, None, None, False)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("vocab", "options", "cuda"),
    [
        (32000, {}, True),
        (31999, {}, False),
        (32000, {"divergence": "reverse"}, False),
        (32000, {"softcap": 30.0}, False),
    ],
)
def test_distill_loss(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], vocab: int, options: dict[str, Any], cuda: bool
) -> None:
    """Only which: rows enough would take an emulator long."""
    from lissom.ops import distill_loss

    module = __import__("sys").modules[distill_loss.__module__]
    logits = torch.zeros(1024, 1, dtype=torch.bfloat16).expand(1024, vocab)
    found = module._cuda_is_faster(logits, logits, None, DistillOptions(**options), 1.0, 1.0, None)
    assert found is cuda
    assert not module._cuda_is_faster(logits[:1023], logits[:1023], None, DistillOptions(), 1.0, 1.0, None)
    assert not module._cuda_is_faster(logits.float(), logits.float(), None, DistillOptions(), 1.0, 1.0, None)
    assert automatic("distill_loss") is not None


def test_a_named_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> str:
        return "named"

    def either() -> str:
        return "chosen"

    monkeypatch.setitem(registry._candidates, ("an_op", "cuda"), [Backend("triton", run, automatic=either)])
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    assert registry.select("an_op", "cuda").run() == "chosen"
    assert registry.select("an_op", "cuda").name == "triton"
    assert registry.select("an_op", "cuda", "triton").run() == "named"
    monkeypatch.setenv("LISSOM_BACKEND", "triton")
    assert registry.select("an_op", "cuda").run() == "named"
    registry._automatic.pop(("an_op", "cuda"), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_cpu_is_a_hopper() -> None:
    _cuda.is_hopper.cache_clear()
    assert not _cuda.is_hopper(torch.device("cpu"))
    assert not _cuda.is_hopper(torch.device("cuda", 0))
