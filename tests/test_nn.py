"""Layers and networks: names, initial weights, dropout, features, predictions, and the arena of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, ShapeError
from minikd.nn import GELU, MLP, Arena, Dropout, Linear, Module, ReLU, Sequential, Sigmoid, Tanh, initial_weights
from minikd.ops.random import philox, random_words
from minikd.tape import is_recording


def rows(n: int, k: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)


# --- names and values of parameters ---


def test_an_mlp_names_its_parameters_as_a_pytorch_sequential() -> None:
    plain, dropping = MLP([4, 3, 5, 2]), MLP([4, 3, 5, 2], dropout=0.5, input_dropout=0.2)
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert list(dropping.state_dict()) == ["1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "7.bias"]
    assert [p.shape for p in plain.parameters()] == [(3, 4), (3,), (5, 3), (5,), (2, 5), (2,)]
    assert plain.parameter_count == 4 * 3 + 3 + 3 * 5 + 5 + 5 * 2 + 2
    assert all(p.requires_grad for p in plain.parameters())


def test_the_same_seed_gives_the_same_network_and_another_seed_another() -> None:
    first, again, other = MLP([4, 3, 2], seed=5), MLP([4, 3, 2], seed=5), MLP([4, 3, 2], seed=6)
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)
    assert not np.array_equal(first.state_dict()["0.weight"], other.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("activation", "variance"),
    [("relu", 2 / 300), ("gelu", 2 / 300), ("tanh", 2 / 500), ("sigmoid", 2 / 500), (None, 2 / 500)],
)
def test_initial_weights_have_the_variance_of_he_or_glorot(activation: str | None, variance: float) -> None:
    w = initial_weights(np.random.default_rng(1), 200, 300, activation, np.float64)
    assert w.shape == (200, 300)
    assert w.var() == pytest.approx(variance, rel=0.02)
    assert abs(w.mean()) < 4 * math.sqrt(variance / w.size)


def test_biases_begin_at_zero_and_can_be_left_out() -> None:
    layer = Linear(3, 2)
    assert not layer.bias.numpy().any()
    without = Linear(3, 2, bias=False)
    assert list(without.state_dict()) == ["weight"]
    y = without(np.ones((1, 3), np.float32)).numpy()
    np.testing.assert_allclose(y[0], without.weight.numpy().sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_network_computes_in_the_dtype_it_was_made_with(dtype: Any) -> None:
    model = MLP([3, 4, 2], dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    assert model(kd.Tensor(rows(2, 3))).dtype == dtype
    assert model.logits(rows(2, 3)).dtype == dtype


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: MLP([4]), "sizes"),
        (lambda: MLP([4, 0, 2]), "sizes"),
        (lambda: MLP([4, 2.5]), "sizes"),
        (lambda: MLP([4, 2], activation="swish"), "activation"),
        (lambda: MLP([4, 3, 2], dropout=1.0), "p"),
        (lambda: Linear(0, 3), "inputs"),
        (lambda: Linear(3, -1), "outputs"),
        (lambda: Dropout(-0.1), "p"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(make: Callable[[], Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument


# --- state ---


def test_a_state_makes_the_round_trip_and_is_a_copy() -> None:
    first, second = MLP([4, 3, 2], seed=1), MLP([4, 3, 2], seed=2)
    state, x = first.state_dict(), rows(5, 4)
    assert not np.array_equal(first.logits(x), second.logits(x))
    second.load_state_dict(state)
    np.testing.assert_array_equal(first.logits(x), second.logits(x))
    state["0.weight"][...] = 0
    assert first.state_dict()["0.weight"].any()
    assert second.state_dict()["0.weight"].any()


def test_loading_keeps_the_parameters_in_their_arena_and_their_dtype() -> None:
    model = MLP([4, 3, 2])
    opt = kd.optim.SGD(model.parameters(), lr=0.1)
    state = {name: np.full(v.shape, 2.0) for name, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert (opt.arena.values == 2).all()
    assert opt.arena.values.dtype == np.float32


def test_loading_a_state_between_forward_and_backward_is_noticed() -> None:
    model = MLP([4, 3, 2])
    loss = model(rows(2, 4)).sum()
    model.load_state_dict(model.state_dict())
    with pytest.raises(kd.errors.TapeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("2.bias"), ArgumentError, r"missing \['2.bias'\], unknown none"),
        (lambda s: s.update(extra=np.ones(1)), ArgumentError, r"missing none, unknown \['extra'\]"),
        (lambda s: s.update({"2.bias": np.ones(3)}), ShapeError, r"2.bias must be of shape \(2,\), got shape \(3,\)"),
        (lambda s: s.update({"2.bias": np.ones(2, complex)}), DTypeError, r"2.bias must be an array of float16"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_is_written(
    change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = MLP([4, 3, 2])
    before = model.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(error, match=message):
        model.load_state_dict(state)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


# --- modules of modules ---


class Residual(Module):
    """x + a network of x, with one parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = kd.Tensor(np.ones(1, np.float32), requires_grad=True)
        self.body = Sequential(Linear(3, 4, activation="relu", seed=1), ReLU(), Dropout(0.5), Linear(4, 3, seed=2))

    def forward(self, x: Any) -> Any:
        return self.body(x) * self.scale + x


