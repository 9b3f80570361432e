/* What a classifier's scores decide: the class of each row, and how many of them are right. */

#include "rows.h"

/* An integer that orders as x does, with NaN above infinity: among integers a maximum takes no care of NaN. */
#ifdef MINIKD_DOUBLE
typedef int64_t key;
#define NAN_KEY INT64_MAX
#define ABOVE_SIGN INT64_MAX
#else
typedef int32_t key;
#define NAN_KEY INT32_MAX
#define ABOVE_SIGN INT32_MAX
#endif

INLINE key key_of(real x)
{
    key k;
    const real positive_zero = x + 0; /* -0 and 0 are a tie */
    memcpy(&k, &positive_zero, sizeof k);
    k = k < 0 ? (key)(k ^ ABOVE_SIGN) : k;
    return x == x ? k : NAN_KEY;
}

/* The first j with z_j = max z; NaN is the largest. */
static int64_t first_largest(const real *z, int64_t c)
{
    const int64_t whole = c - c % LANES;
    key lane[LANES], top;
    for (int l = 0; l < LANES; l++)
        lane[l] = key_of(z[0]);
    for (int64_t j = 0; j < whole; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const key k = key_of(z[j + l]);
            lane[l] = k > lane[l] ? k : lane[l];
        }
    }
    top = lane[0];
    for (int l = 1; l < LANES; l++)
        top = lane[l] > top ? lane[l] : top;
    for (int64_t j = whole; j < c; j++)
        top = key_of(z[j]) > top ? key_of(z[j]) : top;
    int64_t j = 0;
    while (key_of(z[j]) != top)
        j++;
    return j;
}

static void argmax_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t c = call->size[1];
    for (int64_t i = first; i < end; i++)
        ((int64_t *)call->buffer[0])[i] = first_largest((const real *)call->buffer[1] + i * c, c);
}

/* y = the first j with x_j = max x */
static int64_t argmax(const minikd_call *call)
{
    minikd_parallel(argmax_part, (void *)call, call->size[0], rows_of_range(call->size[0], call->size[1], 10, 0.2));
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
    int64_t correct = 0;
    for (int64_t i = first; i < end; i++)
        correct += target[i] != job->call->attribute.ignore_index
                   && first_largest((const real *)job->call->buffer[1] + i * c, c) == target[i];
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
    job.grain = rows_of_range(n, c, 10, 0.2);
    minikd_parallel(correct_count_part, &job, n, job.grain);
    *(int64_t *)call->buffer[0] = (int64_t)in_order(job.partial, n, job.grain);
    return MINIKD_DONE;
}
