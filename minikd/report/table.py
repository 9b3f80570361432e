"""Tables as data, laid out as text and coloured by rich on a terminal; and the verdict in words."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

import numpy as np

GAP = "  "
NOTHING = "–"  # an en dash, where there is nothing to say


@dataclass(frozen=True)
class Table:
    """Cells as texts, nothing about how they look.

    Attributes
    ----------
    columns : the headings.
    align : "<" or ">" for each column.
    rows : one text for each column; a row of one text is a heading of the rows below it.
    note : what the reader must know to read it, or nothing.
    """

    columns: tuple[str, ...]
    align: str
    rows: Sequence[tuple[str, ...]]
    note: str = ""


# --- the results of a distillation ---

# Key in a situation's figures → what its row is called; a list of models gets a number behind each.
MODELS = {
    "teacher": "teacher",
    "assistants": "assistant",
    "student_alone": "student alone",
    "generations": "generation",
    "student_distilled": "student distilled",
    "ensemble": "ensemble of generations",
}
NOTE = (
    "Means over the seeds, ± standard deviation, on the test part. NLL: negative log-likelihood in nats. "
    "ECE: expected calibration error. agrees: share of rows on which the student names the teacher's class."
)


def situations(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each situation of a report: its name ("all labels", "100 labels") and its figures."""
    for figures in (report, report["few_labels"]):
        if figures is not None:
            labels = figures["labels"]
            yield f"{labels} labels", figures


def results_table(report: Mapping[str, Any]) -> Table:
    """For each situation of a report: teacher, students and the networks between, and what was measured of them."""
    rows: list[tuple[str, ...]] = []
    for name, figures in situations(report):
        rows.append((f"student sees {name}",))
        for key, words in MODELS.items():
            models = figures[key] if isinstance(figures[key], list) else [figures[key]] * (figures[key] is not None)
            numbered = isinstance(figures[key], list)
            rows += [_row(f"{words} {k}" if numbered else words, model) for k, model in enumerate(models, 1)]
    columns = ("", "accuracy %", "NLL", "ECE", "agrees %", "parameters", "bytes")
    return Table(columns, "<>>>>>>", rows, NOTE)


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        _mean(figures["test_accuracy"], "{:.2f}", 100, spread=True),
        _mean(figures["test_nll"], "{:.3f}"),
        _mean(figures["test_ece"], "{:.3f}"),
        _mean(figures.get("agreement", ()), "{:.2f}", 100),
        _count(figures["parameters"]),
        _count(figures["bytes"]),
    )


