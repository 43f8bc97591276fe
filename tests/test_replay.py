"""Calls that are repeated (``lissom._replay``): what makes two alike, what is repeated, what is not.

With CUDA C++ kernels, on a GPU or in the emulator; ``tests/test_triton_launch.py`` has Triton's launches.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lissom import _counters, _cuda, _native, _replay, formats, ops, registry
from lissom.choose import choose_int4
from lissom.config import Int4
from lissom.nn import Int4Linear, Int8Linear, SparseLinear
from lissom.testing import assert_same_bits

int8_module = importlib.import_module("lissom.ops.int8_linear")
sparse_module = importlib.import_module("lissom.ops.block_sparse_linear")
int4_module = importlib.import_module("lissom.ops.int4_linear")


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """CPU tensors are taken for those of a GPU."""
    native = _native.module()
    if native is None:
        pytest.skip(f"native extension: {_native.unavailable_reason()}")
    native.call_key_on_cpu(True)
    yield
    native.call_key_on_cpu(False)


def known(calls: _replay.Calls) -> list[_replay._Replay | None]:
    return list(calls._known.values())


# ------------------------------------------------------------------------------------------- whole ops

Case = Callable[[str], dict[str, Any]]
K, N = 96, 40


def int8(m: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Case:
    def make(device: str) -> dict[str, Any]:
        if options.get("input_scale"):
            options["input_scale"] = torch.rand((), device=device) + 0.01
        return {
            "x": torch.randn(m, K, device=device).to(dtype),
            "qweight": torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device),
            "weight_scale": torch.rand(N, device=device),
            "bias": torch.randn(N, device=device),
            **options,
        }

    return make


def int4(m: int, dtype: torch.dtype = torch.bfloat16, zero: bool = True, **options: Any) -> Case:
    def make(device: str) -> dict[str, Any]:
        weight_only = options.get("weight_only", False)
        weights = choose_int4(torch.randn(N, K, device=device), Int4(group_size=32, symmetric=not zero))
        return {
            "x": torch.randn(m, K, device=device).to(dtype),
            "qweight": weights.qweight,
            "weight_scale": weights.weight_scale,
            "zero_point": weights.zero_point,
            "bias": torch.randn(N, device=device),
            "group_size": 32,
            "packed": formats.pack_int4_fragments(weights, weight_only),
            **options,
        }

    return make


CASES: dict[str, tuple[str, Case]] = {
    "int8 one row": ("int8", int8(1)),
    "int8 tiles": ("int8", int8(40, act_fn="gelu", rotated=True)),
    "int8 static": ("int8", int8(3, input_scale=True)),
    "int8 weight-only": ("int8", int8(5, torch.float16, weight_only=True)),
    "int8 batch": ("int8", lambda device: {**int8(6)(device), "x": torch.randn(2, 3, K, device=device)}),
    "int4 one row": ("int4", int4(1, weight_only=True)),
    "int4 few rows": ("int4", int4(16, torch.float16, zero=False, weight_only=True, act_fn="silu")),
    "int4 many rows": ("int4", int4(40, weight_only=True)),
    "int4 int8": ("int4", int4(9, rotated=True)),
}


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_what_is_repeated(on_cpu: None, cuda_device: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, make = CASES[case]
    module, op = {"int8": (int8_module, ops.int8_linear), "int4": (int4_module, ops.int4_linear)}[kind]
    given = [make(cuda_device) for _ in range(5)]
    expected = []
    for arguments in given:
        _replay.forget()
        expected.append(op(**arguments, backend="cuda"))
    _replay.forget()
    for arguments, y in zip(given[:2], expected[:2], strict=True):
        assert_same_bits(op(**arguments, backend="cuda"), y)
    [replay] = known(module._calls)
    assert replay is not None
    monkeypatch.setattr(module, "_run", None)
    for arguments, y in zip(given[2:], expected[2:], strict=True):
        again = op(**arguments, backend="cuda")
        assert again.shape == y.shape
        assert_same_bits(again, y)


@pytest.mark.cuda
def test_calls_of_other_kinds_are_not(on_cpu: None, cuda_device: str) -> None:
    arguments = int8(4)(cuda_device)
    others: dict[str, dict[str, Any]] = {
        "rows": {"x": arguments["x"][:3]},
        "strides": {"x": arguments["x"].t().contiguous().t()},
        "dtype": {"x": arguments["x"].half()},
        "place": {"x": torch.randn(4 * K + 1, device=cuda_device).bfloat16()[1:].view(4, K)},
        "no bias": {"bias": None},
        "bias": {"bias": arguments["bias"].half()},
        "act_fn": {"act_fn": "relu"},
        "rotated": {"rotated": True},
        "weight-only": {"weight_only": True},
    }
    given = [arguments] + [{**arguments, **other} for other in others.values()]
    expected = [ops.int8_linear(**one, backend="reference") for one in given]
    _replay.forget()
    for _ in range(3):
        for one, y, name in zip(given, expected, ["all", *others], strict=True):
            again = ops.int8_linear(**one, backend="cuda")
            if name == "weight-only":
                torch.testing.assert_close(again, y, rtol=0.02, atol=0.5)
            else:
                assert_same_bits(again, y)
    replays = known(int8_module._calls)
    assert len(replays) == len(given)
    assert replays.index(None) == 2, "transposed rows are copied, which torch does"
    assert replays.count(None) == 1


@pytest.mark.cuda
def test_bad_input_is_found_after_repetitions(on_cpu: None, cuda_device: str) -> None:
    arguments = int8(4)(cuda_device)
    for _ in range(3):
        ops.int8_linear(**arguments, backend="cuda")
    for name, value in (
        ("weight_scale", torch.rand(N + 1, device=cuda_device)),
        ("qweight", torch.zeros(N, K + 1, dtype=torch.int8, device=cuda_device)),
        ("x", torch.zeros(4, K, dtype=torch.float64, device=cuda_device)),
        ("act_fn", "tanh"),
    ):
        with pytest.raises((TypeError, ValueError), match="int8_linear: "):
            ops.int8_linear(**{**arguments, name: value}, backend="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layers(on_cpu: None, cuda_device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of a size share what was recorded, and each has its own weights."""
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    make: Any = Int8Linear if kind == "int8" else Int4Linear
    layers = [make.from_linear(torch.nn.Linear(K, N).to(cuda_device)) for _ in range(4)]
    with torch.no_grad():
        for x in (torch.randn(3, K, device=cuda_device), torch.randn(1, K, device=cuda_device)):
            expected = [layer(x) for layer in layers]
            _replay.forget()
            for _ in range(3):
                for layer, y in zip(layers, expected, strict=True):
                    assert_same_bits(layer(x), y)
    assert len(known((int8_module if kind == "int8" else int4_module)._calls)) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_sparse_layers(
    on_cpu: None, cuda_device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the places of its own blocks, for as long as nobody changes them."""
    monkeypatch.setenv("LISSOM_BACKEND", "cuda")
    linear = torch.nn.Linear(192, 128).bfloat16().to(cuda_device)
    masks = [
        torch.tensor(rows, dtype=torch.bool, device=cuda_device)
        for rows in ([[1, 0, 0], [0, 1, 0]], [[0, 1, 1], [0, 0, 1]])
    ]
    layers = [SparseLinear.from_mask(linear, mask, (64, 64), dtype=dtype) for mask in masks]
    with torch.no_grad():
        for m in (3, 70):
            x = torch.randn(m, 192, device=cuda_device).bfloat16()
            expected = []
            for layer in layers:
                _replay.forget()
                expected.append(layer(x))
            for _ in range(4):
                for layer, y in zip(layers, expected, strict=True):
                    assert_same_bits(layer(x), y)
            for layer in layers:
                found = sparse_module._known_of(layer.crow_indices, layer.col_indices)
                replays = known(found.calls)
                assert replays
                assert None not in replays
        layer = layers[0]
        layer.col_indices.copy_(torch.tensor([2, 0]))
        for _ in range(4):
            y = layer(x)
        torch.testing.assert_close(
            y, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0.05, atol=0.05
        )


# ------------------------------------------------------------------------------------------- keys


def key_of(*arguments: Any) -> bytes | None:
    native = _native.load()
    found = native.call_key(arguments)
    return None if found is None else found[0]


@pytest.fixture(params=[True, False], ids=["dlpack", "attributes"])
def reader(request: pytest.FixtureRequest, on_cpu: None) -> Iterator[None]:
    native = _native.load()
    if native.read_by_dlpack(request.param) != request.param:
        pytest.skip(f"torch {torch.__version__} has no DLPack exchange API")
    yield
    native.read_by_dlpack(True)


def aligned(*shape: int, dtype: torch.dtype = torch.float32, past: int = 0) -> Tensor:
    """Whose first element lies ``past`` bytes past a multiple of 64."""
    count = 1
    for size in shape:
        count *= size
    memory = torch.zeros(count * dtype.itemsize + 256, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + past
    return memory[start : start + count * dtype.itemsize].view(dtype).view(shape)


def test_alike(reader: None) -> None:
    x = aligned(3, 4)
    assert key_of(x, None, True, 3, "gelu") == key_of(aligned(3, 4), None, True, 3, "gelu")
    assert _native.load().call_key((x, None, x[1]))[1] == (x.data_ptr(), x[1].data_ptr())


def test_not_alike(reader: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = aligned(3, 4)
    kinds: list[tuple[Any, ...]] = [
        (x,),
        (x, None),
        (x, True),
        (x, False),
        (x, 1),
        (x, 2),
        (x, "1"),
        (x, torch.float16),
        (x, torch.float32),
        (x, x),
        (aligned(4, 3),),
        (aligned(3, 4, 1),),
        (aligned(4, 3).t(),),
        (aligned(12),),
        (aligned(3, 4, dtype=torch.int32),),
        (aligned(3, 4, past=4),),
        (aligned(3, 4, past=16),),
        (aligned(3, 4, past=32),),
    ]
    keys = [key_of(*kind) for kind in kinds]
    for name in ("LISSOM_BACKEND", "LISSOM_AUTOTUNE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            keys.append(key_of(x))
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_has_no_key(reader: None) -> None:
    x = torch.zeros(3, 4)

    class Wrapper(torch.Tensor):
        pass

    for argument in (
        x[:0],
        x.as_subclass(Wrapper),
        x.to("meta"),
        x.double(),
        torch.zeros([1] * 9),
        1.5,
        [1],
        1 << 70,
        "\ud800",
        torch.float64,
    ):
        assert key_of(x, argument) is None
    assert key_of(1) is None
    _native.load().call_key_on_cpu(False)
    assert key_of(x) is None


# ------------------------------------------------------------------------------------------- recordings


class Kernel:
    """Adds a number to bytes, by address, in place of a kernel; it knows how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def kernel(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(_cuda, "load", lambda: type("Module", (), {"kernel": kernel}))
    return kernel


def repeated(run: Callable[..., Tensor], *arguments: Any) -> bool:
    """Whether a call is repeated from the third on."""
    calls, ran = _replay.Calls(), []

    def counted(*arguments: Any) -> Tensor:
        ran.append(1)
        return run(*arguments)

    for _ in range(4):
        assert calls(counted, *arguments) is not None
    assert len(ran) in (2, 4)
    return len(ran) == 2


def test_pointers(kernel: Kernel) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        out, a, b = torch.empty(2, 3), torch.empty(300, dtype=torch.uint8), torch.empty(7)
        arrived = _counters.counters(x, 5)
        pointers = (x.data_ptr(), y[1:].data_ptr(), a.data_ptr(), b[2:].data_ptr(), out.data_ptr())
        _cuda.call("kernel", x, *pointers, arrived.data_ptr(), 17, 0)
        return out.view(6)

    x, y = torch.zeros(4), torch.zeros(5)
    assert repeated(run, x, y)
    for call in kernel.calls:
        assert call[:2] == (x.data_ptr(), y.data_ptr() + 4)
        assert call[6:] == (17, 0, 0)
    a, b = kernel.calls[-1][2:4]
    assert b == a + 512 + 8, "one allocation, pieces at multiples of 256 bytes"


def test_no_tensor_is_kept(kernel: Kernel) -> None:
    """Nor what a descriptor for TMA is of, as Triton's are: a call's memory may belong to a graph."""

    class Descriptor:
        def __init__(self, base: Tensor) -> None:
            self.base, self.shape = base, [4]

    told = []

    def take(*arguments: Any) -> None:
        told.append(arguments[0].base.data_ptr())
        assert arguments[0].shape == [4]

    def run(x: Tensor) -> Tensor:
        out, between = torch.empty(4), torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), between.data_ptr(), out.data_ptr())
        if (seen := _replay.recording()) is not None:
            held.extend(weakref.ref(one) for one in (x, between, out))
            seen.launched(take, (Descriptor(x), x), by_name=False)
        return out

    held: list[weakref.ref[Tensor]] = []
    calls = _replay.Calls()
    for _ in range(3):
        x = torch.zeros(4)
        calls(run, x)
    assert len(held) == 3
    assert told == [x.data_ptr()]
    assert [one() for one in held] == [None, None, None]


