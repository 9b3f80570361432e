/* Operations that treat every element alone, or every row: activations, dropout, optimizer steps, copies, and rows that
 * are gathered. A thread has PER_VECTOR neighbouring elements, in one access where the arrays begin as vectors must. */

#include "groups.h"

/* The first of a thread's elements, of `step` for each thread. */
INLINE whole first_of(int step)
{
    return ((whole)blockIdx.x * blockDim.x + threadIdx.x) * step;
}

/* Up to PER_VECTOR elements of x behind `at`; 0 for those that are not there. */
INLINE void load(real *to, const real *x, whole at, whole size, bool in_vectors)
{
    if (in_vectors && at + PER_VECTOR <= size) {
        load_vector(to, x + at);
        return;
    }
#pragma unroll
    for (int v = 0; v < PER_VECTOR; v++)
        to[v] = at + v < size ? x[at + v] : 0;
}

INLINE void store(real *x, const real *from, whole at, whole size, bool in_vectors)
{
    if (in_vectors && at + PER_VECTOR <= size) {
        store_vector(x + at, from);
        return;
    }
#pragma unroll
    for (int v = 0; v < PER_VECTOR; v++)
        if (at + v < size)
            x[at + v] = from[v];
}

/* y = f(x), element by element; y may be x. */
template <class F> static __device__ __forceinline__ void map(F f, real *y, const real *x, whole size)
{
    const whole at = first_of(PER_VECTOR);
    const bool in_vectors = aligned(y) && aligned(x);
    real of_x[PER_VECTOR];
    load(of_x, x, at, size, in_vectors);
    for (int v = 0; v < PER_VECTOR; v++)
        of_x[v] = f(of_x[v]);
    store(y, of_x, at, size, in_vectors);
}

/* y = f(a, b), element by element; y may be either. */
template <class F>
static __device__ __forceinline__ void map_two(F f, real *y, const real *a, const real *b, whole size)
{
    const whole at = first_of(PER_VECTOR);
    const bool in_vectors = aligned(y) && aligned(a) && aligned(b);
    real of_a[PER_VECTOR], of_b[PER_VECTOR];
    load(of_a, a, at, size, in_vectors);
    load(of_b, b, at, size, in_vectors);
    for (int v = 0; v < PER_VECTOR; v++)
        of_a[v] = f(of_a[v], of_b[v]);
    store(y, of_a, at, size, in_vectors);
}

/* --- copies --- */

/* y = x */
extern "C" __global__ void __launch_bounds__(256) copy(real *y, const real *x, whole size)
{
    map([](real xj) { return xj; }, y, x, size);
}

/* y += x */
extern "C" __global__ void __launch_bounds__(256) add_into(real *y, const real *x, whole size)
{
    map_two([](real yj, real xj) { return yj + xj; }, y, y, x, size);
}

/* y = factor·x;  dx = factor·dy */
extern "C" __global__ void __launch_bounds__(256) scale(real *y, const real *x, NUMBER(double, factor), whole size)
{
    const real factor = (real)GIVEN(factor);
    map([=](real xj) { return factor * xj; }, y, x, size);
}

/* y = a·b, element by element */
extern "C" __global__ void __launch_bounds__(256) multiply(real *y, const real *a, const real *b, whole size)
{
    map_two([](real aj, real bj) { return aj * bj; }, y, a, b, size);
}

/* --- activations: y = f(u);  du = dy·f', where v is y or u --- */

#define ACTIVATION(name, f, slope)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name(real *y, const real *u, whole size)                         \
    {                                                                                                                  \
        map([](real uj) { return f(uj); }, y, u, size);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) name##_vjp(real *du, const real *dy, const real *v, whole size)  \
    {                                                                                                                  \
        map_two([](real dyj, real vj) { return dyj * slope(vj); }, du, dy, v, size);                                   \
    }

ACTIVATION(apply_relu, relu, relu_slope)
ACTIVATION(apply_tanh, tanh_of, tanh_slope)
ACTIVATION(apply_sigmoid, sigmoid, sigmoid_slope)
ACTIVATION(apply_gelu, gelu, gelu_slope)

/* --- dropout: y = x·m,  m = [r ≥ p·2³²] / (1 - p),  r = philox(seed, stream, step, index).  y may be x. --- */

