"""What a step does, written down while it runs: which kernels on which memory, and what must stay as it is.

A `Recorder` is told of every kernel that runs in its thread. Memory is known by the array that owns it: an argument
of the step, memory that the step made for itself, or memory that was there before (parameters, optimizer state, data)
and is kept. A step can be replayed if nothing but kernels decides what it computes; so reading a computed value, or
computing with an argument by other means, is refused with the line that does it.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import PlanError
from minikd.kernels.arrays import address, is_array, module_of, owner_of, to_host
from minikd.ops import OPS

PACKAGE = str(Path(__file__).parents[1])

# --- where memory is from ---

ARGUMENT, MADE, KEPT, CONSTANT, NUMBER = "argument", "made", "kept", "constant", "number"


class Buffer(NamedTuple):
    """A kernel's buffer: `offset` bytes into a storage, or a number by itself (`value`)."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]
    value: float | None = None


class Storage(NamedTuple):
    """One piece of memory: what kind it is, and the array that owns it."""

    kind: str
    owner: Any


class Recorded(NamedTuple):
    """One kernel that ran: its buffers (None where it had none), attributes, and the line of the step it came from."""

    name: str
    attrs: dict[str, Any]
    buffers: tuple[Buffer | None, ...]
    line: str


class Guard(NamedTuple):
    """What decided a recording; a plan holds while this attribute is the same object, or an equal number or text."""

    object: Any
    attribute: str
    value: Any

    def holds(self) -> bool:
        now = getattr(self.object, self.attribute, None)
        return now is self.value or (_is_plain(now) and type(now) is type(self.value) and now == self.value)

    def renewed(self) -> Guard:
        """With the value of now, if that is a number or a text: a module may count its calls while it is recorded."""
        now = getattr(self.object, self.attribute, None)
        return self._replace(value=now) if _is_plain(now) and type(now) is not bool else self


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def user_line() -> str:
    """The innermost line outside this package, as "file, line n: source"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(name, line).strip()
    return f"{Path(name).name}, line {line}" + (f": {source}" if source else "")


class Recorder:
    """One run of a step, written down.

    Parameters
    ----------
    arguments : arrays that the step's arguments live in.
    forgiving : note the first reason why the step cannot be replayed in `refusal`, and go on, instead of raising it.

    Attributes
    ----------
    calls, storages : what ran, on what.  arrays : the buffers that do not lie in memory made by the step.
    guards : see `Guard`.
    gradients : what became of each leaf's gradient: the array that it has after the step, or None if it has none.
    found_gradients : leaves whose gradient of before the step was looked at, with that gradient, or None.
    refusal : the first reason why the step cannot be replayed.
    changed : tensors whose values were written in place.
    checks : arguments without axes, with what refuses some of their values before each run.
    """

    def __init__(self, arguments: Sequence[Any], forgiving: bool = False) -> None:
        self.forgiving = forgiving
        self.refusal: PlanError | None = None
        self.calls: list[Recorded] = []
        self.arrays: dict[Buffer, Any] = {}
        self.storages: list[Storage] = []
        self.gradients: dict[Any, Any] = {}
        self.found_gradients: dict[Any, Any] = {}
        self.changed: list[Any] = []
        self.checks: list[tuple[Any, Callable[[float], Any]]] = []
        self._guards: dict[tuple[int, str], Guard] = {}
        self._known: dict[int, int] = {}  # id of an owner → its storage
        for array in arguments:
            self._add(ARGUMENT, array)

    # --- what the rest of the library says ---

    def run(self, name: str, attrs: dict[str, Any], launch: Any, buffers: Sequence[Any]) -> None:
        """Write a kernel down, then run it; kernels that it is made of are its own affair."""
        places = tuple(None if b is None else self.place(b) for b in buffers)
        self.calls.append(Recorded(name, dict(attrs), places, user_line()))
        _state.recorder = None
        try:
            launch.run(*map(plain, buffers))
        finally:
            _state.recorder = self

    def made(self, array: Any) -> None:
        """Memory that the step takes for itself; a kernel will fill it."""
        self._add(MADE, array)

    def constant(self, array: Any) -> None:
        """An array that stands for numbers in the step's own text: it has the same content in every run."""
        self._add(CONSTANT, array)

    def note_conversion(self, argument: str, value: Any, array: Any) -> None:
        """A value became this array: a number's array is a constant, and no other array may be converted."""
        if array is value:
            return
        if isinstance(value, bool | int | float | np.generic):
            self.constant(array)
        elif is_array(value) and owner_of(value) is not owner_of(array):
            got = f"{argument} converted from {value.dtype} to {array.dtype}, or made contiguous,"
            self.refuse(got, f"Give it as a contiguous array of {array.dtype}.")

    def guard(self, object: Any, attribute: str) -> None:
        key = (id(object), attribute)
        if key not in self._guards:
            self._guards[key] = Guard(object, attribute, getattr(object, attribute))

    @property
    def guards(self) -> list[Guard]:
        return [guard.renewed() for guard in self._guards.values()]

    def refuse(self, got: str, fix: str) -> None:
        """The step does what cannot be replayed: raise it, or note it if this recorder is forgiving."""
        expected = "made of operations alone, so that it can be replayed"
        error = PlanError("compile", "the step", expected=expected, got=f"{got} ({user_line()})", fix=fix)
        state = "had changed by then" if self.changed else "are as they were before the step"
        error.add_note(f"The step stopped there; the parameters {state}.")
        self.refusal = self.refusal or error
        if not self.forgiving:
            raise error

    # --- what it knows ---

    def place(self, buffer: Any) -> Buffer:
        """Where this buffer is; memory never heard of was there before the step."""
        if type(buffer) is float:
            return Buffer(-1, 0, (), np.dtype(np.float64), (), buffer)
        owner = owner_of(buffer)
        storage = self._known.get(id(owner))
        if storage is None:
            storage = self._add(KEPT, owner)
        place = Buffer(storage, address(buffer) - address(owner), buffer.shape, buffer.dtype, buffer.strides)
        if self.storages[storage].kind != MADE:
            self.arrays.setdefault(place, plain(buffer))
        return place

    def knows(self, array: Any) -> bool:
        """Whether this array looks at an argument, at memory that kernels of the step fill, or at a constant."""
        storage = self._known.get(id(owner_of(array)))
        return storage is not None and self.storages[storage].kind in (ARGUMENT, MADE, CONSTANT)

    def _add(self, kind: str, array: Any) -> int:
        owner = owner_of(array)
        storage = self._known.get(id(owner))
        if storage is None:
            storage = self._known[id(owner)] = len(self.storages)
            self.storages.append(Storage(kind, owner))  # holds the owner, so that no other array takes its id
        return storage


