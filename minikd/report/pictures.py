"""Two pictures of a run: how the networks learned, and what soft labels look like.

matplotlib is imported when a picture is drawn, and without pyplot: no window, no global figure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.distillation import ALONE, DISTILLED, TEACHER, DistillResult

# From the palette of Okabe and Ito, which people tell apart with any kind of colour vision; and never colour alone.
BLUE, ORANGE, GREY, LIGHT = "#0072B2", "#D55E00", "#555555", "#BBBBBB"
CURVES = {
    # model: colour, line
    TEACHER: (GREY, ":"),
    ALONE: (ORANGE, "--"),
    DISTILLED: (BLUE, "-"),
}
STYLE: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
DOTS_PER_INCH = 150


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return file.getvalue()


# --- learning curves ---

PANELS = {
    # figure in the history: axis label, what is good
    "validation_accuracy": ("accuracy, %", 100.0),
    "validation_nll": ("negative log-likelihood, nats", 1.0),
}


def learning_curves(result: DistillResult) -> bytes | None:
    """Validation accuracy and negative log-likelihood over the epochs as a PNG, one column for each situation.

    Lines are means over the seeds, bands reach from the lowest to the highest. None if there is nothing to draw.

    Raises
    ------
    ImportError : matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(row["situation"] for row in result.history if row["situation"]))
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 4.2 * len(names), 6.4), layout="constrained")
        axes = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
        for column, situation in enumerate(names):
            for row, (what, (label, scale)) in enumerate(PANELS.items()):
                _curves(axes[row, column], result.history, situation, what, scale)
                if column == 0:
                    axes[row, column].set_ylabel(label)
            axes[0, column].set_title(f"student sees {situation}")
            axes[1, column].set_xlabel("epoch")
            axes[1, column].xaxis.set_major_locator(
                MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
            )
        _zoom(axes[0, 0], axes[1, 0], result.history)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(CURVES), frameon=False)
        seeds = len({row["seed"] for row in result.history})
        figure.align_ylabels(axes[:, 0])
        figure.suptitle(f"Learning curves on the validation part of {result.dataset.name}\n{_seeds(seeds)}")
        return _png(figure)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean of {count} seeds, band from the lowest to the highest"


