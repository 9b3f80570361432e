"""JAX on the CPU: every function under jax.jit, waited for with block_until_ready; optimizers donate their state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from minikd.bench.cases import (
    BETA1,
    BETA2,
    DROPPED,
    EPS,
    HARD_WEIGHT,
    LR,
    MOMENTUM,
    SOFT_WEIGHT,
    STEP,
    TEMPERATURE,
    Inputs,
    Kernel,
    peer_arrays,
)
from minikd.bench.contenders import Bound
from minikd.bench.peer_numpy import named_outputs

jax: Any = import_module("jax")
jnp: Any = import_module("jax.numpy")
xlogy: Any = import_module("jax.scipy.special").xlogy


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """The function of this name, compiled, on the inputs."""
    arrays = [jnp.array(array) for array in peer_arrays(kernel, inputs)]
    read = partial(named_outputs, kernel)
    if kernel.name in UPDATES:
        return Bound(_Update(UPDATES[kernel.name], arrays), read)
    if kernel.name in LOSSES:
        return Bound(_waiting(jax.value_and_grad(LOSSES[kernel.name]), arrays), read)
    random = [jax.random.key(0)] if kernel.name == "dropout" else []
    return Bound(_waiting(FUNCTIONS[kernel.name], arrays + random), read)


def _waiting(function: Callable[..., Any], arrays: list[Any]) -> Callable[[], Any]:
    compiled, wait = jax.jit(function), jax.block_until_ready
    return lambda: wait(compiled(*arrays))


class _Update:
    """An optimizer step that hands its state on to the next one."""

    def __init__(self, step: Callable[..., Any], arrays: list[Any]) -> None:
        self.state, self.g = tuple(arrays[:-1]), arrays[-1]
        self.step = jax.jit(step, donate_argnums=tuple(range(len(self.state))))

    def __call__(self) -> Any:
        self.state = jax.block_until_ready(self.step(*self.state, self.g))
        return self.state


# --- losses ---


def cross_entropy(logits: Any, target: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1).mean()


def soft_cross_entropy(logits: Any, target: Any) -> Any:
    return -(target * jax.nn.log_softmax(logits)).sum() / len(logits)


def kl_div(log_p: Any, q: Any) -> Any:
    return (xlogy(q, q) - q * log_p).sum() / len(q)


def distillation_loss(student: Any, teacher: Any, target: Any) -> Any:
    log_p, log_q = jax.nn.log_softmax(student / TEMPERATURE), jax.nn.log_softmax(teacher / TEMPERATURE)
    soft = (jnp.exp(log_q) * (log_q - log_p)).sum() / len(student)
    return HARD_WEIGHT * cross_entropy(student, target) + SOFT_WEIGHT * TEMPERATURE**2 * soft


# --- layers ---


def bias_relu_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = jnp.where(y > 0, dy, 0)
    return dx, dx.sum(axis=0)


def bias_tanh_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = dy * (1 - y * y)
    return dx, dx.sum(axis=0)


def bias_sigmoid_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = dy * y * (1 - y)
    return dx, dx.sum(axis=0)


def bias_gelu_vjp(dy: Any, u: Any) -> tuple[Any, Any]:
    (dx,) = jax.vjp(partial(jax.nn.gelu, approximate=False), u)[1](dy)
    return dx, dx.sum(axis=0)


def dropout(x: Any, key: Any) -> tuple[Any, Any]:
    mask = jax.random.bernoulli(jax.random.fold_in(key, STEP), 1 - DROPPED, x.shape)
    return jnp.where(mask, x / (1 - DROPPED), 0), mask


# --- optimizers ---


def adam_step(w: Any, m: Any, v: Any, g: Any) -> tuple[Any, Any, Any]:
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    rate, root = LR / (1 - BETA1**STEP), (1 - BETA2**STEP) ** -0.5
    return w - rate * m / (jnp.sqrt(v) * root + EPS), m, v


def sgd_step(w: Any, v: Any, g: Any) -> tuple[Any, Any]:
    v = MOMENTUM * v + g
    return w - LR * v, v


LOSSES: dict[str, Callable[..., Any]] = {
    "distillation_loss": distillation_loss,
    "cross_entropy": cross_entropy,
    "soft_cross_entropy": soft_cross_entropy,
    "kl_div": kl_div,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": jax.nn.softmax,
    "softmax_vjp": lambda dy, y: y * (dy - (dy * y).sum(axis=1, keepdims=True)),
    "log_softmax": jax.nn.log_softmax,
    "log_softmax_vjp": lambda dy, y: dy - jnp.exp(y) * dy.sum(axis=1, keepdims=True),
    "bias_relu": lambda x, b: jnp.maximum(x + b, 0),
    "bias_relu_vjp": bias_relu_vjp,
    "bias_tanh": lambda x, b: jnp.tanh(x + b),
    "bias_tanh_vjp": bias_tanh_vjp,
    "bias_sigmoid": lambda x, b: jax.nn.sigmoid(x + b),
    "bias_sigmoid_vjp": bias_sigmoid_vjp,
    "bias_gelu": lambda x, b: jax.nn.gelu(x + b, approximate=False),
    "bias_gelu_vjp": bias_gelu_vjp,
    "dropout": dropout,
    "take": lambda x, rows: jnp.take(x, rows, axis=0, mode="clip"),
    "take_scaled": lambda x, rows, scale, shift: jnp.take(x, rows, axis=0, mode="clip") * scale + shift,
    "argmax": lambda x: x.argmax(axis=1),
    "correct_count": lambda logits, target: (logits.argmax(axis=1) == target).sum(),
}
UPDATES: dict[str, Callable[..., Any]] = {"adam_step": adam_step, "sgd_step": sgd_step}
