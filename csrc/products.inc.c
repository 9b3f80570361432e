/* Matrix products of our own: c = a·b for small and middling sizes, in which BLAS spends its time on everything else.
 *
 * A tile of c, ROWS rows by VECTORS vectors, is kept in registers while all that goes into it is added up: a step reads
 * one number of each of a's rows and one row of b's columns, 8 + 3 loads for 24 multiply-adds with AVX-512. The columns
 * of b that a tile needs, a panel, are copied into one piece of memory in the order in which they are read, where that
 * pays; a is read where it lies. The panel is on the stack, so that a product needs no memory of its own.
 *
 * Every element is the sum over p = 0, 1, … of a[i, p]·b[p, j], rounded once a step, in blocks of the depth that depend
 * on the depth alone; the blocks' sums are added in order. So no bit depends on how wide vectors are, where arrays lie,
 * how work is shared by threads, or on the other rows and columns. Only products of few rows with wᵀ take another order:
 * see `dots`. */

#include "parallel.h"
#include "rows.h"
#include "vectors.h"

/* Nanoseconds of a multiply-add at its best: 32 a cycle in float at 3.7 GHz. */
#define MULTIPLY_NS (0.017 / 4 * sizeof(real))

#define DEPTH 400 /* most steps of a block: a panel of them stays in the second cache beside the rows that meet it */
#define BAND 256  /* most rows that meet a panel before the next is made */
#define FEW_TILES 2 /* up to so many tiles of rows, copying a panel costs more than reading b where it lies */

/* A matrix as a product reads it: element (i, j) is at i·row + j·column, and one of the two is 1. */
typedef struct {
    const real *at;
    int64_t row, column;
} matrix;

/* c(rows, columns) = a(rows, depth)·b(depth, columns); rows of c are columns long. */
typedef struct {
    real *c;
    matrix a, b;
    int64_t rows, columns, depth;
    int64_t bands, panels; /* into which rows and columns are cut */
} product;

/* Where part k begins if `total` is cut into `parts` as equal as can be. */
static int64_t cut(int64_t total, int64_t parts, int64_t k)
{
    return total / parts * k + smaller(total % parts, k);
}

static int64_t parts_of(int64_t total, int64_t most)
{
    return (total + most - 1) / most;
}

/* --- a tile --- */

typedef struct {
    real *c;
    const real *a, *b;
    int64_t c_row, a_row, a_step, b_step; /* from a row to the next, and from a step to the next */
    int64_t depth;
    int64_t last;  /* columns of the last vector */
    _Bool further; /* whether c holds the sum of the blocks before */
} tile;

INLINE void compute(const tile *t, int rows, int vectors)
{
    vector sum[ROWS][VECTORS], b[VECTORS];
    const real *row[ROWS], *b_at = t->b;
    UNROLL
    for (int i = 0; i < rows; i++) {
        row[i] = t->a + i * t->a_row;
        UNROLL
        for (int v = 0; v < vectors; v++)
            sum[i][v] = spread(0);
    }
    for (int64_t p = 0, at = 0; p < t->depth; p++, at += t->a_step, b_at += t->b_step) {
        UNROLL
        for (int v = 0; v < vectors; v++)
            b[v] = load(b_at + v * PER_VECTOR);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const vector a = spread(row[i][at]);
            UNROLL
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiply_add(a, b[v], sum[i][v]);
        }
    }
    const int full = t->last == PER_VECTOR ? vectors : vectors - 1;
    UNROLL
    for (int i = 0; i < rows; i++) {
        real *c = t->c + i * t->c_row;
        UNROLL
        for (int v = 0; v < vectors; v++) {
            if (v < full)
                store(c + v * PER_VECTOR, t->further ? add(load(c + v * PER_VECTOR), sum[i][v]) : sum[i][v]);
            else
                store_first(c + v * PER_VECTOR, t->further ? add(load_first(c + v * PER_VECTOR, t->last), sum[i][v]) : sum[i][v],
                            t->last);
        }
    }
}

INLINE void compute_rows(const tile *t, int64_t rows, int vectors)
{
    switch (rows) {
#if ROWS >= 8
    case 8:
        compute(t, 8, vectors);
        break;
    case 7:
        compute(t, 7, vectors);
        break;
#endif
#if ROWS >= 6
    case 6:
        compute(t, 6, vectors);
        break;
    case 5:
        compute(t, 5, vectors);
        break;
#endif
    case 4:
        compute(t, 4, vectors);
        break;
    case 3:
        compute(t, 3, vectors);
        break;
    case 2:
        compute(t, 2, vectors);
        break;
    default:
        compute(t, 1, vectors);
    }
}

static void compute_tile(const tile *t, int64_t rows, int64_t vectors)
{
#if VECTORS >= 3
    if (vectors == 3)
        compute_rows(t, rows, 3);
    else
#endif
    if (vectors == 2)
        compute_rows(t, rows, 2);
    else
        compute_rows(t, rows, 1);
}

