"""The kernels of the Numba backend: for each operation one loop over rows, in the order of lines of its reference.

Buffers come in the order of the operation's signature, attributes after them. A buffer that nobody needs is an empty
array. A kernel returns 0, or a status that says which value it refuses; then it has written nothing.

Numba may reorder sums, fuse a·b + c and divide by multiplying with the reciprocal. It may not assume that there are
no infinities or NaN, since those are results here. Where the order of operations is the point (exp), only fusing
is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial, inf, log, nan, pi, sqrt
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from minikd.kernels.jit import CODES
from minikd.ops.elementwise import NORMAL_TAIL, NORMAL_TAIL_SHIFT
from minikd.ops.losses import LARGEST_TEMPERATURE
from minikd.ops.random import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL

DONE, BAD_TEMPERATURE = 0, -1  # any status above 0 is 1 + the first row whose label is out of range
MEAN, SUM, NONE = CODES["mean"], CODES["sum"], CODES["none"]

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

    @overload(stub, jit_options=EXACT_ORDER)
    def choose(x: Any) -> Callable[..., Any]:
        return single if getattr(x, "dtype", x).bitwidth == 32 else double


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
# Here and below 2^k is taken as 0.
LOWEST_SINGLE, LOWEST_DOUBLE = np.float32(-88.0), -709.0
HALF_SINGLE, ONE_SINGLE, LOG2_E_SINGLE = np.float32(0.5), np.float32(1.0), np.float32(LOG2_E)


def power_parts(x: Any) -> tuple[Any, Any]:
    """(2^k, s) with e^x = 2^k·(1 + s) and -0.3 < s < 0.42."""
    raise TypeError("for compiled code only")


def _power_parts_single(x: Any) -> tuple[Any, Any]:
    k = np.floor((x if x > LOWEST_SINGLE else LOWEST_SINGLE) * LOG2_E_SINGLE + HALF_SINGLE)
    r = ((LOWEST_SINGLE if x < LOWEST_SINGLE else x) - k * LN2_SINGLE[0]) - k * LN2_SINGLE[1]
    q = EXP_SINGLE[-1]
    for c in EXP_SINGLE[-2::-1]:
        q = q * r + c
    s = r + r * r * q
    power = np.int32((np.int32(k) + 127) << 23).view(np.float32)
    return power, s


def _power_parts_double(x: Any) -> tuple[Any, Any]:
    k = np.floor((x if x > LOWEST_DOUBLE else LOWEST_DOUBLE) * LOG2_E + 0.5)
    r = ((LOWEST_DOUBLE if x < LOWEST_DOUBLE else x) - k * LN2_DOUBLE[0]) - k * LN2_DOUBLE[1]
    q = EXP_DOUBLE[-1]
    for c in EXP_DOUBLE[-2::-1]:
        q = q * r + c
    s = r + r * r * q
    power = np.int64((np.int64(np.int32(k)) + 1023) << 52).view(np.float64)
    return power, s


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
    series = LOG_SERIES[-1]
    for c in LOG_SERIES[-2::-1]:
        series = series * (f * f) + c
    y = (f * series + k * LN2_DOUBLE[1]) + k * LN2_DOUBLE[0]
    return y if 0 < x < inf else x if x == inf else -inf if x == 0 else nan


# --- rows ---


def ordered(x: Any) -> Any:
    """An integer that orders like the number x, with NaN above infinity: a maximum of integers takes no care of NaN."""
    raise TypeError("for compiled code only")


def _ordered_single(x: Any) -> Any:
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)) if x == x else np.int32(0x7FC00000)


def _ordered_double(x: Any) -> Any:
    bits = np.float64(x).view(np.int64)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF) if x == x else np.int64(0x7FF8000000000000)


def from_ordered(x: Any) -> Any:
    """The number whose `ordered` is x."""
    raise TypeError("for compiled code only")


def _single_from_ordered(x: Any) -> Any:
    return np.int32(x ^ ((x >> 31) & 0x7FFFFFFF)).view(np.float32)


def _double_from_ordered(x: Any) -> Any:
    return np.int64(x ^ ((x >> 63) & 0x7FFFFFFFFFFFFFFF)).view(np.float64)


by_type(ordered, _ordered_single, _ordered_double)
by_type(from_ordered, _single_from_ordered, _double_from_ordered)


@part
def row_max(z: Any, i: int) -> Any:
    """max z, and NaN if there is one."""
    best = ordered(z[i, 0])
    for j in range(z.shape[1]):
        key = ordered(z[i, j])
        best = key if key > best else best
    return from_ordered(best)


@part
def inverse_temperature(t: float, z: Any) -> Any:
    """1/T, kept inside what the dtype of z can hold, so that 0·(1/T) and -inf·(1/T) are never NaN."""
    limits = np.finfo(z.dtype)
    return z.dtype.type(min(max(1 / t, float(limits.tiny)), float(limits.max)))


@part
def weights(e: Any, z: Any, i: int, top: Any, inverse_t: Any) -> float:
    """e = exp((z - max z)/T) of row i; returns Σ e, in float64. softmax(z/T) is e / Σ e."""
    total = 0.0
    for j in range(z.shape[1]):
        e[j] = exp((z[i, j] - top) * inverse_t)
        total += e[j]
    return total


@exact
def log_probability(z: Any, top: Any, inverse_t: float, log_total: float) -> float:
    """log softmax(z/T) = (z - max z)/T - log Σ e, in float64; in this order nothing is lost for logits of 1e30."""
    return (np.float64(z) - np.float64(top)) * inverse_t - log_total


@kernel
def softmax(y: Any, x: Any, temperature: Any) -> int:
    """y = exp((x - max x)/T) / Σ exp((x - max x)/T)"""
    t = temperature[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    inverse_t = inverse_temperature(t, x)
    e = np.empty(x.shape[1], x.dtype)
    for i in range(x.shape[0]):
        scale = x.dtype.type(1 / weights(e, x, i, row_max(x, i), inverse_t))
        for j in range(x.shape[1]):
            y[i, j] = e[j] * scale
    return DONE


@kernel
def softmax_vjp(dx: Any, dy: Any, y: Any, x: Any, temperature: Any) -> int:
    """dx = y·(dy - Σ dy·y) / T, and 0 where y = 0"""
    t = temperature[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    if dx.size:
        inverse_t = inverse_temperature(t, y)
        zero = y.dtype.type(0)
        for i in range(y.shape[0]):
            total = 0.0
            for j in range(y.shape[1]):
                total += zero if y[i, j] == 0 else dy[i, j] * y[i, j]
            inner = y.dtype.type(total)
            for j in range(y.shape[1]):
                dx[i, j] = zero if y[i, j] == 0 else y[i, j] * (dy[i, j] - inner) * inverse_t
    return DONE


@kernel
def log_softmax(y: Any, x: Any, temperature: Any) -> int:
    """y = (x - max x)/T - log Σ exp((x - max x)/T)"""
    t = temperature[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    inverse_t = inverse_temperature(t, x)
    e = np.empty(x.shape[1], x.dtype)
    for i in range(x.shape[0]):
        top = row_max(x, i)
        log_total = log(weights(e, x, i, top, inverse_t))
        for j in range(x.shape[1]):
            y[i, j] = log_probability(x[i, j], top, inverse_t, log_total)
    return DONE


@kernel
def log_softmax_vjp(dx: Any, dy: Any, y: Any, x: Any, temperature: Any) -> int:
    """dx = (dy - exp(y)·Σ dy) / T"""
    t = temperature[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    if dx.size:
        inverse_t = inverse_temperature(t, y)
        for i in range(y.shape[0]):
            total = 0.0
            for j in range(y.shape[1]):
                total += dy[i, j]
            total_dy = y.dtype.type(total)
            for j in range(y.shape[1]):
                dx[i, j] = (dy[i, j] - exp(y[i, j]) * total_dy) * inverse_t
    return DONE


# --- what the losses share ---


@part
def bad_label(target: Any, c: int, ignore_index: int) -> int:
    """1 + the first row whose label is neither a class nor ignore_index; 0 if there is none."""
    for i in range(target.size):
        if target[i] != ignore_index and not 0 <= target[i] < c:
            return i + 1
    return DONE


@part
def row_scale(divisor: float, reduction: int) -> float:
    """What one row's loss and gradient are multiplied by under this reduction."""
    if reduction in (NONE, SUM):
        return 1.0
    return 1.0 / divisor if divisor != 0 else 0.0


