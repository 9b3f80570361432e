"""The CUDA kernels, run on the processor, against the reference: values, edges, what they refuse, and their bits."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import RawModule

from minikd.errors import ArgumentError
from minikd.kernels import kernel_names, native, prepare
from minikd.kernels.cuda import launches
from minikd.kernels.cuda.table import KERNELS, VARIANTS
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS
from minikd.ops.op import KINDS

FLOATS = ("float32", "float64")
each_float = pytest.mark.parametrize("dtype", FLOATS)
pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++"),
    pytest.mark.usefixtures("card"),
]


# --- a stand-in for the few parts of CuPy that launches needs ---


class Pointer(NamedTuple):
    ptr: int


class DeviceArray(np.ndarray):
    """An array whose address is found as CuPy's is."""

    @property
    def data(self) -> Any:
        return Pointer(self.ctypes.data)


def on_device(x: Any) -> Any:
    return np.array(x, order="C").view(DeviceArray)


class Device:
    shared = 232448

    @property
    def attributes(self) -> dict[str, int]:
        return {"MaxSharedMemoryPerBlockOptin": Device.shared}


def filled(shape: Any, dtype: Any) -> Any:
    """Memory as it may be found: nothing that a kernel may rely on."""
    return on_device(np.frombuffer(bytes([0xFF]) * np.empty(shape, dtype).nbytes, dtype).reshape(shape))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in: Any = types.ModuleType("cupy")
    stand_in.RawModule = RawModule
    stand_in.empty = filled
    stand_in.zeros = lambda shape, dtype: on_device(np.zeros(shape, dtype))
    stand_in.cuda = types.SimpleNamespace(Device=Device)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(launches, "refusals", launches.Refusals())
    monkeypatch.setattr(launches, "_module", MODULES)
    yield
    RawModule.order = 0


_built: dict[Any, Any] = {}


def MODULES(name: str, double: bool, cupy: Any) -> Any:
    """Modules that all tests share, for each stand-in is another."""
    if (name, double) not in _built:
        _built[name, double] = MAKE_MODULE(name, double, cupy)
    return _built[name, double]


MAKE_MODULE = launches._module.__wrapped__

# --- running a kernel and its reference ---


def is_host(kind: str) -> bool:
    return kind in ("scalar", "counter")


def bound(name: str, *buffers: Any, **attrs: Any) -> Any:
    """A call of a kernel on copies of these buffers, and the copies."""
    op = OPS[name.removesuffix("_vjp")]
    arguments = op.buffers if name == op.name else op.vjp_buffers
    given = [b if b is None or is_host(a.kind) else on_device(b) for a, b in zip(arguments, buffers, strict=True)]
    full = {**op.attrs, **attrs}
    return launches.launcher(name)(given, full).bind(*given), given


def run(name: str, *buffers: Any, **attrs: Any) -> list[Any]:
    """The buffers after the kernel ran, as plain arrays."""
    call, given = bound(name, *buffers, **attrs)
    call()
    return [np.array(b) if b is not None else None for b in given]


def reference(name: str, *buffers: Any, **attrs: Any) -> None:
    with np.errstate(all="ignore"):
        bind_reference(name)(*buffers, **{**OPS[name.removesuffix("_vjp")].attrs, **attrs})()


def widen(x: Any) -> Any:
    return x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x


def assert_agrees(actual: Any, wanted: Any, few: float = 64) -> None:
    if actual.dtype.kind == "i":
        np.testing.assert_array_equal(actual, wanted)
        return
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted))
    finite = wanted[np.isfinite(wanted)]
    tolerance = few * float(np.finfo(actual.dtype).eps)
    np.testing.assert_allclose(
        actual, wanted, rtol=tolerance, atol=tolerance * max(1.0, np.abs(finite).max(initial=0.0))
    )


class Case(NamedTuple):
    """A forward call's written buffers and inputs."""

    written: list[Any]
    inputs: list[Any]
    attrs: dict[str, Any]


def cases(name: str, dtype: str, seed: int = 1) -> Iterator[Case]:
    """The operation's examples, with buffers to be written."""
    op, rng = OPS[name], np.random.default_rng(seed)
    for raw, attrs in op.example(rng, np.dtype(dtype).type):
        full = {**op.attrs, **attrs}
        inputs, _ = prepare(op, raw, np.dtype(dtype))
        shapes, saved = op.infer([None if x is None else np.shape(x) for x in inputs], full)
        kinds = [KINDS[a.kind] or np.dtype(dtype) for a in op.outs]
        outs = [np.full(s, np.nan if k.kind == "f" else -7, k) for s, k in zip(shapes, kinds, strict=True)]
        updates = [np.abs(rng.normal(size=np.shape(inputs[0]) if inputs else 67)).astype(dtype) for _ in op.updates]
        written = [*outs, *updates, *(np.full(s, np.nan, dtype) for s in saved)]
        yield Case(written, [np.asarray(x) if x is not None else None for x in inputs], full)


def check(name: str, case: Case, dtype: str, few: float = 64) -> None:
    """A kernel and its vjp against the reference in float64."""
    op, rng = OPS[name], np.random.default_rng(2)
    wide = [widen(x.copy()) for x in case.written]
    reference(name, *wide, *(widen(x) for x in case.inputs), **case.attrs)
    found = run(name, *case.written, *case.inputs, **case.attrs)
    written = found[: len(case.written)]
    for actual, wanted in zip(written, wide, strict=True):
        assert_agrees(actual, wanted, few)
    for given, after in zip(case.inputs, found[len(case.written) :], strict=True):
        np.testing.assert_array_equal(given, after)
    if op.vjp and name + "_vjp" in KERNELS:
        given = [x for a, x in zip(op.inputs, case.inputs, strict=True) if a.name in op.wrt]
        dins = [None if x is None else np.full_like(x, np.nan) for x in given]
        douts = [np.asarray(rng.normal(size=x.shape), dtype) for x in written[: len(op.outs)]]
        behind = [*douts, *written, *case.inputs]
        unread = [
            x if a.role == "dout" or a.name in op.vjp_reads else None
            for a, x in zip(op.vjp_buffers[len(dins) :], behind, strict=True)
        ]
        wide_dins = [widen(x) for x in dins]
        reference(name + "_vjp", *wide_dins, *(widen(x) for x in behind), **case.attrs)
        found = run(name + "_vjp", *dins, *unread, **case.attrs)
        for actual, wanted in zip(found, wide_dins, strict=False):
            if wanted is not None:
                assert_agrees(actual, wanted, few)


FORWARD = sorted(n for n in KERNELS if not n.endswith("_vjp"))


@each_float
@pytest.mark.parametrize("name", FORWARD)
def test_every_kernel_agrees_with_the_reference_on_every_example(name: str, dtype: str) -> None:
    for case in cases(name, dtype):
        check(name, case, dtype)


def test_every_kernel_is_one_of_the_table_of_operations() -> None:
    assert launches.NAMES <= set(kernel_names())
