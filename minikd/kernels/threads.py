"""How many threads a computation may use: those of our own kernels, and those of the BLAS behind NumPy."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minikd.errors import ArgumentError
from minikd.kernels import native

# Multiply-adds of a step's largest product from which a second thread of BLAS pays: about 1 ms of one core's work.
WORTH_TWO_THREADS = 32_000_000
# A user who sets one of these has decided.
VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS")


class Threads:
    """The numbers of threads in use; as a context manager it puts those of before back at its end.

    Attributes
    ----------
    kernels : the most that one call of a C kernel uses; 1 without the C backend.
    blas : those of the BLAS that NumPy calls, or None where threadpoolctl is not there to ask.
    """

    def __init__(self, before: Threads | None = None) -> None:
        self.kernels = 1 if native.unavailable() else native.threads()
        self.blas = _blas_threads()
        self._before = before

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._before is not None:
            _set(self._before.kernels, self._before.blas)

    def __str__(self) -> str:
        blas = "a number that threadpoolctl would know" if self.blas is None else self.blas
        return f"{self.kernels} for kernels, {blas} for BLAS"

    def __repr__(self) -> str:
        return f"<threads: {self}>"


def threads(n: int | None = None) -> Threads:
    """How many threads kernels and BLAS use; with n, let both use up to n from now on.

    Parameters
    ----------
    n : from 1 to 256, or None to change nothing. ``with threads(1): …`` changes it for a while.

    Our kernels give the same result for any number. BLAS, which NumPy's matrix products use, may round differently.

    Raises
    ------
    ArgumentError : n is not a whole number from 1 to 256.

    Warns
    -----
    UserWarning : BLAS keeps its number, because threadpoolctl (extra `cli`) is not installed.
    """
    if n is None:
        return Threads()
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= native.MOST_THREADS:
        raise ArgumentError("threads", "n", expected=f"a whole number from 1 to {native.MOST_THREADS}", got=repr(n))
    before = Threads()
    _set(n, n)
    if before.blas is None:
        warnings.warn("BLAS keeps its threads: install threadpoolctl (pip install 'minikd[cli]').", stacklevel=2)
    return Threads(before)


def _set(kernels: int, blas: int | None) -> None:
    if not native.unavailable():
        native.set_threads(kernels)
    if blas is not None and _has_threadpoolctl():
        importlib.import_module("threadpoolctl").threadpool_limits(blas, user_api="blas")


def _has_threadpoolctl() -> bool:
    return importlib.util.find_spec("threadpoolctl") is not None


def _blas_threads() -> int | None:
    """The threads of the BLAS libraries in this process, the most if there are several."""
    if not _has_threadpoolctl():
        return None
    found = importlib.import_module("threadpoolctl").threadpool_info()
    return max((int(pool["num_threads"]) for pool in found if pool["user_api"] == "blas"), default=None)


@contextmanager
def blas_threads_for(multiply_adds: int) -> Iterator[None]:
    """Inside, BLAS uses one thread if its largest product is smaller than a second one is worth.

    On products of a few microseconds BLAS spends more time on waking its threads, and on waiting for them, than on
    arithmetic; when another program needs a core, it waits for whole time slices. Left alone: larger products, a user's
    own choice in the environment, and an installation without threadpoolctl (it comes with the extra `cli`).
    """
    decided = any(os.environ.get(name) for name in VARIABLES)
    if multiply_adds >= WORTH_TWO_THREADS or decided or not _has_threadpoolctl():
        yield
        return
    with importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas"):
        yield
