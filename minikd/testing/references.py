"""What an operation should give: the table's own formulas in float64, in longdouble, or in mpmath at any precision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.kernels import input_arguments, kernel_names
from minikd.kernels.reference import quietly
from minikd.ops import OPS
from minikd.ops.op import KINDS

# More digits than are asked for, so that differences of nearly equal numbers still have these.
GUARD_DIGITS = 30


def reference(op: str, precision: str | int = "float64") -> Callable[..., Any]:
    """The reference of a kernel: a function of its inputs that returns what the kernel writes.

    Parameters
    ----------
    op : an operation's name, or that name with "_vjp".
    precision : "float64"; "longdouble"; or a number of decimal digits, for mpmath.

    Returns
    -------
    ``function(*inputs, **attributes)``, with the inputs in the order of the signature (None for an optional one that
    is left out) and behind them the values of what the operation reads and writes. A vjp takes the gradients of the
    outputs, then the inputs. It returns a new array, or a tuple of them: outputs or updated values, then saved values;
    of a vjp the gradients of the inputs. Nothing that comes in is changed. At a number of digits the arrays hold mpf.

    Notes
    -----
    The real inputs are taken as the numbers they are. In longdouble, scalars such as a temperature, and Φ of GELU, keep
    the precision of float64. In mpmath both are exact, and the losses are the formulas as on paper, without the series
    by which the float64 reference avoids cancellation; learning rates and other factors of optimizers stay float64.

    Raises
    ------
    ArgumentError : there is no such kernel, or no such precision.
    ShapeError : the inputs do not fit the signature.

        >>> reference("softmax", 30)([[0.0, 1.0]], 2.0)[0, 1]
        mpf('0.622459331201854593...')
    """
    if op not in kernel_names():
        fix = "docs/operations.md lists the operations; a gradient is the operation's name with _vjp."
        raise ArgumentError("reference", "op", expected="the name of a kernel", got=repr(op), fix=fix)
    if precision == "float64":
        return _Arrays(op, np.dtype(np.float64))
    if precision == "longdouble":
        return _Arrays(op, np.dtype(np.longdouble))
    if isinstance(precision, int) and not isinstance(precision, bool) and precision >= 1:
        return _Digits(op, precision)
    expected = '"float64", "longdouble" or a number of digits from 1'
    raise ArgumentError("reference", "precision", expected=expected, got=repr(precision))


class _Call:
    """A kernel's inputs, sorted: gradients of the outputs, inputs, and the state that it changes."""

    def __init__(self, kernel: str, given: Sequence[Any], attrs: dict[str, Any], real: Callable[[Any], Any]) -> None:
        self.op = op = OPS[kernel.removesuffix("_vjp")]
        self.backward = kernel != op.name
        before = len(op.outs) if self.backward else 0
        behind = 0 if self.backward else len(op.updates)
        count = len(given) - before - behind if op.variadic else len(op.inputs)
        if len(given) != before + count + behind:
            names = [*("d" + a.name for a in op.outs[:before]), *(a.name for a in (*op.inputs, *op.updates[:behind]))]
            raise ShapeError(kernel, "inputs", expected=", ".join(names), got=f"{len(given)} values")
        declared = [*op.outs[:before], *input_arguments(op, count), *op.updates[:behind]]
        values = [None if x is None else _value(a, x, real) for a, x in zip(declared, given, strict=True)]
        self.douts, self.inputs, self.state = values[:before], values[before : before + count], values[before + count :]
        self.attrs = {**op.attrs, **attrs}

    def shapes(self) -> tuple[list[Any], list[Any]]:
        """Shapes of outputs and of saved values."""
        return self.op.infer([None if x is None else np.shape(x) for x in self.inputs], self.attrs)


def _value(argument: Any, x: Any, real: Callable[[Any], Any]) -> Any:
    """A copy of an input in the dtype of its kind."""
    return real(x) if argument.kind == "real" else np.array(x, KINDS[argument.kind])


def _run(call: _Call, xp: Any, blank: Callable[[Any], Any], formula: Callable[..., Any] | None = None) -> list[Any]:
    """Forward, or forward and then vjp, with this array module; `formula` takes the place of the table's forward."""
    op = call.op
    outs, saved = call.shapes()
    if formula is None:
        written = [
            np.empty(s, KINDS[a.kind]) if KINDS[a.kind] else blank(s) for a, s in zip(op.outs, outs, strict=True)
        ]
        kept = [blank(s) for s in saved]
        quietly(lambda: op.forward(xp, *written, *call.state, *kept, *call.inputs, **call.attrs))
    else:
        found = formula(*call.inputs, **call.attrs)
        written, kept = found[: len(outs)], found[len(outs) :]
    if not call.backward:
        return [*written, *call.state, *kept]
    assert op.vjp is not None
    vjp, inputs = op.vjp, [call.inputs[k] for k in op.differentiated(len(call.inputs))]
    dins = [None if x is None else blank(x.shape) for x in inputs]
    quietly(lambda: vjp(xp, *dins, *call.douts, *written, *kept, *call.inputs, **call.attrs))
    return dins


