"""The GPU benchmark: its code on a CPU (Triton's interpreter, tiny shapes), its figures on made-up points.

Where a path needs CUDA, what it calls there is replaced, so that at least its logic has run before a GPU is
paid for. Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("matplotlib")

from lissom import _triton

if reason := _triton._triton_reason():
    pytest.skip(reason, allow_module_level=True)
if not _triton.interpreted():
    pytest.skip("a GPU runs the benchmark itself: make gpu-bench", allow_module_level=True)

from bench.gpu import __main__ as command
from bench.gpu import figures, floors, linear, losses, sparse, timing
from bench.gpu.timing import Deadline, Faults, Side, Timed, paired

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``--device cpu`` sets it."""
    monkeypatch.setenv("LISSOM_BACKEND", "triton")
    monkeypatch.setenv("LISSOM_AUTOTUNE", "0")


# ------------------------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gpu-bench")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_INTERPRET", "LISSOM_BACKEND", "LISSOM_AUTOTUNE"):
            patch.setenv(name, "1")  # the command sets them; restored afterwards
        code = command.main(["--quick", "--device", "cpu", "--out", str(out)])
    (path,) = out.glob("*.json")
    return code, path, json.loads(path.read_text())


def test_a_smoke_run_has_every_side_and_no_fault(smoke: tuple[int, Path, dict[str, Any]]) -> None:
    code, path, data = smoke
    assert data["faults"] == {}
    assert code == 0
    assert path.stem.startswith("gpu-")
    assert path.stem.endswith("-quick")
    assert {point["m"] for point in data["linear"]} == {1, 17}
    ours = {
        "lissom int8",
        "lissom int8 rotated",
        "lissom int8 weight-only",
        "lissom int4",
        "lissom int4 int8",
    }
    for point in data["linear"]:
        assert set(point["sides"]) >= ours | {"torch bf16"}
        assert point["sides"]["lissom int8"]["sqnr_to_reference_db"] is None, "infinite: the same bits"
        assert point["sides"]["lissom int8"]["eager_seconds"] > 0
        assert point["sides"]["lissom int4"]["speedup_over"]["torch bf16"]["median"] > 0
        assert set(point["sides"]["lissom int4"]) >= {"share_of_hbm", "share_of_peak", "share_of_floor"}
    (blocks,) = data["sparse"]
    assert set(blocks["sides"]) == {"lissom bf16 50 %", "lissom int8 50 %", "torch bf16"}
    assert blocks["sides"]["lissom bf16 50 %"]["density"] == 0.5
    (logits,), (hidden,) = data["losses"], data["linear_losses"]
    for point in (logits, hidden):
        assert set(point["sides"]) == {"lissom", "torch eager", "torch.compile"}
    assert hidden["operations"] == 8 * 6 * 32 * 200


def test_a_smoke_run_says_where_it_ran_and_judges_nothing(
    smoke: tuple[int, Path, dict[str, Any]],
) -> None:
    _, path, data = smoke
    about = data["machine"]
    assert {"torch", "triton"} <= set(about["versions"])
    assert len(about["commit"]) == 40
    assert about["command"]
    assert data["timing"] == "cpu"
    assert {figure["value"] for figure in data["figures"].values()} == {None}
    assert set(data["floors"]) == {"read", "copy", "add", "bf16", "int8"}
    reasons = data["peers_left_out"]
    assert any(name.startswith("torch int4pack") for name in reasons)
    assert any(name.startswith("torch BSR 50 %") for name in reasons)
    page = path.with_suffix(".md").read_text()
    assert "SMOKE RUN" in page
    assert "lissom int8 weight-only" in page
    for part in ("linear", "sparse", "losses"):
        for suffix in (".svg", ".png"):
            assert path.with_name(f"{path.stem}-{part}{suffix}").stat().st_size > 1000


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "give --quick too" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _triton._gpu_reason.cache_clear()
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "nothing to measure: torch finds no CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_grid_is_the_issues() -> None:
    full = command.plan("cuda", quick=False)
    assert full.points == 4 * 6 + 1 + 4 * 6 * 3 + 3
    assert linear.FULL.rows_of(8192, 8192) == [1, 16, 64, 256, 1024, 4096, 8192]
    assert linear.FULL.rows == sparse.FULL.rows == (1, 16, 64, 256, 1024, 4096)
    assert linear.FULL.shapes == ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
    assert sparse.FULL.shapes == linear.FULL.shapes
    assert sparse.FULL.sparsities == (0.5, 0.7, 0.8, 0.9, 0.95)
    assert sparse.FULL.blocks == (32, 64, 128)
    assert losses.FULL.logits == ((8192, 32000), (8192, 128256))
    assert losses.FULL.linear == ((8192, 4096, 128256),)
    assert all((k, n) in linear.FULL.shapes and m in linear.FULL.rows for k, n, m in linear.FULL.compiled)
    assert command.plan("cuda", quick=True, only=["losses"]).points == 2
    assert command.plan("cuda", quick=False, only=["sparse"], short=True).points == 12


