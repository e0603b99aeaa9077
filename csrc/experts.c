/* experts.c: routing, and the expert chunk from the operand to its int64 sums.
 *
 * A chunk is one item of work: no barrier stands between gate, up and down. Every thread adds into its own sums, which
 * are then added up; integer addition may take any order (rule 7).
 */
#include "context.h"
#include "float_state.h"

#include <string.h>

typedef struct expert_job {
    const dm_kernels *kernels;
    dm_pool *pool;
    int64_t *sums_TD;
    int32_t *fault_T;
    const dm_chunk *chunks;
    const int32_t *token_N;
    const float *weight_N;
    const dm_operand *x;
    size_t T, D, width, group, threads, items;
    int format;
    int32_t layer;
} expert_job;

/* The operands of at most DM_TOKEN_BLOCK tokens, copied side by side. */
static dm_rows gather(const expert_job *job, const int32_t *tokens, size_t n, dm_worker *worker) {
    dm_rows all = dm_operand_rows(job->x, 0, job->D);
    size_t groups = all.group_stride;
    size_t row_bytes = dm_is_quantized(job->format) ? groups * (DM_GROUP + 8) : job->D * sizeof(float);
    uint8_t *at = dm_scratch(worker, DM_SCRATCH_OPERAND, DM_TOKEN_BLOCK * row_bytes);
    if (!dm_is_quantized(job->format)) {
        float *x = (float *)at;
        for (size_t i = 0; i < n; i++) {
            memcpy(x + i * job->D, all.x + (size_t)tokens[i] * job->D, job->D * sizeof(float));
        }
        all.x = x;
        return all;
    }
    float *scale = (float *)at;
    int32_t *sum = (int32_t *)(scale + n * groups);
    int8_t *q = (int8_t *)(sum + n * groups);
    for (size_t i = 0; i < n; i++) {
        size_t t = (size_t)tokens[i];
        memcpy(scale + i * groups, all.scale + t * groups, groups * sizeof(float));
        memcpy(sum + i * groups, all.sum + t * groups, groups * sizeof(int32_t));
        memcpy(q + i * groups * DM_GROUP, all.q + t * groups * DM_GROUP, groups * DM_GROUP);
    }
    all.scale = scale;
    all.sum = sum;
    all.q = q;
    return all;
}

/* h = silu(gate x) * up x of n tokens, as the down matrix wants it. */
static dm_rows hidden(const expert_job *job, const uint8_t *chunk, const dm_rows *x, const int32_t *tokens, size_t n,
                      dm_worker *worker) {
    size_t width = job->width, groups = dm_divide_up(width, DM_GROUP);
    size_t matrix_bytes = dm_packed_bytes(job->format, width, job->D, job->group);
    size_t floats = n * width;
    float *gate = dm_scratch(worker, DM_SCRATCH_HIDDEN, 2 * floats * sizeof(float) + n * groups * (DM_GROUP + 8));
    float *up = gate + floats;
    float *scale = up + floats;
    int32_t *sum = (int32_t *)(scale + n * groups);
    int8_t *q = (int8_t *)(sum + n * groups);
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->D > width ? job->D : width));
    job->kernels->matmul[job->format](gate, chunk, x, n, width, width, job->group, scratch);
    job->kernels->matmul[job->format](up, chunk + matrix_bytes, x, n, width, width, job->group, scratch);
    job->kernels->silu(gate, gate, up, floats);
    for (size_t i = 0; dm_is_quantized(job->format) && i < n; i++) {
        int kind = job->kernels->quantize(q + i * groups * DM_GROUP, scale + i * groups, sum + i * groups,
                                          gate + i * width, width);
        dm_report_fault(job->fault_T, (size_t)tokens[i], kind, job->layer);
    }
    return (dm_rows){.x = gate,
                     .q = q,
                     .scale = scale,
                     .sum = sum,
                     .columns = width,
                     .x_stride = width,
                     .q_stride = groups * DM_GROUP,
                     .group_stride = groups};
}

static void chunk_tokens(const expert_job *job, const uint8_t *chunk, size_t first, size_t n, int64_t *sums_TD,
                         dm_worker *worker) {
    const int32_t *tokens = job->token_N + first;
    const uint8_t *down = chunk + 2 * dm_packed_bytes(job->format, job->width, job->D, job->group);
    dm_rows x = gather(job, tokens, n, worker);
    dm_rows h = hidden(job, chunk, &x, tokens, n, worker);
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, n * job->D * sizeof(float));
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->D > job->width ? job->D : job->width));
    job->kernels->matmul[job->format](out, down, &h, n, job->D, job->D, job->group, scratch);
    for (size_t i = 0; i < n; i++) {
        size_t t = (size_t)tokens[i];
        int kind = job->kernels->add_fixed(sums_TD + t * job->D, out + i * job->D, job->weight_N[first + i], job->D);
        dm_report_fault(job->fault_T, t, kind, job->layer);
    }
}

/* The sums of the calling thread, kept in its scratch for the whole job. */
static int64_t *thread_sums(const expert_job *job, dm_worker *worker) {
    if (job->threads == 1) return job->sums_TD;
    return dm_scratch(worker, DM_SCRATCH_SUMS, job->T * job->D * sizeof(int64_t));
}

static void chunk_item(void *argument, size_t item, dm_worker *worker) {
    const expert_job *job = argument;
    const dm_chunk *chunk = &job->chunks[item];
    int64_t *sums_TD = thread_sums(job, worker);
    for (size_t i = 0; i < chunk->count; i += DM_TOKEN_BLOCK) {
        size_t n = chunk->count - i < DM_TOKEN_BLOCK ? chunk->count - i : DM_TOKEN_BLOCK;
        chunk_tokens(job, chunk->packed, chunk->first + i, n, sums_TD, worker);
    }
}

static void add_threads_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const expert_job *job = argument;
    size_t total = job->T * job->D;
    size_t first = dm_item_first(item, job->items, total), last = dm_item_first(item + 1, job->items, total);
    for (size_t thread = 0; thread < job->threads; thread++) {
        const int64_t *own_TD = thread_sums(job, dm_pool_worker(job->pool, thread));
        for (size_t i = first; i < last; i++) {
            uint64_t before = thread == 0 ? 0 : (uint64_t)job->sums_TD[i];
            job->sums_TD[i] = (int64_t)(before + (uint64_t)own_TD[i]);
        }
    }
}

void dm_experts(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_chunk *chunks, const int32_t *token_N,
                const float *weight_N, const dm_operand *x, size_t chunk_count, size_t T, size_t D, size_t width,
                int format, size_t group, int32_t layer) {
    uint64_t saved = dm_enter();
    expert_job job = {.kernels = context->kernels,
                      .pool = context->pool,
                      .sums_TD = sums_TD,
                      .fault_T = fault_T,
                      .chunks = chunks,
                      .token_N = token_N,
                      .weight_N = weight_N,
                      .x = x,
                      .T = T,
                      .D = D,
                      .width = width,
                      .group = group,
                      .threads = chunk_count > 1 ? context->threads : 1,
                      .format = format,
                      .layer = layer};
    for (size_t thread = 0; thread < job.threads; thread++) {
        memset(thread_sums(&job, dm_pool_worker(context->pool, thread)), 0, T * D * sizeof(int64_t));
    }
    dm_pool_run(context->pool, chunk_item, &job, chunk_count);
    job.items = dm_item_count(context, T * D, job.threads);
    if (job.threads > 1) dm_pool_run(context->pool, add_threads_item, &job, job.items);
    dm_set_float_state(saved);
}

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
