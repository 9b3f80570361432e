"""Three teachers that are no networks of minikd, each distilled into a 64-32-10 network or its like, in paired seeds.

python bench/teachers.py                                        a forest, boosted trees and a convolutional network
python bench/teachers.py --quick                                two seeds and an epoch; the figures mean nothing
python bench/teachers.py --update-readme                        write the table of the last run into the README

The forest and the boosted trees are trained by scikit-learn on the digits, anew for each seed. The convolutional
network is trained once by PyTorch on Fashion-MNIST, written as an ONNX file, and asked through onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minikd as kd
from minikd.bench.machine import describe
from minikd.bench.report import markdown_table
from minikd.bench.suite import add_readme_option, script, update_readmes
from minikd.report.table import situations
from minikd.safetensors import write_whole

DIGITS = {"data": "digits", "student": (32,), "labels": 100}
FASHION = {"data": "fashion-mnist", "student": (64, 32), "labels": 1000, "epochs": 10, "batch_size": 128, "lr": 0.003}
SOFT = {"hard_weight": 0.1, "soft_weight": 0.9}
RUNS: dict[str, dict[str, Any]] = {
    "random forest": {"teacher": "rf", "seeds": range(5), "temperature": 2, **DIGITS, **SOFT},
    "boosted trees": {"teacher": "gbt", "seeds": range(5), "temperature": 2, **DIGITS, **SOFT},
    "convolutional network, ONNX": {"seeds": range(3), "temperature": 3, **FASHION, **SOFT},
}
PASSES = 4  # of the convolutional network over the training part
COLUMNS = ("teacher → student", "labels", "teacher", "alone", "distilled", "difference", "95 % interval", "verdict")


def convolutional_teacher(quick: bool) -> Path:
    """An ONNX file of raw pixels to logits, trained by PyTorch unless it was before."""
    path = Path(tempfile.gettempdir(), f"minikd-convolutional-teacher{'-quick' * quick}.onnx")
    if path.exists():
        return path
    import torch
    from torch import nn

    torch.manual_seed(0)
    data = kd.data.load("fashion-mnist")
    few = slice(2000 if quick else None)
    x = torch.from_numpy(data.raw(data.x_train[few])).float()
    y = torch.from_numpy(data.y_train[few])
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.BatchNorm2d(1),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(1 if quick else PASSES):
        for picked in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[picked]), y[picked]).backward()
            optimizer.step()
    axes = {"pixels": {0: "n"}, "logits": {0: "n"}}
    names = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(model.eval(), (x[:2],), str(path), dynamo=False, **names)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), help="which of them")
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch")
    parser.add_argument("--out", metavar="FILE.json", help="where the figures go")
    add_readme_option(parser, "teachers")


def run(options: argparse.Namespace) -> int:
    """Distil and report, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes("bench/teachers.py", "teachers", path, options.update_readme, markdown)
        return 0
    report: dict[str, Any] = {"machine": describe(("numpy",)), "runs": {}}
    for name in options.runs:
        how = dict(RUNS[name]) | ({"seeds": range(2), "epochs": 1} if options.quick else {})
        began = time.monotonic()
        teacher = how.pop("teacher", None) or convolutional_teacher(options.quick)
        ready = time.monotonic()
        result = kd.distill(teacher, how.pop("student"), how.pop("data"), **how)
        seconds = {"teacher": round(ready - began, 1), "distillation": round(time.monotonic() - ready, 1)}
        result.report["settings"]["teacher"] = Path(str(teacher)).name  # wherever the file lies here
        report["runs"][name] = {"report": result.report, "seconds": seconds}
        print(f"{name}: {seconds['distillation']} s", file=sys.stderr, flush=True)
        write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    print(markdown(report))
    return 0


def markdown(report: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """The table: one row for each teacher and situation, accuracies of the test part in per cent."""
    rows = []
    for name, found in report["runs"].items():
        for labels, figures in situations(found["report"]):
            layers = "-".join(map(str, figures["student_distilled"]["layers"]))
            interval = " to ".join(f"{100 * bound:+.1f}" for bound in figures["difference"]["interval"])
            models = [figures[key]["test_accuracy"] for key in ("teacher", "student_alone", "student_distilled")]
            cells = [f"{100 * np.mean(m):.2f} ± {100 * np.std(m, ddof=1):.2f}" for m in models]
            mean = f"{100 * figures['difference']['mean']:+.2f}"
            rows.append([f"{name} → {layers}", labels.split()[0], *cells, mean, interval, figures["verdict"]])
    return markdown_table(COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
