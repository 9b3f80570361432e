"""Plans: a recorded step with memory of its own, run again and again without asking Python what comes next.

A `Plan` binds the kernels that a `Recorder` wrote down to buffers of its own. Buffers whose last reader is done give
their place to later ones, so a plan needs little more memory than the step at its widest. What can be run by one call
of C is put together (`minikd.kernels.join`); arguments are copied into the plan's own arrays before each run, results
are read from them afterwards, so that no plan ever looks at memory that somebody else may have freed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minikd.kernels import Call, bind, join
from minikd.kernels.arrays import address, here, module_of, on_device
from minikd.kernels.calls import OnHost
from minikd.kernels.recording import ARGUMENT, CONSTANT, MADE, Buffer, Recorded, Recorder, Storage, written
from minikd.ops import OPS

ALIGNMENT = 64  # bytes: a line of the cache, and the widest vector


class Span(NamedTuple):
    """From the call that first writes a piece of memory to the last that looks at it."""

    first: int
    last: int

    def meets(self, other: Span) -> bool:
        return self.first <= other.last and other.first <= self.last


def place_all(sizes: Sequence[int], spans: Sequence[Span]) -> tuple[list[int], int]:
    """Offsets at which pieces of these sizes never meet while they are used, and the size of the whole.

    The largest come first, each at the lowest place that is free during its span.

    Source: Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference", algorithm 3.
    """
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], spans[k])):
        at = 0
        for other in sorted((p for p in placed if spans[p].meets(spans[k])), key=lambda p: offsets[p]):
            if offsets[other] - at >= sizes[k]:
                break
            at = max(at, offsets[other] + sizes[other])
        offsets[k] = at
        placed.append(k)
    return offsets, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def room_of(size: int) -> int:
    """What `size` bytes take up: whole lines, of which the last byte stays free, so that no piece touches the next.

    NumPy 1 takes neighbours that touch for overlapping ones, and then computes powers, exponentials and logarithms by
    other means, with other last bits than in arrays that lie apart.
    """
    return (size // ALIGNMENT + 1) * ALIGNMENT


def block_of(size: int, xp: Any = np) -> Any:
    """So many bytes of this array module that begin at a line of the cache."""
    block = xp.empty(size + ALIGNMENT, np.uint8)
    start = -address(block) % ALIGNMENT
    return block[start : start + size]


def array_in(block: Any, start: int, b: Buffer) -> Any:
    """The buffer as an array that begins so many bytes into a block."""
    if not on_device(block):
        return np.ndarray(b.shape, b.dtype, block, start, b.strides)
    xp = module_of(block)
    return xp.ndarray(b.shape, b.dtype, block.data + start, b.strides)


def spans_of(calls: Sequence[Recorded], made: Sequence[int], until_the_end: Sequence[int]) -> dict[int, Span]:
    """When each of the storages `made` is in use."""
    spans: dict[int, Span] = {}
    for k, call in enumerate(calls):
        for b in call.buffers:
            if b is not None and b.storage >= 0:
                spans[b.storage] = Span(spans[b.storage].first if b.storage in spans else k, k)
    wanted = set(made)
    found = {s: span for s, span in spans.items() if s in wanted}
    return found | {s: Span(found[s].first, len(calls)) for s in until_the_end if s in found}


def share_in_place(calls: Sequence[Recorded], spans: dict[int, Span], sizes: dict[int, int]) -> dict[int, int]:
    """Outputs that take over the memory of an input that nobody looks at afterwards: output → the first owner."""
    root: dict[int, int] = {}
    for k, call in enumerate(calls):
        op = OPS.get(call.name)
        if op is None or not op.may_alias or call.buffers[0] is None:
            continue
        whole, out = call.buffers[0], call.buffers[0].storage
        inputs = list(zip(op.inputs, call.buffers[len(call.buffers) - len(op.inputs) :], strict=True))
        for argument, b in inputs:
            if b is None or argument.name not in op.may_alias or out not in spans:
                continue
            owner = root.get(b.storage, b.storage)
            if owner not in spans or (b.offset, _bytes(b)) != (whole.offset, _bytes(whole)):
                continue
            # nothing else in this call may look at that memory, unless it is read element by element too
            others = [(a, c) for a, c in zip(op.buffers, call.buffers, strict=True) if c is not None and c is not b]
            of_owner = [(a, c) for a, c in others if root.get(c.storage, c.storage) == owner]
            if not all(c == b and a.name in op.may_alias for a, c in of_owner):
                continue
            dies = spans[owner].last == k and spans[out].first == k and sizes[owner] == sizes[out]
            if dies and owner != out:
                root[out] = owner
                spans[owner] = Span(spans[owner].first, spans.pop(out).last)
                break
    return root


def lay_out(
    storages: Sequence[Storage], spans: dict[int, Span], sizes: dict[int, int]
) -> tuple[dict[int, tuple[Any, int]], int]:
    """Where each storage is: in which block and how many bytes into it; and the size of all blocks.

    There is one block on the host and one on the device, for what the step makes there.
    """
    place: dict[int, tuple[Any, int]] = {}
    total = 0
    by_module: dict[Any, list[int]] = {}
    for k in spans:
        by_module.setdefault(module_of(storages[k].owner), []).append(k)
    for xp, there in by_module.items():
        offsets, size = place_all([sizes[k] for k in there], [spans[k] for k in there])
        block = block_of(size, xp)
        place |= {k: (block, offset) for k, offset in zip(there, offsets, strict=True)}
        total += size
    return place, total


def _bound(call: Recorded, arrays: Sequence[Any]) -> Call:
    """The call on these arrays; marked where the backend computes on a device, and the call on numbers of the host."""
    bound = bind(call.name, *arrays, **call.attrs)
    return OnHost(bound) if here.on_device and not any(map(on_device, arrays)) else bound


def _bytes(b: Buffer) -> int:
    return math.prod(b.shape) * int(b.dtype.itemsize)


def _origins(recorder: Recorder, calls: Sequence[Recorded], parameters: set[int]) -> list[str]:
    """In words, where each storage is from; an empty text for memory that the step makes."""
    changed = {b.storage for call in calls for b in written(call)}
    gradients = {b.storage for call in calls if call.name.endswith("_vjp") for b in written(call)}
    arguments = [k for k, s in enumerate(recorder.storages) if s.kind == ARGUMENT]

    def origin(k: int, kind: str) -> str:
        if kind in (MADE, CONSTANT):
            return "" if kind == MADE else "constant"
        if kind == ARGUMENT:
            return f"argument {arguments.index(k)}"
        return (
            "parameters" if k in parameters else "gradients" if k in gradients else "state" if k in changed else "data"
        )

    return [origin(k, s.kind) for k, s in enumerate(recorder.storages)]


def _from_entry(stack: Any, array: Any) -> Callable[[int], Any]:
    """What copies one of the stack's entries, by its number, to an array of the same dtype."""
    if _in_one_piece(stack, array):
        return partial(_queue_copy, address(array), 0, address(stack), array.nbytes, array.nbytes)
    return lambda k: array.__setitem__(..., stack[k])


