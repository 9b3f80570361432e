"""Every operation of the table, on every backend: values, gradients, and the contract that each kernel keeps."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from minikd.errors import ArgumentError, DTypeError, ShapeError
from minikd.kernels import BACKENDS, bind, execute, input_arguments, kernel_names, prepare
from minikd.ops import OPS, Op
from minikd.ops.__main__ import page
from minikd.ops.elementwise import ACTIVATIONS
from minikd.ops.op import KINDS, register

FLOATS = ("float32", "float64")
DIFFERENTIABLE = tuple(name for name, op in OPS.items() if op.vjp)
ANALYTIC = tuple(name for name in DIFFERENTIABLE if OPS[name].analytic)
each_op = pytest.mark.parametrize("name", OPS)
each_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)
each_float = pytest.mark.parametrize("dtype", FLOATS)


class Tolerance(NamedTuple):
    """The largest error of an element, in units of the dtype's eps.

    `relative` counts in the element itself, `absolute` in the largest finite number that the kernel read or wrote.
    """

    relative: float
    absolute: float


# What one kernel may lose. Where nothing is said, an element is right to a few roundings of its own.
USUAL = Tolerance(4, 0)
SUMS = Tolerance(4, 16)
TOLERANCES = {
    "matmul": SUMS,
    "matmul_vjp": SUMS,
    "linear": SUMS,
    "linear_vjp": SUMS,
    **{f"linear_{activation}{suffix}": SUMS for activation in ACTIVATIONS for suffix in ("", "_vjp")},
    "sum": SUMS,
    "mean": SUMS,
    "sum_to": SUMS,
    "broadcast_to_vjp": SUMS,
    "take_vjp": SUMS,
    "pow": Tolerance(8, 0),
    "pow_vjp": Tolerance(16, 0),
    "tanh_vjp": Tolerance(4, 2),
    "sigmoid_vjp": Tolerance(4, 2),
    "gelu": Tolerance(8, 0),
    "gelu_vjp": Tolerance(8, 2),
    "bias": Tolerance(1, 1),
    "bias_relu": Tolerance(1, 1),
    "bias_tanh": Tolerance(4, 1),
    "bias_sigmoid": Tolerance(4, 4),
    "bias_gelu": Tolerance(8, 4),
    **{f"bias{suffix}_vjp": SUMS for suffix in ("", "_relu", "_tanh", "_sigmoid", "_gelu")},
    "softmax": Tolerance(16, 0),
    "softmax_vjp": Tolerance(16, 8),
    "log_softmax": Tolerance(8, 4),
    "log_softmax_vjp": Tolerance(16, 16),
    "cross_entropy": Tolerance(8, 8),
    "soft_cross_entropy": Tolerance(8, 8),
    "kl_div": Tolerance(8, 8),
    "distillation_loss": Tolerance(8, 8),
    "reverse_kl": Tolerance(8, 8),
    "jensen_shannon": Tolerance(8, 8),
    "skewed_kl": Tolerance(8, 8),
    "decoupled_kd": Tolerance(8, 8),
    "standardised_kl": Tolerance(8, 8),
    "linear_distillation_loss": Tolerance(8, 64),
    "sgd_step": Tolerance(4, 4),
    "adam_step": Tolerance(8, 4),
    "max_norm": Tolerance(8, 0),
    "teacher_confidence": Tolerance(16, 8),
}


class Case(NamedTuple):
    """One legal call: an operation's inputs as kernels take them, its attributes, and the state that it changes."""

    op: Op
    inputs: list[Any]
    attrs: dict[str, Any]
    state: list[Any]


class Result(NamedTuple):
    written: list[Any]
    saved: list[Any]


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@cache
def cases(name: str, dtype: str) -> tuple[Case, ...]:
    op, real, rng = OPS[name], np.dtype(dtype), seeded(name)
    found = []
    for raw, attrs in op.example(rng, real.type):
        inputs, _ = prepare(op, raw, real)
        for optional in (False, True) if any(a.optional for a in op.updates) else (False,):
            state = [None if optional and a.optional else _state(op, a, inputs, rng, real) for a in op.updates]
            found.append(Case(op, inputs, {**op.attrs, **attrs}, state))
    return tuple(found)


