"""Products of factors with fewer digits: how they are rounded, and how exact what comes of them is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from standin import computing, cublas
from standin import cupy as standin

import minikd as kd
from minikd import functional as F
from minikd.cli import main
from minikd.errors import ArgumentError, BackendError
from minikd.kernels import current_backend, execute, product_eps
from minikd.kernels.arrays import to_device, to_host
from minikd.kernels.cuda.products import COMPUTE_TYPES, multiplier
from minikd.kernels.precision import MANTISSA, emulated, rounded
from minikd.objectives import Batch, RelationalAngle, RelationalDistance
from minikd.ops import OPS

LARGEST = float(np.finfo(np.float32).max)
reduced = pytest.mark.parametrize("precision", ["tf32", "bfloat16"])


def nearest(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest numbers with so many bits behind the leading one, in float64; a tie goes to the even one."""
    x = x.astype(np.float64)
    _, exponent = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(exponent - 1, -126) - bits)
    found = np.rint(x / quantum) * quantum
    return np.where(np.abs(found) >= 2.0**128, np.copysign(np.inf, x), found)


@reduced
@given(x=arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_each_number_becomes_the_nearest_with_fewer_digits(precision: str, x: np.ndarray) -> None:
    found = rounded(x, precision)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, nearest(x, MANTISSA[precision]))
    assert np.array_equal(np.signbit(found), np.signbit(x))


@reduced
@given(bits=st.integers(0, 2**32 - 1), tie=st.booleans())
def test_any_pattern_of_bits_becomes_one_that_rounds_to_itself(precision: str, bits: int, tie: bool) -> None:
    drop = 23 - MANTISSA[precision]
    bits = bits >> drop << drop | 1 << (drop - 1) if tie else bits
    once = rounded(np.array([bits], np.uint32).view(np.float32), precision)
    twice = rounded(once, precision)
    assert once.view(np.uint32) == twice.view(np.uint32)
    assert np.isnan(once).all() == np.isnan(np.array([bits], np.uint32).view(np.float32)).all()


@reduced
def test_infinities_and_nan_stay_and_what_is_too_large_becomes_infinite(precision: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, LARGEST, -LARGEST], np.float32)
    np.testing.assert_array_equal(rounded(x, precision), [np.inf, -np.inf, np.nan, np.inf, -np.inf])


def test_float32_keeps_every_digit() -> None:
    x = np.array([1.0000001, np.pi, -1e-44], np.float32)
    assert rounded(x, "float32") is x


@reduced
def test_a_product_differs_by_the_rounding_of_its_factors(precision: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(64, 256)).astype(np.float32), rng.normal(size=(256, 32)).astype(np.float32)
    out = np.empty((64, 32), np.float32)
    emulated(precision)(a, b, out)
    exact = a.astype(np.float64) @ b
    most = np.abs(a).astype(np.float64) @ np.abs(b)  # what every error in a factor is multiplied with
    half = 2.0 ** -(MANTISSA[precision] + 1)
    worst = np.max(np.abs(out - exact) / most)
    assert half / 50 < worst < 2 * half + 1e-6


@pytest.mark.parametrize("size", [64, 500])
@pytest.mark.parametrize(("precision", "stated"), [("tf32", 2.9e-4), ("bfloat16", 2.4e-3)])
def test_a_product_of_random_matrices_is_as_far_off_as_is_stated(precision: str, stated: float, size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = (rng.normal(size=(size, size)).astype(np.float32) for _ in "ab")
    out, exact = np.empty_like(a), a.astype(np.float64) @ b
    emulated(precision)(a, b, out)
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) == pytest.approx(stated, rel=0.1)


@reduced
def test_products_in_float64_keep_every_digit(precision: str) -> None:
    a, b = np.full((2, 3), 1 / 3), np.full((3, 2), 1 / 7)
    out = np.empty((2, 2))
    emulated(precision)(a, b, out)
    np.testing.assert_array_equal(out, a @ b)


# --- choosing it ---


