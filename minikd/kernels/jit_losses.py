"""The losses: cross-entropy for hard and for soft targets, Kullback-Leibler divergence, and distillation.

Each takes its logits' gradient in the same traversal as its value; backward only scales it by the upstream gradient.
Row losses are computed and added up in float64.
"""

from __future__ import annotations

from math import inf, log, nan
from typing import Any

import numpy as np

from minikd.kernels.jit import CODES
from minikd.kernels.jit_real import BAD_TEMPERATURE, DONE, exact, exp64, exp_tail, kernel, log64, part
from minikd.kernels.jit_rows import (
    LANES,
    NARROW,
    bad_label,
    inverse_temperature,
    load,
    log_probability,
    row_max,
    softening,
    store,
    tile_max,
    tile_scaled,
    tile_softening,
    tile_weights,
    weights,
)
from minikd.ops.losses import LARGEST_TEMPERATURE

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
def pointwise(value: Any, q: Any, input: Any, target: Any, log_target: bool) -> float:
    """value = q·(log q - input), 0 where q = 0; returns its sum."""
    total = 0.0
    for k in range(input.size):
        given = np.float64(target[k])
        q[k] = exp64(given) if log_target else given
        log_q = given if log_target else log64(given)
        value[k] = 0.0 if q[k] == 0 else q[k] * (log_q - input[k])
        total += value[k]
    return total


@kernel
def kl_div(loss: Any, gradient: Any, input: Any, target: Any, reduction: int, log_target: bool) -> int:
    """loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q"""
    n, c = input.shape
    scale = row_scale(n * c if reduction == MEAN else n, reduction)
    flat_input, flat_target, flat_gradient = input.reshape(-1), target.reshape(-1), gradient.reshape(-1)
    value, q = np.empty(BLOCK), np.empty(BLOCK)
    total_loss = 0.0
    for first in range(0, n * c, BLOCK):
        here = slice(first, min(first + BLOCK, n * c))
        total_loss += pointwise(value, q, flat_input[here], flat_target[here], log_target)
        if gradient.size:
            for k in range(here.start, here.stop):
                flat_gradient[k] = -q[k - first] * scale
        if reduction == NONE:
            for k in range(here.start, here.stop):
                loss[k] = value[k - first]
    if reduction != NONE:
        loss[0] = total_loss * scale
    return DONE


# --- distillation ---

SMALLEST_LOG = -745.13  # e to this is the smallest float64 above 0
NEAR = 0.34  # up to here δ is a remainder that `exp_tail` is made for


@exact
def log_gap(z_s: Any, top_s: Any, inverse_s: float, z_t: Any, top_t: Any, inverse_t: float) -> float:
    """log e_s - log e_t = (z_s - max z_s)/T_s - (z_t - max z_t)/T_t in float64; 0 where e_t is 0 even there."""
    log_s = (np.float64(z_s) - np.float64(top_s)) * inverse_s
    log_t = (np.float64(z_t) - np.float64(top_t)) * inverse_t
    return log_s - log_t if log_t >= SMALLEST_LOG else 0.0


@exact
def divergence(p: Any, q: Any, delta: Any, near: Any, zero: Any) -> Any:
    """q·(e^δ - 1 - δ) with δ = log p - log q: what a class adds to KL(q ‖ p), since Σp = Σq.

    No term is negative and nothing cancels when p ≈ q. Where q = 0 it is p, but infinite where δ is: there q vanishes
    in this dtype only.
    """
    d = delta if abs(delta) < near else zero
    term = q * (d * d * exp_tail(d)) if abs(delta) < near else (p - q) - q * delta
    term = p if q == 0 else term
    return -delta if delta == -inf else term


@part
def tile_divergence(kl: Any, p: Any, q: Any, gap: Any, total_p: Any, total_q: Any, lane: Any) -> None:
    """kl = KL(q ‖ p) for each row of a tile, and p becomes p - q.

    On entry p and q are weights, gap is the difference of their logarithms. `lane` is scratch memory.
    """
    real = p.dtype.type
    near, zero = real(NEAR), real(0)
    for r in range(LANES):
        lane[0, r], lane[1, r], lane[2, r] = 1 / total_p[r], 1 / total_q[r], log64(total_p[r] / total_q[r])
        kl[r] = 0.0
    for j in range(p.shape[0]):
        for r in range(LANES):
            pj, qj = p[j, r] * lane[0, r], q[j, r] * lane[1, r]
            p[j, r] = pj - qj
            gap[j, r] = divergence(pj, qj, gap[j, r] - lane[2, r], near, zero)
    for j in range(p.shape[0]):
        for r in range(LANES):
            kl[r] += gap[j, r]


