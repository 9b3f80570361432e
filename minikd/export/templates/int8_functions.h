/* One sample's raw features as int8. */
int student_quantise(const float *features, size_t n_features, int8_t *quantised, size_t n_quantised);

/* The int8 logits of one sample's int8 features; no float is touched. */
int student_predict_q(const int8_t *features, size_t n_features, int8_t *logits, size_t n_logits);

/* The class of one sample's int8 features; no float is touched. */
int student_class_q(const int8_t *features, size_t n_features);

