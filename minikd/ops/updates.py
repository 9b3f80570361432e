"""Optimizer steps: they read and write the parameters and their state, and are not differentiable on purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minikd.ops.op import Example, Op, register

SIZES = (1, 7, 67, 1030)


def _sgd_step(xp: Any, w: Any, v: Any, g: Any, lr: Any, momentum: float, nesterov: bool, weight_decay: float) -> None:
    real = w.dtype.type
    d = g + real(weight_decay) * w if weight_decay else g
    if v is not None:
        v[...] = real(momentum) * v + d
        d = d + real(momentum) * v if nesterov else v
    w -= real(lr) * d


def _sgd_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for k in SIZES:
        g = rng.normal(size=k).astype(dtype)
        cases.append(([g, np.float64(0.1)], {"momentum": 0.9}))
        cases.append(([g, np.float64(0.1)], {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}))
        cases.append(([g, np.float64(0.1)], {"weight_decay": 0.01}))
    return cases


register(
    Op(
        name="sgd_step",
        formula="d = g + λ·w;  v = μ·v + d;  w -= lr·v  (Nesterov: lr·(d + μ·v); without v: lr·d)",
        signature="g(k), lr:scalar -> w!(k), v!?(k)",
        attrs={"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        forward=_sgd_step,
        example=_sgd_example,
        source="Sutskever et al. 2013, in torch.optim.SGD's form (the learning rate is outside the velocity)",
    )
)


def _adam_step(
    xp: Any,
    w: Any,
    m: Any,
    v: Any,
    g: Any,
    lr: Any,
    step: Any,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    real, t = w.dtype.type, int(step)
    if weight_decay and decoupled:
        w *= real(1.0 - float(lr) * weight_decay)
    elif weight_decay:
        g = g + real(weight_decay) * w
    m[...] = real(beta1) * m + real(1.0 - beta1) * g
    v[...] = real(beta2) * v + real(1.0 - beta2) * g * g
    rate = real(float(lr) / (1.0 - beta1**t))
    root = real(1.0 / np.sqrt(1.0 - beta2**t))
    w -= rate * m / (xp.sqrt(v) * root + real(eps))


def _adam_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for k in SIZES:
        for attrs in ({}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decoupled": True}):
            cases.append(([rng.normal(size=k).astype(dtype), np.float64(0.01), np.asarray(3)], attrs))
    return cases


register(
    Op(
        name="adam_step",
        formula=(
            "m = β₁·m + (1-β₁)·g;  v = β₂·v + (1-β₂)·g²;  "
            "w -= lr·(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε);  decay: g += λ·w, or decoupled w -= lr·λ·w first"
        ),
        signature="g(k), lr:scalar, step:counter -> w!(k), m!(k), v!(k)",
        attrs={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "decoupled": False},
        forward=_adam_step,
        example=_adam_example,
        source="Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019 for the decoupled decay",
    )
)


def _max_norm(xp: Any, w: Any, limit: float) -> None:
    norm = xp.sqrt(xp.sum(w.astype(xp.float64) ** 2, axis=1, keepdims=True))
    w *= xp.where(norm > limit, limit / xp.where(norm == 0, 1.0, norm), 1.0).astype(w.dtype)


register(
    Op(
        name="max_norm",
        formula="w_i *= min(1, limit / ‖w_i‖) for each row w_i, the weights into one unit",
        signature="-> w!(m, k)",
        attrs={"limit": 3.0},
        forward=_max_norm,
        example=lambda rng, dtype: [([], {"limit": 0.5})],
        source="Srebro and Shraibman 2005; Srivastava et al. 2014, sec. 5.1",
    )
)


def _clip_norm(xp: Any, g: Any, limit: float) -> None:
    norm = xp.sqrt(xp.sum(g.astype(xp.float64) ** 2))
    larger = (norm > limit) & (norm < math.inf)
    g *= xp.where(larger, limit / xp.where(larger, norm, 1.0), 1.0).astype(g.dtype)


register(
    Op(
        name="clip_norm",
        formula="g *= min(1, limit / ‖g‖), the norm over all of g in float64; one that is not finite scales nothing",
        signature="-> g!(k)",
        attrs={"limit": 1.0},
        forward=_clip_norm,
        example=lambda rng, dtype: [([], {"limit": 0.5}), ([], {"limit": 1e3})],
        source="Pascanu, Mikolov and Bengio 2013, algorithm 1",
    )
)

# --- what a step counts and sets, in operations of its own so that it can be replayed ---

register(
    Op(
        name="advance",
        formula="count += 1",
        signature="-> count!:counter",
        forward=lambda xp, count: xp.add(count, 1, out=count),
        example=lambda rng, dtype: [([], {})],
    )
)
register(
    Op(
        name="set_scalar",
        formula="y = x, a learning rate for example",
        signature="x:scalar -> y:scalar",
        forward=lambda xp, y, x: xp.copyto(y, x),
        example=lambda rng, dtype: [([np.float64(0.125)], {}), ([np.float64(-3)], {})],
    )
)
