"""Teacher to student: the training loop, and the paired experiment that says whether distillation helped.

An `Experiment` trains, for each seed, a teacher, then in each situation the same small student twice from the same
initial weights, in the same order of batches and with the same number of steps: once alone on its labels, once with
the teacher's soft labels. What differs between the two is the distillation and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd
from minikd import functional as F
from minikd import metrics
from minikd.augmentation import Shift
from minikd.bias import correct_bias
from minikd.checkpoints import Checkpoints
from minikd.data import Dataset, load
from minikd.errors import ArgumentError, ShapeError
from minikd.kernels import current_backend, matmul_precision, use_backend
from minikd.kernels.arrays import here, memory_in_use
from minikd.nn import MLP, Module
from minikd.objectives import HardLabels, Objective
from minikd.peers import Peers
from minikd.settings import Settings, full_sizes
from minikd.tape import no_grad
from minikd.teachers import ModelTeacher, Teacher, as_teacher
from minikd.teachers import trained as trained_teacher
from minikd.teachers.estimators import TRAINERS
from minikd.training import Epoch, StepReport, Training, fit
from minikd.verdict import compare

__all__ = [
    "DistillResult",
    "Experiment",
    "Progress",
    "Rehearsal",
    "Settings",
    "compare",
    "distill",
    "fit",
    "full_sizes",
]

UNLABELLED = -1  # the class id of a row without a label in a data set
ROWS_ASKED_AT_A_TIME = 8192  # of a teacher, so that the raw features of a large data set are never there as a whole


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
    loss: float | None
    accuracy: float | None
    trainings_done: int
    trainings: int


TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"
ASSISTANT, GENERATION, ENSEMBLE = "assistant", "generation", "ensemble of generations"
GENERATION_SEED = 1000  # between the seeds of the initial weights of one generation and of the next


@dataclass
class Trained:
    """One trained model and what was measured of it on the test part; None where a teacher knows nothing of it."""

    model: Any
    test_accuracy: float | None = None
    test_nll: float | None = None
    test_ece: float | None = None
    agreement: float | None = None
    kl_to_teacher: float | None = None


@dataclass
class DistillResult:
    """What a distillation leaves behind.

    Attributes
    ----------
    student, teacher, student_alone : the models of the first seed; `student` is the distilled one. They take raw
        features in `predict`, `predict_proba` and `logits`. None where the run stopped before it had them.
    teacher_on_validation : what the first seed's teacher says of the validation part (n, c), or None.
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
    teacher_on_validation: np.ndarray | None = None


class Lesson(NamedTuple):
    """What a network is taught besides the labels: a teacher's logits, and what its layers put out, of each row."""

    logits: np.ndarray
    features: dict[str, np.ndarray]


class Rehearsal(NamedTuple):
    """The distilled student of one seed before its first step, and what it can be compared with.

    training : of the student by what teaches it; online, of teacher and student together.
    teacher : the name of what teaches it: "teacher", or the last assistant's.
    teacher_accuracy : of that on the validation part; None online, and where a table does not know those rows.
    alone_accuracy : on the validation part, of the same student, trained on its labels alone; None if it was not.
    """

    training: Training
    teacher: str
    teacher_accuracy: float | None
    alone_accuracy: float | None


