"""A store opened for reading: logits by sample number, from shards of which no more than these rows is read.

The files are read, not mapped: to touch a page of a mapped file that has become shorter ends the process.
"""

from __future__ import annotations

import hashlib
import os
import threading
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from minikd.data import Dataset
from minikd.errors import ArgumentError, DataError
from minikd.kernels import as_index
from minikd.store.manifest import (
    AGAIN,
    FOOTER,
    SHARDS,
    WORDS,
    Shard,
    Spec,
    damaged,
    finished_shard,
    in_words,
    kl_error,
    read_manifest,
    shard_path,
)

OPENED = 128  # shards whose files are open at a time
PIECE_BYTES = 1 << 22  # read at a time to compare a digest
GAP_BYTES = 1 << 14  # between two rows that are still read in one go: a call of its own takes longer


def open(path: str | PathLike[str]) -> Store:
    """The store in a folder. Its manifest and the sizes of its files are checked now, each shard when it is first used.

    Errors: DataError where there is no store, it is unfinished, or it is damaged.
    """
    folder = Path(path)
    spec, shards = read_manifest(folder)
    if shards is None:
        there = sum(1 for _ in folder.glob(SHARDS))
        fix = "Write it again with the same arguments (the same minikd label): it goes on from there."
        raise damaged(folder, "", "a finished store", f"one with {there} of {spec.shards} shards", fix)
    return Store(folder, spec, shards)


