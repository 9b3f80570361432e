"""The divergences beside KL(teacher ‖ student): their numbers, edge cases and properties, and what C makes of them.

That each backend agrees with the reference, and the reference with differences, is tested in test_ops with all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, MinikdError, ShapeError
from minikd.kernels import execute, native
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS


def on_each_backend(test: Any) -> Any:
    """Run a test on C and on the reference, which is what Numba runs too: it has no kernels of these operations."""
    return pytest.mark.usefixtures("backend")(pytest.mark.parametrize("backend", ["c", "numpy"], indirect=True)(test))


each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_level = pytest.mark.parametrize("level", native.cpu_levels() or ("base",))

# The two rows by which formulas are compared.
STUDENT = np.array([[2, 1, 0.1], [0.5, 2.5, -1]])
TEACHER = np.array([[3, 0.5, -0.5], [0, 3, 0]])
LABELS = np.array([0, 1])

Loss = Callable[..., Any]


@cache
def targets(n: int, c: int) -> Any:
    """Some class for each row; the same array each time, as a compiled step wants it."""
    return np.arange(n) % c


# Every loss, and what it is for a student and a teacher of any shape; the settings are those that its users may vary.
LOSSES: dict[str, Loss] = {
    "reverse_kl": F.reverse_kl,
    "jensen_shannon": F.jensen_shannon,
    "jensen_shannon, unequal": lambda s, t, **k: F.jensen_shannon(s, t, beta=0.9, **k),
    "jensen_shannon, continuous": lambda s, t, **k: F.jensen_shannon(s, t, beta=0.1, form="continuous", **k),
    "skewed_kl": F.skewed_kl,
    "skewed_kl, reverse": lambda s, t, **k: F.skewed_kl(s, t, alpha=0.3, reverse=True, **k),
    "skewed_kl, plain": lambda s, t, **k: F.skewed_kl(s, t, alpha=0.0, **k),
    "skewed_kl, plain and reverse": lambda s, t, **k: F.skewed_kl(s, t, alpha=0.0, reverse=True, **k),
    "decoupled_kd": lambda s, t, **k: F.decoupled_kd(s, t, targets(*s.shape), **k),
    "standardised_kl": F.standardised_kl,
}
each_loss = pytest.mark.parametrize("name", LOSSES)
MIXED = tuple(name for name in LOSSES if name.startswith(("reverse", "jensen", "skewed")))


def close(dtype: Any, wide: float = 6e-12, narrow: float = 2e-6) -> dict[str, float]:
    """Golden numbers have eleven digits; float32 is compared to some of its own."""
    return {"rtol": 0, "atol": wide if np.dtype(dtype) == np.float64 else narrow}


def random_logits(seed: int, n: int, c: int, scale: float = 3.0) -> Any:
    return scale * np.random.default_rng(seed).normal(size=(n, c))


# --- the same formulas, written out in float64 ---


def plain_log_softmax(z: Any, t: float = 1.0) -> Any:
    z = np.asarray(z, np.float64) / t
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(p: Any, q: Any) -> Any:
    """KL(p ‖ q) of rows of positive probabilities."""
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def softened(t: float, student: Any = STUDENT, teacher: Any = TEACHER) -> tuple[Any, Any]:
    return np.exp(plain_log_softmax(student, t)), np.exp(plain_log_softmax(teacher, t))


def plain_ends(student: Any, teacher: Any, t: float) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """T²·KL(q ‖ p) and T²·KL(p ‖ q) of each row, each with its gradient."""
    p, q = softened(t, student, teacher)
    slope = np.log(p) - np.log(q)
    reverse = t * p * (slope - kl(p, q)[:, None])
    return (t * t * kl(q, p), t * (p - q)), (t * t * kl(p, q), reverse)


# --- the numbers of the formulas ---


@on_each_backend
@each_float
def test_the_reverse_divergence_is_that_of_the_table(dtype: Any) -> None:
    loss = F.reverse_kl(STUDENT.astype(dtype), TEACHER.astype(dtype))
    np.testing.assert_allclose(loss, 0.12782196266, **close(dtype))
    assert loss.dtype == dtype


@on_each_backend
@each_float
@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
def test_the_mixed_divergences_are_their_formulas(dtype: Any, t: float) -> None:
    student, teacher, settings = STUDENT.astype(dtype), TEACHER.astype(dtype), {"temperature": t, "reduction": "none"}
    p, q = softened(t)
    tolerance = close(dtype, 1e-13)
    np.testing.assert_allclose(F.reverse_kl(student, teacher, **settings), t * t * kl(p, q), **tolerance)
    for x in (0.1, 0.5, 0.8):
        m = x * q + (1 - x) * p
        wanted = t * t * (x * kl(q, m) + (1 - x) * kl(p, m))
        np.testing.assert_allclose(F.jensen_shannon(student, teacher, beta=x, **settings), wanted, **tolerance)
        loss = F.jensen_shannon(student, teacher, beta=x, form="continuous", **settings)
        np.testing.assert_allclose(loss, wanted / (x * (1 - x)), **tolerance)
        wanted = t * t * kl(q, m)
        np.testing.assert_allclose(F.skewed_kl(student, teacher, alpha=x, **settings), wanted, **tolerance)
        wanted = t * t * kl(p, x * p + (1 - x) * q)
        loss = F.skewed_kl(student, teacher, alpha=x, reverse=True, **settings)
        np.testing.assert_allclose(loss, wanted, **tolerance)


@on_each_backend
@each_float
def test_decoupled_distillation_gives_the_numbers_of_the_published_formula(dtype: Any) -> None:
    """Those that the authors' formula has in float64, which sets the target's score 1000 lower among the others."""
    pair = STUDENT.astype(dtype), TEACHER.astype(dtype), LABELS
    rows = F.decoupled_kd(*pair, reduction="none")
    np.testing.assert_allclose(rows, [0.30680120140, 2.24972699545], **close(dtype, narrow=4e-6))
    target_alone = F.decoupled_kd(*pair, beta=0.0, reduction="none")
    np.testing.assert_allclose(target_alone, [0.29694588070, 0.01278829722], **close(dtype))
    loss, gradient = F.decoupled_kd(*pair, return_grad=True)
    wanted = [[-0.19143010836, 0.00783603386, 0.1835940745], [1.5063603343, -0.03997987238, -1.46638046191]]
    np.testing.assert_allclose(gradient, wanted, **close(dtype, 1e-11))
    np.testing.assert_allclose(loss, rows.mean(), rtol=1e-6)


@on_each_backend
@each_float
def test_standardised_distillation_gives_the_numbers_of_the_published_formula(dtype: Any) -> None:
    pair = STUDENT.astype(dtype), TEACHER.astype(dtype)
    rows = F.standardised_kl(*pair, reduction="none")
    np.testing.assert_allclose(rows, [0.01254263396, 0.04691137101], **close(dtype))
    _, gradient = F.standardised_kl(*pair, return_grad=True)
    wanted = [[-0.01763940139, 0.0372387351, -0.01959933371], [0.03649332189, -0.01563999506, -0.02085332683]]
    np.testing.assert_allclose(gradient, wanted, **close(dtype, 1e-11))


@on_each_backend
def test_the_decoupled_parts_put_together_are_the_divergence() -> None:
    """KL(q ‖ p) = KL of target against others + (1 - q_y)·KL among the others."""
    student, teacher, y = random_logits(0, 6, 5), random_logits(1, 6, 5), np.array([0, 4, 2, 2, 1, 3])
    q = np.exp(plain_log_softmax(teacher, 3.0))[np.arange(6), y]
    settings: dict[str, Any] = {"temperature": 3.0, "reduction": "none"}
    own = F.decoupled_kd(student, teacher, y, alpha=1.0, beta=0.0, **settings)
    others = F.decoupled_kd(student, teacher, y, alpha=0.0, beta=1.0, **settings)
    whole = plain_ends(student, teacher, 3.0)[0][0]
    np.testing.assert_allclose(own + (1 - q) * others, whole, rtol=1e-12)


# --- where one divergence becomes another ---


@on_each_backend
@each_float
def test_at_its_ends_and_near_them_the_continuous_form_is_the_forward_and_the_reverse_divergence(dtype: Any) -> None:
    student, teacher = random_logits(2, 5, 6).astype(dtype), random_logits(3, 5, 6).astype(dtype)
    settings: dict[str, Any] = {"form": "continuous", "temperature": 2.0, "reduction": "none", "return_grad": True}
    for end, wanted in zip((0.0, 1.0), plain_ends(student, teacher, 2.0), strict=True):
        for beta in (end, abs(end - 1e-9)):
            for found, value in zip(F.jensen_shannon(student, teacher, beta=beta, **settings), wanted, strict=True):
                np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


@on_each_backend
@each_float
def test_a_skew_of_zero_is_the_plain_divergence(dtype: Any) -> None:
    student, teacher = random_logits(2, 5, 6).astype(dtype), random_logits(3, 5, 6).astype(dtype)
    settings: dict[str, Any] = {"temperature": 2.0, "reduction": "none", "return_grad": True}
    few = 1e-5 if dtype is np.float32 else 1e-13
    for reverse, wanted in zip((False, True), plain_ends(student, teacher, 2.0), strict=True):
        found = F.skewed_kl(student, teacher, alpha=0.0, reverse=reverse, **settings)
        for actual, value in zip(found, wanted, strict=True):
            np.testing.assert_allclose(actual, value, rtol=few, atol=few)
    for actual, value in zip(found, F.reverse_kl(student, teacher, **settings), strict=True):
        np.testing.assert_array_equal(actual, value)


@on_each_backend
@each_float
def test_with_equal_shares_it_makes_no_difference_who_is_the_teacher(dtype: Any) -> None:
    student, teacher = random_logits(4, 8, 7).astype(dtype), random_logits(5, 8, 7).astype(dtype)
    there, back = (F.jensen_shannon(*pair, reduction="none") for pair in ((student, teacher), (teacher, student)))
    np.testing.assert_allclose(there, back, rtol=1e-5 if dtype is np.float32 else 1e-13)
    assert np.all(there <= np.log(2) * (1 + 1e-6))


@on_each_backend
@each_float
def test_standardised_scores_keep_neither_mean_nor_size(dtype: Any) -> None:
    student, teacher = random_logits(6, 4, 9), random_logits(7, 4, 9)
    moved = (3 * student - 7).astype(dtype), (0.25 * teacher + 2).astype(dtype)
    found = F.standardised_kl(*moved, reduction="none")
    np.testing.assert_allclose(found, F.standardised_kl(student, teacher, reduction="none"), **close(dtype, 1e-6))
    _, gradient = F.standardised_kl(*moved, eps=1e-12, return_grad=True)
    # so moving the student along its own scores, or up, changes nothing
    np.testing.assert_allclose((gradient * moved[0]).sum(axis=1), 0, atol=1e-5 if dtype is np.float32 else 1e-12)


@on_each_backend
def test_scores_that_are_all_equal_have_no_deviation_and_still_an_answer() -> None:
    loss, gradient = F.standardised_kl(np.full((1, 3), 5.0), TEACHER[:1], eps=0.5, temperature=1.0, return_grad=True)
    assert np.isfinite(loss)
    z = (TEACHER[:1] - TEACHER[:1].mean()) / (TEACHER[:1].std(ddof=1) + 0.5)
    np.testing.assert_allclose(gradient, (1 / 3 - np.exp(plain_log_softmax(z))) / 0.5, rtol=1e-12)


# --- what every one of them promises ---


@on_each_backend
@each_float
@each_loss
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), c=st.integers(3, 12), t=st.floats(0.3, 30))
def test_no_loss_is_negative_and_no_gradient_has_a_sum(
    name: str, dtype: Any, seed: int, n: int, c: int, t: float
) -> None:
    student, teacher = random_logits(seed, n, c).astype(dtype), random_logits(seed + 1, n, c).astype(dtype)
    settings: dict[str, Any] = {"temperature": t, "reduction": "none", "return_grad": True}
    rows, gradient = LOSSES[name](student, teacher, **settings)
    assert np.all(rows >= 0)
    size = np.abs(gradient).sum(axis=1) + t
    assert np.all(np.abs(gradient.sum(axis=1)) <= 64 * np.finfo(dtype).eps * size)


@on_each_backend
@each_float
@each_loss
@pytest.mark.parametrize("t", [0.5, 4.0, 1e6])
def test_a_student_who_agrees_has_nothing_to_learn(name: str, dtype: Any, t: float) -> None:
    for c in (3, 40, 130):
        z = random_logits(8, 5, c).astype(dtype)
        rows, gradient = LOSSES[name](z, z.copy(), temperature=t, reduction="none", return_grad=True)
        assert np.all((rows >= 0) & (rows <= 1e-12 * t * t))
        np.testing.assert_allclose(gradient, 0, atol=64 * np.finfo(dtype).eps * t)


@on_each_backend
@each_float
@each_loss
def test_the_reductions_add_up_and_t_squared_may_be_left_out(name: str, dtype: Any) -> None:
    student, teacher = random_logits(9, 7, 5).astype(dtype), random_logits(10, 7, 5).astype(dtype)
    few: dict[str, Any] = {"rtol": 1e-5 if dtype is np.float32 else 1e-12, "atol": 1e-7}
    rows, by_row = LOSSES[name](student, teacher, temperature=3.0, reduction="none", return_grad=True)
    for reduction, share in (("sum", 1.0), ("mean", 1 / 7)):
        loss, gradient = LOSSES[name](student, teacher, temperature=3.0, reduction=reduction, return_grad=True)
        np.testing.assert_allclose(loss, rows.sum() * share, **few)
        np.testing.assert_allclose(gradient, by_row * share, **few)
    small = LOSSES[name](student, teacher, temperature=3.0, reduction="none", scale_t2=False, return_grad=True)
    np.testing.assert_allclose(small[0] * 9, rows, **few)
    np.testing.assert_allclose(small[1] * 9, by_row, **few)


@on_each_backend
@each_float
@each_loss
def test_tensors_get_the_same_numbers_and_the_gradient_by_backward(name: str, dtype: Any) -> None:
    student, teacher = random_logits(11, 4, 5).astype(dtype), random_logits(12, 4, 5).astype(dtype)
    for reduction in ("mean", "none"):
        wanted, gradient = LOSSES[name](student, teacher, reduction=reduction, return_grad=True)
        leaf, constant = kd.Tensor(student, requires_grad=True), kd.Tensor(teacher, requires_grad=True)
        loss = LOSSES[name](leaf, constant, reduction=reduction)
        np.testing.assert_array_equal(loss.numpy(), wanted)
        loss.sum().backward()
        np.testing.assert_array_equal(leaf.grad, gradient)
        assert constant.grad is None
    out = np.empty_like(student)
    assert LOSSES[name](student, teacher, grad_out=out)[1] is out


@on_each_backend
@each_float
@each_loss
@pytest.mark.parametrize("t", [1e-300, 1e-12, 1e12, 1e300])
def test_no_temperature_makes_nan(name: str, dtype: Any, t: float) -> None:
    student, teacher = random_logits(13, 4, 6).astype(dtype), random_logits(14, 4, 6).astype(dtype)
    rows, gradient = LOSSES[name](student, teacher, temperature=t, reduction="none", return_grad=True)
    assert not np.isnan(rows).any()
    if np.isfinite(rows).all():
        assert np.isfinite(gradient).all()


@on_each_backend
@each_float
@pytest.mark.parametrize("share", [1e-300, 1e-40, 1e-30, 1e-12])
def test_the_smallest_share_is_nearly_none(dtype: Any, share: float) -> None:
    student, teacher = random_logits(15, 4, 6).astype(dtype), random_logits(16, 4, 6).astype(dtype)
    settings: dict[str, Any] = {"reduction": "none", "return_grad": True}
    forward, reverse = plain_ends(student, teacher, 1.0)
    cases = (
        (F.jensen_shannon(student, teacher, beta=share, form="continuous", **settings), forward),
        (F.skewed_kl(student, teacher, alpha=share, **settings), forward),
        (F.skewed_kl(student, teacher, alpha=share, reverse=True, **settings), reverse),
        (F.jensen_shannon(student, teacher, beta=share, **settings), (np.zeros(4), np.zeros((4, 6)))),
    )
    for found, wanted in cases:
        for actual, value in zip(found, wanted, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5)


# --- classes that are ruled out, and rows without an answer ---


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [4, 130])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "standardised_kl"])
def test_a_class_that_both_rule_out_is_not_there(name: str, dtype: Any, c: int) -> None:
    student, teacher = random_logits(15, 3, c).astype(dtype), random_logits(16, 3, c).astype(dtype)
    rows, gradient = LOSSES[name](student, teacher, reduction="none", return_grad=True)
    masked = [np.concatenate([z, np.full((3, 1), -np.inf, dtype)], axis=1) for z in (student, teacher)]
    found, with_class = LOSSES[name](*masked, reduction="none", return_grad=True)
    np.testing.assert_allclose(found, rows, rtol=1e-6)
    np.testing.assert_allclose(with_class[:, :c], gradient, rtol=1e-5, atol=1e-6)
    assert (with_class[:, c] == 0).all()


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [4, 130])
@pytest.mark.parametrize("name", MIXED)
def test_what_one_alone_rules_out_costs_infinity_only_without_a_mixture(name: str, dtype: Any, c: int) -> None:
    student, teacher = random_logits(17, 3, c).astype(dtype), random_logits(18, 3, c).astype(dtype)
    teacher[0, 1] = student[1, 2] = -np.inf
    rows, gradient = LOSSES[name](student, teacher, reduction="none", return_grad=True)
    infinite = {"reverse_kl": 0, "skewed_kl, plain and reverse": 0, "skewed_kl, plain": 1}.get(name)
    assert [bool(x) for x in np.isinf(rows)] == [k == infinite for k in range(3)]
    no_gradient = infinite if infinite == 0 else None  # ∂/∂z of an infinite forward divergence is p - q all the same
    assert [bool(np.isnan(g).all()) for g in gradient] == [k == no_gradient for k in range(3)]
    assert np.isfinite(np.delete(gradient, [] if no_gradient is None else [no_gradient], axis=0)).all()


@on_each_backend
@each_float
def test_a_teacher_who_rules_out_what_the_student_hardly_sees_costs_infinity_too(dtype: Any) -> None:
    student = np.array([[0.0, -600.0, 1.0]], dtype)  # e^-600 is above 0 in float64 alone
    assert F.reverse_kl(student, np.array([[0.0, -np.inf, 1.0]], dtype)) == np.inf
    assert np.isfinite(F.reverse_kl(student, np.array([[0.0, -700.0, 1.0]], dtype)))


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [4, 130])
def test_a_decoupled_student_pays_for_what_it_alone_rules_out_and_the_target_may_be_ruled_out(
    dtype: Any, c: int
) -> None:
    student, teacher = random_logits(19, 4, c).astype(dtype), random_logits(20, 4, c).astype(dtype)
    y = np.array([0, 1, 2, 3])
    student[0, 2] = -np.inf  # not the target
    student[1, 1] = -np.inf  # the target
    student[2, 2] = teacher[2, 2] = teacher[3, 3] = -np.inf
    rows, gradient = F.decoupled_kd(student, teacher, y, reduction="none", return_grad=True)
    np.testing.assert_array_equal(np.isinf(rows), [True, True, False, False])
    assert np.isfinite(gradient).all()
    assert gradient[2, 2] == 0
    assert np.isfinite(F.decoupled_kd(student, teacher, y, alpha=0.0, reduction="none")[1:]).all()
    teacher[3] = np.where(np.arange(c) == 3, 1, -np.inf)
    rows, gradient = F.decoupled_kd(student, teacher, y, reduction="none", return_grad=True)
    assert np.isnan(rows[3])
    assert np.isnan(gradient[3]).all()


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [4, 130])
@each_loss
def test_a_row_without_an_answer_is_nan_and_touches_no_other(name: str, dtype: Any, c: int) -> None:
    student, teacher = random_logits(21, 5, c).astype(dtype), random_logits(22, 5, c).astype(dtype)
    others = [0, 1, 3, 4]
    clean = LOSSES[name](student, teacher, reduction="none", return_grad=True)
    for place in (0, 1):
        for broken in (np.full(c, -np.inf), np.where(np.arange(c) == 2, np.inf, 0), np.where(np.arange(c), 1, np.nan)):
            pair = [student.copy(), teacher.copy()]
            pair[place][2] = broken
            rows, gradient = LOSSES[name](*pair, reduction="none", return_grad=True)
            assert np.isnan(rows[2])
            assert np.isnan(gradient[2]).all()
            np.testing.assert_array_equal(rows[others], clean[0][others])
            np.testing.assert_array_equal(gradient[others], clean[1][others])


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [4, 130])
@pytest.mark.parametrize("place", [0, 1])
def test_a_decoupled_row_with_no_class_but_the_target_has_no_gradient_anywhere(dtype: Any, c: int, place: int) -> None:
    pair = [random_logits(21, 2, c).astype(dtype), random_logits(22, 2, c).astype(dtype)]
    pair[place][0, 1:] = -np.inf
    for alpha in (0.0, 1.0):
        rows, gradient = F.decoupled_kd(*pair, np.array([0, 0]), alpha=alpha, reduction="none", return_grad=True)
        assert np.isnan(rows).tolist() == [True, False]
        assert np.isnan(gradient).all(axis=1).tolist() == np.isnan(gradient).any(axis=1).tolist() == [True, False]


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [3, 6, 130])
def test_scores_that_are_all_equal_have_no_deviation_however_large_they_are(dtype: Any, c: int) -> None:
    teacher = random_logits(22, 2, c).astype(dtype)
    small, large = (
        F.standardised_kl(np.full((2, c), score, dtype), teacher, return_grad=True) for score in (5.0, 1e30)
    )
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(a, b)


@on_each_backend
def test_a_ruled_out_class_leaves_a_row_without_a_mean_to_standardise_by() -> None:
    student, teacher = random_logits(23, 2, 4), random_logits(24, 2, 4)
    student[0, 1] = teacher[0, 1] = -np.inf
    rows, gradient = F.standardised_kl(student, teacher, reduction="none", return_grad=True)
    assert np.isnan(rows[0])
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(rows[1])


@on_each_backend
@each_float
@pytest.mark.parametrize("c", [5, 130])
def test_rows_without_a_target_are_not_counted(dtype: Any, c: int) -> None:
    student, teacher = random_logits(25, 5, c).astype(dtype), random_logits(26, 5, c).astype(dtype)
    y = np.array([0, -1, 2, -1, 4])
    student[1] = np.nan
    loss, gradient = F.decoupled_kd(student, teacher, y, ignore_index=-1, return_grad=True)
    kept = [0, 2, 4]
    wanted, wanted_gradient = F.decoupled_kd(student[kept], teacher[kept], y[kept], return_grad=True)
    assert loss == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(gradient[kept], wanted_gradient, rtol=1e-5)
    assert (gradient[[1, 3]] == 0).all()
    loss, gradient = F.decoupled_kd(student, teacher, np.full(5, -1), ignore_index=-1, return_grad=True)
    assert loss == 0
    assert (gradient == 0).all()


@on_each_backend
@each_float
def test_a_target_that_is_all_but_certain_loses_no_digits(dtype: Any) -> None:
    """1 - p_y is far below eps here; a divergence among the others that is computed from it would be lost."""
    student, teacher = np.array([[90.0, 1, 0, 2]], dtype), np.array([[80.0, 0, 1, 2]], dtype)
    p, q = softened(1.0, student[:, 1:], teacher[:, 1:])
    loss = F.decoupled_kd(student, teacher, [0], alpha=0.0, beta=1.0, temperature=1.0)
    np.testing.assert_allclose(loss, kl(q, p)[0], rtol=1e-6)


# --- what is refused ---


@on_each_backend
def test_wrong_arguments_are_refused_in_words() -> None:
    calls: dict[str, Callable[[], Any]] = {
        r"reverse_kl: temperature must be a finite number above 0, got 0": lambda: F.reverse_kl(
            STUDENT, TEACHER, temperature=0
        ),
        r"reverse_kl: reduction must be one of mean, sum, none, got 'batchmean'": lambda: F.reverse_kl(
            STUDENT, TEACHER, reduction="batchmean"
        ),
        r"reverse_kl: teacher_logits must be of the student's shape \(2, 3\)": lambda: F.reverse_kl(
            STUDENT, TEACHER[:1]
        ),
        r"reverse_kl: student_logits must be of shape \(n, c\)": lambda: F.reverse_kl(STUDENT[0], TEACHER[0]),
        r"jensen_shannon: beta must be in \(0, 1\), got 0\. .*forward KL.*reverse KL.*continuous": (
            lambda: F.jensen_shannon(STUDENT, TEACHER, beta=0)
        ),
        r"jensen_shannon: beta must be in \(0, 1\), got 1\.0\. At both ends": lambda: F.jensen_shannon(
            STUDENT, TEACHER, beta=1.0
        ),
        r"jensen_shannon: beta must be in \[0, 1\], got 1\.5": lambda: F.jensen_shannon(
            STUDENT, TEACHER, beta=1.5, form="continuous"
        ),
        r"jensen_shannon: form must be one of paper, continuous, got 'half'": lambda: F.jensen_shannon(
            STUDENT, TEACHER, form="half"
        ),
        r"skewed_kl: alpha must be in \[0, 1\), got 1": lambda: F.skewed_kl(STUDENT, TEACHER, alpha=1),
        r"skewed_kl: alpha must be in \[0, 1\), got nan": lambda: F.skewed_kl(STUDENT, TEACHER, alpha=np.nan),
        r"skewed_kl: alpha must be in \[0, 1\), got 'much'": lambda: F.skewed_kl(STUDENT, TEACHER, alpha="much"),
        r"decoupled_kd: student_logits must be of shape \(n, c\) with c ≥ 3, got shape \(2, 2\)\. With two": (
            lambda: F.decoupled_kd(STUDENT[:, :2], TEACHER[:, :2], LABELS)
        ),
        r"decoupled_kd: target\[1\] must be a class id from 0 to 2": lambda: F.decoupled_kd(STUDENT, TEACHER, [0, 3]),
        r"decoupled_kd: target must be of shape \(n\)": lambda: F.decoupled_kd(STUDENT, TEACHER, [0, 1, 2]),
        r"decoupled_kd: target must be class ids of shape \(n,\), got None\. Nothing": lambda: F.decoupled_kd(
            STUDENT, TEACHER, None
        ),
        r"decoupled_kd: beta must be a finite number, got inf": lambda: F.decoupled_kd(
            STUDENT, TEACHER, LABELS, beta=np.inf
        ),
        r"standardised_kl: student_logits must be of shape \(n, c\) with c ≥ 2": lambda: F.standardised_kl(
            STUDENT[:, :1], TEACHER[:, :1]
        ),
        r"standardised_kl: eps must be a finite number above 0, got 0": lambda: F.standardised_kl(
            STUDENT, TEACHER, eps=0
        ),
    }
    for message, call in calls.items():
        with pytest.raises(MinikdError, match=message) as caught:
            call()
        assert isinstance(caught.value, ArgumentError | ShapeError)
    with pytest.raises(DTypeError, match="decoupled_kd: target must be an array of integers"):
        F.decoupled_kd(STUDENT, TEACHER, [0.0, 1.0])


@each_loss
def test_probabilities_in_place_of_logits_are_warned_of_at_the_callers_line(name: str) -> None:
    z, probabilities = random_logits(27, 40, 3), np.exp(plain_log_softmax(random_logits(28, 40, 3)))
    function = getattr(F, name.split(",")[0])
    rest = (np.zeros(40, int),) if name == "decoupled_kd" else ()
    for _ in range(2):  # the second time the call is remembered
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(z, probabilities, *rest)
        assert [w.category for w in caught] == [UserWarning]
        assert str(caught[0].message).startswith(f"{function.__name__}: teacher_logits look like probabilities")
        assert caught[0].filename == __file__


# --- inside a compiled step ---


@on_each_backend
@each_loss
def test_a_compiled_step_gives_the_bits_of_an_eager_one(name: str) -> None:
    teacher = random_logits(29, 6, 5).astype(np.float32)

    def run(compiled: bool) -> list[bytes]:
        model = kd.nn.Linear(4, 5, seed=3)
        optimizer = kd.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x: Any, z: Any, t: Any) -> Any:
            loss = LOSSES[name](model(x), z, temperature=t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        take = kd.compile(step) if compiled else step
        found = []
        for k in range(4):
            x = np.random.default_rng(k).normal(size=(6, 4)).astype(np.float32)
            found.append(take(x, teacher + np.float32(k), np.array(1.0 + k)).numpy().tobytes())
        return [*found, *(p.numpy().tobytes() for p in model.parameters())]

    assert run(True) == run(False)


@on_each_backend
def test_shares_and_weights_are_read_anew_in_each_run_and_refused_where_they_are_out_of_range() -> None:
    student, teacher = random_logits(30, 4, 3), random_logits(31, 4, 3)
    steps: dict[str, tuple[Callable[..., Any], float]] = {
        "beta": (lambda s, t, x: F.jensen_shannon(s, t, beta=x), 1.0),
        "alpha": (lambda s, t, x: F.skewed_kl(s, t, alpha=x), 1.0),
        "alpha, reversed": (lambda s, t, x: F.skewed_kl(s, t, alpha=x, reverse=True), -0.1),
        "beta, decoupled": (lambda s, t, x: F.decoupled_kd(s, t, targets(4, 3), beta=x), np.inf),
    }
    for name, (step, refused) in steps.items():
        compiled = kd.compile(step)
        for x in (0.25, 0.5, 0.75, 0.125):
            assert compiled(student, teacher, np.array(x)) == step(student, teacher, x)
        with pytest.raises(ArgumentError, match=name.split(",")[0] + " must be"):
            compiled(student, teacher, np.array(refused))
        with pytest.raises(ArgumentError, match=name.split(",")[0] + " must be"):
            step(student, teacher, np.array(refused))


# --- the C kernels ---


def widen(x: Any) -> Any:
    return x.astype(np.float64) if x.dtype.kind == "f" else x


class Sample:
    """A kernel's inputs, with its losses and gradients by row at one level, and by the reference in float64."""

    def __init__(self, level: str, name: str, student: Any, teacher: Any, *scalars: float, **attrs: Any) -> None:
        n, c = student.shape
        labels = [np.arange(n) * 7 % c] if name == "decoupled_kd" else []
        inputs = [student, teacher, *labels, *(np.array(x) for x in scalars)]
        complete = {**OPS[name].attrs, "reduction": "none", **attrs}
        self.loss, self.gradient = np.empty(n, student.dtype), np.empty_like(student)
        native.binder(name, level)(self.loss, self.gradient, *inputs, **complete)()
        self.exact_loss, self.exact = np.empty(n), np.empty(student.shape)
        bind_reference(name)(self.exact_loss, self.exact, *(widen(x) for x in inputs), **complete)()


