"""The kit for tests of kernels and gradients: it catches what is wrong, lets pass what is right, and says why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buggy_kernels import BUGGY, RIGHT, Buggy
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from mpmath import mp

import minikd as kd
from minikd import functional as F
from minikd import testing
from minikd.errors import ArgumentError, DTypeError, ShapeError
from minikd.kernels import execute, kernel_names, prepare, run
from minikd.ops import OPS
from minikd.testing import CONTRACTS, KINDS, check_gradients, check_kernel, reference
from minikd.testing.contracts import WITHOUT
from minikd.testing.kernels import tiled
from minikd.testing.layouts import LAYOUTS, in_layout, locked
from minikd.testing.reports import as_code, ulps

PACKAGE = Path(kd.__file__).parent
each_kind = pytest.mark.parametrize("kind", KINDS)
CANNOT = set(kernel_names()) - set(CONTRACTS)  # kernels without a contract
each_contract = pytest.mark.parametrize("name", CONTRACTS)


# --- references ---


def listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, tuple | list) else [found]


def as_floats(x: Any) -> Any:
    return np.array([float(v) for v in np.asarray(x).ravel()]).reshape(np.shape(x))


def small_cases(name: str, most: int = 150) -> list[tuple[list[Any], dict[str, Any]]]:
    """The table's examples of an operation with few numbers, and what it updates, as its reference takes them."""
    op, found = OPS[name], []
    for raw, attrs in op.example(np.random.default_rng(3), np.float64):
        inputs, _ = prepare(op, raw, np.dtype(np.float64))
        sizes = {"m": 3, "k": 5} | op.sizes(
            [op.inputs[0]] * len(inputs) if op.variadic else op.inputs,
            [None if x is None else np.shape(x) for x in inputs],
        )
        state = [
            np.array(7)
            if a.kind == "counter"
            else np.ones(np.shape(inputs[0]) if a.dims == ("...",) else tuple(sizes[d] for d in a.dims))
            for a in op.updates
        ]
        if sum(np.size(x) for x in inputs) <= most:
            found.append(([*inputs, *state], attrs))
    return found


def assert_same(found: Any, wanted: Any, rtol: float = 1e-11, atol: float = 1e-13) -> None:
    for a, b in zip(listed(found), listed(wanted), strict=True):
        if b is None:
            assert a is None
        else:
            np.testing.assert_allclose(as_floats(a), b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPS)
def test_every_operation_has_the_same_reference_in_every_precision(name: str) -> None:
    assert small_cases(name)
    for inputs, attrs in small_cases(name):
        wanted = reference(name)(*inputs, **attrs)
        assert_same(reference(name, "longdouble")(*inputs, **attrs), wanted)
        assert_same(reference(name, 20)(*inputs, **attrs), wanted)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.vjp])
def test_every_gradient_has_the_same_reference_in_every_precision(name: str) -> None:
    op = OPS[name]
    for inputs, attrs in small_cases(name):
        inputs = inputs[: len(inputs) - len(op.updates)]
        dout = np.ones_like(listed(reference(name)(*inputs, **attrs))[0])
        wanted = reference(name + "_vjp")(dout, *inputs, **attrs)
        assert_same(reference(name + "_vjp", "longdouble")(dout, *inputs, **attrs), wanted)
        assert_same(reference(name + "_vjp", 20)(dout, *inputs, **attrs), wanted, rtol=1e-10)


@given(testing.batches(), testing.temperatures(0.5, 20))
def test_more_digits_change_only_what_fewer_left_open(batch: testing.Batch, t: float) -> None:
    inputs = (*batch, t, 0.5, 0.5)
    few, many = (reference("distillation_loss", digits)(*inputs) for digits in (20, 60))
    for a, b in zip(few, many, strict=True):
        with mp.workdps(70):
            gaps = [abs(x - y) for x, y in zip(np.ravel(a), np.ravel(b), strict=True)]
            assert all(gap <= 1e-19 * max(abs(y), 1) for gap, y in zip(gaps, np.ravel(b), strict=True))


def test_mpmath_gives_the_divergence_of_the_formulas_with_thirty_digits() -> None:
    student, teacher = [[2, 1, 0.1], [0.5, 2.5, -1]], [[3, 0.5, -0.5], [0, 3, 0]]
    loss, _ = reference("distillation_loss", 30)(student, teacher, [0, 1], 4.0, 0.5, 0.5)
    assert float(loss[()]) == pytest.approx(0.25409468314, abs=6e-12)
    with mp.workdps(30):
        z = [mp.mpf(x) / 3 for x in (0, 1)]
        wanted = mp.exp(z[1]) / (mp.exp(z[0]) + mp.exp(z[1]))
        assert abs(reference("softmax", 30)([[0.0, 1.0]], 3.0)[0, 1] - wanted) < mp.mpf(10) ** -29


