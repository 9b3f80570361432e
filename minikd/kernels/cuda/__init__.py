"""The backend "cupy": kernels for the current NVIDIA GPU, on arrays that stay in its memory.

Sources in CUDA C++ are compiled by CuPy with NVRTC when one is first needed. `sources` puts the text of a source
together, `table` says which of its functions an operation is made of, `launches` binds them to arrays, `graphs`
launches those of a plan together, and `products` multiplies matrices. Nothing here imports CuPy before it is used.
"""

from __future__ import annotations

from minikd.kernels.arrays import gpu_missing
from minikd.kernels.cuda.graphs import join
from minikd.kernels.cuda.launches import NAMES, launcher
from minikd.kernels.cuda.products import multiplier
from minikd.kernels.precision import MANTISSA

__all__ = ["NAMES", "PRECISIONS", "join", "launcher", "multiplier", "unavailable"]

PRECISIONS = tuple(MANTISSA)  # of its matrix products


def unavailable() -> str:
    """Why this backend cannot run here, or an empty text if it can."""
    return gpu_missing()
