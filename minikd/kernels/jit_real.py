"""What all Numba kernels share: how they are compiled, and exp and log in a form that becomes vector code.

Numba may reorder sums, fuse a·b + c and divide by multiplying with the reciprocal. It may not assume that there are
no infinities or NaN, since those are results here. Where the order of operations is the point (exp), only fusing
is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic, overload

DONE, BAD_TEMPERATURE = 0, -1  # any status above 0 is 1 + the first row whose label or number is out of range

EXACT_ORDER: Any = {"error_model": "numpy", "fastmath": {"contract"}}
FREE_ORDER: Any = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}

exact = njit(forceinline=True, **EXACT_ORDER)
part = njit(forceinline=True, **FREE_ORDER)


KERNELS: dict[str, Any] = {}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call and keep the code on disk, if there is a place where it may be written."""
    try:
        compiled = njit(cache=True, **FREE_ORDER)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written
        compiled = njit(**FREE_ORDER)(function)
    KERNELS[function.__name__] = compiled
    return compiled


def by_type(stub: Callable[..., Any], single: Callable[..., Any], double: Callable[..., Any]) -> None:
    """Let compiled code that calls `stub` call `single` for float32 (or int32) and `double` for float64 (or int64)."""

    @overload(stub, jit_options={"forceinline": True, **EXACT_ORDER})
    def choose(x: Any) -> Callable[..., Any]:
        return single if getattr(x, "dtype", x).bitwidth == 32 else double


def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once where the processor can do so at full speed, however often a·b is used elsewhere."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        real = arguments[0].type
        function = builder.module.declare_intrinsic("llvm.fmuladd", (real,), ir.FunctionType(real, [real] * 3))
        return builder.call(function, arguments)

    return a(a, a, a), emit


fused: Any = intrinsic(_fused)


# --- the exponential ---

LOG2_E = 1.4426950408889634
# ln 2 in two parts: k times the first is exact for every k that occurs (Cody and Waite 1980).
LN2_SINGLE = np.float32(0.69314575), np.float32(1.4286068e-06)
LN2_DOUBLE = 0.6931471803691238, 1.9082149292705877e-10
# (e^r - 1 - r) / r² for |r| ≤ ln 2 / 2, lowest power first: minimax in float32 (e^x is within 1.1 ulp), and
# a Chebyshev interpolation fitted with 60 digits in float64 (relative error of e^r: 1.7e-17).
EXP_SINGLE = tuple(np.float32(c) for c in (0.49999994, 0.16666521, 0.04166839, 0.008368724, 0.0013814581))
EXP_DOUBLE = (
    0.5000000000000001,
    0.16666666666666669,
    0.04166666666662399,
    0.008333333333330051,
    0.0013888888917281794,
    0.00019841269863105968,
    2.480152119021773e-05,
    2.7557268378684192e-06,
    2.7620138719733994e-07,
    2.5100424157005067e-08,
)
# (2^f - 1) / f for |f| ≤ 1/2, lowest power first: Chebyshev interpolations, of a relative error below 1e-8 and 2e-17.
POWER_SINGLE = tuple(
    np.float32(c) for c in (0.69314718, 0.24022651, 0.055503570, 0.0096180821, 0.0013390910, 0.00015453203)
)
POWER_DOUBLE = tuple(
    float.fromhex(c)
    for c in (
        "0x1.62e42fefa39efp-1",
        "0x1.ebfbdff82c598p-3",
        "0x1.c6b08d704a0c2p-5",
        "0x1.3b2ab6fba1db2p-7",
        "0x1.5d87fe78a5265p-10",
        "0x1.430913097a521p-13",
        "0x1.ffcbfc6716bb0p-17",
        "0x1.62bfd4578e35ap-20",
        "0x1.b524facaf40b5p-24",
        "0x1.e6067f35e52a1p-28",
        "0x1.e9d4349aefc56p-32",
    )
)
# x + rounder - rounder is x rounded to a whole number k, and k + bias stands in the low bits of x + rounder: shifted
# into the exponent they are 2^k.
ROUNDER_SINGLE, ROUNDER_DOUBLE = np.float32(1.5 * 2**23 + 127), 1.5 * 2**52 + 1023
# Here and below 2^k is taken as 0.
LOWEST_SINGLE, LOWEST_DOUBLE = np.float32(-88.0), -709.0
ZERO_SINGLE, ONE_SINGLE, LOG2_E_SINGLE = np.float32(0.0), np.float32(1.0), np.float32(LOG2_E)


