"""C on emulated processors: the bits of float32 and of integers, what a call costs, and where a call may not write."""

from __future__ import annotations

import functools
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikd.errors import ArgumentError, BackendError, ModelFormatError, ShapeError
from minikd.export.c import to_c
from minikd.export.device import device_table, measure
from minikd.export.elf import read_elf
from minikd.export.emulator import STACK_BYTES, Device
from minikd.export.network import Layer, Network
from minikd.export.quantise import Quantised, quantise
from minikd.export.reference import predict_c_order, probabilities_c_order
from minikd.export.size import sizes
from minikd.export.targets import FLASH, TARGETS, Target, compile_object, cross_compile

EMULATED = [target for target in TARGETS if target.processor]
M0, M4, RISCV, MIPS = EMULATED
FUNCTIONS = ("sums", "each", "scaled", "called", "ten", "deep", "forever", "write_at")

SOURCE = """
#include <stddef.h>
#include <stdint.h>

int sums(const float *x, const float *w, size_t n, float *y);
int each(const float *a, const float *b, size_t n, float *y);
int scaled(const int32_t *a, int32_t m, int32_t shift, size_t n, int32_t *y);
int called(int8_t *bytes);
int ten(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j);
int deep(int n);
int forever(void);
int write_at(uintptr_t address);

static int calls = 40;
static int8_t seen;

int sums(const float *x, const float *w, size_t n, float *y)
{
    size_t k;
    float sum = 0.0f;
    for (k = 0; k < n; k++)
        sum += w[k] * x[k];
    *y = sum;
    return 0;
}

int each(const float *a, const float *b, size_t n, float *y)
{
    size_t k;
    for (k = 0; k < n; k++) {
        y[4 * k] = a[k] + b[k];
        y[4 * k + 1] = a[k] - b[k];
        y[4 * k + 2] = a[k] * b[k];
        y[4 * k + 3] = a[k] / b[k];
    }
    return (int)n;
}

int scaled(const int32_t *a, int32_t m, int32_t shift, size_t n, int32_t *y)
{
    size_t k;
    for (k = 0; k < n; k++)
        y[k] = (int32_t)((int64_t)a[k] * m / ((int64_t)1 << shift));
    return -(int)n;
}

int called(int8_t *bytes)
{
    seen = (int8_t)(seen + bytes[0]);
    bytes[1] = seen;
    return ++calls;
}

int ten(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j)
{
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j;
}

int deep(int n)
{
    volatile char room[128];
    int below;
    room[n & 127] = (char)n;
    below = n ? deep(n - 1) : 0;
    room[below & 127] = 1;
    return below + room[n & 127];
}

int forever(void)
{
    volatile int turns = 0;
    while (turns >= 0)
        turns = 1;
    return 0;
}

int write_at(uintptr_t address)
{
    *(volatile char *)address = 1;
    return 0;
}
"""


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    for name in ("ziglang", "unicorn"):
        pytest.importorskip(name, reason=f"needs {name}, of the extra minikd[device]")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "small.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="session")
def device(source: Path):
    """A fresh device of a target with SOURCE in its flash; compiled once, and rebuilt for each call of this."""
    compiled = functools.cache(lambda target: cross_compile([source], target, FUNCTIONS))
    return lambda target, **settings: Device(compiled(target), target, **settings)


@pytest.fixture(scope="session")
def kept(device):
    """One device of each target, for calls that leave nothing behind."""
    return functools.cache(device)


