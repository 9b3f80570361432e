"""The tape: which graphs can be walked backwards, how often, what changes in place it notices, and what it keeps."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import functional as F
from minikd import tape
from minikd.errors import DTypeError, ShapeError, TapeError


def leaf(*values: float, dtype: Any = np.float64) -> kd.Tensor:
    return kd.Tensor(np.array(values, dtype), requires_grad=True)


def recorded() -> int:
    """How many nodes of this thread's tape are alive."""
    return sum(ref() is not None for ref in tape._tape.nodes)


# --- gradients add up ---


def test_a_gradient_is_none_before_backward_and_again_after_zero_grad() -> None:
    x = leaf(1, 2)
    assert x.grad is None
    (x * 3.0).sum().backward()
    assert x.grad.numpy().tolist() == [3, 3]
    x.zero_grad()
    assert x.grad is None


def test_gradients_of_several_backward_passes_are_added() -> None:
    x = leaf(1, 2)
    for _ in range(3):
        (x * x).sum().backward()
    assert x.grad.numpy().tolist() == [6, 12]
    x.zero_grad()
    x.sum().backward()
    assert x.grad.numpy().tolist() == [1, 1]


def test_a_gradient_that_was_read_does_not_change_when_another_tensor_shares_its_values() -> None:
    x, y = leaf(1, 2), leaf(3, 4)
    upstream = np.array([5.0, 7.0])
    (x + y).backward(upstream)
    (x + y).backward(upstream)
    assert x.grad.numpy().tolist() == y.grad.numpy().tolist() == [10, 14]
    assert upstream.tolist() == [5, 7]


USES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "x + x": (lambda x: x + x, lambda x: 2 + 0 * x),
    "x - x": (lambda x: x - x, lambda x: 0 * x),
    "x * x": (lambda x: x * x, lambda x: 2 * x),
    "x / x": (lambda x: x / x, lambda x: 0 * x),
    "x ** x": (lambda x: x**x, lambda x: x**x * (np.log(x) + 1)),
    "max(x, x)": (lambda x: x.maximum(x), lambda x: 1 + 0 * x),
    "a diamond": (lambda x: (x * 2.0) * (x * 3.0), lambda x: 12 * x),
    "a chain of squares": (lambda x: ((x * x) * (x * x)) * (x * x), lambda x: 6 * x**5),
    "an inner value used three times": (
        lambda x: (lambda y: y * y + y)(x.exp()),
        lambda x: 2 * np.exp(2 * x) + np.exp(x),
    ),
    "x beside its own sum": (lambda x: x * x.sum(), lambda x: x.sum() + x.sum() + 0 * x),
    "joined with itself": (lambda x: F.concatenate([x, x, x * 2.0]), lambda x: 4 + 0 * x),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_used_more_than_once_gets_the_sum_of_its_gradients(name: str, dtype: Any) -> None:
    build, gradient = USES[name]
    x = leaf(0.5, 1.5, 2.5, dtype=dtype)
    build(x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), gradient(x.numpy().astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", USES)
def test_so_does_one_whose_gradient_has_a_place_in_an_arena(name: str) -> None:
    build, gradient = USES[name]
    x = leaf(0.5, 1.5, 2.5)
    kd.optim.SGD([x], lr=0.1)
    build(x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), gradient(x.numpy()), atol=1e-12)


def test_a_first_gradient_is_written_straight_into_its_place_in_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaf(1, 2)
    kd.optim.SGD([x], lr=0.1)
    ran: list[str] = []
    monkeypatch.setattr("minikd.tensor.run", lambda name, *buffers: ran.append(name))
    (x * 3.0).sum().backward()
    assert ran == []
    assert x.grad.numpy().tolist() == [3, 3]


def test_what_takes_a_gradient_decides_the_dtype_of_a_result() -> None:
    x, constant = leaf(1, 2), kd.Tensor(np.array([3, 4], np.float32))
    y = constant * x
    assert y.dtype == np.float64
    y.sum().backward()
    assert x.grad.dtype == np.float64
    assert x.grad.numpy().tolist() == [3, 4]


