"""What is written down of a step, and what cannot be: every refusal names its line, and nothing is silently frozen."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import functional as F
from minikd import nn
from minikd.errors import MinikdError, PlanError
from minikd.kernels import run
from minikd.kernels.recording import Guard, Layout, Recorder, Traced, plain, recorder, recording, traced

each_backend = pytest.mark.usefixtures("backend")


class Setting:
    """What the steps of this file work on: made anew for each."""

    def __init__(self) -> None:
        self.model = nn.MLP([4, 6, 3], seed=2)
        self.opt = kd.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.rng = np.random.default_rng(5)
        self.count = itertools.count(1)
        self.table = np.arange(20, dtype=np.float64)
        self.ids = np.arange(20, dtype=np.int32)
        self.found: list[Any] = []

    def batch(self, seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        return rng.normal(size=(5, 4)).astype(np.float32) + np.float32(0.1), rng.integers(0, 3, 5)

    def train(self, loss: Any) -> Any:
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss


Use = Callable[[Setting, Any, Any], Any]

# Each line is a step that cannot be replayed, and is refused at once.
READS: dict[str, Use] = {
    "a loss as a number": lambda s, x, y: F.cross_entropy(s.model(x), y) if s.model(x).sum().item() > 3 else s.model(x),
    "the truth of a comparison": lambda s, x, y: F.relu(x) if x.sum() > 0 else F.gelu(x),
    "the truth of a tensor": lambda s, x, y: s.model(x) if s.model(x).sum() else None,
    "float of a tensor": lambda s, x, y: s.model(x) * float(s.model(x).sum()),
    "values of a tensor": lambda s, x, y: s.model(x).numpy(),
    "the array in a tensor": lambda s, x, y: s.model(x) if s.model(x).array[0, 0] > 3 else F.relu(x),
    "a number of the array in a loss": lambda s, x, y: s.model(x) * float(F.cross_entropy(s.model(x), y).array),
    "an array of a tensor": lambda s, x, y: np.asarray(s.model(x)),
    "an element of a tensor": lambda s, x, y: [s.model(x), kd.no_grad()(lambda: s.model(x)[0])()],
    "a list of a tensor's rows": lambda s, x, y: kd.no_grad()(lambda: [float(r[0]) for r in s.model(x)])(),
    "rows of a tensor by an array": lambda s, x, y: s.model(x)[y],
    "float of an array": lambda s, x, y: s.model(x) * float(F.cross_entropy(x, y)),
    "int of an array": lambda s, x, y: F.relu(x) * 1 if int(F.correct_count(x[:, :3].reshape(5, 3), y)) > 2 else x,
    "int of a label": lambda s, x, y: int(y[0]),
    "round": lambda s, x, y: round(F.cross_entropy(x, y), 2),
    "a range": lambda s, x, y: list(range(F.correct_count(x, y))),
    "truth of an array": lambda s, x, y: bool(F.correct_count(x, y)),
    "exp": lambda s, x, y: s.model(np.exp(x)),
    "a product": lambda s, x, y: s.model(x * 2),
    "a product from the left": lambda s, x, y: s.model(np.float32(2) * x),
    "a matrix product": lambda s, x, y: x @ s.model.layers[0].weight.shape,
    "in place": lambda s, x, y: np.add(x, 1, out=x),
    "another dtype": lambda s, x, y: s.model(x.astype(np.float64)),
    "rows of an argument": lambda s, x, y: s.model(x[y]),
    "one row": lambda s, x, y: x[0],
    "a mask": lambda s, x, y: x[y > 0],
    "a mean": lambda s, x, y: x.mean(),
    "numpy's mean": lambda s, x, y: np.mean(x),
    "where": lambda s, x, y: np.where(x > 0, x, 0),
    "joined": lambda s, x, y: np.concatenate([x, x]),
    "a copy": lambda s, x, y: s.model(x.copy()),
    "a list": lambda s, x, y: x.tolist(),
    "going through": lambda s, x, y: [r.shape for r in x],
    "written into": lambda s, x, y: x.__setitem__(slice(0, 1), 0),
    "equality": lambda s, x, y: bool((x == x).all()),
    "one-hot": lambda s, x, y: np.eye(3, dtype=np.float32)[y.argmax()],
    "an assignment": lambda s, x, y: kd.Tensor(x).__setitem__(0, 7.0),
    "membership": lambda s, x, y: 2 in y,
    "complex of an array": lambda s, x, y: complex(F.cross_entropy(x, y)),
    "the largest of Python": lambda s, x, y: max(y),
    "comparison of Python": lambda s, x, y: y if F.correct_count(x, y) > 2 else x,
    "sorted": lambda s, x, y: sorted(y),
    "the buffer's bytes": lambda s, x, y: x.tobytes(),
    "a norm": lambda s, x, y: np.linalg.norm(x),
    "a nonzero": lambda s, x, y: np.count_nonzero(y),
    "a dot": lambda s, x, y: np.dot(x, x.T),
    "an einsum": lambda s, x, y: np.einsum("ij->i", x),
    "the learning rate": lambda s, x, y: s.train(F.cross_entropy(s.model(x), y) * s.opt.lr),
    "the number of steps": lambda s, x, y: s.train(F.cross_entropy(s.model(x), y) * float(s.opt.steps)),
    "the state of an optimizer": lambda s, x, y: s.opt.state_dict(),
    "a state loaded into an optimizer": lambda s, x, y: s.opt.load_state_dict({"lr": 0.1, "steps": 0, **s.opt.state}),
    "the counters of a model": lambda s, x, y: s.model.counters(),
    "the steps of dropout": lambda s, x, y: nn.Dropout(0.5).step,
    "an optimizer made inside": lambda s, x, y: kd.optim.SGD(nn.MLP([4, 3]).parameters(), 0.1),
    "predictions that are read": lambda s, x, y: s.model.predict(x)[0] + 1,
    "probabilities that are read": lambda s, x, y: s.model.predict_proba(x).max(),
    "logits that are read": lambda s, x, y: s.model.logits(x) + 1,
    "a converted data set": lambda s, x, y: F.take(s.table, y) if F.take(s.ids, y) is None else None,
    "a strided data set": lambda s, x, y: F.relu(s.table[::2]),
    "an operand of another dtype": lambda s, x, y: s.model(x) * s.table[:3],
    "kept in a module": lambda s, x, y: setattr(s.model, "last", s.model(x)),
    "a number of a tensor in take_scaled": lambda s, x, y: F.take_scaled(
        np.ones((9, 2), np.uint8), y, np.array(2.0), 0.0
    ),
}

# Each of these does something else in each call, which the second recording shows.
DIFFERS: dict[str, Use] = {
    "noise": lambda s, x, y: s.model(x) + s.rng.normal(size=(5, 3)).astype(np.float32),
    "noise on weights": lambda s, x, y: F.linear(x, s.rng.normal(size=(2, 4)).astype(np.float32)),
    "an array made here": lambda s, x, y: s.model(x) + np.ones((5, 3), np.float32),
    "a number that counts": lambda s, x, y: s.model(x) * float(next(s.count)),
    "a number that is added": lambda s, x, y: s.model(x) + next(s.count),
    "a temperature that grows": lambda s, x, y: F.softmax(x, temperature=float(next(s.count))),
    "a learning rate that falls": lambda s, x, y: [setattr(s.opt, "lr", 1 / next(s.count)), s.train(s.model(x).sum())],
    "a power": lambda s, x, y: s.model(x).exp() ** next(s.count),
    "a smoothing": lambda s, x, y: F.cross_entropy(s.model(x), y, label_smoothing=0.1 / next(s.count)),
    "more and more operations": lambda s, x, y: [F.relu(x) for _ in range(next(s.count))],
    "now this, now that": lambda s, x, y: F.relu(x) if next(s.count) % 2 else F.gelu(x),
    "another slice": lambda s, x, y: s.model(x)[: next(s.count)],
    "a layer made here": lambda s, x, y: F.linear(x, kd.Tensor(np.ones((2, 4), np.float32))),
    "a list as rows": lambda s, x, y: F.take(x, [0, 1]),
    "a dropout step that counts": lambda s, x, y: F.dropout(x, 0.5, step=next(s.count)),
    "a rounding that grows": lambda s, x, y: F.fake_quantise(x, float(next(s.count))),
    "a step of moves that counts": lambda s, x, y: F.shift_images(x, (2, 2), next(s.count), most=1),
    "a row of data": lambda s, x, y: s.model(x) + np.float32(s.table)[next(s.count) :][:3],
}

# These return what no operation computed.
RETURNS: dict[str, Use] = {
    "an array made by NumPy": lambda s, x, y: np.arange(3),
    "a number that counts": lambda s, x, y: (F.relu(x), next(s.count)),
    "a NumPy number that counts": lambda s, x, y: (F.relu(x), np.float32(next(s.count))),
    "an object with tensors": lambda s, x, y: SimpleNamespace(loss=s.model(x)),
    "a set": lambda s, x, y: {s.model(x)},
    "a generator": lambda s, x, y: (z for z in (s.model(x),)),
    "an object that cannot be compared": lambda s, x, y: [{"a": s.rng}, Incomparable()],
    "values of a model": lambda s, x, y: s.model.state_dict(),
}


class Incomparable:
    """An object whose comparison fails."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("on purpose")


