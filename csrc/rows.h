/* What all kernels on rows of classes share.
 *
 * They compute in steps of LANES numbers side by side. In a wide row a step is LANES neighbouring classes; narrow rows
 * are taken LANES at a time, as a tile, in which a step is the scores of one class. Both lie in memory alike, so the
 * same functions serve both: what they are given of each row stands in arrays of LANES, which are all the same number
 * in a wide row. Sums are kept by lane as well, so that their order, and with it each bit of a result, does not depend
 * on how many numbers a vector of the processor holds. */
#ifndef MINIKD_ROWS_H
#define MINIKD_ROWS_H

#include "memory.h"
#ifdef __AVX__
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "elements.h"
#include "kernels.h"
#include "parallel.h"
#include "real.h"

#define LANES 16   /* the width of the widest vector, in float */
#define STEPS 32   /* steps of a wide row that are added up in real, before their sums are added up in double */
#define FEW 8      /* the same for tiles, whose rows have no 16 parts over which rounding averages out */
#define BLOCK 512  /* elements that are taken through all steps of a pass while they are in the nearest cache */
#define NARROW 100 /* classes up to which rows are taken in tiles */

/* Arrays of lanes begin where a cache line does, so that no vector of theirs lies in two. */
#ifdef __GNUC__
#define ALIGNED __attribute__((aligned(64)))
#else
#define ALIGNED
#endif

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t block_size(int64_t rest)
{
    return smaller(rest, BLOCK);
}

static void fill(real *x, int64_t count, real value)
{
    for (int64_t j = 0; j < count; j++)
        x[j] = value;
}

/* --- rows on several threads --- */

/* How many rows a range gets if a row takes ns_row + c·ns nanoseconds; whole tiles of narrow ones. */
static int64_t rows_of_range(int64_t n, int64_t c, double ns_row, double ns)
{
    return minikd_grain(n, ns_row + (double)c * ns, c <= NARROW ? LANES : 1);
}

/* The sum of what the ranges found, in their order, so that it does not depend on who came first. */
static double in_order(const double *partial, int64_t count, int64_t grain)
{
    double total = 0;
    for (int64_t k = 0; k * grain < count; k++)
        total += partial[k];
    return total;
}

/* --- labels --- */

/* 1 + the first row whose label is neither a class nor ignore_index; MINIKD_DONE if there is none. */
static int64_t wrong_label(const int64_t *target, int64_t n, int64_t c, int64_t ignore_index)
{
    int64_t wrong = 0;
    SIMD_OR(wrong)
    for (int64_t i = 0; i < n; i++)
        wrong |= (target[i] != ignore_index) & ((target[i] < 0) | (target[i] >= c));
    for (int64_t i = 0; wrong && i < n; i++)
        if (target[i] != ignore_index && (target[i] < 0 || target[i] >= c))
            return i + 1;
    return MINIKD_DONE;
}

/* --- memory for wide rows --- */

#define STACK_ROW 1024 /* elements of a row that are kept on the stack */

/* `here` if a row of c fits into it, else memory of its own; NULL if there is none. */
static real *scratch(real *here, int64_t here_size, int64_t size)
{
    return size <= here_size ? here : minikd_take_memory((size_t)size * sizeof(real));
}

static void release(real *memory, const real *here)
{
    if (memory != here)
        minikd_give_memory(memory);
}

/* --- memory and caches --- */

/* Have the cache line of an address fetched, which may lie outside of any array. */
#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch((address), 0, 2)
#define FETCH_TO_WRITE(address) __builtin_prefetch((address), 1, 3)
#else
#define FETCH(address) (void)(address)
#define FETCH_TO_WRITE(address) (void)(address)
#endif

/* Results above this size go to memory past the caches: nobody finds them there later anyway, and a line that is
 * written whole need not be read first. */
#define LARGE (24 << 20)

static int too_large_for_caches(int64_t count)
{
    return count * (int64_t)sizeof(real) > LARGE;
}

/* to = from, past the caches where the processor can do so; in sight of others after the next call of `settled`. */
static void copy_past_caches(real *to, const real *from, int64_t count)
{
#ifdef __SSE2__
    int64_t j = 0;
    for (; j < count && (uintptr_t)(to + j) % 16 != 0; j++)
        to[j] = from[j];
    for (const int64_t per_store = 16 / (int64_t)sizeof(real); j + per_store <= count; j += per_store)
        _mm_stream_si128((__m128i *)(to + j), _mm_loadu_si128((const __m128i *)(from + j)));
    for (; j < count; j++)
        to[j] = from[j];
#else
    memcpy(to, from, (size_t)count * sizeof(real));
#endif
}