def test_a_longdouble_is_taken_with_all_its_digits() -> None:
    x = np.array([1]) + np.finfo(np.longdouble).eps
    with mp.workdps(30):
        assert reference("neg", 30)(x)[0] == -(1 + mp.mpf(float(np.finfo(np.longdouble).eps)))


def test_a_reference_leaves_its_inputs_alone() -> None:
    w, g = np.ones(3), np.ones(3)
    new, _ = reference("sgd_step")(g, 0.5, w, np.zeros(3))
    np.testing.assert_array_equal(new, 0.5)
    np.testing.assert_array_equal(w, 1)


def test_a_reference_says_what_it_does_not_know() -> None:
    with pytest.raises(ArgumentError, match="op must be the name of a kernel, got 'softmin'"):
        reference("softmin")
    for precision in ("float16", 0, True, 1.5):
        with pytest.raises(ArgumentError, match="precision must be"):
            reference("softmax", precision)
    with pytest.raises(ShapeError, match="inputs must be x, temperature, got 1 values"):
        reference("softmax")([[1.0]])
    with pytest.raises(ShapeError, match="dy, x, temperature"):
        reference("softmax_vjp")([[1.0]], 1.0)
    with pytest.raises(ShapeError, match="w must be"):
        reference("linear", 20)(np.ones((2, 3)), np.ones((4, 5)), None)


# --- strategies ---


def smallest(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool] = lambda _: True) -> Any:
    return find(strategy, condition, settings=settings(database=None, suppress_health_check=list(HealthCheck)))


@each_kind
@given(data=st.data())
def test_logits_have_the_shape_and_dtype_that_were_asked_for(kind: str, data: st.DataObject) -> None:
    z = data.draw(testing.logits(3, 5, np.float32, kind))
    assert (z.shape, z.dtype) == ((3, 5), np.float32)
    assert not np.isnan(z).any()
    assert (z.max(axis=1) > -np.inf).all()


