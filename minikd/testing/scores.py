"""Rows of scores that are decided cases, and how much of their rounding softened probabilities inherit."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.ops.rows import softened
from minikd.testing.contract import Attributes, Inputs

GIVEN = ("loss", "gradient")  # what a loss of rows gives
INF, NAN = np.inf, np.nan
PLAIN = np.array([[2.0, 1.0, 0.1], [0.5, 2.5, -1.0]])
TEACHER = np.array([[3.0, 0.5, -0.5], [0.0, 3.0, 0.0]])
LABELS = np.array([0, 1])
BAD_TEMPERATURES = tuple(("a temperature of " + str(t), {"temperature": t}) for t in (0.0, -1.0, NAN, INF))
BAD_LABELS = tuple((f"label {y} of 3 classes", {"target": np.array([0, y])}) for y in (3, -1))

MASKED = np.array([[0.0, -INF, 1.0], [2.0, 1.0, -INF]])
HUGE = np.array([[1e30, -1e30, 0.0], [3e4, 0.0, -3e4]])
BROKEN = {
    "a row of nothing but -inf is NaN, and no other row is touched": -INF,
    "a row with +inf is NaN, and no other row is touched": INF,
    "a row with NaN is NaN, and no other row is touched": NAN,
}
EQUAL = "equal student and teacher: the divergence is 0"
LARGEST_OFFSET = 1e3  # a score's own rounding is allowed for up to here; beyond, no digit of the result would be left


def broken(value: float) -> Any:
    """Two plain rows, the first of which holds this value."""
    rows = PLAIN.copy()
    rows[0, slice(None) if value == -INF else 1] = value
    return rows


def pair_rows() -> dict[str, tuple[Any, Any]]:
    """Student and teacher of the edge cases that all their losses share."""
    return {
        "a class that both rule out (-inf): its gradient is 0, not NaN": (MASKED, MASKED - 0.5),
        "logits of ±1e30": (HUGE, HUGE[::-1].copy()),
        "scores that lie far apart": (np.array([[0.0, 400.0, 800.0]]), np.array([[800.0, 400.0, 0.0]])),
        "one side far above the other": (np.array([[1e30, 1e30], [1e30, 0.0]]), TEACHER[:, :2]),
        "rows that lie far from one another": (np.array([[3e3, 3001.0], [-3e3, -3001.0]]), TEACHER[:, :2]),
        "a single class": (np.array([[3.0], [-2.0]]), np.array([[1.0], [5.0]])),
        EQUAL: (PLAIN, PLAIN.copy()),
        **{name: (broken(value), TEACHER) for name, value in BROKEN.items()},
    }


def rounded(z: Any, t: float) -> tuple[Any, Any]:
    """softmax(z/T), and how many roundings each log p inherits: of its size, and of the scores where p is not sure."""
    wide = np.asarray(z, np.float64)
    with np.errstate(all="ignore"):
        p, log_p = softened(np, wide, 1 / float(t))
        offset = np.max(np.abs(wide), axis=1, where=np.isfinite(wide), initial=0.0)[:, None]
        return p, 1 + np.where(p > 0, np.abs(log_p), 0) + (1 - p) * np.minimum(offset, LARGEST_OFFSET) / t


def divisors(attrs: Attributes, n: int, labelled: int) -> tuple[float, float]:
    """What soft and hard terms are divided by."""
    reduction = attrs.get("reduction", "mean")
    if reduction in ("sum", "none"):
        return 1.0, 1.0
    return float(n), float(max(labelled, 1))


def likelier(inputs: Inputs, t: float) -> Any:
    """The larger of both softened probabilities, each times the roundings that its logarithm inherits."""
    pairs = [rounded(inputs[name], t) for name in ("student_logits", "teacher_logits")]
    return np.maximum(*(p * roundings for p, roundings in pairs))


def largest(x: Any) -> float:
    """The largest number of an array in which some may be NaN."""
    return float(np.max(x, where=np.isfinite(x), initial=0.0))
