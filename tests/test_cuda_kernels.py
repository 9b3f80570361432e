"""The CUDA kernels, run on the processor, against the reference: values, edges, what they refuse, and their bits."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import cuda_on_cpu
import kernel_cases
import numpy as np
import pytest
from cuda_on_cpu import RawModule
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Case, cases, reference, widen

from minikd.errors import ArgumentError
from minikd.kernels import kernel_names, native
from minikd.kernels.arrays import HOST_KINDS
from minikd.kernels.cuda import launches
from minikd.kernels.cuda.table import KERNELS, VARIANTS
from minikd.ops import OPS
from minikd.ops.refusals import Refusals

FLOATS = ("float32", "float64")
each_float = pytest.mark.parametrize("dtype", FLOATS)
pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++")


# --- a stand-in for the few parts of CuPy that launches needs ---


class Pointer(NamedTuple):
    ptr: int


class DeviceArray(np.ndarray):
    """An array whose address is found as CuPy's is."""

    @property
    def data(self) -> Any:
        return Pointer(self.ctypes.data)


def on_device(x: Any) -> Any:
    return np.array(x, order="C").view(DeviceArray)


class Device:
    shared = 232448

    @property
    def attributes(self) -> dict[str, int]:
        return {"MaxSharedMemoryPerBlockOptin": Device.shared}


def filled(shape: Any, dtype: Any) -> Any:
    """Memory as it may be found: nothing that a kernel may rely on."""
    return on_device(np.frombuffer(bytes([0xFF]) * np.empty(shape, dtype).nbytes, dtype).reshape(shape))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in: Any = types.ModuleType("cupy")
    stand_in.RawModule, stand_in.ndarray = RawModule, DeviceArray
    stand_in.empty = filled
    stand_in.zeros = lambda shape, dtype: on_device(np.zeros(shape, dtype))
    stand_in.cuda = types.SimpleNamespace(Device=Device)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(launches, "REFUSALS", Refusals())
    monkeypatch.setattr(launches, "_module", modules)
    yield
    RawModule.order = 0


_built: dict[Any, Any] = {}
_make_module = launches._module.__wrapped__


def modules(name: str, double: bool, cupy: Any) -> Any:
    """Modules that all tests share, for each test has another stand-in."""
    if (name, double) not in _built:
        _built[name, double] = _make_module(name, double, cupy)
    return _built[name, double]


# --- running a kernel and its reference ---


def bound(name: str, *buffers: Any, **attrs: Any) -> Any:
    """A call of a kernel on copies of these buffers, and the copies."""
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.buffers if name == op.name else op.vjp_buffers
    given = [b if b is None or a.kind in HOST_KINDS else on_device(b) for a, b in zip(arguments, buffers, strict=True)]
    full = {**op.attrs, **attrs}
    return launches.launcher(name)(given, full).bind(*given), given


def run(name: str, *buffers: Any, **attrs: Any) -> list[Any]:
    """The buffers after the kernel ran, as plain arrays."""
    call, given = bound(name, *buffers, **attrs)
    call()
    return [np.array(b) if b is not None else None for b in given]


def check(name: str, case: Case, dtype: str, few: float = 64) -> None:
    """A kernel and, where there is one, that of its vjp against the reference in float64."""
    kernel_cases.check(run, name, case, dtype, few, backward=name + "_vjp" in KERNELS)


FORWARD = sorted(n for n in KERNELS if not n.endswith("_vjp"))
each_order = pytest.mark.parametrize("order", [1, 2], ids=["backwards", "mixed"])


@each_float
@pytest.mark.parametrize("name", FORWARD)
def test_every_kernel_agrees_with_the_reference_on_every_example(name: str, dtype: str) -> None:
    for case in cases(name, dtype):
        check(name, case, dtype)


def test_every_kernel_is_one_of_the_table_of_operations_and_has_its_vjp() -> None:
    assert not launches.NAMES - set(kernel_names())
    differentiable = {n for n in FORWARD if OPS[n].vjp}
    assert not {n + "_vjp" for n in differentiable} - launches.NAMES