def line_of(use: Use) -> str:
    return inspect.getsource(use).splitlines()[0].strip()


def parametrized(table: dict[str, Use]) -> Any:
    return pytest.mark.parametrize("name", table)


@parametrized(READS)
def test_what_cannot_be_replayed_is_refused_with_its_line(name: str) -> None:
    s = Setting()
    before = [p.array.copy() for p in s.model.parameters()]
    step = kd.compile(lambda x, y: READS[name](s, x, y))
    for seed in range(2):
        with pytest.raises(PlanError) as caught:
            step(*s.batch(seed))
        text = str(caught.value)
        assert "test_recording.py, line" in text
        assert line_of(READS[name]) in text
        assert "as they were before the step" in " ".join(caught.value.__notes__)
    for p, value in zip(s.model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.array, value)


# What would be made anew in each call, unseen by the plan, with what is said of it.
CONVERTED: dict[str, Use] = {
    "relu: u converted from int32 to float32": lambda s, x, y: F.relu(s.ids),
    "relu: u converted from float64 to float64, or made contiguous": lambda s, x, y: F.relu(s.table[::2]),
    "cross_entropy: logits converted from int32 to float32": lambda s, x, y: F.cross_entropy(s.ids[None, :3], y[:1]),
    "cross_entropy: target converted from int32 to int64": lambda s, x, y: F.cross_entropy(x, s.ids[:5]),
    "linear: w converted from float64 to float32": lambda s, x, y: F.linear(x, s.table[:8].reshape(2, 4)),
    "linear: w converted from int32 to float32": lambda s, x, y: F.linear(x, s.ids[:8].reshape(2, 4)),
    "add: operand converted from int32 to float32": lambda s, x, y: kd.Tensor(x) + s.ids[:4],
}


