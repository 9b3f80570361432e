"""Mutation testing with mutmut: how many small changes of the losses, the tape and the binding of kernels tests notice.

    pip install mutmut
    python tests/mutate.py --count 200

Makes the mutants that pyproject.toml asks for, tries a sample of them drawn by a seed (all with --count 0), each with
the tests that reach the changed function, and prints those that survive. What was tried before is not tried again, so a
run that was stopped goes on when it is started anew; --again tries those anew that lived. --quick leaves out most cases
of tests that have many: all mutants in a quarter of an hour, and what lives then with --again. Those that are known to
make no difference are in tests/mutants_that_live.toml, each with its reason. Exits with 1 if fewer than 90 % of the
others are killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MUTANTS, KNOWN = ROOT / "mutants", ROOT / "tests" / "mutants_that_live.toml"
FIRST = "minikd.tape.x_is_recording*"  # a name that matches none or few, with which all are made
LIVED = (0, 5, 33)  # mutmut's codes: survived, no test reaches it; whatever else a mutant ends with has killed it
LEAST = 0.9
SAMPLE_INPUTS = re.compile(r"_(example|labels|probabilities|pairs|masked|extreme)__mutmut")  # which make those of tests


def main() -> int:
    parser = argparse.ArgumentParser(description="Try a sample of mutants.")
    parser.add_argument("--count", type=int, default=200, help="mutants that are tried; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--again", action="store_true", help="try those again that lived before")
    parser.add_argument("--quick", action="store_true", help="few cases of each test, and no test that takes long")
    parser.add_argument("--jobs", type=int, default=2, help="processes at the same time")
    options = parser.parse_args()
    os.environ.setdefault("HYPOTHESIS_PROFILE", "mutants")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    make_all()
    names = sorted(name for name in codes() if options.only in name and not SAMPLE_INPUTS.search(name))
    if options.count:
        names = sorted(random.Random(options.seed).sample(names, min(options.count, len(names))))
    before, known = codes(), tomllib.loads(KNOWN.read_text("utf-8"))["mutant"]
    again = {n for n in names if options.again and before[n] in LIVED and not reason(changed_lines(n), n, known)}
    untried = [n for n in names if before[n] is None or n in again]
    try_out(untried, options.jobs, options.quick)
    return report(names)


def make_all() -> None:
    """Let mutmut write the mutants, and find the tests that reach each function and how long they take."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if any(failure in done.stdout for failure in ("failed to collect stats", "Failed to run clean test")):
        sys.exit(f"The tests fail on the code as it is:\n{done.stdout[-2000:]}")


def try_out(names: Sequence[str], jobs: int, quick: bool) -> None:
    """Try these mutants, with the tests and pytest's options of pyproject.toml."""
    if not names:
        return
    sys.path.insert(0, str(MUTANTS))  # so that it is the changed minikd that tests import
    import pytest
    from mutants_in_forks import Trials

    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutmut"]
    options = ["--rootdir=.", "--tb=native", "-p", "no:faulthandler", *told["pytest_add_cli_args"]]
    options += told["pytest_add_cli_args_test_selection"]
    with chdir(MUTANTS):
        if pytest.main(options, plugins=[Trials(names, MUTANTS, jobs, quick)]) != pytest.ExitCode.OK:
            sys.exit("The mutants could not be tried.")


def codes() -> dict[str, int | None]:
    """Each mutant's name with what its tests exited with, None for one that was not tried."""
    found: dict[str, int | None] = {}
    for path in MUTANTS.rglob("*.meta"):
        found |= json.loads(path.read_text("utf-8"))["exit_code_by_key"]
    return found


def report(names: Sequence[str]) -> int:
    """Print what became of these mutants, and a table of it; 0 if enough that make a difference were killed."""
    found, known = codes(), tomllib.loads(KNOWN.read_text("utf-8"))["mutant"]
    tried = [name for name in names if found[name] is not None]
    alive = {name for name in tried if found[name] in LIVED}
    harmless: set[str] = set()
    for name in sorted(alive):
        change = changed_lines(name)
        why = reason(change, name, known)
        harmless |= {name} if why else set()
        print(f"\n{name}: {why or 'SURVIVED'}", *change, sep="\n")
    print("\n| module | tried | killed | make no difference | killed of the others |\n|---|---:|---:|---:|---:|")
    modules = sorted({module_of(name) for name in tried})
    for title, wanted in [*((f"`{module}`", {module}) for module in modules), ("all", set(modules))]:
        of_these = {name for name in tried if module_of(name) in wanted}
        killed, counted = len(of_these - alive), len(of_these - harmless)
        print(f"| {title} | {len(of_these):,} | {killed:,} | {len(of_these & harmless)} | {killed / counted:.1%} |")
    enough = len(tried) - len(alive) >= LEAST * (len(tried) - len(harmless))
    return 0 if tried and enough else 1


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def changed_lines(name: str) -> list[str]:
    """The lines of a mutant's diff that were taken out and put in."""
    from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant

    with chdir(ROOT):
        lines = get_diff_for_mutant(name, path=find_mutant(name).path).splitlines()
    return [
        line[0] + " " + line[1:].strip() for line in lines if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")
    ]


def reason(change: Sequence[str], name: str, known: Sequence[dict[str, Any]]) -> str:
    """Why a mutant that lives makes no difference; an empty text if nothing is known."""
    return next((k["reason"] for k in known if is_of(k, name, change)), "") or of_strictness(change)


def is_of(known: dict[str, Any], name: str, change: Sequence[str]) -> bool:
    """Whether a mutant is the known one: of this function or Class.method, with this line put in."""
    function = name.rpartition(".")[2].partition("__mutmut_")[0]
    function = function.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in function else function.removeprefix("x_")
    return known["function"] == function and f"+ {known['becomes']}" in change


def of_strictness(change: Sequence[str]) -> str:
    """Why a mutant that only lets `zip` take unequal lengths lives; an empty text for any other."""
    bare = {re.sub(r", (strict=\w+)?(?=\))", "", line[2:]) for line in change}
    return "the lengths agree always, which strict says to readers" if len(bare) == 1 else ""


if __name__ == "__main__":
    sys.exit(main())
