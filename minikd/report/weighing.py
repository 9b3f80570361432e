"""What the terms of an objective weigh, as a table and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TextIO

from minikd.report.table import NOTHING, Table, show, show_sentence
from minikd.weighing import TermWeight, Weighing, percent

NOTE = (
    "value: what the term adds to the loss, weight and all. gradient: the L2 norm of that value's gradient over all "
    "parameters. share: this norm as a part of all terms' norms, which make 100 % together."
)


def show_weighings(weighings: Sequence[Weighing], accuracies: Mapping[str, float | None], stream: TextIO) -> None:
    """Write the formulas, the table, the angles, and the validation accuracies of these models."""
    for table in (formulas_table(weighings[0]), weighing_table(weighings)):
        show(table, stream)
        print(file=stream)
    for sentence in filter(None, (angles_in_words(weighings), accuracies_in_words(accuracies))):
        show_sentence("", sentence, stream)
        print(file=stream)


def formulas_table(weighing: Weighing) -> Table:
    """Each term and its formula."""
    rows = [(term.name, term.formula + ", without T²" * (term.scale_t2 is False)) for term in weighing.terms]
    return Table(("term", "formula"), "<<", rows)


def weighing_table(weighings: Sequence[Weighing]) -> Table:
    """For each moment a row for each term: its coefficient, value, gradient norm and share."""
    rows: list[tuple[str, ...]] = []
    for weighing in weighings:
        rows.append((_heading(weighing),))
        rows += [_row(term) for term in weighing.terms]
    return Table(("term", "coefficient", "value", "gradient", "share %"), "<>>>>", rows, NOTE)


def _heading(weighing: Weighing) -> str:
    labelled = "" if weighing.labelled == weighing.rows else f", {weighing.labelled:,} of them labelled"
    together = f", {weighing.networks} networks together" if weighing.networks > 1 else ""
    return ", ".join(filter(None, (weighing.moment, f"first batch: {weighing.rows:,} rows{labelled}{together}")))


def _row(term: TermWeight) -> tuple[str, ...]:
    share = NOTHING if math.isnan(term.share) else percent(term.share)
    return term.name, _coefficient(term), f"{term.value:.4g}", f"{term.gradient_norm:.4g}", share


def _coefficient(term: TermWeight) -> str:
    """The number, and how it comes about where T² is in it."""
    if term.scale_t2 and term.temperature not in (None, 1):
        return f"{term.weight:.3g}·{term.temperature:.3g}² = {term.coefficient:.3g}"
    return f"{term.coefficient:.3g}"


def angles_in_words(weighings: Sequence[Weighing]) -> str:
    """How far the gradients of the hard and of the soft terms point apart; empty where one of them is missing."""
    known = [weighing for weighing in weighings if weighing.angle is not None]
    if not known:
        return ""
    angles = [f"{w.angle:.0f}°{'' if k else ' apart'} {w.moment}".rstrip() for k, w in enumerate(known)]
    return (
        f"The gradients of the hard and of the soft terms are {' and '.join(angles)}: "
        "at 0° they want the same, and above 90° they work against each other."
    )


def accuracies_in_words(accuracies: Mapping[str, float | None]) -> str:
    """How often each of these models is right, as far as that is known."""
    parts = [f"{name} {100 * share:.1f} %" for name, share in accuracies.items() if share is not None]
    return f"Accuracy on the validation part: {', '.join(parts)}." if parts else ""
