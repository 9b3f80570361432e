"""Kernels on rows of class scores: softmax, log-softmax, and what the scores decide.

A wide row is a loop over its classes. Narrow rows are taken LANES at a time as a tile, which holds class j of row r
at [j, r]: each loop runs over rows, and none has to add up across a vector.
"""

from __future__ import annotations

from math import inf, log
from typing import Any

import numpy as np

from minikd.kernels.jit_real import (
    BAD_TEMPERATURE,
    DONE,
    LOG2_E,
    by_type,
    exact,
    exp,
    kernel,
    log64,
    part,
    power_of_two,
)

LANES = 64  # narrow rows that are computed side by side
NARROW = 48  # classes up to which a row is narrow

# --- maxima ---


def ordered(x: Any) -> Any:
    """An integer that orders like the number x, so that a maximum takes no care of NaN; of NaN itself it is any."""
    raise TypeError("for compiled code only")


def _ordered_single(x: Any) -> Any:
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _ordered_double(x: Any) -> Any:
    bits = np.float64(x).view(np.int64)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


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
    """max z of row i; anything if one of its numbers is NaN, which every weight of the row then becomes."""
    best = ordered(z[i, 0])
    for j in range(z.shape[1]):
        key = ordered(z[i, j])
        best = key if key > best else best
    return from_ordered(best)


@part
def tile_max(top: Any, tile: Any) -> None:
    """top = max z of each row of a tile, as `row_max`."""
    for r in range(LANES):
        top[r] = tile[0, r]
    for j in range(tile.shape[0]):
        for r in range(LANES):
            top[r] = tile[j, r] if tile[j, r] > top[r] else top[r]


# --- tiles ---


@part
def load(tile: Any, z: Any, i: int) -> None:
    """The rows from i on into a tile; lanes that no row is left for keep what they had."""
    for r in range(min(LANES, z.shape[0] - i)):
        for j in range(z.shape[1]):
            tile[j, r] = z[i + r, j]


@part
def store(y: Any, i: int, tile: Any) -> None:
    """A tile into the rows from i on."""
    for r in range(min(LANES, y.shape[0] - i)):
        for j in range(y.shape[1]):
            y[i + r, j] = tile[j, r]


# --- softmax(z/T) = e / Σ e,  e = exp((z - max z)/T) = 2^((z - max z)·log2(e)/T) ---


@part
def bounded_inverse(t: float, z: Any) -> float:
    """1/T, kept inside what the dtype of z can hold, so that 0·(1/T) and -inf·(1/T) are never NaN."""
    limits = np.finfo(z.dtype)
    return min(max(1 / t, float(limits.tiny)), float(limits.max) / 2)


@part
def inverse_temperature(t: float, z: Any) -> Any:
    """The same in the dtype of z."""
    return z.dtype.type(bounded_inverse(t, z))


@part
def softening(t: float, z: Any) -> tuple[Any, Any, Any]:
    """What weights are computed with: log2(e)/T in two parts, and the lowest z - max z whose weight is above 0."""
    limits = np.finfo(z.dtype)
    inverse = bounded_inverse(t, z)
    rate, reach = LOG2_E * inverse, log(float(limits.tiny)) / inverse
    high = z.dtype.type(rate)
    return high, z.dtype.type(rate - high), z.dtype.type(max(reach, -float(limits.max)))


@part
def weights(e: Any, z: Any, i: int, top: Any, soft: Any) -> float:
    """e = exp((z - max z)/T) of row i; returns Σ e, in float64. It is NaN if there is a NaN or no finite maximum."""
    rate, rest, reach = soft
    for j in range(z.shape[1]):
        e[j] = power_of_two(z[i, j] - top, rate, rest, reach)
    total = 0.0
    for j in range(e.size):
        total += e[j]
    return total


@part
def tile_weights(e: Any, total: Any, z: Any, top: Any, soft: Any) -> None:
    """The same for a tile z, with total = Σ e of each row; e and z are not the same."""
    rate, rest, reach = soft
    for j in range(z.shape[0]):
        for r in range(LANES):
            e[j, r] = power_of_two(z[j, r] - top[r], rate, rest, reach)
    for r in range(LANES):
        total[r] = 0.0
    for j in range(z.shape[0]):
        for r in range(LANES):
            total[r] += e[j, r]


@part
def tile_softening(e: Any, total: Any, top: Any, tile: Any, z: Any, i: int, soft: Any) -> None:
    """Weights, sums and maxima of the narrow rows from i on, whose logits are then in `tile`."""
    load(tile, z, i)
    tile_max(top, tile)
    tile_weights(e, total, tile, top, soft)


@exact
def log_probability(z: Any, top: Any, inverse_t: float, log_total: float) -> float:
    """log softmax(z/T) = (z - max z)/T - log Σ e, in float64; in this order nothing is lost for logits of 1e30."""
    return (np.float64(z) - np.float64(top)) * inverse_t - log_total


