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

NO_ROW = np.iinfo(np.int64).max  # what a record holds in the place of a row while there is nothing to refuse
RECORDS_AT_ONCE = 64


class Refusals:
    """The records of the device in use, and which error each of them stands for.

    A record is an int64 array (2,) on the device: the row, NO_ROW while there is none, and the value in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._xp: Any = None
        self._blocks: list[Any] = []  # arrays (RECORDS_AT_ONCE, 2) on the device
        self._errors: dict[Any, Error] = {}  # by what is refused, in the order of the records
        self.others: list[
            Callable[[], Exception | None]
        ] = []  # what empties records of others, and says what they hold
        self.pending = False  # whether something may have been written since the last look

    def record(self, xp: Any, what: Any, error: Error) -> Any:
        """The record for what is refused under the name `what`; it stays the same array, so that kernels may keep it.

        Whoever has a kernel write to it says so by `pending = True` at each launch.
        """
        with self._lock:
            if self._xp is not xp:
                self._xp, self._blocks, self._errors = xp, [], {}
            self._errors.setdefault(what, error)
            place = list(self._errors).index(what)
            block, within = divmod(place, RECORDS_AT_ONCE)
            if block == len(self._blocks):
                self._blocks.append(xp.full((RECORDS_AT_ONCE, 2), NO_ROW, np.int64))
            return self._blocks[block][within]

    def note(self, xp: Any, what: Any, wrong: Any, values: Any, error: Error) -> None:
        """Write down the first of the rows that are wrong, if there is one and none was written down before."""
        if not wrong.size:
            return
        record = self.record(xp, what, error)
        row = wrong.argmax()
        found = xp.stack([xp.where(wrong.any(), row, NO_ROW), xp.take(values, row)])
        record[...] = xp.where(record[0] == NO_ROW, found, record)
        self.pending = True

    def check(self) -> None:
        """Raise what was written down since the last look; waits for the device if anything may have been."""
        pending, self.pending = self.pending, False
        if not pending:
            return
        errors = [error for take in self.others if (error := take()) is not None]
        if errors:
            self.forget()
            raise errors[0]
        if not self._blocks:
            return
        kept = [block.get() for block in self._blocks]
        refused = [(k, row, value) for k, (row, value) in enumerate(np.concatenate(kept).tolist()) if row != NO_ROW]
        if refused:
            self.forget()
            place, row, value = refused[0]
            raise list(self._errors.values())[place](row, value)

    def forget(self) -> None:
        """Begin anew with empty records."""
        self.pending = False
        for block in self._blocks:
            block.fill(NO_ROW)
        for take in self.others:
            take()


REFUSALS = Refusals()


def refuse_rows(xp: Any, what: Any, wrong: Any, values: Any, error: Error) -> None:
    """Refuse the first row where `wrong` (n,) is true: raise error(row, value) here, or note it on a device."""
    if xp is not np:
        REFUSALS.note(xp, what, wrong, values, error)
        return
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise error(int(rows[0]), int(values[rows[0]]))


def spoil(xp: Any, wrong: Any, y: Any, value: Any) -> None:
    """Write `value` into the rows of y that are wrong, but were not refused yet: on a device."""
    if xp is not np:
        y[...] = xp.where(wrong.reshape(-1, *[1] * (y.ndim - 1)), value, y)
