"""A training can be stopped at any moment, tells what it does, and says what went wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minikd as kd
from minikd import cli, schedules
from minikd.augmentation import Shift
from minikd.checkpoints import Checkpoint, Checkpoints
from minikd.data.batches import balanced_batches
from minikd.errors import ArgumentError, DivergenceError, ModelFormatError, OutputError, ShapeError
from minikd.nn import MLP
from minikd.objectives import HardLabels, Hints, SoftLabels
from minikd.peers import Peers
from minikd.training import Epoch, StepReport, Training, endless_batches, fit, outputs_by_layer

KILLS = int(os.environ.get("MINIKD_KILLS", "4"))  # of a run, at random moments; the long loop is 50


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and a teacher's logits of three overlapping clouds."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 150)
    x = (np.eye(3)[y] * 2 + rng.normal(size=(150, 3))).astype(np.float32)
    return x, y, (x * 1.5).astype(np.float32)


def network(seed: int = 0, **options: Any) -> MLP:
    return MLP([3, 8, 3], seed=seed, **options)


def weights(model: kd.nn.Module) -> list[bytes]:
    return [value.tobytes() for value in model.state_dict().values()]


class Stop(Exception):
    """What a test stops a training with."""


# --- stopping and going on ---

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hard labels alone": {"alone": True},
    "momentum, weight decay and norms": {"optimizer": "nesterov", "weight_decay": 1e-3, "max_norm": 1.0, "clip": 0.5},
    "schedules": {
        "objective": HardLabels(0.3, weight_schedule="warmup(0.5)")
        + SoftLabels(0.7, temperature_schedule="linear(1, 0.25)"),
    },
    "balanced": {"sampling": "balanced"},
    "early stopping": {"patience": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("every", "last"), [(0, 53), (7, 53), (3, 70)])  # 69 is one step before an epoch's end
def test_ten_epochs_equal_a_stop_and_the_rest_byte_for_byte(
    way: str, every: int, last: int, rows: Any, tmp_path: Any
) -> None:
    x, y, soft = rows
    options = {"epochs": 10, "batch_size": 16, "validation": (x[:50], y[:50]), **WAYS[way]}
    soft = None if options.pop("alone", False) else soft
    whole, stopped, resumed = (network(dropout=0.2) for _ in range(3))
    resumed.layers[0].weight.array[...] = 7  # which the state replaces
    expected = fit(whole, x, y, soft, **options)
    kept = Checkpoint(tmp_path / "state.safetensors", every=every)

    def stop(report: StepReport) -> None:
        if report.step >= last:
            raise Stop

    with pytest.raises(Stop):
        fit(stopped, x, y, soft, keeper=kept, on_step=stop, **options)
    again = fit(resumed, x, y, soft, keeper=Checkpoint(tmp_path / "state.safetensors", every=every), **options)
    assert weights(resumed) == weights(whole)
    assert json.dumps(again.history) == json.dumps(expected.history)


def test_a_finished_training_that_is_taken_up_takes_no_step_more(rows: Any, tmp_path: Path) -> None:
    x, y, soft = rows
    kept = Checkpoint(tmp_path / "state.safetensors")
    first, second, seen = network(), network(seed=1), []
    fit(first, x, y, soft, epochs=2, keeper=kept)
    fit(second, x, y, soft, epochs=2, keeper=kept, on_step=seen.append)
    assert weights(first) == weights(second)
    assert not seen


def test_checkpoints_come_after_each_epoch_or_every_so_many_steps(rows: Any) -> None:
    x, y, soft = rows

    class Notes:
        def __init__(self, every: int) -> None:
            self.every, self.steps = every, []

        def keep(self, tensors: Any, facts: Any) -> None:
            self.steps.append(facts["step"])

        def kept(self) -> None:
            return None

    for every, expected in ((0, [10, 20]), (4, [4, 8, 10, 12, 16, 20]), (15, [10, 15, 20])):
        notes = Notes(every)
        fit(network(), x, y, soft, epochs=2, batch_size=15, keeper=notes)
        assert notes.steps == expected


def test_shifted_images_are_taken_up_where_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 64)).astype(np.float32), rng.integers(0, 4, 60)
    options = {"epochs": 4, "batch_size": 20, "lr": 0.01}
    models = [MLP([64, 6, 4], seed=0) for _ in range(3)]
    fit(models[0], x, y, shift=Shift((8, 8), 2, seed=1), **options)
    path = tmp_path / "a.safetensors"

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(models[1], x, y, shift=Shift((8, 8), 2, seed=1), keeper=Checkpoint(path), on_epoch=stop, **options)
    fit(models[2], x, y, shift=Shift((8, 8), 2, seed=1), keeper=Checkpoint(path), **options)
    assert weights(models[0]) == weights(models[2])


def test_the_state_of_another_training_is_refused_and_changes_nothing(rows: Any) -> None:
    x, y, soft = rows
    state = Training(network(), x, y, soft, epochs=2).state()
    model = MLP([3, 9, 3])
    before = weights(model)
    with pytest.raises(ArgumentError, match="that of the same training"):
        Training(model, x, y, soft, epochs=2).restore(*state)
    assert weights(model) == before


def test_a_damaged_checkpoint_is_refused_with_its_name_and_what_to_do(rows: Any, tmp_path: Path) -> None:
    x, y, soft = rows
    path = tmp_path / "state.safetensors"
    fit(network(), x, y, soft, epochs=1, keeper=Checkpoint(path))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelFormatError, match=r"state\.safetensors must be a whole checkpoint.*Delete it"):
        fit(network(), x, y, soft, epochs=1, keeper=Checkpoint(path))


def test_a_checkpoint_of_another_run_is_refused_and_that_of_another_training_is_none(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, run="a")
    kept.training("seed 0, student").keep({"values": np.ones(3)}, {"step": 1})
    assert Checkpoints(tmp_path, run="a").training("seed 1, student").kept() is None
    with pytest.raises(ArgumentError, match="of the same settings and the same data"):
        Checkpoints(tmp_path, run="b").training("seed 0, student").kept()
    kept.finish("seed 0, student", {"values": np.ones(3)}, {"history": []})
    assert kept.finished("seed 0, student") is not None
    assert kept.training("seed 0, student").kept() is None, "the training that is finished is no longer under way"
    assert [path.name for path in tmp_path.iterdir()] == ["seed-0-student.safetensors"]
    kept.remove()
    assert not tmp_path.exists()


def test_a_wrong_number_of_steps_between_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="every must be a whole number of steps from 0, got -1"):
        Checkpoint(tmp_path / "a", every=-1)


# --- a command that is killed ---

QUICK = ["--teacher", "24", "--student", "6", "--teacher-epochs", "4", "--epochs", "6", "--labels", "50"]
QUICK += ["--seeds", "0-1", "--checkpoint-every", "5"]
# Without pictures, which take longer than such a run, so that kills fall into what is computed.
WITHOUT_PICTURES = "import sys; sys.modules['matplotlib'] = None; from minikd.cli import main; sys.exit(main())"
RUN = [sys.executable, "-c", WITHOUT_PICTURES, "distill", "--quiet"]
RESULTS = ("history.csv", "history.jsonl", "teacher.safetensors", "student.safetensors", "config.toml")


def command(*arguments: str, after: float | None = None) -> tuple[int, str]:
    """Run the command, killed after so many seconds; its exit status and what it said."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*RUN, *arguments], **pipes) as process:
        try:
            said = process.communicate(timeout=after)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
        return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing disturbed, and the seconds that it took."""
    folder, began = tmp_path_factory.mktemp("runs") / "whole", time.monotonic()
    assert command(*QUICK, "--out", str(folder)) == (0, "")
    return folder, time.monotonic() - began


def test_runs_that_are_killed_at_random_moments_end_with_the_same_bytes(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    """As many kills as KILLS says; a run that came to its end is compared, and another one is begun."""
    (undisturbed, seconds), moments, kills = whole, random.Random(7), 0
    while kills < KILLS:
        killed, status = tmp_path / f"killed-{kills}", -signal.SIGKILL
        while status == -signal.SIGKILL:
            begun = (killed / "config.toml").exists()
            arguments = ["--resume", str(killed)] if begun else [*QUICK, "--out", str(killed)]
            status, said = command(*arguments, after=moments.uniform(0.3, 1.0) * seconds if kills < KILLS else None)
            kills += status == -signal.SIGKILL
        assert status == 0 or "one that is complete" in said, said
        assert_same_run(killed, undisturbed)
        seconds *= 0.9  # it came to its end before it was killed: the moments were too late


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two folders hold the same files with the same bytes; reports may differ in the seconds that were taken."""
    for name in RESULTS:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ours, theirs)]
    assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())


