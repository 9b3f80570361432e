"""The backend "cupy" where it runs: on a card (``pytest -m gpu``), and the same tests on the stand-in for CuPy.

Nothing here looks into how the backend works; that is done in test_device_arrays, test_device_plans and
test_cuda_kernels, which need no card. Run the tests of a card in a process of their own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu
import kernel_cases
import numpy as np
import pytest
from kernel_cases import Case, assert_agrees, cases, reference, widen
from standin import cupy as standin

import minikd as kd
from minikd import functional as F
from minikd.data import load
from minikd.errors import ArgumentError
from minikd.kernels import bind, composed, current_backend
from minikd.kernels.arrays import HOST_KINDS, address, on_device, to_device, to_host
from minikd.kernels.cuda import graphs
from minikd.ops import OPS
from minikd.ops.refusals import REFUSALS
from minikd.training import Training

FLOATS = ("float32", "float64")
each_float = pytest.mark.parametrize("dtype", FLOATS)


# --- where the tests run ---


class Place(NamedTuple):
    """Where the backend computes: its module cupy, and whether that is a card's."""

    cupy: Any
    is_card: bool

    def times(self, on_a_card: int, on_the_stand_in: int) -> int:
        """How often to do something that takes the stand-in long."""
        return on_a_card if self.is_card else on_the_stand_in


@contextmanager
def on_card() -> Iterator[Any]:
    reason = kd.backends()["cupy"].reason
    if reason:
        pytest.skip(f"needs an NVIDIA GPU and CuPy: {reason}")
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'minikd[cupy]'")
    if os.environ.get("MINIKD_WITHOUT_POOL") == "1":  # as sanitize_cuda.py asks, which then knows each array's end
        cupy.cuda.set_allocator(None)
    yield cupy


@contextmanager
def on_stand_in() -> Iterator[Any]:
    if cuda_on_cpu.compiler() is None:
        pytest.skip("needs g++, which makes kernels run on the processor")
    with standin.installed() as module:
        yield module


