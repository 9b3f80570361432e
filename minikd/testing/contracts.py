"""What a kernel of each operation promises, as data: its arguments, the cases that are decided, and usual mistakes.

A contract adds to the table of operations only what a test of somebody else's kernel needs: which inputs the function
takes and gives, the edge cases of the formulas as named inputs, how large a rounding error may be, and what the usual
mistakes would give, so that a report can name them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.ops import OPS
from minikd.ops.rows import softened
from minikd.testing.references import reference
from minikd.testing.strategies import KINDS, batches, logits, temperatures

Inputs = dict[str, Any]
Draw = Callable[[str, Any], st.SearchStrategy[Inputs]]


class Edge(NamedTuple):
    """A decided case: what it is, and its inputs in float64."""

    name: str
    inputs: Inputs


class Mistake(NamedTuple):
    """What a usual mistake is, in words, and what it would give for these inputs and attributes."""

    name: str
    give: Callable[[Inputs, dict[str, Any]], Any]


@dataclass(frozen=True)
class Contract:
    """What a kernel takes, gives and promises.

    Attributes
    ----------
    kernel : an operation's name, or that name with "_vjp".
    takes, gives : names of the arguments and of the results, in order; a function may give only the first.
    kinds : the regions of inputs that are searched; `draw(kind, dtype)` is the strategy of one.
    edges : decided cases.
    scale : ``scale(inputs, attrs)``, for each result how large the numbers are whose rounding it inherits, beside its
        own size.
    mistakes : usual ones.
    never_negative : whether the first result is never below 0.
    refuses : arguments that must be refused with a ValueError, with what is wrong about them.
    state : arguments that are updated, in the order in which they are given back.
    """

    kernel: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    kinds: tuple[str, ...]
    draw: Draw
    edges: tuple[Edge, ...] = ()
    scale: Callable[[Inputs, dict[str, Any]], Sequence[Any]] = lambda inputs, attrs: ()
    mistakes: tuple[Mistake, ...] = ()
    never_negative: bool = False
    refuses: tuple[tuple[str, Inputs], ...] = ()
    state: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        return f"{self.kernel}({', '.join(self.takes)}) -> {', '.join(self.gives)}"

    def expected(self, inputs: Inputs, attrs: dict[str, Any], precision: str | int = "float64") -> list[Any]:
        """What the reference gives, one result for each of `gives`."""
        found = reference(self.kernel, precision)(*map(inputs.get, self._order()), **attrs)
        return list(found if isinstance(found, tuple) else (found,))[: len(self.gives)]

    def _order(self) -> list[str]:
        """The names of the reference's inputs, also of optional ones that the function does not take."""
        op = OPS[self.kernel.removesuffix("_vjp")]
        names = [a.name for a in op.inputs]
        if self.kernel != op.name:
            return [*("d" + a.name for a in op.outs), *names]
        return [*names, *(a.name for a in op.updates)]


INF, NAN = np.inf, np.nan
PLAIN = np.array([[2.0, 1.0, 0.1], [0.5, 2.5, -1.0]])
TEACHER = np.array([[3.0, 0.5, -0.5], [0.0, 3.0, 0.0]])
LABELS = np.array([0, 1])


# --- rows of scores ---

MASKED = np.array([[0.0, -INF, 1.0], [2.0, 1.0, -INF]])
HUGE = np.array([[1e30, -1e30, 0.0], [3e4, 0.0, -3e4]])
HIGH = np.array([[1000.0, 1001.0, 1002.0], [1.0, 2.0, 3.0]])  # exp overflows in the first row only
BROKEN = {
    "a row of nothing but -inf is NaN, and no other row is touched": -INF,
    "a row with +inf is NaN, and no other row is touched": INF,
    "a row with NaN is NaN, and no other row is touched": NAN,
}


def _broken(value: float) -> Any:
    rows = PLAIN.copy()
    rows[0, slice(None) if value == -INF else 1] = value
    return rows


