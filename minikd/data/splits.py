"""Splits that never leak: stratified by class, fixed by a seed, identical rows always on one side."""

from __future__ import annotations

import hashlib

import numpy as np

from minikd.data.batches import SPLIT, shuffled
from minikd.errors import DataError

_BLOCK = 1024  # rows that are copied at a time


def running(classes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each item, the sum of the weights of the items of its class that stand before it; int64, shape (n,).

    With weights of 1 it is the item's rank within its class. Sorting by rank takes the classes in turn, and sorting
    by rank over class size takes them in proportion: so every prefix of such an order is balanced, or stratified.
    """
    order = np.argsort(classes, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
    result = np.empty(len(classes), np.int64)
    result[order] = before - np.repeat(before[starts], counts)
    return result


def identical_rows(x: np.ndarray) -> np.ndarray:
    """The group of each row of `x` float32 (n, m): identical rows share one, numbered from 0 as they appear.

    Rows are told apart by a 128-bit digest, which is faster than sorting them. Adding 0 makes -0.0 and 0.0 one value.
    """
    seen: dict[bytes, int] = {}
    digests = (
        hashlib.blake2b(row, digest_size=16).digest()
        for start in range(0, len(x), _BLOCK)
        for row in x[start : start + _BLOCK] + np.float32(0)
    )
    return np.fromiter((seen.setdefault(digest, len(seen)) for digest in digests), np.int64, len(x))


def _fill(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Which items, bool of shape (n,), to take so that their sizes add up to `wanted`, or as near as whole items can.

    First those that fit, in their order; then the smallest that overshoots, if that is nearer than stopping short.
    """
    taken = np.zeros(len(sizes), bool)
    for item, size in enumerate(sizes.tolist()):
        if size <= wanted:
            taken[item] = True
            wanted -= size
    rest = np.flatnonzero(~taken)
    if wanted and rest.size:
        smallest = rest[np.argmin(sizes[rest])]
        taken[smallest] = sizes[smallest] < 2 * wanted
    return taken


def _too_few(part: str, wanted: int, left: int, classes: int) -> DataError:
    return DataError(
        "data.load",
        f"rows for the {part} part",
        expected=f"{wanted} or near it",
        got=f"{left}, in groups of identical rows, after unlabelled rows and one of each of {classes} classes went to "
        "the training part and others to the parts before",
        fix="Add rows, or from Python ask for smaller parts (validation=…, test=…)."
        + (" So many classes look like numbers to predict, not classes." if classes > 100 else ""),
    )


def split(x: np.ndarray, y: np.ndarray, wanted: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Row numbers (int64, ascending) of "train" and of each part in `wanted`, whose sizes are in rows.

    x : float32 (n, m).   y : int64 (n,), -1 for unlabelled rows.
    Every row is in exactly one part. Rows with identical features stay together, whatever their labels. Unlabelled
    rows, and rows identical to one, are in "train"; so is at least one row of every class. What remains is ordered
    so that each prefix is stratified, and the parts are taken from the front. Sizes are exact where no row occurs
    twice, and else as near as whole groups allow.
    Errors: DataError if the rows do not suffice.
    """
    rows = shuffled(len(y), seed, SPLIT)
    group = identical_rows(x)
    firsts_of_classes = rows[np.unique(y[rows], return_index=True)[1]]
    kept = np.zeros(group.max() + 1, bool)
    kept[group[firsts_of_classes]] = True
    kept[group[y < 0]] = True

    firsts_of_groups = rows[np.sort(np.unique(group[rows], return_index=True)[1])]
    free = firsts_of_groups[~kept[group[firsts_of_groups]]]
    sizes, classes = np.bincount(group)[group[free]], y[free]
    place = (running(classes, sizes) + sizes / 2) / np.bincount(y[y >= 0])[classes]
    order = np.argsort(place, kind="stable")
    part = np.zeros(len(kept), np.int64)
    for number, (name, count) in enumerate(wanted.items(), start=1):
        taken = _fill(sizes[order], count)
        if not taken.any() or (taken.all() and sizes[order].sum() < count):
            raise _too_few(name, count, int(sizes[order].sum()), np.unique(y[y >= 0]).size)
        part[group[free[order[taken]]]] = number
        order = order[~taken]
    return {name: np.flatnonzero(part[group] == number) for number, name in enumerate(("train", *wanted))}
