"""What every distiller is given: arrays in memory, two networks' weights, and how to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

TEMPERATURE, HARD_WEIGHT, SOFT_WEIGHT = 4.0, 0.1, 0.9
BATCH, LR = 128, 3e-3

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A distillation; `distil(task)` of each module here returns a function from features to class ids.

    Attributes
    ----------
    arrays : x_train (n, k) float32, normalised, and y_train (n,) int64; the same of validation and test.
    teacher, student : weights (outputs, inputs) and biases (outputs,) in turn.
    epochs : passes over the training part, in batches of BATCH, with Adam and a learning rate of LR.
    """

    arrays: dict[str, np.ndarray]
    teacher: list[np.ndarray]
    student: list[np.ndarray]
    epochs: int

    @property
    def x(self) -> np.ndarray:
        return self.arrays["x_train"]

    @property
    def y(self) -> np.ndarray:
        return self.arrays["y_train"]

    def save(self, file: Any) -> None:
        """Write everything into one .npz file."""
        networks = {"teacher": self.teacher, "student": self.student}
        weights = {f"{name}_{k}": a for name, network in networks.items() for k, a in enumerate(network)}
        everything: dict[str, Any] = {**self.arrays, **weights, "epochs": np.array(self.epochs)}
        np.savez(file, **everything)

    @classmethod
    def load(cls, file: Any) -> Task:
        """Read what `save` wrote."""
        with np.load(file) as stored:
            arrays = {f"{kind}_{part}": stored[f"{kind}_{part}"] for kind in "xy" for part in PARTS}
            teacher, student = (
                [stored[f"{name}_{k}"] for k in range(sum(n.startswith(f"{name}_") for n in stored.files))]
                for name in ("teacher", "student")
            )
            return cls(arrays, teacher, student, int(stored["epochs"]))


def sizes(network: list[np.ndarray]) -> list[int]:
    """The layer sizes of a network, inputs first."""
    return [network[0].shape[1], *(len(bias) for bias in network[1::2])]
