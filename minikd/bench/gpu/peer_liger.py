"""Liger's fused kernels in Triton: cross-entropy, and KL of logits that PyTorch has divided by T and normalised.

Its cross-entropy writes the gradient over the logits, so that it is given a copy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from minikd.bench.cases import HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE, Inputs, Kernel, peer_arrays
from minikd.bench.contenders import Bound
from minikd.bench.gpu.peer_torch import put

torch: Any = import_module("torch")
liger: Any = import_module("liger_kernel.transformers")


def make(form: str, kernel: Kernel, inputs: Inputs) -> Bound:
    """A loss with its gradient."""
    student, *rest = (put(array) for array in peer_arrays(kernel, inputs))
    student.requires_grad_()
    hard = liger.LigerCrossEntropyLoss()
    soft = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def distillation(teacher: Any, target: Any) -> Any:
        log_p, log_q = (torch.log_softmax(z / TEMPERATURE, 1) for z in (student, teacher))
        return HARD_WEIGHT * hard(student.clone(), target) + SOFT_WEIGHT * TEMPERATURE**2 * soft(log_p, log_q)

    def call() -> tuple[Any, Any]:
        loss = distillation(*rest) if kernel.name == "distillation_loss" else hard(student.clone(), *rest)
        return loss, torch.autograd.grad(loss, student)[0]

    return Bound(call, lambda r: {"loss": r[0].detach().cpu().numpy(), "gradient": r[1].cpu().numpy()})
