"""The Numba backend's own promises: when Numba is imported, what its kernels are called with, and its exponential.

That every kernel agrees with the reference is tested in test_ops, with all other backends.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.errors import ArgumentError
from minikd.kernels import jit
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS

needs_numba = pytest.mark.skipif(bool(jit.unavailable()), reason="needs the numba extra")
FLOATS = (np.float32, np.float64)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """Every compiled kernel by its name."""
    for module in jit.MODULES:
        importlib.import_module(f"minikd.kernels.{module}")
    return importlib.import_module("minikd.kernels.jit_real").KERNELS


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints for this code."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=variables, check=True, capture_output=True, text=True
    ).stdout.strip()


def scalar(value: float) -> Any:
    return np.asarray(value, np.float64)


def loss_attrs(name: str, **attrs: Any) -> dict[str, Any]:
    return {**OPS[name].attrs, **attrs}


# --- what is imported, and what is called how ---


def test_the_module_names_its_kernels_without_importing_numba() -> None:
    code = (
        "import sys; from minikd.kernels import jit; jit.unavailable(); print(len(jit.NAMES), 'numba' in sys.modules)"
    )
    assert run_python(code) == f"{len(jit.NAMES)} False"


@needs_numba
def test_the_table_of_names_is_what_the_modules_have(kernels: dict[str, Any]) -> None:
    assert set(kernels) == jit.NAMES
    for module, names in jit.MODULES.items():
        assert {kernels[name].py_func.__module__ for name in names.split()} == {f"minikd.kernels.{module}"}


@needs_numba
@pytest.mark.parametrize("name", sorted(jit.NAMES))
def test_a_kernel_takes_the_buffers_of_its_operation_and_then_the_attributes(
    name: str, kernels: dict[str, Any]
) -> None:
    op = OPS[name.removesuffix("_vjp")]
    buffers = op.buffers if name == op.name else op.vjp_buffers
    parameters = inspect.signature(kernels[name].py_func).parameters
    assert list(parameters) == [*(a.name for a in buffers), *op.attrs]


def test_every_word_that_an_attribute_may_be_has_its_own_code() -> None:
    assert len(set(jit.CODES.values())) == len(jit.CODES)
    words = {value for name in jit.NAMES if name in OPS for value in OPS[name].attrs.values() if isinstance(value, str)}
    assert words <= set(jit.CODES)


@needs_numba
def test_the_compiled_code_is_kept_where_numba_cache_dir_says(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from minikd.kernels import jit\n"
        "jit.binder('bias')(np.empty((2, 3)), np.ones((2, 3)), np.ones(3))()"
    )
    run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*bias*.nbc"))


@needs_numba
def test_a_read_only_input_does_not_compile_a_second_kernel(kernels: dict[str, Any]) -> None:
    x = np.arange(6.0).reshape(2, 3)
    y, frozen = np.empty((2, 3)), x.copy()
    frozen.flags.writeable = False
    jit.binder("softmax")(y, x, scalar(2))()
    compiled, expected = len(kernels["softmax"].signatures), y.copy()
    y[...] = np.nan
    jit.binder("softmax")(y, frozen, scalar(2))()
    assert len(kernels["softmax"].signatures) == compiled
    np.testing.assert_array_equal(y, expected)
    assert not frozen.flags.writeable


@needs_numba
def test_a_temperature_is_read_at_each_call_and_not_when_bound() -> None:
    x, t = np.array([[2.0, 1.0, 0.1]]), scalar(1)
    y = np.empty_like(x)
    call = jit.binder("softmax")(y, x, t)
    call()
    assert y[0, 0] == pytest.approx(0.65900113889, abs=1e-11)
    t[...] = 20
    call()
    assert y[0, 0] == pytest.approx(0.34957672354, abs=1e-11)


# --- what is refused ---


@needs_numba
@pytest.mark.parametrize("t", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_bad_temperature_is_refused_before_anything_is_written(name: str, t: float) -> None:
    y = np.full((2, 3), 7.0)
    with pytest.raises(ArgumentError, match=f"{name}: temperature must be a finite number above 0, got {t}"):
        jit.binder(name)(y, np.zeros((2, 3)), scalar(t))()
    with pytest.raises(ArgumentError, match=f"{name}: temperature"):
        jit.binder(name + "_vjp")(y, np.zeros((2, 3)), np.zeros((2, 3)), None, scalar(t))()
    assert (y == 7).all()


@needs_numba
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_out_of_range_is_refused_as_the_reference_refuses_it(label: int) -> None:
    logits, target = np.zeros((4, 3)), np.array([0, -100, label, 99])
    losses: dict[str, list[Any]] = {
        "cross_entropy": [logits, target, None],
        "distillation_loss": [logits, logits, target, scalar(4), scalar(0.5), scalar(0.5)],
    }
    for name, inputs in losses.items():
        loss, gradient = np.full((), 7.0), np.full((4, 3), 7.0)
        with pytest.raises(ArgumentError) as expected:
            bind_reference(name)(loss, gradient, *inputs, **loss_attrs(name))()
        with pytest.raises(ArgumentError) as found:
            jit.binder(name)(loss, gradient, *inputs, **loss_attrs(name))()
        assert str(found.value) == str(expected.value)
        assert loss == 7
        assert (gradient == 7).all()


@needs_numba
def test_a_bad_temperature_is_refused_before_a_bad_label() -> None:
    logits = np.zeros((1, 3))
    inputs = [logits, logits, np.array([9]), scalar(0), scalar(1), scalar(1)]
    with pytest.raises(ArgumentError, match="distillation_loss: temperature"):
        jit.binder("distillation_loss")(np.empty(()), None, *inputs, **loss_attrs("distillation_loss"))()


# --- buffers that nobody needs ---


@needs_numba
def test_a_gradient_that_nobody_needs_is_none() -> None:
    rng = np.random.default_rng(0)
    x, b, dy, y = rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    dx, db, dx_alone, db_alone = np.empty((5, 3)), np.empty(3), np.empty((5, 3)), np.empty(3)
    bind = jit.binder("bias_relu_vjp")
    bind(dx, db, dy, y, x, b)()
    bind(dx_alone, None, dy, y, None, None)()
    bind(None, db_alone, dy, y, None, None)()
    bind(None, None, dy, y, None, None)()
    np.testing.assert_array_equal(dx_alone, dx)
    np.testing.assert_array_equal(db_alone, db)


@needs_numba
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_distillation_without_labels_is_one_whose_labels_are_all_ignored(reduction: str) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    shape = (4,) if reduction == "none" else ()
    results = []
    for target in (None, np.full(4, -100)):
        loss, gradient = np.empty(shape), np.empty((4, 3))
        inputs = [student, teacher, target, scalar(4), scalar(0.5), scalar(0.5)]
        attrs = loss_attrs("distillation_loss", reduction=reduction)
        jit.binder("distillation_loss")(loss, gradient, *inputs, **attrs)()
        results.append((loss, gradient))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@needs_numba
@pytest.mark.parametrize("name", ["bias", "bias_relu", "bias_tanh", "bias_sigmoid", "bias_gelu"])
def test_no_rows_give_a_bias_gradient_of_zero(name: str) -> None:
    none, db = np.empty((0, 3)), np.full(3, np.nan)
    jit.binder(name)(none, none, np.zeros(3))()
    jit.binder(name + "_vjp")(none, db, none, none, none, np.zeros(3))()
    assert (db == 0).all()


@needs_numba
@pytest.mark.parametrize("seed", [0, 2**40 + 5, 2**63 + 7, -3])
@pytest.mark.parametrize("size", [1, 1023, 1025])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.999999])
def test_a_dropout_mask_has_the_bits_of_the_reference(size: int, p: float, seed: int) -> None:
    x, step, attrs = np.ones(size, np.float32), np.asarray(2**33 + 1), {"p": p, "seed": seed, "stream": 3}
    found, expected, y = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    jit.binder("dropout")(y, found, x, step, **attrs)()
    bind_reference("dropout")(y, expected, x, step, **attrs)()
    np.testing.assert_array_equal(found, expected)


# --- numbers ---


def in_float(name: str, x: Any) -> Any:
    """One of the compiled elementary functions over an array."""
    numba = importlib.import_module("numba")
    function = getattr(importlib.import_module("minikd.kernels.jit_real"), name)

    @numba.njit
    def over(x: Any, y: Any) -> None:
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    over(x, y)
    return y


def ulps(found: Any, exact: Any) -> float:
    """The largest error in units of the last place of the exact (longdouble) values."""
    return float(np.max(np.abs(found - exact) / np.spacing(np.abs(exact).astype(found.dtype))))


@needs_numba
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a long double wider than float64")
@pytest.mark.parametrize("real", FLOATS)
def test_the_exponential_is_right_to_11_tenths_of_an_ulp(real: Any) -> None:
    rng = np.random.default_rng(0)
    lowest = float(np.log(np.finfo(real).tiny))
    parts = [rng.uniform(lowest, 0, 300_000), rng.uniform(-0.7, 0, 300_000), -(10.0 ** rng.uniform(-30, 0, 100_000))]
    x = np.maximum(np.concatenate(parts).astype(real), real(lowest * 0.9999))
    assert ulps(in_float("exp", x), np.exp(x.astype(np.longdouble))) < 1.1
    assert ulps(in_float("expm1", x), np.expm1(x.astype(np.longdouble))) < 1.3


@needs_numba
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a long double wider than float64")
def test_the_logarithm_is_right_to_three_ulps() -> None:
    rng = np.random.default_rng(0)
    parts = [10.0 ** rng.uniform(-323, 308, 300_000), rng.uniform(0.7, 1.42, 300_000), 1 + 1e-6 * rng.normal(size=9999)]
    x = np.concatenate(parts)
    assert ulps(in_float("log64", x), np.log(x.astype(np.longdouble))) < 3


@needs_numba
@pytest.mark.parametrize("real", FLOATS)
def test_the_exponential_of_nothing_infinite_and_not_a_number(real: Any) -> None:
    x = np.array([0.0, -0.0, -np.inf, -1e30, -746, np.nan, -np.nan], real)
    np.testing.assert_array_equal(in_float("exp", x), [1, 1, 0, 0, 0, np.nan, np.nan])
    np.testing.assert_array_equal(in_float("expm1", x), [0, 0, -1, -1, -1, np.nan, np.nan])


@needs_numba
def test_the_logarithm_of_nothing_infinite_and_not_a_number() -> None:
    x = np.array([0.0, -0.0, 1.0, np.inf, -1.0, -np.inf, np.nan])
    np.testing.assert_array_equal(in_float("log64", x), [-np.inf, -np.inf, 0, np.inf, np.nan, np.nan, np.nan])


@needs_numba
@pytest.mark.parametrize("real", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 200])
def test_the_maximum_of_a_row_is_not_a_number_if_one_of_its_numbers_is_not(columns: int, real: Any) -> None:
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(4, columns)).astype(real)
    x[1, columns // 2], x[2, -1] = np.nan, -np.nan
    y = np.empty_like(x)
    jit.binder("softmax")(y, x, scalar(1))()
    assert np.isnan(y[1:3]).all()
    np.testing.assert_allclose(y[[0, 3]].sum(axis=1), 1, rtol=1e-6)


@needs_numba
def test_nearly_equal_rows_keep_their_divergence_in_float32() -> None:
    rng = np.random.default_rng(0)
    teacher = (3 * rng.normal(size=(6, 50)) + 1000).astype(np.float32)
    student = (teacher - np.float32(997) + np.float32(1e-3) * rng.normal(size=(6, 50))).astype(np.float32)
    found, expected = np.empty(6, np.float32), np.empty(6)
    attrs = loss_attrs("distillation_loss", reduction="none")
    scalars = [scalar(4), scalar(0), scalar(1)]
    jit.binder("distillation_loss")(found, None, student, teacher, None, *scalars, **attrs)()
    wide = [student.astype(np.float64), teacher.astype(np.float64)]
    bind_reference("distillation_loss")(expected, None, *wide, None, *scalars, **attrs)()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@needs_numba
def test_a_class_that_only_the_student_excludes_costs_infinity_however_small_the_teachers_share() -> None:
    student = np.array([[0, -np.inf], [0, -np.inf]], np.float32)
    teacher = np.array([[0, -300], [0, -1e6]], np.float32)  # e^-300 is above 0 in float64, e^-1e6 is not
    loss = np.empty(2, np.float32)
    inputs = [student, teacher, None, scalar(1), scalar(0), scalar(1)]
    attrs = loss_attrs("distillation_loss", reduction="none")
    jit.binder("distillation_loss")(loss, None, *inputs, **attrs)()
    np.testing.assert_array_equal(loss, [np.inf, 0])


@needs_numba
def test_where_no_cache_can_be_written_kernels_are_compiled_for_this_process_alone(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jit_real = importlib.import_module("minikd.kernels.jit_real")
    njit = jit_real.njit

    def without_a_cache(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    def doubled_for_a_test(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(jit_real, "njit", without_a_cache)
    monkeypatch.setattr(jit_real, "KERNELS", {})
    assert jit_real.kernel(doubled_for_a_test)(1.5) == 3.0
    assert set(jit_real.KERNELS) == {"doubled_for_a_test"}
