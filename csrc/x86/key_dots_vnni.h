/* key_dots_vnni.h: int8 queries against q8 keys by vpdpbusd, several queries to one load of the keys.
 *
 * vpdpbusd multiplies unsigned by signed bytes: keys get 128 added, and 128 times the query's sum is taken away from
 * the start value. Queries: per 32 dims the int8 values [R][32], the scales [R] and the start values [R].
 */
#ifndef DM_KEY_DOTS_H
#define DM_KEY_DOTS_H

/* Row `row` of R; returns the quantizer's fault. */
static int query_q8(void *queries, const float *q_P, size_t row, size_t R, size_t P) {
    int bad = 0;
    for (size_t p = 0; p < P; p += DM_GROUP) {
        int32_t *group = (int32_t *)queries + p / DM_GROUP * 10 * R, sum;
        const size_t n = P - p < DM_GROUP ? P - p : DM_GROUP;
        ((float *)group)[8 * R + row] = quantize_group((int8_t *)(group + 8 * row), &sum, q_P + p, n, &bad);
        group[9 * R + row] = -128 * sum;
    }
    return bad ? DM_FAULT_QUANTIZER : 0;
}

/* One register of a packed vector of keys. */
DM_INLINE i32v load_keys(const uint8_t *vector) {
    i32v keys;
    __builtin_memcpy(&keys, vector, sizeof keys);
    return keys ^ (int32_t)0x80808080;
}

/* Scores of `rows` queries from `row` on with the 16 positions of one K tile; rows of `score` lie 64 floats apart.
 * Meanwhile as many bytes of the next part are fetched. */
DM_INLINE void dot_keys(float *score, const void *queries, size_t row, size_t R, const uint8_t *tile, size_t P,
                        const next_part *next, size_t rows) {
    const size_t groups = dm_divide_up(P, DM_GROUP);
    for (size_t part = 0; part < 16; part += DM_LANES) {
        f32v sum[DM_PRODUCT_ROWS];
        for (size_t r = 0; r < rows; r++) sum[r] = (f32v){0};
        for (size_t g = 0; g < groups; g++) {
            const int32_t *q = (const int32_t *)queries + g * 10 * R + 8 * row;
            const float *scale = (const float *)queries + (g * 10 + 8) * R + row;
            const int32_t *start = (const int32_t *)scale + R;
            const uint8_t *vectors = tile + g * DM_KEY_GROUP_BYTES;
            if (part == 0 && row == 0) fetch_bytes(next, next->at + g * DM_KEY_GROUP_BYTES, DM_KEY_GROUP_BYTES);
            i32v keys[8];
            for (size_t j = 0; j < 8; j++) keys[j] = load_keys(vectors + 64 * j + 4 * part);
            const f32v key_scale = load_f32((const float *)(vectors + 512) + part);
            for (size_t r = 0; r < rows; r++) {
                i32v even = all_i32(start[r]), odd = {0};
                for (size_t j = 0; j < 8; j += 2) {
                    even = dot_four(even, keys[j], all_i32(q[8 * r + j]));
                    odd = dot_four(odd, keys[j + 1], all_i32(q[8 * r + j + 1]));
                }
                const f32v dot = __builtin_convertvector(even + odd, f32v);
                sum[r] = fma_lanes(key_scale * all_f32(scale[r]), dot, sum[r]);
            }
        }
        for (size_t r = 0; r < rows; r++) store_f32(score + r * DM_BLOCK_POSITIONS + part, sum[r]);
    }
}

#endif
