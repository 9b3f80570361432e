int student_softmax(const float *logits, size_t n_logits, float *probabilities, size_t n_probabilities)
{
    float largest, total = 0.0f;
    size_t i;
    if (logits == NULL || probabilities == NULL) {
        return STUDENT_NULL;
    }
    if (n_logits != STUDENT_CLASSES || n_probabilities != STUDENT_CLASSES) {
        return STUDENT_LENGTH;
    }
    if (!all_finite(logits, STUDENT_CLASSES)) {
        return STUDENT_NOT_FINITE;
    }
    largest = logits[0];
    for (i = 1; i < STUDENT_CLASSES; i++) {
        largest = logits[i] > largest ? logits[i] : largest;
    }
    for (i = 0; i < STUDENT_CLASSES; i++) {
        probabilities[i] = exponential(logits[i] - largest, 0.0f);
        total += probabilities[i];
    }
    for (i = 0; i < STUDENT_CLASSES; i++) {
        probabilities[i] /= total;
    }
    return STUDENT_OK;
}

int student_probabilities(const float *features, size_t n_features, float *probabilities, size_t n_probabilities)
{
    const int status = student_predict(features, n_features, probabilities, n_probabilities);
    return status == STUDENT_OK ? student_softmax(probabilities, n_probabilities, probabilities, n_probabilities) : status;
}

const char *student_class_name(int class_id)
{
    return class_id < 0 || class_id >= STUDENT_CLASSES ? NULL : class_names[class_id];
}
