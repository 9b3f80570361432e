"""The C backend: which kernels the extension module holds, and how buffers become one call of a kernel.

Every kernel has the same entry, one struct of buffers, sizes and attributes (csrc/kernels.h), so nothing here knows any
kernel in particular. The kernels are compiled for several levels of instructions; the best that this processor runs is
taken, or the one that the environment variable MINIKD_CPU names. A large call is shared by as many threads as there are
processors, or as many as MINIKD_NUM_THREADS says; its result does not depend on how many. Matrix products are computed
by code of our own, or by the BLAS of this process where that is faster or MINIKD_PRODUCTS=blas says so.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, BackendError, bad_temperature, label_out_of_range
from minikd.kernels import blas
from minikd.ops import OPS, Argument, Op
from minikd.ops.shapes import row_out_of_range


def _load() -> tuple[Any, str]:
    """The extension module, or None and why it cannot be imported."""
    try:
        return importlib.import_module("minikd._native"), ""
    except ImportError as error:
        note = Path(__file__).parents[1] / "native_build_failure.txt"
        if note.exists():
            return None, note.read_text("utf-8").strip()
        return None, f"the extension module minikd._native cannot be imported ({error}); reinstall minikd to build it"


_module, _missing = _load()
_NULL = None if _module is None else _module.ffi.NULL


def _texts(function: str) -> Iterator[str]:
    """The texts that a C function gives for 0, 1, … up to the first NULL."""
    if _module is not None:
        k = 0
        while text := getattr(_module.lib, function)(k):
            yield _module.ffi.string(text).decode()
            k += 1


NAMES: frozenset[str] = frozenset(_texts("minikd_name"))


def cpu_levels() -> tuple[str, ...]:
    """The levels of instructions that can be used here, slowest first."""
    return tuple(_texts("minikd_level"))


@cache
def cpu_level() -> str:
    """The level of instructions in use: the one that MINIKD_CPU names, else the best that this processor runs.

    Raises
    ------
    BackendError : MINIKD_CPU names no level, or one that cannot be used here.
    """
    levels = cpu_levels()
    wanted = os.environ.get("MINIKD_CPU") or (levels[-1] if levels else "base")
    if levels and wanted not in levels:
        raise BackendError(
            "the C backend",
            "MINIKD_CPU",
            expected="one of " + ", ".join(levels) + ", which are the levels that this processor runs",
            got=repr(wanted),
            fix="Unset it to take the best.",
        )
    return wanted


def usable_cpus() -> list[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


MOST_THREADS = 256


@cache
def _use_default_threads() -> None:
    """Let calls have as many threads as MINIKD_NUM_THREADS says, else one for each usable processor: done once."""
    wanted = os.environ.get("MINIKD_NUM_THREADS", "").strip()
    if wanted and not (wanted.isdecimal() and 1 <= int(wanted) <= MOST_THREADS):
        raise BackendError(
            "the C backend",
            "MINIKD_NUM_THREADS",
            expected=f"a whole number from 1 to {MOST_THREADS}",
            got=repr(wanted),
            fix="Unset it to take one thread for each processor.",
        )
    if _module is not None:
        _module.lib.minikd_set_threads(int(wanted) if wanted else len(usable_cpus()))


PRODUCTS = ("own", "blas", "best")


@cache
def _use_default_products() -> None:
    """Let matrix products be computed as MINIKD_PRODUCTS says, else by whatever is fastest: done once."""
    wanted = os.environ.get("MINIKD_PRODUCTS", "").strip() or "best"
    if wanted not in PRODUCTS:
        expected = "one of " + ", ".join(PRODUCTS)
        fix = "Unset it to take the best."
        raise BackendError("the C backend", "MINIKD_PRODUCTS", expected=expected, got=repr(wanted), fix=fix)
    if _module is not None:
        try:
            use_products(wanted)
        except BackendError as error:
            described = {"expected": error.expected, "got": error.got, "fix": "Unset it to take our own."}
            raise BackendError("the C backend", "MINIKD_PRODUCTS", **described) from None


def use_products(which: str) -> None:
    """Let matrix products be computed by our "own" code, by "blas", or by the "best" of both; not while kernels run.

    Results of our own code do not depend on the number of threads; those of BLAS may.

    Raises
    ------
    BackendError : BLAS is asked for and none was found, or there is no C backend.
    """
    _needs_module("use_products")
    ffi, lib = _module.ffi, _module.lib
    # BLAS is slower than kernels with wide vectors, and then it need not be looked for
    found = blas.library() if which == "blas" or (which == "best" and cpu_level() == "base") else None
    if which == "blas" and found is None:
        expected = "own, because no BLAS that computes correctly is loaded in this process"
        raise BackendError("use_products", "which", expected=expected, got=repr(which))
    gemms = [ffi.cast("minikd_gemm *", address) for address in ((found.sgemm, found.dgemm) if found else (0, 0))]
    lib.minikd_use_blas(*gemms, found.integer_bits if found else 0, which == "blas")
    _products[:] = [found]


_products: list[blas.Library | None] = []  # one, once it was decided: the BLAS in use


def products() -> str:
    """What computes matrix products, in words: code of our own, or a BLAS with its number of threads."""
    _needs_module("products")
    _use_default_products()
    return "code of its own" if _products[0] is None else f"{_products[0]}, small ones by code of its own"


def heed_environment() -> None:
    """Take what MINIKD_CPU, MINIKD_NUM_THREADS and MINIKD_PRODUCTS say.

    Raises
    ------
    BackendError : one of them asks for what is not to be had here.
    """
    cpu_level()
    _use_default_threads()
    _use_default_products()


def threads() -> int:
    """The most threads that one call of a kernel runs on; small calls run on one, whatever this is.

    Raises
    ------
    BackendError : MINIKD_NUM_THREADS is not a number of threads, or there is no C backend.
    """
    _needs_module("threads")
    _use_default_threads()
    return int(_module.lib.minikd_threads())


def set_threads(n: int) -> None:
    """Let one call of a kernel run on up to n threads, from 1 to 256. No result depends on it.

    Raises
    ------
    ArgumentError : n is not a whole number from 1 to 256.
    BackendError : there is no C backend.
    """
    _needs_module("set_threads")
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_THREADS:
        raise ArgumentError("set_threads", "n", expected=f"a whole number from 1 to {MOST_THREADS}", got=repr(n))
    _use_default_threads()
    _module.lib.minikd_set_threads(n)


def _needs_module(function: str) -> None:
    if _module is None:
        raise BackendError(function, "the C backend", expected="built", got=f"none: {_missing}")


def unavailable() -> str:
    """Why this backend cannot run here, or an empty text if it can."""
    if _missing:
        return _missing
    try:
        heed_environment()
    except BackendError as error:
        return str(error).rstrip(".")
    return ""


FLOAT, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


class _Place(NamedTuple):
    """Where the value of a letter may be read: the extent of one axis of one buffer; axis -1 is all elements."""

    buffer: int
    axis: int


def _places(arguments: Sequence[Argument], letter: str) -> tuple[_Place, ...]:
    found = []
    for k, argument in enumerate(arguments):
        if letter in argument.dims:
            found.append(_Place(k, -1 if letter == "..." else argument.dims.index(letter)))
    return tuple(found)


def _size(buffers: Sequence[Any], places: Sequence[_Place]) -> int:
    for k, axis in places:
        buffer = buffers[k]
        if buffer is not None:
            return int(buffer.size if axis < 0 else buffer.shape[axis])
    return 0


class NativeCall:
    """One bound call of a C kernel; calling it runs the kernel.

    `record` is the C struct `minikd_call`: records copied one behind the other are a list for `minikd_run`.
    `refuse` raises what a status other than 0 stands for.
    """

    __slots__ = ("kept", "record", "refuse")

    def __init__(self, record: Any, kept: Any, refuse: Callable[[int], None]) -> None:
        self.record, self.kept, self.refuse = record, kept, refuse

    def __call__(self) -> None:
        status = _module.lib.minikd_run(self.record, 1, _NULL)
        if status:
            self.refuse(status)


class NativeSequence:
    """Bound calls of C kernels that run one after the other, as one call.

    `start` runs them and returns the status, for those who hand one that is not 0 to `refuse`.
    """

    __slots__ = ("calls", "done", "records", "start")

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        self.calls = tuple(calls)
        self.records = _module.ffi.new("minikd_call[]", [call.record[0] for call in calls])
        self.done = _module.ffi.new("int64_t[2]")
        self.start = partial(_module.lib.minikd_run, self.records, len(self.calls), self.done + 1)

    def __call__(self) -> None:
        status = self.start()
        if status:
            self.refuse(status)

    def refuse(self, status: int) -> None:
        """Raise what the status stands for with which the last run stopped."""
        self.calls[self.calls_done].refuse(status)

    def repeat(self, inputs: Sequence[tuple[Any, Any]], outputs: Sequence[tuple[Any, Any]], rounds: int) -> None:
        """Run `rounds` times, round r between copies: ``to[...] = from[r]`` of inputs, ``to[r] = from`` of outputs.

        All arrays are contiguous; the two of a pair agree in dtype, and in shape but for the axis of the rounds.
        """
        ffi = _module.ffi
        before = ffi.new("minikd_copy[]", [_copy(to, from_, 0, to.nbytes) for to, from_ in inputs])
        after = ffi.new("minikd_copy[]", [_copy(to, from_, from_.nbytes, 0) for to, from_ in outputs])
        counts = len(self.calls), len(inputs), len(outputs)
        status = _module.lib.minikd_repeat(
            self.records, counts[0], before, counts[1], after, counts[2], rounds, self.done
        )
        if status:
            self.refuse(status)

    @property
    def rounds_done(self) -> int:
        """How many rounds the last `repeat` completed."""
        return int(self.done[0])

    @property
    def calls_done(self) -> int:
        """How many calls were completed in the last run, or in the last round of a `repeat`."""
        return int(self.done[1])


def _copy(to: Any, from_: Any, to_stride: int, from_stride: int) -> tuple[Any, ...]:
    """The fields of a `minikd_copy`; what it points to is kept alive by the caller."""
    pointer = _module.ffi.from_buffer
    return (pointer(to), pointer(from_), max(to_stride, from_stride), to_stride, from_stride)


def join(calls: Sequence[Any]) -> list[Any]:
    """The same calls, neighbours that are C kernels put together."""
    parts: list[Any] = []
    for native, group in itertools.groupby(calls, lambda call: isinstance(call, NativeCall)):
        neighbours = list(group)
        parts += [NativeSequence(neighbours)] if native else neighbours
    return parts


class NativeLaunch:
    """A C kernel for buffers of one look.

    `blank` is its record without buffers. A run takes a record that nobody uses from `free`, or makes one, writes the
    addresses into it and puts it back afterwards: no two threads ever use one record, and no buffer is kept.
    """

    __slots__ = ("arguments", "arrays", "blank", "free", "numbers", "op")

    def __init__(self, op: Op, arguments: Sequence[Argument], buffers: Sequence[Any], blank: Any) -> None:
        self.op, self.arguments, self.blank = op, arguments, blank
        self.numbers = [k for k, b in enumerate(buffers) if type(b) is float]
        self.arrays = [k for k, b in enumerate(buffers) if b is not None and k not in self.numbers]
        self.free: list[tuple[Any, Any, Any]] = []

    def bind(self, *buffers: Any) -> NativeCall:
        ffi = _module.ffi
        record = ffi.new("minikd_call *", self.blank[0])
        pointers = [ffi.NULL if b is None else ffi.from_buffer(b) for b in buffers]
        record.buffer = pointers
        return NativeCall(record, pointers, partial(_refuse, self.op, self.arguments, buffers))

    def run(self, *buffers: Any) -> None:
        pointer = _module.ffi.from_buffer
        try:
            used = self.free.pop()
        except IndexError:
            used = self._fresh()
        record, places, values = used
        for k in self.arrays:
            places[k] = pointer(buffers[k])
        for i, k in enumerate(self.numbers):
            values[i] = buffers[k]
        status = _module.lib.minikd_run(record, 1, _NULL)
        self.free.append(used)
        if status:
            _refuse(self.op, self.arguments, buffers, status)

    def _fresh(self) -> tuple[Any, Any, Any]:
        """A record, its list of addresses, and the numbers that some of them point to."""
        new = _module.ffi.new
        record, values = new("minikd_call *", self.blank[0]), new("double[]", len(self.numbers))
        for i, k in enumerate(self.numbers):
            record.buffer[k] = values + i
        return record, record.buffer, values


def launcher(name: str, level: str = "") -> Callable[[Sequence[Any], dict[str, Any]], NativeLaunch]:
    """What makes the launches of a kernel: ``launcher(name)(buffers, attrs)``.

    `attrs` are all attributes of the operation, `level` is one of `cpu_levels()` if not the one in use.
    """
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.buffers if name == op.name else op.vjp_buffers
    ffi, lib = _module.ffi, _module.lib
    chosen = (level or cpu_level()).encode()
    _use_default_threads()
    _use_default_products()
    kernels = {(FLOAT, DOUBLE)[d]: lib.minikd_find(name.encode(), d, chosen) for d in (0, 1)}
    reals = tuple(k for k, a in enumerate(arguments) if a.kind == "real")
    letters = tuple(_places(arguments, letter) for letter in op.letters)

    def launch(buffers: Sequence[Any], attrs: dict[str, Any]) -> NativeLaunch:
        real = next((buffers[k].dtype for k in reals if buffers[k] is not None), FLOAT)
        sizes = [_size(buffers, places) for places in letters]
        blank = ffi.new("minikd_call *", (kernels[real], [], sizes, _attributes(op, attrs)))
        return NativeLaunch(op, arguments, buffers, blank)

    return launch


def binder(name: str, level: str = "") -> Callable[..., NativeCall]:
    """The binder of a kernel: ``binder(name)(*buffers, **attrs)`` is a call without arguments.

    `attrs` and `level` are those of `launcher`. The call keeps the buffers alive.

    Raises (from that call)
    -----------------------
    ArgumentError : a label or row number out of range, or a temperature that is not a finite number above 0;
        nothing is written then.
    MemoryError : there is no memory for one row, or for the sums of a bias gradient.
    """
    launch = launcher(name, level)
    return lambda *buffers, **attrs: launch(buffers, attrs).bind(*buffers)


def _attributes(op: Op, attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes as the fields of `minikd_attributes`."""
    fields = {name: attrs[name] for name in op.attrs}
    if "reduction" in fields:
        fields["reduction"] = _reductions()[fields["reduction"]]
    for name in ("seed", "stream"):
        if name in fields:
            fields[name] &= 2**64 - 1
    return fields


@cache
def _reductions() -> dict[str, int]:
    """What C calls each reduction."""
    names = ("mean", "sum", "none", "batchmean")
    return {name: getattr(_module.lib, "MINIKD_" + name.upper()) for name in names}


def _refuse(op: Op, arguments: Sequence[Argument], buffers: Sequence[Any], status: int) -> None:
    """Raise what a status stands for, as the reference raises it."""
    named = {a.name: b for a, b in zip(arguments, buffers, strict=True)}
    sizes = {letter: _size(buffers, _places(arguments, letter)) for letter in op.letters}
    if status == _module.lib.MINIKD_NO_MEMORY:
        raise MemoryError(f"{op.name}: there is no memory beside its buffers, of sizes {sizes}")
    if status == _module.lib.MINIKD_BAD_TEMPERATURE:
        raise bad_temperature(op.name, float(named["temperature"]))
    row = status - 1
    if "rows" in named:
        raise row_out_of_range(row, int(named["rows"][row]), sizes["n"])
    raise label_out_of_range(op.name, row, int(named["target"][row]), sizes["c"])
