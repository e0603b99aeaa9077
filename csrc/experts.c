/* experts.c: expert chunks from the operand to their int64 sums.
 *
 * Few tokens: a chunk is one item of work. No barrier stands between gate, up and down; every thread adds into sums of
 * its own, which are then added up. Integer addition may take any order (rule 7).
 *
 * Many tokens: sums of all tokens would not fit a core's cache. The hidden units of a batch of chunks are computed
 * first and kept, quantized; then every thread computes columns of its own of all their down matrices.
 */
#include <stdatomic.h>
#include <string.h>

#include "context.h"
#include "float_state.h"

/* Beyond this a thread's sums do not stay in its cache (tried: 1 to 4 MiB with 2 MiB of L2). */
#define MOST_SUM_BYTES (2 << 20)
/* Hidden units kept at a time: beyond this a batch ends (it holds at least one item). */
#define BATCH_HIDDEN_BYTES (4 << 20)
/* The first bytes of the next item are asked for while this one ends. */
#define STREAM_START_BYTES 4096
/* Tiles of a down matrix that an item of the second pass takes if there are few threads. */
#define STRIP_TILES 16

/* At most DM_TOKEN_BLOCK tokens of a chunk; where a batch keeps their hidden units. */
typedef struct expert_item {
    const uint8_t *packed;
    const dm_chunk_format *format;
    size_t first, count, hidden_at;
} expert_item;

typedef struct expert_job {
    const dm_kernels *kernels;
    dm_context *context;
    int64_t *sums_TD;
    int32_t *fault_T;
    const int32_t *token_N;
    const float *weight_N;
    const dm_operand *x;
    const expert_item *items;
    uint8_t *kept;    /* hidden units of a batch */
    uint8_t *started; /* per thread: its sums are cleared */
    size_t T, D, width, threads, item_count, strips;
    int add_to_sums;
    int32_t layer;
    atomic_size_t finished;
} expert_job;

static void ask_for(const uint8_t *first, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

static int consecutive(const int32_t *tokens, size_t n) {
    for (size_t i = 1; i < n; i++) {
        if (tokens[i] != tokens[0] + (int32_t)i) return 0;
    }
    return 1;
}

/* Bytes of n tokens' operand of so many columns: scales and sums before the int8, or floats. */
static size_t operand_bytes(int format, size_t columns, size_t n) {
    if (!dm_is_quantized(format)) return n * columns * sizeof(float);
    return n * dm_divide_up(columns, DM_GROUP) * (DM_GROUP + sizeof(float) + sizeof(int32_t));
}

static dm_rows operand_at(void *at, int format, size_t columns, size_t n) {
    size_t groups = dm_divide_up(columns, DM_GROUP);
    dm_rows rows = {.columns = columns, .x_stride = columns, .q_stride = groups * DM_GROUP, .group_stride = groups};
    if (!dm_is_quantized(format)) {
        rows.x = at;
        return rows;
    }
    rows.scale = at;
    rows.sum = (const int32_t *)(rows.scale + n * groups);
    rows.q = (const int8_t *)(rows.sum + n * groups);
    return rows;
}

/* The operands of an item's tokens side by side: where they are, or copied. */
static dm_rows gather(const expert_job *job, const expert_item *item, dm_worker *worker) {
    const int32_t *tokens = job->token_N + item->first;
    const size_t n = item->count;
    const int format = item->format->format;
    dm_rows all = dm_operand_rows(job->x, 0, job->D);
    if (consecutive(tokens, n)) return dm_rows_from(all, (size_t)tokens[0]);
    void *at = dm_scratch(worker, DM_SCRATCH_OPERAND, operand_bytes(format, job->D, DM_TOKEN_BLOCK));
    dm_rows rows = operand_at(at, format, job->D, n);
    for (size_t i = 0; i < n; i++) {
        dm_rows from = dm_rows_from(all, (size_t)tokens[i]), to = dm_rows_from(rows, i);
        if (!dm_is_quantized(format)) {
            memcpy((float *)to.x, from.x, job->D * sizeof(float));
            continue;
        }
        memcpy((float *)to.scale, from.scale, rows.group_stride * sizeof(float));
        memcpy((int32_t *)to.sum, from.sum, rows.group_stride * sizeof(int32_t));
        memcpy((int8_t *)to.q, from.q, rows.q_stride);
    }
    return rows;
}

/* silu(gate x) * up x of an item's tokens, as the down matrix wants it. */
static dm_rows hidden(const expert_job *job, const expert_item *item, void *at, dm_worker *worker) {
    const size_t width = job->width, n = item->count, group = item->format->group;
    const int format = item->format->format, quantized = dm_is_quantized(item->format->down_format);
    dm_rows x = gather(job, item, worker), h = operand_at(at, item->format->down_format, width, n);
    float *gate = dm_scratch(worker, DM_SCRATCH_HIDDEN, 2 * n * width * sizeof(float)), *up = gate + width;
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->D));
    if (width % 16 == 0) {
        job->kernels->matmul[format](gate, item->packed, &x, n, 2 * width, 2 * width, group, scratch);
    } else {
        const uint8_t *up_packed = item->packed + dm_packed_bytes(format, width, job->D, group);
        job->kernels->matmul[format](gate, item->packed, &x, n, width, 2 * width, group, scratch);
        job->kernels->matmul[format](up, up_packed, &x, n, width, 2 * width, group, scratch);
    }
    for (size_t i = 0; i < n; i++) {
        float *row = quantized ? gate + i * 2 * width : (float *)h.x + i * width;
        job->kernels->silu(row, gate + i * 2 * width, up + i * 2 * width, width);
        if (!quantized) continue;
        dm_rows to = dm_rows_from(h, i);
        int kind = job->kernels->quantize((int8_t *)to.q, (float *)to.scale, (int32_t *)to.sum, row, width);
        dm_report_fault(job->fault_T, (size_t)job->token_N[item->first + i], kind, job->layer);
    }
    return h;
}

