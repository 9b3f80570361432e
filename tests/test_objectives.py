"""Objectives: every term of the table against its formula, its gradient, and itself in a compiled step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, MinikdError, ShapeError
from minikd.objectives import (
    DIST,
    IGNORED,
    NAMES,
    PRESETS,
    Attention,
    Batch,
    ConfidentSoftLabels,
    CorrectedSoftLabels,
    DecoupledKD,
    HardLabels,
    Hints,
    JensenShannon,
    LogitRegression,
    Objective,
    RelationalAngle,
    RelationalDistance,
    ReverseKL,
    SkewedKL,
    SoftCrossEntropy,
    SoftLabels,
    StandardisedLabels,
    Sum,
    TeacherFree,
    Term,
    TotalVariation,
    as_target,
    parse,
    preset,
)
from minikd.objectives.__main__ import page

# --- what is compared, and the formulas in NumPy ---


class Data(NamedTuple):
    """A batch in float64: logits, labels (two rows without one), and what a layer of each network put out."""

    student: np.ndarray
    teacher: np.ndarray
    target: np.ndarray
    student_features: dict[str, np.ndarray]
    teacher_features: dict[str, np.ndarray]

    @property
    def labelled(self) -> np.ndarray:
        return np.flatnonzero(self.target != IGNORED)

    def batch(self, requires_grad: bool = False, dtype: Any = np.float64) -> Batch:
        ours, theirs = self.student_features, self.teacher_features
        return Batch(
            kd.Tensor(self.student.astype(dtype), requires_grad=requires_grad),
            self.teacher.astype(dtype),
            self.target,
            {k: kd.Tensor(v.astype(dtype), requires_grad=requires_grad) for k, v in ours.items()},
            {k: v.astype(dtype) for k, v in theirs.items()},
        )

    def agreed(self) -> Data:
        """The same with a student that is its teacher."""
        return self._replace(student=self.teacher, student_features=self.teacher_features)


def data(seed: int = 0, n: int = 7, c: int = 5) -> Data:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, c, n)
    target[[1, n - 1]] = IGNORED
    student, teacher = 2 * rng.normal(size=(2, n, c))
    features = rng.normal(size=(2, n, 4))
    return Data(
        student, teacher, target, {"1": features[0], "2": student}, {"1": features[1], "3": rng.normal(size=(n, 6))}
    )


def softmax(z: np.ndarray, t: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(axis=1, keepdims=True)) / t)
    return e / e.sum(axis=1, keepdims=True)


def kl(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.sum(q * (np.log(q) - np.log(p)), axis=1)


def cross_entropy(z: np.ndarray, target: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    y = (1 - smoothing) * np.eye(z.shape[1])[target] + smoothing / z.shape[1]
    return -np.sum(y * np.log(softmax(z)), axis=1)


def hard(d: Data, smoothing: float = 0.0) -> float:
    rows = d.labelled
    return cross_entropy(d.student[rows], d.target[rows], smoothing).mean()


def weighted_hard(d: Data, weights: np.ndarray) -> float:
    rows = d.labelled
    each = weights[d.target[rows]]
    return (each * cross_entropy(d.student[rows], d.target[rows])).sum() / each.sum()


def soft(d: Data, t: float) -> float:
    return t * t * kl(softmax(d.teacher, t), softmax(d.student, t)).mean()


def mixed(d: Data, beta: float, t: float) -> float:
    p, q = softmax(d.student, t), softmax(d.teacher, t)
    m = beta * q + (1 - beta) * p
    return t * t * (beta * kl(q, m) + (1 - beta) * kl(p, m)).mean()


def skewed(d: Data, alpha: float, t: float, reverse: bool) -> float:
    p, q = softmax(d.student, t), softmax(d.teacher, t)
    q, p = (p, q) if reverse else (q, p)
    return t * t * kl(q, alpha * q + (1 - alpha) * p).mean()


def soft_cross_entropy(d: Data, t: float) -> float:
    return -t * t * np.sum(softmax(d.teacher, t) * np.log(softmax(d.student, t)), axis=1).mean()


def decoupled(d: Data, alpha: float, beta: float, t: float) -> float:
    found = []
    for row in d.labelled:
        p, q = (softmax(z[row : row + 1], t)[0] for z in (d.student, d.teacher))
        y = d.target[row]
        other = np.delete(np.arange(len(p)), y)
        pair = [np.array([[x[y], 1 - x[y]]]) for x in (q, p)]
        rest = [(x[other] / x[other].sum())[None] for x in (q, p)]
        found.append(alpha * kl(*pair)[0] + beta * kl(*rest)[0])
    return t * t * float(np.mean(found))


def standardised(d: Data, t: float) -> float:
    def z(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-7)

    return t * t * kl(softmax(z(d.teacher), t), softmax(z(d.student), t)).mean()


def confident(d: Data, t: float, by: str) -> float:
    q = softmax(d.teacher)
    if by == "entropy":
        weight = 1 + np.sum(q * np.log(q), axis=1) / math.log(q.shape[1])
    else:
        weight = np.where(d.target == IGNORED, q.max(axis=1), q[np.arange(len(q)), np.maximum(d.target, 0)])
    return t * t * (weight * kl(softmax(d.teacher, t), softmax(d.student, t))).mean()


def corrected(d: Data, t: float) -> float:
    teacher = d.teacher.copy()
    for row in d.labelled:
        y, top = d.target[row], d.teacher[row].argmax()
        teacher[row, [y, top]] = d.teacher[row, [top, y]]
    return soft(d._replace(teacher=teacher), t)


def teacher_free(d: Data, correct: float, t: float) -> float:
    c = d.student.shape[1]
    rows = d.labelled
    virtual = np.full((len(rows), c), (1 - correct) / (c - 1))
    virtual[np.arange(len(rows)), d.target[rows]] = correct
    return t * t * kl(softmax(np.log(virtual), t), softmax(d.student[rows], t)).mean()


def logit_regression(d: Data, centred: bool) -> float:
    difference = d.student - d.teacher
    difference = difference - difference.mean(axis=1, keepdims=True) if centred else difference
    return 0.5 * (difference**2).mean()


def dist(d: Data, inter: float, intra: float, t: float) -> float:
    def one_minus(a: np.ndarray, b: np.ndarray) -> float:
        return 1 - float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))

    p, q = softmax(d.student, t), softmax(d.teacher, t)
    return t * t * (inter * one_minus(p, q) + intra * one_minus(p.T, q.T))


def huber(x: np.ndarray) -> float:
    return float(np.where(abs(x) <= 1, x * x / 2, abs(x) - 0.5).mean())


def distances(a: np.ndarray, b: np.ndarray) -> float:
    def scaled(x: np.ndarray) -> np.ndarray:
        d = np.linalg.norm(x[:, None] - x[None], axis=2)
        return d / d[d > 0].mean()

    return huber(scaled(a) - scaled(b))


def angles(a: np.ndarray, b: np.ndarray) -> float:
    def cosines(x: np.ndarray) -> np.ndarray:
        e = x[None] - x[:, None]
        length = np.linalg.norm(e, axis=2, keepdims=True)
        e = e / np.where(length == 0, 1, length)
        return np.einsum("jik,jlk->jil", e, e)

    return huber(cosines(a) - cosines(b))


def attention(a: np.ndarray, b: np.ndarray, power: float) -> float:
    def pattern(x: np.ndarray) -> np.ndarray:
        return abs(x) ** power / np.linalg.norm(abs(x) ** power, axis=1, keepdims=True)

    return float(((pattern(a) - pattern(b)) ** 2).mean())


def plain_hints(d: Data) -> float:
    return 0.5 * ((d.student_features["1"] - d.teacher_features["1"]) ** 2).mean()


class Case(NamedTuple):
    """A term, its formula, and whether it is 0 where the student is its teacher."""

    text: str
    expected: Callable[[Data], float]
    zero: bool = True

    def term(self) -> Term:
        (term,) = parse(self.text).terms
        return term

    def ready(self, d: Data) -> Term:
        """The term, prepared for such batches."""
        term = self.term()
        term.prepare(d.batch())
        return term


WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 3.0])
CASES = [
    Case("HardLabels()", hard, zero=False),
    Case("HardLabels(label_smoothing=0.2)", lambda d: hard(d, 0.2), zero=False),
    Case("HardLabels(class_weights=(1, 0.5, 2, 0, 3))", lambda d: weighted_hard(d, WEIGHTS), zero=False),
    Case("SoftLabels()", lambda d: soft(d, 4)),
    Case("SoftLabels(temperature=3, scale_t2=False)", lambda d: soft(d, 3) / 9),
    Case("SoftCrossEntropy()", lambda d: soft_cross_entropy(d, 4), zero=False),
    Case("SoftCrossEntropy(temperature=3, scale_t2=False)", lambda d: soft_cross_entropy(d, 3) / 9, zero=False),
    Case("LogitRegression()", lambda d: logit_regression(d, True)),
    Case("LogitRegression(centred=False)", lambda d: logit_regression(d, False)),
    Case("ReverseKL()", lambda d: kl(softmax(d.student), softmax(d.teacher)).mean()),
    Case("ReverseKL(temperature=3)", lambda d: 9 * kl(softmax(d.student, 3), softmax(d.teacher, 3)).mean()),
    Case("JensenShannon()", lambda d: mixed(d, 0.5, 1)),
    Case("JensenShannon(beta=0.2, temperature=2)", lambda d: mixed(d, 0.2, 2)),
    Case("JensenShannon(beta=0.2, form='continuous', temperature=2)", lambda d: mixed(d, 0.2, 2) / 0.16),
    Case("JensenShannon(beta=0, form='continuous', temperature=2)", lambda d: soft(d, 2)),
    Case("SkewedKL()", lambda d: skewed(d, 0.1, 1, False)),
    Case("SkewedKL(alpha=0.3, temperature=2)", lambda d: skewed(d, 0.3, 2, False)),
    Case("SkewedKL(alpha=0.3, reverse=True, temperature=2)", lambda d: skewed(d, 0.3, 2, True)),
    Case("TotalVariation()", lambda d: 0.5 * abs(softmax(d.student) - softmax(d.teacher)).sum(axis=1).mean()),
    Case(
        "TotalVariation(temperature=3)",
        lambda d: 0.5 * abs(softmax(d.student, 3) - softmax(d.teacher, 3)).sum(axis=1).mean(),
    ),
    Case("DecoupledKD()", lambda d: decoupled(d, 1, 8, 4)),
    Case("DecoupledKD(alpha=0.5, beta=2, temperature=2)", lambda d: decoupled(d, 0.5, 2, 2)),
    Case("StandardisedLabels()", lambda d: standardised(d, 2)),
    Case("StandardisedLabels(temperature=1)", lambda d: standardised(d, 1)),
    Case("ConfidentSoftLabels()", lambda d: confident(d, 4, "entropy")),
    Case("ConfidentSoftLabels(temperature=2, by='label')", lambda d: confident(d, 2, "label")),
    Case("CorrectedSoftLabels()", lambda d: corrected(d, 4), zero=False),
    Case("TeacherFree()", lambda d: teacher_free(d, 0.9, 20), zero=False),
    Case("TeacherFree(correct=0.6, temperature=2)", lambda d: teacher_free(d, 0.6, 2), zero=False),
    Case("DIST()", lambda d: dist(d, 1, 1, 1)),
    Case("DIST(temperature=4, inter=2, intra=0.5)", lambda d: dist(d, 2, 0.5, 4)),
    Case("RelationalDistance()", lambda d: distances(d.student, d.teacher)),
    Case(
        "RelationalDistance(layers=('1', '3'))",
        lambda d: distances(d.student_features["1"], d.teacher_features["3"]),
        zero=False,
    ),
    Case("RelationalAngle()", lambda d: angles(d.student, d.teacher)),
    Case(
        "RelationalAngle(layers=('1', '3'))",
        lambda d: angles(d.student_features["1"], d.teacher_features["3"]),
        zero=False,
    ),
    Case("Hints(project=False)", plain_hints),
    Case("Attention()", lambda d: attention(d.student_features["1"], d.teacher_features["1"], 2)),
    Case("Attention(power=1)", lambda d: attention(d.student_features["1"], d.teacher_features["1"], 1)),
    Case("Attention(power=3)", lambda d: attention(d.student_features["1"], d.teacher_features["1"], 3)),
]
# Cases without a formula of the data alone: a projection takes part.
LEARNING = [Case("Hints()", lambda d: math.nan, zero=False), Case('Hints(pairs=(("1", "3"), ("2", "1")))', plain_hints)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.text)
each_term = pytest.mark.parametrize("case", CASES + LEARNING, ids=lambda c: c.text)


def of_kind(*kinds: type[Term]) -> list[Case]:
    return [case for case in CASES if isinstance(case.term(), kinds)]


# --- the table ---


def test_every_term_of_the_table_is_tested() -> None:
    assert {type(case.term()) for case in CASES + LEARNING} == set(NAMES.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_term_has_its_formula_and_its_source(name: str) -> None:
    kind = NAMES[name]
    assert kind.formula
    assert kind.source
    assert kind.needs
    assert kind.needs <= {"labels", "teacher"}


def test_the_page_of_objectives_is_up_to_date() -> None:
    written = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text("utf-8")
    assert written == page(), "run: python -m minikd.objectives > docs/objectives.md"


def test_the_page_names_every_term_and_every_preset() -> None:
    titles = [line for line in page().splitlines() if line.startswith("#")]
    assert [f"## {name}" for name in NAMES] == titles[1 : 1 + len(NAMES)]
    assert titles[-len(PRESETS) :] == [f"## preset({name!r})" for name in PRESETS]


# --- values and gradients ---


@each_case
@pytest.mark.parametrize("seed", [0, 1])
def test_a_term_is_its_formula(case: Case, seed: int) -> None:
    d = data(seed)
    assert case.term()(d.batch()).item() == pytest.approx(case.expected(d), rel=1e-6 if "DIST" in case.text else 1e-9)


@each_case
def test_a_term_counts_with_its_weight(case: Case) -> None:
    d, term = data(), case.term()
    assert term.replaced("weight", 3.0)(d.batch()).item() == pytest.approx(3 * term(d.batch()).item(), rel=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.zero], ids=lambda c: c.text)
def test_a_student_that_is_its_teacher_costs_nothing(case: Case) -> None:
    tolerance = 1e-4 if "DIST" in case.text else 1e-12  # the published 1e-8 beside the lengths
    assert abs(case.term()(data().agreed().batch()).item()) <= tolerance


def slopes(loss: Callable[[], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of the loss in every element of x, which is changed in place."""
    found = np.empty_like(x)
    for place in np.ndindex(x.shape):
        kept = x[place]
        values = []
        for moved in (kept + h, kept - h):
            x[place] = moved
            values.append(loss())
        x[place] = kept
        found[place] = (values[0] - values[1]) / (2 * h)
    return found