def _state(op: Op, argument: Any, inputs: list[Any], rng: np.random.Generator, real: Any) -> Any:
    """Optimizer state as it may be after some steps; a second moment is never negative."""
    sizes = {"m": 9, "k": 37} | op.sizes(op.inputs, [x.shape for x in inputs])
    shape = inputs[0].shape if argument.dims == ("...",) else tuple(sizes[d] for d in argument.dims)
    if argument.kind == "counter":
        return np.array(37)
    values = rng.normal(size=shape)
    return (np.abs(values) if argument.name == "v" else values).astype(real)


def quietly(function: Callable[..., None], *buffers: Any, **attrs: Any) -> None:
    with np.errstate(all="ignore"):
        function(np, *buffers, **attrs)


def on_reference(op: Op, *buffers: Any, **attrs: Any) -> None:
    quietly(op.forward, *buffers, **attrs)


def smoothly(op: Op, *buffers: Any, **attrs: Any) -> None:
    """The function whose derivative the vjp is."""
    quietly(op.surrogate or op.forward, *buffers, **attrs)


def on_backend(op: Op, *buffers: Any, **attrs: Any) -> None:
    bind(op.name, *buffers, **attrs)()


def blank(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array full of what no kernel would write: NaN, or the smallest whole number."""
    return np.full(shape, np.nan if np.dtype(dtype).kind in "fc" else np.iinfo(dtype).min, dtype)


def shapes_of(arrays: Sequence[Any]) -> list[Any]:
    return [None if x is None else x.shape for x in arrays]


def real_dtype(case: Case) -> Any:
    """The dtype of the real buffers, or None where there are none."""
    inputs = zip(input_arguments(case.op, len(case.inputs)), case.inputs, strict=True)
    buffers = (*inputs, *zip(case.op.updates, case.state, strict=True))
    return next((x.dtype for a, x in buffers if x is not None and a.kind == "real"), None)


def blank_buffers(case: Case) -> Result:
    """Outputs and saved values full of NaN; state as a copy, because it is changed."""
    real = real_dtype(case)
    outs, saved = case.op.infer(shapes_of(case.inputs), case.attrs)
    written = [blank(s, KINDS[a.kind] or real) for a, s in zip(case.op.outs, outs, strict=True)]
    written += [None if x is None else x.copy() for x in case.state]
    return Result(written, [blank(s, real) for s in saved])


def forward(case: Case, run: Callable[..., None] = on_reference) -> Result:
    result = blank_buffers(case)
    run(case.op, *result.written, *result.saved, *case.inputs, **case.attrs)
    return result


def widened(case: Case, dtype: Any = np.float64) -> Case:
    """The same case with its real buffers in another dtype; scalars are float64 already."""
    kinds = [a.kind for a in (case.op.inputs if not case.op.variadic else [case.op.inputs[0]] * len(case.inputs))]
    inputs = [x if x is None or kind != "real" else x.astype(dtype) for x, kind in zip(case.inputs, kinds, strict=True)]
    return case._replace(inputs=inputs, state=[None if x is None else x.astype(dtype) for x in case.state])


@cache
def expected(name: str, dtype: str) -> tuple[Result, ...]:
    """What the float64 reference makes of each case's values."""
    return tuple(forward(widened(case)) for case in cases(name, dtype))


class Gradient(NamedTuple):
    """A vjp's buffers behind its dins, and what the float64 reference makes of the same buffers."""

    case: Case
    douts: list[Any]
    outs: list[Any]
    saved: list[Any]
    expected: list[Any]


def upcast(arrays: Sequence[Any]) -> list[Any]:
    return [x if x is None or x.dtype.kind != "f" else x.astype(np.float64) for x in arrays]


def differentiated(case: Case) -> list[int]:
    """Places of the inputs that take a gradient."""
    if case.op.variadic:
        return list(range(len(case.inputs)))
    return [k for k, a in enumerate(case.op.inputs) if a.name in case.op.wrt]


def blank_dins(case: Case, dtype: Any) -> list[Any]:
    inputs = [case.inputs[k] for k in differentiated(case)]
    return [None if x is None else blank(x.shape, dtype) for x in inputs]


@cache
def gradient_cases(name: str, dtype: str) -> tuple[Gradient, ...]:
    rng, found = seeded("d" + name), []
    for case in cases(name, dtype):
        outs, saved = forward(case)
        douts = [np.asarray(rng.normal(size=y.shape), y.dtype) for y in outs]
        dins = blank_dins(case, np.float64)
        behind = (*upcast(douts), *upcast(outs), *upcast(saved), *upcast(case.inputs))
        quietly(case.op.vjp, *dins, *behind, **case.attrs)
        found.append(Gradient(case, douts, outs, saved, dins))
    return tuple(found)


def unread(g: Gradient) -> list[Any]:
    """The buffers behind the douts, with None for each that vjp_reads does not name."""
    op = g.case.op
    arguments = [*op.outs, *op.saved, *([op.inputs[0]] * len(g.case.inputs) if op.variadic else op.inputs)]
    buffers = [*g.outs, *g.saved, *g.case.inputs]
    return [x if a.name in op.vjp_reads else None for a, x in zip(arguments, buffers, strict=True)]


def run_vjp(g: Gradient, keep: Sequence[bool] | None = None) -> list[Any]:
    dins = blank_dins(g.case, g.douts[0].dtype)
    if keep is not None:
        dins = [d if k else None for d, k in zip(dins, keep, strict=True)]
    bind(g.case.op.name + "_vjp", *dins, *g.douts, *unread(g), **g.case.attrs)()
    return dins


def magnitude(arrays: Sequence[Any]) -> float:
    """The largest finite number in any of these arrays."""
    finite = [np.abs(x[np.isfinite(x)]) for x in arrays if x is not None and x.dtype.kind == "f"]
    return max((float(x.max()) for x in finite if x.size), default=0.0)


def assert_close(kernel: str, actual: Any, wanted: Any, read: Sequence[Any]) -> None:
    """Infinities and NaN stand in the same places, all else agrees within the kernel's tolerance."""
    if wanted is None:
        assert actual is None
        return
    if actual.dtype.kind != "f":
        np.testing.assert_array_equal(actual, wanted, err_msg=kernel)
        return
    tolerance, limits = TOLERANCES.get(kernel, USUAL), np.finfo(actual.dtype)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted), err_msg=f"{kernel}: NaN in other places")
    infinite = np.isinf(wanted)
    np.testing.assert_array_equal(actual[infinite], wanted[infinite], err_msg=f"{kernel}: infinities differ")
    finite = np.isfinite(wanted)
    largest = max(magnitude(read), magnitude([wanted])) if tolerance.absolute else 0.0
    allowed = limits.eps * (tolerance.relative * np.abs(wanted[finite]) + tolerance.absolute * largest) + limits.tiny
    error = np.abs(actual[finite].astype(np.float64) - wanted[finite])
    assert np.all(error <= allowed), f"{kernel}: off by {float((error / allowed).max()):.3g} times what is allowed"