/* Bytes of a tile of an item's down matrix. */
static size_t down_tile_bytes(const expert_job *job, const expert_item *item) {
    return dm_tile_bytes(item->format->down_format, job->width, item->format->down_group);
}

/* The tiles of an item's down matrix from column `first` on. */
static const uint8_t *down_tiles(const expert_job *job, const expert_item *item, size_t first) {
    const size_t gate_bytes = dm_packed_bytes(item->format->format, job->width, job->D, item->format->group);
    return item->packed + 2 * gate_bytes + first / 16 * down_tile_bytes(job, item);
}

/* Columns [first, last) of an item's contribution, added to sums_TD. Meanwhile the same tiles of the item `next`, if
 * that is not NULL, are asked for. */
static void down(const expert_job *job, const expert_item *item, const dm_rows *h, int64_t *sums_TD, size_t first,
                 size_t last, const expert_item *next, dm_worker *worker) {
    const uint8_t *packed = down_tiles(job, item, first);
    const size_t columns = last - first;
    const uint8_t *ahead = next == NULL ? NULL : down_tiles(job, next, first);
    const size_t share =
        next == NULL ? 0 : dm_divide_up(dm_divide_up(columns, 16) * down_tile_bytes(job, next), item->count);
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, item->count * columns * sizeof(float));
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->width));
    job->kernels->matmul[item->format->down_format](out, packed, h, item->count, columns, columns,
                                                    item->format->down_group, scratch);
    for (size_t i = 0; i < item->count; i++) {
        size_t t = (size_t)job->token_N[item->first + i];
        if (next != NULL) ask_for(ahead + i * share, share);
        int kind = job->kernels->add_fixed(sums_TD + t * job->D + first, out + i * columns,
                                           job->weight_N[item->first + i], columns);
        dm_report_fault(job->fault_T, t, kind, job->layer);
    }
}

/* ---- few tokens ---- */

static int64_t *thread_sums(const expert_job *job, dm_worker *worker) {
    if (job->threads == 1) return job->sums_TD;
    return dm_scratch(worker, DM_SCRATCH_SUMS, job->T * job->D * sizeof(int64_t));
}

static void add_threads(const expert_job *job, size_t first, size_t last) {
    memset(job->sums_TD + first, 0, (last - first) * sizeof(int64_t));
    for (size_t thread = 0; thread < job->threads; thread++) {
        if (!job->started[thread]) continue;
        const int64_t *part = thread_sums(job, dm_pool_worker(job->context->pool, thread));
        for (size_t i = first; i < last; i++) job->sums_TD[i] += part[i];
    }
}

static void add_threads_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const expert_job *job = argument;
    add_threads(job, dm_item_first(item, job->strips, job->T * job->D),
                dm_item_first(item + 1, job->strips, job->T * job->D));
}

static void chunk_item(void *argument, size_t index, dm_worker *worker) {
    expert_job *job = argument;
    const expert_item *item = &job->items[index];
    int64_t *sums_TD = thread_sums(job, worker);
    if (!job->started[worker->index]) memset(sums_TD, 0, job->T * job->D * sizeof(int64_t));
    job->started[worker->index] = 1;
    void *at = dm_scratch(worker, DM_SCRATCH_KEPT, operand_bytes(item->format->down_format, job->width, item->count));
    dm_rows h = hidden(job, item, at, worker);
    if (index + job->threads < job->item_count) ask_for(item[job->threads].packed, STREAM_START_BYTES);
    down(job, item, &h, sums_TD, 0, job->D, NULL, worker);
    /* The last one adds up, if that is little work. */
    if (atomic_fetch_add(&job->finished, 1) + 1 == job->item_count && job->threads > 1 && job->strips == 1) {
        add_threads(job, 0, job->T * job->D);
    }
}

