"""Teacher to student: the training loop, and the paired experiment that says whether distillation helped.

An `Experiment` trains, for each seed, a teacher, then in each situation the same small student twice from the same
initial weights, in the same order of batches and with the same number of steps: once alone on its labels, once with
the teacher's soft labels. What differs between the two is the distillation and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import minikd
from minikd import functional as F
from minikd import metrics
from minikd.bias import correct_bias
from minikd.data import Dataset, batches, load
from minikd.errors import ArgumentError, ShapeError
from minikd.kernels import BACKENDS, as_index, current_backend, use_backend
from minikd.kernels.threads import blas_threads_for
from minikd.nn import MLP, ROWS_AT_A_TIME, Module
from minikd.ops.elementwise import ACTIVATIONS
from minikd.optim import OPTIMIZERS, SCHEDULES, Optimizer
from minikd.steps import Step, compile

__all__ = ["DistillResult", "Experiment", "Progress", "Settings", "compare", "distill", "fit", "full_sizes"]

UNLABELLED = -1  # the class id of a row without a label in a data set
SECONDS_BETWEEN_REPORTS = 0.1


# --- what a run depends on ---


def option(default: Any, text: str) -> Any:
    """One setting: its default and the sentence that --help and the configuration file print."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that one run depends on; the defaults were chosen on the validation part (see bench/README.md)."""

    data: str = option("digits", "built-in name (digits, fashion-mnist), folder of IDX files, .npz or .csv file")
    label_column: str = option("label", "name of the label column of a CSV file")
    teacher: tuple[int, ...] = option((256, 256), "hidden layers of the teacher")
    teacher_epochs: int = option(40, "passes of the teacher over the training part")
    teacher_dropout: float = option(0.3, "probability of dropping a hidden unit of the teacher")
    teacher_input_dropout: float = option(0.0, "probability of dropping an input of the teacher")
    teacher_max_norm: float = option(0.0, "largest L2 norm of the weights into one unit of the teacher; 0 for none")
    teacher_lr: float = option(0.002, "learning rate of the teacher at its start")
    student: tuple[int, ...] = option((16,), "hidden layers of the student")
    activation: str = option("relu", "relu, gelu, tanh or sigmoid, in both networks")
    temperature: float = option(4.0, "softens teacher and student in the soft term; above 0")
    hard_weight: float = option(0.5, "weight of the cross-entropy with the labels")
    soft_weight: float = option(0.5, "weight of T²·KL(teacher ‖ student)")
    labels: int = option(100, "rows that are labelled for the student in the second situation; 0 leaves it out")
    epochs: int = option(60, "passes of the student over the training part")
    batch_size: int = option(64, "rows in a batch; the default is lowered where there are fewer than 1,024 rows")
    optimizer: str = option("adam", "sgd, nesterov (both with momentum 0.9), adam or adamw")
    lr: float = option(0.003, "learning rate of the student at its start")
    schedule: str = option("cosine", "of the learning rate: constant, step or cosine")
    weight_decay: float = option(0.0, "weight decay of the student; 0 leaves adamw its own 0.01")
    max_norm: float = option(0.0, "largest L2 norm of the weights into one unit of the student; 0 for none")
    dropout: float = option(0.0, "probability of dropping a hidden unit of the student")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "one paired comparison for each")
    split_seed: int = option(0, "of the division into training, validation and test part")
    backend: str = option("", "c, numba or numpy; empty for the best that runs here")

    def check(self) -> None:
        """Refuse a setting outside its range, with an ArgumentError that names it."""
        for name, (ok, expected) in _LIMITS.items():
            value = getattr(self, name)
            try:
                fits = ok(value)
            except TypeError:
                fits = False
            if not fits:
                raise ArgumentError("settings", name, expected=expected, got=repr(value))
        if self.hard_weight == 0 and self.soft_weight == 0:
            expected, fix = "above 0 where the hard weight is 0", "One of the two must teach the student."
            raise ArgumentError("settings", "soft_weight", expected=expected, got="0", fix=fix)


