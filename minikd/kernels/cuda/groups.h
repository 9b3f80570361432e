/* What all kernels share: groups of threads that work on one row, which elements of it each thread has, and numbers
 * that the host gives.
 *
 * Whatever is added up is added up in an order that depends on shapes alone: each thread its elements one after the
 * other, then the lanes of a warp in pairs, then the warps in their order. So a result has the same bits each time. */
#ifndef MINIKD_GROUPS_H
#define MINIKD_GROUPS_H

#include "elements.h"

#define ALL_LANES 0xffffffffu
#define LANES_OF_WARP 32
#define MOST_WARPS 32
#define TOGETHER 32 /* elements that are added up in real before their sum is added up in double */

/* A number that the host gives: where it stands in the device's memory, or if that is null, the number itself. A
 * counter is another such pair, of int64. In lists of parameters each is two. */
#define NUMBER(type, name) const type *name##_at, type name##_value
#define GIVEN(name) (name##_at ? *name##_at : name##_value)

typedef long long whole; /* int64, under one name for all compilers */

/* How row losses become one; the order is that of minikd_reduction in C. */
enum reduction { MEAN, SUM, NONE, BATCHMEAN };

/* --- several numbers in one access of 16 bytes --- */

#ifdef MINIKD_DOUBLE
#define PER_VECTOR 2
typedef double2 vector;
#else
#define PER_VECTOR 4
typedef float4 vector;
#endif

INLINE bool aligned(const void *at)
{
    return (uint64_t)at % sizeof(vector) == 0;
}

/* Whether every row of c numbers behind `at` begins where a vector may. */
INLINE bool rows_aligned(const void *at, whole c)
{
    return aligned(at) && c % PER_VECTOR == 0;
}

INLINE void load_vector(real *to, const real *from)
{
    const vector v = *(const vector *)from;
    memcpy(to, &v, sizeof v);
}

INLINE void store_vector(real *to, const real *from)
{
    vector v;
    memcpy(&v, from, sizeof v);
    *(vector *)to = v;
}

INLINE real larger(real a, real b)
{
    return a > b ? a : b;
}

/* exp((z - max z)/T) */
INLINE real weight_of(real below_top, real inverse_t)
{
    return REAL(exp)(below_top * inverse_t);
}

/* --- groups --- */

/* The 32 threads of a warp, which have a row to themselves. */
struct Warp {
    static const int size = LANES_OF_WARP;

    __device__ __forceinline__ int rank() const
    {
        return (int)(threadIdx.x % LANES_OF_WARP);
    }

    __device__ __forceinline__ double sum(double x) const
    {
#pragma unroll
        for (int apart = LANES_OF_WARP / 2; apart > 0; apart /= 2)
            x += __shfl_xor_sync(ALL_LANES, x, apart);
        return x;
    }

    /* The largest; NaN is passed over. */
    __device__ __forceinline__ real largest(real x) const
    {
#pragma unroll
        for (int apart = LANES_OF_WARP / 2; apart > 0; apart /= 2)
            x = larger(__shfl_xor_sync(ALL_LANES, x, apart), x);
        return x;
    }

    __device__ __forceinline__ whole smallest(whole x) const
    {
#pragma unroll
        for (int apart = LANES_OF_WARP / 2; apart > 0; apart /= 2) {
            const whole other = __shfl_xor_sync(ALL_LANES, x, apart);
            x = other < x ? other : x;
        }
        return x;
    }

    /* What a function finds, which all threads of the group get. */
    template <class Found, class F> __device__ __forceinline__ Found once(F find) const
    {
        return find();
    }
};

/* What a block's warps tell one another. */
struct Told {
    double of_warp[MOST_WARPS];
    double found[16];
};

/* All threads of a block. `told` is in shared memory. */
struct Block {
    Told *told;

    __device__ __forceinline__ explicit Block(Told *told) : told(told) {}

    __device__ __forceinline__ int rank() const
    {
        return (int)threadIdx.x;
    }

    __device__ __forceinline__ int warps() const
    {
        return (int)(blockDim.x / LANES_OF_WARP);
    }

