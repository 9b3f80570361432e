/* A bias and an activation in one traversal; backward, the bias gradient in the same pass. */

#include "rows.h"

/* --- the activations f(u), and their derivatives in terms of y = f(u) or of u --- */

INLINE real identity(real u)
{
    return u;
}

INLINE real one(real y)
{
    (void)y;
    return 1;
}

/* max(u, 0) */
INLINE real relu(real u)
{
    return u <= 0 ? 0 : u;
}

/* [y > 0] */
INLINE real relu_slope(real y)
{
    return y > 0 ? 1 : 0;
}

/* tanh u = (1 - e^(-2|u|)) / (1 + e^(-2|u|)) with the sign of u */
INLINE real tanh_of(real u)
{
    const real fall = exponential_minus_one(-2 * REAL(fabs)(u));
    return REAL(copysign)(fall / (2 + fall), u);
}

/* 1 - y² */
INLINE real tanh_slope(real y)
{
    return 1 - y * y;
}

/* 1 / (1 + exp(-u)) */
INLINE real sigmoid(real u)
{
    const real e = exponential(-REAL(fabs)(u));
    return (u >= 0 ? 1 : e) / (1 + e);
}

/* y·(1 - y) */
INLINE real sigmoid_slope(real y)
{
    return y * (1 - y);
}

/* R(t), with Φ(-z) = exp(-z²/2)·R(t) / (z + 5) for z ≥ 0 and t = (z - 5)/(z + 5): the polynomial of
 * minikd.ops.elementwise, highest power first. float does without its last six terms. */
INLINE real normal_tail(real t)
{
#ifdef MINIKD_DOUBLE
    real r = (real)-8.166192624428987e-10;
    r = fused(r, t, (real)5.037302126379857e-10);
    r = fused(r, t, (real)9.446827519677366e-09);
    r = fused(r, t, (real)-5.015649939857857e-09);
    r = fused(r, t, (real)-6.782555313291156e-08);
    r = fused(r, t, (real)3.581840051543223e-08);
    r = fused(r, t, (real)4.340262594829775e-07);
#else
    real r = (real)4.340262594829775e-07;
#endif
    r = fused(r, t, (real)-3.310698071526862e-07);
    r = fused(r, t, (real)-2.769337871043854e-06);
    r = fused(r, t, (real)3.977912640593242e-06);
    r = fused(r, t, (real)1.6681099115863468e-05);
    r = fused(r, t, (real)-4.976177118979218e-05);
    r = fused(r, t, (real)-5.9375673286488655e-05);
    r = fused(r, t, (real)0.00054489883090093);
    r = fused(r, t, (real)-0.0007978694094808063);
    r = fused(r, t, (real)-0.00299337673822322);
    r = fused(r, t, (real)0.020795066800941616);
    r = fused(r, t, (real)-0.06911863870881432);
    r = fused(r, t, (real)0.16502036617034282);
    r = fused(r, t, (real)-0.3135331566712138);
    r = fused(r, t, (real)0.4953056159699768);
    r = fused(r, t, (real)-0.6653825028900577);
    r = fused(r, t, (real)0.769193049750063);
    return r;
}

/* exp(-u²/2), with u² taken to twice the precision of real */
INLINE real bell(real u)
{
    const real square = u * u, rest = exact_product(u, u, -square);
    return exponential((real)-0.5 * square) * fused((real)-0.5, rest, 1);
}

/* Φ(u) of the standard normal distribution, given bell(u); right to its last places at both ends */
INLINE real normal_cdf(real u, real bell_of_u)
{
    const real z = REAL(fabs)(u);
    const real tail = bell_of_u * normal_tail((z - 5) / (z + 5)) / (z + 5);
    return u > 0 ? 1 - tail : tail;
}

/* u held where Φ(u) is 0 or 1 and u² is finite; NaN stays */
INLINE real held(real u)
{
    return u < -40 ? -40 : u > 40 ? 40 : u;
}

/* u·Φ(u) */
INLINE real gelu(real u)
{
    const real h = held(u), cdf = normal_cdf(h, bell(h));
    return cdf == 0 ? 0 : u * cdf;
}

