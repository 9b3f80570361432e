"""The backend "cupy": kernels for the current NVIDIA GPU, on arrays that stay in its memory."""

from __future__ import annotations

from minikd.kernels.arrays import gpu_missing

# Kernels of its own; all others are the operations' formulas, computed by CuPy.
NAMES: frozenset[str] = frozenset()


def unavailable() -> str:
    """Why this backend cannot run here, or an empty text if it can."""
    return gpu_missing()
