"""Operations that move elements without computing with them, and the two that undo broadcasting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.ops.op import Example, Op, Shape, register
from minikd.ops.refusals import refuse_rows, spoil

# --- reshape ---


def _reshape_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    (x,), shape = shapes, tuple(attrs["shape"])
    assert x is not None
    size = math.prod(x)
    if -1 in shape:
        rest = math.prod(s for s in shape if s != -1)
        if shape.count(-1) == 1 and rest and size % rest == 0:
            shape = tuple(size // rest if s == -1 else s for s in shape)
    if math.prod(shape) != size or min(shape, default=0) < 0:
        raise ShapeError("reshape", "shape", expected=f"a shape of {size} elements, as x {x} has", got=str(shape))
    return [shape]


def _reshape_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    x = rng.normal(size=(4, 6)).astype(dtype)
    return [([x], {"shape": (3, 8)}), ([x], {"shape": (-1,)}), ([x[:0]], {"shape": (0, 2)})]


register(
    Op(
        name="reshape",
        formula="y = the elements of x in the same order;  dx = the elements of dy",
        signature="x(*) -> y(*)",
        attrs={"shape": ()},
        shape=_reshape_shape,
        forward=lambda xp, y, x, shape: xp.copyto(y, x.reshape(y.shape)),
        vjp=lambda xp, dx, dy, y, x, shape: xp.copyto(dx, dy.reshape(dx.shape)),
        wrt=("x",),
        may_alias=("x",),
        example=_reshape_example,
        analytic=True,
    )
)

# --- transpose ---


def _order(axes: Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    order = tuple(range(ndim))[::-1] if axes is None else tuple(a + ndim if a < 0 else a for a in axes)
    if sorted(order) != list(range(ndim)):
        raise ArgumentError("transpose", "axes", expected=f"each of the {ndim} axes once", got=str(axes))
    return order


def _transpose_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    (x,) = shapes
    assert x is not None
    return [tuple(x[a] for a in _order(attrs["axes"], len(x)))]


def _transpose_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    x = rng.normal(size=(2, 3, 4)).astype(dtype)
    return [([x], {"axes": (2, 0, 1)}), ([x], {}), ([x[0]], {"axes": (1, -2)}), ([x[:, :0]], {})]


register(
    Op(
        name="transpose",
        formula="y[i_π(0), i_π(1), …] = x[i_0, i_1, …];  dx = dy with the axes put back",
        signature="x(*) -> y(*)",
        attrs={"axes": None},
        shape=_transpose_shape,
        forward=lambda xp, y, x, axes: xp.copyto(y, x.transpose(_order(axes, x.ndim))),
        vjp=lambda xp, dx, dy, y, x, axes: xp.copyto(dx.transpose(_order(axes, dx.ndim)), dy),
        wrt=("x",),
        example=_transpose_example,
        analytic=True,
    )
)

# --- take rows ---


def check_rows(xp: Any, rows: Any, count: int) -> Any:
    """Refuse row numbers outside 0 … count - 1; returns which they are, for a device refuses them later."""
    wrong = (rows < 0) | (rows >= count)
    refuse_rows(xp, ("take", count), wrong, rows, lambda k, row: row_out_of_range(k, row, count))
    return wrong


def row_out_of_range(k: int, row: int, count: int) -> ArgumentError:
    """The one error for a bad row number, raised alike by every backend."""
    expected = f"a row number from 0 to {count - 1} (x has {count} rows)"
    return ArgumentError("take", f"rows[{k}]", expected=expected, got=str(row))


def _take(xp: Any, y: Any, x: Any, rows: Any) -> None:
    wrong = check_rows(xp, rows, x.shape[0])
    spoil(xp, wrong, pick(xp, x, rows, y), xp.nan)


def pick(xp: Any, x: Any, rows: Any, out: Any = None) -> Any:
    """The rows of x with these numbers, where one that does not exist becomes the nearest."""
    if xp is np:
        return np.take(x, rows, axis=0, out=out, mode="clip")
    return xp.take(x, xp.clip(rows, 0, max(len(x) - 1, 0)), axis=0, out=out)


def _take_vjp(xp: Any, dx: Any, dy: Any, y: Any, x: Any, rows: Any) -> None:
    dx[...] = 0
    xp.add.at(dx, rows, dy)


def _take_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    x = rng.normal(size=(5, 7)).astype(dtype)
    return [([x, np.array(rows, np.int64)], {}) for rows in ([4, 0, 0, 2], [3], [], list(range(5)) * 3)]


register(
    Op(
        name="take",
        formula="y[k] = x[rows[k]];  dx[r] = Σ_{k: rows[k] = r} dy[k]",
        signature="x(n, m), rows:index(k) -> y(k, m)",
        forward=_take,
        vjp=_take_vjp,
        wrt=("x",),
        vjp_reads=("rows",),
        example=_take_example,
        analytic=True,
    )
)

# --- take rows of bytes ---


def _take_scaled(xp: Any, y: Any, x: Any, rows: Any, scale: Any, shift: Any) -> None:
    wrong = check_rows(xp, rows, x.shape[0])
    y[...] = pick(xp, x, rows) * scale + shift
    spoil(xp, wrong, y, xp.nan)


def _take_scaled_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for m in (1, 7, 100):
        x = rng.integers(0, 256, (5, m)).astype(np.uint8)
        scale, shift = (rng.normal(size=m).astype(dtype) for _ in range(2))
        cases += [([x, np.array(rows, np.int64), scale, shift], {}) for rows in ([4, 0, 0, 2], [3], [])]
    return cases


register(
    Op(
        name="take_scaled",
        formula="y[k] = scale·x[rows[k]] + shift",
        signature="x:byte(n, m), rows:index(k), scale(m), shift(m) -> y(k, m)",
        forward=_take_scaled,
        example=_take_scaled_example,
    )
)

# --- take labels ---

# What stands in the place of a label that was not there to be taken: no class, and no mark for rows without one.
NO_LABEL = np.iinfo(np.int64).min


def _take_index(xp: Any, y: Any, x: Any, rows: Any) -> None:
    wrong = check_rows(xp, rows, x.shape[0])
    spoil(xp, wrong, pick(xp, x, rows, y), NO_LABEL)


def _take_index_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    x = rng.integers(-1, 10, 5)
    return [([x, np.array(rows, np.int64)], {}) for rows in ([4, 0, 0, 2], [3], [])]


register(
    Op(
        name="take_index",
        formula="y[k] = x[rows[k]], of whole numbers such as labels",
        signature="x:index(n), rows:index(k) -> y:index(k)",
        forward=_take_index,
        example=_take_index_example,
    )
)

# --- concatenate ---


def _concatenate_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    known = [s for s in shapes if s is not None]
    if not known:
        raise ShapeError("concatenate", "xs", expected="at least one array", got="none")
    first, axis = known[0], attrs["axis"]
    if not first or not -len(first) <= axis < len(first):
        raise ArgumentError("concatenate", "axis", expected=f"an axis of an array of shape {first}", got=str(axis))
    axis %= len(first)
    for k, shape in enumerate(known):
        if len(shape) != len(first) or shape[:axis] + shape[axis + 1 :] != first[:axis] + first[axis + 1 :]:
            raise ShapeError(
                "concatenate", f"xs[{k}]", expected=f"of shape {first} except along axis {axis}", got=f"shape {shape}"
            )
    return [(*first[:axis], sum(s[axis] for s in known), *first[axis + 1 :])]


def _concatenate_vjp(xp: Any, *buffers: Any, axis: int) -> None:
    count = (len(buffers) - 2) // 2
    dxs, dy, xs = buffers[:count], buffers[count], buffers[count + 2 :]
    stops = np.cumsum([x.shape[axis] for x in xs])
    for dx, piece in zip(dxs, xp.split(dy, stops[:-1].tolist(), axis=axis), strict=True):
        if dx is not None:
            dx[...] = piece


def _concatenate_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    a, b, c = (rng.normal(size=s).astype(dtype) for s in ((2, 3), (4, 3), (2, 5)))
    return [([a, b], {}), ([a, c, a], {"axis": -1}), ([b], {"axis": 1}), ([a[:0], b], {})]


register(
    Op(
        name="concatenate",
        formula="y = the arrays one after the other along axis;  each dx = its piece of dy",
        signature="*xs(*) -> y(*)",
        attrs={"axis": 0},
        shape=_concatenate_shape,
        forward=lambda xp, y, *xs, axis: xp.concatenate(xs, axis=axis, out=y),
        vjp=_concatenate_vjp,
        wrt=("xs",),
        vjp_reads=("xs",),
        example=_concatenate_example,
        analytic=True,
    )
)

# --- broadcasting, made visible: the recorder inserts these two where shapes differ ---


def sum_to(xp: Any, x: Any, shape: Shape) -> Any:
    """x summed over the axes along which `shape` was broadcast to x's shape."""
    lead = x.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(i + lead for i, s in enumerate(shape) if s == 1 and x.shape[i + lead] != 1)
    return x.sum(axis=axes, keepdims=True).reshape(shape) if axes else x