def _softmax_edges() -> tuple[Edge, ...]:
    named = {
        "two plain rows": PLAIN,
        "a masked class (-inf)": MASKED,
        "logits of ±1e30": HUGE,
        "one row far above the others": np.array([[5000.0, 5001.0], [-5000.0, -5001.0]]),
        "scores that lie far apart": np.array([[0.0, 400.0, 800.0]]),
        "a single class": np.array([[3.0], [-2.0]]),
        **{name: _broken(value) for name, value in BROKEN.items()},
    }
    cases = [Edge(name, {"x": rows, "temperature": 1.0}) for name, rows in named.items()]
    at = {"a cold temperature": 0.01, "a hot temperature": 1e4, "a temperature of 4": 4.0}
    return (*cases, *(Edge(name, {"x": PLAIN, "temperature": t}) for name, t in at.items()))


def _softmax_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    return st.fixed_dictionaries({"x": logits(dtype=dtype, kind=kind), "temperature": temperatures()})


def _softmax_vjp_edges() -> tuple[Edge, ...]:
    """Those of softmax, with a gradient of the output; broken rows and huge scores have no derivative to speak of."""
    upstream = np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
    left_out = (*BROKEN, "logits of ±1e30")
    return tuple(
        Edge(edge.name, {"dy": upstream[: len(x), : x.shape[1]], **edge.inputs})
        for edge in _softmax_edges()
        if edge.name not in left_out
        for x in (edge.inputs["x"],)
    )


def _softmax_vjp_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    def with_upstream(inputs: Inputs) -> st.SearchStrategy[Inputs]:
        upstream = arrays(dtype, inputs["x"].shape, elements=st.integers(-32, 32).map(lambda k: k / 8))
        return upstream.map(lambda dy: {"dy": dy, **inputs})

    return _softmax_draw(kind, dtype).flatmap(with_upstream)


LARGEST_OFFSET = 1e3  # a score's own rounding is allowed for up to here; beyond, no digit of the result would be left


def _rounded(z: Any, t: float) -> tuple[Any, Any]:
    """softmax(z/T), and how many roundings each log p inherits: of its size, and of the scores where p is not sure."""
    wide = np.asarray(z, np.float64)
    with np.errstate(all="ignore"):
        p, log_p = softened(np, wide, 1 / float(t))
        offset = np.max(np.abs(wide), axis=1, where=np.isfinite(wide), initial=0.0)[:, None]
        return p, 1 + np.where(p > 0, np.abs(log_p), 0) + (1 - p) * np.minimum(offset, LARGEST_OFFSET) / t


def _softmax_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    p, roundings = _rounded(inputs["x"], inputs["temperature"])
    return [p * roundings]


def _log_softmax_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    p, roundings = _rounded(inputs["x"], inputs["temperature"])
    return [1 + np.max(p * roundings, axis=1, keepdims=True)]


def _softmax_vjp_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    p, roundings = _rounded(inputs["x"], inputs["temperature"])
    largest = np.abs(inputs["dy"]).max() if np.size(inputs["dy"]) else 0.0
    return [p * roundings * largest / inputs["temperature"]]


def _log_softmax_vjp_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    p, roundings = _rounded(inputs["x"], inputs["temperature"])
    dy = np.abs(np.asarray(inputs["dy"], np.float64))
    return [(dy + p * roundings * dy.sum(axis=1, keepdims=True)) / inputs["temperature"]]


# --- mistakes that many make ---


def _of_softmax(log: bool) -> Callable[[Inputs, dict[str, Any], Any], Any]:
    """softmax or its logarithm with this in place of each row's maximum."""

    def give(inputs: Inputs, attrs: dict[str, Any], shift: Any) -> Any:
        x = np.asarray(inputs["x"])
        with np.errstate(all="ignore"):
            e = np.exp((x - shift(x)) / x.dtype.type(inputs["temperature"]))
            p = e / e.sum(axis=1, keepdims=True)
            return np.log(p) if log else p

    return give


def _row_maximum(x: Any) -> Any:
    return x.max(axis=1, keepdims=True)