@each_float
@each_order
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_no_result_depends_on_the_order_in_which_threads_and_blocks_run(name: str, dtype: str, order: int) -> None:
    backward, op = name.endswith("_vjp"), OPS[name.removesuffix("_vjp")]
    for case in list(cases(op.name, dtype))[:: 5 if op.name == "distillation_loss" else 3]:
        buffers = [*case.written, *case.inputs]
        if backward:
            written = run(op.name, *buffers, **case.attrs)[: len(case.written)]
            given = [x for a, x in zip(op.inputs, case.inputs, strict=True) if a.name in op.wrt]
            douts = [np.ones_like(x) for x in written[: len(op.outs)]]
            buffers = [*(np.empty_like(x) for x in given), *douts, *written, *case.inputs]
        found = []
        for RawModule.order in (0, 0, order):
            found.append([None if b is None else b.tobytes() for b in run(name, *buffers, **case.attrs)])
        assert found[0] == found[1] == found[2]


# --- rows of every length ---

LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025)


def scalars(*values: float) -> list[Any]:
    return [np.array(x) for x in values]


def row_inputs(name: str, n: int, c: int, dtype: str, seed: int = 3) -> list[Any]:
    """Inputs of an operation on rows: one row without a label where there are labels."""
    rng = np.random.default_rng(seed)
    z, other = (3 * rng.normal(size=(n, c)).astype(dtype) for _ in "st")
    labels = rng.integers(0, c, n)
    labels[n // 2] = -100
    weight = rng.uniform(0.2, 2, c).astype(dtype)
    return {
        "softmax": [z, *scalars(3)],
        "log_softmax": [z, *scalars(3)],
        "cross_entropy": [z, labels, weight],
        "soft_cross_entropy": [z, np.abs(other) / c, weight],
        "distillation_loss": [z, other, labels, *scalars(3, 0.3, 0.7)],
    }[name]


def row_case(name: str, inputs: list[Any], dtype: str, **attrs: Any) -> Case:
    op = OPS[name]
    full = {**op.attrs, **attrs}
    outs, saved = op.infer([x if x is None else x.shape for x in inputs], full)
    return Case([np.full(s, np.nan, dtype) for s in (*outs, *saved)], inputs, full)


ROW_LOSSES = ("cross_entropy", "soft_cross_entropy", "distillation_loss")
ON_ROWS = ("softmax", "log_softmax", *ROW_LOSSES)


@each_float
@pytest.mark.parametrize("name", ON_ROWS)
def test_rows_of_every_length_agree_with_the_reference(name: str, dtype: str) -> None:
    for c in LENGTHS:
        smoothing = {"label_smoothing": 0.1} if name in ROW_LOSSES else {}
        check(name, row_case(name, row_inputs(name, 6, c, dtype), dtype, **smoothing), dtype, few=128)


def used(call: Any) -> list[str]:
    return [launched.function.name for launched in call.launches]


@pytest.mark.parametrize(
    ("dtype", "c", "shared", "function"),
    [
        ("float32", 1025, 232448, "distillation_block_8"),
        ("float32", 4097, 232448, "distillation_block_24"),
        ("float32", 12288, 232448, "distillation_block_24"),
        ("float32", 12289, 232448, "distillation_shared"),
        ("float32", 28928, 232448, "distillation_shared"),
        ("float32", 28929, 232448, "distillation_both"),
        ("float32", 35072, 232448, "distillation_both"),
        ("float32", 35073, 232448, "distillation_held"),
        ("float32", 13000, 101376, "distillation_both"),
        ("float32", 1100, 4096, "distillation_again"),
        ("float64", 513, 232448, "distillation_block_8"),
        ("float64", 4097, 232448, "distillation_block_16"),
        ("float64", 8193, 232448, "distillation_shared"),
        ("float64", 14465, 232448, "distillation_both"),
        ("float64", 17537, 232448, "distillation_held"),
        ("float64", 600, 4096, "distillation_again"),
    ],
)
def test_rows_that_a_warp_cannot_hold_agree_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: str, c: int, shared: int, function: str
) -> None:
    monkeypatch.setattr(Device, "shared", shared)
    for temperature, near in ((3.0, False), (1.0, True)):
        inputs = row_inputs("distillation_loss", 3, c, dtype)
        inputs[3] = np.array(temperature)
        if near:
            inputs[1] = (inputs[0] + 1e-3 * inputs[1]).astype(dtype)
        case = row_case("distillation_loss", inputs, dtype, reduction="none", label_smoothing=0.1)
        assert function in used(bound("distillation_loss", *case.written, *case.inputs, **case.attrs)[0])
        check("distillation_loss", case, dtype, few=512)


