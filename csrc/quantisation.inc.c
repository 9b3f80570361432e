/* Numbers rounded to the steps that integers can take, and the gradient that takes the rounding for nothing. */

#include "parallel.h"
#include "rows.h"

/* Nanoseconds that an element takes: measured for float with AVX-512 in the second cache. */
#define QUANTISE_NS (0.15 / 4 * sizeof(real))

/* Added to a number of less than a quarter of it and taken off again, it leaves the nearest whole number, halves to
 * even, since the last place of their sum is 1. */
#ifdef MINIKD_DOUBLE
#define ROUNDER 0x1.8p52
#else
#define ROUNDER 0x1.8p23f
#endif

/* Which steps there are. */
typedef struct {
    real scale, divisor, low, high;
} steps;

static steps steps_of(real scale, const double *low, const double *high)
{
    const steps s = {scale, scale > 0 ? scale : 1, (real)*low, (real)*high};
    return s;
}

/* u within low and high; NaN stays */
INLINE real within(real u, real low, real high)
{
    const real least = u < low ? low : u;
    return least > high ? high : least;
}

INLINE real rounded(real u)
{
    return (u + ROUNDER) - ROUNDER;
}

/* y = scale·clamp(round(x/scale), low, high): the ends are whole, so it may be clamped first. */
static void quantise_some(real *y, const real *x, int64_t count, steps s)
{
    SIMD
    for (int64_t j = 0; j < count; j++)
        y[j] = s.scale * rounded(within(x[j] / s.divisor, s.low, s.high));
}

/* dx = dy·[low ≤ round(x/scale) ≤ high] */
static void keep_some(real *dx, const real *dy, const real *x, int64_t count, steps s)
{
    SIMD
    for (int64_t j = 0; j < count; j++) {
        const real step = rounded(within(x[j] / s.divisor, s.low - 1, s.high + 1));
        const real kept = step >= s.low ? dy[j] : 0;
        dx[j] = step <= s.high ? kept : 0;
    }
}

static void quantise_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const steps s = steps_of((real)*(const double *)call->buffer[2], call->buffer[3], call->buffer[4]);
    quantise_some((real *)call->buffer[0] + first, (const real *)call->buffer[1] + first, end - first, s);
}

static int64_t fake_quantise(const minikd_call *call)
{
    const int64_t size = call->size[0];
    minikd_parallel(quantise_part, (void *)call, size, minikd_grain(size, QUANTISE_NS, LANES));
    return MINIKD_DONE;
}

static void keep_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const steps s = steps_of((real)*(const double *)call->buffer[4], call->buffer[5], call->buffer[6]);
    keep_some((real *)call->buffer[0] + first, (const real *)call->buffer[1] + first,
              (const real *)call->buffer[3] + first, end - first, s);
}

static int64_t fake_quantise_vjp(const minikd_call *call)
{
    const int64_t size = call->size[0];
    if (!call->buffer[0])
        return MINIKD_DONE;
    minikd_parallel(keep_part, (void *)call, size, minikd_grain(size, QUANTISE_NS, LANES));
    return MINIKD_DONE;
}

static void quantise_rows_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t m = call->size[1];
    const real *scale = call->buffer[2];
    for (int64_t k = first; k < end; k++)
        quantise_some((real *)call->buffer[0] + k * m, (const real *)call->buffer[1] + k * m, m,
                      steps_of(scale[k], call->buffer[3], call->buffer[4]));
}

/* the same with a scale for each row */
static int64_t fake_quantise_rows(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1];
    minikd_parallel(quantise_rows_part, (void *)call, n, minikd_grain(n, QUANTISE_NS * (double)m, 1));
    return MINIKD_DONE;
}

static void keep_rows_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t m = call->size[1];
    const real *scale = call->buffer[4];
    for (int64_t k = first; k < end; k++)
        keep_some((real *)call->buffer[0] + k * m, (const real *)call->buffer[1] + k * m,
                  (const real *)call->buffer[3] + k * m, m, steps_of(scale[k], call->buffer[5], call->buffer[6]));
}

static int64_t fake_quantise_rows_vjp(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1];
    if (!call->buffer[0])
        return MINIKD_DONE;
    minikd_parallel(keep_rows_part, (void *)call, n, minikd_grain(n, QUANTISE_NS * (double)m, 1));
    return MINIKD_DONE;
}
