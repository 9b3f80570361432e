"""Terms that measure how far the student's softened probabilities p are from the teacher's q by other divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minikd import functional as F
from minikd.errors import ArgumentError
from minikd.objectives.labels import Softened, Tempered
from minikd.objectives.objective import IGNORED, Batch, constant

__all__ = ["DecoupledKD", "JensenShannon", "ReverseKL", "SkewedKL", "StandardisedLabels", "TotalVariation"]


@dataclass(eq=False, kw_only=True)
class ReverseKL(Softened):
    """T²·KL(p ‖ q), which a student lowers by leaving out what it cannot match, where `SoftLabels` spreads over it.

    Infinite where the teacher rules out a class (-inf) and the student does not.
    """

    temperature: float = 1.0

    formula = "T²·KL(softmax(z_s / T) ‖ softmax(z_t / T))"
    source = "Gu et al. 2024, sec. 2.1 (MiniLLM)"

    def value(self, batch: Batch) -> Any:
        return F.reverse_kl(
            batch.student_logits, batch.teacher_logits, temperature=self.temperature, scale_t2=self.scale_t2
        )


@dataclass(eq=False, kw_only=True)
class JensenShannon(Softened):
    """The divergences of teacher and student from their mixture m = β·q + (1 - β)·p; at most log 2 each at β = 1/2.

    Parameters
    ----------
    weight, temperature, scale_t2 : as in `Softened`.
    beta : β, the teacher's share of m.
    form : "paper" is β·KL(q ‖ m) + (1 - β)·KL(p ‖ m), which vanishes at β = 0 and 1, so that these are refused;
        "continuous" divides it by β·(1 - β), and is KL(q ‖ p) at β = 0 and KL(p ‖ q) at β = 1.
    """

    beta: float = 0.5
    form: str = "paper"
    temperature: float = 1.0

    formula = "T²·(β·KL(q ‖ m) + (1 - β)·KL(p ‖ m)),  m = β·q + (1 - β)·p"
    source = "Agarwal et al. 2024, eq. 1 (GKD)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("form", "'paper' or 'continuous'", self.form in ("paper", "continuous"))
        self.check("beta", "between 0 and 1", 0 <= self.beta <= 1)
        if self.form == "paper":
            fix = "At 0 and 1 this form vanishes: use SoftLabels, ReverseKL, or form='continuous', which tends to them."
            self.check("beta", "above 0 and below 1", 0 < self.beta < 1, fix)

    def value(self, batch: Batch) -> Any:
        return F.jensen_shannon(
            batch.student_logits,
            batch.teacher_logits,
            beta=float(self.beta),
            form=self.form,
            temperature=self.temperature,
            scale_t2=self.scale_t2,
        )


@dataclass(eq=False, kw_only=True)
class SkewedKL(Softened):
    """The divergence from a mixture with a share α of the teacher (or, reversed, of the student), which is finite.

    Parameters
    ----------
    weight, temperature, scale_t2 : as in `Softened`.
    alpha : α in [0, 1); 0 is the plain divergence.
    reverse : measure the student from the mixture, not the teacher.
    """

    alpha: float = 0.1
    reverse: bool = False
    temperature: float = 1.0

    formula = "T²·KL(q ‖ α·q + (1 - α)·p), or reversed T²·KL(p ‖ α·p + (1 - α)·q)"
    source = "Ko et al. 2024 (DistiLLM), skew KL and skew reverse KL"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("alpha", "in [0, 1)", 0 <= self.alpha < 1, "At 1 the mixture is what is measured, and all is 0.")

    def value(self, batch: Batch) -> Any:
        return F.skewed_kl(
            batch.student_logits,
            batch.teacher_logits,
            alpha=float(self.alpha),
            reverse=bool(self.reverse),
            temperature=self.temperature,
            scale_t2=self.scale_t2,
        )


@dataclass(eq=False, kw_only=True)
class TotalVariation(Tempered):
    """Half the sum of |p - q|, between 0 and 1: the most by which the two differ in the probability of anything.

    There is no factor T²: the size of its gradient falls as 1/T only.
    """

    temperature: float = 1.0

    formula = "1/2·Σ |softmax(z_s / T) - softmax(z_t / T)|"
    source = "Wen et al. 2023 (f-distill), TVD"

    def value(self, batch: Batch) -> Any:
        p = F.softmax(batch.student_logits, temperature=self.temperature)
        q = constant(F.softmax(batch.teacher_logits, temperature=self.temperature))
        return (p - q).abs().sum(axis=1).mean() * 0.5


@dataclass(eq=False, kw_only=True)
class DecoupledKD(Softened):
    """`SoftLabels` in two parts with weights of their own: the true class against the rest, and the rest in itself.

    In plain soft labels the second part counts as much as the teacher doubts, so little of it is left where the
    teacher is sure. Rows without a label have no true class and are left out.

    Parameters
    ----------
    weight, temperature, scale_t2 : as in `Softened`.
    alpha : α, weight of the true class against the rest (TCKD).
    beta : β, weight of the divergence among the other classes (NCKD).
    """

    alpha: float = 1.0
    beta: float = 8.0

    formula = "T²·(α·KL((q_y, 1 - q_y) ‖ (p_y, 1 - p_y)) + β·KL(q̂ ‖ p̂)),  q̂ and p̂ without class y"
    source = "Zhao et al. 2022, eq. 7"
    needs = frozenset({"teacher", "labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            self.check(name, "a finite number from 0", 0 <= getattr(self, name) < math.inf)

    def value(self, batch: Batch) -> Any:
        classes = batch.student_logits.shape[1]
        if classes < 3:
            fix = "With two classes its second part is 0 and its first is SoftLabels: use that."
            expected = "used with 3 classes or more"
            raise ArgumentError(self.name, "the term", expected=expected, got=f"{classes} classes", fix=fix)
        return F.decoupled_kd(
            batch.student_logits,
            batch.teacher_logits,
            batch.target,
            alpha=float(self.alpha),
            beta=float(self.beta),
            temperature=self.temperature,
            scale_t2=self.scale_t2,
            ignore_index=IGNORED,
        )


@dataclass(eq=False, kw_only=True)
class StandardisedLabels(Softened):
    """`SoftLabels` after each row of logits was brought to mean 0 and deviation 1, the student's and the teacher's.

    So a student need not reach the size of the teacher's logits, only their pattern. The deviation is that of a sample
    (divided by c - 1), as in the published code.
    """

    temperature: float = 2.0

    formula = "T²·KL(softmax(Z(z_t) / T) ‖ softmax(Z(z_s) / T)),  Z(z) = (z - mean z) / (deviation z + 1e-7)"
    source = "Sun et al. 2024, eq. 9 and algorithm 1"

    def value(self, batch: Batch) -> Any:
        return F.standardised_kl(
            batch.student_logits, batch.teacher_logits, temperature=self.temperature, scale_t2=self.scale_t2
        )
