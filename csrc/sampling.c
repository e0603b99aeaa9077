/* sampling.c: from logits to one token (rules 11, 13 and 14). */
#include "context.h"
#include "float_state.h"

#include <math.h>

typedef struct logits_job {
    const dm_kernels *kernels;
    float *max_TB, *sum_TB;
    int32_t *fault_T, *ids_TN;
    float *logits_TN;
    const float *logits_TV, *largest_TB;
    const float *temperature_T;
    const int32_t *block_B;
    size_t T, V, valid, count, blocks, items;
    int32_t layer;
} logits_job;

/* How many of a block's columns are below `valid`. */
static size_t block_columns(const logits_job *job, size_t first) {
    size_t n = job->valid > first ? job->valid - first : 0;
    return n < DM_VOCABULARY_BLOCK ? n : DM_VOCABULARY_BLOCK;
}

static void vocabulary_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const logits_job *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->T * job->blocks);
    for (size_t i = dm_item_first(item, job->items, job->T * job->blocks); i < last; i++) {
        size_t t = i / job->blocks, first = i % job->blocks * DM_VOCABULARY_BLOCK;
        size_t n = block_columns(job, first);
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

/* The best `count` of what was offered so far; a heap once it is full. */
typedef struct best_list {
    candidate *heap;
    size_t count, held;
} best_list;

static best_list empty_list(dm_worker *worker, size_t count) {
    return (best_list){.heap = dm_scratch(worker, DM_SCRATCH_HEAP, count * sizeof(candidate)), .count = count};
}

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

static void make_heap(best_list *list) {
    for (size_t i = list->held / 2; i-- > 0;) sift_down(list->heap, i, list->held);
}

/* The list is of one candidate at least. */
static void offer(best_list *list, candidate next) {
    if (list->held < list->count) {
        list->heap[list->held++] = next;
        if (list->held == list->count) make_heap(list);
    } else if (next.key > list->heap[0].key) {
        list->heap[0] = next;
        sift_down(list->heap, 0, list->count);
    }
}

/* Best first; places that nothing was offered for get id -1 and logit -infinity. */
static void write_sorted(int32_t *ids_N, float *logits_N, best_list *list, size_t N) {
    for (size_t n = list->held; n-- > 0;) {
        ids_N[n] = candidate_id(list->heap[0]);
        logits_N[n] = list->heap[0].logit;
        list->heap[0] = list->heap[n];
        sift_down(list->heap, 0, n);
    }
    for (size_t i = list->held; i < N; i++) {
        ids_N[i] = -1;
        logits_N[i] = -INFINITY;
    }
}

/* A number that `count` blocks' maxima reach, so that no lower logit is among the best `count`: the largest such one
 * whose place in the order of floats has only its 20 highest bits set, found bit by bit. */
static float reached_by(const float *max_B, size_t B, size_t count) {
    float floor = -INFINITY;
    uint32_t order = 0;
    for (uint32_t bit = 0x80000000; bit >= 1u << 12; bit >>= 1) {
        uint32_t higher = order | bit, bits = higher & 0x80000000 ? higher ^ 0x80000000 : ~higher, reaching = 0;
        float trial;
        __builtin_memcpy(&trial, &bits, sizeof trial);
        for (size_t b = 0; b < B; b++) reaching += max_B[b] >= trial;
        if (reaching < count) continue;
        order = higher;
        floor = trial;
    }
    return floor;
}

/* Offers what is not below the floor of one block; NaN ranks lowest, but is not below. */
static void offer_block(best_list *list, float floor, const float *logits_V, size_t n, int32_t first_id) {
    for (size_t first = 0; first < n; first += 16) {
        size_t last = n - first < 16 ? n : first + 16;
        int any = 0;
        for (size_t i = first; i < last; i++) any |= !(logits_V[i] < floor);
        if (!any) continue;
        for (size_t i = first; i < last; i++) {
            if (!(logits_V[i] < floor)) offer(list, make_candidate(logits_V[i], first_id + (int32_t)i));
        }
    }
}

static void top_item(void *argument, size_t t, dm_worker *worker) {
    const logits_job *job = argument;
    const float *max_B = job->largest_TB + t * job->blocks, *logits_V = job->logits_TV + t * job->V;
    best_list list = empty_list(worker, job->valid < job->count ? job->valid : job->count);
    float floor = reached_by(max_B, job->blocks, list.count);
    size_t blocks = list.count > 0 ? dm_divide_up(job->valid, DM_VOCABULARY_BLOCK) : 0;
    for (size_t b = 0; b < blocks; b++) {
        size_t first = b * DM_VOCABULARY_BLOCK;
        if (list.held == list.count && list.heap[0].logit > floor) floor = list.heap[0].logit;
        if (max_B[b] < floor) continue;
        offer_block(&list, floor, logits_V + first, block_columns(job, first), job->block_B[b] * DM_VOCABULARY_BLOCK);
    }
    write_sorted(job->ids_TN + t * job->count, job->logits_TN + t * job->count, &list, job->count);
}

void dm_top_logits(dm_context *context, int32_t *ids_TN, float *logits_TN, const float *logits_TV, const float *max_TB,
                   const int32_t *block_B, size_t T, size_t V, size_t valid, size_t count) {
    uint64_t saved = dm_enter();
    logits_job job = {.ids_TN = ids_TN,
                      .logits_TN = logits_TN,
                      .logits_TV = logits_TV,
                      .largest_TB = max_TB,
                      .block_B = block_B,
                      .T = T,
                      .V = V,
                      .valid = valid < V ? valid : V,
                      .count = count,
                      .blocks = dm_divide_up(V, DM_VOCABULARY_BLOCK)};
    if (count > 0) dm_pool_run(context->pool, top_item, &job, T);
    dm_set_float_state(saved);
}

static void merge_item(void *argument, size_t t, dm_worker *worker) {
    const logits_job *job = argument;
    int32_t *ids_N = job->ids_TN + t * job->V;
    float *logits_N = job->logits_TN + t * job->V;
    best_list list = empty_list(worker, job->count);
    for (size_t i = 0; i < job->V; i++) offer(&list, make_candidate(logits_N[i], ids_N[i]));
    write_sorted(ids_N, logits_N, &list, list.held);
}

void dm_merge_candidates(dm_context *context, int32_t *ids_TN, float *logits_TN, size_t T, size_t N, size_t count) {
    uint64_t saved = dm_enter();
    logits_job job = {.ids_TN = ids_TN, .logits_TN = logits_TN, .V = N, .count = count < N ? count : N};
    if (job.count > 0) dm_pool_run(context->pool, merge_item, &job, T);
    dm_set_float_state(saved);
}