def test_the_last_function_of_each_kind_takes_rows_of_any_length() -> None:
    for by_size in VARIANTS.values():
        for itemsize, variants in by_size.items():
            lengths = [v.most for v in variants if v.most]
            assert lengths == sorted(lengths)
            assert variants[-1].most == variants[-1].kept == 0
            for v in variants[:-1]:
                assert launches.variant(
                    next(k for k in VARIANTS if VARIANTS[k] is by_size), v.most or 1, itemsize, 10**9
                )


@each_float
@pytest.mark.parametrize("name", [*ON_ROWS, "bias_relu", "adam_step", "dropout", "take", "take_scaled"])
def test_no_result_depends_on_where_the_arrays_lie(name: str, dtype: str) -> None:
    on_rows = name in ON_ROWS
    case = row_case(name, row_inputs(name, 3, 100, dtype), dtype) if on_rows else list(cases(name, dtype))[-1]
    op, found = OPS[name], []
    for shift in range(4):
        given = []
        for argument, x in zip(op.buffers, [*case.written, *case.inputs], strict=True):
            if x is None or argument.kind in HOST_KINDS or argument.kind == "index":
                given.append(x if x is None or argument.kind in HOST_KINDS else on_device(x))
                continue
            room = np.zeros(x.size + 8, x.dtype)
            room[shift : shift + x.size] = x.ravel()
            given.append(room[shift : shift + x.size].reshape(x.shape).view(DeviceArray))
        launches.launcher(name)(given, case.attrs).bind(*given)()
        found.append([np.array(x).tobytes() for x in given[: len(case.written)]])
    assert all(f == found[0] for f in found)


# --- accuracy, as it is promised of the C kernels ---


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 1500])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 4.0, 20.0])
def test_a_float_gradient_is_right_to_a_millionth_of_the_largest_probability_of_its_row(
    classes: int, temperature: float
) -> None:
    rng = np.random.default_rng(classes)
    for spread, offset in ((3, 0), (10, 0), (3, 100)):
        z_s, z_t = (spread * rng.normal(size=(5, classes)).astype(np.float32) for _ in "st")
        z_s += np.float32(offset)
        numbers = scalars(temperature, 0, 1)
        exact, exact_loss = np.empty(z_s.shape), np.empty(5)
        empty = np.empty(5, np.float32), np.empty_like(z_s)
        loss, gradient, *_ = run("distillation_loss", *empty, z_s, z_t, None, *numbers, reduction="none")
        reference("distillation_loss", exact_loss, exact, widen(z_s), widen(z_t), None, *numbers, reduction="none")
        p, q = np.empty(z_s.shape), np.empty(z_s.shape)
        reference("softmax", p, widen(z_s), numbers[0])
        reference("softmax", q, widen(z_t), numbers[0])
        largest = np.maximum(p, q).max(axis=1, keepdims=True)
        assert np.all(np.abs(gradient - exact) <= 1e-6 * temperature * largest)
        np.testing.assert_allclose(loss, exact_loss, rtol=2e-6, atol=1e-13 * temperature**2)