@each_kind
@given(data=st.data())
def test_every_loss_of_a_batch_is_finite(kind: str, data: st.DataObject) -> None:
    batch = data.draw(testing.batches(kind=kind, ignored=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tied rows look like probabilities
        loss, gradient = F.distillation_loss(*batch, return_grad=True)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_cases_shrink_to_few_zeros() -> None:
    np.testing.assert_array_equal(smallest(testing.logits()), np.zeros((1, 2)))
    np.testing.assert_array_equal(smallest(testing.labels(2, 3)), [0, 0])
    assert smallest(testing.temperatures()) == 1
    batch = smallest(testing.batches(), lambda b: b.student[0, 0] != b.teacher[0, 0])
    assert batch.student.shape == (1, 2)
    assert {*batch.student.ravel(), *batch.teacher.ravel()} <= {0.0, 0.0625, -0.0625}


@pytest.mark.parametrize(
    ("kind", "is_there"),
    [
        ("extreme", lambda z: np.ptp(z) > 1e30),
        ("tied", lambda z: (z == z.max()).sum() > 1),
        ("masked", lambda z: np.isneginf(z).any()),
        ("nearly equal", lambda z: 0 < np.ptp(z) < 0.1),
        ("one-hot-like", lambda z: np.ptp(z) >= 10),
    ],
)
def test_each_kind_of_logits_is_what_it_is_called(kind: str, is_there: Callable[[Any], bool]) -> None:
    drawn = settings(database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    assert is_there(find(testing.logits(kind=kind), is_there, settings=drawn))


def test_a_kind_that_does_not_exist_is_refused() -> None:
    for strategy in (testing.logits(kind="odd"), testing.batches(kind="odd")):
        with pytest.raises(ArgumentError, match="kind must be one of ordinary, extreme"):
            smallest(strategy)
    with pytest.raises(ArgumentError, match="low, high"):
        testing.temperatures(5, 6)


@given(testing.arrays_with_strides(testing.logits(), read_only=True), st.data())
def test_arrays_with_strides_hold_the_same_numbers(x: Any, data: st.DataObject) -> None:
    other = data.draw(testing.arrays_with_strides(x))
    np.testing.assert_array_equal(other, x)
    assert not np.shares_memory(other, x)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "with a stride of 0"])
def test_each_layout_is_another_place_in_memory(layout: str) -> None:
    x = np.arange(12.0).reshape(3, 4)
    moved = in_layout(x, layout)
    np.testing.assert_array_equal(moved, x)
    assert moved.strides != x.strides
    assert not locked(x).flags.writeable
    assert in_layout(np.ones((3, 4)), "with a stride of 0").strides[0] == 0


@given(testing.mlps(inputs=3, classes=4))
def test_networks_are_small_and_work(model: Any) -> None:
    assert model.logits(np.ones((2, 3), np.float32)).shape == (2, 4)


@pytest.mark.usefixtures("c_in_use")
@settings(max_examples=10)
@given(testing.training_steps())
def test_a_training_step_is_the_same_each_time_and_compiled(step: testing.TrainingStep) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (losses, first), (again, second) = step.run(), step.run(compiled=True)
    assert losses == again
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# --- contracts ---


def test_every_operation_has_a_contract_or_a_reason_why_it_has_none() -> None:
    assert set(OPS) == set(CONTRACTS) - {name + "_vjp" for name in OPS} | set(WITHOUT)
    assert not set(CONTRACTS) & set(WITHOUT)


@pytest.mark.parametrize("name", sorted(CANNOT))
def test_an_operation_without_a_contract_is_refused_with_the_reason_and_what_else_helps(name: str) -> None:
    with pytest.raises(ArgumentError, match="op must be an operation with a contract") as refused:
        check_kernel(name, RIGHT["softmax"])
    assert f"{name!r}: " in refused.value.got
    fix = refused.value.fix or ""
    if f"reference({name!r})" in fix:
        assert callable(reference(name))
        assert ("check_gradients" in fix) == name.endswith("_vjp")
    else:
        assert fix == f"Check {name.removesuffix('_vjp')} with a function that gives both."
        assert CONTRACTS[name.removesuffix("_vjp")].gives[0] == "loss"


@each_contract
def test_larger_cases_of_a_contract_fit_its_operation(name: str) -> None:
    contract = CONTRACTS[name]
    larger = tiled(contract, contract.edges[0].inputs, 3, 7)
    assert max(map(np.size, larger.values())) > max(map(np.size, contract.edges[0].inputs.values()))
    for gives, result in zip(contract.gives, contract.expected(larger, {}), strict=True):
        assert np.isfinite(result).all(), gives


@each_contract
def test_a_mistake_is_not_what_the_operation_gives(name: str) -> None:
    contract, differs = CONTRACTS[name], set()
    attrs = {"weight_decay": 0.1} if name == "adam_step" else {}
    cases = [edge.inputs for edge in contract.edges]
    cases += [tiled(contract, cases[0], 3, 7), tiled(contract, cases[0], 20, 40)]
    with np.errstate(all="ignore"):
        right = [contract.expected(case, attrs) for case in cases]
        for mistake in contract.mistakes:  # those of chunks are there once for each size that a chunk may have
            for case, wanted in zip(cases, right, strict=True):
                pairs = zip(listed(mistake.give(case, attrs)), wanted, strict=False)
                if not all(np.allclose(a, b, equal_nan=True) for a, b in pairs):
                    differs.add(mistake.name)
                    break
    assert differs == {mistake.name for mistake in contract.mistakes}


@each_contract
def test_a_contract_takes_what_its_operation_takes(name: str) -> None:
    op, contract = OPS[name.removesuffix("_vjp")], CONTRACTS[name]
    assert set(contract.takes) <= {"d" + a.name for a in op.outs} | {a.name for a in (*op.inputs, *op.updates)}
    for edge in contract.edges:
        assert tuple(edge.inputs) == contract.takes, edge.name
        contract.expected(edge.inputs, {})


@each_contract
def test_the_reference_itself_keeps_every_contract(name: str) -> None:
    contract = CONTRACTS[name]

    def kernel(*given: Any) -> Any:
        inputs = dict(zip(contract.takes, given, strict=True))
        real = next(x.dtype for x in given if isinstance(x, np.ndarray) and x.dtype.kind == "f")
        return tuple(np.asarray(x, real) for x in contract.expected(inputs, {}))

    report = check_kernel(name, kernel, examples=2, refusals=True)
    assert report, report


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, t: F.softmax(x, temperature=t),
    "log_softmax": lambda x, t: F.log_softmax(x, temperature=t),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y, return_grad=True),
    "kl_div": lambda log_p, q: F.kl_div(log_p, q, return_grad=True),
    "distillation_loss": lambda s, t, y, T, h, w: F.distillation_loss(
        s, t, y, temperature=T, hard_weight=h, soft_weight=w, return_grad=True
    ),
    "reverse_kl": lambda s, t, T: F.reverse_kl(s, t, temperature=T, return_grad=True),
    "jensen_shannon": lambda s, t, T, b: F.jensen_shannon(s, t, temperature=T, beta=b, return_grad=True),
    "skewed_kl": lambda s, t, T, a: F.skewed_kl(s, t, temperature=T, alpha=a, return_grad=True),
    "soft_cross_entropy": lambda z, y: F.cross_entropy(z, y, return_grad=True),
    "decoupled_kd": lambda s, t, y, T, a, b: F.decoupled_kd(s, t, y, temperature=T, alpha=a, beta=b, return_grad=True),
    "standardised_kl": lambda s, t, T: F.standardised_kl(s, t, temperature=T, return_grad=True),
    "linear_distillation_loss": lambda h, w, b, t, y, T, hard, soft: with_gradients(
        h, w, b, t, y, temperature=T, hard_weight=hard, soft_weight=soft
    ),
    "gelu": F.gelu,
    "linear": F.linear,
}


