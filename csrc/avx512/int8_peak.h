/* int8_peak.h: vpmaddubsw from L1, 64 products each. Eight of them fit an int16 lane where weights have 4 bits (8 * 2 *
 * 15 * 127 < 2^15), then vpmaddwd widens: the cheapest dot product without VNNI. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    const __m512i *x = (const __m512i *)data;
    const __m512i weight = _mm512_set1_epi8(5), ones = _mm512_set1_epi16(1);
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t round = 0; round < rounds; round++) {
        for (size_t chain = 0; chain < 4; chain++) {
            __m512i total = _mm512_setzero_si512();
            for (size_t j = 0; j < 8; j++) {
                total = _mm512_add_epi16(total, _mm512_maddubs_epi16(weight, _mm512_loadu_si512(x + j)));
            }
            sum[chain] = _mm512_add_epi32(sum[chain], _mm512_madd_epi16(total, ones));
            __asm__ volatile("" : : : "memory"); /* the loads stay in the loop */
        }
    }
    for (size_t chain = 0; chain < 4; chain++) data[chain] ^= _mm512_reduce_add_epi32(sum[chain]);
    return rounds * 4 * 8 * 64 * 2;
}
