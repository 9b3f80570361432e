/* A trained classifier of @features@ features and @classes@ classes in plain C: C99, C++98 and later.
 *
 * Written by minikd @version@: @network@.
 *
 * Nothing here allocates, keeps a state, or calls a library, so all of it may run in several threads at once and in an
 * interrupt. Every function checks its pointers and lengths and says in its result what is wrong. What it writes must
 * not overlap with what it reads, except in student_softmax.
 *
@about@ */

#ifndef STUDENT_H
#define STUDENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STUDENT_FEATURES @features@
#define STUDENT_CLASSES @classes@

/* By this number student.h and student.c know that they are of one export. */
#define STUDENT_SEAL @seal@

/* What it takes, in bytes. Flash: the numbers below, the names of the classes, and an estimate of the code under -Os.
 * Cores without a float unit take their compiler's float routines besides.
 * RAM: what is kept between calls (on cores that copy constants to RAM, such as AVR, the constants count there too).
 * Stack: at most, of student_class, with the frames of the functions below it; sanitizers take more. */
#define STUDENT_CONSTANT_BYTES @constant_bytes@
#define STUDENT_CODE_BYTES @code_bytes@
#define STUDENT_FLASH_BYTES (STUDENT_CONSTANT_BYTES + STUDENT_CODE_BYTES)
#define STUDENT_RAM_BYTES @ram_bytes@
#define STUDENT_STACK_BYTES @stack_bytes@
#define STUDENT_MULTIPLY_ADDS @multiply_adds@

@scales@/* Results below 0 are errors. */
#define STUDENT_OK 0
#define STUDENT_NULL (-1)       /* a pointer is NULL */
#define STUDENT_LENGTH (-2)     /* a length is not STUDENT_FEATURES or STUDENT_CLASSES */
#define STUDENT_NOT_FINITE (-3) /* a feature is NaN or infinite, or a logit would be */

/* The logits of one sample's raw features, as they were before training scaled them. */
int student_predict(const float *features, size_t n_features, float *logits, size_t n_logits);

/* Class probabilities of one sample's raw features. */
int student_probabilities(const float *features, size_t n_features, float *probabilities, size_t n_probabilities);

/* The class of one sample's raw features, from 0 to STUDENT_CLASSES - 1: the first with the largest logit. */
int student_class(const float *features, size_t n_features);

/* Probabilities from logits; both may be the same array. */
int student_softmax(const float *logits, size_t n_logits, float *probabilities, size_t n_probabilities);

@more@/* The name of a class in UTF-8, or NULL if there is no such class. */
const char *student_class_name(int class_id);

#ifdef __cplusplus
}
#endif

#endif
