// What a CUDA source finds when it is compiled as C++17 for the processor: the threads of a block are fibres.
//
// A fibre runs until it comes to a barrier or a shuffle, and goes on when all that it waits for have come. What a
// graphics card leaves undefined is an error here: a barrier that not all threads of the block come to, a shuffle that
// not all lanes of its mask come to, threads that wait at different places. Shared memory begins as bytes of 0xFF,
// which are NaN, and the order in which the threads of a block run is chosen by the caller, so that a barrier that is
// missing shows in the results.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#if defined(CUDA_ON_CPU_FTZ) && defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other, so one place for all of them is enough; the section lets it be found.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __constant__ static const

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
typedef dim3 uint3;

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(16) double2 {
    double x, y;
};
struct __align__(4) uchar4 {
    unsigned char x, y, z, w;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
struct __align__(16) longlong2 {
    long long x, y;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

static dim3 gridDim, blockDim, blockIdx, threadIdx;
static const int warpSize = 32;

extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_cuda_shared[];

namespace cuda_on_cpu {

enum state { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    state now = READY;
    int line = 0;             // where it waits
    unsigned mask = 0, source = 0, vote = 0;
    unsigned char value[16];  // what it hands to others in a shuffle,
    unsigned char taken[16];  // and what it gets
};

static const size_t STACK = 256 << 10;
static std::vector<fibre> fibres;
static size_t count, current;
static ucontext_t scheduler;
static char *dynamic_memory;
static void (*body)(void *);
static void *body_argument;
static char *message;
static size_t message_size;
static bool failed;

// While it lives floats below the smallest normal number are 0, as arguments and as results; fibres begin with that too.
#if defined(CUDA_ON_CPU_FTZ) && defined(__SSE2__)
struct flushing {
    const unsigned before = _mm_getcsr();

