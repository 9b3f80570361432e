"""`load`: every source of data by one name, path or array, made into a `Dataset` in one way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minikd.data.archive import read_npz
from minikd.data.checks import WHERE, check_finite, checked, whole_number
from minikd.data.dataset import FITS, Dataset, Normalisation
from minikd.data.idx import FILES, read_idx_folder
from minikd.data.raw import LAYOUTS, PARTS, Part, RawData
from minikd.data.splits import split
from minikd.data.table import read_csv
from minikd.errors import ArgumentError, DataError, ShapeError

PREFIXES = (sys.prefix, "/usr/local", "/usr")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def _digits() -> RawData:
    """The built-in 1,797 digits of 8 x 8 pixels: 1,200 to train, 197 to validate, 400 to test."""
    parts = read_npz(Path(__file__).with_name("digits.npz")).parts
    return RawData("digits", parts, DIGITS, validation=197, test=400)


def _installed(name: str, class_names: tuple[str, ...], fix: str) -> RawData:
    """An IDX data set by its name, from the first of these that has it: $MINIKD_DATA's folders, PREFIXES."""
    own = [Path(folder) for folder in os.environ.get("MINIKD_DATA", "").split(os.pathsep) if folder]
    shared = [Path(prefix, "share", "datasets") for prefix in dict.fromkeys(PREFIXES)]
    for folder in (place / name for place in own + shared):
        if any(folder.glob(f"{FILES['train'][0]}*")):
            return RawData(name, (raw := read_idx_folder(folder)).parts, class_names, raw.validation)
    raise DataError(
        WHERE,
        f"source {name!r}",
        expected="installed",
        got=f"no {FILES['train'][0]} in {', '.join(str(place / name) for place in own + shared)}",
        fix=f"{fix}, or give any folder of IDX files: --data FOLDER.",
    )


NAMED: dict[str, Callable[[], RawData]] = {
    "digits": _digits,
    "fashion-mnist": partial(_installed, "fashion-mnist", FASHION, "Run: apt install dataset-fashion-mnist"),
    "mnist": partial(_installed, "mnist", DIGITS, "Name the folder that holds mnist/ in $MINIKD_DATA"),
}
FORMS: dict[str, Callable[[Path, str], RawData]] = {".npz": read_npz, ".csv": read_csv}


def _from_path(path: Path, label_column: str) -> RawData:
    """A folder of IDX files, or a file by its ending."""
    reader = read_idx_folder if path.is_dir() else FORMS.get(path.suffix.lower())
    if reader is None or not path.exists():
        raise DataError(
            WHERE,
            "source",
            expected=f"one of {', '.join(NAMED)}, a folder of IDX files, or a file ending in {' or '.join(FORMS)}",
            got=f"{str(path)!r}, " + ("which is none of these" if path.exists() else "which does not exist"),
            fix="Of an IDX file, give the folder." if "ubyte" in path.name else "",
        )
    return reader(path, label_column)


def _from_arrays(arrays: Sequence[Any]) -> RawData:
    """(x, y), or (x_train, y_train, x_test, y_test)."""
    layout = {2: LAYOUTS[0], 4: LAYOUTS[1]}.get(len(arrays))
    if layout is None:
        raise ArgumentError(
            WHERE, "source", expected="(x, y) or (x_train, y_train, x_test, y_test)", got=f"{len(arrays)} arrays"
        )
    parts, rest = {}, iter(arrays)
    for part, names in layout.items():
        try:
            parts[part] = Part(np.asarray(next(rest)), np.asarray(next(rest)), *names)
        except ValueError as error:  # NumPy's word for nested lists of unequal lengths
            raise ShapeError(WHERE, f"{names[0]} and {names[1]}", expected="arrays", got=str(error)) from error
    return RawData("arrays", parts)


def read(source: object, label_column: str) -> RawData:
    """The arrays of a source, unchecked. A str may be a name in NAMED; a Path is always a path."""
    if isinstance(source, str) and source.lower() in NAMED:
        return NAMED[source.lower()]()
    if isinstance(source, str | os.PathLike) and str(source):
        return _from_path(Path(source), label_column)
    if isinstance(source, tuple | list):
        return _from_arrays(source)
    raise ArgumentError(
        WHERE,
        "source",
        expected="a Dataset, a name or path, or a tuple (x, y) or (x_train, y_train, x_test, y_test)",
        got="an empty text" if isinstance(source, str) else type(source).__name__,
    )


