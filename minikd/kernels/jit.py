"""The Numba backend: names of its kernels, and how the buffers of an operation become their arguments.

Numba is imported when the first kernel is bound, not before; each kernel is compiled at its first call for each dtype
and then kept on disk: in `__pycache__` beside the package if that may be written, else in the user's cache directory
(NUMBA_CACHE_DIR names another). Numba notices when the kernels' own file changes, not when a module that they take
constants from does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minikd.errors import bad_temperature, label_out_of_range
from minikd.ops import OPS, Argument
from minikd.ops.op import KINDS
from minikd.ops.shapes import row_out_of_range

# Which module holds which kernels. Their arguments are the buffers of the operation, then its attributes.
MODULES = {
    "jit_rows": "softmax softmax_vjp log_softmax log_softmax_vjp argmax correct_count",
    "jit_losses": ("cross_entropy cross_entropy_vjp soft_cross_entropy soft_cross_entropy_vjp kl_div kl_div_vjp"),
    "jit_distillation": "distillation_loss distillation_loss_vjp",
    "jit_loops": (
        "bias bias_vjp bias_relu bias_relu_vjp bias_tanh bias_tanh_vjp bias_sigmoid bias_sigmoid_vjp bias_gelu "
        "bias_gelu_vjp sgd_step adam_step dropout dropout_vjp take take_vjp take_scaled add_into"
    ),
}
_MODULE_OF = {name: module for module, names in MODULES.items() for name in names.split()}
NAMES = frozenset(_MODULE_OF)

# Attributes that are words, as the kernels know them.
CODES = {"mean": 0, "sum": 1, "none": 2, "batchmean": 3}


def unavailable() -> str:
    """Why this backend cannot run here, or an empty text if it can."""
    found = importlib.util.find_spec("numba")
    return "" if found else "the package numba is not installed: pip install 'minikd[numba]'"


def binder(name: str) -> Callable[..., Callable[[], None]]:
    """The binder of a kernel: ``binder(name)(*buffers, **attrs)`` is a call without arguments.

    Raises (from that call)
    -----------------------
    ArgumentError : a label or row number out of range, or a temperature that is not a finite number above 0;
        nothing is written then.
    """
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.buffers if name == op.name else op.vjp_buffers
    kernel = getattr(importlib.import_module(f"minikd.kernels.{_MODULE_OF[name]}"), name)

    def bind(*buffers: Any, **attrs: Any) -> Callable[[], None]:
        real = next(b.dtype for a, b in zip(arguments, buffers, strict=True) if a.kind == "real" and b is not None)
        arrays = [_array(a, b, real) for a, b in zip(arguments, buffers, strict=True)]
        values = [*arrays, *(_number(attrs[attribute]) for attribute in op.attrs)]

        def call() -> None:
            status = kernel(*values)
            if status:
                raise _refusal(op.name, status, arguments, arrays)

        return call

    return bind


class _Memory:
    """An array's memory as a writable one, so that Numba sees one type whether the array is read-only or not.

    Kernels write to outputs alone, which are writable already.
    """

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _array(argument: Argument, buffer: Any, real: Any) -> Any:
    """The buffer with the number of axes that the kernels expect; an empty one in the place of None.

    Where the signature leaves the shape open, the kernels see one axis.
    """
    flat = argument.dims in (("...",), ("*",))
    if buffer is None:
        return np.empty((0,) if flat else (0,) * len(argument.dims), KINDS[argument.kind] or real)
    array = np.asarray(buffer)
    if not array.flags.writeable:
        array = np.asarray(_Memory(array))
    return array.reshape(-1) if flat else array


def _number(attribute: Any) -> Any:
    """An attribute as a number; whole numbers are cut to 64 bits, of which the kernels read seeds."""
    if isinstance(attribute, str):
        return CODES[attribute]
    if isinstance(attribute, int) and not isinstance(attribute, bool):
        return (attribute + 2**63) % 2**64 - 2**63
    return attribute


def _refusal(where: str, status: int, arguments: Sequence[Argument], arrays: Sequence[Any]) -> Exception:
    """The error that a kernel's status stands for, as the reference raises it."""
    named = {argument.name: array for argument, array in zip(arguments, arrays, strict=True)}
    if status < 0:
        return bad_temperature(where, float(named["temperature"]))
    row = status - 1
    if "rows" in named:
        rows_there = named["x"].shape[0] if named["x"].size else named["dx"].shape[0]
        return row_out_of_range(row, int(named["rows"][row]), rows_there)
    classes = next(array.shape[1] for array in arrays if array.ndim == 2 and array.size)
    return label_out_of_range(where, row, int(named["target"][row]), classes)
