"""Repeats the tests of all that computes: under other instructions, threads of BLAS, NumPys and Pythons.

    python tests/repeat.py                               # every combination, one after the other
    python tests/repeat.py --combination v3-numpy1.26    # one of them; several times for several
    python tests/repeat.py --list

A combination has a folder of its own in .repeat/: a copy of the project's files, and an environment that is made from
them. Each pair of values of two columns of the table is tried, by a combination or by the ordinary run of the tests.
What this machine lacks, a newer Python or AVX-512, is said in a line. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".repeat"

OLDEST, NEWEST = "oldest", "newest"


class Combination(NamedTuple):
    """What the tests are repeated under.

    Attributes
    ----------
    level : of the C kernels' instructions (MINIKD_CPU).
    threads : those of NumPy's BLAS (OPENBLAS_NUM_THREADS).
    numpy : the oldest that is supported, or the newest there is.
    python : "own" for the one that runs this, "newer" for the newest one on this machine that this NumPy supports.
    backends : those whose tests run. Numba's kernels know no level and call no BLAS.
    """

    level: str
    threads: int
    numpy: str
    python: str
    backends: tuple[str, ...] = ("c", "numpy")


# The pairs that these leave out are those of the ordinary run: the best level, one thread of BLAS for each worker of
# pytest, the newest NumPy, one's own Python, and Numba.
ORDINARY = Combination("v4", 1, NEWEST, "own", ("c", "numba", "numpy"))
COMBINATIONS = {
    "base-numpy1.26": Combination("base", 1, OLDEST, "own"),
    "base-numpy2": Combination("base", 2, NEWEST, "newer"),
    "v3-numpy1.26": Combination("v3", 2, OLDEST, "own"),
    "v3-numpy2": Combination("v3", 1, NEWEST, "newer"),
    "v4-numpy1.26": Combination("v4", 2, OLDEST, "newer", ("c", "numba", "numpy")),
}

# What the project needs, and the newest Python for which these releases were built.
RELEASES: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    OLDEST: (("numpy==1.26.0", "cffi==1.17.0"), (3, 12)),
    NEWEST: (("numpy", "cffi"), (3, 99)),
}
BESIDE = ("threadpoolctl", "pytest-xdist")  # the threads of BLAS are asked for, and two processors share the tests
FIRST_PYTHON = (3, 11)

# Whatever computes: kernels and their contracts, products, losses, plans, networks, trainings to the bit; and the files
# that NumPy reads and writes. Tests of the command, the pages, the C that is exported, and of what a compiler makes of
# the sources see nothing of what varies here.
TESTS = {
    "kernels": ("ops", "native", "products", "threads", "thread_counts", "launch", "backends", "jit", "testing"),
    "losses": ("functional", "divergences", "linear_losses", "objectives", "weighing", "bias"),
    "plans": ("tape", "tensor", "recording", "plan", "steps", "explain", "machine"),
    "training": ("nn", "optim", "training", "distillation", "modes", "metrics", "quantise"),
    "files": ("data", "store", "export", "runtime", "int8_file"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Repeat the tests under other instructions, BLAS threads and versions."
    )
    parser.add_argument("--combination", action="append", choices=COMBINATIONS, help="this one alone")
    parser.add_argument("--list", action="store_true", help="print the combinations, and run nothing")
    options = parser.parse_args()
    names = options.combination or list(COMBINATIONS)
    if options.list:
        print("\n".join(f"{name}: {in_words(COMBINATIONS[name])}" for name in names))
        return 0
    pythons = found_pythons()
    results = {name: repeated(name, COMBINATIONS[name], pythons) for name in names}
    print("\n" + "\n".join(f"{name}: {said}" for name, (_, said) in results.items()))
    return 0 if all(passed for passed, _ in results.values()) else 1


def in_words(c: Combination) -> str:
    python = "this Python" if c.python == "own" else "a newer Python, if there is one"
    backends = ", ".join(c.backends)
    return f"{c.level} kernels, {c.threads} thread(s) of BLAS, the {c.numpy} NumPy, {python}; backends {backends}"


def repeated(name: str, c: Combination, pythons: dict[tuple[int, int], str]) -> tuple[bool, str]:
    """Run the tests under a combination; whether nothing failed, and what came out in words."""
    requirements, last = RELEASES[c.numpy]
    version = chosen_python(pythons, c.python, last)
    if version is None:
        return True, f"left out: no Python from 3.11 to {last[0]}.{last[1]} with its C headers was found here"
    folder, started = FOLDER / name, time.perf_counter()
    print(f"\n=== {name}: {in_words(c)}", flush=True)
    if c.python == "newer" and version == sys.version_info[:2]:
        print("No newer Python that this NumPy supports was found here: the tests run under the same one.", flush=True)
    copy_project(folder)
    python = make_environment(folder, pythons[version], c.backends, requirements)
    levels = answer(folder, python, "from minikd.kernels import native; print(*native.cpu_levels())").split()
    if c.level not in levels:
        return True, f"left out: this processor runs {', '.join(levels)}"
    made, started = time.perf_counter() - started, time.perf_counter()
    passed = run_tests(folder, c)
    taken = time.perf_counter() - started
    return passed, f"{counts(folder / 'tests.xml')}; {taken:.0f} s, and {made:.0f} s for the environment"


# --- Pythons ---


def found_pythons() -> dict[tuple[int, int], str]:
    """The Pythons of this machine by their version: the one that runs this, those on the PATH, those of pyenv.

    One that does not start, or lacks venv or its C headers, counts as not there.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [sys.executable]
    for minor in range(FIRST_PYTHON[1], 30):
        on_path = shutil.which(f"python3.{minor}")
        candidates += [on_path] if on_path else []
        candidates += [str(path) for path in sorted(pyenv.glob(f"3.{minor}.*/bin/python3.{minor}"))]
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        version = usable_version(candidate)
        if version is not None and version >= FIRST_PYTHON:
            found.setdefault(version, candidate)
    return found


