/* matmul_float.h: f32 and bf16 weights. A lane is a row, K ascends, one fma per weight (rule 6). */
#ifndef DM_MATMUL_FLOAT_H
#define DM_MATMUL_FLOAT_H

typedef f32v (*weight_loader)(const void *tile, size_t i);

DM_INLINE f32v load_weights_f32(const void *tile, size_t i) { return load_f32((const float *)tile + i); }
DM_INLINE f32v load_weights_bf16(const void *tile, size_t i) { return widen_bf16((const uint16_t *)tile + i); }

/* Four independent chains: 1 tile x 4 tokens or 4 tiles x 1 token. weight_step and token_step are 0 or 1. */
DM_INLINE void float_chains(float *out[4], const uint8_t *const tile[4], const float *const x[4], size_t C,
                            size_t chains, size_t weight_step, size_t token_step, weight_loader load) {
    for (size_t part = 0; part < 16; part += DM_LANES) {
        f32v sum[4] = {{0}, {0}, {0}, {0}};
        for (size_t c = 0; c < C; c++) {
            for (size_t i = 0; i < chains; i++) {
                f32v weight = load(tile[i * weight_step], c * 16 + part);
                sum[i] = fma_lanes(weight, all_f32(x[i * token_step][c]), sum[i]);
            }
        }
        for (size_t i = 0; i < chains; i++) store_f32(out[i] + part, sum[i]);
    }
}

/* Tiles `first`, first + 1, ... against tokens t, t + 1, ...: one of the two counts is 1, the other at most 4. */
DM_INLINE void float_block(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t first, size_t tiles, size_t t,
                           size_t tokens, size_t rows, size_t out_stride, size_t tile_bytes, weight_loader load) {
    float result[4][16];
    float *out[4];
    const uint8_t *tile[4];
    const float *values[4];
    for (size_t i = 0; i < 4; i++) {
        out[i] = result[i];
        tile[i] = packed + (first + (i < tiles ? i : 0)) * tile_bytes;
        values[i] = x->x + (t + (i < tokens ? i : 0)) * x->x_stride;
    }
    if (tokens == 4)
        float_chains(out, tile, values, x->columns, 4, 0, 1, load);
    else if (tiles == 4)
        float_chains(out, tile, values, x->columns, 4, 1, 0, load);
    else
        float_chains(out, tile, values, x->columns, 1, 0, 0, load);
    for (size_t i = 0; i < tiles * tokens; i++) {
        size_t row = (first + (tiles > 1 ? i : 0)) * 16;
        size_t n = rows - row < 16 ? rows - row : 16;
        float *to = out_TR + (t + (tokens > 1 ? i : 0)) * out_stride + row;
        __builtin_memcpy(to, result[i], n * sizeof(float));
    }
}

DM_INLINE void matmul_float(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                            size_t out_stride, size_t tile_bytes, weight_loader load) {
    size_t tiles = dm_divide_up(rows, 16);
    size_t blocked = T / 4 * 4;
    for (size_t i = 0; i < tiles; i++) {
        for (size_t t = 0; t < blocked; t += 4) {
            float_block(out_TR, packed, x, i, 1, t, 4, rows, out_stride, tile_bytes, load);
        }
    }
    for (size_t t = blocked; t < T; t++) {
        size_t i = 0;
        for (; i + 4 <= tiles; i += 4) {
            float_block(out_TR, packed, x, i, 4, t, 1, rows, out_stride, tile_bytes, load);
        }
        for (; i < tiles; i++) float_block(out_TR, packed, x, i, 1, t, 1, rows, out_stride, tile_bytes, load);
    }
}

static void matmul_f32(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                       size_t group, void *scratch) {
    (void)group;
    (void)scratch;
    matmul_float(out_TR, packed, x, T, rows, out_stride, dm_tile_bytes(DM_F32, x->columns, 0), load_weights_f32);
}

static void matmul_bf16(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                        size_t group, void *scratch) {
    (void)group;
    (void)scratch;
    matmul_float(out_TR, packed, x, T, rows, out_stride, dm_tile_bytes(DM_BF16, x->columns, 0), load_weights_bf16);
}

#endif
