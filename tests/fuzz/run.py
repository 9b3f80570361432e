"""Fuzz one target with atheris, which is led by the coverage of the Python code that reads:

    pip install atheris
    python tests/fuzz/run.py --target idx --seconds 60

Each way in which something other than a refusal comes out is told once, and the bytes that do it are kept. Exits with 1
if there was any. libFuzzer's own lines stand between: executions, coverage, and at the end executions in a second.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LONGEST = 8192  # bytes of an input
MOST_MEMORY = 1024  # MiB of the process, and half of it in one piece
SLOWEST = 10  # seconds for one input
FOUND = "found"  # the folder for inputs while it runs
OWN_CHANGES = 0.5  # of the inputs; libFuzzer makes the others
# Whose coverage leads: what reads, here and in the libraries below it that are written in Python.
TRACED = ["minikd", "zipfile", "tomllib", "csv", "numpy.lib.format", "numpy.lib._format_impl"]


def main() -> int:
    """Fuzz in a process of its own, since libFuzzer ends the one that it runs in."""
    options = arguments()
    if options.inside:
        fuzz(options.target, options.seconds, options.seed, options.inside)
        return 0
    kept = options.findings / options.target
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside", work], check=False)
        found = [path.name for path in Path(work).glob(f"{FOUND}/*")]
        if found:
            shutil.copytree(Path(work, FOUND), kept, dirs_exist_ok=True)
    print(f"{options.target}: {len(found)} findings" + (f", in {kept}" if found else ""))
    return 1 if found or done.returncode else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz one target with atheris.")
    parser.add_argument("--target", required=True, help="a name in tests/fuzz/targets.py")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are kept")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def fuzz(name: str, seconds: int, seed: int, work: Path) -> None:
    """Run libFuzzer on a target in this process."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=TRACED):
        targets = import_module("fuzz.targets")
    target = targets.TARGETS.get(name)
    if target is None or target.missing():
        sys.exit(target.missing() if target else f"no target {name!r}: there are {', '.join(targets.TARGETS)}")
    corpus, whole = work / "corpus", work / "whole"
    for folder in (corpus, whole, work / FOUND):
        folder.mkdir()
    for k, raw in enumerate(target.seeds(whole)):
        (corpus / str(k)).write_bytes(raw)
    reader, told = targets.Reader(target, work / "slot"), Findings(work / FOUND)

    def attempt(raw: bytes) -> None:
        try:
            reader(raw)
        except Exception as error:
            told.note(error, raw)

    def change(raw: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() >= OWN_CHANGES:
            return bytes(atheris.Mutate(raw, most))
        return rng.choice(rng.choice(target.changes))(raw, rng)[:most]

    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={SLOWEST}", f"-seed={seed}"]
    limits += [f"-rss_limit_mb={MOST_MEMORY}", f"-malloc_limit_mb={MOST_MEMORY // 2}"]
    limits += [f"-artifact_prefix={told.folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], attempt, custom_mutator=change)
    atheris.Fuzz()


class Findings:
    """What came out that is no refusal: each kind is told and kept once, by its type and the line it came from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._seen: set[tuple[Any, ...]] = set()

    def note(self, error: Exception, raw: bytes) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/minikd/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        if (type(error), place) in self._seen:
            return
        self._seen.add((type(error), place))
        name = f"{type(error).__name__}-{place.replace(':', '-')}"
        (self.folder / name).write_bytes(raw)
        print(f"FOUND {name}: {str(error)[:200]!r}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
