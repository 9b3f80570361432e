/* Dropout, with masks that are a function of where they stand, the same on every backend. */

#include "elements.h"
#include "parallel.h"
#include "rows.h"

#define DRAWN 128 /* counters whose random words are drawn at a time */

/* Nanoseconds that an element takes: measured with AVX-512, the second for float in the second cache. */
#define DROPOUT_NS 0.55
#define DROPOUT_VJP_NS (0.13 / 4 * sizeof(real))

/* Words 0 … 3 of counter `first`, then those of the next, and so on for `count` counters. */
static void draw(uint32_t *words, uint64_t first, int64_t count, uint64_t seed, uint32_t step, uint32_t stream)
{
    uint64_t index[DRAWN], ab[DRAWN], cd[DRAWN];
    for (int64_t k = 0; k < DRAWN; k++)
        index[k] = first + (uint64_t)k;
    for (int64_t k = 0; k < count; k += WIDTH) {
        wide here, low, high;
        memcpy(&here, index + k, sizeof here);
        philox(here, seed, step, stream, &low, &high);
        memcpy(ab + k, &low, sizeof low);
        memcpy(cd + k, &high, sizeof high);
    }
    for (int64_t k = 0; k < count; k++) {
        memcpy(words + 4 * k, ab + k, sizeof ab[k]);
        memcpy(words + 4 * k + 2, cd + k, sizeof cd[k]);
    }
}

static void dropout_part(void *shared, int64_t start, int64_t end)
{
    const minikd_call *call = shared;
    real *y = call->buffer[0], *mask = call->buffer[1];
    const real *x = call->buffer[2];
    const int64_t step = *(const int64_t *)call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const dropping drop = dropping_of(a->p);
    const uint32_t least = drop.least;
    const real scale = drop.scale;
    uint32_t words[4 * DRAWN];
    for (int64_t first = start; first < end; first += 4 * DRAWN) {
        const int64_t count = smaller(end - first, 4 * DRAWN);
        draw(words, (uint64_t)first / 4, (count + 3) / 4, a->seed, (uint32_t)step, (uint32_t)a->stream);
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real m = mask_of(words[j], least, scale);
            mask[first + j] = m;
            y[first + j] = x[first + j] * m;
        }
    }
}

/* y = x·m,  m = [r ≥ p·2³²] / (1 - p),  r = philox(seed, stream, step, index).  y may be x. */
static int64_t dropout(const minikd_call *call)
{
    const int64_t size = call->size[0];
    minikd_parallel(dropout_part, (void *)call, size, minikd_grain(size, DROPOUT_NS, 4 * DRAWN));
    return MINIKD_DONE;
}

static void dropout_vjp_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    real *dx = call->buffer[0];
    const real *dy = call->buffer[1], *mask = call->buffer[3];
    SIMD
    for (int64_t j = first; j < end; j++)
        dx[j] = dy[j] * mask[j];
}

/* dx = dy·m */
static int64_t dropout_vjp(const minikd_call *call)
{
    const int64_t size = call->size[0];
    if (call->buffer[0])
        minikd_parallel(dropout_vjp_part, (void *)call, size, minikd_grain(size, DROPOUT_VJP_NS, LANES));
    return MINIKD_DONE;
}