def test_an_upstream_gradient_may_lie_in_columns() -> None:
    x = kd.Tensor(np.ones((2, 3)), requires_grad=True)
    upstream = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    (2.0 * x).exp().backward(upstream)
    np.testing.assert_allclose(x.grad.numpy(), 2 * np.exp(2) * upstream)


def test_a_leaf_that_is_itself_the_loss_gets_its_own_upstream_gradient() -> None:
    x = leaf(1, 2)
    upstream = np.array([3.0, 4.0])
    x.backward(upstream)
    x.backward(upstream)
    assert x.grad.numpy().tolist() == [6, 8]
    assert upstream.tolist() == [3, 4]


@pytest.mark.parametrize("gradient", [2.0, np.float64(2), np.array(2.0), kd.Tensor(2.0)], ids=repr)
def test_a_scalar_takes_an_upstream_gradient_of_any_kind(gradient: Any) -> None:
    x = leaf(1, 2)
    x.sum().backward(gradient)
    assert x.grad.numpy().tolist() == [2, 2]


def test_a_former_gradient_may_be_the_upstream_one_though_its_place_is_written_to() -> None:
    x = leaf(3, 5)
    kd.optim.SGD([x], lr=0.1)
    (2.0 * x).sum().backward()
    upstream = x.grad
    x.zero_grad()
    (x * x).backward(upstream)
    assert x.grad.numpy().tolist() == [12, 20]


@pytest.mark.parametrize(
    ("dtype", "number", "wanted"),
    [(np.float64, 2**24 + 1, 2**24 + 1), (np.float32, 2**60 + 2**36 + 1, 2**60 + 2**37)],
)
def test_a_whole_upstream_gradient_is_rounded_once_to_the_dtype_of_the_tensor(
    dtype: Any, number: int, wanted: int
) -> None:
    x = leaf(1, dtype=dtype)
    (2.0 * x).backward(np.array([number]))
    assert x.grad.dtype == dtype
    assert x.grad.numpy().tolist() == [2 * wanted]


def test_an_upstream_gradient_that_holds_no_numbers_is_refused_by_its_name() -> None:
    with pytest.raises(DTypeError, match=r"^backward: gradient must be an array of float16, "):
        (2.0 * leaf(1)).backward(np.array(["text"]))


def test_a_value_that_is_no_scalar_needs_an_upstream_gradient_of_its_shape() -> None:
    x = leaf(1, 2)
    with pytest.raises(ShapeError, match=r"the tensor must be a scalar, got shape \(2,\)"):
        (x * x).backward()
    with pytest.raises(ShapeError, match=r"gradient must be of shape \(2,\), got shape \(3,\)"):
        (x * x).backward(np.ones(3))
    with pytest.raises(ShapeError):
        (x * x).backward(1.0)
    assert x.grad is None


# --- what is not recorded ---


def test_nothing_is_recorded_inside_no_grad_also_after_an_error() -> None:
    x = leaf(1, 2)
    with kd.no_grad():
        inside = x * 2.0
        with kd.no_grad():
            assert tape.is_recording() is False
        assert tape.is_recording() is False
    assert inside.requires_grad is False
    with pytest.raises(RuntimeError, match="on purpose"), kd.no_grad():
        raise RuntimeError("on purpose")
    assert (x * 2.0).requires_grad


def test_constants_leave_nothing_on_the_tape() -> None:
    before = recorded()
    y = kd.Tensor([1.0]) * kd.Tensor([2.0])
    assert not y.requires_grad
    assert y.node is None
    assert recorded() == before
    with pytest.raises(TapeError, match="requires_grad=True"):
        y.backward()


def test_no_gradient_flows_through_a_detached_value() -> None:
    x = leaf(3)
    y = x * x.detach()
    y.sum().backward()
    assert x.grad.numpy().tolist() == [3]
    assert not x.detach().requires_grad


