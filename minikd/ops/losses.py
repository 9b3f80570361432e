"""The losses: cross-entropy for hard and for soft targets, Kullback-Leibler divergence, and distillation.

Each takes its logits' gradient in the same traversal as its value and saves it; backward only scales it by the
upstream gradient. With reduction "none" the saved gradient is that of each row's own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd.errors import label_out_of_range
from minikd.ops.op import Example, Op, Shape, register
from minikd.ops.refusals import refuse_rows
from minikd.ops.rows import inverse_temperature, row_shapes, softened, wide

# --- what the losses share ---


def reduce_rows(xp: Any, loss: Any, rows: Any, divisor: Any, reduction: str) -> None:
    """Write the row losses (float64), their sum, or their sum over `divisor` (0 when the divisor is 0)."""
    if reduction == "none":
        loss[...] = rows
    elif reduction == "sum":
        loss[...] = rows.sum()
    else:
        loss[...] = over(xp, rows.sum(), divisor)


def over(xp: Any, total: Any, divisor: Any) -> Any:
    """total / divisor, and 0 where the divisor is 0; a divisor that was computed stays where it is."""
    if isinstance(divisor, int | float):
        return total / divisor if divisor else 0.0
    return xp.where(divisor == 0, 0.0, total / xp.where(divisor == 0, 1, divisor))


def row_scale(xp: Any, divisor: Any, reduction: str) -> Any:
    """What one row's gradient is multiplied by under this reduction."""
    return 1.0 if reduction in ("none", "sum") else over(xp, 1.0, divisor)


def loss_shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> list[Shape]:
    assert shapes[0] is not None
    return [shapes[0][:1] if attrs["reduction"] == "none" else ()]


def labelled_rows(xp: Any, where: str, target: Any, c: int, ignore_index: int) -> Any:
    """Which rows carry a label; refuses a label outside 0 … c - 1 (on a device later, where its row becomes NaN)."""
    labelled = target != ignore_index
    wrong = labelled & outside(target, c)
    refuse_rows(xp, (where, c), wrong, target, lambda row, label: label_out_of_range(where, row, label, c))
    return labelled


def outside(target: Any, c: int) -> Any:
    """Which of these are no class ids from 0 to c - 1."""
    return (target < 0) | (target >= c)


def one_hot(xp: Any, target: Any, labelled: Any, c: int, smoothing: float) -> Any:
    """(1 - smoothing)·one-hot + smoothing/C in float64, zeros in the rows without a label, NaN where it is no class."""
    hot = xp.arange(c)[None, :] == target[:, None]
    return xp.where(labelled[:, None], (1.0 - smoothing) * hot + known(xp, target, c, smoothing / c)[:, None], 0.0)


def known(xp: Any, target: Any, c: int, value: float) -> Any:
    """`value` in each row whose target is a class id, and NaN in the others, which a device has not refused yet."""
    return xp.where(outside(target, c), xp.nan, xp.float64(value))


def cross_entropy_rows(xp: Any, logits: Any, y: Any) -> tuple[Any, Any]:
    """-Σ y·log softmax(z) of each row, and its gradient softmax(z)·Σy - y; a class with y = 0 adds exactly 0."""
    p, log_p = softened(xp, logits, 1.0)
    broken = xp.isnan(p).any(axis=1)
    rows = -xp.sum(xp.where(y == 0, 0.0, y * log_p), axis=1)
    return xp.where(broken, xp.nan, rows), p * y.sum(axis=1, keepdims=True) - y


def relative_entropy(xp: Any, p: Any, q: Any, delta: Any) -> tuple[Any, Any]:
    """Σ q·(e^δ - 1 - δ) with δ = log p - log q, which is KL(q ‖ p), and p - q.

    Since Σp = Σq this equals Σ q·(log q - log p), but no term is negative and nothing cancels when p ≈ q:
    near δ = 0 both are taken from the series δ²/2 + δ³/6 + … Where q = 0 the term is p.
    """
    small = xp.abs(delta) < 0.5
    d = xp.where(small, delta, 0.0)
    series = xp.zeros_like(d)
    for k in range(17, 1, -1):  # 0.5^16 · 2/17! is below 1e-19 of the first term
        series = (series * d + 1.0) / k
    # series = 1/2 + δ/6 + δ²/24 + …, so δ²·series = e^δ - 1 - δ
    terms = xp.where(small, q * d * d * series, p - q - q * delta)
    difference = xp.where(small, q * (d + d * d * series), p - q)
    empty = q == 0
    return xp.sum(xp.where(empty, p, terms), axis=1), xp.where(empty, p, difference)


