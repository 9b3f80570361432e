/* Tests of libminikd, to be built with sanitizers: what is computed, what is refused, damaged files by the thousand.
 *
 *     check [MODEL …]     damaged copies of these files are read too
 *
 * Everything that the library is given lies in memory of exactly its size, so that a step outside is noticed. */

#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "minikd.h"
#include "seal.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
            exit(EXIT_FAILURE);                                                       \
        }                                                                             \
    } while (0)

static uint64_t state = 1;

/* A number below `limit` (Knuth's MMIX generator; its high bits). */
static uint64_t random_below(uint64_t limit)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % limit;
}

static double random_number(void)
{
    return (double)random_below(2001) / 1000 - 1;
}

static void *memory(size_t bytes)
{
    void *at = malloc(bytes ? bytes : 1);
    CHECK(at);
    return at;
}

/* --- files in memory --- */

enum { MOST_LAYERS = 4, MOST_HEADER = 4096, MOST_NUMBERS = 4096 };

typedef struct {
    int version, layers;
    int sizes[MOST_LAYERS + 1];
    const char *activation;
    int is_double, normalised;
    const char *dropout, *input_dropout, *class_names; /* NULL for no names */
} plan;

/* A model's numbers in the order of the file, and the bytes of the file. */
typedef struct {
    plan plan;
    double numbers[MOST_NUMBERS];
    int count;
    unsigned char *data;
    size_t size;
} file;

static void append(char *text, const char *format, ...)
{
    const size_t length = strlen(text);
    va_list values;
    va_start(values, format);
    CHECK(vsnprintf(text + length, MOST_HEADER - length, format, values) < (int)(MOST_HEADER - length));
    va_end(values);
}

static unsigned char *put_little_endian(unsigned char *to, uint64_t bits, int bytes)
{
    for (int k = 0; k < bytes; k++)
        *to++ = (unsigned char)(bits >> 8 * k);
    return to;
}

static unsigned char *put_number(unsigned char *to, double number, int is_double)
{
    const float single = (float)number;
    uint64_t bits;
    uint32_t few;
    memcpy(&bits, &number, sizeof bits);
    memcpy(&few, &single, sizeof few);
    return is_double ? put_little_endian(to, bits, 8) : put_little_endian(to, few, 4);
}

