/* vectors.c: entry points whose unit of work is one token: embedding, norm, quantizer, residual, bias. */
#include "context.h"
#include "float_state.h"

typedef struct token_job {
    const dm_kernels *kernels;
    float *out;
    const void *in;
    const float *gain;
    const int32_t *ids_T;
    const dm_operand *operand;
    const int64_t *sums_TD;
    int32_t *fault_T;
    size_t T, D, out_stride, items;
    float eps;
    int bf16_table;
    int32_t layer;
    void (*one)(const struct token_job *job, size_t t);
} token_job;

static void token_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const token_job *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->T);
    for (size_t t = dm_item_first(item, job->items, job->T); t < last; t++) job->one(job, t);
}

static void run(dm_context *context, token_job *job) {
    uint64_t saved = dm_enter();
    job->kernels = context->kernels;
    job->items = dm_item_count(context, job->T, job->D);
    dm_pool_run(context->pool, token_item, job, job->items);
    dm_set_float_state(saved);
}

static void embed_one(const token_job *job, size_t t) {
    size_t row_bytes = job->D * (job->bf16_table ? sizeof(uint16_t) : sizeof(float));
    const uint8_t *row = (const uint8_t *)job->in + (size_t)job->ids_T[t] * row_bytes;
    job->kernels->embed(job->out + t * job->D, row, job->D, job->bf16_table);
}

void dm_embed(dm_context *context, float *x_TD, const void *table_VD, const int32_t *ids_T, size_t T, size_t D,
              int bf16_table) {
    token_job job = {
        .out = x_TD, .in = table_VD, .ids_T = ids_T, .T = T, .D = D, .bf16_table = bf16_table, .one = embed_one};
    run(context, &job);
}

static void rmsnorm_one(const token_job *job, size_t t) {
    job->kernels->rmsnorm(job->out + t * job->D, (const float *)job->in + t * job->D, job->gain, job->eps, job->D);
}

void dm_rmsnorm(dm_context *context, float *out_TD, const float *x_TD, const float *gain_D, float eps, size_t T,
                size_t D) {
    token_job job = {.out = out_TD, .in = x_TD, .gain = gain_D, .eps = eps, .T = T, .D = D, .one = rmsnorm_one};
    run(context, &job);
}

static void quantize_one(const token_job *job, size_t t) {
    const dm_operand *operand = job->operand;
    size_t groups = dm_divide_up(job->D, DM_GROUP);
    int kind = job->kernels->quantize(operand->q + t * groups * DM_GROUP, operand->scale + t * groups,
                                      operand->sum + t * groups, operand->x + t * job->D, job->D);
    dm_report_fault(job->fault_T, t, kind, job->layer);
}

void dm_quantize(dm_context *context, const dm_operand *operand, int32_t *fault_T, size_t T, int32_t layer) {
    token_job job = {
        .operand = operand, .fault_T = fault_T, .T = T, .D = operand->columns, .layer = layer, .one = quantize_one};
    run(context, &job);
}

static void add_exact_one(const token_job *job, size_t t) {
    int kind = job->kernels->add_exact(job->out + t * job->D, job->sums_TD + t * job->D, job->gain, job->D);
    dm_report_fault(job->fault_T, t, kind, job->layer);
}

void dm_add_exact(dm_context *context, float *x_TD, int32_t *fault_T, const int64_t *sums_TD, const float *bias_D,
                  size_t T, size_t D, int32_t layer) {
    token_job job = {.out = x_TD,
                     .sums_TD = sums_TD,
                     .gain = bias_D,
                     .fault_T = fault_T,
                     .T = T,
                     .D = D,
                     .layer = layer,
                     .one = add_exact_one};
    run(context, &job);
}

static void add_bias_one(const token_job *job, size_t t) {
    for (size_t r = 0; r < job->D; r++) job->out[t * job->out_stride + r] += job->gain[r];
}

void dm_add_bias(dm_context *context, float *out_TR, const float *bias_R, size_t T, size_t R, size_t out_stride) {
    token_job job = {.out = out_TR, .gain = bias_R, .T = T, .D = R, .out_stride = out_stride, .one = add_bias_one};
    run(context, &job);
}
