/* The mathematics of one element, and of one row once its sums are known: what C and CUDA compute alike.
 *
 * Plain C99 in terms of `real`, without memory of its own, threads or vectors (but for the random words, of which C
 * draws several at a time). C's loops call these functions for each lane, CUDA's threads for each element. */
#ifndef MINIKD_ELEMENTS_H
#define MINIKD_ELEMENTS_H

#include "real.h"

/* --- the activations f(u), and their derivatives in terms of y = f(u) or of u --- */

INLINE real identity(real u)
{
    return u;
}

INLINE real one(real y)
{
    (void)y;
    return 1;
}

/* max(u, 0) */
INLINE real relu(real u)
{
    return u <= 0 ? 0 : u;
}

/* [y > 0] */
INLINE real relu_slope(real y)
{
    return y > 0 ? 1 : 0;
}

/* e^x for x ≤ 0, with the power of two lifted so far that it is normal until the last step */
INLINE real falling_exponential(real x)
{
    const real least = x < LOWEST_EXPONENT ? LOWEST_EXPONENT : x, k = whole_ln2(least);
    return (1 + exp_minus_one_small(beside_ln2(least, k))) * power_of_two(k + 64) * (real)0x1p-64;
}

/* tanh u = (1 - e^(-2|u|)) / (1 + e^(-2|u|)) with the sign of u */
INLINE real tanh_of(real u)
{
    const real fall = exponential_minus_one(-2 * REAL(fabs)(u));
    return REAL(copysign)(fall / (2 + fall), u);
}

/* 1 - y² */
INLINE real tanh_slope(real y)
{
    return 1 - y * y;
}

/* 1 / (1 + exp(-u)) */
INLINE real sigmoid(real u)
{
    const real e = falling_exponential(-REAL(fabs)(u));
    return (u >= 0 ? 1 : e) / (1 + e);
}

/* y·(1 - y) */
INLINE real sigmoid_slope(real y)
{
    return y * (1 - y);
}

/* The normal distribution for z ≥ 0: Φ(-z) = bell(z)·tail(z) with bell(z) = exp(-z²/2). For z² is taken to twice the
 * precision of real, Φ(-z) is right to its last places however small it is. */
#ifdef MINIKD_DOUBLE
#define FARTHEST 40.0 /* from here on Φ(-z) is 0 */

INLINE real bell(real z)
{
    const real square = z * z, rest = exact_product(z, z, -square);
    return falling_exponential(-0.5 * square) * fused(-0.5, rest, 1);
}

/* The polynomial of minikd.ops.elementwise in t = (z - 5)/(z + 5), divided by z + 5 */
INLINE real tail(real z)
{
    const real t = (z - 5) / (z + 5);
    real r = -8.166192624428987e-10;
    r = fused(r, t, 5.037302126379857e-10);
    r = fused(r, t, 9.446827519677366e-09);
    r = fused(r, t, -5.015649939857857e-09);
    r = fused(r, t, -6.782555313291156e-08);
    r = fused(r, t, 3.581840051543223e-08);
    r = fused(r, t, 4.340262594829775e-07);
    r = fused(r, t, -3.310698071526862e-07);
    r = fused(r, t, -2.769337871043854e-06);
    r = fused(r, t, 3.977912640593242e-06);
    r = fused(r, t, 1.6681099115863468e-05);
    r = fused(r, t, -4.976177118979218e-05);
    r = fused(r, t, -5.9375673286488655e-05);
    r = fused(r, t, 0.00054489883090093);
    r = fused(r, t, -0.0007978694094808063);
    r = fused(r, t, -0.00299337673822322);
    r = fused(r, t, 0.020795066800941616);
    r = fused(r, t, -0.06911863870881432);
    r = fused(r, t, 0.16502036617034282);
    r = fused(r, t, -0.3135331566712138);
    r = fused(r, t, 0.4953056159699768);
    r = fused(r, t, -0.6653825028900577);
    r = fused(r, t, 0.769193049750063);
    return r / (z + 5);
}
#else
#define FARTHEST 14.6f
#define HALF_LOG2_E 0x1.715476p-1f
#define HALF_LOG2_E_REST 0x1.4ae0c0p-27f

