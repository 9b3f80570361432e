/* The BLAS that products may run in, if one was found. */
#ifndef MINIKD_BLAS_H
#define MINIKD_BLAS_H

#include "kernels.h"

typedef struct {
    minikd_gemm *sgemm, *dgemm; /* NULL where there is none */
    int integer_bits;
    _Bool always;
} minikd_blas;

extern minikd_blas minikd_blas_in_use;

#endif
