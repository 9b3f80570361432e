"""Which temperature suits which student: errors on the test part over T, for a small and a large student.

python bench/temperature.py                                     both students, all labels and 1,000, three seeds
python bench/temperature.py --students 30-30 --seeds 5
python bench/temperature.py --quick                             a look in seconds; its figures mean nothing
python bench/temperature.py --update-readme                     write the tables of the last run into the README
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soft_labels
from soft_labels import Log, Material, spread

from minikd import metrics
from minikd.bench.report import markdown_table
from minikd.bench.suite import script, update_readmes
from minikd.report.table import Table, show
from minikd.verdict import compare

TEMPERATURES = (1.0, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0)
WEIGHTS = {"hard_weight": 0.1, "soft_weight": 0.9}
ALONE = {"hard_weight": 1.0, "soft_weight": 0.0}
QUICK = {"seeds": 2, "epochs": 1, "students": ["8"], "temperatures": [1.0, 4.0], "labels": [0, 100]}
Key = tuple[str, int, float | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    soft_labels.add_arguments(parser, "temperature")
    parser.add_argument("--students", nargs="+", default=["30-30", "300-300"], metavar="SIZES", help="hidden layers")
    parser.add_argument("--temperatures", nargs="+", type=float, default=list(TEMPERATURES), metavar="T")
    parser.add_argument("--labels", nargs="+", type=int, default=[0, 1000], help="labelled rows; 0 for all")


def run(options: argparse.Namespace) -> int:
    """Train and report, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes("bench/temperature.py", "temperature", path, options.update_readme, markdown)
        return 0
    vars(options).update(QUICK if options.quick else {})
    material = soft_labels.prepare(options)
    settings = {name: getattr(options, name) for name in ("students", "temperatures", "labels", "seeds", "epochs")}
    log = Log(path, settings | WEIGHTS, material)
    for seed in range(options.seeds):
        for student, labels in itertools.product(options.students, options.labels):
            for temperature in (None, *options.temperatures):
                found = measure(options, material, (student, labels, temperature), seed)
                log.add(found, f"{student}, {labels or 'all'} labels, T = {temperature}: {found['errors']} errors")
        log.write()
    for columns, rows in (errors_table(log.report), agreement_table(log.report)):
        show(Table(tuple(columns), ">" * len(columns), [tuple(row) for row in rows]), sys.stdout)
        print()
    return 0


def measure(options: argparse.Namespace, material: Material, what: Key, seed: int) -> dict[str, Any]:
    """Train one student; without a temperature, on its labels alone."""
    data, (student, labels, temperature) = material.data, what
    y = data.few_labels(labels, seed) if labels else data.y_train
    how = ALONE if temperature is None else {**WEIGHTS, "temperature": temperature}
    hidden = soft_labels.hidden_sizes(student)
    trained = soft_labels.trained_student(material, hidden, seed, y, epochs=options.epochs, **how)
    scores = soft_labels.logits(trained, data.x_test)
    return {
        "student": student,
        "labels": labels,
        "temperature": temperature,
        "seed": seed,
        "errors": soft_labels.errors(scores, data.y_test),
        "agreement": metrics.agreement(scores, material.logits["test"]),
    }


# --- the tables ---


def values(report: Mapping[str, Any], key: Key, name: str) -> list[float]:
    """A figure of one kind of student, for each seed in turn."""
    runs = [r for r in report["runs"] if (r["student"], r["labels"], r["temperature"]) == key]
    return [run[name] for run in sorted(runs, key=lambda run: run["seed"])]


def kinds(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    settings = report["settings"]
    return list(itertools.product(settings["students"], settings["labels"]))


def heads(report: Mapping[str, Any]) -> list[str]:
    return ["T", *(f"{student}, {f'{labels:,}' if labels else 'all'} labels" for student, labels in kinds(report))]


def errors_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Test errors; in each column ° marks the temperatures that are not clearly worse than the best."""
    test = report["data"]["test"]
    best = {
        kind: min(report["settings"]["temperatures"], key=lambda t: sum(values(report, (*kind, t), "errors")))
        for kind in kinds(report)
    }

    def cell(kind: tuple[str, int], temperature: float | None) -> str:
        here, least = (values(report, (*kind, t), "errors") for t in (temperature, best[kind]))
        right = ([1 - wrong / test for wrong in errors] for errors in (least, here))
        worse = temperature is None or compare(*right, resolution=1 / test)["verdict"] == "hurt"
        return spread(here) + ("" if worse else " °")

    return heads(report), rows_of(report, cell)


def agreement_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Per cent of the test rows on which the student names the teacher's class."""
    return heads(report), rows_of(
        report, lambda kind, t: spread([100 * v for v in values(report, (*kind, t), "agreement")], "{:.2f}")
    )


def rows_of(report: Mapping[str, Any], cell: Any) -> list[list[str]]:
    """A row for the student alone and one for each temperature."""
    temperatures = (None, *report["settings"]["temperatures"])
    return [["alone" if t is None else f"{t:g}", *(cell(kind, t) for kind in kinds(report))] for t in temperatures]


def markdown(report: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """How it was measured, and both tables."""
    settings, data = report["settings"], report["data"]
    seeds = sorted({run["seed"] for run in report["runs"]})
    how = (
        f"{data['train']:,} rows, {settings['epochs']} epochs, {len(seeds)} seeds; hard weight "
        f"{settings['hard_weight']:g}, soft weight {settings['soft_weight']:g}. Errors on {data['test']:,} test rows, "
        f"mean ± standard deviation; the teacher makes {report['teacher_errors']}. ° is not clearly worse than the "
        "best temperature of the column: the 95 % interval of the paired difference includes 0."
    )
    agrees = "Rows on which the student names the teacher's class, in per cent:"
    errors, agreement = markdown_table(*errors_table(report)), markdown_table(*agreement_table(report))
    return "\n\n".join([soft_labels.where_and_how_long(dict(report)), how, errors, agrees, agreement])


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
