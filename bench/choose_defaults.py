"""Try teachers, students, temperatures and weights on the validation part, never on the test part.

    python bench/choose_defaults.py [--data digits] [--seeds 5]

For each seed the training and validation rows of the data set are pooled and divided anew, 4 to 1; every figure is an
accuracy on that seed's validation fifth, mean ± standard deviation over the seeds. The test part is not looked at.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np

from minikd import metrics
from minikd.data import Dataset, load
from minikd.distillation import Settings, fit, full_sizes
from minikd.nn import MLP

TEACHERS = [((128, 128), 0.3), ((256, 256), 0.0), ((256, 256), 0.3), ((256, 256), 0.5), ((512, 512), 0.5)]
STUDENTS = [(8,), (16,), (32,)]
TEMPERATURES = [1.0, 2.0, 4.0, 8.0]
HARD_WEIGHTS = [0.1, 0.5]
LABELS = [0, 100]


class Fold:
    """One seed's division of the rows that are not test rows."""

    def __init__(self, data: Dataset, seed: int) -> None:
        x = np.concatenate([data.x_train, data.x_validation])
        y = np.concatenate([data.y_train, data.y_validation])
        order = np.random.default_rng(seed).permutation(len(x))
        held_out, rest = order[: len(x) // 5], order[len(x) // 5 :]
        self.seed, self.features, self.classes = seed, data.features, data.classes
        self.x, self.y, self.x_held_out, self.y_held_out = x[rest], y[rest], x[held_out], y[held_out]

    def few(self, labels: int) -> np.ndarray:
        """The labels of `labels` rows, spread evenly over the classes; -1 elsewhere."""
        rng = np.random.default_rng(self.seed)
        by_class = [rng.permutation(np.flatnonzero(self.y == c)) for c in range(self.classes)]
        turn = [r for r in itertools.chain(*itertools.zip_longest(*by_class)) if r is not None][:labels]
        y = np.full_like(self.y, -1)
        y[turn] = self.y[turn]
        return y

    def train(self, sizes: tuple[int, ...], y: np.ndarray, soft: Any = None, dropout: float = 0.0, **how: Any) -> MLP:
        model = MLP(full_sizes(sizes, self.features, self.classes), dropout=dropout, seed=self.seed)
        fit(model, self.x, y, soft, seed=self.seed, **how)
        return model

    def accuracy(self, model: MLP) -> float:
        return metrics.accuracy(model.logits(self.x_held_out), self.y_held_out)


def summary(values: list[float]) -> str:
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    defaults = Settings()
    data = load(arguments.data)
    folds = [Fold(data, seed) for seed in range(arguments.seeds)]
    started = time.monotonic()
    teacher = {"epochs": defaults.teacher_epochs, "lr": defaults.teacher_lr}
    print(
        f"{data.name}: {arguments.seeds} seeds, {len(folds[0].x)} rows to train on, {len(folds[0].x_held_out)} held out"
    )
    print("\n| teacher | dropout | held-out accuracy, % |\n|---|---|---|")
    for sizes, dropout in TEACHERS:
        models = [fold.train(sizes, fold.y, dropout=dropout, **teacher) for fold in folds]
        print(f"| {sizes} | {dropout} | {summary([f.accuracy(m) for f, m in zip(folds, models, strict=True)])} |")
    models = [fold.train(defaults.teacher, fold.y, dropout=defaults.teacher_dropout, **teacher) for fold in folds]
    soft = [model.logits(fold.x) for fold, model in zip(folds, models, strict=True)]
    columns = " | ".join(f"T = {t:g}" for t in TEMPERATURES)
    print(f"\n| student | labels | hard weight | alone | {columns} |\n|---|---|---|---|{'---|' * len(TEMPERATURES)}")
    for sizes, labels in itertools.product(STUDENTS, LABELS):
        targets = [fold.few(labels) if labels else fold.y for fold in folds]
        how = {"epochs": defaults.epochs, "lr": defaults.lr}
        alone = summary([f.accuracy(f.train(sizes, y, **how)) for f, y in zip(folds, targets, strict=True)])
        for hard in HARD_WEIGHTS:
            cells = []
            for t in TEMPERATURES:
                weights = {"temperature": t, "hard_weight": hard, "soft_weight": 1 - hard}
                runs = zip(folds, targets, soft, strict=True)
                cells.append(summary([f.accuracy(f.train(sizes, y, z, **how, **weights)) for f, y, z in runs]))
            print(f"| {sizes} | {labels or 'all'} | {hard} | {alone} | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