def bits(arrays: Sequence[Any]) -> list[bytes | None]:
    return [None if x is None else x.tobytes() for x in arrays]


# --- the table itself ---


@each_op
def test_every_operation_has_an_example_for_each_float(name: str) -> None:
    for dtype in FLOATS:
        for case in cases(name, dtype):
            real = any(a.kind == "real" for a in case.op.buffers)
            assert real_dtype(case) == (dtype if real else None)
        assert cases(name, dtype)


@each_differentiable_op
def test_the_formula_names_every_gradient(name: str) -> None:
    on_paper = {"logits": "z", "student_logits": "z_s", "xs": "x"}
    for argument in OPS[name].wrt:
        assert f"d{on_paper.get(argument, argument)}" in OPS[name].formula


@each_op
def test_a_declaration_names_only_buffers_that_exist(name: str) -> None:
    op = OPS[name]
    names = {a.name for a in op.buffers}
    assert {*op.wrt, *op.vjp_reads, *op.may_alias} <= names
    assert op.vjp is None or {a.name for a in op.saved} <= set(op.vjp_reads), "saved for nobody"
    assert (op.vjp is None) == (not op.wrt)
    assert not set(op.may_alias) & set(op.vjp_reads), "backward wants an input back that forward may overwrite"


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="already has an operation named 'add'"):
        register(OPS["add"])


@pytest.mark.usefixtures("backend")
def test_a_backend_has_kernels_only_for_operations_of_the_table(backend: str) -> None:
    module = importlib.import_module(BACKENDS[backend].module)
    assert set(module.NAMES) <= set(kernel_names())
    assert all(callable(module.binder(name)) for name in module.NAMES)


