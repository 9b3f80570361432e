/* The losses: cross-entropy for hard and for soft targets, Kullback-Leibler divergence, and distillation.
 *
 * Each takes its logits' gradient in the same traversal as its value; backward only scales it by the upstream
 * gradient. Row losses are computed and added up in double. */

#include "rows.h"

/* --- what they share --- */

/* 1 + the first row whose label is neither a class nor ignore_index; MINIKD_DONE if there is none. */
static int64_t wrong_label(const int64_t *target, int64_t n, int64_t c, int64_t ignore_index)
{
    for (int64_t i = 0; i < n; i++)
        if (target[i] != ignore_index && (target[i] < 0 || target[i] >= c))
            return i + 1;
    return MINIKD_DONE;
}

/* What one row's loss and gradient are multiplied by under this reduction. */
static double row_scale(double divisor, enum minikd_reduction reduction)
{
    if (reduction == MINIKD_NONE || reduction == MINIKD_SUM)
        return 1;
    return divisor != 0 ? 1 / divisor : 0;
}

/* Σ of the row losses, or Σ / divisor (0 when the divisor is 0). */
static real reduced(double total, double divisor, enum minikd_reduction reduction)
{
    if (reduction == MINIKD_SUM)
        return (real)total;
    return divisor != 0 ? (real)(total / divisor) : 0;
}

