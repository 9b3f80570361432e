"""Matrix products: our own at every level of instructions, those of a BLAS, and how one is found."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikd.errors import BackendError
from minikd.kernels import blas, native
from minikd.ops import OPS

FLOATS = ("float32", "float64")
LEVELS = native.cpu_levels() or ("base",)
each_float = pytest.mark.parametrize("dtype", FLOATS)
each_level = pytest.mark.parametrize("level", LEVELS)

# Around what the code cuts at: few rows, vectors, tiles and their widths, and small primes.
EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97)
# The same for the depth, whose blocks are 400 long at most, and for rows, whose bands are 256.
DEPTHS = (*EDGES, 399, 400, 401, 799, 800, 801)
ROWS = (*EDGES, 255, 256, 257, 300)
sizes = st.tuples(st.sampled_from(ROWS), st.sampled_from(DEPTHS), st.sampled_from(EDGES))


@pytest.fixture(autouse=True)
def our_own(c_built: None) -> Iterator[None]:
    """Products of our own, and as many threads as before."""
    before = native.threads()
    native.use_products("own")
    yield
    native.use_products(os.environ.get("MINIKD_PRODUCTS") or "best")
    native.set_threads(before)


def run(level: str, name: str, *buffers: Any) -> None:
    native.binder(name, level)(*buffers, **OPS[name.removesuffix("_vjp")].attrs)()


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


GUARD = 3  # an odd number of elements: the buffers begin at no address that a vector would like


def guarded(array: Any) -> tuple[Any, Any]:
    """A copy of an array inside a larger one, and that larger one."""
    whole = np.full(array.size + 2 * GUARD, 77, array.dtype)
    inside = whole[GUARD : GUARD + array.size].reshape(array.shape)
    inside[...] = array
    return inside, whole


@dataclasses.dataclass(frozen=True)
class Product:
    """One product c = a·b as a kernel computes it: its name, where c stands among its buffers, and the factors."""

    name: str
    buffers: list[Any]
    place: int
    a: Any
    b: Any


def products(n: int, k: int, m: int, dtype: str, seed: int = 0) -> list[Product]:
    """Every way in which the kernels multiply, on matrices of these sizes."""
    rng = np.random.default_rng(seed)
    x, w, wt, dy = (rng.normal(size=s).astype(dtype) for s in ((n, k), (m, k), (k, m), (n, m)))
    y, dx, dw, dwt = (np.full_like(z, np.nan) for z in (dy, x, w, wt))
    none = [None] * 3
    return [
        Product("linear", [y, x, w, None], 0, x, w.T),
        Product("linear_vjp", [dx, *none[:2], dy, None, x, w, None], 0, dy, w),
        Product("linear_vjp", [None, dw, None, dy, None, x, w, None], 1, dy.T, x),
        Product("matmul", [y, x, wt], 0, x, wt),
        Product("matmul_vjp", [dx, None, dy, None, x, wt], 0, dy, wt.T),
        Product("matmul_vjp", [None, dwt, dy, None, x, wt], 1, x.T, dy),
    ]


def computed(product: Product, level: str) -> Any:
    """c, with a guard on both sides of every buffer."""
    pairs = [(None, None) if x is None else guarded(x) for x in product.buffers]
    run(level, product.name, *(inside for inside, _ in pairs))
    for inside, whole in pairs:
        if inside is not None:
            assert np.all(whole[:GUARD] == 77)
            assert np.all(whole[GUARD + inside.size :] == 77)
    for (inside, _), before in zip(pairs, product.buffers, strict=True):
        if inside is not None and before is not product.buffers[product.place]:
            assert inside.tobytes() == before.tobytes(), "an input was changed"
    return pairs[product.place][0]


def assert_right(c: Any, product: Product) -> None:
    """c is the product to within k·eps·Σ|a|·|b|, which holds for any order of adding up."""
    a, b = product.a.astype(np.float64), product.b.astype(np.float64)
    depth, eps = a.shape[1], float(np.finfo(c.dtype).eps)
    allowed = (depth + 1) * eps * (np.abs(a) @ np.abs(b)) + float(np.finfo(c.dtype).tiny)
    assert np.all(np.abs(c - a @ b) <= allowed)


# --- our own ---


@each_level
@each_float
@given(shape=sizes)
def test_a_product_of_any_shape_is_right_and_writes_nothing_else(
    level: str, dtype: str, shape: tuple[int, int, int]
) -> None:
    for product in products(*shape, dtype):
        assert_right(computed(product, level), product)


@each_float
@given(shape=sizes)
def test_products_have_the_same_bits_with_avx2_and_with_avx512(dtype: str, shape: tuple[int, int, int]) -> None:
    if LEVELS[-1] != "v4":
        pytest.skip("needs a processor with AVX-512")
    for product in products(*shape, dtype):
        assert computed(product, "v3").tobytes() == computed(product, "v4").tobytes()


@each_level
@each_float
@pytest.mark.parametrize("shape", [(6, 700, 2001), (4096, 97, 10), (300, 401, 577), (1, 1000, 3001)])
def test_products_have_the_same_bits_on_any_number_of_threads(
    shape: tuple[int, int, int], dtype: str, level: str
) -> None:
    for product in products(*shape, dtype):
        c, found = product.buffers[product.place], set()
        for threads in (1, 2, 5):
            native.set_threads(threads)
            c.fill(np.nan)
            run(level, product.name, *product.buffers)
            found.add(c.tobytes())
        assert len(found) == 1


@each_level
@each_float
@pytest.mark.parametrize("shape", [(3, 33, 10), (32, 64, 32), (17, 401, 49)])
def test_products_have_the_same_bits_wherever_their_buffers_lie(
    shape: tuple[int, int, int], dtype: str, level: str
) -> None:
    for product in products(*shape, dtype):
        found = set()
        for shift in range(5):
            moved = []
            for x in product.buffers:
                place = None if x is None else np.full(x.size + 8, np.nan, dtype)[shift : shift + x.size]
                moved.append(None if x is None or place is None else place.reshape(x.shape))
                if x is not None:
                    moved[-1][...] = x
            run(level, product.name, *moved)
            found.add(moved[product.place].tobytes())
        assert len(found) == 1


@each_level
@each_float
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_row_of_a_product_does_not_depend_on_the_rows_around_it(rows: int, dtype: str, level: str) -> None:
    """Among batches of one and two rows, and among larger ones: these two add up in different orders."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2 * rows, 70)).astype(dtype), rng.normal(size=(45, 70)).astype(dtype)
    whole, part = np.empty((2 * rows, 45), dtype), np.empty((rows, 45), dtype)
    run(level, "linear", whole, x, w, None)
    run(level, "linear", part, x[:rows], w, None)
    assert part.tobytes() == whole[:rows].tobytes()


