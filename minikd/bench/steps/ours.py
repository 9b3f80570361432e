"""minikd itself: the same step eagerly, as a plan step by step, and as a plan for a whole epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import minikd as kd
from minikd import functional as F
from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import (
    HARD_WEIGHT,
    LR,
    MOMENTUM,
    SOFT_WEIGHT,
    TEMPERATURE,
    Network,
    Step,
)
from minikd.bench.steps.contenders import one_by_one, whole_epochs


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """`form` is "eager", "plan" or "epoch"."""
    if not step.optimizer:
        return one_by_one(step, step.batches(inputs), _prediction(form, step, inputs))
    train = training(step, inputs)
    if form == "eager":
        return one_by_one(step, step.batches(inputs), lambda *batch: train(*batch).item())
    compiled: Any = kd.compile(train)
    if form == "plan":
        return one_by_one(step, step.batches(inputs), lambda *batch: compiled(*batch).item())
    stacked = [inputs[name] for name in step.arguments(inputs)]
    return whole_epochs(step, lambda: compiled.epoch(*stacked))


def _model(sizes: tuple[int, ...], network: Network) -> kd.nn.MLP:
    model = kd.nn.MLP(sizes)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(dict(zip(names, network, strict=True)))
    return model


def training(step: Step, inputs: dict[str, Any]) -> Callable[..., Any]:
    """The step as a function of a batch, eager, with a model and an optimizer of its own."""
    model = _model(step.sizes, inputs["network"])
    opt = (
        kd.optim.Adam(model.parameters(), LR["adam"])
        if step.optimizer == "adam"
        else kd.optim.SGD(model.parameters(), LR["sgd"], momentum=MOMENTUM)
    )
    loss_of = _distillation(step, inputs) if step.teacher else lambda z, x, y: F.cross_entropy(z, y)

    def train(x: Any, y: Any, *logits: Any) -> Any:
        loss = loss_of(model(x), x, y, *logits)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return train


def _distillation(step: Step, inputs: dict[str, Any]) -> Callable[..., Any]:
    """The loss of the student's logits; the teacher's are given, or computed from x."""
    teacher = _model(step.teacher, inputs["teacher"]).eval()

    def loss(z: Any, x: Any, y: Any, *logits: Any) -> Any:
        with kd.no_grad():
            soft = logits[0] if logits else teacher(x)
        return F.distillation_loss(
            z, soft, y, temperature=TEMPERATURE, hard_weight=HARD_WEIGHT, soft_weight=SOFT_WEIGHT
        )

    return loss


def _prediction(form: str, step: Step, inputs: dict[str, Any]) -> Callable[[np.ndarray], Any]:
    model = _model(step.sizes, inputs["network"]).eval()
    if form == "plan":
        return model.predict_proba

    def eager(x: np.ndarray) -> Any:
        with kd.no_grad():
            return F.softmax(model(kd.Tensor(x))).numpy()

    return eager
