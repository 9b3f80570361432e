"""Compiled steps: an ordinary function of arrays, written down when it first runs and replayed from then on.

    @kd.compile
    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

The first two calls run as they stand and are written down; if both did the same, later calls with arguments of the
same shapes replay it (`minikd.plan`), with the same results to the last bit. Whatever the step reads besides its
arguments (parameters, optimizer state, data) is read where it is, so a learning rate may change between two calls.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from minikd.errors import ArgumentError, DTypeError, MinikdError, PlanError, ShapeError
from minikd.kernels import FLOATS, in_use
from minikd.kernels.recording import (
    LAYOUT,
    Guard,
    Recorder,
    Traced,
    address,
    anybody_records,
    content,
    content_of,
    plain,
    recorder,
    recording,
    refuse,
)
from minikd.plan import Plan
from minikd.tape import is_recording, no_grad
from minikd.tensor import Tensor

__all__ = ["Step", "compile"]

# A call of C is cut to about this long, so that Ctrl-C and progress bars are heeded.
SECONDS_A_CALL = 0.05
# More recordings of one step than this are a mistake: a number that changes was given as a Python number. A step that
# may fall back forgets the others instead.
MOST_VARIANTS = 32


def compile(step: Callable[..., Any] | None = None, *, fallback: bool = False, confirm: bool = True) -> Any:
    """A step that is recorded when it first runs and replayed from then on, without Python in between.

    Parameters
    ----------
    step : a function of arrays. Everything that it computes from them goes through tensors and minikd.functional; what
        it returns are tensors or arrays, alone, in tuples, lists or dicts, and come out as copies without a history.
    fallback : run a step that cannot be replayed as it stands, each time, instead of raising PlanError.
    confirm : record the second call too and compare. Without it a number that differs from call to call, and an array
        that the step makes with NumPy, stay as they were in the first call without anybody noticing.

    Returns
    -------
    Step : called like the function. Arrays and tensors among the arguments may differ in content from call to call;
        each combination of shapes and dtypes is recorded once. Any other argument, a Python number for example, is
        part of what is recorded: a number that varies is given as an array without axes, np.array(0.5).

    Raises (when the step is called)
    --------------------------------
    PlanError : what the step does cannot be replayed; the message has the line, and a note says whether parameters had
        changed.

    Usable as a decorator, with or without arguments.
    """
    if step is None:
        return functools.partial(compile, fallback=fallback, confirm=confirm)
    if not callable(step):
        raise ArgumentError("compile", "step", expected="a function", got=repr(step))
    return Step(step, fallback=fallback, confirm=confirm)


# --- arguments ---


def _is_data(value: Any) -> bool:
    """Whether an argument is data that may change from call to call."""
    if isinstance(value, Tensor):
        if value.node is not None:
            fix = "Compute it in the step, or give its values with .detach()."
            expected = "an array, or a tensor without a history"
            raise PlanError("compile", "an argument", expected=expected, got="what was computed from others", fix=fix)
        return not value.requires_grad
    return isinstance(value, np.ndarray)


def _look(value: Any) -> Any:
    """What a plan depends on of an argument: shape and dtype of data, anything else as it is."""
    if _is_data(value):
        return type(value) is Tensor, value.shape, value.dtype
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


def _place_for(value: Any) -> Any:
    """An array of the plan's own for an argument: floats as they are (64 bits without axes), whole numbers as int64."""
    array = value.array if isinstance(value, Tensor) else value
    given = array.dtype.newbyteorder("=")
    if given in FLOATS or given in (np.float16, np.bool_):
        dtype = np.float64 if array.ndim == 0 else given.type if given in FLOATS else np.float32
    elif given.kind in "iu":
        dtype = np.uint8 if given == np.uint8 else np.int64
    else:
        expected = "an array of float16, float32, float64 or whole numbers"
        raise DTypeError("compile", "an argument", expected=expected, got=str(array.dtype))
    return np.empty(array.shape, dtype)


def _fitting(array: Any) -> Any:
    """The array as one that can be copied to its place: what int64 cannot hold stays too large."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        return np.minimum(array, np.uint64(np.iinfo(np.int64).max))
    return array


# --- results ---


Leaf = Tensor | np.ndarray | np.generic


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors, arrays and NumPy numbers in what a step returned."""
    if isinstance(value, Leaf):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _leaves(v)