def test_two_launches(kernel: Kernel) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        _cuda.call("kernel", x, out.data_ptr(), 3)
        return out

    assert repeated(run, torch.zeros(4))
    assert len(kernel.calls) == 8
    assert kernel.calls[-1][0] == kernel.calls[-2][1]


def test_a_query_is_not_a_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = type("Module", (), {"kernel": kernel, "query": lambda *_: asked.append(1) or 8})
    monkeypatch.setattr(_cuda, "load", lambda: module)

    def run(x: Tensor) -> Tensor:
        out = torch.empty(_cuda.call("query", x))
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        return out

    assert repeated(run, torch.zeros(4))
    assert (len(asked), len(kernel.calls)) == (2, 4)


OTHER = torch.zeros(4)


def no_launch(x: Tensor) -> Tensor:
    return torch.empty(4)


def an_operation(x: Tensor) -> Tensor:
    out = torch.empty(4)
    _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
    return out.add_(1)


def a_copy(x: Tensor) -> Tensor:
    out, x = torch.empty(4), x.clone()
    _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
    return out


def a_tensor_of_elsewhere(x: Tensor) -> Tensor:
    out = torch.empty(4)
    _cuda.call("kernel", x, OTHER.data_ptr(), out.data_ptr())
    return out


def an_object(x: Tensor) -> Tensor:
    out = torch.empty(4)
    _cuda.call("kernel", x, x.data_ptr(), object())
    return out