def _curves(axes: Any, history: Sequence[dict[str, Any]], situation: str, what: str, scale: float) -> None:
    for model, (colour, line) in CURVES.items():
        values = scale * _by_seed(history, "" if model == TEACHER else situation, model, what)
        if not values.size:
            continue
        epochs = np.arange(1, values.shape[1] + 1)
        marker = "o" if len(epochs) < 3 else None
        axes.plot(epochs, values.mean(axis=0), line, color=colour, label=model, linewidth=1.8, marker=marker)
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _by_seed(history: Sequence[dict[str, Any]], situation: str, model: str, what: str) -> np.ndarray:
    """One figure as (seeds, epochs), of the seeds that trained this model to its end; NaN where it is not finite."""
    curves: dict[int, list[float]] = {}
    for row in history:
        if (row["situation"], row["model"]) == (situation, model):
            curves.setdefault(row["seed"], []).append(row[what])
    longest = max(map(len, curves.values()), default=0)
    values = np.array([curve for curve in curves.values() if len(curve) == longest], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _zoom(accuracy: Any, loss: Any, history: Sequence[dict[str, Any]]) -> None:
    """Leave the first tenth of the epochs out of the vertical scale, or it is all that one sees."""
    last = max(row["epoch"] for row in history)
    later = [row for row in history if row["epoch"] > last // 10]
    for axes, what, scale in ((accuracy, "validation_accuracy", 100), (loss, "validation_nll", 1)):
        values = scale * np.array([row[what] for row in later])
        values = values[np.isfinite(values)]
        if values.size:
            margin = 0.05 * max(float(np.ptp(values)), 0.01)
            axes.set_ylim(max(0.0, values.min() - margin), values.max() + margin)


# --- soft labels ---

SAMPLES = 4
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MOST_CLASSES = 10  # bars beside a sample
MOST_FEATURES = 50  # bars in place of an image


def soft_labels(result: DistillResult) -> bytes | None:
    """Confusing samples of the validation part, beside each the teacher's soft labels at several temperatures, as PNG.

    None if there is no teacher yet, or one that says nothing of that part. Raises ImportError without matplotlib.
    """
    scores = result.teacher_on_validation
    if result.teacher is None or scores is None:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    data, own = result.dataset, result.settings.temperature
    raw = data.raw(data.x_validation)
    chosen = confusing(F.of_host(F.softmax, scores), data.y_validation)
    temperatures = sorted({*TEMPERATURES, own})
    with matplotlib.rc_context(STYLE):
        size = (2.6 + 1.75 * len(temperatures), 1.1 + 1.8 * len(chosen))
        figure = Figure(figsize=size, layout="constrained")
        ratios = [1.1] + [1.0] * len(temperatures)
        axes = figure.subplots(len(chosen), 1 + len(temperatures), width_ratios=ratios, squeeze=False)
        for k, row in enumerate(chosen):
            label = int(data.y_validation[row])
            image = raw[row].reshape(data.feature_shape) if len(data.feature_shape) == 2 else None
            _sample(axes[k, 0], image, data.x_validation[row])
            axes[k, 0].set_xlabel(f"row {row}\nlabelled {data.class_names[label]}", fontsize=9)
            _bars(axes[k, 1:], scores[row], temperatures, own, data.class_names, label)
        for column, temperature in enumerate(temperatures):
            mine = temperature == own
            title = f"T = {temperature:g}" + (" (this run)" if mine else "")
            axes[0, column + 1].set_title(title, color=BLUE if mine else "black", fontweight="bold" if mine else None)
            axes[-1, column + 1].set_xlabel("probability")
        figure.suptitle(
            f"Soft labels: what the teacher sees in {len(chosen)} confusing samples of {data.name}\n"
            "Blue is the class on the label. The higher T, the more the other classes show."
        )
        return _png(figure)


def confusing(probabilities: np.ndarray, labels: np.ndarray, count: int = SAMPLES) -> list[int]:
    """The rows (n, c) whose second-largest probability is largest, no two of one label (n,)."""
    second = np.sort(probabilities, axis=1)[:, -2]
    rows: dict[int, int] = {}
    for row in np.argsort(-second, kind="stable"):
        rows.setdefault(int(labels[row]), int(row))
    return list(rows.values())[:count]


def _sample(axes: Any, image: np.ndarray | None, features: np.ndarray) -> None:
    """The sample itself: the image if it is one, bars if its features are few, else nothing."""
    if image is not None:
        axes.imshow(image, cmap="gray_r", interpolation="nearest")
    elif len(features) <= MOST_FEATURES:
        axes.barh(np.arange(len(features)), features, color=GREY)
        axes.invert_yaxis()
        axes.set_ylabel("normalised features", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _bars(
    row: Any, scores: np.ndarray, temperatures: Sequence[float], own: float, names: Sequence[str], label: int
) -> None:
    """The most probable classes as bars, one panel for each temperature; the label's own bar is coloured."""
    others = [c for c in np.argsort(-scores, kind="stable") if c != label]
    classes = sorted([label, *others[: MOST_CLASSES - 1]])
    colours = [BLUE if c == label else LIGHT for c in classes]
    for axes, temperature in zip(row, temperatures, strict=True):
        probabilities = F.of_host(F.softmax, scores, temperature=temperature)[classes]
        axes.barh(np.arange(len(classes)), probabilities, color=colours)
        axes.set(xlim=(0, 1), yticks=[], facecolor="#EAF3F9" if temperature == own else "none")
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(axis="x", color="#E0E0E0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, length=0)
        axes.invert_yaxis()
    row[0].set_yticks(np.arange(len(classes)), [names[c] for c in classes], fontsize=8)
