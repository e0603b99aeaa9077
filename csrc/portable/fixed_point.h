/* fixed_point.h: into and out of the exact sums, int64 in units of 2^-32 (rule 7). What is out of range counts as 0
 * and is reported, so that every step runs to its end.
 *
 * A range check comes first, for all elements at once; a vector that fails it is done again one by one.
 */
#ifndef DM_FIXED_POINT_H
#define DM_FIXED_POINT_H

#define FIXED_LIMIT_BITS 0x48800000 /* 2^18 */
#define SUM_LIMIT (INT64_C(1) << 51)
#define ROUNDING_MAGIC 0x1.8p52 /* its last mantissa bit is worth 1 */
#define ROUNDING_MAGIC_BITS UINT64_C(0x4338000000000000)

#define WIDE_LANES (DM_LANES / 2)

#ifndef DM_HAS_F64_CONVERSIONS
DM_INLINE f64v widen_f64(f32_half x) { return __builtin_convertvector(x, f64v); }
DM_INLINE f32_half narrow_f64(f64v x) { return __builtin_convertvector(x, f32_half); }
#endif

/* rint(x * 2^32) for |x| < 2^18. */
#ifndef DM_HAS_TO_FIXED
DM_INLINE u64v to_fixed(f32_half x) {
    f64v shifted = widen_f64(x) * 0x1p32 + ROUNDING_MAGIC;
    return (u64v)shifted - ROUNDING_MAGIC_BITS;
}
#endif

DM_INLINE u64v load_u64(const int64_t *from) {
    u64v x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

/* One element. Returns whether it is out of range. */
DM_INLINE int add_fixed_one(int64_t *sum, float x) {
    int too_big = (f32_bits(x) & DM_ABS_MASK) >= FIXED_LIMIT_BITS;
    double shifted = (double)(too_big ? 0.0f : x) * 0x1p32 + ROUNDING_MAGIC;
    uint64_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    *sum = (int64_t)((uint64_t)*sum + (bits - ROUNDING_MAGIC_BITS));
    return too_big;
}

/* Rounding is monotonic, so the largest |x| has the largest product. */
DM_INLINE int products_in_range(const float *x, float weight, size_t n) {
    float largest = f32_from_bits((uint32_t)absmax_bits(x, n));
    return (f32_bits(largest * weight) & DM_ABS_MASK) < FIXED_LIMIT_BITS;
}

static int add_fixed(int64_t *sum_D, const float *x_D, float weight, size_t D) {
    size_t d = 0;
    if (products_in_range(x_D, weight, D)) {
        for (; d + WIDE_LANES <= D; d += WIDE_LANES) {
            f32_half x;
            __builtin_memcpy(&x, x_D + d, sizeof x);
            u64v sum = load_u64(sum_D + d) + to_fixed(x * weight);
            __builtin_memcpy(sum_D + d, &sum, sizeof sum);
        }
    }
    int bad = 0;
    for (; d < D; d++) bad |= add_fixed_one(&sum_D[d], x_D[d] * weight);
    return bad ? DM_FAULT_CONTRIBUTION : 0;
}

/* One element. Returns whether it is out of range. */
DM_INLINE int exact_one(float *delta, int64_t sum) {
    int too_big = sum >= SUM_LIMIT || sum <= -SUM_LIMIT;
    uint64_t bits = (uint64_t)(too_big ? 0 : sum) + ROUNDING_MAGIC_BITS;
    double shifted;
    __builtin_memcpy(&shifted, &bits, sizeof shifted);
    *delta = (float)((shifted - ROUNDING_MAGIC) * 0x1p-32);
    return too_big;
}

/* -SUM_LIMIT < sum < SUM_LIMIT: then both sum + SUM_LIMIT - 1 and sum + SUM_LIMIT are in [0, 2^52). */
DM_INLINE int sums_in_range(const int64_t *sum_D, size_t D) {
    u64v high = {0};
    size_t d = 0;
    for (; d + WIDE_LANES <= D; d += WIDE_LANES) {
        u64v sum = load_u64(sum_D + d) + (uint64_t)SUM_LIMIT;
        high |= (sum | (sum - 1)) >> 52;
    }
    uint64_t any = 0;
    for (size_t i = 0; i < WIDE_LANES; i++) any |= high[i];
    for (; d < D; d++) any |= (((uint64_t)sum_D[d] + SUM_LIMIT) | ((uint64_t)sum_D[d] + SUM_LIMIT - 1)) >> 52;
    return any == 0;
}

static int add_exact(float *x_D, const int64_t *sum_D, const float *bias_D, size_t D) {
    size_t d = 0;
    if (sums_in_range(sum_D, D)) {
        for (; d + WIDE_LANES <= D; d += WIDE_LANES) {
            f64v shifted = (f64v)(load_u64(sum_D + d) + ROUNDING_MAGIC_BITS);
            f32_half x, delta = narrow_f64((shifted - ROUNDING_MAGIC) * 0x1p-32);
            if (bias_D != NULL) {
                f32_half bias;
                __builtin_memcpy(&bias, bias_D + d, sizeof bias);
                delta += bias;
            }
            __builtin_memcpy(&x, x_D + d, sizeof x);
            x += delta;
            __builtin_memcpy(x_D + d, &x, sizeof x);
        }
    }
    int bad = 0;
    for (; d < D; d++) {
        float delta;
        bad |= exact_one(&delta, sum_D[d]);
        x_D[d] += bias_D == NULL ? delta : delta + bias_D[d];
    }
    return bad ? DM_FAULT_SUM : 0;
}

#endif
