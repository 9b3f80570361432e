"""Ways of distilling: teachers of every kind, networks between teacher and student, learning together, schedules."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import cli, metrics
from minikd.data import load
from minikd.distillation import ALONE, DISTILLED, Experiment
from minikd.errors import ArgumentError, ShapeError
from minikd.nn import MLP
from minikd.objectives import HardLabels, Hints, ReverseKL, SoftLabels
from minikd.report.tensorboard import masked_checksum, write_events
from minikd.settings import Settings, sizes_from_text

QUICK: dict[str, Any] = {
    "teacher_epochs": 2,
    "epochs": 2,
    "seeds": (0,),
    "teacher": (24,),
    "student": (8,),
    "labels": 0,
}


def run(**settings: Any) -> Experiment:
    experiment = Experiment(Settings(**{**QUICK, **settings}))
    experiment.run()
    return experiment


def models(experiment: Experiment) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in experiment.result().history))


@pytest.fixture(scope="module")
def teacher() -> MLP:
    """A teacher of the digits that takes raw features."""
    data = load("digits")
    model = MLP([64, 24, 10])
    kd.training.fit(model, data.x_train, data.y_train, epochs=8)
    model.normalisation, model.class_names = data.normalisation, data.class_names
    return model


def table_of(teacher: MLP, path: Path, parts: tuple[str, ...] = ("train", "validation", "test")) -> Path:
    """What the teacher says of these parts' samples, by their numbers; NaN of the others."""
    data = load("digits")
    scores = np.full((1797, 10), np.nan, np.float32)
    for part in parts:
        scores[getattr(data, f"rows_{part}")] = teacher.logits(data.raw(getattr(data, f"x_{part}")))
    np.savez(path, logits=scores)
    return path


# --- what teaches ---


def test_a_table_of_a_teachers_logits_teaches_what_the_teacher_teaches(teacher: MLP, tmp_path: Path) -> None:
    path = table_of(teacher, tmp_path / "teacher.npz")
    by_model = kd.distill(teacher, (8,), "digits", epochs=2, seed=0)
    by_table = kd.distill(path, (8,), "digits", epochs=2, seed=0)
    assert by_table.report["student_distilled"] == by_model.report["student_distilled"]
    assert by_table.report["teacher"]["test_accuracy"] == by_model.report["teacher"]["test_accuracy"]
    assert by_table.report["settings"]["teacher"] == str(path)
    assert by_table.report["settings"]["teacher_epochs"] is None


def test_a_store_teaches_what_its_teacher_teaches(teacher: MLP, tmp_path: Path) -> None:
    kd.store.write(tmp_path / "store", kd.as_teacher(teacher), load("digits"))
    by_model = kd.distill(teacher, (8,), "digits", epochs=2, seed=0)
    by_store = kd.distill(tmp_path / "store", (8,), "digits", epochs=2, seed=0)
    assert by_store.report["student_distilled"] == by_model.report["student_distilled"]


def test_a_table_that_knows_nothing_of_the_test_part_has_no_figures_there(teacher: MLP) -> None:
    class OfTraining(kd.teachers.Teacher):
        """Answers by sample number, for training rows alone."""

        per_row = True

        def knows(self, rows: Any) -> bool:
            return bool(np.isin(rows, data.rows_train).all())

        def _answer(self, x: Any, rows: Any) -> Any:
            place = {int(row): k for k, row in enumerate(data.rows_train)}
            return teacher.logits(data.raw(data.x_train[[place[int(row)] for row in rows]]))

    data = load("digits")
    result = kd.distill(OfTraining(identity="of the training part"), (8,), data, epochs=2, seed=0)
    assert result.report["teacher"]["test_accuracy"] == [None]
    assert result.report["student_distilled"]["agreement"] == [None]
    assert result.report["student_distilled"]["test_accuracy"][0] > 0
    assert result.teacher_on_validation is None


def test_a_table_that_lacks_training_rows_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((1000, 10), np.float32))
    with pytest.raises(
        ArgumentError, match=r"knows each of 1200 rows of the training part.*order of the data's source"
    ):
        kd.distill(tmp_path / "short.npy", (8,), "digits", epochs=1, seed=0)