KERNELS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "reverse": ("reverse_kl", (), {}),
    "equal shares": ("jensen_shannon", (0.5,), {}),
    "a small share, continuous": ("jensen_shannon", (1e-6,), {"continuous": True}),
    "skewed": ("skewed_kl", (0.1,), {}),
    "hardly skewed": ("skewed_kl", (1e-6,), {}),
    "skewed the other way": ("skewed_kl", (0.1,), {"reverse": True}),
    "hardly skewed the other way": ("skewed_kl", (1e-6,), {"reverse": True}),
    "decoupled": ("decoupled_kd", (1.0, 1.0), {}),
    "standardised": ("standardised_kl", (), {}),
}
each_kernel = pytest.mark.parametrize("case", KERNELS)
MIXTURES = tuple(name for name in KERNELS if name not in ("decoupled", "standardised"))


@pytest.mark.usefixtures("c_built")
@each_level
@pytest.mark.parametrize("c", [3, 10, 203])
@pytest.mark.parametrize("case", MIXTURES)
def test_a_float_loss_is_right_to_a_few_millionths_however_near_the_student_comes(
    level: str, c: int, case: str
) -> None:
    name, scalars, attrs = KERNELS[case]
    rng = np.random.default_rng(c)
    teacher, noise = (3 * rng.normal(size=(32, c)).astype(np.float32) for _ in "tn")
    for apart, t in ((1e-3, 1.0), (0.03, 4.0), (0.3, 1.0), (1.0, 4.0), (2.0, 1.0)):
        sample = Sample(level, name, teacher + np.float32(apart) * noise, teacher, t, *scalars, **attrs)
        # the sums of p and q are right to 2^-24, and so a divergence to the square of it
        np.testing.assert_allclose(sample.loss, sample.exact_loss, rtol=4e-6, atol=1e-13 * t * t)


