"""What is remembered of calls: the results stay those of a first call, and nothing but looks is kept."""

from __future__ import annotations

import gc
import importlib
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, MinikdError, ShapeError
from minikd.kernels import BACKENDS, bind, current_backend, execute, launch, recall, run
from minikd.ops import OPS

pytestmark = pytest.mark.usefixtures("backend")


def logits(seed: int, n: int = 12, c: int = 7, dtype: Any = np.float32) -> Any:
    return (3 * np.random.default_rng(seed).normal(size=(n, c))).astype(dtype)


def labels(seed: int, n: int = 12, c: int = 7) -> Any:
    found = np.random.default_rng(seed).integers(0, c, n)
    found[0] = -100
    return found


def log_probabilities(seed: int, **shape: Any) -> Any:
    return F.log_softmax(logits(seed, **shape))


CALLS: dict[str, Callable[..., Any]] = {
    "softmax": lambda seed, **s: F.softmax(logits(seed, **s), temperature=1.0 + seed),
    "log_softmax": lambda seed, **s: F.log_softmax(logits(seed, **s), axis=1, temperature=1.0 + seed),
    "cross_entropy": lambda seed, **s: F.cross_entropy(
        logits(seed, **s), labels(seed, *list(s.values())[:2]), return_grad=True
    ),
    "kl_div": lambda seed, **s: F.kl_div(
        log_probabilities(seed, **s), np.exp(log_probabilities(seed + 9, **s)), return_grad=True
    ),
    "distillation_loss": lambda seed, **s: F.distillation_loss(
        logits(seed, **s),
        logits(seed + 9, **s),
        labels(seed, *list(s.values())[:2]),
        temperature=1.0 + seed,
        hard_weight=0.1 * seed,
        soft_weight=1.0 + seed,
        return_grad=True,
    ),
    "jensen_shannon": lambda seed, **s: F.jensen_shannon(
        logits(seed, **s), logits(seed + 9, **s), beta=1 / (2.0 + seed), temperature=1.0 + seed, return_grad=True
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


def bits(result: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in (result if isinstance(result, tuple) else (result,))]


def forget() -> None:
    """Choose the backend anew: nothing is remembered then."""
    kd.use_backend(current_backend())


# --- the results are those of a first call ---


@each_call
def test_a_remembered_call_gives_what_a_first_one_gives(name: str) -> None:
    shapes: list[dict[str, Any]] = [{}, {"n": 5, "c": 3}, {"n": 1, "c": 40}, {"n": 12, "c": 7, "dtype": np.float64}]
    calls = [(seed, shape) for seed in range(3) for shape in shapes]
    first = []
    for seed, shape in calls:
        forget()
        first.append(bits(CALLS[name](seed, **shape)))
    forget()
    for _ in range(2):
        assert [bits(CALLS[name](seed, **shape)) for seed, shape in calls] == first


@each_call
def test_results_are_the_callers_own(name: str) -> None:
    first = CALLS[name](0)
    before = bits(first)
    CALLS[name](1)
    assert bits(first) == before


def test_attributes_and_the_wish_for_a_gradient_are_part_of_a_look() -> None:
    z, t, y = logits(0), logits(1), labels(2)
    hard, smooth = F.cross_entropy(z, y), F.cross_entropy(z, y, label_smoothing=0.5)
    assert F.cross_entropy(z, y) == hard != smooth == F.cross_entropy(z, y, label_smoothing=0.5)
    for _ in range(2):
        assert F.distillation_loss(z, t, y, reduction="none").shape == (12,)
        assert F.distillation_loss(z, t, y).shape == ()
        loss, gradient = F.distillation_loss(z, t, y, return_grad=True)
        assert gradient.shape == z.shape
        assert loss == F.distillation_loss(z, t, y)


def test_no_target_and_class_probabilities_are_looks_of_their_own() -> None:
    z, t, y = logits(0), logits(1), labels(2)
    q = F.softmax(t)
    wanted = [F.distillation_loss(z, t, target) for target in (y, None, q)]
    assert len(set(wanted)) == 3
    assert [F.distillation_loss(z, t, target) for target in (y, None, q)] == wanted


def test_what_needs_a_conversion_gets_it_also_after_a_remembered_call() -> None:
    z, t, y = logits(0), logits(1), labels(2)
    wanted = F.distillation_loss(z, t, y, temperature=2.0)
    wide = np.repeat(z, 2, axis=1)[:, ::2]
    frozen = z.copy()
    frozen.flags.writeable = False
    for other in (z.tolist(), wide, np.asfortranarray(z), frozen, z.astype(">f4"), np.ma.array(z), z[::-1][::-1]):
        student = np.float32(other) if isinstance(other, list) else other
        assert F.distillation_loss(student, t, y, temperature=2.0) == wanted
    for target in (y.tolist(), y.astype(np.int16), np.repeat(y, 2)[::2]):
        assert F.distillation_loss(z, t, target, temperature=2.0) == wanted
    for temperature in (2, np.float32(2), np.array(2.0), np.int8(2)):
        assert F.distillation_loss(z, t, y, temperature=temperature) == wanted
    assert type(F.softmax(np.ma.array(z))) is np.ndarray


def test_the_differentiated_dtype_is_kept_where_a_tensor_decides_it() -> None:
    a, b = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    execute(OPS["matmul"], [a, b], {})
    (y,), _, inputs = execute(OPS["matmul"], [a, b], {}, real=np.dtype(np.float64))
    assert y.dtype == np.float64
    assert {x.dtype for x in inputs} == {np.dtype(np.float64)}


# --- errors and warnings after a remembered call ---


def test_values_are_checked_in_every_call() -> None:
    z, t, y = logits(0), logits(1), labels(2)

    def use(**changed: Any) -> Any:
        settings: dict[str, Any] = {"return_grad": True, **changed}
        student, teacher, target = (settings.pop(k, v) for k, v in (("z", z), ("t", t), ("y", y)))
        return F.distillation_loss(student, teacher, target, **settings)

    wrong: list[tuple[dict[str, Any], type[MinikdError]]] = [
        ({"temperature": 0.0}, ArgumentError),
        ({"temperature": np.nan}, ArgumentError),
        ({"hard_weight": np.inf}, ArgumentError),
        ({"soft_weight": "much"}, ArgumentError),
        ({"reduction": "all"}, ArgumentError),
        ({"reduction": ["mean"]}, ArgumentError),
        ({"label_smoothing": 1.5}, ArgumentError),
        ({"y": np.full(12, 7)}, ArgumentError),
        ({"y": np.full(12, 2**40)}, ArgumentError),
        ({"y": np.zeros(12)}, DTypeError),
        ({"y": y[:-1]}, ShapeError),
        ({"t": t[:-1]}, ShapeError),
        ({"z": z[0]}, ShapeError),
        ({"z": z[:0], "t": t[:0], "y": y[:0]}, ShapeError),
        ({"z": z.astype(complex)}, DTypeError),
        ({"grad_out": np.empty((12, 7))}, ArgumentError),
    ]
    messages = []
    for changed, kind in wrong:
        forget()
        with pytest.raises(kind) as caught:
            use(**changed)
        messages.append(str(caught.value))
    wanted = bits(use())
    for (changed, kind), message in zip(wrong, messages, strict=True):
        with pytest.raises(kind) as caught:
            use(**changed)
        assert str(caught.value) == message
        assert bits(use()) == wanted


@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
def test_a_bad_label_in_a_remembered_call_writes_nothing(name: str) -> None:
    z, y, gradient = logits(0), labels(2), np.full((12, 7), 5, np.float32)
    teacher = (logits(1),) if name == "distillation_loss" else ()
    function = getattr(F, name)
    wanted = bits(function(z, *teacher, y, grad_out=np.empty_like(z)))
    for label in (7, -1):
        bad = y.copy()
        bad[11] = label
        with pytest.raises(ArgumentError, match=rf"target\[11\] .* got {label}\."):
            function(z, *teacher, bad, grad_out=gradient)
        assert np.all(gradient == 5)
    found = function(z, *teacher, y, grad_out=gradient)
    assert found[1] is gradient
    assert bits(found) == wanted


def test_probabilities_in_place_of_logits_are_warned_of_in_remembered_calls_too() -> None:
    z, y = logits(0), labels(2)
    p = F.softmax(z)
    for _ in range(3):
        F.distillation_loss(z, z, y)
        with pytest.warns(UserWarning, match="student_logits look like probabilities") as caught:
            F.distillation_loss(p, z, y)
        assert [w.filename for w in caught] == [__file__]
        with pytest.warns(UserWarning, match="logits look like probabilities") as caught:
            F.cross_entropy(p, y)
        assert [w.filename for w in caught] == [__file__]


def test_only_rows_that_all_look_like_probabilities_are_warned_of() -> None:
    first_two, one_row = logits(0), np.tile(np.float32([0.25, 0.75, 0]), (4, 1))
    first_two[0, :2] = 0.3, 0.7
    one_row[3, 2] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(first_two, labels(2))
        F.cross_entropy(one_row, [0, 1, 2, 0])


# --- what is kept ---


def test_arrays_are_released_when_their_user_lets_go_of_them() -> None:
    for _ in range(2):
        arrays = [logits(0), logits(1), labels(2)]
        loss, gradient = F.distillation_loss(*arrays, return_grad=True)
        arrays += [gradient, F.softmax(arrays[0]), execute(OPS["exp"], [arrays[0]], {})[0][0]]
        run("add_into", arrays[3], arrays[0])
        refs = [weakref.ref(x) for x in arrays]
        del arrays, gradient, loss
        gc.collect()
        assert [ref() for ref in refs] == [None] * 6


def test_an_error_keeps_no_array_either() -> None:
    arrays = [logits(0), logits(1), np.full(12, 99)]
    F.distillation_loss(arrays[0], arrays[1], labels(2))
    with pytest.raises(ArgumentError):
        F.distillation_loss(*arrays)
    refs = [weakref.ref(x) for x in arrays]
    del arrays
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_what_is_remembered_is_bounded_and_forgotten_looks_are_checked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_REMEMBERED", 5)
    memo = launch.Memo()
    for k in range(23):
        memo.remember(k, -k)
        assert memo.recall(k) == -k
        assert len(memo.answers) <= 5
    wanted = [bits(CALLS["softmax"](0, n=n)) for n in range(1, 9)]
    assert [bits(CALLS["softmax"](0, n=n)) for n in range(1, 9)] == wanted


def test_a_question_that_cannot_be_remembered_has_no_answer() -> None:
    memo = launch.Memo()
    memo.remember(("sum", [0, 1]), 1)
    assert memo.recall(("sum", [0, 1])) is None


def test_another_backend_remembers_nothing_of_this_one() -> None:
    z, before = logits(0), current_backend()
    F.softmax(z)
    assert recall("softmax", (z, 1.0), {}) is not None
    try:
        for name in [n for n, b in BACKENDS.items() if n != before and b.on_host and not b.missing()]:
            kd.use_backend(name)
            assert recall("softmax", (z, 1.0), {}) is None
    finally:
        kd.use_backend(before)


def test_arrays_of_a_subclass_can_be_bound_and_are_never_taken_for_plain_ones() -> None:
    z, t, y = logits(0), np.array(2.0), np.empty((12, 7), np.float32)
    for x in (z, z.view(np.matrix), z):
        bind("softmax", y, np.asarray(x) if current_backend() == "numpy" else x, t)()
        np.testing.assert_array_equal(y, F.softmax(z, temperature=2.0))
    with pytest.raises(ShapeError):
        bind("softmax", y, logits(0, n=3).view(np.matrix), t)


# --- records of the C backend ---


def records_of(name: str, *buffers: Any) -> Any:
    prepared = recall(name, buffers, OPS[name].attrs)
    assert prepared is not None
    return prepared.launch.free


def test_one_thread_needs_one_record_and_an_error_gives_it_back() -> None:
    z, t, y = logits(0), logits(1), labels(2)
    for _ in range(5):
        F.distillation_loss(z, t, y, return_grad=True)
        with pytest.raises(ArgumentError):
            F.distillation_loss(z, t, np.full(12, 7), return_grad=True)
    if current_backend() == "c":
        assert len(records_of("distillation_loss", z, t, y, 4.0, 0.5, 0.5)) == 1


def test_threads_at_once_never_share_a_record() -> None:
    """Large enough that the kernel runs without the interpreter's lock while other threads ask for the same look."""
    n, c, count = 64, 257, 4
    inputs = [(logits(k, n, c), logits(k + 50, n, c), labels(k, n, c)) for k in range(count)]

    def work(k: int) -> list[bytes]:
        z, t, y = inputs[k]
        loss = F.distillation_loss(z, t, y, temperature=1.0 + k, return_grad=True)
        return bits(loss) + bits(F.softmax(z, temperature=1.0 + k)) + bits(F.cross_entropy(z, y, return_grad=True))

    alone = [work(k) for k in range(count)]
    wrong: list[int] = []
    start = threading.Barrier(count)

    def repeat(k: int) -> None:
        start.wait()
        for _ in range(100 if current_backend() == "c" else 10):
            if work(k) != alone[k]:
                wrong.append(k)

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if current_backend() == "c":
        assert 1 <= len(records_of("distillation_loss", *inputs[0], 4.0, 0.5, 0.5)) <= count


def test_a_float_may_stand_for_a_scalar_buffer_and_for_nothing_else() -> None:
    z, y = logits(0), np.empty((12, 7), np.float32)
    for t in (1.0, 3.0):
        run("softmax", y, z, t)
        np.testing.assert_array_equal(y, F.softmax(z, temperature=t))
    with pytest.raises((DTypeError, ShapeError)):
        run("softmax", y, 1.0, 1.0)


def test_every_backend_with_launches_of_its_own_makes_them_for_all_its_kernels() -> None:
    for backend in BACKENDS.values():
        if not backend.missing():
            module = importlib.import_module(backend.module)
            if hasattr(module, "launcher"):
                assert all(callable(module.launcher(name)) for name in module.NAMES)
