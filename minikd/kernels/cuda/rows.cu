/* Softmax and log-softmax over rows of class scores, with a temperature. */

#include "groups.h"

/* NaN of a temperature that is none: the host refuses it, but where it lies in the device's memory. */
INLINE real inverse_of(double temperature)
{
    return usable_temperature(temperature) ? (real)inverse_temperature(temperature) : (real)NAN;
}

/* --- y = exp((x - max x)/T) / Σ exp((x - max x)/T), or its logarithm --- */

template <bool LOGARITHM, class Group, class Layout, class Row>
static __device__ __forceinline__ void softmax_row(const Group &group, const Layout &layout, const Row &x, real *y,
                                                   real inverse_t, bool in_vectors)
{
    const real top = maximum(group, layout, x);
    double total = 0;
    real part = 0;
    layout.each([&](int k, int j) { part += weight_of(x.at(k, j) - top, inverse_t); },
                [&] {
                    total += part;
                    part = 0;
                });
    total = group.sum(total);
    const real found = group.template once<real>(
        [&] { return LOGARITHM ? (real)logarithm(total) : (real)(1 / total); });
    layout.write(y, in_vectors, [&](int k, int j) {
        const real below = x.at(k, j) - top;
        return LOGARITHM ? fused(below, inverse_t, -found) : weight_of(below, inverse_t) * found;
    });
}

#define SOFTMAX_PARAMETERS real *y, const real *x, NUMBER(double, temperature), whole n, whole c

template <bool LOGARITHM, int ITEMS, int V>
static __device__ __forceinline__ void softmax_of_warp(SOFTMAX_PARAMETERS)
{
    const whole row = row_of_warp();
    if (row >= n)
        return;
    const Warp group;
    const Spread<Warp::size, ITEMS, V> layout(group.rank(), c);
    const bool in_vectors = rows_aligned(x, c) && rows_aligned(y, c);
    const InRegisters<ITEMS> scores(layout, x + row * c, in_vectors);
    softmax_row<LOGARITHM>(group, layout, scores, y + row * c, inverse_of(GIVEN(temperature)), in_vectors);
}

template <bool LOGARITHM> static __device__ __forceinline__ void softmax_of_block(Told *told, SOFTMAX_PARAMETERS)
{
    (void)n;
    const whole row = blockIdx.x;
    const Block group(told);
    const Strided layout(group.rank(), (int)blockDim.x, c);
    softmax_row<LOGARITHM>(group, layout, InMemory(x + row * c), y + row * c, inverse_of(GIVEN(temperature)), false);
}

#define SOFTMAX(name, logarithm, items, v)                                                                             \
    extern "C" __global__ void __launch_bounds__(128, 1) name##_warp_##items(SOFTMAX_PARAMETERS)                       \
    {                                                                                                                  \
        softmax_of_warp<logarithm, items, v>(y, x, temperature_at, temperature_value, n, c);                           \
    }
#define SOFTMAX_BLOCK(name, logarithm)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 1) name##_block(SOFTMAX_PARAMETERS)                              \
    {                                                                                                                  \
        __shared__ Told told;                                                                                          \
        softmax_of_block<logarithm>(&told, y, x, temperature_at, temperature_value, n, c);                             \
    }

SOFTMAX(softmax, false, 1, 1)
SOFTMAX(softmax, false, 4, PER_VECTOR)
SOFTMAX(softmax, false, 32, PER_VECTOR)
SOFTMAX_BLOCK(softmax, false)
SOFTMAX(log_softmax, true, 1, 1)
SOFTMAX(log_softmax, true, 4, PER_VECTOR)
SOFTMAX(log_softmax, true, 32, PER_VECTOR)
SOFTMAX_BLOCK(log_softmax, true)

/* --- dx = y·(dy - Σ dy·y) / T, and 0 where y = 0; of the logarithm dx = (dy - exp(y)·Σ dy) / T --- */

template <bool LOGARITHM, class Group, class Layout, class Row>
static __device__ __forceinline__ void softmax_vjp_row(const Group &group, const Layout &layout, const Row &dy,
                                                       const Row &y, real *dx, real inverse_t, bool in_vectors)
{
    double total = 0;
    layout.each([&](int k, int j) {
        const real dyj = dy.at(k, j), yj = y.at(k, j);
        total += LOGARITHM ? dyj : yj == 0 ? 0 : dyj * yj;
    });
    const real inner = (real)group.sum(total);
    layout.write(dx, in_vectors, [&](int k, int j) {
        const real dyj = dy.at(k, j), yj = y.at(k, j);
        if (LOGARITHM)
            return (dyj - REAL(exp)(yj) * inner) * inverse_t;
        return yj == 0 ? (real)0 : yj * (dyj - inner) * inverse_t;
    });
}

#define VJP_PARAMETERS real *dx, const real *dy, const real *y, NUMBER(double, temperature), whole n, whole c

template <bool LOGARITHM, int ITEMS, int V> static __device__ __forceinline__ void vjp_of_warp(VJP_PARAMETERS)
{
    const whole row = row_of_warp(), at = row * c;
    if (row >= n)
        return;
    const Warp group;
    const Spread<Warp::size, ITEMS, V> layout(group.rank(), c);
    const bool in_vectors = rows_aligned(dx, c) && rows_aligned(dy, c) && rows_aligned(y, c);
    const InRegisters<ITEMS> given(layout, dy + at, in_vectors), result(layout, y + at, in_vectors);
    softmax_vjp_row<LOGARITHM>(group, layout, given, result, dx + at, inverse_of(GIVEN(temperature)), in_vectors);
}

template <bool LOGARITHM> static __device__ __forceinline__ void vjp_of_block(Told *told, VJP_PARAMETERS)
{
    (void)n;
    const whole at = blockIdx.x * c;
    const Block group(told);
    const Strided layout(group.rank(), (int)blockDim.x, c);
    softmax_vjp_row<LOGARITHM>(group, layout, InMemory(dy + at), InMemory(y + at), dx + at,
                               inverse_of(GIVEN(temperature)), false);
}

#define VJP(name, logarithm, items, v)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 1) name##_vjp_warp_##items(VJP_PARAMETERS)                       \
    {                                                                                                                  \
        vjp_of_warp<logarithm, items, v>(dx, dy, y, temperature_at, temperature_value, n, c);                          \
    }
#define VJP_BLOCK(name, logarithm)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1) name##_vjp_block(VJP_PARAMETERS)                              \
    {                                                                                                                  \
        __shared__ Told told;                                                                                          \
        vjp_of_block<logarithm>(&told, dx, dy, y, temperature_at, temperature_value, n, c);                            \
    }

VJP(softmax, false, 1, 1)
VJP(softmax, false, 4, PER_VECTOR)
VJP(softmax, false, 32, PER_VECTOR)
VJP_BLOCK(softmax, false)
VJP(log_softmax, true, 1, 1)
VJP(log_softmax, true, 4, PER_VECTOR)
VJP(log_softmax, true, 32, PER_VECTOR)
VJP_BLOCK(log_softmax, true)
