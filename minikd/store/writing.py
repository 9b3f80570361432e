"""Labelling: a teacher is asked for the logits of every row, shard by shard, here or by an executor's workers.

A shard appears under its name only when it is whole and says what it belongs to, so a killed run loses no more than
the shards in progress: writing again finds the others, checks their digests and goes on.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, DataError, MinikdError, OutputError, ShapeError
from minikd.kernels import as_real
from minikd.locks import NAME as LOCK
from minikd.locks import only_writer
from minikd.store.encoding import MOST_CLASSES, REALS, TEMPERATURES
from minikd.store.manifest import (
    AGAIN,
    SHARDS,
    Shard,
    Spec,
    finished_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from minikd.store.manifest import NAME as MANIFEST
from minikd.store.reading import Store, open
from minikd.store.source import Source, source_of

WHERE = "store.write"
AT_IT = "Wait until it ends, or end it: what it has done stays, and writing again goes on from there."
MOST_ROWS, FEWEST_ROWS = 1 << 14, 1 << 8  # rows of a shard, if nobody says how many
SHARD_BYTES = 1 << 26  # features, or records, of a shard
PIECE_BYTES = 1 << 25  # features, or logits, for which a teacher is asked at a time
PENDING = 2  # pieces that wait to be encoded while the teacher answers the next


class Progress(NamedTuple):
    """Where a labelling is.

    rows : those that have their logits.  total : all.  found : those that an earlier run had left.
    seconds : since it began.
    """

    rows: int
    total: int
    found: int
    seconds: float


def write(
    path: str | PathLike[str],
    teacher: Any,
    x: Any,
    *,
    dtype: str = "float32",
    top_k: int = 0,
    rows_per_shard: int | None = None,
    data_sha256: str = "",
    class_names: Sequence[str] | None = None,
    preprocessing: str = "none",
    executor: Any = None,
    in_flight: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
) -> Store:
    """Ask a teacher for the logits of every row and keep them in a folder; what is there already is not asked again.

    Parameters
    ----------
    path : the folder: new, empty, or a store of the same, which is then completed.
    teacher : of `kd.as_teacher`, or anything with `logits(x, rows)`, `classes` and `identity`.
    x : a Dataset, whose rows are labelled in the order of their source, raw; or features (n, …) as the teacher takes
        them, which may be mapped into memory.
    dtype : "float32", or "float16", whose rounding is measured.
    top_k : how many of the largest logits are kept of each row, the mass of the others as one number (see `Encoding`);
        0 keeps all. What it costs is measured.
    rows_per_shard : by default 16,384, or fewer, down to 256, where rows are large.
    data_sha256 : of an array x, where it is known; `data.sha256_of(x)` otherwise.
    class_names : of an array x, where there are any; a Dataset has its own.
    preprocessing : what was done to x, in words, for the manifest.
    executor : shares the shards out: whatever has `submit(function, *arguments)` whose results have `result()`, as
        executors of processes, threads, Dask and MPI do. Its workers write to the same folder. Threads ask the teacher
        several at once.
    in_flight : most shards that the executor has at a time; by default two for each of this machine's cores.
    on_progress : called with a `Progress` from time to time, in this thread.
    overwrite : whether a store of something else in the folder may go.

    Raises
    ------
    DataError : the folder holds another store, or a shard failed (its number is named; what is done stays).
    ArgumentError, ShapeError, OutputError : an argument, the teacher's answer, or the folder does not fit.
    """
    began = time.monotonic()
    source, folder = source_of(x, data_sha256), Path(path)
    spec = _spec(teacher, source, dtype, top_k, rows_per_shard, class_names, preprocessing)
    _make(folder)
    with only_writer(folder, WHERE, AT_IT):
        shards = _begin(folder, spec, overwrite)
        found = sum(len(spec.samples(number)) for number in shards)

        def tell(rows: int) -> None:
            if on_progress is not None:
                on_progress(Progress(rows, spec.rows, found, time.monotonic() - began))

        tell(found)
        todo = [number for number in range(spec.shards) if number not in shards]
        if executor is None:
            work = _alone(folder, spec, teacher, source, todo, lambda rows: tell(found + rows))
        else:
            work = _shared_out(folder, spec, teacher, source, todo, executor, in_flight or 2 * (cpu_count() or 1))
        done = found
        for number, shard in work:
            shards[number] = shard
            done += len(spec.samples(number))
            tell(done)
        write_manifest(folder, spec, [shards[number] for number in range(spec.shards)])
    return open(folder)


# --- what is to be written ---


def _spec(
    teacher: Any,
    source: Source,
    dtype: str,
    top_k: int,
    rows_per_shard: int | None,
    class_names: Sequence[str] | None,
    preprocessing: str,
) -> Spec:
    missing = [name for name in ("logits", "classes", "identity") if not hasattr(teacher, name)]
    if missing:
        expected, got = "a teacher", f"{type(teacher).__name__} without {', '.join(missing)}"
        fix = "kd.as_teacher(model) makes one of nearly everything."
        raise ArgumentError(WHERE, "teacher", expected=expected, got=got, fix=fix)
    if dtype not in REALS:
        raise ArgumentError(WHERE, "dtype", expected=" or ".join(map(repr, REALS)), got=repr(dtype))
    names = source.class_names or (None if class_names is None else tuple(map(str, class_names)))
    classes = _classes(teacher, source, names)
    if type(top_k) is not int or not 0 <= top_k < classes:
        expected = f"from 1 to {classes - 1}, fewer than there are classes, or 0 for all of them"
        raise ArgumentError(WHERE, "top_k", expected=expected, got=repr(top_k))
    spec = Spec(
        data_sha256=source.sha256,
        rows=source.rows,
        row_order=source.row_order,
        features=f"{source.dtype} {source.shape}",
        preprocessing=preprocessing,
        teacher=teacher.identity,
        classes=classes,
        class_names=names,
        dtype=dtype,
        top_k=top_k,
        rows_per_shard=MOST_ROWS,
    )
    if rows_per_shard is None:
        largest = max(spec.encoding.record.itemsize, _row_bytes(source))
        rows_per_shard = min(MOST_ROWS, max(FEWEST_ROWS, SHARD_BYTES // largest))
    elif type(rows_per_shard) is not int or rows_per_shard < 1:
        raise ArgumentError(WHERE, "rows_per_shard", expected="a whole number from 1", got=repr(rows_per_shard))
    return dataclasses.replace(spec, rows_per_shard=rows_per_shard)


def _row_bytes(source: Source) -> int:
    return int(np.prod(source.shape)) * source.dtype.itemsize


def _classes(teacher: Any, source: Source, names: tuple[str, ...] | None) -> int:
    """How many classes the teacher has; one that does not know yet is asked for the first row."""
    classes = teacher.classes
    if classes is None:
        classes = np.shape(teacher.logits(source.take(range(1)), np.arange(1)))[-1]
    if names is not None and len(names) != classes:
        fix = "Take a teacher of the data's classes."
        raise ShapeError(WHERE, "the teacher", expected=f"of {len(names)} classes", got=f"{classes}", fix=fix)
    if not 2 <= classes <= MOST_CLASSES:
        raise ShapeError(WHERE, "the teacher", expected=f"of 2 to {MOST_CLASSES} classes", got=f"{classes}")
    return int(classes)


# --- the folder ---


def _make(folder: Path) -> None:
    """Make the folder; one that holds anything but a store is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = next((p.name for p in sorted(folder.iterdir()) if p.name != LOCK and not _is_part(p)), None)
    except OSError as error:
        fix = "Choose a folder that you may write to."
        raise OutputError(WHERE, str(folder), expected="a folder", got=str(error), fix=fix) from error
    if foreign and not (folder / MANIFEST).exists():
        fix = "Choose a folder of its own for the store."
        expected = "a new or empty folder, or a store"
        raise OutputError(WHERE, str(folder), expected=expected, got=f"a folder with {foreign}", fix=fix)


