/* What a teacher's scores are worth: how sure it is of a row, and its scores with its mistakes put right. */

#include "rows.h"

/* What the rows of one call have in common. */
typedef struct {
    const minikd_call *call;
    softening s;
    double inverse_t, most; /* the largest entropy, log C; 1 for a single class, whose entropy is 0 */
} confidence_job;

/* inner += Σ e·d of each lane, d = z - top; a term of weight 0 is 0. */
static void add_inner(double *inner, const real *e, const real *z, int64_t steps, const real *top)
{
    for (int64_t j = 0; j < steps * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real el = e[j + l], product = el * (z[j + l] - top[l]);
            inner[l] += el == 0 ? 0 : product;
        }
    }
}

/* 1 - H/log C of total = Σ e and inner = Σ e·d: since log q = d/T - log total, H = log total - inner/(T·total). */
static real certainty(const confidence_job *job, double total, double inner)
{
    const double entropy = logarithm(total) - inner / total * job->inverse_t, w = 1 - entropy / job->most;
    return (real)(w < 0 ? 0 : w);
}

static void confidence_of_tile(real *w, const real *z, const int64_t *target, int64_t count, const confidence_job *job)
{
    const int64_t c = job->call->size[1], ignored = job->call->attribute.ignore_index;
    real tile[NARROW * LANES] ALIGNED, e[NARROW * LANES] ALIGNED, top[LANES] ALIGNED;
    double total[LANES] ALIGNED, inner[LANES] ALIGNED = {0};
    load_tile(tile, z, c, count);
    maxima(top, tile, c);
    tile_weights(e, total, tile, top, c, FEW, &job->s);
    if (!target)
        add_inner(inner, e, tile, c, top);
    for (int64_t l = 0; l < count; l++) {
        if (!target)
            w[l] = certainty(job, total[l], inner[l]);
        else
            w[l] = (real)((target[l] == ignored ? 1 : e[target[l] * LANES + l]) / total[l]);
    }
}

static real certainty_of_row(const real *z, int64_t c, const confidence_job *job)
{
    real tops[LANES] ALIGNED, e[STEPS * LANES] ALIGNED, rest[LANES] ALIGNED;
    double total[LANES] ALIGNED = {0}, inner[LANES] ALIGNED = {0};
    fill(tops, LANES, maximum(z, c));
    for (int64_t j = 0; j < c / LANES; j += STEPS) {
        const int64_t steps = smaller(c / LANES - j, STEPS);
        add_weights(total, e, z + j * LANES, steps, STEPS, &job->s, tops, c);
        add_inner(inner, e, z + j * LANES, steps, tops);
    }
    if (c % LANES) {
        load_rest(rest, z, c);
        add_weights(total, e, rest, 1, STEPS, &job->s, tops, 0);
        add_inner(inner, e, rest, 1, tops);
    }
    return certainty(job, across(total), across(inner));
}

/* q of the label, or the largest q for one that is ignored. */
static real probability_of_row(const real *z, int64_t c, int64_t label, const confidence_job *job)
{
    const real top = maximum(z, c);
    const real e = label == job->call->attribute.ignore_index ? 1 : weight(&job->s, z[label] - top);
    return (real)(e / total_weight(z, c, &job->s, top));
}

static void confidence_part(void *shared, int64_t first, int64_t end)
{
    const confidence_job *job = shared;
    const int64_t *target = job->call->buffer[2], c = job->call->size[1];
    real *w = job->call->buffer[0];
    const real *z = job->call->buffer[1];
    for (int64_t i = first; c <= NARROW && i < end; i += LANES)
        confidence_of_tile(w + i, z + i * c, target ? target + i : NULL, smaller(end - i, LANES), job);
    for (int64_t i = first; c > NARROW && i < end; i++)
        w[i] = target ? probability_of_row(z + i * c, c, target[i], job) : certainty_of_row(z + i * c, c, job);
}

/* w = 1 - H(q) / log C, H(q) = -Σ q·log q, q = softmax(z/T);
 * with a target w = q_target, and max q where target = ignore_index */
static int64_t teacher_confidence(const minikd_call *call)
{
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t *target = call->buffer[2];
    const double temperature = *(const double *)call->buffer[3];
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const int64_t wrong = target ? wrong_label(target, n, c, call->attribute.ignore_index) : MINIKD_DONE;
    if (wrong)
        return wrong;
    confidence_job job;
    job.call = call;
    job.inverse_t = inverse_temperature(temperature);
    job.s = softened(job.inverse_t);
    job.most = c > 1 ? logarithm((double)c) : 1;
    minikd_parallel(confidence_part, &job, n, rows_of_range(n, c, 10, 0.5));
    return MINIKD_DONE;
}

static void corrected_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const int64_t *target = call->buffer[2], c = call->size[1];
    int64_t top[LANES];
    for (int64_t i = first; i < end; i += LANES) {
        real *y = (real *)call->buffer[0] + i * c;
        const real *z = (const real *)call->buffer[1] + i * c;
        const int64_t count = smaller(end - i, LANES);
        first_largest_of_rows(top, z, c, count);
        memcpy(y, z, (size_t)(count * c) * sizeof(real));
        for (int64_t l = 0; l < count; l++) {
            const int64_t label = target[i + l] == call->attribute.ignore_index ? top[l] : target[i + l];
            y[l * c + top[l]] = z[l * c + label];
            y[l * c + label] = z[l * c + top[l]];
        }
    }
}

/* y = z, with z_target and z_argmax exchanged; a row whose target is ignore_index stays as it is */
static int64_t corrected_logits(const minikd_call *call)
{
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t wrong = wrong_label(call->buffer[2], n, c, call->attribute.ignore_index);
    if (wrong)
        return wrong;
    minikd_parallel(corrected_part, (void *)call, n, rows_of_range(n, c, 10, 0.2));
    return MINIKD_DONE;
}