@parametrized(CONVERTED)
def test_a_conversion_in_a_step_is_refused_by_the_name_of_the_argument(name: str) -> None:
    s = Setting()
    with pytest.raises(PlanError, match=f"got {name}"):
        kd.compile(lambda x, y: CONVERTED[name](s, x, y))(*s.batch(0))


@parametrized(DIFFERS)
def test_what_differs_from_call_to_call_is_refused_at_the_second(name: str) -> None:
    s = Setting()
    before = [p.array.copy() for p in s.model.parameters()]
    step = kd.compile(lambda x, y: DIFFERS[name](s, x, y))
    step(*s.batch(0))
    with pytest.raises(PlanError, match="does the same in every call") as caught:
        step(*s.batch(1))
    assert "test_recording.py, line" in str(caught.value)
    assert line_of(DIFFERS[name]) in str(caught.value)
    same = all(np.array_equal(p.array, value) for p, value in zip(s.model.parameters(), before, strict=True))
    assert ("as they were before the step" if same else "have changed") in " ".join(caught.value.__notes__)


@parametrized(RETURNS)
def test_a_result_that_no_operation_computed_is_refused_at_the_second_call(name: str) -> None:
    s = Setting()
    step = kd.compile(lambda x, y: RETURNS[name](s, x, y))
    step(*s.batch(0))
    with pytest.raises(PlanError, match=r"results of operations.*test_recording\.py, line"):
        step(*s.batch(1))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or which error it raises, to be compared."""
    try:
        value = call()
    except Exception as error:
        return type(error), str(error)
    return comparable(value)


def comparable(value: Any) -> Any:
    if isinstance(value, kd.Tensor):
        return "tensor", value.array.tobytes()
    if isinstance(value, np.ndarray | np.generic):
        return "array", value.tobytes()
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items()}
    if isinstance(value, tuple | list | set):
        return [comparable(v) for v in value]
    return value if isinstance(value, int | float | str | None) else type(value).__name__


@each_backend
@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@pytest.mark.parametrize("name", [*READS, *DIFFERS, *RETURNS])
def test_with_a_fallback_every_such_step_runs_as_it_stands_for_ever(name: str) -> None:
    use = {**READS, **DIFFERS, **RETURNS}[name]
    eager, other = Setting(), Setting()
    step = kd.compile(lambda x, y: use(other, x, y), fallback=True)
    for seed in range(5):
        wanted = outcome(lambda seed=seed: use(eager, *eager.batch(seed)))
        assert outcome(lambda seed=seed: step(*other.batch(seed))) == wanted
        pairs = zip(eager.model.parameters(), other.model.parameters(), strict=True)
        assert all(np.array_equal(a.array, b.array) for a, b in pairs)
    assert step.plans == []


def test_a_refusal_that_the_step_swallows_is_raised_all_the_same() -> None:
    def step(x: Any) -> Any:
        try:
            factor = float(x.sum())
        except Exception:
            factor = 0.0
        return F.relu(x) if factor > 0 else F.gelu(x)

    with pytest.raises(PlanError, match=r"factor = float\(x\.sum\(\)\)"):
        kd.compile(step)(np.ones(3, np.float32))
    easy = kd.compile(step, fallback=True)
    for x in (np.ones(3, np.float32), -np.ones(3, np.float32)):
        np.testing.assert_array_equal(easy(x), step(x))


def test_the_note_says_that_parameters_had_changed_if_they_had() -> None:
    s = Setting()

    def step(x: Any, y: Any) -> Any:
        loss = s.train(F.cross_entropy(s.model(x), y))
        return float(loss)

    before = s.model.layers[0].weight.array.copy()
    with pytest.raises(PlanError, match=r"return float\(loss\)") as caught:
        kd.compile(step)(*s.batch(0))
    assert "the parameters had changed by then" in " ".join(caught.value.__notes__)
    assert not np.array_equal(s.model.layers[0].weight.array, before)


def test_a_fallback_says_why_it_is_one() -> None:
    s = Setting()
    step = kd.compile(lambda x, y: x.mean(), fallback=True)
    for seed in range(3):
        step(*s.batch(seed))
    assert [str(r) for r in step.refusals if "array.mean" in str(r)]


@pytest.mark.parametrize("argument", [[1.0, 2.0], {"a": 1}, (np.ones(2), 1), {1, 2}], ids=repr)
def test_arguments_that_hold_arrays_out_of_sight_are_refused_or_fall_back(argument: Any) -> None:
    def step(values: Any) -> Any:
        return F.relu(np.float32(1.0 * len(values)))

    with pytest.raises(PlanError, match="an argument must be an array, a tensor, or a value"):
        kd.compile(step)(argument)
    easy = kd.compile(step, fallback=True)
    assert [float(easy(argument)) for _ in range(3)] == [len(argument)] * 3


def test_without_confirmation_the_first_call_is_the_plan() -> None:
    step = kd.compile(lambda x: F.relu(x), confirm=False)
    x = np.float32([-1, 2])
    np.testing.assert_array_equal(step(x), [0, 2])
    assert len(step.plans) == 1
    np.testing.assert_array_equal(step(-x), [1, 0])


def test_compile_takes_a_function_with_or_without_options() -> None:
    @kd.compile
    def one(x: Any) -> Any:
        """Says something."""
        return F.relu(x)

    @kd.compile(fallback=True)
    def two(x: Any) -> Any:
        return F.relu(x)

    assert (one.__name__, one.__doc__) == ("one", "Says something.")
    assert two.options.fallback
    with pytest.raises(MinikdError, match="a function"):
        kd.compile(3)


# --- what may be done with an argument ---


LOOKS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: x.shape,
    "dtype": lambda x: str(x.dtype),
    "ndim and size": lambda x: (x.ndim, x.size, len(x), x.nbytes, x.itemsize),
    "numpy's looks": lambda x: (np.shape(x), np.ndim(x), np.size(x)),
    "a view": lambda x: x.reshape(-1)[2:5],
    "text": lambda x: len({str(x), f"{x}", repr(x)}) > 3,
    "strides": lambda x: (x.strides, x.flags.c_contiguous),
    "rows": lambda x: F.relu(x[1:3]),
    "one more axis": lambda x: F.relu(x[None, ..., None]),
    "an empty one like it": lambda x: np.empty_like(x).shape,
    "kind": lambda x: isinstance(x, np.ndarray),
}


@pytest.mark.parametrize("name", LOOKS)
def test_how_an_argument_looks_may_be_asked(name: str) -> None:
    step = kd.compile(LOOKS[name])
    for k in range(4):
        x = np.random.default_rng(k).normal(size=(4, 3)).astype(np.float32)
        assert comparable(step(x)) == comparable(LOOKS[name](x))
    assert len(step.plans) == 1


def test_values_that_are_not_known_show_neither_as_text_nor_as_numbers() -> None:
    seen: list[str] = []

    def step(x: Any, t: Any) -> Any:
        z = t * 2.0
        seen.append(f"{x} {z} {z!r} {x:}")
        return z

    kd.compile(step)(np.float32([123]), kd.Tensor(np.float32([456])))
    assert "123" not in seen[0]
    assert "912" not in seen[0]
    assert "in a step that is being recorded" in seen[0]


def test_after_the_recording_arrays_that_leaked_are_ordinary() -> None:
    leaked: list[Any] = []

    def step(x: Any) -> Any:
        leaked.append(x)
        return F.relu(x)

    kd.compile(step)(np.float32([1, 2]))
    assert type(leaked[0]) is Traced
    assert float(leaked[0].sum()) == 3
    assert (leaked[0] * 2).tolist() == [2, 4]
    assert leaked[0][0] == 1
    assert plain(leaked[0]).base is not None


# --- constants and numbers ---


@each_backend
def test_numbers_of_the_steps_own_text_are_constants() -> None:
    def step(x: Any) -> Any:
        z = kd.Tensor(x)
        return [
            z * 2,
            3 + z,
            z - np.float32(1),
            1 / (z * z + 1.5),
            (z * z) ** 2,
            z.maximum(0),
            F.dropout(z, 0.5, step=3),
        ]

    w = kd.Tensor(np.ones(3, np.float32), requires_grad=True)

    def graded(x: Any) -> Any:
        w.zero_grad()
        z = w * kd.Tensor(x)
        (z[[2, 0]] * 3 + z[1:]).sum().backward()
        return w.grad

    for function in (step, graded):
        compiled = kd.compile(function)
        for k in range(5):
            x = np.random.default_rng(k).normal(size=3).astype(np.float32)
            assert comparable(compiled(x)) == comparable(function(x))


@each_backend
def test_copies_of_tensors_are_made_in_each_run() -> None:
    w = kd.Tensor(np.float32([1, 2]))

    def step(x: Any) -> Any:
        return [w.detach(), kd.Tensor(w), kd.Tensor(x) * w.detach(), kd.Tensor(x)]

    compiled = kd.compile(step)
    for k in range(5):
        with kd.no_grad():
            w[...] = np.float32([k, -k])
        assert comparable(compiled(np.float32([k, 3]))) == comparable(step(np.float32([k, 3])))


@each_backend
def test_data_of_before_is_read_where_it_is() -> None:
    z, y = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 2, 0])

    def step(t: Any) -> Any:
        return F.cross_entropy(z, y), F.softmax(z), F.kl_div(F.log_softmax(z), F.softmax(z, temperature=t))

    compiled = kd.compile(step)
    F.cross_entropy(z, y)
    for k in range(6):
        z[0], y[1] = k, k % 3
        assert comparable(compiled(np.array(1.0 + k))) == comparable(step(np.array(1.0 + k)))


# --- modules and optimizers that change ---


class Scaled(nn.Module):
    """A module with settings of its own, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MLP([4, 3], seed=0)
        self.scale, self.kind, self.shift, self.calls = 2.0, "relu", np.zeros(3, np.float32), 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        z = self.inner(x) * self.scale + self.shift
        return z.relu() if self.kind == "relu" else z.tanh()


