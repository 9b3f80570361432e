/* The losses: cross-entropy for hard and for soft targets, Kullback-Leibler divergence, and distillation.
 *
 * Each takes its logits' gradient in the same traversal as its value; backward only scales it by the upstream
 * gradient. Row losses are computed and added up in double. */

#include "rows.h"

/* --- what they share --- */

/* What one row's loss and gradient are multiplied by under this reduction. */
static double row_scale(double divisor, enum minikd_reduction reduction)
{
    if (reduction == MINIKD_NONE || reduction == MINIKD_SUM)
        return 1;
    return inverse_or_0(divisor);
}

/* Σ of the row losses, or Σ / divisor (0 when the divisor is 0). */
static real reduced(double total, double divisor, enum minikd_reduction reduction)
{
    if (reduction == MINIKD_SUM)
        return (real)total;
    return divisor != 0 ? (real)(total / divisor) : 0;
}

/* Σ of the losses of `count` ≤ LANES rows, each of which is also written to loss unless that is NULL. */
static double add_rows(real *loss, double *row, int64_t count)
{
    for (int64_t l = 0; loss && l < count; l++)
        loss[l] = (real)row[l];
    for (int64_t l = count; l < LANES; l++)
        row[l] = 0;
    return across(row);
}

/* Σ_j w_j·(z_j - top), where a class with w_j = 0 adds exactly 0; w may be NULL for 1. */
static double weighted_shifts(const real *z, const real *w, int64_t c, real top)
{
    real term[BLOCK];
    double total = 0;
    for (int64_t first = 0; first < c; first += BLOCK) {
        const int64_t count = block_size(c - first);
        for (int64_t j = 0; j < count; j++) {
            const real wj = w ? w[first + j] : 1, shifted = z[first + j] - top;
            term[j] = wj == 0 ? 0 : wj * shifted;
        }
        total += sum(term, count);
    }
    return total;
}

/* A hard label as class probabilities times class weights: w_j·ỹ_j with ỹ = (1 - e)·onehot(y) + e/C. */
typedef struct {
    double peak, base;  /* 1 - e and e/C */
    const real *weight; /* of each class; NULL for 1 */
    double weight_sum;
} smoothed_label;

static smoothed_label smoothed(double label_smoothing, const real *weight, int64_t c)
{
    const smoothed_label label = {1 - label_smoothing, label_smoothing / (double)c, weight,
                                  weight ? sum(weight, c) : (double)c};
    return label;
}

/* w_y·(1 - e), what the label's own class has above the others. */
static double label_peak(const smoothed_label *label, int64_t y)
{
    return label->weight ? label->weight[y] * label->peak : label->peak;
}

/* scale·(-Σ_j w_j·ỹ_j·log softmax(z)_j) of `count` rows, given top = max z, log_total = log Σ exp(z - top) and
 * per_total = 1 / Σ exp(z - top) of each, and what their weights exp(z - top) are multiplied by in the gradient. Both
 * are 0 where the label y is -1, which is none. */
INLINE void hard_losses(const smoothed_label *label, double *loss, real *factor, const real *z, const int64_t *y,
                        int64_t c, int64_t count, const real *top, const double *log_total, const double *per_total,
                        double scale)
{
    double peak[LANES] ALIGNED, below_top[LANES] ALIGNED, others[LANES] ALIGNED = {0};
    const double base = label->base, base_sum = base * label->weight_sum;
    for (int64_t l = 0; l < count; l++, z += c) {
        peak[l] = y[l] < 0 ? 0 : label_peak(label, y[l]);
        below_top[l] = peak[l] == 0 ? 0 : (double)top[l] - z[y[l]];
        if (y[l] >= 0 && base != 0)
            others[l] = base * weighted_shifts(z, label->weight, c, top[l]);
    }
    SIMD
    for (int64_t l = 0; l < count; l++) {
        const double row = hard_loss(peak[l], below_top[l], base_sum, others[l], log_total[l]);
        loss[l] = y[l] < 0 ? 0 : row * scale;
        factor[l] = y[l] < 0 ? 0 : hard_factor(peak[l], base_sum, per_total[l], scale);
    }
}

/* gradient -= scale·w_j·ỹ_j for one labelled row: the second part of scale·(softmax(z)·Σ w·ỹ - w·ỹ). */
static void subtract_label(const smoothed_label *label, real *gradient, int64_t y, int64_t c, double scale)
{
    const real base = (real)(label->base * scale), *w = label->weight;
    if (base != 0)
        for (int64_t j = 0; j < c; j++)
            gradient[j] -= w ? base * w[j] : base;
    gradient[y] -= (real)(label_peak(label, y) * scale);
}

/* The same for a tile; a label of -1 is none. */
static void subtract_labels(const smoothed_label *label, real *tile, const int64_t *y, int64_t c, double scale)
{
    const real base = (real)(label->base * scale), *w = label->weight;
    for (int64_t j = 0; base != 0 && j < c; j++) {
        const real share = w ? base * w[j] : base;
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] -= y[l] >= 0 ? share : 0;
    }
    for (int l = 0; l < LANES; l++)
        if (y[l] >= 0)
            tile[y[l] * LANES + l] -= (real)(label_peak(label, y[l]) * scale);
}