@pytest.mark.parametrize("classes", [10, 101, 1500])
@pytest.mark.parametrize("apart", [1e-3, 0.1, 0.5, 1.0, 2.0, 6.0])
def test_a_float_loss_is_right_to_a_millionth_however_near_the_student_comes(classes: int, apart: float) -> None:
    rng = np.random.default_rng(7)
    z_t, noise = (rng.normal(size=(6, classes)).astype(np.float32) for _ in "tn")
    z_t *= np.float32(3)
    z_s, numbers, exact = z_t + np.float32(apart) * noise, scalars(4, 0, 1), np.empty(6)
    loss, *_ = run("distillation_loss", np.empty(6, "f"), None, z_s, z_t, None, *numbers, reduction="none")
    reference("distillation_loss", exact, None, widen(z_s), widen(z_t), None, *numbers, reduction="none")
    np.testing.assert_allclose(loss, exact, rtol=1e-6, atol=16 * 1.8e-15)


@each_float
@pytest.mark.parametrize("classes", [2, 101, 2000])
def test_the_loss_of_an_almost_certain_row_keeps_its_digits(dtype: str, classes: int) -> None:
    below = np.linspace(0, 60, 25).astype(dtype)
    z = np.full((below.size, classes), -np.inf, dtype)
    z[:, 0], z[:, 1] = 0, -below
    labels = np.zeros(below.size, np.int64)
    loss, *_ = run("cross_entropy", np.empty(below.size, dtype), None, z, labels, None, reduction="none")
    np.testing.assert_allclose(loss, np.log1p(np.exp(-below.astype(np.float64))), rtol=1e-6, atol=3e-16)


@each_float
@pytest.mark.parametrize("classes", [1, 10, 700, 1500])
def test_of_a_student_that_agrees_with_its_teacher_loss_and_gradient_are_zero(dtype: str, classes: int) -> None:
    z = 5 * np.random.default_rng(classes).normal(size=(4, classes)).astype(dtype)
    z[1] += 1000
    for temperature in (0.3, 1.0, 3.0, 1e6, 1e300):
        numbers = scalars(temperature, 0.5, 0.5)
        loss, gradient, *_ = run(
            "distillation_loss", np.empty(4, dtype), np.empty_like(z), z, z, None, *numbers, reduction="none"
        )
        assert not loss.any()
        assert not gradient.any()


# --- edges ---


def edge_rows(dtype: str, c: int) -> tuple[Any, Any]:
    """Rows of student and teacher that formulas.md decides; one thing in each, the last plain."""
    rng = np.random.default_rng(5)
    z_s, z_t = (rng.normal(size=(13, c)).astype(dtype) for _ in "st")
    inf = np.inf
    z_s[0, 1] = z_t[0, 1] = -inf  # both rule out a class,
    z_s[1, 0] = -inf  # the student alone,
    z_t[2, 2] = -inf  # the teacher alone
    z_s[3, 2] = np.nan
    z_t[4, 0] = np.nan
    z_s[5] = -inf
    z_t[6] = -inf
    z_s[7, 1] = inf
    z_t[8, 2] = inf
    z_s[9] = np.round(z_s[9]) * dtype_of(dtype)(2**20) + dtype_of(dtype)(1e14)  # far above the teacher
    z_s[10, :3] = (1e30, -1e30, 0)
    z_t[11, :3] = (-1e30, 1e30, 0)
    return z_s, z_t


def dtype_of(dtype: str) -> Any:
    return np.dtype(dtype).type


@each_float
@pytest.mark.parametrize("c", [3, 100, 1500])
@pytest.mark.parametrize("temperature", [1e-150, 1e-3, 1.0, 4.0, 1e12])
@pytest.mark.parametrize("labels", ["right", "none", "ignored"])
def test_masks_infinities_and_nan_give_what_the_reference_gives(
    dtype: str, c: int, temperature: float, labels: str
) -> None:
    z_s, z_t = edge_rows(dtype, c)
    n = len(z_s)
    target = {"right": np.arange(n) % 3, "none": None, "ignored": np.full(n, -100)}[labels]
    numbers, exact, exact_loss = scalars(temperature, 0.5, 0.5), np.empty(z_s.shape), np.empty(n)
    empty = np.empty(n, dtype), np.empty_like(z_s)
    loss, gradient, *_ = run("distillation_loss", *empty, z_s, z_t, target, *numbers, reduction="none")
    reference("distillation_loss", exact_loss, exact, widen(z_s), widen(z_t), target, *numbers, reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), np.isnan(exact_loss))
    np.testing.assert_array_equal(np.isnan(gradient), np.isnan(exact))
    representable = np.abs(exact_loss) < float(np.finfo(dtype).max)
    np.testing.assert_array_equal(np.isfinite(loss), np.isfinite(exact_loss) & representable)
    usual = np.isfinite(loss) & (np.arange(n) != 9) & (temperature < 1e4)
    few = 1e-5 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(loss[usual], exact_loss[usual], rtol=few, atol=few)
    assert np.all(loss[np.isfinite(loss)] >= 0)


