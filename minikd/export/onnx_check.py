"""Whether an ONNX file says what its model says, by the judgement of ONNX's own tools and of onnxruntime."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, ModelFormatError
from minikd.export.network import Network
from minikd.export.onnx import INPUT, OUTPUTS
from minikd.export.quantise import Quantised
from minikd.nn import Module
from minikd.teachers.teacher import library

__all__ = ["check_onnx"]

Evaluate = Callable[[np.ndarray], Any]  # features → logits, probabilities, label

TOLERANCE = 1e-5  # of logits, as a share of the largest, and of probabilities
# Of int8 logits, in steps of their scale, with room for rounding. Where a product lies between two steps, float32 may
# round it to the other one, and the layers behind may make that more: so a share of the logits may be further off.
STEP, FURTHEST, SHARE = 1.01, 4.01, 1e-3
EXACT_INTEGERS = "session.x64quantprecision", "1"  # onnxruntime's products of int8 do not saturate
REFERENCE_OPSET = 19  # the first whose QuantizeLinear onnx.reference has; what we use of it is as it was in opset 13


def check_onnx(path: str | os.PathLike[str], source: Module | Network | Quantised, x: Any) -> dict[str, float]:
    """Check a file that `to_onnx` wrote, on rows of raw features: evaluator → the largest difference of a logit.

    onnx.checker with its full check and the strict inference of shapes must accept it. Then onnx.reference, and
    onnxruntime where it is installed, compute all outputs. Logits may differ from the model's by 1e-5 of its largest,
    which is the unit of what is returned; those of int8 by 1 step, the unit likewise, and one in a thousand by 4.
    Probabilities and labels must follow from the logits.

    Parameters
    ----------
    source : what was exported.
    x : (n, k), a row at least.

    Raises
    ------
    ModelFormatError : the file is refused or computes something else.  ArgumentError : no rows.
    BackendError : the package onnx is not installed.
    """
    rows = np.ascontiguousarray(x, np.float32)
    if rows.ndim != 2 or not len(rows):
        raise ArgumentError("check_onnx", "x", expected="rows of features (n, k)", got=f"shape {rows.shape}")
    model = source.model() if isinstance(source, Network) else source
    truth = model.logits(rows)
    integers = isinstance(source, Quantised)
    unit = source.output.scale if isinstance(source, Quantised) else float(abs(truth).max()) or 1.0
    found: dict[str, float] = {}
    for name, evaluate in _evaluators(path):
        logits = _outputs(path, name, evaluate, rows, truth.shape)
        differences = abs(logits - truth) / unit
        found[name] = float(differences.max())
        limit, furthest, share = (STEP, FURTHEST, SHARE) if integers else (TOLERANCE, TOLERANCE, 0.0)
        if not found[name] <= furthest or (differences > limit).mean() > share:
            size = "a step" if integers else f"{TOLERANCE:g} of the largest"
            raise _unlike(path, f"within {size} of the model's logits", f"{found[name]:.2g}, by {name}")
    return found


def _outputs(
    path: str | os.PathLike[str], name: str, evaluate: Evaluate, rows: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """The logits, once they have this shape and the other outputs follow from them."""
    try:
        logits, probabilities, label = evaluate(rows)
    except Exception as error:  # of the evaluator: other inputs or outputs, or an operator that it lacks
        raise _unlike(path, f"one that {name} can run", str(error)[:300]) from error
    if logits.shape != shape:
        raise _unlike(path, f"one with logits of shape {shape}", f"shape {logits.shape}")
    followed = abs(F.of_host(F.softmax, logits) - probabilities).max() <= TOLERANCE
    if not followed or not np.array_equal(label, logits.argmax(axis=1)):
        expected = "one whose probabilities and labels follow from the logits"
        raise _unlike(path, expected, f"others, by {name}")
    return np.asarray(logits)


def _unlike(path: str | os.PathLike[str], expected: str, got: str) -> ModelFormatError:
    return ModelFormatError("check_onnx", str(path), expected=expected, got=got)


def _evaluators(path: str | os.PathLike[str]) -> Iterator[tuple[str, Evaluate]]:
    """What computes a model's outputs, by name, once the model has passed ONNX's checks."""
    onnx = library("onnx", "onnx", "check_onnx")
    library("onnx.reference", "onnx", "check_onnx")
    try:
        content = Path(path).read_bytes()
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # of the file system, of protocol buffers, and of either check
        raise _unlike(path, "a file that passes ONNX's checks", str(error)[:300]) from error
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        model.opset_import[0].version = REFERENCE_OPSET
    reference = onnx.reference.ReferenceEvaluator(model)
    yield "onnx.reference", lambda x: reference.run(list(OUTPUTS), {INPUT: x})
    if importlib.util.find_spec("onnxruntime"):
        runtime = library("onnxruntime", where="check_onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry(*EXACT_INTEGERS)
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        yield "onnxruntime", lambda x: session.run(list(OUTPUTS), {INPUT: x})
