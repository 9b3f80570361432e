"""Kernels that take elements one by one: a bias and an activation, optimizer steps, dropout, rows gathered by number.

Buffers come in the order of the operation's signature, attributes after them. A buffer that nobody needs is an empty
array. A kernel returns 0, or a status that says which value it refuses; then it has written nothing.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from minikd.kernels.jit_normal import gelu, gelu_slope
from minikd.kernels.jit_real import DONE, exp, expm1, kernel, part
from minikd.ops.random import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL

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


@kernel
def bias_gelu(y: Any, x: Any, b: Any) -> int:
    """u = x + b;  y = u·Φ(u)"""
    u = np.empty(b.size, x.dtype)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            y[i, j] = gelu(u[j])
    return DONE


@kernel
def bias_gelu_vjp(dx: Any, db: Any, dy: Any, y: Any, x: Any, b: Any) -> int:
    """dx = dy·(Φ(u) + u·φ(u));  db = Σ_rows dx"""
    u, du = np.empty(b.size, x.dtype), np.empty(b.size, x.dtype)
    start(db)
    for i in range(x.shape[0]):
        add_bias(u, x, i, b)
        for j in range(u.size):
            du[j] = dy[i, j] * gelu_slope(u[j])
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
def philox(pairs: Any, first: int, count: int, key: Any, stream: Any, step: Any) -> None:
    """Four random words for each of `count` counters from `first` on, as `minikd.ops.random.philox` draws them.

    Two words stand in each of `pairs`, the earlier one in the low half. On the way b and d hold anything in their high
    halves: a product takes the low ones, so that it is one instruction, and the halves are cut off once at the end.
    """
    for k in range(count):
        block = np.uint64(first + k)
        a, b, c, d = block & LOW, block >> HALF_WORD, step & LOW, stream & LOW
        k0, k1 = key & LOW, key >> HALF_WORD
        for _ in range(PHILOX_ROUNDS):
            one, two = (a & LOW) * MULTIPLIERS[0], (c & LOW) * MULTIPLIERS[1]
            a, c = (two >> HALF_WORD) ^ b ^ k0, (one >> HALF_WORD) ^ d ^ k1
            b, d = two, one
            k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
        pairs[2 * k] = (a & LOW) | (b << HALF_WORD)
        pairs[2 * k + 1] = (c & LOW) | (d << HALF_WORD)


@kernel
def dropout(y: Any, mask: Any, x: Any, step: Any, p: float, seed: int, stream: int) -> int:
    """y = x·m,  m = [r ≥ p·2³²] / (1 - p),  r = philox(seed, stream, step, index)"""
    threshold = np.uint64(np.rint(p * 4294967296.0))
    zero = x.dtype.type(0)
    scale = zero if threshold > LOW else x.dtype.type(1.0 / (1.0 - p))  # 0: every element is dropped
    least = np.uint32(threshold & LOW)
    pairs = np.empty(2 * BLOCKS, np.uint64)
    words, kept = pairs.view(np.uint32), np.empty(4 * BLOCKS, x.dtype)
    for first in range(0, x.size, words.size):
        count = min(words.size, x.size - first)
        philox(pairs, first // 4, (count + 3) // 4, np.uint64(seed), np.uint64(stream), np.uint64(step[()]))
        # From 0 up: of first + k Numba would ask whether it is below 0, and gather element by element.
        y_here, mask_here, x_here = y[first:], mask[first:], x[first:]
        for k in range(count):
            kept[k] = scale if words[k] >= least else zero
        for k in range(count):
            mask_here[k] = kept[k]
        for k in range(count):
            y_here[k] = x_here[k] * kept[k]
    return DONE


@kernel
def dropout_vjp(dx: Any, dy: Any, y: Any, mask: Any, x: Any, step: Any, p: float, seed: int, stream: int) -> int:
    """dx = dy·m"""
    for k in range(dx.size):
        dx[k] = dy[k] * mask[k]
    return DONE


# --- rows gathered by number, and gradients added up ---


@kernel
def add_into(y: Any, x: Any) -> int:
    """y += x"""
    for k in range(y.size):
        y[k] += x[k]
    return DONE


@part
def wrong_row(rows: Any, n: int) -> int:
    """1 + the first place whose row number is not one of 0 … n - 1; 0 if there is none."""
    for k in range(rows.size):
        if not 0 <= rows[k] < n:
            return k + 1
    return DONE


@kernel
def take(y: Any, x: Any, rows: Any) -> int:
    """y[k] = x[rows[k]]"""
    status = wrong_row(rows, x.shape[0])
    if status:
        return status
    for k in range(rows.size):
        row = rows[k]
        for j in range(y.shape[1]):
            y[k, j] = x[row, j]
    return DONE


@kernel
def take_vjp(dx: Any, dy: Any, y: Any, x: Any, rows: Any) -> int:
    """dx[r] = Σ_{k: rows[k] = r} dy[k]"""
    if not dx.size:
        return DONE
    status = wrong_row(rows, dx.shape[0])
    if status:
        return status
    for i in range(dx.shape[0]):
        for j in range(dx.shape[1]):
            dx[i, j] = 0
    for k in range(rows.size):
        row = rows[k]
        for j in range(dx.shape[1]):
            dx[row, j] += dy[k, j]
    return DONE


@kernel
def take_scaled(y: Any, x: Any, rows: Any, scale: Any, shift: Any) -> int:
    """y[k] = scale·x[rows[k]] + shift"""
    real = y.dtype.type
    status = wrong_row(rows, x.shape[0])
    if status:
        return status
    for k in range(rows.size):
        row = rows[k]
        for j in range(y.shape[1]):
            y[k, j] = real(x[row, j]) * scale[j] + shift[j]
    return DONE
