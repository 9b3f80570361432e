"""The tape: operations in the order in which they ran, and the walk backwards over them.

A list in execution order is already a valid order for backward when it is reversed: nothing is sorted and nothing
recurses. The tape itself holds its nodes weakly; a node lives as long as a tensor that came out of it, so a graph that
nobody keeps disappears even if backward is never called.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any

from minikd.errors import DTypeError, ShapeError, TapeError
from minikd.kernels import as_real, execute, run
from minikd.kernels.arrays import here
from minikd.kernels.recording import Recorder, note_constant, note_made, recorder, traced
from minikd.ops import OPS, Op

if TYPE_CHECKING:
    from minikd.tensor import Tensor

# Dead nodes are swept when the tape has grown to this many entries, then whenever it has doubled since.
SWEEP_AT = 1024


class Recordable:
    """What `record` takes for a tensor: the base of `Tensor`, so that the tape need not import it."""

    __slots__ = ()


class Node:
    """One operation that ran: what it read and wrote, as far as its vjp wants them back, and all that it saved."""

    __slots__ = ("__weakref__", "attrs", "inputs", "op", "out", "parents", "saved", "versions")

    def __init__(
        self,
        op: Op,
        parents: Sequence[Tensor | None],
        arrays: Sequence[Any],
        outs: Sequence[Any],
        saved: Sequence[Any],
        attrs: dict[str, Any],
    ) -> None:
        reads = op.reads_inputs * len(arrays) if op.variadic else op.reads_inputs
        self.op, self.attrs = op, attrs
        self.parents: Sequence[Tensor | None] | None = parents
        self.inputs = [x if read else None for read, x in zip(reads, arrays, strict=True)]
        self.saved: Sequence[Any] = saved
        self.out = outs[0] if op.reads_outs[0] else None
        self.versions = [0 if p is None else p.version for p in parents]

    def backward(self, dout: Any) -> Iterator[tuple[Tensor, Any]]:
        """The gradients of the inputs that need one; a leaf's first gradient is written straight into its place."""
        wanted = self.differentiated()
        dins: list[Any] = []
        for t in wanted:
            dins.append(None if t is None else _gradient_buffer(t, dins))
        run(self.op.name + "_vjp", *dins, dout, self.out, *self.saved, *self.inputs, **self.attrs)
        return ((t, d) for t, d in zip(wanted, dins, strict=True) if t is not None)

    def differentiated(self) -> list[Tensor | None]:
        """The parents that take a gradient, in the order of the operation's `wrt`; None where nobody needs it."""
        assert self.parents is not None
        parents = [self.parents[k] for k in self.op.differentiated(len(self.parents))]
        return [p if p is not None and p.requires_grad else None for p in parents]

    def check_versions(self) -> None:
        """Refuse an input that vjp reads and that was changed in place since the forward pass."""
        assert self.parents is not None
        for parent, array, version in zip(self.parents, self.inputs, self.versions, strict=True):
            if parent is not None and array is not None and parent.version != version:
                raise TapeError(
                    "backward",
                    f"an input of {self.op.name}",
                    expected="unchanged since the forward pass",
                    got=f"a tensor of shape {parent.shape} that was changed in place since",
                    fix="Call backward before the optimizer's step or before writing into the tensor.",
                )

    def release(self) -> None:
        """Give back every buffer: this node's gradient has been taken."""
        self.parents = None
        self.inputs, self.saved, self.out = [], [], None


def _gradient_buffer(tensor: Tensor, others: Sequence[Any]) -> Any:
    """A leaf's own place for its first gradient; a fresh buffer where it has none or another gradient is there."""
    place = tensor.gradient_place()
    if place is None or any(place is other for other in others):
        return note_made(here.empty(tensor.array.shape, tensor.array.dtype))
    return place


class _Tape(threading.local):
    """Each thread records on a tape of its own."""

    def __init__(self) -> None:
        self.nodes: list[weakref.ref[Node]] = []
        self.recording = True
        self.sweep_at = SWEEP_AT

    def append(self, node: Node) -> None:
        if len(self.nodes) >= self.sweep_at:
            self.nodes = [ref for ref in self.nodes if ref() is not None]
            self.sweep_at = max(SWEEP_AT, 2 * len(self.nodes))
        self.nodes.append(weakref.ref(node))

    def forget_released(self) -> None:
        """Drop the nodes whose gradients were taken."""
        alive = ((ref, ref()) for ref in self.nodes)
        self.nodes = [ref for ref, node in alive if node is not None and node.parents is not None]


_tape = _Tape()


def is_recording() -> bool:
    """Whether operations are being recorded for backward in this thread."""
    return _tape.recording


