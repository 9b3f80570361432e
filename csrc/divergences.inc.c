/* Divergences of softened rows beside KL(teacher ‖ student): reversed, mixed, decoupled by the target, standardised.
 *
 * p is the softened student, q the teacher. The weights of both, their sums and log p - log q are found as for the
 * distillation loss, whose functions (losses.inc.c) are used without labels. */

#include "rows.h"

/* --- what they share --- */

typedef struct divergence_job divergence_job;

/* The losses of `count` ≤ LANES rows and, unless dz is NULL, their gradients; `memory` are 4 rows of whole steps, for
 * wide rows. The labels y are -1 for none. */
typedef void divergence_rows(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                             const real *z_t, const int64_t *y, int64_t count);

/* What the rows of one call have in common, and the sum of the losses of each range of rows. */
struct divergence_job {
    const minikd_call *call;
    divergence_rows *rows;
    const int64_t *target; /* or NULL */
    distillation d;        /* without labels; soft_scale and soft_factor are those of the divergence */
    double teacher, student; /* of mixtures: teacher·KL(q ‖ m) + student·KL(p ‖ m) */
    double of_q, of_p;       /* with m = of_q·q + of_p·p */
    double alpha, beta;      /* of what is decoupled: the target against the others, and the others */
    double partial[MINIKD_RANGES];
    int64_t grain;
    char no_memory[MINIKD_RANGES];
};

static int64_t in_whole_steps(int64_t c)
{
    return (c + LANES - 1) / LANES * LANES;
}

static void divergence_part(void *shared, int64_t first, int64_t end)
{
    divergence_job *job = shared;
    const minikd_call *call = job->call;
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z_s = call->buffer[2], *z_t = call->buffer[3];
    const int64_t c = job->d.c;
    real here[4 * STACK_ROW] ALIGNED;
    real *memory = c <= NARROW ? here : scratch(here, 4 * STACK_ROW, 4 * in_whole_steps(c));
    if (!memory) {
        job->no_memory[first / job->grain] = 1;
        return;
    }
    double total = 0;
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t count = smaller(end - i, LANES), at = i * c;
        int64_t y[LANES];
        double losses[LANES] ALIGNED;
        labels_or_none(y, job->target ? job->target + i : NULL, count, call->attribute.ignore_index);
        job->rows(job, memory, losses, gradient ? gradient + at : NULL, z_s + at, z_t + at, y, count);
        total += add_rows(call->attribute.reduction == MINIKD_NONE ? loss + i : NULL, losses, count);
    }
    job->partial[first / job->grain] = total;
    release(memory, here);
    settled();
}

/* Run a job whose shares and labels are set, at a temperature that is usable: the mean is over `divisor` rows, and a row
 * takes ns_row + c·ns nanoseconds. */
static int64_t run_divergence(divergence_job *job, const minikd_call *call, divergence_rows *rows, double temperature,
                              double divisor, double ns_row, double ns)
{
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    const double t = temperature < LARGEST_TEMPERATURE ? temperature : LARGEST_TEMPERATURE;
    const double per_row = row_scale(divisor, a->reduction);
    distillation *d = &job->d;
    memset(d, 0, sizeof *d);
    d->c = c;
    d->soft_scale = per_row * (a->scale_t2 ? t * t : 1);
    d->inverse_s = d->inverse_t = inverse_temperature(t);
    d->soft_factor = within_real(per_row * (a->scale_t2 ? t : d->inverse_s));
    d->student = d->teacher = softened(d->inverse_s);
    d->lowest_t = (real)within_real(LOWEST_LOGARITHM / d->inverse_t);
    d->hard_weights = NO_LABELS;
    d->past_caches = too_large_for_caches(n * c);
    job->call = call;
    job->rows = rows;
    memset(job->no_memory, 0, sizeof job->no_memory);
    job->grain = rows_of_range(n, c, ns_row, ns);
    minikd_parallel(divergence_part, job, n, job->grain);
    if (memchr(job->no_memory, 1, sizeof job->no_memory))
        return MINIKD_NO_MEMORY;
    if (a->reduction != MINIKD_NONE)
        *(real *)call->buffer[0] = (real)in_order(job->partial, n, job->grain);
    return MINIKD_DONE;
}

/* to = from, one row of a gradient */
static void copy_gradient(real *to, const real *from, int64_t c, int past_caches)
{
    if (past_caches)
        copy_past_caches(to, from, c);
    else
        memcpy(to, from, (size_t)c * sizeof(real));
}

/* The steps of two wide rows, whose last, unfinished ones go to rest_s and rest_t. */
static score_steps wide_steps(const real *z_s, const real *z_t, real *rest_s, real *rest_t, int64_t c)
{
    const score_steps z = {z_s, z_t, c % LANES ? rest_s : NULL, rest_t, c / LANES};
    if (c % LANES) {
        load_rest(rest_s, z_s, c);
        load_rest(rest_t, z_t, c);
    }
    return z;
}

