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

/* Pages whose state is asked for at once. */
#define ASKED_PAGES 4096

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

size_t dm_absent_bytes(const void *first, size_t bytes) {
    pages all = pages_of(first, bytes);
    unsigned char state[ASKED_PAGES];
    size_t absent = 0;
    for (size_t page = 0; page < all.count; page += ASKED_PAGES) {
        size_t count = all.count - page < ASKED_PAGES ? all.count - page : ASKED_PAGES;
        if (mincore(all.first + page * all.page_bytes, count * all.page_bytes, state) != 0) return 0;
        for (size_t i = 0; i < count; i++) absent += !(state[i] & 1);
    }
    return absent * all.page_bytes;
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
