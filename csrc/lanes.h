/* lanes.h: the 16-lane arithmetic of the numerics contract, written once over a level's vectors.
 *
 * Included after vector_types.h and the level's primitives.h (fma_lanes, widen_f16). A function here works on one
 * register (DM_LANES elements) unless its type is f32x16, the 16 lanes of a rule-4 sum.
 */
#ifndef DM_LANES_H
#define DM_LANES_H

typedef struct f32x16 {
    f32v part[DM_PARTS];
} f32x16;

#define DM_ABS_MASK 0x7fffffff
#define DM_INFINITY_BITS 0x7f800000

DM_INLINE f32v load_f32(const float *from) {
    f32v x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

DM_INLINE void store_f32(float *to, f32v x) { __builtin_memcpy(to, &x, sizeof x); }

/* The first n elements; the rest +0. */
DM_INLINE f32v load_f32_part(const float *from, size_t n) {
    if (n >= DM_LANES) return load_f32(from);
    f32v x = {0};
    for (size_t i = 0; i < n; i++) x[i] = from[i];
    return x;
}

DM_INLINE void store_f32_part(float *to, f32v x, size_t n) {
    if (n >= DM_LANES) {
        store_f32(to, x);
        return;
    }
    for (size_t i = 0; i < n; i++) to[i] = x[i];
}

/* All lanes x. (Adding to a zero vector would turn -0 into +0; subtracting +0 keeps every x.) */
DM_INLINE f32v all_f32(float x) { return x - (f32v){0}; }
DM_INLINE i32v all_i32(int32_t x) { return x - (i32v){0}; }
DM_INLINE u32v all_u32(uint32_t x) { return x - (u32v){0}; }

DM_INLINE uint32_t f32_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

DM_INLINE float f32_from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

/* Element of `yes` where the mask (0 or -1) is set, of `no` elsewhere. */
DM_INLINE f32v select_f32(i32v mask, f32v yes, f32v no) { return (f32v)(((i32v)yes & mask) | ((i32v)no & ~mask)); }

/* x if it is larger (smaller), else best: a NaN in x is passed over. A level may have an instruction for each. */
#ifndef DM_HAS_MAX_F32
DM_INLINE f32v max_f32(f32v best, f32v x) { return select_f32(x > best, x, best); }
DM_INLINE f32v min_f32(f32v best, f32v x) { return select_f32(x < best, x, best); }
#endif

DM_INLINE i32v abs_bits(f32v x) { return (i32v)x & DM_ABS_MASK; }

DM_INLINE i32v max_i32(i32v a, i32v b) {
    i32v mask = a > b;
    return (a & mask) | (b & ~mask);
}

/* Lane i holds i. */
DM_INLINE i32v lane_numbers(void) {
    i32v numbers;
    for (int32_t i = 0; i < DM_LANES; i++) numbers[i] = i;
    return numbers;
}

/* Four lanes at a time, which compilers make vectors of. */
typedef int32_t i32_four __attribute__((vector_size(16)));

DM_INLINE int32_t highest_i32(i32v x) {
    i32_four part[DM_LANES / 4], best;
    __builtin_memcpy(part, &x, sizeof x);
    best = part[0];
    for (size_t i = 1; i < DM_LANES / 4; i++) best = (best & (best > part[i])) | (part[i] & ~(best > part[i]));
    int32_t one = best[0] > best[1] ? best[0] : best[1], other = best[2] > best[3] ? best[2] : best[3];
    return one > other ? one : other;
}

/* Sums of lanes must fit int32. */
DM_INLINE int32_t sum_i32(i32v x) {
    i32_four part[DM_LANES / 4], total;
    __builtin_memcpy(part, &x, sizeof x);
    total = part[0];
    for (size_t i = 1; i < DM_LANES / 4; i++) total += part[i];
    return total[0] + total[1] + total[2] + total[3];
}

/* A level may do better than these two. */
#ifndef DM_HAS_LANE_TREES
DM_INLINE float highest_f32(f32v x) {
    float best = x[0];
    for (size_t i = 1; i < DM_LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

DM_INLINE float sum_lanes(f32v x) {
    float lane[DM_LANES];
    store_f32(lane, x);
    for (size_t width = DM_LANES / 2; width > 0; width /= 2) {
        for (size_t i = 0; i < width; i++) lane[i] += lane[i + width];
    }
    return lane[0];
}
#endif

/* Largest bits of |x| of n floats: >= DM_INFINITY_BITS if one is infinite or NaN (rule 15). */
DM_INLINE int32_t absmax_bits(const float *x, size_t n) {
    i32v best = {0};
    for (size_t i = 0; i < n; i += DM_LANES) best = max_i32(abs_bits(load_f32_part(x + i, n - i)), best);
    return highest_i32(best);
}

DM_INLINE f32x16 zero_f32x16(void) {
    f32x16 zero;
    for (size_t part = 0; part < DM_PARTS; part++) zero.part[part] = (f32v){0};
    return zero;
}

/* Rule 4: lanes i and i+8, then +4, +2, +1. */
DM_INLINE float sum_tree(f32x16 sum) {
    for (size_t width = DM_PARTS / 2; width > 0; width /= 2) {
        for (size_t i = 0; i < width; i++) sum.part[i] += sum.part[i + width];
    }
    return sum_lanes(sum.part[0]);
}

/* Rule 4: x < -87 gives +0, clamped at 88; a NaN stays one. exp(r) for |r| <= ln2 / 2 by Cephes' expf coefficients. */
DM_INLINE f32v exp_f32(f32v x) {
    const f32v magic = all_f32(0x1.8p23f);
    f32v clamped = max_f32(min_f32(x, all_f32(88.0f)), all_f32(-87.0f));
    f32v shifted = fma_lanes(clamped, all_f32(0x1.715476p0f), magic);
    f32v n = shifted - magic;
    f32v r = fma_lanes(n, all_f32(-0x1.63p-1f), clamped);
    r = fma_lanes(n, all_f32(0x1.bd0106p-13f), r);
    f32v p = all_f32(1.9875691500e-4f);
    p = fma_lanes(p, r, all_f32(1.3981999507e-3f));
    p = fma_lanes(p, r, all_f32(8.3334519073e-3f));
    p = fma_lanes(p, r, all_f32(4.1665795894e-2f));
    p = fma_lanes(p, r, all_f32(1.6666665459e-1f));
    p = fma_lanes(p, r, all_f32(5.0000001201e-1f));
    p = fma_lanes(p, r, all_f32(1.0f));
    p = fma_lanes(p, r, all_f32(1.0f));
    /* n is in [-126, 127] and p * 2^n is normal, so adding n to the exponent is exact. */
    u32v scaled = (u32v)p + ((u32v)shifted << 23);
    scaled &= ~(u32v)(x < -87.0f);
    return select_f32(x == x, (f32v)scaled, x);
}

DM_INLINE float exp_one(float x) { return exp_f32(all_f32(x))[0]; }

/* The nearest integer to x, ties to even, for |x| <= 2^22. */
DM_INLINE i32v round_i32(f32v x) { return (i32v)(x + 0x1.8p23f) - all_i32(0x4b400000); }

/* DM_LANES int8. In two steps: compilers make a scalar loop of one conversion by a factor of four. */
#ifndef DM_HAS_LOAD_I8
DM_INLINE i32v load_i8(const int8_t *from) {
    i8_lanes narrow;
    __builtin_memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(__builtin_convertvector(narrow, i16_lanes), i32v);
}
#endif

DM_INLINE void store_i8(int8_t *to, i32v x) {
    i8_lanes narrow = __builtin_convertvector(__builtin_convertvector(x, i16_lanes), i8_lanes);
    __builtin_memcpy(to, &narrow, sizeof narrow);
}

/* One step of a dot product in i16 lanes: pair = two int16 for every 32-bit lane. */
DM_INLINE i16v all_pairs(uint32_t pair) { return (i16v)all_u32(pair); }

/* The sum of each 32-bit lane's two int16. */
DM_INLINE i32v sum_pairs(i16v x) { return (((i32v)((u32v)x << 16)) >> 16) + ((i32v)x >> 16); }

#endif
