"""One way of running a step: as it was recorded for arguments of one look, then by the plan that came of it.

What a step depends on besides the look of its arguments (parts of models, modes, the backend, gradients that are there
already) is watched; a variant that does not hold at present is left for another.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import DTypeError, MinikdError, PlanError
from minikd.kernels import FLOATS, in_use
from minikd.kernels.arrays import address, here, is_array, misplaced, module_of, on_device, synchronize
from minikd.kernels.recording import LAYOUT, Guard, Recorder, as_traced, content, content_of, plain, recording
from minikd.plan import Plan
from minikd.tape import is_recording
from minikd.tensor import Tensor

# --- arguments ---


def is_data(value: Any) -> bool:
    """Whether an argument is data that may change from call to call."""
    if isinstance(value, Tensor):
        if value.node is not None:
            fix = "Compute it in the step, or give its values with .detach()."
            expected = "an array, or a tensor without a history"
            raise PlanError("compile", "an argument", expected=expected, got="what was computed from others", fix=fix)
        return not value.requires_grad
    return is_array(value)


def look_of_argument(value: Any) -> Any:
    """What a plan depends on of an argument: shape, dtype and memory of data, anything else as it is."""
    if is_data(value):
        tensor = type(value) is Tensor
        return tensor, on_device(value.array if tensor else value), value.shape, value.dtype
    return _constant(value)


def _constant(value: Any) -> Any:
    """A value that is part of what is recorded, as a key that tells 1 from 1.0."""
    if isinstance(value, Tensor):
        return id(value)  # which it keeps, because the variant holds it
    if isinstance(value, tuple):
        return type(value), *map(_constant, value)
    if isinstance(value, float):
        return value.hex(), type(value)  # 0.0 is not -0.0, and NaN is NaN
    try:
        hash(value)
    except TypeError:
        expected, fix = "an array, a tensor, or a value that can be a dictionary's key", "Give each array by itself."
        raise PlanError("compile", "an argument", expected=expected, got=type(value).__name__, fix=fix) from None
    return value, type(value)


def place_for(value: Any) -> Any:
    """An array of the plan's own for an argument: floats as they are (64 bits without axes), whole numbers as int64.

    It lies where the backend computes, but a number of NumPy's, an array without axes, stays on the host.

    Raises
    ------
    BackendError : the argument lies elsewhere.
    """
    array = value.array if isinstance(value, Tensor) else value
    if on_device(array) is not here.on_device and (array.ndim > 0 or on_device(array)):
        raise misplaced("compile", "an argument", array)
    given = array.dtype.newbyteorder("=")
    if given in FLOATS or given in (np.float16, np.bool_):
        dtype = np.float64 if array.ndim == 0 else given.type if given in FLOATS else np.float32
    elif given.kind in "iu":
        dtype = np.uint8 if given == np.uint8 else np.int64
    else:
        expected = "an array of float16, float32, float64 or whole numbers"
        raise DTypeError("compile", "an argument", expected=expected, got=str(array.dtype))
    return module_of(array).empty(array.shape, dtype)


def _fitting(array: Any) -> Any:
    """The array as one that can be copied to its place: what int64 cannot hold stays too large."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        return module_of(array).minimum(array, np.uint64(np.iinfo(np.int64).max))
    return array


# --- results ---


def _is_leaf(value: Any) -> bool:
    """Whether this is a tensor, an array or a number of NumPy's."""
    return isinstance(value, Tensor | np.ndarray | np.generic) or on_device(value)


