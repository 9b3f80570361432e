"""What an objective's terms weigh on a batch agrees with the formulas, and warnings come where they are deserved."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikd import cli
from minikd import functional as F
from minikd.data import load
from minikd.distillation import Experiment, Settings
from minikd.errors import ArgumentError
from minikd.nn import MLP, Module
from minikd.objectives import HardLabels, Objective, SoftLabels, parse
from minikd.peers import Peers
from minikd.report.weighing import accuracies_in_words, angles_in_words, formulas_table, weighing_table
from minikd.training import Training, fit
from minikd.weighing import Weighing, warnings_of, weigh, weigh_first_epoch, weigh_training

ROWS, FEATURES, CLASSES = 12, 4, 3


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and a teacher's logits that know a little of the labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, ROWS)
    x = rng.normal(size=(ROWS, FEATURES))
    return x, y, 2 * np.eye(CLASSES)[y] + rng.normal(size=(ROWS, CLASSES))


def linear(seed: int = 0) -> MLP:
    """A linear softmax model in float64."""
    return MLP([FEATURES, CLASSES], seed=seed, dtype=np.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gradient(g: np.ndarray, x: np.ndarray) -> np.ndarray:
    """That of a linear model's weights and bias, from that of its logits g (n, c)."""
    return np.concatenate([(g.T @ x).ravel(), g.sum(axis=0)])


def weighed(objective: Objective | str, **options: Any) -> Weighing:
    x, y, z = batch()
    text = objective if isinstance(objective, Objective) else parse(objective)
    return weigh(linear(), text, x, y, z, **options)


# --- the figures ---


@given(
    st.integers(0, 99),
    st.floats(0.5, 20),
    st.floats(0.01, 5),
    st.floats(0.01, 5),
    st.integers(0, ROWS - 1),
    st.booleans(),
)
@settings(max_examples=15)
def test_figures_are_those_of_the_formulas(
    seed: int, t: float, hard: float, soft: float, unlabelled: int, scale_t2: bool
) -> None:
    x, y, z_t = batch(seed)
    y[:unlabelled] = -1
    model = linear(seed)
    w, b = (p.numpy() for p in model.parameters())
    z = x @ w.T + b
    known, t2 = y != -1, t**2 if scale_t2 else 1.0
    p, q, p_1 = softmax(z / t), softmax(z_t / t), softmax(z)
    one_hot = np.eye(CLASSES)[y] * known[:, None]
    by_labels = gradient(hard * (p_1 * known[:, None] - one_hot) / known.sum(), x)
    by_teacher = gradient(soft * t2 / t * (p - q) / ROWS, x)
    norms = np.array([np.linalg.norm(by_labels), np.linalg.norm(by_teacher)])
    cosine = by_labels @ by_teacher / norms.prod()

    objective = HardLabels(hard) + SoftLabels(soft, temperature=t, scale_t2=scale_t2)
    found = weigh(model, objective, x, y, z_t)
    first, second = found.terms

    assert (first.name, second.name) == ("HardLabels", "SoftLabels")
    assert first.formula == HardLabels.formula
    assert (first.temperature, second.temperature) == (None, t)
    assert (first.scale_t2, second.scale_t2) == (None, scale_t2)
    assert (found.rows, found.labelled) == (ROWS, ROWS - unlabelled)
    np.testing.assert_allclose([first.coefficient, second.coefficient], [hard, soft * t2], rtol=1e-12)
    np.testing.assert_allclose(first.value, -hard * np.log(p_1[known, y[known]]).mean(), rtol=1e-9)
    np.testing.assert_allclose(second.value, soft * t2 * (q * np.log(q / p)).sum(axis=1).mean(), rtol=1e-9)
    np.testing.assert_allclose([first.gradient_norm, second.gradient_norm], norms, rtol=1e-9)
    np.testing.assert_allclose([first.share, second.share], norms / norms.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.cos(np.radians(found.angle)), cosine, rtol=0, atol=1e-9)


def test_gradients_that_are_the_same_are_0_degrees_apart() -> None:
    x, y, _ = batch()
    found = weigh(linear(), HardLabels(0.2) + SoftLabels(3.0, temperature=1.0), x, y, 800 * np.eye(CLASSES)[y])
    assert found.angle == pytest.approx(0, abs=1e-6)


