"""Which lines and branches the tests reach: of minikd/ as coverage.py counts them, of csrc/ as gcov does.

    pip install coverage
    python tests/reached.py python                      # the whole suite; more arguments go to pytest
    python tests/reached.py c                           # the tests of the C kernels and of libminikd
    python tests/reached.py c --missing                 # and the numbers of the lines and branches that none reached

The C code is built in a copy without optimisation, by a compiler that adds gcc's counters to every object. Each file of
csrc/ is compiled for several levels of instructions and two types of number: what one of them reached counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# Appended to every command of the compiler, so that they are the last word. Threads count, too. No function is
# written into those that call it: there, one line would have the branches of all its copies.
COUNTERS = "-O0 --coverage -fprofile-update=atomic -Dalways_inline=unused"
# Not those of other backends, and not the one that looks at the library's symbols, among which the counters' are.
CHOSEN = "not numba and not numpy and not exports_the_functions_of_its_header"
# Tests that are run at every level of instructions, and those that ask for each level themselves.
AT_EACH_LEVEL = ("ops", "steps")
ONCE = ("native", "products", "divergences", "linear_losses", "launch", "plan", "threads", "quantise", "library")


class Reached(NamedTuple):
    """What became of the lines and branches of one file: by line, and by line and number of the branch."""

    lines: dict[int, bool]
    branches: dict[tuple[int, int], bool]

    def add(self, line: dict[str, Any]) -> None:
        """One line of one object, as gcov tells of it."""
        number = line["line_number"]
        self.lines[number] = self.lines.get(number, False) or line["count"] > 0
        for k, branch in enumerate(line["branches"]):
            self.branches[number, k] = self.branches.get((number, k), False) or branch["count"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Show which lines and branches the tests reach.")
    parser.add_argument("language", choices=("python", "c"))
    parser.add_argument("--missing", action="store_true", help="name the lines that no test reached")
    options, rest = parser.parse_known_args()
    return (of_python if options.language == "python" else of_c)(options.missing, rest)


def of_python(missing: bool, arguments: list[str]) -> int:
    """Run the suite, children included, and print coverage.py's table; what pytest exits with."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "COVERAGE_FILE": str(Path(folder, "counts")),
            "NUMBA_CACHE_DIR": folder,  # nothing is compiled yet: what takes part in compiling is reached
            "PYTHONPATH": str(ROOT),
        }

        def coverage(*command: str) -> int:
            return subprocess.run([sys.executable, "-m", "coverage", *command], cwd=ROOT, env=environment).returncode

        code = coverage("run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        coverage("combine", "--quiet")
        coverage("report", "--skip-covered", *["--show-missing"] * missing)
    return code


def of_c(missing: bool, arguments: list[str]) -> int:
    """Build a copy with counters, run the tests that call its C code, and print what they reached."""
    with tempfile.TemporaryDirectory() as folder:
        code = run_tests(Path(folder), arguments)
        print_table(counted(Path(folder)), missing)
    return code


def run_tests(folder: Path, arguments: list[str]) -> int:
    """The largest code that a run of pytest exits with."""
    for name in ("minikd", "csrc", "tests", "docs", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    environment = {
        **os.environ,
        "PATH": f"{counting_compiler(folder)}{os.pathsep}{os.environ['PATH']}",
        "CC": "gcc",
        "PYTHONPATH": str(folder),
        "MINIKD_BACKEND": "c",
        "MINIKD_REQUIRE_C": "1",
        "MINIKD_SANITIZE": "1",  # the library's own tests in C, too
    }

    def python(*command: str, **more: str) -> int:
        return subprocess.run([sys.executable, *command], cwd=folder, env={**environment, **more}).returncode

    if python("setup.py", "-q", "build_ext", "--inplace"):
        sys.exit("the C kernels could not be built with gcc and its counters")
    (folder / "kept").mkdir()
    code = 0
    for level in (*levels(environment), ""):
        files = [f"tests/test_{name}.py" for name in (AT_EACH_LEVEL if level else ONCE)]
        kept = f"--basetemp={folder / 'kept' / (level or 'all')}"  # libraries that tests build count there
        chosen = ["-q", "-p", "no:cacheprovider", "-k", CHOSEN, kept, *arguments, *files]
        code = max(code, python("-m", "pytest", *chosen, **{"MINIKD_CPU": level} if level else {}))
    return code


def counting_compiler(folder: Path) -> Path:
    """A folder with compilers, gcc by all its names, that add the counters."""
    gcc = shutil.which("gcc")
    if gcc is None or shutil.which("gcov") is None:
        sys.exit("needs gcc and gcov")
    programs = folder / "compilers"
    programs.mkdir()
    for name in ("gcc", "cc"):
        (programs / name).write_text(f'#!/bin/sh\nexec {gcc} "$@" {COUNTERS}\n', "utf-8")
        (programs / name).chmod(0o755)
    return programs


def levels(environment: dict[str, str]) -> list[str]:
    """The levels of instructions that this processor runs."""
    code = "from minikd.kernels import native; print(*native.cpu_levels())"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def counted(folder: Path) -> dict[str, Reached]:
    """What was reached of each file of csrc/, by its path there."""
    found: dict[str, Reached] = defaultdict(lambda: Reached({}, {}))
    for path in sorted(folder.rglob("*.gcda")):
        for told in gcov(path):
            for file in told["files"]:
                source = Path(told["current_working_directory"], file["file"]).resolve()
                if "csrc" in source.parts and source.name != "check.c":  # which is a test itself
                    name = "/".join(source.parts[len(source.parts) - source.parts[::-1].index("csrc") :])
                    for line in file["lines"]:
                        found[name].add(line)
    return dict(sorted(found.items()))


def gcov(path: Path) -> Iterator[dict[str, Any]]:
    """What gcov tells of one object's counters."""
    command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        yield json.loads(line)


def print_table(found: dict[str, Reached], missing: bool) -> None:
    """A line for each file, and one for all of them."""
    print(f"\n{'file':32}{'lines':>8}{'reached':>9}{'branches':>10}{'reached':>9}")
    for name, reached in found.items():
        print_row(name, list(reached.lines.values()), list(reached.branches.values()))
        if missing:
            print_missing(reached)
    lines = [was for reached in found.values() for was in reached.lines.values()]
    branches = [was for reached in found.values() for was in reached.branches.values()]
    print_row("all of csrc/", lines, branches)


def print_row(name: str, lines: list[bool], branches: list[bool]) -> None:
    print(f"{name:32}{len(lines):8}{share(lines):>9}{len(branches):10}{share(branches):>9}")


def share(reached: list[bool]) -> str:
    return f"{sum(reached) / len(reached):.1%}" if reached else "-"


def print_missing(reached: Reached) -> None:
    """The lines that none reached, and of those that one reached the branches that were not taken."""
    lines = [number for number, was in sorted(reached.lines.items()) if not was]
    branches = [
        f"{number}.{k}" for (number, k), was in sorted(reached.branches.items()) if not was and number not in lines
    ]
    for what, missed in (("lines", lines), ("branches", branches)):
        if missed:
            print(f"    {what} {', '.join(map(str, missed))}")


if __name__ == "__main__":
    sys.exit(main())
