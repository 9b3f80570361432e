"""GELU and its slope, from the standard normal distribution: in float64 by the formula of `minikd.ops.elementwise`, in
float32 by one of a few terms.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import numpy as np

from minikd.kernels.jit_real import ROUNDER_SINGLE, ZERO_SINGLE, by_type, exact, exp, fused, power_in, power_tail
from minikd.ops.elementwise import NORMAL_TAIL, NORMAL_TAIL_SHIFT

# --- float64 ---


@exact
def normal_tail(t: float) -> float:
    """R(t) of `minikd.ops.elementwise`, in two halves, since Numba does not unroll a loop of 22."""
    high, low = NORMAL_TAIL[-1], NORMAL_TAIL[10]
    for coefficient in NORMAL_TAIL[-2:10:-1]:
        high = high * t + coefficient
    for coefficient in NORMAL_TAIL[9::-1]:
        low = low * t + coefficient
    return high * t**11 + low


@exact
def normal_cdf_and_density(x: float) -> tuple[float, float]:
    """Φ(x) and φ(x) of the standard normal distribution, by the formula of `minikd.ops.elementwise`."""
    z = 40.0 if abs(x) > 40.0 else abs(x)
    t = (z - NORMAL_TAIL_SHIFT) / (z + NORMAL_TAIL_SHIFT)
    tail = normal_tail(t)
    bell = exp(-0.5 * z * z)
    tail = bell * tail / (z + NORMAL_TAIL_SHIFT)
    density = bell / sqrt(2 * pi)
    return 1.0 - tail if x > 0 else tail, density


# --- float32: Φ(-z) = bell·tail for z ≥ 0, with bell = exp(-z²/2) and z² in twice the precision ---


def _singles(*hexadecimal: str) -> tuple[Any, ...]:
    return tuple(np.float32(float.fromhex(c)) for c in hexadecimal)


FARTHEST = np.float32(14.6)  # from here on Φ(-z) is 0
# -log2(e)/2 in two parts.
RATE, RATE_REST = _singles("-0x1.715476p-1", "-0x1.4ae0c0p-27")
# tail = P(z)/Q(z), highest power first: minimax, of a relative error of 6e-9.
TAIL_P = _singles("0x1.0e4298p-8", "0x1.4d4846p-5", "0x1.7792acp-3", "0x1.c1056ep-2", "0x1p-1")
TAIL_Q = _singles("0x1.52b78cp-7", "0x1.a1bbccp-4", "0x1.e124cap-2", "0x1.340012p+0", "0x1.acc4e8p+0", "0x1p+0")
# The power of two is lifted by 2^64 until the last step: so it is normal, and what is rounded away there is below that.
LIFTED, LOWERED = np.float32(ROUNDER_SINGLE + 64), np.float32(2.0**-64)
MINUS_DENSITY_AT_0 = np.float32(-1 / sqrt(2 * pi))


@exact
def bell_and_tail(u: Any) -> tuple[Any, Any, Any]:
    """z = |u|, held where z² is finite, and exp(-z²/2) and Φ(-z)/exp(-z²/2)"""
    z = FARTHEST if abs(u) > FARTHEST else abs(u)
    square = z * z
    rest = fused(z, z, -square)
    shifted = fused(square, RATE, LIFTED)
    f = fused(square, RATE, LIFTED - shifted)
    f = fused(rest, RATE, fused(square, RATE_REST, f))
    power = power_in(shifted)
    bell = (power + power * f * power_tail(f)) * LOWERED
    p, q = TAIL_P[0], TAIL_Q[0]
    for c in TAIL_P[1:]:
        p = p * z + c
    for c in TAIL_Q[1:]:
        q = q * z + c
    return z, bell, p / q


# --- for either ---


def gelu(x: Any) -> Any:
    """x·Φ(x) = max(x, 0) - z·Φ(-z), z = |x|"""
    raise TypeError("for compiled code only")


def _gelu_single(x: Any) -> Any:
    z, bell, tail = bell_and_tail(x)
    return (ZERO_SINGLE if x <= ZERO_SINGLE else x) - z * tail * bell


def _gelu_double(x: Any) -> Any:
    cdf, _ = normal_cdf_and_density(x)
    return 0.0 if cdf == 0 else x * cdf


def gelu_slope(x: Any) -> Any:
    """Φ(x) + x·φ(x), which is Φ(-z) - z·φ(z) for x ≤ 0, and 1 less that for x > 0"""
    raise TypeError("for compiled code only")


def _gelu_slope_single(x: Any) -> Any:
    z, bell, tail = bell_and_tail(x)
    slope = bell * (z * MINUS_DENSITY_AT_0 + tail)
    return np.float32(1) - slope if x > 0 else slope


def _gelu_slope_double(x: Any) -> Any:
    cdf, density = normal_cdf_and_density(x)
    return cdf + (0.0 if density == 0 else x * density)


by_type(gelu, _gelu_single, _gelu_double)
by_type(gelu_slope, _gelu_slope_single, _gelu_slope_double)
