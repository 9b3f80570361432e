"""Plans: pieces of memory never meet while they are used, nothing overwrites results, and errors say where they are."""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd import nn
from minikd.errors import ArgumentError
from minikd.kernels import run
from minikd.kernels.recording import MADE, Buffer, Recorded, Recorder, recording
from minikd.ops import OPS
from minikd.plan import ALIGNMENT, Plan, Span, block_of, place_all, room_of, share_in_place, spans_of

each_backend = pytest.mark.usefixtures("backend")

# --- places ---

pieces = st.lists(
    st.tuples(st.integers(0, 9).map(lambda n: n * ALIGNMENT), st.integers(0, 12), st.integers(0, 6)), max_size=25
)


def overlapping(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]


@given(drawn=pieces)
def test_pieces_that_are_in_use_at_the_same_time_never_meet(drawn: list[tuple[int, int, int]]) -> None:
    sizes, spans = [s for s, _, _ in drawn], [Span(first, first + length) for _, first, length in drawn]
    offsets, total = place_all(sizes, spans)
    assert len(offsets) == len(sizes)
    for i in range(len(sizes)):
        assert offsets[i] >= 0
        assert offsets[i] + sizes[i] <= total
        assert offsets[i] % ALIGNMENT == 0
        for j in range(i):
            if spans[i].meets(spans[j]):
                assert not overlapping((offsets[i], sizes[i]), (offsets[j], sizes[j]))
    widest = max(
        (sum(s for s, span in zip(sizes, spans, strict=True) if span.first <= t <= span.last) for t in range(20)),
        default=0,
    )
    assert widest <= total <= sum(sizes)


def test_pieces_one_after_the_other_share_one_place() -> None:
    assert place_all([64, 128, 64], [Span(0, 1), Span(2, 3), Span(4, 5)]) == ([0, 0, 0], 128)
    assert place_all([64, 128], [Span(0, 2), Span(2, 3)]) == ([128, 0], 192)
    assert place_all([], []) == ([], 0)


