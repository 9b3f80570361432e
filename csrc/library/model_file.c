/* From a file of `minikd.save` to a network: its texts say what there is, and its tensors must be exactly that.
 *
 * Every size is one that tensors of the file have before memory is taken for it. */

#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "archive.h"
#include "model.h"

/* What is known of a model while its file is read. */
typedef struct {
    minikd_archive archive;
    minikd_model *model;
    const char *activation; /* of the hidden layers, as in the names of kernels */
    int has_dropout, has_input_dropout;
    minikd_report report;
} reading;

static minikd_error no_memory(const reading *r)
{
    return minikd_refuse(r->report, MINIKD_ERROR_MEMORY, "there is not enough memory for the model");
}

/* `what` is wrong with the part `where` of the file. */
static minikd_error expected(const reading *r, const char *where, const char *what)
{
    return minikd_refuse(r->report, MINIKD_ERROR_FORMAT, "%s: expected %s", where, what);
}

size_t minikd_number_size(const minikd_model *model)
{
    return model->is_double ? sizeof(double) : sizeof(float);
}

/* Memory for `count` items, cleared; NULL if there is none. */
static void *room(int64_t count, size_t size)
{
    return (uint64_t)count > SIZE_MAX / size ? NULL : calloc((size_t)count, size);
}

/* --- numbers in texts --- */

/* Whether a text is a number from 0 below 1 as Python prints it, like 0.0, 0.25 and 1e-05; whether it is 0. */
static int is_share(minikd_text text, int *is_zero)
{
    const char *at = text.at;
    double value = 0, scale = 1;
    int digits = 0, exponent = 0, falls = 0;
    for (; *at >= '0' && *at <= '9'; at++, digits++)
        value = 10 * value + (*at - '0');
    if (*at == '.')
        for (at++; *at >= '0' && *at <= '9'; at++, digits++)
            value += (*at - '0') * (scale /= 10);
    if (digits && (*at == 'e' || *at == 'E')) {
        at++;
        falls = *at == '-';
        at += *at == '-' || *at == '+';
        for (digits = 0; *at >= '0' && *at <= '9'; at++, digits++)
            exponent = exponent < 10000 ? 10 * exponent + (*at - '0') : exponent;
    }
    for (; exponent > 0 && value > 0 && value <= DBL_MAX; exponent--)
        value = falls ? value / 10 : value * 10;
    *is_zero = value == 0;
    return digits > 0 && at == text.at + text.length && value < 1;
}

static int is_whole(minikd_text text)
{
    for (size_t k = 0; k < text.length; k++)
        if (text.at[k] < '0' || text.at[k] > '9')
            return 0;
    return text.length > 0;
}

/* --- what the texts say --- */

static minikd_error read_format(reading *r)
{
    const minikd_text *format = minikd_about_of(&r->archive, "format");
    const minikd_text *version = minikd_about_of(&r->archive, "format_version");
    if (!format || !version || !minikd_text_is(*format, "minikd"))
        return expected(r, "format", "a model of minikd");
    return minikd_text_is(*version, "1") ? MINIKD_OK : expected(r, "format_version", "version 1");
}

static minikd_error read_activation(reading *r)
{
    static const char *const KNOWN[] = {"relu", "gelu", "tanh", "sigmoid"};
    const minikd_text *activation = minikd_about_of(&r->archive, "activation");
    for (int k = 0; activation && k < 4; k++)
        if (minikd_text_is(*activation, KNOWN[k]))
            r->activation = KNOWN[k];
    return r->activation ? MINIKD_OK : expected(r, "activation", "relu, gelu, tanh or sigmoid");
}

/* How it was trained: dropout layers count when parameters are numbered. */
static minikd_error read_training(reading *r)
{
    const minikd_text *dropout = minikd_about_of(&r->archive, "dropout");
    const minikd_text *input_dropout = minikd_about_of(&r->archive, "input_dropout");
    const minikd_text *seed = minikd_about_of(&r->archive, "seed");
    int is_zero, is_zero_for_inputs;
    if (!dropout || !is_share(*dropout, &is_zero))
        return expected(r, "dropout", "a number from 0 below 1");
    if (!input_dropout || !is_share(*input_dropout, &is_zero_for_inputs))
        return expected(r, "input_dropout", "a number from 0 below 1");
    if (!seed || !is_whole(*seed))
        return expected(r, "seed", "a whole number from 0");
    r->has_dropout = !is_zero;
    r->has_input_dropout = !is_zero_for_inputs;
    return MINIKD_OK;
}