def test_several_teachers_at_once_are_given_as_a_list(teacher: MLP) -> None:
    other = MLP([64, 10], seed=3)
    both = kd.as_teacher([teacher, other], average="probabilities", weights=[3, 1])
    result = kd.distill(both, (8,), "digits", epochs=2, seed=0)
    assert result.report["teacher"]["test_accuracy"][0] > 0.8


@pytest.mark.parametrize("name", ["rf", "gbt", "mlp"])
def test_scikit_learn_trains_a_teacher_on_the_spot_for_each_seed(name: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn", reason="needs the extra minikd[teachers]")
    x = np.random.default_rng(0).normal(size=(300, 4))
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(int) + (x[:, 1] > 0))
    out = tmp_path / "run"
    command = ["distill", "--data", str(tmp_path / "data.npz"), "--teacher", name, "--labels", "0", "--seeds", "0-1"]
    assert cli.main([*command, "--epochs", "3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "of scikit-learn, trained for each seed" in said.out.replace("\n         ", " ")
    assert "1/6  seed 0, teacher: validation" in said.err
    report = json.loads((out / "report.json").read_text())
    assert len(report["teacher"]["test_accuracy"]) == 2
    assert report["settings"]["teacher"] == name
    assert not (out / "teacher.safetensors").exists()


def test_a_pickle_is_read_only_where_that_was_allowed(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "forest.joblib").write_bytes(b"cos\nsystem\n(S'touch harm'\ntR.")
    assert cli.main(["distill", "--teacher", str(tmp_path / "forest.joblib"), "--out", str(tmp_path / "run")]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named_as_the_option(capsys: Any) -> None:
    assert cli.main(["distill", "--teacher", "nowhere.onnx"]) == 2
    said = capsys.readouterr().err
    assert "--teacher must be a file that ends in .onnx" in said
    assert "'nowhere.onnx', which does not exist" in said


# --- what is taught ---


def test_an_objective_can_be_given_as_terms_or_as_the_same_text() -> None:
    terms = HardLabels(0.3) + ReverseKL(0.7, temperature=2)
    given = kd.distill((24,), (8,), "digits", objective=terms, epochs=2, teacher_epochs=2, seed=0)
    written = kd.distill((24,), (8,), "digits", objective=str(terms), epochs=2, teacher_epochs=2, seed=0)
    assert given.report["student_distilled"] == written.report["student_distilled"]
    assert given.report["objective"] == "HardLabels(0.3) + ReverseKL(0.7, temperature=2)"
    assert [figures["term"] for figures in given.history[-1]["terms"]] == ["HardLabels", "ReverseKL"]


def test_a_preset_is_an_objective_by_another_toolkits_name() -> None:
    assert str(Settings(preset="keras").make_objective()) == "HardLabels(0.1) + SoftLabels(0.9, temperature=3)"
    for other in ({"objective": "HardLabels()"}, {"soft_schedule": "cosine()"}):
        with pytest.raises(ArgumentError, match="left out where there is preset"):
            Settings(preset="keras", **other).check()


def test_the_student_alone_keeps_the_smoothing_of_the_hard_labels() -> None:
    smooth = run(objective="HardLabels(0.5, label_smoothing=0.2) + SoftLabels(0.5)")
    plain = run()
    nll = [e.result().report["student_alone"]["test_nll"][0] for e in (smooth, plain)]
    assert nll[0] != nll[1]


def test_schedules_multiply_the_configured_values_and_leave_them_as_they_are() -> None:
    fixed = run(temperature=2.0)
    same = run(temperature=4.0, temperature_schedule="constant(0.5)")
    falling = run(temperature=4.0, temperature_schedule="linear(1, 0.25)", hard_schedule="warmup(0.5)")
    assert fixed.result().report["student_distilled"] == same.result().report["student_distilled"]
    assert falling.result().report["student_distilled"] != same.result().report["student_distilled"]
    assert falling.settings.temperature == 4.0
    with pytest.raises(ArgumentError, match="temperature_schedule must be an expression of constant, linear"):
        run(temperature_schedule="linaer(1, 0)")


def test_a_students_layers_can_be_taught_from_a_teachers() -> None:
    terms = HardLabels(0.5) + SoftLabels(0.5) + Hints(0.1, pairs=(("1", "1"),))
    result = kd.distill((24,), (8,), "digits", objective=terms, epochs=2, teacher_epochs=2, teacher_dropout=0.0, seed=0)
    shares = {figures["term"]: figures["gradient_share"] for figures in result.history[-1]["terms"]}
    assert shares["Hints"] > 0


def test_a_teacher_without_layers_cannot_teach_layers() -> None:
    with pytest.raises(ArgumentError, match="one whose layers can be read"):
        kd.distill(lambda x: x[:, :10], (8,), "digits", objective=HardLabels() + Hints(), seed=0)


def test_unlabelled_rows_feel_the_soft_term_alone(teacher: MLP) -> None:
    data = load("digits")
    y = np.full_like(data.y_train, -1)
    by_soft_labels = MLP([64, 8, 10])
    kd.training.fit(by_soft_labels, data.x_train, y, teacher.logits(data.raw(data.x_train)), epochs=20, hard_weight=1.0)
    assert metrics.accuracy(by_soft_labels.logits(data.x_test, normalised=True), data.y_test) > 0.7


# --- networks between, and together ---


def test_assistants_and_generations_are_trained_in_a_row_and_reported() -> None:
    experiment = run(assistants="16, 12-12", generations=3)
    assert models(experiment) == [
        "teacher", ALONE, "assistant 1", "assistant 2", "generation 1", "generation 2", DISTILLED,
    ]  # fmt: skip
    report = experiment.result().report
    assert [a["layers"] for a in report["assistants"]] == [[64, 16, 10], [64, 12, 12, 10]]
    assert [g["layers"] for g in report["generations"]] == [[64, 8, 10]] * 2
    assert len(report["ensemble"]["test_accuracy"]) == 1
    assert experiment.trainings == 7


def test_each_network_in_a_row_is_taught_by_the_one_before(monkeypatch: Any) -> None:
    lessons = []
    train = Experiment._train

    def watched(self: Any, situation: Any, name: Any, seed: Any, model: Any, y: Any, lesson: Any) -> None:
        train(self, situation, name, seed, model, y, lesson)
        said = None if lesson is None else lesson.logits
        lessons.append((name, said, model.logits(self.dataset.x_train, normalised=True)))

    monkeypatch.setattr(Experiment, "_train", watched)
    run(assistants="16", generations=2)
    taught = [entry for entry in lessons if entry[1] is not None]
    assert [name for name, _, _ in taught] == ["assistant 1", "generation 1", DISTILLED]
    for (_, _, said), (_, heard, _) in itertools.pairwise(taught):
        assert np.array_equal(said, heard)


def test_generations_begin_from_different_weights_and_the_last_from_those_of_the_student_alone() -> None:
    experiment = run(generations=2, epochs=1)
    fresh = [experiment._make_student(seed, first=False).parameters()[0].numpy() for seed in (0, 1000)]
    assert not np.array_equal(*fresh)


def test_online_teacher_and_student_learn_from_each_other() -> None:
    experiment = run(mode="online", labels=50)
    assert models(experiment) == [ALONE, DISTILLED]
    result = experiment.result()
    assert experiment.trainings == 4
    assert result.report["teacher"]["layers"] == [64, 24, 10]
    assert result.teacher.predict(result.dataset.raw(result.dataset.x_test)).shape == (400,)
    assert result.student.parameter_count < result.teacher.parameter_count


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"teacher": "rf"}, "teacher"), ({"assistants": "16"}, "assistants"), ({"generations": 2}, "g")],
)
def test_what_needs_a_trained_teacher_is_refused_online(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=f"{named}.*in online mode"):
        run(mode="online", **settings)


