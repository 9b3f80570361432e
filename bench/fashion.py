"""Fashion-MNIST distilled from arrays in memory to a trained student, by minikd, PyTorch and JAX, each in a process.

python bench/fashion.py                             everything; ten epochs, three rounds in which all take turns
python bench/fashion.py --rows 5000 --epochs 1 --rounds 1
python bench/fashion.py --teacher teacher.npz       weights and biases in turn; else one is trained once and kept
python bench/fashion.py --update-readme             write the table of the last run into the README
python bench/fashion.py --backend cupy              on a GPU, those who can use one; results in fashion_gpu.json

What is compared stands in the folder `distillers`, a short module for each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distillers.task import BATCH, LR, PARTS, Task

import minikd as kd
from minikd.bench.machine import describe
from minikd.bench.measure import order
from minikd.bench.report import machine_text, markdown_table
from minikd.bench.suite import add_readme_option, script, update_readmes
from minikd.bench.worker import CONDITIONS, Condition, pinned
from minikd.kernels.arrays import gpu_in_words
from minikd.report.table import Table, show
from minikd.safetensors import write_whole
from minikd.training import fit

HERE = Path(__file__).resolve().parent
TEACHER, STUDENT = (1200, 1200), (30, 30)  # hidden layers
TEACHER_EPOCHS, TEACHER_LR = 3, 1e-3


class Distiller(NamedTuple):
    """Who takes part: the module in `distillers`, the package that it needs besides NumPy, whether a GPU is of use."""

    label: str
    module: str
    requires: str = "numpy"
    on_gpu: bool = True


DISTILLERS = {
    "minikd": Distiller("minikd, kd.distill", "minikd_distill"),
    "minikd-fit": Distiller("minikd, the training alone", "minikd_fit"),
    "torch": Distiller("PyTorch, as its tutorial", "pytorch_documented", "torch", on_gpu=False),
    "torch-stored": Distiller("PyTorch, logits stored", "pytorch_stored", "torch"),
    "jax": Distiller("JAX, jitted step", "jax_teacher", "jax", on_gpu=False),
    "jax-stored": Distiller("JAX, logits stored, lax.scan", "jax_stored", "jax"),
}
OURS = "minikd"
# What puts all of them on the GPU, or makes them fail where they see none.
ON_GPU = {"MINIKD_BACKEND": "cupy", "DISTILLERS_DEVICE": "cuda", "JAX_PLATFORMS": "cuda"}
# One thread on one processor, which other programs disturb less; or each library's own number of threads.
THREADS = {"1": CONDITIONS["one"], "all": CONDITIONS["alone"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=list(DISTILLERS), metavar="NAME", help=", ".join(DISTILLERS))
    parser.add_argument("--backend", choices=["cpu", "cupy"], default="cpu", help="cupy: on a GPU (default: cpu)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, help="take only so many training rows (default: all 55,000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the medians count")
    parser.add_argument("--threads", choices=list(THREADS), default="all", help="1 is on one processor (default: all)")
    parser.add_argument("--data", default="fashion-mnist", help="whatever minikd.data.load takes")
    parser.add_argument("--teacher", metavar="FILE.npz", help="weights and biases in turn, as (outputs, inputs)")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures go")
    add_readme_option(parser, "fashion")


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code."""
    path, marker, on_gpu = Path(options.out), "fashion", options.backend == "cupy"
    if on_gpu:
        path, marker = path.with_name(path.name.replace("fashion.json", "fashion_gpu.json")), "fashion_gpu"
    if options.update_readme is not None:
        update_readmes("bench/fashion.py", marker, path, options.update_readme, markdown)
        return 0
    if on_gpu and (reason := kd.backends()["cupy"].reason):
        print(f"bench/fashion.py: --backend cupy cannot run here: {reason}", file=sys.stderr)
        return 2
    able = {key: who for key, who in DISTILLERS.items() if importlib.util.find_spec(who.requires)}
    able = {key: who for key, who in able.items() if who.on_gpu or not on_gpu}
    chosen = [key for key in options.only or DISTILLERS if key in able]
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    with tempfile.TemporaryDirectory(prefix="minikd-fashion-") as folder:
        file = Path(folder, "task.npz")
        task = make_task(options)
        task.save(file)
        for number in range(options.rounds):
            for key in order(chosen, number):
                more = ON_GPU if on_gpu else {}
                try:
                    runs[key].append(measure(DISTILLERS[key].module, file, THREADS[options.threads], more))
                except subprocess.CalledProcessError:  # a peer without a GPU has said so itself
                    if not on_gpu or key.startswith(OURS):
                        raise
                    print(f"{DISTILLERS[key].label} is left out.", file=sys.stderr)
                    continue
                print(f"{DISTILLERS[key].label}: {runs[key][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    report = {
        "machine": describe(("numpy", "torch", "jax", "jaxlib")),
        "missing": [key for key in DISTILLERS if key not in able],
        "settings": {"rows": len(task.x), **{n: getattr(options, n) for n in ("epochs", "rounds", "threads")}},
        "array_bytes": sum(a.nbytes for a in task.arrays.values()),
        "runs": {key: found for key, found in runs.items() if found},
    }
    if on_gpu:
        report["gpu"] = gpu_in_words()
    columns, rows = summary(report)
    show(Table(tuple(columns), "<" + ">" * (len(columns) - 1), [tuple(row) for row in rows]), sys.stdout)
    write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    return 0