@given(a=st.tuples(st.integers(0, 9), st.integers(0, 9)), b=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_two_spans_meet_if_one_moment_is_in_both(a: tuple[int, int], b: tuple[int, int]) -> None:
    one, two = Span(min(a), max(a)), Span(min(b), max(b))
    moments = set(range(one.first, one.last + 1)) & set(range(two.first, two.last + 1))
    assert one.meets(two) == two.meets(one) == bool(moments)


@given(size=st.integers(1, 3000))
def test_blocks_begin_at_lines_of_the_cache_and_no_piece_fills_its_last_line(size: int) -> None:
    assert size < room_of(size) <= size + ALIGNMENT
    assert room_of(size) % ALIGNMENT == 0
    block = block_of(size)
    assert block.nbytes == size
    assert block.ctypes.data % ALIGNMENT == 0


# --- sharing in place ---


def calls_of(step: Callable[..., Any], *arguments: Any) -> Recorder:
    with recording(Recorder(list(arguments))) as writer:
        step(*(kd.Tensor.of(a) for a in arguments))
    return writer


def roots(writer: Recorder) -> tuple[dict[int, int], list[int]]:
    made = [k for k, s in enumerate(writer.storages) if s.kind == MADE]
    spans = spans_of(writer.calls, made, [])
    return share_in_place(writer.calls, spans, {k: room_of(writer.storages[k].owner.nbytes) for k in made}), made


def test_a_chain_of_operations_that_may_alias_needs_one_place() -> None:
    x = np.ones((20, 30), np.float32)
    root, made = roots(calls_of(lambda x: ((x + x) + x) - x, x))
    assert len(made) == 3
    assert len(set(root.values())) == 1
    assert len(root) == 2


def test_what_is_read_later_keeps_its_place() -> None:
    x = np.ones((20, 30), np.float32)

    def step(x: Any) -> Any:
        a = x + x
        b = a + x
        return a - b

    root, made = roots(calls_of(step, x))
    assert len(made) == 3
    assert len(root) == 1


def recorded(name: str, *buffers: Buffer) -> Recorded:
    return Recorded(name, dict(OPS[name].attrs), buffers, "")


def buffer(storage: int, rows: int = 4, offset: int = 0) -> Buffer:
    return Buffer(storage, offset, (rows, 2), np.dtype(np.float32), (8, 4))


@pytest.mark.parametrize(
    ("inputs", "shares"),
    [
        ([buffer(0), buffer(1)], True),
        ([buffer(0), buffer(0)], True),
        ([buffer(0, offset=8), buffer(1)], False),  # what is written would lie beside what is read
        ([buffer(0), buffer(0, offset=8)], False),
        ([buffer(0, offset=8), buffer(0)], False),
    ],
)
def test_only_an_input_that_is_read_in_step_gives_its_place_away(inputs: list[Buffer], shares: bool) -> None:
    calls = [recorded("exp", buffer(0, 5), buffer(9, 5)), recorded("add", buffer(2), *inputs)]
    spans = {0: Span(0, 1), 2: Span(1, 3)}
    root = share_in_place(calls, spans, {0: 64, 2: 64})
    assert root == ({2: 0} if shares else {})
    assert spans == ({0: Span(0, 3)} if shares else {0: Span(0, 1), 2: Span(1, 3)})


@each_backend
@given(data=st.data())
def test_slices_and_sums_of_what_was_made_are_computed_as_they_stand(data: st.DataObject) -> None:
    """Views at offsets into one piece of memory, of sizes that round to the same number of lines."""
    n, k = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 3))
    cut = data.draw(st.integers(0, n - 1))
    chain = data.draw(st.lists(st.sampled_from(["relu", "tanh", "slice", "dropout", "shift"]), min_size=1, max_size=5))

    def step(x: Any) -> Any:
        y = F.gelu(x)
        for name in chain:
            if name == "slice" and len(y) > cut:
                y = y[cut:]
            elif name == "dropout":
                y = F.dropout(y, 0.3, seed=1, step=2)
            elif name == "shift" and len(y) > 1:
                with kd.no_grad():
                    y = F.concatenate([y[1:], y[:-1]])
            elif name in ("relu", "tanh"):
                y = getattr(F, name)(y)
        return y

    compiled = kd.compile(step)
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)
        np.testing.assert_array_equal(compiled(x), step(x))


# --- memory of whole plans ---


def training_step(dtype: Any = np.float32) -> tuple[Any, Any]:
    model = nn.MLP([20, 64, 64, 64, 5], activation="gelu", dropout=0.1, seed=0, dtype=dtype)
    optimizer = kd.optim.Adam(model.parameters(), 1e-3)

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return kd.compile(step), step


def batch(seed: int, n: int = 48) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 20)).astype(np.float32), rng.integers(0, 5, n)


@each_backend
def test_a_training_step_needs_less_memory_than_if_each_piece_had_its_own() -> None:
    step, _ = training_step()
    for seed in range(3):
        step(*batch(seed))
    (plan,) = step.plans
    assert 0 < plan.memory.bytes < 0.8 * plan.memory.without_reuse


@each_backend
def test_buffers_of_a_plan_that_are_alive_at_the_same_time_neither_meet_nor_touch() -> None:
    step, _ = training_step()
    for seed in range(2):
        step(*batch(seed))
    (plan,) = step.plans
    alive: dict[tuple[int, int], list[int]] = {}  # a stretch of memory of one storage → the calls that look at it
    for k, (call, arrays) in enumerate(zip(plan.calls, plan.arrays, strict=True)):
        for b, array in zip(call.buffers, arrays, strict=True):
            if b is not None and b.storage >= 0 and plan.origins[b.storage] == "":
                alive.setdefault((b.storage, array.nbytes), [k, k, array.ctypes.data])[1] = k
    found = [(key, *rest) for key, rest in alive.items()]
    for i, (a, first, last, at) in enumerate(found):
        for b, other_first, other_last, other_at in found[:i]:
            inside = max(first, other_first) < min(last, other_last)  # one may be written where the other is last read
            if a[0] != b[0] and inside:
                assert not overlapping((at, a[1] + 1), (other_at, b[1] + 1))


