"""Where arrays live: the one module that knows NumPy's arrays from CuPy's.

On the backend "cupy" arrays lie in the memory of a GPU and stay there. Nothing moves by itself: `to_device`, `to_host`
and `Here.put` copy between the two memories and are called by name. Numbers (buffers of the kinds `scalar` and
`counter`) lie on the host whatever the backend.

CuPy is imported by `load_cupy` alone, when its backend is chosen.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minikd.errors import ArgumentError, BackendError
from minikd.ops.refusals import REFUSALS

# The kinds of buffers that lie on the host whatever the backend: kernels are given them by value.
HOST_KINDS = frozenset({"scalar", "counter"})
# DLPack's numbers for memory that a GPU reads: its own, and memory that it shares with the host.
CUDA_MEMORY = (2, 13)


class Here:
    """Where the backend in use computes: its array module, the type of its arrays, and how it makes empty ones.

    There is one of these, `here`, which `minikd.kernels.use_backend` changes. Whoever asks it before a backend was
    chosen has one chosen.
    """

    __slots__ = ("array", "empty", "on_device", "xp")

    def __getattr__(self, name: str) -> Any:
        if name not in self.__slots__:
            raise AttributeError(name)
        importlib.import_module("minikd.kernels").current_backend()  # which calls `change`
        return getattr(self, name)

    def change(self, xp: Any) -> None:
        """Compute with the arrays of this module from now on."""
        self.xp: Any = xp
        self.array: Any = xp.ndarray
        self.empty: Any = xp.empty
        self.on_device = xp is not np

    def put(self, array: Any) -> Any:
        """The array where the backend computes: itself if it lies there, else a copy."""
        if self.on_device:
            return array if on_device(array) else to_device(array)
        return to_host(array) if on_device(array) else array


here = Here()


def load_cupy() -> Any:
    """The module cupy, imported at the first call."""
    return importlib.import_module("cupy")


NO_GPU = "there is no GPU in this machine"


def gpu_missing() -> str:
    """Why there is no GPU, or an empty text if there is one: in the driver's words, or CuPy's once it is loaded."""
    return _missing_to_driver() if _cupy() is None else cupy_missing()


def _missing_to_driver() -> str:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"there is no driver of an NVIDIA GPU on this machine ({name})"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the driver of NVIDIA's GPUs answers with error {status}"
    return "" if count.value else NO_GPU


def cupy_missing() -> str:
    """Why CuPy cannot compute here, or an empty text if it can; it is imported for that."""
    try:
        count = load_cupy().cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install 'minikd[cupy]'"
    except RuntimeError as error:  # of the driver: there is none, or it is too old
        return f"CuPy finds no GPU ({error})"
    return "" if count else NO_GPU


# --- what an array is ---


def _cupy() -> ModuleType | None:
    """CuPy if somebody imported it: until then there is no array of it."""
    return sys.modules.get("cupy")


def on_device(value: Any) -> bool:
    """Whether this is an array in the memory of a GPU."""
    cupy = _cupy()
    return cupy is not None and isinstance(value, cupy.ndarray)


def is_array(value: Any) -> bool:
    """Whether this is an array of NumPy or of CuPy."""
    return isinstance(value, np.ndarray) or on_device(value)


def module_of(array: Any) -> Any:
    """The module whose array this is: NumPy, also for what is no array, or CuPy."""
    return _cupy() if on_device(array) else np


def place_of(array: Any) -> str:
    """In words, whose array this is."""
    return "a CuPy array" if on_device(array) else "a NumPy array"


def owner_of(array: Any) -> Any:
    """The array whose memory this one looks at."""
    while is_array(array.base):
        array = array.base
    return array


def address(array: Any) -> int:
    """Where the array's first element lies, in the memory that it is in."""
    return int(array.data.ptr if on_device(array) else array.__array_interface__["data"][0])


def is_writable(array: Any) -> bool:
    """Whether the array may be written to; CuPy has no others."""
    return on_device(array) or bool(array.flags.writeable)


# --- moving, always by name ---


def to_device(array: Any) -> Any:
    """A copy of a NumPy array in the memory of the current GPU, made on the current stream."""
    return load_cupy().asarray(array)


def to_host(array: Any) -> Any:
    """A copy of a CuPy array as a NumPy array, once all that computes it is done; a NumPy array as it is.

    Raises
    ------
    ArgumentError : an operation on the device was given a wrong label or row number before.
    """
    if not on_device(array):
        return array
    found = load_cupy().asnumpy(array)
    REFUSALS.check()
    return found


def host_copy(array: Any) -> Any:
    """A copy of an array in NumPy's memory, wherever it lies."""
    return to_host(array) if on_device(array) else array.copy()


def synchronize() -> None:
    """Wait until the current GPU has done all that was asked of it, and raise what it had to refuse meanwhile.

    Where no GPU is in use nothing is left to wait for.

    Raises
    ------
    ArgumentError : an operation on the device was given a wrong label or row number before.
    """
    if here.on_device:
        here.xp.cuda.get_current_stream().synchronize()
        REFUSALS.check()


# The names of places: those of devices, and those of the backends that compute there.
PLACES = {"cpu": False, "numpy": False, "c": False, "numba": False, "cuda": True, "cupy": True}