/* The weights p and q of LANES narrow rows, whose tiles z are, and their sums. */
static void tile_sums(row_sums *sums, real *p, real *q, const score_steps *z, const distillation *d)
{
    maxima(sums->top_s, z->s, d->c);
    maxima(sums->top_t, z->t, d->c);
    start_sums(sums);
    add_to_sums(sums, p, q, p, z, d);
}

/* The same of a wide row; in each lane stands what belongs to the whole row. */
static void wide_sums(row_sums *sums, real *p, real *q, const score_steps *z, const distillation *d)
{
    fill(sums->top_s, LANES, maximum(z->s, d->c));
    fill(sums->top_t, LANES, maximum(z->t, d->c));
    start_sums(sums);
    add_to_sums(sums, p, q, p, z, d);
    gather_sums(sums);
    for (int l = 1; l < LANES; l++) {
        sums->p[l] = sums->p[0];
        sums->q[l] = sums->q[0];
        sums->apart[l] = sums->apart[0];
    }
}

/* --- mixtures: reverse KL, Jensen-Shannon, skewed KL --- */

/* Which parts of teacher·KL(q ‖ m) + student·KL(p ‖ m) there are. Where there are both, they come with such weights that
 * teacher·of_p = student·of_q; without a mixture, m is q. */
enum parts { UNMIXED, OF_TEACHER, OF_STUDENT, OF_BOTH };

#define CLOSE ((real)1 / 3) /* |m - r| / (m + r) below which the terms of r are taken from a series */

/* artanh s = s + s³·tail(s²) for |s| < CLOSE: Chebyshev interpolations of tail, of a relative error below 2e-8 in float
 * and 4e-18 in double. */
INLINE real artanh_tail(real s2)
{
#ifdef MINIKD_DOUBLE
    real q = 0x1.401d3e65cdc48p-4;
    q = fused(q, s2, 0x1.32e0d25c9c761p-5);
    q = fused(q, s2, 0x1.bc37f0140c19ep-5);
    q = fused(q, s2, 0x1.e0a2d581ab68fp-5);
    q = fused(q, s2, 0x1.111abdc8abe16p-4);
    q = fused(q, s2, 0x1.3b13515f6f9efp-4);
    q = fused(q, s2, 0x1.745d19937b1fcp-4);
    q = fused(q, s2, 0x1.c71c71bedea97p-4);
    q = fused(q, s2, 0x1.2492492499d46p-3);
    q = fused(q, s2, 0x1.9999999999944p-3);
    return fused(q, s2, 0x1.5555555555555p-2);
#else
    real q = 0x1.dba26p-4f;
    q = fused(q, s2, 0x1.bc8cf8p-4f);
    q = fused(q, s2, 0x1.24c926p-3f);
    q = fused(q, s2, 0x1.9998d4p-3f);
    return fused(q, s2, 0x1.555556p-2f);
#endif
}

/* One r of q and p beside m: s = (m - r)/(m + r), gap = m - r, and log r. */
typedef struct {
    real r, gap, s, log_r;
} beside;

/* log(m/r) = 2·artanh s */
INLINE real log_of_ratio(const beside *b, real m)
{
    const real s2 = b->s * b->s, near = 2 * fused(b->s * s2, artanh_tail(s2), b->s), far = log_minus(m, b->log_r);
    return REAL(fabs)(b->s) < CLOSE ? near : far;
}

/* r·(x - log(1 + x)) with x = (m - r)/r, and m where r = 0. No term is negative, and nothing cancels where m ≈ r. */
INLINE real term_beside(const beside *b, real log_ratio)
{
    const real s2 = b->s * b->s, near = b->s * fused(-2 * (b->r * s2), artanh_tail(s2), b->gap);
    const real far = b->gap - b->r * log_ratio;
    return b->r == 0 ? b->gap : REAL(fabs)(b->s) < CLOSE ? near : far;
}

/* What the terms of LANES rows, or of one wide row in LANES parts, are computed with, and the mixture. */
typedef struct {
    near_rows near;
    real log_p[LANES], log_q[LANES], log_of_sums[LANES]; /* log Σ p and log Σ q of the weights, and log(Σ q / Σ p) */
    real teacher, student, of_q, of_p, against; /* against = teacher·of_p - student·of_q */
} ALIGNED mixed_rows;

