/* A vector as wide as the instructions allow, for the one kernel that has to keep its sums in registers: the products.
 *
 * Everywhere else plain loops are turned into vector code by the compiler. How many numbers a vector holds (PER_VECTOR), and
 * how many sums the registers hold (ROWS × VECTORS of them), stand in this file alone; no result depends on either. */
#ifndef MINIKD_VECTORS_H
#define MINIKD_VECTORS_H

#include "real.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__GNUC__))

#include <immintrin.h>

#define PASTED(a, b, c) a##b##c
#ifdef MINIKD_DOUBLE
#define OF_REAL(name, function) PASTED(name, function, _pd)
#else
#define OF_REAL(name, function) PASTED(name, function, _ps)
#endif

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#define ROWS 8 /* 24 of 32 registers for sums */
#define VECTORS 3
#define ON_VECTORS(function) OF_REAL(_mm512_, function)
#ifdef MINIKD_DOUBLE
typedef __m512d vector;
#else
typedef __m512 vector;
#endif
#else
#define VECTOR_BYTES 32
#define ROWS 6 /* 12 of 16 */
#define VECTORS 2
#define ON_VECTORS(function) OF_REAL(_mm256_, function)
#ifdef MINIKD_DOUBLE
typedef __m256d vector;
#else
typedef __m256 vector;
#endif
#endif

INLINE vector load(const real *from)
{
    return ON_VECTORS(loadu)(from);
}

INLINE void store(real *to, vector x)
{
    ON_VECTORS(storeu)(to, x);
}

/* x in every place */
INLINE vector spread(real x)
{
    return ON_VECTORS(set1)(x);
}

INLINE vector add(vector a, vector b)
{
    return ON_VECTORS(add)(a, b);
}

/* a·b + c, rounded once where `fused` of real.h is */
INLINE vector multiply_add(vector a, vector b, vector c)
{
    return ON_VECTORS(fmadd)(a, b, c);
}

#else

#define VECTOR_BYTES 16
#ifdef __aarch64__
#define ROWS 8 /* 24 of 32 */
#define VECTORS 3
#else
#define ROWS 4 /* 8 of 16, since a product that is added takes one itself */
#define VECTORS 2
#endif

typedef struct {
    real of[VECTOR_BYTES / sizeof(real)];
} vector;

#define EACH_LANE for (int l = 0; l < (int)(VECTOR_BYTES / sizeof(real)); l++)

INLINE vector load(const real *from)
{
    vector x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(real *to, vector x)
{
    memcpy(to, &x, sizeof x);
}

INLINE vector spread(real x)
{
    vector all;
    EACH_LANE
        all.of[l] = x;
    return all;
}

INLINE vector add(vector a, vector b)
{
    EACH_LANE
        a.of[l] += b.of[l];
    return a;
}

INLINE vector multiply_add(vector a, vector b, vector c)
{
    EACH_LANE
        c.of[l] = fused(a.of[l], b.of[l], c.of[l]);
    return c;
}

#endif

#define PER_VECTOR ((int)(VECTOR_BYTES / sizeof(real)))

/* The first `count` ≤ PER_VECTOR numbers alone: behind them, 0 is read and nothing is written. */
#ifdef __AVX512F__
#ifdef MINIKD_DOUBLE
#define FIRST(count) ((__mmask8)((1u << (count)) - 1))
#else
#define FIRST(count) ((__mmask16)((1u << (count)) - 1))
#endif

INLINE vector load_first(const real *from, int64_t count)
{
    return ON_VECTORS(maskz_loadu)(FIRST(count), from);
}

INLINE void store_first(real *to, vector x, int64_t count)
{
    ON_VECTORS(mask_storeu)(to, FIRST(count), x);
}
#else
INLINE vector load_first(const real *from, int64_t count)
{
    real all[PER_VECTOR] = {0};
    for (int64_t l = 0; l < count; l++)
        all[l] = from[l];
    return load(all);
}

INLINE void store_first(real *to, vector x, int64_t count)
{
    real all[PER_VECTOR];
    store(all, x);
    for (int64_t l = 0; l < count; l++)
        to[l] = all[l];
}
#endif

/* In front of a loop over registers, which must become none, and of a function that must have all of them for itself. */
#ifdef __GNUC__
#define UNROLL _Pragma("GCC unroll 16")
#define NOINLINE __attribute__((noinline))
#else
#define UNROLL
#define NOINLINE
#endif

#endif
