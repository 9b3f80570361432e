"""Plans on a device: what is captured as a graph, what its kernels read, and that replays agree with eager steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from standin import cupy as standin

from minikd.errors import BackendError
from minikd.kernels.calls import Beginning, OnHost, Product, Several, taken_apart
from minikd.kernels.cuda import graphs
from minikd.kernels.cuda.graphs import COPIES_UNDER_WAY, GraphSequence, capture, join


@pytest.fixture
def cupy() -> Iterator[Any]:
    """The stand-in for CuPy."""
    graphs._captures_products.clear()
    with standin.installed() as module:
        yield module
    graphs._captures_products.clear()


# --- graphs ---


class Kernel:
    """A kernel that notes its numbers as it finds them when it runs, given by value or read at their addresses."""

    def __init__(self, found: list[Any], *numbers: Any) -> None:
        self.found, self.numbers = found, numbers
        self._kinds = [ctypes.c_int64 if getattr(n, "dtype", None) == np.int64 else ctypes.c_double for n in numbers]

    def __call__(self) -> None:
        self._note([n.item() if isinstance(n, np.ndarray) else n for n in self.numbers])

    def _note(self, values: Sequence[Any]) -> None:
        standin.launched(lambda: self.found.append(tuple(values)))

    def launch(self, addresses: Sequence[int]) -> None:
        assert len(addresses) == len(self.numbers)
        places = list(zip(self._kinds, addresses, strict=True))
        standin.launched(lambda: self.found.append(tuple(kind.from_address(at).value for kind, at in places)))


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


def test_numbers_are_copied_only_if_one_of_them_changed(cupy: Any) -> None:
    found: list[Any] = []
    rate, other = np.array(0.0), np.array(1.0)
    (graph,) = join([Kernel(found, rate), Kernel(found, other)])
    standin.COPIES.reset()
    graph()
    assert standin.COPIES.to_device == 1
    graph()
    assert standin.COPIES.to_device == 1
    rate[...] = -0.0  # another number, though it is equal
    graph()
    assert standin.COPIES.to_device == 2
    assert [str(f[0]) for f in found] == ["0.0", "1.0", "0.0", "1.0", "-0.0", "1.0"]


def test_a_graph_without_numbers_copies_nothing(cupy: Any) -> None:
    found: list[Any] = []
    (graph,) = join([Kernel(found), Kernel(found)])
    standin.COPIES.reset()
    for _ in range(3):
        graph()
    assert standin.COPIES.to_device == 0
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
        def launch(self, addresses: Sequence[int]) -> None:
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
        def launch(self, addresses: Sequence[int]) -> None:
            standin.ndarray((3,), np.float32)

    found: list[Any] = []
    kernels = [Kernel(found), Allocating(found)]
    assert join(kernels) == kernels
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
