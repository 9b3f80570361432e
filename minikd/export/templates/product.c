/* Eight outputs, whose sums stay in registers: each is its bias and then the products in the order of the inputs. */
static void eight_sums(const float *weight, const float *bias, const float *x, size_t k, size_t m, float *y)
{
    float a = bias[0], b = bias[1], c = bias[2], d = bias[3];
    float e = bias[4], f = bias[5], g = bias[6], h = bias[7];
    size_t i;
    for (i = 0; i < k; i++) {
        const float v = x[i];
        a += v * weight[0];
        b += v * weight[1];
        c += v * weight[2];
        d += v * weight[3];
        e += v * weight[4];
        f += v * weight[5];
        g += v * weight[6];
        h += v * weight[7];
        weight += m;
    }
    y[0] = a;
    y[1] = b;
    y[2] = c;
    y[3] = d;
    y[4] = e;
    y[5] = f;
    y[6] = g;
    y[7] = h;
}

/* y = weight x + bias, with m outputs of k inputs; the weights of one input lie side by side. The last eight outputs may
 * have some in common with the eight before: these come out the same again. */
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
    for (j = 0; j < m; j += 8) {
        const size_t first = m - j < 8 ? m - 8 : j;
        eight_sums(weight + first, bias + first, x, k, m, y + first);
    }
}