def _softmax_mistakes(log: bool) -> tuple[Mistake, ...]:
    of = _of_softmax(log)
    kernel = "log_softmax" if log else "softmax"
    found = [
        Mistake("no maximum is taken off before exp", lambda i, a: of(i, a, lambda x: x.dtype.type(0))),
        Mistake("the maximum of the whole array is taken off, not each row's", lambda i, a: of(i, a, np.max)),
        Mistake("the temperature is not used", lambda i, a: reference(kernel)(i["x"], 1.0)),
        Mistake(
            "the scores are multiplied by the temperature, not divided",
            lambda i, a: reference(kernel)(i["x"], 1 / i["temperature"]),
        ),
    ]
    if log:
        underflow = "the logarithm of a probability that underflowed is taken: log(softmax(x))"
        found.insert(0, Mistake(underflow, lambda i, a: of(i, a, _row_maximum)))
    return tuple(found)


def _changed(kernel: str, change: Callable[[Inputs, dict[str, Any]], None]) -> Callable[[Inputs, dict[str, Any]], Any]:
    """What the operation gives once inputs or attributes were changed."""

    def give(inputs: Inputs, attrs: dict[str, Any]) -> Any:
        inputs, attrs = dict(inputs), dict(attrs)
        change(inputs, attrs)
        return CONTRACTS[kernel].expected(inputs, attrs)

    return give


def _swap(inputs: Inputs, attrs: dict[str, Any]) -> None:
    inputs["student_logits"], inputs["teacher_logits"] = inputs["teacher_logits"], inputs["student_logits"]


def _soft_term_swapped(inputs: Inputs, attrs: dict[str, Any]) -> Any:
    """The distillation loss whose hard term is right."""
    hard = CONTRACTS["distillation_loss"].expected({**inputs, "soft_weight": 0.0}, attrs)
    soft = _changed("distillation_loss", _swap)({**inputs, "hard_weight": 0.0}, attrs)
    return [a + b for a, b in zip(hard, soft, strict=True)]


def _set(**changed: Any) -> Callable[[Inputs, dict[str, Any]], None]:
    def change(inputs: Inputs, attrs: dict[str, Any]) -> None:
        for name, value in changed.items():
            (inputs if name in inputs else attrs)[name] = value

    return change


def _times(kernel: str, factor: Callable[[Inputs, dict[str, Any]], float]) -> Callable[[Inputs, dict[str, Any]], Any]:
    """The right results times a factor."""

    def give(inputs: Inputs, attrs: dict[str, Any]) -> Any:
        return [factor(inputs, attrs) * x for x in CONTRACTS[kernel].expected(inputs, attrs)]

    return give


def _usual(kernel: str, first: str) -> tuple[Mistake, ...]:
    """Those of every loss that is reduced over rows."""

    def classes(inputs: Inputs) -> int:
        return int(np.shape(inputs[first])[1])

    def rows(inputs: Inputs) -> int:
        return int(np.shape(inputs[first])[0])

    return (
        Mistake(
            "the sum is divided by all elements (mean), not by the rows (batchmean)",
            _times(kernel, lambda i, a: 1 / classes(i)),
        ),
        Mistake("the sum over rows is not divided by their number", _times(kernel, lambda i, a: rows(i))),
        Mistake("the loss has the wrong sign", _times(kernel, lambda i, a: -1.0)),
    )


def _pair_mistakes(kernel: str) -> tuple[Mistake, ...]:
    """Those of every loss of a softened student and teacher."""
    swapped = _soft_term_swapped if kernel == "distillation_loss" else _changed(kernel, _swap)
    return (
        Mistake("the factor T² is missing", _changed(kernel, _set(scale_t2=False))),
        Mistake("teacher and student are exchanged", swapped),
        Mistake("the temperature is not used", _changed(kernel, _set(temperature=1.0))),
        *_usual(kernel, "student_logits"),
    )


def _all_rows_counted(inputs: Inputs, attrs: dict[str, Any]) -> Any:
    target = np.asarray(inputs["target"])
    share = (target != attrs.get("ignore_index", -100)).sum() / len(target)
    return [share * x for x in CONTRACTS["cross_entropy"].expected(inputs, attrs)]


def _exchanged_weights(inputs: Inputs, attrs: dict[str, Any]) -> None:
    inputs["hard_weight"], inputs["soft_weight"] = inputs["soft_weight"], inputs["hard_weight"]


