"""A last layer and its loss in one operation, so that nobody has to hold the logits of all rows at once.

With many classes the logits, not the layers, fill the memory. The idea is that of the chunked losses of language
models: Hsu et al. 2024, "Liger Kernel: efficient Triton kernels for LLM training" (fused linear cross-entropy), and
Wijmans et al. 2024, "Cut your losses in large-vocabulary language models". The gradients are taken in the forward
traversal, while a chunk's logits are there, and only scaled by backward.

The reference computes the formula as it stands, logits and all; `minikd.kernels.composed` goes through the rows in
chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.ops.losses import DISTILLATION
from minikd.ops.op import Example, Op, register
from minikd.ops.rows import row_shapes, wide


def _logits(xp: Any, hidden: Any, weight: Any, bias: Any) -> Any:
    z = wide(hidden) @ wide(weight).T
    return z if bias is None else z + bias


def _linear_distillation_loss(
    xp: Any,
    loss: Any,
    hidden_gradient: Any,
    weight_gradient: Any,
    bias_gradient: Any,
    hidden: Any,
    weight: Any,
    bias: Any,
    teacher_logits: Any,
    teacher_hidden: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    target: Any,
    *scalars: Any,
    chunk_rows: int | None,
    **attrs: Any,
) -> None:
    student, teacher = _logits(xp, hidden, weight, bias), teacher_logits
    if teacher is None:
        teacher = _logits(xp, teacher_hidden, teacher_weight, teacher_bias)
    value, g = xp.empty((), np.float64), xp.empty_like(student)
    DISTILLATION.forward(xp, value, g, student, teacher, target, *scalars, **attrs)
    loss[...] = value
    if hidden_gradient is not None:
        hidden_gradient[...] = g @ weight
    if weight_gradient is not None:
        weight_gradient[...] = g.T @ hidden
    if bias_gradient is not None:
        bias_gradient[...] = g.sum(axis=0)


def _scale_gradients(
    xp: Any, dhidden: Any, dweight: Any, dbias: Any, dloss: Any, loss: Any, *saved_and_inputs: Any, **attrs: Any
) -> None:
    for din, gradient in zip((dhidden, dweight, dbias), saved_and_inputs, strict=False):
        if din is not None:
            xp.multiply(gradient, dloss, out=din)


def _example(rng: np.random.Generator, dtype: Any) -> list[Example]:
    cases: list[Example] = []

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype)

    def scalars(t: float, hard: float, soft: float) -> list[Any]:
        return [np.float64(t), np.float64(hard), np.float64(soft)]

    for (n, c), k, j, t in zip(
        row_shapes()[:6], (1, 3, 4, 8, 2, 5), (2, 1, 6, 3, 4, 5), (4, 1, 2, 8, 1, 20), strict=True
    ):
        last, logits = [normal(n, k), normal(c, k), normal(c)], [3 * normal(n, c), None, None, None]
        teacher = [None, normal(n, j), normal(c, j), normal(c)]
        labels = rng.integers(0, c, n)
        labels[n // 2 :: 3] = -100
        for rows in (None, 1, 2, 7):
            attrs = {"chunk_rows": rows, "reduction": "sum" if rows == 2 else "mean"}
            cases.append(([*last, *logits, labels, *scalars(t, 0.3, 0.7)], attrs))
        cases.append(([*last[:2], None, *teacher, labels, *scalars(t, 0.5, 0.5)], {"chunk_rows": 4}))
        cases.append(([*last, *teacher[:3], None, None, *scalars(t, 0.5, 1.5)], {"chunk_rows": 3, "scale_t2": False}))
        smooth = {"chunk_rows": 2, "label_smoothing": 0.1}
        cases.append(([*last, *logits, labels, *scalars(t, 1.0, 0.0)], smooth))
    masked = np.array([0, -np.inf, 1], dtype)
    rest = [normal(4, 2), normal(3, 2), masked, None, normal(4, 2), normal(3, 2), masked]
    cases.append(([*rest, np.array([0, 2, -100, 2]), *scalars(2, 0.5, 0.5)], {"chunk_rows": 3}))
    return [*cases, ([*rest, np.full(4, -100), *scalars(2, 0.5, 0.5)], {"chunk_rows": 1})]


register(
    Op(
        name="linear_distillation_loss",
        formula=(
            "z_s = hidden·weightᵀ + bias, z_t likewise if it is not given;  loss = distillation_loss(z_s, z_t);  "
            "dhidden = dz_s·weight;  dweight = dz_sᵀ·hidden;  dbias = Σ_rows dz_s"
        ),
        signature=(
            "hidden(n, k), weight(c, k), bias?(c), teacher_logits?(n, c), "
            "teacher_hidden?(n, j), teacher_weight?(c, j), teacher_bias?(c), target?:index(n), "
            "temperature:scalar, hard_weight:scalar, soft_weight:scalar "
            "-> loss(); hidden_gradient?(n, k), weight_gradient?(c, k), bias_gradient?(c)"
        ),
        attrs={**DISTILLATION.attrs, "chunk_rows": None},
        forward=_linear_distillation_loss,
        vjp=_scale_gradients,
        wrt=("hidden", "weight", "bias"),
        vjp_reads=("hidden_gradient", "weight_gradient", "bias_gradient"),
        flops=lambda n, k, c, *j: 2 * n * c * (3 * k + sum(j)),
        example=_example,
        source="distillation_loss; in chunks of rows as Hsu et al. 2024 and Wijmans et al. 2024",
    )
)
