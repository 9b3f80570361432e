/* What the losses share: labels that are counted before the rows are computed, and row losses that become one. */
#ifndef MINIKD_LABELS_H
#define MINIKD_LABELS_H

#include "groups.h"

/* Whether a label is a class. */
INLINE bool is_class(whole y, whole c)
{
    return y >= 0 && y < c;
}

/* A block: how much all labelled rows weigh together, each 1 where `weight` is null. The first wrong label is noted. */
INLINE double labelled_weight(const Block &block, Refused *refused, whole call, const whole *target, const real *weight,
                              whole n, whole c, whole ignore_index)
{
    double total = 0;
    whole wrong = NOWHERE;
    for (whole i = threadIdx.x; target && i < n; i += blockDim.x) {
        const whole y = target[i];
        if (y == ignore_index)
            continue;
        if (is_class(y, c))
            total += weight ? (double)weight[y] : 1;
        else if (wrong == NOWHERE)
            wrong = i;
    }
    wrong = block.smallest(wrong);
    if (threadIdx.x == 0 && wrong != NOWHERE)
        refuse(refused, wrong, target[wrong], call);
    return block.sum(total);
}

/* A block: Σ x */
INLINE double sum_of(const Block &block, const real *x, whole count)
{
    double total = 0;
    for (whole j = threadIdx.x; j < count; j += blockDim.x)
        total += x[j];
    return block.sum(total);
}

/* What the rows' losses and gradients are multiplied by under a reduction. */
INLINE double scale_of(double divisor, int reduction)
{
    return reduction == NONE || reduction == SUM ? 1 : inverse_or_0(divisor);
}

/* The loss of a row: for itself, or for the sum that comes later. */
INLINE void put_loss(real *loss, double *row_loss, whole row, double value)
{
    if (row_loss)
        row_loss[row] = value;
    else
        loss[row] = (real)value;
}

#endif
