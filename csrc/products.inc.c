/* Matrix products of our own, as fast as the processor multiplies and adds also where matrices are small.
 *
 * A tile of c = a·b, ROWS rows by VECTORS vectors, is kept in registers while all that goes into it is added up: a step
 * reads one number of each of a's rows and one row of b's columns, with AVX-512 8 + 3 loads for 24 multiply-adds. The
 * columns of b that a tile needs, a panel, are copied in the order in which they are read if they lie otherwise or far
 * apart; a is read where it lies. The copy is on the stack, so that a product needs no memory of its own.
 *
 * Every element is the sum over p = 0, 1, … of a[i, p]·b[p, j], rounded once a step where the processor can, in blocks of
 * the depth that depend on the depth alone; the blocks' sums are added in order. So no bit depends on how wide vectors
 * are, where arrays lie, how work is shared by threads, or on the other rows and columns. Products of few rows with wᵀ
 * alone take another order: see `add_products`. */

#include "blas.h"
#include "parallel.h"
#include "rows.h"
#include "vectors.h"

/* Nanoseconds of a multiply-add at its best: 32 a cycle in float at 3.7 GHz. */
#define MULTIPLY_NS (0.017 / 4 * sizeof(real))
#define DOT_NS (0.05 / 4 * sizeof(real)) /* the same where it waits for w out of the third cache */

#define DEPTH 400 /* most steps of a block: a panel of them stays in the second cache beside the rows that meet it */
#define BAND 256  /* most rows that meet a panel before the next is made */

/* A copy of b costs more than it saves where b is read fewer times than this, or is so small that it stays in the
 * second cache as it is. */
#define FEW_TILES 3
#define SMALL_BYTES (512 << 10)
#define NEAR_BYTES (64 << 10) /* of c, which lies in the nearest cache, or not far from it, up to this size */

/* A matrix as a product reads it: element (i, j) is at i·row + j·column, and one of the two is 1. */
typedef struct {
    const real *at;
    int64_t row, column;
} matrix;

/* A number of rows, columns or steps that is cut into `count` parts, as equal as can be: the first `longer` parts are
 * one longer than the others. */
typedef struct {
    int64_t count, length, longer;
} parts;

static parts cut(int64_t total, int64_t most)
{
    parts p = {1, total, 0};
    if (total > most) {
        p.count = (total + most - 1) / most;
        p.length = total / p.count;
        p.longer = total % p.count;
    }
    return p;
}

static int64_t length_of(parts p, int64_t k)
{
    return p.length + (k < p.longer);
}

static int64_t start_of(parts p, int64_t k)
{
    return p.length * k + smaller(p.longer, k);
}

/* c(rows, columns) = a(rows, depth)·b(depth, columns); rows of c are columns long. */
typedef struct {
    real *c;
    matrix a, b;
    int64_t rows, columns, depth;
    parts bands, panels; /* of the rows; of the columns' vectors */
} product;

/* --- a tile --- */

typedef struct {
    real *c;
    const real *a, *b;
    int64_t c_row, a_row, a_step, b_step; /* from a row to the next, and from a step to the next */
    int64_t depth;
    int64_t last;  /* columns of the last vector */
    _Bool further; /* whether c holds the sum of the blocks before */
} tile;

/* Where row i of four stands, if `three` is three times as far as from a row to the next: so that few registers hold the
 * addresses of all. */
INLINE int64_t row_of_four(int i, int64_t apart, int64_t three)
{
    return i % 4 < 3 ? i % 4 * apart : three;
}