@pytest.mark.usefixtures("c_built")
@each_level
@pytest.mark.parametrize("c", [3, 10, 203])
@each_kernel
def test_a_float_gradient_is_right_to_a_few_millionths_of_the_largest_probability(
    level: str, c: int, case: str
) -> None:
    name, scalars, attrs = KERNELS[case]
    rng = np.random.default_rng(c)
    for t in (1.0, 3.0, 20.0):
        student, teacher = (3 * rng.normal(size=(33, c)).astype(np.float32) for _ in "st")
        sample = Sample(level, name, student, teacher, t, *scalars, **attrs)
        p, q = softened(t, student, teacher)
        largest = np.maximum(p, q).max(axis=1, keepdims=True)
        # of the derivatives log p - log q, which are the larger the farther apart the two are, a float has 24 bits
        size = np.maximum(1.0, np.abs(plain_log_softmax(student, t) - plain_log_softmax(teacher, t)).max())
        assert np.all(np.abs(sample.gradient - sample.exact) <= 1e-6 * t * largest * size)


@pytest.mark.usefixtures("c_built")
@each_level
@each_float
@each_kernel
def test_rows_wider_than_any_block_agree_with_the_reference(level: str, dtype: Any, case: str) -> None:
    name, scalars, attrs = KERNELS[case]
    student, teacher = random_logits(32, 3, 5003).astype(dtype), random_logits(33, 3, 5003).astype(dtype)
    sample = Sample(level, name, student, teacher, 3.0, *scalars, **attrs)
    few = 32 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(sample.loss, sample.exact_loss, rtol=few, atol=few)
    np.testing.assert_allclose(sample.gradient, sample.exact, rtol=few, atol=few)