def test_gradients_that_are_opposite_are_180_degrees_apart() -> None:
    x, y, _ = batch()
    y = y % 2
    model = MLP([FEATURES, 2], dtype=np.float64)
    model.load_state_dict({name: np.zeros_like(value) for name, value in model.state_dict().items()})
    found = weigh(model, HardLabels() + SoftLabels(temperature=1.0), x, y, 800 * np.eye(2)[1 - y])
    assert found.angle == pytest.approx(180, abs=1e-6)


@pytest.mark.parametrize("text", ["HardLabels()", "SoftLabels()", "HardLabels(0) + SoftLabels()"])
def test_there_is_no_angle_where_one_side_has_no_gradient(text: str) -> None:
    found = weighed(text)
    assert found.angle is None
    assert angles_in_words([found]) == ""


def test_the_angle_is_that_of_all_hard_and_all_soft_terms_together() -> None:
    one = weighed("HardLabels(0.5) + SoftLabels(2)")
    several = weighed("SoftLabels(1.5) + HardLabels(0.25) + SoftLabels(0.5) + HardLabels(0.25)")
    assert several.angle == pytest.approx(one.angle)
    assert [term.name for term in several.terms] == ["SoftLabels", "HardLabels", "SoftLabels#2", "HardLabels#2"]
    assert sum(term.share for term in several.terms) == pytest.approx(1)


def test_schedules_are_at_the_progress_that_is_asked_for() -> None:
    text = "HardLabels(0.5, weight_schedule='linear(1, 0)') + SoftLabels(2, temperature_schedule='linear(1, 0.25)')"
    begin, end = weighed(text), weighed(text, progress=1.0)
    assert [term.coefficient for term in begin.terms] == [0.5, 2 * 16]
    assert [term.coefficient for term in end.terms] == [0, 2]
    assert [term.temperature for term in end.terms] == [None, 1]
    assert (end.terms[0].value, end.terms[0].share, end.terms[1].share) == (0, 0, 1)


def test_every_term_sees_the_same_dropout_mask() -> None:
    x, y, z = batch()
    model = MLP([FEATURES, 16, CLASSES], dropout=0.5, dtype=np.float64)
    first, second = weigh(model, HardLabels() + HardLabels(), x, y, z).terms
    assert (first.value, first.gradient_norm) == (second.value, second.gradient_norm)
    assert first.value != weigh(MLP([FEATURES, 16, CLASSES], dtype=np.float64), HardLabels(), x, y).terms[0].value


def test_weighing_changes_neither_the_model_nor_the_objective() -> None:
    x, y, z = batch()
    model = MLP([FEATURES, 8, CLASSES], dropout=0.5).eval()
    objective = parse("HardLabels(0.3) + Hints(2, pairs=(('1', 'teacher'),))")
    before, counters = model.state_dict(), copy.deepcopy(model.counters())
    found = weigh(model, objective, x, y, z, teacher_features={"teacher": np.ones((ROWS, 5))})
    assert found.terms[1].gradient_norm > 0
    assert not model.training
    assert model.counters() == counters
    assert objective.parameters() == []
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_networks_that_learn_together_are_weighed_together() -> None:
    x, y, _ = batch()
    peers = Peers((linear(1), linear(2)))
    found = weigh(peers, HardLabels(0.5) + SoftLabels(0.5), x, y)
    assert found.networks == 2
    alone = [weigh(linear(seed), HardLabels(0.5), x, y).terms[0] for seed in (1, 2)]
    assert found.terms[0].value == pytest.approx(sum(term.value for term in alone))
    assert found.terms[0].gradient_norm == pytest.approx(np.hypot(*(term.gradient_norm for term in alone)))
    assert "2 networks together" in weighing_table([found]).rows[0][0]


def test_a_missing_teacher_is_refused_in_words() -> None:
    x, y, _ = batch()
    with pytest.raises(ArgumentError, match="Give a teacher"):
        weigh(linear(), HardLabels() + SoftLabels(), x, y)


# --- the beginning of a training ---


def training(objective: str, **options: Any) -> Training:
    x, y, z = batch()
    return Training(MLP([FEATURES, 8, CLASSES]), x, y, z, objective=parse(objective), batch_size=5, **options)


