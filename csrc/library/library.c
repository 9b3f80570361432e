/* The functions of minikd.h. */

#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

#define LARGEST_FILE ((size_t)1 << 30) /* bytes; an endless one is not read for ever */

/* Rows that go through the network at a time: enough for the products, few enough for the caches, and so few of very
 * wide ones that they take little memory. No result depends on it. */
#define MOST_ROWS 512
#define MOST_NUMBERS ((int64_t)1 << 19)

const char *minikd_version(void)
{
    return MINIKD_VERSION;
}

const char *minikd_error_text(minikd_error error)
{
    switch (error) {
    case MINIKD_OK:
        return "all is well";
    case MINIKD_ERROR_ARGUMENT:
        return "an argument is not what it must be";
    case MINIKD_ERROR_FILE:
        return "the file cannot be read";
    case MINIKD_ERROR_FORMAT:
        return "the file is not a whole and sound model of minikd";
    case MINIKD_ERROR_MEMORY:
        return "there is not enough memory";
    }
    return "an error without a name";
}

/* --- models --- */

/* All that is left of a file; NULL if it cannot be read or there is no memory, which `error` then says. */
static unsigned char *rest_of(FILE *file, size_t *size, minikd_error *error)
{
    unsigned char *data = NULL;
    size_t room = 0;
    for (*size = 0; *size == room && room < LARGEST_FILE;) {
        room = room ? 2 * room : (size_t)1 << 16;
        unsigned char *larger = realloc(data, room);
        if (!larger) {
            *error = MINIKD_ERROR_MEMORY;
            break;
        }
        data = larger;
        *size += fread(data + *size, 1, room - *size, file);
    }
    if (ferror(file) || (*size == room && room >= LARGEST_FILE))
        *error = MINIKD_ERROR_FILE;
    if (*error != MINIKD_OK) {
        free(data);
        return NULL;
    }
    return data;
}

minikd_error minikd_load_memory(const void *data, size_t size, minikd_model **model, char *message, size_t message_size)
{
    const minikd_report report = {message, message_size};
    if (message && message_size)
        *message = '\0';
    if (!model)
        return minikd_refuse(report, MINIKD_ERROR_ARGUMENT, "model: expected a place for it, got NULL");
    *model = NULL;
    if (!data)
        return minikd_refuse(report, MINIKD_ERROR_ARGUMENT, "data: expected the bytes of a file, got NULL");
    return minikd_read_model(model, data, size, report);
}

minikd_error minikd_load_file(const char *path, minikd_model **model, char *message, size_t message_size)
{
    const minikd_report report = {message, message_size};
    if (model)
        *model = NULL;
    if (!path)
        return minikd_refuse(report, MINIKD_ERROR_ARGUMENT, "path: expected the name of a file, got NULL");
    FILE *file = fopen(path, "rb");
    if (!file)
        return minikd_refuse(report, MINIKD_ERROR_FILE, "%s: expected a file that can be read", path);
    minikd_error error = MINIKD_OK;
    size_t size;
    unsigned char *data = rest_of(file, &size, &error);
    fclose(file);
    if (error != MINIKD_OK)
        return minikd_refuse(report, error, "%s: %s", path,
                             error == MINIKD_ERROR_FILE ? "expected a file of less than 1 GiB that can be read"
                                                        : "there is not enough memory for the file");
    error = minikd_load_memory(data, size, model, message, message_size);
    free(data);
    return error;
}

void minikd_free(minikd_model *model)
{
    if (!model)
        return;
    for (int64_t k = 0; model->layers && k < model->layer_count; k++) {
        free(model->layers[k].weight);
        free(model->layers[k].bias);
    }
    free(model->layers);
    free(model->mean);
    free(model->deviation);
    free(model->class_names);
    free(model->texts);
    free(model);
}

int64_t minikd_feature_count(const minikd_model *model)
{
    return model ? model->layers[0].inputs : 0;
}

int64_t minikd_class_count(const minikd_model *model)
{
    return model ? model->layers[model->layer_count - 1].outputs : 0;
}

const char *minikd_class_name(const minikd_model *model, int64_t class_id, size_t *length)
{
    if (class_id < 0 || class_id >= minikd_class_count(model)) {
        if (length)
            *length = 0;
        return NULL;
    }
    const minikd_text name = model->class_names[class_id];
    if (length)
        *length = name.length;
    return name.at;
}

/* --- predictions --- */

/* Some rows on their way, in two buffers that each layer's inputs and outputs take turns in. */
typedef struct {
    const minikd_model *model;
    int64_t rows;
    char *buffer[2];
    int turn; /* the buffer that is free */
} pass;

static void *next_buffer(pass *p)
{
    void *buffer = p->buffer[p->turn];
    p->turn = 1 - p->turn;
    return buffer;
}