def with_gradients(*inputs: Any, **settings: Any) -> tuple[Any, ...]:
    loss, gradients = F.linear_distillation_loss(*inputs, return_grad=True, **settings)
    return (loss, *gradients)


@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_of_the_library_keep_their_contracts(name: str, minikd_numpy: str) -> None:
    report = check_kernel(name, FUNCTIONS[name], examples=4, refusals=True, conversions=True)
    assert report, report


@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernels_in_c_keep_their_contracts(name: str, minikd_c: str) -> None:
    report = check_kernel(name, FUNCTIONS[name], examples=4, refusals=True, conversions=True)
    assert report, report


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_layer_with_its_loss_keeps_its_contract_in_chunks_of_any_size(rows: int, minikd_c: str) -> None:
    def loss(h: Any, w: Any, b: Any, t: Any, y: Any, T: float, hard: float, soft: float) -> Any:
        settings = {"temperature": T, "hard_weight": hard, "soft_weight": soft, "reduction": "sum"}
        return with_gradients(h, w, b, t, y, chunk_rows=rows, **settings)

    report = check_kernel("linear_distillation_loss", loss, examples=2, reduction="sum", chunk_rows=rows)
    assert report, report


def test_conversions_that_change_a_result_are_told() -> None:
    def softmax(x: Any, t: float) -> Any:
        x = x if x.dtype.kind == "f" else x.astype(np.float64)
        return RIGHT["softmax"](x, t)

    report = check_kernel("softmax", softmax, examples=0, conversions=True)
    assert [(f.check, f.dtype) for f in report.failures] == [
        ("conversions", dtype) for dtype in ("float16", "int8", "int32", "int64")
    ]
    assert "y, of float16, is not what the same numbers in float32 give, which is of float32" in str(report)
    assert "np.int8)" in str(report.failures[1])
    assert check_kernel("softmax", softmax, examples=0)


def test_conversions_are_asked_for_what_a_dtype_can_hold() -> None:
    seen: set[tuple[str, float]] = set()

    def softmax(x: Any, t: float) -> Any:
        if np.isfinite(x).all():
            seen.add((x.dtype.name, float(np.abs(x).max())))
        return RIGHT["softmax"](x.astype(np.float64), t).astype(np.float64 if x.dtype == np.float64 else np.float32)

    report = check_kernel("softmax", softmax, examples=0, conversions=True)
    assert report, report
    assert {dtype for dtype, _ in seen} == {"float64", "float32", "float16", "int8", "int32", "int64"}
    assert max(size for dtype, size in seen if dtype == "int8") <= 127
    assert max(size for dtype, size in seen if dtype == "int32") == 5001
    writing = check_kernel("softmax", lambda y, x, t: None, writes=True, conversions=True, examples=0)
    assert dict(writing.left_out)["conversions"] == "of functions that make their results"


@pytest.mark.usefixtures("c_in_use")
def test_a_kernel_of_the_table_keeps_the_contract_of_one_that_writes() -> None:
    def adam(w: Any, m: Any, v: Any, g: Any, lr: float, step: int) -> None:
        run("adam_step", w, m, v, g, np.float64(lr), np.asarray(step))

    report = check_kernel("adam_step", adam, writes=True, examples=4)
    assert report, report
    assert "full overwrite" in report.checks


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_kernel_is_checked_for_the_attributes_that_it_is_made_for(reduction: str) -> None:
    def loss(logits: Any, target: Any) -> Any:
        (value,), (gradient,), _ = execute(OPS["cross_entropy"], [logits, target, None], {"reduction": reduction})
        return value, gradient

    report = check_kernel("cross_entropy", loss, examples=2, reduction=reduction)
    assert report, report
    assert not check_kernel("cross_entropy", loss, examples=0)


# --- kernels that are right ---


@pytest.mark.parametrize("name", RIGHT)
def test_plain_numpy_that_is_right_keeps_its_contract(name: str) -> None:
    report = check_kernel(name, RIGHT[name], examples=6)
    assert report, report
    assert (report.failures, report.mistakes, report.regions, report.smallest) == ((), (), (), None)
    assert "keeps its contract" in str(report)


