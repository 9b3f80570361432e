/* Runs rows of raw float32 features from the standard input through the generated code: writes logits, probabilities and
 * class of each to the standard output, and the nanoseconds of one prediction to the standard error. */

#include "@header@"

#include <stdio.h>
#include <time.h>

#ifndef ROUNDS
#define ROUNDS 50 /* of which the fastest counts */
#endif
#define BURST 0.002 /* seconds of a round */

static double seconds(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

static double fastest(const float *features)
{
    static float logits[STUDENT_CLASSES];
    double best = 1.0;
    int round;
    for (round = 0; round < ROUNDS; round++) {
        const double start = seconds();
        double stop = start;
        long count = 0;
        while (stop - start < BURST) {
            int i;
            for (i = 0; i < 100; i++) {
                (void)student_predict(features, STUDENT_FEATURES, logits, STUDENT_CLASSES);
            }
            count += 100;
            stop = seconds();
        }
        best = (stop - start) / (double)count < best ? (stop - start) / (double)count : best;
    }
    return best;
}

int main(void)
{
    static float features[STUDENT_FEATURES], logits[STUDENT_CLASSES], probabilities[STUDENT_CLASSES];
    while (fread(features, sizeof(float), STUDENT_FEATURES, stdin) == STUDENT_FEATURES) {
        const int status = student_predict(features, STUDENT_FEATURES, logits, STUDENT_CLASSES);
        const float class_id = (float)student_class(features, STUDENT_FEATURES);
        if (status != STUDENT_OK
            || student_probabilities(features, STUDENT_FEATURES, probabilities, STUDENT_CLASSES) != STUDENT_OK) {
            return 2;
        }
        fwrite(logits, sizeof(float), STUDENT_CLASSES, stdout);
        fwrite(probabilities, sizeof(float), STUDENT_CLASSES, stdout);
        fwrite(&class_id, sizeof(float), 1, stdout);
    }
    fprintf(stderr, "%.1f\n", 1e9 * fastest(features));
    return 0;
}
