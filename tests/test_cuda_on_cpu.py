"""The shim that runs CUDA sources on the processor: what it computes, and what it refuses."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import LaunchError, RawModule

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++")

SOURCE = r"""
#define ALL 0xffffffffu

extern "C" __global__ void __launch_bounds__(256) total(double *y, const float *x, long long n)
{
    extern __shared__ double part[];
    double sum = 0;
    for (long long k = threadIdx.x; k < n; k += blockDim.x)
        sum += x[k];
    for (int by = 16; by > 0; by /= 2)
        sum += __shfl_xor_sync(ALL, sum, by);
    if (threadIdx.x % warpSize == 0)
        part[threadIdx.x / warpSize] = sum;
    __syncthreads();
    for (unsigned k = 1; threadIdx.x == 0 && k < blockDim.x / warpSize; k++)
        part[0] += part[k];
    if (threadIdx.x == 0)
        *y = part[0];
}

#define NUMBERED(name, number)                                                                                         \
    extern "C" __global__ void name(int *y, int n)                                                                     \
    {                                                                                                                  \
        const int k = (int)(blockIdx.x * blockDim.x + threadIdx.x);                                                    \
        if (k < n)                                                                                                     \
            y[k] = number;                                                                                             \
    }
NUMBERED(places, k)
NUMBERED(blocks, (int)(1000 * gridDim.x + blockIdx.x))

extern "C" __global__ void shuffles(int *y)
{
    const int lane = threadIdx.x % 32, value = 100 + lane;
    int *row = y + 6 * threadIdx.x;
    row[0] = __shfl_sync(ALL, value, 7);
    row[1] = __shfl_down_sync(ALL, value, 3);
    row[2] = __shfl_up_sync(ALL, value, 3);
    row[3] = __shfl_xor_sync(ALL, value, 8, 8);
    row[4] = (int)__ballot_sync(ALL, lane % 3 == 0);
    row[5] = __any_sync(ALL, lane == 5) + 2 * __all_sync(ALL, lane < 31);
}

extern "C" __global__ void halved(float *y, const float *x)
{
    y[threadIdx.x] = x[threadIdx.x] * 0.5f;
}

extern "C" __global__ void smallest(long long *y, const long long *x)
{
    atomicMin(y, x[threadIdx.x]);
    atomicAdd((int *)(y + 1), 2);
}

