/* context.c: dm_context, and how work is cut into items. */
#include "context.h"

#include <stdlib.h>

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

const char *dm_context_isa(const dm_context *context) { return context->kernels->name; }

size_t dm_context_threads(const dm_context *context) { return context->threads; }

size_t dm_item_count(const dm_context *context, size_t units, size_t steps_per_unit) {
    if (context->threads == 1 || units * steps_per_unit < DM_SMALL_WORK) return units == 0 ? 0 : 1;
    size_t items = context->threads * 4;
    return units < items ? units : items;
}
