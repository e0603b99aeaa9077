/* avx512vnni/dot.h: vpdpbusd on 16 rows. */
#ifndef DM_AVX512VNNI_DOT_H
#define DM_AVX512VNNI_DOT_H

/* A step takes so many tokens and two registers of rows. */
#define DM_STRIP 2
#ifndef DM_STRIP_ONE
#define DM_STRIP_ONE 4
#endif
#define DOT_TOKENS_Q4 4
#define DOT_TOKENS_Q8 4

DM_INLINE i32v dot_four(i32v sum, i32v weights, i32v x) {
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}

#endif
