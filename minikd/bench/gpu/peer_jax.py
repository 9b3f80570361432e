"""JAX on the GPU: the same functions as on the CPU, since XLA puts arrays on the GPU where it has one."""

from __future__ import annotations

import os
from typing import Any

from minikd.bench.cases import Inputs
from minikd.bench.contenders import Bound


def make(form: str, kernel: Any, inputs: Inputs) -> Bound:
    """The bound contender of minikd.bench.peer_jax.

    Raises
    ------
    RuntimeError : JAX sees no GPU here.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it would take most of the GPU's memory
    from minikd.bench import peer_jax

    if peer_jax.jax.default_backend() != "gpu":
        raise RuntimeError("JAX sees no GPU: pip install 'jax[cuda12]'")
    return peer_jax.make(form, kernel, inputs)
