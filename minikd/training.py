"""Training one model: the loop, what it measures on its way, and what it takes to stop it and go on."""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np

from minikd import functional as F
from minikd import metrics
from minikd.augmentation import Shift
from minikd.data import batches
from minikd.data.batches import balanced_batches
from minikd.errors import ArgumentError, DivergenceError, ShapeError
from minikd.feed import Feed
from minikd.kernels import as_index
from minikd.kernels.arrays import here, here_too, host_copy, on_device, to_host
from minikd.kernels.threads import blas_threads_for
from minikd.nn import Module, Sequential
from minikd.objectives import Batch, HardLabels, Objective, SoftLabels, as_target
from minikd.optim import OPTIMIZERS, SCHEDULES, Optimizer
from minikd.peers import Peers
from minikd.steps import Step, compile
from minikd.tape import no_grad
from minikd.tensor import Tensor
from minikd.terms import TermFigures, TermMeter, names_of

__all__ = ["SAMPLINGS", "Epoch", "Keeper", "StepReport", "Training", "fit", "training_step"]

SECONDS_BETWEEN_REPORTS = 0.1
SAMPLINGS = ("shuffled", "balanced")
BEST = {"epoch": int, "accuracy": float, "nll": float}  # what is kept of the best epoch
ROWS_TO_PREPARE = 8  # that objectives see of the layers' sizes before the training


