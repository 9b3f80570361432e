/* The distillation loss with its gradient: loss = hard·CE(y, z_s) + soft·T²·KL(q ‖ p), p = softmax(z_s/T), q =
 * softmax(z_t/T).
 *
 * A row is read once, by a warp into registers, or by a block into registers (the student's) and shared memory (the
 * teacher's), or by a block into shared memory; only what fits nowhere, of the longest rows, is read again from
 * memory. KL is a difference of sums where it is large, else a sum of terms that do not cancel, for which the row is gone
 * through once more. */

#include "labels.h"

/* What all rows of one call have in common. */
struct Common {
    double hard_scale, soft_scale; /* the weights, with the reduction's factor; T² in the soft one */
    double soft_factor;            /* of p - q in the gradient */
    double inverse_s, inverse_t;   /* 1/T of the student, and of the teacher: 1 for log-probabilities */
    real rate_s, rate_t;           /* the same, rounded */
    real rate_rest;                /* and what rounding the student's left */
    real ratio, lowest_t;          /* T_t/T_s; a z_t - top_t below it has probability 0 also in double */
    int has_soft;                          /* a weight of 0 leaves its loss out, infinite or broken as it may be */
    int same_temperature, one_temperature; /* of student and teacher; of the student and the hard loss */
};

/* A block: counts the labels, and works out what the rows have in common. Of a temperature that is none all becomes
 * NaN. */
extern "C" __global__ void __launch_bounds__(1024)
    distillation_before(Common *common, Refused *refused, whole call, const whole *target, NUMBER(double, temperature),
                        NUMBER(double, hard_weight), NUMBER(double, soft_weight), whole n, whole c, int reduction,
                        int scale_t2, int log_target, whole ignore_index)
{
    __shared__ Told told;
    const Block block(&told);
    const double labelled = labelled_weight(block, refused, call, target, nullptr, n, c, ignore_index);
    if (threadIdx.x != 0)
        return;
    const double given = GIVEN(temperature), nan = (double)NAN;
    const bool usable = usable_temperature(given);
    const double t = given < LARGEST_TEMPERATURE ? given : LARGEST_TEMPERATURE;
    const double per_soft = GIVEN(soft_weight) * scale_of((double)n, reduction);
    Common d;
    d.hard_scale = usable ? GIVEN(hard_weight) * scale_of(labelled, reduction) : nan;
    d.soft_scale = usable ? per_soft * (scale_t2 ? t * t : 1) : nan;
    d.inverse_s = usable ? inverse_temperature(t) : nan;
    d.inverse_t = log_target ? 1 : d.inverse_s;
    d.soft_factor = usable ? within_real(per_soft * (scale_t2 ? t : d.inverse_s)) : nan;
    d.rate_s = (real)d.inverse_s;
    d.rate_t = (real)d.inverse_t;
    d.rate_rest = (real)(d.inverse_s - d.rate_s);
    d.ratio = (real)(d.inverse_s / d.inverse_t);
    d.lowest_t = (real)within_real(LOWEST_LOGARITHM / d.inverse_t);
    d.has_soft = d.soft_scale != 0 || per_soft != 0; /* T² may be 0 where T is not */
    d.same_temperature = d.inverse_s == d.inverse_t;
    d.one_temperature = d.inverse_s == 1;
    *common = d;
}

#define PARAMETERS                                                                                                     \
    real *loss, double *row_loss, real *gradient, const real *student_logits, const real *teacher_logits,              \
        const whole *target, const Common *common, whole n, whole c, whole ignore_index, double label_smoothing
#define ARGUMENTS                                                                                                      \
    loss, row_loss, gradient, student_logits, teacher_logits, target, common, n, c, ignore_index, label_smoothing

/* What is found out about a row: p = weight·per_p, q = weight·per_q, what the student's weights at 1 are multiplied by
 * in the gradient, and what is added to (z_s - z_t)/T for log p - log q. */
struct Results {
    double loss, kl; /* the hard part; KL(q ‖ p) as a difference of sums */
    real per_p, per_q, per_e;
    real soft_p, soft_q; /* the first two times the gradient's factor */
    real shift, shift_rest;
};

