"""Answers that are known already, by sample number: files of scores, labels alone, and stores."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minikd.data.archive import arrays_of, mapped_npy
from minikd.errors import ArgumentError, DataError, ShapeError
from minikd.kernels import as_index
from minikd.mapped import Watched
from minikd.safetensors import read_tensors
from minikd.teachers.teacher import LOGITS, PROBABILITIES, SUM_TOLERANCE, Teacher, digest, file_digest

LOG_PROBABILITIES = "log_probabilities"
# Name of an array in an archive → what it holds, the most telling first.
KEYS = {
    "logits": LOGITS,
    LOG_PROBABILITIES: LOG_PROBABILITIES,
    "log_probs": LOG_PROBABILITIES,
    PROBABILITIES: PROBABILITIES,
    "probs": PROBABILITIES,
}


class TableTeacher(Teacher):
    """A table (n, c) whose row i is the answer for sample i: logits, log-probabilities or probabilities.

    Log-probabilities are logits whose softmax they are themselves; they are checked to be so.
    """

    per_row = True

    def __init__(self, table: Any, *, gives: str | None = None, classes: int | None = None, identity: str = "") -> None:
        if gives not in (None, LOGITS, LOG_PROBABILITIES, PROBABILITIES):
            expected = f"one of {LOGITS}, {LOG_PROBABILITIES}, {PROBABILITIES}"
            raise ArgumentError("as_teacher", "gives", expected=expected, got=repr(gives))
        super().__init__(PROBABILITIES if gives == PROBABILITIES else LOGITS, classes, identity)
        self.table, self.holds = np.asanyarray(table), gives or LOGITS
        self._file = Watched("as_teacher", self.table)
        if self.table.ndim != 2 or self.table.dtype.kind not in "fiu":
            got = f"{self.table.dtype} of shape {self.table.shape}"
            raise ShapeError("as_teacher", "the table", expected="numbers of shape (samples, classes)", got=got)
        self.classes = self.table.shape[1] if classes is None else classes

    def knows(self, rows: Any) -> bool:
        rows = as_index(self._name, "rows", rows)
        return bool(((rows >= 0) & (rows < len(self.table))).all())

    def _answer(self, x: Any, rows: Any) -> Any:
        self._file.check()
        found = np.asarray(self.table[rows])
        if self.holds == LOG_PROBABILITIES and len(found):
            with np.errstate(over="ignore", invalid="ignore"):  # NaN and inf are the business of later checks
                off = abs(np.exp(found.astype(np.float64)).sum(axis=1) - 1) > SUM_TOLERANCE
            fix = "If these are scores before softmax, say gives='logits'."
            self._refuse_row(off, found, rows, "log-probabilities, whose exp sums to 1", fix)
        return found

    def _identity(self) -> str:
        return f"table:{digest([('table', np.asarray(self.table))])} of {self.holds}"


class HardLabels(Teacher):
    """Labels alone as a teacher: probability 1 for the label y[i] of sample i, and 0 for every other class.

    A row without a label (-1) is not known: `knows` says so, and asking for it is refused, since neither a uniform
    answer nor any other is what the labels say.
    """

    per_row = True
    _unknown = "Leave out the rows without a label (-1), and those past the last one."

    def __init__(self, y: Any, classes: int, *, identity: str = "") -> None:
        super().__init__(PROBABILITIES, classes, identity)
        self.y = as_index("HardLabels", "y", y)
        if self.y.ndim != 1 or (self.y.size and not -1 <= self.y.min() <= self.y.max() < classes):
            got = f"shape {self.y.shape}" + (f", from {self.y.min()} to {self.y.max()}" if self.y.size else "")
            raise ArgumentError("HardLabels", "y", expected=f"ids (n,) from 0 to {classes - 1}, or -1", got=got)

    def knows(self, rows: Any) -> bool:
        rows = as_index(self._name, "rows", rows)
        return bool(((rows >= 0) & (rows < len(self.y))).all()) and bool((self.y[rows] >= 0).all())

    def _answer(self, x: Any, rows: Any) -> Any:
        return np.eye(self.classes or 0, dtype=np.float32)[self.y[rows]]

    def _identity(self) -> str:
        return f"labels:{digest([('y', self.y)])} classes {self.classes}"


class StoreTeacher(Teacher):
    """An opened store of a teacher's logits: anything with logits(x, rows), knows(rows), classes and identity.

    Its identity is the store's own, which is that of the teacher who filled it.
    """

    per_row = True

    def __init__(self, store: Any, *, classes: int | None = None, identity: str = "") -> None:
        if classes is not None and store.classes != classes:
            got = f"a store of {store.classes}"
            raise ShapeError("as_teacher", "the store", expected=f"of {classes} classes", got=got)
        super().__init__(LOGITS, store.classes, identity or store.identity)
        self.store = store

    def knows(self, rows: Any) -> bool:
        return bool(self.store.knows(as_index(self._name, "rows", rows)))

    def check(self, data: Any) -> None:
        self.store.check(data)

    def _answer(self, x: Any, rows: Any) -> Any:
        return self.store.logits(x, rows)


# --- files ---


def _bad_file(path: Path, got: str, fix: str = "") -> DataError:
    return DataError("as_teacher", str(path), expected="a table of a teacher's scores", got=got, fix=fix)


def _npy(path: Path) -> np.ndarray:
    """The array, mapped into memory: only the rows that are asked for are read."""
    try:
        return mapped_npy(path)
    except DataError as error:
        raise _bad_file(path, error.got, "Save one array of numbers by np.save.") from error


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        return arrays_of(path)
    except DataError as error:
        raise _bad_file(path, error.got, "Save plain arrays by np.savez.") from error


def _csv(path: Path) -> tuple[list[str], np.ndarray]:
    """The header, and the numbers below it as float64."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            header, *lines = [row for row in csv.reader(stream, strict=True) if any(row)]
            table = np.array([[float(cell) for cell in line] for line in lines])
    except (OSError, ValueError, csv.Error) as error:
        fix = "The first line names the classes; below it each line has a number for each class."
        raise _bad_file(path, str(error), fix) from error
    names = [name.strip() for name in header]
    if table.shape[1:] != (len(names),) or len(set(names)) < len(names):
        raise _bad_file(path, f"{len(names)} names over numbers of shape {table.shape}", "Name each class once.")
    return names, table


