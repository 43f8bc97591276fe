"""Replace a folder in one step: a crash at any point leaves the old folder or the new one, never a mixture.

The new content is written and synced in a hidden sibling (``.NAME.lissom-tmp-*``), which then takes the
folder's place: with Linux's ``renameat2(RENAME_EXCHANGE)`` where the file system has it, otherwise by two
renames with the old folder parked as ``.NAME.lissom-old-*`` in between; :func:`recover` brings that one back
when a crash falls between the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["recover", "replace_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill with files; on normal exit it takes the place of ``folder``.

    An exception inside the block, or while swapping, leaves ``folder`` as it was. Leftovers of crashed calls
    for the same ``folder`` are removed; those of calls still running (in any process) are not.

    Raises:
        OSError: the parent folder cannot be made or written; nothing was changed.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        new, lock = _make_temporary(folder)
    except OSError as error:
        raise type(error)(
            f"cannot write in {str(parent)!r} ({error.strerror}); choose a folder that can be written"
        ) from error
    try:
        try:
            yield new
            for path in new.iterdir():
                _sync(path)
            _sync(new)
            _swap(new, folder)
            _sync(parent)
        finally:
            # The old content after an exchange, the unfinished one after an error; gone after a rename.
            shutil.rmtree(new, ignore_errors=True)
    finally:
        os.close(lock)


def recover(folder: Path) -> None:
    """If a crash left ``folder`` parked under its temporary name, put it back."""
    if folder.exists():
        return
    parked = sorted(folder.parent.glob(_glob(folder, "old")))
    if parked:
        parked[-1].rename(folder)


def _make_temporary(folder: Path) -> tuple[Path, int]:
    """A new hidden sibling and a descriptor whose lock tells ``_remove_stale`` that its owner lives."""
    while True:
        path = folder.parent / f"{_prefix(folder, 'tmp')}{secrets.token_hex(6)}"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # else another process took it for stale before it was locked
            return path, lock
        os.close(lock)


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(new, folder):
        return
    parked = folder.parent / new.name.replace(_prefix(folder, "tmp"), _prefix(folder, "old"))
    folder.rename(parked)
    try:
        new.rename(folder)
    except BaseException:
        parked.rename(folder)
        raise
    shutil.rmtree(parked, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically; False where the kernel, libc or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not glibc 2.28 or later
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _remove_stale(folder: Path) -> None:
    recover(folder)
    for path in folder.parent.glob(_glob(folder, "tmp")):
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another process is saving right now
        finally:
            os.close(fd)
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        for path in folder.parent.glob(_glob(folder, "old")):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(folder: Path, kind: str) -> str:
    return f".{folder.name}.lissom-{kind}-"


def _glob(folder: Path, kind: str) -> str:
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in folder.name)
    return f".{escaped}.lissom-{kind}-*"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
