/* fixed_point.h: into and out of the exact sums, int64 in units of 2^-32 (rule 7). What is out of range counts as 0
 * and is reported, so that every step runs to its end. */
#ifndef DM_FIXED_POINT_H
#define DM_FIXED_POINT_H

#define FIXED_LIMIT_BITS 0x48800000 /* 2^18 */
#define SUM_LIMIT (INT64_C(1) << 51)
#define ROUNDING_MAGIC 0x1.8p52 /* its last mantissa bit is worth 1 */
#define ROUNDING_MAGIC_BITS UINT64_C(0x4338000000000000)

static int add_fixed(int64_t *sum_D, const float *x_D, float weight, size_t D) {
    int bad = 0;
    for (size_t d = 0; d < D; d++) {
        float x = x_D[d] * weight;
        int too_big = (f32_bits(x) & DM_ABS_MASK) >= FIXED_LIMIT_BITS;
        bad |= too_big;
        double shifted = (double)(too_big ? 0.0f : x) * 0x1p32 + ROUNDING_MAGIC;
        uint64_t bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        sum_D[d] = (int64_t)((uint64_t)sum_D[d] + (bits - ROUNDING_MAGIC_BITS));
    }
    return bad ? DM_FAULT_CONTRIBUTION : 0;
}

static int add_exact(float *x_D, const int64_t *sum_D, const float *bias_D, size_t D) {
    int bad = 0;
    for (size_t d = 0; d < D; d++) {
        int too_big = sum_D[d] >= SUM_LIMIT || sum_D[d] <= -SUM_LIMIT;
        bad |= too_big;
        uint64_t bits = (uint64_t)(too_big ? 0 : sum_D[d]) + ROUNDING_MAGIC_BITS;
        double shifted;
        __builtin_memcpy(&shifted, &bits, sizeof shifted);
        float delta = (float)((shifted - ROUNDING_MAGIC) * 0x1p-32);
        x_D[d] += bias_D == NULL ? delta : delta + bias_D[d];
    }
    return bad ? DM_FAULT_SUM : 0;
}

#endif
