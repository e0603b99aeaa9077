/* packing.c: matrices into and out of the packed formats; a tile of 16 rows is one unit of work. */
#include "context.h"
#include "float_state.h"

typedef struct packing {
    const dm_kernels *kernels;
    void *packed;
    const void *source;
    float *weights_RC;
    const float *scale_R;
    float *scales_out_R;
    size_t R, C, row_stride, group, tiles, items;
    int format;
    size_t bad;
} packing;

size_t dm_packed_bytes(int format, size_t rows, size_t columns, size_t group) {
    return dm_divide_up(rows, 16) * dm_tile_bytes(format, columns, group);
}

size_t dm_chunk_bytes(int format, size_t D, size_t width, size_t group) {
    return 2 * dm_packed_bytes(format, width, D, group) + dm_packed_bytes(format, D, width, group);
}

static void pack_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    packing *job = argument;
    size_t bad = 0;
    size_t last = dm_item_first(item + 1, job->items, job->tiles);
    for (size_t tile = dm_item_first(item, job->items, job->tiles); tile < last; tile++) {
        dm_pack_job tile_job = {
            .weights_RC = (const float *)job->source + tile * 16 * job->row_stride,
            .scale_R = job->scale_R == NULL ? NULL : job->scale_R + tile * 16,
            .rows_present = job->R - tile * 16 < 16 ? job->R - tile * 16 : 16,
            .C = job->C,
            .row_stride = job->row_stride,
            .group = job->group,
        };
        uint8_t *to = (uint8_t *)job->packed + tile * dm_tile_bytes(job->format, job->C, job->group);
        bad += job->kernels->pack_tile[job->format](to, &tile_job);
    }
    __atomic_fetch_add(&job->bad, bad, __ATOMIC_RELAXED);
}

static void row_scales_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    packing *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->R);
    for (size_t r = dm_item_first(item, job->items, job->R); r < last; r++) {
        const float *row = (const float *)job->source + r * job->row_stride;
        job->scales_out_R[r] = job->kernels->row_scale(row, job->C, job->format);
    }
}

static void unpack_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    packing *job = argument;
    size_t last = dm_item_first(item + 1, job->items, job->tiles);
    for (size_t tile = dm_item_first(item, job->items, job->tiles); tile < last; tile++) {
        const uint8_t *from = (const uint8_t *)job->source + tile * dm_tile_bytes(job->format, job->C, job->group);
        size_t rows = job->R - tile * 16 < 16 ? job->R - tile * 16 : 16;
        job->kernels->unpack_tile[job->format](job->weights_RC + tile * 16 * job->C, from, rows, job->C, job->group);
    }
}

static void run(dm_context *context, dm_task task, packing *job, size_t units, size_t steps_per_unit) {
    uint64_t saved = dm_enter();
    job->kernels = context->kernels;
    job->tiles = dm_divide_up(job->R, 16);
    job->items = dm_item_count(context, units, steps_per_unit);
    dm_pool_run(context->pool, task, job, job->items);
    dm_set_float_state(saved);
}

void dm_row_scales(dm_context *context, float *scale_R, const float *weights_RC, size_t R, size_t C, size_t row_stride,
                   int format) {
    packing job = {
        .source = weights_RC, .scales_out_R = scale_R, .R = R, .C = C, .row_stride = row_stride, .format = format};
    run(context, row_scales_item, &job, R, C);
}

size_t dm_pack(dm_context *context, void *packed, const float *weights_RC, const float *scale_R, size_t R, size_t C,
               size_t row_stride, int format, size_t group) {
    packing job = {.packed = packed,
                   .source = weights_RC,
                   .scale_R = scale_R,
                   .R = R,
                   .C = C,
                   .row_stride = row_stride,
                   .format = format,
                   .group = group};
    run(context, pack_item, &job, dm_divide_up(R, 16), 16 * C);
    return job.bad;
}

void dm_unpack(dm_context *context, float *weights_RC, const void *packed, size_t R, size_t C, int format,
               size_t group) {
    packing job = {.source = packed, .weights_RC = weights_RC, .R = R, .C = C, .format = format, .group = group};
    run(context, unpack_item, &job, dm_divide_up(R, 16), 16 * C);
}
