"""The C backend: every level of instructions against the reference, its errors, and its memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpmath import mp

from minikd.errors import ArgumentError, BackendError
from minikd.kernels import execute, kernel_names, native, prepare
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS
from minikd.ops.op import KINDS

FLOATS = ("float32", "float64")
WIDE = 5003  # classes of a row that does not fit on the stack
each_float = pytest.mark.parametrize("dtype", FLOATS)
each_level = pytest.mark.parametrize("level", native.cpu_levels() or ("base",))


pytestmark = pytest.mark.usefixtures("c_built")


def run(level: str, name: str, *buffers: Any, **attrs: Any) -> None:
    native.binder(name, level)(*buffers, **{**OPS[name.removesuffix("_vjp")].attrs, **attrs})()


def reference(name: str, *buffers: Any, **attrs: Any) -> None:
    bind_reference(name)(*buffers, **{**OPS[name.removesuffix("_vjp")].attrs, **attrs})()


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def units_in_the_last_place(actual: Any, exact: Any) -> float:
    """The largest error in ulp; `exact` is of a wider type."""
    spacing = np.spacing(np.abs(exact).astype(actual.dtype))
    return float((np.abs(actual.astype(exact.dtype) - exact) / spacing).max())


def state(argument: Any, inputs: Any, rng: np.random.Generator, dtype: str) -> Any:
    """What a kernel finds in a buffer that it updates."""
    if argument.kind == "counter":
        return np.array(5)
    return np.abs(rng.normal(size=inputs[0].shape if inputs else 67)).astype(dtype)


# --- exp, on which everything stands ---


def exponential(level: str, x: Any) -> Any:
    """e^x as the kernels compute it: the gradient of kl_div with respect to its input is -e^target."""
    x = np.ascontiguousarray(x).reshape(1, -1)
    gradient, loss = np.empty_like(x), np.empty_like(x)
    run(level, "kl_div", loss, gradient, np.zeros_like(x), x, reduction="none", log_target=True)
    return -gradient[0]


def as_bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


@each_level
def test_exp_of_a_float_is_within_1_1_ulp_everywhere(level: str) -> None:
    down = np.arange(0, as_bits(104), 2003, dtype=np.int32).view(np.float32)
    up = np.arange(0, as_bits(88.72), 2003, dtype=np.int32).view(np.float32)
    x = np.concatenate([-down, up])
    assert x.size > 1_000_000
    assert units_in_the_last_place(exponential(level, x), np.exp(x.astype(np.float64))) <= 1.1


@each_level
def test_exp_of_a_double_is_within_1_1_ulp(level: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-708, 709.7, 2000), rng.normal(size=1000), 1e-9 * rng.normal(size=100)])
    actual = exponential(level, x)
    with mp.workdps(40):
        errors = [abs(mp.mpf(float(a)) - mp.exp(mp.mpf(float(b)))) for a, b in zip(actual, x, strict=True)]
    assert max(float(e) / float(np.spacing(a)) for e, a in zip(errors, actual, strict=True)) <= 1.1


@each_level
@each_float
def test_exp_is_right_where_numbers_end(level: str, dtype: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30], dtype)
    wanted = np.array([np.nan, np.inf, 0, 1, 1, np.inf, 0], dtype)
    np.testing.assert_array_equal(exponential(level, x), wanted)
    smallest = np.log(np.finfo(dtype).smallest_subnormal.astype(np.float64))
    denormal = np.linspace(smallest + 1, smallest + 12, 50).astype(dtype)
    exact = np.exp(denormal.astype(np.longdouble))
    assert units_in_the_last_place(exponential(level, denormal), exact) <= 1.1


@each_level
def test_the_logarithm_of_a_double_is_within_2_ulp(level: str) -> None:
    """Taken from kl_div, whose terms are q·(log q - input)."""
    rng = np.random.default_rng(9)
    q = np.concatenate([np.exp(rng.uniform(-708, 0, 4000)), 2.0 ** -np.arange(1022), 1 - rng.uniform(0, 1e-6, 200)])
    power = 2.0 ** np.round(-np.log2(q))  # so that q·power is about 1, and the product with log q is not rounded away
    term = np.empty((1, q.size))
    run(level, "kl_div", term, None, np.zeros((1, q.size)), q[None], reduction="none")
    with mp.workdps(40):
        exact = np.array(
            [
                float(mp.mpf(float(x)) * mp.log(mp.mpf(float(x))) * mp.mpf(float(s)))
                for x, s in zip(q, power, strict=True)
            ]
        )
    error = np.abs(term[0] * power - exact)
    # one more for the product, which is rounded too
    assert np.all(error <= 3 * np.spacing(np.abs(exact)))


@each_level
def test_the_logarithm_of_float_probabilities_is_right_also_where_the_students_is_nearly_the_same(level: str) -> None:
    rng = np.random.default_rng(8)
    q = np.concatenate([np.exp(rng.uniform(-103, 0, 4000)), 1 - rng.uniform(0, 1e-3, 500), [1.0, 1e-45]])
    q = q.astype(np.float32)[None]
    for near in (1e-7, 1e-3, 10.0):
        log_p = (np.log(q.astype(np.float64)) - near * rng.normal(size=q.shape)).astype(np.float32)
        term = np.empty_like(q)
        run(level, "kl_div", term, None, log_p, q, reduction="none")
        apart = np.log(q.astype(np.float64)) - log_p
        assert np.all(np.abs(term - q * apart) <= q * (2e-7 * np.abs(apart) + 6e-8) + 1e-42)


@each_level
@pytest.mark.parametrize("classes", [2, 101])
def test_the_loss_of_an_almost_certain_float_row_keeps_its_digits(level: str, classes: int) -> None:
    below = np.linspace(0, 60, 121, dtype=np.float32)
    z = np.full((below.size, classes), -np.inf, np.float32)
    z[:, 0], z[:, 1] = 0, -below
    loss = np.empty(below.size, np.float32)
    run(level, "cross_entropy", loss, None, z, np.zeros(below.size, np.int64), None, reduction="none")
    # 1 + e^-x is taken in double, so that it is 1 from x = 37 on
    np.testing.assert_allclose(loss, np.log1p(np.exp(-below.astype(np.float64))), rtol=1e-6, atol=3e-16)


@each_level
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_the_hard_part_of_an_almost_certain_narrow_float_row_keeps_its_digits(level: str, temperature: float) -> None:
    below = np.linspace(0, 30, 61, dtype=np.float32)
    z = np.full((below.size, 10), -200, np.float32)
    z[:, 0], z[:, 1] = 0, -below
    loss, labels = np.empty(below.size, np.float32), np.zeros(below.size, np.int64)
    scalars = [np.array(x) for x in (temperature, 1.0, 1.0)]
    run(level, "distillation_loss", loss, None, z, z.copy(), labels, *scalars, reduction="none")
    np.testing.assert_allclose(loss, np.log1p(np.exp(-below.astype(np.float64))), rtol=3e-6, atol=3e-16)


# --- every level of instructions ---


def assert_agrees(actual: Any, wanted: Any) -> None:
    if actual.dtype.kind == "i":
        np.testing.assert_array_equal(actual, wanted)
        return
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted))
    finite = wanted[np.isfinite(wanted)]
    few = 64 * float(np.finfo(actual.dtype).eps)
    np.testing.assert_allclose(actual, wanted, rtol=few, atol=few * max(1.0, np.abs(finite).max(initial=0.0)))


def widen(x: Any) -> Any:
    return x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x


@each_level
@each_float
@pytest.mark.parametrize("name", sorted(n for n in native.NAMES if not n.endswith("_vjp")))
def test_every_level_agrees_with_the_reference(name: str, dtype: str, level: str) -> None:
    op, rng = OPS[name], np.random.default_rng(1)
    for raw, attrs in op.example(rng, np.dtype(dtype).type):
        full = {**op.attrs, **attrs}
        inputs, _ = prepare(op, raw, np.dtype(dtype))
        shapes, saved_shapes = op.infer([None if x is None else x.shape for x in inputs], full)
        updates = [state(a, inputs, rng, dtype) for a in op.updates]
        kinds = [KINDS[a.kind] or np.dtype(dtype) for a in op.outs]
        buffers = [*(np.zeros(s, kind) for s, kind in zip(shapes, kinds, strict=True)), *updates]
        for buffer in buffers[: len(op.outs)]:
            buffer.fill(np.nan if buffer.dtype.kind == "f" else -7)
        buffers += [np.full(s, np.nan, dtype) for s in saved_shapes]
        wide = [widen(x.copy()) for x in buffers]
        run(level, name, *buffers, *inputs, **full)
        reference(name, *wide, *(widen(x) for x in inputs), **full)
        for actual, wanted in zip(buffers, wide, strict=True):
            assert_agrees(actual, wanted)
        if op.vjp:
            given = [x for a, x in zip(op.inputs, inputs, strict=True) if a.name in op.wrt]
            dins = [None if x is None else np.full_like(x, np.nan) for x in given]
            douts = [np.asarray(rng.normal(size=x.shape), dtype) for x in buffers[: len(op.outs)]]
            behind = [*douts, *buffers, *inputs]
            run(level, name + "_vjp", *dins, *behind, **full)
            wide_dins = [widen(x) for x in dins]
            reference(name + "_vjp", *wide_dins, *(widen(x) for x in behind), **full)
            for actual, wanted in zip(dins, wide_dins, strict=True):
                if actual is not None:
                    assert_agrees(actual, wanted)


@each_level
@each_float
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "soft_cross_entropy", "distillation_loss"])
def test_rows_wider_than_any_block_agree_with_the_reference(name: str, dtype: str, level: str) -> None:
    rng = np.random.default_rng(2)
    z, other = (4 * rng.normal(size=(3, WIDE)).astype(dtype) for _ in "st")
    labels, scalars = np.array([5, -100, WIDE - 1]), [np.array(t) for t in (3.0, 0.3, 0.7)]
    inputs: list[Any] = {
        "cross_entropy": [z, labels, None],
        "soft_cross_entropy": [z, np.abs(other), None],
        "distillation_loss": [z, other, labels, *scalars],
    }.get(name, [z, scalars[0]])
    outs, saved, _ = execute(OPS[name], inputs, {})
    wide = [np.empty_like(x, np.float64) for x in (*outs, *saved)]
    narrow = [np.empty_like(x) for x in (*outs, *saved)]
    run(level, name, *narrow, *inputs)
    reference(name, *wide, *(widen(x) for x in inputs))
    for actual, wanted in zip(narrow, wide, strict=True):
        few = 32 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(actual, wanted, rtol=few, atol=few)


@each_level
@pytest.mark.parametrize("classes", [2, 10, 100, 101, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 20.0])
def test_a_float_gradient_is_right_to_a_millionth_of_the_largest_probability_of_its_row(
    level: str, classes: int, temperature: float
) -> None:
    rng = np.random.default_rng(classes)
    for spread, offset in ((3, 0), (10, 0), (3, 100)):
        z_s, z_t = (spread * rng.normal(size=(33, classes)).astype(np.float32) for _ in "st")
        z_s += np.float32(offset)
        scalars = [np.array(x) for x in (temperature, 0.0, 1.0)]
        gradient, loss = np.empty_like(z_s), np.empty(33, np.float32)
        exact, exact_loss = np.empty(z_s.shape), np.empty(33)
        run(level, "distillation_loss", loss, gradient, z_s, z_t, None, *scalars, reduction="none")
        reference("distillation_loss", exact_loss, exact, widen(z_s), widen(z_t), None, *scalars, reduction="none")
        p, q, t = np.empty(z_s.shape), np.empty(z_s.shape), np.array(temperature)
        reference("softmax", p, widen(z_s), t)
        reference("softmax", q, widen(z_t), t)
        largest = np.maximum(p, q).max(axis=1, keepdims=True)
        assert np.all(np.abs(gradient - exact) <= 1e-6 * temperature * largest)
        # in rows that are almost certain the smallest q decide KL, and they feel that 1/T is rounded
        np.testing.assert_allclose(loss, exact_loss, rtol=2e-6, atol=1e-13 * temperature**2)


@each_level
@pytest.mark.parametrize("classes", [10, 101, 1000])
@pytest.mark.parametrize("apart", [1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 6.0])
def test_a_float_loss_is_right_to_a_millionth_however_near_the_student_comes(
    level: str, classes: int, apart: float
) -> None:
    rng = np.random.default_rng(7)
    z_t, noise = (rng.normal(size=(64, classes)).astype(np.float32) for _ in "tn")
    z_t *= np.float32(3)
    z_s = z_t + np.float32(apart) * noise
    scalars = [np.array(x) for x in (4.0, 0.0, 1.0)]
    loss, exact = np.empty(64, np.float32), np.empty(64)
    run(level, "distillation_loss", loss, None, z_s, z_t, None, *scalars, reduction="none")
    reference("distillation_loss", exact, None, widen(z_s), widen(z_t), None, *scalars, reduction="none")
    # the sums of p and q are right to 2^-24 = e, and KL(q ‖ p) with them to e²/2 = 1.8e-15
    np.testing.assert_allclose(loss, exact, rtol=1e-6, atol=16 * 1.8e-15)


@each_level
@each_float
@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_masked_classes_cost_nothing_and_a_class_ruled_out_wrongly_costs_infinity(
    level: str, dtype: str, classes: int, temperature: float
) -> None:
    z_s, z_t = (np.random.default_rng(6).normal(size=(4, classes)).astype(dtype) for _ in "st")
    z_s[0, 1] = z_s[1, 0] = z_t[0, 1] = z_t[2, 2] = -np.inf  # both rule out a class, the student one, the teacher one
    z_s[3, 2] = np.nan
    loss, gradient = np.empty(4, dtype), np.empty_like(z_s)
    scalars = [np.array(x) for x in (temperature, 0.5, 0.5)]
    run(level, "distillation_loss", loss, gradient, z_s, z_t, None, *scalars, reduction="none")
    assert np.isfinite(loss[[0, 2]]).all()
    assert loss[1] == np.inf
    assert np.isnan(loss[3])
    assert np.isfinite(gradient[:3]).all()
    assert gradient[0, 1] == 0
    assert np.isnan(gradient[3]).all()


@each_level
@each_float
@pytest.mark.parametrize("classes", [10, 1003])
def test_results_do_not_depend_on_where_the_arrays_lie(level: str, dtype: str, classes: int) -> None:
    rng = np.random.default_rng(3)
    z, other = (rng.normal(size=(5, classes)).astype(dtype) for _ in "st")
    scalars = [np.array(x) for x in (4.0, 0.5, 0.5)]
    found = set()
    for shift in range(5):
        moved = [np.empty(z.size + 8, dtype)[shift : shift + z.size].reshape(z.shape) for _ in "gst"]
        moved[1][...], moved[2][...] = z, other
        loss = np.empty((), dtype)
        run(level, "distillation_loss", loss, *moved, np.arange(5), *scalars)
        found.add((loss.tobytes(), moved[0].tobytes()))
    assert len(found) == 1


LARGE = 24 << 20  # bytes of a result above which it is written past the caches


@each_level
@each_float
def test_results_too_large_for_the_caches_have_the_bits_of_those_of_fewer_rows(level: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    classes = 5003  # an odd number: most rows begin at no address that a vector would like
    n = LARGE // (classes * np.dtype(dtype).itemsize) + 2
    z, other = (rng.normal(size=(n, classes)).astype(dtype) for _ in "st")
    labels, t, half = rng.integers(0, classes, n), np.array(3.0), np.array(0.5)
    cases: dict[str, list[Any]] = {
        "softmax": [z, t],
        "log_softmax": [z, t],
        "distillation_loss": [z, other, labels, t, half, half],
        "reverse_kl": [z, other, t],
        "jensen_shannon": [z, other, t, half],
        "decoupled_kd": [z, other, labels, t, half, half],
        "standardised_kl": [z, other, t],
    }
    for name, inputs in cases.items():
        attrs = {"reduction": "none"} if "reduction" in OPS[name].attrs else {}
        large = [np.empty(n, dtype)] * bool(attrs) + [np.empty_like(z)]
        run(level, name, *large, *inputs, **attrs)
        for rows in (slice(0, n // 2), slice(n // 2, n)):
            small = [np.empty_like(x[rows]) for x in large]
            run(level, name, *small, *(x[rows] if x.ndim else x for x in inputs), **attrs)
            assert all(x[rows].tobytes() == y.tobytes() for x, y in zip(large, small, strict=True)), name


@each_float
@pytest.mark.parametrize("name", sorted(n for n in native.NAMES if not n.endswith("_vjp")))
def test_avx2_and_avx512_give_the_same_bits(name: str, dtype: str) -> None:
    if native.cpu_levels()[-1] != "v4":
        pytest.skip("needs a processor with AVX-512")
    op, rng = OPS[name], np.random.default_rng(4)
    for raw, attrs in op.example(rng, np.dtype(dtype).type):
        full = {**op.attrs, **attrs}
        inputs, _ = prepare(op, raw, np.dtype(dtype))
        shapes, saved_shapes = op.infer([None if x is None else x.shape for x in inputs], full)
        updates = [state(a, inputs, rng, dtype) for a in op.updates]
        kinds = [KINDS[a.kind] or np.dtype(dtype) for a in op.outs] + [np.dtype(dtype)] * len(op.saved)
        found = []
        for level in ("v3", "v4"):
            outs = [np.zeros(s, kind) for s, kind in zip((*shapes, *saved_shapes), kinds, strict=True)]
            written = [*outs[: len(op.outs)], *(x.copy() for x in updates), *outs[len(op.outs) :]]
            run(level, name, *written, *inputs, **full)
            found.append([x.tobytes() for x in written])
        assert found[0] == found[1]


@each_level
@each_float
def test_dropout_masks_are_those_of_the_reference_bit_by_bit(level: str, dtype: str) -> None:
    x = np.ones(1037, dtype)
    for seed in (0, 2**40 + 5, 2**64 - 1, -1, 2**70 + 3):
        outs = [np.empty_like(x) for _ in range(4)]
        attrs = {"p": 0.3, "seed": seed, "stream": 7}
        run(level, "dropout", *outs[:2], x, np.array(2**33 + 1), **attrs)
        reference("dropout", *outs[2:], x, np.array(2**33 + 1), **attrs)
        assert outs[1].tobytes() == outs[3].tobytes()


# --- the table of kernels ---


def test_every_kernel_belongs_to_an_operation_and_fits_into_a_call() -> None:
    assert {"softmax", "distillation_loss", "distillation_loss_vjp", "adam_step", "take_vjp"} <= native.NAMES
    assert native.NAMES.issubset(kernel_names())
    fields = dict(native._module.ffi.typeof("minikd_call").fields)
    attributes = dict(native._module.ffi.typeof("minikd_attributes").fields)
    for name in native.NAMES:
        op = OPS[name.removesuffix("_vjp")]
        assert len(op.buffers if name == op.name else op.vjp_buffers) <= fields["buffer"].type.length
        assert len(op.letters) <= fields["size"].type.length
        assert set(op.attrs) <= set(attributes)


def test_a_kernel_that_does_not_exist_is_not_found() -> None:
    ffi, lib = native._module.ffi, native._module.lib
    assert lib.minikd_find(b"softmin", 0, b"base") == ffi.NULL
    assert lib.minikd_find(b"softmax", 0, b"v9") == ffi.NULL


def test_the_levels_begin_with_base_and_the_best_is_in_use() -> None:
    assert native.cpu_levels()[0] == "base"
    best = native.cpu_levels()[-1]
    assert python("from minikd.kernels import native; print(native.cpu_level())", MINIKD_CPU="") == best


@each_level
def test_a_level_can_be_forced(level: str) -> None:
    assert python("from minikd.kernels import native; print(native.cpu_level())", MINIKD_CPU=level) == level


def test_an_unknown_level_is_refused_in_words() -> None:
    code = (
        "import minikd as kd\n"
        "from minikd.kernels import native\n"
        "print(native.unavailable())\n"
        "try: kd.use_backend('c')\n"
        "except kd.errors.BackendError as error: print(error)\n"
    )
    said = python(code, MINIKD_CPU="v9", MINIKD_BACKEND="numpy")
    assert said.count("MINIKD_CPU must be one of base") == 2
    assert said.count("got 'v9'") == 2


def test_a_forced_level_that_cannot_be_used_raises_where_a_kernel_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKD_CPU", "v0")
    native.cpu_level.cache_clear()
    try:
        with pytest.raises(BackendError, match="MINIKD_CPU"):
            native.binder("softmax")
    finally:
        native.cpu_level.cache_clear()


# --- what a call refuses, and that it then writes nothing ---


def untouched(*shapes: tuple[int, ...]) -> list[Any]:
    return [np.full(shape, 7, np.float32) for shape in shapes]


def assert_refused(outputs: list[Any], call: Callable[[], None], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
    assert all((x == 7).all() for x in outputs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "distillation_loss"])
def test_a_bad_temperature_is_refused_in_each_call(name: str, temperature: float) -> None:
    z, t, one = np.zeros((3, 4), np.float32), np.array(1.0), np.array(1.0)
    outs = untouched((), (3, 4)) if name == "distillation_loss" else untouched((3, 4))
    inputs = [z, z, np.zeros(3, np.int64), t, one, one] if name == "distillation_loss" else [z, t]
    call = native.binder(name)(*outs, *inputs, **OPS[name].attrs)
    call()
    for x in outs:
        x[...] = 7
    t[...] = temperature
    assert_refused(outs, call, f"{name}: temperature must be a finite number above 0, got {temperature!r}")


@pytest.mark.parametrize("label", [-1, 4, 2**40])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
def test_a_label_out_of_range_is_refused_with_its_row(name: str, label: int) -> None:
    z, one, target = np.zeros((3, 4), np.float32), np.array(1.0), np.array([0, -100, label])
    outs = untouched((), (3, 4))
    inputs = [z, z, target, one, one, one] if name == "distillation_loss" else [z, target, None]
    call = native.binder(name)(*outs, *inputs, **OPS[name].attrs)
    assert_refused(outs, call, rf"{name}: target\[2\] must be a class id from 0 to 3 .* got {label}")


@pytest.mark.parametrize("label", [-1, 4])
@pytest.mark.parametrize("name", ["correct_count", "teacher_confidence", "corrected_logits", "decoupled_kd"])
def test_other_kernels_that_read_labels_refuse_one_out_of_range_too(name: str, label: int) -> None:
    z, one, target = np.zeros((3, 4), np.float32), np.array(1.0), np.array([0, -100, label])
    op, given = OPS[name], {"teacher_logits": z, "student_logits": z, "logits": z, "target": target}
    inputs = [given.get(argument.name, one) for argument in op.inputs]
    shapes, saved_shapes = op.infer([x.shape for x in inputs], op.attrs)
    written = zip((*op.outs, *op.saved), (*shapes, *saved_shapes), strict=True)
    outs = [np.full(shape, 7, KINDS[argument.kind] or np.float32) for argument, shape in written]
    call = native.binder(name)(*outs, *inputs, **op.attrs)
    assert_refused(outs, call, rf"{name}: target\[2\] must be a class id from 0 to 3 .* got {label}")


@pytest.mark.parametrize("name", ["softmax_vjp", "log_softmax_vjp"])
def test_a_bad_temperature_is_refused_on_the_way_back_too(name: str) -> None:
    z, t, (dx,) = np.zeros((3, 4), np.float32), np.array(-1.0), untouched((3, 4))
    call = native.binder(name)(dx, z, z, None, t)
    assert_refused([dx], call, "temperature must be a finite number above 0, got -1.0")


@pytest.mark.parametrize("row", [-1, 5])
@pytest.mark.parametrize("name", ["take", "take_vjp", "take_scaled", "take_index"])
def test_a_row_number_out_of_range_is_refused(name: str, row: int) -> None:
    x, rows = np.zeros((5, 2), np.float32), np.array([1, row])
    if name == "take_vjp":
        outs = untouched((5, 2))
        inputs = [np.zeros((2, 2), np.float32), None, None, rows]
    elif name == "take_index":
        outs = [np.full(2, 7)]
        inputs = [np.arange(5), rows]
    else:
        outs = untouched((2, 2))
        ones = np.ones(2, np.float32)
        inputs = [x.astype(np.uint8), rows, ones, ones] if name == "take_scaled" else [x, rows]
    call = native.binder(name)(*outs, *inputs)
    assert_refused(outs, call, rf"rows\[1\] must be a row number from 0 to 4 .* got {row}")


def test_a_list_of_calls_runs_in_order_and_stops_at_the_first_that_is_refused() -> None:
    ffi, lib = native._module.ffi, native._module.lib
    x, y = np.ones(3, np.float32), np.ones(3, np.float32)
    z, bad, p = np.ones((1, 3), np.float32), np.array(0.0), np.ones((1, 3), np.float32)
    add, double = native.binder("add_into")(y, x), native.binder("add_into")(y, y)
    refused = native.binder("softmax")(p, z, bad)
    calls, done = ffi.new("minikd_call[]", [c.record[0] for c in (add, double, refused, add)]), ffi.new("int64_t *")
    assert lib.minikd_run(calls, 2, done) == lib.MINIKD_DONE
    assert done[0] == 2
    np.testing.assert_array_equal(y, [4, 4, 4])
    assert lib.minikd_run(calls, 4, done) == lib.MINIKD_BAD_TEMPERATURE
    assert done[0] == 2
    np.testing.assert_array_equal(y, [10, 10, 10])
    assert lib.minikd_run(calls, 0, ffi.NULL) == lib.MINIKD_DONE


# --- memory ---


def test_a_call_keeps_its_buffers_alive() -> None:
    y = np.zeros(1000)
    call = native.binder("add_into")(y, np.full(1000, 2.0))
    gc.collect()
    _ = [np.zeros(1000) for _ in range(100)]
    call()
    assert (y == 2).all()


def test_inputs_may_be_read_only() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    x.flags.writeable = False
    y, t = np.empty((2, 3), np.float32), np.array(1.0)
    t.flags.writeable = False
    run("base", "softmax", y, x, t)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)


TOO_MANY = 2**50  # columns: no machine has memory beside the buffers for rows of so many


@each_float
@pytest.mark.parametrize("name", ["distillation_loss", "reverse_kl", "standardised_kl", "linear_relu_vjp", "bias_vjp"])
def test_memory_that_is_not_to_be_had_is_an_error_and_nothing_is_written(name: str, dtype: str) -> None:
    n = 1000
    z, one, b = np.zeros((n, 2), dtype), np.array(1.0), np.zeros(2, dtype)
    loss, gradient = np.full((), 7, dtype), np.full((n, 2), 7, dtype)
    cases: dict[str, tuple[list[Any], list[Any], int]] = {  # what is written, what is read, which size is the columns
        "distillation_loss": ([loss, gradient], [z, z, np.zeros(n, np.int64), one, one, one], 1),
        "reverse_kl": ([loss, gradient], [z, z, one], 1),
        "standardised_kl": ([loss, gradient], [z, z, one], 1),
        "linear_relu_vjp": ([gradient, None, None], [z, z, z, np.eye(2, dtype=dtype), b], 2),
        "bias_vjp": ([gradient, np.full(2, 7, dtype)], [z, z, z, b], 1),
    }
    written, read, place = cases[name]
    call = native.binder(name)(*written, *read, **OPS[name.removesuffix("_vjp")].attrs)
    call.record.size[place] = TOO_MANY
    with pytest.raises(MemoryError, match=f"{name.removesuffix('_vjp')}: there is no memory beside its buffers"):
        call()
    assert all((x == 7).all() for x in written if x is not None)


@each_float
@pytest.mark.parametrize("classes", [10, WIDE])
def test_a_loss_needs_no_gradient_buffer(dtype: str, classes: int) -> None:
    rng = np.random.default_rng(4)
    z, other = (rng.normal(size=(3, classes)).astype(dtype) for _ in "st")
    one, labels, gradient = np.array(1.0), np.array([0, 1, -100]), np.empty_like(z)
    cases: dict[str, list[Any]] = {
        "cross_entropy": [z, labels, None],
        "soft_cross_entropy": [z, np.abs(other), None],
        "kl_div": [z, np.abs(other)],
        "distillation_loss": [z, other, labels, np.array(3.0), one, one],
    }
    for name, inputs in cases.items():
        with_gradient, without = np.empty((), dtype), np.empty((), dtype)
        run("base", name, with_gradient, gradient, *inputs)
        run("base", name, without, None, *inputs)
        assert with_gradient.tobytes() == without.tobytes()


@pytest.mark.parametrize("name", sorted(n for n in native.NAMES if n.endswith("_vjp")))
def test_a_vjp_that_nobody_needs_does_nothing(name: str) -> None:
    op = OPS[name.removesuffix("_vjp")]
    inputs, attrs = op.example(np.random.default_rng(5), np.float32)[0]
    outs, saved, arrays = execute(op, inputs, attrs)
    run("base", name, *(None for _ in op.wrt), *outs, *outs, *saved, *arrays, **attrs)


def test_where_the_system_does_not_tell_which_processors_may_be_used_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert native.usable_cpus() == [0, 1, 2]


def test_without_the_extension_module_there_are_no_kernels_and_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_missing", "there was no compiler")
    assert native.cpu_levels() == ()
    assert native.unavailable() == "there was no compiler"
    with pytest.raises(BackendError, match="the C backend must be built, got none: there was no compiler"):
        native.set_threads(1)
    for heeds in (native._use_default_threads, native._use_default_products):
        heeds.__wrapped__()  # nothing to set


def test_a_sequence_of_calls_raises_what_the_refused_one_would() -> None:
    p, z, bad = np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), np.array(0.0)
    y = np.ones(3, np.float32)
    (sequence,) = native.join([native.binder("add_into")(y, y), native.binder("softmax")(p, z, bad)])
    with pytest.raises(ArgumentError, match="softmax: temperature must be a finite number above 0"):
        sequence()
    np.testing.assert_array_equal(y, [2, 2, 2])
