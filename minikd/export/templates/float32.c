int student_predict(const float *features, size_t n_features, float *logits, size_t n_logits)
{
@buffers@    if (features == NULL || logits == NULL) {
        return STUDENT_NULL;
    }
    if (n_features != STUDENT_FEATURES || n_logits != STUDENT_CLASSES) {
        return STUDENT_LENGTH;
    }
    if (!all_finite(features, STUDENT_FEATURES)) {
        return STUDENT_NOT_FINITE;
    }
@steps@    return all_finite(logits, STUDENT_CLASSES) ? STUDENT_OK : STUDENT_NOT_FINITE;
}

int student_class(const float *features, size_t n_features)
{
    float logits[STUDENT_CLASSES];
    const int status = student_predict(features, n_features, logits, STUDENT_CLASSES);
    int best = 0, i;
    if (status != STUDENT_OK) {
        return status;
    }
    for (i = 1; i < STUDENT_CLASSES; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

