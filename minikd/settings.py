"""Everything that one run depends on: each setting's default, what it means and what it may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minikd.errors import ArgumentError
from minikd.kernels import BACKENDS
from minikd.kernels.precision import MANTISSA
from minikd.objectives import PRESETS, HardLabels, Objective, SoftLabels, parse, preset
from minikd.ops.elementwise import ACTIVATIONS
from minikd.optim import OPTIMIZERS, SCHEDULES
from minikd.schedules import as_schedule
from minikd.training import SAMPLINGS

__all__ = ["Settings", "full_sizes", "sizes_from_text"]


SCHEDULED = ("temperature_schedule", "hard_schedule", "soft_schedule")


def option(default: Any, text: str) -> Any:
    """One setting: its default and the sentence that --help and the configuration file print."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that one run depends on; the defaults were chosen on the validation part (see bench/README.md)."""

    data: str = option("digits", "built-in name (digits, fashion-mnist), folder of IDX files, .npz or .csv file")
    label_column: str = option("label", "name of the label column of a CSV file")
    teacher: tuple[int, ...] | str = option((256, 256), "hidden layers, or what else teaches: a file, rf, gbt or mlp")
    teacher_epochs: int = option(40, "passes of the teacher over the training part")
    teacher_dropout: float = option(0.3, "probability of dropping a hidden unit of the teacher")
    teacher_input_dropout: float = option(0.0, "probability of dropping an input of the teacher")
    teacher_max_norm: float = option(0.0, "largest L2 norm of the weights into one unit of the teacher; 0 for none")
    teacher_lr: float = option(0.002, "learning rate of the teacher at its start")
    teacher_shift: int = option(0, "pixels by which the teacher's images are shifted at random; 0 for none")
    student: tuple[int, ...] = option((16,), "hidden layers of the student")
    activation: str = option("relu", "relu, gelu, tanh or sigmoid, in both networks")
    temperature: float = option(4.0, "softens teacher and student in the soft term; above 0")
    hard_weight: float = option(0.5, "weight of the cross-entropy with the labels")
    soft_weight: float = option(0.5, "weight of T²·KL(teacher ‖ student)")
    preset: str = option("", "objective of another toolkit in its defaults, in place of those above")
    objective: str = option("", "terms in place of the two above, such as HardLabels(0.3) + ReverseKL(0.7)")
    temperature_schedule: str = option("", "factor of the temperature over the training, such as linear(1, 0.25)")
    hard_schedule: str = option("", "factor of the hard weight over the training, such as warmup(0.1)")
    soft_schedule: str = option("", "factor of the soft weight over the training, such as cosine(1, 0)")
    mode: str = option("offline", "offline: a trained teacher; online: teacher and student learn from each other")
    assistants: str = option("", "hidden layers of networks between teacher and student, each the next one's teacher")
    generations: int = option(1, "students in a row, each the teacher of the next, which has the same size")
    labels: int = option(100, "rows that are labelled for the student in the second situation; 0 leaves it out")
    epochs: int = option(60, "passes of the student over the training part")
    batch_size: int = option(64, "rows in a batch; the default is lowered where there are fewer than 1,024 rows")
    optimizer: str = option("adam", "sgd, nesterov (both with momentum 0.9), adam or adamw")
    lr: float = option(0.003, "learning rate of the student at its start")
    schedule: str = option("cosine", "of the learning rate: constant, step or cosine")
    weight_decay: float = option(0.0, "weight decay of the student; 0 leaves adamw its own 0.01")
    max_norm: float = option(0.0, "largest L2 norm of the weights into one unit of the student; 0 for none")
    clip: float = option(0.0, "largest L2 norm of a gradient, in all networks; 0 for none")
    dropout: float = option(0.0, "probability of dropping a hidden unit of the student")
    shift: int = option(0, "pixels by which the student's images are shifted at random; 0 for none")
    sampling: str = option("shuffled", "of the rows: shuffled, or balanced, where all classes come equally often")
    patience: int = option(0, "stop after so many epochs without a better validation accuracy; 0 for never")
    checkpoint_every: int = option(0, "steps between two checkpoints; 0 for one after each epoch, ten a second at most")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "one paired comparison for each")
    split_seed: int = option(0, "of the division into training, validation and test part")
    backend: str = option("", "c, numba, numpy or cupy (a GPU); empty for the best that runs here on the processor")
    precision: str = option("", "of products: float32, or tf32 or bfloat16 on cupy and numpy; empty to change nothing")

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
        self._check_mode()
        self.make_objective()
        self.assistant_sizes()

    def _check_mode(self) -> None:
        """Online, a teacher and a student learn at the same time, so there is nothing between them or before them."""
        if self.mode != "online":
            return
        for name, without in (("teacher", None), ("assistants", ""), ("generations", 1)):
            value = getattr(self, name)
            if isinstance(value, str) if name == "teacher" else value != without:
                expected = "hidden layers" if name == "teacher" else "left out"
                fix = "Online, the teacher learns along with the student; use mode = offline."
                raise ArgumentError("settings", name, expected=f"{expected} in online mode", got=repr(value), fix=fix)

    def make_objective(self) -> Objective:
        """What the student is trained on: the terms of `objective`, or hard and soft labels with their weights.

        Raises
        ------
        ArgumentError : a text that is no objective or no schedule, or two things that exclude each other.
        """
        named = "preset" if self.preset else "objective" if self.objective else ""
        excluded = ("objective",) * bool(self.preset) + SCHEDULED * bool(named)
        for name in SCHEDULED:
            as_schedule("settings", name, getattr(self, name))
        for name in excluded:
            if getattr(self, name):
                fix = "Write it into the objective, such as SoftLabels(0.7, weight_schedule='cosine(1, 0)')."
                expected, got = f"left out where there is {named}", repr(getattr(self, name))
                raise ArgumentError("settings", name, expected=expected, got=got, fix=fix)
        if self.preset:
            return preset(self.preset)
        if self.objective:
            return parse(self.objective, "settings", "objective")
        hard = HardLabels(self.hard_weight, weight_schedule=self.hard_schedule or None)
        return hard + SoftLabels(
            self.soft_weight,
            temperature=self.temperature,
            weight_schedule=self.soft_schedule or None,
            temperature_schedule=self.temperature_schedule or None,
        )

    def assistant_sizes(self) -> list[tuple[int, ...]]:
        """The hidden layers of each assistant, from the teacher's side to the student's."""
        texts = [text for text in self.assistants.split(",") if text.strip()]
        try:
            return [sizes_from_text(text) for text in texts]
        except ValueError as error:
            expected, fix = "hidden layers with commas between networks", 'Write, for example: "128-128, 64".'
            got = repr(self.assistants)
            raise ArgumentError("settings", "assistants", expected=expected, got=got, fix=fix) from error


