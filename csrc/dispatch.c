/* Which kernels there are, which of them this processor runs, and the loop that runs a list of calls.
 *
 * MINIKD_V3 and MINIKD_V4 are defined where kernels.c was compiled for those levels too. */

#include <string.h>

#include "table.h"

typedef struct {
    const char *name;
    const minikd_entry *of_float, *of_double;
} level;

static const level LEVELS[] = {
    {"base", minikd_base_float, minikd_base_double},
#ifdef MINIKD_V3
    {"v3", minikd_v3_float, minikd_v3_double},
#endif
#ifdef MINIKD_V4
    {"v4", minikd_v4_float, minikd_v4_double},
#endif
    {NULL, NULL, NULL},
};

/* How many of these levels the processor runs (and the operating system keeps the registers of). */
static int64_t usable_levels(void)
{
    int64_t count = 1;
#ifdef MINIKD_V3
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi")
        || !__builtin_cpu_supports("bmi2"))
        return count;
    count++;
#endif
#ifdef MINIKD_V4
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512cd")
        || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return count;
    count++;
#endif
    return count;
}

int64_t minikd_run(const minikd_call *calls, int64_t count, int64_t *done)
{
    int64_t status = MINIKD_DONE, k = 0;
    for (; k < count; k++) {
        status = calls[k].kernel(&calls[k]);
        if (status != MINIKD_DONE)
            break;
    }
    if (done)
        *done = k;
    return status;
}

static void copy_for_round(const minikd_copy *copies, int64_t count, int64_t round)
{
    for (int64_t k = 0; k < count; k++) {
        const minikd_copy *c = &copies[k];
        memcpy((char *)c->to + round * c->to_stride, (const char *)c->from + round * c->from_stride, (size_t)c->bytes);
    }
}

int64_t minikd_repeat(const minikd_call *calls, int64_t count, const minikd_copy *inputs, int64_t input_count,
                      const minikd_copy *outputs, int64_t output_count, int64_t rounds, int64_t *done)
{
    for (done[0] = 0; done[0] < rounds; done[0]++) {
        copy_for_round(inputs, input_count, done[0]);
        const int64_t status = minikd_run(calls, count, &done[1]);
        if (status != MINIKD_DONE)
            return status;
        copy_for_round(outputs, output_count, done[0]);
    }
    return MINIKD_DONE;
}

const char *minikd_name(int64_t k)
{
    return minikd_base_float[k].name;
}

const char *minikd_level(int64_t k)
{
    return k < usable_levels() ? LEVELS[k].name : NULL;
}

minikd_kernel *minikd_find(const char *name, int is_double, const char *wanted)
{
    for (int64_t k = 0; k < usable_levels(); k++) {
        if (strcmp(LEVELS[k].name, wanted) != 0)
            continue;
        for (const minikd_entry *entry = is_double ? LEVELS[k].of_double : LEVELS[k].of_float; entry->name; entry++)
            if (strcmp(entry->name, name) == 0)
                return entry->kernel;
    }
    return NULL;
}
