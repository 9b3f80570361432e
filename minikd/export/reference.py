"""What the exported C computes in float32, in NumPy, operation by operation: not a bit may differ.

Every sum is taken in the order of its terms, no product is fused with a sum, and exp, tanh, sigmoid and GELU are the
short formulas below, which stand in the C with the same numbers: nothing there calls a library.

Largest errors, found on some millions of numbers, in units of the last place (ulp): exp 1.0, tanh 1.5, sigmoid 2.4,
GELU 4.9. exp and the sigmoid are 0 below -87, and so is GELU below -13.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.errors import ShapeError
from minikd.export.network import Network

__all__ = ["exp", "gelu", "predict_c_order", "probabilities_c_order", "relu", "sigmoid", "tanh"]

F32 = np.float32

# Polynomials, lowest power first, each with the least largest relative error in its range, then rounded to float32.
# exp r = 1 + r + r²·P(r) for r from -0.42 to 0.36, which has 0.36 - 0.347 and 0.42 - 0.347 of room for `rest`.
EXP = (0.499999677, 0.16666478, 0.0416755567, 0.00837317155, 0.00133987386)
# tanh u = u + u·s·P(s) with s = u², for |u| below 0.6.
TANH = (-0.333332981, 0.133319242, -0.0537838338, 0.0207959822, -0.00589516935)
# Φ(-z) = exp(-z²/2)·P(t) / (z + 3) with t = (z - 3) / (z + 3), for z from 0 to 14.5.
NORMAL_TAIL = (
    *(0.72908369, -0.509331991, 0.2300177, -0.0472626876, -0.0104625204, 0.00696930219),
    *(0.00102478405, -0.00103252393, -0.00024475461, 0.000131253738, 5.44549923e-05),
)
NUMBERS = {
    "LEAST_EXPONENT": -87.0,  # exp of anything below is 0: so no result is subnormal
    "LOG2_E": 1.44269504,
    "LN2_HIGH": 0.693359375,  # nine bits of ln 2: its products with whole numbers up to 127 are exact
    "LN2_LOW": -0.000212194442,
    "TANH_BEND": 0.6,
    "FARTHEST": 13.0,  # Φ(-13) counts as 0
    "CUTS": 256.0,  # z is cut to steps of 1/256, whose square is exact
    "TAIL_SHIFT": 3.0,
}
_N = {name: F32(value) for name, value in NUMBERS.items()}


def horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """The polynomial in x with these coefficients, lowest power first."""
    y = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        y = y * x + F32(coefficient)
    return y


def exp(x: np.ndarray, rest: Any = 0.0) -> np.ndarray:
    """exp(x + rest) of x ≤ 0, float32; rest from -0.06 to 0."""
    inside = np.maximum(x, _N["LEAST_EXPONENT"])
    n = (F32(0.5) - inside * _N["LOG2_E"]).astype(np.int32)  # towards 0: x / ln 2 to the nearest, as it is negative
    halvings = n.astype(F32)
    r = (inside + halvings * _N["LN2_HIGH"]) + (halvings * _N["LN2_LOW"] + rest)
    y = F32(1) + (r + r * r * horner(r, EXP))
    return np.where(x < _N["LEAST_EXPONENT"], F32(0), np.ldexp(y, -n))


def relu(u: np.ndarray) -> np.ndarray:
    """max(u, 0), and NaN for NaN."""
    return np.where(u < 0, F32(0), u)


def sigmoid(u: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-u)), float32."""
    e = exp(-abs(u))
    return np.where(u < 0, e, F32(1)) / (F32(1) + e)


def tanh(u: np.ndarray) -> np.ndarray:
    """tanh u, float32."""
    size = abs(u)
    e = exp(F32(-2) * size)
    far = F32(1) - F32(2) * e / (F32(1) + e)
    near = np.minimum(size, _N["TANH_BEND"])
    square = near * near
    near = near + near * (square * horner(square, TANH))
    return np.copysign(np.where(size < _N["TANH_BEND"], near, far), u)


def gelu(u: np.ndarray) -> np.ndarray:
    """u·Φ(u), float32."""
    z = np.minimum(abs(u), _N["FARTHEST"])
    cut = (z * _N["CUTS"]).astype(np.int32).astype(F32) / _N["CUTS"]
    bell = exp(F32(-0.5) * (cut * cut), F32(-0.5) * ((z - cut) * (z + cut)))
    far = z + _N["TAIL_SHIFT"]
    tail = bell * horner((z - _N["TAIL_SHIFT"]) / far, NORMAL_TAIL) / far
    tail = np.where(z < _N["FARTHEST"], tail, F32(0))
    return u * np.where(u < 0, tail, F32(1) - tail)


ACTIVATIONS = {"relu": relu, "gelu": gelu, "tanh": tanh, "sigmoid": sigmoid}


def predict_c_order(network: Network, x: Any) -> np.ndarray:
    """The logits (n, c) float32 of raw features x (n, k), bit by bit those of the C compiled without contraction.

    Raises
    ------
    ShapeError : x has another number of features.
    """
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != network.sizes[0]:
        expected = f"rows of {network.sizes[0]} features"
        raise ShapeError("predict_c_order", "x", expected=expected, got=f"shape {rows.shape}")
    values = rows.astype(F32)
    with np.errstate(all="ignore"):
        if has_scale(network):
            values = (values - network.mean) / network.deviation
        for layer in network.layers:
            sums = np.tile(layer.bias, (len(values), 1))
            for k in range(layer.weight.shape[1]):
                sums += values[:, k : k + 1] * layer.weight[:, k]
            values = ACTIVATIONS[layer.activation](sums) if layer.activation else sums
    return values


def has_scale(network: Any) -> bool:
    """Whether the features are shifted or divided at all before the first layer."""
    return bool((network.mean != 0).any() or (network.deviation != 1).any())


def probabilities_c_order(logits: np.ndarray) -> np.ndarray:
    """softmax of logits (n, c), float32 and finite, with the C's exp and its order of sums."""
    with np.errstate(over="ignore"):
        powers = exp(logits - logits.max(axis=1, keepdims=True))
    total = np.zeros(len(logits), F32)
    for c in range(logits.shape[1]):
        total += powers[:, c]
    return powers / total[:, None]
