"""JAX written for speed: the teacher's logits once, and an epoch of steps in one call by jax.lax.scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from distillers.jax_teacher import epoch_of_rows, first_state, forward, predictor, update
from distillers.task import Task


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    x, y, logits_of = jnp.asarray(task.x), jnp.asarray(task.y), jax.jit(forward)
    teacher = [jnp.asarray(a) for a in task.teacher]
    teacher_logits = jnp.concatenate([logits_of(teacher, x[k : k + 4096]) for k in range(0, len(x), 4096)])

    def one_epoch(state: Any, x: Any, teacher_logits: Any, y: Any, order: Any) -> Any:
        def one_step(state: Any, rows: Any) -> Any:
            return update(state, x[rows], teacher_logits[rows], y[rows]), None

        return jax.lax.scan(one_step, state, order)[0]

    epoch, state, rng = jax.jit(one_epoch, donate_argnums=0), first_state(task.student), np.random.default_rng(0)
    for _ in range(task.epochs):
        state = epoch(state, x, teacher_logits, y, epoch_of_rows(rng, len(x)))
    return predictor(jax.block_until_ready(state)[0])
