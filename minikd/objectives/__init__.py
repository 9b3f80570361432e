"""Objectives: what a student is trained on, as terms that are added up.

``HardLabels(0.3) + SoftLabels(0.7, temperature=4)``, or the same as text for `parse`. Every term is a small object with
its formula and its source; `NAMES` is the table of all of them.
"""

from __future__ import annotations

from minikd.errors import ArgumentError
from minikd.expressions import parse as parse_expression
from minikd.objectives.labels import HardLabels, LogitRegression, SoftCrossEntropy, SoftLabels
from minikd.objectives.objective import IGNORED, Batch, Objective, Sum, Term, Varying, as_target

__all__ = [
    "IGNORED",
    "NAMES",
    "Batch",
    "HardLabels",
    "LogitRegression",
    "Objective",
    "SoftCrossEntropy",
    "SoftLabels",
    "Sum",
    "Term",
    "Varying",
    "as_target",
    "parse",
]

NAMES: dict[str, type[Term]] = {
    kind.__name__: kind for kind in (HardLabels, SoftLabels, SoftCrossEntropy, LogitRegression)
}
EXAMPLE = '"HardLabels(0.3) + SoftLabels(0.7, temperature=4)"'


def parse(text: str, where: str = "objective", argument: str = "text") -> Objective:
    """The objective that a text describes; `str(objective)` is such a text.

    Raises
    ------
    ArgumentError : an unknown term, an unknown or impossible value, or no sum of terms.
    """
    found = parse_expression(where, argument, text, NAMES, EXAMPLE)
    if not isinstance(found, Objective):
        raise ArgumentError(where, argument, expected="a sum of terms", got=repr(text), fix=f"For example: {EXAMPLE}")
    return found
