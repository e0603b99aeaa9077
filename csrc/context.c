/* context.c: dm_context, and how work is cut into items. */
#include "context.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

dm_context *dm_context_create(const char *isa, size_t threads, int spin) {
    const dm_kernels *kernels = dm_find_kernels(isa);
    if (kernels == NULL || threads == 0) return NULL;
    dm_context *context = malloc(sizeof *context);
    if (context == NULL) return NULL;
    *context = (dm_context){.kernels = kernels, .pool = dm_pool_create(threads, spin), .threads = threads};
    if (context->pool != NULL) return context;
    free(context);
    return NULL;
}

void dm_context_destroy(dm_context *context) {
    if (context == NULL) return;
    dm_pool_destroy(context->pool);
    free(context);
}

int dm_context_bind(dm_context *context, const int32_t *cores) { return dm_pool_bind(context->pool, cores); }

const char *dm_context_isa(const dm_context *context) { return context->kernels->name; }

size_t dm_context_threads(const dm_context *context) { return context->threads; }

size_t dm_item_count(const dm_context *context, size_t units, size_t steps_per_unit) {
    if (context->threads == 1 || units * steps_per_unit < DM_SMALL_WORK) return units == 0 ? 0 : 1;
    size_t items = context->threads * 4;
    return units < items ? units : items;
}

int64_t *dm_thread_sums(dm_worker *worker, int64_t *sums_N, uint64_t serial, size_t count) {
    if (worker->index == 0) return sums_N;
    int64_t *own_N = dm_scratch(worker, DM_SCRATCH_SUMS, count * sizeof *own_N);
    if (worker->sums_serial != serial) memset(own_N, 0, count * sizeof *own_N);
    worker->sums_serial = serial;
    return own_N;
}

typedef struct add_job {
    const dm_context *context;
    int64_t *sums_N;
    uint64_t serial;
    size_t count;
} add_job;

static void add_range(void *argument, size_t first, size_t last, dm_worker *worker) {
    (void)worker;
    const add_job *job = argument;
    for (size_t thread = 1; thread < job->context->threads; thread++) {
        dm_worker *other = dm_pool_worker(job->context->pool, thread);
        if (other->sums_serial != job->serial) continue;
        const int64_t *own_N = dm_scratch(other, DM_SCRATCH_SUMS, job->count * sizeof *own_N);
        for (size_t i = first; i < last; i++) job->sums_N[i] = (int64_t)((uint64_t)job->sums_N[i] + (uint64_t)own_N[i]);
    }
}

void dm_add_thread_sums(dm_context *context, int64_t *sums_N, uint64_t serial, size_t count) {
    add_job job = {context, sums_N, serial, count};
    dm_pool_share(context->pool, add_range, &job, count, DM_SMALL_WORK / context->threads);
}