def power_tail(x: Any) -> Any:
    """(2^x - 1) / x for |x| ≤ 1/2."""
    raise TypeError("for compiled code only")


def _power_tail_single(x: Any) -> Any:
    q = POWER_SINGLE[-1]
    for c in POWER_SINGLE[-2::-1]:
        q = q * x + c
    return q


def _power_tail_double(x: Any) -> Any:
    q = POWER_DOUBLE[-1]
    for c in POWER_DOUBLE[-2::-1]:
        q = q * x + c
    return q


by_type(power_tail, _power_tail_single, _power_tail_double)


def rounder(x: Any) -> Any:
    """What is added to round a number like x, as above."""
    raise TypeError("for compiled code only")


def zero_of(x: Any) -> Any:
    """0 as a number like x."""
    raise TypeError("for compiled code only")


def power_in(x: Any) -> Any:
    """2^k for x = k + rounder."""
    raise TypeError("for compiled code only")


def _rounder_single(x: Any) -> Any:
    return ROUNDER_SINGLE


def _rounder_double(x: Any) -> Any:
    return ROUNDER_DOUBLE


def _zero_single(x: Any) -> Any:
    return ZERO_SINGLE


def _zero_double(x: Any) -> Any:
    return 0.0


def _power_in_single(x: Any) -> Any:
    return np.int32(np.float32(x).view(np.int32) << 23).view(np.float32)


def _power_in_double(x: Any) -> Any:
    return np.int64(np.float64(x).view(np.int64) << 52).view(np.float64)


by_type(rounder, _rounder_single, _rounder_double)
by_type(zero_of, _zero_single, _zero_double)
by_type(power_in, _power_in_single, _power_in_double)


@exact
def power_of_two(d: Any, rate: Any, rest: Any, reach: Any) -> Any:
    """2^(d·(rate + rest)) for d ≤ 0, and 0 where d is below reach."""
    shifted = fused(d, rate, rounder(d))
    f = fused(d, rest, fused(d, rate, rounder(d) - shifted))
    power = power_in(shifted)
    return zero_of(d) if d < reach else fused(power * f, power_tail(f), power)


@exact
def quick_power_of_two(d: Any, rate: Any, reach: Any) -> Any:
    """The same without a rest of the rate."""
    shifted = fused(d, rate, rounder(d))
    f = fused(d, rate, rounder(d) - shifted)
    power = power_in(shifted)
    return zero_of(d) if d < reach else fused(power * f, power_tail(f), power)


def exp_tail(x: Any) -> Any:
    """(e^x - 1 - x) / x² for |x| ≤ ln 2 / 2."""
    raise TypeError("for compiled code only")


def _exp_tail_single(x: Any) -> Any:
    q = EXP_SINGLE[-1]
    for c in EXP_SINGLE[-2::-1]:
        q = q * x + c
    return q


def _exp_tail_double(x: Any) -> Any:
    q = EXP_DOUBLE[-1]
    for c in EXP_DOUBLE[-2::-1]:
        q = q * x + c
    return q


by_type(exp_tail, _exp_tail_single, _exp_tail_double)


def power_parts(x: Any) -> tuple[Any, Any]:
    """(2^k, s) with e^x = 2^k·(1 + s) and -0.3 < s < 0.42."""
    raise TypeError("for compiled code only")


def _power_parts_single(x: Any) -> tuple[Any, Any]:
    high = LOWEST_SINGLE if x < LOWEST_SINGLE else x
    shifted = high * LOG2_E_SINGLE + ROUNDER_SINGLE
    k = shifted - ROUNDER_SINGLE
    r = (high - k * LN2_SINGLE[0]) - k * LN2_SINGLE[1]
    return power_in(shifted), r + r * r * exp_tail(r)


def _power_parts_double(x: Any) -> tuple[Any, Any]:
    high = LOWEST_DOUBLE if x < LOWEST_DOUBLE else x
    shifted = high * LOG2_E + ROUNDER_DOUBLE
    k = shifted - ROUNDER_DOUBLE
    r = (high - k * LN2_DOUBLE[0]) - k * LN2_DOUBLE[1]
    return power_in(shifted), r + r * r * exp_tail(r)


by_type(power_parts, _power_parts_single, _power_parts_double)


@exact
def exp(x: Any) -> Any:
    """e^x for x ≤ 0, and 0 where that is below the smallest normal number."""
    power, s = power_parts(x)
    return power + power * s


