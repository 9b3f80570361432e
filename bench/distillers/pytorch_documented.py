"""PyTorch as its tutorial on knowledge distillation advises: a DataLoader, and the teacher asked in every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from distillers.task import BATCH, HARD_WEIGHT, LR, SOFT_WEIGHT, TEMPERATURE, Task
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    torch.manual_seed(0)
    teacher, student = model(task.teacher), model(task.student)
    rows = TensorDataset(torch.from_numpy(task.x), torch.from_numpy(task.y))
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=LR, fused=True)
    teacher.eval()
    student.train()
    for _ in range(task.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(x)
            loss = distillation_loss(student(x), teacher_logits, y)
            loss.backward()
            optimizer.step()
    return predictor(student)


def model(network: list[np.ndarray]) -> nn.Sequential:
    """A network with these weights."""
    layers: list[nn.Module] = []
    for weight, bias in zip(network[::2], network[1::2], strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def distillation_loss(z: torch.Tensor, teacher_logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    log_p, log_q = F.log_softmax(z / TEMPERATURE, 1), F.log_softmax(teacher_logits / TEMPERATURE, 1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return HARD_WEIGHT * F.cross_entropy(z, y) + SOFT_WEIGHT * TEMPERATURE**2 * soft


def predictor(student: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """A function from features to class ids."""

    def predict(x: np.ndarray) -> np.ndarray:
        student.eval()
        with torch.inference_mode():
            return student(torch.from_numpy(x)).argmax(1).numpy()

    return predict