def written(call: Recorded) -> list[Buffer]:
    """The buffers that a call writes to."""
    op = OPS[call.name.removesuffix("_vjp")]
    backward = call.name != op.name
    roles = ("din",) if backward else ("out", "update", "saved")
    arguments = op.arguments(backward, len(call.buffers))
    return [b for a, b in zip(arguments, call.buffers, strict=True) if b is not None and a.role in roles]


def content(call: Recorded, storages: Sequence[Storage]) -> tuple[Any, ...]:
    """All that a call depends on, in a form that is equal for two recordings of one step."""
    return (call.name, tuple(call.attrs.items()), tuple(content_of(b, storages) for b in call.buffers))


def content_of(buffer: Buffer | None, storages: Sequence[Storage]) -> Any:
    """Where a buffer is, in such a form; of constants it is what they hold."""
    if buffer is None or buffer.value is not None:
        return buffer
    kind, owner = storages[buffer.storage]
    which = id(owner) if kind == KEPT else to_host(owner).tobytes() if kind == CONSTANT else buffer.storage
    return (kind, which, *buffer[1:])


# --- the recorder of this thread ---


class _State(threading.local):
    recorder: Recorder | None = None


_state = _State()
anybody_records: list[Recorder] = []  # those of all threads; eager calls look no further while it is empty


def recorder() -> Recorder | None:
    """The recorder of this thread, or None."""
    return _state.recorder if anybody_records else None


class recording:
    """``with recording(r):`` the kernels that this thread runs are written down by r."""

    def __init__(self, new: Recorder) -> None:
        self.new = new

    def __enter__(self) -> Recorder:
        anybody_records.append(self.new)
        _state.recorder = self.new
        return self.new

    def __exit__(self, *exception: Any) -> None:
        _state.recorder = None
        anybody_records.remove(self.new)


def note_made(array: Any) -> Any:
    """Memory that a kernel is about to fill; returned as it is."""
    if anybody_records and _state.recorder is not None:
        _state.recorder.made(array)
    return array


def note_constant(array: Any) -> Any:
    """An array that stands for numbers of the program's text; returned as it is."""
    if anybody_records and _state.recorder is not None:
        _state.recorder.constant(array)
    return array


def note_check(value: Any, check: Callable[[float], Any]) -> None:
    """A number in an array was accepted by `check`; runs shall refuse what it refuses."""
    if anybody_records and _state.recorder is not None:
        _state.recorder.checks.append((owner_of(value), check))


def refuse(what: str, fix: str) -> None:
    """Say that something is done that no plan can repeat: fine, unless it is being recorded."""
    if anybody_records and _state.recorder is not None:
        _state.recorder.refuse(what, fix)


def refuse_reading(what: str) -> None:
    """Say that a value is read that may differ in the next run: fine, unless it is being recorded."""
    refuse(f"a look at {what}", "Return it and look at it outside the step, or compile with fallback=True.")


# --- what was set up before and may change between two runs ---


class Layout:
    """Changes of how models are put together, so that plans look at their guards only after one.

    Each gives `version` a number that it never had, whichever thread makes it.
    """

    __slots__ = ("_numbers", "version")

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.version = 0

    def changed(self) -> None:
        self.version = next(self._numbers)


