/* All kernels for one number type and one level of instructions.
 *
 * Compiled once for each: MINIKD_DOUBLE chooses double instead of float, MINIKD_TABLE names the table that is the only
 * thing that others see of this file, and the compiler's options say which instructions may be used. */

#include "table.h"

#include "bias.inc.c"
#include "dropout.inc.c"
#include "losses.inc.c"
/* and what stands on it */
#include "divergences.inc.c"
#include "pictures.inc.c"
#include "predictions.inc.c"
#include "products.inc.c"
#include "shapes.inc.c"
#include "softmax.inc.c"
#include "teacher.inc.c"
#include "updates.inc.c"

const minikd_entry MINIKD_TABLE[] = {
    {"softmax", softmax},
    {"softmax_vjp", softmax_vjp},
    {"log_softmax", log_softmax},
    {"log_softmax_vjp", log_softmax_vjp},
    {"cross_entropy", cross_entropy},
    {"cross_entropy_vjp", row_loss_vjp},
    {"soft_cross_entropy", soft_cross_entropy},
    {"soft_cross_entropy_vjp", row_loss_vjp},
    {"kl_div", kl_div},
    {"kl_div_vjp", kl_div_vjp},
    {"distillation_loss", distillation_loss},
    {"distillation_loss_vjp", row_loss_vjp},
    {"reverse_kl", reverse_kl},
    {"reverse_kl_vjp", row_loss_vjp},
    {"jensen_shannon", jensen_shannon},
    {"jensen_shannon_vjp", row_loss_vjp},
    {"skewed_kl", skewed_kl},
    {"skewed_kl_vjp", row_loss_vjp},
    {"decoupled_kd", decoupled_kd},
    {"decoupled_kd_vjp", row_loss_vjp},
    {"standardised_kl", standardised_kl},
    {"standardised_kl_vjp", row_loss_vjp},
    {"bias", bias},
    {"bias_vjp", bias_vjp},
    {"bias_relu", bias_relu},
    {"bias_relu_vjp", bias_relu_vjp},
    {"bias_tanh", bias_tanh},
    {"bias_tanh_vjp", bias_tanh_vjp},
    {"bias_sigmoid", bias_sigmoid},
    {"bias_sigmoid_vjp", bias_sigmoid_vjp},
    {"bias_gelu", bias_gelu},
    {"bias_gelu_vjp", bias_gelu_vjp},
    {"matmul", matmul},
    {"matmul_vjp", matmul_vjp},
    {"linear", linear},
    {"linear_vjp", linear_vjp},
    {"linear_relu", linear_relu},
    {"linear_relu_vjp", linear_relu_vjp},
    {"linear_tanh", linear_tanh},
    {"linear_tanh_vjp", linear_tanh_vjp},
    {"linear_sigmoid", linear_sigmoid},
    {"linear_sigmoid_vjp", linear_sigmoid_vjp},
    {"linear_gelu", linear_gelu},
    {"linear_gelu_vjp", linear_gelu_vjp},
    {"sgd_step", sgd_step},
    {"adam_step", adam_step},
    {"clip_norm", clip_norm},
    {"dropout", dropout},
    {"dropout_vjp", dropout_vjp},
    {"shift_images", shift_images},
    {"take", take},
    {"take_vjp", take_vjp},
    {"take_scaled", take_scaled},
    {"take_index", take_index},
    {"add_into", add_into},
    {"copy", copy},
    {"scale", scale},
    {"scale_vjp", scale_vjp},
    {"standardise", standardise},
    {"advance", advance},
    {"set_scalar", set_scalar},
    {"argmax", argmax},
    {"correct_count", correct_count},
    {"teacher_confidence", teacher_confidence},
    {"corrected_logits", corrected_logits},
    {NULL, NULL},
};
