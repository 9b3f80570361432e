"""The safetensors file format: eight bytes with the header's length, a JSON header, then the tensors' bytes.

Reading executes nothing and accepts only what the format allows: tensors that cover the data exactly, without gaps or
overlaps. The header is checked against the file's size before anything is allocated for the data. Writing is
deterministic (names sorted) and atomic (a temporary name, then a rename).

A file may carry a seal: its metadata's `sha256` is the SHA-256 of the file with 64 zeros in place of these 64 digits.
So it covers every byte, the header's too.

Source: the format's description in the safetensors project, version 0.4 and later.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
METADATA, SEAL = "__metadata__", "sha256"
UNSEALED = "0" * 64


# --- writing ---


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    durable: bool = True,
    seal: bool = False,
) -> None:
    """Write named arrays and text metadata; the file appears under its name only when it is whole.

    durable : whether it also survives a power cut, which takes some ten milliseconds.
    seal : whether the metadata get the file's `sha256`, which `read` compares.

    Raises
    ------
    OutputError : the folder does not exist or cannot be written.
    ModelFormatError : a dtype has no name in the format, a tensor bears the metadata's name, or a text is none.
    """
    entries: dict[str, Any] = {}
    pieces, start = [], 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        kind = next((k for k, d in DTYPES.items() if d == array.dtype.newbyteorder("<")), None)
        if kind is None or name == METADATA:
            expected = "of dtype " + ", ".join(DTYPES) if kind is None else "called something else"
            raise ModelFormatError("save", name, expected=expected, got=str(array.dtype) if kind is None else name)
        data = array.astype(DTYPES[kind], copy=False).tobytes()
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, start + len(data)]}
        pieces.append(data)
        start += len(data)
    about = {**metadata, SEAL: UNSEALED} if seal else dict(metadata)
    head = _head(about, entries)
    if seal:
        digest = hashlib.sha256(head)
        for piece in pieces:
            digest.update(piece)
        head = _head({**about, SEAL: digest.hexdigest()}, entries)
    write_whole(Path(path), head, *pieces, durable=durable)


def _head(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """The header with its length in front."""
    for name, value in metadata.items():
        if not isinstance(value, str):
            fix = "Write numbers and lists as text, with json.dumps for one."
            raise ModelFormatError("save", f"metadata {name}", expected="a text", got=repr(value)[:200], fix=fix)
    header = {METADATA: dict(sorted(metadata.items())), **entries} if metadata else dict(entries)
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        got = ascii(error.object[error.start : error.end])
        raise ModelFormatError("save", "names and metadata", expected="text that UTF-8 can hold", got=got) from error
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_whole(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
    """Write a file under a temporary name beside it and rename it, so that nobody ever sees half of it.

    durable : whether the file, and its new name, also survive a power cut. That forces two writes to the disk: some ten
        milliseconds. What is written many times a second does without.

    Raises
    ------
    OutputError : it cannot be written; what was there before is there still.
    """
    write_together({path: pieces}, durable=durable)


def write_together(files: Mapping[Path, Sequence[bytes | memoryview]], *, durable: bool = True) -> None:
    """Write files that belong together: none gets its name before all are written, as `write_whole` does with one.

    So a full disk leaves all the former ones. A kill between two renames leaves both kinds, each of them whole.
    """
    parts: dict[Path, Path] = {}
    path = Path()
    try:
        try:
            for path, pieces in files.items():
                parts[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
                with parts[path].open("xb") as file:
                    file.writelines(pieces)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
            for path, part in parts.items():
                part.replace(path)
            if durable:
                for folder in dict.fromkeys(path.parent for path in parts):
                    _keep_names(folder)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        fix = "Choose a folder that exists and that you may write to, on a disk with room."
        raise OutputError("save", str(path), expected="a file that can be written", got=str(error), fix=fix) from error


# What a system says that does not do this: a file system without it, a folder that may not be read.
_CANNOT_KEEP = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def _keep_names(folder: Path) -> None:
    """Force the folder's list of names to the disk, without which a rename may be lost in a power cut."""
    if os.name != "posix":  # Windows opens no folders, and keeps its names by itself
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_KEEP:
            raise


# --- reading ---


