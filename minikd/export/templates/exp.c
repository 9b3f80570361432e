/* exp(x + rest) for x <= 0 and rest from -0.06 to 0: 2^-n * exp(r), where |r| is about half of ln 2. */
static float exponential(float x, float rest)
{
    float y, r, halvings;
    int n;
    if (x < @LEAST_EXPONENT@) {
        return 0.0f;
    }
    if (x != x) {
        return x;
    }
    n = (int)(0.5f - x * @LOG2_E@);
    halvings = (float)n;
    r = (x + halvings * @LN2_HIGH@) + (halvings * @LN2_LOW@ + rest);
    @horner y r EXP@
    y = 1.0f + (r + r * r * y);
    if (n & 64) y *= 5.42101086e-20f;
    if (n & 32) y *= 2.32830644e-10f;
    if (n & 16) y *= 1.52587891e-05f;
    if (n & 8) y *= 0.00390625f;
    if (n & 4) y *= 0.0625f;
    if (n & 2) y *= 0.25f;
    if (n & 1) y *= 0.5f;
    return y;
}

