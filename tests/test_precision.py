"""Products of factors with fewer digits: how they are rounded, and how exact what comes of them is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minikd.kernels.precision import MANTISSA, emulated, rounded

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


@reduced
def test_products_in_float64_keep_every_digit(precision: str) -> None:
    a, b = np.full((2, 3), 1 / 3), np.full((3, 2), 1 / 7)
    out = np.empty((2, 2))
    emulated(precision)(a, b, out)
    np.testing.assert_array_equal(out, a @ b)