static void settled(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* --- sums and maxima --- */

/* The sum of the lanes, in one order whatever the processor. */
INLINE double across(const double *lane)
{
    double half[LANES / 2] ALIGNED;
    SIMD
    for (int l = 0; l < LANES / 2; l++)
        half[l] = lane[l] + lane[l + LANES / 2];
    for (int width = LANES / 4; width > 0; width /= 2) {
        SIMD_SHORT
        for (int l = 0; l < width; l++)
            half[l] += half[l + width];
    }
    return half[0];
}

/* The sum of x, in double whatever real is. */
static double sum(const real *x, int64_t count)
{
    const int64_t whole = count - count % LANES;
    double lane[LANES] = {0}, rest = 0;
    for (int64_t j = 0; j < whole; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            lane[l] += x[j + l];
    }
    for (int64_t j = whole; j < count; j++)
        rest += x[j];
    return across(lane) + rest;
}

INLINE real larger(real a, real b)
{
    return a > b ? a : b;
}

/* The largest score of each lane; NaN is passed over. Four steps at a time, none of which waits for another. */
static void maxima(real *top, const real *z, int64_t steps)
{
    const int64_t whole = (steps - steps % 4) * LANES;
    real largest[4 * LANES] ALIGNED;
    fill(largest, 4 * LANES, -(real)INFINITY);
    for (int64_t j = 0; j < whole; j += 4 * LANES) {
        SIMD
        for (int l = 0; l < 4 * LANES; l++)
            largest[l] = larger(z[j + l], largest[l]);
    }
    for (int64_t j = whole; j < steps * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            largest[l] = larger(z[j + l], largest[l]);
    }
    SIMD
    for (int l = 0; l < LANES; l++)
        top[l] = larger(larger(largest[l], largest[l + LANES]), larger(largest[l + 2 * LANES], largest[l + 3 * LANES]));
}

/* The largest of the lanes, which are used up. */
INLINE real largest_of_lanes(real *lane)
{
    for (int width = LANES / 2; width > 0; width /= 2) {
        SIMD_SHORT
        for (int l = 0; l < width; l++)
            lane[l] = larger(lane[l + width], lane[l]);
    }
    return lane[0];
}

/* The largest element of a row; NaN is passed over. What is left behind the last whole step is looked at with the
 * elements before it once more. */
static real maximum(const real *z, int64_t c)
{
    real lane[LANES] ALIGNED;
    maxima(lane, z, c / LANES);
    for (int64_t l = 0; c < LANES && l < c; l++)
        lane[0] = larger(z[l], lane[0]);
    for (int64_t l = 0; c % LANES && c > LANES && l < LANES; l++)
        lane[l] = larger(z[c - LANES + l], lane[l]);
    return largest_of_lanes(lane);
}

/* --- softmax(z/T) of a row: weight_j / Σ weight, weight_j = exp((z_j - max z)/T) --- */

/* What weights are computed with: exp((z - top)/T) = 2^((z - top)·rate). */
typedef struct {
    real rate, rate_rest; /* log2(e)/T in two parts */
    real reach;           /* the lowest z - top whose weight is a normal number; below it the weight is 0 */
} softening;

static softening softened(double inverse_t)
{
    const double rate = LOG2_E * inverse_t, reach = LOWEST_NORMAL / inverse_t;
    softening s;
    s.rate = (real)rate;
    s.rate_rest = (real)(rate - s.rate);
    s.reach = reach < -REAL_MAX ? -REAL_MAX : (real)reach;
    return s;
}

/* e where d ≥ lowest, or where d is NaN, and else 0: without the branch that a compiler may make of ?: */
INLINE real unless_below(real d, real lowest, real e)
{
    return from_bits(to_bits(e) & ((bits)(d < lowest) - 1));
}

/* exp(d/T) for d = z - top ≤ 0, so that the top's own weight is exactly 1. What an error of d by rounding makes of a
 * weight w = e^-x is x·w·2^-24 in float: at most 0.4·2^-24 of the top's weight. */
INLINE real weight(const softening *s, real d)
{
    const real shifted = fused(d, s->rate, ROUNDER + BIAS), k = shifted - (ROUNDER + BIAS);
    const real f = fused(d, s->rate_rest, fused(d, s->rate, -k));
    const real power = from_bits(to_bits(shifted) << MANTISSA);
    return unless_below(d, s->reach, fused(power * f, power_tail(f), power));
}

/* The same with fewer multiplications, which are what limits the speed of these loops: 1/T is not carried in two parts,
 * so that x·w·2^-24 comes twice where T is no power of two, and the series is one term shorter. */
INLINE real quick_weight(const softening *s, real d)
{
    const real shifted = fused(d, s->rate, ROUNDER + BIAS), k = shifted - (ROUNDER + BIAS);
    const real f = fused(d, s->rate, -k), power = from_bits(to_bits(shifted) << MANTISSA);
    return unless_below(d, s->reach, fused(power * f, quick_power_tail(f), power));
}

/* e = exp((z - top)/T), and total += Σ e of each lane: NaN if it has a NaN or no finite maximum. e may be z.
 * `together` are added up in real. Meanwhile what stands `ahead` of z, the next row, is fetched. */
static void add_weights(double *total, real *e, const real *z, int64_t steps, int64_t together, const softening *s,
                        const real *top, int64_t ahead)
{
    const softening fixed = *s;
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t end = smaller(first + together, steps);
        real part[LANES] ALIGNED = {0};
        for (int64_t j = first * LANES; j < end * LANES; j += LANES) {
            FETCH(z + j + ahead);
            SIMD
            for (int l = 0; l < LANES; l++) {
                const real el = weight(&fixed, z[j + l] - top[l]);
                e[j + l] = el;
                part[l] += el;
            }
        }
        SIMD
        for (int l = 0; l < LANES; l++)
            total[l] += part[l];
    }
}

