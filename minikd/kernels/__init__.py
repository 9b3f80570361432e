"""Backends: one table of fast kernels each, and the one place where a kernel is chosen and bound.

A kernel is bound, then called: `bind` checks every buffer once and returns a call without arguments. A backend that
has no kernel of a name falls through to the reference in `minikd.ops`, and `backends` says which those are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, BackendError, DTypeError, ShapeError
from minikd.kernels import composed
from minikd.kernels.arrays import (
    HOST_KINDS,
    cupy_missing,
    here,
    host_number,
    is_writable,
    load_cupy,
    misplaced,
    module_of,
    on_device,
    taken_in,
)
from minikd.kernels.launch import Call, Launch, Launcher, Memo, as_arrays, binding_anew, look_of
from minikd.kernels.precision import FULL, MANTISSA, Multiply, emulated
from minikd.kernels.recording import LAYOUT, anybody_records, plain, recorder, traced
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS, Argument, Op, Shape
from minikd.ops.op import KINDS

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class Backend:
    """Where a backend's kernels are: a module with `unavailable()`, `NAMES` and `binder(name)`.

    A module whose calls can be given other buffers also has `launcher(name)`, which takes buffers and attributes and
    makes a `Launch`. `requires` is the package that is looked for without importing it, and `extra` what installs it.
    `on_host` : whether its arrays are NumPy's; only such a backend is the default where nobody asks for one.
    """

    module: str
    requires: str
    extra: str
    on_host: bool = True

    def missing(self) -> str:
        """Why this backend cannot run here, or an empty text if it can."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"the package {self.requires} is not installed: pip install 'minikd[{self.extra}]'"
        return str(importlib.import_module(self.module).unavailable())


# In the order in which the default is chosen. A new backend is one line here and one module. Only "cupy" computes
# elsewhere than in NumPy's arrays, so it is used where somebody asks for it.
BACKENDS: dict[str, Backend] = {
    "c": Backend("minikd.kernels.native", "", ""),
    "numba": Backend("minikd.kernels.jit", "numba", "numba"),
    "numpy": Backend("minikd.kernels.reference", "", ""),
    "cupy": Backend("minikd.kernels.cuda", "cupy", "cupy", on_host=False),
}


@dataclass(frozen=True)
class BackendStatus:
    """What `minikd.backends()` says of one backend.

    `default` marks the one that is in use, chosen by `use_backend`, MINIKD_BACKEND, or as the best. `reason` says why
    it is not available (empty if it is). `fallbacks` are the kernels that it takes from the NumPy reference because it
    has no fast one of its own.
    """

    available: bool
    default: bool
    reason: str
    fallbacks: tuple[str, ...]


def kernel_names() -> tuple[str, ...]:
    """Every kernel there can be: each operation's name, and name + "_vjp" where it is differentiable."""
    return tuple(n for op in OPS.values() for n in ([op.name, op.name + "_vjp"] if op.vjp else [op.name]))


