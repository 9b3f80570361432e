"""What a compiled step is made of: its kernels with their sizes, work and time, as a table or as a graph."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from minikd.kernels import join
from minikd.kernels.arrays import is_writable, synchronize
from minikd.kernels.recording import Buffer, Recorded, written
from minikd.ops import OPS
from minikd.plan import Plan

# A call is repeated for at least this long to measure it once, and measured so often.
SECONDS_A_MEASUREMENT, MEASUREMENTS = 0.0005, 5


class Row(NamedTuple):
    """One call: what it reads and writes, in words, and what it costs."""

    number: int
    name: str
    shape: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    bytes: int
    flops: int
    line: str


def rows(plan: Plan) -> list[Row]:
    """The calls of a plan, in order."""
    found = []
    writers = _Writers()
    for number, (call, arrays) in enumerate(zip(plan.calls, plan.arrays, strict=True)):
        op, outs = OPS[call.name.removesuffix("_vjp")], written(call)
        updates = call.name == op.name and bool(op.updates)  # such buffers are read too
        sources: list[str] = []
        for b in call.buffers:
            if b is not None and (updates or b not in outs):
                sources += _sources(plan, b, writers)
        for b in outs:
            writers.add(b, number)
        found.append(
            Row(
                number,
                call.name,
                _shape(outs[0].shape) if outs else "",
                tuple(dict.fromkeys(sources)),
                tuple(dict.fromkeys(filter(None, (plan.origins[b.storage] for b in outs)))),
                _bytes(call, arrays),
                flops(call),
                call.line,
            )
        )
    return found


class _Writers:
    """Which call wrote each stretch of memory last."""

    def __init__(self) -> None:
        self.stretches: list[tuple[int, int, int, int]] = []  # storage, begin, end, call

    def add(self, b: Buffer, number: int) -> None:
        begin, end = b.offset, b.offset + _size(b)
        covered = [s for s in self.stretches if s[0] == b.storage and begin <= s[1] and s[2] <= end]
        self.stretches = [s for s in self.stretches if s not in covered] + [(b.storage, begin, end, number)]

    def of(self, b: Buffer) -> list[int]:
        begin, end = b.offset, b.offset + _size(b)
        return sorted({s[3] for s in self.stretches if s[0] == b.storage and s[1] < end and begin < s[2]})


def _sources(plan: Plan, b: Buffer, writers: _Writers) -> list[str]:
    """Where a buffer's content is from: calls that wrote it, a number, or what the storage is."""
    if b.value is not None:
        return [f"{b.value:g}"]
    return [f"#{k}" for k in writers.of(b)] or [plan.origins[b.storage]]


def _size(b: Buffer) -> int:
    return math.prod(b.shape) * int(b.dtype.itemsize)


def _bytes(call: Recorded, arrays: Sequence[Any]) -> int:
    """The bytes of all buffers; of an array that rows are taken from, only what is taken."""
    name = call.name.removesuffix("_vjp")
    arguments = OPS[name].arguments(call.name != name, len(arrays))
    gathers = any(a.name == "rows" for a in arguments)
    there = [(a.name, a.role, array.nbytes) for a, array in zip(arguments, arrays, strict=True) if array is not None]
    taken = max((size for _, role, size in there if role == "out"), default=0)
    return sum(min(size, taken) if gathers and name == "x" else size for name, _, size in there)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "1"


def flops(call: Recorded) -> int:
    """Operations on numbers: two for each multiply-add of a matrix product, else one for each element written."""
    op = OPS[call.name.removesuffix("_vjp")]
    outs = written(call)
    if op.flops is None:
        return max((math.prod(b.shape) for b in outs), default=0)
    sizes = op.sizes(
        op.arguments(call.name != op.name, len(call.buffers)), [None if b is None else b.shape for b in call.buffers]
    )
    products = sum(len(b.shape) == 2 for b in outs) if call.name != op.name else 1
    return products * int(op.flops(*(sizes[letter] for letter in op.letters if letter in sizes)))


def measure(plan: Plan) -> list[float]:
    """Seconds that each call takes by itself, repeated; whatever it changes outside the plan is put back."""
    kept = [
        array
        for call, arrays in zip(plan.calls, plan.arrays, strict=True)
        for b, array in zip(call.buffers, arrays, strict=True)
        if b is not None and b.value is None and plan.origins[b.storage] in ("parameters", "gradients", "state")
    ]
    saved = [array.copy() for array in kept]
    try:
        return [_seconds(call) for call in plan.bound]
    finally:
        for array, values in zip(kept, saved, strict=True):
            if is_writable(array):
                array[...] = values