class Contents(NamedTuple):
    """What a file holds.

    tensors : in the order of their bytes.  metadata : texts.
    in_order : whether the header names the tensors in that order, too, as the files written here do.
    sha256 : what a seal of the file must be; empty unless it was asked for.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    in_order: bool
    sha256: str


class _Place(NamedTuple):
    """What the header says of one tensor; offsets count from the data's first byte."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The named arrays and the metadata of a file.

    Raises
    ------
    ModelFormatError : the file is missing or does not follow the format to the letter (the message says where).
    """
    contents = read(path)
    return contents.tensors, contents.metadata


def read(path: str | os.PathLike[str], *, digest: bool = False) -> Contents:
    """What a file holds; with `digest` also what its seal must be, which the caller compares where there is one.

    Raises
    ------
    ModelFormatError : as `read_tensors`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, digest)
    except (OSError, MemoryError) as error:
        got = str(error) or "too few bytes of memory for it"
        raise ModelFormatError("load", str(path), expected="a readable file", got=got) from error


def _read(path: Path, file: io.BufferedReader, size: int, digest: bool) -> Contents:
    head, header = _header(path, file, size)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refuse(path, METADATA, "a table of texts", metadata)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    in_order = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    _check_places(path, in_order, size - len(head))
    running = hashlib.sha256(_unsealed(head, metadata)) if digest else None
    tensors = {}
    for name, (dtype, shape, *_) in in_order.items():
        array = np.empty(shape, dtype)
        data = array.reshape(-1).view(np.uint8)
        if file.readinto(data.data) != len(data):
            raise _refuse(path, name, f"{len(data)} bytes", "fewer: the file became shorter while it was read")
        if running is not None:
            running.update(data.data)
        tensors[name] = array.astype(dtype.newbyteorder("="), copy=False)
    return Contents(tensors, metadata, list(entries) == list(in_order), running.hexdigest() if running else "")


def _unsealed(head: bytes, metadata: Mapping[str, str]) -> bytes:
    """The header with zeros in place of its seal, where it has one."""
    seal = metadata.get(SEAL, "").encode()
    return head.replace(seal, UNSEALED.encode()) if len(seal) == len(UNSEALED) else head


def _refuse(path: Path, part: str, expected: str, got: object) -> ModelFormatError:
    fix = "The file is damaged, cut short, or not a safetensors file: save or copy it again."
    return ModelFormatError("load", f"{path}: {part}", expected=expected, got=str(got)[:200], fix=fix)


def _header(path: Path, file: io.BufferedReader, size: int) -> tuple[bytes, dict[str, Any]]:
    """The header with its length in front, as bytes and as a table."""
    start = file.read(8)
    if size < 8 or len(start) < 8:
        raise _refuse(path, "the file", "at least 8 bytes", f"{size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > min(LARGEST_HEADER, size - 8):
        raise _refuse(path, "the header's length", f"at most the {size - 8} bytes that follow", length)
    text = file.read(length)
    try:
        header = parse_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise _refuse(path, "the header", "JSON with different names", error) from error
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise _refuse(path, "the header", "a JSON object", type(header).__name__)
    return start + text, header


def parse_json(text: str) -> Any:
    """What a JSON text says. Stricter than Python's reader, which takes more than the standard allows.

    Raises
    ------
    ValueError, RecursionError : the text is no JSON, a name comes twice, a number is NaN, infinite or -0, or a string
        holds half of a surrogate pair.
    """
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_integer, parse_constant=_no_number)
    json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs have no UTF-8
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name comes twice")
    return table


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _entry(path: Path, name: str, entry: Any) -> _Place:
    """One tensor's dtype, shape and place, as far as it can be checked alone."""

    def whole(values: Any, count: int | None = None) -> bool:
        numbers = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
        return numbers and (count is None or len(values) == count)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, name, "an entry with dtype, shape and data_offsets", entry)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _refuse(path, f"{name}: dtype", "one of " + ", ".join(DTYPES), entry["dtype"])
    shape = entry["shape"]
    if not whole(shape) or len(shape) > 32 or not whole(entry["data_offsets"], 2):
        raise _refuse(path, name, "a shape and two offsets, all whole numbers from 0", entry)
    if math.prod(s for s in shape if s) >= 2**59:  # of which one size may be 0: no array can have the others
        raise _refuse(path, f"{name}: shape", "of fewer than 2⁵⁹ numbers", shape)
    start, stop = entry["data_offsets"]
    return _Place(dtype, tuple(shape), start, stop)


def _check_places(path: Path, entries: Mapping[str, _Place], size: int) -> None:
    """Tensors, sorted by place, cover the `size` bytes of data exactly, each with as many bytes as its shape needs."""
    position = 0
    for name, (dtype, shape, start, stop) in entries.items():
        if start != position or stop - start != math.prod(shape) * dtype.itemsize or stop > size:
            expected = f"a tensor of {dtype} {shape} that begins at byte {position} of {size}"
            raise _refuse(path, name, expected, f"bytes {start} to {stop}")
        position = stop
    if position != size:
        raise _refuse(path, "the data", f"{position} bytes, as the header says", f"{size} bytes")
