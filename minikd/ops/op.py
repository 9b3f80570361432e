"""What an operation is: everything that is known about one, in one place.

An `Op` carries its formula, its signature, its reference forward and vjp, and sample inputs. Backends, the tape,
the tests and the docs all walk the same table, so adding an operation is one block in this package.

Signatures are written as text and read once::

    "x(n, k), w(m, k), b?(m) -> y(n, m)"
    "logits(n, c), target:index(n), weight?(c) -> loss(*); gradient?(n, c)"
    "g(k), lr:scalar -> w!(k), v!?(k)"

Inputs stand before the arrow, outputs behind it, values saved for backward behind the semicolon.
``?`` marks a buffer that may be None, ``!`` one that is read and written (optimizer state), ``*`` in front of a name
any number of inputs. The kind behind the colon is `real` where none is given: the operation's float32 or float64;
`index` is int64, `byte` uint8, `scalar` a 0-d float64 and `counter` a 0-d int64. Dimensions with the same letter are
equal; ``(...)`` is any shape, the same wherever it stands; ``(*)`` is worked out by the operation's `shape` function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ShapeError

Shape = tuple[int, ...]
Example = tuple[list[Any], dict[str, Any]]

# The dtype of each kind of buffer; a real buffer has the dtype of the whole operation.
KINDS: dict[str, np.dtype[Any] | None] = {
    "real": None,
    "index": np.dtype(np.int64),
    "byte": np.dtype(np.uint8),
    "scalar": np.dtype(np.float64),
    "counter": np.dtype(np.int64),
}


class Argument(NamedTuple):
    """One buffer of an operation, as its signature declares it.

    `role` is input, out, update or saved; in a vjp also din and dout, the gradients of an input and of an output.
    """

    name: str
    role: str
    kind: str
    dims: tuple[str, ...]
    optional: bool
    variadic: bool


_ARGUMENT = re.compile(r"(\*?)(\w+)(!?)(\??)(?::(\w+))?(?:\(([^)]*)\))?")


def _parse(text: str, role: str) -> tuple[Argument, ...]:
    found = []
    for star, name, bang, optional, kind, dims in _ARGUMENT.findall(text):
        letters = tuple(part.strip() for part in dims.split(",") if part.strip())
        actual = "update" if bang else role
        found.append(Argument(name, actual, kind or "real", letters, bool(optional), bool(star)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: its mathematics, its buffers and its sample inputs.

    Parameters
    ----------
    name : what users, kernels in every language and error messages call it.
    formula : the forward line and the gradient line, as a person would write them on paper.
    signature : the buffers, in the order in which every backend takes them (see the module's docstring).
    forward : ``forward(xp, *outs, *saved, *inputs, **attrs)``; writes into outs and saved, returns nothing.
        `xp` is the array module, NumPy or CuPy.
    vjp : ``vjp(xp, *dins, *douts, *outs, *saved, *inputs, **attrs)``; a gradient that nobody needs is None.
        None for operations that are not differentiable on purpose.
    wrt : the inputs that take a gradient, in the order of `dins`.
    vjp_reads : the outs, saved values and inputs that vjp looks at; all others come as None.
    may_alias : the inputs whose memory the first output may reuse, because forward reads an element before it
        writes it and backward does not want it back.
    attrs : attributes with their defaults; they fix what the kernel does and never change between two calls of it.
    shape : ``shape(input_shapes, attrs) -> out shapes`` where letters cannot say it.
    example : ``example(rng, dtype) -> [(inputs, attrs), …]``, legal inputs, the awkward ones among them.
    flops : ``flops(*sizes)``, the operations of forward on numbers where they are not one for each element that is
        written; vjp takes as many for each gradient of a matrix.
    surrogate : the function of forward's arguments whose derivative vjp is, where forward itself has none that is of
        use because it rounds.
    analytic : forward also accepts complex arrays, so that a complex step gives its derivative to full precision.
    source : where the formula is from.
    """

    name: str
    formula: str
    signature: str
    forward: Callable[..., None]
    example: Callable[[np.random.Generator, Any], list[Example]]
    vjp: Callable[..., None] | None = None
    wrt: tuple[str, ...] = ()
    vjp_reads: tuple[str, ...] = ()
    may_alias: tuple[str, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    shape: Callable[[Sequence[Shape | None], dict[str, Any]], Iterable[Shape]] | None = None
    flops: Callable[..., int] | None = None
    surrogate: Callable[..., None] | None = None
    analytic: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        left, right = self.signature.split("->")
        outs, _, saved = right.partition(";")
        written = _parse(outs, "out")
        parsed: dict[str, Any] = {
            "inputs": _parse(left, "input"),
            "outs": tuple(a for a in written if a.role == "out"),
            "updates": tuple(a for a in written if a.role == "update"),
            "saved": _parse(saved, "saved"),
        }
        every = (*written, *parsed["saved"], *parsed["inputs"])
        letters = [d for a in (*parsed["inputs"], *written) for d in a.dims if d != "*"]
        parsed["buffers"] = every
        parsed["variadic"] = any(a.variadic for a in every)
        parsed["letters"] = tuple(dict.fromkeys(letters))
        parsed["wrt_places"] = tuple(k for k, a in enumerate(parsed["inputs"]) if a.name in self.wrt)
        for role in ("inputs", "outs"):
            parsed["reads_" + role] = tuple(a.name in self.vjp_reads for a in parsed[role])
        for name, value in parsed.items():
            object.__setattr__(self, name, value)
        unread = [a if a.name in self.vjp_reads else a._replace(optional=True) for a in every]
        object.__setattr__(self, "vjp_buffers", (*self._gradient_arguments(), *unread))

    inputs: tuple[Argument, ...] = field(init=False)
    outs: tuple[Argument, ...] = field(init=False)
    updates: tuple[Argument, ...] = field(init=False)
    saved: tuple[Argument, ...] = field(init=False)
    buffers: tuple[Argument, ...] = field(init=False)  # outs or updates, saved, inputs: of every forward kernel
    vjp_buffers: tuple[Argument, ...] = field(init=False)  # dins, douts, outs, saved, inputs: of every vjp kernel
    letters: tuple[str, ...] = field(init=False)  # the sizes a kernel is given, in order of first appearance
    variadic: bool = field(init=False)
    wrt_places: tuple[int, ...] = field(init=False)  # where the inputs of `wrt` stand among the declared inputs
    reads_inputs: tuple[bool, ...] = field(init=False)  # which of the declared inputs vjp looks at
    reads_outs: tuple[bool, ...] = field(init=False)

    def differentiated(self, count: int) -> Sequence[int]:
        """The places of the inputs that take a gradient, where `count` inputs are given."""
        return range(count) if self.variadic and self.wrt else self.wrt_places

    def _gradient_arguments(self) -> tuple[Argument, ...]:
        if self.vjp is None:
            return ()
        by_name = {a.name: a for a in self.inputs}
        dins = tuple(by_name[name]._replace(name="d" + name, role="din", optional=True) for name in self.wrt)
        return dins + tuple(a._replace(name="d" + a.name, role="dout") for a in self.outs)

    @property
    def needs_classes(self) -> bool:
        """Whether the operation works on rows of classes, which must not be empty."""
        return "c" in self.letters

    def arguments(self, backward: bool, count: int) -> Sequence[Argument]:
        """The declarations of a kernel's buffers, `count` of them where the operation takes any number of inputs."""
        declared = self.vjp_buffers if backward else self.buffers
        if not self.variadic:
            return declared
        single = len(declared) - (2 if backward else 1)  # what is there once: outputs and their gradients
        inputs = (count - single) // (2 if backward else 1)
        return [a for a in declared for _ in range(inputs if a.variadic else 1)]

    def check_worked_out(
        self, arguments: Sequence[Argument], shapes: Sequence[Shape | None], attrs: dict[str, Any]
    ) -> None:
        """Compare outputs and their gradients, where letters do not give their shapes, with what `shape` says."""
        if self.shape is None:
            return
        pairs = list(zip(arguments, shapes, strict=True))
        dins = {a.name: shape for a, shape in pairs if a.role == "din"}
        # an input that vjp does not read is known by its gradient
        inputs = [dins.get("d" + a.name) if shape is None else shape for a, shape in pairs if a.role == "input"]
        if inputs[0] is None:
            return
        expected = dict(zip((a.name for a in self.outs), self.shape(inputs, attrs), strict=True))
        for argument, shape in pairs:
            name = {"out": argument.name, "dout": argument.name[1:]}.get(argument.role)
            if name is not None and shape is not None and shape != expected[name]:
                raise self._shape_error(argument, f"of shape {expected[name]}", shape)

    def sizes(self, arguments: Sequence[Argument], shapes: Sequence[Shape | None]) -> dict[str, int]:
        """The value of each dimension letter, or a ShapeError that names the two arguments that disagree."""
        sizes: dict[str, int] = {}
        whole: Shape | None = None
        for argument, shape in zip(arguments, shapes, strict=True):
            if shape is None or argument.dims == ("*",):
                continue
            if argument.dims == ("...",):
                if whole is not None and shape != whole:
                    raise self._shape_error(argument, f"of shape {whole}, like the arguments before it", shape)
                whole = shape
                sizes["..."] = math.prod(shape)
                continue
            if len(shape) != len(argument.dims):
                raise self._shape_error(argument, f"of shape ({', '.join(argument.dims)})", shape)
            for letter, size in zip(argument.dims, shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    expected = f"of shape ({', '.join(argument.dims)}) with {letter} = {sizes[letter]}"
                    raise self._shape_error(argument, expected, shape)
        if self.needs_classes and min(sizes.values(), default=1) < 1:
            raise ShapeError(
                self.name,
                self.inputs[0].name,
                expected="an array with at least one row and one class",
                got=f"n = {sizes.get('n')}, c = {sizes.get('c')}",
                fix="Leave out the call for an empty batch.",
            )
        return sizes

    def _shape_error(self, argument: Argument, expected: str, shape: Shape) -> ShapeError:
        fix = f"The operation is {self.name}: {self.signature}"
        return ShapeError(self.name, argument.name, expected=expected, got=f"shape {shape}", fix=fix)

    def infer(self, shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> tuple[list[Shape], list[Shape]]:
        """Shapes of the outputs and of the saved values for inputs of these shapes."""
        arguments = [self.inputs[0]] * len(shapes) if self.variadic else self.inputs
        sizes = self.sizes(arguments, shapes)
        worked_out = iter(self.shape(shapes, attrs)) if self.shape else iter(())
        same = next((s for a, s in zip(arguments, shapes, strict=True) if a.dims == ("...",) and s is not None), ())

        def fill(argument: Argument) -> Shape:
            if argument.dims == ("*",):
                return next(worked_out)
            return same if argument.dims == ("...",) else tuple(sizes[d] for d in argument.dims)

        return [fill(a) for a in self.outs], [fill(a) for a in self.saved]


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an operation to the table; a name is given once."""
    if op.name in OPS:
        raise ValueError(f"the table already has an operation named {op.name!r}")
    OPS[op.name] = op
    return op


def gradients(*rules: Callable[..., Any]) -> Callable[..., None]:
    """A vjp made of one expression for each differentiated input, in the order of `wrt`.

    Each rule is ``rule(xp, *douts, *outs, *saved, *inputs, **attrs)`` and returns that input's gradient;
    rules whose gradient nobody needs are not run.
    """

    def vjp(xp: Any, *buffers: Any, **attrs: Any) -> None:
        for din, rule in zip(buffers, rules, strict=False):
            if din is not None:
                din[...] = rule(xp, *buffers[len(rules) :], **attrs)

    return vjp