    flushing() { _mm_setcsr(before | 0x8040); } // FTZ and DAZ
    ~flushing() { _mm_setcsr(before); }
};
#else
struct flushing {
    flushing() {}
};
#endif

static inline void *dynamic_shared() { return dynamic_memory; }

static inline void fail(const char *text, int line, size_t thread)
{
    if (!failed)
        snprintf(message, message_size, "%s (line %d, block (%u, %u, %u), thread %zu)", text, line, blockIdx.x,
                 blockIdx.y, blockIdx.z, thread);
    failed = true;
}

static void start()
{
    body(body_argument);
    fibres[current].now = DONE;
    swapcontext(&fibres[current].context, &scheduler);
}

static __noinline__ void wait(state at, int line)
{
    fibre &f = fibres[current];
    f.now = at, f.line = line;
    swapcontext(&f.context, &scheduler);
}

static inline void barrier(int line, int vote = 0)
{
    fibres[current].vote = vote;
    wait(AT_BARRIER, line);
}

static inline int barrier_votes(int line, bool vote)
{
    barrier(line, vote);
    return (int)fibres[current].vote;
}

// Hand out `value` and take that of lane `source` (of this warp), once all lanes of the mask have come.
template <class T> static inline T exchange(int line, unsigned mask, T value, unsigned source)
{
    static_assert(sizeof(T) <= sizeof fibres[0].value, "too large for a shuffle");
    fibre &f = fibres[current];
    f.mask = mask, f.source = source;
    memcpy(f.value, &value, sizeof value);
    wait(AT_SHUFFLE, line);
    T taken;
    memcpy(&taken, fibres[current].taken, sizeof taken);
    return taken;
}

static inline unsigned lane() { return (unsigned)(current % 32); }

template <class T> static inline T shuffle(int line, unsigned mask, T value, int from, int width = 32)
{
    return exchange(line, mask, value, (lane() & ~(unsigned)(width - 1)) | ((unsigned)from & (width - 1)));
}

template <class T> static inline T shuffle_xor(int line, unsigned mask, T value, int with, int width = 32)
{
    const unsigned other = lane() ^ (unsigned)with;
    return exchange(line, mask, value, other / width > lane() / width ? lane() : other);
}

template <class T> static inline T shuffle_down(int line, unsigned mask, T value, unsigned by, int width = 32)
{
    const bool inside = lane() % width + by < (unsigned)width;
    return exchange(line, mask, value, inside ? lane() + by : lane());
}

template <class T> static inline T shuffle_up(int line, unsigned mask, T value, unsigned by, int width = 32)
{
    return exchange(line, mask, value, lane() % width >= by ? lane() - by : lane());
}

static inline unsigned ballot(int line, unsigned mask, bool vote)
{
    unsigned all = 0;
    fibres[current].vote = vote;
    exchange(line, mask, 0, lane());
    const size_t warp = current - current % 32;
    for (size_t k = warp; k < std::min(warp + 32, count); k++)
        all |= (fibres[k].mask >> (k - warp) & 1 & fibres[k].vote) << (k - warp);
    exchange(line, mask, 0, lane()); // nobody votes anew before all have counted
    return all;
}

// Let a warp go on whose lanes all wait in one shuffle.
static bool release_warp(size_t warp)
{
    const size_t end = std::min(warp + 32, count);
    bool any = false;
    for (size_t k = warp; k < end; k++) {
        fibre &f = fibres[k];
        if (f.now != AT_SHUFFLE)
            continue;
        bool all = (f.mask >> (k - warp) & 1) != 0;
        if (!all)
            fail("a lane is not in the mask of its own shuffle", f.line, k);
        for (unsigned l = 0; all && l < 32; l++) {
            if (!(f.mask >> l & 1))
                continue;
            const size_t other = warp + l;
            if (other >= count || fibres[other].now == DONE) {
                fail("a shuffle waits for a lane that has ended or was never there", f.line, k);
                return false;
            }
            if (fibres[other].now == AT_SHUFFLE && (fibres[other].mask != f.mask || fibres[other].line != f.line)) {
                fail("lanes of one mask wait in different shuffles", f.line, k);
                return false;
            }
            all = fibres[other].now == AT_SHUFFLE;
        }
        if (!all)
            continue;
        const unsigned mask = f.mask;
        for (unsigned l = 0; l < 32; l++)
            if (mask >> l & 1) {
                fibre &one = fibres[warp + l];
                if (one.source >= 32 || !(mask >> one.source & 1)) {
                    fail("a shuffle takes from a lane outside of its mask", one.line, warp + l);
                    return false;
                }
                memcpy(one.taken, fibres[warp + one.source].value, sizeof one.taken);
            }
        for (unsigned l = 0; l < 32; l++)
            if (mask >> l & 1)
                fibres[warp + l].now = READY;
        any = true;
    }
    return any;
}

// Let all go on if all are at one barrier.
static bool release_barrier()
{
    size_t waiting = 0, votes = 0;
    for (size_t k = 0; k < count; k++)
        waiting += fibres[k].now == AT_BARRIER, votes += fibres[k].vote;
    if (waiting != count)
        return false;
    for (size_t k = 0; k < count; k++)
        if (fibres[k].line != fibres[0].line) {
            fail("threads of a block wait at different barriers", fibres[k].line, k);
            return false;
        }
    for (size_t k = 0; k < count; k++)
        fibres[k].now = READY, fibres[k].vote = (unsigned)votes;
    return true;
}

static void stuck()
{
    for (size_t k = 0; k < count; k++)
        if (fibres[k].now == AT_SHUFFLE)
            fail("a shuffle is not reached by all lanes of its mask", fibres[k].line, k);
    for (size_t k = 0; k < count; k++)
        if (fibres[k].now == AT_BARRIER)
            fail("a barrier is not reached by all threads of the block", fibres[k].line, k);
}

static __noinline__ void prepare(fibre &f)
{
    getcontext(&f.context);
    if (!f.stack)
        f.stack.reset(new char[STACK]);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
}

static void run_block(int order)
{
    const size_t shared = (size_t)(__stop_cuda_shared - __start_cuda_shared); // 0 if the section is not there
    if (shared)
        memset(__start_cuda_shared, 0xFF, shared);
    for (size_t k = 0; k < count; k++) {
        fibre &f = fibres[k];
        prepare(f);
        f.now = READY, f.vote = 0, f.mask = 0;
        f.thread.x = (unsigned)(k % blockDim.x);
        f.thread.y = (unsigned)(k / blockDim.x % blockDim.y);
        f.thread.z = (unsigned)(k / blockDim.x / blockDim.y);
    }
    for (bool live = true; live && !failed;) {
        bool ran = false;
        live = false;
        for (size_t k = 0; k < count; k++) {
            current = order == 0 ? k : order == 1 ? count - 1 - k : k * 7919 % count; // a prime above any count
            if (fibres[current].now == READY) {
                threadIdx = fibres[current].thread;
                swapcontext(&scheduler, &fibres[current].context);
                ran = true;
            }
        }
        for (size_t warp = 0; warp < count && !failed; warp += 32)
            ran |= release_warp(warp);
        if (!failed)
            ran |= release_barrier();
        for (size_t k = 0; k < count; k++)
            live |= fibres[k].now != DONE;
        if (live && !ran)
            stuck();
    }
}

struct launch {
    unsigned grid[3], block[3];
    size_t shared;
    int order; // of threads and blocks: 0 as numbered, 1 the other way round, 2 mixed
    char *message;
    size_t message_size;
};

template <class... P, size_t... I>
static void run(void (*kernel)(P...), const launch *how, void **arguments, std::index_sequence<I...>)
{
    gridDim = {how->grid[0], how->grid[1], how->grid[2]};
    blockDim = {how->block[0], how->block[1], how->block[2]};
    message = how->message, message_size = how->message_size, failed = false, *message = 0;
    count = (size_t)blockDim.x * blockDim.y * blockDim.z;
    if (fibres.size() < count)
        fibres.resize(count);
    auto bound = std::make_pair(kernel, std::tuple<P...>(*static_cast<P *>(arguments[I])...));
    typedef decltype(bound) both;
    body_argument = &bound;
    body = [](void *pointer) {
        both *b = static_cast<both *>(pointer);
        b->first(std::get<I>(b->second)...);
    };
    const size_t blocks = (size_t)gridDim.x * gridDim.y * gridDim.z;
    const flushing as_on_a_card;
    for (size_t k = 0; k < blocks && !failed; k++) {
        const size_t b = how->order == 0 ? k : blocks - 1 - k;
        blockIdx.x = (unsigned)(b % gridDim.x);
        blockIdx.y = (unsigned)(b / gridDim.x % gridDim.y);
        blockIdx.z = (unsigned)(b / gridDim.x / gridDim.y);
        dynamic_memory = static_cast<char *>(malloc(how->shared)); // just as much, for the address sanitizer to see
        memset(dynamic_memory, 0xFF, how->shared);
        run_block(how->order);
        free(dynamic_memory);
    }
}

template <class... P> static void run(void (*kernel)(P...), const launch *how, void **arguments)
{
    run(kernel, how, arguments, std::index_sequence_for<P...>());
}

// The sizes of a kernel's parameters, ended by 0.
template <class... P> static const int *sizes(void (*)(P...))
{
    static const int all[] = {(int)sizeof(P)..., 0};
    return all;
}

template <class T> static inline T replace(T *at, T with)
{
    const T before = *at;
    *at = with;
    return before;
}

} // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define __syncthreads_or(vote) (cuda_on_cpu::barrier_votes(__LINE__, (vote) != 0) != 0)
#define __syncthreads_count(vote) cuda_on_cpu::barrier_votes(__LINE__, (vote) != 0)
#define __syncwarp(...) ((void)cuda_on_cpu::exchange(__LINE__, cuda_on_cpu_mask(__VA_ARGS__), 0, cuda_on_cpu::lane()))
#define __shfl_sync(...) cuda_on_cpu::shuffle(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) cuda_on_cpu::shuffle_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) cuda_on_cpu::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) cuda_on_cpu::shuffle_up(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(__LINE__, mask, vote)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(__LINE__, mask, vote) != 0)
#define __all_sync(mask, vote) (cuda_on_cpu::ballot(__LINE__, mask, vote) == (mask))

static inline unsigned cuda_on_cpu_mask(unsigned mask = 0xffffffffu) { return mask; }

static inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T> static inline T __ldg(const T *at) { return *at; }
template <class T> static inline T __ldcs(const T *at) { return *at; }
template <class T> static inline void __stcs(T *at, T value) { *at = value; }

// Whole numbers only: a sum of floats by atomics would depend on the order in which they come.
static inline int atomicAdd(int *at, int x) { return cuda_on_cpu::replace(at, *at + x); }
static inline unsigned atomicAdd(unsigned *at, unsigned x) { return cuda_on_cpu::replace(at, *at + x); }
static inline int atomicMin(int *at, int x) { return cuda_on_cpu::replace(at, std::min(*at, x)); }
static inline unsigned atomicMin(unsigned *at, unsigned x) { return cuda_on_cpu::replace(at, std::min(*at, x)); }
static inline long long atomicMin(long long *at, long long x) { return cuda_on_cpu::replace(at, std::min(*at, x)); }

using std::max;
using std::min;

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define CUDA_ON_CPU_KERNEL(name)                                                                                       \
    EXPORTED void cuda_on_cpu_run_##name(const cuda_on_cpu::launch *how, void **arguments)                             \
    {                                                                                                                  \
        cuda_on_cpu::run(name, how, arguments);                                                                        \
    }                                                                                                                  \
    EXPORTED const int *cuda_on_cpu_sizes_##name()                                                                     \
    {                                                                                                                  \
        return cuda_on_cpu::sizes(name);                                                                               \
    }
