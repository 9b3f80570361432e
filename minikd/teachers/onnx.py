"""ONNX files as teachers, through onnxruntime and from bytes alone."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, ModelFormatError
from minikd.kernels import as_real
from minikd.teachers.pytorch import reshaped
from minikd.teachers.teacher import LOGITS, PROBABILITIES, Teacher, library

ROWS_AT_A_TIME = 512
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}
FLOAT_OUTPUTS = ("tensor(float)", "tensor(double)", "tensor(float16)")
# What a part of an output's name says of what it gives, in the order in which outputs are preferred.
NAMES = {"logit": LOGITS, "log_prob": LOGITS, "prob": PROBABILITIES, "softmax": PROBABILITIES}


class OnnxTeacher(Teacher):
    """A model in an ONNX file: raw features in, one output with a column for each class.

    The file's bytes are kept and the session is opened when it is first used, and again in a copy or in a forked child,
    so this teacher can be pickled. Rows are arranged as the model's input asks; a model for a fixed number of rows is
    called piece by piece.

    Parameters
    ----------
    source : the file, or its bytes.
    gives : "logits" or "probabilities"; by default the output's name says, or else the first batch with a warning.
    output : the name of the output; by default the one whose name speaks of logits or probabilities, or the first
        with two axes.
    shape : the shape of one row, where the model leaves it open.
    threads : of one operation inside onnxruntime.

    Raises
    ------
    ModelFormatError : no ONNX model, one that keeps weights in other files, or one that needs several inputs.
    ArgumentError : no output is an array of scores.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        gives: str | None = None,
        output: str | None = None,
        classes: int | None = None,
        shape: tuple[int, ...] | None = None,
        threads: int = 1,
        identity: str = "",
    ) -> None:
        super().__init__(gives or LOGITS, classes, identity)
        self.path = "the ONNX model" if isinstance(source, bytes) else str(source)
        self.content = source if isinstance(source, bytes) else _bytes(Path(source))
        if _has_external_data(self.path, self.content):
            fix = "Save the model in one file: onnx.save(onnx.load(path), path), which keeps the weights inside."
            got = "weights in other files (external data)"
            raise ModelFormatError(
                "as_teacher", self.path, expected="a model with all of its weights", got=got, fix=fix
            )
        self.threads, self.shape = threads, shape
        self._open: tuple[int, Any] | None = None
        self._told = f"{f' gives {gives}' if gives else ''}{f' output {output}' if output else ''}"
        self.output = self._chosen(output, gives)
        said = next((kind for part, kind in NAMES.items() if part in self.output.lower()), None)
        self.gives, self._undecided = gives or said or LOGITS, gives is None and said is None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": None}

    @property
    def session(self) -> Any:
        """onnxruntime's session of this process."""
        if self._open is None or self._open[0] != os.getpid():
            runtime = library("onnxruntime")
            options = runtime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
            options.log_severity_level = 3  # errors only: they come as exceptions
            try:
                session = runtime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime has a dozen classes of its own for this
                raise self._damaged(error) from error
            self._open = os.getpid(), session
        return self._open[1]

    def _damaged(self, error: object) -> ModelFormatError:
        got = str(error).strip()[:300]
        return ModelFormatError("as_teacher", self.path, expected="an ONNX model that onnxruntime can run", got=got)

    def _chosen(self, output: str | None, gives: str | None) -> str:
        """The output to read: the named one, else the one whose name says most, else the first with two axes."""
        outputs = self.session.get_outputs()
        usable = [o.name for o in outputs if o.type in FLOAT_OUTPUTS and len(o.shape or (0, 0)) == 2]
        if output in usable:
            return str(output)
        if output is None and usable:
            told = [
                name for part, kind in NAMES.items() if gives in (None, kind) for name in usable if part in name.lower()
            ]
            return str((told or usable)[0])
        listed = ", ".join(f"{o.name} ({o.type}, shape {o.shape})" for o in outputs)
        fix = "Export without a map at the end: skl2onnx has the option zipmap=False." if "map(" in listed else ""
        fix = fix or "Name one by output=…; it has an axis of rows and an axis of classes."
        argument = f"{self.path}: the output"
        raise ArgumentError("as_teacher", argument, expected=output or "an array of scores", got=listed, fix=fix)

    def _answer(self, x: Any, rows: Any) -> Any:
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            got = ", ".join(i.name for i in inputs)
            raise ModelFormatError("as_teacher", self.path, expected="a model with one input", got=got or "none")
        x = self._arranged(x, inputs[0])
        fixed = inputs[0].shape[0] if inputs[0].shape and isinstance(inputs[0].shape[0], int) else 0
        pieces = [self._run(inputs[0].name, piece, fixed) for piece in _pieces(x, fixed or ROWS_AT_A_TIME)]
        scores = np.concatenate(pieces)
        if self._undecided and len(scores):
            self._decide(scores)
        return scores

    def _arranged(self, x: Any, wanted: Any) -> np.ndarray:
        """x with the dtype and the shape of rows that the model's input has."""
        if wanted.type not in DTYPES:
            expected = "a model whose input is one of " + ", ".join(DTYPES)
            raise ModelFormatError("as_teacher", self.path, expected=expected, got=wanted.type)
        shape = self.shape
        if shape is None and wanted.shape and all(isinstance(s, int) for s in wanted.shape[1:]):
            shape = tuple(wanted.shape[1:])
        elif shape is None and wanted.shape and len(wanted.shape) == 2:
            shape = (int(np.prod(x.shape[1:])),)
        return np.ascontiguousarray(reshaped(self._name, x, shape), DTYPES[wanted.type])

    def _run(self, name: str, piece: np.ndarray, fixed: int) -> np.ndarray:
        n = len(piece)
        if n < fixed:  # the last rows of a model for a fixed number: fill up, and drop what they give
            piece = np.concatenate([piece, np.zeros((fixed - n, *piece.shape[1:]), piece.dtype)])
        try:
            (found,) = self.session.run([self.output], {name: piece})
        except Exception as error:
            raise self._damaged(error) from error
        return np.asarray(found)[:n]

    def _decide(self, scores: np.ndarray) -> None:
        """Take the output for probabilities if its first rows are, and say so."""
        self._undecided = False
        real = as_real(self._name, "the answer", scores)
        if real.ndim == 2 and F.look_like_probabilities(real):
            self.gives = PROBABILITIES
            message = f"{self.path}: the output {self.output!r} is taken for probabilities, as its first rows are"
            warnings.warn(f"{message}; gives='probabilities' says so for certain.", UserWarning, stacklevel=4)

    def _identity(self) -> str:
        return f"onnx:{hashlib.sha256(self.content).hexdigest()}{self._told}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFormatError("as_teacher", str(path), expected="a readable file", got=str(error)) from error


def _pieces(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    yield from (x[start : start + size] for start in range(0, max(len(x), 1), size))


# --- weights outside of the file ---

# Message → {field: message below it}: all of an ONNX model in which a tensor may stand (onnx.proto, IR version 13).
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of a tensor; a location of 1 is external


def _has_external_data(path: str, content: bytes) -> bool:
    """Whether any tensor names another file: onnxruntime would look for it in the working directory."""
    waiting = [("model", memoryview(content))]
    try:
        while waiting:
            kind, data = waiting.pop()
            for field, value in _fields(data):
                if kind == "tensor":
                    if field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value == 1):
                        return True
                elif isinstance(value, memoryview) and field in _MESSAGES[kind]:
                    waiting.append((_MESSAGES[kind][field], value))
    except (IndexError, ValueError) as error:
        got = "bytes that are not a protocol buffer"
        raise ModelFormatError("as_teacher", path, expected="an ONNX model", got=got) from error
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer's message: number, and a varint's value or the bytes (Encoding, protobuf.dev)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("a wire type that ONNX does not use")
        if at + size > len(data):
            raise IndexError("a field longer than its message")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
