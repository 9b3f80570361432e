"""Compiled steps: what a replay computes is what the step computes, to the last bit, whatever changed in between."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd import nn, steps
from minikd.errors import ArgumentError, DTypeError, PlanError, ShapeError, TapeError
from minikd.kernels import BACKENDS, current_backend

each_backend = pytest.mark.usefixtures("backend")

# --- a step and its twin ---


def bits(value: Any) -> Any:
    """A result in a form that is equal for results that agree in every bit."""
    if isinstance(value, dict):
        return [(k, bits(v)) for k, v in value.items()]
    if isinstance(value, tuple | list):
        return type(value).__name__, [bits(v) for v in value]
    if isinstance(value, kd.Tensor):
        return "tensor", value.dtype, value.shape, value.array.tobytes()
    if isinstance(value, np.ndarray | np.generic):
        return type(value).__name__, value.dtype, value.shape, value.tobytes()
    return value


@dataclass
class World:
    """A step with all that it changes."""

    step: Callable[..., Any]
    modules: Sequence[nn.Module] = ()
    optimizers: Sequence[Any] = ()
    tensors: Sequence[kd.Tensor] = ()
    more: dict[str, Any] = field(default_factory=dict)

    def state(self) -> list[Any]:
        """Values and gradients of all parameters, and all that optimizers and dropout layers count and keep."""
        parameters = [*(p for m in self.modules for p in m.parameters()), *self.tensors]
        found: list[Any] = [(bits(p.array), None if p.grad is None else bits(p.grad)) for p in parameters]
        for o in self.optimizers:
            found.append((o.lr, o.steps, bits(o.arena.values), bits(o.state)))
        counted = [m for module in self.modules for _, m in module.named_modules() if isinstance(m, nn.Dropout)]
        return found + [m.step for m in counted]


def compare(build: Callable[[], World], calls: Iterable[Any], **options: Any) -> tuple[World, World, Any]:
    """Run the step of one world as it stands and that of another compiled, and compare everything after each call."""
    eager, other = build(), build()
    compiled = kd.compile(other.step, **options)
    for k, args in enumerate(calls):
        if callable(args):
            args(eager)
            args(other)
            continue
        assert bits(compiled(*args)) == bits(eager.step(*args)), f"results of call {k}"
        assert other.state() == eager.state(), f"state after call {k}"
    return eager, other, compiled


def normal(rng: Any, *shape: int, dtype: Any = np.float32) -> Any:
    return rng.normal(size=shape).astype(dtype)


def trainer(model: nn.Module, optimizer: Any) -> Callable[[Any, Any], Any]:
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def simple(dropout: float = 0.0, **options: Any) -> World:
    """A network of 6 inputs and 4 classes with an optimizer."""
    model = nn.MLP([6, 8, 4], dropout=dropout, seed=3)
    optimizer = kd.optim.SGD(model.parameters(), 0.1, momentum=0.9, **options)
    return World(trainer(model, optimizer), [model], [optimizer], more={"model": model, "optimizer": optimizer})


def batches(count: int, n: int = 5, seed: int = 0) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [(normal(rng, n, 6), rng.integers(0, 4, n)) for _ in range(count)]


# --- random steps ---

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: kd.optim.SGD(p, 0.1),
    "decay": lambda p: kd.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: kd.optim.SGD(p, 0.05, momentum=0.9, max_norm=0.7),
    "nesterov": lambda p: kd.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: kd.optim.Adam(p, 0.01),
    "adam with decay": lambda p: kd.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: kd.optim.AdamW(p, 0.01, max_norm=1.0),
    "clipped": lambda p: kd.optim.Adam(p, 0.01, clip=0.05),
    "clipped and constrained": lambda p: kd.optim.SGD(p, 0.1, momentum=0.9, max_norm=0.7, clip=0.1),
}
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")


class Case(NamedTuple):
    """A step to be built twice."""

    sizes: tuple[int, ...]
    activation: str
    dropout: float
    bias: bool
    dtype: Any
    loss: str
    optimizer: str
    rows: tuple[int, ...]
    seed: int


cases = st.builds(
    Case,
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    activation=st.sampled_from(ACTIVATIONS),
    dropout=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    loss=st.deferred(lambda: st.sampled_from(sorted(LOSSES))),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    seed=st.integers(0, 99),
)


def network(case: Case, seed: int) -> nn.Module:
    layers: list[nn.Module] = []
    rng = np.random.default_rng(seed)
    for k, (inputs, outputs) in enumerate(zip(case.sizes, case.sizes[1:], strict=False)):
        layers.append(nn.Linear(inputs, outputs, bias=case.bias, seed=rng, dtype=case.dtype))
        if k < len(case.sizes) - 2:
            layers.append(nn.ACTIVATION_LAYERS[case.activation]())
            if case.dropout:
                layers.append(nn.Dropout(case.dropout, seed=seed, stream=k))
    return nn.Sequential(*layers)


def teacher_inside(model: Any, teacher: Any, x: Any, y: Any, q: Any, t: Any) -> Any:
    with kd.no_grad():
        z = teacher(x)
    return F.distillation_loss(model(x), z, y, temperature=t)


def arithmetic(model: Any, teacher: Any, x: Any, y: Any, q: Any, t: Any) -> Any:
    z = model(x)
    shared = z * 0.5 + z.tanh()
    return (shared * shared).mean() + (shared.T.reshape(-1).exp() * 0.01).sum() * 2.0 - z.max(axis=1).mean() / 3.0


def hints(model: Any, teacher: Any, x: Any, y: Any, q: Any, t: Any) -> Any:
    last = str(len(model.layers) - 1)
    z, found = model(x, features=[last, "0"])
    with kd.no_grad():
        _, wanted = teacher(x, features=["0"])
    difference = found["0"] - wanted["0"]
    return (difference * difference).mean() + F.cross_entropy(found[last], y) + z.sum() * 0.0


# name: the loss for a network, a teacher, inputs, class ids, class probabilities and a temperature
LOSSES: dict[str, Callable[..., Any]] = {
    "labels": lambda m, t, x, y, q, k: F.cross_entropy(m(x), y),
    "smoothed and ignored": lambda m, t, x, y, q, k: F.cross_entropy(m(x), y, label_smoothing=0.1, ignore_index=0),
    "probabilities": lambda m, t, x, y, q, k: F.cross_entropy(m(x), q, label_smoothing=0.2),
    "each row": lambda m, t, x, y, q, k: (F.cross_entropy(m(x), y, reduction="none") * 0.25).sum(),
    "distillation": lambda m, t, x, y, q, k: F.distillation_loss(m(x), q, y, temperature=3.0),
    "weights that vary": lambda m, t, x, y, q, k: F.distillation_loss(
        m(x), q, y, temperature=k, hard_weight=k, soft_weight=k
    ),
    "soft targets alone": lambda m, t, x, y, q, k: F.distillation_loss(m(x), q, None, temperature=k, reduction="sum"),
    "two kinds of probabilities": lambda m, t, x, y, q, k: F.distillation_loss(m(x), q, q, temperature=k),
    "teacher inside": teacher_inside,
    "divergence": lambda m, t, x, y, q, k: F.kl_div(F.log_softmax(m(x), temperature=k), q, reduction="batchmean"),
    "logarithms": lambda m, t, x, y, q, k: F.kl_div(F.log_softmax(m(x)), F.log_softmax(q), log_target=True),
    "first axis": lambda m, t, x, y, q, k: (F.log_softmax(m(x), axis=0) * -0.1).mean(),
    "arithmetic": arithmetic,
    "hints": hints,
    "a number times a loss": lambda m, t, x, y, q, k: k * F.cross_entropy(m(x), y) + (m(x) * k).mean(),
}


def world_of(case: Case) -> World:
    model, teacher = network(case, case.seed), network(case, case.seed + 1).eval()
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    loss_of = LOSSES[case.loss]

    def step(x: Any, y: Any, q: Any, t: Any) -> Any:
        loss = loss_of(model, teacher, x, y, q, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return World(step, [model, teacher], [optimizer])


def arguments_of(case: Case, count: int) -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(case.seed)
    found = []
    for k in range(count):
        n, c = case.rows[k % len(case.rows)], case.sizes[-1]
        q = rng.dirichlet(np.ones(c), n).astype(case.dtype)
        found.append((normal(rng, n, case.sizes[0], dtype=case.dtype), rng.integers(0, c, n), q, np.array(1.0 + k / 4)))
    return found


@each_backend
@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@given(case=cases)
def test_any_step_is_replayed_bit_for_bit(case: Case) -> None:
    calls = arguments_of(case, 8)
    _, _, compiled = compare(lambda: world_of(case), calls)
    assert len(compiled.plans) == len(set(case.rows))


@each_backend
@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_is_replayed_bit_for_bit(loss: str) -> None:
    case = Case((6, 40, 5), "relu", 0.2, True, np.float32, loss, "momentum", (33, 7), 5)
    compare(lambda: world_of(case), arguments_of(case, 10))


@each_backend
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_is_replayed_bit_for_bit(name: str) -> None:
    case = Case((6, 70, 5), "gelu", 0.0, True, np.float64, "labels", name, (9,), 5)
    compare(lambda: world_of(case), arguments_of(case, 10))


# --- what a step may contain ---


@each_backend
def test_batches_are_gathered_from_captured_data_in_each_run() -> None:
    rng = np.random.default_rng(0)
    features, pixels = normal(rng, 30, 6), rng.integers(0, 256, (30, 6)).astype(np.uint8)
    ids, logits = rng.integers(0, 4, 30), normal(rng, 30, 4)
    scale, shift = np.float32(rng.uniform(0, 1, 6)), normal(rng, 6)

    def build() -> World:
        world = simple()
        model, optimizer = world.more["model"], world.more["optimizer"]

        def step(rows: Any) -> Any:
            x, y = F.take(features, rows), F.take(ids, rows)
            p, plain = F.take_scaled(pixels, rows, scale, shift), F.take_scaled(pixels, rows, 1 / 255, 0)
            loss = F.distillation_loss(model(x) + model(p) + model(plain), F.take(logits, rows), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss, y

        world.step = step
        return world

    calls: list[Any] = [(rng.integers(0, 30, 7),) for _ in range(6)]

    def other_data(world: World) -> None:
        features[...] = np.roll(features, 1)
        ids[...] = np.roll(ids, 1)

    compare(build, [*calls[:4], lambda w: None, *calls[4:]])
    eager, other, compiled = compare(build, calls[:4])
    other_data(eager)
    assert bits(compiled(*calls[5])) == bits(eager.step(*calls[5]))
    assert eager.state() == other.state()


@each_backend
def test_a_learning_rate_may_be_set_outside_or_by_an_argument() -> None:
    def build(inside: bool) -> World:
        world = simple()
        optimizer, train = world.more["optimizer"], world.step

        def step(x: Any, y: Any, lr: Any) -> Any:
            if inside:
                optimizer.lr = lr
            return train(x, y)

        world.step = step
        return world

    calls = [(x, y, np.array(0.5 / (k + 1))) for k, (x, y) in enumerate(batches(6))]
    compare(lambda: build(True), calls)

    def set_to(lr: float) -> Callable[[World], None]:
        return lambda world: setattr(world.optimizers[0], "lr", lr)

    compare(lambda: build(False), [x for k, call in enumerate(calls) for x in (set_to(0.1 * k), call)])


@each_backend
def test_gradients_may_be_added_up_over_backward_passes_and_over_steps() -> None:
    def build(zero: bool, step_too: bool) -> World:
        world = simple()
        model, optimizer = world.more["model"], world.more["optimizer"]

        def step(x: Any, y: Any) -> Any:
            if zero:
                optimizer.zero_grad()
            first = F.cross_entropy(model(x), y)
            first.backward()
            second = (model(x) * 0.1).sum()
            second.backward()
            if step_too:
                optimizer.step()
            return [first, second]

        world.step = step
        return world

    for zero in (True, False):
        for step_too in (True, False):
            compare(lambda zero=zero, step_too=step_too: build(zero, step_too), batches(7))


def grown(world: World) -> None:
    for p in (*world.tensors, *(p for m in world.modules for p in m.parameters())):
        p.zero_grad()


@each_backend
@settings(max_examples=20)
@given(zeroed=st.lists(st.booleans(), min_size=4, max_size=16), arena=st.booleans())
def test_gradients_that_the_step_finds_are_added_to_wherever_they_are(zeroed: list[bool], arena: bool) -> None:
    def build() -> World:
        w = kd.Tensor(np.arange(1, 7, dtype=np.float32), requires_grad=True)
        optimizers = [kd.optim.SGD([w], 0.1)] if arena else []

        def step(x: Any) -> Any:
            loss = (w * kd.Tensor(x)).sum()
            loss.backward()
            return loss

        return World(step, optimizers=optimizers, tensors=[w])

    rng = np.random.default_rng(len(zeroed))
    calls: list[Any] = []
    for zero in zeroed:
        calls += [grown] * zero + [(normal(rng, 6),)]
    compare(build, calls)


@each_backend
def test_parameters_need_no_arena_and_gradients_need_no_optimizer() -> None:
    def build() -> World:
        model = nn.MLP([6, 8, 4], activation="tanh", seed=1)

        def step(x: Any, y: Any) -> Any:
            for p in model.parameters():
                p.zero_grad()
            F.cross_entropy(model(x), y).backward()
            return [p.grad for p in model.parameters()]

        return World(step, [model])

    compare(build, batches(6))


@each_backend
def test_frozen_parameters_stay_and_several_optimizers_take_their_turns() -> None:
    def build() -> World:
        model, other = nn.MLP([6, 8, 4], seed=1), nn.MLP([6, 4], seed=2)
        model.layers[0].weight.requires_grad = False
        first, second = kd.optim.AdamW(model.parameters(), 0.01), kd.optim.SGD(other.parameters(), 0.1)

        def step(x: Any, y: Any) -> Any:
            a, b = model(x), other(x)
            loss = F.cross_entropy(a, y) + F.distillation_loss(b, a.detach(), y)
            for o in (first, second):
                o.zero_grad()
            loss.backward()
            for o in (first, second):
                o.step()
            return loss

        return World(step, [model, other], [first, second])

    compare(build, batches(6))


class Pair(NamedTuple):
    a: Any
    b: Any


@each_backend
def test_results_come_back_in_the_form_in_which_the_step_returns_them() -> None:
    def build() -> World:
        world = simple()
        model, table = world.more["model"], np.arange(12.0).reshape(3, 4)

        def step(x: Any, y: Any) -> Any:
            z = model(x)
            p = F.gelu(x)
            return {
                "tensor": z,
                "twice": (z, z),
                "list": [F.argmax(z), {"count": F.correct_count(z, y)}],
                "pair": Pair(p, p.T),
                "views": [p[::2], p[:, 1:3], p[::-1], p.reshape(-1), p[None], x.T, y],
                "kept": [table, table.T, model.layers[0].weight],
                "number": 3,
                "nothing": None,
                "array numbers": F.cross_entropy(p, y),
            }

        world.step = step
        return world

    compare(build, batches(5, n=6))


@each_backend
def test_an_argument_and_its_transpose_are_two_results() -> None:
    compare(
        lambda: World(lambda x: (x, x.T, F.relu(x))),
        [(x.reshape(4, 4),) for x in np.random.default_rng(0).normal(size=(4, 16))],
    )


@each_backend
def test_arguments_may_be_tensors_and_have_names_and_the_result_is_of_the_same_kind() -> None:
    step = kd.compile(lambda x, t=1.0: F.softmax(x, temperature=t))
    rng = np.random.default_rng(0)
    for _ in range(3):
        for kind in (kd.Tensor, np.asarray):
            x = normal(rng, 3, 4)
            assert bits(step(kind(x))) == bits(F.softmax(kind(x)))
            assert bits(step(x=kind(x))) == bits(F.softmax(kind(x)))
            t = np.array(rng.uniform(1, 2))
            assert bits(step(kind(x), t=t)) == bits(F.softmax(x=kind(x), temperature=t))
            assert bits(step(t=t, x=kind(x))) == bits(F.softmax(x=kind(x), temperature=t))
            assert bits(step(kind(x), 2.0)) == bits(F.softmax(kind(x), temperature=2.0))


@each_backend
@pytest.mark.parametrize("probabilities", [False, True])
def test_losses_take_arguments_that_are_tensors(probabilities: bool) -> None:
    @kd.compile
    def step(logits: Any, teacher: Any, target: Any) -> Any:
        hard, soft = F.cross_entropy(logits, target), F.kl_div(F.log_softmax(logits), F.softmax(teacher))
        return hard, soft, F.distillation_loss(logits, teacher, None, hard_weight=0.0)

    rng = np.random.default_rng(0)
    for _ in range(3):
        z, t = (kd.Tensor(rng.normal(size=(4, 3)).astype(np.float32)) for _ in range(2))
        target = F.softmax(t) if probabilities else rng.integers(0, 3, 4)
        assert bits(step(z, t, target)) == bits(step.function(z, t, target))


@each_backend
def test_a_tensor_that_takes_a_gradient_may_be_an_argument() -> None:
    w = [kd.Tensor(np.float32([1, 2, 3]) * k, requires_grad=True) for k in (1, 2)]

    def step(p: Any, x: Any) -> Any:
        p.zero_grad()
        loss = (p * kd.Tensor(x)).sum()
        loss.backward()
        return loss

    compiled = kd.compile(step)
    for k in range(8):
        x = np.float32([k, 1, 2])
        assert compiled(w[k % 2], x).item() == float(w[k % 2].array @ x)
        np.testing.assert_array_equal(w[k % 2].grad.numpy(), x)


def test_a_replay_of_arrays_that_look_alike_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = kd.compile(simple().step), batches(6)
    for b in calls[:3]:
        step(*b)
    monkeypatch.setattr(step, "_find_and_run", None)
    for b in calls[3:]:
        step(*b)
    with pytest.raises(TypeError):
        step(calls[0][0][:2], calls[0][1][:2])


def test_what_was_computed_from_others_is_no_argument() -> None:
    w = kd.Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(PlanError, match="without a history"):
        kd.compile(lambda h: h.sum())(w * 2.0)
    step = kd.compile(lambda h: h.sum(), fallback=True)
    for k in range(4):
        assert step(w * float(k)).item() == 3 * k


@each_backend
@pytest.mark.parametrize("dtype", ["<f2", ">f4", ">f8", "f4", "f8", "?"])
def test_features_of_every_floating_dtype_compute_what_the_step_computes(dtype: str) -> None:
    rng = np.random.default_rng(0)
    compare(lambda: World(F.softmax), [((10 * rng.normal(size=(5, 3))).astype(dtype),) for _ in range(4)])


@pytest.mark.parametrize("dtype", ["i1", "i4", "u1", "u8", "i8", ">i8"])
def test_features_of_whole_numbers_are_refused_in_words(dtype: str) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    with pytest.raises(PlanError, match=r"test_steps\.py, line .*Give it as a contiguous array of float32"):
        kd.compile(F.softmax)(x)
    assert bits(kd.compile(F.softmax, fallback=True)(x)) == bits(F.softmax(x))


@pytest.mark.parametrize("dtype", [complex, object, "U3", np.longdouble])
def test_arguments_that_nobody_can_compute_with_are_refused_as_without_a_plan(dtype: Any) -> None:
    with pytest.raises(DTypeError):
        kd.compile(lambda x: F.softmax(x))(np.ones((2, 2)).astype(dtype))


@each_backend
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint64, np.int64, ">i4"])
def test_class_ids_of_every_integer_dtype_are_the_same(dtype: Any) -> None:
    calls = [(x, y.astype(dtype)) for x, y in batches(5)]
    compare(simple, calls)


def test_a_class_id_that_int64_cannot_hold_stays_out_of_range() -> None:
    step, z = kd.compile(F.cross_entropy), np.zeros((2, 3), np.float32)
    for _ in range(3):
        step(z, np.array([0, 1], np.uint64))
    for label in (2**64 - 100, 2**63):
        with pytest.raises(ArgumentError, match="class id"):
            step(z, np.array([0, label], np.uint64))
        with pytest.raises(ArgumentError, match="class id"):
            step.epoch(np.stack([z, z]), np.array([[0, 1], [0, label]], np.uint64))


@each_backend
def test_arguments_may_lie_anywhere_and_are_never_written() -> None:
    calls = []
    for k, (x, y) in enumerate(batches(8)):
        wide = np.repeat(x, 2, axis=1)[:, ::2]
        layouts = [np.asfortranarray(x), wide, x[::-1][::-1], x.astype(np.float16)]
        chosen = layouts[k % 4]
        chosen.flags.writeable = False
        y.flags.writeable = False
        calls.append((chosen, y))
    before = [(x.copy(), y.copy()) for x, y in calls]
    # float16 is computed in float32 either way
    compare(simple, calls)
    for (x, y), (a, b) in zip(calls, before, strict=True):
        np.testing.assert_array_equal(x, a)
        np.testing.assert_array_equal(y, b)


@each_backend
def test_results_are_the_callers_own_and_arguments_may_go() -> None:
    world = simple()
    step = kd.compile(world.step)
    first = [step(*b) for b in batches(3)]
    before = [bits(x) for x in first]
    calls = batches(5, seed=9)
    twin = simple()
    for b in batches(3):
        twin.step(*b)
    for x, y in calls:
        loss = step(x, y)
        assert bits(loss) == bits(twin.step(x, y))
        x[...], y[...] = np.nan, 99
        loss.array[...] = 7
        del x, y, loss
        gc.collect()
    assert [bits(x) for x in first] == before
    assert world.state() == twin.state()


def test_a_step_within_a_step_is_a_part_of_it() -> None:
    def build() -> World:
        world = simple()
        model, optimizer = world.more["model"], world.more["optimizer"]

        def loss_of(x: Any, y: Any) -> Any:
            return F.cross_entropy(model(x), y)

        def step(x: Any, y: Any) -> Any:
            loss = world.more["loss_of"](x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        world.step, world.more["loss_of"] = step, loss_of
        return world

    eager, other = build(), build()
    other.more["loss_of"] = inner = kd.compile(other.more["loss_of"])
    step = kd.compile(other.step)
    for x, y in batches(6):
        assert bits(step(x, y)) == bits(eager.step(x, y))
        assert bits(inner(x, y)) == bits(eager.more["loss_of"](x, y).detach())
    assert eager.state() == other.state()
    assert [len(s.plans) for s in (inner, step)] == [1, 1]
    with pytest.raises(PlanError, match="an epoch of another step"):
        kd.compile(lambda x, y: inner.epoch(x, y))(*batches(1)[0])


def test_a_step_may_call_itself() -> None:
    @kd.compile
    def halve(x: Any, times: int) -> Any:
        return x if times == 0 else halve(F.relu(x), times - 1)

    for k in range(4):
        x = np.float32([[k, -1]])
        np.testing.assert_array_equal(halve(x, 3), [[k, 0]])


# --- many steps at once ---


@each_backend
@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.05, 10.0])
def test_an_epoch_is_a_loop_over_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(steps, "SECONDS_A_CALL", seconds)
    calls = batches(23)
    xs, ys = (np.stack(column) for column in zip(*calls, strict=True))
    eager, other = simple(dropout=0.2), simple(dropout=0.2)
    wanted = [eager.step(*b).array for b in calls]
    step, progress = kd.compile(other.step), []
    losses = step.epoch(xs, ys, on_progress=progress.append)
    assert isinstance(losses, np.ndarray)
    assert bits(losses) == bits(np.stack(wanted))
    assert eager.state() == other.state()
    assert progress == sorted(set(progress))
    assert progress[-1] == 23
    tail = batches(3, n=2)
    for _ in range(4):
        stacked = [np.stack(column) for column in zip(*tail, strict=True)]
        assert bits(step.epoch(*stacked)) == bits(np.stack([eager.step(*b).array for b in tail]))
        assert bits(step.epoch(xs, ys)) == bits(np.stack([eager.step(*b).array for b in calls]))
    assert eager.state() == other.state()


@each_backend
def test_an_epoch_gives_every_kind_of_result_one_more_axis() -> None:
    def step(x: Any, y: Any, t: Any) -> Any:
        return {"p": (F.softmax(x, temperature=t), F.softmax(x).T[::2]), "n": F.correct_count(x, y), "one": 1}

    rng = np.random.default_rng(0)
    xs, ys, ts = normal(rng, 9, 4, 3), rng.integers(0, 3, (9, 4)), np.float32(rng.uniform(1, 2, 9))
    for options in ({}, {"fallback": True}):
        compiled = kd.compile(step, **options)
        for _ in range(2):
            found = compiled.epoch(xs, ys, ts)
            wanted = [step(x, y, np.array(t, np.float64)) for x, y, t in zip(xs, ys, ts, strict=True)]
            assert found["one"] == 1
            np.testing.assert_array_equal(found["n"], [w["n"] for w in wanted])
            for k in (0, 1):
                assert found["p"][k].tobytes() == np.stack([w["p"][k] for w in wanted]).tobytes()


def test_an_epoch_of_a_step_that_runs_as_it_stands_is_a_loop_too() -> None:
    step = kd.compile(lambda x: float(x.sum()) * F.softmax(x), fallback=True)
    xs = normal(np.random.default_rng(0), 7, 2, 3)
    assert bits(step.epoch(xs)) == bits(np.stack([float(x.sum()) * F.softmax(x) for x in xs]))


@pytest.mark.parametrize("arguments", [(), (np.ones(()),), (np.ones((0, 3)),), (np.ones((2, 3)), np.ones((3, 3)))])
def test_an_epoch_needs_arrays_of_one_length(arguments: Any) -> None:
    with pytest.raises(ShapeError, match="one entry for each step"):
        kd.compile(lambda *x: x).epoch(*arguments)


@each_backend
def test_an_epoch_can_be_interrupted_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SECONDS_A_CALL", 0.0)
    calls = batches(12)
    eager, other = simple(), simple()
    step = kd.compile(other.step)

    def interrupt(done: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.epoch(*(np.stack(column) for column in zip(*calls, strict=True)), on_progress=interrupt)
    for b in calls[:7]:
        eager.step(*b)
    assert eager.state() == other.state()
    assert bits(step(*calls[7])) == bits(eager.step(*calls[7]))


def test_portions_are_the_parts_of_an_epoch_and_may_be_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SECONDS_A_CALL", 0.0)
    calls = batches(6)
    stacked = [np.stack(column) for column in zip(*calls, strict=True)]
    eager, other = simple(), simple()
    portions = kd.compile(other.step).portions(*stacked)
    for b in calls[:4]:
        assert bits(next(portions)) == bits(eager.step(*b).array[None])
    portions.close()
    assert eager.state() == other.state()


# --- what changed in between ---


def replace_layer(world: World) -> None:
    model = world.more["model"]
    model.layers = (model.layers[0], model.layers[1], nn.Linear(8, 4, seed=11))


def replace_weight(world: World) -> None:
    layer = world.more["model"].layers[0]
    layer.weight = kd.Tensor(layer.weight.array * 2)


def freeze(world: World) -> None:
    world.more["model"].layers[0].weight.requires_grad = False


def thaw(world: World) -> None:
    world.more["model"].layers[0].weight.requires_grad = True


def load(world: World) -> None:
    model = world.more["model"]
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def write_into(world: World) -> None:
    with kd.no_grad():
        world.more["model"].layers[0].weight[0] = 3.0


CHANGES: dict[str, Callable[[World], None]] = {
    "a layer": replace_layer,
    "a weight": replace_weight,
    "frozen": freeze,
    "thawed": thaw,
    "values loaded": load,
    "a row written": write_into,
    "evaluation": lambda world: world.more["model"].eval() and None,
    "training": lambda world: world.more["model"].train() and None,
    "dropout": lambda world: (
        setattr(world.more["model"].layers[2], "p", 0.7)
        if isinstance(world.more["model"].layers[2], nn.Dropout)
        else None
    ),
    "no gradients": lambda world: world.optimizers[0].zero_grad(),
    "max_norm": lambda world: setattr(world.optimizers[0], "max_norm", 0.3),
    "clip": lambda world: setattr(world.optimizers[0], "clip", 0.05),
    "state loaded": lambda world: world.optimizers[0].load_state_dict(
        {name: value / 2 if name != "steps" else value for name, value in world.optimizers[0].state_dict().items()}
    ),
    "momentum": lambda world: world.optimizers[0].state["v"].fill(0.25),
    "predicted": lambda world: world.more["model"].predict(np.ones((2, 6), np.float32)) is None,
}


@each_backend
@settings(max_examples=25)
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=6), dropout=st.sampled_from([0.0, 0.4]))
def test_whatever_is_changed_between_two_calls_is_noticed(changes: list[str], dropout: float) -> None:
    calls: list[Any] = list(batches(3))
    for change in changes:
        calls += [CHANGES[change], *batches(4)]
    compare(lambda: simple(dropout), calls)


@each_backend
def test_a_step_that_moves_pictures_and_weighs_a_corrected_teacher_is_replayed_bit_by_bit() -> None:
    def build() -> World:
        model, fill, count = (
            nn.MLP([12, 8, 4], dropout=0.3, seed=3),
            np.full(12, -0.5, np.float32),
            np.zeros((), np.int64),
        )
        optimizer = kd.optim.Adam(model.parameters(), 0.05, clip=0.3)

        def step(x: Any, teacher: Any, y: Any, t: Any) -> Any:
            kd.kernels.run("advance", count)
            moved = F.shift_images(x, (3, 4), count, fill=fill, seed=5)
            weight = F.teacher_confidence(teacher, y, t) + F.teacher_confidence(kd.Tensor.of(teacher), temperature=t)
            z = F.corrected_logits(teacher, y)
            loss = (F.distillation_loss(model(moved), z, y, temperature=t, reduction="none") * weight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss, moved, weight, z

        return World(step, [model], [optimizer])

    rng = np.random.default_rng(0)
    calls = [
        (normal(rng, n, 12), normal(rng, n, 4), np.where(rng.random(n) < 0.2, -100, rng.integers(0, 4, n)), np.array(t))
        for n, t in [(5, 2.0), (5, 4.0), (5, 1.0), (3, 2.0), (3, 8.0), (5, 2.0), (3, 1.0)]
    ]
    compare(build, calls)


@each_backend
def test_a_new_optimizer_over_new_memory_is_noticed() -> None:
    def build() -> World:
        model = nn.MLP([6, 8, 4], seed=3)
        world = World(lambda x, y: None, [model], more={"model": model})

        def step(x: Any, y: Any) -> Any:
            model.layers[0].weight.zero_grad()
            model.layers[0].bias.zero_grad()
            model.layers[2].weight.zero_grad()
            model.layers[2].bias.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        world.step = step
        return world

    def into_an_arena(world: World) -> None:
        world.more["optimizer"] = kd.optim.SGD(world.more["model"].parameters(), 0.1)

    def optimize(world: World) -> None:
        world.more["optimizer"].step()

    calls: list[Any] = [*batches(4), into_an_arena, *batches(1), optimize, *batches(3), optimize, *batches(2)]
    compare(build, calls)


@each_backend
def test_another_backend_between_two_calls_is_noticed() -> None:
    usable = [name for name, backend in BACKENDS.items() if backend.on_host and not backend.missing()]
    before = current_backend()
    eager, other = simple(), simple()
    step = kd.compile(other.step)
    try:
        for k, b in enumerate(batches(6 * len(usable))):
            if k % 3 == 0:
                kd.use_backend(usable[k // 3 % len(usable)])
            assert bits(step(*b)) == bits(eager.step(*b))
            assert eager.state() == other.state()
    finally:
        kd.use_backend(before)


def test_plans_of_a_backend_that_was_left_are_given_up() -> None:
    world, b = simple(), batches(1)[0]
    step, before = kd.compile(world.step), current_backend()
    try:
        for _ in range(2 * steps.MOST_VARIANTS):
            kd.use_backend("numpy")
            step(*b)
    finally:
        kd.use_backend(before)
    assert len(step.plans) <= 1


@each_backend
def test_shapes_and_dtypes_may_alternate() -> None:
    rng = np.random.default_rng(0)
    calls = []
    for k in range(16):
        n = (5, 2, 1)[k % 3]
        dtype = np.float16 if k % 4 == 3 else np.float32
        calls.append((normal(rng, n, 6, dtype=dtype), rng.integers(0, 4, n).astype((np.int64, np.int32)[k % 2])))
    compare(simple, calls)


@each_backend
def test_a_call_under_no_grad_is_another_one() -> None:
    model = nn.MLP([6, 4], seed=0)
    step = kd.compile(lambda x: model(x))
    x = normal(np.random.default_rng(0), 3, 6)

    def loss_step(x: Any) -> Any:
        loss = model(x).sum()
        loss.backward()
        return loss

    trained = kd.compile(loss_step)
    for _ in range(4):
        trained(x)
        with kd.no_grad():
            assert bits(step(x)) == bits(model(x))
            with pytest.raises(TapeError):
                trained(x)
        np.testing.assert_array_equal(step(x).array, model(x).array)


def test_a_graph_of_before_a_replay_is_refused_after_it_as_after_a_step() -> None:
    world, calls = simple(), batches(5)
    model, step = world.more["model"], kd.compile(world.step)
    for b in calls[:3]:
        step(*b)
    for run in (lambda: step(*calls[3]), lambda: step.epoch(*(x[None] for x in calls[4]))):
        h = (model(calls[0][0]) * model(calls[0][0])).sum()
        run()
        with pytest.raises(TapeError, match="changed in place"):
            h.backward()


def test_numbers_tuples_and_texts_are_part_of_what_is_recorded() -> None:
    seen: list[Any] = []

    def step(x: Any, *settings: Any) -> Any:
        seen.append(settings)
        return F.softmax(x, temperature=float(sum(s if isinstance(s, int | float) else 1 for s in settings)))

    compiled, x = kd.compile(step), np.float32([[1, 2, 3]])
    for settings_ in (
        (1,),
        (1.0,),
        (True,),
        ("a",),
        ((1, 2),),
        ((1.0, 2),),
        ((True, 2),),
        (None,),
        (0.0, 1),
        (-0.0, 1),
    ):
        for _ in range(3):
            assert bits(compiled(x, *settings_)) == bits(step(x, *settings_))
        ours = [s for s in seen if repr(s) == repr(settings_)]
        assert len(ours) == 5, settings_  # two recordings, three calls of ours


def test_more_recordings_than_allowed_are_an_error_that_says_what_to_do() -> None:
    step, x = kd.compile(lambda x, t: F.softmax(x, temperature=t)), np.float32([[1, 2]])
    for k in range(steps.MOST_VARIANTS):
        step(x, 1.0 + k)
    with pytest.raises(PlanError, match=r"at most 32 combinations .* np\.array\(number\)"):
        step(x, 0.5)
    assert bits(step(x, 1.0)) == bits(F.softmax(x))
    easy = kd.compile(lambda x, t: F.softmax(x, temperature=t), fallback=True)
    for k in range(3 * steps.MOST_VARIANTS):
        assert bits(easy(x, 1.0 + k)) == bits(F.softmax(x, temperature=1.0 + k))


# --- errors while replaying ---


@each_backend
@pytest.mark.parametrize("at", [0, 1, 2, 5, 8])
def test_a_bad_label_stops_an_epoch_where_it_would_stop_a_loop(at: int) -> None:
    calls = batches(9)
    calls[at][1][3] = 4
    eager, other = simple(dropout=0.1), simple(dropout=0.1)
    step = kd.compile(other.step)
    for world, run in ((eager, eager.step), (other, step)):
        for b in batches(2, seed=5):
            run(*b)
        assert world.optimizers[0].steps == 2
    for b in calls[:at]:
        eager.step(*b)
    with pytest.raises(ArgumentError) as wanted:
        eager.step(*calls[at])
    with pytest.raises(ArgumentError) as found:
        step.epoch(*(np.stack(column) for column in zip(*calls, strict=True)))
    assert str(found.value) == str(wanted.value)
    notes = " ".join(found.value.__notes__)
    assert f"step {at} of steps 0 to 8" in notes
    assert "parameters are as they were before this step" in notes
    assert eager.state() == other.state()
    for b in batches(3, seed=7):
        assert bits(step(*b)) == bits(eager.step(*b))
    assert eager.state() == other.state()


@each_backend
def test_an_epoch_that_fails_leaves_gradients_and_versions_of_the_steps_before() -> None:
    world = simple()
    model, step = world.more["model"], kd.compile(world.step)
    for b in batches(3):
        step(*b)
    world.optimizers[0].zero_grad()
    graph = (model(batches(1)[0][0]) ** 2.0).sum()
    calls = batches(4)
    calls[2][1][0] = -1
    with pytest.raises(ArgumentError):
        step.epoch(*(np.stack(column) for column in zip(*calls, strict=True)))
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(TapeError, match="changed in place"):
        graph.backward()


@each_backend
def test_a_temperature_of_0_is_refused_by_a_replay_too() -> None:
    rng = np.random.default_rng(0)

    def build() -> World:
        world = simple()
        model, optimizer = world.more["model"], world.more["optimizer"]

        def step(x: Any, q: Any, t: Any) -> Any:
            optimizer.zero_grad()
            loss = F.distillation_loss(model(x), q, temperature=t)
            loss.backward()
            optimizer.step()
            return loss

        world.step = step
        return world

    eager, other = build(), build()
    step = kd.compile(other.step)
    for k in range(6):
        x, q, t = normal(rng, 5, 6), normal(rng, 5, 4), np.array(0.0 if k in (0, 4) else 2.0)
        if float(t):
            assert bits(step(x, q, t)) == bits(eager.step(x, q, t))
            assert eager.state() == other.state()
            continue
        before = [bits(w.optimizers[0].arena.values) for w in (eager, other)], eager.optimizers[0].steps
        for run in (eager.step, step):
            with pytest.raises(ArgumentError, match=r"temperature must be a finite number above 0, got 0\.0"):
                run(x, q, t)
        assert ([bits(w.optimizers[0].arena.values) for w in (eager, other)], other.optimizers[0].steps) == before


@each_backend
@pytest.mark.parametrize("which", ["lr", "hard_weight", "soft_weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_numbers_that_the_step_refuses_are_refused_by_replays_too(which: str, bad: float) -> None:
    def build() -> World:
        world = simple()
        model, optimizer = world.more["model"], world.more["optimizer"]

        def step(x: Any, y: Any, t: Any) -> Any:
            weights = {} if which == "lr" else {which: t}
            if which == "lr":
                optimizer.lr = t
            loss = F.distillation_loss(model(x), q, y, **weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        q = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        world.step = step
        return world

    eager, other = build(), build()
    step = kd.compile(other.step)
    calls = [(*b, np.array(0.5)) for b in batches(8)]
    refused = which == "lr" or bad != -1.0
    for c in calls:
        assert bits(step(*c)) == bits(eager.step(*c))
    calls[5] = (*calls[5][:2], np.array(bad))
    messages: list[Any] = []
    for run in (step, eager.step):
        if refused:
            with pytest.raises(ArgumentError, match=which) as caught:
                run(*calls[5])
            messages.append(
                str(caught.value)
                .replace("array(nan)", "nan")
                .replace("array(inf)", "inf")
                .replace("array(-1.)", "-1.0")
            )
        else:
            messages.append(bits(run(*calls[5])))
    assert messages[0] == messages[1]
    stacked = [np.stack(column) for column in zip(*calls, strict=True)]
    if refused:
        with pytest.raises(ArgumentError, match=which) as caught:
            step.epoch(*stacked)
        assert any("step 5 of steps 0 to 7" in note for note in caught.value.__notes__)
        for c in calls[:5]:
            eager.step(*c)
    else:
        assert bits(step.epoch(*stacked)) == bits(np.stack([eager.step(*c).array for c in calls]))
    assert bits(eager.optimizers[0].arena.values) == bits(other.optimizers[0].arena.values)
    assert eager.optimizers[0].steps == other.optimizers[0].steps


@each_backend
def test_an_error_after_the_parameters_changed_says_so() -> None:
    world = simple()
    model, train = world.more["model"], world.step

    def step(x: Any, y: Any, late: Any) -> Any:
        return train(x, y), F.cross_entropy(model(x), late)

    compiled = kd.compile(step)
    for x, y in batches(3):
        compiled(x, y, y)
    x, y = batches(1)[0]
    with pytest.raises(ArgumentError) as caught:
        compiled(x, y, np.full(5, 9))
    assert "may have been changed by this step" in " ".join(caught.value.__notes__)


@each_backend
def test_an_error_while_recording_is_the_steps_own_and_the_next_call_records() -> None:
    eager, other = simple(), simple()
    step = kd.compile(other.step)
    bad = batches(1)[0][0], np.full(5, 9)
    for k, b in enumerate(batches(5)):
        if k in (0, 1):
            for run in (step, eager.step):
                with pytest.raises(ArgumentError, match="class id"):
                    run(*bad)
        assert bits(step(*b)) == bits(eager.step(*b))
    assert eager.state() == other.state()
    assert len(step.plans) == 1


# --- threads ---


def run_at_once(works: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@each_backend
def test_threads_that_record_replay_and_compute_at_once_do_not_disturb_each_other() -> None:
    calls = batches(40, n=16)
    wanted = simple(dropout=0.2)
    losses = [bits(wanted.step(*b)) for b in calls]
    model = nn.MLP([6, 30, 4], seed=8)
    z = [bits(model(x)) for x, _ in calls]

    def train(compiled: bool) -> Callable[[], None]:
        world = simple(dropout=0.2)
        step = kd.compile(world.step) if compiled else world.step

        def work() -> None:
            assert [bits(step(*b)) for b in calls] == losses
            assert world.state() == wanted.state()

        return work

    def record_again_and_again() -> None:
        for x, _ in calls:
            assert bits(kd.compile(lambda x: model(x))(x)) == bits(model(x))

    def look() -> None:
        with kd.no_grad():
            assert [bits(model(x)) for x, _ in calls] == z
            for x, _ in calls:
                assert float(F.softmax(x).sum()) > 0  # reading is refused in the threads that record, not here

    run_at_once([train(True), train(True), train(False), record_again_and_again, look])


@each_backend
def test_one_step_may_be_used_by_several_threads() -> None:
    """Whichever order the threads come in: each result belongs to its own arguments."""
    step = kd.compile(lambda x, t: {"p": F.softmax(x, temperature=t)})
    rng = np.random.default_rng(0)

    def user(n: int) -> Callable[[], None]:
        inputs = [(normal(rng, n, 7), np.array(rng.uniform(1, 3))) for _ in range(50)]

        def work() -> None:
            for x, t in inputs:
                assert bits(step(x, t)["p"]) == bits(F.softmax(x, temperature=t))

        return work

    run_at_once([user(4), user(4), user(4), user(9)])


# --- names that stand for something else ---

SCALE = 2.0


def scaled(x: Any) -> Any:
    return F.relu(kd.Tensor(x)) * SCALE


def test_a_global_that_stands_for_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step, x = kd.compile(scaled), np.ones(3, np.float32)
    assert [step(x).numpy()[0] for _ in range(3)] == [2, 2, 2]
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert [step(x).numpy()[0] for _ in range(3)] == [5, 5, 5]
    assert len(step.plans) == 2


def test_another_model_under_the_same_name_is_noticed(backend: str) -> None:
    x, y = np.ones((4, 3), np.float32), np.arange(4) % 2
    model, opt = kd.nn.MLP([3, 2], seed=0), None

    @kd.compile
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    for seed in (0, 1):
        model = kd.nn.MLP([3, 2], seed=seed)
        opt = kd.optim.SGD(model.parameters(), 0.1)
        before = [p.numpy().copy() for p in model.parameters()]
        for _ in range(3):
            step(x, y)
        assert all((p.numpy() != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert len(step.plans) == 2


def test_a_counter_that_the_step_keeps_does_not_disturb_its_plan() -> None:
    calls = 0

    @kd.compile
    def step(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return F.relu(kd.Tensor(x))

    for _ in range(5):
        step(np.ones(3, np.float32))
    assert len(step.plans) == 1
    assert calls == 2


def test_a_copy_of_a_step_records_for_itself() -> None:
    step = kd.compile(scaled, fallback=True)
    x = np.ones(3, np.float32)
    for copied in (copy.deepcopy(step), copy.copy(step)):
        assert [step(x).numpy()[0] for _ in range(3)] == [copied(x).numpy()[0] for _ in range(3)] == [2, 2, 2]
        assert copied.plans
        assert copied.plans[0] is not step.plans[0]
        assert copied.options == step.options


def test_a_variable_that_was_deleted_is_missed_as_without_a_plan() -> None:
    factor, x = 2.0, np.ones(3, np.float32)

    @kd.compile
    def step(x: Any) -> Any:
        return F.relu(kd.Tensor(x)) * factor

    for _ in range(3):
        step(x)
    del step.function.__closure__[0].cell_contents  # as `del factor` does
    with pytest.raises(NameError, match="factor"):
        step(x)


def test_a_method_can_be_a_step() -> None:
    class Trainer:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        @kd.compile
        def step(self, x: Any) -> Any:
            return F.relu(kd.Tensor(x)) * self.factor

    x = np.ones(3, np.float32)
    for trainer in (Trainer(2.0), Trainer(3.0)):
        assert [trainer.step(x).numpy()[0] for _ in range(3)] == [trainer.factor] * 3


def test_another_model_in_an_attribute_is_noticed() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = kd.nn.MLP([3, 2], seed=0)

        @kd.compile
        def scores(self, x: Any) -> Any:
            return self.model(x)

    trainer, x = Trainer(), np.ones((4, 3), np.float32)
    for seed in (0, 1):
        trainer.model = kd.nn.MLP([3, 2], seed=seed)
        wanted = trainer.model.logits(x)
        for _ in range(3):
            np.testing.assert_array_equal(trainer.scores(x).numpy(), wanted)