def test_parts_and_their_parameters_are_found_by_dotted_names() -> None:
    model = Residual()
    names = ["", "body", "body.0", "body.1", "body.2", "body.3"]
    assert [name for name, _ in model.named_modules()] == names
    assert [n for n, _ in model.named_parameters()] == [
        "scale", "body.0.weight", "body.0.bias", "body.3.weight", "body.3.bias",
    ]  # fmt: skip
    model.eval()
    assert not any(module.training for _, module in model.named_modules())
    assert model.train() is model
    assert all(module.training for _, module in model.named_modules())


def test_a_parameter_that_two_parts_share_counts_once_and_gets_both_gradients() -> None:
    layer = Linear(3, 3, bias=False, dtype=np.float64)
    model = Sequential(layer, layer)
    assert [n for n, _ in model.named_parameters()] == ["0.weight"]
    x = np.eye(3)
    model(kd.Tensor(x)).sum().backward()
    w = layer.weight.numpy()
    wanted = np.outer(np.ones(3), (x @ w.T).sum(axis=0)) + np.outer(w.sum(axis=0), x.sum(axis=0))
    np.testing.assert_allclose(layer.weight.grad.numpy(), wanted)


def test_a_module_without_a_forward_function_says_so() -> None:
    with pytest.raises(TypeError, match="Module has no forward function"):
        Module()(np.ones((1, 2)))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", [ReLU, GELU, Tanh, Sigmoid])
def test_a_layer_of_an_activation_is_its_function_also_where_it_is_fused(kind: type[Module]) -> None:
    x = rows(6, 4)
    name = kind.__name__.lower()
    layer, activation = Linear(4, 3, seed=1), kind()
    np.testing.assert_array_equal(activation(kd.Tensor(x)).numpy(), getattr(F, name)(x))
    fused = Sequential(layer, activation)(kd.Tensor(x)).numpy()
    np.testing.assert_allclose(fused, activation(layer(kd.Tensor(x))).numpy(), rtol=1e-6, atol=1e-6)


def test_inputs_of_the_wrong_shape_are_refused_with_the_mend() -> None:
    for x in (np.ones((2, 5)), np.ones(4), np.ones((2, 2, 2))):
        with pytest.raises(ShapeError, match=r"x must be of shape \(n, 4\).*Flatten images"):
            MLP([4, 2])(x)


# --- features ---


def test_features_hands_out_what_the_parts_put_out_and_changes_nothing_else() -> None:
    model = MLP([4, 6, 5, 3], dtype=np.float64)
    x = kd.Tensor(rows(2, 4).astype(np.float64))
    y, found = model(x, features=["0", "1", "2", "3", "4"])
    np.testing.assert_allclose(y.numpy(), model(x).numpy(), rtol=1e-14)
    assert list(found) == ["0", "1", "2", "3", "4"]
    h = F.linear(x, *model.parameters()[:2])
    np.testing.assert_allclose(found["0"].numpy(), h.numpy())
    np.testing.assert_allclose(found["1"].numpy(), np.maximum(h.numpy(), 0))
    np.testing.assert_array_equal(found["4"].numpy(), y.numpy())
    _, only = model(x, features=["3"])
    assert list(only) == ["3"]
    np.testing.assert_allclose(only["3"].numpy(), found["3"].numpy())