class no_grad(ContextDecorator):
    """``with no_grad():`` nothing is recorded: results need no gradient and no memory is kept for backward.

    Also a decorator of functions: ``@no_grad()``.
    """

    def __init__(self) -> None:
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(_tape.recording)
        _tape.recording = False

    def __exit__(self, *exception: Any) -> None:
        _tape.recording = self.before.pop()


def record(name: str, inputs: Sequence[Any], make: Any, **attrs: Any) -> Tensor:
    """Run an operation on tensors and arrays, note it on the tape if a gradient can be asked for, return its output.

    Parameters
    ----------
    name : an operation of the table with one output.
    inputs : tensors, arrays or None, in the order of the signature.
    make : ``make(array, requires_grad, node)``, which builds the output tensor.
    attrs : the operation's attributes.
    """
    op = OPS[name]
    parents: list[Any] = [x if isinstance(x, Recordable) else None for x in inputs]
    real: Any = None
    for k in op.differentiated(len(inputs)):
        p = parents[k]
        if p is not None and p.requires_grad:
            if real is None:
                real = p.array.dtype
            elif p.array.dtype != real:
                fix = "Create all tensors that take a gradient with one dtype."
                raise DTypeError(name, "the inputs", expected=f"of one dtype ({real})", got=str(p.dtype), fix=fix)
    tracked = _tape.recording and real is not None
    values = [x if p is None else p.array for x, p in zip(inputs, parents, strict=True)]
    writing = recorder()
    if writing is not None:
        _guard_leaves(writing, parents)
    outs, saved, arrays = execute(op, values, attrs, save=tracked, real=real)
    node = None
    if tracked:
        node = Node(op, parents, arrays, outs, saved, attrs)
        _tape.append(node)
    return make(outs[0] if writing is None else traced(outs[0]), tracked, node)


def _guard_leaves(writing: Recorder, parents: Sequence[Tensor | None]) -> None:
    """A plan holds for the tensors that it was recorded with, where they are and as far as they take gradients."""
    for parent in parents:
        if parent is not None and parent.node is None and not writing.knows(parent.array):
            writing.guard(parent, "array")
            writing.guard(parent, "requires_grad")


def backward(root: Node, dout: Any, retain_graph: bool) -> None:
    """Walk the tape backwards from `root`, writing each leaf's first gradient and adding the later ones."""
    nodes = _reachable(root)
    pending: dict[int, Any] = {id(root): dout}
    for node in nodes:
        for tensor, gradient in node.backward(pending.pop(id(node))):
            if tensor.node is None:
                tensor.take_gradient(gradient)
            elif id(tensor.node) in pending:
                run("add_into", pending[id(tensor.node)], gradient)
            else:
                pending[id(tensor.node)] = gradient
    if not retain_graph:
        for node in nodes:
            node.release()
        _tape.forget_released()


def _reachable(root: Node) -> list[Node]:
    """The nodes that `root` was computed from, last first.

    What cannot be done is refused here, before any gradient changes.
    """
    wanted = {id(root): root}
    found: list[Node] = []
    for ref in reversed(_tape.nodes):
        if not wanted:
            break
        node = ref()
        if node is None or wanted.pop(id(node), None) is None:
            continue
        node.check_versions()
        found.append(node)
        for parent in node.differentiated():
            if parent is not None and parent.node is not None:
                wanted[id(parent.node)] = parent.node
    if any(node.parents is None for node in wanted.values()):
        raise TapeError(
            "backward",
            "the loss",
            expected="one whose graph still exists",
            got="a graph that backward already used, wholly or in part",
            fix="Run the forward pass again, or keep the graph with backward(retain_graph=True).",
        )
    if wanted:
        raise TapeError(
            "backward",
            "the loss",
            expected="one that this thread computed",
            got="a graph that is not on this tape",
            fix="Call backward in the thread that ran the forward pass.",
        )
    return found


def seed_gradient(shape: tuple[int, ...], dtype: Any, gradient: Any) -> Any:
    """The upstream gradient that backward starts from: 1 for a scalar, else what the caller gives."""
    if gradient is None:
        if shape != ():
            fix = "Reduce it first (.sum() or .mean()), or pass gradient=…"
            raise ShapeError("backward", "the tensor", expected="a scalar", got=f"shape {shape}", fix=fix)
        return note_constant(here.xp.ones((), dtype))
    given: Any = getattr(gradient, "array", gradient)  # of a tensor
    found = here.put(as_real("backward", "gradient", given, dtype)).astype(dtype, order="C", copy=True)
    if found.shape != shape:
        raise ShapeError("backward", "gradient", expected=f"of shape {shape}", got=f"shape {found.shape}")
    return found
