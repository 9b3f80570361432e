#include "archive.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST_HEADER 100000000u /* the limit of the format's reference implementation */

#define SHOWN 60 /* bytes of a name that stand in a message */
#define NAME(text) (int)((text).length < SHOWN ? (text).length : SHOWN), (text).at

static uint64_t little_endian(const unsigned char *from, int bytes)
{
    uint64_t number = 0;
    for (int k = bytes - 1; k >= 0; k--)
        number = number << 8 | from[k];
    return number;
}

double minikd_number_of(const minikd_stored *tensor, int64_t k)
{
    if (tensor->is_double) {
        const uint64_t bits = little_endian(tensor->data + 8 * k, 8);
        double number;
        memcpy(&number, &bits, sizeof number);
        return number;
    }
    const uint32_t bits = (uint32_t)little_endian(tensor->data + 4 * k, 4);
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static int64_t width(const minikd_stored *tensor)
{
    return tensor->is_double ? 8 : 4;
}

/* --- the header --- */

/* Room for one more behind `count` items: `items`, or where these fill their memory (1, 2, 4, 8, … of them) another
 * place with twice as much. NULL if there is none; `items` is then still there. */
static void *room_for_one_more(void *items, size_t count, size_t size)
{
    if ((count & (count - 1)) != 0)
        return items;
    const size_t wanted = count ? 2 * count : 1;
    return wanted > SIZE_MAX / 2 / size ? NULL : realloc(items, wanted * size);
}

static minikd_error no_memory(minikd_report report)
{
    return minikd_refuse(report, MINIKD_ERROR_MEMORY, "there is not enough memory for the model");
}

static minikd_error no_json(minikd_report report)
{
    return minikd_refuse(report, MINIKD_ERROR_FORMAT,
                         "the header: expected a JSON table of tensors with dtype, shape and data_offsets");
}

static int read_shape(minikd_json *json, minikd_stored *tensor)
{
    int more;
    if (!minikd_json_sign(json, '['))
        return 0;
    for (tensor->axes = 0; (more = minikd_json_member(json, tensor->axes, ']')) > 0; tensor->axes++)
        if (tensor->axes == 2 || !minikd_json_whole(json, &tensor->shape[tensor->axes]))
            return 0;
    return more == 0 && tensor->axes > 0;
}

static int read_offsets(minikd_json *json, minikd_stored *tensor)
{
    return minikd_json_sign(json, '[') && minikd_json_whole(json, &tensor->start) && minikd_json_sign(json, ',')
           && minikd_json_whole(json, &tensor->end) && minikd_json_sign(json, ']');
}

static int read_dtype(minikd_json *json, minikd_stored *tensor)
{
    minikd_text dtype;
    if (!minikd_json_text(json, &dtype))
        return 0;
    tensor->is_double = minikd_text_is(dtype, "F64");
    return tensor->is_double || minikd_text_is(dtype, "F32");
}

/* {"dtype": …, "shape": …, "data_offsets": …}, each once, in any order */
static int read_tensor(minikd_json *json, minikd_stored *tensor)
{
    static const struct {
        const char *name;
        int (*read)(minikd_json *json, minikd_stored *tensor);
    } FIELDS[] = {{"dtype", read_dtype}, {"shape", read_shape}, {"data_offsets", read_offsets}};
    int more, found = 0;
    if (!minikd_json_sign(json, '{'))
        return 0;
    for (int64_t k = 0; (more = minikd_json_member(json, k, '}')) > 0; k++) {
        minikd_text name;
        int field = 0;
        if (!minikd_json_text(json, &name) || !minikd_json_sign(json, ':'))
            return 0;
        while (field < 3 && !minikd_text_is(name, FIELDS[field].name))
            field++;
        if (field == 3 || found & 1 << field || !FIELDS[field].read(json, tensor))
            return 0;
        found |= 1 << field;
    }
    return more == 0 && found == 7;
}

static minikd_error read_about(minikd_archive *archive, minikd_json *json, minikd_report report)
{
    int more;
    if (!minikd_json_sign(json, '{'))
        return no_json(report);
    for (int64_t k = 0; (more = minikd_json_member(json, k, '}')) > 0; k++) {
        minikd_about *about = room_for_one_more(archive->about, archive->about_count, sizeof *about);
        if (!about)
            return no_memory(report);
        archive->about = about;
        about += archive->about_count;
        if (!minikd_json_text(json, &about->name) || !minikd_json_sign(json, ':')
            || !minikd_json_text(json, &about->value))
            return minikd_refuse(report, MINIKD_ERROR_FORMAT, "__metadata__: expected a table of texts");
        archive->about_count++;
    }
    return more == 0 ? MINIKD_OK : no_json(report);
}

static minikd_error read_header(minikd_archive *archive, minikd_json *json, minikd_report report)
{
    int more, metadata = 0;
    if (!minikd_json_sign(json, '{'))
        return no_json(report);
    for (int64_t k = 0; (more = minikd_json_member(json, k, '}')) > 0; k++) {
        minikd_text name;
        if (!minikd_json_text(json, &name) || !minikd_json_sign(json, ':'))
            return no_json(report);
        if (minikd_text_is(name, "__metadata__")) {
            const minikd_error error = metadata++ ? no_json(report) : read_about(archive, json, report);
            if (error)
                return error;
            continue;
        }
        minikd_stored *tensors = room_for_one_more(archive->tensors, archive->tensor_count, sizeof *tensors);
        if (!tensors)
            return no_memory(report);
        archive->tensors = tensors;
        tensors += archive->tensor_count;
        *tensors = (minikd_stored){.name = name};
        if (!read_tensor(json, tensors))
            return minikd_refuse(report, MINIKD_ERROR_FORMAT,
                                 "%.*s: expected dtype F32 or F64, a shape of one or two axes, and two data_offsets",
                                 NAME(name));
        archive->tensor_count++;
    }
    return more == 0 && minikd_json_end(json) ? MINIKD_OK : no_json(report);
}

/* --- the data --- */

/* Whether it has as many bytes as its shape says. */
static int is_whole(const minikd_stored *tensor)
{
    int64_t numbers = 1;
    for (int k = 0; k < tensor->axes; k++) {
        if (tensor->shape[k] == 0)
            return tensor->end == tensor->start;
        if (numbers > INT64_MAX / 8 / tensor->shape[k])
            return 0;
        numbers *= tensor->shape[k];
    }
    return tensor->end - tensor->start == numbers * width(tensor);
}

/* Give each tensor its place in `data`. */
static minikd_error place_tensors(minikd_archive *archive, const unsigned char *data, size_t size, minikd_report report)
{
    int64_t position = 0;
    for (size_t k = 0; k < archive->tensor_count; k++) {
        minikd_stored *tensor = &archive->tensors[k];
        if (tensor->start != position || tensor->end < position || (uint64_t)tensor->end > size || !is_whole(tensor))
            return minikd_refuse(report, MINIKD_ERROR_FORMAT,
                                 "%.*s: expected a tensor that begins at byte %lld of %llu and is as long as its shape "
                                 "says, got bytes %lld to %lld",
                                 NAME(tensor->name), (long long)position, (unsigned long long)size,
                                 (long long)tensor->start, (long long)tensor->end);
        tensor->data = data + position;
        position = tensor->end;
    }
    if ((uint64_t)position != size)
        return minikd_refuse(report, MINIKD_ERROR_FORMAT, "the data: expected %lld bytes, as the header says, got %llu",
                             (long long)position, (unsigned long long)size);
    return MINIKD_OK;
}

static minikd_error check_finite(const minikd_archive *archive, minikd_report report)
{
    for (size_t k = 0; k < archive->tensor_count; k++) {
        const minikd_stored *tensor = &archive->tensors[k];
        const int64_t count = (tensor->end - tensor->start) / width(tensor);
        for (int64_t j = 0; j < count; j++)
            if (!isfinite(minikd_number_of(tensor, j)))
                return minikd_refuse(report, MINIKD_ERROR_FORMAT,
                                     "%.*s: expected finite numbers only, got NaN or infinity", NAME(tensor->name));
    }
    return MINIKD_OK;
}

/* --- names --- */

static int tensors_by_name(const void *a, const void *b)
{
    return minikd_text_order(((const minikd_stored *)a)->name, ((const minikd_stored *)b)->name);
}

static int about_by_name(const void *a, const void *b)
{
    return minikd_text_order(((const minikd_about *)a)->name, ((const minikd_about *)b)->name);
}

/* Sort items whose first field is their name; returns one that has the name of another, or NULL. */
static const minikd_text *sorted_with_double(void *items, size_t count, size_t size,
                                             int (*order)(const void *, const void *))
{
    if (count)
        qsort(items, count, size, order);
    for (size_t k = 1; k < count; k++) {
        const char *item = (const char *)items + k * size;
        if (order(item - size, item) == 0)
            return (const minikd_text *)(const void *)item;
    }
    return NULL;
}

static minikd_error sort_by_name(minikd_archive *archive, minikd_report report)
{
    const minikd_text *twice =
        sorted_with_double(archive->tensors, archive->tensor_count, sizeof *archive->tensors, tensors_by_name);
    if (!twice)
        twice = sorted_with_double(archive->about, archive->about_count, sizeof *archive->about, about_by_name);
    return twice ? minikd_refuse(report, MINIKD_ERROR_FORMAT, "the header: expected different names, got %.*s twice",
                                 NAME(*twice))
                 : MINIKD_OK;
}

minikd_stored *minikd_tensor_of(const minikd_archive *archive, minikd_text name)
{
    const minikd_stored wanted = {.name = name};
    if (!archive->tensor_count)
        return NULL;
    return bsearch(&wanted, archive->tensors, archive->tensor_count, sizeof wanted, tensors_by_name);
}

const minikd_text *minikd_about_of(const minikd_archive *archive, const char *name)
{
    const minikd_about wanted = {.name = minikd_text_of(name)};
    if (!archive->about_count)
        return NULL;
    const minikd_about *found = bsearch(&wanted, archive->about, archive->about_count, sizeof wanted, about_by_name);
    return found ? &found->value : NULL;
}

/* --- the whole --- */

minikd_error minikd_open_archive(minikd_archive *archive, const unsigned char *data, size_t size, minikd_report report)
{
    memset(archive, 0, sizeof *archive);
    if (size < 8)
        return minikd_refuse(report, MINIKD_ERROR_FORMAT, "the file: expected at least 8 bytes, got %d", (int)size);
    const uint64_t length = little_endian(data, 8);
    if (length > LARGEST_HEADER || length > size - 8)
        return minikd_refuse(report, MINIKD_ERROR_FORMAT,
                             "the header's length: expected at most the %llu bytes that follow, got %llu",
                             (unsigned long long)(size - 8), (unsigned long long)length);
    if (length == 0 || data[8] != '{')
        return no_json(report);
    archive->header = malloc((size_t)length);
    if (!archive->header)
        return no_memory(report);
    archive->head = 8 + (size_t)length;
    memcpy(archive->header, data + 8, (size_t)length);
    minikd_json json = {archive->header, archive->header + length};
    minikd_error error = read_header(archive, &json, report);
    if (!error)
        error = place_tensors(archive, data + archive->head, size - archive->head, report);
    if (!error)
        error = sort_by_name(archive, report);
    return error ? error : check_finite(archive, report);
}

void minikd_close_archive(minikd_archive *archive)
{
    free(archive->header);
    free(archive->tensors);
    free(archive->about);
    memset(archive, 0, sizeof *archive);
}
