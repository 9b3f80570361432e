static void relu(float *x, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        x[i] = x[i] < 0.0f ? 0.0f : x[i];
    }
}

