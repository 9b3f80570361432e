"""libminikd, the library for C programs: what it exports and installs, and that it predicts as Python does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cffi import FFI

import minikd as kd
from minikd.data import Normalisation
from minikd.errors import ModelFormatError
from minikd.kernels import current_backend, native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
HEADER = CSRC / "include" / "minikd.h"

ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")
ODD_NAMES = ("", 'do"g', "naïve ✓", "a\\b/\n\t", "😀", "nul\0within", "\x7f")


def need(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing or not CSRC.exists():
        pytest.skip(f"needs the source in csrc, and {', '.join(missing or programs)}")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(folder: Path, *arguments: str) -> None:
    run("make", "-s", "-j2", "-C", folder, *arguments)


def make_everything(folder: Path) -> None:
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("build"))
    make(folder / "csrc")


@pytest.fixture(scope="module")
def built(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A copy of csrc in which everything was made."""
    need("make", "cc")
    return made_once("library", make_everything) / "csrc"


def declarations() -> str:
    """The public header without what is the preprocessor's and C++'s."""
    text = re.sub(r'#ifdef __cplusplus\n(extern "C" \{|\})\n#endif\n', "", HEADER.read_text("utf-8"))
    return "\n".join(line for line in text.replace("MINIKD_PUBLIC", "").splitlines() if not line.startswith("#"))


