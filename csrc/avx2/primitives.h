/* avx2/primitives.h: what the vector extension cannot say. Each is the exact operation of portable/primitives.h. */
#ifndef DM_AVX2_PRIMITIVES_H
#define DM_AVX2_PRIMITIVES_H

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

/* float16 to float32. */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)half));
}

/* x if it is larger (smaller), else best, as the instructions do it: their second operand wins over a NaN. */
#define DM_HAS_MAX_F32
DM_INLINE f32v max_f32(f32v best, f32v x) { return (f32v)_mm256_max_ps((__m256)x, (__m256)best); }
DM_INLINE f32v min_f32(f32v best, f32v x) { return (f32v)_mm256_min_ps((__m256)x, (__m256)best); }

/* DM_LANES int8. */
#define DM_HAS_LOAD_I8
DM_INLINE i32v load_i8(const int8_t *from) {
    return (i32v)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u *)from));
}

/* The tree of rule 4 from lanes i and i+4 on; the largest lane, if none is a NaN. */
#define DM_HAS_LANE_TREES
DM_INLINE float sum_lanes(f32v x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

DM_INLINE float highest_f32(f32v x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* Floats to doubles, one register of them, and back. */
#define DM_HAS_F64_CONVERSIONS
DM_INLINE f64v widen_f64(f32_half x) { return (f64v)_mm256_cvtps_pd((__m128)x); }
DM_INLINE f32_half narrow_f64(f64v x) { return (f32_half)_mm256_cvtpd_ps((__m256d)x); }

#endif
