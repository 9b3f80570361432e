"""Softmax and log-softmax over rows of class scores, with a temperature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minikd.errors import bad_temperature
from minikd.ops.op import Example, Op, gradients, register


def wide(x: Any) -> Any:
    """x in float64 (complex128 if it is complex): rows are computed there and rounded once."""
    return x.astype(np.result_type(x.dtype, np.float64))


def inverse_temperature(where: str, temperature: Any, dtype: Any) -> float:
    """1/T, kept inside what `dtype` can hold, so that 0·(1/T) and -inf·(1/T) are never NaN; refuses T ≤ 0."""
    value = float(temperature)
    if not 0 < value < math.inf:
        raise bad_temperature(where, value)
    limits = np.finfo(dtype)
    return min(max(1 / value, float(limits.tiny)), float(limits.max))


def softened(xp: Any, z: Any, inverse_t: float) -> tuple[Any, Any]:
    """softmax(z/T) and log softmax(z/T) of rows, by definition 1: the row's maximum is taken off first."""
    shifted = (wide(z) - z.max(axis=1, keepdims=True)) * inverse_t
    weights = xp.exp(shifted)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total, shifted - xp.log(total)


def _softmax(xp: Any, y: Any, x: Any, temperature: Any) -> None:
    y[...] = softened(xp, x, inverse_temperature("softmax", temperature, x.real.dtype))[0]


def _softmax_gradient(xp: Any, dy: Any, y: Any, x: Any, temperature: Any) -> Any:
    dy, y = wide(dy), wide(y)
    inner = xp.sum(xp.where(y == 0, 0, dy * y), axis=1, keepdims=True)
    scale = inverse_temperature("softmax", temperature, dy.dtype)
    return xp.where(y == 0, 0, y * (dy - inner) * scale)


def _log_softmax(xp: Any, y: Any, x: Any, temperature: Any) -> None:
    y[...] = softened(xp, x, inverse_temperature("log_softmax", temperature, x.real.dtype))[1]


def _log_softmax_gradient(xp: Any, dy: Any, y: Any, x: Any, temperature: Any) -> Any:
    dy, y = wide(dy), wide(y)
    scale = inverse_temperature("log_softmax", temperature, dy.dtype)
    return (dy - xp.exp(y) * dy.sum(axis=1, keepdims=True)) * scale


def row_shapes() -> list[tuple[int, int]]:
    """Numbers of rows and classes that reach every loop of a kernel: one class, tails, rows narrower than a vector."""
    return [(1, 1), (2, 3), (5, 10), (33, 10), (3, 17), (4, 100), (2, 1003)]


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for (n, c), t in zip(row_shapes(), (1.0, 0.5, 4.0, 1.0, 20.0, 2.0, 3.0), strict=True):
        cases.append(([3 * rng.normal(size=(n, c)).astype(dtype), np.float64(t)], {}))
    masked = rng.normal(size=(4, 6)).astype(dtype)
    masked[:, 2] = -np.inf
    extreme = np.array([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [1e4, 9999.0, 0.0]], dtype)
    return [*cases, ([masked, np.float64(2.0)], {}), ([extreme, np.float64(1.0)], {})]


register(
    Op(
        name="softmax",
        formula="y = exp((x - max x)/T) / Σ exp((x - max x)/T);  dx = y·(dy - Σ dy·y) / T",
        signature="x(n, c), temperature:scalar -> y(n, c)",
        forward=_softmax,
        vjp=gradients(_softmax_gradient),
        wrt=("x",),
        vjp_reads=("y", "temperature"),
        may_alias=("x",),
        example=_example,
        analytic=True,
        source="Hinton, Vinyals and Dean 2015, eq. 1",
    )
)
register(
    Op(
        name="log_softmax",
        formula="y = (x - max x)/T - log Σ exp((x - max x)/T);  dx = (dy - exp(y)·Σ dy) / T",
        signature="x(n, c), temperature:scalar -> y(n, c)",
        forward=_log_softmax,
        vjp=gradients(_log_softmax_gradient),
        wrt=("x",),
        vjp_reads=("y", "temperature"),
        may_alias=("x",),
        example=_example,
        analytic=True,
        source="Hinton, Vinyals and Dean 2015, eq. 1",
    )
)
