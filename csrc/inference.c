/* The kernels that a network in use needs, and no others: what libminikd is built from instead of kernels.c.
 *
 * Compiled once for each number type and level of instructions, with the macros of kernels.c. */

#include "table.h"

#include "bias.inc.c"
#include "predictions.inc.c"
#include "products.inc.c"
#include "shapes.inc.c"
#include "softmax.inc.c"

const minikd_entry MINIKD_TABLE[] = {
    {"standardise", standardise},
    {"linear", linear},
    {"linear_relu", linear_relu},
    {"linear_tanh", linear_tanh},
    {"linear_sigmoid", linear_sigmoid},
    {"linear_gelu", linear_gelu},
    {"softmax", softmax},
    {"argmax", argmax},
    {NULL, NULL},
};
