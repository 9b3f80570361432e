"""Operations that treat every element alone: arithmetic, powers and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minikd.ops.op import Example, Op, gradients, register

# Φ(-z) = exp(-z²/2) · R(t) / (z + 5) for z ≥ 0, with t = (z - 5)/(z + 5) and R this polynomial (lowest power first):
# a Chebyshev interpolation of degree 22, fitted with 50 digits. Its relative error is 4.7e-17, and 5.5e-16 in float64.
NORMAL_TAIL_SHIFT = 5.0
NORMAL_TAIL = (
    0.769193049750063,
    -0.6653825028900577,
    0.4953056159699768,
    -0.3135331566712138,
    0.16502036617034282,
    -0.06911863870881432,
    0.020795066800941616,
    -0.00299337673822322,
    -0.0007978694094808063,
    0.00054489883090093,
    -5.9375673286488655e-05,
    -4.976177118979218e-05,
    1.6681099115863468e-05,
    3.977912640593242e-06,
    -2.769337871043854e-06,
    -3.310698071526862e-07,
    4.340262594829775e-07,
    3.581840051543223e-08,
    -6.782555313291156e-08,
    -5.015649939857857e-09,
    9.446827519677366e-09,
    5.037302126379857e-10,
    -8.166192624428987e-10,
)


def normal_cdf_and_density(xp: Any, x: Any) -> tuple[Any, Any]:
    """Φ(x) and φ(x) of the standard normal distribution, in float64; Φ keeps its relative accuracy at both ends."""
    x = x.astype(xp.float64)
    z = xp.minimum(xp.abs(x), 40.0)  # Φ(-40) is 0 in float64; the bound keeps z² finite
    t = (z - NORMAL_TAIL_SHIFT) / (z + NORMAL_TAIL_SHIFT)
    tail = xp.full_like(z, NORMAL_TAIL[-1])
    for coefficient in NORMAL_TAIL[-2::-1]:
        tail = tail * t + coefficient
    bell = xp.exp(-0.5 * z * z)
    tail = bell * tail / (z + NORMAL_TAIL_SHIFT)
    density = bell / math.sqrt(2 * math.pi)
    return xp.where(x > 0, 1.0 - tail, tail), density


# --- arithmetic: one line forward, one line for each gradient ---


def _pair(low: float, high: float) -> Callable[[np.random.Generator, Any], list[Example]]:
    """Two arrays of the same shape: a matrix, a long row with a tail, one element, none, three axes, no axis."""

    def example(rng: np.random.Generator, dtype: Any) -> list[Example]:
        shapes: list[tuple[int, ...]] = [(3, 4), (67,), (1,), (0, 3), (2, 3, 5), ()]
        return [([np.asarray(rng.uniform(low, high, s), dtype) for _ in "ab"], {}) for s in shapes]

    return example


def _single(low: float, high: float, *awkward: float) -> Callable[[np.random.Generator, Any], list[Example]]:
    """The same shapes for one array, and one more row of awkward values."""

    def example(rng: np.random.Generator, dtype: Any) -> list[Example]:
        cases: list[Example] = [(inputs[:1], attrs) for inputs, attrs in _pair(low, high)(rng, dtype)]
        return cases + ([([np.array(awkward, dtype)], {})] if awkward else [])

    return example


def _wins(xp: Any, winner: Any, loser: Any) -> Any:
    """1 where `winner` is larger, one half at a tie: the legal share of the gradient of a maximum."""
    return ((winner > loser) + 0.5 * (winner == loser)).astype(winner.dtype)


register(
    Op(
        name="add",
        formula="y = a + b;  da = dy;  db = dy",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.add(a, b, out=y),
        vjp=gradients(lambda xp, dy, y, a, b: dy, lambda xp, dy, y, a, b: dy),
        wrt=("a", "b"),
        may_alias=("a", "b"),
        example=_pair(-3, 3),
        analytic=True,
    )
)
register(
    Op(
        name="sub",
        formula="y = a - b;  da = dy;  db = -dy",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.subtract(a, b, out=y),
        vjp=gradients(lambda xp, dy, y, a, b: dy, lambda xp, dy, y, a, b: -dy),
        wrt=("a", "b"),
        may_alias=("a", "b"),
        example=_pair(-3, 3),
        analytic=True,
    )
)
register(
    Op(
        name="mul",
        formula="y = a·b;  da = dy·b;  db = dy·a",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.multiply(a, b, out=y),
        vjp=gradients(lambda xp, dy, y, a, b: dy * b, lambda xp, dy, y, a, b: dy * a),
        wrt=("a", "b"),
        vjp_reads=("a", "b"),
        example=_pair(-3, 3),
        analytic=True,
    )
)


def _scale_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    return [
        ([x, np.float64(s)], {})
        for (inputs, _), s in zip(_single(-3, 3)(rng, dtype), (2, -0.5, 0, 1e-3, 3, 1), strict=True)
        for x in inputs
    ]


def _factor(factor: Any, x: Any) -> Any:
    """The factor, rounded to the type of what it multiplies."""
    return x.dtype.type(float(factor))


register(
    Op(
        name="scale",
        formula="y = factor·x;  dx = factor·dy",
        signature="x(...), factor:scalar -> y(...)",
        forward=lambda xp, y, x, factor: xp.multiply(x, _factor(factor, x), out=y),
        vjp=lambda xp, dx, dy, y, x, factor: xp.multiply(dy, _factor(factor, dy), out=dx),
        wrt=("x",),
        vjp_reads=("factor",),
        may_alias=("x",),
        example=_scale_example,
        analytic=True,
    )
)
register(
    Op(
        name="div",
        formula="y = a / b;  da = dy / b;  db = -dy·y / b",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.divide(a, b, out=y),
        vjp=gradients(lambda xp, dy, y, a, b: dy / b, lambda xp, dy, y, a, b: -dy * y / b),
        wrt=("a", "b"),
        vjp_reads=("y", "b"),
        may_alias=("a",),
        example=_pair(0.5, 2),
        analytic=True,
    )
)
register(
    Op(
        name="pow",
        formula="y = a^b;  da = dy·b·a^(b-1);  db = dy·y·log a  (0 where a = 0)",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.power(a, b, out=y),
        vjp=gradients(
            lambda xp, dy, y, a, b: dy * b * xp.power(xp.where(b == 0, 1, a), b - 1),
            lambda xp, dy, y, a, b: dy * y * xp.log(xp.where(a == 0, 1, a)),
        ),
        wrt=("a", "b"),
        vjp_reads=("y", "a", "b"),
        example=_pair(0.5, 2),
        analytic=True,
    )
)
register(
    Op(
        name="maximum",
        formula="y = max(a, b);  da = dy·[a > b];  db = dy·[b > a];  a tie gives each one half",
        signature="a(...), b(...) -> y(...)",
        forward=lambda xp, y, a, b: xp.maximum(a, b, out=y),
        vjp=gradients(
            lambda xp, dy, y, a, b: dy * _wins(xp, a, b),
            lambda xp, dy, y, a, b: dy * _wins(xp, b, a),
        ),
        wrt=("a", "b"),
        vjp_reads=("a", "b"),
        example=_pair(-3, 3),
    )
)
register(
    Op(
        name="neg",
        formula="y = -x;  dx = -dy",
        signature="x(...) -> y(...)",
        forward=lambda xp, y, x: xp.negative(x, out=y),
        vjp=gradients(lambda xp, dy, y, x: -dy),
        wrt=("x",),
        may_alias=("x",),
        example=_single(-3, 3),
        analytic=True,
    )
)
register(
    Op(
        name="exp",
        formula="y = exp x;  dx = dy·y",
        signature="x(...) -> y(...)",
        forward=lambda xp, y, x: xp.exp(x, out=y),
        vjp=gradients(lambda xp, dy, y, x: dy * y),
        wrt=("x",),
        vjp_reads=("y",),
        may_alias=("x",),
        example=_single(-3, 3),
        analytic=True,
    )
)
register(
    Op(
        name="log",
        formula="y = log x;  dx = dy / x",
        signature="x(...) -> y(...)",
        forward=lambda xp, y, x: xp.log(x, out=y),
        vjp=gradients(lambda xp, dy, y, x: dy / x),
        wrt=("x",),
        vjp_reads=("x",),
        example=_single(0.5, 3),
        analytic=True,
    )
)
register(
    Op(
        name="abs",
        formula="y = |x|;  dx = dy·sign x  (0 at 0)",
        signature="x(...) -> y(...)",
        forward=lambda xp, y, x: xp.abs(x, out=y),
        vjp=gradients(lambda xp, dy, y, x: dy * xp.sign(x)),
        wrt=("x",),
        vjp_reads=("x",),
        example=_single(-3, 3),
    )
)


# --- the activations: y = f(u) and f'(u). The operations that add a bias first are built from the same table. ---


def _relu(xp: Any, y: Any, u: Any) -> None:
    xp.maximum(u, 0, out=y)


def _tanh(xp: Any, y: Any, u: Any) -> None:
    xp.tanh(u, out=y)


def _sigmoid(xp: Any, y: Any, u: Any) -> None:
    e = xp.exp(-xp.abs(u))
    y[...] = xp.where(u >= 0, 1, e) / (1 + e)


def _gelu(xp: Any, y: Any, u: Any) -> None:
    cdf, _ = normal_cdf_and_density(xp, u)
    y[...] = xp.where(cdf == 0, 0.0, u * cdf)


def _gelu_derivative(xp: Any, y: Any, u: Any) -> Any:
    cdf, density = normal_cdf_and_density(xp, u)
    return (cdf + xp.where(density == 0, 0.0, u * density)).astype(u.dtype)


class Activation(NamedTuple):
    """One activation: its formula and derivative as text and as code, and which of y and u the derivative reads."""

    formula: str
    derivative_formula: str
    reads: str
    forward: Callable[..., None]
    derivative: Callable[..., Any]
    analytic: bool = False
    source: str = ""


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("max(u, 0)", "[y > 0]", "y", _relu, lambda xp, y, u: (y > 0).astype(y.dtype)),
    "tanh": Activation("tanh u", "(1 - y²)", "y", _tanh, lambda xp, y, u: 1 - y * y, analytic=True),
    "sigmoid": Activation("1 / (1 + exp(-u))", "y·(1 - y)", "y", _sigmoid, lambda xp, y, u: y * (1 - y)),
    "gelu": Activation(
        "u·Φ(u)",
        "(Φ(u) + u·φ(u))",
        "u",
        _gelu,
        _gelu_derivative,
        source="Hendrycks and Gimpel 2016, eq. 1, with the exact Φ (PyTorch's default, not its tanh approximation)",
    ),
}


def _activation_op(name: str, activation: Activation) -> Op:
    return Op(
        name=name,
        formula=f"y = {activation.formula};  du = dy·{activation.derivative_formula}",
        signature="u(...) -> y(...)",
        forward=activation.forward,
        vjp=gradients(lambda xp, dy, y, u: dy * activation.derivative(xp, y, u)),
        wrt=("u",),
        vjp_reads=(activation.reads,),
        may_alias=("u",) if activation.reads == "y" else (),
        example=_single(-3, 3, -1e4, -40.0, -12.0, -0.0, 0.0, 1e-30, 12.0, 40.0, 1e4),
        analytic=activation.analytic,
        source=activation.source,
    )


for _name, _activation in ACTIVATIONS.items():
    register(_activation_op(_name, _activation))

# --- the scale of features ---


def _standardise_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, m in ((3, 4), (1, 67), (5, 1), (0, 3)):
        x, mean, deviation = rng.normal(size=(n, m)), rng.normal(size=m), rng.uniform(0.5, 2, m)
        cases.append(([a.astype(dtype) for a in (x, mean, deviation)], {}))
    return cases


def _standardise(xp: Any, y: Any, x: Any, mean: Any, deviation: Any) -> None:
    xp.subtract(x, mean, out=y)
    xp.divide(y, deviation, out=y)


register(
    Op(
        name="standardise",
        formula="y = (x - mean) / deviation, column by column",
        signature="x(n, m), mean(m), deviation(m) -> y(n, m)",
        forward=_standardise,
        may_alias=("x",),
        example=_standardise_example,
    )
)