# --- the reference's gradients against differences of its own forward ---

STEP = 1e-5
LARGE = 1e3  # elements beyond this drown the difference that is measured, so they are left as they are


def beyond_ends(x: Any, scale: Any, low: Any, high: Any) -> Any:
    """How far x lies from the places where the gradient of quantised numbers stops."""
    return np.minimum(abs(x - (low - 0.5) * scale), abs(x - (high + 0.5) * scale))


KINKS = {
    "relu": lambda u: u,
    "abs": lambda x: x,
    "maximum": lambda a, b: a - b,
    "bias_relu": lambda x, b: x + b,
    "linear_relu": lambda x, w, b: x @ w.T + b,
    "fake_quantise": lambda x, scale, low, high: beyond_ends(x, scale, low, high),
    "fake_quantise_rows": lambda x, scale, low, high: beyond_ends(x, scale[:, None], low, high),
}


def directions(case: Case, rng: np.random.Generator) -> list[Any]:
    found = []
    for k in differentiated(case):
        x = case.inputs[k]
        found.append(None if x is None else np.where(np.abs(x) < LARGE, rng.normal(size=x.shape), 0.0))
    return found


def moved(case: Case, along: Sequence[Any], step: complex) -> Case:
    inputs = list(case.inputs)
    for k, direction in zip(differentiated(case), along, strict=True):
        if direction is not None:
            inputs[k] = np.asarray(inputs[k] + step * direction)
    return case._replace(inputs=inputs)


def upstream(case: Case, y: Any, rng: np.random.Generator) -> Any:
    """A random gradient of y, 0 where y is not differentiable or too large for a difference to mean anything."""
    usable = np.abs(y) < LARGE
    if case.op.name in KINKS:
        usable &= np.abs(KINKS[case.op.name](*case.inputs)) > 10 * STEP
    return np.where(usable, rng.normal(size=y.shape), 0.0)


def reference_vjp(case: Case, result: Result, dy: Any) -> list[Any]:
    dins = blank_dins(case, np.float64)
    quietly(case.op.vjp, *dins, dy, *result.written, *result.saved, *case.inputs, **case.attrs)
    return dins


def along_gradient(dins: Sequence[Any], along: Sequence[Any]) -> tuple[float, float]:
    """Σ dx·direction, and the sum of the magnitudes of its terms."""
    terms = [np.where(d == 0, 0.0, din * d) for din, d in zip(dins, along, strict=True) if d is not None]
    return sum(float(t.sum()) for t in terms), sum(float(np.abs(t).sum()) for t in terms)


@each_differentiable_op
def test_the_reference_vjp_agrees_with_central_differences(name: str) -> None:
    rng, tried = seeded("difference" + name), 0
    for case in cases(name, "float64"):
        result = forward(case)
        along, dy = directions(case, rng), upstream(case, result.written[0], rng)
        after, before = (forward(moved(case, along, h), smoothly).written[0] for h in (STEP, -STEP))
        with np.errstate(invalid="ignore"):
            measured = float(np.where(dy == 0, 0.0, dy * (after - before) / (2 * STEP)).sum())
        gradient, size = along_gradient(reference_vjp(case, result, dy), along)
        assert measured == pytest.approx(gradient, rel=1e-6, abs=1e-6 * size + 1e-9)
        tried += gradient != 0
    assert tried, "no example has a gradient that is not 0"


@pytest.mark.parametrize("name", ANALYTIC)
def test_the_reference_vjp_agrees_with_a_complex_step(name: str) -> None:
    rng, tried, step = seeded("complex" + name), 0, 1e-30
    for case in cases(name, "float64"):
        along = directions(case, rng)
        if any(d is not None and np.any(d == 0) for d in along):
            continue
        result = forward(case)
        dy = rng.normal(size=result.written[0].shape)
        complex_case = moved(widened(case, np.complex128), along, 1j * step)
        outs, saved = case.op.infer(shapes_of(case.inputs), case.attrs)
        y, *others = (blank(s, np.complex128) for s in (*outs, *saved))
        quietly(case.op.forward, y, *others, *complex_case.inputs, **case.attrs)
        measured = float((dy * y.imag / step).sum())
        gradient, size = along_gradient(reference_vjp(case, result, dy), along)
        assert measured == pytest.approx(gradient, rel=1e-12, abs=1e-12 * size)
        tried += gradient != 0
    assert tried, "no example has a gradient that is not 0"