static void mixed_rows_of(mixed_rows *rows, const row_sums *sums, const divergence_job *job)
{
    row_results results;
    SIMD
    for (int l = 0; l < LANES; l++) {
        const double per_p = reciprocal(sums->p[l]);
        rows->log_p[l] = (real)logarithm(sums->p[l]);
        rows->log_q[l] = (real)logarithm(sums->q[l]);
        results.log_of_sums[l] = logarithm(fused_double(sums->q[l] - sums->p[l], per_p, 1.0)); /* 0 if they agree */
    }
    near_rows_of(&rows->near, sums, &results, &job->d, LANES);
    for (int l = 0; l < LANES; l++)
        rows->log_of_sums[l] = (real)results.log_of_sums[l];
    rows->teacher = (real)job->teacher;
    rows->student = (real)job->student;
    rows->of_q = larger((real)job->of_q, REAL_TINY); /* so that m is 0 only where q and p are */
    rows->of_p = larger((real)job->of_p, REAL_TINY);
    rows->against = (real)(job->teacher * job->of_p - job->student * job->of_q);
}

/* log p - log q. Where one side's logits are far from the other's, and at temperatures next to 0, the parts of log_ratio
 * hold no digit of it; there it is taken from the scores below the largest. It is infinite only where a class is ruled out. */
INLINE real log_ratio_of(const mixed_rows *rows, int l, real z_s, real z_t, real below_s, real below_t)
{
    const real exact = log_ratio(&rows->near, l, z_s, z_t), shift = rows->near.shift[l];
    const real plain = fused(below_s - below_t, rows->near.inverse, rows->log_of_sums[l]);
    const real delta = REAL(fabs)(shift) < (real)FAR_SHIFT ? exact : plain;
    return delta > REAL_MAX && z_t >= -REAL_MAX ? REAL_MAX / 2 : delta;
}

/* kl += the terms of the divergence, slope += Σ p·r. The weights p become probabilities, q becomes r, which is ∂/∂p up to
 * a constant, and 0 where p = 0. */
INLINE void add_mixed_steps(double *kl, double *slope, real *p, real *q, const mixed_rows *rows, const row_sums *sums,
                            const score_steps *z, real lowest, enum parts parts)
{
    const score_steps scores = *z;
    const mixed_rows fixed = *rows;
    const real inverse = fixed.near.inverse;
    for (int64_t k = 0; k < all_steps(z); k++) {
        const int64_t j = k * LANES;
        const real *z_s = k < scores.whole ? scores.s + j : scores.rest_s;
        const real *z_t = k < scores.whole ? scores.t + j : scores.rest_t;
        SIMD
        for (int l = 0; l < LANES; l++) {
            const real zs = z_s[l], zt = z_t[l], below_s = zs - sums->top_s[l], below_t = zt - sums->top_t[l];
            const real pl = p[j + l] * fixed.near.per_p[l], ql = q[j + l] * fixed.near.per_q[l];
            const real delta = log_ratio_of(&fixed, l, zs, zt, below_s, below_t);
            const int close = REAL(fabs)(delta) < NEAR;
            real term, r;
            if (parts == UNMIXED) {
                /* p too small for real where the teacher rules a class out costs infinity all the same */
                const real ruled_out = zt == -(real)INFINITY && below_s >= lowest ? (real)INFINITY : ql;
                const real small = pl * (delta * delta * second_order(-delta)), large = (ql - pl) + pl * delta;
                term = fixed.student * (pl == 0 ? ruled_out : close ? small : large);
                r = fixed.student * delta;
            } else {
                const real grown = fused(delta * delta, second_order(delta), delta); /* e^δ - 1 */
                const real apart = close ? ql * grown : pl - ql;
                const real m = fused(fixed.of_q, ql, fixed.of_p * pl);
                const real to_q = fixed.of_p * apart, to_p = -fixed.of_q * apart;
                const real log_q = fused(below_t, inverse, -fixed.log_q[l]);
                const real log_p = fused(below_s, inverse, -fixed.log_p[l]);
                const beside q_m = {ql, to_q, to_q / (m + ql + REAL_TINY), log_q};
                const beside p_m = {pl, to_p, to_p / (m + pl + REAL_TINY), log_p};
                term = r = 0;
                if (parts != OF_STUDENT)
                    term = fixed.teacher * term_beside(&q_m, log_of_ratio(&q_m, m));
                if (parts != OF_BOTH)
                    r = fixed.against * to_q / (m + REAL_TINY);
                if (parts != OF_TEACHER) {
                    const real log_ratio_p = log_of_ratio(&p_m, m);
                    term += fixed.student * term_beside(&p_m, log_ratio_p);
                    r -= fixed.student * log_ratio_p;
                }
            }
            r = pl == 0 ? 0 : r;
            p[j + l] = pl;
            q[j + l] = r;
            kl[l] += term;
            slope[l] += pl * r;
        }
    }
}

