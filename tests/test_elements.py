"""csrc/elements.h alone: as plain C99 and as C++, element by element against the reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.ops import OPS
from minikd.ops.elementwise import ACTIVATIONS
from minikd.ops.losses import relative_entropy
from minikd.ops.random import dropout_threshold, random_words
from minikd.ops.rows import inverse_temperature

ROOT = Path(__file__).parents[1]
LANGUAGES = {"c99": ("gcc", "-std=c99"), "c++17": ("g++", "-std=c++17")}
DTYPES = ("float32", "float64")

SOURCE = """
#include "elements.h"

#define EACH(name, expression) \\
    EXPORT void name(real *y, const real *a, const real *b, const real *c, int64_t n) \\
    { \\
        (void)a, (void)b, (void)c; \\
        for (int64_t k = 0; k < n; k++) \\
            y[k] = (real)(expression); \\
    }

EACH(of_relu, relu(a[k]))
EACH(of_relu_slope, relu_slope(a[k]))
EACH(of_tanh, tanh_of(a[k]))
EACH(of_tanh_slope, tanh_slope(a[k]))
EACH(of_sigmoid, sigmoid(a[k]))
EACH(of_sigmoid_slope, sigmoid_slope(a[k]))
EACH(of_gelu, gelu(a[k]))
EACH(of_gelu_slope, gelu_slope(a[k]))
EACH(of_near_term, near_term(a[k], b[k], c[k]))
EACH(of_inverse_temperature, inverse_temperature(a[k]))
EACH(of_usable_temperature, usable_temperature(a[k]))
EACH(of_within_real, within_real((double)a[k] * 1e30))
EACH(of_inverse_or_0, inverse_or_0(a[k]))
EACH(of_kl_of_sums, kl_of_sums(a[k], 0.5, 0.25, b[k]))
EACH(of_nearer, nearer(a[k], b[k], c[k]))
EACH(of_decayed, decayed(a[k], b[k], (real)0.25))

EXPORT void of_adam(real *w, real *m, real *v, const real *g, int64_t n, double weight_decay, int decoupled)
{
    const adam_rates rates = adam_rates_of(0.01, 3, 0.9, 0.999, 1e-8, weight_decay, decoupled);
    for (int64_t k = 0; k < n; k++)
        adam_element(&rates, w + k, m + k, v + k, g[k]);
}

EXPORT void of_words(uint32_t *words, real *mask, int64_t counters, uint64_t seed, int64_t step, uint64_t stream,
                     double p)
{
    const dropping drop = dropping_of(p);
    for (int64_t k = 0; k < counters; k += WIDTH) {
        uint64_t index[16], both[2][16];
        wide here, ab, cd;
        for (int64_t l = 0; l < WIDTH; l++)
            index[l] = (uint64_t)(k + l);
        memcpy(&here, index, sizeof here);
        philox(here, seed, (uint32_t)step, (uint32_t)stream, &ab, &cd);
        memcpy(both[0], &ab, sizeof ab);
        memcpy(both[1], &cd, sizeof cd);
        for (int64_t l = 0; l < WIDTH && k + l < counters; l++)
            for (int half = 0; half < 2; half++)
                memcpy(words + 4 * (k + l) + 2 * half, &both[half][l], sizeof(uint64_t));
    }
    for (int64_t k = 0; k < 4 * counters; k++)
        mask[k] = mask_of(words[k], drop.least, drop.scale);
}

