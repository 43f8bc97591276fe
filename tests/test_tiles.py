"""How Triton kernels pick their tiles: heuristics, opt-in tuning with a line on stderr, the cache on disk."""

from __future__ import annotations

import contextlib
import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lissom import _triton

if reason := _triton._triton_reason():
    pytest.skip(reason, allow_module_level=True)

from lissom.kernels import tiles
from lissom.kernels.tiles import Tile, autotune, pick

CPU = torch.device("cpu")
SMALL, LARGE, HUGE = (Tile({"BLOCK": size}) for size in (16, 64, 256))
SECONDS = {16: 3e-3, 64: 1e-3, 256: 2e-3}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, as in a new process that says nothing of tuning."""
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LISSOM_AUTOTUNE", raising=False)
    tiles._winners.cache_clear()
    yield tmp_path / "cache"
    tiles._winners.cache_clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles that were timed; each takes what ``SECONDS`` says."""
    timed: list[Tile] = []

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        return SECONDS[run().sizes["BLOCK"]]

    monkeypatch.setattr(tiles, "_seconds", seconds)
    return timed


def choose(runs: list[Tile], key: tuple[object, ...] = (16, torch.bfloat16), op: str = "some_op") -> Tile:
    return pick(op, key, [SMALL, LARGE, HUGE], CPU, lambda tile: runs.append(tile) or tile)  # type: ignore[func-returns-value]


def new_process() -> None:
    tiles._winners.cache_clear()


def test_without_being_asked_the_first_candidate_is_taken_and_nothing_is_timed_or_written(
    runs: list[Tile], cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(runs) is SMALL
    assert not runs
    assert not cache_folder.exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["environment", "context"])
def test_tuning_times_each_candidate_once_and_takes_the_fastest(
    runs: list[Tile], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("LISSOM_AUTOTUNE", "1")
        assert choose(runs) is LARGE
    else:
        with autotune():
            assert choose(runs) is LARGE
    assert runs == [SMALL, LARGE, HUGE]
    assert choose(runs) is LARGE, "tuned shapes stay tuned"
    assert len(runs) == 3
    assert choose(runs, key=(32, torch.bfloat16)) is (LARGE if how == "environment" else SMALL)


def test_a_single_candidate_is_not_timed(runs: list[Tile]) -> None:
    with autotune():
        assert pick("some_op", (1,), [HUGE], CPU, runs.append) is HUGE
    assert not runs


def test_autotune_false_and_lissom_autotune_0_ignore_winners(
    runs: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    with autotune():
        assert choose(runs) is LARGE
        with autotune(False):
            assert choose(runs) is SMALL
        assert choose(runs) is LARGE, "the outer block holds again"
    monkeypatch.setenv("LISSOM_AUTOTUNE", "0")
    assert choose(runs) is SMALL
    monkeypatch.setenv("LISSOM_AUTOTUNE", "1")
    with autotune(False):
        assert choose(runs, key=("another",)) is SMALL
    assert len(runs) == 3


def test_winners_are_kept_per_gpu_and_triton_and_used_by_later_processes(
    runs: list[Tile], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with autotune():
        choose(runs)
        choose(runs, op="another_op")
    (file,) = cache_folder.iterdir()
    assert re.fullmatch(r"tiles-interpreter-triton[\d.]+.*\.json", file.name)
    assert json.loads(file.read_text()) == {
        f"{op} 16 torch.bfloat16": "BLOCK=64 warps=4 stages=3" for op in ("some_op", "another_op")
    }
    new_process()
    assert choose(runs) is LARGE
    assert choose(runs, key=("unknown",)) is SMALL
    monkeypatch.setenv("LISSOM_AUTOTUNE", "1")
    assert choose(runs) is LARGE
    assert len(runs) == 6

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert tiles.cache_file(torch.device("cuda", 0)).name.startswith("tiles-nvidia-h200-sxm-triton")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LISSOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tiles.cache_file(CPU).parent == tmp_path / "xdg" / "lissom"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiles.cache_file(CPU).parent == tmp_path / ".cache" / "lissom"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "null", '{"some_op 16 torch.bfloat16": 7}'])
def test_a_damaged_cache_is_as_good_as_none_and_is_mended(
    runs: list[Tile], cache_folder: Path, content: str
) -> None:
    cache_folder.mkdir()
    tiles.cache_file(CPU).write_text(content)
    assert choose(runs) is SMALL
    with autotune():
        assert choose(runs) is LARGE
    new_process()
    assert choose(runs) is LARGE
    assert len(runs) == 3


def test_a_winner_that_is_no_candidate_any_more_is_forgotten(runs: list[Tile], cache_folder: Path) -> None:
    cache_folder.mkdir()
    tiles.cache_file(CPU).write_text(json.dumps({"some_op 16 torch.bfloat16": "BLOCK=8 warps=1 stages=1"}))
    assert choose(runs) is SMALL
    with autotune():
        assert choose(runs) is LARGE


def test_a_cache_that_cannot_be_written_costs_the_tuning_only(
    runs: list[Tile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "file" / "cache"))
    with autotune():
        assert choose(runs) is LARGE
        assert choose(runs) is LARGE
    assert len(runs) == 3


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    runs: list[Tile], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with autotune():
        choose(runs)
    before = tiles.cache_file(CPU).read_text()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiles.os, "replace", full)
    with autotune():
        assert choose(runs, op="another_op") is LARGE
    assert [path.name for path in cache_folder.iterdir()] == [tiles.cache_file(CPU).name]
    assert tiles.cache_file(CPU).read_text() == before


