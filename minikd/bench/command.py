"""The command: what to measure, one process after the other, and where the results go."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minikd.bench.cases import KERNELS, QUICK, shape_text
from minikd.bench.contenders import CONTENDERS, PEERS
from minikd.bench.machine import LARGEST, LARGEST_QUICK, describe
from minikd.bench.measure import LEAST_ROUNDS, Effort
from minikd.bench.report import markdown, ratios, tables
from minikd.bench.worker import CONDITIONS, Task, WorkerFailed, spawn
from minikd.errors import ArgumentError, DataError
from minikd.export.safetensors import write_whole
from minikd.ops import Shape
from minikd.report.table import show

FULL, SHORT = Effort(40, 8.0), Effort(LEAST_ROUNDS + 6, 0.5)
SHAPES = {shape_text(shape): shape for kernel in KERNELS.values() for shape in kernel.shapes}
README = ("README.md", "bench/README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minikd bench` and of bench/kernels.py."""
    what = parser.add_argument_group("what is measured (default: everything)")
    what.add_argument("--quick", action="store_true", help="a few kernels and shapes, one thread, under a minute")
    what.add_argument("--kernel", nargs="+", choices=list(KERNELS), metavar="NAME", help=", ".join(KERNELS))
    what.add_argument("--shape", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    peers = ", ".join(PEERS)
    what.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], metavar="NAME", help=f"{peers}, or none")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", nargs="+", choices=["1", "all"], help="1, all, or both (default: both)")
    how.add_argument("--no-alone", action="store_true", help="do not run each peer once more alone and unpinned")
    how.add_argument("--tuned-malloc", action="store_true", help="also with a malloc that keeps freed memory (glibc)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", default="kernels.json", metavar="FILE.json", help="the picture stands beside it as .png")
    out.add_argument("--add", action="store_true", help="keep what --out holds of other kernels, shapes and conditions")
    names = " and ".join(README)
    out.add_argument(
        "--update-readme",
        nargs="*",
        metavar="FILE.md",
        help="measure nothing; write the tables of --out between <!-- bench --> and <!-- end bench --> "
        f"in these files (default: {names}); <!-- bench softmax --> takes in that kernel alone",
    )


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes(path, options.update_readme)
        return 0
    report: dict[str, Any] = {
        "machine": describe(),
        "missing": {key: reason for key in wanted_contenders(options) if (reason := CONTENDERS[key].missing())},
        "settings": {name: value for name, value in sorted(vars(options).items()) if _is_setting(name)},
        "cases": [],
        "ratios": [],
    }
    before = _before(path, report["machine"]) if options.add else []
    for key, reason in report["missing"].items():
        print(f"{CONTENDERS[key].label} is left out: {reason}", file=sys.stderr)
    failed = False
    with tempfile.TemporaryDirectory(prefix="minikd-bench-") as folder, contextlib.ExitStack() as ending:
        ending.callback(_finish, report, path, before)
        for task in tasks(options, report["missing"], folder):
            failed |= not _measure(task, report)
    return int(failed)


def _is_setting(name: str) -> bool:
    return name in ("quick", "kernel", "shape", "peers", "threads", "no_alone", "tuned_malloc")


def wanted_contenders(options: argparse.Namespace) -> list[str]:
    """Ours, and the peers that were asked for."""
    peers = options.peers or list(PEERS)
    return [key for key, contender in CONTENDERS.items() if contender.ours or key in peers]


def tasks(options: argparse.Namespace, missing: Sequence[str] | dict[str, str], folder: str) -> Iterator[Task]:
    """One for each kernel and condition; alone, one for each kernel and peer.

    Raises
    ------
    ArgumentError : none of the kernels has one of the shapes.
    """
    chosen = {name: _shapes(name, options) for name in options.kernel or (QUICK if options.quick else KERNELS)}
    if not any(chosen.values()):
        asked = " ".join(options.shape)
        kinds = {name: ", ".join(map(shape_text, KERNELS[name].shapes)) for name in chosen}
        expected = "; ".join(f"{shapes} for {name}" for name, shapes in kinds.items())
        raise ArgumentError("minikd bench", "--shape", expected=f"one of {expected}", got=asked)
    effort, largest = (SHORT, LARGEST_QUICK) if options.quick else (FULL, LARGEST)
    for name, shapes in chosen.items():
        able = [k for k in wanted_contenders(options) if k not in missing and name in CONTENDERS[k].kernels]
        for condition in conditions(options) if shapes else ():
            peers = [key for key in able if key in PEERS]
            for group in [[key] for key in peers] if CONDITIONS[condition].alone else [able]:
                yield Task(name, shapes, condition, group, effort, folder, largest)