def test_gradients_flow_through_a_handed_out_feature() -> None:
    model = MLP([4, 3, 2])
    _, found = model(kd.Tensor(rows(2, 4)), features=["1"])
    found["1"].sum().backward()
    first, bias, second, _ = model.parameters()
    assert first.grad is not None
    assert bias.grad is not None
    assert second.grad is None


def test_features_of_nested_parts_have_dotted_names() -> None:
    model = Sequential(MLP([4, 3, 3]), Tanh(), Linear(3, 2))
    y, found = model(kd.Tensor(rows(2, 4)), features=["0.1", "0", "1"])
    assert set(found) == {"0.1", "0", "1"}
    assert found["0.1"].shape == (2, 3)
    np.testing.assert_allclose(np.tanh(found["0"].numpy()), found["1"].numpy(), rtol=1e-6)
    assert y.shape == (2, 2)


def test_an_unknown_feature_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"features must be names of parts: 0, 1, 2, got 7"):
        MLP([4, 3, 2])(rows(1, 4), features=["1", "7"])
    with pytest.raises(ArgumentError, match="features"):
        Residual()(rows(1, 3), features=["body"])


# --- predictions ---


class Halve:
    """A normalisation that halves."""

    mean = np.zeros(1)
    deviation = np.full(1, 2.0)

    def apply(self, x: Any) -> Any:
        return np.asarray(x) / 2


@pytest.mark.usefixtures("backend")
def test_predictions_agree_with_one_another_and_with_a_plain_call() -> None:
    model, x = MLP([8, 6, 3]), rows(5, 8)
    scores = model.logits(x)
    np.testing.assert_array_equal(scores, model(kd.Tensor(x)).numpy())
    np.testing.assert_array_equal(model.predict(x), scores.argmax(axis=1))
    np.testing.assert_allclose(model.predict_proba(x), F.softmax(scores), rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba(x, temperature=5), F.softmax(scores, temperature=5), rtol=1e-6)
    np.testing.assert_array_equal(model.logits(kd.Tensor(x)), scores)
    np.testing.assert_array_equal(model.logits(x.tolist()), scores)


def test_a_single_row_gives_a_single_prediction() -> None:
    model, x = MLP([8, 6, 3]), rows(1, 8)
    np.testing.assert_allclose(model.logits(x[0]), model.logits(x)[0], rtol=1e-6)
    assert model.predict(x[0]) == model.predict(x)[0]
    assert np.ndim(model.predict(x[0])) == 0
    assert model.predict_proba(x[0]).shape == (3,)


def test_images_are_flattened_to_rows() -> None:
    model, x = MLP([8, 6, 3]), rows(5, 8)
    np.testing.assert_array_equal(model.logits(x.reshape(5, 2, 4)), model.logits(x))
    np.testing.assert_array_equal(model.predict(x.reshape(5, 2, 2, 2)), model.predict(x))


@pytest.mark.parametrize("shape", [(0, 8), (0, 2, 4)], ids=str)
def test_no_rows_give_no_predictions(shape: tuple[int, ...]) -> None:
    model, nothing = MLP([8, 6, 3]), np.empty(shape, np.float32)
    assert model.logits(nothing).shape == (0, 3)
    assert model.predict(nothing).shape == (0,)


def test_no_rows_give_no_probabilities() -> None:
    assert MLP([8, 6, 3]).predict_proba(np.empty((0, 8), np.float32)).shape == (0, 3)


def test_many_rows_go_through_in_pieces_and_come_out_whole() -> None:
    model = MLP([3, 4, 2])
    x = rows(2 * kd.nn.ROWS_AT_A_TIME + 5, 3)
    scores = model.logits(x)
    assert scores.shape == (len(x), 2)
    np.testing.assert_allclose(scores[-5:], model.logits(x[-5:]), rtol=1e-5, atol=1e-6)


def test_predictions_normalise_raw_features_and_a_plain_call_does_not() -> None:
    model, x = MLP([8, 6, 3]), rows(5, 8)
    plain = model(kd.Tensor(x)).numpy()
    halved = model.logits(x / 2)
    model.normalisation = Halve()
    np.testing.assert_array_equal(model.logits(x), halved)
    np.testing.assert_array_equal(model(kd.Tensor(x)).numpy(), plain)


