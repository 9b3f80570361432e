"""Several teachers as one: the average of their probabilities, or of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, ShapeError
from minikd.teachers.teacher import LOGITS, PROBABILITIES, Teacher


class Ensemble(Teacher):
    """The weighted average of teachers, computed in float64.

    average="probabilities": log Σ_i w_i softmax(z_i), the arithmetic mean of P at T = 1, as a vote.
    average="logits": Σ_i w_i z_i, whose softmax is the normalised geometric mean: a class that one teacher excludes
    (-inf) is excluded by all.

    Parameters
    ----------
    weights : one number above 0 for each teacher, scaled to a sum of 1; by default all alike.

    Raises
    ------
    ArgumentError : no average is named, no teacher, or weights that do not fit.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float] | None = None,
        average: str | None = None,
        *,
        classes: int | None = None,
        identity: str = "",
    ) -> None:
        if average not in (LOGITS, PROBABILITIES):
            fix = "They differ: probabilities vote, while in logits one teacher's veto (-inf) counts for all."
            expected = f"{PROBABILITIES!r} or {LOGITS!r}"
            raise ArgumentError("Ensemble", "average", expected=expected, got=repr(average), fix=fix)
        if not teachers:
            raise ArgumentError("Ensemble", "teachers", expected="one teacher at least", got="none")
        super().__init__(average, classes or next((t.classes for t in teachers if t.classes), None), identity)
        self.teachers, self.average = tuple(teachers), average
        self.weights = self._normalised(weights)
        self._dtype = np.dtype(np.float32)
        self.per_row = any(t.per_row for t in self.teachers)

    def _normalised(self, weights: Sequence[float] | None) -> np.ndarray:
        given = np.ones(len(self.teachers)) if weights is None else np.asarray(weights, np.float64)
        if given.shape != (len(self.teachers),) or not (given > 0).all() or not np.isfinite(given).all():
            expected = f"{len(self.teachers)} numbers above 0, one for each teacher"
            raise ArgumentError(
                "Ensemble", "weights", expected=expected, got=str(weights), fix="Leave out a teacher of 0."
            )
        return np.asarray(given / given.sum())

    def logits(self, x: Any, rows: Any = None) -> np.ndarray:
        """Scores (n, c) of the average, in float64 if a member's are."""
        return super().logits(x, rows).astype(self._dtype, copy=False)

    def knows(self, rows: Any) -> bool:
        return all(teacher.knows(rows) for teacher in self.teachers)

    def check(self, data: Any) -> None:
        for teacher in self.teachers:
            teacher.check(data)

    def _answer(self, x: Any, rows: Any) -> Any:
        members = [teacher.logits(x, rows) for teacher in self.teachers]
        if len({m.shape for m in members}) > 1:
            got = " and ".join(sorted({str(m.shape) for m in members}))
            raise ShapeError("Ensemble", "the answers", expected="of the same classes", got=f"shapes {got}")
        self._dtype = np.result_type(*members)
        total = np.zeros(members[0].shape)
        for weight, scores in zip(self.weights, members, strict=True):
            wide = scores.astype(np.float64)
            as_they_are = self.average == LOGITS or not len(wide)
            total += weight * (wide if as_they_are else np.asarray(F.of_host(F.softmax, wide)))
        return total

    def _identity(self) -> str:
        members = "; ".join(f"{w:.17g} {t.identity}" for w, t in zip(self.weights, self.teachers, strict=True))
        return f"ensemble of {self.average} [{members}]"
