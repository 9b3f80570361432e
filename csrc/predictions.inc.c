/* What a classifier's scores decide: the class of each row, and how many of them are right. */

#include "rows.h"

/* An integer as wide as real, so that a comparison of one chooses between the other. */
#ifdef MINIKD_DOUBLE
typedef int64_t place;
#else
typedef int32_t place;
#endif

static int has_nan(const real *z, int64_t c)
{
    place found = 0;
    SIMD_OR(found)
    for (int64_t j = 0; j < c; j++)
        found |= z[j] != z[j];
    return found != 0;
}

#define LOOKED_AT 128 /* elements that are looked through at a time */

/* The first element that is x, which there is; blocks that do not hold it are passed over as a whole. */
static int64_t first_equal(const real *z, int64_t c, real x)
{
    int64_t j = 0;
    for (place found = 0; !found; j += LOOKED_AT) {
        const int64_t end = smaller(c, j + LOOKED_AT);
        SIMD_OR(found)
        for (int64_t k = j; k < end; k++)
            found |= z[k] == x;
        if (found)
            break;
    }
    while (z[j] != x)
        j++;
    return j;
}

static int64_t first_nan(const real *z)
{
    int64_t j = 0;
    while (z[j] == z[j])
        j++;
    return j;
}

/* The first j with z_j = max z, where NaN is the largest. */
static int64_t first_largest(const real *z, int64_t c)
{
    return has_nan(z, c) ? first_nan(z) : first_equal(z, c, maximum(z, c));
}

/* The same for `count` ≤ LANES narrow rows. */
static void first_largest_of_tile(int64_t *y, const real *z, int64_t c, int64_t count)
{
    real tile[NARROW * LANES] ALIGNED, top[LANES] ALIGNED;
    place at[LANES] ALIGNED, nan[LANES] ALIGNED;
    load_tile(tile, z, c, count);
    for (int l = 0; l < LANES; l++) {
        top[l] = tile[l];
        nan[l] = tile[l] != tile[l];
        at[l] = 0;
    }
    for (int64_t j = 1; j < c; j++) {
        const place here = (place)j;
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real zl = tile[j * LANES + l];
            const int better = zl > top[l];
            top[l] = better ? zl : top[l];
            at[l] = better ? here : at[l];
            nan[l] |= zl != zl;
        }
    }
    for (int64_t l = 0; l < count; l++)
        y[l] = nan[l] ? first_largest(z + l * c, c) : at[l];
}

static void first_largest_of_rows(int64_t *y, const real *z, int64_t c, int64_t count)
{
    if (c <= NARROW)
        first_largest_of_tile(y, z, c, count);
    for (int64_t l = 0; c > NARROW && l < count; l++)
        y[l] = first_largest(z + l * c, c);
}

static void argmax_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t c = call->size[1];
    for (int64_t i = first; i < end; i += LANES)
        first_largest_of_rows((int64_t *)call->buffer[0] + i, (const real *)call->buffer[1] + i * c, c,
                              smaller(end - i, LANES));
}

/* y = the first j with x_j = max x */
static int64_t argmax(const minikd_call *call)
{
    minikd_parallel(argmax_part, (void *)call, call->size[0], rows_of_range(call->size[0], call->size[1], 10, 0.1));
    return MINIKD_DONE;
}

/* The call, and how many are right in each range of rows. */
typedef struct {
    const minikd_call *call;
    int64_t grain;
    double partial[MINIKD_RANGES];
} correct_count_job;

static void correct_count_part(void *shared, int64_t first, int64_t end)
{
    correct_count_job *job = shared;
    const int64_t *target = job->call->buffer[2], c = job->call->size[1];
    int64_t correct = 0, y[LANES];
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = smaller(end - i, LANES);
        first_largest_of_rows(y, (const real *)job->call->buffer[1] + i * c, c, count);
        for (int64_t l = 0; l < count; l++)
            correct += target[i + l] != job->call->attribute.ignore_index && y[l] == target[i + l];
    }
    job->partial[first / job->grain] = (double)correct;
}

/* count = #{rows: target ≠ ignore_index and argmax z = target} */
static int64_t correct_count(const minikd_call *call)
{
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t wrong = wrong_label(call->buffer[2], n, c, call->attribute.ignore_index);
    if (wrong)
        return wrong;
    correct_count_job job;
    job.call = call;
    job.grain = rows_of_range(n, c, 10, 0.1);
    minikd_parallel(correct_count_part, &job, n, job.grain);
    *(int64_t *)call->buffer[0] = (int64_t)in_order(job.partial, n, job.grain);
    return MINIKD_DONE;
}
