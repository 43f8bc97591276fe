"""What ``import lissom`` must not do, and what the extension must not link."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lissom import _native

HEAVY = (
    "triton",
    "typer",
    "rich",
    "transformers",
    "matplotlib",
    "yaml",
    "onnx",
    "onnxruntime",
    "sklearn",
    "tqdm",
)


def test_import_loads_nothing_heavy_and_starts_nothing(run_python) -> None:  # type: ignore[no-untyped-def]
    """Against what torch itself loads: the rest must be lissom's own and small."""
    script = f"""
import sys, os
import torch
before = set(sys.modules)
threads = len(os.listdir("/proc/self/task"))
import lissom
new = sorted(set(sys.modules) - before)
print([m for m in new if m.split(".")[0] in {HEAVY!r}])
print(torch.cuda.is_initialized(), len(os.listdir("/proc/self/task")) - threads)
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "False 0"]
    assert result.stderr == ""


def test_import_does_not_touch_torch_settings(run_python) -> None:  # type: ignore[no-untyped-def]
    script = """
import torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled(),
            torch.backends.quantized.engine, torch.get_float32_matmul_precision())
torch.manual_seed(3)
before = settings()
import lissom
print(settings() == before)
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


def test_public_names() -> None:
    import lissom

    for name in lissom.__all__:
        assert getattr(lissom, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", lissom.__version__)
    assert (Path(lissom.__file__).parent / "py.typed").exists()


def test_version_is_said_once_in_effect() -> None:
    import lissom

    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    assert f'version = "{lissom.__version__}"' in pyproject.read_text()


@pytest.mark.usefixtures("needs_native")
def test_one_openmp_runtime(run_python) -> None:  # type: ignore[no-untyped-def]
    """Two would mean two pools of threads, and torch.set_num_threads would govern only one."""
    script = """
import torch, lissom
torch.set_num_threads(2)
layer = lissom.nn.Int8Linear.from_linear(torch.nn.Linear(512, 512))
layer(torch.randn(256, 512))
torch.randn(700, 700) @ torch.randn(700, 700)
maps = open("/proc/self/maps").read().split()
print(*sorted({p for p in maps if any(n in p for n in ("libgomp", "libomp", "libiomp"))}), sep="\\n")
"""
    result = run_python(script, LISSOM_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, f"OpenMP runtimes: {result.stdout}"


@pytest.mark.usefixtures("needs_native")
def test_extension_needs_no_torch() -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    path = _native.load().__file__
    assert path is not None
    dynamic = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    allowed = ("libstdc++", "libm.", "libgcc_s", "libgomp.so.1", "libc.", "libpthread", "ld-linux")
    assert needed
    assert [name for name in needed if not name.startswith(allowed)] == []
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), (
        "the extension must not carry the build machine's paths"
    )


@pytest.mark.usefixtures("needs_native")
def test_extension_exports_only_its_module() -> None:
    """Hidden symbols cannot be replaced by another library's, nor an AVX-512 copy be picked for all."""
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    path = _native.load().__file__
    assert path is not None
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout
    exported = [line.split()[-1] for line in listed.splitlines() if line.split()[-2] in "TDBR"]
    assert exported == ["PyInit__C"]
