"""A strict stand-in for the module cupy, on the host: what CuPy refuses it refuses, and hidden copies besides.

It takes only its own arrays, Python numbers and NumPy's numbers. Whatever would make the host wait for a GPU without
saying so (the truth of an array, a loop over it, reading it by a mask) raises `HiddenCopy`; copies that are asked for
by name (`get`, `asnumpy`, `item`, `asarray` of a NumPy array) are counted in `COPIES`. Results of reductions are arrays
without axes. `USED` collects which of CuPy's names were used, and with which keywords.

``with installed():`` puts it into `sys.modules` as cupy.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from standin import cublas

# --- what tests look at ---


class HiddenCopy(AssertionError):
    """The host would have waited for the GPU here without anybody asking for it."""


class Copies:
    """How many copies there were between the host and the device since the last `reset`.

    `queued` are copies to the device that the host does not wait for, by `runtime.memcpyAsync`; `freed_under_way`
    counts pinned memory that was given back while it may still have been read for one of them.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.to_host = self.to_device = self.queued = self.freed_under_way = 0


COPIES = Copies()
USED: dict[str, set[str]] = {}  # a name of CuPy's → the keywords that it was called with


def _used(name: str, keywords: Any = ()) -> None:
    USED.setdefault(name, set()).update(keywords)


# --- memory ---


class CUDARuntimeError(RuntimeError):
    """What the driver refuses."""


class _Memory:
    """One piece of the pool: counted as long as it lives."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.size = array, max(512, -(-array.nbytes // 512) * 512)
        _pool.used += self.size
        _pool.allocations += 1
        weakref.finalize(self, _pool.take_back, self.size)

    @property
    def ptr(self) -> int:
        return int(self.array.ctypes.data)


class MemoryPool:
    def __init__(self) -> None:
        self.used = self.allocations = self._most = 0

    def take_back(self, size: int) -> None:
        self.used -= size

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        self._most = max(self._most, self.used)
        return self._most

    def free_all_blocks(self) -> None:
        self._most = self.used

    def malloc(self, size: int) -> MemoryPointer:
        return alloc(size)


_pool = MemoryPool()


class MemoryPointer:
    """An address on the device, and the memory that it keeps alive."""

    def __init__(self, mem: _Memory, offset: int) -> None:
        self.mem, self.offset = mem, offset

    @property
    def ptr(self) -> int:
        return self.mem.ptr + self.offset

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.offset + int(offset))

    def __int__(self) -> int:
        return self.ptr

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        _refuse_captured("memset")
        ctypes.memset(self.ptr, value, size)

    def copy_from_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        COPIES.to_device += 1
        ctypes.memmove(self.ptr, mem, size)


def alloc(size: int) -> MemoryPointer:
    _used("cuda.alloc")
    _refuse_captured("an allocation")
    return MemoryPointer(_Memory(np.empty(max(int(size), 1), np.uint8)), 0)


# --- arrays ---


class _Flags:
    """CuPy's flags of an array: it has no `writeable` and no `num`."""

    __slots__ = ("c_contiguous", "f_contiguous", "owndata")

    def __init__(self, array: np.ndarray, owns: bool) -> None:
        self.c_contiguous, self.f_contiguous = array.flags.c_contiguous, array.flags.f_contiguous
        self.owndata = owns


def _plain(value: Any) -> Any:
    """What NumPy gets in the place of an argument."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(_plain(v) for v in value)
    return value


def _own(value: Any, *sources: Any) -> Any:
    """What is given back in the place of NumPy's result; a view of one of the sources keeps that one."""
    if isinstance(value, tuple | list):
        return type(value)(_own(v, *sources) for v in value)
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return value
    for source in sources:
        if isinstance(source, ndarray):
            if source._array is value:
                return source
            if value.base is not None and np.may_share_memory(source._array, value):
                return type(source)._of(value, source)  # which may be of a class derived from this one
    _refuse_captured("an allocation")
    return ndarray._of(value if value.base is None else value.copy(order="K"), None)


def _arrays_in(values: Any) -> list[ndarray]:
    found: list[ndarray] = []
    for value in values:
        if isinstance(value, ndarray):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _arrays_in(value)
    return found