def test_resuming_refuses_settings_beside_it_and_folders_without_a_stopped_run(
    whole: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = str(whole[0])
    for arguments, message in (
        (["--resume", complete, "--lr", "1"], "--lr must be left out beside --resume"),
        (["--resume", complete], "got one that is complete"),
        (["--resume", str(tmp_path / "none")], "one without config.toml"),
    ):
        assert cli.main(["distill", "--quiet", *arguments]) == 2
        assert message in capsys.readouterr().err


# --- what it tells ---


def test_every_step_and_every_epoch_is_told_with_the_history(rows: Any) -> None:
    x, y, soft = rows
    steps: list[StepReport] = []
    epochs: list[Epoch] = []
    training = fit(
        network(), x, y, soft, epochs=3, batch_size=50, validation=(x, y), on_step=steps.append, on_epoch=epochs.append
    )
    assert [report.step for report in steps] == list(range(1, 10))
    finished = [epoch for epoch in epochs if epoch.finished]
    assert [epoch.epoch for epoch in finished] == [1, 2, 3]
    assert finished[0].loss == np.mean([report.loss for report in steps[:3]])
    assert [row["validation_accuracy"] for row in training.history] == [e.validation["accuracy"] for e in finished]
    terms = finished[-1].terms
    assert [t.term for t in terms] == ["HardLabels", "SoftLabels"]
    assert sum(t.share for t in terms) == pytest.approx(1)


def test_measuring_the_terms_leaves_the_training_as_it_is(rows: Any) -> None:
    """With dropout, whose masks depend on a counter: two terms that are measured against one, fused by hand."""
    x, y, soft = rows
    measured, plain = network(dropout=0.3), network(dropout=0.3)
    fit(measured, x, y, soft, epochs=3, objective=HardLabels(1.0) + SoftLabels(0.0))
    fit(plain, x, y, None, epochs=3)
    for ours, theirs in zip(measured.state_dict().values(), plain.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


# --- early stopping ---


def test_early_stopping_goes_back_to_the_best_epoch(rows: Any) -> None:
    x, y, soft = rows
    validation = (x[:60], np.roll(y[:60], 1))  # labels that nobody can learn
    model = network()
    training = fit(model, x, y, soft, epochs=50, lr=0.05, validation=validation, patience=4)
    assert training.stopped_early
    figures = [(row["validation_accuracy"], -row["validation_nll"]) for row in training.history]
    best = figures.index(max(figures))
    assert len(figures) == best + 5
    scores = model.logits(validation[0], normalised=True)
    assert kd.metrics.accuracy(scores, validation[1]) == figures[best][0]
    assert -kd.metrics.negative_log_likelihood(scores, validation[1]) == figures[best][1]


def test_early_stopping_without_a_validation_part_is_refused(rows: Any) -> None:
    x, y, soft = rows
    with pytest.raises(ArgumentError, match="validation must be there for early stopping"):
        fit(network(), x, y, soft, patience=2)


# --- the guard against NaN ---


def test_a_training_that_diverges_names_step_term_and_layer_and_keeps_the_weights_from_before(rows: Any) -> None:
    x, y, soft = rows
    losses: list[float] = []
    model = network()
    with pytest.raises(DivergenceError, match=r"step \d+ \(epoch 1 of 20\) must be finite.*layer") as caught:
        fit(model, x, y, soft, epochs=20, lr=1e30, on_step=lambda report: losses.append(report.loss))
    assert "HardLabels" in str(caught.value)
    assert all(np.isfinite(value).all() for value in model.state_dict().values())


def test_the_last_good_checkpoint_stays_when_a_training_diverges(rows: Any, tmp_path: Path) -> None:
    x, y, soft = rows
    kept = Checkpoint(tmp_path / "state.safetensors")
    bad = soft.copy()

    def spoil(epoch: Epoch) -> None:
        if epoch.finished and epoch.epoch == 2:
            model.layers[0].weight.array[...] = np.nan

    model = network()
    with pytest.raises(DivergenceError):
        fit(model, x, y, bad, epochs=5, keeper=kept, on_epoch=spoil)
    found = kept.kept()
    assert found is not None
    assert np.isfinite(found[0]["values"]).all()


def test_features_that_are_not_finite_are_named_by_their_row(rows: Any) -> None:
    x, y, soft = rows
    x = x.copy()
    x[17, 1] = np.nan
    with pytest.raises(DivergenceError, match="row 17 of the features is not finite"):
        fit(network(), x, y, soft, epochs=1)


# --- which rows ---


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 3), st.integers(0, 12), st.integers(0, 9))
def test_batches_from_a_number_on_are_those_of_the_whole_stream(
    c: int, n: int, seed: int, start: int, size: int
) -> None:
    rows = np.arange(100, 100 + n)
    classes = np.arange(n) % c
    for kinds in (None, classes):
        whole = endless_batches(rows, size + 1, seed, 0, kinds)
        for _ in range(start):
            next(whole)
        later = endless_batches(rows, size + 1, seed, start, kinds)
        for _ in range(3):
            assert np.array_equal(next(whole), next(later))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=50)
