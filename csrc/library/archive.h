/* The safetensors format: eight bytes with the header's length, a JSON header, then the tensors' bytes. */
#ifndef MINIKD_ARCHIVE_H
#define MINIKD_ARCHIVE_H

#include "json.h"
#include "report.h"

/* A tensor as it lies in the file, little-endian. */
typedef struct {
    minikd_text name;
    int is_double; /* numbers of 8 bytes, else of 4 */
    int axes;      /* 1 or 2 */
    int64_t shape[2], start, end;
    const unsigned char *data;
    int is_taken; /* 0 until somebody sets it */
} minikd_stored;

/* A text of the metadata. */
typedef struct {
    minikd_text name, value;
} minikd_about;

/* What a file holds, both sorted by name. Names and texts lie in `header`, a copy; the tensors in the file's bytes. */
typedef struct {
    char *header;
    size_t head; /* bytes of the header in the file, with its length in front */
    minikd_stored *tensors;
    minikd_about *about;
    size_t tensor_count, about_count;
} minikd_archive;

/* Read the bytes of a file, whose tensors must be float32 or float64, be finite, and cover the data exactly, without
 * gaps or overlaps, in the order of the header. The archive is to be closed whatever this returns. */
minikd_error minikd_open_archive(minikd_archive *archive, const unsigned char *data, size_t size, minikd_report report);
void minikd_close_archive(minikd_archive *archive);

/* The tensor or the text of this name; NULL where there is none. */
minikd_stored *minikd_tensor_of(const minikd_archive *archive, minikd_text name);
const minikd_text *minikd_about_of(const minikd_archive *archive, const char *name);

/* Number k of a tensor. */
double minikd_number_of(const minikd_stored *tensor, int64_t k);

#endif
