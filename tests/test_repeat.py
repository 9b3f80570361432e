"""The table of combinations under which tests are repeated: which pairs it covers, and which Python each one takes."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from minikd.kernels import BACKENDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repeat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("repeat_under_test", ROOT / "tests" / "repeat.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_pair_of_values_comes_in_a_combination_or_in_the_ordinary_run(repeat: ModuleType) -> None:
    runs = [c[:4] for c in (repeat.ORDINARY, *repeat.COMBINATIONS.values())]
    for a, b in itertools.combinations(range(4), 2):
        tried = {(run[a], run[b]) for run in runs}
        assert tried == set(itertools.product({run[a] for run in runs}, {run[b] for run in runs}))
    assert {run[0] for run in runs} == {"base", "v3", "v4"}
    assert {run[1] for run in runs} == {1, 2}
    assert len(repeat.COMBINATIONS) <= 5


def test_each_backend_is_tried_with_the_oldest_and_the_newest_numpy(repeat: ModuleType) -> None:
    tried = {(b, c.numpy) for c in (repeat.ORDINARY, *repeat.COMBINATIONS.values()) for b in c.backends}
    everywhere = [name for name, backend in BACKENDS.items() if backend.on_host]
    assert tried == set(itertools.product(everywhere, (repeat.OLDEST, repeat.NEWEST)))


def test_the_oldest_releases_are_those_that_the_project_declares(repeat: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    oldest = [requirement.replace("==", ">=").removesuffix(".0") for requirement in repeat.RELEASES[repeat.OLDEST][0]]
    assert set(project["dependencies"]) <= set(oldest)
    assert project["requires-python"] == ">=" + ".".join(map(str, repeat.FIRST_PYTHON))


def test_every_file_of_tests_that_is_named_is_there_and_named_once(repeat: ModuleType) -> None:
    named = [name for group in repeat.TESTS.values() for name in group]
    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / "tests" / f"test_{name}.py").exists()] == []


def test_a_newer_python_is_the_newest_that_the_releases_were_built_for(repeat: ModuleType) -> None:
    own = sys.version_info[:2]
    newer, newest = (own[0], own[1] + 1), (own[0], own[1] + 2)
    assert repeat.chosen_python([own, newer, newest], "newer", newer) == newer
    assert repeat.chosen_python([own, newer, newest], "newer", newest) == newest
    assert repeat.chosen_python([own], "newer", newest) == own
    assert repeat.chosen_python([own, newer], "own", newest) == own
    assert repeat.chosen_python([newer, newest], "own", own) == own
    assert repeat.chosen_python([own, newer], "own", (3, 10)) is None


def test_a_python_that_does_not_start_or_lacks_its_headers_is_not_taken(repeat: ModuleType, tmp_path: Path) -> None:
    broken = tmp_path / "python3.99"
    broken.write_text("#!/bin/sh\nexit 127\n", "utf-8")
    broken.chmod(0o755)
    assert repeat.usable_version(str(broken)) is None
    assert repeat.usable_version(str(tmp_path / "python3.97")) is None
    headless = tmp_path / "python3.98"
    headless.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$(echo "$2" | sed s/Python.h/Absent.h/)"\n', "utf-8")
    headless.chmod(0o755)
    assert repeat.usable_version(str(headless)) is None
    assert repeat.usable_version(sys.executable) in (None, sys.version_info[:2])  # None where its headers are missing


def test_the_tests_see_nothing_of_how_the_one_who_starts_them_tuned_minikd(
    repeat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = ("MINIKD_CPU", "MINIKD_SANITIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH")
    for name in (*tuned, "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "1")
    assert not set(tuned) & set(repeat.clean())
    assert repeat.clean()["PYTHONHASHSEED"] == "1"


def test_what_pytest_wrote_is_told_in_numbers(repeat: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_four.py").write_text(
        "import pytest\n\ndef test_a():\n    pass\n\ndef test_b():\n    assert False\n\n"
        "@pytest.mark.skip\ndef test_c():\n    pass\n\n@pytest.fixture\ndef broken():\n    raise ValueError\n\n"
        "def test_d(broken):\n    pass\n",
        "utf-8",
    )
    found = tmp_path / "tests.xml"
    assert repeat.counts(found) == "the tests did not end"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", f"--junitxml={found}", "."]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert repeat.counts(found) == "1 passed, 2 failed, 1 skipped"


def test_the_page_shows_the_combinations_that_there_are(repeat: ModuleType) -> None:
    page = (ROOT / "docs" / "proving.md").read_text("utf-8")
    kernels = {"base": "baseline", "v3": "AVX2", "v4": "AVX-512"}
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", page.split("\n## ")[1], re.M))
    assert list(rows) == list(repeat.COMBINATIONS)
    for name, c in repeat.COMBINATIONS.items():
        level, threads, numpy, python, backends = rows[name].split(" | ")
        assert (level, threads) == (kernels[c.level], str(c.threads))
        assert numpy.startswith("1.26.0") == (c.numpy == repeat.OLDEST)
        assert python.startswith("newest") == (c.python == "newer")
        assert backends.lower().split(", ") == list(c.backends)


def test_the_list_names_every_combination(repeat: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "repeat.py", "--list"], capture_output=True, text=True, check=True
    )
    assert re.findall(r"^(\S+):", done.stdout, re.M) == list(repeat.COMBINATIONS)
