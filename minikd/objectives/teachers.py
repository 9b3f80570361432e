"""Soft labels of teachers that are trusted row by row, put right where they err, or not there at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minikd import functional as F
from minikd.errors import ArgumentError
from minikd.kernels.arrays import here
from minikd.kernels.recording import note_constant
from minikd.objectives.labels import Softened
from minikd.objectives.objective import IGNORED, Batch, Term, constant

__all__ = ["ConfidentSoftLabels", "CorrectedSoftLabels", "TeacherFree"]

CONFIDENCES = {"entropy": frozenset({"teacher"}), "label": frozenset({"teacher", "labels"})}


@dataclass(eq=False, kw_only=True)
class ConfidentSoftLabels(Softened):
    """`SoftLabels` in which each row counts as much as the teacher is sure of it, at temperature 1.

    The mean is over all n rows, so a batch that the teacher is unsure of teaches less.

    Parameters
    ----------
    weight, temperature, scale_t2 : as in `Softened`.
    by : "entropy" for 1 - H(q)/log c, which is 1 for a one-hot q and 0 for a uniform one; "label" for the teacher's
        probability of the true class, and its largest one in rows without a label.
    """

    by: str = "entropy"

    formula = "T²·1/n·Σ_rows w·KL(q ‖ p),  w = 1 - H(softmax(z_t)) / log c, or softmax(z_t)_y"
    source = "after Kwon et al. 2020 and Zhang, Chen and Wang 2022, who weight several teachers by entropy and by label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("by", " or ".join(map(repr, CONFIDENCES)), self.by in CONFIDENCES)
        self.needs = CONFIDENCES[self.by]

    def value(self, batch: Batch) -> Any:
        confidence = F.teacher_confidence(
            batch.teacher_logits, batch.target if self.by == "label" else None, ignore_index=IGNORED
        )
        rows = F.distillation_loss(
            batch.student_logits,
            batch.teacher_logits,
            None,
            temperature=self.temperature,
            hard_weight=0.0,
            soft_weight=1.0,
            reduction="none",
            scale_t2=self.scale_t2,
        )
        return (rows * constant(confidence)).mean()


@dataclass(eq=False, kw_only=True)
class CorrectedSoftLabels(Softened):
    """`SoftLabels` of a teacher whose largest logit is exchanged with the label's where the two differ.

    So the teacher never contradicts a label. Rows without a label keep the teacher's logits as they are.
    """

    formula = "T²·KL(softmax(z'_t / T) ‖ softmax(z_s / T)),  z'_t = z_t with z_t,y and max z_t exchanged"
    source = "Wen, Lai and Qian 2021, the probability shift"
    needs = frozenset({"teacher", "labels"})

    def value(self, batch: Batch) -> Any:
        return F.distillation_loss(
            batch.student_logits,
            F.corrected_logits(batch.teacher_logits, batch.target, ignore_index=IGNORED),
            None,
            temperature=self.temperature,
            hard_weight=0.0,
            soft_weight=1.0,
            scale_t2=self.scale_t2,
        )


@dataclass(eq=False, kw_only=True)
class TeacherFree(Term):
    """Soft labels of a teacher made up by hand: the same for every row of a class, softened by a temperature.

    The virtual teacher gives the true class the probability `correct` and shares the rest equally; rows without a
    label are left out. The published code differs in three ways: it takes the softmax of these probabilities (not of
    their logarithms) over T, keeps the student at temperature 1, and divides by the number of classes, too.

    Parameters
    ----------
    weight : of the term.
    correct : in (0, 1] and at least 1/c; the paper takes 0.9 or more.
    temperature : T > 0; the paper takes 20 or more. It has no schedule.
    scale_t2 : multiply by T².
    """

    correct: float = 0.9
    temperature: float = 20.0
    scale_t2: bool = True

    formula = "T²·KL(q ‖ softmax(z_s / T)),  q ∝ u^(1/T),  u_y = correct, u_i = (1 - correct) / (c - 1)"
    source = "Yuan et al. 2020, Tf-KD_reg"
    needs = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("correct", "in (0, 1]", 0 < self.correct <= 1)
        self.check("temperature", "a finite number above 0", 0 < self.temperature < math.inf)

    def coefficient(self) -> float:
        return float(self.weight) * (float(self.temperature) ** 2 if self.scale_t2 else 1.0)

    def value(self, batch: Batch) -> Any:
        classes = batch.student_logits.shape[1]
        one, others = self.virtual_teacher(classes)
        softened = batch.student_logits * (1 / self.temperature)
        # The virtual teacher's q is the one-hot label smoothed by c·others.
        smoothing = min(1.0, classes * others)
        known = F.cross_entropy(softened, batch.target, ignore_index=IGNORED, label_smoothing=smoothing)
        # The same of a student that knows nothing is log c, or 0 where no row has a label; H(q) is a share of it.
        zeros = constant(note_constant(here.xp.zeros(batch.student_logits.shape, batch.student_logits.dtype)))
        nothing = F.cross_entropy(zeros, batch.target, ignore_index=IGNORED)
        divergence = known - nothing * (_entropy(one, others, classes) / (math.log(classes) or 1.0))
        return divergence * float(self.temperature) ** 2 if self.scale_t2 else divergence

    def virtual_teacher(self, classes: int) -> tuple[float, float]:
        """Its softened probabilities of the true class and of each other one."""
        if self.correct * classes < 1:
            expected = f"at least 1/{classes}, the share of one class of {classes}"
            raise ArgumentError(self.name, "correct", expected=expected, got=repr(self.correct))
        if classes == 1:
            return 1.0, 0.0
        ratio = float((1 - self.correct) / (classes - 1) / self.correct) ** (1 / self.temperature)
        one = 1 / (1 + (classes - 1) * ratio)
        return one, ratio * one


def _entropy(one: float, others: float, classes: int) -> float:
    """-Σ q·log q of one class with one probability and all others with another."""
    return -sum(count * q * math.log(q) for count, q in ((1, one), (classes - 1, others)) if q > 0)