static void add_mixed(double *kl, double *slope, real *p, real *q, const mixed_rows *rows, const row_sums *sums,
                      const score_steps *z, const divergence_job *job)
{
    const real lowest = job->d.lowest_t;
    if (job->of_p == 0)
        add_mixed_steps(kl, slope, p, q, rows, sums, z, lowest, UNMIXED);
    else if (job->student == 0)
        add_mixed_steps(kl, slope, p, q, rows, sums, z, lowest, OF_TEACHER);
    else if (job->teacher == 0)
        add_mixed_steps(kl, slope, p, q, rows, sums, z, lowest, OF_STUDENT);
    else
        add_mixed_steps(kl, slope, p, q, rows, sums, z, lowest, OF_BOTH);
}

/* dz = factor·p·(r - mean) */
static void centre_steps(real *dz, const real *p, const real *r, const real *mean, int64_t steps, real factor)
{
    for (int64_t j = 0; j < steps * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            dz[j + l] = factor * (p[j + l] * (r[j + l] - mean[l]));
    }
}

/* Σ p·r, or NaN of a row whose loss is infinite or NaN: it has no gradient. */
static real mean_slope(double kl, double slope)
{
    return kl <= DBL_MAX ? (real)slope : (real)NAN;
}

static void mixed_tile(const divergence_job *job, double *loss, real *dz, const real *z_s, const real *z_t,
                       int64_t count)
{
    const distillation *d = &job->d;
    real tile_s[NARROW * LANES] ALIGNED, tile_t[NARROW * LANES] ALIGNED;
    real p[NARROW * LANES] ALIGNED, q[NARROW * LANES] ALIGNED, mean[LANES] ALIGNED;
    double kl[LANES] ALIGNED = {0}, slope[LANES] ALIGNED = {0};
    row_sums sums;
    mixed_rows rows;
    load_tile(tile_s, z_s, d->c, count);
    load_tile(tile_t, z_t, d->c, count);
    const score_steps z = {tile_s, tile_t, NULL, NULL, d->c};
    tile_sums(&sums, p, q, &z, d);
    mixed_rows_of(&rows, &sums, job);
    add_mixed(kl, slope, p, q, &rows, &sums, &z, job);
    for (int l = 0; l < LANES; l++) {
        loss[l] = d->soft_scale * kl[l];
        mean[l] = mean_slope(kl[l], slope[l]);
    }
    if (!dz)
        return;
    centre_steps(p, p, q, mean, d->c, (real)d->soft_factor);
    store_tile(dz, p, d->c, count);
}

static void mixed_row(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s, const real *z_t)
{
    const distillation *d = &job->d;
    real *p = memory, *q = memory + in_whole_steps(d->c);
    real rest_s[LANES] ALIGNED, rest_t[LANES] ALIGNED, mean[LANES] ALIGNED;
    double kl[LANES] ALIGNED = {0}, slope[LANES] ALIGNED = {0};
    row_sums sums;
    mixed_rows rows;
    const score_steps z = wide_steps(z_s, z_t, rest_s, rest_t, d->c);
    wide_sums(&sums, p, q, &z, d);
    mixed_rows_of(&rows, &sums, job);
    add_mixed(kl, slope, p, q, &rows, &sums, &z, job);
    const double whole = across(kl);
    *loss = d->soft_scale * whole;
    if (!dz)
        return;
    fill(mean, LANES, mean_slope(whole, across(slope)));
    centre_steps(p, p, q, mean, all_steps(&z), (real)d->soft_factor);
    copy_gradient(dz, p, d->c, d->past_caches);
}

static void rows_of_mixture(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                            const real *z_t, const int64_t *y, int64_t count)
{
    const int64_t c = job->d.c;
    (void)y;
    if (c <= NARROW)
        mixed_tile(job, loss, dz, z_s, z_t, count);
    for (int64_t l = 0; c > NARROW && l < count; l++)
        mixed_row(job, memory, loss + l, dz ? dz + l * c : NULL, z_s + l * c, z_t + l * c);
}

/* weight·KL(q ‖ p): the distillation loss without labels */
static int64_t forward_kl(const minikd_call *call, double weight)
{
    double hard = 0;
    minikd_call forward = *call;
    forward.buffer[4] = NULL;
    forward.buffer[5] = call->buffer[4];
    forward.buffer[6] = &hard;
    forward.buffer[7] = &weight;
    forward.attribute.log_target = 0;
    forward.attribute.label_smoothing = 0;
    return distillation_loss(&forward);
}

/* teacher·KL(q ‖ m) + student·KL(p ‖ m) with m = of_q·q + of_p·p, whose shares add up to 1 */
static int64_t mixture(const minikd_call *call, double teacher, double student, double of_q, double of_p)
{
    const double temperature = *(const double *)call->buffer[4];
    divergence_job job;
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    if (of_q == 0)
        return forward_kl(call, teacher);
    if (of_p == 0 && student == 0) /* KL(q ‖ q) */
        return forward_kl(call, 0);
    job.target = NULL;
    job.teacher = teacher;
    job.student = student;
    job.of_q = of_q;
    job.of_p = of_p;
    return run_divergence(&job, call, rows_of_mixture, temperature, (double)call->size[0], 30, of_p == 0 ? 1.2 : 2.5);
}