/* Σ of the losses of some rows, each of which is also written to loss unless that is NULL. */
static double add_rows(real *loss, const double *row, int64_t count)
{
    double total = 0;
    for (int64_t l = 0; l < count; l++) {
        total += row[l];
        if (loss)
            loss[l] = (real)row[l];
    }
    return total;
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

/* Σ_j w_j·ỹ_j */
static double label_sum(const smoothed_label *label, int64_t y)
{
    return label_peak(label, y) + label->base * label->weight_sum;
}

/* -Σ_j w_j·ỹ_j·log softmax(z)_j, given top = max z and log_total = log Σ exp(z - top). */
static double hard_loss(const smoothed_label *label, const real *z, int64_t y, int64_t c, real top, double log_total)
{
    const double peak = label_peak(label, y);
    double loss = log_total == log_total ? 0 : log_total; /* NaN in a row stays, whatever the weights */
    if (peak != 0)
        loss += peak * (log_total - ((double)z[y] - top));
    if (label->base != 0 && label->weight_sum != 0)
        loss += label->base * (label->weight_sum * log_total - weighted_shifts(z, label->weight, c, top));
    return loss;
}

/* gradient -= scale·w_j·ỹ_j: the second part of scale·(softmax(z)·Σ w·ỹ - w·ỹ). */
static void subtract_label(const smoothed_label *label, real *gradient, int64_t y, int64_t c, double scale)
{
    const real base = (real)(label->base * scale), *w = label->weight;
    if (base != 0)
        for (int64_t j = 0; j < c; j++)
            gradient[j] -= w ? base * w[j] : base;
    gradient[y] -= (real)(label_peak(label, y) * scale);
}

/* --- cross-entropy with integer labels --- */

/* The loss of one labelled row; dz = scale·(softmax(z)·Σ w·ỹ - w·ỹ), or NULL. */
static double cross_entropy_row(const smoothed_label *label, real *dz, const real *z, int64_t y, int64_t c,
                                double scale)
{
    const softening s = softened(1);
    const real top = maximum(z, c);
    const double total = weights(dz, z, c, &s, top);
    if (dz) {
        const real factor = (real)(label_sum(label, y) / total * scale);
        SIMD
        for (int64_t j = 0; j < c; j++)
            dz[j] *= factor;
        subtract_label(label, dz, y, c, scale);
    }
    return hard_loss(label, z, y, c, top, logarithm(total));
}

/* The same for `count` ≤ LANES narrow rows, of which those with ignore_index have loss and gradient 0. */
static void cross_entropy_tile(const smoothed_label *label, double *row, real *dz, const real *z, const int64_t *target,
                               int64_t ignore_index, int64_t c, int64_t count, double scale)
{
    const softening s = softened(1);
    real tile[NARROW * LANES], top[LANES], factor[LANES] = {0};
    double total[LANES], log_total[LANES];
    load_tile(tile, z, c, count);
    tile_maximum(top, tile, c);
    tile_weights(tile, total, tile, top, c, &s);
    SIMD
    for (int l = 0; l < LANES; l++)
        log_total[l] = logarithm(total[l]);
    for (int64_t l = 0; l < count; l++) {
        const int labelled = target[l] != ignore_index;
        row[l] = labelled ? hard_loss(label, z + l * c, target[l], c, top[l], log_total[l]) : 0;
        factor[l] = labelled ? (real)(label_sum(label, target[l]) / total[l] * scale) : 0;
    }
    if (!dz)
        return;
    for (int64_t j = 0; j < c; j++) {
        SIMD
        for (int l = 0; l < LANES; l++)
            tile[j * LANES + l] = factor[l] == 0 ? 0 : tile[j * LANES + l] * factor[l];
    }
    store_tile(dz, tile, c, count);
    for (int64_t l = 0; l < count; l++)
        if (target[l] != ignore_index)
            subtract_label(label, dz + l * c, target[l], c, scale);
}

/* loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·onehot(y) + e/C */
static int64_t cross_entropy(const minikd_call *call)
{
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z = call->buffer[2], *w = call->buffer[4];
    const int64_t *target = call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t wrong = wrong_label(target, n, c, a->ignore_index);
    if (wrong)
        return wrong;
    const smoothed_label label = smoothed(a->label_smoothing, w, c);
    double divisor = 0, total_loss = 0;
    for (int64_t i = 0; i < n; i++)
        if (target[i] != a->ignore_index)
            divisor += w ? w[target[i]] : 1;
    const double scale = row_scale(divisor, a->reduction);

    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t count = smaller(n - i, LANES);
        real *dz = gradient ? gradient + i * c : NULL;
        double row[LANES] = {0};
        if (c <= NARROW) {
            cross_entropy_tile(&label, row, dz, z + i * c, target + i, a->ignore_index, c, count, scale);
        } else {
            for (int64_t l = 0; l < count; l++, dz += dz ? c : 0)
                if (target[i + l] != a->ignore_index)
                    row[l] = cross_entropy_row(&label, dz, z + (i + l) * c, target[i + l], c, scale);
                else if (dz)
                    fill(dz, c, 0);
        }
        total_loss += add_rows(a->reduction == MINIKD_NONE ? loss + i : NULL, row, count);
    }
    if (a->reduction != MINIKD_NONE)
        *loss = reduced(total_loss, divisor, a->reduction);
    return MINIKD_DONE;
}

/* --- cross-entropy with class probabilities --- */

