/* routing.c: which experts a token picks, and a step's tokens sorted by expert. */
#include <string.h>

#include "context.h"
#include "float_state.h"

typedef struct route_job {
    const dm_kernels *kernels;
    int32_t *ids_TK;
    float *weights_TK;
    int32_t *fault_T;
    const float *logits_TE;
    size_t T, E, K, items;
    int norm_topk_prob;
    int32_t layer;
} route_job;

static void route_item(void *argument, size_t item, dm_worker *worker) {
    const route_job *job = argument;
    int32_t *scratch_E = dm_scratch(worker, DM_SCRATCH_OUT, job->E * sizeof(int32_t));
    size_t last = dm_item_first(item + 1, job->items, job->T);
    for (size_t t = dm_item_first(item, job->items, job->T); t < last; t++) {
        int kind = job->kernels->route(job->ids_TK + t * job->K, job->weights_TK + t * job->K,
                                       job->logits_TE + t * job->E, job->E, job->K, job->norm_topk_prob, scratch_E);
        dm_report_fault(job->fault_T, t, kind, job->layer);
    }
}

void dm_route(dm_context *context, int32_t *ids_TK, float *weights_TK, int32_t *fault_T, const float *logits_TE,
              size_t T, size_t E, size_t K, int norm_topk_prob, int32_t layer) {
    uint64_t saved = dm_enter();
    route_job job = {.kernels = context->kernels,
                     .ids_TK = ids_TK,
                     .weights_TK = weights_TK,
                     .fault_T = fault_T,
                     .logits_TE = logits_TE,
                     .T = T,
                     .E = E,
                     .K = K,
                     .items = dm_item_count(context, T, E * K),
                     .norm_topk_prob = norm_topk_prob,
                     .layer = layer};
    dm_pool_run(context->pool, route_item, &job, job.items);
    dm_set_float_state(saved);
}

void dm_group_by_expert(dm_context *context, int32_t *offset_E1, int32_t *token_N, float *weight_N,
                        const int32_t *ids_TK, const float *weights_TK, size_t T, size_t E, size_t K) {
    (void)context;
    memset(offset_E1, 0, (E + 1) * sizeof *offset_E1);
    for (size_t i = 0; i < T * K; i++) offset_E1[ids_TK[i] + 1]++;
    for (size_t e = 0; e < E; e++) offset_E1[e + 1] += offset_E1[e];
    /* Filling moves every start to the next expert's; shifting by one place puts them back. */
    for (size_t i = 0; i < T * K; i++) {
        int32_t place = offset_E1[ids_TK[i]]++;
        token_N[place] = (int32_t)(i / K);
        weight_N[place] = weights_TK[i];
    }
    memmove(offset_E1 + 1, offset_E1, E * sizeof *offset_E1);
    offset_E1[0] = 0;
}
