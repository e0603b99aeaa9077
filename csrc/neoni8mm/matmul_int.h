/* neoni8mm/matmul_int.h: q4 and q8 weights against pairs of tokens by usmmla, against a single token by usdot.
 *
 *   usmmla v.4s, v.16b, v.16b   2 rows x 2 tokens x 8 columns, unsigned weights x signed activations
 *
 * A register of sums is (row 0, token 0), (row 0, token 1), (row 1, token 0), (row 1, token 1), and stays so until it
 * is stored. Bounds and the start value: neondot/dot_tile.h.
 */
#ifndef DM_NEONI8MM_MATMUL_INT_H
#define DM_NEONI8MM_MATMUL_INT_H

/* 32 columns of two tokens in usmmla's order; the scales and start values of both, twice. */
typedef struct pair_group {
    int8x16_t x[4];
    float32x4_t scale;
    int32x4_t start;
} pair_group;

/* Rows of one pass, in twos, and its most pairs of tokens: 16 registers of dot products. */
enum { ROW_TWOS = 4, MOST_PAIRS = 4 };

_Static_assert(sizeof(pair_group) * DM_TOKEN_BLOCK / 2 <= DM_MATMUL_SCRATCH(DM_GROUP), "a block's pairs fit");

/* Tokens t and t + 1; a missing second one is zero. */
DM_INLINE void arrange_pair(pair_group *pair, const dm_rows *x, size_t t, size_t tokens, int32_t offset) {
    const int8_t *q = x->q + t * x->q_stride;
    const float *scale = x->scale + t * x->group_stride;
    const int32_t *sum = x->sum + t * x->group_stride;
    for (size_t g = 0; g < dm_divide_up(x->columns, DM_GROUP); g++) {
        float scales[2] = {scale[g], 0.0f};
        int32_t starts[2] = {-offset * sum[g], 0};
        for (size_t half = 0; half < 2; half++) {
            const int8_t *from = q + g * DM_GROUP + 16 * half;
            int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(from)), second = vdupq_n_s64(0);
            if (tokens > 1) second = vreinterpretq_s64_s8(vld1q_s8(from + x->q_stride));
            pair[g].x[2 * half] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
            pair[g].x[2 * half + 1] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
        }
        if (tokens > 1) {
            scales[1] = scale[x->group_stride + g];
            starts[1] = -offset * sum[x->group_stride + g];
        }
        pair[g].scale = vcombine_f32(vld1_f32(scales), vld1_f32(scales));
        pair[g].start = vcombine_s32(vld1_s32(starts), vld1_s32(starts));
    }
}

/* Eight columns of two rows from four columns of four: vector j has the first four, vector j + 1 the others. */
DM_INLINE void split_rows(uint8x16_t rows[ROW_TWOS], const uint8_t *vectors) {
    for (size_t part = 0; part < ROW_TWOS / 2; part++) {
        uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(vectors + 16 * part));
        uint32x4_t second = vreinterpretq_u32_u8(vld1q_u8(vectors + 64 + 16 * part));
        rows[2 * part] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
        rows[2 * part + 1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    }
}

/* dot += columns [8 * eight, 8 * eight + 8) of eight rows . `count` pairs. */
DM_INLINE void multiply(int32x4_t dot[][MOST_PAIRS], const uint8x16_t rows[ROW_TWOS], const pair_group *pairs,
                        size_t groups, size_t eight, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int8x16_t x = pairs[i * groups].x[eight];
        for (size_t two = 0; two < ROW_TWOS; two++) dot[two][i] = vusmmlaq_s32(dot[two][i], rows[two], x);
    }
}

/* 32 columns of eight rows against `count` pairs. */
DM_INLINE void multiply_q4(int32x4_t dot[][MOST_PAIRS], const uint8_t *vectors, const pair_group *pairs, size_t groups,
                           size_t count) {
    for (size_t eight = 0; eight < 2; eight++) {
        uint8x16_t both[ROW_TWOS], rows[ROW_TWOS];
        split_rows(both, vectors + 128 * eight);
        for (size_t two = 0; two < ROW_TWOS; two++) rows[two] = vandq_u8(both[two], vdupq_n_u8(15));
        multiply(dot, rows, pairs, groups, eight, count);
        for (size_t two = 0; two < ROW_TWOS; two++) rows[two] = vshrq_n_u8(both[two], 4);
        multiply(dot, rows, pairs, groups, 2 + eight, count);
    }
}

DM_INLINE void multiply_q8(int32x4_t dot[][MOST_PAIRS], const uint8_t *vectors, const pair_group *pairs, size_t groups,
                           size_t count) {
    for (size_t eight = 0; eight < 4; eight++) {
        uint8x16_t rows[ROW_TWOS];
        split_rows(rows, vectors + 128 * eight);
        multiply(dot, rows, pairs, groups, eight, count);
    }
}