@pytest.mark.usefixtures("backend")
@each_float
@pytest.mark.parametrize(
    ("name", "inputs", "attrs", "gradients"),
    [
        ("relu", [[-0.0, 0.0, 2.0, -2.0]], {}, [[0, 0, 1, 0]]),
        ("abs", [[-0.0, 0.0, 2.0, -2.0]], {}, [[0, 0, 1, -1]]),
        ("maximum", [[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]], {}, [[0.5, 1, 0], [0.5, 0, 1]]),
        ("max", [[3.0, 1.0, 3.0, 3.0]], {}, [[1 / 3, 0, 1 / 3, 1 / 3]]),
        ("pow", [[0.0, 0.0], [2.0, 1.0]], {}, [[0, 1], [0, 0]]),
    ],
)
def test_a_kink_has_the_gradient_that_its_formula_says(
    name: str, inputs: list[Any], attrs: dict[str, Any], gradients: list[Any], dtype: str
) -> None:
    op, arrays = OPS[name], [np.array(x, dtype) for x in inputs]
    (y,), _, _ = execute(op, arrays, attrs)
    dins = [blank(x.shape, dtype) for x in arrays]
    bind(name + "_vjp", *dins, np.ones_like(y), y, *arrays, **op.attrs)()
    for din, wanted in zip(dins, gradients, strict=True):
        np.testing.assert_allclose(din, np.array(wanted, dtype), rtol=1e-6)


# --- every backend against the float64 reference ---


@each_op
@each_float
def test_forward_agrees_with_the_float64_reference(name: str, dtype: str, backend: str) -> None:
    for case, wanted in zip(cases(name, dtype), expected(name, dtype), strict=True):
        actual = forward(case, on_backend)
        for a, w in zip([*actual.written, *actual.saved], [*wanted.written, *wanted.saved], strict=True):
            assert_close(name, a, w, case.inputs)


@each_differentiable_op
@each_float
def test_vjp_agrees_with_the_float64_reference(name: str, dtype: str, backend: str) -> None:
    for g in gradient_cases(name, dtype):
        for actual, wanted in zip(run_vjp(g), g.expected, strict=True):
            assert_close(name + "_vjp", actual, wanted, [*g.douts, *unread(g)])


# --- the contract of a kernel ---


@each_op
@each_float
def test_a_kernel_leaves_its_inputs_as_they_are(name: str, dtype: str, backend: str) -> None:
    for case in cases(name, dtype):
        before = bits(case.inputs)
        forward(case, on_backend)
        assert bits(case.inputs) == before
    for g in gradient_cases(name, dtype) if OPS[name].vjp else ():
        before = bits([*g.douts, *unread(g)])
        run_vjp(g)
        assert bits([*g.douts, *unread(g)]) == before


@each_op
@each_float
def test_a_kernel_gives_the_same_bits_twice(name: str, dtype: str, backend: str) -> None:
    for case in cases(name, dtype):
        first, second = forward(case, on_backend), forward(case, on_backend)
        assert bits([*first.written, *first.saved]) == bits([*second.written, *second.saved])
    for g in gradient_cases(name, dtype) if OPS[name].vjp else ():
        assert bits(run_vjp(g)) == bits(run_vjp(g))


@each_op
@each_float
def test_a_bound_call_reads_its_buffers_anew_each_time(name: str, dtype: str, backend: str) -> None:
    case = next((c for c in cases(name, dtype) if c.inputs and c.inputs[0].size), cases(name, dtype)[0])
    buffers = blank_buffers(case)
    inputs = [None if x is None else np.zeros_like(x) for x in case.inputs]
    for x, scalar in zip(inputs, case.inputs, strict=True):
        if x is not None and x.ndim == 0:
            x[...] = scalar
    call = bind(name, *buffers.written, *buffers.saved, *inputs, **case.attrs)
    call()
    for x, original in zip([*inputs, *buffers.written[len(case.op.outs) :]], [*case.inputs, *case.state], strict=True):
        if x is not None:
            x[...] = original
    call()
    fresh = forward(case, on_backend)
    assert bits([*buffers.written, *buffers.saved]) == bits([*fresh.written, *fresh.saved])


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.updates])
@each_float
def test_results_keep_the_dtype_of_the_inputs(name: str, dtype: str) -> None:
    for case in cases(name, dtype):
        outs, saved, _ = execute(case.op, case.inputs, case.attrs)
        wanted = [KINDS[a.kind] or np.dtype(dtype) for a in (*case.op.outs, *case.op.saved)]
        assert [x.dtype for x in (*outs, *saved)] == wanted


