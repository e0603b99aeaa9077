/* avx2/primitives.h: what the vector extension cannot say. Each is the exact operation of portable/primitives.h. */
#ifndef DM_AVX2_PRIMITIVES_H
#define DM_AVX2_PRIMITIVES_H

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

/* float16 to float32. */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)half));
}

#endif
