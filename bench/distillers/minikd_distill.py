"""minikd, the whole of it: kd.distill also scores the validation part after each epoch, and both models in the end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from distillers.task import BATCH, HARD_WEIGHT, LR, SOFT_WEIGHT, TEMPERATURE, Task, sizes

from minikd import distill, nn
from minikd.data.dataset import Dataset, Normalisation


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    result = distill(
        model(task.teacher),
        model(task.student),
        dataset(task),
        temperature=TEMPERATURE,
        hard_weight=HARD_WEIGHT,
        soft_weight=SOFT_WEIGHT,
        epochs=task.epochs,
        batch_size=BATCH,
        lr=LR,
        schedule="constant",
        alone=False,
        seeds=(0,),
    )
    return result.student.predict


def model(network: list[np.ndarray]) -> nn.MLP:
    """A network with these weights."""
    made = nn.MLP(sizes(network))
    made.load_state_dict(dict(zip(made.state_dict(), network, strict=True)))
    return made


def dataset(task: Task) -> Dataset:
    """The arrays as a data set; they are normalised already."""
    features, classes = sizes(task.student)[0], sizes(task.student)[-1]
    same = Normalisation(np.zeros(features, np.float32), np.ones(features, np.float32))
    names = tuple(map(str, range(classes)))
    return Dataset("arrays", **task.arrays, class_names=names, feature_shape=(features,), normalisation=same, sha256="")