@each_backend
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_of_arrays_that_fill_whole_lines_have_the_same_bits_in_a_plan(dtype: Any) -> None:
    """NumPy 1 computes them by other means where an array begins at the byte behind another one's last."""

    def step(x: Any, y: Any) -> Any:
        a, b = kd.Tensor.of(x) * 1.5, kd.Tensor.of(y) * 1.5
        return (a**b) + (b**a) + (a.log() ** b) + (b.exp() ** a)

    compiled = kd.compile(step)
    for seed in range(3):
        x, y = np.random.default_rng(seed).uniform(1, 2, (2, 64)).astype(dtype)
        np.testing.assert_array_equal(compiled(x, y).numpy(), step(x, y).numpy())


@pytest.mark.usefixtures("c_in_use")
def test_on_c_a_step_is_one_call() -> None:
    step, _ = training_step()
    for seed in range(3):
        step(*batch(seed))
    (plan,) = step.plans
    assert plan.one_call


# --- what a plan keeps ---


@each_backend
def test_a_plan_outlives_the_arrays_that_it_was_recorded_with() -> None:
    step, _ = training_step()
    _, twin = training_step()
    arrays = [batch(seed) for seed in range(2)]
    refs = []
    for x, y in arrays:
        step(x, y)
        refs += [weakref.ref(x), weakref.ref(y)]
        x[...], y[...] = np.nan, 99
    del arrays, x, y
    gc.collect()
    assert [r() for r in refs] == [None] * 4
    junk = [np.full(1000, np.nan, np.float32) for _ in range(50)]  # where those arrays were
    for seed in range(2):
        twin(*batch(seed))
    for seed in range(2, 6):
        assert step(*batch(seed)).array.tobytes() == twin(*batch(seed)).array.tobytes()
    assert len(junk) == 50


@each_backend
def test_data_that_only_the_step_knew_is_kept_by_its_plan() -> None:
    def build() -> tuple[Any, Any]:
        data = np.random.default_rng(3).normal(size=(50, 4)).astype(np.float32)
        return kd.compile(lambda rows: F.take(data, rows)), data.copy()

    step, data = build()
    for k in range(6):
        rows = np.random.default_rng(k).integers(0, 50, 7)
        np.testing.assert_array_equal(step(rows), data[rows])
        gc.collect()


@each_backend
def test_steps_and_models_are_released_together() -> None:
    step, _ = training_step()
    for seed in range(4):
        step(*batch(seed))
    ref = weakref.ref(step)
    arena = weakref.ref(step.plans[0])
    del step, _
    gc.collect()
    assert ref() is None
    assert arena() is None


