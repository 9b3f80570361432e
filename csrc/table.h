/* What kernels.c gives to dispatch.c: for each level and number type a table of names and kernels. */
#ifndef MINIKD_TABLE_H
#define MINIKD_TABLE_H

#include <stddef.h>

#include "kernels.h"

typedef struct {
    const char *name;
    minikd_kernel *kernel;
} minikd_entry;

extern const minikd_entry minikd_base_float[], minikd_base_double[];
extern const minikd_entry minikd_v3_float[], minikd_v3_double[];
extern const minikd_entry minikd_v4_float[], minikd_v4_double[];

#endif
