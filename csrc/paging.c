/* paging.c: which pages of a mapped file are in memory, and bringing them there ahead of the first use. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dist_moe.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

typedef struct pages {
    uint8_t *first;
    size_t count, page_bytes;
} pages;

/* The whole pages that a run of bytes touches. */
static pages pages_of(const void *first, size_t bytes) {
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    size_t before = (uintptr_t)first % page_bytes;
    return (pages){(uint8_t *)first - before, (before + bytes + page_bytes - 1) / page_bytes, page_bytes};
}

int dm_is_absent(const void *first, size_t bytes, size_t stride) {
    pages all = pages_of(first, bytes);
    size_t step = stride < all.page_bytes ? 1 : stride / all.page_bytes;
    for (size_t page = 0; page < all.count; page += step) {
        unsigned char state;
        if (mincore(all.first + page * all.page_bytes, all.page_bytes, &state) == 0 && !(state & 1)) return 1;
    }
    return 0;
}

static void touch(const pages *all) {
    for (size_t page = 0; page < all->count; page++)
        (void)*(const volatile uint8_t *)(all->first + page * all->page_bytes);
}

int dm_populate(const void *first, size_t bytes) {
    pages all = pages_of(first, bytes);
    if (madvise(all.first, all.count * all.page_bytes, MADV_POPULATE_READ) == 0) return 0;
    if (errno != EINVAL) return errno;
    touch(&all);
    return 0;
}
