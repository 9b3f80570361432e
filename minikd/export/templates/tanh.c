static void tangent(float *x, size_t n) /* hyperbolic */
{
    size_t i;
    for (i = 0; i < n; i++) {
        const float size = x[i] < 0.0f ? -x[i] : x[i];
        float y;
        if (size < @TANH_BEND@) {
            const float square = size * size;
            @horner y square TANH@
            y = size + size * (square * y);
        } else {
            const float e = exponential(-2.0f * size, 0.0f);
            y = 1.0f - 2.0f * e / (1.0f + e);
        }
        x[i] = x[i] < 0.0f ? -y : y;
    }
}

