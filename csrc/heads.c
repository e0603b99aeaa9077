/* heads.c: RoPE, the norm of q and k, and the KV cache. Units of work are (token, head) pairs. */
#include "context.h"
#include "float_state.h"

typedef struct head_job {
    const dm_kernels *kernels;
    float *out;
    float *sin_TP;
    int32_t *fault_T;
    const float *a, *b, *c;
    const dm_kv_view *cache;
    const int64_t *position_T;
    size_t T, h, P, row_stride, items;
    float scale;
    int32_t layer;
    void (*one)(const struct head_job *job, size_t t, size_t head, dm_worker *worker);
} head_job;

static void head_item(void *argument, size_t item, dm_worker *worker) {
    const head_job *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->T * job->h);
    for (size_t i = dm_item_first(item, job->items, job->T * job->h); i < last; i++) {
        job->one(job, i / job->h, i % job->h, worker);
    }
}

static void run(dm_context *context, head_job *job, size_t steps_per_unit) {
    uint64_t saved = dm_enter();
    job->kernels = context->kernels;
    job->items = dm_item_count(context, job->T * job->h, steps_per_unit);
    dm_pool_run(context->pool, head_item, job, job->items);
    dm_set_float_state(saved);
}

static void angles_one(const head_job *job, size_t t, size_t head, dm_worker *worker) {
    (void)head;
    (void)worker;
    job->kernels->rope_angles(job->out + t * job->P, job->sin_TP + t * job->P, job->position_T[t], job->a, job->scale,
                              job->P);
}

void dm_rope_angles(dm_context *context, float *cos_TP, float *sin_TP, const int64_t *position_T,
                    const float *inv_freq_P, float attention_factor, size_t T, size_t half_P) {
    head_job job = {.out = cos_TP,
                    .sin_TP = sin_TP,
                    .position_T = position_T,
                    .a = inv_freq_P,
                    .scale = attention_factor,
                    .T = T,
                    .h = 1,
                    .P = half_P,
                    .one = angles_one};
    run(context, &job, half_P);
}

static void norm_rope_one(const head_job *job, size_t t, size_t head, dm_worker *worker) {
    (void)worker;
    size_t half_P = job->P / 2;
    job->kernels->norm_rope(job->out + t * job->row_stride + head * job->P, job->a, job->b + t * half_P,
                            job->c + t * half_P, job->scale, job->P);
}

void dm_norm_rope(dm_context *context, float *heads_ThP, const float *gain_P, const float *cos_TP, const float *sin_TP,
                  float eps, size_t T, size_t h, size_t P, size_t row_stride) {
    head_job job = {.out = heads_ThP,
                    .a = gain_P,
                    .b = cos_TP,
                    .c = sin_TP,
                    .scale = eps,
                    .T = T,
                    .h = h,
                    .P = P,
                    .row_stride = row_stride,
                    .one = norm_rope_one};
    run(context, &job, P);
}

size_t dm_kv_block_bytes(int format, size_t P) {
    size_t padded_P = dm_round_up(P, DM_GROUP);
    size_t value_bytes = format == DM_KV_Q8 ? DM_BLOCK_POSITIONS * (padded_P + padded_P / DM_GROUP * sizeof(float))
                                            : dm_key_bytes(format, P);
    return dm_round_up(dm_key_bytes(format, P) + value_bytes, 64);
}

static uint8_t *const *sequence_blocks(const dm_kv_view *cache, size_t t) { return cache->blocks + cache->table_T[t]; }

static void kv_store_one(const head_job *job, size_t t, size_t head, dm_worker *worker) {
    (void)worker;
    const dm_kv_view *cache = job->cache;
    size_t position = (size_t)cache->position_T[t];
    uint8_t *block = sequence_blocks(cache, t)[position / DM_BLOCK_POSITIONS] + cache->layer_offset +
                     head * dm_kv_block_bytes(cache->format, job->P);
    size_t row = t * job->row_stride + head * job->P;
    int kind =
        job->kernels->kv_store[cache->format](block, job->a + row, job->b + row, position % DM_BLOCK_POSITIONS, job->P);
    dm_report_fault(job->fault_T, t, kind, job->layer);
}

void dm_kv_store(dm_context *context, const dm_kv_view *cache, int32_t *fault_T, const float *k_TgP, const float *v_TgP,
                 size_t T, size_t g, size_t P, size_t row_stride, int32_t layer) {
    head_job job = {.cache = cache,
                    .fault_T = fault_T,
                    .a = k_TgP,
                    .b = v_TgP,
                    .T = T,
                    .h = g,
                    .P = P,
                    .row_stride = row_stride,
                    .layer = layer,
                    .one = kv_store_one};
    run(context, &job, 2 * P);
}
