/* Dropout, with masks that are a function of where they stand, the same on every backend. */

#include "parallel.h"
#include "rows.h"

#define DRAWN 128 /* counters whose random words are drawn at a time */

/* Nanoseconds that an element takes: measured with AVX-512, the second for float in the second cache. */
#define DROPOUT_NS 0.55
#define DROPOUT_VJP_NS (0.13 / 4 * sizeof(real))

/* Some counters side by side, each in 64 bits: product(a, b) is the product of the low 32 bits of both. Compilers know
 * no instruction for that from C alone: with it dropout takes half the time, or less. */
#if defined(__AVX512F__)
#include <immintrin.h>
typedef uint64_t wide __attribute__((vector_size(64)));
#define product(a, b) (wide) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#elif defined(__AVX2__)
#include <immintrin.h>
typedef uint64_t wide __attribute__((vector_size(32)));
#define product(a, b) (wide) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef uint64_t wide __attribute__((vector_size(16)));
#define product(a, b) (wide) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#else
typedef uint64_t wide;
#define product(a, b) (((a) & 0xffffffffu) * (b))
#endif
/* Two words that stand side by side in memory. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define pair(a, b) (((b) & 0xffffffffu) | ((a) << 32))
#else
#define pair(a, b) (((a) & 0xffffffffu) | ((b) << 32))
#endif
#define WIDTH ((int64_t)(sizeof(wide) / sizeof(uint64_t)))

/* Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011): four random 32-bit words for each counter
 * (index mod 2³², index / 2³², step, stream), words 0 and 1 in ab, 2 and 3 in cd. On the way the high halves of a, b, c
 * and d hold anything: nothing looks at them. */
INLINE void philox(wide index, uint64_t seed, uint32_t step, uint32_t stream, wide *ab, wide *cd)
{
    const wide zero = {0}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
    wide a = index, b = index >> 32, c = zero + step, d = zero + stream;
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const wide one = product(a, m0), two = product(c, m1);
        a = (two >> 32) ^ b ^ key0;
        c = (one >> 32) ^ d ^ key1;
        b = two;
        d = one;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    *ab = pair(a, b);
    *cd = pair(c, d);
}

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
    const uint64_t threshold = (uint64_t)rint(a->p * 0x1p32);
    const real scale = threshold > UINT32_MAX ? 0 : (real)(1 / (1 - a->p)); /* 0: every element is dropped */
    const uint32_t least = (uint32_t)threshold;
    uint32_t words[4 * DRAWN];
    for (int64_t first = start; first < end; first += 4 * DRAWN) {
        const int64_t count = smaller(end - first, 4 * DRAWN);
        draw(words, (uint64_t)first / 4, (count + 3) / 4, a->seed, (uint32_t)step, (uint32_t)a->stream);
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
