"""The distillation loss: cross-entropy to the labels, and Kullback-Leibler divergence to the softened teacher.

All that is taken of a row is taken in two traversals: the weights with their sums, then the gradient. A third follows
where the soft labels nearly agree. Sums are added up in the dtype of the logits a block at a time, and the blocks in
float64. Narrow rows are tiles, as in `minikd.kernels.jit_rows`.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from minikd.kernels.jit_losses import BLOCK, NONE, hard_loss, row_scale, scale_rows, subtract_target
from minikd.kernels.jit_real import (
    BAD_TEMPERATURE,
    DONE,
    by_type,
    exact,
    fused,
    kernel,
    log64,
    part,
    quick_power_of_two,
    zero_of,
)
from minikd.kernels.jit_rows import (
    LANES,
    NARROW,
    bad_label,
    bounded_inverse,
    load,
    row_max,
    softening,
    store,
    tile_max,
)
from minikd.ops.losses import LARGEST_TEMPERATURE

SMALLEST_LOG = -745.13  # e to this is the smallest float64 above 0
FAR_APART = 0.2  # from here on cancellation costs KL(q ‖ p) as a difference of sums less than a millionth
FAR_SHIFT = 1e6  # beyond this, what is left of log p - log q after the shift is no longer known to nine digits
TOGETHER = 8  # classes of a tile that are added up in the dtype of the logits

# --- e^δ - 1 - δ ---

# (e^δ - 1 - δ) / δ² for |δ| < NEAR, highest power first: Chebyshev interpolations, of a relative error below 2e-7 in
# float32 and 4e-18 in float64.
NEAR_SINGLE, NEAR_DOUBLE = np.float32(1), 0.5
HALF_SINGLE = np.float32(0.5)
SERIES_SINGLE = tuple(
    np.float32(float.fromhex(c))
    for c in (
        "0x1.a845p-16", "0x1.aa54b6p-13", "0x1.6c066p-10", "0x1.10fc8ap-7", "0x1.555566p-5", "0x1.55557ep-3", "0x1p-1",
    )
)  # fmt: skip
SERIES_HIGH = tuple(
    float.fromhex(c)
    for c in (
        "0x1.6267cf434f12cp-33", "0x1.201cd8001288bp-29", "0x1.ae63a07779c78p-26", "0x1.27e450c2e35f7p-22",
        "0x1.71de3a84a10c3p-19", "0x1.a01a01f8a44eap-16",
    )
)  # fmt: skip
SERIES_LOW = tuple(
    float.fromhex(c)
    for c in (
        "0x1.a01a01a00ef0fp-13", "0x1.6c16c16c02003p-10", "0x1.1111111111120p-7", "0x1.555555555558ep-5",
        "0x1.5555555555555p-3", "0x1p-1",
    )
)  # fmt: skip


def near_of(x: Any) -> Any:
    """Up to where `second_order` is right."""
    raise TypeError("for compiled code only")


def _near_single(x: Any) -> Any:
    return NEAR_SINGLE


def _near_double(x: Any) -> Any:
    return NEAR_DOUBLE


def second_order(x: Any) -> Any:
    """(e^x - 1 - x) / x² for |x| < near."""
    raise TypeError("for compiled code only")


def _second_order_single(x: Any) -> Any:
    s = SERIES_SINGLE[0]
    for c in SERIES_SINGLE[1:]:
        s = s * x + c
    return s


def _second_order_double(x: Any) -> Any:
    s = SERIES_HIGH[0]
    for c in SERIES_HIGH[1:]:
        s = s * x + c
    for c in SERIES_LOW:
        s = s * x + c
    return s


by_type(near_of, _near_single, _near_double)
by_type(second_order, _second_order_single, _second_order_double)

# Blocks of a row are (first, count). Their classes are counted from 0 and have no sign: else Numba would ask of each
# whether it is below 0, and gather.

# --- weights: p = e^((z_s - max z_s)/T), q the same of the teacher, and e = p^T ---


@exact
def apart(q: Any, below_s: Any, below_t: Any, ratio: Any, tiny: Any, least: Any) -> Any:
    """q·(log q - log p)·T of weights; 0 where q is 0 even in float64, else infinite where p is 0."""
    gap = below_t - ratio * below_s
    return zero_of(q) if below_t < least else (tiny if q < tiny else q) * gap


@exact
def squared(x: Any, times: int) -> Any:
    """x^(2^times) for up to three times; without a branch."""
    x = x * x if times > 0 else x
    x = x * x if times > 1 else x
    return x * x if times > 2 else x


@part
def block_weights(
    p: Any, q: Any, e: Any, z_s: Any, z_t: Any, i: int, here: Any, tops: Any, plan: Any
) -> tuple[float, float, float, float]:
    """The weights of the classes `here` of row i; returns Σ p, Σ q, Σ q·(log q - log p)·T and Σ e."""
    _, hard, doublings, (rate_s, _, reach_s), (rate_t, _, reach_t), (rate, _, reach), ratio, tiny, least = plan
    top_s, top_t = tops
    zero = zero_of(top_s)
    sum_p, sum_q, sum_apart, sum_e = zero, zero, zero, zero
    for k in range(here[1]):
        j = np.uint64(here[0] + k)
        below_s, below_t = z_s[i, j] - top_s, z_t[i, j] - top_t
        pj, qj = quick_power_of_two(below_s, rate_s, reach_s), quick_power_of_two(below_t, rate_t, reach_t)
        p[j], q[j] = pj, qj
        sum_p += pj
        sum_q += qj
        sum_apart += apart(qj, below_s, below_t, ratio, tiny, least)
        sum_e += squared(pj, doublings)
    if hard and doublings < 0:
        sum_e = block_hard_weights(e, z_s, i, here, top_s, rate, reach)
    return sum_p, sum_q, sum_apart, sum_e


@part
def block_hard_weights(e: Any, z: Any, i: int, here: Any, top: Any, rate: Any, reach: Any) -> Any:
    """e = e^(z - max z) of the classes `here` of row i; returns Σ e."""
    total = zero_of(top)
    for k in range(here[1]):
        j = np.uint64(here[0] + k)
        e[j] = quick_power_of_two(z[i, j] - top, rate, reach)
        total += e[j]
    return total


@part
def tile_quick_weights(e: Any, z: Any, top: Any, soft: Any) -> None:
    """e = exp((z - max z)/T) of a tile z"""
    rate, _, reach = soft
    for j in range(z.shape[0]):
        for r in range(LANES):
            e[j, r] = quick_power_of_two(z[j, r] - top[r], rate, reach)


@part
def tile_sum(total: Any, x: Any, lane: Any) -> None:
    """total = Σ x of each row of a tile; `lane` is scratch memory."""
    for r in range(LANES):
        total[r] = 0.0
    for first in range(0, x.shape[0], TOGETHER):
        for r in range(LANES):
            lane[r] = x[first, r]
        for j in range(first + 1, min(first + TOGETHER, x.shape[0])):
            for r in range(LANES):
                lane[r] += x[j, r]
        for r in range(LANES):
            total[r] += lane[r]


# --- KL(q ‖ p) of each row ---


@exact
def log_ratio(sum_q: float, sum_p: float) -> float:
    """log(Σ q / Σ p), exactly 0 if both are the same"""
    return log64(1.0 + (sum_q - sum_p) / sum_p)


@exact
def shift_of(top_s: Any, top_t: Any, log_of_sums: float, inverse: float, same: bool) -> tuple[float, float]:
    """What δ = log p - log q is above (z_s - z_t)/T if both have the same T, and what was rounded away of that."""
    s, t = np.float64(top_s), np.float64(top_t)
    gap = s - t if same else 0.0
    lost = (s - (gap - (gap - s))) - (t + (gap - s)) if same else 0.0
    return log_of_sums - gap * inverse, -lost * inverse


@exact
def delta_of(z_s: Any, z_t: Any, tops: Any, inverse: Any, inverse_rest: Any, shift: Any, rest: Any, same: bool) -> Any:
    """log p - log q, which is a small difference of large numbers where the soft labels agree: so the gap between the
    logits is taken without rounding (Knuth's two-sum), and the rest of each part is carried along.
    """
    top_s, top_t = tops
    gap = z_s - z_t
    back = gap - z_s
    lost = (z_s - (gap - back)) - (z_t + back)
    more = fused(gap, inverse_rest, fused(lost, inverse, rest))
    delta = fused(gap, inverse, shift) + (more if gap - gap == 0 else zero_of(gap))  # an infinite gap has no rest
    return delta if same else fused(z_s - top_s, inverse, shift) - (z_t - top_t)


@exact
def near_term(p: Any, q: Any, delta: Any) -> Any:
    """q·(e^δ - 1 - δ): what a class adds to KL(q ‖ p), since Σp = Σq. No term is negative and nothing cancels."""
    small, large = q * (delta * delta * second_order(delta)), (p - q) - q * delta
    term = small if abs(delta) < near_of(delta) else large
    return p if q == 0 else term


@part
def near_block(p: Any, q: Any, z_s: Any, z_t: Any, i: int, here: Any, tops: Any, near: Any) -> Any:
    """Σ q·(e^δ - 1 - δ) of the classes `here` of row i"""
    per_p, per_q, inverse, inverse_rest, shift, rest, same = near
    total = zero_of(per_p)
    for k in range(here[1]):
        j = np.uint64(here[0] + k)
        delta = delta_of(z_s[i, j], z_t[i, j], tops, inverse, inverse_rest, shift, rest, same)
        total += near_term(p[j] * per_p, q[j] * per_q, delta)
    return total


@part
def nearer(difference: float, terms: float, shift: float) -> float:
    """KL(q ‖ p), given as a difference of sums and as a sum of terms that do not cancel.

    The terms are better where KL is small, unless the logits are so large, or one side's are so far from the other's
    (`shift`), that log p - log q is lost in them.
    """
    if not difference < FAR_APART:
        return difference
    terms = max(terms, 0.0) if terms == terms else inf
    return terms if abs(shift) < FAR_SHIFT and terms < 2 * FAR_APART else max(difference, 0.0)


@part
def near_tile(
    kl: Any, p: Any, q: Any, z_s: Any, z_t: Any, tops: Any, sums: Any, logs: Any, lane: Any, plan: Any
) -> None:
    """The same of each row of a tile, where `kl` is too small for a difference of sums. z_s is used up."""
    total_p, total_q, near_kl, _ = sums
    inverse_s, same, real = plan[2], plan[3], p.dtype.type
    inverse = real(inverse_s)
    inverse_rest = real(inverse_s - inverse)
    for r in range(LANES):
        shift, rest = shift_of(tops[0][r], tops[1][r], logs[r], inverse_s, same)
        lane[0, r], lane[1, r], lane[2, r] = 1 / total_p[r], 1 / total_q[r], shift
        lane[3, r] = (shift - lane[2, r]) + rest
    for j in range(p.shape[0]):
        for r in range(LANES):
            top = tops[0][r], tops[1][r]
            delta = delta_of(z_s[j, r], z_t[j, r], top, inverse, inverse_rest, lane[2, r], lane[3, r], same)
            z_s[j, r] = near_term(p[j, r] * lane[0, r], q[j, r] * lane[1, r], delta)
    tile_sum(near_kl, z_s, lane[0])
    for r in range(LANES):
        kl[r] = nearer(kl[r], near_kl[r], shift_of(tops[0][r], tops[1][r], logs[r], inverse_s, same)[0])


# --- rows ---


@part
def distill_tile(
    student: Any, teacher: Any, i: int, tiles: Any, tops: Any, sums: Any, logs: Any, kl: Any, lane: Any, plan: Any
) -> None:
    """For the narrow rows from i on: the weights p, q and e, their maxima and sums, and KL(q ‖ p)."""
    z_s, z_t, p, q, e = tiles
    top_s, top_t = tops
    total_p, total_q, total_apart, total_e = sums
    (soft, hard, doublings, rate_s, rate_t, rate, ratio, tiny, least), inverse_t, _, _ = plan
    load(z_s, student, i)
    tile_max(top_s, z_s)
    if soft:
        load(z_t, teacher, i)
        tile_max(top_t, z_t)
        tile_quick_weights(p, z_s, top_s, rate_s)
        tile_quick_weights(q, z_t, top_t, rate_t)
        tile_sum(total_p, p, lane[0])
        tile_sum(total_q, q, lane[0])
    if hard and soft and doublings >= 0:
        for j in range(p.shape[0]):
            for r in range(LANES):
                e[j, r] = squared(p[j, r], doublings)
    elif hard:
        tile_quick_weights(e, z_s, top_s, rate)
    if hard:
        tile_sum(total_e, e, lane[0])
    if soft:
        near = 0
        for j in range(p.shape[0]):
            for r in range(LANES):
                z_t[j, r] = apart(q[j, r], z_s[j, r] - top_s[r], z_t[j, r] - top_t[r], ratio, tiny, least)
        tile_sum(total_apart, z_t, lane[0])
        for r in range(LANES):
            logs[r] = log_ratio(total_q[r], total_p[r])
            kl[r] = total_apart[r] / total_q[r] * inverse_t - logs[r]
            near |= kl[r] < FAR_APART
        if near:
            load(z_t, teacher, i)
            near_tile(kl, p, q, z_s, z_t, tops, sums, logs, lane, plan)


@part
def distill_row(student: Any, teacher: Any, i: int, rows: Any, tops: Any, sums: Any, kl: Any, plan: Any) -> None:
    """The same for row i."""
    p, q, e = rows
    total_p, total_q, total_apart, total_e = sums
    steps, inverse_t, inverse_s, same = plan
    soft, hard, _, _, _, (rate, _, reach), _, _, _ = steps
    top_s, top_t = row_max(student, i), row_max(teacher, i)
    top = top_s, top_t
    tops[0][0] = top_s
    if soft:
        total_p[0], total_q[0], total_apart[0], total_e[0] = 0.0, 0.0, 0.0, 0.0
        for first in range(0, p.size, BLOCK):
            here = first, min(BLOCK, p.size - first)
            found = block_weights(p, q, e, student, teacher, i, here, top, steps)
            total_p[0] += found[0]
            total_q[0] += found[1]
            total_apart[0] += found[2]
            total_e[0] += found[3]
        logs = log_ratio(total_q[0], total_p[0])
        kl[0] = total_apart[0] / total_q[0] * inverse_t - logs
        if kl[0] < FAR_APART:
            real = p.dtype.type
            inverse = real(inverse_s)
            shift, rest = shift_of(top_s, top_t, logs, inverse_s, same)
            per_p, per_q, high = real(1 / total_p[0]), real(1 / total_q[0]), real(shift)
            near = per_p, per_q, inverse, real(inverse_s - inverse), high, real((shift - high) + rest), same
            terms = 0.0
            for first in range(0, p.size, BLOCK):
                here = first, min(BLOCK, p.size - first)
                terms += near_block(p, q, student, teacher, i, here, top, near)
            kl[0] = nearer(kl[0], terms, shift)
    elif hard:
        total_e[0] = 0.0
        for first in range(0, p.size, BLOCK):
            here = first, min(BLOCK, p.size - first)
            total_e[0] += block_hard_weights(e, student, i, here, top_s, rate, reach)


@exact
def difference(p: Any, per_p: Any, q: Any, per_q: Any) -> Any:
    """p·per_p - q·per_q in a form that is exactly 0 where both are the same, fused or not"""
    return (p - q) * per_p + q * (per_p - per_q)


@part
def combine(dz: Any, i: int, p: Any, q: Any, e: Any, per_p: Any, per_q: Any, per_e: Any, doublings: int) -> None:
    """dz = p·per_p - q·per_q + e·per_e of row i, where e may be a power of p"""
    if per_e == 0:
        for j in range(p.size):
            dz[i, j] = difference(p[j], per_p, q[j], per_q)
    elif doublings >= 0:
        for j in range(p.size):
            dz[i, j] = difference(p[j], per_p, q[j], per_q) + squared(p[j], doublings) * per_e
    else:
        for j in range(p.size):
            dz[i, j] = difference(p[j], per_p, q[j], per_q) + e[j] * per_e


@part
def tile_combine(p: Any, q: Any, e: Any, per_p: Any, per_q: Any, per_e: Any) -> None:
    """p = p·per_p - q·per_q + e·per_e of each row of a tile"""
    zero = p.dtype.type(0)
    for j in range(p.shape[0]):
        for r in range(LANES):
            hard = zero if per_e[r] == 0 else e[j, r] * per_e[r]
            p[j, r] = difference(p[j, r], per_p[r], q[j, r], per_q[r]) + hard


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
    inverse = bounded_inverse(t, student_logits)
    hard = hard * row_scale(labelled, reduction) if labelled else 0.0
    soft = soft * row_scale(n, reduction)
    soft_loss, soft_factor = soft * (t * t if scale_t2 else 1.0), soft * (t if scale_t2 else inverse)
    peak, base = 1.0 - label_smoothing, label_smoothing / c
    doublings = -1 if soft == 0 else 0 if t == 1 else 1 if t == 2 else 2 if t == 4 else 3 if t == 8 else -1
    limits = np.finfo(dtype)
    inverse_t = 1.0 if log_target else inverse
    least = real(max(SMALLEST_LOG / inverse_t, -float(limits.max)))
    rate, hard_rate = softening(t, student_logits), softening(1.0, student_logits)
    steps = (
        soft != 0,
        hard != 0,
        doublings,
        rate,
        hard_rate if log_target else rate,
        hard_rate,
        real(inverse / inverse_t),
        limits.tiny,
        least,
    )
    plan = steps, inverse_t, inverse, inverse == inverse_t

    narrow = c <= NARROW
    lanes, wide, tall = (LANES, 0, c) if narrow else (1, c, 0)
    rows = np.zeros(wide, dtype), np.zeros(wide, dtype), np.zeros(wide, dtype)
    s, q = np.zeros((tall, LANES), dtype), np.zeros((tall, LANES), dtype)
    tiles = s, np.zeros((tall, LANES), dtype), np.zeros((tall, LANES), dtype), q, np.zeros((tall, LANES), dtype)
    tops, lane = (np.zeros(LANES, dtype), np.zeros(LANES, dtype)), np.empty((4, LANES), dtype)
    sums = np.ones(LANES), np.ones(LANES), np.ones(LANES), np.ones(LANES)
    per_p, per_q, per_e = np.zeros(LANES, dtype), np.zeros(LANES, dtype), np.zeros(LANES, dtype)
    logs, log_e, kl, no_weight = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES), np.empty(0, dtype)
    total_p, total_q, _, total_e = sums
    total_loss = 0.0
    for first in range(0, n, lanes):
        if narrow:
            distill_tile(student_logits, teacher_logits, first, tiles, tops, sums, logs, kl, lane, plan)
        else:
            distill_row(student_logits, teacher_logits, first, rows, tops, sums, kl, plan)
        for r in range(lanes):
            log_e[r] = log64(total_e[r])
            per_p[r], per_q[r] = soft_factor / total_p[r], soft_factor / total_q[r]
        for r in range(min(lanes, n - first)):
            row = soft_loss * (0.0 if kl[r] < 0 else kl[r]) if soft != 0 else 0.0
            per_e[r] = 0
            if hard != 0 and target[first + r] != ignore_index:
                y = target[first + r]
                row += hard * hard_loss(student_logits, first + r, y, tops[0][r], log_e[r], no_weight, peak, base)
                per_e[r] = hard / total_e[r]
            if reduction == NONE:
                loss[first + r] = row
            total_loss += row
        if gradient.size:
            if narrow:
                _, _, p, q, e = tiles
                tile_combine(p, q, e, per_p, per_q, per_e)
                store(gradient, first, p)
            else:
                p, q, e = rows
                combine(gradient, first, p, q, e, per_p[0], per_q[0], per_e[0], doublings)
            for r in range(min(lanes, n - first)):
                if per_e[r] != 0:
                    subtract_target(gradient, first + r, target[first + r], no_weight, peak * hard, base * hard)
    if reduction != NONE:
        loss[0] = total_loss
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