class _InUse:
    """The backend in use with what was prepared for it: the only state of this library not in an object of its user's.

    It is replaced as a whole, so that a thread that is under way with the backend before adds nothing to this one.
    """

    __slots__ = ("array", "empty", "launchers", "launches", "multiply", "name", "precision", "prepared", "xp")

    def __init__(self, name: str, precision: str = FULL) -> None:
        module = importlib.import_module(BACKENDS[name].module)
        self.name, self.precision = name, precision
        self.multiply: Multiply = getattr(module, "multiplier", emulated)(precision)
        self.xp: Any = load_cupy() if name == "cupy" else np  # its array module, and what it makes arrays with
        self.array: Any = self.xp.ndarray
        self.empty: Any = self.xp.empty
        self.launchers: dict[str, Launcher] = {}
        self.launches = Memo()  # by kernel, attributes and the look of all its buffers
        self.prepared = Memo()  # by operation, attributes and the look of its inputs

    def launcher(self, name: str) -> Launcher:
        """What makes the launches of this kernel: the backend, else its kernels together, else the reference."""
        found = self.launchers.get(name)
        if found is None:
            module = importlib.import_module(BACKENDS[self.name].module)
            if name in module.NAMES:
                found = module.launcher(name) if hasattr(module, "launcher") else binding_anew(module.binder(name))
            elif name in composed.KERNELS or (name in composed.PRODUCTS and self._rounds):
                found = composed.launcher(name, self)
            else:
                found = binding_anew(bind_reference(name, self.xp))
            self.launchers[name] = found
        return found

    def launch(self, name: str, buffers: Sequence[Any], attrs: dict[str, Any]) -> Launch:
        """The launch of a kernel for buffers that look like these, which are checked if there is none yet."""
        look = (name, *attrs.values(), *look_of(buffers))
        launch: Launch | None = self.launches.recall(look)
        if launch is None:
            _approve(name, as_arrays(buffers), attrs)
            launch = self.launcher(name)(buffers, attrs)
            self.launches.remember(look, launch)
        return launch

    @property
    def _rounds(self) -> bool:
        """Whether products are not those of the formulas."""
        return self.xp is not np or self.precision != FULL

    def bind(self, name: str, *buffers: Any, **attrs: Any) -> Call:
        """A call that runs a kernel on these buffers each time."""
        return self.launch(name, buffers, _complete(name, attrs)).bind(*buffers)

    def run(self, name: str, *buffers: Any, **attrs: Any) -> None:
        """Run a kernel once on these buffers."""
        complete = _complete(name, attrs)
        launch, writing = self.launch(name, buffers, complete), recorder()
        if writing is None:
            launch.run(*buffers)
        else:
            writing.run(name, complete, launch, buffers)


_in_use: list[_InUse] = []  # one, once a backend was chosen


def use_backend(name: str) -> None:
    """Compute with this backend from now on: "c", "numba" or "numpy", or "cupy" on the current GPU.

    Models and tensors stay where they are: on "cupy" those that were made before are moved with `to("cupy")`. Matrix
    products are computed in float32 again (see `matmul_precision`).

    Raises
    ------
    BackendError : the name is unknown, or the backend cannot run here (the message says why and how to mend it).
    """
    if name not in BACKENDS:
        raise BackendError("use_backend", "name", expected="one of " + ", ".join(BACKENDS), got=repr(name))
    reason = BACKENDS[name].missing() or ("" if BACKENDS[name].on_host else cupy_missing())
    if reason:
        usable = [n for n in BACKENDS if not BACKENDS[n].missing()]
        expected = f"a backend that runs here ({', '.join(usable)})"
        raise BackendError("use_backend", "name", expected=expected, got=repr(name), fix=f"Reason: {reason}.")
    _compute_with(_InUse(name))


def _compute_with(used: _InUse) -> None:
    _in_use[:] = [used]
    here.change(used.xp)
    LAYOUT.changed()


def current_backend() -> str:
    """The name of the backend in use; chosen at the first call from MINIKD_BACKEND, else the best that runs here.

    Raises
    ------
    BackendError : MINIKD_BACKEND, MINIKD_CPU, MINIKD_NUM_THREADS or MINIKD_PRODUCTS asks for something that is not to
        be had here.
    """
    return _current().name


class Precision:
    """How exactly matrix products are computed; as a context manager it puts back what was before at its end.

    Attributes
    ----------
    name : "float32", "tf32" or "bfloat16".
    """

    def __init__(self, chosen: _InUse, before: _InUse) -> None:
        self.name = chosen.precision
        self._chosen, self._before = chosen, before

    def __enter__(self) -> Precision:
        return self

    def __exit__(self, *exception: Any) -> None:
        if _in_use[0] is self._chosen:  # and no other backend was chosen meanwhile
            _compute_with(self._before)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<precision of matrix products: {self.name}>"


