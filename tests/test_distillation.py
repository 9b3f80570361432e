"""The training loop and the paired experiment: equal conditions, honest verdicts, results that can be relied on."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd import metrics
from minikd.data import load
from minikd.distillation import ALONE, DISTILLED, Experiment
from minikd.errors import ArgumentError, DataError, DivergenceError, DTypeError, ShapeError
from minikd.settings import Settings, full_sizes
from minikd.training import endless_batches, fit
from minikd.verdict import T_95, compare, t_quantile

QUICK = {"teacher_epochs": 2, "epochs": 2, "seeds": (0, 1), "teacher": (24,), "student": (8,)}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    """A small run over two seeds in both situations."""
    experiment = Experiment(Settings(**QUICK, labels=50))
    experiment.run()
    return experiment


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Three well separated clouds of points in the plane."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 60)
    return (np.array([[0, 4], [4, 0], [-4, -4]])[y] + rng.normal(size=(180, 2))).astype(np.float32), y


# --- fit ---


def test_a_network_learns_separated_clouds(blobs) -> None:
    x, y = blobs
    model = kd.nn.MLP([2, 16, 3], seed=1)
    fit(model, x, y, epochs=30, batch_size=32, lr=0.02)
    assert metrics.accuracy(model.logits(x), y) > 0.98
    assert not model.training


def test_a_student_without_any_label_learns_from_its_teacher_alone(blobs) -> None:
    x, y = blobs
    teacher = np.eye(3, dtype=np.float32)[y] * 8
    student = kd.nn.MLP([2, 16, 3], seed=1)
    fit(student, x, np.full_like(y, -1), teacher, epochs=30, batch_size=32, lr=0.02)
    assert metrics.accuracy(student.logits(x), y) > 0.98


def test_without_teacher_and_labels_there_is_nothing_to_learn_from(blobs) -> None:
    x, y = blobs
    with pytest.raises(ArgumentError, match="at least one label"):
        fit(kd.nn.MLP([2, 3]), x, np.full_like(y, -1))


def test_labels_that_are_no_whole_numbers_are_refused(blobs) -> None:
    x, y = blobs
    with pytest.raises(DTypeError, match="y must be an array of integers, got float64"):
        fit(kd.nn.MLP([2, 3]), x, y + 0.5)


def test_lengths_that_differ_are_refused(blobs) -> None:
    x, y = blobs
    with pytest.raises(ShapeError, match="180 and 179"):
        fit(kd.nn.MLP([2, 3]), x, y[1:])


def test_the_number_of_steps_does_not_depend_on_the_number_of_labels(blobs) -> None:
    x, y = blobs
    few = np.where(np.arange(len(y)) % 20 == 0, y, -1)
    steps = []
    for labels in (y, few):
        told = []
        fit(kd.nn.MLP([2, 3]), x, labels, epochs=3, batch_size=32, on_epoch=told.append)
        steps.append((told[-1].step, told[-1].steps, sum(e.finished for e in told)))
    assert steps[0] == steps[1] == (18, 18, 3)


def test_the_same_seed_gives_the_same_bits_and_another_one_others(blobs) -> None:
    x, y = blobs
    results = []
    for seed in (3, 3, 4):
        model = kd.nn.MLP([2, 8, 3], seed=0, dropout=0.2)
        fit(model, x, y, epochs=2, seed=seed)
        results.append(np.concatenate([p.array.ravel() for p in model.parameters()]))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_a_training_step_is_the_one_that_its_parts_make(blobs) -> None:
    """One step of fit equals forward, loss, backward and update written out with the public functions."""
    x, y = blobs
    teacher = 8 * np.eye(3, dtype=np.float32)[y]
    fitted, by_hand = kd.nn.MLP([2, 4, 3], seed=5), kd.nn.MLP([2, 4, 3], seed=5)
    fit(fitted, x, y, teacher, epochs=1, batch_size=180, optimizer="sgd", lr=0.1, schedule="constant", temperature=3.0)
    order = next(endless_batches(np.arange(180), 180, 0))
    opt = kd.optim.SGD(by_hand.parameters(), 0.1, momentum=0.9)
    logits = by_hand(kd.Tensor(x[order]))
    weights = {"temperature": 3.0, "hard_weight": 0.5, "soft_weight": 0.5}
    F.distillation_loss(logits, teacher[order], y[order], **weights).backward()
    opt.step()
    for a, b in zip(fitted.parameters(), by_hand.parameters(), strict=True):
        assert np.array_equal(a.array, b.array)


def test_endless_batches_show_every_row_once_in_each_pass() -> None:
    rows = np.array([5, 7, 9, 11, 13])
    stream = endless_batches(rows, 2, seed=0)
    passes = [np.concatenate([next(stream) for _ in range(3)]) for _ in range(4)]
    assert all(sorted(p) == rows.tolist() for p in passes)
    assert len({tuple(p) for p in passes}) > 1


# --- the verdict ---


def test_a_difference_whose_interval_leaves_out_zero_helped_or_hurt() -> None:
    better = compare([0.80, 0.81, 0.82], [0.90, 0.91, 0.93])
    assert better["verdict"] == "helped"
    assert better["difference"]["interval"][0] > 0
    assert compare([0.90, 0.91, 0.93], [0.80, 0.81, 0.82])["verdict"] == "hurt"


def test_a_difference_whose_interval_holds_zero_is_not_clear() -> None:
    assert compare([0.8, 0.9], [0.81, 0.89])["verdict"] == "no clear difference"
    assert compare([0.8, 0.9], [0.8, 0.9])["verdict"] == "no clear difference"


def test_seeds_that_gain_the_same_single_test_row_prove_nothing() -> None:
    alone, distilled = [0.9500, 0.9525], [0.9525, 0.9550]
    assert compare(alone, distilled, resolution=1 / 400)["verdict"] == "no clear difference"
    assert compare([0.80, 0.80], [0.90, 0.90], resolution=1 / 400)["verdict"] == "helped"


def test_one_seed_allows_no_verdict() -> None:
    assert compare([0.8], [0.9])["verdict"] == "not enough seeds"
    assert compare([], [])["difference"]["mean"] is None


def test_the_interval_is_the_paired_t_interval() -> None:
    """Differences 1, 2, 3, 4: mean 2.5, deviation 1.29099, half width 3.182·1.29099/2."""
    low, high = compare([0, 0, 0, 0], [1, 2, 3, 4])["difference"]["interval"]
    assert (low, high) == pytest.approx((2.5 - 2.05397, 2.5 + 2.05397), abs=1e-4)


def test_the_quantiles_of_t_fall_towards_that_of_the_normal_distribution() -> None:
    values = [t_quantile(d) for d in range(1, 200)]
    assert values[0] == T_95[0]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(1.972, abs=1e-3)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(-0.5, 0.5))
def test_the_mean_difference_is_in_the_middle_of_its_interval(alone: list[float], gain: float) -> None:
    found = compare(alone, [a + gain for a in alone])["difference"]
    low, high = found["interval"]
    assert math.isclose((low + high) / 2, found["mean"], abs_tol=1e-12)
    assert math.isclose(found["mean"], gain, abs_tol=1e-12)


# --- the experiment ---


def test_the_report_has_the_documented_keys_and_is_json(experiment: Experiment) -> None:
    report = json.loads(json.dumps(experiment.result().report, allow_nan=False))
    top = {"version", "backend", "settings", "seeds", "requested_seeds", "complete", "data", "seconds", "few_labels"}
    both = {"labels", "temperature", "hard_weight", "soft_weight", "teacher", "student_alone", "student_distilled"}
    both |= {"difference", "verdict", "objective", "assistants", "generations", "ensemble"}
    assert set(report) == top | both
    assert set(report["few_labels"]) == both
    assert (report["labels"], report["few_labels"]["labels"]) == ("all", 50)
    assert report["seeds"] == [0, 1]
    for situation in (report, report["few_labels"]):
        for model in ("teacher", "student_alone", "student_distilled"):
            figures = situation[model]
            assert {"layers", "parameters", "bytes", "test_accuracy", "test_nll", "test_ece"} <= set(figures)
            assert len(figures["test_accuracy"]) == 2
        for model in ("student_alone", "student_distilled"):
            assert len(situation[model]["agreement"]) == len(situation[model]["kl_to_teacher"]) == 2
    assert report["student_distilled"]["layers"] == [64, 8, 10]
    assert report["student_distilled"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert report["data"]["train"] + report["data"]["validation"] + report["data"]["test"] == 1797


def test_the_figures_in_the_report_are_those_of_the_models_in_the_result(experiment: Experiment) -> None:
    result = experiment.result()
    x, y = result.dataset.raw(result.dataset.x_test), result.dataset.y_test
    for key, model in (("teacher", result.teacher), ("student_distilled", result.student)):
        logits = model.logits(x)
        assert result.report[key]["test_accuracy"][0] == metrics.accuracy(logits, y)
        nll = metrics.negative_log_likelihood(logits, y)
        assert result.report[key]["test_nll"][0] == pytest.approx(nll, rel=1e-4)


def test_alone_and_distilled_begin_with_the_same_weights_and_see_the_same_order() -> None:
    """With the soft weight at 0 the distilled student is the student alone, bit for bit."""
    settings = Settings(**QUICK, labels=0, hard_weight=1.0, soft_weight=0.0)
    experiment = Experiment(settings)
    experiment.run()
    result = experiment.result()
    assert result.report["student_alone"]["test_nll"] == pytest.approx(
        result.report["student_distilled"]["test_nll"], rel=1e-5
    )
    assert result.report["difference"]["per_seed"] == [0.0, 0.0]
    assert result.report["few_labels"] is None


def test_few_labels_are_the_same_rows_for_both_students_and_no_test_row_is_seen(experiment: Experiment) -> None:
    data = experiment.dataset
    few = data.few_labels(50, 0)
    assert (few >= 0).sum() == 50
    assert np.array_equal(few, data.few_labels(50, 0))
    train = {row.tobytes() for row in data.x_train}
    assert not any(row.tobytes() in train for row in data.x_test)


def test_the_history_has_one_row_for_each_epoch_of_each_training(experiment: Experiment) -> None:
    history = experiment.result().history
    assert len(history) == experiment.trainings * 2 == 2 * 5 * 2
    last = [row for row in history if row["model"] == DISTILLED and row["situation"] == "all labels"][-1]
    assert (last["epoch"], last["seed"]) == (2, 1)
    assert set(last) == {
        "situation", "model", "seed", "epoch", "lr", "loss", "validation_accuracy", "validation_nll", "terms",
    }  # fmt: skip
    assert [figures["term"] for figures in last["terms"]] == ["HardLabels", "SoftLabels"]
    assert sum(figures["gradient_share"] for figures in last["terms"]) == pytest.approx(1)


def test_an_interrupted_run_keeps_the_seeds_that_are_complete() -> None:
    seen = []

    def stop_in_the_second_seed(progress) -> None:
        seen.append(progress)
        if progress.seed == 1 and progress.model == ALONE:
            raise KeyboardInterrupt

    experiment = Experiment(Settings(**QUICK, labels=0), on_progress=stop_in_the_second_seed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    result = experiment.result()
    assert not result.complete
    assert result.report["seeds"] == [0]
    assert result.report["requested_seeds"] == [0, 1]
    assert len(result.report["student_distilled"]["test_accuracy"]) == 1
    assert result.student is not None


def test_an_experiment_that_never_ran_has_a_report_without_figures() -> None:
    result = Experiment(Settings(**QUICK)).result()
    assert result.report["seeds"] == []
    assert result.report["verdict"] == "not enough seeds"
    assert result.student is None


def test_progress_counts_trainings_and_steps() -> None:
    told, models = [], []
    experiment = Experiment(
        Settings(**QUICK, labels=30), on_progress=told.append, on_model=lambda: models.append(len(told))
    )
    experiment.run()
    assert experiment.trainings == 10 == len(models)
    assert [p.trainings_done for p in told] == sorted(p.trainings_done for p in told)
    assert told[-1].trainings_done == 9
    assert all(p.trainings == 10 for p in told)
    assert {p.situation for p in told} == {"", "all labels", "30 labels"}


# --- kd.distill ---


def test_a_given_student_is_trained_in_place_by_a_given_teacher(experiment: Experiment) -> None:
    teacher = experiment.result().teacher
    before = copy.deepcopy(teacher.state_dict())
    student = kd.nn.MLP([64, 8, 10], seed=7)
    start = student.state_dict()
    result = kd.distill(teacher, student, "digits", epochs=2, alone=False)
    assert result.student is student
    assert result.student_alone is None
    assert result.report["student_alone"] is None
    assert any(not np.array_equal(start[n], v) for n, v in student.state_dict().items())
    assert all(np.array_equal(before[n], v) for n, v in teacher.state_dict().items())
    raw = result.dataset.raw(result.dataset.x_test)
    assert (
        metrics.accuracy(student.logits(raw), result.dataset.y_test)
        == (result.report["student_distilled"]["test_accuracy"][0])
    )


def test_any_function_of_raw_features_can_be_the_teacher() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (200, 3))
    y = x.argmax(axis=1)
    seen = []

    def teacher(features: np.ndarray) -> np.ndarray:
        seen.append(float(features.max()))
        return features / 20

    result = kd.distill(teacher, (8,), (x, y), epochs=40, seed=0, labels=0, lr=0.02)
    assert max(seen) > 200, "the teacher must be given features on their own scale"
    assert result.report["student_distilled"]["test_accuracy"][0] > 0.9
    assert result.report["teacher"]["layers"] is None


def test_a_teacher_with_another_number_of_classes_is_refused_before_training() -> None:
    with pytest.raises(ShapeError, match="10 classes, got 3 columns"):
        kd.distill(kd.nn.MLP([64, 4, 3]), (8,), "digits")


def test_unknown_options_and_contradictions_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="temprature"):
        kd.distill(temprature=3)
    with pytest.raises(ArgumentError, match="seed"):
        kd.distill(seed=1, seeds=(1, 2))
    with pytest.raises(ArgumentError, match="teacher"):
        kd.distill("no such thing", (8,), "digits")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0), ("temperature", math.nan), ("hard_weight", -1.0), ("epochs", 0), ("batch_size", 0),
        ("optimizer", "lbfgs"), ("schedule", "linear"), ("lr", 0.0), ("teacher_dropout", 1.0), ("labels", -5),
        ("seeds", (0, 0)), ("seeds", ()), ("student", (0,)), ("activation", "swish"), ("backend", "torch"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=option):
        Experiment(Settings(**{**QUICK, option: value}))


def test_more_labels_than_there_are_rows_are_refused() -> None:
    with pytest.raises(ArgumentError, match="1200"):
        Experiment(Settings(**QUICK, labels=1201))


def test_full_sizes_are_recognised_and_hidden_ones_completed() -> None:
    assert full_sizes((16,), 64, 10) == (64, 16, 10)
    assert full_sizes((64, 16, 10), 64, 10) == (64, 16, 10)
    assert full_sizes((), 64, 10) == (64, 10)


# --- for real ---


def test_a_student_of_fashion_mnist_learns_more_from_a_teacher_than_from_a_thousand_labels() -> None:
    try:
        data = load("fashion-mnist")
    except DataError:
        pytest.skip("needs the Fashion-MNIST files: apt install dataset-fashion-mnist")
    settings = Settings(
        data="fashion-mnist", teacher=(128,), teacher_epochs=1, student=(30,), epochs=1, batch_size=128,
        labels=1000, seeds=(0,), lr=0.005, temperature=2.0, hard_weight=0.1, soft_weight=0.9,
    )  # fmt: skip
    experiment = Experiment(settings, dataset=data)
    experiment.run()
    report = experiment.result().report
    assert report["data"]["test"] == 10_000
    assert report["teacher"]["test_accuracy"][0] > 0.80
    assert report["few_labels"]["difference"]["per_seed"][0] > 0.02


# --- what a stranger may do ---


def test_a_run_stops_where_a_training_diverges_and_names_the_step_the_term_and_the_layer() -> None:
    experiment = Experiment(Settings(**{**QUICK, "seeds": (0,)}, labels=0, lr=1e30))
    with pytest.raises(DivergenceError, match=r"step 2 .*output of layer 2 .*the term HardLabels is nan"):
        experiment.run()
    assert not experiment.result().complete
    assert experiment.result().history, "what was trained before is not lost"


def test_a_student_that_did_not_learn_is_warned_of_and_reported() -> None:
    experiment = Experiment(Settings(**{**QUICK, "seeds": (0,)}, labels=0, lr=100.0, optimizer="sgd", clip=1.0))
    with pytest.warns(UserWarning, match="student .* did not learn"):
        experiment.run()
    assert len(experiment.result().report["student_alone"]["test_nll"]) == 1


def test_a_small_table_gets_fewer_labels_than_the_default_and_is_told_so() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    data = load((rng.normal(size=(60, 2)) + y[:, None], y))
    with pytest.warns(UserWarning, match="only 36 labelled rows"):
        experiment = Experiment(Settings(**QUICK), dataset=data)
    assert list(experiment.situations) == ["all labels", "3 labels"]


def test_a_small_table_is_trained_in_smaller_batches_unless_a_size_was_given() -> None:
    y = np.arange(60) % 3
    data = load((np.random.default_rng(0).normal(size=(60, 2)), y))
    assert Experiment(Settings(**QUICK, labels=0), dataset=data).settings.batch_size == 8
    assert Experiment(Settings(**QUICK, labels=0, batch_size=32), dataset=data).settings.batch_size == 32
    assert Experiment(Settings(**QUICK, labels=0)).settings.batch_size == 64


def test_a_given_teacher_always_gets_raw_features_and_is_asked_once() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 100, (200, 3))
    teacher = kd.nn.MLP([3, 3])
    teacher.parameters()[0].array[...] = np.eye(3)
    calls = []

    class Counting(kd.nn.MLP):
        def logits(self, features):
            calls.append(len(features))
            return teacher.logits(features)

    result = kd.distill(Counting([3, 3]), (), (x, x.argmax(axis=1)), epochs=1, seeds=(0, 1), alone=False)
    assert result.report["teacher"]["test_accuracy"] == [1.0, 1.0]
    assert len(calls) == 4, "a look at the first rows, then the training, the validation and the test part"


def test_a_teacher_with_nan_logits_is_refused_before_training() -> None:
    with pytest.raises(ArgumentError, match="row 0 must be a largest score that is a finite number"):
        kd.distill(lambda x: np.full((len(x), 10), np.nan), (8,), "digits")


def test_a_student_larger_than_its_teacher_is_only_warned_about() -> None:
    with pytest.warns(UserWarning, match="more than the"):
        Experiment(Settings(**{**QUICK, "teacher": (4,), "student": (64,)}))


def test_objects_are_null_among_the_settings_of_the_report(blobs) -> None:
    x, y = blobs
    report = kd.distill(lambda a: a @ np.ones((2, 3)), (4,), (x, y), epochs=1, seed=0, alone=False).report
    assert report["settings"]["data"] is None
    assert report["settings"]["teacher"] is report["settings"]["teacher_lr"] is None
    assert report["settings"]["student"] == [4]
    assert report["data"]["name"] == "arrays"


def test_both_weights_at_zero_are_refused() -> None:
    with pytest.raises(ArgumentError, match="soft_weight"):
        Settings(hard_weight=0.0, soft_weight=0.0).check()


def test_values_of_numpy_are_taken_and_texts_are_refused_by_name() -> None:
    result = kd.distill((4,), (2,), "digits", epochs=np.int64(1), teacher_epochs=1, seed=0, alone=False)
    assert result.report["settings"]["epochs"] == 1
    with pytest.raises(ArgumentError, match="temperature"):
        kd.distill((4,), (2,), "digits", temperature="3")
    with pytest.raises(ArgumentError, match="seeds"):
        kd.distill((4,), (2,), "digits", seeds=3)
    for neither_name_nor_arrays in ({"x": 1}, np.zeros((4, 3))):
        with pytest.raises(ArgumentError, match="source"):
            kd.distill(None, None, neither_name_nor_arrays)


def test_adamw_decays_its_weights_where_nothing_else_was_said(blobs) -> None:
    x, y = blobs
    models = [kd.nn.MLP([2, 4, 3], seed=0) for _ in range(2)]
    for model, optimizer in zip(models, ("adam", "adamw"), strict=True):
        fit(model, x, y, epochs=3, optimizer=optimizer, lr=0.01)
    assert not np.array_equal(models[0].parameters()[0].array, models[1].parameters()[0].array)
