"""Matrix products on a GPU: cuBLAS by way of CuPy, where wanted on tensor cores that round their factors.

cuBLAS rounds float32 factors on their way into the tensor cores and adds up in float32; nothing is stored in fewer
digits. To which digits is a matter of the "compute type" of one call, so no setting of CuPy's is changed. In float32
CuPy's own product is used, which heeds CUPY_TF32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minikd.errors import BackendError
from minikd.kernels.arrays import load_cupy
from minikd.kernels.precision import FULL, Multiply

# What cuBLAS calls each way of rounding the factors.
COMPUTE_TYPES = {"tf32": "CUBLAS_COMPUTE_32F_FAST_TF32", "bfloat16": "CUBLAS_COMPUTE_32F_FAST_16BF"}
LEAST_CAPABILITY = 80  # of the first cards whose tensor cores take such factors


def multiplier(precision: str) -> Multiply:
    """How this backend multiplies at this precision.

    Raises
    ------
    BackendError : the current GPU has no tensor cores that take such factors.
    """
    xp = load_cupy()

    def full(a: Any, b: Any, out: Any) -> None:
        xp.matmul(a, b, out=out)

    if precision == FULL:
        return full
    capability = xp.cuda.Device().compute_capability
    if int(capability) < LEAST_CAPABILITY:
        expected, got = f"{FULL} on a GPU of compute capability below 8.0", f"{precision!r} on one of {capability}"
        raise BackendError("matmul_precision", "precision", expected=expected, got=got)
    cublas, kind = xp.cuda.cublas, xp.cuda.runtime.CUDA_R_32F
    compute, how = getattr(cublas, COMPUTE_TYPES[precision]), cublas.CUBLAS_GEMM_DEFAULT
    one, zero = np.ones((), np.float32), np.zeros((), np.float32)

    def reduced(a: Any, b: Any, out: Any) -> None:
        if out.dtype != np.float32 or not (a.size and b.size):
            full(a, b, out)
            return
        # cuBLAS counts along columns, and so sees the transpose of each: outᵀ = bᵀ·aᵀ
        (n, k), m = a.shape, b.shape[1]
        a, turn_a, step_a = _laid_out(a)
        b, turn_b, step_b = _laid_out(b)
        factors = (b.data.ptr, kind, step_b, a.data.ptr, kind, step_a)
        handle = xp.cuda.device.get_cublas_handle()
        cublas.gemmEx(
            *(handle, turn_b, turn_a, m, n, k, one.ctypes.data),
            *(*factors, zero.ctypes.data, out.data.ptr, kind, m, compute, how),
        )

    return reduced


def _laid_out(x: Any) -> tuple[Any, int, int]:
    """A matrix as cuBLAS takes it, whether it lies there by columns (1) or by rows (0), and the step between them."""
    (rows, columns), (down, right) = x.shape, (s // x.itemsize for s in x.strides)
    if right == 1 or columns == 1:
        return x, 0, max(down, columns) if rows > 1 else columns
    if down == 1 or rows == 1:
        return x, 1, max(right, rows)
    return x.copy(), 0, columns  # in rows, one behind the other
