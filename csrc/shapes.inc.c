/* Rows gathered by number, and gradients added up. */

#include "rows.h"

/* y += x */
static int64_t add_into(const minikd_call *call)
{
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    const int64_t size = call->size[0];
    SIMD
    for (int64_t j = 0; j < size; j++)
        y[j] += x[j];
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

/* y[k] = x[rows[k]] */
static int64_t take(const minikd_call *call)
{
    real *y = call->buffer[0];
    const real *x = call->buffer[1];
    const int64_t *rows = call->buffer[2];
    const int64_t n = call->size[0], m = call->size[1], count = call->size[2];
    const int64_t wrong = wrong_row(rows, count, n);
    if (wrong)
        return wrong;
    for (int64_t k = 0; k < count; k++)
        memcpy(y + k * m, x + rows[k] * m, (size_t)m * sizeof(real));
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

/* y[k] = scale·x[rows[k]] + shift */
static int64_t take_scaled(const minikd_call *call)
{
    real *y = call->buffer[0];
    const uint8_t *x = call->buffer[1];
    const int64_t *rows = call->buffer[2];
    const real *scale = call->buffer[3], *shift = call->buffer[4];
    const int64_t n = call->size[0], m = call->size[1], count = call->size[2];
    const int64_t wrong = wrong_row(rows, count, n);
    if (wrong)
        return wrong;
    for (int64_t k = 0; k < count; k++, y += m) {
        const uint8_t *row = x + rows[k] * m;
        SIMD
        for (int64_t j = 0; j < m; j++)
            y[j] = row[j] * scale[j] + shift[j];
    }
    return MINIKD_DONE;
}
