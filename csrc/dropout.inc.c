/* Dropout, with masks that are a function of where they stand, the same on every backend. */

#include "parallel.h"
#include "rows.h"

#define DRAWN 128 /* counters whose random words are drawn at a time */

#define DROPOUT_NS 0.5 /* of an element */
#define DROPOUT_VJP_NS (0.04 * sizeof(real))

/* Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011): four random 32-bit words for each of `count` counters
 * (index mod 2³², index / 2³², step, stream) from index `first` on. */
static void philox(uint32_t *words, uint64_t first, int64_t count, uint64_t seed, uint32_t step, uint32_t stream)
{
    SIMD
    for (int64_t k = 0; k < count; k++) {
        const uint64_t index = first + (uint64_t)k;
        uint32_t a = (uint32_t)index, b = (uint32_t)(index >> 32), c = step, d = stream;
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t one = (uint64_t)a * 0xD2511F53u, two = (uint64_t)c * 0xCD9E8D57u;
            a = (uint32_t)(two >> 32) ^ b ^ key0;
            c = (uint32_t)(one >> 32) ^ d ^ key1;
            b = (uint32_t)two;
            d = (uint32_t)one;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words[4 * k] = a;
        words[4 * k + 1] = b;
        words[4 * k + 2] = c;
        words[4 * k + 3] = d;
    }
}

static void dropout_part(void *shared, int64_t start, int64_t end)
{
    const minikd_call *call = shared;
    real *y = call->buffer[0], *mask = call->buffer[1];
    const real *x = call->buffer[2];
    const int64_t step = *(const int64_t *)call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const uint64_t threshold = (uint64_t)rint(a->p * 0x1p32);
    const real scale = threshold > UINT32_MAX ? 0 : (real)(1 / (1 - a->p)); /* 0: every element is dropped */
    const uint32_t least = (uint32_t)threshold;
    uint32_t words[4 * DRAWN];
    for (int64_t first = start; first < end; first += 4 * DRAWN) {
        const int64_t count = smaller(end - first, 4 * DRAWN);
        philox(words, (uint64_t)first / 4, (count + 3) / 4, a->seed, (uint32_t)step, (uint32_t)a->stream);
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real m = words[j] >= least ? scale : 0;
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
