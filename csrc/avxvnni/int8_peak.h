/* int8_peak.h: vpdpbusd on registers, 32 products each; twelve chains hide its 5 cycles. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    const __m256i *from = (const __m256i *)data;
    __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1), sum[12];
    for (size_t i = 0; i < 12; i++) sum[i] = _mm256_set1_epi32(data[i]);
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < 12; i++) sum[i] = _mm256_dpbusd_avx_epi32(sum[i], a, b);
    }
    for (size_t i = 0; i < 12; i++) data[i] ^= _mm256_extract_epi32(sum[i], 0);
    return rounds * 12 * 32 * 2;
}
