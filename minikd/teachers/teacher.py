"""What every teacher promises: scores of classes as logits, checked batch by batch, softened at any temperature."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, BackendError, ShapeError
from minikd.kernels import as_index, as_real

LOGITS, PROBABILITIES = "logits", "probabilities"
SUM_TOLERANCE = 1e-3  # how far a row of probabilities may be from a sum of 1: float16 models are this far off


class Teacher:
    """Any model that scores classes; a kind of teacher says in `_answer` how its model is asked.

    Attributes
    ----------
    gives : what the model itself gives, "logits" or "probabilities". The latter become log P, and exact zeros -inf.
    classes : how many classes there are; None until that is known, at the first batch at the latest.
    identity : which teacher this is, the same in every process: the kind, a digest of what it learned, and the
        settings that change its answers.
    per_row : whether it is asked by sample numbers, not by features (a table).
    """

    per_row = False

    def __init__(self, gives: str = LOGITS, classes: int | None = None, identity: str = "") -> None:
        if gives not in (LOGITS, PROBABILITIES):
            raise ArgumentError("as_teacher", "gives", expected=f"{LOGITS!r} or {PROBABILITIES!r}", got=repr(gives))
        self.gives, self.classes = gives, classes
        self._told_identity = identity
        self._seen = False  # whether a batch was answered already

    @property
    def identity(self) -> str:
        return self._told_identity or self._identity()

    def logits(self, x: Any, rows: Any = None) -> np.ndarray:
        """Scores (n, c), float32 or float64 and C-contiguous, of raw features x (n, k); softmax gives P.

        rows : the samples' numbers (n,), which tables need and others ignore; a table ignores x.
        Errors: ShapeError, ArgumentError or DTypeError say what the model gave and how to mend it. Every batch is
        checked: its shape, NaN and +inf, and that probabilities lie in [0, 1] and sum to 1 within SUM_TOLERANCE.
        """
        x, rows = self._asked(x, rows)
        n = len(rows) if self.per_row else len(x)
        if not n and self.classes:  # many a library refuses to be asked for nothing
            return np.empty((0, self.classes), np.float32)
        scores = as_real(self._name, "the answer", self._answer(x, rows))
        self._check(scores, n, rows)
        if self.gives == PROBABILITIES:
            with np.errstate(divide="ignore"):  # log 0 = -inf is meant
                scores = np.log(scores)
        elif not self._seen and len(scores) and F.look_like_probabilities(scores):
            fix = "say gives='probabilities' if they are, or pass the scores before softmax."
            warnings.warn(
                f"{self._name}: the answers look like probabilities where logits are expected: {fix}",
                UserWarning,
                stacklevel=2,
            )
        self.classes, self._seen = scores.shape[1], self._seen or len(scores) > 0
        return np.ascontiguousarray(scores)

    def __call__(self, x: Any, rows: Any = None) -> np.ndarray:
        """The same as `logits`."""
        return self.logits(x, rows)

    def probabilities(self, x: Any, rows: Any = None, *, temperature: float = 1.0) -> np.ndarray:
        """softmax(logits / T) of shape (n, c); a class of probability 0 keeps it at every T."""
        scores = self.logits(x, rows)
        return np.asarray(F.of_host(F.softmax, scores, temperature=temperature)) if len(scores) else scores

    def knows(self, rows: Any) -> bool:
        """Whether every one of these sample numbers can be answered; only tables lack some."""
        return True

    def check(self, data: Any) -> None:
        """Refuse a data set whose samples the answers are not of: DataError. Only a store knows what it is of."""

    # --- what a kind of teacher says of itself ---

    def _answer(self, x: Any, rows: Any) -> Any:
        """What the model gives (n, c) for features x or sample numbers rows."""
        raise NotImplementedError

    def _identity(self) -> str:
        """The kind and a digest."""
        raise NotImplementedError

    def _row(self, index: int, rows: Any) -> str:
        """How errors call a row of a batch."""
        return f"sample {rows[index]}" if self.per_row else f"row {index}"

    @property
    def _name(self) -> str:
        return type(self).__name__

    # --- checks ---

    def _asked(self, x: Any, rows: Any) -> tuple[Any, Any]:
        if rows is not None:
            rows = as_index(self._name, "rows", rows)
        if not self.per_row:
            x = np.asarray(x)
            if x.ndim < 2:
                fix = "A single row is x[None]."
                raise ShapeError(self._name, "x", expected="rows of features (n, k)", got=f"shape {x.shape}", fix=fix)
        elif rows is None or rows.ndim != 1:
            got = "none" if rows is None else f"shape {rows.shape}"
            fix = "This teacher is a table: call logits(None, rows)."
            raise ArgumentError(self._name, "rows", expected="the samples' numbers (n,)", got=got, fix=fix)
        elif not self.knows(rows):
            unknown = next(int(r) for r in rows if not self.knows(np.array([r])))
            raise ArgumentError(
                self._name, "rows", expected="samples that it holds", got=str(unknown), fix=self._unknown
            )
        return x, rows

    _unknown = "Give a table with a row for every sample of the data."

    def _check(self, scores: np.ndarray, n: int, rows: Any) -> None:
        name = self._name
        if scores.ndim != 2 or len(scores) != n or scores.shape[1] < 2:
            fix = "A teacher gives one row of class scores for each sample, and a column for each class."
            raise ShapeError(
                name, "the answer", expected=f"of shape ({n}, classes)", got=f"shape {scores.shape}", fix=fix
            )
        if self.classes is not None and scores.shape[1] != self.classes:
            fix = "Name the classes of the data with class_names=, or take a teacher of the same classes."
            got = f"{scores.shape[1]} columns"
            raise ShapeError(name, "the answer", expected=f"of {self.classes} classes", got=got, fix=fix)
        top = scores.max(axis=1)  # NaN and +inf come through, and a row of -inf alone shows
        sound = (top > -np.inf) & (top < np.inf)
        self._refuse_row(
            ~sound, scores, rows, "a largest score that is a finite number", "Look at this row's features."
        )
        if self.gives == PROBABILITIES:
            off = (scores.min(axis=1) < 0) | (abs(scores.sum(axis=1, dtype=np.float64) - 1) > SUM_TOLERANCE)
            fix = "If the model gives scores before softmax, say gives='logits'."
            self._refuse_row(off, scores, rows, "probabilities from 0 to 1 that sum to 1", fix)

    def _refuse_row(self, wrong: np.ndarray, scores: np.ndarray, rows: Any, expected: str, fix: str) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            got = np.array2string(scores[index], precision=4, threshold=10)
            argument = f"the answer for {self._row(index, rows)}"
            raise ArgumentError(self._name, argument, expected=expected, got=got, fix=fix)


# --- identities and libraries ---


def digest(parts: Iterable[tuple[str, Any]]) -> str:
    """sha256 of named arrays, bytes and texts, which is the same in every process."""
    found = hashlib.sha256()
    for name, value in parts:
        if isinstance(value, np.ndarray):
            name += f" {value.dtype.newbyteorder('<')} {value.shape}"
            value = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        data = value if isinstance(value, bytes) else str(value).encode()
        found.update(f"{name} {len(data)}\n".encode() + data)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library(name: str, extra: str = "teachers", where: str = "as_teacher") -> Any:
    """An optional library, imported now; BackendError that names the extra where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        fix = f"pip install 'minikd[{extra}]' brings it."
        raise BackendError(where, package, expected="installed", got=str(error), fix=fix) from error