def test_a_wrong_kernel_is_not_timed_and_ends_the_run_in_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lissom

    forward = lissom.nn.Int8Linear.forward
    monkeypatch.setattr(
        lissom.nn.Int8Linear,
        "forward",
        lambda self, x: (
            forward(self, x) * (1.25 if sys.modules["os"].environ["LISSOM_BACKEND"] == "triton" else 1)
        ),
    )
    wanted = command.Plan(linear.Grid(((64, 32),), (1,)), None, None, (2, 2))
    data, path = command.run(wanted, CPU, tmp_path, budget=0.0, quick=True)
    (point,) = data["linear"]
    assert not [name for name in point["sides"] if name.startswith("lissom int8")]
    assert "torch bf16" in point["sides"]
    assert data["faults"]["lissom int8 at M=1 64x32"].startswith("AssertionError: wrong: SQNR ")
    assert "## Faults of lissom" in path.with_suffix(".md").read_text()


def test_points_that_the_time_does_not_reach_are_listed(tmp_path: Path) -> None:
    wanted = command.plan("cpu", quick=True)
    data, path = command.run(wanted, CPU, tmp_path, budget=0.0, limit=0.0, quick=True)
    assert not data["linear"] + data["losses"] + data["linear_losses"] + data["sparse"]
    assert data["points_left_out"] == [
        "linear 128x32",
        "losses (5, 300)",
        "linear losses (6, 32, 200)",
        "sparse 64x96 blocks 32",
    ]
    assert "linear 128x32, losses (5, 300)" in path.with_suffix(".md").read_text()


# ------------------------------------------------------------------------------------------- timing


def sides(count: int) -> tuple[list[Side], list[str]]:
    order: list[str] = []
    return [Side(name, [lambda name=name: order.append(name)]) for name in "abcdef"[:count]], order


def test_every_side_and_every_floor_has_a_turn_in_each_round() -> None:
    (a, b), order = sides(2)
    result, notes = paired(
        [a, b], CPU, "", Faults(), probes={"floor": lambda: 5.0}, until=math.inf, rounds=(2, 4)
    )
    assert {name: len(found) for name, found in result.seconds.items()} == {"a": 4, "b": 4}
    assert result.rates == {"floor": [5.0] * 4}
    assert len(result.ratio("a", "b")) == 4
    assert notes == {}
    rounds = [sorted(order[i : i + 2]) for i in range(len(order) - 8, len(order), 2)]
    assert rounds == [["a", "b"]] * 4


def test_when_the_time_is_over_the_least_rounds_remain() -> None:
    (a,), _ = sides(1)
    result, _ = paired([a], CPU, "", Faults(), until=0.0, rounds=(3, 50))
    assert len(result.seconds["a"]) == 3


def test_a_side_that_raises_is_left_out_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ValueError("no such layout\nand more")

    (a,), _ = sides(1)
    faults = Faults()
    both = [a, Side("peer", [broken]), Side("lissom int8", [broken])]
    result, _ = paired(both, CPU, "M=1", faults, until=0.0, rounds=(1, 1))
    assert list(result.seconds) == ["a"]
    assert faults.peers == {"peer at M=1": "ValueError: no such layout"}
    assert faults.ours == {"lissom int8 at M=1": "ValueError: no such layout"}
    assert capsys.readouterr().out == "FAULT: lissom int8 at M=1: ValueError: no such layout\n"


