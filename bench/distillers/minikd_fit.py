"""minikd, the training alone: the teacher's logits once, then the loop that kd.distill runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from distillers.minikd_distill import model
from distillers.task import BATCH, HARD_WEIGHT, LR, SOFT_WEIGHT, TEMPERATURE, Task

from minikd.distillation import fit
from minikd.kernels.blas import threads_for
from minikd.nn import MLP


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    student, teacher_logits = model(task.student), model(task.teacher).logits(task.x)
    with threads_for(BATCH * task.student[0].size):  # as kd.distill does: BLAS on one thread for a small student
        train(student, task, teacher_logits)
    return student.predict


def train(student: MLP, task: Task, teacher_logits: np.ndarray) -> None:
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
