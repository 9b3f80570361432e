"""Kernels of which each makes one mistake that somebody makes, and what the kit has to say of it.

The right ones, at the end, differ from them by that mistake only and are NumPy as most people write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# --- what they are made of ---


def log_softmax(z: Any, t: float = 1.0) -> Any:
    z = z / z.dtype.type(t)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def soft_term(student: Any, teacher: Any, t: float) -> tuple[Any, Any]:
    """KL(q ‖ p) of each row, and p - q."""
    log_p, log_q = log_softmax(student, t), log_softmax(teacher, t)
    p, q = np.exp(log_p), np.exp(log_q)
    terms = np.where(q == 0, q + p * 0, q * (log_q - log_p))
    return np.maximum(terms.sum(axis=1), 0), p - q


def hard_term(student: Any, target: Any) -> tuple[Any, Any]:
    """Mean of -log p_y over the rows with a label, and its gradient."""
    log_p = log_softmax(student)
    labelled = target != -100
    rows, y = np.arange(len(target)), np.where(labelled, target, 0)
    count = max(int(labelled.sum()), 1)
    gradient = np.exp(log_p)
    gradient[rows, y] -= 1
    loss = np.where(labelled, np.where(np.isnan(log_p).any(axis=1), np.nan, -log_p[rows, y]), 0)
    return loss.sum() / count, np.where(labelled[:, None], gradient, 0) / log_p.dtype.type(count)


def distillation_loss(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    real, n = student.dtype.type, len(student)
    loss, gradient = real(0), np.zeros_like(student)
    if soft:
        kl, difference = soft_term(student, teacher, t)
        loss, gradient = real(soft * t * t) * kl.sum() / n, real(soft * t / n) * difference
    if target is not None and hard:
        value, slope = hard_term(student, target)
        loss, gradient = loss + real(hard) * value, gradient + real(hard) * slope
    return loss, gradient


def kl_div(log_p: Any, q: Any) -> Any:
    with np.errstate(divide="ignore"):
        terms = np.where(q == 0, 0, q * (np.log(q) - log_p))
    return terms.sum() / len(q), -q / q.dtype.type(len(q))


def softmax(x: Any, t: float) -> Any:
    return np.exp(log_softmax(x, t))


# --- one mistake each ---


def mean_over_all_elements(log_p: Any, q: Any) -> Any:
    loss, gradient = kl_div(log_p, q)
    return loss / q.shape[1], gradient / q.dtype.type(q.shape[1])


def without_t_squared(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    return distillation_loss(student, teacher, target, t, hard, soft / t**2)


def teacher_and_student_exchanged(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    loss, gradient = distillation_loss(student, teacher, target, t, hard, 0.0)
    swapped, slope = distillation_loss(teacher, student, None, t, 0.0, soft)
    return loss + swapped, gradient + slope


def logarithm_of_softmax(x: Any, t: float) -> Any:
    return np.log(softmax(x, t))


def zero_times_infinity(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    loss, gradient = distillation_loss(student, teacher, target, t, hard, soft)
    log_p, log_q = log_softmax(student, t), log_softmax(teacher, t)
    q = np.exp(log_q)
    terms = q * (log_q - log_p)
    return loss + 0 * terms.sum(), gradient


def maximum_of_the_whole_array(x: Any, t: float) -> Any:
    e = np.exp((x - x.max()) / x.dtype.type(t))
    return e / e.sum(axis=1, keepdims=True)


def no_maximum_at_all(x: Any, t: float) -> Any:
    e = np.exp(x / x.dtype.type(t))
    return e / e.sum(axis=1, keepdims=True)


def softened_hard_term(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    loss, gradient = distillation_loss(student, teacher, None, t, hard, soft)
    if target is not None:
        value, slope = hard_term(student / student.dtype.type(t), target)
        loss, gradient = loss + hard * value, gradient + student.dtype.type(hard / t) * slope
    return loss, gradient


def shifts_its_input_in_place(x: Any, t: float) -> Any:
    if x.flags.writeable:
        x -= x.max(axis=1, keepdims=True)
    return softmax(x, t)


def adds_to_what_is_there(y: Any, x: Any, t: float) -> None:
    y[np.isnan(y)] = 0
    y += softmax(x, t)


def leaves_out_the_last_class(y: Any, x: Any, t: float) -> None:
    y[:, : x.shape[1] - 1] = softmax(x, t)[:, :-1]


def writes_one_too_many(y: Any, x: Any, t: float) -> None:
    y[...] = softmax(x, t)
    np.lib.stride_tricks.as_strided(y, (y.size + 1,), y.strides[-1:])[-1] = 0


_KEPT: dict[Any, Any] = {}


def gives_the_same_array_each_time(x: Any, t: float) -> Any:
    y = _KEPT.setdefault((x.shape, x.dtype), np.empty(x.shape, x.dtype))
    y[...] = softmax(x, t)
    return y


def reads_memory_in_its_own_order(x: Any, t: float) -> Any:
    return softmax(x.ravel(order="K").reshape(x.shape), t)


def needs_writable_inputs(x: Any, t: float) -> Any:
    x.flags.writeable = True
    return softmax(x, t)


def always_gives_doubles(x: Any, t: float) -> Any:
    return softmax(x.astype(np.float64), t)


_CALLS = [0]


def depends_on_the_call(x: Any, t: float) -> Any:
    _CALLS[0] += 1
    return softmax(x, t) * (1 + (_CALLS[0] % 3) * np.finfo(x.dtype).eps)


def counts_rows_without_a_label(logits: Any, target: Any) -> Any:
    loss, gradient = hard_term(logits, target)
    share = (target != -100).sum() / len(target)
    return loss * share, gradient * logits.dtype.type(share)


def gradient_of_the_sum(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    loss, gradient = distillation_loss(student, teacher, target, t, hard, soft)
    return loss, gradient * student.dtype.type(len(student))


def gelu_by_tanh(u: Any) -> Any:
    return u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def adam_without_correction(g: Any, lr: float, step: int, w: Any, m: Any, v: Any) -> Any:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w - lr * m / (np.sqrt(v) + 1e-8), m, v


def negative_label_from_the_end(logits: Any, target: Any) -> Any:
    return hard_term(logits, target)


class Buggy(NamedTuple):
    """A kernel, its contract, and the words that the report must hold."""

    op: str
    function: Callable[..., Any]
    says: tuple[str, ...]
    options: tuple[str, ...] = ()


BUGGY = (
    Buggy("kl_div", mean_over_all_elements, ("divided by all elements (mean), not by the rows (batchmean)",)),
    Buggy("distillation_loss", without_t_squared, ("the factor T² is missing",)),
    Buggy("distillation_loss", teacher_and_student_exchanged, ("teacher and student are exchanged",)),
    Buggy("log_softmax", logarithm_of_softmax, ("a probability that underflowed", "scores that lie far apart")),
    Buggy("distillation_loss", zero_times_infinity, ("a class that both rule out (-inf)", "loss is nan")),
    Buggy("softmax", maximum_of_the_whole_array, ("the maximum of the whole array", "one row far above the others")),
    Buggy("softmax", no_maximum_at_all, ("no maximum is taken off before exp",)),
    Buggy("distillation_loss", softened_hard_term, ("the hard term is softened by the temperature too",)),
    Buggy("softmax", shifts_its_input_in_place, ("untouched inputs", "x is written to")),
    Buggy("softmax", adds_to_what_is_there, ("full overwrite", "depends on what its array held"), ("writes",)),
    Buggy("softmax", leaves_out_the_last_class, ("is nan and should be",), ("writes",)),
    Buggy("softmax", writes_one_too_many, ("memory beside y is written",), ("writes",)),
    Buggy("softmax", gives_the_same_array_each_time, ("of an earlier call is changed by a later one",)),
    Buggy("softmax", reads_memory_in_its_own_order, ("strides", "inputs column by column")),
    Buggy("softmax", needs_writable_inputs, ("read-only inputs", "ValueError is raised")),
    Buggy("softmax", always_gives_doubles, ("y is of float64 where the inputs are of float32",)),
    Buggy("softmax", depends_on_the_call, ("y differs from call to call",)),
    Buggy("cross_entropy", counts_rows_without_a_label, ("a row that is ignored", "counted in the mean")),
    Buggy("distillation_loss", gradient_of_the_sum, ("gradient", "not divided by their number")),
    Buggy("gelu", gelu_by_tanh, ("the approximation by tanh is computed",)),
    Buggy("adam_step", adam_without_correction, ("not corrected for their start at 0",)),
    Buggy("cross_entropy", negative_label_from_the_end, ("label -1 of 3 classes",), ("refusals",)),
)

RIGHT = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "kl_div": kl_div,
    "cross_entropy": hard_term,
    "distillation_loss": distillation_loss,
}