def _call(function: Any, *args: Any, **options: Any) -> Any:
    """A function of NumPy on own arrays."""
    if getattr(function, "__name__", "") == "matmul":
        _refuse_captured("a matrix product")
    with np.errstate(all="ignore"):
        result = function(*(_plain(a) for a in args), **{k: _plain(v) for k, v in options.items()})
    return _own(result, *_arrays_in([*args, *options.values()]))


class ndarray:
    __slots__ = ("__weakref__", "_array", "_base", "_memory")
    __array_priority__ = 100

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> None:
        _used("ndarray")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._base: Any = None
        if memptr is None:
            _refuse_captured("an allocation")
            self._array = np.empty(shape, dtype, order)
            self._memory = _Memory(self._array)
            return
        whole, self._memory = memptr.mem.array.reshape(-1).view(np.uint8), memptr.mem
        self._array = np.ndarray(shape, dtype, whole, memptr.offset, strides)

    @classmethod
    def _of(cls, array: np.ndarray, base: ndarray | None) -> ndarray:
        made = cls.__new__(cls)
        made._array, made._base = array, None if base is None else base if base._base is None else base._base
        made._memory = _Memory(array) if base is None else base._memory
        return made

    # how it looks

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    strides = property(lambda self: self._array.strides)
    base = property(lambda self: self._base)
    flags = property(lambda self: _Flags(self._array, self._base is None))
    T = property(lambda self: _own(self._array.T, self))
    real = property(lambda self: _own(self._array.real, self))

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._memory, int(self._array.ctypes.data) - self._memory.ptr)

    @property
    def device(self) -> Any:
        return Device(0)

    def __len__(self) -> int:
        return len(self._array)

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:
        """The same memory as another dtype, or as an array of a derived class."""
        _used("ndarray.view")
        kind = _kind_of(dtype) if type is None else type
        if kind is not None:
            return kind._of(self._array, self)
        return _own(self._array.view() if dtype is None else self._array.view(dtype), self)

    # copies that are asked for

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        _used("ndarray.get")
        _refuse_captured("a copy to the host")
        COPIES.to_host += 1
        if out is None:
            return np.array(self._array, order=order)
        out[...] = self._array
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        _used("ndarray.set")
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError("Only numpy.ndarray of the same shape and dtype can be set to cupy.ndarray")
        COPIES.to_device += 1
        self._array[...] = arr

    def item(self, *args: Any) -> Any:
        _used("ndarray.item")
        _refuse_captured("a copy to the host")
        COPIES.to_host += 1
        return self._array.item(*args)

    def tolist(self) -> Any:
        _used("ndarray.tolist")
        COPIES.to_host += 1
        return self._array.tolist()

    # copies that nobody asked for

    def _hidden(self, *args: Any, **options: Any) -> Any:
        raise HiddenCopy("the host would wait for the device here; copy by name, or compute there")

    __float__ = __int__ = __bool__ = __index__ = __complex__ = __iter__ = __repr__ = __str__ = __format__ = _hidden
    nonzero = tobytes = __contains__ = _hidden

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    # indexing

    def __getitem__(self, key: Any) -> ndarray:
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(p, ndarray) and p.dtype == bool for p in parts):
            self._hidden()
        return _own(np.asarray(self._array[_plain(key)]), self) if _is_view(parts) else self._gathered(key)

    def _gathered(self, key: Any) -> ndarray:
        return _own(np.array(self._array[_plain(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_captured("an assignment")
        with np.errstate(all="ignore"):
            self._array[_plain(key)] = _plain(value)

    # NumPy's functions and operators

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method not in ("__call__", "at"):
            return NotImplemented
        _used(ufunc.__name__, () if method == "at" else options)
        if "out" in options:
            options["out"] = options["out"][0]
        return _call(getattr(ufunc, method), *inputs, **options)

    def __array_function__(self, function: Any, kinds: Any, args: Any, options: Any) -> Any:
        raise HiddenCopy(f"numpy.{function.__name__} of a device's array: name the array module")

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def __reduce__(self) -> Any:
        COPIES.to_host += 1
        return array, (self._array.copy(),)

    def __dlpack__(self, **options: Any) -> Any:
        _used("ndarray.__dlpack__")
        return self._array.__dlpack__(**{name: value for name, value in options.items() if name != "stream"})

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CUDA_DEVICE, 0)


def _kind_of(dtype: Any) -> Any:
    """The class of arrays that is given in a dtype's place, or None."""
    return dtype if isinstance(dtype, type) and issubclass(dtype, ndarray) else None


CUDA_DEVICE = 2  # DLPack's number for memory of a CUDA device


def _is_view(parts: tuple[Any, ...]) -> bool:
    return all(isinstance(p, int | np.integer | slice) or p is None or p is Ellipsis for p in parts)


def _operator(name: str) -> Any:
    def operate(self: ndarray, *others: Any) -> Any:
        if any(isinstance(o, np.ndarray) for o in others):
            raise TypeError(f"Unsupported type {type(others[0])}")
        if any(not isinstance(o, ndarray | bool | int | float | np.generic) for o in others):
            return NotImplemented
        return _call(getattr(np.ndarray, name), self, *others)

    return operate


def _in_place(name: str) -> Any:
    def operate(self: ndarray, other: Any) -> Any:
        _refuse_captured("an assignment")
        with np.errstate(all="ignore"):
            getattr(np.ndarray, name)(self._array, _plain(other))
        return self

    return operate


_BINARY = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
for _name in _BINARY.split():
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(ndarray, _form, _operator(_form))
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"]:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _method(name: str) -> Any:
    def call(self: ndarray, *args: Any, **options: Any) -> Any:
        _used(f"ndarray.{name}", options)
        return _call(getattr(np.ndarray, name), self, *args, **options)

    return call


_METHODS = "all any argmax argmin astype clip copy cumsum dot fill flatten max mean min prod ravel repeat reshape sum"
for _name in (_METHODS + " squeeze swapaxes take transpose argsort round").split():
    setattr(ndarray, _name, _method(_name))


# --- functions that differ from NumPy's ---


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", **options: Any) -> ndarray:
    _used("array", options)
    if isinstance(obj, ndarray):
        same = (dtype is None or obj.dtype == dtype) and (order in ("K", "A") or obj.flags.c_contiguous)
        return obj if not copy and same else _own(np.array(obj._array, dtype, order=order))
    if isinstance(obj, np.ndarray):
        COPIES.to_device += 1
    return _own(np.array(obj, dtype, order=order))


def asarray(a: Any, dtype: Any = None, order: str = "K", **options: Any) -> ndarray:
    _used("asarray", options)
    return array(a, dtype, copy=False, order=order)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    _used("ascontiguousarray")
    return array(a, dtype, copy=False, order="C")


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    _used("asnumpy")
    if isinstance(a, ndarray):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(a, order=order)


def where(condition: Any, x: Any = None, y: Any = None) -> ndarray:
    _used("where")
    if x is None or y is None:
        raise HiddenCopy("where of one argument waits for the device: its result has as many rows as it finds")
    if not isinstance(condition, ndarray):
        raise TypeError(f"a condition must be a cupy.ndarray, not {type(condition)}")
    return _call(np.where, condition, x, y)


def take(a: Any, indices: Any, axis: Any = None, out: Any = None) -> ndarray:
    _used("take", () if out is None else ("out",))
    # numbers that are too large wrap round in CuPy
    options = {} if out is None else {"out": out}
    return _call(np.take, a, indices, axis=axis, mode="wrap", **options)


def copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    _used("copyto")
    if not isinstance(dst, ndarray):
        raise TypeError("dst must be a cupy.ndarray")
    _refuse_captured("an assignment")
    np.copyto(dst._array, _plain(src), casting)


def from_dlpack(array: Any, *, device: Any = None, copy: bool | None = None) -> ndarray:
    _used("from_dlpack")
    if isinstance(array, ndarray):
        return ndarray._of(array._array, array)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] != CUDA_DEVICE:
        raise BufferError("the array lies on the host")
    found = np.from_dlpack(array)
    if not found.flags.writeable:  # as older versions of NumPy have it, and CuPy does not
        memory = (ctypes.c_char * max(found.nbytes, 1)).from_address(found.ctypes.data)
        memory.keeps = found
        found = np.ndarray(found.shape, found.dtype, memory, strides=found.strides)
    return ndarray._of(found, None)


def get_array_module(*args: Any) -> Any:
    _used("get_array_module")
    return sys.modules[__name__] if _arrays_in(args) else np


def get_default_memory_pool() -> MemoryPool:
    _used("get_default_memory_pool")
    return _pool


def get_default_pinned_memory_pool() -> MemoryPool:
    _used("get_default_pinned_memory_pool")
    return MemoryPool()


def _synchronising(name: str) -> Any:
    def refuse(*args: Any, **options: Any) -> Any:
        raise HiddenCopy(f"{name} waits for the device: its result has as many elements as it finds")

    return refuse


for _name in ("nonzero", "flatnonzero", "argwhere", "unique", "array_equal", "allclose", "extract", "compress"):
    globals()[_name] = _synchronising(_name)


# What is no function, and the same in both.
_SHARED = (type, np.dtype, float, int, type(None), types.ModuleType)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    found = getattr(np, name)
    if isinstance(found, _SHARED):
        _used(name)
        return found
    if isinstance(found, np.ufunc):
        return _Ufunc(name, found)

    def call(*args: Any, **options: Any) -> Any:
        _used(name, options)
        if name in ("empty", "zeros", "ones", "full", "arange", "eye", "empty_like", "zeros_like", "full_like"):
            _refuse_captured("an allocation")
        return _call(found, *args, **options)

    call.__name__ = name
    return call


class _Ufunc:
    def __init__(self, name: str, function: np.ufunc) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        _used(self._name, options)
        return _call(self._function, *args, **options)

    def at(self, a: ndarray, *args: Any) -> None:
        _used(f"{self._name}.at")
        if a.dtype.kind == "f":
            raise AssertionError(f"{self._name}.at adds up floats by atomics: in another order each time")
        self._function.at(a._array, *(_plain(x) for x in args))


# --- cupy.cuda ---


class Device:
    def __init__(self, device: int | None = None) -> None:
        self.id = device or 0

    @property
    def attributes(self) -> dict[str, int]:
        return {
            "MaxSharedMemoryPerBlockOptin": 99 * 1024,
            "MaxSharedMemoryPerBlock": 48 * 1024,
            "MultiProcessorCount": 4,
            "WarpSize": 32,
            "MaxThreadsPerBlock": 1024,
        }

    @property
    def mem_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        total = MEMORY["total"]
        return total - _pool.used, total

    @property
    def compute_capability(self) -> str:
        return "80"

    def synchronize(self) -> None:
        _used("cuda.Device.synchronize")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


MEMORY = {"total": 8 << 30, "devices": 1}  # which tests may make smaller


class Stream:
    """A queue of the device. While it captures, launches of raw kernels are written down and do not run."""

    null: Any = None

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        _used("cuda.Stream")
        self.ptr = 0 if null else id(self)
        self.captured: list[Any] | None = None
        self._before: list[Stream] = []

    def __enter__(self) -> Stream:
        self._before.append(_current[0])
        _current[0] = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _current[0] = self._before.pop()

    def use(self) -> Stream:
        _current[0] = self
        return self

    def synchronize(self) -> None:
        _used("cuda.Stream.synchronize")
        _refuse_captured("waiting for the stream")

    def begin_capture(self, mode: Any = None) -> None:
        _used("cuda.Stream.begin_capture")
        if self.ptr == 0:
            raise CUDARuntimeError("the null stream cannot be captured")
        self.captured = []

    def end_capture(self) -> Graph:
        _used("cuda.Stream.end_capture")
        if self.captured is None:
            raise CUDARuntimeError("the stream is not being captured")
        graph, self.captured = Graph(self.captured), None
        return graph

    def is_capturing(self) -> bool:
        return self.captured is not None

    def record(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        _used("cuda.Stream.wait_event")


class Event:
    """A moment in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        _used("cuda.Event")
        self.time = 0.0
        self._before: list[_Pinned] = []

    def record(self, stream: Any = None) -> None:
        _used("cuda.Event.record")
        self.time = time.perf_counter()
        self._before = [pinned for pinned in _all_pinned if pinned.under_way]

    def synchronize(self) -> None:
        _used("cuda.Event.synchronize")
        for pinned in self._before:
            pinned.under_way = False
        self._before = []


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds from one to the other."""
    _used("cuda.get_elapsed_time")
    return 1e3 * (end.time - start.time)


class Graph:
    """Launches that were captured, run again as often as wanted."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def launch(self, stream: Any = None) -> None:
        _used("cuda.Graph.launch")
        for run in self.launches:
            run()

    def upload(self, stream: Any = None) -> None:
        _used("cuda.Graph.upload")


_current: list[Stream] = [Stream(null=True)]
Stream.null = _current[0]


def get_current_stream() -> Stream:
    _used("cuda.get_current_stream")
    return _current[0]


def _refuse_captured(what: str) -> None:
    """What no stream takes while it is captured."""
    if _current[0].captured is not None:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


def launched(run: Any) -> None:
    """A launch of a raw kernel: run it, or write it down while the stream is captured."""
    captured = _current[0].captured
    if captured is None:
        run()
    else:
        captured.append(run)


class _Pinned:
    """Memory of the host that copies are made of, which are under way until an event behind them is waited for."""

    def __init__(self, memory: np.ndarray) -> None:
        self.begin, self.end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        self.under_way = False

    def freed(self) -> None:
        """What the next owner writes there would be what is copied."""
        _all_pinned.remove(self)
        COPIES.freed_under_way += self.under_way


_all_pinned: list[_Pinned] = []


def alloc_pinned_memory(size: int) -> Any:
    """A buffer of the host; NumPy reads it with `numpy.frombuffer`."""
    _used("cuda.alloc_pinned_memory")
    memory = np.zeros(max(int(size), 1), np.uint8)
    _all_pinned.append(_Pinned(memory))
    weakref.finalize(memory, _all_pinned[-1].freed)
    return memoryview(memory)


def _memcpy(dst: int, src: int, size: int, kind: int, stream: int = 0) -> None:
    _used("cuda.runtime.memcpyAsync")
    if kind == runtime.memcpyDeviceToHost:
        COPIES.to_host += 1
        _refuse_captured("a copy to the host")
    elif kind == runtime.memcpyHostToDevice:
        COPIES.queued += 1
        for pinned in _all_pinned:
            pinned.under_way |= pinned.begin <= src < pinned.end
    launched(lambda: ctypes.memmove(dst, src, size))


def _device_count() -> int:
    _used("cuda.runtime.getDeviceCount")
    return MEMORY["devices"]


runtime = types.SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=_device_count,
    getDeviceProperties=lambda device: {"name": b"a stand-in on the host", "multiProcessorCount": 4, "major": 8},
    getDevice=lambda: 0,
    runtimeGetVersion=lambda: 12000,
    driverGetVersion=lambda: 12000,
    memGetInfo=lambda: Device().mem_info,
    deviceSynchronize=lambda: _used("cuda.runtime.deviceSynchronize"),
    memcpyAsync=_memcpy,
    memcpyHostToDevice=1,
    CUDA_R_32F=0,
    memcpyDeviceToHost=2,
    memcpyDeviceToDevice=3,
    streamCaptureModeGlobal=0,
    streamCaptureModeThreadLocal=1,
    streamCaptureModeRelaxed=2,
)

cuda = types.ModuleType("cupy.cuda")
for _thing in (Stream, Event, Graph, Device, MemoryPool, MemoryPointer, alloc, alloc_pinned_memory, runtime):
    setattr(cuda, getattr(_thing, "__name__", "runtime"), _thing)
for _thing in (get_current_stream, get_elapsed_time):
    setattr(cuda, _thing.__name__, _thing)
cuda.cublas = cublas
cuda.device = types.SimpleNamespace(get_cublas_handle=cublas.get_cublas_handle)
cuda.is_available = lambda: MEMORY["devices"] > 0
cuda.memory = types.SimpleNamespace(MemoryPointer=MemoryPointer)


class RawModule:
    """CUDA source, compiled for the CPU by `tests/cuda_on_cpu`; its launches can be captured."""

    def __init__(self, **options: Any) -> None:
        _used("RawModule", options)
        self._module = importlib.import_module("cuda_on_cpu").RawModule(**options)

    def get_function(self, name: str) -> RawKernel:
        _used("RawModule.get_function")
        return RawKernel(self._module.get_function(name))


class RawKernel:
    """One kernel: launched at once, or when the graph is that it is captured for."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        launched(partial(self._kernel, tuple(grid), tuple(block), tuple(args), shared_mem=shared_mem))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return int(self._kernel.max_dynamic_shared_size_bytes)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self._kernel.max_dynamic_shared_size_bytes = size


@contextmanager
def installed() -> Iterator[Any]:
    """This module as cupy, and whatever was cupy before afterwards."""
    this = sys.modules[__name__]
    before = {name: sys.modules.get(name) for name in ("cupy", "cupy.cuda")}
    specification = this.__spec__
    sys.modules.update({"cupy": this, "cupy.cuda": cuda})
    COPIES.reset()
    try:
        yield this
    finally:
        this.__spec__ = specification
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