def test_a_deadline_shares_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    deadline = Deadline(100.0, 4)
    assert deadline.next() == 25.0
    clock[0] = 10.0  # it needed less
    assert deadline.next() == 10.0 + 90.0 / 3
    clock[0] = 120.0  # it needed far more
    assert deadline.next() == 120.0
    assert deadline.next() == 120.0


def test_copies_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20)
    )
    assert timing.rotations(8 << 20, GPU) == 25
    assert timing.rotations(470 << 20, GPU) == 1
    assert timing.rotations(0, GPU) == timing.MOST_COPIES
    assert timing.rotations(1, CPU) == 1


class FakeCuda:
    """CUDA as a recorder: a graph holds what was called while it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.log.append("event")
                self.at = cuda.clock

            def synchronize(self) -> None:
                cuda.log.append("wait")

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")
                cuda.clock += 1.3e-4

        @contextmanager
        def graph(_: Graph) -> Iterator[None]:
            cuda.log.append("capture")
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            yield

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda device: stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device: stream,
            "synchronize": lambda device=None: cuda.log.append("synchronize"),
            "_sleep": lambda cycles: cuda.log.append("sleep"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self) -> None:
        self.log.append("call")
        self.clock += 1e-3


def test_a_turn_on_a_gpu_replays_a_graph_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    timed = Timed(Side("a", [cuda.call, cuda.call]), GPU)
    assert cuda.log[:3] == ["call", "call", "synchronize"], "compiled before the capture"
    assert cuda.log[3:10] == ["call"] * 4 + ["capture", "call", "call"]
    assert timed.runs == 8, "a millisecond of replays"
    cuda.log.clear()
    assert timed() == pytest.approx(1.3e-4 / 2), "of one of the two calls"
    assert cuda.log == ["replay", "sleep", "event", *["replay"] * 8, "event", "wait"]


def test_what_cannot_be_captured_is_launched_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, fails=True)
    result, notes = paired([Side("a", [cuda.call])], GPU, "", Faults(), until=0.0, rounds=(1, 1))
    assert result.seconds["a"] == [pytest.approx(1e-3)]
    assert notes == {
        "a": "not in a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    }


def test_eager_time_includes_launching(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert timing.timed_eagerly(Side("a", [cuda.call]), GPU) == pytest.approx(1e-3)
    assert "capture" not in cuda.log
    assert "sleep" not in cuda.log


def test_losses_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    modes: list[bool] = []
    Timed(Side("a", [lambda: modes.append(torch.is_grad_enabled())], graph=False, grad=True), GPU)
    assert "capture" not in cuda.log
    assert set(modes) == {True}


def test_a_floor_reads_everything() -> None:
    source = torch.arange(3 * floors.BLOCK + 17, dtype=torch.int32)
    out = torch.zeros(2, dtype=torch.int32)
    floors.read(source, out, steps=2)
    assert int(out.sum()) == int(source.sum().int())


# ------------------------------------------------------------------------------------------- peers


def test_torchs_int4_kernel_gets_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its documented meaning in place of the kernel: (code - 8) · scale + zero, the even code on top."""

    def kernel(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1).float()
        scale, zero = (scales[..., i].t().float().repeat_interleave(group, 1) for i in (0, 1))
        return (x.float() @ ((codes - 8) * scale + zero).t()).bfloat16()

    monkeypatch.setattr(linear, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda codes, tiles: codes, raising=False)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", kernel, raising=False)
    dense = linear.make_dense(256, 32, CPU)
    one = linear._int4pack(linear.INT4PACK, dense)
    x = torch.randn(3, 256).bfloat16()
    assert linear.sqnr_db(dense(x), one.build()(x)) > 18
    assert one.weight_bytes == 256 * 32 // 2 + 2 * 32 * 4


