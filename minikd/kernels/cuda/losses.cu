/* The losses of one array of logits: cross-entropy for hard and for soft targets, and Kullback-Leibler divergence of
 * given log-probabilities. Each takes its gradient in the same traversal as its value. */

#include "labels.h"

/* --- what all losses end with --- */

/* loss = scale·Σ of the row losses; where `scale_at` says that it is 0, the loss is 0 whatever stands in the rows. */
extern "C" __global__ void __launch_bounds__(1024)
    sum_rows(real *loss, const double *row_loss, whole count, double scale, const double *scale_at)
{
    __shared__ Told told;
    const Block block(&told);
    double total = 0;
    for (whole i = threadIdx.x; i < count; i += blockDim.x)
        total += row_loss[i];
    total = block.sum(total);
    if (threadIdx.x == 0)
        *loss = scale_at && *scale_at == 0 ? 0 : (real)(total * scale);
}

/* --- cross-entropy with integer labels --- */

/* What all rows have in common. */
struct CrossEntropy {
    double scale, weight_sum;
};

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_before(CrossEntropy *common, Refused *refused, whole call, const whole *target, const real *weight,
                         whole n, whole c, int reduction, whole ignore_index)
{
    __shared__ Told told;
    const Block block(&told);
    const double divisor = labelled_weight(block, refused, call, target, weight, n, c, ignore_index);
    const double weight_sum = weight ? sum_of(block, weight, c) : (double)c;
    if (threadIdx.x == 0) {
        common->scale = scale_of(divisor, reduction);
        common->weight_sum = weight_sum;
    }
}

#define CROSS_ENTROPY_PARAMETERS                                                                                       \
    real *loss, double *row_loss, real *gradient, const real *logits, const whole *target, const real *weight,         \
        const CrossEntropy *common, whole n, whole c, whole ignore_index, double label_smoothing
#define CROSS_ENTROPY_ARGUMENTS                                                                                        \
    loss, row_loss, gradient, logits, target, weight, common, n, c, ignore_index, label_smoothing

/* What a row's loss and gradient are finished with. */
struct HardRow {
    double loss;
    real top, factor, base, peak;
};

template <class Group, class Layout, class Row>
static __device__ __forceinline__ void cross_entropy_row(const Group &group, const Layout &layout, const Row &z,
                                                         whole row, CROSS_ENTROPY_PARAMETERS)
{
    (void)n;
    const whole y = target[row];
    const bool in_vectors = gradient && rows_aligned(gradient, c), labelled = y != ignore_index;
    real *dz = gradient ? gradient + row * c : nullptr;
    if (!labelled) {
        if (group.rank() == 0)
            put_loss(loss, row_loss, row, 0);
        if (dz)
            layout.write(dz, in_vectors, [](int, int) { return (real)0; });
        return;
    }
    const real top = maximum(group, layout, z);
    const double base = label_smoothing / (double)c;
    double total = 0, others = 0;
    layout.each([&](int k, int j) {
        const real below = z.at(k, j) - top, wj = weight ? weight[j] : 1;
        total += weight_of(below, 1);
        if (base != 0)
            others += wj == 0 ? 0 : wj * below;
    });
    total = group.sum(total);
    if (base != 0)
        others = base * group.sum(others);
    const HardRow found = group.template once<HardRow>([&] {
        HardRow h;
        const double scale = common->scale, base_sum = base * common->weight_sum;
        const bool right = is_class(y, c);
        const double peak = right ? (1 - label_smoothing) * (weight ? (double)weight[y] : 1) : (double)NAN;
        const double below_top = peak == 0 || !right ? 0 : (double)top - logits[row * c + y];
        h.loss = hard_loss(peak, below_top, base_sum, others, logarithm(total)) * scale;
        h.factor = hard_factor(peak, base_sum, reciprocal(total), scale);
        h.base = (real)(base * scale);
        h.peak = (real)(peak * scale);
        return h;
    });
    if (group.rank() == 0)
        put_loss(loss, row_loss, row, found.loss);
    if (dz)
        layout.write(dz, in_vectors, [&](int k, int j) {
            real g = weight_of(z.at(k, j) - top, 1) * found.factor;
            if (found.base != 0)
                g -= weight ? found.base * weight[j] : found.base;
            return j == y ? g - found.peak : g;
        });
}

