/* neoni8mm/dot_lane.h: four columns of four rows at once, by usdot.
 *
 *   usdot v.4s, v.16b, v.4b[j]   4 rows x 4 columns, unsigned weights x signed activations
 */
#ifndef DM_NEONI8MM_DOT_LANE_H
#define DM_NEONI8MM_DOT_LANE_H

/* The offset that weights still carry in dot_lane: usdot takes them as they are. */
#define OFFSET_Q4 8
#define OFFSET_Q8 128

DM_INLINE uint8x16_t bytes_q8(uint8x16_t bytes) { return bytes; }

/* sum += weights . columns 4j ... 4j + 3 of x. The lane is part of the instruction, hence one call per j. */
DM_INLINE int32x4_t dot_lane(int32x4_t sum, uint8x16_t weights, int8x16_t x, size_t j) {
    switch (j) {
        case 0: return vusdotq_laneq_s32(sum, weights, x, 0);
        case 1: return vusdotq_laneq_s32(sum, weights, x, 1);
        case 2: return vusdotq_laneq_s32(sum, weights, x, 2);
        default: return vusdotq_laneq_s32(sum, weights, x, 3);
    }
}

#endif