INLINE void compute(const tile *t, int rows, int vectors)
{
    vector sum[ROWS][VECTORS], b[VECTORS];
    const int64_t apart = t->a_row, three = 3 * apart, a_step = t->a_step, b_step = t->b_step;
    const real *low = t->a, *high = rows > 4 ? low + 4 * apart : low, *b_at = t->b;
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int v = 0; v < vectors; v++)
            sum[i][v] = spread(0);
    for (int64_t p = t->depth; p > 0; p--) {
        UNROLL
        for (int v = 0; v < vectors; v++)
            b[v] = load(b_at + v * PER_VECTOR);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const vector a = spread((i < 4 ? low : high)[row_of_four(i, apart, three)]);
            UNROLL
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiply_add(a, b[v], sum[i][v]);
        }
        low += a_step, high += a_step, b_at += b_step;
    }
    const int whole = t->last == PER_VECTOR ? vectors : vectors - 1;
    UNROLL
    for (int i = 0; i < rows; i++) {
        UNROLL
        for (int v = 0; v < vectors; v++) {
            real *c = t->c + i * t->c_row + v * PER_VECTOR;
            if (v < whole)
                store(c, t->further ? add(load(c), sum[i][v]) : sum[i][v]);
            else
                store_first(c, t->further ? add(load_first(c, t->last), sum[i][v]) : sum[i][v], t->last);
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

static NOINLINE void compute_tile(const tile *t, int64_t rows, int64_t vectors)
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
        for (int64_t p = 0; columns < step && p < depth; p++)
            store(to + p * step + step - PER_VECTOR, spread(0));
        transpose(to, step, from, b->column, columns, depth);
        return;
    }
    for (int64_t p = 0; p < depth; p++, from += b->row, to += step) {
        for (int64_t v = 0; v < vectors - 1; v++)
            store(to + v * PER_VECTOR, load(from + v * PER_VECTOR));
        const int64_t v = step - PER_VECTOR;
        store(to + v, last == PER_VECTOR ? load(from + v) : load_first(from + v, last));
    }
}

/* Fetch the k-th of `shares` parts of the columns `first` … of b, so that the next panel is there when it is copied. */
static void fetch_share(const matrix *b, const real *first, int64_t depth, int64_t columns, int64_t k, int64_t shares)
{
    const int64_t rows = b->column == 1 ? depth : columns, length = b->column == 1 ? columns : depth;
    const int64_t apart = b->column == 1 ? b->row : b->column;
    for (int64_t r = rows * k / shares; r < rows * (k + 1) / shares; r++)
        for (int64_t j = 0; j < length; j += 64 / (int64_t)sizeof(real))
            FETCH(first + r * apart + j);
}

/* Fetch a tile of c, to be written to when the sums are there. */
static void fetch_tile(const real *c, int64_t c_row, int64_t rows, int64_t vectors)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < vectors; v++)
            FETCH_TO_WRITE(c + i * c_row + v * PER_VECTOR);
}

static _Bool larger_than(int64_t bytes, int64_t rows, int64_t columns)
{
    return rows * columns > bytes / (int64_t)sizeof(real);
}

/* The tiles of a panel, one below the other, of which t is the first; meanwhile the panel of b that begins at `next` is
 * fetched, unless that is NULL. */
static void compute_tiles(const product *work, tile t, parts tiles, int64_t vectors, const real *next)
{
    const _Bool far = larger_than(NEAR_BYTES, work->rows, work->columns);
    for (int64_t k = 0; k < tiles.count; k++) {
        const int64_t rows = length_of(tiles, k);
        if (far)
            fetch_tile(t.c, t.c_row, rows, vectors);
        if (next)
            fetch_share(&work->b, next, t.depth, vectors * PER_VECTOR, k, tiles.count);
        compute_tile(&t, rows, vectors);
        t.c += rows * t.c_row;
        t.a += rows * t.a_row;
    }
}

/* The rows of a band in one panel's columns. */
static void compute_panel(const product *work, int64_t band, int64_t panel)
{
    real copy[DEPTH * VECTORS * PER_VECTOR] ALIGNED;
    const matrix *a = &work->a, *b = &work->b;
    const int64_t first = start_of(work->panels, panel) * PER_VECTOR, vectors = length_of(work->panels, panel);
    const int64_t wide = vectors * PER_VECTOR, last = smaller(work->columns - first, wide) - (wide - PER_VECTOR);
    const int64_t top = start_of(work->bands, band);
    const parts tiles = cut(length_of(work->bands, band), ROWS), blocks = cut(work->depth, DEPTH);
    const _Bool pays = tiles.count >= FEW_TILES && larger_than(SMALL_BYTES, work->depth, work->columns);
    const _Bool copied = b->column != 1 || last != PER_VECTOR || pays;
    const _Bool ahead = copied && panel + 1 < work->panels.count && larger_than(NEAR_BYTES, work->depth, work->columns);
    for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t p = start_of(blocks, block), depth = length_of(blocks, block);
        const real *from = b->at + p * b->row + first * b->column;
        tile t = {work->c + top * work->columns + first, a->at + top * a->row + p * a->column, from,
                  work->columns, a->row, a->column, b->row, depth, last, block > 0};
        if (copied) {
            copy_panel(copy, b, from, depth, vectors, last);
            t.b = copy;
            t.b_step = wide;
        }
        compute_tiles(work, t, tiles, vectors, ahead ? from + wide * b->column : NULL);
    }
}

