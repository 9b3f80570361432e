"""NumPy's files (.npz and .npy): plain arrays only, never pickled objects."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minikd.data.raw import LAYOUTS, Part, RawData, reading
from minikd.errors import DataError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as NumPy does; the others can hold far more than they look like


def _header(stream: BinaryIO, size: int, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype of a .npy file of `size` bytes, once they are known to fit these.

    Errors: DataError for Python objects, or a header that does not fit; ValueError for what is no .npy at all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's advice on files of Python 2
            version = np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = _HEADERS[version](stream)
    except KeyError as error:
        raise ValueError(f"{name} is written in the .npy version {version}") from error
    except Exception as error:  # those of tokenize and ast, which are no ValueErrors, too
        raise ValueError(f"{name} has no header of a .npy file: {error}") from error
    if dtype.hasobject:
        raise DataError(
            "data.load",
            name,
            expected="an array of numbers or of fixed-width text",
            got="Python objects, which could run code when unpickled and are never loaded",
            fix="Save it with a plain dtype, such as np.asarray(names, dtype=str).",
        )
    if any(type(length) is not int or length < 0 for length in shape):  # NumPy's parser lets True pass
        raise DataError("data.load", name, expected="of a shape of whole numbers from 0", got=str(shape))
    expected, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if expected != found:
        raise DataError("data.load", name, expected=f"{expected} bytes, as its header says", got=f"{found} bytes")
    return shape, fortran_order, dtype


def _array(content: bytes, name: str) -> np.ndarray:
    """The array of one .npy member, read-only.

    Read here and not by `np.load`, which makes room for whatever a damaged header asks before it looks.
    Errors: as `_header`.
    """
    stream = io.BytesIO(content)
    shape, fortran_order, dtype = _header(stream, len(content), name)
    size = math.prod(shape) * dtype.itemsize
    values = np.frombuffer(content, dtype, offset=stream.tell()) if size else np.empty(0, dtype)
    return values.reshape(shape, order="F" if fortran_order else "C")


def mapped_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory: only the rows that are looked at are read.

    Errors: DataError for a file that cannot be read, damage, or Python objects.
    """
    with reading(path, "npy"), path.open("rb") as stream:
        shape, fortran_order, dtype = _header(stream, path.stat().st_size, str(path))
        order: Any = "F" if fortran_order else "C"
        if not math.prod(shape) * dtype.itemsize:
            return np.empty(shape, dtype, order)
        return np.memmap(stream, dtype, "r", stream.tell(), shape, order)


def arrays_of(path: Path, check: Callable[[set[str]], object] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; `check` is given the names before any of them is read, and may refuse them.

    Errors: DataError for damage, or arrays of Python objects; those of `check`.
    """
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if check is not None:
            check(set(members))
        strange = next((name for name, member in members.items() if member.compress_type not in _PACKED), None)
        if strange is not None:
            raise ValueError(f"{strange} is packed in another way than np.savez and np.savez_compressed do")
        return {name: _array(archive.read(member), f"{path}: {name}") for name, member in members.items()}


def _layout(path: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Which of LAYOUTS the archive's names make, or a DataError that lists them."""
    present = set(names)
    for layout in LAYOUTS:
        if present == {name for pair in layout.values() for name in pair}:
            return layout
    raise DataError(
        "data.load",
        str(path),
        expected="an archive of x, y, or of x_train, y_train, x_test, y_test (x_validation and y_validation, "
        "class_names if you like)",
        got=", ".join(sorted(present)) or "no array",
        fix="Save with these names: np.savez_compressed(path, x=x, y=y).",
    )


def _class_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) < max(2, len(names)):
        raise DataError(
            "data.load",
            f"{path}: class_names",
            expected="a one-dimensional array of at least two different texts",
            got=f"shape {names.shape}, dtype {names.dtype}",
        )
    return tuple(names.tolist())


def read_npz(path: Path, label_column: str = "") -> RawData:
    """An archive in one of LAYOUTS, with or without class_names. `label_column` is for CSV.

    Errors: DataError for damage, other names, or arrays of Python objects.
    """
    arrays = arrays_of(path, lambda names: _layout(path, names - {"class_names"}))
    layout = _layout(path, arrays.keys() - {"class_names"})
    parts = {name: Part(arrays[x], arrays[y], f"{path}: {x}", f"{path}: {y}") for name, (x, y) in layout.items()}
    names = _class_names(arrays["class_names"], path) if "class_names" in arrays else ()
    return RawData(path.stem, parts, names)
