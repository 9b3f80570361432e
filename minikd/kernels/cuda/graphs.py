"""CUDA graphs: neighbouring kernels of a plan that are launched together.

A launch costs the processor some microseconds, which is longer than many kernels run. So kernels that follow each other
are captured once, on a stream of their own, and launched as one graph from then on. What may change between two
launches are numbers (learning rates, temperatures, counts of steps): a captured kernel reads them from a block of the
device's memory, which is filled before the graph is launched, by one copy and only if one of them changed.

CuPy captures no matrix products of cuBLAS, so these stand between graphs; should it come to capture them, which is
tried once, they become parts of graphs too. MINIKD_GRAPHS=0 in the environment switches graphs off.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np

from minikd.errors import BackendError
from minikd.kernels.arrays import Pinned, address, load_cupy
from minikd.kernels.calls import Beginning, OnHost, Product, taken_apart
from minikd.kernels.launch import Call
from minikd.ops.refusals import REFUSALS

# Fewer kernels than this are launched by themselves: a graph's launch costs as much as one or two of a kernel.
FEWEST_LAUNCHES = 2
# So many copies of numbers may be under way before the processor waits for the first of them.
COPIES_UNDER_WAY = 16


class Number(Protocol):
    """A scalar or counter that a kernel reads.

    kind : the NumPy type of its value, of 8 bytes.
    """

    kind: Any

    def read(self, where: str) -> Any:
        """The value that it has now on the host, if the operation of this name takes such a value."""

    def point(self, address: int) -> None:
        """Let launches read it at this address of the device; 0 for the value of the host."""


class Kernel(Protocol):
    """A bound call that launches functions of our own and does nothing else; its name is that of its operation.

    refuses : whether it may note on the device that it refuses a label or row number.
    """

    name: str
    refuses: bool
    numbers: Sequence[Number]
    launches: Sequence[Call]


def wanted() -> bool:
    """Whether MINIKD_GRAPHS lets kernels be captured.

    Raises
    ------
    BackendError : it is neither 0 nor 1.
    """
    given = os.environ.get("MINIKD_GRAPHS", "").strip() or "1"
    if given not in ("0", "1"):
        fix = "Unset it to use graphs."
        raise BackendError("the cupy backend", "MINIKD_GRAPHS", expected="0 or 1", got=repr(given), fix=fix)
    return given == "1"


# --- capturing ---


def capture(work: Callable[[], Any]) -> Any:
    """What `work` launches on the current stream as a graph, without running it.

    Raises
    ------
    RuntimeError : it does something that cannot be captured.
    """
    stream = load_cupy().cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # of a capture that is spoilt already
                stream.end_capture()
            raise
        return stream.end_capture()


_captures_products: dict[Any, bool] = {}  # by array module, once it was tried


def captures_products() -> bool:
    """Whether a matrix product can be part of a graph here; tried once, on small matrices and a stream of its own."""
    xp = load_cupy()
    if xp not in _captures_products:
        _captures_products[xp] = _captures(xp)
    return _captures_products[xp]


def _captures(xp: Any) -> bool:
    a, out = xp.full((8, 8), 0.5, np.float32), xp.zeros((8, 8), np.float32)
    try:
        xp.matmul(a, a, out=xp.empty_like(out))  # whatever is set up at the first product is set up here
        capture(partial(xp.matmul, a, a, out=out)).launch()
    except RuntimeError:  # NotImplementedError is one
        return False
    return bool((xp.asnumpy(out) == 2).all())


# --- numbers ---


class Numbers:
    """A block on the device for numbers that live on the host, 8 bytes each."""

    def __init__(self, count: int) -> None:
        self._floats = np.zeros(count)
        self._integers = self._floats.view(np.int64)
        self._sent = self._floats.tobytes()
        self._block = load_cupy().zeros(count, np.float64) if count else None
        # A copy may read its memory after the processor has gone on, so that each has memory of its own.
        pinned = [Pinned((count,), np.float64) for _ in range(COPIES_UNDER_WAY if count else 0)]
        self._pinned = itertools.cycle(pinned)

    def address(self, slot: int) -> int:
        """Where a number is on the device."""
        return address(self._block) + slot * self._floats.itemsize

    def noting(self, slot: int, number: Number, where: str) -> Call:
        """A call that notes the value that a number has then."""
        numbers = self._integers if number.kind is np.int64 else self._floats
        return partial(_note, numbers, slot, number.read, where)

    def upload(self) -> None:
        """Copy what was noted to the device on the current stream, unless it is there already.

        This waits for nothing but a copy that is COPIES_UNDER_WAY copies behind.
        """
        noted = self._floats.tobytes()
        if noted != self._sent:
            pinned = next(self._pinned)
            pinned.for_writing()[:] = self._floats
            pinned.copy_to(self._block, len(self._floats))
            self._sent = noted


def _note(numbers: np.ndarray, slot: int, read: Callable[[str], Any], where: str) -> None:
    numbers[slot] = read(where)


# --- a graph ---


class GraphSequence:
    """Calls that run one after the other as one graph.

    Calls on the host (`OnHost`) run before the graph is launched, each after the numbers of the kernels before it were
    taken: so every kernel reads its numbers as they were when its turn came.

    Parameters
    ----------
    pieces : what is run: kernels (`Kernel`), products where they can be captured, calls on the host.
    calls : those of them that complete a call of the plan.

    Attributes
    ----------
    calls_done : how many calls the last run completed: all, or none where a number was refused.

    Raises
    ------
    RuntimeError : something cannot be captured.
    """

    def __init__(self, pieces: Sequence[Any], calls: Sequence[Any]) -> None:
        self.pieces, self.calls, self.calls_done = tuple(pieces), tuple(calls), 0
        read = sum(len(piece.numbers) for piece in pieces if _is_kernel(piece))
        self._numbers = Numbers(read)
        self._refuses = any(getattr(piece, "refuses", False) for piece in pieces)
        self._before: list[Call] = []
        launches: list[Call] = []
        pointed: list[Number] = []
        try:
            for piece in pieces:
                if not _is_kernel(piece):
                    (self._before if isinstance(piece, OnHost) else launches).append(piece)
                    continue
                for number in piece.numbers:
                    slot = len(pointed)
                    pointed.append(number)
                    number.point(self._numbers.address(slot))
                    self._before.append(self._numbers.noting(slot, number, piece.name))
                launches += piece.launches
            self.graph = capture(lambda: [launch() for launch in launches])
        finally:
            for number in pointed:
                number.point(0)

    def __call__(self) -> None:
        self.calls_done = 0
        for call in self._before:
            call()
        self._numbers.upload()
        if self._refuses:
            REFUSALS.pending = True
        self.graph.launch()
        self.calls_done = len(self.calls)


def _is_kernel(piece: Any) -> bool:
    """Whether this launches functions of our own and does nothing else."""
    return hasattr(piece, "launches") and hasattr(piece, "numbers")


def join(calls: Sequence[Call]) -> list[Call]:
    """The same calls in their order, neighbours that can be captured put together into graphs."""
    pieces = list(taken_apart(calls))
    if not wanted():
        return _apart(pieces)
    products = any(isinstance(piece, Product) for piece, _ in pieces) and captures_products()
    parts: list[Call] = []

    def can_be_captured(pair: tuple[Call, bool]) -> bool:
        return _is_kernel(pair[0]) or isinstance(pair[0], OnHost) or (products and isinstance(pair[0], Product))

    for capturable, group in itertools.groupby(pieces, can_be_captured):
        neighbours = list(group)
        launches = sum(len(getattr(piece, "launches", "1")) for piece, _ in neighbours if not isinstance(piece, OnHost))
        parts += _joined(neighbours) if capturable and launches >= FEWEST_LAUNCHES else _apart(neighbours)
    return parts


def _joined(neighbours: Sequence[tuple[Call, bool]]) -> list[Call]:
    """These pieces as one graph, or as they are if they cannot be captured after all, which a warning says."""
    try:
        return [GraphSequence([piece for piece, _ in neighbours], [piece for piece, ends in neighbours if ends])]
    except RuntimeError as error:
        warnings.warn(
            f"kernels of a plan are launched one by one, since they cannot be captured: {error}", stacklevel=2
        )
        return _apart(neighbours)


def _apart(neighbours: Sequence[tuple[Call, bool]]) -> list[Call]:
    return [piece if completes else Beginning(piece) for piece, completes in neighbours]
