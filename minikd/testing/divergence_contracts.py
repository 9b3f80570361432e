"""What kernels of the other divergences promise: reverse, mixed and skewed KL, decoupled and standardised ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minikd.ops.rows import softened
from minikd.testing.contract import Attributes, Contract, Draw, Edge, Inputs
from minikd.testing.divergence_mistakes import DECOUPLED, FORWARD, MIXED, SKEWED, STANDARDISED
from minikd.testing.mistakes import all_rows_counted, pair_mistakes
from minikd.testing.scores import (
    BAD_LABELS,
    BAD_TEMPERATURES,
    BROKEN,
    EQUAL,
    GIVEN,
    HUGE,
    INF,
    LABELS,
    LARGEST_OFFSET,
    MASKED,
    PLAIN,
    TEACHER,
    broken,
    divisors,
    largest,
    likelier,
    pair_rows,
    rounded,
)
from minikd.testing.strategies import EVERY_KIND, batches, temperatures

PAIR = ("student_logits", "teacher_logits", "temperature")

# --- of two softened rows ---


def _pair_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """As of the soft term; where the logarithms of both enter the gradient, with their size.

    A probability below the dtype's normal numbers may be 0, however large what it is multiplied by.
    """
    n, c = np.shape(inputs["student_logits"])
    t, scaled = float(inputs["temperature"]), attrs.get("scale_t2", True)
    limits = np.finfo(inputs["student_logits"].dtype)
    likely = likelier(inputs, t) + float(limits.tiny / limits.eps)
    with np.errstate(all="ignore"):
        gap = np.abs(inputs["student_logits"] - np.asarray(inputs["teacher_logits"], np.float64)) / t
    apart = 1 + np.nanmax(np.where(np.isfinite(gap) & (likely > 0), gap, 0), axis=1, keepdims=True)
    loss = (np.log(c) + largest(likely) + apart.max()) * (t * t if scaled else 1.0)
    return [loss, (t if scaled else 1 / t) * likely * apart / divisors(attrs, n, 0)[0]]


def _pair_draw(**others: st.SearchStrategy[Any]) -> Draw:
    def draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
        return st.builds(
            lambda batch, t, rest: {
                "student_logits": batch.student,
                "teacher_logits": batch.teacher,
                "temperature": t,
                **rest,
            },
            batches(dtype=dtype, kind=kind),
            temperatures(),
            st.fixed_dictionaries(others),
        )

    return draw


def _pair_edges(reverse: bool = False, **others: Any) -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, temperature: float = 2.0) -> Edge:
        pair = {"student_logits": student, "teacher_logits": teacher}
        return Edge(name, {**pair, "temperature": temperature, **others})

    ruled_out = "the teacher alone rules a class out: the loss is +inf"
    return (
        case("two plain rows at T = 4", temperature=4.0),
        *(case(name, *pair) for name, pair in pair_rows().items()),
        *((case(ruled_out, TEACHER, MASKED),) if reverse else ()),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


# --- decoupled by the target ---

_ALL_RULED_OUT = np.array([[1.0, -INF, -INF], [0.5, 2.5, -1.0]])


def _apart(z: Any, hot: Any, t: float) -> tuple[Any, Any]:
    """Of the target's probability P and its complement, and of the other classes: each times its roundings."""
    z = np.asarray(z, np.float64)
    others = np.where(hot, -INF, z)
    p, roundings = rounded(others, t)
    with np.errstate(all="ignore"):
        logit = z[hot] / t - others.max(axis=1) / t + softened(np, others, 1 / t)[1].max(axis=1)
        likelier_of_two = 1 / (1 + np.exp(-np.abs(logit)))
        offset = np.max(np.abs(z), axis=1, where=np.isfinite(z), initial=0.0)
    of_two = likelier_of_two * (1 + np.minimum(np.abs(logit), LARGEST_OFFSET) + np.minimum(offset, LARGEST_OFFSET) / t)
    return np.nan_to_num(of_two)[:, None], np.nan_to_num(p * roundings)


