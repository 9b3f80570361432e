"""The backend "cupy" on a strict stand-in for CuPy: what is computed there, what moves, and what is refused.

No GPU is needed. The stand-in refuses hidden copies; that it asks of CuPy only what CuPy has is compared with the real
one where that is installed.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import inspect
import pickle
import re
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from standin import computing
from standin import cupy as standin
from standin.cupy import COPIES

import minikd as kd
from minikd import feed, kernels, nn, steps
from minikd import functional as F
from minikd.checkpoints import Checkpoints
from minikd.cli import main
from minikd.data import load
from minikd.errors import ArgumentError, BackendError, DTypeError, ShapeError
from minikd.export.finetune import finetune
from minikd.kernels import (
    Backend,
    arrays,
    bind,
    composed,
    cuda,
    current_backend,
    execute,
    input_arguments,
    prepare,
    run,
)
from minikd.kernels.arrays import HOST_KINDS, address, here, is_writable, on_device, to_device, to_host
from minikd.objectives import IGNORED, NAMES, Batch, HardLabels, ReverseKL
from minikd.ops import OPS, Op
from minikd.report.environment import environment_table
from minikd.training import Training
from minikd.weighing import weigh_training


@pytest.fixture
def with_kernels() -> Iterator[Any]:
    """The stand-in as cupy, and its backend in use with its own kernels, which run on the processor."""
    with computing() as module:
        yield module


@pytest.fixture
def cupy(with_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same without these: what computes are the formulas, so that all bits are those of NumPy."""
    monkeypatch.setattr(cuda, "NAMES", frozenset())
    kd.use_backend("cupy")
    return with_kernels


def moved(op: Op, inputs: list[Any]) -> list[Any]:
    """An operation's inputs where the backend "cupy" takes them: numbers stay on the host."""
    arguments = input_arguments(op, len(inputs))
    return [
        x if x is None or a.kind in HOST_KINDS else to_device(np.asarray(x))
        for a, x in zip(arguments, inputs, strict=True)
    ]


# --- the table of operations ---

COMPUTED = [name for name, op in OPS.items() if not op.updates and op.outs[0].kind not in HOST_KINDS]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", COMPUTED)
def test_an_operation_on_the_device_has_the_bits_of_its_reference(name: str, dtype: Any, cupy: Any) -> None:
    op = OPS[name]
    for inputs, attrs in op.example(np.random.default_rng(5), dtype):
        kd.use_backend("numpy")
        outs, saved, _ = execute(op, inputs, attrs)
        kd.use_backend("cupy")
        given = moved(op, inputs)
        cupy.COPIES.reset()
        found, kept, _ = execute(op, given, attrs)
        assert (cupy.COPIES.to_host, cupy.COPIES.to_device) == (0, 0)
        for mine, wanted in zip([*found, *kept], [*outs, *saved], strict=True):
            if wanted is None:
                assert mine is None
            elif name in composed.KERNELS:  # which adds up in another order there
                np.testing.assert_allclose(
                    to_host(mine), wanted, rtol=1e-4 if dtype is np.float32 else 1e-12, atol=1e-5
                )
            else:
                assert on_device(mine)
                assert to_host(mine).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.updates])
def test_an_update_on_the_device_has_the_bits_of_its_reference(name: str, cupy: Any) -> None:
    op, rng = OPS[name], np.random.default_rng(6)
    for inputs, attrs in op.example(rng, np.float32):
        shape = np.shape(inputs[0]) if inputs else (4, 3) if "m" in op.letters else (12,)
        host: list[Any] = [
            np.array(3) if a.kind in HOST_KINDS else rng.uniform(0, 1, shape).astype(np.float32) for a in op.updates
        ]
        device = [x.copy() if a.kind in HOST_KINDS else to_device(x) for a, x in zip(op.updates, host, strict=True)]
        run(name, *device, *moved(op, inputs), **attrs)
        kd.use_backend("numpy")
        run(name, *host, *(np.asarray(x) for x in inputs), **attrs)
        kd.use_backend("cupy")
        for mine, wanted in zip(device, host, strict=True):
            assert to_host(mine).tobytes() == wanted.tobytes()