@pytest.fixture
def numpy_in_use() -> Iterator[None]:
    """The NumPy backend, and the one before it afterwards."""
    before = current_backend()
    kd.use_backend("numpy")
    yield
    kd.use_backend(before)


@pytest.fixture
def cupy() -> Iterator[Any]:
    """The stand-in for CuPy, and its backend in use."""
    with computing() as module:
        yield module


def a_product() -> tuple[Any, Any, Any]:
    """Two matrices and their product by the backend in use."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    return a, b, F.matmul(a, b)


@reduced
def test_as_a_context_manager_it_puts_back_what_was_before(precision: str, numpy_in_use: None) -> None:
    a, b, full = a_product()
    assert str(kd.matmul_precision()) == "float32"
    with kd.matmul_precision(precision) as inside:
        assert inside.name == kd.matmul_precision().name == precision
        assert (a_product()[2] == rounded(a, precision) @ rounded(b, precision)).all()
        with kd.matmul_precision("float32"):
            assert (a_product()[2] == full).all()
        assert precision in repr(kd.matmul_precision())
    assert (a_product()[2] == full).all()


def test_another_backend_begins_in_float32_and_a_context_that_ends_leaves_it_alone(numpy_in_use: None) -> None:
    with kd.matmul_precision("tf32"):
        kd.use_backend("numpy")
        assert str(kd.matmul_precision()) == "float32"
        chosen = kd.matmul_precision("bfloat16")
    assert str(kd.matmul_precision()) == chosen.name == "bfloat16"


@pytest.mark.parametrize(("precision", "eps"), [("float32", 2.0**-23), ("tf32", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_factors_in_float32_are_as_far_apart_as_their_digits_say(
    precision: str, eps: float, numpy_in_use: None
) -> None:
    with kd.matmul_precision(precision):
        assert product_eps(np.dtype(np.float32)) == eps
        assert product_eps(np.dtype(np.float64)) == 2.0**-52


def test_an_unknown_precision_is_refused(numpy_in_use: None) -> None:
    with pytest.raises(ArgumentError, match="precision must be one of float32, tf32, bfloat16, got 'float16'"):
        kd.matmul_precision("float16")


@pytest.mark.usefixtures("c_in_use")
def test_a_backend_without_such_products_says_so() -> None:
    assert str(kd.matmul_precision("float32")) == "float32"
    with pytest.raises(BackendError, match="precision must be float32 on the backend 'c', got 'tf32'"):
        kd.matmul_precision("tf32")


# Every kernel with a product in it: its factors are rounded, and nothing else is.
WITH_PRODUCTS = ["matmul", "linear", *(f"linear_{name}" for name in ("relu", "tanh", "sigmoid", "gelu"))]


@reduced
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_every_product_of_a_layer_and_of_its_gradient_takes_rounded_factors(
    name: str, precision: str, numpy_in_use: None
) -> None:
    op, rng = OPS[name], np.random.default_rng(2)
    for inputs, attrs in op.example(rng, np.float32):
        tensors = [None if x is None else kd.Tensor(x, requires_grad=True) for x in inputs]
        with kd.matmul_precision(precision):
            y = kd.tensor.apply(name, *tensors, **attrs)
            dy = rng.normal(size=y.shape).astype(np.float32)
            y.backward(dy)
        x, w, *rest = inputs
        right = w if name == "matmul" else w.T
        product = rounded(x, precision).astype(np.float64) @ rounded(right, precision)
        wanted = product if not rest or rest[0] is None else product + rest[0]
        if "_" in name:
            wanted = execute(OPS[name.removeprefix("linear_")], [wanted], {})[0][0]
        np.testing.assert_allclose(y.numpy(), wanted, rtol=3e-5, atol=3e-6)
        if name == "linear":
            r = rounded(dy, precision).astype(np.float64)
            np.testing.assert_allclose(tensors[0].grad.numpy(), r @ rounded(w, precision), rtol=3e-5, atol=3e-6)
            np.testing.assert_allclose(tensors[1].grad.numpy(), r.T @ rounded(x, precision), rtol=3e-5, atol=3e-6)
            if tensors[2] is not None:
                np.testing.assert_allclose(tensors[2].grad.numpy(), dy.sum(0), rtol=1e-5, atol=1e-6)


@reduced
def test_a_last_layer_in_one_operation_with_its_loss_takes_rounded_factors_too(
    precision: str, numpy_in_use: None
) -> None:
    rng = np.random.default_rng(9)
    hidden, weight, teacher = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (4, 5), (6, 4)))
    with kd.matmul_precision(precision):
        h, w = kd.Tensor(hidden, requires_grad=True), kd.Tensor(weight, requires_grad=True)
        loss = F.linear_distillation_loss(h, w, None, teacher, [0, 1, 2, 3, 0, 1], temperature=2.0)
        loss.backward()
    logits = rounded(hidden, precision) @ rounded(weight, precision).T
    wanted, gradient = F.distillation_loss(logits, teacher, [0, 1, 2, 3, 0, 1], temperature=2.0, return_grad=True)
    assert loss.item() == pytest.approx(float(wanted), rel=1e-5)
    g = rounded(gradient, precision)
    np.testing.assert_allclose(h.grad.numpy(), g @ rounded(weight, precision), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(w.grad.numpy(), g.T @ rounded(hidden, precision), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "apart"), [("tf32", 0.01), ("bfloat16", 0.03)])
def test_distances_that_a_product_cannot_tell_from_0_have_no_gradient_of_its_rounding(
    precision: str, apart: float, numpy_in_use: None
) -> None:
    rng = np.random.default_rng(5)
    rows = np.repeat(rng.normal(size=(20, 6)), 2, axis=0)  # each with a neighbour that float32 tells from it
    rows += apart * np.tile([0.0, 1.0], 20)[:, None]
    theirs = rng.normal(size=(40, 6)).astype(np.float32)
    for objective in (RelationalDistance(), RelationalAngle()):
        largest = {}
        for chosen in ("float32", precision):
            with kd.matmul_precision(chosen):
                x = kd.Tensor(rows.astype(np.float32), requires_grad=True)
                objective.value(Batch(x, theirs)).backward()
                largest[chosen] = np.abs(x.grad.numpy()).max()
        assert largest[precision] < 1.1 * largest["float32"]


def test_a_compiled_step_is_recorded_anew_at_another_precision(numpy_in_use: None) -> None:
    model = kd.nn.MLP([5, 3], seed=1)
    x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    step = kd.compile(lambda x: model(x))
    full = [step(x).numpy() for _ in range(3)]
    with kd.matmul_precision("bfloat16"):
        coarse = [step(x).numpy() for _ in range(3)]
        assert (coarse[2] == model(x).numpy()).all()
    assert (coarse[0] == coarse[2]).all()
    assert not (full[2] == coarse[2]).all()
    assert (step(x).numpy() == full[0]).all()


def test_gradients_at_a_lower_precision_point_where_the_exact_ones_do(numpy_in_use: None) -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(32, 20)).astype(np.float32), rng.integers(0, 5, 32)
    found = {}
    for precision in MANTISSA:
        with kd.matmul_precision(precision):
            model = kd.nn.MLP([20, 30, 5], seed=2)
            F.cross_entropy(model(x), y).backward()
        found[precision] = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]).astype(np.float64)
    for precision, most in (("tf32", 5e-3), ("bfloat16", 5e-2)):
        error = np.linalg.norm(found[precision] - found["float32"]) / np.linalg.norm(found["float32"])
        assert most / 50 < error < most


# --- a whole run ---


def test_a_run_is_computed_and_reported_at_its_precision(numpy_in_use: None, tmp_path: Path) -> None:
    arguments = ["distill", "--backend", "numpy", "--quiet", "--teacher", "8", "--student", "4", "--labels", "0"]
    arguments += ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "0"]
    models = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        assert main([*arguments, "--precision", precision, "--out", str(folder)]) == 0
        report = json.loads((folder / "report.json").read_text("utf-8"))
        assert report["settings"]["precision"] == precision
        assert f'precision = "{precision}"' in (folder / "config.toml").read_text("utf-8")
        models[precision] = (folder / "student.safetensors").read_bytes()
    assert models["float32"] != models["bfloat16"]


@pytest.mark.usefixtures("c_in_use")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--precision", "float16"], '--precision must be one of "", float32, tf32, bfloat16'),
        (["--backend", "c", "--precision", "tf32"], "--precision must be float32 on the backend 'c', got 'tf32'"),
    ],
)
def test_a_run_at_a_precision_that_there_is_not_is_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", *given, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


# --- on a GPU ---


def layouts(shape: tuple[int, int], rng: np.random.Generator) -> Iterator[Any]:
    """The same matrix as cuBLAS may meet it: by rows, by columns, as rows of a wider one, and every second column."""
    rows, columns = shape
    yield to_device(rng.normal(size=shape).astype(np.float32))
    yield to_device(rng.normal(size=(columns, rows)).astype(np.float32)).T
    yield to_device(rng.normal(size=(rows, columns + 3)).astype(np.float32))[:, 1 : columns + 1]
    yield to_device(rng.normal(size=(rows, 2 * columns)).astype(np.float32))[:, ::2]


@reduced
@pytest.mark.parametrize(
    ("n", "k", "m"), [(3, 4, 5), (1, 1, 1), (1, 6, 1), (6, 1, 4), (2, 3, 1), (1, 3, 7), (17, 33, 9)]
)
def test_cublas_is_asked_for_the_product_however_its_factors_lie(
    precision: str, n: int, k: int, m: int, cupy: Any
) -> None:
    rng = np.random.default_rng(4)
    multiply = multiplier(precision)
    cublas.CALLS.clear()
    count = 0
    for a in layouts((n, k), rng):
        for b in layouts((k, m), rng):
            out = to_device(np.full((n, m), np.nan, np.float32))
            multiply(a, b, out)
            wanted = rounded(to_host(a), precision) @ rounded(to_host(b), precision)
            np.testing.assert_allclose(to_host(out), wanted, rtol=1e-5, atol=1e-6)
            count += 1
    assert [getattr(cublas, COMPUTE_TYPES[precision])] * count == cublas.CALLS


@reduced
def test_empty_products_and_those_in_float64_are_left_to_cupy(precision: str, cupy: Any) -> None:
    cublas.CALLS.clear()
    multiply = multiplier(precision)
    out = to_device(np.full((2, 3), np.nan, np.float32))
    multiply(to_device(np.empty((2, 0), np.float32)), to_device(np.empty((0, 3), np.float32)), out)
    assert (to_host(out) == 0).all()
    a = to_device(np.full((2, 2), 1 / 3))
    exact = to_device(np.empty((2, 2)))
    multiply(a, a, exact)
    np.testing.assert_array_equal(to_host(exact), to_host(a) @ to_host(a))
    assert cublas.CALLS == []


def test_a_step_on_the_device_uses_tensor_cores_for_all_its_products(cupy: Any) -> None:
    model = kd.nn.MLP([6, 5, 4, 3], seed=1)
    opt = kd.optim.SGD(model.parameters(), 0.1)
    x, y = to_device(np.ones((4, 6), np.float32)), to_device(np.array([0, 1, 2, 0]))

    @kd.compile
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    with kd.matmul_precision("tf32"):
        for _ in range(3):
            cublas.CALLS.clear()
            step(x, y)
            assert len(cublas.CALLS) == 3 + 3 + 2  # forward, the weights' gradients, and those of two inputs


def test_an_old_gpu_has_no_such_products(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standin.Device, "compute_capability", "75")
    with pytest.raises(BackendError, match=r"of compute capability below 8.0, got 'tf32' on one of 75"):
        kd.matmul_precision("tf32")
    assert str(kd.matmul_precision()) == "float32"
