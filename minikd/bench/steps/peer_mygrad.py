"""MyGrad, the other autograd on NumPy, with the update and the teacher of our NumPy peer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE, Step, pairs, softmax
from minikd.bench.steps.contenders import one_by_one
from minikd.bench.steps.peer_numpy import Adam, Layers, Momentum, views

mg: Any = import_module("mygrad")
nnet: Any = import_module("mygrad.nnet")
mg.turn_memory_guarding_off()  # as its documentation advises where speed matters


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """A step with MyGrad's forward and backward pass."""
    values = np.concatenate([a.ravel() for a in inputs["network"]])
    gradients = np.empty_like(values)
    parameters = [mg.tensor(view, copy=False) for view in views(values, inputs["network"])]
    places = views(gradients, inputs["network"])
    update = (Adam if step.optimizer == "adam" else Momentum)(values, gradients)
    teacher = Layers(inputs["teacher"], step.batch) if step.teacher and not step.stored else None

    def train(x: np.ndarray, y: np.ndarray, *logits: np.ndarray) -> float:
        soft = (teacher.forward(x),) if teacher else logits
        loss = loss_of(forward(parameters, x), y, *soft)
        loss.backward()
        for place, parameter in zip(places, parameters, strict=True):
            np.copyto(place, parameter.grad)
        update()
        return float(loss)

    return one_by_one(step, step.batches(inputs), train)


def forward(parameters: list[Any], x: Any) -> Any:
    """The logits, of weights and biases in turn."""
    *hidden, (weight, bias) = pairs(parameters)
    for w, b in hidden:
        x = nnet.activations.relu(x @ w.T + b)
    return x @ weight.T + bias


def loss_of(z: Any, y: np.ndarray, *logits: np.ndarray) -> Any:
    """The cross-entropy, or with a teacher's logits the distillation loss."""
    hard = nnet.losses.softmax_crossentropy(z, y)
    if not logits:
        return hard
    q = softmax(logits[0], TEMPERATURE)
    log_p = nnet.activations.logsoftmax(z * np.float32(1 / TEMPERATURE))
    soft = (np.vdot(q, np.log(q)) - (log_p * q).sum()) * np.float32(TEMPERATURE**2 / len(y))
    return hard * np.float32(HARD_WEIGHT) + soft * np.float32(SOFT_WEIGHT)