def bits(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers, with one NaN for all of them."""
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


TINY = np.finfo(np.float32).tiny  # below it numbers are subnormal

FLOATS = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda b: np.uint32(b).view(np.float32)),  # subnormal, huge, infinite, NaN
    st.floats(-4, 4, width=32).map(np.float32),
)


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
@settings(deadline=None, max_examples=25)
@given(pairs=st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=40))
def test_operations_on_floats_have_the_bits_of_numpy_but_for_subnormal_quotients_in_software(
    kept, target: Target, pairs
) -> None:
    a, b = np.array(pairs, np.float32).T.copy()
    y = np.zeros((len(a), 4), np.float32)
    assert kept(target).call("each", a, b, len(a), y).value == len(a)
    with np.errstate(all="ignore"):
        expected = np.stack([a + b, a - b, a * b, a / b], axis=1)
    loose = abs(expected) <= (0 if target is M4 else TINY)
    loose[:, :3] = False  # quotients alone
    assert np.array_equal(np.where(loose, 0, bits(y)), np.where(loose, 0, bits(expected)))
    assert (abs(y) <= abs(expected))[loose].all()
    assert np.array_equal(np.signbit(y)[loose], np.signbit(expected)[loose])


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_a_sum_is_added_up_in_order_and_without_contraction(kept, target: Target) -> None:
    rng, y = np.random.default_rng(0), np.zeros(1, np.float32)
    x, w = rng.normal(size=(2, 784)).astype(np.float32)
    kept(target).call("sums", x, w, len(x), y)
    assert y[0] == np.add.accumulate(w * x)[-1]


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
@settings(deadline=None, max_examples=15)
@given(a=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), m=st.integers(2**30, 2**31 - 1))
def test_products_of_64_bits_are_exact(kept, target: Target, a: list[int], m: int) -> None:
    y = np.zeros(len(a), np.int32)
    assert kept(target).call("scaled", np.array(a, np.int32), m, 31, len(a), y).value == -len(a)
    assert y.tolist() == [abs(v) * m // 2**31 * (1 if v > 0 else -1) for v in a]


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_arguments_reach_a_function_in_registers_and_on_the_stack(kept, target: Target) -> None:
    values = [3, -1, 4, 1, -5, 9, 2, -6, 5, 3]
    assert kept(target).call("ten", *values).value == sum((k + 1) * v for k, v in enumerate(values))


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_variables_have_their_first_values_and_keep_what_a_call_wrote(device, target: Target) -> None:
    one, pair = device(target), np.array([5, 0], np.int8)
    assert [one.call("called", pair).value for _ in range(3)] == [41, 42, 43]
    assert pair.tolist() == [5, 15]
    assert device(target).call("called", pair).value == 41
    assert one.program.static_bytes >= 5


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_instructions_are_those_that_ran_one_by_one(device, target: Target) -> None:
    import unicorn

    one, seen = device(target), []
    one._machine.hook_add(unicorn.UC_HOOK_CODE, lambda machine, address, size, data: seen.append(address))
    rng, y = np.random.default_rng(0), np.zeros(1, np.float32)
    x, w = rng.normal(size=(2, 20)).astype(np.float32)
    assert one.call("sums", x, w, 20, y).instructions == len(seen)


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_the_stack_is_measured_to_its_deepest(kept, target: Target) -> None:
    shallow, deep = (kept(target).call("deep", n).stack_bytes for n in (2, 12))
    assert 10 * 128 <= deep - shallow <= 10 * 192
    assert kept(target).call("deep", 2).stack_bytes == shallow


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_a_call_that_leaves_its_memory_is_refused_and_the_next_one_runs(device, target: Target) -> None:
    one, x, y = device(target), np.ones(3, np.float32), np.zeros(1, np.float32)
    refused = "at 0x.*must be code that returns and keeps to its own memory"
    with pytest.raises(BackendError, match=refused):
        one.call("sums", x, x, 4, y)  # one number past the end
    with pytest.raises(BackendError, match=refused):
        one.call("deep", STACK_BYTES // 128)
    with pytest.raises(BackendError, match=refused):
        one.call("write_at", FLASH)
    one.call("sums", x, x, 3, y)
    assert y[0] == 3


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
def test_a_call_that_never_ends_is_ended(device, target: Target) -> None:
    with pytest.raises(BackendError, match=r"got none after 1[0-9]{5} instructions"):
        device(target, at_most=100_000).call("forever")


def test_the_processor_without_floats_takes_many_more_instructions(kept) -> None:
    rng, y = np.random.default_rng(0), np.zeros(1, np.float32)
    x, w = rng.normal(size=(2, 100)).astype(np.float32)
    m0, m4 = (kept(target).call("sums", x, w, 100, y).instructions for target in (M0, M4))
    assert m0 > 20 * m4


def test_the_smaller_processor_refuses_what_only_the_larger_one_has(source: Path) -> None:
    one = Device(cross_compile([source], M4, FUNCTIONS), M0)
    x, y = np.ones(3, np.float32), np.zeros(1, np.float32)
    with pytest.raises(BackendError, match="Invalid instruction"):
        one.call("sums", x, x, 3, y)
    with pytest.raises(BackendError, match="Invalid instruction"):
        one.call("scaled", np.ones(3, np.int32), 1, 1, 3, np.zeros(3, np.int32))


def test_unknown_functions_and_processors_that_are_not_emulated_are_refused(kept, device) -> None:
    with pytest.raises(ArgumentError, match="function must be in the program, got nothing"):
        kept(M0).call("nothing")
    with pytest.raises(ArgumentError, match=r"one that is emulated \(Cortex-M0\+, .*\), got ATmega328P"):
        Device(b"", TARGETS[4])


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_an_object_needs_nothing_but_the_compilers_own_helpers(source: Path, target: Target) -> None:
    made = compile_object(source, target)
    assert all(name.startswith("__") or name in ("memcpy", "memset", "memmove") for name in made.undefined)
    assert made.big_endian == ("big-endian" in target.name)
    assert set(FUNCTIONS) <= made.symbols.keys()
    assert made.flash_bytes > 100
    assert made.static_bytes >= 3


def test_c_that_does_not_compile_is_refused_with_what_the_compiler_says(tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int f(void);\nint f(void) { int unused; return 0; }\n")
    with pytest.raises(BackendError, match=r"Cortex-M0.*unused variable 'unused'"):
        compile_object(tmp_path / "bad.c", M0)
    (tmp_path / "open.c").write_text("int g(void);\nint f(void);\nint f(void) { return g(); }\n")
    with pytest.raises(BackendError, match="undefined symbol: g"):
        cross_compile([tmp_path / "open.c"], M0, ["f"])


@pytest.mark.parametrize("name", ["ziglang", "unicorn"])
def test_without_the_extra_the_refusal_names_it(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = cross_compile([source], M0, FUNCTIONS)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf"{name} must be installed.*minikd\[device\]"):
        compile_object(source, M0) if name == "ziglang" else Device(program, M0)


def test_what_is_no_elf_file_or_is_cut_short_is_refused(source: Path) -> None:
    whole = cross_compile([source], M0, FUNCTIONS)
    wide = b"\x7fELF\x02\x01" + bytes(58)
    for data in (b"", b"no", wide, whole[:60], whole[:-1], whole[: len(whole) // 2]):
        with pytest.raises(ModelFormatError, match="an ELF file of 32 bits"):
            read_elf(data)
    lost = bytearray(whole)
    struct.pack_into("<I", lost, 32, 2**31)  # where the sections' headers are said to lie
    with pytest.raises(ModelFormatError, match="a damaged one"):
        read_elf(bytes(lost))


# --- students ---


class Student(NamedTuple):
    """A network with every activation, in float32 and int8, and raw features for it."""

    network: Network
    quantised: Quantised
    rows: np.ndarray


@pytest.fixture(scope="session")
def student() -> Student:
    rng, widths = np.random.default_rng(3), (9, 8, 7, 6, 5, 4)
    shapes = zip(widths[1:], widths, ("relu", "tanh", "gelu", "sigmoid", ""), strict=False)
    layers = [Layer(*(rng.normal(size=s).astype(np.float32) for s in ((m, k), (m,))), kind) for m, k, kind in shapes]
    scale = (rng.normal(size=9).astype(np.float32), rng.uniform(0.5, 8, 9).astype(np.float32))
    network = Network(tuple(layers), *scale, ("a", "b", "c", "d"))
    rows = (rng.normal(size=(64, 9)) * scale[1] + scale[0]).astype(np.float32)
    return Student(network, quantise(network, rows, calibration="min-max"), rows[:8])


def test_a_student_has_the_references_bits_on_every_processor_in_float32_and_in_int8(student, tmp_path: Path) -> None:
    table = device_table(tmp_path, student.network, student.quantised, student.rows)
    assert [(row["form"], row["target"]) for row in table] == [
        (form, target.name) for form in ("float32", "int8", "int8 alone") for target in TARGETS
    ]
    for row in table:
        emulated = row["target"] in {target.name for target in EMULATED}
        assert row["bits_equal"] is (True if emulated else None), row
        assert row["flash_bytes"] > 300
        assert row["static_bytes"] < 16
    of = {(row["form"], row["target"]): row for row in table}
    for column in ("flash_bytes", "stack_bytes", "instructions"):
        figures = [of[form, M0.name][column] for form in ("float32", "int8", "int8 alone")]
        assert figures == sorted(figures, reverse=True), column


@pytest.mark.parametrize("target", EMULATED, ids=lambda t: t.name)
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_no_call_takes_more_stack_than_the_header_says(target: Target, form: str, student, tmp_path: Path) -> None:
    network, rows = student.network, student.rows
    quantised = None if form == "float32" else student.quantised
    to_c(network, tmp_path, quantised=quantised)
    functions = ("student_class", "student_probabilities", "student_predict")
    one = Device(cross_compile([tmp_path / "student.c"], target, functions), target)
    scores = predict_c_order(network, rows) if quantised is None else quantised.logits(rows)
    stated, expected, found = sizes(network, quantised)["stack_bytes"], probabilities_c_order(scores), np.empty(4, "f4")
    for row, logits, wanted in zip(rows, scores, expected, strict=True):
        answers = one.call("student_class", row, 9), one.call("student_probabilities", row, 9, found, 4)
        assert answers[0].value == logits.argmax()
        assert found.tobytes() == wanted.tobytes()
        assert all(0 < answer.stack_bytes <= stated for answer in answers)
    for bad in (np.nan, np.inf, -np.inf):
        row = np.where(np.arange(9) == 4, np.float32(bad), rows[0])
        assert one.call("student_predict", row, 9, found, 4).value == -3  # STUDENT_NOT_FINITE
    assert one.call("student_predict", rows[0], 9, found, 5).value == -2  # STUDENT_LENGTH
    assert one.call("student_predict", 0, 9, found, 4).value == -1  # STUDENT_NULL


def test_other_bits_and_errors_are_told(student, tmp_path: Path) -> None:
    to_c(student.network, tmp_path)
    source, logits = [tmp_path / "student.c"], predict_c_order(student.network, student.rows)
    other = np.nextafter(logits, np.float32(np.inf))
    assert measure(source, M4, "student_predict", student.rows, logits)["bits_equal"]
    assert not measure(source, M4, "student_predict", student.rows, other)["bits_equal"]
    assert not measure(source, M4, "student_predict", student.rows[:, :5].copy(), logits)["bits_equal"]


def test_no_rows_and_rows_of_another_length_are_refused(student, tmp_path: Path) -> None:
    for rows in (student.rows[:0], student.rows[:, :4]):
        with pytest.raises(ShapeError):
            device_table(tmp_path, student.network, student.quantised, rows)


def test_what_does_not_go_into_a_processors_flash_has_no_figures(tmp_path: Path) -> None:
    layer = Layer(np.ones((10, 900), np.float32), np.zeros(10, np.float32), "")
    network = Network((layer,), np.zeros(900, np.float32), np.ones(900, np.float32), tuple("abcdefghij"))
    (row,) = device_table(tmp_path, network, None, np.ones((1, 900)), targets=[TARGETS[4]])
    assert (row["form"], row["target"]) == ("float32", "ATmega328P")
    assert row["flash_bytes"] is row["static_bytes"] is row["bits_equal"] is None


def test_the_example_of_the_page_prints_the_same_bits_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[1] / "docs" / "devices.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 * len(TARGETS)
    assert sum(line.endswith(" True") for line in printed) == 3 * len(EMULATED)
    assert not any(line.endswith(" False") for line in printed)
