/* avx512/primitives.h: what the vector extension cannot say. Each is the exact operation of portable/primitives.h. */
#ifndef DM_AVX512_PRIMITIVES_H
#define DM_AVX512_PRIMITIVES_H

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

/* float16 to float32. */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)half));
}

#endif
