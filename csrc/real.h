/* The number type that the kernels are compiled for, and exp and log in a form that compilers turn into vector code.
 *
 * Every kernel is written once in terms of `real`. There are no branches, tables or library calls in the loops, so
 * each is vectorised as it stands; where the compiler does not know the SIMD pragma, the same code is plain C99. It is
 * CUDA too, where a function is one for the device.
 */
#ifndef MINIKD_REAL_H
#define MINIKD_REAL_H

#ifdef __CUDACC_RTC__ /* which has no headers, but knows the functions */
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define UINT32_MAX 0xffffffffu
#define FLT_MIN 0x1p-126f
#define FLT_MAX 0x1.fffffep127f
#define DBL_MIN 0x1p-1022
#define DBL_MAX 0x1.fffffffffffffp1023
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

/* In front of a loop whose rounds do not depend on each other; the arrays may be the same, but not shifted. SIMD_SHORT
 * is for loops that may be shorter than the widest vector. A test asks the compiler whether it has vectorised each. */
#ifdef MINIKD_SIMD
#define SIMD _Pragma("omp simd")
#define SIMD_OR(...) SIMD_PRAGMA(omp simd reduction(| : __VA_ARGS__))
#define SIMD_PRAGMA(...) _Pragma(#__VA_ARGS__)
#else
#define SIMD
#define SIMD_OR(...)
#endif
#define SIMD_SHORT SIMD

/* For functions that take another function and must become one with it. */
#ifdef __CUDA_ARCH__
#define INLINE __device__ __forceinline__
#elif defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* ln 2 = LN2_HIGH + LN2_LOW, where k·LN2_HIGH is exact for every k that occurs (Cody and Waite 1980).
 * x + ROUNDER - ROUNDER is x rounded to a whole number, and the low bits of x + ROUNDER are that number. */
#ifdef MINIKD_DOUBLE
typedef double real;
typedef uint64_t bits;
#define REAL(function) function
#define REAL_TINY DBL_MIN
#define REAL_MAX DBL_MAX
#define MANTISSA 52
#define ROUNDER 0x1.8p52
#define BIAS 1023
#define LN2_HIGH 0x1.62e42feep-1
#define LN2_LOW 0x1.a39ef35793c76p-33
#define LOWEST_EXPONENT (-746.0) /* e^x is 0 from here on down, */
#define HIGHEST_EXPONENT 711.0   /* infinity from here on up, */
#define LOWEST_NORMAL (-708.3)   /* and no longer a normal number below this */
#else
typedef float real;
typedef uint32_t bits;
#define REAL(function) function##f
#define REAL_TINY FLT_MIN
#define REAL_MAX FLT_MAX
#define MANTISSA 23
#define ROUNDER 0x1.8p23f
#define BIAS 127
#define LN2_HIGH 0x1.62e4p-1f
#define LN2_LOW 0x1.7f7d1cp-20f
#define LOWEST_EXPONENT (-104.5f)
#define HIGHEST_EXPONENT 89.5f
#define LOWEST_NORMAL (-87.3f)
#endif
#define LOG2_E 0x1.71547652b82fep0

/* a·b + c, rounded once where the processor can do so at full speed. The compiler is told not to do this by itself,
 * so that what is computed does not depend on it. exact_product is the same where rounding a·b would be the larger
 * part of the error: there a float product is taken in double; of double none is exact without the processor. */
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__ARM_FEATURE_FMA)                                           \
    || (defined(FP_FAST_FMA) && defined(FP_FAST_FMAF))
#define fused(a, b, c) REAL(fma)(a, b, c)
#define fused_double(a, b, c) fma(a, b, c)
#define exact_product(a, b, c) fused(a, b, c)
#else
#define fused(a, b, c) ((a) * (b) + (c))
#define fused_double(a, b, c) ((a) * (b) + (c))
#define exact_product(a, b, c) ((real)((double)(a) * (double)(b) + (double)(c)))
#endif

INLINE bits to_bits(real x)
{
    bits b;
    memcpy(&b, &x, sizeof b);
    return b;
}