@pytest.mark.parametrize("m", [17, 40])
def test_int_mm_computes_the_layer(m: int) -> None:
    dense = linear.make_dense(64, 32, CPU)
    x = torch.randn(m, 64).bfloat16()
    assert linear.sqnr_db(dense(x), linear._int_mm("", dense).build()(x)) > 30


def test_torchs_bsr_kernel_gets_its_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.sparse import _triton_ops

    monkeypatch.setattr(sparse, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(
        _triton_ops,
        "bsr_dense_addmm",
        lambda rows, bsr, dense: rows + (bsr.to_dense().float() @ dense.float()).bfloat16(),
        raising=False,
    )
    layer = sparse.Layer(64, 96, 32, [0.5], CPU, Faults())
    (one,) = (c for c in layer.contenders if c.name == "torch BSR 50 %")
    x = torch.randn(5, 64).bfloat16()
    assert sparse._checked(layer, one, one.build(), x) > 40
    assert one.density == 0.5


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's interfaces with the meaning that its documentation gives them."""

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    class LigerKLDIVLoss:
        def __init__(self, reduction: str, log_target: bool) -> None:
            assert (reduction, log_target) == ("batchmean", True)

        __call__ = staticmethod(kl)

    class LigerJSD:
        def __init__(self, beta: float) -> None:
            assert beta == 0.0, "forward KL"

        __call__ = staticmethod(kl)

    class LigerFusedLinearJSD:
        def __init__(self, jsd_beta: float, temperature: float) -> None:
            assert jsd_beta == 0.0
            self.temperature = temperature

        def __call__(self, h: Tensor, w: Tensor, g: Tensor, v: Tensor, labels: None) -> Tensor:
            logits = (F.linear(h, w), F.linear(g, v).detach())
            return kl(*(F.log_softmax(z.float() / self.temperature, -1) for z in logits))

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    for cls in (LigerKLDIVLoss, LigerJSD, LigerFusedLinearJSD):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)


@pytest.mark.usefixtures("liger")
def test_ligers_losses_are_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    for makers in (losses._LOGITS, losses._LINEAR):
        for name in (losses.OURS, losses.COMPILED):
            monkeypatch.delitem(makers, name)
    faults = Faults()
    point = losses.measure_logits(5, 300, CPU, faults, {}, 0.0, (1, 1))
    hidden = losses.measure_linear(6, 32, 200, CPU, faults, {}, 0.0, (1, 1))
    assert set(faults.peers) <= {losses.OURS_CUDA}
    for name in ("Liger KLDiv", "Liger JSD"):
        assert point["sides"][name]["sqnr_db"] > 35
        assert point["sides"][name]["loss_error"] < 0.02
    assert hidden["sides"]["Liger"]["sqnr_db"] > 30
    assert hidden["sides"]["Liger"]["loss_error"] < 0.02


def test_compiled_points_have_a_compiled_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(linear, "_MAKERS", {linear.BASELINE: linear._torch_bf16})
    layer = linear.Layer(64, 32, CPU, Faults())
    point = linear.measure(layer, 17, Faults(), {}, 0.0, compiled=True, rounds=(1, 1))
    assert set(point["sides"]) == {linear.BASELINE, "torch._int_mm compiled"}


# ------------------------------------------------------------------------------------------- figures


def spread(value: float) -> dict[str, float]:
    return {"median": value, "p25": value, "p75": value}