class Experiment:
    """The paired comparison, seed by seed; `result` can be asked for what is complete at any time.

    Parameters
    ----------
    settings : see `Settings`.
    dataset : used in place of the one that settings.data names.
    teacher : anything that `as_teacher` takes; None for what settings.teacher says: layer sizes, one of which is
        trained for each seed, the name of a scikit-learn model (rf, gbt, mlp), likewise, or a file.
    student : a Module whose present weights all trainings begin with; None makes one for each seed from
        settings.student. The first distillation trains this very object.
    objective : what the distilled student is trained on; None for what the settings say.
    alone : whether the student is also trained without the teacher, which the verdict needs.
    allow_pickle : whether the teacher's file may be a pickle, which runs whatever code it holds.
    on_progress : called with a `Progress` about ten times a second and at each epoch's end.
    on_model : called without arguments after each trained model.
    on_step : called with a `training.StepReport` for each step.

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
        objective: Objective | None = None,
        alone: bool = True,
        allow_pickle: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        on_model: Callable[[], None] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        settings.check()
        if settings.backend:
            use_backend(settings.backend)
        matmul_precision(settings.precision or None)
        self._given_data = dataset is not None
        if dataset is None:
            dataset = load(settings.data, label_column=settings.label_column, split_seed=settings.split_seed)
        labels, batch_size = _few_enough(settings.labels, dataset), _small_enough(settings.batch_size, dataset)
        settings = dataclasses.replace(settings, labels=labels, batch_size=batch_size)
        self.settings, self.dataset, self.alone = settings, dataset, alone
        self.objective = settings.make_objective() if objective is None else objective
        self._given_teacher = teacher
        self._teacher = self._find_teacher(allow_pickle)
        self._student: Any = student
        self._initial: Any = copy.deepcopy(student)
        self._on_progress, self._on_model, self._on_step = on_progress, on_model, on_step
        self.history: list[dict[str, Any]] = []
        self._models: dict[tuple[str, str, int], Trained] = {}
        self._started = time.monotonic()
        self._seconds = 0.0
        self._check_models()
        self._lesson: tuple[Lesson, np.ndarray | None] | None = None  # of a teacher that was given
        self._teacher_on_validation: np.ndarray | None = None  # of the first seed
        self._checkpoints: Checkpoints | None = None

    def keep_in(self, folder: str | Path) -> None:
        """Keep finished models and the training under way in a folder, and take up what is there already."""
        self._checkpoints = Checkpoints(folder, every=self.settings.checkpoint_every, run=self._fingerprint())

    @property
    def taken_up(self) -> int:
        """Trainings that were finished before, in the folder of `keep_in`."""
        return 0 if self._checkpoints is None else self._checkpoints.count()

    def forget_checkpoints(self) -> None:
        """Remove what `keep_in` kept; for a run that is complete."""
        if self._checkpoints is not None:
            self._checkpoints.remove()

    def _fingerprint(self) -> str:
        """What the states of this run's trainings depend on, in one word."""
        computed = {"backend": current_backend(), "precision": matmul_precision().name}
        about = dataclasses.asdict(self.settings) | computed | {"seeds": 0, "checkpoint_every": 0}
        text = json.dumps([about, self.dataset.sha256, str(self.objective), self.alone], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _find_teacher(self, allow_pickle: bool) -> Teacher | None:
        """The teacher that was given or that the settings name; None where one is trained for each seed."""
        teacher, data = self._given_teacher, self.dataset
        if teacher is None and isinstance(self.settings.teacher, str) and self.settings.teacher not in TRAINERS:
            teacher = self.settings.teacher
        if teacher is None:
            return None
        if isinstance(teacher, Module | Teacher) or (callable(teacher) and not hasattr(teacher, "predict_proba")):
            return as_teacher(teacher, classes=data.classes)
        return as_teacher(teacher, class_names=data.class_names, allow_pickle=allow_pickle)

    @property
    def situations(self) -> dict[str, int]:
        """The situations' names and the number of labels that the student sees in each; 0 means all of them."""
        few = self.settings.labels
        return {"all labels": 0, **({f"{few} labels": few} if few else {})}

    @property
    def trainings(self) -> int:
        """How many models are trained in all."""
        s = self.settings
        links = s.generations + len(s.assistant_sizes())
        own_teacher = self._teacher is None and s.mode == "offline"
        return (len(self.situations) * (links + self.alone) + own_teacher) * len(s.seeds)

    def run(self) -> None:
        """Train everything; an exception or Ctrl-C passes through, and `result` then holds what was complete.

        Raises
        ------
        OutputError : another run keeps its models in the folder of `keep_in`.
        """
        self._started = time.monotonic()
        try:
            with nullcontext() if self._checkpoints is None else self._checkpoints.alone():
                for seed in self.settings.seeds:
                    self._run_seed(seed)
        finally:
            self._seconds = time.monotonic() - self._started

    def _run_seed(self, seed: int) -> None:
        data, offline = self.dataset, self.settings.mode == "offline"
        lesson, on_test = self._teach(seed) if offline else (None, None)
        for situation, labels in self.situations.items():
            y = data.few_labels(labels, seed) if labels else data.y_train
            if self.alone:
                student = self._make_student(seed, first=False)
                self._train(situation, ALONE, seed, student, y, None)
                self._keep(situation, ALONE, seed, student, _logits(student, data.x_test), on_test)
            student = self._make_student(seed, first=not labels)
            if lesson is not None:
                self._distil(situation, seed, student, y, lesson, on_test)
            else:
                self._learn_together(situation, seed, student, y)

    def _teach(self, seed: int) -> tuple[Lesson, np.ndarray | None]:
        """The teacher of a seed, made or given, and what it says of the training and of the test part."""
        teacher = self._make_teacher(seed)
        lesson, on_test = self._ask(teacher)
        network = teacher.model if isinstance(teacher, ModelTeacher) else teacher
        shown = network if self._given_teacher is None else self._given_teacher
        self._keep("", TEACHER, seed, shown, on_test, None)
        return lesson, on_test

    def _distil(
        self, situation: str, seed: int, student: Module, y: np.ndarray, lesson: Lesson, on_test: np.ndarray | None
    ) -> None:
        """Teacher to student, over the assistants and the earlier generations, each of which is the next one's teacher.

        All of them are measured against the first teacher. Sources: Mirzadeh et al. 2020, "Improved knowledge
        distillation via teacher assistant", sec. 3; Furlanello et al. 2018, "Born-again neural networks", sec. 3.
        """
        s, data = self.settings, self.dataset
        links = self._assistants(seed)
        for k in range(1, s.generations):
            links.append((f"{GENERATION} {k}", self._make_student(seed + k * GENERATION_SEED, first=False)))
        scores = []
        for name, model in [*links, (DISTILLED, student)]:
            self._train(situation, name, seed, model, y, lesson)
            on_model = _logits(model, data.x_test)
            self._keep(situation, name, seed, model, on_model, on_test)
            if not name.startswith(ASSISTANT):
                scores.append(F.of_host(F.softmax, on_model.astype(np.float64)))
            if name != DISTILLED:
                lesson = self._lesson_of(model)
        if len(scores) > 1:
            with np.errstate(divide="ignore"):
                self._keep(situation, ENSEMBLE, seed, None, np.log(np.mean(scores, axis=0)), on_test)

    def _learn_together(self, situation: str, seed: int, student: Module, y: np.ndarray) -> None:
        """Teacher and student in one training; the report's teacher is that of the first situation."""
        teacher = self._new_teacher(seed)
        self._train(situation, DISTILLED, seed, Peers((teacher, student)), y, None)
        on_test = _logits(teacher, self.dataset.x_test)
        self._note_validation(teacher)
        if ("", TEACHER, seed) not in self._models:
            self._keep("", TEACHER, seed, teacher, on_test, None)
        self._keep(situation, DISTILLED, seed, student, _logits(student, self.dataset.x_test), on_test)

    def rehearse(self, seed: int) -> Rehearsal:
        """Train all that comes before the distilled student of a seed, with all labels, but not that student itself."""
        situation, y, on_test = "all labels", self.dataset.y_train, self.dataset.x_test
        lesson = self._teach(seed)[0] if self.settings.mode == "offline" else None
        alone_accuracy = None
        if self.alone:
            alone = self._make_student(seed, first=False)
            self._train(situation, ALONE, seed, alone, y, None)
            self._keep(situation, ALONE, seed, alone, _logits(alone, on_test), None)
            alone_accuracy = self._validation_accuracy(alone)
        student = self._make_student(seed, first=True)
        if lesson is None:
            peers = Peers((self._new_teacher(seed), student))
            training = self._training(seed, peers, y, None, **self._as_a_student(peers, None))
            return Rehearsal(training, TEACHER, None, alone_accuracy)
        name, teacher = TEACHER, self._models["", TEACHER, seed].model if self._teacher is None else self._teacher
        for name, assistant in self._assistants(seed):
            self._train(situation, name, seed, assistant, y, lesson)
            self._keep(situation, name, seed, assistant, _logits(assistant, on_test), None)
            lesson, teacher = self._lesson_of(assistant), assistant
        training = self._training(seed, student, y, lesson, **self._as_a_student(student, lesson))
        return Rehearsal(training, name, self._validation_accuracy(teacher), alone_accuracy)

    def _validation_accuracy(self, model: Any) -> float | None:
        """Of a network or a teacher; None where it does not know the rows."""
        data = self.dataset
        if isinstance(model, Teacher) and not model.knows(data.rows_validation):
            return None
        return metrics.accuracy(self._scores(model, data.x_validation, data.rows_validation), data.y_validation)

    # --- models ---

    @property
    def student_sizes(self) -> tuple[int, ...]:
        """All layer sizes of the student, as far as they are known."""
        return tuple(getattr(self._student, "sizes", ())) or self._sizes(self.settings.student)

    @property
    def parameters(self) -> tuple[int | None, int]:
        """Numbers that the teacher and the student hold; None for a teacher that is no network of ours."""
        teacher = None
        if isinstance(self._teacher, ModelTeacher):
            teacher = self._teacher.model.parameter_count
        elif self._teacher is None and not self._named_trainer:
            teacher = parameters_of(self._sizes(self.settings.teacher))
        student = self._student
        return teacher, student.parameter_count if student is not None else parameters_of(self.student_sizes)

    def teacher_in_words(self) -> str:
        """The teacher's layers or name, and what else is to be known of it."""
        count, named = self.parameters[0], self.settings.teacher
        if self._named_trainer:
            return f"{named}: {TRAINERS[str(named)][1]} of scikit-learn, trained for each seed"
        if self._teacher is None:
            together = ", which learns along" if self.settings.mode == "online" else ""
            return f"{'-'.join(map(str, self._sizes(named)))}, {count:,} parameters{together}"
        name = named if isinstance(named, str) else type(self._given_teacher).__name__
        return f"{name}, " + (f"{count:,} parameters" if count else f"which gives {self._teacher.gives}")

    def _sizes(self, hidden: Any) -> tuple[int, ...]:
        return full_sizes(hidden, self.dataset.features, self.dataset.classes)

    def _check_models(self) -> None:
        """Refuse a given teacher or student that does not fit the data, before anything is trained."""
        data = self.dataset
        few = slice(0, F.ROWS_TO_LOOK_AT)
        if self._teacher is not None:
            self._teacher.check(data)
            if not self._teacher.knows(data.rows_train):
                expected = f"one that knows each of {len(data.rows_train)} rows of the training part"
                fix = "A table has a row for each sample in the order of the data's source: train, validation, test."
                raise ArgumentError("distill", "teacher", expected=expected, got="one that lacks some", fix=fix)
            self._teacher.logits(data.raw(data.x_train[few]), data.rows_train[few])
            if self._teacher.classes != data.classes:
                expected = f"a model that gives {data.classes} logits a row, as the data has classes"
                raise ShapeError("distill", "teacher", expected=expected, got=f"one of {self._teacher.classes} classes")
        if self._student is not None:
            if not isinstance(self._student, Module):
                got = type(self._student).__name__
                raise ArgumentError("distill", "student", expected="a Module", got=got)
            scores = _logits(self._student, data.x_train[few])
            if scores.shape[1:] != (data.classes,):
                expected = f"a model that gives {data.classes} logits a row, as the data has classes"
                raise ShapeError("distill", "student", expected=expected, got=f"an output of shape {scores.shape}")
            if np.isnan(scores).any():
                raise ArgumentError("distill", "student", expected="a model with finite logits", got="NaN")
        if self.objective.teacher_layers and not self._has_layers():
            fix = "Give a network of minikd, or layer sizes, as the teacher."
            expected = "one whose layers can be read, as the objective compares them"
            raise ArgumentError("distill", "teacher", expected=expected, got=str(self.settings.teacher), fix=fix)
        self._warn_of_a_large_student()

    def _has_layers(self) -> bool:
        return isinstance(self._teacher, ModelTeacher) or (self._teacher is None and not self._named_trainer)

    @property
    def _named_trainer(self) -> bool:
        """Whether the teacher is a scikit-learn model that is trained for each seed."""
        return self._teacher is None and isinstance(self.settings.teacher, str)

    def _warn_of_a_large_student(self) -> None:
        teacher, student = self.parameters
        if teacher is not None and student > teacher:
            message = f"the student has {student:,} parameters, more than the {teacher:,} of its teacher"
            warnings.warn(f"{message}; distillation is meant for a smaller one.", stacklevel=4)

    def _new_teacher(self, seed: int) -> MLP:
        """A teacher of the settings' sizes, as yet untrained."""
        s = self.settings
        sizes = self._sizes(s.teacher)
        return MLP(sizes, s.activation, dropout=s.teacher_dropout, seed=seed, input_dropout=s.teacher_input_dropout)

    def _make_teacher(self, seed: int) -> Any:
        """The teacher that was given, or one that is trained for this seed."""
        s, data = self.settings, self.dataset
        if self._teacher is not None:
            return self._teacher
        if isinstance(s.teacher, str):
            return self._train_by_scikit_learn(s.teacher, seed)
        teacher = self._new_teacher(seed)
        how: dict[str, Any] = {"epochs": s.teacher_epochs, "lr": s.teacher_lr, "max_norm": s.teacher_max_norm}
        how |= {"objective": HardLabels(), "shift": s.teacher_shift}
        self._fit("", TEACHER, seed, teacher, data.y_train, None, **how)
        return teacher

    def _train_by_scikit_learn(self, name: str, seed: int) -> Teacher:
        """One of `teachers.TRAINERS`, fitted to this data, with a word when it is done."""
        data = self.dataset
        teacher = trained_teacher(name, data.raw(data.x_train), data.y_train, data.classes, seed)
        if self._on_progress is not None:
            scores = self._scores(teacher, data.x_validation, data.rows_validation)
            accuracy = metrics.accuracy(scores, data.y_validation)
            where = ("", TEACHER, seed, 1, 1, 1, 1)
            self._on_progress(Progress(*where, None, accuracy, self._trained(), self.trainings))
        return teacher

    def _assistants(self, seed: int) -> list[tuple[str, Module]]:
        """The assistants as yet untrained, with their names, from the teacher's side to the student's."""
        s = self.settings
        sizes = [self._sizes(hidden) for hidden in s.assistant_sizes()]
        return [
            (f"{ASSISTANT} {k}", MLP(layers, s.activation, dropout=s.dropout, seed=seed))
            for k, layers in enumerate(sizes, 1)
        ]

    def _make_student(self, seed: int, first: bool) -> Module:
        """A fresh student: for one seed always with the same weights."""
        if self._student is None:
            s = self.settings
            return MLP(self._sizes(s.student), s.activation, dropout=s.dropout, seed=seed)
        given = first and seed == self.settings.seeds[0]
        return self._student if given else copy.deepcopy(self._initial)

    def _ask(self, teacher: Any) -> tuple[Lesson, np.ndarray | None]:
        """What a teacher says of the training and of the test part; a given teacher is asked only once."""
        if self._lesson is not None:
            return self._lesson
        data = self.dataset
        raw = isinstance(teacher, Teacher)
        said = self._scores(teacher, data.x_train, data.rows_train)
        self._note_validation(teacher)
        network = teacher.model if isinstance(teacher, ModelTeacher) else teacher
        lesson = Lesson(said, self._features(network, data.x_train, raw))
        known = not raw or teacher.knows(data.rows_test)
        both = lesson, self._scores(teacher, data.x_test, data.rows_test) if known else None
        if self._teacher is not None:
            self._lesson = both
        return both

    def _lesson_of(self, model: Module) -> Lesson:
        """What a network that was trained here teaches the next one."""
        x = self.dataset.x_train
        return Lesson(_logits(model, x), self._features(model, x, raw=False))

    def _note_validation(self, teacher: Any) -> None:
        rows = self.dataset.rows_validation
        known = not isinstance(teacher, Teacher) or teacher.knows(rows)
        if known and self._teacher_on_validation is None:
            self._teacher_on_validation = self._scores(teacher, self.dataset.x_validation, rows)

    def _scores(self, teacher: Any, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Logits of normalised inputs x; what is no network of ours gets raw features."""
        if not isinstance(teacher, Teacher):
            return _logits(teacher, x)
        pieces = (slice(k, k + ROWS_ASKED_AT_A_TIME) for k in range(0, len(x), ROWS_ASKED_AT_A_TIME))
        answers = [teacher.logits(None if teacher.per_row else self.dataset.raw(x[p]), rows[p]) for p in pieces]
        return np.concatenate(answers).astype(np.float32, copy=False)

    def _features(self, model: Any, x: np.ndarray, raw: bool) -> dict[str, np.ndarray]:
        """What those layers of a network put out that the objective compares; `raw`: it has a scale of its own."""
        names = self.objective.teacher_layers
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        if not names:
            return {}
        with no_grad():
            for k in range(0, len(x), ROWS_ASKED_AT_A_TIME):
                piece = x[k : k + ROWS_ASKED_AT_A_TIME]
                if raw and model.normalisation is not None:
                    piece = model.normalisation.apply(self.dataset.raw(piece))
                elif raw:
                    piece = self.dataset.raw(piece)
                for name, output in model.eval()(here.put(piece), features=names)[1].items():
                    found[name].append(output.numpy())
        return {name: np.concatenate(pieces) for name, pieces in found.items()}

    # --- one training ---

    def _train(self, situation: str, name: str, seed: int, model: Module, y: np.ndarray, lesson: Lesson | None) -> None:
        """Train a student, or a network on the way to it, with the settings of the student."""
        self._fit(situation, name, seed, model, y, lesson, **self._as_a_student(model, lesson))

    def _as_a_student(self, model: Module, lesson: Lesson | None) -> dict[str, Any]:
        """How a student is trained, and what on."""
        s = self.settings
        taught = lesson is not None or isinstance(model, Peers)
        objective = self.objective if taught else _without_teacher(self.objective)
        how = {"epochs": s.epochs, "lr": s.lr, "max_norm": s.max_norm, "weight_decay": s.weight_decay}
        return {**how, "objective": objective, "shift": s.shift}

    def _fit(
        self,
        situation: str,
        name: str,
        seed: int,
        model: Module,
        y: np.ndarray,
        lesson: Lesson | None,
        **how: Any,
    ) -> None:
        """Train a model, or take it from the checkpoints where it was trained before."""
        key = ", ".join(filter(None, (f"seed {seed}", situation, name)))
        place = {"situation": situation, "model": name, "seed": seed}
        finished = None if self._checkpoints is None else self._checkpoints.finished(key)
        if finished is not None:
            tensors, facts = finished
            model.load_state_dict(tensors)
            model.eval()
            self.history += facts["history"]
            return
        validated: list[float] = []

        def on_epoch(e: Epoch) -> None:
            if e.validation is not None:
                validated.append(e.validation["accuracy"])
            if self._on_progress is not None:
                accuracy = validated[-1] if validated else None
                where = (situation, name, seed, e.epoch, e.epochs, e.step, e.steps)
                self._on_progress(Progress(*where, e.loss, accuracy, self._trained(), self.trainings))

        keeper = None if self._checkpoints is None else self._checkpoints.training(key)
        how |= {"on_epoch": on_epoch, "on_step": self._on_step, "keeper": keeper}
        training = self._training(seed, model, y, lesson, **how)
        try:
            training.run()
        finally:
            rows = [{**place, **figures} for figures in training.history]
            self.history += rows
        if self._checkpoints is not None:
            self._checkpoints.finish(key, model.state_dict(), {"history": rows})

    def _training(
        self, seed: int, model: Module, y: np.ndarray, lesson: Lesson | None, *, shift: int, **how: Any
    ) -> Training:
        """The training of a model on the training part, before its first step."""
        s, data = self.settings, self.dataset
        return Training(
            model,
            data.x_train,
            y,
            lesson.logits if lesson else None,
            teacher_features=lesson.features if lesson else None,
            batch_size=s.batch_size,
            optimizer=s.optimizer,
            schedule=s.schedule,
            clip=s.clip,
            sampling=s.sampling,
            shift=Shift.of(data, shift, seed) if shift else None,
            seed=seed,
            validation=(data.x_validation, data.y_validation),
            patience=s.patience,
            **how,
        )

    def _trained(self) -> int:
        """Models that were trained so far."""
        own_teacher = self._teacher is None and self.settings.mode == "offline"
        return sum(1 for _, name, _ in self._models if name != ENSEMBLE and (name != TEACHER or own_teacher))

    def _keep(
        self, situation: str, name: str, seed: int, model: Any, scores: np.ndarray | None, teacher: np.ndarray | None
    ) -> None:
        """Measure a model by its scores of the test part, and against those of its teacher."""
        kept = Trained(model)
        if scores is not None:
            y = self.dataset.y_test
            kept.test_accuracy, kept.test_nll = metrics.accuracy(scores, y), metrics.negative_log_likelihood(scores, y)
            kept.test_ece = metrics.expected_calibration_error(scores, y)
            self._warn_if_nothing_was_learned(situation, name, seed, kept.test_nll)
        if scores is not None and teacher is not None:
            kept.agreement = metrics.agreement(scores, teacher)
            kept.kl_to_teacher = metrics.kl_to_teacher(scores, teacher)
        self._models[situation, name, seed] = kept
        self._seconds = time.monotonic() - self._started
        if self._on_model is not None:
            self._on_model()

    def _warn_if_nothing_was_learned(self, situation: str, name: str, seed: int, nll: float) -> None:
        if not nll < 10 * math.log(self.dataset.classes):
            where = ", ".join(filter(None, (f"seed {seed}", situation, name)))
            message = f"{where} did not learn (negative log-likelihood {nll:.3g}); try a lower learning rate."
            warnings.warn(message, stacklevel=3)

    # --- what came out ---

    def _complete_seeds(self) -> list[int]:
        """The seeds for which every model of every situation is there."""
        wanted = [(s, n) for s in self.situations for n in self._names()]
        return [seed for seed in self.settings.seeds if all((s, n, seed) in self._models for s, n in wanted)]

    def _names(self) -> list[str]:
        """The models of a situation, as they are trained."""
        s = self.settings
        links = [f"{ASSISTANT} {k + 1}" for k in range(len(s.assistant_sizes()))]
        links += [f"{GENERATION} {k}" for k in range(1, s.generations)]
        return [ALONE] * self.alone + links + [DISTILLED] + [ENSEMBLE] * (s.generations > 1)

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
            teacher_on_validation=self._teacher_on_validation,
        )

    def _model(self, situation: str, name: str, seed: int) -> Any:
        """A trained model, made to take raw features."""
        kept = self._models.get((situation, name, seed))
        if kept is None:
            return None
        given = name == TEACHER and self._teacher is not None  # which has a scale of its own
        if isinstance(kept.model, Module) and not given:
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
            **_on_gpu(),
            "few_labels": situations[1] if len(situations) > 1 else None,
        }

    def _plain_settings(self) -> dict[str, Any]:
        """The settings as JSON knows them; null where an object was given in their place."""
        computed = {"backend": current_backend(), "precision": matmul_precision().name}
        settings = dataclasses.asdict(self.settings) | computed
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        none = ["data"] * self._given_data + ["student"] * (self._student is not None)
        none += ["teacher"] * (self._given_teacher is not None)
        if self._teacher is not None or self._named_trainer:
            none += [name for name in plain if name.startswith("teacher_")]
        return plain | dict.fromkeys(none)

    def _situation(self, situation: str, labels: int, seeds: list[int]) -> dict[str, Any]:
        s = self.settings
        teacher = self._figures("", TEACHER, seeds)
        alone = self._figures(situation, ALONE, seeds) if self.alone else None
        distilled = self._figures(situation, DISTILLED, seeds)
        before, after = (alone["test_accuracy"], distilled["test_accuracy"]) if alone else ([], [])
        between = {
            f"{kind}s": [self._figures(situation, name, seeds) for name in self._names() if name.startswith(kind)]
            for kind in (ASSISTANT, GENERATION)
        }
        ensemble = self._figures(situation, ENSEMBLE, seeds) if ENSEMBLE in self._names() else None
        return {
            "labels": labels or "all",
            "objective": str(self.objective),
            "temperature": s.temperature,
            "hard_weight": s.hard_weight,
            "soft_weight": s.soft_weight,
            "teacher": teacher,
            "student_alone": alone,
            **between,
            "student_distilled": distilled,
            "ensemble": ensemble,
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


def _on_gpu() -> dict[str, Any]:
    """What the report says of the GPU that was computed on; nothing where there was none."""
    memory = memory_in_use()
    return {} if memory is None else {"gpu_memory": memory._asdict()}


def _without_teacher(objective: Objective) -> Objective:
    """What the student alone is trained on: the objective's hard labels, with all the weight."""
    hard = next((term for term in objective.terms if isinstance(term, HardLabels)), HardLabels())
    return dataclasses.replace(hard, weight=1.0, weight_schedule=None)


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


def _are_sizes(value: Any) -> bool:
    """Whether an argument is a list of layer sizes, and not a model, a path or a list of teachers."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(hasattr(v, "__index__") for v in value)


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
    given |= {n: tuple(v) for n, v in (("teacher", teacher), ("student", student)) if _are_sizes(v)}
    given |= {"teacher": str(teacher)} if isinstance(teacher, str | os.PathLike) else {}
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
    objective: Objective | str | None = None,
    alone: bool = True,
    allow_pickle: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    **settings: Any,
) -> DistillResult:
    """Distil a teacher into a student, and say whether it did better than the same student alone.

    With no arguments: a teacher and a small student on the built-in digits, over five paired seeds, with all labels
    and with 100 of them.

    Parameters
    ----------
    teacher : anything that `as_teacher` takes (a trained Module, a function from raw features (n, k) to logits (n, c),
        an estimator, a file, a list of these), or hidden layer sizes such as (256, 256), or "rf", "gbt" or "mlp", to
        train one for each seed; None for the default sizes.
    student : a Module, trained in place from the weights that it has, or hidden layer sizes; None for the default.
    data : a built-in name, a path, a tuple of arrays (x, y) or (x_train, y_train, x_test, y_test), or a Dataset.
        Labels of -1 are unknown: those rows only feel the soft term.
    temperature, hard_weight, soft_weight : of `functional.distillation_loss`.
    epochs, batch_size, optimizer, lr : of the student; optimizer is "sgd", "nesterov", "adam" or "adamw".
    seed : of initial weights and of the order of the rows, for a single comparison.
    seeds : several of them, for a verdict with an interval. By default five, but one for a student that is a Module.
    labels : also compare with only so many rows labelled for the student; 0 leaves that out. By default 100 when
        nothing was given, else 0.
    objective : terms in place of hard and soft labels with their weights, such as
        ``HardLabels(0.3) + ReverseKL(0.7)`` of `minikd.objectives`, or the same as text.
    alone : train the student without the teacher too, which the verdict needs and which doubles the time.
    allow_pickle : whether the teacher's file may be a pickle, which runs whatever code it holds.
    on_progress : called with a `Progress` about ten times a second.
    on_step : called with a `training.StepReport` for each step of each training.
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
        **({"objective": objective} if isinstance(objective, str) else {}),
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
        teacher=None if _are_sizes(teacher) or isinstance(teacher, str | os.PathLike) else teacher,
        student=None if _are_sizes(student) else student,
        objective=None if isinstance(objective, str) else objective,
        alone=alone,
        allow_pickle=allow_pickle,
        on_progress=on_progress,
        on_step=on_step,
    )
    experiment.run()
    return experiment.result()


vars(distill)["correct_bias"] = correct_bias  # reachable as kd.distill.correct_bias too
