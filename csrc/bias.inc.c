/* A bias and an activation in one traversal; backward, the bias gradient in the same pass. */

#include "elements.h"
#include "parallel.h"
#include "rows.h"

/* Nanoseconds that an element takes: measured for float with AVX-512 in the second cache; double takes twice as long. */
#define BIAS_NS (0.09 / 4 * sizeof(real))
#define TANH_NS (0.33 / 4 * sizeof(real))
#define SIGMOID_NS (0.34 / 4 * sizeof(real))
#define GELU_NS (0.54 / 4 * sizeof(real))
#define BIAS_VJP_NS (0.26 / 4 * sizeof(real))
#define GELU_VJP_NS (0.69 / 4 * sizeof(real))

/* --- the loops that they share --- */

#define FEW_COLUMNS (3 * LANES) /* up to which what is left of a row behind whole vectors costs most of the time */

/* Narrow rows are taken LANES at a time, as one row that is a whole number of vectors long. */
static int64_t rows_together(int64_t m, int64_t rows)
{
    return m <= FEW_COLUMNS && m % LANES != 0 && rows >= LANES ? LANES : 1;
}

/* b, `times` times one after the other, at `repeated`; b itself if that is once. */
static const real *repeat(real *repeated, const real *b, int64_t m, int64_t times)
{
    for (int64_t k = 0; b && times > 1 && k < times; k++)
        memcpy(repeated + k * m, b, (size_t)m * sizeof(real));
    return b && times > 1 ? repeated : b;
}

/* u = x + b;  y = f(u) for the elements first … end - 1.  y may be x. */
INLINE void forward(real (*f)(real), const minikd_call *call, int64_t first, int64_t end)
{
    real *y = call->buffer[0], repeated[FEW_COLUMNS * LANES];
    const real *x = call->buffer[1];
    const int64_t m = call->size[1], times = m ? rows_together(m, (end - first) / m) : 1, period = m * times;
    const real *b = repeat(repeated, call->buffer[2], m, times);
    for (int64_t at = first, column = first ? first % period : 0; at < end; column = 0) {
        const int64_t count = smaller(period - column, end - at);
        real *y_row = y + at;
        const real *x_row = x + at, *b_row = b + column;
        SIMD
        for (int64_t j = 0; j < count; j++)
            y_row[j] = f(x_row[j] + b_row[j]);
        at += count;
    }
}

/* `ns`: nanoseconds that an element takes. */
static int64_t run_forward(minikd_part *part, const minikd_call *call, double ns)
{
    const int64_t size = call->size[0] * call->size[1];
    minikd_parallel(part, (void *)call, size, minikd_grain(size, ns, LANES));
    return MINIKD_DONE;
}

#define COLUMNS 4096 /* of a row that are taken at a time: parts of rows, always as far apart, use the caches badly */

/* dx = dy·slope(v + b);  db = Σ_rows dx, in double.  v is y, with b = NULL, or x. dx and db may be NULL.
 *
 * The work is cut into tiles, bands of rows by blocks of columns, whose sizes depend on the shape alone. The sums of
 * each band are kept, and added up in order afterwards: so they do not depend on how many threads there are. */
typedef struct {
    const minikd_call *call;
    const real *v, *b;
    int64_t blocks, band; /* tiles in a band, rows of a band */
    double *sums;         /* (bands, m); NULL if there is one band only */
} backward_work;

/* du = dy·slope(v + b), or dy·slope(v) where b is NULL */
INLINE void backward_row(real (*slope)(real), real *du, const real *dy, const real *v, const real *b, int64_t count)
{
    if (b) {
        SIMD
        for (int64_t j = 0; j < count; j++)
            du[j] = dy[j] * slope(v[j] + b[j]);
    } else {
        SIMD
        for (int64_t j = 0; j < count; j++)
            du[j] = dy[j] * slope(v[j]);
    }
}

#define TOGETHER 4 /* rows that are added to the sums before these go back to memory */

/* total += a row, or TOGETHER of them one after the other, `row` apart */
static void add_each_column(double *total, const real *du, int64_t row, int64_t rows, int64_t count)
{
    const real *second = du + row, *third = second + row, *fourth = third + row;
    if (rows < TOGETHER) {
        SIMD
        for (int64_t j = 0; j < count; j++)
            total[j] += du[j];
        return;
    }
    SIMD
    for (int64_t j = 0; j < count; j++)
        total[j] = total[j] + du[j] + second[j] + third[j] + fourth[j];
}

INLINE void backward_tile(real (*slope)(real), const backward_work *work, int64_t tile)
{
    real *dx = work->call->buffer[0], *db = work->call->buffer[1];
    const real *dy = work->call->buffer[2], *v = work->v;
    const int64_t n = work->call->size[0], m = work->call->size[1];
    const int64_t band = tile / work->blocks, first = tile % work->blocks * COLUMNS, columns = smaller(m - first, COLUMNS);
    const int64_t top = band * work->band, bottom = smaller(top + work->band, n), times = rows_together(m, bottom - top);
    real unused[TOGETHER * COLUMNS], repeated[FEW_COLUMNS * LANES];
    double total[COLUMNS];
    const real *b = repeat(repeated, work->b ? work->b + first : NULL, m, times);
    const int64_t width = columns * times, row = m * times, end = bottom * m, du_row = dx ? row : width;
    for (int64_t j = 0; j < width; j++)
        total[j] = 0;
    for (int64_t at = top * m + first, rows; at < end; at += rows * row) {
        const int64_t count = smaller(width, end - at);
        real *du = dx ? dx + at : unused;
        rows = at + (TOGETHER - 1) * row + width <= end ? TOGETHER : 1;
        if (!b && width == row && rows > 1)
            backward_row(slope, du, dy + at, v + at, NULL, rows * row);
        else
            for (int64_t r = 0; r < rows; r++)
                backward_row(slope, du + r * du_row, dy + at + r * row, v + at + r * row, b, count);
        if (db)
            add_each_column(total, du, du_row, rows, count);
    }
    for (int64_t rest = width / 2; times > 1 && rest >= columns; rest /= 2) {
        SIMD
        for (int64_t j = 0; j < rest; j++)
            total[j] += total[rest + j];
    }
    if (work->sums)
        memcpy(work->sums + band * m + first, total, (size_t)columns * sizeof(double));
    else if (db)
        for (int64_t j = 0; j < columns; j++)
            db[first + j] = (real)total[j];
}

