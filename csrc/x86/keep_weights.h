/* keep_weights.h: levels of 32 registers keep a group's weights, unpacked, in eight of them. */
#ifndef DM_X86_KEEP_WEIGHTS_H
#define DM_X86_KEEP_WEIGHTS_H

typedef struct group_weights {
    i32v columns[8];
} group_weights;

DM_INLINE void load_weights(group_weights *weights, const uint8_t *vectors, int format) {
    for (size_t j = 0; j < 8; j++) weights->columns[j] = four_columns(vectors, j, format);
}

DM_INLINE i32v four_weights(const group_weights *weights, size_t j, int format) {
    (void)format;
    return weights->columns[j];
}

#endif
