"""What to measure of whole steps; `minikd.bench.suite` does the rest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from minikd.bench.measure import LEAST_ROUNDS, Effort
from minikd.bench.steps.cases import QUICK, STEPS
from minikd.bench.steps.contenders import CONTENDERS
from minikd.bench.steps.report import markdown, place, ratios, tables
from minikd.bench.steps.worker import Task
from minikd.bench.suite import Suite, wanted_conditions, wanted_contenders
from minikd.bench.worker import CONDITIONS

FULL, SHORT = Effort(40, 8.0), Effort(LEAST_ROUNDS, 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bench/steps.py."""
    what = parser.add_argument_group("what is measured (default: everything)")
    what.add_argument("--quick", action="store_true", help="two small steps, one thread, with little effort")
    what.add_argument("--step", nargs="+", choices=list(STEPS), metavar="NAME", help=", ".join(STEPS))
    SUITE.add_arguments(parser, "steps.json", "; <!-- steps summary --> takes in the ratios alone")


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code."""
    return SUITE.run(options)


def tasks(options: argparse.Namespace, missing: Mapping[str, str], folder: str) -> Iterator[Task]:
    """One for each step and condition; alone, one for each step and contender, ours as well."""
    effort = SHORT if options.quick else FULL
    for name in options.step or (QUICK if options.quick else STEPS):
        wanted = wanted_contenders(CONTENDERS, options)
        able = [key for key in wanted if key not in missing and name in CONTENDERS[key].kernels]
        for condition in conditions(options):
            for group in [[key] for key in able] if CONDITIONS[condition].alone else [able]:
                yield Task(name, condition, group, effort)


def conditions(options: argparse.Namespace) -> list[str]:
    """One thread and alone, unless the options say otherwise."""
    threads = options.threads or ["1"]
    alone = not (options.no_alone or options.quick)
    return wanted_conditions({"one": "1" in threads, "all": "all" in threads, "alone": alone})


def _identity(case: dict[str, Any]) -> tuple[Any, ...]:
    """What a case is of; alone, each contender has cases of its own."""
    alone = list(case["contenders"]) if CONDITIONS[case["condition"]].alone else []
    return (case["step"], case["condition"], *alone)


SUITE = Suite(
    name="bench/steps.py",
    marker="steps",
    contenders=CONTENDERS,
    worker="minikd.bench.steps.worker",
    settings=("quick", "step", "peers", "threads", "no_alone"),
    tasks=tasks,
    subject=lambda task: STEPS[task.step].label,
    identity=_identity,
    place=lambda case: place(case["step"], case["condition"]),
    ratios=ratios,
    tables=tables,
    markdown=markdown,
    packages=("numpy", "torch", "jax", "jaxlib", "scikit-learn", "mygrad", "onnxruntime"),
)