def leaves_of(value: Any) -> Iterator[Any]:
    """The tensors, arrays and NumPy numbers in what a step returned."""
    if _is_leaf(value):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves_of(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from leaves_of(v)


def rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    """The same structure with these leaves in it."""
    if _is_leaf(value):
        return next(leaves)
    if isinstance(value, dict):
        return {k: rebuilt(v, leaves) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [rebuilt(v, leaves) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _skeleton(value: Any) -> Any:
    """What a step returned without its leaves, to be compared."""
    if _is_leaf(value):
        return _is_leaf
    if isinstance(value, dict):
        return [(k, _skeleton(v)) for k, v in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [_skeleton(v) for v in value]
    return value


def array_of(leaf: Any) -> Any:
    array = leaf.array if isinstance(leaf, Tensor) else leaf
    return plain(array) if is_array(array) else np.asarray(array)


def _like(leaf: Any, array: Any) -> Any:
    """A copy of the array as what the step returned in its place: a tensor, an array, or a number of NumPy's."""
    if isinstance(leaf, Tensor):
        return Tensor.of(array.copy())
    return array.copy() if array.ndim or on_device(array) else array[()]


# --- one way of running a step ---

NOT_RUN = object()  # what stands for a result where nothing was run


class Options(NamedTuple):
    """How a step is compiled: see `minikd.steps.compile`; one that is not differentiable records no gradients."""

    fallback: bool
    confirm: bool
    differentiable: bool


class Variant:
    """A step as it was recorded for arguments of one look, first without a plan, then with one.

    `fits` says whether it holds now; `run` runs it. Where the step cannot be replayed, `refusal` has the reason.
    """

    def __init__(self, places: Sequence[Any]) -> None:
        self.places = tuple(places)  # the plan's own array for each argument that is data, None for the others
        self.plan: Plan | None = None
        self.refusal: PlanError | None = None
        self.looks: list[tuple[Any, Any, Any, Any]] = []  # the places as a quick look compares them
        self.seconds = math.inf  # that a replay took when several were made at once; not known yet
        self.steady = False  # whether nothing but the layout can end it
        self.writer: Recorder | None = None  # of the first call, until the second confirms it
        self.recorded: Any = None  # what that call returned, to be compared
        self.used: Any = None  # what stands for the backend
        self.tape_on: bool | None = None  # whether gradients were recorded; None if it does not matter
        self.layout = -1
        self.guards: list[Guard] = []
        self.found_gradients: list[tuple[Tensor, Any]] = []
        self.names: list[tuple[dict[str, Any], str, Any]] = []  # globals that the function reads
        self.cells: list[tuple[Any, Any]] = []  # and variables of the functions around it
        self.held: tuple[Any, ...] = ()  # arguments that are known by their identity
        self.checks: list[tuple[int, Callable[[float], Any]]] = []  # numbers of arguments, with what may refuse them

    # --- recording ---

    def record(self, function: Callable[..., Any], args: Sequence[Any], names: Sequence[str], options: Options) -> Any:
        """Run the function as it stands and write down what it does; the second time, compare and make the plan."""
        self.fill(args)
        pairs = list(zip(args, self.places, strict=True))
        self.held = tuple(value for value, place in pairs if place is None)
        given = [value if place is None else _handed_over(value, place) for value, place in pairs]
        positional = len(given) - len(names)
        before, writer = self.writer, Recorder([p for p in self.places if p is not None], forgiving=options.fallback)
        self.used, self.tape_on = in_use(), is_recording() if options.differentiable else None
        with recording(writer):
            returned = function(*given[:positional], **dict(zip(names, given[positional:], strict=True)))
        self.writer, self.refusal = writer, writer.refusal
        if self.refusal is not None and not options.fallback:
            raise self.refusal  # which the step caught
        self.found_gradients, self.guards = list(writer.found_gradients.items()), writer.guards
        if options.differentiable:  # a step of a user's; the others are our own
            self.names, self.cells = _captured(function, self.held)
        self.layout = LAYOUT.version
        leaves = list(leaves_of(returned))
        results = [_result_of(writer, leaf) for leaf in leaves]
        before_returned, self.recorded = self.recorded, (_skeleton(returned), results)
        if self.refusal is None and before is not None:
            self.refusal = _difference(before, writer) or _other_results(function, before_returned, self.recorded)
            if self.refusal is not None and not options.fallback:
                state = "have changed" if writer.changed else "are as they were before the step"
                self.refusal.add_note(f"The step ran to its end; the parameters {state}.")
                raise self.refusal
        if self.refusal is None and (before is not None or not options.confirm):
            self._make_plan(writer, returned, leaves)
            self.looks = [_quick_look(value, place) for value, place in pairs]
        return rebuilt(returned, iter([_like(leaf, array_of(leaf)) for leaf in leaves]))

    def _make_plan(self, writer: Recorder, returned: Any, leaves: Sequence[Any]) -> None:
        """Bind what was written down to memory of its own, and keep of the recording only what runs need."""
        gradients = [g for g in writer.gradients.values() if g is not None]
        plan = Plan(writer, [array_of(leaf) for leaf in leaves], gradients)
        self.results, places = plan.results, iter(plan.lasting)
        self.gradients = [(t, None if g is None else next(places)) for t, g in writer.gradients.items()]
        self.changed = writer.changed
        numbers = {id(place): k for k, place in enumerate(self.places)}
        self.checks = [(numbers[id(array)], check) for array, check in writer.checks if id(array) in numbers]
        self.returned = rebuilt(returned, iter([_empty_like(leaf) for leaf in leaves]))
        self.leaves = list(leaves_of(self.returned))
        array = is_array(self.returned) and (self.results[0].ndim > 0 or on_device(self.results[0]))
        self.single = Tensor if isinstance(self.returned, Tensor) else np.ndarray if array else None
        self.steady = self.tape_on is None and not (self.found_gradients or self.names or self.cells)
        self.writer, self.recorded, self.plan = None, None, plan

    # --- running ---

    def fits(self) -> bool:
        """Whether what was recorded still holds, as far as it is not a matter of the arguments."""
        if self.used is None:
            return True
        if self.tape_on is not None and self.tape_on is not is_recording():
            return False
        for names, name, value in self.names:
            if names.get(name) is not value:
                return False
        try:
            for cell, value in self.cells:
                if cell.cell_contents is not value:
                    return False
        except ValueError:  # a variable that was deleted, which the function itself will say
            return False
        for tensor, had in self.found_gradients:
            if not _same_memory(tensor._grad, had):
                return False
        if self.layout != LAYOUT.version:
            version = LAYOUT.version
            if self.used is not in_use() or not all(guard.holds() for guard in self.guards):
                return False
            self.layout = version
        return True

    def try_run(self, args: Sequence[Any]) -> Any:
        """Replay on these arguments if a quick look says that they fit, else NOT_RUN: only speed hangs on this."""
        looks = self.looks
        if len(args) != len(looks) or ((self.layout != LAYOUT.version or not self.steady) and not self.fits()):
            return NOT_RUN
        for k, value in enumerate(args):
            place, kind, shape, dtype = looks[k]
            if place is None:
                if value is not kind:  # which holds what the argument was
                    return NOT_RUN
            elif type(value) is not kind or value.shape != shape or value.dtype != dtype:
                return NOT_RUN
            else:
                place[...] = value
        return self.run()

    def fill(self, args: Sequence[Any]) -> None:
        """Copy the arguments into the plan's own arrays."""
        for value, place in zip(args, self.places, strict=True):
            if place is not None:
                place[...] = _fitting(value.array if type(value) is Tensor else value)

    def run(self) -> Any:
        """Replay on the arguments that were filled in."""
        plan = self.plan
        assert plan is not None
        if self.checks:
            self.refuse_one_of([(self.places[k], check) for k, check in self.checks])
        status = plan.start()
        if status:
            plan.refuse(status)
        for tensor, gradient in self.gradients:  # what take_effect(1) does, without a call
            tensor._grad = gradient
        for tensor in self.changed:
            tensor.version += 1
        if self.single:
            array = self.results[0].copy()
            return Tensor.of(array) if self.single is Tensor else array
        leaves = [_like(leaf, array) for leaf, array in zip(self.leaves, self.results, strict=True)]
        return rebuilt(self.returned, iter(leaves))

    def repeat(self, stacks: Sequence[Any]) -> Any:
        """Replay on each entry of these arrays; the results as arrays with one more axis in front.

        On a device nothing is waited for between two steps, but for all of them at the end.
        """
        assert self.plan is not None
        count = len(stacks[0])
        arguments = [
            module_of(p).ascontiguousarray(_fitting(x), p.dtype) for x, p in zip(stacks, self.places, strict=True)
        ]
        results = [module_of(r).empty((count, *r.shape), r.dtype) for r in self.results]
        good = min((self.first_refused(arguments[k], check) for k, check in self.checks), default=count)
        try:
            self.plan.repeat(arguments, results, good)
        finally:
            if self.plan.rounds_done:
                self.take_effect(self.plan.rounds_done)
        synchronize()
        if good < count:
            self.refuse_one_of([(arguments[k][good], check) for k, check in self.checks])
        return rebuilt(self.returned, iter(results))

    @staticmethod
    def refuse_one_of(checks: Sequence[tuple[Any, Callable[[float], Any]]]) -> None:
        """Raise what one of these checks has against its number."""
        try:
            for number, check in checks:
                check(float(number))
        except Exception as error:
            error.add_note("The parameters are as they were before this step.")
            raise

    @staticmethod
    def first_refused(numbers: Any, check: Callable[[float], Any]) -> int:
        """Where the first number is that this check refuses; no check refuses what is finite and not below 0."""
        for k in np.flatnonzero(~np.isfinite(numbers) | (numbers < 0)):
            try:
                check(float(numbers[k]))
            except MinikdError:
                return int(k)
        return len(numbers)

    def take_effect(self, runs: int) -> None:
        """Leave tensors as the step leaves them: with their gradients, and known to have changed."""
        for tensor, gradient in self.gradients:
            tensor._grad = gradient
        for tensor in self.changed:
            tensor.version += runs


def _captured(function: Any, held: Sequence[Any]) -> tuple[list[tuple[Any, str, Any]], list[tuple[Any, Any]]]:
    """What a function takes from outside: names with what they stand for, and its closure's cells with their values.

    Names are its globals but for modules, and attributes that it reads of plain objects among those, the cells' values
    and the arguments that it was given as they are. Parts of models are watched otherwise (`Recorder.guard`).
    """
    inner = inspect.unwrap(function)
    code, names = getattr(inner, "__code__", None), getattr(inner, "__globals__", {})
    if code is None:
        return [], []
    cells = []
    for cell in inner.__closure__ or ():
        with suppress(ValueError):  # one that has no value yet
            cells.append((cell, cell.cell_contents))
    read = sorted(name for name in _loaded(code, "LOAD_GLOBAL") if name in names)
    found = [(names, name, names[name]) for name in read if not isinstance(names[name], ModuleType)]
    attributes = _loaded(code, "LOAD_ATTR", "LOAD_METHOD")
    for owner in (*held, *(value for _, value in cells), *(value for _, _, value in found)):
        if type(owner).__setattr__ is object.__setattr__ and hasattr(owner, "__dict__"):
            found += [(vars(owner), name, vars(owner)[name]) for name in sorted(attributes & set(vars(owner)))]
    return found, cells


def _loaded(code: CodeType, *how: str) -> set[str]:
    """The names that code, and code within it, loads by these instructions."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname in how}
    return names.union(*(_loaded(inner, *how) for inner in code.co_consts if isinstance(inner, CodeType)))


def _same_memory(a: Any, b: Any) -> bool:
    """Whether two gradients, or their absences, are one."""
    return a is b or (a is not None and b is not None and address(a) == address(b))


def _quick_look(value: Any, place: Any) -> tuple[Any, Any, Any, Any]:
    """What `try_run` compares an argument with: its place, and that one's type, shape and dtype; or the very thing."""
    if place is None:
        return None, value, None, None
    return (None, NOT_RUN, None, None) if type(value) is Tensor else (place, type(place), place.shape, place.dtype)


def _handed_over(value: Any, place: Any) -> Any:
    """An argument as the function sees it while it is recorded: memory of the plan, whose values are not to be read."""
    traced = as_traced(place)
    return Tensor.of(traced) if isinstance(value, Tensor) else traced


def _empty_like(leaf: Any) -> Any:
    """What stands for a leaf between two runs."""
    return Tensor.of(np.empty(0)) if isinstance(leaf, Tensor) else np.empty(0)


def _difference(first: Recorder, second: Recorder) -> PlanError | None:
    """What two recordings of one step do differently, in words; None if they agree."""
    a = [content(call, first.storages) for call in first.calls]
    b = [content(call, second.storages) for call in second.calls]
    k = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if k == len(a) == len(b):
        return None
    lines = [calls[k].line if k < len(calls) else "its end" for calls in (first.calls, second.calls)]
    names = [calls[k].name if k < len(calls) else "nothing" for calls in (first.calls, second.calls)]
    if names[0] != names[1]:
        got = f"{names[0]} ({lines[0]}) the first time and {names[1]} ({lines[1]}) the second"
    else:
        got = f"{names[0]} ({lines[0]}) with another array, number or setting each time"
    fix = (
        "Make arrays before the step or give them as arguments, and give a number that varies as np.array(number), "
        "an array without axes; or compile with fallback=True."
    )
    return PlanError("compile", "the step", expected="one that does the same in every call", got=got, fix=fix)


def _result_of(writer: Recorder, leaf: Any) -> Any:
    """Which memory a result of a recorded step is in; of a number that NumPy made, what it is."""
    array = array_of(leaf)
    if isinstance(leaf, np.generic):
        writer.constant(array)
    return content_of(writer.place(array), writer.storages)


def _other_results(function: Any, first: Any, second: Any) -> PlanError | None:
    """What two recordings of one step return differently, in words; None if they agree."""
    try:
        if bool(first[0] == second[0]) and first[1] == second[1]:
            return None
    except Exception:  # things that cannot be compared
        pass
    fix = "Return tensors, and arrays that operations made, alone or in tuples, lists and dicts."
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
    got = f"a result that NumPy or Python computed, or an object of another kind{where}"
    return PlanError("compile", "the step", expected="one that returns results of operations", got=got, fix=fix)
