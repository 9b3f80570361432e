"""What a student is trained on: terms that are added up, each with its weight, its formula and its source.

``HardLabels(0.3) + SoftLabels(0.7, temperature=4)`` is an objective of two terms. An objective is called with a
`Batch` and gives the loss; it runs inside a compiled step like any other function of tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.expressions import spelled
from minikd.kernels import as_real
from minikd.schedules import Schedule, as_schedule
from minikd.tensor import Tensor

__all__ = ["IGNORED", "Batch", "Objective", "Sum", "Term", "Varying", "as_target", "constant"]

IGNORED = -100  # the class id, in `Batch.target`, of a row without a label


@dataclass(frozen=True)
class Batch:
    """What an objective sees of a batch of n rows and c classes.

    student_logits : Tensor (n, c).
    teacher_logits : (n, c) array, or None where there is no teacher.
    target : (n,) class ids, IGNORED (-100) for rows without a label; or None.
    student_features, teacher_features : name of a layer → what it put out, (n, k); a teacher's are constants.
    """

    student_logits: Any
    teacher_logits: Any = None
    target: Any = None
    student_features: Mapping[str, Any] = field(default_factory=dict)
    teacher_features: Mapping[str, Any] = field(default_factory=dict)

    def student_layer(self, name: str) -> Tensor:
        """What a layer of the student put out (n, k); an error in words if the batch has nothing of that name."""
        return _layer("student_features", self.student_features, name)

    def teacher_layer(self, name: str) -> Tensor:
        """What a layer of the teacher put out (n, k), a constant."""
        return constant(_layer("teacher_features", self.teacher_features, name))


def constant(value: Any) -> Tensor:
    """A teacher's output as a tensor that no gradient flows into."""
    return Tensor.of(value.array if isinstance(value, Tensor) else as_real("Batch", "the teacher's output", value))


def _layer(argument: str, features: Mapping[str, Any], name: str) -> Tensor:
    if name not in features:
        got = "the layers " + ", ".join(map(repr, features)) if features else "no layers"
        fix = "Layers are named as in Module.named_modules; ask for them with model(x, features=[...])."
        raise ArgumentError("Batch", argument, expected=f"with the output of layer {name!r}", got=got, fix=fix)
    value = features[name]
    found = value if isinstance(value, Tensor) else Tensor.of(as_real("Batch", argument, value))
    if found.ndim != 2:
        expected = f"of shape (n, k) at layer {name!r}"
        raise ShapeError("Batch", argument, expected=expected, got=f"shape {found.shape}")
    return found


class Varying(NamedTuple):
    """A number of a term that a schedule changes: which term, which of its fields, from what, by what."""

    term: int
    name: str
    configured: float
    schedule: Schedule

    def at(self, progress: float) -> float:
        """The configured value times the schedule's factor."""
        return self.configured * float(self.schedule(progress))


class Objective:
    """A sum of terms; one term is such a sum, too."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms in their order."""
        raise NotImplementedError

    def __add__(self, other: Objective) -> Sum:
        if not isinstance(other, Objective):
            return NotImplemented
        return Sum(self.terms + other.terms)

    def __call__(self, batch: Batch) -> Any:
        """The loss, a Tensor without axes: Σ weight·value over the terms."""
        raise NotImplementedError

    def __str__(self) -> str:
        return " + ".join(spelled(term) for term in self.terms)

    # --- what it needs ---

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a teacher."""
        return any("teacher" in term.needs for term in self.terms)

    @property
    def needs_labels(self) -> bool:
        """Whether a term compares with hard labels."""
        return any("labels" in term.needs for term in self.terms)

    @property
    def student_layers(self) -> tuple[str, ...]:
        """The student's layers whose output a term compares, by their names in `Module.named_modules`."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.student_layers))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """The teacher's layers whose output a term compares."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.teacher_layers))

    # --- what it learns and what varies ---

    def prepare(self, batch: Batch) -> None:
        """Make what terms learn along with the student, such as projections, in the sizes that this batch shows."""
        for term in self.terms:
            term.prepare(batch)

    def parameters(self) -> list[Tensor]:
        """What terms learn along with the student; empty before `prepare`."""
        return [p for term in self.terms for p in term.parameters()]

    def varying(self) -> list[Varying]:
        """The numbers that schedules change, in a fixed order."""
        return [
            Varying(k, name, getattr(term, name), schedule)
            for k, term in enumerate(self.terms)
            for name, schedule in term.schedules()
        ]

    def at(self, numbers: Sequence[Any]) -> Objective:
        """The same objective with these values of its varying numbers: floats, or float64 arrays without axes."""
        terms = list(self.terms)
        for place, number in zip(self.varying(), numbers, strict=True):
            terms[place.term] = terms[place.term].replaced(place.name, number)
        return Sum(tuple(terms))