def test_predicting_records_nothing_and_leaves_every_part_in_its_mode() -> None:
    model = MLP([8, 6, 3], dropout=0.5)
    frozen = model.layers[2]
    frozen.eval()
    before = frozen.step
    first = model.logits(rows(5, 8))
    np.testing.assert_array_equal(first, model.logits(rows(5, 8)))
    assert frozen.step == before
    assert model.training
    assert not frozen.training
    assert is_recording()


def test_an_error_while_predicting_leaves_the_mode_as_it_was() -> None:
    model = MLP([8, 6, 3], dropout=0.5)
    with pytest.raises(ShapeError):
        model.logits(rows(5, 7))
    assert model.training
    assert is_recording()


# --- dropout ---


def test_the_generator_gives_the_known_answers_of_its_authors() -> None:
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        assert tuple(int(w) for w in philox(np, counter, key)) == words


def test_the_counter_is_block_step_and_stream_and_the_key_is_the_seed() -> None:
    words = random_words(np, 7, seed=2**40 + 5, stream=3, step=9)
    for block in (0, 1):
        wanted = [int(w) for w in philox(np, (block, 0, 9, 3), (5, 2**8))]
        assert words[4 * block : 4 * block + 4].tolist() == wanted[: len(words) - 4 * block]


def test_random_words_depend_on_seed_stream_step_and_place_alone() -> None:
    base = random_words(np, 20, seed=2**40 + 1, stream=3, step=7)
    np.testing.assert_array_equal(random_words(np, 7, seed=2**40 + 1, stream=3, step=7), base[:7])
    for change in ({"seed": 1}, {"seed": 2**41 + 1}, {"stream": 4}, {"step": 8}):
        other = random_words(np, 20, **{"seed": 2**40 + 1, "stream": 3, "step": 7, **change})
        assert not np.array_equal(other, base)


def test_dropout_draws_the_same_mask_on_every_backend(backend: str) -> None:
    for n in (1, 3, 4, 67, 1000):
        for dtype in (np.float32, np.float64):
            x = np.ones(n, dtype)
            y = F.dropout(x, 0.3, seed=2**33 + 1, stream=2, step=5)
            kept = random_words(np, n, seed=2**33 + 1, stream=2, step=5) >= round(0.3 * 2**32)
            np.testing.assert_array_equal(y, np.where(kept, dtype(1 / 0.7), dtype(0)))


@pytest.mark.usefixtures("backend")
def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = np.ones(200_000, np.float32)
    for p in (0.1, 0.5, 0.9):
        y = F.dropout(x, p, seed=1)
        share = (y == 0).mean()
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.size))
        assert y.mean(dtype=np.float64) == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / x.size))
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, 0.5, training=False) is x


@pytest.mark.usefixtures("backend")
def test_the_gradient_of_dropout_has_its_mask() -> None:
    x = kd.Tensor(np.ones((6, 5)), requires_grad=True)
    y = F.dropout(x, 0.4, seed=3)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.numpy())


def test_a_dropout_layer_draws_another_mask_each_pass_and_none_in_eval() -> None:
    x = kd.Tensor(np.ones((4, 50), np.float32))

    def passes() -> list[Any]:
        layer = Dropout(0.5, seed=7, stream=1)
        return [layer(x).numpy() for _ in range(3)]

    first, again = passes(), passes()
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], first[1])
    layer = Dropout(0.5).eval()
    assert layer(x) is x
    assert layer.step == 0


def test_the_dropout_layers_of_a_network_draw_from_different_streams() -> None:
    model = MLP([50, 50, 50, 2], dropout=0.5, input_dropout=0.5, seed=4)
    layers = [module for _, module in model.named_modules() if isinstance(module, Dropout)]
    x = np.ones((1, 50), np.float32)
    masks = [layer(kd.Tensor(x)).numpy().tobytes() for layer in layers]
    assert len(set(masks)) == len(masks) == 3


def test_the_counters_of_a_network_are_the_buffers_that_its_layers_count_in() -> None:
    shared = Dropout(0.5, seed=1)
    model = Sequential(Linear(4, 3), shared, Sequential(Dropout(0.5, seed=2), ReLU()), shared)
    assert list(model.counters()) == ["1.step", "2.0.step"]
    assert list(shared.counters()) == ["step"]
    model(kd.Tensor(rows(5, 4)))
    assert {name: int(count) for name, count in model.counters().items()} == {"1.step": 2, "2.0.step": 1}
    model.counters()["1.step"][...] = 40
    assert shared.step == 40
    assert MLP([4, 3, 2]).counters() == {}


