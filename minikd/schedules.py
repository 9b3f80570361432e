"""Schedules: factors that depend on how much of a training is done, for temperatures, weights and whatever else.

A schedule is any function of progress, from 0 before the first step to 1 after the last, to a number. What it gives is
multiplied with the configured value and never takes its place, so that "temperature 4" means 4 wherever the factor is
1. Schedules multiply with one another: ``warmup(0.1) * cosine(1, 0.1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from minikd.errors import ArgumentError
from minikd.expressions import parse as parse_expression
from minikd.expressions import spelled

__all__ = ["NAMES", "Product", "Schedule", "Shape", "as_schedule", "parse"]

Schedule = Callable[[float], float]


class Shape:
    """A schedule that can be multiplied with others and written as text."""

    def __call__(self, progress: float) -> float:
        """The factor at this progress, from 0 to 1."""
        raise NotImplementedError

    def __mul__(self, other: Schedule) -> Product:
        return Product(self, other)

    def __str__(self) -> str:
        return spelled(self).lower()


@dataclass(frozen=True)
class Product(Shape):
    """Both factors, multiplied."""

    first: Schedule
    second: Schedule

    def __call__(self, progress: float) -> float:
        return self.first(progress) * self.second(progress)

    def __str__(self) -> str:
        return f"{self.first} * {self.second}"


@dataclass(frozen=True)
class Constant(Shape):
    """The same factor throughout."""

    factor: float = 1.0

    def __call__(self, progress: float) -> float:
        return self.factor


@dataclass(frozen=True)
class Linear(Shape):
    """A straight line from `first` to `last`."""

    first: float = 1.0
    last: float = 0.0

    def __call__(self, progress: float) -> float:
        return self.first + (self.last - self.first) * progress


@dataclass(frozen=True)
class Cosine(Shape):
    """Half a cosine from `first` to `last` (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

    first: float = 1.0
    last: float = 0.0

    def __call__(self, progress: float) -> float:
        return self.last + (self.first - self.last) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Step(Shape):
    """`factor` to the power of the number of times that a share `every` of the training has passed."""

    factor: float = 0.1
    every: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 < self.every <= 1:
            raise ArgumentError("step", "every", expected="a share of the training in (0, 1]", got=repr(self.every))

    def __call__(self, progress: float) -> float:
        return float(self.factor ** math.floor(progress / self.every + 1e-12))


@dataclass(frozen=True)
class Warmup(Shape):
    """A rise from `first` to 1 over the first `share` of the training, then 1."""

    share: float = 0.1
    first: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ArgumentError("warmup", "share", expected="a share of the training in (0, 1]", got=repr(self.share))

    def __call__(self, progress: float) -> float:
        return self.first + (1 - self.first) * min(1.0, progress / self.share)


NAMES: dict[str, Callable[..., Shape]] = {c.__name__.lower(): c for c in (Constant, Linear, Cosine, Step, Warmup)}
EXAMPLE = '"cosine(1, 0.1)" or "warmup(0.1) * linear(1, 0.5)"'


def parse(text: str, where: str = "schedule", argument: str = "text") -> Schedule:
    """The schedule that a text describes, such as "warmup(0.1) * cosine(1, 0)".

    Raises
    ------
    ArgumentError : it is no product of constant, linear, cosine, step and warmup.
    """
    found = parse_expression(where, argument, text, NAMES, EXAMPLE)
    if not isinstance(found, Shape):
        raise ArgumentError(
            where, argument, expected="a schedule", got=repr(text), fix=f"Write, for example: {EXAMPLE}"
        )
    return found


def as_schedule(where: str, argument: str, value: Any) -> Schedule | None:
    """A schedule from a text or a function of progress; None (or an empty text) for none.

    Raises
    ------
    ArgumentError : neither of these, or its factor at the start, the middle or the end is not a finite number from 0.
    """
    if value is None or value == "":
        return None
    found = parse(value, where, argument) if isinstance(value, str) else value
    if not callable(found):
        expected = "a function of progress or its text"
        raise ArgumentError(where, argument, expected=expected, got=repr(value), fix=f"For example: {EXAMPLE}")
    for factor in map(partial(_factor, found), (0.0, 0.5, 1.0)):
        if not 0 <= factor < math.inf:
            expected = "a schedule of finite factors from 0"
            raise ArgumentError(where, argument, expected=expected, got=f"one that gives {factor}")
    return found


def _factor(schedule: Schedule, progress: float) -> float:
    return float(schedule(progress))
