"""A run's folder: which files there are and what for, each of them whole or not there."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

from minikd.distillation import DistillResult, Settings
from minikd.errors import OutputError
from minikd.export import save
from minikd.kernels import current_backend
from minikd.nn import Module
from minikd.report.config import to_toml
from minikd.report.pictures import learning_curves, soft_labels
from minikd.safetensors import write_whole

# Every file of a run and what it is for; `minikd distill` prints those that are there.
FILES = {
    "config.toml": "the settings: give it to --config to repeat the run",
    "report.json": "all figures, for other programs",
    "history.csv": "loss and validation figures of each epoch of each training",
    "teacher.safetensors": "the teacher of the first seed",
    "student.safetensors": "the first seed's distilled student, for minikd.load(path)",
    "learning_curves.png": "how the networks learned",
    "soft_labels.png": "what the teacher says of samples that it finds hard",
}
CONFIG = "config.toml"
HISTORY = ("situation", "model", "seed", "epoch", "lr", "loss", "validation_accuracy", "validation_nll")
PICTURES = {"learning_curves.png": learning_curves, "soft_labels.png": soft_labels}


class RunFolder:
    """The folder that one run writes into; nothing is made before `begin`.

    Parameters
    ----------
    path : where it is.
    overwrite : whether results of an earlier run in it may go.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path, self._overwrite, self._must_be_new = Path(path), overwrite, False
        self._saved: dict[str, Any] = {}

    @classmethod
    def fresh(cls, data: str) -> RunFolder:
        """A new one: runs/<data>-<date>-<time>, with a number behind it if there is such a folder when it begins."""
        stem = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-.") or "data"
        folder = cls(Path("runs", f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"))
        folder._must_be_new = True
        return folder

    def _claim(self) -> None:
        """Make the folder; a fresh one is this run's alone, even if another run begins at the same moment."""
        if not self._must_be_new:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        stem = self.path.name
        for k in itertools.count(2):
            try:
                self.path.mkdir(parents=True)
                return
            except FileExistsError:
                self.path = self.path.with_name(f"{stem}-{k}")

    def begin(self, settings: Settings) -> None:
        """Make the folder and write config.toml, which repeats the run, backend included.

        Called before the training, so that a folder that cannot be written costs nobody an hour.

        Raises
        ------
        OutputError : it cannot be made or written, or there are results in it already.
        """
        try:
            self._claim()
            earlier = [name for name in FILES if name != CONFIG and (self.path / name).exists()]
            if earlier and not self._overwrite:
                expected, fix = "a folder without results", "Name another folder, or allow it with --overwrite."
                raise OutputError("folder", str(self.path), expected=expected, got=f"one with {earlier[0]}", fix=fix)
            settings = dataclasses.replace(settings, backend=settings.backend or current_backend())
            write_whole(self.path / CONFIG, to_toml(settings).encode())
            for name in earlier:  # a stale file beside new ones would lie about the new run
                (self.path / name).unlink()
        except OutputError:
            raise
        except OSError as error:
            expected, fix = "a folder that can be made and written", "Name another one with --out FOLDER."
            got = error.strerror or str(error)
            raise OutputError("folder", str(self.path), expected=expected, got=got, fix=fix) from error

    def write_results(self, result: DistillResult) -> None:
        """Write the figures and the models that there are so far; can be called again when there are more."""
        write_whole(self.path / "history.csv", _csv(result.history))
        for name, model in (("teacher.safetensors", result.teacher), ("student.safetensors", result.student)):
            if isinstance(model, Module) and self._saved.get(name) is not model:
                save(self.path / name, model)
                self._saved[name] = model
        write_whole(self.path / "report.json", _json(result.report))

    def write_pictures(self, result: DistillResult) -> None:
        """Draw the pictures that there is material for.

        Raises
        ------
        ImportError : matplotlib is not installed.
        """
        for name, draw in PICTURES.items():
            picture = draw(result)
            if picture:
                write_whole(self.path / name, picture)

    def files(self) -> list[tuple[str, str]]:
        """The files that are there, each with what it is for."""
        return [(name, purpose) for name, purpose in FILES.items() if (self.path / name).exists()]


def _json(report: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The same with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(history: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