@part
def hard_loss(z: Any, i: int, y: int, top: Any, log_total: float, weight: Any, peak: float, base: float) -> float:
    """-Σ w·ỹ·log softmax(z) of row i, with ỹ = peak·onehot(y) + base; a class with w·ỹ = 0 adds exactly 0."""
    loss = 0.0 if log_total == log_total else nan
    w = weight[y] if weight.size else 1.0
    if peak * w != 0:
        loss -= peak * w * log_probability(z[i, y], top, 1.0, log_total)
    if base != 0:
        for j in range(z.shape[1]):
            w = weight[j] if weight.size else 1.0
            loss -= 0.0 if w == 0 else base * w * log_probability(z[i, j], top, 1.0, log_total)
    return loss


@part
def subtract_target(gradient: Any, i: int, y: int, weight: Any, peak: float, base: float) -> None:
    """dz -= w·ỹ for row i, with ỹ = peak·onehot(y) + base"""
    real = gradient.dtype.type
    if base != 0:
        for j in range(gradient.shape[1]):
            gradient[i, j] -= real(base) * (weight[j] if weight.size else real(1))
    gradient[i, y] -= real(peak) * (weight[y] if weight.size else real(1))


@part
def fill(gradient: Any, i: int, value: float) -> None:
    """dz = value for row i"""
    for j in range(gradient.shape[1]):
        gradient[i, j] = value


