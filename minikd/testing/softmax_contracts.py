"""What kernels of softmax and log softmax promise, and of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.testing.contract import Attributes, Contract, Edge, Inputs, Mistake
from minikd.testing.references import reference
from minikd.testing.scores import BAD_TEMPERATURES, BROKEN, HUGE, MASKED, PLAIN, broken, rounded
from minikd.testing.strategies import EVERY_KIND, logits, temperatures


def _softmax_edges() -> tuple[Edge, ...]:
    named = {
        "two plain rows": PLAIN,
        "a masked class (-inf)": MASKED,
        "logits of ±1e30": HUGE,
        "one row far above the others": np.array([[5000.0, 5001.0], [-5000.0, -5001.0]]),
        "scores that lie far apart": np.array([[0.0, 400.0, 800.0]]),
        "a single class": np.array([[3.0], [-2.0]]),
        **{name: broken(value) for name, value in BROKEN.items()},
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


def _softmax_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    p, roundings = rounded(inputs["x"], inputs["temperature"])
    return [p * roundings]


def _log_softmax_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    p, roundings = rounded(inputs["x"], inputs["temperature"])
    return [1 + np.max(p * roundings, axis=1, keepdims=True)]


def _softmax_vjp_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    p, roundings = rounded(inputs["x"], inputs["temperature"])
    largest = np.abs(inputs["dy"]).max() if np.size(inputs["dy"]) else 0.0
    return [p * roundings * largest / inputs["temperature"]]


def _log_softmax_vjp_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    p, roundings = rounded(inputs["x"], inputs["temperature"])
    dy = np.abs(np.asarray(inputs["dy"], np.float64))
    return [(dy + p * roundings * dy.sum(axis=1, keepdims=True)) / inputs["temperature"]]


# --- mistakes that many make ---


def _of_softmax(log: bool) -> Callable[[Inputs, Attributes, Any], Any]:
    """softmax or its logarithm with this in place of each row's maximum."""

    def give(inputs: Inputs, attrs: Attributes, shift: Any) -> Any:
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


_SOFTMAX = ("x", "temperature")

CONTRACTS = (
    Contract(
        *("softmax", _SOFTMAX, ("y",), EVERY_KIND, _softmax_draw),
        edges=_softmax_edges(),
        scale=_softmax_scale,
        mistakes=_softmax_mistakes(log=False),
        refuses=BAD_TEMPERATURES,
    ),
    Contract(
        *("log_softmax", _SOFTMAX, ("y",), EVERY_KIND, _softmax_draw),
        edges=_softmax_edges(),
        scale=_log_softmax_scale,
        mistakes=_softmax_mistakes(log=True),
        refuses=BAD_TEMPERATURES,
    ),
    Contract(
        *("softmax_vjp", ("dy", *_SOFTMAX), ("dx",), EVERY_KIND, _softmax_vjp_draw),
        edges=_softmax_vjp_edges(),
        scale=_softmax_vjp_scale,
    ),
    Contract(
        *("log_softmax_vjp", ("dy", *_SOFTMAX), ("dx",), EVERY_KIND, _softmax_vjp_draw),
        edges=_softmax_vjp_edges(),
        scale=_log_softmax_vjp_scale,
    ),
)