@each_term
def test_the_gradient_through_a_linear_model_is_the_slope(case: Case) -> None:
    d = data(3)
    rng = np.random.default_rng(4)
    x, w, v = rng.normal(size=(7, 3)), rng.normal(size=(3, 5)), rng.normal(size=(3, 4))
    term = case.ready(d)

    def loss(w: Any, v: Any) -> Any:
        logits, hidden = kd.Tensor(x) @ w, kd.Tensor(x) @ v
        return term(Batch(logits, d.teacher, d.target, {"1": hidden, "2": logits}, d.teacher_features))

    tensors = [kd.Tensor(w, requires_grad=True), kd.Tensor(v, requires_grad=True)]
    loss(*tensors).backward()
    wanted = [slopes(lambda: loss(kd.Tensor(w), kd.Tensor(v)).item(), values) for values in (w, v)]
    for p in term.parameters():
        wanted.append(slopes(lambda: loss(kd.Tensor(w), kd.Tensor(v)).item(), p.array))
    assert any(np.abs(slope).max() > 1e-4 for slope in wanted)
    for tensor, slope in zip([*tensors, *term.parameters()], wanted, strict=True):
        found = np.zeros_like(slope) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(found, slope, rtol=1e-6, atol=2e-9)


@each_term
def test_in_float32_a_term_is_near_its_value_in_float64(case: Case) -> None:
    d, term = data(), case.ready(data())
    for p in term.parameters():
        p.array = p.array.astype(np.float32).astype(np.float64)
    exact = term(d.batch()).item()
    single = parse(case.text).terms[0]
    single.prepare(d.batch(dtype=np.float32))
    for ours, theirs in zip(single.parameters(), term.parameters(), strict=True):
        ours.array = theirs.array.astype(np.float32)
    found = single(d.batch(dtype=np.float32))
    assert found.dtype == np.float32
    assert found.item() == pytest.approx(exact, rel=3e-5, abs=1e-6)


