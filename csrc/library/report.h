/* How what is wrong is said: a code for programs, and a line for people. */
#ifndef MINIKD_REPORT_H
#define MINIKD_REPORT_H

#include "minikd.h"

/* The caller's buffer for that line; text is NULL or size 0 where nobody wants it. */
typedef struct {
    char *text;
    size_t size;
} minikd_report;

#ifdef __GNUC__
#define LIKE_PRINTF __attribute__((format(printf, 3, 4)))
#else
#define LIKE_PRINTF
#endif

/* Write the line, and return `error`. */
minikd_error minikd_refuse(minikd_report report, minikd_error error, const char *format, ...) LIKE_PRINTF;

#endif
