/* The last block that was given back is kept for the next call that wants one.
 *
 * Without that, a C library hands large blocks back to the system at once, and takes fresh pages from it for the next
 * call, each of which is cleared first: that can take longer than the call itself. */

#include "memory.h"

#include <stdint.h>
#include <stdlib.h>

#define ALIGNMENT 64
#define MOST_KEPT ((size_t)1 << 25) /* bytes of a block that is kept */

/* What stands before the memory that is handed out. */
typedef struct {
    void *whole; /* as malloc gave it */
    size_t bytes;
} header;

#ifdef __GNUC__
static void *kept;

static void *exchange_kept(void *memory)
{
    return __atomic_exchange_n(&kept, memory, __ATOMIC_ACQ_REL);
}
#else
static void *exchange_kept(void *memory)
{
    return memory; /* nothing is kept */
}
#endif

static header *header_of(void *memory)
{
    return (header *)memory - 1;
}

static void forget(void *memory)
{
    if (memory)
        free(header_of(memory)->whole);
}

void *minikd_take_memory(size_t bytes)
{
    void *memory = exchange_kept(NULL);
    if (memory && header_of(memory)->bytes >= bytes)
        return memory;
    forget(memory);
    char *whole = bytes < SIZE_MAX - 2 * ALIGNMENT ? malloc(bytes + 2 * ALIGNMENT) : NULL;
    if (!whole)
        return NULL;
    memory = whole + 2 * ALIGNMENT - (uintptr_t)whole % ALIGNMENT; /* at least one line for the header */
    *header_of(memory) = (header){whole, bytes};
    return memory;
}

void minikd_give_memory(void *memory)
{
    if (memory && header_of(memory)->bytes <= MOST_KEPT)
        memory = exchange_kept(memory);
    forget(memory);
}