def _hard_at_temperature(inputs: Inputs, attrs: dict[str, Any]) -> Any:
    """The distillation loss whose hard term is softened too."""
    t = inputs["temperature"]
    soft = CONTRACTS["distillation_loss"].expected({**inputs, "hard_weight": 0.0}, attrs)
    if inputs["target"] is None:
        return soft
    hard = reference("cross_entropy")(np.asarray(inputs["student_logits"], np.float64) / t, inputs["target"], None)
    return [soft[0] + inputs["hard_weight"] * hard[0], soft[1] + inputs["hard_weight"] * hard[1] / t]


# --- losses ---


def _divisors(attrs: dict[str, Any], n: int, labelled: int) -> tuple[float, float]:
    """What soft and hard terms are divided by."""
    reduction = attrs.get("reduction", "mean")
    if reduction in ("sum", "none"):
        return 1.0, 1.0
    return float(n), float(max(labelled, 1))


def _likelier(inputs: Inputs, t: float) -> Any:
    """The larger of both softened probabilities, each times the roundings that its logarithm inherits."""
    pairs = [_rounded(inputs[name], t) for name in ("student_logits", "teacher_logits")]
    return np.maximum(*(p * roundings for p, roundings in pairs))


def _largest(x: Any) -> float:
    """The largest number of an array in which some may be NaN."""
    return float(np.max(x, where=np.isfinite(x), initial=0.0))


def _distillation_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    """Of the loss 1 + log c for each weight, times T² for the soft one; of the gradient T·max(p, q), and 1."""
    n, c = np.shape(inputs["student_logits"])
    t, target = float(inputs["temperature"]), inputs["target"]
    labelled = 0 if target is None else int((np.asarray(target) != -100).sum())
    per_soft, per_hard = _divisors(attrs, n, labelled)
    scaled = attrs.get("scale_t2", True)
    hard, soft = inputs["hard_weight"] if labelled else 0.0, inputs["soft_weight"]
    likely, (p, roundings) = _likelier(inputs, t), _rounded(inputs["student_logits"], 1.0)
    loss = hard * (np.log(c) + _largest(p * roundings))
    loss += soft * (t * t if scaled else 1.0) * (np.log(c) + _largest(likely))
    return [loss, hard * p * roundings / per_hard + soft * (t if scaled else 1 / t) * likely / per_soft]


def _pair_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    """As of the soft term; where the logarithms of both enter the gradient, with their size.

    A probability below the dtype's normal numbers may be 0, however large what it is multiplied by.
    """
    n, c = np.shape(inputs["student_logits"])
    t, scaled = float(inputs["temperature"]), attrs.get("scale_t2", True)
    limits = np.finfo(inputs["student_logits"].dtype)
    likely = _likelier(inputs, t) + float(limits.tiny / limits.eps)
    with np.errstate(all="ignore"):
        gap = np.abs(inputs["student_logits"] - np.asarray(inputs["teacher_logits"], np.float64)) / t
    apart = 1 + np.nanmax(np.where(np.isfinite(gap) & (likely > 0), gap, 0), axis=1, keepdims=True)
    loss = (np.log(c) + _largest(likely) + apart.max()) * (t * t if scaled else 1.0)
    return [loss, (t if scaled else 1 / t) * likely * apart / _divisors(attrs, n, 0)[0]]


def _cross_entropy_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    n, c = np.shape(inputs["logits"])
    labelled = int((np.asarray(inputs["target"]) != -100).sum())
    p, roundings = _rounded(inputs["logits"], 1.0)
    gradient = (1 + p * roundings) / _divisors(attrs, n, labelled)[1]
    return [1 + np.log(c) + _largest(p * roundings), gradient]


def _kl_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    return [1 + np.log(np.shape(inputs["input"])[1]), 0.0]


def _distillation_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    weights = st.sampled_from((0.5, 1.0, 0.3, 0.7))
    return st.builds(
        lambda batch, unlabelled, t, hard, soft: {
            "student_logits": batch.student,
            "teacher_logits": batch.teacher,
            "target": None if unlabelled else batch.target,
            "temperature": t,
            "hard_weight": hard,
            "soft_weight": soft,
        },
        batches(dtype=dtype, kind=kind, ignored=True),
        st.sampled_from((False, False, False, True)),
        temperatures(),
        weights,
        weights,
    )