# --- cross-entropy ---


@kernel
def cross_entropy(
    loss: Any, gradient: Any, logits: Any, target: Any, weight: Any,
    reduction: int, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·onehot(y) + e/C"""
    n, c = logits.shape
    real = logits.dtype.type
    status = bad_label(target, c, ignore_index)
    if status:
        return status
    peak, base = 1.0 - label_smoothing, label_smoothing / c
    divisor, sum_weight = 0.0, 0.0
    for i in range(n):
        if target[i] != ignore_index:
            divisor += weight[target[i]] if weight.size else 1.0
    for j in range(c):
        sum_weight += weight[j] if weight.size else 1.0
    scale = row_scale(divisor, reduction)

    e = np.empty(c, logits.dtype)
    total_loss = 0.0
    for i in range(n):
        y = target[i]
        row = 0.0
        if y != ignore_index:
            top = row_max(logits, i)
            total = weights(e, logits, i, top, real(1))
            row = hard_loss(logits, i, y, top, log(total), weight, peak, base)
            if gradient.size:
                w = weight[y] if weight.size else 1.0
                factor = real((peak * w + base * sum_weight) / total * scale)
                for j in range(c):
                    gradient[i, j] = e[j] * factor
                subtract_target(gradient, i, y, weight, peak * scale, base * scale)
        elif gradient.size:
            fill(gradient, i, 0.0)
        if reduction == NONE:
            loss[i] = row
        total_loss += row
    if reduction != NONE:
        loss[0] = total_loss if reduction == SUM else total_loss / divisor if divisor != 0 else 0.0
    return DONE


@kernel
def soft_cross_entropy(
    loss: Any, gradient: Any, logits: Any, target: Any, weight: Any, reduction: int, label_smoothing: float
) -> int:
    """loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·y + e/C"""
    n, c = logits.shape
    real = logits.dtype.type
    peak, base = real(1.0 - label_smoothing), real(label_smoothing / c)
    scale = row_scale(n, reduction)

    e, y = np.empty(c, logits.dtype), np.empty(c, logits.dtype)
    total_loss = 0.0
    for i in range(n):
        top = row_max(logits, i)
        total = weights(e, logits, i, top, real(1))
        log_total = log(total)
        for j in range(c):
            y[j] = (peak * target[i, j] + base) * (weight[j] if weight.size else real(1))
        row, sum_y = 0.0, 0.0
        for j in range(c):
            row -= 0.0 if y[j] == 0 else y[j] * log_probability(logits[i, j], top, 1.0, log_total)
            sum_y += y[j]
        if gradient.size:
            factor = real(sum_y / total)
            for j in range(c):
                gradient[i, j] = (e[j] * factor - y[j]) * real(scale)
        row = row if log_total == log_total else nan
        if reduction == NONE:
            loss[i] = row
        total_loss += row
    if reduction != NONE:
        loss[0] = total_loss * scale
    return DONE


@part
def pointwise(value: Any, q: Any, input: Any, target: Any, i: int, log_target: bool) -> float:
    """value = q·(log q - input) for row i, 0 where q = 0; returns its sum."""
    total = 0.0
    for j in range(q.size):
        given = np.float64(target[i, j])
        q[j] = exp64(given) if log_target else given
        log_q = given if log_target else log64(given)
        value[j] = 0.0 if q[j] == 0 else q[j] * (log_q - input[i, j])
        total += value[j]
    return total


@kernel
def kl_div(loss: Any, gradient: Any, input: Any, target: Any, reduction: int, log_target: bool) -> int:
    """loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q"""
    n, c = input.shape
    scale = row_scale(n * c if reduction == MEAN else n, reduction)
    value, q = np.empty(c), np.empty(c)
    total_loss = 0.0
    for i in range(n):
        total_loss += pointwise(value, q, input, target, i, log_target)
        if gradient.size:
            for j in range(c):
                gradient[i, j] = -q[j] * scale
        if reduction == NONE:
            for j in range(c):
                loss[i * c + j] = value[j]
    if reduction != NONE:
        loss[0] = total_loss * scale
    return DONE


# --- distillation ---

# 1/2!, 1/3!, …: e^δ - 1 - δ = δ²·(1/2! + δ/3! + …), to the precision of each dtype for |δ| < 1/2.
SERIES_DOUBLE = tuple(1 / factorial(k) for k in range(2, 18))
SERIES_SINGLE = tuple(np.float32(c) for c in SERIES_DOUBLE[:8])
SMALLEST_LOG = -745.13  # e to this is the smallest float64 above 0


def second_order(x: Any) -> Any:
    """(e^δ - 1 - δ) / δ² for |δ| < 1/2."""
    raise TypeError("for compiled code only")


def _second_order_single(x: Any) -> Any:
    series = SERIES_SINGLE[-1]
    for c in SERIES_SINGLE[-2::-1]:
        series = series * x + c
    return series


def _second_order_double(x: Any) -> Any:
    series = SERIES_DOUBLE[-1]
    for c in SERIES_DOUBLE[-2::-1]:
        series = series * x + c
    return series


by_type(second_order, _second_order_single, _second_order_double)


@exact
def log_ratio(z_s: Any, top_s: Any, z_t: Any, top_t: Any, inverse_s: float, inverse_t: float, shift: float) -> float:
    """log p - log q = (z_s - max z_s)/T - (z_t - max z_t)/T - log Σ e_s / Σ e_t, in float64 and in this order."""
    return (np.float64(z_s) - np.float64(top_s)) * inverse_s - (np.float64(z_t) - np.float64(top_t)) * inverse_t - shift


@part
def teaches_excluded(z_s: Any, z_t: Any, top_t: Any, i: int, inverse_t: float) -> bool:
    """Whether the teacher gives a probability to a class that the student excludes (-inf), if only of 1e-300."""
    for j in range(z_s.shape[1]):
        if z_s[i, j] == -inf and log_probability(z_t[i, j], top_t, inverse_t, 0.0) > SMALLEST_LOG:
            return True
    return False


@part
def relative_entropy(
    p: Any, q: Any, total_p: float, total_q: float,
    z_s: Any, z_t: Any, top_s: Any, top_t: Any, i: int, inverse_s: float, inverse_t: float,
) -> float:  # fmt: skip
    """Σ q·(e^δ - 1 - δ) with δ = log p - log q, which is KL(q ‖ p).

    On entry p and q are weights that add up to total_p and total_q; on return p is p - q.
    """
    real = p.dtype.type
    scale_p, scale_q, shift = real(1 / total_p), real(1 / total_q), log(total_p / total_q)
    zero, half, one = real(0), real(0.5), real(1)
    kl, excluded = 0.0, real(0)
    for j in range(p.size):
        pj, qj = p[j] * scale_p, q[j] * scale_q
        delta = real(log_ratio(z_s[i, j], top_s, z_t[i, j], top_t, inverse_s, inverse_t, shift))
        small = abs(delta) < half
        d = delta if small else zero
        curve = d * d * second_order(d)
        term = qj * curve if small else pj - qj - qj * delta
        difference = qj * (d + curve) if small else pj - qj
        kl += pj if qj == 0 else term
        p[j] = pj if qj == 0 else difference
        excluded += one if delta == -inf else zero
    return inf if excluded > 0 and teaches_excluded(z_s, z_t, top_t, i, inverse_t) else kl


@kernel
def distillation_loss(
    loss: Any, gradient: Any, student_logits: Any, teacher_logits: Any, target: Any,
    temperature: Any, hard_weight: Any, soft_weight: Any,
    reduction: int, scale_t2: bool, log_target: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p);  dz_s = hard·(softmax(z_s) - ỹ) + soft·T·(p - q)"""
    n, c = student_logits.shape
    real = student_logits.dtype.type
    t, hard, soft = temperature[()], hard_weight[()], soft_weight[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    status = bad_label(target, c, ignore_index)
    if status:
        return status
    t = min(t, LARGEST_TEMPERATURE)
    inverse_t, inverse_t_real = inverse_temperature(t, temperature), inverse_temperature(t, student_logits)
    inverse_q, inverse_q_real = (1.0, real(1)) if log_target else (inverse_t, inverse_t_real)
    peak, base = 1.0 - label_smoothing, label_smoothing / c
    labelled = 0
    for i in range(target.size):
        labelled += target[i] != ignore_index

    # the hard mean is over labelled rows, the soft mean over all
    hard = hard * row_scale(labelled, reduction) if labelled else 0.0
    soft = soft * row_scale(n, reduction)
    no_weight = np.empty(0, student_logits.dtype)
    e, p, q = np.zeros(c, student_logits.dtype), np.zeros(c, student_logits.dtype), np.empty(c, student_logits.dtype)
    total_loss = 0.0
    for i in range(n):
        top_s, top_t = row_max(student_logits, i), row_max(teacher_logits, i)
        row = 0.0

        # soft: T²·KL(q ‖ p), gradient T·(p - q)
        if soft != 0:
            total_p = weights(p, student_logits, i, top_s, inverse_t_real)
            total_q = weights(q, teacher_logits, i, top_t, inverse_q_real)
            kl = relative_entropy(
                p, q, total_p, total_q, student_logits, teacher_logits, top_s, top_t, i, inverse_t, inverse_q
            )
            kl = 0.0 if kl < 0 else kl
            row += soft * (t * t if scale_t2 else 1.0) * kl
        soft_factor = real(soft * (t if scale_t2 else inverse_t))

        # hard: cross-entropy at T = 1, gradient softmax(z) - y, for the rows that carry a label
        has_label = hard != 0 and target[i] != ignore_index
        hard_factor = real(0)
        if has_label:
            total = weights(e, student_logits, i, top_s, real(1))
            row += hard * hard_loss(student_logits, i, target[i], top_s, log(total), no_weight, peak, base)
            hard_factor = real(hard / total)

        if gradient.size:
            for j in range(c):
                gradient[i, j] = (e[j] * hard_factor if has_label else real(0)) + p[j] * soft_factor
            if has_label:
                subtract_target(gradient, i, target[i], no_weight, peak * hard, base * hard)
            if (soft != 0 and not abs(top_t) < inf) or ((soft != 0 or has_label) and not abs(top_s) < inf):
                fill(gradient, i, nan)
        if reduction == NONE:
            loss[i] = row
        total_loss += row
    if reduction != NONE:
        loss[0] = total_loss
    return DONE


# --- a bias and an activation: one traversal, and the bias gradient in the same pass backward ---


@part
def add_bias(u: Any, x: Any, i: int, b: Any) -> None:
    """u = x + b for row i. What is written from u may lie where x was."""
    for j in range(u.size):
        u[j] = x[i, j] + b[j]


@part
def start(db: Any) -> None:
    """db = 0"""
    for j in range(db.size):
        db[j] = 0


@part
def keep(dx: Any, db: Any, i: int, du: Any) -> None:
    """dx = du for row i;  db += du"""
    if dx.size:
        for j in range(du.size):
            dx[i, j] = du[j]
    if db.size:
        for j in range(du.size):
            db[j] += du[j]


@kernel
def bias(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = u"""
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            y[i, j] = u[j]
    return DONE


@kernel
def bias_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy;  db = Σ_rows dx"""
    start(db)
    for i in range(dy.shape[0]):
        keep(dx, db, i, dy[i])
    return DONE


@kernel
def bias_relu(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = max(u, 0)"""
    zero = x.dtype.type(0)
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            y[i, j] = zero if u[j] <= 0 else u[j]
    return DONE


@kernel
def bias_relu_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy·[y > 0];  db = Σ_rows dx"""
    zero, one = y.dtype.type(0), y.dtype.type(1)
    du = np.empty(y.shape[1], y.dtype)
    start(db)
    for i in range(y.shape[0]):
        for j in range(du.size):
            du[j] = dy[i, j] * (one if y[i, j] > 0 else zero)
        keep(dx, db, i, du)
    return DONE


@kernel
def bias_tanh(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = tanh u = (1 - e^(-2|u|)) / (1 + e^(-2|u|)) with the sign of u"""
    two = x.dtype.type(2)
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            fall = expm1(-two * abs(u[j]))
            y[i, j] = np.copysign(fall / (two + fall), u[j])
    return DONE


@kernel
def bias_tanh_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy·(1 - y²);  db = Σ_rows dx"""
    one = y.dtype.type(1)
    du = np.empty(y.shape[1], y.dtype)
    start(db)
    for i in range(y.shape[0]):
        for j in range(du.size):
            du[j] = dy[i, j] * (one - y[i, j] * y[i, j])
        keep(dx, db, i, du)
    return DONE


@kernel
def bias_sigmoid(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = 1 / (1 + exp(-u))"""
    one = x.dtype.type(1)
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            e = exp(-abs(u[j]))
            y[i, j] = (one if u[j] >= 0 else e) / (one + e)
    return DONE


@kernel
def bias_sigmoid_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy·y·(1 - y);  db = Σ_rows dx"""
    one = y.dtype.type(1)
    du = np.empty(y.shape[1], y.dtype)
    start(db)
    for i in range(y.shape[0]):
        for j in range(du.size):
            du[j] = dy[i, j] * (y[i, j] * (one - y[i, j]))
        keep(dx, db, i, du)
    return DONE


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


@kernel
def bias_gelu(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = u·Φ(u)"""
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            wide = np.float64(u[j])
            cdf, _ = normal_cdf_and_density(wide)
            y[i, j] = 0.0 if cdf == 0 else wide * cdf
    return DONE


@kernel
def bias_gelu_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy·(Φ(u) + u·φ(u));  db = Σ_rows dx"""
    u, du = np.empty(b.size, x.dtype), np.empty(b.size, x.dtype)
    start(db)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            wide = np.float64(u[j])
            cdf, density = normal_cdf_and_density(wide)
            du[j] = dy[i, j] * (cdf + (0.0 if density == 0 else wide * density))
        keep(dx, db, i, du)
    return DONE


# --- optimizer steps ---


@kernel
def sgd_step(w: Any, v: Any, g: Any, lr: Any, momentum: float, nesterov: bool, weight_decay: float) -> int:
    """d = g + λ·w;  v = μ·v + d;  w -= lr·v  (Nesterov: lr·(d + μ·v); without v: lr·d)"""
    real = w.dtype.type
    rate, mu, decay = real(lr[()]), real(momentum), real(weight_decay)
    if v.size == 0:
        for k in range(w.size):
            d = g[k] + decay * w[k] if decay != 0 else g[k]
            w[k] -= rate * d
    else:
        for k in range(w.size):
            d = g[k] + decay * w[k] if decay != 0 else g[k]
            v[k] = mu * v[k] + d
            w[k] -= rate * (d + mu * v[k] if nesterov else v[k])
    return DONE


@kernel
def adam_step(
    w: Any, m: Any, v: Any, g: Any, lr: Any, step: Any,
    beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> int:  # fmt: skip
    """m = β₁·m + (1-β₁)·g;  v = β₂·v + (1-β₂)·g²;  w -= lr·(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)"""
    real, t = w.dtype.type, step[()]
    shrink = real(1.0 - lr[()] * weight_decay if decoupled else 1.0)
    decay = real(0.0 if decoupled else weight_decay)
    keep_m, keep_v, take_m, take_v = real(beta1), real(beta2), real(1.0 - beta1), real(1.0 - beta2)
    rate, root, tiny = real(lr[()] / (1.0 - beta1**t)), real(1.0 / sqrt(1.0 - beta2**t)), real(eps)
    for k in range(w.size):
        wk = w[k] * shrink
        gk = g[k] + decay * wk if decay != 0 else g[k]
        m[k] = keep_m * m[k] + take_m * gk
        v[k] = keep_v * v[k] + take_v * gk * gk
        w[k] = wk - rate * m[k] / (np.sqrt(v[k]) * root + tiny)
    return DONE


# --- dropout ---

BLOCKS = 256  # counters whose random words are drawn at a time
LOW, HALF_WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIERS = np.uint64(PHILOX_MULTIPLIERS[0]), np.uint64(PHILOX_MULTIPLIERS[1])
WEYL = np.uint64(PHILOX_WEYL[0]), np.uint64(PHILOX_WEYL[1])


@part
def philox(words: Any, first: int, count: int, key: Any, stream: Any, step: Any) -> None:
    """Four random words for each of `count` counters from `first` on, as `minikd.ops.random.philox` draws them."""
    for k in range(count):
        block = np.uint64(first + k)
        a, b, c, d = block & LOW, block >> HALF_WORD, step & LOW, stream & LOW
        k0, k1 = key & LOW, key >> HALF_WORD
        for _ in range(PHILOX_ROUNDS):
            one, two = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
            a, c = (two >> HALF_WORD) ^ b ^ k0, (one >> HALF_WORD) ^ d ^ k1
            b, d = two & LOW, one & LOW
            k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
        words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3] = a, b, c, d


@kernel
def dropout(y: Any, mask: Any, x: Any, step: Any, p: float, seed: int, stream: int) -> int:
    """y = x·m,  m = [r ≥ p·2³²] / (1 - p),  r = philox(seed, stream, step, index)"""
    threshold = np.uint64(np.rint(p * 4294967296.0))
    zero, scale = x.dtype.type(0), x.dtype.type(1.0 / (1.0 - p))
    words = np.empty(4 * BLOCKS, np.uint32)
    for first in range(0, x.size, words.size):
        count = min(words.size, x.size - first)
        philox(words, first // 4, (count + 3) // 4, np.uint64(seed), np.uint64(stream), np.uint64(step[()]))
        for k in range(count):
            mask[first + k] = scale if words[k] >= threshold else zero
        for k in range(first, first + count):
            y[k] = x[k] * mask[k]
    return DONE


@kernel
def dropout_vjp(dx: Any, dy: Any, y: Any, mask: Any, x: Any, step: Any, p: float, seed: int, stream: int) -> int:
    """dx = dy·m"""
    for k in range(dx.size):
        dx[k] = dy[k] * mask[k]
    return DONE
