"""Files changed at random, by the thousand: each is read, or refused with a ModelFormatError, in little memory.

MINIKD_FUZZ=100000 sets how many; the run takes a fraction of a millisecond for each. MINIKD_FUZZ_SEED takes others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import minikd as kd
from minikd import runtime
from minikd.data import Normalisation
from minikd.errors import ModelFormatError
from minikd.export import read_tensors, write_tensors

COUNT = int(os.environ.get("MINIKD_FUZZ", "3000"))
SEED = int(os.environ.get("MINIKD_FUZZ_SEED", "0"))
MOST_MEMORY = 4 << 20  # bytes; the files have two thousand

# What is put where a number, a text or a table stood. The last are JSON that Python reads and the standard forbids.
NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 3, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 1.0, 2.5, 1e300, float("nan"), float("inf"), True, False, None),
    *("", "0", "0.weight", "F16", "F64", "I8", "BF16", ">F4", "relu", "swish", "\ud800", "\0", "a" * 300, "9" * 5000),
    *([], [[]], [0], [1] * 40, [2**62] * 3, {}, {"": ""}, {"dtype": "F32"}),
)


class File(NamedTuple):
    """A file in its parts: the header's length as it is said, the header as text, the data."""

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


# --- changes of the header as a tree ---


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


# --- changes of the bytes ---


