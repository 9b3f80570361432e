"""How many threads BLAS may use while a small network is trained.

On products of a few microseconds BLAS spends more time on waking its threads, and on waiting for them, than on
arithmetic; when another program needs a core, it waits for whole time slices. One thread is faster there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Multiply-adds of a step's largest product from which a second thread pays: about 1 ms of one core's work.
WORTH_TWO_THREADS = 32_000_000
# A user who sets one of these has decided.
VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS")


@contextmanager
def threads_for(multiply_adds: int) -> Iterator[None]:
    """Inside, BLAS uses one thread if its largest product is smaller than a second one is worth.

    Left alone: larger products, a user's own choice in the environment, and an installation without threadpoolctl
    (it comes with the extra `cli`).
    """
    small = multiply_adds < WORTH_TWO_THREADS
    decided = any(os.environ.get(name) for name in VARIABLES)
    if not small or decided or importlib.util.find_spec("threadpoolctl") is None:
        yield
        return
    with importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas"):
        yield