/* The four random words of a counter. */
INLINE void words_of(uint32_t *words, whole index, uint64_t seed, whole step, uint64_t stream)
{
    wide ab, cd;
    philox((wide)index, seed, (uint32_t)step, (uint32_t)stream, &ab, &cd);
    words[0] = (uint32_t)ab;
    words[1] = (uint32_t)(ab >> 32);
    words[2] = (uint32_t)cd;
    words[3] = (uint32_t)(cd >> 32);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout(real *y, real *mask, const real *x, NUMBER(whole, step), whole size, double p, uint64_t seed,
            uint64_t stream)
{
    const whole first = first_of(4);
    if (first >= size)
        return;
    const bool in_vectors = aligned(y) && aligned(mask) && aligned(x);
    const dropping drop = dropping_of(p);
    uint32_t words[4];
    words_of(words, first / 4, seed, GIVEN(step), stream);
#pragma unroll
    for (int k = 0; k < 4; k += PER_VECTOR) {
        real of_x[PER_VECTOR], of_mask[PER_VECTOR];
        load(of_x, x, first + k, size, in_vectors);
#pragma unroll
        for (int v = 0; v < PER_VECTOR; v++) {
            of_mask[v] = mask_of(words[k + v], drop.least, drop.scale);
            of_x[v] *= of_mask[v];
        }
        store(mask, of_mask, first + k, size, in_vectors);
        store(y, of_x, first + k, size, in_vectors);
    }
}

/* --- optimizer steps over the arena --- */

/* d = g + λ·w;  v = μ·v + d;  w -= lr·v  (Nesterov: lr·(d + μ·v); without v: lr·d) */
extern "C" __global__ void __launch_bounds__(256)
    sgd_step(real *w, real *v, const real *g, NUMBER(double, lr), whole size, double momentum, double weight_decay,
             int nesterov)
{
    const whole at = first_of(PER_VECTOR);
    const bool in_vectors = aligned(w) && aligned(v) && aligned(g);
    const real rate = (real)GIVEN(lr), keep = (real)momentum, decay = (real)weight_decay;
    real of_w[PER_VECTOR], of_v[PER_VECTOR], of_g[PER_VECTOR];
    load(of_w, w, at, size, in_vectors);
    load(of_g, g, at, size, in_vectors);
    if (v)
        load(of_v, v, at, size, in_vectors);
#pragma unroll
    for (int k = 0; k < PER_VECTOR; k++) {
        const real d = decayed(of_g[k], of_w[k], decay);
        if (v)
            of_v[k] = velocity(of_v[k], d, keep);
        of_w[k] -= rate * (v ? step_of(of_v[k], d, keep, nesterov) : d);
    }
    store(w, of_w, at, size, in_vectors);
    if (v)
        store(v, of_v, at, size, in_vectors);
}

/* m = β₁·m + (1-β₁)·g;  v = β₂·v + (1-β₂)·g²;  w -= lr·(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε).  What all elements have in
 * common is worked out once for each block, which has several stretches of elements. */
extern "C" __global__ void __launch_bounds__(256)
    adam_step(real *w, real *m, real *v, const real *g, NUMBER(double, lr), NUMBER(whole, step), whole size,
              double beta1, double beta2, double eps, double weight_decay, int decoupled)
{
    __shared__ adam_rates told;
    if (threadIdx.x == 0)
        told = adam_rates_of(GIVEN(lr), (double)GIVEN(step), beta1, beta2, eps, weight_decay, decoupled);
    __syncthreads();
    const adam_rates rates = told;
    const bool in_vectors = aligned(w) && aligned(m) && aligned(v) && aligned(g);
    for (whole at = first_of(PER_VECTOR); at < size; at += (whole)gridDim.x * blockDim.x * PER_VECTOR) {
        real of_w[PER_VECTOR], of_m[PER_VECTOR], of_v[PER_VECTOR], of_g[PER_VECTOR];
        load(of_w, w, at, size, in_vectors);
        load(of_m, m, at, size, in_vectors);
        load(of_v, v, at, size, in_vectors);
        load(of_g, g, at, size, in_vectors);
#pragma unroll
        for (int k = 0; k < PER_VECTOR; k++)
            adam_element(&rates, of_w + k, of_m + k, of_v + k, of_g[k]);
        store(w, of_w, at, size, in_vectors);
        store(m, of_m, at, size, in_vectors);
        store(v, of_v, at, size, in_vectors);
    }
}

/* g *= min(1, limit / ‖g‖): first Σ g² of every gridDim-th stretch, then the factor, which multiplies. */
extern "C" __global__ void __launch_bounds__(256) squares(double *part, const real *g, whole size)
{
    __shared__ Told told;
    const Block block(&told);
    double total = 0;
    for (whole j = first_of(1); j < size; j += (whole)gridDim.x * blockDim.x)
        total += (double)g[j] * (double)g[j];
    total = block.sum(total);
    if (threadIdx.x == 0)
        part[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(1024)
    clipping(double *factor, const double *part, whole count, double limit)
{
    __shared__ Told told;
    const Block block(&told);
    double total = 0;
    for (whole k = threadIdx.x; k < count; k += blockDim.x)
        total += part[k];
    const double norm = sqrt(block.sum(total));
    if (threadIdx.x == 0)
        *factor = norm > limit && norm <= DBL_MAX ? limit / norm : 1;
}

/* --- rows that are gathered --- */

/* A block notes the first row number that is none. */
extern "C" __global__ void __launch_bounds__(1024)
    rows_before(Refused *refused, whole call, const whole *rows, whole count, whole n)
{
    __shared__ Told told;
    const Block block(&told);
    whole wrong = NOWHERE;
    for (whole k = threadIdx.x; k < count && wrong == NOWHERE; k += blockDim.x)
        if (rows[k] < 0 || rows[k] >= n)
            wrong = k;
    wrong = block.smallest(wrong);
    if (threadIdx.x == 0 && wrong != NOWHERE)
        refuse(refused, wrong, rows[wrong], call);
}

/* y[k] = x[rows[k]], a block for each row; NaN where there is no such row. */
extern "C" __global__ void __launch_bounds__(256) take(real *y, const real *x, const whole *rows, whole n, whole m)
{
    const whole row = rows[blockIdx.x], to = blockIdx.x * m, from = row * m;
    if (row < 0 || row >= n) {
        for (whole j = threadIdx.x; j < m; j += blockDim.x)
            y[to + j] = (real)NAN;
        return;
    }
    if (rows_aligned(x, m) && rows_aligned(y, m)) {
        const vector *source = (const vector *)(x + from);
        vector *target = (vector *)(y + to);
        for (whole j = threadIdx.x; j < m / PER_VECTOR; j += blockDim.x)
            target[j] = source[j];
        return;
    }
    for (whole j = threadIdx.x; j < m; j += blockDim.x)
        y[to + j] = x[from + j];
}

/* dx[r] = Σ dy[k] of all k with rows[k] = r, in their order: a block for each row of dx. A warp looks at as many row
 * numbers at once as it has lanes. */
extern "C" __global__ void __launch_bounds__(256)
    take_vjp(real *dx, const real *dy, const whole *rows, whole count, whole m)
{
    const whole row = blockIdx.x;
    const int lane = (int)(threadIdx.x % LANES_OF_WARP);
    for (whole first = 0; first < m; first += blockDim.x) { /* for all threads alike, which look together */
        const whole j = first + threadIdx.x;
        double total = 0;
        for (whole base = 0; base < count; base += LANES_OF_WARP) {
            unsigned found = __ballot_sync(ALL_LANES, base + lane < count && rows[base + lane] == row);
            for (; found; found &= found - 1) {
                const whole k = base + __ffs((int)found) - 1;
                if (j < m)
                    total += dy[k * m + j];
            }
        }
        if (j < m)
            dx[row * m + j] = (real)total;
    }
}

/* y[k] = scale·x[rows[k]] + shift, of bytes */
extern "C" __global__ void __launch_bounds__(256)
    take_scaled(real *y, const uint8_t *x, const whole *rows, const real *scale, const real *shift, whole n, whole m)
{
    const whole row = rows[blockIdx.x], to = blockIdx.x * m, from = row * m;
    const bool right = row >= 0 && row < n, in_vectors = m % 4 == 0 && (uint64_t)x % 4 == 0;
    for (whole j = 4 * (whole)threadIdx.x; j < m; j += 4 * (whole)blockDim.x) {
        uint8_t four[4] = {0, 0, 0, 0};
        if (right && in_vectors) {
            const uchar4 bytes = *(const uchar4 *)(x + from + j);
            memcpy(four, &bytes, sizeof four);
        }
        for (int k = 0; k < 4 && j + k < m; k++) {
            const uint8_t byte = right && !in_vectors ? x[from + j + k] : four[k];
            y[to + j + k] = right ? byte * scale[j + k] + shift[j + k] : (real)NAN;
        }
    }
}

/* y[k] = x[rows[k]], of whole numbers; 0 where there is no such row. */
extern "C" __global__ void __launch_bounds__(256)
    take_index(whole *y, const whole *x, const whole *rows, whole count, whole n)
{
    const whole k = first_of(1);
    if (k < count)
        y[k] = rows[k] >= 0 && rows[k] < n ? x[rows[k]] : 0;
}

/* y = (x - mean) / deviation, column by column: a block for each row */
extern "C" __global__ void __launch_bounds__(256)
    standardise(real *y, const real *x, const real *mean, const real *deviation, whole m)
{
    const whole at = blockIdx.x * m;
    for (whole j = threadIdx.x; j < m; j += blockDim.x)
        y[at + j] = (x[at + j] - mean[j]) / deviation[j];
}

/* --- pictures that are moved by a few pixels, a block for each --- */

extern "C" __global__ void __launch_bounds__(256)
    shift_images(real *y, const real *x, const real *fill, NUMBER(whole, step), whole m, whole width, whole most,
                 uint64_t seed, uint64_t stream)
{
    const whole picture = blockIdx.x, at = picture * m, height = m / width;
    uint32_t words[4];
    words_of(words, picture / 2, seed, GIVEN(step), stream ^ 0x80000000u); /* no stream of a mask's */
    const bool second = picture % 2 != 0;
    const whole down = move_of(second ? words[2] : words[0], most), right = move_of(second ? words[3] : words[1], most);
    for (whole j = threadIdx.x; j < m; j += blockDim.x) {
        const whole line = j / width - down, column = j % width - right;
        const bool there = line >= 0 && line < height && column >= 0 && column < width;
        y[at + j] = there ? x[at + line * width + column] : fill ? fill[j] : 0;
    }
}
