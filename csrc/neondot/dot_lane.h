/* neondot/dot_lane.h: four columns of four rows at once, by sdot.
 *
 *   sdot v.4s, v.16b, v.4b[j]   4 rows x 4 columns, signed weights x signed activations
 */
#ifndef DM_NEONDOT_DOT_LANE_H
#define DM_NEONDOT_DOT_LANE_H

/* What bytes_q4 and bytes_q8 still carry: sdot takes unsigned nibbles as they are. */
#define OFFSET_Q4 8
#define OFFSET_Q8 0

DM_INLINE uint8x16_t bytes_q8(uint8x16_t bytes) { return veorq_u8(bytes, vdupq_n_u8(0x80)); }

/* sum += weights . columns 4j ... 4j + 3 of x. The lane is part of the instruction, hence one call per j. */
DM_INLINE int32x4_t dot_lane(int32x4_t sum, uint8x16_t weights, int8x16_t x, size_t j) {
    int8x16_t bytes = vreinterpretq_s8_u8(weights);
    switch (j) {
        case 0: return vdotq_laneq_s32(sum, bytes, x, 0);
        case 1: return vdotq_laneq_s32(sum, bytes, x, 1);
        case 2: return vdotq_laneq_s32(sum, bytes, x, 2);
        default: return vdotq_laneq_s32(sum, bytes, x, 3);
    }
}

#endif