def _is_part(path: Path) -> bool:
    """Whether a file is half of one that a killed run was writing."""
    return path.name.startswith(".") and path.suffix == ".part"


def _has_shards(folder: Path) -> bool:
    """Whether there is anything to lose: a shard, or a manifest that says there were some."""
    if not (folder / MANIFEST).exists():
        return False
    return any(folder.glob(SHARDS)) or read_manifest(folder).shards is not None


def _begin(folder: Path, spec: Spec, overwrite: bool) -> dict[int, Shard]:
    """Leave a manifest of this spec in the folder, and return the shards that are finished already."""
    for part in filter(_is_part, list(folder.iterdir())):
        part.unlink(missing_ok=True)
    if overwrite or not _has_shards(folder):
        write_manifest(folder, spec)  # first, so that no shard of before can pass for one of its own
        for shard in folder.glob(SHARDS):
            shard.unlink(missing_ok=True)
        return {}
    manifest = read_manifest(folder)
    for what, there, here in manifest.spec.differences(spec):
        raise DataError(WHERE, f"{what} of the store in {folder}", expected=here, got=there, fix=AGAIN)
    found = {number: finished_shard(folder, spec, number) for number in range(spec.shards)}
    return {number: shard for number, shard in found.items() if shard is not None}


# --- one shard ---