class Store:
    """The logits that a teacher gave for every row of some data; made by `store.open`.

    Attributes
    ----------
    spec : what it is of, as the manifest says: rows, classes, class_names, teacher, data_sha256, dtype, top_k, …
    classes : how many classes there are.  identity : that of the teacher.  bytes : size on disk, without the manifest.
    kl_error : mean and largest KL(teacher ‖ stored), measured on every row when it was written, at each of some
        temperatures: a list of {"temperature": …, "mean": …, "max": …}. Zero for float32 with all classes.
    """

    def __init__(self, path: Path, spec: Spec, shards: tuple[Shard, ...]) -> None:
        self.path, self.spec, self._shards = path, spec, shards
        self.classes, self.identity, self.kl_error = spec.classes, spec.teacher, kl_error(spec, shards)
        self._encoding = spec.encoding
        self.bytes = sum(self._size(number) for number in range(spec.shards))
        self._intact: dict[
            int, tuple[int, int]
        ] = {}  # shards that were compared with their digest, and their files' state
        self._shard = lru_cache(maxsize=OPENED)(self._opened)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path.resolve()),)

    def __repr__(self) -> str:
        kept = f"top {self.spec.top_k} of " if self.spec.top_k else ""
        return f"<store {self.path}: {len(self):,} rows, {kept}{self.classes:,} classes, {self.spec.dtype}>"

    def __len__(self) -> int:
        return self.spec.rows

    def knows(self, rows: Any) -> bool:
        """Whether every one of these sample numbers is in the store."""
        rows = as_index("Store.knows", "rows", rows)
        return bool(((rows >= 0) & (rows < len(self))).all())

    def logits(self, x: Any = None, rows: Any = None) -> np.ndarray:
        """Logits float32 (m, c) of the samples numbered `rows` (m,), or of all; x is not looked at.

        Errors: ArgumentError for a number that is not in the store; DataError where a shard is damaged.
        """
        if rows is None and x is not None:
            fix = "Call logits(None, rows); logits() gives all rows."
            raise ArgumentError("Store.logits", "rows", expected="the samples' numbers (m,)", got="none", fix=fix)
        rows = np.arange(len(self)) if rows is None else as_index("Store.logits", "rows", rows)
        unknown = rows[(rows < 0) | (rows >= len(self))] if rows.ndim == 1 else rows
        if rows.ndim != 1 or unknown.size:
            expected = f"sample numbers (m,) from 0 to {len(self) - 1}"
            got = str(unknown[0]) if rows.ndim == 1 else f"shape {rows.shape}"
            raise ArgumentError("Store.logits", "rows", expected=expected, got=got)
        found = np.empty((len(rows), self.classes), np.float32)
        numbers, within = np.divmod(rows, self.spec.rows_per_shard)
        order = np.argsort(numbers, kind="stable")
        needed, starts = np.unique(numbers[order], return_index=True)
        for number, places in zip(needed.tolist(), np.split(order, starts)[1:], strict=True):
            found[places] = self._encoding.decode(self._records(number, within[places]))
        return found

    def check(
        self,
        data: Dataset | None = None,
        *,
        data_sha256: str | None = None,
        teacher: Any = None,
        classes: int | None = None,
        class_names: Any = None,
        rows: int | None = None,
    ) -> None:
        """Refuse to stand in for anything but what the store is of; what is None is not compared.

        Parameters
        ----------
        data : a data set, in place of data_sha256, class_names and rows.
        teacher : a teacher, or its identity.

        Errors: DataError that says what differs, what was expected and what the store is of.
        """
        if data is not None:
            data_sha256, class_names, rows = data.sha256, data.class_names, sum(data.sizes.values())
        names = None if class_names is None or self.spec.class_names is None else tuple(map(str, class_names))
        if names is None and class_names is not None:
            classes = len(class_names)
        wanted = {
            "data_sha256": data_sha256,
            "rows": rows,
            "teacher": getattr(teacher, "identity", teacher),
            "classes": classes,
            "class_names": names,
        }
        for name, value in wanted.items():
            own = getattr(self.spec, name)
            if value is not None and value != own:
                what = f"{WORDS[name]} of the store in {self.path}"
                raise DataError("store", what, expected=in_words(value), got=in_words(own), fix=AGAIN)

    def verify(self) -> None:
        """Read everything and compare it with its digests; DataError names the first shard that is damaged."""
        for number in range(self.spec.shards):
            found = finished_shard(self.path, self.spec, number)
            if found is None or found.sha256 != self._shards[number].sha256:
                raise self._damaged(number, "other bytes")

    # --- shards ---

    def _size(self, number: int) -> int:
        """The size of a shard's file, which is checked."""
        path = shard_path(self.path, number)
        expected = len(self.spec.samples(number)) * self._encoding.record.itemsize + FOOTER
        try:
            size = path.stat().st_size
        except OSError as error:
            raise damaged(path, "", f"a file of {expected} bytes", error) from error
        if size != expected:
            raise damaged(path, "", f"a file of {expected} bytes", f"{size} bytes")
        return size

    def _damaged(self, number: int, got: str) -> DataError:
        expected = f"as it was written (sha256 {self._shards[number].sha256[:12]}…)"
        return damaged(shard_path(self.path, number), "", expected, got)

    def _opened(self, number: int) -> _File:
        """A shard's file."""
        try:
            return _File(shard_path(self.path, number))
        except OSError as error:
            raise self._damaged(number, str(error)) from error

    def _records(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The records (m,) of these rows of a shard.

        All bytes of a shard are compared with their digest before the first time, and again when its file was written
        to since.
        """
        file = self._shard(number)
        try:
            state = file.state()
            if self._intact.get(number) != state:
                self._compare(number, file)
                self._intact[number] = state
            return file.take(rows, self._encoding.record)
        except OSError as error:
            raise self._damaged(number, str(error)) from error

    def _compare(self, number: int, file: _File) -> None:
        """DataError where a shard's records are not those that its digest is of, or name a class that is none."""
        rows, running, largest = len(self.spec.samples(number)), hashlib.sha256(), 0
        step = max(1, PIECE_BYTES // self._encoding.record.itemsize)
        for start in range(0, rows, step):
            records = np.empty(min(step, rows - start), self._encoding.record)
            file.read(records.view(np.uint8).data, start * records.itemsize)
            running.update(records.view(np.uint8).data)
            if self.spec.top_k:
                largest = max(largest, int(records["classes"].max()))
        if running.hexdigest() != self._shards[number].sha256:
            raise self._damaged(number, "other bytes")
        if largest >= self.classes:
            raise self._damaged(number, f"class {largest} of {self.classes}")


class _File:
    """A file of records that is read at given places, also by several threads, and by forked processes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def state(self) -> tuple[int, int]:
        """What differs after the file was written to: its size, and the time of its last change."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def take(self, rows: np.ndarray, record: np.dtype[Any]) -> np.ndarray:
        """The records (m,) of these rows; those that lie near each other are read in one go."""
        order = np.argsort(rows, kind="stable")
        rising, near = rows[order], max(1, GAP_BYTES // record.itemsize)
        starts = np.append(0, np.flatnonzero(np.diff(rising) > near) + 1)
        first, counts = rising[starts], np.diff(starts, append=len(rows))
        lengths = rising[starts + counts - 1] - first + 1
        read = np.empty(int(lengths.sum()), record)
        begins = np.cumsum(lengths) - lengths
        whole, size = read.view(np.uint8).data, record.itemsize
        for begin, length, row in zip(begins.tolist(), lengths.tolist(), first.tolist(), strict=True):
            self.read(whole[begin * size : (begin + length) * size], row * size)
        places = np.empty(len(rows), np.int64)
        places[order] = rising + np.repeat(begins - first, counts)
        return read if np.array_equal(places, np.arange(len(read))) else read[places]

    def read(self, to: memoryview, place: int) -> None:
        """Fill the bytes with those from a place on; OSError where the file ends before."""
        done = self._read(to, place)
        while done < len(to):
            more = self._read(to[done:], place + done)
            if not more:
                raise OSError(f"a file of {os.fstat(self._descriptor).st_size} bytes")
            done += more

    def _read(self, to: memoryview, place: int) -> int:
        """Read some bytes from a place on, without the file's position where there is a way: all share that."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [to], place)
        with self._lock:
            os.lseek(self._descriptor, place, os.SEEK_SET)
            data = os.read(self._descriptor, len(to))
            to[: len(data)] = data
            return len(data)
