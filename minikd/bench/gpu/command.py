"""What to measure on a GPU; `minikd.bench.suite` does the rest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from minikd.bench.gpu.cases import CASES, NAMES, SHAPES, GpuCase, chosen
from minikd.bench.gpu.contenders import CONTENDERS
from minikd.bench.gpu.report import markdown, ratios, tables
from minikd.bench.gpu.worker import Task
from minikd.bench.measure import LEAST_ROUNDS, Effort
from minikd.bench.suite import Suite, wanted_contenders
from minikd.errors import ArgumentError, BackendError
from minikd.kernels import backends

FULL, SHORT = Effort(60, 6.0), Effort(LEAST_ROUNDS + 6, 1.0)
WHERE = "minikd bench"


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code.

    Raises
    ------
    BackendError : there is no GPU, or no CuPy.
    """
    reason = backends()["cupy"].reason
    if reason and options.update_readme is None:
        fix = f"Reason: {reason}. Without --backend the kernels for the CPU are measured."
        raise BackendError(WHERE, "--backend", expected="a backend that runs here", got="'cupy'", fix=fix)
    return SUITE.run(options)


def tasks(options: argparse.Namespace, missing: Mapping[str, str], folder: str) -> Iterator[Task]:
    """One for each case.

    Raises
    ------
    ArgumentError : nothing that was asked for is measured on a GPU.
    """
    cases = chosen(options.kernel, options.shape, options.quick)
    if not cases:
        expected = f"names among {', '.join(NAMES)}, with shapes among {', '.join(SHAPES)}"
        got = " ".join([*(options.kernel or ()), *(options.shape or ())])
        raise ArgumentError(WHERE, "--backend cupy", expected=expected, got=got)
    effort = SHORT if options.quick else FULL
    for case in cases:
        wanted = wanted_contenders(CONTENDERS, options)
        able = [key for key in wanted if key not in missing and case.name in CONTENDERS[key].kernels]
        yield Task(case.name, case.shape, "gpu", able, effort)


def _case(case: Mapping[str, Any]) -> GpuCase:
    return GpuCase(case["name"], tuple(case["shape"]))


SUITE = Suite(
    name=WHERE,
    marker="gpu",
    contenders=CONTENDERS,
    worker="minikd.bench.gpu.worker",
    settings=("quick", "kernel", "shape", "peers"),
    tasks=tasks,
    subject=lambda task: task.case.label,
    identity=lambda case: (case["name"], *case["shape"], case["gpu"]),
    place=lambda case: CASES.index(_case(case)),
    ratios=ratios,
    tables=tables,
    markdown=markdown,
    packages=("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "liger-kernel", "jax", "jaxlib"),
)
