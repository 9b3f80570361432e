"""JAX with a jitted step: batches by index, the teacher asked in every step, the state donated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from distillers.task import BATCH, HARD_WEIGHT, LR, SOFT_WEIGHT, TEMPERATURE, Task

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    x, y = jnp.asarray(task.x), jnp.asarray(task.y)
    teacher = [jnp.asarray(a) for a in task.teacher]

    def one_step(state: Any, x: Any, y: Any, rows: Any) -> Any:
        batch = x[rows]
        return update(state, batch, forward(teacher, batch), y[rows])

    step, state, rng = jax.jit(one_step, donate_argnums=0), first_state(task.student), np.random.default_rng(0)
    for _ in range(task.epochs):
        for rows in epoch_of_rows(rng, len(x)):
            state = step(state, x, y, rows)
    return predictor(jax.block_until_ready(state)[0])


def epoch_of_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """Row numbers of whole batches in a new order; a smaller last batch would be compiled anew and is left out."""
    batch = min(BATCH, n)
    return rng.permutation(n)[: n // batch * batch].reshape(-1, batch)


def forward(network: Any, x: Any) -> Any:
    """The logits, of weights and biases in turn."""
    *hidden, (weight, bias) = zip(network[::2], network[1::2], strict=True)
    for w, b in hidden:
        x = jax.nn.relu(x @ w.T + b)
    return x @ weight.T + bias


def distillation_loss(network: Any, x: Any, teacher_logits: Any, y: Any) -> Any:
    z = forward(network, x)
    log_p, log_q = jax.nn.log_softmax(z / TEMPERATURE), jax.nn.log_softmax(teacher_logits / TEMPERATURE)
    soft = (jnp.exp(log_q) * (log_q - log_p)).sum() / len(z)
    hard = -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1).mean()
    return HARD_WEIGHT * hard + SOFT_WEIGHT * TEMPERATURE**2 * soft


def first_state(network: list[np.ndarray]) -> Any:
    """Parameters, both moments of Adam, and the number of steps so far."""
    parameters = [jnp.array(a) for a in network]
    return parameters, [jnp.zeros_like(p) for p in parameters], [jnp.zeros_like(p) for p in parameters], jnp.zeros(())


def update(state: Any, x: Any, teacher_logits: Any, y: Any) -> Any:
    """One step of Adam."""
    parameters, first, second, count = state
    gradients = jax.grad(distillation_loss)(parameters, x, teacher_logits, y)
    count = count + 1
    first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(first, gradients, strict=True)]
    second = [BETA2 * v + (1 - BETA2) * g * g for v, g in zip(second, gradients, strict=True)]
    rate, root = LR / (1 - BETA1**count), (1 - BETA2**count) ** -0.5
    moved = [w - rate * m / (jnp.sqrt(v) * root + EPS) for w, m, v in zip(parameters, first, second, strict=True)]
    return moved, first, second, count


def predictor(network: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function from features to class ids."""
    return lambda x: np.asarray(forward(network, jnp.asarray(x)).argmax(axis=1))
