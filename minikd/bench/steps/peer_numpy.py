"""Plain NumPy as a careful person writes it, every array allocated once; and the bare matrix products of a step.

All parameters are views of one flat array, so that an update is one pass; the gradient of a bias is a product with
ones, which BLAS sums faster than NumPy adds up a column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import (
    BETA1,
    BETA2,
    EPS,
    HARD_WEIGHT,
    LR,
    MOMENTUM,
    SOFT_WEIGHT,
    TEMPERATURE,
    Network,
    Step,
    pairs,
)
from minikd.bench.steps.contenders import one_by_one

Array = np.ndarray


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """The step on arrays of its own."""
    call = _training(step, inputs) if step.optimizer else _prediction(step, inputs)
    return one_by_one(step, step.batches(inputs), call)


def empty(*shape: int) -> Array:
    return np.empty(shape, np.float32)


class Layers:
    """A network with the arrays of its activations."""

    def __init__(self, network: Network, batch: int) -> None:
        self.layers = pairs(network)
        self.outputs = [empty(batch, len(bias)) for _, bias in self.layers]

    def forward(self, x: Array) -> Array:
        for k, ((weight, bias), y) in enumerate(zip(self.layers, self.outputs, strict=True)):
            np.matmul(self.outputs[k - 1] if k else x, weight.T, out=y)
            np.add(y, bias, out=y)
            if k < len(self.layers) - 1:
                np.maximum(y, 0, out=y)
        return self.outputs[-1]


def softmax(x: Array, out: Array, total: Array) -> None:
    """The softmax of rows; the rows' maxima, then their sums of exponentials, are left in `total`."""
    np.max(x, axis=1, keepdims=True, out=total)
    np.subtract(x, total, out=out)
    np.exp(out, out=out)
    np.sum(out, axis=1, keepdims=True, out=total)
    np.divide(out, total, out=out)


def _prediction(step: Step, inputs: dict[str, Any]) -> Callable[[Array], Array]:
    layers, total = Layers(inputs["network"], step.batch), empty(step.batch, 1)

    def predict(x: Array) -> Array:
        y = np.empty((len(x), step.sizes[-1]), np.float32)  # a new one: the caller keeps it
        softmax(layers.forward(x), y, total)
        return y

    return predict


# --- training ---


def _training(step: Step, inputs: dict[str, Any]) -> Callable[..., float]:
    values = np.concatenate([a.ravel() for a in inputs["network"]])
    gradients = np.empty_like(values)
    student = Layers(views(values, inputs["network"]), step.batch)
    backward = Backward(student, pairs(views(gradients, inputs["network"])), step.batch)
    update = (Adam if step.optimizer == "adam" else Momentum)(values, gradients)
    loss = (Distillation if step.teacher else CrossEntropy)(step.batch, step.sizes[-1])
    teacher = Layers(inputs["teacher"], step.batch) if step.teacher and not step.stored else None

    def train(x: Array, y: Array, *logits: Array) -> float:
        soft = (teacher.forward(x),) if teacher else logits
        value = loss(student.forward(x), y, *soft)
        backward(x, loss.gradient)
        update()
        return value

    return train


def views(flat: Array, network: Network) -> Network:
    """Pieces of the flat array in the shapes of the network's parameters."""
    pieces = np.split(flat, np.cumsum([a.size for a in network])[:-1])
    return [piece.reshape(a.shape) for piece, a in zip(pieces, network, strict=True)]


class Backward:
    """The gradients of a network's parameters from that of its logits."""

    def __init__(self, student: Layers, gradients: list[tuple[Array, Array]], batch: int) -> None:
        self.student, self.gradients = student, gradients
        self.inner = [np.empty_like(y) for y in student.outputs[:-1]]
        self.positive = [np.empty(y.shape, bool) for y in student.outputs[:-1]]
        self.ones = np.ones(batch, np.float32)

    def __call__(self, x: Array, dy: Array) -> None:
        for k in reversed(range(len(self.gradients))):
            below = self.student.outputs[k - 1] if k else x
            weight_gradient, bias_gradient = self.gradients[k]
            np.matmul(dy.T, below, out=weight_gradient)
            np.matmul(self.ones, dy, out=bias_gradient)
            if k:
                dx, positive = self.inner[k - 1], self.positive[k - 1]
                np.matmul(dy, self.student.layers[k][0], out=dx)
                np.greater(below, 0, out=positive)
                dy = np.multiply(dx, positive, out=dx)


