"""IDX files, the format of MNIST and Fashion-MNIST (Y. LeCun, C. Cortes, C. Burges; http://yann.lecun.com/exdb/mnist).

Two zero bytes, one for the type, one for the number of dimensions; each dimension as a big-endian 32-bit count; then
the values in C order, big-endian.
"""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from minikd.data.raw import Part, RawData, reading
from minikd.errors import DataError

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CHUNK = 1 << 20


def _up_to(stream: io.BufferedIOBase, count: int) -> bytearray:
    """At most about `count` bytes, a chunk at a time: a header that lies can never ask for more than the file has."""
    found = bytearray()
    while len(found) < count and (chunk := stream.read(min(_CHUNK, count - len(found)))):
        found += chunk
    return found


def _header(path: Path, stream: io.BufferedIOBase) -> tuple[np.dtype[Any], list[int]]:
    """The dtype and shape that the file's first bytes declare, or a DataError if they are no IDX header."""
    head = _up_to(stream, 4)
    known = len(head) == 4 and head[:2] == b"\0\0" and head[2] in TYPES
    counts = _up_to(stream, 4 * head[3]) if known else head
    if not known or len(counts) < 4 * head[3]:
        raise DataError(
            "data.load",
            str(path),
            expected="an IDX file, which starts with two zero bytes, a type, and the sizes of its dimensions",
            got=f"a file that starts with {bytes(head)!r}" + (" and ends within the sizes" if known else ""),
            fix="A gzipped file must be named .gz, any other must not.",
        )
    return np.dtype(TYPES[head[2]]), np.frombuffer(counts, ">u4").tolist() if counts else []


def read_idx(path: Path) -> np.ndarray:
    """The array in the IDX file `path`, gzipped if it ends in .gz; dtype and shape as the header says.

    Errors: DataError for a file that cannot be read, that has another format, or whose size is not what it says.
    """
    with reading(path, "IDX"), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        dtype, shape = _header(path, stream)
        size = math.prod(shape) * dtype.itemsize
        values = _up_to(stream, size + 1)
        if len(values) != size:
            header = 4 + 4 * len(shape)
            raise DataError(
                "data.load",
                str(path),
                expected=f"of {header + size} bytes, as its header says (shape {tuple(shape)})",
                got=f"{header + len(values)} bytes" + (" or more" if len(values) > size else ""),
                fix="It is half-written or damaged: copy or download it again.",
            )
        return np.frombuffer(values, dtype).reshape(shape)


def _found(folder: Path, name: str) -> Path:
    """The file `name` or `name`.gz in the folder, or a DataError that lists what belongs there."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        "data.load",
        str(folder),
        expected=f"a folder with {', '.join(sum(FILES.values(), ()))}, each with .gz or without",
        got=f"no {name}",
    )


def read_idx_folder(folder: Path, label_column: str = "") -> RawData:
    """A folder of four IDX files, the training and the test part of MNIST and its kin.

    A twelfth of the training part becomes the validation part by default: 5,000 of 60,000. `label_column` is for CSV.
    """
    parts = {}
    for name, files in FILES.items():
        images, labels = (_found(folder, file) for file in files)
        parts[name] = Part(read_idx(images), read_idx(labels), str(images), str(labels))
    return RawData(folder.name, parts, validation=1 / 12)
