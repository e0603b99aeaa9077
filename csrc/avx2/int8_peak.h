/* int8_peak.h: vpmaddubsw from L1, 32 products each. Eight of them fit an int16 lane where weights have 4 bits (8 * 2 *
 * 15 * 127 < 2^15), then vpmaddwd widens: the cheapest dot product without VNNI. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    const __m256i *x = (const __m256i *)data;
    const __m256i weight = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t round = 0; round < rounds; round++) {
        for (size_t chain = 0; chain < 4; chain++) {
            __m256i total = _mm256_setzero_si256();
            for (size_t j = 0; j < 8; j++) {
                total = _mm256_add_epi16(total, _mm256_maddubs_epi16(weight, _mm256_loadu_si256(x + j)));
            }
            sum[chain] = _mm256_add_epi32(sum[chain], _mm256_madd_epi16(total, ones));
            __asm__ volatile("" : : : "memory"); /* the loads stay in the loop */
        }
    }
    for (size_t chain = 0; chain < 4; chain++) data[chain] ^= _mm256_extract_epi32(sum[chain], 0);
    return rounds * 4 * 8 * 32 * 2;
}
