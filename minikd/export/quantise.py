"""A network in int8: scales and integers that stand for its numbers, and what they compute, to the last bit.

Weights are symmetric with a scale for each output: w ≈ s_w[j]·q with q from -127 to 127. Whatever flows between layers
has one scale s and one zero point z: x ≈ s·(q - z) with q from -128 to 127, so real 0 is exact. A layer computes

    acc[j] = bias[j] + Σ_k (q_x[k] - z_x)·q_w[j, k]                        in int32, proven not to overflow
    q_y[j] = clamp(z_y + floor((acc[j]·m[j] + 2^(r[j] - 1)) / 2^r[j]))     m·2^-r ≈ s_x·s_w[j] / s_y, in int64

so a product is rounded to the nearest step, and half a step upwards. ReLU is the clamp's lower bound z_y; the other
activations are a table with an int8 for each int8. Real numbers become integers by rounding to the nearest, and halves
to the even one, as ONNX's QuantizeLinear does it.

Source: Jacob et al. 2018, sec. 2 (the integers' arithmetic); Krishnamoorthi 2018, sec. 3 (a scale for each output).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minikd import functional as F
from minikd import metrics
from minikd.errors import ArgumentError, ShapeError
from minikd.export.network import Layer, Network

__all__ = ["CALIBRATIONS", "Affine", "Quantised", "QuantisedLayer", "quantise"]

CALIBRATIONS = ("min-max", "percentile", "best")
WHOLE = 100.0
PERCENTILES = (99.99, 99.9, 99.5, 99.0)  # that "best" tries beside the whole range
HELD_BACK = 4  # every fourth row measures what "best" tries
LOWEST, HIGHEST = -128, 127
LARGEST_WEIGHT = 127
LARGEST_BIAS = 2**30  # steps of a bias, or a few more; the scale of weights that are small beside it gives way
LEAST_SCALE = 2.0**-60  # so that products of two scales are normal float32 numbers
LEAST_SHIFT, GREATEST_SHIFT = 1, 62

# Beyond these inputs an activation moves by less than about half a step of its int8 result. All in a table are here.
BENDS = {"tanh": (-3.2, 3.2), "sigmoid": (-6.3, 6.3), "gelu": (-3.5, np.inf)}


class Affine(NamedTuple):
    """How int8 stands for real numbers: x ≈ scale·(q - zero).

    scale : above 0, a float32 number.  zero : from -128 to 127, the integer of real 0.
    """

    scale: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Affine:
        """The finest that reaches from low to high and to 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32(max((high - low) / (HIGHEST - LOWEST), LEAST_SCALE))) if high > low else 1.0
        return cls(scale, int(np.clip(np.rint(LOWEST - low / scale), LOWEST, HIGHEST)))

    def quantise(self, x: Any) -> np.ndarray:
        """int8 of real x, any shape: clamp(round(x / scale) + zero), in float32; halves go to even, NaN to zero."""
        with np.errstate(over="ignore"):  # what overflows is clamped
            steps = np.rint(np.asarray(x, np.float32) / np.float32(self.scale))
        steps = np.clip(np.where(np.isnan(steps), 0, steps), LOWEST - self.zero, HIGHEST - self.zero)
        return (steps + self.zero).astype(np.int8)

    def dequantise(self, q: np.ndarray) -> np.ndarray:
        """scale·(q - zero) as float32."""
        return (q.astype(np.int32) - self.zero).astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class QuantisedLayer:
    """One product in integers, and its activation.

    weight : (m, k) int8, from -127 to 127.  weight_scale : (m,) float32.
    bias : (m,) int32, in steps of input.scale·weight_scale; without the share of the input's zero point, which
        `folded_bias` has.
    activation : "relu", "gelu", "tanh", "sigmoid", or "" for none.
    input : how its inputs are written.
    product : how the product is: with ReLU the result already, before the table of the other activations.
    multiplier, shift : (m,) int32, input.scale·weight_scale / product.scale ≈ multiplier·2^-shift. A multiplier is
        from 2^30 to 2^31 - 1, or below where the shift is at its limit of 62; a shift is from 1 to 62.
    table : (256,) int8, the activation's result of each product q at place q + 128; None where there is no table.
    output : how the result is written; the product's where there is no table.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray
    activation: str
    input: Affine
    product: Affine
    multiplier: np.ndarray
    shift: np.ndarray
    table: np.ndarray | None
    output: Affine

    @property
    def lowest(self) -> int:
        """The least value that a product is clamped to: that of real 0 with ReLU, else -128."""
        return self.product.zero if self.activation == "relu" else LOWEST

    @property
    def folded_bias(self) -> np.ndarray:
        """bias[j] - z_x·Σ_k weight[j, k] as (m,) int64, so that acc[j] = folded_bias[j] + Σ_k q_x[k]·weight[j, k]."""
        folded: np.ndarray = self.bias - self.input.zero * self.weight.sum(axis=1, dtype=np.int64)
        return folded

    @property
    def largest_accumulator(self) -> int:
        """max_j |folded_bias[j]| + 128·Σ_k |weight[j, k]|: no sum on the way is larger, in any order."""
        sizes = abs(self.weight.astype(np.int64)).sum(axis=1)
        return int((abs(self.folded_bias) - LOWEST * sizes).max())

    def accumulators(self, x: np.ndarray) -> np.ndarray:
        """acc (n, m) int64, each within int32, of x (n, k) int8.

        The product is one of float64 numbers, which hold these integers, and every sum of them, exactly.
        """
        product = x.astype(np.float64) @ self.weight.T.astype(np.float64)
        return product.astype(np.int64) + self.folded_bias

    def run(self, x: np.ndarray) -> np.ndarray:
        """The layer's int8 results (n, m) of its int8 inputs x (n, k)."""
        scaled = rounding_shift(self.accumulators(x) * self.multiplier, self.shift)
        result = np.clip(scaled + self.product.zero, self.lowest, HIGHEST)
        return result.astype(np.int8) if self.table is None else self.table[result - LOWEST]


