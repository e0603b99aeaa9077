/* sums_wire.c: exact sums as bytes for the network, in the forms that --wire offers and in that of a finished sum.
 *
 *   exact  sums_packing.c
 *   f32    what a sum becomes when it is used, f32(f64(v) * 2^-32): decoding gives another int64 that is used as the
 *          same f32, with the same range fault. For sums that nothing is added to any more.
 *   bf16   the upper half of that f32, rounded to nearest, ties to even
 *   q8     per 32 values a bf16 scale, rounded upwards from absmax / 127, and int8 numbers
 */
#include <string.h>

#include "dist_moe.h"
#include "float_state.h"

#define BLOCK 32
#define Q8_BLOCK_BYTES 34
#define SUM_LIMIT (INT64_C(1) << 51)
#define LIMIT_F32 0x1p19f          /* SUM_LIMIT * 2^-32 */
#define TOO_LARGE_F32 0x1p20f      /* stands for every sum out of range */
#define LARGEST (INT64_C(1) << 55) /* a rounded contribution beyond it is cut off; the sum is out of range then */
#define LARGEST_F32 0x1p23f
#define ROUNDING_MAGIC 0x1.8p52 /* its last mantissa bit is worth 1 */
#define ROUNDING_MAGIC_F32 0x1.8p23f
#define ROUNDING_MAGIC_BITS UINT64_C(0x4338000000000000)

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* f32(f64(v) * 2^-32) for |v| < 2^51, by the addition that vector units have. */
static inline float small_sum(int64_t value) {
    const uint64_t bits = (uint64_t)value + ROUNDING_MAGIC_BITS;
    double shifted;
    memcpy(&shifted, &bits, sizeof shifted);
    return (float)((shifted - ROUNDING_MAGIC) * 0x1p-32);
}

/* rint(x * 2^32) for |x| < 2^19. */
static inline int64_t small_fixed(float x) {
    const double shifted = (double)x * 0x1p32 + ROUNDING_MAGIC;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int64_t)(bits - ROUNDING_MAGIC_BITS);
}

static float finished(int64_t value) {
    if (value >= SUM_LIMIT) return TOO_LARGE_F32;
    if (value <= -SUM_LIMIT) return -TOO_LARGE_F32;
    return small_sum(value);
}

static int64_t unfinished(float x) {
    if (x > -LIMIT_F32 && x < LIMIT_F32) return small_fixed(x);
    if (x == LIMIT_F32) return SUM_LIMIT - 1; /* in range, but rounded up to the limit */
    if (x == -LIMIT_F32) return 1 - SUM_LIMIT;
    return x < 0 ? -2 * SUM_LIMIT : 2 * SUM_LIMIT;
}

/* -2^51 < v < 2^51 for all of them. */
static int all_small(const int64_t *values, size_t n) {
    uint64_t high = 0;
    for (size_t i = 0; i < n; i++) {
        const uint64_t moved = (uint64_t)values[i] + (uint64_t)SUM_LIMIT;
        high |= (moved | (moved - 1)) >> 52;
    }
    return high == 0;
}

static int all_below_limit(const float *x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return largest < bits_of(LIMIT_F32);
}

static void encode_f32(uint8_t *out, const int64_t *values, size_t n) {
    float x[BLOCK];
    if (all_small(values, n)) {
        for (size_t i = 0; i < n; i++) x[i] = small_sum(values[i]);
    } else {
        for (size_t i = 0; i < n; i++) x[i] = finished(values[i]);
    }
    memcpy(out, x, n * sizeof *x);
}

static void decode_f32(int64_t *values, const uint8_t *bytes, size_t n) {
    float x[BLOCK];
    memcpy(x, bytes, n * sizeof *x);
    if (all_below_limit(x, n)) {
        for (size_t i = 0; i < n; i++) values[i] = small_fixed(x[i]);
    } else {
        for (size_t i = 0; i < n; i++) values[i] = unfinished(x[i]);
    }
}

static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Sums of any size as f32. */
static void to_floats(float *x, const int64_t *values, size_t n) {
    if (all_small(values, n)) {
        for (size_t i = 0; i < n; i++) x[i] = small_sum(values[i]);
    } else {
        for (size_t i = 0; i < n; i++) x[i] = (float)((double)values[i] * 0x1p-32);
    }
}

static int64_t any_fixed(float x) {
    if (x > -LIMIT_F32 && x < LIMIT_F32) return small_fixed(x);
    if (x > -LARGEST_F32 && x < LARGEST_F32) return (int64_t)((double)x * 0x1p32);
    return x < 0 ? -LARGEST : LARGEST;
}

static void to_fixed(int64_t *values, const float *x, size_t n) {
    if (all_below_limit(x, n)) {
        for (size_t i = 0; i < n; i++) values[i] = small_fixed(x[i]);
    } else {
        for (size_t i = 0; i < n; i++) values[i] = any_fixed(x[i]);
    }
}

