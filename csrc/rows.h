/* What all kernels on rows of classes share: sums and maxima, the weights of a softmax, scratch memory. */
#ifndef MINIKD_ROWS_H
#define MINIKD_ROWS_H

#include <stdlib.h>

#include "kernels.h"
#include "real.h"

#define BLOCK 512 /* elements that are taken through all steps of a pass while they are in the nearest cache */
#define LANES 16  /* elements that are computed side by side: the width of the widest vector, in float */

/* The sum of x, in double whatever real is. */
static double sum(const real *x, int64_t count)
{
    double total = 0;
    SIMD_SUM(total)
    for (int64_t j = 0; j < count; j++)
        total += x[j];
    return total;
}

/* The same, rounded a little more and twice as fast: four at a time are added up in real, the rest in double. */
static double quick_sum(const real *x, int64_t count)
{
    const int64_t quarter = count / 4;
    const real *second = x + quarter, *third = second + quarter, *fourth = third + quarter;
    double total = 0;
    SIMD_SUM(total)
    for (int64_t j = 0; j < quarter; j++)
        total += (x[j] + second[j]) + (third[j] + fourth[j]);
    for (int64_t j = 4 * quarter; j < count; j++)
        total += x[j];
    return total;
}

static void fill(real *x, int64_t count, real value)
{
    for (int64_t j = 0; j < count; j++)
        x[j] = value;
}

/* The largest element; NaN is passed over. */
static real maximum(const real *x, int64_t count)
{
    const int64_t whole = count - count % LANES;
    real lane[LANES], top = -(real)INFINITY;
    fill(lane, LANES, top);
    for (int64_t j = 0; j < whole; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            lane[l] = x[j + l] > lane[l] ? x[j + l] : lane[l];
    }
    for (int64_t j = whole; j < count; j++)
        top = x[j] > top ? x[j] : top;
    for (int l = 0; l < LANES; l++)
        top = lane[l] > top ? lane[l] : top;
    return top;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t block_size(int64_t rest)
{
    return smaller(rest, BLOCK);
}

/* --- memory for one row --- */

#define STACK_ROW 1024 /* elements of a row that are kept on the stack */

/* `here` if a row of c fits into it, else memory of its own; NULL if there is none. */
static real *scratch(real *here, int64_t here_size, int64_t size)
{
    return size <= here_size ? here : malloc((size_t)size * sizeof(real));
}

static void release(real *memory, const real *here)
{
    if (memory != here)
        free(memory);
}

/* --- softmax(z/T) of a row: weight_j / Σ weight, weight_j = exp((z_j - max z)/T) --- */

static int usable_temperature(double t)
{
    return t > 0 && t <= DBL_MAX;
}

/* 1/T, kept inside what real can hold, so that 0·(1/T) and -inf·(1/T) are never NaN. */
static double inverse_temperature(double t)
{
    const double inverse = 1 / t, least = REAL_TINY, most = REAL_MAX / 2;
    return inverse < least ? least : inverse > most ? most : inverse;
}

/* What the weights of all rows are computed with: exp((z - top)/T) = 2^((z - top)·rate). */
typedef struct {
    real rate, rate_rest; /* log2(e)/T in two parts */
    real reach;           /* the lowest z - top whose weight is a normal number; below it the weight is 0 */
    real far_top;         /* a |top| from here on is taken off z first: z - top is exact where the weight is not 0,
                             because that is within top/2 ≤ z ≤ 2·top; any |top| where products are not exact */
} softening;

static softening softened(double inverse_t)
{
    const double rate = LOG2_E * inverse_t, reach = LOWEST_NORMAL / inverse_t;
    const double far_top = PRODUCTS_ARE_EXACT ? -2.1 * reach : 0;
    softening s;
    s.rate = (real)rate;
    s.rate_rest = (real)(rate - s.rate);
    s.reach = reach < -REAL_MAX ? -REAL_MAX : (real)reach;
    s.far_top = far_top > REAL_MAX ? REAL_MAX : (real)far_top;
    return s;
}

/* What the weights of one row are computed with. Take d = z - base, t = top - base and whole numbers k and m:
 *     (z - top)·rate = k + f,   f = (d·rate - (k + m)) - (t·rate - m),   |f| ≤ 1/2,
 * where base is 0, or a far top. Nothing of z is lost in a subtraction, and both brackets are small and rounded once;
 * so a weight has the relative error of exp alone, however far z is from the top. The top's own weight is exactly 1. */
typedef struct {
    real base, lowest;               /* and the d below which the weight is 0 */
    real shift;                      /* d·rate + shift is about k + f */
    real rounder;                    /* ROUNDER + BIAS - m */
    real remainder, remainder_rest;  /* t·rate - m in two parts */
} row_softening;

INLINE row_softening softened_row(const softening *s, real top)
{
    row_softening row;
    row.base = REAL(fabs)(top) < s->far_top ? 0 : top;
    const real t = top - row.base, lowest = t + s->reach;
    const real m = (t * s->rate + ROUNDER) - ROUNDER;
    row.lowest = lowest < -REAL_MAX ? -REAL_MAX : lowest;
    row.shift = -(t * s->rate);
    row.rounder = (ROUNDER + BIAS) - m;
    row.remainder = exact_product(t, s->rate, -m);
    row.remainder_rest = t * s->rate_rest;
    return row;
}

/* exp((z - top)/T) */
INLINE real weight(const softening *s, const row_softening *row, real z)
{
    const real from_base = z - row->base, d = from_base < row->lowest ? row->lowest : from_base;
    const real shifted = fused(d, s->rate, row->shift) + (ROUNDER + BIAS), k_and_m = shifted - row->rounder;
    const real rest = fused(d, s->rate_rest, -row->remainder_rest);
    const real f = (exact_product(d, s->rate, -k_and_m) - row->remainder) + rest;
    const real power = from_bits(to_bits(shifted) << MANTISSA);
    return from_base < row->lowest ? 0 : fused(power * f, power_tail(f), power);
}

/* e = exp((z - top)/T), at most BLOCK of a row; returns Σ e. e may be z. */
static double block_weights(real *e, const real *z, int64_t count, const softening *s, const row_softening *row)
{
    const softening fixed = *s;
    const row_softening fixed_row = *row;
    SIMD
    for (int64_t j = 0; j < count; j++)
        e[j] = weight(&fixed, &fixed_row, z[j]);
    return sum(e, count);
}

/* e = exp((z - top)/T); returns Σ e, which is NaN if the row has a NaN or no finite maximum. e may be z, or NULL. */
static double weights(real *e, const real *z, int64_t c, const softening *s, real top)
{
    const row_softening row = softened_row(s, top);
    real unused[BLOCK];
    double total = 0;
    for (int64_t j = 0; j < c; j += BLOCK)
        total += block_weights(e ? e + j : unused, z + j, block_size(c - j), s, &row);
    return total;
}

/* --- the same for narrow rows, LANES at a time: a tile holds class j of row l at j·LANES + l --- */

#define NARROW 100 /* classes up to which rows are taken in tiles */

/* Copy `count` ≤ LANES rows into a tile; lanes without a row repeat the first. */
static void load_tile(real *tile, const real *rows, int64_t c, int64_t count)
{
    real padded[NARROW * LANES];
    if (count < LANES) {
        for (int64_t l = 0; l < LANES; l++)
            memcpy(padded + l * c, rows + (l < count ? l : 0) * c, (size_t)c * sizeof(real));
        rows = padded;
    }
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int64_t l = 0; l < LANES; l++)
            tile[j * LANES + l] = rows[l * c + j];
    }
}

