"""How a run tells where it is: bars on a terminal with rich, else a plain line for each model."""

from __future__ import annotations

import time
from typing import Any, TextIO

from minikd.distillation import Progress
from minikd.report.table import has_rich

SECONDS_BETWEEN_LINES = 10.0  # of a training that takes longer than this


class Watcher:
    """Is called with each `Progress` of an experiment, inside a with statement; this one only remembers the last."""

    last: Progress | None = None

    def __enter__(self) -> Watcher:
        self.began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put away."""

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        self.tell(progress)

    def tell(self, progress: Progress) -> None:
        """Show where the experiment is; nothing here."""


def training_in_words(p: Progress) -> str:
    """What is being trained, such as "seed 0, 100 labels, student distilled"."""
    return ", ".join(filter(None, (f"seed {p.seed}", p.situation, p.model)))


def figures_in_words(p: Progress) -> str:
    """The loss, if it is known, and the validation accuracy once there is one."""
    loss = "" if p.loss is None else f"loss {p.loss:.3f}"
    accuracy = "" if p.accuracy is None else f"validation {100 * p.accuracy:.1f} %"
    return ", ".join(filter(None, (loss, accuracy)))


class Lines(Watcher):
    """One line for each trained model, and for a long training one every few seconds; no control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._told = stream, time.monotonic()

    def tell(self, progress: Progress) -> None:
        finished = progress.step == progress.steps
        now = time.monotonic()
        if not finished and now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        count = f"{progress.trainings_done + finished:{len(str(progress.trainings))}}/{progress.trainings}"
        epoch = "" if finished else f", epoch {progress.epoch}/{progress.epochs}"
        text = f"{count}  {training_in_words(progress)}{epoch}: {figures_in_words(progress)}"
        print(f"{text}  ({now - self.began:.1f} s)", file=self._stream, flush=True)


class Bars(Watcher):
    """Two bars, of the whole experiment and of the present training; they vanish at the end."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[figures]}"))
        console = Console(file=stream)
        self._bars: Any = RichProgress(*columns, console=console, transient=True, expand=True, refresh_per_second=5)
        self._first_seed: int | None = None
        self._whole = self._bars.add_task("all trainings", total=None, figures="")
        self._present = self._bars.add_task("", total=None, figures="")

    def __enter__(self) -> Watcher:
        self._bars.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def tell(self, progress: Progress) -> None:
        p = progress
        done = p.trainings_done + p.step / p.steps
        self._first_seed = p.seed if self._first_seed is None else self._first_seed
        passed = time.monotonic() - self.began
        clock = f"{_clock(passed)} so far"
        if p.seed != self._first_seed:  # a teacher takes longer than a student: one whole seed is the first fair sample
            clock = f"about {_clock(passed * (p.trainings - done) / done)} left"
        whole = f"{p.trainings_done} of {p.trainings} done, {clock}"
        self._bars.update(self._whole, total=p.trainings, completed=done, figures=whole)
        what, figures = training_in_words(p), figures_in_words(p)
        self._bars.update(self._present, description=what, total=p.steps, completed=p.step, figures=figures)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def watch(stream: TextIO, quiet: bool = False) -> Watcher:
    """The watcher that suits a stream: bars on a terminal with rich, else lines, or nothing at all."""
    return Watcher() if quiet else Bars(stream) if has_rich(stream) else Lines(stream)
