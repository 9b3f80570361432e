"""A network as C: the same bits as the NumPy reference in every build, and code that no class name can change."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minikd as kd
from minikd.data import Normalisation
from minikd.errors import ArgumentError, BackendError, OutputError, ShapeError
from minikd.export import c, reference, verify
from minikd.export.network import Layer, Network
from minikd.export.quantise import Affine, Quantised, quantise
from minikd.export.size import sizes

F32 = np.float32
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")
WARNINGS = [
    *("-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wconversion", "-Wsign-conversion", "-Wshadow"),
    *("-Wdouble-promotion", "-Wfloat-conversion", "-Wvla"),
]
C_WARNINGS = [*WARNINGS, "-Wstrict-prototypes", "-Wmissing-prototypes"]
C99 = ["-std=c99", *C_WARNINGS, "-ffp-contract=off"]
UNTIMED = "-DROUNDS=0"
LEVELS = ("-O0", "-O2", "-Os", "-O3")
FORMS = ("float32", "int8")

if shutil.which("gcc") is None:
    pytest.skip("needs gcc", allow_module_level=True)
need_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def network(
    widths: Sequence[int], activations: Sequence[str] = ("relu",), *, seed: int = 0, scale: str = "columns"
) -> Network:
    """Random weights; the activations take turns. The features have a scale for each, one for all, or none."""
    rng = np.random.default_rng(seed)
    kinds = [*itertools.islice(itertools.cycle(activations), len(widths) - 2), ""]
    layers = tuple(
        Layer(rng.normal(0, k**-0.5, (m, k)).astype(F32), rng.normal(size=m).astype(F32), kind)
        for (k, m), kind in zip(itertools.pairwise(widths), kinds, strict=True)
    )
    n = widths[0] if scale == "columns" else 1
    mean, deviation = rng.normal(size=n), rng.uniform(0.5, 2, n)
    if scale == "none":
        mean, deviation = np.zeros(1), np.ones(1)
    full = (np.broadcast_to(a, widths[0]).astype(F32) for a in (mean, deviation))
    return Network(layers, *full, tuple(f"class {k}" for k in range(widths[-1])))


MIXED = network((11, 9, 17, 8, 5, 4), ACTIVATIONS)
ROWS = np.random.default_rng(1).normal(0, 3, (64, 11)).astype(F32)
QUANTISED = quantise(MIXED, ROWS)


def logits_of(form: str) -> np.ndarray:
    """What the reference makes of the rows."""
    return reference.predict_c_order(MIXED, ROWS) if form == "float32" else QUANTISED.logits(ROWS)


@pytest.fixture(scope="module", params=FORMS)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The form, and a folder with the network of all activations in it."""
    folder = tmp_path_factory.mktemp(request.param)
    c.to_c(MIXED, folder, quantised=QUANTISED if request.param == "int8" else None)
    return request.param, folder


def gcc(*arguments: str | Path, command: str = "gcc") -> str:
    done = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Compiled:
    """The exported functions in this process."""

    def __init__(self, model: Network | Quantised, folder: Path, *flags: str) -> None:
        self.model = model
        library = folder / "student.so"
        gcc(*C99, *(flags or ("-O1",)), "-shared", "-fPIC", folder / "student.c", "-o", library)
        self.library = ctypes.CDLL(str(library))
        self.library.student_class_name.restype = ctypes.c_char_p

    def call(self, function: str, x: np.ndarray, count: int, kind: type = F32) -> tuple[int, np.ndarray]:
        out = np.zeros(count, kind)
        status = getattr(self.library, function)(
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_size_t(x.size),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_size_t(count),
        )
        return status, out

    def rows(self, function: str, x: np.ndarray, kind: type = F32) -> tuple[list[int], np.ndarray]:
        found = [self.call(function, row, self.model.sizes[-1], kind) for row in np.ascontiguousarray(x)]
        return [status for status, _ in found], np.array([out for _, out in found])

    def class_of(self, row: np.ndarray) -> int:
        return self.library.student_class(ctypes.c_void_p(row.ctypes.data), ctypes.c_size_t(row.size))


