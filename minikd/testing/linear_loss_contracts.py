"""What kernels of a last layer with its loss promise, and what goes wrong where the rows are taken in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.testing.contract import Attributes, Contract, Edge, Inputs, Mistake, expected
from minikd.testing.loss_contracts import distillation_scale
from minikd.testing.mistakes import Give, changed, exchanged_values, set_to
from minikd.testing.scores import BAD_TEMPERATURES, INF, NAN, divisors

KERNEL = "linear_distillation_loss"
TAKES = ("hidden", "weight", "bias", "teacher_logits", "target", "temperature", "hard_weight", "soft_weight")
GIVES = ("loss", "hidden_gradient", "weight_gradient", "bias_gradient")


def _labelled(target: Any) -> int:
    return 0 if target is None else int((np.asarray(target) != -100).sum())


# --- mistakes ---

CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 32, 64, 128)  # rows of a chunk, where the attributes do not say how many

Chunk = list[Any]  # its share in each of the results


def _cut(inputs: Inputs, attrs: Attributes, rows: int, own_means: bool) -> list[tuple[Chunk, int]]:
    """What each chunk of so many rows gives, and how many it has; a mean is over all rows, or over its own."""
    n, chunks = len(inputs["hidden"]), []
    per_soft, per_hard = (1.0, 1.0) if own_means else divisors(attrs, n, _labelled(inputs["target"]))
    weights = {"hard_weight": inputs["hard_weight"] / per_hard, "soft_weight": inputs["soft_weight"] / per_soft}
    known = dict(attrs) if own_means else {**attrs, "reduction": "sum"}
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        cut = {name: inputs[name][part] for name in ("hidden", "teacher_logits")}
        cut["target"] = None if inputs["target"] is None else inputs["target"][part]
        chunks.append((expected(KERNEL, {**inputs, **cut, **weights}, known), part.stop - start))
    return chunks


def _added_up(chunks: Sequence[Chunk], n: int) -> list[Any]:
    """The results of these chunks; the rows of others have a gradient of 0."""
    loss, hidden, weight, bias = zip(*chunks, strict=True)
    rows = np.concatenate(hidden)
    return [sum(loss), np.concatenate([rows, np.zeros((n - len(rows), rows.shape[1]))]), sum(weight), sum(bias)]


def _whole_chunks(chunks: list[tuple[Chunk, int]], rows: int, n: int) -> list[Any]:
    whole = [chunk for chunk, count in chunks if count == rows]
    return _added_up(whole or [[0.0 * x for x in chunks[0][0]]], n)


def _last_one_stays(chunks: list[tuple[Chunk, int]], rows: int, n: int) -> list[Any]:
    return [*_added_up([chunk for chunk, _ in chunks], n)[:2], *chunks[-1][0][2:]]


def _means_added_up(chunks: list[tuple[Chunk, int]], rows: int, n: int) -> list[Any]:
    return _added_up([chunk for chunk, _ in chunks], n)


def _mean_of_means(chunks: list[tuple[Chunk, int]], rows: int, n: int) -> list[Any]:
    return [x / len(chunks) for x in _means_added_up(chunks, rows, n)]


def _of_chunks(
    name: str, put_together: Callable[[list[tuple[Chunk, int]], int, int], list[Any]], own_means: bool = False
) -> tuple[Mistake, ...]:
    """A mistake with chunks, for each size that they may have."""

    def of(rows: int) -> Give:
        def give(inputs: Inputs, attrs: Attributes) -> Any:
            size = attrs.get("chunk_rows") or rows
            return put_together(_cut(inputs, attrs, size, own_means), size, len(inputs["hidden"]))

        return give

    return tuple(Mistake(name, of(rows)) for rows in CHUNKS)


def _without_bias(inputs: Inputs, attrs: Attributes) -> None:
    inputs["bias"] = None


MISTAKES = (
    *_of_chunks("the rows behind the last whole chunk are left out", _whole_chunks),
    *_of_chunks("each chunk overwrites the gradients of weight and bias, to which it should add", _last_one_stays),
    *_of_chunks("the means of the chunks are added up", _means_added_up, own_means=True),
    *_of_chunks("the mean of the chunks' means is taken, however many rows each has", _mean_of_means, own_means=True),
    Mistake("the factor T² is missing", changed(KERNEL, set_to(scale_t2=False))),
    Mistake("the temperature is not used", changed(KERNEL, set_to(temperature=1.0))),
    Mistake(
        "hard_weight and soft_weight are exchanged", changed(KERNEL, exchanged_values("hard_weight", "soft_weight"))
    ),
    Mistake("the bias is missing", changed(KERNEL, _without_bias)),
    Mistake("the sum over rows is not divided by their number", changed(KERNEL, set_to(reduction="sum"))),
)


# --- cases, and how large a rounding error may be ---


def _scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """Of the distillation loss, times the roundings of each logit; of a gradient the sum of what is added up."""
    hidden, weight, bias = (np.asarray(inputs[name], np.float64) for name in TAKES[:3])
    with np.errstate(all="ignore"):
        sizes = np.abs(hidden) @ np.abs(weight).T + np.abs(bias)
        student = np.asarray(hidden @ weight.T + bias)
    given = {**{name: inputs[name] for name in TAKES[3:]}, "student_logits": student}
    loss, gradient = distillation_scale(given, {k: v for k, v in attrs.items() if k != "chunk_rows"})
    largest = np.max(sizes, axis=1, where=np.isfinite(sizes), initial=0.0)[:, None]
    roundings = 1 + largest * max(1.0, 1 / float(inputs["temperature"]))
    gradient = np.nan_to_num(gradient * roundings)
    h, w = np.nan_to_num(np.abs(hidden)), np.nan_to_num(np.abs(weight))
    return [loss * roundings.max(), gradient @ w, gradient.T @ h, gradient.sum(axis=0)]


_HIDDEN = np.array([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75], [2.0, 1.0], [0.5, -2.0]])
_WEIGHT = np.array([[1.0, 0.5], [-0.75, 1.5], [0.25, -1.0]])
_BIAS = np.array([0.5, -0.25, 1.0])
_TEACHER = np.array([[3.0, 0.5, -0.5], [0.0, 3.0, 0.0], [1.0, -1.0, 2.0], [0.25, 0.5, -2.0], [2.0, 0.0, 1.5]])
_LABELS = np.array([0, 1, 2, 0, 2])
_RULED_OUT = np.array([0.5, -INF, 1.0])


def _edges() -> tuple[Edge, ...]:
    plain = dict(zip(TAKES, (_HIDDEN, _WEIGHT, _BIAS, _TEACHER, _LABELS, 2.0, 0.25, 0.75), strict=True))

    def case(name: str, **others: Any) -> Edge:
        return Edge(name, {**plain, **others})

    masked = np.where([False, True, False], -INF, _TEACHER)
    spoilt = _HIDDEN.copy()
    spoilt[1, 0] = NAN
    possible = np.array([0, 2, 2, 0, -100])
    return (
        case("five plain rows at T = 4", temperature=4.0),
        case("a single row", hidden=_HIDDEN[:1], teacher_logits=_TEACHER[:1], target=_LABELS[:1]),
        case(
            "a bias of -inf rules a class out, for the teacher too",
            bias=_RULED_OUT,
            teacher_logits=masked,
            target=possible,
        ),
        case("the student alone rules a class out: the loss is +inf", bias=_RULED_OUT, target=possible),
        case(
            "a weight of 0 leaves its term out, infinite as it may be",
            bias=_RULED_OUT,
            target=possible,
            soft_weight=0.0,
        ),
        case("equal student and teacher: the divergence is 0", teacher_logits=_HIDDEN @ _WEIGHT.T + _BIAS, target=None),
        case("a hidden row with NaN: no other row's gradient is touched", hidden=spoilt),
        case("scores that lie far apart", hidden=_HIDDEN * 400),
        case("rows without a label feel the soft term alone", target=np.array([0, -100, 2, -100, -100])),
        case("no row has a label", target=np.full(5, -100)),
        case("no target at all", target=None),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


def _draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    eighths = st.integers(-32, 32).map(lambda i: i / 8)

    def of(sizes: tuple[int, int, int]) -> st.SearchStrategy[Inputs]:
        n, k, c = sizes
        shapes = {"hidden": (n, k), "weight": (c, k), "bias": (c,), "teacher_logits": (n, c)}
        labels = st.one_of(st.integers(0, c - 1), st.just(-100))
        given: dict[str, st.SearchStrategy[Any]] = {
            name: arrays(dtype, shape, elements=eighths) for name, shape in shapes.items()
        }
        given["target"] = st.one_of(st.none(), arrays(np.int64, n, elements=labels))
        given["temperature"] = st.sampled_from((1.0, 2.0, 4.0, 0.5, 20.0))
        weights = st.sampled_from((0.5, 1.0, 0.3, 0.7))
        return st.fixed_dictionaries({**given, "hard_weight": weights, "soft_weight": weights})

    return st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(2, 5)).flatmap(of)


CONTRACTS = (
    Contract(
        *(KERNEL, TAKES, GIVES, ("ordinary",), _draw),
        edges=_edges(),
        scale=_scale,
        mistakes=MISTAKES,
        never_negative=True,
        refuses=(
            *BAD_TEMPERATURES,
            *((f"label {y} of 3 classes", {"target": np.array([0, y, 1, 2, 0])}) for y in (3, -1)),
        ),
    ),
)