def test_a_loss_of_which_nobody_takes_a_gradient_makes_no_array_for_one(c_in_use: None) -> None:
    logits, labels = kd.Tensor(np.zeros((1000, 100), np.float32)), np.zeros(1000, int)
    F.cross_entropy(logits, labels)  # what is made once
    tracemalloc.start()
    F.cross_entropy(logits, labels)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40_000  # the logits are ten times as large


# --- backward once ---


def test_a_second_backward_is_refused_and_names_retain_graph() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(TapeError, match=r"already used.*retain_graph=True"):
        y.backward()
    assert x.grad.numpy().tolist() == [2, 4]


def test_a_kept_graph_can_be_used_again_and_again() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.numpy().tolist() == [6, 12]
    with pytest.raises(TapeError):
        y.backward()


def test_a_loss_that_shares_a_used_part_is_refused_with_the_true_reason_and_changes_no_gradient() -> None:
    x, w = leaf(1, 2), leaf(5, 6)
    shared = x * x
    first, second = shared.sum(), (shared * w).sum()
    first.backward()
    with pytest.raises(TapeError, match=r"already used.*retain_graph=True"):
        second.backward()
    assert w.grad is None
    assert x.grad.numpy().tolist() == [2, 4]


def test_two_losses_can_share_a_part_that_is_kept() -> None:
    x = leaf(1, 2)
    shared = x * x
    first, second = shared.sum(), (shared * 3.0).sum()
    first.backward(retain_graph=True)
    second.backward()
    assert x.grad.numpy().tolist() == [8, 16]


# --- changes in place ---


def test_writing_into_a_tensor_is_refused_while_it_takes_part_in_gradients() -> None:
    x = leaf(1, 2)
    with pytest.raises(TapeError, match=r"no_grad\(\)"):
        x[0] = 5
    y = x * x
    with kd.no_grad(), pytest.raises(TapeError, match="without a history"):
        y[0] = 5
    with kd.no_grad():
        x[0] = 5
        x[1:] = kd.Tensor([7.0])
    assert x.numpy().tolist() == [5, 7]


def test_a_backward_pass_that_would_read_overwritten_values_is_refused() -> None:
    x, c = leaf(1, 2), kd.Tensor([3.0, 4.0])
    for target in (x, c):
        y = (x * c).sum()
        with kd.no_grad():
            target[:] = 9
        with pytest.raises(TapeError, match="changed in place"):
            y.backward()
        assert x.grad is None


def test_values_that_backward_does_not_read_may_be_overwritten() -> None:
    x, c = leaf(1, 2), kd.Tensor([3.0, 4.0])
    y = (x + c).sum()
    with kd.no_grad():
        c[:] = 9
        x[:] = 9
    y.backward()
    assert x.grad.numpy().tolist() == [1, 1]


def test_an_optimizer_step_between_forward_and_backward_is_refused() -> None:
    w = leaf(1, 2)
    opt = kd.optim.SGD([w], lr=0.1)
    stale = (w * w).sum()
    (w * w).sum().backward()
    opt.step()
    with pytest.raises(TapeError, match=r"changed in place.*optimizer's step"):
        stale.backward()


def test_writing_through_a_detached_tensor_never_falsifies_a_gradient() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    alias = x.detach()
    with suppress(TapeError):  # refusing the write is as good as refusing the backward pass, or as detaching a copy
        alias[:] = 100
    try:
        y.backward()
    except TapeError:
        return
    assert x.grad.numpy().tolist() == [2, 4]


def test_writing_into_a_detached_result_never_falsifies_a_gradient() -> None:
    x = leaf(1, 2)
    y = x.exp()
    wanted = np.exp([1.0, 2.0])
    with suppress(TapeError):
        y.detach()[:] = 100
    try:
        y.sum().backward()
    except TapeError:
        return
    np.testing.assert_allclose(x.grad.numpy(), wanted)


# --- what stays in memory ---


def test_a_graph_that_nobody_keeps_is_freed_without_a_backward_pass() -> None:
    x = leaf(1, 2)
    y = (x * x).exp()
    node = weakref.ref(y.node)
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()