def test_processes_that_tune_at_once_keep_each_others_winners(runs: list[Tile]) -> None:
    with autotune():
        choose(runs)
        entries = json.loads(tiles.cache_file(CPU).read_text())
        tiles.cache_file(CPU).write_text(json.dumps({**entries, "of another process": "BLOCK=1"}))
        choose(runs, op="another_op")
    assert len(json.loads(tiles.cache_file(CPU).read_text())) == 3


def test_the_cache_can_be_read_by_its_owner_only(runs: list[Tile]) -> None:
    with autotune():
        choose(runs)
    assert stat.S_IMODE(tiles.cache_file(CPU).stat().st_mode) == 0o600


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_on_stderr_shows_the_tuning(
    runs: list[Tile], terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with autotune():
        choose(runs)
    out, err = capsys.readouterr()
    assert out == ""
    where = "some_op 16 torch.bfloat16"
    last = f"lissom: tuned {where}: BLOCK=64 warps=4 stages=3, 1000.0 µs\n"
    if terminal:
        shown = [f"lissom: tuning {where}: {i}/3" for i in (1, 2, 3)]
        assert err == "".join(f"\r\x1b[K{line}" for line in (*shown, last))
    else:
        assert err == f"lissom: tuning {where}: 1/3\n{last}"


def test_candidates_that_do_not_fit_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton.runtime.errors import OutOfResources

    class CompilerError(Exception):
        """Triton's compiler raises types that share no base with RuntimeError."""

    def run(tile: Tile) -> None:
        if tile is LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tile is SMALL:
            raise CompilerError("no such layout")

    with autotune():
        assert pick("some_op", (1,), [SMALL, LARGE, HUGE], CPU, run) is HUGE
    assert "tuned some_op 1: BLOCK=256" in capsys.readouterr().err


def test_where_no_candidate_runs_the_first_is_returned_and_nothing_is_learnt(
    cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(tile: Tile) -> None:
        raise RuntimeError("an illegal memory access was encountered\nmore lines")

    with autotune():
        assert pick("some_op", (1,), [SMALL, LARGE], CPU, run) is SMALL
    assert not cache_folder.exists()
    assert (
        "tuning some_op 1: no candidate runs (RuntimeError: an illegal memory access was encountered)\n"
        in capsys.readouterr().err
    )


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    def run(tile: Tile) -> None:
        raise KeyboardInterrupt

    with autotune(), pytest.raises(KeyboardInterrupt):
        pick("some_op", (1,), [SMALL, LARGE], CPU, run)
    with autotune(), pytest.raises(KeyboardInterrupt):  # the lock was given back
        pick("some_op", (1,), [SMALL, LARGE], CPU, run)


def test_nothing_is_timed_while_a_graph_is_captured(
    runs: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU a synchronisation would end the capture in an error."""
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    gpu = torch.device("cuda", 0)

    def on_gpu() -> Tile:
        return pick("some_op", (1,), [SMALL, LARGE], gpu, lambda tile: runs.append(tile) or tile)  # type: ignore[func-returns-value]

    with autotune():
        assert on_gpu() is SMALL
        assert not runs
        capturing[0] = False
        assert on_gpu() is LARGE
        capturing[0] = True
        assert on_gpu() is LARGE, "what was tuned before the capture is used in it"


def test_names_and_small_helpers() -> None:
    assert str(Tile({"BLOCK_M": 16, "BLOCK_N": 32}, 8, 2)) == "BLOCK_M=16 BLOCK_N=32 warps=8 stages=2"
    assert Tile({"B": 1}, 8, 2).options() == {"B": 1, "num_warps": 8, "num_stages": 2}
    assert [tiles.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
    assert [tiles.ceil_div(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert tiles.architecture(CPU) == 0
    with tiles.on_device(torch.empty(0)):
        pass


@pytest.mark.triton
def test_an_op_tunes_and_computes_the_same(
    triton_device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: candidates are timed for real, and the result does not depend on the choice."""
    from lissom.formats import quantize_int8
    from lissom.ops import int8_linear

    if triton_device == "cpu":  # its candidates are large, and the interpreter is slow
        monkeypatch.setattr(tiles, "_seconds", lambda run, device: float(run() is not None))
    x = torch.randn(3, 64).to(triton_device)
    q, scale = quantize_int8(torch.randn(40, 64).to(triton_device))
    expected = int8_linear(x, q, scale, backend="reference")
    with autotune(False):
        before = int8_linear(x, q, scale, backend="triton")
    with autotune():
        tuned = int8_linear(x, q, scale, backend="triton")
    assert torch.equal(before, expected)
    assert torch.equal(tuned, expected)
    err = capsys.readouterr().err
    assert "lissom: tuned int8_linear" in err
    assert json.loads(tiles.cache_file(x.device).read_text())


@pytest.mark.parametrize(("takes", "runs"), [(1e-3, 1 + 1 + 20), (0.0, 1 + 1 + 50), (0.1, 1 + 1 + 5)])
def test_the_gpus_own_time_counts(takes: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is played: events stand around a run, behind what the GPU waits for meanwhile."""
    now, done = 0.0, []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")
            self.at = now

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Cold:
        def zero_(self) -> None:
            done.append("cold")

    def sleep(cycles: int) -> None:
        nonlocal now
        now += cycles / 2e9
        done.append("sleep")

    def run() -> None:
        nonlocal now
        now += takes
        done.append("run")

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Cold())
    for name, stand_in in (
        ("device", lambda device: contextlib.nullcontext()),
        ("Event", Event),
        ("_sleep", sleep),
        ("synchronize", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert tiles._seconds(run, torch.device("cuda", 0)) == pytest.approx(takes)
    assert done[0] == "run", "compiles"
    assert done[1:] == ["cold", "sleep", "event", "run", "event"] * (runs - 1)
