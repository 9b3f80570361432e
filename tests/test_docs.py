"""What the pages show runs as printed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(page: str, code: str, names: dict[str, Any]) -> None:
    exec(compile(code, page, "exec"), names)


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_python_of_the_readme_runs() -> None:
    rng = np.random.default_rng(0)
    shown = [b for b in blocks("README.md", "python") if "import minikd" in b or "F = kd" in b]
    assert len(shown) == 2
    names: dict[str, Any] = {"features": rng.uniform(0, 16, (5, 64)).astype(np.float32)}
    run("README.md", shown[0], names)
    names |= {
        "x": rng.normal(size=(32, 784)).astype(np.float32),
        "teacher_logits": rng.normal(size=(32, 10)).astype(np.float32),
        "labels": rng.integers(0, 10, 32),
        "batches": rng.normal(size=(6, 32, 784)).astype(np.float32),
        "batches_of_teacher_logits": rng.normal(size=(6, 32, 10)).astype(np.float32),
        "batches_of_labels": rng.integers(0, 10, (6, 32)),
        "z_student": rng.normal(size=(8, 10)).astype(np.float32),
        "z_teacher": rng.normal(size=(8, 10)).astype(np.float32),
    }
    run("README.md", shown[1].replace("z_student, z_teacher, labels", "z_student, z_teacher, labels[:8]"), names)
    assert names["losses"].shape == (6,)
    assert names["gradient"].shape == (8, 10)


@pytest.mark.usefixtures("c_in_use")
def test_the_page_of_one_step_shows_the_step_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("docs/one_step.md", "python")
    run("docs/one_step.md", code, {})
    printed = capsys.readouterr().out
    (shown,) = blocks("docs/one_step.md", "text")
    kernels = re.compile(r"^  #\d+ +(\w+) +(\d.*?)  ", re.M)
    assert kernels.findall(shown) == kernels.findall(printed)
    assert kernels.findall(shown)


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_page_of_stores_writes_one_and_reads_it_in_two_ways(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in blocks("docs/stores.md", "python"):
        run("docs/stores.md", code, names)
    assert "1,797 rows, 10 classes, float16" in capsys.readouterr().out
    np.testing.assert_array_equal(names["first"][names["data"].rows_train], names["logits"])


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_page_of_c_proves_its_student_and_its_program_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    (code,), (program,) = blocks("docs/c.md", "python"), blocks("docs/c.md", "c")
    names: dict[str, Any] = {}
    run("docs/c.md", code, names)
    told = (names["sizes"](names["network"]), names["sizes"](names["network"], names["small"]))
    page = (ROOT / "docs" / "c.md").read_text("utf-8")
    for form, figures in zip(("float32", "int8"), told, strict=True):
        row = [figures[f"{what}_bytes"] for what in ("flash", "constant", "stack")]
        assert f"| {form} | " + " | ".join(f"{number:,}" for number in row) + " |" in page
    command = names["compiler"]()
    if command is None:
        pytest.skip("needs a C compiler for the rest")
    assert capsys.readouterr().out.count("the same bits as the NumPy reference") == 2
    Path("digits", "own.c").write_text(program)
    subprocess.run([*command, "-std=c99", "digits/own.c", "digits/student.c", "-o", "own"], check=True)
    done = subprocess.run(["./own"], capture_output=True, text=True, check=True)
    assert done.stdout.split(",")[0] in names["student"].class_names


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_page_of_int8_makes_a_small_student() -> None:
    (code,) = blocks("docs/int8.md", "python")
    names: dict[str, Any] = {}
    run("docs/int8.md", code, names)
    assert len(names["small"].tried) == 25
    assert (names["integers"].argmax(axis=1) == names["data"].y_test).mean() > 0.8


def test_the_page_of_testing_shows_the_report_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    codes = blocks("docs/testing.md", "python")
    run("docs/testing.md", codes[0], names)
    printed = capsys.readouterr().out
    (shown,) = blocks("docs/testing.md", "text")
    signature, head, *failure = shown.splitlines()
    assert printed.startswith(f"{signature}\n{head} (")
    assert "\n".join(failure) in printed
    for code in codes[1:]:
        run("docs/testing.md", code, names)
    assert capsys.readouterr().out.split() == ["0.3572883739666878", "0.3572883739666876496538043"]