def test_backward_gives_the_buffers_of_the_graph_back_while_the_loss_is_kept() -> None:
    x = leaf(1, 2)
    inner = x * x
    kept = weakref.ref(inner.exp())
    loss = (inner.exp() * 2.0).sum()
    loss.backward()
    assert kept() is None
    assert loss.node.inputs == [] == loss.node.saved
    assert loss.node.parents is None


def test_a_node_keeps_of_its_inputs_and_its_output_what_the_gradient_is_computed_from() -> None:
    x = leaf(1, 2)
    for y, kept_inputs, keeps_output in [(x + 1.0, 0, False), (x * x, 2, False), (x.exp(), 0, True)]:
        assert sum(array is not None for array in y.node.inputs) == kept_inputs
        assert (y.node.out is y.array) is keeps_output
        assert (y.node.out is None) is not keeps_output


def test_the_tape_is_swept_when_it_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_tape", tape._Tape())
    x = leaf(1, 2)
    kept = [x * 1.0 for _ in range(tape.SWEEP_AT - 1)]

    def on_the_tape_after(steps: int) -> int:
        for _ in range(steps):
            x.exp()
        return len(tape._tape.nodes)

    assert on_the_tape_after(1) == len(kept) + 1 == tape.SWEEP_AT
    assert on_the_tape_after(1) == len(kept) + 1  # the one before is gone
    assert on_the_tape_after(len(kept) - 1) == 2 * len(kept)
    assert on_the_tape_after(1) == len(kept) + 1


@pytest.mark.parametrize("backward", [False, True])
def test_the_tape_does_not_grow_with_the_number_of_graphs(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_tape", tape._Tape())  # one that no large graph of another test was on
    x = leaf(1, 2)
    for step in range(3 * tape.SWEEP_AT):
        y = (x * x).sum()
        if backward and step % 3 == 0:
            y.backward()
    assert len(tape._tape.nodes) <= 2 * tape.SWEEP_AT
    del y
    gc.collect()
    x.sum().backward()
    assert recorded() == 0


def test_ten_thousand_operations_in_a_row_neither_recurse_backwards_nor_when_they_are_dropped() -> None:
    x = leaf(1, 2)
    for finish in (True, False):
        y = x
        for _ in range(10_000):
            y = y + 1.0
        if finish:
            y.sum().backward()
            assert x.grad.numpy().tolist() == [1, 1]
        last = weakref.ref(y.node)
        del y
        assert last() is None


# --- threads ---


def in_a_thread(function: Callable[[], Any]) -> Any:
    """The function's result from another thread; its error is raised here."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((result, error),) = found
    if error is not None:
        raise error
    return result


def test_each_thread_records_on_a_tape_of_its_own() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    with kd.no_grad():
        other = in_a_thread(lambda: (tape.is_recording(), (kd.Tensor([3.0], requires_grad=True) * 2.0).requires_grad))
    assert other == (True, True)

    def elsewhere() -> list[float]:
        z = leaf(3)
        (z * z).sum().backward()
        return z.grad.numpy().tolist()

    assert in_a_thread(elsewhere) == [6]
    y.backward()
    assert x.grad.numpy().tolist() == [2, 4]


def test_backward_in_another_thread_is_refused_and_leaves_the_graph_usable() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    with pytest.raises(TapeError, match="in the thread that ran the forward pass"):
        in_a_thread(y.backward)
    assert x.grad is None
    y.backward()
    assert x.grad.numpy().tolist() == [2, 4]


def test_threads_that_train_at_the_same_time_do_not_disturb_one_another() -> None:
    def train(seed: int) -> list[float]:
        w = kd.Tensor(np.random.default_rng(seed).normal(size=5), requires_grad=True)
        opt = kd.optim.SGD([w], lr=0.05)
        for _ in range(200):
            loss = (w * w).sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
        return w.numpy().tolist()

    alone = [train(seed) for seed in range(4)]
    together: list[Any] = [None] * 4

    def run(seed: int) -> None:
        together[seed] = train(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