@each_level
@each_float
@pytest.mark.parametrize("rows", [1, 40])
def test_infinities_and_nan_reach_the_elements_that_they_are_part_of_and_no_others(
    rows: int, dtype: str, level: str
) -> None:
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(rows, 35)).astype(dtype), rng.normal(size=(21, 35)).astype(dtype)
    w[3, 34], w[20, 0] = np.nan, np.inf
    y = np.empty((rows, 21), dtype)
    run(level, "linear", y, x, w, None)
    assert np.isnan(y[:, 3]).all()
    np.testing.assert_array_equal(y[:, 20], np.copysign(np.inf, x[:, 0]))
    assert np.isfinite(np.delete(y, [3, 20], axis=1)).all()


@each_level
@each_float
@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 5, 7), (32, 64, 32), (130, 100, 33), (300, 200, 100)])
@pytest.mark.parametrize("name", ["linear_relu", "linear_tanh", "linear_sigmoid", "linear_gelu"])
def test_a_layer_is_its_product_and_then_its_bias_and_activation(
    name: str, shape: tuple[int, int, int], dtype: str, level: str
) -> None:
    (n, k, m), rng = shape, np.random.default_rng(3)
    x, w, b = (rng.normal(size=s).astype(dtype) for s in ((n, k), (m, k), (m,)))
    dy, saved = rng.normal(size=(n, m)).astype(dtype), [np.empty((n, m), dtype)] if name == "linear_gelu" else []
    y, product, apart, du = (np.empty((n, m), dtype) for _ in range(4))
    dx, dw, db, dx_apart, dw_apart, db_apart = (np.empty_like(z) for z in (x, w, b, x, w, b))
    bias = name.replace("linear", "bias")
    run(level, name, y, *saved, x, w, b)
    run(level, "linear", product, x, w, None)
    run(level, bias, apart, product, b)
    assert y.tobytes() == apart.tobytes()
    assert all(s.tobytes() == product.tobytes() for s in saved)
    run(level, name + "_vjp", dx, dw, db, dy, y, *saved, x, w, b)
    run(level, bias + "_vjp", du, db_apart, dy, y, product, b)
    run(level, "linear_vjp", dx_apart, dw_apart, None, du, None, x, w, None)
    for one, other in ((dx, dx_apart), (dw, dw_apart), (db, db_apart)):
        assert one.tobytes() == other.tobytes()