def _shapes(kernel: str, options: argparse.Namespace) -> tuple[Shape, ...]:
    """The shapes of a kernel that were asked for."""
    if options.shape:
        return tuple(shape for shape in KERNELS[kernel].shapes if shape_text(shape) in options.shape)
    return QUICK.get(kernel, KERNELS[kernel].shapes[:1]) if options.quick else KERNELS[kernel].shapes


def conditions(options: argparse.Namespace) -> list[str]:
    """The conditions that were asked for, in the order of the table."""
    threads = options.threads or (["1"] if options.quick else ["1", "all"])
    wanted = {
        "one": "1" in threads,
        "all": "all" in threads,
        "alone": not (options.no_alone or options.quick),
        "tuned": options.tuned_malloc,
    }
    return [name for name in CONDITIONS if wanted[name]]


def _measure(task: Task, report: dict[str, Any]) -> bool:
    """Run one task, add what it found to the report and say so; False if its process died."""
    began = time.monotonic()
    who = CONTENDERS[task.contenders[0]].label + " " if CONDITIONS[task.condition].alone else ""
    words = f"{task.kernel}, {who}{CONDITIONS[task.condition].label}"
    try:
        report["cases"] += spawn(task)
    except WorkerFailed as problem:
        print(f"{words}: the process failed and is left out:\n{problem}", file=sys.stderr)
        return False
    print(f"{words}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return True


def _before(path: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that the report at `path` holds already, if there is one.

    Raises
    ------
    DataError : they are of another machine, or of other versions, and so cannot stand beside new ones.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    for what in ("cpu", "cores", "cpu_level", "versions"):
        if old["machine"][what] != machine[what]:
            expected, fix = (
                f"a report of {what} {machine[what]}",
                "Write to another file with --out, or leave out --add.",
            )
            raise DataError(
                "minikd bench", "--add", expected=expected, got=f"{old['machine'][what]} in {path}", fix=fix
            )
    cases: list[dict[str, Any]] = old["cases"]
    return cases


def _identity(case: dict[str, Any]) -> tuple[Any, ...]:
    """What a case is of; alone, each peer has cases of its own."""
    alone = list(case["contenders"]) if CONDITIONS[case["condition"]].alone else []
    return (case["kernel"], *case["shape"], case["condition"], *alone)


def _finish(report: dict[str, Any], path: Path, before: Sequence[dict[str, Any]]) -> None:
    """Print the tables and write the files, also of a run that was interrupted."""
    if not report["cases"]:
        return
    for table in tables(report):
        show(table, sys.stdout)
        print()
    new = {_identity(case) for case in report["cases"]}
    report["cases"] += [case for case in before if _identity(case) not in new]
    report["cases"].sort(key=lambda case: list(KERNELS).index(case["kernel"]))
    report["ratios"] = ratios(report["cases"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    print(f"All figures are in {path}.")
    try:
        from minikd.bench.picture import roofline

        picture = roofline(report)
    except ImportError:
        print("The picture was left out: pip install 'minikd[cli]' brings matplotlib, which draws it.")
        return
    if picture:
        write_whole(path.with_suffix(".png"), picture)
        print(f"The picture is {path.with_suffix('.png')}.")


# --- the README ---

MARKED = re.compile(r"(<!-- bench((?: \w+)*) -->\n).*?(<!-- end bench -->)", re.DOTALL)


def update_readmes(path: Path, files: Sequence[str]) -> None:
    """Replace what stands between the markers of each file with the tables of the report at `path`.

    Raises
    ------
    DataError : there is no report, or a file that was named has no markers.
    """
    if not path.exists():
        fix = "Run the benchmark first, or name its file with --out."
        raise DataError("minikd bench", "--out", expected="an existing report", got=str(path), fix=fix)
    report = json.loads(path.read_text())
    for name in files or [name for name in README if Path(name).exists()]:
        before = Path(name).read_text()
        after, count = MARKED.subn(lambda m: f"{m[1]}{markdown(report, m[2].split())}\n{m[3]}", before)
        if not count and files:
            expected = "a file with <!-- bench --> and <!-- end bench --> in it"
            raise DataError("minikd bench", "--update-readme", expected=expected, got=name)
        if after != before:
            write_whole(Path(name), after.encode())
        print(f"{name}: {count} place{'s' * (count != 1)} brought up to date.")