def made_up() -> dict[str, Any]:
    """A result in which every figure has a value that can be told."""

    def side(over: dict[str, float], **more: Any) -> dict[str, Any]:
        return {
            "seconds": spread(1e-3),
            "speedup_over": {k: spread(v) for k, v in over.items()},
            "suspect": False,
            "extra_bytes": 100,
            "sqnr_db": 50.0,
            "gb_per_s": 1.0,
            "tflop_per_s": 460.0,
            **more,
        }

    points = [
        {
            "k": 4096,
            "n": 4096,
            "m": m,
            "rounds": 3,
            "sides": {
                "torch bf16": side({}),
                "lissom int4": side({"torch bf16": 4.0 - m / 16}, share_of_hbm=spread(0.9 - m / 100)),
                "lissom int8": side({"torch bf16": 1.0 + m / 4096, "torch._int_mm": 1.4}),
                "lissom int4 cuda": side(
                    {"torch bf16": 5.0 - m / 16, "lissom int4 triton": 1.3}, share_of_hbm=spread(0.9)
                ),
                "lissom int8 cuda": side(
                    {"torch bf16": 1.8, "lissom int8 triton": 1.1},
                    share_of_hbm=spread(0.82),
                    top_per_s=1310.0,
                ),
            },
        }
        for m in (1, 16, 1024, 4096)
    ]
    points.append(
        {
            "k": 8192,
            "n": 8192,
            "m": 8192,
            "rounds": 3,
            "sides": {"lissom int8 cuda": side({"torch bf16": 1.8}, top_per_s=1310.0)},
        }
    )
    blocks = [
        {
            "k": 4096,
            "n": 4096,
            "m": m,
            "block": block,
            "rounds": 3,
            "sides": {
                "torch bf16": side({}),
                "torch BSR 50 %": side({"torch bf16": 1.0}, density=0.5),
                "lissom bf16 50 %": side({"torch bf16": block / 40, "torch BSR 50 %": 1.1}, density=0.5),
                "lissom bf16 90 %": side(
                    {"torch bf16": block / 8 + m / 1024, "torch BSR 50 %": 9}, density=0.1
                ),
                "lissom cuda bf16 50 %": side(
                    {"torch bf16": block / 34, "lissom bf16 50 %": 1.2, "lissom bf16 90 %": 0.1}, density=0.5
                ),
            },
        }
        for m in (16, 1024)
        for block in (32, 64, 128)
    ]
    peers = {"torch eager": 3.5, "Liger KLDiv": 1.6, "Liger JSD": 1.2}
    return {
        "timing": "cuda",
        "linear": points,
        "sparse": blocks,
        "losses": [
            {
                "rows": 8192,
                "vocab": vocab,
                "rounds": 3,
                "sides": {
                    "lissom": side(peers, share_of_floor=spread(0.7 + vocab / 1e6)),
                    "lissom cuda": side({"lissom triton": 1.05}),
                    "torch eager": side({}, extra_bytes=1000),
                },
            }
            for vocab in (32000, 128256)
        ],
        "linear_losses": [
            {
                "tokens": 8192,
                "hidden": 4096,
                "vocab": 128256,
                "rounds": 3,
                "sides": {
                    "lissom": side({"torch eager": 1.3, "Liger": 2.0}),
                    "torch eager": side({}, extra_bytes=2000),
                },
            }
        ],
        "machine": {
            "gpu": {"name": "NVIDIA H200", "cuda": "12.9", "driver": "575"},
            "commit": "0" * 40,
            "dirty": False,
            "date": "today",
            "versions": {"torch": "2.9", "triton": "3.5"},
            "command": "python -m bench.gpu",
        },
        "floors": {"read": {**spread(4400.0), "unit": "GB/s"}},
        "faults": {},
        "peers_left_out": {"Liger at 1x1": "a | b"},
    }


