"""A machine that makes, reuses, changes, differentiates and compiles tensors in any order, against plain NumPy.

The model beside each tensor is its values in float64 and how they change with every leaf: a Jacobian, carried forwards
from the leaves, so that it shares nothing with a tape that is walked backwards. What the tape refuses (a graph that was
used, an input that was changed since, a value without a history) the model knows from the rules in the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, PlanError, ShapeError, TapeError
from minikd.kernels import BACKENDS, current_backend
from minikd.tape import is_recording

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
LARGEST = 50.0  # of values, and of slopes by the square: beyond, rounding says nothing about rules
MOST_TENSORS = 12
SHAPES = ((), (3,), (2, 3), (1, 3))
LABELS = np.array([2, 0])

# --- operations: what they are of arrays, and which inputs backward looks at again ---


def always(*shapes: Sequence[int]) -> bool:
    return True


def unless_broadcast(own: Sequence[int], result: Sequence[int]) -> bool:
    return own == result


def unless_a_vector(own: Sequence[int], result: Sequence[int]) -> bool:
    return len(own) == 2


class Operation(NamedTuple):
    """What it is `of` tensors, and `plain` of arrays, which may be complex.

    Backward `reads` these inputs, or a copy where one is not taken as it is (`direct` of its shape and the result's);
    `takes` says which shapes are of use.
    """

    of: Callable[..., Any]
    plain: Callable[..., Any]
    reads: tuple[int, ...] = ()
    takes: Callable[[Sequence[int]], bool] = always
    inputs: int = 1
    direct: Callable[[Sequence[int], Sequence[int]], bool] = always


def share_of_largest(x: Any, axis: int | None = None) -> Any:
    """The largest elements, of which equal ones share in equal parts."""
    winners = x.real == x.real.max(axis=axis, keepdims=True)
    return (x * winners / winners.sum(axis=axis, keepdims=True)).sum(axis=axis)


def larger(a: Any, b: Any) -> Any:
    return np.where(a.real > b.real, a, np.where(a.real < b.real, b, (a + b) / 2))


def plain_log_softmax(x: Any) -> Any:
    x = x - x.real.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def rows(shape: Sequence[int]) -> bool:
    return len(shape) > 0


def tables(shape: Sequence[int]) -> bool:
    return len(shape) == 2


def scores(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[1] == 3


def hard_loss(x: Any) -> Any:
    return F.cross_entropy(x, np.resize(LABELS, len(x)))


def plain_hard_loss(x: Any) -> Any:
    rows = np.resize(LABELS, len(x))
    return -plain_log_softmax(x)[np.arange(len(x)), rows].mean()


def plain_distillation(x: Any) -> Any:
    """Both terms by half at T = 2, with a teacher that knows nothing: Σ q·log q - q·log p with q = 1/C."""
    soft = (-np.log(x.shape[1]) - plain_log_softmax(x / 2).mean(axis=1)).mean()
    return 0.5 * plain_hard_loss(x) + 0.5 * 4 * soft


def distillation(x: Any) -> Any:
    return F.distillation_loss(x, np.zeros(x.shape), np.resize(LABELS, len(x)), temperature=2.0)


SINGLE = {
    "-x": Operation(lambda x: -x, lambda x: -x),
    "exp x": Operation(lambda x: x.exp(), np.exp),
    "tanh x": Operation(lambda x: x.tanh(), np.tanh),
    "sigmoid x": Operation(lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    "relu x": Operation(lambda x: x.relu(), lambda x: x * (x.real > 0)),
    "|x|": Operation(abs, lambda x: x * np.sign(x.real), (0,)),
    "x / 2": Operation(lambda x: 0.5 * x, lambda x: x / 2),
    "1 - x": Operation(lambda x: 1 - x, lambda x: 1 - x),
    "x³": Operation(lambda x: x**3, lambda x: x**3, (0,)),
    "x·x": Operation(lambda x: x * x, lambda x: x * x, (0,)),
    "log(x² + 1)": Operation(lambda x: (x * x + 1.0).log(), lambda x: np.log(x * x + 1), (0,)),
    "Σ x": Operation(lambda x: x.sum(), lambda x: x.sum()),
    "mean x": Operation(lambda x: x.mean(), lambda x: x.mean()),
    "max x": Operation(lambda x: x.max(), share_of_largest, (0,)),
    "max of rows": Operation(lambda x: x.max(axis=-1), lambda x: share_of_largest(x, -1), (0,), rows),
    "Σ of rows": Operation(lambda x: x.sum(axis=-1), lambda x: x.sum(axis=-1), (), rows),
    "Σ of columns": Operation(
        lambda x: x.sum(axis=0, keepdims=True), lambda x: x.sum(axis=0, keepdims=True), (), tables
    ),
    "xᵀ": Operation(lambda x: x.T, lambda x: x.T),
    "flat x": Operation(lambda x: x.reshape(-1), lambda x: x.reshape(-1)),
    "softmax x": Operation(F.softmax, lambda x: np.exp(plain_log_softmax(x)), (), rows),
    "log softmax x": Operation(F.log_softmax, plain_log_softmax, (), rows),
    "row 0 twice": Operation(lambda x: x.take([0, 0]), lambda x: x[[0, 0]], (), rows),
}
LOSSES = {
    "a hard loss": Operation(hard_loss, plain_hard_loss, (), scores),
    "a distillation loss": Operation(distillation, plain_distillation, (), scores),
}
PAIRS = {
    "a + b": Operation(lambda a, b: a + b, lambda a, b: a + b, (), always, 2),
    "a - b": Operation(lambda a, b: a - b, lambda a, b: a - b, (), always, 2),
    "a·b": Operation(lambda a, b: a * b, lambda a, b: a * b, (0, 1), always, 2, unless_broadcast),
    "a / b": Operation(lambda a, b: a / b, lambda a, b: a / b, (1,), always, 2, unless_broadcast),
    "max(a, b)": Operation(lambda a, b: a.maximum(b), larger, (0, 1), always, 2, unless_broadcast),
    "a b": Operation(lambda a, b: a @ b, lambda a, b: a @ b, (0, 1), rows, 2, unless_a_vector),
}
OPERATIONS = SINGLE | LOSSES | PAIRS


def jacobian(plain: Callable[..., Any], inputs: Sequence[Any], k: int) -> Any:
    """How every element of a function's result changes with every element of its input k, by imaginary steps."""
    columns, tiny = [], 1e-30
    for place in np.ndindex(inputs[k].shape):
        moved = [np.array(x, complex) for x in inputs]
        moved[k][place] += tiny * 1j
        columns.append(np.imag(plain(*moved)).ravel() / tiny)
    return np.stack(columns, axis=1)


# --- the model ---


@dataclass(eq=False)
class Step:
    """What was recorded of an operation: its inputs, and which of them backward reads, in which state."""

    inputs: Sequence[Value]
    reads: Sequence[tuple[Value, int]]
    used: bool = False

    def reachable(self) -> list[Step]:
        """This and all before it, each once."""
        found, waiting = [], [self]
        while waiting:
            step = waiting.pop()
            if step not in found:
                found.append(step)
                waiting += [x.step for x in step.inputs if x.step is not None]
        return found


@dataclass(eq=False)
class Value:
    """A tensor's model: values, gradient, and `slopes`, the Jacobian of the values by each leaf."""

    array: Any
    needs_grad: bool
    step: Step | None = None
    slopes: dict[Value, Any] = field(default_factory=dict)
    grad: Any = None
    version: int = 0
    arena: Any = None

    def __post_init__(self) -> None:
        if self.step is None and self.needs_grad:
            self.slopes = {self: np.eye(self.array.size)}

    def refuses_backward(self) -> bool:
        if not self.needs_grad:
            return True
        steps = [] if self.step is None else self.step.reachable()
        return any(s.used or any(x.version != version for x, version in s.reads) for s in steps)

    def backward(self, seed: Any, retain: bool = False) -> None:
        for leaf, slope in self.slopes.items():
            gradient = (seed.ravel() @ slope).reshape(leaf.array.shape)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        if self.step is not None and not retain:
            for step in self.step.reachable():
                step.used = True


def applied(operation: Operation, inputs: Sequence[Value], recording: bool) -> Value | None:
    """The model of an operation's result, or None where its numbers grow too large to compare."""
    arrays = [x.array for x in inputs]
    with np.errstate(all="ignore"):
        array = np.asarray(operation.plain(*arrays))
        if not (np.abs(array) < LARGEST).all():
            return None
        slopes: dict[Value, Any] = {}
        for k, x in enumerate(inputs):
            own = jacobian(operation.plain, arrays, k) if recording and x.slopes else None
            for leaf, slope in x.slopes.items() if own is not None else ():
                slopes[leaf] = slopes.get(leaf, 0) + own @ slope
    if not all((np.abs(slope) < LARGEST**2).all() for slope in slopes.values()):
        return None
    if not slopes:
        return Value(array, False)
    read = (inputs[k] for k in operation.reads if operation.direct(arrays[k].shape, array.shape))
    reads = [(x, x.version) for x in read]
    return Value(array, True, Step([x for x in inputs if x.slopes], reads), slopes)


class Pair(NamedTuple):
    """A tensor and its model."""

    tensor: kd.Tensor
    model: Value


@dataclass(eq=False)
class Trainer:
    """An optimizer, with what its docstring says it does: v = μ·v + g, w -= lr·v, where no gradient counts as 0."""

    optimizer: Any
    parameters: Sequence[Value]
    lr: float
    momentum: float
    v: list[Any]

    def can_step(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        for k, p in enumerate(self.parameters):
            p.grad = np.zeros(p.array.shape) if p.grad is None else p.grad
            self.v[k] = self.momentum * self.v[k] + p.grad
            p.array = p.array - self.lr * self.v[k]
            p.version += 1


# --- steps to be compiled: what they compute, and what they do ---

PRODUCT = Operation(lambda x, w: (x * w * w).tanh().sum(), lambda x, w: np.tanh(x * w * w).sum())


@dataclass(eq=False)
class Compiled:
    """A compiled step of an argument x and a leaf w; `counts` holds which calls wait to be confirmed, by their look."""

    kind: str
    step: Any
    w: Pair
    trainer: Trainer | None = None
    calls: int = 0
    waiting: set[Any] = field(default_factory=set)


def compiled(kind: str, w: Pair, trainer: Trainer | None) -> Compiled:
    """A step of this kind."""
    tensor, count = w.tensor, [0]

    def value(x: Any) -> Any:
        return PRODUCT.of(kd.Tensor(x) if isinstance(x, np.ndarray) else x, tensor)

    def accumulate(x: Any) -> Any:
        loss = value(x)
        loss.backward()
        return {"loss": loss, "again": (loss * 2.0, loss)}

    def train(x: Any) -> Any:
        assert trainer is not None
        loss = value(x)
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        return loss

    def look(x: Any) -> Any:
        loss = value(x)
        return loss * (2.0 if loss.item() < 0 else 1.0)

    def counted(x: Any) -> Any:
        count[0] += 1
        return value(x) * float(count[0])

    functions = {"value": value, "accumulate": accumulate, "train": train, "look": look, "counted": counted}
    steps = {kind: kd.compile(function) for kind, function in functions.items()}
    steps["look, with a way out"] = kd.compile(look, fallback=True)
    return Compiled(kind, steps[kind], w, trainer)


KINDS = ("value", "accumulate", "train", "look", "look, with a way out", "counted")


# --- the machine ---

AVAILABLE = [name for name, backend in BACKENDS.items() if backend.on_host and not backend.missing()]
numbers = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
which = st.integers(0, 3) | st.integers(0, MOST_TENSORS - 1)
others = st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), which, which), max_size=6)
first = st.sampled_from(sorted(n for n in OPERATIONS if OPERATIONS[n].reads)) | st.sampled_from(sorted(OPERATIONS))
programs = st.tuples(first, st.integers(0, 1), which).flatmap(lambda head: others.map(lambda rest: [head, *rest]))


