"""scikit-learn's MLPClassifier: partial_fit on one batch, and the step inside it without the checks around.

Its Adam adds ε to a root that is not corrected for its start at 0; ε is scaled so that the first step is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import BETA1, BETA2, EPS, LR, MOMENTUM, Step
from minikd.bench.steps.contenders import one_by_one

MLPClassifier: Any = import_module("sklearn.neural_network").MLPClassifier


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """`form` is "public" or "inner"."""
    model, batches = _model(step, inputs), step.batches(inputs)
    if not step.optimizer:
        return one_by_one(step, batches, model.predict_proba)
    if form == "public":
        return one_by_one(step, batches, lambda x, y: model.partial_fit(x, y).loss_)
    one_hot = np.eye(step.sizes[-1], dtype=np.float32)
    return one_by_one(step, [(x, one_hot[y]) for x, y in batches], _inner(model))


def _model(step: Step, inputs: dict[str, Any]) -> Any:
    """A classifier with the weights that all begin with, and an optimizer that has taken no step."""
    model = MLPClassifier(
        step.sizes[1:-1],
        solver=step.optimizer or "adam",
        learning_rate_init=LR.get(step.optimizer, 1e-3),
        momentum=MOMENTUM,
        nesterovs_momentum=False,
        beta_1=BETA1,
        beta_2=BETA2,
        epsilon=EPS * (1 - BETA2) ** 0.5,
        alpha=0,
        shuffle=False,
        batch_size=step.batch,
    )
    model.partial_fit(inputs["x"][0], inputs["y"][0], classes=np.arange(step.sizes[-1]))
    weights, biases = inputs["network"][::2], inputs["network"][1::2]
    for own, given in zip(model.coefs_ + model.intercepts_, [w.T for w in weights] + biases, strict=True):
        own[...] = given
    optimizer = model._optimizer
    for moments in (getattr(optimizer, name, []) for name in ("velocities", "ms", "vs")):
        for array in moments:
            array[...] = 0
    optimizer.t = 0
    return model


def _inner(model: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    parameters = model.coefs_ + model.intercepts_
    activations: list[Any] = [None] * model.n_layers_
    deltas: list[Any] = [None] * (model.n_layers_ - 1)
    weights, biases = ([np.empty_like(p) for p in own] for own in (model.coefs_, model.intercepts_))

    def train(x: np.ndarray, one_hot: np.ndarray) -> float:
        activations[0] = x
        loss, *gradients = model._backprop(x, one_hot, None, activations, deltas, weights, biases)
        model._optimizer.update_params(parameters, gradients[0] + gradients[1])
        return float(loss)

    return train
