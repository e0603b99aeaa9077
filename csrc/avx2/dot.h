/* avx2/dot.h: vpmaddubsw and vpmaddwd on 8 rows. */
#ifndef DM_AVX2_DOT_H
#define DM_AVX2_DOT_H

/* A step takes so many tokens and two registers of rows. A single token's strip is four tiles, as memory likes them. */
#define DM_STRIP 2
#ifndef DM_STRIP_ONE
#define DM_STRIP_ONE 8
#endif
#define DOT_TOKENS_Q4 4
#define DOT_TOKENS_Q8 2

/* Unsigned times signed bytes, neighbours added; the sums must fit int16. */
DM_INLINE i16v multiply_bytes(i32v weights, i32v x) { return (i16v)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x); }

/* factor * (both int16 of a 32-bit lane). */
DM_INLINE i32v add_pairs(i16v x, int16_t factor) {
    return (i32v)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(factor));
}

/* even and odd bytes of 4 columns times the two pairs of int_pairs.h. */
#define DM_HAS_PAIR_SUMS
DM_INLINE i32v pair_sums(i16v even, i16v odd, const uint32_t *pairs) {
    return (i32v)_mm256_madd_epi16((__m256i)even, (__m256i)all_u32(pairs[0])) +
           (i32v)_mm256_madd_epi16((__m256i)odd, (__m256i)all_u32(pairs[1]));
}

#endif