def _mean(values: Sequence[float | None], form: str, scale: float = 1, spread: bool = False) -> str:
    """The mean in this form, with ± the deviation over the seeds if there are two or more; a dash if there is none."""
    numbers = scale * np.array([np.nan if v is None else v for v in values], np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        return NOTHING
    text = form.format(numbers.mean())
    return f"{text} ± {form.format(numbers.std(ddof=1))}" if spread and numbers.size > 1 else text


def _count(number: int | None) -> str:
    return NOTHING if number is None else f"{number:,}"


# --- the verdict ---

SENTENCES = {
    "helped": "With {situation} distillation helped: {mean} points of test accuracy "
    "(95 % interval {low} to {high}, {n} paired seeds).",
    "hurt": "With {situation} distillation hurt: {mean} points of test accuracy "
    "(95 % interval {low} to {high}, {n} paired seeds).",
    "no clear difference": "With {situation} there is no clear difference: {mean} points of test accuracy "
    "(95 % interval {low} to {high} includes 0, {n} paired seeds).",
    "not enough seeds": "With {situation} one seed is not enough for a verdict: {mean} points of test accuracy; "
    "a second paired seed gives an interval.",
}
NOTHING_TO_COMPARE = "With {situation} there is nothing to compare yet."


def verdicts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each situation the verdict's name ("helped", "hurt", …) and the sentence that says it, interval included."""
    return [(figures["verdict"], _sentence(name, figures)) for name, figures in situations(report)]


def _sentence(situation: str, figures: Mapping[str, Any]) -> str:
    difference = figures["difference"]
    if difference["mean"] is None:
        return NOTHING_TO_COMPARE.format(situation=situation)
    mean, interval = 100 * difference["mean"], difference["interval"]
    low, high = (100 * bound for bound in interval) if interval else (mean, mean)
    digits = 1 if high - low >= 1 else 2  # a narrow interval needs the second decimal to be told from 0
    mean, low, high = (f"{round(v, digits) + 0.0:+.{digits}f}" for v in (mean, low, high))
    n = len(difference["per_seed"])
    return SENTENCES[figures["verdict"]].format(situation=situation, mean=mean, low=low, high=high, n=n)


# --- rendering ---


def width_of(stream: TextIO) -> int:
    """Columns to write in: the terminal's, but 120 at most; 80 for a file or a pipe."""
    return min(120, shutil.get_terminal_size().columns) if stream.isatty() else 80


def has_rich(stream: TextIO) -> bool:
    """Whether output to this stream can be drawn by rich: it is a terminal, and rich is installed."""
    able = stream.isatty() and os.environ.get("TERM") != "dumb"
    return able and importlib.util.find_spec("rich") is not None


class Line(NamedTuple):
    """One line of text, and the name under which STYLES may have a style for it."""

    text: str
    name: str = ""


# How lines look on a terminal with rich; everywhere else they are the same lines without it.
STYLES = {
    "heading": "bold",
    "section": "bold cyan",
    "rule": "dim",
    "note": "dim",
    "student distilled": "bold",
    "helped": "bold green",
    "hurt": "bold red",
    "no clear difference": "bold",
    "not enough seeds": "bold yellow",
    "warning": "bold yellow",
}


def plain(table: Table, width: int = 80) -> str:
    """A table as aligned text; a last column that is aligned to the left is wrapped to the width."""
    return "\n".join(line.text for line in _lay_out(table, width))


def _lay_out(table: Table, width: int) -> list[Line]:
    full = [row for row in (table.columns, *table.rows) if len(row) == len(table.columns)]
    widths = [max(len(row[k]) for row in full) for k in range(len(table.columns))]
    if table.align[-1] == "<":
        widths[-1] = min(widths[-1], max(20, width - sum(widths[:-1]) - len(GAP) * (len(widths) - 1)))
    lines: list[Line] = []
    if any(table.columns):
        rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
        lines = [*_cells(table.columns, widths, table.align, "heading"), Line(rule, "rule")]
    for row in table.rows:
        if len(row) == len(table.columns):
            lines += _cells(row, widths, table.align, row[0])
        else:
            between = lines and lines[-1].name != "rule"
            lines += [*([Line("")] if between else []), Line(row[0], "section")]
    note = textwrap.wrap(table.note, width, break_on_hyphens=False)
    return lines + [Line(text, "note") for text in (["", *note] if note else [])]


def _cells(row: tuple[str, ...], widths: Sequence[int], align: str, name: str) -> list[Line]:
    """One row as the lines that its last cell needs."""
    *cells, last = ([cell] for cell in row)
    if align[-1] == "<":
        last = textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False)
    texts = (
        GAP.join(f"{cell:{side}{w}}" for cell, side, w in zip(line, align, widths, strict=True))
        for line in itertools.zip_longest(*cells, last, fillvalue="")
    )
    return [Line(text.rstrip(), name) for text in texts]


def show(table: Table, stream: TextIO) -> None:
    """Write a table: in colour on a terminal with rich, else as plain text."""
    _print(_lay_out(table, width_of(stream)), stream)


def show_sentence(name: str, sentence: str, stream: TextIO) -> None:
    """Write a sentence, wrapped; on a terminal with rich in the colour that STYLES has for this name."""
    whole = sentence.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(whole, width_of(stream), break_on_hyphens=False)
    _print([Line(text.replace("\N{NO-BREAK SPACE}", " "), name) for text in lines], stream)


def _print(lines: Sequence[Line], stream: TextIO) -> None:
    if not has_rich(stream):
        print(*(line.text for line in lines), sep="\n", file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for line in lines:
        console.print(Text(line.text, STYLES.get(line.name, "")), soft_wrap=True)
