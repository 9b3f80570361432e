"""NumPy archives (.npz): plain arrays only, never pickled objects."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minikd.data.raw import LAYOUTS, Part, RawData, reading
from minikd.errors import DataError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _array(content: bytes, name: str) -> np.ndarray:
    """The array of one .npy member, read-only, once its header is known to fit its bytes.

    Read here and not by `np.load`, which makes room for whatever a damaged header asks before it looks.
    Errors: DataError for Python objects, or a header that does not fit; ValueError for what is no .npy at all.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"{name} is written in the .npy version {version}")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise DataError(
            "data.load",
            name,
            expected="an array of numbers or of fixed-width text",
            got="Python objects, which could run code when unpickled and are never loaded",
            fix="Save it with a plain dtype, such as np.asarray(names, dtype=str).",
        )
    size, found = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if size != found:
        raise DataError("data.load", name, expected=f"{size} bytes, as its header says", got=f"{found} bytes")
    values = np.frombuffer(content, dtype, offset=stream.tell()) if size else np.empty(0, dtype)
    return values.reshape(shape, order="F" if fortran_order else "C")


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
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        layout = _layout(path, members.keys() - {"class_names"})
        arrays = {name: _array(archive.read(member), f"{path}: {name}") for name, member in members.items()}
    parts = {name: Part(arrays[x], arrays[y], f"{path}: {x}", f"{path}: {y}") for name, (x, y) in layout.items()}
    names = _class_names(arrays["class_names"], path) if "class_names" in arrays else ()
    return RawData(path.stem, parts, names)
