"""minikd.runtime: the same predictions with NumPy alone, from one short file that runs wherever it is copied to."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minikd as kd
from minikd import runtime
from minikd.data import Normalisation
from minikd.export import write_tensors
from minikd.ops.elementwise import ACTIVATIONS

SOURCE = Path(runtime.__file__)
ROOT = Path(__file__).parents[1]


def saved(
    path: Path, activation: str = "relu", dtype: type = np.float32, sizes: tuple[int, ...] = (5, 9, 7, 3)
) -> Path:
    """A file of a network with all that a file can hold."""
    model = kd.nn.MLP(sizes, activation, dropout=0.2, seed=4, dtype=dtype)
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.array[...] += 0.3 * rng.normal(size=p.shape)
    deviation = np.linspace(0.5, 4, sizes[0], dtype=np.float32)
    model.normalisation = Normalisation(np.linspace(-1, 2, sizes[0], dtype=np.float32), deviation)
    model.class_names = tuple(f"naïve {k} ✓" for k in range(sizes[-1]))
    kd.save(path, model)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_predicts_what_the_loaded_model_predicts(activation: str, dtype: type, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", activation, dtype)
    small, model = runtime.load(path), kd.load(path)
    x = np.random.default_rng(0).normal(0, 4, size=(200, 5)).astype(dtype)
    expected = model.logits(x)
    assert small.logits(x).dtype == dtype
    rounding = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(small.logits(x), expected, rtol=rounding, atol=rounding * np.abs(expected).max())
    for temperature in (0.5, 1.0, 4.0):
        probabilities = small.predict_proba(x, temperature)
        np.testing.assert_allclose(probabilities, model.predict_proba(x, temperature), rtol=1e-4, atol=rounding)
    np.testing.assert_array_equal(small.predict(x), expected.argmax(axis=1))
    assert small.class_names == model.class_names


def test_activations_hold_far_from_zero() -> None:
    u = np.array([-1e30, -100, -40, -9, -1e-30, 0, 1e-30, 9, 100, 1e30])
    for name, activation in ACTIVATIONS.items():
        expected = np.empty_like(u)
        activation.forward(np, expected, u)
        with np.errstate(all="raise", under="ignore"):
            np.testing.assert_allclose(runtime.ACTIVATIONS[name](u), expected, rtol=1e-13, atol=1e-300)


def test_rows_come_in_every_form_that_a_model_takes(tmp_path: Path) -> None:
    model = runtime.load(saved(tmp_path / "m", sizes=(6, 4)))
    x = np.arange(12).reshape(2, 6)
    for form in (x, x.tolist(), x.astype(np.float64), x.reshape(2, 2, 3), x[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(model.logits(form), model.logits(x))
    assert model.logits(x[0]).shape == (4,)
    np.testing.assert_allclose(model.logits(x[0]), model.logits(x)[0], rtol=1e-5)
    assert model.predict(x[0]).shape == ()
    assert model.logits(x[:0]).shape == (0, 4)
    assert model.predict(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"rows of 6 features, got shape \(2, 1\)"):
        model.logits(x[:, :1])
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        model.predict_proba(x, 0)


def test_a_model_without_scale_and_names_is_read(tmp_path: Path) -> None:
    model = kd.nn.MLP([4, 3], seed=2)
    kd.save(tmp_path / "m", model)
    small = runtime.load(tmp_path / "m")
    x = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(small.logits(x), model.logits(x), rtol=1e-6)
    assert (small.class_names, small.scale) == (None, [])


def test_a_changed_byte_anywhere_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path / "m").read_bytes()
    changed = [data[:k] + bytes([data[k] ^ 4]) + data[k + 1 :] for k in range(0, len(data), 7)]
    with (tmp_path / "m").open("r+b") as file:
        for raw in [*changed, *(data[:k] for k in range(len(data) - 1, 0, -11)), b""]:
            file.seek(0)
            file.write(raw)
            file.truncate()
            file.flush()
            with pytest.raises(runtime.ModelFormatError, match="is no whole model of minikd"):
                runtime.load(tmp_path / "m")


def test_a_file_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    about = {"format": "minikd", "format_version": "3"}
    write_tensors(tmp_path / "m", {"0.weight": np.zeros((2, 2))}, about, seal=True)
    with pytest.raises(runtime.ModelFormatError, match="the format or its version"):
        runtime.load(tmp_path / "m")
    write_tensors(tmp_path / "m", {"0.weight": np.zeros((2, 2))}, {})
    with pytest.raises(runtime.ModelFormatError, match="is no whole model"):
        runtime.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        runtime.load(tmp_path / "nothing")


# --- what it is made of ---


def test_it_is_shorter_than_120_lines_and_imports_numpy_alone() -> None:
    text = SOURCE.read_text("utf-8")
    assert len(text.splitlines()) < 120
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module))
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}


def test_importing_it_loads_nothing_else_of_minikd() -> None:
    code = "import sys, minikd.runtime; print(*(m for m in sys.modules if m.split('.')[0] in ('minikd', 'cffi')))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["minikd", "minikd.runtime"]


def test_the_file_alone_runs_in_a_python_that_has_only_numpy(tmp_path: Path) -> None:
    alone, path = tmp_path / "alone", saved(tmp_path / "m", "gelu")
    alone.mkdir()
    (alone / "predictor.py").write_bytes(SOURCE.read_bytes())
    packages = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):  # the second holds the libraries of a wheel for Linux
        if (packages / name).exists():
            (alone / name).symlink_to(packages / name)
    code = (
        f"import sys, json; sys.path.insert(0, {str(alone)!r}); import predictor\n"
        f"print(json.dumps(predictor.load({str(path)!r}).logits([[1, 2, 3, 4, 5]]).tolist()))\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    )
    run = [sys.executable, "-I", "-S", "-W", "error", "-c", code]
    logits, modules = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    np.testing.assert_allclose(json.loads(logits), kd.load(path).logits([[1, 2, 3, 4, 5]]), rtol=1e-5)
    own = {"__main__", "predictor", "numpy", "cython_runtime"}  # the last belongs to NumPy's random numbers
    assert {m for m in modules.split() if not m.startswith("_cython_")} <= own


def test_the_page_of_the_format_reads_a_file_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "student.safetensors")
    text = (ROOT / "docs/model_file.md").read_text("utf-8")
    names: dict[str, object] = {"features": np.ones((2, 5), np.float32)}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/model_file.md", "exec"), names)
    np.testing.assert_allclose(names["x"], kd.load("student.safetensors").logits(names["features"]), rtol=1e-5)
    for name in ("format", "format_version", "minikd_version", "layers", "class_names", "dropout", "seed", "sha256"):
        assert f"`{name}`" in text