def _count(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and v >= least, f"a whole number from {least}"


def _share() -> tuple[Callable[[Any], bool], str]:
    return lambda v: 0 <= v < 1, "in [0, 1)"


def _number(least: float, open_end: bool) -> tuple[Callable[[Any], bool], str]:
    words = f"a finite number {'above' if open_end else 'from'} {least:g}"
    return lambda v: math.isfinite(v) and (v > least or (not open_end and v == least)), words


def _among(names: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v in names, "one of " + ", ".join(n or '""' for n in names)


_SIZES = (lambda v: all(isinstance(s, int) and s >= 1 for s in v), "layer sizes, each a whole number from 1")
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "teacher": _SIZES,
    "student": _SIZES,
    "teacher_epochs": _count(1),
    "teacher_dropout": _share(),
    "teacher_input_dropout": _share(),
    "teacher_max_norm": _number(0, False),
    "teacher_lr": _number(0, True),
    "activation": _among(tuple(ACTIVATIONS)),
    "temperature": _number(0, True),
    "hard_weight": _number(0, False),
    "soft_weight": _number(0, False),
    "labels": _count(0),
    "epochs": _count(1),
    "batch_size": _count(1),
    "optimizer": _among(tuple(OPTIMIZERS)),
    "lr": _number(0, True),
    "schedule": _among(tuple(SCHEDULES)),
    "weight_decay": _number(0, False),
    "max_norm": _number(0, False),
    "dropout": _share(),
    "seeds": (lambda v: len(v) > 0 and len(set(v)) == len(v) and min(v) >= 0, "different whole numbers from 0"),
    "split_seed": _count(0),
    "backend": _among(("", *BACKENDS)),
}


def full_sizes(hidden: Sequence[int], features: int, classes: int) -> tuple[int, ...]:
    """All layer sizes from the hidden ones; a list that begins with `features` and ends with `classes` is complete."""
    sizes = tuple(hidden)
    if len(sizes) >= 2 and sizes[0] == features and sizes[-1] == classes:
        return sizes
    return (features, *sizes, classes)


# --- training one model ---


class Epoch(NamedTuple):
    """What `fit` says of a training, about ten times a second and at each epoch's end (`finished`)."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    finished: bool


def endless_batches(rows: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of these row numbers, shuffled anew in each pass, for ever."""
    epoch = 0
    while True:
        for picked in batches(len(rows), min(batch_size, len(rows)), seed=seed, epoch=epoch):
            yield rows[picked]
        epoch += 1


def fit(
    model: Module,
    x: np.ndarray,
    y: np.ndarray,
    teacher_logits: np.ndarray | None = None,
    *,
    temperature: float = 4.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    epochs: int = 60,
    batch_size: int = 64,
    optimizer: str = "adam",
    lr: float = 0.003,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> None:
    """Train a model in place, on hard labels alone or with a teacher's logits.

    Parameters
    ----------
    model : its parameters move into the optimizer's arena.
    x : (n, k) network inputs.  y : (n,) class ids, -1 for rows without a label.
    teacher_logits : (n, c), or None: then rows without a label are left out, and the steps are as many as if they
        were there, so that a comparison is between equal budgets.
    temperature, hard_weight, soft_weight : of the distillation loss; unused without a teacher.
    epochs, batch_size : epochs·⌈n / batch_size⌉ steps.
    optimizer, schedule : names in `optim.OPTIMIZERS` and `optim.SCHEDULES`.  lr : at the schedule's start.
    weight_decay, max_norm : 0 for none; with "adamw" a weight decay of 0 leaves that optimizer's own default, 0.01.
    seed : of the order of the rows.
    on_epoch : told of the progress.

    Raises
    ------
    ArgumentError : no row has a label and there is no teacher.  ShapeError : lengths differ.
    """
    if len(x) != len(y) or (teacher_logits is not None and len(teacher_logits) != len(x)):
        got = f"{len(x)} and {len(y)}" + ("" if teacher_logits is None else f" and {len(teacher_logits)}")
        raise ShapeError("fit", "x, y and teacher_logits", expected="of the same length", got=got)
    rows = np.arange(len(x)) if teacher_logits is not None else np.flatnonzero(y != UNLABELLED)
    if len(rows) == 0:
        raise ArgumentError("fit", "y", expected="at least one label where there is no teacher", got="none")
    per_epoch = math.ceil(len(x) / batch_size)
    steps = epochs * per_epoch
    decay = {"weight_decay": weight_decay} if weight_decay else {}
    opt = OPTIMIZERS[optimizer](model.parameters(), lr, max_norm=max_norm or None, **decay)
    factor = SCHEDULES[schedule](steps)
    loss = {"temperature": temperature, "hard_weight": hard_weight, "soft_weight": soft_weight}
    train = training_step(model, opt, x, y, teacher_logits, **loss)
    told = time.monotonic()

    def tell(epoch: int, within: int, total: float) -> None:
        nonlocal told
        finished = within == per_epoch
        if on_epoch is not None and (finished or time.monotonic() - told > SECONDS_BETWEEN_REPORTS):
            told = time.monotonic()
            on_epoch(Epoch(epoch + 1, epochs, epoch * per_epoch + within, steps, total / within, opt.lr, finished))

    model.train()
    stream = endless_batches(rows, batch_size, seed)
    with blas_threads_for(batch_size * max(p.size for p in model.parameters())):
        for epoch in range(epochs):
            within, total = 0, 0.0
            for _, group in itertools.groupby(itertools.islice(stream, per_epoch), len):
                picked = np.stack(list(group))
                first = epoch * per_epoch + within
                rates = np.array([lr * factor(k) for k in range(first, first + len(picked))])
                for losses in train.portions(picked, rates):
                    within, total = within + len(losses), total + float(losses.sum(dtype=np.float64))
                    tell(epoch, within, total)
    _warn_of_slow_steps(train)
    model.eval()


def training_step(
    model: Module, opt: Optimizer, x: np.ndarray, y: np.ndarray, teacher_logits: np.ndarray | None, **weights: Any
) -> Step:
    """A compiled step of `fit`: of the row numbers of a batch and the learning rate it makes the loss.

    Features, labels and the teacher's logits stay where they are; the step gathers those of its rows.
    """
    real = opt.arena.values.dtype
    x, y = np.ascontiguousarray(x, real), np.ascontiguousarray(as_index("fit", "y", y))
    soft = None if teacher_logits is None else np.ascontiguousarray(teacher_logits, real)

    @compile(fallback=True)
    def step(picked: Any, rate: Any) -> Any:
        opt.lr = rate
        logits, labels = model(F.take(x, picked)), F.take(y, picked)
        if soft is None:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = F.distillation_loss(logits, F.take(soft, picked), labels, ignore_index=UNLABELLED, **weights)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    compiled: Step = step
    return compiled


def _warn_of_slow_steps(step: Step) -> None:
    """Say if a model's step could not be replayed, since it costs its user time."""
    if step.refusals:
        warnings.warn(f"every step of this training ran without a plan. {step.refusals[0]}", stacklevel=3)


# --- the verdict ---

# Two-sided 95 % quantiles of Student's t for 1, 2, … 30 degrees of freedom.
T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t: tabled, and beyond the table the normal one with its first term."""
    return T_95[degrees - 1] if degrees <= len(T_95) else 1.960 + 2.372 / degrees


def compare(alone: Sequence[float], distilled: Sequence[float], resolution: float = 0.0) -> dict[str, Any]:
    """The paired differences distilled - alone, their mean and 95 % t-interval, and the verdict that it allows.

    "helped" or "hurt" where the interval leaves out 0, else "no clear difference"; "not enough seeds" below two.
    The deviation is taken to be at least `resolution`, the accuracy that one row of the test part is worth: two seeds
    that happen to gain the same few rows prove nothing.
    """
    differences = [float(d - a) for a, d in zip(alone, distilled, strict=True)]
    n = len(differences)
    mean = float(np.mean(differences)) if n else None
    interval = None
    verdict = "not enough seeds"
    if n >= 2:
        deviation = max(float(np.std(differences, ddof=1)), resolution)
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        interval = [float(np.mean(differences)) - half, float(np.mean(differences)) + half]
        verdict = "helped" if interval[0] > 0 else "hurt" if interval[1] < 0 else "no clear difference"
    difference = {"per_seed": differences, "mean": mean, "interval": interval, "confidence": 0.95}
    return {"difference": difference, "verdict": verdict}


# --- the experiment ---


class Progress(NamedTuple):
    """Where an experiment is: which model of which situation and seed, how far, and how well it does."""

    situation: str
    model: str
    seed: int
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    trainings_done: int
    trainings: int


TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"


@dataclass
class Trained:
    """One trained model and what was measured of it on the test part."""

    model: Any
    test_accuracy: float
    test_nll: float
    test_ece: float
    agreement: float | None = None
    kl_to_teacher: float | None = None


@dataclass
class DistillResult:
    """What a distillation leaves behind.

    Attributes
    ----------
    student, teacher, student_alone : the models of the first seed; `student` is the distilled one. They take raw
        features in `predict`, `predict_proba` and `logits`. None where the run stopped before it had them.
    report : the figures, as report.json holds them.
    history : one dict for each epoch of each training.
    dataset : what was trained on.  settings : what the run depended on.
    complete : whether every seed ran to its end.
    """

    settings: Settings
    dataset: Dataset
    report: dict[str, Any]
    history: list[dict[str, Any]]
    teacher: Any
    student: Any
    student_alone: Any
    complete: bool


class Experiment:
    """The paired comparison, seed by seed; `result` can be asked for what is complete at any time.

    Parameters
    ----------
    settings : see `Settings`.
    dataset : used in place of the one that settings.data names.
    teacher : a trained Module, or a function from raw features (n, k) to logits (n, c); None trains one for each seed.
    student : a Module whose present weights all trainings begin with; None makes one for each seed from
        settings.student. The first distillation trains this very object.
    alone : whether the student is also trained without the teacher, which the verdict needs.
    on_progress : called with a `Progress` about ten times a second and at each epoch's end.
    on_model : called without arguments after each trained model.

    Raises
    ------
    MinikdError : a setting, the data or a model does not fit; before anything is trained.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        dataset: Dataset | None = None,
        teacher: Any = None,
        student: Module | None = None,
        alone: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
        on_model: Callable[[], None] | None = None,
    ) -> None:
        settings.check()
        if settings.backend:
            use_backend(settings.backend)
        self._given_data = dataset is not None
        if dataset is None:
            dataset = load(settings.data, label_column=settings.label_column, split_seed=settings.split_seed)
        labels, batch_size = _few_enough(settings.labels, dataset), _small_enough(settings.batch_size, dataset)
        settings = dataclasses.replace(settings, labels=labels, batch_size=batch_size)
        self.settings, self.dataset, self.alone = settings, dataset, alone
        self._teacher: Any = teacher
        self._student: Any = student
        self._initial: Any = copy.deepcopy(student)
        self._on_progress, self._on_model = on_progress, on_model
        self.history: list[dict[str, Any]] = []
        self._models: dict[tuple[str, str, int], Trained] = {}
        self._started = time.monotonic()
        self._seconds = 0.0
        self._check_models()
        self._given_logits: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def situations(self) -> dict[str, int]:
        """The situations' names and the number of labels that the student sees in each; 0 means all of them."""
        few = self.settings.labels
        return {"all labels": 0, **({f"{few} labels": few} if few else {})}

    @property
    def trainings(self) -> int:
        """How many models are trained in all."""
        each = len(self.situations) * (2 if self.alone else 1) + (self._teacher is None)
        return each * len(self.settings.seeds)

    def run(self) -> None:
        """Train everything; an exception or Ctrl-C passes through, and `result` then holds what was complete."""
        self._started = time.monotonic()
        try:
            for seed in self.settings.seeds:
                self._run_seed(seed)
        finally:
            self._seconds = time.monotonic() - self._started

    def _run_seed(self, seed: int) -> None:
        data = self.dataset
        teacher = self._make_teacher(seed)
        on_train, on_test = self._soft_labels(teacher)
        self._keep("", TEACHER, seed, teacher, on_test, None)
        for situation, labels in self.situations.items():
            y = data.few_labels(labels, seed) if labels else data.y_train
            for name, soft in ((ALONE, None), (DISTILLED, on_train)):
                if name == ALONE and not self.alone:
                    continue
                student = self._make_student(seed, first=name == DISTILLED and not labels)
                self._train(situation, name, seed, student, y, soft)
                self._keep(situation, name, seed, student, _logits(student, data.x_test), on_test)

    # --- models ---

    def _sizes(self, hidden: Sequence[int]) -> tuple[int, ...]:
        return full_sizes(hidden, self.dataset.features, self.dataset.classes)

    def _check_models(self) -> None:
        """Refuse a given teacher or student that does not fit the data, before anything is trained."""
        for argument, model in (("teacher", self._teacher), ("student", self._student)):
            if model is None:
                continue
            if not callable(model):
                expected = "a Module or a function from features to logits"
                raise ArgumentError("distill", argument, expected=expected, got=type(model).__name__)
            piece = self.dataset.x_train[: F.ROWS_TO_LOOK_AT]
            got = self._teacher_logits(model, piece) if argument == "teacher" else _logits(model, piece)
            if got.shape != (len(piece), self.dataset.classes):
                expected = f"a model that gives {self.dataset.classes} logits a row, as the data has classes"
                raise ShapeError("distill", argument, expected=expected, got=f"an output of shape {got.shape}")
            if np.isnan(got).any():
                raise ArgumentError("distill", argument, expected="a model with finite logits", got="NaN")
        self._warn_of_a_large_student()

    def _warn_of_a_large_student(self) -> None:
        sizes = (self._teacher, self.settings.teacher), (self._student, self.settings.student)
        if any(not (model is None or isinstance(model, Module)) for model, _ in sizes):
            return
        teacher, student = (
            model.parameter_count if model is not None else parameters_of(self._sizes(hidden))
            for model, hidden in sizes
        )
        if student > teacher:
            message = f"the student has {student:,} parameters, more than the {teacher:,} of its teacher"
            warnings.warn(f"{message}; distillation is meant for a smaller one.", stacklevel=4)

    def _make_teacher(self, seed: int) -> Any:
        if self._teacher is not None:
            return self._teacher
        s = self.settings
        teacher = MLP(
            self._sizes(s.teacher),
            s.activation,
            dropout=s.teacher_dropout,
            seed=seed,
            input_dropout=s.teacher_input_dropout,
        )
        self._fit(
            "",
            TEACHER,
            seed,
            teacher,
            self.dataset.y_train,
            None,
            epochs=s.teacher_epochs,
            lr=s.teacher_lr,
            max_norm=s.teacher_max_norm,
            weight_decay=0.0,
        )
        return teacher

    def _make_student(self, seed: int, first: bool) -> Module:
        """A fresh student: for one seed always with the same weights."""
        if self._student is None:
            s = self.settings
            return MLP(self._sizes(s.student), s.activation, dropout=s.dropout, seed=seed)
        given = first and seed == self.settings.seeds[0]
        return self._student if given else copy.deepcopy(self._initial)

    def _soft_labels(self, teacher: Any) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's logits of the training and of the test part; a given teacher is asked only once."""
        if self._given_logits is not None:
            return self._given_logits
        both = self._teacher_logits(teacher, self.dataset.x_train), self._teacher_logits(teacher, self.dataset.x_test)
        if self._teacher is not None:
            self._given_logits = both
        return both

    def _teacher_logits(self, teacher: Any, x: np.ndarray) -> np.ndarray:
        """The teacher's logits of normalised inputs x; a teacher that was given gets raw features."""
        if teacher is not self._teacher:
            return _logits(teacher, x)
        if not isinstance(teacher, Module):
            return np.ascontiguousarray(teacher(self.dataset.raw(x)), np.float32)
        starts = range(0, len(x), ROWS_AT_A_TIME)  # so that the raw features are never there as a whole
        pieces = [teacher.logits(self.dataset.raw(x[k : k + ROWS_AT_A_TIME])) for k in starts]
        return np.concatenate(pieces).astype(np.float32, copy=False)

    # --- one training ---

    def _train(self, situation: str, name: str, seed: int, student: Module, y: np.ndarray, soft: Any) -> None:
        s = self.settings
        self._fit(
            situation,
            name,
            seed,
            student,
            y,
            soft,
            epochs=s.epochs,
            lr=s.lr,
            max_norm=s.max_norm,
            weight_decay=s.weight_decay,
        )

    def _fit(self, situation: str, name: str, seed: int, model: Module, y: np.ndarray, soft: Any, **how: Any) -> None:
        s, data = self.settings, self.dataset
        validated: list[float] = []

        def on_epoch(e: Epoch) -> None:
            if e.finished:
                scores = _logits(model, data.x_validation)
                validated.append(metrics.accuracy(scores, data.y_validation))
                nll = metrics.negative_log_likelihood(scores, data.y_validation)
                place = {"situation": situation, "model": name, "seed": seed, "epoch": e.epoch}
                figures = {"lr": e.lr, "loss": e.loss, "validation_accuracy": validated[-1], "validation_nll": nll}
                self.history.append({**place, **figures})
            if self._on_progress is not None:
                accuracy = validated[-1] if validated else None
                where = (situation, name, seed, e.epoch, e.epochs, e.step, e.steps)
                self._on_progress(Progress(*where, e.loss, accuracy, self._trained(), self.trainings))

        fit(
            model,
            data.x_train,
            y,
            soft,
            temperature=s.temperature,
            hard_weight=s.hard_weight,
            soft_weight=s.soft_weight,
            batch_size=s.batch_size,
            optimizer=s.optimizer,
            schedule=s.schedule,
            seed=seed,
            on_epoch=on_epoch,
            **how,
        )

    def _trained(self) -> int:
        return sum(1 for _, name, _ in self._models if name != TEACHER or self._teacher is None)

    def _keep(self, situation: str, name: str, seed: int, model: Any, scores: np.ndarray, teacher: Any) -> None:
        y = self.dataset.y_test
        kept = Trained(
            model,
            metrics.accuracy(scores, y),
            metrics.negative_log_likelihood(scores, y),
            metrics.expected_calibration_error(scores, y),
        )
        if not kept.test_nll < 10 * math.log(self.dataset.classes):
            where = ", ".join(filter(None, (f"seed {seed}", situation, name)))
            message = f"{where} did not learn (negative log-likelihood {kept.test_nll:.3g}); try a lower learning rate."
            warnings.warn(message, stacklevel=2)
        if teacher is not None:
            kept.agreement = metrics.agreement(scores, teacher)
            kept.kl_to_teacher = metrics.kl_to_teacher(scores, teacher)
        self._models[situation, name, seed] = kept
        self._seconds = time.monotonic() - self._started
        if self._on_model is not None:
            self._on_model()

    # --- what came out ---

    def _complete_seeds(self) -> list[int]:
        """The seeds for which every model of every situation is there."""
        wanted = [(s, n) for s in self.situations for n in ((ALONE, DISTILLED) if self.alone else (DISTILLED,))]
        return [seed for seed in self.settings.seeds if all((s, n, seed) in self._models for s, n in wanted)]

    def result(self) -> DistillResult:
        """The models and figures of the seeds that are complete."""
        seeds = self._complete_seeds()
        first = self.settings.seeds[0]
        return DistillResult(
            settings=self.settings,
            dataset=self.dataset,
            report=self._report(seeds),
            history=list(self.history),
            teacher=self._model("", TEACHER, first),
            student=self._model("all labels", DISTILLED, first),
            student_alone=self._model("all labels", ALONE, first),
            complete=len(seeds) == len(self.settings.seeds),
        )

    def _model(self, situation: str, name: str, seed: int) -> Any:
        """A trained model, made to take raw features."""
        kept = self._models.get((situation, name, seed))
        if kept is None:
            return None
        if isinstance(kept.model, Module) and kept.model is not self._teacher:
            kept.model.normalisation = self.dataset.normalisation
            kept.model.class_names = self.dataset.class_names
        return kept.model

    def _report(self, seeds: list[int]) -> dict[str, Any]:
        data = self.dataset
        situations = [self._situation(name, labels, seeds) for name, labels in self.situations.items()]
        return {
            "version": minikd.__version__,
            "backend": current_backend(),
            "settings": self._plain_settings(),
            "seeds": seeds,
            "requested_seeds": list(self.settings.seeds),
            "complete": len(seeds) == len(self.settings.seeds),
            "data": {
                "name": data.name,
                **data.sizes,
                "classes": data.classes,
                "features": data.features,
                "sha256": data.sha256,
            },
            **situations[0],
            "seconds": round(self._seconds, 3),
            "few_labels": situations[1] if len(situations) > 1 else None,
        }

    def _plain_settings(self) -> dict[str, Any]:
        """The settings as JSON knows them; null where an object was given in their place."""
        settings = dataclasses.asdict(self.settings)
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        given = {"data": self._given_data, "teacher": self._teacher is not None, "student": self._student is not None}
        return {n: None if given.get("teacher" if n.startswith("teacher_") else n) else v for n, v in plain.items()}

    def _situation(self, situation: str, labels: int, seeds: list[int]) -> dict[str, Any]:
        s = self.settings
        teacher = self._figures("", TEACHER, seeds)
        alone = self._figures(situation, ALONE, seeds) if self.alone else None
        distilled = self._figures(situation, DISTILLED, seeds)
        before, after = (alone["test_accuracy"], distilled["test_accuracy"]) if alone else ([], [])
        return {
            "labels": labels or "all",
            "temperature": s.temperature,
            "hard_weight": s.hard_weight,
            "soft_weight": s.soft_weight,
            "teacher": teacher,
            "student_alone": alone,
            "student_distilled": distilled,
            **compare(before, after, resolution=1 / len(self.dataset.y_test)),
        }

    def _figures(self, situation: str, name: str, seeds: list[int]) -> dict[str, Any]:
        kept = [self._models[situation, name, seed] for seed in seeds]
        model = kept[0].model if kept else None
        parameters = model.parameter_count if isinstance(model, Module) else None
        figures: dict[str, Any] = {
            "layers": list(model.sizes) if isinstance(model, MLP) else None,
            "parameters": parameters,
            "bytes": sum(p.array.nbytes for p in model.parameters()) if isinstance(model, Module) else None,
        }
        measured = ["test_accuracy", "test_nll", "test_ece"] + (["agreement", "kl_to_teacher"] if situation else [])
        return {**figures, **{m: [getattr(k, m) for k in kept] for m in measured}}


def _few_enough(labels: int, dataset: Dataset) -> int:
    """The number of labels of the second situation; the default is lowered to a tenth where a data set is small."""
    labelled = int((dataset.y_train != UNLABELLED).sum())
    if labels <= labelled:
        return labels
    if labels != Settings.labels:
        expected = f"at most {labelled}, the labelled rows of the training part"
        fix = "Give fewer, or 0 to leave out the situation with few labels."
        raise ArgumentError("settings", "labels", expected=expected, got=str(labels), fix=fix)
    fewer = min(max(dataset.classes, labelled // 10), labelled)
    message = (
        f"there are only {labelled} labelled rows to train on: the situation with few labels has {fewer}, not {labels}."
    )
    warnings.warn(message, stacklevel=3)
    return fewer


def _small_enough(batch_size: int, dataset: Dataset) -> int:
    """Rows in a batch; the default is lowered, to 8 at least, so that a small data set has 16 steps in an epoch too."""
    if batch_size != Settings.batch_size:
        return batch_size
    return min(batch_size, max(8, len(dataset.x_train) // 16))


def parameters_of(sizes: Sequence[int]) -> int:
    """How many numbers layers of these sizes hold, biases included."""
    return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(sizes))


def _logits(model: Any, x: np.ndarray) -> np.ndarray:
    """The model's logits of inputs that are normalised already."""
    return model.logits(x, normalised=True)


# --- the function ---


def _seeds(student: Any, seed: int | None, seeds: Any) -> tuple[int, ...] | None:
    """The seeds that `distill` was asked for; None for the default ones."""
    if seed is not None and seeds is not None:
        raise ArgumentError("distill", "seed", expected="left out where seeds are given", got=repr(seed))
    if seed is not None:
        return (int(seed),)
    if seeds is None:
        return (0,) if isinstance(student, Module) else None
    if not isinstance(seeds, Sequence | np.ndarray):
        raise ArgumentError("distill", "seeds", expected="several seeds, such as range(5)", got=repr(seeds))
    return tuple(int(s) for s in seeds)


def _chosen(
    options: dict[str, Any], teacher: Any, student: Any, data: Any, labels: int | None, seeds: tuple[int, ...] | None
) -> Settings:
    """The settings that the arguments of `distill` name; what they leave out, or give as an object, is the default."""
    names = [field.name for field in dataclasses.fields(Settings)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        expected = "among " + ", ".join(names)
        raise ArgumentError("distill", ", ".join(unknown), expected=expected, got="an unknown name")
    given = {**options, "labels": labels, "seeds": seeds, "data": data if isinstance(data, str) else None}
    given |= {n: tuple(v) for n, v in (("teacher", teacher), ("student", student)) if isinstance(v, Sequence)}
    plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in given.items() if v is not None}
    return dataclasses.replace(Settings(), **plain)


def distill(
    teacher: Any = None,
    student: Any = None,
    data: Any = None,
    *,
    temperature: float | None = None,
    hard_weight: float | None = None,
    soft_weight: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    labels: int | None = None,
    alone: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> DistillResult:
    """Distil a teacher into a student, and say whether it did better than the same student alone.

    With no arguments: a teacher and a small student on the built-in digits, over five paired seeds, with all labels
    and with 100 of them.

    Parameters
    ----------
    teacher : a trained Module, a function from raw features (n, k) to logits (n, c), or hidden layer sizes such as
        (256, 256) to train one for each seed; None for the default sizes.
    student : a Module, trained in place from the weights that it has, or hidden layer sizes; None for the default.
    data : a built-in name, a path, a tuple of arrays (x, y) or (x_train, y_train, x_test, y_test), or a Dataset.
        Labels of -1 are unknown: those rows only feel the soft term.
    temperature, hard_weight, soft_weight : of `functional.distillation_loss`.
    epochs, batch_size, optimizer, lr : of the student; optimizer is "sgd", "nesterov", "adam" or "adamw".
    seed : of initial weights and of the order of the rows, for a single comparison.
    seeds : several of them, for a verdict with an interval. By default five, but one for a student that is a Module.
    labels : also compare with only so many rows labelled for the student; 0 leaves that out. By default 100 when
        nothing was given, else 0.
    alone : train the student without the teacher too, which the verdict needs and which doubles the time.
    on_progress : called with a `Progress` about ten times a second.
    settings : any other field of `Settings`.

    Returns
    -------
    DistillResult : `.student` takes raw features in `predict`, `.report` holds the figures.

    Raises
    ------
    MinikdError : in words, before anything is trained, where an argument does not fit.

    Source: Hinton, Vinyals and Dean 2015.
    """
    options = {
        "temperature": temperature,
        "hard_weight": hard_weight,
        "soft_weight": soft_weight,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        **settings,
    }
    if labels is None and any(value is not None for value in (teacher, student, data)):
        labels = 0
    chosen = _chosen(options, teacher, student, data, labels, _seeds(student, seed, seeds))
    dataset = None
    if data is not None and not isinstance(data, str):
        dataset = load(data, split_seed=chosen.split_seed, label_column=chosen.label_column)
    experiment = Experiment(
        chosen,
        dataset=dataset,
        teacher=None if isinstance(teacher, Sequence) else teacher,
        student=None if isinstance(student, Sequence) else student,
        alone=alone,
        on_progress=on_progress,
    )
    experiment.run()
    return experiment.result()


vars(distill)["correct_bias"] = correct_bias  # reachable as kd.distill.correct_bias too
