"""Networks in int8: the integers are those of the formulas, nothing overflows, and little of the network is lost."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikd import functional as F
from minikd.data import Normalisation, load
from minikd.errors import ArgumentError, ShapeError
from minikd.export.finetune import Finetuned, Rounded, finetune
from minikd.export.network import Layer, Network
from minikd.export.quantise import (
    CALIBRATIONS,
    PERCENTILES,
    Affine,
    Quantised,
    QuantisedLayer,
    fixed_point,
    quantise,
    rounding_shift,
)
from minikd.metrics import kl_to_teacher
from minikd.nn import MLP, Linear, Sequential
from minikd.ops.elementwise import ACTIVATIONS
from minikd.training import fit

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
seeds = st.integers(0, 2**32 - 1)


def network(sizes: list[int], activation: str = "relu", seed: int = 0, spread: float = 1.0) -> Network:
    """One with random weights and biases, whose features have a scale each."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(
            (spread * rng.normal(size=(m, k)) / math.sqrt(k)).astype(np.float32),
            (spread * rng.normal(size=m)).astype(np.float32),
            activation if number < len(sizes) - 2 else "",
        )
        for number, (k, m) in enumerate(itertools.pairwise(sizes))
    )
    mean, deviation = rng.normal(size=sizes[0]), rng.uniform(0.5, 2, sizes[0])
    names = tuple(f"class {k}" for k in range(sizes[-1]))
    return Network(layers, mean.astype(np.float32), deviation.astype(np.float32), names)


