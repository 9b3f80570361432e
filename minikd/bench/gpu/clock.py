"""The clock on a GPU: CUDA events around many calls, and the bandwidth of a copy in the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minikd.bench.measure import Call
from minikd.kernels.arrays import load_cupy

COPIED = 2**28  # bytes of the array that is copied for the bandwidth: more than any cache holds


class Events:
    """Nanoseconds for one of several calls in a row, between two events of the current stream.

    Time in which the GPU waits for the host to launch the next call counts, as it does for whoever uses it. All whose
    work is on CuPy's current stream can be timed so: PyTorch's is the same one, the default.
    """

    def __init__(self) -> None:
        self._cuda = load_cupy().cuda
        self._start, self._end = self._cuda.Event(), self._cuda.Event()

    def __call__(self, call: Call, calls: int) -> float:
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        return float(1e6 * self._cuda.get_elapsed_time(self._start, self._end) / calls)


def gpu_name() -> str:
    """The current GPU, in the driver's words."""
    cuda = load_cupy().cuda
    return str(cuda.runtime.getDeviceProperties(cuda.Device().id)["name"].decode())


def copying(size: int = COPIED) -> tuple[Callable[[], Any], int]:
    """A call that copies an array of `size` bytes on the GPU, and the bytes that pass for it: each read and written."""
    xp = load_cupy()
    source, target = xp.zeros(size, "uint8"), xp.empty(size, "uint8")

    def copy() -> None:
        xp.copyto(target, source)

    return copy, 2 * size
