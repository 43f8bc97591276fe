"""Triton absent, broken, too old, without a compiler, or before a GPU that is too old: a reason and a fix.

GPUs are pretended where there are none; nothing here launches a kernel.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lissom import _triton, doctor, registry

REASONS = (_triton._triton_reason, _triton._gpu_reason, _triton._driver_reason)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process outside the tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_automatic", {})
    for reason in REASONS:
        reason.cache_clear()
    yield
    for reason in REASONS:
        reason.cache_clear()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """What torch and Triton say of this machine: names and compute capabilities."""
    found = [("NVIDIA H200", (9, 0))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: found[getattr(i, "index", i)][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: found[i][1])
    properties = {"total_memory": 141 << 30}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=found[i][0], major=found[i][1][0], minor=found[i][1][1], **properties),
    )
    triton_module(monkeypatch)
    return found


def triton_module(monkeypatch: pytest.MonkeyPatch, version: str = "3.6.0", driver: Any = None) -> None:
    """``import triton`` gives a package of this version."""

    class Driver:
        @property
        def active(self) -> object:
            if isinstance(driver, Exception):
                raise driver
            return object()

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=Driver()))


def import_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name == "triton":
            raise error
        return real(name, package)

    monkeypatch.setattr(_triton.importlib, "import_module", fake)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_with_triton_needs_nothing() -> None:
    assert _triton.unavailable_reason() == ""
    assert _triton.detail() == "triton 3.6.0, NVIDIA H200"
    assert registry.select("int8_linear", "cuda").name == "triton"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ImportError("No module named 'triton'"),
            "triton could not be imported (No module named 'triton'); pip",
        ),
        (OSError("libcuda.so: cannot open"), "triton is broken: OSError: libcuda.so: cannot open; pip"),
        (AttributeError("half a package"), "triton is broken: AttributeError: half a package; pip install"),
    ],
)
def test_absent_or_broken(error: Exception, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_raises(monkeypatch, error)
    assert _triton.unavailable_reason().startswith(text)
    assert _triton.unavailable_reason().endswith("'triton>=3.4'")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("version", "fine"),
    [("3.3.1", False), ("2.10.0", False), ("3.4.0", True), ("3.10.0+git1", True), ("4.0.0rc1", True)],
)
def test_versions(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_module(monkeypatch, version)
    reason = "" if fine else f"triton {version} is too old; pip install 'triton>=3.4'"
    assert _triton.unavailable_reason() == reason


@pytest.mark.usefixtures("gpus")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_module(monkeypatch, driver=RuntimeError("Failed to find C compiler. Please specify\nmore"))
    assert _triton.unavailable_reason() == (
        "triton cannot reach the GPU: RuntimeError: Failed to find C compiler. Please specify; it needs a C "
        "compiler (gcc, or what CC names), Python's headers and a cache folder that can be written "
        "(TRITON_CACHE_DIR)"
    )


def test_capabilities_that_are_too_low(gpus: list[tuple[str, tuple[int, int]]]) -> None:
    gpus.append(("Tesla T4", (7, 5)))
    assert _triton.unavailable_reason() == (
        "cuda:1 (Tesla T4, compute capability 7.5) is older than compute capability 8.0; hide it with "
        "CUDA_VISIBLE_DEVICES"
    )


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    triton_module(monkeypatch)
    assert _triton.unavailable_reason().startswith("torch finds no CUDA GPU (torch ")


@pytest.mark.usefixtures("gpus")
def test_an_op_falls_to_the_reference_with_one_warning_and_a_named_backend_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_raises(monkeypatch, ImportError("No module named 'triton'"))
    why = r"triton: triton could not be imported \(No module named 'triton'\); pip install 'triton>=3.4'"
    for op in sorted({op for op, device in registry._candidates if device == "cuda"}):
        names = [backend.name for backend in registry._candidates[op, "cuda"]]
        if "triton" not in names:
            continue
        with pytest.warns(UserWarning, match=rf"lissom: {op} runs on the slow reference .* on cuda \({why}"):
            assert registry.select(op, "cuda").name == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert registry.select(op, "cuda").name == "reference"
        with pytest.raises(RuntimeError, match=rf"{op}: backend='triton' cannot run here: triton could not"):
            registry.select(op, "cuda", "triton")


def test_importing_lissom_imports_no_triton(run_python) -> None:  # type: ignore[no-untyped-def]
    result = run_python(
        "import sys, lissom; print('triton' in sys.modules, 'lissom.kernels.tiles' in sys.modules)"
    )
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_doctor_on_a_machine_with_gpus(
    gpus: list[tuple[str, tuple[int, int]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(
        _triton, "load", lambda op: SimpleNamespace(cache_file=lambda device: tmp_path / "tiles.json")
    )
    found = doctor.diagnose()
    assert found["gpus"] == [{"name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 141 << 30}]
    assert found["triton"] == {
        "available": True,
        "reason": "",
        "detail": "triton 3.6.0, NVIDIA H200",
        "tuned": None,
    }
    assert not [problem for problem in found["problems"] if "GPU" in problem]
    (tmp_path / "tiles.json").write_text("{}")
    assert doctor.diagnose()["triton"]["tuned"] == str(tmp_path / "tiles.json")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (problem,) = (p for p in doctor.diagnose()["problems"] if "GPU" in p)
    assert problem == "TRITON_INTERPRET runs the GPU kernels in an interpreter, for tests; unset it"
    monkeypatch.delenv("TRITON_INTERPRET")

    gpus.append(("Tesla T4", (7, 5)))
    _triton._gpu_reason.cache_clear()
    found = doctor.diagnose()
    assert not found["triton"]["available"]
    (problem,) = (p for p in found["problems"] if "GPU" in p)
    assert problem.startswith("the GPU kernels are not used: cuda:1 (Tesla T4")
