/* avxvnni/dot.h: vpdpbusd on 8 rows, in its VEX encoding. */
#ifndef DM_AVXVNNI_DOT_H
#define DM_AVXVNNI_DOT_H

/* A step takes so many tokens and two registers of rows. */
#define DM_STRIP 2
#ifndef DM_STRIP_ONE
#define DM_STRIP_ONE 4
#endif
#define DOT_TOKENS_Q4 4
#define DOT_TOKENS_Q8 4

DM_INLINE i32v dot_four(i32v sum, i32v weights, i32v x) {
    return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x);
}

#endif
