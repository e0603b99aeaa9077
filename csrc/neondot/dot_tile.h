/* neondot/dot_tile.h: q4 and q8 weights against one to four tokens, by the level's dot_lane.
 *
 * Bounds: 32 products of at most 255 * 127 stay far inside int32. What the weights' offset adds is taken away from the
 * accumulator's start value.
 */
#ifndef DM_NEONDOT_DOT_TILE_H
#define DM_NEONDOT_DOT_TILE_H

/* Registers of dot products: 16 rows and one token, or 8 rows and four tokens, with as many float sums. */
#define DOT_TILE_REGISTERS 8

/* dot[i * parts + part] += 32 columns of 4 * parts rows . token i. `low` are columns 0 to 15, `high` the others. */
DM_INLINE void dot_q4(int32x4_t *dot, const uint8_t *vectors, const int8x16_t *low, const int8x16_t *high, size_t parts,
                      size_t tokens) {
    for (size_t j = 0; j < 4; j++) {
        for (size_t part = 0; part < parts; part++) {
            uint8x16_t both = vld1q_u8(vectors + 64 * j + 16 * part);
            uint8x16_t low_weights = vandq_u8(both, vdupq_n_u8(15)), high_weights = vshrq_n_u8(both, 4);
            for (size_t i = 0; i < tokens; i++) {
                dot[i * parts + part] = dot_lane(dot[i * parts + part], low_weights, low[i], j);
                dot[i * parts + part] = dot_lane(dot[i * parts + part], high_weights, high[i], j);
            }
        }
    }
}

DM_INLINE void dot_q8(int32x4_t *dot, const uint8_t *vectors, const int8x16_t *low, const int8x16_t *high, size_t parts,
                      size_t tokens) {
    for (size_t j = 0; j < 4; j++) {
        for (size_t part = 0; part < parts; part++) {
            uint8x16_t low_weights = bytes_q8(vld1q_u8(vectors + 64 * j + 16 * part));
            uint8x16_t high_weights = bytes_q8(vld1q_u8(vectors + 256 + 64 * j + 16 * part));
            for (size_t i = 0; i < tokens; i++) {
                dot[i * parts + part] = dot_lane(dot[i * parts + part], low_weights, low[i], j);
                dot[i * parts + part] = dot_lane(dot[i * parts + part], high_weights, high[i], j);
            }
        }
    }
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
        if (format == DM_Q4)
            dot_q4(dot, vectors, low, high, parts, tokens);
        else
            dot_q8(dot, vectors, low, high, parts, tokens);
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
