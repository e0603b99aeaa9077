/* operand.h: a block's tokens copied into the order of use. */
#ifndef DM_AMX_OPERAND_H
#define DM_AMX_OPERAND_H

/* `tokens` tokens from t on, in the order of use. */
DM_INLINE void copy_operand(int8_t *q_GT, const dm_rows *x, size_t t, size_t tokens, size_t groups) {
    for (size_t i = 0; i < tokens; i++) {
        const int8_t *q = x->q + (t + i) * x->q_stride;
        for (size_t g = 0; g < groups; g++) {
            __builtin_memcpy(q_GT + (g * AMX_BLOCK + i) * DM_GROUP, q + g * DM_GROUP, DM_GROUP);
        }
    }
}

/* The scales of `tokens` tokens from t on, transposed. */
DM_INLINE void gather_scales(float *scale_GT, const dm_rows *x, size_t t, size_t tokens, size_t groups) {
    const __mmask16 present = (__mmask16)((1u << tokens) - 1);
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(numbers, _mm512_set1_epi32((int)x->group_stride));
    const float *scale = x->scale + t * x->group_stride;
    for (size_t g = 0; g < groups; g++) {
        _mm512_store_ps(scale_GT + g * AMX_BLOCK,
                        _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, places, scale + g, 4));
    }
}

#endif
