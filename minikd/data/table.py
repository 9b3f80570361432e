"""CSV files: a header row, one column of labels, and numbers in all the others."""

from __future__ import annotations

import array
import csv
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minikd.data.raw import Part, RawData, reading
from minikd.errors import DataError

UNLABELLED = ("", "-1")


def _fault(path: Path, line: int, expected: str, got: str, fix: str = "", column: str = "") -> DataError:
    where = f"{path}, line {line}" + (f", column {column!r}" if column else "")
    return DataError("data.load", where, expected=expected, got=got, fix=fix)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row that has any text, with the number of the line on which it ends; DataError for broken quotes."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            for row in reader:
                if any(row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise _fault(path, reader.line_num, "a row of comma-separated values", str(error)) from error


def _header(path: Path, line: int, names: list[str], label_column: str) -> int:
    """Where the label column is, once the header is sound: every column named, no name twice, one more than labels."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if "" in names:
        raise _fault(
            path,
            line,
            expected="a header that names every column",
            got=f"no name for column {names.index('') + 1} of {len(names)}",
            fix="An unnamed first column is often a row number that some tools add: leave it out.",
        )
    if repeated:
        raise _fault(path, line, expected="a header with each name once", got=f"{', '.join(repeated)} repeated")
    if label_column not in names or len(names) < 2:
        raise _fault(
            path,
            line,
            expected=f"a header with the label column {label_column!r} and at least one feature",
            got=f"the columns {', '.join(names)}",
            fix="Separate the columns by commas, not by semicolons or tabs."
            if len(names) == 1 and any(c in names[0] for c in ";\t")
            else "Name the column of labels by label_column=… (--label-column).",
        )
    return names.index(label_column)


def _number(cell: str) -> float:
    """The cell's value, NaN where it is no number; Python's own 1_000 is none in a table."""
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def _numbers(path: Path, line: int, names: list[str], cells: list[str]) -> list[float]:
    """A row's features, or a DataError that names the first column without a finite number."""
    numbers = [_number(cell) for cell in cells]
    for name, cell, number in zip(names, cells, numbers, strict=True):
        if not math.isfinite(number):
            fix = "Only the label may be text or empty: fill the gap, or number the values."
            raise _fault(path, line, "a finite number", repr(cell), fix, name)
    return numbers


def _class_ids(labels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class ids (int64, -1 where unlabelled) and class names: sorted by value if all are integers, else as text."""
    distinct = set(labels) - set(UNLABELLED)
    try:
        spelled = {label: str(int(label)) for label in distinct}  # 07 and 7 are one class
        names = sorted(set(spelled.values()), key=int)
    except ValueError:
        spelled = {label: label for label in distinct}
        names = sorted(distinct)
    number = {name: place for place, name in enumerate(names)}
    ids = {label: number[name] for label, name in spelled.items()} | dict.fromkeys(UNLABELLED, -1)
    return np.array([ids[label] for label in labels], np.int64), tuple(names)


def read_csv(path: Path, label_column: str) -> RawData:
    """A comma-separated UTF-8 table (a byte-order mark is fine): float64 features, class names from its labels.

    Labels are texts or integers; an empty one, or -1, marks an unlabelled row. Spaces around names and labels do not
    count; blank lines, and those of commas alone that spreadsheets leave, are passed over.
    Errors: DataError that names the line (and the column) at fault.
    """
    with reading(path, "CSV"):
        rows = _rows(path)
        line, header = next(rows, (1, []))
        if not header:
            raise _fault(path, line, expected="a header row", got="an empty file")
        names = [name.strip() for name in header]
        place = _header(path, line, names, label_column)
        features = names[:place] + names[place + 1 :]
        values, labels = array.array("d"), []
        for line, row in rows:
            if len(row) != len(names):
                raise _fault(path, line, f"a row of {len(names)} cells, as in the header", f"{len(row)} cells")
            labels.append(row.pop(place).strip())
            values.extend(_numbers(path, line, features, row))
    if not labels:
        raise _fault(path, line, expected="rows below the header", got="none")
    y, class_names = _class_ids(labels)
    x = np.frombuffer(values, np.float64).reshape(len(labels), len(features))
    return RawData(path.stem, {"train": Part(x, y, str(path), f"{path}: {label_column}")}, class_names)
