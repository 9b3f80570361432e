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


def kl(log_q: Any, log_p: Any) -> Any:
    """KL(q ‖ p) of each row, where a class with q = 0 adds nothing."""
    q = np.exp(log_q)
    return np.maximum(np.where(q == 0, q, q * (log_q - log_p)).sum(axis=1), 0)


def in_doubles(*rows: Any) -> tuple[Any, ...]:
    return tuple(x.astype(np.float64) for x in rows)


def reverse_kl(student: Any, teacher: Any, t: float) -> Any:
    log_p, log_q = (log_softmax(z, t) for z in in_doubles(student, teacher))
    rows, p = kl(log_p, log_q), np.exp(log_p)
    slope = np.where(p == 0, 0 * log_q.max(axis=1, keepdims=True), log_p - log_q)
    gradient = p * (slope - np.where(p == 0, 0, p * slope).sum(axis=1, keepdims=True))
    return t * t * rows.mean(), (t / len(p) * gradient).astype(student.dtype)


def jensen_shannon(student: Any, teacher: Any, t: float, beta: float, share: float | None = None) -> Any:
    share = beta if share is None else share
    log_p, log_q = (log_softmax(z, t) for z in in_doubles(student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    m = share * q + (1 - share) * p
    log_m = np.log(m)
    rows = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    slope = (1 - beta) * (log_p - log_m) - (1 - share) * (beta * q + (1 - beta) * p) / m
    slope = np.where(p == 0, 0, slope)
    gradient = p * (slope - (p * slope).sum(axis=1, keepdims=True))
    return t * t * rows.mean(), (t / len(p) * gradient).astype(student.dtype)


def apart(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
    """Logarithms of the target's probability and of its complement, and of softmax among the other classes."""
    others = np.where(hot, -np.inf, z)
    log_p = log_softmax(others, t)
    logit = (z[hot] - others.max(axis=1)) / t + log_p.max(axis=1)
    return -np.logaddexp(0, np.stack([-logit, logit], axis=1)), log_p


def decoupled_kd(
    student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float, taken_apart: Any = apart
) -> Any:
    real, labelled = student.dtype, target != -100
    student, teacher = in_doubles(student, teacher)
    hot = np.arange(student.shape[1]) == np.where(labelled, target, 0)[:, None]
    (two_p, log_p), (two_q, log_q) = taken_apart(student, hot, t), taken_apart(teacher, hot, t)
    p, rows, gradient = np.exp(log_p), np.zeros(len(student)), np.zeros_like(student)
    if alpha:
        move = (np.exp(two_p) - np.exp(two_q))[:, :1]
        rows, gradient = rows + alpha * kl(two_q, two_p), alpha * np.where(hot, move, -move * p)
    if beta:
        rows, gradient = rows + beta * kl(log_q, log_p), gradient + beta * (p - np.exp(log_q))
    broken = np.isnan(log_softmax(student)).any(axis=1) | np.isnan(log_softmax(teacher)).any(axis=1)
    rows = np.where(labelled, np.where(broken, np.nan, rows), 0)
    gradient = np.where(labelled[:, None], np.where(broken[:, None], np.nan, gradient), 0)
    count = max(int(labelled.sum()), 1)
    return t * t * rows.sum() / count, (t / count * gradient).astype(real)


def standardised_kl(
    student: Any, teacher: Any, t: float, less: int = 1, eps: float = 1e-7, through_deviation: bool = True
) -> Any:
    def standardised(z: Any) -> tuple[Any, Any]:
        z = z - z.mean(axis=1, keepdims=True)
        deviation = np.sqrt((z * z).sum(axis=1, keepdims=True) / (z.shape[1] - less))
        return z / (deviation + eps), deviation

    real = student.dtype
    (z, deviation), (z_t, _) = (standardised(x) for x in in_doubles(student, teacher))
    rows, g = soft_term(z, z_t, t)
    along = (g * z).sum(axis=1, keepdims=True) * (deviation + eps) / (z.shape[1] - less)
    along = np.where(deviation == 0, 0, along / np.where(deviation == 0, 1, deviation)) * through_deviation
    gradient = (g - g.mean(axis=1, keepdims=True) - z * along) / (deviation + eps)
    return t * t * rows.mean(), (t / len(z) * gradient).astype(real)


ROWS = 4  # of a chunk


def linear_distillation_loss(
    hidden: Any, weight: Any, bias: Any, teacher: Any, target: Any, t: float, hard: float, soft: float
) -> Any:
    n, labelled = len(hidden), 0 if target is None else max(int((target != -100).sum()), 1)
    loss, rows, of_weight, of_bias = 0.0, np.empty_like(hidden), np.zeros_like(weight), np.zeros_like(bias)
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        h, y = hidden[part], None if target is None else target[part]
        own = hard * int((y != -100).sum()) / labelled if y is not None else 0.0
        value, g = distillation_loss(h @ weight.T + bias, teacher[part], y, t, own, soft * len(h) / n)
        loss, rows[part] = loss + value, g @ weight
        of_weight += g.T @ h
        of_bias += g.sum(axis=0)
    return loss, rows, of_weight, of_bias


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


def target_among_the_others(student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float) -> Any:
    def taken_apart(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
        return apart(z, hot, t)[0], log_softmax(z, t)

    loss, gradient = decoupled_kd(student, teacher, target, t, alpha, 0.0)
    others, slope = decoupled_kd(student, teacher, target, t, 0.0, beta, taken_apart)
    return loss + others, gradient + slope


def others_pushed_down(student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float) -> Any:
    def taken_apart(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
        return apart(z, hot, t)[0], log_softmax(z / t - 1000.0 * hot)

    return decoupled_kd(student, teacher, target, t, alpha, beta, taken_apart)


def alpha_and_beta_exchanged(student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float) -> Any:
    return decoupled_kd(student, teacher, target, t, beta, alpha)


def decoupled_without_t_squared(student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float) -> Any:
    return decoupled_kd(student, teacher, target, t, alpha / t**2, beta / t**2)


def decoupled_counts_all_rows(student: Any, teacher: Any, target: Any, t: float, alpha: float, beta: float) -> Any:
    loss, gradient = decoupled_kd(student, teacher, target, t, alpha, beta)
    share = (target != -100).sum() / len(target)
    return loss * share, gradient * student.dtype.type(share)


def deviation_of_a_population(student: Any, teacher: Any, t: float) -> Any:
    return standardised_kl(student, teacher, t, less=0)


def without_epsilon(student: Any, teacher: Any, t: float) -> Any:
    return standardised_kl(student, teacher, t, eps=0.0)


def deviation_is_a_constant(student: Any, teacher: Any, t: float) -> Any:
    return standardised_kl(student, teacher, t, through_deviation=False)


def mixture_of_the_other_weight(student: Any, teacher: Any, t: float, beta: float) -> Any:
    return jensen_shannon(student, teacher, t, beta, share=1 - beta)


def mixture_of_halves(student: Any, teacher: Any, t: float, beta: float) -> Any:
    return jensen_shannon(student, teacher, t, beta, share=0.5)


def forward_for_reverse(student: Any, teacher: Any, t: float) -> Any:
    return distillation_loss(student, teacher, None, t, 0.0, 1.0)


def reverse_for_forward(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
    loss, gradient = distillation_loss(student, teacher, target, t, hard, 0.0)
    value, slope = reverse_kl(student, teacher, t) if soft else (0.0, 0.0 * gradient)
    return loss + soft * value, gradient + student.dtype.type(soft) * slope


def leaves_out_the_last_chunk(hidden: Any, *rest: Any) -> Any:
    weight, bias, teacher, target, t, hard, soft = rest
    n, whole = len(hidden), len(hidden) // ROWS * ROWS
    labelled = [0, 1] if target is None else [(target[:k] != -100).sum() for k in (whole, n)]
    shares = hard * labelled[0] / max(labelled[1], 1), soft * whole / n
    y, rows = None if target is None else target[:whole], np.zeros_like(hidden)
    if not whole:
        return 0.0, rows, np.zeros_like(weight), np.zeros_like(bias)
    kept = linear_distillation_loss(hidden[:whole], weight, bias, teacher[:whole], y, t, *shares)
    rows[:whole] = kept[1]
    return kept[0], rows, *kept[2:]


def chunk_overwrites_the_weight_gradient(hidden: Any, *rest: Any) -> Any:
    weight, bias, teacher, target, t, hard, soft = rest
    loss, rows, _, of_bias = linear_distillation_loss(hidden, *rest)
    n, last = len(hidden), slice((len(hidden) - 1) // ROWS * ROWS, None)
    y, labelled = (None, 1) if target is None else (target[last], max((target != -100).sum(), 1))
    shares = 0.0 if y is None else hard * (y != -100).sum() / labelled, soft * len(hidden[last]) / n
    of_weight = linear_distillation_loss(hidden[last], weight, bias, teacher[last], y, t, *shares)[2]
    return loss, rows, of_weight, of_bias


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
    Buggy("decoupled_kd", target_among_the_others, ("the target stays in the softmax of the other classes",)),
    Buggy("decoupled_kd", others_pushed_down, ("the target is pushed down by 1000", "logits of ±1e30")),
    Buggy("decoupled_kd", alpha_and_beta_exchanged, ("alpha and beta are exchanged",)),
    Buggy("decoupled_kd", decoupled_without_t_squared, ("the factor T² is missing",)),
    Buggy("decoupled_kd", decoupled_counts_all_rows, ("a row without a label feels nothing", "counted in the mean")),
    Buggy("standardised_kl", deviation_of_a_population, ("the deviation is that of a population",)),
    Buggy("standardised_kl", without_epsilon, ("eps is missing", "standardised to 0, not to NaN")),
    Buggy("standardised_kl", deviation_is_a_constant, ("the gradient does not flow through the deviation",)),
    Buggy("jensen_shannon", mixture_of_the_other_weight, ("the mixture has 1 - beta of the teacher",)),
    Buggy("jensen_shannon", mixture_of_halves, ("the mixture is half and half",)),
    Buggy("reverse_kl", forward_for_reverse, ("the forward KL is taken",)),
    Buggy("distillation_loss", reverse_for_forward, ("the reverse KL is taken",)),
    Buggy("linear_distillation_loss", leaves_out_the_last_chunk, ("behind the last whole chunk are left out",)),
    Buggy("linear_distillation_loss", chunk_overwrites_the_weight_gradient, ("each chunk overwrites the gradients",)),
)

RIGHT = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "kl_div": kl_div,
    "cross_entropy": hard_term,
    "distillation_loss": distillation_loss,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "decoupled_kd": decoupled_kd,
    "standardised_kl": standardised_kl,
    "linear_distillation_loss": linear_distillation_loss,
}
