"""SciPy's own softmax and log-softmax, and GELU with its normal distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from minikd.bench.cases import Inputs, Kernel, peer_arrays
from minikd.bench.contenders import Bound
from minikd.bench.peer_numpy import named_outputs

special: Any = import_module("scipy.special")
_DENSITY = np.float32(1 / np.sqrt(2 * np.pi))


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """The function of this name on the inputs."""
    return Bound(partial(FUNCTIONS[kernel.name], *peer_arrays(kernel, inputs)), partial(named_outputs, kernel))


def bias_gelu(x: np.ndarray, b: np.ndarray) -> np.ndarray:
    u = x + b
    u *= special.ndtr(u)
    return u


def bias_gelu_vjp(dy: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    dx = np.square(u)
    dx *= np.float32(-0.5)
    np.exp(dx, out=dx)
    dx *= _DENSITY
    dx *= u
    dx += special.ndtr(u)
    dx *= dy
    return dx, dx.sum(axis=0)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": partial(special.softmax, axis=1),
    "log_softmax": partial(special.log_softmax, axis=1),
    "bias_gelu": bias_gelu,
    "bias_gelu_vjp": bias_gelu_vjp,
}