GUARD = 3  # an odd number of elements: what follows stands at no address that a vector load would like


def guarded(array: Any) -> tuple[Any, Any]:
    """A copy of an array inside a larger one, and that larger one."""
    whole = np.full(array.size + 2 * GUARD, 77, array.dtype)
    inside = whole[GUARD : GUARD + array.size].reshape(array.shape)
    inside[...] = array
    return inside, whole


@each_op
@each_float
def test_a_kernel_writes_nothing_outside_its_buffers_at_any_alignment(name: str, dtype: str, backend: str) -> None:
    for case, wanted in zip(cases(name, dtype), expected(name, dtype), strict=True):
        blanks = blank_buffers(case)
        buffers = [(None, None) if x is None else guarded(x) for x in (*blanks.written, *blanks.saved, *case.inputs)]
        bind(name, *(inside for inside, _ in buffers), **case.attrs)()
        for inside, whole in buffers:
            if whole is not None:
                edges = np.concatenate([whole[:GUARD], whole[GUARD + inside.size :]])
                assert np.all(edges == 77), "an element outside the buffer was written"
        results = [inside for inside, _ in buffers][: len(blanks.written) + len(blanks.saved)]
        for actual, w in zip(results, [*wanted.written, *wanted.saved], strict=True):
            assert_close(name, actual, w, case.inputs)


@each_differentiable_op
@each_float
def test_a_vjp_writes_nothing_outside_its_gradients(name: str, dtype: str, backend: str) -> None:
    for g in gradient_cases(name, dtype):
        dins = [(None, None) if x is None else guarded(x) for x in blank_dins(g.case, dtype)]
        bind(name + "_vjp", *(inside for inside, _ in dins), *g.douts, *unread(g), **g.case.attrs)()
        for inside, whole in dins:
            if whole is not None:
                edges = np.concatenate([whole[:GUARD], whole[GUARD + inside.size :]])
                assert np.all(edges == 77), "an element outside the buffer was written"


@each_differentiable_op
@each_float
def test_vjp_reads_names_all_that_a_vjp_looks_at(name: str, dtype: str, backend: str) -> None:
    for g in gradient_cases(name, dtype):
        everything = blank_dins(g.case, dtype)
        bind(name + "_vjp", *everything, *g.douts, *g.outs, *g.saved, *g.case.inputs, **g.case.attrs)()
        assert bits(run_vjp(g)) == bits(everything)


@each_differentiable_op
@each_float
def test_an_unneeded_gradient_may_be_left_out(name: str, dtype: str, backend: str) -> None:
    for g in gradient_cases(name, dtype):
        count = len(g.expected)
        for k in range(count):
            alone = run_vjp(g, [i == k for i in range(count)])
            assert [d is None for d in alone] == [i != k or g.expected[k] is None for i in range(count)]
            assert_close(name + "_vjp", alone[k], g.expected[k], [*g.douts, *unread(g)])


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if any(a.optional for a in op.saved)])
@each_float
def test_a_loss_is_the_same_without_its_saved_gradient(name: str, dtype: str, backend: str) -> None:
    for case in cases(name, dtype):
        with_gradient, without = forward(case, on_backend), blank_buffers(case)
        none = [None if a.optional else x for a, x in zip(case.op.saved, without.saved, strict=True)]
        on_backend(case.op, *without.written, *none, *case.inputs, **case.attrs)
        assert bits(without.written) == bits(with_gradient.written)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, op in OPS.items() for argument in op.may_alias]
)
@each_float
def test_the_output_may_take_the_memory_of_an_input_that_is_declared_so(
    name: str, argument: str, dtype: str, backend: str
) -> None:
    place = [a.name for a in OPS[name].inputs].index(argument)
    for case in cases(name, dtype):
        apart, blanks = forward(case, on_backend), blank_buffers(case)
        inputs = list(case.inputs)
        inputs[place] = inputs[place].copy()
        shared = inputs[place].reshape(blanks.written[0].shape)
        assert shared.base is not None or shared is inputs[place] or not shared.size
        on_backend(case.op, shared, *blanks.written[1:], *blanks.saved, *inputs, **case.attrs)
        assert bits([shared, *blanks.saved]) == bits([apart.written[0], *apart.saved])