def _pair_draw(**others: st.SearchStrategy[Any]) -> Draw:
    def draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
        return st.builds(
            lambda batch, t, rest: {
                "student_logits": batch.student,
                "teacher_logits": batch.teacher,
                "temperature": t,
                **rest,
            },
            batches(dtype=dtype, kind=kind),
            temperatures(),
            st.fixed_dictionaries(others),
        )

    return draw


def _cross_entropy_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    return batches(dtype=dtype, kind=kind, ignored=True).map(lambda b: {"logits": b.student, "target": b.target})


def _kl_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    def soften(batch: Any) -> Inputs:
        with np.errstate(all="ignore"):
            log_p, q = softened(np, batch.student, 1.0)[1], softened(np, batch.teacher, 1.0)[0]
        return {"input": log_p.astype(dtype), "target": q.astype(dtype)}

    return batches(dtype=dtype, kind=kind).map(soften)


_WEIGHTS: Inputs = {"temperature": 2.0, "hard_weight": 0.5, "soft_weight": 0.5}
_EQUAL = "equal student and teacher: the divergence is 0"


def _pair_rows() -> dict[str, tuple[Any, Any]]:
    """Student and teacher of the edge cases that all their losses share."""
    return {
        "a class that both rule out (-inf): its gradient is 0, not NaN": (MASKED, MASKED - 0.5),
        "logits of ±1e30": (HUGE, HUGE[::-1].copy()),
        "scores that lie far apart": (np.array([[0.0, 400.0, 800.0]]), np.array([[800.0, 400.0, 0.0]])),
        "one side far above the other": (np.array([[1e30, 1e30], [1e30, 0.0]]), TEACHER[:, :2]),
        "rows that lie far from one another": (np.array([[3e3, 3001.0], [-3e3, -3001.0]]), TEACHER[:, :2]),
        "a single class": (np.array([[3.0], [-2.0]]), np.array([[1.0], [5.0]])),
        _EQUAL: (PLAIN, PLAIN.copy()),
        **{name: (_broken(value), TEACHER) for name, value in BROKEN.items()},
    }


