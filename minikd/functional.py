"""What users call: softmax, the losses and the layers' functions, in PyTorch's names and reductions.

Tensors in, tensors out, and the gradient is recorded. Plain arrays in, plain arrays out; there every loss also takes
``return_grad=True`` and hands out its logits' gradient from the same traversal, for those who want the kernel without
the autograd. Integers and float16 are computed in float32.

Under the backend "cupy" plain arrays are those of CuPy, on the GPU, and stay there: a loss is an array without axes.
What lies elsewhere is refused. A wrong label or row number makes its row NaN there, and is refused when somebody waits
for the GPU (`kd.synchronize`, `Tensor.numpy`); nobody looks whether logits look like probabilities.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minikd import tensor
from minikd.errors import ArgumentError, ShapeError, bad_temperature
from minikd.kernels import as_array, as_real, evaluate, recall
from minikd.kernels.arrays import here, host_number, is_array, is_writable, module_of, taken_in, to_host
from minikd.kernels.recording import Traced, note_check, note_constant, plain, recorder, refuse, traced
from minikd.ops import OPS
from minikd.ops.elementwise import ACTIVATIONS
from minikd.tape import no_grad
from minikd.tensor import Tensor, apply

__all__ = [
    "Projection",
    "argmax",
    "concatenate",
    "correct_count",
    "corrected_logits",
    "cross_entropy",
    "decoupled_kd",
    "distillation_loss",
    "dropout",
    "fake_quantise",
    "gelu",
    "jensen_shannon",
    "kl_div",
    "linear",
    "linear_distillation_loss",
    "log_softmax",
    "matmul",
    "relu",
    "reverse_kl",
    "shift_images",
    "sigmoid",
    "skewed_kl",
    "softmax",
    "standardise",
    "standardised_kl",
    "take",
    "take_scaled",
    "tanh",
    "teacher_confidence",
]

# Rows that are looked at for the warning that probabilities came where logits belong.
ROWS_TO_LOOK_AT = 32
LARGEST_STEP = 2**20  # of fake_quantise: float32 holds such numbers and their halves


# --- checks that every call shares ---


def _is_buffer(value: Any) -> bool:
    """Whether this is a float64 array without axes: a number that a compiled step reads anew in each run."""
    return isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype == np.float64


def _temperature(where: str, value: Any) -> Any:
    """The temperature as a float or as the array that holds it, or an error if it is not a finite number above 0."""
    if type(value) is float and 0 < value < math.inf:
        return value
    if _is_buffer(value):
        _temperature(where, float(plain(value)))
        return value
    host_number(where, "temperature", value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise bad_temperature(where, value) from None
    if not 0 < number < math.inf:
        raise bad_temperature(where, value)
    return number


def _between(where: str, argument: str, value: Any, low: float, high: float, expected: str) -> float:
    """A number from `low` to `high` as a float; anything else is refused."""
    if type(value) is float and low <= value <= high:
        return value
    host_number(where, argument, value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ArgumentError(where, argument, expected=expected, got=repr(value))
    return number


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _finite(where: str, argument: str, value: Any) -> Any:
    """A finite number as a float or as the array that holds it; anything else is refused."""
    if _is_buffer(value):
        _finite(where, argument, float(plain(value)))
        note_check(value, partial(_finite, where, argument))
        return value
    return _between(where, argument, value, -sys.float_info.max, sys.float_info.max, "a finite number")


def _share(where: str, argument: str, value: Any, ends: str, fix: str = "") -> Any:
    """A number from 0 to 1 as a float or as the array that holds it; `ends` are those of the two that are accepted."""
    if _is_buffer(value):
        _share(where, argument, float(plain(value)), ends, fix)
        note_check(value, partial(_share, where, argument, ends=ends, fix=fix))
        return value
    host_number(where, argument, value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 < number < 1 or (number == 0 and "0" in ends) or (number == 1 and "1" in ends)):
        expected = f"in {'[' if '0' in ends else '('}0, 1{']' if '1' in ends else ')'}"
        raise ArgumentError(where, argument, expected=expected, got=repr(value), fix=fix)
    return number


def _choice(where: str, argument: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ArgumentError(where, argument, expected="one of " + ", ".join(choices), got=repr(value))
    return value


def _smoothing(where: str, value: float) -> float:
    return _between(where, "label_smoothing", value, 0.0, 1.0, "between 0 and 1")


def _array(value: Any, where: str, argument: str) -> Any:
    """The value as a float32 or float64 array where the backend computes; an array that lies elsewhere is refused."""
    if isinstance(value, Tensor):
        return value.array
    return taken_in(where, argument, value, as_real(where, argument, value))


def _rows_of_logits(where: str, argument: str, value: Any) -> Any:
    """Refuse anything that is not (n, c) with at least one row and one class."""
    array = _array(value, where, argument)
    if array.ndim != 2 or 0 in array.shape:
        fix = "Give one row of class scores for each sample; a single row is logits[None]."
        raise ShapeError(where, argument, expected="of shape (n, c) with n, c ≥ 1", got=f"shape {array.shape}", fix=fix)
    return array


def look_like_probabilities(logits: Any) -> bool:
    """Whether each of the first rows of an array (n, c) with a row or more lies in [0, 1] and sums to 1.

    Nobody looks at what lies on a GPU: it would have to be waited for.
    """
    if not isinstance(logits, np.ndarray):
        return False
    if not 0 <= logits.item(0) <= 1 or logits.shape[1] < 2 or not 0 <= logits.item(1) <= 1:
        return False  # two numbers clear nearly all arrays
    rows = logits[:ROWS_TO_LOOK_AT]
    return bool(((rows >= 0) & (rows <= 1)).all() and (abs(rows.sum(axis=1) - 1) < 1e-3).all())


def _warn_of_probabilities(where: str, *, levels: int = 3, **logits: Any) -> None:
    """One warning, at the line of the user's call, if arguments look as if softmax was applied to them already.

    That line is `levels` calls above the warning: 3 where the function that the user called calls this one.
    """
    names = ""
    for name, array in logits.items():
        if look_like_probabilities(plain(array)):
            names += f" and {name}" if names else name
    if names:
        message = f"{where}: {names} look like probabilities where logits are expected."
        warnings.warn(f"{message} Pass the scores before softmax, or log(p).", UserWarning, stacklevel=levels)


def _labels(where: str, target: Any) -> Any:
    """The target as an array where the backend computes; one that lies elsewhere is refused."""
    if isinstance(target, Tensor):
        return target.array
    return target if type(target) is here.array else taken_in(where, "target", target, as_array(target))


def _row_targets(where: str, target: Any, n: int, c: int) -> tuple[Any, bool]:
    """The target as an array, and whether it holds class probabilities (n, c) and not class ids (n,)."""
    array = _labels(where, target)
    if array.ndim == 2 and array.shape == (n, c):
        return as_real(where, "target", array), True
    if array.shape != (n,):
        expected = f"class ids of shape ({n},) or class probabilities of shape ({n}, {c})"
        raise ShapeError(where, "target", expected=expected, got=f"shape {array.shape}")
    return array, False


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor, an array or a list."""
    return value.shape if isinstance(value, Tensor) or is_array(value) else np.shape(value)


