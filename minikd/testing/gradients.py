"""`check_gradients`: gradients against differences in float64, and against a complex step where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, DTypeError
from minikd.tensor import Tensor
from minikd.testing.reports import as_code

# Steps of a difference, relative to 1 + |x|: the second shows whether the first met a kink or a bend.
STEP, SMALLER = 1e-5, 1e-6
COMPLEX_STEP = 1e-30
MOST_ELEMENTS = 64  # inputs of up to so many elements are looked at one by one, too
RTOL = {"complex step": 1e-11, "differences": 1e-6}


class Slope(NamedTuple):
    """The legal values of a directional derivative: one (low = high) where the function is smooth."""

    low: float
    high: float
    how: str


@dataclass(frozen=True)
class GradientFailure:
    """One direction along which a gradient is not legal.

    Attributes
    ----------
    where : "inputs[0][1, 2]" for one element, else "along a random direction".
    got : the gradient along it.
    slope : what it may be.
    """

    where: str
    got: float
    slope: Slope

    def __str__(self) -> str:
        digits = 12 if self.slope.how == "complex step" else 9
        legal = f"{self.slope.low:.{digits}g}"
        if self.slope.high > self.slope.low:
            legal = f"between {legal} and {self.slope.high:.{digits}g}, for there is a kink"
        return f"{self.where}: {self.got:.{digits}g}, and should be {legal} (by {self.slope.how})"


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` found; true if every gradient is legal.

    Attributes
    ----------
    failures : directions along which one is not, those of single elements first.
    directions : how many were looked at; `kinks` of them lead across a kink.
    methods : how the slopes were found.
    inputs : where the function was looked at.
    """

    failures: tuple[GradientFailure, ...]
    directions: int
    kinks: int
    methods: tuple[str, ...]
    inputs: tuple[np.ndarray, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"the gradients are right along {self.directions} directions"
        if self.failures:
            head = f"the gradients are wrong along {len(self.failures)} of {self.directions} directions"
        lines = [f"{head} ({self.kinks} across a kink; by {' and '.join(self.methods)})"]
        lines += [f"  {failure}" for failure in self.failures[:5]]
        if self.failures:
            lines += [f"  inputs[{k}] = {as_code(x)}" for k, x in enumerate(self.inputs) if x.size <= MOST_ELEMENTS]
        return "\n".join(lines)

    __repr__ = __str__


def check_gradients(
    f: Callable[..., Any],
    *inputs: Any,
    gradient: Callable[..., Any] | None = None,
    directions: int = 3,
    rtol: float | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compare the gradients of a function with how it changes along directions, in float64.

    Parameters
    ----------
    f : without `gradient`, a function of Tensors that gives a Tensor of any shape, whose gradients backward computes.
        Else a function of arrays that gives one number.
    inputs : arrays; all are taken as float64, and all take a gradient. What takes none (labels, a teacher) belongs
        into `f`.
    gradient : ``gradient(*inputs)`` gives the gradient of f for each input, an array or a tuple of them.
    directions : random directions, beside each single element where there are at most 64 of them.
    rtol : how far a gradient may be off, relative to the sizes of its terms; by default 1e-11 against a complex step
        and 1e-6 against differences.
    seed : of the directions, and of the weights with which the elements of a Tensor are added up.

    Returns
    -------
    A `GradientReport`. ``assert report, report`` shows what is wrong.

    Notes
    -----
    A complex step f(x + ih)/h has no cancellation, but f must be analytic and accept complex numbers: it is tried where
    `gradient` is given, and taken where it agrees with differences. Where the slopes to both sides stay apart however
    small the step, there is a kink, and every value between the two is legal.

    Raises
    ------
    ArgumentError : there is no input, or f or a gradient gives something else than is said above.
    DTypeError : an input is not real.
    """
    arrays = tuple(_real(k, x) for k, x in enumerate(inputs))
    if not arrays:
        raise ArgumentError("check_gradients", "inputs", expected="at least one array", got="none")
    measured = _Measured(f, arrays, gradient, np.random.default_rng(seed))
    rng, failures, kinks, count, methods = np.random.default_rng(seed + 1), [], 0, 0, []
    for where, along in _directions(arrays, directions, rng):
        slope, (got, size) = measured.slope(along), measured.along_gradient(along)
        allowed = (RTOL[slope.how] if rtol is None else rtol) * (size + abs(slope.low) + abs(slope.high))
        allowed += measured.noise(slope.how)
        count, kinks = count + 1, kinks + (slope.high > slope.low)
        methods.append(slope.how)
        if not slope.low - allowed <= got <= slope.high + allowed:
            failures.append(GradientFailure(where, got, slope))
    return GradientReport(tuple(failures), count, kinks, tuple(dict.fromkeys(methods)), arrays)


def _real(k: int, x: Any) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise DTypeError("check_gradients", f"inputs[{k}]", expected="an array of real numbers", got=str(array.dtype))
    return array.astype(np.float64)


def _directions(
    arrays: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each element by itself where there are few, and random directions, all inputs at once; what is infinite stays."""
    if sum(x.size for x in arrays) <= MOST_ELEMENTS:
        for k, x in enumerate(arrays):
            for index in zip(*np.nonzero(np.isfinite(x)), strict=True) if x.ndim else [()]:
                along = [np.zeros_like(y) for y in arrays]
                along[k][index] = 1.0
                yield f"inputs[{k}]{[int(i) for i in index] if index else ''}", along
    for number in range(count):
        yield (
            f"along random direction {number}",
            [np.where(np.isfinite(x), rng.normal(size=x.shape), 0) for x in arrays],
        )


class _Measured:
    """A function as one number of its inputs, with its gradients as they are claimed."""

    def __init__(
        self,
        f: Callable[..., Any],
        arrays: Sequence[np.ndarray],
        gradient: Callable[..., Any] | None,
        rng: np.random.Generator,
    ) -> None:
        self.f, self.arrays, self.on_tensors = f, arrays, gradient is None
        if gradient is None:
            tensors = [Tensor(x.copy(), requires_grad=True) for x in arrays]
            y = f(*tensors)
            if not isinstance(y, Tensor):
                fix = "For a function of arrays give its gradient too: gradient=…"
                raise ArgumentError(
                    "check_gradients", "f", expected="a function that gives a Tensor", got=repr(type(y)), fix=fix
                )
            self.weights = rng.normal(size=y.shape)
            y.backward(self.weights)
            self.gradients = [
                np.zeros_like(x) if t.grad is None else t.grad.numpy() for t, x in zip(tensors, arrays, strict=True)
            ]
        else:
            given = gradient(*(x.copy() for x in arrays))
            self.gradients = [
                np.asarray(g, np.float64) for g in (given if isinstance(given, tuple | list) else (given,))
            ]
        self._check_gradients()
        self.value = float(self._at(arrays).real)

    def _check_gradients(self) -> None:
        shapes, wanted = [g.shape for g in self.gradients], [x.shape for x in self.arrays]
        if shapes != wanted:
            expected = f"one gradient for each input, of shapes {wanted}"
            raise ArgumentError("check_gradients", "gradient", expected=expected, got=f"shapes {shapes}")

    def _at(self, arrays: Sequence[np.ndarray]) -> Any:
        """f as one number, real or complex."""
        if self.on_tensors:
            return np.float64((self.f(*map(Tensor, arrays)).numpy() * self.weights).sum())
        y = np.asarray(self.f(*arrays))
        if y.size != 1:
            fix = "Add its elements up with weights of your own."
            raise ArgumentError(
                "check_gradients", "f", expected="a function that gives one number", got=f"shape {y.shape}", fix=fix
            )
        return y.reshape(())[()]

    def noise(self, how: str) -> float:
        """What rounding of f's value makes of a slope."""
        eps = float(np.finfo(float).eps)
        return COMPLEX_STEP if how == "complex step" else 8 * eps * (1 + abs(self.value)) / SMALLER

    def along_gradient(self, along: Sequence[np.ndarray]) -> tuple[float, float]:
        """The gradient along a direction, and the sum of the sizes of its terms."""
        terms = [np.where(d == 0, 0.0, g * d) for g, d in zip(self.gradients, along, strict=True)]
        return sum(float(t.sum()) for t in terms), sum(float(np.abs(t).sum()) for t in terms)

    def slope(self, along: Sequence[np.ndarray]) -> Slope:
        """What the derivative along a direction may be."""
        differences = self._differences(along)
        exact = None if self.on_tensors or differences.low < differences.high else self._complex(along)
        if exact is not None and abs(exact - differences.low) <= 1e-4 * (abs(exact) + 1) + 1e3 * self.noise(""):
            return Slope(exact, exact, "complex step")
        return differences

    def _moved(self, along: Sequence[np.ndarray], step: complex) -> Any:
        return self._at([np.where(d == 0, x, x + step * d) for x, d in zip(self.arrays, along, strict=True)])

    def _complex(self, along: Sequence[np.ndarray]) -> float | None:
        try:
            moved = self._moved(along, 1j * COMPLEX_STEP)
        except (TypeError, ValueError):  # complex numbers are not for everybody
            return None
        return float(moved.imag) / COMPLEX_STEP if np.iscomplexobj(moved) else None

    def _differences(self, along: Sequence[np.ndarray]) -> Slope:
        """To both sides with two steps: a gap that does not shrink with the step is a kink."""
        largest = max(
            (float(np.abs(x[d != 0]).max()) for x, d in zip(self.arrays, along, strict=True) if d.any()), default=0.0
        )
        sides = {}
        for step in (STEP, SMALLER):
            h = step * (1 + largest)
            after, before = float(self._moved(along, h).real), float(self._moved(along, -h).real)
            sides[step] = ((self.value - before) / h, (after - self.value) / h, (after - before) / (2 * h))
        gaps = {step: abs(right - left) for step, (left, right, _) in sides.items()}
        left, right, _ = sides[SMALLER]
        if gaps[SMALLER] > max(0.5 * gaps[STEP], 100 * self.noise(""), 1e-6 * (abs(left) + abs(right))):
            return Slope(min(left, right), max(left, right), "differences")
        middle = sides[STEP][2] if gaps[STEP] < 1e-2 * (1 + abs(left)) else sides[SMALLER][2]
        return Slope(middle, middle, "differences")