@pytest.mark.parametrize(("text", "expected"), [("ReverseKL()", 0.12782196266), ("SoftLabels()", 0.22308525458)])
def test_the_published_example_has_its_value(text: str, expected: float) -> None:
    student = kd.Tensor(np.array([[2, 1, 0.1], [0.5, 2.5, -1]]))
    teacher = np.array([[3, 0.5, -0.5], [0, 3, 0]])
    assert parse(text)(Batch(student, teacher)).item() == pytest.approx(expected, abs=1e-11)


def test_soft_cross_entropy_has_the_gradient_of_soft_labels_and_takes_classes_that_a_teacher_rules_out() -> None:
    d = data()
    teacher = d.teacher.copy()
    teacher[:, 2] = -np.inf
    batches = [d._replace(teacher=teacher).batch(requires_grad=True) for _ in "ab"]
    for batch, term in zip(batches, (SoftLabels(), SoftCrossEntropy()), strict=True):
        loss = term(batch)
        assert math.isfinite(loss.item())
        loss.backward()
    np.testing.assert_array_equal(*(batch.student_logits.grad.numpy() for batch in batches))


def test_rows_that_are_the_same_have_relations_with_finite_gradients() -> None:
    d = data()
    student = np.repeat(d.student[:1], 7, axis=0)
    for term in (RelationalDistance(), RelationalAngle(), DIST()):
        for dtype in (np.float32, np.float64):
            batch = d._replace(student=student).batch(requires_grad=True, dtype=dtype)
            loss = term(batch)
            loss.backward()
            assert math.isfinite(loss.item())
            assert np.isfinite(batch.student_logits.grad.numpy()).all()


