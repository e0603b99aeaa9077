/* avx512/primitives.h: what the vector extension cannot say. Each is the exact operation of portable/primitives.h. */
#ifndef DM_AVX512_PRIMITIVES_H
#define DM_AVX512_PRIMITIVES_H

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

/* float16 to float32. */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)half));
}

/* x if it is larger (smaller), else best, as the instructions do it: their second operand wins over a NaN. */
#define DM_HAS_MAX_F32
DM_INLINE f32v max_f32(f32v best, f32v x) { return (f32v)_mm512_max_ps((__m512)x, (__m512)best); }
DM_INLINE f32v min_f32(f32v best, f32v x) { return (f32v)_mm512_min_ps((__m512)x, (__m512)best); }

/* DM_LANES int8. */
#define DM_HAS_LOAD_I8
DM_INLINE i32v load_i8(const int8_t *from) {
    return (i32v)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)from));
}

/* The tree of rule 4 from lanes i and i+8 on; the largest lane, if none is a NaN. */
#define DM_HAS_LANE_TREES
DM_INLINE float sum_lanes(f32v x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

DM_INLINE float highest_f32(f32v x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* Floats to doubles, one register of them, and back. */
#define DM_HAS_F64_CONVERSIONS
DM_INLINE f64v widen_f64(f32_half x) { return (f64v)_mm512_cvtps_pd((__m256)x); }
DM_INLINE f32_half narrow_f64(f64v x) { return (f32_half)_mm512_cvtpd_ps((__m512d)x); }

/* Scaling by a power of two is exact here, and the conversion rounds to even. */
#define DM_HAS_TO_FIXED
DM_INLINE u64v to_fixed(f32_half x) {
    return (u64v)_mm512_cvtps_epi64(_mm256_mul_ps((__m256)x, _mm256_set1_ps(0x1p32f)));
}

#endif