@each_float
def test_a_weight_of_0_leaves_its_loss_out_and_a_temperature_whose_square_is_0_does_not(dtype: str) -> None:
    z_s, z_t = (x[[12, 4, 6]] for x in edge_rows(dtype, 5))
    target, empty = np.array([0, 1, 2]), (np.empty(3, dtype), np.empty_like(z_s))
    loss, gradient, *_ = run("distillation_loss", *empty, z_s, z_t, target, *scalars(2, 1, 0), reduction="none")
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    loss, gradient, *_ = run("distillation_loss", *empty, z_s, z_t, target, *scalars(1e-300, 1, 1), reduction="none")
    assert np.isnan(loss).tolist() == [False, True, True]
    broken = z_s.copy()
    broken[1] = np.nan
    loss, gradient, *_ = run("distillation_loss", *empty, broken, z_t, target, *scalars(2, 1, 0), reduction="none")
    assert np.isnan(loss).tolist() == [False, True, False]
    target[1] = -100
    loss, gradient, *_ = run("distillation_loss", *empty, broken, z_t, target, *scalars(2, 1, 0), reduction="none")
    assert np.isfinite(loss).all()
    assert not gradient[1].any()


@each_float
@pytest.mark.parametrize("c", [3, 40, 1500])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "soft_cross_entropy"])
def test_a_broken_row_is_nan_and_touches_no_other(name: str, dtype: str, c: int) -> None:
    inputs = row_inputs(name, 5, c, dtype)
    inputs[0][0, 1] = np.nan
    inputs[0][1] = -np.inf
    inputs[0][2, 0] = np.inf
    inputs[0][3, 2] = -np.inf
    case = row_case(name, inputs, dtype, **({"reduction": "none"} if "entropy" in name else {}))
    wide = [widen(x.copy()) for x in case.written]
    reference(name, *wide, *(widen(x) for x in inputs), **case.attrs)
    found = run(name, *case.written, *inputs, **case.attrs)
    for actual, wanted in zip(found, wide, strict=False):
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
        np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted))


@each_float
def test_over_no_labelled_row_the_mean_is_0_whatever_stands_in_the_rows(dtype: str) -> None:
    z = np.full((3, 4), np.nan, dtype)
    loss, gradient, *_ = run("cross_entropy", np.empty((), dtype), z.copy(), z, np.full(3, -100), None)
    assert loss == 0
    assert not gradient.any()


# --- what is refused ---


@each_float
@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
@pytest.mark.parametrize("c", [4, 1500])
def test_the_first_wrong_label_is_found_afterwards_and_its_row_is_nan(name: str, dtype: str, c: int) -> None:
    inputs = row_inputs(name, 400, c, dtype) if c < 100 else row_inputs(name, 5, c, dtype)
    place = 1 if name == "cross_entropy" else 2
    inputs[place][3], inputs[place][-1] = c, -1
    empty = np.empty(len(inputs[0]), dtype), np.empty_like(inputs[0])
    call, buffers = bound(name, *empty, *inputs, reduction="none")
    call()
    wrong = np.zeros(len(inputs[0]), bool)
    wrong[[3, -1]] = True
    np.testing.assert_array_equal(np.isnan(buffers[0]), wrong)
    np.testing.assert_array_equal(np.isnan(buffers[1]), np.repeat(wrong[:, None], c, axis=1))
    with pytest.raises(ArgumentError, match=rf"target\[3\].*{c}"):
        launches.REFUSALS.check()
    launches.REFUSALS.check()


