"""Where a training's state is kept, so that a run that was stopped at any moment can be taken up again.

A checkpoint is a safetensors file: the arrays as tensors, everything else as JSON in its metadata. It appears under its
name only when it is whole.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ModelFormatError, OutputError
from minikd.locks import NAME as LOCK
from minikd.locks import only_writer
from minikd.safetensors import read_tensors, write_tensors

__all__ = ["Checkpoint", "Checkpoints"]

FORMAT = "minikd checkpoint 1"
SUFFIX = ".safetensors"
UNDER_WAY = "training"  # the name of the file for the training that is not finished
WHERE = "checkpoints"
AT_IT = "Wait until it ends, or name another place."
PAUSE = 0.1  # seconds, which nobody misses; small networks have fifty epochs in that time


class Checkpoint:
    """Keeps the state of one training; a `training.Keeper`.

    Parameters
    ----------
    path : of the file. States take turns between this name and one beside it (`state.safetensors`,
        `state.next.safetensors`), and the older one goes when the newer one is whole: a rename to a free name takes a
        tenth of a millisecond, one over a file many times that.
    every : steps between two checkpoints; 0 for one at each epoch's end.
    run : names what the state depends on; the state of another run is refused.
    training : names which training of the run it is; the state of another one counts as none.
    pause : seconds from one epoch's checkpoint to the next at least; epochs that end sooner go without one.

    A process that is killed loses nothing that was kept. The file is not forced to the disk, which would take longer
    than an epoch of a small network: after a power cut it may be damaged, which is said.
    """

    def __init__(
        self, path: str | Path, *, every: int = 0, run: str = "", training: str = "", pause: float = 0.0
    ) -> None:
        if type(every) is not int or every < 0:
            raise ArgumentError("Checkpoint", "every", expected="a whole number of steps from 0", got=repr(every))
        path = Path(path)
        self.every, self._run, self._training = every, run, training
        self._places = (path, path.with_name(f"{path.stem}.next{path.suffix}"))
        self._latest: Path | None = None
        self._pause, self._kept = pause, -math.inf  # the time of the last checkpoint

    def alone(self) -> AbstractContextManager[None]:
        """While this is held, no other training keeps its state in the file; a `Training` holds it while it runs.

        Raises
        ------
        OutputError : another one does, or the folder cannot be written.
        """
        path = self._places[0]
        return only_writer(path.parent, WHERE, AT_IT, writer="training", file=path.name)

    def keep(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write the state, then remove the one before.

        Raises
        ------
        OutputError : it cannot be written.
        """
        if not self.every and time.monotonic() - self._kept < self._pause:
            return
        self._kept = time.monotonic()
        if self._latest is None:
            self.kept()
        free = self._places[self._places[0] == self._latest]
        with suppress(OSError):  # where it cannot be removed, writing says why
            free.unlink()
        write(free, tensors, facts, self._run, self._training, durable=False)
        if self._latest is not None:
            self._latest.unlink(missing_ok=True)
        self._latest = free

    def kept(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The last state that was kept; None where there is none, or only that of another training of the run.

        Raises
        ------
        ModelFormatError : the file is damaged or no checkpoint.  ArgumentError : it is of another run.
        """
        there = {path: read(path, self._run, self._training) for path in self._places if path.exists()}
        own = {path: state for path, state in there.items() if state is not None}
        if not own:
            return None
        self._latest = max(own, key=lambda path: _step(own[path][1]))
        return own[self._latest]

    def forget(self) -> None:
        """Remove the files."""
        for path in self._places:
            path.unlink(missing_ok=True)
        self._latest = None


class Checkpoints:
    """The checkpoints of a run of many trainings: a file for each finished model, and one for the training under way.

    Parameters
    ----------
    folder : made when the first file is written.
    every, run : as for `Checkpoint`.
    """

    def __init__(self, folder: str | Path, *, every: int = 0, run: str = "") -> None:
        self.folder, self._every, self._run = Path(folder), every, run
        Checkpoint(folder, every=every)  # which refuses a wrong number

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this is held, no other run keeps anything in the folder.

        Raises
        ------
        OutputError : another one does, or the folder cannot be made or written.
        """
        self._make()
        with only_writer(self.folder, WHERE, AT_IT, writer="run"):
            yield

    def training(self, name: str) -> Checkpoint:
        """Where the training of this name keeps its state while it is under way."""
        self._make()
        return Checkpoint(
            self.folder / f"{UNDER_WAY}{SUFFIX}", every=self._every, run=self._run, training=name, pause=PAUSE
        )

    def finish(self, name: str, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keep a finished model, with its `history` among the facts; its training's state may go then."""
        self._make()
        write(self._path(name), tensors, facts, self._run, name, durable=True)
        self.training(name).forget()

    def finished(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The finished model of this name, or None.

        Raises
        ------
        ModelFormatError : the file is damaged.  ArgumentError : it is of another run.
        """
        path = self._path(name)
        found = read(path, self._run, name) if path.exists() else None
        if found is not None and not isinstance(found[1].get("history"), list):
            fix, got = "Delete it: what it held is trained again.", ", ".join(found[1]) or "nothing"
            raise ModelFormatError("checkpoints", str(path), expected="a model with its history", got=got, fix=fix)
        return found

    def count(self) -> int:
        """Finished models that there are."""
        return sum(1 for path in self.folder.glob(f"*{SUFFIX}") if not path.name.startswith(UNDER_WAY))

    def remove(self) -> None:
        """Remove the files, and the folder if nothing else is in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> Sequence[Path]:
        """Checkpoints, and what a killed process left: files half-written, and locks that nobody holds."""
        left = (f".*{SUFFIX}.*.part", LOCK, f".*{SUFFIX}{LOCK}")
        return [path for pattern in (f"*{SUFFIX}", *left) for path in self.folder.glob(pattern)]

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"[^\w.]+", "-", name).strip("-") + SUFFIX)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix, got = "Name another one.", error.strerror or str(error)
            expected = "a folder that can be made"
            raise OutputError(WHERE, str(self.folder), expected=expected, got=got, fix=fix) from error


def write(
    path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], run: str, training: str, durable: bool
) -> None:
    """Write one checkpoint file, whole or not at all."""
    metadata = {"format": FORMAT, "run": run, "training": training, "facts": json.dumps(facts)}
    write_tensors(path, tensors, metadata, durable=durable)


