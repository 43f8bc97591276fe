"""Which backend serves an op: order, requests, environment, the warning, ``backend_info``."""

from __future__ import annotations

import warnings

import pytest
import torch

import lissom
from lissom import _native, registry
from lissom.registry import Backend


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own for the test."""
    monkeypatch.setattr(registry, "_candidates", {})
    monkeypatch.setattr(registry, "_automatic", {})
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)


def backend(name: str, reason: str = "") -> Backend:
    return Backend(name, lambda: name, lambda: reason, lambda: f"detail of {name}")


@pytest.mark.usefixtures("empty")
def test_first_that_can_run_is_chosen() -> None:
    registry.register("op", "cpu", backend("broken", "no driver"), backend("good"), backend("reference"))
    assert registry.select("op", "cpu").name == "good"
    assert registry.select("op", "cpu", "reference").run() == "reference"


@pytest.mark.usefixtures("empty")
def test_automatic_choice_is_remembered_until_something_is_registered() -> None:
    calls = []
    slow = Backend("slow", lambda: None, lambda: calls.append(1) or "")  # type: ignore[func-returns-value]
    registry.register("op", "cpu", slow)
    for _ in range(3):
        assert registry.select("op", "cpu") is slow
    assert len(calls) == 1
    registry.register("op", "cpu", backend("late"))
    assert registry.select("op", "cpu") is slow
    assert len(calls) == 2


@pytest.mark.usefixtures("empty")
def test_falling_to_reference_warns_once_with_the_reasons() -> None:
    registry.register(
        "op", "cpu", backend("native", "not built"), backend("triton", "no gpu"), backend("reference")
    )
    with pytest.warns(
        UserWarning,
        match=r"lissom: op runs on the slow reference backend on cpu \(native: not built; triton: no gpu\)",
    ):
        registry.select("op", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select("op", "cpu").name == "reference"


@pytest.mark.usefixtures("empty")
def test_reference_alone_does_not_warn() -> None:
    registry.register("op", "cpu", backend("reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select("op", "cpu").name == "reference"


@pytest.mark.usefixtures("empty")
def test_a_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register("op", "cpu", backend("broken", "no driver"), backend("good"), backend("reference"))
    with pytest.raises(RuntimeError, match=r"op: backend='broken' cannot run here: no driver"):
        registry.select("op", "cpu", "broken")
    with pytest.raises(
        ValueError, match=r"'x' does not exist for device 'cpu'; use one of: 'broken', 'good', 'ref"
    ):
        registry.select("op", "cpu", "x")
    monkeypatch.setenv("LISSOM_BACKEND", "broken")
    with pytest.raises(RuntimeError, match=r"op: LISSOM_BACKEND='broken' cannot run here: no driver"):
        registry.select("op", "cpu")
    monkeypatch.setenv("LISSOM_BACKEND", "x")
    with pytest.raises(ValueError, match=r"op: LISSOM_BACKEND='x' does not exist"):
        registry.select("op", "cpu")
    assert registry.select("op", "cpu", "good").name == "good", "the argument wins over the environment"
    monkeypatch.setenv("LISSOM_BACKEND", "")
    assert registry.select("op", "cpu").name == "good", "an empty variable is none"


@pytest.mark.usefixtures("empty")
def test_unknown_device() -> None:
    registry.register("op", "cuda", backend("reference"))
    registry.register("op", "cpu", backend("reference"))
    with pytest.raises(
        NotImplementedError, match=r"op: no backend for device 'xpu'; move .* one of: cpu, cuda"
    ):
        registry.select("op", "xpu")
    with pytest.raises(ValueError, match=r"does not exist for device 'xpu'; use one of: none"):
        registry.select("op", "xpu", "native")


@pytest.mark.usefixtures("empty")
def test_nothing_can_run() -> None:
    registry.register("op", "cpu", backend("native", "not built"))
    with pytest.raises(NotImplementedError, match=r"op: no backend for device 'cpu'"):
        registry.select("op", "cpu")


@pytest.mark.usefixtures("empty")
def test_backend_info_rows() -> None:
    registry.register("b", "cpu", backend("broken", "no driver"), backend("good"), backend("reference"))
    registry.register("a", "cuda", backend("reference"))
    assert registry.backend_info() == [
        {
            "op": "a",
            "device": "cuda",
            "backend": "reference",
            "status": "used",
            "detail": "detail of reference",
        },
        {"op": "b", "device": "cpu", "backend": "broken", "status": "unavailable", "detail": "no driver"},
        {"op": "b", "device": "cpu", "backend": "good", "status": "used", "detail": "detail of good"},
        {
            "op": "b",
            "device": "cpu",
            "backend": "reference",
            "status": "available",
            "detail": "detail of reference",
        },
    ]


def test_backend_info_of_this_machine() -> None:
    rows = {(r["op"], r["device"], r["backend"]): r for r in lissom.backend_info()}
    for op in ("int8_linear", "int8_embedding"):
        native, reference = rows[op, "cpu", "native"], rows[op, "cpu", "reference"]
        if _native.unavailable_reason():
            assert native["status"] == "unavailable"
            assert "lissom._C" in native["detail"]
            assert reference["status"] == "used"
        else:
            assert native["status"] == "used"
            assert native["detail"] == _native.isa()
            assert reference["status"] == "available"


def test_missing_extension_falls_to_reference_with_a_warning(run_python) -> None:  # type: ignore[no-untyped-def]
    script = """
import sys, warnings
sys.modules["lissom._C"] = None  # import fails
import torch, lissom
from lissom import ops
q, s = lissom.formats.quantize_int8(torch.randn(3, 4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = ops.int8_linear(torch.ones(2, 4), q, s)
assert len(caught) == 1, caught
print(caught[0].message)
try:
    ops.int8_linear(torch.ones(2, 4), q, s, backend="native")
except RuntimeError as error:
    print(error)
layer = lissom.nn.Int8Linear.from_linear(torch.nn.Linear(4, 3))
print(tuple(layer(torch.ones(1, 4)).shape), lissom.backend_info()[0]["status"])
"""
    result = run_python(script, LISSOM_FORCE_ISA="", LISSOM_BACKEND="")
    assert result.returncode == 0, result.stderr
    warning, error, last = result.stdout.splitlines()
    assert warning.startswith(
        "lissom: int8_linear runs on the slow reference backend on cpu (native: the extension"
    )
    assert error.startswith(
        "int8_linear: backend='native' cannot run here: the extension lissom._C could not be imp"
    )
    assert "reinstall with 'pip install .'" in error
    assert last == "(1, 3) unavailable"


def test_environment_reaches_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    q, s = lissom.formats.quantize_int8(torch.randn(3, 4))
    monkeypatch.setenv("LISSOM_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match=r"int8_linear: LISSOM_BACKEND='nonsense' does not exist for device 'cpu'"
    ):
        lissom.ops.int8_linear(torch.ones(2, 4), q, s)
    with pytest.raises(ValueError, match=r"int8_embedding: LISSOM_BACKEND='nonsense' does not exist"):
        lissom.ops.int8_embedding(torch.tensor([0]), q, s)