EXPORT void of_moves(int64_t *moves, const uint32_t *words, int64_t n, int64_t most)
{
    for (int64_t k = 0; k < n; k++)
        moves[k] = move_of(words[k], most);
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """The header's functions as a library, compiled once for each language and dtype."""
    folder = tmp_path_factory.mktemp("elements")
    built: dict[tuple[str, str], Any] = {}

    def library(language: str, dtype: str) -> Any:
        compiler, standard = LANGUAGES[language]
        if shutil.which(compiler) is None or not (ROOT / "csrc").exists():
            pytest.skip(f"needs {compiler} and the source in csrc")
        if (language, dtype) not in built:
            export = 'extern "C"' if language == "c++17" else "extern"
            name = folder / f"elements_{len(built)}"
            suffix = ".cpp" if language == "c++17" else ".c"
            name.with_suffix(suffix).write_text(SOURCE.replace("EXPORT", export), "utf-8")
            options = [standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-ffp-contract=off", "-fPIC"]
            options += ["-shared", f"-I{ROOT / 'csrc'}"] + (["-DMINIKD_DOUBLE"] if dtype == "float64" else [])
            output = name.with_suffix(".so")
            subprocess.run([compiler, *options, str(name.with_suffix(suffix)), "-o", str(output), "-lm"], check=True)
            built[language, dtype] = ctypes.CDLL(str(output))
        return built[language, dtype]

    return library


@pytest.fixture(params=sorted(LANGUAGES))
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def library(build: Callable[[str, str], Any], language: str, dtype: str) -> Any:
    return build(language, dtype)


def pointer(x: Any) -> Any:
    return ctypes.c_void_p(x.ctypes.data)


def each(library: Any, name: str, *arrays: Any) -> Any:
    """A function of the header, element by element."""
    y = np.empty_like(arrays[0])
    getattr(library, name)(*map(pointer, (y, *arrays, *([y] * (3 - len(arrays))))), ctypes.c_int64(y.size))
    return y


def close(actual: Any, wanted: Any, few: float = 8) -> None:
    eps = float(np.finfo(actual.dtype).eps)
    tiny = 4 * float(np.finfo(actual.dtype).smallest_subnormal)
    np.testing.assert_allclose(actual, wanted, rtol=few * eps, atol=tiny)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_and_its_slope_are_those_of_the_table(library: Any, dtype: str, name: str) -> None:
    special = [0.0, -0.0, 1e-30, -1e-30, 40, -40, 90, -90, 1e4, -1e4, np.nan]
    u = np.concatenate([np.linspace(-14, 14, 2001), special]).astype(dtype)
    wide, y = u.astype(np.float64), np.empty(u.shape)
    activation = ACTIVATIONS[name]
    with np.errstate(all="ignore"):
        activation.forward(np, y, wide)
        got = each(library, "of_" + name, u)
        given = got if activation.reads == "y" else u
        slope = activation.derivative(np, given.astype(np.float64), given.astype(np.float64))
    close(got, y)
    got_slope = each(library, f"of_{name}_slope", given)
    few = 8 * float(np.finfo(dtype).eps)  # of 1: what 1 - y² and Φ(u) + u·φ(u) are made of
    np.testing.assert_allclose(got_slope, slope, rtol=few, atol=few)


def test_a_term_of_the_relative_entropy_does_not_cancel(library: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    q = np.concatenate([rng.uniform(0, 1, 400), np.zeros(5)]).astype(dtype)
    delta = np.concatenate([rng.normal(size=200) * 10.0 ** rng.uniform(-6, 0.3, 200), np.linspace(-3, 1, 205)])
    delta = delta.astype(dtype)
    p = np.where(q == 0, rng.uniform(0, 1, q.size), q * np.exp(delta.astype(np.float64))).astype(dtype)
    term = each(library, "of_near_term", p, q, delta)
    wide = [x.astype(np.float64)[:, None] for x in (p, q, delta)]
    exact, _ = relative_entropy(np, wide[1] * np.exp(wide[2]) * (wide[1] != 0) + wide[0] * (wide[1] == 0), *wide[1:])
    assert np.all(term >= 0)
    np.testing.assert_allclose(term, exact, rtol=32 * float(np.finfo(dtype).eps) / 0.1, atol=0)


def test_temperatures_are_taken_as_the_table_takes_them(library: Any, dtype: str) -> None:
    t = np.array([1e-30, 0.5, 1, 3, 1e30], dtype)
    wanted = [min(inverse_temperature("x", x, dtype), float(np.finfo(dtype).max) / 2) for x in t]
    close(each(library, "of_inverse_temperature", t), np.array(wanted))
    bad = np.array([0, -1, np.nan, np.inf, 1, 1e-30], dtype)
    assert each(library, "of_usable_temperature", bad).tolist() == [0, 0, 0, 0, 1, 1]
    assert each(library, "of_inverse_or_0", np.array([0, 4, -0.5], dtype)).tolist() == [0, 0.25, -2]
    held = each(library, "of_within_real", np.array([1e30, -1e30, 0], dtype))
    limit = np.finfo(dtype).max if dtype == "float32" else np.float64(np.float64(1e30) * 1e30)
    np.testing.assert_allclose(held, np.array([limit, -limit, 0], dtype), rtol=1e-6)


def test_kl_is_the_nearer_of_a_difference_and_a_sum(library: Any, dtype: str) -> None:
    difference = np.array([3.0, 1e-9, 1e-9, -1e-9, 1e-3, np.nan], dtype)
    terms = np.array([9.0, 2e-9, 2e-9, -1e-30, 9.0, 1.0], dtype)
    shift = np.array([0, 0, 1e9, 0, 0, 0], dtype)
    wanted = np.array([3.0, 2e-9, 1e-9, 0, 1e-3, np.nan], dtype)
    np.testing.assert_array_equal(each(library, "of_nearer", difference, terms, shift), wanted)
    apart = np.array([8, np.nan], dtype)
    assert each(library, "of_kl_of_sums", apart, np.array([0.5, 0.5], dtype)).tolist() == [0.5, np.inf]


@pytest.mark.parametrize(("decay", "decoupled"), [(0.0, 0), (0.01, 0), (0.01, 1)])
def test_a_step_of_adam_is_that_of_the_table(library: Any, dtype: str, decay: float, decoupled: int) -> None:
    rng = np.random.default_rng(4)
    w, m, v, g = (np.abs(rng.normal(size=33)).astype(dtype) for _ in range(4))
    wide = [x.astype(np.float64) for x in (w, m, v, g)]
    attrs = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": decay, "decoupled": bool(decoupled)}
    OPS["adam_step"].forward(np, *wide, np.array(0.01), np.array(3), **attrs)
    library.of_adam(*map(pointer, (w, m, v, g)), ctypes.c_int64(33), ctypes.c_double(decay), ctypes.c_int(decoupled))
    for actual, wanted in zip((w, m, v), wide, strict=False):
        np.testing.assert_allclose(actual, wanted, rtol=32 * float(np.finfo(dtype).eps), atol=1e-7)


def test_random_words_masks_and_moves_are_those_of_the_table(library: Any, dtype: str) -> None:
    counters, seed, stream, step, p = 37, 2**40 + 5, 3, 2**33 + 9, 0.3
    words, mask = np.empty(4 * counters, np.uint32), np.empty(4 * counters, dtype)
    numbers = ctypes.c_int64(counters), ctypes.c_uint64(seed), ctypes.c_int64(step), ctypes.c_uint64(stream)
    library.of_words(pointer(words), pointer(mask), *numbers, ctypes.c_double(p))
    wanted = random_words(np, words.size, seed, stream, step)
    np.testing.assert_array_equal(words, wanted)
    kept = wanted >= dropout_threshold(p)
    np.testing.assert_array_equal(mask, np.where(kept, np.dtype(dtype).type(1 / (1 - p)), 0))
    moves = np.empty(words.size, np.int64)
    library.of_moves(pointer(moves), pointer(words), ctypes.c_int64(words.size), ctypes.c_int64(2))
    np.testing.assert_array_equal(moves, (wanted.astype(np.int64) * 5 >> 32) - 2)
    assert set(moves) == {-2, -1, 0, 1, 2}
