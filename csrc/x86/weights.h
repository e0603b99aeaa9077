/* weights.h: 32 columns of one register of rows as unsigned bytes, four columns at a time. */
#ifndef DM_X86_WEIGHTS_H
#define DM_X86_WEIGHTS_H

/* Dot products at a time: a step of at most 8 tokens, or a single one (the level's dot.h says how many registers). */
#define DOT_REGISTERS (8 * DM_STRIP > DM_STRIP_ONE ? 8 * DM_STRIP : DM_STRIP_ONE)

DM_INLINE i32v load_vector(const uint8_t *vector) {
    i32v bytes;
    __builtin_memcpy(&bytes, vector, sizeof bytes);
    return bytes;
}

/* Columns 4j ... 4j + 3; a q4 vector holds those of j in its low and those of j + 4 in its high nibbles. */
DM_INLINE i32v four_columns(const uint8_t *vectors, size_t j, int format) {
    if (format == DM_Q8) return load_vector(vectors + 64 * j);
    u32v both = (u32v)load_vector(vectors + 64 * (j % 4));
    return (i32v)((j < 4 ? both : both >> 4) & 0x0f0f0f0f);
}

DM_INLINE i32v four_activations(const int8_t *q) {
    int32_t dword;
    __builtin_memcpy(&dword, q, sizeof dword);
    return all_i32(dword);
}

#endif
