/* libminikd: predictions of a model that minikd saved, for programs in C and C++.
 *
 *     minikd_model *model;
 *     char message[256];
 *     if (minikd_load_file("student.safetensors", &model, message, sizeof message) != MINIKD_OK)
 *         return complain(message);
 *     int64_t class_id;
 *     minikd_predict(model, features, 1, &class_id);
 *     puts(minikd_class_name(model, class_id, NULL));
 *     minikd_free(model);
 *
 * A model never changes after it was loaded: any number of threads may use one at the same time, without locks. A call
 * runs on the thread that makes it, prints nothing, never ends the process, and keeps no pointer that it was given.
 * Nothing in a file is executed, and a file that is damaged, cut short or foreign is refused.
 *
 * Features are raw: what was learnt about their scale is in the file and is applied here.
 */
#ifndef MINIKD_H
#define MINIKD_H

#include <stddef.h>
#include <stdint.h>

#define MINIKD_VERSION "0.1.0"

#if defined(__GNUC__)
#define MINIKD_PUBLIC __attribute__((visibility("default")))
#else
#define MINIKD_PUBLIC
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What calls return. Numbers of later versions do not change; there may be more of them. */
typedef enum minikd_error {
    MINIKD_OK = 0,
    MINIKD_ERROR_ARGUMENT = 1, /* a pointer is NULL, a temperature is not above 0, MINIKD_CPU names no level */
    MINIKD_ERROR_FILE = 2,     /* the file cannot be opened or read */
    MINIKD_ERROR_FORMAT = 3,   /* it is not a whole and sound model file */
    MINIKD_ERROR_MEMORY = 4    /* there is not enough memory */
} minikd_error;

/* A model in memory. */
typedef struct minikd_model minikd_model;

/* The version of the library that runs; MINIKD_VERSION is that of this header. */
MINIKD_PUBLIC const char *minikd_version(void);

/* What an error means, in a few words; for a number that is none, words that say so. */
MINIKD_PUBLIC const char *minikd_error_text(minikd_error error);

/* --- models --- */

/* Load the model in a file that minikd.save, or a run of minikd, wrote.
 *
 * model: becomes the model, to be given to minikd_free later; NULL after an error.
 * message: becomes what is wrong and where, one line of UTF-8 of at most message_size bytes with the NUL at its end;
 * empty where all is well. It may be NULL, with a message_size of 0.
 *
 * The kernels are those for the best instructions that the processor has, or those that the environment variable
 * MINIKD_CPU names ("base", "v3", "v4"). */
MINIKD_PUBLIC minikd_error minikd_load_file(const char *path, minikd_model **model, char *message, size_t message_size);

/* The same for the `size` bytes of such a file, which are no longer needed when this returns. */
MINIKD_PUBLIC minikd_error minikd_load_memory(const void *data, size_t size, minikd_model **model, char *message,
                                              size_t message_size);

/* Give a model's memory back, when no call uses it any more; NULL is nothing. */
MINIKD_PUBLIC void minikd_free(minikd_model *model);

/* How many numbers a row of features has, and how many classes there are. */
MINIKD_PUBLIC int64_t minikd_feature_count(const minikd_model *model);
MINIKD_PUBLIC int64_t minikd_class_count(const minikd_model *model);

/* The name of class 0 … minikd_class_count - 1, in UTF-8 with a NUL at its end, which lives as long as the model: its
 * number in digits where the file has no names, NULL for a number that is no class. length: unless NULL, becomes the
 * bytes of the name without the NUL at its end; a name may have a NUL within. */
MINIKD_PUBLIC const char *minikd_class_name(const minikd_model *model, int64_t class_id, size_t *length);

/* --- predictions ---
 *
 * features: rows times minikd_feature_count numbers, one row after the other. Rows do not influence each other, nor do
 * they depend on how many come at a time. Output buffers belong to the caller, must not overlap the features, and are
 * as long as said below. A feature that is NaN or infinite is no error: what follows from it comes out. */

/* classes: `rows` numbers, for each row that of its largest logit; of equal ones the first. */
MINIKD_PUBLIC minikd_error minikd_predict(const minikd_model *model, const float *features, size_t rows,
                                          int64_t *classes);

/* logits: rows times minikd_class_count numbers, the raw scores of each row. */
MINIKD_PUBLIC minikd_error minikd_logits(const minikd_model *model, const float *features, size_t rows, float *logits);

/* probabilities: rows times minikd_class_count numbers, exp(logit / temperature) divided by their sum over the row.
 * temperature: above 0; 1 is usual, a higher one makes them more alike. */
MINIKD_PUBLIC minikd_error minikd_probabilities(const minikd_model *model, const float *features, size_t rows,
                                                double temperature, float *probabilities);

#ifdef __cplusplus
}
#endif

#endif
