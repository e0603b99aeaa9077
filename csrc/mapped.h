/* mapped.h: a part of dist_moe.h: files that are mapped: what fails in them, and reading them ahead. */
#ifndef DM_MAPPED_H
#define DM_MAPPED_H
#include <stddef.h>
#include <stdint.h>

/* A tensor of a mapped file, and how to name what is in it. */
typedef struct dm_mapped_tensor {
    const void *first;
    size_t bytes;
    size_t row_bytes;
    const int64_t *unit_R; /* the unit in each row; NULL: the tensor is named as a whole */
    uint64_t units_per_expert;
    const char *label; /* each % is a number: unit / units_per_expert, then the remainder */
} dm_mapped_tensor;

typedef struct dm_mapped_file {
    struct dm_mapped_file *next; /* the list's own */
    const char *path;
    const void *first;
    size_t bytes;
    const dm_mapped_tensor *tensors;
    size_t tensor_count;
} dm_mapped_file;

/* Remember a mapped file and all that it points at, which must live until it is removed. */
void dm_mapped_file_add(dm_mapped_file *file);
void dm_mapped_file_remove(dm_mapped_file *file);
/* Which file and unit an address belongs to, as text that ends with 0; returns 0 if it is in none. */
int dm_describe_address(char *out, size_t out_bytes, const void *address);
/* From now on a SIGBUS in a remembered file waits for delay_ms, prints `before` and a sentence that names file and
 * unit, writes PMI-1's abort command to the file abort_fd (-1: none), and ends the process; so does a kernel that gets
 * no memory. Any other SIGBUS goes where it went before. Returns 0 with errno set on failure. */
int dm_catch_bus_errors(const char *before, int delay_ms, int exit_code, int abort_fd);
/* From now on a process that crashes (SIGSEGV) ends so much later, in which its other threads can speak; a handler that
 * somebody else has set stays. Returns 0 with errno set on failure. */
int dm_linger_after_crash(int milliseconds);

/* 1 if some page of a run of mapped bytes is not in memory, of which one in every `stride` bytes is looked at: each
 * look takes 0.4 us. 0 if the system does not tell; to a user who neither owns the file nor may write it, Linux calls
 * every page present. */
int dm_is_absent(const void *first, size_t bytes, size_t stride);
/* Read the pages of a run of bytes and enter them into this process's page table. Returns 0, or an error number: EFAULT
 * where the file cannot be read (before Linux 5.14 that is a SIGBUS). */
int dm_populate(const void *first, size_t bytes);

#endif
