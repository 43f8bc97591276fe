"""What every test starts from: fixed seeds, two threads, no network, and the ``implementation`` fixture."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import cuda_emulator.build as cuda_emulator
import pytest
import torch
from cuda_build import CudaBuild
from processes import common_folder

if not torch.cuda.is_available():  # before Triton is imported: its functions are interpreted from their birth
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lissom import _cuda, _native, _replay, _triton, registry, testing

ROOT = Path(__file__).resolve().parents[1]

NATIVE = [name for name in testing.IMPLEMENTATIONS if name != registry.REFERENCE]


@pytest.fixture(scope="session", autouse=True)
def _reference_warning() -> None:
    """Without the extension the first call warns; say it once here, so that no single test fails for it."""
    if _native.unavailable_reason():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for op in sorted({row["op"] for row in registry.backend_info()}):
                registry.select(op, "cpu")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    _replay.forget()  # a test that puts something in a kernel's place wants it called
    yield
    torch.set_num_threads(2)


def _use(name: str) -> Iterator[str]:
    if reason := testing.why_not(name):
        pytest.skip(f"{name}: {reason}")
    with testing.use(name):
        yield name


@pytest.fixture(params=testing.IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of reference and native-<isa>, in use for the test; skipped where it cannot run."""
    yield from _use(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each native-<isa>, in use for the test."""
    yield from _use(request.param)


@pytest.fixture(params=NATIVE)
def automatic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Each native-<isa> with no backend named anywhere, as users call: plain calls go straight to C.

    The list tells of each call whether it did.
    """
    if reason := testing.why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    module, taken = _native.load(), []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            function = getattr(module, name)
            if not name.endswith("_plain"):
                return function

            def spied(*args: Any) -> Any:
                y = function(*args)
                taken.append(y is not None)
                return y

            return spied

    monkeypatch.setattr(_native, "module", Spy)
    with testing.force_isa(request.param.removeprefix("native-")):
        yield taken


@pytest.fixture
def triton_device() -> str:
    """``cuda``, or ``cpu`` where Triton's interpreter has to do; skipped where Triton cannot run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := _triton.unavailable_reason() if device == "cuda" else _triton.interpreter_reason():
        pytest.skip(f"triton: {reason}")
    return device


@pytest.fixture(params=[0, 1], ids=["in_order", "shuffled"])
def cuda_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``cuda``, or ``cpu`` where the emulator has to do, which runs blocks and threads in two orders.

    With the emulator ``backend="cuda"`` serves CPU tensors. Skipped where there is neither.
    """
    if torch.cuda.is_available():
        if reason := _cuda.unavailable_reason():
            pytest.skip(f"cuda: {reason}")
        if request.param:
            pytest.skip("cuda: a GPU has an order of its own")
        return "cuda"
    emulator = cuda_emulator.load()
    emulator.seed(request.param)
    monkeypatch.setattr(_cuda, "_extension", lambda: (emulator, ""))
    for (op, device), backends in list(registry._candidates.items()):
        if device == "cuda":
            emulated = [registry.Backend(b.name, b.run) for b in backends if b.name == "cuda"]
            on_cpu = registry._candidates.get((op, "cpu"), [])
            monkeypatch.setitem(registry._candidates, (op, "cpu"), [*on_cpu, *emulated])
    return "cpu"


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> CudaBuild:
    """One for all of pytest's processes."""
    return CudaBuild(common_folder(tmp_path_factory, "cuda-build"))


@pytest.fixture
def needs_native() -> None:
    if reason := _native.unavailable_reason():
        pytest.skip(f"native kernels: {reason}")


RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Runs a script in a fresh interpreter that sees the same lissom; a hang becomes a failure."""

    def run(script: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        import lissom

        package = str(Path(lissom.__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        full = {**os.environ, "PYTHONPATH": path, **env}
        return subprocess.run(
            [sys.executable, "-c", script],
            env=full,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