def _rows(argument: str, size: object, labelled: int) -> int:
    """A size in rows: an int as it is, a fraction in (0, 1) as that of the labelled rows, but one at least."""
    if isinstance(size, float | np.floating) and 0 < size < 1:
        return max(1, round(float(size) * labelled))
    if isinstance(size, int | np.integer) and not isinstance(size, bool) and 0 < size < labelled:
        return int(size)
    raise ArgumentError(
        WHERE,
        argument,
        expected=f"a fraction between 0 and 1, or a number of rows from 1 to {labelled - 1} (of {labelled} labelled)",
        got=repr(size),
    )


def _wanted(raw: RawData, asked: dict[str, int | float | None], labelled: int) -> dict[str, int]:
    """Rows of each part that must be split off the training part, which the source does not bring itself."""
    wanted = {}
    for name, size in asked.items():
        if name not in raw.parts:
            wanted[name] = _rows(name, getattr(raw, name) if size is None else size, labelled)
        elif size is not None:
            raise ArgumentError(
                WHERE, name, expected=f"None, since {raw.name} has a {name} part of its own", got=repr(size)
            )
    return wanted


def _numbered(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The sample numbers of a source's own parts: counted through in the order of PARTS."""
    ends = dict(zip(PARTS, np.cumsum([sizes.get(name, 0) for name in PARTS]).tolist(), strict=True))
    return {name: np.arange(ends[name] - size, ends[name], dtype=np.int64) for name, size in sizes.items()}


def load(
    source: object,
    *,
    validation: int | float | None = None,
    test: int | float | None = None,
    split_seed: int = 0,
    label_column: str = "label",
    normalise: str = "auto",
) -> Dataset:
    """A data set, checked, split and normalised.

    source :
        "digits"            built in: 1,797 images of 8 x 8 pixels (1,200 train, 197 validation, 400 test);
        "fashion-mnist"     and "mnist": four IDX files in a folder of that name, in one of $MINIKD_DATA's folders or
                            in share/datasets of Python's prefix, /usr/local or /usr, where Debian's package
                            dataset-fashion-mnist puts them;
        a folder            with such files, gzipped or not;
        a .npz file         of x, y, or x_train, y_train, x_test, y_test (x_validation, y_validation, class_names);
        a .csv file         with a header, labels in `label_column`, numbers in all other columns;
        a tuple             (x, y) or (x_train, y_train, x_test, y_test) of arrays;
        a Dataset           returned as it is.
        Features have shape (n, m), or (n, height, width) and are flattened. Labels are integers from 0, -1 for
        unlabelled rows (in the training part only).
    validation, test : rows (int) or fraction of the labelled rows (float in (0, 1)) to split off. None is 20 % each,
        or a twelfth for the validation part of IDX files, which bring a test part: 5,000 of 60,000.
    split_seed : fixes which rows; the split is stratified by class, and identical rows stay on one side (see
        `splits.split`). The test part is drawn first and so does not depend on `validation`. A part that the source
        brings is left as it is, and cannot be asked for.
    normalise : "image" (one mean and deviation for all features), "column" (each its own), "none"; "auto" is "image"
        for uint8, where all features are pixels of one scale, else "column". Fitted to the training part alone.
    Errors: DataError, ShapeError, DTypeError or ArgumentError that name the file, the row and the column.
    """
    if isinstance(source, Dataset):
        return source
    if normalise not in ("auto", *FITS):
        raise ArgumentError(WHERE, "normalise", expected=f"auto, {', '.join(FITS)}", got=repr(normalise))
    split_seed = whole_number(WHERE, "split_seed", split_seed)
    raw = read(source, label_column)
    parts, class_names = checked(raw)
    x, y = parts["train"]
    wanted = _wanted(raw, {"test": test, "validation": validation}, int(np.count_nonzero(y >= 0)))
    numbers = _numbered({name: len(y) for name, (_, y) in parts.items()})
    if wanted:
        pieces = split(x, y, wanted, split_seed)  # a row's place is its number, as the training part comes first
        numbers |= pieces
        parts |= {name: (x[rows], y[rows]) for name, rows in pieces.items()}
    original = raw.parts["train"].x
    kind = normalise if normalise != "auto" else "image" if original.dtype == np.uint8 else "column"
    normalisation = Normalisation.fitted(parts["train"][0], kind)
    arrays: dict[str, np.ndarray] = {}
    for name, (x, y) in parts.items():
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and is named below
            arrays |= {f"x_{name}": normalisation.apply(x), f"y_{name}": y, f"rows_{name}": numbers[name]}
        check_finite(arrays[f"x_{name}"], f"x_{name} as normalised")
    return Dataset(
        raw.name,
        **arrays,
        class_names=class_names,
        feature_shape=original.shape[1:],
        normalisation=normalisation,
        sha256=raw.sha256,
    )