@each_backend
def test_settings_of_a_module_are_part_of_a_plan_and_what_it_counts_is_not() -> None:
    model, twin = Scaled(), Scaled()
    step = kd.compile(model)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    changes: list[dict[str, Any]] = [
        {},
        {"scale": 3.0},
        {"kind": "tanh"},
        {"shift": np.ones(3, np.float32)},
        {"scale": 2.0},
    ]
    for change in changes:
        for m in (model, twin):
            for name, value in change.items():
                setattr(m, name, value)
        for _ in range(4):
            assert comparable(step(x)) == comparable(twin(x))
    assert len(step.plans) == len(changes)
    assert model.calls == 2 * len(changes)


def test_a_guard_holds_while_its_attribute_is_what_it_was() -> None:
    thing = SimpleNamespace(number=1.5, flag=True, array=np.ones(2))
    guards = [Guard(thing, name, getattr(thing, name)) for name in ("number", "flag", "array")]
    assert all(g.holds() for g in guards)
    thing.number, thing.array = float("1.5"), np.ones(2)
    assert [g.holds() for g in guards] == [True, True, False]
    thing.number, thing.flag = 1, 1
    assert [g.holds() for g in guards] == [False, False, False]
    assert [g.renewed().holds() for g in guards] == [True, True, False]
    del thing.number
    assert not guards[0].holds()


