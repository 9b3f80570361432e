"""One writer at a time: a lock that the operating system takes back from a process that ends, however it ends."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minikd.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
_HERE: set[Path] = set()  # folders that this process writes to: the system's locks are between processes alone
_GUARD = threading.Lock()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; OutputError that names the process if another holds it, or this one does already."""
    place = folder.resolve()
    with _GUARD:
        if place in _HERE:
            raise _taken(folder, "a write in this process")
        _HERE.add(place)
    try:
        descriptor = _locked(folder)
        try:
            yield
        finally:
            with suppress(OSError):  # where an open file cannot be deleted, it stays, and means nothing
                (folder / NAME).unlink()
            os.close(descriptor)
    finally:
        with _GUARD:
            _HERE.discard(place)


def _locked(folder: Path) -> int:
    """An open, locked file in the folder that says who holds it."""
    path = folder / NAME
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            fix = "Choose a folder that you may write to."
            expected = "a folder that can be written"
            raise OutputError("store.write", str(folder), expected=expected, got=str(error), fix=fix) from error
        try:
            _try(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") if sys.platform != "win32" else ""
            os.close(descriptor)
            raise _taken(folder, holder or "another process") from error
        with suppress(FileNotFoundError):  # the holder before may have deleted the file between opening and locking
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor
        os.close(descriptor)


def _try(descriptor: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _taken(folder: Path, holder: str) -> OutputError:
    fix = "Wait until it ends, or end it: what it has done stays, and writing again goes on from there."
    expected = "written to by one writer at a time"
    return OutputError("store.write", str(folder), expected=expected, got=f"{holder}, which is at it", fix=fix)