def an_input_returned(x: Tensor) -> Tensor:
    _cuda.call("kernel", x, x.data_ptr())
    return x


def part_of_an_allocation(x: Tensor) -> Tensor:
    out = torch.empty(4)
    _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
    return out[:2]


@pytest.mark.parametrize(
    "run",
    [
        no_launch,
        an_operation,
        a_copy,
        a_tensor_of_elsewhere,
        an_object,
        an_input_returned,
        part_of_an_allocation,
    ],
)
def test_what_cannot_be_repeated(kernel: Kernel, run: Callable[[Tensor], Tensor]) -> None:
    assert not repeated(run, torch.zeros(4))


def test_a_pointer_into_two_tensors(kernel: Kernel) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), y.data_ptr(), out.data_ptr())
        return out

    x = torch.zeros(8)
    assert not repeated(run, x, x)
    assert not repeated(run, x, x[4:])
    assert repeated(run, x[:4], x[4:])


def test_tuning_is_not_recorded(kernel: Kernel) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty(4)
        if (seen := _replay.recording()) is not None and len(kernel.calls) < 2:
            seen.again = True
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        return out

    calls = _replay.Calls()
    x = torch.zeros(4)
    for _ in range(2):
        calls(run, x)
    assert not calls._known
    calls(run, x)
    assert len(calls._known) == 1