def _decoupled_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """Of the loss T²·(1 + log c) for each weight; of the gradient T·(alpha·P + beta·max(p, q))."""
    (n, c), target, t = np.shape(inputs["student_logits"]), np.asarray(inputs["target"]), float(inputs["temperature"])
    labelled = target != -100
    hot = np.arange(c) == np.where(labelled, target, 0)[:, None]
    (own, p), (own_q, q) = (_apart(inputs[name], hot, t) for name in PAIR[:2])
    own, likely = np.maximum(own, own_q), np.maximum(p, q)
    of_loss, of_gradient = (t * t, t) if attrs.get("scale_t2", True) else (1.0, 1 / t)
    alpha, beta = float(inputs["alpha"]), float(inputs["beta"])
    loss = of_loss * (alpha * (1 + own.max()) + beta * (np.log(c) + likely.max()))
    gradient = np.where(hot, alpha * own, alpha * own * likely + beta * likely)
    return [loss, of_gradient * gradient / divisors(attrs, n, int(labelled.sum()))[1]]


def _decoupled_edges() -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, target: Any = LABELS, **others: Any) -> Edge:
        pair = {"student_logits": student, "teacher_logits": teacher, "target": np.asarray(target)}
        return Edge(name, {**pair, "temperature": 2.0, "alpha": 1.0, "beta": 4.0, **others})

    fit = {name: pair for name, pair in pair_rows().items() if pair[0].shape[1] > 2}
    sure = np.array([[60.0, 1.0, 0.1], [0.5, 700.0, -1.0]])
    ruled_out = np.array([[1.0, -INF, 0.0], [2.0, 1.0, -INF]])
    return (
        case("two plain rows at T = 4", temperature=4.0),
        *(case(name, *pair, [0, 0][: len(pair[0])]) for name, pair in fit.items()),
        case("the target is a class that both rule out", MASKED, MASKED - 0.5, [1, 2]),
        case("the student alone rules another class out: the loss is +inf", ruled_out, TEACHER, [0, 0]),
        case("the student alone rules the target out: the loss is +inf", MASKED, TEACHER, [1, 2]),
        case("the teacher alone rules classes out", TEACHER, MASKED, [0, 0]),
        case("both are almost sure of the target", sure, sure[:, ::-1].copy() + sure, [0, 1], temperature=1.0),
        case("a row without a label feels nothing", target=[0, -100]),
        case("no row has a label: the loss is 0", target=[-100, -100]),
        case("a weight of 0 leaves the target's term out, infinite as it may be", MASKED, TEACHER, [1, 2], alpha=0.0),
        case("a weight of 0 leaves the other term out, infinite as it may be", ruled_out, TEACHER, [0, 0], beta=0.0),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


def _decoupled_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    weights = st.sampled_from((1.0, 8.0, 0.5, 2.0))
    return st.builds(
        lambda batch, t, alpha, beta: {
            "student_logits": batch.student,
            "teacher_logits": batch.teacher,
            "target": batch.target,
            "temperature": t,
            "alpha": alpha,
            "beta": beta,
        },
        batches(c=st.integers(3, 6), dtype=dtype, kind=kind, ignored=True),
        temperatures(),
        weights,
        weights,
    )


# --- standardised ---


def _standardised_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """As of the soft term of the standardised scores, whose own rounding is that of the scores over their deviation."""
    t, eps = float(inputs["temperature"]), attrs.get("eps", 1e-7)
    of_loss, of_gradient = (t * t, t) if attrs.get("scale_t2", True) else (1.0, 1 / t)
    (n, c), likely, roundings, width = np.shape(inputs["student_logits"]), [], [], []
    with np.errstate(all="ignore"):
        for name in PAIR[:2]:
            z = np.asarray(inputs[name], np.float64)
            centred = z - z[:, :1]
            centred = centred - centred.mean(axis=1, keepdims=True)
            width.append(np.sqrt((centred * centred).sum(axis=1, keepdims=True) / max(c - 1, 1)) + eps)
            likely.append(softened(np, centred / width[-1], 1 / t)[0])
            size = np.abs(z).max(axis=1, keepdims=True) / width[-1]
            roundings.append(1 + (np.abs(centred).max(axis=1, keepdims=True) / width[-1] + size) / t)
        inherited = np.maximum(*roundings)
        gradient = of_gradient / width[0] * np.maximum(*likely) * inherited
        # what flows through the mean and the deviation is spread over the row
        gradient = gradient + gradient.max(axis=1, keepdims=True)
    return [of_loss * (np.log(c) + largest(inherited)), gradient / divisors(attrs, n, 0)[0]]


def _standardised_edges() -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, temperature: float = 2.0) -> Edge:
        return Edge(name, {"student_logits": student, "teacher_logits": teacher, "temperature": temperature})

    level = np.array([[2.0, 2.0, 2.0], [0.5, 2.5, -1.0]])
    return (
        case("two plain rows at T = 4", temperature=4.0),
        case("equal scores in a row of the student: they are standardised to 0, not to NaN", level),
        case("equal scores in a row of the teacher: they are standardised to 0, not to NaN", PLAIN, level),
        case(EQUAL, PLAIN, PLAIN.copy()),
        case("a teacher with another mean and size: the divergence is 0", PLAIN, 4 * PLAIN + 1),
        case("logits of ±1e30", HUGE, HUGE[::-1].copy()),
        case("scores that lie far apart", np.array([[0.0, 400.0, 800.0]]), np.array([[800.0, 0.0, 400.0]])),
        case("two classes", PLAIN[:, :2], TEACHER[::-1, :2].copy()),
        case("a class that is ruled out (-inf): the row has no mean and is NaN", MASKED, TEACHER),
        *(case(name, broken(value)) for name, value in BROKEN.items()),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


CONTRACTS = (
    Contract(
        *("reverse_kl", PAIR, GIVEN, EVERY_KIND, _pair_draw()),
        edges=_pair_edges(reverse=True),
        scale=_pair_scale,
        mistakes=(*pair_mistakes("reverse_kl"), FORWARD),
        never_negative=True,
        refuses=BAD_TEMPERATURES,
    ),
    Contract(
        *("jensen_shannon", (*PAIR, "beta"), GIVEN, EVERY_KIND),
        _pair_draw(beta=st.sampled_from((0.5, 0.1, 0.9))),
        edges=_pair_edges(beta=0.25),
        scale=_pair_scale,
        mistakes=(*pair_mistakes("jensen_shannon"), *MIXED),
        never_negative=True,
        refuses=BAD_TEMPERATURES,
    ),
    Contract(
        *("skewed_kl", (*PAIR, "alpha"), GIVEN, EVERY_KIND),
        _pair_draw(alpha=st.sampled_from((0.1, 0.5, 0.9))),
        edges=_pair_edges(alpha=0.1),
        scale=_pair_scale,
        mistakes=(*pair_mistakes("skewed_kl"), *SKEWED),
        never_negative=True,
        refuses=BAD_TEMPERATURES,
    ),
    Contract(
        "decoupled_kd",
        ("student_logits", "teacher_logits", "target", "temperature", "alpha", "beta"),
        *(GIVEN, EVERY_KIND, _decoupled_draw),
        edges=_decoupled_edges(),
        scale=_decoupled_scale,
        mistakes=(*pair_mistakes("decoupled_kd"), all_rows_counted("decoupled_kd"), *DECOUPLED),
        never_negative=True,
        refuses=(*BAD_TEMPERATURES, *BAD_LABELS),
    ),
    Contract(
        *("standardised_kl", PAIR, GIVEN, tuple(kind for kind in EVERY_KIND if kind != "masked"), _pair_draw()),
        edges=_standardised_edges(),
        scale=_standardised_scale,
        mistakes=(*pair_mistakes("standardised_kl"), *STANDARDISED),
        never_negative=True,
        refuses=BAD_TEMPERATURES,
    ),
)