def export(model: Network, folder: Path, quantised: Quantised | None = None, *flags: str) -> Compiled:
    c.to_c(model, folder, quantised=quantised)
    return Compiled(model, folder, *flags)


# --- the matrix of builds ---


@pytest.mark.parametrize("level", LEVELS)
def test_every_build_compiles_without_a_warning_and_gives_the_bits_of_the_reference(mixed, level: str) -> None:
    form, folder = mixed
    found = verify.run_c(folder, ROWS, 4, command=["gcc"], flags=[*C99, level, UNTIMED])
    assert found.equal(logits_of(form))


@need_gpp
@pytest.mark.parametrize("standard", ["c++98", "c++17"])
def test_it_is_cpp_too(mixed, standard: str) -> None:
    form, folder = mixed
    flags = [f"-std={standard}", *WARNINGS, "-ffp-contract=off", "-O2"]
    assert verify.run_c(folder, ROWS, 4, command=["g++"], flags=[*flags, UNTIMED]).equal(logits_of(form))
    gcc(*flags, "-c", folder / "main.c", "-o", folder / "main.o", command="g++")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
def test_clang_agrees(mixed, level: str) -> None:
    form, folder = mixed
    command = [sys.executable, "-m", "ziglang", "cc"]
    assert verify.run_c(folder, ROWS, 4, command=command, flags=[*C99, level, UNTIMED]).equal(logits_of(form))


def test_no_sanitizer_finds_anything_even_for_extreme_features(mixed) -> None:
    form, folder = mixed
    checks = [
        "-O1",
        "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
        "-fno-sanitize-recover=all",
    ]
    extreme = np.concatenate([ROWS, F32([[v] * 11 for v in (1e38, -1e38, 1e-45, -0.0, 60, -60, 3.3e8)])])
    truth = reference.predict_c_order(MIXED, extreme) if form == "float32" else QUANTISED.logits(extreme)
    assert np.isfinite(truth).all()
    assert verify.run_c(folder, extreme, 4, command=["gcc"], flags=[*C99, *checks, UNTIMED]).equal(truth)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_outside_is_called(mixed, level: str) -> None:
    gcc("-std=c99", level, "-ffreestanding", "-c", mixed[1] / "student.c", "-o", mixed[1] / "part.o")
    symbols = gcc("-u", mixed[1] / "part.o", command="nm").split()
    assert set(symbols) - {"U"} <= {"memcpy", "memset", "memmove", "memcmp"}


def test_fused_multiply_adds_stay_within_the_stated_bound(tmp_path: Path) -> None:
    flags = ["-std=c99", "-O2", "-mfma", "-ffp-contract=fast", UNTIMED]
    model = network((30, 20, 12, 5), ACTIVATIONS, scale="none")
    c.to_c(model, tmp_path)
    x = np.random.default_rng(2).uniform(-10, 10, (200, 30)).astype(F32)
    try:
        found = verify.run_c(tmp_path, x, 5, command=["gcc"], flags=flags)
    except BackendError as error:
        pytest.skip(f"needs a compiler and a processor with fused multiply-adds: {error}")
    largest = abs(found.logits.astype(float) - reference.predict_c_order(model, x)).max()
    assert 0 < largest < c.contraction_bound(model) < 0.1
    assert f"differ from it by {c._rounded_up(c.contraction_bound(model)):.1e}" in flat(tmp_path / "student.h")


def flat(path: Path) -> str:
    """A header's text with its comments' lines joined."""
    return " ".join(path.read_text().replace("\n * ", " ").split())