template <class Group, class Layout, class Student, class Teacher>
static __device__ __forceinline__ void distillation_row(const Group &group, const Layout &layout, const Student &z_s,
                                                        const Teacher &z_t, whole row, PARAMETERS)
{
    (void)teacher_logits, (void)n;
    const Common &d = *common;
    const whole y = target ? target[row] : ignore_index;
    const bool labelled = y != ignore_index && d.hard_scale != 0, wrong = y != ignore_index && !is_class(y, c);
    const bool soft = d.has_soft != 0, one_temperature = d.one_temperature != 0, same = d.same_temperature != 0;
    const real rate_s = d.rate_s, rate_t = d.rate_t, ratio = d.ratio, lowest_t = d.lowest_t;
    const double base = labelled ? label_smoothing / (double)c : 0;
    const real top_s = labelled || soft ? maximum(group, layout, z_s) : (real)0;
    const real top_t = soft ? maximum(group, layout, z_t) : (real)0;

    /* Σ p, Σ q, Σ q·((z_t - top_t) - (z_s - top_s)·T_t/T_s) of the weights at T, Σ e of the student's at 1 */
    double p = 0, q = 0, apart = 0, e = 0, others = 0;
    real part_p = 0, part_q = 0, part_apart = 0;
    layout.each(
        [&](int k, int j) {
            const real below_s = labelled || soft ? z_s.at(k, j) - top_s : 0;
            const real pk = soft || one_temperature ? weight_of(below_s, rate_s) : 0;
            if (soft) {
                const real below_t = z_t.at(k, j) - top_t, qk = weight_of(below_t, rate_t);
                const real term = qk * fused(-ratio, below_s, below_t);
                part_p += pk;
                part_q += qk;
                part_apart += below_t < lowest_t ? 0 : term;
            }
            if (labelled) /* in double: beside the top's own weight, which is 1, the others would be lost */
                e += one_temperature ? pk : weight_of(below_s, 1);
            if (base != 0)
                others += below_s;
        },
        [&] {
            p += part_p, q += part_q, apart += part_apart;
            part_p = part_q = part_apart = 0;
        });
    if (soft) {
        p = group.sum(p);
        q = group.sum(q);
        apart = group.sum(apart);
    }
    if (labelled)
        e = group.sum(e);
    if (base != 0)
        others = base * group.sum(others);

    const Results found = group.template once<Results>([&] {
        Results r = {0, 0, 0, 0, 0, 0, 0, 0, 0};
        if (labelled) {
            const double peak = wrong ? (double)NAN : 1 - label_smoothing, base_sum = base * (double)c;
            const double below_top = wrong || peak == 0 ? 0 : (double)top_s - student_logits[row * c + y];
            r.loss = hard_loss(peak, below_top, base_sum, others, logarithm(e)) * d.hard_scale;
            r.per_e = hard_factor(peak, base_sum, reciprocal(e), d.hard_scale);
        }
        if (wrong)
            r.loss = (double)NAN, r.per_e = (real)NAN;
        if (soft) {
            const double per_p = reciprocal(p), per_q = reciprocal(q), log_quotient = log_of_quotient(p, q, per_p);
            r.kl = kl_of_sums(apart, per_q, d.inverse_t, log_quotient);
            r.per_p = (real)per_p;
            r.per_q = (real)per_q;
            r.soft_p = (real)(d.soft_factor * per_p);
            r.soft_q = (real)(d.soft_factor * per_q);
            shift_of_row(top_s, top_t, log_quotient, d.inverse_s, same, &r.shift, &r.shift_rest);
        }
        return r;
    });

    double kl = found.kl;
    if (soft && kl < FAR_APART) {
        const real rate_rest = d.rate_rest;
        double near = 0;
        layout.each([&](int k, int j) {
            const real zs = z_s.at(k, j), zt = z_t.at(k, j), below_s = zs - top_s, below_t = zt - top_t;
            const real delta =
                same ? log_ratio_at_one_temperature(zs, zt, rate_s, rate_rest, found.shift, found.shift_rest)
                     : fused(below_s, rate_s, found.shift) - below_t;
            const real pk = weight_of(below_s, rate_s) * found.per_p, qk = weight_of(below_t, rate_t) * found.per_q;
            near += near_term(pk, qk, delta);
        });
        kl = nearer(kl, group.sum(near), found.shift);
    }
    if (group.rank() == 0)
        put_loss(loss, row_loss, row, soft ? found.loss + d.soft_scale * kl : found.loss);
    if (!gradient)
        return;
    const real base_share = (real)(base * d.hard_scale), peak_share = (real)((1 - label_smoothing) * d.hard_scale);
    layout.write(gradient + row * c, rows_aligned(gradient, c), [&](int k, int j) {
        const real below_s = labelled || soft ? z_s.at(k, j) - top_s : 0;
        const real pk = soft || one_temperature ? weight_of(below_s, rate_s) : 0;
        real g = soft ? soft_gradient(pk, weight_of(z_t.at(k, j) - top_t, rate_t), found.soft_p, found.soft_q) : 0;
        if (labelled || wrong) {
            g = fused(one_temperature ? pk : weight_of(below_s, 1), found.per_e, g);
            if (base_share != 0)
                g -= base_share;
            if (j == y)
                g -= peak_share;
        }
        return g;
    });
}