def matmul_precision(precision: str | None = None) -> Precision:
    """How exactly matrix products are computed; with a precision, compute them so from now on.

    Parameters
    ----------
    precision : "float32"; "tf32" or "bfloat16" round the factors of each product to 10 or 7 bits behind the leading
        one, as tensor cores do, and add up in float32; or None to change nothing.
        ``with matmul_precision("bfloat16"): …`` changes it for a while.

    Weights, gradients, losses and all other operations stay float32, and float64 is never rounded; a product within an
    objective, of the rows that it compares, is a product like any other. A product of random
    matrices is off by some 3e-4 ("tf32") or 2.4e-3 ("bfloat16") of its size, in float32 by 3e-7; at most by 2⁻¹⁰ or 2⁻⁷
    of the sum of |a·b|. "cupy" computes so on cards of compute capability 8.0 and above, "numpy" imitates it, to find
    out what a training makes of it; the other backends compute in float32 only. `use_backend` goes back to "float32".

    Raises
    ------
    ArgumentError : no such precision.  BackendError : the backend in use, or the GPU, has no such products.
    """
    before = _current()
    if precision is None or precision == before.precision:
        return Precision(before, before)
    if precision not in MANTISSA:
        expected = "one of " + ", ".join(MANTISSA)
        raise ArgumentError("matmul_precision", "precision", expected=expected, got=repr(precision))
    module = importlib.import_module(BACKENDS[before.name].module)
    possible = getattr(module, "PRECISIONS", (FULL,))
    if precision not in possible:
        expected, fix = f"{', '.join(possible)} on the backend {before.name!r}", "Call use_backend('cupy') before."
        raise BackendError("matmul_precision", "precision", expected=expected, got=repr(precision), fix=fix)
    chosen = _InUse(before.name, precision)
    _compute_with(chosen)
    return Precision(chosen, before)


def product_eps(dtype: Any) -> float:
    """The distance from 1 to the next number that a factor of a product in this dtype may be, as precision is now."""
    eps = float(np.finfo(dtype).eps)
    return eps * 2.0 ** (MANTISSA[FULL] - MANTISSA[_current().precision]) if dtype == np.float32 else eps


def _current() -> _InUse:
    if not _in_use:
        _choose_first()
    return _in_use[0]


def _choose_first() -> None:
    wanted = os.environ.get("MINIKD_BACKEND")
    if not wanted:
        if any(os.environ.get("MINIKD_" + what) for what in ("CPU", "NUM_THREADS", "PRODUCTS")):
            importlib.import_module(BACKENDS["c"].module).heed_environment()  # never silently slower than was asked for
        ready = (name for name, backend in BACKENDS.items() if backend.on_host and not backend.missing())
        use_backend(next(ready))
        return
    try:
        use_backend(wanted)
    except BackendError as error:
        described = {"expected": error.expected, "got": error.got, "fix": error.fix}
        raise BackendError("the environment", "MINIKD_BACKEND", **described) from None


def backends() -> dict[str, BackendStatus]:
    """Each backend's name with what it can do here; imports neither Numba nor CuPy."""
    try:
        current = current_backend()
    except BackendError:  # what the environment asks for is not to be had: then none is in use yet
        current = ""
    found = {}
    for name, backend in BACKENDS.items():
        reason = backend.missing()
        fast = set() if reason else _fast(importlib.import_module(backend.module))
        fallbacks = () if reason or name == "numpy" else tuple(k for k in kernel_names() if k not in fast)
        found[name] = BackendStatus(not reason, name == current, reason, fallbacks)
    return found


def _fast(module: Any) -> set[str]:
    """The kernels that a backend does not take from the reference."""
    return {*module.NAMES, *composed.KERNELS, *(composed.PRODUCTS if hasattr(module, "multiplier") else ())}


def bind(name: str, *buffers: Any, **attrs: Any) -> Call:
    """A call without arguments that runs kernel `name` on these buffers, which are checked here and never again.

    Parameters
    ----------
    name : an operation's name, or that name with "_vjp".
    buffers : outs (or updates), saved values, inputs; a vjp takes the gradients of the inputs and of the outputs
        before them. C-contiguous arrays, or None where nothing is needed.
    attrs : the operation's attributes; its defaults fill in the rest.

    Raises
    ------
    DTypeError, ShapeError : a buffer is not what the signature says.
    """
    return _current().bind(name, *buffers, **attrs)


def join(calls: Sequence[Call]) -> list[Call]:
    """The same work in fewer calls: neighbours that the backend can run as one are put together."""
    module = importlib.import_module(BACKENDS[current_backend()].module)
    return module.join(calls) if hasattr(module, "join") else list(calls)


def in_use() -> _InUse:
    """What stands for the backend in use, another object after each `use_backend`."""
    return _in_use[0] if _in_use else _current()


