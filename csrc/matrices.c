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

/* Adjacent tiles, of one matrix or of several that follow each other in memory and in the output. */
typedef struct tile_run {
    const uint8_t *packed;
    size_t rows, out_column;
} tile_run;

/* Where a thread is in the list: the next matrix, and the number of its first tile. */
typedef struct tile_place {
    size_t matrix, tile;
} tile_place;

/* The part of the next matrix that lies in tiles [first, last), numbered through all matrices; 0 at the end. */
static int next_part(tile_run *part, tile_place *place, const matrix_job *job, size_t first, size_t last,
                     size_t tile_bytes) {
    while (place->matrix < job->matrix_count && place->tile < last) {
        const dm_matrix *matrix = &job->matrices[place->matrix++];
        const size_t begin = place->tile, tiles = dm_divide_up(matrix->rows, 16);
        place->tile += tiles;
        const size_t from = first > begin ? first - begin : 0, to = last - begin < tiles ? last - begin : tiles;
        const size_t end_row = to * 16 < matrix->rows ? to * 16 : matrix->rows;
        *part = (tile_run){(const uint8_t *)matrix->packed + from * tile_bytes, end_row - from * 16,
                           matrix->out_column + from * 16};
        if (from < to) return 1;
    }
    return 0;
}

static int continues(const tile_run *run, const tile_run *part, size_t tile_bytes) {
    return run->rows % 16 == 0 && part->out_column == run->out_column + run->rows &&
           part->packed == run->packed + run->rows / 16 * tile_bytes;
}

static void matmul_tiles(void *argument, size_t first, size_t last, dm_worker *worker) {
    const matrix_job *job = argument;
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->x->columns));
    const size_t tile_bytes = dm_tile_bytes(job->format, job->x->columns, job->group);
    dm_rows rows = dm_operand_rows(job->x, 0, job->x->columns);
    tile_place place = {0};
    tile_run run, part;
    int more = next_part(&part, &place, job, first, last, tile_bytes);
    while (more) {
        run = part;
        while ((more = next_part(&part, &place, job, first, last, tile_bytes)) && continues(&run, &part, tile_bytes)) {
            run.rows += part.rows;
        }
        if (more) dm_prefetch_stream(part.packed, dm_divide_up(part.rows, 16) * tile_bytes);
        job->kernels->matmul[job->format](job->out_TR + run.out_column, run.packed, &rows, job->T, run.rows,
                                          job->out_stride, job->group, scratch);
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
