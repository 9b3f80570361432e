"""What every reader hands over: the arrays of a source as they were read, and the one way its files are opened."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minikd.errors import DataError, MinikdError


class Part(NamedTuple):
    """Features and labels of one part, with the names that errors call them by (a file, or an argument)."""

    x: np.ndarray
    y: np.ndarray
    x_name: str = "x"
    y_name: str = "y"


PARTS = ("train", "validation", "test")  # in this order a source's rows are numbered, and its arrays hashed
# Which arrays make a source, by the names that archives and errors give them.
LAYOUTS: tuple[dict[str, tuple[str, str]], ...] = (
    {"train": ("x", "y")},
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
    {"train": ("x_train", "y_train"), "validation": ("x_validation", "y_validation"), "test": ("x_test", "y_test")},
)


_BLOCK = 1 << 22  # bytes that are brought into C order at a time


def sha256_of(*arrays: np.ndarray) -> str:
    """Hex digest of arrays: `sha256_of(x, y)` is that of the data set `load((x, y))`.

    For each array the text "<dtype> <shape>\\n", as NumPy writes them for the little-endian dtype, then the values'
    bytes in C order and little-endian. Arrays that are mapped into memory are read block by block.
    """
    digest = hashlib.sha256()
    for array in arrays:
        little = array.dtype.newbyteorder("<")
        digest.update(f"{little.str} {array.shape}\n".encode())
        rows = array.reshape(1) if array.ndim == 0 else array
        step = max(1, _BLOCK // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            block = np.ascontiguousarray(rows[start : start + step], little)
            digest.update(block.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class RawData:
    """A source as it was read: nothing checked, split or normalised yet.

    parts : "train", and "validation" and "test" where the source itself has them.
    class_names : () where the source does not name its classes.
    validation, test : sizes of the parts that are split off where the caller names none, as in `data.load`.
        A fifth each, for small files need that much to measure anything.
    """

    name: str
    parts: dict[str, Part]
    class_names: tuple[str, ...] = ()
    validation: int | float = 0.2
    test: int | float = 0.2

    @property
    def sha256(self) -> str:
        """Hex digest of the arrays as read, in the order train, validation, test and within each x, y."""
        parts = [self.parts[name] for name in PARTS if name in self.parts]
        return sha256_of(*(array for part in parts for array in (part.x, part.y)))


_UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile)


@contextmanager
def reading(path: Path, form: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes one DataError that names the file and what it should be."""
    try:
        yield
    except MinikdError:
        raise
    except _UNREADABLE as error:
        raise DataError(
            "data.load",
            str(path),
            expected=f"a complete, readable {form} file",
            got=f"{type(error).__name__}: {error}".rstrip(": ."),
            fix="It may be half-written or damaged: copy or download it again.",
        ) from error
