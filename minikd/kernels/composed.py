"""Kernels made of other kernels and of matrix products: one way through them for every backend.

Each is ``kernel(use, *buffers, **attrs)`` with the buffers of its operation; `use` is what it is made of (see `Use`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from minikd.errors import bad_temperature
from minikd.kernels.arrays import on_device
from minikd.kernels.calls import Product, Several
from minikd.kernels.launch import Call, Launcher
from minikd.kernels.precision import Multiply
from minikd.kernels.reference import quietly
from minikd.ops.elementwise import ACTIVATIONS
from minikd.ops.losses import labelled_rows, row_scale


class Use(Protocol):
    """What a composed kernel is made of.

    xp : the array module of its buffers.  multiply : see `minikd.kernels.precision.Multiply`.
    """

    xp: Any
    multiply: Multiply

    def run(self, name: str, *buffers: Any, **attrs: Any) -> None:
        """Run a kernel of the backend in use."""

    def bind(self, name: str, *buffers: Any, **attrs: Any) -> Call:
        """A call that runs a kernel of the backend in use on these buffers each time."""


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


def _project(use: Use, out: Any, hidden: Any, weight: Any, bias: Any) -> Any:
    """out = hidden·weightᵀ + bias"""
    use.multiply(hidden, weight.T, out)
    if bias is not None:
        use.run("bias", out, out, bias)
    return out


def _add_product(use: Use, total: Any, a: Any, b: Any) -> None:
    """total += aᵀ·b, by blocks of rows of the total, since NumPy has no product that adds."""
    rows = max(1, BYTES_OF_BLOCK // (total.shape[1] * total.itemsize))
    block = use.xp.empty((min(rows, len(total)), total.shape[1]), total.dtype)
    for begin in range(0, len(total), rows):
        part = total[begin : begin + rows]
        use.multiply(a[:, begin : begin + rows].T, b, block[: len(part)])
        part += block[: len(part)]


def _linear_distillation_loss(
    use: Use,
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
        labelled = labelled_rows(use.xp, "linear_distillation_loss", target, c, ignore_index).sum()
    # a chunk's loss is the sum of its rows, each with its share in the whole: so the means are exact
    per_hard, per_soft = row_scale(use.xp, labelled, reduction), row_scale(use.xp, n, reduction)
    weights = float(hard_weight), float(soft_weight)

    wants_gradient = any(x is not None for x in (hidden_gradient, weight_gradient, bias_gradient))
    buffers = 1 + wants_gradient + (teacher_logits is None)
    parts = chunks(n, buffers * c * real.itemsize, chunk_rows)
    most = max(rows.stop - rows.start for rows in parts)
    student = use.xp.empty((most, c), real)
    gradient = use.xp.empty((most, c), real) if wants_gradient else None
    teacher = use.xp.empty((most, c), real) if teacher_logits is None else None
    apart = target is not None and on_device(per_hard)
    other = use.xp.empty((most, c), real) if apart and wants_gradient else None
    value, total = use.xp.empty((), real), use.xp.zeros(())
    settings = {"reduction": "sum", "ignore_index": ignore_index, **attrs}

    def add_loss(g: Any, z_s: Any, z_t: Any, y: Any) -> None:
        """The loss of a chunk, added to the total, and its gradient."""
        if not apart:
            scaled = weights[0] * float(per_hard), weights[1] * per_soft
            use.run("distillation_loss", value, g, z_s, z_t, y, t, *scaled, **settings)
            total[...] += value
            return
        # the number of labelled rows is on the device, and stays there: so each term is scaled by itself
        use.run("distillation_loss", value, g, z_s, z_t, y, t, weights[0], 0.0, **settings)
        total[...] += value * per_hard
        soft = None if other is None else other[: len(z_s)]
        use.run("distillation_loss", value, soft, z_s, z_t, None, t, 0.0, weights[1] * per_soft, **settings)
        total[...] += value
        if g is not None:
            g *= per_hard.astype(real)
            g += soft

    for gradients in (weight_gradient, bias_gradient):
        if gradients is not None:
            gradients[...] = 0
    for rows in parts:
        h, count = hidden[rows], rows.stop - rows.start
        z_s = _project(use, student[:count], h, weight, bias)
        if teacher is None:
            z_t = teacher_logits[rows]
        else:
            z_t = _project(use, teacher[:count], teacher_hidden[rows], teacher_weight, teacher_bias)
        g: Any = None if gradient is None else gradient[:count]
        y = None if target is None else target[rows]
        add_loss(g, z_s, z_t, y)
        if hidden_gradient is not None:
            use.multiply(g, weight, hidden_gradient[rows])
        if weight_gradient is not None:
            _add_product(use, weight_gradient, g, h)
        if bias_gradient is not None:
            bias_gradient += use.xp.sum(g, axis=0)
    loss[...] = total


# --- a layer: a matrix product, then bias and activation ---


def _layer(activation: str) -> dict[str, Callable[..., None]]:
    """The kernels of y = f(x wᵀ + b), on top of those of y = f(x + b)."""
    bias, keeps = "bias_" + activation, ACTIVATIONS[activation].reads == "u"

    def forward(use: Use, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        product = saved[0] if keeps and saved[0] is not None else y
        use.multiply(x, w.T, product)
        use.run(bias, y, product, b)

    def vjp(use: Use, dx: Any, dw: Any, db: Any, dy: Any, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        du: Any = None if dx is None and dw is None else use.xp.empty_like(dy)
        use.run(bias + "_vjp", du, db, dy, y, saved[0] if keeps else None, b if keeps else None)
        if dx is not None:
            use.multiply(du, w, dx)
        if dw is not None:
            use.multiply(du.T, x, dw)

    return {f"linear_{activation}": forward, f"linear_{activation}_vjp": vjp}


def _linear(use: Use, y: Any, x: Any, w: Any, b: Any) -> None:
    use.multiply(x, w.T, y)
    if b is not None:
        use.run("bias", y, y, b)


def _linear_vjp(use: Use, dx: Any, dw: Any, db: Any, dy: Any, y: Any, x: Any, w: Any, b: Any) -> None:
    if dx is not None:
        use.multiply(dy, w, dx)
    if dw is not None:
        use.multiply(dy.T, x, dw)
    if db is not None:
        use.run("bias_vjp", None, db, dy, None, None, None)


def _matmul_vjp(use: Use, da: Any, db: Any, dy: Any, y: Any, a: Any, b: Any) -> None:
    if da is not None:
        use.multiply(dy, b.T, da)
    if db is not None:
        use.multiply(a.T, dy, db)


Kernel = Callable[..., None]

LAYERS: dict[str, Kernel] = {}
for _activation in ACTIVATIONS:
    LAYERS |= _layer(_activation)
# What every backend composes that has no kernel of its own.
KERNELS: dict[str, Kernel] = {"linear_distillation_loss": _linear_distillation_loss, **LAYERS}
# What is composed only where products are not those of the formula: on a device, or of rounded factors.
PRODUCTS: dict[str, Kernel] = {
    "linear": _linear,
    "linear_vjp": _linear_vjp,
    "matmul": lambda use, y, a, b: use.multiply(a, b, y),
    "matmul_vjp": _matmul_vjp,
}
# Which kernels a composed one runs does not hang on any values in these, so that they can be bound beforehand.
_FORESEEABLE = frozenset({*LAYERS, *PRODUCTS})


class _Binding:
    """A `Use` that binds what a kernel is made of, and runs nothing."""

    def __init__(self, use: Use) -> None:
        self.xp, self.parts, self._use = use.xp, list[Call](), use

    def run(self, name: str, *buffers: Any, **attrs: Any) -> None:
        self.parts.append(self._use.bind(name, *buffers, **attrs))

    def multiply(self, a: Any, b: Any, out: Any) -> None:
        self.parts.append(Product(self._use.multiply, a, b, out))


class _Composed:
    """The launch of a composed kernel; nothing of it hangs on the look of its buffers.

    Bound for a device it is taken apart, so that a plan can put its parts together with their neighbours; what it needs
    beside its buffers is taken once then.
    """

    __slots__ = ("apart", "attrs", "kernel", "use")

    def __init__(self, name: str, use: Use, attrs: dict[str, Any]) -> None:
        self.kernel, self.use, self.attrs = KERNELS.get(name) or PRODUCTS[name], use, attrs
        self.apart = name in _FORESEEABLE

    def run(self, *buffers: Any) -> None:
        quietly(partial(self.kernel, self.use, *buffers, **self.attrs))

    def bind(self, *buffers: Any) -> Call:
        if not (self.apart and any(on_device(b) for b in buffers)):
            return partial(self.run, *buffers)
        binding = _Binding(self.use)
        self.kernel(binding, *buffers, **self.attrs)
        return Several(binding.parts)


def launcher(name: str, use: Use) -> Launcher:
    """What makes the launches of a composed kernel: ``launcher(name, use)(buffers, attrs)``."""

    def launch(buffers: Sequence[Any], attrs: dict[str, Any]) -> _Composed:
        return _Composed(name, use, attrs)

    return launch
