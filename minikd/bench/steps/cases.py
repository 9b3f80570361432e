"""What is measured: whole steps of training, distillation and prediction, as data, and what they must give in float64.

A training step is forward, loss, backward and update. In a distillation step the teacher's logits are computed first,
or given. All weights are drawn once and handed to everybody, as (outputs, inputs) and (outputs,) in turn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.bench.cases import error

Network = list[np.ndarray]

LR = {"sgd": 0.05, "adam": 1e-3}
MOMENTUM, BETA1, BETA2, EPS = 0.9, 0.9, 0.999, 1e-8
TEMPERATURE, HARD_WEIGHT, SOFT_WEIGHT = 4.0, 0.1, 0.9
CHECKED = 3  # steps whose losses (rows whose probabilities) are compared with those in float64 …
TOLERANCE = 1e-4  # … and may differ from them by this much, relative to the largest


@dataclass(frozen=True)
class Step:
    """One step as it is measured.

    Attributes
    ----------
    sizes : of the network that is trained, or asked for a prediction.
    batch : rows in a step.
    optimizer : "sgd" (with momentum), "adam", or nothing for a prediction.
    teacher : sizes of the teacher of a distillation step.
    stored : whether the teacher's logits are given.
    steps : different batches; an epoch is one pass over them.
    """

    sizes: tuple[int, ...]
    batch: int
    optimizer: str = ""
    teacher: tuple[int, ...] = ()
    stored: bool = False
    steps: int = 50

    @property
    def job(self) -> str:
        """What the step is for: "train", "distil" or "predict"."""
        return ("distil" if self.teacher else "train") if self.optimizer else "predict"

    @property
    def label(self) -> str:
        """The step for people: "64-32-10, Adam, batch 32"."""
        what = {"sgd": "SGD with momentum", "adam": "Adam", "": "prediction"}[self.optimizer]
        teacher = "'s logits stored" if self.stored else f" {_dashes(self.teacher)}"
        by = f", teacher{teacher}" if self.teacher else ""
        return f"{_dashes(self.sizes)}, {what}, batch {self.batch}{by}"

    def make_inputs(self) -> dict[str, Any]:
        """Data and weights, the same in every process; labels are drawn at random, so that there is always a loss."""
        rng = np.random.default_rng(20260)
        x = rng.standard_normal((self.steps, self.batch, self.sizes[0]), dtype=np.float32)
        y = rng.integers(0, self.sizes[-1], (self.steps, self.batch))
        inputs: dict[str, Any] = {"x": x, "y": y, "network": make_network(rng, self.sizes)}
        if self.teacher:
            inputs["teacher"] = make_network(rng, self.teacher)
            inputs["logits"] = np.stack([activations(inputs["teacher"], rows)[-1] for rows in x])
        return inputs

    def arguments(self, inputs: dict[str, Any]) -> tuple[str, ...]:
        """The inputs of which every step takes another row."""
        return ("x", *(("y",) if self.optimizer else ()), *(("logits",) if self.stored else ()))

    def batches(self, inputs: dict[str, Any]) -> list[tuple[np.ndarray, ...]]:
        """What each step of an epoch takes."""
        return list(zip(*(inputs[name] for name in self.arguments(inputs)), strict=True))

    def expected(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """The first losses, or the first rows' probabilities, in float64."""
        if not self.optimizer:
            doubles = [a.astype(np.float64) for a in inputs["network"]]
            return {"probabilities": softmax(activations(doubles, inputs["x"][:CHECKED, 0])[-1])}
        return {"loss": np.array(losses(self, inputs, CHECKED))}

    def errors(self, got: dict[str, Any], expected: dict[str, np.ndarray], inputs: dict[str, Any]) -> dict[str, float]:
        """The error of each output; infinite where the output is not finite."""
        return {name: error(np.asarray(got[name], np.float64), expected[name]) for name in expected}


def _dashes(sizes: tuple[int, ...]) -> str:
    return "-".join(map(str, sizes))


_SMALL, _MIDDLE, _HINTON, _LARGE = (64, 32, 10), (64, 128, 64, 10), (784, 800, 800, 10), (784, 1200, 1200, 10)

