"""Files that are mapped into memory, and may be changed by others meanwhile.

To touch a page that the file no longer has ends the process (SIGBUS), and a file that was written to is not what its
digest was of. So the file is looked at before its rows are.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from minikd.errors import DataError


class Watched:
    """The file behind an array, as it was when this was made; where the array is not mapped there is nothing to watch.

    Parameters
    ----------
    where : what is being done, for errors.  array : of any kind.
    """

    def __init__(self, where: str, array: Any) -> None:
        self._where = where
        self._path = array.filename if isinstance(array, np.memmap) and array.filename else None
        self._before = self._state()

    def check(self) -> None:
        """DataError where the file has been written to, or is shorter.

        One that was deleted, or that another took the name of, is still there for those who have it mapped.
        """
        now = self._state()
        if now is None or self._before is None or now[:2] != self._before[:2] or now == self._before:
            return
        expected = f"left as it was while it is in use ({self._before[2]} bytes)"
        got = f"one that was written to ({now[2]} bytes)"
        fix = "Begin again with the file as it is now; write another file, and rename it, to change one that is in use."
        raise DataError(self._where, str(self._path), expected=expected, got=got, fix=fix)

    def _state(self) -> tuple[int, int, int, int] | None:
        """Which file it is (two numbers), its size, and the time of its last change."""
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
