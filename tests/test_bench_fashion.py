"""The comparison of whole distillations: that all are given the same, and that a run leaves a table behind."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from standin import cupy as standin

import minikd as kd
from minikd.kernels import current_backend

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("fashion")


def options(fashion: Any, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fashion.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    file = tmp_path / "teacher.npz"
    np.savez(file, *kd.nn.MLP((64, 48, 10)).state_dict().values())
    return file


def test_a_task_is_the_same_after_it_was_stored(fashion: Any, teacher: Path, tmp_path: Path) -> None:
    task = fashion.make_task(options(fashion, "--data", "digits", "--teacher", str(teacher), "--rows", "100"))
    task.save(tmp_path / "task.npz")
    again = type(task).load(tmp_path / "task.npz")
    assert (len(again.x), len(again.y), again.epochs) == (100, 100, 10)
    assert again.arrays["x_test"].shape == (400, 64)
    assert [a.shape for a in again.student] == [(30, 64), (30,), (30, 30), (30,), (10, 30), (10,)]
    for own, stored in zip(task.teacher + task.student, again.teacher + again.student, strict=True):
        assert np.array_equal(own, stored)
    assert all(np.array_equal(task.arrays[name], again.arrays[name]) for name in task.arrays)


def test_both_of_ours_train_the_same_student(fashion: Any, teacher: Path) -> None:
    asked = options(fashion, "--data", "digits", "--teacher", str(teacher), "--rows", "256", "--epochs", "2")
    task = fashion.make_task(asked)
    whole, alone = (
        importlib.import_module(f"distillers.{fashion.DISTILLERS[key].module}").distil(task)
        for key in ("minikd", "minikd-fit")
    )
    assert np.array_equal(whole(task.arrays["x_test"]), alone(task.arrays["x_test"]))


def test_on_a_gpu_ours_learn_what_they_learn_on_the_host(fashion: Any, teacher: Path) -> None:
    if cuda_on_cpu.compiler() is None:
        pytest.skip("needs g++, which makes kernels run on the processor")
    asked = options(fashion, "--data", "digits", "--teacher", str(teacher), "--rows", "256", "--epochs", "1")
    task = fashion.make_task(asked)
    distil = importlib.import_module("distillers.minikd_fit").distil
    before, rows = current_backend(), task.arrays["x_test"]
    wanted = distil(task)(rows)
    with standin.installed():
        kd.use_backend("cupy")
        try:
            found = distil(task)(rows)
        finally:
            kd.use_backend(before)
    assert np.mean(found == wanted) > 0.99


def test_without_a_gpu_a_run_on_one_says_why(
    fashion: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kd, "backends", lambda: {"cupy": SimpleNamespace(reason="there is no GPU")}, raising=False)
    assert fashion.run(options(fashion, "--backend", "cupy", "--out", "fashion.json")) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_peer_that_sees_no_gpu_is_left_out(
    fashion: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"seconds": 1.0, "import_seconds": 0.5, "peak_bytes": 10, "test_accuracy": 0.9}
    environments = []

    def measure(module: str, file: Path, condition: Any, more: dict[str, str]) -> dict[str, float]:
        environments.append(more)
        if module == "jax_stored":
            raise subprocess.CalledProcessError(1, "jax")
        return figures

    monkeypatch.setattr(fashion, "measure", measure)
    monkeypatch.setattr(fashion, "gpu_in_words", lambda: "a card")
    monkeypatch.setattr(kd, "backends", lambda: {"cupy": SimpleNamespace(reason="")}, raising=False)
    monkeypatch.setattr(fashion.importlib.util, "find_spec", lambda name: name)
    out, asked = tmp_path / "fashion.json", ["--data", "digits", "--teacher", str(teacher), "--rows", "100"]
    assert fashion.run(options(fashion, *asked, "--rounds", "1", "--backend", "cupy", "--out", str(out))) == 0
    report = json.loads((tmp_path / "fashion_gpu.json").read_text())
    assert list(report["runs"]) == ["minikd", "minikd-fit", "torch-stored"]
    assert "GPU: a card." in fashion.markdown(report)
    assert "JAX, logits stored, lax.scan is left out." in capsys.readouterr().err
    assert all(more["MINIKD_BACKEND"] == "cupy" for more in environments)


def test_every_distiller_is_a_module_that_stands_there(fashion: Any) -> None:
    assert {who.module for who in fashion.DISTILLERS.values()} < {file.stem for file in BENCH.glob("distillers/*.py")}


def test_a_run_writes_its_figures_and_a_readme_takes_them_in(
    fashion: Any, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "fashion.json", tmp_path / "README.md"
    asked = ["--data", "digits", "--teacher", str(teacher), "--rows", "200", "--epochs", "1", "--rounds", "2"]
    assert fashion.run(options(fashion, *asked, "--only", "minikd", "minikd-fit", "--out", str(out))) == 0
    assert "minikd, kd.distill" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {key: len(runs) for key, runs in report["runs"].items()} == {"minikd": 2, "minikd-fit": 2}
    first = report["runs"]["minikd"][0]
    assert 0 < first["seconds"] < math.inf
    assert first["peak_bytes"] > report["array_bytes"]
    assert 0 <= first["test_accuracy"] <= 1
    page.write_text("before\n<!-- fashion -->\nold\n<!-- end fashion -->\n")
    assert fashion.run(options(fashion, "--out", str(out), "--update-readme", str(page))) == 0
    text = page.read_text()
    assert "old" not in text
    assert "200 rows, 1 epochs, batches of 128" in text
    assert "| minikd, kd.distill |" in text
    assert "| 1.00 |" in text
