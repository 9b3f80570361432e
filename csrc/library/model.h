/* A network in memory, which never changes after it was read. */
#ifndef MINIKD_MODEL_H
#define MINIKD_MODEL_H

#include "json.h"
#include "kernels.h"
#include "report.h"

/* One product, with its bias and activation. */
typedef struct {
    minikd_kernel *kernel;
    int saves_product; /* the kernel has a buffer for the product behind its result */
    int64_t inputs, outputs;
    void *weight, *bias; /* (outputs, inputs) and (outputs) */
} minikd_layer;

/* All numbers are float or all are double. */
struct minikd_model {
    int is_double;
    int64_t layer_count;
    minikd_layer *layers;
    void *mean, *deviation; /* of the features; NULL where these are taken as they are */
    minikd_kernel *standardise, *softmax, *argmax;
    int64_t widest;           /* the most numbers that a row has anywhere on its way */
    minikd_text *class_names; /* which lie in `texts` */
    char *texts;
};

/* The bytes of a number of the model. */
size_t minikd_number_size(const minikd_model *model);

/* Build the model that the bytes of a file describe; `model` is NULL unless all is well. */
minikd_error minikd_read_model(minikd_model **model, const unsigned char *data, size_t size, minikd_report report);

#endif
