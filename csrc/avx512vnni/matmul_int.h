/* matmul_int.h: q4 and q8 weights by vpdpbusd: per 32 columns and 16 rows eight of them, then one conversion and one
 * fma.
 *
 *   vpdpbusd zmm, zmm, m32{1to16}   16 rows x 4 columns, unsigned weights x signed activations, 5 cycles
 *
 * Bounds: 32 products of at most 255 * 128 stay far inside int32; vpdpbusd does not saturate. The weights' offset (8 or
 * 128) times the activations' sum is taken away from the accumulator's start value. Two chains hide the latency.
 */
#ifndef DM_AVX512VNNI_MATMUL_INT_H
#define DM_AVX512VNNI_MATMUL_INT_H

/* Tokens that share one unpacking of the weights: 8 registers of weights, 8 sums, 2 chains. */
#define TILE_TOKENS 8

/* The activations of 4 columns in every lane. */
DM_INLINE __m512i four_columns(const int8_t *q) {
    int32_t dword;
    __builtin_memcpy(&dword, q, sizeof dword);
    return _mm512_set1_epi32(dword);
}

/* 32 columns of 16 rows as unsigned bytes, in the order of the columns. */
DM_INLINE void unpack_q4(__m512i weights[8], const uint8_t *vectors) {
    const __m512i low = _mm512_set1_epi8(15);
    for (size_t j = 0; j < 4; j++) {
        __m512i both = _mm512_load_si512(vectors + 64 * j);
        weights[j] = _mm512_and_si512(both, low);
        weights[4 + j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

DM_INLINE void unpack_q8(__m512i weights[8], const uint8_t *vectors) {
    for (size_t j = 0; j < 8; j++) weights[j] = _mm512_load_si512(vectors + 64 * j);
}

/* Sum over 32 columns of (weight - offset) * x. */
DM_INLINE __m512i dot_group(const __m512i weights[8], const int8_t *q, int32_t sum, int32_t offset) {
    __m512i even = _mm512_set1_epi32(-offset * sum), odd = _mm512_setzero_si512();
    for (size_t j = 0; j < 8; j += 2) {
        even = _mm512_dpbusd_epi32(even, weights[j], four_columns(q + 4 * j));
        odd = _mm512_dpbusd_epi32(odd, weights[j + 1], four_columns(q + 4 * j + 4));
    }
    return _mm512_add_epi32(even, odd);
}

/* One tile against `tokens` tokens from t on. */
DM_INLINE void vnni_tile(float *out_TR, const uint8_t *tile, const dm_rows *x, size_t t, size_t tokens, size_t rows,
                         size_t out_stride, size_t group, int format) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP);
    const size_t groups_per_scale = group == 0 ? groups : group / DM_GROUP;
    const size_t group_bytes = format == DM_Q4 ? 256 : 512;
    const uint8_t *vectors = tile + dm_scale_bytes(x->columns, group);
    f32v sum[TILE_TOKENS];
    for (size_t i = 0; i < tokens; i++) sum[i] = (f32v){0};
    const uint16_t *scales = (const uint16_t *)tile;
    size_t left = groups_per_scale;
    for (size_t g = 0; g < groups; g++, vectors += group_bytes) {
        __m512i weights[8];
        if (format == DM_Q4)
            unpack_q4(weights, vectors);
        else
            unpack_q8(weights, vectors);
        f32v scale = widen_f16(scales);
        if (--left == 0) {
            scales += 16;
            left = groups_per_scale;
        }
        for (size_t i = 0; i < tokens; i++) {
            const size_t place = (t + i) * x->group_stride + g;
            __m512i dot = dot_group(weights, x->q + (t + i) * x->q_stride + g * DM_GROUP, x->sum[place],
                                    format == DM_Q4 ? 8 : 128);
            sum[i] = fma_lanes(scale * all_f32(x->scale[place]), (f32v)_mm512_cvtepi32_ps(dot), sum[i]);
        }
    }
    for (size_t i = 0; i < tokens; i++) store_f32_part(out_TR + (t + i) * out_stride, sum[i], rows);
}

DM_INLINE void matmul_vnni(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                           size_t out_stride, size_t group, int format) {
    const size_t tile_bytes = dm_tile_bytes(format, x->columns, group);
    for (size_t first = 0; first < T; first += DM_TOKEN_BLOCK) {
        const size_t last = T - first < DM_TOKEN_BLOCK ? T : first + DM_TOKEN_BLOCK;
        for (size_t row = 0; row < rows; row += 16) {
            const uint8_t *tile = packed + row / 16 * tile_bytes;
            float *out = out_TR + row;
            const size_t left = rows - row;
            size_t t = first;
            for (; t + 8 <= last; t += 8) vnni_tile(out, tile, x, t, 8, left, out_stride, group, format);
            for (; t + 4 <= last; t += 4) vnni_tile(out, tile, x, t, 4, left, out_stride, group, format);
            for (; t + 2 <= last; t += 2) vnni_tile(out, tile, x, t, 2, left, out_stride, group, format);
            for (; t < last; t++) vnni_tile(out, tile, x, t, 1, left, out_stride, group, format);
        }
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    (void)scratch;
    matmul_vnni(out_TR, packed, x, T, rows, out_stride, group, DM_Q8);
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    (void)scratch;
    matmul_vnni(out_TR, packed, x, T, rows, out_stride, group, DM_Q4);
}

#endif