/* loss = T²·KL(p ‖ q) = T²·Σ p·(log p - log q);  dz_s = T·p·((log p - log q) - KL);
 * p = softmax(z_s/T), q = softmax(z_t/T) */
static int64_t reverse_kl(const minikd_call *call)
{
    return mixture(call, 0, 1, 1, 0);
}

/* loss = T²·(β·KL(q ‖ m) + (1-β)·KL(p ‖ m)), over β·(1-β) if continuous;  m = β·q + (1-β)·p;
 * dz_s = T·p·(r - Σ p·r), r = (1-β)·log(p/m), or log(p/m)/β if continuous */
static int64_t jensen_shannon(const minikd_call *call)
{
    const double beta = *(const double *)call->buffer[5];
    if (!call->attribute.continuous)
        return mixture(call, beta, 1 - beta, beta, 1 - beta);
    if (beta < REAL_TINY) /* 1/β is more than real can hold, and the limit as near as it can tell */
        return mixture(call, 1, 0, 0, 1);
    return mixture(call, beta < 1 ? 1 / (1 - beta) : 0, 1 / beta, beta, 1 - beta);
}

/* loss = T²·KL(q ‖ m), m = α·q + (1-α)·p;  dz_s = T·p·(r - Σ p·r), r = -(1-α)·q/m;
 * reverse: loss = T²·KL(p ‖ m), m = (1-α)·q + α·p, r = log(p/m) + (1-α)·q/m */
static int64_t skewed_kl(const minikd_call *call)
{
    const double alpha = *(const double *)call->buffer[5];
    return call->attribute.reverse ? mixture(call, 0, 1, 1 - alpha, alpha) : mixture(call, 1, 0, alpha, 1 - alpha);
}

/* --- KL of rows that were changed before: decoupled by the target, and standardised --- */

/* KL(q ‖ p) of LANES narrow rows, or in the first lane that of a wide one, and what dz is computed with. */
static void soft_results(row_results *results, const row_sums *sums, const real *p, const real *q, const score_steps *z,
                         const distillation *d)
{
    const int64_t c = d->c, count = c <= NARROW ? LANES : 1;
    double none[LANES] ALIGNED, kl[LANES] ALIGNED = {0};
    int64_t y[LANES];
    near_rows near;
    labels_or_none(y, NULL, 0, 0);
    const int is_near = results_of(results, none, sums, d, z->s, y, count);
    for (int64_t l = count; l < LANES; l++) {
        results->per_p[l] = results->per_p[0];
        results->per_q[l] = results->per_q[0];
        results->log_of_sums[l] = results->log_of_sums[0];
    }
    if (!is_near)
        return;
    near_rows_of(&near, sums, results, d, LANES);
    add_near(kl, &near, sums, p, q, z);
    if (c > NARROW)
        kl[0] = across(kl);
    for (int64_t l = 0; l < count; l++)
        results->kl[l] = nearer(results->kl[l], kl[l], near.shift[l]);
}

/* --- decoupled by the target --- */

/* The choice between the target and all others: what is found out about it in each lane. */
typedef struct {
    double loss[LANES]; /* KL((q_y, 1-q_y) ‖ (p_y, 1-p_y)) */
    double move[LANES]; /* p_y - q_y */
} choices;

/* A choice of the probabilities `own` and `others`, and their logarithms. */
typedef struct {
    double own, others, log_own, log_others;
} choice;

/* Given the target's score, the largest of the others and Σ exp((z - top)/T) of them. A score of +∞ has no choice. */
INLINE choice choice_of(real score, real top, double total, const softening *s, double inverse)
{
    const real most = score > top ? score : top; /* NaN of top stays */
    const double own = weight(s, score - most), others = weight(s, top - most) * total, both = own + others;
    const double log_both = logarithm(both), none = score > REAL_MAX ? NAN : 0;
    const choice c = {own / both + none, others / both + none, ((double)score - most) * inverse - log_both + none,
                      ((double)top - most) * inverse + logarithm(total) - log_both + none};
    return c;
}

/* q·(e^δ - 1 - δ) with δ = log p - log q, p where q = 0, and infinity where p is 0 alone */
INLINE double choice_term(double p, double q, double delta)
{
    const double near = q * (delta * delta * (double)second_order((real)delta)), far = (p - q) - q * delta;
    return q == 0 ? p : fabs(delta) < NEAR ? near : far;
}

