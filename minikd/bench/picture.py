"""The picture: how fast each contender moves the bytes of a kernel, under what the machine's memory allows.

matplotlib is imported when it is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minikd.bench.contenders import CONTENDERS
from minikd.bench.report import main_cases

# Panels, those of them that were measured.
PANELS = ("distillation_loss", "softmax", "cross_entropy", "log_softmax", "bias_gelu", "adam_step")
COLUMNS = 3


class Mark(NamedTuple):
    """How a contender is drawn. Colours are Okabe and Ito's; no two contenders share a symbol."""

    colour: str
    symbol: str
    line: str


MARKS = {
    "c": Mark("#0072B2", "o", "-"),
    "numba": Mark("#56B4E9", "D", "-"),
    "function": Mark("#0072B2", ".", ":"),
    "torch": Mark("#D55E00", "s", "--"),
    "torch-out": Mark("#D55E00", "P", ":"),
    "torch-compile": Mark("#E69F00", "^", "--"),
    "jax": Mark("#009E73", "v", "--"),
    "scipy": Mark("#CC79A7", "x", "--"),
    "numpy": Mark("#555555", "+", "--"),
}
LIMIT = "#BBBBBB"


def roofline(report: Mapping[str, Any]) -> bytes | None:
    """A panel for each kernel as PNG: bytes per second over shapes, and the limit above. None if nothing was measured.

    Raises
    ------
    ImportError : matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    mains = main_cases(report["cases"])
    names = [name for name in PANELS if any(case["kernel"] == name for case in mains)]
    if not names:
        return None
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(max(7.5, 1 + 4.0 * columns), 1.4 + 3.1 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for panel, name in zip(axes, names, strict=False):
            _panel(panel, name, [case for case in mains if case["kernel"] == name], report["ratios"])
        for panel in axes[len(names) :]:
            panel.set_axis_off()
        for panel in axes[::columns]:
            panel.set_ylabel("GB/s")
        handles: dict[str, Any] = {}
        for panel in axes:
            handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 + columns, frameon=False)
        threads = "one thread" if mains[0]["threads"] == 1 else f"{mains[0]['threads']} threads"
        figure.suptitle(
            f"Bytes that a kernel has to move, per second (float32, {threads}): higher is better\n"
            "×2: the fastest peer in the same run needs twice the time of our kernel",
            fontsize=10,
        )
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
        return file.getvalue()


def _panel(axes: Any, name: str, cases: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]]) -> None:
    places = list(range(len(cases)))
    _limit(axes, [max(case["limit"].values(), default=0) / 1e9 for case in cases])
    for key, mark in MARKS.items():
        speeds = [case["contenders"].get(key, {}).get("bytes_per_second", float("nan")) / 1e9 for case in cases]
        if any(speed == speed for speed in speeds):
            label, ours = CONTENDERS[key].label, CONTENDERS[key].ours
            axes.plot(
                places,
                speeds,
                mark.line,
                color=mark.colour,
                marker=mark.symbol,
                label=label,
                linewidth=2.2 if ours and mark.line == "-" else 1.0,
                markersize=6,
                zorder=3 if ours else 2,
            )
    for place, case in zip(places, cases, strict=True):
        _ratio(axes, place, case, ratios)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.08)
    axes.set_title(name)
    axes.set_xticks(places, [_name(case["shape"]) for case in cases])
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def _limit(axes: Any, limits: Sequence[float]) -> None:
    """The measured bandwidth of each shape as a step that closes the panel above."""
    for place, limit in enumerate(limits):
        if limit:
            label = "limit of the memory, measured" if place == 0 else None
            axes.hlines(limit, place - 0.5, place + 0.5, color=LIMIT, linewidth=4, label=label, zorder=1)


def _name(shape: Sequence[int]) -> str:
    return f"{shape[0] / 1e6:.2f} million\nparameters" if len(shape) == 1 else "\n× ".join(map(str, shape))


def _ratio(axes: Any, place: int, case: Mapping[str, Any], ratios: Sequence[Mapping[str, Any]]) -> None:
    """How many times faster than the fastest peer, above the point of our fastest backend's kernel."""
    from matplotlib.patheffects import withStroke

    here = [r for r in ratios if (r["kernel"], r["shape"]) == (case["kernel"], case["shape"])]
    first = next((r for r in here if r["contender"] in ("c", "numba")), None)
    if first is None:
        return
    speed = case["contenders"][first["contender"]]["bytes_per_second"] / 1e9
    axes.annotate(
        f"×{first['same']:.1f}",
        (place, speed),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        fontweight="bold",
        zorder=5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