/* 2^(-z²·HALF_LOG2_E), with the power of two lifted until the last step as above */
INLINE real bell(real z)
{
    const real square = z * z, rest = exact_product(z, z, -square);
    const real lifted = fused(square, -HALF_LOG2_E, ROUNDER + BIAS + 64), k = lifted - (ROUNDER + BIAS + 64);
    real f = exact_product(square, -HALF_LOG2_E, -k);
    f = fused(rest, -HALF_LOG2_E, fused(square, -HALF_LOG2_E_REST, f));
    return fused(f, power_tail(f), 1) * from_bits(to_bits(lifted) << MANTISSA) * 0x1p-64f;
}

/* A minimax rational function of our own, of a relative error of 6e-9 for 0 ≤ z ≤ FARTHEST */
INLINE real tail(real z)
{
    real p = 0x1.0e4298p-8f, q = 0x1.52b78cp-7f;
    p = fused(p, z, 0x1.4d4846p-5f);
    q = fused(q, z, 0x1.a1bbccp-4f);
    p = fused(p, z, 0x1.7792acp-3f);
    q = fused(q, z, 0x1.e124cap-2f);
    p = fused(p, z, 0x1.c1056ep-2f);
    q = fused(q, z, 0x1.340012p+0f);
    p = fused(p, z, 0.5f);
    q = fused(q, z, 0x1.acc4e8p+0f);
    return p / fused(q, z, 1);
}
#endif

/* |u|, held where z² is finite; NaN stays */
INLINE real held(real u)
{
    const real z = REAL(fabs)(u);
    return z > (real)FARTHEST ? (real)FARTHEST : z;
}

/* u·Φ(u) = max(u, 0) - z·Φ(-z), z = |u| */
INLINE real gelu(real u)
{
    const real z = held(u);
    return relu(u) - z * tail(z) * bell(z);
}

/* Φ(u) + u·φ(u); for u ≤ 0 it is Φ(-z) - z·φ(z), and for u > 0 it is 1 less that */
INLINE real gelu_slope(real u)
{
    const real z = held(u), slope = bell(z) * fused(z, (real)-0.3989422804014327, tail(z));
    return u > 0 ? 1 - slope : slope;
}

/* --- temperatures --- */

INLINE int usable_temperature(double t)
{
    return t > 0 && t <= DBL_MAX;
}

/* 1/T, kept inside what real can hold, so that 0·(1/T) and -inf·(1/T) are never NaN. */
INLINE double inverse_temperature(double t)
{
    const double inverse = 1 / t, least = REAL_TINY, most = REAL_MAX / 2;
    return inverse < least ? least : inverse > most ? most : inverse;
}

/* Higher temperatures are computed as this one: T²·KL and T·(p - q) have then reached their limits in double. In float
 * p - q is rounded to 2^-24 of p, so that T·(p - q) has few digits left from T = 10⁴ on, and T²·KL from 10⁶. */
#define LARGEST_TEMPERATURE 1e9

#define LOWEST_LOGARITHM (-745.13) /* of the smallest number above 0 in double */

INLINE double within_real(double x)
{
    return x > REAL_MAX ? REAL_MAX : x < -REAL_MAX ? -REAL_MAX : x;
}

/* --- losses: Σ of a row's weights e^(z - max z) is `total` --- */

/* 1/x, and 0 for 0: over no weight at all a mean is 0. */
INLINE double inverse_or_0(double x)
{
    return x != 0 ? 1 / x : 0;
}

/* -Σ w·ỹ·log softmax(z), where the label's class has `peak` more than the others, these have `base_sum` together and
 * `others` = Σ base·w·(z - max z), and the label's score is `below_top` below the largest. */
INLINE double hard_loss(double peak, double below_top, double base_sum, double others, double log_total)
{
    return peak * (log_total + below_top) + (base_sum * log_total - others);
}

/* What the weights are multiplied by in its gradient. */
INLINE real hard_factor(double peak, double base_sum, double per_total, double scale)
{
    return (real)((peak + base_sum) * scale * per_total);
}

/* From here on KL(q ‖ p) of a row is taken as a difference of sums: cancellation costs it less than a millionth. */
#define FAR_APART 0.2

/* (e^δ - 1 - δ) / δ² = 1/2 + δ/6 + δ²/24 + … for |δ| < NEAR: Chebyshev interpolations, of a relative error below 2e-7
 * in float and 4e-18 in double. */
