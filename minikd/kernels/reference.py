"""The NumPy backend: the operations' own forward and vjp, bound to the array module of their buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minikd.ops import OPS

# Every kernel comes from the table of operations; none is faster than the reference, because it is the reference.
NAMES: frozenset[str] = frozenset()


def unavailable() -> str:
    """Why this backend cannot run here: it always can."""
    return ""


def bind_reference(name: str) -> Callable[..., Callable[[], None]]:
    """The binder of an operation's reference forward, or of its vjp for a name that ends in "_vjp"."""
    op = OPS[name.removesuffix("_vjp")]
    function = op.forward if name == op.name else op.vjp
    assert function is not None

    def binder(*buffers: Any, **attrs: Any) -> Callable[[], None]:
        return partial(quietly, partial(function, np, *buffers, **attrs))

    return binder


def quietly(call: Callable[[], None]) -> None:
    """Run a call with NumPy's warnings off: infinities and NaN are results here, as the formulas say."""
    with np.errstate(all="ignore"):
        call()
