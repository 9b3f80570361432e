/* Softmax and log-softmax over rows of class scores, with a temperature. */

#include "rows.h"

static void softmax_tile(real *y, const real *x, int64_t c, int64_t count, const softening *s)
{
    real tile[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, scale[LANES] ALIGNED;
    double total[LANES] ALIGNED;
    load_tile(tile, x, c, count);
    maxima(top, tile, c);
    tile_weights(tile, total, tile, top, c, s);
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
    const real scale = (real)(1 / weights(e, x, c, s, maximum(x, c), c));
    if (memory) {
        scale_past_caches(y, e, c, scale);
        return;
    }
    SIMD
    for (int64_t j = 0; j < c; j++)
        y[j] *= scale;
}

/* y = exp((x - max x)/T) / Σ exp((x - max x)/T) */
static int64_t softmax(const minikd_call *call)
{
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    const double temperature = *(const double *)call->buffer[2];
    const int64_t n = call->size[0], c = call->size[1];
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const softening s = softened(inverse_temperature(temperature));
    real *memory = too_large_for_caches(n * c) ? malloc((size_t)c * sizeof(real)) : NULL;

    for (int64_t i = 0; c <= NARROW && i < n; i += LANES)
        softmax_tile(y + i * c, x + i * c, c, smaller(n - i, LANES), &s);
    for (int64_t i = 0; c > NARROW && i < n; i++)
        softmax_row(y + i * c, x + i * c, c, &s, memory);
    free(memory);
    settled();
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

/* dx = y·(dy - Σ dy·y) / T, and 0 where y = 0 */
static int64_t softmax_vjp(const minikd_call *call)
{
    real *dx = call->buffer[0];
    const real *dy = call->buffer[1], *y = call->buffer[2];
    const double temperature = *(const double *)call->buffer[4];
    const int64_t n = call->size[0], c = call->size[1];
    if (!dx)
        return MINIKD_DONE;
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const real inverse_t = (real)inverse_temperature(temperature);

    for (int64_t i = 0; i < n; i++, dx += c, dy += c, y += c) {
        const real inner = (real)inner_product(dy, y, c);
        SIMD
        for (int64_t j = 0; j < c; j++) {
            const real yj = y[j], centred = dy[j] - inner;
            dx[j] = yj == 0 ? 0 : yj * centred * inverse_t;
        }
    }
    return MINIKD_DONE;
}

static void log_softmax_tile(real *y, const real *x, int64_t c, int64_t count, const softening *s, real inverse_t)
{
    real tile[NARROW * LANES] ALIGNED, e[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, log_total[LANES] ALIGNED;
    double total[LANES] ALIGNED;
    load_tile(tile, x, c, count);
    maxima(top, tile, c);
    tile_weights(e, total, tile, top, c, s);
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

/* y = (x - max x)/T - log Σ exp((x - max x)/T) */
static int64_t log_softmax(const minikd_call *call)
{
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    const double temperature = *(const double *)call->buffer[2];
    const int64_t n = call->size[0], c = call->size[1];
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const softening s = softened(inverse_temperature(temperature));
    const real inverse = (real)inverse_temperature(temperature);

    for (int64_t i = 0; c <= NARROW && i < n; i += LANES)
        log_softmax_tile(y + i * c, x + i * c, c, smaller(n - i, LANES), &s, inverse);
    for (int64_t i = 0; c > NARROW && i < n; i++)
        log_softmax_row(y + i * c, x + i * c, c, &s, inverse, too_large_for_caches(n * c));
    settled();
    return MINIKD_DONE;
}

/* dx = (dy - exp(y)·Σ dy) / T */
static int64_t log_softmax_vjp(const minikd_call *call)
{
    real *dx = call->buffer[0];
    const real *dy = call->buffer[1], *y = call->buffer[2];
    const double temperature = *(const double *)call->buffer[4];
    const int64_t n = call->size[0], c = call->size[1];
    if (!dx)
        return MINIKD_DONE;
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const real inverse_t = (real)inverse_temperature(temperature);

    for (int64_t i = 0; i < n; i++, dx += c, dy += c, y += c) {
        const real total = (real)sum(dy, c);
        SIMD
        for (int64_t j = 0; j < c; j++)
            dx[j] = (dy[j] - exponential(y[j]) * total) * inverse_t;
    }
    return MINIKD_DONE;
}