# --- BLAS ---


def found_library() -> blas.Library:
    found = blas.library()
    if found is None:
        pytest.skip("needs a BLAS that NumPy brings in a library of its own, or SciPy")
    return found


@each_level
@each_float
@given(shape=sizes)
def test_a_product_by_blas_is_right_and_writes_nothing_else(
    level: str, dtype: str, shape: tuple[int, int, int]
) -> None:
    found_library()
    native.use_products("blas")
    for product in products(*shape, dtype):
        assert_right(computed(product, level), product)


@each_float
def test_the_base_level_leaves_large_products_to_blas_and_wide_vectors_leave_none(dtype: str) -> None:
    found_library()
    product = products(64, 500, 64, dtype)[0]
    by = {}
    for which in ("own", "blas"):
        native.use_products(which)
        by[which] = {level: computed(product, level).tobytes() for level in LEVELS}
    library = blas.library()
    assert library is not None
    gemms = [native._module.ffi.cast("minikd_gemm *", address) for address in (library.sgemm, library.dgemm)]
    native._module.lib.minikd_use_blas(*gemms, library.integer_bits, False)
    for level in LEVELS:
        wanted = by["blas" if level == "base" else "own"][level]
        assert computed(product, level).tobytes() == wanted


def test_a_library_says_what_it_is() -> None:
    found = found_library()
    assert found.integer_bits in (32, 64)
    assert f"{found.integer_bits}-bit integers" in str(found)
    if found.threads_function:
        assert found.threads() == int(str(found.threads()))
        assert "thread" in str(found)
    assert str(dataclasses.replace(found, threads_function=0)).endswith("-bit integers)")


def test_scipys_blas_is_found_only_once_it_was_imported_and_is_right() -> None:
    pytest.importorskip("scipy", reason="needs SciPy")
    code = (
        "from minikd.kernels import blas\n"
        "print(len(list(blas._of_scipy())))\n"
        "import scipy.linalg.cython_blas\n"
        "(found,) = blas._of_scipy()\n"
        "print(found, blas.is_right(found))\n"
    )
    assert python(code).splitlines() == ["0", "SciPy's BLAS (32-bit integers) True"]


GEMM = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)


@GEMM
def does_nothing(*arguments: int) -> None:
    """A product that was never computed."""


@GEMM
def writes_too_much(*arguments: int) -> None:
    """A product that fills whole rows."""
    for k in range(20):
        ctypes.c_float.from_address(arguments[11] + 4 * k).value = 0.0


def multiplier(real: Any) -> Any:
    """A product of Fortran's interface with 32-bit integers, in Python: columns, each so long as its ld says."""

    def columns(address: int, count: int, length: int) -> Any:
        return np.ctypeslib.as_array((real * (count * length)).from_address(address)).reshape(count, length)

    @GEMM
    def multiply(*arguments: int) -> None:
        transposed = [ctypes.c_char.from_address(address).value == b"T" for address in arguments[:2]]
        m, n, k, lda, ldb, ldc = (ctypes.c_int32.from_address(arguments[i]).value for i in (2, 3, 4, 7, 9, 12))
        a = columns(arguments[6], m if transposed[0] else k, lda)[:, : k if transposed[0] else m]
        b = columns(arguments[8], k if transposed[1] else n, ldb)[:, : n if transposed[1] else k]
        alpha, beta = (real.from_address(arguments[i]).value for i in (5, 10))
        c = columns(arguments[11], n, ldc)[:, :m]
        assert (alpha, beta) == (1, 0)
        c[...] = (b.T if transposed[1] else b) @ (a if not transposed[0] else a.T)

    return multiply


