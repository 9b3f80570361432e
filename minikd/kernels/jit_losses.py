"""The losses: cross-entropy for hard and for soft targets, and Kullback-Leibler divergence.

Each takes its logits' gradient in the same traversal as its value; backward only scales it by the upstream gradient.
Row losses are computed and added up in float64.
"""

from __future__ import annotations

from math import log, nan
from typing import Any

import numpy as np

from minikd.kernels.jit import CODES
from minikd.kernels.jit_real import DONE, exp64, kernel, log64, log_minus, part
from minikd.kernels.jit_rows import (
    LANES,
    NARROW,
    bad_label,
    log_probability,
    row_max,
    softening,
    store,
    tile_scaled,
    tile_softening,
    weights,
)

MEAN, SUM, NONE = CODES["mean"], CODES["sum"], CODES["none"]

# --- what they share ---


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
def scale_row(y: Any, i: int, e: Any, factor: Any) -> None:
    """y = e·factor for row i, and 0 where the factor is 0"""
    zero = e.dtype.type(0)
    for j in range(e.size):
        y[i, j] = zero if factor == 0 else e[j] * factor


# --- cross-entropy ---


@kernel
def cross_entropy(
    loss: Any, gradient: Any, logits: Any, target: Any, weight: Any,
    reduction: int, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·onehot(y) + e/C"""
    n, c = logits.shape
    status = bad_label(target, c, ignore_index)
    if status:
        return status
    peak, base, soft = 1.0 - label_smoothing, label_smoothing / c, softening(1.0, logits)
    divisor, sum_weight = 0.0, 0.0
    for i in range(n):
        if target[i] != ignore_index:
            divisor += weight[target[i]] if weight.size else 1.0
    for j in range(c):
        sum_weight += weight[j] if weight.size else 1.0
    scale = row_scale(divisor, reduction)

    lanes = LANES if c <= NARROW else 1
    tile, tile_e, e = np.zeros((c, lanes), logits.dtype), np.empty((c, lanes), logits.dtype), np.empty(c, logits.dtype)
    top, factor = np.empty(LANES, logits.dtype), np.zeros(LANES, logits.dtype)
    total, log_total = np.empty(LANES), np.empty(LANES)
    total_loss = 0.0
    for first in range(0, n, lanes):
        if c <= NARROW:
            tile_softening(tile_e, total, top, tile, logits, first, soft)
            for r in range(LANES):
                log_total[r] = log64(total[r])
        else:
            top[0] = row_max(logits, first)
            total[0] = weights(e, logits, first, top[0], soft)
            log_total[0] = log(total[0])

        # the losses, and what each row's weights are multiplied by
        for r in range(min(lanes, n - first)):
            y, row = target[first + r], 0.0
            factor[r] = 0
            if y != ignore_index:
                row = hard_loss(logits, first + r, y, top[r], log_total[r], weight, peak, base)
                w = weight[y] if weight.size else 1.0
                factor[r] = (peak * w + base * sum_weight) / total[r] * scale
            if reduction == NONE:
                loss[first + r] = row
            total_loss += row

        if gradient.size:
            if c <= NARROW:
                tile_scaled(tile_e, factor)
                store(gradient, first, tile_e)
            else:
                scale_row(gradient, first, e, factor[0])
            for i in range(first, min(first + lanes, n)):
                if target[i] != ignore_index:
                    subtract_target(gradient, i, target[i], weight, peak * scale, base * scale)
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
    peak, base, soft = real(1.0 - label_smoothing), real(label_smoothing / c), softening(1.0, logits)
    scale = row_scale(n, reduction)

    e, y = np.empty(c, logits.dtype), np.empty(c, logits.dtype)
    total_loss = 0.0
    for i in range(n):
        top = row_max(logits, i)
        total = weights(e, logits, i, top, soft)
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


# --- Kullback-Leibler divergence of given log-probabilities ---

BLOCK = 512  # elements that are taken through all steps while they are in the nearest cache


@part
def terms_of_logarithms(value: Any, q: Any, input: Any, target: Any) -> float:
    """value = q·(log q - input) with q = e^target, 0 where q = 0; returns its sum."""
    total = 0.0
    for k in range(input.size):
        log_q = np.float64(target[k])
        e = exp64(log_q)
        q[k] = e
        value[k] = 0.0 if e == 0 else e * (log_q - input[k])
        total += value[k]
    return total


@part
def terms_of_probabilities(value: Any, q: Any, input: Any, target: Any) -> float:
    """The same with q = target."""
    zero = input.dtype.type(0)
    for k in range(input.size):
        given = target[k]
        term = given * log_minus(given, input[k])
        q[k] = given
        value[k] = zero if given == 0 else term
    total = 0.0
    for k in range(input.size):
        total += value[k]
    return total


@kernel
def kl_div(loss: Any, gradient: Any, input: Any, target: Any, reduction: int, log_target: bool) -> int:
    """loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q"""
    n, c = input.shape
    scale = input.dtype.type(row_scale(n * c if reduction == MEAN else n, reduction))
    flat_input, flat_target, flat_gradient = input.reshape(-1), target.reshape(-1), gradient.reshape(-1)
    value, q = np.empty(BLOCK, input.dtype), np.empty(BLOCK, input.dtype)
    total_loss = 0.0
    for first in range(0, n * c, BLOCK):
        here = slice(first, min(first + BLOCK, n * c))
        if log_target:
            total_loss += terms_of_logarithms(value, q, flat_input[here], flat_target[here])
        else:
            total_loss += terms_of_probabilities(value, q, flat_input[here], flat_target[here])
        if gradient.size:
            dinput = flat_gradient[here]
            for k in range(dinput.size):
                dinput[k] = -q[k] * scale
        if reduction == NONE:
            rows = loss[here]
            for k in range(rows.size):
                rows[k] = value[k]
    if reduction != NONE:
        loss[0] = total_loss * row_scale(n * c if reduction == MEAN else n, reduction)
    return DONE


# --- backward: dx = gradient · the upstream gradient ---


@part
def scale_rows(dx: Any, dloss: Any, gradient: Any, reduction: int) -> None:
    """dx = gradient·dloss, where dloss is one number, or one for each row with the reduction "none"."""
    for i in range(dx.shape[0]):
        factor = dloss[i if reduction == NONE else 0]
        for j in range(dx.shape[1]):
            dx[i, j] = gradient[i, j] * factor


@kernel
def cross_entropy_vjp(
    dlogits: Any, dloss: Any, loss: Any, gradient: Any, logits: Any, target: Any, weight: Any,
    reduction: int, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """dz = gradient·dloss"""
    scale_rows(dlogits, dloss, gradient, reduction)
    return DONE


@kernel
def soft_cross_entropy_vjp(
    dlogits: Any, dloss: Any, loss: Any, gradient: Any, logits: Any, target: Any, weight: Any,
    reduction: int, label_smoothing: float,
) -> int:  # fmt: skip
    """dz = gradient·dloss"""
    scale_rows(dlogits, dloss, gradient, reduction)
    return DONE


@kernel
def kl_div_vjp(
    dinput: Any, dloss: Any, loss: Any, gradient: Any, input: Any, target: Any, reduction: int, log_target: bool
) -> int:
    """dinput = gradient·dloss, where dloss is one for each element with the reduction "none"."""
    n, c = dinput.shape
    if reduction == NONE:
        for i in range(n):
            for j in range(c):
                dinput[i, j] = gradient[i, j] * dloss[i * c + j]
    else:
        scale_rows(dinput, dloss, gradient, reduction)
    return DONE
