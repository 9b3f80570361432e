/* One layer: m outputs of k int8 inputs. */
typedef struct {
    const int8_t *weight;      /* (m, k) */
    const int32_t *bias;       /* (m), with what the inputs' zero point adds */
    const int32_t *multiplier; /* (m): an output's scale is multiplier * 2^-shift */
    const uint8_t *shift;      /* (m), from 1 to 62 */
    const int8_t *table;       /* (256): the activation's results, or NULL */
    size_t k, m;
    int zero, lowest; /* of the outputs before the table */
} student_layer;

/* sum * multiplier / 2^shift, to the nearest whole number and halves upwards, between lowest and 127 around zero. */
static int rescaled(const student_layer *layer, size_t j, int32_t sum)
{
    const int shift = layer->shift[j];
    const int64_t value = (int64_t)sum * layer->multiplier[j] + ((int64_t)1 << (shift - 1));
    const int64_t steps = value < 0 ? ~(~value >> shift) : value >> shift; /* towards minus infinity, both */
    if (steps < layer->lowest - layer->zero) {
        return layer->lowest;
    }
    return steps > 127 - layer->zero ? 127 : (int)steps + layer->zero;
}

static void run(const student_layer *layer, const int8_t *x, int8_t *y)
{
    const int8_t *weight = layer->weight;
    const size_t k = layer->k;
    size_t i, j, t;
    for (j = 0; j < layer->m; j++) {
        int32_t sum = 0;
        int result;
        for (i = 0; k - i >= 16; i += 16) { /* a number that compilers know, for vectors under -O2 */
            for (t = 0; t < 16; t++) {
                sum += x[i + t] * weight[i + t];
            }
        }
        for (; i < k; i++) {
            sum += x[i] * weight[i];
        }
        weight += k;
        result = rescaled(layer, j, sum + layer->bias[j]);
        y[j] = layer->table == NULL ? (int8_t)result : layer->table[result + 128];
    }
}

@layers@
/* The int8 of a scaled feature, halves to the even one. */
static int8_t to_int8(float x)
{
    const float steps = x / STUDENT_INPUT_SCALE;
    float rest;
    int whole;
    if (steps <= (float)(-128 - STUDENT_INPUT_ZERO)) {
        return -128;
    }
    if (steps >= (float)(127 - STUDENT_INPUT_ZERO)) {
        return 127;
    }
    whole = (int)steps;
    rest = steps - (float)whole;
    if (rest > 0.5f || (rest == 0.5f && whole % 2 != 0)) {
        whole++;
    } else if (rest < -0.5f || (rest == -0.5f && whole % 2 != 0)) {
        whole--;
    }
    return (int8_t)(whole + STUDENT_INPUT_ZERO);
}

int student_quantise(const float *features, size_t n_features, int8_t *quantised, size_t n_quantised)
{
    size_t i;
    if (features == NULL || quantised == NULL) {
        return STUDENT_NULL;
    }
    if (n_features != STUDENT_FEATURES || n_quantised != STUDENT_FEATURES) {
        return STUDENT_LENGTH;
    }
    if (!all_finite(features, STUDENT_FEATURES)) {
        return STUDENT_NOT_FINITE;
    }
    for (i = 0; i < STUDENT_FEATURES; i++) {
        quantised[i] = to_int8(@scaled@);
    }
    return STUDENT_OK;
}

int student_predict_q(const int8_t *features, size_t n_features, int8_t *logits, size_t n_logits)
{
@buffers@    if (features == NULL || logits == NULL) {
        return STUDENT_NULL;
    }
    if (n_features != STUDENT_FEATURES || n_logits != STUDENT_CLASSES) {
        return STUDENT_LENGTH;
    }
@steps@    return STUDENT_OK;
}

int student_class_q(const int8_t *features, size_t n_features)
{
    int8_t logits[STUDENT_CLASSES];
    const int status = student_predict_q(features, n_features, logits, STUDENT_CLASSES);
    int best = 0, i;
    if (status != STUDENT_OK) {
        return status;
    }
    for (i = 1; i < STUDENT_CLASSES; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

int student_predict(const float *features, size_t n_features, float *logits, size_t n_logits)
{
    int8_t quantised[STUDENT_FEATURES];
    int8_t result[STUDENT_CLASSES];
    int status = student_quantise(features, n_features, quantised, STUDENT_FEATURES);
    int i;
    if (status != STUDENT_OK) {
        return status;
    }
    if (logits == NULL) {
        return STUDENT_NULL;
    }
    if (n_logits != STUDENT_CLASSES) {
        return STUDENT_LENGTH;
    }
    status = student_predict_q(quantised, STUDENT_FEATURES, result, STUDENT_CLASSES);
    for (i = 0; i < STUDENT_CLASSES; i++) {
        logits[i] = (float)(result[i] - STUDENT_OUTPUT_ZERO) * STUDENT_OUTPUT_SCALE;
    }
    return status;
}

int student_class(const float *features, size_t n_features)
{
    int8_t quantised[STUDENT_FEATURES];
    const int status = student_quantise(features, n_features, quantised, STUDENT_FEATURES);
    return status == STUDENT_OK ? student_class_q(quantised, STUDENT_FEATURES) : status;
}

