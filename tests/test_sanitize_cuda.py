"""The script that runs kernels under compute-sanitizer: where it finds the sanitizer, what it asks of it and says."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitize_cuda

import minikd as kd

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs programs that are shell scripts")


def program(folder: Path, code: int = 0) -> Path:
    """A compute-sanitizer that writes down what it was asked and ends with this code."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "compute-sanitizer"
    file.write_text(f'#!/bin/sh\necho "$MINIKD_WITHOUT_POOL $*" >> {shlex.quote(str(folder / "asked"))}\nexit {code}\n')
    file.chmod(0o755)
    return file


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str, reason: str = "") -> int:
    """The script's exit code, where the backend is available or not for this reason."""
    monkeypatch.setattr(sys, "argv", ["sanitize_cuda.py", *arguments])
    monkeypatch.setattr(kd, "backends", lambda: {"cupy": SimpleNamespace(reason=reason)}, raising=False)
    return sanitize_cuda.main()


def test_each_tool_is_run_on_the_tests_of_the_kernels_without_cupys_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert called(monkeypatch, "--", "-k", "softmax") == 0
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first.startswith("1 --tool memcheck --error-exitcode 9 ")
    assert second.startswith("1 --tool racecheck --error-exitcode 9 ")
    assert first.endswith("test_gpu.py -m gpu -k kernels -k softmax")
    assert "racecheck: nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "said"), [(9, "memcheck: ERRORS FOUND"), (1, "memcheck: see above")])
def test_what_is_found_is_said_and_is_the_exit_code(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, code)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert called(monkeypatch, "--tool", "memcheck") == 1
    assert said in capsys.readouterr().out


def test_the_sanitizer_of_the_python_package_is_made_to_run_and_told_where_its_libraries_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "nvidia" / "cuda_sanitizer_api"
    file = program(package / "bin")
    file.chmod(0o644)  # as pip leaves it
    monkeypatch.setattr(sanitize_cuda.shutil, "which", lambda name: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    assert sanitize_cuda.sanitizer() == [str(file), "--injection-path", str(package / "lib")]
    assert os.access(file, os.X_OK)
    sys.modules.pop("nvidia", None)


def test_without_a_sanitizer_or_a_gpu_the_script_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize_cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize_cuda, "in_package", lambda: None)
    assert called(monkeypatch) == 2
    assert "pip install nvidia-cuda-sanitizer-api-cu12" in capsys.readouterr().err
    monkeypatch.setattr(sanitize_cuda.shutil, "which", lambda name: "compute-sanitizer")
    assert called(monkeypatch, reason="there is no GPU in this machine") == 2
    assert "the kernels cannot run here: there is no GPU" in capsys.readouterr().err
