/* key_dots.h: int8 queries against q8 keys: per 32 dims an exact dot product and one fma (rules 6, 9, 10).
 *
 * Queries: per 32 dims the int16 pairs of int_pairs.h [R][16] and the scales [R].
 */
#ifndef DM_KEY_DOTS_H
#define DM_KEY_DOTS_H

/* Row `row` of R; returns the quantizer's fault. */
static int query_q8(void *queries, const float *q_P, size_t row, size_t R, size_t P) {
    int bad = 0;
    for (size_t p = 0; p < P; p += DM_GROUP) {
        uint32_t *group = (uint32_t *)queries + p / DM_GROUP * 17 * R;
        int8_t q[DM_GROUP];
        int32_t unused_sum;
        ((float *)group)[16 * R + row] =
            quantize_group(q, &unused_sum, q_P + p, P - p < DM_GROUP ? P - p : DM_GROUP, &bad);
        widen_pairs(group + 16 * row, q, 8);
    }
    return bad ? DM_FAULT_QUANTIZER : 0;
}

/* dot[r] = sum over 32 dims of key * query r. Levels with pair_sums (dot.h) have it faster than dot_bytes. */
#ifdef DM_HAS_PAIR_SUMS
DM_INLINE void dot_key_group(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t rows) {
    for (size_t r = 0; r < rows; r++) dot[r] = (i32v){0};
    for (size_t j = 0; j < 8; j++) {
        const i16v keys = (i16v)load_bytes(vectors + 64 * j);
        const i16v even = even_bytes(keys), odd = odd_bytes(keys);
        for (size_t r = 0; r < rows; r++) dot[r] += pair_sums(even, odd, pairs + 16 * r + 2 * j);
    }
}
#else
DM_INLINE void dot_key_group(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t rows) {
    dot_bytes(dot, vectors, pairs, 16, rows, 0);
}
#endif

/* Scores of `rows` queries from `row` on with the 16 positions of one K tile; rows of `score` lie 64 floats apart.
 * Meanwhile as many bytes of the next part are fetched. */
DM_INLINE void dot_keys(float *score, const void *queries, size_t row, size_t R, const uint8_t *tile, size_t P,
                        const next_part *next, size_t rows) {
    const size_t groups = dm_divide_up(P, DM_GROUP);
    for (size_t part = 0; part < 16; part += DM_LANES) {
        f32v sum[DM_PRODUCT_ROWS];
        for (size_t r = 0; r < rows; r++) sum[r] = (f32v){0};
        for (size_t g = 0; g < groups; g++) {
            const uint32_t *pairs = (const uint32_t *)queries + g * 17 * R + 16 * row;
            const float *scale = (const float *)queries + (g * 17 + 16) * R + row;
            const uint8_t *vectors = tile + g * DM_KEY_GROUP_BYTES;
            if (part == 0 && row == 0) fetch_bytes(next, next->at + g * DM_KEY_GROUP_BYTES, DM_KEY_GROUP_BYTES);
            i32v dot[DM_PRODUCT_ROWS];
            dot_key_group(dot, vectors + 4 * part, pairs, rows);
            const f32v key_scale = load_f32((const float *)(vectors + 512) + part);
            for (size_t r = 0; r < rows; r++) {
                const f32v factor = key_scale * all_f32(scale[r]);
                sum[r] = fma_lanes(factor, __builtin_convertvector(dot[r], f32v), sum[r]);
            }
        }
        for (size_t r = 0; r < rows; r++) store_f32(score + r * DM_BLOCK_POSITIONS + part, sum[r]);
    }
}

#endif
