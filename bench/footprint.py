"""What it costs a program to predict: the import, the first prediction and the memory, each in a fresh process.

python bench/footprint.py                             all that are installed, five rounds in which they take turns
python bench/footprint.py --only runtime onnxruntime
python bench/footprint.py --update-readme             write the table of the last run into the README

All predict with the same network, 64-16-10, which each reads in its own format, on one thread. A process that is not
counted goes first, so that files are in memory and Python's bytecode is compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd as kd
from minikd.bench.machine import describe
from minikd.bench.measure import order
from minikd.bench.report import machine_text, markdown_table
from minikd.bench.suite import add_readme_option, script, update_readmes
from minikd.bench.worker import CONDITIONS, pinned
from minikd.report.table import Table, show
from minikd.safetensors import write_whole

SIZES = (64, 16, 10)
WORST_ERROR = 1e-5  # of a probability


class Program(NamedTuple):
    """Who takes part: what it is called, the packages that it needs, and its three lines of Python.

    They find `folder`, in which the network lies, and leave `probabilities` of `row`, an array (1, 64).
    """

    label: str
    requires: tuple[str, ...]
    imports: str
    load: str
    predict: str


NUMPY = Program("NumPy, the import alone", (), "import numpy", "", "probabilities = None")
TORCH_LOAD = """
nn = torch.nn
model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
model.load_state_dict(torch.load(folder + "/student.pt", weights_only=True))
"""
TORCH_PREDICT = """
with torch.inference_mode():
    probabilities = model(torch.from_numpy(row)).softmax(1).numpy()
"""
PROGRAMS = {
    "numpy": NUMPY,
    "runtime": Program(
        "minikd.runtime",
        (),
        "import minikd.runtime",
        "model = minikd.runtime.load(folder + '/student.safetensors')",
        "probabilities = model.predict_proba(row)",
    ),
    "minikd": Program(
        "minikd",
        (),
        "import minikd as kd; kd.load",
        "model = kd.load(folder + '/student.safetensors')",
        "probabilities = model.predict_proba(row)",
    ),
    "onnxruntime": Program(
        "ONNX Runtime",
        ("onnxruntime", "onnx"),
        "import onnxruntime",
        "model = onnxruntime.InferenceSession(folder + '/student.onnx', providers=['CPUExecutionProvider'])",
        "probabilities = model.run(None, {'x': row})[0]",
    ),
    "torch": Program("PyTorch", ("torch",), "import torch", TORCH_LOAD, TORCH_PREDICT),
}
OURS = "runtime"

# What a process runs: it is given the program in three pieces and prints what they took, as JSON. Besides the pieces'
# own imports it loads NumPy, which reads the row, between the two measurements, and JSON after them.
PROCESS = """
import sys, time
folder, imports, load, predict = sys.argv[1:]
names = {"folder": folder}
t = [time.perf_counter()]
exec(imports, names)
t.append(time.perf_counter())
import numpy
names["row"] = numpy.load(folder + "/row.npy")
t.append(time.perf_counter())
exec(load, names)
exec(predict, names)
t.append(time.perf_counter())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
import json
found = names["probabilities"]
print(json.dumps({
    "import_seconds": t[1] - t[0], "first_seconds": t[3] - t[2], "peak_bytes": 1024 * int(peak.split()[1]),
    "probabilities": None if found is None else numpy.asarray(found).tolist(),
}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), metavar="NAME", help=", ".join(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=5, help="processes of each; the medians count")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures go")
    add_readme_option(parser, "footprint")


def run(options: argparse.Namespace) -> int:
    """Measure and report, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes("bench/footprint.py", "footprint", path, options.update_readme, markdown)
        return 0
    able = [key for key, who in PROGRAMS.items() if all(map(importlib.util.find_spec, who.requires))]
    chosen = [key for key in options.only or PROGRAMS if key in able]
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    with tempfile.TemporaryDirectory(prefix="minikd-footprint-") as folder:
        expected = write_network(Path(folder), "onnxruntime" in chosen, "torch" in chosen)
        for number in range(-1, options.rounds):
            for key in order(chosen, number):
                found = measure(PROGRAMS[key], folder, expected)
                if number >= 0:
                    runs[key].append(found)
    report = {
        "machine": describe(("numpy", "torch", "onnxruntime")),
        "missing": [key for key in PROGRAMS if key not in able],
        "rounds": options.rounds,
        "runs": runs,
    }
    columns, rows = summary(report)
    show(Table(tuple(columns), "<" + ">" * (len(columns) - 1), [tuple(row) for row in rows]), sys.stdout)
    write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    return 0


def write_network(folder: Path, onnx: bool, torch: bool) -> np.ndarray:
    """The network in each format, and a row; returns the probabilities that all must find."""
    model = kd.nn.MLP(SIZES, seed=0)
    row = np.random.default_rng(0).normal(size=(1, SIZES[0])).astype(np.float32)
    kd.save(folder / "student.safetensors", model)
    np.save(folder / "row.npy", row)
    if onnx:
        from minikd.bench.steps.peer_onnx import graph

        (folder / "student.onnx").write_bytes(graph(list(model.state_dict().values())))
    if torch:
        import torch as pytorch

        state = {name: pytorch.from_numpy(value) for name, value in model.state_dict().items()}
        pytorch.save(state, folder / "student.pt")
    return model.predict_proba(row)


def measure(program: Program, folder: str, expected: np.ndarray) -> dict[str, Any]:
    """Run one program in a process of its own, on one processor."""
    condition = CONDITIONS["one"]
    command = [sys.executable, "-c", PROCESS, folder, program.imports, program.load, program.predict]
    with pinned(condition.processors()):
        said = subprocess.run(command, env=condition.environment(), check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    found = figures.pop("probabilities")
    figures["error"] = None if found is None else float(np.abs(np.subtract(found, expected)).max())
    if found is not None and not figures["error"] < WORST_ERROR:
        raise AssertionError(f"{program.label} predicts {found}, not {expected.tolist()}")
    return figures


def summary(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each program: medians over the rounds, of times the minima, too."""
    heads = ["median (minimum)", "import, ms", "reading and first prediction, ms", "peak memory, MB"]
    rows = []
    for key, runs in report["runs"].items():
        imported, first = ([1e3 * one[name] for one in runs] for name in ("import_seconds", "first_seconds"))
        predicts = runs[0]["error"] is not None
        cells = [
            f"{statistics.median(imported):,.0f} ({min(imported):,.0f})",
            f"{statistics.median(first):,.1f} ({min(first):,.1f})" if predicts else "–",
            f"{statistics.median(one['peak_bytes'] for one in runs) / 1e6:,.0f}",
        ]
        rows.append([PROGRAMS[key].label, *cells])
    return heads, rows


def markdown(report: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """How it was measured, and the table."""
    sizes = "-".join(map(str, SIZES))
    how = (
        f"A network {sizes}, one thread; {report['rounds']} fresh processes each, in which all take turns. "
        "The memory is the most that the process held, Python's own included."
    )
    return "\n\n".join([machine_text({**report, "cases": [], "missing": {}}), how, markdown_table(*summary(report))])


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
