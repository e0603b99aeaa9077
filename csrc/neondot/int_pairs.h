/* neondot/int_pairs.h: the int8 dot products of q8 keys by sdot, behind the interface of portable/int_pairs.h.
 *
 *   sdot v.4s, v.16b, v.4b[j]   4 rows x 4 columns, signed weights x signed activations
 */
#ifndef DM_NEONDOT_INT_PAIRS_H
#define DM_NEONDOT_INT_PAIRS_H

/* sum += weights . columns 4j ... 4j + 3 of x. The lane is part of the instruction, hence one call per j. */
DM_INLINE int32x4_t signed_lane(int32x4_t sum, int8x16_t weights, int8x16_t x, size_t j) {
    switch (j) {
        case 0: return vdotq_laneq_s32(sum, weights, x, 0);
        case 1: return vdotq_laneq_s32(sum, weights, x, 1);
        case 2: return vdotq_laneq_s32(sum, weights, x, 2);
        default: return vdotq_laneq_s32(sum, weights, x, 3);
    }
}

/* The activations as they are: 32 bytes in the 16 dwords that a group may take. */
DM_INLINE void widen_pairs(uint32_t *pairs, const int8_t *q, size_t count) {
    for (size_t g = 0; g < count / 8; g++) __builtin_memcpy(pairs + 16 * g, q + 32 * g, 32);
}

/* dot[t] += columns 4j ... 4j + 3 and 16 + 4j ... 16 + 4j + 3 of four rows . x_t. */
DM_INLINE void add_columns(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t pair_stride, size_t tokens,
                           uint16_t offset, size_t j) {
    const uint8x16_t flip = vdupq_n_u8((uint8_t)offset);
    int8x16_t low = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(vectors + 64 * j), flip));
    int8x16_t high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(vectors + 256 + 64 * j), flip));
    for (size_t t = 0; t < tokens; t++) {
        const int8_t *x = (const int8_t *)(pairs + t * pair_stride);
        int32x4_t sum = signed_lane((int32x4_t)dot[t], low, vld1q_s8(x), j);
        dot[t] = (i32v)signed_lane(sum, high, vld1q_s8(x + 16), j);
    }
}

/* dot[t] = sum over 32 columns of w * x_t for signed bytes w, after the offset (0x80 in every byte, or none) is taken
 * away. */
DM_INLINE void dot_bytes(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t pair_stride, size_t tokens,
                         uint16_t offset) {
    for (size_t t = 0; t < tokens; t++) dot[t] = (i32v){0};
    add_columns(dot, vectors, pairs, pair_stride, tokens, offset, 0);
    add_columns(dot, vectors, pairs, pair_stride, tokens, offset, 1);
    add_columns(dot, vectors, pairs, pair_stride, tokens, offset, 2);
    add_columns(dot, vectors, pairs, pair_stride, tokens, offset, 3);
}

#endif
