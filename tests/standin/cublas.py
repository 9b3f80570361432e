"""The one function of cuBLAS that minikd calls by itself, on the host: as strict about its arguments as the library."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from minikd.kernels.precision import rounded

CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_32F_FAST_16BF = 77, 75
CUBLAS_GEMM_DEFAULT = -1
FLOAT = 0  # CUDA_R_32F
ROUNDED_TO = {CUBLAS_COMPUTE_32F_FAST_TF32: "tf32", CUBLAS_COMPUTE_32F_FAST_16BF: "bfloat16"}
HANDLE = 1234
CALLS: list[int] = []  # the compute type of each product


def _columns(address: int, rows: int, columns: int, step: int) -> np.ndarray:
    """The matrix (rows, columns) that lies there by columns."""
    assert step >= max(1, rows), f"a step of {step} for columns of {rows}"
    size = (columns - 1) * step + rows
    memory = np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (4, 4 * step))


def gemmEx(
    handle: int, transa: int, transb: int, m: int, n: int, k: int,
    alpha: int, A: int, Atype: int, lda: int, B: int, Btype: int, ldb: int,
    beta: int, C: int, Ctype: int, ldc: int, computeType: int, algo: int,
) -> None:  # fmt: skip
    """C = op(A)·op(B), all by columns: C is (m, n)."""
    assert handle == HANDLE
    assert (Atype, Btype, Ctype, algo) == (FLOAT, FLOAT, FLOAT, CUBLAS_GEMM_DEFAULT)
    assert ctypes.c_float.from_address(alpha).value == 1
    assert ctypes.c_float.from_address(beta).value == 0
    assert min(m, n, k) > 0
    CALLS.append(computeType)
    a = _columns(A, k, m, lda).T if transa else _columns(A, m, k, lda)
    b = _columns(B, n, k, ldb).T if transb else _columns(B, k, n, ldb)
    precision = ROUNDED_TO[computeType]
    _columns(C, m, n, ldc)[...] = rounded(a, precision) @ rounded(b, precision)


def get_cublas_handle() -> Any:
    return HANDLE
