"""What kernels of elementwise operations, layers and optimizer steps promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.testing.contract import Attributes, Contract, Draw, Edge, Inputs, Mistake, expected


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


def _elementwise_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
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


def _linear_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    x, w, b = (np.abs(np.asarray(inputs[name], np.float64)) for name in ("x", "w", "b"))
    return [x @ w.T + b]


def _layer(kernel: str) -> Contract:
    """A layer with its activation, whose slope is nowhere much above 1."""

    def without_bias(inputs: Inputs, attrs: Attributes) -> Any:
        return expected(kernel, {**inputs, "b": np.zeros(len(inputs["b"]))}, attrs)[0]

    def transposed(inputs: Inputs, attrs: Attributes) -> Any:
        w = np.asarray(inputs["w"])
        return expected(kernel, {**inputs, "w": w.ravel().reshape(w.shape[::-1]).T}, attrs)[0]

    plain = {"x": np.array([[1.0, -0.5, 2.0]]), "w": np.array([[1.0, 0.5, -0.25], [0.75, -1.0, 0.5]])}
    return Contract(
        *(kernel, ("x", "w", "b"), ("y",), ("ordinary",), _linear_draw),
        edges=(
            Edge("two units of three inputs", {**plain, "b": np.array([0.5, -0.125])}),
            Edge("one unit of one input", {"x": np.ones((1, 1)), "w": np.ones((1, 1)), "b": np.ones(1)}),
        ),
        scale=_linear_scale,
        mistakes=(
            Mistake("the bias is missing", without_bias),
            Mistake("the weight is read as (inputs, units), not as (units, inputs)", transposed),
        ),
    )


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


def _sgd_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """Sizes of what is added up: velocity and gradient, parameter and step."""
    moved = np.abs(inputs["g"]) + np.abs(inputs["v"])
    return [np.abs(inputs["w"]) + inputs["lr"] * moved, moved]


def _adam_scale(inputs: Inputs, attrs: Attributes) -> Sequence[Any]:
    """Sizes of what is added up: averages and gradient, parameter and a step of ten learning rates."""
    g = np.abs(np.asarray(inputs["g"], np.float64))
    moved = np.abs(inputs["w"]) + inputs["lr"] * (10 + g + np.abs(inputs["v"]))
    return [moved, np.abs(inputs["m"]) + g, np.abs(inputs["v"]) + g * g]


_ONE = np.array([0.5, -1.0, 2.0])
_ADAM: Inputs = {"g": _ONE, "lr": 0.1, "step": np.int64(1), "w": _ONE[::-1].copy(), "m": np.zeros(3), "v": np.zeros(3)}


def _without_correction(inputs: Inputs, attrs: Attributes) -> Any:
    return expected("adam_step", {**inputs, "step": np.int64(10**6)}, attrs)


def _coupled(inputs: Inputs, attrs: Attributes) -> Any:
    return expected("adam_step", inputs, {**attrs, "decoupled": not attrs.get("decoupled", False)})


CONTRACTS = (
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
    *map(_layer, ("linear", "linear_relu", "linear_tanh", "linear_sigmoid", "linear_gelu")),
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