def _by_name(path: Path, header: list[str], table: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray:
    if class_names is None:
        return table
    names = [str(name) for name in class_names]
    if set(names) != set(header):
        fix = f"The data's classes are {', '.join(names)}."
        raise _bad_file(path, f"the columns {', '.join(header)}", fix)
    return np.ascontiguousarray(table[:, [header.index(name) for name in names]])


def _member(path: Path, arrays: dict[str, np.ndarray], gives: str | None) -> tuple[np.ndarray, str | None]:
    """The array of an archive that holds the scores, by its name, and what it holds."""
    for key, kind in KEYS.items():
        if key in arrays and gives in (None, kind):
            return arrays[key], kind
    if len(arrays) == 1:
        return next(iter(arrays.values())), gives
    fix = f"Call the array one of {', '.join(KEYS)}."
    raise _bad_file(path, f"the arrays {', '.join(sorted(arrays)) or '(none)'}", fix)


def read_table(
    path: Path, *, gives: str | None = None, classes: int | None = None, class_names: Any = None, identity: str = ""
) -> TableTeacher:
    """The table in a .npy, .npz, .safetensors or .csv file; row i is the answer for sample i.

    What it holds is told by `gives`, or by the array's name in an archive (KEYS); else it is logits.
    Errors: DataError says what the file holds instead.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        table: np.ndarray = _npy(path)
    elif suffix == ".csv":
        table = _by_name(path, *_csv(path), class_names)
    else:
        table, gives = _member(path, _npz(path) if suffix == ".npz" else read_tensors(path)[0], gives)
    told = f" of {gives or LOGITS}" + (f" classes {', '.join(class_names)}" if class_names and suffix == ".csv" else "")
    return TableTeacher(table, gives=gives, classes=classes, identity=identity or f"file:{file_digest(path)}{told}")