def placed(where: str, array: Any, place: str | None) -> Any:
    """The array at this place ("cpu", "cuda" or a backend's name; None for `here`): itself if it lies there, or a copy.

    Raises
    ------
    ArgumentError : an unknown place.  BackendError : there is no GPU.
    """
    if place is None:
        return here.put(array)
    if place not in PLACES:
        raise ArgumentError(where, "the place", expected="one of " + ", ".join(PLACES), got=repr(place))
    if PLACES[place] == on_device(array):
        return array
    if not PLACES[place]:
        return to_host(array)
    reason = cupy_missing()
    if reason:
        expected = "one that there is: " + ", ".join(name for name, gpu in PLACES.items() if not gpu)
        raise BackendError(where, "the place", expected=expected, got=repr(place), fix=f"Reason: {reason}.")
    return to_device(array)


def here_too(array: Any, other: Any) -> Any:
    """The array where the other one lies: itself, or a copy."""
    return placed("a copy", array, "cuda" if on_device(other) else "cpu")


def from_dlpack(value: Any) -> Any:
    """An array of NumPy or CuPy on the memory of another library's array, wherever that lies, without a copy."""
    if int(value.__dlpack_device__()[0]) in CUDA_MEMORY:
        return load_cupy().from_dlpack(value)
    return np.from_dlpack(value)


# --- what may stand in an operation's place of an array ---


def taken_in(where: str, argument: str, value: Any, array: Any) -> Any:
    """`array`, which was made of `value`, where the backend computes.

    Numbers, and lists of them, are copied there; an array that lies elsewhere is refused.

    Raises
    ------
    BackendError : an array of NumPy while the backend computes on a GPU, or the other way round.
    """
    if isinstance(array, here.array):
        return array
    if isinstance(value, bool | int | float | np.generic):
        return here.xp.full((), array.item(), array.dtype)  # which copies nothing
    if isinstance(value, list | tuple):
        return to_device(array)
    raise misplaced(where, argument, value)


def misplaced(where: str, argument: str, value: Any) -> BackendError:
    """The one error for an array that lies where the backend does not compute."""
    if on_device(value):
        expected = "a NumPy array under this backend"
        fix = "Copy it with cupy.asnumpy, move a model with model.to('cpu'), or use_backend('cupy')."
    else:
        expected = "a CuPy array under the backend cupy"
        fix = "Copy it with cupy.asarray, or make a kd.Tensor of it; a model moves with model.to('cupy')."
    got = place_of(value) if is_array(value) else type(value).__name__
    return BackendError(where, argument, expected=expected, got=got, fix=fix)


def host_number(where: str, argument: str, value: Any) -> None:
    """Refuse a number that lies on the device: to look at it would wait for all that is computed there.

    Raises
    ------
    BackendError
    """
    if on_device(value):
        expected = "a Python number, or a NumPy array without axes: numbers lie on the host"
        fix = "Take it to the host with .item(), outside the step."
        raise BackendError(where, argument, expected=expected, got="a CuPy array", fix=fix)


# --- memory ---


class Pinned:
    """An array of the host that a GPU reads by itself, so that the host goes on while rows of it are copied.

    Parameters
    ----------
    shape, dtype : of the array; the first axis is its rows.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        size = math.prod(shape)
        memory = here.xp.cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize)
        self._array = np.frombuffer(memory, dtype, size).reshape(shape)
        self._copied: Any = None  # when the last copy was made

    def __del__(self) -> None:
        """CuPy gives the memory to the next who asks, who may write to it: so the last copy of it is waited for."""
        if getattr(self, "_copied", None) is not None and not sys.is_finalizing():
            self._copied.synchronize()

    def for_writing(self) -> np.ndarray:
        """The array, once the last copy of it is made."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def copy_to(self, window: Any, rows: int) -> None:
        """Copy the first rows to an array of the same shape on the GPU, on the current stream, without waiting."""
        cuda, part = here.xp.cuda, self._array[:rows]
        stream = cuda.get_current_stream()
        kind = cuda.runtime.memcpyHostToDevice
        cuda.runtime.memcpyAsync(address(window), address(part), part.nbytes, kind, stream.ptr)
        self._copied = self._copied or cuda.Event(disable_timing=True)
        self._copied.record(stream)


def free_memory() -> int:
    """Bytes that new arrays on the current GPU may take: what is free there, and what CuPy's pool holds unused."""
    pool = here.xp.get_default_memory_pool()
    return int(here.xp.cuda.Device().mem_info[0] + pool.total_bytes() - pool.used_bytes())


class MemoryInUse(NamedTuple):
    """What CuPy's pool holds of the current GPU's memory, in bytes: in arrays, and in all."""

    used: int
    held: int


def gpu_in_words() -> str:
    """The current GPU's name, its memory, and how much of it CuPy's pool holds."""
    cupy = load_cupy()
    device, pool = cupy.cuda.Device(), cupy.get_default_memory_pool()
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    total, used, held = device.mem_info[1], pool.used_bytes(), pool.total_bytes()
    return f"{name} with {total >> 20:,} MiB, of which CuPy holds {held >> 20:,} and uses {used >> 20:,}"


def memory_in_use() -> MemoryInUse | None:
    """How much of the GPU's memory is in use; None while the backend in use is not "cupy"."""
    if not here.on_device:
        return None
    pool = here.xp.get_default_memory_pool()
    return MemoryInUse(int(pool.used_bytes()), int(pool.total_bytes()))
