"""One process that measures a step; threads, processors and malloc are settled as for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minikd.bench.measure import Effort, interleave
from minikd.bench.steps.cases import STEPS, TOLERANCE
from minikd.bench.steps.contenders import CONTENDERS
from minikd.bench.steps.peer_numpy import products
from minikd.bench.worker import CONDITIONS, bind_all, serve
from minikd.kernels.native import usable_cpus

YARDSTICK = "products"


@dataclass
class Task:
    """What one process measures: the contenders on one step, in one condition."""

    step: str
    condition: str
    contenders: Sequence[str]
    effort: Effort


def run_task(task: Task) -> list[dict[str, Any]]:
    """Compare every contender with the reference, then time them together with the bare matrix products.

    Whoever is alone is alone: the products' threads would still spin while it computes.
    """
    step, condition = STEPS[task.step], CONDITIONS[task.condition]
    threads = condition.threads or len(usable_cpus())
    inputs = step.make_inputs()
    bound, rows = bind_all(task.contenders, step, inputs, step.expected(inputs), CONTENDERS, TOLERANCE)
    calls = {} if condition.alone else {YARDSTICK: products(step, inputs)}
    calls |= {key: contender.call for key, contender in bound.items()}
    timings = interleave(calls, task.effort, rest=threads > 1 and len(bound) > 1)
    yardstick = None if condition.alone else timings[YARDSTICK].figures()["median_ns"]
    for key, contender in bound.items():
        figures = timings[key].figures()
        times = {name: figures.pop(name) / contender.steps for name in ("median_ns", "min_ns", "iqr_ns")}
        rows[key] |= times | figures | {"over_products": times["median_ns"] / yardstick if yardstick else None}
    return [
        {
            "step": task.step,
            "condition": task.condition,
            "threads": threads,
            "products_ns": yardstick,
            "contenders": rows,
        }
    ]


def main() -> None:
    """Measure a task of steps."""
    serve(Task, run_task)
