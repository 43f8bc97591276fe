"""What pytest's processes, and several runs in one checkout, share: folders, and taking turns at them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def common_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A temporary folder, the same in all of pytest's processes."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def one_at_a_time(folder: Path, name: str = "lock") -> Iterator[None]:
    """Waits until no other process is inside, for this folder and name."""
    with open(folder / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
