"""What the experiments after Hinton et al. 2015 share: one teacher, its soft labels, and students that learn from them.

The teacher is trained once, on shifted copies of the training part and with dropout, and kept among the temporary
files, so that all experiments and all their students have the very same soft labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd as kd
from minikd.bench.machine import describe
from minikd.bench.report import machine_text
from minikd.bench.suite import add_readme_option
from minikd.data import Dataset
from minikd.nn import MLP
from minikd.safetensors import write_whole
from minikd.training import fit

BATCH = 128
LR = {30: 0.003}  # by the width of a student's first hidden layer
LR_OF_OTHERS = 0.001
# The best of five on the validation part, see bench/README.md.
TEACHER = {"hidden": (800, 800), "dropout": 0.2, "copies": 3, "reach": 1, "passes": 8, "lr": 0.001}
# What --quick makes of the options, and of the teacher: a look in seconds, whose figures mean nothing.
QUICK_TEACHER = {**TEACHER, "hidden": (64,), "passes": 1}
QUICK_ROWS = 2000

PARTS = ("train", "validation", "test")


class Material(NamedTuple):
    """What students learn from: a data set, and the teacher's logits of each part's rows, in order."""

    data: Dataset
    logits: dict[str, np.ndarray]

    @property
    def teacher_errors(self) -> int:
        return errors(self.logits["test"], self.data.y_test)


def add_arguments(parser: argparse.ArgumentParser, marker: str) -> None:
    """The options of both experiments."""
    parser.add_argument("--data", default="fashion-mnist", help="whatever minikd.data.load takes")
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind, from paired first weights")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the whole training part")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows, one pass, a small teacher")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures go")
    add_readme_option(parser, marker)


def hidden_sizes(text: str) -> tuple[int, ...]:
    """Hidden layers as an option names them: "30-30"."""
    return tuple(int(size) for size in text.split("-"))


# --- the teacher ---


def prepare(options: argparse.Namespace) -> Material:
    """The data set and the soft labels of its teacher, who is trained if it was not before."""
    data = kd.data.load(options.data)
    if options.quick:
        few = slice(QUICK_ROWS)
        data = dataclasses.replace(data, x_train=data.x_train[few], y_train=data.y_train[few])
    how = QUICK_TEACHER if options.quick else TEACHER
    name = hashlib.sha256(json.dumps([data.sha256, how, options.quick]).encode()).hexdigest()[:16]
    file = Path(tempfile.gettempdir(), f"minikd-soft-labels-{name}.npz")
    if not file.exists():
        print(f"Training the teacher, whose soft labels are then kept in {file}.", file=sys.stderr, flush=True)
        teacher = trained_teacher(data, **how)
        buffer = io.BytesIO()
        np.savez(buffer, **{p: teacher.logits(getattr(data, f"x_{p}"), normalised=True) for p in PARTS})
        write_whole(file, buffer.getvalue())
    with np.load(file) as stored:
        return Material(data, {part: stored[part] for part in PARTS})


def trained_teacher(
    data: Dataset, *, hidden: Sequence[int], dropout: float, copies: int, reach: int, passes: int, lr: float
) -> MLP:
    """A teacher of the training part and of `copies` of it, shifted by up to `reach` pixels each way."""
    rng = np.random.default_rng(0)
    moved = (shifted(data.x_train, data.feature_shape, reach, rng) for _ in range(copies))
    x = np.concatenate([data.x_train, *moved])
    teacher = MLP((data.features, *hidden, data.classes), dropout=dropout, seed=0)
    fit(teacher, x, np.tile(data.y_train, copies + 1), epochs=passes, batch_size=BATCH, lr=lr)
    return teacher


def shifted(x: np.ndarray, shape: Sequence[int], reach: int, rng: np.random.Generator) -> np.ndarray:
    """Images (n, m) of this shape, each moved by -reach … reach rows and columns; what comes in is background."""
    n, (height, width) = len(x), shape
    padded = np.full((n, height + 2 * reach, width + 2 * reach), x.min(), x.dtype)
    padded[:, reach : reach + height, reach : reach + width] = x.reshape(n, height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = rng.integers(0, 2 * reach + 1, (2, n))
    return windows[np.arange(n), down, right].reshape(n, -1)


# --- students ---


def trained_student(
    material: Material, hidden: Sequence[int], seed: int, y: np.ndarray, rows: Any = slice(None), **how: Any
) -> MLP:
    """A student of some rows of the training part, with soft labels unless `how` says soft_weight=0."""
    data = material.data
    student = MLP((data.features, *hidden, data.classes), seed=seed)
    soft = material.logits["train"][rows] if how["soft_weight"] else None
    how |= {"batch_size": BATCH, "lr": LR.get(hidden[0], LR_OF_OTHERS), "seed": seed}
    fit(student, data.x_train[rows], y[rows], soft, **how)
    return student


def logits(student: MLP, x: np.ndarray) -> np.ndarray:
    """Of features on the network's own scale."""
    return student.logits(x, normalised=True)


def errors(scores: np.ndarray, y: np.ndarray) -> int:
    """How many rows of (n, c) have their largest score elsewhere than at y (n,)."""
    return int((scores.argmax(axis=1) != y).sum())


# --- the report ---


class Log:
    """A report that is written anew after each seed, so that a run which is cut short leaves its whole seeds."""

    def __init__(self, path: Path, settings: dict[str, Any], material: Material) -> None:
        data = material.data
        self.path, self.began = path, time.monotonic()
        self.report: dict[str, Any] = {
            "machine": describe(("numpy",)),
            "settings": settings,
            "data": {"name": data.name, **data.sizes, "class_names": list(data.class_names)},
            "teacher_errors": material.teacher_errors,
            "runs": [],
        }

    def add(self, run: dict[str, Any], words: str) -> None:
        self.report["runs"].append(run)
        print(f"{time.monotonic() - self.began:6.0f} s  {words}", file=sys.stderr, flush=True)

    def write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        write_whole(self.path, (json.dumps(self.report, indent=1) + "\n").encode())


def where_and_how_long(report: dict[str, Any]) -> str:
    """The machine, and the seconds that the students took."""
    machine = machine_text({**report, "cases": [], "missing": {}})
    return f"{machine} {report['seconds']:,.0f} s for {len(report['runs'])} students and what was measured of them."


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Mean ± standard deviation, or the value alone if it is one."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean
