/* x * P(normal < x). The tail of the normal distribution is exp(-z * z / 2) times a quotient of polynomials, where z is
 * cut to a number whose square is exact. */
static void gelu(float *x, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        const float z = x[i] < 0.0f ? -x[i] : x[i];
        float tail = z - z;
        if (z < @FARTHEST@) {
            const float cut = (float)(int)(z * @CUTS@) / @CUTS@;
            const float bell = exponential(-0.5f * (cut * cut), -0.5f * ((z - cut) * (z + cut)));
            const float divisor = z + @TAIL_SHIFT@;
            const float t = (z - @TAIL_SHIFT@) / divisor;
            @horner tail t NORMAL_TAIL@
            tail = bell * tail / divisor;
        }
        x[i] = x[i] * (x[i] < 0.0f ? tail : 1.0f - tail);
    }
}