/* db = Σ sums, over the bands in order; the sums of the first are used up. */
static void add_bands(real *db, double *sums, int64_t bands, int64_t m)
{
    for (int64_t k = 1; k < bands; k++) {
        SIMD
        for (int64_t j = 0; j < m; j++)
            sums[j] += sums[k * m + j];
    }
    for (int64_t j = 0; j < m; j++)
        db[j] = (real)sums[j];
}

static int64_t run_backward(minikd_part *part, const minikd_call *call, double ns, const real *v, const real *b)
{
    const int64_t n = call->size[0], m = call->size[1], width = smaller(m, COLUMNS);
    backward_work work = {call, v, b, (m + COLUMNS - 1) / COLUMNS, minikd_grain(n, ns * (double)width, 1), NULL};
    const int64_t bands = n > work.band ? (n + work.band - 1) / work.band : 1, tiles = bands * work.blocks;
    if (call->buffer[1] && bands > 1) {
        work.sums = minikd_take_memory((size_t)(bands * m) * sizeof(double));
        if (!work.sums)
            return MINIKD_NO_MEMORY;
    }
    minikd_parallel(part, &work, tiles, minikd_grain(tiles, ns * (double)(smaller(work.band, n) * width), 1));
    if (work.sums)
        add_bands(call->buffer[1], work.sums, bands, m);
    minikd_give_memory(work.sums);
    return MINIKD_DONE;
}

/* --- the kernels --- */

static void bias_part(void *shared, int64_t first, int64_t end)
{
    forward(identity, shared, first, end);
}

/* u = x + b;  y = u */
static int64_t bias(const minikd_call *call)
{
    return run_forward(bias_part, call, BIAS_NS);
}

static void bias_vjp_part(void *shared, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile++)
        backward_tile(one, shared, tile);
}

/* dx = dy;  db = Σ_rows dx */
static int64_t bias_vjp(const minikd_call *call)
{
    return run_backward(bias_vjp_part, call, BIAS_VJP_NS, call->buffer[2], NULL);
}

static void bias_relu_part(void *shared, int64_t first, int64_t end)
{
    forward(relu, shared, first, end);
}

/* u = x + b;  y = max(u, 0) */
static int64_t bias_relu(const minikd_call *call)
{
    return run_forward(bias_relu_part, call, BIAS_NS);
}

static void bias_relu_vjp_part(void *shared, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile++)
        backward_tile(relu_slope, shared, tile);
}

/* dx = dy·[y > 0];  db = Σ_rows dx */
static int64_t bias_relu_vjp(const minikd_call *call)
{
    return run_backward(bias_relu_vjp_part, call, BIAS_VJP_NS, call->buffer[3], NULL);
}

static void bias_tanh_part(void *shared, int64_t first, int64_t end)
{
    forward(tanh_of, shared, first, end);
}

/* u = x + b;  y = tanh u */
static int64_t bias_tanh(const minikd_call *call)
{
    return run_forward(bias_tanh_part, call, TANH_NS);
}

static void bias_tanh_vjp_part(void *shared, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile++)
        backward_tile(tanh_slope, shared, tile);
}

/* dx = dy·(1 - y²);  db = Σ_rows dx */
static int64_t bias_tanh_vjp(const minikd_call *call)
{
    return run_backward(bias_tanh_vjp_part, call, BIAS_VJP_NS, call->buffer[3], NULL);
}

static void bias_sigmoid_part(void *shared, int64_t first, int64_t end)
{
    forward(sigmoid, shared, first, end);
}

/* u = x + b;  y = 1 / (1 + exp(-u)) */
static int64_t bias_sigmoid(const minikd_call *call)
{
    return run_forward(bias_sigmoid_part, call, SIGMOID_NS);
}

static void bias_sigmoid_vjp_part(void *shared, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile++)
        backward_tile(sigmoid_slope, shared, tile);
}

/* dx = dy·y·(1 - y);  db = Σ_rows dx */
static int64_t bias_sigmoid_vjp(const minikd_call *call)
{
    return run_backward(bias_sigmoid_vjp_part, call, BIAS_VJP_NS, call->buffer[3], NULL);
}

static void bias_gelu_part(void *shared, int64_t first, int64_t end)
{
    forward(gelu, shared, first, end);
}

/* u = x + b;  y = u·Φ(u) */
static int64_t bias_gelu(const minikd_call *call)
{
    return run_forward(bias_gelu_part, call, GELU_NS);
}

static void bias_gelu_vjp_part(void *shared, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile++)
        backward_tile(gelu_slope, shared, tile);
}

/* dx = dy·(Φ(u) + u·φ(u));  db = Σ_rows dx */
static int64_t bias_gelu_vjp(const minikd_call *call)
{
    return run_backward(bias_gelu_vjp_part, call, GELU_VJP_NS, call->buffer[4], call->buffer[5]);
}