@each_level
@each_float
@pytest.mark.parametrize("shape", [(5, 6, 7), (31, 400, 9)])
def test_a_blas_whose_integers_have_32_bits_gets_what_it_expects(
    level: str, dtype: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [multiplier(real) for real in (ctypes.c_float, ctypes.c_double)]
    narrow = blas.Library("ours", 32, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in both))
    assert blas.is_right(narrow)
    monkeypatch.setattr(blas, "library", lambda: narrow)
    native.use_products("blas")
    for product in products(*shape, dtype):
        assert_right(computed(product, level), product)


@pytest.mark.parametrize("wrong", [does_nothing, writes_too_much])
@pytest.mark.parametrize("which", ["sgemm", "dgemm"])
def test_a_function_that_does_not_multiply_is_refused(wrong: Any, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = ctypes.cast(wrong, ctypes.c_void_p).value
    broken = dataclasses.replace(found_library(), **{which: address})
    assert blas.is_right(found_library())
    assert not blas.is_right(broken)
    monkeypatch.setattr(blas, "_of_numpy", lambda: iter([broken]))
    monkeypatch.setattr(blas, "_of_scipy", lambda: iter(()))
    blas.library.cache_clear()
    try:
        assert blas.library() is None
        native.use_products("best")
        with pytest.raises(BackendError, match="which must be own, because no BLAS that computes correctly is loaded"):
            native.use_products("blas")
    finally:
        blas.library.cache_clear()


def test_a_library_without_the_functions_is_passed_over() -> None:
    assert list(blas._in_library(ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.kernel32)) == []


SAID = (
    "import minikd as kd\n"
    "from minikd.kernels import native\n"
    "print(native.unavailable())\n"
    "for action in (lambda: native.binder('take'), lambda: kd.use_backend('c'), kd.kernels.current_backend):\n"
    "    try: action()\n"
    "    except kd.errors.BackendError as error: print(error)\n"
)


def test_an_unknown_way_of_multiplying_is_refused_in_words() -> None:
    said = python(SAID, MINIKD_PRODUCTS="mkl", MINIKD_BACKEND="")
    assert said.count("MINIKD_PRODUCTS must be one of own, blas, best, got 'mkl'") == 4


def test_a_blas_that_is_not_there_is_refused_in_words() -> None:
    nothing = "from minikd.kernels import blas\nblas._of_numpy = blas._of_scipy = lambda: iter(())\n"
    said = python(nothing + SAID, MINIKD_PRODUCTS="blas", MINIKD_BACKEND="")
    assert said.count("MINIKD_PRODUCTS must be own, because no BLAS that computes correctly is loaded") == 4


@pytest.mark.parametrize("which", ["own", "blas", "best", ""])
def test_the_environment_says_what_computes_products(which: str) -> None:
    if which == "blas":
        found_library()
    code = (
        "import numpy as np, minikd as kd\n"
        "kd.use_backend('c')\n"
        "x, w = np.eye(40, 30), np.arange(600.0).reshape(20, 30)\n"
        "print(np.array_equal(kd.functional.linear(x, w)[:30], w.T))\n"
    )
    assert python(code, MINIKD_PRODUCTS=which) == "True"


def test_without_the_extension_module_there_are_no_products_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_module", None)
        with pytest.raises(BackendError, match="the C backend must be built"):
            native.use_products("own")


def test_a_blas_that_numpy_brings_but_did_not_load_is_passed_over(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.libs").mkdir()
    (tmp_path / "numpy.libs" / "libopenblas.so").write_text("no library")
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert list(blas._of_numpy()) == []


def test_a_blas_that_does_not_say_which_it_is_has_a_name_all_the_same() -> None:
    assert blas._version(0) == "BLAS"