def test_a_tensor_is_made_on_the_device_and_its_gradient_comes_from_there(cupy: Any) -> None:
    x = kd.Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    loss = F.cross_entropy(x @ np.ones((3, 3)).tolist(), [0, 2])
    loss.backward()
    assert on_device(x.array)
    assert on_device(loss.array)
    assert x.grad is not None
    assert on_device(x.grad.array)
    np.testing.assert_allclose(x.grad.numpy(), np.zeros((2, 3)), atol=1e-12)


# --- training by hand ---


def learned(optimizer: str, backend: str, steps: int = 4) -> dict[str, np.ndarray]:
    """The weights of a small network after a few steps with dropout, clipping and a bound on the weights."""
    kd.use_backend(backend)
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(12, 6)).astype(np.float32), rng.integers(0, 4, 12)
    model = kd.nn.MLP([6, 8, 4], activation="gelu", dropout=0.3, seed=1)
    opt = kd.optim.OPTIMIZERS[optimizer](model.parameters(), 0.05, clip=0.5, max_norm=1.0)
    batch, labels = kd.Tensor(x), here.put(y)
    COPIES.reset()
    for step in range(steps):
        loss = F.distillation_loss(model(batch), batch @ model.layers[0].weight.T.detach()[:, :4], labels) * 0.5
        opt.zero_grad()
        opt.lr = 0.05 / (1 + step)
        loss.backward()
        opt.step()
    assert (COPIES.to_host, COPIES.to_device) == (0, 0)
    return model.state_dict() | opt.state_dict()


@pytest.mark.parametrize("optimizer", kd.optim.OPTIMIZERS)
def test_a_network_learns_the_same_bits_on_the_device_as_by_numpy(optimizer: str, cupy: Any) -> None:
    wanted, found = learned(optimizer, "numpy"), learned(optimizer, "cupy")
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in wanted.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_term_has_the_bits_of_the_host_and_copies_nothing_on_its_way(name: str, cupy: Any) -> None:
    rng = np.random.default_rng(8)
    given = {
        "logits": rng.normal(size=(7, 5)),
        "teacher": rng.normal(size=(7, 5)),
        "target": np.array([0, 4, IGNORED, 2, 1, 1, IGNORED]),
        "student's layer": np.abs(rng.normal(size=(7, 6))),
        "teacher's layer": np.abs(rng.normal(size=(7, 6))),
    }

    def of(backend: str) -> list[bytes]:
        kd.use_backend(backend)
        mine = {name: here.put(value) for name, value in given.items()}
        logits, layer = (kd.Tensor(mine[name], requires_grad=True) for name in ("logits", "student's layer"))
        batch = Batch(logits, mine["teacher"], mine["target"], {"1": layer}, {"1": mine["teacher's layer"]})
        term = NAMES[name](0.5)
        term.prepare(batch)
        COPIES.reset()
        loss = term(batch)
        loss.backward()
        assert (COPIES.to_host, COPIES.to_device) == (0, 0)
        leaves = [loss.array, *(t.grad.array for t in (logits, layer, *term.parameters()) if t.grad is not None)]
        return [to_host(leaf).tobytes() for leaf in leaves]

    assert of("cupy") == of("numpy")


# --- whole trainings ---


def settings(**more: Any) -> dict[str, Any]:
    return {"epochs": 2, "teacher_epochs": 2, "dropout": 0.2, "shift": 1, "patience": 2, "seed": 0, **more}


def distilled(backend: str, **more: Any) -> Any:
    kd.use_backend(backend)
    return kd.distill((16,), (8,), DATA, **settings(**more))


def few_digits() -> Any:
    data = load("digits")
    few = slice(0, 160)
    parts = {f"{kind}_train": getattr(data, f"{kind}_train")[few] for kind in ("x", "y", "rows")}
    return dataclasses.replace(data, **parts)


