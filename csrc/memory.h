/* Memory that a kernel needs beside its buffers, for the time of a call. */
#ifndef MINIKD_MEMORY_H
#define MINIKD_MEMORY_H

#include <stddef.h>

/* So many bytes, aligned as the widest vectors like it, or NULL if there is no memory. */
void *minikd_take_memory(size_t bytes);

/* Give them back; NULL is nothing. */
void minikd_give_memory(void *memory);

#endif
