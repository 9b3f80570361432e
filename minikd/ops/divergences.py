"""Divergences of softened rows beside KL(teacher ‖ student): reversed, mixed, decoupled by the target, standardised.

Everywhere p = softmax(z_s/T) is the student and q = softmax(z_t/T) the teacher, a constant. Each loss takes its
gradient with respect to z_s in the same traversal and saves it, as those of `losses` do. With `scale_t2` both are
multiplied by T². Where one of the two shares of a mixture is 0, the divergence is a plain KL and is computed as that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minikd.ops.losses import (
    LARGEST_TEMPERATURE,
    known,
    labelled_rows,
    loss_shape,
    reduce_rows,
    relative_entropy,
    row_scale,
    scale_gradient,
    weighted,
)
from minikd.ops.op import Example, Op, register
from minikd.ops.rows import inverse_temperature, row_shapes, softened, wide

# --- what they share ---


class _Temperature(NamedTuple):
    """1/T, and what the divergence and its derivative by z_s/T are multiplied by: T² and T, or 1 and 1/T."""

    inverse: float
    loss: float
    gradient: float


def _temperature(where: str, temperature: Any, scale_t2: bool) -> _Temperature:
    inverse = max(inverse_temperature(where, temperature, np.float64), 1 / LARGEST_TEMPERATURE)
    t = min(float(temperature), LARGEST_TEMPERATURE)
    return _Temperature(inverse, t * t, t) if scale_t2 else _Temperature(inverse, 1.0, inverse)


def _write(xp: Any, loss: Any, gradient: Any, rows: Any, dz: Any, divisor: Any, reduction: str) -> None:
    """The reduced loss and its gradient, of row losses and their gradients."""
    reduce_rows(xp, loss, rows, divisor, reduction)
    if gradient is not None:
        gradient[...] = dz * row_scale(xp, divisor, reduction)


def _pairs(rng: np.random.Generator, dtype: Any, least: int = 1) -> list[tuple[Any, Any, float]]:
    """Student, teacher and temperature: of all shapes, far apart, near and equal."""
    found: list[tuple[Any, Any, float]] = []
    for (n, c), t in zip(row_shapes(), (4.0, 1.0, 2.0, 4.0, 8.0, 0.5, 20.0), strict=True):
        if c >= least:
            student, teacher, noise = (3 * rng.normal(size=(n, c)).astype(dtype) for _ in "stn")
            found += [(student, teacher, t), (student, student.copy(), t)]
            found.append(((student + dtype(1e-3) * noise).astype(dtype), student, t))
    return found


def _masked(dtype: Any) -> tuple[Any, Any, float]:
    """Rows in which both rule out the same class, and one in which the teacher nearly rules out another."""
    student, teacher = [[0, -np.inf, 1, 0.5], [-np.inf, 1, 2, -1]], [[1, -np.inf, 0, -2], [-np.inf, 3, 1, -90]]
    return np.array(student, dtype), np.array(teacher, dtype), 2.0


def _extreme(dtype: Any) -> tuple[Any, Any, float]:
    rows = np.array([[1e30, -1e30, 0.0], [3e4, 0.0, -3e4]], dtype)
    return rows, rows[::-1].copy(), 4.0


# --- mixtures: reverse KL, Jensen-Shannon, skewed KL ---


class _Mixture(NamedTuple):
    """teacher·KL(q ‖ m) + student·KL(p ‖ m) with m = of_q·q + of_p·p."""

    teacher: float
    student: float
    of_q: float
    of_p: float


_TAIL_TERMS = 19  # (1/9)^19 is below 1e-18


def _apart(xp: Any, r: Any, m: Any, gap: Any, log_r: Any) -> tuple[Any, Any]:
    """KL(r ‖ m) of each row, as a sum of terms of which none is negative, and log(m/r); `gap` is m - r.

    A term is r·(x - log(1 + x)) with x = (m - r)/r, or m where r = 0. With s = (m - r)/(m + r) it is
    log(m/r) = 2·artanh s = 2s + 2s³·(1/3 + s²/5 + …) and the term s·(gap - 2r·s²·(1/3 + s²/5 + …)), so that nothing
    cancels where m ≈ r.
    """
    both = m + r
    s = gap / xp.where(both == 0, 1.0, both)
    near = xp.abs(s) < 1 / 3
    s = xp.where(near, s, 0.0)
    tail = xp.zeros_like(s)
    for k in range(_TAIL_TERMS, -1, -1):
        tail = tail * s * s + 1 / (2 * k + 3)
    log_ratio = xp.where(near, 2 * s * (1 + s * s * tail), xp.log(m) - log_r)
    terms = xp.where(near, s * (gap - 2 * r * s * s * tail), gap - r * log_ratio)
    return xp.sum(xp.where(r == 0, gap, terms), axis=1), log_ratio


def _mixed_rows(xp: Any, mix: _Mixture, student_logits: Any, teacher_logits: Any, inverse_t: float) -> tuple[Any, Any]:
    """The divergence of each row, and its derivative by z_s/T: p·(r - Σ p·r).

    r is ∂/∂p up to a constant: teacher·of_p·(m - q)/m + student·(log(p/m) - of_q·(m - q)/m), and log p - log q where
    m is q. A row whose divergence is infinite has no gradient: it is NaN.
    """
    p, log_p = softened(xp, student_logits, inverse_t)
    q, log_q = softened(xp, teacher_logits, inverse_t)
    delta = log_p - log_q
    forward, difference = relative_entropy(xp, p, q, delta)
    if mix.of_q == 0:
        return weighted(xp, mix.teacher, forward), weighted(xp, mix.teacher, difference)
    if mix.of_p == 0:
        rows = weighted(xp, mix.student, relative_entropy(xp, q, p, -delta)[0])
        slope = weighted(xp, mix.student, delta)
    else:
        m, gap = mix.of_q * q + mix.of_p * p, mix.of_p * difference
        of_teacher, _ = _apart(xp, q, m, gap, log_q)
        of_student, log_ratio = _apart(xp, p, m, -mix.of_q * difference, log_p)
        rows = weighted(xp, mix.teacher, of_teacher) + weighted(xp, mix.student, of_student)
        slope = (mix.teacher * mix.of_p - mix.student * mix.of_q) * gap / m - weighted(xp, mix.student, log_ratio)
    slope = xp.where(p == 0, 0.0, slope)
    mean = xp.where(xp.isinf(rows), xp.nan, xp.sum(p * slope, axis=1))
    return rows, p * (slope - mean[:, None])


def _mixed(
    xp: Any,
    where: str,
    mix: _Mixture,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    reduction: str,
    scale_t2: bool,
) -> None:
    t = _temperature(where, temperature, scale_t2)
    rows, dz = _mixed_rows(xp, mix, student_logits, teacher_logits, t.inverse)
    _write(xp, loss, gradient, t.loss * rows, t.gradient * dz, len(rows), reduction)


def _reverse_kl(
    xp: Any,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    reduction: str,
    scale_t2: bool,
) -> None:
    mix = _Mixture(teacher=0.0, student=1.0, of_q=1.0, of_p=0.0)
    pair = student_logits, teacher_logits
    _mixed(xp, "reverse_kl", mix, loss, gradient, *pair, temperature, reduction, scale_t2)


def _mixed_example(rng: np.random.Generator, dtype: Any, shares: tuple[float, ...], flag: str = "") -> list[Example]:
    """All pairs, each with another of the shares, where the operation has one, and with the flag on and off."""
    cases: list[Example] = []
    for k, (student, teacher, t) in enumerate([*_pairs(rng, dtype), _masked(dtype), _extreme(dtype)]):
        scalars = [np.float64(x) for x in (t, *shares[k % 4 : k % 4 + 1])]
        attrs: dict[str, Any] = {"reduction": ("mean", "sum", "none")[k // 3 % 3], "scale_t2": k % 5 != 1}
        cases.append(([student, teacher, *scalars], attrs))
        if flag:
            cases.append(([student, teacher, *scalars], {**attrs, flag: True}))
    return cases


register(
    Op(
        name="reverse_kl",
        formula=(
            "loss = T²·KL(p ‖ q) = T²·Σ p·(log p - log q);  dz_s = T·p·((log p - log q) - KL);  "
            "p = softmax(z_s/T), q = softmax(z_t/T)"
        ),
        signature="student_logits(n, c), teacher_logits(n, c), temperature:scalar -> loss(*); gradient?(n, c)",
        attrs={"reduction": "mean", "scale_t2": True},
        shape=loss_shape,
        forward=_reverse_kl,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=lambda rng, dtype: _mixed_example(rng, dtype, ()),
        source="Gu et al. 2024, MiniLLM, sec. 2.1, for one token",
    )
)


def _jensen_shannon(
    xp: Any,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    beta: Any,
    reduction: str,
    scale_t2: bool,
    continuous: bool,
) -> None:
    beta = float(beta)
    mix = _Mixture(teacher=beta, student=1 - beta, of_q=beta, of_p=1 - beta)
    if continuous:  # the same over β·(1 - β); at its ends one of the parts is 0
        teacher, student = (1 / (1 - beta) if beta < 1 else 0.0), (1 / beta if beta > 0 else 0.0)
        mix = mix._replace(teacher=teacher, student=student)
    pair = student_logits, teacher_logits
    _mixed(xp, "jensen_shannon", mix, loss, gradient, *pair, temperature, reduction, scale_t2)


register(
    Op(
        name="jensen_shannon",
        formula=(
            "loss = T²·(β·KL(q ‖ m) + (1-β)·KL(p ‖ m)), over β·(1-β) if continuous;  m = β·q + (1-β)·p;  "
            "dz_s = T·p·(r - Σ p·r), r = (1-β)·log(p/m), or log(p/m)/β if continuous;  "
            "p = softmax(z_s/T), q = softmax(z_t/T)"
        ),
        signature=(
            "student_logits(n, c), teacher_logits(n, c), temperature:scalar, beta:scalar -> loss(*); gradient?(n, c)"
        ),
        attrs={"reduction": "mean", "scale_t2": True, "continuous": False},
        shape=loss_shape,
        forward=_jensen_shannon,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=lambda rng, dtype: _mixed_example(rng, dtype, (0.5, 0.1, 1 - 1e-4, 1.0), "continuous"),
        source="Agarwal et al. 2024, on-policy distillation, eq. 1",
    )
)


def _skewed_kl(
    xp: Any,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    alpha: Any,
    reduction: str,
    scale_t2: bool,
    reverse: bool,
) -> None:
    alpha = float(alpha)
    mix = _Mixture(teacher=1.0, student=0.0, of_q=alpha, of_p=1 - alpha)
    if reverse:
        mix = _Mixture(teacher=0.0, student=1.0, of_q=1 - alpha, of_p=alpha)
    pair = student_logits, teacher_logits
    _mixed(xp, "skewed_kl", mix, loss, gradient, *pair, temperature, reduction, scale_t2)


register(
    Op(
        name="skewed_kl",
        formula=(
            "loss = T²·KL(q ‖ m), m = α·q + (1-α)·p;  dz_s = T·p·(r - Σ p·r), r = -(1-α)·q/m;  "
            "reverse: loss = T²·KL(p ‖ m), m = (1-α)·q + α·p, r = log(p/m) + (1-α)·q/m;  "
            "p = softmax(z_s/T), q = softmax(z_t/T)"
        ),
        signature=(
            "student_logits(n, c), teacher_logits(n, c), temperature:scalar, alpha:scalar -> loss(*); gradient?(n, c)"
        ),
        attrs={"reduction": "mean", "scale_t2": True, "reverse": False},
        shape=loss_shape,
        forward=_skewed_kl,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=lambda rng, dtype: _mixed_example(rng, dtype, (0.1, 0.9, 0.0, 0.5), "reverse"),
        source="Ko et al. 2024, DistiLLM, sec. 3.1",
    )
)

# --- decoupled by the target ---


def _against_others(xp: Any, z: Any, hot: Any, inverse_t: float) -> tuple[Any, Any, Any]:
    """softmax and log softmax of the classes but the target, and log(P/(1 - P)) of the target's probability P.

    That is z_y/T - log Σ exp(z_j/T) over the others, the logit of a choice between two.
    """
    own = xp.where(hot, wide(z), -xp.inf).max(axis=1)
    others = xp.where(hot, -xp.inf, wide(z))
    p, log_p = softened(xp, others, inverse_t)
    logit = (own - others.max(axis=1)) * inverse_t + log_p.max(axis=1)
    return p, log_p, xp.where(own == xp.inf, xp.nan, logit)


def _two_classes(xp: Any, logit: Any) -> tuple[Any, Any]:
    """Probabilities and log-probabilities (n, 2) of a choice with this logit, for and against."""
    log_p = -xp.logaddexp(0.0, xp.stack([-logit, logit], axis=1))
    return xp.exp(log_p), log_p


def _decoupled_kd(
    xp: Any,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    target: Any,
    temperature: Any,
    alpha: Any,
    beta: Any,
    reduction: str,
    scale_t2: bool,
    ignore_index: int,
) -> None:
    c = student_logits.shape[1]
    t = _temperature("decoupled_kd", temperature, scale_t2)
    labelled = labelled_rows(xp, "decoupled_kd", target, c, ignore_index)
    hot = xp.arange(c)[None, :] == target[:, None]
    alpha, beta = float(alpha), float(beta)

    # of the other classes: KL(q̂ ‖ p̂), derivative p̂ - q̂
    p, log_p, student = _against_others(xp, student_logits, hot, t.inverse)
    q, log_q, teacher = _against_others(xp, teacher_logits, hot, t.inverse)
    others, difference = relative_entropy(xp, p, q, log_p - log_q)

    # of the target against them: KL of two classes; moving z_y/T by 1 or all others by -1 is the same
    p_2, log_p_2 = _two_classes(xp, student)
    q_2, log_q_2 = _two_classes(xp, teacher)
    own, difference_2 = relative_entropy(xp, p_2, q_2, log_p_2 - log_q_2)
    move = weighted(xp, alpha, difference_2[:, :1])

    rows = known(xp, target, c, t.loss) * (weighted(xp, alpha, own) + weighted(xp, beta, others))
    dz = t.gradient * xp.where(hot, move, weighted(xp, beta, difference) - move * p)
    broken = xp.isnan(rows)[:, None]
    dz = xp.where(labelled[:, None], xp.where(broken, xp.nan, dz), 0.0)
    _write(xp, loss, gradient, xp.where(labelled, rows, 0.0), dz, labelled.sum(), reduction)


def _decoupled_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    masked = _masked(dtype)
    for k, (student, teacher, t) in enumerate([*_pairs(rng, dtype, least=3), masked, _extreme(dtype)]):
        n, c = student.shape
        target = rng.integers(0, c, n) if teacher is not masked[1] else np.array([0, 2])
        if n > 2:
            target[1] = -100
        for place, weights in enumerate(((1.0, 8.0), (0.0, 1.0), (2.0, 0.0), (0.5, 0.25))):
            attrs = {"reduction": ("mean", "sum", "none")[(k + place) % 3], "scale_t2": (k + place) % 4 != 1}
            cases.append(([student, teacher, target, *(np.float64(x) for x in (t, *weights))], attrs))
    cases.append(([*cases[0][0][:2], np.full(len(cases[0][0][0]), -100), *cases[0][0][3:]], {}))
    return cases


register(
    Op(
        name="decoupled_kd",
        formula=(
            "loss = α·T²·KL((q_y, 1-q_y) ‖ (p_y, 1-p_y)) + β·T²·KL(q̂ ‖ p̂);  "
            "p̂_j = p_j/(1-p_y), q̂_j = q_j/(1-q_y) for j ≠ y;  "
            "dz_s = α·T·(p_y - q_y) at y, else T·(β·(p̂ - q̂) - α·(p_y - q_y)·p̂);  "
            "p = softmax(z_s/T), q = softmax(z_t/T)"
        ),
        signature=(
            "student_logits(n, c), teacher_logits(n, c), target:index(n), "
            "temperature:scalar, alpha:scalar, beta:scalar -> loss(*); gradient?(n, c)"
        ),
        attrs={"reduction": "mean", "scale_t2": True, "ignore_index": -100},
        shape=loss_shape,
        forward=_decoupled_kd,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=_decoupled_example,
        source="Zhao et al. 2022, decoupled knowledge distillation, eq. 7",
    )
)

# --- standardised ---


def _standardised(xp: Any, z: Any, eps: float) -> tuple[Any, Any, Any]:
    """Z = (z - mean)/(σ + eps) of each row with σ² = Σ (z - mean)²/(c - 1), and 1/(σ + eps) and σ as columns.

    The mean is taken of the distances from a row's first score, so that equal scores have no deviation, however large
    they are.
    """
    distance = wide(z) - wide(z)[:, :1]
    centred = distance - distance.mean(axis=1, keepdims=True)
    deviation = xp.sqrt((centred * centred).sum(axis=1, keepdims=True) / max(z.shape[1] - 1, 1))
    factor = 1 / (deviation + eps)
    return centred * factor, factor, deviation


def _standardised_kl(
    xp: Any,
    loss: Any,
    gradient: Any,
    student_logits: Any,
    teacher_logits: Any,
    temperature: Any,
    reduction: str,
    scale_t2: bool,
    eps: float,
) -> None:
    t = _temperature("standardised_kl", temperature, scale_t2)
    z, factor, deviation = _standardised(xp, student_logits, eps)
    p, log_p = softened(xp, z, t.inverse)
    q, log_q = softened(xp, _standardised(xp, teacher_logits, eps)[0], t.inverse)
    rows, g = relative_entropy(xp, p, q, log_p - log_q)

    # through Z of the student: its mean, and its deviation, whose own gradient is (z - mean)/((c - 1)·σ)
    spread = (z.shape[1] - 1) * deviation * factor
    along = xp.sum(g * z, axis=1, keepdims=True) / xp.where(spread == 0, 1.0, spread)
    dz = factor * (g - g.mean(axis=1, keepdims=True) - along * z)
    _write(xp, loss, gradient, t.loss * rows, t.gradient * dz, len(rows), reduction)


def _standardised_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for k, (student, teacher, t) in enumerate([*_pairs(rng, dtype, least=2), _extreme(dtype)]):
        for place, reduction in enumerate(("mean", "sum", "none")):
            attrs = {"reduction": reduction, "scale_t2": (k + place) % 4 != 1, "eps": (1e-7, 0.5)[k % 2]}
            cases.append(([student, teacher, np.float64(t)], attrs))
    return cases


register(
    Op(
        name="standardised_kl",
        formula=(
            "loss = T²·KL(softmax(Z_t/T) ‖ softmax(Z_s/T)), Z = (z - mean z)/(σ + eps), σ² = Σ (z - mean z)²/(c-1);  "
            "dz_s = (g - mean g - Z_s·Σ g·Z_s·(σ + eps)/((c-1)·σ))/(σ + eps), g = T·(softmax(Z_s/T) - softmax(Z_t/T))"
        ),
        signature="student_logits(n, c), teacher_logits(n, c), temperature:scalar -> loss(*); gradient?(n, c)",
        attrs={"reduction": "mean", "scale_t2": True, "eps": 1e-7},
        shape=loss_shape,
        forward=_standardised_kl,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=_standardised_example,
        source="Sun et al. 2024, logit standardisation, eq. 9 and algorithm 1",
    )
)
