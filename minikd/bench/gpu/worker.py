"""One process that measures a case on the GPU: results compared first, then all timed in the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound
from minikd.bench.gpu.cases import STEP_TOLERANCE, GpuCase
from minikd.bench.gpu.clock import COPIED, Events, copying, gpu_name
from minikd.bench.gpu.contenders import BY_THE_HOST, CONTENDERS
from minikd.bench.measure import Effort, Timing, interleave, sample
from minikd.bench.worker import WRONG, bind_all, serve
from minikd.kernels import use_backend

YARDSTICK = "copy"


@dataclass
class Task:
    """What one process measures: the contenders on one case; `copied` bytes are copied for the bandwidth."""

    name: str
    shape: Sequence[int]
    condition: str
    contenders: Sequence[str]
    effort: Effort
    copied: int = COPIED

    @property
    def case(self) -> GpuCase:
        return GpuCase(self.name, tuple(self.shape))


def run_task(task: Task) -> list[dict[str, Any]]:
    """Measure a case on the backend "cupy"; see minikd.bench.gpu.report for what it holds."""
    use_backend("cupy")
    case = task.case
    inputs = case.make_inputs()
    expected = case.subject.expected(inputs)
    tolerance = STEP_TOLERANCE if case.is_step else WRONG
    bound, rows = bind_all(task.contenders, case.subject, inputs, expected, CONTENDERS, tolerance)
    del expected
    copy, moved = copying(task.copied)
    timings = timed(bound, copy, task.effort)
    bandwidth = 1e9 * moved / timings[YARDSTICK].figures()["median_ns"]
    for key in bound:
        rows[key] |= figures(case, timings[key], bandwidth)
    return [
        {
            "name": case.name,
            "shape": list(case.shape),
            "condition": task.condition,
            "gpu": gpu_name(),
            "bytes": case.bytes_moved,
            "copy": bandwidth,
            "contenders": rows,
        }
    ]


def timed(bound: dict[str, Bound], copy: Any, effort: Effort) -> dict[str, Timing]:
    """All contenders and the copy in the same rounds, each by the clock that sees its work."""
    calls = {YARDSTICK: copy, **{key: contender.call for key, contender in bound.items()}}
    events = Events()
    return interleave(calls, effort, clocks={key: sample if key in BY_THE_HOST else events for key in calls})


def figures(case: GpuCase, timing: Timing, bandwidth: float) -> dict[str, Any]:
    """What is said of one contender's samples."""
    found = timing.figures()
    if not case.bytes_moved:
        return found
    speed = 1e9 * case.bytes_moved / found["median_ns"]
    elements = int(np.prod(case.shape))
    return {
        **found,
        "ns_per_element": found["median_ns"] / elements,
        "bytes_per_second": speed,
        "share": speed / bandwidth,
    }


def main() -> None:
    """Measure a task on the GPU."""
    serve(Task, run_task)
