"""Biases that give each class its frequency: that it is met, what stays as it was, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd.bias import matching_bias
from minikd.errors import ArgumentError, DTypeError, ShapeError
from minikd.nn import MLP, Linear, Module, ReLU, Sequential
from minikd.tensor import Tensor


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits (n, c), more or less sure ones, positive frequencies (c,), and a temperature."""
    n, c, seed = draw(st.integers(1, 60)), draw(st.integers(2, 8)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits = draw(st.sampled_from([0.0, 0.3, 3.0, 10.0])) * rng.normal(size=(n, c)) + 5 * rng.normal(size=c)
    return logits, rng.dirichlet(np.ones(c)) * 0.99 + 0.01 / c, draw(st.sampled_from([0.5, 1.0, 4.0]))


def frequencies_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return softmax(logits / temperature).mean(axis=0)


# --- what it promises ---


@given(cases())
def test_the_mean_probabilities_become_the_frequencies(case: Any) -> None:
    logits, wanted, temperature = case
    added = matching_bias(logits, wanted, temperature=temperature)
    assert np.abs(frequencies_of(logits + added, temperature) - wanted).max() <= 1e-6


@given(cases())
def test_where_all_biases_may_move_their_mean_stays(case: Any) -> None:
    logits, wanted, temperature = case
    assert matching_bias(logits, wanted, temperature=temperature).mean() == pytest.approx(0, abs=1e-9)


@given(cases(), st.data())
def test_only_the_classes_that_are_named_move_and_they_meet_their_frequencies(case: Any, data: Any) -> None:
    logits, wanted, temperature = case
    some = data.draw(st.sets(st.integers(0, len(wanted) - 1), min_size=1, max_size=len(wanted) - 1))
    added = matching_bias(logits, wanted, classes=list(some), temperature=temperature)
    others = [k for k in range(len(wanted)) if k not in some]
    assert (added[others] == 0).all()
    assert np.abs(frequencies_of(logits + added, temperature) - wanted)[list(some)].max() <= 1e-6


@given(cases())
def test_what_matches_already_is_left_as_it_is(case: Any) -> None:
    logits, wanted, temperature = case
    once = logits + matching_bias(logits, wanted, temperature=temperature)
    assert (matching_bias(once, wanted, temperature=temperature, tolerance=1e-6) == 0).all()


@given(cases())
def test_no_other_bias_has_a_smaller_value_of_what_is_minimised(case: Any) -> None:
    logits, wanted, temperature = case
    found = matching_bias(logits, wanted, temperature=temperature)

    def value(bias: np.ndarray) -> float:
        z = (logits + bias) / temperature
        top = z.max(axis=1)
        return float((top + np.log(np.exp(z - top[:, None]).sum(axis=1))).mean() - wanted @ bias / temperature)

    rng = np.random.default_rng(0)
    for size in (1e-2, 1.0):
        assert value(found) <= value(found + size * rng.normal(size=len(wanted))) + 1e-9


@given(cases(), st.integers(-1000, 1000))
def test_a_number_added_to_a_row_changes_nothing(case: Any, number: int) -> None:
    logits, wanted, _ = case
    shifts = number * np.arange(len(logits))[:, None] / len(logits)
    assert matching_bias(logits + shifts, wanted) == pytest.approx(matching_bias(logits, wanted), abs=1e-4)


def test_one_row_is_solved_by_the_logarithms_of_the_frequencies() -> None:
    wanted = np.array([0.2, 0.3, 0.5])
    added = matching_bias([[4.0, -1.0, 0.0]], wanted)
    assert added - added[0] == pytest.approx(np.log(wanted / 0.2) + np.array([0, 5, 4]), abs=1e-6)


def test_a_class_that_is_a_thousand_nats_away_is_brought_back() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 3))
    away = np.array([0.0, 0.0, -1000.0])
    wanted = np.full(3, 1 / 3)
    assert matching_bias(logits + away, wanted, classes=[2])[2] == pytest.approx(
        1000 + matching_bias(logits, wanted, classes=[2])[2], abs=1e-4
    )


def test_near_temperature_0_each_class_is_named_as_often_as_was_asked() -> None:
    logits = np.random.default_rng(0).normal((0, 0, 0, -9), size=(400, 4))
    added = matching_bias(logits, np.full(4, 0.25), temperature=1e-4)
    assert np.bincount((logits + added).argmax(axis=1)) == pytest.approx(100, abs=1)


# --- in a model ---


def features(rows: int = 300) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, 6)).astype(np.float32)