/* loss = -Σ_c w_c·ỹ_c·log softmax(z)_c;  dz = softmax(z)·Σ w·ỹ - w·ỹ;  ỹ = (1-e)·y + e/C */
static int64_t soft_cross_entropy(const minikd_call *call)
{
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z = call->buffer[2], *target = call->buffer[3], *w = call->buffer[4];
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    const real peak = (real)(1 - a->label_smoothing), base = (real)(a->label_smoothing / (double)c);
    const double scale = row_scale((double)n, a->reduction);
    const softening s = softened(1);
    real y[BLOCK], term[BLOCK];
    double total_loss = 0;

    for (int64_t i = 0; i < n; i++, z += c, target += c) {
        real *dz = gradient ? gradient + i * c : NULL;
        const real top = maximum(z, c);
        const double total = weights(dz, z, c, &s, top), log_total = logarithm(total);
        const real log_sum = (real)log_total;
        double row = log_total == log_total ? 0 : log_total, sum_y = 0;
        for (int64_t first = 0; first < c; first += BLOCK) {
            const int64_t count = block_size(c - first);
            const real *given = target + first, *logit = z + first, *weight = w ? w + first : NULL;
            SIMD
            for (int64_t j = 0; j < count; j++) {
                const real yj = (peak * given[j] + base) * (weight ? weight[j] : 1);
                const real minus_log_p = log_sum - (logit[j] - top);
                y[j] = yj;
                term[j] = yj == 0 ? 0 : yj * minus_log_p;
            }
            row += sum(term, count);
            sum_y += sum(y, count);
        }
        if (dz) {
            const real factor = (real)(sum_y / total * scale), real_scale = (real)scale;
            SIMD
            for (int64_t j = 0; j < c; j++)
                dz[j] = dz[j] * factor - (peak * target[j] + base) * (w ? w[j] : 1) * real_scale;
        }
        if (a->reduction == MINIKD_NONE)
            loss[i] = (real)row;
        total_loss += row;
    }
    if (a->reduction != MINIKD_NONE)
        *loss = reduced(total_loss, (double)n, a->reduction);
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
            const real qj = target[j], log_ratio = (real)(logarithm(qj) - input[j]);
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

/* loss = Σ q·(log q - input), 0 where q = 0;  dinput = -q */
static int64_t kl_div(const minikd_call *call)
{
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *input = call->buffer[2], *target = call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const int64_t n = call->size[0], c = call->size[1];
    const double divisor = (double)(a->reduction == MINIKD_MEAN ? n * c : n);
    const real scale = (real)row_scale(divisor, a->reduction);
    real unused[BLOCK];
    double total_loss = 0;
    for (int64_t first = 0; first < n * c; first += BLOCK) {
        const int64_t count = block_size(n * c - first);
        real *term = a->reduction == MINIKD_NONE ? loss + first : unused;
        kl_terms(term, gradient ? gradient + first : NULL, input + first, target + first, count, scale,
                 a->log_target);
        total_loss += sum(term, count);
    }
    if (a->reduction != MINIKD_NONE)
        *loss = reduced(total_loss, divisor, a->reduction);
    return MINIKD_DONE;
}

/* --- distillation --- */

/* (e^δ - 1 - δ) / δ² = 1/2! + δ/3! + δ²/4! + … for |δ| < NEAR, to the precision of real. */
#ifdef MINIKD_DOUBLE
#define NEAR 0.5
#else
#define NEAR 1.0f
#endif
INLINE real second_order(real delta)
{
#ifdef MINIKD_DOUBLE
    real s = 1 / 355687428096000.0;
    s = fused(s, delta, 1 / 20922789888000.0);
    s = fused(s, delta, 1 / 1307674368000.0);
    s = fused(s, delta, 1 / 87178291200.0);
    s = fused(s, delta, 1 / 6227020800.0);
    s = fused(s, delta, 1 / 479001600.0);
#else
    real s = 1 / 479001600.0f;
#endif
    s = fused(s, delta, (real)(1 / 39916800.0));
    s = fused(s, delta, (real)(1 / 3628800.0));
    s = fused(s, delta, (real)(1 / 362880.0));
    s = fused(s, delta, (real)(1 / 40320.0));
    s = fused(s, delta, (real)(1 / 5040.0));
    s = fused(s, delta, (real)(1 / 720.0));
    s = fused(s, delta, (real)(1 / 120.0));
    s = fused(s, delta, (real)(1 / 24.0));
    s = fused(s, delta, (real)(1 / 6.0));
    return fused(s, delta, (real)0.5);
}

/* What one row's soft term is computed with: p = weight·per_p, q = weight·per_q, and in two parts each
 * δ = log p - log q = (z_s - z_t)·inverse + shift. */
typedef struct {
    real per_p, per_q;
    real inverse, inverse_rest;
    real shift, shift_rest;
} soft_row;

INLINE soft_row soft_row_of(real top_s, real top_t, double total_p, double total_q, double log_of_sums,
                            double inverse_t)
{
    const double s = top_s, t = top_t, gap = s - t, lost = (s - (gap - (gap - s))) - (t + (gap - s));
    const double shift = log_of_sums - gap * inverse_t;
    soft_row row;
    row.per_p = (real)(1 / total_p);
    row.per_q = (real)(1 / total_q);
    row.inverse = (real)inverse_t;
    row.inverse_rest = (real)(inverse_t - row.inverse);
    row.shift = (real)shift;
    row.shift_rest = (real)((shift - row.shift) - lost * inverse_t);
    return row;
}

/* log p - log q, which is a small difference of large numbers where the soft labels agree: so the gap between the
 * logits is taken without rounding (Knuth's two-sum), and the rest of each part is carried along. */
INLINE real log_ratio(const soft_row *row, real z_s, real z_t)
{
    const real gap = z_s - z_t, back = gap - z_s;
    const real lost = (z_s - (gap - back)) - (z_t + back);
    const real rest = fused(gap, row->inverse_rest, fused(lost, row->inverse, row->shift_rest));
    const real rest_or_0 = gap - gap == 0 ? rest : 0; /* an infinite gap has none */
    return exact_product(gap, row->inverse, row->shift) + rest_or_0;
}

/* q·(e^δ - 1 - δ), whose sum is KL(q ‖ p) because Σp = Σq: no term is negative, nothing cancels when p ≈ q.
 * difference = p - q. Near δ = 0 both come from the series; where q = 0 both are p. */
INLINE real soft_term(const soft_row *row, real p_weight, real q_weight, real z_s, real z_t, real *difference)
{
    const real p = p_weight * row->per_p, q = q_weight * row->per_q;
    const real delta = log_ratio(row, z_s, z_t), size = REAL(fabs)(delta);
    const real d = size < NEAR ? delta : 0, tail = d * d * second_order(d);
    const real series = q * (d + tail), direct = p - q, small = q * tail, large = direct - q * delta;
    *difference = q == 0 ? p : size < NEAR ? series : direct;
    return q == 0 ? p : size < NEAR ? small : large;
}

/* Higher temperatures are computed as this one: T²·KL and T·(p - q) have then reached their limits. */
#define LARGEST_TEMPERATURE 1e9

/* What all rows of one distillation loss have in common. */
typedef struct {
    int64_t c;
    double hard_scale, soft_scale; /* the weights, with the reduction's factor; T² in the soft one */
    real soft_factor;              /* of p - q in the gradient */
    double inverse_t;
    softening hard, soft; /* at 1 and at T */
    int doublings;        /* exp(z) = exp(z/T)^T is the weight at T squared so often; -1 if T is not 1, 2, 4 or 8 */
    smoothed_label label;
    real *p, *q; /* memory for one wide row each */
} distillation;

static int doublings_of(double t)
{
    return t == 1 ? 0 : t == 2 ? 1 : t == 4 ? 2 : t == 8 ? 3 : -1;
}

/* e = p^(2^doublings). In each of its calls doublings is a constant, so that the loop has no branch. */
INLINE void squared_by(real *e, const real *p, int64_t count, int doublings)
{
    SIMD
    for (int64_t j = 0; j < count; j++) {
        real ej = p[j];
        for (int k = 0; k < doublings; k++)
            ej *= ej;
        e[j] = ej;
    }
}

static void squared(real *e, const real *p, int64_t count, int doublings)
{
    switch (doublings) {
    case 0:
        squared_by(e, p, count, 0);
        break;
    case 1:
        squared_by(e, p, count, 1);
        break;
    case 2:
        squared_by(e, p, count, 2);
        break;
    default:
        squared_by(e, p, count, 3);
    }
}

/* The sums over a row of weights: Σ of the student's at T, of the teacher's at T, of the student's at 1, and
 * Σ q_weight·((z_t - top_t) - (z_s - top_s)). */
typedef struct {
    double p, q, e, apart;
} soft_sums;

/* The weights at T of at most BLOCK of a row, in p and q, and their sums. */
static void add_block(soft_sums *sums, real *p, real *q, const real *z_s, const real *z_t, int64_t count,
                      const distillation *d, real top_s, real top_t)
{
    const softening soft = d->soft;
    const row_softening of_s = softened_row(&soft, top_s), of_t = softened_row(&soft, top_t);
    real term[BLOCK];
    SIMD
    for (int64_t j = 0; j < count; j++) {
        const real pj = weight(&soft, &of_s, z_s[j]), qj = weight(&soft, &of_t, z_t[j]);
        const real apart = (z_t[j] - top_t) - (z_s[j] - top_s);
        p[j] = pj;
        q[j] = qj;
        term[j] = qj == 0 ? 0 : qj * apart;
    }
    sums->p += quick_sum(p, count);
    sums->q += quick_sum(q, count);
    sums->apart += quick_sum(term, count);
    if (d->doublings >= 0) {
        squared(term, p, count, d->doublings);
        sums->e += quick_sum(term, count);
    }
}

/* The weights of a wide row at T, student's and teacher's, in d->p and d->q, and their sums. */
static soft_sums soft_weights(const distillation *d, const real *z_s, const real *z_t, real top_s, real top_t)
{
    soft_sums sums = {0, 0, 0, 0};
    for (int64_t j = 0; j < d->c; j += BLOCK)
        add_block(&sums, d->p + j, d->q + j, z_s + j, z_t + j, block_size(d->c - j), d, top_s, top_t);
    return sums;
}

/* dz = dz·hard_factor + (p - q)·soft_factor */
static void combine(real *dz, const real *p, const real *q, int64_t count, const soft_row *row, real hard_factor,
                    real soft_factor)
{
    const real per_p = row->per_p, per_q = row->per_q;
    SIMD
    for (int64_t j = 0; j < count; j++)
        dz[j] = fused(p[j] * per_p - q[j] * per_q, soft_factor, dz[j] * hard_factor);
}

/* The same, with p - q taken without cancellation; returns KL(q ‖ p). */
static double combine_near(real *dz, const real *p, const real *q, const real *z_s, const real *z_t, int64_t count,
                           const soft_row *row, real hard_factor, real soft_factor)
{
    const soft_row fixed = *row;
    real term[BLOCK];
    SIMD
    for (int64_t j = 0; j < count; j++) {
        real difference;
        term[j] = soft_term(&fixed, p[j], q[j], z_s[j], z_t[j], &difference);
        dz[j] = fused(difference, soft_factor, dz[j] * hard_factor);
    }
    return quick_sum(term, count);
}

/* From here on KL(q ‖ p) of a row is taken as a difference of sums: cancellation costs it less than a millionth. */
#define FAR_APART 0.2

/* KL(q ‖ p) of one row;  dz = dz·hard_factor + (p - q)·soft_factor, unless dz is NULL.
 * Σ q·(log q - log p) = Σ q_weight·((z_t - top_t) - (z_s - top_s))/T / Σ q_weight - log(Σ q_weight / Σ p_weight) */
static double soft_loss(const distillation *d, real *dz, const real *z_s, const real *z_t, const soft_sums *sums,
                        real top_s, real top_t, real hard_factor)
{
    const double log_of_sums = logarithm(sums->q / sums->p);
    const double difference = sums->apart / sums->q * d->inverse_t - log_of_sums;
    const int near = difference < FAR_APART;
    if (!near && !dz)
        return difference;
    const soft_row row = soft_row_of(top_s, top_t, sums->p, sums->q, log_of_sums, d->inverse_t);
    double kl = 0;
    real unused[BLOCK] = {0};
    for (int64_t j = 0; j < d->c; j += BLOCK) {
        const int64_t count = block_size(d->c - j);
        const real *p = d->p + j, *q = d->q + j;
        real *out = dz ? dz + j : unused;
        if (dz && d->doublings >= 0)
            squared(out, p, count, d->doublings);
        if (near)
            kl += combine_near(out, p, q, z_s + j, z_t + j, count, &row, hard_factor, d->soft_factor);
        else
            combine(out, p, q, count, &row, hard_factor, d->soft_factor);
    }
    return !near ? difference : kl < 0 ? 0 : kl;
}

/* The loss of one row, whose label is y (-1 if it has none); dz is its gradient, or NULL. */
static double distillation_row(const distillation *d, real *dz, const real *z_s, const real *z_t, int64_t y)
{
    const int64_t c = d->c;
    const int is_soft = d->soft_scale != 0, is_hard = y >= 0;
    const real top_s = maximum(z_s, c), top_t = is_soft ? maximum(z_t, c) : 0;
    double loss = 0;
    real hard_factor = 0;
    soft_sums sums = {0, 0, 0, 0};
    if (is_soft)
        sums = soft_weights(d, z_s, z_t, top_s, top_t);
    if (is_hard) {
        const double total_e = is_soft && d->doublings >= 0 ? sums.e : weights(dz, z_s, c, &d->hard, top_s);
        loss += d->hard_scale * hard_loss(&d->label, z_s, y, c, top_s, logarithm(total_e));
        hard_factor = (real)(d->hard_scale * label_sum(&d->label, y) / total_e);
    } else if (dz) {
        fill(dz, c, 0);
    }
    if (is_soft)
        loss += d->soft_scale * soft_loss(d, dz, z_s, z_t, &sums, top_s, top_t, hard_factor);
    else if (dz)
        for (int64_t j = 0; j < c; j++)
            dz[j] *= hard_factor;
    if (is_hard && dz)
        subtract_label(&d->label, dz, y, c, d->hard_scale);
    return loss;
}

/* The same for `count` ≤ LANES narrow rows. */
static void distillation_tile(const distillation *d, double *loss, real *dz, const real *z_s, const real *z_t,
                              const int64_t *y, int64_t count)
{
    const int64_t c = d->c, size = c * LANES;
    const real soft_factor = d->soft_factor;
    real tile_s[NARROW * LANES], tile_t[NARROW * LANES], e[NARROW * LANES], p[NARROW * LANES], q[NARROW * LANES];
    real top_s[LANES], top_t[LANES], factor[LANES] = {0}, per_p[LANES], per_q[LANES], shift[LANES], shift_rest[LANES];
    double total_e[LANES] = {0}, total_p[LANES], total_q[LANES], log_e[LANES], kl[LANES] = {0};
    int labelled = 0;
    for (int64_t l = 0; l < count; l++)
        labelled |= y[l] >= 0;
    load_tile(tile_s, z_s, c, count);
    tile_maximum(top_s, tile_s, c);
    if (d->soft_scale != 0) {
        load_tile(tile_t, z_t, c, count);
        tile_maximum(top_t, tile_t, c);
        tile_weights(p, total_p, tile_s, top_s, c, &d->soft);
        tile_weights(q, total_q, tile_t, top_t, c, &d->soft);
    }
    if (labelled && d->soft_scale != 0 && d->doublings >= 0) {
        squared(e, p, size, d->doublings);
        tile_sums(total_e, e, c);
    } else if (labelled) {
        tile_weights(e, total_e, tile_s, top_s, c, &d->hard);
    } else {
        fill(e, size, 0);
    }
    SIMD
    for (int l = 0; l < LANES; l++)
        log_e[l] = labelled ? logarithm(total_e[l]) : 0;
    for (int64_t l = 0; l < count; l++) {
        const int has_label = y[l] >= 0;
        loss[l] = has_label ? d->hard_scale * hard_loss(&d->label, z_s + l * c, y[l], c, top_s[l], log_e[l]) : 0;
        factor[l] = has_label ? (real)(d->hard_scale * label_sum(&d->label, y[l]) / total_e[l]) : 0;
    }
    if (dz) {
        for (int64_t j = 0; j < size; j += LANES) {
            SIMD
            for (int l = 0; l < LANES; l++)
                e[j + l] = factor[l] == 0 ? 0 : e[j + l] * factor[l];
        }
    }
    if (d->soft_scale != 0) {
        const real inverse = (real)d->inverse_t, inverse_rest = (real)(d->inverse_t - inverse);
        SIMD
        for (int l = 0; l < LANES; l++) {
            const double log_of_sums = logarithm(total_q[l] / total_p[l]);
            const soft_row row = soft_row_of(top_s[l], top_t[l], total_p[l], total_q[l], log_of_sums, d->inverse_t);
            per_p[l] = row.per_p;
            per_q[l] = row.per_q;
            shift[l] = row.shift;
            shift_rest[l] = row.shift_rest;
        }
        for (int64_t j = 0; j < size; j += LANES) {
            SIMD
            for (int l = 0; l < LANES; l++) {
                const soft_row row = {per_p[l], per_q[l], inverse, inverse_rest, shift[l], shift_rest[l]};
                real difference;
                kl[l] += soft_term(&row, p[j + l], q[j + l], tile_s[j + l], tile_t[j + l], &difference);
                e[j + l] = fused(difference, soft_factor, e[j + l]);
            }
        }
        for (int64_t l = 0; l < count; l++)
            loss[l] += d->soft_scale * (kl[l] < 0 ? 0 : kl[l]);
    }
    if (!dz)
        return;
    store_tile(dz, e, c, count);
    for (int64_t l = 0; l < count; l++)
        if (y[l] >= 0)
            subtract_label(&d->label, dz + l * c, y[l], c, d->hard_scale);
}

/* loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p);  dz_s = hard·(softmax(z_s) - ỹ) + soft·T·(p - q);
 * p = softmax(z_s/T), q = softmax(z_t/T) */
static int64_t distillation_loss(const minikd_call *call)
{
    real *loss = call->buffer[0], *gradient = call->buffer[1];
    const real *z_s = call->buffer[2], *z_t = call->buffer[3];
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
    distillation d;
    d.c = c;
    d.hard_scale = hard * row_scale((double)labelled, a->reduction);
    d.soft_scale = per_soft * (a->scale_t2 ? t * t : 1);
    d.inverse_t = inverse_temperature(t);
    d.soft_factor = (real)(per_soft * (a->scale_t2 ? t : d.inverse_t));
    d.hard = softened(1);
    d.soft = softened(d.inverse_t);
    d.doublings = labelled && hard != 0 ? doublings_of(t) : -1;
    d.label = smoothed(a->label_smoothing, NULL, c);
    real here[2 * STACK_ROW];
    d.p = scratch(here, 2 * STACK_ROW, 2 * c);
    if (!d.p)
        return MINIKD_NO_MEMORY;
    d.q = d.p + c;

    double total_loss = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t count = smaller(n - i, LANES);
        int64_t y[LANES];
        double row[LANES];
        for (int64_t l = 0; l < count; l++)
            y[l] = target && target[i + l] != a->ignore_index && d.hard_scale != 0 ? target[i + l] : -1;
        if (c <= NARROW)
            distillation_tile(&d, row, gradient ? gradient + i * c : NULL, z_s + i * c, z_t + i * c, y, count);
        for (int64_t l = 0; c > NARROW && l < count; l++) {
            const int64_t at = (i + l) * c;
            row[l] = distillation_row(&d, gradient ? gradient + at : NULL, z_s + at, z_t + at, y[l]);
        }
        total_loss += add_rows(a->reduction == MINIKD_NONE ? loss + i : NULL, row, count);
    }
    if (a->reduction != MINIKD_NONE)
        *loss = (real)total_loss;
    release(d.p, here);
    return MINIKD_DONE;
}

/* --- backward: dx = gradient · the upstream gradient --- */

/* dx = gradient·dloss, where dloss is one number, or one for each row with the reduction "none" */
static int64_t row_loss_vjp(const minikd_call *call)
{
    real *dx = call->buffer[0];
    const real *dloss = call->buffer[1], *gradient = call->buffer[3];
    const int64_t n = call->size[0], c = call->size[1];
    const int64_t by_row = call->attribute.reduction == MINIKD_NONE;
    for (int64_t i = 0; dx && i < n; i++, dx += c, gradient += c) {
        const real factor = dloss[by_row ? i : 0];
        SIMD
        for (int64_t j = 0; j < c; j++)
            dx[j] = gradient[j] * factor;
    }
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