/* --- cross-entropy with integer labels --- */

/* The loss of one row; dz = scale·(softmax(z)·Σ w·ỹ - w·ỹ), or NULL. A row whose label is -1 has neither. */
static void cross_entropy_row(const smoothed_label *label, double *loss, real *dz, const real *z, int64_t y, int64_t c,
                              double scale)
{
    const softening s = softened(1);
    *loss = 0;
    if (y < 0) {
        if (dz)
            fill(dz, c, 0);
        return;
    }
    const real top = maximum(z, c);
    const double total = dz ? weights(dz, z, c, &s, top) : total_weight(z, c, &s, top);
    const double log_total = logarithm(total), per_total = reciprocal(total);
    real factor;
    hard_losses(label, loss, &factor, z, &y, c, 1, &top, &log_total, &per_total, scale);
    if (!dz)
        return;
    SIMD
    for (int64_t j = 0; j < c; j++)
        dz[j] *= factor;
    subtract_label(label, dz, y, c, scale);
}

/* The same for `count` ≤ LANES narrow rows. */
static void cross_entropy_tile(const smoothed_label *label, double *loss, real *dz, const real *z, const int64_t *y,
                               int64_t c, int64_t count, double scale)
{
    const softening s = softened(1);
    real tile[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, factor[LANES] ALIGNED;
    double total[LANES] ALIGNED, log_total[LANES] ALIGNED, per_total[LANES] ALIGNED;
    load_tile(tile, z, c, count);
    maxima(top, tile, c);
    tile_weights(tile, total, tile, top, c, 1, &s); /* in double, or a loss near 0 would be 0 */
    SIMD
    for (int l = 0; l < LANES; l++) {
        log_total[l] = logarithm(total[l]);
        per_total[l] = reciprocal(total[l]);
    }
    hard_losses(label, loss, factor, z, y, c, LANES, top, log_total, per_total, scale);
    if (!dz)
        return;
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] = factor[l] == 0 ? 0 : tile[j * LANES + l] * factor[l];
    }
    subtract_labels(label, tile, y, c, scale);
    store_tile(dz, tile, c, count);
}

/* The labels of `count` rows, -1 for those that have none and for lanes without a row. */
static void labels_or_none(int64_t *y, const int64_t *target, int64_t count, int64_t ignore_index)
{
    for (int64_t l = 0; l < LANES; l++)
        y[l] = target && l < count && target[l] != ignore_index ? target[l] : -1;
}

/* The losses of `count` ≤ LANES rows and their gradients, unless dz is NULL. */
static void cross_entropy_rows(const smoothed_label *label, double *loss, real *dz, const real *z, const int64_t *y,
                               int64_t c, int64_t count, double scale)
{
    if (c <= NARROW)
        cross_entropy_tile(label, loss, dz, z, y, c, count, scale);
    for (int64_t l = 0; c > NARROW && l < count; l++)
        cross_entropy_row(label, loss + l, dz ? dz + l * c : NULL, z + l * c, y[l], c, scale);
}

/* What the rows of one call have in common, and the sum of the losses of each range of rows. */
typedef struct {
    const minikd_call *call;
    smoothed_label label;
    double scale, partial[MINIKD_RANGES];
    int64_t grain;
} cross_entropy_job;

static void cross_entropy_part(void *shared, int64_t first, int64_t end)
{
    cross_entropy_job *job = shared;
    const minikd_call *call = job->call;
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z = call->buffer[2];
    const int64_t *target = call->buffer[3], c = call->size[1];
    double total = 0;
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = smaller(end - i, LANES);
        int64_t y[LANES];
        double row[LANES] ALIGNED;
        labels_or_none(y, target + i, count, call->attribute.ignore_index);
        cross_entropy_rows(&job->label, row, gradient ? gradient + i * c : NULL, z + i * c, y, c, count, job->scale);
        total += add_rows(call->attribute.reduction == MINIKD_NONE ? loss + i : NULL, row, count);
    }
    job->partial[first / job->grain] = total;
}

/* loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·onehot(y) + e/C */
static int64_t cross_entropy(const minikd_call *call)
{
    const real *w = call->buffer[4];
    const int64_t *target = call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t wrong = wrong_label(target, n, c, a->ignore_index);
    if (wrong)
        return wrong;
    double divisor = 0;
    for (int64_t i = 0; i < n; i++)
        if (target[i] != a->ignore_index)
            divisor += w ? w[target[i]] : 1;

    cross_entropy_job job;
    job.call = call;
    job.label = smoothed(a->label_smoothing, w, c);
    job.scale = row_scale(divisor, a->reduction);
    job.grain = rows_of_range(n, c, 12, 0.5);
    minikd_parallel(cross_entropy_part, &job, n, job.grain);
    if (a->reduction != MINIKD_NONE) /* over no weight at all the mean is 0, whatever stands in the rows */
        *(real *)call->buffer[0] = job.scale == 0 ? 0 : (real)in_order(job.partial, n, job.grain);
    return MINIKD_DONE;
}

/* --- cross-entropy with class probabilities --- */

/* What the rows of one call have in common, and the sum of the losses of each range of rows. */
typedef struct {
    const minikd_call *call;
    real peak, base; /* 1 - e and e/C */
    double scale, partial[MINIKD_RANGES];
    int64_t grain;
} soft_cross_entropy_job;