def run(name: str, *buffers: Any, **attrs: Any) -> None:
    """Run kernel `name` once on these buffers: ``bind(…)()``, without a call that would be thrown away."""
    _current().run(name, *buffers, **attrs)


def _complete(name: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """All attributes of a kernel's operation, in the order of the table."""
    op = OPS[name.removesuffix("_vjp")]
    complete = {**op.attrs, **attrs}
    if len(complete) != len(op.attrs):
        unknown = next(a for a in attrs if a not in op.attrs)
        expected = f"one of the attributes {', '.join(op.attrs)}" if op.attrs else "left out: there are no attributes"
        raise ArgumentError(op.name, unknown, expected=expected, got=repr(attrs[unknown]))
    return complete


def _approve(name: str, buffers: Sequence[Any], attrs: dict[str, Any]) -> None:
    """Refuse buffers that are not what the signature says."""
    op = OPS[name.removesuffix("_vjp")]
    backward = name != op.name
    arguments = op.arguments(backward, len(buffers))
    if len(arguments) != len(buffers):
        expected = ", ".join(a.name for a in arguments)
        raise ShapeError(op.name, "buffers", expected=expected, got=f"{len(buffers)} buffers")
    shapes = _check(op, arguments, buffers, written=("din",) if backward else ("out", "update", "saved"))
    op.sizes(arguments, shapes)
    op.check_worked_out(arguments, shapes, attrs)


def _check(op: Op, arguments: Sequence[Argument], buffers: Sequence[Any], written: Sequence[str]) -> list[Shape | None]:
    """The buffers' shapes, once each is known to have its dtype, to lie in one piece and be writable if written."""
    real = None
    shapes: list[Shape | None] = []
    for argument, buffer in zip(arguments, buffers, strict=True):
        if buffer is None:
            if not argument.optional:
                raise ShapeError(op.name, argument.name, expected="an array", got="None")
            shapes.append(None)
            continue
        dtype = KINDS[argument.kind] or real
        if dtype is None:
            dtype = real = buffer.dtype if buffer.dtype in FLOATS else FLOATS[0]
        if buffer.dtype != dtype:
            raise DTypeError(op.name, argument.name, expected=f"an array of {dtype}", got=str(buffer.dtype))
        refuse_elsewhere(op.name, argument, buffer)
        if argument.role in written and not is_writable(buffer):
            raise ShapeError(op.name, argument.name, expected="writable", got="a read-only array")
        if not buffer.flags.c_contiguous:
            raise ShapeError(op.name, argument.name, expected="C-contiguous", got=f"strides {buffer.strides}")
        shapes.append(buffer.shape)
    return shapes


def refuse_elsewhere(where: str, argument: Argument, buffer: Any) -> None:
    """Refuse a buffer that does not lie where the backend computes, or a number that does not lie on the host."""
    if argument.kind in HOST_KINDS:
        host_number(where, argument.name, buffer)
    elif not isinstance(buffer, _current().array):
        raise misplaced(where, argument.name, buffer)


# --- running one operation eagerly ---


def input_arguments(op: Op, count: int) -> Sequence[Argument]:
    """The declarations of an operation's inputs, one for each of `count` given."""
    return [op.inputs[0]] * count if op.variadic else op.inputs


def as_array(value: Any) -> Any:
    """`value` as an array: of CuPy as it is, anything else as NumPy makes one of it."""
    on_host = isinstance(value, np.ndarray) or not on_device(value)
    return np.asarray(value) if on_host else plain(value)


def as_real(where: str, argument: str, value: Any, other: Any = np.float32) -> Any:
    """`value` as a float32 or float64 array; float16, integers and booleans become `other`. Arrays stay where they are.

    Raises
    ------
    DTypeError : any other dtype (complex, object, text).
    """
    array = as_array(value)
    if array.dtype in FLOATS:
        return array
    native = array.dtype.newbyteorder("=")
    if native in FLOATS or array.dtype.kind in "iub" or native == np.float16:
        array = array.astype(native if native in FLOATS else other)
        writing = recorder()
        if writing is not None:
            writing.note_conversion(f"{where}: {argument}", value, array)
        return array
    expected = "an array of float16, float32, float64 or integers"
    raise DTypeError(where, argument, expected=expected, got=str(array.dtype), fix="Convert it with .astype(float).")


def as_index(where: str, argument: str, value: Any) -> Any:
    """`value` as an int64 array; any integer dtype is accepted. Arrays stay where they are."""
    array = as_array(value)
    if array.dtype.kind not in "iu":
        fix = "Class ids are whole numbers; convert them with .astype(int)."
        raise DTypeError(where, argument, expected="an array of integers", got=str(array.dtype), fix=fix)
    if array.dtype.itemsize == 8 and array.dtype.kind == "u":  # what int64 cannot hold stays too large, and is refused
        array = module_of(array).minimum(array, np.uint64(np.iinfo(np.int64).max))
    return array.astype(np.int64, copy=False)


def as_bytes(where: str, argument: str, value: Any) -> Any:
    """`value` as a uint8 array; no other dtype is accepted, because a conversion would change numbers silently."""
    array = as_array(value)
    if array.dtype != np.uint8:
        raise DTypeError(where, argument, expected="an array of uint8", got=str(array.dtype))
    return array


# How a value becomes an array of each kind but real.
_CONVERT: dict[str, Callable[[str, str, Any], Any]] = {
    "index": as_index,
    "byte": as_bytes,
    "counter": as_index,
    "scalar": lambda where, argument, value: np.asarray(value, np.float64),
}


def operand(where: str, argument: str, value: Any, real: Any) -> Any:
    """`value` as a C-contiguous array of the dtype `real` where the backend computes; numbers are copied there.

    Raises
    ------
    DTypeError : complex numbers, objects, text.  BackendError : an array that lies elsewhere.
    """
    array = as_real(where, argument, value, real).astype(real, order="C", copy=False)
    return taken_in(where, argument, value, array)


def prepare(op: Op, inputs: Sequence[Any], real: np.dtype[Any] | None = None) -> tuple[list[Any], np.dtype[Any]]:
    """The inputs as contiguous arrays of the kinds that the signature names, and the operation's real dtype.

    `real` decides between float32 and float64; without it the first differentiated (else the first real) input does.
    """
    arguments = input_arguments(op, len(inputs))
    if real is None:
        real = _deciding_dtype(op, arguments, inputs)
    arrays: list[Any] = []
    own = here.array
    for argument, value in zip(arguments, inputs, strict=True):
        wanted = KINDS[argument.kind] or real
        as_it_is = type(value) is own and value.dtype == wanted and value.flags.c_contiguous
        if value is None or (as_it_is and (own is np.ndarray or argument.kind not in HOST_KINDS)):
            arrays.append(value)
        elif type(value) is float and argument.kind == "scalar":
            arrays.append(value)  # launches take it as it is
        elif argument.kind == "real":
            arrays.append(operand(op.name, argument.name, value, real))
        elif argument.kind in HOST_KINDS:
            host_number(op.name, argument.name, value)
            arrays.append(np.asarray(_CONVERT[argument.kind](op.name, argument.name, value)))
        else:
            array = _CONVERT[argument.kind](op.name, argument.name, value)
            array = taken_in(op.name, argument.name, value, array)
            arrays.append(array if array.flags.c_contiguous else here.xp.ascontiguousarray(array))
    writing = recorder()
    if writing is not None:
        for argument, value, array in zip(arguments, inputs, arrays, strict=True):
            writing.note_conversion(f"{op.name}: {argument.name}", value, array)
    return arrays, real


def _deciding_dtype(op: Op, arguments: Sequence[Argument], inputs: Sequence[Any]) -> np.dtype[Any]:
    """float32 or float64, as the first differentiated input has it, else the first real one; float32 without any."""
    real = [(a, x) for a, x in zip(arguments, inputs, strict=True) if a.kind == "real" and x is not None]
    for argument, value in real:
        if argument.name in op.wrt:
            return as_real(op.name, argument.name, value).dtype
    return as_real(op.name, real[0][0].name, real[0][1]).dtype if real else FLOATS[0]


class Prepared:
    """An operation for inputs of one look: what it writes, and the launch of its kernel.

    Parameters
    ----------
    inputs : arrays as `prepare` makes them; none of them is kept.
    save : False leaves out the saved values that are optional, and with them their work.
    """

    __slots__ = ("attrs", "empty", "launch", "name", "real", "written")

    def __init__(
        self, op: Op, inputs: Sequence[Any], attrs: dict[str, Any], save: bool, real: np.dtype[Any], used: _InUse
    ) -> None:
        self.name, self.attrs = op.name, attrs
        self.empty = np.empty if all(a.kind in HOST_KINDS for a in op.outs) else used.empty
        outs, saved = op.infer([None if x is None else getattr(x, "shape", ()) for x in inputs], attrs)
        kept = [s if save or not a.optional else None for a, s in zip(op.saved, saved, strict=True)]
        declared = zip((*op.outs, *op.saved), (*outs, *kept), strict=True)
        self.real, self.written = real, [None if s is None else (s, KINDS[a.kind] or real) for a, s in declared]
        written = [None if w is None else self.empty(*w) for w in self.written]
        self.launch = used.launch(op.name, (*written, *inputs), attrs)

    def run(self, inputs: Sequence[Any], gradient: Any = None) -> list[Any]:
        """The outputs and behind them the saved values; `gradient` is an array for the last, if not a fresh one."""
        empty = self.empty
        fresh = self.written if gradient is None else self.written[:-1]
        written = [None if w is None else empty(*w) for w in fresh]
        if gradient is not None:
            written.append(gradient)
        writing = recorder()
        if writing is None:
            self.launch.run(*written, *inputs)
            return written
        for buffer, look in zip(written, fresh, strict=False):
            if look is not None:
                writing.made(buffer)
        writing.run(self.name, self.attrs, self.launch, (*written, *inputs))
        return written


def recall(name: str, inputs: Sequence[Any], attrs: dict[str, Any], save: bool = True) -> Prepared | None:
    """The operation as it was prepared for inputs that look exactly like these and need no conversion, if it was.

    Inputs of such a look went through all checks before; what is left to check are values. `attrs` are all attributes,
    in the order of the table.
    """
    used = _in_use[0] if _in_use else _current()
    if type(inputs[0]) is not used.array or (anybody_records and recorder() is not None):
        return None  # what is recorded goes the long way, on which results are traced
    found: Prepared | None = used.prepared.recall((name, save, *attrs.values(), *look_of(inputs)))
    return found


def execute(
    op: Op,
    inputs: Sequence[Any],
    attrs: dict[str, Any],
    *,
    save: bool = True,
    gradient: Any = None,
    real: np.dtype[Any] | None = None,
) -> tuple[list[Any], list[Any], Sequence[Any]]:
    """Run one operation on arrays; returns its outputs, its saved values and its inputs as the kernel took them.

    Parameters
    ----------
    save : False leaves out the saved values that are optional, and with them their work.
    gradient : an array to be used as the (only) saved value instead of a fresh one.
    real : decides between float32 and float64; without it the inputs do.
    """
    attrs = _complete(op.name, attrs)
    prepared = recall(op.name, inputs, attrs, save)
    if prepared is None or (real is not None and real != prepared.real):
        inputs, real = prepare(op, inputs, real)
        prepared = recall(op.name, inputs, attrs, save) or _learn(op, inputs, attrs, save, real)
    written, outs = prepared.run(inputs, gradient), len(op.outs)
    return written[:outs], written[outs:], inputs


def evaluate(
    op: Op, inputs: Sequence[Any], attrs: dict[str, Any], *, save: bool = True, gradient: Any = None
) -> tuple[list[Any], list[Any]]:
    """`execute` for somebody who looks at the results: the outputs and the saved values, in a recorded step unread."""
    outs, saved, _ = execute(op, inputs, attrs, save=save, gradient=gradient)
    return [traced(out) for out in outs], [None if s is None else traced(s) for s in saved]


def _learn(op: Op, inputs: Sequence[Any], attrs: dict[str, Any], save: bool, real: np.dtype[Any]) -> Prepared:
    """The operation prepared for inputs that look like these, and remembered."""
    used = _current()
    prepared = Prepared(op, inputs, attrs, save, real, used)
    used.prepared.remember((op.name, save, *attrs.values(), *look_of(inputs)), prepared)
    return prepared
