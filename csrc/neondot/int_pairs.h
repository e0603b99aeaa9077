/* neondot/int_pairs.h: the int8 dot products of q8 keys, by sdot, behind the interface of portable/int_pairs.h. */
#ifndef DM_NEONDOT_INT_PAIRS_H
#define DM_NEONDOT_INT_PAIRS_H

/* The activations as they are: 32 bytes in the 16 dwords that a group may take. */
DM_INLINE void widen_pairs(uint32_t *pairs, const int8_t *q, size_t count) {
    for (size_t g = 0; g < count / 8; g++) __builtin_memcpy(pairs + 16 * g, q + 32 * g, 32);
}

/* dot[t] = sum over 32 columns of w * x_t for signed bytes w, after the offset (0x80 in every byte, or none) is taken
 * away. */
DM_INLINE void dot_bytes(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t pair_stride, size_t tokens,
                         uint16_t offset) {
    for (size_t t = 0; t < tokens; t++) {
        const int8_t *x = (const int8_t *)(pairs + t * pair_stride);
        int32x4_t sum = vdupq_n_s32(0);
        for (size_t j = 0; j < 8; j++) {
            uint8x16_t bytes = veorq_u8(vld1q_u8(vectors + 64 * j), vdupq_n_u8((uint8_t)offset));
            sum = vdotq_s32(sum, vreinterpretq_s8_u8(bytes),
                            vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x + 4 * j))));
        }
        dot[t] = (i32v)sum;
    }
}

#endif
