"""Models and layers on a GPU: converting, moving, capturing, compiling, streams, several GPUs, bad input.

What does not need CUDA itself also runs in Triton's interpreter on CPU tensors (``device``), so that these
tests have run before a GPU sees them. The ops' own numbers are held to the reference in ``test_triton_*.py``.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lissom
from lissom import BlockSparse, Int4, Int8, _cuda, _replay, _triton, compress_, registry
from lissom.compress import measure, pipeline, sparsity
from lissom.compress.measure import PairedTiming
from lissom.nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, SparseLinear
from lissom.ops import distill_loss, int8_linear, linear_distill_loss
from lissom.prune import default_block_shape
from lissom.testing import assert_same_bits, use

WIDTH = 64


@pytest.fixture
def device(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or the CPU with Triton's kernels, interpreted, in place of the native ones."""
    if triton_device == "cpu":
        monkeypatch.setenv("LISSOM_BACKEND", "triton")
        return torch.device("cpu")
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU."""
    if triton_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    return torch.device("cuda", torch.cuda.current_device())


class Model(nn.Module):
    """An embedding, a block with an activation module, a norm, a head; returns logits ``[..., 40]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.up = nn.Linear(WIDTH, 96)
        self.act = nn.GELU()
        self.down = nn.Linear(96, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = self.norm(h + self.down(self.act(self.up(h))))
        return self.head(h)


def make_model(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(0)
    return Model().to(device, dtype).eval()


def ids(device: torch.device, rows: int = 2, length: int = 3) -> Tensor:
    return (torch.arange(rows * length) * 7 % 50).view(rows, length).to(device)


def served_by_triton(module: nn.Module) -> bool:
    """Whether a layer's op has Triton kernels on its device."""
    op = {Int8Linear: "int8_linear", Int4Linear: "int4_linear", SparseLinear: "block_sparse_linear"}
    op |= {Int8Embedding: "int8_embedding", Int4Embedding: "int4_embedding"}
    return any(b.name == "triton" for b in registry._candidates[op[type(module)], module._like.device.type])


RECIPES: dict[str, Any] = {
    "int8": Int8(prefer="size"),
    "int8 static": Int8(activation="static", prefer="size"),
    "int8 weight-only": Int8(activation=None, prefer="size"),
    "int8 smooth": Int8(smooth=0.5, rotation=False, prefer="size"),
    "int4": Int4(prefer="size", group_size=32),
    "int4 int4": Int4(prefer="size", group_size=32, embeddings="int4"),
    "int4 nf4": Int4(prefer="size", group_size=32, codebook="nf4"),
    "int4 k-means": Int4(prefer="size", group_size=32, codebook="kmeans"),
    "int4 weight-only": Int4(activation=None, prefer="size", group_size=32),
    "sparse": BlockSparse(0.5, (16, 16), dtype="bfloat16", prefer="size"),
    "sparse auto": BlockSparse(0.5, "auto", dtype="bfloat16", prefer="size"),
    "sparse wanda global": BlockSparse(0.5, (16, 16), "bfloat16", "wanda", "global", prefer="size"),
    "sparse int8": BlockSparse(0.5, (32, 32), dtype="int8", prefer="size"),
    "sparse 8x1": BlockSparse(0.5, (8, 1), dtype="bfloat16", prefer="size"),
}

IN_THE_INTERPRETER = ("int8", "int8 static", "int4 int4", "int4 weight-only", "sparse auto", "sparse int8")
"""It takes seconds for each."""

LINEARS = ("up", "down", "head")


def needs_time(name: str, device: torch.device) -> None:
    """Skip on the CPU what a GPU does in no time."""
    if device.type == "cpu" and name not in IN_THE_INTERPRETER:
        pytest.skip("Triton's interpreter is too slow for all of them")


def converted(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Model:
    model = make_model(device, dtype)
    compress_(model, RECIPES[name], calibration=[ids(device)])
    return model


REPEATED = 5e-3
"""Of the same call: sums of a split K may meet in another order, and bfloat16 then rounds otherwise."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float(((found - expected).norm() / expected.norm()).detach())


# ------------------------------------------------------------------------------------------- compress_


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes seconds for what is timed many times; a GPU times it for real."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(measure, "time_pair", lambda *_, **__: PairedTiming(10.0, 5.0, 0.5, 3))
        monkeypatch.setattr(
            measure, "time_each", lambda functions, *_: [float(i) for i in range(1, len(functions) + 1)]
        )


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
@pytest.mark.parametrize("name", RECIPES)
def test_a_model_on_the_gpu_is_converted(device: torch.device, name: str) -> None:
    """Everything that is made lies on the GPU, Triton serves it, and it computes what the CPU computes."""
    needs_time(name, device)
    model = make_model(device)
    dense = model(ids(device))
    report = compress_(model, RECIPES[name], example_inputs=ids(device))
    by_name = {layer.name: layer for layer in report.layers}
    for linear in LINEARS:
        if "neither smaller" in by_name[linear].reason:  # a block may be larger than these small layers
            assert name == "sparse auto"
            continue
        assert by_name[linear].status == "converted", by_name[linear].reason
        assert by_name[linear].ratio is not None
        if served_by_triton(getattr(model, linear)):
            assert by_name[linear].backend == "triton"
            assert " triton " in str(report)
    assert report.cosine is not None
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device == device
    assert (report.device != "") == (device.type == "cuda")
    y = model(ids(device))
    assert y.device == device
    assert y.dtype == dense.dtype
    with use("reference"):
        expected = model(ids(device))
    assert relative_error(y, expected) < 0.02


@pytest.mark.triton
def test_do_no_harm_on_the_real_clock(device: torch.device) -> None:
    """Whatever is faster here: every layer has its reason, and the model works."""
    model = make_model(device)
    report = compress_(model, Int8(), example_inputs=ids(device, 1, 2))
    for layer in report.layers:
        if layer.status == "kept dense":
            assert layer.reason
        else:
            assert layer.status == "converted"
    assert model(ids(device)).isfinite().all()


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
def test_explain_names_triton(device: torch.device) -> None:
    model = make_model(device)
    compress_(model, Int8(prefer="size"), example_inputs=ids(device))
    kernels = {layer.name: layer.kernel for layer in lissom.explain(model).layers}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    assert kernels["up"].startswith("triton 3.")
    assert kernels["up"].endswith(where)
    assert kernels["up"].count("triton") == 1


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
def test_saved_and_loaded(device: torch.device, tmp_path: Path) -> None:
    model = make_model(device)
    compress_(model, Int4(prefer="size", group_size=32), example_inputs=ids(device))
    lissom.save(model, tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved", Model().bfloat16()).to(device).eval()
    for key, tensor in model.state_dict().items():
        assert_same_bits(loaded.state_dict()[key].cpu(), tensor.cpu())
    assert relative_error(loaded(ids(device)), model(ids(device))) < REPEATED


def test_blocks_that_auto_chooses_among() -> None:
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert sparsity.fast_block_shapes(gpu) == ((16, 16), (32, 32), (64, 64), (128, 128))
    assert (8, 1) in sparsity.fast_block_shapes(cpu)
    assert default_block_shape(BlockSparse(), gpu) == default_block_shape(BlockSparse(dtype="int8"), gpu)
    assert default_block_shape(BlockSparse(), gpu) == (32, 32)
    assert default_block_shape(BlockSparse(block_shape=(8, 4)), gpu) == (8, 4)
    assert default_block_shape(BlockSparse(), cpu) == (8, 1)


def test_the_clock_waits_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(device.index))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call() -> None:
        log.append("call")
        clock[0] += 0.25e-3

    devices = (torch.device("cuda", 0), torch.device("cpu"), torch.device("cuda", 1))
    timing = measure.time_pair(call, call, devices=devices, budget_s=0.0, min_rounds=1)
    assert log[:5] == [0, 1, "call", 0, 1]
    assert log[-8:] == [0, 1, *["call"] * 4, 0, 1], "a millisecond of calls a sample"
    assert timing.before_us == pytest.approx(250)
    log.clear()
    assert measure.time_each([call], devices, rounds=1) == [pytest.approx(250)]
    assert log[-12:] == [0, 1, *["call"] * 8, 0, 1]


def test_a_whole_model_is_timed_on_all_its_devices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert pipeline._devices(model) == [torch.device("cpu"), torch.device("meta")]
    assert pipeline._gpu_names(model) == ""


# ------------------------------------------------------------------------------------------- out of memory


def out_of_memory(after: int) -> Callable[..., None]:
    """Raises what torch raises where a GPU is full, at the call number ``after``."""
    calls = [0]

    def maybe(*_: Any, **__: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return maybe


def snapshot(model: nn.Module) -> tuple[list[type], dict[str, Tensor]]:
    return [type(m) for m in model.modules()], {k: t.clone() for k, t in model.state_dict().items()}


def assert_as_before(model: nn.Module, before: tuple[list[type], dict[str, Tensor]]) -> None:
    assert [type(m) for m in model.modules()] == before[0]
    for key, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[1][key])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def fill(monkeypatch: pytest.MonkeyPatch, layer: type[Any], after: int) -> None:
    """Let the GPU be full at the repacking number ``after``; a layer made of another repacks twice."""
    made, full = layer._repack, out_of_memory(after)
    monkeypatch.setattr(layer, "_repack", lambda self: (full(), made(self))[1])


UNCHANGED = (
    r"compress_: CUDA out of memory\. Tried .*; the model was left unchanged\. Give smaller example_inp"
)


@pytest.mark.triton
@pytest.mark.parametrize("after", [0, 3])
def test_out_of_memory_while_layers_are_made(
    device: torch.device, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was made so far is dropped, and the model is as it was."""
    model = make_model(device)
    before = snapshot(model)
    fill(monkeypatch, Int8Linear, after)
    with pytest.raises(torch.OutOfMemoryError, match=UNCHANGED):
        compress_(model, Int8(prefer="size"))
    assert_as_before(model, before)


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
def test_out_of_memory_while_layers_are_measured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be measured stays dense; the rest is converted."""
    model = make_model(device)
    fill(monkeypatch, Int8Linear, 0)
    report = compress_(model, Int8(prefer="size"), example_inputs=ids(device))
    outcome = {layer.name: (layer.status, layer.reason) for layer in report.layers}
    assert outcome.pop("embed")[0] == "converted"
    why = ("kept dense", "the GPU has no room to measure it in a run of the model")
    assert outcome == dict.fromkeys(LINEARS, why)
    assert model(ids(device)).isfinite().all()

    model = make_model(device)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"strict=True.*(\n.*)*up: kept dense: the GPU has no room"):
        compress_(model, Int8(prefer="size"), example_inputs=ids(device), strict=True)
    assert_as_before(model, before)


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
def test_out_of_memory_after_measuring(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(device)
    before = snapshot(model)
    fill(monkeypatch, Int8Linear, 2 * len(LINEARS) + 1)
    with pytest.raises(torch.OutOfMemoryError, match=UNCHANGED):
        compress_(model, Int8(prefer="size"), example_inputs=ids(device))
    assert_as_before(model, before)


@pytest.mark.triton
@pytest.mark.usefixtures("short_timing")
def test_out_of_memory_while_both_models_are_compared(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(device)
    before = snapshot(model)
    monkeypatch.setattr(measure, "compare_outputs", out_of_memory(0))
    with pytest.raises(torch.OutOfMemoryError, match=r"compress_: CUDA out of memory.* left unchanged"):
        compress_(model, Int8(prefer="size"), example_inputs=ids(device))
    assert_as_before(model, before)


def test_out_of_memory_in_the_models_own_run_is_not_blamed_on_the_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(torch.device("cpu"))
    before = snapshot(model)
    monkeypatch.setattr(model.norm, "forward", out_of_memory(0))
    with pytest.raises(torch.OutOfMemoryError, match=r"compress_: CUDA out of memory") as caught:
        compress_(model, Int8(), example_inputs=ids(torch.device("cpu")))
    assert "runs on these inputs" not in str(caught.value)
    assert_as_before(model, before)


def grouped_layer(device: torch.device, activation: Any = "int8") -> Int4Linear:
    """Whose groups are no runs of neighbours, so that it holds an order of its inputs besides."""
    torch.manual_seed(0)
    layer = Int4Linear(WIDTH, 96, group_size=32, group_index=True, activation=activation)
    layer.qweight.random_(256)
    layer.weight_scale.uniform_(0.01, 0.02)
    layer.load_state_dict({**layer.state_dict(), "group_index": torch.arange(WIDTH, dtype=torch.int32) % 2})
    return layer.requires_grad_(False).to(device)


def test_without_memory_for_packing_a_layer_works_without() -> None:
    """As if it came from a GPU: what was packed there is gone, and there is no room for packing here."""
    source = grouped_layer(torch.device("cpu"))
    x = torch.randn(3, WIDTH)
    layer = copy.deepcopy(source).to("meta")
    with pytest.MonkeyPatch.context() as patch:
        fill(patch, Int4Linear, 0)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            layer.to_empty(device="cpu")
    assert layer._packed is None
    assert layer._permutation is None
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():  # not load_state_dict, which packs
            tensor.copy_(source.state_dict()[name])
        assert_same_bits(layer(x), source(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_out_of_memory_while_moving(gpu: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the model has moved; going back gives what there was."""
    model = converted(name, torch.device("cpu"))
    before, expected = snapshot(model), model(ids(torch.device("cpu")))
    with monkeypatch.context() as patch:
        fill(patch, type(model.down), 1)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            model.to(gpu)
    model.to("cpu")
    assert_as_before(model, before)
    assert_same_bits(model(ids(torch.device("cpu"))), expected)
    model.to(gpu)
    assert model(ids(gpu)).isfinite().all()


# ------------------------------------------------------------------------------------------- moving


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_to_the_gpu_and_back(gpu: torch.device, name: str) -> None:
    """Values stay; what is packed is a cache of each device."""
    cpu = torch.device("cpu")
    model = converted(name, cpu)
    before, expected = snapshot(model), model(ids(cpu))
    model.to(gpu)
    for key, tensor in model.state_dict().items():
        assert tensor.device == gpu
        assert_same_bits(tensor.cpu(), before[1][key])
    y = model(ids(gpu))
    assert relative_error(y, expected) < 0.02
    for linear in LINEARS:
        x = torch.randn(5, getattr(model, linear).in_features, dtype=torch.bfloat16)
        layer = getattr(model, linear)
        on_gpu = layer(x.to(gpu)).cpu()
        with use("reference"):
            assert relative_error(on_gpu, copy.deepcopy(layer).to(cpu)(x)) < 0.02
    model.to(cpu)
    assert_as_before(model, before)
    assert_same_bits(model(ids(cpu)), expected)
    again = copy.deepcopy(model).to(gpu)
    assert relative_error(again(ids(gpu)), y) < REPEATED


@pytest.mark.gpu
def test_int8_layers_have_the_cpus_bits(gpu: torch.device) -> None:
    layer = Int8Linear.from_linear(nn.Linear(200, 136), Int8(rotation=True))
    x = torch.randn(9, 200)
    with torch.no_grad():
        assert_same_bits(layer(x), copy.deepcopy(layer).to(gpu)(x.to(gpu)).cpu())


@pytest.mark.gpu
def test_a_device_that_does_not_exist(gpu: torch.device) -> None:
    model = converted("int4", gpu)
    before = snapshot(model)
    expected = model(ids(gpu))
    with pytest.raises((RuntimeError, AssertionError)):
        model.to(f"cuda:{torch.cuda.device_count()}")
    assert_as_before(model, before)
    assert relative_error(model(ids(gpu)), expected) < REPEATED


@pytest.mark.gpu
def test_a_state_dict_from_the_cpu_is_loaded_on_the_gpu(gpu: torch.device) -> None:
    source, target = converted("int8", torch.device("cpu")), converted("int8", gpu)
    with torch.no_grad():
        target.up.qweight.zero_()
    target.load_state_dict(source.state_dict())
    assert target.up.qweight.device == gpu
    assert relative_error(target(ids(gpu)), source(ids(torch.device("cpu")))) < 0.02


# ------------------------------------------------------------------------------------------- each op


OTHER_WAYS = ("sparse auto", "sparse wanda global", "int8 smooth")
"""Recipes that lead to the same layers as others do."""

NAMES = (
    *(name for name in RECIPES if name not in OTHER_WAYS),
    "int8 embedding",
    "int4 int4 embedding",
    "int4 group_index",
    "int4 group_index weight-only",
    "distill_loss",
    "distill_loss labels",
    "linear_distill_loss",
)
"""One call of each op and form."""

Call = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function of tensors, and tensors to call it with."""


def make_call(name: str, device: torch.device) -> Call:
    """The call; a loss returns its gradients."""
    torch.manual_seed(0)
    if name.startswith("int4 group_index"):
        layer = grouped_layer(device, None if name.endswith("weight-only") else "int8")
        return layer, (torch.randn(3, WIDTH, device=device).bfloat16(),)
    if name.endswith("embedding"):
        return converted(name.removesuffix(" embedding"), device).embed, (ids(device),)
    if name in RECIPES:
        return converted(name, device).up, (torch.randn(3, WIDTH, device=device).bfloat16(),)
    if name == "linear_distill_loss":
        states = torch.randn(2, 6, 32, device=device).bfloat16()
        heads = torch.randn(2, 300, 32, device=device).bfloat16()
        return _linear_loss, (states[0], heads[0], states[1], heads[1])
    logits = torch.randn(2, 6, 300, device=device).bfloat16()
    labels = torch.tensor([3, 299, 0, -100, 7, 7], device=device)
    options = {"labels": labels, "ce_weight": 1.0} if name.endswith("labels") else {}
    return partial(_loss, **options), (logits[0], logits[1])


def _loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        (grad,) = torch.autograd.grad(distill_loss(leaf, teacher, temperature=2.0, **options), leaf)
    return grad


def _linear_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    with torch.enable_grad():
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        value = linear_distill_loss(*leaves, teacher_hidden=teacher, teacher_weight=head, temperature=2.0)
        return torch.cat(torch.autograd.grad(value, leaves))


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_each_call_agrees_with_the_reference(device: torch.device, name: str) -> None:
    function, tensors = make_call(name, device)
    with torch.no_grad():
        y = function(*tensors)
        with use("reference"):
            expected = function(*tensors)
    assert y.shape == expected.shape
    assert y.device == device
    assert relative_error(y, expected) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs(gpu: torch.device, name: str) -> None:
    """Captured once, replayed on other inputs."""
    function, tensors = make_call(name, gpu)
    others = tuple(t.flip(0) for t in tensors)
    with torch.no_grad():
        expected = [function(*tensors), function(*others)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        held = tuple(t.clone() for t in tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function(*held)
        for given, wanted in zip((tensors, others, tensors), (*expected, expected[0]), strict=True):
            for tensor, source in zip(held, given, strict=True):
                tensor.copy_(source)
            graph.replay()
            torch.cuda.synchronize()
            assert relative_error(y, wanted) < REPEATED


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int4", "int4 weight-only", "sparse", "sparse int8"])
def test_a_whole_model_in_a_cuda_graph(gpu: torch.device, name: str) -> None:
    model = converted(name, gpu)
    x = ids(gpu)
    with torch.no_grad():
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        torch.cuda.synchronize()
    assert relative_error(y, expected) < REPEATED


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_gpu(gpu: torch.device, name: str) -> None:
    """Every call is queued, and Python goes on."""
    function, tensors = make_call(name, gpu)
    with torch.no_grad():
        function(*tensors)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(*tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")


REPEATED_LAYERS: dict[str, Any] = {
    "int8": lambda linear: Int8Linear.from_linear(linear),
    "int8 weight-only": lambda linear: Int8Linear.from_linear(linear, Int8(activation=None)),
    "int4": lambda linear: Int4Linear.from_linear(linear),
    "int4 weight-only": lambda linear: Int4Linear.from_linear(linear, Int4(activation=None)),
    "sparse": lambda linear: SparseLinear.from_linear(linear, BlockSparse(0.5, (64, 64), "bfloat16")),
    "sparse int8": lambda linear: SparseLinear.from_linear(linear, BlockSparse(0.5, (64, 64), "int8")),
}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 640])
@pytest.mark.parametrize("name", REPEATED_LAYERS)
def test_calls_are_repeated(gpu: torch.device, name: str, rows: int) -> None:
    """One by one, on another stream, and captured; inputs and weights are those of the call."""
    torch.manual_seed(0)
    linears = [nn.Linear(1024, 4096, device=gpu, dtype=torch.bfloat16) for _ in range(2)]
    layers = [REPEATED_LAYERS[name](linear) for linear in linears]
    given = torch.randn(3, rows, 1024, device=gpu).bfloat16()
    with torch.inference_mode():
        expected = []
        for x in given:
            _replay.forget()
            expected.append([layer(x) for layer in layers])
        side = torch.cuda.Stream()
        for turn in range(6):
            stream = side if turn in (3, 4) else torch.cuda.current_stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for x, wanted in zip(given, expected, strict=True):
                    for layer, y in zip(layers, wanted, strict=True):
                        assert relative_error(layer(x), y) < REPEATED
        found = [replay for calls in _replay._all for replay in calls._known.values()]
        dense = "weight-only" in name and rows == 640
        assert found
        assert (None in found) == dense, "products of many rows with dense weights are torch's"
        held = given[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layers[0](held)
        for x, wanted in zip(given, expected, strict=True):
            held.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            assert relative_error(y, wanted[0]) < REPEATED


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_other_streams(gpu: torch.device, name: str) -> None:
    """A launch goes to the stream that is current, behind what was queued on it before."""
    function, tensors = make_call(name, gpu)
    with torch.no_grad():
        expected = function(*tensors)
        stream = torch.cuda.Stream()
        held = tuple(torch.zeros_like(t) for t in tensors)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # late on this stream: a launch on another one would see zeros
            for tensor, source in zip(held, tensors, strict=True):
                tensor.copy_(source)
            y = function(*held)
        stream.synchronize()
        assert relative_error(y, expected) < REPEATED


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_second_gpu(gpu: torch.device, name: str) -> None:
    """Tensors say where a launch goes, not the current device, which stays what it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    function, tensors = make_call(name, other)
    with torch.no_grad():
        y = function(*tensors)
        assert y.device == other
        assert torch.cuda.current_device() == gpu.index
        with use("reference"):
            assert relative_error(y, function(*tensors)) < 0.01


@pytest.mark.gpu
def test_a_model_on_the_second_gpu_is_converted(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    model = make_model(other)
    report = compress_(model, Int8(prefer="size"), example_inputs=ids(other))
    assert len(report.converted) == 4
    assert model(ids(other)).device == other
    assert torch.cuda.current_device() == gpu.index


@pytest.mark.triton
@pytest.mark.parametrize(
    "name", ["int8", "int8 weight-only", "int4", "int4 weight-only", "sparse", "sparse int8"]
)
def test_compiles_without_breaks(device: torch.device, name: str) -> None:
    needs_time(name, device)
    model = converted(name, device)
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for rows in (1, 2, 5) if device.type == "cuda" else (1, 3):
            expected = model(ids(device, rows))
            assert relative_error(compiled(ids(device, rows)), expected) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int4", "sparse"])
def test_compiles_into_a_cuda_graph(gpu: torch.device, name: str) -> None:
    model = converted(name, gpu)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        expected = model(ids(gpu))
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(ids(gpu)).clone()
            assert relative_error(y, expected) < 0.02


@pytest.mark.triton
@pytest.mark.parametrize("name", ["int8", "int4 weight-only", "sparse"])
def test_training_through_a_converted_model(device: torch.device, name: str) -> None:
    """Gradients of what still trains (norm, biases, sparse values) as the reference's."""
    model = converted(name, device, torch.float32).train()
    grads = []
    for backend in (None, "reference"):
        model.zero_grad()
        if backend is None:
            model(ids(device)).square().sum().backward()
        else:
            with use(backend):
                model(ids(device)).square().sum().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert "norm.weight" in grads[0]
    for key, grad in grads[0].items():
        assert relative_error(grad, grads[1][key]) < 0.01, key


# ------------------------------------------------------------------------------------------- bad input


def test_mixed_devices_are_named() -> None:
    """As a CPU tensor among CUDA ones; the meta device stands for the other one here."""
    there = "cuda" if torch.cuda.is_available() else "meta"
    where = str(torch.empty(0, device=there).device)
    cpu = torch.device("cpu")
    int8, int4 = converted("int8", cpu), converted("int4 int4", cpu)
    sparse = converted("sparse", cpu)
    x = torch.randn(3, WIDTH, device=there).bfloat16()
    fix = rf"is on cpu but the input is on {where}; move the layer with \.to\('{where}'\)"
    for model in (int8, int4, sparse):
        with pytest.raises(ValueError, match=fix):
            model.up(x)
    for model in (int8, int4):
        with pytest.raises(ValueError, match=fix):
            model.embed(torch.zeros(3, dtype=torch.int64, device=there))
    with pytest.raises(ValueError, match=rf"bias is on cpu but the input is on {where}"):
        int8_linear(
            x,
            torch.zeros(4, WIDTH, dtype=torch.int8, device=there),
            torch.zeros(4, device=there),
            bias=torch.zeros(4),
        )
    logits = torch.randn(3, 10, device=there)
    with pytest.raises(ValueError, match=r"teacher_logits .*cpu"):
        distill_loss(logits, torch.randn(3, 10))
    hidden, weight = torch.randn(3, 8, device=there), torch.randn(10, 8, device=there)
    with pytest.raises(ValueError, match=r"teacher_logits .*cpu"):
        linear_distill_loss(hidden, weight, teacher_logits=torch.randn(3, 10))


@pytest.mark.gpu
def test_a_layer_on_the_cpu_called_with_a_cuda_tensor_and_back(gpu: torch.device) -> None:
    model = converted("int4", gpu)
    with pytest.raises(ValueError, match=r"is on cuda:\d+ but the input is on cpu; move the layer with"):
        model.up(torch.randn(3, WIDTH).bfloat16())
    assert model(ids(gpu)).isfinite().all()


@pytest.mark.gpu
def test_without_triton_the_reference_serves_with_one_warning(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("int8", gpu)
    expected = model(ids(gpu))
    monkeypatch.setattr(registry, "_automatic", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    for reason in (_triton._triton_reason, _triton._driver_reason):
        reason.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                y = model(ids(gpu))
        said = [str(w.message) for w in caught if "slow reference backend" in str(w.message)]
        ops = [text.split()[1] for text in said]
        assert len(ops) == len(set(ops)), "once for each op"
        if _cuda.unavailable_reason():  # else its kernels take over what they have
            assert set(ops) == {"int8_linear", "int8_embedding"}
        assert all("triton could not be imported" in text for text in said)
        assert relative_error(y, expected) < 0.02
    finally:
        monkeypatch.undo()
        for reason in (_triton._triton_reason, _triton._driver_reason):
            reason.cache_clear()
        registry._automatic.clear()


# ------------------------------------------------------------------------------------------- tuning


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own; in the interpreter candidates run once and are not timed."""
    tiles = _triton.load("tiles")
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    monkeypatch.delenv("LISSOM_AUTOTUNE", raising=False)
    tiles._winners.cache_clear()
    yield tmp_path
    tiles._winners.cache_clear()


@pytest.mark.triton
@pytest.mark.parametrize("name", ["int8", "int4", "int4 weight-only", "sparse", "sparse int8"])
def test_tuning_is_asked_for_shown_and_kept(
    device: torch.device, name: str, tuning: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing without being asked; then a line on stderr, a file, and the same result."""
    needs_time(name, device)
    function, tensors = make_call(name, device)
    with torch.no_grad():
        before = function(*tensors)
        assert capsys.readouterr().err == ""
        assert not list(tuning.iterdir())
        with _triton.load("tiles").autotune():
            tuned = function(*tensors)
        said = capsys.readouterr().err
        again = function(*tensors)
        assert capsys.readouterr().err == ""
    for y in (tuned, again):
        assert relative_error(y, before) < 1e-2, "another tile sums in another order"
    if said:  # an op with one candidate for this shape has nothing to tune
        assert "lissom: tuned " in said
        (file,) = tuning.iterdir()
        assert json.loads(file.read_text())
