/* packing.c: matrices into and out of the packed formats; a tile of 16 rows is one unit of work. */
#include <string.h>

#include "context.h"
#include "float_state.h"

typedef struct packing {
    const dm_kernels *kernels;
    const dm_pack_matrix *matrices;
    uint64_t *bad_N;
    int format, scales;
} packing;

typedef struct unpacking {
    const dm_kernels *kernels;
    float *weights_RC;
    const uint8_t *packed;
    size_t R, C, group, tiles, items;
    int format;
} unpacking;

typedef struct scaling {
    const dm_kernels *kernels;
    const dm_pack_matrix *matrix;
    float *scale_R;
    size_t items;
    int format, scales;
} scaling;

size_t dm_packed_bytes(int format, size_t rows, size_t columns, size_t group) {
    return dm_divide_up(rows, 16) * dm_tile_bytes(format, columns, group);
}

size_t dm_chunk_bytes(const dm_chunk_format *format, size_t D, size_t width) {
    return 2 * dm_packed_bytes(format->format, width, D, format->group) +
           dm_packed_bytes(format->down_format, D, width, format->down_group);
}

/* Tile t, its weights in scratch. */
static dm_pack_job open_job(const dm_kernels *kernels, const dm_pack_matrix *matrix, size_t t, int scales,
                            dm_worker *worker) {
    const size_t left = matrix->rows - t * 16, columns = dm_round_up(matrix->columns, DM_GROUP);
    /* Rows of zeros are rows of the matrix: they have a scale, which padding has not. */
    dm_pack_job tile = {.columns_C16 = dm_scratch(worker, DM_SCRATCH_OPERAND, 16 * columns * sizeof(float)),
                        .scale_R = matrix->scale_R == NULL ? NULL : matrix->scale_R + t * 16,
                        .importance_C = matrix->importance_C,
                        .rows_present = left < 16 ? left : 16,
                        .C = matrix->columns,
                        .group = matrix->group,
                        .scales = scales};
    kernels->open_tile(tile.columns_C16, matrix, t * 16);
    return tile;
}

static uint64_t pack_one_tile(const packing *job, const dm_pack_matrix *matrix, size_t t, dm_worker *worker) {
    const dm_pack_job tile = open_job(job->kernels, matrix, t, job->scales, worker);
    uint8_t *to = (uint8_t *)matrix->packed + t * dm_tile_bytes(job->format, matrix->columns, matrix->group);
    return job->kernels->pack_tile[job->format](to, &tile);
}

/* Tiles [first, last) of all matrices' tiles, counted one after the other. */
static void pack_range(void *argument, size_t first, size_t last, dm_worker *worker) {
    packing *job = argument;
    size_t before = 0;
    for (size_t n = 0; before < last; n++) {
        const dm_pack_matrix *matrix = &job->matrices[n];
        const size_t tiles = dm_divide_up(matrix->rows, 16), end = before + tiles;
        uint64_t bad = 0;
        for (size_t tile = first > before ? first : before; tile < (last < end ? last : end); tile++) {
            bad += pack_one_tile(job, matrix, tile - before, worker);
        }
        if (bad > 0) __atomic_fetch_add(&job->bad_N[n], bad, __ATOMIC_RELAXED);
        before = end;
    }
}

void dm_pack_matrices(dm_context *context, uint64_t *bad_N, const dm_pack_matrix *matrices, size_t count, int format,
                      int scales) {
    packing job = {
        .kernels = context->kernels, .matrices = matrices, .bad_N = bad_N, .format = format, .scales = scales};
    size_t tiles = 0, weights = 0;
    for (size_t n = 0; n < count; n++) {
        bad_N[n] = 0;
        tiles += dm_divide_up(matrices[n].rows, 16);
        weights += matrices[n].rows * matrices[n].columns;
    }
    uint64_t saved = dm_enter();
    dm_pool_share(context->pool, pack_range, &job, tiles, weights < DM_SMALL_WORK ? tiles : 1);
    dm_set_float_state(saved);
}

size_t dm_pack(dm_context *context, void *packed, const float *weights_RC, const float *scale_R, size_t R, size_t C,
               size_t row_stride, int format, size_t group) {
    const dm_pack_matrix matrix = {.packed = packed,
                                   .weights = weights_RC,
                                   .scale_R = scale_R,
                                   .rows = R,
                                   .columns = C,
                                   .rows_present = R,
                                   .columns_present = C,
                                   .row_stride = row_stride,
                                   .group = group};
    uint64_t bad = 0;
    dm_pack_matrices(context, &bad, &matrix, 1, format, DM_SCALES_ABSMAX);
    return (size_t)bad;
}

static void row_scales_item(void *argument, size_t item, dm_worker *worker) {
    scaling *job = argument;
    const size_t R = job->matrix->rows, tiles = dm_divide_up(R, 16), last = dm_item_first(item + 1, job->items, tiles);
    for (size_t t = dm_item_first(item, job->items, tiles); t < last; t++) {
        float scale_16[16];
        const dm_pack_job tile = open_job(job->kernels, job->matrix, t, job->scales, worker);
        job->kernels->row_scales(scale_16, &tile, job->format);
        memcpy(job->scale_R + t * 16, scale_16, tile.rows_present * sizeof(float));
    }
}

void dm_row_scales(dm_context *context, float *scale_R, const float *weights_RC, const float *importance_C, size_t R,
                   size_t C, size_t row_stride, int format, int scales) {
    const dm_pack_matrix matrix = {.weights = weights_RC,
                                   .importance_C = importance_C,
                                   .rows = R,
                                   .columns = C,
                                   .rows_present = R,
                                   .columns_present = C,
                                   .row_stride = row_stride};
    scaling job = {.kernels = context->kernels,
                   .matrix = &matrix,
                   .scale_R = scale_R,
                   .items = dm_item_count(context, dm_divide_up(R, 16), 16 * C),
                   .format = format,
                   .scales = scales};
    uint64_t saved = dm_enter();
    dm_pool_run(context->pool, row_scales_item, &job, job.items);
    dm_set_float_state(saved);
}

static void unpack_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    unpacking *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->tiles);
    for (size_t tile = dm_item_first(item, job->items, job->tiles); tile < last; tile++) {
        const uint8_t *from = job->packed + tile * dm_tile_bytes(job->format, job->C, job->group);
        size_t rows = job->R - tile * 16 < 16 ? job->R - tile * 16 : 16;
        job->kernels->unpack_tile[job->format](job->weights_RC + tile * 16 * job->C, from, rows, job->C, job->group);
    }
}

void dm_unpack(dm_context *context, float *weights_RC, const void *packed, size_t R, size_t C, int format,
               size_t group) {
    unpacking job = {.kernels = context->kernels,
                     .weights_RC = weights_RC,
                     .packed = packed,
                     .R = R,
                     .C = C,
                     .group = group,
                     .tiles = dm_divide_up(R, 16),
                     .format = format};
    job.items = dm_item_count(context, job.tiles, 16 * C);
    uint64_t saved = dm_enter();
    dm_pool_run(context->pool, unpack_item, &job, job.items);
    dm_set_float_state(saved);
}