static void product_part(void *shared, int64_t first, int64_t end)
{
    const product *work = shared;
    for (int64_t k = first; k < end; k++)
        compute_panel(work, k / work->panels.count, k % work->panels.count);
}

/* --- few rows with wᵀ: inner products of rows as they lie --- */

/* Copying a panel of wᵀ costs as much as the multiplications of some rows. Up to this many, each element is instead the
 * sum over LANES partial sums, of every LANES-th product each, which are added up as a tree. */
#define FEW_ROWS 2

/* Rows of w that meet a row of x at a time: as many as the registers hold sums for, up to 4, which hide the latency. */
enum { DOTS = ROWS * VECTORS * PER_VECTOR >= 4 * LANES ? 4 : ROWS * VECTORS * PER_VECTOR >= 2 * LANES ? 2 : 1 };

/* sums[r] = the LANES partial sums of row r of w times x, for `rows` rows of `depth` numbers */
INLINE void add_products(real *sums, const real *x, const real *w, int64_t depth, int rows)
{
    enum { STEP = LANES / PER_VECTOR };
    vector sum[DOTS][STEP];
    const int64_t whole = depth - depth % LANES, rest = depth - whole;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < STEP; v++)
            sum[r][v] = spread(0);
    for (int64_t p = 0; p < whole; p += LANES)
        UNROLL
        for (int v = 0; v < STEP; v++) {
            const vector xv = load(x + p + v * PER_VECTOR);
            UNROLL
            for (int r = 0; r < rows; r++)
                sum[r][v] = multiply_add(xv, load(w + r * depth + p + v * PER_VECTOR), sum[r][v]);
        }
    for (int v = 0; v < STEP && v * PER_VECTOR < rest; v++) {
        const int64_t p = whole + v * PER_VECTOR, count = smaller(depth - p, PER_VECTOR);
        const vector xv = load_first(x + p, count);
        UNROLL
        for (int r = 0; r < rows; r++)
            sum[r][v] = multiply_add(xv, load_first(w + r * depth + p, count), sum[r][v]);
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < STEP; v++)
            store(sums + r * LANES + v * PER_VECTOR, sum[r][v]);
}

/* The sums of each row's lanes, for LANES rows */
static void across_rows(real *sums)
{
    real lane[LANES * LANES] ALIGNED;
    transpose(lane, LANES, sums, LANES, LANES, LANES);
    for (int width = LANES / 2; width > 0; width /= 2) {
        SIMD
        for (int l = 0; l < width * LANES; l++)
            lane[l] += lane[l + width * LANES];
    }
    memcpy(sums, lane, LANES * sizeof(real));
}

/* LANES columns of c at a time, by as many rows of w */
static void dots_part(void *shared, int64_t first, int64_t end)
{
    const product *work = shared;
    const int64_t depth = work->depth;
    for (int64_t j = first * LANES; j < smaller(end * LANES, work->columns); j += LANES) {
        const int64_t count = smaller(work->columns - j, LANES);
        const real *w = work->b.at + j * depth;
        for (int64_t i = 0; i < work->rows; i++) {
            const real *x = work->a.at + i * depth;
            real sums[LANES * LANES] ALIGNED;
            int64_t r = 0;
            fill(sums + count * LANES, (LANES - count) * LANES, 0);
            for (; r + DOTS <= count; r += DOTS)
                add_products(sums + r * LANES, x, w + r * depth, depth, DOTS);
            for (; r < count; r++)
                add_products(sums + r * LANES, x, w + r * depth, depth, 1);
            across_rows(sums);
            memcpy(work->c + i * work->columns + j, sums, (size_t)count * sizeof(real));
        }
    }
}