/* --- a panel --- */

/* `to` = the block of b that begins at `from`, each step in `vectors` whole vectors, with 0 behind the last column. */
static void copy_panel(real *to, const matrix *b, const real *from, int64_t depth, int64_t vectors, int64_t last)
{
    const int64_t step = vectors * PER_VECTOR, columns = step - PER_VECTOR + last;
    if (b->row == 1 && b->column != 1) {
        transpose(to, step, from, b->column, columns, depth);
        for (int64_t p = 0; columns < step && p < depth; p++)
            fill(to + p * step + columns, step - columns, 0);
        return;
    }
    for (int64_t p = 0; p < depth; p++, from += b->row, to += step) {
        for (int64_t v = 0; v < vectors - 1; v++)
            store(to + v * PER_VECTOR, load(from + v * PER_VECTOR));
        const int64_t v = step - PER_VECTOR;
        store(to + v, last == PER_VECTOR ? load(from + v) : load_first(from + v, last));
    }
}

/* The rows of a band in one panel's columns. */
static void compute_panel(const product *work, int64_t band, int64_t panel)
{
    real copy[DEPTH * VECTORS * PER_VECTOR] ALIGNED;
    const matrix *a = &work->a, *b = &work->b;
    const int64_t all = parts_of(work->columns, PER_VECTOR), blocks = parts_of(work->depth, DEPTH);
    const int64_t vector_first = cut(all, work->panels, panel), first = vector_first * PER_VECTOR;
    const int64_t vectors = cut(all, work->panels, panel + 1) - vector_first;
    const int64_t last = smaller(work->columns - first, vectors * PER_VECTOR) - (vectors - 1) * PER_VECTOR;
    const int64_t top = cut(work->rows, work->bands, band), bottom = cut(work->rows, work->bands, band + 1);
    const int64_t tiles = parts_of(bottom - top, ROWS);
    const int copied = b->column != 1 || last != PER_VECTOR || tiles > FEW_TILES;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t p = cut(work->depth, blocks, block), depth = cut(work->depth, blocks, block + 1) - p;
        const real *from = b->at + p * b->row + first * b->column;
        tile t = {NULL, NULL, from, work->columns, a->row, a->column, b->row, depth, last, block > 0};
        if (copied) {
            copy_panel(copy, b, from, depth, vectors, last);
            t.b = copy;
            t.b_step = vectors * PER_VECTOR;
        }
        for (int64_t k = 0; k < tiles; k++) {
            const int64_t i = top + cut(bottom - top, tiles, k), end = top + cut(bottom - top, tiles, k + 1);
            t.a = a->at + i * a->row + p * a->column;
            t.c = work->c + i * work->columns + first;
            compute_tile(&t, end - i, vectors);
        }
    }
}

static void product_part(void *shared, int64_t first, int64_t end)
{
    const product *work = shared;
    for (int64_t k = first; k < end; k++)
        compute_panel(work, k / work->panels, k % work->panels);
}

/* c = a·b */
static void multiply(real *c, matrix a, matrix b, int64_t rows, int64_t columns, int64_t depth)
{
    product work = {c, a, b, rows, columns, depth, parts_of(rows, BAND), parts_of(columns, VECTORS * PER_VECTOR)};
    if (depth == 0)
        fill(c, rows * columns, 0);
    if (rows == 0 || columns == 0 || depth == 0)
        return;
    const int64_t items = work.bands * work.panels;
    const double ns = MULTIPLY_NS * (double)depth * (double)rows * (double)columns / (double)items;
    minikd_parallel(product_part, &work, items, minikd_grain(items, ns, 1));
}

/* A matrix with rows of m, as it stands, and transposed. */
static matrix plain(const real *at, int64_t m)
{
    const matrix a = {at, m, 1};
    return a;
}

static matrix transposed(const real *at, int64_t m)
{
    const matrix a = {at, 1, m};
    return a;
}

/* --- the kernels --- */

/* y = a b */
static int64_t matmul(const minikd_call *call)
{
    const int64_t n = call->size[0], k = call->size[1], m = call->size[2];
    multiply(call->buffer[0], plain(call->buffer[1], k), plain(call->buffer[2], m), n, m, k);
    return MINIKD_DONE;
}

/* da = dy bᵀ;  db = aᵀ dy */
static int64_t matmul_vjp(const minikd_call *call)
{
    real *da = call->buffer[0], *db = call->buffer[1];
    const real *dy = call->buffer[2], *a = call->buffer[4], *b = call->buffer[5];
    const int64_t n = call->size[0], k = call->size[1], m = call->size[2];
    if (da)
        multiply(da, plain(dy, m), transposed(b, m), n, k, m);
    if (db)
        multiply(db, transposed(a, k), plain(dy, m), k, m, n);
    return MINIKD_DONE;
}

