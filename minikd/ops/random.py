"""Random masks that are a function of where they stand, so that every backend draws the same ones.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
Its counter is (index // 4, index // 4 / 2³², step, stream), its key the seed; element `index` takes word index % 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.ops.op import Example, Op, register

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(xp: Any, counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> list[Any]:
    """Four 32-bit words (held in uint64 arrays) for each counter of four 32-bit words, numbers or such arrays."""
    a, b, c, d = (xp.uint64(word) if isinstance(word, int) else word for word in counter)
    k0, k1 = key
    low, half = xp.uint64(_LOW), xp.uint64(32)
    for _ in range(PHILOX_ROUNDS):
        first, second = a * xp.uint64(PHILOX_MULTIPLIERS[0]), c * xp.uint64(PHILOX_MULTIPLIERS[1])
        a, c = (second >> half) ^ b ^ xp.uint64(k0), (first >> half) ^ d ^ xp.uint64(k1)
        b, d = second & low, first & low
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _LOW, (k1 + PHILOX_WEYL[1]) & _LOW
    return [a, b, c, d]


def random_words(xp: Any, size: int, seed: int, stream: int, step: int) -> Any:
    """`size` random 32-bit words in a uint64 array, a function of seed, stream, step and position alone."""
    block = xp.arange((size + 3) // 4, dtype=xp.uint64)
    counter = (block & xp.uint64(_LOW), block >> xp.uint64(32), step & _LOW, stream & _LOW)
    words = philox(xp, counter, (seed & _LOW, (seed >> 32) & _LOW))
    return xp.stack(words, axis=1).reshape(-1)[:size]


def dropout_threshold(p: float) -> int:
    """An element is dropped when its random word is below this: p·2³², rounded."""
    return round(p * 2.0**32)


def _dropout(xp: Any, y: Any, mask: Any, x: Any, step: Any, p: float, seed: int, stream: int) -> None:
    words = random_words(xp, x.size, seed, stream, int(step)).reshape(x.shape)
    scale = x.dtype.type(1.0 / (1.0 - p))
    mask[...] = xp.where(words >= xp.uint64(dropout_threshold(p)), scale, x.dtype.type(0))
    xp.multiply(x, mask, out=y)


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    attrs = {"p": 0.4, "seed": 2**40 + 5, "stream": 3}
    shapes = [(3, 4), (67,), (1,), (0, 3)]
    cases: list[Example] = [([rng.normal(size=s).astype(dtype), np.asarray(9)], dict(attrs)) for s in shapes]
    return [*cases, ([np.ones(5, dtype), np.asarray(0)], {"p": 0.0, "seed": 0, "stream": 0})]


register(
    Op(
        name="dropout",
        formula="y = x·m,  m = [r ≥ p·2³²] / (1 - p),  r = philox(seed, stream, step, index);  dx = dy·m",
        signature="x(...), step:counter -> y(...); mask(...)",
        attrs={"p": 0.5, "seed": 0, "stream": 0},
        forward=_dropout,
        vjp=lambda xp, dx, dy, y, mask, x, step, p, seed, stream: xp.multiply(dy, mask, out=dx),
        wrt=("x",),
        vjp_reads=("mask",),
        may_alias=("x",),
        example=_example,
        source="Srivastava et al. 2014, scaled at training time",
    )
)