/* -Σ w·ỹ·log softmax(z) of one wide row, given log_total = log Σ exp(z - top); adds Σ w·ỹ to sum_y. */
static double soft_terms(const soft_cross_entropy_job *job, const real *z, const real *target, real top,
                         double log_total, double *sum_y)
{
    const int64_t c = job->call->size[1];
    const real *w = job->call->buffer[4], log_sum = (real)log_total;
    real y[BLOCK], term[BLOCK];
    double row = log_total == log_total ? 0 : log_total; /* NaN stays, whatever the targets */
    for (int64_t first = 0; first < c; first += BLOCK) {
        const int64_t count = block_size(c - first);
        const real *given = target + first, *logit = z + first, *weight = w ? w + first : NULL;
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real yj = (job->peak * given[j] + job->base) * (weight ? weight[j] : 1);
            const real minus_log_p = log_sum - (logit[j] - top);
            y[j] = yj;
            term[j] = yj == 0 ? 0 : yj * minus_log_p;
        }
        row += sum(term, count);
        *sum_y += sum(y, count);
    }
    return row;
}

/* The losses of `count` ≤ LANES narrow rows; dz are their gradients, or NULL. */
static void soft_cross_entropy_tile(const soft_cross_entropy_job *job, double *loss, real *dz, const real *z,
                                    const real *target, int64_t count)
{
    const softening s = softened(1);
    const int64_t c = job->call->size[1];
    const real *w = job->call->buffer[4], scale = (real)job->scale;
    real e[NARROW * LANES] ALIGNED, y[NARROW * LANES] ALIGNED, top[LANES] ALIGNED, factor[LANES] ALIGNED;
    double total[LANES] ALIGNED, log_total[LANES] ALIGNED, row[LANES] ALIGNED, sum_y[LANES] ALIGNED = {0};
    load_tile(e, z, c, count);
    load_tile(y, target, c, count);
    maxima(top, e, c);
    real shifted[NARROW * LANES] ALIGNED;
    for (int64_t j = 0; j < c; j++) {
        const real wj = w ? w[j] : 1;
        SIMD
        for (int l = 0; l < LANES; l++) {
            shifted[j * LANES + l] = e[j * LANES + l] - top[l];
            y[j * LANES + l] = (job->peak * y[j * LANES + l] + job->base) * wj;
        }
    }
    tile_weights(e, total, e, top, c, 1, &s);
    SIMD
    for (int l = 0; l < LANES; l++) {
        log_total[l] = logarithm(total[l]);
        row[l] = log_total[l] == log_total[l] ? 0 : log_total[l]; /* NaN stays, whatever the targets */
    }
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real yl = y[j * LANES + l];
            const double term = yl * (log_total[l] - shifted[j * LANES + l]);
            row[l] += yl == 0 ? 0 : term;
            sum_y[l] += yl;
        }
    }
    SIMD
    for (int l = 0; l < LANES; l++)
        factor[l] = (real)(sum_y[l] * reciprocal(total[l]) * job->scale);
    memcpy(loss, row, sizeof row);
    if (!dz)
        return;
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            e[j * LANES + l] = e[j * LANES + l] * factor[l] - y[j * LANES + l] * scale;
    }
    store_tile(dz, e, c, count);
}

/* The loss of one wide row; dz is its gradient, or NULL. */
static double soft_cross_entropy_row(const soft_cross_entropy_job *job, real *dz, const real *z, const real *target)
{
    const softening s = softened(1);
    const int64_t c = job->call->size[1];
    const real *w = job->call->buffer[4], peak = job->peak, base = job->base, scale = (real)job->scale;
    const real top = maximum(z, c);
    const double total = dz ? weights(dz, z, c, &s, top) : total_weight(z, c, &s, top);
    double sum_y = 0;
    const double loss = soft_terms(job, z, target, top, logarithm(total), &sum_y);
    const real factor = (real)(sum_y / total * job->scale);
    SIMD
    for (int64_t j = 0; j < (dz ? c : 0); j++)
        dz[j] = dz[j] * factor - (peak * target[j] + base) * (w ? w[j] : 1) * scale;
    return loss;
}

static void soft_cross_entropy_part(void *shared, int64_t first, int64_t end)
{
    soft_cross_entropy_job *job = shared;
    const minikd_call *call = job->call;
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z = call->buffer[2], *target = call->buffer[3];
    const int64_t c = call->size[1];
    double total = 0;
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = smaller(end - i, LANES);
        double row[LANES] ALIGNED;
        if (c <= NARROW)
            soft_cross_entropy_tile(job, row, gradient ? gradient + i * c : NULL, z + i * c, target + i * c, count);
        for (int64_t l = 0; c > NARROW && l < count; l++) {
            const int64_t at = (i + l) * c;
            row[l] = soft_cross_entropy_row(job, gradient ? gradient + at : NULL, z + at, target + at);
        }
        total += add_rows(call->attribute.reduction == MINIKD_NONE ? loss + i : NULL, row, count);
    }
    job->partial[first / job->grain] = total;
}

/* loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·y + e/C */
static int64_t soft_cross_entropy(const minikd_call *call)
{
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    soft_cross_entropy_job job;
    job.call = call;
    job.peak = (real)(1 - a->label_smoothing);
    job.base = (real)(a->label_smoothing / (double)c);
    job.scale = row_scale((double)n, a->reduction);
    job.grain = rows_of_range(n, c, 20, 0.8);
    minikd_parallel(soft_cross_entropy_part, &job, n, job.grain);
    if (a->reduction != MINIKD_NONE)
        *(real *)call->buffer[0] = reduced(in_order(job.partial, n, job.grain), (double)n, a->reduction);
    return MINIKD_DONE;
}

/* --- Kullback-Leibler divergence of given log-probabilities --- */

/* term = q·(log q - input), 0 where q = 0;  dinput = -q·scale;  at most BLOCK elements, dinput may be NULL */
static void kl_terms(real *term, real *dinput, const real *input, const real *target, int64_t count, real scale,
                     int log_target)
{
    real q[BLOCK];
    if (log_target) {
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real log_q = target[j], qj = exponential(log_q), log_ratio = log_q - input[j];
            q[j] = qj;
            term[j] = qj == 0 ? 0 : qj * log_ratio;
        }
    } else {
        SIMD
        for (int64_t j = 0; j < count; j++) {
            const real qj = target[j], log_ratio = log_minus(qj, input[j]);
            q[j] = qj;
            term[j] = qj == 0 ? 0 : qj * log_ratio;
        }
    }
    if (dinput) {
        SIMD
        for (int64_t j = 0; j < count; j++)
            dinput[j] = -q[j] * scale;
    }
}

/* What the elements of one call have in common, and the sum of the terms of each range of elements. */
typedef struct {
    const minikd_call *call;
    real scale;
    double partial[MINIKD_RANGES];
    int64_t grain;
} kl_div_job;

static void kl_div_part(void *shared, int64_t from, int64_t end)
{
    kl_div_job *job = shared;
    const minikd_call *call = job->call;
    real *loss = call->buffer[0], *gradient = call->buffer[1], unused[BLOCK];
    const real *input = call->buffer[2], *target = call->buffer[3];
    double total = 0;
    for (int64_t first = from; first < end; first += BLOCK) {
        const int64_t count = block_size(end - first);
        real *term = call->attribute.reduction == MINIKD_NONE ? loss + first : unused;
        kl_terms(term, gradient ? gradient + first : NULL, input + first, target + first, count, job->scale,
                 call->attribute.log_target);
        total += sum(term, count);
    }
    job->partial[from / job->grain] = total;
}

/* loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q */
static int64_t kl_div(const minikd_call *call)
{
    const enum minikd_reduction reduction = call->attribute.reduction;
    const int64_t n = call->size[0], size = n * call->size[1];
    const double divisor = (double)(reduction == MINIKD_MEAN ? size : n);
    kl_div_job job;
    job.call = call;
    job.scale = (real)row_scale(divisor, reduction);
    job.grain = minikd_grain(size, 1, BLOCK);
    minikd_parallel(kl_div_part, &job, size, job.grain);
    if (reduction != MINIKD_NONE)
        *(real *)call->buffer[0] = reduced(in_order(job.partial, size, job.grain), divisor, reduction);
    return MINIKD_DONE;
}

/* --- distillation --- */

/* Where the weights of the hard loss come from. exp(z) = exp(z/T)^T is the student's weight at T squared so often: */
enum hard_weights { SQUARED_0, SQUARED_1, SQUARED_2, SQUARED_3, COMPUTED, NO_LABELS };

static enum hard_weights hard_weights_of(int labelled, double t)
{
    if (!labelled)
        return NO_LABELS;
    return t == 1 ? SQUARED_0 : t == 2 ? SQUARED_1 : t == 4 ? SQUARED_2 : t == 8 ? SQUARED_3 : COMPUTED;
}

INLINE real squared(real x, enum hard_weights times)
{
    for (int k = SQUARED_0; k < (int)times; k++)
        x *= x;
    return x;
}

/* What all rows of one distillation loss have in common. */
typedef struct {
    int64_t c;
    int soft;                                /* whether the soft loss is asked for; T² alone may make its scale 0 */
    double hard_scale, soft_scale;           /* the weights, with the reduction's factor; T² in the soft one */
    double soft_factor;                      /* of p - q in the gradient */
    double inverse_s, inverse_t;             /* 1/T of the student, and of the teacher: 1 for log-probabilities */
    softening student, teacher, hard;        /* at these, and at 1 */
    real lowest_t;                           /* a z_t - top_t below it has probability 0 also in double */
    enum hard_weights hard_weights;
    smoothed_label label;
    int past_caches; /* whether the gradient is too large for them */
} distillation;

/* Memory for one wide row each, in whole steps. */
typedef struct {
    real *p, *q, *e;
} row_memory;

/* What is found out about LANES rows, or about one wide row in LANES parts: the largest scores, and over the weights
 * at T of student and teacher Σ p, Σ q, Σ q·((z_t - top_t) - (z_s - top_s)·ratio) with ratio = T_t/T_s, and the sum Σ e
 * of the student's at 1. */
typedef struct {
    real top_s[LANES], top_t[LANES];
    double p[LANES], q[LANES], apart[LANES], e[LANES];
} ALIGNED row_sums;

