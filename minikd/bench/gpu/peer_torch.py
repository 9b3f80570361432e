"""PyTorch on the GPU: eager with its fused optimizers, torch.compile, and what is launched captured as one CUDA graph.

float32 products are computed in float32, as minikd's are, and not in TF32: that is PyTorch's own default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from minikd.bench.cases import BETA1, BETA2, EPS, LR, STEP, Inputs, Kernel, peer_arrays
from minikd.bench.contenders import Bound
from minikd.bench.gpu.ours import by_batches
from minikd.bench.peer_torch import FUNCTIONS, LOSSES
from minikd.bench.steps.cases import LR as STEP_LR
from minikd.bench.steps.cases import Step
from minikd.bench.steps.peer_torch import loss_of, model

torch: Any = import_module("torch")

DEVICE = "cuda"
WARM_UP = 3  # calls before a capture: what is set up at the first ones is not part of a graph


def make(form: str, subject: Kernel | Step, inputs: Inputs) -> Bound:
    """`form` is "eager", "compile" or "graph"."""
    if isinstance(subject, Step):
        train = Training(inputs, capturable=form == "graph")
        step = _graphed(train, subject, inputs) if form == "graph" else train
        return by_batches(subject, inputs, put, step, lambda loss: float(loss.item()))
    tensors = [put(array) for array in peer_arrays(subject, inputs)]
    if subject.name == "adam_step":
        return _adam(form, *tensors)
    call, read = _function(form, subject, tensors)
    return Bound(captured(call), read) if form == "graph" else Bound(call, read)


def put(array: Any) -> Any:
    """A tensor on the GPU."""
    return torch.tensor(array, device=DEVICE)


def _function(form: str, kernel: Kernel, tensors: list[Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What is called, and how its result is read."""
    torch.compiler.reset()  # or the guards of shapes that were measured before would be paid for
    if kernel.name not in LOSSES:
        function = FUNCTIONS[kernel.name]
        function = torch.compile(function, dynamic=False) if form == "compile" else function
        return partial(function, *tensors), lambda result: {kernel.outputs[0]: result.cpu().numpy()}
    if form == "compile":
        compiled = torch.compile(torch.func.grad_and_value(LOSSES[kernel.name]), dynamic=False)
        return partial(compiled, *tensors), lambda result: _read(result[1], result[0])
    tensors[0].requires_grad_()
    return partial(_loss_and_gradient, LOSSES[kernel.name], tensors), lambda result: _read(*result)


def _loss_and_gradient(loss: Callable[..., Any], tensors: list[Any]) -> tuple[Any, Any]:
    value = loss(*tensors)
    return value, torch.autograd.grad(value, tensors[0])[0]


def _read(loss: Any, gradient: Any) -> dict[str, Any]:
    return {"loss": loss.detach().cpu().numpy(), "gradient": gradient.cpu().numpy()}


def _adam(form: str, w: Any, m: Any, v: Any, g: Any) -> Bound:
    w.grad = g
    how = {"fused": True, "capturable": form == "graph"}
    optimizer = torch.optim.Adam([w], lr=LR, betas=(BETA1, BETA2), eps=EPS, **how)
    count = torch.tensor(float(STEP - 1), device=DEVICE)
    optimizer.state[w] = {"step": count, "exp_avg": m, "exp_avg_sq": v}

    def read(result: Any) -> dict[str, Any]:
        return {name: tensor.detach().cpu().numpy() for name, tensor in {"w": w, "m": m, "v": v}.items()}

    if form != "graph":
        return Bound(optimizer.step, read)
    before = [tensor.clone() for tensor in (w, m, v, count)]
    call = captured(optimizer.step)
    for tensor, value in zip((w, m, v, count), before, strict=True):
        tensor.copy_(value)  # the steps before the capture were steps
    return Bound(call, read)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph; its result is always in the same memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# --- steps ---


class Training:
    """A step of training by Adam as a function of a batch: rows, labels, and the logits of a teacher where given."""

    def __init__(self, inputs: Inputs, capturable: bool) -> None:
        self._first = [put(array) for array in inputs["network"]]
        self._model = model(inputs["network"]).to(DEVICE)
        how = {"fused": True, "capturable": capturable}
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=STEP_LR["adam"], **how)

    def __call__(self, x: Any, y: Any, *soft: Any) -> Any:
        self._optimizer.zero_grad()
        loss = loss_of(self._model(x), y, *soft)
        loss.backward()
        self._optimizer.step()
        return loss

    def begin_again(self) -> None:
        """Put back the weights that all begin with, in the memory that a graph reads."""
        with torch.no_grad():
            for parameter, first in zip(self._model.parameters(), self._first, strict=True):
                parameter.copy_(first)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def _graphed(train: Training, step: Step, inputs: Inputs) -> Callable[..., Any]:
    """A whole step as one graph; a batch is copied into memory that it reads."""
    places = tuple(map(put, step.batches(inputs)[0]))
    replay = captured(lambda: train(*places))
    train.begin_again()

    def call(*batch: Any) -> Any:
        for place, tensor in zip(places, batch, strict=True):
            place.copy_(tensor)
        return replay()

    return call
