/* sampling.c: from logits to one token (rules 11, 13 and 14). */
#include "context.h"
#include "float_state.h"

#include <math.h>

typedef struct logits_job {
    const dm_kernels *kernels;
    float *max_TB, *sum_TB;
    int32_t *fault_T, *ids_TN;
    float *logits_TN;
    const float *logits_TV;
    const float *temperature_T;
    size_t T, V, valid, count, blocks, items;
    int32_t first_id, layer;
} logits_job;

static void vocabulary_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const logits_job *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->T * job->blocks);
    for (size_t i = dm_item_first(item, job->items, job->T * job->blocks); i < last; i++) {
        size_t t = i / job->blocks, first = i % job->blocks * DM_VOCABULARY_BLOCK;
        size_t n = job->valid > first ? job->valid - first : 0;
        n = n < DM_VOCABULARY_BLOCK ? n : DM_VOCABULARY_BLOCK;
        float temperature = job->temperature_T[t] == 0.0f ? 1.0f : job->temperature_T[t];
        int kind = job->kernels->vocabulary(&job->max_TB[i], &job->sum_TB[i], job->logits_TV + t * job->V + first,
                                            temperature, n);
        dm_report_fault(job->fault_T, t, kind, job->layer);
    }
}

void dm_vocabulary_blocks(dm_context *context, float *max_TB, float *sum_TB, int32_t *fault_T, const float *logits_TV,
                          const float *temperature_T, size_t T, size_t V, size_t valid, int32_t layer) {
    uint64_t saved = dm_enter();
    logits_job job = {.kernels = context->kernels,
                      .max_TB = max_TB,
                      .sum_TB = sum_TB,
                      .fault_T = fault_T,
                      .logits_TV = logits_TV,
                      .temperature_T = temperature_T,
                      .T = T,
                      .V = V,
                      .valid = valid < V ? valid : V,
                      .blocks = dm_divide_up(V, DM_VOCABULARY_BLOCK),
                      .layer = layer};
    job.items = dm_item_count(context, T * job.blocks, DM_VOCABULARY_BLOCK);
    dm_pool_run(context->pool, vocabulary_item, &job, job.items);
    dm_set_float_state(saved);
}

/* Candidates are compared by one integer: the logit's order above, the id's (lower is better) below. */
typedef struct candidate {
    uint64_t key;
    float logit;
} candidate;

/* A NaN ranks as -infinity, -0 as +0; id -1 (no candidate) ranks last. */
static candidate make_candidate(float logit, int32_t id) {
    if (id < 0) return (candidate){0, logit};
    float ranked = isnan(logit) ? -INFINITY : logit + 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &ranked, sizeof bits);
    uint32_t order = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (candidate){(uint64_t)order << 32 | (UINT32_MAX - (uint32_t)id), logit};
}

static int32_t candidate_id(candidate one) { return one.key == 0 ? -1 : (int32_t)(UINT32_MAX - (uint32_t)one.key); }

/* Moves heap[i] down until both children are better: the root is the worst of the heap. */
static void sift_down(candidate *heap, size_t i, size_t count) {
    candidate moved = heap[i];
    for (size_t child = 2 * i + 1; child < count; child = 2 * i + 1) {
        if (child + 1 < count && heap[child + 1].key < heap[child].key) child++;
        if (heap[child].key >= moved.key) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

static void make_heap(candidate *heap, size_t count) {
    for (size_t i = count / 2; i-- > 0;) sift_down(heap, i, count);
}

/* Best first. */
static void sort_heap(candidate *heap, size_t count) {
    for (size_t n = count; n > 1; n--) {
        candidate worst = heap[0];
        heap[0] = heap[n - 1];
        heap[n - 1] = worst;
        sift_down(heap, 0, n - 1);
    }
}

static void top_item(void *argument, size_t t, dm_worker *worker) {
    const logits_job *job = argument;
    const float *logits_V = job->logits_TV + t * job->V;
    size_t kept = job->valid < job->count ? job->valid : job->count;
    candidate *heap = dm_scratch(worker, DM_SCRATCH_HEAP, job->count * sizeof *heap);
    for (size_t i = 0; i < job->count; i++) {
        heap[i] = (candidate){0, -INFINITY};
        if (i < kept) heap[i] = make_candidate(logits_V[i], job->first_id + (int32_t)i);
    }
    make_heap(heap, kept);
    for (size_t i = kept; i < job->valid; i++) {
        if (kept == 0 || logits_V[i] < heap[0].logit) continue;
        candidate next = make_candidate(logits_V[i], job->first_id + (int32_t)i);
        if (next.key <= heap[0].key) continue;
        heap[0] = next;
        sift_down(heap, 0, kept);
    }
    sort_heap(heap, kept);
    for (size_t i = 0; i < job->count; i++) {
        job->ids_TN[t * job->count + i] = candidate_id(heap[i]);
        job->logits_TN[t * job->count + i] = heap[i].logit;
    }
}

void dm_top_logits(dm_context *context, int32_t *ids_TN, float *logits_TN, const float *logits_TV, size_t T, size_t V,
                   size_t valid, int32_t first_id, size_t count) {
    uint64_t saved = dm_enter();
    logits_job job = {.ids_TN = ids_TN,
                      .logits_TN = logits_TN,
                      .logits_TV = logits_TV,
                      .T = T,
                      .V = V,
                      .valid = valid < V ? valid : V,
                      .count = count,
                      .first_id = first_id};
    if (count > 0) dm_pool_run(context->pool, top_item, &job, T);
    dm_set_float_state(saved);
}

void dm_merge_candidates(dm_context *context, int32_t *ids_N, float *logits_N, size_t N) {
    uint64_t saved = dm_enter();
    candidate *heap = dm_scratch(dm_pool_worker(context->pool, 0), DM_SCRATCH_HEAP, N * sizeof *heap);
    for (size_t i = 0; i < N; i++) heap[i] = make_candidate(logits_N[i], ids_N[i]);
    make_heap(heap, N);
    sort_heap(heap, N);
    for (size_t i = 0; i < N; i++) {
        ids_N[i] = candidate_id(heap[i]);
        logits_N[i] = heap[i].logit;
    }
    dm_set_float_state(saved);
}
