"""PyTorch written for speed: the teacher's logits once, batches by index_select, no DataLoader.

DISTILLERS_DEVICE in the environment says where: "cpu" or "cuda".
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from distillers.pytorch_documented import distillation_loss, model, predictor
from distillers.task import BATCH, LR, Task


def distil(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    torch.manual_seed(0)
    device = os.environ.get("DISTILLERS_DEVICE", "cpu")
    teacher, student = model(task.teacher).eval().to(device), model(task.student).to(device)
    x, y = torch.from_numpy(task.x).to(device), torch.from_numpy(task.y).to(device)
    with torch.inference_mode():
        teacher_logits = torch.cat([teacher(rows) for rows in x.split(4096)])
    teacher_logits = teacher_logits.clone()  # one that autograd may see
    optimizer = torch.optim.Adam(student.parameters(), lr=LR, fused=True)
    for _ in range(task.epochs):
        for rows in torch.randperm(len(x), device=device).split(BATCH):
            z = student(x.index_select(0, rows))
            loss = distillation_loss(z, teacher_logits.index_select(0, rows), y.index_select(0, rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return predictor(student.cpu())
