"""What int8 costs a student, and what training on with its roundings in the loop gives back.

    python bench/quantise.py [--data digits] [--seeds 5] [--students 16 8 4]
    python bench/quantise.py --outlier 100      with one broken row among those that ranges are taken from

For each seed a teacher is trained, a student is distilled from it, and the student is written in int8: as it is, with
each calibration, and after it was trained on in int8's roundings. Training on is more training too, so beside it stands
the student that took the same further steps in float and was written in int8 afterwards. Figures are of the test part,
mean ± standard deviation over the seeds: the accuracy in per cent, and KL(teacher ‖ student) in nats.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from minikd import metrics
from minikd.data import load
from minikd.distillation import Settings, full_sizes
from minikd.export.finetune import EPOCHS, LEARNING_RATE, finetune
from minikd.export.network import Network
from minikd.export.quantise import quantise
from minikd.nn import MLP
from minikd.training import fit

FORMS = (
    "float",
    "int8, min-max",
    "int8, percentile 99.9",
    "int8, best",
    "int8, trained on in float",
    "int8, trained on in int8",
)


def forms_of(student: MLP, x: np.ndarray, y: np.ndarray, soft: np.ndarray, seed: int) -> dict[str, Any]:
    """Each form of a student, by name: what answers raw features with logits."""
    network = Network.of(student)
    found: dict[str, Any] = {"float": student}
    for name in FORMS[1:4]:
        kind = name.removeprefix("int8, ").split(" ")[0]
        found[name] = quantise(network, x, calibration=kind, on_scale=True)
    longer = MLP(student.sizes, student.activation)
    longer.load_state_dict(student.state_dict())
    longer.normalisation = student.normalisation
    fit(longer, x, y, soft, epochs=EPOCHS, lr=LEARNING_RATE, seed=seed)
    found[FORMS[4]] = quantise(Network.of(longer), x, on_scale=True)
    found[FORMS[5]] = finetune(student, x, y, soft, on_scale=True, seed=seed).quantised
    return found


def summary(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--outlier", type=float, default=1, help="multiply one row of those that are calibrated with")
    parser.add_argument("--students", type=int, nargs="+", default=[16, 8, 4])
    arguments = parser.parse_args()
    data, defaults, started = load(arguments.data), Settings(), time.monotonic()
    x_test, seen = data.raw(data.x_test), data.x_train.copy()
    seen[0] *= arguments.outlier
    figures: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        sizes = full_sizes(defaults.teacher, data.features, data.classes)
        teacher = MLP(sizes, dropout=defaults.teacher_dropout, seed=seed)
        fit(teacher, data.x_train, data.y_train, epochs=defaults.teacher_epochs, lr=defaults.teacher_lr, seed=seed)
        soft, judge = (teacher.logits(x, normalised=True) for x in (data.x_train, data.x_test))
        for hidden in arguments.students:
            student = MLP([data.features, hidden, data.classes], seed=seed)
            fit(student, data.x_train, data.y_train, soft, seed=seed)
            student.normalisation = data.normalisation
            for name, model in forms_of(student, seen, data.y_train, soft, seed).items():
                logits = model.logits(x_test)
                figure = 100 * metrics.accuracy(logits, data.y_test), metrics.kl_to_teacher(logits, judge)
                figures.setdefault((hidden, name), []).append(figure)
    print(f"\n{data.name}: {arguments.seeds} seeds, {len(data.x_train)} rows to train on, {len(x_test)} test rows\n")
    print("| student | form | accuracy, % | KL to the teacher |\n|---|---|---|---|")
    for (hidden, name), pairs in figures.items():
        right, far = zip(*pairs, strict=True)
        print(f"| {data.features}-{hidden}-{data.classes} | {name} | {summary(right, 2)} | {summary(far, 4)} |")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
