"""The same numbers in other memory: in other order, with gaps, backwards, at odd addresses, locked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _with_gaps(x: Any) -> Any:
    """Every second element along the last axis of a larger array."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _within(x: Any) -> Any:
    """A part of a larger array: rows that lie further apart than they are long."""
    wide = np.zeros(tuple(size + 2 for size in x.shape), x.dtype)
    inner = wide[tuple(slice(1, size + 1) for size in x.shape)]
    inner[...] = x
    return inner


def _backwards(x: Any) -> Any:
    """Rows (or elements) that lie in memory from the last to the first."""
    return x[::-1].copy()[::-1]


def _by_columns(x: Any) -> Any:
    return np.array(x, order="F")


def _repeated(x: Any) -> Any:
    """A stride of 0 along the first axis where all rows are equal anyway; else a copy as it is."""
    first = x[:1].copy()
    if not (x == first).all():
        return x.copy()
    return np.lib.stride_tricks.as_strided(first, x.shape, (0, *first.strides[1:]))


# Name → the same array in another layout, for arrays with at least one axis.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "column by column": _by_columns,
    "with gaps": _with_gaps,
    "inside a larger array": _within,
    "backwards": _backwards,
    "with a stride of 0": _repeated,
}


def in_layout(x: Any, layout: str) -> Any:
    """A copy of `x` in this layout; what has no axes or elements has only one."""
    return LAYOUTS[layout](x) if x.ndim and x.size else x.copy()


def locked(x: Any) -> Any:
    """A copy that cannot be written to, and cannot be unlocked either, because it is a view of a locked array."""
    copy = np.array(x)
    copy.flags.writeable = False
    return copy.view()
