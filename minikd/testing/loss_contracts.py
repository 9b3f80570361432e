"""What kernels of the losses promise: cross-entropy, KL, the distillation loss, reverse, mixed and skewed KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minikd.ops.rows import softened
from minikd.testing.contract import Attributes, Contract, Edge, Inputs, Mistake, expected
from minikd.testing.mistakes import all_rows_counted, changed, exchanged_values, pair_mistakes, shared, usual
from minikd.testing.references import reference
from minikd.testing.scores import (
    BAD_LABELS,
    BAD_TEMPERATURES,
    BROKEN,
    EQUAL,
    GIVEN,
    HUGE,
    INF,
    LABELS,
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


def _hard_at_temperature(inputs: Inputs, attrs: Attributes) -> Any:
    """The distillation loss whose hard term is softened too."""
    t = inputs["temperature"]
    soft = expected("distillation_loss", {**inputs, "hard_weight": 0.0}, attrs)
    if inputs["target"] is None:
        return soft
    hard = reference("cross_entropy")(np.asarray(inputs["student_logits"], np.float64) / t, inputs["target"], None)
    return [soft[0] + inputs["hard_weight"] * hard[0], soft[1] + inputs["hard_weight"] * hard[1] / t]


def _reverse_soft_term(inputs: Inputs, attrs: Attributes) -> Any:
    """The distillation loss whose soft term is turned round."""
    hard = expected("distillation_loss", {**inputs, "soft_weight": 0.0}, attrs)
    soft = expected("reverse_kl", inputs, shared(attrs))
    return [a + inputs["soft_weight"] * b for a, b in zip(hard, soft, strict=True)]


def _of_the_likeliest_class(inputs: Inputs, attrs: Attributes) -> Any:
    target = np.asarray(inputs["target"])
    return expected("soft_cross_entropy", {**inputs, "target": np.eye(target.shape[1])[target.argmax(axis=1)]}, attrs)


def distillation_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """Of the loss 1 + log c for each weight, times T² for the soft one; of the gradient T·max(p, q), and 1."""
    n, c = np.shape(inputs["student_logits"])
    t, target = float(inputs["temperature"]), inputs["target"]
    labelled = 0 if target is None else int((np.asarray(target) != -100).sum())
    per_soft, per_hard = divisors(attrs, n, labelled)
    scaled = attrs.get("scale_t2", True)
    hard, soft = inputs["hard_weight"] if labelled else 0.0, inputs["soft_weight"]
    likely, (p, roundings) = likelier(inputs, t), rounded(inputs["student_logits"], 1.0)
    loss = hard * (np.log(c) + largest(p * roundings))
    loss += soft * (t * t if scaled else 1.0) * (np.log(c) + largest(likely))
    return [loss, hard * p * roundings / per_hard + soft * (t if scaled else 1 / t) * likely / per_soft]


def _cross_entropy_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    n, c = np.shape(inputs["logits"])
    labelled = int((np.asarray(inputs["target"]) != -100).sum())
    p, roundings = rounded(inputs["logits"], 1.0)
    gradient = (1 + p * roundings) / divisors(attrs, n, labelled)[1]
    return [1 + np.log(c) + largest(p * roundings), gradient]


def _soft_cross_entropy_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    n, c = np.shape(inputs["logits"])
    p, roundings = rounded(inputs["logits"], 1.0)
    target = np.asarray(inputs["target"], np.float64)
    per_row = divisors(attrs, n, n)[1]
    return [1 + np.log(c) + largest(target * roundings), (target + p * roundings) / per_row]


def _kl_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    return [1 + np.log(np.shape(inputs["input"])[1]), 0.0]


def _distillation_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    weights = st.sampled_from((0.5, 1.0, 0.3, 0.7))
    return st.builds(
        lambda batch, unlabelled, t, hard, soft: {
            "student_logits": batch.student,
            "teacher_logits": batch.teacher,
            "target": None if unlabelled else batch.target,
            "temperature": t,
            "hard_weight": hard,
            "soft_weight": soft,
        },
        batches(dtype=dtype, kind=kind, ignored=True),
        st.sampled_from((False, False, False, True)),
        temperatures(),
        weights,
        weights,
    )


def _cross_entropy_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    return batches(dtype=dtype, kind=kind, ignored=True).map(lambda b: {"logits": b.student, "target": b.target})


def _soft_cross_entropy_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    def soften(batch: Any) -> Inputs:
        with np.errstate(all="ignore"):
            return {"logits": batch.student, "target": softened(np, batch.teacher, 1.0)[0].astype(dtype)}

    return batches(dtype=dtype, kind=kind).map(soften)


def _kl_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    def soften(batch: Any) -> Inputs:
        with np.errstate(all="ignore"):
            log_p, q = softened(np, batch.student, 1.0)[1], softened(np, batch.teacher, 1.0)[0]
        return {"input": log_p.astype(dtype), "target": q.astype(dtype)}

    return batches(dtype=dtype, kind=kind).map(soften)


WEIGHTS: Inputs = {"temperature": 2.0, "hard_weight": 0.5, "soft_weight": 0.5}


def _distillation_edges() -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, target: Any = LABELS, **others: Any) -> Edge:
        logits = {"student_logits": student, "teacher_logits": teacher, "target": target}
        return Edge(name, {**logits, **WEIGHTS, **others})

    possible = {rows: np.array([0, 0])[: len(pair[0])] for rows, pair in pair_rows().items()}
    shared = [case(name, *pair, None if name == EQUAL else possible[name]) for name, pair in pair_rows().items()]
    return (
        case("two plain rows at T = 4", temperature=4.0),
        *shared,
        case("the student alone rules a class out: the loss is +inf", MASKED, TEACHER, None),
        case("the label is a class that the student rules out: the loss is +inf", MASKED, MASKED, np.array([1, 0])),
        case(
            "a weight of 0 leaves its term out, infinite as it may be",
            MASKED,
            MASKED,
            np.array([1, 0]),
            hard_weight=0.0,
        ),
        case("a weight of 0 for the soft term", MASKED, TEACHER, np.array([0, 1]), soft_weight=0.0),
        case("a row without a label feels the soft term alone", target=np.array([0, -100])),
        case("no row has a label", target=np.array([-100, -100])),
        case("no target at all", target=None),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


def _cross_entropy_edges() -> tuple[Edge, ...]:
    def case(name: str, rows: Any, target: Sequence[int]) -> Edge:
        return Edge(name, {"logits": np.asarray(rows), "target": np.array(target)})

    return (
        case("two plain rows", PLAIN, [0, 1]),
        case("a masked class (-inf): its gradient is 0, not NaN", MASKED, [0, 1]),
        case("the label is a masked class: the loss is +inf", MASKED, [1, 0]),
        case("logits of ±1e30", HUGE, [0, 0]),
        case("scores that lie far apart", [[0.0, 400.0, 800.0]], [0]),
        case("rows that lie far from one another", [[5000.0, 5001.0], [-5000.0, -5001.0]], [0, 0]),
        case("a row that is ignored", PLAIN, [0, -100]),
        case("every row is ignored: the loss is 0", PLAIN, [-100, -100]),
        case("a single class", [[3.0], [-2.0]], [0, 0]),
        *(case(name, broken(value), [0, 1]) for name, value in BROKEN.items()),
    )


def _soft_cross_entropy_edges() -> tuple[Edge, ...]:
    def case(name: str, rows: Any, *target: Sequence[float]) -> Edge:
        return Edge(name, {"logits": np.asarray(rows), "target": np.array(target)})

    certain = [1.0, 0.0, 0.0]
    return (
        case("two plain rows", PLAIN, [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]),
        case("a target that is certain", PLAIN, certain, certain),
        case("a masked class (-inf) with a target of 0: its gradient is 0, not NaN", MASKED, [0.5, 0.0, 0.5], certain),
        case("the target holds a masked class: the loss is +inf", MASKED, [0.5, 0.25, 0.25], certain),
        case("logits of ±1e30", HUGE, [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]),
        case("scores that lie far apart", [[0.0, 400.0, 800.0]], [0.5, 0.25, 0.25]),
        case("a single class", [[3.0], [-2.0]], [1.0], [1.0]),
        *(case(name, broken(value), certain, certain) for name, value in BROKEN.items()),
    )


def _kl_edges() -> tuple[Edge, ...]:
    log_p, q = np.log([[0.2, 0.3, 0.5]]), np.array([[0.6, 0.3, 0.1]])
    none = np.array([[-INF, np.log(0.5), np.log(0.5)]])
    return (
        Edge("a plain row", {"input": log_p, "target": q}),
        Edge("a target of 0 adds 0, not 0·log 0", {"input": log_p, "target": np.array([[0.0, 0.4, 0.6]])}),
        Edge("a class that both rule out adds 0, not 0·inf", {"input": none, "target": np.array([[0.0, 0.4, 0.6]])}),
        Edge("the student alone rules a class out: the loss is +inf", {"input": none, "target": q}),
    )


CONTRACTS = (
    Contract(
        *("cross_entropy", ("logits", "target"), GIVEN, EVERY_KIND, _cross_entropy_draw),
        edges=_cross_entropy_edges(),
        scale=_cross_entropy_scale,
        mistakes=(
            *usual("cross_entropy", "logits"),
            all_rows_counted("cross_entropy"),
        ),
        never_negative=True,
        refuses=BAD_LABELS,
    ),
    Contract(
        *("soft_cross_entropy", ("logits", "target"), GIVEN, EVERY_KIND, _soft_cross_entropy_draw),
        edges=_soft_cross_entropy_edges(),
        scale=_soft_cross_entropy_scale,
        mistakes=(
            *usual("soft_cross_entropy", "logits"),
            Mistake("the likeliest class alone is taken for the target", _of_the_likeliest_class),
        ),
        never_negative=True,
    ),
    Contract(
        *("kl_div", ("input", "target"), GIVEN, EVERY_KIND, _kl_draw),
        edges=_kl_edges(),
        scale=_kl_scale,
        mistakes=usual("kl_div", "input"),
    ),
    Contract(
        "distillation_loss",
        ("student_logits", "teacher_logits", "target", "temperature", "hard_weight", "soft_weight"),
        *(GIVEN, EVERY_KIND, _distillation_draw),
        edges=_distillation_edges(),
        scale=distillation_scale,
        mistakes=(
            *pair_mistakes("distillation_loss"),
            Mistake(
                "hard_weight and soft_weight are exchanged",
                changed("distillation_loss", exchanged_values("hard_weight", "soft_weight")),
            ),
            Mistake("the hard term is softened by the temperature too", _hard_at_temperature),
            Mistake("the reverse KL is taken: KL(student ‖ teacher)", _reverse_soft_term),
        ),
        never_negative=True,
        refuses=(*BAD_TEMPERATURES, *BAD_LABELS),
    ),
)
