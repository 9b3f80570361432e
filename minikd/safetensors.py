"""The safetensors file format: eight bytes with the header's length, a JSON header, then the tensors' bytes.

Reading executes nothing and accepts only what the format allows: tensors that cover the data exactly, in order, without
gaps or overlaps. Writing is deterministic (names sorted) and atomic (a temporary name, then a rename).

Source: the format's description in the safetensors project, version 0.4 and later.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minikd.errors import ModelFormatError, OutputError

# Name in the header → dtype of the bytes in the file; the format is little-endian throughout.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
LARGEST_HEADER = 100_000_000  # the limit of the reference implementation
ALIGNMENT = 8


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str], *, durable: bool = True
) -> None:
    """Write named arrays and text metadata; the file appears under its name only when it is whole.

    durable : whether it also survives a power cut, which takes some milliseconds.

    Raises
    ------
    OutputError : the folder does not exist or cannot be written.  ModelFormatError : a dtype has no name in the format.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces, start = [], 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        kind = next((k for k, d in DTYPES.items() if d == array.dtype.newbyteorder("<")), None)
        if kind is None:
            raise ModelFormatError("save", name, expected="of dtype " + ", ".join(DTYPES), got=str(array.dtype))
        data = array.astype(DTYPES[kind], copy=False).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, start + len(data)]}
        pieces.append(data)
        start += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    write_whole(Path(path), struct.pack("<Q", len(text)) + text + b"".join(pieces), durable=durable)


def write_whole(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
    """Write a file under a temporary name beside it and rename it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with temporary.open("xb") as file:
                file.writelines(pieces)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        fix = "Choose a folder that exists and that you may write to, on a disk with room."
        raise OutputError("save", str(path), expected="a file that can be written", got=str(error), fix=fix) from error


def _refuse(path: Path, part: str, expected: str, got: object) -> ModelFormatError:
    fix = "The file is damaged, cut short, or not a safetensors file: save or copy it again."
    return ModelFormatError("load", f"{path}: {part}", expected=expected, got=str(got)[:200], fix=fix)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The named arrays and the metadata of a file.

    Raises
    ------
    ModelFormatError : the file is missing or does not follow the format to the letter (the message says where).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFormatError("load", str(path), expected="a readable file", got=str(error)) from error
    header, body = _split(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refuse(path, "__metadata__", "a table of texts", metadata)
    tensors, position = {}, 0
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != position or stop - start != math.prod(shape) * dtype.itemsize or stop > len(body):
            expected = f"a tensor of {dtype} {shape} that begins at byte {position} of {len(body)}"
            raise _refuse(path, name, expected, f"bytes {start} to {stop}")
        tensors[name] = np.frombuffer(body[start:stop], dtype).reshape(shape).astype(dtype.newbyteorder("="))
        position = stop
    if position != len(body):
        raise _refuse(path, "the data", f"{position} bytes, as the header says", f"{len(body)} bytes")
    return tensors, metadata


def _split(path: Path, data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header and the bytes behind it."""
    if len(data) < 8:
        raise _refuse(path, "the file", "at least 8 bytes", f"{len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(LARGEST_HEADER, len(data) - 8):
        raise _refuse(path, "the header's length", f"at most the {len(data) - 8} bytes that follow", length)
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, "the header", "JSON with different names", error) from error
    if not isinstance(header, dict) or not data[8:9] == b"{":
        raise _refuse(path, "the header", "a JSON object", type(header).__name__)
    return header, data[8 + length :]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name comes twice")
    return table


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """One tensor's dtype, shape and place, as far as it can be checked alone."""

    def whole(values: Any, count: int | None = None) -> bool:
        numbers = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
        return numbers and (count is None or len(values) == count)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, name, "an entry with dtype, shape and data_offsets", entry)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _refuse(path, f"{name}: dtype", "one of " + ", ".join(DTYPES), entry["dtype"])
    if not whole(entry["shape"]) or len(entry["shape"]) > 32 or not whole(entry["data_offsets"], 2):
        raise _refuse(path, name, "a shape and two offsets, all whole numbers from 0", entry)
    start, stop = entry["data_offsets"]
    return dtype, tuple(entry["shape"]), start, stop
