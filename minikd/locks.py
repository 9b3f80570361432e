"""One writer at a time: a lock that the operating system takes back from a process that ends, however it ends."""

from __future__ import annotations

import errno
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
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what the system says of a lock that another process has
_HERE: set[Path] = set()  # locks that this process holds: the system's locks are between processes alone
_GUARD = threading.Lock()


@contextmanager
def only_writer(
    folder: Path, where: str, fix: str, *, writer: str = "writer", file: str | None = None
) -> Iterator[None]:
    """Hold the folder's lock; OutputError that names the process if another holds it, or this one does already.

    Parameters
    ----------
    where, fix : of that error: what was being done, and what may be done instead.
    writer : what may write to the folder one at a time, in a word.
    file : of the folder, whose lock is held in place of that of the folder as a whole.

    A file system that has no locks is written to without one.
    """
    place = folder.resolve() / (NAME if file is None else f".{file}{NAME}")

    def taken(holder: str) -> OutputError:
        subject, expected = str(folder / (file or "")), f"written to by one {writer} at a time"
        return OutputError(where, subject, expected=expected, got=f"{holder}, which is at it", fix=fix)

    with _GUARD:
        if place in _HERE:
            raise taken("a write in this process")
        _HERE.add(place)
    try:
        descriptor, holder = _locked(place, where)
        if descriptor is None:
            raise taken(holder)
        try:
            yield
        finally:
            with suppress(OSError):  # where an open file cannot be deleted, it stays, and means nothing
                place.unlink()
            os.close(descriptor)
    finally:
        with _GUARD:
            _HERE.discard(place)


def _locked(path: Path, where: str) -> tuple[int | None, str]:
    """The file, open and locked, which says who holds it; or None, and who does."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            fix = "Choose a folder that you may write to."
            expected = "a folder that can be written"
            raise OutputError(where, str(path.parent), expected=expected, got=str(error), fix=fix) from error
        if not _try(descriptor):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") if sys.platform != "win32" else ""
            os.close(descriptor)
            return None, holder or "another process"
        with suppress(FileNotFoundError):  # the holder before may have deleted the file between opening and locking
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                with suppress(OSError):  # on a full disk the lock holds without saying whose it is
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor, ""
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Lock the file; False if another process has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True