/* --- wide rows --- */

/* The last, unfinished step of a row, filled up with classes of probability 0. */
static void load_rest(real *step, const real *row, int64_t c)
{
    const int64_t whole = c - c % LANES;
    fill(step, LANES, -(real)INFINITY);
    memcpy(step, row + whole, (size_t)(c - whole) * sizeof(real));
}

static void store_rest(real *row, const real *step, int64_t c)
{
    const int64_t whole = c - c % LANES;
    memcpy(row + whole, step, (size_t)(c - whole) * sizeof(real));
}

/* total += Σ exp((z - top)/T) of the last, unfinished step of a row, whose weights e are. */
static void add_rest(double *total, real *e, const real *z, int64_t c, const softening *s, const real *top)
{
    real rest[LANES] ALIGNED;
    if (c % LANES == 0)
        return;
    load_rest(rest, z, c);
    add_weights(total, rest, rest, 1, STEPS, s, top, 0);
    if (e)
        store_rest(e, rest, c);
}

/* e = exp((z - top)/T) of a row; returns Σ e. e may be z. */
static double weights(real *e, const real *z, int64_t c, const softening *s, real top)
{
    real tops[LANES] ALIGNED;
    double total[LANES] ALIGNED = {0};
    fill(tops, LANES, top);
    add_weights(total, e, z, c / LANES, STEPS, s, tops, c);
    add_rest(total, e, z, c, s, tops);
    return across(total);
}

/* Σ exp((z - top)/T) of a row, the same to the last bit. */
static double total_weight(const real *z, int64_t c, const softening *s, real top)
{
    real tops[LANES] ALIGNED, unused[STEPS * LANES] ALIGNED;
    double total[LANES] ALIGNED = {0};
    fill(tops, LANES, top);
    for (int64_t j = 0; j < c / LANES; j += STEPS)
        add_weights(total, unused, z + j * LANES, smaller(c / LANES - j, STEPS), STEPS, s, tops, c);
    add_rest(total, NULL, z, c, s, tops);
    return across(total);
}

/* --- narrow rows: a tile holds class j of row l at j·LANES + l --- */

/* 4 numbers (2 of double) side by side, where the compiler has a type for them: four such are transposed at a time. */
#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SIDE (16 / (int)sizeof(real))
typedef real side_by_side __attribute__((vector_size(16)));