class Library:
    """The shared library, by its public functions alone."""

    def __init__(self, path: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef(declarations())
        self.lib = self.ffi.dlopen(str(path))

    def load(self, data: bytes) -> tuple[int, str, Any]:
        """The error, the message, and the model, which frees itself."""
        place, message = self.ffi.new("minikd_model **"), self.ffi.new("char[300]")
        error = self.lib.minikd_load_memory(data, len(data), place, message, 300)
        text = self.ffi.string(message).decode(errors="replace")
        return error, text, self.ffi.gc(place[0], self.lib.minikd_free) if place[0] else None

    def loaded(self, data: bytes) -> Any:
        error, text, model = self.load(data)
        assert (error, text) == (0, "")
        return model

    def names(self, model: Any) -> list[str]:
        length, found = self.ffi.new("size_t *"), []
        for k in range(self.lib.minikd_class_count(model)):
            at = self.lib.minikd_class_name(model, k, length)
            found.append(bytes(self.ffi.buffer(at, length[0])).decode())
        return found

    def results(self, model: Any, x: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits, probabilities and classes."""
        n, c = len(x), self.lib.minikd_class_count(model)
        logits, probabilities = np.empty((n, c), np.float32), np.empty((n, c), np.float32)
        classes = np.empty(n, np.int64)
        rows = self.ffi.from_buffer("float[]", np.ascontiguousarray(x, np.float32))
        out = [self.ffi.from_buffer("float[]", a) for a in (logits, probabilities)]
        out.append(self.ffi.from_buffer("int64_t[]", classes))
        assert self.lib.minikd_logits(model, rows, n, out[0]) == 0
        assert self.lib.minikd_probabilities(model, rows, n, temperature, out[1]) == 0
        assert self.lib.minikd_predict(model, rows, n, out[2]) == 0
        return logits, probabilities, classes


@pytest.fixture(scope="module")
def library(built: Path) -> Library:
    return Library(built / "build" / "libminikd.so")


def saved(folder: Path, model: kd.nn.MLP) -> bytes:
    kd.save(folder / "m.safetensors", model)
    return (folder / "m.safetensors").read_bytes()


def network(sizes: tuple[int, ...], activation: str = "relu", **options: Any) -> kd.nn.MLP:
    """A network whose weights and biases are all random, with a normalisation."""
    model = kd.nn.MLP(sizes, activation, seed=5, **options)
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.array[...] += 0.3 * rng.normal(size=parameter.shape)
    mean, deviation = rng.normal(size=sizes[0]), rng.uniform(0.5, 2, sizes[0])
    model.normalisation = Normalisation(mean.astype(np.float32), deviation.astype(np.float32))
    return model


def same_kernels() -> bool:
    """Whether Python, too, computes with our own C kernels, products included."""
    return current_backend() == "c" and native.products() == "code of its own"


# --- what is computed ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_c_program_and_python_get_the_same_numbers(
    library: Library, tmp_path: Path, activation: str, dtype: str
) -> None:
    dropout = {"relu": (0.0, 0.0), "gelu": (0.25, 0.0), "tanh": (0.0, 0.1), "sigmoid": (1e-05, 0.2)}[activation]
    model = network((37, 50, 21, 7), activation, dropout=dropout[0], input_dropout=dropout[1], dtype=dtype)
    found = library.loaded(saved(tmp_path, model))
    python, rng = kd.load(tmp_path / "m.safetensors"), np.random.default_rng(0)
    assert library.lib.minikd_feature_count(found) == 37
    for rows in (0, 1, 2, 17, 513, 1100):
        x = rng.normal(size=(rows, 37)).astype(np.float32)
        logits, probabilities, classes = library.results(found, x, 2.5)
        wanted = python.logits(x).astype(np.float32), python.predict_proba(x, 2.5).astype(np.float32)
        np.testing.assert_allclose(logits, wanted[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(probabilities, wanted[1], rtol=1e-5, atol=1e-6)
        if same_kernels():
            np.testing.assert_array_equal(logits, wanted[0])
            np.testing.assert_array_equal(probabilities, wanted[1])
            np.testing.assert_array_equal(classes, python.predict(x))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (5, 130), (2, 1, 1, 1, 4)])
def test_networks_of_any_depth_are_computed_without_a_normalisation_too(
    library: Library, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    model = network(sizes)
    model.normalisation = None
    x = np.random.default_rng(0).normal(size=(20, sizes[0])).astype(np.float32)
    logits, _, classes = library.results(library.loaded(saved(tmp_path, model)), x)
    np.testing.assert_allclose(logits, model.logits(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(classes, logits.argmax(axis=1))


def test_class_names_come_back_whatever_they_are(library: Library, tmp_path: Path) -> None:
    model = network((2, len(ODD_NAMES)))
    assert library.names(library.loaded(saved(tmp_path, model))) == [str(k) for k in range(len(ODD_NAMES))]
    model.class_names = ODD_NAMES
    assert library.names(library.loaded(saved(tmp_path, model))) == list(ODD_NAMES)


# --- files ---


def packed(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def of_version(version: int, data: bytes, model: kd.nn.MLP) -> bytes:
    """A model's file as this version of the format has it, written from what is common to both."""
    header, body = parts(data)
    about = {k: v for k, v in header["__metadata__"].items() if k not in ("sizes", "activation", "layers", "sha256")}
    header["__metadata__"] = about
    about["format_version"] = str(version)
    if version == 1:
        about |= {"sizes": json.dumps(model.sizes), "activation": model.activation}
        return packed(header, body)
    names = [name.removesuffix(".weight") for name in header if name.endswith(".weight")]
    layers = [
        {"name": name, "inputs": model.sizes[k], "outputs": model.sizes[k + 1], "activation": model.activation}
        for k, name in enumerate(sorted(names, key=int))
    ]
    layers[-1]["activation"] = ""
    about |= {"layers": json.dumps(layers), "sha256": "0" * 64}
    about["sha256"] = hashlib.sha256(packed(header, body)).hexdigest()
    return packed(header, body)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_each_version_are_read(library: Library, tmp_path: Path, version: int) -> None:
    model = network((5, 8, 6, 3), "gelu", dropout=0.5)
    data = of_version(version, saved(tmp_path, model), model)
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_allclose(library.results(library.loaded(data), x)[0], model.logits(x), rtol=1e-5, atol=1e-5)


def test_a_flipped_bit_breaks_the_seal_of_version_2(library: Library, tmp_path: Path) -> None:
    model = network((5, 8, 3))
    data = bytearray(of_version(2, saved(tmp_path, model), model))
    data[-30] ^= 1
    error, message, _ = library.load(bytes(data))
    assert error == library.lib.MINIKD_ERROR_FORMAT
    assert "sha256" in message


def test_what_is_wrong_with_a_file_is_said_in_words(library: Library, tmp_path: Path) -> None:
    place, message = library.ffi.new("minikd_model **"), library.ffi.new("char[300]")
    path = tmp_path / "nothing"
    error = library.lib.minikd_load_file(os.fsencode(path), place, message, 300)
    assert error == library.lib.MINIKD_ERROR_FILE
    assert library.ffi.string(message).decode() == f"{path}: expected a file that can be read"
    data = saved(tmp_path, network((4, 6, 3)))
    header, body = parts(data)
    header["0.bias"]["shape"] = [7]
    for broken, words in (
        (b"", "at least 8 bytes"),
        (data[:7], "at least 8 bytes"),
        (data[:-1], "begins at byte"),
        (data + b"\0", "as the header says"),
        (b"\xff" * 40, "the header's length"),
        (packed(header, body), "0.bias: expected a tensor"),
    ):
        error, text, model = library.load(broken)
        assert (error, model) == (library.lib.MINIKD_ERROR_FORMAT, None)
        assert words in text


def test_a_damaged_file_is_refused_or_is_one_that_python_loads_too(library: Library, tmp_path: Path) -> None:
    model, rng, loads = network((3, 4, 2)), np.random.default_rng(3), 0
    whole, path = of_version(1, saved(tmp_path, model), model), tmp_path / "damaged"
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.choice([rng.integers(256), *b'0123456789"\\{}[]:, ', data[at] ^ 1])
        data = data[: rng.choice([len(data), rng.integers(len(data))], p=[0.9, 0.1])]
        error, message, found = library.load(bytes(data))
        assert error in (0, library.lib.MINIKD_ERROR_FORMAT)
        assert (found is None) == bool(message) == bool(error)
        if found is None:
            continue
        path.write_bytes(data)
        try:
            python = kd.load(path)
        except ModelFormatError as refusal:
            raise AssertionError(f"Python refuses what the library loads: {bytes(data)!r}") from refusal
        x = rng.normal(size=(3, 3)).astype(np.float32)
        np.testing.assert_allclose(library.results(found, x)[0], python.logits(x), rtol=1e-4, atol=1e-4)
        loads += 1
    assert loads > 20  # or this would show little


@pytest.mark.skipif(
    os.environ.get("MINIKD_SANITIZE") != "1",
    reason="needs MINIKD_SANITIZE=1, which builds the library once more: that takes half a minute",
)
def test_the_tests_in_c_find_nothing_under_sanitizers(built: Path, tmp_path: Path) -> None:
    models = []
    for activation in ACTIVATIONS:
        models.append(tmp_path / activation)
        kd.save(models[-1], network((9, 20, 4), activation, dropout=0.1))
    make(built, "check", f"MODELS={' '.join(map(str, models))}")


# --- what is built and installed ---


def public_functions() -> set[str]:
    return set(re.findall(r"\b(minikd_\w+)\(", declarations().split("*/", 1)[1]))


def defined(*options: str | Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "--defined-only", *options).splitlines() if len(line.split()) == 3}


def test_the_shared_library_exports_the_functions_of_its_header_and_nothing_else(built: Path) -> None:
    need("nm")
    assert len(public_functions()) == 11
    assert defined("-D", built / "build" / "libminikd.so") == public_functions()


def test_whatever_the_static_library_shares_with_a_program_bears_the_name_of_minikd(built: Path) -> None:
    need("nm")
    names = defined("-g", built / "build" / "libminikd.a")
    assert public_functions() < names
    assert [name for name in names if not name.startswith("minikd_")] == []


@pytest.mark.parametrize(("compiler", "language"), [("cc", "c"), ("c++", "c++")])
def test_the_header_is_plain_c_and_cpp(compiler: str, language: str, tmp_path: Path) -> None:
    need(compiler)
    source = tmp_path / "source"
    source.write_text('#include "minikd.h"\nint main(void) { return minikd_version() == 0; }\n')
    standard = {"c": "c99", "c++": "c++98"}[language]
    options = ["-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-long-long", f"-I{HEADER.parent}", f"-std={standard}"]
    run(compiler, *options, "-x", language, "-c", source, "-o", tmp_path / "object.o")


def test_the_library_is_plain_c99_without_a_warning(tmp_path: Path) -> None:
    need("cc")
    options = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{CSRC}", f"-I{HEADER.parent}"]
    for path in (*sorted((CSRC / "library").glob("*.c")), CSRC / "example.c"):
        run("cc", *options, "-fsyntax-only", path)


def test_the_versions_of_the_library_and_of_the_package_are_the_same(library: Library) -> None:
    assert library.ffi.string(library.lib.minikd_version()).decode() == kd.__version__
    assert f'#define MINIKD_VERSION "{kd.__version__}"' in HEADER.read_text("utf-8")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, kd.data.Dataset]:
    """A student of the digits that knows something, and its data."""
    data = kd.data.load("digits")
    model = kd.nn.MLP([64, 16, 10])
    kd.training.fit(model, data.x_train, data.y_train, epochs=10)
    model.normalisation, model.class_names = data.normalisation, data.class_names
    path = tmp_path_factory.mktemp("digits") / "student.safetensors"
    kd.save(path, model)
    return path, data