def resident() -> int:
    """Bytes of memory that this process holds, as the system counts them."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_does_not_grow_over_100_000_replays() -> None:
    step, _ = training_step()
    x, y = batch(0, n=1)
    for _ in range(200):
        step(x, y)
    xs, ys = np.stack([x] * 50), np.stack([y] * 50)
    step.epoch(xs, ys)
    gc.collect()
    before = resident()
    for _ in range(20_000):
        step(x, y)
    for _ in range(1_600):
        step.epoch(xs, ys)
    gc.collect()
    assert resident() - before < 2**21
    tracemalloc.start()
    try:
        for _ in range(100):
            step(x, y)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(2000):
            step(x, y)
        step.epoch(xs, ys)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - first < 20_000
    finally:
        tracemalloc.stop()


@each_backend
def test_memory_does_not_grow_over_errors() -> None:
    step, _ = training_step()
    x, y = batch(0)
    for _ in range(3):
        step(x, y)
    bad = np.full_like(y, 7)

    def fail() -> None:
        with pytest.raises(ArgumentError):
            step(x, bad)

    for _ in range(30):
        fail()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(20):
            fail()
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            fail()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - first < 20_000
    finally:
        tracemalloc.stop()


# --- running ---


@each_backend
def test_a_plan_writes_its_results_and_what_was_there_before_and_nothing_else() -> None:
    x, kept = np.ones((3, 4), np.float32), np.full((3, 4), 2, np.float32)
    sums = np.full(48 + 2 * ALIGNMENT, 0xA5, np.uint8)
    total = sums[ALIGNMENT:-ALIGNMENT].view(np.float32).reshape(3, 4)
    total[...] = 0
    made = [np.empty((3, 4), np.float32) for _ in range(2)]
    with recording(Recorder([x])) as writer:
        for m in made:
            writer.made(m)
        run("add", made[0], x, kept)
        run("exp", made[1], made[0])
        run("add_into", total, made[1])
    plan = Plan(writer, [made[1], total, x, made[1][1:]])
    assert not np.shares_memory(plan.results[0], made[1])
    assert np.shares_memory(plan.results[1], total)
    assert plan.results[2] is plan.arguments[0]
    total[...] = 0
    plan.arguments[0][...] = 1.5
    plan.run()
    plan.run()
    np.testing.assert_array_equal(plan.results[1], plan.results[0] + plan.results[0])
    np.testing.assert_array_equal(plan.results[3], plan.results[0][1:])
    np.testing.assert_array_equal(kept, 2)
    np.testing.assert_allclose(plan.results[0], np.exp(3.5), rtol=1e-6)
    assert (sums[:ALIGNMENT] == 0xA5).all()
    assert (sums[-ALIGNMENT:] == 0xA5).all()


@each_backend
def test_repeated_runs_are_runs_one_after_the_other() -> None:
    def build() -> Plan:
        x, count = np.ones((2, 3), np.float64), np.zeros((), np.int64)
        p = np.empty((2, 3))
        with recording(Recorder([x])) as writer:
            writer.made(p)
            run("advance", count)
            run("exp", p, x)
        plan = Plan(writer, [p, count])
        count[...] = 0
        return plan

    one, many = build(), build()
    xs = np.random.default_rng(0).normal(size=(6, 2, 3))
    results = [np.empty((6, 2, 3)), np.empty(6, np.int64)]
    many.repeat([xs], results, 6)
    assert many.rounds_done == 6
    for r, x in enumerate(xs):
        one.arguments[0][...] = x
        one.run()
        np.testing.assert_array_equal(results[0][r], one.results[0])
        assert results[1][r] == r + 1


@each_backend
def test_a_refusal_says_whether_parameters_had_changed_and_which_round_it_was() -> None:
    def build(parameter_first: bool) -> Plan:
        w = kd.Tensor(np.zeros(2), requires_grad=True)
        x, y = np.zeros((1, 3)), np.zeros(1, np.int64)
        loss = np.empty(())
        with recording(Recorder([x, y])) as writer:
            writer.made(loss)
            for part in (0, 1):
                if (part == 0) == parameter_first:
                    run("add_into", w.array, np.ones(2))
                    w.changed_in_place()
                else:
                    run("cross_entropy", loss, None, x, y, None)
        return Plan(writer, [loss])

    for first, words in ((False, "are as they were before"), (True, "may have been changed")):
        plan = build(first)
        plan.run()
        plan.arguments[1][...] = 5
        with pytest.raises(ArgumentError, match="got 5") as caught:
            plan.run()
        assert words in caught.value.__notes__[0]
        labels = np.array([[0], [1], [3], [0]])
        with pytest.raises(ArgumentError, match="got 3"):
            plan.repeat([np.zeros((4, 1, 3)), labels], [np.empty(4)], 4)
        assert plan.rounds_done == 2


def test_results_of_any_strides_are_where_they_were_in_the_step() -> None:
    x, y = np.random.default_rng(0).uniform(1, 2, (3, 4)), np.empty((3, 4))
    with recording(Recorder([x])) as writer:
        writer.made(y)
        run("relu", y, x)
    views = [y, y.T, y[::2], y[:, 1::2], y[::-1, ::-1], y[1], y[:0], y.reshape(2, 6), y[None, :, None]]
    plan = Plan(writer, views)
    plan.arguments[0][...] = x * 2
    plan.run()
    for view, found in zip(views, plan.results, strict=True):
        np.testing.assert_array_equal(found, view * 2)
        assert found.strides == view.strides
    assert not plan.one_call