def test_an_error_leaves_nothing(kernel: Kernel) -> None:
    def run(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    calls = _replay.Calls()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory"):
            calls(run, torch.zeros(4))
    assert _replay.recording() is None
    assert not calls._known


def test_what_makes_all_be_forgotten(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        return out

    calls, x = _replay.Calls(), torch.zeros(4)

    def learn() -> None:
        for _ in range(2):
            calls(run, x)
        assert calls._known

    learn()
    monkeypatch.setattr(registry, "_candidates", {})
    registry.register("an_op", "cpu", registry.Backend("reference", run))
    assert not calls._known
    learn()
    tiles = pytest.importorskip("lissom.kernels.tiles")
    with tiles.autotune():
        assert not calls._known
        learn()
    assert not calls._known


def test_turned_off(run_python: Callable[..., Any]) -> None:
    script = """
import torch
from lissom import _native, _replay
_native.load().call_key_on_cpu(True)
calls = _replay.Calls()
print(calls(lambda x: x, torch.zeros(4)))
"""
    assert run_python(script, LISSOM_REPLAY="0").stdout.strip() == "None"
    assert "tensor" in run_python(script).stdout


def test_kinds_are_not_kept_without_end(kernel: Kernel) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        return out

    calls = _replay.Calls(most=3)
    for size in range(1, 10):
        for _ in range(3):
            calls(run, torch.zeros(size))
        assert len(calls._known) <= 3


def test_threads_that_record_at_once_leave_torch_compile_alone(kernel: Kernel) -> None:
    """A dispatch mode is known to the whole process, unless it says that it is torch's business only."""
    calls = _replay.Calls()
    steps = [threading.Event() for _ in range(3)]  # the first records; so does the second; the first is done

    def first(x: Tensor) -> Tensor:
        steps[0].set()
        assert steps[1].wait(60)
        return torch.empty(4)

    def second(x: Tensor) -> Tensor:
        steps[1].set()
        assert steps[2].wait(60)
        return torch.empty(5)

    def one() -> None:
        calls(torch.clone, torch.zeros(4))
        calls(first, torch.zeros(4))
        steps[2].set()

    def other() -> None:
        calls(torch.clone, torch.zeros(5))
        assert steps[0].wait(60)
        calls(second, torch.zeros(5))

    threads = [threading.Thread(target=work) for work in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(step.is_set() for step in steps)
    assert not is_in_torch_dispatch_mode(include_infra_modes=False)
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    assert torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(torch.zeros(3)).tolist() == [1] * 3
    assert compiled


def test_what_is_forgotten_while_it_is_recorded(kernel: Kernel) -> None:
    calls = _replay.Calls()

    def run(x: Tensor) -> Tensor:
        out = torch.empty(4)
        _cuda.call("kernel", x, x.data_ptr(), out.data_ptr())
        if _replay.recording() is not None:
            calls.forget()
        return out

    for _ in range(2):
        calls(run, torch.zeros(4))
    assert not calls._known