def _distillation_edges() -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, target: Any = LABELS, **others: Any) -> Edge:
        logits = {"student_logits": student, "teacher_logits": teacher, "target": target}
        return Edge(name, {**logits, **_WEIGHTS, **others})

    possible = {rows: np.array([0, 0])[: len(pair[0])] for rows, pair in _pair_rows().items()}
    shared = [case(name, *pair, None if name == _EQUAL else possible[name]) for name, pair in _pair_rows().items()]
    return (
        case("two plain rows at T = 4", temperature=4.0),
        *shared,
        case("the student alone rules a class out: the loss is +inf", MASKED, TEACHER, None),
        case("the label is a class that the student rules out: the loss is +inf", MASKED, MASKED, np.array([1, 0])),
        case(
            "a weight of 0 leaves its term out, infinite as it may be",
            MASKED,
            MASKED,
            np.array([1, 0]),
            hard_weight=0.0,
        ),
        case("a weight of 0 for the soft term", MASKED, TEACHER, np.array([0, 1]), soft_weight=0.0),
        case("a row without a label feels the soft term alone", target=np.array([0, -100])),
        case("no row has a label", target=np.array([-100, -100])),
        case("no target at all", target=None),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


def _pair_edges(reverse: bool = False, **others: Any) -> tuple[Edge, ...]:
    def case(name: str, student: Any = PLAIN, teacher: Any = TEACHER, temperature: float = 2.0) -> Edge:
        pair = {"student_logits": student, "teacher_logits": teacher}
        return Edge(name, {**pair, "temperature": temperature, **others})

    ruled_out = "the teacher alone rules a class out: the loss is +inf"
    return (
        case("two plain rows at T = 4", temperature=4.0),
        *(case(name, *pair) for name, pair in _pair_rows().items()),
        *((case(ruled_out, TEACHER, MASKED),) if reverse else ()),
        case("a cold temperature", temperature=0.05),
        case("a hot temperature", temperature=300.0),
    )


def _cross_entropy_edges() -> tuple[Edge, ...]:
    def case(name: str, rows: Any, target: Sequence[int]) -> Edge:
        return Edge(name, {"logits": np.asarray(rows), "target": np.array(target)})

    return (
        case("two plain rows", PLAIN, [0, 1]),
        case("a masked class (-inf): its gradient is 0, not NaN", MASKED, [0, 1]),
        case("the label is a masked class: the loss is +inf", MASKED, [1, 0]),
        case("logits of ±1e30", HUGE, [0, 0]),
        case("scores that lie far apart", [[0.0, 400.0, 800.0]], [0]),
        case("rows that lie far from one another", [[5000.0, 5001.0], [-5000.0, -5001.0]], [0, 0]),
        case("a row that is ignored", PLAIN, [0, -100]),
        case("every row is ignored: the loss is 0", PLAIN, [-100, -100]),
        case("a single class", [[3.0], [-2.0]], [0, 0]),
        *(case(name, _broken(value), [0, 1]) for name, value in BROKEN.items()),
    )


def _kl_edges() -> tuple[Edge, ...]:
    log_p, q = np.log([[0.2, 0.3, 0.5]]), np.array([[0.6, 0.3, 0.1]])
    none = np.array([[-INF, np.log(0.5), np.log(0.5)]])
    return (
        Edge("a plain row", {"input": log_p, "target": q}),
        Edge("a target of 0 adds 0, not 0·log 0", {"input": log_p, "target": np.array([[0.0, 0.4, 0.6]])}),
        Edge("a class that both rule out adds 0, not 0·inf", {"input": none, "target": np.array([[0.0, 0.4, 0.6]])}),
        Edge("the student alone rules a class out: the loss is +inf", {"input": none, "target": q}),
    )


# --- elementwise operations, layers and optimizer steps ---


def _values(dtype: Any, names: Sequence[str], awkward: Sequence[float]) -> st.SearchStrategy[Inputs]:
    elements = st.one_of(st.integers(-64, 64).map(lambda k: k / 8), st.sampled_from(tuple(awkward)))
    shapes = st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 4), st.integers(1, 6)))

    def of(shape: tuple[int, ...]) -> st.SearchStrategy[Inputs]:
        return st.fixed_dictionaries({name: arrays(dtype, shape, elements=elements) for name in names})

    return shapes.flatmap(of)


_TINY = 2.0**-100  # which float32 holds, too
_AWKWARD = (0.0, -0.0, _TINY, -_TINY, 12.0, -12.0, 40.0, -40.0, 1e4, -1e4)


def _elementwise(kernel: str, takes: tuple[str, ...], gives: str, *mistakes: Mistake) -> Contract:
    values = np.array([0.0, -0.0, 1.0, -1.0, 12.0, -12.0, 1e4, -1e4])
    inputs = {name: values if name == "u" else np.ones(len(values)) for name in takes}
    return Contract(
        kernel,
        takes,
        (gives,),
        ("ordinary",),
        lambda kind, dtype: _values(dtype, takes, _AWKWARD),
        edges=(Edge("zeros of both signs, and values at which it is flat", inputs),),
        scale=_elementwise_scale,
        mistakes=mistakes,
    )


def _elementwise_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    """A rounding of u moves the tail of a bell by u² of them."""
    u = np.asarray(inputs["u"], np.float64)
    return [np.minimum(u * u, 100.0) * 1e-3 * np.abs(inputs.get("dy", u))]


def _tanh_gelu(u: Any) -> Any:
    return u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))


def _linear_draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
    def of(sizes: tuple[int, int, int]) -> st.SearchStrategy[Inputs]:
        n, k, m = sizes
        elements = st.integers(-32, 32).map(lambda i: i / 8)
        shapes = {"x": (n, k), "w": (m, k), "b": (m,)}
        return st.fixed_dictionaries({name: arrays(dtype, s, elements=elements) for name, s in shapes.items()})

    return st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5)).flatmap(of)


def _linear_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    x, w, b = (np.abs(np.asarray(inputs[name], np.float64)) for name in ("x", "w", "b"))
    return [x @ w.T + b]


