"""Objectives: what a student is trained on, as terms that are added up.

``HardLabels(0.3) + SoftLabels(0.7, temperature=4)``, or the same as text for `parse`. Every term is a small object with
its formula and its source; `NAMES` is the table of all of them, and docs/objectives.md is made from it. `preset` gives
the objectives of other toolkits.
"""

from __future__ import annotations

from minikd.errors import ArgumentError
from minikd.expressions import parse as parse_expression
from minikd.objectives.divergences import (
    DecoupledKD,
    JensenShannon,
    ReverseKL,
    SkewedKL,
    StandardisedLabels,
    TotalVariation,
)
from minikd.objectives.features import Attention, Hints
from minikd.objectives.labels import HardLabels, LogitRegression, SoftCrossEntropy, SoftLabels
from minikd.objectives.objective import IGNORED, Batch, Objective, Sum, Term, Varying, as_target
from minikd.objectives.presets import PRESETS, preset
from minikd.objectives.relations import DIST, RelationalAngle, RelationalDistance
from minikd.objectives.teachers import ConfidentSoftLabels, CorrectedSoftLabels, TeacherFree

__all__ = [
    "DIST",
    "IGNORED",
    "NAMES",
    "PRESETS",
    "Attention",
    "Batch",
    "ConfidentSoftLabels",
    "CorrectedSoftLabels",
    "DecoupledKD",
    "HardLabels",
    "Hints",
    "JensenShannon",
    "LogitRegression",
    "Objective",
    "RelationalAngle",
    "RelationalDistance",
    "ReverseKL",
    "SkewedKL",
    "SoftCrossEntropy",
    "SoftLabels",
    "StandardisedLabels",
    "Sum",
    "TeacherFree",
    "Term",
    "TotalVariation",
    "Varying",
    "as_target",
    "parse",
    "preset",
]

NAMES: dict[str, type[Term]] = {
    kind.__name__: kind
    for kind in (
        HardLabels,
        SoftLabels,
        SoftCrossEntropy,
        LogitRegression,
        ReverseKL,
        JensenShannon,
        SkewedKL,
        TotalVariation,
        DecoupledKD,
        StandardisedLabels,
        ConfidentSoftLabels,
        CorrectedSoftLabels,
        TeacherFree,
        DIST,
        RelationalDistance,
        RelationalAngle,
        Hints,
        Attention,
    )
}
EXAMPLE = '"HardLabels(0.3) + SoftLabels(0.7, temperature=4)"'


def parse(text: str, where: str = "objective", argument: str = "text") -> Objective:
    """The objective that a text describes; `str(objective)` is such a text, and ``preset("keras")`` is one, too.

    Raises
    ------
    ArgumentError : an unknown term, an unknown or impossible value, or no sum of terms.
    """
    found = parse_expression(where, argument, text, {**NAMES, "preset": preset}, EXAMPLE)
    if not isinstance(found, Objective):
        raise ArgumentError(where, argument, expected="a sum of terms", got=repr(text), fix=f"For example: {EXAMPLE}")
    return found
