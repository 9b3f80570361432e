"""Tests of what a person gets to see of a run: table, verdict, configuration file, folder, pictures, progress."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib
import io
import json
import re
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import report
from minikd.distillation import DistillResult, Experiment, Progress, Settings
from minikd.errors import ArgumentError, DataError, OutputError
from minikd.report.folder import FILES
from minikd.report.pictures import confusing
from minikd.report.progress import Lines, Watcher
from minikd.report.table import show_sentence

SMALL = {"teacher": (8,), "teacher_epochs": 2, "teacher_dropout": 0.0, "student": (4,), "epochs": 3}
SETTINGS = Settings(**SMALL, seeds=(0, 1), labels=20, temperature=3.0)


@pytest.fixture(scope="module")
def result() -> DistillResult:
    """A small run on three clouds of points."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = np.eye(3, 5)[y] + 0.5 * rng.standard_normal((300, 5))
    experiment = Experiment(SETTINGS, dataset=kd.data.load((x, y)))
    experiment.run()
    return experiment.result()


@pytest.fixture
def figures(result: DistillResult) -> dict[str, Any]:
    """A report that a test may change."""
    return copy.deepcopy(result.report)


# --- the table ---


def test_the_table_has_three_networks_for_each_situation(result: DistillResult) -> None:
    text = report.plain(report.results_table(result.report))
    for words in ("student sees all labels", "student sees 20 labels"):
        assert text.count(words) == 1
    for words in ("teacher  ", "student alone", "student distilled"):
        assert text.count(words) == 2


def test_the_table_fits_eighty_columns_even_with_ten_million_parameters(figures: dict[str, Any]) -> None:
    figures["teacher"] |= {"parameters": 12_395_210, "bytes": 49_580_840, "test_accuracy": [1.0, 0.5]}
    assert max(map(len, report.plain(report.results_table(figures)).splitlines())) <= 80


def test_the_table_shows_mean_and_deviation_in_percent(figures: dict[str, Any]) -> None:
    figures["teacher"]["test_accuracy"] = [0.97, 0.99]
    assert "98.00 ± 1.41" in report.plain(report.results_table(figures))


def test_one_seed_has_no_deviation(figures: dict[str, Any]) -> None:
    for name in ("teacher", "student_alone", "student_distilled"):
        figures[name]["test_accuracy"] = [0.97]
    first = report.plain(report.results_table(figures)).split("student sees 20")[0]
    assert "97.00" in first
    assert "±" not in first


def test_a_figure_that_is_missing_or_not_finite_is_a_dash(figures: dict[str, Any]) -> None:
    figures["student_alone"] |= {"test_nll": [float("nan"), 1.0], "test_ece": [None, 0.1], "parameters": None}
    (row,) = [r for r in report.results_table(figures).rows if r[0] == "student alone"][:1]
    assert [row[2], row[3], row[5]] == ["–", "–", "–"]


def test_a_run_without_the_student_alone_has_no_row_for_it(figures: dict[str, Any]) -> None:
    figures |= {"student_alone": None, "few_labels": None}
    assert "alone" not in report.plain(report.results_table(figures))


def test_numbers_stand_under_each_other_and_lines_have_no_trailing_spaces(result: DistillResult) -> None:
    lines = report.plain(report.results_table(result.report)).splitlines()
    rows = [line for line in lines if line.startswith(("teacher", "student alone", "student distilled"))]
    assert len({len(line) for line in rows}) == 1
    assert all(line == line.rstrip() for line in lines)


def test_a_long_last_cell_is_wrapped_under_its_column() -> None:
    text = report.plain(report.Table(("", ""), "<<", [("name", "word " * 30)]), width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert all(line.startswith("      word") for line in text.splitlines()[1:])


# --- the verdict ---


def with_difference(mean: float | None, interval: list[float] | None, verdict: str, seeds: int) -> dict[str, Any]:
    difference = {"per_seed": [mean] * seeds, "mean": mean, "interval": interval, "confidence": 0.95}
    return {"labels": 100, "difference": difference, "verdict": verdict, "few_labels": None}


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            with_difference(0.098, [0.081, 0.115], "helped", 5),
            "With 100 labels distillation helped: +9.8 points of test accuracy "
            "(95 % interval +8.1 to +11.5, 5 paired seeds).",
        ),
        (
            with_difference(-0.012, [-0.02, -0.004], "hurt", 5),
            "With 100 labels distillation hurt: -1.2 points of test accuracy "
            "(95 % interval -2.0 to -0.4, 5 paired seeds).",
        ),
        (
            with_difference(-0.0013, [-0.0162, 0.0136], "no clear difference", 2),
            "With 100 labels there is no clear difference: -0.1 points of test accuracy "
            "(95 % interval -1.6 to +1.4 includes 0, 2 paired seeds).",
        ),
        (
            with_difference(0.01, None, "not enough seeds", 1),
            "With 100 labels one seed is not enough for a verdict: +1.00 points of test accuracy; "
            "a second paired seed gives an interval.",
        ),
        (with_difference(None, None, "not enough seeds", 0), "With 100 labels there is nothing to compare yet."),
    ],
    ids=["helped", "hurt", "no clear difference", "one seed", "no seed"],
)
def test_the_verdict_is_a_plain_sentence_with_its_interval(case: dict[str, Any], sentence: str) -> None:
    assert report.verdicts(case) == [(case["verdict"], sentence)]


