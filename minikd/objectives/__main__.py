"""``python -m minikd.objectives`` prints the table of terms, and the presets, as the page docs/objectives.md."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from minikd.objectives import NAMES, PRESETS, Term

PREAMBLE = """# Objectives

Made from the table in `minikd/objectives` by `python -m minikd.objectives > docs/objectives.md`.

An objective is a sum of terms, in Python or as text: `HardLabels(0.3) + SoftLabels(0.7, temperature=4)`. Each term
counts with its `weight`, the first argument. z_s and z_t are the student's and the teacher's logits of n rows and c
classes, y the labels, p and q the softened student and teacher; values are means over the rows unless a formula says
otherwise. A `_schedule` is a factor of progress such as `"cosine(1, 0.1)"` that multiplies the value of that name.
"""
SHARED = ("weight", "weight_schedule")


def page() -> str:
    """The whole page: each term with its formula, source, needs and fields, then each preset."""
    terms = [_term(kind) for kind in NAMES.values()]
    presets = [_preset(name, function) for name, function in PRESETS.items()]
    return "\n".join(
        [PREAMBLE, *terms, "# Presets\n", "`preset(name, ...)` is the objective of another toolkit.\n", *presets]
    )


def _term(kind: type[Term]) -> str:
    fields = [f for f in dataclasses.fields(kind) if f.init and f.name not in SHARED]
    lines = [f"## {kind.__name__}", "", f"    {kind.formula}", "", *_prose(kind), ""]
    lines += [f"- needs: {', '.join(sorted(kind.needs))}" + _layers(kind)]
    lines += ["- " + ", ".join(f"{f.name} = {f.default!r}" for f in fields)] if fields else []
    return "\n".join([*lines, f"- source: {kind.source}"]) + "\n"


def _layers(kind: type[Term]) -> str:
    names = {f.name for f in dataclasses.fields(kind)}
    return (
        "; the outputs of layers"
        if "pairs" in names
        else "; the outputs of layers, if named"
        if "layers" in names
        else ""
    )


def _preset(name: str, function: Callable[..., Any]) -> str:
    options = inspect.signature(function).parameters.values()
    signature = ", ".join(f"{o.name}={o.default!r}" for o in options)
    return "\n".join([f"## preset({name!r})", "", f"    {signature}", "", *_prose(function)]) + "\n"


def _prose(documented: Any) -> list[str]:
    """What a docstring says before its table of parameters."""
    text = inspect.getdoc(documented) or ""
    return text.split("\nParameters\n")[0].rstrip().splitlines()


if __name__ == "__main__":
    print(page(), end="")
