/* matrices.c: matmul over a list of matrices. Units of work are tiles of 16 rows. */
#include "context.h"
#include "float_state.h"
#include "streams.h"

typedef struct matrix_job {
    const dm_kernels *kernels;
    float *out_TR;
    const dm_matrix *matrices;
    const dm_operand *x;
    size_t matrix_count, T, out_stride, group;
    int format;
} matrix_job;

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
            dm_prefetch_stream((const uint8_t *)next.matrix->packed + next.from * tile_bytes,
                               (next.to - next.from) * tile_bytes);
        }
        size_t end_row = run.to * 16 < run.matrix->rows ? run.to * 16 : run.matrix->rows;
        job->kernels->matmul[job->format](job->out_TR + run.matrix->out_column + run.from * 16,
                                          (const uint8_t *)run.matrix->packed + run.from * tile_bytes, &rows, job->T,
                                          end_row - run.from * 16, job->out_stride, job->group, scratch);
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
    size_t tiles = 0;
    for (size_t i = 0; i < matrix_count; i++) tiles += dm_divide_up(matrices[i].rows, 16);
    if (T > 0) {
        size_t least = dm_least_tiles(dm_tile_bytes(format, x->columns, group), T);
        dm_pool_share(context->pool, matmul_tiles, &job, tiles, least);
    }
    dm_set_float_state(saved);
}
