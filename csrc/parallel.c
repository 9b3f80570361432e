/* A small pool of threads that take ranges of a call's work, beside the thread that calls.
 *
 * The threads are started by the first call that needs them, wait on a condition variable, and live as long as the
 * process. One call at a time has them; another that comes meanwhile runs on its own thread alone. A child made by
 * fork starts with no threads and an idle pool. This is why it is no OpenMP: that hangs in such a child.
 *
 * Without POSIX threads, or with a compiler whose atomics are others, everything here runs on the calling thread. */

#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L
#endif

#include "parallel.h"

#include "kernels.h"

/* Measured with two threads: waking another costs the caller 5 µs, and it comes after 35 µs, so that sharing breaks
 * even at 50 µs of work. Ranges much shorter than the wait let the caller go on meanwhile and both end together. */
#define WORTH_NS 100000.0
#define RANGE_NS 15000.0
#define MOST_THREADS 256

int64_t minikd_grain(int64_t count, double ns, int64_t multiple)
{
    const double work = (double)count * ns, parts = work / RANGE_NS;
    if (work < WORTH_NS)
        return count > 0 ? count : 1;
    const int64_t ranges = parts < MINIKD_RANGES ? (int64_t)parts : MINIKD_RANGES;
    const int64_t least = count / ranges + (count % ranges != 0);
    const int64_t grain = (least / multiple + (least % multiple != 0)) * multiple;
    return grain;
}

static void one_range(minikd_part *part, void *shared, int64_t first, int64_t count, int64_t grain)
{
    part(shared, first, count - first < grain ? count : first + grain);
}

static void serially(minikd_part *part, void *shared, int64_t count, int64_t grain)
{
    for (int64_t first = 0; first < count; first += grain)
        one_range(part, shared, first, count, grain);
}

#if defined(__GNUC__) && (defined(__unix__) || defined(__APPLE__))

#include <pthread.h>
#include <signal.h>

#define STACK_SIZE (1 << 20) /* of a thread, in bytes: kernels keep blocks on the stack, and musl gives 128 KiB */
#define SPINS 2000           /* looks at the last ranges of others, some microseconds, before the caller sleeps */

static int64_t wanted = 1; /* threads that a call may use, the calling one among them */

static pthread_mutex_t taken; /* held by the call that has the pool; for `started` */
static pthread_mutex_t lock;  /* for places and working, and for handing over the job */
static pthread_cond_t work_came, work_done;
static int64_t started; /* threads that live, beside the calling ones */
static int64_t places;  /* threads that may still join the call in work */
static int64_t working; /* threads that have joined it */

/* The call in work; next is the first item that nobody has taken yet. */
static struct {
    minikd_part *part;
    void *shared;
    int64_t count, grain;
} job;
static int64_t next;

/* An idle pool without threads: before the first use, and in the child of a fork, whatever other threads were doing
 * in the parent. */
static void reset(void)
{
    pthread_mutex_init(&taken, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work_came, NULL);
    pthread_cond_init(&work_done, NULL);
    started = places = working = 0;
}

static void prepare(void)
{
    reset();
    pthread_atfork(NULL, NULL, reset);
}

static void take_ranges(void)
{
    for (;;) {
        const int64_t first = __atomic_fetch_add(&next, job.grain, __ATOMIC_RELAXED);
        if (first >= job.count)
            return;
        one_range(job.part, job.shared, first, job.count, job.grain);
    }
}

static void *work(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (places == 0)
            pthread_cond_wait(&work_came, &lock);
        places--;
        __atomic_fetch_add(&working, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&lock);
        take_ranges();
        pthread_mutex_lock(&lock);
        places = 0; /* nothing is left for those that have not come yet */
        if (__atomic_sub_fetch(&working, 1, __ATOMIC_RELEASE) == 0)
            pthread_cond_signal(&work_done);
    }
    return NULL;
}

/* Start threads until there are `count`, or as many as the system gives. They leave all signals to the others. */
static void start(int64_t count)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (started >= count || pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    sigfillset(&all);
    for (int k = 0; k < 4; k++) /* but a fault of its own is reported where it happens */
        sigdelset(&all, (const int[]){SIGSEGV, SIGBUS, SIGFPE, SIGILL}[k]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < count && pthread_create(&thread, &attributes, work, NULL) == 0)
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Wait until no other thread works on the call; from then on none can join it. */
static void finish(void)
{
    for (int k = 0; k < SPINS && __atomic_load_n(&working, __ATOMIC_ACQUIRE) != 0; k++)
        ;
    pthread_mutex_lock(&lock);
    places = 0;
    while (working != 0)
        pthread_cond_wait(&work_done, &lock);
    pthread_mutex_unlock(&lock);
}

void minikd_parallel(minikd_part *part, void *shared, int64_t count, int64_t grain)
{
    static pthread_once_t prepared = PTHREAD_ONCE_INIT;
    const int64_t threads = minikd_threads();
    if (count <= grain || threads == 1) {
        serially(part, shared, count, grain);
        return;
    }
    pthread_once(&prepared, prepare);
    if (pthread_mutex_trylock(&taken) != 0) {
        serially(part, shared, count, grain);
        return;
    }
    const int64_t others = (count - 1) / grain; /* ranges beside the calling thread's first */
    const int64_t helpers = others < threads - 1 ? others : threads - 1;
    start(helpers);
    pthread_mutex_lock(&lock);
    job.part = part;
    job.shared = shared;
    job.count = count;
    job.grain = grain;
    next = 0;
    places = helpers;
    pthread_mutex_unlock(&lock);
    for (int64_t k = 0; k < helpers; k++)
        pthread_cond_signal(&work_came);
    take_ranges();
    finish();
    pthread_mutex_unlock(&taken);
}

int64_t minikd_threads(void)
{
    return __atomic_load_n(&wanted, __ATOMIC_RELAXED);
}

void minikd_set_threads(int64_t n)
{
    __atomic_store_n(&wanted, n < 1 ? 1 : n > MOST_THREADS ? MOST_THREADS : n, __ATOMIC_RELAXED);
}

#else

void minikd_parallel(minikd_part *part, void *shared, int64_t count, int64_t grain)
{
    serially(part, shared, count, grain);
}

int64_t minikd_threads(void)
{
    return 1;
}

void minikd_set_threads(int64_t n)
{
    (void)n;
}

#endif