def test_figures_are_the_worst_points() -> None:
    found = figures.figures(made_up())
    assert set(found) == set(figures.TARGETS)
    expected: dict[str, tuple[float, bool | None, str]] = {
        "int4_over_cublas": (3.0, True, "4096×4096, M=16"),
        "int4_hbm": (0.74, False, "4096×4096, M=16"),
        "int8_over_cublas": (1.25, False, "4096×4096, M=1024"),
        "int8_over_int_mm": (1.4, True, "4096×4096, M=1024"),
        "sparse_over_cublas": (0.8, True, "4096×4096, M=1024, blocks 64, 50 %"),
        "sparse_over_cublas_large": (0.8, True, "4096×4096, M=1024, blocks 64, 50 %"),
        "sparse_over_bsr": (1.1, True, "4096×4096, M=1024, blocks 128, 50 %"),
        "distill_floor": (0.732, False, "8192×32000"),
        "distill_over_eager": (3.5, True, "8192×128256"),
        "distill_over_liger": (1.2, True, "8192×128256"),
        "linear_tflops": (460.0, True, "8192×4096×128256"),
        "linear_memory": (0.05, True, "8192×4096×128256"),
        "linear_over_liger": (2.0, None, "8192×4096×128256"),
        "cuda_int4_over_cublas": (4.0, True, "4096×4096, M=16"),
        "cuda_int4_hbm": (0.9, True, "4096×4096, M=1"),
        "cuda_int4_over_triton": (1.3, True, "4096×4096, M=1"),
        "cuda_int8_tops": (1310.0, True, "8192×8192, M=8192"),
        "cuda_int8_over_cublas": (1.8, True, "8192×8192, M=8192"),
        "cuda_int8_hbm": (0.82, True, "4096×4096, M=1"),
        "cuda_int8_over_triton": (1.1, True, "4096×4096, M=1"),
        "cuda_sparse_over_cublas": (64 / 68, True, "4096×4096, M=1024, blocks 64, 50 %"),
        "cuda_sparse_over_triton": (1.2, True, "4096×4096, M=1024, blocks 128, 50 %"),
        "cuda_distill_ms": (1.0, True, "8192×128256"),
        "cuda_distill_over_triton": (1.05, True, "8192×128256"),
    }
    for name, (value, met, at) in expected.items():
        assert found[name]["value"] == pytest.approx(value), name
        assert (found[name]["met"], found[name]["at"]) == (met, at), name
    assert found["int4_over_cublas"]["points"] == 2
    assert found["sparse_over_cublas"]["points"] == 8


def test_what_was_not_measured_has_no_figure() -> None:
    empty = {"timing": "cuda", "linear": [], "sparse": [], "losses": [], "linear_losses": []}
    assert {f["value"] for f in figures.figures(empty).values()} == {None}
    alone = made_up()
    for point in alone["linear"]:
        point["sides"].pop("lissom int4", None)
    found = figures.figures(alone)
    assert found["int4_over_cublas"]["value"] is None
    assert found["int8_over_cublas"]["value"] == 1.25


def test_the_page() -> None:
    data = made_up()
    page = figures.markdown({**data, "figures": figures.figures(data)})
    assert page.startswith("# NVIDIA H200\n")
    assert "| int4, M ≤ 16: against cuBLAS bf16 | 3 × | ≥ 3 × | met | 4096×4096, M=16 |" in page
    assert "| int4, M ≤ 16: share of HBM's read bandwidth | 74 % | ≥ 75 % | missed |" in page
    assert "| read | 4400 | GB/s |" in page
    assert "### Blocks of 64 × 64; geometric mean over 4096×4096" in page
    assert "| lissom bf16 50 % | 1.60× (0.80) | 1.60× (0.80) |" in page
    assert "a \\| b" in page
    assert "SMOKE" not in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_plots_of_a_result(tmp_path: Path) -> None:
    from bench.gpu.draw import draw

    written = draw(made_up(), tmp_path / "gpu")
    assert sorted(path.name for path in written) == sorted(
        f"gpu-{part}{suffix}" for part in ("linear", "sparse", "losses") for suffix in (".svg", ".png")
    )
    assert not draw({**made_up(), "linear": [], "sparse": [], "losses": []}, tmp_path / "none")


def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        total_memory=141 << 30,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        uuid="1234",
    )
    asked: list[list[str]] = []

    def run(arguments: list[str], **options: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(stdout="575.57, 1980 MHz, 3201 MHz, 700.00 W, 41\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(command.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run, SubprocessError=RuntimeError))
    gpu = command.describe(GPU)["gpu"]
    assert gpu["name"] == "NVIDIA H200"
    assert gpu["capability"] == "9.0"
    assert (gpu["driver"], gpu["sm_clock"], gpu["power_limit"]) == ("575.57", "1980 MHz", "700.00 W")
    assert asked[-1][1] == "--id=GPU-1234"
    monkeypatch.setattr(command.shutil, "which", lambda tool: None)
    assert command.describe(GPU)["gpu"]["driver"] == ""
    assert command.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
