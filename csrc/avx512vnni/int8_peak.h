/* int8_peak.h: vpdpbusd on registers, 64 products each; twelve chains hide its 5 cycles. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    __m512i a = _mm512_loadu_si512(data), b = _mm512_loadu_si512(data + 16), sum[12];
    for (size_t i = 0; i < 12; i++) sum[i] = _mm512_set1_epi32(data[i]);
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < 12; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    }
    for (size_t i = 0; i < 12; i++) data[i] ^= _mm512_reduce_add_epi32(sum[i]);
    return rounds * 12 * 64 * 2;
}
