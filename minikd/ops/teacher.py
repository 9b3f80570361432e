"""What a teacher's scores are worth: how sure it is of a row, and its scores with its mistakes put right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minikd.ops.losses import known, labelled_rows, outside
from minikd.ops.op import Example, Op, register
from minikd.ops.refusals import spoil
from minikd.ops.rows import inverse_temperature, row_shapes, softened


def _teacher_confidence(
    xp: Any, weight: Any, teacher_logits: Any, target: Any, temperature: Any, ignore_index: int
) -> None:
    where, (n, c) = "teacher_confidence", teacher_logits.shape
    q, log_q = softened(xp, teacher_logits, inverse_temperature(where, temperature, teacher_logits.dtype))
    if target is None:
        entropy = -xp.sum(xp.where(q == 0, 0.0, q * log_q), axis=1)
        weight[...] = xp.maximum(1.0 - entropy / (math.log(c) or 1.0), 0.0)
    else:
        labelled = labelled_rows(xp, where, target, c, ignore_index)
        of_target = q[xp.arange(n), xp.clip(target, 0, c - 1)] * known(xp, target, c, 1.0)
        weight[...] = xp.where(labelled, of_target, q.max(axis=1))


def _labels(rng: np.random.Generator, n: int, c: int) -> Any:
    target = rng.integers(0, c, n)
    target[n // 2 : n // 2 + (n > 2)] = -100
    return target


def _confidence_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for (n, c), t in zip(row_shapes(), (1.0, 0.5, 4.0, 1.0, 20.0, 2.0, 3.0), strict=True):
        z = 3 * rng.normal(size=(n, c)).astype(dtype)
        cases += [([z, None, np.float64(t)], {}), ([z, _labels(rng, n, c), np.float64(t)], {})]
    inf, nan = np.inf, np.nan
    awkward = np.array([[0, -inf, 1], [2, 2, 2], [-inf, -inf, -inf], [0, nan, 1], [inf, 0, 1], [0, -40, -90]], dtype)
    wide = np.repeat(awkward, 40, axis=1)
    labels = np.array([1, 2, 0, 1, -100, -100])
    for z in (awkward, wide, np.array([[1e30, -1e30, 0], [-1e30, -1e30, -1e30]], dtype)):
        cases += [([z, target, np.float64(2.0)], {}) for target in (None, labels[: len(z)])]
    return [*cases, ([awkward, np.array([0, 1, 2, 0, 1, 2]), np.float64(1.0)], {"ignore_index": 0})]


register(
    Op(
        name="teacher_confidence",
        formula=(
            "w = 1 - H(q) / log C, H(q) = -Σ q·log q, q = softmax(z/T);  "
            "with a target w = q_target, and max q where target = ignore_index"
        ),
        signature="teacher_logits(n, c), target?:index(n), temperature:scalar -> weight(n)",
        attrs={"ignore_index": -100},
        forward=_teacher_confidence,
        example=_confidence_example,
        source="Shannon 1948, sec. 6, for H and its share of the most that it can be",
    )
)


def _corrected_logits(xp: Any, y: Any, teacher_logits: Any, target: Any, ignore_index: int) -> None:
    n, c = teacher_logits.shape
    labelled = labelled_rows(xp, "corrected_logits", target, c, ignore_index)
    rows, top = xp.arange(n), teacher_logits.argmax(axis=1)
    label = xp.where(labelled, xp.clip(target, 0, c - 1), top)
    y[...] = teacher_logits
    y[rows, top] = teacher_logits[rows, label]
    y[rows, label] = teacher_logits[rows, top]
    spoil(xp, labelled & outside(target, c), y, xp.nan)


def _corrected_example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []
    for n, c in row_shapes():
        z = rng.normal(size=(n, c)).astype(dtype)
        cases += [([z, _labels(rng, n, c)], {}), ([z, z.argmax(axis=1)], {"ignore_index": 0})]
    inf, nan = np.inf, np.nan
    awkward = np.array([[1, 3, 3, 2], [-inf, -inf, -inf, -inf], [0, nan, inf, nan], [inf, 1, inf, 0]], dtype)
    return [*cases, ([awkward, np.array([2, 1, 0, 3])], {}), ([awkward, np.array([0, -100, 2, 2])], {})]


register(
    Op(
        name="corrected_logits",
        formula="y = z, with z_target and z_argmax exchanged; a row whose target is ignore_index stays as it is",
        signature="teacher_logits(n, c), target:index(n) -> y(n, c)",
        attrs={"ignore_index": -100},
        forward=_corrected_logits,
        example=_corrected_example,
        source='Wen, Lai and Qian 2021, "Preparing lessons", the probability shift',
    )
)