/* The logits of rows of features, in one of the buffers; NULL if there is no memory. */
static void *logits_of(pass *p, const float *features)
{
    const minikd_model *model = p->model;
    const int64_t inputs = model->layers[0].inputs;
    void *at = (void *)features;
    int64_t status = MINIKD_DONE;
    if (model->is_double) {
        double *wide = next_buffer(p);
        for (int64_t k = 0; k < p->rows * inputs; k++)
            wide[k] = features[k];
        at = wide;
    }
    if (model->mean) {
        void *to = next_buffer(p);
        const minikd_call call = {model->standardise, {to, at, model->mean, model->deviation}, {p->rows, inputs}, {0}};
        status = minikd_run(&call, 1, NULL);
        at = to;
    }
    for (int64_t k = 0; status == MINIKD_DONE && k < model->layer_count; k++) {
        const minikd_layer *layer = &model->layers[k];
        void *to = next_buffer(p);
        void *const buffers[] = {to, NULL, at, layer->weight, layer->bias}; /* NULL for the product */
        minikd_call call = {layer->kernel, {to}, {p->rows, layer->inputs, layer->outputs}, {0}};
        if (layer->saves_product)
            memcpy(call.buffer, buffers, sizeof buffers);
        else
            memcpy(call.buffer + 1, buffers + 2, 3 * sizeof *buffers);
        status = minikd_run(&call, 1, NULL);
        at = to;
    }
    return status == MINIKD_DONE ? at : NULL;
}

/* Take what is wanted of the rows first, first + 1, … from their logits; `wanted` is the caller's. */
typedef minikd_error minikd_taker(pass *p, void *logits, size_t first, void *wanted);

#define LINE 64 /* bytes of a cache line, where buffers begin, so that no vector lies in two */

static size_t whole_lines(size_t bytes)
{
    return (bytes + LINE - 1) / LINE * LINE;
}

/* Send all rows through the network, some at a time. */
static minikd_error for_rows(const minikd_model *model, const float *features, size_t rows, minikd_taker *take,
                             void *wanted)
{
    const int64_t room = MOST_NUMBERS / model->widest, together = room < 1 ? 1 : room < MOST_ROWS ? room : MOST_ROWS;
    pass p = {model, rows < (size_t)together ? (int64_t)rows : together, {NULL, NULL}, 0};
    const size_t row = minikd_number_size(model) * (size_t)model->widest;
    minikd_error error = MINIKD_OK;
    if (rows == 0)
        return error;
    if ((size_t)p.rows > SIZE_MAX / 4 / row)
        return MINIKD_ERROR_MEMORY;
    const size_t size = whole_lines(row * (size_t)p.rows);
    char *memory = malloc(2 * size + LINE);
    if (!memory)
        return MINIKD_ERROR_MEMORY;
    p.buffer[0] = memory + (LINE - (uintptr_t)memory % LINE) % LINE;
    p.buffer[1] = p.buffer[0] + size;
    for (size_t first = 0; !error && first < rows; first += (size_t)p.rows) {
        if (rows - first < (size_t)p.rows)
            p.rows = (int64_t)(rows - first);
        void *logits = logits_of(&p, features + first * (size_t)model->layers[0].inputs);
        error = logits ? take(&p, logits, first, wanted) : MINIKD_ERROR_MEMORY;
    }
    free(memory);
    return error;
}

/* Copy rows of scores to those of the caller, whose row `first` is the first of them. */
static void hand_out(const pass *p, float *all, const void *scores, size_t first)
{
    const int64_t classes = minikd_class_count(p->model), count = p->rows * classes;
    float *to = all + first * (size_t)classes;
    for (int64_t k = 0; k < count; k++)
        to[k] = p->model->is_double ? (float)((const double *)scores)[k] : ((const float *)scores)[k];
}

static minikd_error take_logits(pass *p, void *logits, size_t first, void *wanted)
{
    hand_out(p, wanted, logits, first);
    return MINIKD_OK;
}

minikd_error minikd_logits(const minikd_model *model, const float *features, size_t rows, float *logits)
{
    if (!model || (rows && (!features || !logits)))
        return MINIKD_ERROR_ARGUMENT;
    return for_rows(model, features, rows, take_logits, logits);
}

static minikd_error take_classes(pass *p, void *logits, size_t first, void *wanted)
{
    const int64_t classes = minikd_class_count(p->model);
    const minikd_call call = {p->model->argmax, {(int64_t *)wanted + first, logits}, {p->rows, classes}, {0}};
    return minikd_run(&call, 1, NULL) == MINIKD_DONE ? MINIKD_OK : MINIKD_ERROR_MEMORY;
}

minikd_error minikd_predict(const minikd_model *model, const float *features, size_t rows, int64_t *classes)
{
    if (!model || (rows && (!features || !classes)))
        return MINIKD_ERROR_ARGUMENT;
    return for_rows(model, features, rows, take_classes, classes);
}

/* What minikd_probabilities wants. */
typedef struct {
    double temperature;
    float *probabilities;
} softened;

static minikd_error take_probabilities(pass *p, void *logits, size_t first, void *wanted)
{
    softened *s = wanted;
    void *to = next_buffer(p);
    const int64_t classes = minikd_class_count(p->model);
    const minikd_call call = {p->model->softmax, {to, logits, &s->temperature}, {p->rows, classes}, {0}};
    if (minikd_run(&call, 1, NULL) != MINIKD_DONE)
        return MINIKD_ERROR_MEMORY;
    hand_out(p, s->probabilities, to, first);
    return MINIKD_OK;
}

minikd_error minikd_probabilities(const minikd_model *model, const float *features, size_t rows, double temperature,
                                  float *probabilities)
{
    softened wanted = {temperature, probabilities};
    if (!model || !(temperature > 0 && temperature <= DBL_MAX) || (rows && (!features || !probabilities)))
        return MINIKD_ERROR_ARGUMENT;
    return for_rows(model, features, rows, take_probabilities, &wanted);
}
