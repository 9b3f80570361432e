"""What a contract is: a kernel's arguments, the cases that are decided, and usual mistakes, as data.

A contract adds to the table of operations only what a test of somebody else's kernel needs: which inputs the function
takes and gives, the edge cases of the formulas as named inputs, how large a rounding error may be, and what the usual
mistakes would give, so that a report can name them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import strategies as st

from minikd.ops import OPS
from minikd.testing.references import reference

Inputs = dict[str, Any]
Attributes = dict[str, Any]
Draw = Callable[[str, Any], st.SearchStrategy[Inputs]]


class Edge(NamedTuple):
    """A decided case: what it is, and its inputs in float64."""

    name: str
    inputs: Inputs


class Mistake(NamedTuple):
    """What a usual mistake is, in words, and what it would give for these inputs and attributes."""

    name: str
    give: Callable[[Inputs, Attributes], Any]


@dataclass(frozen=True)
class Contract:
    """What a kernel takes, gives and promises.

    Attributes
    ----------
    kernel : an operation's name, or that name with "_vjp".
    takes, gives : names of the arguments and of the results, in order; a function may give only the first.
    kinds : the regions of inputs that are searched; `draw(kind, dtype)` is the strategy of one.
    edges : decided cases.
    scale : ``scale(inputs, attrs)``, for each result how large the numbers are whose rounding it inherits, beside its
        own size.
    mistakes : usual ones.
    never_negative : whether the first result is never below 0.
    refuses : arguments that must be refused with a ValueError, with what is wrong about them.
    state : arguments that are updated, in the order in which they are given back.
    """

    kernel: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    kinds: tuple[str, ...]
    draw: Draw
    edges: tuple[Edge, ...] = ()
    scale: Callable[[Inputs, Attributes], Sequence[Any]] = lambda inputs, attrs: ()
    mistakes: tuple[Mistake, ...] = ()
    never_negative: bool = False
    refuses: tuple[tuple[str, Inputs], ...] = ()
    state: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        return f"{self.kernel}({', '.join(self.takes)}) -> {', '.join(self.gives)}"

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """The letters of each argument's sizes, as the operation declares them."""
        op = OPS[self.kernel.removesuffix("_vjp")]
        upstream = {"d" + a.name: a.dims for a in op.outs}
        return {**upstream, **{a.name: a.dims for a in (*op.inputs, *op.updates)}}

    def expected(self, inputs: Inputs, attrs: Attributes, precision: str | int = "float64") -> list[Any]:
        """What the reference gives, one result for each of `gives`."""
        return expected(self.kernel, inputs, attrs, precision)[: len(self.gives)]


def expected(kernel: str, inputs: Inputs, attrs: Attributes, precision: str | int = "float64") -> list[Any]:
    """What the reference of a kernel gives for inputs by name; those that are not there are None."""
    found = reference(kernel, precision)(*map(inputs.get, _order(kernel)), **attrs)
    return list(found) if isinstance(found, tuple) else [found]


def _order(kernel: str) -> list[str]:
    """The names of the reference's inputs."""
    op = OPS[kernel.removesuffix("_vjp")]
    names = [a.name for a in op.inputs]
    if kernel != op.name:
        return [*("d" + a.name for a in op.outs), *names]
    return [*names, *(a.name for a in op.updates)]