def test_balanced_batches_hold_each_class_equally_often_and_each_row_of_a_class(
    labels: Any, size: int, seed: int
) -> None:
    classes = np.array(labels)
    kinds, counts = np.unique(classes, return_counts=True)
    stream = balanced_batches(classes, size, seed=seed)
    seen = np.concatenate([next(stream) for _ in range(2 * len(kinds) * max(counts))])
    taken = np.array([(classes[seen] == k).sum() for k in kinds])
    assert taken.max() - taken.min() <= 1
    for k, count in zip(kinds, counts, strict=True):
        own = seen[classes[seen] == k]
        assert len(set(own[:count].tolist())) == min(count, len(own))


# --- peers ---


def test_peers_learn_from_the_labels_and_from_one_another(rows: Any) -> None:
    x, y, _ = rows
    large, small = MLP([3, 16, 3], seed=1), network()
    objective = HardLabels() + SoftLabels(temperature=1)
    training = fit(Peers((large, small)), x, y, objective=objective, epochs=30, validation=(x, y))
    assert kd.metrics.accuracy(small.logits(x), y) > 0.7
    assert kd.metrics.accuracy(large.logits(x), y) > 0.7
    assert training.history[-1]["validation_accuracy"] == kd.metrics.accuracy(small.logits(x), y)