/* Φ(u) + u·φ(u) */
INLINE real gelu_slope(real u)
{
    const real h = held(u), bell_of_u = bell(h);
    return fused(h * bell_of_u, (real)0.3989422804014327, normal_cdf(h, bell_of_u));
}

/* --- the loops that they share --- */

/* u = x + b;  y = f(u).  y may be x. */
INLINE int64_t forward(real (*f)(real), const minikd_call *call)
{
    real *y = call->buffer[0];
    const real *x = call->buffer[1], *b = call->buffer[2];
    const int64_t n = call->size[0], m = call->size[1];
    for (int64_t i = 0; i < n; i++, x += m, y += m) {
        SIMD
        for (int64_t j = 0; j < m; j++)
            y[j] = f(x[j] + b[j]);
    }
    return MINIKD_DONE;
}

/* dx = dy·slope(v + b);  db = Σ_rows dx, in double.  v is y, with b = NULL, or x. dx and db may be NULL. */
INLINE int64_t backward(real (*slope)(real), const minikd_call *call, const real *v, const real *b)
{
    real *dx = call->buffer[0], *db = call->buffer[1];
    const real *dy = call->buffer[2];
    const int64_t n = call->size[0], m = call->size[1];
    for (int64_t first = 0; first < m; first += BLOCK) {
        const int64_t count = block_size(m - first);
        double total[BLOCK];
        real unused[BLOCK];
        for (int64_t j = 0; j < count; j++)
            total[j] = 0;
        for (int64_t at = first; at < n * m; at += m) {
            real *du = dx ? dx + at : unused;
            const real *dy_row = dy + at, *v_row = v + at, *b_row = b ? b + first : NULL;
            if (b) {
                SIMD
                for (int64_t j = 0; j < count; j++)
                    du[j] = dy_row[j] * slope(v_row[j] + b_row[j]);
            } else {
                SIMD
                for (int64_t j = 0; j < count; j++)
                    du[j] = dy_row[j] * slope(v_row[j]);
            }
            if (db) {
                SIMD
                for (int64_t j = 0; j < count; j++)
                    total[j] += du[j];
            }
        }
        if (db) {
            for (int64_t j = 0; j < count; j++)
                db[first + j] = (real)total[j];
        }
    }
    return MINIKD_DONE;
}

/* --- the kernels --- */

/* u = x + b;  y = u */
static int64_t bias(const minikd_call *call)
{
    return forward(identity, call);
}

/* dx = dy;  db = Σ_rows dx */
static int64_t bias_vjp(const minikd_call *call)
{
    return backward(one, call, call->buffer[2], NULL);
}

/* u = x + b;  y = max(u, 0) */
static int64_t bias_relu(const minikd_call *call)
{
    return forward(relu, call);
}

/* dx = dy·[y > 0];  db = Σ_rows dx */
static int64_t bias_relu_vjp(const minikd_call *call)
{
    return backward(relu_slope, call, call->buffer[3], NULL);
}

/* u = x + b;  y = tanh u */
static int64_t bias_tanh(const minikd_call *call)
{
    return forward(tanh_of, call);
}

/* dx = dy·(1 - y²);  db = Σ_rows dx */
static int64_t bias_tanh_vjp(const minikd_call *call)
{
    return backward(tanh_slope, call, call->buffer[3], NULL);
}

/* u = x + b;  y = 1 / (1 + exp(-u)) */
static int64_t bias_sigmoid(const minikd_call *call)
{
    return forward(sigmoid, call);
}

/* dx = dy·y·(1 - y);  db = Σ_rows dx */
static int64_t bias_sigmoid_vjp(const minikd_call *call)
{
    return backward(sigmoid_slope, call, call->buffer[3], NULL);
}

/* u = x + b;  y = u·Φ(u) */
static int64_t bias_gelu(const minikd_call *call)
{
    return forward(gelu, call);
}

/* dx = dy·(Φ(u) + u·φ(u));  db = Σ_rows dx */
static int64_t bias_gelu_vjp(const minikd_call *call)
{
    return backward(gelu_slope, call, call->buffer[4], call->buffer[5]);
}