def test_layer_sizes_are_read_from_text_or_refused() -> None:
    assert [sizes_from_text(text) for text in ("8", "16-12", "16x12", "none")] == [(8,), (16, 12), (16, 12), ()]
    with pytest.raises(ArgumentError, match=r"assistants must be hidden layers with commas.*got '16-'"):
        run(assistants="16-")


# --- images, sampling, early stopping ---


def test_images_are_shifted_for_student_and_teacher_and_columns_are_not() -> None:
    plain, student, teacher = run(), run(shift=1), run(teacher_shift=1)
    figures = [e.result().report for e in (plain, student, teacher)]
    teachers, students = ([f[key]["test_nll"] for f in figures] for key in ("teacher", "student_alone"))
    assert teachers[0] == teachers[1] != teachers[2]
    assert students[0] == students[2] != students[1]
    rng = np.random.default_rng(0)
    data = load((rng.normal(size=(80, 5)), np.arange(80) % 2))
    with pytest.raises(ShapeError, match="shift must be 0"):
        Experiment(Settings(**{**QUICK, "shift": 1, "student": (4,)}), dataset=data).run()


def test_early_stopping_shortens_trainings_and_the_history_shows_it() -> None:
    experiment = run(epochs=40, lr=0.02, patience=2)
    epochs = [row["epoch"] for row in experiment.result().history if row["model"] == ALONE]
    assert 3 <= len(epochs) < 40