    /* Hand out what a warp found; all may read it until `gathered`. */
    template <class T> __device__ __forceinline__ const T *gather(T x) const
    {
        T *place = (T *)told->of_warp;
        if (threadIdx.x % LANES_OF_WARP == 0)
            place[threadIdx.x / LANES_OF_WARP] = x;
        __syncthreads();
        return place;
    }

    __device__ __forceinline__ void gathered() const
    {
        __syncthreads();
    }

    __device__ __forceinline__ double sum(double x) const
    {
        const double *part = gather(Warp().sum(x));
        double total = part[0];
        for (int k = 1; k < warps(); k++)
            total += part[k];
        gathered();
        return total;
    }

    __device__ __forceinline__ real largest(real x) const
    {
        const real *part = gather(Warp().largest(x));
        real top = part[0];
        for (int k = 1; k < warps(); k++)
            top = larger(part[k], top);
        gathered();
        return top;
    }

    __device__ __forceinline__ whole smallest(whole x) const
    {
        const whole *part = gather(Warp().smallest(x));
        whole least = part[0];
        for (int k = 1; k < warps(); k++)
            least = part[k] < least ? part[k] : least;
        gathered();
        return least;
    }

    /* One warp works it out: double is slow on many cards. */
    template <class Found, class F> __device__ __forceinline__ Found once(F find) const
    {
        static_assert(sizeof(Found) <= sizeof told->found, "more room is needed for what is found");
        if (threadIdx.x < LANES_OF_WARP) {
            const Found found = find();
            if (threadIdx.x == 0)
                memcpy(told->found, &found, sizeof found);
        }
        __syncthreads();
        Found found;
        memcpy(&found, told->found, sizeof found);
        __syncthreads();
        return found;
    }
};

/* --- which elements of a row a thread has --- */

/* ITEMS of a row of up to ITEMS·SIZE classes, SIZE being the threads of the group, in steps of V neighbours. Element k
 * of a thread is class `place(k)`. */
template <int SIZE, int ITEMS, int V> struct Spread {
    int rank, c;

    __device__ __forceinline__ Spread(int rank, whole c) : rank(rank), c((int)c) {}

    __device__ __forceinline__ int place(int k) const
    {
        return (k / V * SIZE + rank) * V + k % V;
    }

    /* f(k, j) for each element k, which is class j. */
    template <class F> __device__ __forceinline__ void each(F f) const
    {
#pragma unroll
        for (int k = 0; k < ITEMS; k++)
            if (place(k) < c)
                f(k, place(k));
    }

    /* The same, and `pause` so often that no more than TOGETHER elements lie between two. */
    template <class F, class P> __device__ __forceinline__ void each(F f, P pause) const
    {
        static_assert(ITEMS <= TOGETHER, "more elements would be added up in real");
        each(f);
        pause();
    }

    /* to[j] = f(k, j) */
    template <class F> __device__ __forceinline__ void write(real *to, bool in_vectors, F f) const
    {
#pragma unroll
        for (int first = 0; first < ITEMS; first += V) {
            const int at = place(first);
            real x[V];
#pragma unroll
            for (int v = 0; v < V; v++)
                x[v] = at + v < c ? f(first + v, at + v) : 0;
            if (V == PER_VECTOR && in_vectors && at < c) {
                store_vector(to + at, x);
                continue;
            }
#pragma unroll
            for (int v = 0; v < V; v++)
                if (at + v < c)
                    to[at + v] = x[v];
        }
    }
};

/* Every size-th element of a row of any length, from the class `first` on; all are the thread's element `number`. */
struct Strided {
    int first, size, c, number;

    __device__ __forceinline__ Strided(int first, int size, whole c, int number = 0)
        : first(first), size(size), c((int)c), number(number)
    {
    }

    template <class F> __device__ __forceinline__ void each(F f) const
    {
        for (int j = first; j < c; j += size)
            f(number, j);
    }

    template <class F, class P> __device__ __forceinline__ void each(F f, P pause) const
    {
        for (int j = first; j < c;) {
            for (int k = 0; k < TOGETHER && j < c; k++, j += size)
                f(number, j);
            pause();
        }
    }

    template <class F> __device__ __forceinline__ void write(real *to, bool, F f) const
    {
        for (int j = first; j < c; j += size)
            to[j] = f(number, j);
    }
};