@pytest.mark.usefixtures("c_built")
@each_level
@each_float
@pytest.mark.parametrize("c", [3, 300])
@pytest.mark.parametrize("case", MIXTURES)
def test_ruled_out_classes_are_those_of_the_reference_at_every_level(level: str, dtype: Any, c: int, case: str) -> None:
    name, scalars, attrs = KERNELS[case]
    student, teacher = random_logits(34, 4, c).astype(dtype), random_logits(35, 4, c).astype(dtype)
    student[0, 1] = student[1, 0] = teacher[0, 1] = teacher[2, 2] = -np.inf
    student[3, 2] = np.nan
    sample = Sample(level, name, student, teacher, 2.0, *scalars, **attrs)
    np.testing.assert_allclose(sample.loss, sample.exact_loss, rtol=1e-5)
    np.testing.assert_allclose(sample.gradient, sample.exact, rtol=1e-4, atol=1e-6)


@pytest.fixture
def threads_as_before(c_built: None) -> Iterator[None]:
    before = native.threads()
    yield
    native.set_threads(before)


@pytest.mark.usefixtures("threads_as_before")
@each_float
@pytest.mark.parametrize("shape", [(8_001, 10), (300, 513)])
def test_results_are_the_same_bits_on_any_number_of_threads(shape: tuple[int, int], dtype: Any) -> None:
    student, teacher = random_logits(36, *shape).astype(dtype), random_logits(37, *shape).astype(dtype)
    labels = np.arange(shape[0]) % shape[1]
    for name, scalars, attrs in KERNELS.values():
        rest = [*([labels] if name == "decoupled_kd" else []), *(np.array(x) for x in (4.0, *scalars))]
        found = set()
        for n in (1, 2, 5):
            native.set_threads(n)
            loss, gradient = np.empty((), dtype), np.empty_like(student)
            native.binder(name)(loss, gradient, student, teacher, *rest, **{**OPS[name].attrs, **attrs})()
            found.add(loss.tobytes() + gradient.tobytes())
        assert len(found) == 1, f"{name}: other bits on other threads"


