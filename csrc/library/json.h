/* The JSON of model files, read from front to back: whoever reads says what must come next.
 *
 * There is no tree and no recursion, so nothing that a file says decides how deep or how large anything becomes.
 * RFC 8259 to the letter, for whole numbers, texts, and lists and tables of them. */
#ifndef MINIKD_JSON_H
#define MINIKD_JSON_H

#include <stddef.h>
#include <stdint.h>

/* What is left to be read. The bytes belong to the reader: texts are decoded in place. */
typedef struct {
    char *at, *end;
} minikd_json;

/* UTF-8 with a NUL at its end, which `length` does not count; it may have others within. */
typedef struct {
    char *at;
    size_t length;
} minikd_text;

/* Each of these passes over what it reads; 0 where something else comes. */
int minikd_json_sign(minikd_json *json, char sign);
int minikd_json_text(minikd_json *json, minikd_text *text);
int minikd_json_whole(minikd_json *json, int64_t *number); /* from 0 below 2^62 */
int minikd_json_end(minikd_json *json);

/* For each member of a list or table: 1 if one comes, which is then to be read; 0 behind the last, whose closing sign
 * is passed over; -1 where neither follows. `index`: how many were read before. */
int minikd_json_member(minikd_json *json, int64_t index, char closing);

/* A text as JSON of its own. */
minikd_json minikd_json_within(minikd_text text);

/* Letters as a text, and whether a text is these letters. */
minikd_text minikd_text_of(const char *letters);
int minikd_text_is(minikd_text text, const char *letters);

/* -1, 0 or 1 as the first is before, the same as or behind the second, byte by byte. */
int minikd_text_order(minikd_text a, minikd_text b);

#endif
