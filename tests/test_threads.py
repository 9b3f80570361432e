"""The C kernels on several threads: the same bits for any number of them, forks, and calls at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.errors import ArgumentError, BackendError
from minikd.kernels import native
from minikd.ops import OPS

TASKS = Path("/proc/self/task")  # one entry for each thread of this process, on Linux
ACTIVATIONS = ("bias", "bias_relu", "bias_tanh", "bias_sigmoid", "bias_gelu")
each_float = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(autouse=True)
def as_many_threads_as_before(c_built: None) -> Iterator[None]:
    before = native.threads()
    yield
    native.set_threads(before)


def call(name: str, *buffers: Any, **attrs: Any) -> native.NativeCall:
    return native.binder(name)(*buffers, **{**OPS[name.removesuffix("_vjp")].attrs, **attrs})


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; one that hangs is a failure."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],  # newer Pythons warn of forks with threads
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the same bits ---


def flat(rng: np.random.Generator, size: int, dtype: str) -> dict[str, tuple[list[Any], list[Any], dict[str, Any]]]:
    """For each kernel that treats every element alone: what it writes, what it reads, attributes."""
    x, g = (rng.normal(size=size).astype(dtype) for _ in "xg")
    lr, step = np.array(0.1), np.array(3)
    momentum = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    return {
        "sgd_step": ([x.copy(), np.abs(g)], [g, lr], momentum),
        "adam_step": ([x.copy(), g.copy(), np.abs(x)], [g, lr, step], {"weight_decay": 0.1}),
        "clip_norm": ([x.copy()], [], {"limit": 0.5}),
        "add_into": ([x.copy()], [g], {}),
        "dropout": ([np.empty_like(x), np.empty_like(x)], [x, step], {"p": 0.3, "seed": 5, "stream": 2}),
        "dropout_vjp": ([np.empty_like(x)], [g, None, x, None, None], {"p": 0.3}),
    }


def on_rows(rng: np.random.Generator, n: int, m: int, dtype: str) -> dict[str, tuple[list[Any], list[Any], Any]]:
    """The same for the kernels on rows."""
    x, y, dy = (rng.normal(size=(n, m)).astype(dtype) for _ in "xyg")
    b = rng.normal(size=m).astype(dtype)
    rows, scales = rng.permutation(n), [b, b]
    found: dict[str, tuple[list[Any], list[Any], Any]] = {
        "take": ([np.empty_like(x)], [x, rows], {}),
        "take_scaled": ([np.empty_like(x)], [(x * 100).astype(np.int8).view(np.uint8), rows, *scales], {}),
    }
    shifts = {"width": m, "most": 0, "seed": 5, "stream": 2}
    found["shift_images"] = ([np.empty_like(x)], [x, b, np.array(3)], shifts)
    if m % 27 == 0:
        found["shift_images of lines"] = (
            [np.empty_like(x)],
            [x, None, np.array(3)],
            {**shifts, "width": 27, "most": 2},
        )
    for name in ACTIVATIONS:
        found[name] = ([np.empty_like(x)], [x, b], {})
        found[name + "_vjp"] = ([np.empty_like(x), np.empty_like(b)], [dy, y, x, b], {})
        found[name + "_vjp without dx"] = ([None, np.empty_like(b)], [dy, y, x, b], {})
    return found


def on_classes(rng: np.random.Generator, n: int, c: int, dtype: str) -> dict[str, tuple[list[Any], list[Any], Any]]:
    """The same for the kernels on rows of classes."""
    z, other = (3 * rng.normal(size=(n, c)).astype(dtype) for _ in "so")
    target, t, one = rng.integers(0, c, n), np.array(4.0), np.array(1.0)
    target[n // 2] = -100
    p, log_p = np.empty_like(z), np.empty_like(z)
    call("softmax", p, other, one)()
    call("log_softmax", log_p, z, one)()

    def outs(*arrays: Any) -> list[Any]:
        return [np.empty_like(x) for x in arrays]

    loss, row = np.empty((), dtype), np.empty(n, dtype)
    scalars = [t, np.array(0.3), np.array(0.7)]
    return {
        "softmax": (outs(z), [z, t], {}),
        "softmax_vjp": (outs(z), [other, p, None, t], {}),
        "log_softmax": (outs(z), [z, t], {}),
        "log_softmax_vjp": (outs(z), [other, log_p, None, t], {}),
        "cross_entropy": (outs(loss, z), [z, target, None], {"label_smoothing": 0.1}),
        "cross_entropy without reduction": (outs(row, z), [z, target, None], {"reduction": "none"}),
        "cross_entropy_vjp": (outs(z), [row, None, other, z, target, None], {"reduction": "none"}),
        "soft_cross_entropy": (outs(loss, z), [z, p, None], {}),
        "kl_div": (outs(loss, z), [log_p, p], {}),
        "distillation_loss": (outs(loss, z), [z, other, target, *scalars], {}),
        "distillation_loss near": (outs(loss, z), [z, z + other / 1000, target, *scalars], {}),
        "argmax": (outs(target), [z], {}),
        "correct_count": ([np.empty((), np.int64)], [z, target], {}),
        "teacher_confidence": (outs(row), [z, None, t], {}),
        "teacher_confidence of labels": (outs(row), [z, target, t], {}),
        "corrected_logits": (outs(z), [z, target], {}),
    }


def assert_same_bits_on_any_number_of_threads(cases: dict[str, tuple[list[Any], list[Any], Any]]) -> None:
    for name, (written, read, attrs) in cases.items():
        found = set()
        for n in (1, 2, 3, 7):
            native.set_threads(n)
            outs = [None if x is None else x.copy() for x in written]
            call(name.split()[0], *outs, *read, **attrs)()
            found.add(b"".join(x.tobytes() for x in outs if x is not None))
        assert len(found) == 1, f"{name}: other bits on other threads"


@each_float
@pytest.mark.parametrize("size", [0, 1, 5, 40_000, 2**20 - 1, 2**20, 2**20 + 1, 2_500_003])
def test_elements_are_the_same_bits_on_any_number_of_threads(size: int, dtype: str) -> None:
    assert_same_bits_on_any_number_of_threads(flat(np.random.default_rng(size), size, dtype))


@each_float
@pytest.mark.parametrize(
    "shape",
    [(0, 5), (1, 2_000_001), (3, 511), (256, 512), (2048, 513), (3000, 729), (1000, 1700), (150_001, 10), (33, 40_000)],
)
def test_rows_are_the_same_bits_on_any_number_of_threads(shape: tuple[int, int], dtype: str) -> None:
    assert_same_bits_on_any_number_of_threads(on_rows(np.random.default_rng(shape[1]), *shape, dtype))


@each_float
@pytest.mark.parametrize("shape", [(2, 3), (20_003, 10), (3001, 100), (1500, 101), (999, 1000), (5, 250_007)])
def test_rows_of_classes_are_the_same_bits_on_any_number_of_threads(shape: tuple[int, int], dtype: str) -> None:
    assert_same_bits_on_any_number_of_threads(on_classes(np.random.default_rng(shape[1]), *shape, dtype))


@each_float
@pytest.mark.parametrize("shape", [(200_000, 10), (5000, 513)])
def test_a_bias_gradient_added_up_in_bands_is_the_sum_of_its_rows(shape: tuple[int, int], dtype: str) -> None:
    dy = np.random.default_rng(0).normal(size=shape).astype(dtype)
    db = np.empty(shape[1], dtype)
    call("bias_vjp", None, db, dy, None, None, None)()
    exact = dy.sum(axis=0, dtype=np.longdouble)
    np.testing.assert_allclose(db, exact.astype(dtype), rtol=np.finfo(dtype).eps, atol=1e-11)


# --- the threads themselves ---


def running() -> int:
    if not TASKS.exists():
        pytest.skip(f"needs {TASKS} of Linux to count threads")
    return len(list(TASKS.iterdir()))


COUNT = (
    "import os, numpy as np\n"
    "from minikd.kernels import native\n"
    "def add(size):\n"
    "    y = np.zeros(size, np.float32)\n"
    "    before = len(os.listdir('/proc/self/task'))\n"
    "    native.binder('add_into')(y, np.ones_like(y))()\n"
    "    assert (y == 1).all()\n"
    "    return len(os.listdir('/proc/self/task')) - before\n"
)


def test_a_small_call_starts_no_thread_and_a_large_one_starts_what_it_may() -> None:
    assert running() >= 1
    code = COUNT + "print(add(10_000), add(4_000_000), add(4_000_000), native.threads())"
    assert python(code, MINIKD_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1") == "0 2 0 3"


def test_one_thread_is_the_calling_one() -> None:
    assert running() >= 1
    assert python(COUNT + "print(add(4_000_000))", MINIKD_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") == "0"


def test_there_are_as_many_threads_as_processors_unless_something_else_is_said() -> None:
    said = python("from minikd.kernels import native; print(native.threads())", MINIKD_NUM_THREADS="")
    assert int(said) == len(native.usable_cpus())


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5", "1000"])
def test_a_bad_number_of_threads_in_the_environment_is_refused_in_words(wrong: str) -> None:
    code = (
        "import minikd as kd\n"
        "from minikd.kernels import native\n"
        "print(native.unavailable())\n"
        "for action in (native.threads, lambda: native.binder('take'), kd.kernels.current_backend):\n"
        "    try: action()\n"
        "    except kd.errors.BackendError as error: print(error)\n"
    )
    said = python(code, MINIKD_NUM_THREADS=wrong, MINIKD_BACKEND="")
    assert said.count("MINIKD_NUM_THREADS must be a whole number from 1 to 256") == 4
    assert said.count(f"got '{wrong}'") == 4


@pytest.mark.parametrize("wrong", [0, -1, 257, 1.5, "2", True, None])
def test_a_bad_number_of_threads_is_refused_in_words(wrong: Any) -> None:
    before = native.threads()
    with pytest.raises(ArgumentError, match="set_threads: n must be a whole number from 1 to 256, got"):
        native.set_threads(wrong)
    assert native.threads() == before


def test_without_the_extension_module_there_are_no_threads_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_module", None)
        with pytest.raises(BackendError, match="the C backend must be built"):
            native.threads()
        with pytest.raises(BackendError, match="the C backend must be built"):
            native.set_threads(2)


# --- forks ---

FORK = (
    "import os, threading, numpy as np\n"
    "from minikd.kernels import native\n"
    "native.set_threads(4)\n"
    "def add(times):\n"
    "    y = np.zeros(2_000_000, np.float32)\n"
    "    one = np.ones_like(y)\n"
    "    for _ in range(times):\n"
    "        native.binder('add_into')(y, one)()\n"
    "    return bool((y == times).all())\n"
    "def child():\n"
    "    pid = os.fork()\n"
    "    if not pid:\n"
    "        os._exit(0 if add(5) and add(5) else 1)\n"
    "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
)


def needs_fork() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    needs_fork()
    assert python(FORK + "print(child(), add(5), child(), add(5), child())") == "0 True 0 True 0"


def test_a_child_forked_while_another_thread_is_inside_a_kernel_does_not_hang() -> None:
    needs_fork()
    code = FORK + (
        "stop = threading.Event()\n"
        "def busy():\n"
        "    while not stop.is_set():\n"
        "        assert add(5)\n"
        "others = [threading.Thread(target=busy) for _ in range(2)]\n"
        "for thread in others: thread.start()\n"
        "found = {child() for _ in range(20)}\n"
        "stop.set()\n"
        "for thread in others: thread.join()\n"
        "print(found, add(5))\n"
    )
    assert python(code) == "{0} True"


def test_an_interpreter_ends_while_a_kernel_runs_in_a_daemon_thread() -> None:
    code = FORK + "threading.Thread(target=add, args=(10**9,), daemon=True).start()\nprint(add(20))"
    assert python(code) == "True"


# --- several calls at once ---


def test_kernels_called_from_several_threads_at_once_are_right() -> None:
    native.set_threads(3)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(700, 1000)).astype(np.float32)
    b = rng.normal(size=1000).astype(np.float32)
    wanted, wanted_db = np.empty_like(x), np.empty_like(b)
    call("bias_tanh", wanted, x, b)()
    call("bias_tanh_vjp", None, wanted_db, x, wanted, x, b)()
    wrong: list[str] = []

    def repeat() -> None:
        y, db = np.empty_like(x), np.empty_like(b)
        forward, backward = call("bias_tanh", y, x, b), call("bias_tanh_vjp", None, db, x, wanted, x, b)
        for _ in range(30):
            y[...], db[...] = 0, 0
            forward()
            backward()
            if y.tobytes() != wanted.tobytes() or db.tobytes() != wanted_db.tobytes():
                wrong.append("other bits")

    workers = [threading.Thread(target=repeat) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_another_thread_goes_on_while_a_kernel_runs() -> None:
    """With the interpreter's own switching turned off, only a kernel that releases the lock lets the other count."""
    size = 1_000_000
    words = [np.empty(size), np.empty(size), np.ones(size), np.array(1)]
    kernel = call("dropout", *words, p=0.5)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # gives the lock back

    before = sys.getswitchinterval()
    other = threading.Thread(target=count)
    other.start()
    try:
        sys.setswitchinterval(1000.0)
        start = counted[0]
        for _ in range(1000):
            kernel()
            if counted[0] > start:
                break
        assert counted[0] > start
    finally:
        sys.setswitchinterval(before)
        stop.set()
        other.join()