template <int ITEMS, int V> static __device__ __forceinline__ void cross_entropy_warp(CROSS_ENTROPY_PARAMETERS)
{
    const whole row = row_of_warp();
    if (row >= n)
        return;
    const Warp group;
    const Spread<Warp::size, ITEMS, V> layout(group.rank(), c);
    const InRegisters<ITEMS> z(layout, logits + row * c, rows_aligned(logits, c));
    cross_entropy_row(group, layout, z, row, CROSS_ENTROPY_ARGUMENTS);
}

#define CROSS_ENTROPY_WARP(items, v)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128, 1) cross_entropy_warp_##items(CROSS_ENTROPY_PARAMETERS)          \
    {                                                                                                                  \
        cross_entropy_warp<items, v>(CROSS_ENTROPY_ARGUMENTS);                                                         \
    }

CROSS_ENTROPY_WARP(1, 1)
CROSS_ENTROPY_WARP(4, PER_VECTOR)
CROSS_ENTROPY_WARP(32, PER_VECTOR)

extern "C" __global__ void __launch_bounds__(256, 1) cross_entropy_block(CROSS_ENTROPY_PARAMETERS)
{
    __shared__ Told told;
    const Block group(&told);
    const Strided layout(group.rank(), (int)blockDim.x, c);
    const whole row = blockIdx.x;
    cross_entropy_row(group, layout, InMemory(logits + row * c), row, CROSS_ENTROPY_ARGUMENTS);
}

/* --- cross-entropy with class probabilities --- */

#define SOFT_PARAMETERS                                                                                                \
    real *loss, double *row_loss, real *gradient, const real *logits, const real *target, const real *weight, whole n, \
        whole c, double scale, double label_smoothing
#define SOFT_ARGUMENTS loss, row_loss, gradient, logits, target, weight, n, c, scale, label_smoothing

/* What a row's loss and gradient are finished with. */
struct SoftRow {
    double loss;
    real factor;
};

template <class Group, class Layout, class Row>
static __device__ __forceinline__ void soft_cross_entropy_row(const Group &group, const Layout &layout, const Row &z,
                                                              const Row &t, whole row, SOFT_PARAMETERS)
{
    (void)logits, (void)target, (void)n;
    const real peak = (real)(1 - label_smoothing), base = (real)(label_smoothing / (double)c), factor = (real)scale;
    const bool in_vectors = gradient && rows_aligned(gradient, c);
    const real top = maximum(group, layout, z);
    double total = 0;
    layout.each([&](int k, int j) { total += weight_of(z.at(k, j) - top, 1); });
    total = group.sum(total);
    const double log_total = group.template once<double>([&] { return logarithm(total); });
    double row_sum = 0, sum_y = 0;
    layout.each([&](int k, int j) {
        const real y = (peak * t.at(k, j) + base) * (weight ? weight[j] : 1), below = z.at(k, j) - top;
        row_sum += y == 0 ? 0 : y * (log_total - below);
        sum_y += y;
    });
    row_sum = group.sum(row_sum);
    sum_y = group.sum(sum_y);
    const SoftRow found = group.template once<SoftRow>([&] {
        SoftRow s;
        s.loss = log_total == log_total ? row_sum : log_total; /* NaN stays, whatever the targets */
        s.factor = (real)(sum_y * reciprocal(total) * scale);
        return s;
    });
    if (group.rank() == 0)
        put_loss(loss, row_loss, row, found.loss);
    if (gradient)
        layout.write(gradient + row * c, in_vectors, [&](int k, int j) {
            const real y = (peak * t.at(k, j) + base) * (weight ? weight[j] : 1);
            return weight_of(z.at(k, j) - top, 1) * found.factor - y * factor;
        });
}