def test_a_change_of_the_layout_never_gives_a_number_again() -> None:
    layout, seen = Layout(), []

    def change() -> None:
        for _ in range(500):
            layout.changed()
            seen.append(layout.version)

    threads = [threading.Thread(target=change) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    last = layout.version
    layout.changed()
    assert layout.version not in {last, *seen}


class Scale:
    """What makes raw features a network's inputs."""

    def __init__(self, mean: float) -> None:
        self.mean, self.deviation = np.full(4, mean), np.full(4, 2.0)

    def apply(self, x: Any) -> Any:
        return (x - self.mean) / self.deviation


REPLACED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "a layer": lambda m: setattr(m, "layers", (m.layers[0], m.layers[1], nn.Linear(6, 3, seed=9))),
    "a weight": lambda m: setattr(m.layers[0], "weight", kd.Tensor(m.layers[0].weight.array * 2)),
    "a bias": lambda m: setattr(m.layers[2], "bias", kd.Tensor(np.ones(3, np.float32))),
    "no bias": lambda m: setattr(m.layers[0], "bias", None),
    "the array in a weight": lambda m: setattr(m.layers[0].weight, "array", m.layers[0].weight.array * 2),
    "values": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "a scale": lambda m: setattr(m, "normalisation", Scale(0.5)),
    "another scale": lambda m: setattr(m, "normalisation", Scale(-0.5)),
    "no scale": lambda m: setattr(m, "normalisation", None),
    "an arena": lambda m: kd.optim.SGD(m.parameters(), 0.1),
    "training": lambda m: m.train(),
    "evaluation": lambda m: m.eval(),
}