def _to_entry(stack: Any, array: Any) -> Callable[[int], Any]:
    """What copies the array to one of the stack's entries, by its number."""
    if _in_one_piece(stack, array):
        return partial(_queue_copy, address(stack), array.nbytes, address(array), 0, array.nbytes)
    return lambda k: stack.__setitem__(k, array)


def _in_one_piece(*arrays: Any) -> bool:
    """Whether these lie on the device and each in one piece, so that their bytes can be copied there."""
    return all(on_device(array) and array.flags.c_contiguous for array in arrays)


def _queue_copy(to: int, to_step: int, from_: int, from_step: int, size: int, k: int) -> None:
    """Let the device copy so many bytes on the current stream; the k-th of them where addresses have a step."""
    cuda = here.xp.cuda
    how = cuda.runtime.memcpyDeviceToDevice
    cuda.runtime.memcpyAsync(to + k * to_step, from_ + k * from_step, size, how, cuda.get_current_stream().ptr)


class Memory(NamedTuple):
    """What a plan takes for what is computed on the way, in bytes: with places reused, and if each had its own."""

    bytes: int
    without_reuse: int


class Plan:
    """A recorded step, bound to memory of its own.

    Parameters
    ----------
    recorder : what the step did.
    results : arrays of the step that are wanted after a run.
    lasting : others that are looked at after a run, and not copied; gradients of leaves for example.

    Attributes
    ----------
    arguments : the arrays into which a run's arguments are copied.
    results, lasting : where those are after a run.
    calls : what is run, in order, for those who want to look (`minikd.explain`); `arrays` are the buffers of each,
        `bound` runs each, `origins` says where each storage is from.
    parts : the same in as few calls as possible.  start : runs once, and returns what `refuse` turns into an error if
        it is not 0.
    memory : see `Memory`.
    rounds_done : how many runs the last `repeat` completed.
    """

    def __init__(self, recorder: Recorder, results: Sequence[Any], lasting: Sequence[Any] = ()) -> None:
        self.calls, storages = list(recorder.calls), recorder.storages
        wanted = [recorder.place(array) for array in (*results, *lasting)]
        made = [k for k, s in enumerate(storages) if s.kind == MADE]
        sizes = {k: room_of(storages[k].owner.nbytes) for k in made}
        spans = spans_of(self.calls, made, [b.storage for b in wanted])
        separate = sum(sizes[k] for k in spans)
        root = share_in_place(self.calls, spans, sizes)
        place, total = lay_out(storages, spans, sizes)
        self.memory = Memory(total, separate)

        def array_at(b: Buffer | None) -> Any:
            if b is None:
                return None
            if b.value is not None:
                return np.array(b.value)
            if storages[b.storage].kind != MADE:
                return recorder.arrays[b]
            block, start = place[root.get(b.storage, b.storage)]
            return array_in(block, start + b.offset, b)

        self.arguments = [s.owner for s in storages if s.kind == ARGUMENT]
        found = [array_at(b) for b in wanted]
        self.results, self.lasting = found[: len(results)], found[len(results) :]
        self.arrays = [tuple(array_at(b) for b in call.buffers) for call in self.calls]
        self.bound = [_bound(call, arrays) for call, arrays in zip(self.calls, self.arrays, strict=True)]
        self.parts: list[Call] = join(self.bound)
        parameters = {recorder.place(tensor.array).storage for tensor in recorder.changed}
        changes = (k for k, c in enumerate(self.calls) if any(b.storage in parameters for b in written(c)))
        self._first_change = next(changes, len(self.calls))
        single = self.parts[0] if len(self.parts) == 1 else None
        self.start: Callable[[], int] = getattr(single, "start", self._run_parts)
        self.rounds_done = 0
        self.origins = _origins(recorder, self.calls, parameters)

    @property
    def one_call(self) -> bool:
        """Whether runs can be repeated by a single call of C."""
        whole = all(r.flags.c_contiguous for r in self.results)
        return len(self.parts) == 1 and hasattr(self.parts[0], "repeat") and whole

    def run(self) -> None:
        """Run once on what the arguments hold.

        Raises
        ------
        MinikdError : a kernel refuses what it was given, a label out of range for example; a note says whether
            parameters had changed by then.
        """
        status = self.start()
        if status:
            self.refuse(status)

    def refuse(self, status: int) -> None:
        """Raise what it means that `start` returned this."""
        only: Any = self.parts[0]
        try:
            only.refuse(status)
        except Exception as error:
            error.add_note(self._state_after(only.calls_done))
            raise

    def _run_parts(self) -> int:
        part: Any = None
        try:
            for part in self.parts:
                part()
        except Exception as error:
            error.add_note(self._state_after(self._stopped_in(part)))
            raise
        return 0

    def repeat(self, arguments: Sequence[Any], results: Sequence[Any], rounds: int) -> None:
        """Run `rounds` times: in round r on ``argument[r]`` of each, writing each result to ``result[r]``.

        Parameters
        ----------
        arguments, results : arrays of the shapes and dtypes of the plan's own, with one more axis in front.

        Raises
        ------
        MinikdError : as `run`; `rounds_done` says in which round.
        """
        if self.one_call:
            only: Any = self.parts[0]
            pairs = [*zip(self.arguments, arguments, strict=True)], [*zip(results, self.results, strict=True)]
            try:
                only.repeat(*pairs, rounds)
            except Exception as error:
                error.add_note(self._state_after(self._stopped_in(only)))
                raise
            finally:
                self.rounds_done = only.rounds_done
            return
        before = [_from_entry(argument, place) for place, argument in zip(self.arguments, arguments, strict=True)]
        after = [_to_entry(result, place) for place, result in zip(self.results, results, strict=True)]
        for self.rounds_done in range(rounds):
            for copy in before:
                copy(self.rounds_done)
            self.run()
            for copy in after:
                copy(self.rounds_done)
        self.rounds_done = rounds

    def explain(self, timed: bool = True) -> str:
        """See `minikd.explain.explain`."""
        return str(importlib.import_module("minikd.explain").explain(self, timed))

    def dot(self) -> str:
        """See `minikd.explain.dot`."""
        return str(importlib.import_module("minikd.explain").dot(self))

    def _stopped_in(self, part: Any) -> int:
        """The number of calls that the run under way has completed, when this part refused to go on."""
        before = self.parts[: next(k for k, p in enumerate(self.parts) if p is part)]
        return sum(len(getattr(p, "calls", "1")) for p in before) + getattr(part, "calls_done", 0)

    def _state_after(self, done: int) -> str:
        if done <= self._first_change:
            return "The parameters are as they were before this step."
        return "The parameters may have been changed by this step in part."
