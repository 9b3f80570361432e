"""What must hold of numbers and arrays before they become a data set, and the errors that say what does not."""

from __future__ import annotations

import numpy as np

from minikd.data.raw import Part, RawData
from minikd.errors import ArgumentError, DataError, DTypeError, ShapeError

WHERE = "data.load"


def whole_number(where: str, argument: str, value: object, minimum: int = 0) -> int:
    """`value` as an int of at least `minimum`; NumPy's integers pass, booleans and floats do not (ArgumentError)."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= minimum:
        return int(value)
    raise ArgumentError(where, argument, expected=f"a whole number of at least {minimum}", got=repr(value))


def check_finite(x: np.ndarray, name: str) -> None:
    """Refuse NaN and infinity in `x` of shape (n, m): DataError that names the first row and column."""
    finite = np.isfinite(x)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise DataError(
            WHERE,
            f"{name}, row {row}, column {column}",
            expected="a finite number within float32's range",
            got=str(x[row, column]),
            fix="Remove the row or fill the gap first; rows and columns are counted from 0.",
        )


def features(part: Part) -> np.ndarray:
    """The part's features as float32 of shape (n, m), C-contiguous and finite; images are flattened.

    Everything later (which rows are identical, the normalisation) looks at these float32 values, because they are
    what a shipped model is given.
    Errors: DTypeError (complex, object, strings), ShapeError (no rows, no features), DataError (NaN, infinity).
    """
    x, name = part.x, part.x_name
    if x.dtype.kind not in "biuf":
        raise DTypeError(
            WHERE,
            name,
            expected="real numbers (integers or floats)",
            got=f"dtype {x.dtype}",
            fix="Turn text into numbers and sparse matrices into arrays first.",
        )
    if x.ndim < 2 or x.size == 0:
        raise ShapeError(
            WHERE,
            name,
            expected="an array of shape (rows, features) or (rows, height, width) with at least one row and feature",
            got=f"shape {x.shape}",
            fix="One feature per row is x.reshape(-1, 1)." if x.ndim == 1 else "",
        )
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is named below
        flat = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
    check_finite(flat, name)
    return flat


def labels(part: Part, lowest: int, limit: int) -> np.ndarray:
    """The part's labels as int64 of shape (n,), each from `lowest` (-1 where unlabelled rows may be) below `limit`.

    Errors: ShapeError (not one label per row), ArgumentError (not integers, or out of range, naming the row).
    """
    y, name = part.y, part.y_name
    if y.shape != (len(part.x),):
        raise ShapeError(
            WHERE,
            name,
            expected=f"one label for each of the {len(part.x)} rows of {part.x_name}",
            got=f"shape {y.shape}",
            fix="One-hot labels become class ids by y.argmax(axis=1)." if y.ndim == 2 else "",
        )
    if y.dtype.kind not in "biu":
        raise ArgumentError(
            WHERE,
            name,
            expected="integer class ids",
            got=f"dtype {y.dtype}",
            fix="np.unique(y, return_inverse=True) gives the class names and the ids.",
        )
    wrong = np.flatnonzero((y < lowest) | (y >= limit))
    if wrong.size:
        raise ArgumentError(
            WHERE,
            f"{name}, row {wrong[0]}",
            expected=f"a class id from 0 to {limit - 1}" + (", or -1 for an unlabelled row" if lowest < 0 else ""),
            got=str(y[wrong[0]]),
            fix="Number the classes from 0: np.unique(y, return_inverse=True) does."
            + ("" if lowest < 0 else " Unlabelled rows (-1) may be in the training part only."),
        )
    return y.astype(np.int64)


def _alike(parts: dict[str, Part]) -> None:
    """Every part must have rows of the training part's shape, and be bytes (uint8) if and only if that one is."""
    train = parts["train"]
    for part in parts.values():
        if part.x.shape[1:] != train.x.shape[1:]:
            raise ShapeError(
                WHERE,
                part.x_name,
                expected=f"rows of shape {train.x.shape[1:]}, as in {train.x_name}",
                got=f"rows of shape {part.x.shape[1:]}",
            )
        if (part.x.dtype == np.uint8) != (train.x.dtype == np.uint8):
            raise DTypeError(
                WHERE,
                part.x_name,
                expected=f"on the same scale as {train.x_name} (dtype {train.x.dtype})",
                got=f"dtype {part.x.dtype}",
                fix="Give all parts as uint8, or all as floats on one scale.",
            )


def checked(raw: RawData) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """The parts of `raw` as (x float32 (n, m), y int64 (n,)), and the class names.

    Without class names the classes are 0 to the highest label. A label as high as the number of rows is refused, since
    it is a wrong number far more often than one of so many classes. Only the training part may have unlabelled rows.
    """
    xs = {name: features(part) for name, part in raw.parts.items()}
    _alike(raw.parts)
    limit = len(raw.class_names) or sum(len(x) for x in xs.values())
    ys = {name: labels(part, -1 if name == "train" else 0, limit) for name, part in raw.parts.items()}
    present = np.unique(np.concatenate(list(ys.values())))
    present = present[present >= 0]
    if present.size < 2:
        raise DataError(
            WHERE,
            f"the labels of {raw.name}",
            expected="of at least two classes",
            got=f"only class {(raw.class_names or present)[0]}" if present.size else "no labelled row",
            fix="A classifier needs something to tell apart.",
        )
    names = raw.class_names or tuple(str(label) for label in range(present[-1] + 1))
    return {name: (xs[name], ys[name]) for name in raw.parts}, names