def _step_draw(state: tuple[str, ...]) -> Draw:
    def draw(kind: str, dtype: Any) -> st.SearchStrategy[Inputs]:
        def of(k: int) -> st.SearchStrategy[Inputs]:
            signed = arrays(dtype, k, elements=st.integers(-32, 32).map(lambda i: i / 8))
            found: dict[str, st.SearchStrategy[Any]] = {"g": signed, "lr": st.sampled_from((0.1, 0.01, 1.0))}
            if "m" in state:
                found["step"] = st.sampled_from((1, 2, 10, 1000)).map(np.int64)
            for name in state:
                found[name] = signed.map(np.abs) if name == "v" and "m" in state else signed
            return st.fixed_dictionaries(found)

        return st.integers(1, 20).flatmap(of)

    return draw


def _sgd_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    """Sizes of what is added up: velocity and gradient, parameter and step."""
    moved = np.abs(inputs["g"]) + np.abs(inputs["v"])
    return [np.abs(inputs["w"]) + inputs["lr"] * moved, moved]


def _adam_scale(inputs: Inputs, attrs: dict[str, Any]) -> Sequence[Any]:
    """Sizes of what is added up: averages and gradient, parameter and a step of ten learning rates."""
    g = np.abs(np.asarray(inputs["g"], np.float64))
    moved = np.abs(inputs["w"]) + inputs["lr"] * (10 + g + np.abs(inputs["v"]))
    return [moved, np.abs(inputs["m"]) + g, np.abs(inputs["v"]) + g * g]


_ONE = np.array([0.5, -1.0, 2.0])
_ADAM: Inputs = {"g": _ONE, "lr": 0.1, "step": np.int64(1), "w": _ONE[::-1].copy(), "m": np.zeros(3), "v": np.zeros(3)}


def _without_correction(inputs: Inputs, attrs: dict[str, Any]) -> Any:
    return CONTRACTS["adam_step"].expected({**inputs, "step": np.int64(10**6)}, attrs)


def _coupled(inputs: Inputs, attrs: dict[str, Any]) -> Any:
    return CONTRACTS["adam_step"].expected(inputs, {**attrs, "decoupled": not attrs.get("decoupled", False)})


_EVERY_KIND = tuple(KINDS)
_SOFTMAX = ("x", "temperature")
_PAIR = ("student_logits", "teacher_logits", "temperature")
_GIVEN = ("loss", "gradient")
_BAD_T = tuple(("a temperature of " + str(t), {"temperature": t}) for t in (0.0, -1.0, NAN, INF))
_BAD_LABEL = tuple((f"label {y} of 3 classes", {"target": np.array([0, y])}) for y in (3, -1))