@part
def tile_power(e: Any, total: Any, p: Any, doublings: int) -> None:
    """e = p^(2^doublings) for a tile, with total = Σ e of each row"""
    for r in range(LANES):
        total[r] = 0.0
    for j in range(p.shape[0]):
        for r in range(LANES):
            e[j, r] = p[j, r]
        for _ in range(doublings):
            for r in range(LANES):
                e[j, r] *= e[j, r]
        for r in range(LANES):
            total[r] += e[j, r]


@part
def power(e: Any, p: Any, doublings: int) -> float:
    """e = p^(2^doublings) for a row; returns Σ e"""
    for j in range(p.size):
        e[j] = p[j]
    for _ in range(doublings):
        for j in range(p.size):
            e[j] *= e[j]
    total = 0.0
    for j in range(p.size):
        total += e[j]
    return total


@part
def distill_tile(student: Any, teacher: Any, i: int, tiles: Any, tops: Any, sums: Any, lane: Any, plan: Any) -> None:
    """For the narrow rows from i on: p - q, the student's weights at 1, their maxima and sums, and KL(q ‖ p)."""
    z_s, z_t, p, q, e = tiles
    total_p, total_q, total_e, kl = sums
    soft, hard, doublings, rate_s, rate_t, rate, inverse_s, inverse_t = plan
    top_s, top_t = tops
    load(z_s, student, i)
    tile_max(top_s, z_s)
    if soft:
        load(z_t, teacher, i)
        tile_max(top_t, z_t)
        tile_weights(p, total_p, z_s, top_s, rate_s)
        tile_weights(q, total_q, z_t, top_t, rate_t)
    if hard and soft and doublings >= 0:
        tile_power(e, total_e, p, doublings)
    elif hard:
        tile_weights(e, total_e, z_s, top_s, rate)
    if soft:
        for j in range(z_s.shape[0]):
            for r in range(LANES):
                z_s[j, r] = log_gap(z_s[j, r], top_s[r], inverse_s, z_t[j, r], top_t[r], inverse_t)
        tile_divergence(kl, p, q, z_s, total_p, total_q, lane)


@part
def distill_row(student: Any, teacher: Any, i: int, rows: Any, tops: Any, sums: Any, plan: Any) -> None:
    """The same for row i."""
    p, q, e = rows
    total_p, total_q, total_e, kl = sums
    soft, hard, doublings, rate_s, rate_t, rate, inverse_s, inverse_t = plan
    top_s, top_t = row_max(student, i), row_max(teacher, i)
    tops[0][0] = top_s
    if soft:
        total_p[0] = weights(p, student, i, top_s, rate_s)
        total_q[0] = weights(q, teacher, i, top_t, rate_t)
    if hard and soft and doublings >= 0:
        total_e[0] = power(e, p, doublings)
    elif hard:
        total_e[0] = weights(e, student, i, top_s, rate)
    if soft:
        real = p.dtype.type
        per_p, per_q, shift = real(1 / total_p[0]), real(1 / total_q[0]), log(total_p[0] / total_q[0])
        near, zero, total = real(NEAR), real(0), 0.0
        for j in range(p.size):
            pj, qj = p[j] * per_p, q[j] * per_q
            gap = log_gap(student[i, j], top_s, inverse_s, teacher[i, j], top_t, inverse_t)
            total += divergence(pj, qj, real(gap - shift), near, zero)
            p[j] = pj - qj
        kl[0] = total


