"""The BLAS that this process holds already, for the C kernels: where its products are, and whether they are right.

NumPy's wheels bring an OpenBLAS of their own, whose functions have names of their own; SciPy gives its BLAS away as
capsules. Neither is imported or loaded here if it is not there already.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# How NumPy's own BLAS may call sgemm, and the bits of its integers.
PREFIXES = ("scipy_", "")
SUFFIXES = (("_64_", 64), ("64_", 64), ("_", 32))


@dataclass(frozen=True)
class Library:
    """A BLAS with Fortran's interface.

    Attributes
    ----------
    name : what it is and whose it is, with its version where it says one.
    integer_bits : 32 or 64.
    sgemm, dgemm : the addresses of its products.
    threads_function : the address of a function that gives its number of threads, or 0.
    """

    name: str
    integer_bits: int
    sgemm: int
    dgemm: int
    threads_function: int = 0

    def threads(self) -> int | None:
        """How many threads it uses at most, or None where it does not say."""
        return ctypes.CFUNCTYPE(ctypes.c_int)(self.threads_function)() if self.threads_function else None

    def __str__(self) -> str:
        threads = self.threads()
        many = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
        return f"{self.name} ({self.integer_bits}-bit integers{many})"


@cache
def library() -> Library | None:
    """The first BLAS in this process that computes small products correctly, or None."""
    return next((found for found in (*_of_numpy(), *_of_scipy()) if is_right(found)), None)


def is_right(found: Library) -> bool:
    """Whether both products are right where rows are longer than what is used of them, and one factor is transposed."""
    both = ((found.sgemm, np.dtype(np.float32)), (found.dgemm, np.dtype(np.float64)))
    return all(_multiplies(address, dtype, found.integer_bits) for address, dtype in both)


def _multiplies(address: int, dtype: np.dtype[Any], bits: int) -> bool:
    m, n, k, lda, ldb, ldc = 3, 5, 7, 11, 9, 4
    a, b = (np.arange(1, 1 + ld * columns, dtype=dtype).reshape(columns, ld) for ld, columns in ((lda, m), (ldb, n)))
    c = np.full((n, ldc), np.nan, dtype)
    one, zero = np.ones(1, dtype), np.zeros(1, dtype)
    integer = ctypes.c_int64 if bits == 64 else ctypes.c_int32
    whole = [ctypes.byref(integer(x)) for x in (m, n, k, lda, ldb, ldc)]
    real = [x.ctypes.data_as(ctypes.c_void_p) for x in (one, a, b, zero, c)]
    gemm = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 2, *[ctypes.c_void_p] * 11)(address)
    gemm(b"T", b"N", *whole[:3], real[0], real[1], whole[3], real[2], whole[4], real[3], real[4], whole[5])
    right = np.array_equal(c[:, :m], b[:, :k] @ a[:, :k].T)
    return bool(right and np.isnan(c[:, m:]).all())


# --- where it may be ---


def _of_numpy() -> Iterator[Library]:
    """The OpenBLAS that NumPy's wheel brings, beside the package or inside of it."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                loaded = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0))
            except OSError:  # NumPy runs without it
                continue
            yield from _in_library(loaded)


def _in_library(loaded: Any) -> Iterator[Library]:
    for prefix in PREFIXES:
        for suffix, bits in SUFFIXES:
            addresses = [_address(loaded, f"{prefix}{letter}gemm{suffix}") for letter in "sd"]
            if all(addresses):
                wide = "64_" if bits == 64 else ""
                config = _address(loaded, f"{prefix}openblas_get_config{wide}")
                threads = _address(loaded, f"{prefix}openblas_get_num_threads{wide}")
                yield Library(f"NumPy's {_version(config)}", bits, addresses[0], addresses[1], threads)


def _address(loaded: Any, name: str) -> int:
    """Where a library's function is; 0 if there is none of this name."""
    function = getattr(loaded, name, None)
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0


def _version(config: int) -> str:
    """Its name and version, which come first in what the library says of itself."""
    if not config:
        return "BLAS"
    said: bytes = ctypes.CFUNCTYPE(ctypes.c_char_p)(config)() or b"BLAS"
    return " ".join(said.decode(errors="replace").split()[:2])


def _of_scipy() -> Iterator[Library]:
    """SciPy's BLAS, by the capsules that it publishes for Cython; only if they were imported already."""
    module = sys.modules.get("scipy.linalg.cython_blas")
    if module is not None:
        sgemm, dgemm = (_in_capsule(module.__pyx_capi__[name]) for name in ("sgemm", "dgemm"))
        yield Library("SciPy's BLAS", 32, sgemm, dgemm)


def _in_capsule(capsule: Any) -> int:
    """The pointer that a capsule holds."""
    api = ctypes.pythonapi
    name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))(capsule)
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    return int(get(capsule, name) or 0)
