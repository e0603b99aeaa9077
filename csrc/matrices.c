/* matrices.c: matmul over a list of matrices. Units of work are tiles of 16 rows. */
#include "context.h"
#include "float_state.h"
#include "streams.h"

typedef struct matrix_job {
    const dm_kernels *kernels;
    float *out_TR;
    const dm_matrix *matrices;
    const dm_operand *x;
    size_t matrix_count, T, out_stride;
    size_t unit_bytes; /* tiles are shared out in units of this many bytes; it divides every tile's */
} matrix_job;

/* Adjacent tiles, of one matrix or of several of one format that follow each other in memory and in the output. */
typedef struct tile_run {
    const uint8_t *packed;
    size_t rows, out_column, tile_bytes;
    const dm_matrix *matrix; /* its format */
} tile_run;

/* Where a thread is in the list: the next matrix, the number of its first unit, and the bytes of the last one's tiles.
 */
typedef struct tile_place {
    size_t matrix, unit, tile_bytes;
} tile_place;

static int packed_alike(const dm_matrix *a, const dm_matrix *b) {
    return a->format == b->format && a->group == b->group;
}

static size_t tile_bytes_of(const matrix_job *job, size_t i) {
    return dm_tile_bytes(job->matrices[i].format, job->x->columns, job->matrices[i].group);
}

/* Bytes of the tiles of the next matrix. */
static size_t next_tile_bytes(const tile_place *place, const matrix_job *job) {
    const dm_matrix *matrix = &job->matrices[place->matrix];
    if (place->matrix > 0 && packed_alike(matrix, matrix - 1)) return place->tile_bytes;
    return tile_bytes_of(job, place->matrix);
}

/* The part of the next matrix whose tiles begin in units [first, last), numbered through all matrices; 0 at the end. */
static int next_part(tile_run *part, tile_place *place, const matrix_job *job, size_t first, size_t last) {
    while (place->matrix < job->matrix_count && place->unit < last) {
        place->tile_bytes = next_tile_bytes(place, job);
        const dm_matrix *matrix = &job->matrices[place->matrix++];
        const size_t begin = place->unit, tiles = dm_divide_up(matrix->rows, 16);
        const size_t tile_units = place->tile_bytes / job->unit_bytes;
        place->unit += tiles * tile_units;
        if (place->unit <= first) continue;
        const size_t from = first > begin ? dm_divide_up(first - begin, tile_units) : 0;
        const size_t to = last < place->unit ? dm_divide_up(last - begin, tile_units) : tiles;
        const size_t end_row = to * 16 < matrix->rows ? to * 16 : matrix->rows;
        *part = (tile_run){(const uint8_t *)matrix->packed + from * place->tile_bytes, end_row - from * 16,
                           matrix->out_column + from * 16, place->tile_bytes, matrix};
        if (from < to) return 1;
    }
    return 0;
}

static int continues(const tile_run *run, const tile_run *part) {
    return run->rows % 16 == 0 && part->out_column == run->out_column + run->rows &&
           part->packed == run->packed + run->rows / 16 * run->tile_bytes && packed_alike(run->matrix, part->matrix);
}

static void matmul_tiles(void *argument, size_t first, size_t last, dm_worker *worker) {
    const matrix_job *job = argument;
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->x->columns));
    dm_rows rows = dm_operand_rows(job->x, 0, job->x->columns);
    tile_place place = {0};
    tile_run run, part;
    int more = next_part(&part, &place, job, first, last);
    while (more) {
        run = part;
        while ((more = next_part(&part, &place, job, first, last)) && continues(&run, &part)) run.rows += part.rows;
        if (more) dm_prefetch_stream(part.packed, dm_divide_up(part.rows, 16) * part.tile_bytes);
        job->kernels->matmul[run.matrix->format](job->out_TR + run.out_column, run.packed, &rows, job->T, run.rows,
                                                 job->out_stride, run.matrix->group, scratch);
    }
}

/* Tiles of one size are a unit each; others are as many units as they have lines. Returns the bytes of all. */
static size_t choose_units(matrix_job *job) {
    size_t bytes = 0, tile_bytes = 0;
    for (size_t i = 0; i < job->matrix_count; i++) {
        const size_t before = tile_bytes;
        if (i == 0 || !packed_alike(&job->matrices[i], &job->matrices[i - 1])) tile_bytes = tile_bytes_of(job, i);
        if (i == 0) job->unit_bytes = tile_bytes;
        if (i > 0 && tile_bytes != before) job->unit_bytes = 64;
        bytes += dm_divide_up(job->matrices[i].rows, 16) * tile_bytes;
    }
    return bytes;
}

/* Float tiles are read a few side by side, where there are as many for each thread. */
static size_t least_units(const matrix_job *job, size_t units, size_t threads) {
    const size_t least = dm_least_units(job->unit_bytes, job->T), each = units / threads;
    if (dm_is_quantized(job->matrices[0].format)) return least;
    const size_t side_by_side = job->T == 1 ? DM_FLOAT_TILES_ONE : DM_FLOAT_TILES,
                 most = each < side_by_side ? each : side_by_side;
    return least > most ? least : most;
}

void dm_matmul(dm_context *context, float *out_TR, const dm_matrix *matrices, const dm_operand *x, size_t matrix_count,
               size_t T, size_t out_stride) {
    if (T == 0 || matrix_count == 0) return;
    uint64_t saved = dm_enter();
    matrix_job job = {.kernels = context->kernels,
                      .out_TR = out_TR,
                      .matrices = matrices,
                      .x = x,
                      .matrix_count = matrix_count,
                      .T = T,
                      .out_stride = out_stride};
    const size_t bytes = choose_units(&job), units = bytes / job.unit_bytes;
    dm_pool_share(context->pool, matmul_tiles, &job, units, least_units(&job, units, context->threads));
    dm_set_float_state(saved);
}
