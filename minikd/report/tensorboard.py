"""The history as TensorBoard events, one run for each training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from minikd.errors import BackendError

FIGURES = ("loss", "lr", "validation_accuracy", "validation_nll")


def write_events(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Add these rows of a history to the event files below a folder.

    Raises
    ------
    BackendError : tensorboardX, which writes the files, is not installed.
    """
    try:
        writer_of = import_module("tensorboardX").SummaryWriter
    except ImportError as error:
        fix = "pip install 'minikd[tensorboard]' brings it."
        raise BackendError("tensorboard", "tensorboardX", expected="installed", got=str(error), fix=fix) from error
    names = [", ".join(filter(None, (f"seed {r['seed']}", r["situation"], r["model"]))) for r in history]
    for name in dict.fromkeys(names):
        with writer_of(str(folder / re.sub(r"[^\w.]+", "-", name))) as writer:
            for row in (row for row, own in zip(history, names, strict=True) if own == name):
                figures = {figure: row[figure] for figure in FIGURES if row.get(figure) is not None}
                for term in row["terms"]:
                    figures |= {f"{term['term']}/{figure}": term[figure] for figure in ("value", "gradient_share")}
                for figure, value in figures.items():
                    writer.add_scalar(figure, value, row["epoch"])