def _seconds(call: Any) -> float:
    """Seconds that a call takes: the least of several measurements, since nothing but others' work makes it longer."""
    parts = join([call])
    repeats = 1
    while (seconds := _time(parts, repeats)) < SECONDS_A_MEASUREMENT:
        repeats *= 4
    return min(seconds, *(_time(parts, repeats) for _ in range(MEASUREMENTS - 1))) / repeats


def _time(parts: Sequence[Any], repeats: int) -> float:
    synchronize()
    started = time.perf_counter()
    if len(parts) == 1 and hasattr(parts[0], "repeat"):
        parts[0].repeat([], [], repeats)  # without a look at Python in between
    else:
        for _ in range(repeats):
            for part in parts:
                part()
    synchronize()
    return time.perf_counter() - started


def _quantity(value: float, unit: str) -> str:
    """A number with three digits and the prefix that fits: 12.3 kB."""
    prefixes = ["", "k", "M", "G"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    digits = 0 if not prefixes[0] else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {prefixes[0]}{unit}"


def explain(plan: Plan, timed: bool = True) -> str:
    """The calls of a plan in a table, below the lines of the step that they come from.

    Parameters
    ----------
    timed : measure each call, which takes some milliseconds each; parameters and state are put back afterwards.

    Bytes are those of all buffers of a call, FLOPs two for each multiply-add of a matrix product and else one for each
    element written; the share is of the sum of all calls, each measured by itself.
    """
    table = rows(plan)
    seconds = measure(plan) if timed else []
    graphs = sum(hasattr(part, "graph") for part in plan.parts)
    native = "one call of C" if plan.one_call else f"{len(plan.parts)} calls from Python"
    native += f" ({graphs} of them CUDA graphs)" if graphs else ""
    memory = plan.memory
    text = [
        f"{len(table)} kernels in {native}: {_quantity(sum(r.flops for r in table), 'FLOP')}, "
        f"{_quantity(sum(r.bytes for r in table), 'B')} read or written; values on the way take "
        f"{_quantity(memory.bytes, 'B')} ({_quantity(memory.without_reuse, 'B')} if nothing were reused)"
    ]
    head = ["#", "kernel", "result", "reads", "changes", "bytes", "FLOPs", *(["time", "share"] if timed else [])]
    lines = [list(_cells(r, seconds, timed)) for r in table]
    widths = [max(len(row[k]) for row in [head, *lines]) for k in range(len(head))]
    text += ["", _line(head, widths)]
    source = None
    for row, cells in zip(table, lines, strict=True):
        if row.line != source:
            source = row.line
            text.append(source)
        text.append(_line(cells, widths))
    return "\n".join(text)


def _cells(row: Row, seconds: list[float], timed: bool) -> Iterator[str]:
    yield f"#{row.number}"
    yield row.name
    yield row.shape
    yield ", ".join(row.reads)
    yield ", ".join(row.writes)
    yield _quantity(row.bytes, "B")
    yield _quantity(row.flops, "")
    if timed:
        yield f"{seconds[row.number] * 1e6:.2f} µs"
        yield f"{100 * seconds[row.number] / sum(seconds):.0f} %"


def _line(cells: list[str], widths: list[int]) -> str:
    left = 5  # the words stand to the left, the numbers to the right
    parts = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return ("  " + "  ".join(parts)).rstrip()


def dot(plan: Plan) -> str:
    """The plan as a graph in the language of Graphviz: ``dot -Tsvg`` draws it.

    Boxes are memory from outside the step, ellipses kernels, with the shape of what each puts out.
    """
    lines = ["digraph step {", "  rankdir=TB;", '  node [fontname="sans-serif"];']
    outside: dict[str, None] = {}
    edges = []
    for row in rows(plan):
        lines.append(f'  c{row.number} [label="{row.name}\\n{row.shape}"];')
        for source in row.reads:
            if source.startswith("#"):
                edges.append(f"  c{source[1:]} -> c{row.number};")
            else:
                outside[source] = None
                edges.append(f'  "{source}" -> c{row.number};')
        for target in row.writes:
            outside[target] = None
            edges.append(f'  c{row.number} -> "{target}" [style=dashed];')
    lines += [f'  "{name}" [shape=box];' for name in outside]
    return "\n".join([*lines, *edges, "}"]) + "\n"
