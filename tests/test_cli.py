"""The command as a user runs it: in a process of its own, in a folder of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import cli
from minikd.distillation import Settings
from minikd.errors import MinikdError
from minikd.report.folder import FILES

# A run that takes a moment: small networks, few epochs, two seeds.
SMALL = ["--teacher", "32", "--teacher-epochs", "3", "--student", "8", "--epochs", "3", "--seeds", "0-1"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
DRAWS = importlib.util.find_spec("matplotlib") is not None
# Runs the command as if these packages were not installed.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({packages!r})); from minikd.cli import main; sys.exit(main())"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, in which the package under test can be imported from any folder."""
    home = str(Path(kd.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": home, "PYTHONIOENCODING": "utf-8", **changes}


def minikd(*arguments: str | Path, cwd: Path, without: tuple[str, ...] = (), **changes: str) -> Any:
    """The finished process of `minikd` with these arguments."""
    start = ["-c", WITHOUT.format(packages=without)] if without else ["-m", "minikd"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, encoding="utf-8", timeout=120
    )


def refused(process: Any, *messages: str) -> None:
    """The process ended with code 2 and one message on stderr that holds these words, and nothing else."""
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    assert re.match(r"minikd( \w+)?: error: ", process.stderr.splitlines()[-1]) or "(Try minikd" in process.stderr
    for message in messages:
        assert message in process.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One small run: the finished process, with `.folder`, where its files are, and `.report`."""
    place = tmp_path_factory.mktemp("run")
    process = minikd("distill", *SMALL, "--out", "first", cwd=place)
    assert process.returncode == 0, process.stderr
    process.folder = place / "first"
    process.report = json.loads((process.folder / "report.json").read_text())
    return process


# --- a run from end to end ---


def test_a_run_prints_what_it_does_the_table_the_verdicts_and_the_files(run: Any) -> None:
    for words in ("digits: train 1,200, validation 197, test 400; 64 features, 10 classes", "64-8-10", "backend"):
        assert words in run.stdout
    for words in ("student sees all labels", "student sees 100 labels", "student distilled", "ECE"):
        assert words in run.stdout
    assert len(re.findall(r"^With (all|100) labels (distillation|there is)", run.stdout, re.MULTILINE)) == 2
    for name in os.listdir(run.folder):
        assert name in run.stdout
    assert re.search(r"Total time: \d+\.\d s", run.stdout)


def test_a_run_leaves_every_file_and_nothing_else(run: Any) -> None:
    expected = {name for name in FILES if DRAWS or not name.endswith(".png")}
    assert set(os.listdir(run.folder)) == expected


def test_the_report_has_every_documented_key(run: Any) -> None:
    report = run.report
    top = {"version", "backend", "settings", "seeds", "requested_seeds", "complete", "data", "seconds", "few_labels"}
    both = {"labels", "temperature", "hard_weight", "soft_weight", "difference", "verdict"}
    both |= {"objective", "assistants", "generations", "ensemble"}
    networks = {"teacher", "student_alone", "student_distilled"}
    assert set(report) == top | both | networks
    assert set(report["few_labels"]) == both | networks
    assert set(report["data"]) == {"name", "train", "validation", "test", "classes", "features", "sha256"}
    measured = {"layers", "parameters", "bytes", "test_accuracy", "test_nll", "test_ece"}
    for situation in (report, report["few_labels"]):
        assert set(situation["teacher"]) == measured
        for name in ("student_alone", "student_distilled"):
            assert set(situation[name]) == measured | {"agreement", "kl_to_teacher"}
        assert set(situation["difference"]) == {"per_seed", "mean", "interval", "confidence"}
        for name in networks:
            assert len(situation[name]["test_accuracy"]) == len(report["seeds"]) == 2
    assert report["labels"] == "all"
    assert report["few_labels"]["labels"] == 100
    assert report["complete"] is True


def test_the_models_of_a_run_can_be_loaded_and_do_what_the_report_says(run: Any) -> None:
    data = kd.data.load("digits")
    for name, figures in (("teacher", "teacher"), ("student", "student_distilled")):
        model = kd.load(run.folder / f"{name}.safetensors")
        right = model.predict(data.raw(data.x_test)) == data.y_test
        assert right.mean() == pytest.approx(run.report[figures]["test_accuracy"][0], abs=1e-12)


@pytest.mark.skipif(not DRAWS, reason="needs matplotlib: pip install 'minikd[cli]'")
def test_the_pictures_of_a_run_are_pictures(run: Any) -> None:
    for name in ("learning_curves.png", "soft_labels.png"):
        picture = (run.folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(struct.unpack(">II", picture[16:24])) > 500


def test_the_configuration_of_a_run_repeats_it_number_for_number(run: Any) -> None:
    place = run.folder.parent
    again = minikd("distill", "--config", "first/config.toml", "--out", "again", cwd=place, without=("matplotlib",))
    assert again.returncode == 0, again.stderr
    report = json.loads((place / "again" / "report.json").read_text())
    assert {**report, "seconds": 0, "settings": 0} == {**run.report, "seconds": 0, "settings": 0}
    assert {**report["settings"], "backend": ""} == {**run.report["settings"], "backend": ""}
    assert (place / "again" / "config.toml").read_text() == (run.folder / "config.toml").read_text()
    for name in ("teacher.safetensors", "student.safetensors", "history.csv"):
        assert (place / "again" / name).read_bytes() == (run.folder / name).read_bytes()


def test_output_into_a_pipe_has_no_control_characters_and_a_line_for_each_training(run: Any) -> None:
    assert not CONTROL.search(run.stdout + run.stderr)
    lines = run.stderr.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(
        r"10/10  seed 1, 100 labels, student distilled: loss \d\.\d+, validation \d+\.\d %  \(\d+\.\d s\)", lines[-1]
    )


def test_output_into_a_pipe_fits_eighty_columns(run: Any) -> None:
    assert max(map(len, run.stdout.splitlines())) <= 80


# --- settings: options, file, defaults ---


def test_an_option_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("epochs = 2\nlr = 0.5\nseeds = [3]\nteacher = [8, 8]\n")
    options = cli.parser().parse_args(["distill", "--config", str(tmp_path / "run.toml"), "--lr", "0.25"])
    settings, origins = cli.read_settings(options)
    assert (settings.epochs, settings.lr, settings.seeds, settings.teacher) == (2, 0.25, (3,), (8, 8))
    assert settings.batch_size == Settings().batch_size
    assert origins["lr"] == "--lr"
    assert origins["epochs"].endswith("run.toml: epochs")


def test_a_data_file_is_written_into_the_configuration_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text("a,label\n1,x\n")
    settings, _ = cli.read_settings(cli.parser().parse_args(["distill", "--data", "points.csv"]))
    assert settings.data == str(tmp_path / "points.csv")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("256-256", (256, 256)), ("256,128", (256, 128)), (" 16 ", (16,)), ("none", ()), ("64x32", (64, 32))],
)
def test_layers_are_read_from_sizes_with_something_between(text: str, sizes: tuple[int, ...]) -> None:
    assert cli.read_layers(text) == sizes


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("0,1,2", (0, 1, 2)), ("0-2, 7", (0, 1, 2, 7)), ("5", (5,))]
)
def test_seeds_are_a_list_of_seeds_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert cli.read_seeds(text) == seeds
    assert cli.read_seeds(cli.seeds_in_words(seeds)) == seeds


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_default_can_be_given_as_its_own_option(field: Any) -> None:
    kind = cli.SPECIAL.get(field.name, cli.TEXTS[cli.setting_types()[field.name]])
    text = kind.show(field.default)
    options = cli.parser().parse_args(["distill", cli.option_name(field.name), text])
    assert getattr(options, field.name) == field.default


def test_all_layers_can_be_given_where_first_and_last_fit_the_data(tmp_path: Path) -> None:
    small = [*SMALL, "--labels", "0", "--seeds", "4", "--student", "64-8-10", "--quiet", "--out", "run"]
    process = minikd("distill", *small, cwd=tmp_path, without=("matplotlib",))
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["student_distilled"]["layers"] == [64, 8, 10]
    assert report["seeds"] == [4]
    assert report["few_labels"] is None


# --- what is wrong is said in words ---


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--data", "nowhere.csv"], ["--data must be one of digits", "'nowhere.csv', which does not exist"]),
        (["--temperature", "0"], ["--temperature must be a finite number above 0, got 0.0"]),
        (["--temperature", "-1"], ["--temperature must be a finite number above 0, got -1.0"]),
        (["--temperature", "nan"], ["--temperature must be a finite number above 0, got nan"]),
        (["--temperature", "warm"], ["--temperature must be a number; got 'warm'", "(Try minikd distill --help.)"]),
        (["--epochs", "1.5"], ["--epochs must be a whole number; got '1.5'"]),
        (["--epochs", "0"], ["--epochs must be a whole number from 1, got 0"]),
        (["--backend", "abacus"], ["--backend must be one of", "c, numba, numpy, cupy, got 'abacus'"]),
        (["--optimizer", "magic"], ["--optimizer must be one of sgd, nesterov, adam, adamw, got 'magic'"]),
        (["--student", "16;16"], ["--student must be layer sizes such as 256-256, or none; got '16;16'"]),
        (["--student", "0"], ["--student must be layer sizes, each a whole number from 1, got (0,)"]),
        (["--seeds", "4-0"], ["--seeds must be seeds such as 0-4 or 0,1,7", "got '4-0'"]),
        (["--seeds", "0-999999999"], ["1000 at most"]),
        (["--seeds", "1,1"], ["--seeds must be different whole numbers from 0"]),
        (["--labels", "1201"], ["--labels must be at most 1200"]),
        (["--config", "nowhere.toml"], ["nowhere.toml must be a TOML file that can be read", "No such file"]),
        (["--temp", "2"], ["unrecognized arguments: --temp 2"]),
        (["--lr"], ["--lr expected one argument"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_wrong_option_gets_a_message_and_code_2(
    arguments: list[str], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["distill", *arguments, "--out", str(tmp_path / "run")])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("minikd distill: error: ") or "minikd: error: unrecognized" in err
    for message in messages:
        assert message in err
    assert not (tmp_path / "run").exists()


def table(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def points(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 2) and labels of three classes."""
    return np.random.default_rng(0).standard_normal((n, 2)), np.arange(n) % 3


def wrong_shape(folder: Path) -> list[str]:
    x, y = points()
    return ["--data", str(table(folder / "shape.npz", x=x, y=y[:-1]))]


def wrong_label(folder: Path) -> list[str]:
    x, y = points()
    return ["--data", str(table(folder / "label.npz", x=x, y=np.where(np.arange(60) == 7, -5, y)))]


def nan_in_npz(folder: Path) -> list[str]:
    x, y = points()
    x[5, 1] = np.nan
    return ["--data", str(table(folder / "nan.npz", x=x, y=y))]


def nan_in_csv(folder: Path) -> list[str]:
    (folder / "nan.csv").write_text("width,height,kind\n1,2,a\n3,nan,b\n")
    return ["--data", str(folder / "nan.csv"), "--label-column", "kind"]


def half_written(folder: Path) -> list[str]:
    x, y = points()
    path = table(folder / "half.npz", x=x, y=y)
    path.write_bytes(path.read_bytes()[:200])
    return ["--data", str(path)]


def no_label_column(folder: Path) -> list[str]:
    (folder / "kind.csv").write_text("width,kind\n1,a\n2,b\n")
    return ["--data", str(folder / "kind.csv")]


def unwritable(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--out", str(folder / "file" / "run")]


def taken(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "report.json").write_text("{}")
    return ["--out", str(folder / "run")]


def unknown_key(folder: Path) -> list[str]:
    (folder / "run.toml").write_text("temprature = 4.0\n")
    return ["--config", str(folder / "run.toml")]


def wrong_value(folder: Path) -> list[str]:
    (folder / "run.toml").write_text("temperature = -4\n")
    return ["--config", str(folder / "run.toml")]


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (wrong_shape, ["shape.npz: y must be one label for each of the 60 rows", "got shape (59,)"]),
        (wrong_label, ["label.npz: y, row 7 must be a class id", "got -5"]),
        (nan_in_npz, ["nan.npz: x, row 5, column 1 must be a finite number", "got nan"]),
        (nan_in_csv, ["nan.csv, line 3, column 'height' must be a finite number", "'nan'"]),
        (half_written, ["half.npz must be a complete, readable npz file", "half-written"]),
        (no_label_column, ["kind.csv", "the label column 'label'", "--label-column"]),
        (unwritable, ["must be a folder that can be made and written", "--out FOLDER"]),
        (taken, ["must be a folder without results, got one with report.json", "--overwrite"]),
        (unknown_key, ["run.toml: the key 'temprature'", "Did you mean temperature?"]),
        (wrong_value, ["run.toml: temperature must be a finite number above 0, got -4.0"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_input_gets_a_message_and_code_2_and_no_traceback(
    make: Any, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["distill", *SMALL, *make(tmp_path)])
    out, err = capsys.readouterr()
    refused(subprocess.CompletedProcess([], code, out, err), *messages)
    assert not (tmp_path / "runs").exists()


def test_wrong_input_is_refused_by_the_command_as_it_is_started_from_a_shell(tmp_path: Path) -> None:
    refused(minikd("distill", *SMALL, *wrong_shape(tmp_path), cwd=tmp_path), "shape.npz: y must be one label for each")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_backend_in_the_environment_is_named_as_such(tmp_path: Path) -> None:
    refused(minikd("distill", cwd=tmp_path, MINIKD_BACKEND="abacus"), "MINIKD_BACKEND must be one of c, numba, numpy")


def test_a_student_larger_than_its_teacher_is_only_warned_about(tmp_path: Path) -> None:
    larger = [*SMALL, "--student", "64", "--labels", "0", "--seeds", "0", "--out", "run"]
    process = minikd("distill", *larger, cwd=tmp_path, without=("matplotlib",))
    assert process.returncode == 0
    warning = "minikd distill: warning: the student has 4,810 parameters, more than the 2,410 of its teacher"
    assert process.stderr.splitlines()[0].startswith(warning)
    assert "warning" not in process.stdout


def test_the_traceback_is_shown_to_those_who_ask_for_it(tmp_path: Path) -> None:
    process = minikd("distill", "--temperature", "0", cwd=tmp_path, MINIKD_DEBUG="1")
    assert process.returncode != 0
    assert "Traceback" in process.stderr


def test_a_lack_of_memory_is_said_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise MemoryError("Unable to allocate 512 GiB")

    monkeypatch.setattr(cli, "environment_table", full)
    assert cli.main(["info"]) == 2
    assert "minikd info: error: There is not enough memory (Unable to allocate 512 GiB)." in capsys.readouterr().err


# --- folders ---


def test_without_a_name_each_run_gets_a_folder_of_its_own_and_quiet_prints_the_verdict_alone(tmp_path: Path) -> None:
    tiny = ["--teacher", "8", "--teacher-epochs", "1", "--student", "4", "--epochs", "1", "--seeds", "0-1", "--quiet"]
    process = minikd("distill", *tiny, "--labels", "0", cwd=tmp_path, without=("matplotlib",))
    assert process.returncode == 0
    assert process.stderr == ""
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", folder.name)
    *sentence, last = process.stdout.splitlines()
    assert re.fullmatch(r"With all labels [^:]+: [^:]+ \(95 % interval [^:]+ 2 paired seeds\)\.", " ".join(sentence))
    assert last == f"Files are in {Path('runs', folder.name)}"


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    tiny = ["--teacher", "8", "--teacher-epochs", "1", "--student", "4", "--epochs", "1", "--seeds", "0", "--quiet"]
    process = minikd("distill", *tiny, "--out", ".", "--overwrite", cwd=tmp_path, without=("matplotlib",))
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(name for name in FILES if not name.endswith(".png"))
    assert all((tmp_path / name).read_bytes() != b"old" for name in os.listdir(tmp_path))


# --- Ctrl-C ---


def test_ctrl_c_keeps_what_is_complete_and_says_so(tmp_path: Path) -> None:
    long = ["--teacher", "16", "--teacher-epochs", "5", "--student", "8", "--epochs", "20", "--seeds", "0-99"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT.format(packages=("matplotlib",)), "distill", *long, "--out", "run"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "seed 1, 100 labels, student distilled" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    done = report["seeds"]
    assert done[:1] == [0]
    assert report["complete"] is False
    assert f"minikd distill: interrupted. Complete: seed{'s' * (len(done) > 1)} {cli.seeds_in_words(done)}." in err
    assert f"To do: seeds {done[-1] + 1}-99, stopped at seed " in err
    assert "What is complete is in run." in err
    assert "student sees 100 labels" in out
    kd.load(tmp_path / "run" / "student.safetensors")
    files = [name for name in FILES if not name.endswith(".png")]
    assert sorted(os.listdir(tmp_path / "run")) == sorted([*files, "checkpoints"])


def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Experiment, "run", interrupt)
    monkeypatch.setattr(cli, "draw", interrupt)
    assert cli.main(["distill", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\nminikd distill: interrupted.\n"


@pytest.mark.skipif(os.name != "posix", reason="needs signals of POSIX")
def test_a_request_to_end_is_heeded_where_ctrl_c_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is in what a shell's script starts in the background."""
    asked = []

    def train(experiment: Any) -> None:
        asked.append(experiment)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the training goes on")

    monkeypatch.setattr(cli.Experiment, "run", train)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.main(["distill", *SMALL, "--quiet", "--out", str(tmp_path / "run")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(asked) == 1
    assert "minikd distill: interrupted." in capsys.readouterr().err


# --- where it writes to ---


def test_a_reader_who_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "minikd", "info"]
    process = subprocess.run(command, env=environment(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file that is always full")
def test_a_full_disk_under_the_output_is_said_in_words() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minikd", "info"]
        process = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.returncode == 2
    assert process.stderr == "minikd info: error: [Errno 28] No space left on device\n"


def test_an_encoding_without_our_characters_is_no_error(tmp_path: Path) -> None:
    process = minikd("distill", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert process.returncode == 0
    assert "T?" in process.stdout


def test_a_terminal_gets_bars_and_colours_that_end_with_the_same_table(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="needs rich: pip install 'minikd[cli]'")
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals, which this system lacks")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", WITHOUT.format(packages=("matplotlib",)), "distill", *SMALL, "--out", "run"]
    changes = {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(**changes), stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way of saying that the other side is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "all trainings" in text
    assert "━" in text
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"student distilled +\d+\.\d\d ± \d", plain)


# --- without the extras ---


def test_everything_works_with_numpy_and_cffi_alone(tmp_path: Path) -> None:
    process = minikd(
        "distill", *SMALL, "--out", "run", cwd=tmp_path, without=("rich", "matplotlib", "numba"), MINIKD_BACKEND=""
    )
    assert process.returncode == 0, process.stderr
    assert "student distilled" in process.stdout
    assert "pip install 'minikd[cli]' brings matplotlib" in process.stdout
    assert sorted(os.listdir(tmp_path / "run")) == sorted(name for name in FILES if not name.endswith(".png"))


def test_the_command_starts_without_the_extras_being_imported() -> None:
    code = "import sys, minikd.cli; print([m for m in ('rich', 'matplotlib', 'numba') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stderr


# --- help, version, info ---


def test_help_shows_an_example_and_every_setting_with_its_default(tmp_path: Path) -> None:
    process = minikd("distill", "--help", cwd=tmp_path)
    text = " ".join(process.stdout.split())
    assert process.returncode == 0
    assert "minikd distill --student 32 --temperature 4" in text
    for field in fields(Settings):
        assert cli.option_name(field.name) in text
        assert field.metadata["help"] in text
    for default in ("(default: digits)", "(default: 256-256)", "(default: 0-4)", f"(default: {Settings().lr:g})"):
        assert default in text


def test_help_of_the_whole_command_lists_every_subcommand(tmp_path: Path) -> None:
    for arguments in ([], ["--help"]):
        process = minikd(*arguments, cwd=tmp_path)
        assert process.returncode == 0
        assert "minikd distill\n" in process.stdout
        for name, command in cli.COMMANDS.items():
            assert name in process.stdout
            assert command.summary in " ".join(process.stdout.split())


@pytest.mark.parametrize("arguments", [["--version"], ["distill", "--version"]], ids=" ".join)
def test_the_version_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    process = minikd(*arguments, cwd=tmp_path)
    assert (process.returncode, process.stdout) == (0, f"minikd {kd.__version__}\n")


def test_an_unknown_command_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    refused(minikd("distil", cwd=tmp_path), "invalid choice: 'distil'", "distill", "info")


def test_info_tells_versions_backends_extras_and_data_sets(tmp_path: Path) -> None:
    process = minikd("info", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert not CONTROL.search(process.stdout)
    for words in (kd.__version__, np.__version__, "backends", "numpy", "numba", "extras", "digits", "1,797 rows"):
        assert words in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 80


def test_info_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    process = minikd("info", cwd=tmp_path, without=("numba",), MINIKD_BACKEND="")
    assert "pip install 'minikd[numba]'" in process.stdout


def test_errors_of_minikd_keep_their_type_when_they_name_an_option() -> None:
    original = kd.errors.ArgumentError("settings", "lr", expected="a", got="b", fix="c.")
    with (
        pytest.raises(MinikdError, match=r"minikd distill: --lr must be a, got b\. c\.") as caught,
        cli.naming({"lr": "--lr"}),
    ):
        raise original
    assert type(caught.value) is type(original)


def test_the_folder_for_the_results_can_stand_in_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    settings = ["seeds = [0]", "epochs = 1", "teacher_epochs = 1", "labels = 0", f'out = "{tmp_path / "mine"}"']
    config.write_text("\n".join(settings), "utf-8")
    done = minikd("distill", "--config", str(config), cwd=tmp_path, without=("matplotlib",))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "report.json").exists()
    assert "\nout =" not in (tmp_path / "mine" / "config.toml").read_text("utf-8")


def test_a_wrong_minikd_variable_is_named_and_info_still_answers(tmp_path: Path) -> None:
    for name in ("MINIKD_CPU", "MINIKD_NUM_THREADS", "MINIKD_BACKEND"):
        done = minikd("distill", cwd=tmp_path, **{name: "abacus"})
        assert done.returncode == 2
        assert name in done.stderr
        assert "abacus" in done.stderr
    done = minikd("info", cwd=tmp_path, MINIKD_BACKEND="abacus")
    assert done.returncode == 0, done.stderr
    assert "numpy" in done.stdout
