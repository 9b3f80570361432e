/* Softmax and log-softmax over rows of class scores, with a temperature. */

#include "rows.h"

static void softmax_tile(real *y, const real *x, int64_t c, int64_t count, const softening *s)
{
    real tile[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, scale[LANES] ALIGNED;
    double total[LANES] ALIGNED;
    load_tile(tile, x, c, count);
    maxima(top, tile, c);
    tile_weights(tile, total, tile, top, c, FEW, s);
    for (int l = 0; l < LANES; l++)
        scale[l] = (real)(1 / total[l]);
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] *= scale[l];
    }
    store_tile(y, tile, c, count);
}

/* y = e·scale, past the caches. */
static void scale_past_caches(real *y, const real *e, int64_t c, real scale)
{
    real block[BLOCK];
    for (int64_t first = 0; first < c; first += BLOCK) {
        const int64_t count = block_size(c - first);
        SIMD
        for (int64_t j = 0; j < count; j++)
            block[j] = e[first + j] * scale;
        copy_past_caches(y + first, block, count);
    }
}

/* `memory` is a row of its own for results that go past the caches, else NULL. */
static void softmax_row(real *y, const real *x, int64_t c, const softening *s, real *memory)
{
    real *e = memory ? memory : y;
    const real scale = (real)(1 / weights(e, x, c, s, maximum(x, c)));
    if (memory) {
        scale_past_caches(y, e, c, scale);
        return;
    }
    SIMD
    for (int64_t j = 0; j < c; j++)
        y[j] *= scale;
}

/* What the rows of one call have in common. */
typedef struct {
    real *y;
    const real *x;
    int64_t n, c;
    softening s;
    real inverse_t;
} softmax_rows_of;

static softmax_rows_of softmax_job(const minikd_call *call)
{
    const double inverse = inverse_temperature(*(const double *)call->buffer[2]);
    const softmax_rows_of job = {call->buffer[0], call->buffer[1], call->size[0],
                                 call->size[1],   softened(inverse), (real)inverse};
    return job;
}

static void softmax_rows(void *shared, int64_t first, int64_t end)
{
    const softmax_rows_of *job = shared;
    const int64_t c = job->c;
    real *memory = too_large_for_caches(job->n * c) ? minikd_take_memory((size_t)c * sizeof(real)) : NULL;
    for (int64_t i = first; c <= NARROW && i < end; i += LANES)
        softmax_tile(job->y + i * c, job->x + i * c, c, smaller(end - i, LANES), &job->s);
    for (int64_t i = first; c > NARROW && i < end; i++)
        softmax_row(job->y + i * c, job->x + i * c, c, &job->s, memory);
    minikd_give_memory(memory);
    settled();
}

/* y = exp((x - max x)/T) / Σ exp((x - max x)/T) */
static int64_t softmax(const minikd_call *call)
{
    if (!usable_temperature(*(const double *)call->buffer[2]))
        return MINIKD_BAD_TEMPERATURE;
    softmax_rows_of job = softmax_job(call);
    minikd_parallel(softmax_rows, &job, job.n, rows_of_range(job.n, job.c, 5, 0.4));
    return MINIKD_DONE;
}

/* Σ a·b, where a term with b = 0 is 0 */
static double inner_product(const real *a, const real *b, int64_t c)
{
    real product[BLOCK];
    double total = 0;
    for (int64_t first = 0; first < c; first += BLOCK) {
        const int64_t count = block_size(c - first);
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real aj = a[first + j], bj = b[first + j];
            product[j] = bj == 0 ? 0 : aj * bj;
        }
        total += sum(product, count);
    }
    return total;
}

/* What the rows of one backward call have in common. */
typedef struct {
    real *dx;
    const real *dy, *y;
    int64_t c;
    real inverse_t;
} softmax_vjp_of;

/* Run `part` on the rows of a backward call. */
static int64_t softmax_vjp_rows(minikd_part *part, const minikd_call *call, double ns)
{
    const double temperature = *(const double *)call->buffer[4];
    const int64_t n = call->size[0], c = call->size[1];
    if (!call->buffer[0])
        return MINIKD_DONE;
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    softmax_vjp_of job = {call->buffer[0], call->buffer[1], call->buffer[2], c, (real)inverse_temperature(temperature)};
    minikd_parallel(part, &job, n, rows_of_range(n, c, 20, ns));
    return MINIKD_DONE;
}