static void start_sums(row_sums *sums)
{
    for (int l = 0; l < LANES; l++)
        sums->p[l] = sums->q[l] = sums->apart[l] = sums->e[l] = 0;
}

/* The scores of student and teacher: whole steps where they lie, and the unfinished last step of a wide row filled up
 * with classes of probability 0, or NULL. */
typedef struct {
    const real *s, *t, *rest_s, *rest_t;
    int64_t whole;
} score_steps;

static int64_t all_steps(const score_steps *z)
{
    return z->whole + (z->rest_s != NULL);
}

/* The weights p and q, and e where it is COMPUTED, and their sums. In each call hard_weights and narrow are constants,
 * so that the loop has no branch. Of narrow rows Σ e is taken in double: beside the top's own weight, which is 1, the
 * others would be lost where a row is almost certain, and its hard loss with them. Meanwhile the next row is fetched, which is c further on. */
INLINE void add_steps(row_sums *sums, real *p, real *q, real *e, const score_steps *z, const distillation *d,
                      enum hard_weights hard_weights, int narrow)
{
    const score_steps scores = *z;
    const softening student = d->student, teacher = d->teacher, hard = d->hard;
    const real ratio = (real)(d->inverse_s / d->inverse_t), lowest_t = d->lowest_t;
    const int64_t steps = all_steps(z), together = narrow ? FEW : STEPS;
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t end = smaller(first + together, steps);
        real sum_p[LANES] ALIGNED = {0}, sum_q[LANES] ALIGNED = {0};
        real sum_apart[LANES] ALIGNED = {0}, sum_e[LANES] ALIGNED = {0};
        for (int64_t k = first; k < end; k++) {
            const int64_t j = k * LANES;
            const real *z_s = k < scores.whole ? scores.s + j : scores.rest_s;
            const real *z_t = k < scores.whole ? scores.t + j : scores.rest_t;
            FETCH(scores.s + j + d->c);
            FETCH(scores.t + j + d->c);
            SIMD
            for (int l = 0; l < LANES; l++) {
                const real below_s = z_s[l] - sums->top_s[l], below_t = z_t[l] - sums->top_t[l];
                const real pl = quick_weight(&student, below_s), ql = quick_weight(&teacher, below_t);
                const real term = ql * fused(-ratio, below_s, below_t);
                p[j + l] = pl;
                q[j + l] = ql;
                sum_p[l] += pl;
                sum_q[l] += ql;
                sum_apart[l] += unless_below(below_t, lowest_t, term);
                const real el = hard_weights == COMPUTED ? quick_weight(&hard, below_s) : squared(pl, hard_weights);
                if (hard_weights == COMPUTED)
                    e[j + l] = el;
                if (hard_weights != NO_LABELS && narrow)
                    sums->e[l] += el;
                else if (hard_weights != NO_LABELS)
                    sum_e[l] += el;
            }
        }
        SIMD
        for (int l = 0; l < LANES; l++) {
            sums->p[l] += sum_p[l];
            sums->q[l] += sum_q[l];
            sums->apart[l] += sum_apart[l];
            sums->e[l] += sum_e[l];
        }
    }
}

#define ADD_STEPS(hard_weights)                                                                                        \
    do {                                                                                                               \
        if (d->c <= NARROW)                                                                                            \
            add_steps(sums, p, q, e, z, d, hard_weights, 1);                                                           \
        else                                                                                                           \
            add_steps(sums, p, q, e, z, d, hard_weights, 0);                                                           \
    } while (0)

static void add_to_sums(row_sums *sums, real *p, real *q, real *e, const score_steps *z, const distillation *d)
{
    switch (d->hard_weights) {
    case SQUARED_0:
        ADD_STEPS(SQUARED_0);
        break;
    case SQUARED_1:
        ADD_STEPS(SQUARED_1);
        break;
    case SQUARED_2:
        ADD_STEPS(SQUARED_2);
        break;
    case SQUARED_3:
        ADD_STEPS(SQUARED_3);
        break;
    case COMPUTED:
        ADD_STEPS(COMPUTED);
        break;
    default:
        ADD_STEPS(NO_LABELS);
    }
}

/* What the rows' results are computed with: dz = p·per_p - q·per_q + e·per_e, and if KL is small, δ = log p - log q. */
typedef struct {
    real per_p[LANES], per_q[LANES], per_e[LANES];
    double kl[LANES], log_of_sums[LANES]; /* KL(q ‖ p), log(Σ q / Σ p) */
} ALIGNED row_results;

/* The losses of `count` rows, as far as the hard term goes, and KL as a difference of sums. Returns whether any is too
 * small for that. */
INLINE int results_of(row_results *results, double *loss, const row_sums *sums, const distillation *d, const real *z_s,
                      const int64_t *y, int64_t count)
{
    double log_e[LANES] ALIGNED, per_e[LANES] ALIGNED;
    int near = 0;
    SIMD
    for (int64_t l = 0; l < count; l++) {
        log_e[l] = logarithm(sums->e[l]);
        per_e[l] = reciprocal(sums->e[l]);
        const double per_p = reciprocal(sums->p[l]), per_q = reciprocal(sums->q[l]);
        const double log_of_sums = log_of_quotient(sums->p[l], sums->q[l], per_p);
        results->kl[l] = kl_of_sums(sums->apart[l], per_q, d->inverse_t, log_of_sums);
        results->log_of_sums[l] = log_of_sums;
        results->per_p[l] = (real)(d->soft_factor * per_p);
        results->per_q[l] = (real)(d->soft_factor * per_q);
    }
    hard_losses(&d->label, loss, results->per_e, z_s, y, d->c, count, sums->top_s, log_e, per_e, d->hard_scale);
    for (int64_t l = 0; l < count; l++)
        near |= results->kl[l] < FAR_APART;
    return near;
}