def test_fast_math_is_refused_in_words(mixed) -> None:
    command = ["gcc", "-std=c99", "-ffast-math", "-fsyntax-only", str(mixed[1] / "student.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "compile this without -ffast-math" in done.stderr


# --- networks of all sizes ---


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 19), min_size=2, max_size=4),
    st.permutations(ACTIVATIONS),
    st.sampled_from(["columns", "image", "none"]),
    st.integers(0, 99),
)
def test_networks_of_any_size_give_the_reference_bits(tmp_path_factory, widths, activations, scale, seed) -> None:
    model = network(widths, activations, seed=seed, scale=scale)
    x = np.random.default_rng(seed).normal(0, 4, (7, widths[0])).astype(F32)
    compiled = export(model, tmp_path_factory.mktemp("c"))
    statuses, logits = compiled.rows("student_predict", x)
    expected = reference.predict_c_order(model, x)
    assert statuses == [0] * 7
    assert logits.tobytes() == expected.tobytes()
    assert compiled.rows("student_probabilities", x)[1].tobytes() == reference.probabilities_c_order(expected).tobytes()
    assert [compiled.class_of(row) for row in x] == expected.argmax(axis=1).tolist()


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=4),
    st.permutations(ACTIVATIONS),
    st.sampled_from(["columns", "image", "none"]),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e15]),
    st.integers(0, 99),
)
def test_int8_networks_of_any_size_give_the_reference_integers(
    tmp_path_factory, widths, activations, scale, spread, seed
) -> None:
    rng = np.random.default_rng(seed)
    model = network(widths, activations, seed=seed, scale=scale)
    first = model.layers[0]
    model = Network(
        (first._replace(weight=first.weight * F32(spread)), *model.layers[1:]),
        *(model.mean, model.deviation, model.class_names),
    )
    quantised = quantise(model, rng.normal(0, 2, (40, widths[0])))
    compiled = export(model, tmp_path_factory.mktemp("c"), quantised)
    q = rng.integers(-128, 128, (9, widths[0])).astype(np.int8)
    assert np.array_equal(compiled.rows("student_predict_q", q, np.int8)[1], quantised.integers(q))
    x = rng.normal(0, 4, (9, widths[0])).astype(F32)
    assert np.array_equal(
        [compiled.call("student_quantise", row, widths[0], np.int8)[1] for row in x], quantised.quantise_input(x)
    )
    assert compiled.rows("student_predict", x)[1].tobytes() == quantised.logits(x).tobytes()
    assert [compiled.class_of(row) for row in x] == quantised.predict(x).tolist()


def test_a_feature_halfway_between_two_integers_goes_to_the_even_one(tmp_path: Path) -> None:
    model = network((300, 2), scale="none")
    quantised = quantise(model, np.array([[-1.0, 1.0] * 150]))
    layers = (quantised.layers[0].__class__(**{**vars(quantised.layers[0]), "input": Affine(0.5, 3)}),)
    quantised = Quantised(layers, model.mean, model.deviation, model.class_names)
    x = (np.arange(-600, 600, dtype=F32) / 8).reshape(4, 300)
    compiled = export(model, tmp_path, quantised)
    for row in x:
        assert np.array_equal(compiled.call("student_quantise", row, 300, np.int8)[1], Affine(0.5, 3).quantise(row))


EXTREMES = F32([3.4028235e38, -3.4028235e38, 1.4e-45, -1e-45, 1.1754944e-38, -0.0, 0.1, 16777217, 1e10, 123456790])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_printed_number_comes_back_with_the_same_bits(value: float) -> None:
    text = c.literal(value)
    assert text.endswith("f")
    assert F32(text[:-1]).tobytes() == F32(value).tobytes()


def test_the_compiler_reads_extreme_weights_as_the_same_bits(tmp_path: Path) -> None:
    n = len(EXTREMES)
    layer = Layer(np.full((n, n), -0.0, F32), EXTREMES, "")  # a product of -0 changes no bias
    model = Network((layer,), np.zeros(n, F32), np.ones(n, F32), tuple("abcdefghij"))
    compiled = export(model, tmp_path)
    assert compiled.call("student_predict", np.zeros(n, F32), n)[1].tobytes() == EXTREMES.tobytes()