template <int ITEMS, int V> static __device__ __forceinline__ void distillation_warp(PARAMETERS)
{
    const whole row = row_of_warp(), at = row * c;
    if (row >= n)
        return;
    const Warp group;
    const Spread<Warp::size, ITEMS, V> layout(group.rank(), c);
    const InRegisters<ITEMS> z_s(layout, student_logits + at, rows_aligned(student_logits, c));
    const InRegisters<ITEMS> z_t(layout, teacher_logits + at, rows_aligned(teacher_logits, c));
    distillation_row(group, layout, z_s, z_t, row, ARGUMENTS);
}

#define WARP(items, v)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 1) distillation_warp_##items(PARAMETERS)                         \
    {                                                                                                                  \
        distillation_warp<items, v>(ARGUMENTS);                                                                        \
    }

WARP(1, 1)
WARP(4, PER_VECTOR)
WARP(16, PER_VECTOR)
#ifndef MINIKD_DOUBLE
WARP(32, PER_VECTOR)
#endif

#define THREADS 512 /* of the blocks that have a row each */

/* The student's row in registers, the teacher's in dynamic shared memory. */
template <int ITEMS> static __device__ __forceinline__ void distillation_block(Told *told, real *teacher, PARAMETERS)
{
    const whole row = blockIdx.x, at = row * c;
    const Block group(told);
    const Spread<THREADS, ITEMS, 1> layout(group.rank(), c);
    const InRegisters<ITEMS> z_s(layout, student_logits + at, false);
    const InMemory z_t(layout, teacher, teacher_logits + at);
    distillation_row(group, layout, z_s, z_t, row, ARGUMENTS);
}

#define BLOCK(items)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) distillation_block_##items(PARAMETERS)                    \
    {                                                                                                                  \
        extern __shared__ real teacher[];                                                                              \
        __shared__ Told told;                                                                                          \
        distillation_block<items>(&told, teacher, ARGUMENTS);                                                          \
    }

BLOCK(8)
#ifdef MINIKD_DOUBLE
BLOCK(16)
#else
BLOCK(24)
#endif

/* Both rows in dynamic shared memory. */
extern "C" __global__ void __launch_bounds__(THREADS, 1) distillation_shared(PARAMETERS)
{
    extern __shared__ real rows[];
    __shared__ Told told;
    const whole row = blockIdx.x, at = row * c;
    const Block group(&told);
    const Strided layout(group.rank(), THREADS, c);
    const InMemory z_s(layout, rows, student_logits + at), z_t(layout, rows + c, teacher_logits + at);
    distillation_row(group, layout, z_s, z_t, row, ARGUMENTS);
}

#ifdef MINIKD_DOUBLE
#define ITEMS_BESIDE 12
#else
#define ITEMS_BESIDE 24
#endif

/* Both rows in dynamic shared memory, but for the student's first classes, which are in registers. */
extern "C" __global__ void __launch_bounds__(THREADS, 1) distillation_both(PARAMETERS)
{
    extern __shared__ real rows[];
    __shared__ Told told;
    const whole row = blockIdx.x, at = row * c;
    const Block group(&told);
    const SpreadAndStrided<THREADS, ITEMS_BESIDE> layout(group.rank(), c);
    const InBoth<ITEMS_BESIDE> z_s(layout, rows + c, student_logits + at);
    const InMemory z_t(layout, rows, teacher_logits + at);
    distillation_row(group, layout, z_s, z_t, row, ARGUMENTS);
}

/* The teacher's row in dynamic shared memory, the student's where it is. */
extern "C" __global__ void __launch_bounds__(THREADS, 1) distillation_held(PARAMETERS)
{
    extern __shared__ real teacher[];
    __shared__ Told told;
    const whole row = blockIdx.x, at = row * c;
    const Block group(&told);
    const Strided layout(group.rank(), THREADS, c);
    const InMemory z_t(layout, teacher, teacher_logits + at);
    distillation_row(group, layout, InMemory(student_logits + at), z_t, row, ARGUMENTS);
}

/* Both rows where they are: maxima, sums and gradient are three passes over memory. */
extern "C" __global__ void __launch_bounds__(THREADS, 1) distillation_again(PARAMETERS)
{
    __shared__ Told told;
    const whole row = blockIdx.x, at = row * c;
    const Block group(&told);
    const Strided layout(group.rank(), THREADS, c);
    distillation_row(group, layout, InMemory(student_logits + at), InMemory(teacher_logits + at), row, ARGUMENTS);
}