def of_host(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """A function of this module for NumPy's arrays, wherever the backend computes: taken there, and the result back."""
    if not here.on_device:
        return function(*arrays, **options)
    return _value(to_host(function(*map(here.put, arrays), **options)))


# --- running a loss on tensors or on arrays ---


def _loss(name: str, inputs: Sequence[Any], return_grad: bool, grad_out: Any, **attrs: Any) -> Any:
    """A loss as a recorded tensor if a tensor came, else as NumPy values with the gradient if it was asked for."""
    wants_grad = return_grad or grad_out is not None
    if any(isinstance(x, Tensor) for x in inputs):
        _refuse_return_grad(name, wants_grad)
        return apply(name, *inputs, **attrs)
    gradient = _gradient_out(name, grad_out, inputs)
    (loss,), (saved,) = evaluate(OPS[name], inputs, attrs, save=wants_grad, gradient=gradient)
    return _result(loss, saved)


def _refuse_return_grad(where: str, wants_grad: bool) -> None:
    """Tensors leave their gradients to backward."""
    if wants_grad:
        fix = "Call loss.backward() and read .grad, or pass plain arrays."
        raise ArgumentError(where, "return_grad", expected="used with arrays only", got="tensors", fix=fix)


def _result(loss: Any, gradient: Any) -> Any:
    """A loss of arrays as a NumPy value, with its gradient if that was asked for."""
    value = _value(loss)
    return value if gradient is None else (value, gradient)


def _value(array: Any) -> Any:
    """An array without axes as the number it holds, if that is known: on a GPU or in a recorded step it is not."""
    known = isinstance(array, np.ndarray) and not isinstance(array, Traced)
    return array[()] if known and not array.ndim else array


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays may lie in the same memory. Two that own theirs do not, which is quick to see."""
    if not is_array(b):
        return False
    return a is b or ((a.base is not None or b.base is not None) and bool(module_of(a).may_share_memory(a, b)))


def _gradient_out(name: str, grad_out: Any, inputs: Sequence[Any]) -> Any:
    """`grad_out`, once it is known to be a place for the gradient of the first input."""
    if grad_out is None:
        return None
    logits = inputs[0]
    real = as_real(name, "logits", logits).dtype
    shape = _shape(logits)
    ok = isinstance(grad_out, here.array) and grad_out.shape == shape and grad_out.dtype == real
    if not (ok and grad_out.flags.c_contiguous and is_writable(grad_out)):
        expected = f"a writable C-contiguous {real} array of shape {shape}"
        got = f"{grad_out.dtype} of shape {grad_out.shape}" if hasattr(grad_out, "dtype") else repr(type(grad_out))
        raise ArgumentError(name, "grad_out", expected=expected, got=got)
    if any(_share_memory(grad_out, x) for x in inputs):
        fix = "Give it an array of its own: the gradient is written while the inputs are still read."
        expected = "an array that shares no memory with the inputs"
        raise ArgumentError(name, "grad_out", expected=expected, got="one that does", fix=fix)
    return grad_out


# --- softmax ---


def _rows_function(name: str, x: Any, axis: int, temperature: Any) -> Any:
    """Softmax or log-softmax along any axis: that axis is brought to the end, and the others become rows."""
    t = _temperature(name, temperature)
    known = recall(name, (x, t), {}) if type(axis) is int and axis in (1, -1) else None
    if known is not None:
        return known.run((x, t))[0]
    array = _array(x, name, "x")
    if array.ndim == 0 or 0 in array.shape:
        raise ShapeError(name, "x", expected="an array with at least one row and one class", got=f"shape {array.shape}")
    if not isinstance(axis, int | np.integer) or not -array.ndim <= axis < array.ndim:
        expected = f"an axis of an array with {array.ndim} axes"
        raise ArgumentError(name, "axis", expected=expected, got=repr(axis))
    rows = (math.prod(array.shape) // array.shape[axis], array.shape[axis])
    if not isinstance(x, Tensor) and recorder() is not None:
        with no_grad():  # the axes are moved by operations too
            return traced(_rows_function(name, Tensor.of(array), axis, t).array)
    if not isinstance(x, Tensor):
        xp = here.xp
        moved = xp.moveaxis(array, axis, -1)
        (y,), _ = evaluate(OPS[name], [moved.reshape(rows), t], {})
        return xp.ascontiguousarray(xp.moveaxis(y.reshape(moved.shape), -1, axis))
    order = [a for a in range(array.ndim) if a != axis % array.ndim] + [axis % array.ndim]
    back = tuple(int(a) for a in np.argsort(order))
    moved = x if order == sorted(order) else x.transpose(order)
    y = apply(name, moved if moved.ndim == 2 else moved.reshape(rows), t)
    y = y if y.shape == moved.shape else y.reshape(moved.shape)
    return y if order == sorted(order) else y.transpose(back)


def softmax(x: Any, axis: int = -1, temperature: float = 1.0) -> Any:
    """Class probabilities of scores: exp(x/T) / Σ exp(x/T), computed after the largest score is taken off.

    Parameters
    ----------
    x : scores of any shape, a Tensor or an array.
    axis : the axis of the classes; the last one by default.
    temperature : T > 0. Above 1 the probabilities come closer together, towards 0 they become one-hot (ties share).

    Returns
    -------
    The same shape. A score of -inf has probability exactly 0. A row that is all -inf, or holds NaN or +inf, is NaN.

    Raises
    ------
    ArgumentError : T ≤ 0, NaN or infinite; or the axis does not exist.
    ShapeError : there are no elements.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", eq. 1.
    """
    return _rows_function("softmax", x, axis, temperature)


def log_softmax(x: Any, axis: int = -1, temperature: float = 1.0) -> Any:
    """The logarithm of `softmax`, x/T - log Σ exp(x/T), without ever taking the logarithm of a rounded probability.

    Arguments, shapes and errors are those of `softmax`; a score of -inf gives -inf.
    """
    return _rows_function("log_softmax", x, axis, temperature)


# --- losses ---


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """-Σ_c w_c·ỹ_c·log softmax(logits)_c, at temperature 1: the loss of hard labels, or of class probabilities.

    Parameters
    ----------
    logits : (n, c) raw scores; rows are samples.
    target : (n,) class ids of any integer dtype, or (n, c) class probabilities.
    weight : (c,) class weights, or None for 1 each.
    ignore_index : rows with this class id add no loss and no gradient (class ids only).
    label_smoothing : e in [0, 1]; the target becomes (1 - e)·y + e/c.
    reduction : "mean" divides by the sum of the class weights of the rows that are not ignored (by n with class
        probabilities), "sum" adds the rows up, "none" returns (n,).
    return_grad : with arrays only, return (loss, gradient with respect to logits) from the same traversal.
    grad_out : an array of the logits' shape and dtype to write that gradient into; implies return_grad.

    Raises
    ------
    ArgumentError : a class id outside 0 … c - 1 (row, value and c are named), an unknown reduction, e outside [0, 1].
    ShapeError : shapes do not fit, or n or c is 0.

    Notes
    -----
    As torch.nn.functional.cross_entropy, except: where every row is ignored, or the weights sum to 0, the mean is 0
    with a zero gradient (PyTorch: NaN).
    """
    where = "cross_entropy"
    attrs: dict[str, Any] = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    save = return_grad or grad_out is not None
    known = recall(where, (logits, target, weight), attrs, save)
    if known is not None:
        _warn_of_probabilities(where, logits=logits)
        gradient = _gradient_out(where, grad_out, (logits, target, weight))
        return _result(*known.run((logits, target, weight), gradient))
    z = _rows_of_logits(where, "logits", logits)
    _choice(where, "reduction", reduction, ("mean", "sum", "none"))
    attrs = {"reduction": reduction, "label_smoothing": _smoothing(where, label_smoothing)}
    labels, soft = _row_targets(where, target, *z.shape)
    if weight is not None:
        weight = _array(weight, where, "weight")
        if weight.shape != z.shape[1:]:
            raise ShapeError(where, "weight", expected=f"of shape ({z.shape[1]},)", got=f"shape {weight.shape}")
    _warn_of_probabilities(where, logits=z)
    if soft:
        return _loss("soft_cross_entropy", (logits, labels, weight), return_grad, grad_out, **attrs)
    return _loss(where, (logits, labels, weight), return_grad, grad_out, ignore_index=int(ignore_index), **attrs)


def kl_div(
    input: Any,
    target: Any,
    *,
    reduction: str = "batchmean",
    log_target: bool = False,
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """Σ q·(log q - input): how far log-probabilities `input` are from probabilities q, pointwise as in PyTorch.

    Parameters
    ----------
    input : (n, c) or (n, …) log-probabilities of the student.
    target : the same shape; probabilities of the teacher, or their logarithm with log_target=True.
    reduction : "batchmean" (default) divides the sum by n, which is the true divergence; "mean" divides by the number
        of elements, as PyTorch's default does; "sum"; "none" returns every element.
    log_target : whether `target` holds log-probabilities.
    return_grad, grad_out : as in `cross_entropy`, with respect to `input`.

    Notes
    -----
    The gradient is -q: no gradient flows into `target`. An element with q = 0 is exactly 0, also where input is -inf
    (PyTorch: NaN). Non-negativity and zero-sum gradients are promises of the losses that take logits, not of this one.

    Raises
    ------
    ShapeError : the shapes differ or there are no elements.  ArgumentError : an unknown reduction.
    """
    where = "kl_div"
    attrs = {"reduction": reduction, "log_target": log_target}
    save = return_grad or grad_out is not None
    known = recall(where, (input, target), attrs, save)
    if known is not None:
        return _result(*known.run((input, target), _gradient_out(where, grad_out, (input, target))))
    _choice(where, "reduction", reduction, ("batchmean", "mean", "sum", "none"))
    shape = _array(input, where, "input").shape
    if _array(target, where, "target").shape != shape:
        got = f"shape {_array(target, where, 'target').shape}"
        raise ShapeError(where, "target", expected=f"of input's shape {shape}", got=got)
    if not shape or 0 in shape:
        raise ShapeError(where, "input", expected="of shape (n, c) with n, c ≥ 1", got=f"shape {shape}")
    rows = (shape[0], math.prod(shape[1:]))
    if shape != rows:
        if grad_out is not None:
            grad_out = _gradient_out(where, grad_out, (input, target)).reshape(rows)
        input, target = (x.reshape(rows) if hasattr(x, "reshape") else np.reshape(x, rows) for x in (input, target))
    result = _loss(where, (input, target), return_grad, grad_out, reduction=reduction, log_target=bool(log_target))
    if shape == rows:
        return result
    if isinstance(result, tuple):
        return result[0].reshape(shape) if reduction == "none" else result[0], result[1].reshape(shape)
    return result.reshape(shape) if reduction == "none" else result


def distillation_loss(
    student_logits: Any,
    teacher_logits: Any,
    target: Any = None,
    *,
    temperature: float = 4.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    reduction: str = "mean",
    scale_t2: bool = True,
    log_target: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """hard_weight·CE(target, student) + soft_weight·T²·KL(softmax(teacher/T) ‖ softmax(student/T)).

    The gradient of a row with respect to the student's logits is
    hard_weight·(softmax(z_s) - y) + soft_weight·T·(p - q), with p and q the softened student and teacher.

    Parameters
    ----------
    student_logits, teacher_logits : (n, c) raw scores. The teacher is a constant: no gradient flows into it.
        A teacher known by its probabilities only is given as their logarithm; -inf is probability 0 at every T.
    target : (n,) class ids, (n, c) class probabilities, or None for no hard term.
    temperature : T > 0; 4 by default, within the range of 2.5 to 20 that Hinton et al. found useful. Above 1e9 it is
        computed as 1e9, where the limit of formula 6 is reached to nine digits in float64. In float32 p - q is rounded
        to 2^-24 of p: from T = 1e4 on little of T·(p - q) is left, and from 1e6 on of T²·KL; use float64 there.
    hard_weight, soft_weight : the two weights, never derived from one another ("alpha" weights the hard term in some
        toolkits and the soft term in others). A weight of 0 leaves its term out.
    reduction : "mean" is the mean of the hard term over labelled rows plus the mean of the soft term over all rows;
        "sum"; "none" returns (n,).
    scale_t2 : multiply the soft term by T², which keeps the size of its gradient independent of T.
    log_target : `teacher_logits` holds the teacher's log-probabilities at this temperature, log softmax(z_t/T), as
        they may have been computed and stored beforehand; they are not divided by T again.
    ignore_index : rows with this class id have no hard term and still feel the soft one.
    label_smoothing : e in [0, 1], of the hard term.
    return_grad, grad_out : as in `cross_entropy`, with respect to student_logits.

    Raises
    ------
    ArgumentError : T ≤ 0, NaN or infinite; a class id outside 0 … c - 1; a weight that is not finite.
    ShapeError : shapes do not fit, or n or c is 0.

    Source: Hinton, Vinyals and Dean 2015, sec. 2 and 2.1.
    """
    where = "distillation_loss"
    t = _temperature(where, temperature)
    scalars = (t, _finite(where, "hard_weight", hard_weight), _finite(where, "soft_weight", soft_weight))
    attrs = {
        "reduction": reduction,
        "scale_t2": scale_t2,
        "log_target": log_target,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    save = return_grad or grad_out is not None
    inputs = (student_logits, teacher_logits, target, *scalars)
    known = recall(where, inputs, attrs, save)
    if known is not None:
        if look_like_probabilities(student_logits) or look_like_probabilities(teacher_logits):
            _warn_of_probabilities(where, student_logits=student_logits, teacher_logits=teacher_logits)
        return _result(*known.run(inputs, _gradient_out(where, grad_out, inputs)))
    student, teacher = (
        _rows_of_logits(where, name, x)
        for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits))
    )
    if student.shape != teacher.shape:
        expected, got = f"of the student's shape {student.shape}", f"shape {teacher.shape}"
        raise ShapeError(where, "teacher_logits", expected=expected, got=got)
    _choice(where, "reduction", reduction, ("mean", "sum", "none"))
    smoothing = _smoothing(where, label_smoothing)
    labels, soft = (None, False) if target is None else _row_targets(where, target, *student.shape)
    _warn_of_probabilities(where, student_logits=student, teacher_logits=teacher)
    teacher_logits = teacher if isinstance(teacher_logits, Tensor) else teacher_logits
    attrs = {
        "reduction": reduction,
        "scale_t2": bool(scale_t2),
        "log_target": bool(log_target),
        "ignore_index": int(ignore_index),
    }
    if soft and (_is_buffer(scalars[1]) or scalars[1]):
        _gradient_out(where, grad_out, (student_logits, teacher_logits, labels))
        pair = (student_logits, teacher_logits)
        return _with_soft_target(*pair, labels, scalars, smoothing, attrs, return_grad, grad_out)
    labels = None if soft else labels
    inputs = (student_logits, teacher_logits, labels, *scalars)
    return _loss(where, inputs, return_grad, grad_out, label_smoothing=smoothing, **attrs)


def _with_soft_target(
    student: Any,
    teacher: Any,
    target: Any,
    scalars: Sequence[float],
    smoothing: float,
    attrs: dict[str, Any],
    return_grad: bool,
    grad_out: Any,
) -> Any:
    """Distillation with class probabilities as hard targets: the sum of the two losses, each by its own kernel."""
    t, hard_weight, soft_weight = scalars
    soft = _loss("distillation_loss", (student, teacher, None, t, 0.0, soft_weight), return_grad, grad_out, **attrs)
    hard = _loss(
        "soft_cross_entropy",
        (student, target, None),
        return_grad or grad_out is not None,
        None,
        reduction=attrs["reduction"],
        label_smoothing=smoothing,
    )
    if not isinstance(soft, tuple):
        return _weighed(hard, hard_weight) + soft
    soft[1][...] += hard_weight * hard[1]
    return _weighed(hard[0], hard_weight) + soft[0], soft[1]


def _weighed(loss: Any, weight: Any) -> Any:
    """A loss times its weight in the loss's dtype; NumPy 1 would make float64 of a float32 number and a Python one."""
    return loss * (loss.dtype.type(weight) if isinstance(loss, np.generic) else weight)


class Projection(NamedTuple):
    """A last layer and what goes into it: the logits hidden·weightᵀ + bias, without computing them.

    `hidden` is (n, k), `weight` (c, k), `bias` (c,) or None. Also the gradients of the three, in their shapes.
    """

    hidden: Any
    weight: Any
    bias: Any = None


def linear_distillation_loss(
    hidden: Any,
    weight: Any,
    bias: Any,
    teacher: Any,
    target: Any = None,
    *,
    temperature: float = 4.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    reduction: str = "mean",
    scale_t2: bool = True,
    log_target: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    return_grad: bool = False,
) -> Any:
    """distillation_loss(hidden·weightᵀ + bias, teacher, target), without the logits of all rows in memory at once.

    The rows are taken in chunks: their logits, the loss with its gradient, and what that adds to the gradients of
    hidden, weight and bias. So with n rows and c classes no array of n·c numbers is made, and the time is that of the
    three matrix products and the loss.

    Parameters
    ----------
    hidden, weight, bias : (n, k), (c, k) and (c,) or None: the student's last layer and what goes into it.
    teacher : (n, c) logits, or a `Projection`, whose logits are computed in chunks too. A constant. Arrays of another
        dtype than hidden's are converted as a whole first.
    target : (n,) class ids, or None for no hard term.
    temperature, hard_weight, soft_weight, scale_t2, log_target, ignore_index, label_smoothing : see
        `distillation_loss`.
    reduction : "mean" or "sum", as in `distillation_loss`: the means are over all rows, not over those of a chunk.
    chunk_rows : rows of a chunk; None takes as many as make 48 MiB of logits and gradient, but at least 16. It changes
        the result by rounding only.
    return_grad : with arrays only, return (loss, gradients) with the gradients as a `Projection`.

    Raises
    ------
    ArgumentError : a setting out of its range; a class id outside 0 … c - 1, before anything is written.
    ShapeError : shapes do not fit, or n or c is 0.

    Source: chunked losses over a large vocabulary, Hsu et al. 2024, "Liger Kernel", and Wijmans et al. 2024, "Cut your
    losses in large-vocabulary language models".
    """
    where = "linear_distillation_loss"
    scalars = [_temperature(where, temperature)]
    scalars += [_finite(where, a, w) for a, w in (("hard_weight", hard_weight), ("soft_weight", soft_weight))]
    _choice(where, "reduction", reduction, ("mean", "sum"))
    if chunk_rows is not None and not (_is_whole(chunk_rows) and chunk_rows >= 1):
        raise ArgumentError(where, "chunk_rows", expected="a whole number from 1, or None", got=repr(chunk_rows))
    attrs = {
        "reduction": reduction,
        "scale_t2": bool(scale_t2),
        "log_target": bool(log_target),
        "ignore_index": int(ignore_index),
        "label_smoothing": _smoothing(where, label_smoothing),
        "chunk_rows": None if chunk_rows is None else int(chunk_rows),
    }
    if isinstance(teacher, Projection):
        teacher = (None, *teacher)
    else:
        _warn_of_probabilities(where, teacher=_rows_of_logits(where, "teacher", teacher))
        teacher = (teacher, None, None, None)
    inputs = (hidden, weight, bias, *teacher, target, *scalars)
    if any(isinstance(x, Tensor) for x in inputs):
        _refuse_return_grad(where, return_grad)
        return apply(where, *inputs, **attrs)
    (loss,), (dhidden, dweight, dbias) = evaluate(OPS[where], inputs, attrs, save=return_grad)
    if not return_grad:
        return _value(loss)
    return _value(loss), Projection(dhidden, dweight, None if bias is None else dbias)


# --- other divergences of student and teacher ---


def _divergence(
    where: str,
    student_logits: Any,
    teacher_logits: Any,
    rest: Sequence[Any],
    attrs: dict[str, Any],
    return_grad: bool,
    grad_out: Any,
    least_classes: int = 1,
    fix: str = "",
) -> Any:
    """A loss of the softened student and teacher; `rest` are its other inputs, `attrs` all its attributes in order."""
    save = return_grad or grad_out is not None
    inputs = (student_logits, teacher_logits, *rest)
    known = recall(where, inputs, attrs, save)
    if known is not None:
        if look_like_probabilities(student_logits) or look_like_probabilities(teacher_logits):
            _warn_of_probabilities(where, levels=4, student_logits=student_logits, teacher_logits=teacher_logits)
        return _result(*known.run(inputs, _gradient_out(where, grad_out, inputs)))
    student = _rows_of_logits(where, "student_logits", student_logits)
    teacher = _rows_of_logits(where, "teacher_logits", teacher_logits)
    if student.shape != teacher.shape:
        expected, got = f"of the student's shape {student.shape}", f"shape {teacher.shape}"
        raise ShapeError(where, "teacher_logits", expected=expected, got=got)
    if student.shape[1] < least_classes:
        expected = f"of shape (n, c) with c ≥ {least_classes}"
        raise ShapeError(where, "student_logits", expected=expected, got=f"shape {student.shape}", fix=fix)
    _choice(where, "reduction", attrs["reduction"], ("mean", "sum", "none"))
    _warn_of_probabilities(where, levels=4, student_logits=student, teacher_logits=teacher)
    teacher_logits = teacher if isinstance(teacher_logits, Tensor) else teacher_logits
    return _loss(where, (student_logits, teacher_logits, *rest), return_grad, grad_out, **attrs)


def reverse_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """T²·KL(p ‖ q) = T²·Σ p·(log p - log q) with p = softmax(student/T) and q = softmax(teacher/T): KL the other way.

    It asks the student to keep to classes that the teacher finds likely, where KL(q ‖ p) asks it to cover them all. The
    gradient of a row with respect to the student's logits is T·p·((log p - log q) - KL).

    Parameters
    ----------
    student_logits, teacher_logits : (n, c) raw scores. The teacher is a constant: no gradient flows into it.
    temperature : T > 0, a number or a float64 array without axes, which a compiled step reads anew in each run. Above
        1e9 it is computed as 1e9, as in `distillation_loss`.
    scale_t2 : multiply by T², which keeps the size of the gradient independent of T.
    reduction : "mean" over rows, "sum", or "none" for (n,).
    return_grad, grad_out : as in `cross_entropy`, with respect to student_logits.

    Notes
    -----
    A class that both rule out (-inf) adds nothing. One that the teacher alone rules out makes the row's loss +inf, and
    its gradient NaN, for there is none: mask the student's class too. One that the student alone rules out adds
    nothing. NaN, +inf or a whole row of -inf make that row NaN and no other.

    Raises
    ------
    ArgumentError : T ≤ 0, NaN or infinite; an unknown reduction.
    ShapeError : shapes do not fit, or n or c is 0.

    Source: Gu et al. 2024, "MiniLLM: knowledge distillation of large language models", sec. 2.1, for one token.
    """
    where = "reverse_kl"
    rest = (_temperature(where, temperature),)
    attrs = {"reduction": reduction, "scale_t2": bool(scale_t2)}
    return _divergence(where, student_logits, teacher_logits, rest, attrs, return_grad, grad_out)


_ENDS = (
    "At both ends it vanishes. For forward KL take distillation_loss with hard_weight=0, for reverse KL reverse_kl; or "
    'give form="continuous", which divides by beta·(1 - beta) and is forward KL at 0 and reverse KL at 1.'
)


def jensen_shannon(
    student_logits: Any,
    teacher_logits: Any,
    *,
    beta: float = 0.5,
    form: str = "paper",
    temperature: float = 1.0,
    scale_t2: bool = True,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """T²·(beta·KL(q ‖ m) + (1 - beta)·KL(p ‖ m)) with m = beta·q + (1 - beta)·p: Jensen-Shannon, with unequal shares.

    p = softmax(student/T), q = softmax(teacher/T). With beta = 0.5 it is symmetric and at most T²·log 2. The gradient
    of a row with respect to the student's logits is T·p·(r - Σ p·r) with r = (1 - beta)·log(p/m).

    Parameters
    ----------
    student_logits, teacher_logits, temperature, scale_t2, reduction, return_grad, grad_out : see `reverse_kl`.
    beta : the teacher's share of m; a number or a float64 array without axes, which a compiled step reads anew.
    form : "paper" is the formula above, with beta in (0, 1). "continuous" divides it by beta·(1 - beta), with beta in
        [0, 1]: that tends to KL(q ‖ p) where beta tends to 0 and to KL(p ‖ q) where it tends to 1, and is these there.
        So their sizes can be compared over beta, while those of the paper's form tend to 0 at both ends.

    Notes
    -----
    Inside (0, 1) it is finite whatever classes are ruled out (-inf): one that both rule out adds nothing.

    Raises
    ------
    ArgumentError : beta outside its range; an unknown form or reduction; T ≤ 0, NaN or infinite.
    ShapeError : shapes do not fit, or n or c is 0.

    Source: Agarwal et al. 2024, "On-policy distillation of language models: learning from self-generated mistakes",
    eq. 1.
    """
    where = "jensen_shannon"
    continuous = _choice(where, "form", form, ("paper", "continuous")) == "continuous"
    share = _share(where, "beta", beta, "01" if continuous else "", "" if continuous else _ENDS)
    rest = (_temperature(where, temperature), share)
    attrs = {"reduction": reduction, "scale_t2": bool(scale_t2), "continuous": continuous}
    return _divergence(where, student_logits, teacher_logits, rest, attrs, return_grad, grad_out)


def skewed_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    scale_t2: bool = True,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """T²·KL(q ‖ alpha·q + (1 - alpha)·p), or reversed T²·KL(p ‖ (1 - alpha)·q + alpha·p): KL against a mixture.

    p = softmax(student/T), q = softmax(teacher/T). What is mixed in bounds the loss by -T²·log(alpha), however
    far apart the two are. The gradient of a row with respect to the student's logits is T·p·(r - Σ p·r) with
    r = -(1 - alpha)·q/m, or reversed r = log(p/m) + (1 - alpha)·q/m, m being the mixture.

    Parameters
    ----------
    student_logits, teacher_logits, temperature, scale_t2, reduction, return_grad, grad_out : see `reverse_kl`.
    alpha : the share of what is compared in the mixture, in [0, 1); 0 is the plain KL. A number or a float64 array
        without axes, which a compiled step reads anew.
    reverse : compare the student with the mixture, not the teacher.

    Notes
    -----
    With alpha above 0 it is finite whatever classes are ruled out (-inf): one that both rule out adds nothing. With
    alpha = 0 a class that the student alone rules out makes the row's loss +inf, reversed one that the teacher alone
    does; in the latter case the row's gradient is NaN, as in `reverse_kl`.

    Raises
    ------
    ArgumentError : alpha outside [0, 1); an unknown reduction; T ≤ 0, NaN or infinite.
    ShapeError : shapes do not fit, or n or c is 0.

    Source: Ko et al. 2024, "DistiLLM: towards streamlined distillation for large language models", sec. 3.1.
    """
    where = "skewed_kl"
    rest = (_temperature(where, temperature), _share(where, "alpha", alpha, "0"))
    attrs = {"reduction": reduction, "scale_t2": bool(scale_t2), "reverse": bool(reverse)}
    return _divergence(where, student_logits, teacher_logits, rest, attrs, return_grad, grad_out)


def decoupled_kd(
    student_logits: Any,
    teacher_logits: Any,
    target: Any,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """alpha·T²·KL of target against all others + beta·T²·KL among the others: distillation decoupled by the target.

    With p = softmax(student/T) and q = softmax(teacher/T), the first is KL((q_y, 1 - q_y) ‖ (p_y, 1 - p_y)), of two
    classes, and the second KL(q̂ ‖ p̂) over the classes but y, renormalised: p̂ = p/(1 - p_y), q̂ = q/(1 - q_y). In
    KL(q ‖ p) the second has the weight 1 - q_y, so that a teacher who is certain teaches little of it. The gradient of
    a row with respect to the student's logits is alpha·T·(p_y - q_y) at y, and elsewhere
    T·(beta·(p̂ - q̂) - alpha·(p_y - q_y)·p̂).

    Parameters
    ----------
    student_logits, teacher_logits : (n, c) raw scores with c ≥ 3. The teacher is a constant.
    target : (n,) class ids of any integer dtype, the y of each row.
    alpha, beta : the two weights, numbers or float64 arrays without axes, which a compiled step reads anew. A weight of
        0 leaves its term out.
    ignore_index : rows with this class id add no loss and no gradient, for without a target nothing can be decoupled.
    reduction : "mean" over the rows that are not ignored (0 if there are none), "sum", or "none" for (n,).
    temperature, scale_t2, return_grad, grad_out : see `reverse_kl`.

    Notes
    -----
    1 - p_y is never formed: the others are a softmax of their own, so a target that is all but certain loses no digits.
    A class that both rule out (-inf) adds nothing; one that the student alone rules out costs +inf. A row in which
    student or teacher rules out all classes but the target, or the target is +inf, is NaN.

    Raises
    ------
    ArgumentError : no target, or a class id outside 0 … c - 1; a weight that is not finite; an unknown reduction;
        T ≤ 0, NaN or infinite.
    ShapeError : shapes do not fit, n is 0, or c is below 3: among one other class there is nothing to compare.

    Source: Zhao et al. 2022, "Decoupled knowledge distillation", eq. 7.
    """
    where = "decoupled_kd"
    if target is None:
        fix = "Nothing can be decoupled without a target: take distillation_loss."
        raise ArgumentError(where, "target", expected="class ids of shape (n,)", got="None", fix=fix)
    weights = (_finite(where, "alpha", alpha), _finite(where, "beta", beta))
    rest = (target, _temperature(where, temperature), *weights)
    attrs = {"reduction": reduction, "scale_t2": bool(scale_t2), "ignore_index": int(ignore_index)}
    fix = "With two classes the second term is 0, whatever the student says: take distillation_loss."
    pair = (student_logits, teacher_logits)
    return _divergence(where, *pair, rest, attrs, return_grad, grad_out, least_classes=3, fix=fix)


def standardised_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: float = 2.0,
    scale_t2: bool = True,
    eps: float = 1e-7,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_out: Any = None,
) -> Any:
    """T²·KL(softmax(Z(teacher)/T) ‖ softmax(Z(student)/T)) with Z(z) = (z - mean z)/(σ + eps) of each row.

    σ² = Σ (z - mean z)²/(c - 1). So the student learns how the teacher's scores relate, and may choose their mean and
    size itself. The gradient flows through Z of the student, its mean and its deviation: with
    g = T·(softmax(Z_s/T) - softmax(Z_t/T)) it is (g - mean g - Z_s·Σ g·Z_s·(σ + eps)/((c - 1)·σ))/(σ + eps).

    Parameters
    ----------
    student_logits, teacher_logits : (n, c) raw scores with c ≥ 2. The teacher is a constant.
    eps : above 0; it is added to the deviation. A row whose scores are all equal has Z = 0; its gradient is g/eps,
        which is large.
    temperature, scale_t2, reduction, return_grad, grad_out : see `reverse_kl`.

    Notes
    -----
    A row with -inf in it has no mean: its loss and gradient are NaN, as with NaN or +inf, and no other row is touched.

    Raises
    ------
    ArgumentError : eps is not a finite number above 0; an unknown reduction; T ≤ 0, NaN or infinite.
    ShapeError : shapes do not fit, n is 0, or c is below 2: one score has no deviation.

    Source: Sun et al. 2024, "Logit standardization in knowledge distillation", eq. 9 and algorithm 1.
    """
    where = "standardised_kl"
    least, most = sys.float_info.min, sys.float_info.max
    attrs = {
        "reduction": reduction,
        "scale_t2": bool(scale_t2),
        "eps": _between(where, "eps", eps, least, most, "a finite number above 0"),
    }
    rest, pair = (_temperature(where, temperature),), (student_logits, teacher_logits)
    fix = "The deviation of a row divides by c - 1."
    return _divergence(where, *pair, rest, attrs, return_grad, grad_out, least_classes=2, fix=fix)


# --- predictions ---


def argmax(logits: Any) -> Any:
    """The class of each row of logits (n, c): the first of the largest scores, as an int64 array (n,).

    NaN counts as the largest. A Tensor is read as an array: no gradient flows through a choice.

    Raises
    ------
    ShapeError : not (n, c), or n or c is 0.
    """
    return evaluate(OPS["argmax"], [_rows_of_logits("argmax", "logits", logits)], {})[0][0]


def correct_count(logits: Any, target: Any, *, ignore_index: int = -100) -> Any:
    """How many rows of logits (n, c) have their `argmax` at the class id in target (n,); ignored rows are not counted.

    Raises
    ------
    ArgumentError : a class id outside 0 … c - 1.  ShapeError : shapes do not fit, or n or c is 0.
    """
    z = _rows_of_logits("correct_count", "logits", logits)
    return _value(evaluate(OPS["correct_count"], [z, target], {"ignore_index": int(ignore_index)})[0][0])


# --- what a teacher is worth ---


def teacher_confidence(
    teacher_logits: Any, target: Any = None, temperature: float = 1.0, *, ignore_index: int = -100
) -> Any:
    """How sure a teacher is of each row, a weight from 0 to 1: 1 - H(q)/log C, or its probability of the true class.

    H(q) is the entropy of q = softmax(teacher_logits/T), and log C the most that it can be. The teacher is a constant:
    no gradient flows through its weights.

    Parameters
    ----------
    teacher_logits : (n, c) raw scores.
    target : (n,) class ids; then the weight is q of that class, and the largest q where a row has no label. None for
        the weight by entropy, which is 1 for a single class.
    temperature : T > 0.
    ignore_index : the class id of rows without a label.

    Returns
    -------
    (n,) in the dtype of the logits; NaN for a row whose `softmax` is NaN.

    Raises
    ------
    ArgumentError : T ≤ 0, NaN or infinite; a class id outside 0 … c - 1.
    ShapeError : shapes do not fit, or n or c is 0.
    """
    where = "teacher_confidence"
    t, z = _temperature(where, temperature), _rows_of_logits(where, "teacher_logits", teacher_logits)
    labels = None if target is None else _class_ids(where, target, len(z))
    _warn_of_probabilities(where, teacher_logits=z)
    return _constant(where, (teacher_logits, labels, t), ignore_index=int(ignore_index))


def corrected_logits(teacher_logits: Any, target: Any, ignore_index: int = -100) -> Any:
    """A teacher's logits (n, c) without its mistakes: where the largest is not the label's, the two are exchanged.

    So the label gets the largest score, and what the teacher says of all other classes stays. A row that is right, or
    has no label (`ignore_index`), is left as it is. The same holds of probabilities. No gradient flows through it.

    Parameters
    ----------
    teacher_logits : (n, c) raw scores.  target : (n,) class ids.

    Raises
    ------
    ArgumentError : a class id outside 0 … c - 1.  ShapeError : shapes do not fit, or n or c is 0.

    Source: Wen, Lai and Qian 2021, "Preparing lessons: improve knowledge distillation with better supervision", the
    probability shift.
    """
    where = "corrected_logits"
    labels = _class_ids(where, target, len(_rows_of_logits(where, "teacher_logits", teacher_logits)))
    return _constant(where, (teacher_logits, labels), ignore_index=int(ignore_index))


def _class_ids(where: str, target: Any, n: int) -> Any:
    """The target as an array of class ids (n,)."""
    array = _labels(where, target)
    if array.shape != (n,):
        raise ShapeError(where, "target", expected=f"class ids of shape ({n},)", got=f"shape {array.shape}")
    return array


def _constant(name: str, inputs: Sequence[Any], **attrs: Any) -> Any:
    """An operation without a gradient: a tensor if one came, else an array."""
    if any(isinstance(x, Tensor) for x in inputs):
        return apply(name, *inputs, **attrs)
    return evaluate(OPS[name], inputs, attrs)[0][0]


# --- layers' functions ---


def _of_first(name: str, x: Any, *inputs: Any) -> Any:
    """An operation that is differentiated by its first input: a tensor if that is one, else an array."""
    return apply(name, x, *inputs) if isinstance(x, Tensor) else evaluate(OPS[name], [x, *inputs], {})[0][0]


def relu(x: Any) -> Any:
    """max(x, 0) element by element; any shape."""
    return _of_first("relu", x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent element by element; any shape."""
    return _of_first("tanh", x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) element by element; any shape."""
    return _of_first("sigmoid", x)


def gelu(x: Any) -> Any:
    """x·Φ(x) element by element, with the exact Φ (PyTorch's default). Hendrycks and Gimpel 2016, eq. 1."""
    return _of_first("gelu", x)


def linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    """f(x weightᵀ + bias): a matrix product with bias and activation, as one operation.

    Parameters
    ----------
    x : (n, k).  weight : (m, k).  bias : (m,) or None.
    activation : None, "relu", "tanh", "sigmoid" or "gelu".

    Returns
    -------
    (n, m)

    Raises
    ------
    ShapeError : the shapes do not chain.  ArgumentError : an unknown activation.
    """
    if activation is not None:
        _choice("linear", "activation", activation, tuple(ACTIVATIONS))
    tensors = any(isinstance(v, Tensor) for v in (x, weight, bias))

    def run(name: str, *inputs: Any) -> Any:
        return apply(name, *inputs) if tensors else evaluate(OPS[name], inputs, {})[0][0]

    if activation is None:
        return run("linear", x, weight, bias)
    if bias is None:
        return run(activation, run("linear", x, weight, None))
    return run("linear_" + activation, x, weight, bias)


def _like_inputs(function: Callable[..., Tensor], inputs: Sequence[Any], *rest: Any) -> Any:
    """What a function of tensors makes of these inputs: a tensor if there is one among them, else an array."""
    if any(isinstance(x, Tensor) for x in inputs):
        return function(*rest)
    with no_grad():
        return traced(function(*rest).array)


def matmul(a: Any, b: Any) -> Any:
    """The matrix product of a (n, k) and b (k, m), or of vectors by NumPy's rules."""
    return _like_inputs(tensor.matmul, (a, b), a, b)


def take(x: Any, rows: Any) -> Any:
    """Rows of x (n, …) by number (k,), in that order; a row may come more than once.

    x may also be labels: whole numbers (n,), which stay whole numbers.

    Raises
    ------
    ArgumentError : a number outside 0 … n - 1.
    """
    if is_array(x) and x.ndim == 1 and x.dtype.kind in "iu":
        return evaluate(OPS["take_index"], [x, rows], {})[0][0]
    return _like_inputs(tensor.take, (x,), x, rows)


def take_scaled(x: Any, rows: Any, scale: Any, shift: Any) -> Any:
    """Rows of bytes as numbers: scale·x[rows] + shift, so that a data set may stay in uint8 until a batch is needed.

    Parameters
    ----------
    x : (n, m) uint8, pixels for example.
    rows : (k,) row numbers, in that order; a row may come more than once.
    scale, shift : (m,) or a number for all columns. Pixels from 0 to 1 have scale 1/255 and shift 0; standardised
        ones 1/(255·deviation) and -mean/deviation.

    Returns
    -------
    (k, m) in the dtype of `scale`; float32 where it is a number.

    Raises
    ------
    ArgumentError : a row number outside 0 … n - 1.  DTypeError : x is not uint8.  ShapeError : shapes do not fit.
    """
    columns = _shape(x)[1:]
    scale, shift = (_for_columns(v, columns) for v in (scale, shift))
    return evaluate(OPS["take_scaled"], [x, rows, scale, shift], {})[0][0]


def standardise(x: Any, mean: Any, deviation: Any) -> Any:
    """(x - mean) / deviation for features x (n, m) of m columns; no gradient flows through it."""
    return evaluate(OPS["standardise"], [x, mean, deviation], {})[0][0]


def _for_columns(value: Any, columns: tuple[int, ...]) -> Any:
    """A number for each column: the array that was given, or one full of the number that was."""
    if len(_shape(value)):
        return value
    if isinstance(value, np.ndarray):
        refuse("a number in an array", "Give take_scaled Python numbers, or arrays with a number for each column.")
    host_number("take_scaled", "a number for all columns", value)
    return note_constant(here.xp.full(columns, plain(value), np.float32))


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Any:
    """Tensors or arrays one after the other along an axis; they agree in all other sizes."""
    return _like_inputs(tensor.concatenate, tensors, tensors, axis)


def dropout(x: Any, p: float = 0.5, *, training: bool = True, seed: int = 0, stream: int = 0, step: Any = 0) -> Any:
    """Set each element to 0 with probability p and scale the others by 1 / (1 - p).

    The mask is a function of seed, stream (the layer's number), step and the element's position alone, so that every
    backend and every repetition draws the same one.

    Raises
    ------
    ArgumentError : p is not in [0, 1).

    Source: Srivastava et al. 2014; the generator is Philox4x32-10, Salmon et al. 2011.
    """
    if not 0 <= p < 1:
        raise ArgumentError("dropout", "p", expected="in [0, 1), the share of elements dropped", got=repr(p))
    if not training or p == 0:
        return x
    host_number("dropout", "step", step)
    step = step if isinstance(step, np.ndarray) else int(step)
    attrs = {"p": float(p), "seed": int(seed), "stream": int(stream)}
    if isinstance(x, Tensor):
        return apply("dropout", x, step, **attrs)
    return evaluate(OPS["dropout"], [x, step], attrs)[0][0]


def fake_quantise(x: Any, scale: Any, zero: int = 0, *, low: int = -128, high: int = 127) -> Any:
    """x as integers of so many steps would hold it: scale·(clamp(round(x/scale) + zero, low, high) - zero).

    Halves are rounded to even. The gradient goes straight through the rounding, and stops where x lies beyond the
    integers' ends: so a network that is trained through this learns to live with int8.

    Parameters
    ----------
    x : any shape.
    scale : the step, a number above 0; or for x (n, m) one for each row, an array or a tensor (n,), in which a 0
        makes a row of zeros. It is a constant: no gradient flows into it.
    zero : the integer that stands for 0.
    low, high : the integers' ends, around `zero`.

    Raises
    ------
    ArgumentError : scale is no finite number above 0, or the integers are not whole or not in order.
    ShapeError : the scales are not one for each row of an x (n, m).

    Source: Jacob et al. 2018, sec. 3; Bengio, Léonard and Courville 2013 (the straight-through gradient).
    """
    where, whole = "fake_quantise", (low, zero, high)
    if not all(_is_whole(v) and abs(v) <= LARGEST_STEP for v in whole) or not low <= zero <= high or low == high:
        expected = f"whole numbers within ±{LARGEST_STEP} with low ≤ zero ≤ high"
        raise ArgumentError(where, "(low, zero, high)", expected=expected, got=repr(whole))
    ends = float(low - zero), float(high - zero)
    if not _shape(scale):
        return _of_first("fake_quantise", x, _step_size(where, scale), *ends)
    return _of_first("fake_quantise_rows", x, scale, *ends)


def _step_size(where: str, value: Any) -> Any:
    """A step as a float or as the array that holds it; below float32's smallest it would count as 0."""
    if _is_buffer(value):
        _step_size(where, float(plain(value)))
        note_check(value, partial(_step_size, where))
        return value
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    return _between(where, "scale", value, least, most, "a finite number above 0")


def shift_images(
    x: Any, shape: tuple[int, int], step: Any, *, most: int = 2, fill: Any = None, seed: int = 0, stream: int = 0
) -> Any:
    """Move each picture by whole pixels, up to `most` in each direction, drawn anew for each row and step.

    How far a row moves is a function of seed, stream, step and the row's number alone, so that every backend and every
    repetition moves it alike; all moves are equally likely (to 2⁻³²). No gradient flows through it.

    Parameters
    ----------
    x : (n, h·w) features that are pictures, line after line.
    shape : (h, w), their height and width.
    step : how often this was done before; in a compiled step an int64 array without axes, an argument or a counter.
    most : the farthest move, from 0; less than both h and w.
    fill : (h·w,) what vacated pixels become, the normalised value of black for each pixel for example; None for 0.
    seed, stream : give each use its own stream; those of dropout layers are apart from these.

    Raises
    ------
    ArgumentError : shape is no pair of whole numbers from 1, or most is out of its range.
    ShapeError : the rows are no pictures of this shape, or fill is no such picture.

    Source: Hinton, Vinyals and Dean 2015, sec. 3 (up to two pixels); the generator is that of `dropout`.
    """
    where = "shift_images"
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) != 2 or not all(_is_whole(s) and s >= 1 for s in sizes):
        expected = "the height and width of a picture, two whole numbers from 1"
        raise ArgumentError(where, "shape", expected=expected, got=repr(shape))
    height, width = (int(s) for s in sizes)
    found = _shape(x)
    if len(found) != 2 or found[1] != height * width:
        expected = f"of shape (n, {height * width}), pictures of {height}·{width} pixels"
        raise ShapeError(where, "x", expected=expected, got=f"shape {found}", fix="Flatten each picture to one row.")
    host_number(where, "step", step)
    step = step if isinstance(step, np.ndarray) else int(step)
    attrs = {"width": width, "most": int(most) if _is_whole(most) else most, "seed": int(seed), "stream": int(stream)}
    return _constant(where, (x, fill, step), **attrs)
