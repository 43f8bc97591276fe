"""The wheel: built from a clean copy in isolation, installed into a fresh environment, used elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from processes import common_folder, one_at_a_time

from lissom import testing

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, **env: str) -> str:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "LISSOM", "CMAKE", "CXX", "SKBUILD"))
    }
    done = subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files only, in a folder of its own: nothing of this checkout can slip in."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files belong to the package is unknown")
    out = common_folder(tmp_path_factory, "wheel")
    with one_at_a_time(out):  # the first builds it for all
        built = list(out.glob("*.whl"))
        return built[0] if built else build(tmp_path_factory.mktemp("source"), out)


def build(source: Path, out: Path) -> Path:
    for name in run(["git", "ls-files", "-z"], ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    log = run([sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", str(out), "."], source)
    (path,) = out.glob("*.whl")
    assert "torch" not in "\n".join(
        line for line in log.splitlines() if "Collecting" in line or "Using cached" in line
    )
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds only the wheel; torch is seen through a .pth file."""
    venv = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(venv)], venv)
    python = venv / "bin" / "python"
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], venv).strip()
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    Path(site, "borrowed.pth").write_text("\n".join(paths) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run([*pip, "--force-reinstall", "--ignore-installed", str(wheel)], venv)
    return python


def test_build_requirements_hold_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = text[text.index("[build-system]") : text.index("[project]")]
    assert "scikit-build-core" in requires
    assert "torch" not in requires


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"lissom", next(n for n in top if n.endswith(".dist-info"))}
    assert "lissom/py.typed" in names
    extensions = [name for name in names if name.endswith(".so")]
    assert len(extensions) == 1, "one extension: not a test-only or a second one"
    assert extensions[0].startswith("lissom/_C.")
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tracked = run(["git", "ls-files", "python/lissom", "kernels"], ROOT).split()
    expected = {
        f"lissom/{name}" if name.startswith("kernels/") else name.removeprefix("python/")
        for name in tracked
        if (ROOT / name).is_file()
    }
    assert {n for n in names if n.startswith("lissom/")} - set(extensions) == expected
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=" in metadata
    assert "License-Expression: Apache-2.0" in metadata


SMOKE = """
import sys, os
import torch, lissom
from lissom import _native, nn, ops
from lissom.reference import int8_linear as page
assert lissom.__file__.startswith(sys.prefix), lissom.__file__
assert _native.load().__file__.startswith(sys.prefix), _native.load().__file__
torch.manual_seed(0)
original = torch.nn.Linear(123, 45)
layer = nn.Int8Linear.from_linear(original, act_fn="gelu")
x = torch.randn(7, 123)
q, s = lissom.formats.quantize_int8(original.weight)
assert torch.equal(layer(x), page.int8_linear(x, q, s, original.bias, act_fn="gelu"))
table = nn.Int8Embedding.from_embedding(torch.nn.Embedding(50, 30))
assert torch.equal(table(torch.arange(50)), table.weight)
print(_native.isa())
"""

SAVE = """
import torch, lissom
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8)).eval()
x = torch.randn(4, 64)
report = lissom.compress_(model, lissom.Int8(prefer="size"), example_inputs=(x,))
with torch.no_grad():
    y = model(x)
lissom.save(model, "folder", example_inputs=(x,))
fresh = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8)).eval()
loaded = lissom.load("folder", model=fresh)
with torch.no_grad():
    print(torch.equal(loaded(x), y), type(loaded[0]).__name__)
"""


@pytest.mark.parametrize("isa", testing.ALL_ISAS)
def test_smoke(installed: Path, tmp_path: Path, isa: str) -> None:
    if reason := testing.why_not(f"native-{isa}"):
        pytest.skip(f"{isa}: {reason}")
    out = run([str(installed), "-c", SMOKE], tmp_path, LISSOM_FORCE_ISA=isa, LISSOM_BACKEND="native")
    assert out.strip() == isa


def test_save_and_load(installed: Path, tmp_path: Path) -> None:
    assert run([str(installed), "-c", SAVE], tmp_path).strip() == "True Int8Linear"


def test_command_line(installed: Path, tmp_path: Path) -> None:
    script = installed.parent / "lissom"
    assert script.exists(), "the wheel installs the lissom command"
    out = run([str(script), "--help"], tmp_path)
    for command in ("demo", "compress", "inspect", "bench", "doctor"):
        assert command in out
    assert "native" in run([str(script), "doctor"], tmp_path)
