"""Ways to change files at random: bytes, words of a text, trees, and what lies in archives.

Each takes the bytes and a random generator and gives other bytes; what a change cannot be made to, such as a damaged
archive, is changed as plain bytes.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

Change = Callable[[bytes, random.Random], bytes]

# What is put where a number, a text or a table stood. The last are JSON that Python reads and the standard forbids.
NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 3, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 1.0, 2.5, 1e300, float("nan"), float("inf"), True, False, None),
    *("", "0", "0.weight", "F16", "F64", "I8", "BF16", ">F4", "relu", "swish", "\ud800", "\0", "a" * 300, "9" * 5000),
    *([], [[]], [0], [1] * 40, [2**62] * 3, {}, {"": ""}, {"dtype": "F32"}),
)


# --- bytes ---


def flipped(raw: bytes, rng: random.Random) -> bytes:
    if not raw:
        return b"\0"
    found = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def moved(raw: bytes, rng: random.Random) -> bytes:
    """A piece left out, put in twice, or replaced by noise."""
    first, last = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    last = min(last, first + rng.choice((1, 4, 8, 64, len(raw))))
    piece = rng.choice((b"", raw[first:last] * 2, rng.randbytes(last - first), bytes(last - first)))
    return raw[:first] + piece + raw[last:]


PLAIN: tuple[Change, ...] = (flipped, cut, moved)


# --- texts ---


def words(*others: str) -> Change:
    """Words, numbers and signs of a text replaced by others of it or by these, left out or put in twice."""

    def change(raw: bytes, rng: random.Random) -> bytes:
        parts = re.findall(rb'"[^"\n]*"|[\w.]+|\s+|.', raw, re.DOTALL)
        if not parts:
            return rng.choice(others).encode()
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            k = rng.randrange(len(parts))
            other = rng.choice(others).encode("utf-8", "surrogatepass") if rng.random() < 0.7 else rng.choice(parts)
            parts[k] = rng.choice((other, other, other, b"", parts[k] * 2))
        return b"".join(parts)

    return change


def nested(opening: str, closing: str) -> Change:
    """Brackets in brackets, in place of a word: deeper than Python's own reader would follow."""

    def change(raw: bytes, rng: random.Random) -> bytes:
        depth = rng.choice((3, 80, 300, 3000))
        places = [m.start() for m in re.finditer(rb"\w+", raw)] or [0]
        start = rng.choice(places)
        shut = closing * depth if rng.random() < 0.7 else ""
        return raw[:start] + (opening * depth + "1" + shut).encode() + raw[start:]

    return change