static void choices_of(choices *found, const row_sums *sums, const real *own_s, const real *own_t, const distillation *d)
{
    for (int l = 0; l < LANES; l++) {
        const choice p = choice_of(own_s[l], sums->top_s[l], sums->p[l], &d->student, d->inverse_s);
        const choice q = choice_of(own_t[l], sums->top_t[l], sums->q[l], &d->teacher, d->inverse_t);
        found->loss[l] = choice_term(p.own, q.own, p.log_own - q.log_own)
                         + choice_term(p.others, q.others, p.log_others - q.log_others);
        found->move[l] = p.own - q.own;
    }
}

static double weighted(double weight, double value)
{
    return weight == 0 ? 0 : weight * value;
}

/* The losses of LANES rows, 0 of those without a label; what p and q are multiplied by in the gradient of the others; and
 * the gradient of the targets themselves. */
static void decoupled_results(row_results *results, double *loss, real *own, const choices *found, const row_sums *sums,
                              const divergence_job *job, const int64_t *y, int64_t count)
{
    const distillation *d = &job->d;
    for (int64_t l = 0; l < count; l++) {
        const double row = weighted(job->alpha, found->loss[l]) + weighted(job->beta, results->kl[l]);
        const double move = weighted(job->alpha, found->move[l]), broken = row == row ? 0 : row;
        loss[l] = y[l] < 0 ? 0 : d->soft_scale * row;
        results->per_p[l] = (real)(d->soft_factor * ((job->beta - move) * reciprocal(sums->p[l]) + broken));
        results->per_q[l] = (real)(d->soft_factor * (job->beta * reciprocal(sums->q[l]) + broken));
        own[l] = (real)(d->soft_factor * (move + broken));
    }
}

static void decoupled_tile(const divergence_job *job, double *loss, real *dz, const real *z_s, const real *z_t,
                           const int64_t *y, int64_t count)
{
    const distillation *d = &job->d;
    real tile_s[NARROW * LANES] ALIGNED, tile_t[NARROW * LANES] ALIGNED;
    real p[NARROW * LANES] ALIGNED, q[NARROW * LANES] ALIGNED;
    real own_s[LANES] ALIGNED = {0}, own_t[LANES] ALIGNED = {0}, own[LANES] ALIGNED;
    row_sums sums;
    row_results results;
    choices found;
    load_tile(tile_s, z_s, d->c, count);
    load_tile(tile_t, z_t, d->c, count);
    for (int64_t l = 0; l < count; l++) {
        const int64_t at = (y[l] < 0 ? 0 : y[l]) * LANES + l;
        own_s[l] = tile_s[at];
        own_t[l] = tile_t[at];
        tile_s[at] = tile_t[at] = -(real)INFINITY;
    }
    const score_steps z = {tile_s, tile_t, NULL, NULL, d->c};
    tile_sums(&sums, p, q, &z, d);
    soft_results(&results, &sums, p, q, &z, d);
    choices_of(&found, &sums, own_s, own_t, d);
    decoupled_results(&results, loss, own, &found, &sums, job, y, LANES);
    if (!dz)
        return;
    combine(p, p, q, p, d->c, &results, NO_LABELS);
    for (int64_t l = 0; l < count; l++) {
        if (y[l] >= 0)
            p[y[l] * LANES + l] = own[l];
        for (int64_t j = 0; y[l] < 0 && j < d->c; j++)
            p[j * LANES + l] = 0;
    }
    store_tile(dz, p, d->c, count);
}

static void decoupled_row(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                          const real *z_t, int64_t y)
{
    const distillation *d = &job->d;
    const int64_t c = d->c, row = in_whole_steps(c);
    real *p = memory, *q = p + row, *others_s = q + row, *others_t = others_s + row;
    real rest_s[LANES] ALIGNED, rest_t[LANES] ALIGNED, own_s[LANES] ALIGNED, own_t[LANES] ALIGNED, own;
    row_sums sums;
    row_results results;
    choices found;
    *loss = 0;
    if (y < 0) {
        if (dz)
            fill(dz, c, 0);
        return;
    }
    memcpy(others_s, z_s, (size_t)c * sizeof(real));
    memcpy(others_t, z_t, (size_t)c * sizeof(real));
    others_s[y] = others_t[y] = -(real)INFINITY;
    fill(own_s, LANES, z_s[y]);
    fill(own_t, LANES, z_t[y]);
    const score_steps z = wide_steps(others_s, others_t, rest_s, rest_t, c);
    wide_sums(&sums, p, q, &z, d);
    soft_results(&results, &sums, p, q, &z, d);
    choices_of(&found, &sums, own_s, own_t, d);
    decoupled_results(&results, loss, &own, &found, &sums, job, &y, 1);
    if (!dz)
        return;
    fill(results.per_p, LANES, results.per_p[0]);
    fill(results.per_q, LANES, results.per_q[0]);
    combine(p, p, q, p, all_steps(&z), &results, NO_LABELS);
    p[y] = own;
    copy_gradient(dz, p, c, d->past_caches);
}

