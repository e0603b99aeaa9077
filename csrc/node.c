/* node.c: collectives of the ranks of one host through shared memory, without MPI.
 *
 * Every rank has two slots. A message goes into one of them, all ranks meet, and each reads what it needs: one meeting
 * per message. The other slot takes the next message: whoever writes a slot again has met all ranks since they read
 * it. A waiting rank spins for `spins` pauses, or yields its core some times, then sleeps on a futex until the last one
 * arrives.
 *
 * Where every rank has a core, each adds up all slots for itself; sums of many elements are cut into one slice per
 * rank, which costs a second meeting but reads each slot once. Where ranks share cores (`spins` is 0), time is the sum
 * of all ranks' work: the last one to arrive adds up for all, and the others copy.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dist_moe.h"

#define LINE 64
/* From this many bytes on a sum is cut into slices, if three or more ranks share it. */
#define SLICED_BYTES 65536
/* Ranks that share cores give theirs away this often before they sleep. 4 and 8 ranks on 2 cores, 16 KB: 16 and 37 us
 * instead of 45 and 80 with none; 200 are no better for 4 and cost 8 ranks 120 us or more. */
#define YIELDS 40

/* The beginning of the shared memory. */
typedef struct meeting {
    _Alignas(LINE) _Atomic uint32_t arrived;
    _Alignas(LINE) _Atomic uint32_t round; /* the futex */
    _Atomic uint32_t sleepers;
    uint32_t spins; /* the first rank's, for all */
} meeting;

struct dm_node {
    meeting *shared;
    uint8_t *slots;
    size_t mapped_bytes;
    int file; /* the owner's, until all have opened it; else -1 */
    size_t rank, ranks;
    uint32_t parity;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

/* Two slots of every rank, then two for the sums of crowded ranks. */
static size_t shared_bytes(size_t ranks) { return sizeof(meeting) + (ranks + 1) * 2 * DM_NODE_SLOT_BYTES; }

/* Every page is reserved now, where a later page fault would be a SIGBUS. */
static void *map_file(int file, size_t bytes, int reserve) {
    int error = reserve ? posix_fallocate(file, 0, (off_t)bytes) : 0;
    if (error == 0) {
        void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory != MAP_FAILED) return memory;
        error = errno;
    }
    errno = error;
    return NULL;
}

static dm_node *make_node(void *memory, size_t rank, size_t ranks) {
    dm_node *node = memory == NULL ? NULL : calloc(1, sizeof *node);
    if (node == NULL) return NULL;
    *node = (dm_node){.shared = memory,
                      .slots = (uint8_t *)memory + sizeof(meeting),
                      .mapped_bytes = shared_bytes(ranks),
                      .file = -1,
                      .rank = rank,
                      .ranks = ranks};
    return node;
}

/* A file without a name in any directory: however the job is killed, it goes with the last rank that has it open. */
dm_node *dm_node_create(const char *name, size_t ranks, size_t spins) {
    int file = memfd_create(name, MFD_CLOEXEC);
    if (file < 0) return NULL;
    dm_node *node = make_node(map_file(file, shared_bytes(ranks), 1), 0, ranks);
    if (node == NULL) {
        int error = errno;
        close(file);
        errno = error;
        return NULL;
    }
    node->file = file;
    node->shared->spins = (uint32_t)spins;
    return node;
}

int dm_node_file(const dm_node *node) { return node->file; }

/* Whether the link leads to the file of that name. Where the owner has another view of the processes (containers), its
 * path may lead to someone else's. */
static int leads_to(const char *path, const char *name) {
    char found[256], wanted[256];
    ssize_t length = readlink(path, found, sizeof found - 1);
    if (length < 0) return 0;
    found[length] = 0;
    snprintf(wanted, sizeof wanted, "/memfd:%s (deleted)", name);
    errno = ENOENT;
    return strcmp(found, wanted) == 0;
}

dm_node *dm_node_open(const char *path, const char *name, size_t rank, size_t ranks) {
    if (!leads_to(path, name)) return NULL;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return NULL;
    dm_node *node = make_node(map_file(file, shared_bytes(ranks), 0), rank, ranks);
    int error = errno;
    close(file);
    errno = error;
    return node;
}

void dm_node_close_file(dm_node *node) {
    if (node->file >= 0) close(node->file);
    node->file = -1;
}

void dm_node_close(dm_node *node) {
    if (node == NULL) return;
    dm_node_close_file(node);
    munmap(node->shared, node->mapped_bytes);
    free(node);
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* Arrive at a meeting whose round is `round`. Returns 1 to the last rank, which then opens the doors. */
static int arrive(dm_node *node) { return atomic_fetch_add(&node->shared->arrived, 1) + 1 == node->ranks; }

static void open_doors(dm_node *node, uint32_t round) {
    meeting *shared = node->shared;
    atomic_store(&shared->arrived, 0);
    atomic_store(&shared->round, round + 1);
    if (atomic_load(&shared->sleepers) > 0) wake_all(&shared->round);
}

static void wait_for_doors(dm_node *node, uint32_t round) {
    meeting *shared = node->shared;
    for (size_t i = 0; i < shared->spins; i++) {
        if (atomic_load_explicit(&shared->round, memory_order_acquire) != round) return;
        pause_briefly();
    }
    for (int i = 0; shared->spins == 0 && i < YIELDS; i++) {
        if (atomic_load_explicit(&shared->round, memory_order_acquire) != round) return;
        sched_yield();
    }
    atomic_fetch_add(&shared->sleepers, 1);
    while (atomic_load(&shared->round) == round) sleep_while(&shared->round, round);
    atomic_fetch_sub(&shared->sleepers, 1);
}

/* Returns when every rank has called it. */
static void meet(dm_node *node) {
    uint32_t round = atomic_load(&node->shared->round);
    if (arrive(node)) {
        open_doors(node, round);
    } else {
        wait_for_doors(node, round);
    }
}

static uint8_t *slot(const dm_node *node, size_t rank) {
    return node->slots + (rank * 2 + node->parity) * DM_NODE_SLOT_BYTES;
}

/* Signed overflow wraps: such a sum is out of range and is reported when it is used. */
static void add(int64_t *to, const int64_t *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] = (int64_t)((uint64_t)to[i] + (uint64_t)from[i]);
}

