static void sigmoid(float *x, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        const float e = exponential(x[i] < 0.0f ? x[i] : -x[i], 0.0f);
        x[i] = (x[i] < 0.0f ? e : 1.0f) / (1.0f + e);
    }
}