def _returned(written: Sequence[Any]) -> Any:
    return written[0] if len(written) == 1 else tuple(written)


class _Arrays:
    """The reference with NumPy's arrays of one dtype."""

    def __init__(self, kernel: str, dtype: np.dtype[Any]) -> None:
        self.kernel, self.dtype = kernel, dtype

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        call = _Call(self.kernel, inputs, attrs, lambda x: np.array(x, self.dtype))
        return _returned(_run(call, np, lambda shape: np.empty(shape, self.dtype)))


class _Digits:
    """The reference with mpmath's numbers: a formula of `exact`, else the table's own on arrays of mpf."""

    def __init__(self, kernel: str, digits: int) -> None:
        self.kernel, self.digits = kernel, digits

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        exact = importlib.import_module("minikd.testing.exact")
        with exact.mp.workdps(2 * self.digits + GUARD_DIGITS):
            call = _Call(self.kernel, inputs, attrs, lambda x: _numbers(exact.mp, x))
            call.shapes()  # refuses what does not fit
            formula = exact.FORMULAS.get(self.kernel)
            if formula is not None and call.backward:
                written = formula(*call.douts, *_with_exact_scalars(exact.mp, call), **call.attrs)
            else:
                forward = exact.FORMULAS.get(call.op.name)
                call.inputs = _with_exact_scalars(exact.mp, call) if forward else call.inputs
                written = _run(call, _Module(exact.mp), lambda shape: np.empty(shape, object), forward)
        with exact.mp.workdps(self.digits):
            return _returned([_rounded(x) for x in written])


def _with_exact_scalars(mp: Any, call: _Call) -> list[Any]:
    """The inputs, with each float64 scalar as an mpf."""
    declared = zip(input_arguments(call.op, len(call.inputs)), call.inputs, strict=True)
    return [mp.mpf(x.item()) if x is not None and a.kind == "scalar" else x for a, x in declared]


def _numbers(mp: Any, x: Any) -> Any:
    """An array of mpf, of numbers or of mpf; each stands for exactly itself."""
    given = np.asarray(x)
    numbers = np.empty(given.size, object)
    numbers[:] = [v if isinstance(v, mp.mpf) else _number(mp, v) for v in given.ravel()]
    return numbers.reshape(given.shape)


def _number(mp: Any, v: Any) -> Any:
    """A NumPy number as mpf; a longdouble as the sum of two doubles that it is."""
    if isinstance(v, np.longdouble) and np.isfinite(v):
        high = float(v)
        return mp.mpf(high) + mp.mpf(float(v - np.longdouble(high)))
    return mp.mpf(float(v))


def _rounded(x: Any) -> Any:
    """mpf at the precision in force; whole numbers and None as they are."""
    if x is None or np.asarray(x).dtype != object:
        return x
    x = np.asarray(x, object)
    rounded = np.empty(x.size, object)
    rounded[:] = [+v for v in x.ravel()]
    return rounded.reshape(x.shape)


class _Module:
    """What the references call of an array module, on arrays of mpf. All that only moves numbers is NumPy's."""

    float64, int64, uint64, nan, inf = np.dtype(object), np.int64, np.uint64, np.nan, np.inf

    def __init__(self, mp: Any) -> None:
        self._mp = mp
        each: dict[str, tuple[Callable[..., Any], int]] = {
            "exp": (mp.exp, 1),
            "log": (lambda x: mp.log(x) if x > 0 else (mp.ninf if x == 0 else mp.nan), 1),
            "sqrt": (lambda x: mp.sqrt(x) if x >= 0 else mp.nan, 1),
            "tanh": (mp.tanh, 1),
            "sign": (mp.sign, 1),
            "rint": (mp.nint, 1),
            "logaddexp": (lambda a, b: max(a, b) + mp.log1p(mp.exp(-abs(a - b))), 2),
        }
        self._each = {name: np.frompyfunc(f, arity, 1) for name, (f, arity) in each.items()}

    def __getattr__(self, name: str) -> Any:
        return self._each[name] if name in self._each else getattr(np, name)

    def result_type(self, *_: Any) -> Any:
        return self.float64

    def isnan(self, x: Any) -> Any:
        return np.asarray(np.frompyfunc(lambda v: bool(v != v), 1, 1)(x), bool)

    def isinf(self, x: Any) -> Any:
        return np.asarray(np.frompyfunc(lambda v: bool(abs(v) == self._mp.inf), 1, 1)(x), bool)