@each_backend
@pytest.mark.parametrize("bare", [False, True])
def test_predictions_follow_whatever_is_replaced_inside_a_step_and_outside(bare: bool) -> None:
    model = nn.MLP([4, 6, 3], seed=2)
    step = kd.compile(lambda x: [model.predict(x), model.predict_proba(x), model.logits(x)])
    rng = np.random.default_rng(0)
    for change in ("nothing", *REPLACED):
        REPLACED[change](model)
        for _ in range(3):
            x = rng.normal(size=(5, 4)).astype(np.float32)
            scaled = (
                x
                if model.normalisation is None
                else F.standardise(x, *(np.float32(v) for v in vars(model.normalisation).values()))
            )
            with kd.no_grad():
                scores = model(scaled).array
            wanted = [scores.argmax(axis=1), F.softmax(scores), scores]
            found = [model.predict(x), model.predict_proba(x), model.logits(x)] if bare else step(x)
            assert comparable(found) == comparable(wanted), change


@each_backend
def test_predictions_of_a_single_layer_follow_its_weight() -> None:
    model, x = nn.Linear(4, 3, seed=0), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for k in range(3):
        model.weight, model.bias = kd.Tensor(model.weight.array * 2), None if k else model.bias
        for _ in range(3):
            assert comparable(model.logits(x)) == comparable(F.linear(x, model.weight, model.bias).array)