@pytest.fixture(params=["stand-in", pytest.param("card", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The backend "cupy" in use, on the stand-in and on a card."""
    before, is_card = current_backend(), request.param == "card"
    graphs._captures_products.clear()
    with on_card() if is_card else on_stand_in() as cupy:
        kd.use_backend("cupy")
        try:
            yield Place(cupy, is_card)
        finally:
            kd.use_backend(before)
            REFUSALS.forget()
            graphs._captures_products.clear()


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Compute with another backend for a while."""
    before = current_backend()
    kd.use_backend(backend)
    try:
        yield
    finally:
        kd.use_backend(before)


# --- the table of operations ---


def bound(name: str, *buffers: Any, **attrs: Any) -> tuple[Any, list[Any]]:
    """A call of a kernel on copies of these buffers, and the copies: numbers lie on the host, the rest on the card."""
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.arguments(name != op.name, len(buffers))
    given = [
        b if b is None else b.copy() if a.kind in HOST_KINDS else to_device(np.ascontiguousarray(b).reshape(b.shape))
        for a, b in zip(arguments, buffers, strict=True)
    ]
    return bind(name, *given, **attrs), given


def run(name: str, *buffers: Any, **attrs: Any) -> list[Any]:
    """The buffers after the kernel ran, as plain arrays."""
    call, given = bound(name, *buffers, **attrs)
    call()
    return [b if b is None else to_host(b) for b in given]


def drawn(name: str, dtype: str) -> list[Case]:
    with using("numpy"):
        return list(cases(name, dtype))


# Sums of products are added up in another order; their error grows with the terms of a sum and with what they are of.
FEW = {True: 4096, False: 128}


@each_float
@pytest.mark.parametrize("name", OPS)
def test_kernels_and_formulas_of_every_operation_agree_with_the_reference(name: str, dtype: str, place: Place) -> None:
    few = FEW[bool({name, name + "_vjp"} & {*composed.KERNELS, *composed.PRODUCTS})]
    for case in drawn(name, dtype):
        kernel_cases.check(run, name, case, dtype, few)


@pytest.mark.parametrize("name", ["distillation_loss", "cross_entropy", "softmax", "adam_step", "dropout", "take"])
def test_kernels_give_the_same_bits_each_time(name: str, place: Place) -> None:
    for case in drawn(name, "float32"):
        found = [run(name, *case.written, *case.inputs, **case.attrs) for _ in range(3)]
        bits = [[None if x is None else x.tobytes() for x in buffers] for buffers in found]
        assert bits[0] == bits[1] == bits[2]


@each_float
def test_gradients_of_rows_that_are_taken_several_times_have_the_same_bits_each_time(dtype: str, place: Place) -> None:
    rng, count = np.random.default_rng(3), place.times(5000, 200)
    rows, dy = rng.integers(0, 40, count), rng.normal(size=(count, 300)).astype(dtype)
    wanted = np.zeros((50, 300))
    np.add.at(wanted, rows, widen(dy))
    found = [run("take_vjp", np.full((50, 300), np.nan, dtype), dy, None, None, rows)[0] for _ in range(3)]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6, atol=1e-6)


# A warp holds a row, a block does in registers or shared memory, or it is read again.
LENGTHS = (1, 10, 33, 1000, 1025, 4097, 13000, 30000, 40000)


@each_float
@pytest.mark.parametrize("classes", LENGTHS)
def test_kernels_of_the_losses_take_rows_of_every_length(classes: int, dtype: str, place: Place) -> None:
    rng, rows = np.random.default_rng(classes), place.times(300, 3)
    student, teacher = (3 * rng.normal(size=(rows, classes)).astype(dtype) for _ in "st")
    labels = rng.integers(0, classes, rows)
    labels[rows // 2] = -100
    numbers = [np.array(x) for x in (3.0, 0.3, 0.7)]
    for name, inputs in {
        "distillation_loss": [student, teacher, labels, *numbers],
        "cross_entropy": [student, labels, None],
    }.items():
        written = [np.full(rows, np.nan, dtype), np.full_like(student, np.nan)]
        wide = [widen(x.copy()) for x in written]
        reference(name, *wide, *(widen(x) for x in inputs), reduction="none")
        for actual, wanted in zip(run(name, *written, *inputs, reduction="none"), wide, strict=False):
            assert_agrees(actual, wanted, few=512)


@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
def test_kernels_note_a_wrong_label_which_is_refused_when_somebody_waits(name: str, place: Place) -> None:
    z = to_device(np.zeros((5, 4)))
    labels = to_device(np.array([0, 3, 9, -100, 1]))
    given = (z, labels) if name == "cross_entropy" else (z, z + 1, labels)
    loss = getattr(F, name)(*given, reduction="none")
    with pytest.raises(ArgumentError, match=rf"{name}: target\[2\] must be a class id from 0 to 3 .*, got 9"):
        kd.synchronize()
    kd.synchronize()  # it is said once
    assert np.flatnonzero(np.isnan(to_host(loss))).tolist() == [2]


# Factors keep 10 or 7 bits; that tensor cores may cut off instead of rounding doubles the distance. All rows are whole
# vectors: where they are not, cuBLAS is free to compute in float32 after all.
@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bfloat16", 7)])
def test_products_at_another_precision_are_off_by_no_more_than_is_said(precision: str, bits: int, place: Place) -> None:
    if place.is_card and int(place.cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("needs a card of compute capability 8.0 or above")
    rng = np.random.default_rng(4)
    a, b = (rng.normal(size=(n, k)).astype(np.float32) for n, k in ((72, 64), (56, 64)))
    exact, most = a.astype(np.float64) @ b.T, np.abs(a).astype(np.float64) @ np.abs(b.T)
    with kd.matmul_precision(precision):
        found = to_host(F.linear(to_device(a), to_device(b), None))
        doubles = to_host(F.linear(to_device(widen(a)), to_device(widen(b)), None))
    off = np.abs(found - exact)
    assert (off <= 2.0**-bits * 2 * most).all()
    assert off.max() > 2.0 ** -(bits + 5) * np.abs(exact).mean()  # it was rounded at all
    np.testing.assert_allclose(doubles, exact, rtol=1e-12, atol=1e-12)


# --- steps ---

N, K, C = 16, 12, 5


class Setting:
    """A network, its optimizer, and a step of distillation."""

    def __init__(self) -> None:
        self.model = kd.nn.MLP([K, 24, C], activation="gelu", dropout=0.25, seed=3)
        self.opt = kd.optim.Adam(self.model.parameters(), 0.01, clip=0.5)

    def step(self, x: Any, y: Any, teacher: Any) -> Any:
        loss = F.distillation_loss(self.model(x), teacher, y, temperature=3.0)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss

    @property
    def state(self) -> dict[str, bytes]:
        return {n: a.tobytes() for n, a in {**self.model.state_dict(), **self.opt.state_dict()}.items()}


def batch(seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x, teacher = (rng.normal(size=(N, k)).astype(np.float32) for k in (K, C))
    return to_device(x), to_device(rng.integers(0, C, N)), to_device(teacher)


def test_a_replayed_step_leaves_the_bits_of_an_eager_one_on_any_stream(place: Place) -> None:
    eager, compiled, streamed = Setting(), Setting(), Setting()
    step, step_on_stream = kd.compile(compiled.step), kd.compile(streamed.step)
    stream = place.cupy.cuda.Stream(non_blocking=True)
    for seed in range(6):
        given = batch(seed)
        wanted, found = eager.step(*given).item(), step(*given).item()
        place.cupy.cuda.Device().synchronize()  # what the other stream reads is there
        with stream:
            on_stream = step_on_stream(*given).item()
        assert found == wanted == on_stream
    assert compiled.state == eager.state == streamed.state


def busy(cupy: Any, seconds: float) -> Any:
    """Give a card work for about so long; the event behind that work.

    It is few large products: a card takes in only some thousand launches before the host has to wait.
    """
    a = cupy.full((8192, 8192), 1e-3, np.float32)
    out = cupy.empty_like(a)
    cupy.matmul(a, a, out=out)  # whatever is set up at the first product
    cupy.cuda.Device().synchronize()
    began = time.perf_counter()
    cupy.matmul(a, a, out=out)
    cupy.cuda.Device().synchronize()
    for _ in range(int(seconds / (time.perf_counter() - began)) + 1):
        cupy.matmul(a, a, out=out)
    event = cupy.cuda.Event()
    event.record()
    return event


def test_a_step_waits_for_nothing(place: Place) -> None:
    s = Setting()
    step = kd.compile(s.step)
    given = [batch(seed) for seed in range(8)]
    kept = [step(*arguments) for arguments in given[:4]]
    kd.synchronize()
    before = busy(place.cupy, 1.0) if place.is_card else None
    kept.clear()  # so that the pool has room for what the next steps return
    standin.COPIES.reset()
    losses = [step(*arguments) for arguments in given[4:]]
    if before is None:
        assert (standin.COPIES.to_host, standin.COPIES.to_device) == (0, 0)
    else:
        assert not before.done, "the host came back after the card had done all that it was given before"
    assert all(on_device(loss.array) for loss in losses)
    assert np.isfinite([loss.item() for loss in losses]).all()


def test_memory_of_the_device_does_not_grow_with_steps(place: Place) -> None:
    s, eager = Setting(), Setting()
    step, given = kd.compile(s.step), batch(0)
    used = []
    for _ in range(place.times(1000, 40)):
        step(*given)
        eager.step(*given)
        memory = kd.memory_in_use()
        assert memory is not None
        used.append(memory.used)
    assert max(used[4:]) == used[4]  # it may fall, when garbage of the recording is collected


# --- trainings ---


def taught(backend: str, epochs: int, **options: Any) -> Training:
    """A training on random rows with a teacher's logits."""
    with using(backend):
        rng = np.random.default_rng(9)
        x, y = rng.normal(size=(300, 12)).astype(np.float32), rng.integers(0, 4, 300)
        soft = rng.normal(size=(300, 4)).astype(np.float32)
        model = kd.nn.MLP([12, 24, 4], dropout=0.25, seed=2)
        return Training(model, x, y, soft, epochs=epochs, batch_size=32, **options).run()


# Masks, orders of rows and first weights have the same bits, so only the rounding of sums differs: by 1e-7 of a loss at
# first, and the steps carry that on. On the stand-in, whose products are those of NumPy, losses of four epochs differ
# by 1e-8 at most. A card adds up products in another order, which changes each by some 1e-7; forty steps may make a few
# hundred times that of it. A mask or a row that is another one changes a loss by some 1e-2.
LOSSES_AGREE = 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_has_the_losses_of_the_hosts_training_of_the_same_seed(optimizer: str, place: Place) -> None:
    found, wanted = (taught(backend, 4, optimizer=optimizer) for backend in ("cupy", "numpy"))
    losses = [[epoch["loss"] for epoch in training.history] for training in (found, wanted)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=LOSSES_AGREE)


def test_a_training_has_the_same_bits_each_time(place: Place) -> None:
    found = [taught("cupy", 2) for _ in range(2)]
    assert found[0].history == found[1].history
    states = [{n: v.tobytes() for n, v in training.model.state_dict().items()} for training in found]
    assert states[0] == states[1]


def test_memory_of_the_device_does_not_grow_with_epochs(place: Place) -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(64, 6)).astype(np.float32), rng.integers(0, 4, 64)
    model = kd.nn.MLP([6, 8, 4], dropout=0.25, seed=2)
    epochs = place.times(100, 8)
    training = Training(model, x, y, x[:, :4].copy(), epochs=epochs, batch_size=16)
    used = []
    for _ in range(epochs):
        training.run(epochs=1)
        memory = kd.memory_in_use()
        assert memory is not None
        used.append(memory.used)
    assert max(used[3:]) == used[3]


def test_a_whole_distillation_runs_there_and_its_student_on_the_host(place: Place) -> None:
    data = load("digits")
    few = slice(0, place.times(len(data.x_train), 160))
    parts = {f"{kind}_train": getattr(data, f"{kind}_train")[few] for kind in ("x", "y", "rows")}
    data = dataclasses.replace(data, **parts)
    results = {}
    for backend in ("cupy", "numpy"):
        with using(backend):
            results[backend] = kd.distill((32,), (16,), data, epochs=2, teacher_epochs=2, seed=0)
    student = results["cupy"].student
    assert student.parameters()[0].device == "cuda"
    on_card = student.predict_proba(data.x_test)
    student.to("cpu")
    with using("numpy"):
        np.testing.assert_allclose(student.predict_proba(data.x_test), on_card, rtol=1e-4, atol=1e-6)
    accuracies = [results[b].report["student_distilled"]["test_accuracy"] for b in ("cupy", "numpy")]
    assert abs(np.mean(accuracies[0]) - np.mean(accuracies[1])) <= 0.01


# --- other libraries ---


def test_arrays_come_in_and_go_out_by_dlpack_without_a_copy(place: Place) -> None:
    array = place.cupy.arange(6, dtype=np.float32).reshape(2, 3)
    x = kd.from_dlpack(array)
    assert (x.device, address(x.array)) == ("cuda", address(array))
    back = place.cupy.from_dlpack(x)
    assert address(back) == address(array)


def test_the_page_on_the_gpu_runs_as_printed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(0)
    x, logits = (rng.normal(size=(4, 8, k)).astype(np.float32) for k in (784, 10))
    names: dict[str, Any] = {"batches": list(zip(x, logits, rng.integers(0, 10, (4, 8)), strict=True))}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/gpu.md", "exec"), names)
    assert np.isfinite(float(capsys.readouterr().out))
    assert isinstance(names["probabilities"], np.ndarray)
    assert (tmp_path / "student.safetensors").exists()


@pytest.mark.gpu
def test_pytorch_and_minikd_see_the_same_memory_of_the_card() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    with on_card(), using("cupy"):
        if not torch.cuda.is_available():
            pytest.skip("needs a PyTorch that computes on this card")
        theirs = torch.arange(6.0, device="cuda").reshape(2, 3)
        mine = kd.from_dlpack(theirs)
        theirs[1, 2] = 9
        torch.cuda.synchronize()
        assert mine.numpy().tolist() == [[0, 1, 2], [3, 4, 9]]
        assert torch.from_dlpack(mine).data_ptr() == theirs.data_ptr()
