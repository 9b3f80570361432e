#include "blas.h"

minikd_blas minikd_blas_in_use;

void minikd_use_blas(minikd_gemm *sgemm, minikd_gemm *dgemm, int integer_bits, _Bool always)
{
    const minikd_blas chosen = {sgemm, dgemm, integer_bits, always};
    minikd_blas_in_use = chosen;
}