extern "C" __global__ void half_a_barrier(void) { if (threadIdx.x < 5) __syncthreads(); }
extern "C" __global__ void two_barriers(void)
{
    if (threadIdx.x < 5)
        __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void half_a_shuffle(float *x)
{
    if (threadIdx.x < 5)
        x[0] = __shfl_xor_sync(ALL, x[0], 1);
    __syncthreads();
}
extern "C" __global__ void lane_outside(float *x) { x[0] = __shfl_sync(0xffffu, x[0], 1); }
extern "C" __global__ void foreign_lane(float *x)
{
    if (threadIdx.x < 16)
        x[0] = __shfl_xor_sync(0xffffu, x[0], 16);
}
extern "C" __global__ void no_barrier(float *x)
{
    __shared__ float y[64];
    y[threadIdx.x] = threadIdx.x;
    x[threadIdx.x] = y[63 - threadIdx.x];
}
extern "C" __global__ void beyond(float *x, int n) { x[n] = 1; }
extern "C" __global__ void crooked(float *x, int n) { *(float4 *)(x + n - 999) = make_float4(1, 2, 3, 4); }
extern "C" __global__ void beyond_shared(float *x, int n)
{
    extern __shared__ float y[];
    y[n] = x[0];
}
"""

MODULE = RawModule(code=SOURCE, options=("-std=c++17",))


def launch(name: str, threads: int, *args: Any, blocks: int = 1, shared: int = 0) -> None:
    MODULE.get_function(name)((blocks,), (threads,), args, shared_mem=shared)


@pytest.fixture(params=[0, 1, 2], ids=["in order", "the other way round", "mixed"])
def order(request: pytest.FixtureRequest) -> Iterator[int]:
    RawModule.order = request.param
    yield request.param
    RawModule.order = 0


def test_a_sum_of_a_block_is_the_sum(order: int) -> None:
    x, y = np.arange(1000, dtype=np.float32), np.zeros(1)
    launch("total", 256, y, x, np.int64(x.size), shared=8 * 8)
    assert y[0] == 499500


def test_every_thread_of_every_block_runs_once_and_knows_its_place(order: int) -> None:
    y = np.full(70, -1, np.int32)
    launch("places", 32, y, np.int32(70), blocks=3)
    np.testing.assert_array_equal(y, np.arange(70))
    launch("blocks", 32, y, np.int32(70), blocks=3)
    np.testing.assert_array_equal(y, 3000 + np.arange(70) // 32)


def test_shuffles_and_votes_are_those_of_a_card(order: int) -> None:
    y, lane = np.zeros((64, 6), np.int32), np.arange(64) % 32
    launch("shuffles", 64, y)
    np.testing.assert_array_equal(y[:, 0], 107)
    np.testing.assert_array_equal(y[:, 1], 100 + np.where(lane + 3 < 32, lane + 3, lane))
    np.testing.assert_array_equal(y[:, 2], 100 + np.where(lane >= 3, lane - 3, lane))
    np.testing.assert_array_equal(y[:, 3], 100 + np.where(lane % 16 < 8, lane, lane ^ 8))
    np.testing.assert_array_equal(y[:, 4].view(np.uint32), sum(1 << k for k in range(0, 32, 3)))
    np.testing.assert_array_equal(y[:, 5], 1)


def test_atomics_of_whole_numbers_take_the_smallest_and_the_sum(order: int) -> None:
    x, y = np.array([5, 3, -7, 9]), np.zeros(2, np.int64)
    launch("smallest", 4, y, x)
    assert y.tolist() == [-7, 8]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half_a_barrier", "a barrier is not reached by all threads"),
        ("two_barriers", "wait at different barriers"),
        ("half_a_shuffle", "a shuffle is not reached by all lanes"),
        ("lane_outside", "a lane is not in the mask"),
        ("foreign_lane", "takes from a lane outside of its mask"),
    ],
)
def test_what_a_card_leaves_undefined_is_refused(name: str, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        launch(name, 64, *([] if "barrier" in name else [np.zeros(64, np.float32)]))


def test_shared_memory_that_nobody_has_written_yet_is_nan() -> None:
    x = np.zeros(64, np.float32)
    launch("no_barrier", 64, x)
    assert np.isnan(x[:32]).all()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs a processor that can flush to 0")
def test_floats_that_are_not_normal_are_0_as_in_what_cupy_compiles() -> None:
    x = np.array([2, 1, -1, 0.5], np.float32) * np.finfo(np.float32).tiny
    for options, wanted in ((), [1, 0, 0, 0]), (("-DMINIKD_DOUBLE",), [1, 0.5, -0.5, 0.25]):
        y = np.full_like(x, np.nan)
        RawModule(code=SOURCE, options=options).get_function("halved")((1,), (4,), (y, x))
        np.testing.assert_array_equal(y, np.array(wanted, np.float32) * np.finfo(np.float32).tiny)
    assert (x[1:] != 0).all()  # outside of kernels nothing is different


def test_what_the_driver_refuses_is_refused() -> None:
    y = np.zeros(1)
    with pytest.raises(LaunchError, match=r"arguments of \[8, 8, 4\] bytes"):
        launch("total", 32, y, y, np.int32(1))
    with pytest.raises(LaunchError, match="no kernel named"):
        launch("totals", 32, y)
    with pytest.raises(LaunchError, match="cannot be launched"):
        launch("total", 1056, y, y, np.int64(1))
    with pytest.raises(LaunchError, match="bytes of shared memory"):
        launch("total", 32, y, y, np.int64(1), shared=50000)
    with pytest.raises(LaunchError, match="are more than"):
        MODULE.get_function("total").max_dynamic_shared_size_bytes = 300000
    with pytest.raises(LaunchError, match="cannot be compiled"):
        RawModule(code='extern "C" __global__ void f() { x; }').get_function("f")
    with pytest.raises(ValueError, match="only nvrtc"):
        RawModule(code="", backend="nvcc")


def test_the_sanitizers_see_what_lies_beyond_an_array_and_vectors_that_begin_where_none_may() -> None:
    environment = cuda_on_cpu.sanitized()
    if environment is None:
        pytest.skip("needs the address sanitizer of g++ (libasan, libubsan)")
    code = (
        "import sys; import numpy as np; from cuda_on_cpu import RawModule; from test_cuda_on_cpu import SOURCE;"
        "x, module = np.zeros(1000, np.float32), RawModule(code=SOURCE);"
        "launch = lambda name, n: module.get_function(name)((1,), (1,), (x, np.int32(n)), shared_mem=4000);"
        "launch('beyond', 999); launch('beyond_shared', 999); launch('crooked', 1003);"
        "print('inside', flush=True); launch(sys.argv[1], 1000)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("beyond", "beyond_shared", "crooked")
    ]
    for child, words in zip(children, ("heap-buffer-overflow", "heap-buffer-overflow", "misaligned"), strict=True):
        out, err = child.communicate()
        assert out.strip() == "inside"
        assert child.returncode != 0
        assert words in err