/* sum = fma(scale_w * scale_x, dot, sum) of four rows. */
DM_INLINE void add_scaled(float32x4_t sum[][MOST_PAIRS], int32x4_t dot[][MOST_PAIRS], const uint16_t *scales,
                          const pair_group *pairs, size_t groups, size_t count) {
    float32x4_t scale = (float32x4_t)widen_f16(scales);
    float32x4_t twice[2] = {vzip1q_f32(scale, scale), vzip2q_f32(scale, scale)};
    for (size_t two = 0; two < 2; two++) {
        for (size_t i = 0; i < count; i++) {
            float32x4_t factor = vmulq_f32(twice[two], pairs[i * groups].scale);
            sum[two][i] = vfmaq_f32(sum[two][i], factor, vcvtq_f32_s32(dot[two][i]));
        }
    }
}

/* Rows [row, row + 8) of one tile against `count` pairs of tokens; out_TR is the first token's. */
DM_INLINE void pairs_tile(float *out_TR, const uint8_t *tile, const pair_group *pairs, size_t columns, size_t count,
                          size_t tokens, size_t row, size_t rows, size_t out_stride, size_t group, int format) {
    const size_t groups = dm_divide_up(columns, DM_GROUP);
    const size_t groups_per_scale = group == 0 ? groups : group / DM_GROUP;
    const uint8_t *vectors = tile + dm_scale_bytes(columns, group) + 4 * row;
    const uint16_t *scales = (const uint16_t *)tile + row;
    size_t left = groups_per_scale;
    float32x4_t sum[ROW_TWOS][MOST_PAIRS];
    for (size_t two = 0; two < ROW_TWOS; two++) {
        for (size_t i = 0; i < count; i++) sum[two][i] = vdupq_n_f32(0.0f);
    }
    for (size_t g = 0; g < groups; g++, vectors += format == DM_Q4 ? 256 : 512) {
        int32x4_t dot[ROW_TWOS][MOST_PAIRS];
        for (size_t two = 0; two < ROW_TWOS; two++) {
            for (size_t i = 0; i < count; i++) dot[two][i] = pairs[i * groups + g].start;
        }
        if (format == DM_Q4)
            multiply_q4(dot, vectors, pairs + g, groups, count);
        else
            multiply_q8(dot, vectors, pairs + g, groups, count);
        add_scaled(sum, dot, scales, pairs + g, groups, count);
        add_scaled(sum + 2, dot + 2, scales + 4, pairs + g, groups, count);
        if (--left == 0) {
            scales += 16;
            left = groups_per_scale;
        }
    }
    for (size_t part = 0; part < ROW_TWOS / 2 && row + 4 * part < rows; part++) {
        for (size_t t = 0; t < tokens; t++) {
            float32x4_t first = sum[2 * part][t / 2], second = sum[2 * part + 1][t / 2];
            f32v four = (f32v)(t % 2 ? vuzp2q_f32(first, second) : vuzp1q_f32(first, second));
            store_f32_part(out_TR + t * out_stride + row + 4 * part, four, rows - row - 4 * part);
        }
    }
}

/* All rows of one tile against the `tokens` tokens of a block. */
DM_INLINE void block_tile(float *out_TR, const uint8_t *tile, const pair_group *pairs, size_t columns, size_t tokens,
                          size_t rows, size_t out_stride, size_t group, int format) {
    const size_t groups = dm_divide_up(columns, DM_GROUP);
    for (size_t row = 0; row < 16 && row < rows; row += 2 * ROW_TWOS) {
        size_t t = 0;
        for (; t + 6 < tokens; t += 8) {
            const size_t count = tokens - t < 8 ? tokens - t : 8;
            pairs_tile(out_TR + t * out_stride, tile, pairs + t / 2 * groups, columns, 4, count, row, rows, out_stride,
                       group, format);
        }
        for (; t + 2 < tokens; t += 4) {
            const size_t count = tokens - t < 4 ? tokens - t : 4;
            pairs_tile(out_TR + t * out_stride, tile, pairs + t / 2 * groups, columns, 2, count, row, rows, out_stride,
                       group, format);
        }
        if (t < tokens) {
            pairs_tile(out_TR + t * out_stride, tile, pairs + t / 2 * groups, columns, 1, tokens - t, row, rows,
                       out_stride, group, format);
        }
    }
}

DM_INLINE void matmul_pairs(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                            size_t out_stride, size_t group, int format, pair_group *pairs) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP);
    const size_t tile_bytes = dm_tile_bytes(format, x->columns, group);
    for (size_t first = 0; first < T; first += DM_TOKEN_BLOCK) {
        const size_t tokens = T - first < DM_TOKEN_BLOCK ? T - first : DM_TOKEN_BLOCK;
        for (size_t t = 0; tokens > 1 && t < tokens; t += 2) {
            arrange_pair(pairs + t / 2 * groups, x, first + t, tokens - t, format == DM_Q4 ? OFFSET_Q4 : OFFSET_Q8);
        }
        for (size_t row = 0; row < rows; row += 16) {
            const uint8_t *tile = packed + row / 16 * tile_bytes;
            float *out = out_TR + row;
            if (tokens == 1)
                dot_tile(out, tile, x, first, 1, 0, 4, rows - row, out_stride, group, format);
            else
                block_tile(out + first * out_stride, tile, pairs, x->columns, tokens, rows - row, out_stride, group,
                           format);
        }
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_pairs(out_TR, packed, x, T, rows, out_stride, group, DM_Q8, scratch);
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_pairs(out_TR, packed, x, T, rows, out_stride, group, DM_Q4, scratch);
}

#endif