class CrossEntropy:
    """The mean cross-entropy; its gradient stands in `gradient`."""

    def __init__(self, batch: int, classes: int) -> None:
        self.gradient, self.total = empty(batch, classes), empty(batch, 1)
        self.starts, self.of_labels = classes * np.arange(batch), np.empty(batch, np.intp)
        self.flat, self.scores = self.gradient.reshape(-1), empty(batch)

    def __call__(self, z: Array, y: Array) -> float:
        np.add(self.starts, y, out=self.of_labels)
        softmax(z, self.gradient, self.total)
        self.flat.take(self.of_labels, out=self.scores, mode="clip")
        loss = -float(np.log(self.scores, out=self.scores).mean())
        self.flat[self.of_labels] -= np.float32(1)
        np.multiply(self.gradient, np.float32(1 / len(z)), out=self.gradient)
        return loss


class Distillation(CrossEntropy):
    """The distillation loss; its gradient stands in `gradient`."""

    def __init__(self, batch: int, classes: int) -> None:
        super().__init__(batch, classes)
        self.scaled, self.p, self.q = (empty(batch, classes) for _ in "zpq")

    def __call__(self, z: Array, y: Array, *logits: Array) -> float:
        hard, p, q = super().__call__(z, y), self.p, self.q
        for scores, out in ((z, p), (*logits, q)):
            softmax(np.multiply(scores, np.float32(1 / TEMPERATURE), out=self.scaled), out, self.total)
        soft = np.vdot(q, np.log(np.divide(q, p, out=self.scaled), out=self.scaled)) * TEMPERATURE**2 / len(z)
        np.subtract(p, q, out=p)
        np.multiply(p, np.float32(SOFT_WEIGHT * TEMPERATURE / len(z)), out=p)
        np.multiply(self.gradient, np.float32(HARD_WEIGHT), out=self.gradient)
        np.add(self.gradient, p, out=self.gradient)
        return HARD_WEIGHT * hard + SOFT_WEIGHT * float(soft)


class Momentum:
    """SGD with momentum on flat arrays."""

    def __init__(self, values: Array, gradients: Array) -> None:
        self.w, self.g, self.v, self.scratch = values, gradients, np.zeros_like(values), np.empty_like(values)

    def __call__(self) -> None:
        np.multiply(self.v, np.float32(MOMENTUM), out=self.v)
        np.add(self.v, self.g, out=self.v)
        np.subtract(self.w, np.multiply(self.v, np.float32(LR["sgd"]), out=self.scratch), out=self.w)


class Adam:
    """Adam on flat arrays, in pieces that stay in the cache."""

    PIECE = 16384

    def __init__(self, values: Array, gradients: Array) -> None:
        arrays = values, gradients, np.zeros_like(values), np.zeros_like(values), np.empty_like(values)
        starts = range(0, len(values), self.PIECE)
        self.pieces = [[a[start : start + self.PIECE] for a in arrays] for start in starts]
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        rate = np.float32(LR["adam"] / (1 - BETA1**self.steps))
        root = np.float32((1 - BETA2**self.steps) ** -0.5)
        for w, g, m, v, scratch in self.pieces:
            np.multiply(m, np.float32(BETA1), out=m)
            np.add(m, np.multiply(g, np.float32(1 - BETA1), out=scratch), out=m)
            np.multiply(v, np.float32(BETA2), out=v)
            np.multiply(g, g, out=scratch)
            np.add(v, np.multiply(scratch, np.float32(1 - BETA2), out=scratch), out=v)
            np.sqrt(v, out=scratch)
            np.multiply(scratch, root, out=scratch)
            np.add(scratch, np.float32(EPS), out=scratch)
            np.divide(m, scratch, out=scratch)
            np.subtract(w, np.multiply(scratch, rate, out=scratch), out=w)


# --- the yardstick ---


def products(step: Step, inputs: dict[str, Any]) -> Callable[[], None]:
    """The matrix products of a step and nothing else: of every layer forward, then those of both gradients."""
    x = inputs["x"][0]
    calls = _forward_products(inputs["network"], x)
    if step.optimizer:
        calls += _backward_products(inputs["network"], x)
    if step.teacher and not step.stored:
        calls += _forward_products(inputs["teacher"], x)

    def call() -> None:
        for product in calls:
            product()

    return call


def _forward_products(network: Network, x: Array) -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = []
    for weight, bias in pairs(network):
        y = np.ones((len(x), len(bias)), np.float32)
        calls.append(partial(np.matmul, x, weight.T, out=y))
        x = y
    return calls


def _backward_products(network: Network, x: Array) -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = []
    for k, (weight, _) in enumerate(pairs(network)):
        outputs, inputs = weight.shape
        dy = np.ones((len(x), outputs), np.float32)
        below = np.ones((len(x), inputs), np.float32)
        calls.append(partial(np.matmul, dy.T, below, out=np.empty_like(weight)))
        if k:
            calls.append(partial(np.matmul, dy, weight, out=np.empty_like(below)))
    return calls