LAYOUT = Layout()


# --- arrays whose values are not known yet ---

# What may be asked of such an array: how it looks, and views of it.
_LOOKED_AT = ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "flags")
_ALLOWED = frozenset({*_LOOKED_AT, "base", "origin", "reshape", "view", "T"})
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OPERATORS = (
    *(f"__{before}{name}__" for name in _BINARY for before in ("", "r", "i")),
    *(f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert")),
)
_ON_DEVICE = frozenset({"data", "device"})  # an address, which shows no value
_ELSEWHERE = "Compute it before the step and give it as an argument, or use minikd.functional."


class Unread:
    """What the types of arrays whose values are not known yet have in common."""

    __slots__ = ()
    origin: type  # the type of array that this is one of
    view: Any


def _traced_type(array: Any) -> Any:
    """The type of such arrays of NumPy, or of CuPy."""
    allowed = _ALLOWED if array is np.ndarray else _ALLOWED | _ON_DEVICE

    class Traced(Unread, array):
        """An argument of a step that is being recorded, or what an operation made of one.

        Operations take it like any array. Reading its values, or computing with it in NumPy or CuPy, would bake this
        run's numbers into the plan, so both are refused. CuPy's functions cannot be refused: what they make shows as a
        difference between two recordings.
        """

        origin = array

        def __getattribute__(self, name: str) -> Any:
            if name not in allowed and not name.startswith("_"):
                _refuse_values(f"array.{name}")
            return super().__getattribute__(name)

        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
            _refuse_values(f"numpy.{ufunc.__name__} of an array")
            if "out" in options:
                options["out"] = tuple(plain(x) for x in options["out"])
            return getattr(ufunc, method)(*(plain(x) for x in inputs), **options)

        def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
            if function in _LOOKS:
                return function(*(plain(x) for x in args), **options)
            _refuse_values(f"numpy.{function.__name__} of an array")
            return super().__array_function__(function, types, args, options)

        def __getitem__(self, key: Any) -> Any:
            if not _is_slice(key):
                _refuse_values("indexing an array")
            return super().__getitem__(key)

        def __setitem__(self, key: Any, value: Any) -> None:
            _refuse_values("writing into an array")
            super().__setitem__(key, value)

        def __iter__(self) -> Any:
            _refuse_values("going through an array")
            return iter(plain(self))

        def __float__(self) -> float:
            _refuse_values("float() of an array")
            return float(plain(self))

        def __int__(self) -> int:
            _refuse_values("int() of an array")
            return int(plain(self))

        def __complex__(self) -> complex:
            _refuse_values("complex() of an array")
            return complex(plain(self))

        def __round__(self, digits: int | None = None) -> Any:
            _refuse_values("round() of an array")
            return round(plain(self)[()], digits)

        def __index__(self) -> int:
            _refuse_values("an array as an index")
            return int(plain(self))

        def __bool__(self) -> bool:
            _refuse_values("the truth of an array")
            return bool(plain(self))

        def __repr__(self) -> str:
            return f"an array of shape {self.shape} and {self.dtype} in a step that is being recorded"

        __str__ = __repr__

        def __format__(self, specification: str) -> str:
            return repr(self)

    if array is not np.ndarray:  # which hands its operators to __array_ufunc__; CuPy's do not always
        for name in filter(partial(hasattr, array), _OPERATORS):
            setattr(Traced, name, _refusing(name, getattr(array, name)))
    return Traced


def _refusing(name: str, operate: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of CuPy's arrays that is refused while a step is recorded."""

    def refusing(*operands: Any) -> Any:
        _refuse_values(f"{name} of an array")
        return operate(*map(plain, operands))

    return refusing


Traced = _traced_type(np.ndarray)
_types: dict[type, Any] = {np.ndarray: Traced}


_LOOKS = frozenset({np.shape, np.ndim, np.size, np.may_share_memory, np.shares_memory, np.empty_like})


def _is_slice(key: Any) -> bool:
    """Whether indexing with this gives a view of rows."""
    simple = isinstance(key, slice) or key is Ellipsis or key is None
    return simple or (isinstance(key, tuple) and all(_is_slice(k) for k in key))


def _refuse_values(got: str) -> None:
    refuse(got, _ELSEWHERE)


def plain(value: Any) -> Any:
    """A traced array as an ordinary one on the same memory; anything else as it is."""
    return value.view(value.origin) if isinstance(value, Unread) else value


def as_traced(array: Any) -> Any:
    """The same memory as an array whose values nobody may read while a step is recorded."""
    kind = module_of(array).ndarray
    if kind not in _types:
        _types[kind] = _traced_type(kind)
    return array.view(_types[kind])


def traced(array: Any) -> Any:
    """What an array function returns: while a step is recorded, nobody shall read it."""
    return as_traced(array) if anybody_records and _state.recorder is not None else array