def test_two_equal_rows_far_from_zero_spoil_no_angle_in_float32() -> None:
    d = data()
    student = d.student + 100
    student[3] = student[0]
    found = RelationalAngle()(d._replace(student=student).batch(dtype=np.float32)).item()
    between_equal_rows = 2 * 0.5 / 7**3  # from one to the other and back: a cosine of 1 here, of 0 in the formula
    assert found == pytest.approx(angles(student, d.teacher) - between_equal_rows, rel=2e-3)


def test_a_single_row_has_no_relations() -> None:
    d = data()
    for term in (RelationalDistance(), RelationalAngle()):
        batch = Batch(kd.Tensor(d.student[:1], requires_grad=True), d.teacher[:1])
        loss = term(batch)
        loss.backward()
        assert loss.item() == 0
        assert not batch.student_logits.grad.numpy().any()


def test_layers_without_activity_have_an_attention_with_a_finite_gradient() -> None:
    d = data()
    batch = d._replace(student_features={"1": np.zeros((7, 4))}).batch(requires_grad=True)
    Attention()(batch).backward()
    assert np.isfinite(batch.student_features["1"].grad.numpy()).all()


@given(st.floats(0.3, 0.999), st.floats(0.5, 50), st.integers(2, 12))
def test_the_virtual_teacher_is_the_softened_distribution(correct: float, temperature: float, classes: int) -> None:
    correct = max(correct, 1 / classes)
    one, others = TeacherFree(correct=correct, temperature=temperature).virtual_teacher(classes)
    given_logits = np.log([[correct] + [(1 - correct) / (classes - 1)] * (classes - 1)])
    np.testing.assert_allclose(softmax(given_logits, temperature)[0], [one] + [others] * (classes - 1), rtol=1e-9)


def test_a_virtual_teacher_that_is_sure_is_the_label() -> None:
    d = data()
    rows = d.labelled
    term = TeacherFree(correct=1, temperature=2, scale_t2=False)
    assert term(d.batch()).item() == pytest.approx(cross_entropy(d.student[rows] / 2, d.target[rows]).mean(), rel=1e-12)


# --- labels ---

ONLY_LABELLED = (HardLabels, TeacherFree, DecoupledKD)


def gradients(term: Term, d: Data) -> list[np.ndarray]:
    """The gradient with respect to everything of the student that the term looks at."""
    batch = d.batch(requires_grad=True)
    term(batch).backward()
    tensors = [batch.student_logits, *batch.student_features.values()]
    return [t.grad.numpy() for t in tensors if t.grad is not None]


@each_term
def test_rows_without_a_label_feel_the_soft_terms_and_only_them(case: Case) -> None:
    d, term = data(), case.ready(data())
    unlabelled = d.target == IGNORED
    felt = any(gradient[unlabelled].any(axis=1).all() for gradient in gradients(term, d))
    assert felt == (not isinstance(term, ONLY_LABELLED))
    assert any(gradient[~unlabelled].any() for gradient in gradients(term, d))


@pytest.mark.parametrize("case", of_kind(*ONLY_LABELLED), ids=lambda c: c.text)
def test_a_batch_without_labels_costs_nothing_in_terms_of_labels(case: Case) -> None:
    d = data()._replace(target=np.full(7, IGNORED))
    assert case.term()(d.batch()).item() == 0
    assert not any(gradient.any() for gradient in gradients(case.term(), d))