def _broadcast_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    (x,), shape = shapes, tuple(attrs["shape"])
    assert x is not None
    if np.broadcast_shapes(x, shape) != shape:
        raise ShapeError("broadcast_to", "x", expected=f"of a shape that broadcasts to {shape}", got=f"shape {x}")
    return [shape]


def _broadcast_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[tuple[Shape, Shape]] = [
        ((3,), (4, 3)),
        ((4, 1), (4, 3)),
        ((), (2, 2)),
        ((1, 3), (1, 3)),
        ((3,), (0, 3)),
    ]
    return [([np.asarray(rng.normal(size=s), dtype)], {"shape": t}) for s, t in cases]


def _sum_to_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    return [
        ([np.asarray(rng.normal(size=attrs["shape"]), dtype)], {"shape": inputs[0].shape})
        for inputs, attrs in _broadcast_example(rng, dtype)
    ]


register(
    Op(
        name="broadcast_to",
        formula="y = x repeated along the axes that shape adds;  dx = dy summed over them",
        signature="x(*) -> y(*)",
        attrs={"shape": ()},
        shape=_broadcast_shape,
        forward=lambda xp, y, x, shape: xp.copyto(y, x),
        vjp=lambda xp, dx, dy, y, x, shape: xp.copyto(dx, sum_to(xp, dy, dx.shape)),
        wrt=("x",),
        example=_broadcast_example,
        analytic=True,
    )
)
register(
    Op(
        name="sum_to",
        formula="y = x summed over the axes that shape lacks;  dx = dy repeated along them",
        signature="x(*) -> y(*)",
        attrs={"shape": ()},
        shape=lambda shapes, attrs: [tuple(attrs["shape"])],
        forward=lambda xp, y, x, shape: xp.copyto(y, sum_to(xp, x, y.shape)),
        vjp=lambda xp, dx, dy, y, x, shape: xp.copyto(dx, dy),
        wrt=("x",),
        example=_sum_to_example,
        analytic=True,
    )
)
register(
    Op(
        name="add_into",
        formula="y += x: how the second and later gradients of a shared value are added",
        signature="x(...) -> y!(...)",
        forward=lambda xp, y, x: xp.add(y, x, out=y),
        example=lambda rng, dtype: [([np.asarray(rng.normal(size=s), dtype)], {}) for s in ((3, 4), (67,), (0,))],
    )
)
register(
    Op(
        name="copy",
        formula="y = x",
        signature="x(...) -> y(...)",
        forward=lambda xp, y, x: xp.copyto(y, x),
        example=lambda rng, dtype: [([np.asarray(rng.normal(size=s), dtype)], {}) for s in ((3, 4), (67,), (0,), ())],
    )
)