class InLists(nn.Module):
    """A model whose layers are where nobody hears that they are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.factor = [nn.Linear(4, 6), nn.Linear(6, 3)], {"by": 1.0}

    def forward(self, x: Any) -> Any:
        return F.linear(self.layers[0](x), self.layers[1].weight) * self.factor["by"]


@each_backend
def test_predictions_follow_the_content_of_a_models_lists_and_dicts() -> None:
    model, x = InLists(), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for k in range(4):
        for _ in range(3):
            assert comparable(model.logits(x)) == comparable(model(kd.Tensor(x)).array)
        model.layers[k % 2] = nn.Linear(4, 6, seed=k + 1) if k % 2 == 0 else nn.Linear(6, 3, seed=k + 1)
        model.factor["by"] += 1.0


# --- the recorder itself ---


def test_a_recorder_knows_arguments_and_what_operations_made_from_what_was_there() -> None:
    x, kept, out = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), np.empty((2, 3), np.float32)
    with recording(Recorder([x])) as writer:
        assert recorder() is writer
        writer.made(out)
        run("add", out, x[:], kept)
        run("exp", out, out)
    assert recorder() is None
    assert [c.name for c in writer.calls] == ["add", "exp"]
    assert [writer.storages[b.storage].kind for b in writer.calls[0].buffers if b] == ["made", "argument", "kept"]
    assert writer.knows(x[1:])
    assert writer.knows(out)
    assert not writer.knows(kept)
    a, b = writer.place(kept[:, 1:]), writer.place(kept[:, :2].T.copy())
    assert a.offset == 4
    assert a.strides == (12, 4)
    assert b.storage != a.storage
    np.testing.assert_allclose(out, np.e**2, rtol=1e-6)


def test_nothing_is_traced_or_refused_outside_a_recording_and_in_other_threads() -> None:
    x = np.ones(3)
    assert traced(x) is x
    seen: list[Any] = []
    with recording(Recorder([x])):
        other = threading.Thread(target=lambda: seen.append((recorder(), float(kd.Tensor([2.0]).sum()))))
        other.start()
        other.join()
        assert type(traced(x)) is Traced
        with pytest.raises(PlanError):
            float(kd.Tensor(x).sum())
    assert seen == [(None, 2.0)]


def test_an_error_ends_the_recording() -> None:
    with pytest.raises(ZeroDivisionError):
        kd.compile(lambda x: F.relu(x)[: 1 // 0])(np.ones(3))
    assert recorder() is None
    assert float(F.relu(np.ones(3)).sum()) == 3