#ifdef MINIKD_DOUBLE
#define NEAR 0.5
#else
#define NEAR 1.0f
#endif
INLINE real second_order(real delta)
{
#ifdef MINIKD_DOUBLE
    real s = 0x1.6267cf434f12cp-33;
    s = fused(s, delta, 0x1.201cd8001288bp-29);
    s = fused(s, delta, 0x1.ae63a07779c78p-26);
    s = fused(s, delta, 0x1.27e450c2e35f7p-22);
    s = fused(s, delta, 0x1.71de3a84a10c3p-19);
    s = fused(s, delta, 0x1.a01a01f8a44eap-16);
    s = fused(s, delta, 0x1.a01a01a00ef0fp-13);
    s = fused(s, delta, 0x1.6c16c16c02003p-10);
    s = fused(s, delta, 0x1.1111111111120p-7);
    s = fused(s, delta, 0x1.555555555558ep-5);
    s = fused(s, delta, 0x1.5555555555555p-3);
#else
    real s = 0x1.a845p-16f;
    s = fused(s, delta, 0x1.aa54b6p-13f);
    s = fused(s, delta, 0x1.6c066p-10f);
    s = fused(s, delta, 0x1.10fc8ap-7f);
    s = fused(s, delta, 0x1.555566p-5f);
    s = fused(s, delta, 0x1.55557ep-3f);
#endif
    return fused(s, delta, (real)0.5);
}

/* log(Σ q / Σ p) of sums that are nearly equal: 0 if they agree. */
INLINE double log_of_quotient(double p, double q, double per_p)
{
    return logarithm(fused_double(q - p, per_p, 1.0));
}

/* KL(q ‖ p) as a difference of sums, Σ q·(log q - log p) = Σ q·apart/T / Σ q - log(Σ q / Σ p). */
INLINE double kl_of_sums(double apart, double per_q, double inverse_t, double log_quotient)
{
    /* 0·∞ where the student rules a class out to which the teacher gives a probability too small for real */
    const double known = apart == apart ? apart : (double)INFINITY;
    return known * per_q * inverse_t - log_quotient;
}

/* What is added to (z_s - z_t)/T, where both have one T, or to (z_s - top_s)/T - (z_t - top_t) for log p - log q, in
 * two parts. */
INLINE void shift_of_row(double top_s, double top_t, double log_quotient, double inverse_s, int same_temperature,
                         real *shift, real *shift_rest)
{
    const double gap = same_temperature ? top_s - top_t : 0;
    const double lost = same_temperature ? (top_s - (gap - (gap - top_s))) - (top_t + (gap - top_s)) : 0;
    const double whole = log_quotient - gap * inverse_s;
    *shift = (real)whole;
    *shift_rest = (real)((whole - *shift) - lost * inverse_s);
}

/* log p - log q, which is a small difference of large numbers where the soft labels agree: so the gap between the
 * logits is taken without rounding (Knuth's two-sum), and the rest of each part is carried along. */
INLINE real log_ratio_at_one_temperature(real z_s, real z_t, real inverse, real inverse_rest, real shift,
                                         real shift_rest)
{
    const real gap = z_s - z_t, back = gap - z_s;
    const real lost = (z_s - (gap - back)) - (z_t + back);
    const real rest = fused(gap, inverse_rest, fused(lost, inverse, shift_rest));
    const real rest_or_0 = gap - gap == 0 ? rest : 0; /* an infinite gap has none */
    return exact_product(gap, inverse, shift) + rest_or_0;
}

/* q·(e^δ - 1 - δ) with δ = log p - log q, whose sum is KL(q ‖ p) because Σp = Σq: no term is negative, nothing cancels
 * when p ≈ q. Near δ = 0 it comes from the series; where q = 0 it is p. */
INLINE real near_term(real p, real q, real delta)
{
    const real small = q * (delta * delta * second_order(delta)), large = (p - q) - q * delta;
    return q == 0 ? p : REAL(fabs)(delta) < NEAR ? small : large;
}

/* Beyond this, what is left of log p - log q after the shift is no longer known to nine digits. */
#define FAR_SHIFT 1e6

/* KL(q ‖ p), given as a difference of sums and as a sum of terms that do not cancel. The sum is better where KL is
 * small, unless the logits are so large, or one side's are so far from the other's (`shift`), that log p - log q, of
 * which it is made, is lost. */
INLINE double nearer(double difference, double sum_of_terms, double shift)
{
    if (!(difference < FAR_APART))
        return difference;
    if (fabs(shift) < FAR_SHIFT && sum_of_terms < 2 * FAR_APART)
        return sum_of_terms > 0 ? sum_of_terms : 0;
    return difference > 0 ? difference : 0;
}