def test_what_overflows_is_an_error_and_no_class(tmp_path: Path) -> None:
    layers = (
        Layer(np.ones((4, 3), F32), np.zeros(4, F32), "relu"),
        Layer(np.full((2, 4), 3e38, F32), np.ones(2, F32), ""),
    )
    huge = Network(layers, np.zeros(3, F32), np.ones(3, F32), ("a", "b"))
    compiled = export(huge, tmp_path)
    row = np.full(3, 1e30, F32)
    assert not np.isfinite(reference.predict_c_order(huge, row[None])).all()
    assert compiled.call("student_predict", row, 2)[0] == compiled.class_of(row) == -3


@pytest.mark.parametrize("table", ["bias", "weight", "mean", "deviation"])
def test_a_network_that_is_not_finite_is_not_written(tmp_path: Path, table: str) -> None:
    model = network((3, 2))
    values = getattr(model.layers[0] if table in ("bias", "weight") else model, table)
    values.flat[1] = np.inf
    with pytest.raises(ArgumentError, match="finite numbers"):
        c.to_c(model, tmp_path)
    assert not [*tmp_path.iterdir()]


# --- what callers may do wrong ---


def test_pointers_and_lengths_are_checked(mixed) -> None:
    form, folder = mixed
    compiled = Compiled(MIXED, folder)
    x, z = ROWS[0].copy(), np.zeros(11, F32)
    here, there, none = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(z.ctypes.data), None
    n, m, wrong = ctypes.c_size_t(11), ctypes.c_size_t(4), ctypes.c_size_t(5)
    functions = [("predict", n, m), ("probabilities", n, m), ("softmax", m, m)]
    if form == "int8":
        functions += [("predict_q", n, m), ("quantise", n, n)]
    for name, first, second in functions:
        function = getattr(compiled.library, f"student_{name}")
        assert function(here, first, there, second) == 0
        assert function(none, first, there, second) == function(here, first, none, second) == -1
        assert function(here, wrong, there, second) == function(here, first, there, wrong) == -2
    for name in ["class", "class_q"] if form == "int8" else ["class"]:
        function = getattr(compiled.library, f"student_{name}")
        assert (function(none, n), function(here, wrong)) == (-1, -2)
        assert 0 <= function(here, n) < 4
    assert compiled.library.student_class_name(3) == b"class 3"
    assert compiled.library.student_class_name(4) is compiled.library.student_class_name(-1) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(mixed, value: float) -> None:
    compiled = Compiled(MIXED, mixed[1])
    x = ROWS[0].copy()
    x[7] = value
    assert compiled.call("student_predict", x, 4)[0] == compiled.call("student_probabilities", x, 4)[0] == -3
    assert compiled.class_of(x) == -3


def test_probabilities_may_take_the_place_of_the_logits_and_hold_for_the_widest_spread(mixed) -> None:
    compiled = Compiled(MIXED, mixed[1])
    z = F32([3e38, -3e38, 1e38, 0])
    pointer, four = ctypes.c_void_p(z.ctypes.data), ctypes.c_size_t(4)
    assert compiled.library.student_softmax(pointer, four, pointer, four) == 0
    assert z.tolist() == [1, 0, 0, 0]
    assert compiled.call("student_softmax", F32([0, np.nan, 0, 0]), 4)[0] == -3


# --- names from outside ---

HOSTILE = (
    "*/ int evil; /*",
    '"; int evil; char *x = "',
    "back\\slash \\",
    "??/ ??( trigraphs ??'",
    "two\nlines\r\t",
    "naïve ✓ 猫",
    "\ud800",
    "%s%n",
    "",
    "\x7f1",
)


@pytest.mark.parametrize("form", FORMS)
def test_class_names_stay_names(tmp_path: Path, form: str) -> None:
    model = network((3, len(HOSTILE)), scale="none")
    model = Network(model.layers, model.mean, model.deviation, HOSTILE)
    quantised = quantise(model, ROWS[:, :3]) if form == "int8" else None
    compiled = export(model, tmp_path, quantised, "-O1", "-trigraphs")
    names = [compiled.library.student_class_name(k) for k in range(len(HOSTILE))]
    assert names == [name.encode("utf-8", "replace") for name in HOSTILE]
    assert not hasattr(compiled.library, "evil")
    assert "evil" not in re.sub(r'"[^"\n]*"', "", (tmp_path / "student.c").read_text())
    assert all(path.read_bytes().isascii() for path in tmp_path.glob("*.[chit]*"))