INLINE side_by_side load_side(const real *x)
{
    side_by_side v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store_side(real *x, side_by_side v)
{
    memcpy(x, &v, sizeof v);
}

/* to[j·to_stride + l] = from[l·from_stride + j] for SIDE rows and columns */
INLINE void transpose_block(real *to, int64_t to_stride, const real *from, int64_t from_stride)
{
#ifdef MINIKD_DOUBLE
    const side_by_side a = load_side(from), b = load_side(from + from_stride);
    store_side(to, __builtin_shufflevector(a, b, 0, 2));
    store_side(to + to_stride, __builtin_shufflevector(a, b, 1, 3));
#else
    const side_by_side a = load_side(from), b = load_side(from + from_stride);
    const side_by_side c = load_side(from + 2 * from_stride), d = load_side(from + 3 * from_stride);
    const side_by_side ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const side_by_side ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const side_by_side cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const side_by_side cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store_side(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    store_side(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    store_side(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    store_side(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
#endif
}

#ifdef __AVX__
#define TWO_BLOCKS

typedef real two_sides __attribute__((vector_size(32)));

INLINE two_sides load_two_sides(const real *x, int64_t apart)
{
#ifdef MINIKD_DOUBLE
    return (two_sides)_mm256_loadu2_m128d(x + apart, x);
#else
    return (two_sides)_mm256_loadu2_m128(x + apart, x);
#endif
}

INLINE void store_two_sides(real *x, two_sides v)
{
    memcpy(x, &v, sizeof v);
}

/* The same for 2·SIDE rows: two blocks, one below the other, in the two halves of longer vectors */
INLINE void transpose_two_blocks(real *to, int64_t to_stride, const real *from, int64_t from_stride)
{
    const int64_t apart = SIDE * from_stride;
#ifdef MINIKD_DOUBLE
    const two_sides a = load_two_sides(from, apart), b = load_two_sides(from + from_stride, apart);
    store_two_sides(to, __builtin_shufflevector(a, b, 0, 4, 2, 6));
    store_two_sides(to + to_stride, __builtin_shufflevector(a, b, 1, 5, 3, 7));
#else
    const two_sides a = load_two_sides(from, apart), b = load_two_sides(from + from_stride, apart);
    const two_sides c = load_two_sides(from + 2 * from_stride, apart), d = load_two_sides(from + 3 * from_stride, apart);
    const two_sides ab_low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    const two_sides ab_high = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const two_sides cd_low = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13);
    const two_sides cd_high = __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    store_two_sides(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 8, 9, 4, 5, 12, 13));
    store_two_sides(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 10, 11, 6, 7, 14, 15));
    store_two_sides(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 8, 9, 4, 5, 12, 13));
    store_two_sides(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 10, 11, 6, 7, 14, 15));
#endif
}
#endif
#endif
#endif
#ifndef SIDE
#define SIDE 1
INLINE void transpose_block(real *to, int64_t to_stride, const real *from, int64_t from_stride)
{
    (void)to_stride, (void)from_stride;
    *to = *from;
}
#endif

/* to[j·to_stride + l] = from[l·from_stride + j] for `rows` l and `columns` j. The last block lies over the one before
 * it, so that nothing is left for a slower loop. */
static void transpose(real *to, int64_t to_stride, const real *from, int64_t from_stride, int64_t rows, int64_t columns)
{
    if (rows < SIDE || columns < SIDE) {
        for (int64_t l = 0; l < rows; l++)
            for (int64_t j = 0; j < columns; j++)
                to[j * to_stride + l] = from[l * from_stride + j];
        return;
    }
    int64_t l = 0;
#ifdef TWO_BLOCKS
    for (; l + 2 * SIDE <= rows; l += 2 * SIDE) {
        const real *row = from + l * from_stride;
        real *column = to + l;
        for (int64_t j = 0; j + SIDE <= columns; j += SIDE, column += SIDE * to_stride)
            transpose_two_blocks(column, to_stride, row + j, from_stride);
        const int64_t last = columns - SIDE;
        if (columns % SIDE)
            transpose_two_blocks(to + last * to_stride + l, to_stride, row + last, from_stride);
    }
#endif
    for (; l < rows; l += SIDE) {
        const int64_t row = smaller(l, rows - SIDE);
        for (int64_t j = 0; j < columns; j += SIDE) {
            const int64_t column = smaller(j, columns - SIDE);
            transpose_block(to + column * to_stride + row, to_stride, from + row * from_stride + column, from_stride);
        }
    }
}

/* Copy `count` ≤ LANES rows into a tile; lanes without a row repeat the first. */
static void load_tile(real *tile, const real *rows, int64_t c, int64_t count)
{
    transpose(tile, LANES, rows, c, count, c);
    for (int64_t j = 0; count < LANES && j < c; j++)
        fill(tile + j * LANES + count, LANES - count, tile[j * LANES]);
}

static void store_tile(real *rows, const real *tile, int64_t c, int64_t count)
{
    transpose(rows, c, tile, LANES, c, count);
}

/* e = exp((z - top)/T) of a tile and total = Σ e of each row, of which `together` are added up in real. e may be z. */
static void tile_weights(real *e, double *total, const real *tile, const real *top, int64_t c, int64_t together,
                         const softening *s)
{
    for (int l = 0; l < LANES; l++)
        total[l] = 0;
    add_weights(total, e, tile, c, together, s, top, 0);
}

#endif
