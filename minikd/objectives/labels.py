"""Terms that compare the student's logits with hard labels, or with a teacher's in the classical ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.kernels.arrays import here
from minikd.kernels.recording import note_constant
from minikd.objectives.objective import IGNORED, Batch, Term, constant

__all__ = ["HardLabels", "LogitRegression", "SoftCrossEntropy", "SoftLabels", "Softened", "Tempered"]


@dataclass(eq=False, kw_only=True)
class HardLabels(Term):
    """Cross-entropy with the labels, at temperature 1; rows without a label are left out.

    Parameters
    ----------
    weight : of the term.
    class_weights : one number from 0 for each class, or None; the mean divides by the weights of the batch's labels.
    label_smoothing : e in [0, 1]; the target becomes (1 - e)·y + e/c.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    formula = "CE(y, softmax(z_s))"
    source = "Hinton, Vinyals and Dean 2015, sec. 2; smoothing: Szegedy et al. 2016, sec. 7"
    needs = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("label_smoothing", "between 0 and 1", 0 <= self.label_smoothing <= 1)
        if self.class_weights is not None:
            self.class_weights = tuple(float(w) for w in self.class_weights)
            fits = len(self.class_weights) > 0 and all(0 <= w < math.inf for w in self.class_weights)
            self.check("class_weights", "a finite number from 0 for each class", fits)

    def value(self, batch: Batch) -> Any:
        logits = batch.student_logits
        given = self.class_weights
        weight = None if given is None else note_constant(here.put(np.array(given, logits.dtype)))
        return F.cross_entropy(
            logits, batch.target, weight=weight, ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )

    def fuses_with(self, other: Term) -> bool:
        return isinstance(other, SoftLabels) and self.class_weights is None

    def fused(self, other: Term, batch: Batch) -> Any:
        """Both by `functional.distillation_loss`, in one traversal of the logits."""
        assert isinstance(other, SoftLabels)
        return F.distillation_loss(
            batch.student_logits,
            batch.teacher_logits,
            batch.target,
            temperature=other.temperature,
            hard_weight=self.weight,
            soft_weight=other.weight,
            scale_t2=other.scale_t2,
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )


@dataclass(eq=False, kw_only=True)
class Tempered(Term):
    """A term in which teacher and student are softened by a temperature.

    Parameters
    ----------
    weight : of the term.
    temperature : T > 0; Hinton et al. found 2.5 to 20 useful, lower the smaller the student.
    temperature_schedule : a factor of progress that multiplies it.
    """

    temperature: float = 4.0
    temperature_schedule: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "Temperatures from 1 to 20 are usual."
        self.check("temperature", "a finite number above 0", 0 < self.temperature < math.inf, fix)


@dataclass(eq=False, kw_only=True)
class Softened(Tempered):
    """A term in which teacher and student are softened, and that T² keeps at its size.

    Parameters
    ----------
    weight, temperature, temperature_schedule : as in `Tempered`.
    scale_t2 : multiply by T², so that the gradient's size does not depend on T.
    """

    scale_t2: bool = True

    def coefficient(self) -> float:
        return float(self.weight) * (float(self.temperature) ** 2 if self.scale_t2 else 1.0)

    def scaled(self, value: Any) -> Any:
        """T²·value, or the value alone without `scale_t2`; by two products, which take a T that varies, too."""
        return value * self.temperature * self.temperature if self.scale_t2 else value


@dataclass(eq=False, kw_only=True)
class SoftLabels(Softened):
    """The teacher's softened probabilities: T²·KL(q ‖ p), over all rows, labelled or not."""

    formula = "T²·KL(softmax(z_t / T) ‖ softmax(z_s / T))"
    source = "Hinton, Vinyals and Dean 2015, eq. 1 and sec. 2"

    def value(self, batch: Batch) -> Any:
        return F.distillation_loss(
            batch.student_logits,
            batch.teacher_logits,
            None,
            temperature=self.temperature,
            hard_weight=0.0,
            soft_weight=1.0,
            scale_t2=self.scale_t2,
        )

    def fuses_with(self, other: Term) -> bool:
        return isinstance(other, HardLabels) and other.class_weights is None

    def fused(self, other: Term, batch: Batch) -> Any:
        return other.fused(self, batch)


@dataclass(eq=False, kw_only=True)
class SoftCrossEntropy(Softened):
    """-T²·Σ q·log p: `SoftLabels` plus the teacher's entropy, which is a constant; the gradient is the same."""

    formula = "T²·CE(softmax(z_t / T), softmax(z_s / T))"
    source = "Hinton, Vinyals and Dean 2015, sec. 2, where the soft term is this cross-entropy"

    def value(self, batch: Batch) -> Any:
        divergence = F.distillation_loss(
            batch.student_logits,
            batch.teacher_logits,
            None,
            temperature=self.temperature,
            hard_weight=0.0,
            soft_weight=1.0,
            scale_t2=self.scale_t2,
        )
        q = constant(F.softmax(batch.teacher_logits, temperature=self.temperature))
        zeros = note_constant(here.xp.zeros(q.shape, q.dtype))
        negative_entropy = F.kl_div(zeros, q)  # Σ q·log q, which is exactly 0 where q is
        return divergence - self.scaled(negative_entropy)


@dataclass(eq=False, kw_only=True)
class LogitRegression(Term):
    """Half the squared distance of the logits, per class, after each row's mean is taken off (or not).

    Parameters
    ----------
    weight : of the term.
    centred : take off each row's mean first, in which softmax does not differ; the limit of `SoftLabels` for T → ∞.
    """

    centred: bool = True

    formula = "1/(2c)·Σ (z̃_s - z̃_t)²"
    source = "Ba and Caruana 2014, eq. 1; Hinton, Vinyals and Dean 2015, sec. 2.1, eq. 4"

    def value(self, batch: Batch) -> Any:
        difference = batch.student_logits - batch.teacher_logits
        if self.centred:
            difference = difference - difference.mean(axis=1, keepdims=True)
        return (difference * difference).mean() * 0.5
