"""Bound calls of which a plan on a device knows what they are, so that it can put neighbours together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from minikd.kernels.launch import Call
from minikd.kernels.precision import Multiply


class OnHost:
    """A call that touches nothing but numbers on the host: a counter that advances, a learning rate that is set."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self) -> None:
        self.call()


class Product:
    """A matrix product, out = a·b."""

    __slots__ = ("a", "b", "multiply", "out")

    def __init__(self, multiply: Multiply, a: Any, b: Any, out: Any) -> None:
        self.multiply, self.a, self.b, self.out = multiply, a, b, out

    def __call__(self) -> None:
        self.multiply(self.a, self.b, self.out)


class Several:
    """A call that is made of others, which run one after the other."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Call]) -> None:
        self.parts = tuple(parts)

    def __call__(self) -> None:
        for part in self.parts:
            part()


class Beginning:
    """A part of a call that is not its last one; `calls` are the calls that it completes, which are none."""

    __slots__ = ("calls", "part")

    def __init__(self, part: Call) -> None:
        self.part, self.calls = part, ()

    def __call__(self) -> None:
        self.part()


def taken_apart(calls: Iterable[Call]) -> Iterator[tuple[Call, bool]]:
    """The calls with the parts of each `Several` in its place, and of each whether it completes a call."""
    for call in calls:
        if isinstance(call, Several):
            pieces = list(taken_apart(call.parts))
            yield from ((piece, False) for piece, _ in pieces[:-1])
            yield from ((piece, True) for piece, _ in pieces[-1:])
        else:
            yield call, True