/* p·per_p - q·per_q, the soft loss's gradient. */
INLINE real soft_gradient(real p, real q, real per_p, real per_q)
{
    return p * per_p - q * per_q;
}

/* --- random words --- */

/* Some counters side by side, each in 64 bits: low_product(a, b) is the product of the low 32 bits of both. Compilers
 * know no instruction for that from C alone: with it dropout takes half the time, or less. */
#if defined(__CUDA_ARCH__)
typedef uint64_t wide;
#define low_product(a, b) (((a) & 0xffffffffu) * (b))
#elif defined(__AVX512F__)
#include <immintrin.h>
typedef uint64_t wide __attribute__((vector_size(64)));
#define low_product(a, b) (wide) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#elif defined(__AVX2__)
#include <immintrin.h>
typedef uint64_t wide __attribute__((vector_size(32)));
#define low_product(a, b) (wide) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef uint64_t wide __attribute__((vector_size(16)));
#define low_product(a, b) (wide) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#else
typedef uint64_t wide;
#define low_product(a, b) (((a) & 0xffffffffu) * (b))
#endif
/* Two words that stand side by side in memory. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define two_words(a, b) (((b) & 0xffffffffu) | ((a) << 32))
#else
#define two_words(a, b) (((a) & 0xffffffffu) | ((b) << 32))
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
        const wide one = low_product(a, m0), two = low_product(c, m1);
        a = (two >> 32) ^ b ^ key0;
        c = (one >> 32) ^ d ^ key1;
        b = two;
        d = one;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    *ab = two_words(a, b);
    *cd = two_words(c, d);
}

/* A random word as a whole number from -most to most, all but equally often. */
INLINE int64_t move_of(uint32_t word, int64_t most)
{
    return (int64_t)(((uint64_t)word * (uint64_t)(2 * most + 1)) >> 32) - most;
}

/* What dropout compares a random word with and multiplies an element by: [r ≥ p·2³²] / (1 - p). */
typedef struct {
    uint32_t least;
    real scale; /* 0 where every element is dropped */
} dropping;

INLINE dropping dropping_of(double p)
{
    const uint64_t threshold = (uint64_t)rint(p * 0x1p32);
    dropping d;
    d.least = (uint32_t)threshold;
    d.scale = threshold > UINT32_MAX ? 0 : (real)(1 / (1 - p));
    return d;
}

INLINE real mask_of(uint32_t word, uint32_t least, real scale)
{
    return word >= least ? scale : 0;
}

/* --- optimizer steps --- */

/* d = g + λ·w */
INLINE real decayed(real g, real w, real decay)
{
    return decay != 0 ? g + decay * w : g;
}

/* v = μ·v + d */
INLINE real velocity(real v, real d, real momentum)
{
    return momentum * v + d;
}

/* What lr is multiplied by: v, or d + μ·v with Nesterov's */
INLINE real step_of(real v, real d, real momentum, int nesterov)
{
    return nesterov ? d + momentum * v : v;
}

/* What all parameters of one step of Adam have in common. */
typedef struct {
    real keep_m, take_m, keep_v, take_v, rate, root, eps, shrink, decay;
} adam_rates;

INLINE adam_rates adam_rates_of(double lr, double t, double beta1, double beta2, double eps, double weight_decay,
                                int decoupled)
{
    adam_rates a;
    a.keep_m = (real)beta1;
    a.take_m = (real)(1 - beta1);
    a.keep_v = (real)beta2;
    a.take_v = (real)(1 - beta2);
    a.rate = (real)(lr / (1 - pow(beta1, t)));
    a.root = (real)(1 / sqrt(1 - pow(beta2, t)));
    a.eps = (real)eps;
    a.shrink = decoupled ? (real)(1 - lr * weight_decay) : 1;
    a.decay = decoupled ? 0 : (real)weight_decay;
    return a;
}

INLINE void adam_element(const adam_rates *a, real *w, real *m, real *v, real g)
{
    const real kept = *w * a->shrink, d = decayed(g, kept, a->decay);
    const real mean = a->keep_m * *m + a->take_m * d;
    const real square = a->keep_v * *v + a->take_v * d * d;
    *m = mean;
    *v = square;
    *w = kept - a->rate * mean / (REAL(sqrt)(square) * a->root + a->eps);
}

#endif