def flipped(file: File, rng: random.Random) -> bytes:
    raw = bytearray(file.bytes)
    for _ in range(rng.choice((1, 1, 2, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(file: File, rng: random.Random) -> bytes:
    return file.bytes[: rng.randrange(len(file.bytes))]


def moved(file: File, rng: random.Random) -> bytes:
    """A piece left out, put in twice, or replaced by noise."""
    raw = file.bytes
    first, last = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
    last = min(last, first + rng.choice((1, 4, 8, 64, len(raw))))
    piece = rng.choice((b"", raw[first:last] * 2, rng.randbytes(last - first), bytes(last - first)))
    return raw[:first] + piece + raw[last:]


def other_length(file: File, rng: random.Random) -> bytes:
    near = file.length + rng.randrange(-16, 17)
    return file._replace(length=rng.choice((0, 1, 7, near, near, 2**31, 2**40, 2**63, 2**64 - 1))).bytes


def poisoned(file: File, rng: random.Random) -> bytes:
    """A number of the data that is none, or far away."""
    place = rng.randrange(len(file.data) // 4) * 4
    number = np.float32(rng.choice((np.nan, np.inf, -np.inf, 0, -1, 3e38, 1e-45))).tobytes()
    return file._replace(data=file.data[:place] + number + file.data[place + 4 :]).sealed().bytes


def in_the_header(change: Callable[[File, random.Random], File]) -> Callable[[File, random.Random], bytes]:
    def mutate(file: File, rng: random.Random) -> bytes:
        found = change(file, rng)
        return (found.sealed() if rng.random() < 0.7 else found).bytes

    return mutate


BYTES = (flipped, cut, moved, other_length, poisoned)
HEADERS = tuple(map(in_the_header, (changed_header, changed_header, changed_metadata, doubled_name, odd_spelling)))


# --- what must hold ---


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[File]:
    """Files of version 2 with all that a file can hold and with little, and one of version 1."""
    folder = tmp_path_factory.mktemp("whole")
    full = kd.nn.MLP([4, 6, 5, 3], "tanh", dropout=0.25, seed=3)
    full.normalisation = Normalisation(np.arange(4, dtype=np.float32), np.full(4, 2, np.float32))
    full.class_names = ("a", "naïve ✓", "c")
    kd.save(folder / "full", full)
    kd.save(folder / "small", kd.nn.MLP([3, 2], dtype=np.float64))
    about = {"format": "minikd", "format_version": "1", "sizes": "[4, 6, 3]", "activation": "relu"}
    about |= {"dropout": "0.0", "input_dropout": "0.0", "seed": "0", "class_names": '["a", "b", "c"]'}
    write_tensors(folder / "old", kd.nn.MLP([4, 6, 3]).state_dict(), about)
    return [File.of((folder / name).read_bytes()) for name in ("full", "full", "small", "old")]


def mutants(files: list[File], count: int, seed: int = SEED) -> Iterator[bytes]:
    rng = random.Random(seed)
    for k in range(count):
        yield rng.choice((BYTES, HEADERS)[k % 2])(rng.choice(files), rng)


class Slot:
    """One file that is written over again and again; to make it anew each time can take a hundred times as long."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "m"
        self.path.touch()

    def holds(self, raw: bytes) -> Path:
        with self.path.open("r+b") as file:
            file.write(raw)
            file.truncate()
        return self.path


def attempt(read: Callable[[Path], Any], path: Path, refusal: type[Exception]) -> Any:
    """What was read, or None where it was refused in the one way that is allowed."""
    try:
        return read(path)
    except refusal:
        return None


def test_changed_files_are_read_or_refused_in_words(files: list[File], tmp_path: Path) -> None:
    slot, x, loaded = Slot(tmp_path), np.ones((1, 4), np.float32), 0
    for raw in mutants(files, COUNT):
        path = slot.holds(raw)
        tensors = attempt(read_tensors, path, ModelFormatError)
        model = attempt(kd.load, path, ModelFormatError)
        small = attempt(runtime.load, path, runtime.ModelFormatError)
        assert model is None or tensors is not None
        if model is not None:
            assert all(np.isfinite(p.array).all() for p in model.parameters())
            loaded += 1
        if small is not None and model is not None and model.sizes[0] == 4:
            with np.errstate(all="ignore"):
                np.testing.assert_allclose(small.logits(x), model.logits(x), rtol=1e-3, atol=1e-3)
    assert loaded > COUNT // 50  # some changes do no harm: so the others are not refused for one and the same reason


def test_changed_files_take_little_memory(files: list[File], tmp_path: Path) -> None:
    slot = Slot(tmp_path)

    def read(raw: bytes) -> None:
        attempt(kd.load, slot.holds(raw), ModelFormatError)
        attempt(runtime.load, slot.path, runtime.ModelFormatError)

    assert most_memory(read, mutants(files, COUNT // 8, SEED + 2)) < MOST_MEMORY


def most_memory(read: Callable[[bytes], None], raws: Iterable[bytes]) -> int:
    """Bytes that Python and NumPy had at most at any moment, touched or not."""
    tracemalloc.start()
    try:
        for raw in raws:
            read(raw)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_the_runtime_reads_minikd_reads_too(files: list[File], tmp_path: Path) -> None:
    rng, slot, read = random.Random(SEED + 1), Slot(tmp_path), 0
    for _ in range(COUNT // 3):
        path = slot.holds(rng.choice(HEADERS)(files[0], rng))
        if attempt(runtime.load, path, runtime.ModelFormatError) is not None:
            error = why_not(path)
            assert error is None or any(name in error.argument for name in ("dropout", "seed"))
            read += 1
    assert read


def why_not(path: Path) -> ModelFormatError | None:
    """Why minikd refuses a file, if it does."""
    try:
        kd.load(path)
    except ModelFormatError as error:
        return error
    return None


def test_absurd_sizes_take_no_memory(files: list[File], tmp_path: Path) -> None:
    slot, header, rng = Slot(tmp_path), json.loads(files[0].text), random.Random(0)
    cases = [struct.pack("<Q", size) + b"{}" for size in (2**32, 2**40, 2**63, 2**64 - 1)]
    for size in (2**32, 2**50, 2**61):
        for shape in ([size], [size, size, 0], [1, size]):
            entry = {"dtype": "F64", "shape": shape, "data_offsets": [0, 8 * size]}
            cases.append(files[0].with_header({"t": entry}, rng).bytes)
        layers = [{"name": "0", "inputs": 4, "outputs": size, "activation": ""}]
        about = {**header["__metadata__"], "layers": json.dumps(layers)}
        cases.append(files[0].with_header({**header, "__metadata__": about}, rng).sealed().bytes)

    def read(raw: bytes) -> None:
        assert attempt(kd.load, slot.holds(raw), ModelFormatError) is None
        assert attempt(runtime.load, slot.path, runtime.ModelFormatError) is None

    assert most_memory(read, cases) < MOST_MEMORY


# --- beside the format's own library ---


def library() -> Any:
    pytest.importorskip("safetensors", reason="needs safetensors: pip install 'minikd[test-teachers]'")
    return import_module("safetensors.numpy")


def test_what_is_accepted_the_safetensors_library_accepts_too(files: list[File], tmp_path: Path) -> None:
    numpy, slot, both = library(), Slot(tmp_path), 0
    for raw in mutants(files, COUNT):
        ours = attempt(read_tensors, slot.holds(raw), ModelFormatError)
        if ours is not None:
            theirs = numpy.load(raw)  # raises if it refuses
            both += 1
            assert set(theirs) == set(ours[0])
            for name, value in theirs.items():
                assert value.dtype == ours[0][name].dtype
                assert value.tobytes() == ours[0][name].tobytes()
    assert both > COUNT // 20


def test_files_of_the_safetensors_library_are_read_and_ours_by_it(tmp_path: Path) -> None:
    numpy, path, rng = library(), tmp_path / "t", np.random.default_rng(0)
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8)
    tensors = {np.dtype(k).name: (100 * rng.random((2, 3))).astype(k) for k in kinds}
    tensors |= {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32), "naïve ✓": np.ones(5)}
    for metadata in (None, {"about": "naïve ✓"}):
        numpy.save_file(tensors, path, metadata=metadata)
        found, about = read_tensors(path)
        assert about == (metadata or {})
        write_tensors(path, tensors, metadata or {})
        for other in (found, numpy.load_file(path)):
            assert set(other) == set(tensors)
            for name, value in tensors.items():
                assert other[name].dtype == value.dtype
                np.testing.assert_array_equal(other[name], value)


def test_a_saved_model_is_a_file_of_the_safetensors_library(tmp_path: Path) -> None:
    numpy, model = library(), kd.nn.MLP([4, 6, 3])
    kd.save(tmp_path / "m", model)
    for name, value in numpy.load_file(tmp_path / "m").items():
        np.testing.assert_array_equal(value, model.state_dict()[name])
    with import_module("safetensors").safe_open(tmp_path / "m", "np") as file:
        assert json.loads(file.metadata()["layers"])[0]["outputs"] == 6
