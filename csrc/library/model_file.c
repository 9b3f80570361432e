/* From a file of `minikd.save` to a network: its texts say what there is, and its tensors must be exactly that.
 *
 * Every size is one that tensors of the file have before memory is taken for it. */

#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "archive.h"
#include "model.h"
#include "seal.h"

/* What is known of a model while its file is read. */
typedef struct {
    const unsigned char *data;
    size_t size;
    minikd_archive archive;
    minikd_model *model;
    int version;
    minikd_text *names;     /* of the layers; NULL in version 1, where these are numbers */
    const char *activation; /* of the hidden layers, as in the names of kernels; empty where there are none */
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
    r->version = minikd_text_is(*version, "1") ? 1 : 2;
    return r->version == 1 || minikd_text_is(*version, "2") ? MINIKD_OK : expected(r, "format_version", "1 or 2");
}

/* How it was trained: a prediction needs none of it, but that layers of version 1 have numbers for names, in which
 * dropout layers count. */
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

/* Take an activation, which must be that of the hidden layers before; 0 if it is not. */
static int take_activation(reading *r, minikd_text name)
{
    static const char *const KNOWN[] = {"relu", "gelu", "tanh", "sigmoid"};
    for (int k = 0; k < 4 && !*r->activation; k++)
        if (minikd_text_is(name, KNOWN[k]))
            r->activation = KNOWN[k];
    return *r->activation && minikd_text_is(name, r->activation);
}

/* Add a layer, without its numbers, behind those there are; there must be tensors enough for them all. */
static minikd_error add_layer(reading *r, int64_t inputs, int64_t outputs)
{
    minikd_model *model = r->model;
    const int64_t most = (int64_t)(r->archive.tensor_count / 2), count = model->layer_count;
    if (!model->layers)
        model->layers = room(most + 1, sizeof *model->layers);
    if (!model->layers)
        return no_memory(r);
    if (count == most)
        return expected(r, "the layers", "no more of them than there are tensors for");
    if (count > 0 && model->layers[count - 1].outputs != inputs)
        return expected(r, "layers", "as many inputs of each as the one before it has outputs");
    model->layers[model->layer_count++] = (minikd_layer){.inputs = inputs, .outputs = outputs};
    model->widest = inputs > model->widest ? inputs : model->widest;
    model->widest = outputs > model->widest ? outputs : model->widest;
    return MINIKD_OK;
}

/* Version 1: "sizes": [features, …, classes], and "activation" */
static minikd_error read_sizes(reading *r)
{
    static const char LIST[] = "a list of whole numbers above 0, two at least";
    const minikd_text *sizes = minikd_about_of(&r->archive, "sizes");
    const minikd_text *activation = minikd_about_of(&r->archive, "activation");
    int64_t size, before = 0;
    int more;
    if (!activation || !take_activation(r, *activation))
        return expected(r, "activation", "relu, gelu, tanh or sigmoid");
    if (!sizes)
        return expected(r, "sizes", LIST);
    minikd_json json = minikd_json_within(*sizes);
    if (!minikd_json_sign(&json, '['))
        return expected(r, "sizes", LIST);
    for (int64_t k = 0; (more = minikd_json_member(&json, k, ']')) > 0; k++, before = size) {
        if (!minikd_json_whole(&json, &size) || size == 0)
            return expected(r, "sizes", LIST);
        const minikd_error error = k ? add_layer(r, before, size) : MINIKD_OK;
        if (error)
            return error;
    }
    return more == 0 && minikd_json_end(&json) && r->model->layer_count ? MINIKD_OK : expected(r, "sizes", LIST);
}

/* What version 2 says of a layer. */
typedef struct {
    minikd_text name, activation;
    int64_t inputs, outputs;
} description;

/* {"name": …, "activation": …, "inputs": …, "outputs": …}, each once, in any order; 0 otherwise */
static int read_description(minikd_json *json, description *d)
{
    static const char *const FIELDS[] = {"name", "activation", "inputs", "outputs"};
    minikd_text *const texts[] = {&d->name, &d->activation};
    int64_t *const numbers[] = {&d->inputs, &d->outputs};
    int more, found = 0;
    if (!minikd_json_sign(json, '{'))
        return 0;
    for (int64_t k = 0; (more = minikd_json_member(json, k, '}')) > 0; k++) {
        minikd_text name;
        int field = 0;
        if (!minikd_json_text(json, &name) || !minikd_json_sign(json, ':'))
            return 0;
        while (field < 4 && !minikd_text_is(name, FIELDS[field]))
            field++;
        if (field == 4 || found & 1 << field)
            return 0;
        if (!(field < 2 ? minikd_json_text(json, texts[field]) : minikd_json_whole(json, numbers[field - 2])))
            return 0;
        found |= 1 << field;
    }
    return more == 0 && found == 15 && d->inputs > 0 && d->outputs > 0;
}