static size_t slice_first(const dm_node *node, size_t rank, size_t count) { return rank * count / node->ranks; }

/* Each rank sums its slice of all slots into its own slot; all then read the slices. */
static void sum_in_slices(dm_node *node, int64_t *values, size_t count) {
    size_t first = slice_first(node, node->rank, count), last = slice_first(node, node->rank + 1, count);
    int64_t *own = (int64_t *)slot(node, node->rank);
    for (size_t rank = 0; rank < node->ranks; rank++) {
        if (rank != node->rank) add(own + first, (const int64_t *)slot(node, rank) + first, last - first);
    }
    meet(node);
    for (size_t rank = 0; rank < node->ranks; rank++) {
        first = slice_first(node, rank, count);
        last = slice_first(node, rank + 1, count);
        memcpy(values + first, (const int64_t *)slot(node, rank) + first, (last - first) * sizeof *values);
    }
}

/* The last rank to arrive adds up all slots, the others copy its sums. */
static void sum_by_the_last(dm_node *node, int64_t *values, size_t count) {
    uint32_t round = atomic_load(&node->shared->round);
    void *total = slot(node, node->ranks);
    if (!arrive(node)) {
        wait_for_doors(node, round);
        memcpy(values, total, count * sizeof *values);
        return;
    }
    for (size_t rank = 0; rank < node->ranks; rank++) {
        if (rank != node->rank) add(values, (const int64_t *)slot(node, rank), count);
    }
    memcpy(total, values, count * sizeof *values);
    open_doors(node, round);
}

static void sum_piece(dm_node *node, int64_t *values, size_t count) {
    memcpy(slot(node, node->rank), values, count * sizeof *values);
    if (node->shared->spins == 0) {
        sum_by_the_last(node, values, count);
        node->parity ^= 1;
        return;
    }
    meet(node);
    if (node->ranks > 2 && count * sizeof *values >= SLICED_BYTES) {
        sum_in_slices(node, values, count);
    } else {
        for (size_t rank = 0; rank < node->ranks; rank++) {
            if (rank != node->rank) add(values, (const int64_t *)slot(node, rank), count);
        }
    }
    node->parity ^= 1;
}

void dm_node_sum(dm_node *node, int64_t *values, size_t count) {
    const size_t most = DM_NODE_SLOT_BYTES / sizeof *values;
    for (size_t first = 0; first < count; first += most) {
        sum_piece(node, values + first, count - first < most ? count - first : most);
    }
}

void dm_node_min(dm_node *node, int32_t *values, size_t count) {
    const size_t most = DM_NODE_SLOT_BYTES / sizeof *values;
    for (size_t first = 0; first < count; first += most) {
        size_t piece = count - first < most ? count - first : most;
        memcpy(slot(node, node->rank), values + first, piece * sizeof *values);
        meet(node);
        for (size_t rank = 0; rank < node->ranks; rank++) {
            const int32_t *other = (const int32_t *)slot(node, rank);
            for (size_t i = 0; i < piece; i++) {
                if (other[i] < values[first + i]) values[first + i] = other[i];
            }
        }
        node->parity ^= 1;
    }
}

void dm_node_broadcast(dm_node *node, void *data, size_t bytes) {
    for (size_t first = 0; first < bytes; first += DM_NODE_SLOT_BYTES) {
        size_t piece = bytes - first < DM_NODE_SLOT_BYTES ? bytes - first : DM_NODE_SLOT_BYTES;
        if (node->rank == 0) memcpy(slot(node, 0), (uint8_t *)data + first, piece);
        meet(node);
        if (node->rank != 0) memcpy((uint8_t *)data + first, slot(node, 0), piece);
        node->parity ^= 1;
    }
}

void dm_node_gather(dm_node *node, void *out, const void *own, size_t bytes) {
    for (size_t first = 0; first < bytes; first += DM_NODE_SLOT_BYTES) {
        size_t piece = bytes - first < DM_NODE_SLOT_BYTES ? bytes - first : DM_NODE_SLOT_BYTES;
        memcpy(slot(node, node->rank), (const uint8_t *)own + first, piece);
        meet(node);
        for (size_t rank = 0; node->rank == 0 && rank < node->ranks; rank++) {
            memcpy((uint8_t *)out + rank * bytes + first, slot(node, rank), piece);
        }
        node->parity ^= 1;
    }
}
