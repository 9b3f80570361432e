"""Stand-ins for libraries that need hardware which is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import minikd as kd
from minikd.kernels import current_backend
from minikd.kernels.cuda import graphs
from minikd.ops.refusals import REFUSALS
from standin import cupy


@contextmanager
def computing() -> Iterator[Any]:
    """With the stand-in as cupy and the backend "cupy" in use; afterwards all is as before."""
    before = current_backend()
    graphs._captures_products.clear()
    with cupy.installed() as module:
        kd.use_backend("cupy")
        try:
            yield module
        finally:
            kd.use_backend(before)
            REFUSALS.forget()
            graphs._captures_products.clear()
