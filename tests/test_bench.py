"""The benchmark runner's logic, on tiny shapes; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("matplotlib")

from bench import (
    bench_block_sparse_linear,
    bench_distill_loss,
    bench_int4_linear,
    bench_int8_embedding,
    bench_int8_linear,
    bench_minilm_int4,
    floors,
    linear_grid,
    plot,
    report,
    runner,
)
from bench.peers import (
    Peer,
    Prepared,
    block_sparse_forms,
    block_sparse_peers,
    linear_peers,
    linear_peers_int4,
    lissom_forms,
    lissom_forms_int4,
)
from bench.peers.ort_int4 import OrtInt4
from bench.peers.torch_int4 import TorchInt4
from bench.peers.torch_sparse import TorchSparse

TINY = runner.Budget(seconds=0.05, min_rounds=2, max_rounds=3)

pytestmark = pytest.mark.filterwarnings("ignore:lissom. .* runs on the slow reference backend")


def test_sqnr_of_a_known_error() -> None:
    x = torch.full((100,), 10.0)
    assert runner.sqnr_db(x, x + 1.0) == pytest.approx(20.0)
    assert runner.sqnr_db(x, x) == math.inf
    assert math.isnan(runner.sqnr_db(x, x * math.nan))


def test_geometric_mean_and_spread() -> None:
    assert runner.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(runner.geometric_mean([]))
    assert runner.spread([3.0]) == {"median": 3.0, "p25": 3.0, "p75": 3.0}
    assert runner.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0}


def test_paired_gives_every_side_every_round_and_the_same_inputs() -> None:
    seen: dict[str, set[float]] = {"a": set(), "b": set()}

    def side(name: str) -> runner.Side:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen[name].add(float(x[0, 0]))
            return x

        return runner.Side(name, Prepared(run, 0))

    result = runner.paired(
        [side("a"), side("b")],
        lambda g: [torch.randn(1, 1, generator=g)],
        probes={"floor": lambda: 5.0},
        budget=runner.Budget(10.0, 3, 3),
    )
    assert {name: len(s) for name, s in result.seconds.items()} == {"a": 3, "b": 3}
    assert result.rates == {"floor": [5.0] * 3}
    assert seen["a"] == seen["b"]
    assert len(seen["a"]) == 4  # fresh in the calibration and in each of the three rounds
    assert result.calls_per_chunk["a"] > 1  # short calls are timed in chunks
    assert len(result.ratio("a", "b")) == 3


def test_budget_ends_the_rounds_but_not_before_the_least() -> None:
    side = runner.Side("a", Prepared(lambda x: x, 0))
    result = runner.paired([side], lambda g: [torch.randn(1)], budget=runner.Budget(0.0, 2, 50))
    assert len(result.seconds["a"]) == 2


def test_a_wrong_kernel_is_not_timed() -> None:
    expected = torch.randn(4, 4)
    wrong = runner.Side("lissom int8", Prepared(lambda x: -expected, 0))
    with pytest.raises(AssertionError, match=r"lissom int8: SQNR .* not timed"):
        runner.check([wrong], torch.randn(4, 4), expected, must_pass=["lissom int8"])
    assert runner.check([wrong], torch.randn(4, 4), expected, must_pass=[])["lissom int8"] < 0
    misshapen = runner.Side("peer", Prepared(lambda x: expected[:2], 0))
    with pytest.raises(AssertionError, match=r"peer: result has shape \(2, 4\)"):
        runner.check([misshapen], torch.randn(4, 4), expected, must_pass=[])


def test_sides_are_held_to_their_own_weights_and_then_to_the_layer() -> None:
    x, expected, own = torch.randn(4, 4), torch.full((4, 4), 10.0), torch.full((4, 4), 13.0)
    side = runner.Side("lissom int4", Prepared(lambda x: own, 0, exact=lambda x: own + 0.01))
    assert runner.check([side], x, expected, must_pass=["lissom int4"])["lissom int4"] > 60
    coarse = runner.check([side], x, expected, must_pass=["lissom int4"], bar=5.0, own_weights=False)
    assert coarse["lissom int4"] == pytest.approx(20 * math.log10(10 / 3))
    with pytest.raises(AssertionError, match=r"lissom int4: SQNR 10.5 dB against fp32 is below 12.0 dB"):
        runner.check([side], x, expected, must_pass=["lissom int4"], bar=12.0, own_weights=False)


def named(peers: Iterable[Peer]) -> list[Any]:
    """Test parameters, each side once."""
    return [pytest.param(peer, id=name) for name, peer in {p.name: p for p in peers}.items()]


@pytest.mark.parametrize(
    "peer", named([*lissom_forms(), *linear_peers(), *lissom_forms_int4(), *linear_peers_int4()])
)
def test_every_side_computes_the_layer(peer: Peer) -> None:
    if peer.available():
        pytest.skip(peer.available())
    weight, bias = linear_grid.make_layer(128, 80)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    call = peer.prepare(weight, bias, 5, 1)
    y, layer = call(x), x @ weight.t() + bias
    assert y.dtype == torch.float32
    assert runner.sqnr_db(layer, y) > (20 if call.exact is None else linear_grid.MIN_SQNR_TO_FP32_DB)
    if call.exact is not None:
        assert runner.sqnr_db(call.exact(x), y) > 30


def test_a_shape_that_a_peer_cannot_take_is_left_out() -> None:
    peers = [TorchInt4(32), OrtInt4(32)]
    fitting, sides, unfit = linear_grid.prepare_sides(peers, 33, 17, 3, 1)
    assert [p.name for p in fitting] == [s.name for s in sides] == ["ONNX Runtime int4 g32"]
    assert unfit == {"torch int4 bf16 g32 at 33x17": "K=33 must be a multiple of 32 and N=17 of 16"}


@pytest.mark.parametrize(
    "peer",
    named([*block_sparse_forms(0.5, [(8, 1), (16, 16)], [(8, 4), (8, 1)]), *block_sparse_peers(0.5)]),
)
def test_every_block_sparse_side_computes_its_own_weights(peer: Peer) -> None:
    if peer.available():
        pytest.skip(peer.available())
    weight, bias = linear_grid.make_layer(128, 80)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    call = peer.prepare(weight, bias, 5, 1)
    assert call.exact is not None
    y = call(x)
    assert y.dtype == torch.float32
    assert runner.sqnr_db(call.exact(x), y) > bench_block_sparse_linear.MIN_SQNR_DB[peer.precision]
    assert runner.sqnr_db(x @ weight.t() + bias, y) < 10  # half of the weights are gone
    bytes_per_value = {"fp32": 4, "bf16": 2, "int8": 1}[peer.precision]
    assert call.weight_bytes > 128 * 80 // 2 * bytes_per_value


def test_torch_blocks_that_mkl_cannot_take() -> None:
    assert TorchSparse(0.5, (8, 1)).available() == "MKL Sparse takes square blocks only"
    peers = [TorchSparse(0.5), TorchSparse(0.5, (4, 4))]
    _, sides, unfit = linear_grid.prepare_sides(peers, 33, 17, 3, 1)
    assert [s.name for s in sides] == ["torch CSR"]
    assert unfit == {"torch BSR 4x4 at 33x17": "N=17 must be a multiple of 4 and K=33 of 4"}


def test_block_sparse_grid_has_fewer_points_at_fewer_threads() -> None:
    grid = ((384, 384), (33, 17)), (1, 8, 32), (1, 2), (0.3, 0.5, 0.9)
    full = bench_block_sparse_linear.cases(*grid, full=True)
    assert len(full) == len(set(full)) == 2 * 3 * 2 * 3
    part = bench_block_sparse_linear.cases(*grid, full=False)
    assert [c for c in full if c.threads == 2] == [c for c in part if c.threads == 2]
    assert {(c.m, c.sparsity) for c in part if c.threads == 1} == {
        (m, s) for m in (1, 32) for s in (0.5, 0.9)
    }
    alone = bench_block_sparse_linear.cases(*grid[:2], (1,), (0.3,), full=False)
    assert len(alone) == 2 * 3


def test_block_sparse_writes_results_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench_block_sparse_linear.run(
        shapes=((64, 48), (33, 17)),
        rows=(1, 32),
        threads=(1,),
        sparsities=(0.5, 0.9),
        blocks=((8, 1), (4, 4)),
        int8_blocks=((8, 4),),
        budget=TINY,
        out=tmp_path,
        quick=True,
    )
    data = json.loads(path.read_text())
    assert path.name.startswith("block_sparse_linear-")
    assert path.stem.endswith("-quick")
    assert len(data["points"]) == 8
    point = data["points"][1]
    assert (point["k"], point["n"], point["sparsity"], point["m"]) == (64, 48, 0.5, 32)
    sides = point["sides"]
    ours = {"lissom fp32 8x1", "lissom fp32 4x4", "lissom bf16 8x1", "lissom int8 8x4"}
    assert ours | {"torch fp32", "lissom int8"} <= sides.keys()
    if not TorchSparse(0.5).available():
        assert {"torch CSR", "torch BSR 4x4"} <= sides.keys()
        assert "torch BSR 4x4 at 33x17" in data["left_out"]
        assert "left out: torch BSR 4x4 at 33x17: N=17 must be" in capsys.readouterr().out
    assert point["best_fp32"] in ("lissom fp32 8x1", "lissom fp32 4x4")
    assert point["best_int8"] == "lissom int8 8x4"
    assert point["best_dense"] in ("torch fp32", "ONNX Runtime fp32")
    assert sides[point["best_dense"]]["speedup_over_best_dense"]["median"] == 1
    assert sides["lissom fp32 8x1"]["density"] == pytest.approx(0.5)
    assert sides["lissom fp32 8x1"]["bytes_over_density"] == pytest.approx(
        1 + 4 / 32 + 4 * 7 / (0.5 * 4 * 64 * 48), rel=1e-4
    )
    assert sides["lissom int8 8x4"]["speedup_over_dense_int8"]["median"] > 0
    assert len(data["crossovers"]) == 2 * 2 * 4  # shapes, M, lissom's sparse sides
    assert len(data["backward"]) == 2
    assert data["backward"][0]["best"] in ("lissom fp32 8x1", "lissom fp32 4x4")
    for name in ("best_m32_s50_worst", "few_rows_share_worst", "int8_vs_dense_int8_worst", "bytes_8x1_worst"):
        assert data["figures"][name]["met"] is not None
    assert data["figures"]["best_m32_s30_worst"]["met"] is None  # not measured here
    assert data["figures"]["gflops_1024x4096_m128_s90"]["value"] is None
    assert all(p.stat().st_size > 1000 for p in plot.draw(path))


def sparse_point(**changes: Any) -> dict[str, Any]:
    """A point at 1024×4096 where the best dense layer takes 1 s, 8×1 0.25 s, 16×16 0.2 s, int8 0.1 s."""
    point: dict[str, Any] = {"k": 1024, "n": 4096, "m": 32, "threads": 2, "sparsity": 0.9}
    point |= {"best_dense": "torch fp32", "best_fp32": "lissom fp32 16x16", "best_int8": "lissom int8 8x4"}

    def side(seconds: float, precision: str, block_shape: list[int] | None, **more: Any) -> dict[str, Any]:
        found = {"precision": precision, "seconds": runner.spread([seconds]), "dense_gflops": 300 / seconds}
        found["speedup_over_best_dense"] = runner.spread([1 / seconds])
        return found | ({"block_shape": block_shape} if block_shape else {}) | more

    point["sides"] = {
        "torch fp32": side(1.0, "fp32", None),
        "lissom fp32 8x1": side(0.25, "fp32", [8, 1], bytes_over_density=1.13),
        "lissom fp32 16x16": side(0.2, "fp32", [16, 16], bytes_over_density=1.01),
        "lissom int8 8x4": side(0.1, "int8", [8, 4], speedup_over_dense_int8=runner.spread([1.5])),
    }
    return point | changes


def test_block_sparse_figures(capsys: pytest.CaptureFixture[str]) -> None:
    points = [
        sparse_point(),
        sparse_point(m=128),
        sparse_point(sparsity=0.8, m=512),
        sparse_point(m=1, sparsity=0.5),
        sparse_point(threads=1, k=384),
    ]
    backward = [
        {"k": k, "n": k, "m": 512, "sparsity": 0.9, "threads": 2, "best": name}
        | {"sides": {name: {"speedup_over_torch": runner.spread([speed])}}}
        for name, speed, k in (("lissom fp32 8x1", 5.0, 768), ("lissom fp32 16x16", 3.0, 384))
    ]
    found = bench_block_sparse_linear.figures(points, backward)
    expected = {
        "best_m32_s90_worst": (5.0, False),
        "best_m32_s80_worst": (5.0, True),
        "best_m32_s50_worst": (None, None),
        "gflops_1024x4096_m128_s90": (1500.0, True),
        "gflops_1024x4096_m32_s90": (1500.0, True),
        "few_rows_share_worst": (2.5, True),
        "small_blocks_share_worst": (0.8, True),
        "int8_m32_s80_worst": (10.0, True),
        "int8_vs_dense_int8_worst": (1.5, True),
        "backward_m512_s90_worst": (3.0, False),
        "backward_m512_s90_geomean": (math.sqrt(15), None),
        "backward_8x1_m512_s90_worst": (5.0, None),
        "bytes_8x1_worst": (1.13, True),
    }
    for name, (value, met) in expected.items():
        assert found[name]["value"] == (None if value is None else pytest.approx(value)), name
        assert found[name]["met"] is met, name
    assert found["small_blocks_share_worst"]["at"] == "1024×4096 M=32, 90 %, 2 threads"
    assert found["few_rows_share_worst"]["at"] == "1024×4096 M=1, 50 %, 2 threads"
    assert found["backward_m512_s90_worst"]["at"] == "384×384 M=512, 90 %, 2 threads"
    assert found["best_m32_s30_worst"]["at"] == ""
    report.print_figures(found)
    assert "384×384 M=512, 90 %, 2 threads" in capsys.readouterr().out


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import lissom.ops

    right = lissom.ops.block_sparse_grad_values
    monkeypatch.setattr(lissom.ops, "block_sparse_grad_values", lambda *a, **k: -right(*a, **k))
    monkeypatch.setattr(bench_block_sparse_linear, "paired", lambda *a, **k: pytest.fail("was timed"))
    with pytest.raises(
        AssertionError, match=r"lissom fp32 8x1: gradients at K=33, N=17, M=4: SQNR .* not timed"
    ):
        bench_block_sparse_linear.measure_backward(33, 17, 1, [(8, 1)], TINY, m=4)


def test_floor_kinds() -> None:
    assert floors.compute_kind("scalar") == ""
    assert linear_grid.floor_kind(10, 16, 1, "avx2") == ""  # between bandwidth and arithmetic
    assert floors.bandwidth_kind(10**12, 2) == "read_dram"


def test_the_int4_floor_is_its_own_only_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "cpu_flags", lambda: set().union(*floors._FLAGS.values()))
    assert floors.compute_kind("avx2", bits=4) == "int4_avx2"
    assert floors.compute_kind("avx512vnni", bits=4) == "int8_avx512vnni"
    assert floors.compute_kind("avx2") == "int8_avx2"
    assert floors.compute_kind("scalar", bits=4) == ""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_bandwidth_floor_reads_as_many_bytes_as_the_weights(threads: int) -> None:
    size = floors.footprint("read_l3", threads, 8_650_752)
    assert size % (4096 * threads) == 0
    assert 0 <= size - 8_650_752 < 4096 * threads
    tiny = floors.footprint("read_l2", threads, 100)
    assert tiny >= 2 * threads * floors.cache_bytes(1)


def test_floors_measure_something_positive() -> None:
    if floors.unavailable_reason():
        pytest.skip(floors.unavailable_reason())
    kind = floors.compute_kind("reference")
    if not kind:
        pytest.skip("this CPU has no AVX2")
    for name in (kind, "int4_avx2", "read_l2"):
        floor = floors.measure(name, 1, repetitions=3)
        assert floor.best >= floor.median > 0
    probe = floors.Probe("read_l3", 2, weight_bytes=1_000_000)
    assert probe.bytes == floors.footprint("read_l3", 2, 1_000_000)
    assert probe() > 0


def test_int8_linear_writes_results_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "measure_all", lambda *_: [])  # the DRAM buffer alone takes seconds
    path = linear_grid.run(
        bench_int8_linear.BENCH,
        shapes=((33, 17),),
        rows=(3,),
        threads=(1,),
        budget=TINY,
        out=tmp_path,
        quick=True,
        forms=False,
    )
    data = json.loads(path.read_text())
    assert path.name.startswith("int8_linear-")
    assert path.stem.endswith("-quick")
    (point,) = data["points"]
    assert {"lissom int8", "torch fp32", "torch dynamic int8"} <= point["sides"].keys()
    assert point["sides"]["torch fp32"]["time_over_lissom"]["median"] > 0
    assert {"cpu", "commit", "dirty", "isa", "versions", "command"} <= data["machine"].keys()
    assert data["figures"]["share_of_bandwidth_floor_4096_m1"]["met"] is None  # not measured here
    drawn = plot.draw(path)
    assert [p.suffix for p in drawn] == [".svg", ".png"]
    assert all(p.stat().st_size > 1000 for p in drawn)
    hero = plot.draw_hero(data, None, tmp_path / "hero")
    assert hero[0].read_text().lstrip().startswith("<?xml")


def test_int4_linear_writes_results_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "measure_all", lambda *_: [])
    path = linear_grid.run(
        bench_int4_linear.BENCH,
        shapes=((33, 17), (128, 48)),
        rows=(3, 32),
        threads=(1,),
        budget=TINY,
        out=tmp_path,
        quick=True,
    )
    data = json.loads(path.read_text())
    assert path.name.startswith("int4_linear-")
    odd, even = data["points"][1], data["points"][3]
    assert {p.name for p in lissom_forms_int4()} <= odd["sides"].keys()
    assert "torch int4 bf16 g128" not in odd["sides"]
    assert data["left_out"]["torch int4 bf16 g128 at 33x17"].startswith("K=33 must be a multiple of 128")
    assert "torch int4 bf16 g128" in even["sides"]
    assert even["best_int4_peer"] in even["sides"]
    ours = even["sides"]["lissom int4"]
    assert ours["sqnr_db"] > runner.MIN_SQNR_DB > ours["sqnr_to_fp32_db"]
    found = data["figures"]
    assert found["worst_vs_int8_m32"]["value"] == pytest.approx(
        min(p["sides"]["lissom int8"]["time_over_lissom"]["median"] for p in (odd, even)), rel=1e-4
    )
    assert found["m1_4096_vs_best_int4_peer"]["met"] is None  # not measured here
    assert found["geomean_vs_int8_m32"]["met"] is None  # without a bound
    assert all(p.stat().st_size > 1000 for p in plot.draw(path))


def test_bandwidth_share_is_of_a_floor_that_reads_as_many_weights() -> None:
    if floors.unavailable_reason():
        pytest.skip(floors.unavailable_reason())
    bench = bench_int4_linear.BENCH
    peers, sides, _ = linear_grid.prepare_sides(bench.forms()[:1], 128, 256, 1, 1)
    point = linear_grid.measure_point(bench, 128, 256, 1, 1, peers, sides, "avx2", TINY)
    assert point["floor"]["weight_bytes"] == sides[0].call.weight_bytes > 128 * 256 // 2
    assert point["sides"]["lissom int4"]["share_of_floor"]["median"] > 0


def test_the_table_of_int4_forms() -> None:
    rows = [
        {
            **bench_minilm_int4.columns(config),
            "file": {"ratio": 0.125},
            "speedup_over_torch_fp32": {"median": 2.5},
            "cosine": {"mean": 0.9876} if i else None,
            "conversion_seconds": 3.0,
        }
        for i, config in enumerate(bench_minilm_int4.CONFIGS)
    ]
    head, rule, first, *others = bench_minilm_int4.markdown({"threads": 2, "rows": rows}).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|")
    assert first == "| int8 | row | – |  | 12.5 % | 2.50× | not measured | 3.0 s |"
    assert "| int4, HQQ | 128 | – | symmetric | 12.5 % | 2.50× | 0.9876 | 3.0 s |" in others
    assert "| int4 | 32 | k-means per channel |  | 12.5 % | 2.50× | 0.9876 | 3.0 s |" in others
    assert len(set(others)) == len(others)


def test_int8_embedding_point() -> None:
    point = bench_int8_embedding.measure_point(50, 24, 7, 1, TINY)
    assert point["sides"]["lissom Int8Embedding"]["sqnr_db"] > 30
    assert point["sides"]["torch nn.Embedding"]["time_over_lissom"]["median"] > 0


def test_figures_are_judged_against_their_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    targets: dict[str, report.Target] = {
        "a": ("×", ">=", 1.0, "high enough"),
        "b": ("s", "<=", 1.0, "quick enough"),
        "c": ("%", ">=", 0.5, "unknown"),
        "d": ("GB/s", ">=", None, "of interest"),
    }
    found = report.judge(targets, {"a": 0.9, "b": 0.5, "c": None, "d": 131.5})
    assert [found[name]["met"] for name in "abcd"] == [False, True, None, None]
    report.print_figures(found)
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "not measured" in printed
    assert "131.5 GB/s" in printed
    assert "stated" in printed


def test_saved_json_is_strict(tmp_path: Path) -> None:
    path = report.save(tmp_path / "new" / "x.json", {"nan": math.nan, "list": [math.inf, 1.23456789]})
    assert report.load(path) == {"nan": None, "list": [None, 1.23457]}
    shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("text", ["384", "3x4x5", "axb"])
def test_a_shape_that_cannot_be_read(text: str) -> None:
    with pytest.raises(Exception, match=f"'{text}' is no shape; write KxN"):
        linear_grid.parse_shape(text)


def test_distill_loss_writes_results(tmp_path: Path) -> None:
    path = bench_distill_loss.run(
        shapes=((16, 10), (5, 300)),
        linear=(12, 8, 50),
        threads=(1,),
        budget=TINY,
        out=tmp_path,
        quick=True,
        compile_too=False,
    )
    data = json.loads(path.read_text())
    assert path.name.startswith("distill_loss-")
    assert [(p["rows"], p["vocab"], p["terms"]) for p in data["points"]] == [
        (16, 10, "KL"),
        (16, 10, "CE + KL"),
        (5, 300, "KL"),
        (5, 300, "CE + KL"),
    ]
    for p in data["points"]:
        assert p["sides"].keys() == {f"{n} {d}" for n in ("lissom", "torch eager") for d in ("fp32", "bf16")}
        assert p["sides"]["lissom fp32"]["sqnr_db"] > bench_distill_loss.MIN_SQNR_DB["fp32"]
        assert p["sides"]["torch eager bf16"]["time_over_lissom"]["median"] > 0
        assert p["bf16_over_fp32"]["median"] > 0
    (linear,) = data["linear"]
    assert (linear["tokens"], linear["hidden"], linear["vocab"]) == (12, 8, 50)
    assert linear["sides"]["lissom distill_loss of logits fp32"]["extra_bytes"] > 0
    found = data["figures"]
    assert found["linear_eager"]["met"] is not None
    assert found["bf16_over_fp32"]["met"] is not None
    assert found["eager_512x32000"]["met"] is None  # not measured here


def distill_point(rows: int, vocab: int, **changes: Any) -> dict[str, Any]:
    """A point where lissom takes 1 s, eager 12 s and torch.compile 4 s."""
    point: dict[str, Any] = {"rows": rows, "vocab": vocab, "threads": 2, "terms": "KL"}
    seconds = {"lissom fp32": 1.0, "lissom bf16": 1.0, "torch eager fp32": 12.0, "torch.compile fp32": 4.0}
    point["sides"] = {
        name: {"time_over_lissom": runner.spread([s]), "extra_bytes": 8 * rows} for name, s in seconds.items()
    }
    return point | {"bf16_over_fp32": runner.spread([0.5])} | changes


def test_distill_loss_figures() -> None:
    linear = distill_point(2048, 32000)
    linear["sides"]["torch eager fp32"]["extra_bytes"] = 20 * 8 * 2048
    points = [
        distill_point(512, 32000),
        distill_point(4096, 10, bf16_over_fp32=runner.spread([1.5])),
        distill_point(128, 128256, terms="CE + KL"),
        distill_point(2048, 1000, threads=1),
    ]
    found = bench_distill_loss.figures(points, [linear])
    for name, value, met in (
        ("eager_512x32000", 12.0, True),
        ("compile_512x32000", 4.0, False),
        ("eager_4096x10", 12.0, True),
        ("eager_128x128256", None, None),  # of KL only
        ("eager_2048x1000", None, None),  # with the most threads only
        ("bf16_over_fp32", 1.5, False),
        ("extra_bytes_per_row", 8.0, True),
        ("linear_memory", 0.05, True),
        ("linear_eager", 12.0, True),
    ):
        assert found[name]["value"] == (None if value is None else pytest.approx(value)), name
        assert found[name]["met"] is met, name
    assert found["bf16_over_fp32"]["at"] == "4096×10"


def test_wrong_losses_and_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import lissom.ops

    right = lissom.ops.distill_loss
    monkeypatch.setattr(bench_distill_loss, "paired", lambda *a, **k: pytest.fail("was timed"))
    for wrong in (
        lambda s, t, y, **k: right(t, s, y, **k) + 0 * s.sum(),
        lambda s, t, y, **k: right(s, t, y, **k) + 1.0,
    ):
        monkeypatch.setattr(lissom.ops, "distill_loss", wrong)
        with pytest.raises(AssertionError, match=r"lissom fp32: SQNR of the gradient .* not timed"):
            bench_distill_loss.measure_logits(8, 20, 1, "KL", TINY, compile_too=False)
