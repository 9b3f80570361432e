"""The order in which rows are visited."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minikd.data.checks import whole_number

# One stream of random numbers per purpose, so that the same seed for two purposes gives unrelated orders.
BATCHES, SPLIT, FEW_LABELS, BALANCED = range(4)


def shuffled(n: int, seed: int, *stream: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 of shape (n,), that is a function of (n, seed, stream) alone.

    Rows are sorted by raw PCG64 words: NumPy keeps those the same in every version, which it does not promise of
    `Generator.permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def batches(n: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True) -> Iterator[np.ndarray]:
    """Row numbers of one epoch's batches: int64 arrays that together hold each of 0..n-1 once.

    Each has shape (batch_size,), the last may be shorter. The order is a function of (n, seed, epoch) alone, so that
    a run taken up again at any epoch goes on as if it had never stopped; without `shuffle` it is 0, 1, 2, ….
    Errors: ArgumentError, at the call, for a negative n, seed or epoch, or a batch_size below 1.
    """
    n, batch_size = whole_number("batches", "n", n), whole_number("batches", "batch_size", batch_size, 1)
    seed, epoch = whole_number("batches", "seed", seed), whole_number("batches", "epoch", epoch)
    order = shuffled(n, seed, BATCHES, epoch) if shuffle else np.arange(n, dtype=np.int64)
    return (order[start : start + batch_size] for start in range(0, n, batch_size))


def balanced_batches(classes: np.ndarray, batch_size: int, *, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless batches in which each class comes equally often: places 0..n-1 of `classes`, int64 of (batch_size,).

    classes : (n,) class ids; rows without a label count as one class more.
    Classes take turns, and the rows of a class are shuffled anew each time all of them have been there. A batch is a
    function of (classes, batch_size, seed, its number) alone; the first one has the number `start`.
    """
    kinds, kind_of = np.unique(classes, return_inverse=True)
    members = [np.flatnonzero(kind_of == k) for k in range(len(kinds))]
    orders: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int64)) for _ in members]
    number = start
    while True:
        turns, kind = np.divmod(np.arange(number * batch_size, (number + 1) * batch_size), len(kinds))
        batch = np.empty(batch_size, np.int64)
        for place, (k, turn) in enumerate(zip(kind.tolist(), turns.tolist(), strict=True)):
            cycle, within = divmod(turn, len(members[k]))
            if orders[k][0] != cycle:
                orders[k] = cycle, members[k][shuffled(len(members[k]), seed, BALANCED, k, cycle)]
            batch[place] = orders[k][1][within]
        yield batch
        number += 1