PROBE = """
import ensurepip, pathlib, sys, sysconfig, venv
assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
print(*sys.version_info[:2])
"""


def usable_version(python: str) -> tuple[int, int] | None:
    """The version of a Python in which the project can be built, None for any other."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def chosen_python(found: Iterable[tuple[int, int]], which: str, last: tuple[int, int]) -> tuple[int, int] | None:
    """The version for a combination: one's own or else the newest up to `last`; None if there is none."""
    own = sys.version_info[:2]
    if which == "own" and own <= last:
        return own
    return max((version for version in found if version <= last), default=None)


# --- environments ---


def copy_project(folder: Path) -> None:
    """The project's files as they are now, also those that git does not know yet, in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def make_environment(folder: Path, python: str, backends: Iterable[str], requirements: Iterable[str]) -> Path:
    """An environment in the folder with the project, what these backends need, and these requirements; its Python."""
    subprocess.run([python, "-m", "venv", ".venv"], cwd=folder, check=True)
    ours = folder / ".venv" / "bin" / "python"
    extras = "numba,test" if "numba" in backends else "test"
    install = [ours, "-m", "pip", "install", "-q", "-e", f".[{extras}]", *requirements, *BESIDE]
    subprocess.run(install, cwd=folder, env=clean() | {"MINIKD_REQUIRE_C": "1"}, check=True)
    return ours


def clean() -> dict[str, str]:
    """The environment's variables without those that tune minikd, BLAS or the search for modules."""
    tuned = re.compile(r"MINIKD_|(OPENBLAS|OMP|MKL|BLIS)_NUM_THREADS$|PYTHON(PATH|HOME)$")
    return {name: value for name, value in os.environ.items() if not tuned.match(name)}


def answer(folder: Path, python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], cwd=folder, env=clean(), capture_output=True, text=True, check=True)
    return done.stdout


# --- tests ---


def run_tests(folder: Path, c: Combination) -> bool:
    """Run the tests in the folder; whether all passed. The command is printed, so that it can be given by hand."""
    tuned = {"MINIKD_CPU": c.level, "OPENBLAS_NUM_THREADS": str(c.threads), "MINIKD_REQUIRE_C": "1"}
    backends = [f"--minikd-backend={name}" for name in c.backends]
    tests = [f"tests/test_{name}.py" for group in TESTS.values() for name in group]
    pytest = [".venv/bin/python", "-m", "pytest", "-n", "2", "--dist", "worksteal", "--junitxml=tests.xml"]
    command = [*pytest, *backends, *tests]
    settings = " ".join(f"{name}={value}" for name, value in tuned.items())
    print(f"+ cd {shlex.quote(str(folder))} && {settings} {shlex.join(command)}", flush=True)
    return subprocess.run(command, cwd=folder, env=clean() | tuned, check=False).returncode == 0


def counts(path: Path) -> str:
    """What pytest wrote of its run, in words."""
    if not path.exists():
        return "the tests did not end"
    (suite,) = ElementTree.parse(path).getroot()
    tests, failed, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "skipped"))
    failed += int(suite.attrib["errors"])
    return f"{tests - failed - skipped} passed, {failed} failed, {skipped} skipped"


if __name__ == "__main__":
    sys.exit(main())