def raw(data: kd.data.Dataset, rows: int) -> np.ndarray:
    return data.x_test[:rows] * data.normalisation.deviation + data.normalisation.mean


def write_csv(path: Path, x: np.ndarray) -> Path:
    names = ",".join(f"pixel {k}" for k in range(x.shape[1]))
    np.savetxt(path, x, fmt="%.9g", delimiter=",", header=names, comments="")
    return path


def check_output(output: str, model: Path, x: np.ndarray) -> None:
    python = kd.load(model)
    shares = python.predict_proba(x)
    wanted = [(python.class_names[k], shares[i, k]) for i, k in enumerate(python.predict(x))]
    found = [line.rsplit(" ", 1) for line in output.splitlines()]
    assert [name for name, _ in found] == [name for name, _ in wanted]
    np.testing.assert_allclose([float(share) for _, share in found], [share for _, share in wanted], atol=6e-5)


def test_the_example_names_the_digits_in_a_table(built: Path, digits: Any, tmp_path: Path) -> None:
    model, data = digits
    x = raw(data, 30)
    output = run(built / "build" / "example", model, write_csv(tmp_path / "rows.csv", x))
    check_output(output, model, x)
    said = np.array([data.class_names.index(line.rsplit(" ", 1)[0]) for line in output.splitlines()])
    assert (said == data.y_test[:30]).mean() > 0.8


