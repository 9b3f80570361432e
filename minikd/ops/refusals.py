"""Values that an operation refuses, such as a label that is no class: at once on the host, later on a device.

To look at a value on a GPU is to wait for it. So an operation there writes down the first wrong value that it meets,
in a record that lies on the GPU too, and computes NaN for that row; who waits for the GPU anyway looks at the record
(`Refusals.check`) and raises the error that NumPy would have raised at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

Error = Callable[[int, int], Exception]


class Refusals:
    """What a device was given and had to refuse since somebody looked.

    The record is an int64 array (3,) on the device: 1 + the row, the value in it, and the number of the question that
    this is the answer to; 0 in its first place while there is nothing. What is there is not written over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._xp: Any = None
        self._record: Any = None
        self._numbers: dict[Any, int] = {}
        self._errors: list[Error] = []
        self.pending = False  # whether something may have been written since the last look

    def numbered(self, question: Any, error: Error) -> int:
        """The number of a question, such as (operation, classes), and the error(row, value) of an answer to it."""
        with self._lock:
            number = self._numbers.setdefault(question, len(self._errors))
            if number == len(self._errors):
                self._errors.append(error)
            return number

    def record(self, xp: Any) -> Any:
        """The record; it stays the same array, so that kernels may keep its address.

        Whoever has a kernel write to it says so by `pending = True` at each launch.
        """
        with self._lock:
            if self._xp is not xp:
                self._xp, self._record, self.pending = xp, xp.zeros(3, np.int64), False
            return self._record

    def note(self, xp: Any, question: Any, wrong: Any, values: Any, error: Error) -> None:
        """Write down the first of the rows that are wrong, if there is one and nothing was written down before."""
        if not wrong.size:
            return
        record, number, row = self.record(xp), self.numbered(question, error), wrong.argmax()
        first = (record[0] == 0) & wrong.any()
        found = xp.stack([row + 1, xp.take(values, row), xp.full((), number, np.int64)])
        record[...] = xp.where(first, found, record)
        self.pending = True

    def check(self) -> None:
        """Raise what was refused since the last look; waits for the device where something may have been."""
        pending, self.pending = self.pending, False
        if not pending or self._record is None:
            return
        place, value, number = self._record.tolist()
        if place:
            self.forget()
            raise self._errors[number](place - 1, value)

    def forget(self) -> None:
        """Leave nothing to refuse."""
        self.pending = False
        if self._record is not None:
            self._record.fill(0)


REFUSALS = Refusals()


def refuse_rows(xp: Any, question: Any, wrong: Any, values: Any, error: Error) -> None:
    """Refuse the first row where `wrong` (n,) is true: raise error(row, value) here, or note it on a device."""
    if xp is not np:
        REFUSALS.note(xp, question, wrong, values, error)
        return
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise error(int(rows[0]), int(values[rows[0]]))


def spoil(xp: Any, wrong: Any, y: Any, value: Any) -> None:
    """Write `value` into the rows of y that are wrong, but were not refused yet: on a device."""
    if xp is not np:
        y[...] = xp.where(wrong.reshape(-1, *[1] * (y.ndim - 1)), value, y)
