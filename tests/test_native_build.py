"""How the C kernels are built, and what happens where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minikd.errors import BackendError
from minikd.kernels import native
from minikd.kernels.cuda import sources
from minikd.kernels.cuda.table import KERNELS

ROOT = Path(__file__).parents[1]


def test_without_the_extension_module_the_backend_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(native.importlib, "import_module", fail)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "minikd" / "kernels" / "native.py"))
    module, reason = native._load()
    assert module is None
    assert "reinstall minikd" in reason
    (tmp_path / "minikd").mkdir()
    (tmp_path / "minikd" / "native_build_failure.txt").write_text("there was no compiler\n")
    assert native._load() == (None, "there was no compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that the checkout itself stays as it is."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a checkout of the source, with setup.py and csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("data", "kernels"):
        shutil.copytree(ROOT / "minikd" / name, tmp_path / "minikd" / name)
    return tmp_path


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, "MINIKD_REQUIRE_C": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_build_succeeds_and_leaves_the_reason(source: Path) -> None:
    done = build(source, CC="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    reason = (source / "minikd" / "native_build_failure.txt").read_text()
    assert "apt install gcc python3-dev" in reason
    assert "reinstall minikd" in reason
    assert "/nonexistent/cc" in reason


def test_a_missing_compiler_is_an_error_where_c_is_required(source: Path) -> None:
    done = build(source, CC="/nonexistent/cc", MINIKD_REQUIRE_C="1")
    assert done.returncode != 0
    assert not (source / "minikd" / "native_build_failure.txt").exists()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kernels_are_plain_c99_without_a_warning(dtype: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a C compiler and the source in csrc")
    options = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-DMINIKD_TABLE=minikd_base_float"]
    options += ["-DMINIKD_DOUBLE"] if dtype == "float64" else []
    for file in ("kernels.c", "blas.c", "dispatch.c", "memory.c", "parallel.c"):
        subprocess.run(
            [compiler, *options, "-c", str(ROOT / "csrc" / file), "-o", str(tmp_path / "object.o")], check=True
        )


def test_a_built_package_holds_all_that_the_cuda_sources_include(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "minikd" / "__init__.py").write_text("")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    monkeypatch.setattr(sources, "HERE", source / "built" / "minikd" / "kernels" / "cuda")
    monkeypatch.setattr(sources, "SHARED", source / "nowhere")
    files = {step.source for steps in KERNELS.values() for step in steps}
    texts = {name: sources.source.__wrapped__(name) for name in files}
    assert len(texts) == 5
    assert all("INLINE real gelu(real u)" in text and '#include "' not in text for text in texts.values())
    monkeypatch.undo()
    assert texts == {name: sources.source(name) for name in files}
    with pytest.raises(BackendError, match=r"nothing\.h.*Reinstall"):
        sources.find("nothing.h")
