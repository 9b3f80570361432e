"""Mistakes that many make with losses of rows of scores, and what each would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minikd.testing.contract import Attributes, Inputs, Mistake, expected

Change = Callable[[Inputs, Attributes], None]
Give = Callable[[Inputs, Attributes], Any]


def changed(kernel: str, change: Change) -> Give:
    """What the operation gives once inputs or attributes were changed."""

    def give(inputs: Inputs, attrs: Attributes) -> Any:
        inputs, attrs = dict(inputs), dict(attrs)
        change(inputs, attrs)
        return expected(kernel, inputs, attrs)

    return give


def shared(attrs: Attributes) -> Attributes:
    """The attributes that all divergences of a softened student and teacher have."""
    return {name: value for name, value in attrs.items() if name in ("reduction", "scale_t2")}


def soft_term(inputs: Inputs, attrs: Attributes) -> Any:
    """T²·KL(teacher ‖ student) alone, whatever the operation."""
    alone = {"target": None, "hard_weight": 0.0, "soft_weight": 1.0}
    return expected("distillation_loss", {**inputs, **alone}, shared(attrs))


def _soft_term_swapped(inputs: Inputs, attrs: Attributes) -> Any:
    """The distillation loss whose hard term is right."""
    hard = expected("distillation_loss", {**inputs, "soft_weight": 0.0}, attrs)
    soft = changed("distillation_loss", EXCHANGE)({**inputs, "hard_weight": 0.0}, attrs)
    return [a + b for a, b in zip(hard, soft, strict=True)]


def set_to(**changed: Any) -> Change:
    """Inputs or attributes of these names with these values."""

    def change(inputs: Inputs, attrs: Attributes) -> None:
        for name, value in changed.items():
            (inputs if name in inputs else attrs)[name] = value

    return change


def times(kernel: str, factor: Callable[[Inputs, Attributes], float]) -> Give:
    """The right results times a factor."""

    def give(inputs: Inputs, attrs: Attributes) -> Any:
        return [factor(inputs, attrs) * x for x in expected(kernel, inputs, attrs)]

    return give


def exchanged_values(first: str, second: str) -> Change:
    """Two inputs, in one another's place."""

    def change(inputs: Inputs, attrs: Attributes) -> None:
        inputs[first], inputs[second] = inputs[second], inputs[first]

    return change


def reduced(losses: Any, gradients: Any, attrs: Attributes, count: int) -> list[Any]:
    """The loss of rows and its gradient, reduced as the attributes say; `count` rows share a mean."""
    reduction = attrs.get("reduction", "mean")
    if reduction == "none":
        return [losses, gradients]
    share = 1.0 if reduction == "sum" else 1 / max(count, 1)
    return [share * losses.sum(), share * gradients]


def all_rows_counted(kernel: str) -> Mistake:
    """Of a mean over the rows with a label."""

    def share(inputs: Inputs, attrs: Attributes) -> float:
        target = np.asarray(inputs["target"])
        return float((target != attrs.get("ignore_index", -100)).sum() / len(target))

    return Mistake("rows without a label are counted in the mean", times(kernel, share))


def usual(kernel: str, first: str) -> tuple[Mistake, ...]:
    """Those of every loss that is reduced over rows."""

    def classes(inputs: Inputs) -> int:
        return int(np.shape(inputs[first])[1])

    def rows(inputs: Inputs) -> int:
        return int(np.shape(inputs[first])[0])

    return (
        Mistake(
            "the sum is divided by all elements (mean), not by the rows (batchmean)",
            times(kernel, lambda i, a: 1 / classes(i)),
        ),
        Mistake("the sum over rows is not divided by their number", times(kernel, lambda i, a: rows(i))),
        Mistake("the loss has the wrong sign", times(kernel, lambda i, a: -1.0)),
    )


EXCHANGE = exchanged_values("student_logits", "teacher_logits")


def pair_mistakes(kernel: str) -> tuple[Mistake, ...]:
    """Those of every loss of a softened student and teacher."""
    swapped = _soft_term_swapped if kernel == "distillation_loss" else changed(kernel, EXCHANGE)
    return (
        Mistake("the factor T² is missing", changed(kernel, set_to(scale_t2=False))),
        Mistake("teacher and student are exchanged", swapped),
        Mistake("the temperature is not used", changed(kernel, set_to(temperature=1.0))),
        *usual(kernel, "student_logits"),
    )