C_SOFTMAX = """
#include <math.h>
#define SOFTMAX(name, real)                                                                  \\
    void name(real *y, const real *x, double t, long n, long c)                              \\
    {                                                                                        \\
        for (long i = 0; i < n; i++, x += c, y += c) {                                       \\
            double top = x[0], total = 0;                                                    \\
            for (long j = 1; j < c; j++)                                                     \\
                top = x[j] > top || x[j] != x[j] ? x[j] : top;                               \\
            for (long j = 0; j < c; j++)                                                     \\
                total += exp((x[j] - top) / t);                                              \\
            for (long j = 0; j < c; j++)                                                     \\
                y[j] = (real)(exp((x[j] - top) / t) / total);                                \\
        }                                                                                    \\
    }
SOFTMAX(softmax_float, float)
SOFTMAX(softmax_double, double)
"""


def test_a_kernel_in_c_is_checked_through_ctypes(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "softmax.c").write_text(C_SOFTMAX, "utf-8")
    library = tmp_path / "softmax.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, tmp_path / "softmax.c", "-lm"], check=True)
    loaded = ctypes.CDLL(str(library))

    def softmax(y: Any, x: Any, temperature: float) -> None:
        function = loaded.softmax_float if x.dtype == np.float32 else loaded.softmax_double
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (y, x))
        function(*pointers, ctypes.c_double(temperature), ctypes.c_long(len(x)), ctypes.c_long(x.shape[1]))

    report = check_kernel("softmax", softmax, writes=True, examples=10)
    assert report, report
    assert dict(report.left_out)["strides"] == "of NumPy arrays only"


