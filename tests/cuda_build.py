"""Builds the extension ``lissom._C_cuda`` as CMake has it, for GPUs that are not here, piece by piece.

One folder for all of pytest's processes: whoever needs a file first compiles it for all, so that the tests of
each source and the test of the whole extension compile it once. The fixture ``cuda_build`` is one of these.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cuda_emulator.build import cmake
from processes import one_at_a_time

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = {80: "80-real", 90: "90a-real", 100: "100-real"}
"""The oldest, Hopper with its own instructions, and the newest, whose PTX is what later GPUs get."""


def nvcc() -> str:
    """Path of nvcc; skips without."""
    found = shutil.which("nvcc")
    if not found:
        pytest.skip("nvcc is not installed")
    return found


def configure(
    folder: Path, *options: str, path: str = os.environ["PATH"]
) -> subprocess.CompletedProcess[str]:
    """Run CMake on the package; what it was given before in this folder stays."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the extension")
    command = [
        *(cmake(), "-G", "Unix Makefiles", "-S", str(ROOT), "-B", str(folder)),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "CMAKE"))}
    return subprocess.run(command, capture_output=True, text=True, env={**kept, "PATH": path})


def run(command: str | list[str], folder: str | Path) -> str:
    """What a program says that has to end well."""
    given = shlex.split(command) if isinstance(command, str) else command
    done = subprocess.run(given, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(given)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class CudaBuild:
    """The extension for ``ARCHITECTURES``, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def _once(self, name: str) -> Iterator[Path | None]:
        """The file to be written by whoever comes first; None where it has been."""
        done = self.folder / f"{name}.done"
        with one_at_a_time(self.folder, f"{name}.lock"):
            yield None if done.exists() else done

    def commands(self) -> dict[str, tuple[str, str]]:
        """Of each of the extension's sources by its stem: how it is compiled, and where."""
        with self._once("configure") as to_write:
            if to_write:
                done = configure(
                    self.folder,
                    "-DLISSOM_CUDA=ON",
                    f"-DCMAKE_CUDA_COMPILER={nvcc()}",
                    f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(ARCHITECTURES.values())}",
                    "-DCMAKE_CUDA_FLAGS=--threads=2 -Xptxas=-v -Xcompiler=-Wall,-Wextra",
                    "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
                )
                assert done.returncode == 0, done.stdout + done.stderr
                to_write.write_text(done.stdout)
        entries = json.loads((self.folder / "compile_commands.json").read_text())
        return {
            Path(entry["file"]).stem: (entry["command"], entry["directory"])
            for entry in entries
            if "_C_cuda.dir" in entry["command"]
        }

    def compile(self, stem: str) -> tuple[Path, str]:
        """The object file of a source, and what the compiler said."""
        nvcc()
        command, folder = self.commands()[stem]
        if stem == "bindings":  # pybind11 takes long to optimize, and has no kernels
            command = command.replace(" -O3", " -O0")
        with self._once(stem) as to_write:
            if to_write:
                to_write.write_text(run(command, folder))
        found = re.search(r" -o (\S+)", command)
        assert found
        return Path(folder, found[1]), (self.folder / f"{stem}.done").read_text()

    def link(self) -> Path:
        """The extension."""
        for stem in self.commands():
            self.compile(stem)
        folder = self.folder / "csrc" / "cuda"
        with self._once("link") as to_write:
            if to_write:
                (text,) = folder.glob("CMakeFiles/_C_cuda.dir/link.txt")
                to_write.write_text(run(text.read_text(), folder))
        (extension,) = folder.glob("_C_cuda*.so")
        return extension
