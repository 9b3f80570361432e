/* Sums of eight neighbouring outputs, which stay in registers: the bias and then the products in the order of the inputs.
 * An input is read as volatile, so that the loop stays as it is and has its sums side by side in vectors: what gcc -O3
 * may turn it into is six times slower. */
static void eight_sums(const float *weight, const float *bias, const float *x, size_t k, size_t m, float *y)
{
    float s0 = bias[0], s1 = bias[1], s2 = bias[2], s3 = bias[3];
    float s4 = bias[4], s5 = bias[5], s6 = bias[6], s7 = bias[7];
    size_t i;
    for (i = 0; i < k; i++) {
        const float v = *(const volatile float *)(x + i);
        const float *w = weight + i * m;
        s0 += v * w[0];
        s1 += v * w[1];
        s2 += v * w[2];
        s3 += v * w[3];
        s4 += v * w[4];
        s5 += v * w[5];
        s6 += v * w[6];
        s7 += v * w[7];
    }
    y[0] = s0;
    y[1] = s1;
    y[2] = s2;
    y[3] = s3;
    y[4] = s4;
    y[5] = s5;
    y[6] = s6;
    y[7] = s7;
}

/* The same of twice eight outputs, whose first ones are number p and number q: so one sum need not wait for another. */
static void sixteen_sums(
    const float *weight, const float *bias, const float *x, size_t k, size_t m, size_t p, size_t q, float *y)
{
    float s0 = bias[p], s1 = bias[p + 1], s2 = bias[p + 2], s3 = bias[p + 3];
    float s4 = bias[p + 4], s5 = bias[p + 5], s6 = bias[p + 6], s7 = bias[p + 7];
    float t0 = bias[q], t1 = bias[q + 1], t2 = bias[q + 2], t3 = bias[q + 3];
    float t4 = bias[q + 4], t5 = bias[q + 5], t6 = bias[q + 6], t7 = bias[q + 7];
    size_t i;
    for (i = 0; i < k; i++) {
        const float v = *(const volatile float *)(x + i);
        const float *left = weight + i * m + p, *right = weight + i * m + q;
        s0 += v * left[0];
        s1 += v * left[1];
        s2 += v * left[2];
        s3 += v * left[3];
        s4 += v * left[4];
        s5 += v * left[5];
        s6 += v * left[6];
        s7 += v * left[7];
        t0 += v * right[0];
        t1 += v * right[1];
        t2 += v * right[2];
        t3 += v * right[3];
        t4 += v * right[4];
        t5 += v * right[5];
        t6 += v * right[6];
        t7 += v * right[7];
    }
    y[p] = s0;
    y[p + 1] = s1;
    y[p + 2] = s2;
    y[p + 3] = s3;
    y[p + 4] = s4;
    y[p + 5] = s5;
    y[p + 6] = s6;
    y[p + 7] = s7;
    y[q] = t0;
    y[q + 1] = t1;
    y[q + 2] = t2;
    y[q + 3] = t3;
    y[q + 4] = t4;
    y[q + 5] = t5;
    y[q + 6] = t6;
    y[q + 7] = t7;
}

/* y = weight x + bias, with m outputs of k inputs; the weights of one input lie side by side. The last eight outputs may
 * have some in common with those before: these come out the same again. */
static void product(const float *weight, const float *bias, const float *x, size_t k, size_t m, float *y)
{
    size_t i, j;
    if (m < 8) {
        for (j = 0; j < m; j++) {
            float sum = bias[j];
            for (i = 0; i < k; i++) {
                sum += x[i] * weight[i * m + j];
            }
            y[j] = sum;
        }
        return;
    }
    for (j = 0; j < m; j += 16) {
        const size_t last = m - 8;
        if (last <= j) {
            eight_sums(weight + last, bias + last, x, k, m, y + last);
        } else {
            sixteen_sums(weight, bias, x, k, m, j, j + 8 < last ? j + 8 : last, y);
        }
    }
}