class Sum(Objective):
    """Several terms, added up in their order; the hard and the soft labels by one kernel, which reads each logit once.

    Parameters
    ----------
    terms : one at least.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise ArgumentError("Sum", "terms", expected="one term at least", got="none")
        self._terms = tuple(terms)

    @property
    def terms(self) -> tuple[Term, ...]:
        return self._terms

    def __call__(self, batch: Batch) -> Any:
        left = list(self._terms)
        total = None
        for term in self._terms:
            if term not in left:
                continue
            left.remove(term)
            partner = next((other for other in left if term.fuses_with(other)), None)
            if partner is None:
                part = term(batch)
            else:
                left.remove(partner)
                for each in (term, partner):
                    each.refuse_missing(batch)
                part = term.fused(partner, batch)
            total = part if total is None else total + part
        return total


@dataclass(eq=False)
class Term(Objective):
    """One term: weight·value.

    Attributes
    ----------
    weight : a finite number from 0.
    weight_schedule : a factor of progress that multiplies it (see `minikd.schedules`), or its text, or None.
    formula, source : in words, for tables and help.
    needs : "labels", "teacher", or both.
    """

    weight: float = 1.0
    _: dataclasses.KW_ONLY
    weight_schedule: Any = None

    formula = ""
    source = ""
    needs = frozenset({"teacher"})

    def __post_init__(self) -> None:
        """Refuse values out of their range; a term with more fields checks these, too."""
        self.check("weight", "a finite number from 0", 0 <= self.weight < math.inf)
        for name, _ in self.schedules():
            text = f"{name}_schedule"
            as_schedule(self.name, text, getattr(self, text))

    def check(self, argument: str, expected: str, ok: bool, fix: str = "") -> None:
        """ArgumentError for this field unless ok."""
        if not ok:
            raise ArgumentError(self.name, argument, expected=expected, got=repr(getattr(self, argument)), fix=fix)

    @property
    def name(self) -> str:
        """The class's name, which the text form uses, too."""
        return type(self).__name__

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self,)

    @property
    def student_layers(self) -> tuple[str, ...]:
        return ()

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return ()

    def value(self, batch: Batch) -> Any:
        """The term without its weight: a Tensor without axes."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Any:
        self.refuse_missing(batch)
        value = self.value(batch)
        return value if isinstance(self.weight, float | int) and self.weight == 1 else value * self.weight

    def refuse_missing(self, batch: Batch) -> None:
        """ArgumentError if the batch has not what this term needs."""
        if "labels" in self.needs and batch.target is None:
            fix = "Use a term without labels, or mark rows without one with -100."
            raise ArgumentError(self.name, "the batch's target", expected="class ids (n,)", got="None", fix=fix)
        if "teacher" in self.needs and batch.teacher_logits is None and not self.teacher_layers:
            fix = "Give a teacher, or use a term without one."
            raise ArgumentError(self.name, "the batch's teacher_logits", expected="scores (n, c)", got="None", fix=fix)

    def coefficient(self) -> float:
        """What stands in front of the divergence: the weight, times T² where the value holds that factor."""
        return float(self.weight)

    def prepare(self, batch: Batch) -> None:
        """Nothing to make; a term that learns makes its parameters here."""

    def parameters(self) -> list[Tensor]:
        return []

    def fuses_with(self, other: Term) -> bool:
        """Whether one kernel computes this term and the other at once."""
        return False

    def fused(self, other: Term, batch: Batch) -> Any:
        """Both terms with their weights, where `fuses_with` says so."""
        raise NotImplementedError

    def schedules(self) -> list[tuple[str, Schedule]]:
        """The fields that have a schedule, with it."""
        found = []
        for each in dataclasses.fields(self):
            if each.name.endswith("_schedule"):
                schedule = as_schedule(self.name, each.name, getattr(self, each.name))
                if schedule is not None:
                    found.append((each.name.removesuffix("_schedule"), schedule))
        return found

    def replaced(self, name: str, number: Any) -> Term:
        """The same term, sharing what it learns, with another number in this field."""
        term = copy.copy(self)
        object.__setattr__(term, name, number)
        return term


def as_target(y: Any) -> np.ndarray:
    """Labels of a data set as objectives take them: -1 becomes IGNORED."""
    y = np.asarray(y)
    return np.where(y == -1, IGNORED, y).astype(np.int64)