@pytest.mark.usefixtures("backend")
def test_a_compiled_network_goes_on_from_counters_that_are_set() -> None:
    model, x = MLP([4, 30, 3], dropout=0.5, seed=3), rows(6, 4)
    step = kd.compile(lambda x: model(x))
    for _ in range(3):
        step(x)
    saved = {name: count.copy() for name, count in model.counters().items()}
    wanted = [step(x).numpy().copy() for _ in range(3)]
    for name, count in model.counters().items():
        count[...] = saved[name]
    for values in wanted:
        np.testing.assert_array_equal(step(x).numpy(), values)
    assert len(step.plans) == 1


# --- the arena ---


def test_parameters_become_views_of_one_flat_array_and_keep_their_values() -> None:
    model, x = MLP([4, 3, 2]), rows(5, 4)
    before, state = model.logits(x), model.state_dict()
    arena = Arena(model.parameters())
    assert arena.values.shape == (model.parameter_count,)
    np.testing.assert_array_equal(model.logits(x), before)
    np.testing.assert_array_equal(arena.values, np.concatenate([v.ravel() for v in state.values()]))
    for p in model.parameters():
        assert np.shares_memory(p.array, arena.values)
    arena.values[:] = 0
    assert not any(p.numpy().any() for p in model.parameters())


def test_the_first_gradients_are_written_into_the_arena() -> None:
    model = MLP([4, 3, 2])
    arena = Arena(model.parameters())
    for _ in range(2):
        for p in model.parameters():
            p.zero_grad()
        arena.gradients[:] = np.nan
        model(rows(5, 4)).sum().backward()
        assert np.isfinite(arena.gradients).all()
        for p in model.parameters():
            assert np.shares_memory(p.grad.numpy(), arena.gradients)


def test_a_gradient_from_before_the_arena_moves_into_it() -> None:
    model = MLP([4, 2])
    model(rows(5, 4)).sum().backward()
    before = [p.grad.numpy().copy() for p in model.parameters()]
    arena = Arena(model.parameters())
    np.testing.assert_array_equal(arena.gradients, np.concatenate([g.ravel() for g in before]))


def test_the_gradient_in_an_arena_is_the_one_outside_it() -> None:
    builds: list[Callable[[Any], Any]] = [
        lambda w: w * w,
        lambda w: w / w,
        lambda w: w - w,
        lambda w: w**w,
        lambda w: (w * 2.0) * w + w,
        lambda w: w[[0, 0, 1]].exp(),
    ]
    for build in builds:
        inside, outside = (kd.Tensor(np.array([0.5, 1.5]), requires_grad=True) for _ in range(2))
        Arena([inside])
        for _ in range(2):
            for w in (inside, outside):
                build(w).sum().backward()
        np.testing.assert_array_equal(inside.grad.numpy(), outside.grad.numpy())


def test_parameters_that_cannot_share_an_arena_are_refused() -> None:
    w = kd.Tensor(np.ones(2), requires_grad=True)
    narrow = kd.Tensor(np.ones(2, np.float32), requires_grad=True)
    for parameters in ([], [w, w], [w, narrow]):
        with pytest.raises(ArgumentError, match="a list of different parameters of one dtype"):
            Arena(parameters)
    assert w.arena is None


def test_a_parameter_lives_in_one_arena_only_and_the_same_set_shares_it() -> None:
    model = MLP([4, 3, 2])
    arena = Arena.of(model.parameters())
    assert Arena.of(model.parameters()) is arena
    assert Arena.of(reversed(model.parameters())) is arena
    with pytest.raises(ArgumentError, match="that no other optimizer holds"):
        Arena.of(model.parameters()[:2])
    extra = kd.Tensor(np.ones(2, np.float32), requires_grad=True)
    with pytest.raises(ArgumentError, match="that no other optimizer holds"):
        Arena.of([*model.parameters(), extra])
    assert extra.arena is None


def test_a_single_number_is_no_row_to_predict() -> None:
    with pytest.raises(ShapeError, match="rows of features"):
        MLP([2, 2]).predict(np.array(3.0))
