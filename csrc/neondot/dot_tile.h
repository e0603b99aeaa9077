/* neondot/dot_tile.h: q4 and q8 weights against one to four tokens, by the level's dot_lane.
 *
 * Bounds: 32 products of at most 255 * 127 stay far inside int32. What the weights' offset adds is taken away from the
 * accumulator's start value.
 */
#ifndef DM_NEONDOT_DOT_TILE_H
#define DM_NEONDOT_DOT_TILE_H

/* Registers of dot products: 16 rows and one token, or 8 rows and four tokens, with as many float sums. */
#define DOT_TILE_REGISTERS 8

/* dot[i * parts + part] += columns 4j to 4j + 3 of x[i] and of 4 * parts rows, of weights[part]. */
DM_INLINE void dot_columns(int32x4_t *dot, const uint8x16_t *weights, const int8x16_t *x, size_t j, size_t parts,
                           size_t tokens) {
    for (size_t part = 0; part < parts; part++) {
        for (size_t i = 0; i < tokens; i++)
            dot[i * parts + part] = dot_lane(dot[i * parts + part], weights[part], x[i], j);
    }
}

/* The same for one vector of q4: columns 4j ... of `low` and of `high`. */
DM_INLINE void dot_nibbles(int32x4_t *dot, const uint8_t *vector, const int8x16_t *low, const int8x16_t *high, size_t j,
                           size_t parts, size_t tokens) {
    uint8x16_t low_weights[4], high_weights[4];
    for (size_t part = 0; part < parts; part++) {
        uint8x16_t both = vld1q_u8(vector + 16 * part);
        low_weights[part] = vandq_u8(both, vdupq_n_u8(15));
        high_weights[part] = vshrq_n_u8(both, 4);
    }
    dot_columns(dot, low_weights, low, j, parts, tokens);
    dot_columns(dot, high_weights, high, j, parts, tokens);
}

DM_INLINE void dot_bytes_q8(int32x4_t *dot, const uint8_t *vector, const int8x16_t *x, size_t j, size_t parts,
                            size_t tokens) {
    uint8x16_t weights[4];
    for (size_t part = 0; part < parts; part++) weights[part] = bytes_q8(vld1q_u8(vector + 16 * part));
    dot_columns(dot, weights, x, j, parts, tokens);
}

/* 32 columns: `low` are columns 0 to 15 of every token, `high` the others. Written out, because the lane must be a
 * constant. */
DM_INLINE void dot_group(int32x4_t *dot, const uint8_t *vectors, const int8x16_t *low, const int8x16_t *high,
                         size_t parts, size_t tokens, int format) {
    if (format == DM_Q4) {
        dot_nibbles(dot, vectors, low, high, 0, parts, tokens);
        dot_nibbles(dot, vectors + 64, low, high, 1, parts, tokens);
        dot_nibbles(dot, vectors + 128, low, high, 2, parts, tokens);
        dot_nibbles(dot, vectors + 192, low, high, 3, parts, tokens);
        return;
    }
    dot_bytes_q8(dot, vectors, low, 0, parts, tokens);
    dot_bytes_q8(dot, vectors + 64, low, 1, parts, tokens);
    dot_bytes_q8(dot, vectors + 128, low, 2, parts, tokens);
    dot_bytes_q8(dot, vectors + 192, low, 3, parts, tokens);
    dot_bytes_q8(dot, vectors + 256, high, 0, parts, tokens);
    dot_bytes_q8(dot, vectors + 320, high, 1, parts, tokens);
    dot_bytes_q8(dot, vectors + 384, high, 2, parts, tokens);
    dot_bytes_q8(dot, vectors + 448, high, 3, parts, tokens);
}

/* Rows [row, row + 4 * parts) of one tile against `tokens` tokens from t on. */
DM_INLINE void dot_tile(float *out_TR, const uint8_t *tile, const dm_rows *x, size_t t, size_t tokens, size_t row,
                        size_t parts, size_t rows, size_t out_stride, size_t group, int format) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP);
    const size_t groups_per_scale = group == 0 ? groups : group / DM_GROUP;
    const size_t group_bytes = format == DM_Q4 ? 256 : 512;
    const int32_t offset = format == DM_Q4 ? OFFSET_Q4 : OFFSET_Q8;
    const uint8_t *vectors = tile + dm_scale_bytes(x->columns, group) + 4 * row;
    const uint16_t *scales = (const uint16_t *)tile + row;
    size_t left = groups_per_scale;
    f32v sum[DOT_TILE_REGISTERS];
    for (size_t i = 0; i < tokens * parts; i++) sum[i] = (f32v){0};
    for (size_t g = 0; g < groups; g++, vectors += group_bytes) {
        int32x4_t dot[DOT_TILE_REGISTERS];
        int8x16_t low[4], high[4];
        for (size_t i = 0; i < tokens; i++) {
            const int8_t *q = x->q + (t + i) * x->q_stride + g * DM_GROUP;
            low[i] = vld1q_s8(q);
            high[i] = vld1q_s8(q + 16);
            int32_t start = offset == 0 ? 0 : -offset * x->sum[(t + i) * x->group_stride + g];
            for (size_t part = 0; part < parts; part++) dot[i * parts + part] = vdupq_n_s32(start);
        }
        dot_group(dot, vectors, low, high, parts, tokens, format);
        for (size_t part = 0; part < parts; part++) {
            f32v scale = widen_f16(scales + 4 * part);
            for (size_t i = 0; i < tokens; i++) {
                size_t at = i * parts + part;
                f32v factor = scale * x->scale[(t + i) * x->group_stride + g];
                sum[at] = fma_lanes(factor, (f32v)vcvtq_f32_s32(dot[at]), sum[at]);
            }
        }
        if (--left == 0) {
            scales += 16;
            left = groups_per_scale;
        }
    }
    for (size_t part = 0; part < parts && row + 4 * part < rows; part++) {
        for (size_t i = 0; i < tokens; i++) {
            store_f32_part(out_TR + (t + i) * out_stride + row + 4 * part, sum[i * parts + part],
                           rows - row - 4 * part);
        }
    }
}

#endif