/* dz = p·per_p - q·per_q + e·per_e. dz may be any of p, q and e. */
INLINE void combine_steps(real *dz, const real *p, const real *q, const real *e, int64_t steps,
                          const row_results *results, enum hard_weights hard_weights)
{
    for (int64_t j = 0; j < steps * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real soft = soft_gradient(p[j + l], q[j + l], results->per_p[l], results->per_q[l]);
            const real el = hard_weights == COMPUTED ? e[j + l] : squared(p[j + l], hard_weights);
            dz[j + l] = hard_weights == NO_LABELS ? soft : fused(el, results->per_e[l], soft);
        }
    }
}

static void combine(real *dz, const real *p, const real *q, const real *e, int64_t steps, const row_results *results,
                    enum hard_weights hard_weights)
{
    switch (hard_weights) {
    case SQUARED_0:
        combine_steps(dz, p, q, e, steps, results, SQUARED_0);
        break;
    case SQUARED_1:
        combine_steps(dz, p, q, e, steps, results, SQUARED_1);
        break;
    case SQUARED_2:
        combine_steps(dz, p, q, e, steps, results, SQUARED_2);
        break;
    case SQUARED_3:
        combine_steps(dz, p, q, e, steps, results, SQUARED_3);
        break;
    case COMPUTED:
        combine_steps(dz, p, q, e, steps, results, COMPUTED);
        break;
    default:
        combine_steps(dz, p, q, e, steps, results, NO_LABELS);
    }
}

/* What KL(q ‖ p) of rows with p ≈ q is computed with: p = weight·per_p, q = weight·per_q, and in two parts each
 * δ = log p - log q = (z_s - z_t)/T + shift where both have one T, else (z_s - top_s)/T - (z_t - top_t) + shift. */
typedef struct {
    real per_p[LANES], per_q[LANES], shift[LANES], shift_rest[LANES];
    real inverse, inverse_rest;
    int same_temperature;
} ALIGNED near_rows;

static void near_rows_of(near_rows *near, const row_sums *sums, const row_results *results, const distillation *d,
                         int64_t count)
{
    near->same_temperature = d->inverse_s == d->inverse_t;
    near->inverse = (real)d->inverse_s;
    near->inverse_rest = (real)(d->inverse_s - near->inverse);
    for (int64_t l = 0; l < count; l++) {
        near->per_p[l] = (real)reciprocal(sums->p[l]);
        near->per_q[l] = (real)reciprocal(sums->q[l]);
        shift_of_row(sums->top_s[l], sums->top_t[l], results->log_of_sums[l], d->inverse_s, near->same_temperature,
                     &near->shift[l], &near->shift_rest[l]);
    }
}

/* log p - log q of a class */
INLINE real log_ratio(const near_rows *near, int l, real z_s, real z_t)
{
    return log_ratio_at_one_temperature(z_s, z_t, near->inverse, near->inverse_rest, near->shift[l],
                                        near->shift_rest[l]);
}

/* kl += Σ of the terms of KL(q ‖ p) that do not cancel */
INLINE void add_near_steps(double *kl, const near_rows *near, const row_sums *sums, const real *p, const real *q,
                           const score_steps *z, int same_temperature)
{
    const score_steps scores = *z;
    const near_rows fixed = *near;
    for (int64_t k = 0; k < all_steps(z); k++) {
        const int64_t j = k * LANES;
        const real *z_s = k < scores.whole ? scores.s + j : scores.rest_s;
        const real *z_t = k < scores.whole ? scores.t + j : scores.rest_t;
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real zs = z_s[l], zt = z_t[l];
            const real pl = p[j + l] * fixed.per_p[l], ql = q[j + l] * fixed.per_q[l];
            const real apart = fused(zs - sums->top_s[l], fixed.inverse, fixed.shift[l]) - (zt - sums->top_t[l]);
            const real delta = same_temperature ? log_ratio(&fixed, l, zs, zt) : apart;
            kl[l] += near_term(pl, ql, delta);
        }
    }
}

static void add_near(double *kl, const near_rows *near, const row_sums *sums, const real *p, const real *q,
                     const score_steps *z)
{
    if (near->same_temperature)
        add_near_steps(kl, near, sums, p, q, z, 1);
    else
        add_near_steps(kl, near, sums, p, q, z, 0);
}

/* The losses of `count` ≤ LANES narrow rows, whose labels are y (-1 for none, and in the lanes without a row); dz are
 * their gradients, or NULL. */