DATA = few_digits()
RUNS: dict[str, dict[str, Any]] = {
    "soft labels": {"teacher_dropout": 0.1, "teacher_shift": 1},
    "layers that are compared": {"objective": 'HardLabels() + Hints(1, pairs=(("1", "1"),))'},
    "a schedule": {"objective": 'HardLabels(0.5) + SoftLabels(0.5, temperature_schedule="linear(2, 1)")'},
    "together": {"mode": "online"},
    "balanced classes and clipped gradients": {"sampling": "balanced", "clip": 1.0, "optimizer": "nesterov"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_distillation_on_the_device_has_the_bits_of_the_host(name: str, cupy: Any) -> None:
    wanted = distilled("numpy", **RUNS[name])
    found = distilled("cupy", **RUNS[name])
    assert found.student.parameters()[0].device == "cuda"
    assert wanted.student.parameters()[0].device == "cpu"
    assert found.history == wanted.history
    for mine, theirs in ((found.student, wanted.student), (found.teacher, wanted.teacher)):
        same = {n: v.tobytes() for n, v in mine.state_dict().items()}
        assert same == {n: v.tobytes() for n, v in theirs.state_dict().items()}
    for model in ("teacher", "student_alone", "student_distilled"):
        assert found.report[model] == wanted.report[model]
    assert found.report["backend"] == "cupy"
    memory = found.report["gpu_memory"]
    assert 0 < memory["used"] <= memory["held"]
    assert "gpu_memory" not in wanted.report


def taught(backend: str, **options: Any) -> Training:
    """A short training on random rows with a teacher's logits, before its first step."""
    kd.use_backend(backend)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(150, 12)).astype(np.float32), rng.integers(0, 4, 150)
    soft = rng.normal(size=(150, 4)).astype(np.float32)
    model = kd.nn.MLP([12, 8, 4], dropout=0.25, seed=2)
    return Training(model, x, y, soft, epochs=3, batch_size=16, **options)


def weights_of(training: Training) -> bytes:
    return b"".join(value.tobytes() for value in training.model.state_dict().values())


def test_data_that_do_not_fit_are_brought_there_some_batches_at_a_time(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = taught("numpy").run()
    whole = taught("cupy")
    assert not whole._feed.streams
    monkeypatch.setattr(feed, "BYTES_AT_A_TIME", 3 * 16 * (12 * 4 + 8 + 4 * 4))  # three batches
    monkeypatch.setattr(feed, "SHARE_OF_MEMORY", 0.0)
    streamed = taught("cupy")
    assert streamed._feed.streams
    assert [len(a) for a in streamed._feed.arrays if a is not None] == [48, 48, 48]
    assert weights_of(streamed.run()) == weights_of(whole.run()) == weights_of(wanted)
    assert streamed.history == whole.history == wanted.history


def test_an_epoch_waits_for_the_device_as_often_however_many_steps_it_has(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SECONDS_A_CALL", 1e9)  # one call for all steps of an epoch
    waits = {}
    for rows in (64, 640):
        model = kd.nn.MLP([6, 8, 4], dropout=0.25, seed=2)
        rng = np.random.default_rng(9)
        x, y = rng.normal(size=(rows, 6)).astype(np.float32), rng.integers(0, 4, rows)
        training = Training(model, x, y, x[:, :4].copy(), epochs=3, batch_size=16)
        training.run(epochs=2)  # in which the steps are recorded
        COPIES.reset()
        training.run(epochs=1)
        waits[rows] = (COPIES.to_host, COPIES.to_device)
    assert waits[64] == waits[640]


def test_a_training_that_was_stopped_on_the_device_goes_on_to_the_same_bits(cupy: Any, tmp_path: Path) -> None:
    wanted = weights_of(taught("cupy").run())

    def checkpoint() -> Any:
        return Checkpoints(tmp_path, every=4, run="a run").training("a training")

    stopped = taught("cupy", keeper=checkpoint())
    stopped.run(epochs=1)
    assert weights_of(taught("cupy", keeper=checkpoint()).run()) == wanted
    on_host = taught("numpy", keeper=checkpoint())  # which a state from the device may go on at, too
    on_host.run()
    assert weights_of(on_host) == wanted


def test_a_saved_model_is_the_same_file_wherever_it_was_trained(cupy: Any, tmp_path: Path) -> None:
    for backend in ("numpy", "cupy"):
        kd.use_backend(backend)
        kd.save(tmp_path / backend, kd.nn.MLP([4, 3, 2], seed=5))
    assert (tmp_path / "cupy").read_bytes() == (tmp_path / "numpy").read_bytes()
    model = kd.load(tmp_path / "numpy")
    assert {p.device for p in model.parameters()} == {"cuda"}


def weighed(backend: str) -> Any:
    training = taught(backend, objective=HardLabels() + ReverseKL(0.5))
    return weigh_training(training, training.first_rows())


def finetuned(backend: str) -> Any:
    training = taught(backend, optimizer="adamw").run()
    x, soft = training._feed._host[0], training._feed._host[2]
    y = np.where(training._target == IGNORED, -1, training._target)
    found = finetune(training.model, x, y, soft, on_scale=True, epochs=2, batch_size=16)
    return [p.tobytes() for p in found.model.state_dict().values()], found.history


def without_a_class(backend: str) -> Any:
    training = taught(backend).run()
    x = training._feed._host[0]
    added = kd.correct_bias(training.model, x, [0.1, 0.2, 0.3, 0.4], normalised=True)
    return added.tolist(), training.model.predict_proba(x).mean(axis=0).tolist()


def by_an_ensemble(backend: str) -> Any:
    models = [taught(backend, seed=k).run().model for k in range(2)]
    teacher = kd.as_teacher(models, classes=4, average="probabilities")
    return teacher.logits(np.ones((3, 12), np.float32)).tolist()


@pytest.mark.parametrize("use", [weighed, finetuned, without_a_class, by_an_ensemble], ids=lambda f: f.__name__)
def test_what_is_done_with_a_model_of_the_device_gives_what_it_gives_on_the_host(use: Any, cupy: Any) -> None:
    assert use("cupy") == use("numpy")


# --- moving ---


def test_a_model_moves_by_name_and_predicts_the_same_on_both_sides(cupy: Any) -> None:
    rows = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    kd.use_backend("numpy")
    model = kd.nn.MLP([4, 8, 3], seed=1)
    wanted = model.logits(rows)
    kd.use_backend("cupy")
    with pytest.raises(BackendError, match=r"a CuPy array under the backend cupy.*model\.to\('cupy'\)"):
        model(here.put(rows))
    assert model.to("cupy") is model
    found = model.logits(rows)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, wanted)
    on_the_device = model.logits(here.put(rows))
    assert on_device(on_the_device)
    np.testing.assert_array_equal(to_host(on_the_device), wanted)
    kd.use_backend("numpy")
    np.testing.assert_array_equal(model.to("cpu").logits(rows), wanted)
    with pytest.raises(ArgumentError, match="one of cpu, numpy, c, numba, cuda, cupy, got 'tpu'"):
        model.to("tpu")


def test_many_rows_are_predicted_in_portions(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kd.nn.MLP([4, 8, 3], seed=1)
    rows = np.random.default_rng(3).normal(size=(23, 4)).astype(np.float32)
    whole = model.predict_proba(rows)
    monkeypatch.setattr(nn, "ROWS_ON_A_DEVICE", 5)
    COPIES.reset()
    np.testing.assert_array_equal(model.predict_proba(rows), whole)
    assert COPIES.to_host == 5
    np.testing.assert_array_equal(model.predict(rows), whole.argmax(axis=1))


def test_an_optimizer_takes_no_step_for_a_model_that_was_moved(cupy: Any) -> None:
    model = kd.nn.MLP([4, 3], seed=1)
    opt = kd.optim.Adam(model.parameters())
    model.to("cpu")
    with pytest.raises(ArgumentError, match="Make a new optimizer for what was moved"):
        opt.step()
    with pytest.raises(ArgumentError, match=r"of one dtype in one place, got 3 parameters .* on cpu and cuda"):
        kd.optim.Adam([*model.parameters(), kd.nn.Linear(2, 2, bias=False).weight])


NUMBERS = np.ones((2, 3), np.float32)
ELSEWHERE: dict[str, tuple[Any, str]] = {
    "a real array": (lambda x: F.softmax(NUMBERS), "softmax: x must be a CuPy array under the backend cupy"),
    "labels": (lambda x: F.cross_entropy(x, np.array([0, 1])), "cross_entropy: target must be a CuPy array"),
    "row numbers": (
        lambda x: F.take(x, np.array([0])),
        "take: rows must be a CuPy array under the backend cupy, got a NumPy",
    ),
    "an operand": (lambda x: kd.Tensor(x) + NUMBERS, "add: operand must be a CuPy array"),
    "a factor of a product": (lambda x: kd.Tensor(x) @ NUMBERS.T, "matmul: operand must be a CuPy array"),
    "a number on the device": (lambda x: F.softmax(x, temperature=x.sum()), "softmax: temperature must be a Python"),
    "a step on the device": (lambda x: F.dropout(x, step=x.sum()), "dropout: step must be a Python number"),
    "a learning rate": (lambda x: setattr(kd.optim.SGD([kd.Tensor(x)], 1.0), "lr", x.sum()), "SGD: lr must be a Py"),
    "a buffer": (
        lambda x: bind("relu", NUMBERS.copy(), x),
        "relu: y must be a CuPy array under the backend cupy, got a NumPy array",
    ),
    "a number as a buffer": (
        lambda x: bind("scale", x.copy(), x, x.astype(np.float64).sum()),
        "scale: factor must be a Python number, or a NumPy array without axes",
    ),
    "a number of the right dtype": (
        lambda x: prepare(OPS["scale"], [x, x.astype(np.float64).sum()]),
        "scale: factor must be a Python number, or a NumPy array without axes",
    ),
    "a counter": (
        lambda x: prepare(OPS["dropout"], [x, x.astype(np.int64).sum()]),
        "dropout: step must be a Python number, or a NumPy array without axes",
    ),
    "a tensor read by NumPy": (lambda x: np.asarray(kd.Tensor(x)), r"numpy: an array must be in the host's memory"),
    "an array of the device on the host": (
        lambda x: (kd.use_backend("numpy"), F.softmax(x)),
        "softmax: x must be a NumPy array under this backend, got a CuPy array",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_lies_elsewhere_is_refused_with_the_way_to_move_it(name: str, cupy: Any) -> None:
    call, message = ELSEWHERE[name]
    x = to_device(NUMBERS)
    COPIES.reset()
    with pytest.raises(BackendError, match=message):
        call(x)
    assert (COPIES.to_host, COPIES.to_device) == (0, 0)


def test_lists_of_numbers_are_taken_there_and_class_ids_among_them(cupy: Any) -> None:
    x = to_device(NUMBERS)
    (_, rows), _ = prepare(OPS["take"], [x, [1, 0, 1]])
    assert on_device(rows)
    assert rows.dtype == np.int64
    assert to_host(rows).tolist() == [1, 0, 1]


def test_class_ids_that_lie_apart_on_the_device_are_put_together_there(cupy: Any) -> None:
    ids = to_device(np.arange(6))
    (_, rows), _ = prepare(OPS["take"], [to_device(NUMBERS), ids[::2]])
    assert rows.flags.c_contiguous
    assert to_host(rows).tolist() == [0, 2, 4]
    assert prepare(OPS["take"], [to_device(NUMBERS), ids])[0][1] is ids


def test_an_upstream_gradient_is_taken_from_a_tensor_there_and_copied_there_from_the_host(cupy: Any) -> None:
    for gradient, copied in ((kd.Tensor([3.0, 4.0]), 0), (np.array([3.0, 4.0]), 1)):
        x = kd.Tensor([1.0, 2.0], requires_grad=True)
        COPIES.reset()
        (x * x).backward(gradient)
        assert (COPIES.to_host, COPIES.to_device) == (0, copied)
        assert x.grad.numpy().tolist() == [6, 16]


def test_what_is_computed_of_numbers_alone_stays_on_the_host(cupy: Any) -> None:
    (found,), _, _ = execute(OPS["set_scalar"], [np.float64(2)], {})
    assert isinstance(found, np.ndarray)
    assert found == 2


def test_a_tensor_is_made_where_it_is_asked_for_and_moves_by_name(cupy: Any) -> None:
    assert [kd.Tensor([1.0], device=place).device for place in (None, "cpu", "cuda", "numpy")] == [
        "cuda", "cpu", "cuda", "cpu",
    ]  # fmt: skip
    x = kd.Tensor([1.0, 2.0], requires_grad=True)
    assert x.to("cuda") is x
    moved = x.to("cpu")
    assert moved.requires_grad
    assert isinstance(moved.array, np.ndarray)
    assert repr(x) == repr(moved)
    assert [x.detach()[0].item(), float(x.sum()), x.numpy().tolist(), bool(x.sum())] == [1, 3, [1, 2], True]
    assert copy.deepcopy(x).device == "cuda"
    assert pickle.loads(pickle.dumps(x)).device == "cuda"
    kd.use_backend("numpy")
    assert pickle.loads(pickle.dumps(x)).device == "cpu"
    assert kd.Tensor(x).device == "cpu"


# --- other libraries' arrays ---


class Foreign:
    """An array of another library: it speaks DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_arrays_of_other_libraries_come_in_and_go_out_without_a_copy(cupy: Any) -> None:
    for array in (to_device(NUMBERS), NUMBERS.copy()):
        x = kd.from_dlpack(Foreign(array))
        assert x.device == ("cuda" if on_device(array) else "cpu")
        assert address(x.array) == address(array)
        assert x.__dlpack_device__() == array.__dlpack_device__()
        if is_writable(x.array):  # which what NumPy takes in is from its version 2.1 on
            assert address(kd.from_dlpack(Foreign(x)).array) == address(array)
        copied = kd.Tensor(Foreign(array))
        assert copied.device == "cuda"
        assert address(copied.array) != address(array)
    with pytest.raises(DTypeError, match="from_dlpack: value must be an array of float32 or float64, got int64"):
        kd.from_dlpack(Foreign(np.arange(3)))
    with pytest.raises(ShapeError, match="from_dlpack: value must be C-contiguous"):
        kd.from_dlpack(Foreign(NUMBERS.T))


def test_pytorch_and_minikd_see_the_same_memory() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    theirs = torch.arange(6.0).reshape(2, 3)
    mine = kd.from_dlpack(theirs)
    theirs[1, 2] = 9
    assert mine.numpy().tolist() == [[0, 1, 2], [3, 4, 9]]
    back = torch.from_dlpack(mine)
    with kd.no_grad():
        mine[...] = 1
    assert back.tolist() == theirs.tolist() == [[1, 1, 1], [1, 1, 1]]
    copied = kd.Tensor(theirs, requires_grad=True)
    theirs[0, 0] = 5
    assert copied.numpy().tolist() == [[1, 1, 1], [1, 1, 1]]


# --- values that a device refuses later ---


def on_the_device(*arrays: Any) -> list[Any]:
    return [to_device(np.asarray(a)) for a in arrays]


WRONG: dict[str, tuple[Any, str, int]] = {
    "a label": (
        lambda: F.cross_entropy(*on_the_device(np.zeros((3, 4)), [1, 9, 0]), reduction="none"),
        r"cross_entropy: target\[1\] must be a class id from 0 to 3 .*, got 9",
        1,
    ),
    "a label beside weights of the classes": (
        lambda: F.cross_entropy(
            *on_the_device(np.zeros((3, 4)), [1, 9, 0]), weight=to_device(np.ones(4)), reduction="none"
        ),
        r"cross_entropy: target\[1\] must be a class id from 0 to 3 .*, got 9",
        1,
    ),
    "a label of a distillation": (
        lambda: F.distillation_loss(*on_the_device(np.zeros((3, 4)), np.ones((3, 4)), [1, 3, -1]), reduction="none"),
        r"distillation_loss: target\[2\] must be .*, got -1",
        2,
    ),
    "a label of a decoupled distillation": (
        lambda: F.decoupled_kd(*on_the_device(np.zeros((3, 4)), np.ones((3, 4)), [4, 3, 1]), reduction="none"),
        r"decoupled_kd: target\[0\] must be .*, got 4",
        0,
    ),
    "a label of a confidence": (
        lambda: F.teacher_confidence(*on_the_device(np.zeros((3, 4)), [1, 3, 7])),
        r"teacher_confidence: target\[2\] must be .*, got 7",
        2,
    ),
    "a label of a correction": (
        lambda: F.corrected_logits(*on_the_device(np.zeros((3, 4)), [1, 3, 7])).sum(axis=1),
        r"corrected_logits: target\[2\] must be .*, got 7",
        2,
    ),
    "a row": (
        lambda: F.take(*on_the_device(np.zeros((3, 4)), [2, 3, 0])).sum(axis=1),
        r"take: rows\[1\] must be a row number from 0 to 2 \(x has 3 rows\), got 3",
        1,
    ),
    "a row of bytes": (
        lambda: F.take_scaled(*on_the_device(np.zeros((3, 4), np.uint8), [2, 0, -1]), 1.0, 0.0).sum(axis=1),
        r"take: rows\[2\] must be a row number from 0 to 2 .*, got -1",
        2,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_label_or_row_spoils_its_row_and_is_refused_when_somebody_waits(name: str, cupy: Any) -> None:
    call, message, row = WRONG[name]
    COPIES.reset()
    found = call()
    assert COPIES.to_host == 0
    with pytest.raises(ArgumentError, match=message):
        kd.synchronize()
    kd.synchronize()  # it is said once
    assert np.flatnonzero(np.isnan(to_host(found))).tolist() == [row]


@pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++, which compiles the kernels for the processor")
@pytest.mark.parametrize("name", ["a label", "a label of a distillation", "a row", "a row of bytes"])
def test_the_kernels_refuse_what_the_formulas_refuse(name: str, with_kernels: Any) -> None:
    call, message, row = WRONG[name]
    found = call()
    with pytest.raises(ArgumentError, match=message):
        to_host(found)
    assert np.flatnonzero(np.isnan(to_host(found))).tolist() == [row]


@pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++, which compiles the kernels for the processor")
def test_a_training_by_the_kernels_is_that_of_the_host_but_for_rounding(with_kernels: Any) -> None:
    wanted = taught("numpy").run()
    found = taught("cupy").run()
    assert not found._take.refusals
    losses = [[epoch["loss"] for epoch in training.history] for training in (found, wanted)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for mine, theirs in zip(found.model.state_dict().values(), wanted.model.state_dict().values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_first_wrong_label_is_the_one_that_is_named(cupy: Any) -> None:
    z = to_device(np.zeros((3, 4)))
    for labels in ([0, 1, 2], [0, 1, 11], [12, 0, 0]):
        F.cross_entropy(z, to_device(np.array(labels)))
    with pytest.raises(ArgumentError, match=r"target\[2\].*got 11"):
        kd.Tensor(1.0).numpy()


def test_a_label_that_was_not_there_to_be_taken_is_no_class(cupy: Any) -> None:
    labels = F.take(*on_the_device([0, 1, 2], [1, 5]))
    loss = F.cross_entropy(to_device(np.zeros((2, 3))), labels, reduction="none")
    with pytest.raises(ArgumentError, match=r"take: rows\[1\]"):
        to_host(loss)
    assert np.isnan(to_host(loss)).tolist() == [False, True]


def test_an_epoch_with_a_wrong_label_is_taken_back(cupy: Any) -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(64, 6)).astype(np.float32), rng.integers(0, 4, 64)
    y[40] = 4
    model = kd.nn.MLP([6, 8, 4], seed=2)
    before = model.state_dict()
    with pytest.raises(ArgumentError, match="class id from 0 to 3"):
        Training(model, x, y, epochs=2, batch_size=16).run()
    assert {n: v.tobytes() for n, v in model.state_dict().items()} == {n: v.tobytes() for n, v in before.items()}


# --- what is said ---


def test_memory_in_use_is_that_of_the_pool_and_none_on_the_host(cupy: Any) -> None:
    before = kd.memory_in_use()
    kept = kd.Tensor(np.zeros(1 << 20))
    after = kd.memory_in_use()
    assert before is not None
    assert after is not None
    assert after.used - before.used == kept.array.nbytes
    assert after.held >= after.used
    kd.use_backend("numpy")
    assert kd.memory_in_use() is None
    kd.synchronize()


def test_info_names_the_gpu_and_what_it_leaves_to_cupy(cupy: Any) -> None:
    text = "\n".join(" ".join(row) for row in environment_table().rows)
    assert "in use, on a stand-in on the host with 8,192 MiB, of which CuPy holds" in text


def test_without_a_gpu_the_backend_says_why(cupy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kd.use_backend("numpy")
    cupy.MEMORY["devices"] = 0
    try:
        status = kd.backends()["cupy"]
        assert (status.available, status.reason) == (False, "there is no GPU in this machine")
        with pytest.raises(BackendError, match=r"got 'cupy'\. Reason: there is no GPU in this machine"):
            kd.use_backend("cupy")
        with pytest.raises(BackendError, match=r"one that there is: cpu, numpy, c, numba, got 'cuda'"):
            kd.Tensor([1.0], device="cuda")
        assert main(["distill", "--data", "digits", "--backend", "cupy"]) != 0
        said = capsys.readouterr()
        assert "there is no GPU in this machine" in said.err + said.out
    finally:
        cupy.MEMORY["devices"] = 1


class Driver:
    """NVIDIA's driver: what it answers when it is begun with, and how many GPUs there are."""

    def __init__(self, status: int, count: int) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, place: Any) -> int:
        place._obj.value = self.count
        return 0


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(0, 1), ""),
        (Driver(0, 0), "there is no GPU in this machine"),
        (Driver(100, 0), "the driver of NVIDIA's GPUs answers with error 100"),
        (None, r"there is no driver of an NVIDIA GPU on this machine \((libcuda.so.1|nvcuda.dll)\)"),
    ],
)
def test_until_cupy_is_imported_the_driver_is_asked(driver: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert re.fullmatch(reason, cuda.unavailable())
    assert "cupy" not in sys.modules


def test_a_cupy_that_cannot_be_imported_is_refused_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ImportError("no libnvrtc")

    monkeypatch.setitem(kernels.BACKENDS, "cupy", Backend("minikd.kernels.reference", "", "cupy", on_host=False))
    monkeypatch.setattr(arrays, "load_cupy", fail)
    with pytest.raises(
        BackendError, match=r"Reason: CuPy cannot be imported \(no libnvrtc\): pip install 'minikd\[cupy\]'"
    ):
        kd.use_backend("cupy")


def test_the_backend_is_never_chosen_by_itself(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_in_use", [])
    monkeypatch.delenv("MINIKD_BACKEND", raising=False)
    assert current_backend() != "cupy"
    assert kd.Tensor([1.0]).device == "cpu"
    monkeypatch.setattr(kernels, "_in_use", [])
    monkeypatch.setenv("MINIKD_BACKEND", "cupy")
    assert current_backend() == "cupy"
    monkeypatch.undo()


# --- the real CuPy ---


def test_what_is_asked_of_the_stand_in_cupy_has_too(cupy: Any) -> None:
    """All that the tests of this process have used so far, and all that every operation and a training use."""
    for op in OPS.values():
        if not op.updates and op.outs[0].kind not in HOST_KINDS:
            for inputs, attrs in op.example(np.random.default_rng(5), np.float32)[:6]:
                execute(op, moved(op, inputs), attrs)
    taught("cupy").run()
    used = {name: set(keywords) for name, keywords in standin.USED.items()}
    kd.use_backend("numpy")
    before = {name: sys.modules.pop(name) for name in ("cupy", "cupy.cuda")}
    try:
        real = pytest.importorskip("cupy", reason="the real CuPy is not installed: pip install 'minikd[cupy]'")
        missing, other = [], []
        for name, keywords in used.items():
            try:
                found = attrgetter(name)(real)
            except AttributeError:
                missing.append(name)
                continue
            if isinstance(found, real.ufunc):
                taken = {"out", "casting", "dtype"}
            else:
                try:
                    taken = set(inspect.signature(found).parameters)
                except (TypeError, ValueError):
                    continue
            if "kwargs" not in taken and not keywords <= taken:
                other.append(f"{name} takes no {', '.join(sorted(keywords - taken))}")
        assert not missing
        assert not other
    finally:
        for name in [n for n in sys.modules if n == "cupy" or n.startswith("cupy.")]:
            del sys.modules[name]
        sys.modules.update(before)
        kd.use_backend("cupy")
