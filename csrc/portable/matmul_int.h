/* matmul_int.h: q4 and q8 weights. Per 32 columns an exact int32 dot product (int_pairs.h) and one fma (rule 6). */
#ifndef DM_MATMUL_INT_H
#define DM_MATMUL_INT_H

typedef void (*group_dot)(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, const int32_t *sum,
                          size_t pair_stride, size_t sum_stride, size_t tokens);

/* dot[t] = sum over 32 columns of (q - 8) * x_t, for the rows of one register. */
DM_INLINE void dot_q4(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, const int32_t *sum, size_t pair_stride,
                      size_t sum_stride, size_t tokens) {
    i16v total[4] = {{0}, {0}, {0}, {0}};
    for (size_t j = 0; j < 4; j++) {
        u16v bytes = load_bytes(vectors + 64 * j);
        i16v low_even = (i16v)(bytes & 15), low_odd = (i16v)((bytes >> 8) & 15);
        i16v high_even = (i16v)((bytes >> 4) & 15), high_odd = (i16v)(bytes >> 12);
        for (size_t t = 0; t < tokens; t++) {
            const uint32_t *x = pairs + t * pair_stride + 2 * j;
            total[t] += low_even * all_pairs(x[0]) + low_odd * all_pairs(x[1]);
            total[t] += high_even * all_pairs(x[8]) + high_odd * all_pairs(x[9]);
        }
    }
    for (size_t t = 0; t < tokens; t++) dot[t] = sum_pairs(total[t]) - all_i32(8 * sum[t * sum_stride]);
}

DM_INLINE void dot_q8(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, const int32_t *sum, size_t pair_stride,
                      size_t sum_stride, size_t tokens) {
    (void)sum;
    (void)sum_stride;
    dot_bytes(dot, vectors, pairs, pair_stride, tokens, 0x8080);
}

/* One tile against `tokens` (at most 4) tokens from t on; pairs are theirs. */
DM_INLINE void int_tile(float *out_TR, const uint8_t *tile, const dm_rows *x, const uint32_t *pairs, size_t t,
                        size_t tokens, size_t rows, size_t out_stride, size_t group, size_t group_bytes,
                        group_dot dot_group) {
    size_t groups = dm_divide_up(x->columns, DM_GROUP);
    size_t scale_bytes = dm_scale_bytes(x->columns, group);
    const float *scale_x = x->scale + t * x->group_stride;
    const int32_t *sum_x = x->sum + t * x->group_stride;
    for (size_t part = 0; part < 16; part += DM_LANES) {
        f32v sum[4] = {{0}, {0}, {0}, {0}};
        const uint8_t *vectors = tile + scale_bytes + 4 * part;
        for (size_t g = 0; g < groups; g++, vectors += group_bytes) {
            i32v dot[4];
            dot_group(dot, vectors, pairs + 16 * g, sum_x + g, 16 * groups, x->group_stride, tokens);
            f32v scale = widen_f16((const uint16_t *)tile + dm_scale_index(g, group) * 16 + part);
            for (size_t i = 0; i < tokens; i++) {
                f32v factor = scale * all_f32(scale_x[i * x->group_stride + g]);
                sum[i] = fma_lanes(factor, __builtin_convertvector(dot[i], f32v), sum[i]);
            }
        }
        if (part >= rows) return;
        for (size_t i = 0; i < tokens; i++) store_f32_part(out_TR + (t + i) * out_stride + part, sum[i], rows - part);
    }
}

DM_INLINE void matmul_int(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                          size_t out_stride, size_t group, int format, uint32_t *pairs, group_dot dot_group) {
    size_t groups = dm_divide_up(x->columns, DM_GROUP);
    size_t tile_bytes = dm_tile_bytes(format, x->columns, group);
    size_t group_bytes = format == DM_Q4 ? 256 : 512;
    for (size_t first = 0; first < T; first += DM_TOKEN_BLOCK) {
        size_t tokens = T - first < DM_TOKEN_BLOCK ? T - first : DM_TOKEN_BLOCK;
        for (size_t t = 0; t < tokens; t++) {
            widen_pairs(pairs + t * 16 * groups, x->q + (first + t) * x->q_stride, 8 * groups);
        }
        for (size_t row = 0; row < rows; row += 16) {
            const uint8_t *tile = packed + row / 16 * tile_bytes;
            size_t t = 0;
            for (; t + 4 <= tokens; t += 4) {
                int_tile(out_TR + row, tile, x, pairs + t * 16 * groups, first + t, 4, rows - row, out_stride, group,
                         group_bytes, dot_group);
            }
            for (; t < tokens; t++) {
                int_tile(out_TR + row, tile, x, pairs + t * 16 * groups, first + t, 1, rows - row, out_stride, group,
                         group_bytes, dot_group);
            }
        }
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_int(out_TR, packed, x, T, rows, out_stride, group, DM_Q8, scratch, dot_q8);
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_int(out_TR, packed, x, T, rows, out_stride, group, DM_Q4, scratch, dot_q4);
}

#endif
