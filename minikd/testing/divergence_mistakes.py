"""What usual mistakes with the divergences would give: mixed, decoupled and standardised ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minikd.ops.rows import softened
from minikd.testing.contract import Attributes, Inputs, Mistake, expected
from minikd.testing.mistakes import Give, changed, exchanged_values, reduced, set_to, soft_term

SIDES = ("student_logits", "teacher_logits")


class _Pair(NamedTuple):
    """Scores of student and teacher in float64, T, and what loss and gradient are multiplied by."""

    student: Any
    teacher: Any
    t: float
    of_loss: float
    of_gradient: float


def _pair(inputs: Inputs, attrs: Attributes) -> _Pair:
    student, teacher = (np.asarray(inputs[name], np.float64) for name in SIDES)
    t = float(inputs["temperature"])
    return _Pair(student, teacher, t, *((t * t, t) if attrs.get("scale_t2", True) else (1.0, 1 / t)))


def _terms(q: Any, log_q: Any, log_p: Any) -> Any:
    """q·(log q - log p), where q = 0 gives 0."""
    with np.errstate(all="ignore"):
        return np.where(q == 0, 0.0, q * (log_q - log_p))


# --- two softened rows ---

FORWARD = Mistake("the forward KL is taken: KL(teacher ‖ student)", soft_term)


def _mixed_by(share: Callable[[float], float]) -> Give:
    """Jensen-Shannon with this share of the teacher in the mixture, and the right weights of its two parts."""

    def give(inputs: Inputs, attrs: Attributes) -> Any:
        pair, beta = _pair(inputs, attrs), float(inputs["beta"])
        (p, log_p), (q, log_q) = (softened(np, z, 1 / pair.t) for z in pair[:2])
        own = 1 - share(beta)
        m = (1 - own) * q + own * p
        weight = 1 / (beta * (1 - beta)) if attrs.get("continuous") else 1.0
        with np.errstate(all="ignore"):
            log_m = np.log(m)
            loss = beta * _terms(q, log_q, log_m) + (1 - beta) * _terms(p, log_p, log_m)
            slope = (1 - beta) * (log_p - log_m) - own * (beta * q + (1 - beta) * p) / m
        slope = np.where(p == 0, 0.0, slope)
        gradient = p * (slope - (p * slope).sum(axis=1, keepdims=True))
        of_loss, of_gradient = weight * pair.of_loss, weight * pair.of_gradient
        return reduced(of_loss * loss.sum(axis=1), of_gradient * gradient, attrs, len(p))

    return give


MIXED = (
    Mistake("the mixture has 1 - beta of the teacher", _mixed_by(lambda beta: 1 - beta)),
    Mistake("the mixture is half and half, whatever beta is", _mixed_by(lambda beta: 0.5)),
    Mistake(
        "beta and 1 - beta are exchanged throughout",
        lambda inputs, attrs: expected("jensen_shannon", {**inputs, "beta": 1 - inputs["beta"]}, attrs),
    ),
)
SKEWED = (
    Mistake(
        "alpha and 1 - alpha are exchanged",
        lambda inputs, attrs: expected("skewed_kl", {**inputs, "alpha": 1 - inputs["alpha"]}, attrs),
    ),
    Mistake(
        "the other direction is computed (reverse)",
        lambda inputs, attrs: expected("skewed_kl", inputs, {**attrs, "reverse": not attrs.get("reverse", False)}),
    ),
    FORWARD,
)

# --- decoupled by the target ---

Softened = Callable[[Any, Any, float], tuple[Any, Any]]


def _all_classes(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
    return softened(np, z, 1 / t)


def _pushed_down(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
    return softened(np, z / t - 1000.0 * hot, 1.0)


def _others_by(soften: Softened, with_target: bool = True) -> Give:
    """Decoupled distillation with this softmax of the other classes; perhaps without the target's term of its KL."""

    def give(inputs: Inputs, attrs: Attributes) -> Any:
        pair, target = _pair(inputs, attrs), np.asarray(inputs["target"])
        right = expected("decoupled_kd", {**inputs, "beta": 0.0}, attrs)
        labelled = (target != attrs.get("ignore_index", -100))[:, None]
        hot = np.arange(pair.student.shape[1]) == np.where(labelled, target[:, None], 0)
        (p, log_p), (q, log_q) = (soften(z, hot, pair.t) for z in pair[:2])
        kept = with_target | ~hot
        loss = np.where(labelled & kept, _terms(q, log_q, log_p), 0.0).sum(axis=1)
        q = np.where(kept, q, 0.0)
        gradient = np.where(labelled, p * q.sum(axis=1, keepdims=True) - q, 0.0)
        beta = float(inputs["beta"])
        others = reduced(beta * pair.of_loss * loss, beta * pair.of_gradient * gradient, attrs, int(labelled.sum()))
        return [a + b for a, b in zip(right, others, strict=True)]

    return give


DECOUPLED = (
    Mistake("the target stays in the softmax of the other classes", _others_by(_all_classes)),
    Mistake("the other classes' probabilities are not divided by their sum", _others_by(_all_classes, False)),
    Mistake("the target is pushed down by 1000 in place of being left out", _others_by(_pushed_down)),
    Mistake("alpha and beta are exchanged", changed("decoupled_kd", exchanged_values("alpha", "beta"))),
    Mistake("the term of the target is missing", changed("decoupled_kd", set_to(alpha=0.0))),
    Mistake("the term of the other classes is missing", changed("decoupled_kd", set_to(beta=0.0))),
    Mistake("both terms are weighted alike: it is the plain KL", soft_term),
)

# --- standardised ---


def _scores(z: Any, eps: float, less: int) -> tuple[Any, Any, Any]:
    """(z - mean)/(σ + eps) with σ² = Σ (z - mean)²/(c - less), σ + eps and σ."""
    centred = z - z.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred * centred).sum(axis=1, keepdims=True) / max(z.shape[1] - less, 1))
    return centred / (deviation + eps), deviation + eps, deviation


def _standardised_by(less: int = 1, teacher_too: bool = True, through_deviation: bool = True) -> Give:
    """The standardised KL with c - less in the deviation, of both sides or of the student alone."""

    def give(inputs: Inputs, attrs: Attributes) -> Any:
        pair, eps = _pair(inputs, attrs), attrs.get("eps", 1e-7)
        with np.errstate(all="ignore"):
            z, width, deviation = _scores(pair.student, eps, less)
            z_t = _scores(pair.teacher, eps, less)[0] if teacher_too else pair.teacher
            (p, log_p), (q, log_q) = (softened(np, x, 1 / pair.t) for x in (z, z_t))
            dz = p - q
            if through_deviation:
                along = (dz * z).sum(axis=1, keepdims=True) * width / (max(z.shape[1] - less, 1) * deviation)
                dz = dz - z * along
            rows, gradient = pair.of_loss * _terms(q, log_q, log_p).sum(axis=1), pair.of_gradient * dz / width
        return reduced(rows, gradient, attrs, len(z))

    return give


STANDARDISED = (
    Mistake("the deviation is that of a population: divided by c, not by c - 1", _standardised_by(less=0)),
    Mistake("eps is missing beside the deviation", changed("standardised_kl", set_to(eps=0.0))),
    Mistake("the teacher is not standardised", _standardised_by(teacher_too=False)),
    Mistake("nothing is standardised: it is the plain KL", soft_term),
    Mistake("the gradient does not flow through the deviation", _standardised_by(through_deviation=False)),
)
