/* What @header@ declares; written by minikd @version@. */

#include "@header@"

#if STUDENT_SEAL != @seal@
#error "this file and @header@ are of two exports: copy both files of one"
#endif
#if defined(__FAST_MATH__)
#error "compile this without -ffast-math: it looks for NaN, and rounds every operation"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

@tables@static int all_finite(const float *x, size_t n)
{
    int finite = 1;
    size_t i;
    for (i = 0; i < n; i++) {
        finite &= x[i] - x[i] == 0.0f;
    }
    return finite;
}