/* The first ITEMS·SIZE classes of a row spread over the group, and whatever is behind them strided, as element ITEMS. */
template <int SIZE, int ITEMS> struct SpreadAndStrided {
    enum { before = SIZE * ITEMS };
    Spread<SIZE, ITEMS, 1> head;
    Strided tail;

    __device__ __forceinline__ SpreadAndStrided(int rank, whole c)
        : head(rank, c), tail(before + rank, SIZE, c, ITEMS)
    {
    }

    template <class F> __device__ __forceinline__ void each(F f) const
    {
        head.each(f);
        tail.each(f);
    }

    template <class F, class P> __device__ __forceinline__ void each(F f, P pause) const
    {
        head.each(f, pause);
        tail.each(f, pause);
    }

    template <class F> __device__ __forceinline__ void write(real *to, bool in_vectors, F f) const
    {
        head.write(to, in_vectors, f);
        tail.write(to, in_vectors, f);
    }
};

/* --- where a row is while its kernel runs; at(k, j) is class j, which is the thread's element k --- */

/* In the registers of a group. */
template <int ITEMS> struct InRegisters {
    real x[ITEMS];

    template <int SIZE, int V>
    __device__ __forceinline__ InRegisters(const Spread<SIZE, ITEMS, V> &spread, const real *row, bool in_vectors)
    {
#pragma unroll
        for (int first = 0; first < ITEMS; first += V) {
            const int at = spread.place(first);
            if (V == PER_VECTOR && in_vectors) {
                if (at < spread.c)
                    load_vector(x + first, row + at);
                continue;
            }
#pragma unroll
            for (int v = 0; v < V; v++)
                if (at + v < spread.c)
                    x[first + v] = row[at + v];
        }
    }

    __device__ __forceinline__ real at(int k, int) const
    {
        return x[k];
    }
};

/* In memory, shared or not. A thread that has written its elements of a copy reads no others. */
struct InMemory {
    const real *row;

    __device__ __forceinline__ explicit InMemory(const real *row) : row(row) {}

    template <class Layout>
    __device__ __forceinline__ InMemory(const Layout &layout, real *copy, const real *row) : row(copy)
    {
        layout.each([&](int, int j) { copy[j] = row[j]; });
    }

    __device__ __forceinline__ real at(int, int j) const
    {
        return row[j];
    }
};

/* The first ITEMS elements of each thread in registers, whatever is behind them in a copy in shared memory. */
template <int ITEMS> struct InBoth {
    InRegisters<ITEMS> head;
    const real *tail;
    int before;

    template <int SIZE>
    __device__ __forceinline__ InBoth(const SpreadAndStrided<SIZE, ITEMS> &layout, real *copy, const real *row)
        : head(layout.head, row, false), tail(copy), before(layout.before)
    {
        layout.tail.each([&](int, int j) { copy[j - layout.before] = row[j]; });
    }

    __device__ __forceinline__ real at(int k, int j) const
    {
        return k < ITEMS ? head.at(k, j) : tail[j - before];
    }
};

/* The largest score of a row; NaN is passed over. */
template <class Group, class Layout, class Row>
static __device__ __forceinline__ real maximum(const Group &group, const Layout &layout, const Row &z)
{
    real top = -(real)INFINITY;
    layout.each([&](int k, int j) { top = larger(z.at(k, j), top); });
    return group.largest(top);
}

/* Which row a warp has, where each warp of a block has one. */
INLINE whole row_of_warp(void)
{
    return (whole)blockIdx.x * (blockDim.x / LANES_OF_WARP) + threadIdx.x / LANES_OF_WARP;
}

/* --- what is wrong with labels and row numbers --- */

/* The first thing that was refused since the host last looked: 1 + the place, what stood there, and the number of the
 * call that it stood in. All 0 if nothing was. */
struct Refused {
    whole place, value, call;
};

INLINE void refuse(Refused *refused, whole place, whole value, whole call)
{
    if (refused->place == 0) {
        refused->place = place + 1;
        refused->value = value;
        refused->call = call;
    }
}

#define NOWHERE 0x7fffffffffffffffll

#endif