def test_each_peer_takes_the_step_that_it_would_take_with_the_other_as_its_teacher(rows: Any) -> None:
    x, y, _ = rows
    large, small = MLP([3, 16, 3], seed=1), network()
    said = large.logits(x)
    alone = network()
    objective = HardLabels(0.4) + SoftLabels(0.6, temperature=2)
    options = {"epochs": 1, "batch_size": len(x), "optimizer": "sgd", "objective": objective}
    fit(Peers((large, small)), x, y, **options)
    fit(alone, x, y, said, **options)
    for ours, theirs in zip(small.state_dict().values(), alone.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_one_network_alone_has_no_peers() -> None:
    with pytest.raises(ArgumentError, match="two networks at least"):
        Peers((network(),))


# --- images ---


def test_what_comes_in_at_the_edges_of_a_shifted_image_is_black() -> None:
    data = kd.data.load("digits")
    shift = Shift.of(data, 2, seed=0).train()
    moved = np.concatenate([np.asarray(shift(data.x_train[:64])) for _ in range(4)])
    raw = data.raw(moved).reshape(-1, 8, 8)
    original = data.raw(data.x_train[:64]).reshape(-1, 8, 8)
    assert raw.min() == pytest.approx(0, abs=1e-4)
    assert any(np.allclose(raw[k, 1:], original[k, :-1], atol=1e-4) for k in range(64)), "some moved down by one"
    assert np.array_equal(np.asarray(shift.eval()(data.x_train[:5])), data.x_train[:5])


def test_rows_that_are_no_images_are_not_shifted() -> None:
    rng = np.random.default_rng(0)
    data = kd.data.load((rng.normal(size=(60, 5)), np.arange(60) % 2))
    with pytest.raises(ShapeError, match="shift must be 0 for data without images"):
        Shift.of(data, 1, seed=0)
    with pytest.raises(ArgumentError, match="below the images' smaller side, 8 pixels"):
        Shift.of(kd.data.load("digits"), 8, seed=0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints").training("a")


# --- what is refused before anything is trained, and what is said of a step that spoils the weights ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": SoftLabels()}, "teacher_logits must be there for an objective that compares with a teacher"),
        ({"objective": Hints(pairs=(("0", "0"),))}, "teacher_features must be the teacher's layers .*, got none of 0"),
        ({"sampling": "random"}, "sampling must be one of shuffled, balanced, got 'random'"),
        ({"patience": 3}, "validation must be there for early stopping, got None"),
    ],
)
def test_what_a_training_needs_and_was_not_given_is_refused(options: dict[str, Any], words: str, rows: Any) -> None:
    with pytest.raises(ArgumentError, match=words):
        fit(network(), *rows[:2], epochs=1, **options)


