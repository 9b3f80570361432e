"""Who is measured on a GPU, as a table; a peer that is not installed, or sees no GPU, is left out and named."""

from __future__ import annotations

from minikd.bench.contenders import Contender
from minikd.bench.gpu.cases import GPU_STEPS, MEASURED

_KERNELS = frozenset(MEASURED)
_STEPS = frozenset(GPU_STEPS)
_FUNCTIONS = _KERNELS - {"adam_step"}
_LOSSES = frozenset({"distillation_loss", "cross_entropy"})
_HERE = "minikd.bench.gpu."


def _mine(label: str, form: str, able: frozenset[str]) -> Contender:
    return Contender(label, True, _HERE + "ours", form, "", "", able)


def _torch(label: str, form: str, able: frozenset[str]) -> Contender:
    return Contender(label, False, _HERE + "peer_torch", form, "torch", "pip install torch", able)


CONTENDERS = {
    "kernel": _mine("minikd kernel", "kernel", _KERNELS),
    "function": _mine("minikd function", "function", _FUNCTIONS),
    "plan": _mine("minikd plan", "plan", _STEPS),
    "eager": _mine("minikd eager", "eager", _STEPS),
    "torch": _torch("PyTorch eager", "eager", _KERNELS | _STEPS),
    "torch-compile": _torch("torch.compile", "compile", _FUNCTIONS),
    "torch-graphs": _torch("PyTorch, CUDA graph", "graph", _KERNELS | _STEPS),
    "liger": Contender(
        "Liger (Triton)", False, _HERE + "peer_liger", "", "liger_kernel", "pip install liger-kernel", _LOSSES
    ),
    "jax": Contender("jax.jit", False, _HERE + "peer_jax", "jit", "jax", "pip install 'jax[cuda12]'", _KERNELS),
}
# XLA launches on streams of its own, which events of CuPy's do not see: its calls wait, and the host's clock is read.
BY_THE_HOST = frozenset({"jax"})
