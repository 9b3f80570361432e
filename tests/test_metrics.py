"""What is measured of a classifier, against sums written out by hand."""

import numpy as np
import pytest

from minikd import metrics
from minikd.errors import ArgumentError, ShapeError


def test_accuracy_counts_the_rows_whose_largest_logit_is_the_label() -> None:
    logits = np.array([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [5.0, -5.0]])
    assert metrics.accuracy(logits, [1, 0, 0, 0]) == 0.75


def test_negative_log_likelihood_is_the_mean_of_minus_log_p() -> None:
    probabilities = np.array([[0.5, 0.5], [0.9, 0.1]])
    expected = -(np.log(0.5) + np.log(0.1)) / 2
    assert metrics.negative_log_likelihood(np.log(probabilities), [0, 1]) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_is_zero_when_confidence_is_the_rate_of_being_right() -> None:
    logits = np.log(np.tile([0.75, 0.25], (4, 1)))
    assert metrics.expected_calibration_error(logits, [0, 0, 0, 1]) == pytest.approx(0, abs=1e-12)


def test_calibration_error_weighs_each_bin_by_its_rows() -> None:
    sure, unsure = np.log([0.95, 0.05]), np.log([0.6, 0.4])
    logits = np.stack([sure, sure, sure, unsure])
    expected = 0.75 * abs(2 / 3 - 0.95) + 0.25 * abs(1 - 0.6)
    assert metrics.expected_calibration_error(logits, [0, 0, 1, 0]) == pytest.approx(expected, rel=1e-12)


def test_a_certain_and_right_classifier_has_no_calibration_error() -> None:
    assert metrics.expected_calibration_error(np.array([[1e6, 0.0], [0.0, 1e6]]), [0, 1]) == 0


def test_agreement_compares_predictions_whatever_the_labels() -> None:
    assert metrics.agreement([[1.0, 0], [0, 1], [2, 1]], [[3.0, 0], [1, 0], [9, 0]]) == pytest.approx(2 / 3)


def test_kl_to_teacher_is_that_of_the_formula_page() -> None:
    student, teacher = [[2, 1, 0.1], [0.5, 2.5, -1]], [[3, 0.5, -0.5], [0, 3.0, 0]]
    assert metrics.kl_to_teacher(student, teacher) == pytest.approx(0.09604770705, rel=1e-10)
    assert metrics.kl_to_teacher(student, student) == 0


@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.negative_log_likelihood])
def test_a_target_of_another_length_is_refused(metric) -> None:
    with pytest.raises(ShapeError, match="logits must be of shape \\(3, c\\)"):
        metric(np.zeros((2, 4)), [0, 1, 2])


def test_calibration_needs_at_least_one_bin() -> None:
    with pytest.raises(ArgumentError, match="bins"):
        metrics.expected_calibration_error(np.zeros((2, 4)), [0, 1], bins=0)
