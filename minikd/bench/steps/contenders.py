"""Who is measured on whole steps, as a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound, Contender
from minikd.bench.steps.cases import CHECKED, STEPS, Step

_ALL = frozenset(STEPS)
_PREDICTIONS = frozenset(name for name, step in STEPS.items() if step.job == "predict")
_UPDATES = _ALL - _PREDICTIONS
_PLAIN = frozenset(name for name, step in STEPS.items() if step.job != "distil")

_HERE = "minikd.bench.steps."


def _mine(label: str, form: str, able: frozenset[str]) -> Contender:
    return Contender(label, True, _HERE + "ours", form, "", "", able)


def _peer(label: str, module: str, form: str, requires: str, able: frozenset[str], package: str = "") -> Contender:
    return Contender(label, False, _HERE + module, form, requires, f"pip install {package or requires}", able)


CONTENDERS = {
    "plan": _mine("minikd plan", "plan", _ALL),
    "epoch": _mine("minikd epoch", "epoch", _UPDATES),
    "eager": _mine("minikd eager", "eager", _ALL),
    "torch": _peer("PyTorch eager", "peer_torch", "eager", "torch", _ALL),
    "torch-compile": _peer("torch.compile", "peer_torch", "compile", "torch", _ALL),
    "jax": _peer("jax.jit", "peer_jax", "jit", "jax", _ALL),
    "jax-scan": _peer("jax.lax.scan", "peer_jax", "scan", "jax", _UPDATES),
    "sklearn": _peer("scikit-learn", "peer_sklearn", "public", "sklearn", _PLAIN, "scikit-learn"),
    "sklearn-inner": _peer("scikit-learn, inner step", "peer_sklearn", "inner", "sklearn", _PLAIN & _UPDATES),
    "mygrad": _peer("MyGrad", "peer_mygrad", "eager", "mygrad", _UPDATES),
    "onnx": _peer("ONNX Runtime", "peer_onnx", "session", "onnxruntime", _PREDICTIONS, "onnx onnxruntime"),
    "numpy": _peer("NumPy, out=", "peer_numpy", "out", "numpy", _ALL),
}
PEERS = tuple(key for key, contender in CONTENDERS.items() if not contender.ours)
# Those that run a whole epoch in one call; the others hand their loss back after each step.
EPOCHS = frozenset({"epoch", "jax-scan"})


def one_by_one(step: Step, batches: list[tuple[Any, ...]], call: Callable[..., Any]) -> Bound:
    """A contender that takes the next batch in each call; compared are the results of the first few."""
    upcoming = itertools.cycle(batches)

    def following() -> Any:
        return call(*next(upcoming))

    def read(first: Any) -> dict[str, Any]:
        results = np.array([first, *(following() for _ in range(CHECKED - 1))])
        return {"loss": results} if step.optimizer else {"probabilities": results[:, 0]}

    return Bound(following, read)


def whole_epochs(step: Step, call: Callable[[], Any]) -> Bound:
    """A contender whose one call is an epoch and returns the losses of its steps."""
    return Bound(call, lambda result: {"loss": np.asarray(result)[:CHECKED]}, step.steps)
