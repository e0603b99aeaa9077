/* unit_sums.c: o_proj, each unit's contribution added into exact sums.
 *
 * A few tokens: a thread takes slices of whole units, long runs of bytes, and adds into sums of its own. Many tokens:
 * it takes tiles of all units, so that every element of the sums is one thread's own.
 */
#include <string.h>

#include "context.h"
#include "float_state.h"
#include "streams.h"

#define SLICE_BYTES 36864

typedef struct units_job {
    const dm_kernels *kernels;
    dm_pool *pool;
    int64_t *sums_TD;
    int32_t *fault_T;
    const dm_matrix *units;
    const dm_operand *x;
    size_t unit_count, T, D, P, tiles, slices;
    int32_t layer;
    uint64_t serial;
} units_job;

static size_t tile_bytes_of(const units_job *job, size_t unit) {
    return dm_tile_bytes(job->units[unit].format, job->P, job->units[unit].group);
}

static const uint8_t *tile_of(const units_job *job, size_t unit, size_t tile) {
    return (const uint8_t *)job->units[unit].packed + tile * tile_bytes_of(job, unit);
}

/* The first bytes of tiles [from, to) of a unit are asked for. */
static void prefetch_unit(const units_job *job, size_t unit, size_t from, size_t to) {
    dm_prefetch_stream(tile_of(job, unit, from), (to - from) * tile_bytes_of(job, unit));
}

/* Tiles [from, to) of one unit times all tokens. */
static void add_unit(const units_job *job, int64_t *sums_TD, size_t unit, size_t from, size_t to, dm_worker *worker) {
    const size_t first = from * 16, rows = (to * 16 < job->D ? to * 16 : job->D) - first;
    const dm_matrix *matrix = &job->units[unit];
    const uint8_t *packed = tile_of(job, unit, from);
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->P));
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, DM_TOKEN_BLOCK * rows * sizeof(float));
    for (size_t t0 = 0; t0 < job->T; t0 += DM_TOKEN_BLOCK) {
        size_t tokens = job->T - t0 < DM_TOKEN_BLOCK ? job->T - t0 : DM_TOKEN_BLOCK;
        dm_rows x = dm_rows_from(dm_operand_rows(job->x, unit * job->P, job->P), t0);
        job->kernels->matmul[matrix->format](out, packed, &x, tokens, rows, rows, matrix->group, scratch);
        for (size_t t = 0; t < tokens; t++) {
            int kind = job->kernels->add_fixed(sums_TD + (t0 + t) * job->D + first, out + t * rows, 1.0f, rows);
            dm_report_fault(job->fault_T, t0 + t, kind, job->layer);
        }
    }
}

static void sum_tiles(void *argument, size_t first, size_t last, dm_worker *worker) {
    const units_job *job = argument;
    const size_t end = last * 16 < job->D ? last * 16 : job->D;
    for (size_t t = 0; t < job->T; t++) {
        memset(job->sums_TD + t * job->D + first * 16, 0, (end - first * 16) * sizeof(int64_t));
    }
    for (size_t unit = 0; unit < job->unit_count; unit++) {
        if (unit + 1 < job->unit_count) prefetch_unit(job, unit + 1, first, last);
        add_unit(job, job->sums_TD, unit, first, last, worker);
    }
}

/* Slices [first, last), numbered through all units. */
static void sum_slices(void *argument, size_t first, size_t last, dm_worker *worker) {
    const units_job *job = argument;
    int64_t *sums_TD = dm_thread_sums(worker, job->sums_TD, job->serial, job->T * job->D);
    while (first < last) {
        const size_t unit = first / job->slices, begin = unit * job->slices;
        const size_t end = begin + job->slices < last ? begin + job->slices : last;
        const size_t from = dm_item_first(first - begin, job->slices, job->tiles);
        if (end < last) prefetch_unit(job, unit + 1, 0, job->tiles);
        add_unit(job, sums_TD, unit, from, dm_item_first(end - begin, job->slices, job->tiles), worker);
        first = end;
    }
}

void dm_unit_sums(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_matrix *units, const dm_operand *x,
                  size_t unit_count, size_t T, size_t D, size_t P, int32_t layer) {
    uint64_t saved = dm_enter();
    units_job job = {.kernels = context->kernels,
                     .pool = context->pool,
                     .sums_TD = sums_TD,
                     .fault_T = fault_T,
                     .units = units,
                     .x = x,
                     .unit_count = unit_count,
                     .T = T,
                     .D = D,
                     .P = P,
                     .tiles = dm_divide_up(D, 16),
                     .layer = layer,
                     .serial = ++context->serial};
    size_t bytes = 0; /* of a tile of all units */
    for (size_t unit = 0; unit < unit_count; unit++) bytes += tile_bytes_of(&job, unit);
    if (T > DM_TOKEN_BLOCK || unit_count == 0) {
        dm_pool_share(context->pool, sum_tiles, &job, job.tiles, dm_least_units(bytes > 0 ? bytes : 64, T > 0 ? T : 1));
    } else {
        size_t slices = dm_divide_up(job.tiles * bytes, SLICE_BYTES * unit_count);
        job.slices = slices < job.tiles ? slices : job.tiles;
        memset(sums_TD, 0, T * D * sizeof *sums_TD);
        dm_pool_share(context->pool, sum_slices, &job, unit_count * job.slices, 1);
        dm_add_thread_sums(context, sums_TD, job.serial, T * D);
    }
    dm_set_float_state(saved);
}
