/* A bias and an activation in one traversal; backward, the bias gradient in the same pass.
 *
 * Blocks are of 32 columns by 8 rows. */

#include "groups.h"

#define COLUMNS 32
#define ROWS 8

/* y = f(x + b), PER_VECTOR neighbouring columns for each thread; y may be x. */
template <class F>
static __device__ __forceinline__ void forward(F f, real *y, const real *x, const real *b, whole n, whole m)
{
    const bool in_vectors = rows_aligned(x, m) && rows_aligned(y, m);
    const whole first = ((whole)blockIdx.x * COLUMNS + threadIdx.x) * PER_VECTOR;
    real bias[PER_VECTOR];
    for (int v = 0; v < PER_VECTOR; v++)
        bias[v] = first + v < m ? b[first + v] : 0;
    for (whole i = (whole)blockIdx.y * ROWS + threadIdx.y; i < n; i += (whole)gridDim.y * ROWS) {
        const whole at = i * m + first;
        real row[PER_VECTOR];
        if (in_vectors && first < m) {
            load_vector(row, x + at);
            for (int v = 0; v < PER_VECTOR; v++)
                row[v] = f(row[v] + bias[v]);
            store_vector(y + at, row);
            continue;
        }
        for (int v = 0; v < PER_VECTOR; v++)
            if (first + v < m)
                y[at + v] = f(x[at + v] + bias[v]);
    }
}

/* dx = dy·slope(v + b), a column for each thread; part[band] = Σ dx of the rows of the block's band, in double. dx and
 * part may be null. `v` is y, without b, or x. */
template <class F>
static __device__ __forceinline__ void backward(double (*sums)[COLUMNS], F slope, real *dx, double *part,
                                                const real *dy, const real *v, const real *b, whole n, whole m,
                                                whole band)
{
    const whole column = (whole)blockIdx.x * COLUMNS + threadIdx.x, first = blockIdx.y * band;
    const whole end = first + band < n ? first + band : n;
    const real bias = b && column < m ? b[column] : 0;
    double total = 0;
    for (whole i = first + threadIdx.y; i < end && column < m; i += ROWS) {
        const whole at = i * m + column;
        const real dxi = dy[at] * (v ? slope(b ? v[at] + bias : v[at]) : 1);
        if (dx)
            dx[at] = dxi;
        total += dxi;
    }
    sums[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (!part || threadIdx.y != 0 || column >= m)
        return;
    for (int k = 1; k < ROWS; k++)
        total += sums[k][threadIdx.x];
    part[blockIdx.y * m + column] = total;
}

/* db = Σ of the bands, in their order */
extern "C" __global__ void __launch_bounds__(128) bias_sum(real *db, const double *part, whole bands, whole m)
{
    const whole column = (whole)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= m)
        return;
    double total = 0;
    for (whole k = 0; k < bands; k++)
        total += part[k * m + column];
    db[column] = (real)total;
}

#define ACTIVATION(name, f, slope)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name(real *y, const real *x, const real *b, whole n, whole m)    \
    {                                                                                                                  \
        forward([](real u) { return f(u); }, y, x, b, n, m);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name##_vjp(real *dx, double *part, const real *dy, const real *v, const real *b, whole n, whole m, whole band) \
    {                                                                                                                  \
        __shared__ double sums[ROWS][COLUMNS];                                                                         \
        backward(sums, [](real u) { return slope(u); }, dx, part, dy, v, b, n, m, band);                               \
    }

ACTIVATION(bias, identity, one)
ACTIVATION(bias_relu, relu, relu_slope)
ACTIVATION(bias_tanh, tanh_of, tanh_slope)
ACTIVATION(bias_sigmoid, sigmoid, sigmoid_slope)
ACTIVATION(bias_gelu, gelu, gelu_slope)