static void distillation_tile(const distillation *d, double *loss, real *dz, const real *z_s, const real *z_t,
                              const int64_t *y, int64_t count)
{
    const int64_t c = d->c;
    real tile_s[NARROW * LANES] ALIGNED, tile_t[NARROW * LANES] ALIGNED;
    real p[NARROW * LANES] ALIGNED, q[NARROW * LANES] ALIGNED, e[NARROW * LANES] ALIGNED;
    row_sums sums;
    row_results results;
    load_tile(tile_s, z_s, c, count);
    load_tile(tile_t, z_t, c, count);
    maxima(sums.top_s, tile_s, c);
    maxima(sums.top_t, tile_t, c);
    const score_steps z = {tile_s, tile_t, NULL, NULL, c};
    start_sums(&sums);
    add_to_sums(&sums, p, q, e, &z, d);
    if (results_of(&results, loss, &sums, d, z_s, y, LANES)) {
        near_rows near;
        double kl[LANES] = {0};
        near_rows_of(&near, &sums, &results, d, LANES);
        add_near(kl, &near, &sums, p, q, &z);
        for (int l = 0; l < LANES; l++)
            results.kl[l] = nearer(results.kl[l], kl[l], near.shift[l]);
    }
    for (int l = 0; l < LANES; l++)
        loss[l] += d->soft_scale * results.kl[l];
    if (!dz)
        return;
    combine(p, p, q, e, c, &results, d->hard_weights);
    subtract_labels(&d->label, p, y, c, d->hard_scale);
    store_tile(dz, p, c, count);
}

/* What was found out about a row in LANES parts as that of the whole row, in the first lane. */
static void gather_sums(row_sums *sums)
{
    sums->p[0] = across(sums->p);
    sums->q[0] = across(sums->q);
    sums->apart[0] = across(sums->apart);
    sums->e[0] = across(sums->e);
}

/* KL(q ‖ p) of a wide row whose soft labels nearly agree. */
static double near_kl(const distillation *d, const row_sums *sums, const row_results *results, const row_memory *row,
                      const score_steps *z)
{
    double kl[LANES] = {0};
    near_rows near;
    near_rows_of(&near, sums, results, d, 1);
    fill(near.per_p, LANES, near.per_p[0]);
    fill(near.per_q, LANES, near.per_q[0]);
    fill(near.shift, LANES, near.shift[0]);
    fill(near.shift_rest, LANES, near.shift_rest[0]);
    add_near(kl, &near, sums, row->p, row->q, z);
    return nearer(results->kl[0], across(kl), near.shift[0]);
}

/* The loss of one wide row, whose label is y (-1 for none); dz is its gradient, or NULL. */
static void distillation_row(const distillation *d, const row_memory *row, double *loss, real *dz, const real *z_s,
                             const real *z_t, int64_t y)
{
    const int64_t c = d->c, steps = c / LANES, whole = steps * LANES;
    real *p = row->p, *q = row->q, *e = row->e, rest_s[LANES] ALIGNED, rest_t[LANES] ALIGNED;
    row_sums sums;
    row_results results;
    const score_steps z = {z_s, z_t, whole < c ? rest_s : NULL, rest_t, steps};
    if (whole < c) {
        load_rest(rest_s, z_s, c);
        load_rest(rest_t, z_t, c);
    }
    fill(sums.top_s, LANES, maximum(z_s, c));
    fill(sums.top_t, LANES, maximum(z_t, c));
    start_sums(&sums);
    add_to_sums(&sums, p, q, e, &z, d);
    gather_sums(&sums);
    if (results_of(&results, loss, &sums, d, z_s, &y, 1))
        results.kl[0] = near_kl(d, &sums, &results, row, &z);
    *loss += d->soft_scale * results.kl[0];
    if (!dz)
        return;
    fill(results.per_p, LANES, results.per_p[0]);
    fill(results.per_q, LANES, results.per_q[0]);
    fill(results.per_e, LANES, results.per_e[0]);
    combine(d->past_caches ? p : dz, p, q, e, steps, &results, d->hard_weights);
    if (whole < c) {
        combine(rest_s, p + whole, q + whole, e + whole, 1, &results, d->hard_weights);
        store_rest(d->past_caches ? p : dz, rest_s, c);
    }
    if (y >= 0)
        subtract_label(&d->label, d->past_caches ? p : dz, y, c, d->hard_scale);
    if (d->past_caches)
        copy_past_caches(dz, p, c);
}

/* The losses of `count` ≤ LANES rows and their gradients, unless dz is NULL. */
static void distillation_rows(const distillation *d, const row_memory *memory, double *loss, real *dz, const real *z_s,
                              const real *z_t, const int64_t *y, int64_t count)
{
    const int64_t c = d->c;
    if (!d->soft)
        cross_entropy_rows(&d->label, loss, dz, z_s, y, c, count, d->hard_scale);
    else if (c <= NARROW)
        distillation_tile(d, loss, dz, z_s, z_t, y, count);
    else
        for (int64_t l = 0; l < count; l++)
            distillation_row(d, memory, loss + l, dz ? dz + l * c : NULL, z_s + l * c, z_t + l * c, y[l]);
}

/* The call, what its rows have in common, and the sum of the losses of each range of rows. */
typedef struct {
    const minikd_call *call;
    distillation d;
    double partial[MINIKD_RANGES];
    int64_t grain;
    char no_memory[MINIKD_RANGES];
} distillation_job;

