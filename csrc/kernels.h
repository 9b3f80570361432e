/* The kernels of minikd: what a call of one is, how a kernel is found, and how a list of calls is run.
 *
 * Plain C99 that knows nothing of Python. cffi reads this file too, without its lines that begin with #, so all that
 * stands here is declarations.
 */
#ifndef MINIKD_KERNELS_H
#define MINIKD_KERNELS_H

#include <stdint.h>

/* What a kernel returns. Any status above 0 is 1 + the first row (or place) whose label (or row number) is out of
 * range. A kernel that returns any but MINIKD_DONE and MINIKD_NO_MEMORY has written nothing. */
enum minikd_status {
    MINIKD_DONE = 0,
    MINIKD_BAD_TEMPERATURE = -1,
    MINIKD_NO_MEMORY = -2
};

/* How row losses become one: their mean, their sum, or not at all. */
enum minikd_reduction {
    MINIKD_MEAN,
    MINIKD_SUM,
    MINIKD_NONE,
    MINIKD_BATCHMEAN
};

/* The attributes of all operations under their own names; a kernel reads those of its operation. */
typedef struct minikd_attributes {
    uint64_t seed;
    uint64_t stream;
    int64_t ignore_index;
    int64_t width;
    int64_t most;
    double label_smoothing;
    double momentum;
    double weight_decay;
    double beta1;
    double beta2;
    double eps;
    double p;
    double limit;
    enum minikd_reduction reduction;
    _Bool scale_t2;
    _Bool log_target;
    _Bool nesterov;
    _Bool decoupled;
    _Bool continuous;
    _Bool reverse;
} minikd_attributes;

typedef struct minikd_call minikd_call;
typedef int64_t minikd_kernel(const minikd_call *call);

/* One call of a kernel: a list of these is a whole training step.
 *
 * buffer: in the order of the operation's signature, outputs, saved values, inputs, and before them in a vjp the
 * gradients of the inputs and of the outputs; NULL for one that nobody needs. size: the value of each letter of the
 * signature, in order of first appearance. Whatever may change between two runs of a list is read from a buffer. */
struct minikd_call {
    minikd_kernel *kernel;
    void *buffer[16];
    int64_t size[4];
    minikd_attributes attribute;
};

/* Run calls in order, up to the first whose status is not MINIKD_DONE; returns the last status. `done`, if not NULL,
 * becomes the number of calls that were completed. */
int64_t minikd_run(const minikd_call *calls, int64_t count, int64_t *done);

/* What is copied before or after each round of a list: `bytes` from one place to another, both of which move on by
 * their stride from one round to the next. */
typedef struct minikd_copy {
    void *to;
    const void *from;
    int64_t bytes, to_stride, from_stride;
} minikd_copy;

/* Run a list of calls `rounds` times, each round between its `inputs` and its `outputs`; returns the last status.
 * `done[0]` becomes the number of rounds that were completed, `done[1]` that of calls in the round after them. */
int64_t minikd_repeat(const minikd_call *calls, int64_t count, const minikd_copy *inputs, int64_t input_count,
                      const minikd_copy *outputs, int64_t output_count, int64_t rounds, int64_t *done);

/* The names of the kernels, k = 0, 1, …; NULL behind the last. */
const char *minikd_name(int64_t k);

/* The levels of instructions that this processor runs and that were compiled, k = 0, 1, …, slowest first; NULL
 * behind the last. There is always "base"; on x86-64 there may be "v3" (AVX2, FMA) and "v4" (AVX-512). */
const char *minikd_level(int64_t k);

/* How many threads a call may use where that pays, the calling one among them; 1 before it is set. No result depends
 * on it. A number out of range is taken as the nearest that is not; where threads cannot be had it stays 1. */
void minikd_set_threads(int64_t n);
int64_t minikd_threads(void);

/* A function of a BLAS, under a type that is as good as any: it is called under its own. */
typedef void minikd_gemm(void);

/* Let products run in a BLAS: its sgemm and dgemm with Fortran's interface, whose integers have 32 or 64 bits. With
 * `always` it computes every product, else those that it is faster at than our own code. Before this is called, and after
 * a call with NULL, every product is our own. Not to be called while kernels run. */
void minikd_use_blas(minikd_gemm *sgemm, minikd_gemm *dgemm, int integer_bits, _Bool always);

/* The kernel of this name for double or float, compiled for this level; NULL if there is none. */
minikd_kernel *minikd_find(const char *name, int is_double, const char *level);

#endif