@dataclass(frozen=True, eq=False)
class Quantised:
    """A network in int8, from raw features to logits; every sum in it is proven to fit into 32 bits.

    layers : one at least; each takes what the one before puts out.
    mean, deviation : (k,) float32, of raw features, which are brought to one scale before they become int8.
    class_names : one for each logit.
    calibration : where the ranges are from: "min-max", "percentile 99.9", "percentile 99.9, logits min-max".
    divergence : KL(float network ‖ this) in nats, the mean over the rows it was measured on.
    tried : the calibrations that were compared, each with its divergence.

    Raises
    ------
    ArgumentError : a layer's sums may leave 32 bits.  ShapeError : the layers do not chain.
    """

    layers: tuple[QuantisedLayer, ...]
    mean: np.ndarray
    deviation: np.ndarray
    class_names: tuple[str, ...]
    calibration: str = ""
    divergence: float = float("nan")
    tried: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Prove that no accumulator overflows."""
        inputs = len(self.mean)
        for number, layer in enumerate(self.layers):
            if layer.weight.shape[1] != inputs:
                got = f"one that takes {layer.weight.shape[1]}"
                raise ShapeError("quantise", f"layer {number}", expected=f"one that takes {inputs} numbers", got=got)
            inputs = len(layer.weight)
            largest = layer.largest_accumulator
            if largest >= 2**31:
                fix = "Fewer inputs or a smaller bias would do; a layer in float32 has no such limit."
                expected = "one whose sums stay below 2^31 in size for all int8 inputs"
                raise ArgumentError("quantise", f"layer {number}", expected=expected, got=f"up to {largest}", fix=fix)

    def with_weights(self, network: Network) -> Quantised:
        """Another network's layers, of the same sizes and activations, written with the ranges of this one."""
        ranges = [(layer.product, layer.output) for layer in self.layers]
        return replace(self, layers=_layers(network, self.input, ranges))

    def measured(self, network: Network, rows: np.ndarray) -> Quantised:
        """The same with its divergence from the float network on these normalised rows (n, k)."""
        return _measured(self, rows, _flows(network, rows)[-1].product)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features, hidden layers, classes."""
        return (self.layers[0].weight.shape[1], *(len(layer.weight) for layer in self.layers))

    @property
    def input(self) -> Affine:
        """How the normalised features are written."""
        return self.layers[0].input

    @property
    def output(self) -> Affine:
        """How the logits are written."""
        return self.layers[-1].output

    def quantise_input(self, x: Any) -> np.ndarray:
        """Raw features (n, k) as int8: (x - mean) / deviation and then `input.quantise`, each step in float32."""
        return self.input.quantise(normalised(x, self.mean, self.deviation))

    def integers(self, x: np.ndarray) -> np.ndarray:
        """The int8 logits (n, c) of int8 inputs (n, k): what every build of the exported network gives, bit by bit.

        Raises
        ------
        ArgumentError : x is no such array.
        """
        if x.dtype != np.int8 or x.ndim != 2 or x.shape[1] != self.sizes[0]:
            expected, got = f"int8 of shape (n, {self.sizes[0]})", f"{x.dtype} of shape {x.shape}"
            fix = "Raw features become such integers by quantise_input(x)."
            raise ArgumentError("integers", "x", expected=expected, got=got, fix=fix)
        for layer in self.layers:
            x = layer.run(x)
        return x

    def logits(self, x: Any) -> np.ndarray:
        """The logits (n, c) float32 of raw features (n, k)."""
        return self.output.dequantise(self.integers(self.quantise_input(x)))

    def predict(self, x: Any) -> np.ndarray:
        """The class id (n,) of each row of raw features (n, k): the first of the largest int8 logits."""
        return self.integers(self.quantise_input(x)).argmax(axis=1)

    def predict_proba(self, x: Any) -> np.ndarray:
        """Class probabilities (n, c) of raw features (n, k)."""
        return np.asarray(F.of_host(F.softmax, self.logits(x)))


# --- integers ---


def fixed_point(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and shifts, int32, with ratio ≈ multiplier·2^-shift to 31 bits, for ratios above 0 in float64.

    A ratio below 2^-32 has fewer bits, since 62 is the greatest shift: it takes any accumulator to 0. One from 2^30 on
    becomes nearly 2^30, which takes any accumulator but 0 beyond int8.
    """
    exponent = np.frexp(ratio)[1]
    shift = np.clip(31 - exponent, LEAST_SHIFT, GREATEST_SHIFT)
    multiplier = np.rint(np.ldexp(np.minimum(ratio, 2.0**31), shift))
    carried = (multiplier == 2**31) & (shift > LEAST_SHIFT)  # 0.99… was rounded to 1
    multiplier, shift = np.where(carried, 2**30, multiplier), shift - carried
    return np.minimum(multiplier, 2**31 - 1).astype(np.int32), shift.astype(np.int32)


