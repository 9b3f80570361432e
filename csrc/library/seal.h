/* The seal of a model file: the SHA-256 of its bytes, with 64 zeros in place of the seal itself. */
#ifndef MINIKD_SEAL_H
#define MINIKD_SEAL_H

#include "json.h"

#define MINIKD_SEAL_DIGITS 64

/* Whether `seal`, a text of the header, is that of a file of `size` bytes, of which the first `head` are the header
 * with its length in front. */
int minikd_seal_fits(minikd_text seal, const unsigned char *data, size_t head, size_t size);

/* Write what the seal of such a file must be in hexadecimal digits, where `seal` is the one that stands in it. */
void minikd_seal_of(char digits[MINIKD_SEAL_DIGITS], const char *seal, const unsigned char *data, size_t head,
                    size_t size);

#endif
