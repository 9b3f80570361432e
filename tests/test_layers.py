"""The order of the modules: imports point one way, importing the package stays light, every public name is there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import minikd as kd

PACKAGE = Path(kd.__file__).parent

# A module imports only from its own layer and from those before it. `minikd/__init__` only names what the others hold.
LAYERS = {
    "errors": 0,
    "ops": 1,
    "locks": 1,
    "mapped": 1,
    "safetensors": 1,
    "expressions": 1,
    "_native": 2,
    "kernels": 2,
    "tape": 3,
    "tensor": 3,
    "plan": 3,
    "variant": 3,
    "steps": 3,
    "explain": 4,
    "functional": 4,
    "nn": 5,
    "optim": 5,
    "schedules": 5,
    "data": 6,
    "model_file": 6,
    "objectives": 6,
    "augmentation": 6,
    "peers": 6,
    "teachers": 6,
    "store": 6,
    "bias": 7,
    "terms": 7,
    "feed": 7,
    "training": 7,
    "checkpoints": 7,
    "settings": 7,
    "verdict": 7,
    "weighing": 7,
    "distillation": 7,
    "metrics": 7,
    "export": 8,
    "report": 8,
    "runtime": 8,
    "bench": 9,
    "cli": 9,
    "exporting": 9,
    "labelling": 9,
    "sklearn": 9,
    "testing": 9,
    "__main__": 9,
}


class Arrow(NamedTuple):
    """One import: from a module to a module, by their full names, and whether it runs."""

    source: str
    target: str
    line: int
    runs: bool

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, imports {self.target}"


def module_name(path: Path) -> str:
    parts = ("minikd", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def top(module: str) -> str:
    """The part of the package that a module belongs to: "ops" for minikd.ops.losses, "" for minikd itself."""
    return module.split(".")[1] if "." in module else ""


def unrun_lines(tree: ast.Module) -> set[int]:
    """Lines below `if TYPE_CHECKING:`, which never run."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found.update(range(node.lineno, (node.body[-1].end_lineno or node.lineno) + 1))
    return found


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full names of the modules of this package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in MODULES or (base == "minikd" and alias.name in LAYERS) else base


@cache
def arrows(module: str) -> list[Arrow]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unrun = unrun_lines(tree)
    return [
        Arrow(module, target, node.lineno, node.lineno not in unrun)
        for node in ast.walk(tree)
        for target in imported(node, module, path.name == "__init__.py")
        if target.split(".")[0] == "minikd"
    ]


def test_every_module_has_its_layer() -> None:
    unknown = {module for module in MODULES if module != "minikd" and top(module) not in LAYERS}
    assert not unknown, f"give these a place among the layers: {sorted(unknown)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "minikd"])
def test_no_import_points_back(module: str) -> None:
    own = LAYERS[top(module)]
    wrong = [str(a) for a in arrows(module) if a.target != "minikd" and LAYERS[top(a.target)] > own]
    assert not wrong


def test_no_modules_import_one_another_in_a_circle() -> None:
    left = {m: {a.target for a in arrows(m) if a.runs} for m in MODULES if m != "minikd"}
    while free := [m for m, targets in left.items() if not targets & left.keys()]:
        for m in free:
            del left[m]
    assert not left, f"these import one another: {sorted(left)}"


def test_errors_and_operations_know_nothing_of_tensors() -> None:
    for module in MODULES:
        if top(module) in ("errors", "ops"):
            assert {top(a.target) for a in arrows(module)} <= {"errors", "ops"}


# --- what an import loads ---

# NumPy's random generators bring the two modules of Cython's run time along.
LIGHT = {"minikd", "numpy", "cffi", "_cffi_backend", "pycparser", "ply", "cython_runtime"}


def loaded_by(code: str, **environment: str) -> set[str]:
    """The top-level packages that a fresh Python loads while it runs this code, without the standard library."""
    program = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {name.split(".")[0] for name in result.stdout.split()} - set(sys.stdlib_module_names)
    return {name for name in names if not name.startswith("_cython_")}


def test_importing_minikd_loads_itself_and_little_else() -> None:
    loaded = loaded_by("import minikd")
    assert "minikd" in loaded
    assert loaded <= LIGHT


def test_computing_with_numpy_loads_no_more_than_numpy_and_cffi() -> None:
    code = "import minikd as kd; kd.functional.softmax([1.0]); kd.nn.MLP([2, 2]); kd.optim; kd.backends()"
    assert loaded_by(code, MINIKD_BACKEND="numpy") <= LIGHT


def test_importing_prints_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import minikd.nn, minikd.optim"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == result.stderr == ""


# --- public names ---


@pytest.mark.parametrize("name", kd.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kd, name) is not None
    assert name in dir(kd)


def test_a_name_that_is_not_public_is_missed_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(kd, "non" + "sense")
