"""Optimizers against loops written out in NumPy, the schedules' values, and whole trainings of small problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, ShapeError, TapeError
from minikd.kernels import BACKENDS, run
from minikd.nn import MLP
from minikd.optim import OPTIMIZERS, SCHEDULES, SGD, Adam, AdamW, Constant, Cosine, Optimizer, Step

STEPS = 6
START = np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.5]])
OTHER = np.array([0.75, -0.25])


# --- plainly written optimizers: each yields the value after every step of descending Σ w⁴/4 ---


def gradient(w: Any) -> Any:
    return w**3


def plain_sgd(w: Any, lr: float, momentum: float = 0, nesterov: bool = False, weight_decay: float = 0) -> Iterator[Any]:
    v = np.zeros_like(w)
    while True:
        d = gradient(w) + weight_decay * w
        if momentum:
            v = momentum * v + d
            d = d + momentum * v if nesterov else v
        w = w - lr * d
        yield w


def plain_adam(
    w: Any, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, l2: float = 0, decay: float = 0
) -> Iterator[Any]:
    m, v, t = np.zeros_like(w), np.zeros_like(w), 0
    while True:
        t += 1
        g = gradient(w) + l2 * w
        w = w - lr * decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield w


Pair = tuple[Callable[[Any], Optimizer], Callable[[Any], Iterator[Any]]]
OPTIMIZERS_AND_LOOPS: dict[str, Pair] = {
    "SGD": (lambda p: SGD(p, 0.05), lambda w: plain_sgd(w, 0.05)),
    "SGD, decay": (lambda p: SGD(p, 0.05, weight_decay=0.1), lambda w: plain_sgd(w, 0.05, weight_decay=0.1)),
    "SGD, momentum": (lambda p: SGD(p, 0.02, momentum=0.9), lambda w: plain_sgd(w, 0.02, 0.9)),
    "SGD, Nesterov and decay": (
        lambda p: SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda w: plain_sgd(w, 0.02, 0.9, True, 0.1),
    ),
    "Adam": (lambda p: Adam(p), lambda w: plain_adam(w, 1e-3)),
    "Adam, L2": (
        lambda p: Adam(p, 0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda w: plain_adam(w, 0.1, 0.8, 0.95, 1e-6, l2=0.1),
    ),
    "AdamW": (lambda p: AdamW(p, 0.1), lambda w: plain_adam(w, 0.1, decay=0.01)),
    "AdamW, decay": (lambda p: AdamW(p, 0.1, weight_decay=0.3), lambda w: plain_adam(w, 0.1, decay=0.3)),
}


def descend(opt: Optimizer, parameters: list[kd.Tensor]) -> None:
    loss = sum(((p**4).sum() * 0.25 for p in parameters[1:]), (parameters[0] ** 4).sum() * 0.25)
    opt.zero_grad()
    loss.backward()
    opt.step()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIMIZERS_AND_LOOPS)
def test_an_optimizer_takes_the_steps_of_a_plainly_written_loop(name: str, dtype: Any) -> None:
    make, loop = OPTIMIZERS_AND_LOOPS[name]
    parameters = [kd.Tensor(w.astype(dtype), requires_grad=True) for w in (START, OTHER)]
    opt, wanted = make(parameters), [loop(START), loop(OTHER)]
    for step in range(1, STEPS + 1):
        descend(opt, parameters)
        assert opt.steps == step
        for p, values in zip(parameters, wanted, strict=True):
            tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype is np.float32 else {"rtol": 1e-12, "atol": 1e-13}
            np.testing.assert_allclose(p.numpy(), next(values), **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS_AND_LOOPS)
def test_an_optimizer_may_change_its_backend_between_steps(name: str) -> None:
    usable = [n for n, backend in BACKENDS.items() if backend.on_host and not backend.missing()]
    before = next(n for n, status in kd.backends().items() if status.default)
    make, loop = OPTIMIZERS_AND_LOOPS[name]
    w = kd.Tensor(START, requires_grad=True)
    opt, wanted = make([w]), loop(START)
    try:
        for step in range(2 * len(usable)):
            kd.use_backend(usable[step % len(usable)])
            descend(opt, [w])
            np.testing.assert_allclose(w.numpy(), next(wanted), rtol=1e-12)
    finally:
        kd.use_backend(before)


def test_a_new_learning_rate_counts_from_the_next_step() -> None:
    w = kd.Tensor([1.0], requires_grad=True)
    opt = SGD([w], lr=0.5)
    for lr in (0.5, 0.25, 0.125):
        opt.lr = lr
        assert opt.lr == lr
        before = w.item()
        opt.zero_grad()
        w.sum().backward()
        opt.step()
        assert w.item() == before - lr


def test_a_parameter_without_a_gradient_counts_as_having_gradient_zero() -> None:
    used, unused = (kd.Tensor(OTHER, requires_grad=True) for _ in range(2))
    opt = SGD([used, unused], lr=0.1, weight_decay=0.5, momentum=0.9)
    used.sum().backward()
    opt.step()
    np.testing.assert_allclose(used.numpy(), OTHER - 0.1 * (1 + 0.5 * OTHER))
    np.testing.assert_allclose(unused.numpy(), OTHER - 0.1 * 0.5 * OTHER)


def test_a_gradient_of_an_earlier_step_is_not_used_again() -> None:
    first, second = (kd.Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    opt = SGD([first, second], lr=0.1)
    (first + second).sum().backward()
    opt.step()
    opt.zero_grad()
    first.sum().backward()
    opt.step()
    np.testing.assert_allclose(first.numpy(), 0.8)
    np.testing.assert_allclose(second.numpy(), 0.9)


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1), Adam, AdamW], ids=["SGD", "Adam", "AdamW"])
def test_a_step_without_any_gradient_is_refused_and_changes_nothing(make: Callable[[Any], Optimizer]) -> None:
    w = kd.Tensor(START, requires_grad=True)
    opt = make([w])
    with pytest.raises(TapeError, match=r"Call loss\.backward\(\) first"):
        opt.step()
    np.testing.assert_array_equal(w.numpy(), START)
    assert opt.steps == 0
    w.sum().backward()
    opt.step()
    opt.zero_grad()
    with pytest.raises(TapeError):
        opt.step()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_max_norm_scales_the_rows_of_matrices_down_and_leaves_all_else(dtype: Any) -> None:
    w = kd.Tensor(np.array([[3, 4], [0.3, 0.4], [0, 0]], dtype), requires_grad=True)
    b = kd.Tensor(np.array([5, 6], dtype), requires_grad=True)
    opt = SGD([w, b], lr=1e-30, max_norm=2.0)
    (w.sum() + b.sum()).backward()
    opt.step()
    np.testing.assert_allclose(w.numpy(), [[1.2, 1.6], [0.3, 0.4], [0, 0]], rtol=1e-6, atol=1e-20)
    assert b.numpy().tolist() == [5, 6]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_are_clipped_together_to_one_norm_before_the_step(dtype: Any) -> None:
    w, b = (kd.Tensor(np.array(x, dtype), requires_grad=True) for x in ([[3, 0], [0, 0]], [4, 12]))
    opt = SGD([w, b], lr=1.0, clip=6.5)
    ((w * w).sum() * 0.5 + (b * b).sum() * 0.5).backward()  # the gradient is the value, of norm 13
    opt.step()
    np.testing.assert_allclose(w.grad.numpy(), [[1.5, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(w.numpy(), [[1.5, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(b.numpy(), [2, 6], rtol=1e-6)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("clip", [None, 13.0, 1e30])
def test_gradients_within_the_norm_are_not_touched(clip: float | None) -> None:
    w = kd.Tensor(np.array([3.0, 4.0, 12.0]), requires_grad=True)
    opt = Adam([w], clip=clip)
    (w * w).sum().backward(np.asarray(0.5))
    opt.step()
    assert w.grad.numpy().tolist() == [3, 4, 12]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_clipping_leaves_a_broken_gradient_to_be_seen(broken: float) -> None:
    w = kd.Tensor(np.zeros(3, np.float32), requires_grad=True)
    opt = SGD([w], lr=1.0, clip=0.5)
    (w * np.array([2, broken, 1], np.float32)).sum().backward()
    opt.step()
    np.testing.assert_array_equal(w.grad.numpy(), np.array([2, broken, 1], np.float32))
    np.testing.assert_array_equal(w.numpy(), np.array([-2, -broken, -1], np.float32))


@pytest.mark.usefixtures("backend")
@settings(max_examples=30)
@given(
    g=arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    limit=st.floats(1e-3, 1e3),
)
def test_a_clipped_gradient_keeps_its_direction_and_is_no_longer_than_the_limit(g: Any, limit: float) -> None:
    clipped = g.copy()
    run("clip_norm", clipped, limit=limit)
    norm = float(np.linalg.norm(g.astype(np.float64)))
    factor = min(1.0, limit / norm) if norm else 1.0
    np.testing.assert_allclose(clipped, g.astype(np.float64) * factor, rtol=1e-6, atol=1e-37)
    assert np.linalg.norm(clipped.astype(np.float64)) <= max(min(norm, limit), 0) * (1 + 1e-6)


# --- what steps leave behind ---


@pytest.mark.parametrize("name", OPTIMIZERS_AND_LOOPS)
def test_an_optimizer_that_loads_a_state_goes_on_as_the_one_that_gave_it(name: str) -> None:
    make, _ = OPTIMIZERS_AND_LOOPS[name]
    w = kd.Tensor(START.astype(np.float32), requires_grad=True)
    first = make([w])
    for _ in range(3):
        descend(first, [w])
    first.lr = 0.03
    again = kd.Tensor(w.numpy().copy(), requires_grad=True)
    second = make([again])
    second.load_state_dict(first.state_dict())
    assert (second.lr, second.steps) == (0.03, 3)
    for _ in range(3):
        descend(first, [w])
        descend(second, [again])
    assert again.numpy().tobytes() == w.numpy().tobytes()


def test_a_state_is_a_copy_with_the_names_of_what_is_kept() -> None:
    w = kd.Tensor(START, requires_grad=True)
    opt = Adam([w], 0.25)
    descend(opt, [w])
    state = opt.state_dict()
    assert list(state) == ["lr", "steps", "m", "v"]
    assert (state["lr"][()], state["steps"][()], state["steps"].dtype) == (0.25, 1, np.int64)
    assert state["m"].shape == (START.size,)
    before = {name: value.copy() for name, value in state.items()}
    descend(opt, [w])
    for name, value in before.items():
        np.testing.assert_array_equal(state[name], value)
    assert list(SGD([kd.Tensor(START, requires_grad=True)], 0.1).state_dict()) == ["lr", "steps"]
    assert list(OPTIMIZERS["sgd"]([kd.Tensor(START, requires_grad=True)], 0.1).state_dict()) == ["lr", "steps", "v"]


def test_a_compiled_step_goes_on_with_a_state_that_is_loaded_and_records_nothing_anew() -> None:
    model = MLP([2, 8, 2], seed=1)
    opt = Adam(model.parameters(), 0.01, clip=0.1)

    @kd.compile
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    x = SPIRALS.astype(np.float32)
    for _ in range(3):
        step(x, SIDES)
    saved, values = opt.state_dict(), model.state_dict()
    wanted = [float(step(x, SIDES).item()) for _ in range(3)]
    opt.load_state_dict(saved)
    model.load_state_dict(values)
    assert [float(step(x, SIDES).item()) for _ in range(3)] == wanted
    assert len(step.plans) == 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"m": None}, ArgumentError, r"missing \['m'\]"),
        ({"velocity": np.zeros(6)}, ArgumentError, r"unknown \['velocity'\]"),
        ({"v": np.zeros((2, 3))}, ShapeError, r"v must be of shape \(6,\), got shape \(2, 3\)"),
        ({"lr": np.zeros(1)}, ShapeError, "lr must be of shape"),
        ({"lr": np.array(-1.0)}, ArgumentError, "lr must be a finite number from 0"),
        ({"lr": np.array(np.nan)}, ArgumentError, "lr must be a finite number from 0"),
        ({"steps": np.array(-1)}, ArgumentError, "steps must be 0 or above"),
        ({"steps": np.array(2.5)}, DTypeError, "steps must be an array of integers"),
        ({"v": np.zeros(6, complex)}, DTypeError, "v must be"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_words_and_changes_nothing(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    w = kd.Tensor(START, requires_grad=True)
    opt = Adam([w])
    descend(opt, [w])
    before = opt.state_dict()
    state = {name: value + 1 for name, value in before.items()} | change
    with pytest.raises(error, match=said):
        opt.load_state_dict({name: value for name, value in state.items() if value is not None})
    for name, value in opt.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_second_optimizer_of_the_same_parameters_goes_on_where_the_first_stopped() -> None:
    w = kd.Tensor(OTHER, requires_grad=True)
    first = SGD([w], lr=0.1)
    descend(first, [w])
    second = Adam([w])
    assert second.arena is first.arena
    before = w.numpy().copy()
    descend(second, [w])
    np.testing.assert_allclose(w.numpy(), before - 1e-3 * np.sign(before), rtol=1e-6)
    with pytest.raises(ArgumentError, match="no other optimizer holds"):
        SGD([w, kd.Tensor(OTHER, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda p: SGD(p, 0.0), "lr"),
        (lambda p: SGD(p, -1), "lr"),
        (lambda p: Adam(p, math.nan), "lr"),
        (lambda p: SGD(p, math.inf), "lr"),
        (lambda p: SGD(p, 0.1, momentum=1.0), "momentum"),
        (lambda p: SGD(p, 0.1, momentum=-0.1), "momentum"),
        (lambda p: SGD(p, 0.1, nesterov=True), "nesterov"),
        (lambda p: SGD(p, 0.1, weight_decay=-1), "weight_decay"),
        (lambda p: SGD(p, 0.1, max_norm=0.0), "max_norm"),
        (lambda p: SGD(p, 0.1, clip=0.0), "clip"),
        (lambda p: Adam(p, clip=-1.0), "clip"),
        (lambda p: AdamW(p, clip=math.nan), "clip"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: Adam(p, betas=(0.9,)), "betas"),
        (lambda p: AdamW(p, eps=0), "eps"),
        (lambda p: AdamW(p, weight_decay=-0.1), "weight_decay"),
        (lambda p: SGD([], 0.1), "parameters"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name_and_moves_no_parameter(
    make: Callable[[Any], Any], argument: str
) -> None:
    w = kd.Tensor(OTHER, requires_grad=True)
    with pytest.raises(ArgumentError) as caught:
        make([w])
    assert caught.value.argument == argument
    assert w.arena is None


# --- schedules ---


def test_a_schedule_has_its_values_at_the_steps_where_they_are_known() -> None:
    assert [Constant()(k) for k in (0, 1, 1000)] == [1, 1, 1]
    assert [Constant(warmup=4)(k) for k in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    step = Step(every=10, factor=0.5)
    assert [step(k) for k in (0, 9, 10, 19, 20, 39)] == [1, 1, 0.5, 0.5, 0.25, 0.125]
    cosine = Cosine(total=100, final=0.2)
    assert [cosine(k) for k in (0, 50, 100, 5000)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert cosine(25) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    warmed = Cosine(warmup=10, total=110)
    assert [warmed(k) for k in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])


@pytest.mark.parametrize("total", [1, 2, 3, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_of_a_run_begin_at_one_and_never_rise(name: str, total: int) -> None:
    schedule = SCHEDULES[name](total)
    values = [schedule(k) for k in range(total)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


def test_the_named_optimizers_are_what_their_names_stand_for() -> None:
    made = {name: make([kd.Tensor(OTHER, requires_grad=True)], lr=0.1) for name, make in OPTIMIZERS.items()}
    kinds = {"sgd": SGD, "nesterov": SGD, "adam": Adam, "adamw": AdamW}
    assert {name: type(opt) for name, opt in made.items()} == kinds
    assert made["sgd"].attrs == {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    assert made["nesterov"].attrs["nesterov"]
    assert all(opt.lr == 0.1 for opt in made.values())
    assert all(opt.clip is None for opt in made.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_takes_the_settings_that_all_share(name: str) -> None:
    opt = OPTIMIZERS[name]([kd.Tensor(OTHER, requires_grad=True)], lr=0.1, clip=2.0, max_norm=3.0)
    assert (opt.clip, opt.max_norm) == (2.0, 3.0)


# --- whole trainings ---

SPIRAL_ANGLE = np.linspace(0.3, 3, 30)
SPIRALS = np.concatenate(
    [
        np.stack([s * SPIRAL_ANGLE * np.cos(2 * SPIRAL_ANGLE), s * SPIRAL_ANGLE * np.sin(2 * SPIRAL_ANGLE)], axis=1)
        for s in (1, -1)
    ]
)
SIDES = np.repeat([0, 1], 30)


def train(make: Callable[[Any], Optimizer], seed: int = 0, steps: int = 300, **options: Any) -> tuple[MLP, float]:
    model = MLP([2, 32, 32, 2], seed=seed, **options)
    opt, x = make(model.parameters()), kd.Tensor(SPIRALS.astype(np.float32))
    loss = None
    for _ in range(steps):
        loss = F.cross_entropy(model(x), SIDES)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model, loss.item()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True), lambda p: Adam(p, 0.01), lambda p: AdamW(p, 0.01)],
    ids=["SGD", "Adam", "AdamW"],
)
def test_a_small_network_learns_two_spirals_by_heart(make: Callable[[Any], Optimizer]) -> None:
    model, loss = train(make)
    assert loss < 0.05
    assert (model.predict(SPIRALS) == SIDES).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "sigmoid"])
def test_training_twice_gives_the_same_bits(activation: str) -> None:
    options = {"steps": 20, "dropout": 0.2, "activation": activation}
    first, second = (train(lambda p: Adam(p, 0.01), **options) for _ in range(2))
    assert first[1] == second[1]
    for name, value in first[0].state_dict().items():
        assert value.tobytes() == second[0].state_dict()[name].tobytes()


def test_a_student_learns_a_teachers_function_from_its_logits_alone() -> None:
    teacher, _ = train(lambda p: Adam(p, 0.01))
    logits, student = teacher.logits(SPIRALS), MLP([2, 64, 2], seed=3)
    opt, x = Adam(student.parameters(), 0.02), kd.Tensor(SPIRALS.astype(np.float32))
    for _ in range(500):
        loss = F.distillation_loss(student(x), logits, temperature=4.0, soft_weight=1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (student.predict(SPIRALS) == SIDES).mean() > 0.95