/* The layers, without their numbers, from the list of sizes: two tensors for each must be there. */
static minikd_error read_sizes(reading *r)
{
    static const char LIST[] = "a list of whole numbers above 0, two at least";
    const minikd_text *sizes = minikd_about_of(&r->archive, "sizes");
    minikd_model *model = r->model;
    const int64_t most = (int64_t)(r->archive.tensor_count / 2);
    int64_t size, before = 0, count = 0;
    int more;
    if (!sizes)
        return expected(r, "sizes", LIST);
    minikd_json json = minikd_json_within(*sizes);
    if (!minikd_json_sign(&json, '['))
        return expected(r, "sizes", LIST);
    model->layers = room(most + 1, sizeof *model->layers);
    if (!model->layers)
        return no_memory(r);
    for (; (more = minikd_json_member(&json, count, ']')) > 0; count++, before = size) {
        if (!minikd_json_whole(&json, &size) || size == 0)
            return expected(r, "sizes", LIST);
        if (count > most)
            return expected(r, "sizes", "no more layers than there are tensors for");
        if (count > 0)
            model->layers[count - 1] = (minikd_layer){.inputs = before, .outputs = size};
        model->widest = size > model->widest ? size : model->widest;
    }
    model->layer_count = count - 1;
    return more == 0 && minikd_json_end(&json) && count >= 2 ? MINIKD_OK : expected(r, "sizes", LIST);
}

/* --- what the tensors hold --- */

/* A tensor's numbers as the model's kind of number. */
static void *numbers_of(const reading *r, const minikd_stored *tensor)
{
    const int64_t count = (tensor->end - tensor->start) / (tensor->is_double ? 8 : 4);
    void *numbers = room(count, minikd_number_size(r->model));
    for (int64_t k = 0; numbers && k < count; k++) {
        const double number = minikd_number_of(tensor, k);
        if (r->model->is_double)
            ((double *)numbers)[k] = number;
        else
            ((float *)numbers)[k] = (float)number;
    }
    return numbers;
}

/* Read the tensor of this name, which must be of `rows` rows (0: a row by itself) of `columns`. */
static minikd_error read_tensor(const reading *r, void **numbers, const char *name, int64_t rows, int64_t columns,
                                int is_double)
{
    const minikd_stored *tensor = minikd_tensor_of(&r->archive, name);
    const int axes = rows ? 2 : 1;
    const char *dtype = is_double ? "float64" : "float32";
    if (!tensor || tensor->is_double != is_double || tensor->axes != axes || tensor->shape[axes - 1] != columns
        || (rows && tensor->shape[0] != rows))
        return rows ? minikd_refuse(r->report, MINIKD_ERROR_FORMAT, "%s: expected %lld × %lld %s numbers%s", name,
                                    (long long)rows, (long long)columns, dtype, tensor ? "" : ", got nothing")
                    : minikd_refuse(r->report, MINIKD_ERROR_FORMAT, "%s: expected %lld %s numbers%s", name,
                                    (long long)columns, dtype, tensor ? "" : ", got nothing");
    *numbers = numbers_of(r, tensor);
    return *numbers ? MINIKD_OK : no_memory(r);
}

static minikd_error read_layers(reading *r)
{
    minikd_model *model = r->model;
    int64_t number = r->has_input_dropout;
    for (int64_t k = 0; k < model->layer_count; k++, number += 2 + r->has_dropout) {
        minikd_layer *layer = &model->layers[k];
        char weight[40], bias[40];
        snprintf(weight, sizeof weight, "%lld.weight", (long long)number);
        snprintf(bias, sizeof bias, "%lld.bias", (long long)number);
        if (k == 0) {
            const minikd_stored *first = minikd_tensor_of(&r->archive, weight);
            model->is_double = first && first->is_double;
        }
        minikd_error error = read_tensor(r, &layer->weight, weight, layer->outputs, layer->inputs, model->is_double);
        if (!error)
            error = read_tensor(r, &layer->bias, bias, 0, layer->outputs, model->is_double);
        if (error)
            return error;
    }
    return MINIKD_OK;
}

static minikd_error read_normalisation(reading *r)
{
    static const char MEAN[] = "normalisation.mean", DEVIATION[] = "normalisation.deviation";
    const int64_t features = r->model->layers[0].inputs;
    const minikd_stored *deviation = minikd_tensor_of(&r->archive, DEVIATION);
    if (!deviation && !minikd_tensor_of(&r->archive, MEAN))
        return MINIKD_OK;
    minikd_error error = read_tensor(r, &r->model->mean, MEAN, 0, features, 0);
    if (!error)
        error = read_tensor(r, &r->model->deviation, DEVIATION, 0, features, 0);
    for (int64_t k = 0; !error && k < features; k++)
        if (!(minikd_number_of(deviation, k) > 0))
            error = expected(r, DEVIATION, "numbers above 0");
    return error;
}