def test_a_class_name_of_more_than_1000_bytes_is_refused(tmp_path: Path) -> None:
    model = network((3, 2), scale="none")
    with pytest.raises(ArgumentError, match="at most 1000 bytes long, got one of 1200 bytes"):
        c.to_c(Network(model.layers, model.mean, model.deviation, ("a", "é" * 600)), tmp_path)


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a b", "../up", "main", "Main", "_x", "x" * 32, "naïve", "a\n"])
def test_a_name_that_c_does_not_allow_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="export: name must be a letter"):
        c.to_c(network((3, 2)), tmp_path, name=name)


def test_two_networks_of_different_names_live_in_one_program(tmp_path: Path) -> None:
    for name in ("left", "Right_2"):
        files = c.to_c(network((3, 4, 2)), tmp_path / name, name=name)
        assert [file.name for file in files] == [f"{name}.h", f"{name}.c", "main.c", f"{name}.ino", "CMakeLists.txt"]
        gcc(*C99, "-c", files[1], "-o", tmp_path / f"{name}.o")
    (tmp_path / "both.c").write_text(
        '#include "left/left.h"\n#include "Right_2/Right_2.h"\n'
        "int main(void)\n{\n    float x[LEFT_FEATURES] = {0};\n"
        "    return left_class(x, 3) - Right_2_class(x, RIGHT_2_FEATURES);\n}\n"
    )
    gcc(*C99, tmp_path / "both.c", tmp_path / "left.o", tmp_path / "Right_2.o", "-o", tmp_path / "both")
    assert subprocess.run([tmp_path / "both"], check=False).returncode == 0


def test_the_same_network_gives_the_same_bytes_and_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    first, second = (c.to_c(MIXED, tmp_path / name) for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a folder"):
        c.to_c(MIXED, tmp_path / "file")


# --- sizes ---


def test_the_header_says_the_sizes_that_are_told_beforehand_and_they_hold(mixed) -> None:
    form, folder = mixed
    told = sizes(MIXED, QUANTISED if form == "int8" else None)
    header = (folder / "student.h").read_text()
    for figure in ("constant_bytes", "code_bytes", "ram_bytes", "stack_bytes", "multiply_adds"):
        assert f"#define STUDENT_{figure.upper()} {told[figure]}\n" in header
    assert told["flash_bytes"] == told["constant_bytes"] + told["code_bytes"]
    assert told["multiply_adds"] == 11 * 9 + 9 * 17 + 17 * 8 + 8 * 5 + 5 * 4
    part = folder / "sized.o"
    for level in LEVELS:
        gcc(
            "-std=c99",
            level,
            "-fno-asynchronous-unwind-tables",
            "-fstack-usage",
            "-c",
            folder / "student.c",
            "-o",
            part,
        )
        lines = (line.split("\t") for line in part.with_suffix(".su").read_text().splitlines())
        frames = {place.split(":")[-1]: int(size) for place, size, kind in lines if kind == "static"}
        deepest = {
            "float32": ("student_class", "student_predict", "product", "sixteen_sums"),
            "int8": ("student_class", "student_class_q", "student_predict_q", "run", "rescaled"),
        }[form]
        assert sum(frames.get(name, 0) for name in deepest) <= told["stack_bytes"]
        if level == "-Os":
            text, data, zeros = map(int, gcc(part, command="size").splitlines()[1].split()[:3])
            wider = 4 * 4 + 5 * 48  # pointers of 64 bits
            assert told["constant_bytes"] < text + data <= told["flash_bytes"] + wider
            assert zeros == 0


def test_int8_takes_about_a_quarter_of_the_flash() -> None:
    model = network((784, 30, 30, 10))
    whole, small = sizes(model), sizes(model, quantise(model, np.random.default_rng(0).normal(size=(50, 784))))
    assert whole["parameters"] == small["parameters"] == 784 * 30 + 30 + 30 * 30 + 30 + 300 + 10
    assert small["constant_bytes"] - 8 * 784 < 0.28 * (whole["constant_bytes"] - 8 * 784)


def test_a_scale_that_all_features_share_takes_no_flash() -> None:
    columns, image, none = (sizes(network((50, 4, 2), scale=scale)) for scale in ("columns", "image", "none"))
    assert columns["constant_bytes"] - 400 == image["constant_bytes"] == none["constant_bytes"]
    assert image["stack_bytes"] - none["stack_bytes"] == 4 * 50


# --- the formulas ---


def ulps(found: np.ndarray, truth: np.ndarray) -> float:
    return float((abs(found.astype(np.float64) - truth) / np.spacing(abs(truth).astype(F32)).astype(np.float64)).max())


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x])