static void softmax_vjp_part(void *shared, int64_t first, int64_t end)
{
    const softmax_vjp_of *job = shared;
    const int64_t c = job->c;
    const real inverse_t = job->inverse_t;
    for (int64_t at = first * c; at < end * c; at += c) {
        real *dx = job->dx + at;
        const real *dy = job->dy + at, *y = job->y + at;
        const real inner = (real)inner_product(dy, y, c);
        SIMD
        for (int64_t j = 0; j < c; j++) {
            const real yj = y[j], centred = dy[j] - inner;
            dx[j] = yj == 0 ? 0 : yj * centred * inverse_t;
        }
    }
}

/* dx = y·(dy - Σ dy·y) / T, and 0 where y = 0 */
static int64_t softmax_vjp(const minikd_call *call)
{
    return softmax_vjp_rows(softmax_vjp_part, call, 0.5);
}

static void log_softmax_tile(real *y, const real *x, int64_t c, int64_t count, const softening *s, real inverse_t)
{
    real tile[NARROW * LANES] ALIGNED, e[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, log_total[LANES] ALIGNED;
    double total[LANES] ALIGNED;
    load_tile(tile, x, c, count);
    maxima(top, tile, c);
    tile_weights(e, total, tile, top, c, FEW, s);
    SIMD
    for (int l = 0; l < LANES; l++)
        log_total[l] = (real)logarithm(total[l]);
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] = fused(tile[j * LANES + l] - top[l], inverse_t, -log_total[l]);
    }
    store_tile(y, tile, c, count);
}

static void log_softmax_row(real *y, const real *x, int64_t c, const softening *s, real inverse_t, int past_caches)
{
    const real top = maximum(x, c), log_total = (real)logarithm(total_weight(x, c, s, top));
    real block[BLOCK];
    for (int64_t first = 0; first < c; first += BLOCK) {
        const int64_t count = block_size(c - first);
        real *to = past_caches ? block : y + first;
        SIMD
        for (int64_t j = 0; j < count; j++)
            to[j] = fused(x[first + j] - top, inverse_t, -log_total);
        if (past_caches)
            copy_past_caches(y + first, block, count);
    }
}

static void log_softmax_rows(void *shared, int64_t first, int64_t end)
{
    const softmax_rows_of *job = shared;
    const int64_t c = job->c;
    const int past_caches = too_large_for_caches(job->n * c);
    for (int64_t i = first; c <= NARROW && i < end; i += LANES)
        log_softmax_tile(job->y + i * c, job->x + i * c, c, smaller(end - i, LANES), &job->s, job->inverse_t);
    for (int64_t i = first; c > NARROW && i < end; i++)
        log_softmax_row(job->y + i * c, job->x + i * c, c, &job->s, job->inverse_t, past_caches);
    settled();
}

/* y = (x - max x)/T - log Σ exp((x - max x)/T) */
static int64_t log_softmax(const minikd_call *call)
{
    if (!usable_temperature(*(const double *)call->buffer[2]))
        return MINIKD_BAD_TEMPERATURE;
    softmax_rows_of job = softmax_job(call);
    minikd_parallel(log_softmax_rows, &job, job.n, rows_of_range(job.n, job.c, 6, 0.45));
    return MINIKD_DONE;
}

static void log_softmax_vjp_part(void *shared, int64_t first, int64_t end)
{
    const softmax_vjp_of *job = shared;
    const int64_t c = job->c;
    const real inverse_t = job->inverse_t;
    for (int64_t at = first * c; at < end * c; at += c) {
        real *dx = job->dx + at;
        const real *dy = job->dy + at, *y = job->y + at;
        const real total = (real)sum(dy, c);
        SIMD
        for (int64_t j = 0; j < c; j++)
            dx[j] = (dy[j] - exponential(y[j]) * total) * inverse_t;
    }
}

/* dx = (dy - exp(y)·Σ dy) / T */
static int64_t log_softmax_vjp(const minikd_call *call)
{
    return softmax_vjp_rows(log_softmax_vjp_part, call, 0.6);
}