# --- trees ---


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each node below the root as (its container, its key there)."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def change_tree(tree: Any, rng: random.Random) -> None:
    """One change in place: another value, a number beside the one there, something gone, renamed, swapped or twice."""
    found = list(places(tree))
    if not found:
        return
    container, key = rng.choice(found)
    value = container[key]
    kind = rng.randrange(6)
    if kind == 0:
        container[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind == 1 and type(value) is int:
        container[key] = value + rng.choice((-4, -1, 1, 4, 8))
    elif kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, dict):
        items = [(rng.choice(("0", "x", "shape", "0.bias")) if k == key else k, v) for k, v in container.items()]
        container.clear()
        container.update(items)
    elif kind == 4 and isinstance(value, dict | list):
        items = list(value.items()) if isinstance(value, dict) else value[:]
        rng.shuffle(items)
        value.clear()
        value.update(items) if isinstance(value, dict) else value.extend(items)
    else:
        other, there = rng.choice(found)
        container[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(value)


def changed_json(raw: bytes, rng: random.Random) -> bytes:
    """A text in JSON with a change of its tree; bytes behind it, such as spaces, stay as they are."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return rng.choice(PLAIN)(raw, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change_tree(tree, rng)
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def changed_footer(size: int) -> Change:
    """A change of the JSON in a file's last bytes, as many as they are, filled up with spaces."""

    def change(raw: bytes, rng: random.Random) -> bytes:
        return raw[:-size] + changed_json(raw[-size:], rng).ljust(size - 1) + b"\n"

    return change


def changed_message(raw: bytes, rng: random.Random) -> bytes:
    """An ONNX model, which is a message of protocol buffers, with another value in some field of some part of it."""
    onnx = import_module("onnx")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception:  # a class of whichever implementation of protocol buffers is installed
        return rng.choice(PLAIN)(raw, rng)
    fields = list(fields_of(model))
    if not fields:
        return rng.choice(PLAIN)(raw, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        message, field = rng.choice(fields)
        value = getattr(message, field.name)
        new = _of_the_type(field, rng)
        with contextlib.suppress(TypeError, ValueError, AttributeError, IndexError):  # what the field cannot hold
            if rng.random() < 0.2:
                message.ClearField(field.name)
            elif not isinstance(value, int | float | str | bytes) and hasattr(value, "append"):
                k = rng.randrange(len(value) + 1)
                if new is None:
                    value.append(value[k - 1])
                else:
                    value[k : k + 1] = [new]
            elif new is not None:
                setattr(message, field.name, new)
    return bytes(model.SerializeToString())


def fields_of(message: Any) -> Iterator[tuple[Any, Any]]:
    """Each field that is set, in a message and in those below it, as (message, field)."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from fields_of(part)


def _of_the_type(field: Any, rng: random.Random) -> Any:
    """A value that a field of a message may hold; None for those that hold messages."""
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        names = ("", "x", "features", "Gemm", "Add", "Mul", "Constant", "axis", "0.weight", "transB", '["a"]', "\0" * 8)
        name = rng.choice(names)
        return name if field.type == field.TYPE_STRING else name.encode()
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 0.5, 1.0, float("nan"), float("inf"), 3e38))
    if field.type == field.TYPE_MESSAGE:
        return None
    return rng.choice((0, 1, 2, 3, 4, 7, 10, 11, -1, 2**31 - 1, 2**40, 2**62, 2**63 - 1))


# --- archives ---


def within_gzip(inner: Change) -> Change:
    """A change of what a gzipped file holds."""

    def change(raw: bytes, rng: random.Random) -> bytes:
        try:
            return gzip.compress(inner(gzip.decompress(raw), rng), 1)
        except Exception:  # damaged in one of the many ways that gzip and zlib tell apart
            return rng.choice(PLAIN)(raw, rng)

    return change


def within_zip(inner: Change) -> Change:
    """A change of one member of a zip archive, of its name, or of how it is packed; all checksums fit."""
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

    def change(raw: bytes, rng: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                members = [(name, archive.read(name)) for name in archive.namelist()]
        except Exception:  # damaged in one of the many ways that zipfile and its decompressors tell apart
            return rng.choice(PLAIN)(raw, rng)
        if members:
            k, kind = rng.randrange(len(members)), rng.randrange(8)
            name, content = members[k]
            if kind == 0:
                del members[k]
            elif kind == 1:
                members[k] = (rng.choice(("x.npy", "y.npy", "y", "class_names.npy", "../x.npy", "a" * 70)), content)
            elif kind == 2:
                members[k] = (name, rng.choice(members)[1])
            else:
                members[k] = (name, inner(content, rng))
        return zipped(members, rng.choice(methods))

    return change


def zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these members, of which later ones with a name that was there already are left out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, value in dict(members).items():
            archive.writestr(name, value)
    return content.getvalue()


NPY_WORDS = (
    *("-1", "0", "1", "3", "4611686018427387904", "99999999999999999999", "True", "None", "1L", "'x'", "(", ")", "{"),
    *("'<f4'", "'<f8'", "'|O'", "'<U3'", "'|V0'", "'>i2'", "'|b1'", "'<M8[s]'", "[('a', '<f4')]", "'f4,f4'", "'<c8'"),
    *("'<U0'", "'|S4'", "[]", "(2,)", "(1,)*9", "\n", "#"),
)


def npy_header(raw: bytes, rng: random.Random) -> bytes:
    """The header of a .npy file with other words, as long as it says."""
    if len(raw) < 10:
        return rng.choice(PLAIN)(raw, rng)
    length = min(int.from_bytes(raw[8:10], "little"), len(raw) - 10)
    text, data = raw[10 : 10 + length], raw[10 + length :]
    text = words(*NPY_WORDS)(text, rng).rstrip() + b"\n"
    return raw[:8] + struct.pack("<H", min(len(text), 65535)) + text + data


# --- safetensors ---


class File(NamedTuple):
    """A safetensors file in its parts: the header's length as it is said, the header as text, the data."""

    length: int
    text: bytes
    data: bytes

    @classmethod
    def of(cls, raw: bytes) -> File:
        (length,) = struct.unpack("<Q", raw[:8])
        return cls(length, raw[8 : 8 + length], raw[8 + length :])

    @property
    def bytes(self) -> bytes:
        return struct.pack("<Q", self.length % 2**64) + self.text + self.data

    def with_header(self, header: Any, rng: random.Random) -> File:
        """Another header, spelled as minikd does or otherwise."""
        spelled = {"separators": (",", ":"), "ensure_ascii": False} if rng.random() < 0.8 else {}
        text = json.dumps(header, **spelled).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        return self._replace(length=len(text), text=text)

    def sealed(self) -> File:
        """The same with a seal that fits, so that what lies behind the seal is reached; as it is if there is none."""
        try:
            seal = json.loads(self.text)["__metadata__"]["sha256"].encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return self
        blank = self._replace(text=self.text.replace(seal, b"0" * 64)) if len(seal) == 64 else self
        return self._replace(text=self.text.replace(seal, hashlib.sha256(blank.bytes).hexdigest().encode(), 1))


def changed_header(file: File, rng: random.Random) -> File:
    header = json.loads(file.text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change_tree(header, rng)
    return file.with_header(header, rng)


def changed_metadata(file: File, rng: random.Random) -> File:
    """A change within the JSON that stands in the metadata as text, or of one of the texts."""
    header = json.loads(file.text)
    about = header["__metadata__"]
    name = rng.choice([n for n in about if n != "sha256"])
    try:
        tree = [json.loads(about[name])]
    except ValueError:
        about[name] = rng.choice([v for v in NASTY if isinstance(v, str)])
        return file.with_header(header, rng)
    change_tree(tree, rng)
    about[name] = json.dumps(tree[0] if tree else None)
    return file.with_header(header, rng)


def doubled_name(file: File, rng: random.Random) -> File:
    """A name twice in one table, which no tree can hold."""
    names = [n.encode() for n in (*json.loads(file.text), "dtype", "shape", "data_offsets", "sha256", "format")]
    name = rng.choice(names)
    start = file.text.find(b'"' + name + b'":')
    if start < 0:
        return file
    value = rng.choice((b"0", b'"F32"', b"[16]", b"{}", b'"minikd"', b"null"))
    text = file.text[:start] + b'"' + name + b'":' + value + b"," + file.text[start:]
    return file._replace(length=len(text), text=text)


def odd_spelling(file: File, rng: random.Random) -> File:
    """A piece of the header's text spelled in another way, right or wrong."""
    ways = (
        (b"[", b"[ "),
        (b"0", b"-0"),
        (b"0", b"0.0"),
        (b"1", b"1e0"),
        (b"r", b"\\u0072"),
        (b",", b",,"),
        (b"0", b"00"),
    )
    old, new = rng.choice((*ways, (b"a", b"\\ud800"), (b"a", b"\xff"), (b" ", b"\0"), (b"{", b"{{"), (b":", b":NaN,")))
    found = [k for k in range(len(file.text)) if file.text.startswith(old, k)]
    if not found:
        return file
    start = rng.choice(found)
    text = file.text[:start] + new + file.text[start + len(old) :]
    return file._replace(length=len(text), text=text)


def other_length(file: File, rng: random.Random) -> File:
    near = file.length + rng.randrange(-16, 17)
    return file._replace(length=rng.choice((0, 1, 7, near, near, 2**31, 2**40, 2**63, 2**64 - 1)))


def poisoned(file: File, rng: random.Random) -> File:
    """A number of the data that is none, or far away."""
    place = rng.randrange(len(file.data) // 4) * 4
    number = np.float32(rng.choice((np.nan, np.inf, -np.inf, 0, -1, 3e38, 1e-45))).tobytes()
    return file._replace(data=file.data[:place] + number + file.data[place + 4 :]).sealed()


def of_the_file(change: Callable[[File, random.Random], File], sealed: bool = False) -> Change:
    """A change of the parts of a safetensors file, which gets a seal that fits more often than not."""

    def mutate(raw: bytes, rng: random.Random) -> bytes:
        try:
            found = change(File.of(raw), rng)
        except Exception:  # no header, or none that can be changed so
            return rng.choice(PLAIN)(raw, rng)
        return (found.sealed() if sealed and rng.random() < 0.7 else found).bytes

    return mutate


IN_THE_BYTES: tuple[Change, ...] = (*PLAIN, of_the_file(other_length), of_the_file(poisoned))
IN_THE_HEADER: tuple[Change, ...] = tuple(
    of_the_file(change, sealed=True)
    for change in (changed_header, changed_header, changed_metadata, doubled_name, odd_spelling)
)


# --- many of them ---


def mutants(seeds: Sequence[bytes], groups: Sequence[Sequence[Change]], count: int, seed: int) -> Iterator[bytes]:
    """So many changed files, each of one of the seeds by a change of one of the groups, which take turns."""
    rng = random.Random(seed)
    for k in range(count):
        yield rng.choice(groups[k % len(groups)])(rng.choice(seeds), rng)
