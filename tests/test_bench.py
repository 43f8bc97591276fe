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
from bench.peers import Peer, Prepared, linear_peers, linear_peers_int4, lissom_forms, lissom_forms_int4
from bench.peers.ort_int4 import OrtInt4
from bench.peers.torch_int4 import TorchInt4

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
