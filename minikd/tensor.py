"""`Tensor`: an array, its gradient, its place on the tape, and the operators a person expects."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from minikd import tape
from minikd.errors import ArgumentError, BackendError, DTypeError, ShapeError, TapeError
from minikd.kernels import FLOATS, as_real, operand, run
from minikd.kernels.arrays import from_dlpack as arrays_from_dlpack
from minikd.kernels.arrays import here, here_too, is_array, module_of, on_device, placed, taken_in, to_host
from minikd.kernels.recording import LAYOUT, note_constant, note_made, recorder, refuse, refuse_reading

Axis = int | tuple[int, ...] | None


class Tensor(tape.Recordable):
    """A float32 or float64 array that remembers how it was computed.

    Parameters
    ----------
    data : anything NumPy can make an array of, or an array of another library that speaks DLPack; copied, so that
        later writes to the source change nothing here. float32 and float64 stay, float16 and integers become float32,
        Python numbers NumPy's float64.
    requires_grad : whether `backward` shall leave a gradient here.
    device : "cpu" or "cuda"; None for where the backend in use computes.

    Attributes
    ----------
    grad : None before `backward`, then a tensor of the same shape. Later backward passes add to it, until `zero_grad`.
        It shows the optimizer's own memory, which the next backward pass writes to: copy what you want to keep.

    Raises
    ------
    DTypeError : data is complex, object or text.
    """

    __slots__ = ("__weakref__", "_array", "_grad", "_place", "_requires_grad", "arena", "node", "version")
    __array_ufunc__ = None  # array + tensor calls Tensor.__radd__; np.exp(tensor) is refused, since it loses the tape

    def __init__(self, data: Any, requires_grad: bool = False, device: str | None = None) -> None:
        given = data.array if isinstance(data, Tensor) else data
        if not is_array(given) and hasattr(given, "__dlpack__"):
            given = arrays_from_dlpack(given)
        value = as_real("Tensor", "data", given)
        moved = placed("Tensor", value, device)
        self._fill(_copied(value) if moved is value else moved, bool(requires_grad), None)

    def _fill(self, array: Any, requires_grad: bool, node: tape.Node | None) -> None:
        self._array, self._requires_grad, self.node = array, requires_grad, node
        self.version = 0
        self._grad: Any = None
        self._place: Any = None
        self.arena: Any = None  # the flat array that an optimizer moved this parameter into

    @classmethod
    def of(cls, array: Any, requires_grad: bool = False, node: tape.Node | None = None) -> Tensor:
        """A tensor around this very array, without a copy: for results, batches and views of an arena."""
        tensor = cls.__new__(cls)
        tensor._fill(array, requires_grad, node)
        return tensor

    # --- what it holds ---

    def _set_array(self, value: Any) -> None:
        self._array = value
        LAYOUT.changed()

    array = property(attrgetter("_array"), _set_array, doc="The values; plans notice another array in their place")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return int(self.array.ndim)

    @property
    def size(self) -> int:
        return int(self.array.size)

    def _set_requires_grad(self, value: bool) -> None:
        self._requires_grad = value
        LAYOUT.changed()

    requires_grad = property(attrgetter("_requires_grad"), _set_requires_grad, doc="Whether backward leaves a gradient")

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass left a gradient here since the last `zero_grad`."""
        writing = recorder()
        if writing is not None and self not in writing.gradients:
            writing.found_gradients.setdefault(self, self._grad)
        return self._grad is not None

    @property
    def grad(self) -> Tensor | None:
        return None if self._grad is None else Tensor.of(self._grad)

    def numpy(self) -> np.ndarray:
        """The values as a read-only view: a write past the tape could silently falsify a gradient (copy to write).

        Of a tensor on a GPU a copy, once all that computes it is done.
        """
        refuse_reading("the values of a tensor")
        view = to_host(self.array) if on_device(self.array) else self.array.view()
        view.flags.writeable = False
        return view

    def item(self) -> float:
        """The only element as a Python number."""
        refuse_reading("the number in a tensor")
        return to_host(self.array).item()

    def detach(self) -> Tensor:
        """A copy of the values without a history; no gradient flows through it."""
        return Tensor.of(_copied(self.array))

    def to(self, place: str) -> Tensor:
        """The tensor where this backend computes ("cupy", or "numpy", "c", "numba"), or on "cuda" or "cpu".

        Itself if it lies there; else a copy without a history or gradient.

        Raises
        ------
        ArgumentError : an unknown place.  BackendError : there is no GPU.
        """
        moved = placed("Tensor.to", self.array, place)
        return self if moved is self.array else Tensor.of(moved, self.requires_grad)

    @property
    def device(self) -> str:
        """Where the values lie: "cuda" or "cpu"."""
        return "cuda" if on_device(self.array) else "cpu"

    def __dlpack__(self, **options: Any) -> Any:
        """The values for another library, without a copy; it must not write to them."""
        refuse_reading("the values of a tensor")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self.array.__dlpack_device__()
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        refuse_reading("the values of a tensor")
        if on_device(self.array):
            fix = "Copy it to the host by name: tensor.numpy()."
            got = f"a tensor of shape {self.shape} on a GPU"
            raise BackendError("numpy", "an array", expected="in the host's memory", got=got, fix=fix)
        return np.array(self.array, dtype=dtype, copy=copy) if copy else np.asarray(self.numpy(), dtype=dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles hold the values; history, gradient and arena stay behind."""
        return Tensor, (to_host(self.array), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy of the values where they lie; history, gradient and arena stay behind."""
        return Tensor.of(_copied(self.array), self.requires_grad)

    def __repr__(self) -> str:
        if recorder() is not None:
            return f"a tensor of shape {self.shape} and {self.dtype} in a step that is being recorded"
        text = np.array2string(to_host(self.array), separator=", ", prefix="Tensor(")
        return f"Tensor({text}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return len(self.array)

    def __bool__(self) -> bool:
        refuse_reading("the truth of a tensor")
        return bool(to_host(self.array))  # NumPy refuses where there is more than one element

    def __float__(self) -> float:
        refuse_reading("the number in a tensor")
        return float(to_host(self.array))

    def __getitem__(self, key: Any) -> Any:
        """Rows by slice or by a list of row numbers, recorded as `take`; anything else only without a gradient."""
        if not (self.requires_grad and tape.is_recording()):
            if not on_device(self.array):
                return self.numpy()[key]
            refuse_reading("the values of a tensor")
            return self.array[key].copy()
        if isinstance(key, np.ndarray):
            refuse("an array as an index of a tensor", "Take the rows with x.take(rows).")
        rows = np.arange(len(self))[key] if isinstance(key, slice | list | np.ndarray) else None
        if rows is None or rows.ndim != 1:
            raise TapeError(
                "Tensor",
                "an index",
                expected="a slice or a list of rows",
                got=repr(key),
                fix="Views are not recorded: use x.numpy()[…] for values, or reshape, take and sum for gradients.",
            )
        return self.take(note_constant(here.put(rows)))

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.node is not None or (self.requires_grad and tape.is_recording()):
            raise TapeError(
                "Tensor",
                "the target of an assignment",
                expected="a tensor without a history, inside no_grad()",
                got=f"a tensor of shape {self.shape} that takes part in gradients",
                fix="Wrap the assignment in `with kd.no_grad():`, or compute a new tensor instead.",
            )
        refuse("an assignment into a tensor", "Assign outside the step, or compute a new tensor.")
        given = value.array if isinstance(value, Tensor) else value
        self.array[key] = here_too(given, self.array) if is_array(given) else given
        self.changed_in_place()

    # --- gradients ---

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Leave in every leaf that this value was computed from its gradient, added to what is there.

        Parameters
        ----------
        gradient : the gradient of the final scalar with respect to this tensor; 1 for a scalar.
        retain_graph : keep what was recorded, so that backward can run once more.

        Raises
        ------
        TapeError : nothing was recorded, backward already used the graph, or an input was changed in place since.
        ShapeError : this is no scalar and no gradient was given.
        """
        if not self.requires_grad:
            raise TapeError(
                "backward",
                "the tensor",
                expected="computed from one with requires_grad=True",
                got="one without a history",
                fix="Create the parameters with requires_grad=True, and compute outside no_grad().",
            )
        seed = tape.seed_gradient(self.shape, self.dtype, gradient)
        if self.node is None:
            self.take_gradient(seed.copy())
        else:
            tape.backward(self.node, seed, retain_graph)

    def zero_grad(self) -> None:
        """Forget the gradient; the next backward writes a fresh one."""
        self._keep_gradient(None)

    def _keep_gradient(self, gradient: Any) -> None:
        self._grad = gradient
        writing = recorder()
        if writing is not None:
            writing.gradients[self] = gradient

    def move_into(self, arena: Any, values: Any, gradients: Any) -> None:
        """Live in these views of an arena from now on: the values here, each gradient there."""
        refuse("an optimizer made in the step", "Make it before the step.")
        values[...] = self.array
        self.arena, self.array, self._place = arena, values, gradients
        LAYOUT.changed()
        if self._grad is not None:
            gradients[...] = self._grad
            self._grad = gradients

    def move_to(self, place: str) -> None:
        """Live at this place from now on (see `to`), in no arena and without a gradient; nothing if it lives there."""
        moved = placed("Tensor.move_to", self.array, place)
        if moved is not self.array:
            self.arena, self.array, self._place, self._grad = None, moved, None, None
            self.changed_in_place()

    def gradient_place(self) -> Any:
        """Where the first gradient of a leaf is written, or None if it needs a buffer of its own."""
        return self._place if self.node is None and not self.has_gradient else None

    def take_gradient(self, gradient: Any) -> None:
        """Keep a leaf's first gradient, or add a later one to it."""
        if self.has_gradient:
            run("add_into", self._grad, gradient)
        elif self._place is None:
            self._keep_gradient(gradient)
        else:
            if gradient is not self._place:
                run("copy", self._place, gradient)
            self._keep_gradient(self._place)

    def changed_in_place(self) -> None:
        """Say that the values were written to, so that a backward pass that read the old ones is refused."""
        self.version += 1
        writing = recorder()
        if writing is not None:
            writing.changed.append(self)

    # --- operators ---

    def __add__(self, other: Any) -> Tensor:
        return _pairwise("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _pairwise("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _pairwise("sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _pairwise("sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _pairwise("mul", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _pairwise("mul", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _pairwise("div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _pairwise("div", other, self)

    def __pow__(self, other: Any) -> Tensor:
        return _pairwise("pow", self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return _pairwise("pow", other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return matmul(other, self)

    def __neg__(self) -> Tensor:
        return apply("neg", self)

    def __abs__(self) -> Tensor:
        return apply("abs", self)

    def abs(self) -> Tensor:
        """|x| element by element."""
        return apply("abs", self)

    def exp(self) -> Tensor:
        """e to the power of each element."""
        return apply("exp", self)

    def log(self) -> Tensor:
        """The natural logarithm of each element; NaN below 0, -inf at 0."""
        return apply("log", self)

    def relu(self) -> Tensor:
        """max(x, 0) element by element."""
        return apply("relu", self)

    def tanh(self) -> Tensor:
        """The hyperbolic tangent of each element."""
        return apply("tanh", self)

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-x)) element by element."""
        return apply("sigmoid", self)

    def gelu(self) -> Tensor:
        """x·Φ(x) element by element, with the exact Φ."""
        return apply("gelu", self)

    def maximum(self, other: Any) -> Tensor:
        """The larger of two values, element by element."""
        return _pairwise("maximum", self, other)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Sum over these axes (over all by default)."""
        return apply("sum", self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Mean over these axes (over all by default)."""
        return apply("mean", self, axis=axis, keepdims=keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Largest element over these axes (over all by default); ties share the gradient equally."""
        return apply("max", self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in another shape; one size may be -1."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return apply("reshape", self, shape=tuple(int(s) for s in sizes))

    def transpose(self, *axes: Any) -> Tensor:
        """The axes in another order (reversed by default)."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], Sequence) else axes
        return apply("transpose", self, axes=tuple(int(a) for a in order) or None)

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def take(self, rows: Any) -> Tensor:
        """These rows, in this order; a row may come more than once."""
        return take(self, rows)


def apply(name: str, *inputs: Any, **attrs: Any) -> Tensor:
    """Run an operation of the table on tensors and arrays and record it."""
    return tape.record(name, inputs, Tensor.of, **attrs)


def _copied(array: Any) -> Any:
    """A copy that nobody else has; in a recorded step one that is made anew in each run."""
    xp = module_of(array)
    if recorder() is None or not array.flags.c_contiguous:
        return xp.array(array, order="C", copy=True)
    copy = note_made(xp.empty(array.shape, array.dtype))
    run("copy", copy, array)
    return copy


def _is_number(x: Any) -> bool:
    """Whether this is a Python number, or a float64 array without axes, which a compiled step reads anew each time."""
    return type(x) in (float, int) or (isinstance(x, np.ndarray) and x.ndim == 0 and x.dtype == np.float64)


def _pairwise(name: str, a: Any, b: Any) -> Tensor:
    """A binary operation after broadcasting; a number or array beside a tensor takes the tensor's dtype."""
    if name == "mul" and (_is_number(a) or _is_number(b)):
        x, factor = (b, a) if _is_number(a) else (a, b)
        return apply("scale", x, float(factor) if type(factor) is int else factor)
    dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor) and x.requires_grad), None)
    dtype = dtype or next(x.dtype for x in (a, b) if isinstance(x, Tensor))
    a, b = (x if isinstance(x, Tensor) else Tensor.of(_operand(name, x, dtype)) for x in (a, b))
    if a.shape != b.shape:
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            expected, got = "two arrays whose shapes broadcast", f"shapes {a.shape} and {b.shape}"
            raise ShapeError(name, "operands", expected=expected, got=got) from None
        a, b = (x if x.shape == shape else apply("broadcast_to", x, shape=shape) for x in (a, b))
    return apply(name, a, b)


def _operand(name: str, value: Any, dtype: Any) -> Any:
    array = operand(name, "operand", value, dtype)
    writing = recorder()
    if writing is not None:
        writing.note_conversion(f"{name}: an operand", value, array)
    return array


def matmul(a: Any, b: Any) -> Tensor:
    """The matrix product of arrays with one or two axes, with NumPy's rules for a single axis."""
    a, b = (x if isinstance(x, Tensor) else Tensor.of(_here("matmul", "operand", x)) for x in (a, b))
    if not (1 <= a.ndim <= 2 and 1 <= b.ndim <= 2):
        expected, got = "arrays with one or two axes", f"shapes {a.shape} and {b.shape}"
        fix = "Flatten the leading axes with reshape first."
        raise ShapeError("matmul", "operands", expected=expected, got=got, fix=fix)
    shape = a.shape[:-1] + b.shape[1:]
    left = a if a.ndim == 2 else a.reshape(1, -1)
    right = b if b.ndim == 2 else b.reshape(-1, 1)
    y = apply("matmul", left, right)
    return y if y.shape == shape else y.reshape(shape)


def _here(where: str, argument: str, value: Any) -> Any:
    """`value` as a float32 or float64 array where the backend computes."""
    return taken_in(where, argument, value, as_real(where, argument, value))


def from_dlpack(value: Any) -> Tensor:
    """A tensor on the memory of another library's array, without a copy: a PyTorch tensor on a GPU, for example.

    What either of them writes the other one sees; the array's memory lives as long as the tensor. Before version 2.1
    NumPy takes such arrays in for reading only.

    Parameters
    ----------
    value : whatever speaks DLPack; float32 or float64, C-contiguous.

    Raises
    ------
    DTypeError : it holds something else.  ShapeError : it does not lie in one piece.
    """
    array = arrays_from_dlpack(value)
    if array.dtype not in FLOATS:
        expected, fix = "an array of float32 or float64", "kd.Tensor(value) converts a copy."
        raise DTypeError("from_dlpack", "value", expected=expected, got=str(array.dtype), fix=fix)
    if not array.flags.c_contiguous:
        expected, got = "C-contiguous", f"strides {array.strides}"
        raise ShapeError("from_dlpack", "value", expected=expected, got=got, fix="kd.Tensor(value) takes a copy.")
    return Tensor.of(array)


def take(x: Any, rows: Any) -> Tensor:
    """Rows of x by number; x may have any number of axes behind the first."""
    x = x if isinstance(x, Tensor) else Tensor.of(_here("take", "x", x))
    index = rows if is_array(rows) else taken_in("take", "rows", rows, np.asarray(rows))
    if x.ndim < 1 or index.ndim != 1:
        expected = "one axis of row numbers of an array with rows"
        raise ShapeError("take", "rows", expected=expected, got=f"shape {index.shape}")
    flat = x if x.ndim == 2 else x.reshape(x.shape[0], -1)
    y = apply("take", flat, index)
    return y if x.ndim == 2 else y.reshape(index.shape[0], *x.shape[1:])


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors one after the other along an axis.

    Raises
    ------
    ArgumentError : there is none, or the axis does not exist.
    ShapeError : two of them differ along another axis.
    """
    if not tensors:
        raise ArgumentError("concatenate", "tensors", expected="at least one tensor", got="none")
    return apply("concatenate", *tensors, axis=axis)