@each_term
def test_a_term_looks_at_no_more_than_it_says_that_it_needs(case: Case) -> None:
    d, term = data(), case.ready(data())
    batch = d.batch()
    if "teacher" not in term.needs:
        batch = dataclasses.replace(batch, teacher_logits=None, teacher_features={})
    if "labels" not in term.needs:
        batch = dataclasses.replace(batch, target=None)
    batch = dataclasses.replace(
        batch,
        student_features={k: v for k, v in batch.student_features.items() if k in term.student_layers},
        teacher_features={k: v for k, v in batch.teacher_features.items() if k in term.teacher_layers},
    )
    assert term(batch).item() == term(d.batch()).item()


def test_minus_one_in_a_data_set_is_no_label() -> None:
    np.testing.assert_array_equal(as_target(np.array([0, -1, 2], np.int8)), [0, IGNORED, 2])


# --- in a compiled step ---


def scheduled(case: Case) -> Term:
    """The term with a schedule for everything that can have one."""
    term = case.term()
    names = [f.name for f in dataclasses.fields(term) if f.name.endswith("_schedule")]
    return dataclasses.replace(term, weight=0.7, **dict.fromkeys(names, "linear(1, 0.5)"))


@each_term
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_compiled_step_gives_the_same_bits(case: Case, dtype: Any) -> None:
    """Batches are gathered, weight and temperature vary from step to step, and what a term learns learns."""
    rng = np.random.default_rng(5)
    n = 24
    d = data(5, n=n)
    x, logits = rng.normal(size=(n, 3)).astype(dtype), d.teacher.astype(dtype)
    features = {k: v.astype(dtype) for k, v in d.teacher_features.items()}

    def trained(compiled: bool) -> tuple[list[float], list[np.ndarray]]:
        objective = scheduled(case)
        model = kd.nn.MLP([3, 4, 5], activation="tanh", seed=1, dtype=dtype)

        def batch(rows: Any) -> Batch:
            names = objective.student_layers
            out = model(F.take(x, rows), features=names) if names else (model(F.take(x, rows)), {})
            theirs = {name: F.take(features[name], rows) for name in objective.teacher_layers}
            return Batch(out[0], F.take(logits, rows), F.take(d.target, rows), out[1], theirs)

        objective.prepare(batch(np.arange(8)))
        opt = kd.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.05)

        def step(rows: Any, *numbers: Any) -> Any:
            loss = objective.at(numbers)(batch(rows))
            opt.zero_grad()
            loss.backward()
            opt.step()
            return loss

        run = kd.compile(step) if compiled else step
        order = np.random.default_rng(6)
        losses = []
        for k in range(4):
            numbers = [np.array(varying.at(k / 4)) for varying in objective.varying()]
            losses.append(float(run(order.permutation(n)[:8], *numbers).item()))
        if compiled:
            assert len(run.plans) == 1
        return losses, [p.array.copy() for p in opt.arena.parameters]

    eager, plan = trained(False), trained(True)
    assert eager[0] == plan[0]
    for ours, theirs in zip(eager[1], plan[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- sums, schedules and texts ---


def test_a_sum_is_the_weighted_sum_of_its_terms() -> None:
    d = data()
    objective: Objective = HardLabels(0.3, label_smoothing=0.1) + SoftLabels(0.7) + DIST(2) + RelationalDistance(25)
    total = sum(float(term.weight) * term.value(d.batch()).item() for term in objective.terms)
    assert objective(d.batch()).item() == pytest.approx(total, rel=1e-12)
    assert isinstance(objective, Sum)


def test_the_order_of_a_sum_changes_nothing_but_rounding() -> None:
    d = data()
    terms = [HardLabels(0.3), ReverseKL(0.2), SoftLabels(0.7), TotalVariation(0.1)]
    assert Sum(terms)(d.batch()).item() == pytest.approx(Sum(terms[::-1])(d.batch()).item(), rel=1e-12)


def test_hard_labels_with_class_weights_are_added_by_themselves() -> None:
    d = data()
    objective = HardLabels(0.3, class_weights=(1, 0.5, 2, 0, 3)) + SoftLabels(0.7)
    expected = 0.3 * weighted_hard(d, WEIGHTS) + 0.7 * soft(d, 4)
    assert objective(d.batch()).item() == pytest.approx(expected, rel=1e-12)


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(ArgumentError, match="one term at least"):
        Sum([])


def test_a_schedule_multiplies_what_was_configured() -> None:
    d = data()
    objective = HardLabels(0.5, weight_schedule="linear(1, 0)") + SoftLabels(
        2, temperature=4, temperature_schedule="linear(1, 0.5)"
    )
    assert [(v.name, v.configured) for v in objective.varying()] == [("weight", 0.5), ("temperature", 4.0)]
    halfway = objective.at([v.at(0.5) for v in objective.varying()])
    assert halfway(d.batch()).item() == pytest.approx(0.25 * hard(d) + 2 * soft(d, 3), rel=1e-12)
    assert objective(d.batch()).item() == pytest.approx(0.5 * hard(d) + 2 * soft(d, 4), rel=1e-12)


def test_an_objective_says_what_it_needs() -> None:
    objective = HardLabels() + Hints(pairs=(("1", "3"), ("1", "5"))) + RelationalAngle(layers=("2", "5"))
    assert objective.needs_labels
    assert objective.needs_teacher
    assert objective.student_layers == ("1", "2")
    assert objective.teacher_layers == ("3", "5")
    assert not TeacherFree().needs_teacher
    assert not ConfidentSoftLabels().needs_labels
    assert ConfidentSoftLabels(by="label").needs_labels
    assert RelationalAngle().student_layers == ()


@each_term
def test_a_term_is_what_its_text_says(case: Case) -> None:
    term = case.term()
    assert type(term) is NAMES[term.name]
    again = parse(str(term))
    assert str(again) == str(term)
    assert [vars(t) for t in again.terms] == [vars(t) for t in term.terms]


def test_a_sum_is_what_its_text_says() -> None:
    text = "HardLabels(0.3) + DIST(2, temperature=4) + Attention(pairs=(('1', '1'), ('2', '3')))"
    assert str(parse(text)) == text


def test_one_pair_of_layers_needs_no_second_pair_of_brackets() -> None:
    assert Hints(pairs=("1", "3")).pairs == (("1", "3"),)
    assert Attention(pairs=["1", "3"]).pairs == (("1", "3"),)
    assert parse("Hints(pairs=[['1', '3'], ['10', '12']])").terms[0].pairs == (("1", "3"), ("10", "12"))


# --- what is learned along ---


def test_a_projection_is_made_once_and_shared_by_the_same_term_with_other_numbers() -> None:
    d, term = data(), Hints(pairs=("1", "3"))
    assert term.parameters() == []
    term.prepare(d.batch())
    weight, bias = term.parameters()
    assert weight.shape == (6, 4)
    assert bias.shape == (6,)
    term.prepare(d.batch())
    assert term.parameters()[0] is weight
    assert term.replaced("weight", 2.0).parameters()[0] is weight


def test_the_value_of_hints_is_that_of_the_projected_layer() -> None:
    d, term = data(), Hints(pairs=("1", "3"))
    term.prepare(d.batch())
    w, b = (p.array for p in term.parameters())
    expected = 0.5 * ((d.student_features["1"] @ w.T + b - d.teacher_features["3"]) ** 2).mean()
    assert term(d.batch()).item() == pytest.approx(expected, rel=1e-12)


def test_the_seed_decides_the_projection_and_the_student_its_dtype() -> None:
    d = data()
    made = []
    for seed, dtype in ((0, np.float32), (0, np.float32), (1, np.float32)):
        term = Hints(pairs=("1", "3"), seed=seed)
        term.prepare(d.batch(dtype=dtype))
        made.append(term.parameters()[0].array)
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()
    assert made[0].dtype == np.float32


# --- refusals ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SoftLabels(-1)", "weight must be a finite number from 0"),
        ("HardLabels(label_smoothing=2)", "label_smoothing must be between 0 and 1"),
        ("HardLabels(class_weights=(1, -1))", "class_weights must be a finite number from 0"),
        ("SoftLabels(temperature=0)", "temperature must be a finite number above 0"),
        ("TotalVariation(temperature=-1)", "temperature must be a finite number above 0"),
        ("SoftLabels(weight_schedule='nonsense()')", "weight_schedule"),
        ("JensenShannon(beta=0)", "above 0 and below 1.*use SoftLabels, ReverseKL"),
        ("JensenShannon(beta=1)", "above 0 and below 1"),
        ("JensenShannon(beta=2, form='continuous')", "between 0 and 1"),
        ("JensenShannon(form='other')", "'paper' or 'continuous'"),
        ("SkewedKL(alpha=1)", r"in \[0, 1\)"),
        ("DecoupledKD(beta=-1)", "beta must be a finite number from 0"),
        ("ConfidentSoftLabels(by='size')", "'entropy' or 'label'"),
        ("TeacherFree(correct=0)", r"correct must be in \(0, 1\]"),
        ("TeacherFree(temperature=0)", "temperature must be a finite number above 0"),
        ("DIST(inter=-1)", "inter must be a finite number from 0"),
        ("RelationalAngle(layers='12')", "a pair of names"),
        ("Hints(pairs=())", "pairs of layers such as"),
        ("Hints(pairs=(('1',),))", "pairs of layers such as"),
        ("Attention(power=0.5)", "a finite number from 1"),
        ("SoftLabel()", "Did you mean SoftLabels()?"),
        ("SoftLabels(temperatur=3)", "temperatur"),
        ("preset('karas')", 'Did you mean "keras"?'),
        ("preset('keras', T=3)", "among those of keras: alpha, temperature, scale_t2"),
        ("preset('keras', alpha=2)", "alpha must be between 0 and 1"),
        ("preset('torchdistill', alpha=2)", "alpha must be between 0 and 1"),
        ("preset('textbrewer', kd_loss_type='l1')", "'ce' or 'mse'"),
        ("preset('textbrewer', kd_loss_type='mse', temperature=0)", "a finite number above 0"),
        ("preset('textbrewer', kd_loss_weight=0)", "not all 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(MinikdError, match=words.replace("()?", r"\(\)\?")):
        parse(text)


@each_case
def test_a_batch_without_what_a_term_needs_is_refused_in_words(case: Case) -> None:
    term, batch = case.term(), data().batch()
    lacking = {"labels": {"target": None}, "teacher": {"teacher_logits": None, "teacher_features": {}}}
    for need in term.needs:
        for objective in (term, HardLabels() + SoftLabels() + term):
            with pytest.raises(ArgumentError, match=r"the batch's target|the batch's teacher_logits|teacher_features"):
                objective(dataclasses.replace(batch, **lacking[need]))


def test_two_classes_are_too_few_to_be_decoupled() -> None:
    d = data(c=2)
    with pytest.raises(ArgumentError, match=r"3 classes or more, got 2 classes\. .*use that"):
        DecoupledKD()(d.batch())


def test_a_virtual_teacher_below_a_class_s_share_is_refused() -> None:
    with pytest.raises(ArgumentError, match="correct must be at least 1/5"):
        TeacherFree(correct=0.1)(data().batch())


def test_layers_of_different_width_need_a_projection() -> None:
    d = data()
    for term in (Attention(pairs=("1", "3")), Hints(pairs=("1", "3"), project=False)):
        with pytest.raises(ShapeError, match=r"equally wide layers.*projection"):
            term(d.batch())


def test_hints_ask_to_be_prepared() -> None:
    with pytest.raises(ArgumentError, match=r"prepared with a batch.*prepare\(batch\)"):
        Hints()(data().batch())


def test_hints_refuse_a_batch_of_other_widths_than_they_were_prepared_for() -> None:
    d, term = data(), Hints()
    term.prepare(d.batch())
    wider = d._replace(student_features={"1": np.zeros((7, 9))})
    with pytest.raises(ShapeError, match="that it was prepared for"):
        term.prepare(wider.batch())


def test_a_layer_that_the_batch_lacks_is_named() -> None:
    d = data()
    with pytest.raises(ArgumentError, match=r"student_features must be with the output of layer '9'.*'1', '2'"):
        Attention(pairs=("9", "1"))(d.batch())
    with pytest.raises(ArgumentError, match=r"teacher_features.*no layers"):
        RelationalAngle(layers=("1", "1"))(d._replace(teacher_features={}).batch())
    with pytest.raises(ShapeError, match=r"of shape \(n, k\) at layer '1'"):
        Attention()(d._replace(student_features={"1": np.zeros((7, 2, 2))}).batch())


# --- other toolkits ---


def batch_mean_kl(d: Data, t: float) -> float:
    """Σ over all elements of q·(log q - log p), divided by the number of rows, as "batchmean" has it."""
    p, q = softmax(d.student, t), softmax(d.teacher, t)
    return float((q * (np.log(q) - np.log(p))).sum() / len(q))


def preset_cases() -> list[tuple[str, Callable[[Data], float]]]:
    def mse(d: Data, t: float) -> float:
        return float(((d.student / t - d.teacher / t) ** 2).mean())

    def soft_ce(d: Data, t: float) -> float:
        return float(-(softmax(d.teacher, t) * np.log(softmax(d.student, t))).sum(axis=-1).mean())

    return [
        ("preset('hinton')", lambda d: 0.5 * hard(d) + 4 * batch_mean_kl(d, 2)),
        ("preset('hinton', temperature=20, hard_weight=0)", lambda d: 400 * batch_mean_kl(d, 20)),
        ("preset('torchdistill')", lambda d: 0.5 * hard(d) + 0.5 * batch_mean_kl(d, 1)),
        (
            "preset('torchdistill', temperature=4, alpha=0.1)",
            lambda d: 0.1 * hard(d) + 0.9 * 16 * batch_mean_kl(d, 4),
        ),
        (
            "preset('torchdistill', temperature=4, alpha=1, beta=2)",
            lambda d: hard(d) + 2 * 16 * batch_mean_kl(d, 4),
        ),
        ("preset('torchdistill', temperature=4, alpha=0)", lambda d: batch_mean_kl(d, 4)),
        ("preset('repdistiller')", lambda d: 0.1 * hard(d) + 0.9 * 16 * batch_mean_kl(d, 4)),
        (
            "preset('repdistiller', gamma=1, alpha=0, beta=0.5, other=RelationalDistance(25) + RelationalAngle(50))",
            lambda d: hard(d) + 0.5 * (25 * distances(d.student, d.teacher) + 50 * angles(d.student, d.teacher)),
        ),
        ("preset('repdistiller', beta=1)", lambda d: 0.1 * hard(d) + 1.9 * 16 * batch_mean_kl(d, 4)),
        ("preset('textbrewer')", lambda d: soft_ce(d, 4)),
        (
            "preset('textbrewer', temperature=8, kd_loss_weight=0.5, hard_label_weight=1)",
            lambda d: hard(d) + 0.5 * soft_ce(d, 8),
        ),
        ("preset('textbrewer', kd_loss_type='mse', kd_loss_weight=3)", lambda d: 3 * mse(d, 4)),
        ("preset('keras')", lambda d: 0.1 * hard(d) + 0.9 * 9 * batch_mean_kl(d, 3)),
        (
            "preset('keras', temperature=10, scale_t2=False)",
            lambda d: 0.1 * hard(d) + 0.9 * batch_mean_kl(d, 10),
        ),
        ("preset('keras', alpha=1)", hard),
    ]


@pytest.mark.parametrize(("text", "expected"), preset_cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_preset_is_the_formula_of_its_toolkit(text: str, expected: Callable[[Data], float]) -> None:
    d = data(2)
    objective = parse(text)
    assert objective(d.batch()).item() == pytest.approx(expected(d), rel=1e-10)
    assert str(parse(str(objective))) == str(objective)


def test_every_preset_is_tested_and_says_where_it_is_from() -> None:
    texts = [text for text, _ in preset_cases()]
    for name, function in PRESETS.items():
        assert f"preset({name!r})" in texts
        assert "Source: " in (function.__doc__ or "")


def test_a_preset_asks_for_no_more_than_its_weights_use() -> None:
    assert not preset("textbrewer").needs_labels
    assert not preset("keras", alpha=1).needs_teacher
    assert preset("keras").needs_labels
    assert preset("keras").needs_teacher


# --- the published code, in PyTorch ---


def test_relations_agree_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    d = data()
    for ours, theirs in ((d.student, d.teacher), (d.student_features["1"], d.teacher_features["3"])):
        student, teacher = torch.tensor(ours, requires_grad=True), torch.tensor(theirs)
        scaled = []
        for x in (student, teacher):
            found = torch.cdist(x, x)
            scaled.append(found / found[found > 0].mean())
        units = [torch.nn.functional.normalize(x[None] - x[:, None], dim=2) for x in (student, teacher)]
        cosines = [u @ u.transpose(1, 2) for u in units]
        for term, (a, b) in ((RelationalDistance(), scaled), (RelationalAngle(), cosines)):
            wanted = torch.nn.functional.smooth_l1_loss(a, b)
            (slope,) = torch.autograd.grad(wanted, student, retain_graph=True)
            batch = Batch(kd.Tensor(ours, requires_grad=True), theirs)
            loss = term(batch)
            loss.backward()
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
            np.testing.assert_allclose(batch.student_logits.grad.numpy(), slope.numpy(), rtol=1e-8, atol=1e-12)


def compare_with_pytorch(term: Term, published: Callable[[Any, Any, Any], Any]) -> None:
    """Value and gradient of a term of logits beside those of the published formula; all rows are labelled."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    d = data()
    target = np.where(d.target == IGNORED, 0, d.target)
    student = torch.tensor(d.student, requires_grad=True)
    wanted = published(student, torch.tensor(d.teacher), torch.tensor(target))
    wanted.backward()
    batch = d._replace(target=target).batch(requires_grad=True)
    loss = term(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    np.testing.assert_allclose(batch.student_logits.grad.numpy(), student.grad.numpy(), rtol=1e-7, atol=1e-10)


def test_dist_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")

    def one_minus(a: Any, b: Any) -> Any:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    def published(s: Any, t: Any, y: Any) -> Any:
        p, q = torch.softmax(s / 4, 1), torch.softmax(t / 4, 1)
        return 16 * (2 * one_minus(p, q) + 3 * one_minus(p.T, q.T))

    compare_with_pytorch(DIST(temperature=4, inter=2, intra=3), published)


def test_decoupled_distillation_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")

    def published(s: Any, t: Any, y: Any) -> Any:
        """The published form: the true class is masked by a score of -1000 in the second part."""
        one_hot = torch.nn.functional.one_hot(y, s.shape[1])
        pairs = []
        for z in (s, t):
            p = torch.softmax(z / 4, 1)
            pairs.append(torch.stack([(p * one_hot).sum(1), (p * (1 - one_hot)).sum(1)], 1))
        first = torch.nn.functional.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")
        masked = [torch.log_softmax(z / 4 - 1000.0 * one_hot, 1) for z in (s, t)]
        second = torch.nn.functional.kl_div(masked[0], masked[1], reduction="batchmean", log_target=True)
        return 16 * (first + 8 * second)

    compare_with_pytorch(DecoupledKD(), published)


def test_standardised_logits_agree_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")

    def z(x: Any) -> Any:
        return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))

    def published(s: Any, t: Any, y: Any) -> Any:
        log_p, q = torch.log_softmax(z(s) / 2, 1), torch.softmax(z(t) / 2, 1)
        return torch.nn.functional.kl_div(log_p, q, reduction="none").sum(1).mean() * 4

    compare_with_pytorch(StandardisedLabels(), published)


def test_the_other_divergences_agree_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")

    def log_softmaxes(s: Any, t: Any, temperature: float) -> tuple[Any, Any]:
        return torch.log_softmax(s / temperature, 1), torch.log_softmax(t / temperature, 1)

    def divergence(log_a: Any, log_b: Any) -> Any:
        return (log_a.exp() * (log_a - log_b)).sum(1).mean()

    def reverse(s: Any, t: Any, y: Any) -> Any:
        log_p, log_q = log_softmaxes(s, t, 3)
        return 9 * divergence(log_p, log_q)

    def mixture(s: Any, t: Any, y: Any) -> Any:
        log_p, log_q = log_softmaxes(s, t, 2)
        log_m = (0.3 * log_q.exp() + 0.7 * log_p.exp()).log()
        return 4 * (0.3 * divergence(log_q, log_m) + 0.7 * divergence(log_p, log_m))

    def skew(s: Any, t: Any, y: Any) -> Any:
        log_p, log_q = log_softmaxes(s, t, 2)
        return 4 * divergence(log_p, (0.9 * log_q.exp() + 0.1 * log_p.exp()).log())

    compare_with_pytorch(ReverseKL(temperature=3), reverse)
    compare_with_pytorch(JensenShannon(beta=0.3, temperature=2), mixture)
    compare_with_pytorch(SkewedKL(reverse=True, temperature=2), skew)


def test_a_corrected_teacher_never_contradicts_a_label() -> None:
    d = data()
    right = F.corrected_logits(d.teacher, d.target)
    np.testing.assert_array_equal(right.argmax(axis=1)[d.labelled], d.target[d.labelled])
    found = CorrectedSoftLabels()(d.batch()).item()
    assert found == pytest.approx(SoftLabels()(d._replace(teacher=right).batch()).item(), rel=1e-12)


def test_centred_logit_regression_is_the_limit_of_soft_labels() -> None:
    d = data()
    assert SoftLabels(temperature=1e4)(d.batch()).item() == pytest.approx(LogitRegression()(d.batch()).item(), rel=1e-3)