def features(n: Network, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    x: np.ndarray = n.mean + n.deviation * rng.normal(size=(rows, n.sizes[0])).astype(np.float32)
    return x


def all_of_int8(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Integers of the whole range, its ends more often than the rest."""
    rng = np.random.default_rng([seed, 2])
    x = rng.integers(-128, 128, (rows, columns))
    return np.where(rng.random(x.shape) < 0.3, rng.choice([-128, 127], x.shape), x).astype(np.int8)


def float_logits(n: Network, x: np.ndarray) -> np.ndarray:
    x = (x - n.mean) / n.deviation
    for layer in n.layers:
        x = F.linear(x, layer.weight, layer.bias, layer.activation or None)
    return x


@st.composite
def quantised_networks(draw: Any) -> Quantised:
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    activation, seed = draw(st.sampled_from(list(ACTIVATIONS))), draw(seeds)
    spread = draw(st.sampled_from([1e-6, 0.3, 1.0, 30.0]))
    found = network(sizes, activation, seed, spread)
    rows = draw(st.integers(1, 30))
    return quantise(found, features(found, rows, seed), calibration=draw(st.sampled_from(CALIBRATIONS)))


# --- the integers ---


def by_hand(q: Quantised, row: np.ndarray) -> list[int]:
    """The int8 logits of one row of int8, with Python's integers, straight from the formulas."""
    x = [int(v) for v in row]
    for layer in q.layers:
        y = []
        for j in range(len(layer.bias)):
            acc = int(layer.bias[j])
            for k, v in enumerate(x):
                acc += (v - layer.input.zero) * int(layer.weight[j, k])
            assert abs(acc) < 2**31
            m, r = int(layer.multiplier[j]), int(layer.shift[j])
            scaled = (acc * m + 2 ** (r - 1)) // 2**r
            least = layer.product.zero if layer.activation == "relu" else -128
            product = min(max(layer.product.zero + scaled, least), 127)
            y.append(product if layer.table is None else int(layer.table[product + 128]))
        x = y
    return x


@given(quantised_networks(), seeds)
def test_the_integers_are_those_that_are_computed_by_hand(q: Quantised, seed: int) -> None:
    x = all_of_int8(7, q.sizes[0], seed)
    got = q.integers(x)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, [by_hand(q, row) for row in x])


@given(quantised_networks())
def test_predictions_are_the_integers_dressed_up(q: Quantised) -> None:
    rng = np.random.default_rng(0)
    x = q.mean + q.deviation * rng.normal(size=(5, q.sizes[0])).astype(np.float32)
    integers = q.integers(q.quantise_input(x))
    np.testing.assert_array_equal(q.predict(x), integers.argmax(axis=1))
    expected = np.float32(q.output.scale) * (integers.astype(np.float32) - q.output.zero)
    np.testing.assert_array_equal(q.logits(x), expected)
    np.testing.assert_allclose(q.predict_proba(x).sum(axis=1), 1, rtol=1e-5)


@given(st.integers(-(2**62) + 1, 2**62 - 1), st.integers(1, 62))
def test_products_are_rounded_to_the_nearest_and_halves_upwards(value: int, shift: int) -> None:
    expected = math.floor(Fraction(value, 2**shift) + Fraction(1, 2))
    assert rounding_shift(np.array([value]), np.array([shift], np.int32)).tolist() == [expected]


def test_halves_go_upwards_on_both_sides_of_zero() -> None:
    halves = np.array([-5, -3, -1, 1, 3, 5])
    assert rounding_shift(halves, np.ones(6, np.int32)).tolist() == [-2, -1, 0, 1, 2, 3]


@given(st.floats(2.0**-31, 2.0**30, exclude_max=True))
def test_a_ratio_becomes_a_multiplier_of_31_bits(ratio: float) -> None:
    (m,), (r,) = (v.tolist() for v in fixed_point(np.array([ratio])))
    assert 2**30 <= m < 2**31
    assert 1 <= r <= 62
    assert abs(Fraction(m, 2**r) - Fraction(ratio)) <= Fraction(ratio) / 2**30


def test_a_ratio_just_below_a_power_of_two_is_carried_to_it() -> None:
    m, r = fixed_point(np.array([1 - 2.0**-40, 0.5 - 2.0**-41]))
    assert m.tolist() == [2**30, 2**30]
    assert r.tolist() == [30, 31]


@pytest.mark.parametrize(("ratio", "most"), [(2.0**-33, 0), (1e-200, 0), (2.0**30, 127), (1e200, 127)])
def test_ratios_beyond_all_shifts_still_act_as_they_should(ratio: float, most: int) -> None:
    m, r = fixed_point(np.array([ratio]))
    extreme = np.array([2**31 - 1 if most == 0 else 1])
    assert np.clip(rounding_shift(extreme * m, r), -128, 127).tolist() == [most]
    assert np.clip(rounding_shift(-extreme * m, r), -128, 127).tolist() == [-128 if most else 0]


# --- nothing overflows ---


@given(quantised_networks(), seeds)
def test_no_sum_on_the_way_leaves_what_was_proven(q: Quantised, seed: int) -> None:
    x = all_of_int8(4, q.sizes[0], seed).astype(np.int64)
    for layer in q.layers:
        sums = np.cumsum(x[:, None, :] * layer.weight.astype(np.int64), axis=2) + layer.folded_bias[:, None]
        assert abs(sums).max() <= layer.largest_accumulator < 2**31
        x = layer.run(x.astype(np.int8)).astype(np.int64)


def test_the_proof_is_sharp_where_all_products_have_one_sign() -> None:
    n = Network((Layer(np.ones((1, 5), np.float32), np.zeros(1, np.float32), ""),), *_plain(5), ("a",))
    layer = quantise(n, np.array([[1.0] * 5, [0.0] * 5])).layers[0]
    assert layer.input.zero == -128
    assert layer.largest_accumulator == 128 * 127 * 5 + 128 * 127 * 5


def _plain(inputs: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(inputs, np.float32), np.ones(inputs, np.float32)


def test_a_layer_that_may_overflow_is_refused_by_its_number() -> None:
    wide = 2**31 // (2 * 128 * 127) + 1
    layers = (
        Layer(np.ones((wide, 1), np.float32), np.zeros(wide, np.float32), "relu"),
        Layer(np.ones((2, wide), np.float32), np.zeros(2, np.float32), ""),
    )
    n = Network(layers, *_plain(1), ("a", "b"))
    with pytest.raises(ArgumentError, match=r"layer 1 must be one whose sums stay below 2\^31 .* got up to 21\d{8}\."):
        quantise(n, np.array([[0.0], [1.0]]))


def test_layers_that_do_not_chain_are_refused() -> None:
    q = quantise(network([3, 4, 2]), features(network([3, 4, 2]), 9))
    with pytest.raises(ShapeError, match="layer 1 must be one that takes 4 numbers, got one that takes 3"):
        replace(q, layers=(q.layers[0], q.layers[0]))


# --- real numbers and their integers ---


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_a_range_is_covered_to_half_a_step_and_zero_is_exact(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    affine = Affine.of(low, high)
    assert affine.dequantise(affine.quantise([0.0])).tolist() == [0]
    ends = np.array([low, high])
    error = abs(affine.dequantise(affine.quantise(ends)) - ends)
    assert (error <= affine.scale * (1 + 1e-5)).all()
    inside = np.linspace(low + affine.scale, max(low + affine.scale, high - affine.scale), 50)
    error = abs(affine.dequantise(affine.quantise(inside)) - inside)
    if high - low > 4 * affine.scale:
        assert (error <= affine.scale * 0.501).all()


def test_halves_become_even_steps_and_what_is_outside_is_clamped() -> None:
    affine = Affine(0.5, 3)
    x = [0.25, 0.75, 1.25, -0.25, -0.75, 1e30, -1e30, np.inf, -np.inf, np.nan]
    assert affine.quantise(x).tolist() == [3, 5, 5, 3, 1, 127, -128, 127, -128, 3]


def test_an_empty_range_is_that_of_zero() -> None:
    assert Affine.of(0, 0) == Affine(1.0, -128)
    assert Affine.of(0, 1e-30).scale > 0


@given(quantised_networks())
def test_weights_come_back_to_half_a_step(q: Quantised) -> None:
    for layer in q.layers:
        assert layer.weight.dtype == np.int8
        assert layer.weight.min() >= -127
        assert (layer.weight_scale > 0).all()
        assert layer.bias.dtype == layer.multiplier.dtype == layer.shift.dtype == np.int32


@given(seeds)
def test_every_weight_is_within_half_a_step_and_the_largest_is_127(seed: int) -> None:
    n = network([6, 5, 3], seed=seed)
    for layer, was in zip(quantise(n, features(n, 20, seed)).layers, n.layers, strict=True):
        scale = layer.weight_scale.astype(np.float64)[:, None]
        assert (abs(scale * layer.weight - was.weight) <= 0.5001 * scale).all()
        assert (abs(layer.weight).max(axis=1) == 127).all()
        steps = layer.input.scale * scale[:, 0]
        assert (abs(steps * layer.bias - was.bias) <= 0.5001 * steps).all()


@given(seeds, st.sampled_from(list(ACTIVATIONS)))
def test_a_layer_gives_what_float_gives_of_the_same_numbers_to_a_step(seed: int, activation: str) -> None:
    n = network([7, 6, 4], activation, seed)
    q = quantise(n, features(n, 50, seed), calibration="min-max")
    x = all_of_int8(20, 7, seed)
    for layer in q.layers:
        real = layer.input.scale * (x.astype(np.float64) - layer.input.zero)
        weight = layer.weight_scale.astype(np.float64)[:, None] * layer.weight
        product = real @ weight.T + layer.bias * (layer.input.scale * layer.weight_scale.astype(np.float64))
        wanted = activated(layer, product)
        got = layer.run(x)
        reached = layer.output.scale * (got.astype(np.float64) - layer.output.zero)
        assert (abs(reached - wanted) <= layer.output.scale / 2 + slack(layer)).all()
        x = got


def activated(layer: QuantisedLayer, product: np.ndarray) -> np.ndarray:
    """The layer's results in float64, within the ranges that its integers have."""
    product = np.clip(product, *ends(layer.product))
    if layer.activation == "relu":
        return np.maximum(product, 0)
    return np.clip(getattr(F, layer.activation)(product) if layer.activation else product, *ends(layer.output))


def ends(affine: Affine) -> tuple[float, float]:
    return affine.scale * (-128 - affine.zero), affine.scale * (127 - affine.zero)


def slack(layer: QuantisedLayer) -> float:
    """What a table may lose beside its own rounding: half a step of the product, at the steepest slope."""
    steepest = 0 if layer.table is None else {"tanh": 1, "sigmoid": 0.25, "gelu": 1.13}[layer.activation]
    return layer.product.scale / 2 * steepest + 1e-6 * layer.output.scale


@each_activation
def test_a_table_holds_the_activation_of_each_int8(activation: str) -> None:
    n = network([5, 8, 3], activation)
    layer = quantise(n, features(n, 40)).layers[0]
    if activation == "relu":
        assert layer.table is None
        assert layer.output == layer.product
        return
    assert layer.table is not None
    for q, got in zip(range(-128, 128), layer.table.tolist(), strict=True):
        y = float(getattr(F, activation)(np.float64(layer.product.scale * (q - layer.product.zero))))
        wanted = min(max(y / layer.output.scale + layer.output.zero, -128), 127)
        assert abs(got - wanted) <= 0.5 + 1e-4


def test_relu_is_a_lower_bound_at_real_zero() -> None:
    n = network([5, 8, 3])
    layer = quantise(n, features(n, 40)).layers[0]
    results = layer.run(all_of_int8(100, 5))
    assert results.min() == layer.lowest == layer.product.zero
    last = quantise(n, features(n, 40)).layers[1]
    assert last.lowest == -128


def test_outputs_whose_weights_are_as_good_as_none_keep_their_bias() -> None:
    weight = np.array([[0, 0], [1e-30, 0], [1e-9, -1e-9], [0, 0]], np.float32)
    layer = Layer(weight, np.array([3, -2, 1, 0], np.float32), "")
    q = quantise(Network((layer,), *_plain(2), tuple("abcd")), np.array([[1.0, 1.0], [-1.0, 0.5]]))
    np.testing.assert_allclose(q.logits([[1.0, 1.0]]), [[3, -2, 1, 0]], atol=q.output.scale / 2 + 1e-6)
    assert (abs(q.layers[0].bias) < 2**30 + 2**7).all()


# --- calibration ---


def test_best_takes_what_diverges_least_on_rows_that_it_did_not_see() -> None:
    n = network([12, 10, 5], "gelu", seed=4)
    x = features(n, 400)
    q = quantise(n, x)
    whole = ["min-max", *(f"percentile {p:g}" for p in PERCENTILES)]
    assert {name for name, _ in q.tried} == {a if a == b else f"{a}, logits {b}" for a in whole for b in whole}
    assert (q.calibration, q.divergence) == min(q.tried, key=lambda entry: entry[1])
    held_back = x[3::4]
    measured = kl_to_teacher(q.logits(held_back), float_logits(n, held_back))
    assert q.divergence == pytest.approx(measured, rel=1e-3)


def test_an_outlier_costs_min_max_its_fineness_and_a_percentile_leaves_it_out() -> None:
    n = network([12, 10, 5], seed=4)
    x = features(n, 400)
    x[0, 0] += 3000
    coarse, fine = (quantise(n, x, calibration=kind) for kind in ("min-max", "percentile"))
    assert fine.input.scale < coarse.input.scale / 20
    best = quantise(n, x)
    assert best.calibration.startswith("percentile")
    assert best.divergence < 0.1 * dict(best.tried)["min-max"]
    assert quantise(n, x, calibration="percentile", percentile=100).calibration == "min-max"


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_single_row_is_enough_to_calibrate(calibration: str) -> None:
    n = network([4, 3, 2])
    assert np.isfinite(quantise(n, features(n, 1), calibration=calibration).divergence)


def test_min_max_covers_all_that_was_seen() -> None:
    n = network([6, 5, 4])
    x = features(n, 30)
    q = quantise(n, x, calibration="min-max")
    scaled = (x - n.mean) / n.deviation
    low, high = ends(q.input)
    assert low - q.input.scale <= scaled.min()
    assert scaled.max() <= high + q.input.scale
    assert abs(q.logits(x) - float_logits(n, x)).max() < 0.1


def test_rows_on_the_networks_scale_calibrate_alike() -> None:
    n = network([6, 5, 4])
    x = features(n, 30)
    raw, scaled = quantise(n, x), quantise(n, (x - n.mean) / n.deviation, on_scale=True)
    assert raw.input == scaled.input
    np.testing.assert_array_equal(raw.logits(x), scaled.logits(x))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"x": np.ones((2, 3))}, ShapeError, "x must be rows of 4 features"),
        ({"x": np.ones(4)}, ShapeError, "x must be rows of 4 features"),
        ({"x": np.ones((0, 4))}, ShapeError, "x must be a row of features at least"),
        ({"x": np.full((2, 4), np.nan)}, ArgumentError, "the output of layer 0 must be finite"),
        ({"calibration": "entropy"}, ArgumentError, "calibration must be one of min-max, percentile, best"),
        ({"percentile": 30}, ArgumentError, "percentile must be from 50 to 100"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_words(given: dict[str, Any], error: Any, words: str) -> None:
    n = network([4, 3, 2])
    x = given.pop("x", features(n, 5))
    with pytest.raises(error, match=words):
        quantise(n, x, **given)


@pytest.mark.parametrize("x", [np.ones((2, 4)), np.ones((2, 3), np.int8), np.ones(4, np.int8)])
def test_integers_are_asked_of_integers(x: np.ndarray) -> None:
    n = network([4, 3, 2])
    with pytest.raises(ArgumentError, match=r"integers: x must be int8 of shape \(n, 4\), got"):
        quantise(n, features(n, 5)).integers(x)


# --- training on with the roundings in the loop ---


@pytest.fixture(scope="module")
def lesson() -> tuple[MLP, Any, np.ndarray]:
    """A small student of the digits, their data, and what a teacher says of the rows to train on."""
    data = load("digits")
    teacher = MLP([64, 64, 10], seed=1)
    fit(teacher, data.x_train, data.y_train, epochs=15)
    soft = teacher.logits(data.x_train, normalised=True)
    student = MLP([64, 8, 10], seed=0)
    fit(student, data.x_train, data.y_train, soft, epochs=20)
    student.normalisation, student.class_names = data.normalisation, data.class_names
    return student, data, soft


@pytest.fixture(scope="module")
def finetuned(lesson: tuple[MLP, Any, np.ndarray]) -> Finetuned:
    student, data, soft = lesson
    return finetune(student, data.x_train, data.y_train, soft, on_scale=True, epochs=10)


def test_a_students_int8_form_is_nearly_as_good_as_itself(lesson: tuple[MLP, Any, np.ndarray]) -> None:
    student, data, _ = lesson
    q, x = quantise(Network.of(student), data.raw(data.x_train)), data.raw(data.x_test)
    assert kl_to_teacher(q.logits(x), student.logits(x)) < 0.001
    assert (q.predict(x) == student.predict(x)).mean() > 0.98


def test_training_on_brings_the_int8_student_nearer_to_its_teacher(
    lesson: tuple[MLP, Any, np.ndarray], finetuned: Finetuned
) -> None:
    student, data, soft = lesson
    x = data.raw(data.x_train)
    before, after = (kl_to_teacher(q.logits(x), soft) for q in (finetuned.before, finetuned.quantised))
    assert after < 0.95 * before
    assert len(finetuned.history) == 10
    assert finetuned.model.class_names == student.class_names


def test_the_ranges_of_the_training_are_those_that_are_shipped(finetuned: Finetuned) -> None:
    for before, after in zip(finetuned.before.layers, finetuned.quantised.layers, strict=True):
        assert (after.input, after.product, after.output) == (before.input, before.product, before.output)
    assert finetuned.quantised.divergence != finetuned.before.divergence


def test_the_student_itself_stays_as_it_was(lesson: tuple[MLP, Any, np.ndarray], finetuned: Finetuned) -> None:
    student, data, _ = lesson
    fresh = quantise(Network.of(student), data.x_train, on_scale=True)
    for now, before in zip(fresh.layers, finetuned.before.layers, strict=True):
        np.testing.assert_array_equal(now.weight, before.weight)
    assert not np.array_equal(student.state_dict()["0.weight"], finetuned.model.state_dict()["0.weight"])


def test_training_on_gives_the_same_bits_again(lesson: tuple[MLP, Any, np.ndarray]) -> None:
    student, data, soft = lesson
    pair = [finetune(student, data.raw(data.x_train), data.y_train, soft, epochs=1).model for _ in "ab"]
    for a, b in zip(*(model.state_dict().values() for model in pair), strict=True):
        np.testing.assert_array_equal(a, b)


def test_validation_rows_are_measured_in_int8s_roundings(lesson: tuple[MLP, Any, np.ndarray]) -> None:
    student, data, soft = lesson
    validation = data.raw(data.x_validation), data.y_validation
    found = finetune(student, data.raw(data.x_train), data.y_train, soft, epochs=2, validation=validation)
    shipped = float((found.quantised.predict(validation[0]) == validation[1]).mean())
    assert found.history[-1]["validation_accuracy"] == pytest.approx(shipped, abs=0.01)


@each_activation
def test_the_network_in_training_computes_what_int8_will_give(activation: str) -> None:
    model = MLP([9, 12, 7, 5], activation, seed=2)
    rng = np.random.default_rng(3)
    model.normalisation = Normalisation(rng.normal(size=9).astype(np.float32), np.full(9, 2, np.float32))
    x = (2 * rng.normal(size=(200, 9)) + model.normalisation.mean).astype(np.float32)
    q = quantise(Network.of(model), x)
    simulated = Rounded(model, q).logits(model.normalisation.apply(x))
    steps = abs(simulated - q.logits(x)) / q.output.scale
    assert steps.max() < 1.01
    assert (steps < 0.01).mean() > 0.97


def test_the_network_in_training_has_the_models_layers_and_parameters() -> None:
    model = MLP([4, 6, 3], "tanh", dropout=0.2)
    model.eval()
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    found = Rounded(model, quantise(Network.of(model), x))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(found.parameters(), model.parameters(), strict=True))
    _, layers = found.eval()(x, features=["0", "1"])
    assert layers["1"].shape == (20, 6)


def test_only_an_mlp_is_trained_on() -> None:
    with pytest.raises(ArgumentError, match="model must be an MLP, got Sequential"):
        finetune(Sequential(Linear(2, 2)), np.ones((3, 2)), np.zeros(3, np.int64))
