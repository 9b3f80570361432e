"""Kernels of `table` bound to arrays on a graphics card.

    call = launcher("softmax")(buffers, attrs).bind(*buffers)
    call()

Buffers of the kinds `scalar` and `counter` stay on the host: a 0-d array of NumPy, whose value is read at each call, or
a float. All others are arrays of CuPy. A call allocates nothing and waits for nothing: what it needs beside its buffers
is taken when it is bound, and a label or row number that is out of range is noted on the card (`REFUSALS`), where the
host finds it when it looks.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import bad_temperature, label_out_of_range
from minikd.kernels.cuda.sources import source
from minikd.kernels.cuda.table import ATTRIBUTES, KERNELS, REDUCTIONS, THREADS, VARIANTS, Step, Variant
from minikd.ops import OPS, Argument, Op
from minikd.ops.refusals import REFUSALS
from minikd.ops.shapes import row_out_of_range

NAMES: frozenset[str] = frozenset(KERNELS)

# No contraction of products and sums but where the source says so: as in the C kernels, p·a - q·a of p = q is 0.
OPTIONS = ("-std=c++17", "--fmad=false")
STATIC_SHARED = 1024  # bytes that the functions keep in shared memory beside rows, generously
DEFAULT_SHARED = 48 << 10  # what a function may use without being allowed more
MANY = 8192  # rows, above which a step of one block has all the threads that there can be
COMMON_BYTES = 128  # for what `…_before` tells the rows
ADDRESS, COUNT, FLOAT = np.uint64, np.int64, np.float64
NULL = ADDRESS(0)
HOST = ("scalar", "counter")  # the kinds of buffers that stay on the host


def _cupy() -> Any:
    return importlib.import_module("cupy")


# --- functions ---


@cache
def _module(name: str, double: bool, cupy: Any) -> Any:
    options = (*OPTIONS, "-DMINIKD_DOUBLE") if double else OPTIONS
    return cupy.RawModule(code=source(name), options=options, backend="nvrtc")


def function(name: str, kernel: str, double: bool) -> Any:
    """A function of a source for float or double, compiled when it is first launched."""
    return _module(name, double, _cupy()).get_function(kernel)


def shared_memory() -> int:
    """The most bytes of shared memory that a block may have on the device in use."""
    attributes = _cupy().cuda.Device().attributes
    return int(attributes.get("MaxSharedMemoryPerBlockOptin") or DEFAULT_SHARED)


def variant(name: str, c: int, itemsize: int, most_shared: int) -> Variant:
    """The function for rows of c classes: the first that takes them and whose shared memory there is."""
    for found in VARIANTS[name][itemsize]:
        if (not found.most or c <= found.most) and found.shared(c, itemsize) + STATIC_SHARED <= most_shared:
            return found
    raise AssertionError(f"the last variant of {name} takes any row")


def _address(array: Any) -> np.uint64:
    return ADDRESS(array.data.ptr)


# --- one look ---


class Look:
    """What a kernel's steps depend on, but for addresses: sizes, attributes, and which buffers are there.

    `sizes` are those of the signature's letters, `there` the names of the buffers that are not None, with what else a
    step may be left out for.
    """

    def __init__(self, name: str, op: Op, arguments: Sequence[Argument], buffers: Sequence[Any], attrs: dict[str, Any]):
        self.name, self.op, self.attrs = name, op, attrs
        given = [(a, b) for a, b in zip(arguments, buffers, strict=True) if b is not None]
        self.double = any(a.kind == "real" and b.dtype == np.float64 for a, b in given)
        self.itemsize = 8 if self.double else 4
        self.sizes = op.sizes(arguments, [None if b is None else getattr(b, "shape", ()) for b in buffers])
        self.there = {a.name for a, b in given}
        if "reduction" in attrs:
            self.there |= {"each_element"} if attrs["reduction"] == "none" else {"row_loss", "loss_part"}

    def size(self) -> int:
        """The elements of an operation that treats each alone."""
        return math.prod(self.sizes.values())

    def parts(self) -> int:
        """The blocks that a sum over all elements is cut into: a function of their number alone."""
        return min(1024, max(1, -(-self.size() // (16 * THREADS))))

    def band(self) -> int:
        """The rows that one block of bias.cu adds up."""
        return max(64, -(-self.sizes["n"] // 128))

    def bands(self) -> int:
        return max(1, -(-self.sizes["n"] // self.band()))

    def loss_scale(self) -> float:
        """What Σ of the row losses is multiplied by, where the divisor is known beforehand."""
        n, reduction = self.sizes["n"], self.attrs["reduction"]
        if reduction in ("none", "sum"):
            return 1.0
        return 1 / (n * self.sizes["c"] if self.name == "kl_div" and reduction == "mean" else n)

    def call(self) -> int:
        """The number of the question whether labels, or row numbers, are in range."""
        if "rows" in self.there:
            n = self.sizes["n"]
            return REFUSALS.numbered(("take", n), lambda k, row: row_out_of_range(k, row, n))
        name, c = self.op.name, self.sizes["c"]
        return REFUSALS.numbered((name, c), lambda row, label: label_out_of_range(name, row, label, c))

    def attribute(self, name: str) -> Any:
        value = self.attrs[name]
        if name == "reduction":
            value = REDUCTIONS.index(value)
        kind = ATTRIBUTES[name]
        return kind(value & 2**64 - 1) if kind is np.uint64 else kind(value)


# What steps are given beside buffers, sizes and attributes.
DERIVED: dict[str, Callable[[Look], Any]] = {
    "null": lambda look: NULL,
    "zero": lambda look: FLOAT(0),
    "one": lambda look: FLOAT(1),
    "size": lambda look: COUNT(look.size()),
    "parts": lambda look: COUNT(look.parts()),
    "band": lambda look: COUNT(look.band()),
    "bands": lambda look: COUNT(look.bands()),
    "each_row": lambda look: np.int32(look.attrs["reduction"] == "none"),
    "loss_scale": lambda look: FLOAT(look.loss_scale()),
    "refused": lambda look: _address(REFUSALS.record(_cupy())),
    "call": lambda look: COUNT(look.call()),
}

# Memory that a call has for itself, in bytes.
SCRATCH: dict[str, Callable[[Look], int]] = {
    "common": lambda look: COMMON_BYTES,
    "factor": lambda look: 8,
    "part": lambda look: 8 * look.parts(),
    "loss_part": lambda look: 8 * look.parts(),
    "row_loss": lambda look: 8 * look.sizes["n"],
    "bands_part": lambda look: 8 * look.bands() * look.sizes["m"],
}
# … and what it is there for: without these it is null.
SCRATCH_FOR = {"loss_part": "loss_part", "row_loss": "row_loss", "bands_part": "db"}


def _blocks(work: int, each: int) -> tuple[int, ...]:
    return (-(-work // each),)


# How many blocks a step has.
GRIDS: dict[str, Callable[[Look], tuple[int, ...]]] = {
    "one": lambda look: (1,),
    "rows": lambda look: (look.sizes["n"],),
    "places": lambda look: (look.sizes["k"],),
    "elements": lambda look: _blocks(look.sizes["k"], THREADS),
    "vectors": lambda look: _blocks(look.size(), THREADS * 16 // look.itemsize),
    "fours": lambda look: _blocks(look.size(), THREADS * 4),
    "arena": lambda look: (min(1024, *_blocks(look.size(), THREADS * 16 // look.itemsize)),),
    "parts": lambda look: (look.parts(),),
    "columns": lambda look: _blocks(look.sizes["m"], 128),
    "forward": lambda look: (
        *_blocks(look.sizes["m"], 32 * 16 // look.itemsize),
        min(1024, *_blocks(look.sizes["n"], 8)),
    ),
    "backward": lambda look: (*_blocks(look.sizes["m"], 32), look.bands()),
}


class Form:
    """A step for one look: the function that is launched, and how."""

    __slots__ = ("block", "function", "grid", "shared", "step")

    def __init__(self, step: Step, look: Look) -> None:
        self.step, name, self.shared = step, step.function, 0
        if step.grid == "classes":
            c = look.sizes["c"]
            found = variant(name, c, look.itemsize, shared_memory())
            name, self.shared = f"{name}_{found.suffix}", found.shared(c, look.itemsize)
            self.grid: tuple[int, ...] = _blocks(look.sizes["n"], found.rows)
            self.block: tuple[int, ...] = (found.threads,)
        else:
            self.grid, self.block = GRIDS[step.grid](look), step.threads
            if step.grid == "one" and max(look.sizes.values()) > MANY:
                self.block = (1024,)
        self.function = function(step.source, name, look.double)
        if self.shared + STATIC_SHARED > DEFAULT_SHARED:  # as much as there is, for other looks share the function
            self.function.max_dynamic_shared_size_bytes = shared_memory() - STATIC_SHARED


# --- calls ---


class Launched:
    """One launch of a bound call: ``function(grid, block, args, shared_mem=shared)``."""

    __slots__ = ("args", "block", "function", "grid", "shared")

    def __init__(self, form: Form, args: list[Any]) -> None:
        self.function, self.grid, self.block = form.function, form.grid, form.block
        self.shared, self.args = form.shared, args

    def __call__(self) -> None:
        self.function(self.grid, self.block, tuple(self.args), shared_mem=self.shared)


class Number:
    """A scalar or counter of a bound call.

    `places` are (launch, argument) pairs: the address stands there, and the value behind it.
    """

    __slots__ = ("buffer", "kind", "name", "places")

    def __init__(self, argument: Argument, buffer: Any) -> None:
        self.name, self.buffer = argument.name, buffer
        self.kind = COUNT if argument.kind == "counter" else FLOAT
        self.places: list[tuple[Launched, int]] = []

    def value(self) -> Any:
        return self.kind(self.buffer)

    def read(self, where: str) -> Any:
        """The value that it has now.

        Raises
        ------
        ArgumentError : a temperature that is not a finite number above 0.
        """
        value = self.value()
        if self.name == "temperature" and not 0 < value < math.inf:
            raise bad_temperature(where, float(value))
        return value

    def write(self, where: str) -> None:
        """Give the launches the value that it has now."""
        value = self.read(where)
        for launched, at in self.places:
            launched.args[at + 1] = value

    def point(self, address: int) -> None:
        """Let the launches read it from the card's memory, or, with 0, take the value again."""
        for launched, at in self.places:
            launched.args[at] = ADDRESS(address)