STEPS = {
    "sgd-64-32-10": Step(_SMALL, 32, "sgd"),
    "adam-64-32-10": Step(_SMALL, 32, "adam"),
    "adam-64-128-64-10": Step(_MIDDLE, 64, "adam"),
    "adam-784-800-800-10": Step(_HINTON, 128, "adam", steps=10),
    "adam-784-1200-1200-10": Step(_LARGE, 128, "adam", steps=10),
    "distil-784-800-800-10": Step(_HINTON, 128, "adam", _LARGE, steps=10),
    "distil-784-800-800-10-stored": Step(_HINTON, 128, "adam", _LARGE, stored=True, steps=10),
    "predict-64-32-10": Step(_SMALL, 1),
    "predict-784-800-800-10": Step(_HINTON, 1),
}
QUICK = ("adam-64-32-10", "predict-64-32-10")


# --- weights, and the steps in float64 ---


def make_network(rng: np.random.Generator, sizes: tuple[int, ...]) -> Network:
    """Weights with He's deviation and biases of 0, in turn."""
    arrays: Network = []
    for inputs, outputs in itertools.pairwise(sizes):
        weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
        arrays += [weight * np.float32((2 / inputs) ** 0.5), np.zeros(outputs, np.float32)]
    return arrays


def pairs(network: Network) -> list[tuple[Any, Any]]:
    """The layers' weights, each with its bias."""
    return list(zip(network[::2], network[1::2], strict=True))


def activations(network: Network, x: np.ndarray) -> list[np.ndarray]:
    """The inputs, what each hidden layer puts out behind its ReLU, and the logits."""
    outputs = [x]
    for weight, bias in pairs(network):
        z = outputs[-1] @ weight.T + bias
        outputs.append(z if len(outputs) == len(network) // 2 else np.maximum(z, 0))
    return outputs


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def loss_and_gradient(z: np.ndarray, y: np.ndarray, teacher: np.ndarray | None) -> tuple[float, np.ndarray]:
    """The mean cross-entropy with the labels or, with a teacher's logits, the distillation loss."""
    n, labels = len(z), np.eye(z.shape[1])[y]
    hard, gradient = -(labels * np.log(softmax(z))).sum() / n, (softmax(z) - labels) / n
    if teacher is None:
        return float(hard), gradient
    t = TEMPERATURE
    p, q = softmax(z, t), softmax(teacher, t)
    soft = t * t * (q * np.log(q / p)).sum() / n
    return HARD_WEIGHT * hard + SOFT_WEIGHT * soft, HARD_WEIGHT * gradient + SOFT_WEIGHT * t * (p - q) / n


def losses(step: Step, inputs: dict[str, Any], count: int) -> list[float]:
    """The losses of the first steps from the weights that all begin with."""
    weights, teacher = ([a.astype(np.float64) for a in inputs.get(name, ())] for name in ("network", "teacher"))
    first, second = ([np.zeros_like(w) for w in weights] for _ in "mv")
    found = []
    for k in range(count):
        x = inputs["x"][k].astype(np.float64)
        soft = inputs["logits"][k].astype(np.float64) if step.stored else activations(teacher, x)[-1]
        outputs = activations(weights, x)
        loss, dz = loss_and_gradient(outputs[-1], inputs["y"][k], soft if step.teacher else None)
        found.append(loss)
        gradients: Network = []
        for (weight, _), below in reversed(list(zip(pairs(weights), outputs[:-1], strict=True))):
            gradients = [dz.T @ below, dz.sum(axis=0), *gradients]
            dz = (dz @ weight) * (below > 0)
        update(step.optimizer, weights, gradients, first, second, k + 1)
    return found


def update(optimizer: str, weights: Network, gradients: Network, first: Network, second: Network, count: int) -> None:
    """One step of SGD with momentum, or of Adam, in place."""
    lr = LR[optimizer]
    for w, g, m, v in zip(weights, gradients, first, second, strict=True):
        if optimizer == "sgd":
            m[...] = MOMENTUM * m + g
            w -= lr * m
        else:
            m[...] = BETA1 * m + (1 - BETA1) * g
            v[...] = BETA2 * v + (1 - BETA2) * g * g
            w -= lr * (m / (1 - BETA1**count)) / (np.sqrt(v / (1 - BETA2**count)) + EPS)
