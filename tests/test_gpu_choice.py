"""What serves CUDA tensors where nobody names a backend: Triton, or CUDA C++ where that was faster."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lissom import BlockSparse, Int4, _cuda, _triton, registry
from lissom.formats import Int4Weights, pack_int4_fragments
from lissom.nn import Int4Linear, SparseLinear
from lissom.ops import _library
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


def int4_weights(device: str) -> Int4Weights:
    codes, scale = torch.randint(0, 256, (8, 32), dtype=torch.uint8), torch.rand(8, 1)
    return Int4Weights(codes.to(device), scale.to(device), in_features=64, group_size=64)


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
    weights = int4_weights(cuda_device)
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
    logits = torch.zeros(8192, 1, dtype=torch.bfloat16).expand(8192, vocab)
    found = module._cuda_is_faster(logits, logits, None, DistillOptions(**options), 1.0, 1.0, None)
    assert found is cuda
    for other in (logits[:8191], logits.float(), logits.half()):
        assert not module._cuda_is_faster(other, other, None, DistillOptions(), 1.0, 1.0, None)
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


def test_both_are_named(tiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``explain``, ``doctor`` and ``backend_info``: where CUDA C++ may run, there and only there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    alone = _triton.detail()
    both = f"{alone}; CUDA C++ where that was faster"
    assert "H200" in alone

    def details() -> list[str]:
        ops = ("int8_linear", "block_sparse_linear", "linear_distill_loss")
        return [registry._candidates[op, "cuda"][0].detail() for op in ops]

    assert details() == [both, alone, alone]
    with tiles.autotune():
        assert details() == [both, both, alone]
    monkeypatch.setattr(_cuda, "is_hopper", lambda device: False)
    assert details() == [alone] * 3
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: "not built")
    with tiles.autotune():
        assert details() == [alone] * 3


@pytest.mark.parametrize("absent", [True, False])
def test_what_cuda_leaves_to_triton_needs_no_triton(
    cuda_device: str, absent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the reference serves it, forward and backward, and a warning says so, once an op."""
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    if absent:
        for name in ("interpreter_reason", "unavailable_reason"):
            monkeypatch.setattr(_triton, name, lambda: "triton could not be imported")
    _library._warn_once.cache_clear()
    dense = torch.nn.Linear(64, 32)
    sparse = SparseLinear.from_linear(dense, BlockSparse(0.5, (16, 16))).to(cuda_device)
    int4 = Int4Linear.from_linear(dense, Int4(activation=None)).to(cuda_device)
    x = torch.randn(3, 64, device=cuda_device, requires_grad=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            for layer in (sparse, int4):
                torch.testing.assert_close(
                    layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0.02, atol=0.02
                )
            sparse(x).sum().backward()
    found = sorted(str(one.message).split(" of ")[1].split()[0] for one in said)
    names = ["block_sparse_grad_input", "block_sparse_grad_values", "block_sparse_linear", "int4_linear"]
    assert found == (names if absent else [])
    _library._warn_once.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_cpu_is_a_hopper() -> None:
    _cuda.is_hopper.cache_clear()
    assert not _cuda.is_hopper(torch.device("cpu"))
    assert not _cuda.is_hopper(torch.device("cuda", 0))


# ------------------------------------------------------------------------------- chosen by their times


@pytest.fixture
def tiles(calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that times candidates, with a cache of its own."""
    module = _triton.load("tiles")
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    monkeypatch.delenv("LISSOM_AUTOTUNE", raising=False)
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: "")
    module._winners.cache_clear()
    yield module
    module._winners.cache_clear()


def timed(
    tiles: Any, monkeypatch: pytest.MonkeyPatch, calls: list[str], slower: str, function: str
) -> list[bool]:
    """Lets ``slower`` of the two backends take longer; says which candidates ran CUDA C++."""
    ran: list[bool] = []

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        calls.clear()
        run()
        ran.append(function in calls)
        return 2e-3 if ran[-1] == (slower == "cuda") else 1e-3

    monkeypatch.setattr(tiles, "_seconds", seconds)
    return ran


def int8_arguments(device: str, rows: int = 3, k: int = 32, scale: float = 1.0) -> tuple[Any, ...]:
    x = scale * torch.randn(rows, k)
    q, weight_scale = torch.randint(-127, 128, (8, k), dtype=torch.int8), torch.rand(8)
    return x.to(device), q.to(device), weight_scale.to(device), None, None, False, None, None, False


@pytest.mark.parametrize("slower", ["cuda", "triton"])
def test_tuning_takes_the_faster_backend(
    cuda_device: str, tiles: Any, calls: list[str], slower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call whose guess is Triton; later processes take it without being asked to."""
    args = int8_arguments(cuda_device)
    ran = timed(tiles, monkeypatch, calls, slower, "int8_linear")
    run = automatic("int8_linear")
    with tiles.autotune():
        y = run(*args)
    assert ran[-2:] == [False, True], "the guess, Triton, is timed first; it may have tiles to time before"
    (entry,) = (
        one for one in json.loads(tiles.cache_file(args[0].device).read_text()) if one.startswith("backend")
    )
    assert entry == (
        "backend int8_linear float32[4,32] int8[8,32] float32[8] None None False None None False"
    )
    tiles._winners.cache_clear()
    for rows in (3, 4):
        calls.clear()
        others = int8_arguments(cuda_device, rows)
        found = run(*others)
        assert ("int8_linear" in calls) == (slower == "triton")
        torch.testing.assert_close(found, reference("int8_linear")(*others), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y, reference("int8_linear")(*args), rtol=1e-3, atol=1e-3)
    for other in (int8_arguments(cuda_device, 5), int8_arguments(cuda_device, 3, 48)):
        calls.clear()
        run(*other)
        assert "int8_linear" not in calls, "nothing is known of other sizes"
    monkeypatch.setenv("LISSOM_AUTOTUNE", "0")
    calls.clear()
    run(*args)
    assert "int8_linear" not in calls, "asked not to"


def test_tuning_without_the_extension(
    cuda_device: str, tiles: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "unavailable_reason", lambda: "the CUDA kernels were not built")
    ran = timed(tiles, monkeypatch, calls, "triton", "int8_linear")
    with tiles.autotune():
        automatic("int8_linear")(*int8_arguments(cuda_device))
    assert not any(ran)
    assert not calls


def test_a_backend_that_cannot_serve_a_call_loses(
    cuda_device: str, tiles: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = timed(tiles, monkeypatch, calls, "triton", "int8_linear")
    real = _cuda.call

    def call(name: str, *args: Any) -> Any:
        if name == "int8_linear":
            raise RuntimeError("out of memory")
        return real(name, *args)

    monkeypatch.setattr(_cuda, "call", call)
    args = int8_arguments(cuda_device)
    with tiles.autotune():
        y = automatic("int8_linear")(*args)
    assert not any(ran)
    torch.testing.assert_close(y, reference("int8_linear")(*args), rtol=1e-3, atol=1e-3)


def test_nothing_is_timed_for_no_rows(
    cuda_device: str, tiles: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = timed(tiles, monkeypatch, calls, "triton", "int8_linear")
    with tiles.autotune():
        assert automatic("int8_linear")(*int8_arguments(cuda_device, 0)).shape == (0, 8)
    assert not ran


def test_what_overwrites_its_input_is_not_timed(
    cuda_device: str, tiles: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient may take the place of the logits: after one such run they are gone."""
    ran = timed(tiles, monkeypatch, calls, "cuda", "distill_loss")
    student, teacher = (torch.randn(3, 40, device=cuda_device) for _ in range(2))
    args = (teacher, None, DistillOptions(), 1.0, 1.0)
    expected = torch.empty_like(student)
    with tiles.autotune():
        automatic("distill_loss")(student, *args, expected)
        assert ran[-1]
        ran.clear()
        automatic("distill_loss")(student, *args, student)
    assert not ran
    torch.testing.assert_close(student, expected)


@pytest.mark.parametrize("weight_only", [False, True])
def test_tuning_gives_int4_layers_fragments(
    cuda_device: str, tiles: Any, calls: list[str], weight_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA C++ reads, so that it is timed as it would run; Triton reads the canonical weights."""
    weights = int4_weights(cuda_device)
    int4_module = importlib.import_module("lissom.ops.int4_linear")
    first = registry._candidates["int4_linear", "cuda"][0]
    served = Backend("triton", automatic("int4_linear"), automatic=automatic("int4_linear"))
    assert first.automatic is served.run
    monkeypatch.setattr(registry, "select", lambda op, device, requested=None: served)
    monkeypatch.setattr(_cuda, "is_hopper", lambda device: False)
    assert not int4_module._fragments_serve(weights, weight_only)
    x = torch.randn(40, 64).bfloat16().to(cuda_device)
    ran = timed(tiles, monkeypatch, calls, "triton", "int4_linear")
    with tiles.autotune():
        assert int4_module._fragments_serve(weights, weight_only)
        packed = int4_module.int4_pack(weights, weight_only)
        y = served.run(x, weights, None, weight_only, None, packed, None, False)
    assert ran[-2:] == [False, True]
    expected = reference("int4_linear")(x, weights, None, weight_only, None, None, None, False)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert int4_module._fragments_serve(weights, weight_only), "there are winners that may be CUDA C++'s"


def test_kinds_of_calls() -> None:
    """Rows are rounded wherever they are a size, factors are only 0 or not."""
    kind = _library._kind_of_call
    power = _triton.load("tiles").power_of_two
    student, labels = torch.empty(100, 50), torch.empty(100, dtype=torch.int64)

    def of(options: DistillOptions, rows: int = 100) -> list[str]:
        return kind(student[:rows], (student[:rows], labels[:rows], options, 0.5, torch.tensor(2.0)), power)

    assert of(DistillOptions())[:3] == ["float32[128,50]", "float32[128,50]", "int64[128]"]
    assert of(DistillOptions(temperature=2.0)) == of(DistillOptions(temperature=3.0), 80)
    for other in ({"softcap": 30.0}, {"divergence": "js"}, {"entropy_weight": 0.1}, {"kl_weight": 0.0}):
        assert of(DistillOptions()) != of(DistillOptions(**other)), other
    assert of(DistillOptions()) != of(DistillOptions(), 64)
    assert kind(torch.empty(2, 3, 4, 7), (), power) == ["float32[32,7]"]
    assert kind(torch.empty(2, 3, 4, dtype=torch.int64), (torch.bfloat16,), power) == [
        "int64[32]",
        "torch.bfloat16",
    ]
    assert kind(torch.empty(3, 0), (None, "gelu", True), power) == ["float32[4,0]", "None", "gelu", "True"]