def _step(facts: Mapping[str, Any]) -> int:
    """How far a training was; 0 for one that does not say it in a whole number, which no training takes up."""
    step = facts.get("step")
    return step if type(step) is int else 0


def read(path: Path, run: str, training: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `write` wrote; None if it is of another training."""
    fix = "Delete it: what it held is trained again."
    try:
        tensors, metadata = read_tensors(path)
        facts = json.loads(metadata.get("facts", "null"))
    except ModelFormatError as error:
        got = f"a damaged one ({error.argument}: {error.got})"
        raise ModelFormatError("checkpoints", str(path), expected="a whole checkpoint", got=got, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError("checkpoints", str(path), expected="a checkpoint", got=str(error), fix=fix) from error
    if metadata.get("format") != FORMAT or not isinstance(facts, dict) or not {"run", "training"} <= metadata.keys():
        got = f"the format {metadata.get('format')!r} with {', '.join(sorted(metadata)) or 'nothing'}"
        raise ModelFormatError("checkpoints", str(path), expected=f"a file of the format {FORMAT!r}", got=got, fix=fix)
    if metadata["run"] != run:
        fix = "Give the settings and the data that the run began with, or begin it anew with --overwrite."
        expected = "of the same settings and the same data"
        raise ArgumentError("checkpoints", str(path), expected=expected, got="that of another run", fix=fix)
    return (tensors, facts) if metadata["training"] == training else None
