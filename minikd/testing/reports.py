"""What a check of a kernel found, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MOST_PRINTED = 64  # elements of an array that is printed as a whole


def as_code(value: Any) -> str:
    """A value as the NumPy code that makes it; of a large array only its shape."""
    if not isinstance(value, np.ndarray):
        return _number(value.item() if isinstance(value, np.generic) else value)
    if value.size > MOST_PRINTED:
        return f"an array of {value.dtype.name} of shape {value.shape}"
    return f"np.array({_nested(value)}, np.{value.dtype.name})"


def _nested(values: Any) -> str:
    """Numbers in brackets, in as few digits as their dtype needs."""
    return f"[{', '.join(map(_nested, values))}]" if np.ndim(values) else _number(values)


def _number(value: Any) -> str:
    if isinstance(value, float | np.floating) and not np.isfinite(value):
        return "np.nan" if value != value else ("np.inf" if value > 0 else "-np.inf")
    return str(value)


def short(value: Any) -> str:
    """A result in few digits."""
    with np.printoptions(precision=9, threshold=24, linewidth=100):
        return " ".join(str(np.asarray(value)).split())


def ulps(actual: float, expected: float, dtype: Any) -> float:
    """How many units in the last place of `expected`, in this dtype, a result is off; inf where they do not compare."""
    if actual == expected or (actual != actual and expected != expected):
        return 0.0
    if not (np.isfinite(actual) and np.isfinite(expected)):
        return float("inf")
    rounded = np.dtype(dtype).type(min(abs(expected), float(np.finfo(dtype).max)))
    return float(abs(actual - expected) / float(np.spacing(rounded)))


@dataclass(frozen=True)
class Failure:
    """One way in which a kernel breaks its contract.

    Attributes
    ----------
    check : what was checked, "values" for example.
    region : for which inputs, in words.
    said : what is wrong, in one line.
    dtype : the dtype of the inputs.
    inputs : the smallest inputs found that show it, by argument.
    got, expected : that result, and what it should be, or None.
    ulps : how far the worst element is off, or None where that is not the question.
    mistakes : usual mistakes that give just these results.
    """

    check: str
    region: str
    said: str
    dtype: str
    inputs: dict[str, Any]
    got: Any = None
    expected: Any = None
    ulps: float | None = None
    mistakes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers the inputs hold."""
        return sum(int(np.size(x)) for x in self.inputs.values())

    @property
    def line(self) -> str:
        """What is wrong, and for which inputs, without showing them."""
        looks = "".join(f"; it looks as if {mistake}" for mistake in self.mistakes)
        return f"{self.check}, {self.dtype}, {self.region}: {self.said}{looks}"

    def __str__(self) -> str:
        lines = [self.line, *(f"    {name} = {as_code(value)}" for name, value in self.inputs.items())]
        if self.expected is not None:
            lines += [f"    got      {short(self.got)}", f"    expected {short(self.expected)}"]
        return "\n".join(lines)


def explained(failures: Sequence[Failure]) -> tuple[Failure, ...]:
    """The failures, each with those mistakes only that no other one explains better.

    A mistake goes if another one gives what was seen in all the failures that it explains, and in more.
    """
    where: dict[str, set[int]] = {}
    for k, failure in enumerate(failures):
        for mistake in failure.mistakes:
            where.setdefault(mistake, set()).add(k)
    best = [m for m, seen in where.items() if not any(seen < other for other in where.values())]
    return tuple(replace(f, mistakes=tuple(m for m in f.mistakes if m in best)) for f in failures)


@dataclass(frozen=True)
class KernelReport:
    """What `check_kernel` found: true if the kernel keeps its contract, and a text that says where it does not.

    Attributes
    ----------
    signature : the contract's.
    checks : what was checked, in order.
    left_out : what was not, with the reason.
    failures : what is wrong.
    calls : how often the kernel was called.
    """

    signature: str
    checks: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    failures: tuple[Failure, ...]
    calls: int

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def mistakes(self) -> tuple[str, ...]:
        """The usual mistakes that explain what was seen, the commonest first."""
        seen = [m for failure in self.failures for m in failure.mistakes]
        return tuple(sorted(dict.fromkeys(seen), key=lambda m: -seen.count(m)))

    @property
    def regions(self) -> tuple[str, ...]:
        """For which inputs something is wrong."""
        return tuple(dict.fromkeys(failure.region for failure in self.failures))

    @property
    def smallest(self) -> Failure | None:
        """The failure with the smallest inputs."""
        return min(self.failures, key=lambda failure: failure.size, default=None)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"{self.signature}: " + ("keeps its contract" if self.ok else "does not keep its contract")
        lines = [f"{head} ({self.calls} calls; checked: {', '.join(self.checks)})"]
        lines += [f"  not checked: {name}, {reason}" for name, reason in self.left_out]
        smallest = self.smallest
        if smallest is not None:
            lines += ["  " + line for line in str(smallest).splitlines()]
        lines += [f"  {failure.line}" for failure in self.failures if failure is not smallest]
        return "\n".join(lines)

    __repr__ = __str__
