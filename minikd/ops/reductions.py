"""Sums, means and maxima over axes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.ops.op import Example, Op, Shape, gradients, register

Axis = int | tuple[int, ...] | None


def reduced_axes(op: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes that are reduced, counted from the front; None means all of them."""
    axes = tuple(range(ndim)) if axis is None else tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    try:
        axes = tuple(operator.index(a) for a in axes)
    except TypeError:
        raise ArgumentError(op, "axis", expected="a whole number, or several", got=repr(axis)) from None
    if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) != len(axes):
        raise ArgumentError(op, "axis", expected=f"different axes of an array with {ndim} axes", got=str(axis))
    return tuple(a % ndim for a in axes)


def _kept(x: Any, axis: Axis) -> Shape:
    """x's shape with the reduced axes kept as 1, so that a result can be broadcast back over x."""
    axes = reduced_axes("sum", axis, x.ndim)
    return tuple(1 if i in axes else s for i, s in enumerate(x.shape))


def _shape_of(op: str, empty_ok: bool) -> Any:
    def shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
        (x,) = shapes
        assert x is not None
        axes = reduced_axes(op, attrs["axis"], len(x))
        if not empty_ok and any(x[a] == 0 for a in axes):
            raise ShapeError(op, "x", expected="an array with at least one element to reduce", got=f"shape {x}")
        return [tuple(1 if i in axes else s for i, s in enumerate(x) if attrs["keepdims"] or i not in axes)]

    return shape


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    x = rng.normal(size=(2, 3, 4)).astype(dtype)
    attrs: list[dict[str, Any]] = [{}, {"axis": 1}, {"axis": (0, -1), "keepdims": True}, {"axis": -1, "keepdims": True}]
    return [([x], a) for a in attrs] + [([np.asarray(2.5, dtype)], {})]


def _max_gradient(xp: Any, dy: Any, y: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    winners = x == y.reshape(_kept(x, axis))
    return dy.reshape(_kept(x, axis)) * winners / winners.sum(axis=axis, keepdims=True)


def _mean_gradient(xp: Any, dx: Any, dy: Any, y: Any, x: Any, axis: Axis, keepdims: bool) -> None:
    dx[...] = dy.reshape(_kept(dx, axis)) * dx.dtype.type(dy.size / dx.size)


register(
    Op(
        name="sum",
        formula="y = Σ x over axis;  dx = dy, repeated",
        signature="x(*) -> y(*)",
        attrs={"axis": None, "keepdims": False},
        shape=_shape_of("sum", empty_ok=True),
        forward=lambda xp, y, x, axis, keepdims: xp.sum(x, axis=axis, keepdims=keepdims, out=y),
        vjp=lambda xp, dx, dy, y, x, axis, keepdims: xp.copyto(dx, dy.reshape(_kept(dx, axis))),
        wrt=("x",),
        example=_example,
        analytic=True,
    )
)
register(
    Op(
        name="mean",
        formula="y = Σ x over axis / their number;  dx = dy / their number, repeated",
        signature="x(*) -> y(*)",
        attrs={"axis": None, "keepdims": False},
        shape=_shape_of("mean", empty_ok=False),
        forward=lambda xp, y, x, axis, keepdims: xp.mean(x, axis=axis, keepdims=keepdims, out=y),
        vjp=_mean_gradient,
        wrt=("x",),
        example=_example,
        analytic=True,
    )
)
register(
    Op(
        name="max",
        formula="y = max x over axis;  dx = dy at the largest element, shared equally by ties",
        signature="x(*) -> y(*)",
        attrs={"axis": None, "keepdims": False},
        shape=_shape_of("max", empty_ok=False),
        forward=lambda xp, y, x, axis, keepdims: xp.max(x, axis=axis, keepdims=keepdims, out=y),
        vjp=gradients(_max_gradient),
        wrt=("x",),
        vjp_reads=("y", "x"),
        example=_example,
    )
)
