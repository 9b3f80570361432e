"""Every loop that is meant to become vector code does: a loop that silently stays scalar is five times slower.

The compiler is asked: it reports the line of each loop that it has vectorised, and every loop behind the macro SIMD
must be among them, with vectors as wide as the level has.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
WIDTHS = {"v3": 32, "v4": 64}  # bytes of a vector
SHORT = 16  # bytes of the shortest vector, which is enough for loops behind SIMD_SHORT
LOOP = re.compile(r"\s*SIMD(_SHORT|_OR\(\w+\))?")
REPORT = re.compile(r"(\w[\w.]*\.[ch]):(\d+):\d+: optimized: +loop vectorized using (\d+) byte vectors")


class Compiled(NamedTuple):
    """What the compiler made of kernels.c: the loops that it missed, and its assembly."""

    missed: set[tuple[str, int]]
    assembly: str


@cache
def build_options() -> Any:
    """setup.py as a module: its options are those that the extension is compiled with."""
    spec = importlib.util.spec_from_file_location("minikd_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loops(width: int) -> dict[tuple[str, int], int]:
    """File and line of each loop behind the macro, and how wide its vectors should be where `width` is the widest."""
    found = {}
    for path in sorted(CSRC.glob("*.[ch]")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if LOOP.fullmatch(line):
                found[path.name, number + 1] = SHORT if "SHORT" in line else width
    return found


def options(level: str, number: str) -> list[str]:
    """Those that kernels.c is compiled with."""
    setup = build_options()
    macros = ["-D" + name for name, _ in setup.NUMBERS[number]]
    return [*setup.STRICT, *setup.SIMD, *setup.NO_PEELING, *setup.LEVELS[level], *macros, "-DMINIKD_TABLE=table"]


def compiled(level: str, number: str, folder: Path, *more: str) -> Compiled:
    """kernels.c in assembly, and the loops of which gcc does not say that it vectorised them as widely as it should."""
    target = folder / "kernels.s"
    ways = ["-S", str(CSRC / "kernels.c"), "-o", str(target), "-fopt-info-vec-optimized"]
    done = subprocess.run(["gcc", *options(level, number), *more, *ways], capture_output=True, text=True, check=True)
    widest: dict[tuple[str, int], int] = {}
    for file, line, width in REPORT.findall(done.stderr):
        for at in (int(line), int(line) - 1):  # the compiler names the loop's line, or that of its first statement
            widest[file, at] = max(widest.get((file, at), 0), int(width))
    missed = {loop for loop, width in loops(WIDTHS[level]).items() if widest.get(loop, 0) < width}
    return Compiled(missed, target.read_text())


@pytest.fixture(scope="module")
def gcc() -> None:
    """Skip where the sources or gcc are missing: other compilers report in other words."""
    if not CSRC.exists():
        pytest.skip("needs a source checkout")
    found = shutil.which("gcc")
    words = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=False).stdout if found else ""
    if "Free Software Foundation" not in words:
        pytest.skip("needs gcc")
    machine = subprocess.run(["gcc", "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    if not machine.startswith("x86_64"):
        pytest.skip("needs gcc for x86-64")


@pytest.fixture(scope="module", params=list(itertools.product(WIDTHS, ("float", "double"))), ids="-".join)
def kernels(request: pytest.FixtureRequest, gcc: None, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernels of one level and one type of number, as they are shipped: five seconds of the compiler, once."""
    return compiled(*request.param, tmp_path_factory.mktemp("kernels"))


def test_every_hot_loop_is_vectorised_over_whole_vectors(kernels: Compiled) -> None:
    assert len(loops(0)) > 40
    assert not kernels.missed


def test_the_sums_of_a_product_stay_in_registers(kernels: Compiled) -> None:
    """One of them on the stack, which compilers do for reasons of their own, and products take twice as long."""
    body = kernels.assembly.split("\ncompute_tile:\n")[1].split(".size\tcompute_tile")[0]
    sums = [line for line in body.splitlines() if "vfmadd" in line]
    assert len(sums) > 100
    assert not [line for line in sums if "%rsp" in line or "%rbp" in line]


@pytest.mark.usefixtures("gcc")
def test_a_compiler_that_does_not_vectorise_is_noticed(tmp_path: Path) -> None:
    assert compiled("v3", "float", tmp_path, "-O0").missed == set(loops(0))
