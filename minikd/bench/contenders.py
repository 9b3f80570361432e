"""Who is measured: minikd's own forms and the libraries that a user would otherwise call, as a table.

A peer's module is imported in the process that measures it and nowhere else; a peer that is not installed is left out
and named.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from minikd.bench.cases import KERNELS, Inputs
from minikd.kernels import BACKENDS


class Bound(NamedTuple):
    """A contender that has taken its inputs.

    `call` takes no arguments; all that is timed is this one call. `read` makes NumPy arrays, by name, of its result.
    `steps` is how often one call does what is measured; its time is divided by that.
    """

    call: Callable[[], Any]
    read: Callable[[Any], dict[str, Any]]
    steps: int = 1


class Contender(NamedTuple):
    """One way to run kernels: `module` has ``make(form, kernel, inputs) -> Bound``.

    `requires` is the distribution to look for, `install` how to get it; `kernels` are those that it can run.
    """

    label: str
    ours: bool
    module: str
    form: str
    requires: str
    install: str
    kernels: frozenset[str]

    def bind(self, kernel: Any, inputs: Inputs) -> Bound:
        """Import the module, hand it the inputs, and do all that is done once."""
        bound: Bound = importlib.import_module(self.module).make(self.form, kernel, inputs)
        return bound

    def missing(self) -> str:
        """Why it cannot run here and how to mend that, or an empty text if it can."""
        if self.form in BACKENDS:
            return BACKENDS[self.form].missing()
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed: {self.install}"
        return ""


_ALL = frozenset(KERNELS)
_UPDATES = frozenset({"adam_step", "sgd_step"})
_GELU = frozenset({"bias_gelu", "bias_gelu_vjp"})
_LOSSES = frozenset({"distillation_loss", "cross_entropy", "soft_cross_entropy", "kl_div"})
_OTHERS = frozenset({"dropout", "take", "take_scaled", "argmax", "correct_count"})
_SOFTMAX = frozenset({"softmax", "log_softmax"})

_OURS = "minikd.bench.ours"
_TORCH, _TORCH_INSTALL = "minikd.bench.peer_torch", "pip install torch"


def _mine(label: str, form: str, kernels: frozenset[str]) -> Contender:
    return Contender(label, True, _OURS, form, "", "", kernels)


CONTENDERS = {
    "c": _mine("minikd C kernel", "c", _ALL),
    "numba": _mine("minikd Numba kernel", "numba", _ALL),
    "function": _mine("minikd function", "function", _LOSSES | _SOFTMAX | _OTHERS),
    "function-out": _mine("minikd function, grad_out", "function-out", _LOSSES),
    "torch": Contender("PyTorch eager", False, _TORCH, "eager", "torch", _TORCH_INSTALL, _ALL),
    "torch-out": Contender("PyTorch eager, out=", False, _TORCH, "out", "torch", _TORCH_INSTALL, _SOFTMAX),
    "torch-compile": Contender("torch.compile", False, _TORCH, "compile", "torch", _TORCH_INSTALL, _ALL - _UPDATES),
    "jax": Contender("jax.jit", False, "minikd.bench.peer_jax", "jit", "jax", "pip install jax", _ALL),
    "scipy": Contender(
        "SciPy", False, "minikd.bench.peer_scipy", "scipy", "scipy", "pip install scipy", _SOFTMAX | _GELU
    ),
    "numpy": Contender("NumPy", False, "minikd.bench.peer_numpy", "numpy", "numpy", "", _ALL - _GELU),
}
PEERS = tuple(key for key, contender in CONTENDERS.items() if not contender.ours)
