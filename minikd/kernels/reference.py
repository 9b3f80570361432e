"""The NumPy backend: the operations' own forward and vjp, bound to the array module of their buffers.

The same formulas run on the arrays of CuPy, where that backend has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minikd.kernels.arrays import HOST_KINDS
from minikd.kernels.precision import MANTISSA, Multiply, emulated
from minikd.ops import OPS

# Every kernel comes from the table of operations; none is faster than the reference, because it is the reference.
NAMES: frozenset[str] = frozenset()
PRECISIONS = tuple(MANTISSA)  # of its matrix products


def unavailable() -> str:
    """Why this backend cannot run here: it always can."""
    return ""


def multiplier(precision: str) -> Multiply:
    """How this backend multiplies matrices at this precision."""
    return emulated(precision)


def bind_reference(name: str, xp: Any = np) -> Callable[..., Callable[[], None]]:
    """The binder of an operation's reference forward, or of its vjp for a name that ends in "_vjp", on arrays of xp.

    An operation on numbers alone, such as a count, runs on the host: they lie there.
    """
    op = OPS[name.removesuffix("_vjp")]
    function = op.forward if name == op.name else op.vjp
    assert function is not None
    if all(argument.kind in HOST_KINDS for argument in op.buffers):
        xp = np

    def binder(*buffers: Any, **attrs: Any) -> Callable[[], None]:
        return partial(quietly, partial(function, xp, *buffers, **attrs))

    return binder


def quietly(call: Callable[[], None]) -> None:
    """Run a call with NumPy's warnings off: infinities and NaN are results here, as the formulas say."""
    with np.errstate(all="ignore"):
        call()
