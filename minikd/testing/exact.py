"""Formulas in mpmath, for the operations whose reference is a series or polynomial made for float64.

They are written down as on paper, row by row, without any care for cancellation: whoever calls them works with more
digits than are asked for. So they are also a second opinion on what the reference does. Numbers are mpf, arrays are
NumPy arrays of them; -inf, NaN and ties follow the table of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpmath import mp

from minikd.ops.losses import LARGEST_TEMPERATURE

Row = list[Any]
Rows = list[Row]


def _array(rows: Any) -> Any:
    return np.array(rows, object)


# --- softmax ---


def log_softmax_row(z: Sequence[Any], t: Any) -> Row:
    """z/T - log Σ exp(z/T); all NaN where the row holds NaN or +inf, or nothing but -inf."""
    top = mp.nan if any(mp.isnan(x) for x in z) else max(z)
    if not mp.isfinite(top):
        return [mp.nan for _ in z]
    shifted = [(x - top) / t for x in z]
    total = mp.log(mp.fsum(mp.exp(x) for x in shifted))
    return [x - total for x in shifted]


def _both(z: Sequence[Any], t: Any) -> tuple[Row, Row]:
    """softmax(z/T) and its logarithm."""
    log_p = log_softmax_row(z, t)
    return [mp.exp(x) for x in log_p], log_p


def _softmax(x: Any, temperature: Any) -> list[Any]:
    return [_array([_both(row, temperature)[0] for row in x])]


def _log_softmax(x: Any, temperature: Any) -> list[Any]:
    return [_array([log_softmax_row(row, temperature) for row in x])]


def _softmax_vjp(dy: Any, x: Any, temperature: Any) -> list[Any]:
    rows = []
    for d, z in zip(dy, x, strict=True):
        p, _ = _both(z, temperature)
        inner = mp.fsum(a * b for a, b in zip(p, d, strict=True) if a != 0)
        rows.append([a if a == 0 else a * (b - inner) / temperature for a, b in zip(p, d, strict=True)])
    return [_array(rows)]


def _log_softmax_vjp(dy: Any, x: Any, temperature: Any) -> list[Any]:
    rows = []
    for d, z in zip(dy, x, strict=True):
        total = mp.fsum(d)
        rows.append([(b - a * total) / temperature for a, b in zip(_both(z, temperature)[0], d, strict=True)])
    return [_array(rows)]


# --- what the losses share ---


def _divergence(q: Row, log_q: Row, log_p: Row) -> Any:
    """Σ q·(log q - log p), where a term with q = 0 is 0."""
    return mp.fsum(a * (b - c) for a, b, c in zip(q, log_q, log_p, strict=True) if a != 0)


def _reduced(losses: Row, gradients: Rows, divisor: int, reduction: str) -> list[Any]:
    """The reduced loss, and the gradients scaled with it."""
    if reduction == "none":
        return [_array(losses), _array(gradients)]
    share = mp.mpf(1) if reduction == "sum" else (mp.mpf(1) / divisor if divisor else mp.mpf(0))
    return [
        _array(mp.fsum(losses) * share if share else mp.mpf(0)),
        _array([[g * share for g in r] for r in gradients]),
    ]


def _hot(label: int, c: int, smoothing: Any) -> Row:
    return [(1 - smoothing) * (k == label) + mp.mpf(smoothing) / c for k in range(c)]


def _cross_entropy_row(z: Any, y: Row) -> tuple[Any, Row]:
    p, log_p = _both(z, 1)
    total = mp.fsum(y)
    if any(mp.isnan(a) for a in p):
        return mp.nan, p
    loss = -mp.fsum(a * b for a, b in zip(y, log_p, strict=True) if a != 0)
    return loss, [a * total - b for a, b in zip(p, y, strict=True)]


def _zeros(c: int) -> Row:
    return [mp.mpf(0)] * c


def _cross_entropy(
    logits: Any, target: Any, weight: Any, reduction: str, ignore_index: int, label_smoothing: float
) -> list[Any]:
    c = logits.shape[1]
    weights = [mp.mpf(1)] * c if weight is None else list(weight)
    losses, gradients, divisor = [], [], mp.mpf(0)
    for z, label in zip(logits, target.tolist(), strict=True):
        loss, gradient = mp.mpf(0), _zeros(c)
        if label != ignore_index:
            y = [w * a for w, a in zip(weights, _hot(label, c, mp.mpf(label_smoothing)), strict=True)]
            loss, gradient = _cross_entropy_row(z, y)
            divisor += weights[label]
        losses.append(loss)
        gradients.append(gradient)
    return _reduced(losses, gradients, divisor, reduction)


def _soft_cross_entropy(logits: Any, target: Any, weight: Any, reduction: str, label_smoothing: float) -> list[Any]:
    n, c = logits.shape
    weights = [mp.mpf(1)] * c if weight is None else list(weight)
    e = mp.mpf(label_smoothing)
    targets = [[w * ((1 - e) * a + e / c) for w, a in zip(weights, y, strict=True)] for y in target]
    pairs = [_cross_entropy_row(z, y) for z, y in zip(logits, targets, strict=True)]
    return _reduced([loss for loss, _ in pairs], [g for _, g in pairs], n, reduction)


# --- distillation and the other divergences ---


def _bounded(temperature: Any) -> Any:
    return min(temperature, mp.mpf(LARGEST_TEMPERATURE))


def _distillation_loss(
    student_logits: Any,
    teacher_logits: Any,
    target: Any,
    temperature: Any,
    hard_weight: Any,
    soft_weight: Any,
    reduction: str,
    scale_t2: bool,
    log_target: bool,
    ignore_index: int,
    label_smoothing: float,
) -> list[Any]:
    (n, c), t = student_logits.shape, _bounded(temperature)
    labels = [ignore_index] * n if target is None else target.tolist()
    labelled = sum(label != ignore_index for label in labels)
    per_soft, per_hard = (mp.mpf(1), mp.mpf(1)) if reduction != "mean" else (mp.mpf(1) / n, mp.mpf(1) / (labelled or 1))
    losses, gradients = [], []
    for z, z_t, label in zip(student_logits, teacher_logits, labels, strict=True):
        loss, gradient = mp.mpf(0), _zeros(c)
        if soft_weight:
            (p, log_p), (q, log_q) = _both(z, t), _both(z_t, mp.mpf(1) if log_target else t)
            share = per_soft * soft_weight
            loss += share * (t * t if scale_t2 else 1) * _divergence(q, log_q, log_p)
            slope = share * (t if scale_t2 else 1 / t)
            gradient = [slope * (a - b) for a, b in zip(p, q, strict=True)]
        if hard_weight and label != ignore_index:
            hard, hard_gradient = _cross_entropy_row(z, _hot(label, c, mp.mpf(label_smoothing)))
            loss += per_hard * hard_weight * hard
            gradient = [a + per_hard * hard_weight * b for a, b in zip(gradient, hard_gradient, strict=True)]
        losses.append(loss)
        gradients.append(gradient)
    return [_array(losses if reduction == "none" else mp.fsum(losses)), _array(gradients)]


def _linear_distillation_loss(
    hidden: Any,
    weight: Any,
    bias: Any,
    teacher_logits: Any,
    teacher_hidden: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    target: Any,
    *scalars: Any,
    chunk_rows: int | None,
    **attrs: Any,
) -> list[Any]:
    student = hidden @ weight.T + (0 if bias is None else bias)
    teacher = teacher_logits
    if teacher is None:
        teacher = teacher_hidden @ teacher_weight.T + (0 if teacher_bias is None else teacher_bias)
    loss, g = _distillation_loss(student, teacher, target, *scalars, **attrs)
    return [loss, g @ weight, g.T @ hidden, g.sum(axis=0)]


def _through_softmax(p: Row, slope: Row, factor: Any) -> Row:
    """factor·p·(slope - Σ p·slope); a class with p = 0 adds nothing."""
    mean = mp.fsum(a * b for a, b in zip(p, slope, strict=True) if a != 0)
    return [a if a == 0 else factor * a * (b - mean) for a, b in zip(p, slope, strict=True)]


def _by_rows(
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    reduction: str,
    scale_t2: bool,
    row: Callable[[Row, Row, Row, Row], tuple[Any, Row]],
) -> list[Any]:
    """A divergence of softened rows: `row` gives its value of p, log p, q, log q, and its derivative by p."""
    t, losses, gradients = _bounded(temperature), [], []
    for z, z_t in zip(student_logits, teacher_logits, strict=True):
        (p, log_p), (q, log_q) = _both(z, t), _both(z_t, t)
        if any(mp.isnan(a + b) for a, b in zip(p, q, strict=True)):
            loss, gradient = mp.nan, [mp.nan for _ in p]
        else:
            loss, slope = row(p, log_p, q, log_q)
            gradient = _through_softmax(p, slope, t if scale_t2 else 1 / t)
            gradient = gradient if mp.isfinite(loss) or not any(map(mp.isnan, gradient)) else [mp.nan for _ in p]
        losses.append(loss * (t * t if scale_t2 else 1))
        gradients.append(gradient)
    return _reduced(losses, gradients, len(losses), reduction)


def _log(x: Any) -> Any:
    return mp.log(x) if x > 0 else mp.ninf


def _forward_kl(p: Row, log_p: Row, q: Row, log_q: Row) -> tuple[Any, Row]:
    return _divergence(q, log_q, log_p), [mp.mpf(0) if a == 0 else -b / a for a, b in zip(p, q, strict=True)]


def _reverse_kl_row(p: Row, log_p: Row, q: Row, log_q: Row) -> tuple[Any, Row]:
    slope = [mp.mpf(0) if x == 0 else a - b for x, a, b in zip(p, log_p, log_q, strict=True)]
    loss = _divergence(p, log_p, log_q)
    return loss, slope if mp.isfinite(loss) else [mp.nan for _ in p]


def _reverse_kl(s: Any, t: Any, temperature: Any, reduction: str, scale_t2: bool) -> list[Any]:
    return _by_rows(s, t, temperature, reduction, scale_t2, _reverse_kl_row)


def _jensen_shannon(
    s: Any, t: Any, temperature: Any, beta: Any, reduction: str, scale_t2: bool, continuous: bool
) -> list[Any]:
    def row(p: Row, log_p: Row, q: Row, log_q: Row) -> tuple[Any, Row]:
        if beta in (0, 1):  # only the continuous form has values there
            if continuous:
                return _reverse_kl_row(p, log_p, q, log_q) if beta else _forward_kl(p, log_p, q, log_q)
            return mp.mpf(0), _zeros(len(p))
        log_m = [_log(beta * b + (1 - beta) * a) for a, b in zip(p, q, strict=True)]
        scale = 1 / (beta * (1 - beta)) if continuous else 1
        loss = beta * _divergence(q, log_q, log_m) + (1 - beta) * _divergence(p, log_p, log_m)
        slope = [0 if x == 0 else scale * (1 - beta) * (a - m) for x, a, m in zip(p, log_p, log_m, strict=True)]
        return scale * loss, slope

    return _by_rows(s, t, temperature, reduction, scale_t2, row)


def _skewed_kl(
    s: Any, t: Any, temperature: Any, alpha: Any, reduction: str, scale_t2: bool, reverse: bool
) -> list[Any]:
    def row(p: Row, log_p: Row, q: Row, log_q: Row) -> tuple[Any, Row]:
        own, other = (alpha, 1 - alpha) if reverse else (1 - alpha, alpha)
        m = [own * a + other * b for a, b in zip(p, q, strict=True)]
        log_m = [_log(x) for x in m]
        ratio = [0 if x == 0 else (1 - alpha) * b / x for b, x in zip(q, m, strict=True)]
        if not reverse:
            return _divergence(q, log_q, log_m), [-x for x in ratio]
        slope = [0 if x == 0 else a - b + r for x, a, b, r in zip(p, log_p, log_m, ratio, strict=True)]
        loss = _divergence(p, log_p, log_m)
        return loss, slope if mp.isfinite(loss) else [mp.nan for _ in p]

    return _by_rows(s, t, temperature, reduction, scale_t2, row)


def _decoupled_kd(
    student_logits: Any,
    teacher_logits: Any,
    target: Any,
    temperature: Any,
    alpha: Any,
    beta: Any,
    reduction: str,
    scale_t2: bool,
    ignore_index: int,
) -> list[Any]:
    t, c, losses, gradients = _bounded(temperature), student_logits.shape[1], [], []
    scale, slope = (t * t, t) if scale_t2 else (mp.mpf(1), 1 / t)
    for z, z_t, label in zip(student_logits, teacher_logits, target.tolist(), strict=True):
        if label == ignore_index:
            losses.append(mp.mpf(0))
            gradients.append(_zeros(c))
            continue
        (p_2, log_p_2, p, log_p), (q_2, log_q_2, q, log_q) = (_apart(row, label, t) for row in (z, z_t))
        loss, gradient = mp.mpf(0), _zeros(c)
        move = alpha * (p_2[0] - q_2[0]) if alpha else mp.mpf(0)
        if alpha:
            loss += alpha * _divergence(q_2, log_q_2, log_p_2)
        if beta:
            loss += beta * _divergence(q, log_q, log_p)
            gradient = [beta * (a - b) for a, b in zip(p, q, strict=True)]
        gradient = [slope * (g - move * a) for g, a in zip(gradient, p, strict=True)]
        gradient[label] = slope * move
        losses.append(scale * loss)
        gradients.append([mp.nan for _ in p] if mp.isnan(loss) else gradient)
    labelled = sum(label != ignore_index for label in target.tolist())
    return _reduced(losses, gradients, labelled, reduction)


def _apart(z: Any, label: int, t: Any) -> tuple[Row, Row, Row, Row]:
    """The target against all others as a choice of two, and softmax among the others; each with its logarithm."""
    others = [mp.ninf if k == label else x for k, x in enumerate(z)]
    p, log_p = _both(others, t)
    total = mp.log(mp.fsum(mp.exp((x - max(others)) / t) for x in others)) + max(others) / t
    two, log_two = _both([z[label] / t, total], mp.mpf(1))
    return two, log_two, p, log_p


def _standardised_row(z: Any, eps: Any) -> tuple[Row, Any, Any]:
    mean = mp.fsum(z) / len(z)
    deviation = mp.sqrt(mp.fsum((x - mean) ** 2 for x in z) / max(len(z) - 1, 1))
    return [(x - mean) / (deviation + eps) for x in z], deviation + eps, deviation


def _standardised_kl(
    student_logits: Any, teacher_logits: Any, temperature: Any, reduction: str, scale_t2: bool, eps: float
) -> list[Any]:
    t, losses, gradients = _bounded(temperature), [], []
    for z, z_t in zip(student_logits, teacher_logits, strict=True):
        c = len(z)
        (own, width, deviation), other = _standardised_row(z, mp.mpf(eps)), _standardised_row(z_t, mp.mpf(eps))[0]
        (p, log_p), (q, log_q) = _both(own, t), _both(other, t)
        g = [(a - b) * (t if scale_t2 else 1 / t) for a, b in zip(p, q, strict=True)]
        mean, along = mp.fsum(g) / c, mp.fsum(a * b for a, b in zip(g, own, strict=True))
        along = along * width / ((c - 1) * deviation) if deviation else mp.mpf(0)
        gradients.append([(a - mean - b * along) / width for a, b in zip(g, own, strict=True)])
        losses.append(_divergence(q, log_q, log_p) * (t * t if scale_t2 else 1))
    return _reduced(losses, gradients, len(losses), reduction)


def _teacher_confidence(teacher_logits: Any, target: Any, temperature: Any, ignore_index: int) -> list[Any]:
    weights = []
    for k, z in enumerate(teacher_logits):
        q, log_q = _both(z, temperature)
        if target is not None:
            label = int(target[k])
            weights.append(q[label] if label != ignore_index else max(q, key=lambda x: mp.inf if mp.isnan(x) else x))
            continue
        entropy = -mp.fsum(a * b for a, b in zip(q, log_q, strict=True) if a != 0)
        share = 1 - entropy / (mp.log(len(z)) or 1)
        weights.append(share if mp.isnan(share) else max(share, mp.mpf(0)))
    return [_array(weights)]


# --- the first largest, where NaN counts as larger than all ---


def _first_largest(z: Any) -> int:
    values = list(z)
    return next((k for k, x in enumerate(values) if mp.isnan(x)), values.index(max(values)))


def _argmax(x: Any) -> list[Any]:
    return [np.array([_first_largest(row) for row in x], np.int64)]


def _correct_count(logits: Any, target: Any, ignore_index: int) -> list[Any]:
    (largest,) = _argmax(logits)
    return [np.array(((target != ignore_index) & (largest == target)).sum())]


def _corrected_logits(teacher_logits: Any, target: Any, ignore_index: int) -> list[Any]:
    corrected = teacher_logits.copy()
    for row, z, label in zip(corrected, teacher_logits, target.tolist(), strict=True):
        top = _first_largest(z)
        label = top if label == ignore_index else label
        row[top], row[label] = z[label], z[top]
    return [corrected]


# --- GELU ---


def _gelu_of(u: Any) -> Any:
    """u·Φ(u), and Φ(u) + u·φ(u), of each element."""
    return _each(lambda x: x * _cdf(x), u)


def _gelu_slope(u: Any) -> Any:
    return _each(lambda x: _cdf(x) + x * mp.npdf(x), u)


def _cdf(x: Any) -> Any:
    """Φ(x) = erfc(-x/√2)/2, which keeps its digits on the left."""
    return mp.erfc(-x / mp.sqrt(2)) / 2


def _each(function: Callable[[Any], Any], u: Any) -> Any:
    values = np.empty(u.size, object)
    values[:] = [function(x) for x in u.ravel()]
    return values.reshape(u.shape)


def _linear_gelu(x: Any, w: Any, b: Any) -> list[Any]:
    product = x @ w.T
    return [_gelu_of(product + b), product]


def _bias_gelu_vjp(dy: Any, x: Any, b: Any) -> list[Any]:
    du = dy * _gelu_slope(x + b)
    return [du, du.sum(axis=0)]


def _linear_gelu_vjp(dy: Any, x: Any, w: Any, b: Any) -> list[Any]:
    du = dy * _gelu_slope(x @ w.T + b)
    return [du @ w, du.T @ x, du.sum(axis=0)]


# Kernel → ``formula(*inputs, **attributes)``, a list of what it writes; a vjp takes the gradients of outputs first.
FORMULAS: dict[str, Callable[..., list[Any]]] = {
    "softmax": _softmax,
    "softmax_vjp": _softmax_vjp,
    "log_softmax": _log_softmax,
    "log_softmax_vjp": _log_softmax_vjp,
    "cross_entropy": _cross_entropy,
    "soft_cross_entropy": _soft_cross_entropy,
    "distillation_loss": _distillation_loss,
    "linear_distillation_loss": _linear_distillation_loss,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skewed_kl": _skewed_kl,
    "decoupled_kd": _decoupled_kd,
    "standardised_kl": _standardised_kl,
    "teacher_confidence": _teacher_confidence,
    "argmax": _argmax,
    "correct_count": _correct_count,
    "corrected_logits": _corrected_logits,
    "gelu": lambda u: [_gelu_of(u)],
    "gelu_vjp": lambda dy, u: [dy * _gelu_slope(u)],
    "bias_gelu": lambda x, b: [_gelu_of(x + b)],
    "bias_gelu_vjp": _bias_gelu_vjp,
    "linear_gelu": _linear_gelu,
    "linear_gelu_vjp": _linear_gelu_vjp,
}
