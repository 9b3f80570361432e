/* Reads rows of @features@ raw features, separated by commas or blanks, and prints the class of each row, its name and
 * the probabilities of all classes.
 *
 *     cc -std=c99 -O2 -ffp-contract=off -o student main.c @source@
 *     ./student < rows.csv
 */

#include "@header@"

#include <stdio.h>

#ifndef ARDUINO /* a sketch has a main of its own */

/* Reads one row; 1 where there is one, 0 at the end, -1 where a row is no row. */
static int read_row(float *features)
{
    int i;
    for (i = 0; i < STUDENT_FEATURES; i++) {
        const int found = scanf(i == 0 ? "%f" : " , %f", &features[i]);
        if (found != 1) {
            return i == 0 && found == EOF ? 0 : -1;
        }
    }
    return 1;
}

int main(void)
{
    static float features[STUDENT_FEATURES];
    static float probabilities[STUDENT_CLASSES];
    int row, found;
    for (row = 1; (found = read_row(features)) > 0; row++) {
        const int status = student_probabilities(features, STUDENT_FEATURES, probabilities, STUDENT_CLASSES);
        const int class_id = student_class(features, STUDENT_FEATURES);
        int i;
        if (status != STUDENT_OK || class_id < 0) {
            fprintf(stderr, "row %d: error %d; a feature is NaN or infinite\n", row, status);
            return 1;
        }
        printf("%d,%s", class_id, student_class_name(class_id));
        for (i = 0; i < STUDENT_CLASSES; i++) {
            printf(",%.6f", (double)probabilities[i]);
        }
        printf("\n");
    }
    if (found < 0) {
        fprintf(stderr, "row %d: expected %d numbers, separated by commas\n", row, STUDENT_FEATURES);
        return 1;
    }
    return 0;
}

#endif