@exact
def exp64(x: float) -> float:
    """e^x in float64, above 0 too."""
    e = exp(-abs(x))
    return 1.0 / e if x > 0 else e


def expm1(x: Any) -> Any:
    """e^x - 1 for x ≤ 0, without cancellation near 0."""
    raise TypeError("for compiled code only")


def _expm1_single(x: Any) -> Any:
    power, s = power_parts(x)
    return (power - ONE_SINGLE) + power * s


def _expm1_double(x: Any) -> Any:
    power, s = power_parts(x)
    return (power - 1.0) + power * s


by_type(expm1, _expm1_single, _expm1_double)


# log m = 2·f·(1 + f²/3 + f⁴/5 + …) with f = (m - 1)/(m + 1), which is at most 0.172 for m from √½ to √2.
LOG_SERIES = tuple(2 / (2 * k + 1) for k in range(11))
SMALLEST_NORMAL, TWO_TO_54 = 2.0**-1022, 2.0**54
ROOT_HALF_BITS, MANTISSA = np.float64(0.5**0.5).view(np.int64), np.int64(2**52 - 1)


@exact
def log64(x: float) -> float:
    """log x in float64 for many x at a time, within 3 ulp; `math.log` would keep a loop from being vectorised."""
    tiny = x < SMALLEST_NORMAL
    bits = np.float64(x * TWO_TO_54 if tiny else x).view(np.int64) - ROOT_HALF_BITS
    k = np.float64(np.int32(bits >> 52)) - (54.0 if tiny else 0.0)
    m = np.int64((bits & MANTISSA) + ROOT_HALF_BITS).view(np.float64)
    f = (m - 1.0) / (m + 1.0)
    c, s = LOG_SERIES, f * f
    s2 = s * s
    s4 = s2 * s2
    low, middle = (c[1] + c[2] * s) + (c[3] + c[4] * s) * s2, (c[5] + c[6] * s) + (c[7] + c[8] * s) * s2
    rest = s * (low + (middle + (c[9] + c[10] * s) * s4) * s4)  # by halves: few of its terms wait for each other
    y = ((f * rest + k * LN2_DOUBLE[1]) + 2.0 * f) + k * LN2_DOUBLE[0]
    return y if 0 < x < inf else x if x == inf else -inf if x == 0 else nan


# The same for float32: 2·f·(1 + f²/3 + f⁴/5 + f⁶/7 + f⁸/9) is enough.
LOG_SINGLE = tuple(np.float32(c) for c in LOG_SERIES[:5])
SMALLEST_SINGLE, TWO_TO_23 = np.float32(2.0**-126), np.float32(2.0**23)
ROOT_HALF_SINGLE_BITS, MANTISSA_SINGLE = np.float32(0.5**0.5).view(np.int32), np.int32(2**23 - 1)
NO_SINGLE, MINUS_23, NAN_SINGLE = np.float32(0), np.float32(-23), np.float32(nan)


def log_minus(x: Any, y: Any) -> Any:
    """log x - y for x > 0, where k·ln 2 and y are taken from one another first; of x = 0 it is some finite number."""
    raise TypeError("for compiled code only")


def _log_minus_single(x: Any, y: Any) -> Any:
    tiny = x < SMALLEST_SINGLE
    bits = np.int32(np.float32(x * TWO_TO_23 if tiny else x).view(np.int32) - ROOT_HALF_SINGLE_BITS)
    k = np.float32(np.int32(bits >> 23)) + (MINUS_23 if tiny else NO_SINGLE)
    m = np.int32(np.int32(bits & MANTISSA_SINGLE) + ROOT_HALF_SINGLE_BITS).view(np.float32)
    f = (m - ONE_SINGLE) / (m + ONE_SINGLE)
    s, c = f * f, LOG_SINGLE
    log_m = f * c[0] + f * s * (((c[4] * s + c[3]) * s + c[2]) * s + c[1])
    return NAN_SINGLE if x < NO_SINGLE else fused(k, LN2_SINGLE[0], -y) + fused(k, LN2_SINGLE[1], log_m)


def _log_minus_double(x: Any, y: Any) -> Any:
    return log64(x) - y


@overload(log_minus, jit_options=EXACT_ORDER)
def _log_minus(x: Any, y: Any) -> Any:
    return _log_minus_single if x.bitwidth == 32 else _log_minus_double