def test_a_kernel_in_torch_is_checked() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    functional = torch.nn.functional

    def loss(student: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
        value, gradient, n = student.new_zeros(()), torch.zeros_like(student), len(student)
        if soft:
            log_p, log_q = (functional.log_softmax(z / t, dim=1) for z in (student, teacher))
            p, q = log_p.exp(), log_q.exp()
            terms = torch.where(q == 0, 0 * p, q * (log_q - log_p))
            value, gradient = soft * t * t * terms.sum(dim=1).clamp(min=0).mean(), soft * t / n * (p - q)
        if hard and target is not None and bool((target != -100).any()):
            leaf = student.clone().requires_grad_()
            cross_entropy = functional.cross_entropy(leaf, target)
            cross_entropy.backward()
            value, gradient = value + hard * cross_entropy.detach(), gradient + hard * leaf.grad
        return value, gradient

    report = check_kernel("distillation_loss", loss, array=torch.from_numpy, rtol={"float32": 1e-4}, examples=6)
    assert report, report

    def softmax(x: Any, t: float) -> Any:
        return functional.softmax(x / t, dim=1)

    report = check_kernel("softmax", softmax, array=torch.from_numpy, examples=6)
    assert report, report


class OnlyDlpack:
    """An array of somebody's library: all that is known of it is DLPack, in its oldest form."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.values.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.values.__dlpack_device__()
        return device


class OnADevice:
    """An array in memory of its own, which comes back by `get`, as CuPy's do."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)

    def get(self) -> Any:
        return self.values.copy()


def numpy_of(x: Any) -> Any:
    """What the library itself sees of its array; a number as it is."""
    return x.values if isinstance(x, OnADevice | OnlyDlpack) else x


foreign = pytest.mark.parametrize("array", [OnlyDlpack, OnADevice])


@foreign
@pytest.mark.parametrize("name", ["softmax", "distillation_loss", "decoupled_kd", "linear_distillation_loss"])
def test_a_kernel_on_arrays_of_another_library_is_checked(array: Callable[..., Any], name: str) -> None:
    dtypes: set[str] = set()

    def kernel(*given: Any) -> Any:
        assert not any(isinstance(x, np.ndarray) for x in given)
        dtypes.update(numpy_of(x).dtype.name for x in given if isinstance(x, OnlyDlpack | OnADevice))
        found = RIGHT[name](*map(numpy_of, given))
        return tuple(array(np.asarray(x)) for x in found) if isinstance(found, tuple) else array(found)

    report = check_kernel(name, kernel, array=array, examples=2)
    assert report, report
    assert {"float32", "float64"} <= dtypes
    assert dict(report.left_out)["strides"] == "of NumPy arrays only"


@foreign
def test_a_kernel_that_writes_into_arrays_of_another_library_is_checked(array: Callable[..., Any]) -> None:
    def softmax(y: Any, x: Any, t: float) -> None:
        numpy_of(y)[...] = RIGHT["softmax"](numpy_of(x), t)

    def half(y: Any, x: Any, t: float) -> None:
        numpy_of(y)[:1] = RIGHT["softmax"](numpy_of(x), t)[:1]

    report = check_kernel("softmax", softmax, array=array, writes=True, examples=2)
    assert report, report
    assert "full overwrite" in report.checks
    assert "y depends on what its array held before" in str(
        check_kernel("softmax", half, array=array, writes=True, examples=0)
    )


@foreign
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_writing_into_an_input_of_another_library_is_seen(array: Callable[..., Any], dtype: str) -> None:
    def softmax(x: Any, t: float) -> Any:
        numbers = numpy_of(x)
        found = RIGHT["softmax"](numbers, t)
        numbers[0] += 1
        return array(found)

    report = check_kernel("softmax", softmax, array=array, dtypes=(dtype,), examples=0)
    assert [(f.check, f.dtype) for f in report.failures] == [("untouched inputs", dtype)]
    assert "x is written to" in str(report)


def test_writing_into_a_tensor_of_torch_is_seen() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")

    def softmax(x: Any, t: float) -> Any:
        found = torch.nn.functional.softmax(x / t, dim=1)
        x.sub_(1)
        return found

    report = check_kernel("softmax", softmax, array=torch.from_numpy, examples=0)
    assert {(f.check, f.dtype) for f in report.failures} == {
        ("untouched inputs", "float64"),
        ("untouched inputs", "float32"),
    }


def test_a_kernel_in_torch_that_writes_is_checked() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")

    def relu(y: Any, u: Any) -> None:
        torch.clamp(u, min=0, out=y)

    report = check_kernel("relu", relu, array=torch.from_numpy, writes=True, examples=4)
    assert report, report
    assert "y depends on what its array held before" in str(
        check_kernel("relu", lambda y, u: y.add_(u), array=torch.from_numpy, writes=True, examples=0)
    )


def test_a_layer_with_its_loss_in_torch_is_checked() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    functional = torch.nn.functional

    def loss(hidden: Any, weight: Any, bias: Any, teacher: Any, target: Any, t: float, hard: float, soft: float) -> Any:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        z = functional.linear(*leaves)
        log_p, log_q = functional.log_softmax(z / t, dim=1), functional.log_softmax(teacher / t, dim=1)
        terms = torch.where(torch.isneginf(log_q), 0 * log_q.exp(), log_q.exp() * (log_q - log_p))
        value = soft * t * t * terms.sum(dim=1).mean() if soft else 0 * z[:, 0].mean()
        if hard and target is not None and bool((target != -100).any()):
            value = value + hard * functional.cross_entropy(z, target)
        value.backward()
        return (value.detach().clamp(min=0), *(leaf.grad for leaf in leaves))

    options = {"array": torch.from_numpy, "rtol": {"float32": 1e-4}, "examples": 4}
    report = check_kernel("linear_distillation_loss", loss, **options)
    assert not [f for f in report.failures if "-inf" not in f.region], report  # autograd makes 0·inf of masked classes


# --- kernels that are not ---


def test_the_page_on_tests_says_what_the_kit_says_of_each_buggy_kernel() -> None:
    page = (PACKAGE.parent / "docs" / "testing.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for buggy in BUGGY:
        assert any(f"| `{buggy.op}` |" in row and buggy.says[0] in row for row in rows), buggy


@pytest.mark.parametrize("buggy", BUGGY, ids=lambda buggy: buggy.function.__name__)
def test_a_buggy_kernel_is_caught_and_the_report_says_what_it_does(buggy: Buggy) -> None:
    report = check_kernel(buggy.op, buggy.function, examples=0, **dict.fromkeys(buggy.options, True))
    assert not report
    for words in buggy.says:
        assert words in str(report)


def wrong_above_three(x: Any, t: float) -> Any:
    return RIGHT["softmax"](x, t) * (1 + (x > 3) * x.dtype.type(2.0**-20))


def test_the_smallest_failing_input_is_found_and_printed_as_code() -> None:
    report = check_kernel("softmax", wrong_above_three, dtypes=("float64",), examples=60)
    failure = report.smallest
    assert failure is not None
    assert failure.inputs["x"].shape == (1, 2)
    assert (failure.inputs["x"].max(), failure.inputs["temperature"]) == (3.0625, 1.0)
    assert f"x = {as_code(failure.inputs['x'])}" in str(report)
    assert eval(as_code(failure.inputs["x"]), {"np": np}).tolist() == failure.inputs["x"].tolist()


def test_the_error_is_measured_in_units_of_the_last_place() -> None:
    report = check_kernel("softmax", wrong_above_three, dtypes=("float64",), examples=10)
    assert report.failures
    assert all(2**31 <= (f.ulps or 0) <= 2**34 for f in report.failures)  # 2^-20 of a number is 2^32 to 2^33 ulp
    assert (ulps(1 + 2**-52, 1, np.float64), ulps(1, 1, np.float32), ulps(np.nan, np.nan, np.float32)) == (1, 0, 0)
    assert ulps(np.inf, 1, np.float32) == ulps(1, np.inf, np.float64) == np.inf


def test_the_same_seed_gives_the_same_report() -> None:
    options = {"dtypes": ("float64",), "examples": 6}
    first, second = (str(check_kernel("softmax", wrong_above_three, **options)) for _ in "ab")
    assert first == second


def test_a_region_that_is_wrong_is_named() -> None:
    def breaks_ties(x: Any, t: float) -> Any:
        p = RIGHT["softmax"](x, t)
        if len(x[0]) > 1 and (x[0] == x[0].max()).sum() > 1:
            p[0] = np.eye(len(p[0]))[p[0].argmax()]
        return p

    regions = check_kernel("softmax", breaks_ties, dtypes=("float64",)).regions
    assert "tied inputs" in regions


def test_an_exception_and_a_wrong_shape_are_findings() -> None:
    def fails(x: Any, t: float) -> Any:
        raise KeyError("softmax")

    assert "KeyError is raised: 'softmax'" in str(check_kernel("softmax", fails, examples=1))
    assert "y has the shape" in str(check_kernel("softmax", lambda x, t: x[:, :1], examples=0))
    assert "y is of dtype" in str(check_kernel("softmax", lambda x, t: x > 0, examples=0))


def test_a_loss_without_its_gradient_is_checked_too() -> None:
    report = check_kernel("kl_div", lambda log_p, q: RIGHT["kl_div"](log_p, q)[0], examples=2)
    assert report, report


def test_a_negative_divergence_is_caught_however_small() -> None:
    def nearly(s: Any, t: Any, target: Any, T: float, hard: float, soft: float) -> Any:
        loss, gradient = RIGHT["distillation_loss"](s, t, target, T, hard, soft)
        return loss - (loss == 0) * s.dtype.type(1e-20), gradient

    report = check_kernel("distillation_loss", nearly, examples=0)
    assert [f.check for f in report.failures][:1] == ["sign"]
    assert check_kernel("distillation_loss", nearly, examples=0, leave_out=("sign",))


def test_a_kernel_of_less_precision_passes_with_the_tolerance_that_is_given() -> None:
    def coarse(x: Any, t: float) -> Any:
        return RIGHT["softmax"](x, t) * x.dtype.type(1 + 1e-6)

    assert not check_kernel("softmax", coarse, examples=0, dtypes=("float64",))
    for rtol in (1e-5, {"float64": 1e-5}):
        report = check_kernel("softmax", coarse, rtol=rtol, examples=0, dtypes=("float64",))
        assert report, report


def test_what_a_check_does_not_know_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"op must be one of softmax, log_softmax.*, got 'softmin'"):
        check_kernel("softmin", RIGHT["softmax"])
    with pytest.raises(ArgumentError, match="reductio must be an attribute of kl_div"):
        check_kernel("kl_div", RIGHT["kl_div"], reductio="sum")
    with pytest.raises(ArgumentError, match="leave_out must be names among values, sign"):
        check_kernel("kl_div", RIGHT["kl_div"], leave_out=("all",))
    with pytest.raises(ArgumentError, match="dtypes must be"):
        check_kernel("kl_div", RIGHT["kl_div"], dtypes=("float16",))


# --- gradients ---

X = np.array([[0.5, -1.0, 2.0], [0.0, 1.5, -0.25]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.softmax(x, temperature=2.0),
        lambda x: F.distillation_loss(x, X[::-1], [0, 1]),
        lambda x: (x * x).sum(),
        lambda x: F.linear(x, kd.Tensor(np.ones((4, 3)))),
    ],
    ids=["softmax", "distillation", "square", "linear"],
)
def test_the_gradients_of_the_library_are_right(function: Callable[..., Any]) -> None:
    report = check_gradients(function, X)
    assert report, report
    assert (report.directions, report.kinks, report.methods) == (9, 0, ("differences",))


def test_a_complex_step_sees_what_differences_cannot() -> None:
    report = check_gradients(lambda x: np.exp(x).sum(), X, gradient=lambda x: np.exp(x) * (1 + 1e-9))
    assert not report
    assert report.methods == ("complex step",)
    assert check_gradients(lambda x: np.exp(x).sum(), X, gradient=np.exp)
    assert check_gradients(lambda x: (x**3).sum(), X, gradient=lambda x: 3 * x**2)


@pytest.mark.parametrize("at_zero", [-1.0, 0.0, 0.5, 1.0])
def test_at_a_kink_every_value_between_the_slopes_is_legal(at_zero: float) -> None:
    report = check_gradients(
        lambda x: np.abs(x).sum(), X, gradient=lambda x: np.where(x == 0, at_zero, np.sign(x)), directions=0
    )
    assert report, report
    assert report.kinks == 1


@pytest.mark.parametrize("at_zero", [-1.5, 1.01])
def test_at_a_kink_a_value_beyond_the_slopes_is_not(at_zero: float) -> None:
    report = check_gradients(
        lambda x: np.abs(x).sum(), X, gradient=lambda x: np.where(x == 0, at_zero, np.sign(x)), directions=0
    )
    assert [f.where for f in report.failures] == ["inputs[0][1, 0]"]
    assert "should be between -1 and 1, for there is a kink" in str(report)


def test_a_wrong_gradient_is_shown_with_its_element_and_the_input() -> None:
    report = check_gradients(lambda x: (x**2).sum(), X, gradient=lambda x: np.where(x == 2, 5, 2 * x))
    assert report.failures[0].where == "inputs[0][0, 2]"
    assert "inputs[0][0, 2]: 5, and should be 4" in str(report)
    assert f"inputs[0] = {as_code(X)}" in str(report)


def test_masked_scores_stay_masked_while_others_move() -> None:
    masked = np.array([[0.0, -np.inf, 1.0]])
    report = check_gradients(lambda z: F.cross_entropy(z, [0]), masked)
    assert report, report


def test_several_inputs_and_many_elements_are_checked_along_random_directions() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(9, 8)), rng.normal(size=(8, 4))
    assert check_gradients(lambda a, b: a @ b, x, w).directions == 3
    wrong = check_gradients(
        lambda a, b: (a @ b).sum(), x, w, gradient=lambda a, b: (a * 0, a.sum(axis=0)[:, None] + 0 * b)
    )
    assert len(wrong.failures) == 3