def test_balanced_sampling_and_clipping_are_settings() -> None:
    for settings in ({"sampling": "balanced"}, {"clip": 0.1}):
        assert run(**settings).result().report["student_alone"] != run().result().report["student_alone"]
    with pytest.raises(ArgumentError, match="sampling must be one of shuffled, balanced, got 'even'"):
        run(sampling="even")


def test_the_history_can_be_written_as_tensorboard_events(tmp_path: Path) -> None:
    command = ["distill", "--quiet", "--seeds", "0", "--epochs", "2", "--teacher-epochs", "2", "--labels", "0"]
    assert cli.main([*command, "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    events = list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    assert len({path.parent for path in events}) == len(events) == 3, "one for each training"


def test_the_checksum_of_event_files_is_that_of_the_standard_masked() -> None:
    crc = 0xE3069283  # of the nine digits, which every description of CRC-32C names
    turned = crc >> 15 | crc << 17 & 0xFFFFFFFF
    assert masked_checksum(b"123456789") == (turned + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def test_event_files_are_read_by_the_format_s_own_messages(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboardX")
    masked = pytest.importorskip("tensorboardX.record_writer").masked_crc32c
    rows = [
        {"seed": seed, "situation": "all labels", "model": "student", "epoch": epoch, "loss": 1 / epoch, "lr": 0.5}
        | {"validation_accuracy": None, "terms": [{"term": "kl ä", "value": float("nan"), "gradient_share": 0.25}]}
        for seed in (0, 11)
        for epoch in (1, 2, 300)
    ]
    write_events(tmp_path, rows)
    write_events(tmp_path, rows[:1])
    files = {
        name: sorted((tmp_path / name).iterdir())
        for name in ("seed-0-all-labels-student", "seed-11-all-labels-student")
    }
    assert [len(paths) for paths in files.values()] == [2, 1]
    for (first, *_), steps in zip(files.values(), ([1, 2, 300], [1, 2, 300]), strict=True):
        data, events = first.read_bytes(), []
        while data:
            size = int.from_bytes(data[:8], "little")
            length, message = data[:8], data[12 : 12 + size]
            checks = [int.from_bytes(data[k : k + 4], "little") for k in (8, 12 + size)]
            assert checks == [masked(length), masked(message)]
            events.append(event_pb2.Event.FromString(message))
            data = data[16 + size :]
        assert (events[0].file_version, events[0].WhichOneof("what")) == ("brain.Event:2", "file_version")
        assert abs(events[0].wall_time - time.time()) < 600
        assert [event.step for event in events[1:]] == steps
        values = {value.tag: value.simple_value for value in events[2].summary.value}
        assert np.isnan(values.pop("kl ä/value"))
        assert values == {"loss": 0.5, "lr": 0.5, "kl ä/gradient_share": 0.25}