class CudaCall:
    """A kernel bound to arrays; calling it launches its steps one after the other.

    `launches` are the steps for whoever captures them, `numbers` the scalars and counters that they read: `write` gives
    the launches their values, `point` an address instead. `kept` holds the arrays that the launches work on, `refuses`
    says whether they may note something that is refused.
    """

    __slots__ = ("kept", "launches", "name", "numbers", "refuses")

    def __init__(self, name: str, launches: list[Launched], numbers: list[Number], kept: Any, refuses: bool) -> None:
        self.name, self.kept, self.refuses = name, kept, refuses
        self.launches, self.numbers = tuple(launches), tuple(numbers)

    def __call__(self) -> None:
        """Launch.

        Raises
        ------
        ArgumentError : the temperature is not a finite number above 0; nothing is launched then.
        """
        for number in self.numbers:
            number.write(self.name)
        if self.refuses:
            REFUSALS.pending = True
        for launched in self.launches:
            launched()


class Slot(NamedTuple):
    """Where an argument of a step comes from: a `buffer` by its place, memory of the call's own, or a `value`."""

    value: Any = None
    buffer: int = -1
    number: bool = False  # two arguments: the buffer is a scalar or counter
    scratch: str = ""


class CudaLaunch:
    """A kernel for buffers of one look."""

    __slots__ = ("arguments", "forms", "look", "refuses", "scratch")

    def __init__(self, look: Look, arguments: Sequence[Argument]) -> None:
        self.look, self.arguments = look, arguments
        steps = [s for s in KERNELS[look.name] if {*s.only.split()} <= look.there and s.unless not in look.there]
        formed = [(Form(step, look), [self._slot(name) for name in step.args.split()]) for step in steps]
        self.forms = [(form, slots) for form, slots in formed if min(form.grid) > 0]
        self.refuses = any("refused" in form.step.args.split() for form, _ in self.forms)
        used = {slot.scratch for _, slots in self.forms for slot in slots if slot.scratch}
        self.scratch = {name: max(1, SCRATCH[name](look)) for name in sorted(used)}

    def _slot(self, name: str) -> Slot:
        look = self.look
        for k, argument in enumerate(self.arguments):
            if argument.name == name:
                return Slot(buffer=k, number=argument.kind in HOST) if name in look.there else Slot(NULL)
        if name in SCRATCH:
            needed = SCRATCH_FOR.get(name)
            return Slot(scratch=name) if needed is None or needed in look.there else Slot(NULL)
        if name in DERIVED:
            return Slot(DERIVED[name](look))
        return Slot(COUNT(look.sizes[name]) if name in look.sizes else look.attribute(name))

    def bind(self, *buffers: Any) -> CudaCall:
        empty = _cupy().empty
        scratch = {name: empty(size, np.uint8) for name, size in self.scratch.items()}
        numbers: dict[int, Number] = {}
        launches = []
        for form, slots in self.forms:
            args: list[Any] = []
            launched = Launched(form, args)
            for slot in slots:
                k = slot.buffer
                if slot.number:
                    number = numbers.setdefault(k, Number(self.arguments[k], buffers[k]))
                    number.places.append((launched, len(args)))
                    args += [NULL, number.value()]
                elif k >= 0:
                    args.append(_address(buffers[k]))
                else:
                    args.append(_address(scratch[slot.scratch]) if slot.scratch else slot.value)
            launches.append(launched)
        return CudaCall(self.look.op.name, launches, list(numbers.values()), (buffers, scratch), self.refuses)

    def run(self, *buffers: Any) -> None:
        self.bind(*buffers)()


def launcher(name: str) -> Callable[[Sequence[Any], dict[str, Any]], CudaLaunch]:
    """What makes the launches of a kernel: ``launcher(name)(buffers, attrs)`` with all attributes of the operation."""
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.buffers if name == op.name else op.vjp_buffers

    def launch(buffers: Sequence[Any], attrs: dict[str, Any]) -> CudaLaunch:
        return CudaLaunch(Look(name, op, arguments, buffers, attrs), arguments)

    return launch
