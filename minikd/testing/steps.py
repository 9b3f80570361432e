"""Hypothesis strategies for what is trained: small networks, and whole training steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd import functional, optim, steps
from minikd.nn import MLP
from minikd.tensor import Tensor
from minikd.testing.strategies import Batch, batches, temperatures

ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu")
OPTIMIZERS = ("SGD", "Adam", "AdamW")


@st.composite
def mlps(
    draw: st.DrawFn, inputs: int | None = None, classes: int | None = None, dtype: Any = np.float32, dropout: float = 0
) -> MLP:
    """A multi-layer perceptron with up to two narrow hidden layers, any activation and a small seed."""
    sizes = [inputs or draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), max_size=2))]
    sizes.append(classes or draw(st.integers(2, 4)))
    return MLP(sizes, draw(st.sampled_from(ACTIVATIONS)), dropout, draw(st.integers(0, 9)), dtype=dtype)


@dataclass(frozen=True)
class TrainingStep:
    """One step of training, described by numbers and words, that can be taken any number of times from its start.

    Attributes
    ----------
    sizes, activation, seed : of the network.
    optimizer, lr : a name of `minikd.optim`, and its learning rate.
    temperature, hard_weight : of the distillation loss; the soft term has the weight 1 - hard_weight.
    features, batch : what the step is taken on.
    """

    sizes: tuple[int, ...]
    activation: str
    seed: int
    optimizer: str
    lr: float
    temperature: float
    hard_weight: float
    features: np.ndarray
    batch: Batch

    def model(self) -> MLP:
        """The network as it begins."""
        return MLP(self.sizes, self.activation, seed=self.seed, dtype=self.features.dtype)

    def run(self, count: int = 3, compiled: bool = False) -> tuple[list[float], list[np.ndarray]]:
        """The losses of `count` steps on the same batch, and the parameters after them."""
        model = self.model()
        optimizer = getattr(optim, self.optimizer)(model.parameters(), self.lr)

        def step(x: Any, teacher: Any, target: Any) -> Any:
            loss = functional.distillation_loss(
                model(Tensor(x)),
                teacher,
                target,
                temperature=self.temperature,
                hard_weight=self.hard_weight,
                soft_weight=1 - self.hard_weight,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        taken = steps.compile(step) if compiled else step
        losses = [float(taken(self.features, self.batch.teacher, self.batch.target).numpy()) for _ in range(count)]
        return losses, [p.numpy().copy() for p in model.parameters()]


@st.composite
def training_steps(draw: st.DrawFn, dtype: Any = np.float32, kind: str = "ordinary") -> TrainingStep:
    """A network, an optimizer, features and a batch of this kind of logits, as a `TrainingStep`."""
    batch = draw(batches(dtype=dtype, kind=kind, ignored=True))
    n, c = batch.teacher.shape
    inputs = draw(st.integers(1, 4))
    features = draw(arrays(dtype, (n, inputs), elements=st.integers(-16, 16).map(lambda k: k / 8)))
    return TrainingStep(
        sizes=(inputs, *draw(st.lists(st.integers(1, 5), max_size=2)), c),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        seed=draw(st.integers(0, 9)),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        lr=draw(st.sampled_from((0.1, 0.01))),
        temperature=draw(temperatures(0.5, 20)),
        hard_weight=draw(st.sampled_from((0.5, 0.0, 1.0, 0.1))),
        features=features,
        batch=batch,
    )