# --- against another autograd ---


def torch_losses(torch: Any) -> dict[str, Callable[[Any, Any, float], Any]]:
    """The row losses in the formulas of their papers, in torch."""
    nn = torch.nn.functional

    def kl_of(log_p: Any, log_q: Any) -> Any:
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def logs(s: Any, t: Any, temperature: float) -> tuple[Any, Any]:
        return torch.log_softmax(s / temperature, 1), torch.log_softmax(t / temperature, 1)

    def jensen(beta: float, scale: float) -> Callable[[Any, Any, float], Any]:
        def loss(s: Any, t: Any, temperature: float) -> Any:
            log_p, log_q = logs(s, t, temperature)
            log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
            return scale * (beta * kl_of(log_q, log_m) + (1 - beta) * kl_of(log_p, log_m))

        return loss

    def skewed(s: Any, t: Any, temperature: float) -> Any:
        log_p, log_q = logs(s, t, temperature)
        return kl_of(log_q, (0.1 * log_q.exp() + 0.9 * log_p.exp()).log())

    def skewed_reverse(s: Any, t: Any, temperature: float) -> Any:
        log_p, log_q = logs(s, t, temperature)
        return kl_of(log_p, (0.7 * log_q.exp() + 0.3 * log_p.exp()).log())

    def decoupled(s: Any, t: Any, temperature: float) -> Any:
        own = nn.one_hot(torch.arange(len(s)) % s.shape[1], s.shape[1]).to(s.dtype)
        two = [torch.stack([(x.exp() * own).sum(1), (x.exp() * (1 - own)).sum(1)], 1) for x in logs(s, t, temperature)]
        log_p, log_q = logs(s - 1000 * temperature * own, t - 1000 * temperature * own, temperature)
        return kl_of(two[1].log(), two[0].log()) + 8 * kl_of(log_q, log_p)

    def standardised(s: Any, t: Any, temperature: float) -> Any:
        scores = [(z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True)) for z in (s, t)]
        log_p, log_q = logs(*scores, temperature)
        return kl_of(log_q, log_p)

    return {
        "reverse_kl": lambda s, t, temperature: kl_of(*logs(s, t, temperature)),
        "jensen_shannon": jensen(0.5, 1.0),
        "jensen_shannon, unequal": jensen(0.9, 1.0),
        "jensen_shannon, continuous": jensen(0.1, 1 / 0.09),
        "skewed_kl": skewed,
        "skewed_kl, reverse": skewed_reverse,
        "skewed_kl, plain": lambda s, t, temperature: kl_of(*logs(t, s, temperature)),
        "skewed_kl, plain and reverse": lambda s, t, temperature: kl_of(*logs(s, t, temperature)),
        "decoupled_kd": decoupled,
        "standardised_kl": standardised,
    }


