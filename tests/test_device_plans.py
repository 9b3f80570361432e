"""Plans on a device: what is captured as a graph, what its kernels read, and that replays agree with eager steps.

No GPU is needed: a strict stand-in for CuPy refuses hidden copies and counts those that are asked for.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin import computing
from standin import cupy as standin

import minikd as kd
from minikd import functional as F
from minikd import steps
from minikd.errors import ArgumentError, BackendError, PlanError
from minikd.kernels.arrays import address, on_device, owner_of, to_device, to_host
from minikd.kernels.calls import Beginning, OnHost, Product, Several, taken_apart
from minikd.kernels.cuda import graphs
from minikd.kernels.cuda.graphs import COPIES_UNDER_WAY, GraphSequence, capture, join
from minikd.kernels.recording import Buffer, Recorder, as_traced, plain, recording
from minikd.plan import array_in

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++, which makes kernels run here")


@pytest.fixture
def cupy() -> Iterator[Any]:
    """The stand-in for CuPy, and its backend in use."""
    with computing() as module:
        yield module


# --- graphs ---


class Number:
    """A number that a kernel reads, as `minikd.kernels.cuda.graphs.Number` wants it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.kind = np.int64 if getattr(value, "dtype", None) == np.int64 else np.float64
        self.address = 0

    def read(self, where: str) -> Any:
        assert where == "noting"
        return self.kind(self.value)

    def point(self, address: int) -> None:
        self.address = address


class Kernel:
    """A kernel that notes its numbers as it finds them when it runs, given by value or read at their addresses."""

    name = "noting"
    refuses = False

    def __init__(self, found: list[Any], *numbers: Any) -> None:
        self.found, self.numbers = found, tuple(map(Number, numbers))
        self.launches = (self._launch,)

    def __call__(self) -> None:
        self._launch()

    def _launch(self) -> None:
        kinds = {np.int64: ctypes.c_int64, np.float64: ctypes.c_double}
        given = [(kinds[n.kind], n.address, n.kind(n.value).item()) for n in self.numbers]
        standin.launched(
            lambda: self.found.append(tuple(kind.from_address(at).value if at else value for kind, at, value in given))
        )


def advancing(counter: Any) -> OnHost:
    return OnHost(lambda: counter.__iadd__(1))


def test_every_kernel_of_a_graph_reads_its_numbers_as_they_were_at_its_turn(cupy: Any) -> None:
    found: list[Any] = []
    step, rate = np.zeros((), np.int64), np.array(0.5)
    calls = [Kernel(found, step), advancing(step), Kernel(found, rate, step), advancing(step), Kernel(found, step, 2.5)]
    (graph,) = join(calls)
    assert isinstance(graph, GraphSequence)
    assert found == []
    assert step == 0  # nothing ran while it was captured
    graph()
    rate[...] = -3.25
    graph()
    assert found == [(0,), (0.5, 1), (2, 2.5), (2,), (-3.25, 3), (4, 2.5)]
    assert graph.calls_done == 5
    for call in calls:
        call()  # by themselves they take their numbers by value
    assert found[6:] == [(4,), (-3.25, 5), (6, 2.5)]


def test_a_number_that_is_refused_keeps_the_graph_from_being_launched(cupy: Any) -> None:
    found: list[Any] = []
    kernels = [Kernel(found), Kernel(found, np.array(1.0))]
    (graph,) = join(kernels)

    def refusing(where: str) -> Any:
        raise ArgumentError(where, "temperature", expected="above 0", got="-1")

    graph()
    kernels[1].numbers[0].read = refusing
    (graph,) = join(kernels)
    with pytest.raises(ArgumentError, match="noting: temperature must be above 0"):
        graph()
    assert found == [(), (1.0,)]
    assert graph.calls_done == 0


def test_numbers_are_copied_only_if_one_of_them_changed(cupy: Any) -> None:
    found: list[Any] = []
    rate, other = np.array(0.0), np.array(1.0)
    (graph,) = join([Kernel(found, rate), Kernel(found, other)])
    standin.COPIES.reset()
    graph()
    assert standin.COPIES.queued == 1
    graph()
    assert standin.COPIES.queued == 1
    rate[...] = -0.0  # another number, though it is equal
    graph()
    assert standin.COPIES.queued == 2
    assert [str(f[0]) for f in found] == ["0.0", "1.0", "0.0", "1.0", "-0.0", "1.0"]


