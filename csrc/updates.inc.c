/* Optimizer steps: they read and write the parameters and their state; and what a step counts and sets. */

#include "elements.h"
#include "parallel.h"
#include "rows.h"

/* Nanoseconds that a parameter takes: measured for float with AVX-512 in the nearer caches; SQUARE_NS for both. */
#define SGD_NS (0.13 / 4 * sizeof(real))
#define ADAM_NS (0.31 / 4 * sizeof(real))
#define SQUARE_NS 0.10

static void sgd_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    real *w = call->buffer[0], *v = call->buffer[1];
    const real *g = call->buffer[2];
    const real rate = (real)*(const double *)call->buffer[3];
    const real momentum = (real)call->attribute.momentum, decay = (real)call->attribute.weight_decay;
    const int nesterov = call->attribute.nesterov;
    if (!v) {
        SIMD
        for (int64_t j = first; j < end; j++) {
            w[j] -= rate * decayed(g[j], w[j], decay);
        }
    } else {
        SIMD
        for (int64_t j = first; j < end; j++) {
            const real d = decayed(g[j], w[j], decay), vj = velocity(v[j], d, momentum);
            v[j] = vj;
            w[j] -= rate * step_of(vj, d, momentum, nesterov);
        }
    }
}

/* d = g + λ·w;  v = μ·v + d;  w -= lr·v  (Nesterov: lr·(d + μ·v); without v: lr·d) */
static int64_t sgd_step(const minikd_call *call)
{
    const int64_t k = call->size[0];
    minikd_parallel(sgd_part, (void *)call, k, minikd_grain(k, SGD_NS, LANES));
    return MINIKD_DONE;
}

static void adam_part(void *shared, int64_t first, int64_t end)
{
    const minikd_call *call = shared;
    real *w = call->buffer[0], *m = call->buffer[1], *v = call->buffer[2];
    const real *g = call->buffer[3];
    const double lr = *(const double *)call->buffer[4], t = (double)*(const int64_t *)call->buffer[5];
    const minikd_attributes *a = &call->attribute;
    const adam_rates rates = adam_rates_of(lr, t, a->beta1, a->beta2, a->eps, a->weight_decay, a->decoupled);
    SIMD
    for (int64_t j = first; j < end; j++)
        adam_element(&rates, w + j, m + j, v + j, g[j]);
}

/* m = β₁·m + (1-β₁)·g;  v = β₂·v + (1-β₂)·g²;  w -= lr·(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε);
 * decay: g += λ·w, or decoupled w -= lr·λ·w first */
static int64_t adam_step(const minikd_call *call)
{
    const int64_t k = call->size[0];
    minikd_parallel(adam_part, (void *)call, k, minikd_grain(k, ADAM_NS, LANES));
    return MINIKD_DONE;
}

/* What the squares of a gradient are added up from, and their sum in each range. */
typedef struct {
    const real *g;
    int64_t grain;
    double partial[MINIKD_RANGES];
} squares;

static void squares_part(void *shared, int64_t first, int64_t end)
{
    squares *job = shared;
    const real *g = job->g;
    const int64_t whole = end - (end - first) % LANES;
    double lane[LANES] = {0}, rest = 0;
    for (int64_t j = first; j < whole; j += LANES) {
        SIMD
        for (int l = 0; l < LANES; l++) {
            const double gl = g[j + l];
            lane[l] += gl * gl;
        }
    }
    for (int64_t j = whole; j < end; j++)
        rest += (double)g[j] * (double)g[j];
    job->partial[first / job->grain] = across(lane) + rest;
}

/* g *= min(1, limit / ‖g‖); a norm that is not finite scales nothing */
static int64_t clip_norm(const minikd_call *call)
{
    const int64_t k = call->size[0];
    squares job;
    job.g = call->buffer[0];
    job.grain = minikd_grain(k, SQUARE_NS, LANES);
    minikd_parallel(squares_part, &job, k, job.grain);
    const double norm = sqrt(in_order(job.partial, k, job.grain)), factor = call->attribute.limit / norm;
    if (norm > call->attribute.limit && norm <= DBL_MAX)
        return scaled(call->buffer[0], call->buffer[0], &factor, k);
    return MINIKD_DONE;
}

/* count += 1 */
static int64_t advance(const minikd_call *call)
{
    *(int64_t *)call->buffer[0] += 1;
    return MINIKD_DONE;
}

/* y = x, a number */
static int64_t set_scalar(const minikd_call *call)
{
    *(double *)call->buffer[0] = *(const double *)call->buffer[1];
    return MINIKD_DONE;
}
