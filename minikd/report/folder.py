"""A run's folder: which files there are and what for, each of them whole or not there."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minikd.distillation import DistillResult
from minikd.errors import OutputError
from minikd.export import save
from minikd.kernels import current_backend, matmul_precision
from minikd.locks import only_writer
from minikd.nn import Module
from minikd.report.config import to_toml
from minikd.report.pictures import learning_curves, soft_labels
from minikd.report.tensorboard import write_events
from minikd.safetensors import write_whole
from minikd.settings import Settings

# Every file of a run and what it is for; `minikd distill` prints those that are there.
FILES = {
    "config.toml": "the settings: give it to --config to repeat the run",
    "report.json": "all figures, for other programs",
    "history.csv": "loss, validation figures and each term's share, of each epoch of each training",
    "history.jsonl": "the same, a JSON object in each line",
    "teacher.safetensors": "the teacher of the first seed",
    "student.safetensors": "the first seed's distilled student, for minikd.load(path)",
    "learning_curves.png": "how the networks learned",
    "soft_labels.png": "what the teacher says of samples that it finds hard",
}
# Folders that are there at times.
FOLDERS = {
    "checkpoints": "what minikd distill --resume goes on from",
    "tensorboard": "the history as TensorBoard events",
}
AT_IT = "Wait until it ends, or name another folder."
CONFIG, REPORT, CHECKPOINTS, EVENTS = "config.toml", "report.json", "checkpoints", "tensorboard"
HISTORY = ("situation", "model", "seed", "epoch", "lr", "loss", "validation_accuracy", "validation_nll")
TERM = ("value", "gradient_share")  # of each term's figures in a row of the history
PICTURES = {"learning_curves.png": learning_curves, "soft_labels.png": soft_labels}


class RunFolder:
    """The folder that one run writes into; nothing is made before `begin`.

    From `begin` or `resume` to `close`, or to the end of its process, no other run may begin or go on in it. Used with
    `with`, it is closed at the end.

    Parameters
    ----------
    path : where it is.
    overwrite : whether results of an earlier run in it may go.
    """

    tensorboard = False  # whether the history is also written as TensorBoard events

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path, self._overwrite, self._must_be_new = Path(path), overwrite, False
        self._saved: dict[str, Any] = {}
        self._logged = 0  # rows of the history that are TensorBoard events already
        self._held = ExitStack()  # the lock, while there is one

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs have the folder."""
        self._held.close()

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

    def _lock(self) -> None:
        """Be the only run that writes here; OutputError that names the process of another."""
        self._held.enter_context(only_writer(self.path, "folder", AT_IT, writer="run"))

    def begin(self, settings: Settings) -> None:
        """Make the folder and write config.toml, which repeats the run, backend included.

        Called before the training, so that a folder that cannot be written costs nobody an hour.

        Raises
        ------
        OutputError : it cannot be made or written, another run writes to it, or there are results in it already.
        """
        try:
            self._begin(settings)
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: Settings) -> None:
        try:
            self._claim()
            self._lock()
            earlier = [name for name in FILES | FOLDERS if name != CONFIG and (self.path / name).exists()]
            if earlier and not self._overwrite:
                expected, fix = "a folder without results", "Name another folder, or allow it with --overwrite."
                raise OutputError("folder", str(self.path), expected=expected, got=f"one with {earlier[0]}", fix=fix)
            self._clear_away()
            settings = dataclasses.replace(settings, backend=current_backend(), precision=matmul_precision().name)
            write_whole(self.path / CONFIG, to_toml(settings).encode())
            for name in earlier:  # a stale file beside new ones would lie about the new run
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
                else:
                    (self.path / name).unlink()
        except OutputError:
            raise
        except OSError as error:
            expected, fix = "a folder that can be made and written", "Name another one with --out FOLDER."
            got = error.strerror or str(error)
            raise OutputError("folder", str(self.path), expected=expected, got=got, fix=fix) from error

    def resume(self) -> None:
        """See that there is a run which was stopped, and clear away what it left half-written.

        Raises
        ------
        OutputError : there is no run in the folder, it is complete, or it has not been stopped.
        """
        if not (self.path / CONFIG).is_file():
            expected, fix = "the folder of a run that was stopped", "Name the folder that its --out named."
            raise OutputError("folder", str(self.path), expected=expected, got=f"one without {CONFIG}", fix=fix)
        self._lock()
        if self._is_complete():
            self.close()
            expected, fix = "a run that was stopped", "Its results are in the folder; a new run needs a new one."
            raise OutputError("folder", str(self.path), expected=expected, got="one that is complete", fix=fix)
        self._clear_away()
        if (self.path / EVENTS).is_dir():  # they are written anew, from the first epoch on
            shutil.rmtree(self.path / EVENTS)

    def _clear_away(self) -> None:
        """Remove what a run that was killed left half-written; nobody else writes here."""
        for path in self.path.glob(".*.part"):
            path.unlink(missing_ok=True)

    def _is_complete(self) -> bool:
        if (self.path / CHECKPOINTS).exists() or not (self.path / REPORT).is_file():
            return False
        try:
            return bool(json.loads((self.path / REPORT).read_text("utf-8")).get("complete"))
        except (ValueError, AttributeError, RecursionError):
            return False

    def write_results(self, result: DistillResult) -> None:
        """Write the figures and the models that there are so far; can be called again when there are more."""
        last = result.complete  # which must outlast a power cut
        write_whole(self.path / "history.csv", _csv(result.history), durable=last)
        write_whole(self.path / "history.jsonl", _jsonl(result.history), durable=last)
        if self.tensorboard:
            write_events(self.path / EVENTS, result.history[self._logged :])
            self._logged = len(result.history)
        for name, model in (("teacher.safetensors", result.teacher), ("student.safetensors", result.student)):
            if isinstance(model, Module) and self._saved.get(name) is not model:
                save(self.path / name, model)
                self._saved[name] = model
        write_whole(self.path / REPORT, _json(result.report), durable=last)

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
        return [(name, purpose) for name, purpose in (FILES | FOLDERS).items() if (self.path / name).exists()]


def _json(report: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The same with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _jsonl(history: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in history).encode()


def _csv(history: list[dict[str, Any]]) -> bytes:
    """HISTORY's columns, then value and gradient share of every term that there is."""
    terms = dict.fromkeys(figures["term"] for row in history for figures in row["terms"])
    columns = [*HISTORY, *(f"{term} {figure}" for term in terms for figure in TERM)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in history:
        figures = {f"{f['term']} {name}": f[name] for f in row["terms"] for name in TERM}
        writer.writerow({**row, **figures})
    return text.getvalue().encode()