@pytest.mark.parametrize(
    "name", [n for n, op in OPS.items() if any("n" in (*a.dims,) for a in op.outs) and "c" in op.letters]
)
@each_float
def test_a_row_does_not_depend_on_the_rows_around_it(name: str, dtype: str, backend: str) -> None:
    for case in cases(name, dtype):
        n, whole = case.inputs[0].shape[0], forward(case, on_backend)
        by_row = [x is not None and x.ndim > 0 and x.shape[0] == n for x in case.inputs]
        for row in {0, n - 1}:
            inputs = [x[row : row + 1] if rows else x for x, rows in zip(case.inputs, by_row, strict=True)]
            alone = forward(case._replace(inputs=inputs), on_backend)
            assert bits(alone.written) == [whole.written[0][row : row + 1].tobytes()]


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "temperature" in [a.name for a in op.inputs]])
@each_float
def test_a_call_refuses_a_temperature_that_its_buffer_holds_by_now(name: str, dtype: str, backend: str) -> None:
    case = cases(name, dtype)[0]
    place = [a.name for a in case.op.inputs].index("temperature")
    temperature, blanks = np.array(2.0), blank_buffers(case)
    call = bind(name, *blanks.written, *blanks.saved, *replaced(case.inputs, place, temperature), **case.attrs)
    call()
    for value in (0.0, -1.0, np.nan, np.inf):
        temperature[...] = value
        with pytest.raises(ArgumentError, match=f"{name}: temperature must be a finite number above 0"):
            call()


@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
@each_float
def test_a_call_refuses_a_label_that_its_buffer_holds_by_now_and_writes_nothing(
    name: str, dtype: str, backend: str
) -> None:
    case = next(c for c in cases(name, dtype) if c.inputs[0].shape == (33, 10))
    place = [a.name for a in case.op.inputs].index("target")
    labels, blanks = np.zeros(33, np.int64), blank_buffers(case)
    call = bind(name, *blanks.written, *blanks.saved, *replaced(case.inputs, place, labels), **case.attrs)
    for label in (10, -1, 2**40):
        call()
        before = bits([*blanks.written, *blanks.saved])
        labels[31] = label
        with pytest.raises(ArgumentError, match=rf"{name}: target\[31\] .* got {label}\."):
            call()
        assert bits([*blanks.written, *blanks.saved]) == before
        labels[31] = 0


# --- what bind refuses ---


def first_buffers(name: str) -> tuple[Case, list[Any], list[Any]]:
    """A case with the declarations of its forward buffers and the buffers themselves."""
    case = next(c for c in cases(name, "float32") if all(x.size > 1 or x.ndim == 0 for x in c.inputs if x is not None))
    blanks, op = blank_buffers(case), OPS[name]
    arguments = [*op.outs, *op.updates, *op.saved, *([op.inputs[0]] * len(case.inputs) if op.variadic else op.inputs)]
    return case, arguments, [*blanks.written, *blanks.saved, *case.inputs]


def replaced(buffers: Sequence[Any], place: int, value: Any) -> list[Any]:
    return [value if k == place else x for k, x in enumerate(buffers)]


@each_op
def test_bind_refuses_a_buffer_of_another_dtype(name: str, backend: str) -> None:
    case, _, buffers = first_buffers(name)
    for k, x in enumerate(buffers):
        if x is not None:
            with pytest.raises(DTypeError):
                bind(name, *replaced(buffers, k, np.zeros(x.shape, np.int32)), **case.attrs)
            if x.dtype == np.float32 and sum(b is not None and b.dtype == np.float32 for b in buffers) > 1:
                with pytest.raises(DTypeError):
                    bind(name, *replaced(buffers, k, np.zeros(x.shape, np.float64)), **case.attrs)


@each_op
def test_bind_refuses_a_buffer_that_is_not_contiguous(name: str, backend: str) -> None:
    case, _, buffers = first_buffers(name)
    for k, x in enumerate(buffers):
        if x is not None and x.size > 1:
            strided = np.repeat(x, 2, axis=x.ndim - 1)[..., ::2]
            assert not strided.flags.c_contiguous
            with pytest.raises(ShapeError):
                bind(name, *replaced(buffers, k, strided), **case.attrs)


