"""Hypothesis strategies for what losses are given: logits of six kinds, labels, temperatures, whole batches.

Scores lie on a grid of sixteenths, which float16 to float64 hold exactly, and shrink to zeros in one row of two
classes. Where a size is asked for, a number gives this size and a strategy (the default) draws it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.errors import ArgumentError
from minikd.testing.layouts import LAYOUTS, in_layout

Size = int | st.SearchStrategy[int]

# What each kind of logits is there for.
KINDS = {
    "ordinary": "scores from -8 to 8",
    "extreme": "scores up to ±1e30, and rows whose spread overflows exp",
    "tied": "a few whole numbers, so that classes share the largest score",
    "masked": "classes at -inf, at least one of each row finite",
    "nearly equal": "scores around a common offset that differ by thousandths; a student near its teacher",
    "one-hot-like": "one score far above all others",
}

EVERY_KIND = tuple(KINDS)
ROWS, CLASSES = st.integers(1, 4), st.integers(2, 6)
_EXTREME = (0.0, 1.0, -1.0, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30)


def _whole(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high).map(float)


def _sixteenths(bound: int) -> st.SearchStrategy[float]:
    return st.integers(-16 * bound, 16 * bound).map(lambda k: k / 16)


def _size(draw: st.DrawFn, size: Size) -> int:
    return draw(size) if isinstance(size, st.SearchStrategy) else size


def _check_kind(where: str, kind: str) -> None:
    if kind not in KINDS:
        raise ArgumentError(where, "kind", expected="one of " + ", ".join(KINDS), got=repr(kind))


def _elements(kind: str) -> st.SearchStrategy[float]:
    if kind == "extreme":
        return st.sampled_from(_EXTREME)
    if kind == "tied":
        return _whole(0, 2)
    return _sixteenths(8)


@st.composite
def _rows(draw: st.DrawFn, shape: tuple[int, int], kind: str) -> Any:
    """Logits of one kind in float64."""
    n, c = shape
    if kind == "one-hot-like":
        z = np.zeros(shape)
        z[np.arange(n), draw(arrays(np.int64, n, elements=st.integers(0, c - 1)))] = draw(st.sampled_from((10.0, 40.0)))
        return z
    if kind == "nearly equal":
        offsets = draw(arrays(np.float64, (n, 1), elements=_whole(-100, 100)))
        return offsets + draw(arrays(np.float64, shape, elements=st.integers(-8, 8).map(lambda k: k / 1024)))
    z = draw(arrays(np.float64, shape, elements=_elements(kind)))
    if kind == "masked":
        z[draw(_masks(shape))] = -np.inf
    return z


@st.composite
def _masks(draw: st.DrawFn, shape: tuple[int, int]) -> Any:
    """Which classes are ruled out; the class that a row keeps is drawn too."""
    n, c = shape
    mask = draw(arrays(np.bool_, shape))
    mask[np.arange(n), draw(arrays(np.int64, n, elements=st.integers(0, c - 1)))] = False
    return mask


@st.composite
def logits(
    draw: st.DrawFn, n: Size = ROWS, c: Size = CLASSES, dtype: Any = np.float64, kind: str = "ordinary"
) -> np.ndarray:
    """Rows (n, c) of class scores.

    Parameters
    ----------
    n, c : rows and classes.
    dtype : of the array; every score is one that the dtype holds exactly, or nearly (1e30, and offsets in float16).
    kind : one of `KINDS`.

    Raises
    ------
    ArgumentError : the kind is unknown.
    """
    _check_kind("logits", kind)
    return np.asarray(draw(_rows((_size(draw, n), _size(draw, c)), kind)), dtype)


@st.composite
def labels(draw: st.DrawFn, n: Size = ROWS, c: Size = CLASSES, ignored: bool = False) -> np.ndarray:
    """Class ids (n,) from 0 to c - 1 in int64; with `ignored` some are -100, the usual ignore_index."""
    rows, classes = _size(draw, n), _size(draw, c)
    ids = st.integers(0, classes - 1)
    return draw(arrays(np.int64, rows, elements=st.one_of(ids, st.just(-100)) if ignored else ids))


def temperatures(low: float = 0.05, high: float = 300.0) -> st.SearchStrategy[float]:
    """Temperatures within these ends that somebody may use: powers of two and others, cold and hot; shrinks to 1."""
    usual = (1.0, 2.0, 4.0, 3.0, 0.5, 8.0, 20.0, 2.5, 0.7, 0.05, 300.0, 1e-3, 1e4)
    within = [t for t in usual if low <= t <= high]
    if not within:
        raise ArgumentError("temperatures", "low, high", expected="ends with a usual temperature", got=f"{low}, {high}")
    return st.sampled_from(within)


class Batch(NamedTuple):
    """What a loss is given: student and teacher logits (n, c), and class ids (n,)."""

    student: np.ndarray
    teacher: np.ndarray
    target: np.ndarray


@st.composite
def batches(
    draw: st.DrawFn,
    n: Size = ROWS,
    c: Size = CLASSES,
    dtype: Any = np.float64,
    kind: str = "ordinary",
    ignored: bool = False,
) -> Batch:
    """A student's and a teacher's logits of one kind, with labels.

    Masked classes are the same in both, and no label is one of them, so that every loss is finite. Nearly equal means
    that the student is near its teacher.

    Raises
    ------
    ArgumentError : the kind is unknown.
    """
    _check_kind("batches", kind)
    shape = rows, classes = _size(draw, n), _size(draw, c)
    student = draw(_rows(shape, kind))
    target = draw(labels(rows, classes, ignored))
    if kind == "nearly equal":
        teacher = student + draw(arrays(np.float64, shape, elements=st.integers(-8, 8).map(lambda k: k / 8192)))
    elif kind == "masked":
        mask = np.isneginf(student)
        teacher = np.where(mask, -np.inf, draw(_rows(shape, "ordinary")))
        hidden = (target >= 0) & mask[np.arange(rows), np.maximum(target, 0)]
        target = np.where(hidden, (~mask).argmax(axis=1), target)
    else:
        teacher = draw(_rows(shape, kind))
    return Batch(np.asarray(student, dtype), np.asarray(teacher, dtype), target)


@st.composite
def arrays_with_strides(draw: st.DrawFn, values: Any, read_only: bool = False) -> np.ndarray:
    """An array in memory as it may come from anywhere: by columns, with gaps, backwards, inside a larger one.

    Parameters
    ----------
    values : an array, or a strategy of arrays.
    read_only : some of the arrays are locked.
    """
    array = np.asarray(draw(values) if isinstance(values, st.SearchStrategy) else values)
    layout = draw(st.sampled_from(["in one piece", *LAYOUTS]))
    found = array.copy() if layout == "in one piece" else in_layout(array, layout)
    if read_only and draw(st.booleans()):
        found.flags.writeable = False
    return found