# --- what is given ---


def make_task(options: argparse.Namespace) -> Task:
    """The data set's arrays, the teacher's weights, and the student's first ones."""
    data = kd.data.load(options.data)
    arrays = {f"{kind}_{part}": getattr(data, f"{kind}_{part}") for part in PARTS for kind in "xy"}
    teacher = stored_teacher(Path(options.teacher)) if options.teacher else trained_teacher(data)
    for kind in "xy":
        arrays[f"{kind}_train"] = arrays[f"{kind}_train"][: options.rows]
    student = kd.nn.MLP((data.features, *STUDENT, data.classes), seed=0)
    return Task(arrays, teacher, list(student.state_dict().values()), options.epochs)


def stored_teacher(file: Path) -> list[np.ndarray]:
    with np.load(file) as stored:
        return [stored[name] for name in stored.files]


def trained_teacher(data: Any) -> list[np.ndarray]:
    """A teacher trained on the whole training part, kept among the temporary files for the next run."""
    file = Path(tempfile.gettempdir(), f"minikd-teacher-{data.sha256[:16]}.npz")
    if not file.exists():
        print(f"Training the teacher, which is then kept in {file}.", file=sys.stderr, flush=True)
        teacher = kd.nn.MLP((data.features, *TEACHER, data.classes), seed=0)
        fit(teacher, data.x_train, data.y_train, epochs=TEACHER_EPOCHS, batch_size=BATCH, lr=TEACHER_LR)
        np.savez(file, *teacher.state_dict().values())
    return stored_teacher(file)


# --- what is measured ---


def measure(module: str, file: Path, condition: Condition, more: Mapping[str, str]) -> dict[str, Any]:
    """Run one distiller in a process of its own, with these variables in its environment."""
    environment = condition.environment() | dict(more)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "distillers.run", module, str(file)]
    with pinned(condition.processors()):
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    return figures


def summary(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each distiller: medians over the rounds."""
    heads = ["", "seconds", "with imports", "test accuracy", "peak memory, MB", "time / minikd"]
    medians = {
        key: {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        for key, runs in report["runs"].items()
    }
    rows = []
    for key, found in medians.items():
        seconds = found["seconds"]
        ratio = f"{seconds / medians[OURS]['seconds']:.2f}" if OURS in medians else ""
        with_imports, accuracy = f"{seconds + found['import_seconds']:.2f}", f"{100 * found['test_accuracy']:.2f} %"
        memory = f"{found['peak_bytes'] / 1e6:,.0f}"
        rows.append([DISTILLERS[key].label, f"{seconds:.2f}", with_imports, accuracy, memory, ratio])
    return heads, rows


def markdown(report: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """How it was measured, and the table."""
    settings = report["settings"]
    arrays = f"Of the memory, {report['array_bytes'] / 1e6:,.0f} MB are the arrays themselves."
    threads = "one thread each" if settings["threads"] == "1" else "each with its own number of threads"
    rounds = f"medians of {settings['rounds']} runs, in which all take turns" if settings["rounds"] > 1 else "one run"
    how = (
        f"{settings['rows']:,} rows, {settings['epochs']} epochs, batches of {BATCH}, Adam at {LR}; "
        f"{rounds}, {threads}. {arrays}"
    )
    table = markdown_table(*summary(report))
    gpu = f"GPU: {report['gpu']}." if "gpu" in report else ""
    return "\n\n".join([machine_text({**report, "cases": [], "missing": {}}, memory=gpu), how, table])


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
