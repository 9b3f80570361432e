"""A class that the transfer set lacks: a student that never saw it, before and after its biases are corrected.

python bench/omitted_class.py                        without class 3, without class 6, only classes 7 and 8
python bench/omitted_class.py --temperatures 4       at one temperature
python bench/omitted_class.py --quick                a look in seconds; its figures mean nothing
python bench/omitted_class.py --update-readme        write the table of the last run into the README

Students learn from soft labels alone. The correction sees the validation rows without their labels, and the known
frequency of each class or what the teacher says of these rows. For comparison, the last column is what the labels of
these rows would choose; test labels choose nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soft_labels
from soft_labels import Log, Material, spread

import minikd as kd
from minikd.bench.report import markdown_table
from minikd.bench.suite import script, update_readmes
from minikd.bias import matching_bias
from minikd.report.table import NOTHING, Table, show

SOFT = {"hard_weight": 0.0, "soft_weight": 1.0}
QUICK = {"seeds": 2, "epochs": 1, "student": "16", "temperatures": [4.0]}
# Of the classes: what the transfer set lacks; the last set keeps only classes 7 and 8.
OMITTED: dict[str, tuple[int, ...]] = {"all": (), "no-3": (3,), "no-6": (6,), "only-7-8": (0, 1, 2, 3, 4, 5, 6, 9)}
NAMED_TEMPERATURE = 0.01  # so near 0 that mean probabilities are how often a class is named


class Correction(NamedTuple):
    """How biases are corrected without labels: heading, which may move, to whose frequencies, at which temperature."""

    label: str
    few: bool  # only the omitted classes' biases, or those of the others if they are fewer; else all
    known: bool  # the known frequencies, which are equal here; else the teacher's mean probabilities
    temperature: float = 1.0


CORRECTIONS = {
    "few": Correction("few, known", True, True),
    "all": Correction("all, known", False, True),
    "teacher": Correction("all, teacher's", False, False),
    "named": Correction("few, named", True, True, NAMED_TEMPERATURE),
}
BEFORE, LABELLED = "before", "labelled"
LABELS = {BEFORE: "before", **{k: c.label for k, c in CORRECTIONS.items()}, LABELLED: "few, by labels"}
NOTE = (
    "Errors, in brackets those on rows of omitted classes. few: the biases of the omitted classes move, or those of "
    "the others where these are fewer; all: every bias. known: mean probabilities match the known frequencies; "
    "teacher's: those of the teacher; named: the known frequencies are those with which classes are named; by labels: "
    "one number for the few biases, the best for the labels of the validation rows. raised by: what the first "
    "correction adds to the biases of omitted classes beyond the others'."
)
SHIFTS = np.linspace(-15, 15, 301)  # what the labels choose among


def add_arguments(parser: argparse.ArgumentParser) -> None:
    soft_labels.add_arguments(parser, "omitted")
    parser.add_argument("--student", default="300-300", metavar="SIZES", help="hidden layers")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[4.0, 20.0], metavar="T")
    parser.add_argument("--sets", nargs="+", choices=list(OMITTED), default=list(OMITTED), metavar="SET")


def run(options: argparse.Namespace) -> int:
    """Train, correct and report, or bring a README up to date; returns the exit code."""
    path = Path(options.out)
    if options.update_readme is not None:
        update_readmes("bench/omitted_class.py", "omitted", path, options.update_readme, markdown)
        return 0
    vars(options).update(QUICK if options.quick else {})
    material = soft_labels.prepare(options)
    settings = {name: getattr(options, name) for name in ("student", "temperatures", "sets", "seeds", "epochs")}
    log = Log(path, settings, material)
    for seed in range(options.seeds):
        for temperature, name in itertools.product(options.temperatures, options.sets):
            found = measure(options, material, name, temperature, seed)
            told = ", ".join(f"{key} {after['errors']}" for key, after in found["after"].items())
            log.add(found, f"{name}, T = {temperature:g}: errors {told}")
        log.write()
    columns, rows = table(log.report)
    show(Table(tuple(columns), "<" + ">" * (len(columns) - 1), [tuple(row) for row in rows], NOTE), sys.stdout)
    return 0


def measure(
    options: argparse.Namespace, material: Material, name: str, temperature: float, seed: int
) -> dict[str, Any]:
    """Train one student without some classes, and count its errors as it is and after each correction."""
    data, omitted = material.data, OMITTED[name]
    rows = np.flatnonzero(~np.isin(data.y_train, omitted))
    how = {**SOFT, "temperature": temperature, "epochs": epochs(options.epochs, len(data.y_train), len(rows))}
    hidden = soft_labels.hidden_sizes(options.student)
    student = soft_labels.trained_student(material, hidden, seed, data.y_train, rows, **how)
    scores = soft_labels.logits(student, data.x_test)
    added = {BEFORE: np.zeros(data.classes)}
    if omitted:
        unlabelled = soft_labels.logits(student, data.x_validation)
        added |= {key: matched(unlabelled, material, omitted, how) for key, how in CORRECTIONS.items()}
        added[LABELLED] = chosen(unlabelled, data.y_validation, omitted)
    after = {key: counts(scores + b, data.y_test, omitted) | {"added": list(b)} for key, b in added.items()}
    return {"set": name, "temperature": temperature, "seed": seed, "rows": len(rows), "after": after}


def epochs(whole: int, rows: int, left: int) -> int:
    """As many passes over the rows that are left as make the steps of `whole` passes over all of them."""
    return math.ceil(whole * rows / left)


def matched(scores: np.ndarray, material: Material, omitted: Sequence[int], how: Correction) -> np.ndarray:
    """What `kd.correct_bias` adds to a student's biases that has these scores of the validation rows."""
    classes, said = scores.shape[1], material.logits["validation"]
    equal = np.full(classes, 1 / classes)
    wanted = equal if how.known else kd.functional.softmax(said).mean(axis=0, dtype=np.float64)
    moving = fewer(omitted, classes) if how.few else None
    return matching_bias(scores, wanted, classes=moving, temperature=how.temperature)