@each_float
def test_the_first_wrong_row_number_is_found_afterwards(dtype: str) -> None:
    x, rows = np.ones((5, 7), dtype), np.array([0, 4, 5, -1])
    found, *_ = run("take", np.zeros((4, 7), dtype), x, rows)
    assert np.isnan(found).all(axis=1).tolist() == [False, False, True, True]
    with pytest.raises(ArgumentError, match=r"rows\[2\].*from 0 to 4.*5"):
        launches.REFUSALS.check()
    bytes_, column = np.ones((5, 7), np.uint8), np.ones(7, dtype)
    found, *_ = run("take_scaled", np.zeros((4, 7), dtype), bytes_, rows, column, column)
    assert np.isnan(found).all(axis=1).tolist() == [False, False, True, True]
    run("take_index", np.zeros(4, np.int64), np.arange(3), np.array([0, 2, 1, 3]))
    with pytest.raises(ArgumentError, match=r"rows\[2\].*from 0 to 4.*5"):
        launches.REFUSALS.check()  # the first one; what came later has been seen with it
    launches.REFUSALS.check()


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["softmax", "log_softmax_vjp", "distillation_loss"])
def test_a_bad_temperature_is_refused_before_anything_is_launched(name: str, temperature: float) -> None:
    z, t = np.zeros((2, 3)), np.array(temperature)
    buffers = {
        "softmax": [z.copy(), z, t],
        "log_softmax_vjp": [z.copy(), z, z, None, t],
        "distillation_loss": [np.zeros(()), None, z, z, None, t, *scalars(1, 1)],
    }[name]
    call, given = bound(name, *buffers)
    with pytest.raises(ArgumentError, match="temperature"):
        call()
    assert not given[0].any()


# --- numbers that the host gives ---


def test_a_number_is_read_at_each_call() -> None:
    temperature = np.array(1.0)
    z = np.random.default_rng(0).normal(size=(3, 5))
    call, given = bound("softmax", np.empty_like(z), z, temperature)
    for t in (1.0, 4.0):
        temperature[...] = t
        call()
        wanted = np.exp(z / t)
        np.testing.assert_allclose(given[0], wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-12)


def test_a_number_is_read_from_the_cards_memory_where_a_call_points_there() -> None:
    z = np.random.default_rng(0).normal(size=(3, 5))
    call, given = bound("distillation_loss", np.empty(()), np.empty_like(z), z, z[::-1].copy(), None, *scalars(1, 0, 1))
    call()
    at_1 = float(given[0])
    block = on_device(np.array([4.0, 0.0, 1.0]))
    assert [number.name for number in call.numbers] == ["temperature", "hard_weight", "soft_weight"]
    for k, number in enumerate(call.numbers):
        number.point(block.ctypes.data + 8 * k)
    for launched in call.launches:
        launched()
    wanted = np.empty(())
    reference("distillation_loss", wanted, None, z, z[::-1].copy(), None, *scalars(4, 0, 1))
    np.testing.assert_allclose(given[0], wanted, rtol=1e-12)
    block[0] = -1
    for launched in call.launches:
        launched()
    assert np.isnan(given[0])
    assert np.isnan(given[1]).all()
    for number in call.numbers:
        number.point(0)
    call()
    assert float(given[0]) == at_1


def test_a_float_stands_for_a_scalar_and_a_run_is_a_bound_call() -> None:
    z = on_device(np.random.default_rng(0).normal(size=(3, 5)))
    y, launch = on_device(np.empty_like(z)), launches.launcher("softmax")
    launch([y, z, 2.0], {}).run(y, z, 2.0)
    np.testing.assert_allclose(np.array(y).sum(axis=1), 1, rtol=1e-12)


def test_a_call_keeps_its_shared_memory_when_another_look_takes_the_same_function() -> None:
    found = []
    for c in (12000, 11000):
        inputs = row_inputs("distillation_loss", 1, c, "float32")
        case = row_case("distillation_loss", inputs, "float32")
        found.append(bound("distillation_loss", *case.written, *inputs, **case.attrs)[0])
    assert used(found[0]) == used(found[1])
    found[0]()