def rounding_shift(values: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """floor((values + 2^(shift - 1)) / 2^shift) of int64 below 2^62 in size: to the nearest, halves upwards."""
    shift = shift.astype(np.int64)
    found: np.ndarray = (values + (np.int64(1) << (shift - 1))) >> shift
    return found


def normalised(x: Any, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """(x - mean) / deviation in float32 for rows x (n, k); ShapeError if they are no such rows."""
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != len(mean):
        raise ShapeError("quantise", "x", expected=f"rows of {len(mean)} features", got=f"shape {rows.shape}")
    with np.errstate(over="ignore"):
        return (rows.astype(np.float32) - mean) / deviation


# --- from a network to integers ---


def quantise(
    network: Network, x: Any, *, calibration: str = "best", percentile: float = 99.9, on_scale: bool = False
) -> Quantised:
    """The network in int8, with the ranges of what flows through it taken from rows of features.

    Parameters
    ----------
    network : in float32.
    x : (n, k) raw features like those it will meet, such as some hundred rows of the training part.
    calibration : "min-max" takes the whole range that was seen. "percentile" leaves out what lies beyond the
        percentile and its mirror, which may cost outliers and makes steps finer. "best" tries min-max and several
        percentiles on three quarters of the rows, for the logits and for all before them in every combination, and
        takes the one whose logits have the smallest KL divergence from those of the float network, on the other rows.
    percentile : of "percentile", from 50 to 100.
    on_scale : whether x was normalised already, as the rows of a `Dataset` are.

    Raises
    ------
    ArgumentError : a layer's sums may leave 32 bits; x or what it leads to is not finite; an unknown calibration.
    ShapeError : x is not (n, k) with a row at least.
    """
    if calibration not in CALIBRATIONS:
        expected = "one of " + ", ".join(CALIBRATIONS)
        raise ArgumentError("quantise", "calibration", expected=expected, got=repr(calibration))
    if not 50 <= percentile <= 100:
        raise ArgumentError("quantise", "percentile", expected="from 50 to 100", got=repr(percentile))
    plain = np.zeros_like(network.mean), np.ones_like(network.deviation)
    rows = normalised(x, *(plain if on_scale else (network.mean, network.deviation)))
    if not len(rows):
        raise ShapeError("quantise", "x", expected="a row of features at least", got="none")
    shares = {"min-max": (WHOLE,), "percentile": (percentile,), "best": (WHOLE, *PERCENTILES)}[calibration]
    judged = np.arange(len(rows)) % HELD_BACK == HELD_BACK - 1
    if calibration != "best" or not judged.any():
        return _best(network, rows, rows, shares)
    return _best(network, rows[~judged], rows[judged], shares)


def _best(network: Network, seen: np.ndarray, judged: np.ndarray, shares: Sequence[float]) -> Quantised:
    """The network with the ranges of `seen` rows, of those shares of them the one that does best on `judged` rows."""
    flows, truth = _flows(network, seen), _flows(network, judged)[-1].product
    ranges = {share: _ranges(network, seen, flows, share) for share in shares}
    found: list[Quantised] = []
    for share, of_logits in itertools.product(shares, shares):
        source, written = ranges[share]
        layers = _layers(network, source, [*written[:-1], ranges[of_logits][1][-1]])
        name = _name(share) + ("" if of_logits == share else f", logits {_name(of_logits)}")
        candidate = Quantised(layers, network.mean, network.deviation, network.class_names, name)
        found.append(_measured(candidate, judged, truth))
    best = min(found, key=lambda candidate: candidate.divergence)
    return replace(best, tried=tuple((candidate.calibration, candidate.divergence) for candidate in found))


def _measured(network: Quantised, rows: np.ndarray, truth: np.ndarray) -> Quantised:
    """The network with its divergence from these logits (n, c) on these normalised rows (n, k)."""
    scores = network.output.dequantise(network.integers(network.input.quantise(rows)))
    return replace(network, divergence=metrics.kl_to_teacher(scores, truth))


def _name(share: float) -> str:
    return "min-max" if share == WHOLE else f"percentile {share:g}"


class _Flow(NamedTuple):
    """What a layer gave of the calibration's rows: product and result, (n, m) float32."""

    product: np.ndarray
    result: np.ndarray


def _flows(network: Network, rows: np.ndarray) -> list[_Flow]:
    """What every layer makes of normalised rows; ArgumentError where that is not finite."""
    found: list[_Flow] = []
    for number, layer in enumerate(network.layers):
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.asarray(F.of_host(F.linear, rows, layer.weight, layer.bias))
        if not np.isfinite(product).all():
            fix = "Look for NaN and infinity in the features, and for weights that have diverged."
            expected = "finite for all rows of the calibration"
            got = "NaN or infinity"
            raise ArgumentError("quantise", f"the output of layer {number}", expected=expected, got=got, fix=fix)
        rows = np.asarray(F.of_host(getattr(F, layer.activation), product)) if layer.activation else product
        found.append(_Flow(product, rows))
    return found


def _range(values: np.ndarray, share: float) -> tuple[float, float]:
    """Between which numbers this share of the values lies, in per cent: from its mirror to that percentile."""
    if share == WHOLE:
        return float(values.min()), float(values.max())
    low, high = np.percentile(values, [100 - share, share])
    return float(low), float(high)


def _ranges(
    network: Network, rows: np.ndarray, flows: Sequence[_Flow], share: float
) -> tuple[Affine, list[tuple[Affine, Affine]]]:
    """How inputs are written, and of each layer the product and the result, with this share of what was seen."""
    found: list[tuple[Affine, Affine]] = []
    for layer, flow in zip(network.layers, flows, strict=True):
        product = output = Affine.of(*_range(flow.result, share))
        if layer.activation in BENDS:
            low, high = _range(flow.product, share)
            least, most = BENDS[layer.activation]
            product = Affine.of(max(low, least), min(high, most))
        found.append((product, output))
    return Affine.of(*_range(rows, share)), found


def _layers(network: Network, source: Affine, ranges: Sequence[tuple[Affine, Affine]]) -> tuple[QuantisedLayer, ...]:
    """The layers in integers, where inputs, products and results are written as these say."""
    found: list[QuantisedLayer] = []
    for layer, (product, output) in zip(network.layers, ranges, strict=True):
        found.append(_layer(layer, source, product, output))
        source = output
    return tuple(found)


def _layer(layer: Layer, source: Affine, product: Affine, output: Affine) -> QuantisedLayer:
    weight_scale = _weight_scale(layer, source)
    steps = source.scale * weight_scale.astype(np.float64)
    multiplier, shift = fixed_point(steps / product.scale)
    return QuantisedLayer(
        weight=_whole(layer.weight / weight_scale.astype(np.float64)[:, None], LARGEST_WEIGHT).astype(np.int8),
        weight_scale=weight_scale,
        bias=_whole(layer.bias / steps, 2**31 - 1).astype(np.int32),
        activation=layer.activation,
        input=source,
        product=product,
        multiplier=multiplier,
        shift=shift,
        table=_table(layer.activation, product, output),
        output=output,
    )


def _table(activation: str, product: Affine, output: Affine) -> np.ndarray | None:
    """The result of each product from -128 to 127, (256,) int8; None for activations that need none."""
    if activation not in BENDS:
        return None
    every = product.scale * (np.arange(LOWEST, HIGHEST + 1) - product.zero).astype(np.float64)
    return output.quantise(F.of_host(getattr(F, activation), every))


def _weight_scale(layer: Layer, source: Affine) -> np.ndarray:
    """max_k |w[j, k]| / 127 of each output as (m,) float32, and 1 where an output has neither weights nor a bias.

    Beside a bias that would have more than 30 bits in such steps, weights are as good as none: there the bias decides.
    """
    largest = abs(layer.weight).max(axis=1).astype(np.float64) / LARGEST_WEIGHT
    for_bias = abs(layer.bias).astype(np.float64) / (source.scale * LARGEST_BIAS)
    scale = np.maximum(largest, for_bias)
    return np.where(scale > 0, np.maximum(scale, LEAST_SCALE), 1).astype(np.float32)


def _whole(values: np.ndarray, limit: int) -> np.ndarray:
    """Rounded to whole numbers, halves to even, within ±limit."""
    return np.clip(np.rint(values), -limit, limit)
