"""The command: what to measure of the kernels; `minikd.bench.suite` does the rest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from minikd.bench.cases import KERNELS, QUICK, shape_text
from minikd.bench.contenders import CONTENDERS, PEERS
from minikd.bench.gpu import cases as gpu
from minikd.bench.gpu.contenders import CONTENDERS as GPU_CONTENDERS
from minikd.bench.machine import LARGEST, LARGEST_QUICK
from minikd.bench.measure import LEAST_ROUNDS, Effort
from minikd.bench.report import markdown, ratios, tables
from minikd.bench.suite import Suite, wanted_conditions, wanted_contenders
from minikd.bench.worker import CONDITIONS, Task
from minikd.errors import ArgumentError
from minikd.ops import Shape

OUT, GPU_OUT = "kernels.json", "gpu.json"
FULL, SHORT = Effort(40, 8.0), Effort(LEAST_ROUNDS + 6, 0.5)
SHAPES = {shape_text(shape): shape for kernel in KERNELS.values() for shape in kernel.shapes}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minikd bench` and of bench/kernels.py."""
    what = parser.add_argument_group("what is measured (default: everything)")
    what.add_argument(
        "--backend", choices=["cpu", "cupy"], default="cpu", help="cupy: on the GPU, whole steps too (default: cpu)"
    )
    what.add_argument("--quick", action="store_true", help="a few kernels and shapes, one thread, under a minute")
    names, shapes = list({**KERNELS, **dict.fromkeys(gpu.NAMES)}), list({**SHAPES, **gpu.SHAPES})
    what.add_argument("--kernel", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    what.add_argument("--shape", nargs="+", choices=shapes, metavar="SHAPE", help=", ".join(shapes))
    what.add_argument("--tuned-malloc", action="store_true", help="also with a malloc that keeps freed memory (glibc)")
    more = "; <!-- bench softmax --> takes in that kernel alone"
    SUITE.add_arguments(parser, OUT, more, also=GPU_CONTENDERS)


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code."""
    if options.backend == "cupy":
        from minikd.bench.gpu.command import run as run_on_gpu

        if options.out == OUT:
            options.out = GPU_OUT
        return run_on_gpu(options)
    return SUITE.run(options)


def tasks(options: argparse.Namespace, missing: Mapping[str, str], folder: str) -> Iterator[Task]:
    """One for each kernel and condition; alone, one for each kernel and peer.

    Raises
    ------
    ArgumentError : none of the kernels has one of the shapes.
    """
    names = options.kernel or (QUICK if options.quick else KERNELS)
    chosen = {name: _shapes(name, options) for name in names if name in KERNELS}
    if not chosen:
        expected = "one of " + ", ".join(KERNELS)
        got, fix = " ".join(options.kernel), "Add --backend cupy, which measures whole steps too."
        raise ArgumentError("minikd bench", "--kernel", expected=expected, got=got, fix=fix)
    if not any(chosen.values()):
        asked = " ".join(options.shape)
        kinds = {name: ", ".join(map(shape_text, KERNELS[name].shapes)) for name in chosen}
        expected = "; ".join(f"{shapes} for {name}" for name, shapes in kinds.items())
        raise ArgumentError("minikd bench", "--shape", expected=f"one of {expected}", got=asked)
    effort, largest = (SHORT, LARGEST_QUICK) if options.quick else (FULL, LARGEST)
    for name, shapes in chosen.items():
        able = [k for k in wanted_contenders(CONTENDERS, options) if k not in missing and name in CONTENDERS[k].kernels]
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
    return wanted_conditions(wanted)


def _identity(case: dict[str, Any]) -> tuple[Any, ...]:
    """What a case is of; alone, each peer has cases of its own."""
    alone = list(case["contenders"]) if CONDITIONS[case["condition"]].alone else []
    return (case["kernel"], *case["shape"], case["condition"], *alone)


def _picture(report: Mapping[str, Any]) -> bytes | None:
    from minikd.bench.picture import roofline

    return roofline(report)


SUITE = Suite(
    name="minikd bench",
    marker="bench",
    contenders=CONTENDERS,
    worker="minikd.bench.worker",
    settings=("quick", "kernel", "shape", "peers", "threads", "no_alone", "tuned_malloc"),
    tasks=tasks,
    subject=lambda task: task.kernel,
    identity=_identity,
    place=lambda case: list(KERNELS).index(case["kernel"]),
    ratios=ratios,
    tables=tables,
    markdown=markdown,
    picture=_picture,
)