def sizes_from_text(text: str) -> tuple[int, ...]:
    """Layer sizes from "256-256" or "256x256"; "none" is no hidden layer.

    Raises
    ------
    ValueError : it is no such text.
    """
    if text.strip().lower() == "none":
        return ()
    if not re.fullmatch(r"\s*\d+(\s*[-,x]\s*\d+)*\s*", text, re.ASCII):
        raise ValueError(f"must be layer sizes such as 256-256, or none; got {text!r}")
    return tuple(int(size) for size in re.findall(r"\d+", text))


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
    "teacher": (lambda v: (isinstance(v, str) and bool(v)) or _SIZES[0](v), f"{_SIZES[1]}, or the name of a teacher"),
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
    "preset": _among(("", *PRESETS)),
    "mode": _among(("offline", "online")),
    "generations": _count(1),
    "labels": _count(0),
    "epochs": _count(1),
    "batch_size": _count(1),
    "optimizer": _among(tuple(OPTIMIZERS)),
    "lr": _number(0, True),
    "schedule": _among(tuple(SCHEDULES)),
    "weight_decay": _number(0, False),
    "max_norm": _number(0, False),
    "clip": _number(0, False),
    "shift": _count(0),
    "teacher_shift": _count(0),
    "sampling": _among(SAMPLINGS),
    "patience": _count(0),
    "checkpoint_every": _count(0),
    "dropout": _share(),
    "seeds": (lambda v: len(v) > 0 and len(set(v)) == len(v) and min(v) >= 0, "different whole numbers from 0"),
    "split_seed": _count(0),
    "backend": _among(("", *BACKENDS)),
    "precision": _among(("", *MANTISSA)),
}


def full_sizes(hidden: Sequence[int], features: int, classes: int) -> tuple[int, ...]:
    """All layer sizes from the hidden ones; a list that begins with `features` and ends with `classes` is complete."""
    sizes = tuple(hidden)
    if len(sizes) >= 2 and sizes[0] == features and sizes[-1] == classes:
        return sizes
    return (features, *sizes, classes)