@on_each_backend
@each_loss
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_and_gradients_are_those_of_pytorchs_autograd(name: str, temperature: float) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch 2.13.0 for the CPU")
    student, teacher = random_logits(38, 6, 11), random_logits(39, 6, 11)
    leaf = torch.tensor(student, requires_grad=True)
    rows = temperature**2 * torch_losses(torch)[name](leaf, torch.tensor(teacher), temperature)
    rows.sum().backward()
    settings: dict[str, Any] = {"temperature": temperature, "reduction": "none", "return_grad": True}
    loss, gradient = LOSSES[name](student, teacher, **settings)
    np.testing.assert_allclose(loss, rows.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["c", "numba", "numpy"], indirect=True)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [2, 150])
def test_one_side_far_above_the_other_costs_no_digit(backend: str, dtype: Any, columns: int) -> None:
    """A constant that is added to one side's logits changes no divergence, however large it is."""
    student = np.full((1, columns), 1e30, dtype)
    teacher = np.linspace(0, 1, columns, dtype=dtype)[None] - 3
    flat = np.zeros_like(student)
    for divergence in (F.reverse_kl, F.jensen_shannon, F.skewed_kl, F.distillation_loss):
        kwargs = {} if divergence is not F.distillation_loss else {"hard_weight": 0.0, "soft_weight": 1.0}
        far, near = (divergence(z, teacher, temperature=2.0, **kwargs) for z in (student, flat))
        assert far == pytest.approx(near, rel=1e-4 if dtype == np.float32 else 1e-9)
        assert far > 0


