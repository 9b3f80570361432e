"""The functions that users call: the numbers of the formulas, every edge case, reductions, and properties."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, MinikdError, ShapeError
from minikd.ops.losses import one_hot
from minikd.ops.random import random_words

pytestmark = pytest.mark.usefixtures("backend")

each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])
may_look_like_probabilities = pytest.mark.filterwarnings("ignore:.*look like probabilities")
LOOKS_LIKE = "look like probabilities"

# Two rows of the article's size, by which formulas are compared.
STUDENT = np.array([[2, 1, 0.1], [0.5, 2.5, -1]])
TEACHER = np.array([[3, 0.5, -0.5], [0, 3, 0]])
LABELS = np.array([0, 1])
HARD = np.array([0.41703001628, 0.15317820712])
KL_ROWS = {
    0.5: (0.11586353921, 0.01163322712),
    1: (0.15647941377, 0.03561600033),
    2: (0.06880056317, 0.02530413823),
    4: (0.01859667073, 0.00928898609),
    20: (0.00069396535, 0.00046488827),
}
T2_KL = {0.5: 0.01593709579, 1: 0.09604770705, 2: 0.18820940281, 4: 0.22308525458, 20: 0.23177072370}
HALF_AND_HALF = {0.5: 0.15052060375, 1: 0.19057590937, 2: 0.23665675725, 4: 0.25409468314, 20: 0.25843741770}
T2_KL_LIMIT = 0.23111111111
GRADIENT = np.array([[-0.18096476946, 0.11082140732, 0.07014336214], [0.08589256644, -0.05549573353, -0.03039683290]])
EVERY_T = pytest.mark.parametrize("temperature", list(KL_ROWS))


def close(dtype: Any, wide: float = 6e-12, narrow: float = 1e-6) -> dict[str, float]:
    """Golden numbers have eleven digits; float32 is compared to 1e-6."""
    tolerance = wide if np.dtype(dtype) == np.float64 else narrow
    return {"rtol": 0, "atol": tolerance}


# --- the same formulas, written out in float64 ---


def plain_log_softmax(z: Any, t: float = 1.0) -> Any:
    z = np.asarray(z, np.float64) / t
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def plain_softmax(z: Any, t: float = 1.0) -> Any:
    return np.exp(plain_log_softmax(z, t))


def plain_kl(z_s: Any, z_t: Any, t: float) -> Any:
    log_q, log_p = plain_log_softmax(z_t, t), plain_log_softmax(z_s, t)
    return (np.exp(log_q) * (log_q - log_p)).sum(axis=1)


def plain_cross_entropy(z: Any, y: Any) -> Any:
    return -(y * plain_log_softmax(z)).sum(axis=1)


def hot(labels: Any, c: int) -> Any:
    return np.eye(c)[labels]


def random_logits(seed: int, n: int, c: int, scale: float = 3.0) -> Any:
    return scale * np.random.default_rng(seed).normal(size=(n, c))


# --- the numbers of the formulas ---


def test_one_hot_labels_of_four_classes_are_the_identity() -> None:
    rows = np.arange(4)
    np.testing.assert_array_equal(one_hot(np, rows, rows >= 0, 4, 0.0), np.eye(4))


@each_float
def test_softmax_gives_the_articles_probabilities(dtype: Any) -> None:
    p = F.softmax(np.array([2, 1, 5, 3], dtype))
    np.testing.assert_allclose(p, [0.04137069692, 0.01521942887, 0.83095266054, 0.11245721367], **close(dtype))
    assert [f"{x:.3f}" for x in p] == ["0.041", "0.015", "0.831", "0.112"]


@each_float
def test_cross_entropy_of_class_two_is_the_articles(dtype: Any) -> None:
    loss = F.cross_entropy(np.array([[2, 1, 5, 3]], dtype), [2])
    np.testing.assert_allclose(loss, 0.18518245260, **close(dtype))


@each_float
def test_a_temperature_of_a_hundredth_is_one_hot(dtype: Any) -> None:
    p = F.softmax(np.array([2.0, 1.0, 0.1], dtype), temperature=0.01)
    np.testing.assert_allclose(p, [1.0, 0.0, 0.0], rtol=0, atol=1e-15)


@each_float
@pytest.mark.parametrize(
    ("temperature", "first"), [(1, 0.65900113889), (2, 0.50168775709), (4, 0.41654763132), (20, 0.34957672354)]
)
def test_softmax_softens_with_temperature_as_the_table_says(dtype: Any, temperature: float, first: float) -> None:
    p = F.softmax(np.array([2, 1, 0.1], dtype), temperature=temperature)
    np.testing.assert_allclose(p[0], first, **close(dtype))


@each_float
def test_the_hard_losses_are_those_of_the_table(dtype: Any) -> None:
    z = STUDENT.astype(dtype)
    np.testing.assert_allclose(F.cross_entropy(z, LABELS, reduction="none"), HARD, **close(dtype))
    np.testing.assert_allclose(F.cross_entropy(z, LABELS), 0.28510411170, **close(dtype))


@each_float
@EVERY_T
def test_the_divergences_are_those_of_the_table(dtype: Any, temperature: float) -> None:
    z_s, z_t = STUDENT.astype(dtype), TEACHER.astype(dtype)
    soft = {"temperature": temperature, "hard_weight": 0.0, "soft_weight": 1.0}
    rows = F.distillation_loss(z_s, z_t, **soft, scale_t2=False, reduction="none")
    np.testing.assert_allclose(rows, KL_ROWS[temperature], **close(dtype))
    np.testing.assert_allclose(F.distillation_loss(z_s, z_t, **soft), T2_KL[temperature], **close(dtype))


@each_float
@EVERY_T
def test_kl_div_of_softened_rows_is_the_divergence_of_the_table(dtype: Any, temperature: float) -> None:
    log_p = F.log_softmax(STUDENT.astype(dtype), temperature=temperature)
    q = F.softmax(TEACHER.astype(dtype), temperature=temperature)
    wanted = np.mean(KL_ROWS[temperature])
    np.testing.assert_allclose(F.kl_div(log_p, q), wanted, **close(dtype))
    log_q = F.log_softmax(TEACHER.astype(dtype), temperature=temperature)
    np.testing.assert_allclose(F.kl_div(log_p, log_q, log_target=True), wanted, **close(dtype))


@each_float
@EVERY_T
def test_the_distillation_loss_is_that_of_the_table(dtype: Any, temperature: float) -> None:
    loss = F.distillation_loss(STUDENT.astype(dtype), TEACHER.astype(dtype), LABELS, temperature=temperature)
    np.testing.assert_allclose(loss, HALF_AND_HALF[temperature], **close(dtype))


def test_the_scaled_divergence_tends_to_half_the_mean_squared_difference_of_centred_logits() -> None:
    centred = (STUDENT - STUDENT.mean(axis=1, keepdims=True)) - (TEACHER - TEACHER.mean(axis=1, keepdims=True))
    assert (centred**2).sum(axis=1).mean() / 6 == pytest.approx(T2_KL_LIMIT, abs=1e-11)
    loss = F.distillation_loss(STUDENT, TEACHER, temperature=1e5, soft_weight=1.0)
    assert loss == pytest.approx(T2_KL_LIMIT, abs=1e-5)


@each_float
def test_the_reverse_divergence_is_another_number(dtype: Any) -> None:
    loss = F.distillation_loss(TEACHER.astype(dtype), STUDENT.astype(dtype), temperature=1, soft_weight=1.0)
    np.testing.assert_allclose(loss, 0.12782196266, **close(dtype))


@each_float
def test_the_gradient_is_that_of_the_table(dtype: Any) -> None:
    z_s, z_t = STUDENT.astype(dtype), TEACHER.astype(dtype)
    _, gradient = F.distillation_loss(z_s, z_t, LABELS, return_grad=True)
    np.testing.assert_allclose(gradient, GRADIENT, **close(dtype, wide=1e-11))
    tensor = kd.Tensor(z_s, requires_grad=True)
    F.distillation_loss(tensor, z_t, LABELS).backward()
    np.testing.assert_array_equal(tensor.grad.numpy(), gradient)


# --- temperatures ---

TEMPERATURE_USERS: list[Callable[..., Any]] = [
    lambda t: F.softmax(STUDENT, temperature=t),
    lambda t: F.log_softmax(STUDENT, temperature=t),
    lambda t: F.distillation_loss(STUDENT, TEACHER, temperature=t),
]


@pytest.mark.parametrize("use", TEMPERATURE_USERS, ids=["softmax", "log_softmax", "distillation_loss"])
@pytest.mark.parametrize("value", [0, -1.5, math.nan, math.inf, -math.inf, "warm", None])
def test_a_temperature_that_is_no_finite_number_above_zero_is_refused(use: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be a finite number above 0") as caught:
        use(value)
    assert repr(value) in str(caught.value)


@each_float
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_towards_zero_the_largest_scores_share_everything(dtype: Any, temperature: float) -> None:
    p = F.softmax(np.array([[1, 3, 3, -np.inf], [0, -5, -np.inf, -1]], dtype), temperature=temperature)
    np.testing.assert_array_equal(p, np.array([[0, 0.5, 0.5, 0], [1, 0, 0, 0]], dtype))


@each_float
@pytest.mark.parametrize("temperature", [1e12, 1e100, 1e300])
def test_towards_infinity_all_classes_that_are_not_masked_are_equal(dtype: Any, temperature: float) -> None:
    p = F.softmax(np.array([[1, 3, -2, -np.inf]], dtype), temperature=temperature)
    np.testing.assert_allclose(p, [[1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-6)
    assert p[0, 3] == 0


@each_float
@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e200, 1e300])
def test_the_distillation_loss_is_never_nan_at_extreme_temperatures(dtype: Any, temperature: float) -> None:
    z_s, z_t = STUDENT.astype(dtype), TEACHER.astype(dtype)
    loss, gradient = F.distillation_loss(z_s, z_t, LABELS, temperature=temperature, return_grad=True)
    assert loss >= 0.5 * HARD.mean() - 1e-6
    assert np.isfinite(gradient).all()


@each_float
@pytest.mark.parametrize("classes", [3, 60])
def test_a_temperature_whose_square_is_0_hides_no_broken_teacher(dtype: Any, classes: int, backend: str) -> None:
    z_s, z_t = np.zeros((3, classes), dtype), np.zeros((3, classes), dtype)
    z_t[1, 2] = np.nan
    loss = F.distillation_loss(z_s, z_t, [0, 1, 2], temperature=1e-300, reduction="none")
    assert np.isnan(loss).tolist() == [False, True, False]


# --- edge cases ---


@each_float
def test_logits_of_any_size_give_finite_correct_results(dtype: Any) -> None:
    z = np.array([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [1e4, 9999, 0]], dtype)
    wanted = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [*plain_softmax([1.0, 0.0]), 0]])
    np.testing.assert_allclose(F.softmax(z), wanted, rtol=1e-6)
    loss, gradient = F.cross_entropy(z, [0, 1, 0], reduction="none", return_grad=True)
    np.testing.assert_allclose(loss, [0, math.log(3), -math.log(wanted[2, 0])], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted - hot([0, 1, 0], 3), rtol=1e-6, atol=1e-7)
    far = F.cross_entropy(z[:1], [1])
    np.testing.assert_allclose(far, 2 * dtype(1e30), rtol=1e-6)
    same, flat = F.distillation_loss(z, z.copy(), temperature=2, return_grad=True)
    assert same == 0
    np.testing.assert_array_equal(flat, 0)


@each_float
def test_a_masked_class_has_probability_and_gradient_zero(dtype: Any) -> None:
    z = np.array([[0, -np.inf, 1], [2, 1, -np.inf]], dtype)
    p = F.softmax(z)
    assert p[0, 1] == p[1, 2] == 0
    assert F.log_softmax(z)[0, 1] == -np.inf
    loss, gradient = F.cross_entropy(z, [0, 1], reduction="none", return_grad=True)
    np.testing.assert_allclose(loss, [math.log1p(math.e), math.log1p(math.e)], rtol=1e-6)
    assert gradient[0, 1] == gradient[1, 2] == 0
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)
    soft, soft_gradient = F.cross_entropy(z, np.array([[0.25, 0, 0.75], [1, 0, 0]], dtype), return_grad=True)
    assert np.isfinite(soft)
    assert soft_gradient[0, 1] == soft_gradient[1, 2] == 0


@each_float
def test_a_mask_that_teacher_and_student_share_leaves_the_divergence_of_the_other_classes(dtype: Any) -> None:
    masked = [np.insert(z, 1, -np.inf, axis=1).astype(dtype) for z in (STUDENT, TEACHER)]
    loss, gradient = F.distillation_loss(*masked, temperature=2, soft_weight=1.0, return_grad=True)
    np.testing.assert_allclose(loss, T2_KL[2], rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 1], 0)
    assert np.isfinite(gradient).all()


@each_float
def test_a_class_that_only_the_teacher_rules_out_costs_what_the_mathematics_says(dtype: Any) -> None:
    teacher = np.array([[1, -np.inf, 0]], dtype)
    student = np.zeros((1, 3), dtype)
    loss, gradient = F.distillation_loss(student, teacher, temperature=1, soft_weight=1, return_grad=True)
    q = plain_softmax([1.0, 0.0])
    np.testing.assert_allclose(loss, (q * np.log(q * 3)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[1 / 3 - q[0], 1 / 3, 1 / 3 - q[1]]], rtol=1e-5)


@each_float
def test_a_class_that_the_student_rules_out_and_the_target_does_not_costs_infinity(dtype: Any) -> None:
    z = np.array([[0, -np.inf, 1], [0, 1, 2]], dtype)
    for target in (np.array([1, 0]), np.array([[0.5, 0.5, 0], [1, 0, 0]], dtype)):
        loss, gradient = F.cross_entropy(z, target, reduction="none", return_grad=True)
        assert loss[0] == np.inf
        assert np.isfinite(loss[1])
        assert not np.isnan(gradient).any()
    teacher = np.array([[0, 1, 2], [0, 1, 2]], dtype)
    loss, gradient = F.distillation_loss(z, teacher, reduction="none", return_grad=True)
    assert loss[0] == np.inf
    assert loss[1] == 0
    assert not np.isnan(gradient).any()
    assert F.distillation_loss(z, teacher) == np.inf


@each_float
@pytest.mark.parametrize("classes", [2, 300])
@pytest.mark.parametrize(("temperature", "far"), [(1.0, -100.0), (1.0, -88.0), (4.0, -400.0), (1.0, -720.0)])
def test_a_class_that_the_teacher_thinks_most_unlikely_still_costs_infinity_if_the_student_rules_it_out(
    dtype: Any, temperature: float, far: float, classes: int
) -> None:
    student, teacher = np.zeros((20, classes), dtype), np.zeros((20, classes), dtype)
    student[3, 1], teacher[3, 1] = -np.inf, far
    student[4, 1], teacher[4, 1] = -np.inf, -np.inf
    loss = F.distillation_loss(student, teacher, temperature=temperature, reduction="none")
    assert loss[3] == np.inf
    np.testing.assert_allclose(np.delete(loss, 3), 0, atol=1e-12)


@each_float
@pytest.mark.parametrize("classes", [1, 3, 300])
def test_rows_that_agree_cost_nothing_however_large_the_logits_are(dtype: Any, classes: int) -> None:
    rng = np.random.default_rng(11)
    student = np.full((4, classes), -1e30, dtype)
    teacher = student.copy()
    student[:, 0], teacher[:, 0] = 1e30 * rng.uniform(1, 3, 4), 1e30 * rng.uniform(1, 3, 4)
    for temperature in (1.0, 20.0):
        assert F.distillation_loss(student, teacher, temperature=temperature) == 0
    if classes == 1:
        assert F.distillation_loss(student, teacher, temperature=1e-30, scale_t2=False) == 0


@each_float
def test_a_mean_over_no_class_weight_is_zero_whatever_stands_in_the_rows(dtype: Any) -> None:
    z, w = np.array([[0, -np.inf, 1]], dtype), np.array([0, 1, 1], dtype)
    assert F.cross_entropy(z, [0], weight=w, label_smoothing=0.1) == 0


@each_float
def test_class_weights_that_sum_to_zero_still_weigh_the_smoothed_classes(dtype: Any) -> None:
    z, w = np.array([[0, 1, 3]], dtype), np.array([1, -2, 1], dtype)
    p = np.log(plain_softmax(z.astype(np.float64)))[0]
    wanted = -(0.7 * w[0] * p[0] + 0.1 * (w * p).sum())
    loss = F.cross_entropy(z, [0], weight=w, label_smoothing=0.3, reduction="sum")
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


@pytest.mark.parametrize("classes", [3, 200])
def test_a_gradient_is_not_written_over_an_input(classes: int) -> None:
    z, t, y = random_logits(1, 4, classes), random_logits(2, 4, classes), np.zeros(4, int)
    for call in (
        lambda: F.cross_entropy(z, y, grad_out=z),
        lambda: F.distillation_loss(z, t, y, grad_out=t),
        lambda: F.distillation_loss(z, t, plain_softmax(t), grad_out=z),
        lambda: F.kl_div(z, t, grad_out=z[:]),
    ):
        before = z.copy()
        for _ in "twice":
            with pytest.raises(ArgumentError, match="grad_out must be an array that shares no memory"):
                call()
        np.testing.assert_array_equal(z, before)


@each_float
def test_smoothing_puts_weight_on_a_masked_class_and_so_costs_infinity(dtype: Any) -> None:
    assert F.cross_entropy(np.array([[0, -np.inf]], dtype), [0], label_smoothing=0.1) == np.inf


BROKEN_ROWS = [[-np.inf] * 4, [0, np.inf, 1, 2], [np.inf, np.inf, 0, 0], [0, np.nan, 1, 2], [np.nan] * 4]


@each_float
@pytest.mark.parametrize("broken", BROKEN_ROWS, ids=str)
def test_a_row_that_has_no_answer_is_nan_and_touches_no_other_row(dtype: Any, broken: list[float]) -> None:
    clean = random_logits(3, 5, 4).astype(dtype)
    labels, others = np.array([0, 1, 1, 3, 2]), [0, 1, 3, 4]
    z = clean.copy()
    z[2] = broken
    for function in (F.softmax, F.log_softmax):
        assert np.isnan(function(z)[2]).all()
        np.testing.assert_array_equal(function(z)[others], function(clean)[others])
    teacher = random_logits(4, 5, 4).astype(dtype)
    calls: list[Callable[[Any], Any]] = [
        lambda x: F.cross_entropy(x, labels, reduction="none", return_grad=True),
        lambda x: F.cross_entropy(x, hot(labels, 4), reduction="none", return_grad=True),
        lambda x: F.distillation_loss(x, teacher, labels, reduction="none", return_grad=True),
        lambda x: F.distillation_loss(teacher, x, labels, reduction="none", return_grad=True),
    ]
    for call in calls:
        (loss, gradient), (clean_loss, clean_gradient) = call(z), call(clean)
        assert np.isnan(loss[2])
        assert np.isnan(gradient[2]).all()
        np.testing.assert_array_equal(loss[others], clean_loss[others])
        np.testing.assert_array_equal(gradient[others], clean_gradient[others])


@each_float
@pytest.mark.parametrize("broken", BROKEN_ROWS, ids=str)
def test_a_row_that_has_no_answer_is_nan_also_where_its_target_weighs_nothing(dtype: Any, broken: list[float]) -> None:
    z, weight = np.array([broken, [0, 1, 2, 3]], dtype), np.array([0, 1, 1, 1], dtype)
    nothing = np.zeros((2, 4), dtype)
    for target, weights in ((np.array([0, 1]), weight), (nothing, None)):
        loss, gradient = F.cross_entropy(z, target, weight=weights, reduction="none", return_grad=True)
        assert np.isnan(loss).tolist() == [True, False]
        assert np.isnan(gradient).all(axis=1).tolist() == np.isnan(gradient).any(axis=1).tolist() == [True, False]


@each_float
def test_a_mean_over_labels_that_weigh_nothing_is_0_with_a_gradient_of_0(dtype: Any) -> None:
    z, weight = np.array([[0, 1, 3], [2, 1, 0]], dtype), np.array([0, 1, 2], dtype)
    for smoothing in (0.0, 0.3):  # which lets the other classes weigh something
        loss, gradient = F.cross_entropy(z, [0, 0], weight=weight, label_smoothing=smoothing, return_grad=True)
        assert loss == 0
        assert not gradient.any()


@each_float
def test_a_weight_of_zero_leaves_its_term_out_even_where_it_is_infinite(dtype: Any) -> None:
    student = np.array([[0, -np.inf, 1]], dtype)
    teacher = np.array([[0, 1, 2]], dtype)
    hard_only, gradient = F.distillation_loss(student, teacher, [0], hard_weight=1.0, soft_weight=0.0, return_grad=True)
    np.testing.assert_allclose(hard_only, math.log1p(math.e), rtol=1e-6)
    assert np.isfinite(gradient).all()
    soft_only = F.distillation_loss(student, np.where(np.isinf(student), student, teacher), [1], hard_weight=0.0)
    assert np.isfinite(soft_only)
    shared = np.where(np.isinf(student), student, teacher)
    with_probabilities, gradient = F.distillation_loss(
        student, shared, np.array([[0, 1, 0]], dtype), hard_weight=0.0, return_grad=True
    )
    assert with_probabilities == soft_only
    assert np.isfinite(gradient).all()


@each_float
def test_loss_and_gradient_agree_about_a_broken_teacher_whose_term_is_left_out(dtype: Any) -> None:
    student, teacher = np.array([[0, 1, 2]], dtype), np.array([[0, np.nan, 2]], dtype)
    loss, gradient = F.distillation_loss(student, teacher, [0], hard_weight=1.0, soft_weight=0.0, return_grad=True)
    assert np.isnan(loss) == np.isnan(gradient).any() == np.isnan(gradient).all()


@each_float
def test_equal_teacher_and_student_have_a_divergence_of_zero(dtype: Any) -> None:
    for t in (0.5, 1.0, 4.0, 20.0, 1000.0):
        for scale in (1e-3, 1, 100):
            z = random_logits(7, 20, 10, scale).astype(dtype)
            shifted = z + np.arange(20, dtype=dtype)[:, None] if dtype is np.float64 else z.copy()
            rows = F.distillation_loss(z, shifted, temperature=t, soft_weight=1.0, reduction="none")
            assert (rows >= 0).all()
            assert (rows <= 1e-12 * t * t).all()


@pytest.mark.parametrize("label", [-1, 3, 1000, -101])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y, **k: F.distillation_loss(z, z + 1, y, **k)])
@each_float
def test_a_label_out_of_range_is_refused_by_row_and_value_before_anything_is_written(
    dtype: Any, loss: Any, label: int
) -> None:
    z, out = random_logits(1, 4, 3).astype(dtype), np.full((4, 3), 7, dtype)
    with pytest.raises(ValueError, match=r"target\[2\].*0 to 2 .*3 classes") as caught:
        loss(z, np.array([0, -100, label, label]), grad_out=out)
    assert isinstance(caught.value, ArgumentError)
    assert str(label) in caught.value.got
    np.testing.assert_array_equal(out, 7)


@pytest.mark.usefixtures("backend")
def test_a_label_out_of_range_is_refused_in_the_name_of_the_loss() -> None:
    z = random_logits(1, 2, 3)
    for name, call in {
        "cross_entropy": lambda: F.cross_entropy(z, np.array([0, 3])),
        "distillation_loss": lambda: F.distillation_loss(z, z, np.array([0, 3])),
        "decoupled_kd": lambda: F.decoupled_kd(z, z, np.array([0, 3])),
    }.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        assert (caught.value.where, caught.value.argument) == (name, "target[1]")


def test_log_probabilities_near_0_keep_their_digits_as_a_target() -> None:
    log_q, log_p = np.array([[-1e-12, -30.0]]), np.array([[-3e-12, -29.0]])
    found = F.kl_div(log_p, log_q, log_target=True, reduction="none")
    np.testing.assert_allclose(found, np.exp(log_q) * (log_q - log_p), rtol=1e-14)


def test_a_label_too_large_for_int64_is_refused_and_never_taken_for_an_ignored_one() -> None:
    with pytest.raises(ArgumentError, match=r"target\[1\]"):
        F.cross_entropy(random_logits(1, 2, 3), np.array([0, 2**64 - 100], np.uint64))


def test_no_rows_and_no_classes_are_refused() -> None:
    empty: list[Callable[[], Any]] = []
    for shape in ((0, 3), (2, 0), (0, 0)):
        z = np.zeros(shape)
        empty += [
            lambda z=z: F.softmax(z),
            lambda z=z: F.log_softmax(z),
            lambda z=z: F.cross_entropy(z, np.zeros(z.shape[0], int)),
            lambda z=z: F.cross_entropy(z, z),
            lambda z=z: F.kl_div(z, z),
            lambda z=z: F.distillation_loss(z, z),
        ]
    for call in empty:
        with pytest.raises(ShapeError):
            call()


@each_float
def test_one_class_has_loss_zero_and_gradient_zero(dtype: Any) -> None:
    z = np.array([[3], [-4]], dtype)
    np.testing.assert_array_equal(F.softmax(z), 1)
    for result in (
        F.cross_entropy(z, [0, 0], return_grad=True),
        F.cross_entropy(z, np.ones((2, 1), dtype), return_grad=True),
        F.distillation_loss(z, 2 * z, [0, 0], return_grad=True),
    ):
        assert result[0] == 0
        np.testing.assert_array_equal(result[1], 0)


def test_logits_of_the_wrong_number_of_axes_are_refused_with_the_mend() -> None:
    with pytest.raises(ShapeError, match=r"logits must be of shape \(n, c\).*logits\[None\]"):
        F.cross_entropy(np.zeros(3), [0])
    with pytest.raises(ShapeError, match=r"teacher_logits must be of the student's shape \(2, 3\)"):
        F.distillation_loss(STUDENT, TEACHER[:, :2])
    with pytest.raises(ShapeError, match=r"target must be class ids of shape \(2,\) or class probabilities"):
        F.cross_entropy(STUDENT, [0, 1, 2])
    with pytest.raises(ShapeError, match=r"weight must be of shape \(3,\)"):
        F.cross_entropy(STUDENT, LABELS, weight=np.ones(2))
    with pytest.raises(ShapeError, match="target must be of input's shape"):
        F.kl_div(STUDENT, TEACHER[:1])


def test_a_setting_outside_its_range_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="reduction must be one of mean, sum, none, got 'batchmean'"):
        F.cross_entropy(STUDENT, LABELS, reduction="batchmean")
    with pytest.raises(ArgumentError, match="reduction must be one of batchmean, mean, sum, none"):
        F.kl_div(STUDENT, TEACHER, reduction="average")
    for e in (-0.1, 1.5, math.nan):
        with pytest.raises(ArgumentError, match="label_smoothing must be between 0 and 1"):
            F.cross_entropy(STUDENT, LABELS, label_smoothing=e)
    for name in ("hard_weight", "soft_weight"):
        for value in (math.nan, math.inf):
            with pytest.raises(ArgumentError, match=f"{name} must be a finite number"):
                F.distillation_loss(STUDENT, TEACHER, LABELS, **{name: value})
    with pytest.raises(ArgumentError, match="axis"):
        F.softmax(STUDENT, axis=2)


def test_an_error_answers_the_five_questions_and_survives_pickling() -> None:
    with pytest.raises(MinikdError) as caught:
        F.cross_entropy(STUDENT, [0, 9])
    error = caught.value
    assert (error.where, error.argument, error.got) == ("cross_entropy", "target[1]", "9")
    assert all(part in str(error) for part in (error.where, error.argument, error.expected, error.got, error.fix))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


# --- probabilities where logits are expected ---


def probabilities(n: int = 40, c: int = 3) -> Any:
    return plain_softmax(random_logits(5, n, c))


def warnings_of(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


@each_float
@pytest.mark.parametrize("wrap", [np.asarray, kd.Tensor], ids=["array", "tensor"])
def test_probabilities_in_place_of_logits_are_warned_of_once_at_the_callers_line(dtype: Any, wrap: Any) -> None:
    p, z, y = probabilities().astype(dtype), random_logits(6, 40, 3).astype(dtype), np.zeros(40, int)
    calls: dict[str, Callable[[], Any]] = {
        "cross_entropy: logits": lambda: F.cross_entropy(wrap(p), y),
        "distillation_loss: student_logits": lambda: F.distillation_loss(wrap(p), z),
        "distillation_loss: teacher_logits": lambda: F.distillation_loss(wrap(z), p),
    }
    for start, call in calls.items():
        (warning,) = warnings_of(call)
        assert warning.category is UserWarning
        assert str(warning.message).startswith(start)
        assert LOOKS_LIKE in str(warning.message)
        assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)


@each_float
def test_probabilities_in_place_of_both_logits_give_one_warning(dtype: Any) -> None:
    p = probabilities().astype(dtype)
    assert len(warnings_of(lambda: F.distillation_loss(p, p[::-1]))) == 1
    assert len(warnings_of(lambda: F.distillation_loss(p, p[::-1], p, soft_weight=0.5))) == 1


@each_float
def test_logits_that_only_resemble_probabilities_are_not_warned_of(dtype: Any) -> None:
    y = np.zeros(40, int)
    late = probabilities().astype(dtype)
    late[31] *= 2  # the last row that is looked at
    beyond = probabilities().astype(dtype)
    beyond[32] *= 2
    assert warnings_of(lambda: F.cross_entropy(late, y)) == []
    assert len(warnings_of(lambda: F.cross_entropy(beyond, y))) == 1
    assert warnings_of(lambda: F.cross_entropy(np.ones((4, 1), dtype), y[:4])) == []
    assert warnings_of(lambda: F.kl_div(np.log(late), late)) == []
    assert warnings_of(lambda: F.distillation_loss(np.log(probabilities()), random_logits(1, 40, 3))) == []


# --- dtypes and layouts of what comes in ---


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_labels_may_have_any_integer_dtype(kind: str) -> None:
    assert F.cross_entropy(STUDENT, LABELS.astype(kind)) == F.cross_entropy(STUDENT, LABELS)
    assert F.distillation_loss(STUDENT, TEACHER, LABELS.astype(kind)) == F.distillation_loss(STUDENT, TEACHER, LABELS)


@pytest.mark.parametrize("kind", ["float64", "bool", "complex128", "object", "U1"])
def test_labels_of_any_other_dtype_are_refused(kind: str) -> None:
    with pytest.raises(DTypeError, match="target must be an array of integers, got"):
        F.cross_entropy(STUDENT, LABELS.astype(kind))


@pytest.mark.parametrize("kind", ["float16", "int8", "int64", "uint8", "bool"])
def test_half_precision_and_integers_are_computed_in_float32(kind: str) -> None:
    z = np.array([[3, 0, 1], [0, 2, 1]]).astype(kind)
    for function in (F.softmax, F.log_softmax, F.relu, F.tanh, F.sigmoid, F.gelu):
        result = function(z)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, function(z.astype(np.float32)))
    loss, gradient = F.cross_entropy(z, LABELS, return_grad=True)
    assert loss.dtype == gradient.dtype == np.float32
    assert F.distillation_loss(z, TEACHER, LABELS).dtype == np.float32


@pytest.mark.parametrize("kind", ["complex64", "complex128", "object", "U3"])
def test_other_dtypes_are_refused_with_function_argument_and_dtype(kind: str) -> None:
    z = STUDENT.astype(kind)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("softmax", "x"): lambda: F.softmax(z),
        ("cross_entropy", "logits"): lambda: F.cross_entropy(z, LABELS),
        ("distillation_loss", "teacher_logits"): lambda: F.distillation_loss(STUDENT, z),
        ("kl_div", "target"): lambda: F.kl_div(STUDENT, z),
        ("Tensor", "data"): lambda: kd.Tensor(z),
    }
    for (where, argument), call in calls.items():
        with pytest.raises(TypeError) as caught:
            call()
        assert isinstance(caught.value, DTypeError)
        assert (caught.value.where, caught.value.argument, caught.value.got) == (where, argument, str(z.dtype))
        assert "astype" in caught.value.fix


def test_the_differentiated_input_decides_the_dtype() -> None:
    narrow, wide = STUDENT.astype(np.float32), TEACHER
    loss, gradient = F.distillation_loss(narrow, wide, LABELS, return_grad=True)
    assert loss.dtype == gradient.dtype == np.float32
    assert F.distillation_loss(wide, narrow).dtype == np.float64
    narrow_target, narrow_weight = hot(LABELS, 3).astype(np.float32), np.ones(3, np.float32)
    assert F.cross_entropy(wide, narrow_target, weight=narrow_weight).dtype == np.float64


@each_float
def test_lists_strided_read_only_and_foreign_ordered_arrays_give_the_same_as_plain_ones(dtype: Any) -> None:
    z_s, z_t = STUDENT.astype(dtype), TEACHER.astype(dtype)
    wanted = F.distillation_loss(z_s, z_t, LABELS, return_grad=True)
    frozen = [x.copy() for x in (z_s, z_t, LABELS)]
    for x in frozen:
        x.flags.writeable = False
    layouts = {
        "read-only": frozen,
        "Fortran": [np.asfortranarray(z_s), np.asfortranarray(z_t), LABELS],
        "strided": [np.repeat(z_s, 2, axis=1)[:, ::2], np.repeat(z_t, 2, axis=0)[::2], np.repeat(LABELS, 3)[::3]],
        "reversed": [z_s[::-1].copy()[::-1], z_t[:, ::-1].copy()[:, ::-1], LABELS[::-1].copy()[::-1]],
    }
    if dtype is np.float64:
        layouts["lists"] = [z_s.tolist(), z_t.tolist(), LABELS.tolist()]
    for name, inputs in layouts.items():
        loss, gradient = F.distillation_loss(*inputs, return_grad=True)
        assert loss == wanted[0], name
        np.testing.assert_array_equal(gradient, wanted[1], err_msg=name)
        p = F.softmax(inputs[0])
        np.testing.assert_array_equal(p, F.softmax(z_s), err_msg=name)
        assert p.dtype == dtype
        np.testing.assert_array_equal(F.cross_entropy(inputs[0], inputs[2]), F.cross_entropy(z_s, LABELS), err_msg=name)


@each_float
def test_the_byte_order_of_what_comes_in_does_not_matter(dtype: Any) -> None:
    swapped = [x.astype(x.dtype.newbyteorder(">")) for x in (STUDENT.astype(dtype), TEACHER.astype(dtype), LABELS)]
    assert F.cross_entropy(STUDENT.astype(dtype), swapped[2]) == F.cross_entropy(STUDENT.astype(dtype), LABELS)
    loss = F.distillation_loss(*swapped)
    assert loss.dtype == dtype
    assert loss == F.distillation_loss(STUDENT.astype(dtype), TEACHER.astype(dtype), LABELS)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(F, name) for name in ("softmax", "log_softmax", "relu", "tanh", "sigmoid", "gelu")},
    "linear": lambda x: F.linear(x, np.ones((4, 3))),
    "linear, bias and relu": lambda x: F.linear(x, np.ones((4, 3)), np.ones(4), "relu"),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout, not training": lambda x: F.dropout(x, 0.5, training=False),
    "fake_quantise": lambda x: F.fake_quantise(x, 0.25),
    "fake_quantise, a scale for each row": lambda x: F.fake_quantise(x, np.full(2, 0.25), low=-8, high=7),
    "matmul": lambda x: F.matmul(x, np.ones((3, 4), np.float32)),
    "take": lambda x: F.take(x, [1, 0]),
    "concatenate": lambda x: F.concatenate([x, x]),
    "cross_entropy": lambda x: F.cross_entropy(x, LABELS),
    "cross_entropy of probabilities": lambda x: F.cross_entropy(x, hot(LABELS, 3)),
    "kl_div": lambda x: F.kl_div(x, np.exp(STUDENT)),
    "distillation_loss": lambda x: F.distillation_loss(x, TEACHER, LABELS),
    "reverse_kl": lambda x: F.reverse_kl(x, TEACHER),
    "jensen_shannon": lambda x: F.jensen_shannon(x, TEACHER),
    "skewed_kl": lambda x: F.skewed_kl(x, TEACHER),
    "decoupled_kd": lambda x: F.decoupled_kd(x, TEACHER, LABELS),
    "standardised_kl": lambda x: F.standardised_kl(x, TEACHER),
    "linear_distillation_loss": lambda x: F.linear_distillation_loss(x, np.ones((3, 3)), None, TEACHER, LABELS),
    "distillation_loss of probabilities": lambda x: F.distillation_loss(x, TEACHER, hot(LABELS, 3)),
    "teacher_confidence": lambda x: F.teacher_confidence(x),
    "teacher_confidence of labels": lambda x: F.teacher_confidence(x, LABELS, 2.0),
    "corrected_logits": lambda x: F.corrected_logits(x, 1 - LABELS),
    "shift_images": lambda x: F.shift_images(
        np.repeat(x, 3, axis=1) if isinstance(x, np.ndarray) else thrice(x), (3, 3), 1
    ),
}


def thrice(x: kd.Tensor) -> kd.Tensor:
    return kd.Tensor(np.repeat(x.numpy(), 3, axis=1))


@each_float
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_give_arrays_and_tensors_give_tensors(dtype: Any, name: str) -> None:
    x = STUDENT.astype(dtype)
    plain, tensor = FUNCTIONS[name](x), FUNCTIONS[name](kd.Tensor(x))
    assert isinstance(plain, np.ndarray | np.floating)
    assert isinstance(tensor, kd.Tensor)
    assert plain.dtype == tensor.dtype == dtype
    np.testing.assert_array_equal(plain, tensor.numpy())


def test_every_public_function_is_among_those_tried_on_arrays_and_tensors() -> None:
    chosen = {
        "argmax",
        "correct_count",
        "standardise",
        "take_scaled",
    }  # what they return is no function that has a gradient
    functions = {name for name in F.__all__ if not isinstance(getattr(F, name), type)}
    assert {name.split(" ")[0].rstrip(",") for name in FUNCTIONS} | chosen == functions


@each_float
def test_argmax_and_correct_count_read_arrays_and_tensors_alike(dtype: Any, backend: str) -> None:
    x = STUDENT.astype(dtype)
    np.testing.assert_array_equal(F.argmax(x), x.argmax(axis=1))
    np.testing.assert_array_equal(F.argmax(kd.Tensor(x)), x.argmax(axis=1))
    assert F.argmax(x).dtype == np.int64
    right = int((x.argmax(axis=1) == LABELS).sum())
    assert F.correct_count(x, LABELS) == F.correct_count(kd.Tensor(x), LABELS) == right
    assert F.correct_count(x, np.full(len(x), -1), ignore_index=-1) == 0


def test_correct_count_refuses_a_label_that_is_no_class(backend: str) -> None:
    with pytest.raises(ArgumentError, match=r"target\[1\].*got 7"):
        F.correct_count(STUDENT, np.array([0, 7]))


@each_float
def test_rows_of_bytes_are_taken_scaled_and_shifted(dtype: Any, backend: str) -> None:
    x = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    scale, shift = np.array([1 / 255, 1, 2], dtype), np.array([0, -1, 0.5], dtype)
    taken = F.take_scaled(x, [3, 0, 3], scale, shift)
    assert taken.dtype == dtype
    np.testing.assert_allclose(taken, x[[3, 0, 3]] * scale + shift, rtol=1e-6)
    np.testing.assert_allclose(F.take_scaled(x, [1], 0.5, 1), x[[1]] * 0.5 + 1.0)


def test_take_scaled_refuses_what_are_no_bytes_and_rows_that_are_not_there(backend: str) -> None:
    with pytest.raises(DTypeError, match="uint8"):
        F.take_scaled(np.ones((2, 3)), [0], 1.0, 0.0)
    with pytest.raises(ArgumentError, match="rows"):
        F.take_scaled(np.ones((2, 3), np.uint8), [2], 1.0, 0.0)


@each_float
def test_log_probabilities_of_a_teacher_at_this_temperature_are_not_softened_again(dtype: Any, backend: str) -> None:
    student, teacher = STUDENT.astype(dtype), TEACHER.astype(dtype)
    known = F.log_softmax(teacher, temperature=3.0)
    given = F.distillation_loss(student, known, LABELS, temperature=3.0, log_target=True, return_grad=True)
    wanted = F.distillation_loss(student, teacher, LABELS, temperature=3.0, return_grad=True)
    for a, b in zip(given, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# --- softmax along any axis ---


@each_float
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_softmax_works_along_any_axis(dtype: Any, axis: int) -> None:
    x = random_logits(2, 6, 20).reshape(4, 5, 6).astype(dtype)
    moved = np.moveaxis(x, axis, -1)
    wanted = np.moveaxis(plain_softmax(moved, 2.0), -1, axis)
    np.testing.assert_allclose(F.softmax(x, axis=axis, temperature=2.0), wanted, rtol=1e-5)
    np.testing.assert_allclose(F.log_softmax(x, axis=axis, temperature=2.0), np.log(wanted), rtol=1e-5, atol=1e-6)
    tensor = kd.Tensor(x, requires_grad=True)
    y = F.softmax(tensor, axis=axis, temperature=2.0)
    np.testing.assert_array_equal(y.numpy(), F.softmax(x, axis=axis, temperature=2.0))
    y.backward(np.ones(y.shape, dtype))
    np.testing.assert_allclose(tensor.grad.numpy(), 0, atol=1e-6)


def test_softmax_of_a_vector_is_a_vector() -> None:
    assert F.softmax([0.0, 0.0]).tolist() == [0.5, 0.5]
    with pytest.raises(ShapeError):
        F.softmax(1.0)


# --- reductions against the formulas written out ---


@each_float
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_labels_is_the_formula_in_every_reduction(
    dtype: Any, smoothing: float, weighted: bool
) -> None:
    n, c = 9, 5
    z, labels = random_logits(11, n, c).astype(dtype), np.array([0, 1, 2, 3, 4, -100, 2, -100, 0])
    w = np.linspace(0.2, 2, c) if weighted else np.ones(c)
    kept = labels != -100
    soft = (1 - smoothing) * hot(np.where(kept, labels, 0), c) + smoothing / c
    rows = np.where(kept, -(w * soft * plain_log_softmax(z)).sum(axis=1), 0)
    dz = (plain_softmax(z) * (w * soft).sum(axis=1, keepdims=True) - w * soft) * kept[:, None]
    divisor = w[labels[kept]].sum()
    options = {"weight": w if weighted else None, "label_smoothing": smoothing, "return_grad": True}
    for reduction, loss, gradient in (
        ("none", rows, dz),
        ("sum", rows.sum(), dz),
        ("mean", rows.sum() / divisor, dz / divisor),
    ):
        actual, actual_gradient = F.cross_entropy(z, labels, reduction=reduction, **options)
        np.testing.assert_allclose(actual, loss, rtol=1e-6)
        np.testing.assert_allclose(actual_gradient, gradient, atol=2e-6 if dtype is np.float32 else 1e-13)
        assert not actual_gradient[~kept].any()


@each_float
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_probabilities_is_the_formula_in_every_reduction(
    dtype: Any, smoothing: float, weighted: bool
) -> None:
    n, c = 6, 4
    z, target = random_logits(12, n, c).astype(dtype), plain_softmax(random_logits(13, n, c))
    w = np.linspace(0.2, 2, c) if weighted else np.ones(c)
    soft = w * ((1 - smoothing) * target + smoothing / c)
    rows = -(soft * plain_log_softmax(z)).sum(axis=1)
    dz = plain_softmax(z) * soft.sum(axis=1, keepdims=True) - soft
    options = {"weight": w if weighted else None, "label_smoothing": smoothing, "return_grad": True}
    for reduction, loss, gradient in (("none", rows, dz), ("sum", rows.sum(), dz), ("mean", rows.mean(), dz / n)):
        actual, actual_gradient = F.cross_entropy(z, target, reduction=reduction, **options)
        np.testing.assert_allclose(actual, loss, rtol=1e-6)
        np.testing.assert_allclose(actual_gradient, gradient, atol=2e-6 if dtype is np.float32 else 1e-13)


def test_another_label_may_stand_for_ignored_rows() -> None:
    z, labels = random_logits(1, 4, 3), np.array([0, -1, 2, -1])
    loss, gradient = F.cross_entropy(z, labels, ignore_index=-1, return_grad=True)
    assert loss == pytest.approx(plain_cross_entropy(z, hot(labels, 3))[[0, 2]].mean())
    assert not gradient[[1, 3]].any()
    in_range = F.cross_entropy(z, np.array([0, 1, 2, 1]), ignore_index=1)
    assert in_range == loss


@each_float
def test_the_mean_over_no_labels_at_all_is_zero_with_a_zero_gradient(dtype: Any) -> None:
    z, nothing = random_logits(1, 3, 4).astype(dtype), np.full(3, -100)
    for result in (
        F.cross_entropy(z, nothing, return_grad=True),
        F.cross_entropy(z, [0, 1, 0], weight=[0, 0, 1, 1], return_grad=True),
        F.distillation_loss(z, z.copy(), nothing, return_grad=True),
    ):
        assert result[0] == 0
        np.testing.assert_array_equal(result[1], 0)


@each_float
def test_kl_div_is_pointwise_and_divides_as_its_reduction_says(dtype: Any) -> None:
    log_p, q = plain_log_softmax(random_logits(1, 3, 4)).astype(dtype), plain_softmax(random_logits(2, 3, 4))
    q[0, 0] = 0
    q = q.astype(dtype)
    wide = q.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = np.where(wide == 0, 0, wide * (np.log(wide) - log_p))
        log_q = np.log(q)
    for reduction, loss, divisor in (
        ("none", points, 1),
        ("sum", points.sum(), 1),
        ("batchmean", points.sum() / 3, 3),
        ("mean", points.mean(), 12),
    ):
        for target, log_target in ((q, False), (log_q, True)):
            actual, gradient = F.kl_div(log_p, target, reduction=reduction, log_target=log_target, return_grad=True)
            np.testing.assert_allclose(actual, loss, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(gradient, -wide / divisor, rtol=1e-6)
    assert F.kl_div(log_p, q) == F.kl_div(log_p, q, reduction="batchmean")


def test_kl_div_of_more_axes_keeps_their_shape() -> None:
    log_p = plain_log_softmax(random_logits(1, 6, 4)).reshape(2, 3, 4)
    q = plain_softmax(random_logits(2, 6, 4)).reshape(2, 3, 4)
    points, gradient = F.kl_div(log_p, q, reduction="none", return_grad=True)
    np.testing.assert_allclose(points, q * (np.log(q) - log_p))
    np.testing.assert_allclose(gradient, -q)
    assert F.kl_div(log_p, q) == pytest.approx(points.sum() / 2)
    assert F.kl_div(log_p, q, reduction="mean") == pytest.approx(points.mean())
    tensor = kd.Tensor(log_p, requires_grad=True)
    F.kl_div(tensor, q, reduction="none").sum().backward()
    np.testing.assert_allclose(tensor.grad.numpy(), -q)


def test_kl_div_of_more_axes_writes_its_gradient_into_an_array_of_their_shape() -> None:
    log_p = plain_log_softmax(random_logits(1, 6, 4)).reshape(2, 3, 4)
    out = np.empty_like(log_p)
    _, gradient = F.kl_div(log_p, np.exp(log_p), grad_out=out)
    np.testing.assert_allclose(out, -np.exp(log_p) / 2)
    assert np.shares_memory(gradient, out)


@each_float
@pytest.mark.parametrize("target", ["none", "labels", "probabilities"])
@pytest.mark.parametrize("scale_t2", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_distillation_loss_is_the_formula_in_every_reduction(
    dtype: Any, target: str, scale_t2: bool, smoothing: float
) -> None:
    n, c, t, a, b = 6, 5, 3.0, 0.3, 1.7
    z_s, z_t = random_logits(21, n, c).astype(dtype), random_logits(22, n, c).astype(dtype)
    labels = np.array([0, 4, -100, 2, -100, 1])
    kept = np.ones(n, bool) if target == "probabilities" else (labels != -100) & (target == "labels")
    y = plain_softmax(random_logits(23, n, c)) if target == "probabilities" else hot(np.where(kept, labels, 0), c)
    soft_y = (1 - smoothing) * y + smoothing / c
    given_target = {"none": None, "labels": labels, "probabilities": y}[target]
    hard = a * np.where(kept, plain_cross_entropy(z_s, soft_y), 0)
    hard_gradient = a * (plain_softmax(z_s) - soft_y) * kept[:, None]
    factor = t * t if scale_t2 else 1.0
    soft = b * factor * plain_kl(z_s, z_t, t)
    soft_gradient = b * factor / t * (plain_softmax(z_s, t) - plain_softmax(z_t, t))
    m = max(kept.sum(), 1)
    options = {"temperature": t, "hard_weight": a, "soft_weight": b, "scale_t2": scale_t2, "label_smoothing": smoothing}
    for reduction, loss, gradient in (
        ("none", hard + soft, hard_gradient + soft_gradient),
        ("sum", (hard + soft).sum(), hard_gradient + soft_gradient),
        ("mean", hard.sum() / m + soft.mean(), hard_gradient / m + soft_gradient / n),
    ):
        result = F.distillation_loss(z_s, z_t, given_target, **options, reduction=reduction, return_grad=True)
        np.testing.assert_allclose(result[0], loss, rtol=2e-6)
        np.testing.assert_allclose(result[1], gradient, atol=1e-5 if dtype is np.float32 else 1e-12)


@each_float
def test_a_teacher_known_by_its_probabilities_is_its_logarithm(dtype: Any) -> None:
    z = random_logits(31, 4, 6)
    log_q = plain_log_softmax(z)
    direct = F.distillation_loss(random_logits(32, 4, 6).astype(dtype), z, temperature=7)
    via_log = F.distillation_loss(random_logits(32, 4, 6).astype(dtype), log_q, temperature=7)
    np.testing.assert_allclose(via_log, direct, rtol=1e-5)


# --- the gradient from the same traversal ---

LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda z, **k: F.cross_entropy(z, LABELS, **k),
    "soft cross_entropy": lambda z, **k: F.cross_entropy(z, hot(LABELS, 3), **k),
    "kl_div": lambda z, **k: F.kl_div(z, plain_softmax(TEACHER), **k),
    "distillation_loss": lambda z, **k: F.distillation_loss(z, TEACHER, LABELS, **k),
    "distillation_loss of probabilities": lambda z, **k: F.distillation_loss(z, TEACHER, hot(LABELS, 3), **k),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_float
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_returned_gradient_is_what_backward_leaves(dtype: Any, name: str, reduction: str) -> None:
    z = STUDENT.astype(dtype)
    value = LOSSES[name](z, reduction=reduction)
    again, gradient = LOSSES[name](z, reduction=reduction, return_grad=True)
    np.testing.assert_array_equal(value, again)
    tensor = kd.Tensor(z, requires_grad=True)
    loss = LOSSES[name](tensor, reduction=reduction)
    np.testing.assert_array_equal(loss.numpy(), value)
    (loss.sum() if loss.ndim else loss).backward()
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-6)


@each_float
@each_loss
def test_the_gradient_can_be_written_into_an_array_of_the_callers(dtype: Any, name: str) -> None:
    z, out = STUDENT.astype(dtype), np.full(STUDENT.shape, np.nan, dtype)
    loss, gradient = LOSSES[name](z, grad_out=out)
    plain_loss, plain_gradient = LOSSES[name](z, return_grad=True)
    assert gradient is out
    assert loss == plain_loss
    np.testing.assert_array_equal(out, plain_gradient)


@each_loss
def test_an_array_that_cannot_take_the_gradient_is_refused(name: str) -> None:
    z = STUDENT.astype(np.float32)
    read_only = np.empty((2, 3), np.float32)
    read_only.flags.writeable = False
    transposed = np.empty((3, 2), np.float32)
    for out in (np.empty((2, 3)), transposed, transposed.T, read_only, [[0.0] * 3] * 2):
        with pytest.raises(ArgumentError, match="grad_out must be a writable C-contiguous float32 array"):
            LOSSES[name](z, grad_out=out)


@each_loss
def test_tensors_are_asked_for_their_gradient_by_backward_only(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"return_grad.*loss\.backward\(\)"):
        LOSSES[name](kd.Tensor(STUDENT, requires_grad=True), return_grad=True)


@each_loss
def test_an_upstream_gradient_scales_each_row(name: str) -> None:
    tensor = kd.Tensor(STUDENT, requires_grad=True)
    loss = LOSSES[name](tensor, reduction="none")
    upstream = np.arange(1.0, 1 + loss.size).reshape(loss.shape)
    loss.backward(upstream)
    _, rows = LOSSES[name](STUDENT, reduction="none", return_grad=True)
    np.testing.assert_allclose(tensor.grad.numpy(), rows * (upstream if upstream.ndim == 2 else upstream[:, None]))


def test_no_gradient_flows_into_the_teacher_or_the_targets() -> None:
    student, teacher = (kd.Tensor(z, requires_grad=True) for z in (STUDENT, TEACHER))
    target = kd.Tensor(hot(LABELS, 3), requires_grad=True)
    F.distillation_loss(student, teacher, target).backward()
    F.kl_div(F.log_softmax(student), F.softmax(teacher)).backward()
    F.cross_entropy(student, target).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert target.grad is None


def test_a_loss_of_a_constant_student_needs_no_gradient() -> None:
    loss = F.distillation_loss(STUDENT, kd.Tensor(TEACHER, requires_grad=True), LABELS)
    assert not getattr(loss, "requires_grad", False)
    assert float(loss) == F.distillation_loss(STUDENT, TEACHER, LABELS)


# --- layers' functions ---


@each_float
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "sigmoid", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_product_bias_and_activation(dtype: Any, activation: str | None, bias: bool) -> None:
    rng = np.random.default_rng(5)
    x, w, b = (rng.normal(size=s) for s in ((7, 4), (3, 4), (3,)))
    u = x @ w.T + (b if bias else 0)
    erf = np.vectorize(math.erf)
    wanted = {
        None: u,
        "relu": np.maximum(u, 0),
        "tanh": np.tanh(u),
        "sigmoid": 1 / (1 + np.exp(-u)),
        "gelu": u * 0.5 * (1 + erf(u / math.sqrt(2))),
    }[activation]
    y = F.linear(x.astype(dtype), w.astype(dtype), b.astype(dtype) if bias else None, activation)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, wanted, atol=3e-6 if dtype is np.float32 else 1e-14)


def test_linear_refuses_an_unknown_activation_and_shapes_that_do_not_chain() -> None:
    with pytest.raises(ArgumentError, match="activation must be one of relu, tanh, sigmoid, gelu, got 'swish'"):
        F.linear(np.ones((2, 3)), np.ones((4, 3)), activation="swish")
    with pytest.raises(ShapeError):
        F.linear(np.ones((2, 3)), np.ones((4, 5)))
    with pytest.raises(ShapeError):
        F.linear(np.ones((2, 3)), np.ones((4, 3)), np.ones(3))


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, math.nan])
def test_dropout_refuses_a_share_outside_zero_to_one(p: float) -> None:
    with pytest.raises(ArgumentError, match=r"p must be in \[0, 1\)"):
        F.dropout(np.ones(3), p)


def test_fake_quantise_gives_what_the_integers_hold_and_a_gradient_inside_their_ends() -> None:
    x = kd.Tensor(np.array([0.1, 0.125, 0.375, -0.6, 1.3, 1.4, -0.9]), requires_grad=True)
    y = F.fake_quantise(x, 0.25, -3, low=-5, high=2)
    assert y.numpy().tolist() == [0.0, 0.0, 0.5, -0.5, 1.25, 1.25, -0.5]
    y.sum().backward()
    assert x.grad.numpy().tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_fake_quantise_takes_a_scale_for_each_row_and_zeros_where_that_is_zero() -> None:
    x = kd.Tensor(np.array([[0.3, -9.0], [0.0, 0.0], [7.0, 1.6]]), requires_grad=True)
    scale = kd.Tensor(np.array([0.25, 0.0, 1.0]), requires_grad=True)
    y = F.fake_quantise(x, scale, low=-4, high=4)
    assert y.numpy().tolist() == [[0.25, -1.0], [0.0, 0.0], [4.0, 2.0]]
    y.sum().backward()
    assert x.grad.numpy().tolist() == [[1, 0], [1, 1], [0, 1]]
    assert scale.grad is None


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-45, "large"])
def test_fake_quantise_refuses_a_scale_that_is_no_number_above_zero(scale: Any) -> None:
    with pytest.raises(ArgumentError, match="fake_quantise: scale must be a finite number above 0"):
        F.fake_quantise(np.ones(3), scale)


@pytest.mark.parametrize(
    "ends", [{"low": 1}, {"high": -1}, {"zero": 200}, {"low": 0, "high": 0}, {"high": 0.5}, {"high": 2**21}]
)
def test_fake_quantise_refuses_ends_that_are_not_whole_or_leave_out_zero(ends: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"fake_quantise: .* must be whole numbers within"):
        F.fake_quantise(np.ones(3), 0.5, **ends)


def test_fake_quantise_refuses_scales_that_are_not_one_for_each_row() -> None:
    with pytest.raises(ShapeError, match="scale must be of shape"):
        F.fake_quantise(np.ones((3, 2)), np.ones(2))


# --- properties ---


def logits(n: int = 4, c: int = 6, bound: float = 30) -> st.SearchStrategy[Any]:
    """Rows of scores; a grid of sixteenths, so that adding a whole number to a row is exact."""
    shapes = st.tuples(st.integers(1, n), st.integers(1, c))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=_sixteenths(bound)))


def _sixteenths(bound: float) -> st.SearchStrategy[float]:
    return st.integers(int(-16 * bound), int(16 * bound)).map(lambda k: k / 16)


@st.composite
def two_rows_of_logits(draw: st.DrawFn, n: int = 4, c: int = 6, bound: float = 30) -> tuple[Any, Any]:
    first = draw(logits(n, c, bound))
    return first, draw(arrays(np.float64, first.shape, elements=_sixteenths(bound)))


temperatures = st.sampled_from([0.05, 0.5, 1.0, 2.5, 4.0, 20.0, 300.0])


@given(z=logits(), shift=st.integers(-1000, 1000), t=temperatures)
def test_softmax_does_not_change_when_a_row_is_shifted(z: Any, shift: int, t: float) -> None:
    for dtype in (np.float32, np.float64):
        x, few = z.astype(dtype), 16 * float(np.finfo(dtype).eps)
        shifted = F.softmax(x + dtype(shift), temperature=t)
        np.testing.assert_allclose(shifted, F.softmax(x, temperature=t), rtol=few, atol=0)


@given(z=logits(bound=1e6), t=temperatures)
def test_probabilities_are_in_order_and_sum_to_one(z: Any, t: float) -> None:
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-14)):
        p = F.softmax(z.astype(dtype), temperature=t)
        np.testing.assert_allclose(p.sum(axis=1, dtype=np.float64), 1, atol=tolerance)
        assert ((p >= 0) & (p <= 1)).all()
        order = np.argsort(z, axis=1, kind="stable")
        assert (np.diff(np.take_along_axis(p, order, axis=1)) >= 0).all()


@given(z=logits(), t=temperatures)
def test_log_softmax_is_the_logarithm_of_softmax(z: Any, t: float) -> None:
    assume(z.max() - z.min() < 700 * t)
    np.testing.assert_allclose(np.exp(F.log_softmax(z, temperature=t)), F.softmax(z, temperature=t), rtol=1e-12)


@given(z=logits(), t=temperatures, u=temperatures)
def test_entropy_grows_with_temperature(z: Any, t: float, u: float) -> None:
    def entropy(at: float) -> Any:
        p = F.softmax(z, temperature=at)
        return -(p * np.log(np.where(p == 0, 1, p))).sum(axis=1)

    low, high = sorted((t, u))
    assert (entropy(low) <= entropy(high) + 1e-12).all()


@may_look_like_probabilities
@given(pair=two_rows_of_logits(), t=temperatures)
def test_the_divergence_is_never_negative_and_zero_only_for_equal_predictions(pair: Any, t: float) -> None:
    for dtype in (np.float32, np.float64):
        z_s, z_t = (z.astype(dtype) for z in pair)
        rows = F.distillation_loss(z_s, z_t, temperature=t, soft_weight=1.0, reduction="none")
        assert (rows >= 0).all()
    gap = np.abs(plain_softmax(pair[0], t) - plain_softmax(pair[1], t)).sum(axis=1)
    bound = t * t * gap**2 / 2  # Pinsker's inequality
    assert (rows >= bound * (1 - 1e-9)).all()


@may_look_like_probabilities
@given(z=logits(), shift=st.integers(-50, 50), t=temperatures)
def test_the_divergence_of_shifted_logits_is_zero(z: Any, shift: int, t: float) -> None:
    rows = F.distillation_loss(z, z + shift, temperature=t, soft_weight=1.0, reduction="none")
    assert ((rows >= 0) & (rows <= 1e-12 * t * t)).all()


@may_look_like_probabilities
@given(pair=two_rows_of_logits(), t=temperatures, data=st.data())
def test_the_entries_of_a_gradient_row_sum_to_zero(pair: Any, t: float, data: st.DataObject) -> None:
    n, c = pair[0].shape
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, c - 1)))
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-13)):
        z_s, z_t = (z.astype(dtype) for z in pair)
        for result in (
            F.cross_entropy(z_s, labels, return_grad=True, label_smoothing=0.1),
            F.distillation_loss(z_s, z_t, labels, temperature=t, return_grad=True),
        ):
            np.testing.assert_allclose(result[1].sum(axis=1, dtype=np.float64), 0, atol=tolerance * max(1, t))


@may_look_like_probabilities
@given(pair=two_rows_of_logits(n=6), t=temperatures, cut=st.integers(0, 6), data=st.data())
def test_the_sums_of_two_parts_of_a_batch_add_up(pair: Any, t: float, cut: int, data: st.DataObject) -> None:
    z_s, z_t = pair
    n, c = z_s.shape
    assume(0 < cut < n)
    labels = data.draw(arrays(np.int64, n, elements=st.one_of(st.just(-100), st.integers(0, c - 1))))

    def loss(rows: slice) -> Any:
        pieces = (z_s[rows], z_t[rows], labels[rows])
        return F.distillation_loss(*pieces, temperature=t, reduction="sum", return_grad=True)

    (first, g_first), (second, g_second), (whole, g_whole) = loss(slice(cut)), loss(slice(cut, n)), loss(slice(n))
    assert first + second == pytest.approx(whole, rel=1e-12, abs=1e-12)
    np.testing.assert_array_equal(np.concatenate([g_first, g_second]), g_whole)


@may_look_like_probabilities
@given(pair=two_rows_of_logits(), t=temperatures, data=st.data())
def test_renaming_the_classes_renames_the_result(pair: Any, t: float, data: st.DataObject) -> None:
    z_s, z_t = pair
    n, c = z_s.shape
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, c - 1)))
    order = np.array(data.draw(st.permutations(range(c))))
    renamed = np.argsort(order)[labels]
    p = F.softmax(z_s, temperature=t)
    np.testing.assert_allclose(F.softmax(z_s[:, order], temperature=t), p[:, order], rtol=1e-12)
    loss, gradient = F.distillation_loss(z_s, z_t, labels, temperature=t, return_grad=True)
    other, other_gradient = F.distillation_loss(z_s[:, order], z_t[:, order], renamed, temperature=t, return_grad=True)
    assert other == pytest.approx(loss, rel=1e-11, abs=1e-12)
    np.testing.assert_allclose(other_gradient, gradient[:, order], rtol=1e-11, atol=1e-12 * max(1, t))


@may_look_like_probabilities
@given(pair=two_rows_of_logits(c=5), t=temperatures, data=st.data())
def test_a_masked_class_is_as_good_as_absent(pair: Any, t: float, data: st.DataObject) -> None:
    z_s, z_t = pair
    n, c = z_s.shape
    place = data.draw(st.integers(0, c))
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, c - 1)))
    masked = [np.insert(z, place, -np.inf, axis=1) for z in pair]
    moved = labels + (labels >= place)
    loss, gradient = F.distillation_loss(z_s, z_t, labels, temperature=t, return_grad=True)
    other, other_gradient = F.distillation_loss(*masked, moved, temperature=t, return_grad=True)
    assert other == pytest.approx(loss, rel=1e-11, abs=1e-12)
    np.testing.assert_array_equal(other_gradient[:, place], 0)
    np.testing.assert_allclose(np.delete(other_gradient, place, axis=1), gradient, rtol=1e-11, atol=1e-12 * max(1, t))


@may_look_like_probabilities
@given(
    z=arrays(np.float64, (2, 3), elements=st.floats(-1e30, 1e30)),
    labels=arrays(np.int64, 2, elements=st.integers(0, 2)),
    t=temperatures,
)
def test_finite_logits_never_give_nan(z: Any, labels: Any, t: float) -> None:
    for dtype in (np.float32, np.float64):
        x = z.astype(dtype)
        p = F.softmax(x, temperature=t)
        assert np.isfinite(p).all()
        loss, gradient = F.distillation_loss(x, x[::-1], labels, temperature=t, return_grad=True)
        assert loss >= 0
        assert np.isfinite(gradient).all()
        assert F.cross_entropy(x, labels) >= 0


@may_look_like_probabilities
@given(
    pair=two_rows_of_logits(bound=12),
    t=st.sampled_from([1.0, 2.0, 4.0, 20.0, 100.0]),
    hard=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_a_float32_gradient_is_right_to_a_millionth_of_what_it_is_the_difference_of(
    pair: Any, t: float, hard: float
) -> None:
    z_s, z_t = pair
    labels = np.zeros(len(z_s), np.int64)
    options = {"temperature": t, "hard_weight": hard, "soft_weight": 0.7, "reduction": "none", "return_grad": True}
    loss, gradient = F.distillation_loss(z_s.astype(np.float32), z_t.astype(np.float32), labels, **options)
    wide_loss, wide_gradient = F.distillation_loss(z_s, z_t, labels, **options)
    p, q = plain_softmax(z_s, t), plain_softmax(z_t, t)
    allowed = 1e-6 * np.maximum(hard, 0.7 * t * np.maximum(p, q))
    assert (np.abs(gradient - wide_gradient) <= allowed).all()
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-5, atol=1e-6 * t * t)


@each_float
def test_a_float32_gradient_keeps_its_accuracy_when_the_student_nearly_matches(dtype: Any) -> None:
    rng = np.random.default_rng(9)
    z_t = (3 * rng.normal(size=(64, 100))).astype(np.float32)
    z_s = (z_t + 1e-4 * rng.normal(size=z_t.shape)).astype(np.float32)
    for t in (1.0, 4.0, 20.0):
        options = {"temperature": t, "soft_weight": 1.0, "reduction": "none", "return_grad": True}
        loss, gradient = F.distillation_loss(z_s.astype(dtype), z_t.astype(dtype), **options)
        p, q = plain_softmax(z_s, t), plain_softmax(z_t, t)
        assert (np.abs(gradient - t * (p - q)) <= 1e-6 * t * np.maximum(p, q).max(axis=1, keepdims=True)).all()
        assert (loss >= 0).all()
        np.testing.assert_allclose(loss, t * t * plain_kl(z_s, z_t, t), rtol=1e-3, atol=1e-13 * t * t)


@pytest.mark.parametrize("offset", [0, 30, 100, 300, 1000, 10_000])
def test_float32_results_are_as_accurate_for_rows_far_from_zero(offset: int) -> None:
    z_s, z_t = (random_logits(seed, 50, 10).astype(np.float32) + np.float32(offset) for seed in (41, 42))
    for t in (1.0, 3.0, 7.0):
        p, q = plain_softmax(z_s, t), plain_softmax(z_t, t)
        # A score is rounded by its distance from the largest one, which exp turns into an error relative to p.
        distance = (z_s.max(axis=1, keepdims=True) - z_s) / t
        assert (np.abs(F.softmax(z_s, temperature=t) - p) <= 2.0**-23 * (2 + distance) * p).all()
        options = {"temperature": t, "hard_weight": 0.0, "soft_weight": 1.0, "reduction": "none", "return_grad": True}
        _, gradient = F.distillation_loss(z_s, z_t, **options)
        assert (np.abs(gradient - t * (p - q)) <= 1e-6 * t * np.maximum(p, q).max(axis=1, keepdims=True)).all()


# --- what a teacher is worth ---


@each_float
def test_a_teachers_confidence_is_the_share_of_entropy_that_it_has_taken_away(dtype: Any) -> None:
    z = np.array([[0, 0, 0, 0], [0, -np.inf, -np.inf, -np.inf], [1, 1, -np.inf, -np.inf], [3, 1, 0, -1]], dtype)
    q = plain_softmax(z[3].astype(float), 2.0)
    last = 1 + (q * np.log(q)).sum() / np.log(4)
    weights = F.teacher_confidence(z, temperature=2.0)
    assert weights.dtype == dtype
    np.testing.assert_allclose(weights, [0, 1, 0.5, last], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(F.teacher_confidence(np.array([[7], [-3]], dtype)), [1, 1])


@each_float
@pytest.mark.parametrize("classes", [4, 150])
def test_with_labels_a_teachers_confidence_is_its_probability_of_the_true_class(dtype: Any, classes: int) -> None:
    z = random_logits(5, 6, classes).astype(dtype)
    labels = np.array([0, 1, -100, 3, -100, 2])
    q = plain_softmax(z, 3.0)
    wanted = [q[k].max() if y == -100 else q[k, y] for k, y in enumerate(labels)]
    np.testing.assert_allclose(F.teacher_confidence(z, labels, 3.0), wanted, rtol=1e-5)
    np.testing.assert_array_equal(
        F.teacher_confidence(z, np.where(labels < 0, 3, labels), 3.0, ignore_index=3)[[2, 4]],
        F.teacher_confidence(z, labels, 3.0)[[2, 4]],
    )


@each_float
def test_a_broken_row_of_a_teacher_has_no_confidence_and_spoils_no_other(dtype: Any) -> None:
    z = np.array([[0, np.nan, 1], [1, 2, 3], [np.inf, 0, 0], [-np.inf] * 3], dtype)
    for target in (None, np.array([0, 1, 2, -100])):
        weights = F.teacher_confidence(z, target)
        assert np.isnan(weights).tolist() == [True, False, True, True]
        assert weights[1] == F.teacher_confidence(z[1:2], None if target is None else target[1:2])


@may_look_like_probabilities
@settings(max_examples=40)
@given(
    z=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 130)), elements=st.floats(-1e6, 1e6, width=32)),
    temperature=st.floats(1e-3, 1e3),
)
def test_a_confidence_lies_between_zero_and_one(z: Any, temperature: float) -> None:
    for target in (None, z.argmin(axis=1)):
        weights = F.teacher_confidence(z, target, temperature)
        assert ((weights >= 0) & (weights <= 1)).all()


def test_a_confidence_of_probabilities_warns_that_they_are_no_logits() -> None:
    with pytest.warns(UserWarning, match=LOOKS_LIKE):
        F.teacher_confidence(np.array([[0.25, 0.75]]))


def test_a_teachers_mistakes_are_put_right_by_exchanging_two_logits() -> None:
    z = np.array([[5.0, 1, 2], [1, 5, 2], [0, 4, 4], [0, 4, 9]])
    labels = np.array([2, 1, 2, -100])
    before = z.copy()
    np.testing.assert_array_equal(F.corrected_logits(z, labels), [[2, 1, 5], [1, 5, 2], [0, 4, 4], [0, 4, 9]])
    np.testing.assert_array_equal(z, before)
    np.testing.assert_array_equal(F.corrected_logits(z[:3], labels[:3], ignore_index=2), z[:3])


@settings(max_examples=40)
@given(data=st.data())
def test_corrected_logits_have_their_largest_at_the_label_and_are_else_the_same_numbers(data: Any) -> None:
    n, c = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 120))
    z = random_logits(data.draw(st.integers(0, 99)), n, c)
    labels = np.array(data.draw(st.lists(st.sampled_from([-100, *range(c)]), min_size=n, max_size=n)))
    y = F.corrected_logits(z, labels)
    known = labels != -100
    np.testing.assert_array_equal(y.argmax(axis=1)[known], labels[known])
    np.testing.assert_array_equal(y[~known], z[~known])
    np.testing.assert_array_equal(np.sort(y, axis=1), np.sort(z, axis=1))
    assert ((y != z).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("function", [F.teacher_confidence, F.corrected_logits])
def test_labels_of_a_teacher_that_do_not_fit_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentError, match=r"target\[1\].*got 3"):
        function(TEACHER, [0, 3])
    with pytest.raises(ShapeError, match=r"target must be class ids of shape \(2,\)"):
        function(TEACHER, hot(LABELS, 3))
    with pytest.raises(ShapeError, match="teacher_logits"):
        function(TEACHER[0], [0])


def test_a_temperature_that_softens_nothing_is_refused_for_a_confidence() -> None:
    with pytest.raises(ArgumentError, match="teacher_confidence: temperature"):
        F.teacher_confidence(TEACHER, temperature=0.0)


def test_no_gradient_flows_through_what_a_teacher_is_worth() -> None:
    z = kd.Tensor(TEACHER, requires_grad=True)
    assert not F.teacher_confidence(z, LABELS).requires_grad
    assert not F.corrected_logits(z, LABELS).requires_grad


# --- pictures that are moved ---


def moved_by_hand(picture: Any, down: int, right: int, fill: Any) -> Any:
    found = fill.copy()
    for i in range(picture.shape[0]):
        for j in range(picture.shape[1]):
            if 0 <= i - down < picture.shape[0] and 0 <= j - right < picture.shape[1]:
                found[i, j] = picture[i - down, j - right]
    return found


def moves(n: int, most: int, seed: int, stream: int, step: int) -> Any:
    """How far each picture goes down and right, by the text of `shift_images`."""
    words = random_words(np, 2 * n, seed, stream ^ 2**31, step).reshape(n, 2)
    return np.array([[int(w) * (2 * most + 1) // 2**32 - most for w in pair] for pair in words]).reshape(n, 2)


@settings(max_examples=30)
@given(
    n=st.integers(0, 9),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    most=st.integers(0, 3),
    seed=st.integers(-3, 2**64),
    stream=st.integers(0, 9),
    step=st.integers(0, 2**34),
    filled=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_picture_is_moved_as_a_plain_loop_moves_it(
    n: int, shape: tuple[int, int], most: int, seed: int, stream: int, step: int, filled: bool, dtype: Any
) -> None:
    assume(most < min(shape))
    size = shape[0] * shape[1]
    x = np.arange(1, n * size + 1).reshape(n, size).astype(dtype)
    fill = -np.arange(1, size + 1).astype(dtype) if filled else None
    y = F.shift_images(x, shape, step, most=most, fill=fill, seed=seed, stream=stream)
    blank = (np.zeros(size, dtype) if fill is None else fill).reshape(shape)
    wanted = [
        moved_by_hand(picture.reshape(shape), *by, blank).ravel()
        for picture, by in zip(x, moves(n, most, seed, stream, step), strict=True)
    ]
    np.testing.assert_array_equal(y, np.array(wanted, dtype).reshape(n, size))
    assert y.dtype == dtype


def test_a_row_moves_alike_whatever_rows_stand_behind_it_and_else_at_random() -> None:
    x = np.tile(np.arange(1, 26, dtype=np.float32), (700, 1))
    y = F.shift_images(x, (5, 5), 3, seed=1)
    np.testing.assert_array_equal(F.shift_images(x[:7], (5, 5), 3, seed=1), y[:7])
    for change in ({"step": 4}, {"seed": 2}, {"stream": 1}):
        assert not np.array_equal(F.shift_images(x, (5, 5), **{"step": 3, "seed": 1, **change}), y)
    assert len(np.unique(y, axis=0)) == 25


def test_every_move_is_drawn_as_often_as_any_other() -> None:
    n = 50_000
    counts = np.unique(moves(n, 2, 7, 0, 0) @ [5, 1], return_counts=True)[1]
    assert len(counts) == 25
    np.testing.assert_allclose(counts, n / 25, atol=5 * math.sqrt(n / 25))


def test_moves_are_no_numbers_of_a_dropout_layer_with_the_same_seed_and_stream() -> None:
    assert not np.array_equal(random_words(np, 8, 5, 3 ^ 2**31, 1), random_words(np, 8, 5, 3, 1))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"shape": (4, 5)}, ShapeError, r"x must be of shape \(n, 20\)"),
        ({"shape": (16,)}, ArgumentError, "shape must be the height and width"),
        ({"shape": 4}, ArgumentError, "shape must be the height and width"),
        ({"shape": (-4, -4)}, ArgumentError, "shape must be the height and width"),
        ({"shape": (4.0, 4)}, ArgumentError, "shape must be the height and width"),
        ({"x": np.ones(16)}, ShapeError, "x must be of shape"),
        ({"most": 4}, ArgumentError, "most must be a whole number from 0 to 3"),
        ({"most": -1}, ArgumentError, "most must be a whole number from 0 to 3"),
        ({"most": 1.5}, ArgumentError, "most must be a whole number from 0 to 3"),
        ({"fill": np.ones(4)}, ShapeError, "fill must be of shape"),
    ],
)
def test_what_cannot_be_moved_is_refused_in_words(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        F.shift_images(**{"x": np.ones((2, 16)), "shape": (4, 4), "step": 0, **change})


def test_no_gradient_flows_through_a_moved_picture() -> None:
    assert not F.shift_images(kd.Tensor(np.ones((2, 9)), requires_grad=True), (3, 3), 0).requires_grad
