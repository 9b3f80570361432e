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
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, DTypeError, PlanError, ShapeError
from minikd.kernels import in_use
from minikd.kernels.arrays import here, module_of, on_device, to_device
from minikd.kernels.recording import anybody_records, recorder, refuse
from minikd.plan import Plan
from minikd.tape import no_grad
from minikd.variant import NOT_RUN, Options, Variant, array_of, is_data, leaves_of, look_of_argument, place_for, rebuilt

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

    Noticed, because another recording is made then: other values of the variables that the function takes from outside,
    other parts and settings of models and optimizers. Not noticed: other attributes of objects of another kind
    (``self.factor``), other items of lists and dicts, and what ``np.asarray`` reads of an argument. They stay as they
    were when the step was recorded.

    On a GPU (the backend "cupy") arguments are arrays of CuPy, and numbers arrays of NumPy without axes; what is
    returned stays there, and nothing is waited for. All runs of a plan work in the same memory, so they belong on one
    stream, or on several of which each waits for the one before.

    Usable as a decorator, with or without arguments.
    """
    if step is None:
        return functools.partial(compile, fallback=fallback, confirm=confirm)
    if not callable(step):
        raise ArgumentError("compile", "step", expected="a function", got=repr(step))
    return Step(step, fallback=fallback, confirm=confirm)


_STEPS: weakref.WeakSet[Step] = weakref.WeakSet()  # all that there are, for a child that is forked


def _free_locks() -> None:
    """In the child of a fork: a thread that ran a step in the parent is not there to give its lock back."""
    for step in _STEPS:
        step._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


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
        self.options = Options(bool(fallback), bool(confirm), differentiable)
        self._variants: dict[Any, list[Variant]] = {}
        self._last: Variant | None = None  # the one that ran last, if it has a plan
        self._rounds_done = 0  # of the last call for several steps
        self._lock = threading.RLock()
        _STEPS.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if anybody_records and recorder() is not None:
            return self.function(*args, **kwargs)  # within another step: a part of it
        with self._lock:
            if self._last is not None and not kwargs:
                returned = self._last.try_run(args)
                if returned is not NOT_RUN:
                    return returned
            return self._find_and_run(args, kwargs)

    def replay(self, *args: Any) -> Any:
        """The result if the plan that ran last takes these arguments and nobody else runs it, else NOT_RUN."""
        lock = self._lock
        if (anybody_records and recorder() is not None) or not lock.acquire(False):
            return NOT_RUN
        try:
            return NOT_RUN if self._last is None else self._last.try_run(args)
        finally:
            lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the function, and record for themselves."""
        return functools.partial(Step, **self.options._asdict()), (self.function,)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A step that is a method: called with its object, which is part of what is recorded."""
        return self if instance is None else MethodType(self, instance)

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
            return variant.record(self.function, values, names, self.options)
        except BaseException:
            self._forget(variant)
            raise

    def _variant(self, names: Sequence[str], values: Sequence[Any]) -> Variant | None:
        """The variant for these arguments that holds now, or a new one; None if no plan can take them."""
        try:
            return self._found_or_new((names, tuple(look_of_argument(v) for v in values)), values)
        except (PlanError, DTypeError):
            if self.options.fallback:
                return None
            raise

    def _found_or_new(self, key: Any, values: Sequence[Any]) -> Variant:
        found = self._variants.setdefault(key, [])
        for variant in found:
            if variant.fits():
                return variant
        places = [place_for(v) if is_data(v) else None for v in values]
        for variants in self._variants.values():  # what was made for a backend that was chosen before never fits again
            variants[:] = [v for v in variants if v.used is None or v.used is in_use()]
        if sum(map(len, self._variants.values())) >= MOST_VARIANTS and self.options.fallback:
            self._variants = {key: found}  # whoever asks for so many is served as well as can be
        elif sum(map(len, self._variants.values())) >= MOST_VARIANTS:
            expected = f"called with at most {MOST_VARIANTS} combinations of shapes, settings and Python values"
            fix = "Give a number that varies as np.array(number), an array without axes."
            raise PlanError("compile", "the step", expected=expected, got="one more", fix=fix)
        found.append(Variant(places))
        return found[-1]

    def _forget(self, variant: Variant) -> None:
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
            epoch's batches (steps, batch size) for example. On a GPU those that lie on the host are moved there, each
            in one copy; numbers, of which there is one for each step, stay on the host.
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
        columns = zip(*(leaves_of(portion) for portion in portions), strict=True)
        return rebuilt(portions[0], (_joined(column) for column in columns))

    def portions(self, *arguments: Any) -> Iterator[Any]:
        """As `epoch`, in portions of about 50 ms: yields the results of each, so that a caller may stop or report."""
        return (portion for _, portion in self._portions(*arguments))

    def _portions(self, *arguments: Any) -> Iterator[tuple[int, Any]]:
        """The number of steps in each portion, and their results."""
        refuse("an epoch of another step", "Call that step by itself.")
        arrays = [_where_steps_run(x) for x in arguments]
        lengths = {x.shape[:1] for x in arrays}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            expected = "arrays of one length, one entry for each step"
            got = "shapes " + (", ".join(str(x.shape) for x in arrays) or "of no array")
            raise ShapeError("epoch", "arguments", expected=expected, got=got)
        done, steps = 0, len(arrays[0])
        while done < steps:
            with self._lock:
                try:
                    count, portion = self._portion([x[done:] for x in arrays] if done else arrays)
                except Exception as error:
                    error.add_note(f"It is step {done + self._rounds_done} of steps 0 to {steps - 1}.")
                    raise
            done += count
            yield count, portion

    def _portion(self, arrays: Sequence[Any]) -> tuple[int, Any]:
        """Run the step on the first entries of these arrays: on some 50 ms of them by its plan, or on one without."""
        first = tuple(x[0, ...] for x in arrays)
        variant = self._variant((), first)
        self._rounds_done = 0
        if variant is None or variant.plan is None:
            returned = self._find_and_run(first, {})
            return 1, rebuilt(returned, iter([array_of(leaf)[None] for leaf in leaves_of(returned)]))
        count, started = min(len(arrays[0]), max(1, int(SECONDS_A_CALL / variant.seconds))), time.perf_counter()
        try:
            results = variant.repeat([x[:count] for x in arrays])
        finally:
            self._rounds_done = variant.plan.rounds_done
        variant.seconds = max((time.perf_counter() - started) / count, 1e-9)
        return count, results


def _where_steps_run(argument: Any) -> Any:
    """An epoch's argument as an array whose entries lie where the step takes them."""
    if on_device(argument):
        return argument
    array = np.asarray(argument)
    return to_device(array) if here.on_device and array.ndim > 1 else array


def _joined(portions: Sequence[Any]) -> Any:
    """One result's portions as one array."""
    return portions[0] if len(portions) == 1 else module_of(portions[0]).concatenate(portions)
