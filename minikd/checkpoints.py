"""Where a training's state is kept, so that a run that was stopped at any moment can be taken up again.

A checkpoint is a safetensors file: the arrays as tensors, everything else as JSON in its metadata. It appears under its
name only when it is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ModelFormatError, OutputError
from minikd.safetensors import read_tensors, write_tensors

__all__ = ["Checkpoint", "Checkpoints"]

FORMAT = "minikd checkpoint 1"
SUFFIX = ".safetensors"


class Checkpoint:
    """Keeps the state of one training in one file; a `training.Keeper`.

    Parameters
    ----------
    path : of the file.
    every : steps between two checkpoints; 0 for one at each epoch's end.
    run : names what the state depends on; the state of another run is refused.
    training : names which training of the run it is; the state of another one counts as none.

    A process that is killed loses nothing that was kept. The file is not forced to the disk, which would take longer
    than an epoch of a small network: after a power cut it may be the one before, or damaged, which is said.
    """

    def __init__(self, path: str | Path, *, every: int = 0, run: str = "", training: str = "") -> None:
        if type(every) is not int or every < 0:
            raise ArgumentError("Checkpoint", "every", expected="a whole number of steps from 0", got=repr(every))
        self.path, self.every, self._run, self._training = Path(path), every, run, training

    def keep(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write the state in the place of the one before.

        Raises
        ------
        OutputError : it cannot be written.
        """
        write(self.path, tensors, facts, self._run, self._training, durable=False)

    def kept(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The state in the file; None where there is no file, or that of another training of the run.

        Raises
        ------
        ModelFormatError : the file is damaged or no checkpoint.  ArgumentError : it is of another run.
        """
        return read(self.path, self._run, self._training) if self.path.exists() else None


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

    def training(self, name: str) -> Checkpoint:
        """Where the training of this name keeps its state while it is under way."""
        self._make()
        return Checkpoint(self.folder / f"training{SUFFIX}", every=self._every, run=self._run, training=name)

    def finish(self, name: str, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keep a finished model; its training's state may go then."""
        self._make()
        write(self._path(name), tensors, facts, self._run, name, durable=True)
        (self.folder / f"training{SUFFIX}").unlink(missing_ok=True)

    def finished(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The finished model of this name, or None.

        Raises
        ------
        ModelFormatError : the file is damaged.  ArgumentError : it is of another run.
        """
        path = self._path(name)
        return read(path, self._run, name) if path.exists() else None

    def __len__(self) -> int:
        """Files that there are."""
        return len(self._files())

    def remove(self) -> None:
        """Remove the files, and the folder if nothing else is in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> Sequence[Path]:
        """Checkpoints, and what a killed process left half-written."""
        return [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f".*{SUFFIX}.*.part")]

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"[^\w.]+", "-", name).strip("-") + SUFFIX)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix, got = "Name another one.", error.strerror or str(error)
            expected = "a folder that can be made"
            raise OutputError("checkpoints", str(self.folder), expected=expected, got=got, fix=fix) from error


def write(
    path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], run: str, training: str, durable: bool
) -> None:
    """Write one checkpoint file, whole or not at all."""
    metadata = {"format": FORMAT, "run": run, "training": training, "facts": json.dumps(facts)}
    write_tensors(path, tensors, metadata, durable=durable)


def read(path: Path, run: str, training: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `write` wrote; None if it is of another training."""
    fix = "Delete it: what it held is trained again."
    try:
        tensors, metadata = read_tensors(path)
        facts = json.loads(metadata.get("facts", "null"))
    except ModelFormatError as error:
        got = f"a damaged one ({error.argument}: {error.got})"
        raise ModelFormatError("checkpoints", str(path), expected="a whole checkpoint", got=got, fix=fix) from error
    except ValueError as error:
        raise ModelFormatError("checkpoints", str(path), expected="a checkpoint", got=str(error), fix=fix) from error
    if metadata.get("format") != FORMAT or not isinstance(facts, dict):
        got = f"the format {metadata.get('format')!r}"
        raise ModelFormatError("checkpoints", str(path), expected=f"a file of the format {FORMAT!r}", got=got, fix=fix)
    if metadata["run"] != run:
        fix = "Give the settings and the data that the run began with, or begin it anew with --overwrite."
        expected = "of the same settings and the same data"
        raise ArgumentError("checkpoints", str(path), expected=expected, got="that of another run", fix=fix)
    return (tensors, facts) if metadata["training"] == training else None