def chosen(scores: np.ndarray, y: np.ndarray, omitted: Sequence[int]) -> np.ndarray:
    """The one number that, added to the biases of the few classes, leaves the fewest errors on labelled rows."""
    few = np.isin(np.arange(scores.shape[1]), fewer(omitted, scores.shape[1]))
    left = [soft_labels.errors(scores + shift * few, y) for shift in SHIFTS]
    found: np.ndarray = SHIFTS[int(np.argmin(left))] * few
    return found


def fewer(omitted: Sequence[int], classes: int) -> list[int]:
    """The omitted classes, or all others where those are fewer."""
    others = [k for k in range(classes) if k not in omitted]
    return list(omitted) if len(omitted) <= len(others) else others


def counts(scores: np.ndarray, y: np.ndarray, omitted: Sequence[int]) -> dict[str, Any]:
    """Test errors in all, and of rows of the omitted classes; how many rows those are."""
    absent = np.isin(y, omitted)
    return {
        "errors": soft_labels.errors(scores, y),
        "errors_on_omitted": soft_labels.errors(scores[absent], y[absent]),
        "omitted_rows": int(absent.sum()),
    }


# --- the table ---


def table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """For each transfer set and temperature: errors before and after each correction."""
    heads = ["transfer set, T", *LABELS.values(), "raised by"]
    return heads, [
        row(report, name, t)
        for name, t in itertools.product(report["settings"]["sets"], report["settings"]["temperatures"])
    ]


def row(report: Mapping[str, Any], name: str, temperature: float) -> list[str]:
    runs = [run for run in report["runs"] if (run["set"], run["temperature"]) == (name, temperature)]

    def cell(key: str) -> str:
        found = [run["after"][key] for run in runs if key in run["after"]]
        if not found:
            return NOTHING
        behind = f" ({spread([f['errors_on_omitted'] for f in found])})" if OMITTED[name] else ""
        return spread([f["errors"] for f in found]) + behind

    raised = [rise(run["after"]["few"]["added"], OMITTED[name]) for run in runs if OMITTED[name]]
    head = f"{words(name, report['data']['class_names'])}, {temperature:g}"
    return [head, *map(cell, LABELS), spread(raised, "{:.1f}") if raised else NOTHING]


def words(name: str, class_names: Sequence[str]) -> str:
    """A transfer set by the names of the fewer classes that it lacks or has."""
    omitted = OMITTED[name]
    if not omitted:
        return "all classes"
    few = fewer(omitted, len(class_names))
    listed = ", ".join(class_names[k] for k in few)
    return f"without {listed}" if set(few) == set(omitted) else f"only {listed}"


def rise(added: Sequence[float], omitted: Sequence[int]) -> float:
    """How much more was added to the biases of omitted classes than to the others', in the mean."""
    absent = np.isin(np.arange(len(added)), omitted)
    return float(np.mean(np.array(added)[absent]) - np.mean(np.array(added)[~absent]))


def markdown(report: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """How it was measured, and the table."""
    settings, data = report["settings"], report["data"]
    seeds = {run["seed"] for run in report["runs"]}
    how = (
        f"Student {settings['student']}, soft labels alone, as many steps as {settings['epochs']} passes over all "
        f"{data['train']:,} rows, {len(seeds)} seeds. {data['test']:,} test rows, mean ± standard deviation; the "
        f"teacher makes {report['teacher_errors']} errors. Corrected by {data['validation']:,} validation rows. {NOTE}"
    )
    heads, rows = table(report)
    return "\n\n".join([soft_labels.where_and_how_long(dict(report)), how, markdown_table(heads, rows)])


if __name__ == "__main__":
    sys.exit(script(__file__, __doc__, add_arguments, run))