def arrays_of(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    size = int(np.prod(shape))
    return st.lists(numbers, min_size=size, max_size=size).map(lambda x: np.array(x).reshape(shape))


some_array = st.sampled_from(SHAPES).flatmap(arrays_of)


class Machine(RuleBasedStateMachine):
    """Tensors and their models, optimizers, and compiled steps; each rule does one thing to both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = current_backend()
        self.layout = 0  # how often a backend was chosen: a plan holds for one choice
        self.contexts: list[ExitStack] = []
        self.pairs: list[Pair] = []
        self.trainers: list[Trainer] = []
        self.compiled: list[Compiled] = []

    def teardown(self) -> None:
        self.record_again()
        kd.use_backend(self.backend)

    def pick(self, number: int) -> Pair:
        """One of the pairs, counted from the youngest, so that small numbers build upon what was just made."""
        return self.pairs[-1 - number % len(self.pairs)]

    def leaves(self) -> list[Pair]:
        return [p for p in self.pairs if p.model.step is None and p.model.needs_grad]

    def keep(self, tensor: kd.Tensor, model: Value) -> None:
        """One more pair, after the tensor was found to be what the model says; the oldest makes place for it."""
        self.compare(tensor, model)
        model.array = tensor.numpy().copy()  # so that ties stay ties, and rounding does not add up
        self.pairs.append(Pair(tensor, model))
        if len(self.pairs) > MOST_TENSORS:
            del self.pairs[0]

    def compare(self, tensor: kd.Tensor, model: Value) -> None:
        assert tensor.requires_grad == model.needs_grad
        assert tensor.shape == model.array.shape
        np.testing.assert_allclose(tensor.numpy(), model.array, **CLOSE)
        assert (tensor.grad is None) == (model.grad is None)
        if model.grad is not None:
            scale = 1 + np.abs(model.grad).max()
            np.testing.assert_allclose(tensor.grad.numpy(), model.grad, rtol=1e-9, atol=1e-9 * scale)

    # --- tensors ---

    @initialize(w=arrays_of((3,)), array=arrays_of((3,)), rows=arrays_of((2, 3)), trained=st.booleans())
    def begin(self, w: Any, array: Any, rows: Any, trained: bool) -> None:
        """With three leaves, one of which compiled steps of all kinds know, and an optimizer of it or none yet."""
        for values in (w, array, rows):
            self.keep(kd.Tensor(values, requires_grad=True), Value(values, True))
        first = self.pairs[0]
        if trained:
            self.make_optimizer_of([first], 0.5)
        trainer = self.trainers[0] if trained else None
        self.compiled = [compiled(kind, first, trainer) for kind in KINDS if trained or kind != "train"]

    @rule(array=some_array, needs_grad=st.booleans())
    def make(self, array: Any, needs_grad: bool) -> None:
        tensor = kd.Tensor(array, requires_grad=needs_grad)
        self.keep(tensor, Value(array.copy(), needs_grad))
        array[...] = 99.0  # which is the source's own affair

    @rule(number=which)
    def detach(self, number: int) -> None:
        tensor, model = self.pick(number)
        self.keep(tensor.detach(), Value(model.array, False))

    @rule(
        program=programs,
        number=which,
        scale=numbers,
        between=st.sampled_from(["nothing", "a write", "an arena", "a step", "a compiled step", "another backend"]),
        retain=st.booleans(),
        ways_back=st.integers(0, 2),
    )
    def compute_and_go_back(
        self, program: list[tuple[str, int, int]], number: int, scale: float, between: str, retain: bool, ways_back: int
    ) -> None:
        """From a leaf to a result and back, with something in between that may touch the leaf."""
        leaves = self.leaves()
        if not leaves:
            return
        if ways_back:
            self.record_again()
        leaf = leaves[number % len(leaves)]
        self.pairs.remove(leaf)
        self.pairs.append(leaf)
        self.compute(program)
        result = self.pairs[-1]
        self.happen(between, leaf, scale)
        self.go_back(result, retain, scale, ways_back)

    def happen(self, event: str, leaf: Pair, value: float) -> None:
        """One of the things that change a leaf, or where and how it is computed with."""
        if event == "another backend":
            self.switch_backend(AVAILABLE[int(2 * value) % len(AVAILABLE)])
        if event == "a write":
            self.write_into(leaf, value, True)
        if event == "an arena" and leaf.model.arena is None:
            self.make_optimizer_of([leaf], 0.0)
        own = [t for t in self.trainers if leaf.model in t.parameters]
        training = [one for one in self.compiled if one.kind == "train" and one.w.model is leaf.model]
        for _ in range(3 if event == "a compiled step" and training else 0):
            self.run(training[-1], np.ones(3), Value(np.ones(3), False))
        if event == "a step" and own:
            self.step_of(own[-1])

    def compute(self, program: list[tuple[str, int, int]]) -> None:
        """Some operations one after the other, each of any one or two tensors."""
        for name, *chosen in program:
            operation = OPERATIONS[name]
            pairs = [self.pick(number) for number in chosen[: operation.inputs]]
            if all(operation.takes(p.model.array.shape) for p in pairs):
                self.apply(operation, *pairs)

    def apply(self, operation: Operation, *pairs: Pair) -> None:
        """The result of an operation, or the error that NumPy has too where shapes do not fit."""
        try:
            result = applied(operation, [p.model for p in pairs], is_recording())
        except ValueError:
            with pytest.raises(ShapeError):
                operation.of(*(p.tensor for p in pairs))
            return
        if result is not None:
            self.keep(operation.of(*(p.tensor for p in pairs)), result)

    # --- gradients ---

    @rule(number=which, retain=st.booleans(), scale=st.none() | numbers, again=st.booleans())
    def backward(self, number: int, retain: bool, scale: float | None, again: bool) -> None:
        """Once or twice from one tensor, by a gradient of its shape, or by none, as of a scalar."""
        self.go_back(self.pick(number), retain, scale, 1 + again)

    def go_back(self, pair: Pair, retain: bool, scale: float | None, times: int) -> None:
        tensor, model = pair
        shape = model.array.shape
        seed = None if scale is None else scale * np.cos(np.arange(model.array.size)).reshape(shape)
        for _ in range(times):
            if model.needs_grad and seed is None and shape:
                with pytest.raises(ShapeError):
                    tensor.backward(retain_graph=retain)
            elif model.refuses_backward():
                with pytest.raises(TapeError):
                    tensor.backward(seed, retain_graph=retain)
            else:
                tensor.backward(seed, retain_graph=retain)
                model.backward(np.ones(()) if seed is None else seed, retain)

    @rule(number=which)
    def zero_grad(self, number: int) -> None:
        tensor, model = self.pick(number)
        tensor.zero_grad()
        model.grad = None

    # --- modes ---

    @precondition(lambda self: len(self.contexts) < 2)
    @rule()
    def stop_recording(self) -> None:
        self.contexts.append(ExitStack())
        self.contexts[-1].enter_context(kd.no_grad())

    @precondition(lambda self: self.contexts)
    @rule()
    def leave_the_innermost(self) -> None:
        self.contexts.pop().close()

    def record_again(self) -> None:
        while self.contexts:
            self.contexts.pop().close()

    @rule(name=st.sampled_from(AVAILABLE))
    def switch_backend(self, name: str) -> None:
        kd.use_backend(name)
        self.layout += 1

    # --- changes in place ---

    @rule(number=which, value=numbers, inside=st.booleans())
    def write(self, number: int, value: float, inside: bool) -> None:
        self.write_into(self.pick(number), value, inside)

    def write_into(self, pair: Pair, value: float, inside: bool) -> None:
        """Into all elements: allowed where no gradient can be falsified, and noticed by what read the old ones."""
        tensor, model = pair
        with ExitStack() as stack:
            if inside:
                stack.enter_context(kd.no_grad())
            if model.step is not None or (model.needs_grad and is_recording()):
                with pytest.raises(TapeError):
                    tensor[...] = value
                return
            tensor[...] = value
        model.array = np.full(model.array.shape, value)
        model.version += 1

    # --- optimizers ---

    @rule(numbers=st.lists(which, min_size=1, max_size=2), momentum=st.sampled_from([0.0, 0.5]))
    def make_optimizer(self, numbers: list[int], momentum: float) -> None:
        leaves = self.leaves()
        if not leaves:
            return
        self.make_optimizer_of([leaves[k % len(leaves)] for k in numbers], momentum)

    def make_optimizer_of(self, chosen: Sequence[Pair], momentum: float) -> None:
        """It moves leaves into an arena, unless another has one of them; two optimizers may share one arena."""
        models, tensors = [p.model for p in chosen], [p.tensor for p in chosen]
        arena = models[0].arena
        shared = arena is not None and set(arena) == set(models)
        if not shared and (len(set(models)) < len(models) or any(m.arena is not None for m in models)):
            with pytest.raises(ArgumentError):
                kd.optim.SGD(tensors, 0.1, momentum=momentum)
            return
        optimizer = kd.optim.SGD(tensors, 0.1, momentum=momentum)
        parameters = arena if shared else models
        for m in models:
            m.arena = parameters
        self.trainers.append(
            Trainer(optimizer, parameters, 0.1, momentum, [np.zeros(p.array.shape) for p in parameters])
        )

    @precondition(lambda self: self.trainers)
    @rule(number=which, lr=st.sampled_from([0.1, 0.1, 0.0, 0.25]))
    def step(self, number: int, lr: float) -> None:
        trainer = self.trainers[number % len(self.trainers)]
        trainer.optimizer.lr = trainer.lr = lr
        self.step_of(trainer)

    def step_of(self, trainer: Trainer) -> None:
        if not trainer.can_step():
            with pytest.raises(TapeError):
                trainer.optimizer.step()
            return
        trainer.optimizer.step()
        trainer.step()

    @precondition(lambda self: self.trainers)
    @rule(number=which)
    def forget_gradients(self, number: int) -> None:
        trainer = self.trainers[number % len(self.trainers)]
        trainer.optimizer.zero_grad()
        trainer.zero_grad()

    # --- compiled steps ---

    @rule(number=which, kind=st.sampled_from(KINDS))
    def compile(self, number: int, kind: str) -> None:
        leaves = [p for p in self.leaves() if p.model.array.shape == (3,)]
        if not leaves:
            return
        w = leaves[number % len(leaves)]
        own = [t for t in self.trainers if w.model in t.parameters]
        if kind != "train" or own:
            self.compiled.append(compiled(kind, w, own[-1] if kind == "train" else None))

    @precondition(lambda self: self.compiled)
    @rule(
        number=which,
        array=some_array,
        events=st.lists(
            st.sampled_from(["nothing", "zero_grad", "a write", "an arena", "a step"]), min_size=1, max_size=6
        ),
        value=numbers,
        recorded=st.booleans(),
    )
    def call(self, number: int, array: Any, events: list[str], value: float, recorded: bool) -> None:
        """A few times with an array: the second time confirms what the first recorded, the third may replay it."""
        if recorded:
            self.record_again()
        one = self.compiled[number % len(self.compiled)]
        for event in ("nothing", *events):
            self.happen(event, one.w, value)
            if event == "zero_grad":
                one.w.tensor.zero_grad()
                one.w.model.grad = None
            self.run(one, array, Value(array, False))

    @precondition(lambda self: self.compiled)
    @rule(number=which, argument=which, times=st.integers(1, 3))
    def call_with_a_tensor(self, number: int, argument: int, times: int) -> None:
        one, (tensor, model) = self.compiled[number % len(self.compiled)], self.pick(argument)
        for _ in range(times):
            if model.step is not None and one.kind != "look, with a way out":
                with pytest.raises(PlanError, match="an argument"):
                    one.step(tensor)
            elif model.array.ndim < 3:
                self.run(one, tensor, model)

    def run(self, one: Compiled, argument: Any, x: Value) -> None:
        """A call of a compiled step, and what it does to the model."""
        try:
            loss = applied(PRODUCT, [x, one.w.model], is_recording())
        except ValueError:
            one.calls += 1
            with pytest.raises(ShapeError):
                one.step(argument)
            return
        if loss is None:
            return
        if one.kind in ("accumulate", "train") and not loss.needs_grad:
            with pytest.raises(TapeError):
                one.step(argument)
            if one.kind == "train":
                one.trainer.zero_grad()
            return
        if one.kind == "look":
            with pytest.raises(PlanError, match="the number in a tensor"):
                one.step(argument)
            return
        returned = self.returned(one, argument, x)
        if returned is None:
            return
        if one.kind == "accumulate":
            loss.backward(np.ones(()))
            assert returned["again"][0].item() == 2 * returned["loss"].item()
            returned = returned["again"][1]
        elif one.kind == "train":
            one.trainer.zero_grad()
            loss.backward(np.ones(()))
            one.trainer.step()
        factor = 1.0
        if one.kind == "look, with a way out":
            factor = 2.0 if loss.array < 0 else 1.0
        elif one.kind == "counted":
            factor = float(one.calls)
        wanted = loss.array * factor
        assert isinstance(returned, kd.Tensor)
        np.testing.assert_allclose(returned.numpy(), wanted, **CLOSE)

    def returned(self, one: Compiled, argument: Any, x: Value) -> Any:
        """What the step returns; None where a number that it counts up is noticed when a second call would confirm."""
        one.calls += 1
        if one.kind != "counted":
            return one.step(argument)
        data = (isinstance(argument, kd.Tensor), x.array.shape)
        leaves = [(leaf, id(leaf.arena)) for leaf in (x, one.w.model) if leaf.needs_grad]
        look = (data, *leaves, self.layout, is_recording())
        if look not in one.waiting:
            one.waiting.add(look)
            return one.step(argument)
        one.waiting.remove(look)
        with pytest.raises(PlanError, match="does the same in every call"):
            one.step(argument)
        return None

    # --- what holds at any time ---

    @invariant()
    def tensors_are_what_the_model_says(self) -> None:
        for tensor, model in self.pairs:
            self.compare(tensor, model)
        assert is_recording() == (not self.contexts)


@pytest.mark.filterwarnings("ignore:.*look like probabilities")
def test_tensors_the_tape_and_plans_do_what_a_plain_model_says_in_any_order() -> None:
    examples = max(100, settings().max_examples)
    run_state_machine_as_test(Machine, settings=settings(max_examples=examples, stateful_step_count=50))
