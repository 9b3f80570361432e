"""Kernels made of other kernels and of matrix products: one way through them for every backend.

Each is ``kernel(run, xp, *buffers, **attrs)`` with the buffers of its operation; `run(name, *buffers, **attrs)` runs a
kernel of the backend in use, and `xp` is the array module of its buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from minikd.errors import bad_temperature
from minikd.kernels.arrays import on_device
from minikd.kernels.reference import quietly
from minikd.ops.elementwise import ACTIVATIONS
from minikd.ops.losses import labelled_rows, row_scale

Run = Callable[..., None]

# --- linear and distillation loss, in chunks of rows ---

# What a chunk's logits may take, those of student and teacher and the gradient together: large enough for full speed
# in the matrix products.
BYTES_OF_LOGITS = 48 * 2**20
# Fewer rows than this make the products slow, however many classes there are.
FEWEST_ROWS = 16
# What the product for one block of the weight's gradient may take: it is added up while it is in the cache.
BYTES_OF_BLOCK = 2**20


def chunks(n: int, row_bytes: int, chunk_rows: int | None) -> list[slice]:
    """The rows 0 … n - 1 in chunks of this many, or else of as many as the buffers allow, then all equally long."""
    if chunk_rows is not None:
        return [slice(a, min(a + chunk_rows, n)) for a in range(0, n, chunk_rows)]
    count = math.ceil(n / max(FEWEST_ROWS, BYTES_OF_LOGITS // row_bytes))
    return [slice(n * k // count, n * (k + 1) // count) for k in range(count)]


def _project(run: Run, xp: Any, out: Any, hidden: Any, weight: Any, bias: Any) -> Any:
    """out = hidden·weightᵀ + bias"""
    xp.matmul(hidden, weight.T, out=out)
    if bias is not None:
        run("bias", out, out, bias)
    return out


def _add_product(xp: Any, total: Any, a: Any, b: Any) -> None:
    """total += aᵀ·b, by blocks of rows of the total, since NumPy has no product that adds."""
    rows = max(1, BYTES_OF_BLOCK // (total.shape[1] * total.itemsize))
    block = xp.empty((min(rows, len(total)), total.shape[1]), total.dtype)
    for begin in range(0, len(total), rows):
        part = total[begin : begin + rows]
        xp.matmul(a[:, begin : begin + rows].T, b, out=block[: len(part)])
        part += block[: len(part)]


def _linear_distillation_loss(
    run: Run,
    xp: Any,
    loss: Any,
    hidden_gradient: Any,
    weight_gradient: Any,
    bias_gradient: Any,
    hidden: Any,
    weight: Any,
    bias: Any,
    teacher_logits: Any,
    teacher_hidden: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    target: Any,
    temperature: Any,
    hard_weight: Any,
    soft_weight: Any,
    reduction: str,
    chunk_rows: int | None,
    ignore_index: int,
    **attrs: Any,
) -> None:
    (n, _), (c, _), real = hidden.shape, weight.shape, hidden.dtype
    # whatever may be refused is refused before anything is written
    t, labelled = float(temperature), 0
    if not 0 < t < math.inf:
        raise bad_temperature("linear_distillation_loss", t)
    if target is not None:
        labelled = labelled_rows(xp, "linear_distillation_loss", target, c, ignore_index).sum()
    # a chunk's loss is the sum of its rows, each with its share in the whole: so the means are exact
    per_hard, per_soft = row_scale(xp, labelled, reduction), row_scale(xp, n, reduction)
    weights = float(hard_weight), float(soft_weight)

    wants_gradient = any(x is not None for x in (hidden_gradient, weight_gradient, bias_gradient))
    buffers = 1 + wants_gradient + (teacher_logits is None)
    parts = chunks(n, buffers * c * real.itemsize, chunk_rows)
    most = max(rows.stop - rows.start for rows in parts)
    student = xp.empty((most, c), real)
    gradient = xp.empty((most, c), real) if wants_gradient else None
    teacher = xp.empty((most, c), real) if teacher_logits is None else None
    apart = target is not None and on_device(per_hard)
    other = xp.empty((most, c), real) if apart and wants_gradient else None
    value, total = xp.empty((), real), xp.zeros(())
    settings = {"reduction": "sum", "ignore_index": ignore_index, **attrs}

    def add_loss(g: Any, z_s: Any, z_t: Any, y: Any) -> None:
        """The loss of a chunk, added to the total, and its gradient."""
        if not apart:
            scaled = weights[0] * float(per_hard), weights[1] * per_soft
            run("distillation_loss", value, g, z_s, z_t, y, t, *scaled, **settings)
            total[...] += value
            return
        # the number of labelled rows is on the device, and stays there: so each term is scaled by itself
        run("distillation_loss", value, g, z_s, z_t, y, t, weights[0], 0.0, **settings)
        total[...] += value * per_hard
        soft = None if other is None else other[: len(z_s)]
        run("distillation_loss", value, soft, z_s, z_t, None, t, 0.0, weights[1] * per_soft, **settings)
        total[...] += value
        if g is not None:
            g *= per_hard.astype(real)
            g += soft

    for gradients in (weight_gradient, bias_gradient):
        if gradients is not None:
            gradients[...] = 0
    for rows in parts:
        h, count = hidden[rows], rows.stop - rows.start
        z_s = _project(run, xp, student[:count], h, weight, bias)
        if teacher is None:
            z_t = teacher_logits[rows]
        else:
            z_t = _project(run, xp, teacher[:count], teacher_hidden[rows], teacher_weight, teacher_bias)
        g: Any = None if gradient is None else gradient[:count]
        y = None if target is None else target[rows]
        add_loss(g, z_s, z_t, y)
        if hidden_gradient is not None:
            xp.matmul(g, weight, out=hidden_gradient[rows])
        if weight_gradient is not None:
            _add_product(xp, weight_gradient, g, h)
        if bias_gradient is not None:
            bias_gradient += xp.sum(g, axis=0)
    loss[...] = total


# --- a layer: a matrix product, then bias and activation ---


def _layer(activation: str) -> dict[str, Callable[..., None]]:
    """The kernels of y = f(x wᵀ + b), on top of those of y = f(x + b)."""
    bias, keeps = "bias_" + activation, ACTIVATIONS[activation].reads == "u"

    def forward(run: Run, xp: Any, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        product = saved[0] if keeps and saved[0] is not None else y
        xp.matmul(x, w.T, out=product)
        run(bias, y, product, b)

    def vjp(run: Run, xp: Any, dx: Any, dw: Any, db: Any, dy: Any, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        du: Any = None if dx is None and dw is None else xp.empty_like(dy)
        run(bias + "_vjp", du, db, dy, y, saved[0] if keeps else None, b if keeps else None)
        if dx is not None:
            xp.matmul(du, w, out=dx)
        if dw is not None:
            xp.matmul(du.T, x, out=dw)

    return {f"linear_{activation}": forward, f"linear_{activation}_vjp": vjp}


KERNELS: dict[str, Callable[..., None]] = {"linear_distillation_loss": _linear_distillation_loss}
for _activation in ACTIVATIONS:
    KERNELS |= _layer(_activation)


def binder(name: str, run: Run, xp: Any) -> Callable[..., Callable[[], None]]:
    """The binder of a composed kernel: ``binder(name, run, xp)(*buffers, **attrs)`` is a call without arguments."""

    def bind(*buffers: Any, **attrs: Any) -> Callable[[], None]:
        return partial(quietly, partial(KERNELS[name], run, xp, *buffers, **attrs))

    return bind
