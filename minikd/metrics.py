"""What is measured of a classifier: how often and how surely it is right, and how close it is to its teacher."""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, ShapeError
from minikd.kernels.arrays import to_host

__all__ = ["accuracy", "agreement", "expected_calibration_error", "kl_to_teacher", "negative_log_likelihood"]


def _scores(where: str, logits: Any, rows: int | None = None) -> np.ndarray:
    scores = np.asarray(to_host(logits), np.float64)
    if scores.ndim != 2 or 0 in scores.shape or (rows is not None and len(scores) != rows):
        expected = "of shape (n, c)" if rows is None else f"of shape ({rows}, c)"
        raise ShapeError(where, "logits", expected=expected, got=f"shape {scores.shape}")
    return scores


def accuracy(logits: Any, target: Any) -> float:
    """The share of rows whose largest logit (n, c) is that of the class id in target (n,); the first wins a tie."""
    target = np.asarray(to_host(target))
    return float((_scores("accuracy", logits, len(target)).argmax(axis=1) == target).mean())


def negative_log_likelihood(logits: Any, target: Any) -> float:
    """The mean of -log softmax(logits)[target] in nats; the cross-entropy of hard labels, from logits (n, c)."""
    scores = _scores("negative_log_likelihood", logits, len(np.asarray(target)))
    log_p = F.of_host(F.log_softmax, scores)
    return float(-log_p[np.arange(len(log_p)), np.asarray(target)].mean())


def expected_calibration_error(logits: Any, target: Any, bins: int = 15) -> float:
    """Σ_b (n_b / n)·|accuracy_b - confidence_b| over equally wide bins of the largest probability; 0 is perfect.

    NaN where a row of logits is not finite.

    Parameters
    ----------
    logits : (n, c).  target : (n,) class ids.  bins : 15, as in the paper.

    Source: Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks", eq. 3.
    """
    if bins < 1:
        raise ArgumentError("expected_calibration_error", "bins", expected="at least 1", got=repr(bins))
    target = np.asarray(to_host(target))
    probabilities = F.of_host(F.softmax, _scores("expected_calibration_error", logits, len(target)))
    confidence = probabilities.max(axis=1)
    if np.isnan(confidence).any():
        return float("nan")
    right = probabilities.argmax(axis=1) == target
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(target))


def agreement(student_logits: Any, teacher_logits: Any) -> float:
    """The share of rows (n, c) on which both would name the same class, right or wrong."""
    teacher = _scores("agreement", teacher_logits)
    student = _scores("agreement", student_logits, len(teacher))
    return float((student.argmax(axis=1) == teacher.argmax(axis=1)).mean())


def kl_to_teacher(student_logits: Any, teacher_logits: Any) -> float:
    """The mean of KL(softmax(teacher) ‖ softmax(student)) at temperature 1, in nats, from logits (n, c)."""
    teacher = _scores("kl_to_teacher", teacher_logits)
    student = _scores("kl_to_teacher", student_logits, len(teacher))
    log_p, log_q = (F.of_host(F.log_softmax, z) for z in (student, teacher))
    return float(F.of_host(F.kl_div, log_p, log_q, log_target=True))