static void one_pass(expert_job *job) {
    job->strips = dm_item_count(job->context, job->T * job->D, job->threads);
    dm_pool_run(job->context->pool, chunk_item, job, job->item_count);
    if (job->threads > 1 && job->strips > 1) dm_pool_run(job->context->pool, add_threads_item, job, job->strips);
}

/* ---- many tokens ---- */

static void hidden_item(void *argument, size_t index, dm_worker *worker) {
    const expert_job *job = argument;
    const expert_item *item = &job->items[index];
    hidden(job, item, job->kept + item->hidden_at, worker);
    if (index + job->threads < job->item_count) ask_for(item[job->threads].packed, STREAM_START_BYTES);
}

static void strip_item(void *argument, size_t strip, dm_worker *worker) {
    const expert_job *job = argument;
    const size_t tiles = dm_divide_up(job->D, 16);
    const size_t first = dm_item_first(strip, job->strips, tiles) * 16;
    size_t last = dm_item_first(strip + 1, job->strips, tiles) * 16;
    last = last < job->D ? last : job->D;
    for (size_t t = 0; t < job->T && !job->add_to_sums; t++) {
        memset(job->sums_TD + t * job->D + first, 0, (last - first) * sizeof(int64_t));
    }
    for (size_t i = 0; i < job->item_count; i++) {
        const expert_item *item = &job->items[i];
        dm_rows h = operand_at(job->kept + item->hidden_at, item->format->down_format, job->width, item->count);
        down(job, item, &h, job->sums_TD, first, last, i + 1 < job->item_count ? item + 1 : NULL, worker);
    }
}

static void two_passes(expert_job *job, expert_item *items, size_t count) {
    const size_t tiles = dm_divide_up(job->D, 16), few = tiles / STRIP_TILES, many = 4 * job->threads;
    job->strips = few > many ? few : many < tiles ? many : tiles;
    for (size_t first = 0, last = 0; first < count; first = last) {
        size_t bytes = 0;
        for (; last < count && (last == first || bytes < BATCH_HIDDEN_BYTES); last++) {
            items[last].hidden_at = bytes;
            bytes += dm_round_up(operand_bytes(items[last].format->down_format, job->width, items[last].count), 64);
        }
        job->items = items + first;
        job->item_count = last - first;
        job->add_to_sums = first > 0;
        job->kept = dm_scratch(dm_pool_worker(job->context->pool, 0), DM_SCRATCH_KEPT, bytes);
        dm_pool_run(job->context->pool, hidden_item, job, job->item_count);
        dm_pool_run(job->context->pool, strip_item, job, job->strips);
    }
}

/* Chunks cut into blocks of tokens of even size. Returns how many; items may be NULL. */
static size_t cut_chunks(expert_item *items, const dm_chunk *chunks, size_t chunk_count) {
    size_t count = 0;
    for (size_t c = 0; c < chunk_count; c++) {
        size_t blocks = dm_divide_up(chunks[c].count, DM_TOKEN_BLOCK);
        for (size_t b = 0; b < blocks; b++, count++) {
            if (items == NULL) continue;
            size_t first = dm_item_first(b, blocks, chunks[c].count),
                   last = dm_item_first(b + 1, blocks, chunks[c].count);
            items[count] = (expert_item){chunks[c].packed, chunks[c].format, chunks[c].first + first, last - first, 0};
        }
    }
    return count;
}

void dm_experts(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_chunk *chunks, const int32_t *token_N,
                const float *weight_N, const dm_operand *x, size_t chunk_count, size_t T, size_t D, size_t width,
                int32_t layer) {
    size_t count = cut_chunks(NULL, chunks, chunk_count);
    if (count == 0) {
        memset(sums_TD, 0, T * D * sizeof(int64_t));
        return;
    }
    uint64_t saved = dm_enter();
    expert_item *items =
        dm_scratch(dm_pool_worker(context->pool, 0), DM_SCRATCH_ITEMS, count * sizeof *items + context->threads);
    cut_chunks(items, chunks, chunk_count);
    expert_job job = {.kernels = context->kernels,
                      .context = context,
                      .sums_TD = sums_TD,
                      .fault_T = fault_T,
                      .token_N = token_N,
                      .weight_N = weight_N,
                      .x = x,
                      .items = items,
                      .started = (uint8_t *)(items + count),
                      .T = T,
                      .D = D,
                      .width = width,
                      .threads = count > 1 ? context->threads : 1,
                      .item_count = count,
                      .layer = layer};
    memset(job.started, 0, context->threads);
    if (T * D * sizeof(int64_t) <= MOST_SUM_BYTES)
        one_pass(&job);
    else
        two_passes(&job, items, count);
    dm_set_float_state(saved);
}