_ALL = (
    Contract(
        *("softmax", _SOFTMAX, ("y",), _EVERY_KIND, _softmax_draw),
        edges=_softmax_edges(),
        scale=_softmax_scale,
        mistakes=_softmax_mistakes(log=False),
        refuses=_BAD_T,
    ),
    Contract(
        *("log_softmax", _SOFTMAX, ("y",), _EVERY_KIND, _softmax_draw),
        edges=_softmax_edges(),
        scale=_log_softmax_scale,
        mistakes=_softmax_mistakes(log=True),
        refuses=_BAD_T,
    ),
    Contract(
        *("softmax_vjp", ("dy", *_SOFTMAX), ("dx",), _EVERY_KIND, _softmax_vjp_draw),
        edges=_softmax_vjp_edges(),
        scale=_softmax_vjp_scale,
    ),
    Contract(
        *("log_softmax_vjp", ("dy", *_SOFTMAX), ("dx",), _EVERY_KIND, _softmax_vjp_draw),
        edges=_softmax_vjp_edges(),
        scale=_log_softmax_vjp_scale,
    ),
    Contract(
        *("cross_entropy", ("logits", "target"), _GIVEN, _EVERY_KIND, _cross_entropy_draw),
        edges=_cross_entropy_edges(),
        scale=_cross_entropy_scale,
        mistakes=(
            *_usual("cross_entropy", "logits"),
            Mistake("rows without a label are counted in the mean", _all_rows_counted),
        ),
        never_negative=True,
        refuses=_BAD_LABEL,
    ),
    Contract(
        *("kl_div", ("input", "target"), _GIVEN, _EVERY_KIND, _kl_draw),
        edges=_kl_edges(),
        scale=_kl_scale,
        mistakes=_usual("kl_div", "input"),
    ),
    Contract(
        "distillation_loss",
        ("student_logits", "teacher_logits", "target", "temperature", "hard_weight", "soft_weight"),
        *(_GIVEN, _EVERY_KIND, _distillation_draw),
        edges=_distillation_edges(),
        scale=_distillation_scale,
        mistakes=(
            *_pair_mistakes("distillation_loss"),
            Mistake("hard_weight and soft_weight are exchanged", _changed("distillation_loss", _exchanged_weights)),
            Mistake("the hard term is softened by the temperature too", _hard_at_temperature),
        ),
        never_negative=True,
        refuses=(*_BAD_T, *_BAD_LABEL),
    ),
    Contract(
        *("reverse_kl", _PAIR, _GIVEN, _EVERY_KIND, _pair_draw()),
        edges=_pair_edges(reverse=True),
        scale=_pair_scale,
        mistakes=_pair_mistakes("reverse_kl"),
        never_negative=True,
        refuses=_BAD_T,
    ),
    Contract(
        *("jensen_shannon", (*_PAIR, "beta"), _GIVEN, _EVERY_KIND),
        _pair_draw(beta=st.sampled_from((0.5, 0.1, 0.9))),
        edges=_pair_edges(beta=0.5),
        scale=_pair_scale,
        mistakes=_pair_mistakes("jensen_shannon"),
        never_negative=True,
        refuses=_BAD_T,
    ),
    Contract(
        *("skewed_kl", (*_PAIR, "alpha"), _GIVEN, _EVERY_KIND),
        _pair_draw(alpha=st.sampled_from((0.1, 0.5, 0.9))),
        edges=_pair_edges(alpha=0.1),
        scale=_pair_scale,
        mistakes=_pair_mistakes("skewed_kl"),
        never_negative=True,
        refuses=_BAD_T,
    ),
    _elementwise("relu", ("u",), "y"),
    _elementwise("tanh", ("u",), "y"),
    _elementwise("sigmoid", ("u",), "y"),
    _elementwise(
        *("gelu", ("u",), "y"),
        Mistake("the approximation by tanh is computed, not u·Φ(u)", lambda i, a: _tanh_gelu(i["u"])),
    ),
    _elementwise("relu_vjp", ("dy", "u"), "du"),
    _elementwise("tanh_vjp", ("dy", "u"), "du"),
    _elementwise("sigmoid_vjp", ("dy", "u"), "du"),
    _elementwise("gelu_vjp", ("dy", "u"), "du"),
    Contract(
        *("linear", ("x", "w", "b"), ("y",), ("ordinary",), _linear_draw),
        edges=(Edge("one unit of one input", {"x": np.ones((1, 1)), "w": np.ones((1, 1)), "b": np.ones(1)}),),
        scale=_linear_scale,
        mistakes=(Mistake("the bias is missing", lambda i, a: np.asarray(i["x"]) @ np.asarray(i["w"]).T),),
    ),
    Contract(
        *("sgd_step", ("g", "lr", "w", "v"), ("w", "v"), ("ordinary",), _step_draw(("w", "v"))),
        edges=(Edge("the first step", {"g": _ONE, "lr": 0.1, "w": _ONE[::-1].copy(), "v": np.zeros(3)}),),
        scale=_sgd_scale,
        state=("w", "v"),
    ),
    Contract(
        *("adam_step", ("g", "lr", "step", "w", "m", "v"), ("w", "m", "v"), ("ordinary",)),
        _step_draw(("w", "m", "v")),
        edges=(Edge("the first step", _ADAM),),
        scale=_adam_scale,
        mistakes=(
            Mistake("the averages are not corrected for their start at 0", _without_correction),
            Mistake("the weight decay is the other one of Adam's and AdamW's", _coupled),
        ),
        state=("w", "m", "v"),
    ),
)

# Kernel → contract.
CONTRACTS: dict[str, Contract] = {contract.kernel: contract for contract in _ALL}