@on_each_backend
def test_rows_without_a_label_add_nothing_to_a_decoupled_loss_of_however_few_classes() -> None:
    for c in (1, 2, 3):
        logits, numbers = np.ones((2, c)), [np.float64(1)] * 3
        (loss,), (gradient,), _ = execute(OPS["decoupled_kd"], [logits, logits, np.full(2, -100), *numbers], {})
        assert loss == 0
        assert not gradient.any()


@on_each_backend
def test_two_classes_are_standardised_to_a_half_in_square() -> None:
    loss = F.standardised_kl(np.array([[5.0, -1.0]]), np.array([[0.0, 0.5]]), temperature=1.0)
    z = np.array([1, -1]) / np.sqrt(2)
    p = np.exp(z) / np.exp(z).sum()
    assert loss == pytest.approx((p[::-1] * np.log(p[::-1] / p)).sum(), rel=1e-6)  # but for the eps in the divisor


@on_each_backend
@pytest.mark.parametrize("name", ["jensen_shannon", "skewed_kl"])
def test_a_mixture_that_is_one_side_costs_that_side_nothing_even_where_the_other_is_infinitely_far(name: str) -> None:
    student, teacher = np.array([[0, 1, 2, -np.inf]]), np.array([[0, 2, -np.inf, 1]])
    for share in (0.0, 1.0):
        scalars = [np.float64(2), np.float64(share)]
        attrs = {"reverse": share == 1} if name == "skewed_kl" else {}
        if name == "skewed_kl":
            scalars[1] = np.float64(1)  # reversed or not, all of the mixture is the side that is compared with it
        (loss,), (gradient,), _ = execute(OPS[name], [student, teacher, *scalars], attrs)
        assert loss == 0
        assert not gradient.any()


@on_each_backend
def test_a_divergence_from_a_mixture_with_a_billionth_of_the_other_keeps_its_digits() -> None:
    student, teacher = random_logits(40, 1, 10), random_logits(41, 1, 10)
    p, q = (np.exp(z) / np.exp(z).sum() for z in (student, teacher))
    share = 2.0**-30
    loss = F.skewed_kl(student, teacher, alpha=1 - share, temperature=1.0)
    x = share * (p - q) / q
    assert loss == pytest.approx((q * (x**2 / 2 - x**3 / 3)).sum(), rel=1e-10, abs=0)