def test_functions_that_cannot_be_checked_are_refused() -> None:
    with pytest.raises(ArgumentError, match="f must be a function that gives a Tensor"):
        check_gradients(lambda x: x.numpy(), X)
    with pytest.raises(ArgumentError, match="f must be a function that gives one number"):
        check_gradients(lambda x: x, X, gradient=lambda x: x)
    with pytest.raises(ArgumentError, match="gradient must be one gradient for each input"):
        check_gradients(lambda x: x.sum(), X, gradient=lambda x: x[0])
    with pytest.raises(ArgumentError, match="inputs must be at least one array"):
        check_gradients(lambda: 0)
    with pytest.raises(DTypeError, match=r"inputs\[0\] must be an array of real numbers"):
        check_gradients(F.relu, X + 0j)


# --- the plugin, and what an import loads ---

USES_THE_PLUGIN = """
import minikd as kd
from minikd.kernels import current_backend

def test_each(minikd_backend):
    assert current_backend() == minikd_backend

def test_one(minikd_numpy):
    assert minikd_numpy == current_backend() == "numpy"
"""
INSTALLED = any(point.name == "minikd" for point in importlib.metadata.entry_points(group="pytest11"))


def pytest_run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(USES_THE_PLUGIN, "utf-8")
    named = () if INSTALLED else ("-p", "minikd.testing.plugin")
    if "no:minikd" in arguments:
        named = ()
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            *named,
            *arguments,
            "test_it.py",
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if p),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_plugin_runs_tests_on_the_backends_that_are_asked_for(tmp_path: Path) -> None:
    done = pytest_run(tmp_path, "--minikd-backend", "numpy", MINIKD_BACKEND="numpy")
    assert done.returncode == 0, done.stdout
    assert "test_each[numpy] PASSED" in done.stdout
    assert "test_each[c]" not in done.stdout
    assert f"minikd {kd.__version__}: backends c (" in done.stdout
    assert "BLAS: " in done.stdout


def test_without_the_plugin_pytest_runs_as_ever(tmp_path: Path) -> None:
    done = pytest_run(tmp_path, "-p", "no:minikd")
    assert "fixture 'minikd_backend' not found" in done.stdout
    assert "minikd 0" not in done.stdout


def test_the_project_names_the_plugin_as_an_entry_point() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points.pytest11]\nminikd = "minikd.testing.plugin"' in project


def test_the_kit_and_its_plugin_are_light_until_they_are_used() -> None:
    code = "import sys, pytest; before = set(sys.modules)\nimport minikd.testing, minikd.testing.plugin\n"
    code += "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["minikd"]


@pytest.mark.parametrize("name", testing.__all__)
def test_every_public_name_of_the_kit_is_there(name: str) -> None:
    assert getattr(testing, name) is not None
    assert name in dir(testing)


def test_a_name_that_the_kit_does_not_have_is_missed_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match=r"minikd.testing.* has no attribute 'nonsense'"):
        getattr(testing, "non" + "sense")
