"""``lissom._C_cuda`` as CMake builds it: for which GPUs, and what the extension is where there is none."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_build import ARCHITECTURES, ROOT, CudaBuild, configure, nvcc

SAID = "CUDA kernels: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all configurations: compilers are looked at once."""
    if not (ROOT / "csrc" / "cuda").exists():
        pytest.skip("the C++ sources are not beside the tests")
    return tmp_path_factory.mktemp("configured")


def configured(
    folder: Path, wanted: str, gpus: str = "", architectures: str = ""
) -> tuple[int, list[str], str]:
    """Exit status, what CMake said of the CUDA kernels, and everything; ``gpus`` as nvidia-smi tells them."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    program = tools / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    done = configure(
        folder,
        "-ULISSOM_CUDA",  # as if nothing had been said before
        "-UCMAKE_CUDA_ARCHITECTURES",
        *([f"-DLISSOM_CUDA={wanted}"] if wanted else []),
        *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
        path=path,
    )
    everything = done.stdout + done.stderr
    return done.returncode, re.findall(rf"{SAID}(.*)", everything), everything


@pytest.mark.parametrize("wanted", ["", "auto"])
def test_without_a_gpu_nothing_is_built(folder: Path, wanted: str) -> None:
    code, said, everything = configured(folder, wanted, "No devices were found")
    assert code == 0, everything
    assert said == ["not built, no GPU here (LISSOM_CUDA=ON builds them all the same)"]


AUTO = {
    "9.0\n9.0\n8.6\n": ["built for 90a-real 86-real by CUDA"],
    "7.5\n": [
        "none for a GPU of compute capability 7.5, they need 8.0",
        "not built, there is no GPU to build them for",
    ],
    "7.0\n99.9\n8.0\n": [
        "none for a GPU of compute capability 7.0, they need 8.0",
        "none for a GPU of compute capability 99.9, which",
        "built for 80-real by CUDA",
    ],
    "99.9\n": [
        "none for a GPU of compute capability 99.9, which",
        "not built, there is no GPU to build them for",
    ],
}


@pytest.mark.parametrize("gpus", AUTO, ids=lambda gpus: gpus.replace("\n", " ").strip())
def test_auto_is_for_the_gpus_that_are_here(folder: Path, gpus: str) -> None:
    nvcc()
    code, said, everything = configured(folder, "AUTO", gpus)
    assert code == 0, everything
    assert len(said) == len(AUTO[gpus])
    assert all(line.startswith(begins) for line, begins in zip(said, AUTO[gpus], strict=True)), said


@pytest.mark.parametrize("wanted", ["OFF", "no", "FALSE", "0"])
def test_off(folder: Path, wanted: str) -> None:
    code, said, everything = configured(folder, wanted, "9.0\n")
    assert (code, said) == (0, []), everything


@pytest.mark.parametrize(
    ("wanted", "architectures", "built"),
    [
        ("ON", "", "80-real 86-real 89-real 90a-real 100"),
        ("yes", "80-real", "80-real"),
        ("true", "80-real;90", "80-real 90"),
        ("1", "90-real", "90-real"),
    ],
)
def test_on(folder: Path, wanted: str, architectures: str, built: str) -> None:
    nvcc()
    code, said, everything = configured(folder, wanted, architectures=architectures)
    assert code == 0, everything
    assert said[0].startswith(f"built for {built} by CUDA ")
    without = (
        ["90 leaves Hopper's own instructions out; 90a has them"] if re.search(r"90(-real)?$", built) else []
    )
    assert said[1:] == without


def test_what_it_cannot_be_is_an_error(folder: Path) -> None:
    code, said, everything = configured(folder, "NOO", "9.0\n")
    assert code != 0
    assert said == []
    assert (
        "LISSOM_CUDA=NOO is none of AUTO, ON (or TRUE, YES, Y, 1) and OFF (or FALSE, NO, N, 0)"
        in " ".join(everything.split())
    )


def test_the_extension_where_there_is_no_gpu(cuda_build: CudaBuild) -> None:
    """It brings the CUDA runtime and nothing else that has to be there, and says why it cannot run."""
    extension = cuda_build.link()
    if ldd := shutil.which("ldd"):
        needs = subprocess.run([ldd, str(extension)], capture_output=True, text=True, check=True).stdout
        assert "libc.so" in needs
        assert not re.search("cuda|torch|c10|gomp", needs.replace(str(extension), "")), needs
    script = "import _C_cuda as c; print(c.ARCHITECTURES); print(c.why_not())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(extension.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    architectures, why_not = done.stdout.splitlines()
    assert architectures == " ".join(ARCHITECTURES.values())
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert why_not == "there is no NVIDIA driver here (no libcuda.so.1)"