def _pieces(spec: Spec, number: int, row_bytes: int) -> Iterator[range]:
    """The shard's sample numbers, as many at a time as a teacher is asked for."""
    samples = spec.samples(number)
    step = max(1, PIECE_BYTES // max(row_bytes, 4 * spec.classes))
    for start in range(samples.start, samples.stop, step):
        yield range(start, min(start + step, samples.stop))


def _ask(teacher: Any, spec: Spec, x: np.ndarray, samples: range) -> np.ndarray:
    """The teacher's logits (m, c) of these samples, whose features are x."""
    rows = np.arange(samples.start, samples.stop)
    scores: np.ndarray = as_real(WHERE, "the teacher's answer", teacher.logits(x, rows))
    if scores.shape != (len(samples), spec.classes):
        expected, got = f"of shape {(len(samples), spec.classes)}", f"shape {scores.shape}"
        raise ShapeError(WHERE, "the teacher's answer", expected=expected, got=got)
    if np.isnan(scores.max()):  # NaN is the largest of all
        row = samples[int(np.isnan(scores).any(axis=1).argmax())]
        raise DataError(WHERE, f"the teacher's answer for sample {row}", expected="numbers", got="NaN")
    return scores


class _Records:
    """The records of one shard after another, as their pieces come in; the memory is the same for all."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self._folder, self._spec, self._encoding = folder, spec, spec.encoding
        size = min(spec.rows_per_shard, spec.rows)
        self._records = np.empty(size, self._encoding.record)
        self._errors = np.zeros((len(TEMPERATURES), 0 if self._encoding.exact else size))
        self._added = 0

    def add(self, samples: range, logits: np.ndarray) -> None:
        """Logits (m, c) of these samples, which lie in one shard."""
        start = samples.start % self._spec.rows_per_shard
        here = slice(start, start + len(samples))
        self._encoding.encode(logits, self._records[here], samples.start)
        if not self._encoding.exact:
            self._errors[:, here] = self._encoding.error(logits, self._records[here])
        self._added += len(samples)

    def write(self, number: int) -> Shard:
        """Write the shard whose pieces were added since the last one; it is not written if one of them failed."""
        size, added, self._added = len(self._spec.samples(number)), self._added, 0
        if added != size:
            raise RuntimeError(f"{added} of {size} rows were encoded")
        return write_shard(self._folder, self._spec, number, self._records[:size], self._errors[:, :size])


@contextmanager
def _naming(spec: Spec, number: int) -> Iterator[None]:
    """Whatever goes wrong says in which shard; what is done stays."""
    samples = spec.samples(number)
    place = f"shard {number} (rows {samples.start} to {samples.stop - 1})"
    try:
        yield
    except MinikdError as error:
        told = {"expected": error.expected, "got": error.got, "fix": error.fix}
        raise type(error)(error.where, f"{place}: {error.argument}", **told) from error
    except Exception as error:
        fix = "The shards that are done stay: write again to go on from there."
        raise DataError(WHERE, place, expected="labelled", got=f"{type(error).__name__}: {error}", fix=fix) from error


# --- in this process ---


def _alone(
    folder: Path, spec: Spec, teacher: Any, source: Source, todo: Sequence[int], tell: Callable[[int], None]
) -> Iterator[tuple[int, Shard]]:
    """Label shard after shard; while the teacher answers, another thread encodes and writes what it answered before."""
    asked, records = 0, _Records(folder, spec)
    with ThreadPoolExecutor(1, "minikd-store") as writer:
        waiting: deque[tuple[int, Any]] = deque()
        for number in todo:
            for samples in _pieces(spec, number, _row_bytes(source)):
                with _naming(spec, number):
                    logits = _ask(teacher, spec, source.take(samples), samples)
                waiting.append((number, writer.submit(records.add, samples, logits)))
                asked += len(samples)
                yield from _finished(spec, waiting, PENDING)
                tell(asked)
            waiting.append((number, writer.submit(records.write, number)))
        yield from _finished(spec, waiting, 0)


def _finished(spec: Spec, waiting: deque[tuple[int, Any]], most: int) -> Iterator[tuple[int, Shard]]:
    """Wait for the oldest results until no more than `most` are left; those that are shards come out."""
    while len(waiting) > most:
        number, future = waiting.popleft()
        with _naming(spec, number):
            result = future.result()
        if isinstance(result, Shard):
            yield number, result


# --- by an executor ---


def _shared_out(
    folder: Path, spec: Spec, teacher: Any, source: Source, todo: Sequence[int], executor: Any, in_flight: int
) -> Iterator[tuple[int, Shard]]:
    """Submit shard after shard, never more than `in_flight` at a time, and wait for the oldest."""
    waiting: deque[tuple[int, Any]] = deque()
    shipped, place = Shipped(teacher), str(folder.resolve())
    try:
        for number in todo:
            x = source.take(spec.samples(number))
            waiting.append((number, executor.submit(label_shard, place, spec, number, shipped, x)))
            yield from _finished(spec, waiting, in_flight - 1)
        yield from _finished(spec, waiting, 0)
    finally:
        for _, future in waiting:  # there are any only after an error
            if hasattr(future, "cancel"):
                future.cancel()


class Shipped:
    """A teacher on its way to workers: pickled once for all shards, and unpickled once in each process."""

    def __init__(self, teacher: Any) -> None:
        self.teacher, self._pickled = teacher, b""

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            self._pickled = self._pickled or pickle.dumps(self.teacher)
        except (pickle.PicklingError, AttributeError, TypeError):  # the executor's own pickler may know more
            return Shipped, (self.teacher,)
        return _arrived, (self._pickled,)


@lru_cache(maxsize=1)
def _arrived(pickled: bytes) -> Shipped:
    return Shipped(pickle.loads(pickled))


def label_shard(folder: str, spec: Spec, number: int, shipped: Shipped, x: np.ndarray) -> Shard:
    """Label one shard, whose features are x, and write it: what an executor's worker runs."""
    records = _Records(Path(folder), spec)
    first = spec.samples(number).start
    for samples in _pieces(spec, number, int(x[:1].nbytes)):
        piece = x[samples.start - first : samples.stop - first]
        records.add(samples, _ask(shipped.teacher, spec, piece, samples))
    return records.write(number)
