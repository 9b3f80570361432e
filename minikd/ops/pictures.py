"""Pictures moved by a few pixels: what a training set is made more of, without a second copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.ops.op import Example, Op, Shape, register
from minikd.ops.random import random_words

# Streams of shifts differ from those of masks in this bit: so a dropout layer of the same seed draws other numbers.
SHIFTS = 2**31


def _same_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    """The shape of x, once its rows are known to be pictures of which something stays when they are moved."""
    x, width, most = shapes[0], attrs["width"], attrs["most"]
    assert x is not None
    columns = x[-1]
    if width < 1 or columns < 1 or columns % width:
        expected = f"rows of pictures that are {width} pixels wide"
        raise ShapeError("shift_images", "x", expected=expected, got=f"shape {x}")
    side = min(width, columns // width)
    if not isinstance(most, int) or not 0 <= most < side:
        expected = f"a whole number from 0 to {side - 1}, so that something of each picture stays"
        raise ArgumentError("shift_images", "most", expected=expected, got=repr(most))
    return [x]


def _sources(xp: Any, moves: Any, size: int) -> tuple[Any, Any]:
    """For each picture and each place along one axis: where its pixel comes from, and whether there is one."""
    source = xp.arange(size)[None, :] - moves[:, None]
    return xp.clip(source, 0, size - 1), (source >= 0) & (source < size)


def _shift_images(xp: Any, y: Any, x: Any, fill: Any, step: Any, width: int, most: int, seed: int, stream: int) -> None:
    n, height = len(x), x.shape[1] // width
    words = random_words(xp, 2 * n, seed, stream ^ SHIFTS, int(step))
    moves = ((words * xp.uint64(2 * most + 1)) >> xp.uint64(32)).astype(xp.int64).reshape(n, 2) - most
    rows, row_there = _sources(xp, moves[:, 0], height)
    columns, column_there = _sources(xp, moves[:, 1], width)
    places = (rows[:, :, None] * width + columns[:, None, :]).reshape(x.shape)
    there = (row_there[:, :, None] & column_there[:, None, :]).reshape(x.shape)
    y[...] = xp.where(there, xp.take_along_axis(x, places, axis=1), 0 if fill is None else fill)


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, height, width, most in (
        (1, 1, 1, 0),
        (7, 3, 4, 2),
        (2, 28, 28, 2),
        (5, 6, 3, 1),
        (0, 2, 2, 1),
        (300, 4, 5, 3),
    ):
        x, fill = (rng.normal(size=shape).astype(dtype) for shape in ((n, height * width), height * width))
        attrs = {"width": width, "most": most, "seed": 2**40 + n, "stream": 3}
        cases += [([x, fill, np.asarray(9)], attrs), ([x, None, np.asarray(2**33 + 1)], {**attrs, "seed": -5})]
    return cases


register(
    Op(
        name="shift_images",
        formula=(
            "y_i = picture x_i moved down by dy and right by dx, where nothing comes from: fill, or 0;  "
            "(dy, dx) = ⌊r·(2·most + 1) / 2³²⌋ - most,  r = philox(seed, stream ⊕ 2³¹, step, 2·i and 2·i + 1)"
        ),
        signature="x(n, m), fill?(m), step:counter -> y(n, m)",
        attrs={"width": 1, "most": 2, "seed": 0, "stream": 0},
        shape=_same_shape,
        forward=_shift_images,
        example=_example,
        source="Hinton, Vinyals and Dean 2015, sec. 3, where digits are jittered by up to two pixels",
    )
)
