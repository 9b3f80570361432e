/* Rows gathered by number, arrays copied and scaled, and gradients added up. */

#include "parallel.h"
#include "rows.h"

/* Nanoseconds that an element takes, measured for float in the second cache, and a row that is looked up beside them. */
#define ADD_NS (0.09 / 4 * sizeof(real))
#define COPY_NS (0.10 / 4 * sizeof(real))
#define ROW_NS 5.0

static void add_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    SIMD
    for (int64_t j = first; j < end; j++)
        y[j] += x[j];
}

/* y += x */
static int64_t add_into(const minikd_call *call)
{
    const int64_t size = call->size[0];
    minikd_parallel(add_part, (void *)call, size, minikd_grain(size, ADD_NS, LANES));
    return MINIKD_DONE;
}

/* 1 + the first place whose row number is not one of 0 … n - 1; MINIKD_DONE if there is none. */
static int64_t wrong_row(const int64_t *rows, int64_t count, int64_t n)
{
    for (int64_t k = 0; k < count; k++)
        if (rows[k] < 0 || rows[k] >= n)
            return k + 1;
    return MINIKD_DONE;
}

static void take_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    const int64_t *rows = call->buffer[2], m = call->size[1];
    for (int64_t k = first; k < end; k++)
        memcpy(y + k * m, x + rows[k] * m, (size_t)m * sizeof(real));
}

/* y[k] = x[rows[k]] */
static int64_t take(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1], count = call->size[2];
    const int64_t wrong = wrong_row(call->buffer[2], count, n);
    if (wrong)
        return wrong;
    minikd_parallel(take_part, (void *)call, count, minikd_grain(count, ROW_NS + COPY_NS * (double)m, 1));
    return MINIKD_DONE;
}

/* dx[r] = Σ_{k: rows[k] = r} dy[k] */
static int64_t take_vjp(const minikd_call *call)
{
    real *dx = call->buffer[0];
    const real *dy = call->buffer[1];
    const int64_t *rows = call->buffer[4];
    const int64_t n = call->size[0], m = call->size[1], count = call->size[2];
    if (!dx)
        return MINIKD_DONE;
    const int64_t wrong = wrong_row(rows, count, n);
    if (wrong)
        return wrong;
    fill(dx, n * m, 0);
    for (int64_t k = 0; k < count; k++, dy += m) {
        real *row = dx + rows[k] * m;
        SIMD
        for (int64_t j = 0; j < m; j++)
            row[j] += dy[j];
    }
    return MINIKD_DONE;
}

static void take_scaled_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t *rows = call->buffer[2], m = call->size[1];
    const real *scale = call->buffer[3], *shift = call->buffer[4];
    for (int64_t k = first; k < end; k++) {
        real *y = (real *)call->buffer[0] + k * m;
        const uint8_t *x = (const uint8_t *)call->buffer[1] + rows[k] * m;
        SIMD
        for (int64_t j = 0; j < m; j++)
            y[j] = x[j] * scale[j] + shift[j];
    }
}

/* y[k] = scale·x[rows[k]] + shift */
static int64_t take_scaled(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1], count = call->size[2];
    const int64_t wrong = wrong_row(call->buffer[2], count, n);
    if (wrong)
        return wrong;
    minikd_parallel(take_scaled_part, (void *)call, count, minikd_grain(count, ROW_NS + COPY_NS * (double)m, 1));
    return MINIKD_DONE;
}

/* y[k] = x[rows[k]], of whole numbers */
static int64_t take_index(const minikd_call *call)
{
    int64_t *y = call->buffer[0];
    const int64_t *x = call->buffer[1], *rows = call->buffer[2], count = call->size[1];
    const int64_t wrong = wrong_row(rows, count, call->size[0]);
    if (wrong)
        return wrong;
    for (int64_t k = 0; k < count; k++)
        y[k] = x[rows[k]];
    return MINIKD_DONE;
}

static void copy_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    memcpy((real *)call->buffer[0] + first, (const real *)call->buffer[1] + first, (size_t)(end - first) * sizeof(real));
}

/* y = x */
static int64_t copy(const minikd_call *call)
{
    const int64_t size = call->size[0];
    minikd_parallel(copy_part, (void *)call, size, minikd_grain(size, COPY_NS, LANES));
    return MINIKD_DONE;
}

/* What a factor is multiplied with, the factor, and where the product goes. */
typedef struct {
    real *y;
    const real *x;
    real factor;
} scaling;

static void scale_part(void *shared, int64_t first, int64_t end)
{
    const scaling *s = shared;
    real *y = s->y;
    const real *x = s->x, factor = s->factor;
    SIMD
    for (int64_t j = first; j < end; j++)
        y[j] = factor * x[j];
}

static int64_t scaled(real *y, const real *x, const double *factor, int64_t size)
{
    scaling s = {y, x, (real)*factor};
    if (!y)
        return MINIKD_DONE;
    minikd_parallel(scale_part, &s, size, minikd_grain(size, ADD_NS, LANES));
    return MINIKD_DONE;
}

/* y = factor·x */
static int64_t scale(const minikd_call *call)
{
    return scaled(call->buffer[0], call->buffer[1], call->buffer[2], call->size[0]);
}

/* dx = factor·dy, whose buffers are dx, dy, y, x and the factor */
static int64_t scale_vjp(const minikd_call *call)
{
    return scaled(call->buffer[0], call->buffer[1], call->buffer[4], call->size[0]);
}

static void standardise_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const real *mean = call->buffer[2], *deviation = call->buffer[3];
    const int64_t m = call->size[1];
    for (int64_t i = first; i < end; i++) {
        real *y = (real *)call->buffer[0] + i * m;
        const real *x = (const real *)call->buffer[1] + i * m;
        SIMD
        for (int64_t j = 0; j < m; j++)
            y[j] = (x[j] - mean[j]) / deviation[j];
    }
}

/* y = (x - mean) / deviation, column by column */
static int64_t standardise(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1];
    minikd_parallel(standardise_part, (void *)call, n, minikd_grain(n, 2 * ADD_NS * (double)m, 1));
    return MINIKD_DONE;
}