def test_the_numbers_of_a_graph_that_is_dropped_are_copied_before_their_memory_is_given_back(cupy: Any) -> None:
    (graph,) = join([Kernel([], np.array(1.0)), Kernel([])])
    standin.COPIES.reset()
    graph()
    del graph
    gc.collect()
    assert (standin.COPIES.queued, standin.COPIES.freed_under_way) == (1, 0)


def test_a_graph_without_numbers_copies_nothing(cupy: Any) -> None:
    found: list[Any] = []
    (graph,) = join([Kernel(found), Kernel(found)])
    standin.COPIES.reset()
    for _ in range(3):
        graph()
    assert standin.COPIES.queued == 0
    assert found == [()] * 6


def test_a_device_that_falls_behind_still_finds_the_numbers_of_each_launch(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: list[Callable[[], Any]] = []  # what the device has yet to do
    longest = [0]
    copy, launch = standin.runtime.memcpyAsync, standin.Graph.launch

    def catch_up(event: Any) -> None:
        longest[0] = max(longest[0], len(queue))
        while queue:
            queue.pop(0)()

    found: list[Any] = []
    rate = np.array(0.0)
    (graph,) = join([Kernel(found, rate), Kernel(found)])
    monkeypatch.setattr(standin.runtime, "memcpyAsync", lambda *args: queue.append(lambda: copy(*args)))
    monkeypatch.setattr(standin.Graph, "launch", lambda graph: queue.append(lambda: launch(graph)))
    recorded: list[Any] = []
    monkeypatch.setattr(standin.Event, "record", lambda event, stream: recorded.append(event))
    monkeypatch.setattr(standin.Event, "synchronize", lambda event: event in recorded and catch_up(event))
    for k in range(3 * COPIES_UNDER_WAY):
        rate[...] = k + 1
        graph()
    catch_up(None)
    assert [f[0] for f in found[::2]] == [k + 1 for k in range(3 * COPIES_UNDER_WAY)]
    assert longest[0] == 2 * COPIES_UNDER_WAY  # it was waited for no sooner than it had to be


def test_a_graph_is_launched_on_the_stream_of_its_caller_and_captured_on_another(cupy: Any) -> None:
    streams: list[Any] = []

    class Looking(Kernel):
        def _launch(self) -> None:
            streams.append(standin.get_current_stream())
            standin.launched(lambda: streams.append(standin.get_current_stream()))

    own = standin.Stream()
    with own:
        (graph,) = join([Looking([]), Looking([])])
        graph()
        assert standin.get_current_stream() is own
    assert streams[0] is streams[1]
    assert streams[0] not in (own, standin.Stream.null)
    assert streams[2:] == [own, own]


def test_a_kernel_by_itself_and_one_beside_what_cannot_be_captured_are_launched_as_they_are(cupy: Any) -> None:
    found: list[Any] = []
    kernels = [Kernel(found, k * 1.0) for k in range(4)]
    counter = np.zeros((), np.int64)

    def product(a: Any, b: Any, out: Any) -> None:
        found.append("product")

    calls = [
        advancing(counter),
        kernels[0],
        Product(product, 1, 2, 3),
        kernels[1],
        kernels[2],
        lambda: found.append("f"),
    ]
    parts = join([*calls, kernels[3]])
    assert [type(p) for p in parts] == [OnHost, Kernel, Product, GraphSequence, type(lambda: 0), Kernel]
    for part in parts:
        part()
    assert found == [(0.0,), "product", (1.0,), (2.0,), "f", (3.0,)]
    assert counter == 1


def test_graphs_can_be_switched_off_and_nothing_else_is_taken_for_an_answer(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [Kernel([]), Kernel([])]
    monkeypatch.setenv("MINIKD_GRAPHS", "0")
    assert join(kernels) == kernels
    monkeypatch.setenv("MINIKD_GRAPHS", "1")
    assert len(join(kernels)) == 1
    monkeypatch.setenv("MINIKD_GRAPHS", "")
    assert len(join(kernels)) == 1
    monkeypatch.setenv("MINIKD_GRAPHS", "off")
    with pytest.raises(BackendError, match="MINIKD_GRAPHS must be 0 or 1, got 'off'"):
        join(kernels)


def test_what_cannot_be_captured_after_all_runs_as_it_is_and_leaves_no_stream_behind(cupy: Any) -> None:
    class Allocating(Kernel):
        def _launch(self) -> None:
            standin.ndarray((3,), np.float32)

    kernels = [Kernel([], 1.0), Allocating([])]
    with pytest.warns(UserWarning, match=r"launched one by one, since they cannot be captured: .* an allocation"):
        assert join(kernels) == kernels
    assert kernels[0].numbers[0].address == 0
    assert not standin.get_current_stream().is_capturing()
    with pytest.raises(RuntimeError, match="an allocation"):
        capture(lambda: standin.ndarray((3,), np.float32))


def test_products_become_parts_of_graphs_where_they_can_be_captured(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, out = standin.full((2, 2), 3.0, np.float32), standin.zeros((2, 2), np.float32)
    tried = []

    def matmul(a: Any, b: Any, out: Any) -> None:
        tried.append(standin.get_current_stream().is_capturing())
        standin.launched(lambda: np.matmul(a._array, b._array, out=out._array))

    monkeypatch.setattr(standin, "matmul", matmul, raising=False)
    product = Product(matmul, a, a, out)
    parts = join([product, Kernel([])])
    assert tried == [False, True, True]
    assert [type(p) for p in parts] == [GraphSequence]
    parts[0]()
    assert (standin.asnumpy(out) == 18).all()
    join([product, Kernel([])])
    assert tried == [False, True, True, True]  # it is tried once


def test_a_product_that_is_captured_but_computes_something_else_stays_outside(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin, "matmul", lambda a, b, out: None, raising=False)
    assert not graphs.captures_products()


def test_the_parts_of_a_call_are_joined_with_their_neighbours_and_count_as_one_call(cupy: Any) -> None:
    found: list[Any] = []

    def multiply(a: Any, b: Any, out: Any) -> None:
        found.append("product")

    product = Product(multiply, 1, 2, 3)
    layers = [Several([product, Kernel(found, 1.0)]), Several([Kernel(found, 2.0), product, product])]
    assert [completes for _, completes in taken_apart(layers)] == [False, True, False, False, True]
    parts: list[Any] = join(layers)
    assert [type(p) for p in parts] == [Beginning, GraphSequence, Beginning, Product]
    assert [len(getattr(p, "calls", "1")) for p in parts] == [0, 1, 0, 1]
    for part in parts:
        part()
    again: Callable[[], None]
    for again in layers:
        again()
    assert found == ["product", (1.0,), (2.0,), "product", "product"] * 2


# --- steps ---

N, K, C = 6, 5, 4


class Setting:
    """A network, its optimizer, and a step of distillation; batches of it with a learning rate that varies."""

    def __init__(self, optimizer: str = "adam", *, dropout: float = 0.25, dtype: Any = np.float32) -> None:
        self.model = kd.nn.MLP([K, 7, C], activation="gelu", dropout=dropout, seed=3, dtype=dtype)
        self.opt = kd.optim.OPTIMIZERS[optimizer](self.model.parameters(), 0.05, clip=0.5)
        self.dtype = dtype

    def step(self, x: Any, y: Any, teacher: Any, rate: Any) -> Any:
        self.opt.lr = rate
        loss = F.distillation_loss(self.model(x), teacher, y, temperature=3.0)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss

    def batch(self, seed: int, rows: int = N) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        x, teacher = (rng.normal(size=(rows, k)).astype(self.dtype) for k in (K, C))
        rate = np.array(0.01 * (1 + seed))
        return to_device(x), to_device(rng.integers(0, C, rows)), to_device(teacher), rate

    @property
    def state(self) -> dict[str, bytes]:
        return {n: a.tobytes() for n, a in {**self.model.state_dict(), **self.opt.state_dict()}.items()}


def counted(call: Callable[[], Any]) -> tuple[Any, tuple[int, int, int]]:
    """The result, and the copies to the host, copies to the device and allocations that it took."""
    standin.COPIES.reset()
    before = standin._pool.allocations
    result = call()
    return result, (standin.COPIES.to_host, standin.COPIES.to_device, standin._pool.allocations - before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", kd.optim.OPTIMIZERS)
def test_a_step_that_is_replayed_leaves_the_bits_of_one_that_is_not(optimizer: str, dtype: Any, cupy: Any) -> None:
    eager, compiled = Setting(optimizer, dtype=dtype), Setting(optimizer, dtype=dtype)
    step = kd.compile(compiled.step)
    for seed in range(5):
        wanted = eager.step(*eager.batch(seed))
        batch = compiled.batch(seed)
        found, copies = counted(partial(step, *batch))
        assert seed < 2 or copies == (0, 0, 1)  # the loss that is returned is all that is allocated
        assert on_device(found.array)
        assert found.numpy().tobytes() == wanted.numpy().tobytes()
        assert compiled.state == eager.state
    assert len(step.plans) == 1


def test_what_a_step_returns_is_a_copy_on_the_device(cupy: Any) -> None:
    s = Setting()
    step = kd.compile(lambda *batch: {"loss": s.step(*batch), "logits": (s.model(batch[0]).array, 3)})
    first, second, third = (step(*s.batch(seed)) for seed in (4, 4, 4))
    kept = to_host(third["logits"][0])
    fourth = step(*s.batch(5))
    assert (to_host(third["logits"][0]) == kept).all()
    assert not (to_host(fourth["logits"][0]) == kept).all()
    assert first["logits"][1] == fourth["logits"][1] == 3
    assert all(on_device(r["logits"][0]) and on_device(r["loss"].array) for r in (first, second, third, fourth))


def test_another_shape_records_another_plan(cupy: Any) -> None:
    s, eager = Setting(), Setting()
    step = kd.compile(s.step)
    for seed, rows in enumerate([6, 6, 6, 3, 3, 3, 6, 3]):
        step(*s.batch(seed, rows))
        eager.step(*eager.batch(seed, rows))
    assert len(step.plans) == 2
    assert s.state == eager.state


def test_arguments_that_lie_on_the_host_are_refused_and_so_are_those_of_the_device_elsewhere(cupy: Any) -> None:
    s = Setting()
    x, y, teacher, rate = s.batch(0)
    step = kd.compile(s.step)
    for _ in range(3):
        step(x, y, teacher, rate)
    for wrong in ((to_host(x), y, teacher, rate), (x, to_host(y), teacher, rate)):
        with pytest.raises(BackendError, match=r"compile: an argument must be a CuPy array .*, got a NumPy array"):
            step(*wrong)
    kd.use_backend("numpy")
    with pytest.raises(BackendError, match=r"compile: an argument must be a NumPy array .*, got a CuPy array"):
        step(x, y, teacher, rate)
    kd.use_backend("cupy")
    step(x, y, teacher, rate)


READS: dict[str, Callable[[Setting, Any, Any], Any]] = {
    "the number in a tensor": lambda s, x, y: s.model(x).sum().item(),
    "float of a tensor": lambda s, x, y: float(s.model(x).sum()),
    "the truth of a tensor": lambda s, x, y: bool(s.model(x).sum()),
    "values of a tensor": lambda s, x, y: s.model(x).numpy(),
    "the array in a tensor": lambda s, x, y: s.model(x).array.get(),
    "float of an array": lambda s, x, y: float(F.cross_entropy(x, y)),
    "the truth of an array": lambda s, x, y: bool(x),
    "an index": lambda s, x, y: list(range(y)),
    "going through": lambda s, x, y: list(x),
    "one element": lambda s, x, y: x[0],
    "written into": lambda s, x, y: x.__setitem__(slice(0, 1), 0),
    "a copy to the host": lambda s, x, y: x.get(),
    "an element": lambda s, x, y: y.item(),
    "a list": lambda s, x, y: x.tolist(),
    "a sum": lambda s, x, y: s.model(x * x.sum()),
    "another dtype": lambda s, x, y: s.model(x.astype(np.float64)),
    "a product": lambda s, x, y: s.model(x * 2),
    "a product from the left": lambda s, x, y: s.model(2 * x),
    "in place": lambda s, x, y: x.__imul__(2),
    "a comparison": lambda s, x, y: x > 0,
    "numpy's mean": lambda s, x, y: np.mean(x),
    "numpy's exp": lambda s, x, y: np.exp(x),
}


@pytest.mark.parametrize("use", READS.values(), ids=list(READS))
def test_what_looks_at_values_is_refused_while_it_is_recorded(use: Any, cupy: Any) -> None:
    s = Setting()
    x, y, _, _ = s.batch(0)
    with pytest.raises(PlanError, match=r"test_device_plans.py, line \d+"):
        kd.compile(lambda x, y: use(s, x, y))(x, y)


needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy, but no GPU (extra cupy)")


@needs_cupy
def test_arrays_of_the_real_cupy_are_guarded_as_those_of_the_stand_in() -> None:
    """On memory of the host: what is refused is refused before anything would be computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy misses CUDA's own folders
        real = importlib.import_module("cupy")
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    memory = real.cuda.UnownedMemory(values.ctypes.data, values.nbytes, values, 0)
    array = real.ndarray((3, 4), np.float32, real.cuda.MemoryPointer(memory, 0))
    part = array_in(array.view(np.uint8), 16, Buffer(0, 0, (2, 4), array.dtype, array.strides))
    assert (part.shape, address(part)) == ((2, 4), address(array) + 16)
    with recording(Recorder([array])) as writer:
        guarded = as_traced(array)
        assert type(plain(guarded)) is real.ndarray
        assert owner_of(guarded[1:].reshape(-1).T) is array
        place = writer.place(guarded[1:])
        assert (place.storage, place.offset, place.shape) == (0, 16, (2, 4))
        assert (guarded.shape, guarded.dtype, len(guarded), guarded.flags.c_contiguous) == ((3, 4), np.float32, 3, True)
        binary = ("add", "iadd", "sub", "mul", "imul", "truediv", "pow", "matmul", "imatmul", "gt", "eq", "and_")
        uses: list[Callable[[], Any]] = [
            *(partial(getattr(operator, name), guarded, other) for name in binary for other in (2, array)),
            *(partial(function, guarded) for function in (float, int, bool, complex, list, abs, operator.neg, np.exp)),
            *(partial(np.multiply, np.float32(2), guarded), partial(operator.add, 2, guarded)),
            *(partial(guarded.__getitem__, 0), partial(guarded.__setitem__, 0, 1)),
        ]
        for use in uses:
            with pytest.raises(PlanError, match=r"of an array|an array as|going through|indexing|writing"):
                use()
        for name in ("get", "item", "sum", "astype", "copy", "tolist", "set", "fill"):
            with pytest.raises(PlanError, match=rf"array\.{name}"):
                getattr(guarded, name)


def test_what_cupy_makes_of_an_argument_shows_in_the_second_recording(cupy: Any) -> None:
    s = Setting()
    x, *_ = s.batch(0)
    step = kd.compile(lambda x: s.model(cupy.exp(x)))
    step(x)
    with pytest.raises(PlanError, match="with another array, number or setting each time"):
        step(x)


def test_a_step_that_cannot_be_replayed_may_run_as_it_stands(cupy: Any) -> None:
    s = Setting(dropout=0.0)
    x, _, _, _ = s.batch(0)
    step = kd.compile(lambda x: s.model(x * 2), fallback=True)
    found = [step(x).numpy() for _ in range(4)]
    wanted = s.model(x * 2).numpy()
    assert all((f == wanted).all() for f in found)
    assert step.plans == []
    assert len(step.refusals) == 1


def test_views_and_looks_at_an_argument_are_no_values(cupy: Any) -> None:
    s, shapes = Setting(dropout=0.0), []

    def step(x: Any) -> Any:
        shapes.append((x.shape, x.ndim, x.dtype, x.reshape(-1).size, x.T.shape, len(x)))
        return s.model(x[2:]), F.relu(x[:2].reshape(K, 2))

    compiled = kd.compile(step)
    for seed in range(4):
        x = s.batch(seed)[0]
        tall, flat = compiled(x)
        wanted, wanted_flat = step(x)
        assert tall.numpy().tobytes() == wanted.numpy().tobytes()
        assert to_host(flat).tobytes() == to_host(wanted_flat).tobytes()
    assert len(compiled.plans) == 1
    assert len(set(shapes)) == 1


def test_replaying_needs_no_more_memory_of_the_device_than_recording(cupy: Any) -> None:
    s = Setting()
    step = kd.compile(s.step)
    used = []
    for seed in range(8):
        step(*s.batch(seed))
        used.append(standin._pool.used)
    assert len(set(used[2:])) == 1


def test_memory_of_the_host_and_of_the_device_are_laid_out_apart(cupy: Any) -> None:
    x = to_device(np.arange(6, dtype=np.float32).reshape(2, 3))

    @kd.compile
    def step(x: Any, factor: Any) -> Any:
        return (kd.Tensor.of(x) * factor * factor).relu() + F.softmax(x)

    for k in range(4):
        found = step(x, np.array(k - 1.5))
        softmax = F.softmax(x)
        assert to_host(found.array).tobytes() == to_host(x * np.float32(k - 1.5) ** 2 + softmax).tobytes() or k == -1
    (plan,) = step.plans
    assert plan.memory.bytes <= plan.memory.without_reuse
    assert all(on_device(a) for call in plan.arrays for a in call if a is not None and a.ndim)


CHAIN: dict[str, Callable[..., Any]] = {
    "relu": lambda h, w, number, rows: h.relu(),
    "gelu": lambda h, w, number, rows: h.gelu(),
    "softmax": lambda h, w, number, rows: F.softmax(h, temperature=number),
    "layer": lambda h, w, number, rows: F.linear(h, w, None),
    "twice": lambda h, w, number, rows: h + h,
    "square": lambda h, w, number, rows: h * h,
    "scaled": lambda h, w, number, rows: h * number,
    "rows": lambda h, w, number, rows: h.take(rows),
    "centred": lambda h, w, number, rows: h - h.mean(axis=0),
}


@given(names=st.lists(st.sampled_from(list(CHAIN)), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_any_chain_of_operations_is_replayed_to_the_bits_of_its_first_run(names: list[str], seed: int) -> None:
    """Products, kernels in graphs, kernels alone and formulas, in any order, with places that are used again."""
    with computing():
        rng = np.random.default_rng(seed)
        w = kd.Tensor(rng.normal(size=(3, 3)).astype(np.float32), requires_grad=True)
        rows = to_device(np.array([1, 0, 1]))

        def step(x: Any, number: Any) -> tuple[Any, ...]:
            h = kd.Tensor.of(x, requires_grad=False)
            for name in names:
                h = CHAIN[name](h, w, number, rows)
            w.zero_grad()
            loss = (h * w.sum()).mean()
            loss.backward()
            return h, loss, w.grad

        compiled = kd.compile(step)
        inputs = [(to_device(rng.normal(size=(4, 3)).astype(np.float32)), np.array(1.0 + k)) for k in range(2)]
        found = [compiled(*inputs[k % 2]) for k in range(4)]
        for k in (0, 1):
            wanted = [t.numpy() for t in step(*inputs[k])]
            for result in (found[k], found[k + 2]):
                assert [t.numpy().tobytes() for t in result] == [a.tobytes() for a in wanted]
        assert len(compiled.plans) == 1


# --- epochs ---


def stacks(s: Setting, steps: int, rows: int = N) -> list[Any]:
    batches = [s.batch(seed, rows) for seed in range(steps)]
    return [np.stack([to_host(x) for x in column]) for column in zip(*batches, strict=True)]


@pytest.mark.parametrize("seconds", [1e9, 1e-9])  # of a portion: all that are left, or one step
def test_an_epoch_is_its_steps_and_its_losses_are_one_array_on_the_device(
    seconds: float, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SECONDS_A_CALL", seconds)
    eager, s = Setting(), Setting()
    step = kd.compile(s.step)
    seen: list[int] = []
    given = stacks(s, 7)
    losses, copies = counted(lambda: step.epoch(*given, on_progress=seen.append))
    assert on_device(losses)
    assert losses.shape == (7,)
    assert copies[1] == 3  # of features, labels and logits, each as a whole; rates stay on the host
    wanted = [eager.step(*eager.batch(seed)).item() for seed in range(7)]
    assert to_host(losses).tolist() == wanted
    assert s.state == eager.state
    assert seen == ([1, 2, 3, 7] if seconds > 1 else [1, 2, 3, 4, 5, 6, 7])
    assert len(step.plans) == 1


def test_steps_of_an_epoch_that_is_known_copy_nothing_between_host_and_device(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = Setting()
    step = kd.compile(s.step)
    given = [to_device(x) if x.ndim > 1 else x for x in stacks(s, 9)]
    step.epoch(*given)
    monkeypatch.setattr(steps, "SECONDS_A_CALL", 1e9)  # so that all steps are one portion
    counts = {}
    for count in (3, 9):
        _, counts[count] = counted(partial(step.epoch, *(x[:count] for x in given)))
        assert counts[count][1] == 0
    assert counts[3][0] == counts[9][0] <= 2  # looks at what was refused, at the end


def test_the_rows_of_a_data_set_on_the_device_are_gathered_there(cupy: Any) -> None:
    rng = np.random.default_rng(1)
    x, y = to_device(rng.normal(size=(20, K)).astype(np.float32)), to_device(rng.integers(0, C, 20))
    eager, s = Setting("sgd"), Setting("sgd")

    def of(setting: Setting) -> Any:
        def step(rows: Any) -> Any:
            loss = F.cross_entropy(setting.model(F.take(x, rows)), F.take(y, rows))
            setting.opt.zero_grad()
            loss.backward()
            setting.opt.step()
            return loss

        return step

    batches = rng.permuted(np.tile(np.arange(20), (6, 1)), axis=1)[:, :N]
    losses = kd.compile(of(s)).epoch(batches)
    wanted = [of(eager)(to_device(rows)).item() for rows in batches]
    assert to_host(losses).tolist() == wanted
    assert s.state == eager.state


@pytest.mark.parametrize("step_of_label", [0, 1, 4])
def test_a_wrong_label_is_refused_when_the_portion_ends(step_of_label: int, cupy: Any) -> None:
    s = Setting()
    step = kd.compile(s.step)
    x, y, teacher, rates = stacks(s, 6)
    step.epoch(x, y, teacher, rates)
    y[step_of_label, 2] = C
    with pytest.raises(ArgumentError, match=rf"target\[2\] must be a class id from 0 to {C - 1} .*, got {C}"):
        step.epoch(x, y, teacher, rates)
    y[step_of_label, 2] = 0
    step.epoch(x, y, teacher, rates)  # what was refused is forgotten


def test_a_wrong_label_in_one_step_is_refused_when_somebody_waits_for_its_loss(cupy: Any) -> None:
    s = Setting()
    step = kd.compile(s.step)
    x, y, teacher, rate = s.batch(0)
    for _ in range(3):
        step(x, y, teacher, rate)
    labels = to_host(y)
    labels[1] = -7
    loss = step(x, to_device(labels), teacher, rate)
    with pytest.raises(ArgumentError, match=r"target\[1\] must be a class id .*, got -7"):
        loss.item()


def test_a_temperature_that_is_wrong_is_refused_before_the_step(cupy: Any) -> None:
    s = Setting()

    @kd.compile
    def step(x: Any, teacher: Any, temperature: Any) -> Any:
        loss = F.distillation_loss(s.model(x), teacher, temperature=temperature)
        s.opt.zero_grad()
        loss.backward()
        s.opt.step()
        return loss

    x, _, teacher, _ = s.batch(0)
    for k in range(3):
        step(x, teacher, np.array(2.0 + k))
    before = s.state
    with pytest.raises(ArgumentError, match="temperature must be a finite number above 0"):
        step(x, teacher, np.array(-1.0))
    assert {n: v for n, v in s.state.items() if "step" not in n} == {n: v for n, v in before.items() if "step" not in n}


def test_portions_are_stopped_between_two_of_them(cupy: Any) -> None:
    s, eager = Setting(), Setting()
    step = kd.compile(s.step)
    portions = step.portions(*stacks(s, 8))
    taken = sum(len(losses) for losses in itertools.islice(portions, 3))
    for seed in range(taken):
        eager.step(*eager.batch(seed))
    assert s.state == eager.state


# --- looking inside ---


def test_a_plan_on_the_device_can_be_explained_and_measured(cupy: Any) -> None:
    s = Setting()
    step = kd.compile(s.step)
    for seed in range(3):
        step(*s.batch(seed))
    before = s.state
    text = step.explain()
    assert s.state == before
    assert "10 calls from Python (4 of them CUDA graphs)" in text.splitlines()[0]
    assert "adam_step" in text
    assert " µs" in text
    assert step.plans[0].dot().startswith("digraph")
