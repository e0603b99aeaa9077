/* matrices.c: matmul over a list of matrices, and o_proj's exact sums. Units of work are tiles of 16 rows. */
#include "context.h"
#include "float_state.h"

#include <string.h>

typedef struct matrix_job {
    const dm_kernels *kernels;
    float *out_TR;
    int64_t *sums_TD;
    int32_t *fault_T;
    const dm_matrix *matrices;
    const dm_operand *x;
    size_t matrix_count, T, D, P, out_stride, group, tiles, items;
    int format;
    int32_t layer;
} matrix_job;

/* Tiles are numbered through all matrices; a matrix's part of an item is one call. */
static void matmul_item(void *argument, size_t item, dm_worker *worker) {
    const matrix_job *job = argument;
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->x->columns));
    size_t tile_bytes = dm_tile_bytes(job->format, job->x->columns, job->group);
    dm_rows rows = dm_operand_rows(job->x, 0, job->x->columns);
    size_t first = dm_item_first(item, job->items, job->tiles);
    size_t last = dm_item_first(item + 1, job->items, job->tiles);
    size_t start = 0;
    for (size_t i = 0; i < job->matrix_count && start < last; i++) {
        const dm_matrix *matrix = &job->matrices[i];
        size_t tiles = dm_divide_up(matrix->rows, 16);
        size_t from = first > start ? first - start : 0;
        size_t to = last - start < tiles ? last - start : tiles;
        start += tiles;
        if (from >= to) continue;
        size_t end_row = to * 16 < matrix->rows ? to * 16 : matrix->rows;
        job->kernels->matmul[job->format](job->out_TR + matrix->out_column + from * 16,
                                          (const uint8_t *)matrix->packed + from * tile_bytes, &rows, job->T,
                                          end_row - from * 16, job->out_stride, job->group, scratch);
    }
}

void dm_matmul(dm_context *context, float *out_TR, const dm_matrix *matrices, const dm_operand *x, size_t matrix_count,
               size_t T, size_t out_stride, int format, size_t group) {
    uint64_t saved = dm_enter();
    matrix_job job = {.kernels = context->kernels,
                      .out_TR = out_TR,
                      .matrices = matrices,
                      .x = x,
                      .matrix_count = matrix_count,
                      .T = T,
                      .out_stride = out_stride,
                      .format = format,
                      .group = group};
    for (size_t i = 0; i < matrix_count; i++) job.tiles += dm_divide_up(matrices[i].rows, 16);
    job.items = T == 0 ? 0 : dm_item_count(context, job.tiles, T * 16 * x->columns);
    dm_pool_run(context->pool, matmul_item, &job, job.items);
    dm_set_float_state(saved);
}

/* Some tiles of all units: every element of the sums is one thread's own. */
static void unit_sums_item(void *argument, size_t item, dm_worker *worker) {
    const matrix_job *job = argument;
    size_t first = dm_item_first(item, job->items, job->tiles) * 16;
    size_t last = dm_item_first(item + 1, job->items, job->tiles) * 16;
    last = last < job->D ? last : job->D;
    size_t tile_bytes = dm_tile_bytes(job->format, job->P, job->group);
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->P));
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, DM_TOKEN_BLOCK * (last - first) * sizeof(float));
    for (size_t t = 0; t < job->T; t++) {
        memset(job->sums_TD + t * job->D + first, 0, (last - first) * sizeof(int64_t));
    }
    for (size_t unit = 0; unit < job->matrix_count; unit++) {
        const uint8_t *packed = (const uint8_t *)job->matrices[unit].packed + first / 16 * tile_bytes;
        for (size_t t0 = 0; t0 < job->T; t0 += DM_TOKEN_BLOCK) {
            size_t tokens = job->T - t0 < DM_TOKEN_BLOCK ? job->T - t0 : DM_TOKEN_BLOCK;
            dm_rows rows = dm_rows_from(dm_operand_rows(job->x, unit * job->P, job->P), t0);
            job->kernels->matmul[job->format](out, packed, &rows, tokens, last - first, last - first, job->group,
                                              scratch);
            for (size_t t = 0; t < tokens; t++) {
                int kind = job->kernels->add_fixed(job->sums_TD + (t0 + t) * job->D + first, out + t * (last - first),
                                                   1.0f, last - first);
                dm_report_fault(job->fault_T, t0 + t, kind, job->layer);
            }
        }
    }
}

void dm_unit_sums(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_matrix *units, const dm_operand *x,
                  size_t unit_count, size_t T, size_t D, size_t P, int format, size_t group, int32_t layer) {
    uint64_t saved = dm_enter();
    matrix_job job = {.kernels = context->kernels,
                      .sums_TD = sums_TD,
                      .fault_T = fault_T,
                      .matrices = units,
                      .x = x,
                      .matrix_count = unit_count,
                      .T = T,
                      .D = D,
                      .P = P,
                      .format = format,
                      .group = group,
                      .tiles = dm_divide_up(D, 16),
                      .layer = layer};
    job.items = dm_item_count(context, job.tiles, T * 16 * P * unit_count);
    dm_pool_run(context->pool, unit_sums_item, &job, job.items);
    dm_set_float_state(saved);
}