template <int ITEMS, int V> static __device__ __forceinline__ void soft_cross_entropy_warp(SOFT_PARAMETERS)
{
    const whole row = row_of_warp();
    if (row >= n)
        return;
    const Warp group;
    const Spread<Warp::size, ITEMS, V> layout(group.rank(), c);
    const InRegisters<ITEMS> z(layout, logits + row * c, rows_aligned(logits, c));
    const InRegisters<ITEMS> t(layout, target + row * c, rows_aligned(target, c));
    soft_cross_entropy_row(group, layout, z, t, row, SOFT_ARGUMENTS);
}

#define SOFT_WARP(items, v)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 1) soft_cross_entropy_warp_##items(SOFT_PARAMETERS)              \
    {                                                                                                                  \
        soft_cross_entropy_warp<items, v>(SOFT_ARGUMENTS);                                                             \
    }

SOFT_WARP(1, 1)
SOFT_WARP(4, PER_VECTOR)
SOFT_WARP(32, PER_VECTOR)

extern "C" __global__ void __launch_bounds__(256, 1) soft_cross_entropy_block(SOFT_PARAMETERS)
{
    __shared__ Told told;
    const Block group(&told);
    const Strided layout(group.rank(), (int)blockDim.x, c);
    const whole row = blockIdx.x, at = row * c;
    soft_cross_entropy_row(group, layout, InMemory(logits + at), InMemory(target + at), row, SOFT_ARGUMENTS);
}

/* --- Kullback-Leibler divergence of given log-probabilities: term = q·(log q - input), 0 where q = 0 --- */

/* part[block] = Σ of the terms of every gridDim-th stretch of elements; or each term into loss, where part is null. */
extern "C" __global__ void __launch_bounds__(256)
    kl_div(real *loss, double *part, real *gradient, const real *input, const real *target, whole size, double scale,
           int log_target)
{
    __shared__ Told told;
    const Block block(&told);
    const real factor = (real)scale;
    double total = 0;
    for (whole j = (whole)blockIdx.x * blockDim.x + threadIdx.x; j < size; j += (whole)gridDim.x * blockDim.x) {
        const real given = target[j], x = input[j];
        const real q = log_target ? REAL(exp)(given) : given;
        const real log_ratio = log_target ? given - x : log_minus(q, x);
        const real term = q == 0 ? 0 : q * log_ratio;
        if (!part)
            loss[j] = term;
        if (gradient)
            gradient[j] = -q * factor;
        total += term;
    }
    if (!part)
        return;
    total = block.sum(total);
    if (threadIdx.x == 0)
        part[blockIdx.x] = total;
}

/* --- backward: dx = gradient·dloss, where dloss is one number, one for each row, or one for each element --- */

/* A row of blocks for each row. */
extern "C" __global__ void __launch_bounds__(256)
    scale_rows(real *dx, const real *dloss, const real *gradient, whole c, int each_row)
{
    const whole row = blockIdx.x;
    const real factor = dloss[each_row ? row : 0];
    for (whole j = threadIdx.x; j < c; j += blockDim.x)
        dx[row * c + j] = gradient[row * c + j] * factor;
}

/* One number for all: PER_VECTOR elements for each thread. */
extern "C" __global__ void __launch_bounds__(256)
    scale_all(real *dx, const real *dloss, const real *gradient, whole size)
{
    const whole at = ((whole)blockIdx.x * blockDim.x + threadIdx.x) * PER_VECTOR;
    const real factor = *dloss;
    real x[PER_VECTOR];
    if (at + PER_VECTOR <= size && aligned(dx) && aligned(gradient)) {
        load_vector(x, gradient + at);
        for (int v = 0; v < PER_VECTOR; v++)
            x[v] *= factor;
        store_vector(dx + at, x);
        return;
    }
    for (whole j = at; j < at + PER_VECTOR && j < size; j++)
        dx[j] = gradient[j] * factor;
}
