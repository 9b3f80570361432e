"""Numbers rounded to the steps that integers can take, with a gradient that takes the rounding for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.ops.op import Example, Op, gradients, register

FORMULA = "y = scale·clamp(round(x/scale), low, high), halves to even;  dx = dy·[low ≤ round(x/scale) ≤ high]"
SOURCE = "Jacob et al. 2018, sec. 3; the gradient is the straight-through one of Bengio, Léonard and Courville 2013"


def _in_steps(xp: Any, x: Any, scale: Any) -> Any:
    """x / scale, and x itself where the scale is 0; it is a number or a column."""
    if isinstance(scale, np.floating):
        return x / scale if float(scale) > 0 else x
    return x / xp.where(scale > 0, scale, 1)


def _numbers(x: Any, *scalars: Any) -> tuple[Any, ...]:
    return tuple(x.dtype.type(float(scalar)) for scalar in scalars)


def _fake_quantise(xp: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> None:
    scale, low, high = _numbers(x, scale, low, high)
    xp.multiply(xp.clip(xp.rint(_in_steps(xp, x, scale)), low, high), scale, out=y)


def _kept(xp: Any, dy: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> Any:
    scale, low, high = _numbers(x, scale, low, high)
    steps = xp.rint(_in_steps(xp, x, scale))
    return xp.where((steps >= low) & (steps <= high), dy, x.dtype.type(0))


def _clamped(xp: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> None:
    scale, low, high = _numbers(x, scale, low, high)
    y[...] = scale * xp.clip(_in_steps(xp, x, scale), low - 0.5, high + 0.5)


def _fake_quantise_rows(xp: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> None:
    low, high = _numbers(x, low, high)
    steps = xp.clip(xp.rint(_in_steps(xp, x, scale[:, None])), low, high)
    xp.multiply(steps, scale[:, None], out=y)


def _kept_rows(xp: Any, dy: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> Any:
    low, high = _numbers(x, low, high)
    steps = xp.rint(_in_steps(xp, x, scale[:, None]))
    return xp.where((steps >= low) & (steps <= high), dy, x.dtype.type(0))


def _clamped_rows(xp: Any, y: Any, x: Any, scale: Any, low: Any, high: Any) -> None:
    low, high = _numbers(x, low, high)
    y[...] = scale[:, None] * xp.clip(_in_steps(xp, x, scale[:, None]), low - 0.5, high + 0.5)


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    shapes: list[tuple[int, ...]] = [(3, 4), (67,), (1,), (0, 3), (2, 3, 5), ()]
    ends = [np.asarray(end, np.float64) for end in (-100, 155)]
    cases: list[Example] = [
        ([np.asarray(rng.uniform(-4, 7, shape), dtype), np.float64(0.03), *ends], {}) for shape in shapes
    ]
    awkward = np.array([0.5, 1.5, -0.5, -0.0, 2.5, 126.5, 127.5, -128.5, -129, 1e30, -1e30, 1e-30], dtype)
    return [*cases, ([awkward / 4, np.float64(0.25), np.float64(-128), np.float64(127)], {})]


def _rows_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, m in ((3, 4), (1, 67), (5, 1), (16, 33)):
        x, scale = rng.normal(size=(n, m)).astype(dtype), rng.uniform(0.01, 0.02, n).astype(dtype)
        cases.append(([x, scale, np.float64(-127), np.float64(127)], {}))
    awkward = np.array([[0.5, 1.5, -2.5, 127.5, -128, 1e30], [0, -0.0, 0, 0, 0, 0]], dtype)
    return [*cases, ([awkward, np.array([1, 0], dtype), np.float64(-127), np.float64(127)], {})]


register(
    Op(
        name="fake_quantise",
        formula=FORMULA,
        signature="x(...), scale:scalar, low:scalar, high:scalar -> y(...)",
        forward=_fake_quantise,
        vjp=gradients(_kept),
        wrt=("x",),
        vjp_reads=("x", "scale", "low", "high"),
        surrogate=_clamped,
        example=_example,
        source=SOURCE,
    )
)
register(
    Op(
        name="fake_quantise_rows",
        formula=f"{FORMULA}, with a scale for each row",
        signature="x(n, m), scale(n), low:scalar, high:scalar -> y(n, m)",
        forward=_fake_quantise_rows,
        vjp=gradients(_kept_rows),
        wrt=("x",),
        vjp_reads=("x", "scale", "low", "high"),
        surrogate=_clamped_rows,
        example=_rows_example,
        source=SOURCE,
    )
)
