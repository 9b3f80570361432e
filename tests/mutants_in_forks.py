"""A pytest plugin that collects the tests once and then tries mutants: each in a forked process, until a test fails.

What mutmut's own runner spends most time on, collecting the tests anew for each mutant, is done once here; so a mutant
that its first tests kill costs a few hundredths of a second. Names, results and files are mutmut's.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mutmut.mutation.trampoline import set_mutant_under_test

SURVIVED, KILLED, NO_TEST = 0, 1, 33
NONE, FAIL = "", "fail"  # in place of a mutant's name: the code as it is; each changed function raises
SECONDS_MORE = 5.0
QUICK_CASES, QUICK_SECONDS = 3, 0.2


class Trials:
    """Tries mutants, some at a time, and writes what became of each into mutmut's files as soon as it is known.

    Parameters
    ----------
    names : the mutants.
    results : the folder of mutmut's files.
    jobs : how many processes run at the same time.
    quick : take few cases of a test that has many, and no test that takes long. What is killed so is killed; what lives
        may be tried again with all tests.
    """

    def __init__(self, names: Sequence[str], results: Path, jobs: int, quick: bool) -> None:
        self.names, self.jobs, self.quick = names, jobs, quick
        self.files: dict[str, Path] = {}
        for path in results.rglob("*.meta"):
            self.files |= dict.fromkeys(json.loads(path.read_text("utf-8"))["exit_code_by_key"], path)
        known = json.loads((results / "mutmut-stats.json").read_text("utf-8"))
        self.seconds: dict[str, float] = known["duration_by_test"]
        self.reaching: dict[str, list[str]] = known["tests_by_mangled_function_name"]
        self.running: dict[int, tuple[str, int]] = {}  # by process: its mutant, and where it tells the test that failed
        self.kills: dict[str, Counter[str]] = {}  # by function: which tests killed how many of its mutants
        self.tell = -1  # in a forked process: where to

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Try all mutants instead of running the tests once."""
        if session.testsfailed:
            return None  # pytest's own loop says which files cannot be collected
        self.items, self.plugins = {item.nodeid: item for item in session.items}, session.config.pluginmanager
        self.expect(NONE, SURVIVED, "The tests fail on the code as it is, one after the other as mutants are tried.")
        self.expect(FAIL, KILLED, "The tests do not notice functions that raise: is another copy of minikd imported?")
        for name in self.names:
            if len(self.running) == self.jobs:
                self.finish_one()
            tests = self.tests_of(name)
            if tests:
                self.start(name, tests)
            else:
                self.note(name, NO_TEST)
        while self.running:
            self.finish_one()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first test that fails ends its process."""
        if report.failed:
            os.write(self.tell, report.nodeid.encode())
            os._exit(KILLED)

    def expect(self, name: str, wanted: int, otherwise: str) -> None:
        self.start(name, self.tests_of(name))
        if self.finish_one() != wanted:
            pytest.exit(otherwise, returncode=pytest.ExitCode.TESTS_FAILED)

    def tests_of(self, name: str) -> list[str]:
        """The tests that reach a mutant's function (all that reach any, where it is no mutant).

        First come those that killed other mutants of this function, then one case of each test, the fastest first, then
        another of each and so on.
        """
        functions = {function_of(mutant) for mutant in (self.names if name in (NONE, FAIL) else [name])}
        reaching = {test for function in functions for test in self.reaching.get(function, ())}
        place: dict[str, int] = {}
        cases: Counter[str] = Counter()
        for test in sorted(reaching & self.items.keys(), key=lambda test: zlib.crc32(test.encode())):
            place[test] = cases[test.partition("[")[0]]
            cases[test.partition("[")[0]] += 1
        kills = self.kills.get(function_of(name), Counter())
        few = [test for test, k in place.items() if k < QUICK_CASES and self.seconds[test] < QUICK_SECONDS]
        return sorted(few if self.quick else place, key=lambda test: (-kills[test], place[test], self.seconds[test]))

    def start(self, name: str, tests: Sequence[str]) -> None:
        """Run the tests of a mutant in a process of its own."""
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            self.running[pid] = name, read
            return
        try:
            self.tell = write
            self.plugins.unregister(name="terminalreporter")
            set_mutant_under_test(name)
            self.limit(2 * (sum(self.seconds[test] for test in tests) + SECONDS_MORE))
            for item, following in pairwise([*(self.items[test] for test in tests), None]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            os._exit(SURVIVED)
        except BaseException:  # a mutant may raise what pytest does not catch, such as KeyboardInterrupt
            os._exit(KILLED)

    def limit(self, seconds: float) -> None:
        """End this process after so much work, and where it waits for ever."""
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        signal.alarm(20 * int(seconds))

    def finish_one(self) -> int:
        """Wait for the next process to end and note what became of its mutant."""
        pid, status = os.wait()
        (name, read), code = self.running.pop(pid), os.waitstatus_to_exitcode(status)
        with os.fdopen(read, "rb") as told:
            self.kills.setdefault(function_of(name), Counter()).update(told.read().decode().splitlines())
        if name not in (NONE, FAIL):
            self.note(name, code)
        return code

    def note(self, name: str, code: int) -> None:
        path = self.files[name]
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
        told["exit_code_by_key"][name] = code
        new = path.with_suffix(".new")
        new.write_text(json.dumps(told, indent=4), "utf-8")
        new.replace(path)


def function_of(mutant: str) -> str:
    return mutant.partition("__mutmut_")[0]