static void store_tile(real *rows, const real *tile, int64_t c, int64_t count)
{
    for (int64_t j = 0; j < c; j++)
        for (int64_t l = 0; l < count; l++)
            rows[l * c + j] = tile[j * LANES + l];
}

static void tile_maximum(real *top, const real *tile, int64_t c)
{
    fill(top, LANES, -(real)INFINITY);
    for (int64_t j = 0; j < c; j++) {
        const real *z = tile + j * LANES;
        SIMD
        for (int l = 0; l < LANES; l++)
            top[l] = z[l] > top[l] ? z[l] : top[l];
    }
}

/* total = Σ e of each row, in double. */
static void tile_sums(double *total, const real *e, int64_t c)
{
    double sums[LANES] = {0};
    for (int64_t j = 0; j < c * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            sums[l] += e[j + l];
    }
    memcpy(total, sums, sizeof sums);
}

/* e = exp((z - top)/T) and total = Σ e of each row. e may be z. */
static void tile_weights(real *e, double *total, real *tile, const real *top, int64_t c, const softening *s)
{
    const softening fixed = *s;
    real base[LANES], lowest[LANES], shift[LANES], rounder[LANES], remainder[LANES], remainder_rest[LANES];
    SIMD
    for (int l = 0; l < LANES; l++) {
        const row_softening row = softened_row(&fixed, top[l]);
        base[l] = row.base;
        lowest[l] = row.lowest;
        shift[l] = row.shift;
        rounder[l] = row.rounder;
        remainder[l] = row.remainder;
        remainder_rest[l] = row.remainder_rest;
    }
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const row_softening row = {base[l], lowest[l], shift[l], rounder[l], remainder[l], remainder_rest[l]};
            e[j * LANES + l] = weight(&fixed, &row, tile[j * LANES + l]);
        }
    }
    tile_sums(total, e, c);
}

#endif
