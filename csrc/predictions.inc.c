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

/* y = the first j with x_j = max x */
static int64_t argmax(const minikd_call *call)
{
    int64_t *y = call->buffer[0];
    const real *x = call->buffer[1];
    const int64_t n = call->size[0], c = call->size[1];
    for (int64_t i = 0; i < n; i++)
        y[i] = first_largest(x + i * c, c);
    return MINIKD_DONE;
}

/* count = #{rows: target ≠ ignore_index and argmax z = target} */
static int64_t correct_count(const minikd_call *call)
{
    int64_t *count = call->buffer[0];
    const real *z = call->buffer[1];
    const int64_t *target = call->buffer[2], ignored = call->attribute.ignore_index;
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t wrong = wrong_label(target, n, c, ignored);
    if (wrong)
        return wrong;
    int64_t correct = 0;
    for (int64_t i = 0; i < n; i++)
        correct += target[i] != ignored && first_largest(z + i * c, c) == target[i];
    *count = correct;
    return MINIKD_DONE;
}