def test_many_rows_are_counted_and_added_up_by_as_many_threads_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MANY", 300)
    n = 1030
    z, labels = np.zeros((n, 2), np.float32), np.zeros(n, np.int64)
    z[:, 0] = np.arange(n) % 7
    labels[-1] = 2
    call, given = bound("cross_entropy", np.empty((), "f"), np.empty_like(z), z, labels, None)
    assert [launched.block for launched in call.launches] == [(1024,), (128,), (1024,)]
    call()
    assert np.isnan(given[0])
    with pytest.raises(ArgumentError, match=rf"target\[{n - 1}\]"):
        launches.REFUSALS.check()
    labels[-1] = 1
    wanted, exact = np.empty(()), np.empty(z.shape)
    reference("cross_entropy", wanted, exact, widen(z), labels, None)
    loss, gradient, *_ = run("cross_entropy", np.empty((), "f"), np.empty_like(z), z, labels, None)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-9)


@given(st.data())
def test_a_drawn_distillation_loss_agrees_with_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    dtype, n, c = draw(st.sampled_from(FLOATS)), draw(st.integers(1, 9)), draw(st.integers(1, 140))
    rng, spread = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from([1e-3, 1.0, 30.0]))
    z_s, z_t = (spread * rng.normal(size=(n, c)) + draw(st.sampled_from([0, 100])) for _ in "st")
    labels = draw(st.none() | st.just(rng.integers(0, c, n)))
    if labels is not None and draw(st.booleans()):
        labels[rng.integers(0, n)] = -100
    numbers = scalars(draw(st.floats(0.2, 50)), draw(st.sampled_from([0, 0.3, 2])), draw(st.sampled_from([0, 0.7, 3])))
    attrs = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "scale_t2": draw(st.booleans()),
        "log_target": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    inputs = [z_s.astype(dtype), z_t.astype(dtype), labels, *numbers]
    check("distillation_loss", row_case("distillation_loss", inputs, dtype, **attrs), dtype, few=2000)


# --- the same bits as the C kernels ---


@each_float
def test_a_dropout_mask_has_the_bits_of_cs(dtype: str, c_built: None) -> None:
    for size, p, step in ((1, 0.5, 0), (1003, 0.3, 9), (4096, 0.75, 2**33 + 1), (50, 1.0, 3)):
        x = np.random.default_rng(size).normal(size=size).astype(dtype)
        attrs = {"p": p, "seed": -5 + 2**40, "stream": 2**31 + 3}
        wanted = [np.empty_like(x), np.empty_like(x)]
        native.binder("dropout", "base")(*wanted, x, np.array(step), **attrs)()
        found = run("dropout", np.empty_like(x), np.empty_like(x), x, np.array(step), **attrs)
        assert [f.tobytes() for f in found[:2]] == [w.tobytes() for w in wanted]


@each_float
@pytest.mark.parametrize("name", ["sgd_step", "adam_step", "shift_images", "take_scaled", "standardise"])
def test_optimizer_steps_and_rows_that_are_fetched_have_the_bits_of_cs(name: str, dtype: str, c_built: None) -> None:
    for case in cases(name, dtype):
        wanted = [x.copy() for x in case.written]
        native.binder(name, "base")(*wanted, *case.inputs, **case.attrs)()
        found = run(name, *case.written, *case.inputs, **case.attrs)
        for actual, expected in zip(found, wanted, strict=False):
            assert actual.tobytes() == expected.tobytes()


# --- under the sanitizers ---


@pytest.mark.skipif(os.environ.get("MINIKD_SANITIZE") != "1", reason="takes a minute; asked for by MINIKD_SANITIZE=1")
def test_no_kernel_reads_or_writes_beyond_its_arrays_or_leaves_anything_undefined() -> None:
    environment = cuda_on_cpu.sanitized()
    if environment is None:
        pytest.skip("needs the sanitizers of g++ (libasan, libubsan)")
    chosen = "every_example or every_length or warp_cannot or arrays_lie or masks"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
