/* neondot/dot_lane.h: four columns of four rows of packed weights at once, by sdot. */
#ifndef DM_NEONDOT_DOT_LANE_H
#define DM_NEONDOT_DOT_LANE_H

/* The offset that weights still carry in dot_lane: sdot takes nibbles as they are; the bytes of q8 are made signed. */
#define OFFSET_Q4 8
#define OFFSET_Q8 0

DM_INLINE uint8x16_t bytes_q8(uint8x16_t bytes) { return veorq_u8(bytes, vdupq_n_u8(0x80)); }

DM_INLINE int32x4_t dot_lane(int32x4_t sum, uint8x16_t weights, int8x16_t x, size_t j) {
    return signed_lane(sum, vreinterpretq_s8_u8(weights), x, j);
}

#endif