/* y = x wᵀ */
static void project(real *y, const minikd_call *call, const real *x, const real *w)
{
    const int64_t n = call->size[0], k = call->size[1], m = call->size[2];
    multiply(y, plain(x, k), transposed(w, k), n, m, k);
}

/* dx = du w;  dw = duᵀ x */
static void project_back(real *dx, real *dw, const minikd_call *call, const real *du, const real *x, const real *w)
{
    const int64_t n = call->size[0], k = call->size[1], m = call->size[2];
    if (dx)
        multiply(dx, plain(du, m), plain(w, k), n, k, m);
    if (dw)
        multiply(dw, transposed(du, m), plain(x, k), m, k, n);
}

/* y = x wᵀ + b */
static int64_t linear(const minikd_call *call)
{
    real *y = call->buffer[0];
    const minikd_call then = {bias, {y, y, call->buffer[3]}, {call->size[0], call->size[2]}, {0}};
    project(y, call, call->buffer[1], call->buffer[2]);
    return call->buffer[3] ? bias(&then) : MINIKD_DONE;
}

/* dx = dy w;  dw = dyᵀ x;  db = Σ_rows dy */
static int64_t linear_vjp(const minikd_call *call)
{
    const real *dy = call->buffer[3];
    const minikd_call sum = {bias_vjp, {NULL, call->buffer[2], (void *)dy}, {call->size[0], call->size[2]}, {0}};
    project_back(call->buffer[0], call->buffer[1], call, dy, call->buffer[5], call->buffer[6]);
    return call->buffer[2] ? bias_vjp(&sum) : MINIKD_DONE;
}

/* y = f(x wᵀ + b), where `activate` is the kernel of y = f(x + b) */
static int64_t activated(const minikd_call *call, minikd_kernel *activate)
{
    real *y = call->buffer[0];
    const minikd_call then = {activate, {y, y, call->buffer[3]}, {call->size[0], call->size[2]}, {0}};
    project(y, call, call->buffer[1], call->buffer[2]);
    return activate(&then);
}

#define SMALL_GRADIENT 4096 /* numbers of du that are kept on the stack */

/* du = dy·f';  dx = du w;  dw = duᵀ x;  db = Σ_rows du, where `back` is the kernel of du and db. Its buffers are those of
 * `call` from db on, but for x and w; `saved` is the number of values that are saved. */
static int64_t activated_vjp(const minikd_call *call, minikd_kernel *back, int64_t saved)
{
    real *dx = call->buffer[0], *dw = call->buffer[1], *db = call->buffer[2], here[SMALL_GRADIENT] ALIGNED;
    const int64_t n = call->size[0], m = call->size[2];
    void *product = saved ? call->buffer[5] : NULL, *b = call->buffer[7 + saved];
    real *du = dx || dw ? scratch(here, SMALL_GRADIENT, n * m) : NULL;
    const minikd_call first = {back, {du, db, call->buffer[3], call->buffer[4], product, b}, {n, m}, {0}};
    if ((dx || dw) && !du)
        return MINIKD_NO_MEMORY;
    const int64_t status = du || db ? back(&first) : MINIKD_DONE;
    if (status == MINIKD_DONE)
        project_back(dx, dw, call, du, call->buffer[5 + saved], call->buffer[6 + saved]);
    release(du, here);
    return status;
}

/* y = max(x wᵀ + b, 0) */
static int64_t linear_relu(const minikd_call *call)
{
    return activated(call, bias_relu);
}

static int64_t linear_relu_vjp(const minikd_call *call)
{
    return activated_vjp(call, bias_relu_vjp, 0);
}

/* y = tanh(x wᵀ + b) */
static int64_t linear_tanh(const minikd_call *call)
{
    return activated(call, bias_tanh);
}

static int64_t linear_tanh_vjp(const minikd_call *call)
{
    return activated_vjp(call, bias_tanh_vjp, 0);
}

/* u = x wᵀ + b;  y = 1 / (1 + exp(-u)) */
static int64_t linear_sigmoid(const minikd_call *call)
{
    return activated(call, bias_sigmoid);
}

static int64_t linear_sigmoid_vjp(const minikd_call *call)
{
    return activated_vjp(call, bias_sigmoid_vjp, 0);
}

/* product = x wᵀ, kept for backward;  u = product + b;  y = u·Φ(u) */
static int64_t linear_gelu(const minikd_call *call)
{
    real *y = call->buffer[0], *product = call->buffer[1] ? call->buffer[1] : y;
    const minikd_call then = {bias_gelu, {y, product, call->buffer[4]}, {call->size[0], call->size[2]}, {0}};
    project(product, call, call->buffer[2], call->buffer[3]);
    return bias_gelu(&then);
}

static int64_t linear_gelu_vjp(const minikd_call *call)
{
    return activated_vjp(call, bias_gelu_vjp, 1);
}
