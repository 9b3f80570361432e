"""The rows that a store is of, one stretch of sample numbers at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.data import Dataset, sha256_of
from minikd.errors import ArgumentError, ShapeError
from minikd.mapped import Watched

AS_GIVEN, AS_READ = "as given", "train, validation, test, each as read"
WHERE = "store.write"


class ArraySource:
    """The rows of an array (n, …), which may be mapped into memory: no more than what is taken is read."""

    row_order, class_names = AS_GIVEN, None

    def __init__(self, x: Any, sha256: str) -> None:
        self._x = x if isinstance(x, np.ndarray) else np.asarray(x)
        if self._x.ndim < 2 or self._x.size == 0:
            fix = "A data set is given as minikd.data.load makes it."
            raise ShapeError(WHERE, "x", expected="rows of features (n, k)", got=f"shape {self._x.shape}", fix=fix)
        self.rows, self.shape, self.dtype = len(self._x), self._x.shape[1:], self._x.dtype
        self._file = Watched(WHERE, self._x)
        self.sha256 = sha256 or sha256_of(self._x)

    def take(self, samples: range) -> np.ndarray:
        """The features (m, …) of these samples, as they are; DataError where their file was changed meanwhile."""
        self._file.check()
        return np.asarray(self._x[samples.start : samples.stop])


class DatasetSource:
    """All rows of a data set in the order of its source, raw, as `Dataset.raw` gives them."""

    row_order = AS_READ

    def __init__(self, data: Dataset) -> None:
        self._data, self.class_names, self.sha256 = data, data.class_names, data.sha256
        self._parts = [(getattr(data, f"x_{part}"), getattr(data, f"rows_{part}")) for part in data.sizes]
        numbers = np.concatenate([rows for _, rows in self._parts])
        self.rows, self.shape, self.dtype = len(numbers), (data.features,), np.dtype(np.float32)
        if not np.array_equal(np.sort(numbers), np.arange(self.rows)):
            expected, got = f"each number from 0 to {self.rows - 1} once", "others"
            raise ArgumentError(WHERE, "the rows of the data set", expected=expected, got=got)
        self._place = np.argsort(numbers)  # sample number → place in the parts one after another

    def take(self, samples: range) -> np.ndarray:
        """The raw features float32 (m, k) of these samples."""
        place, start = self._place[samples.start : samples.stop], 0
        found = np.empty((len(place), *self.shape), np.float32)
        for x, _ in self._parts:
            here = (place >= start) & (place < start + len(x))
            found[here] = self._data.raw(x[place[here] - start])
            start += len(x)
        return found


Source = ArraySource | DatasetSource


def source_of(x: Any, sha256: str = "") -> Source:
    """The source of a data set or an array, whose digest is `sha256` or else computed."""
    return DatasetSource(x) if isinstance(x, Dataset) else ArraySource(x, sha256)