INLINE real from_bits(bits b)
{
    real x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* 2^k for a whole number k with 2^k normal. */
INLINE real power_of_two(real k)
{
    return from_bits(to_bits(k + (ROUNDER + BIAS)) << MANTISSA);
}

/* (e^r - 1 - r) / r² for |r| ≤ ln 2 / 2: minimax in float, a Chebyshev interpolation in double. */
INLINE real exp_tail(real r)
{
#ifdef MINIKD_DOUBLE
    real q = 0x1.af390ba7e6f47p-26;
    q = fused(q, r, 0x1.2891d4ffbb0f9p-22);
    q = fused(q, r, 0x1.71de0d85293b8p-19);
    q = fused(q, r, 0x1.a019b8ca26fcfp-16);
    q = fused(q, r, 0x1.a01a01a7cebcdp-13);
    q = fused(q, r, 0x1.6c16c1789d1d7p-10);
    q = fused(q, r, 0x1.11111111109a6p-7);
    q = fused(q, r, 0x1.5555555553d37p-5);
    q = fused(q, r, 0x1.5555555555556p-3);
    return fused(q, r, 0x1.0000000000001p-1);
#else
    real q = 0x1.6a2416p-10f;
    q = fused(q, r, 0x1.1239f2p-7f);
    q = fused(q, r, 0x1.5558f2p-5f);
    q = fused(q, r, 0x1.555492p-3f);
    return fused(q, r, 0x1.fffffcp-2f);
#endif
}

/* e^r - 1 for |r| ≤ ln 2 / 2. */
INLINE real exp_minus_one_small(real r)
{
    return fused(r * r, exp_tail(r), r);
}

/* (2^f - 1) / f for |f| ≤ 1/2: Chebyshev interpolations, of a relative error below 1e-8 in float, 2e-17 in double. */
INLINE real power_tail(real f)
{
#ifdef MINIKD_DOUBLE
    real q = 0x1.e9d4349aefc56p-32;
    q = fused(q, f, 0x1.e6067f35e52a1p-28);
    q = fused(q, f, 0x1.b524facaf40b5p-24);
    q = fused(q, f, 0x1.62bfd4578e35ap-20);
    q = fused(q, f, 0x1.ffcbfc6716bb0p-17);
    q = fused(q, f, 0x1.430913097a521p-13);
    q = fused(q, f, 0x1.5d87fe78a5265p-10);
    q = fused(q, f, 0x1.3b2ab6fba1db2p-7);
    q = fused(q, f, 0x1.c6b08d704a0c2p-5);
    q = fused(q, f, 0x1.ebfbdff82c598p-3);
    return fused(q, f, 0x1.62e42fefa39efp-1);
#else
    real q = 0x1.4413c0p-13f;
    q = fused(q, f, 0x1.5f08e0p-10f);
    q = fused(q, f, 0x1.3b2a52p-7f);
    q = fused(q, f, 0x1.c6af6cp-5f);
    q = fused(q, f, 0x1.ebfbe0p-3f);
    return fused(q, f, 0x1.62e430p-1f);
#endif
}

/* The same to a relative error of 2^f below 1e-7 in float: a step less. */
INLINE real quick_power_tail(real f)
{
#ifdef MINIKD_DOUBLE
    return power_tail(f);
#else
    real q = 0x1.5bba14p-10f;
    q = fused(q, f, 0x1.3cea88p-7f);
    q = fused(q, f, 0x1.c6b752p-5f);
    q = fused(q, f, 0x1.ebf9bcp-3f);
    return fused(q, f, 0x1.62e42ap-1f);
#endif
}

/* x = k·ln 2 + r with k whole: the nearest k, and the remainder r. */
INLINE real whole_ln2(real x)
{
    return (fused(x, (real)LOG2_E, ROUNDER)) - ROUNDER;
}

INLINE real beside_ln2(real x, real k)
{
    return fused(-k, LN2_LOW, fused(-k, LN2_HIGH, x));
}

/* e^x = 2^k·e^r; right in all of its range, denormal results and infinity included. The power of two is taken in two
 * steps, because 2^k alone may be neither normal nor finite. */
INLINE real exponential(real x)
{
    x = x < LOWEST_EXPONENT ? LOWEST_EXPONENT : x;
    x = x > HIGHEST_EXPONENT ? HIGHEST_EXPONENT : x;
    const real k = whole_ln2(x);
    const real half = (k * (real)0.5 + ROUNDER) - ROUNDER;
    const real e = 1 + exp_minus_one_small(beside_ln2(x, k));
    return e * power_of_two(half) * power_of_two(k - half);
}

/* e^x - 1 = (2^k - 1) + 2^k·(e^r - 1) for x ≤ 0, without cancellation near 0. */
INLINE real exponential_minus_one(real x)
{
    x = x < LOWEST_NORMAL ? LOWEST_NORMAL : x;
    const real k = whole_ln2(x), power = power_of_two(k);
    return fused(power, exp_minus_one_small(beside_ln2(x, k)), power - 1);
}

/* 1/x for x from 1 on, in double: of a float kernel's sums to 47 bits, at a quarter of the price of a division. */
INLINE double reciprocal(double x)
{
#ifdef MINIKD_DOUBLE
    return 1 / x;
#else
    const double r = 1 / (float)x;
    return r * fused_double(-x, r, 2.0);
#endif
}

/* log x, in double whatever real is, to its last digits or, for the sums of a float kernel, to ten. With x = 2^k·m, √½ ≤ m < √2:
 * log x = k·ln 2 + 2·artanh s, s = (m - 1)/(m + 1), artanh s = s + s³/3 + s⁵/5 + … */
INLINE double logarithm(double x)
{
    const double normal = x < DBL_MIN ? x * 0x1p54 : x; /* a denormal number is made normal first */
    const double one = 1, root_half = 0.70710678118654752, rounder = 0x1.8p52;
    uint64_t b, bits_of_one, bits_of_root, k_bits;
    memcpy(&b, &normal, sizeof b);
    memcpy(&bits_of_one, &one, sizeof bits_of_one);
    memcpy(&bits_of_root, &root_half, sizeof bits_of_root);
    memcpy(&k_bits, &rounder, sizeof k_bits);
    const uint64_t exponent = (b + (bits_of_one - bits_of_root)) >> 52; /* k + 1023 */
    b = b - (exponent << 52) + bits_of_one;
    k_bits |= exponent;
    double m, k;
    memcpy(&m, &b, sizeof m);
    memcpy(&k, &k_bits, sizeof k);
    k -= rounder + (x < DBL_MIN ? 1023 + 54 : 1023);
    const double s = (m - 1) * reciprocal(m + 1), s2 = s * s;
#ifdef MINIKD_DOUBLE
    double q = 1.0 / 21;
    q = fused_double(q, s2, 1.0 / 19);
    q = fused_double(q, s2, 1.0 / 17);
    q = fused_double(q, s2, 1.0 / 15);
    q = fused_double(q, s2, 1.0 / 13);
    q = fused_double(q, s2, 1.0 / 11);
    q = fused_double(q, s2, 1.0 / 9);
#else
    double q = 1.0 / 9;
#endif
    q = fused_double(q, s2, 1.0 / 7);
    q = fused_double(q, s2, 1.0 / 5);
    q = fused_double(q, s2, 1.0 / 3);
    const double log_m = 2 * fused_double(s * s2, q, s);
    const double log_x = k * 0x1.62e42feep-1 + fused_double(k, 0x1.a39ef35793c76p-33, log_m);
    /* log 0 = -inf, log inf = inf, and of anything else it is NaN */
    const double special = x == 0 ? -(double)INFINITY : x > 0 ? x : (double)NAN;
    return x > 0 && x <= DBL_MAX ? log_x : special;
}

/* log x - y for x ≥ 0. In float the large parts k·ln 2 and y are taken from one another before log m, in which nothing
 * is lost where they are nearly equal; of x = 0 and of infinity it is a finite number, and NaN only of x < 0. */
INLINE real log_minus(real x, real y)
{
#ifdef MINIKD_DOUBLE
    return logarithm(x) - y;
#else
    const real normal = x < FLT_MIN ? x * 0x1p23f : x, root_half = 0.70710678f;
    const bits exponent = (to_bits(normal) + (to_bits(1.0f) - to_bits(root_half))) >> MANTISSA; /* k + 127 */
    const real m = from_bits(to_bits(normal) - (exponent << MANTISSA) + to_bits(1.0f));
    const real k = (from_bits(to_bits(ROUNDER) | exponent) - ROUNDER) - (x < FLT_MIN ? BIAS + MANTISSA : BIAS);
    const real s = (m - 1) / (m + 1), s2 = s * s;
    real q = 2 / 9.0f;
    q = fused(q, s2, 2 / 7.0f);
    q = fused(q, s2, 2 / 5.0f);
    q = fused(q, s2, 2 / 3.0f);
    const real log_m = fused(s * s2, q, 2 * s), apart = fused(k, LN2_HIGH, -y);
    return x < 0 ? (real)NAN : apart + fused(k, LN2_LOW, log_m);
#endif
}

#endif