@part
def tile_scaled(tile: Any, scale: Any) -> None:
    """tile = tile·scale of each row, and 0 where the scale is 0."""
    zero = tile.dtype.type(0)
    for j in range(tile.shape[0]):
        for r in range(LANES):
            tile[j, r] = zero if scale[r] == 0 else tile[j, r] * scale[r]


@kernel
def softmax(y: Any, x: Any, temperature: Any) -> int:
    """y = exp((x - max x)/T) / Σ exp((x - max x)/T)"""
    t = temperature[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    n, c = x.shape
    soft = softening(t, x)
    if c <= NARROW:
        tile, e = np.zeros((c, LANES), x.dtype), np.empty((c, LANES), x.dtype)
        top, scale, total = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype), np.empty(LANES)
        for i in range(0, n, LANES):
            tile_softening(e, total, top, tile, x, i, soft)
            for r in range(LANES):
                scale[r] = 1 / total[r]
            tile_scaled(e, scale)
            store(y, i, e)
        return DONE
    row = np.empty(c, x.dtype)
    for i in range(n):
        factor = x.dtype.type(1 / weights(row, x, i, row_max(x, i), soft))
        for j in range(c):
            y[i, j] = row[j] * factor
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
    n, c = x.shape
    soft, inverse_t = softening(t, x), inverse_temperature(t, temperature)
    if c <= NARROW:
        tile, e = np.zeros((c, LANES), x.dtype), np.empty((c, LANES), x.dtype)
        top, total = np.empty(LANES, x.dtype), np.empty(LANES)
        for i in range(0, n, LANES):
            tile_softening(e, total, top, tile, x, i, soft)
            for r in range(LANES):
                total[r] = log64(total[r])
            for j in range(c):
                for r in range(LANES):
                    tile[j, r] = log_probability(tile[j, r], top[r], inverse_t, total[r])
            store(y, i, tile)
        return DONE
    row = np.empty(c, x.dtype)
    for i in range(n):
        top_i = row_max(x, i)
        log_total = log(weights(row, x, i, top_i, soft))
        for j in range(c):
            y[i, j] = log_probability(x[i, j], top_i, inverse_t, log_total)
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


# --- what scores decide ---


@part
def first_largest(z: Any, i: int) -> int:
    """The first j with z_j = max z of row i; NaN is the largest."""
    top, broken = row_max(z, i), 0
    for j in range(z.shape[1]):
        broken |= z[i, j] != z[i, j]
    j = 0
    while z[i, j] == z[i, j] if broken else z[i, j] != top:
        j += 1
    return j


@part
def tile_first_largest(place: Any, best: Any, tile: Any, z: Any, i: int) -> None:
    """The same for the narrow rows from i on."""
    load(tile, z, i)
    for r in range(LANES):
        place[r], best[r] = 0, tile[0, r]
    for j in range(1, tile.shape[0]):
        for r in range(LANES):
            better = not tile[j, r] <= best[r] and best[r] == best[r]
            place[r] = j if better else place[r]
            best[r] = tile[j, r] if better else best[r]


@kernel
def argmax(y: Any, x: Any) -> int:
    """y = the first j with x_j = max x"""
    n, c = x.shape
    if c > NARROW:
        for i in range(n):
            y[i] = first_largest(x, i)
        return DONE
    tile, best, place = np.zeros((c, LANES), x.dtype), np.empty(LANES, x.dtype), np.empty(LANES, np.int64)
    for i in range(0, n, LANES):
        tile_first_largest(place, best, tile, x, i)
        for r in range(min(LANES, n - i)):
            y[i + r] = place[r]
    return DONE


@part
def bad_label(target: Any, c: int, ignore_index: int) -> int:
    """1 + the first row whose label is neither a class nor ignore_index; 0 if there is none."""
    for i in range(target.size):
        if target[i] != ignore_index and not 0 <= target[i] < c:
            return i + 1
    return DONE


@kernel
def correct_count(count: Any, logits: Any, target: Any, ignore_index: int) -> int:
    """count = #{rows: target ≠ ignore_index and argmax z = target}"""
    n, c = logits.shape
    status = bad_label(target, c, ignore_index)
    if status:
        return status
    correct = 0
    if c > NARROW:
        for i in range(n):
            correct += target[i] != ignore_index and first_largest(logits, i) == target[i]
    else:
        tile, best, place = np.zeros((c, LANES), logits.dtype), np.empty(LANES, logits.dtype), np.empty(LANES, np.int64)
        for i in range(0, n, LANES):
            tile_first_largest(place, best, tile, logits, i)
            for r in range(min(LANES, n - i)):
                correct += target[i + r] != ignore_index and place[r] == target[i + r]
    count[()] = correct
    return DONE
