"""Tests for kernels and gradients of anybody's: strategies, references, a contract for each operation, a pytest plugin.

`check_kernel` runs somebody's kernel through all that its operation promises; `reference` says what should come out;
`check_gradients` compares gradients with differences; `strategies` draws inputs with Hypothesis. docs/testing.md shows
how. It needs the packages of the extra "test" (Hypothesis, mpmath), and imports each when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name → module that defines it.
_PUBLIC = {
    "CONTRACTS": "minikd.testing.contracts",
    "KINDS": "minikd.testing.strategies",
    "Batch": "minikd.testing.strategies",
    "Contract": "minikd.testing.contract",
    "GradientReport": "minikd.testing.gradients",
    "KernelReport": "minikd.testing.reports",
    "TrainingStep": "minikd.testing.steps",
    "arrays_with_strides": "minikd.testing.strategies",
    "batches": "minikd.testing.strategies",
    "check_gradients": "minikd.testing.gradients",
    "check_kernel": "minikd.testing.kernels",
    "labels": "minikd.testing.strategies",
    "logits": "minikd.testing.strategies",
    "mlps": "minikd.testing.steps",
    "reference": "minikd.testing.references",
    "temperatures": "minikd.testing.strategies",
    "training_steps": "minikd.testing.steps",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minikd.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