@each_op
def test_bind_refuses_a_buffer_of_another_shape(name: str, backend: str) -> None:
    case, arguments, buffers = first_buffers(name)
    written = len(case.op.outs) + len(case.op.updates) + len(case.op.saved)
    letters = [d for a, x in zip(arguments, buffers, strict=True) if x is not None for d in a.dims]
    for k, (argument, x) in enumerate(zip(arguments, buffers, strict=True)):
        if x is None or (argument.dims == ("*",) and k >= written) or letters == ["..."]:
            continue  # nothing that this shape would have to fit to
        wrong = [np.zeros((*x.shape, 2), x.dtype)]
        if argument.dims and x.ndim and (argument.dims == ("*",) or letters.count(argument.dims[0]) > 1):
            wrong.append(np.zeros((x.shape[0] + 1, *x.shape[1:]), x.dtype))
        for other in wrong:
            with pytest.raises(ShapeError):
                bind(name, *replaced(buffers, k, other), **case.attrs)


@each_op
def test_bind_refuses_none_for_a_buffer_that_is_not_optional(name: str, backend: str) -> None:
    case, arguments, buffers = first_buffers(name)
    for k, argument in enumerate(arguments):
        if not argument.optional:
            with pytest.raises((ShapeError, DTypeError)):
                bind(name, *replaced(buffers, k, None), **case.attrs)


@each_op
def test_bind_refuses_another_number_of_buffers(name: str, backend: str) -> None:
    case, _, buffers = first_buffers(name)
    if not OPS[name].variadic:
        with pytest.raises(ShapeError, match="buffers"):
            bind(name, *buffers, buffers[0], **case.attrs)


def test_a_shape_error_names_the_argument_that_disagrees() -> None:
    with pytest.raises(ShapeError) as caught:
        execute(OPS["linear"], [np.ones((2, 3)), np.ones((4, 5)), None], {})
    assert (caught.value.where, caught.value.argument) == ("linear", "w")
    assert "k = 3" in caught.value.expected
    assert "(4, 5)" in caught.value.got


@pytest.mark.usefixtures("backend")
def test_what_was_approved_once_is_checked_anew_in_another_layout() -> None:
    x, b, y = np.ones((3, 4), np.float32), np.ones(4, np.float32), np.empty((3, 4), np.float32)
    for _ in range(2):
        bind("bias_relu", y, x, b)()
    for wrong in (np.ones(5, np.float32), np.ones(4), np.ones((4, 2), np.float32)[:, 0], None):
        with pytest.raises((ShapeError, DTypeError)):
            bind("bias_relu", y, x, wrong)
    locked = y.copy()
    locked.flags.writeable = False
    with pytest.raises(ShapeError, match="writable"):
        bind("bias_relu", locked, x, b)


@each_op
def test_bind_refuses_a_read_only_array_where_it_writes_and_takes_one_where_it_reads(name: str, backend: str) -> None:
    case, arguments, buffers = first_buffers(name)
    written = {"out", "update", "saved"}
    for k, (argument, x) in enumerate(zip(arguments, buffers, strict=True)):
        if x is None:
            continue
        locked = x.copy()
        locked.flags.writeable = False
        if argument.role in written:
            with pytest.raises(ShapeError, match="writable"):
                bind(name, *replaced(buffers, k, locked), **case.attrs)
        else:
            bind(name, *replaced(buffers, k, locked), **case.attrs)()


def test_the_page_of_operations_is_the_one_that_the_table_makes() -> None:
    written = (Path(__file__).parents[1] / "docs" / "operations.md").read_text("utf-8")
    assert written == page(), "run: python -m minikd.ops > docs/operations.md"


def test_an_attribute_that_an_operation_does_not_have_is_refused(backend: str) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ArgumentError, match=r"softmax: temperatur must be left out: there are no attributes, got 3"):
        bind("softmax", np.empty_like(x), x, np.array(1.0), temperatur=3)
    with pytest.raises(ArgumentError, match=r"kl_div: reductio must be one of the attributes reduction, log_target"):
        execute(OPS["kl_div"], [x, x], {"reductio": "sum"})