def test_the_example_says_what_is_wrong_with_a_table(built: Path, digits: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1,2,3\n1,2,3\n")
    command = [str(built / "build" / "example"), str(digits[0]), str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "line 2: expected 64 numbers with commas between them\n"


def test_a_program_finds_the_installed_library_by_pkg_config(built: Path, digits: Any, tmp_path: Path) -> None:
    need("pkg-config")
    prefix = tmp_path / "prefix"
    make(built, "install", f"PREFIX={prefix}")
    installed = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    assert installed == {
        "include/minikd.h",
        "lib/libminikd.a",
        "lib/libminikd.so",
        "lib/libminikd.so.0",
        f"lib/libminikd.so.{kd.__version__}",
        "lib/pkgconfig/minikd.pc",
    }
    where = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "minikd", **where).strip() == kd.__version__
    assert run("pkg-config", "--static", "--libs", "minikd", **where).split()[1:] == ["-lminikd", "-lm", "-pthread"]
    options = run("pkg-config", "--cflags", "--libs", "minikd", **where).split()
    assert options == [f"-I{prefix}/include", f"-L{prefix}/lib", "-lminikd"]
    program = tmp_path / "program"
    run("cc", CSRC / "example.c", *options, "-o", program)
    x = raw(digits[1], 5)
    output = run(program, digits[0], write_csv(tmp_path / "rows.csv", x), LD_LIBRARY_PATH=str(prefix / "lib"))
    check_output(output, digits[0], x)


def test_an_installation_may_be_staged_elsewhere(built: Path, tmp_path: Path) -> None:
    make(built, "install", f"DESTDIR={tmp_path}", "PREFIX=/usr", "LIBDIR=/usr/lib64")
    text = (tmp_path / "usr" / "lib64" / "pkgconfig" / "minikd.pc").read_text()
    assert text.startswith("prefix=/usr\nlibdir=/usr/lib64\nincludedir=/usr/include\n")
    assert (tmp_path / "usr" / "include" / "minikd.h").exists()


def test_the_program_of_the_page_runs(built: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "library.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "program.c").write_text(code, "utf-8")
    options = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}", "-o", tmp_path / "program"]
    libraries = [built / "build" / "libminikd.a", "-lm", "-pthread"]
    run("cc", *options, tmp_path / "program.c", *libraries)
    model = network((4, 5, 3))
    model.class_names = ("setosa", "versicolor", "virginica")
    kd.save(tmp_path / "student.safetensors", model)
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True, cwd=tmp_path)
    x = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32)
    shares = model.predict_proba(x)
    assert done.stdout == "".join(f"{model.class_names[row.argmax()]}: {row.max():.3f}\n" for row in shares)
