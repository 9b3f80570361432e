"""Every form of an exported student beside the others: bytes, accuracy, agreement, error, and time or instructions.

python bench/exports.py                                 a digits student and one of Fashion-MNIST, distilled first
python bench/exports.py --runs runs/mine                the students of these runs
python bench/exports.py --update-readme                 write the tables of the last run into the README

Accuracy and agreement with the float32 model are of the test part; the emulated processors predict its first rows, and
count the instructions of the slowest. Instructions and bytes of flash are those of one optimisation for speed, -O2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minikd as kd
from minikd import exporting, metrics
from minikd.bench.machine import describe
from minikd.bench.report import machine_text, markdown_table
from minikd.bench.suite import add_readme_option, script, update_readmes
from minikd.cli import main as minikd
from minikd.data import Dataset
from minikd.export.c import to_c
from minikd.export.device import device_table
from minikd.export.finetune import finetune
from minikd.export.network import Network
from minikd.export.onnx import to_onnx
from minikd.export.quantise import Quantised, quantise
from minikd.export.reference import predict_c_order
from minikd.export.verify import verify
from minikd.report.table import NOTHING
from minikd.safetensors import write_whole

SOFT = ["--hard-weight", "0.1", "--soft-weight", "0.9", "--labels", "0", "--seeds", "0", "--quiet"]
RUNS = {
    "digits, 64-16-10": [*SOFT, "--temperature", "2"],
    "Fashion-MNIST, 784-30-30-10": [
        *("--data", "fashion-mnist", "--student", "30-30", "--teacher", "400-400", "--teacher-epochs", "8"),
        *("--teacher-lr", "0.001", "--epochs", "12", "--batch-size", "128", "--temperature", "2", *SOFT),
    ],
}
COLUMNS = ("form", "bytes", "accuracy, %", "agrees, %", "largest error of a logit", "one prediction")
EMULATED_ROWS = 8
ROUNDS = 2000
SUMMARY = (
    "safetensors, minikd.runtime",
    *("ONNX float32", "C float32", "ONNX int8", "C int8"),
    *("C float32, Cortex-M0+", "C float32, Cortex-M4F", "C int8 alone, Cortex-M0+", "C int8 alone, Cortex-M4F"),
)
BITS = {True: "the reference's bits", False: "OTHER BITS", None: NOTHING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="folders of runs; by default two are made")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures go")
    add_readme_option(parser, "exports")


def run(options: argparse.Namespace) -> int:
    """Export and measure, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes("bench/exports.py", "exports", path, options.update_readme, markdown)
        return 0
    report: dict[str, Any] = {"machine": describe(("numpy", "onnxruntime")), "students": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, where in ({r: r for r in options.runs} if options.runs else made(Path(folder))).items():
            report["students"][name] = rows = []
            for row in forms(exporting.find(where, "", ""), Path(folder)):
                rows.append(row)
                print(name, row, file=sys.stderr, flush=True)
            write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    print(markdown(report))
    return 0


def made(folder: Path) -> dict[str, str]:
    """The two runs, distilled now."""
    found = {}
    for k, (name, arguments) in enumerate(RUNS.items()):
        found[name] = str(folder / f"run-{k}")
        minikd(["distill", *arguments, "--out", found[name]])
    return found


def forms(source: exporting.Source, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each form of one student."""
    model, data = source.model, exporting.data_of(source, "measuring")
    network, raw = Network.of(model), data.raw(data.x_test)
    plain = quantise(network, exporting.calibration_rows(data))
    soft = exporting.teacher_logits(source, data, allow_pickle=False)
    how = {"temperature": source.settings.temperature, "batch_size": source.settings.batch_size}
    tuned = finetune(model, data.x_train, data.y_train, soft, on_scale=True, epochs=5, **how)
    yield from in_python(model, raw, data, folder)
    for words, base, quantised in (
        ("float32", model, None),
        ("int8", model, plain),
        ("int8, trained on", tuned.model, tuned.quantised),
    ):
        yield from as_onnx(words, model, quantised, raw, data, folder)
        yield from as_c(words, model, base, quantised, raw, data, folder)
    yield from on_devices(network, plain, raw, folder)


def figures(form: str, size: int, logits: Any, truth: Any, data: Dataset, cost: str) -> dict[str, Any]:
    return {
        "form": form,
        "bytes": size,
        "accuracy": metrics.accuracy(logits, data.y_test),
        "agreement": metrics.agreement(logits, truth),
        "error": float(abs(np.asarray(logits, np.float64) - truth).max()),
        "cost": cost,
    }


def in_python(model: Any, raw: np.ndarray, data: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """minikd's own file, read by minikd and by its light runtime."""
    from minikd import runtime

    file = folder / "student.safetensors"
    kd.save(file, model)
    truth = model.logits(raw)
    for form, loaded in (("safetensors, minikd", kd.load(file)), ("safetensors, minikd.runtime", runtime.load(file))):
        cost = nanoseconds(lambda one, loaded=loaded: loaded.predict(one), raw)
        yield figures(form, file.stat().st_size, loaded.logits(raw), truth, data, cost)


def as_onnx(
    words: str, model: Any, quantised: Quantised | None, raw: np.ndarray, data: Dataset, folder: Path
) -> Iterator[dict[str, Any]]:
    """An ONNX file by onnxruntime, on one thread."""
    import onnxruntime

    file = folder / "student.onnx"
    to_onnx(quantised or model, file)
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = threads.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.read_bytes(), threads, providers=["CPUExecutionProvider"])
    rows = np.ascontiguousarray(raw, np.float32)
    logits = session.run(["logits"], {"features": rows})[0]
    cost = nanoseconds(lambda one: session.run(["label"], {"features": one}), rows)
    yield figures(f"ONNX {words}", file.stat().st_size, logits, model.logits(raw), data, cost)


def as_c(
    words: str, model: Any, base: Any, quantised: Quantised | None, raw: np.ndarray, data: Dataset, folder: Path
) -> Iterator[dict[str, Any]]:
    """C, compiled on this machine."""
    network, where = Network.of(base), folder / words.replace(", ", "-").replace(" ", "-")
    to_c(network, where, quantised=quantised)
    found = verify(where, base, raw, data.y_test, quantised=quantised)
    logits = quantised.logits(raw) if quantised else predict_c_order(network, raw)
    bits = "" if found.same_bits else ", OTHER BITS"
    cost = f"{found.nanoseconds:,.0f} ns{bits}"
    yield figures(f"C {words}", found.object_bytes, logits, model.logits(raw), data, cost)


def on_devices(network: Network, quantised: Quantised, raw: np.ndarray, folder: Path) -> Iterator[dict[str, Any]]:
    """The C on each small processor, where its first rows must have every bit of the reference."""
    for row in device_table(folder, network, quantised, raw[:EMULATED_ROWS]):
        form = f"C {row['form']}, {row['target']}"
        if row["flash_bytes"] is None:
            yield {"form": form, "bytes": None, "bits": None, "cost": "does not fit into its flash"}
            continue
        cost = "compiles" if row["instructions"] is None else f"{row['instructions']:,} instructions"
        stack = "" if row["stack_bytes"] is None else f", {row['stack_bytes']:,} bytes of stack"
        yield {"form": form, "bytes": row["flash_bytes"], "bits": row["bits_equal"], "cost": cost + stack}


def nanoseconds(predict: Callable[[np.ndarray], Any], rows: np.ndarray) -> str:
    """The median time of one prediction of one row."""
    one, times = np.ascontiguousarray(rows[:1]), []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        predict(one)
        times.append(time.perf_counter_ns() - began)
    return f"{np.median(times):,.0f} ns"


def markdown(report: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """The machine, and a table for each student; a summary of them where `words` says so."""
    parts = [machine_text({**report, "cases": [], "missing": {}})]
    for name, rows in report["students"].items():
        cells = []
        for row in rows:
            if "summary" in words and row["form"] not in SUMMARY:
                continue
            known = "accuracy" in row
            shares = [f"{100 * row[key]:.2f}" if known else "" for key in ("accuracy", "agreement")]
            error = f"{row['error']:.2g}" if known else BITS[row["bits"]]
            size = NOTHING if row["bytes"] is None else f"{row['bytes']:,}"
            cells.append([row["form"], size, *shares, error, row["cost"]])
        parts.append(f"{name}:\n\n{markdown_table(COLUMNS, cells)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
