"""Builds and loads the emulator: csrc/cuda's sources by g++ (CMake's LISSOM_CUDA_EMULATOR), under build/."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from processes import one_at_a_time

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = "LISSOM_EMULATOR_SANITIZE"
"""Set in a process that has AddressSanitizer's runtime preloaded; :func:`sanitized_environment` makes one."""


def cmake() -> str:
    """Path of cmake; skips without."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which("cmake", path=path)
    if not found:
        pytest.skip("cmake is not installed")
    return found


def sanitized_environment() -> dict[str, str]:
    """For a process that runs the emulator under ASan and UBSan; skips where g++ has none."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"g++ has no {name}")
        libraries.append(os.path.realpath(found))
    return {
        **os.environ,
        SANITIZE: "address,undefined",
        "LD_PRELOAD": " ".join(libraries),
        # Python leaks by design; torch's pools and interposed allocations stay.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


@cache
def load() -> ModuleType:
    """The module ``_C_cuda_emulator``, built anew where a source changed; skips where it cannot be built."""
    if not (ROOT / "csrc" / "cuda").exists():
        pytest.skip("the C++ sources are not beside the tests")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the CUDA emulator")
    sanitizers = os.environ.get(SANITIZE, "")
    build = (
        ROOT / "build" / f"cuda-emulator{'-sanitized' if sanitizers else ''}-{sys.implementation.cache_tag}"
    )
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake(),
        *("-S", str(ROOT), "-B", str(build)),
        "-DLISSOM_CUDA_EMULATOR=ON",
        "-DCMAKE_CXX_COMPILER=g++",
        f"-DLISSOM_CUDA_SANITIZE={sanitizers}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    target = [cmake(), "--build", str(build), "--target", "_C_cuda_emulator", "--parallel", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with one_at_a_time(build):
        for command in (configure, target):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    (path,) = (build / "csrc" / "cuda").glob("_C_cuda_emulator*.so")
    spec = importlib.util.spec_from_file_location("_C_cuda_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