/* Version 2: "layers": [{…}, …], of which the last alone has no activation */
static minikd_error read_descriptions(reading *r)
{
    static const char LIST[] = "a list of name, inputs, outputs and activation of each layer";
    const minikd_text *layers = minikd_about_of(&r->archive, "layers");
    int more, was_last = 0;
    if (!layers)
        return expected(r, "layers", LIST);
    minikd_json json = minikd_json_within(*layers);
    r->names = room((int64_t)(r->archive.tensor_count / 2) + 1, sizeof *r->names);
    if (!r->names)
        return no_memory(r);
    if (!minikd_json_sign(&json, '['))
        return expected(r, "layers", LIST);
    for (int64_t k = 0; (more = minikd_json_member(&json, k, ']')) > 0; k++) {
        description d;
        if (!read_description(&json, &d))
            return expected(r, "layers", LIST);
        if (was_last || (d.activation.length && !take_activation(r, d.activation)))
            return expected(r, "activation", "relu, gelu, tanh or sigmoid, alike in all layers but the last");
        was_last = d.activation.length == 0;
        const minikd_error error = add_layer(r, d.inputs, d.outputs);
        if (error)
            return error;
        r->names[k] = d.name;
    }
    return more == 0 && minikd_json_end(&json) && was_last ? MINIKD_OK : expected(r, "layers", LIST);
}

static minikd_error read_structure(reading *r)
{
    return r->version == 1 ? read_sizes(r) : read_descriptions(r);
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
static minikd_error read_tensor(const reading *r, void **numbers, minikd_text name, int64_t rows, int64_t columns,
                                int is_double)
{
    minikd_stored *tensor = minikd_tensor_of(&r->archive, name);
    const int axes = rows ? 2 : 1;
    if (!tensor || tensor->is_taken || tensor->is_double != is_double || tensor->axes != axes
        || tensor->shape[axes - 1] != columns || (rows && tensor->shape[0] != rows))
        return minikd_refuse(r->report, MINIKD_ERROR_FORMAT, "%s: expected %lld × %lld numbers of %s%s", name.at,
                             (long long)(rows ? rows : 1), (long long)columns, is_double ? "float64" : "float32",
                             tensor ? ", and for this alone" : ", got nothing");
    tensor->is_taken = 1;
    *numbers = numbers_of(r, tensor);
    return *numbers ? MINIKD_OK : no_memory(r);
}

enum { LONGEST_NAME = 200 }; /* of a tensor, in bytes with a NUL at their end */

/* The name of what belongs to layer k, written to `to`. */
static minikd_error name_in_layer(const reading *r, int64_t k, const char *part, char *to, minikd_text *name)
{
    const size_t rest = strlen(part) + 1;
    if (r->version == 1)
        name->length = (size_t)snprintf(to, LONGEST_NAME, "%lld",
                                        (long long)(r->has_input_dropout + k * (2 + r->has_dropout)));
    else if (r->names[k].length > LONGEST_NAME - rest)
        return expected(r, "layers", "shorter names");
    else
        memcpy(to, r->names[k].at, name->length = r->names[k].length);
    memcpy(to + name->length, part, rest);
    name->length += rest - 1;
    name->at = to;
    return MINIKD_OK;
}

static minikd_error read_layers(reading *r)
{
    minikd_model *model = r->model;
    for (int64_t k = 0; k < model->layer_count; k++) {
        minikd_layer *layer = &model->layers[k];
        char weight[LONGEST_NAME], bias[LONGEST_NAME];
        minikd_text weight_name, bias_name;
        minikd_error error = name_in_layer(r, k, ".weight", weight, &weight_name);
        if (error || (error = name_in_layer(r, k, ".bias", bias, &bias_name)))
            return error;
        if (k == 0) {
            const minikd_stored *first = minikd_tensor_of(&r->archive, weight_name);
            model->is_double = first && first->is_double;
        }
        error = read_tensor(r, &layer->weight, weight_name, layer->outputs, layer->inputs, model->is_double);
        if (!error)
            error = read_tensor(r, &layer->bias, bias_name, 0, layer->outputs, model->is_double);
        if (error)
            return error;
    }
    return MINIKD_OK;
}

static minikd_error read_normalisation(reading *r)
{
    const minikd_text mean = minikd_text_of("normalisation.mean");
    const minikd_text deviation = minikd_text_of("normalisation.deviation");
    const int64_t features = r->model->layers[0].inputs;
    const minikd_stored *found = minikd_tensor_of(&r->archive, deviation);
    if (!found && !minikd_tensor_of(&r->archive, mean))
        return MINIKD_OK;
    minikd_error error = read_tensor(r, &r->model->mean, mean, 0, features, 0);
    if (!error)
        error = read_tensor(r, &r->model->deviation, deviation, 0, features, 0);
    for (int64_t k = 0; !error && k < features; k++)
        if (!(minikd_number_of(found, k) > 0))
            error = expected(r, deviation.at, "numbers above 0");
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

static minikd_error check_seal(reading *r)
{
    const minikd_text *seal = minikd_about_of(&r->archive, "sha256");
    if (r->version == 1 || (seal && minikd_seal_fits(*seal, r->data, r->archive.head, r->size)))
        return MINIKD_OK;
    return expected(r, "sha256", seal ? "the file as it was when it was written" : "a seal");
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
        read_format,
        read_training,
        read_structure,
        read_layers,
        read_normalisation,
        check_that_all_was_read,
        check_seal,
        read_class_names,
        choose_kernels,
    };
    reading r = {.data = data, .size = size, .activation = "", .report = report};
    r.model = calloc(1, sizeof *r.model);
    minikd_error error = minikd_open_archive(&r.archive, data, size, report);
    if (!error && !r.model)
        error = no_memory(&r);
    for (size_t k = 0; !error && k < sizeof STEPS / sizeof *STEPS; k++)
        error = STEPS[k](&r);
    minikd_close_archive(&r.archive);
    free(r.names);
    if (error) {
        minikd_free(r.model);
        r.model = NULL;
    }
    *model = r.model;
    return error;
}