@pytest.mark.parametrize(
    ("name", "low", "high", "truth"),
    [
        ("exp", -86.9, 0, np.exp),
        ("tanh", -12, 12, np.tanh),
        ("sigmoid", -80, 80, lambda u: 1 / (1 + np.exp(-u))),
        ("gelu", -12.9, 12, lambda u: u * normal_cdf(u)),
    ],
)
def test_the_short_formulas_are_as_exact_as_the_header_says(name: str, low: float, high: float, truth) -> None:
    rng = np.random.default_rng(0)
    small = np.exp(rng.uniform(-20, 1, 20_000)) * np.where(rng.random(20_000) < 0.5, -1, 1)
    x = np.concatenate([rng.uniform(low, high, 40_000), rng.uniform(-1, 1, 20_000), small]).astype(F32)
    x = x[(x >= low) & (x <= high)]
    assert ulps(getattr(reference, name)(x), truth(x.astype(np.float64))) <= float(c.ERRORS[name])
    assert f"{name} {c.ERRORS[name]}" in reference.__doc__.replace("GELU", "gelu")


def test_the_formulas_end_where_their_functions_do() -> None:
    ends = F32([-np.inf, -3e38, -100, 0, 100, 3e38, np.inf])
    with np.errstate(over="ignore", invalid="ignore"):
        assert reference.exp(ends[:4]).tolist() == [0, 0, 0, 1]
        assert reference.tanh(ends).tolist() == [-1, -1, -1, 0, 1, 1, 1]
        assert reference.sigmoid(ends).tolist() == [0, 0, 0, 0.5, 1, 1, 1]
        assert reference.gelu(ends[1:6]).tolist() == [0, 0, 0, 100, F32(3e38)]
        assert all(np.isnan(f(F32([np.nan]))).all() for f in reference.ACTIVATIONS.values())


def test_the_reference_is_the_model_but_for_rounding() -> None:
    model = kd.nn.MLP([9, 20, 5], "gelu", seed=3)
    model.normalisation = Normalisation(np.arange(9, dtype=F32), np.full(9, 2, F32))
    x = np.random.default_rng(0).normal(4, 3, (40, 9)).astype(F32)
    logits = reference.predict_c_order(Network.of(model), x)
    assert abs(logits - model.logits(x)).max() < 1e-5
    assert abs(reference.probabilities_c_order(logits) - model.predict_proba(x)).max() < 1e-6
    with pytest.raises(ShapeError, match="rows of 9 features"):
        reference.predict_c_order(Network.of(model), x[:, :8])