static void encode_bf16(uint8_t *out, const int64_t *values, size_t n) {
    float x[BLOCK];
    uint16_t halves[BLOCK];
    to_floats(x, values, n);
    for (size_t i = 0; i < n; i++) halves[i] = to_bf16(x[i]);
    memcpy(out, halves, n * sizeof *halves);
}

static void decode_bf16(int64_t *values, const uint8_t *bytes, size_t n) {
    uint16_t halves[BLOCK];
    memcpy(halves, bytes, n * sizeof *halves);
    float x[BLOCK];
    for (size_t i = 0; i < n; i++) x[i] = float_of((uint32_t)halves[i] << 16);
    to_fixed(values, x, n);
}

/* The least bf16 number that is not below x >= 0. */
static uint16_t bf16_above(float x) { return (uint16_t)((bits_of(x) + 0xffff) >> 16); }

/* The nearest integer, ties to even, for |x| < 2^22. */
static inline int32_t nearest(float x) {
    return (int32_t)(bits_of(x + ROUNDING_MAGIC_F32) - bits_of(ROUNDING_MAGIC_F32));
}

static void encode_q8(uint8_t *out, const int64_t *values, size_t n) {
    float x[BLOCK];
    uint32_t largest = 0;
    to_floats(x, values, n);
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    /* The scale is rounded upwards, so no number is beyond 127. */
    const uint16_t scale = bf16_above(float_of(largest) / 127.0f);
    const float step = float_of((uint32_t)scale << 16), inverse = step > 0 ? 1.0f / step : 0.0f;
    memcpy(out, &scale, sizeof scale);
    int8_t numbers[BLOCK];
    for (size_t i = 0; i < n; i++) numbers[i] = (int8_t)nearest(x[i] * inverse);
    memcpy(out + sizeof scale, numbers, n);
}

static void decode_q8(int64_t *values, const uint8_t *bytes, size_t n) {
    uint16_t scale;
    int8_t numbers[BLOCK];
    float x[BLOCK];
    memcpy(&scale, bytes, sizeof scale);
    memcpy(numbers, bytes + sizeof scale, n);
    const float step = float_of((uint32_t)scale << 16);
    for (size_t i = 0; i < n; i++) x[i] = (float)numbers[i] * step;
    to_fixed(values, x, n);
}

static size_t block_bytes(size_t n, int wire) {
    if (wire == DM_WIRE_F32) return n * sizeof(float);
    if (wire == DM_WIRE_BF16) return n * sizeof(uint16_t);
    return Q8_BLOCK_BYTES - BLOCK + n;
}

size_t dm_wire_bound(size_t count, int wire) {
    if (wire == DM_WIRE_EXACT) return dm_packed_bound(count);
    const size_t tail = count % BLOCK;
    return count / BLOCK * block_bytes(BLOCK, wire) + (tail > 0 ? block_bytes(tail, wire) : 0);
}

size_t dm_encode_sums(uint8_t *out, const int64_t *values, size_t count, int wire) {
    if (wire == DM_WIRE_EXACT) return dm_pack_sums(out, values, count);
    const uint64_t saved = dm_enter();
    size_t at = 0;
    for (size_t first = 0; first < count; first += BLOCK) {
        const size_t n = least(BLOCK, count - first);
        if (wire == DM_WIRE_F32)
            encode_f32(out + at, values + first, n);
        else if (wire == DM_WIRE_BF16)
            encode_bf16(out + at, values + first, n);
        else
            encode_q8(out + at, values + first, n);
        at += block_bytes(n, wire);
    }
    dm_set_float_state(saved);
    return at;
}

size_t dm_decode_sums(int64_t *sums, const uint8_t *bytes, size_t byte_count, size_t count, int wire, int add) {
    if (wire == DM_WIRE_EXACT) return dm_unpack_sums(sums, bytes, byte_count, count, add);
    if (byte_count < dm_wire_bound(count, wire)) return 0;
    const uint64_t saved = dm_enter();
    size_t at = 0;
    for (size_t first = 0; first < count; first += BLOCK) {
        const size_t n = least(BLOCK, count - first);
        int64_t own[BLOCK], *values = add ? own : sums + first;
        if (wire == DM_WIRE_F32)
            decode_f32(values, bytes + at, n);
        else if (wire == DM_WIRE_BF16)
            decode_bf16(values, bytes + at, n);
        else
            decode_q8(values, bytes + at, n);
        for (size_t i = 0; add && i < n; i++) sums[first + i] = (int64_t)((uint64_t)sums[first + i] + (uint64_t)own[i]);
        at += block_bytes(n, wire);
    }
    dm_set_float_state(saved);
    return at;
}
