/* matrices.c: matmul over a list of matrices, and o_proj's exact sums. Units of work are tiles of 16 rows. */
#include "context.h"
#include "float_state.h"

#include <string.h>

/* Waking a thread and meeting it again takes less than half a microsecond; reading this much takes two. */
#define LEAST_SHARE_BYTES 32768
#define STREAM_START_BYTES 2048

typedef struct matrix_job {
    const dm_kernels *kernels;
    float *out_TR;
    int64_t *sums_TD;
    int32_t *fault_T;
    const dm_matrix *matrices;
    const dm_operand *x;
    size_t matrix_count, T, D, P, out_stride, group;
    int format;
    int32_t layer;
} matrix_job;

/* A new stream's first bytes, asked for while the one before it is read: the hardware's own prefetch starts late. */
static void prefetch_stream(const uint8_t *first, size_t bytes) {
    bytes = bytes < STREAM_START_BYTES ? bytes : STREAM_START_BYTES;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

/* Part of a matrix: tiles [from, to). */
typedef struct tile_run {
    const dm_matrix *matrix;
    size_t from, to;
} tile_run;

/* The next run of tiles [first, last), numbered through all matrices; 0 at the end. `i` and `start` are the next matrix
 * and the number of its first tile. */
static int next_run(tile_run *run, size_t *i, size_t *start, const matrix_job *job, size_t first, size_t last) {
    while (*i < job->matrix_count && *start < last) {
        const dm_matrix *matrix = &job->matrices[(*i)++];
        size_t begin = *start, tiles = dm_divide_up(matrix->rows, 16);
        *start += tiles;
        size_t from = first > begin ? first - begin : 0;
        size_t to = last - begin < tiles ? last - begin : tiles;
        *run = (tile_run){matrix, from, to};
        if (from < to) return 1;
    }
    return 0;
}

static void matmul_tiles(void *argument, size_t first, size_t last, dm_worker *worker) {
    const matrix_job *job = argument;
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->x->columns));
    size_t tile_bytes = dm_tile_bytes(job->format, job->x->columns, job->group);
    dm_rows rows = dm_operand_rows(job->x, 0, job->x->columns);
    size_t i = 0, start = 0;
    tile_run run, next;
    int more = next_run(&next, &i, &start, job, first, last);
    while (more) {
        run = next;
        more = next_run(&next, &i, &start, job, first, last);
        if (more) {
            prefetch_stream((const uint8_t *)next.matrix->packed + next.from * tile_bytes,
                            (next.to - next.from) * tile_bytes);
        }
        size_t end_row = run.to * 16 < run.matrix->rows ? run.to * 16 : run.matrix->rows;
        job->kernels->matmul[job->format](job->out_TR + run.matrix->out_column + run.from * 16,
                                          (const uint8_t *)run.matrix->packed + run.from * tile_bytes, &rows, job->T,
                                          end_row - run.from * 16, job->out_stride, job->group, scratch);
    }
}

/* Tiles that are worth a share of their own. */
static size_t least_tiles(size_t tile_bytes, size_t T) { return LEAST_SHARE_BYTES / (tile_bytes * T) + 1; }

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
    size_t tiles = 0;
    for (size_t i = 0; i < matrix_count; i++) tiles += dm_divide_up(matrices[i].rows, 16);
    if (T > 0) {
        size_t least = least_tiles(dm_tile_bytes(format, x->columns, group), T);
        dm_pool_share(context->pool, matmul_tiles, &job, tiles, least);
    }
    dm_set_float_state(saved);
}

/* Some tiles of all units: every element of the sums is one thread's own. */
static void unit_sums_tiles(void *argument, size_t first_tile, size_t last_tile, dm_worker *worker) {
    const matrix_job *job = argument;
    size_t first = first_tile * 16;
    size_t last = last_tile * 16 < job->D ? last_tile * 16 : job->D;
    size_t tile_bytes = dm_tile_bytes(job->format, job->P, job->group);
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->P));
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, DM_TOKEN_BLOCK * (last - first) * sizeof(float));
    for (size_t t = 0; t < job->T; t++) {
        memset(job->sums_TD + t * job->D + first, 0, (last - first) * sizeof(int64_t));
    }
    for (size_t unit = 0; unit < job->matrix_count; unit++) {
        const size_t begin = first_tile * tile_bytes;
        const uint8_t *packed = (const uint8_t *)job->matrices[unit].packed + begin;
        if (unit + 1 < job->matrix_count) {
            prefetch_stream((const uint8_t *)job->matrices[unit + 1].packed + begin,
                            (last_tile - first_tile) * tile_bytes);
        }
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
                      .layer = layer};
    size_t tile_bytes = dm_tile_bytes(format, P, group) * (unit_count > 0 ? unit_count : 1);
    dm_pool_share(context->pool, unit_sums_tiles, &job, dm_divide_up(D, 16), least_tiles(tile_bytes, T > 0 ? T : 1));
    dm_set_float_state(saved);
}
