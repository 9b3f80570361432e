/* One call of a kernel on several threads. */
#ifndef MINIKD_PARALLEL_H
#define MINIKD_PARALLEL_H

#include <stdint.h>

/* The items first … end - 1 of a kernel's work. `shared` is what all ranges of one call have in common. */
typedef void minikd_part(void *shared, int64_t first, int64_t end);

/* The most ranges that minikd_grain cuts work into, so that a caller may keep one partial result of each in an array. */
#define MINIKD_RANGES 64

/* How many items a range gets if one of them takes `ns` nanoseconds: all, at least 1, if the work is too little to be
 * shared, else enough to be worth a thread and a multiple of `multiple`. It depends on nothing else. */
int64_t minikd_grain(int64_t count, double ns, int64_t multiple);

/* Run `part` over [0, grain), [grain, 2·grain), … up to count, each once, in any order, and wait until all are done.
 *
 * The ranges do not depend on the number of threads. So neither does a result, if what a range writes depends on its
 * own items alone, and if partial results (of range first / grain) are put together in order afterwards. */
void minikd_parallel(minikd_part *part, void *shared, int64_t count, int64_t grain);

#endif