static void decoupled_rows(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                           const real *z_t, const int64_t *y, int64_t count)
{
    const int64_t c = job->d.c;
    if (c <= NARROW)
        decoupled_tile(job, loss, dz, z_s, z_t, y, count);
    for (int64_t l = 0; c > NARROW && l < count; l++)
        decoupled_row(job, memory, loss + l, dz ? dz + l * c : NULL, z_s + l * c, z_t + l * c, y[l]);
}

/* loss = α·T²·KL((q_y, 1-q_y) ‖ (p_y, 1-p_y)) + β·T²·KL(q̂ ‖ p̂);
 * p̂_j = p_j/(1-p_y), q̂_j = q_j/(1-q_y) for j ≠ y;
 * dz_s = α·T·(p_y - q_y) at y, else T·(β·(p̂ - q̂) - α·(p_y - q_y)·p̂) */
static int64_t decoupled_kd(const minikd_call *call)
{
    const double temperature = *(const double *)call->buffer[5];
    const int64_t n = call->size[0], c = call->size[1];
    divergence_job job;
    job.target = call->buffer[4];
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    const int64_t wrong = wrong_label(job.target, n, c, call->attribute.ignore_index);
    if (wrong)
        return wrong;
    int64_t labelled = 0;
    for (int64_t i = 0; i < n; i++)
        labelled += job.target[i] != call->attribute.ignore_index;
    job.alpha = *(const double *)call->buffer[6];
    job.beta = *(const double *)call->buffer[7];
    return run_divergence(&job, call, decoupled_rows, temperature, (double)labelled, 40, 1);
}

/* --- standardised --- */

/* What Z of each lane's student was made with: factor = 1/(σ + eps), along = (σ + eps)/((c - 1)·σ), 0 where σ is 0. */
typedef struct {
    double factor[LANES], along[LANES];
} standardised;

INLINE void standardised_by(standardised *s, int64_t l, double sum_of_squares, int64_t c, double eps)
{
    const double less = c > 1 ? (double)(c - 1) : 1, deviation = sqrt(sum_of_squares / less);
    s->factor[l] = 1 / (deviation + eps);
    s->along[l] = deviation == 0 ? 0 : (deviation + eps) / (less * deviation);
}

/* Z = (z - mean)/(σ + eps) of LANES narrow rows, in place.
 *
 * The mean is taken of the distances from a row's first score, so that equal scores have no deviation, however large
 * they are. */
static void standardise_tile(standardised *s, real *tile, int64_t c, double eps)
{
    double mean[LANES] ALIGNED = {0}, squares[LANES] ALIGNED = {0};
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            mean[l] += (double)tile[j * LANES + l] - (double)tile[l];
    }
    for (int l = 0; l < LANES; l++)
        mean[l] = tile[l] + mean[l] / (double)c;
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const double centred = tile[j * LANES + l] - mean[l];
            squares[l] += centred * centred;
        }
    }
    for (int l = 0; l < LANES; l++)
        standardised_by(s, l, squares[l], c, eps);
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] = (real)((tile[j * LANES + l] - mean[l]) * s->factor[l]);
    }
}

/* The same of a wide row, from z to Z; what it was made with goes to the first lane. */
static void standardise_row(standardised *s, real *standard, const real *z, int64_t c, double eps)
{
    const double first = z[0];
    double lane[LANES] ALIGNED = {0}, rest = 0;
    int64_t j = 0;
    for (; j + LANES <= c; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            lane[l] += z[j + l] - first;
    }
    for (; j < c; j++)
        rest += z[j] - first;
    const double mean = first + (across(lane) + rest) / (double)c;
    for (int l = 0; l < LANES; l++)
        lane[l] = 0;
    rest = 0;
    for (j = 0; j + LANES <= c; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const double centred = z[j + l] - mean;
            lane[l] += centred * centred;
        }
    }
    for (; j < c; j++)
        rest += (z[j] - mean) * (z[j] - mean);
    standardised_by(s, 0, across(lane) + rest, c, eps);
    const double factor = s->factor[0];
    SIMD
    for (int64_t k = 0; k < c; k++)
        standard[k] = (real)((z[k] - mean) * factor);
}

