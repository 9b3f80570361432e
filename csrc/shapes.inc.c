/* Rows gathered by number, and gradients added up. */

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
