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

TOLERANCE = 1e-5  # of logits, as a share of the largest, and of probabilities
STEPS = 1.01  # of int8 logits: 1, and what float32 rounds
EXACT_INTEGERS = "session.x64quantprecision", "1"  # onnxruntime's products of int8 do not saturate
REFERENCE_OPSET = 19  # the first whose QuantizeLinear onnx.reference has; what we use of it is as it was in opset 13


def check_onnx(path: str | os.PathLike[str], source: Module | Network | Quantised, x: Any) -> dict[str, float]:
    """Check a file that `to_onnx` wrote, on rows of raw features: evaluator → the largest difference of a logit.

    onnx.checker with its full check and the strict inference of shapes must accept it. Then onnx.reference, and
    onnxruntime where it is installed, compute all outputs. Logits may differ from the model's by 1e-5 of its largest,
    which is the unit of what is returned; those of int8 by 1 step, the unit likewise. Probabilities and labels must
    follow from the logits.

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
    unit = source.output.scale if isinstance(source, Quantised) else float(abs(truth).max()) or 1.0
    limit = STEPS if isinstance(source, Quantised) else TOLERANCE
    found: dict[str, float] = {}
    for name, evaluate in _evaluators(path):
        logits, probabilities, label = evaluate(rows)
        found[name] = float(abs(logits - truth).max()) / unit
        followed = float(abs(F.softmax(logits) - probabilities).max()) <= TOLERANCE
        if not found[name] <= limit or not followed or not np.array_equal(label, logits.argmax(axis=1)):
            got = f"{found[name]:.2g}" if followed else "probabilities or labels that do not follow from the logits"
            expected = f"within {limit:.2g} of the model's logits, by {name}"
            raise ModelFormatError("check_onnx", str(path), expected=expected, got=got)
    return found


def _evaluators(path: str | os.PathLike[str]) -> Iterator[tuple[str, Callable[[np.ndarray], Any]]]:
    """What computes a model's outputs, by name, once the model has passed ONNX's checks."""
    onnx = library("onnx", "onnx", "check_onnx")
    library("onnx.reference", "onnx", "check_onnx")
    try:
        content = Path(path).read_bytes()
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # of the file system, of protocol buffers, and of either check
        expected = "a file that passes ONNX's checks"
        raise ModelFormatError("check_onnx", str(path), expected=expected, got=str(error)[:300]) from error
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
