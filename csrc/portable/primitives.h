/* portable/primitives.h: what the vector extension cannot say, in plain C. It defines the bits for every level. */
#ifndef DM_PORTABLE_PRIMITIVES_H
#define DM_PORTABLE_PRIMITIVES_H

/* Exact fma on doubles: the product of two floats is exact, the sum is rounded to odd (its error is known from Knuth's
 * two-sum), and rounding 53 odd-rounded bits to 24 is then correct. Source: Boldo and Melquiond 2008. */
DM_INLINE f32_half fma_half(f32_half a, f32_half b, f32_half c) {
    f64v product = __builtin_convertvector(a, f64v) * __builtin_convertvector(b, f64v);
    f64v addend = __builtin_convertvector(c, f64v);
    f64v sum = product + addend;
    f64v shadow = sum - product;
    f64v error = (product - (sum - shadow)) + (addend - shadow);
    /* Two ordered comparisons: false for the NaN that an infinity leaves in `error`. */
    u64v inexact = (u64v)(error > 0.0) | (u64v)(error < 0.0);
    u64v even = ((u64v)sum & 1) - 1;
    u64v step = 1 - (((u64v)sum ^ (u64v)error) >> 63) * 2;
    sum = (f64v)((u64v)sum + (step & inexact & even));
    return __builtin_convertvector(sum, f32_half);
}

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) {
    union {
        f32v whole;
        f32_half half[2];
    } x = {a}, y = {b}, z = {c};
    z.half[0] = fma_half(x.half[0], y.half[0], z.half[0]);
    z.half[1] = fma_half(x.half[1], y.half[1], z.half[1]);
    return z.whole;
}

/* float16 to float32, for finite values (nothing else is ever stored). */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    u16_lanes narrow;
    __builtin_memcpy(&narrow, half, sizeof narrow);
    u32v bits = __builtin_convertvector(narrow, u32v);
    u32v sign = (bits & 0x8000) << 16;
    u32v magnitude = (bits & 0x7fff) << 13;
    u32v normal = magnitude + ((u32v){0} + (112u << 23));
    /* A denormal half is mantissa * 2^-24: put it behind the bits of 2^-14, then take 2^-14 away. */
    f32v denormal = (f32v)(magnitude + ((u32v){0} + (113u << 23))) - 0x1p-14f;
    u32v is_denormal = (u32v)((i32v)magnitude < (1 << 23));
    return (f32v)(sign | (normal & ~is_denormal) | ((u32v)denormal & is_denormal));
}

#endif
