"""PyTorch on the CPU: eager with its autograd, eager with out=, and torch.compile; optimizers are its fused ones.

Of the forms that mean the same, the fastest was taken: log_target=True for the divergence, torch.func.grad_and_value
under torch.compile (a compiled forward pass with autograd behind it takes longer at every shape), and for a vjp the
operator that autograd itself would call, without autograd's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from minikd.bench.cases import (
    BETA1,
    BETA2,
    DROPPED,
    EPS,
    HARD_WEIGHT,
    LR,
    MOMENTUM,
    SOFT_WEIGHT,
    STEP,
    TEMPERATURE,
    Inputs,
    Kernel,
    peer_arrays,
)
from minikd.bench.contenders import Bound
from minikd.bench.peer_numpy import named_outputs

torch: Any = import_module("torch")
F: Any = import_module("torch.nn.functional")
aten: Any = torch.ops.aten


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """`form` is "eager", "out" or "compile"."""
    tensors = [torch.tensor(array) for array in peer_arrays(kernel, inputs)]
    name, read = kernel.name, partial(named_outputs, kernel)
    torch.compiler.reset()  # or the guards of shapes that were measured before would be paid for
    if name in OPTIMIZERS:
        return OPTIMIZERS[name](*tensors)
    if form == "out":
        return Bound(
            partial(FUNCTIONS[name], *tensors, out=torch.empty_like(tensors[0])), partial(named_outputs, kernel)
        )
    if name not in LOSSES:
        function = torch.compile(FUNCTIONS[name], dynamic=False) if form == "compile" else FUNCTIONS[name]
        return Bound(partial(function, *tensors), read)
    if form == "compile":
        compiled = torch.compile(torch.func.grad_and_value(LOSSES[name]), dynamic=False)
        return Bound(partial(compiled, *tensors), lambda result: {"gradient": result[0], "loss": result[1]})
    tensors[0].requires_grad_()
    return Bound(
        partial(_loss_and_gradient, LOSSES[name], *tensors),
        lambda result: {"loss": result[0].detach(), "gradient": result[1]},
    )


def _loss_and_gradient(loss: Callable[..., Any], logits: Any, *rest: Any) -> tuple[Any, Any]:
    value = loss(logits, *rest)
    return value, torch.autograd.grad(value, logits)[0]


def distillation_loss(student: Any, teacher: Any, target: Any) -> Any:
    log_p, log_q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return HARD_WEIGHT * F.cross_entropy(student, target) + SOFT_WEIGHT * TEMPERATURE**2 * soft


def bias_relu_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = aten.threshold_backward(dy, y, 0)
    return dx, dx.sum(0)


def bias_tanh_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = aten.tanh_backward(dy, y)
    return dx, dx.sum(0)


def bias_sigmoid_vjp(dy: Any, y: Any) -> tuple[Any, Any]:
    dx = aten.sigmoid_backward(dy, y)
    return dx, dx.sum(0)


def bias_gelu_vjp(dy: Any, u: Any) -> tuple[Any, Any]:
    dx = aten.gelu_backward(dy, u)
    return dx, dx.sum(0)


LOSSES: dict[str, Callable[..., Any]] = {
    "distillation_loss": distillation_loss,
    "cross_entropy": F.cross_entropy,
    "soft_cross_entropy": F.cross_entropy,
    "kl_div": partial(F.kl_div, reduction="batchmean"),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": partial(torch.softmax, dim=1),
    "softmax_vjp": lambda dy, y: aten._softmax_backward_data(dy, y, 1, dy.dtype),
    "log_softmax": partial(torch.log_softmax, dim=1),
    "log_softmax_vjp": lambda dy, y: aten._log_softmax_backward_data(dy, y, 1, dy.dtype),
    "bias_relu": lambda x, b: (x + b).relu_(),
    "bias_relu_vjp": bias_relu_vjp,
    "bias_tanh": lambda x, b: (x + b).tanh_(),
    "bias_tanh_vjp": bias_tanh_vjp,
    "bias_sigmoid": lambda x, b: (x + b).sigmoid_(),
    "bias_sigmoid_vjp": bias_sigmoid_vjp,
    "bias_gelu": lambda x, b: F.gelu(x + b),
    "bias_gelu_vjp": bias_gelu_vjp,
    "take": lambda x, rows: x.index_select(0, rows),
    "take_scaled": lambda x, rows, scale, shift: x.index_select(0, rows) * scale + shift,
    "argmax": lambda x: x.argmax(1),
    "correct_count": lambda logits, target: (logits.argmax(1) == target).sum(),
    "dropout": lambda x: torch.native_dropout(x, DROPPED, True),
}


# --- optimizers ---


def _adam(w: Any, m: Any, v: Any, g: Any) -> Bound:
    w.grad = g
    optimizer = torch.optim.Adam([w], lr=LR, betas=(BETA1, BETA2), eps=EPS, fused=True)
    optimizer.state[w] = {"step": torch.tensor(float(STEP - 1)), "exp_avg": m, "exp_avg_sq": v}
    return Bound(optimizer.step, lambda result: {"w": w, "m": m, "v": v})


def _sgd(w: Any, v: Any, g: Any) -> Bound:
    w.grad = g
    optimizer = torch.optim.SGD([w], lr=LR, momentum=MOMENTUM, fused=True)
    optimizer.state[w] = {"momentum_buffer": v}
    return Bound(optimizer.step, lambda result: {"w": w, "v": v})


OPTIMIZERS: dict[str, Callable[..., Bound]] = {"adam_step": _adam, "sgd_step": _sgd}