/* --- a BLAS's product --- */

/* Multiply-adds from which BLAS is faster: it has kernels for vectors that this level knows nothing of. With AVX2 and
 * AVX-512 ours are as fast or faster at every size that was measured, up to 4096 x 1200 x 1200. */
#if VECTOR_BYTES >= 32
#define WORTH_BLAS INT64_MAX
#else
#define WORTH_BLAS 16384
#endif

typedef void gemm_32(const char *, const char *, const int32_t *, const int32_t *, const int32_t *, const real *,
                     const real *, const int32_t *, const real *, const int32_t *, const real *, real *,
                     const int32_t *);
typedef void gemm_64(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const real *,
                     const real *, const int64_t *, const real *, const int64_t *, const real *, real *,
                     const int64_t *);

static minikd_gemm *gemm_in_use(void)
{
#ifdef MINIKD_DOUBLE
    return minikd_blas_in_use.dgemm;
#else
    return minikd_blas_in_use.sgemm;
#endif
}

/* How far apart a matrix's rows lie if it has `columns`, as BLAS wants to know it. */
static int64_t leading(const matrix *a, int64_t rows, int64_t columns)
{
    const int64_t stride = a->column == 1 ? a->row : a->column, least = a->column == 1 ? columns : rows;
    return stride > least ? stride : least;
}

/* BLAS counts by columns, and so takes our rows for its columns: it computes cᵀ = bᵀ·aᵀ. Whether it did: it does not
 * where its integers are too short. */
static int by_blas(const product *work)
{
    const matrix *a = &work->a, *b = &work->b;
    const char *a_as = a->column == 1 ? "N" : "T", *b_as = b->column == 1 ? "N" : "T";
    const int64_t m = work->columns, n = work->rows, k = work->depth;
    const int64_t lda = leading(a, n, k), ldb = leading(b, k, m);
    const real zero = 0, one = 1;
    if (minikd_blas_in_use.integer_bits == 64) {
        ((gemm_64 *)gemm_in_use())(b_as, a_as, &m, &n, &k, &one, b->at, &ldb, a->at, &lda, &zero, work->c, &m);
        return 1;
    }
    if (m > INT32_MAX || n > INT32_MAX || k > INT32_MAX || lda > INT32_MAX || ldb > INT32_MAX)
        return 0;
    const int32_t ms = (int32_t)m, ns = (int32_t)n, ks = (int32_t)k, as = (int32_t)lda, bs = (int32_t)ldb;
    ((gemm_32 *)gemm_in_use())(b_as, a_as, &ms, &ns, &ks, &one, b->at, &bs, a->at, &as, &zero, work->c, &ms);
    return 1;
}

/* --- c = a·b --- */

static void multiply(real *c, matrix a, matrix b, int64_t rows, int64_t columns, int64_t depth)
{
    const int64_t vectors = (columns + PER_VECTOR - 1) / PER_VECTOR;
    product work = {c, a, b, rows, columns, depth, cut(rows, BAND), cut(vectors, VECTORS)};
    if (depth == 0)
        fill(c, rows * columns, 0);
    if (rows == 0 || columns == 0 || depth == 0)
        return;
    const int blas_pays = minikd_blas_in_use.always || rows * columns * depth >= WORTH_BLAS;
    if (gemm_in_use() && blas_pays && by_blas(&work))
        return;
    if (rows <= FEW_ROWS && a.column == 1 && b.row == 1 && b.column == depth) {
        const int64_t groups = (columns + LANES - 1) / LANES;
        minikd_parallel(dots_part, &work, groups, minikd_grain(groups, DOT_NS * (double)(LANES * depth * rows), 1));
        return;
    }
    const int64_t items = work.bands.count * work.panels.count;
    const double ns = MULTIPLY_NS * (double)depth * (double)length_of(work.bands, 0) * (VECTORS * PER_VECTOR);
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
