"""Launches: a kernel for all buffers that look alike, so that what can be checked once is checked once.

Training asks for the same few kernels with the same shapes at every step, and a call of a function on a small array is
over in a few microseconds. So the look of a call (its kernel and attributes; the shapes, dtypes and flags of its
arrays) is checked when it is first met, and remembered with the launch that came of it. Whatever is remembered depends
on the look alone and holds no array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from minikd.kernels.arrays import on_device

Call = Callable[[], None]
Binder = Callable[..., Call]


class Launch(Protocol):
    """A kernel for buffers of one look: nothing is left to check but values."""

    def bind(self, *buffers: Any) -> Call:
        """A call that keeps these buffers and runs on them each time."""

    def run(self, *buffers: Any) -> None:
        """Run once on these buffers and keep none of them. A float may stand for a buffer of the kind `scalar`."""


# What makes a launch of a backend's kernel for the look of these buffers, with all attributes of the operation.
Launcher = Callable[[Sequence[Any], dict[str, Any]], Launch]


class BoundAnew:
    """A launch that binds for each run: for kernels whose calls cannot be given other buffers."""

    __slots__ = ("attrs", "binder")

    def __init__(self, binder: Binder, attrs: dict[str, Any]) -> None:
        self.binder, self.attrs = binder, attrs

    def bind(self, *buffers: Any) -> Call:
        return self.binder(*buffers, **self.attrs)

    def run(self, *buffers: Any) -> None:
        self.binder(*as_arrays(buffers), **self.attrs)()


def binding_anew(binder: Binder) -> Launcher:
    """The launcher of a kernel that has a binder and nothing else."""
    return lambda buffers, attrs: BoundAnew(binder, attrs)


def as_arrays(buffers: Sequence[Any]) -> list[Any]:
    """The buffers with an array in the place of each float."""
    return [np.array(b) if type(b) is float else b for b in buffers]


# The bits of an array's flags that are checked: C-contiguous and writable.
CHECKED_FLAGS = 0x0001 | 0x0400
_NO_ARRAYS = frozenset({float, int, type(None)})


def look_of(values: Sequence[Any]) -> list[Any]:
    """What checks see of arrays: all but their contents. Of anything else it is the type."""
    plain = np.ndarray
    return [
        (x.shape, x.dtype, x.flags.num & CHECKED_FLAGS)
        if type(x) is plain
        else type(x)
        if type(x) in _NO_ARRAYS
        else _look_of_another(x)
        for x in values
    ]


def _look_of_another(x: Any) -> Any:
    """The look of an array that is not quite NumPy's own, or the type of anything else."""
    if isinstance(x, np.ndarray):
        return (type(x), x.shape, x.dtype, x.flags.num & CHECKED_FLAGS)
    return (type(x), x.shape, x.dtype, x.flags.c_contiguous) if on_device(x) else type(x)


MOST_REMEMBERED = 4096


class Memo:
    """Answers by question; all are forgotten when there are MOST_REMEMBERED of them."""

    __slots__ = ("answers",)

    def __init__(self) -> None:
        self.answers: dict[Any, Any] = {}

    def recall(self, question: Any) -> Any:
        """The answer, or None where there is none."""
        try:
            return self.answers.get(question)
        except TypeError:  # an attribute that is a list: it is asked anew each time
            return None

    def remember(self, question: Any, answer: Any) -> None:
        if len(self.answers) >= MOST_REMEMBERED:
            self.answers.clear()
        with suppress(TypeError):
            self.answers[question] = answer