def test_a_training_without_a_teacher_needs_a_label_and_rows_need_one_another(rows: Any) -> None:
    x, y, soft = rows
    with pytest.raises(ArgumentError, match="y must be at least one label where there is no teacher, got none"):
        fit(network(), x, np.full_like(y, -1), epochs=1)
    with pytest.raises(ShapeError, match="x, y and teacher_logits must be of the same length, got 150 and 150 and 149"):
        fit(network(), x, y, soft[:-1], epochs=1)


def test_a_step_that_is_too_large_is_said_to_be_with_the_parameter_that_it_spoils(rows: Any) -> None:
    x, y, _ = rows
    with pytest.raises(DivergenceError, match="the step itself is too large, first in the parameter") as caught:
        fit(network(), 100 * x, y, epochs=2, optimizer="sgd", lr=3e38, schedule="constant")
    assert "weights that are not finite" in str(caught.value)


def test_each_layer_of_each_peer_is_looked_at_and_a_module_of_ones_own_as_a_whole(rows: Any) -> None:
    class Own(kd.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    x, own = rows[0][:5], Own()
    found = outputs_by_layer(Peers([network(1), network(2)]), x)
    assert len({name.split(".")[0] for name in found}) == 2
    assert all(len(array) == 5 for array in found.values())
    assert list(outputs_by_layer(own, x)) == ["the last"]
    assert own.training


# --- schedules ---


def test_a_product_of_schedules_is_the_product_of_their_factors_and_a_text_of_both() -> None:
    both = schedules.parse("warmup(0.5) * step(0.1, 0.25)")
    first, second = schedules.Warmup(0.5), schedules.Step(0.1, 0.25)
    for progress in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert both(progress) == first(progress) * second(progress)
    assert str(both) == f"{first} * {second}"
    assert str(schedules.parse(str(both))) == str(both)
    assert second(0.8) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("2", "a schedule, got '2'"),
        ("warmup(2)", r"share must be a share of the training in \(0, 1\], got 2"),
        ("step(0.5, 0)", r"every must be a share of the training in \(0, 1\], got 0"),
        ("linear(-1, 1)", "a schedule of finite factors from 0, got one that gives -1"),
        (3, "a function of progress or its text, got 3"),
        ("warmup", "got warmup without its brackets. Did you mean warmup"),
        ("cosin()", r"got the unknown name cosin. Did you mean cosine\(\)"),
        ("xyz()", "got the unknown name xyz. Write, for example"),
        ("cosine(", r"got 'cosine\('"),
        ("cosine(1, 2, 3, 4, 5)", "cosine"),
        ("'a' * 3", "str is no factor"),
        ("cosine(" + "1" * 10_000 + ")", "10,008 characters"),
    ],
)
def test_what_is_no_schedule_is_refused_in_words(value: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        schedules.as_schedule("a test", "schedule", value)
    assert schedules.as_schedule("a test", "schedule", "") is None
