"""minikd: knowledge distillation without a deep-learning framework.

The names below are all that other code needs; each is imported when it is first used, so that ``import minikd`` by
itself loads nothing, not even NumPy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name → module that defines it. A module's own name stands for the module itself.
_PUBLIC = {
    "Tensor": "minikd.tensor",
    "no_grad": "minikd.tape",
    "as_teacher": "minikd.teachers",
    "compile": "minikd.steps",
    "backends": "minikd.kernels",
    "from_dlpack": "minikd.tensor",
    "memory_in_use": "minikd.kernels.arrays",
    "synchronize": "minikd.kernels.arrays",
    "use_backend": "minikd.kernels",
    "matmul_precision": "minikd.kernels",
    "threads": "minikd.kernels.threads",
    "distill": "minikd.distillation",
    "correct_bias": "minikd.bias",
    "save": "minikd.export",
    "load": "minikd.export",
    "data": "minikd.data",
    "distillation": "minikd.distillation",
    "errors": "minikd.errors",
    "export": "minikd.export",
    "functional": "minikd.functional",
    "metrics": "minikd.metrics",
    "nn": "minikd.nn",
    "objectives": "minikd.objectives",
    "ops": "minikd.ops",
    "optim": "minikd.optim",
    "runtime": "minikd.runtime",
    "schedules": "minikd.schedules",
    "store": "minikd.store",
    "teachers": "minikd.teachers",
    "testing": "minikd.testing",
    "training": "minikd.training",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'minikd' has no attribute {name!r}")
    loaded = importlib.import_module(module)
    value = loaded if module == f"minikd.{name}" else getattr(loaded, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
