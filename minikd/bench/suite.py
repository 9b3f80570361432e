"""What every benchmark does alike: run its tasks one process after the other, keep the figures, write the tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minikd.bench.contenders import Contender
from minikd.bench.machine import PACKAGES, describe
from minikd.bench.worker import CONDITIONS, WorkerFailed, spawn
from minikd.errors import DataError
from minikd.report.table import Table, show
from minikd.safetensors import write_whole

README = ("README.md", "bench/README.md")
Case = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """One benchmark: what it measures, with whom, and what it makes of the figures.

    Attributes
    ----------
    name : as messages name it.
    marker : the word between which its tables stand in a README: <!-- marker --> … <!-- end marker -->.
    contenders : by name, ours among them.
    worker : the module whose `main` measures a task in a process of its own.
    settings : the options that say what is measured; the report keeps them.
    tasks : ``tasks(options, missing, folder)`` gives one task for each process.
    subject : what a task measures, in a few words.
    identity : what a case is of, alone or not; a new case takes the place of an old one with the same identity.
    place : where a case stands in the report, as a sort key.
    ratios, tables, markdown : what is made of the cases; see `minikd.bench.report`.
    picture : draws the report as PNG, or None.
    packages : those whose versions the report names.
    """

    name: str
    marker: str
    contenders: Mapping[str, Contender]
    worker: str
    settings: tuple[str, ...]
    tasks: Callable[[argparse.Namespace, Mapping[str, str], str], Iterator[Any]]
    subject: Callable[[Any], str]
    identity: Callable[[Case], tuple[Any, ...]]
    place: Callable[[Case], Any]
    ratios: Callable[[Sequence[Case]], list[dict[str, Any]]]
    tables: Callable[[Mapping[str, Any]], Iterable[Table]]
    markdown: Callable[[Mapping[str, Any], Sequence[str]], str]
    picture: Callable[[Mapping[str, Any]], bytes | None] = lambda report: None
    packages: tuple[str, ...] = PACKAGES

    def add_arguments(
        self, parser: argparse.ArgumentParser, out: str, more: str = "", also: Mapping[str, Contender] | None = None
    ) -> None:
        """The options that every benchmark has.

        `more` says what a marker may name besides, `also` who takes part if another option says so.
        """
        every = {**self.contenders, **(also or {})}
        peers = [key for key, contender in every.items() if not contender.ours]
        what = parser.add_argument_group("with whom and how")
        listed = ", ".join(peers)
        what.add_argument("--peers", nargs="+", choices=[*peers, "none"], metavar="NAME", help=f"{listed}, or none")
        what.add_argument("--threads", nargs="+", choices=["1", "all"], help="1, all, or both")
        what.add_argument("--no-alone", action="store_true", help="do not run each peer once more alone and unpinned")
        results = parser.add_argument_group("results")
        results.add_argument("--out", default=out, metavar="FILE.json", help="where the figures go")
        results.add_argument("--add", action="store_true", help="keep what --out holds of everything else")
        add_readme_option(results, self.marker, more)

    def run(self, options: argparse.Namespace) -> int:
        """Measure and report, or bring a README up to date; returns the exit code."""
        path = Path(options.out)
        if options.update_readme is not None:
            self.update_readmes(path, options.update_readme)
            return 0
        wanted = wanted_contenders(self.contenders, options)
        report: dict[str, Any] = {
            "machine": describe(self.packages),
            "missing": {key: reason for key in wanted if (reason := self.contenders[key].missing())},
            "settings": {name: value for name, value in sorted(vars(options).items()) if name in self.settings},
            "cases": [],
            "ratios": [],
        }
        before = self._before(path, report["machine"]) if options.add else []
        for key, reason in report["missing"].items():
            print(f"{self.contenders[key].label} is left out: {reason}", file=sys.stderr)
        failed = False
        with tempfile.TemporaryDirectory(prefix="minikd-bench-") as folder, contextlib.ExitStack() as ending:
            ending.callback(self._finish, report, path, before)
            for task in self.tasks(options, report["missing"], folder):
                failed |= not self._measure(task, report)
        return int(failed)

    def _measure(self, task: Any, report: dict[str, Any]) -> bool:
        """Run one task, add what it found to the report and say so; False if its process died."""
        began = time.monotonic()
        who = self.contenders[task.contenders[0]].label + " " if CONDITIONS[task.condition].alone else ""
        words = f"{self.subject(task)}, {who}{CONDITIONS[task.condition].label}"
        try:
            report["cases"] += spawn(task, self.worker)
        except WorkerFailed as problem:
            print(f"{words}: the process failed and is left out:\n{problem}", file=sys.stderr)
            return False
        print(f"{words}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return True

    def _before(self, path: Path, machine: dict[str, Any]) -> list[Case]:
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
                expected = f"a report of {what} {machine[what]}"
                got = f"{old['machine'][what]} in {path}"
                fix = "Write to another file with --out, or leave out --add."
                raise DataError(self.name, "--add", expected=expected, got=got, fix=fix)
        cases: list[Case] = old["cases"]
        return cases

    def _finish(self, report: dict[str, Any], path: Path, before: Sequence[Case]) -> None:
        """Print the tables and write the files, also of a run that was interrupted."""
        if not report["cases"]:
            return
        for table in self.tables(report):
            show(table, sys.stdout)
            print()
        new = {self.identity(case) for case in report["cases"]}
        report["cases"] += [case for case in before if self.identity(case) not in new]
        report["cases"].sort(key=self.place)
        report["ratios"] = self.ratios(report["cases"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
        print(f"All figures are in {path}.")
        try:
            picture = self.picture(report)
        except ImportError:
            print("The picture was left out: pip install 'minikd[cli]' brings matplotlib, which draws it.")
            return
        if picture:
            write_whole(path.with_suffix(".png"), picture)
            print(f"The picture is {path.with_suffix('.png')}.")

    def update_readmes(self, path: Path, files: Sequence[str]) -> None:
        """Replace what stands between the markers of each file with the tables of the report at `path`."""
        update_readmes(self.name, self.marker, path, files, self.markdown)


def wanted_contenders(contenders: Mapping[str, Contender], options: argparse.Namespace) -> list[str]:
    """Ours, and the peers that were asked for."""
    return [key for key, c in contenders.items() if c.ours or not options.peers or key in options.peers]


def wanted_conditions(wanted: Mapping[str, bool]) -> list[str]:
    """The conditions that are true here, in the order of the table."""
    return [name for name in CONDITIONS if wanted.get(name)]


# --- the README ---


def add_readme_option(parser: argparse._ActionsContainer, marker: str, more: str = "") -> None:
    """The option --update-readme: None without it, else the files that were named."""
    names = " and ".join(README)
    parser.add_argument(
        "--update-readme",
        nargs="*",
        metavar="FILE.md",
        help=f"measure nothing; write the tables of --out between <!-- {marker} --> and <!-- end {marker} --> "
        f"in these files (default: {names}){more}",
    )


def update_readmes(
    name: str,
    marker: str,
    path: Path,
    files: Sequence[str],
    markdown: Callable[[Mapping[str, Any], Sequence[str]], str],
) -> None:
    """Replace what stands between the markers of each file with ``markdown(report, words of the first marker)``.

    Raises
    ------
    DataError : there is no report at `path`, or none of the files that were named has the markers.
    """
    if not path.exists():
        fix = "Run the benchmark first, or name its file with --out."
        raise DataError(name, "--out", expected="an existing report", got=str(path), fix=fix)
    report = json.loads(path.read_text())
    marked = re.compile(rf"(<!-- {marker}((?: \w+)*) -->\n).*?(<!-- end {marker} -->)", re.DOTALL)
    places = 0
    for file in files or [file for file in README if Path(file).exists()]:
        before = Path(file).read_text()
        after, count = marked.subn(lambda m: f"{m[1]}{markdown(report, m[2].split())}\n{m[3]}", before)
        if after != before:
            write_whole(Path(file), after.encode())
        if count:
            print(f"{file}: {count} place{'s' * (count != 1)} brought up to date.")
        places += count
    if not places and files:
        expected = f"a file with <!-- {marker} --> and <!-- end {marker} --> in it"
        raise DataError(name, "--update-readme", expected=expected, got=", ".join(files))


# --- in a checkout ---


def script(
    file: str,
    text: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """A script of bench/: results stand beside it under its name, and its READMEs are those of the checkout."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=form, allow_abbrev=False)
    add_arguments(parser)
    here = Path(file).resolve()
    parser.set_defaults(out=str(here.with_suffix(".json")))
    options = parser.parse_args()
    if options.update_readme == []:
        pages = (here.parent / "README.md", here.parents[1] / "README.md")
        options.update_readme = [str(page) for page in pages if page.exists()]
    return run(options)