def _rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    """The same structure with these leaves in it."""
    if isinstance(value, Leaf):
        return next(leaves)
    if isinstance(value, dict):
        return {k: _rebuilt(v, leaves) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [_rebuilt(v, leaves) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _skeleton(value: Any) -> Any:
    """What a step returned without its leaves, to be compared."""
    if isinstance(value, Leaf):
        return Leaf
    if isinstance(value, dict):
        return [(k, _skeleton(v)) for k, v in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [_skeleton(v) for v in value]
    return value


def _array_of(leaf: Any) -> Any:
    return plain(leaf.array) if isinstance(leaf, Tensor) else plain(np.asanyarray(leaf))


def _like(leaf: Any, array: Any) -> Any:
    """A copy of the array as what the step returned in its place: a tensor, an array, or a number."""
    if isinstance(leaf, Tensor):
        return Tensor.of(array.copy())
    return array.copy() if array.ndim else array[()]


# --- one way of running a step ---

_NO = object()  # what stands for a result where nothing was run


class _Variant:
    """A step as it was recorded for arguments of one look, first without a plan, then with one.

    `fits` says whether it holds now; `run` runs it. Where the step cannot be replayed, `refusal` has the reason.
    """

    def __init__(self, places: Sequence[Any]) -> None:
        self.places = tuple(places)  # the plan's own array for each argument that is data, None for the others
        self.plan: Plan | None = None
        self.refusal: PlanError | None = None
        self.looks: list[tuple[Any, Any, Any]] = []  # the places as a quick look compares them
        self.steady = False  # whether nothing but the layout can end it
        self.writer: Recorder | None = None  # of the first call, until the second confirms it
        self.recorded: Any = None  # what that call returned, to be compared
        self.used: Any = None  # what stands for the backend
        self.tape_on: bool | None = None  # whether gradients were recorded; None if it does not matter
        self.layout = -1
        self.guards: list[Guard] = []
        self.found_gradients: list[tuple[Tensor, Any]] = []
        self.held: tuple[Any, ...] = ()  # arguments that are known by their identity
        self.checks: list[tuple[int, Callable[[float], Any]]] = []  # numbers of arguments, with what may refuse them

    # --- recording ---

    def record(self, function: Callable[..., Any], args: Sequence[Any], names: Sequence[str], step: Step) -> Any:
        """Run the function as it stands and write down what it does; the second time, compare and make the plan."""
        self.fill(args)
        pairs = list(zip(args, self.places, strict=True))
        self.held = tuple(value for value, place in pairs if place is None)
        given = [value if place is None else _handed_over(value, place) for value, place in pairs]
        positional = len(given) - len(names)
        before, writer = self.writer, Recorder([p for p in self.places if p is not None], forgiving=step.fallback)
        self.used, self.tape_on = in_use(), is_recording() if step.differentiable else None
        with recording(writer):
            returned = function(*given[:positional], **dict(zip(names, given[positional:], strict=True)))
        self.writer, self.refusal = writer, writer.refusal
        if self.refusal is not None and not step.fallback:
            raise self.refusal  # which the step caught
        self.found_gradients, self.guards = list(writer.found_gradients.items()), writer.guards
        self.layout = LAYOUT.version
        leaves = list(_leaves(returned))
        results = [_result_of(writer, leaf) for leaf in leaves]
        before_returned, self.recorded = self.recorded, (_skeleton(returned), results)
        if self.refusal is None and before is not None:
            self.refusal = _difference(before, writer) or _other_results(function, before_returned, self.recorded)
            if self.refusal is not None and not step.fallback:
                state = "have changed" if writer.changed else "are as they were before the step"
                self.refusal.add_note(f"The step ran to its end; the parameters {state}.")
                raise self.refusal
        if self.refusal is None and (before is not None or not step.confirm):
            self._make_plan(writer, returned, leaves)
            self.looks = [_quick_look(value, place) for value, place in pairs]
        return _rebuilt(returned, iter([_like(leaf, _array_of(leaf)) for leaf in leaves]))

    def _make_plan(self, writer: Recorder, returned: Any, leaves: Sequence[Any]) -> None:
        """Bind what was written down to memory of its own, and keep of the recording only what runs need."""
        gradients = [g for g in writer.gradients.values() if g is not None]
        plan = Plan(writer, [*map(_array_of, leaves), *gradients])
        self.results, places = plan.results[: len(leaves)], iter(plan.results[len(leaves) :])
        self.gradients = [(t, None if g is None else next(places)) for t, g in writer.gradients.items()]
        self.changed = writer.changed
        numbers = {id(place): k for k, place in enumerate(self.places)}
        self.checks = [(numbers[id(array)], check) for array, check in writer.checks if id(array) in numbers]
        self.returned = _rebuilt(returned, iter([_empty_like(leaf) for leaf in leaves]))
        self.leaves = list(_leaves(self.returned))
        array = isinstance(self.returned, np.ndarray) and self.results[0].ndim > 0
        self.single = Tensor if isinstance(self.returned, Tensor) else np.ndarray if array else None
        self.steady = self.tape_on is None and not self.found_gradients
        self.writer, self.recorded, self.plan = None, None, plan

    # --- running ---

    def fits(self) -> bool:
        """Whether what was recorded still holds, as far as it is not a matter of the arguments."""
        if self.used is None:
            return True
        if self.tape_on is not None and self.tape_on is not is_recording():
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
        """Replay on these arguments if a quick look says that they fit, else _NO: nothing but speed hangs on this."""
        looks = self.looks
        if len(args) != len(looks) or ((self.layout != LAYOUT.version or not self.steady) and not self.fits()):
            return _NO
        for value, (place, shape, dtype) in zip(args, looks, strict=False):
            if place is None:
                if value is not shape:  # which holds what the argument was
                    return _NO
            elif type(value) is not ndarray or value.shape != shape or value.dtype != dtype:
                return _NO
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
        for tensor, gradient in self.gradients:
            tensor._grad = gradient
        for tensor in self.changed:
            tensor.version += 1
        if self.single:
            array = self.results[0].copy()
            return Tensor.of(array) if self.single is Tensor else array
        leaves = [_like(leaf, array) for leaf, array in zip(self.leaves, self.results, strict=True)]
        return _rebuilt(self.returned, iter(leaves))

    def repeat(self, stacks: Sequence[Any]) -> Any:
        """Replay on each entry of these arrays; the results as arrays with one more axis in front."""
        assert self.plan is not None
        count = len(stacks[0])
        arguments = [np.ascontiguousarray(_fitting(x), p.dtype) for x, p in zip(stacks, self.places, strict=True)]
        results = [np.empty((count, *r.shape), r.dtype) for r in self.plan.results]
        good = min((self.first_refused(arguments[k], check) for k, check in self.checks), default=count)
        try:
            self.plan.repeat(arguments, results, good)
        finally:
            if self.plan.rounds_done:
                self.take_effect(self.plan.rounds_done)
        if good < count:
            self.refuse_one_of([(arguments[k][good], check) for k, check in self.checks])
        return _rebuilt(self.returned, iter(results))

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


def _same_memory(a: Any, b: Any) -> bool:
    """Whether two gradients, or their absences, are one."""
    return a is b or (a is not None and b is not None and address(a) == address(b))


def _quick_look(value: Any, place: Any) -> tuple[Any, Any, Any]:
    """What `try_run` compares an argument with: its place, shape and dtype, or None and the very thing that it was."""
    if place is None:
        return None, value, None
    return (None, _NO, None) if type(value) is Tensor else (place, place.shape, place.dtype)


def _handed_over(value: Any, place: Any) -> Any:
    """An argument as the function sees it while it is recorded: memory of the plan, whose values are not to be read."""
    traced = place.view(Traced)
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
    array = _array_of(leaf)
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


class Step:
    """A function that is recorded when it first runs and replayed from then on; `compile` makes it.

    One thread at a time runs it; another waits. `differentiable=False` runs the function without recording gradients.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        fallback: bool = False,
        confirm: bool = True,
        differentiable: bool = True,
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function if differentiable else no_grad()(function)
        self.fallback, self.confirm, self.differentiable = bool(fallback), bool(confirm), differentiable
        self._variants: dict[Any, list[_Variant]] = {}
        self._last: _Variant | None = None  # the one that ran last, if it has a plan
        self._rounds_done = 0  # of the last call for several steps
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if anybody_records and recorder() is not None:
            return self.function(*args, **kwargs)  # within another step: a part of it
        with self._lock:
            if self._last is not None and not kwargs:
                returned = self._last.try_run(args)
                if returned is not _NO:
                    return returned
            return self._find_and_run(args, kwargs)

    def _find_and_run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        names = tuple(kwargs)
        values = (*args, *kwargs.values())
        variant = self._variant(names, values)
        if variant is None or variant.refusal is not None:
            return self.function(*args, **kwargs)
        if variant.plan is not None:
            self._last = None if names else variant
            variant.fill(values)
            return variant.run()
        try:
            return variant.record(self.function, values, names, self)
        except BaseException:
            self._forget(variant)
            raise

    def _variant(self, names: Sequence[str], values: Sequence[Any]) -> _Variant | None:
        """The variant for these arguments that holds now, or a new one; None if no plan can take them."""
        try:
            return self._found_or_new((names, tuple(_look(v) for v in values)), values)
        except (PlanError, DTypeError):
            if self.fallback:
                return None
            raise

    def _found_or_new(self, key: Any, values: Sequence[Any]) -> _Variant:
        found = self._variants.setdefault(key, [])
        for variant in found:
            if variant.fits():
                return variant
        places = [_place_for(v) if _is_data(v) else None for v in values]
        for variants in self._variants.values():  # what was made for a backend that was chosen before never fits again
            variants[:] = [v for v in variants if v.used is None or v.used is in_use()]
        if sum(map(len, self._variants.values())) >= MOST_VARIANTS and self.fallback:
            self._variants = {key: found}  # whoever asks for so many is served as well as can be
        elif sum(map(len, self._variants.values())) >= MOST_VARIANTS:
            expected = f"called with at most {MOST_VARIANTS} combinations of shapes, settings and Python values"
            fix = "Give a number that varies as np.array(number), an array without axes."
            raise PlanError("compile", "the step", expected=expected, got="one more", fix=fix)
        found.append(_Variant(places))
        return found[-1]

    def _forget(self, variant: _Variant) -> None:
        for found in self._variants.values():
            if variant in found:
                found.remove(variant)

    # --- looking inside ---

    @property
    def plans(self) -> list[Plan]:
        """The plans that were made so far, one for each combination of shapes and settings."""
        return [v.plan for found in self._variants.values() for v in found if v.plan is not None]

    @property
    def refusals(self) -> list[PlanError]:
        """Why calls run as they stand, where the step is compiled with fallback=True and cannot be replayed."""
        return [v.refusal for found in self._variants.values() for v in found if v.refusal is not None]

    def explain(self, timed: bool = True) -> str:
        """What the step is made of: see `minikd.explain.explain`. With several plans each has its table.

        Raises
        ------
        PlanError : there is no plan yet.
        """
        with self._lock:
            if not self.plans:
                fix = "Call it twice; it is recorded then."
                raise PlanError("explain", "the step", expected="one with a plan", got="one without", fix=fix)
            return "\n\n".join(plan.explain(timed) for plan in self.plans)

    # --- many steps at once ---

    def epoch(self, *arguments: Any, on_progress: Callable[[int], None] | None = None) -> Any:
        """Run the step once for each entry of the arguments' first axis: ``[step(x[k], y[k]) for k in …]``.

        Parameters
        ----------
        arguments : arrays with one more axis in front than the step takes, all of one length; the row numbers of an
            epoch's batches (steps, batch size) for example.
        on_progress : called with the number of steps done after each call of C; such a call takes about 50 ms, and
            Ctrl-C is heeded between two.

        Returns
        -------
        What the step returns, as arrays with the axis of the steps in front: a loss is (steps,).

        Raises
        ------
        ShapeError : the arguments differ in length, or there is nothing to run on.
        MinikdError : what the step itself raises; a note says in which step.
        """
        done, portions = 0, []
        for count, portion in self._portions(*arguments):
            portions.append(portion)
            done += count
            if on_progress is not None:
                on_progress(done)
        columns = zip(*(_leaves(portion) for portion in portions), strict=True)
        return _rebuilt(portions[0], (column[0] if len(column) == 1 else np.concatenate(column) for column in columns))

    def portions(self, *arguments: Any) -> Iterator[Any]:
        """As `epoch`, in portions of about 50 ms: yields the results of each, so that a caller may stop or report."""
        return (portion for _, portion in self._portions(*arguments))

    def _portions(self, *arguments: Any) -> Iterator[tuple[int, Any]]:
        """The number of steps in each portion, and their results."""
        refuse("an epoch of another step", "Call that step by itself.")
        arrays = [np.asarray(x) for x in arguments]
        lengths = {x.shape[:1] for x in arrays}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            expected = "arrays of one length, one entry for each step"
            got = "shapes " + (", ".join(str(x.shape) for x in arrays) or "of no array")
            raise ShapeError("epoch", "arguments", expected=expected, got=got)
        done, steps, seconds = 0, len(arrays[0]), math.inf
        while done < steps:
            count, started = min(steps - done, max(1, int(SECONDS_A_CALL / seconds))), time.monotonic()
            with self._lock:
                try:
                    count, portion = self._portion([x[done : done + count] for x in arrays])
                except Exception as error:
                    error.add_note(f"It is step {done + self._rounds_done} of steps 0 to {steps - 1}.")
                    raise
            seconds = max((time.monotonic() - started) / count, 1e-9)
            done += count
            yield count, portion

    def _portion(self, arrays: Sequence[Any]) -> tuple[int, Any]:
        """Run the step on entries of these arrays: on all of them by its plan, or on the first without one."""
        first = tuple(x[0, ...] for x in arrays)
        variant = self._variant((), first)
        self._rounds_done = 0
        if variant is not None and variant.plan is not None:
            try:
                return len(arrays[0]), variant.repeat(arrays)
            finally:
                self._rounds_done = variant.plan.rounds_done
        returned = self._find_and_run(first, {})
        return 1, _rebuilt(returned, iter([_array_of(leaf)[None] for leaf in _leaves(returned)]))
