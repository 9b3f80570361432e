/* Names the class of each row of features in a CSV file, and how probable it is.
 *
 *     example student.safetensors rows.csv
 *
 * A row is a line of numbers with commas between them; a first line of names and empty lines are passed over. */

#include <stdio.h>
#include <stdlib.h>

#include "minikd.h"

enum { LINE_SIZE = 1 << 20 };

/* Read `count` numbers with commas between them; 0 where something else stands there. */
static int read_row(const char *line, float *features, int64_t count)
{
    for (int64_t k = 0; k < count; k++) {
        char *end;
        features[k] = strtof(line, &end);
        while (*end == ' ' || *end == '\r' || *end == '\n')
            end++;
        if (end == line || *end != (k == count - 1 ? '\0' : ','))
            return 0;
        line = end + 1;
    }
    return 1;
}

static int is_empty(const char *line)
{
    while (*line == ' ' || *line == '\r' || *line == '\n')
        line++;
    return *line == '\0';
}

/* Print the class of one row; 0 if there is no memory. */
static int show(const minikd_model *model, const float *features, float *probabilities)
{
    int64_t class_id;
    if (minikd_predict(model, features, 1, &class_id) != MINIKD_OK
        || minikd_probabilities(model, features, 1, 1.0, probabilities) != MINIKD_OK)
        return 0;
    printf("%s %.4f\n", minikd_class_name(model, class_id, NULL), probabilities[class_id]);
    return 1;
}

static int show_rows(const minikd_model *model, FILE *rows, char *line, float *features, float *probabilities)
{
    for (long number = 1; fgets(line, LINE_SIZE, rows); number++) {
        if (is_empty(line))
            continue;
        if (read_row(line, features, minikd_feature_count(model))) {
            if (!show(model, features, probabilities))
                return EXIT_FAILURE;
        } else if (number > 1) {
            fprintf(stderr, "line %ld: expected %lld numbers with commas between them\n", number,
                    (long long)minikd_feature_count(model));
            return EXIT_FAILURE;
        }
    }
    return EXIT_SUCCESS;
}

int main(int count, char **arguments)
{
    minikd_model *model;
    char message[256];
    if (count != 3) {
        fprintf(stderr, "usage: %s MODEL.safetensors ROWS.csv\n", arguments[0]);
        return EXIT_FAILURE;
    }
    if (minikd_load_file(arguments[1], &model, message, sizeof message) != MINIKD_OK) {
        fprintf(stderr, "%s\n", message);
        return EXIT_FAILURE;
    }
    FILE *rows = fopen(arguments[2], "r");
    if (!rows)
        fprintf(stderr, "%s: expected a file that can be read\n", arguments[2]);
    char *line = malloc(LINE_SIZE);
    float *features = malloc((size_t)minikd_feature_count(model) * sizeof *features);
    float *probabilities = malloc((size_t)minikd_class_count(model) * sizeof *probabilities);
    const int ready = rows && line && features && probabilities;
    const int status = ready ? show_rows(model, rows, line, features, probabilities) : EXIT_FAILURE;
    free(line);
    free(features);
    free(probabilities);
    if (rows)
        fclose(rows);
    minikd_free(model);
    return status;
}