def test_the_first_batch_is_weighed_before_training_and_after_one_epoch() -> None:
    text = "HardLabels(0.5, weight_schedule='linear(1, 0)') + SoftLabels(0.5)"
    one = training(text, epochs=4)
    (before, after), trouble = weigh_first_epoch(one)
    assert trouble == []
    assert (before.moment, after.moment) == ("before training", "after one epoch")
    assert (before.rows, one.step) == (5, 3)
    assert after.terms[0].weight == pytest.approx(0.5 * (1 - 2 / 11))
    assert before.terms[1].value != after.terms[1].value
    fresh = training(text, epochs=4)
    assert weigh_training(fresh, fresh.first_rows(), "before training") == before


def test_a_training_that_takes_its_epochs_one_by_one_ends_with_the_same_bits() -> None:
    text = "HardLabels(0.5, weight_schedule='linear(1, 0)') + SoftLabels(0.5)"
    at_once, by_one = training(text, epochs=3).run(), training(text, epochs=3)
    for _ in range(3):
        by_one.run(epochs=1)
    assert by_one.step == by_one.steps
    assert by_one.history == at_once.history
    for a, b in zip(at_once.model.parameters(), by_one.model.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_an_epoch_that_diverges_is_trouble_in_words_and_no_error() -> None:
    weighings, trouble = weigh_first_epoch(training("HardLabels()", epochs=2, optimizer="sgd", lr=1e38))
    assert len(weighings) == 1
    assert "must be finite" in trouble[0]


SMALL = {"teacher": (16,), "teacher_epochs": 2, "student": (8,), "epochs": 2, "seeds": (3,), "labels": 0}


@pytest.mark.parametrize("changes", [{}, {"assistants": "12"}, {"mode": "online"}, {"dropout": 0.2}], ids=str)
def test_a_rehearsed_student_is_the_one_that_the_experiment_trains(changes: dict[str, Any]) -> None:
    chosen = Settings(**(SMALL | changes))
    data = load("digits")
    whole = Experiment(chosen, dataset=data)
    whole.run()
    model = Experiment(chosen, dataset=data).rehearse(3).training.run().model
    student = model.members[-1] if isinstance(model, Peers) else model
    for a, b in zip(student.parameters(), whole.result().student.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_rehearsal_measures_who_teaches_and_the_student_alone() -> None:
    data = load("digits")
    known = {"objective": HardLabels(), "epochs": 2, "batch_size": 64, "seed": 3}

    def accuracy(model: Module, lr: float) -> float:
        fit(model, data.x_train, data.y_train, lr=lr, **known)
        right = model.logits(data.x_validation).argmax(axis=1) == data.y_validation
        return float(right.mean())

    found = Experiment(Settings(**SMALL), dataset=data).rehearse(3)
    assert found.teacher == "teacher"
    assert found.teacher_accuracy == accuracy(MLP([64, 16, 10], dropout=0.3, seed=3), 0.002)
    assert found.alone_accuracy == accuracy(MLP([64, 8, 10], seed=3), 0.003)
    assert Experiment(Settings(**SMALL, assistants="12, 10"), dataset=data).rehearse(3).teacher == "assistant 2"
    assert Experiment(Settings(**SMALL, mode="online"), dataset=data).rehearse(3).teacher_accuracy is None


# --- warnings ---


def test_usual_weights_give_no_warning() -> None:
    assert warnings_of(weighed("HardLabels(0.5) + SoftLabels(0.5)"), teacher_accuracy=0.9, student_accuracy=0.9) == []


@pytest.mark.parametrize("text", ["SoftLabels()", "HardLabels(0) + SoftLabels()", "HardLabels() + SoftLabels(0)"])
def test_a_term_that_is_alone_or_has_a_weight_of_0_gives_no_warning(text: str) -> None:
    assert warnings_of(weighed(text)) == []


def number_after(words: str, sentence: str) -> float:
    found = re.search(re.escape(words) + r"([\d.e+-]+)", sentence)
    assert found, sentence
    return float(found[1])


def test_a_term_over_99_percent_is_warned_of_with_a_weight_that_leaves_it_half() -> None:
    (said,) = warnings_of(weighed("HardLabels(0.5) + SoftLabels(1e-4)", moment="before training"))
    assert re.match(r"HardLabels has 99\.\d* % of the gradient before training, so that SoftLabels hardly counts", said)
    better = number_after("(about ", said)
    assert weighed(f"HardLabels({better}) + SoftLabels(1e-4)").terms[0].share == pytest.approx(0.5, abs=0.05)


def test_a_term_under_1_percent_is_warned_of_with_a_weight_that_gives_it_a_tenth() -> None:
    text = "HardLabels(0.5) + SoftLabels({}) + LogitRegression(0.5)"
    (said,) = warnings_of(weighed(text.format(1e-4)))
    assert re.match(r"SoftLabels has 0\.\d* % of the gradient, so that it hardly counts", said)
    better = number_after("(about ", said)
    assert weighed(text.format(better)).terms[1].share == pytest.approx(0.1, abs=0.01)


def test_a_share_that_stands_out_twice_is_told_once_with_both_moments() -> None:
    text = "HardLabels(0.5) + SoftLabels(1e-4)"
    (said,) = warnings_of(weighed(text, moment="before training"), weighed(text, moment="after one epoch"))
    assert re.search(r"% of the gradient before training and 99\.\d* % after one epoch, so", said)


def test_a_gradient_of_0_is_told_apart_from_a_weight_that_is_too_low() -> None:
    x, y, _ = batch()
    model = linear()
    z = model(x).numpy()
    (said,) = warnings_of(weigh(model, HardLabels() + SoftLabels(), x, y, z))
    assert said.startswith("HardLabels has 100 % of the gradient")
    assert "No weight mends a gradient of 0" in said
    (said,) = warnings_of(weigh(model, parse("HardLabels() + SoftLabels() + TeacherFree()"), x, y, z))
    assert said.startswith("SoftLabels has 0 % of the gradient")
    assert "No weight mends a gradient of 0" in said


def test_probabilities_of_a_teacher_are_warned_of() -> None:
    x, y, z = batch()
    found = weigh(linear(), HardLabels() + SoftLabels(temperature=1.0), x, y, softmax(z))
    assert found.probabilities == ("teacher",)
    (said,) = warnings_of(found)
    assert said.startswith("The teacher's logits look like probabilities")
    assert "gives='probabilities'" in said
    assert warnings_of(weigh(linear(), HardLabels() + SoftLabels(temperature=1.0), x, y, np.log(softmax(z)))) == []


class EndsWithSoftmax(Module):
    """A student that makes the usual mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Any) -> Any:
        return F.softmax(self.inner(x))


def test_a_student_that_ends_with_a_softmax_is_warned_of() -> None:
    x, y, z = batch()
    said = warnings_of(weigh(EndsWithSoftmax(), HardLabels() + SoftLabels(), x, y, z))
    assert said[0].startswith("The student's logits look like probabilities")
    assert "without a softmax" in said[0]


@pytest.mark.parametrize("kind", ["SoftLabels", "ReverseKL", "JensenShannon", "TeacherFree"])
def test_a_temperature_without_t2_is_warned_of_with_the_factor_that_is_missing(kind: str) -> None:
    text = f"{kind}(64, temperature=8, scale_t2={{}}) + HardLabels(0.5)"
    said = [sentence for sentence in warnings_of(weighed(text.format(False))) if "factor T²" in sentence]
    assert len(said) == 1
    factor = number_after("multiply its weight by ", said[0].rstrip("."))
    mended = weighed(text.replace("64", str(64 * factor)).format(False)).terms[0]
    assert mended.gradient_norm == pytest.approx(weighed(text.format(True)).terms[0].gradient_norm)
    assert not [sentence for sentence in warnings_of(weighed(text.format(True))) if "factor T²" in sentence]
    assert "without T²" in formulas_table(weighed(text.format(False))).rows[0][1]


@pytest.mark.parametrize("text", ["SoftLabels(temperature=1, scale_t2=False)", "TotalVariation(temperature=4)"])
def test_a_factor_t2_that_changes_nothing_or_is_not_in_the_formula_is_not_missed(text: str) -> None:
    assert warnings_of(weighed(text)) == []


def test_a_term_that_is_infinite_is_warned_of() -> None:
    x, y, z = batch()
    z[0, 0] = -np.inf
    found = weigh(linear(), parse("HardLabels() + ReverseKL()"), x, y, z)
    said = warnings_of(found)
    assert len(said) == 1
    assert said[0].startswith("ReverseKL is inf")
    assert weighing_table([found]).rows[1][-1] == "–"
    assert warnings_of(weigh(linear(), HardLabels() + SoftLabels(), x, y, z)) == []


def test_a_teacher_that_is_worse_than_the_student_is_warned_of() -> None:
    found = weighed("HardLabels() + SoftLabels()")
    (said,) = warnings_of(found, teacher_accuracy=0.8, student_accuracy=0.805, teacher="assistant 1")
    assert said.startswith("The assistant 1 is right in 80.0 % of the rows and the student without it in 80.5 %")
    assert "teacher_epochs" in said
    for known in ({"teacher_accuracy": 0.8}, {"student_accuracy": 0.8}, {}):
        assert warnings_of(found, **known) == []


# --- in words ---


def test_the_table_shows_how_coefficients_come_about() -> None:
    table = weighing_table([weighed("HardLabels(0.5) + SoftLabels(0.25)", moment="before training")])
    assert table.rows[0] == ("before training, first batch: 12 rows",)
    assert [row[:2] for row in table.rows[1:]] == [("HardLabels", "0.5"), ("SoftLabels", "0.25·4² = 4")]
    assert accuracies_in_words({"teacher": None, "student alone": None}) == ""


# --- the command ---

QUICK = ["--teacher", "16", "--teacher-epochs", "4", "--student", "8", "--epochs", "2", "--seeds", "0-2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["explain", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_default_settings_show_both_moments_and_nothing_stands_out(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys)
    for words in (
        "64-256-256-10",
        "HardLabels CE(y, softmax(z_s))",
        "before training, first batch: 64 rows HardLabels 0.5 ",
        "after one epoch, first batch: 64 rows HardLabels 0.5 ",
        "SoftLabels 0.5·4² = 8 ",
        "° apart before training and ",
        "Accuracy on the validation part: teacher 9",
        "student alone 9",
    ):
        assert words in said
    assert said.endswith("Nothing stands out.")


def test_settings_come_from_the_file_and_options_win(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terms = "HardLabels(0.1, weight_schedule='warmup(0.5)') + ReverseKL(0.9, temperature=2) + SoftLabels(1e-5)"
    Path("mine.toml").write_text(f'objective = "{terms}"\ntemperature = 3\nlabels = 7\nout = "nowhere"\n')
    said = run(capsys, "mine.toml", *QUICK)
    assert "ReverseKL 0.9·2² = 3.6" in said
    assert "HardLabels 0 0 0 0 " in said  # a warmup begins with 0
    assert "Warning: SoftLabels has 0.0" in said
    Path("mine.toml").write_text("temperature = 3\ngenerations = 2\n")
    assert "SoftLabels 0.5·3² = 4.5" in run(capsys, "mine.toml", *QUICK)
    assert "SoftLabels 0.5·6² = 18" in run(capsys, "mine.toml", *QUICK, "--temperature", "6")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.filterwarnings("default:.*look like probabilities")  # the teacher says so by itself, too
def test_a_table_of_probabilities_that_calls_them_logits_and_knows_nothing_is_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = softmax(np.random.default_rng(0).normal(size=(1797, 10)))
    np.savez(tmp_path / "teacher.npz", logits=table)
    said = run(capsys, "--quiet", *QUICK, "--teacher", str(tmp_path / "teacher.npz"))
    assert said.count("Warning: ") == 2
    assert "Warning: The teacher's logits look like probabilities" in said
    assert "Warning: The teacher is right in" in said


def test_a_missing_t2_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, *QUICK, "--objective", "HardLabels(0.5) + SoftLabels(0.5, temperature=4, scale_t2=False)")
    assert "SoftLabels has a temperature of 4 and no factor T², so its gradient is only 1/T² = 1/16" in said


def test_online_both_networks_are_weighed(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, *QUICK, "--mode", "online")
    assert "first batch: 64 rows, 2 networks together" in said
    assert "validation part: student alone" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "nowhere.toml must be a TOML file that can be read"),
        (["--temperature", "0"], "minikd explain: error: --temperature must be a finite number above 0, got 0.0."),
        (["--data", "nowhere.csv"], "minikd explain: error: --data must be"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", *arguments]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert message in said


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "usage: minikd explain [CONFIG.toml] [options]" in said
    assert "minikd explain runs/mine/config.toml --temperature 20" in said
    assert "--soft-schedule" in said