class Epoch(NamedTuple):
    """What a training tells of itself, about ten times a second and at each epoch's end (`finished`).

    loss : the mean of the epoch's steps so far.  lr : the learning rate at present.
    validation : {"accuracy", "nll"} at an epoch's end, where there is a validation part.
    terms : the figures of each term on the epoch's last full batch, at an epoch's end, where there are several.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    finished: bool
    validation: Mapping[str, float] | None = None
    terms: tuple[TermFigures, ...] = ()


class StepReport(NamedTuple):
    """One step that was taken: its number from 1, its loss and its learning rate."""

    step: int
    loss: float
    lr: float


class Keeper(Protocol):
    """What keeps a training's state somewhere safe (`minikd.checkpoints.Checkpoint`, for one).

    every : steps between two calls of `keep`; 0 for each epoch's end.

    One that has a method `alone()` is held by the context manager that it gives, while a training runs: so that no two
    trainings keep their states in one place.
    """

    every: int

    def keep(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keep this state; the one before may go once this one is safe."""

    def kept(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None:
        """The last state that was kept, or None."""


def endless_batches(
    rows: np.ndarray, batch_size: int, seed: int, start: int = 0, classes: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Batches of these row numbers, shuffled anew in each pass, for ever, from the batch number `start` on.

    With `classes`, the class id of each of these rows, all classes come equally often (see `balanced_batches`).
    """
    size = min(batch_size, len(rows))
    if classes is not None:
        yield from (rows[picked] for picked in balanced_batches(classes, size, seed=seed, start=start))
    epoch, within = divmod(start, math.ceil(len(rows) / size))
    while True:
        for picked in itertools.islice(batches(len(rows), size, seed=seed, epoch=epoch), within, None):
            yield rows[picked]
        epoch, within = epoch + 1, 0


def loss_of(model: Module, objective: Objective, inputs: Any, soft: Any, target: Any, hints: Sequence[Any]) -> Any:
    """The loss of a batch: of network inputs, the teacher's logits, class ids, and the teacher's layers' outputs."""
    if isinstance(model, Peers):
        return model.mutual_loss(objective, inputs, target)
    names = objective.student_layers
    logits, features = model(inputs, features=names) if names else (model(inputs), {})
    teacher_features = dict(zip(objective.teacher_layers, hints, strict=False))
    return objective(Batch(logits, soft, target, features, teacher_features))


def training_step(
    model: Module,
    opt: Optimizer,
    x: Any,
    y: Any,
    teacher_logits: Any,
    objective: Objective,
    *,
    hints: Sequence[Any] = (),
    shift: Shift | None = None,
) -> Step:
    """A compiled step: given a batch's row numbers, the learning rate and the objective's varying numbers, it learns.

    Features, labels and what the teacher says stay where they are; the step gathers those of its rows.
    """

    @compile(fallback=True)
    def step(picked: Any, rate: Any, *numbers: Any) -> Any:
        opt.lr = rate
        inputs = F.take(x, picked)
        if shift is not None:
            inputs = shift(inputs)
        soft = None if teacher_logits is None else F.take(teacher_logits, picked)
        layers = [F.take(hint, picked) for hint in hints]
        present = objective.at(numbers) if numbers else objective
        loss = loss_of(model, present, inputs, soft, F.take(y, picked), layers)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    compiled: Step = step
    return compiled


class Training:
    """One training of one model: `run` it, stop it at any step, and take it up again with the same bits.

    Parameters and errors are those of `fit`.

    Attributes
    ----------
    model, objective : what is trained; the objective is a copy, for it may learn along.
    step : steps taken so far.  steps : of the whole training.
    history : for each finished epoch a dict of its figures.
    stopped_early : whether the validation part ended it before its last epoch.
    """

    def __init__(
        self,
        model: Module,
        x: np.ndarray,
        y: np.ndarray,
        teacher_logits: np.ndarray | None = None,
        *,
        objective: Objective | None = None,
        teacher_features: Mapping[str, np.ndarray] | None = None,
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
        clip: float = 0.0,
        sampling: str = "shuffled",
        shift: Shift | None = None,
        seed: int = 0,
        validation: tuple[np.ndarray, np.ndarray] | None = None,
        patience: int = 0,
        on_epoch: Callable[[Epoch], Any] | None = None,
        on_step: Callable[[StepReport], Any] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        _check_lengths(x, y, teacher_logits)
        if objective is None:
            both = HardLabels(hard_weight) + SoftLabels(soft_weight, temperature=temperature)
            objective = HardLabels() if teacher_logits is None else both
        taught = teacher_logits is not None or isinstance(model, Peers)
        self._check(objective, y, taught, teacher_features, sampling, patience, validation)
        self.model, self.objective = model, copy.deepcopy(objective)
        self.epochs, self.per_epoch = epochs, math.ceil(len(x) / batch_size)
        self.steps, self.step = epochs * self.per_epoch, 0
        self.validation, self.patience = validation, patience
        self.history: list[dict[str, Any]] = []
        self.stopped_early = False
        self._on_epoch, self._on_step, self._keeper = on_epoch, on_step, keeper
        self._batch_size, self._sampling, self._seed, self._lr = batch_size, sampling, seed, lr
        self._rate, self._shift = SCHEDULES[schedule](self.steps), shift
        everywhere = self.objective.needs_teacher or isinstance(model, Peers)
        self._rows = np.arange(len(x)) if everywhere else np.flatnonzero(y != -1)
        self._prepare(x, y, teacher_logits, teacher_features)
        options = {"weight_decay": weight_decay, "clip": clip}
        given = {name: value for name, value in options.items() if value}
        parameters = [*model.parameters(), *self.objective.parameters()]
        self._opt = OPTIMIZERS[optimizer](parameters, lr, max_norm=max_norm or None, **given)
        self._varying = self.objective.varying()
        inputs, target, soft, *hints = self._feed.arrays
        self._take = training_step(model, self._opt, inputs, target, soft, self.objective, hints=hints, shift=shift)
        self._losses = np.zeros(self.per_epoch)  # of the present epoch's steps
        self._measured = np.empty(0, np.int64)  # the rows of the epoch's last full batch
        self._best: dict[str, Any] | None = None
        self._best_values = np.empty(0)
        self._meter: TermMeter | None = None
        self._told = time.monotonic()

    # --- what it is made of ---

    @staticmethod
    def _check(
        objective: Objective, y: Any, taught: bool, features: Any, sampling: str, patience: int, validation: Any
    ) -> None:
        if _needs_logits(objective) and not taught:
            expected, got = "there for an objective that compares with a teacher", f"none for {objective}"
            raise ArgumentError("fit", "teacher_logits", expected=expected, got=got)
        if not objective.needs_teacher and not (np.asarray(y) != -1).any():
            raise ArgumentError("fit", "y", expected="at least one label where there is no teacher", got="none")
        missing = [name for name in objective.teacher_layers if name not in (features or {})]
        if missing:
            expected = "the teacher's layers that the objective compares"
            raise ArgumentError("fit", "teacher_features", expected=expected, got=f"none of {', '.join(missing)}")
        if sampling not in SAMPLINGS:
            raise ArgumentError("fit", "sampling", expected="one of " + ", ".join(SAMPLINGS), got=repr(sampling))
        if patience and validation is None:
            fix = "Give validation=(x, y), or patience=0."
            raise ArgumentError("fit", "validation", expected="there for early stopping", got="None", fix=fix)

    def _prepare(self, x: np.ndarray, y: np.ndarray, soft: Any, features: Any) -> None:
        """The arrays in the model's dtype, and whatever the objective makes of a first look at a few rows."""
        real, theirs = self.model.parameters()[0].dtype, self.objective.teacher_layers
        logits = None if soft is None else np.ascontiguousarray(soft, real)
        self._target = as_target(as_index("fit", "y", y))
        hints = [np.ascontiguousarray(features[name], real) for name in theirs]
        self._feed = Feed([np.ascontiguousarray(x, real), self._target, logits, *hints], self._batch_size)
        names = self.objective.student_layers
        if names or theirs:
            inputs, few_logits, target, few_hints = self.batch(np.arange(min(len(x), ROWS_TO_PREPARE)))
            was_training = self.model.training
            output, found = self.model.eval()(inputs, features=names)
            self.model.train(was_training)
            self.objective.prepare(Batch(output, few_logits, target, found, dict(zip(theirs, few_hints, strict=True))))

    # --- the loop ---

    def run(self, epochs: int | None = None) -> Training:
        """Take the steps that are left, from the state that was kept if there is a keeper with one; returns self.

        epochs : of these, take only so many; a later call goes on.

        Raises
        ------
        DivergenceError : a loss or a weight is no longer finite; the model has the weights from before that step.
        OutputError : another training keeps its state where this one's keeper does, or it cannot be written there.
        """
        with getattr(self._keeper, "alone", nullcontext)():
            self._run(epochs)
        _warn_of_slow_steps(self._take)
        return self

    def _run(self, epochs: int | None) -> None:
        kept = None if self._keeper is None else self._keeper.kept()
        if kept is not None:
            self.restore(*kept)
        self.model.train()
        last = self.steps if epochs is None else min(self.steps, self.step + epochs * self.per_epoch)
        with blas_threads_for(self._batch_size * max(p.size for p in self.model.parameters())):
            batches = self._batches(self.step)
            while self.step < last and not self.stopped_early:
                self._run_epoch(batches)
        if self._best is not None and (self.step == self.steps or self.stopped_early):
            self._opt.arena.values[...] = here_too(self._best_values, self._opt.arena.values)
        self.model.eval()

    def _batches(self, start: int) -> Iterator[np.ndarray]:
        """The batches from this step on."""
        classes = self._target[self._rows] if self._sampling == "balanced" else None
        return endless_batches(self._rows, self._batch_size, self._seed, start, classes)

    def _run_epoch(self, batches: Iterator[np.ndarray]) -> None:
        before = self.state()
        first = self.step
        if first % self.per_epoch == 0:
            self._measured = np.empty(0, np.int64)
        try:
            self._take_steps(batches, before, first)
        except ArgumentError:
            if here.on_device:  # which refused it after the steps behind it
                self.restore(*before)
            raise
        if not self._finite_weights():
            raise self._diverged(before, first)
        finished = self._finish_epoch()
        self._keep()
        self._tell(finished)

    def _take_steps(self, batches: Iterator[np.ndarray], before: Any, first: int) -> None:
        """The steps that are left of the present epoch."""
        end = (self.step // self.per_epoch + 1) * self.per_epoch
        while self.step < end:
            stop = min(end, self._next_checkpoint())
            for _, group in itertools.groupby(itertools.islice(batches, stop - self.step), len):
                batch = np.stack(list(group))
                self._measured = batch[-1] if len(batch[-1]) >= len(self._measured) else self._measured
                for losses in self._steps_on(batch, self._numbers(self.step, len(batch))):
                    self._took(losses, before, first)
            if self.step < end:
                self._keep()

    def _steps_on(self, batches: np.ndarray, numbers: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Take a step on each of these batches (steps, rows), and give the losses in portions, on the host.

        Losses that lie on a GPU are looked at when somebody is told of them, or at the end.
        """
        waiting: list[Any] = []
        for start, stop, picked in self._feed.portions(batches):
            for losses in self._take.portions(picked, *(column[start:stop] for column in numbers)):
                waiting.append(losses)
                if not on_device(losses) or self._time_to_tell():
                    yield _fetched(waiting)
                    waiting = []
        if waiting:
            yield _fetched(waiting)

    def _time_to_tell(self) -> bool:
        """Whether somebody wants to hear of the progress, and did not for a while."""
        told = self._on_epoch is not None or self._on_step is not None
        return told and time.monotonic() - self._told > SECONDS_BETWEEN_REPORTS

    def _finite_weights(self) -> bool:
        values = self._opt.arena.values
        return bool(to_host(here.xp.isfinite(values).all()) if on_device(values) else np.isfinite(values).all())

    def _next_checkpoint(self) -> int:
        every = 0 if self._keeper is None else self._keeper.every
        return (self.step // every + 1) * every if every else self.steps

    def _keep(self) -> None:
        if self._keeper is not None:
            self._keeper.keep(*self.state())

    def _numbers(self, first: int, count: int) -> list[np.ndarray]:
        """The learning rate and the objective's varying numbers in each of these steps."""
        steps = range(first, first + count)
        progress = [step / max(1, self.steps - 1) for step in steps]
        rates = np.array([self._lr * self._rate(step) for step in steps])
        return [rates, *(np.array([place.at(p) for p in progress]) for place in self._varying)]

    def _took(self, losses: np.ndarray, before: Any, first: int) -> None:
        """Note the losses of steps that were taken."""
        within = self.step % self.per_epoch
        self._losses[within : within + len(losses)] = losses
        self.step += len(losses)
        if not np.isfinite(losses).all():
            raise self._diverged(before, first)
        if self._on_step is not None:
            begin = self.step - len(losses)
            for step, loss in enumerate(losses.tolist(), begin):
                self._on_step(StepReport(step + 1, loss, self._lr * self._rate(step)))
        if self._time_to_tell():
            self._tell(self._where())

    def _tell(self, epoch: Epoch) -> None:
        self._told = time.monotonic()
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def _where(self) -> Epoch:
        """Where the training is."""
        epoch, within = divmod(self.step - 1, self.per_epoch)
        loss = float(self._losses[: within + 1].mean())
        return Epoch(epoch + 1, self.epochs, self.step, self.steps, loss, self._opt.lr, False)

    def _finish_epoch(self) -> Epoch:
        """Measure, note and judge an epoch that is through."""
        where = self._where()._replace(finished=True, validation=self._validated(), terms=self._terms())
        facts = {"epoch": where.epoch, "lr": where.lr, "loss": where.loss}
        facts |= {f"validation_{name}": value for name, value in (where.validation or {}).items()}
        terms = [{"term": t.term, "value": t.value, "gradient_share": t.share} for t in where.terms]
        self.history.append({**facts, "terms": terms})
        if self.patience and where.validation is not None:
            self._judge(where.epoch, where.validation)
        return where

    def _validated(self) -> dict[str, float] | None:
        if self.validation is None:
            return None
        x, y = self.validation
        scores = self.model.logits(x, normalised=True)
        return {"accuracy": metrics.accuracy(scores, y), "nll": metrics.negative_log_likelihood(scores, y)}

    def _terms(self) -> tuple[TermFigures, ...]:
        """Each term's figures on the epoch's last full batch; nothing where there is a single term."""
        if len(self.objective.terms) < 2:
            return ()
        if self._meter is None:
            self._meter = TermMeter(self.model, self.objective, loss_of)
        return self._meter.measure(self._present(), *self.batch(self._measured))

    def _present(self) -> list[float]:
        """The varying numbers of the step that was taken last."""
        return [float(column[0]) for column in self._numbers(max(0, self.step - 1), 1)[1:]]

    @property
    def progress(self) -> float:
        """Where schedules are, from 0 to 1: at the step that was taken last, or at the first."""
        return max(0, self.step - 1) / max(1, self.steps - 1)

    def first_rows(self) -> np.ndarray:
        """The row numbers of the first batch."""
        return next(self._batches(0))

    def batch(self, picked: np.ndarray) -> tuple[Any, ...]:
        """Inputs, teacher's logits, targets and teacher's layers of these rows."""
        x, target, soft, *hints = self._feed.rows(picked)
        return x, soft, target, hints

    # --- early stopping ---

    def _judge(self, epoch: int, validation: Mapping[str, float]) -> None:
        """Remember the best epoch, by accuracy and then by likelihood, and stop where it lies too far back."""
        figures = {"epoch": epoch, "accuracy": validation["accuracy"], "nll": validation["nll"]}
        best = self._best
        if best is None or (figures["accuracy"], -figures["nll"]) > (best["accuracy"], -best["nll"]):
            self._best, self._best_values = figures, host_copy(self._opt.arena.values)
        elif epoch - best["epoch"] >= self.patience:
            self.stopped_early = True

    # --- stopping and going on ---

    def _counters(self) -> dict[str, np.ndarray]:
        """The counters that random masks and shifts depend on, where they are."""
        shift = {} if self._shift is None else {f"shift.{k}": v for k, v in self._shift.counters().items()}
        return {**self.model.counters(), **shift}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that the rest of the training depends on: arrays by name, and facts that JSON can hold."""
        tensors = {
            "values": host_copy(self._opt.arena.values),
            "losses": self._losses.copy(),
            "measured": self._measured,
        }
        tensors |= {f"optimizer.{name}": np.asarray(value) for name, value in self._opt.state_dict().items()}
        tensors |= {f"counter.{name}": counter.copy() for name, counter in self._counters().items()}
        if self._best is not None:
            tensors["best"] = self._best_values
        facts = {"step": self.step, "best": self._best, "stopped_early": self.stopped_early, "history": self.history}
        return tensors, {**facts, "history": list(self.history)}

    def restore(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Go back to a state that `state` gave, of this training or of one with the same arguments.

        Raises
        ------
        ArgumentError, ShapeError : it is that of another training.
        """
        values = self._opt.arena.values
        if not self._fits(tensors, facts):
            fix = "Take it up with the settings and the data that it was begun with."
            raise ArgumentError("fit", "the state", expected="that of the same training", got="another one", fix=fix)
        prefix = "optimizer."
        self._opt.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
        values[...] = here_too(tensors["values"], values)
        for p in self._opt.arena.parameters:
            p.changed_in_place()
        self._losses[...] = tensors["losses"]
        self._measured = np.array(tensors["measured"])
        for name, counter in self._counters().items():
            counter[...] = tensors[f"counter.{name}"]
        self.step, self._best = facts["step"], facts["best"]
        self._best_values = np.array(tensors["best"]) if self._best is not None else np.empty(0)
        self.stopped_early, self.history = facts["stopped_early"], list(facts["history"])

    def _fits(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> bool:
        """Whether a state, which may come from a damaged file, has all that `restore` reads as `state` gives it."""
        own: dict[str, Any] = {"values": self._opt.arena.values, "losses": self._losses}
        own |= {f"counter.{name}": counter for name, counter in self._counters().items()}
        if {name for name in tensors if name.startswith("counter.")} | {"values", "losses"} != set(own):
            return False
        best, history, measured = facts.get("best"), facts.get("history"), tensors.get("measured")
        if best is not None:
            own["best"] = own["values"]
            if not isinstance(best, dict) or [type(best.get(name)) for name in BEST] != list(BEST.values()):
                return False
        alike = all(n in tensors and (tensors[n].shape, tensors[n].dtype) == (v.shape, v.dtype) for n, v in own.items())
        if not alike or measured is None or measured.ndim != 1 or measured.dtype != np.int64:
            return False
        inside = ((measured >= 0) & (measured < len(self._target))).all()
        step, told = facts.get("step"), isinstance(history, list) and all(isinstance(row, dict) for row in history)
        in_time = type(step) is int and 0 <= step <= self.steps
        return bool(inside and told and in_time and "best" in facts and isinstance(facts.get("stopped_early"), bool))

    # --- the guard against NaN ---

    def _diverged(self, before: Any, first: int) -> DivergenceError:
        """Take the epoch's steps again, one at a time, up to the one that spoils the weights, and say what it was."""
        self.restore(*before)
        batches, rates = self._batches(self.step), self._numbers(first, self.per_epoch - first % self.per_epoch)
        for k, picked in enumerate(itertools.islice(batches, len(rates[0]))):
            good = self.state()
            loss = self._loss_of_step(picked, [column[k, ...] for column in rates])
            if not math.isfinite(loss) or not self._finite_weights():
                break
            self._losses[self.step % self.per_epoch] = loss
            self.step += 1
        self.restore(*good)
        got = f"{loss:g}" if not math.isfinite(loss) else f"a loss of {loss:g} and weights that are not finite"
        culprit = self._culprit(picked)
        self.model.eval()
        epoch = self.step // self.per_epoch + 1
        fix = f"The model has the weights from before it. Try a lower learning rate than {self._lr:g}, or clip=1."
        return DivergenceError(
            "fit",
            f"the loss of step {self.step + 1} (epoch {epoch} of {self.epochs})",
            expected="finite, and leave finite weights",
            got=got + (f"; {culprit}" if culprit else ""),
            fix=fix,
        )

    def _loss_of_step(self, picked: np.ndarray, numbers: Sequence[np.ndarray]) -> float:
        """Take one step on these rows."""
        ((_, _, rows),) = self._feed.portions(picked[None])
        return float(to_host(self._take(rows[0], *numbers).array))

    def _culprit(self, picked: np.ndarray) -> str:
        """The first layer, input or term that is not finite on these rows, in words."""
        batch = self.batch(picked)
        inputs, _, soft, *hints = self._feed.on_host(picked)
        for name, array in (("the features", inputs), ("the teacher's logits", soft), *(("a hint", h) for h in hints)):
            if array is not None and (np.isnan(array) | (array == np.inf)).any():
                row = int(picked[np.argwhere(~np.isfinite(array))[0, 0]])
                return f"row {row} of {name} is not finite"
        outputs = outputs_by_layer(self.model, batch[0])
        broken = next((name for name, array in outputs.items() if not np.isfinite(array).all()), "")
        losses, gradients = TermMeter(self.model, self.objective, loss_of).gradients(self._present(), *batch)
        said = [f"the output of layer {broken} is not finite"] if broken else []
        for name, loss, row in zip(names_of(self.objective.terms), losses, gradients, strict=True):
            if not math.isfinite(loss):
                said.append(f"the term {name} is {loss:g}")
            elif not np.isfinite(row).all():
                said.append(f"the gradient of the term {name} is not finite, first in {self._parameter_at(row)}")
        if not said:
            said.append(f"the step itself is too large, first in {self._parameter_at(self._update(picked))}")
        return "; ".join(said)

    def _update(self, picked: np.ndarray) -> np.ndarray:
        """The weights after this step, which is undone again."""
        good = self.state()
        self._loss_of_step(picked, [column[0, ...] for column in self._numbers(self.step, 1)])
        after: np.ndarray = host_copy(self._opt.arena.values).astype(np.float64)
        self.restore(*good)
        return after

    def _parameter_at(self, row: np.ndarray) -> str:
        """The parameter that holds the first number of this row that is not finite."""
        place = int(np.argmax(~np.isfinite(row)))
        named = [*self.model.named_parameters(), *((f"of the objective, {k}", p) for k, p in self._learned())]
        for name, p in named:
            if place < p.size:
                return f"the parameter {name}"
            place -= p.size
        return "no parameter"

    def _learned(self) -> list[tuple[str, Any]]:
        return [(str(k), p) for k, p in enumerate(self.objective.parameters())]


def outputs_by_layer(model: Module, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What each layer puts out, in evaluation mode, as far as the model shows it: all of a Sequential's layers."""
    if isinstance(model, Peers):
        found = {name: outputs_by_layer(member, inputs) for name, member in model.children()}
        return {f"{peer}.{name}": array for peer, outputs in found.items() for name, array in outputs.items()}
    was_training = model.training
    try:
        with no_grad(), np.errstate(all="ignore"):
            if not isinstance(model.eval(), Sequential):
                return {"the last": _array_of(model(inputs))}
            outputs = model(inputs, features=[name for name, _ in model.children()])[1]
            return {name: _array_of(output) for name, output in outputs.items()}
    finally:
        model.train(was_training)


def _array_of(output: Any) -> np.ndarray:
    return output.numpy() if isinstance(output, Tensor) else np.asarray(to_host(output))


def _fetched(portions: Sequence[Any]) -> np.ndarray:
    """Losses (steps,) of several portions, on the host."""
    xp = here.xp
    return np.asarray(to_host(portions[0] if len(portions) == 1 else xp.concatenate(portions)))


def _needs_logits(objective: Objective) -> bool:
    """Whether a term compares with the teacher's logits, and not only with its layers."""
    return any("teacher" in term.needs and not term.teacher_layers for term in objective.terms)


def _check_lengths(x: Any, y: Any, teacher_logits: Any) -> None:
    if len(x) != len(y) or (teacher_logits is not None and len(teacher_logits) != len(x)):
        got = f"{len(x)} and {len(y)}" + ("" if teacher_logits is None else f" and {len(teacher_logits)}")
        raise ShapeError("fit", "x, y and teacher_logits", expected="of the same length", got=got)


def _warn_of_slow_steps(step: Step) -> None:
    """Say if a model's step could not be replayed, since it costs its user time."""
    if step.refusals:
        warnings.warn(f"every step of this training ran without a plan. {step.refusals[0]}", stacklevel=3)


def fit(
    model: Module, x: np.ndarray, y: np.ndarray, teacher_logits: np.ndarray | None = None, **options: Any
) -> Training:
    """Train a model in place, on hard labels alone or with what a teacher says; returns the finished `Training`.

    Parameters
    ----------
    model : its parameters move into the optimizer's arena.
    x : (n, k) network inputs.  y : (n,) class ids, -1 for rows without a label.
    teacher_logits : (n, c), or None: then rows without a label are left out, and the steps are as many as if they
        were there, so that a comparison is between equal budgets.
    objective : see `minikd.objectives`; by default HardLabels(hard_weight) + SoftLabels(soft_weight, temperature) with
        a teacher, and HardLabels() without.
    teacher_features : name of a teacher's layer → its output (n, h), for objectives that compare layers.
    temperature, hard_weight, soft_weight : 4, 0.5 and 0.5, of the default objective.
    epochs, batch_size : epochs·⌈n / batch_size⌉ steps; 60 and 64.
    optimizer, schedule : names in `optim.OPTIMIZERS` and `optim.SCHEDULES`; "adam" and "cosine".
    lr : at the schedule's start; 0.003.
    weight_decay, max_norm : 0 for none; with "adamw" a weight decay of 0 leaves that optimizer's own default, 0.01.
    clip : the largest L2 norm of the whole gradient; larger ones are scaled down to it. 0 for none.
    sampling : "shuffled", each row once in an epoch; "balanced", each class equally often.
    shift : moves the images of each batch at random (`nn.Shift`), or None.
    seed : of the order of the rows.
    validation : (x, y) that are measured after each epoch.
    patience : stop after so many epochs in a row without a better validation accuracy (or the same with a better
        likelihood), and go back to the best epoch's weights; 0 for never.
    on_epoch : told of the progress (`Epoch`).  on_step : told of each step (`StepReport`), some 50 ms of them at once.
    keeper : keeps the state at each epoch's end or every so many steps, and hands it back to a later call of `fit`
        with the same arguments, which then goes on to the same bits.

    Raises
    ------
    ArgumentError : no row has a label and there is no teacher; an option does not fit.  ShapeError : lengths differ.
    DivergenceError : a loss or a weight is not finite any more; it names the step, the term and the layer, and the
        model has the weights from before that step.
    """
    return Training(model, x, y, teacher_logits, **options).run()