@kernel
def distillation_loss(
    loss: Any, gradient: Any, student_logits: Any, teacher_logits: Any, target: Any,
    temperature: Any, hard_weight: Any, soft_weight: Any,
    reduction: int, scale_t2: bool, log_target: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p);  dz_s = hard·(softmax(z_s) - ỹ) + soft·T·(p - q)"""
    n, c = student_logits.shape
    real, dtype = student_logits.dtype.type, student_logits.dtype
    t, hard, soft = temperature[()], hard_weight[()], soft_weight[()]
    if not 0 < t < inf:
        return BAD_TEMPERATURE
    status = bad_label(target, c, ignore_index)
    if status:
        return status
    labelled = 0
    for i in range(target.size):
        labelled += target[i] != ignore_index

    # the hard mean is over labelled rows, the soft mean over all
    t = min(t, LARGEST_TEMPERATURE)
    inverse = inverse_temperature(t, temperature)
    hard = hard * row_scale(labelled, reduction) if labelled else 0.0
    soft = soft * row_scale(n, reduction)
    soft_loss, soft_factor = soft * (t * t if scale_t2 else 1.0), real(soft * (t if scale_t2 else inverse))
    peak, base = 1.0 - label_smoothing, label_smoothing / c
    doublings = 0 if t == 1 else 1 if t == 2 else 2 if t == 4 else 3 if t == 8 else -1
    rate_s, rate = softening(t, student_logits), softening(1.0, student_logits)
    rate_t, inverse_t = (rate, 1.0) if log_target else (rate_s, inverse)
    plan = soft != 0, hard != 0, doublings, rate_s, rate_t, rate, inverse, inverse_t

    narrow = c <= NARROW
    lanes, wide, tall = (LANES, 0, c) if narrow else (1, c, 0)
    rows = np.zeros(wide, dtype), np.zeros(wide, dtype), np.zeros(wide, dtype)
    s, q = np.zeros((tall, LANES), dtype), np.zeros((tall, LANES), dtype)
    tiles = s, np.zeros((tall, LANES), dtype), np.zeros((tall, LANES), dtype), q, np.zeros((tall, LANES), dtype)
    tops, lane = (np.zeros(LANES, dtype), np.zeros(LANES, dtype)), np.empty((3, LANES), dtype)
    sums = np.ones(LANES), np.ones(LANES), np.ones(LANES), np.zeros(LANES)
    factor, log_e, no_weight = np.zeros(LANES, dtype), np.zeros(LANES), np.empty(0, dtype)
    total_loss = 0.0
    for first in range(0, n, lanes):
        if narrow:
            distill_tile(student_logits, teacher_logits, first, tiles, tops, sums, lane, plan)
        else:
            distill_row(student_logits, teacher_logits, first, rows, tops, sums, plan)
        _, _, total_e, kl = sums
        for r in range(lanes):
            log_e[r] = log64(total_e[r])
        for r in range(min(lanes, n - first)):
            row = soft_loss * (0.0 if kl[r] < 0 else kl[r]) if soft != 0 else 0.0
            factor[r] = 0
            if hard != 0 and target[first + r] != ignore_index:
                y = target[first + r]
                row += hard * hard_loss(student_logits, first + r, y, tops[0][r], log_e[r], no_weight, peak, base)
                factor[r] = hard / total_e[r]
            if reduction == NONE:
                loss[first + r] = row
            total_loss += row
        if gradient.size:
            if narrow:
                _, _, difference, _, e = tiles
                tile_scaled(e, factor)
                for j in range(c):
                    for r in range(LANES):
                        e[j, r] += difference[j, r] * soft_factor
                store(gradient, first, e)
            else:
                difference, _, e = rows
                scale_row(gradient, first, e, factor[0])
                for j in range(c):
                    gradient[first, j] += difference[j] * soft_factor
            for r in range(min(lanes, n - first)):
                if factor[r] != 0:
                    subtract_target(gradient, first + r, target[first + r], no_weight, peak * hard, base * hard)
    if reduction != NONE:
        loss[0] = total_loss
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


@kernel
def distillation_loss_vjp(
    dstudent_logits: Any, dloss: Any, loss: Any, gradient: Any,
    student_logits: Any, teacher_logits: Any, target: Any, temperature: Any, hard_weight: Any, soft_weight: Any,
    reduction: int, scale_t2: bool, log_target: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """dz_s = gradient·dloss"""
    scale_rows(dstudent_logits, dloss, gradient, reduction)
    return DONE
