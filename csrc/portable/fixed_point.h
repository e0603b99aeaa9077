/* fixed_point.h: into and out of the exact sums, int64 in units of 2^-32 (rule 7). What is out of range counts as 0
 * and is reported, so that every step runs to its end. */
#ifndef DM_FIXED_POINT_H
#define DM_FIXED_POINT_H

#define FIXED_LIMIT_BITS 0x48800000 /* 2^18 */
#define SUM_LIMIT (INT64_C(1) << 51)
#define ROUNDING_MAGIC 0x1.8p52 /* its last mantissa bit is worth 1 */
#define ROUNDING_MAGIC_BITS UINT64_C(0x4338000000000000)

/* Both loops choose by masks, not by branches, so that compilers make vectors of them. */
static int add_fixed(int64_t *sum_D, const float *x_D, float weight, size_t D) {
    uint32_t bad = 0;
    for (size_t d = 0; d < D; d++) {
        uint32_t bits = f32_bits(x_D[d] * weight);
        uint32_t too_big = -(uint32_t)((bits & DM_ABS_MASK) >= FIXED_LIMIT_BITS);
        bad |= too_big;
        double shifted = (double)f32_from_bits(bits & ~too_big) * 0x1p32 + ROUNDING_MAGIC;
        uint64_t fixed;
        __builtin_memcpy(&fixed, &shifted, sizeof fixed);
        sum_D[d] = (int64_t)((uint64_t)sum_D[d] + (fixed - ROUNDING_MAGIC_BITS));
    }
    return bad ? DM_FAULT_CONTRIBUTION : 0;
}

/* x as float; *bad is set if it is out of range. */
DM_INLINE float from_fixed(int64_t x, uint64_t *bad) {
    uint64_t too_big = -(uint64_t)((uint64_t)x + SUM_LIMIT - 1 >= 2 * (uint64_t)SUM_LIMIT - 1);
    *bad |= too_big;
    uint64_t bits = ((uint64_t)x & ~too_big) + ROUNDING_MAGIC_BITS;
    double shifted;
    __builtin_memcpy(&shifted, &bits, sizeof shifted);
    return (float)((shifted - ROUNDING_MAGIC) * 0x1p-32);
}

static int add_exact(float *x_D, const int64_t *sum_D, const float *bias_D, size_t D) {
    uint64_t bad = 0;
    if (bias_D == NULL) {
        for (size_t d = 0; d < D; d++) x_D[d] += from_fixed(sum_D[d], &bad);
    } else {
        for (size_t d = 0; d < D; d++) x_D[d] += from_fixed(sum_D[d], &bad) + bias_D[d];
    }
    return bad ? DM_FAULT_SUM : 0;
}

#endif
