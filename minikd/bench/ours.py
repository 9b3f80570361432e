"""minikd itself: a kernel bound once and called, and the public function on plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minikd import functional as F
from minikd.bench.cases import DROPPED, HARD_WEIGHT, SOFT_WEIGHT, STEP, TEMPERATURE, Inputs, Kernel
from minikd.bench.contenders import Bound
from minikd.kernels import bind, current_backend, use_backend

# What a user writes, without the gradient's arguments. The functions run on the default backend.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "distillation_loss": partial(
        F.distillation_loss, temperature=TEMPERATURE, hard_weight=HARD_WEIGHT, soft_weight=SOFT_WEIGHT
    ),
    "cross_entropy": F.cross_entropy,
    "soft_cross_entropy": F.cross_entropy,
    "kl_div": F.kl_div,
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "dropout": partial(F.dropout, p=DROPPED, step=STEP),
    "take": F.take,
    "take_scaled": F.take_scaled,
    "argmax": F.argmax,
    "correct_count": F.correct_count,
}


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """A bound kernel of the backend `form`, or the public function ("function", "function-out" with grad_out)."""
    named = kernel.buffers(inputs)
    if form in ("function", "function-out"):
        return _function(form, kernel, [named[name] for name, value in inputs.items() if value.ndim], named)
    before = current_backend()
    use_backend(form)
    try:
        call = bind(kernel.name, *named.values(), **kernel.attrs)
    finally:
        use_backend(before)
    return Bound(call, lambda result: {name: named[name] for name in kernel.outputs})


def _function(form: str, kernel: Kernel, arrays: list[Any], named: dict[str, Any]) -> Bound:
    function = FUNCTIONS[kernel.name]
    if len(kernel.outputs) == 1:
        return Bound(partial(function, *arrays), lambda result: {kernel.outputs[0]: result})
    how = {"grad_out": named["gradient"]} if form == "function-out" else {"return_grad": True}
    return Bound(partial(function, *arrays, **how), lambda result: dict(zip(kernel.outputs, result, strict=True)))