def scale_gradient(xp: Any, dx: Any, dloss: Any, loss: Any, gradient: Any, *inputs: Any, **attrs: Any) -> None:
    xp.multiply(gradient, dloss[:, None] if dloss.ndim else dloss, out=dx)


# --- cross-entropy with integer labels ---


def _cross_entropy(
    xp: Any,
    loss: Any,
    gradient: Any,
    logits: Any,
    target: Any,
    weight: Any,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    c = logits.shape[1]
    labelled = labelled_rows(xp, "cross_entropy", target, c, ignore_index)
    y = one_hot(xp, target, labelled, c, label_smoothing)
    divisor = labelled.sum()
    if weight is not None:
        y = y * wide(weight)
        of_rows = xp.take(wide(weight), xp.clip(target, 0, c - 1))
        divisor = xp.where(labelled, of_rows, 0.0).sum()
    rows, dz = cross_entropy_rows(xp, logits, y)
    reduce_rows(xp, loss, xp.where(labelled, rows, 0.0), divisor, reduction)
    if gradient is not None:
        gradient[...] = xp.where(labelled[:, None], dz * row_scale(xp, divisor, reduction), 0.0)


def _labels(rng: np.random.Generator, n: int, c: int, ignored: bool = True) -> Any:
    target = rng.integers(0, c, n)
    if ignored and n > 2:
        target[1] = -100
    return target


def _cross_entropy_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, c in row_shapes():
        logits = 3 * rng.normal(size=(n, c)).astype(dtype)
        weight = rng.uniform(0.2, 2, c).astype(dtype)
        for reduction in ("mean", "sum", "none"):
            cases.append(([logits, _labels(rng, n, c), None], {"reduction": reduction}))
            cases.append(([logits, _labels(rng, n, c), weight], {"reduction": reduction, "label_smoothing": 0.1}))
    masked = np.array([[0, -np.inf, 1], [2, 1, -np.inf]], dtype)
    cases.append(([masked, np.array([0, 1]), None], {}))
    cases.append(([masked, np.array([-100, -100]), None], {}))
    return cases


register(
    Op(
        name="cross_entropy",
        formula="loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·onehot(y) + e/C",
        signature="logits(n, c), target:index(n), weight?(c) -> loss(*); gradient?(n, c)",
        attrs={"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0},
        shape=loss_shape,
        forward=_cross_entropy,
        vjp=scale_gradient,
        wrt=("logits",),
        vjp_reads=("gradient",),
        example=_cross_entropy_example,
        source="formulas 2 and 5 with Szegedy et al. 2016, sec. 7, for the smoothing",
    )
)


# --- cross-entropy with class probabilities ---


def _soft_cross_entropy(
    xp: Any, loss: Any, gradient: Any, logits: Any, target: Any, weight: Any, reduction: str, label_smoothing: float
) -> None:
    n, c = logits.shape
    y = (1.0 - label_smoothing) * wide(target) + label_smoothing / c
    if weight is not None:
        y = y * wide(weight)
    rows, dz = cross_entropy_rows(xp, logits, y)
    reduce_rows(xp, loss, rows, n, reduction)
    if gradient is not None:
        gradient[...] = dz * row_scale(xp, n, reduction)


def _probabilities(rng: np.random.Generator, n: int, c: int, dtype: Any) -> Any:
    q = rng.dirichlet(np.full(c, 0.5), n)
    q[0, 0] = 0.0
    return (q / np.maximum(q.sum(axis=1, keepdims=True), 1e-300)).astype(dtype)


def _soft_cross_entropy_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, c in row_shapes():
        logits, target = 3 * rng.normal(size=(n, c)).astype(dtype), _probabilities(rng, n, c, dtype)
        weight = rng.uniform(0.2, 2, c).astype(dtype)
        for reduction in ("mean", "sum", "none"):
            cases.append(([logits, target, None], {"reduction": reduction}))
            cases.append(([logits, target, weight], {"reduction": reduction, "label_smoothing": 0.2}))
    cases.append(([np.array([[0, -np.inf, 1]], dtype), np.array([[0.25, 0, 0.75]], dtype), None], {}))
    return cases


register(
    Op(
        name="soft_cross_entropy",
        formula="loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·y + e/C",
        signature="logits(n, c), target(n, c), weight?(c) -> loss(*); gradient?(n, c)",
        attrs={"reduction": "mean", "label_smoothing": 0.0},
        shape=loss_shape,
        forward=_soft_cross_entropy,
        vjp=scale_gradient,
        wrt=("logits",),
        vjp_reads=("gradient",),
        example=_soft_cross_entropy_example,
        source="formulas 2 and 5",
    )
)


# --- Kullback-Leibler divergence of given log-probabilities ---


def _kl_divisor(shape: Shape, reduction: str) -> int:
    return shape[0] * shape[1] if reduction == "mean" else shape[0]


def _kl_div(xp: Any, loss: Any, gradient: Any, input: Any, target: Any, reduction: str, log_target: bool) -> None:
    q = xp.exp(wide(target)) if log_target else wide(target)
    log_q = wide(target) if log_target else xp.log(q)
    pointwise = xp.where(q == 0, 0.0, q * (log_q - wide(input)))
    divisor = _kl_divisor(input.shape, reduction)
    reduce_rows(xp, loss, pointwise, divisor, reduction)
    if gradient is not None:
        gradient[...] = -q * row_scale(xp, divisor, reduction)


def _kl_div_vjp(
    xp: Any, dx: Any, dloss: Any, loss: Any, gradient: Any, *inputs: Any, reduction: str, log_target: bool
) -> None:
    xp.multiply(gradient, dloss, out=dx)


def _kl_div_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, c in row_shapes():
        log_p = np.log(rng.dirichlet(np.full(c, 1.0), n)).astype(dtype)
        q = _probabilities(rng, n, c, dtype)
        for reduction in ("batchmean", "mean", "sum", "none"):
            cases.append(([log_p, q], {"reduction": reduction}))
        with np.errstate(divide="ignore"):
            cases.append(([log_p, np.log(q)], {"reduction": "batchmean", "log_target": True}))
    masked = np.array([[-np.inf, -0.5, -1.0]], dtype), np.array([[0.0, 0.4, 0.6]], dtype)
    return [*cases, (list(masked), {})]


register(
    Op(
        name="kl_div",
        formula="loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q",
        signature="input(n, c), target(n, c) -> loss(*); gradient?(n, c)",
        attrs={"reduction": "batchmean", "log_target": False},
        shape=lambda shapes, attrs: [shapes[0] or () if attrs["reduction"] == "none" else ()],
        forward=_kl_div,
        vjp=_kl_div_vjp,
        wrt=("input",),
        vjp_reads=("gradient",),
        example=_kl_div_example,
        source="formula 3; pointwise as torch.nn.functional.kl_div",
    )
)


# --- distillation ---


# Higher temperatures are computed as this one: T²·KL and T·(p - q) have then reached their limits to nine digits, and
# nothing can overflow or vanish.
LARGEST_TEMPERATURE = 1e9


def weighted(xp: Any, weight: float, value: Any) -> Any:
    """weight·value, and 0 where the weight is 0 even if the value is infinite: a term switched off is not there."""
    return weight * value if weight else xp.zeros_like(value)


def _distillation_loss(
    xp: Any,
    loss: Any,
    gradient: Any,
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
) -> None:
    n, c = student_logits.shape
    hard_weight, soft_weight = float(hard_weight), float(soft_weight)
    inverse_t = max(inverse_temperature("distillation_loss", temperature, np.float64), 1 / LARGEST_TEMPERATURE)
    t = min(float(temperature), LARGEST_TEMPERATURE)

    # soft: T²·KL(q ‖ p), gradient T·(p - q)
    p, log_p = softened(xp, student_logits, inverse_t)
    q, log_q = softened(xp, teacher_logits, 1.0 if log_target else inverse_t)
    kl, difference = relative_entropy(xp, p, q, log_p - log_q)
    soft = weighted(xp, soft_weight, (t * t if scale_t2 else 1.0) * kl)
    soft_gradient = weighted(xp, soft_weight * (t if scale_t2 else inverse_t), difference)

    # hard: cross-entropy at T = 1, gradient softmax(z) - y, for the rows that carry a label
    labelled = xp.zeros(n, bool)
    hard, hard_gradient = xp.zeros(n), xp.zeros((n, c))
    if target is not None:
        labelled = labelled_rows(xp, "distillation_loss", target, c, ignore_index)
        hard, hard_gradient = cross_entropy_rows(xp, student_logits, one_hot(xp, target, labelled, c, label_smoothing))
        hard = xp.where(labelled, weighted(xp, hard_weight, hard), 0.0)
        hard_gradient = xp.where(labelled[:, None], weighted(xp, hard_weight, hard_gradient), 0.0)

    # the hard mean is over labelled rows, the soft mean over all
    per_hard, per_soft = row_scale(xp, labelled.sum(), reduction), row_scale(xp, n, reduction)
    rows = per_hard * hard + per_soft * soft
    loss[...] = rows if reduction == "none" else rows.sum()
    if gradient is not None:
        gradient[...] = per_hard * hard_gradient + per_soft * soft_gradient


def _distillation_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []

    def scalars(t: float, hard: float, soft: float) -> list[Any]:
        return [np.float64(t), np.float64(hard), np.float64(soft)]

    for (n, c), t in zip(row_shapes(), (4.0, 1.0, 2.0, 4.0, 8.0, 0.5, 20.0), strict=True):
        student, teacher = (3 * rng.normal(size=(n, c)).astype(dtype) for _ in "st")
        labels = _labels(rng, n, c)
        for reduction in ("mean", "sum", "none"):
            cases.append(([student, teacher, labels, *scalars(t, 0.3, 0.7)], {"reduction": reduction}))
        cases.append(([student, teacher, None, *scalars(t, 0.5, 1.5)], {"scale_t2": False}))
        cases.append(([student, teacher, labels, *scalars(t, 1.0, 0.0)], {"label_smoothing": 0.1}))
        cases.append(([student, student, labels, *scalars(t, 0.0, 1.0)], {}))
        near = (student + dtype(1e-3) * rng.normal(size=(n, c)).astype(dtype)).astype(dtype)
        cases.append(([near, student, labels, *scalars(t, 0.1, 0.9)], {}))
        log_q = np.log(rng.dirichlet(np.full(c, 0.5), n) + 1e-30).astype(dtype)
        cases.append(([student, log_q, labels, *scalars(t, 0.3, 0.7)], {"log_target": True}))
    masked = np.array([[0, -np.inf, 1], [-np.inf, 1, 2]], dtype), np.array([[1, -np.inf, 0], [-np.inf, 3, 1]], dtype)
    cases.append(([*masked, np.array([0, 1]), *scalars(2.0, 0.5, 0.5)], {}))
    cases.append(([np.zeros((2, 3), dtype), masked[1], np.array([-100, -100]), *scalars(2.0, 0.5, 0.5)], {}))
    extreme = np.array([[1e30, -1e30, 0.0], [3e4, 0.0, -3e4]], dtype)
    cases.append(([extreme, extreme[::-1].copy(), np.array([0, 1]), *scalars(4.0, 0.5, 0.5)], {}))
    return cases


DISTILLATION = register(
    Op(
        name="distillation_loss",
        formula=(
            "loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p);  dz_s = hard·(softmax(z_s) - ỹ) + soft·T·(p - q);  "
            "p = softmax(z_s/T), q = softmax(z_t/T), or softmax(z_t) with log_target"
        ),
        signature=(
            "student_logits(n, c), teacher_logits(n, c), target?:index(n), "
            "temperature:scalar, hard_weight:scalar, soft_weight:scalar -> loss(*); gradient?(n, c)"
        ),
        attrs={
            "reduction": "mean",
            "scale_t2": True,
            "log_target": False,
            "ignore_index": -100,
            "label_smoothing": 0.0,
        },
        shape=loss_shape,
        forward=_distillation_loss,
        vjp=scale_gradient,
        wrt=("student_logits",),
        vjp_reads=("gradient",),
        example=_distillation_example,
        source="Hinton, Vinyals and Dean 2015, sec. 2; formulas 3 to 5",
    )
)
