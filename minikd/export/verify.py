"""Exported C proven on this machine: compiled, given rows of data, and compared with what it was made from."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minikd import metrics
from minikd.errors import BackendError, ShapeError
from minikd.export import reference
from minikd.export.c import driver
from minikd.export.network import Network
from minikd.export.quantise import Quantised
from minikd.nn import Module

__all__ = ["Verification", "compiler", "run_c", "verify"]

FLAGS = ("-std=c99", "-O2", "-ffp-contract=off")


@dataclass(frozen=True)
class Verification:
    """What compiled C does, beside the model that it was written from.

    rows : of data that went through it.  same_bits : whether logits, probabilities and classes are those of the NumPy
    reference, bit by bit.  agreement : the share of rows on which model and C name the same class.  largest_error :
    the largest difference of a logit.  accuracy, accuracy_lost : the C's, and the model's minus it, in parts of 1;
    None without labels.  object_bytes : code and constants of the compiled source.  nanoseconds : one prediction, the
    fastest of many rounds.  compiler : the command and its flags.
    """

    rows: int
    same_bits: bool
    agreement: float
    largest_error: float
    accuracy: float | None
    accuracy_lost: float | None
    object_bytes: int
    nanoseconds: float
    compiler: str

    def __str__(self) -> str:
        bits = "the same bits as" if self.same_bits else "NOT the bits of"
        lines = [
            f"{self.rows} rows through {self.compiler}: {bits} the NumPy reference",
            f"the model's class on {100 * self.agreement:.2f} %; largest error of a logit {self.largest_error:.3g}",
            f"{self.object_bytes:,} bytes of code and constants; {self.nanoseconds:,.0f} ns a prediction here",
        ]
        if self.accuracy is not None and self.accuracy_lost is not None:
            lines.insert(2, f"accuracy {100 * self.accuracy:.2f} %; lost {100 * self.accuracy_lost:+.2f} points")
        return "\n".join(lines)


class Outputs:
    """What the compiled C gave: logits and probabilities (n, c) float32, classes (n,) int64, bytes, nanoseconds."""

    def __init__(self, values: np.ndarray, classes: int, object_bytes: int, nanoseconds: float) -> None:
        self.logits, self.probabilities = values[:, :classes], values[:, classes : 2 * classes]
        self.classes = values[:, -1].astype(np.int64)
        self.object_bytes, self.nanoseconds = object_bytes, nanoseconds

    def equal(self, logits: np.ndarray) -> bool:
        """Whether these are the logits bit by bit, with the reference's probabilities and classes."""
        probabilities = reference.probabilities_c_order(logits)
        same = logits.tobytes() == self.logits.tobytes() and probabilities.tobytes() == self.probabilities.tobytes()
        return same and np.array_equal(self.classes, logits.argmax(axis=1))


def compiler() -> list[str] | None:
    """The command of the local C compiler: that of the variable CC, or the first of cc, gcc and clang; None without."""
    named = os.environ.get("CC", "").split()
    found = [command for command in (named, ["cc"], ["gcc"], ["clang"]) if command and shutil.which(command[0])]
    return found[0] if found else None


def verify(
    folder: str | os.PathLike[str],
    model: Module,
    x: Any,
    y: Any = None,
    *,
    name: str = "student",
    quantised: Quantised | None = None,
    flags: Sequence[str] = FLAGS,
) -> Verification:
    """Compile what `to_c` wrote in this folder and compare what it makes of rows with the model and the reference.

    Parameters
    ----------
    folder, name, quantised : as they were given to `to_c`.
    model : from which it was made.
    x : (n, k) raw features, one row at least.  y : (n,) class ids, or None.
    flags : of the compiler.

    Raises
    ------
    BackendError : there is no C compiler, or it does not accept the code, or the program fails.
    ShapeError : x is not (n, k) or has no rows.
    """
    network = Network.of(model)
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != network.sizes[0] or not len(rows):
        expected = f"one row or more of {network.sizes[0]} features"
        raise ShapeError("verify", "x", expected=expected, got=f"shape {rows.shape}")
    command = compiler()
    if command is None:
        fix = "Install one (on Debian or Ubuntu: apt install gcc), or leave the proof out."
        raise BackendError("verify", "a C compiler", expected="installed", got="no cc, gcc or clang", fix=fix)
    found = run_c(folder, rows, network.sizes[-1], name=name, command=command, flags=flags)
    truth = np.asarray(model.logits(rows), np.float32)
    logits = reference.predict_c_order(network, rows) if quantised is None else quantised.logits(rows)
    accuracy = None if y is None else metrics.accuracy(found.logits, y)
    return Verification(
        rows=len(rows),
        same_bits=found.equal(logits),
        agreement=metrics.agreement(found.logits, truth),
        largest_error=float(abs(found.logits.astype(np.float64) - truth).max()),
        accuracy=accuracy,
        accuracy_lost=None if accuracy is None else metrics.accuracy(truth, y) - accuracy,
        object_bytes=found.object_bytes,
        nanoseconds=found.nanoseconds,
        compiler=" ".join([Path(command[0]).name, *command[1:], *flags]),
    )


def run_c(
    folder: str | os.PathLike[str],
    x: np.ndarray,
    classes: int,
    *,
    name: str = "student",
    command: Sequence[str] = ("cc",),
    flags: Sequence[str] = FLAGS,
) -> Outputs:
    """What NAME.c in this folder makes of raw features x (n, k), compiled by this command in a folder of its own.

    Raises
    ------
    BackendError : the compiler does not accept the code, or the program fails, as it does for features not finite.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, library, program = Path(temporary, "driver.c"), Path(temporary, "part.o"), Path(temporary, "driver")
        source.write_text(driver(name), "utf-8")
        include = f"-I{Path(folder).resolve()}"
        _run([*command, *flags, "-c", str(Path(folder, f"{name}.c")), "-o", str(library)])
        _run([*command, *flags, include, str(source), str(library), "-o", str(program)])
        done = _run([str(program)], np.ascontiguousarray(x, np.float32).tobytes())
        values = np.frombuffer(done.stdout, np.float32).reshape(len(x), 2 * classes + 1)
        return Outputs(values, classes, _object_bytes(library), float(done.stderr))


def _object_bytes(path: Path) -> int:
    """Code and initialised data of an object file, by the tool `size`; the file's size where there is none."""
    if shutil.which("size") is None:
        return path.stat().st_size
    text, data = _run(["size", str(path)]).stdout.split(b"\n")[1].split()[:2]
    return int(text) + int(data)


def _run(command: Sequence[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:500] or f"exit status {done.returncode}"
        raise BackendError("verify", Path(command[0]).name, expected="able to run the exported C", got=said)
    return done
