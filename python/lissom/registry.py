"""Which backend serves an op on a device.

Candidates of one (op, device type) are tried in the order in which they were registered, best first. A
backend that the user names (argument ``backend=`` or the environment variable ``LISSOM_BACKEND``) must
run or raise; the automatic choice falls through and warns once when it falls to ``reference``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import _replay

__all__ = ["Backend", "backend_info", "register", "select"]

REFERENCE = "reference"


def _always_available() -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: ``native``, ``triton``, ``cuda`` or ``reference``.
        run: the implementation; takes the op's arguments.
        unavailable: returns why this machine cannot run it, or ``""``.
        detail: what is used, such as the instruction set; only asked where the backend is available.
        automatic: what runs in place of ``run`` where nobody named the backend: it may leave calls to another
            backend that was measured to be faster for them.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[], str] = field(default=_always_available)
    detail: Callable[[], str] = field(default=lambda: "")
    automatic: Callable[..., Any] | None = None


_candidates: dict[tuple[str, str], list[Backend]] = {}
_automatic: dict[tuple[str, str], Backend] = {}


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The reference is made of torch's products, which ``torch.autocast`` would round."""

    @wraps(run)
    def as_written(*args: Any) -> Any:
        tensor = next((argument for argument in args if isinstance(argument, Tensor)), None)
        if tensor is None:
            return run(*args)
        with torch.autocast(tensor.device.type, enabled=False):
            return run(*args)

    return as_written


def register(op: str, device: str, *backends: Backend) -> None:
    """Append ``backends``, best first, to the candidates for ``op`` on ``device`` (``cpu``, ``cuda``)."""
    _candidates.setdefault((op, device), []).extend(
        replace(one, run=_without_autocast(one.run)) if one.name == REFERENCE else one for one in backends
    )
    _automatic.pop((op, device), None)
    _replay.forget()


def select(op: str, device: str, requested: str | None = None) -> Backend:
    """The backend that serves ``op`` on ``device``.

    Raises:
        ValueError: ``requested`` (or ``LISSOM_BACKEND``) is no backend of this op and device.
        RuntimeError: it is one, but cannot run here.
        NotImplementedError: no backend at all for this device.
    """
    source = "backend"
    if requested is None:
        requested = os.environ.get("LISSOM_BACKEND") or None
        source = "LISSOM_BACKEND"
    if requested is None:
        chosen = _automatic.get((op, device))
        return chosen if chosen is not None else _choose(op, device)
    candidates = _candidates.get((op, device), [])
    for backend in candidates:
        if backend.name == requested:
            reason = backend.unavailable()
            if reason:
                raise RuntimeError(f"{op}: {source}={requested!r} cannot run here: {reason}")
            return backend
    names = ", ".join(repr(b.name) for b in candidates) or "none"
    raise ValueError(
        f"{op}: {source}={requested!r} does not exist for device {device!r}; use one of: {names}"
    )


def _choose(op: str, device: str) -> Backend:
    passed_over = []
    for backend in _candidates.get((op, device), []):
        reason = backend.unavailable()
        if reason:
            passed_over.append(f"{backend.name}: {reason}")
            continue
        if backend.name == REFERENCE and passed_over:
            warnings.warn(
                f"lissom: {op} runs on the slow reference backend on {device} ({'; '.join(passed_over)})",
                stacklevel=4,
            )
        if backend.automatic is not None:
            backend = replace(backend, run=backend.automatic)
        _automatic[op, device] = backend
        return backend
    raise NotImplementedError(
        f"{op}: no backend for device {device!r}; move the tensors to one of: "
        + ", ".join(sorted({d for o, d in _candidates if o == op}))
    )


def _why_not(backend: Backend) -> str:
    try:
        return backend.unavailable()
    except RuntimeError as error:  # a forced instruction set that cannot run: reported here, raised on use
        return str(error)


def backend_info() -> list[dict[str, str]]:
    """One row per op, device and backend: ``op``, ``device``, ``backend``, ``status``, ``detail``.

    ``status`` is ``used`` (the automatic choice), ``available`` or ``unavailable``; ``detail`` says which
    instruction set is used or why the backend cannot run.
    """
    rows = []
    for (op, device), backends in sorted(_candidates.items()):
        used = False
        for backend in backends:
            reason = _why_not(backend)
            status = "unavailable" if reason else ("available" if used else "used")
            used = used or not reason
            detail = reason or backend.detail()
            rows.append(
                {"op": op, "device": device, "backend": backend.name, "status": status, "detail": detail}
            )
    return rows