/* dz = factor·(g - mean g - Z·along·Σ g·Z) of LANES narrow rows; dz may be g. */
static void through_standard_tile(real *dz, const real *g, const real *standard, const standardised *s, int64_t c)
{
    double mean[LANES] ALIGNED = {0}, inner[LANES] ALIGNED = {0};
    real factor[LANES] ALIGNED, less[LANES] ALIGNED, along[LANES] ALIGNED;
    for (int64_t j = 0; j < c * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            mean[l] += g[j + l];
            inner[l] += (double)g[j + l] * standard[j + l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        factor[l] = (real)within_real(s->factor[l]);
        less[l] = (real)(mean[l] / (double)c);
        along[l] = (real)(inner[l] * s->along[l]);
    }
    for (int64_t j = 0; j < c * LANES; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            dz[j + l] = factor[l] * ((g[j + l] - less[l]) - standard[j + l] * along[l]);
    }
}

/* The same of a wide row. */
static void through_standard_row(real *dz, const real *g, const real *standard, const standardised *s, int64_t c)
{
    double lane[LANES] ALIGNED = {0}, rest = 0;
    int64_t j = 0;
    for (; j + LANES <= c; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++)
            lane[l] += (double)g[j + l] * standard[j + l];
    }
    for (; j < c; j++)
        rest += (double)g[j] * standard[j];
    const real less = (real)(sum(g, c) / (double)c), along = (real)((across(lane) + rest) * s->along[0]);
    const real factor = (real)within_real(s->factor[0]);
    SIMD
    for (int64_t k = 0; k < c; k++)
        dz[k] = factor * ((g[k] - less) - standard[k] * along);
}

static void standardised_tile(const divergence_job *job, double *loss, real *dz, const real *z_s, const real *z_t,
                              int64_t count)
{
    const distillation *d = &job->d;
    const double eps = job->call->attribute.eps;
    real tile_s[NARROW * LANES] ALIGNED, tile_t[NARROW * LANES] ALIGNED;
    real p[NARROW * LANES] ALIGNED, q[NARROW * LANES] ALIGNED;
    row_sums sums;
    row_results results;
    standardised student, teacher;
    load_tile(tile_s, z_s, d->c, count);
    load_tile(tile_t, z_t, d->c, count);
    standardise_tile(&student, tile_s, d->c, eps);
    standardise_tile(&teacher, tile_t, d->c, eps);
    const score_steps z = {tile_s, tile_t, NULL, NULL, d->c};
    tile_sums(&sums, p, q, &z, d);
    soft_results(&results, &sums, p, q, &z, d);
    for (int l = 0; l < LANES; l++)
        loss[l] = d->soft_scale * results.kl[l];
    if (!dz)
        return;
    combine(p, p, q, p, d->c, &results, NO_LABELS);
    through_standard_tile(p, p, tile_s, &student, d->c);
    store_tile(dz, p, d->c, count);
}

static void standardised_row(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                             const real *z_t)
{
    const distillation *d = &job->d;
    const int64_t c = d->c, row = in_whole_steps(c);
    const double eps = job->call->attribute.eps;
    real *p = memory, *q = p + row, *standard_s = q + row, *standard_t = standard_s + row;
    real rest_s[LANES] ALIGNED, rest_t[LANES] ALIGNED;
    row_sums sums;
    row_results results;
    standardised student, teacher;
    standardise_row(&student, standard_s, z_s, c, eps);
    standardise_row(&teacher, standard_t, z_t, c, eps);
    const score_steps z = wide_steps(standard_s, standard_t, rest_s, rest_t, c);
    wide_sums(&sums, p, q, &z, d);
    soft_results(&results, &sums, p, q, &z, d);
    *loss = d->soft_scale * results.kl[0];
    if (!dz)
        return;
    combine(p, p, q, p, all_steps(&z), &results, NO_LABELS);
    through_standard_row(d->past_caches ? p : dz, p, standard_s, &student, c);
    if (d->past_caches)
        copy_past_caches(dz, p, c);
}

static void standardised_rows(const divergence_job *job, real *memory, double *loss, real *dz, const real *z_s,
                              const real *z_t, const int64_t *y, int64_t count)
{
    const int64_t c = job->d.c;
    (void)y;
    if (c <= NARROW)
        standardised_tile(job, loss, dz, z_s, z_t, count);
    for (int64_t l = 0; c > NARROW && l < count; l++)
        standardised_row(job, memory, loss + l, dz ? dz + l * c : NULL, z_s + l * c, z_t + l * c);
}

/* loss = T²·KL(softmax(Z_t/T) ‖ softmax(Z_s/T)), Z = (z - mean z)/(σ + eps), σ² = Σ (z - mean z)²/(c-1);
 * dz_s = (g - mean g - Z_s·Σ g·Z_s·(σ + eps)/((c-1)·σ))/(σ + eps), g = T·(softmax(Z_s/T) - softmax(Z_t/T)) */
static int64_t standardised_kl(const minikd_call *call)
{
    const double temperature = *(const double *)call->buffer[4];
    divergence_job job;
    if (!usable_temperature(temperature))
        return MINIKD_BAD_TEMPERATURE;
    job.target = NULL;
    return run_divergence(&job, call, standardised_rows, temperature, (double)call->size[0], 30, 1.5);
}
