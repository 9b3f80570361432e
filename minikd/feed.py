"""Where a training's rows lie: on the host, on the GPU as a whole, or there some batches at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minikd.kernels.arrays import Pinned, free_memory, here

__all__ = ["Feed", "Portion"]

# Data that take more than this part of the GPU's free memory stay on the host, and batches are brought from there.
SHARE_OF_MEMORY = 0.5
BYTES_AT_A_TIME = 64 << 20  # of the batches that are then brought at once


class Portion(NamedTuple):
    """Steps that can be taken one after another: from `start` to `stop`, with the row numbers (steps, rows) of each."""

    start: int
    stop: int
    picked: Any


class Feed:
    """What the steps of a training read: arrays of which the first axis is the rows, or None.

    On the host, and on a GPU where they fit, these are the arrays as a whole. Larger ones stay on the host; then the
    steps read a window of so many rows on the GPU, into which the rows of the next batches are copied, through memory
    that the GPU reads by itself.

    Parameters
    ----------
    arrays : NumPy arrays of as many rows each, or None.
    batch_size : the most rows of a step.

    Attributes
    ----------
    arrays : where the steps find them; they stay the same arrays.
    streams : whether there is a window only.
    """

    def __init__(self, arrays: Sequence[Any], batch_size: int) -> None:
        self._host = tuple(arrays)
        given = [a for a in arrays if a is not None]
        row_bytes = sum(a.nbytes // max(len(a), 1) for a in given)
        rows = max((len(a) for a in given), default=0)
        self.streams = here.on_device and row_bytes * rows > SHARE_OF_MEMORY * free_memory()
        self._window = max(1, BYTES_AT_A_TIME // max(row_bytes * batch_size, 1)) * batch_size
        if self.streams:
            looks = [None if a is None else ((self._window, *a.shape[1:]), a.dtype) for a in arrays]
            self.arrays = tuple(None if look is None else here.empty(*look) for look in looks)
            self._pinned = [None if look is None else Pinned(*look) for look in looks]
        else:
            self.arrays = tuple(None if a is None else here.put(a) for a in arrays)

    def rows(self, picked: np.ndarray) -> list[Any]:
        """These rows of each array, where the backend computes."""
        return [None if a is None else here.put(a[picked]) for a in self._host]

    def on_host(self, picked: np.ndarray) -> list[Any]:
        """These rows of each array, on the host."""
        return [None if a is None else a[picked] for a in self._host]

    def portions(self, picked: np.ndarray) -> Iterator[Portion]:
        """The steps on these row numbers (steps, rows of a batch): all at once, or as many as the window holds.

        Whoever takes a portion's steps asks for them before the next portion.
        """
        if not self.streams:
            yield Portion(0, len(picked), here.put(picked))
            return
        at_once = self._window // picked.shape[1]
        for start in range(0, len(picked), at_once):
            stop = min(start + at_once, len(picked))
            count = math.prod(picked[start:stop].shape)
            self._bring(picked[start:stop].reshape(-1))
            yield Portion(start, stop, here.xp.arange(count).reshape(stop - start, -1))

    def _bring(self, rows: np.ndarray) -> None:
        """Copy these rows into the window, behind all steps that still read it."""
        for host, pinned, window in zip(self._host, self._pinned, self.arrays, strict=True):
            if pinned is not None:
                np.take(host, rows, axis=0, out=pinned.for_writing()[: len(rows)], mode="clip")
                pinned.copy_to(window, len(rows))
