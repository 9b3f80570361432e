"""How exactly matrix products are computed: in float32, or from factors with fewer digits, as tensor cores take them.

Only the two factors of a product are rounded. Sums within a product, biases, activations, losses, gradients' sums and
the weights themselves stay float32, and float64 arrays are multiplied in float64 whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

FULL = "float32"
# What may be chosen, with the bits of the mantissa that a factor keeps; both have float32's eight bits of exponent.
MANTISSA = {FULL: 23, "tf32": 10, "bfloat16": 7}

# How a backend multiplies: ``multiply(a, b, out)`` writes a·b into out, all of one dtype.
Multiply = Callable[[Any, Any, Any], None]

_EXPONENT = np.uint32(0x7F800000)


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """A float32 array rounded to the digits of `precision`, to the nearest and at a tie to the even one.

    What lies beyond the largest number of that precision becomes infinite; infinities and NaN stay what they are.
    """
    drop = MANTISSA[FULL] - MANTISSA[precision]
    if drop == 0:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = (bits >> np.uint32(drop)) & np.uint32(1)
    up = bits + (np.uint32((1 << (drop - 1)) - 1) + odd)
    kept = up & np.uint32(0xFFFFFFFF & ~((1 << drop) - 1))
    return np.where(bits & _EXPONENT == _EXPONENT, bits, kept).view(np.float32).reshape(x.shape)


def emulated(precision: str) -> Multiply:
    """Products of rounded factors in NumPy: what tensor cores compute, but for the order of their sums."""
    if precision == FULL:
        return _full

    def multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        if out.dtype == np.float32:
            a, b = rounded(a, precision), rounded(b, precision)
        np.matmul(a, b, out=out)

    return multiply


def _full(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    np.matmul(a, b, out=out)
