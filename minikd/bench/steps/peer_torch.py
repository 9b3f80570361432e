"""PyTorch on the CPU: eager with its fused optimizers, and torch.compile of the whole step.

Compiled is a step in functional form: torch.func.grad_and_value and the update in one graph, called from C++
(cpp_wrapper). The other documented form, a compiled loss, backward() and a compiled optimizer.step, takes four times as
long at 64-32-10 and as long as this one at 784-800-800-10.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import (
    BETA1,
    BETA2,
    EPS,
    HARD_WEIGHT,
    LR,
    MOMENTUM,
    SOFT_WEIGHT,
    TEMPERATURE,
    Network,
    Step,
    pairs,
)
from minikd.bench.steps.contenders import one_by_one

torch: Any = import_module("torch")
F: Any = import_module("torch.nn.functional")

COMPILED: dict[str, Any] = {"dynamic": False, "options": {"cpp_wrapper": True}}


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """`form` is "eager" or "compile"."""
    torch.compiler.reset()  # or the guards of steps that were measured before would be paid for
    if not step.optimizer:
        return one_by_one(step, step.batches(inputs), _prediction(form, inputs))
    train = (_eager if form == "eager" else _compiled)(step, inputs)
    batches = [tuple(map(torch.tensor, batch)) for batch in step.batches(inputs)]
    return one_by_one(step, batches, lambda *batch: train(*batch).item())


def model(network: Network) -> Any:
    """A Sequential with these weights."""
    layers: list[Any] = []
    for weight, bias in pairs(network):
        linear = torch.nn.Linear(*weight.shape[::-1])
        linear.weight.data, linear.bias.data = torch.tensor(weight), torch.tensor(bias)
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def _prediction(form: str, inputs: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    network = model(inputs["network"]).eval()

    def probabilities(x: Any) -> Any:
        return torch.softmax(network(x), 1)

    forward = torch.compile(probabilities, **COMPILED) if form == "compile" else probabilities

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(forward(torch.from_numpy(x)).numpy())

    return predict


def loss_of(z: Any, y: Any, *soft: Any) -> Any:
    """The cross-entropy, or with a teacher's logits the distillation loss."""
    if not soft:
        return F.cross_entropy(z, y)
    log_p, log_q = (F.log_softmax(scores / TEMPERATURE, 1) for scores in (z, *soft))
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return HARD_WEIGHT * F.cross_entropy(z, y) + SOFT_WEIGHT * TEMPERATURE**2 * divergence


def _eager(step: Step, inputs: dict[str, Any]) -> Callable[..., Any]:
    student = model(inputs["network"])
    teacher = model(inputs["teacher"]).eval() if step.teacher and not step.stored else None
    optimizer = (
        torch.optim.Adam(student.parameters(), lr=LR["adam"], fused=True)
        if step.optimizer == "adam"
        else torch.optim.SGD(student.parameters(), lr=LR["sgd"], momentum=MOMENTUM, fused=True)
    )

    def train(x: Any, y: Any, *soft: Any) -> Any:
        if teacher is not None:
            with torch.no_grad():
                soft = (teacher(x),)
        optimizer.zero_grad()
        loss = loss_of(student(x), y, *soft)
        loss.backward()
        optimizer.step()
        return loss

    return train


def _compiled(step: Step, inputs: dict[str, Any]) -> Callable[..., Any]:
    parameters = [torch.tensor(a) for a in inputs["network"]]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
    teacher = [torch.tensor(a) for a in inputs["teacher"]] if step.teacher and not step.stored else []
    count = torch.zeros(())

    def loss(parameters: list[Any], x: Any, y: Any, *soft: Any) -> Any:
        return loss_of(forward(parameters, x), y, *soft)

    def train(x: Any, y: Any, *soft: Any) -> Any:
        gradients, value = torch.func.grad_and_value(loss)(
            parameters, x, y, *([forward(teacher, x)] if teacher else soft)
        )
        if step.optimizer == "sgd":
            _sgd(parameters, gradients, first)
        else:
            _adam(parameters, gradients, first, second, count.add_(1))
        return value

    compiled: Callable[..., Any] = torch.compile(train, **COMPILED)
    return compiled


def forward(parameters: list[Any], x: Any) -> Any:
    """The logits, of weights and biases in turn."""
    *hidden, (weight, bias) = pairs(parameters)
    for w, b in hidden:
        x = F.linear(x, w, b).relu()
    return F.linear(x, weight, bias)


def _sgd(parameters: list[Any], gradients: list[Any], velocity: list[Any]) -> None:
    for w, g, v in zip(parameters, gradients, velocity, strict=True):
        v.mul_(MOMENTUM).add_(g)
        w.sub_(v, alpha=LR["sgd"])


def _adam(parameters: list[Any], gradients: list[Any], first: list[Any], second: list[Any], count: Any) -> None:
    rate, root = LR["adam"] / (1 - BETA1**count), (1 - BETA2**count) ** -0.5
    for w, g, m, v in zip(parameters, gradients, first, second, strict=True):
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        w.sub_(rate * m / (v.sqrt() * root + EPS))
