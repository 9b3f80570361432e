"""One process that measures: its threads, its processors and its malloc are settled before anything is imported.

It reads a task as JSON from stdin and writes its cases to the file that it was named.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd
from minikd.bench.cases import KERNELS, Inputs, Kernel, shape_text
from minikd.bench.contenders import CONTENDERS, Bound, Contender
from minikd.bench.machine import LARGEST, patterns
from minikd.bench.measure import Effort, Timing, interleave
from minikd.kernels.native import usable_cpus
from minikd.ops import Shape

# --- the conditions ---

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "MINIKD_NUM_THREADS",
)
ONE_XLA_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
# Memory that was freed stays in the process, and large blocks are not mapped anew each time (glibc).
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}


class Condition(NamedTuple):
    """How contenders run: with how many threads (0: all), each by itself or interleaved, with which malloc.

    Those that are alone are neither pinned nor told a number of threads.
    """

    label: str
    threads: int
    alone: bool = False
    tuned: bool = False

    def environment(self) -> dict[str, str]:
        """The environment of the process; what this one was told of threads and malloc is not handed on."""
        ours = {*THREAD_VARIABLES, *TUNED_MALLOC, "XLA_FLAGS"}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        package = str(Path(minikd.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH", "")]))
        if not self.alone:
            count = str(self.threads or len(usable_cpus()))
            environment |= dict.fromkeys(THREAD_VARIABLES, count)
            environment |= {"XLA_FLAGS": ONE_XLA_THREAD} if self.threads == 1 else {}
        return environment | (TUNED_MALLOC if self.tuned else {})

    def processors(self) -> list[int]:
        """The processors of the process: the last one for one thread, since the first serves interrupts."""
        usable = usable_cpus()
        return usable if self.alone or not self.threads else usable[-self.threads :]


CONDITIONS = {
    "one": Condition("one thread, interleaved", 1),
    "all": Condition("all threads, interleaved", 0),
    "alone": Condition("alone, unpinned", 0, alone=True),
    "tuned": Condition("one thread, interleaved, tuned malloc", 1, tuned=True),
    "gpu": Condition("on the GPU, interleaved", 0),
}


@dataclass
class Task:
    """What one process measures: the contenders on one kernel, in one condition."""

    kernel: str
    shapes: Sequence[Shape]
    condition: str
    contenders: Sequence[str]
    effort: Effort
    references: str  # a folder in which the processes share the float64 results
    largest: int = LARGEST  # bytes of the largest array that bandwidth is taken with


# --- in the process that asks ---


class WorkerFailed(Exception):
    """The process died; the text is the end of what it wrote."""


def spawn(task: Any, module: str = "minikd.bench.worker") -> list[dict[str, Any]]:
    """Run the task in a process of its own, by the module's `main`, and return its cases."""
    condition = CONDITIONS[task.condition]
    with tempfile.TemporaryDirectory(prefix="minikd-bench-") as folder:
        result = Path(folder, "result.json")
        with pinned(condition.processors()):
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {module} import main; main()", str(result)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=condition.environment(),
                text=True,
            )
        try:
            _, said = process.communicate(json.dumps(asdict(task)))
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode or not result.exists():
            raise WorkerFailed(said.strip()[-2000:] or f"exit code {process.returncode}")
        cases: list[dict[str, Any]] = json.loads(result.read_text())
        return cases