static void distillation_part(void *shared, int64_t first, int64_t end)
{
    distillation_job *job = shared;
    const minikd_call *call = job->call;
    const distillation *d = &job->d;
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z_s = call->buffer[2], *z_t = call->buffer[3];
    const int64_t *target = d->hard_weights == NO_LABELS ? NULL : call->buffer[4];
    const int64_t c = d->c, padded = (c + LANES - 1) / LANES * LANES;
    real here[3 * STACK_ROW] ALIGNED;
    real *memory = c <= NARROW ? here : scratch(here, 3 * STACK_ROW, 3 * padded);
    if (!memory) {
        job->no_memory[first / job->grain] = 1;
        return;
    }
    const row_memory row = {memory, memory + padded, memory + 2 * padded};
    double total = 0;
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = smaller(end - i, LANES), at = i * c;
        int64_t y[LANES];
        double losses[LANES] ALIGNED;
        labels_or_none(y, target ? target + i : NULL, count, call->attribute.ignore_index);
        distillation_rows(d, &row, losses, gradient ? gradient + at : NULL, z_s + at, z_t + at, y, count);
        total += add_rows(call->attribute.reduction == MINIKD_NONE ? loss + i : NULL, losses, count);
    }
    job->partial[first / job->grain] = total;
    release(memory, here);
    settled();
}

/* loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p);  dz_s = hard·(softmax(z_s) - ỹ) + soft·T·(p - q);
 * p = softmax(z_s/T), q = softmax(z_t/T), or softmax(z_t) with log_target */
static int64_t distillation_loss(const minikd_call *call)
{
    const int64_t *target = call->buffer[4];
    const double temperature = *(const double *)call->buffer[5];
    const double hard = *(const double *)call->buffer[6], soft = *(const double *)call->buffer[7];
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const int64_t wrong = target ? wrong_label(target, n, c, a->ignore_index) : MINIKD_DONE;
    if (wrong)
        return wrong;

    /* the hard mean is over labelled rows, the soft mean over all */
    int64_t labelled = 0;
    for (int64_t i = 0; target && i < n; i++)
        labelled += target[i] != a->ignore_index;
    const double t = temperature < LARGEST_TEMPERATURE ? temperature : LARGEST_TEMPERATURE;
    const double per_soft = soft * row_scale((double)n, a->reduction);
    distillation_job job;
    distillation *d = &job.d;
    d->c = c;
    d->soft = per_soft != 0;
    d->hard_scale = hard * row_scale((double)labelled, a->reduction);
    d->soft_scale = per_soft * (a->scale_t2 ? t * t : 1);
    d->inverse_s = inverse_temperature(t);
    d->inverse_t = a->log_target ? 1 : d->inverse_s;
    d->soft_factor = within_real(per_soft * (a->scale_t2 ? t : d->inverse_s));
    d->student = softened(d->inverse_s);
    d->teacher = softened(d->inverse_t);
    d->lowest_t = (real)within_real(LOWEST_LOGARITHM / d->inverse_t);
    d->hard = softened(1);
    d->hard_weights = hard_weights_of(labelled && d->hard_scale != 0, t);
    d->label = smoothed(a->label_smoothing, NULL, c);
    d->past_caches = too_large_for_caches(n * c);
    job.call = call;
    memset(job.no_memory, 0, sizeof job.no_memory);
    job.grain = rows_of_range(n, c, 20, 0.9);
    minikd_parallel(distillation_part, &job, n, job.grain);
    if (memchr(job.no_memory, 1, sizeof job.no_memory))
        return MINIKD_NO_MEMORY;
    if (a->reduction != MINIKD_NONE)
        *(real *)call->buffer[0] = (real)in_order(job.partial, n, job.grain);
    return MINIKD_DONE;
}

/* --- backward: dx = gradient · the upstream gradient --- */

/* dx = gradient·dloss, where dloss is one number, or one for each row with the reduction "none" */
static void row_loss_vjp_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    const real *dloss = call->buffer[1];
    const int64_t c = call->size[1];
    for (int64_t i = first; i < end; i++) {
        real *dx = (real *)call->buffer[0] + i * c;
        const real *gradient = (const real *)call->buffer[3] + i * c;
        const real factor = dloss[call->attribute.reduction == MINIKD_NONE ? i : 0];
        SIMD
        for (int64_t j = 0; j < c; j++)
            dx[j] = gradient[j] * factor;
    }
}

static int64_t row_loss_vjp(const minikd_call *call)
{
    if (call->buffer[0])
        minikd_parallel(row_loss_vjp_part, (void *)call, call->size[0], rows_of_range(call->size[0], call->size[1], 3, 0.3));
    return MINIKD_DONE;
}

/* dinput = gradient·dloss, where dloss is one number, or one for each element with the reduction "none" */
static int64_t kl_div_vjp(const minikd_call *call)
{
    real *dx = call->buffer[0];
    const real *dloss = call->buffer[1], *gradient = call->buffer[3];
    const int64_t n = call->size[0], c = call->size[1];
    if (call->attribute.reduction != MINIKD_NONE)
        return row_loss_vjp(call);
    SIMD
    for (int64_t k = 0; k < (dx ? n * c : 0); k++)
        dx[k] = gradient[k] * dloss[k];
    return MINIKD_DONE;
}