/* Add a tensor of `rows` rows (0: a row by itself) of `columns` random numbers to a file. */
static void add_tensor(file *f, char *header, unsigned char **end, const char *name, int rows, int columns,
                       int is_double)
{
    const int count = (rows ? rows : 1) * columns, is_deviation = strstr(name, "deviation") != NULL;
    const long start = (long)(*end - f->data);
    for (int k = 0; k < count; k++) {
        const double number = is_deviation ? 1.5 + random_number() : random_number();
        f->numbers[f->count++] = is_double ? number : (double)(float)number;
        *end = put_number(*end, f->numbers[f->count - 1], is_double);
    }
    append(header, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", name, is_double ? "F64" : "F32");
    if (rows)
        append(header, "%d,", rows);
    append(header, "%d]", columns);
    append(header, ",\"data_offsets\":[%ld,%ld]}", start, (long)(*end - f->data));
}

/* A file of this header and these bytes, in memory of its size. */
static void assemble(file *f, const char *header, const unsigned char *body, size_t body_size)
{
    const size_t length = strlen(header);
    f->size = 8 + length + body_size;
    f->data = memory(f->size);
    unsigned char *at = put_little_endian(f->data, length, 8);
    memcpy(at, header, length);
    memcpy(at + length, body, body_size);
}

/* Write the seal that fits where a seal stands, if one does. */
static void seal(unsigned char *data, size_t size)
{
    static const char NAME[] = "\"sha256\":\"";
    size_t head = 8, at = 0;
    for (int k = 0; k < 8 && size >= 8; k++)
        head += (size_t)data[k] << 8 * k;
    while (at + sizeof NAME + MINIKD_SEAL_DIGITS < size && memcmp(data + at, NAME, sizeof NAME - 1) != 0)
        at++;
    if (head < size && at + sizeof NAME + MINIKD_SEAL_DIGITS < head) {
        char digits[MINIKD_SEAL_DIGITS], *place = (char *)data + at + sizeof NAME - 1;
        minikd_seal_of(digits, place, data, head, size);
        memcpy(place, digits, sizeof digits);
    }
}

/* What the metadata say of the layers. */
static void describe(const plan *p, char *header)
{
    append(header, p->version == 1 ? "\"sizes\":\"[%d" : "\"layers\":\"[", p->sizes[0]);
    for (int k = 0; k < p->layers; k++)
        if (p->version == 1)
            append(header, ", %d", p->sizes[k + 1]);
        else
            append(header,
                   "%s{\\\"name\\\": \\\"l%d\\\", \\\"inputs\\\": %d, \\\"outputs\\\": %d, "
                   "\\\"activation\\\": \\\"%s\\\"}",
                   k ? ", " : "", k, p->sizes[k], p->sizes[k + 1], k < p->layers - 1 ? p->activation : "");
    append(header, "]\",");
    if (p->version == 1)
        append(header, "\"activation\":\"%s\",", p->activation);
    else
        append(header, "\"sha256\":\"%064d\",", 0);
}

static file written(plan p)
{
    file f = {.plan = p};
    char header[MOST_HEADER] = "", name[40];
    unsigned char *body = memory(8 * MOST_NUMBERS), *end = body;
    int number = strcmp(p.input_dropout, "0.0") != 0;
    f.data = body;
    append(header, "{\"__metadata__\":{\"format\":\"minikd\",\"format_version\":\"%d\",", p.version);
    describe(&p, header);
    append(header, "\"dropout\":\"%s\",\"input_dropout\":\"%s\",", p.dropout, p.input_dropout);
    append(header, "\"seed\":\"7\",\"more\":\"\\u2713\"");
    if (p.class_names)
        append(header, ",\"class_names\":\"%s\"", p.class_names);
    append(header, "}");
    for (int k = 0; k < p.layers; k++, number += 2 + (strcmp(p.dropout, "0.0") != 0)) {
        snprintf(name, sizeof name, p.version == 1 ? "%d.bias" : "l%d.bias", p.version == 1 ? number : k);
        add_tensor(&f, header, &end, name, 0, p.sizes[k + 1], p.is_double);
        snprintf(name, sizeof name, p.version == 1 ? "%d.weight" : "l%d.weight", p.version == 1 ? number : k);
        add_tensor(&f, header, &end, name, p.sizes[k + 1], p.sizes[k], p.is_double);
    }
    if (p.normalised) {
        add_tensor(&f, header, &end, "normalisation.deviation", 0, p.sizes[0], 0);
        add_tensor(&f, header, &end, "normalisation.mean", 0, p.sizes[0], 0);
    }
    append(header, "}");
    assemble(&f, header, body, (size_t)(end - body));
    free(body);
    seal(f.data, f.size);
    return f;
}

static minikd_model *loaded(const file *f)
{
    char message[200];
    minikd_model *model;
    if (minikd_load_memory(f->data, f->size, &model, message, sizeof message) != MINIKD_OK)
        fprintf(stderr, "%s\n", message);
    CHECK(model);
    CHECK(message[0] == '\0');
    return model;
}

/* --- what is computed --- */

static double activated(const char *activation, double u)
{
    if (strcmp(activation, "relu") == 0)
        return u > 0 ? u : 0;
    if (strcmp(activation, "tanh") == 0)
        return tanh(u);
    return strcmp(activation, "gelu") == 0 ? u * 0.5 * erfc(-u / sqrt(2.0)) : 1 / (1 + exp(-u));
}

/* The logits of one row, by the formula. */
static void logits_by_formula(const file *f, const float *features, double *logits)
{
    const plan *p = &f->plan;
    const double *number = f->numbers, *scale = f->numbers + f->count - 2 * p->sizes[0];
    double x[64], y[64];
    for (int j = 0; j < p->sizes[0]; j++)
        x[j] = p->normalised ? (features[j] - scale[p->sizes[0] + j]) / scale[j] : features[j];
    for (int k = 0; k < p->layers; k++) {
        const int inputs = p->sizes[k], outputs = p->sizes[k + 1];
        for (int i = 0; i < outputs; i++) {
            y[i] = number[i];
            for (int j = 0; j < inputs; j++)
                y[i] += number[outputs + i * inputs + j] * x[j];
            if (k < p->layers - 1)
                y[i] = activated(p->activation, y[i]);
        }
        memcpy(x, y, sizeof x);
        number += outputs + outputs * inputs;
    }
    memcpy(logits, x, (size_t)p->sizes[p->layers] * sizeof *logits);
}

static void check_row(const file *f, const float *features, const float *logits, const float *probabilities,
                      int64_t class_id)
{
    const int classes = f->plan.sizes[f->plan.layers];
    double expected[64], total = 0;
    logits_by_formula(f, features, expected);
    for (int j = 0; j < classes; j++)
        total += exp(expected[j] / 3);
    for (int j = 0; j < classes; j++) {
        CHECK(fabs(logits[j] - expected[j]) < 1e-5 * (1 + fabs(expected[j])));
        CHECK(fabs(probabilities[j] - exp(expected[j] / 3) / total) < 1e-5);
        CHECK(logits[j] < logits[class_id] || (logits[j] == logits[class_id] && class_id <= j) || f->plan.is_double);
    }
}

static void predictions_follow_the_formula(plan p)
{
    const file f = written(p);
    minikd_model *model = loaded(&f);
    const size_t inputs = (size_t)minikd_feature_count(model), classes = (size_t)minikd_class_count(model);
    CHECK(inputs == (size_t)p.sizes[0] && classes == (size_t)p.sizes[p.layers]);
    for (size_t rows = 0; rows <= 1100; rows = 3 * rows + 1) {
        float *features = memory(rows * inputs * sizeof *features), *logits = memory(rows * classes * sizeof *logits);
        float *probabilities = memory(rows * classes * sizeof *probabilities);
        int64_t *ids = memory(rows * sizeof *ids);
        for (size_t k = 0; k < rows * inputs; k++)
            features[k] = (float)(3 * random_number());
        CHECK(minikd_logits(model, features, rows, logits) == MINIKD_OK);
        CHECK(minikd_probabilities(model, features, rows, 3, probabilities) == MINIKD_OK);
        CHECK(minikd_predict(model, features, rows, ids) == MINIKD_OK);
        for (size_t k = 0; k < rows; k++)
            check_row(&f, features + k * inputs, logits + k * classes, probabilities + k * classes, ids[k]);
        free(features);
        free(logits);
        free(probabilities);
        free(ids);
    }
    minikd_free(model);
    free(f.data);
}

static const plan SMALL = {1, 2, {3, 4, 2}, "relu", 0, 1, "0.0", "0.0", "[\\\"a\\\", \\\"b\\\"]"};

static void all_networks_are_computed(void)
{
    static const char *const ACTIVATIONS[] = {"relu", "gelu", "tanh", "sigmoid"};
    static const char *const DROPOUTS[] = {"0.0", "0.25", "1e-05"};
    for (int k = 0; k < 4; k++)
        for (int is_double = 0; is_double < 2; is_double++) {
            plan p = {1 + (k + is_double) % 2, 3, {7, 33, 17, 5}, ACTIVATIONS[k], is_double, k % 2, DROPOUTS[k % 3],
                      DROPOUTS[k % 2], NULL};
            predictions_follow_the_formula(p);
        }
    for (int version = 1; version <= 2; version++)
        predictions_follow_the_formula((plan){version, 1, {1, 1}, "relu", 0, 0, "0.0", "0.0", NULL});
    predictions_follow_the_formula(SMALL);
}

/* --- many threads --- */

typedef struct {
    const minikd_model *model;
    const float *features, *expected;
    size_t rows, numbers;
} shared_work;

static void *predict_again_and_again(void *shared)
{
    const shared_work *work = shared;
    float *logits = memory(work->numbers * sizeof *logits);
    for (int k = 0; k < 50; k++) {
        CHECK(minikd_logits(work->model, work->features, work->rows, logits) == MINIKD_OK);
        CHECK(memcmp(logits, work->expected, work->numbers * sizeof *logits) == 0);
    }
    free(logits);
    return NULL;
}

static void threads_share_a_model(void)
{
    enum { ROWS = 40, THREADS = 4 };
    const file f = written((plan){2, 2, {7, 33, 5}, "gelu", 0, 1, "0.0", "0.0", NULL});
    minikd_model *model = loaded(&f);
    float features[ROWS * 7], expected[ROWS * 5];
    for (int k = 0; k < ROWS * 7; k++)
        features[k] = (float)random_number();
    CHECK(minikd_logits(model, features, ROWS, expected) == MINIKD_OK);
    shared_work work = {model, features, expected, ROWS, ROWS * 5};
    pthread_t threads[THREADS];
    for (int k = 0; k < THREADS; k++)
        CHECK(pthread_create(&threads[k], NULL, predict_again_and_again, &work) == 0);
    for (int k = 0; k < THREADS; k++)
        CHECK(pthread_join(threads[k], NULL) == 0);
    minikd_free(model);
    free(f.data);
}

/* --- names --- */

/* `json`, as a text within a header, gives this name to the first of two classes. */
static void check_name(const char *json, const char *name, size_t length)
{
    plan p = SMALL;
    size_t found;
    p.class_names = json;
    const file f = written(p);
    minikd_model *model = loaded(&f);
    CHECK(memcmp(minikd_class_name(model, 0, &found), name, length + 1) == 0);
    CHECK(found == length);
    CHECK(strcmp(minikd_class_name(model, 1, NULL), "b") == 0);
    CHECK(minikd_class_name(model, 2, &found) == NULL && found == 0);
    CHECK(minikd_class_name(model, -1, NULL) == NULL);
    minikd_free(model);
    free(f.data);
}

static void class_names_come_back_whatever_they_are(void)
{
    check_name("[\\\"\\\",\\\"b\\\"]", "", 0);
    check_name(" [ \\\"a b\\\" , \\\"b\\\" ] ", "a b", 3);
    check_name("[\\\"na\xc3\xafve \xe2\x9c\x93\\\", \\\"b\\\"]", "na\xc3\xafve \xe2\x9c\x93", 10);
    check_name("[\\\"\\\\u00e9\\\\ud83d\\\\ude00\\\", \\\"b\\\"]", "\xc3\xa9\xf0\x9f\x98\x80", 6);
    check_name("[\\\"\\ud83d\\ude00\\\", \\\"b\\\"]", "\xf0\x9f\x98\x80", 4);
    check_name("[\\\"\\\\\\\"\\\\\\\\\\\\/\\\\n\\\", \\\"b\\\"]", "\"\\/\n", 4);
    check_name("[\\\"x\\\\u0000y\\\", \\\"b\\\"]", "x\0y", 3);
    plan p = SMALL;
    p.class_names = NULL;
    const file f = written(p);
    minikd_model *model = loaded(&f);
    CHECK(strcmp(minikd_class_name(model, 1, NULL), "1") == 0);
    minikd_free(model);
    free(f.data);
}

/* --- what is refused --- */

/* A copy of a file in which the first `old` of the header is `new`. */
static file changed(const file *f, const char *old, const char *new)
{
    char header[MOST_HEADER], text[MOST_HEADER] = "";
    size_t length = 0;
    file copy = {.plan = f->plan};
    for (int k = 7; k >= 0; k--)
        length = length << 8 | f->data[k];
    memcpy(header, f->data + 8, length);
    header[length] = '\0';
    char *at = strstr(header, old);
    CHECK(at);
    *at = '\0';
    append(text, "%s%s%s", header, new, at + strlen(old));
    assemble(&copy, text, f->data + 8 + length, f->size - 8 - length);
    return copy;
}

typedef struct {
    const char *old, *new, *words;
} lie;

static void check_lies(const file *f, const lie *lies, size_t count)
{
    for (size_t k = 0; k < count; k++) {
        const file lying = changed(f, lies[k].old, lies[k].new);
        char message[300];
        minikd_model *model;
        seal(lying.data, lying.size);
        CHECK(minikd_load_memory(lying.data, lying.size, &model, message, sizeof message) == MINIKD_ERROR_FORMAT);
        if (!strstr(message, lies[k].words))
            fprintf(stderr, "for %s the message is: %s\n", lies[k].new, message);
        CHECK(strstr(message, lies[k].words));
        CHECK(model == NULL);
        free(lying.data);
    }
}

static void headers_that_lie_are_refused(void)
{
    static const lie LIES[] = {
        {"\"format\":\"minikd\"", "\"format\":\"other\"", "a model of minikd"},
        {"\"format_version\":\"1\"", "\"format_version\":\"99\"", "format_version"},
        {"relu", "swish", "activation"},
        {"[3, 4, 2]", "[3, 5, 2]", "0.weight: expected 5"},
        {"[3, 4, 2]", "[3, 600000000000, 2]", "0.weight"},
        {"[3, 4, 2]", "[3, 99999999999999999999, 2]", "sizes"},
        {"[3, 4, 2]", "[3, 4, 0]", "sizes"},
        {"[3, 4, 2]", "[3, 4, -2]", "sizes"},
        {"[3, 4, 2]", "[3, 4, 2.0]", "sizes"},
        {"[3, 4, 2]", "[3, 04, 2]", "sizes"},
        {"[3, 4, 2]", "[3, 4, 2,]", "sizes"},
        {"[3, 4, 2]", "[3, 4, 2", "sizes"},
        {"[3, 4, 2]", "[3, 4, 2]]", "sizes"},
        {"[3, 4, 2]", "[3]", "sizes"},
        {"[3, 4, 2]", "[]", "sizes"},
        {"[3, 4, 2]", "[3, 2]", "0.weight"},
        {"[3, 4, 2]", "[3, 4, 2, 2]", "4.weight: expected 2 × 2 numbers of float32, got nothing"},
        {"[3, 4, 2]", "[3, 4, 2, 2, 2, 2]", "no more of them than there are tensors for"},
        {"\\\"a\\\", ", "", "class_names"},
        {"\\\"a\\\", ", "\\\"a\\\", \\\"c\\\", ", "class_names"},
        {"\\\"a\\\"", "1", "class_names"},
        {"\\\"a\\\"", "\\\"\\\\ud800\\\"", "class_names"},
        {"\\\"a\\\"", "\\\"\\\\x\\\"", "class_names"},
        {"\"dropout\":\"0.0\"", "\"dropout\":\"2.0\"", "dropout"},
        {"\"dropout\":\"0.0\"", "\"dropout\":\"nan\"", "dropout"},
        {"\"dropout\":\"0.0\"", "\"dropout\":\"0.5\"", "3.weight"},
        {"\"seed\":\"7\"", "\"seed\":\"-7\"", "seed"},
        {"\"seed\":\"7\",", "", "seed"},
        {"\"seed\":\"7\"", "\"seed\":7", "__metadata__"},
        {"\"seed\":\"7\"", "\"seed\":\"7\",\"seed\":\"7\"", "seed twice"},
        {"\"more\":\"\\u2713\"", "\"more\":\"\xff\"", "__metadata__"},
        {"\"more\":\"\\u2713\"", "\"more\":\"\xed\xa0\x80\"", "__metadata__"},
        {"\"more\":\"\\u2713\"", "\"more\":\"\n\"", "__metadata__"},
        {"F32", "F16", "0.bias"},
        {"F32", "F64", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[5]", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[4,1]", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[]", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[1,1,4]", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[4611686018427387903,4611686018427387903]", "0.bias"},
        {"\"shape\":[4],", "", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[4],\"shape\":[4]", "0.bias"},
        {"\"shape\":[4]", "\"shape\":[4],\"other\":[4]", "0.bias"},
        {"[0,16]", "[0,15]", "0.bias"},
        {"[0,16]", "[4,20]", "0.bias"},
        {"[16,64]", "[12,60]", "0.weight"},
        {"[16,64]", "[16,4611686018427387900]", "0.weight"},
        {"0.bias", "0.weight", "0.weight twice"},
        {"0.bias", "1.bias", "0.bias"},
        {"normalisation.mean", "normalisation.more", "normalisation.mean"},
        {"\"0.bias\"", "\"more\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"0.bias\"", "the tensors"},
        {"{\"__metadata__\"", "{\"__metadata__\":{},\"__metadata__\"", "header"},
        {"{\"__metadata__\"", " {\"__metadata__\"", "header"},
        {"{\"__metadata__\":", "{", "header"},
    };
    const file f = written(SMALL);
    check_lies(&f, LIES, sizeof LIES / sizeof *LIES);
    free(f.data);
}

#define Q "\\\""
static void layers_that_lie_are_refused(void)
{
    static const char LIST[] = "layers: expected a list of name";
    static const lie LIES[] = {
        {Q "relu" Q, Q "swish" Q, "activation"},
        {Q "relu" Q, Q Q, "activation"},
        {Q "relu" Q, "1", LIST},
        {Q "activation" Q ": " Q Q, Q "activation" Q ": " Q "relu" Q, LIST},
        {Q "activation" Q ": " Q "relu" Q, Q "inputs" Q ": 3", LIST},
        {", " Q "activation" Q ": " Q "relu" Q, "", LIST},
        {Q "outputs" Q ": 4", Q "outputs" Q ": 5", "as many inputs"},
        {Q "outputs" Q ": 4", Q "outputs" Q ": 0", LIST},
        {Q "outputs" Q ": 4", Q "outputs" Q ": -4", LIST},
        {Q "outputs" Q ": 4", Q "outputs" Q ": 4.0", LIST},
        {Q "outputs" Q ": 4", Q "outputs" Q ": 4, " Q "more" Q ": 4", LIST},
        {Q "inputs" Q ": 3", Q "inputs" Q ": 1000000000000", "l0.weight"},
        {Q "l1" Q, Q "l0" Q, "l0.weight: expected 2 × 4"},
        {Q "l1" Q, Q "l2" Q, "got nothing"},
        {Q "l1" Q, Q "l\\\\u0000" Q, "got nothing"},
        {Q "l1" Q, "1", LIST},
        {"[{", "[[{", LIST},
        {"[{", "[],[{", LIST},
        {"}]", "}", LIST},
        {"}]", "},]", LIST},
        {"}]", "}]]", LIST},
        {"\"sha256\":\"", "\"sha256\":\"0", "sha256"},
        {"\"sha256\"", "\"sha255\"", "sha256: expected a seal"},
        {"\"layers\"", "\"sizes\"", LIST},
    };
    plan p = SMALL;
    p.version = 2;
    file f = written(p);
    memset(strstr((char *)f.data + 8, "\"sha256\":\"") + 10, '0', MINIKD_SEAL_DIGITS);
    check_lies(&f, LIES, sizeof LIES / sizeof *LIES);
    free(f.data);
}
#undef Q

static void a_byte_that_was_changed_breaks_the_seal(void)
{
    plan p = SMALL;
    p.version = 2;
    const file f = written(p);
    for (size_t k = 1; k < 1 + f.size / 7; k++) {
        minikd_model *model;
        f.data[f.size - k] ^= 1;
        CHECK(minikd_load_memory(f.data, f.size, &model, NULL, 0) == MINIKD_ERROR_FORMAT);
        f.data[f.size - k] ^= 1;
    }
    minikd_free(loaded(&f));
    free(f.data);
}

static void numbers_that_are_not_finite_are_refused(void)
{
    static const double BROKEN[] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 6; k++) {
        plan p = SMALL;
        p.is_double = k % 2;
        p.normalised = 0;
        const file f = written(p);
        minikd_model *model;
        char message[100];
        put_number(f.data + f.size - (p.is_double ? 8 : 4), BROKEN[k / 2], p.is_double);
        CHECK(minikd_load_memory(f.data, f.size, &model, message, sizeof message) == MINIKD_ERROR_FORMAT);
        CHECK(strstr(message, "finite") && !model);
        free(f.data);
    }
}

static void a_deviation_of_zero_is_refused(void)
{
    const file f = written(SMALL);
    minikd_model *model;
    char message[100];
    put_number(f.data + f.size - 4 * 6, 0, 0);
    CHECK(minikd_load_memory(f.data, f.size, &model, message, sizeof message) == MINIKD_ERROR_FORMAT);
    CHECK(strstr(message, "normalisation.deviation: expected numbers above 0"));
    free(f.data);
}

static void arguments_that_cannot_be_are_refused(void)
{
    const file f = written(SMALL);
    minikd_model *model = loaded(&f), *none;
    float numbers[3] = {0};
    int64_t id;
    char message[5] = "....";
    CHECK(minikd_load_memory(f.data, f.size, NULL, NULL, 0) == MINIKD_ERROR_ARGUMENT);
    CHECK(minikd_load_memory(NULL, 0, &none, message, sizeof message) == MINIKD_ERROR_ARGUMENT && !none);
    CHECK(strcmp(message, "data") == 0);
    CHECK(minikd_load_memory(f.data, 7, &none, message, 1) == MINIKD_ERROR_FORMAT && message[0] == '\0');
    CHECK(minikd_load_file(NULL, &none, NULL, 0) == MINIKD_ERROR_ARGUMENT && !none);
    CHECK(minikd_load_file("/nothing/here", &none, NULL, 0) == MINIKD_ERROR_FILE && !none);
    CHECK(minikd_load_file("/", &none, NULL, 0) == MINIKD_ERROR_FILE && !none);
    CHECK(minikd_predict(NULL, numbers, 1, &id) == MINIKD_ERROR_ARGUMENT);
    CHECK(minikd_predict(model, NULL, 1, &id) == MINIKD_ERROR_ARGUMENT);
    CHECK(minikd_predict(model, NULL, 0, NULL) == MINIKD_OK);
    CHECK(minikd_logits(model, numbers, 1, NULL) == MINIKD_ERROR_ARGUMENT);
    static const double TEMPERATURES[] = {0, -1, NAN, INFINITY};
    for (int k = 0; k < 4; k++)
        CHECK(minikd_probabilities(model, numbers, 1, TEMPERATURES[k], numbers) == MINIKD_ERROR_ARGUMENT);
    for (int k = -1; k < 6; k++)
        CHECK(strlen(minikd_error_text((minikd_error)k)) > 0);
    minikd_free(NULL);
    minikd_free(model);
    free(f.data);
}

/* --- damaged files --- */

/* Load the first `size` bytes in memory of their own; a model that comes of them predicts. */
static minikd_error try(const unsigned char *data, size_t size)
{
    unsigned char *copy = memory(size);
    char message[80];
    minikd_model *model;
    memcpy(copy, data, size);
    const minikd_error error = minikd_load_memory(copy, size, &model, message, sizeof message);
    free(copy);
    CHECK((error == MINIKD_OK) == (model != NULL) && (error == MINIKD_OK) == (message[0] == '\0'));
    CHECK(error == MINIKD_OK || error == MINIKD_ERROR_FORMAT);
    if (model) {
        float *features = memory((size_t)minikd_feature_count(model) * sizeof *features);
        int64_t id;
        for (int64_t k = 0; k < minikd_feature_count(model); k++)
            features[k] = (float)random_number();
        CHECK(minikd_predict(model, features, 1, &id) == MINIKD_OK && id >= 0 && id < minikd_class_count(model));
        free(features);
    }
    minikd_free(model);
    return error;
}

/* Change some bytes, most of them in the header: bits, signs of JSON, digits; or move a piece to another place. */
static void damage(unsigned char *data, size_t size)
{
    static const char SIGNS[] = "0123456789\"\\{}[]:,. -eutFn";
    const size_t near = size < 1500 ? size : 1500;
    for (uint64_t k = 1 + random_below(4); k > 0; k--) {
        const size_t at = random_below(4) ? random_below(near) : random_below(size);
        const uint64_t kind = random_below(8);
        if (kind == 0)
            data[at] ^= (unsigned char)(1 << random_below(8));
        else if (kind == 1)
            data[at] = (unsigned char)random_below(256);
        else if (kind == 2)
            data[random_below(8)] = (unsigned char)random_below(4);
        else if (kind == 3) {
            const size_t length = 1 + random_below(30), from = random_below(near);
            if (from + length < size && at + length < size)
                memmove(data + at, data + from, length);
        } else
            data[at] = (unsigned char)SIGNS[random_below(sizeof SIGNS - 1)];
    }
}

static void damaged_files_are_refused_or_loaded(const unsigned char *data, size_t size, int copies)
{
    unsigned char *copy = memory(size + 1);
    memcpy(copy, data, size);
    copy[size] = 0;
    CHECK(try(copy, size) == MINIKD_OK);
    CHECK(try(copy, size + 1) == MINIKD_ERROR_FORMAT);
    for (size_t length = 0; length < size; length += length < 1200 ? 1 : 1 + size / 50)
        CHECK(try(copy, length) == MINIKD_ERROR_FORMAT);
    for (int k = 0; k < copies; k++) {
        memcpy(copy, data, size);
        damage(copy, size);
        if (k % 2)
            seal(copy, size);
        try(copy, size);
    }
    free(copy);
}

static void damaged_copies_of_a_file_are_refused_or_loaded(const char *path)
{
    enum { MOST = 1 << 20 };
    unsigned char *data = memory(MOST);
    FILE *stream = fopen(path, "rb");
    CHECK(stream);
    const size_t size = fread(data, 1, MOST, stream);
    CHECK(size < MOST);
    fclose(stream);
    minikd_model *model;
    CHECK(minikd_load_file(path, &model, NULL, 0) == MINIKD_OK);
    minikd_free(model);
    damaged_files_are_refused_or_loaded(data, size, 500);
    free(data);
}

int main(int count, char **paths)
{
    for (int64_t k = 0; minikd_level(k); k++) {
        setenv("MINIKD_CPU", minikd_level(k), 1);
        all_networks_are_computed();
    }
    setenv("MINIKD_CPU", "none", 1);
    plan sealed = SMALL;
    sealed.version = 2;
    const file f = written(SMALL), g = written(sealed);
    minikd_model *model;
    CHECK(minikd_load_memory(f.data, f.size, &model, NULL, 0) == MINIKD_ERROR_ARGUMENT && !model);
    unsetenv("MINIKD_CPU");
    threads_share_a_model();
    class_names_come_back_whatever_they_are();
    headers_that_lie_are_refused();
    layers_that_lie_are_refused();
    a_byte_that_was_changed_breaks_the_seal();
    numbers_that_are_not_finite_are_refused();
    a_deviation_of_zero_is_refused();
    arguments_that_cannot_be_are_refused();
    damaged_files_are_refused_or_loaded(f.data, f.size, 3000);
    damaged_files_are_refused_or_loaded(g.data, g.size, 3000);
    free(f.data);
    free(g.data);
    for (int k = 1; k < count; k++)
        damaged_copies_of_a_file_are_refused_or_loaded(paths[k]);
    puts("all is as it must be");
    return EXIT_SUCCESS;
}
