/* reload_weights.h: levels of 16 registers unpack weights anew for every step of tokens. */
#ifndef DM_X86_RELOAD_WEIGHTS_H
#define DM_X86_RELOAD_WEIGHTS_H

typedef struct group_weights {
    const uint8_t *vectors;
} group_weights;

DM_INLINE void load_weights(group_weights *weights, const uint8_t *vectors, int format) {
    (void)format;
    weights->vectors = vectors;
}

DM_INLINE i32v four_weights(const group_weights *weights, size_t j, int format) {
    return four_columns(weights->vectors, j, format);
}

#endif
