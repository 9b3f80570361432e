"""Mutation testing with mutmut: how many small changes of the losses, the tape and the binding of kernels tests notice.

    pip install mutmut
    python tests/mutate.py --count 200

Makes the mutants that pyproject.toml asks for, tries a sample of them drawn by a seed (all with --count 0), each with
the tests that run the changed function, and prints those that survive. Those that are known to make no difference are
in tests/mutants_that_live.toml, each with its reason. Exits with 1 if fewer than 90 % of the others are killed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MUTANTS, KNOWN = ROOT / "mutants", ROOT / "tests" / "mutants_that_live.toml"
FIRST = "minikd.tape.x_is_recording*"  # a name that matches none or few, with which all are made
SURVIVED, NO_TEST = (0,), (5, 33)  # mutmut's codes of exit; whatever else a mutant ends with has killed it
LEAST = 0.9
SAMPLE_INPUTS = re.compile(r"_(example|labels|probabilities|pairs|masked|extreme)__mutmut")  # which make those of tests


def main() -> int:
    parser = argparse.ArgumentParser(description="Try a sample of mutants.")
    parser.add_argument("--count", type=int, default=200, help="mutants that are tried; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    options = parser.parse_args()
    mutmut("run", "--max-children", "1", FIRST)
    names = sorted(name for name in codes() if options.only in name and not SAMPLE_INPUTS.search(name))
    if options.count:
        names = sorted(random.Random(options.seed).sample(names, min(options.count, len(names))))
    mutmut("run", "--max-children", "1", *names)
    return report(names)


def mutmut(*arguments: str) -> str:
    """What mutmut prints; it runs in the root, where its configuration is."""
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if any(failure in done.stdout for failure in ("failed to collect stats", "Failed to run clean test")):
        sys.exit(f"The tests fail on the code as it is:\n{done.stdout[-2000:]}")
    return done.stdout


def codes() -> dict[str, int | None]:
    """Each mutant's name with what its tests exited with, None for one that was not tried."""
    found: dict[str, int | None] = {}
    for path in MUTANTS.rglob("*.meta"):
        found |= json.loads(path.read_text("utf-8"))["exit_code_by_key"]
    return found


def report(names: Iterable[str]) -> int:
    """Print what became of these mutants; 0 if enough of those that make a difference were killed."""
    found, known = codes(), tomllib.loads(KNOWN.read_text("utf-8"))["mutant"]
    tried = [name for name in names if found[name] is not None]
    alive = [name for name in tried if found[name] in SURVIVED + NO_TEST]
    harmless = 0
    for name in alive:
        change = list(changed_lines(name))
        reason = next((k["reason"] for k in known if is_of(k, name, change)), None) or of_strictness(change)
        harmless += bool(reason)
        print(f"\n{name}: {reason or 'SURVIVED'}", *change, sep="\n")
    killed, counted = len(tried) - len(alive), len(tried) - harmless
    print(f"\n{len(tried)} tried: {killed} killed, {len(alive)} alive, of which {harmless} make no difference")
    print(f"{killed / max(counted, 1):.1%} of those that make a difference were killed")
    return 0 if tried and killed >= LEAST * counted else 1


def changed_lines(name: str) -> Iterator[str]:
    """The lines of a mutant's diff that were taken out and put in."""
    for line in mutmut("show", name).splitlines():
        if line[:1] in ("-", "+") and line[:3] not in ("---", "+++"):
            yield line[0] + " " + line[1:].strip()


def is_of(known: dict[str, Any], name: str, change: list[str]) -> bool:
    """Whether a mutant is the known one: of this function, with this line put in."""
    return f".{known['function']}__mutmut" in name.replace("x_", "", 1) and f"+ {known['becomes']}" in change


def of_strictness(change: list[str]) -> str:
    """Why a mutant that only lets `zip` take unequal lengths lives; an empty text for any other."""
    bare = {re.sub(r", (strict=\w+)?(?=\))", "", line[2:]) for line in change}
    return "the lengths agree always, which strict says to readers" if len(bare) == 1 else ""


if __name__ == "__main__":
    sys.exit(main())