def test_a_narrow_interval_is_given_with_two_decimals_so_that_it_is_seen_to_leave_out_zero() -> None:
    (_, sentence), *_ = report.verdicts(with_difference(0.0012, [0.0004, 0.002], "helped", 5))
    assert "+0.12 points" in sentence
    assert "+0.04 to +0.20" in sentence


def test_a_difference_of_nothing_is_not_called_minus_zero() -> None:
    (_, sentence), *_ = report.verdicts(with_difference(-1e-9, [-0.01, 0.01], "no clear difference", 3))
    assert "+0.0 points" in sentence


def test_a_number_and_its_percent_sign_stay_on_one_line() -> None:
    stream = io.StringIO()
    show_sentence("hurt", "x" * 76 + " 95 % interval", stream)
    assert stream.getvalue() == "x" * 76 + "\n95 % interval\n"


# --- the configuration file ---


@given(
    data=st.text(st.characters(exclude_categories=["Cs"])),
    numbers=st.lists(st.integers(0, 2**40), max_size=5),
    temperature=st.floats(1e-300, 1e300),
    epochs=st.integers(1, 2**60),
)
def test_settings_survive_the_way_through_toml(
    data: str, numbers: list[int], temperature: float, epochs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = Settings(data=data, student=tuple(numbers), temperature=temperature, epochs=epochs)
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(report.to_toml(settings).encode())
    assert Settings(**report.from_toml(path)) == settings


def test_the_configuration_file_explains_every_setting() -> None:
    text = report.to_toml(Settings())
    assert set(tomllib.loads(text)) == {field.name for field in dataclasses.fields(Settings)}
    for field in dataclasses.fields(Settings):
        assert f"# {field.metadata['help']}\n{field.name} = " in text


def test_a_path_that_is_not_text_is_refused_in_words() -> None:
    with pytest.raises(ArgumentError, match="data must be text that UTF-8 can hold"):
        report.to_toml(Settings(data="caf\udce9.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature = 2.0", r"the key 'temprature' must be the name of a setting.*Did you mean temperature\?"),
        ("zzz = 1", "The settings are data, label_column"),
        ('temperature = "2"', "temperature must be a number, got '2'"),
        ("temperature = true", "temperature must be a number, got True"),
        ("epochs = 2.0", "epochs must be a whole number, got 2.0"),
        ("epochs = true", "epochs must be a whole number"),
        ("seeds = 5", r"seeds must be a list of whole numbers, such as \[256, 256\], got 5"),
        ("student = [1.5]", "student must be a list of whole numbers"),
        ("data = 3", "data must be a text in quotes, got 3"),
        ("data = digits", "must be a file in TOML"),
        ("epochs = 1\nepochs = 2", "must be a file in TOML"),
    ],
)
def test_a_wrong_configuration_file_is_refused_with_its_name_and_the_key(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        report.from_toml(path)
    assert str(path) in str(caught.value)


def test_a_configuration_file_that_is_missing_or_not_text_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        report.from_toml(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be a file in TOML"):
        report.from_toml(tmp_path / "binary.toml")


def test_a_whole_number_will_do_where_a_number_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("temperature = 4")
    assert repr(report.from_toml(path)) == "{'temperature': 4.0}"


# --- the folder ---


def test_a_run_clears_away_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    for name in (".config.toml.0a1b2c3d.part", ".teacher.safetensors.4e5f6a7b.part"):
        (tmp_path / name).write_bytes(b"half")
    with report.RunFolder(tmp_path) as folder:
        folder.begin(Settings())
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_the_folder_holds_every_file_after_a_run_and_nothing_temporary(result: DistillResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minikd[cli]'")
    folder = report.RunFolder(tmp_path / "a" / "b")
    folder.begin(result.settings)
    folder.write_results(result)
    folder.write_pictures(result)
    folder.close()
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(FILES)
    assert [name for name, _ in folder.files()] == list(FILES)


def test_the_report_in_the_folder_is_the_report_of_the_result(result: DistillResult, tmp_path: Path) -> None:
    folder = report.RunFolder(tmp_path)
    folder.write_results(result)
    assert json.loads((tmp_path / "report.json").read_text()) == result.report


def test_the_report_has_null_where_a_figure_is_not_finite(result: DistillResult, tmp_path: Path) -> None:
    bad = {**result.report, "teacher": {"test_nll": [float("nan"), float("inf"), 1.0]}}
    report.RunFolder(tmp_path).write_results(dataclasses.replace(result, report=bad))
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["teacher"]["test_nll"] == [None, None, 1.0]
    assert "NaN" not in text
    assert "Infinity" not in text


def test_the_history_has_a_row_for_each_epoch_of_each_training(result: DistillResult, tmp_path: Path) -> None:
    report.RunFolder(tmp_path).write_results(result)
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 4 * 3)
    assert float(rows[0]["loss"]) == result.history[0]["loss"]
    assert {row["model"] for row in rows} == {"teacher", "student alone", "student distilled"}


def test_the_models_in_the_folder_predict_as_those_of_the_result(result: DistillResult, tmp_path: Path) -> None:
    report.RunFolder(tmp_path).write_results(result)
    x = result.dataset.raw(result.dataset.x_test)
    for name, model in (("teacher", result.teacher), ("student", result.student)):
        loaded = kd.load(tmp_path / f"{name}.safetensors")
        np.testing.assert_array_equal(loaded.logits(x), model.logits(x))


def test_results_can_be_written_before_there_are_any_models(result: DistillResult, tmp_path: Path) -> None:
    empty = Experiment(SETTINGS, dataset=result.dataset).result()
    folder = report.RunFolder(tmp_path)
    folder.write_results(empty)
    assert [name for name, _ in folder.files()] == ["report.json", "history.csv", "history.jsonl"]


def test_a_folder_with_results_is_only_used_where_that_was_allowed(result: DistillResult, tmp_path: Path) -> None:
    report.RunFolder(tmp_path).write_results(result)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"one with report\.json\. .*--overwrite"):
        report.RunFolder(tmp_path).begin(result.settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    report.RunFolder(tmp_path, overwrite=True).begin(result.settings)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_configuration_alone_does_not_make_a_folder_taken(result: DistillResult, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("epochs = 3\n")
    report.RunFolder(tmp_path).begin(result.settings)


def test_other_files_in_the_folder_are_left_alone(result: DistillResult, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    report.RunFolder(tmp_path, overwrite=True).begin(result.settings)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_below_a_file_is_refused_before_anything_is_trained(result: DistillResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"must be a folder that can be made and written.*--out FOLDER"):
        report.RunFolder(tmp_path / "file" / "run").begin(result.settings)


def test_the_configuration_names_the_backend_that_ran(result: DistillResult, tmp_path: Path) -> None:
    report.RunFolder(tmp_path).begin(result.settings)
    assert report.from_toml(tmp_path / "config.toml")["backend"] == result.report["backend"]


def test_fresh_folders_have_the_datas_name_and_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20250102-030405")
    paths = []
    for _ in range(3):
        folder = report.RunFolder.fresh("/data/my flowers!.csv")
        folder.begin(Settings())
        paths.append(str(folder.path))
    stem = str(Path("runs", "my-flowers-20250102-030405"))
    assert paths == [stem, f"{stem}-2", f"{stem}-3"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_temporary(
    result: DistillResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = report.RunFolder(tmp_path)
    folder.write_results(result)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        folder.write_results(dataclasses.replace(result, history=[]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- pictures ---


@pytest.fixture
def matplotlib() -> Iterator[None]:
    """Skips where matplotlib is missing, and checks that no global figure was made."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minikd[cli]'")
    import sys

    before = "matplotlib.pyplot" in sys.modules
    yield
    assert ("matplotlib.pyplot" in sys.modules) == before


def size_of(png: bytes | None) -> tuple[int, int]:
    """Width and height in a PNG's header."""
    assert png is not None
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.usefixtures("matplotlib")
def test_learning_curves_have_one_column_for_each_situation(result: DistillResult) -> None:
    both = size_of(report.learning_curves(result))
    rows = [row for row in result.history if row["situation"] in ("", "all labels")]
    one = size_of(report.learning_curves(dataclasses.replace(result, history=rows)))
    assert both[0] > 1.5 * one[0]
    assert both[1] == one[1]


@pytest.mark.usefixtures("matplotlib")
def test_learning_curves_can_be_drawn_of_a_training_that_diverged(result: DistillResult) -> None:
    rows = [{**row, "validation_nll": float("inf"), "validation_accuracy": float("nan")} for row in result.history]
    assert size_of(report.learning_curves(dataclasses.replace(result, history=rows)))


@pytest.mark.usefixtures("matplotlib")
def test_a_run_that_stopped_in_its_first_teacher_has_no_pictures(result: DistillResult, tmp_path: Path) -> None:
    stopped = dataclasses.replace(result, history=result.history[:1], teacher=None)
    report.RunFolder(tmp_path).write_pictures(stopped)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("matplotlib")
def test_soft_labels_are_drawn_at_the_runs_own_temperature_too(result: DistillResult) -> None:
    own = size_of(report.soft_labels(result))
    usual = dataclasses.replace(result, settings=dataclasses.replace(result.settings, temperature=4.0))
    assert own[0] > size_of(report.soft_labels(usual))[0]


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("shape", [(1, 5), (5,)], ids=["image", "features"])
def test_soft_labels_can_be_drawn_of_images_and_of_features(result: DistillResult, shape: tuple[int, ...]) -> None:
    dataset = dataclasses.replace(result.dataset, feature_shape=shape)
    assert size_of(report.soft_labels(dataclasses.replace(result, dataset=dataset)))


@pytest.mark.usefixtures("matplotlib")
def test_the_same_run_gives_the_same_picture(result: DistillResult) -> None:
    assert report.soft_labels(result) == report.soft_labels(result)


def test_confusing_samples_have_different_labels_and_a_likely_second_class() -> None:
    probabilities = np.array([[0.5, 0.5, 0], [0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.0, 0.7], [1, 0, 0]])
    assert confusing(probabilities, np.array([0, 0, 1, 2, 1])) == [0, 2, 3]
    assert confusing(probabilities, np.array([0, 0, 1, 2, 1]), count=1) == [0]


# --- progress ---


def progress(step: int, **changes: Any) -> Progress:
    start = Progress("100 labels", "student alone", 2, 1, 2, step, 20, 0.25, None, 3, 10)
    return start._replace(**changes)


def test_a_pipe_gets_one_line_for_each_finished_training() -> None:
    stream = io.StringIO()
    with Lines(stream) as watcher:
        for step in range(1, 21):
            watcher(progress(step, accuracy=0.5 if step > 10 else None))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith(" 4/10  seed 2, 100 labels, student alone: loss 0.250, validation 50.0 %  (")


def test_a_long_training_says_every_few_seconds_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with Lines(stream) as watcher:
        for step in range(1, 10):
            watcher(progress(step))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert " 3/10  seed 2, 100 labels, student alone, epoch 1/2: loss 0.250  (" in lines[0]


def test_a_quiet_run_only_remembers_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with report.watch(io.StringIO(), quiet=True) as watcher:
        watcher(progress(7))
    assert type(watcher) is Watcher
    assert watcher.last == progress(7)
    assert capsys.readouterr() == ("", "")


# --- the environment ---


def test_the_environment_names_every_backend_extra_and_data_set() -> None:
    names = {row[0] for row in report.environment_table().rows}
    assert {"minikd", "Python", "NumPy", "cli", "digits", "fashion-mnist", *kd.backends()} <= names


def test_the_page_on_the_report_names_every_key_that_there_is(result: DistillResult) -> None:
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text("utf-8")
    documented = set(re.findall(r"`(\w+)`", page))
    situation = result.report["few_labels"] or result.report
    keys = (
        set(result.report)
        | set(result.report["data"])
        | set(situation["student_distilled"])
        | set(situation["difference"])
    )
    assert keys <= documented, sorted(keys - documented)


def test_where_no_blas_is_found_in_the_process_numpy_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = importlib.import_module("minikd.report.environment")
    monkeypatch.setattr(environment.blas, "library", lambda: None)
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": "a-blas"}}})
    (numpy,) = (row[1] for row in report.environment_table().rows if row[0] == "NumPy")
    assert numpy == f"{np.__version__}, matrix products by a-blas"
