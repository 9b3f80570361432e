"""What a classifier's scores decide: the class of each row, and how many of them are right."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.ops.losses import labelled_rows
from minikd.ops.op import Example, Op, register
from minikd.ops.rows import row_shapes


def _awkward_rows(dtype: Any) -> Any:
    """Ties, masked classes, and NaN, which counts as the largest score of its row."""
    inf, nan = np.inf, np.nan
    return np.array([[1, 3, 3, 2], [-inf, -inf, -inf, -inf], [0, nan, inf, nan], [inf, 1, inf, 0]], dtype)


def _argmax_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    return [([rng.normal(size=shape).astype(dtype)], {}) for shape in row_shapes()] + [([_awkward_rows(dtype)], {})]


register(
    Op(
        name="argmax",
        formula="y = the first j with x_j = max x",
        signature="x(n, c) -> y:index(n)",
        forward=lambda xp, y, x: xp.copyto(y, x.argmax(axis=1)),
        example=_argmax_example,
    )
)


def _correct_count(xp: Any, count: Any, logits: Any, target: Any, ignore_index: int) -> None:
    labelled = labelled_rows(xp, "correct_count", target, logits.shape[1], ignore_index)
    count[...] = (labelled & (logits.argmax(axis=1) == target)).sum()


def _correct_count_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, c in row_shapes():
        logits = rng.normal(size=(n, c)).astype(dtype)
        target = np.where(rng.random(n) < 0.5, logits.argmax(axis=1), rng.integers(0, c, n))
        target[n // 2] = -100
        cases += [([logits, target], {}), ([logits, logits.argmax(axis=1)], {"ignore_index": 0})]
    return [*cases, ([_awkward_rows(dtype), np.array([1, 0, 1, 2])], {})]


register(
    Op(
        name="correct_count",
        formula="count = #{rows: target ≠ ignore_index and argmax z = target}",
        signature="logits(n, c), target:index(n) -> count:index()",
        attrs={"ignore_index": -100},
        forward=_correct_count,
        example=_correct_count_example,
    )
)
