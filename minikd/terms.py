"""What each term of an objective is worth on a batch: its value, and how hard it pulls at the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minikd.kernels.arrays import to_host
from minikd.nn import Arena, Module
from minikd.objectives import Objective, Sum, Term
from minikd.steps import Step

__all__ = ["TermFigures", "TermMeter", "names_of"]


class TermFigures(NamedTuple):
    """One term on one batch.

    value : without the weight.  gradient_norm : the L2 norm, over all parameters, of the gradient of weight·value.
    share : that norm as a part of all terms' norms; NaN where all of them are 0.
    """

    term: str
    value: float
    gradient_norm: float
    share: float


def names_of(terms: Sequence[Term]) -> list[str]:
    """The terms' names, with a number where a kind comes more than once: SoftLabels, SoftLabels#2."""
    names: list[str] = []
    for term in terms:
        before = sum(name.split("#")[0] == term.name for name in names)
        names.append(f"{term.name}#{before + 1}" if before else term.name)
    return names


class TermMeter:
    """Measures an objective's terms one by one on a copy of the model, which leaves the training as it is.

    Parameters
    ----------
    model, objective : what is being trained; they are copied.
    loss_of : (model, objective, *arguments) → the loss as a Tensor, made of operations.
    """

    def __init__(self, model: Module, objective: Objective, loss_of: Callable[..., Any]) -> None:
        self.names = names_of(objective.terms)
        self._originals = (model, objective)
        self._model, self._objective = copy.deepcopy((model, objective))
        self._loss_of = loss_of
        self._arena = Arena([*self._model.parameters(), *self._objective.parameters()])
        self._steps = [Step(self._one(k), fallback=True) for k in range(len(self.names))]

    def _one(self, k: int) -> Callable[..., Any]:
        """A step that makes the k-th term's gradient of a batch, given its varying numbers first."""

        def step(count: int, *arguments: Any) -> Any:
            objective = self._objective.at(arguments[:count])
            term = objective.terms[k]
            loss = self._loss_of(self._model, Sum((term,)), *arguments[count:])
            for parameter in self._arena.parameters:
                parameter.zero_grad()
            loss.backward()
            return loss

        return step

    def gradients(self, numbers: Sequence[Any], *batch: Any) -> tuple[list[float], np.ndarray]:
        """Each term's weighted loss, and its gradient over all parameters as a row: (terms, parameters), float64."""
        self._copy_values()
        places = [np.array(number, np.float64) for number in numbers]
        losses, rows = [], np.empty((len(self._steps), self._arena.values.size))
        for k, step in enumerate(self._steps):
            self._copy_counters()  # so that every term sees the same dropout mask
            self._arena.gradients.fill(0)  # where a term has no gradient
            losses.append(float(step(len(places), *places, *batch)))
            rows[k] = to_host(self._arena.gradients)
        return losses, rows

    def measure(self, numbers: Sequence[Any], *batch: Any) -> tuple[TermFigures, ...]:
        """The figures of each term; `numbers` are the present values of what schedules change."""
        losses, rows = self.gradients(numbers, *batch)
        norms = np.sqrt(np.einsum("kp,kp->k", rows, rows))
        weights = [float(term.weight) for term in self._objective.at(list(numbers)).terms]
        total = float(norms.sum())
        return tuple(
            TermFigures(name, loss / weight if weight else 0.0, float(norm), float(norm) / total if total else math.nan)
            for name, loss, weight, norm in zip(self.names, losses, weights, norms, strict=True)
        )

    def _copy_values(self) -> None:
        model, objective = self._originals
        originals = [*model.parameters(), *objective.parameters()]
        for mine, theirs in zip(self._arena.parameters, originals, strict=True):
            mine.array[...] = theirs.array

    def _copy_counters(self) -> None:
        theirs = self._originals[0].counters()
        for name, counter in self._model.counters().items():
            counter[...] = theirs[name]
