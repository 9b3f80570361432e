"""minikd, the training alone: the teacher's logits once, then the loop that kd.distill runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from distillers.minikd_distill import model
from distillers.task import BATCH, HARD_WEIGHT, LR, SOFT_WEIGHT, TEMPERATURE, Task

from minikd.distillation import fit


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    student, teacher_logits = model(task.student), model(task.teacher).logits(task.x)
    fit(
        student,
        task.x,
        task.y,
        teacher_logits,
        temperature=TEMPERATURE,
        hard_weight=HARD_WEIGHT,
        soft_weight=SOFT_WEIGHT,
        epochs=task.epochs,
        batch_size=BATCH,
        lr=LR,
        schedule="constant",
    )
    return student.predict
