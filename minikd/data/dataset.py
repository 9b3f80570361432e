"""What a loaded data set is: three parts of float32 rows on one scale, and how that scale was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from minikd.data.batches import FEW_LABELS, shuffled
from minikd.data.checks import whole_number
from minikd.data.splits import running
from minikd.errors import ArgumentError, ShapeError

_BLOCK = 4096  # rows that are widened to float64 at a time


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each column of `x` float32 (n, m): two float64 arrays of shape (m,).

    Sums run over the differences from the first row, so that a constant column has a variance of exactly 0. That row
    is one of the data, so its own distance from the mean bounds what cancels.
    """
    first, total, squares = x[0].astype(np.float64), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, len(x), _BLOCK):
        difference = x[start : start + _BLOCK] - first
        total += difference.sum(axis=0)
        squares += np.einsum("nm,nm->m", difference, difference)
    mean = total / len(x)
    return first + mean, np.maximum(squares / len(x) - mean**2, 0.0)


def _per_column(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = _moments(x)
    return mean, np.sqrt(variance)


def _per_image(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = _moments(x)  # all pixels' variance = the mean of the columns' variances + that of their means
    return np.full_like(mean, mean.mean()), np.full_like(mean, np.sqrt(variance.mean() + mean.var()))


def _not_at_all(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(x.shape[1]), np.ones(x.shape[1])


FITS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "column": _per_column,
    "image": _per_image,
    "none": _not_at_all,
}


@dataclass(frozen=True, eq=False)
class Normalisation:
    """The scale of the features: `(x - mean) / deviation`.

    mean, deviation : float32 of shape (m,); no deviation is 0.
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fitted(cls, x: np.ndarray, kind: str) -> Normalisation:
        """Fit to `x` float32 (n, m): kind "column", "image" (one mean and deviation for all columns) or "none".

        The deviation is the population's (divided by n). A constant column gets a deviation of 1 and so becomes 0.
        """
        mean, deviation = FITS[kind](x)
        with np.errstate(under="ignore"):  # a deviation below float32's range becomes 0, then 1
            deviation = deviation.astype(np.float32)
        return cls(mean.astype(np.float32), np.where(deviation == 0, np.float32(1), deviation))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Raw features of shape (n, m), or (n, …) with m values a row, on this scale: a new float32 array (n, m).

        Errors: ShapeError if a row has another number of values than m.
        """
        x, m = np.asarray(x), len(self.mean)
        if x.ndim < 2 or x[:1].size != m * len(x[:1]):
            raise ShapeError("Normalisation.apply", "x", expected=f"rows of {m} features", got=f"shape {x.shape}")
        result = x.reshape(len(x), m).astype(np.float32, order="C")
        result -= self.mean
        result /= self.deviation
        return result


def _unnumbered() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that is ready to train on; made by `data.load`.

    x_train, x_validation, x_test : float32 of shape (n, m), C-contiguous, normalised.
    y_train, y_validation, y_test : int64 of shape (n,), class ids; -1 marks unlabelled rows, in y_train only.
    feature_shape : the shape of one row as read, such as (28, 28); (m,) where rows were flat.
    normalisation : fitted to the training part alone.
    sha256 : hex digest of the raw arrays as read, so that a report can say which data it saw (see `RawData.sha256`).
    rows_train, rows_validation, rows_test : int64 of shape (n,), the sample number of each row: its place in the source
        before anything was split, whose own parts are counted one after another (train, validation, test). Left out,
        rows are numbered as the parts follow one another.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    feature_shape: tuple[int, ...]
    normalisation: Normalisation
    sha256: str
    rows_train: np.ndarray = field(default_factory=_unnumbered)
    rows_validation: np.ndarray = field(default_factory=_unnumbered)
    rows_test: np.ndarray = field(default_factory=_unnumbered)

    def __post_init__(self) -> None:
        """Number the rows where nobody did; ShapeError where there is not one number for each row."""
        numbers = {name: getattr(self, f"rows_{name}") for name in self.sizes}
        if not any(len(rows) for rows in numbers.values()):
            start = 0
            for name, size in self.sizes.items():
                object.__setattr__(self, f"rows_{name}", np.arange(start, start + size, dtype=np.int64))
                start += size
            return
        for name, size in self.sizes.items():
            if numbers[name].shape != (size,):
                got = f"shape {numbers[name].shape}"
                raise ShapeError("Dataset", f"rows_{name}", expected=f"a number for each of {size} rows", got=got)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def features(self) -> int:
        """How many features a row has (m)."""
        return int(self.x_train.shape[1])

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each part: {"train": …, "validation": …, "test": …}."""
        return {"train": len(self.y_train), "validation": len(self.y_validation), "test": len(self.y_test)}

    def raw(self, x: np.ndarray) -> np.ndarray:
        """Normalised rows (n, m) as they were before: float32 (n, m), equal to float32's rounding. For pictures."""
        x = np.asarray(x, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ShapeError("Dataset.raw", "x", expected=f"shape (n, {self.features})", got=f"shape {x.shape}")
        return x * self.normalisation.deviation + self.normalisation.mean

    def few_labels(self, count: int, seed: int) -> np.ndarray:
        """A copy of y_train in which all but `count` rows are -1.

        Classes are drawn in turn, so that their counts differ by at most one where a class has rows enough. With one
        seed, the rows of a smaller count are among those of a larger one: a curve over counts only adds labels.
        Errors: ArgumentError if count is negative or more than the labelled rows, or the seed is negative.
        """
        count, seed = whole_number("few_labels", "count", count), whole_number("few_labels", "seed", seed)
        labelled = np.flatnonzero(self.y_train >= 0)
        if count > len(labelled):
            raise ArgumentError(
                "few_labels", "count", expected=f"at most the {len(labelled)} labelled training rows", got=str(count)
            )
        rows = labelled[shuffled(len(labelled), seed, FEW_LABELS)]
        rank = running(self.y_train[rows], np.ones(len(rows), np.int64))
        chosen = rows[np.argsort(rank, kind="stable")[:count]]
        result = np.full_like(self.y_train, -1)
        result[chosen] = self.y_train[chosen]
        return result
