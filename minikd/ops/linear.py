"""Matrix products, a bias followed by an activation, and both in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd.ops.elementwise import ACTIVATIONS, Activation
from minikd.ops.op import Example, Op, Shape, gradients, register


def _matmul_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    sizes = [(3, 4, 5), (1, 1, 1), (17, 33, 2), (0, 3, 2), (2, 0, 3)]
    return [([rng.normal(size=(n, k)).astype(dtype), rng.normal(size=(k, m)).astype(dtype)], {}) for n, k, m in sizes]


def _linear_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, k, m in ((3, 4, 5), (1, 1, 1), (17, 33, 10)):
        x, w, b = (rng.normal(size=s).astype(dtype) for s in ((n, k), (m, k), (m,)))
        cases += [([x, w, b], {}), ([x, w, None], {})]
    return cases


def _linear(xp: Any, y: Any, x: Any, w: Any, b: Any) -> None:
    xp.matmul(x, w.T, out=y)
    if b is not None:
        xp.add(y, b, out=y)


def _linear_vjp(xp: Any, dx: Any, dw: Any, db: Any, dy: Any, y: Any, x: Any, w: Any, b: Any) -> None:
    if dx is not None:
        xp.matmul(dy, w, out=dx)
    if dw is not None:
        xp.matmul(dy.T, x, out=dw)
    if db is not None:
        xp.sum(dy, axis=0, out=db)


def product_flops(n: int, k: int, m: int) -> int:
    """A multiplication and an addition for each pair that meets in a product of (n, k) and (k, m)."""
    return 2 * n * k * m


register(
    Op(
        name="matmul",
        formula="y = a b;  da = dy bᵀ;  db = aᵀ dy",
        signature="a(n, k), b(k, m) -> y(n, m)",
        forward=lambda xp, y, a, b: xp.matmul(a, b, out=y),
        vjp=gradients(lambda xp, dy, y, a, b: dy @ b.T, lambda xp, dy, y, a, b: a.T @ dy),
        wrt=("a", "b"),
        vjp_reads=("a", "b"),
        example=_matmul_example,
        flops=product_flops,
        analytic=True,
    )
)
register(
    Op(
        name="linear",
        formula="y = x wᵀ + b;  dx = dy w;  dw = dyᵀ x;  db = Σ_rows dy",
        signature="x(n, k), w(m, k), b?(m) -> y(n, m)",
        forward=_linear,
        vjp=_linear_vjp,
        wrt=("x", "w", "b"),
        vjp_reads=("x", "w"),
        example=_linear_example,
        flops=product_flops,
        analytic=True,
        source="weights lie as (outputs, inputs), as in PyTorch and ONNX's Gemm",
    )
)


# --- bias + activation: one traversal instead of two, and the bias gradient in the same pass backward ---


def _bias_op(name: str, activation: Activation) -> Op:
    def forward(xp: Any, y: Any, x: Any, b: Any) -> None:
        activation.forward(xp, y, x + b)

    def vjp(xp: Any, dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> None:
        du = dy * activation.derivative(xp, y, None if x is None else x + b)
        if dx is not None:
            dx[...] = du
        if db is not None:
            xp.sum(du, axis=0, out=db)

    def example(rng: np.random.Generator, dtype: Any) -> list[Example]:
        shapes: Sequence[Shape] = [(3, 4), (1, 1), (9, 33), (130, 10), (2, 200), (0, 5)]
        return [([2 * rng.normal(size=s).astype(dtype), rng.normal(size=s[1:]).astype(dtype)], {}) for s in shapes]

    reads = () if activation is IDENTITY else ("y",) if activation.reads == "y" else ("x", "b")
    return Op(
        name=name,
        formula=f"u = x + b;  y = {activation.formula};  dx = dy·{activation.derivative_formula};  db = Σ_rows dx",
        signature="x(n, m), b(m) -> y(n, m)",
        forward=forward,
        vjp=vjp,
        wrt=("x", "b"),
        vjp_reads=reads,
        may_alias=() if "x" in reads else ("x",),
        example=example,
        analytic=activation.analytic,
        source=activation.source,
    )


IDENTITY = Activation("u", "1", "", lambda xp, y, u: xp.copyto(y, u), lambda xp, y, u: 1, analytic=True)

register(_bias_op("bias", IDENTITY))
for _name, _activation in ACTIVATIONS.items():
    register(_bias_op("bias_" + _name, _activation))


# --- product + bias + activation: a layer, and with it a step of training, in few calls ---


def _layer_op(name: str, activation: Activation) -> Op:
    keeps = activation.reads == "u"  # backward reads u, and takes it from the product

    def forward(xp: Any, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        product = x @ w.T
        if keeps and saved[0] is not None:
            saved[0][...] = product
        activation.forward(xp, y, product + b)

    def vjp(xp: Any, dx: Any, dw: Any, db: Any, dy: Any, y: Any, *others: Any) -> None:
        *saved, x, w, b = others
        du = dy * activation.derivative(xp, y, saved[0] + b if keeps else None)
        _linear_vjp(xp, dx, dw, db, du, y, x, w, b)

    def example(rng: np.random.Generator, dtype: Any) -> list[Example]:
        cases: list[Example] = []
        for n, k, m in ((3, 4, 5), (1, 1, 1), (17, 33, 10), (0, 2, 3), (2, 0, 3)):
            shapes = ((n, k), (m, k), (m,))
            cases.append(([np.asarray(rng.normal(size=s) / (k or 1) ** 0.5, dtype) for s in shapes], {}))
        return cases

    return Op(
        name=name,
        formula=f"u = x wᵀ + b;  y = {activation.formula};  du = dy·{activation.derivative_formula};  "
        "dx = du w;  dw = duᵀ x;  db = Σ_rows du",
        signature="x(n, k), w(m, k), b(m) -> y(n, m)" + ("; product?(n, m)" if keeps else ""),
        forward=forward,
        vjp=vjp,
        wrt=("x", "w", "b"),
        vjp_reads=("product", "x", "w", "b") if keeps else ("y", "x", "w"),
        example=example,
        flops=product_flops,
        analytic=activation.analytic,
        source=activation.source,
    )


for _name, _activation in ACTIVATIONS.items():
    register(_layer_op("linear_" + _name, _activation))