# --- what comes along ---


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled example program."""
    folder = tmp_path_factory.mktemp("example")
    c.to_c(MIXED, folder)
    gcc(*C99, "-O1", folder / "main.c", folder / "student.c", "-o", folder / "student")
    return folder / "student"


def test_the_example_reads_rows_of_csv(example: Path) -> None:
    text = "\n".join(",".join(f"{v:.9g}" for v in row) for row in ROWS[:3])
    done = subprocess.run([example], input=text, capture_output=True, text=True, check=True)
    logits = reference.predict_c_order(MIXED, ROWS[:3])
    for line, row, p in zip(done.stdout.splitlines(), logits, reference.probabilities_c_order(logits), strict=True):
        assert line == ",".join([str(row.argmax()), f"class {row.argmax()}", *(f"{v:.6f}" for v in p)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3\n", "row 1: expected 11 numbers"),
        ("1,2,x,4,5,6,7,8,9,10,11\n", "row 1: expected 11 numbers"),
        ("1,2,3,4,5,6,7,8,9,10,11\n1,2,nan,4,5,6,7,8,9,10,11\n", "row 2: error -3"),
    ],
)
def test_the_example_says_what_is_wrong_with_a_row(example: Path, text: str, said: str) -> None:
    done = subprocess.run([example], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr


ARDUINO = """
struct Port {
    void begin(long);
    int available();
    float parseFloat();
    void print(const char *);
    void println(int);
    void println(const char *);
};
extern Port Serial;
"""


@need_gpp
def test_the_sketch_compiles_against_what_it_asks_of_arduino(mixed) -> None:
    _, folder = mixed
    (folder / "Arduino.h").write_text(ARDUINO)
    flags = [
        "-std=c++11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DARDUINO=1",
        f"-I{folder}",
        "-include",
        "Arduino.h",
        "-x",
        "c++",
    ]
    gcc(*flags, "-fsyntax-only", folder / "student.ino", command="g++")
    gcc("-std=c99", "-DARDUINO=1", "-Werror", "-fsyntax-only", folder / "main.c")


def test_cmake_builds_it(mixed) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    gcc("-S", mixed[1], "-B", mixed[1] / "build", command="cmake")
    gcc("--build", mixed[1] / "build", command="cmake")
    assert (mixed[1] / "build" / "student_example").exists()


# --- the proof for users ---


@pytest.fixture
def model() -> kd.nn.MLP:
    model = kd.nn.MLP([6, 8, 3], "relu", seed=2)
    model.normalisation = Normalisation(np.zeros(6, F32), np.full(6, 2, F32))
    return model


def test_verify_says_that_the_c_is_the_model(model: kd.nn.MLP, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(F32)
    y = model.predict(x)
    c.to_c(Network.of(model), tmp_path, name="net")
    found = verify.verify(tmp_path, model, x, y, name="net")
    assert (found.rows, found.same_bits, found.agreement, found.accuracy, found.accuracy_lost) == (50, True, 1, 1, 0)
    assert found.largest_error < 1e-5
    assert 500 < found.object_bytes < 20_000
    assert 1 < found.nanoseconds < 1e6
    assert "the same bits as the NumPy reference" in str(found)
    assert "accuracy 100.00 %; lost +0.00 points" in str(found)


def test_verify_notices_c_of_another_model(model: kd.nn.MLP, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(F32)
    quantised = quantise(Network.of(model), x)
    c.to_c(Network.of(model), tmp_path, quantised=quantised)
    assert verify.verify(tmp_path, model, x, quantised=quantised, flags=["-O1", UNTIMED]).same_bits
    found = verify.verify(tmp_path, model, x, flags=["-O1", UNTIMED])
    assert not found.same_bits
    assert "NOT the bits" in str(found)
    assert found.accuracy is None


def test_verify_says_what_it_lacks(model: kd.nn.MLP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c.to_c(Network.of(model), tmp_path)
    with pytest.raises(ShapeError, match="one row or more of 6 features"):
        verify.verify(tmp_path, model, np.zeros((0, 6)))
    with pytest.raises(BackendError, match="able to run the exported C"):
        verify.verify(tmp_path, model, np.full((1, 6), np.nan), flags=["-O1", UNTIMED])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="a C compiler must be installed"):
        verify.verify(tmp_path, model, np.zeros((1, 6)))