WANTED = np.array([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_predicts_the_frequencies_and_a_second_correction_adds_nothing(dtype: Any) -> None:
    model, x = MLP([6, 12, 4], dtype=dtype), features()
    before, bias = model.logits(x), model.layers[-1].bias.numpy().copy()
    added = kd.correct_bias(model, x, WANTED)
    assert np.abs(model.predict_proba(x).mean(axis=0, dtype=np.float64) - WANTED).max() <= 1e-6
    assert model.logits(x) == pytest.approx(before + added, abs=1e-5)
    assert model.layers[-1].bias.numpy() == pytest.approx(bias + added, abs=1e-6)
    assert kd.correct_bias(model, x, WANTED) == pytest.approx(0, abs=1e-5)


def test_nothing_but_the_last_bias_changes() -> None:
    model, x = MLP([6, 12, 4]), features()
    before = model.state_dict()
    kd.correct_bias(model, x, WANTED)
    assert [name for name, value in model.state_dict().items() if (value != before[name]).any()] == ["2.bias"]


def test_the_features_are_taken_raw_as_predict_takes_them() -> None:
    data = kd.data.load((features(), np.arange(300) % 4))
    model, raw = MLP([6, 12, 4]), features()
    model.normalisation = data.normalisation
    same = MLP([6, 12, 4])
    on_raw = kd.correct_bias(model, 3 + 2 * raw, WANTED)
    on_scale = kd.correct_bias(same, data.normalisation.apply(3 + 2 * raw), WANTED, normalised=True)
    assert on_raw == pytest.approx(on_scale, abs=1e-5)


def test_a_class_that_was_left_out_of_the_training_is_named_again() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(900) % 3
    x = (np.eye(3)[y] * 3 + rng.normal(size=(900, 3))).astype(np.float32)
    teacher = MLP([3, 16, 3], seed=1)
    kd.distillation.fit(teacher, x, y, epochs=10)
    student, seen = MLP([3, 16, 3]), y != 2
    soft = {"hard_weight": 0.0, "soft_weight": 1.0}
    kd.distillation.fit(student, x[seen], y[seen], teacher.logits(x[seen]), epochs=40, **soft)
    before = (student.predict(x)[~seen] == 2).mean()
    added = kd.correct_bias(student, x, np.full(3, 1 / 3), classes=[2])
    assert added[2] > 0.5
    assert (student.predict(x)[~seen] == 2).mean() > before + 0.1


def test_it_is_an_attribute_of_distill_too() -> None:
    assert kd.distill.correct_bias is kd.correct_bias


# --- what is refused ---

LOGITS = np.zeros((5, 3))
THIRDS = np.full(3, 1 / 3)


@pytest.mark.parametrize(
    ("frequencies", "more", "says"),
    [
        ([0.5, 0.5, 0.0], {}, r"frequencies\[2\] must be above 0, got 0"),
        ([3, 5, 2], {}, "Divide counts by their sum"),
        ([-0.1, 0.6, 0.5], {}, "frequencies must be from 0"),
        ([np.nan, 0.5, 0.5], {}, "frequencies must be from 0"),
        ([0.5, 0.5, 0.0], {"classes": [0, 1]}, "a sum below 1"),
        (THIRDS, {"classes": [0, 3]}, "different class ids from 0 to 2"),
        (THIRDS, {"classes": [1, 1]}, "different class ids from 0 to 2"),
        (THIRDS, {"classes": [-1]}, "different class ids from 0 to 2"),
        (THIRDS, {"temperature": 0}, "temperature must be a finite number above 0"),
        (THIRDS, {"tolerance": 0}, "tolerance must be above 0"),
    ],
)
def test_what_cannot_be_met_is_refused_in_words(frequencies: Any, more: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        matching_bias(LOGITS, frequencies, **more)


def test_frequencies_of_other_classes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"frequencies must be of shape \(3,\).*take the mean over the rows"):
        matching_bias(LOGITS, np.full((5, 3), 1 / 3))


def test_logits_without_rows_and_infinite_ones_are_refused() -> None:
    with pytest.raises(ShapeError, match="logits must be of shape"):
        matching_bias(np.zeros((0, 3)), THIRDS)
    with pytest.raises(ArgumentError, match=r"logits must be finite.*in row 1"):
        matching_bias([[0.0, 0, 0], [0, -np.inf, 0]], THIRDS)
    with pytest.raises(DTypeError, match="classes"):
        matching_bias(LOGITS, THIRDS, classes=[0.5])


def test_a_step_between_certain_rows_is_found_and_what_rounding_hides_is_refused() -> None:
    added = matching_bias(1e6 * np.eye(2), [0.7, 0.3])
    assert added[0] - added[1] == pytest.approx(1e6 + np.log(0.4 / 0.6), abs=1e-4)
    with pytest.raises(ArgumentError, match=r"max_steps must be enough.*rows are so certain"):
        matching_bias(1e30 * np.eye(2), [0.7, 0.3], max_steps=50)


class Halved(Module):
    """A model whose last bias counts half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(6, 4)

    def forward(self, x: Any) -> Any:
        return 0.5 * self.layer(x)


class Backwards(Module):
    """A model that names its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = Linear(5, 4), Linear(6, 5)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Sequential(Linear(6, 4), ReLU()), "do not follow the bias"),
        (Halved(), "do not follow the bias"),
        (Backwards(), "4 scores, and a last Linear with 5"),
        (Sequential(Linear(6, 4, bias=False)), "without a bias"),
        (Sequential(ReLU()), "without any Linear"),
        (lambda x: x, "a Module of minikd.nn, got function"),
    ],
)
def test_a_model_that_does_not_end_in_a_bias_is_refused_and_stays_as_it_was(model: Any, says: str) -> None:
    before = model.state_dict() if isinstance(model, Module) else {}
    with pytest.raises(ArgumentError, match=says):
        kd.correct_bias(model, features(), WANTED)
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())


def test_a_refused_correction_leaves_the_model_as_it_was() -> None:
    model = MLP([6, 12, 4])
    before = model.state_dict()
    with pytest.raises(ArgumentError, match="sum 1"):
        kd.correct_bias(model, features(), [1, 2, 3, 4])
    with pytest.raises(ShapeError, match="rows of features"):
        kd.correct_bias(model, features()[0], WANTED)
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())


def test_a_tensor_of_features_is_taken_as_an_array_is() -> None:
    one, other = MLP([6, 12, 4]), MLP([6, 12, 4])
    assert (kd.correct_bias(one, Tensor(features()), WANTED) == kd.correct_bias(other, features(), WANTED)).all()
