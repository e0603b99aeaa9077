/* int_pairs.h: exact int8 dot products in int16 lanes, two per row: the even and the odd half of a dword's bytes.
 *
 * Bounds: q4 adds 16 products of at most 15 * 128 per lane = 30720; bytes add 2 of at most 128 * 127 = 32512; both fit.
 */
#ifndef DM_INT_PAIRS_H
#define DM_INT_PAIRS_H

/* The activations of T tokens in that order: dword 2j of a group holds columns 4j and 4j + 2, dword 2j + 1 columns
 * 4j + 1 and 4j + 3, as int16. */
DM_INLINE void widen_pairs(uint32_t *pairs, const int8_t *q, size_t count) {
    for (size_t j = 0; j < count; j++) {
        pairs[2 * j] = (uint32_t)(uint16_t)q[4 * j] | (uint32_t)(uint16_t)q[4 * j + 2] << 16;
        pairs[2 * j + 1] = (uint32_t)(uint16_t)q[4 * j + 1] | (uint32_t)(uint16_t)q[4 * j + 3] << 16;
    }
}

/* One register of a packed vector: its bytes as int16, even ones and odd ones. */
DM_INLINE u16v load_bytes(const uint8_t *vector) {
    u16v bytes;
    __builtin_memcpy(&bytes, vector, sizeof bytes);
    return bytes;
}

DM_INLINE i16v even_bytes(i16v bytes) { return (i16v)((u16v)bytes << 8) >> 8; }
DM_INLINE i16v odd_bytes(i16v bytes) { return bytes >> 8; }

/* dot[t] = sum over 32 columns of w * x_t for signed bytes w, after the offset (0x80 in every byte, or none) is taken
 * away. */
DM_INLINE void dot_bytes(i32v *dot, const uint8_t *vectors, const uint32_t *pairs, size_t pair_stride, size_t tokens,
                         uint16_t offset) {
    for (size_t t = 0; t < tokens; t++) dot[t] = (i32v){0};
    for (size_t j = 0; j < 8; j++) {
        i16v bytes = (i16v)(load_bytes(vectors + 64 * j) ^ offset);
        i16v even = even_bytes(bytes), odd = odd_bytes(bytes);
        for (size_t t = 0; t < tokens; t++) {
            const uint32_t *x = pairs + t * pair_stride + 2 * j;
            dot[t] += sum_pairs(even * all_pairs(x[0]) + odd * all_pairs(x[1]));
        }
    }
}

#endif
