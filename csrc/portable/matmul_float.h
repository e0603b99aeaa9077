/* matmul_float.h: f32 and bf16 weights. A lane is a row, K ascends, one fma per weight (rule 6).
 *
 * Work goes by blocks of tiles and tokens whose sums stay in registers. A single token takes as long as its weights
 * take to arrive, and memory delivers four tiles side by side faster than one.
 */
#ifndef DM_MATMUL_FLOAT_H
#define DM_MATMUL_FLOAT_H

/* A block of several tokens: 16 sums where there are 32 registers of 16 lanes, else of one tile. */
#define FLOAT_TOKENS (DM_LANES == 16 ? 8 : 4)
#define FLOAT_TILES (DM_LANES == 16 ? DM_FLOAT_TILES : 1)

/* Tiles are read so many columns at a time; meanwhile as many bytes are asked for, so far ahead (512 to 2048 tried). */
#define FLOAT_STEP 16
#define FLOAT_AHEAD_BYTES 512

typedef f32v (*weight_loader)(const void *tile, size_t i);

DM_INLINE f32v load_weights_f32(const void *tile, size_t i) { return load_f32((const float *)tile + i); }
DM_INLINE f32v load_weights_bf16(const void *tile, size_t i) { return widen_bf16((const uint16_t *)tile + i); }

typedef struct float_job {
    float *out_TR;
    const uint8_t *packed;
    const float *x_TC;
    size_t rows, columns, x_stride, out_stride, tile_bytes, column_bytes;
} float_job;

/* sum[i][r] += register r of `tiles` tiles times token i, columns [first, last). */
DM_INLINE void add_float_columns(f32v *sum, const uint8_t *tile, const float *x_TC, const float_job *job, size_t first,
                                 size_t last, size_t tokens, size_t tiles, weight_loader load) {
    const size_t registers = tiles * DM_PARTS;
    for (size_t c = first; c < last; c++) {
        f32v weight[DM_FLOAT_TILES_ONE * DM_PARTS];
        for (size_t r = 0; r < registers; r++) {
            weight[r] = load(tile + r / DM_PARTS * job->tile_bytes, c * 16 + r % DM_PARTS * DM_LANES);
        }
        for (size_t i = 0; i < tokens; i++) {
            const f32v factor = all_f32(x_TC[i * job->x_stride + c]);
            for (size_t r = 0; r < registers; r++) {
                sum[i * registers + r] = fma_lanes(weight[r], factor, sum[i * registers + r]);
            }
        }
    }
}

/* Tiles `first`, first + 1, ... against tokens t, t + 1, ... */
DM_INLINE void float_block(const float_job *job, size_t first, size_t t, size_t tokens, size_t tiles,
                           weight_loader load) {
    const size_t registers = tiles * DM_PARTS;
    const uint8_t *tile = job->packed + first * job->tile_bytes;
    const float *x_TC = job->x_TC + t * job->x_stride;
    f32v sum[FLOAT_TOKENS * DM_FLOAT_TILES_ONE * DM_PARTS];
    for (size_t i = 0; i < tokens * registers; i++) sum[i] = (f32v){0};
    size_t c = 0;
    for (; c + FLOAT_STEP <= job->columns; c += FLOAT_STEP) {
        for (size_t i = 0; i < tiles && t == 0; i++) {
            const uint8_t *ahead = tile + i * job->tile_bytes + c * job->column_bytes + FLOAT_AHEAD_BYTES;
            for (size_t at = 0; at < FLOAT_STEP * job->column_bytes; at += 64) __builtin_prefetch(ahead + at, 0, 3);
        }
        add_float_columns(sum, tile, x_TC, job, c, c + FLOAT_STEP, tokens, tiles, load);
    }
    add_float_columns(sum, tile, x_TC, job, c, job->columns, tokens, tiles, load);
    for (size_t i = 0; i < tokens; i++) {
        for (size_t r = 0; r < registers; r++) {
            const size_t row = first * 16 + r * DM_LANES;
            float *to = job->out_TR + (t + i) * job->out_stride + row;
            if (row < job->rows) store_f32_part(to, sum[i * registers + r], job->rows - row);
        }
    }
}

/* The same against all tokens. */
DM_INLINE void float_tiles(const float_job *job, size_t first, size_t T, size_t tiles, weight_loader load) {
    size_t t = 0;
    for (; t + FLOAT_TOKENS <= T; t += FLOAT_TOKENS) float_block(job, first, t, FLOAT_TOKENS, tiles, load);
    for (; t + 4 <= T; t += 4) float_block(job, first, t, 4, tiles, load);
    for (; t + 2 <= T; t += 2) float_block(job, first, t, 2, tiles, load);
    for (; t < T; t++) float_block(job, first, t, 1, tiles, load);
}

DM_INLINE void matmul_float(const float_job *job, size_t T, weight_loader load) {
    const size_t tiles = dm_divide_up(job->rows, 16);
    size_t i = 0;
    if (T == 1) {
        for (; i + DM_FLOAT_TILES_ONE <= tiles; i += DM_FLOAT_TILES_ONE)
            float_block(job, i, 0, 1, DM_FLOAT_TILES_ONE, load);
    } else {
        for (; i + FLOAT_TILES <= tiles; i += FLOAT_TILES) float_tiles(job, i, T, FLOAT_TILES, load);
    }
    for (; i < tiles; i++) float_tiles(job, i, T, 1, load);
}

DM_INLINE float_job make_float_job(float *out_TR, const void *packed, const dm_rows *x, size_t rows, size_t out_stride,
                                   int format) {
    return (float_job){.out_TR = out_TR,
                       .packed = packed,
                       .x_TC = x->x,
                       .rows = rows,
                       .columns = x->columns,
                       .x_stride = x->x_stride,
                       .out_stride = out_stride,
                       .tile_bytes = dm_tile_bytes(format, x->columns, 0),
                       .column_bytes = format == DM_F32 ? 64 : 32};
}

static void matmul_f32(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                       size_t group, void *scratch) {
    (void)group;
    (void)scratch;
    const float_job job = make_float_job(out_TR, packed, x, rows, out_stride, DM_F32);
    matmul_float(&job, T, load_weights_f32);
}

static void matmul_bf16(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                        size_t group, void *scratch) {
    (void)group;
    (void)scratch;
    const float_job job = make_float_job(out_TR, packed, x, rows, out_stride, DM_BF16);
    matmul_float(&job, T, load_weights_bf16);
}

#endif