@contextlib.contextmanager
def pinned(cpus: list[int]) -> Iterator[None]:
    """A process started within inherits these processors. Does nothing where the system has no such call."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- in the process that measures ---

WRONG = 1e-3  # an error above this is no rounding


def run_task(task: Task) -> list[dict[str, Any]]:
    """Measure each shape of a task; see minikd.bench.report for what a case holds."""
    threads = CONDITIONS[task.condition].threads or len(usable_cpus())
    memory = {} if CONDITIONS[task.condition].alone else _bandwidths(3 * task.largest, threads, task)
    return [_case(task, KERNELS[task.kernel], tuple(shape), threads, memory) for shape in task.shapes]


def _bandwidths(footprint: int, threads: int, task: Task) -> dict[str, float]:
    moves = patterns(footprint, threads, task.largest)
    timings = interleave({name: call for name, (call, _) in moves.items()}, Effort(9, 1.0))
    return {name: 1e9 * moves[name][1] / timing.figures()["median_ns"] for name, timing in timings.items()}


def _case(task: Task, kernel: Kernel, shape: Shape, threads: int, memory: dict[str, float]) -> dict[str, Any]:
    """Compare every contender with the reference, then time them together with the limit of the memory."""
    inputs = kernel.make_inputs(shape)
    expected = reference(kernel, shape, inputs, Path(task.references))
    bound, rows = bind_all(task.contenders, kernel, inputs, expected)
    del expected
    moves = patterns(kernel.footprint(shape), threads, task.largest) if memory else {}
    calls = {"limit " + name: call for name, (call, _) in moves.items()}
    calls |= {key: contender.call for key, contender in bound.items()}
    timings = interleave(calls, task.effort, rest=threads > 1 and len(bound) > 1)
    limit = {p: 1e9 * moved / timings["limit " + p].figures()["median_ns"] for p, (_, moved) in moves.items()}
    for key in bound:
        rows[key] |= figures(kernel, shape, timings[key], limit, memory)
    return {
        "kernel": kernel.name,
        "shape": list(shape),
        "condition": task.condition,
        "threads": threads,
        "elements": int(np.prod(shape)),
        "bytes": kernel.bytes_moved(shape),
        "limit": limit,
        "memory": memory,
        "contenders": rows,
    }


def bind_all(
    keys: Sequence[str],
    kernel: Any,
    inputs: Inputs,
    expected: dict[str, np.ndarray],
    contenders: Mapping[str, Contender] = CONTENDERS,
    tolerance: float = WRONG,
) -> tuple[dict[str, Bound], dict[str, dict[str, Any]]]:
    """Bind the contenders and call each once: those that can be timed, and for each its errors or why it failed."""
    bound: dict[str, Bound] = {}
    rows: dict[str, dict[str, Any]] = {}
    for key in keys:
        try:
            contender = contenders[key].bind(kernel, inputs)
            errors = kernel.errors(contender.read(contender.call()), expected, inputs)
        except Exception as problem:  # a peer may fail in any way of its own; it is named and left out
            words = str(problem).strip().splitlines() or [""]
            rows[key] = {"failed": f"{type(problem).__name__}: {words[0]}"[:300]}
            continue
        wrong = max(errors.values()) > tolerance
        rows[key] = {"errors": {o: e if np.isfinite(e) else None for o, e in errors.items()}, "wrong": bool(wrong)}
        bound[key] = contender
    return bound, rows


def figures(
    kernel: Kernel, shape: Shape, timing: Timing, limit: dict[str, float], memory: dict[str, float]
) -> dict[str, Any]:
    """What is said of one contender's samples."""
    found = timing.figures()
    elements, moved, median = int(np.prod(shape)), kernel.bytes_moved(shape), found["median_ns"]
    speed = 1e9 * moved / median
    return {
        **found,
        "ns_per_element": median / elements,
        "bytes_per_second": speed,
        "share": speed / max(limit.values()) if limit else None,
        "over_floor": memory["copy"] / speed if memory else None,
    }


def reference(kernel: Kernel, shape: Shape, inputs: Inputs, folder: Path) -> dict[str, np.ndarray]:
    """The float64 outputs, computed by the first process that needs them and read from its file by the others."""
    file = folder / f"{kernel.name}-{shape_text(shape)}.npz"
    if not file.exists():
        expected: dict[str, Any] = kernel.expected(inputs)
        np.savez(file, **expected)
        return expected
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def serve(kind: Callable[..., Any], run: Callable[[Any], list[dict[str, Any]]]) -> None:
    """Read a task of this kind from stdin, and write its cases to the file that is the only argument."""
    warnings.simplefilter("ignore")  # of the peers; what matters of them is an error
    told = json.load(sys.stdin)
    task = kind(**{**told, "effort": Effort(*told["effort"])})
    Path(sys.argv[1]).write_text(json.dumps(run(task)))


def main() -> None:
    """Measure a task of kernels."""
    serve(Task, run_task)


if __name__ == "__main__":
    main()
