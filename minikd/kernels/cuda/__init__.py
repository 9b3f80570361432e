"""The backend "cupy": kernels for the current NVIDIA GPU, on arrays that stay in its memory."""

from __future__ import annotations

from minikd.kernels.arrays import gpu_missing
from minikd.kernels.cuda.graphs import join
from minikd.kernels.cuda.products import multiplier
from minikd.kernels.precision import MANTISSA

__all__ = ["NAMES", "PRECISIONS", "join", "multiplier", "unavailable"]

# Kernels of its own; all others are the operations' formulas, computed by CuPy.
NAMES: frozenset[str] = frozenset()
PRECISIONS = tuple(MANTISSA)  # of its matrix products


def unavailable() -> str:
    """Why this backend cannot run here, or an empty text if it can."""
    return gpu_missing()
