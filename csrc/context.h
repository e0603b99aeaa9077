/* context.h: what the entry points share: the ISA's table, the thread pool, and scratch memory per thread. */
#ifndef DM_CONTEXT_H
#define DM_CONTEXT_H
#include "formats.h"
#include "kernels.h"

typedef struct dm_pool dm_pool;

/* Scratch buffers that may be in use on one thread at the same time. */
enum dm_scratch_slot {
    DM_SCRATCH_MATMUL,
    DM_SCRATCH_OPERAND,
    DM_SCRATCH_HIDDEN,
    DM_SCRATCH_OUT,
    DM_SCRATCH_SUMS,
    DM_SCRATCH_HEAP,
    DM_SCRATCH_KEPT,
    DM_SCRATCH_ITEMS,
    DM_SCRATCH_COUNT
};

/* A thread of the pool; worker 0 is the calling thread. */
typedef struct dm_worker {
    size_t index;
    void *scratch[DM_SCRATCH_COUNT];
    size_t scratch_bytes[DM_SCRATCH_COUNT];
    dm_pool *pool;
    uint64_t sums_serial; /* the job that its own sums belong to */
} dm_worker;

struct dm_context {
    const dm_kernels *kernels;
    dm_pool *pool;
    size_t threads;
    uint64_t serial; /* of the last job with sums per thread */
};

/* One item of a job. Items may run in any order on any thread: none may change another's bits. */
typedef void (*dm_task)(void *job, size_t item, dm_worker *worker);

/* The same for a run of units. */
typedef void (*dm_range_task)(void *job, size_t first, size_t last, dm_worker *worker);

/* spin: whether waiting threads spin before they sleep. NULL if memory or threads are lacking. */
dm_pool *dm_pool_create(size_t threads, int spin);
void dm_pool_destroy(dm_pool *pool);
/* As dm_context_bind. */
int dm_pool_bind(dm_pool *pool, const int32_t *cores);
/* Runs task(job, i, worker) for all i < count and returns when all are done. Not reentrant. */
void dm_pool_run(dm_pool *pool, dm_task task, void *job, size_t count);
/* Runs the task over all of [0, units), cut into runs: large ones first, of at least `least` units at the end. */
void dm_pool_share(dm_pool *pool, dm_range_task task, void *job, size_t units, size_t least);
dm_worker *dm_pool_worker(dm_pool *pool, size_t index);

/* At least `bytes` bytes, 64-byte aligned, not cleared, valid until the slot is asked for again. Grows on demand, so
 * that a steady state allocates nothing; if memory runs out, dm_end_without_memory. */
void *dm_scratch(dm_worker *worker, enum dm_scratch_slot slot, size_t bytes);

/* A thread's own sums of a job, cleared when it asks first: sums_N for the caller's thread, scratch for the others. */
int64_t *dm_thread_sums(dm_worker *worker, int64_t *sums_N, uint64_t serial, size_t count);
/* Adds the other threads' own sums, of those that took part in the job, to the caller's. */
void dm_add_thread_sums(dm_context *context, int64_t *sums_N, uint64_t serial, size_t count);

/* Says that so many bytes could not be allocated, and ends process and job as dm_catch_bus_errors was told to. */
_Noreturn void dm_end_without_memory(size_t bytes);

/* Work below this many elementary steps is not worth waking a thread. */
#define DM_SMALL_WORK 32768

/* Items to cut `units` units of work into: one if all of it is small, else a few per thread. */
size_t dm_item_count(const dm_context *context, size_t units, size_t steps_per_unit);

/* The units of one item: [first, last). */
static inline size_t dm_item_first(size_t item, size_t items, size_t units) {
    return item * (units / items) + (item < units % items ? item : units % items);
}

/* Keeps the lowest fault of a token; kind 0 is none. */
static inline void dm_report_fault(int32_t *fault_T, size_t t, int kind, int32_t layer) {
    if (kind == 0) return;
    int32_t fault = (int32_t)((uint32_t)layer << 8 | (uint32_t)kind);
    int32_t seen = __atomic_load_n(&fault_T[t], __ATOMIC_RELAXED);
    while (fault < seen &&
           !__atomic_compare_exchange_n(&fault_T[t], &seen, fault, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

/* The operand's columns [first, first + columns) as rows. first is a multiple of 32 if the operand is quantized. */
static inline dm_rows dm_operand_rows(const dm_operand *operand, size_t first, size_t columns) {
    size_t groups = dm_divide_up(operand->columns, DM_GROUP);
    size_t group = first / DM_GROUP;
    return (dm_rows){
        .x = operand->x == NULL ? NULL : operand->x + first,
        .q = operand->q == NULL ? NULL : operand->q + first,
        .scale = operand->scale == NULL ? NULL : operand->scale + group,
        .sum = operand->sum == NULL ? NULL : operand->sum + group,
        .columns = columns,
        .x_stride = operand->columns,
        .q_stride = groups * DM_GROUP,
        .group_stride = groups,
    };
}

/* The same without its first t rows. */
static inline dm_rows dm_rows_from(dm_rows rows, size_t t) {
    if (rows.x != NULL) rows.x += t * rows.x_stride;
    if (rows.q != NULL) rows.q += t * rows.q_stride;
    if (rows.scale != NULL) rows.scale += t * rows.group_stride;
    if (rows.sum != NULL) rows.sum += t * rows.group_stride;
    return rows;
}

/* The operand of tokens t and later. */
static inline dm_operand dm_operand_from(const dm_operand *operand, size_t t) {
    size_t groups = dm_divide_up(operand->columns, DM_GROUP);
    dm_operand rest = {.x = operand->x + t * operand->columns, .columns = operand->columns};
    if (operand->q == NULL) return rest;
    rest.q = operand->q + t * groups * DM_GROUP;
    rest.scale = operand->scale + t * groups;
    rest.sum = operand->sum + t * groups;
    return rest;
}

#endif