static minikd_error check_that_all_was_read(reading *r)
{
    const uint64_t read = 2 * (uint64_t)r->model->layer_count + (r->model->mean ? 2 : 0);
    if (r->archive.tensor_count == read)
        return MINIKD_OK;
    return minikd_refuse(r->report, MINIKD_ERROR_FORMAT, "the tensors: expected the %llu of such a network, got %llu",
                         (unsigned long long)read, (unsigned long long)r->archive.tensor_count);
}

/* --- the names of the classes --- */

static minikd_error number_classes(reading *r, int64_t classes)
{
    enum { MOST_DIGITS = 24 };
    char *to = r->model->texts = room(classes, MOST_DIGITS);
    if (!to)
        return no_memory(r);
    for (int64_t k = 0; k < classes; k++, to += MOST_DIGITS) {
        const int length = snprintf(to, MOST_DIGITS, "%lld", (long long)k);
        r->model->class_names[k] = (minikd_text){to, (size_t)length};
    }
    return MINIKD_OK;
}

static minikd_error read_class_names(reading *r)
{
    minikd_model *model = r->model;
    const int64_t classes = model->layers[model->layer_count - 1].outputs;
    const minikd_text *stored = minikd_about_of(&r->archive, "class_names");
    int64_t count = 0;
    int more;
    model->class_names = room(classes, sizeof *model->class_names);
    if (!model->class_names)
        return no_memory(r);
    if (!stored)
        return number_classes(r, classes);
    minikd_json json = minikd_json_within(*stored);
    if (!minikd_json_sign(&json, '['))
        return expected(r, "class_names", "a list of texts");
    for (; (more = minikd_json_member(&json, count, ']')) > 0; count++)
        if (count == classes || !minikd_json_text(&json, &model->class_names[count]))
            return expected(r, "class_names", "a text for each class");
    if (more != 0 || count != classes || !minikd_json_end(&json))
        return expected(r, "class_names", "a text for each class");
    model->texts = r->archive.header; /* which they lie in */
    r->archive.header = NULL;
    return MINIKD_OK;
}

/* --- the kernels --- */

/* The best level that the processor runs, or the one that MINIKD_CPU names; NULL where it runs none of that name. */
static const char *level_in_use(void)
{
    const char *wanted = getenv("MINIKD_CPU"), *level = NULL;
    const int any = !wanted || !*wanted;
    for (int64_t k = 0; minikd_level(k); k++)
        if (any || strcmp(wanted, minikd_level(k)) == 0)
            level = minikd_level(k);
    return level;
}

static minikd_error choose_kernels(reading *r)
{
    minikd_model *model = r->model;
    const char *level = level_in_use();
    char hidden[20];
    if (!level)
        return minikd_refuse(r->report, MINIKD_ERROR_ARGUMENT,
                             "MINIKD_CPU: expected a level of instructions that this processor runs, got %.60s",
                             getenv("MINIKD_CPU"));
    snprintf(hidden, sizeof hidden, "linear_%s", r->activation);
    for (int64_t k = 0; k < model->layer_count; k++) {
        const int is_last = k == model->layer_count - 1;
        model->layers[k].kernel = minikd_find(is_last ? "linear" : hidden, model->is_double, level);
        model->layers[k].saves_product = !is_last && strcmp(r->activation, "gelu") == 0;
    }
    model->standardise = minikd_find("standardise", model->is_double, level);
    model->softmax = minikd_find("softmax", model->is_double, level);
    model->argmax = minikd_find("argmax", model->is_double, level);
    return MINIKD_OK;
}

/* --- the whole --- */

minikd_error minikd_read_model(minikd_model **model, const unsigned char *data, size_t size, minikd_report report)
{
    static minikd_error (*const STEPS[])(reading *) = {
        read_format, read_activation,    read_training,           read_sizes,
        read_layers, read_normalisation, check_that_all_was_read, read_class_names,
        choose_kernels,
    };
    reading r = {.report = report, .model = calloc(1, sizeof *r.model)};
    minikd_error error = minikd_open_archive(&r.archive, data, size, report);
    if (!error && !r.model)
        error = no_memory(&r);
    for (size_t k = 0; !error && k < sizeof STEPS / sizeof *STEPS; k++)
        error = STEPS[k](&r);
    minikd_close_archive(&r.archive);
    if (error) {
        minikd_free(r.model);
        r.model = NULL;
    }
    *model = r.model;
    return error;
}
