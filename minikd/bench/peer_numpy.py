"""Plain NumPy as a careful person writes it: every formula fused as far as in-place arithmetic goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

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

Array = np.ndarray


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """The function of this name on the inputs; optimizers get copies of their state, and a scratch array."""
    arrays = [array.copy() for array in peer_arrays(kernel, inputs)]
    if kernel.name in UPDATES:
        state = dict(zip(inputs, arrays, strict=False))
        call = partial(UPDATES[kernel.name], *arrays, np.empty_like(arrays[0]))
        return Bound(call, lambda result: {name: state[name] for name in kernel.outputs})
    return Bound(partial(FUNCTIONS[kernel.name], *arrays), partial(named_outputs, kernel))


def named_outputs(kernel: Kernel, result: Any) -> dict[str, Any]:
    """A result, or several, under the names of the kernel's outputs."""
    return dict(zip(kernel.outputs, result if isinstance(result, tuple) else (result,), strict=False))


# --- softmax ---


def softmax(x: Array) -> Array:
    e = x - x.max(axis=1, keepdims=True)
    np.exp(e, out=e)
    e /= e.sum(axis=1, keepdims=True)
    return e


def log_softmax(x: Array) -> Array:
    z = x - x.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z


def softmax_vjp(dy: Array, y: Array) -> Array:
    dx = dy - np.einsum("nc,nc->n", dy, y)[:, None]
    dx *= y
    return dx


def log_softmax_vjp(dy: Array, y: Array) -> Array:
    dx = np.exp(y)
    dx *= dy.sum(axis=1, keepdims=True)
    np.subtract(dy, dx, out=dx)
    return dx


# --- losses with their gradient ---


def cross_entropy(logits: Array, target: Array) -> tuple[Any, Array]:
    n, rows = len(logits), np.arange(len(logits))
    z = logits - logits.max(axis=1, keepdims=True)
    scores = z[rows, target]
    np.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    loss = (np.log(total[:, 0]) - scores).mean()
    z /= total * np.float32(n)
    z[rows, target] -= np.float32(1 / n)
    return loss, z


def soft_cross_entropy(logits: Array, target: Array) -> tuple[Any, Array]:
    z = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(z)
    total = p.sum(axis=1, keepdims=True)
    z -= np.log(total)
    loss = -np.einsum("nc,nc->", target, z) / len(z)
    p *= target.sum(axis=1, keepdims=True) / total
    p -= target
    p *= np.float32(1 / len(z))
    return loss, p


def kl_div(log_p: Array, q: Array) -> tuple[Any, Array]:
    n = len(q)
    log_q = np.log(np.where(q > 0, q, 1))
    log_q -= log_p
    return np.einsum("nc,nc->", q, log_q) / n, q * np.float32(-1 / n)


def distillation_loss(student: Array, teacher: Array, target: Array) -> tuple[Any, Array]:
    n, t = len(student), TEMPERATURE
    hard, gradient = cross_entropy(student, target)
    gradient *= np.float32(HARD_WEIGHT)
    log_p, log_q = student * np.float32(1 / t), teacher * np.float32(1 / t)
    scratch = np.empty_like(student)
    for z in (log_p, log_q):
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z, out=scratch).sum(axis=1, keepdims=True))
    q = np.exp(log_q, out=scratch)
    log_q -= log_p
    soft = t * t / n * np.einsum("nc,nc->", q, log_q)
    p = np.exp(log_p, out=log_p)
    p -= q
    p *= np.float32(SOFT_WEIGHT * t / n)
    gradient += p
    return HARD_WEIGHT * hard + SOFT_WEIGHT * soft, gradient


# --- layers ---


def bias_relu(x: Array, b: Array) -> Array:
    y = x + b
    np.maximum(y, 0, out=y)
    return y


def bias_relu_vjp(dy: Array, y: Array) -> tuple[Array, Array]:
    dx = dy * (y > 0)
    return dx, dx.sum(axis=0)


def bias_tanh(x: Array, b: Array) -> Array:
    y = x + b
    np.tanh(y, out=y)
    return y


def bias_tanh_vjp(dy: Array, y: Array) -> tuple[Array, Array]:
    dx = np.square(y)
    np.subtract(np.float32(1), dx, out=dx)
    dx *= dy
    return dx, dx.sum(axis=0)


def bias_sigmoid(x: Array, b: Array) -> Array:
    y = x + b
    np.negative(y, out=y)
    np.exp(y, out=y)
    y += 1
    np.reciprocal(y, out=y)
    return y


def bias_sigmoid_vjp(dy: Array, y: Array) -> tuple[Array, Array]:
    dx = 1 - y
    dx *= y
    dx *= dy
    return dx, dx.sum(axis=0)


_RANDOM = np.random.default_rng(0)


def dropout(x: Array) -> tuple[Array, Array]:
    mask = (_RANDOM.random(x.shape, dtype=np.float32) >= DROPPED).astype(np.float32)
    mask *= np.float32(1 / (1 - DROPPED))
    return x * mask, mask


# --- rows and classes ---


def take(x: Array, rows: Array) -> Array:
    return x.take(rows, axis=0)


def take_scaled(x: Array, rows: Array, scale: Array, shift: Array) -> Array:
    y = x.take(rows, axis=0) * scale
    y += shift
    return y


def argmax(x: Array) -> Array:
    return x.argmax(axis=1)


def correct_count(logits: Array, target: Array) -> Any:
    return np.count_nonzero(logits.argmax(axis=1) == target)


# --- optimizers ---


def adam_step(w: Array, m: Array, v: Array, g: Array, scratch: Array) -> None:
    m *= np.float32(BETA1)
    m += np.multiply(g, np.float32(1 - BETA1), out=scratch)
    v *= np.float32(BETA2)
    np.multiply(g, g, out=scratch)
    scratch *= np.float32(1 - BETA2)
    v += scratch
    np.sqrt(v, out=scratch)
    scratch *= np.float32(1 / np.sqrt(1 - BETA2**STEP))
    scratch += np.float32(EPS)
    np.divide(m, scratch, out=scratch)
    scratch *= np.float32(LR / (1 - BETA1**STEP))
    w -= scratch


def sgd_step(w: Array, v: Array, g: Array, scratch: Array) -> None:
    v *= np.float32(MOMENTUM)
    v += g
    w -= np.multiply(v, np.float32(LR), out=scratch)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": softmax,
    "softmax_vjp": softmax_vjp,
    "log_softmax": log_softmax,
    "log_softmax_vjp": log_softmax_vjp,
    "cross_entropy": cross_entropy,
    "soft_cross_entropy": soft_cross_entropy,
    "kl_div": kl_div,
    "distillation_loss": distillation_loss,
    "bias_relu": bias_relu,
    "bias_relu_vjp": bias_relu_vjp,
    "bias_tanh": bias_tanh,
    "bias_tanh_vjp": bias_tanh_vjp,
    "bias_sigmoid": bias_sigmoid,
    "bias_sigmoid_vjp": bias_sigmoid_vjp,
    "dropout": dropout,
    "take": take,
    "take_scaled": take_scaled,
    "argmax": argmax,
    "correct_count": correct_count,
}
UPDATES: dict[str, Callable[..., None]] = {"adam_step": adam_step, "sgd_step": sgd_step}
