"""minikd on the GPU: a bound kernel, the public function, and whole steps, eager and as a plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import minikd as kd
from minikd.bench.cases import Inputs, Kernel
from minikd.bench.contenders import Bound
from minikd.bench.ours import FUNCTIONS
from minikd.bench.steps.cases import CHECKED, Step
from minikd.bench.steps.ours import training
from minikd.kernels import bind
from minikd.kernels.arrays import here, to_host


def make(form: str, subject: Kernel | Step, inputs: Inputs) -> Bound:
    """A kernel as "kernel" or "function", a step as "plan" or "eager"; the backend in use is "cupy"."""
    if isinstance(subject, Step):
        train = training(subject, inputs)
        return by_batches(subject, inputs, here.put, kd.compile(train) if form == "plan" else train, _number)
    host = subject.buffers(inputs)
    named = {name: x if x is None or (not np.ndim(x) and name in inputs) else here.put(x) for name, x in host.items()}
    if form == "kernel":
        call = bind(subject.name, *named.values(), **subject.attrs)
        return Bound(call, lambda result: {name: to_host(named[name]) for name in subject.outputs})
    arrays = [named[name] for name, value in inputs.items() if np.ndim(value)]
    return _function(subject, arrays)


def _function(kernel: Kernel, arrays: list[Any]) -> Bound:
    function = FUNCTIONS[kernel.name]
    if len(kernel.outputs) == 1:
        return Bound(lambda: function(*arrays), lambda result: {kernel.outputs[0]: to_host(result)})
    return Bound(
        lambda: function(*arrays, return_grad=True),
        lambda result: {name: to_host(x) for name, x in zip(kernel.outputs, result, strict=True)},
    )


def _number(loss: Any) -> float:
    return float(loss.item())


def by_batches(
    step: Step, inputs: Inputs, put: Callable[[Any], Any], train: Callable[..., Any], number: Callable[[Any], float]
) -> Bound:
    """A contender that takes the next batch, which lies on the GPU already, in each call; nobody asks for its loss.

    Only the losses of the first few steps are read, and compared.
    """
    upcoming = itertools.cycle([tuple(map(put, batch)) for batch in step.batches(inputs)])

    def following() -> Any:
        return train(*next(upcoming))

    def read(first: Any) -> dict[str, Any]:
        return {"loss": np.array([number(first), *(number(following()) for _ in range(CHECKED - 1))])}

    return Bound(following, read)
