/* key_dots.h: int8 queries against q8 keys: per 32 dims an exact dot product and one fma (rules 6, 9, 10).
 *
 * A query record holds the int16 pairs of int_pairs.h, then its scales.
 */
#ifndef DM_KEY_DOTS_H
#define DM_KEY_DOTS_H

/* The record of one query head; returns the quantizer's fault. */
static int query_q8(void *record, const float *q_P, size_t P) {
    const size_t groups = dm_divide_up(P, DM_GROUP);
    uint32_t *pairs = record;
    float *scale = (float *)(pairs + 16 * groups);
    int bad = 0;
    for (size_t g = 0; g < groups; g++) {
        int8_t q[DM_GROUP];
        int32_t unused_sum;
        const size_t left = P - g * DM_GROUP;
        scale[g] = quantize_group(q, &unused_sum, q_P + g * DM_GROUP, left < DM_GROUP ? left : DM_GROUP, &bad);
        widen_pairs(pairs + 16 * g, q, 8);
    }
    return bad ? DM_FAULT_QUANTIZER : 0;
}

/* Scores of `rows` queries (records lie `stride` bytes apart) with the 16 positions of one K tile; rows of `score` lie
 * 64 floats apart. Meanwhile the same bytes are fetched from `ahead` on. */
DM_INLINE void dot_keys(float *score, const uint8_t *queries, size_t stride, const uint8_t *tile, size_t P,
                        const uint8_t *ahead, size_t rows) {
    const size_t groups = dm_divide_up(P, DM_GROUP);
    fetch_ahead(ahead, groups * DM_KEY_GROUP_BYTES);
    for (size_t r = 0; r < rows; r++) {
        const uint32_t *pairs = (const uint32_t *)(queries + r * stride);
        const float *scale = (const float *)(pairs + 16 * groups);
        for (size_t part = 0; part < 16; part += DM_LANES) {
            f32v sum = {0};
            for (size_t g = 0; g < groups; g++) {
                const uint8_t *vectors = tile + g * DM_KEY_GROUP_BYTES;
                i32v dot;
                dot_bytes(&dot, vectors + 4 * part, pairs + 16 * g, 0, 1, 0);
                const f32v factor = load_f32((const float *)(vectors + 512) + part) * all_f32(scale[g]);
                sum = fma_lanes(factor, __builtin_convertvector(dot, f32v), sum);
            }
            store_f32(score + r * DM_BLOCK_POSITIONS + part, sum);
        }
    }
}

#endif
